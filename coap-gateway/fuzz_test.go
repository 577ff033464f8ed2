package coapgateway

import (
	"bytes"
	"math"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// seedBodies are bodies as devices send them, and such as they should not.
func seedBodies(f *testing.F) [][]byte {
	f.Helper()
	var out [][]byte
	for _, v := range []any{
		body{"di": string(lampID), "accesstoken": "code", "authprovider": "main", "devicetype": "device"},
		body{"di": string(lampID), "uid": "alice", "accesstoken": "token", "login": true},
		body{"di": string(lampID), "uid": "alice", "refreshtoken": "r", "granttype": "refresh_token"},
		body{"di": string(lampID), "ttl": 86400, "lt": -1, "n": "lamp", "links": []any{
			body{"href": "//light//1/", "rt": []string{"core.light"}, "if": []string{"oic.if.rw"}, "p": body{"bm": 3, "sec": true, "port": 5684}},
			body{"href": "/a", "eps": []any{body{"ep": "coaps+tcp://[::1]:5684", "pri": 1}}, "ins": "x", "title": "t", "type": []string{"a/b"}},
		}},
		body{"di": 1, "links": body{}},
		body{"links": []any{body{"href": "/a/../b"}}, "ttl": int64(math.MaxInt64)},
		[]any{
			body{"href": "ocf://" + string(lampID) + "/light", "rep": body{"n": 1, "rt": []string{"x"}}, "etag": []byte{1}},
			body{"href": "/info", "rep": body{}},
			body{"href": "/oic/sec/doxm", "rep": body{}},
			body{"rep": body{}},
			7,
		},
		[]any{},
		body{},
	} {
		b, err := encoding.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, b, b[:len(b)/2])
	}
	return append(out, nil, []byte("hello"), []byte{0xbf, 0xff}, []byte{0xbf, 0x62, 'd', 'i', 0x7f, 0x61, 'x', 0xff, 0xff}, []byte{0xa1, 0x62, 'd', 'i', 0x62, 0xff, 0xfe},
		[]byte{0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, []byte{0x9b, 0, 0, 0, 1, 0, 0, 0, 0}, bytes.Repeat([]byte{0x81}, 100), []byte{0xa0, 0xa0})
}

// refusedAs fails unless err is a fault of the request that can be told to its sender.
func refusedAs(t *testing.T, err error, kind hub.Kind) {
	t.Helper()
	if code, text := hub.Public(err); !hub.IsKind(err, kind) || code == "" || text == "" {
		t.Fatalf("refused with %v", err)
	}
}

func FuzzAccountBody(f *testing.F) {
	for _, b := range seedBodies(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var up signUpRequest
		var session sessionRequest
		var refresh refreshRequest
		for _, into := range []any{&up, &session, &refresh} {
			if err := decodeBody(b, into); err != nil {
				refusedAs(t, err, hub.Invalid)
			}
		}
		for _, s := range []string{up.Device, up.Token, up.Code, up.Provider, session.Device, session.UID, session.Token, refresh.Token, refresh.UID} {
			if len(s) > len(b) || !utf8.ValidString(s) {
				t.Fatalf("%q out of %x", s, b)
			}
		}
	})
}

// canonical fails for an href that is not in the form in which it is compared and stored.
func canonical(t *testing.T, h hub.Href) {
	t.Helper()
	if again, err := hub.ParseHref(string(h)); err != nil || again != h || !strings.HasPrefix(string(h), "/") || strings.Contains(string(h), "//") {
		t.Fatalf("%q is not in its canonical form: %q, %v", h, again, err)
	}
}

func FuzzPublishBody(f *testing.F) {
	for _, b := range seedBodies(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p publication
		if err := decodeBody(b, &p); err != nil {
			refusedAs(t, err, hub.Invalid)
			return
		}
		now := time.Now()
		until, err := p.validUntil(now)
		if err != nil {
			refusedAs(t, err, hub.Invalid)
		} else if until != 0 && until <= now.UnixNano() {
			t.Fatalf("the links would have ended in the past: %d", until)
		}
		for i := range p.Links {
			l, err := p.Links[i].hubLink(until)
			if err != nil {
				refusedAs(t, err, hub.Invalid)
				return
			}
			canonical(t, l.Href)
			p.Links[i].Href, p.Links[i].Instance = string(l.Href), l.Href.InstanceID()
			routed(lampID, l, nil)
		}
		// What was read can be answered, in each form.
		for _, format := range []int32{hub.FormatOCFCBOR, hub.FormatJSON} {
			if _, err := encodeBody(format, p); err != nil {
				t.Fatalf("%x cannot be answered in %d: %v", b, format, err)
			}
		}
	})
}

func FuzzBatch(f *testing.F) {
	for _, b := range seedBodies(f) {
		f.Add(b, []byte{1}, int32(10000))
	}
	f.Add([]byte("[]"), []byte(nil), int32(50))
	f.Fuzz(func(t *testing.T, b, etag []byte, format int32) {
		changes, skipped, err := parseBatch(format, bytes.Clone(b), etag)
		if err != nil {
			if hub.KindOf(err) != hub.Unsupported {
				refusedAs(t, err, hub.Invalid)
			}
			if changes != nil {
				t.Fatal("an error and changes")
			}
			return
		}
		if skipped < 0 || len(changes)+skipped > len(b) {
			t.Fatalf("%d changes and %d skipped out of %d bytes", len(changes), skipped, len(b))
		}
		for _, c := range changes {
			canonical(t, c.Href)
			switch {
			case c.Status == hub.StatusOK && (!bytes.Contains(b, c.Content.Data) || len(c.Content.Data) == 0 || c.Content.Format != format):
				t.Fatalf("%s: %x is not part of %x", c.Href, c.Content.Data, b)
			case c.Status != hub.StatusOK && len(c.Content.Data) > 0, len(c.Content.Data) > hub.MaxContent:
				t.Fatalf("%s: %d bytes with status %d", c.Href, len(c.Content.Data), c.Status)
			}
		}
	})
}

func FuzzQuery(f *testing.F) {
	f.Add("di="+string(lampID), "ins=123&ins=4")
	f.Add("uid=..&di=..&accesstoken=..", "")
	f.Add("%zz", "a=%4")
	f.Add("=&&=x&y", "rt=a+b%20c")
	f.Fuzz(func(t *testing.T, one, two string) {
		req := &coap.Message{Options: message.Options{
			{ID: message.URIPath, Value: []byte(one)}, {ID: message.URIQuery, Value: []byte(one)}, {ID: message.URIQuery, Value: []byte(two)},
		}}
		q, err := parseQueries(req, hub.BadOption)
		if err != nil {
			refusedAs(t, err, hub.BadOption)
			return
		}
		total := 0
		for k, values := range q {
			if k == "" || len(values) == 0 || q.first(k) != values[0] {
				t.Fatalf("%q has %q", k, values)
			}
			for _, v := range values {
				total += len(v)
			}
		}
		if total > len(one)+len(two) {
			t.Fatalf("%d bytes of values out of %q and %q", total, one, two)
		}
		if p := pathOf(req); p != "/"+url.PathEscape(one) {
			t.Fatalf("the path is %q", p)
		}
	})
}
