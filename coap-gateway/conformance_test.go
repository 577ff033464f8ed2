package coapgateway

import (
	"crypto/tls"
	"testing"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/coap"
)

// RFC 9290: clients that ask for it get their errors as problem details; OCF devices, who name CBOR whatever they read, get text.
func TestProblemDetails(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	for name, c := range map[string]struct {
		code   codes.Code
		path   string
		accept int32
		want   string
		title  string // "": text
	}{
		"time, problem details": {codes.POST, "/x.plgd.dev/time", 257, "4.05", "method-not-allowed"},
		"time, CBOR":            {codes.POST, "/x.plgd.dev/time", 60, "4.05", "method-not-allowed"},
		"time, OCF's CBOR":      {codes.POST, "/x.plgd.dev/time", 10000, "4.05", ""},
		"time, JSON":            {codes.POST, "/x.plgd.dev/time", 50, "4.05", ""},
		"only problems":         {codes.GET, "/x.plgd.dev/time", 257, "4.06", "not-acceptable"},
		"core, CBOR":            {codes.GET, "/.well-known/core", 60, "4.06", "not-acceptable"},
		"core, JSON":            {codes.GET, "/.well-known/core", 50, "4.06", ""},
		"OCF, CBOR":             {codes.PUT, "/oic/rd", 60, "4.05", ""},
		"OCF, problem details":  {codes.PUT, "/oic/rd", 257, "4.05", "method-not-allowed"},
		"nothing there":         {codes.GET, "/nothing", 257, "4.04", "path-unknown"},
		"nothing there, CBOR":   {codes.GET, "/nothing", 60, "4.04", ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := d.do(c.code, c.path, nil, accept(c.accept))
			if c.title == "" {
				d.want(r, c.want, "")
				return
			}
			var got map[int]any
			if err := cbor.Unmarshal(r.body, &got); err != nil || r.code != c.want || r.format != 257 {
				t.Fatalf("%s %q in %d: %v", r.code, r.body, r.format, err)
			}
			number := uint64(r.code[0]-'0')<<5 | uint64(r.code[2]-'0')*10 + uint64(r.code[3]-'0')
			if got[-1] != c.title || got[-4] != number || len(got) != 3 {
				t.Errorf("%v", got)
			}
			if s, _ := got[-2].(string); s == "" {
				t.Errorf("no sentence in %v", got)
			}
		})
	}
	d.alive()
}

// RFC 7252, Section 5.10.8: a request whose condition is not fulfilled is not carried out. On OCF paths that is 4.00, because
// devices take 4.12 for success.
func TestConditions(t *testing.T) {
	t.Parallel()
	ifMatch := func(v string) option { return option{ID: message.IfMatch, Value: []byte(v)} }
	ifNoneMatch := option{ID: message.IfNoneMatch}
	h := start(t, nil)
	d := h.online(lampID, mute)
	links := cborOf(t, d.publication([]body{{"href": "/light", "rt": []string{"x.light"}}}))
	d.want(d.do(codes.POST, "/oic/rd", links, ifNoneMatch), "4.00", "precondition: ")
	d.want(d.do(codes.POST, "/oic/rd", links, ifMatch("\x01")), "4.00", "precondition: ")
	if n := h.w.count("published 1"); n != 0 {
		t.Errorf("%d publications were carried out", n)
	}
	d.want(d.do(codes.GET, "/x.plgd.dev/time", nil, ifNoneMatch), "4.12", "precondition: ")
	d.want(d.do(codes.GET, "/.well-known/core", nil, ifMatch("\x01")), "4.12", "precondition: ")
	d.want(d.do(codes.GET, "/x.plgd.dev/time", nil, ifMatch("")), "2.05", "")
	d.want(d.do(codes.POST, "/oic/rd", links, ifMatch("\x01"), ifMatch("")), "2.04", "")
	if n := h.w.count("published 1"); n != 1 {
		t.Errorf("%d publications were carried out", n)
	}
	d.want(d.do(codes.GET, "/nothing", nil, ifNoneMatch), "4.04", "path-unknown: ")
	d.alive()
}

// RFC 8323, Section 8.2: ALPN is negotiated with clients that know it, and not missed in others.
func TestALPN(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	for _, c := range []struct {
		offer []string
		want  string
		fails bool
	}{
		{nil, "", false},
		{[]string{"coap"}, "coap", false},
		{[]string{"h2", "coap"}, "coap", false},
		{[]string{"http/1.1"}, "", true},
	} {
		conf := h.tlsFor(h.ca.identity(t, lampID, nil))
		conf.NextProtos = c.offer
		conn, err := tls.Dial("tcp", h.gw.Addresses().Secure, conf)
		if (err != nil) != c.fails {
			t.Errorf("%q: %v", c.offer, err)
		}
		if err != nil {
			continue
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != c.want {
			t.Errorf("%q: negotiated %q, want %q", c.offer, got, c.want)
		}
		_ = conn.Close()
	}
}

// RFC 7252, Section 5.5: what a GET carries is ignored; Section 5.6.1: what must not be kept says so. RFC 7641, Section 4.1: a
// resource that is not observable answers a registration as a plain GET.
func TestPayloadOfGETAndFreshness(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	r := h.rawPlain()
	m := get("/x.plgd.dev/time", 1)
	m.Payload = []byte("what for?")
	m.Options = coap.AddOption(m.Options, message.Observe, nil)
	r.write(m)
	got := r.readAnswer()
	if _, err := got.Options.GetUint32(message.Observe); err == nil {
		t.Error("it says that it is observed")
	}
	age, err := got.Options.GetUint32(message.MaxAge)
	if got.Code != codes.Content || err != nil || age != 0 {
		t.Errorf("%s, Max-Age %d, %v", coap.Dotted(got.Code), age, err)
	}
}
