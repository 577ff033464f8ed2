package store

import (
	"encoding/binary"
	"errors"
	"math"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// The stored form of a commit: a version byte, then numbers as varints, texts and bytes with their length before them. An
// event begins with a set of bits that says which of its fields follow, since most events leave most fields empty. Device
// and seq are not in it: they are the key. Field order is fixed for ever; what is added later gets a new bit or a new
// version.
const commitFormat = 1

// Bits of an event's field set.
const (
	hasHref = 1 << iota
	hasVersion
	hasSession
	hasMessage
	hasConnection
	hasUser
	hasCorrelation
	hasStatus
	hasETag
	hasTypes
	hasContent
	hasLinks
	hasHrefs
	hasMetadata
	hasCommand
	hasCode    // of the command
	hasIfMatch // of the command
	hasDigest  // of the command
	allFields  = 1<<iota - 1
)

var errDamaged = errors.New("stored commit is damaged")

// AppendCommit appends the stored form of c, without its device and seq, to b. What it writes counts against
// hub.MaxCommitBytes.
func AppendCommit(b []byte, c *hub.Commit) []byte {
	b = append(b, commitFormat)
	b = binary.AppendVarint(b, c.Time)
	b = append(b, c.ID[:]...)
	b = appendText(b, c.Writer)
	b = binary.AppendUvarint(b, c.Number)
	b = appendText(b, c.Owner)
	b = binary.AppendUvarint(b, c.Generation)
	b = binary.AppendUvarint(b, uint64(len(c.Events)))
	for i := range c.Events {
		b = appendEvent(b, &c.Events[i])
	}
	return b
}

func appendEvent(b []byte, e *hub.Event) []byte {
	var set uint64
	for bit, present := range [...]bool{
		e.Href != "", e.Version != 0, e.Session != 0, e.Message != 0, e.Connection != "", e.User != "", e.Correlation != "",
		e.Status != 0, len(e.ETag) != 0, len(e.Types) != 0,
		e.Content.Type != "" || e.Content.Format != 0 || len(e.Content.Data) != 0,
		len(e.Links) != 0, len(e.Hrefs) != 0, e.Metadata != nil, e.Command != nil,
		e.Command != nil && e.Command.Code != 0, e.Command != nil && len(e.Command.IfMatch) != 0,
		e.Command != nil && len(e.Command.Digest) != 0,
	} {
		if present {
			set |= 1 << bit
		}
	}
	b = append(b, byte(e.Kind))
	b = binary.AppendUvarint(b, set)
	if set&hasHref != 0 {
		b = appendText(b, e.Href)
	}
	if set&hasVersion != 0 {
		b = binary.AppendUvarint(b, e.Version)
	}
	if set&hasSession != 0 {
		b = binary.AppendUvarint(b, e.Session)
	}
	if set&hasMessage != 0 {
		b = binary.AppendUvarint(b, e.Message)
	}
	if set&hasConnection != 0 {
		b = appendText(b, e.Connection)
	}
	if set&hasUser != 0 {
		b = appendText(b, e.User)
	}
	if set&hasCorrelation != 0 {
		b = appendText(b, e.Correlation)
	}
	if set&hasStatus != 0 {
		b = append(b, byte(e.Status))
	}
	if set&hasETag != 0 {
		b = appendText(b, e.ETag)
	}
	if set&hasTypes != 0 {
		b = appendTexts(b, e.Types)
	}
	if set&hasContent != 0 {
		b = appendText(b, e.Content.Type)
		b = binary.AppendVarint(b, int64(e.Content.Format))
		b = appendText(b, e.Content.Data)
	}
	if set&hasLinks != 0 {
		b = binary.AppendUvarint(b, uint64(len(e.Links)))
		for i := range e.Links {
			b = appendLink(b, &e.Links[i])
		}
	}
	if set&hasHrefs != 0 {
		b = appendTexts(b, e.Hrefs)
	}
	if set&hasMetadata != 0 {
		b = appendMetadata(b, e.Metadata)
	}
	if set&hasCommand != 0 {
		b = appendCommand(b, e.Command)
	}
	if set&hasCode != 0 {
		b = append(b, e.Command.Code)
	}
	if set&hasIfMatch != 0 {
		b = appendTags(b, e.Command.IfMatch)
	}
	if set&hasDigest != 0 {
		b = appendText(b, e.Command.Digest)
	}
	return b
}

func appendCommand(b []byte, c *hub.CommandEvent) []byte {
	b = append(b, byte(c.Kind), byte(c.End))
	b = appendText(b, c.Interface)
	b = appendTags(b, c.ETags)
	b = binary.AppendVarint(b, c.ValidUntil)
	b = appendText(b, c.Key)
	return binary.AppendUvarint(b, c.Session)
}

func appendTags(b []byte, tags [][]byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(tags)))
	for _, e := range tags {
		b = appendText(b, e)
	}
	return b
}

func appendLink(b []byte, l *hub.Link) []byte {
	b = appendText(b, l.Href)
	b = appendTexts(b, l.Types)
	b = appendTexts(b, l.Interfaces)
	b = appendText(b, l.Anchor)
	b = appendText(b, l.Title)
	b = appendTexts(b, l.ContentTypes)
	b = binary.AppendVarint(b, int64(l.Policy))
	b = binary.AppendUvarint(b, uint64(len(l.Endpoints)))
	for _, ep := range l.Endpoints {
		b = appendText(b, ep.URI)
		b = binary.AppendUvarint(b, ep.Priority)
	}
	return binary.AppendVarint(b, l.ValidUntil)
}

func appendMetadata(b []byte, m *hub.Metadata) []byte {
	var flags byte
	if m.Connection.Online {
		flags |= 1
	}
	if m.Twin.Enabled {
		flags |= 2
	}
	if m.Contact != (hub.Contact{}) {
		flags |= 4
	}
	b = append(b, flags)
	b = appendText(b, m.Connection.ID)
	b = binary.AppendVarint(b, m.Connection.ConnectedAt)
	b = append(b, byte(m.Connection.Protocol))
	b = appendText(b, m.Connection.Service)
	b = appendTexts(b, m.Connection.LocalEndpoints)
	b = append(b, byte(m.Twin.State))
	b = binary.AppendVarint(b, m.Twin.SyncingAt)
	b = binary.AppendVarint(b, m.Twin.InSyncAt)
	b = binary.AppendVarint(b, m.Twin.ForcedAt)
	if flags&4 != 0 {
		b = binary.AppendVarint(b, int64(m.Contact.Interval))
		b = binary.AppendVarint(b, m.Contact.Next)
	}
	return b
}

func appendText[T ~string | ~[]byte](b []byte, s T) []byte {
	b = binary.AppendUvarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendTexts[T ~string](b []byte, ss []T) []byte {
	b = binary.AppendUvarint(b, uint64(len(ss)))
	for _, s := range ss {
		b = appendText(b, s)
	}
	return b
}

// DecodeCommit reads what AppendCommit wrote. The commit shares no memory with b; Device and Seq are left to the caller.
// Bytes that AppendCommit cannot have written are an error, never a panic, and cost no more memory than a small multiple of
// their length.
func DecodeCommit(b []byte) (hub.Commit, error) {
	r := reader{b: b}
	var c hub.Commit
	if v := r.byte(); v != commitFormat {
		return hub.Commit{}, errDamaged
	}
	c.Time = r.varint()
	copy(c.ID[:], r.take(len(c.ID)))
	c.Writer = r.text()
	c.Number = r.uvarint()
	c.Owner = hub.Owner(r.text())
	c.Generation = r.uvarint()
	n := r.count(2)
	if n > hub.MaxCommitEvents { // an event in memory is far larger than its two bytes here
		return hub.Commit{}, errDamaged
	}
	c.Events = make([]hub.Event, n)
	for i := range c.Events {
		r.event(&c.Events[i])
	}
	if r.bad || len(r.b) != 0 {
		return hub.Commit{}, errDamaged
	}
	return c, nil
}

// CommitTime reads only the time of a stored commit: looking for a moment in a device's log needs no more.
func CommitTime(b []byte) (int64, error) {
	r := reader{b: b}
	if v := r.byte(); v != commitFormat {
		return 0, errDamaged
	}
	t := r.varint()
	if r.bad {
		return 0, errDamaged
	}
	return t, nil
}

// reader takes values off the front of b. After the first damage everything it returns is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) fail() { r.b, r.bad = nil, true }

func (r *reader) take(n int) []byte {
	if n > len(r.b) {
		r.fail()
		return nil
	}
	out := r.b[:n]
	r.b = r.b[n:]
	return out
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.fail()
		return 0
	}
	v := r.b[0]
	r.b = r.b[1:]
	return v
}

func (r *reader) uvarint() uint64 {
	v, n := binary.Uvarint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) varint() int64 {
	v, n := binary.Varint(r.b)
	if n <= 0 {
		r.fail()
		return 0
	}
	r.b = r.b[n:]
	return v
}

func (r *reader) int32() int32 {
	v := r.varint()
	if v < math.MinInt32 || v > math.MaxInt32 {
		r.fail()
		return 0
	}
	return int32(v)
}

// count reads how many elements follow. Each takes at least size bytes, so that a damaged number cannot ask for more memory
// than the bytes could fill.
func (r *reader) count(size int) int {
	n := r.uvarint()
	if n > uint64(len(r.b)/size) {
		r.fail()
		return 0
	}
	return int(n)
}

func (r *reader) raw() []byte { return r.take(r.count(1)) }

func (r *reader) text() string { return string(r.raw()) }

func (r *reader) bytes() []byte {
	raw := r.raw()
	if len(raw) == 0 {
		return nil
	}
	return append(make([]byte, 0, len(raw)), raw...)
}

func texts[T ~string](r *reader) []T {
	n := r.count(1)
	if n == 0 {
		return nil
	}
	out := make([]T, n)
	for i := range out {
		out[i] = T(r.text())
	}
	return out
}

func (r *reader) event(e *hub.Event) {
	e.Kind = hub.EventKind(r.byte())
	set := r.uvarint()
	if set&^allFields != 0 {
		r.fail()
		return
	}
	if set&hasHref != 0 {
		e.Href = hub.Href(r.text())
	}
	if set&hasVersion != 0 {
		e.Version = r.uvarint()
	}
	if set&hasSession != 0 {
		e.Session = r.uvarint()
	}
	if set&hasMessage != 0 {
		e.Message = r.uvarint()
	}
	if set&hasConnection != 0 {
		e.Connection = r.text()
	}
	if set&hasUser != 0 {
		e.User = r.text()
	}
	if set&hasCorrelation != 0 {
		e.Correlation = r.text()
	}
	if set&hasStatus != 0 {
		e.Status = hub.Status(r.byte())
	}
	if set&hasETag != 0 {
		e.ETag = r.bytes()
	}
	if set&hasTypes != 0 {
		e.Types = texts[string](r)
	}
	if set&hasContent != 0 {
		e.Content.Type = r.text()
		e.Content.Format = r.int32()
		e.Content.Data = r.bytes()
	}
	if set&hasLinks != 0 {
		if n := r.count(9); n > 0 {
			e.Links = make([]hub.Link, n)
			for i := range e.Links {
				r.link(&e.Links[i])
			}
		}
	}
	if set&hasHrefs != 0 {
		e.Hrefs = texts[hub.Href](r)
	}
	if set&hasMetadata != 0 {
		e.Metadata = r.metadata()
	}
	if set&hasCommand != 0 {
		e.Command = r.command()
	}
	if set&(hasCode|hasIfMatch|hasDigest) != 0 && e.Command == nil {
		r.fail()
		return
	}
	if set&hasCode != 0 {
		e.Command.Code = r.byte()
	}
	if set&hasIfMatch != 0 {
		e.Command.IfMatch = r.tags()
	}
	if set&hasDigest != 0 {
		e.Command.Digest = r.bytes()
	}
}

func (r *reader) command() *hub.CommandEvent {
	c := &hub.CommandEvent{Kind: hub.CommandKind(r.byte()), End: hub.CommandEnd(r.byte()), Interface: r.text()}
	c.ETags = r.tags()
	c.ValidUntil = r.varint()
	c.Key = r.text()
	c.Session = r.uvarint()
	return c
}

func (r *reader) tags() [][]byte {
	n := r.count(1)
	if n == 0 {
		return nil
	}
	out := make([][]byte, n)
	for i := range out {
		out[i] = r.bytes()
	}
	return out
}

func (r *reader) link(l *hub.Link) {
	l.Href = hub.Href(r.text())
	l.Types = texts[string](r)
	l.Interfaces = texts[string](r)
	l.Anchor = r.text()
	l.Title = r.text()
	l.ContentTypes = texts[string](r)
	l.Policy = r.int32()
	if n := r.count(2); n > 0 {
		l.Endpoints = make([]hub.Endpoint, n)
		for i := range l.Endpoints {
			l.Endpoints[i] = hub.Endpoint{URI: r.text(), Priority: r.uvarint()}
		}
	}
	l.ValidUntil = r.varint()
}

func (r *reader) metadata() *hub.Metadata {
	flags := r.byte()
	if flags > 7 {
		r.fail()
	}
	m := &hub.Metadata{}
	m.Connection.Online, m.Twin.Enabled = flags&1 != 0, flags&2 != 0
	m.Connection.ID = r.text()
	m.Connection.ConnectedAt = r.varint()
	m.Connection.Protocol = hub.Protocol(r.byte())
	m.Connection.Service = r.text()
	m.Connection.LocalEndpoints = texts[string](r)
	m.Twin.State = hub.TwinState(r.byte())
	m.Twin.SyncingAt = r.varint()
	m.Twin.InSyncAt = r.varint()
	m.Twin.ForcedAt = r.varint()
	if flags&4 != 0 {
		m.Contact.Interval, m.Contact.Next = time.Duration(r.varint()), r.varint()
	}
	return m
}
