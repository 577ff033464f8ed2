package resourcedirectory

import (
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// state is all that the log says about one device. A state that was published, or given to anybody but the worker that
// builds it, never changes.
type state struct {
	dev        hub.DeviceID
	seq        uint64 // of the last commit folded in
	time       int64  // of that commit
	owner      hub.Owner
	generation uint64

	// session is the number of the current session; everything lower is refused. Signing out, registering and unregistering
	// raise it to the seq of their commit, a number that no gateway holds.
	session uint64
	message uint64 // highest stored message number of session
	// ended is the session that the last sign-out ended, with the number of that message, so that a repeat of it is known.
	ended hub.Stamp

	meta       hub.Metadata
	metaCause  hub.Cause
	links      tree[*hub.Link]
	pages      tree[[]*hub.Link] // the same links by the document that holds them, so that one link costs one page
	linkBytes  int
	linksCause hub.Cause
	twins      tree[*twin]
	twinBytes  int

	commands []*hub.Command // that have not ended, in order; copied on each change
	keys     keys
	// Commands count among the events of what they are about, so that versions go on. metaSkip is how many the metadata's
	// last event has behind it, as twin.skip. loose is a version that no resource without a twin has reached, counted over all
	// of them: whoever may name any href must not make the device grow.
	metaSkip uint64
	loose    uint64
	// labels are replaced as a whole, never changed; labelEvents counts what brought them.
	labels      hub.Labels
	labelEvents uint64
}

// twin is a resource's last representation. index is its event's place in the commit: with Seq it orders ETags. skip is how
// many events of commands followed.
type twin struct {
	hub.Resource
	index int
	skip  uint64
}

func newState(dev hub.DeviceID) *state {
	return &state{dev: dev, meta: hub.Metadata{Twin: hub.Twin{Enabled: true}}}
}

// begin returns the state that c's events are to be applied to.
func (s *state) begin(c *hub.Commit) *state {
	next := *s
	next.seq, next.time = c.Seq, c.Time
	return &next
}

// fold returns the state after c and the keys of the documents that differ. It takes everything from the commit and counts
// nothing itself, so folding a commit again that some documents already contain, and all after it, ends in the same state.
func (s *state) fold(c *hub.Commit) (next *state, changed []string) {
	next = s.begin(c)
	for i := range c.Events {
		changed = next.apply(c, i, changed)
	}
	return next, append(changed, deviceKey)
}

// apply changes s, which nobody else sees yet, by the event at index i of c.
func (s *state) apply(c *hub.Commit, i int, changed []string) []string {
	ev := &c.Events[i]
	switch ev.Kind {
	case hub.Registered, hub.Unregistered:
		// Either way what a former owner's device left is gone, and so are its sessions; only seq and time go on.
		for page := range s.pages.all() {
			changed = append(changed, pageKey(page[0].Href))
		}
		for t := range s.twins.all() {
			changed = append(changed, twinKey(t.Href))
		}
		changed = s.commandDocs(changed)
		fresh := newState(s.dev)
		fresh.seq, fresh.time, fresh.session = s.seq, s.time, c.Seq
		fresh.generation = c.Generation
		if ev.Kind == hub.Registered {
			fresh.owner = c.Owner
		}
		*s = *fresh
		return changed
	case hub.MetadataUpdated:
		switch {
		case ev.Session == c.Seq && ev.Metadata.Connection.Online:
			s.session, s.message = c.Seq, 0
		case ev.Session == c.Seq:
			s.ended = hub.Stamp{Session: s.session, Message: ev.Message}
			s.session, s.message = c.Seq, 0
		default:
			s.sent(ev)
		}
		s.meta, s.metaCause, s.metaSkip = *ev.Metadata, hub.CauseOf(c, i), 0
		return changed
	case hub.LabelsChanged: // of no session, and in no document but the device's
		s.labels, s.labelEvents = labelsOf(ev), ev.Version+1
		return changed
	}
	s.sent(ev)
	switch ev.Kind {
	case hub.CommandPending, hub.CommandBound, hub.CommandEnded, hub.CommandLate:
		return s.applyCommand(c, i, changed)
	case hub.LinksPublished:
		for j := range ev.Links {
			changed = append(changed, s.putLink(&ev.Links[j]))
		}
		s.linksCause = hub.CauseOf(c, i)
	case hub.LinksUnpublished:
		for _, h := range ev.Hrefs {
			changed = append(changed, s.removeLink(h))
		}
		s.linksCause = hub.CauseOf(c, i)
	case hub.ResourceChanged:
		if old, ok := s.twins.get(string(ev.Href)); ok {
			s.twinBytes -= twinSize(&old.Resource)
		}
		t := &twin{index: i, Resource: hub.Resource{
			Href: ev.Href, Owner: c.Owner, Types: ev.Types, Status: ev.Status, Content: ev.Content, ETag: ev.ETag,
			Version: ev.Version, Seq: c.Seq, Time: c.Time, Session: ev.Session, Message: ev.Message,
			Connection: ev.Connection, User: ev.User, Correlation: ev.Correlation,
		}}
		s.twins = s.twins.put(string(ev.Href), t)
		s.twinBytes += twinSize(&t.Resource)
		changed = append(changed, twinKey(ev.Href))
	}
	return changed
}

// sent remembers the event's message number. Pieces of a request that needs several commits carry 0 but for the last, so a
// half-stored request is not taken for done.
func (s *state) sent(ev *hub.Event) {
	if ev.Session == s.session {
		s.message = max(s.message, ev.Message)
	}
}

func (s *state) putLink(l *hub.Link) (key string) {
	s.removeLink(l.Href)
	key = pageKey(l.Href)
	page, _ := s.pages.get(key)
	at, _ := slices.BinarySearchFunc(page, l.Href, byHref)
	s.pages = s.pages.put(key, slices.Insert(slices.Clone(page), at, l))
	s.links = s.links.put(string(l.Href), l)
	s.linkBytes += linkSize(l)
	return key
}

func (s *state) removeLink(h hub.Href) (key string) {
	key = pageKey(h)
	l, ok := s.links.get(string(h))
	if !ok {
		return key
	}
	page, _ := s.pages.get(key)
	if at, found := slices.BinarySearchFunc(page, h, byHref); found {
		page = slices.Delete(slices.Clone(page), at, at+1)
	}
	if len(page) == 0 {
		s.pages = s.pages.remove(key)
	} else {
		s.pages = s.pages.put(key, page)
	}
	s.links = s.links.remove(string(h))
	s.linkBytes -= linkSize(l)
	return key
}

func byHref(l *hub.Link, h hub.Href) int { return strings.Compare(string(l.Href), string(h)) }

// version is the next version of the event's aggregate, from 0.
func (s *state) version(ev *hub.Event) uint64 {
	next := func(c hub.Cause) uint64 {
		if !c.Known {
			return 0
		}
		return c.Version + 1
	}
	switch ev.Kind {
	case hub.MetadataUpdated:
		return next(s.metaCause) + s.metaSkip
	case hub.LinksPublished, hub.LinksUnpublished:
		return next(s.linksCause)
	case hub.CommandPending, hub.CommandEnded:
		if ev.Command.Kind.OfTwin() {
			return next(s.metaCause) + s.metaSkip
		}
		return s.resourceVersion(ev.Href)
	case hub.ResourceChanged:
		return s.resourceVersion(ev.Href)
	case hub.LabelsChanged:
		return s.labelEvents
	}
	return 0
}

func (s *state) resourceVersion(h hub.Href) uint64 {
	if t, ok := s.twins.get(string(h)); ok {
		return t.Version + t.skip + 1
	}
	return s.loose
}

// fence says whether a session's write may happen. done means that it happened before (design: an unknown outcome is settled
// by repeating the same number).
func (s *state) fence(from hub.Stamp) (done bool, err error) {
	switch {
	case from.Session == 0 || from.Message == 0:
		return false, hub.NewError(hub.Invalid, "stamp-invalid", "a write of a device needs a session and a message number")
	case from.Session < s.session:
		return false, errSuperseded
	case from.Session > s.session:
		return false, hub.NewError(hub.Precondition, "session-unknown", "the session is not known for this device")
	}
	return from.Message <= s.message, nil
}

var errSuperseded = hub.NewError(hub.Precondition, "session-superseded", "a newer session of the device has taken over")

// picture is what readers get.
func (s *state) picture() *hub.Device {
	return &hub.Device{
		ID: s.dev, Owner: s.owner, Generation: s.generation, Seq: s.seq, Metadata: s.meta, MetaCause: s.metaCause,
		Links: linkSet{s.links}, LinksCause: s.linksCause, Resources: resourceSet{s.twins}, Commands: s.picturedCommands(),
		Labels: s.labels,
	}
}

type linkSet struct{ t tree[*hub.Link] }

func (s linkSet) Len() int { return s.t.n }

func (s linkSet) Get(h hub.Href) (hub.Link, bool) {
	if l, ok := s.t.get(string(h)); ok {
		return *l, true
	}
	return hub.Link{}, false
}

func (s linkSet) All() iter.Seq[hub.Link] {
	return func(yield func(hub.Link) bool) {
		for l := range s.t.all() {
			if !yield(*l) {
				return
			}
		}
	}
}

type resourceSet struct{ t tree[*twin] }

func (s resourceSet) Len() int { return s.t.n }

func (s resourceSet) Get(h hub.Href) (*hub.Resource, bool) {
	if t, ok := s.t.get(string(h)); ok {
		return &t.Resource, true
	}
	return nil, false
}

func (s resourceSet) All() iter.Seq[*hub.Resource] {
	return func(yield func(*hub.Resource) bool) {
		for t := range s.t.all() {
			if !yield(&t.Resource) {
				return
			}
		}
	}
}

// What a state takes of memory beside the bytes that linkSize and twinSize count: structs, nodes of the trees and strings
// with headers of their own. TestStateBytes compares them with the heap.
const (
	stateCost = 2 << 10
	linkCost  = 224
	twinCost  = 288
	keyCost   = 640
	labelCost = 64
)

// bytes is about what the state takes of memory. States of one device share most of it; it is counted once.
func (s *state) bytes() int64 {
	n := stateCost + s.linkBytes + linkCost*s.links.n + s.twinBytes + twinCost*s.twins.n + keyCost*s.keys.byKey.n
	for name, value := range s.labels {
		n += labelCost + len(name) + len(value)
	}
	for _, c := range s.commands {
		n += commandSize(c)
	}
	return int64(n)
}

// Sizes are upper bounds of the stored form, so that no commit is refused by the store for its size.

const (
	eventOverhead  = 96
	commitOverhead = 4 << 10
	maxPiece       = 128 << 10 // of one event's links or hrefs
)

func textsSize(texts []string) int {
	n := 0
	for _, t := range texts {
		n += len(t) + 5
	}
	return n
}

func linkSize(l *hub.Link) int {
	n := 64 + len(l.Href) + len(l.Anchor) + len(l.Title) + textsSize(l.Types) + textsSize(l.Interfaces) + textsSize(l.ContentTypes)
	for _, e := range l.Endpoints {
		n += len(e.URI) + 15
	}
	return n
}

func twinSize(r *hub.Resource) int {
	return 128 + len(r.Href) + len(r.ETag) + len(r.Content.Type) + len(r.Content.Data) + textsSize(r.Types)
}

func eventSize(ev *hub.Event) int {
	n := eventOverhead + len(ev.Href) + len(ev.Connection) + len(ev.User) + len(ev.Correlation) + len(ev.ETag) +
		textsSize(ev.Types) + len(ev.Content.Type) + len(ev.Content.Data)
	for i := range ev.Links {
		n += linkSize(&ev.Links[i])
	}
	for _, h := range ev.Hrefs {
		n += len(h) + 5
	}
	if m := ev.Metadata; m != nil {
		n += 128 + len(m.Connection.ID) + len(m.Connection.Service) + textsSize(m.Connection.LocalEndpoints)
	}
	if c := ev.Command; c != nil {
		n += 48 + len(c.Interface) + len(c.Key) + len(c.Digest)
		for _, e := range slices.Concat(c.ETags, c.IfMatch) {
			n += len(e) + 5
		}
	}
	return n
}

func commandSize(c *hub.Command) int {
	return 512 + len(c.Href) + len(c.Interface) + len(c.Key) + len(c.Content.Data) + textsSize(c.Types)
}

const deviceKey = "d"

// linkPages is how many documents a device's links are spread over: one changed link rewrites one of them.
const linkPages = 256

func pageKey(h hub.Href) string { return fmt.Sprintf("l%02x", h.InstanceID()%linkPages) }

func twinKey(h hub.Href) string { return "r" + string(h) }

func commandKey(id string) string { return "c" + id }

func keyKey(key string) string { return "k" + key }
