package resourcedirectory

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
)

const (
	// keyAge is how long an idempotency key is remembered, and maxKeys how many a device may have; forgetting one early would
	// carry out twice what must be carried out once, so more are refused.
	keyAge  = 24 * time.Hour
	maxKeys = 4096
	// maxCommandTypes bounds the resource types that are copied from a link into a command.
	maxCommandTypes = 4 << 10
)

// keys are the idempotency keys of a device, by key and by age. It is immutable.
type keys struct {
	byKey tree[*keyed]
	byAge tree[string]
}

// keyed is what is remembered of a command with a key.
type keyed struct {
	key, id string
	sum     []byte // of what was asked
	time    int64
	seq     uint64 // of the pending event's commit, with index its place
	index   int
	end     uint64 // seq of the commit that ended it; 0 = none yet
}

func (k *keyed) age() string { return fmt.Sprintf("%016x%04x", k.seq, k.index) }

func (k keys) put(e *keyed) keys {
	return keys{k.byKey.put(e.key, e), k.byAge.put(e.age(), e.key)}
}

func (k keys) remove(e *keyed) keys {
	return keys{k.byKey.remove(e.key), k.byAge.remove(e.age())}
}

// old yields keys that are past their time at now, oldest first. One whose command goes on stays.
func (k keys) old(now int64) []*keyed {
	var out []*keyed
	for key := range k.byAge.all() {
		e, _ := k.byKey.get(key)
		if now-e.time < int64(keyAge) {
			break
		}
		if e.end != 0 {
			out = append(out, e)
		}
	}
	return out
}

// digest tells whether two orders with the same key are the same.
func digest(o *hub.Order) []byte {
	c := o.Content
	if len(o.Asked.Data) > 0 {
		c = o.Asked
	}
	return sumOf(o.Kind, o.Method, o.Href, o.Interface, c, o.ETags, forwarded(o))
}

func sumOf(kind hub.CommandKind, method uint8, href hub.Href, iface string, c hub.Content, etags, ifMatch [][]byte) []byte {
	h := sha256.New()
	part := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	part([]byte{byte(kind)})
	if method != 0 {
		part([]byte{method})
	}
	part([]byte(href))
	part([]byte(iface))
	part([]byte(c.Type))
	part(binary.BigEndian.AppendUint32(nil, uint32(c.Format)))
	part(c.Data)
	for _, e := range etags {
		part(e)
	}
	if len(ifMatch) > 0 {
		part([]byte("condition")) // is too long for an ETag
		for _, e := range ifMatch {
			part(e)
		}
	}
	return h.Sum(nil)[:16]
}

func inOrder(a, b *hub.Command) int {
	return cmp.Or(cmp.Compare(a.Seq, b.Seq), cmp.Compare(a.Index, b.Index))
}

// command returns the command if it has not ended, else nil.
func (s *state) command(id string) *hub.Command {
	if i := s.commandAt(id); i >= 0 {
		return s.commands[i]
	}
	return nil
}

func (s *state) commandAt(id string) int {
	return slices.IndexFunc(s.commands, func(c *hub.Command) bool { return c.ID == id })
}

func (s *state) picturedCommands() []hub.Command {
	if len(s.commands) == 0 {
		return nil
	}
	out := make([]hub.Command, len(s.commands))
	for i, c := range s.commands {
		out[i] = *c
	}
	return out
}

// commandDocs appends the keys of all documents about commands.
func (s *state) commandDocs(changed []string) []string {
	for _, c := range s.commands {
		changed = append(changed, commandKey(c.ID))
	}
	for e := range s.keys.byKey.all() {
		changed = append(changed, keyKey(e.key))
	}
	return changed
}

// applyCommand is apply for the events of commands.
func (s *state) applyCommand(c *hub.Commit, i int, changed []string) []string {
	ev := &c.Events[i]
	at := s.commandAt(ev.Correlation)
	switch ev.Kind {
	case hub.CommandPending:
		changed = s.counted(ev, changed)
		cmd := &hub.Command{
			CommandEvent: *ev.Command, Device: s.dev, ID: ev.Correlation, Href: ev.Href, Content: ev.Content, Types: ev.Types,
			Seq: c.Seq, Index: i, Cause: hub.CauseOf(c, i),
		}
		s.commands = slices.Clone(s.commands)
		if at >= 0 { // folded again
			s.commands[at] = cmd
		} else {
			s.commands = append(s.commands, cmd)
		}
		if cmd.Key != "" {
			for _, e := range s.keys.old(c.Time) {
				s.keys = s.keys.remove(e)
				changed = append(changed, keyKey(e.key))
			}
			sum := cmd.Digest
			if sum == nil { // as it was stored before: of what was made of what was asked for
				sum = sumOf(cmd.Kind, cmd.Code, cmd.Href, cmd.Interface, cmd.Content, cmd.ETags, cmd.IfMatch)
			}
			cmd.Digest = nil // the key has it
			s.keys = s.keys.put(&keyed{key: cmd.Key, id: cmd.ID, sum: sum, time: c.Time, seq: c.Seq, index: i})
			changed = append(changed, keyKey(cmd.Key))
		}
	case hub.CommandBound:
		if at < 0 {
			return changed
		}
		bound := *s.commands[at]
		bound.Session = ev.Command.Session
		s.commands = slices.Clone(s.commands)
		s.commands[at] = &bound
	case hub.CommandEnded:
		changed = s.counted(ev, changed)
		if at >= 0 {
			s.commands = slices.Delete(slices.Clone(s.commands), at, at+1)
		}
		if e, ok := s.keys.byKey.get(ev.Command.Key); ok && e.id == ev.Correlation {
			ended := *e
			ended.end = c.Seq
			s.keys = s.keys.put(&ended)
			changed = append(changed, keyKey(e.key))
		}
		if ev.Metadata != nil {
			s.meta, s.metaCause, s.metaSkip = *ev.Metadata, hub.CauseOf(c, i), 0
		}
	case hub.CommandLate:
		return changed // told, and nothing of it is kept
	}
	return append(changed, commandKey(ev.Correlation))
}

// counted counts an event of a command among those of what it is about.
func (s *state) counted(ev *hub.Event, changed []string) []string {
	if ev.Command.Kind.OfTwin() {
		var next uint64
		if s.metaCause.Known {
			next = s.metaCause.Version + 1
		}
		if ev.Version >= next {
			s.metaSkip = ev.Version - next + 1
		}
		return changed
	}
	t, ok := s.twins.get(string(ev.Href))
	if !ok {
		s.loose = max(s.loose, ev.Version+1)
		return changed
	}
	if ev.Version > t.Version {
		now := *t
		now.skip = ev.Version - t.Version
		s.twins = s.twins.put(string(ev.Href), &now)
		changed = append(changed, twinKey(ev.Href))
	}
	return changed
}

var (
	errNotYours = hub.NewError(hub.Denied, "device-not-yours", "there is no such device, or it is not yours")
	errEnded    = hub.NewError(hub.NotFound, "command-unknown", "no such command waits")
	errExpired  = hub.NewError(hub.Deadline, "command-expired", "the device did not answer in time")
)

// allowed reports whether commands of the kind may go by the method.
func allowed(kind hub.CommandKind, method uint8) bool {
	switch method {
	case 0:
		return true
	case hub.MethodFetch:
		return kind == hub.CommandRetrieve
	case hub.MethodPatch, hub.MethodIPatch:
		return kind == hub.CommandUpdate
	}
	return false
}

func checkOrder(o *hub.Order, fallback time.Duration) error {
	invalid := func(code, text string) error { return hub.NewError(hub.Invalid, code, text) }
	if o.TTL == 0 {
		o.TTL = fallback
	}
	switch {
	case o.Kind < hub.CommandCreate || o.Kind > hub.CommandTwinSync:
		return invalid("command-invalid", "there is no such command")
	case !allowed(o.Kind, o.Method):
		return invalid("command-invalid", "the command's kind does not go by that method")
	case o.TTL < hub.MinCommandTTL || o.TTL > hub.MaxCommandTTL:
		return invalid("time-to-live-invalid", "timeToLive is between 100 ms and a year, in nanoseconds")
	case len(o.Interface) > hub.MaxInterface:
		return invalid("interface-invalid", "the resource interface is longer than 250 bytes")
	case len(o.Key) > hub.MaxCommandKey:
		return invalid("idempotency-key-invalid", "the idempotency key is longer than 255 bytes")
	case len(o.ETags) > hub.MaxCommandTags || len(o.IfMatch)+len(o.IfSeq) > hub.MaxCommandTags:
		return invalid("etag-invalid", "there are more than 16 ETags")
	case o.ForwardIfMatch && len(forwarded(o)) == 0:
		return invalid("condition-invalid", "If-Match names no ETag that a device could have, so there is nothing to forward")
	case len(o.Content.Data) > hub.MaxContent:
		return hub.NewError(hub.TooLarge, "content-too-large", "the content is larger than 256 KiB")
	case len(o.Content.Type) > 255 || len(o.Connection) > 255:
		return invalid("content-type-invalid", "the content type is longer than 255 bytes")
	}
	if !slices.ContainsFunc(o.ETags, func(e []byte) bool { return len(e) == 0 || len(e) > 8 }) {
		if o.Kind.OfTwin() {
			o.Href = ""
			return nil
		}
		return checkHref(o.Href)
	}
	return invalid("etag-invalid", "an ETag has 1 to 8 bytes") // RFC 7252, Section 5.10
}

// Command stores a command, has it delivered, and returns how it ended; with Async, as soon as it is stored. A command for a
// device that is away waits for it. An error means that there is no such command, but for Deadline and Unavailable once ctx has
// ended: then it goes on. One that expired is Deadline with code "command-expired".
//
// Denied for a device that is not owner's; NotFound for a resource that is neither published nor was ever reported, unless
// forced; Invalid for what the order lacks; Precondition for a condition that the twin does not meet; Exhausted when too many
// commands of the device wait.
func (d *Directory) Command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
	const op = "directory.Command"
	if err := checkOrder(&o, d.cfg.DefaultCommandTimeToLive); err != nil {
		return hub.Outcome{}, wrap(op, err)
	}
	s, err := d.read(ctx, o.Device)
	switch {
	case err != nil:
		return hub.Outcome{}, wrap(op, err)
	case owner == "" || s.owner != owner: // nobody fills the index with devices that are not theirs
		return hub.Outcome{}, errNotYours.With(op, nil)
	}
	// The index is written first, so that it holds every device with commands when the process dies.
	if err := d.mark(ctx, commandIndex, o.Device, d.run); err != nil {
		return hub.Outcome{}, refused(op, err)
	}
	w := d.worker(o.Device)
	fresh := uuid.NewString()
	var sum []byte // of what was asked for, with a key
	if o.Key != "" {
		sum = digest(&o)
	}
	var id string
	var from uint64 // where to look for its end
	r := &request{dev: o.Device, op: op}
	r.decide = func(s *state, now int64) ([]hub.Event, error) {
		id, from = fresh, s.seq
		if s.owner != owner {
			return nil, errNotYours
		}
		if e, ok := s.keys.byKey.get(o.Key); o.Key != "" && ok && (now-e.time < int64(keyAge) || e.end == 0) {
			if !bytes.Equal(e.sum, sum) {
				return nil, hub.NewError(hub.Invalid, "idempotency-key-reused", "the idempotency key belongs to another command")
			}
			id, from = e.id, max(e.seq, e.end)
			return nil, nil
		}
		if o.Repeat {
			return nil, &hub.Error{Kind: hub.NotFound}
		}
		return d.ordered(s, &o, fresh, sum, now, w.live[o.Device])
	}
	r.stored = func(w *worker) {
		if id == fresh {
			w.offer(o.Device, id)
		}
	}
	told := d.waiters.add(o.Device, fresh) // before it can end
	defer d.waiters.remove(o.Device, fresh, told)
	if err := d.do(ctx, r); err != nil || o.Async {
		return hub.Outcome{}, err
	}
	if id != fresh {
		again := d.waiters.add(o.Device, id)
		defer d.waiters.remove(o.Device, id, again)
		told = again
	}
	d.waiters.listen(told)
	if s, err = d.read(ctx, o.Device); err != nil { // it may have ended before we listened
		return hub.Outcome{}, wrap(op, err)
	}
	if s.command(id) == nil {
		select {
		case out, ok := <-told.ch:
			if ok {
				return ended(out)
			}
		default:
		}
		return d.outcome(ctx, o.Device, id, from)
	}
	select {
	case out, ok := <-told.ch:
		if !ok { // somebody else wrote the device: the log knows
			return d.outcome(ctx, o.Device, id, from)
		}
		return ended(out)
	case <-ctx.Done():
		return hub.Outcome{}, wrap(op, ctx.Err())
	case <-d.overtaken():
		return hub.Outcome{}, errStopping.With(op, nil)
	case <-d.stopped:
		return hub.Outcome{}, errStopping.With(op, nil)
	}
}

func ended(out hub.Outcome) (hub.Outcome, error) {
	if out.End == hub.CommandExpired {
		return out, errExpired.With("directory.Command", nil)
	}
	return out, nil
}

// outcome reads a command's end from the log, from a seq on.
func (d *Directory) outcome(ctx context.Context, dev hub.DeviceID, id string, from uint64) (hub.Outcome, error) {
	const op = "directory.outcome"
	for c, err := range d.store.Commits(ctx, dev, from) {
		if err != nil {
			return hub.Outcome{}, wrap(op, err)
		}
		for i := range c.Events {
			if ev := &c.Events[i]; ev.Kind == hub.CommandEnded && ev.Correlation == id {
				return ended(hub.OutcomeOf(&c, i))
			}
		}
	}
	return hub.Outcome{}, &hub.Error{
		Kind: hub.Precondition, Op: op, Code: "idempotency-outcome-gone",
		Text: "the command was carried out before, but history does not keep its outcome any more",
	}
}

// ordered makes the events of a new command.
func (d *Directory) ordered(s *state, o *hub.Order, id string, sum []byte, now int64, l *live) ([]hub.Event, error) {
	ev := hub.Event{
		Kind: hub.CommandPending, Href: o.Href, Correlation: id, User: o.User, Connection: o.Connection, Content: o.Content,
		Command: &hub.CommandEvent{
			Kind: o.Kind, Interface: o.Interface, ETags: o.ETags, ValidUntil: now + int64(o.TTL), Key: o.Key, Code: o.Method,
			IfMatch: forwarded(o), Digest: sum,
		},
	}
	if !o.Kind.OfTwin() {
		link, published := s.links.get(string(o.Href))
		t, reported := s.twins.get(string(o.Href))
		if !published && !reported && !o.Force {
			return nil, hub.NewError(hub.NotFound, "resource-unknown", "the device has no resource "+string(o.Href))
		}
		if len(o.IfMatch)+len(o.IfSeq) > 0 && !(reported && meets(t, o)) {
			return nil, hub.NewError(hub.Precondition, "etag-mismatch", "the resource has another ETag than the condition names")
		}
		switch {
		case published:
			ev.Types = link.Types
		case reported:
			ev.Types = t.Types
		}
		if textsSize(ev.Types) > maxCommandTypes {
			ev.Types = nil
		}
	}
	if o.Key != "" && s.keys.byKey.n-len(s.keys.old(now)) >= maxKeys {
		return nil, hub.NewError(hub.Exhausted, "idempotency-keys-full", "the device has too many idempotency keys of the last 24 hours")
	}
	var events []hub.Event
	left := len(s.commands)
	for _, c := range s.commands {
		if supersedes(o, c) {
			events = append(events, s.ends(c, hub.Answer{End: hub.CommandCancelled}, o.User, o.Connection))
			left--
		}
	}
	if left >= d.cfg.Limits.Commands {
		return nil, &hub.Error{
			Kind: hub.Exhausted, Code: "commands-full", Text: "too many commands wait for the device", RetryAfter: 5 * time.Second,
		}
	}
	if l != nil && l.to != nil && l.session == s.session && s.meta.Connection.Online && s.mayGo(o, l) {
		ev.Command.Session = l.session
	}
	return append(events, ev), nil
}

// supersedes reports whether a command that was not sent yet ends because of a newer one.
func supersedes(o *hub.Order, c *hub.Command) bool {
	return o.Supersede && c.Session == 0 && c.Kind == o.Kind && c.Href == o.Href
}

// mayGo reports whether a new command may be sent at once: what is bound and not sent would be lost with the session, so nothing
// may be in front of it but what the device has already, and takes beside.
func (s *state) mayGo(o *hub.Order, l *live) bool {
	var bound []string
	for _, c := range s.commands {
		switch {
		case c.Session == l.session && c.Href != o.Href:
			bound = append(bound, c.ID)
		case c.Session != 0 || !supersedes(o, c):
			return false
		}
	}
	return l.to.Ready(o.Href, bound)
}

// forwarded is the condition that the device is to check (RFC 7252, Section 5.10: an If-Match has at most 8 bytes).
func forwarded(o *hub.Order) (tags [][]byte) {
	if !o.ForwardIfMatch {
		return nil
	}
	for _, e := range o.IfMatch {
		switch {
		case len(e) == 0:
			tags = append(tags, nil) // as the log gives it back
		case len(e) <= 8:
			tags = append(tags, e)
		}
	}
	return tags
}

// meets reports whether the twin is one that the order wants.
func meets(t *twin, o *hub.Order) bool {
	return len(t.ETag) == 0 && slices.Contains(o.IfSeq, t.Seq) ||
		slices.ContainsFunc(o.IfMatch, func(e []byte) bool { return len(e) == 0 || bytes.Equal(e, t.ETag) })
}

// ends makes the event that ends a command.
func (s *state) ends(c *hub.Command, a hub.Answer, user, connection string) hub.Event {
	switch a.End {
	case hub.CommandCompleted:
	case hub.CommandCancelled:
		a = hub.Answer{End: a.End, Status: hub.StatusCanceled, Content: hub.Content{Format: hub.FormatNone}}
	case hub.CommandExpired:
		a = hub.Answer{End: a.End, Status: hub.StatusCanceled, Content: plain("the command expired before the device answered")}
	case hub.CommandUnavailable:
		if len(a.Content.Data) == 0 {
			a.Content = plain("the device's session ended before it answered")
		}
		a.Status = hub.StatusUnavailable
	}
	ev := hub.Event{
		Kind: hub.CommandEnded, Href: c.Href, Correlation: c.ID, User: user, Connection: connection, Types: c.Types,
		Status: a.Status, Content: a.Content, ETag: a.ETag,
		Command: &hub.CommandEvent{Kind: c.Kind, End: a.End, ValidUntil: c.ValidUntil, Key: c.Key, Session: c.Session, Code: a.Code},
	}
	if c.Kind.OfTwin() {
		meta := s.meta
		ev.Metadata, ev.Content = &meta, hub.Content{}
	}
	return ev
}

func plain(text string) hub.Content {
	return hub.Content{Type: hub.MediaType(hub.FormatText), Format: hub.FormatText, Data: []byte(text)}
}

// endBound ends the commands that were sent to sessions before the given number: no answer can come any more, and nobody
// knows whether they were carried out.
func (s *state) endBound(before uint64) []hub.Event {
	var events []hub.Event
	for _, c := range s.commands {
		if c.Session != 0 && c.Session < before {
			events = append(events, s.ends(c, hub.Answer{End: hub.CommandUnavailable}, "", s.meta.Connection.ID))
		}
	}
	return events
}

// endAll ends all commands of a device that is being deleted.
func (s *state) endAll(user string) []hub.Event {
	var events []hub.Event
	for _, c := range s.commands {
		events = append(events, s.ends(c, hub.Answer{End: hub.CommandCancelled}, user, s.meta.Connection.ID))
	}
	return events
}

// CancelCommands ends commands of a device and returns their IDs. One that was sent may be carried out all the same. Denied
// for a device that is not owner's, NotFound if there is nothing to cancel.
func (d *Directory) CancelCommands(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, user, connection string,
) ([]string, error) {
	var ids []string
	r := &request{dev: dev, op: "directory.CancelCommands"}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		ids = nil
		if owner == "" || s.owner != owner {
			return nil, errNotYours
		}
		var events []hub.Event
		for _, c := range s.commands {
			if !pick.All && (c.Kind.OfTwin() != pick.Twin || !pick.Twin && c.Href != pick.Href) ||
				len(pick.IDs) > 0 && !slices.Contains(pick.IDs, c.ID) {
				continue
			}
			ids = append(ids, c.ID)
			events = append(events, s.ends(c, hub.Answer{End: hub.CommandCancelled}, user, connection))
		}
		if len(events) == 0 {
			return nil, errEnded
		}
		return events, nil
	}
	if err := d.do(ctx, r); err != nil {
		return nil, err
	}
	return ids, nil
}

// TakeCommands binds at most n of the commands that wait to the session and returns them: they may be sent once this has
// returned, to this session and to no other. There is never more than one for an href, counting those in have, which the
// session has already, and those for one href are taken in order. What was bound to the session, is not in have and has not
// expired is returned first, so that an answer that was lost is made up for by asking again. More says that others wait, be it
// for these to end.
func (d *Directory) TakeCommands(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) (taken []hub.Command, more bool, _ error) {
	r := &request{dev: from.Device, op: "directory.TakeCommands"}
	r.decide = func(s *state, now int64) ([]hub.Event, error) {
		taken, more = nil, false
		switch {
		case from.Session < s.session:
			return nil, errSuperseded
		case from.Session > s.session || !s.meta.Connection.Online:
			return nil, hub.NewError(hub.Precondition, "session-unknown", "the session is not known for this device")
		}
		// Also those that the session has and that ended here: the device may be at it.
		busy := map[hub.Href]bool{}
		for _, h := range have {
			busy[h.Href] = true
		}
		for _, c := range s.commands {
			if c.Session != from.Session {
				continue
			}
			has := slices.ContainsFunc(have, func(h hub.Taken) bool { return h.ID == c.ID })
			if !has && c.ValidUntil <= now {
				continue // nobody is at it, and it ends by itself as soon as that can be stored
			}
			busy[c.Href] = true
			switch {
			case has:
			case len(taken) < n:
				taken = append(taken, *c)
			default:
				more = true
			}
		}
		var events []hub.Event
		for _, c := range s.commands {
			if c.Session != 0 || c.ValidUntil <= now {
				continue
			}
			if busy[c.Href] || len(taken) >= n {
				more = true
				continue
			}
			busy[c.Href] = true
			bound := *c
			bound.Session = from.Session
			taken = append(taken, bound)
			events = append(events, hub.Event{
				Kind: hub.CommandBound, Href: c.Href, Correlation: c.ID, User: from.User, Connection: s.meta.Connection.ID,
				Command: &hub.CommandEvent{Kind: c.Kind, Session: from.Session, ValidUntil: c.ValidUntil},
			})
		}
		return events, nil
	}
	if err := d.do(ctx, r); err != nil {
		return nil, false, err
	}
	return taken, more, nil
}

// EndCommand records what the device answered to a command that is bound to the session, or that it did not. After the
// command's end an answer is recorded as late, which changes nothing. Twin commands change the metadata with their end.
func (d *Directory) EndCommand(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error {
	const op = "directory.EndCommand"
	switch {
	case a.End != hub.CommandCompleted && a.End != hub.CommandUnavailable:
		return hub.NewError(hub.Invalid, "command-invalid", "a device cannot end a command like this").With(op, nil)
	case len(a.Content.Data) > hub.MaxContent || len(a.ETag) > 255 || len(a.Content.Type) > 255:
		return hub.NewError(hub.TooLarge, "content-too-large", "the content is larger than 256 KiB").With(op, nil)
	}
	r := &request{dev: from.Device, op: op}
	r.decide = func(s *state, now int64) ([]hub.Event, error) {
		if done, err := s.fence(from); done || err != nil {
			return nil, err
		}
		c := s.command(id)
		if c == nil {
			if a.End != hub.CommandCompleted {
				return nil, nil
			}
			ev := s.event(hub.CommandLate, from)
			ev.Correlation, ev.Status, ev.Content, ev.ETag = id, a.Status, a.Content, a.ETag
			ev.Command = &hub.CommandEvent{End: hub.CommandCompleted, Session: from.Session, Code: a.Code}
			return []hub.Event{ev}, nil
		}
		if c.Session != from.Session {
			return nil, hub.NewError(hub.Precondition, "command-not-bound", "the command is not bound to this session")
		}
		ev := s.ends(c, a, from.User, s.meta.Connection.ID)
		ev.Session, ev.Message = from.Session, from.Message
		if m := ev.Metadata; m != nil && a.End == hub.CommandCompleted {
			switch c.Kind {
			case hub.CommandTwinOff:
				m.Twin.Enabled, m.Twin.State = false, hub.TwinDisabled
			case hub.CommandTwinOn:
				if !m.Twin.Enabled {
					m.Twin.Enabled, m.Twin.State = true, hub.TwinOutOfSync
				}
			case hub.CommandTwinSync:
				m.Twin.Enabled, m.Twin.State, m.Twin.ForcedAt = true, hub.TwinOutOfSync, now
			case hub.CommandCreate, hub.CommandRetrieve, hub.CommandUpdate, hub.CommandDelete: // have no metadata
			}
		}
		return []hub.Event{ev}, nil
	}
	return d.do(ctx, r)
}
