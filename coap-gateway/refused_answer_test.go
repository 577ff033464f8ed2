package coapgateway

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// A device over DTLS whose request on an account path is refused learns of it although the answer was lost, whatever ends the session
// meanwhile: a refused refresh may end the grant that the session stands on. For ten seconds duplicates get the answer again and all
// else nothing, then the association ends.
func TestRefusedOverDTLSWithALostAnswer(t *testing.T) {
	t.Parallel()
	refused := hub.NewError(hub.Unauthenticated, "token-reused", "the token was used before")
	for name, c := range map[string]struct {
		during func(*field) // before the answer
		soon   func(*field) // after it, but before the connection ends
		reason string
	}{
		"refused":                             {nil, nil, "answered"},
		"the grant ends by the refresh":       {func(f *field) { f.gw.EndGrant("i", "1") }, nil, "revoked"},
		"the grant ends behind the answer":    {nil, func(f *field) { f.gw.EndGrant("i", "1") }, "revoked"},
		"the key is replaced meanwhile":       {(*field).replaceKey, nil, "key-replaced"},
		"the key is replaced right behind it": {nil, (*field).replaceKey, "key-replaced"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld()
				h := &hall{t: t, w: w}
				w.own(lampID, "alice")
				w.grant("token", hub.Claims{Issuer: "i", Grant: "1", Expiry: time.Now().Add(time.Hour)})
				f := newField(t, w, 1, nil)
				defer f.end()
				w.prov.refresh = func(context.Context, hub.DeviceID, string) (hub.Tokens, error) {
					if c.during != nil {
						c.during(f)
					}
					return hub.Tokens{}, refused
				}
				sock, err := f.net.Listen("192.0.2.2:5000")
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = sock.Close() }()
				d := newDozer(t)
				conn := f.shake(sock)
				d.conn = conn
				ended := make(chan struct{})
				f.running.Go(func() { defer close(ended); d.serve() })
				defer func() { _ = conn.Close() }()
				if a := d.ask(post("/oic/sec/session", 1, cborOf(t, h.device(lampID).session(nil)))); a.Code != codes.Changed {
					t.Fatalf("sign-in: %v", a)
				}
				synctest.Wait()

				m := post("/oic/sec/tokenrefresh", 2, cborOf(t, body{"di": string(lampID), "uid": "alice", "refreshtoken": "old"}))
				hubAddr, lampAddr := fieldDTLS.AddrPort().Addr(), simnet.Addr("192.0.2.2:5000").AddrPort().Addr()
				f.net.SetPathFrom(hubAddr, lampAddr, simnet.Path{Loss: 1})
				m.Type, m.MessageID = message.Confirmable, 7
				d.write(m)
				after(closeDelay / 2)
				if c.soon != nil {
					c.soon(f)
				}
				after(2 * time.Second)
				if x, _ := f.gw.Diagnostics(lampID); x.EndReason != c.reason || w.count("offline "+string(lampID)) != 1 {
					t.Errorf("two seconds later the session has ended by %q, want %q: %q", x.EndReason, c.reason, w.log)
				}
				f.net.SetPathFrom(hubAddr, lampAddr, simnet.Path{})
				hears := func(what string, id int32, want codes.Code) {
					t.Helper()
					m.MessageID = id
					d.write(m)
					after(time.Second)
					got := codes.Empty
					if len(d.answers) > 0 {
						got = (<-d.answers).Code
					}
					if got != want {
						t.Errorf("%s: the hub says %v, want %v", what, got, want)
					}
				}
				hears("what it sent comes again", 7, codes.Unauthorized)
				hears("another request", 8, codes.Empty)
				after(4 * time.Second)
				hears("it comes once more", 7, codes.Unauthorized)
				select {
				case <-ended:
					t.Error("the association has ended early")
				default:
				}
				after(4 * time.Second)
				select {
				case <-ended:
				default:
					t.Error("the association does not end")
				}
			})
		})
	}
}
