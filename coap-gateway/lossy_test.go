package coapgateway

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// A device gets in over a radio that takes a second for each datagram and loses every tenth, from the handshake over sign-up,
// sign-in and publication until its twin is in sync, and what it says then is known.
func TestSignUpOverALossyRadio(t *testing.T) {
	for seed := range uint64(25) {
		for _, over := range []string{"dtls", "udp"} {
			t.Run(fmt.Sprintf("%s/%d", over, seed), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w := newWorld()
					h := &hall{t: t, w: w}
					h.issue("code", "token", hub.Claims{})
					f := newField(t, w, seed, nil)
					defer f.end()
					f.net.SetPath(simnet.Path{Loss: 0.1, Delay: time.Second})
					sock, err := f.net.Listen("192.0.2.2:5000")
					if err != nil {
						t.Fatal(err)
					}
					defer func() { _ = sock.Close() }()
					d := newDozer(t)
					d.value["/a"], d.value["/b"] = "1", "1"
					d.conn = plainSocket{sock}
					if over == "dtls" {
						conn := f.shake(sock)
						defer func() { _ = conn.Close() }()
						d.conn = conn
					}
					f.running.Go(d.serve)
					lamp := h.device(lampID)
					ask := func(m message.Message, b body) {
						t.Helper()
						m.Payload = cborOf(t, b)
						if a := d.ask(m); a.Code != codes.Changed {
							t.Fatalf("%v %q", a.Code, a.Payload)
						}
					}
					ask(post("/oic/sec/account", 1, nil), lamp.account(nil))
					ask(post("/oic/sec/session", 2, nil), lamp.session(nil))
					link := func(href string) body {
						return body{"href": href, "rt": []string{"x.a"}, "if": []string{"oic.if.r"}, "p": body{"bm": 3}}
					}
					ask(post("/oic/rd", 3, nil), lamp.publication([]any{link("/a"), link("/b")}))
					knows := func(href, value string) {
						t.Helper()
						for range 300 {
							after(time.Second)
							w.mu.Lock()
							got := string(w.twin[lampID][hub.Href(href)].Content.Data)
							w.mu.Unlock()
							if got == value && w.count("twin 3") > 0 {
								return
							}
						}
						t.Fatalf("%s is not %s after five minutes: %q, asked for %q", href, value, w.log, d.heardOf())
					}
					knows("/a", "1")
					knows("/b", "1")
					d.ask(d.news("/a", "2"))
					d.ask(d.news("/a", "3"))
					d.ask(d.news("/b", "4"))
					knows("/a", "3")
					knows("/b", "4")
					if w.count("exchange "+string(lampID)) != 1 || w.count("published 2") != 1 || w.count("offline "+string(lampID)) != 0 {
						t.Errorf("it did something twice: %q", w.log)
					}
				})
			})
		}
	}
}
