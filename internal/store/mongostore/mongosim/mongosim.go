// Package mongosim is as much of a MongoDB server as the store asks for, in memory and without time or a network of its own: it is given
// a message and returns the answer. Tests that simulate both put it at the other end of their connections.
//
// It must not know what the store keeps.
package mongosim

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"go.mongodb.org/mongo-driver/v2/bson"
)

// Server is a database server, a primary without secondaries. Its methods may be called from any goroutine.
type Server struct {
	// Unfenced has an insert replace what is there already, and say that it was not: a server whose keys are not unique.
	Unfenced bool
	// Forget is asked of each document of an insert; true has it lost although the answer says that it is stored.
	Forget func(collection string) bool

	mu          sync.Mutex // guards all below
	collections map[string]*collection
	answered    int32
}

// collection is documents in the order of their keys.
type collection struct {
	keys []string
	docs map[string]bson.Raw
}

// New makes an empty server.
func New() *Server { return &Server{collections: map[string]*collection{}} }

// Whole returns the length of the message that b begins with, 0 if it is not all there.
func Whole(b []byte) int {
	if len(b) < 16 {
		return 0
	}
	if n := int(binary.LittleEndian.Uint32(b)); n <= len(b) {
		return n
	}
	return 0
}

// The messages of MongoDB's wire protocol that drivers send and get.
const (
	opReply, opQuery, opMsg = 1, 2004, 2013
)

// Answer carries out a message and returns what goes back.
func (s *Server) Answer(msg []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	le := binary.LittleEndian
	if len(msg) < 21 || int(le.Uint32(msg)) != len(msg) {
		return nil, errors.New("this is no message")
	}
	id, op, rest := le.Uint32(msg[4:]), le.Uint32(msg[12:]), msg[16:]
	s.answered++
	out := make([]byte, 16, 512)
	le.PutUint32(out[4:], uint32(s.answered))
	le.PutUint32(out[8:], id)
	switch op {
	case opQuery: // the first message of a connection
		le.PutUint32(out[12:], opReply)
		out = le.AppendUint32(out, 8) // AwaitCapable
		out = append(out, make([]byte, 12)...)
		out = le.AppendUint32(out, 1)
		doc, err := bson.Marshal(hello())
		if err != nil {
			return nil, err
		}
		out = append(out, doc...)
	case opMsg:
		le.PutUint32(out[12:], opMsg)
		out = append(out, 0, 0, 0, 0, 0)
		reply, err := s.message(rest)
		if err != nil {
			return nil, err
		}
		doc, err := bson.Marshal(reply)
		if err != nil {
			return nil, err
		}
		out = append(out, doc...)
	default:
		return nil, fmt.Errorf("nobody knows the message %d", op)
	}
	le.PutUint32(out, uint32(len(out)))
	return out, nil
}

// message reads an OP_MSG: a command, and perhaps its documents apart.
func (s *Server) message(b []byte) (bson.D, error) {
	flags := binary.LittleEndian.Uint32(b)
	if b = b[4:]; flags&1 != 0 {
		b = b[:len(b)-4] // a checksum
	}
	var body bson.Raw
	apart := map[string][]bson.Raw{}
	for len(b) > 0 {
		kind := b[0]
		n := int(binary.LittleEndian.Uint32(b[1:]))
		part := b[1 : 1+n]
		b = b[1+n:]
		if kind == 0 {
			body = part
			continue
		}
		name, docs, ok := bytes.Cut(part[4:], []byte{0})
		if !ok {
			return nil, errors.New("a sequence of documents has no name")
		}
		for len(docs) > 0 {
			n := int(binary.LittleEndian.Uint32(docs))
			apart[string(name)] = append(apart[string(name)], docs[:n])
			docs = docs[n:]
		}
	}
	return s.command(body, apart)
}

func hello() bson.D {
	return bson.D{
		{Key: "ismaster", Value: true},
		{Key: "isWritablePrimary", Value: true},
		{Key: "helloOk", Value: true},
		{Key: "maxBsonObjectSize", Value: int32(16 << 20)},
		{Key: "maxMessageSizeBytes", Value: int32(48_000_000)},
		{Key: "maxWriteBatchSize", Value: int32(100_000)},
		{Key: "minWireVersion", Value: int32(0)},
		{Key: "maxWireVersion", Value: int32(21)},
		{Key: "ok", Value: 1.0},
	}
}

func (s *Server) command(body bson.Raw, apart map[string][]bson.Raw) (bson.D, error) {
	first, err := body.IndexErr(0)
	if err != nil {
		return nil, err
	}
	list := func(name string) []bson.Raw {
		docs := apart[name]
		if a, ok := body.Lookup(name).ArrayOK(); ok {
			values, _ := a.Values()
			for _, v := range values {
				docs = append(docs, v.Document())
			}
		}
		return docs
	}
	name, _ := first.Value().StringValueOK()
	c := s.collections[name]
	if c == nil {
		c = &collection{docs: map[string]bson.Raw{}}
		if name != "" {
			s.collections[name] = c
		}
	}
	ordered := true
	if is, ok := body.Lookup("ordered").BooleanOK(); ok {
		ordered = is
	}
	switch first.Key() {
	case "hello", "isMaster", "ismaster":
		return hello(), nil
	case "ping", "createIndexes", "endSessions", "killCursors":
		return bson.D{{Key: "ok", Value: 1.0}}, nil
	case "insert":
		return s.insert(name, c, list("documents"), ordered), nil
	case "find":
		found := c.find(body)
		return bson.D{{Key: "cursor", Value: bson.D{
			{Key: "id", Value: int64(0)}, {Key: "ns", Value: body.Lookup("$db").StringValue() + "." + name}, {Key: "firstBatch", Value: found},
		}}, {Key: "ok", Value: 1.0}}, nil
	case "update":
		return c.update(list("updates"))
	case "delete":
		n := int32(0)
		for _, d := range list("deletes") {
			for _, key := range c.matching(d.Lookup("q").Document(), int(number(d.Lookup("limit")))) {
				c.remove(key)
				n++
			}
		}
		return bson.D{{Key: "n", Value: n}, {Key: "ok", Value: 1.0}}, nil
	}
	return bson.D{{Key: "ok", Value: 0.0}, {Key: "code", Value: int32(59)}, {Key: "errmsg", Value: "no such command: " + first.Key()}}, nil
}

func (s *Server) insert(name string, c *collection, docs []bson.Raw, ordered bool) bson.D {
	n := int32(0)
	var failed bson.A
	for i, d := range docs {
		key := d.Lookup("_id").StringValue()
		if _, is := c.docs[key]; is && !s.Unfenced {
			failed = append(failed, bson.D{
				{Key: "index", Value: int32(i)}, {Key: "code", Value: int32(11000)}, {Key: "errmsg", Value: "E11000 duplicate key error"},
			})
			if ordered {
				break
			}
			continue
		}
		if n++; s.Forget == nil || !s.Forget(name) {
			c.put(key, d)
		}
	}
	out := bson.D{{Key: "n", Value: n}, {Key: "ok", Value: 1.0}}
	if len(failed) > 0 {
		out = append(out, bson.E{Key: "writeErrors", Value: failed})
	}
	return out
}

func (c *collection) put(key string, d bson.Raw) {
	if _, is := c.docs[key]; !is {
		at, _ := slices.BinarySearch(c.keys, key)
		c.keys = slices.Insert(c.keys, at, key)
	}
	c.docs[key] = slices.Clone(d)
}

func (c *collection) remove(key string) {
	if at, is := slices.BinarySearch(c.keys, key); is {
		c.keys = slices.Delete(c.keys, at, at+1)
	}
	delete(c.docs, key)
}

func (c *collection) find(body bson.Raw) []bson.Raw {
	filter, _ := body.Lookup("filter").DocumentOK()
	limit := int(number(body.Lookup("limit")))
	by, order := "_id", int64(1)
	if sort, ok := body.Lookup("sort").DocumentOK(); ok {
		if e, err := sort.IndexErr(0); err == nil {
			by, order = e.Key(), number(e.Value())
		}
	}
	most := limit
	if by != "_id" || order < 0 {
		most = 0
	}
	found := []bson.Raw{}
	for _, key := range c.matching(filter, most) {
		found = append(found, c.docs[key])
	}
	if by != "_id" || order < 0 {
		slices.SortStableFunc(found, func(a, b bson.Raw) int {
			n, _ := compare(a.Lookup(by), b.Lookup(by))
			return n * int(order)
		})
	}
	if limit > 0 && len(found) > limit {
		found = found[:limit]
	}
	return found
}

func (c *collection) update(updates []bson.Raw) (bson.D, error) {
	matched, modified := int32(0), int32(0)
	upserted := bson.A{}
	for i, u := range updates {
		q, change := u.Lookup("q").Document(), u.Lookup("u").Document()
		most := 1
		if multi, _ := u.Lookup("multi").BooleanOK(); multi {
			most = 0
		}
		keys := c.matching(q, most)
		for _, key := range keys {
			now, err := changed(c.docs[key], change)
			if err != nil {
				return nil, err
			}
			matched++
			if !bytes.Equal(now, c.docs[key]) {
				modified++
			}
			c.put(key, now)
		}
		if upsert, _ := u.Lookup("upsert").BooleanOK(); len(keys) == 0 && upsert {
			key := q.Lookup("_id").StringValue()
			now, err := changed(nil, change)
			if err != nil {
				return nil, err
			}
			c.put(key, now)
			matched++
			upserted = append(upserted, bson.D{{Key: "index", Value: int32(i)}, {Key: "_id", Value: key}})
		}
	}
	out := bson.D{{Key: "n", Value: matched}, {Key: "nModified", Value: modified}, {Key: "ok", Value: 1.0}}
	if len(upserted) > 0 {
		out = append(out, bson.E{Key: "upserted", Value: upserted})
	}
	return out, nil
}

// changed is a document after an update, or what replaces it.
func changed(old, change bson.Raw) (bson.Raw, error) {
	elems, err := change.Elements()
	if err != nil {
		return nil, err
	}
	if len(elems) == 0 || !strings.HasPrefix(elems[0].Key(), "$") {
		return change, nil
	}
	var doc bson.D
	if err := bson.Unmarshal(old, &doc); err != nil {
		return nil, err
	}
	for _, op := range elems {
		fields, err := op.Value().Document().Elements()
		if err != nil {
			return nil, err
		}
		for _, f := range fields {
			at := slices.IndexFunc(doc, func(e bson.E) bool { return e.Key == f.Key() })
			switch op.Key() {
			case "$set":
			case "$max":
				if n, ok := compare(old.Lookup(f.Key()), f.Value()); ok && n >= 0 {
					continue
				}
			default:
				return nil, fmt.Errorf("nobody knows the update %s", op.Key())
			}
			if at < 0 {
				doc = append(doc, bson.E{Key: f.Key(), Value: f.Value()})
			} else {
				doc[at].Value = f.Value()
			}
		}
	}
	return bson.Marshal(doc)
}

// matching returns the keys of the documents that match, in order, at most so many; 0: all.
func (c *collection) matching(filter bson.Raw, most int) (keys []string) {
	from, to := c.bounds(filter)
	for _, key := range c.keys[from:max(from, to)] {
		if matches(c.docs[key], filter) {
			if keys = append(keys, key); len(keys) == most {
				break
			}
		}
	}
	return keys
}

// bounds is where the keys can be that the filter is for.
func (c *collection) bounds(filter bson.Raw) (from, to int) {
	from, to = 0, len(c.keys)
	id := filter.Lookup("_id")
	if key, ok := id.StringValueOK(); ok {
		from, _ = slices.BinarySearch(c.keys, key)
		return from, min(from+1, to)
	}
	ops, ok := id.DocumentOK()
	if !ok {
		return from, to
	}
	elems, _ := ops.Elements()
	for _, e := range elems {
		key, ok := e.Value().StringValueOK()
		if !ok {
			continue
		}
		at, _ := slices.BinarySearch(c.keys, key)
		switch e.Key() {
		case "$gte", "$gt":
			from = max(from, at)
		case "$lt":
			to = min(to, at)
		}
	}
	return from, to
}

func matches(doc, filter bson.Raw) bool {
	conditions, _ := filter.Elements()
	for _, cond := range conditions {
		have, want := doc.Lookup(cond.Key()), cond.Value()
		ops, ok := want.DocumentOK()
		if !ok {
			if !equals(have, want) {
				return false
			}
			continue
		}
		elems, _ := ops.Elements()
		for _, e := range elems {
			if !holds(e.Key(), have, e.Value()) {
				return false
			}
		}
	}
	return true
}

func equals(have, want bson.RawValue) bool {
	if want.Type == bson.TypeNull {
		return len(have.Value) == 0 && have.Type == 0 || have.Type == bson.TypeNull
	}
	if a, ok := have.ArrayOK(); ok {
		values, _ := a.Values()
		return slices.ContainsFunc(values, func(v bson.RawValue) bool { return equals(v, want) })
	}
	n, ok := compare(have, want)
	return ok && n == 0
}

func holds(op string, have, want bson.RawValue) bool {
	if op == "$in" {
		values, _ := want.Array().Values()
		return slices.ContainsFunc(values, func(v bson.RawValue) bool { return equals(have, v) })
	}
	if op == "$ne" {
		return !equals(have, want)
	}
	n, ok := compare(have, want)
	if !ok {
		return false
	}
	switch op {
	case "$gt":
		return n > 0
	case "$gte":
		return n >= 0
	case "$lt":
		return n < 0
	case "$lte":
		return n <= 0
	}
	return false
}

func number(v bson.RawValue) int64 {
	n, _ := v.AsInt64OK()
	return n
}

// compare compares texts and numbers; ok is false for what cannot be compared.
func compare(a, b bson.RawValue) (n int, ok bool) {
	if x, is := a.StringValueOK(); is {
		y, is := b.StringValueOK()
		return strings.Compare(x, y), is
	}
	x, is := a.AsInt64OK()
	if !is {
		return 0, false
	}
	y, is := b.AsInt64OK()
	switch {
	case x < y:
		return -1, is
	case x > y:
		return 1, is
	}
	return 0, is
}
