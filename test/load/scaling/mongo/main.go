// Command mongo is a server that keeps all in memory and has the few commands of MongoDB that the hub uses: for measurements, in which
// FerretDB would take most of the machine. It listens on a loopback port, prints its URI on one line, and ends when its standard input
// does. Whether the commands mean what MongoDB means is FerretDB's business (test/mongo); that these do is shown by the conformance suite
// of internal/store with COAPHUB_TEST_MONGODB_URI. What is written is nowhere but in memory.
//
// It must not know the hub.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
)

func main() {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, "mongo:", err)
		os.Exit(1)
	}
	go serve(l) // ends with the process
	fmt.Printf("mongodb://%s/\n", l.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// memory is all collections.
type memory struct {
	mu     sync.Mutex // guards all below
	tables map[string]*table
}

func serve(l net.Listener) {
	m := &memory{tables: map[string]*table{}}
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go m.serve(c)
	}
}

// table is a collection: its documents by _id, which is a text, and their keys in order, in pieces that split when they are full.
type table struct {
	docs map[string]document
	keys [][]string
}

const fullPiece = 512

// place is where a key is or would be.
func (t *table) place(key string) (piece, at int, found bool) {
	piece, found = slices.BinarySearchFunc(t.keys, key, func(p []string, k string) int { return strings.Compare(p[0], k) })
	if found || len(t.keys) == 0 {
		return piece, 0, found
	}
	piece = max(0, piece-1)
	at, found = slices.BinarySearch(t.keys[piece], key)
	return piece, at, found
}

func (t *table) put(key string, d document) {
	if _, there := t.docs[key]; !there {
		i, at, _ := t.place(key)
		if len(t.keys) == 0 {
			t.keys = [][]string{nil}
		}
		t.keys[i] = slices.Insert(t.keys[i], at, key)
		if n := len(t.keys[i]); n > fullPiece {
			upper := slices.Clone(t.keys[i][n/2:])
			t.keys[i] = t.keys[i][: n/2 : n/2]
			t.keys = slices.Insert(t.keys, i+1, upper)
		}
	}
	t.docs[key] = d
}

func (t *table) remove(key string) {
	i, at, found := t.place(key)
	if !found {
		return
	}
	delete(t.docs, key)
	if t.keys[i] = slices.Delete(t.keys[i], at, at+1); len(t.keys[i]) == 0 {
		t.keys = slices.Delete(t.keys, i, i+1)
	}
}

// find yields the documents that a filter matches, in the order of their keys, at most limit if that is not 0.
func (t *table) find(filter document, limit int) (found []document) {
	take := func(key string) bool {
		d, there := t.docs[key]
		if there && d.matches(filter) {
			found = append(found, d)
		}
		return limit == 0 || len(found) < limit
	}
	id, has := filter.get("_id")
	from := ""
	switch {
	case has && id.typ == typeText:
		take(id.text())
		return found
	case has && id.typ == typeDocument:
		for op := range document(id.val).each {
			switch op.key {
			case "$in":
				keys := []string{}
				for e := range document(op.val).each {
					keys = append(keys, e.text())
				}
				slices.Sort(keys)
				for _, k := range slices.Compact(keys) {
					if !take(k) {
						break
					}
				}
				return found
			case "$gte", "$gt":
				from = op.text()
			}
		}
	}
	if len(t.keys) == 0 {
		return nil
	}
	below := ""
	if has && id.typ == typeDocument {
		for op := range document(id.val).each {
			if op.key == "$lt" || op.key == "$lte" {
				below = op.text()
			}
		}
	}
	for i, at, _ := t.place(from); i < len(t.keys); i, at = i+1, 0 {
		for _, k := range t.keys[i][at:] {
			if below != "" && k > below || !take(k) {
				return found
			}
		}
	}
	return found
}

// document is one in BSON (bsonspec.org).
type document []byte

type element struct {
	key string
	typ byte
	val []byte
}

const (
	typeDouble, typeText, typeDocument, typeArray, typeBinary = 0x01, 0x02, 0x03, 0x04, 0x05
	typeBool, typeNull, typeInt32, typeInt64                  = 0x08, 0x0a, 0x10, 0x12
)

func (d document) each(yield func(element) bool) {
	if len(d) < 5 {
		return
	}
	for b := d[4:]; len(b) > 1; {
		typ := b[0]
		end := bytes.IndexByte(b[1:], 0) + 1
		if end == 0 {
			return
		}
		e := element{key: string(b[1:end]), typ: typ}
		b = b[end+1:]
		n := 0
		switch typ {
		case typeDouble, 0x09, 0x11, typeInt64:
			n = 8
		case typeText:
			n = 4 + int(binary.LittleEndian.Uint32(b))
		case typeDocument, typeArray:
			n = int(binary.LittleEndian.Uint32(b))
		case typeBinary:
			n = 5 + int(binary.LittleEndian.Uint32(b))
		case 0x07:
			n = 12
		case typeBool:
			n = 1
		case typeInt32:
			n = 4
		}
		if n > len(b) {
			return
		}
		e.val, b = b[:n], b[n:]
		if !yield(e) {
			return
		}
	}
}

func (d document) get(key string) (found element, ok bool) {
	for e := range d.each {
		if e.key == key {
			return e, true
		}
	}
	return element{}, false
}

func (e element) text() string {
	if e.typ != typeText || len(e.val) < 5 {
		return ""
	}
	return string(e.val[4 : len(e.val)-1])
}

func (e element) number() (int64, bool) {
	switch e.typ {
	case typeInt32:
		return int64(int32(binary.LittleEndian.Uint32(e.val))), true
	case typeInt64:
		return int64(binary.LittleEndian.Uint64(e.val)), true
	case typeDouble:
		return int64(math.Float64frombits(binary.LittleEndian.Uint64(e.val))), true
	case typeBool:
		return int64(e.val[0]), true
	}
	return 0, false
}

// compare is of two values of a kind; others are not to be compared.
func compare(a, b element) (int, bool) {
	if a.typ == typeText && b.typ == typeText {
		return strings.Compare(a.text(), b.text()), true
	}
	x, ok := a.number()
	y, ok2 := b.number()
	switch {
	case !ok || !ok2:
		return 0, a.typ == b.typ && bytes.Equal(a.val, b.val)
	case x < y:
		return -1, true
	case x > y:
		return 1, true
	}
	return 0, true
}

func equal(a, b element) bool {
	if a.typ == typeArray && b.typ != typeArray {
		for e := range document(a.val).each {
			if equal(e, b) {
				return true
			}
		}
		return false
	}
	n, ok := compare(a, b)
	return ok && n == 0
}

func (d document) matches(filter document) bool {
	for f := range filter.each {
		v, there := d.get(f.key)
		if !there {
			v.typ = typeNull
		}
		if f.typ != typeDocument {
			if !equal(v, f) {
				return false
			}
			continue
		}
		for op := range document(f.val).each {
			n, ok := compare(v, op)
			switch op.key {
			case "$gt":
				ok = ok && n > 0
			case "$gte":
				ok = ok && n >= 0
			case "$lt":
				ok = ok && n < 0
			case "$lte":
				ok = ok && n <= 0
			case "$ne":
				ok = !equal(v, op)
			case "$in":
				ok = false
				for e := range document(op.val).each {
					ok = ok || equal(v, e)
				}
			default:
				ok = false
			}
			if !ok {
				return false
			}
		}
	}
	return true
}

// made is a document of elements.
func made(es ...element) document {
	d := document{0, 0, 0, 0}
	for _, e := range es {
		d = append(append(append(d, e.typ), e.key...), 0)
		d = append(d, e.val...)
	}
	d = append(d, 0)
	binary.LittleEndian.PutUint32(d, uint32(len(d)))
	return d
}

func integer(key string, n int) element {
	return element{key, typeInt32, binary.LittleEndian.AppendUint32(nil, uint32(n))}
}

func truth(key string) element { return element{key, typeBool, []byte{1}} }

func textOf(key, s string) element {
	return element{key, typeText, append(append(binary.LittleEndian.AppendUint32(nil, uint32(len(s)+1)), s...), 0)}
}

func list(key string, ds []document) element {
	es := make([]element, len(ds))
	for i, d := range ds {
		es[i] = element{fmt.Sprint(i), typeDocument, d}
	}
	return element{key, typeArray, made(es...)}
}

var done = element{"ok", typeDouble, binary.LittleEndian.AppendUint64(nil, math.Float64bits(1))}

// changed is the document after $set and $max.
func (d document) changed(update document) document {
	es := slices.Collect(d.each)
	for op := range update.each {
		for e := range document(op.val).each {
			i := slices.IndexFunc(es, func(x element) bool { return x.key == e.key })
			if i < 0 {
				es = append(es, e)
			} else if n, ok := compare(e, es[i]); op.key == "$set" || ok && n > 0 {
				es[i] = e
			}
		}
	}
	return made(es...)
}

// answer carries out a command. args are those that came beside it.
func (m *memory) answer(cmd document, args map[string][]document) document {
	var name, ns string
	for e := range cmd.each {
		if name == "" {
			name, ns = e.key, e.text()
		} else if e.key == "$db" {
			ns = e.text() + "." + ns
		}
		if e.typ == typeArray {
			for a := range document(e.val).each {
				args[e.key] = append(args[e.key], document(a.val))
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	t := m.tables[ns]
	if t == nil {
		t = &table{docs: map[string]document{}}
	}
	switch name {
	case "hello", "isMaster", "ismaster":
		return made(truth("helloOk"), truth("ismaster"), truth("isWritablePrimary"), integer("maxBsonObjectSize", 16<<20),
			integer("maxMessageSizeBytes", 48_000_000), integer("maxWriteBatchSize", 100_000), integer("minWireVersion", 0), integer("maxWireVersion", 21), done)
	case "find":
		filter, _ := cmd.get("filter")
		limit := int64(0)
		if e, ok := cmd.get("limit"); ok {
			limit, _ = e.number()
		}
		var by element
		if sort, ok := cmd.get("sort"); ok {
			for by = range document(sort.val).each {
				break
			}
		}
		var found []document
		if up, _ := by.number(); by.key == "_id" && up == 1 {
			found = t.find(document(filter.val), int(limit))
		} else {
			found = t.find(document(filter.val), 0)
			slices.SortStableFunc(found, func(a, b document) int {
				x, _ := a.get(by.key)
				y, _ := b.get(by.key)
				n, _ := compare(x, y)
				return n * int(up)
			})
			if limit > 0 {
				found = found[:min(len(found), int(limit))]
			}
		}
		if fields, ok := cmd.get("projection"); ok {
			for i, d := range found {
				var es []element
				for e := range d.each {
					if _, wanted := document(fields.val).get(e.key); wanted || e.key == "_id" {
						es = append(es, e)
					}
				}
				found[i] = made(es...)
			}
		}
		return made(element{"cursor", typeDocument, made(list("firstBatch", found), element{"id", typeInt64, make([]byte, 8)}, textOf("ns", ns))}, done)
	case "insert", "update", "delete":
		m.tables[ns] = t
		return t.write(name, args)
	case "dropDatabase":
		clear(m.tables)
		return made(done)
	case "createIndexes", "ping", "endSessions", "killCursors":
		return made(done)
	case "dbStats":
		size := 0
		for _, t := range m.tables {
			for k, d := range t.docs {
				size += len(k) + len(d)
			}
		}
		return made(element{"totalSize", typeInt64, binary.LittleEndian.AppendUint64(nil, uint64(size))}, done)
	}
	return made(element{"ok", typeDouble, make([]byte, 8)}, integer("code", 59), textOf("errmsg", "there is no command "+name))
}

func (t *table) write(name string, args map[string][]document) document {
	var n, modified int
	var upserted, wrong []document
	insert := func(i int, d document) bool {
		id, _ := d.get("_id")
		if _, there := t.docs[id.text()]; there {
			wrong = append(wrong, made(integer("index", i), integer("code", 11000), textOf("errmsg", "E11000 duplicate key error")))
			return false
		}
		t.put(id.text(), slices.Clone(d))
		return true
	}
	for i, d := range args["documents"] {
		if insert(i, d) {
			n++
		} // the hub wants all others even so, or sends one
	}
	for i, u := range args["updates"] {
		q, _ := u.get("q")
		change, _ := u.get("u")
		upsert, _ := u.get("upsert")
		yes, _ := upsert.number()
		found := t.find(document(q.val), 1)
		replaces := !strings.HasPrefix(firstKey(document(change.val)), "$")
		for _, d := range found {
			id, _ := d.get("_id")
			next := slices.Clone(document(change.val))
			if !replaces {
				next = d.changed(document(change.val))
			}
			n++
			if !bytes.Equal(next, d) {
				modified++
			}
			t.docs[id.text()] = next
		}
		if len(found) == 0 && yes == 1 && insert(i, document(change.val)) {
			n++
			id, _ := document(change.val).get("_id")
			upserted = append(upserted, made(integer("index", i), id))
		}
	}
	for _, d := range args["deletes"] {
		q, _ := d.get("q")
		limit, _ := d.get("limit")
		one, _ := limit.number()
		for _, d := range t.find(document(q.val), int(one)) {
			id, _ := d.get("_id")
			t.remove(id.text())
			n++
		}
	}
	es := []element{integer("n", n)}
	if name == "update" {
		es = append(es, integer("nModified", modified))
	}
	if len(upserted) > 0 {
		es = append(es, list("upserted", upserted))
	}
	if len(wrong) > 0 {
		es = append(es, list("writeErrors", wrong))
	}
	return made(append(es, done)...)
}

func firstKey(d document) string {
	for e := range d.each {
		return e.key
	}
	return ""
}

const opQuery, opReply = 2004, 1

var errMessage = errors.New("no message of the protocol")

// serve answers one connection's commands, one after the other.
func (m *memory) serve(c net.Conn) {
	defer c.Close()
	for {
		msg, err := message(c)
		if err != nil {
			return
		}
		reply, err := m.reply(msg)
		if err != nil {
			return
		}
		binary.LittleEndian.PutUint32(reply, uint32(len(reply)))
		copy(reply[8:12], msg[4:8]) // to which request it is the response
		if _, err := c.Write(reply); err != nil {
			return
		}
	}
}

func (m *memory) reply(msg []byte) ([]byte, error) {
	out := make([]byte, headerSize)
	body := msg[headerSize:]
	if binary.LittleEndian.Uint32(msg[12:]) == opQuery { // the first hello of a driver
		end := bytes.IndexByte(body[4:], 0)
		if end < 0 || len(body) < 4+end+1+8+5 {
			return nil, errMessage
		}
		binary.LittleEndian.PutUint32(out[12:], opReply)
		out = append(out, make([]byte, 16)...) // flags, cursor, and where it begins
		return append(binary.LittleEndian.AppendUint32(out, 1), m.answer(document(body[4+end+1+8:]), map[string][]document{})...), nil
	}
	binary.LittleEndian.PutUint32(out[12:], opMsg)
	out = append(out, 0, 0, 0, 0, 0)
	args := map[string][]document{}
	var cmd document
	for b := body[4:]; len(b) > 5; {
		kind, size := b[0], int(binary.LittleEndian.Uint32(b[1:]))
		if size+1 > len(b) || size < 5 {
			return nil, io.ErrUnexpectedEOF
		}
		section := b[1 : 1+size]
		b = b[1+size:]
		if kind == 0 {
			cmd = section
			continue
		}
		end := bytes.IndexByte(section[4:], 0)
		if end < 0 {
			return nil, errMessage
		}
		name := string(section[4 : 4+end])
		for ds := section[4+end+1:]; len(ds) > 4; {
			n := int(binary.LittleEndian.Uint32(ds))
			if n < 5 || n > len(ds) {
				return nil, errMessage
			}
			args[name] = append(args[name], ds[:n])
			ds = ds[n:]
		}
	}
	return append(out, m.answer(cmd, args)...), nil
}

const (
	headerSize = 16 // of a message: length, request, response to, op code, 32 bits each in little endian
	maxMessage = 48 << 20
	opMsg      = 2013
)

func message(from io.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(from, size[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(size[:])
	if n < headerSize+5 || n > maxMessage {
		return nil, errMessage
	}
	msg := make([]byte, n)
	copy(msg, size[:])
	_, err := io.ReadFull(from, msg[len(size):])
	return msg, err
}
