package resourcedirectory

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// A device's documents: "d" the device, "l<page>" its links in pages, "r<href>" one for each resource, "c<id>" one for each
// command that has not ended, "k<key>" one for each idempotency key; the same keys after
// "b" are the bases of its history, all of the state before the first commit that the log still has. They are CBOR with
// numbered keys, deterministic (RFC 8949, Section 4.2.1), so that rebuilding gives the same bytes and a later version can
// add fields.

const (
	basePrefix = "b"
	docFormat  = 1
)

type deviceDoc struct {
	Format       uint8    `cbor:"0,keyasint"`
	FoldedTo     uint64   `cbor:"1,keyasint"` // every document of the device contains all events up to this seq
	Time         int64    `cbor:"2,keyasint"`
	Owner        string   `cbor:"3,keyasint,omitempty"`
	Generation   uint64   `cbor:"4,keyasint,omitempty"`
	Session      uint64   `cbor:"5,keyasint,omitempty"`
	Message      uint64   `cbor:"6,keyasint,omitempty"`
	EndedSession uint64   `cbor:"7,keyasint,omitempty"`
	EndedMessage uint64   `cbor:"8,keyasint,omitempty"`
	MetaCause    causeDoc `cbor:"9,keyasint"`
	LinksCause   causeDoc `cbor:"10,keyasint"`
	Online       bool     `cbor:"11,keyasint,omitempty"`
	Connection   string   `cbor:"12,keyasint,omitempty"`
	ConnectedAt  int64    `cbor:"13,keyasint,omitempty"`
	Protocol     uint8    `cbor:"14,keyasint,omitempty"`
	Service      string   `cbor:"15,keyasint,omitempty"`
	Endpoints    []string `cbor:"16,keyasint,omitempty"`
	TwinEnabled  bool     `cbor:"17,keyasint,omitempty"`
	TwinState    uint8    `cbor:"18,keyasint,omitempty"`
	SyncingAt    int64    `cbor:"19,keyasint,omitempty"`
	InSyncAt     int64    `cbor:"20,keyasint,omitempty"`
	ForcedAt     int64    `cbor:"21,keyasint,omitempty"`
	MetaSkip     uint64   `cbor:"22,keyasint,omitempty"`
	Loose        uint64   `cbor:"23,keyasint,omitempty"`
	Interval     int64    `cbor:"30,keyasint,omitempty"`
	NextContact  int64    `cbor:"31,keyasint,omitempty"`

	Labels      map[string]string `cbor:"40,keyasint,omitempty"`
	LabelEvents uint64            `cbor:"41,keyasint,omitempty"`
}

type causeDoc struct {
	Known       bool   `cbor:"0,keyasint,omitempty"`
	Version     uint64 `cbor:"1,keyasint,omitempty"`
	Time        int64  `cbor:"2,keyasint,omitempty"`
	Session     uint64 `cbor:"3,keyasint,omitempty"`
	Message     uint64 `cbor:"4,keyasint,omitempty"`
	Connection  string `cbor:"5,keyasint,omitempty"`
	User        string `cbor:"6,keyasint,omitempty"`
	Correlation string `cbor:"7,keyasint,omitempty"`
	Owner       string `cbor:"8,keyasint,omitempty"`
}

type pageDoc struct {
	Format uint8     `cbor:"0,keyasint"`
	Links  []linkDoc `cbor:"1,keyasint"`
}

type linkDoc struct {
	Href         string        `cbor:"0,keyasint"`
	Types        []string      `cbor:"1,keyasint,omitempty"`
	Interfaces   []string      `cbor:"2,keyasint,omitempty"`
	Anchor       string        `cbor:"3,keyasint,omitempty"`
	Title        string        `cbor:"4,keyasint,omitempty"`
	ContentTypes []string      `cbor:"5,keyasint,omitempty"`
	Policy       int32         `cbor:"6,keyasint,omitempty"`
	Endpoints    []endpointDoc `cbor:"7,keyasint,omitempty"`
	ValidUntil   int64         `cbor:"8,keyasint,omitempty"`
}

type endpointDoc struct {
	URI      string `cbor:"0,keyasint"`
	Priority uint64 `cbor:"1,keyasint,omitempty"`
}

type twinDoc struct {
	Format      uint8    `cbor:"0,keyasint"`
	Owner       string   `cbor:"1,keyasint,omitempty"`
	Types       []string `cbor:"2,keyasint,omitempty"`
	Status      uint8    `cbor:"3,keyasint,omitempty"`
	Type        string   `cbor:"4,keyasint,omitempty"`
	CoAPFormat  int32    `cbor:"5,keyasint"`
	Data        []byte   `cbor:"6,keyasint,omitempty"`
	ETag        []byte   `cbor:"7,keyasint,omitempty"`
	Version     uint64   `cbor:"8,keyasint,omitempty"`
	Seq         uint64   `cbor:"9,keyasint"`
	Index       int      `cbor:"10,keyasint,omitempty"`
	Time        int64    `cbor:"11,keyasint"`
	Session     uint64   `cbor:"12,keyasint,omitempty"`
	Message     uint64   `cbor:"13,keyasint,omitempty"`
	Connection  string   `cbor:"14,keyasint,omitempty"`
	User        string   `cbor:"15,keyasint,omitempty"`
	Correlation string   `cbor:"16,keyasint,omitempty"`
	Skip        uint64   `cbor:"17,keyasint,omitempty"`
}

type commandDoc struct {
	Format     uint8    `cbor:"0,keyasint"`
	Kind       uint8    `cbor:"1,keyasint"`
	Href       string   `cbor:"2,keyasint,omitempty"`
	Interface  string   `cbor:"3,keyasint,omitempty"`
	ETags      [][]byte `cbor:"4,keyasint,omitempty"`
	ValidUntil int64    `cbor:"5,keyasint"`
	Key        string   `cbor:"6,keyasint,omitempty"`
	Session    uint64   `cbor:"7,keyasint,omitempty"`
	Type       string   `cbor:"8,keyasint,omitempty"`
	CoAPFormat int32    `cbor:"9,keyasint"`
	Data       []byte   `cbor:"10,keyasint,omitempty"`
	Types      []string `cbor:"11,keyasint,omitempty"`
	Seq        uint64   `cbor:"12,keyasint"`
	Index      int      `cbor:"13,keyasint,omitempty"`
	Cause      causeDoc `cbor:"14,keyasint"`
	Code       uint8    `cbor:"15,keyasint,omitempty"`
	IfMatch    [][]byte `cbor:"16,keyasint,omitempty"`
}

type keyDoc struct {
	Format uint8  `cbor:"0,keyasint"`
	ID     string `cbor:"1,keyasint"`
	Sum    []byte `cbor:"2,keyasint"`
	Time   int64  `cbor:"3,keyasint"`
	Seq    uint64 `cbor:"4,keyasint"`
	Index  int    `cbor:"5,keyasint,omitempty"`
	End    uint64 `cbor:"6,keyasint,omitempty"` // seq of the commit with the end; 0 = there is none yet
}

// codec writes and reads documents.
type codec struct {
	enc cbor.EncMode
	dec cbor.DecMode
}

func newCodec() (codec, error) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		return codec{}, fmt.Errorf("set up the documents' encoder: %w", err)
	}
	// One page may hold all links of a device; its size is bounded by the store, not here.
	dec, err := cbor.DecOptions{MaxArrayElements: 1 << 20}.DecMode()
	if err != nil {
		return codec{}, fmt.Errorf("set up the documents' decoder: %w", err)
	}
	return codec{enc, dec}, nil
}

// docs encodes the documents of the given keys; a key that the state has nothing for becomes a deletion. The device's
// document comes last.
func (k codec) docs(s *state, keys []string, prefix string) ([]store.StateDoc, error) {
	slices.SortFunc(keys, func(a, b string) int {
		if (a == deviceKey) != (b == deviceKey) {
			if a == deviceKey {
				return 1
			}
			return -1
		}
		return strings.Compare(a, b)
	})
	keys = slices.Compact(keys)
	out := make([]store.StateDoc, 0, len(keys))
	for _, key := range keys {
		var v any
		switch key[0] {
		case 'd':
			v = s.deviceDoc()
		case 'l':
			if page, ok := s.pages.get(key); ok {
				v = newPageDoc(page)
			}
		case 'r':
			if t, ok := s.twins.get(key[1:]); ok {
				v = t.doc()
			}
		case 'c':
			if c := s.command(key[1:]); c != nil {
				v = newCommandDoc(c)
			}
		case 'k':
			if e, ok := s.keys.byKey.get(key[1:]); ok {
				v = &keyDoc{docFormat, e.id, e.sum, e.time, e.seq, e.index, e.end}
			}
		}
		doc := store.StateDoc{Key: prefix + key}
		if v != nil {
			b, err := k.enc.Marshal(v)
			if err != nil {
				return nil, fmt.Errorf("encode document %.64q: %w", key, err)
			}
			doc.Value = b
		}
		out = append(out, doc)
	}
	return out, nil
}

// read builds the state that the documents with the prefix hold; without any, it is a new device's.
func (k codec) read(dev hub.DeviceID, docs []store.StateDoc, prefix string) (*state, error) {
	s := newState(dev)
	for i := range docs {
		key, ok := strings.CutPrefix(docs[i].Key, prefix)
		if !ok || key == "" || prefix == "" && key[0] == basePrefix[0] {
			continue
		}
		if err := k.readDoc(s, key, docs[i].Value); err != nil {
			return nil, fmt.Errorf("decode document %.64q of device %s: %w", docs[i].Key, dev, err)
		}
	}
	slices.SortFunc(s.commands, inOrder)
	return s, nil
}

func (k codec) readDoc(s *state, key string, value []byte) error {
	switch key[0] {
	case 'd':
		var d deviceDoc
		if err := k.dec.Unmarshal(value, &d); err != nil {
			return err
		}
		if d.Format != docFormat {
			return fmt.Errorf("format %d is not known", d.Format)
		}
		s.setDevice(&d)
	case 'l':
		var d pageDoc
		if err := k.dec.Unmarshal(value, &d); err != nil {
			return err
		}
		page := make([]*hub.Link, len(d.Links))
		for i := range d.Links {
			l := d.Links[i].link()
			page[i] = l
			s.links = s.links.put(string(l.Href), l)
			s.linkBytes += linkSize(l)
		}
		s.pages = s.pages.put(key, page)
	case 'r':
		var d twinDoc
		if err := k.dec.Unmarshal(value, &d); err != nil {
			return err
		}
		t := d.twin(hub.Href(key[1:]))
		s.twins = s.twins.put(key[1:], t)
		s.twinBytes += twinSize(&t.Resource)
	case 'c':
		var d commandDoc
		if err := k.dec.Unmarshal(value, &d); err != nil {
			return err
		}
		s.commands = append(s.commands, d.command(s.dev, key[1:]))
	case 'k':
		var d keyDoc
		if err := k.dec.Unmarshal(value, &d); err != nil {
			return err
		}
		s.keys = s.keys.put(&keyed{key: key[1:], id: d.ID, sum: d.Sum, time: d.Time, seq: d.Seq, index: d.Index, end: d.End})
	default:
		return fmt.Errorf("key is not known")
	}
	return nil
}

// load reads a device as the store has it now.
func (k codec) load(ctx context.Context, log store.Log, dev hub.DeviceID) (*state, error) {
	st, err := log.Load(ctx, dev)
	if err != nil {
		return nil, fmt.Errorf("load device: %w", err)
	}
	s, _, err := k.replay(dev, &st)
	return s, err
}

// loadToAppend is load for who is going to append: documents that the store does not have yet are handed over (store.Log.Fold).
func (k codec) loadToAppend(ctx context.Context, log store.Log, dev hub.DeviceID) (*state, error) {
	st, err := log.Load(ctx, dev)
	if err != nil {
		return nil, fmt.Errorf("load device: %w", err)
	}
	return k.fold(ctx, log, dev, &st)
}

// fold makes the state of what was loaded, and gives the store the documents that do not contain all commits.
func (k codec) fold(ctx context.Context, log store.Log, dev hub.DeviceID, st *store.State) (*state, error) {
	s, changed, err := k.replay(dev, st)
	if err != nil || len(st.Commits) == 0 {
		return s, err
	}
	docs, err := k.docs(s, changed, "")
	if err != nil {
		return nil, err
	}
	if err := log.Fold(ctx, dev, *st, docs); err != nil {
		return nil, fmt.Errorf("fold device: %w", err)
	}
	return s, nil
}

// replay makes the state of what was loaded, and the keys of the documents that do not contain all commits.
func (k codec) replay(dev hub.DeviceID, st *store.State) (s *state, changed []string, err error) {
	if s, err = k.read(dev, st.Docs, ""); err != nil {
		return nil, nil, err
	}
	for i := range st.Commits {
		// A commit that the documents contain in part is folded again with all after it, see fold.
		if c := &st.Commits[i]; c.Seq > s.seq {
			var keys []string
			s, keys = s.fold(c)
			changed = append(changed, keys...)
		}
	}
	if s.seq != st.LastSeq {
		return nil, nil, fmt.Errorf("load device %s: documents and log end at seq %d, the newest commit is %d", dev, s.seq, st.LastSeq)
	}
	return s, changed, nil
}

func (s *state) deviceDoc() *deviceDoc {
	c, t := s.meta.Connection, s.meta.Twin
	return &deviceDoc{
		Format: docFormat, FoldedTo: s.seq, Time: s.time, Owner: string(s.owner), Generation: s.generation,
		Session: s.session, Message: s.message, EndedSession: s.ended.Session, EndedMessage: s.ended.Message,
		MetaCause: newCauseDoc(s.metaCause), LinksCause: newCauseDoc(s.linksCause),
		Online: c.Online, Connection: c.ID, ConnectedAt: c.ConnectedAt, Protocol: uint8(c.Protocol), Service: c.Service,
		Endpoints: c.LocalEndpoints, TwinEnabled: t.Enabled, TwinState: uint8(t.State), SyncingAt: t.SyncingAt,
		InSyncAt: t.InSyncAt, ForcedAt: t.ForcedAt, MetaSkip: s.metaSkip, Loose: s.loose,
		Interval: int64(s.meta.Contact.Interval), NextContact: s.meta.Contact.Next,
		Labels: s.labels, LabelEvents: s.labelEvents,
	}
}

func (s *state) setDevice(d *deviceDoc) {
	s.seq, s.time, s.owner, s.generation = d.FoldedTo, d.Time, hub.Owner(d.Owner), d.Generation
	s.session, s.message = d.Session, d.Message
	s.ended = hub.Stamp{Session: d.EndedSession, Message: d.EndedMessage}
	s.metaCause, s.linksCause = d.MetaCause.cause(), d.LinksCause.cause()
	s.metaSkip, s.loose = d.MetaSkip, d.Loose
	s.meta = hub.Metadata{
		Connection: hub.Connection{
			Online: d.Online, ID: d.Connection, ConnectedAt: d.ConnectedAt, Protocol: hub.Protocol(d.Protocol),
			Service: d.Service, LocalEndpoints: d.Endpoints,
		},
		Twin: hub.Twin{
			Enabled: d.TwinEnabled, State: hub.TwinState(d.TwinState), SyncingAt: d.SyncingAt, InSyncAt: d.InSyncAt,
			ForcedAt: d.ForcedAt,
		},
		Contact: hub.Contact{Interval: time.Duration(d.Interval), Next: d.NextContact},
	}
	s.labels, s.labelEvents = d.Labels, d.LabelEvents
}

func newCauseDoc(c hub.Cause) causeDoc {
	return causeDoc{c.Known, c.Version, c.Time, c.Session, c.Message, c.Connection, c.User, c.Correlation, string(c.Owner)}
}

func (d *causeDoc) cause() hub.Cause {
	return hub.Cause{
		Known: d.Known, Version: d.Version, Time: d.Time, Session: d.Session, Message: d.Message,
		Connection: d.Connection, User: d.User, Correlation: d.Correlation, Owner: hub.Owner(d.Owner),
	}
}

func newPageDoc(page []*hub.Link) *pageDoc {
	d := &pageDoc{Format: docFormat, Links: make([]linkDoc, len(page))}
	for i, l := range page {
		d.Links[i] = linkDoc{
			Href: string(l.Href), Types: l.Types, Interfaces: l.Interfaces, Anchor: l.Anchor, Title: l.Title,
			ContentTypes: l.ContentTypes, Policy: l.Policy, ValidUntil: l.ValidUntil,
		}
		for _, e := range l.Endpoints {
			d.Links[i].Endpoints = append(d.Links[i].Endpoints, endpointDoc(e))
		}
	}
	return d
}

func (d *linkDoc) link() *hub.Link {
	l := &hub.Link{
		Href: hub.Href(d.Href), Types: d.Types, Interfaces: d.Interfaces, Anchor: d.Anchor, Title: d.Title,
		ContentTypes: d.ContentTypes, Policy: d.Policy, ValidUntil: d.ValidUntil,
	}
	for _, e := range d.Endpoints {
		l.Endpoints = append(l.Endpoints, hub.Endpoint(e))
	}
	return l
}

func (t *twin) doc() *twinDoc {
	return &twinDoc{
		Format: docFormat, Owner: string(t.Owner), Types: t.Types, Status: uint8(t.Status), Type: t.Content.Type,
		CoAPFormat: t.Content.Format, Data: t.Content.Data, ETag: t.ETag, Version: t.Version, Seq: t.Seq, Index: t.index,
		Time: t.Time, Session: t.Session, Message: t.Message, Connection: t.Connection, User: t.User,
		Correlation: t.Correlation, Skip: t.skip,
	}
}

func (d *twinDoc) twin(h hub.Href) *twin {
	return &twin{index: d.Index, skip: d.Skip, Resource: hub.Resource{
		Href: h, Owner: hub.Owner(d.Owner), Types: d.Types, Status: hub.Status(d.Status),
		Content: hub.Content{Type: d.Type, Format: d.CoAPFormat, Data: d.Data}, ETag: d.ETag, Version: d.Version,
		Seq: d.Seq, Time: d.Time, Session: d.Session, Message: d.Message, Connection: d.Connection, User: d.User,
		Correlation: d.Correlation,
	}}
}

func newCommandDoc(c *hub.Command) *commandDoc {
	return &commandDoc{
		Format: docFormat, Kind: uint8(c.Kind), Href: string(c.Href), Interface: c.Interface, ETags: c.ETags, ValidUntil: c.ValidUntil,
		Key: c.Key, Session: c.Session, Type: c.Content.Type, CoAPFormat: c.Content.Format, Data: c.Content.Data, Types: c.Types,
		Seq: c.Seq, Index: c.Index, Cause: newCauseDoc(c.Cause), Code: c.Code, IfMatch: c.IfMatch,
	}
}

func (d *commandDoc) command(dev hub.DeviceID, id string) *hub.Command {
	return &hub.Command{
		CommandEvent: hub.CommandEvent{
			Kind: hub.CommandKind(d.Kind), Interface: d.Interface, ETags: d.ETags, ValidUntil: d.ValidUntil, Key: d.Key,
			Session: d.Session, Code: d.Code, IfMatch: d.IfMatch,
		},
		Device: dev, ID: id, Href: hub.Href(d.Href), Content: hub.Content{Type: d.Type, Format: d.CoAPFormat, Data: d.Data},
		Types: d.Types, Seq: d.Seq, Index: d.Index, Cause: d.Cause.cause(),
	}
}
