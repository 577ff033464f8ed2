package device

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"slices"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
)

// observer is one observation of the hub, on the connection it came on.
type observer struct {
	token message.Token
	href  string
	batch bool
	seq   uint32 // of the next notification
}

// reply is what the device answers.
type reply struct {
	code codes.Code
	body any // encoded as CBOR; nil: no payload
	text string
	etag []byte
}

// query is the parts of Uri-Query that a device looks at.
type query struct {
	iface string
	types []string
	etags [][]byte // of the ETag options and of incChanges, in the order of the request
}

// serve answers a request of the hub. go-coap calls it one message at a time, in order.
func (d *Device) serve(w mux.ResponseWriter, m *mux.Message) {
	if m.Code() < codes.GET || m.Code() > codes.DELETE {
		// Answers nobody waits for any more come here too; nothing is said to them, nor to methods OCF does not have.
		w.Message().SetModified(false)
		return
	}
	d.stats.Requests.Add(1)
	if d.cfg.Silent {
		w.Message().SetModified(false)
		return
	}
	if m.HasOption(message.IfMatch) { // RFC 7252, Section 5.4.1: iotivity-lite knows no conditions
		d.set(w, reply{code: codes.BadOption})
		return
	}
	path, err := m.Path()
	if err != nil {
		path = "/"
	}
	q := readQuery(m.Message)
	if m.Code() == codes.GET {
		if n, err := m.Observe(); err == nil && n == 0 {
			d.observe(w, m.Token(), path, q)
			return
		} else if err == nil && n == 1 { // RFC 7641, 3.6
			d.mu.Lock()
			delete(d.observers, string(m.Token()))
			d.mu.Unlock()
		}
		d.mu.Lock()
		r := d.get(path, q)
		d.mu.Unlock()
		d.set(w, r)
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.resources[path]
	switch {
	case path == credHref && m.Code() == codes.POST:
		d.set(w, d.takeCertificate(m.Message))
	case r == nil:
		d.set(w, notFound)
	case r.fail != 0:
		d.set(w, reply{code: r.fail, text: "as the test wished"})
	case m.Code() != codes.POST || !r.writable:
		d.set(w, reply{code: codes.MethodNotAllowed})
	default:
		rep, changed := d.post(r, m.Message)
		if !changed {
			d.set(w, rep)
			return
		}
		// The answer goes out first, then the notifications, as iotivity-lite does it: so the answer is written here.
		w.Message().SetModified(false)
		if err := d.write(d.current(), m.Token(), rep, -1); err != nil {
			d.log.Debug("answer", "path", path, "error", err)
			return
		}
		d.notify(r)
	}
}

var notFound = reply{code: codes.NotFound, text: "no such resource"}

// get makes the answer to a GET. Callers hold mu.
func (d *Device) get(path string, q query) reply {
	r := d.resources[path]
	switch {
	case path == csrHref:
		return d.csr()
	case r == nil:
		return notFound
	case r.fail != 0:
		return reply{code: r.fail, text: "as the test wished"}
	case q.iface != "" && !slices.Contains(r.interfaces, q.iface):
		return reply{code: codes.BadRequest, text: "the resource has no interface " + q.iface}
	case path == resHref && q.iface == ifBatch:
		return d.batch(q.etags)
	case path == resHref:
		links := d.links(func(r *resource) bool {
			return len(q.types) == 0 || slices.ContainsFunc(r.types, func(t string) bool { return slices.Contains(q.types, t) })
		})
		if q.iface == ifBaseline {
			return reply{code: codes.Content, body: []any{map[string]any{"rt": r.types, "if": r.interfaces, "links": links}}}
		}
		return reply{code: codes.Content, body: links}
	}
	tag := etagBytes(r.etag)
	for _, e := range q.etags {
		if bytes.Equal(e, tag) {
			return reply{code: codes.Valid, etag: tag}
		}
	}
	body := r.rep
	if q.iface == ifBaseline {
		if m, ok := merge(r.rep, map[string]any{"rt": r.types, "if": r.interfaces}); ok {
			body = m
		}
	}
	return reply{code: codes.Content, body: body, etag: tag}
}

// batch is the batch representation of /oic/res. When the hub names an ETag that a resource of ours has now, it knows all
// that changed up to it, since ETags grow with each change; so only what is newer goes out, and 2.03 if that is nothing.
func (d *Device) batch(known [][]byte) reply {
	var last, from uint64
	for _, h := range d.order {
		if r := d.resources[h]; r.published {
			last = max(last, r.etag)
			for _, e := range known {
				if bytes.Equal(e, etagBytes(r.etag)) {
					from = max(from, r.etag)
				}
			}
		}
	}
	if from == last && from != 0 {
		return reply{code: codes.Valid, etag: etagBytes(last)}
	}
	out := []any{}
	for _, h := range d.order {
		if r := d.resources[h]; r.published && r.etag > from {
			out = append(out, r.element())
		}
	}
	return reply{code: codes.Content, body: out, etag: etagBytes(last)}
}

// element is a resource in a batch.
func (r *resource) element() map[string]any {
	rep := r.rep
	if rep == nil {
		rep = map[string]any{}
	}
	return map[string]any{"href": r.href, "rep": rep, "etag": etagBytes(r.etag)}
}

// post merges a body into a writable resource. Callers hold mu.
func (d *Device) post(r *resource, m *pool.Message) (rep reply, changed bool) {
	payload, err := m.ReadBody()
	if err != nil {
		return reply{code: codes.BadRequest, text: "the body cannot be read"}, false
	}
	var body any
	if err := decoder.Unmarshal(payload, &body); err != nil {
		return reply{code: codes.BadRequest, text: "the body is no CBOR"}, false
	}
	next, ok := merge(r.rep, body)
	if !ok {
		return reply{code: codes.BadRequest, text: "the body is no map"}, false
	}
	r.rep = next
	d.etag++
	r.etag = d.etag
	return reply{code: codes.Changed, body: next, etag: etagBytes(r.etag)}, true
}

// observe registers an observation and writes its first answer itself, under mu: no later notification can overtake it.
func (d *Device) observe(w mux.ResponseWriter, token message.Token, path string, q query) {
	d.mu.Lock()
	defer d.mu.Unlock()
	w.Message().SetModified(false)
	rep := d.get(path, q)
	seq := int64(-1)
	r := d.resources[path]
	if good := rep.code == codes.Content || rep.code == codes.Valid; good && r != nil && r.observable &&
		(path != resHref || q.iface == ifBatch) && (len(d.observers) < maxObservers || d.observers[string(token)] != nil) {
		// RFC 7641, 4.1: without the option in the answer the hub knows that it does not observe.
		o := &observer{token: bytes.Clone(token), href: path, batch: path == resHref, seq: 2}
		d.observers[string(token)] = o
		seq = int64(o.seq)
		o.seq++
	}
	if err := d.write(d.current(), token, rep, seq); err != nil {
		delete(d.observers, string(token))
		d.log.Debug("answer", "path", path, "error", err)
	}
}

// Set gives a resource a new representation and notifies the hub. It returns how many notifications went out. A value that is
// the same still counts as a change, with a new ETag.
func (d *Device) Set(href string, value any) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := d.resources[href]
	if r == nil {
		return 0, errors.New("the device has no resource " + href)
	}
	r.rep = value
	d.etag++
	r.etag = d.etag
	return d.notify(r), nil
}

// Observed returns how many observations the hub has of href; those of /oic/res are batch ones.
func (d *Device) Observed(href string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := 0
	for _, o := range d.observers {
		if o.href == href {
			n++
		}
	}
	return n
}

// notify tells all who observe r or the batch. Callers hold mu.
func (d *Device) notify(r *resource) int {
	n := 0
	for _, o := range d.observers {
		rep := reply{code: codes.Content, etag: etagBytes(r.etag)}
		switch {
		case o.batch && r.published:
			rep.body = []any{r.element()}
		case o.href == r.href:
			rep.body = r.rep
		default:
			continue
		}
		switch err := d.write(d.current(), o.token, rep, int64(o.seq)); {
		case errors.Is(err, errRejected): // RFC 7641, 3.6: the hub does not observe it any more
			delete(d.observers, string(o.token))
			continue
		case err != nil:
			d.log.Debug("notify", "href", r.href, "error", err)
			if cc := d.current(); cc != nil {
				_ = cc.Close() // RFC 7641, 4.5: nobody is there; on a stream go-coap has done it already
			}
			return n
		}
		o.seq = (o.seq + 1) & 0xffffff // RFC 7641, 3.4: 24 bits
		n++
	}
	d.stats.Notified.Add(int64(n))
	return n
}

// set puts an answer into go-coap's response, which honours the block that was asked for.
func (d *Device) set(w mux.ResponseWriter, r reply) {
	fill(w.Message(), r)
	w.Message().SetModified(true)
}

// errRejected is a message that the hub answered with a Reset.
var errRejected = errors.New("the hub rejected the message")

// write sends an answer or notification at once; observe is the Observe option, negative for none. Over UDP and DTLS it is
// confirmable, and write waits for the acknowledgement: so no notification overtakes another. Callers hold mu.
func (d *Device) write(cc conn, token message.Token, r reply, observe int64) error {
	if cc == nil {
		return errNotConnected
	}
	ctx, stop := context.WithTimeout(cc.Context(), writeTimeout)
	defer stop()
	m := cc.AcquireMessage(ctx)
	defer cc.ReleaseMessage(m)
	m.SetToken(token)
	if observe >= 0 {
		m.SetObserve(uint32(observe))
	}
	fill(m, r)
	// One message at a time waits for its acknowledgement, so a further Reset is of this one. go-coap does not tell its ID.
	before := d.rejected.Load()
	if err := cc.WriteMessage(m); err != nil {
		return err
	}
	if d.rejected.Load() != before {
		return errRejected
	}
	return nil
}

func fill(m *pool.Message, r reply) {
	m.SetCode(r.code)
	if r.etag != nil {
		_ = m.SetETag(r.etag) // only a wrong length is an error
	}
	switch {
	case r.text != "":
		m.SetBody(strings.NewReader(r.text)) // RFC 7252, 5.5.2: a diagnostic payload has no format
	case r.body != nil:
		payload, err := encoder.Marshal(r.body)
		if err != nil {
			m.SetCode(codes.InternalServerError)
			return
		}
		m.SetContentFormat(ocf)
		m.SetBody(bytes.NewReader(payload))
	}
}

// readQuery reads what a GET asks for. Of incChanges (the hub's further ETags: base64url, separated by commas) what cannot be
// read is passed over: the hub then gets more than it needs.
func readQuery(m *pool.Message) query {
	var q query
	for _, o := range m.Options() {
		if o.ID == message.ETag && len(o.Value) > 0 {
			q.etags = append(q.etags, bytes.Clone(o.Value))
		}
	}
	queries, err := m.Queries()
	if err != nil {
		return q
	}
	for _, s := range queries {
		name, value, _ := strings.Cut(s, "=")
		switch name {
		case "if":
			q.iface = value
		case "rt":
			q.types = append(q.types, value)
		case "incChanges":
			for e := range strings.SplitSeq(value, ",") {
				if b, err := base64.RawURLEncoding.DecodeString(e); err == nil && len(b) > 0 {
					q.etags = append(q.etags, b)
				}
			}
		}
	}
	return q
}

// ETag returns a resource's current ETag, nil if there is no such resource.
func (d *Device) ETag(href string) []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.resources[href]; r != nil {
		return etagBytes(r.etag)
	}
	return nil
}
