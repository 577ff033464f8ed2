package coapgateway

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// Whatever fails behind the gateway, in each way that is trouble of ours, and whatever the device asks for then: it never
// sees 4.01, which would cost it its credentials. A plain error, without a kind, is trouble of ours too.
func TestTroubleOfOursIsNever401(t *testing.T) {
	breakers := map[string]func(w *world, err error){
		"Directory.SignIn": func(w *world, err error) {
			w.dir.signIn = func(context.Context, hub.Ownership, hub.Connection, string, Deliverer) (hub.Session, error) {
				return hub.Session{}, err
			}
		},
		"Directory.SignOut": func(w *world, err error) { w.dir.signOut = func(context.Context, hub.Stamp) error { return err } },
		"Directory.Offline": func(w *world, err error) { w.dir.offline = func(context.Context, hub.Stamp) error { return err } },
		"Directory.Publish": func(w *world, err error) {
			w.dir.publish = func(context.Context, hub.Stamp, []hub.Link) ([]hub.Link, error) { return nil, err }
		},
		"Directory.Unpublish": func(w *world, err error) {
			w.dir.unpublish = func(context.Context, hub.Stamp, []hub.Href) ([]hub.Href, error) { return nil, err }
		},
		"Directory.Notify": func(w *world, err error) {
			w.dir.notify = func(context.Context, hub.Stamp, []hub.Change) error { return err }
		},
		"Directory.SetTwin": func(w *world, err error) {
			w.dir.setTwin = func(context.Context, hub.Stamp, hub.TwinState) error { return err }
		},
		"Directory.SetLocalEndpoints": func(w *world, err error) {
			w.dir.setLocal = func(context.Context, hub.Stamp, []string) error { return err }
		},
		"Directory.SetContact": func(w *world, err error) {
			w.dir.expect = func(context.Context, hub.Stamp, hub.Contact) error { return err }
		},
		"Directory.Device": func(w *world, err error) {
			w.dir.device = func(context.Context, hub.Owner, hub.DeviceID) (*hub.Device, error) { return nil, err }
		},
		"Directory.Devices": func(w *world, err error) {
			w.dir.devices = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
				return func(yield func(*hub.Device, error) bool) { yield(nil, err) }
			}
		},
		"Directory.Command": func(w *world, err error) {
			w.dir.command = func(context.Context, hub.Owner, hub.Order) (hub.Outcome, error) { return hub.Outcome{}, err }
		},
		"Directory.FeedHead": func(w *world, err error) {
			w.dir.head = func(context.Context) (hub.Cursor, error) { return hub.Cursor{}, err }
		},
		"Directory.Feed": func(w *world, err error) {
			w.dir.feed = func(context.Context, hub.Owner, hub.Cursor) iter.Seq2[hub.Fed, error] {
				return func(yield func(hub.Fed, error) bool) { yield(hub.Fed{}, err) }
			}
		},
		"Directory.State": func(w *world, err error) {
			w.dir.state = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
				return func(yield func(*hub.Device, error) bool) { yield(nil, err) }
			}
		},
		"Directory.ETags": func(w *world, err error) {
			w.dir.etags = func(context.Context, hub.DeviceID, int) ([][]byte, error) { return nil, err }
		},
		"Identities.SignUp": func(w *world, err error) {
			w.ids.signUp = func(context.Context, hub.DeviceID, hub.Owner, string, string, time.Time) (hub.Ownership, error) {
				return hub.Ownership{}, err
			}
		},
		"Identities.Owner": func(w *world, err error) {
			w.ids.owner = func(context.Context, hub.DeviceID) (hub.Ownership, error) { return hub.Ownership{}, err }
		},
		"Identities.SignOff": func(w *world, err error) {
			w.ids.signOff = func(context.Context, hub.DeviceID, hub.Owner, string) error { return err }
		},
		"Identities.Devices": func(w *world, err error) {
			w.ids.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) { return nil, err }
		},
		"Verifier.Verify": func(w *world, err error) {
			w.ver.verify = func(context.Context, string) (hub.Claims, error) { return hub.Claims{}, err }
		},
		"Provider.Exchange": func(w *world, err error) {
			w.prov.exchange = func(context.Context, hub.DeviceID, string, string) (hub.Tokens, error) { return hub.Tokens{}, err }
		},
		"Provider.Refresh": func(w *world, err error) {
			w.prov.refresh = func(context.Context, hub.DeviceID, string) (hub.Tokens, error) { return hub.Tokens{}, err }
		},
		"Provider.Revoke": func(w *world, err error) { w.prov.revoke = func(context.Context, hub.Tokens) error { return err } },
	}
	troubles := map[string]error{
		"unavailable": &hub.Error{Kind: hub.Unavailable}, "internal": &hub.Error{Kind: hub.Internal},
		"deadline": &hub.Error{Kind: hub.Deadline}, "exhausted": &hub.Error{Kind: hub.Exhausted},
		"conflict": &hub.Error{Kind: hub.Conflict}, "context": context.DeadlineExceeded, "plain": net500{},
	}
	// What answers 5.03 when the part it needs is broken; everything else must go on as if nothing was.
	needs := map[string][]string{
		"Directory.SignIn": {"sign-in"}, "Directory.SignOut": {"sign-out"}, "Directory.Publish": {"publish"},
		"Directory.Unpublish": {"unpublish"}, "Directory.Device": {"unpublish", "read", "stop"}, "Directory.Command": {"update"},
		"Directory.FeedHead": {"observe"}, "Directory.State": {"observe"}, "Directory.Devices": {"discover"},
		"Identities.SignUp": {"sign-up"}, "Identities.Owner": {"sign-in", "refresh"}, "Identities.SignOff": {"sign-off"},
		"Identities.Devices": {"discover"}, "Verifier.Verify": {"sign-up", "sign-in", "refresh", "sign-out"},
		"Provider.Exchange": {"sign-up"}, "Provider.Refresh": {"refresh"},
	}
	requests := map[string]func(d *device) (reply, error){
		"sign-up": func(d *device) (reply, error) {
			return d.try(codes.POST, "/oic/sec/account", cborOf(d.t, d.account(nil)))
		},
		"sign-in": func(d *device) (reply, error) {
			return d.try(codes.POST, "/oic/sec/session", cborOf(d.t, d.session(nil)))
		},
		"refresh": func(d *device) (reply, error) {
			return d.try(codes.POST, "/oic/sec/tokenrefresh", cborOf(d.t, body{"di": string(d.id), "uid": "alice", "refreshtoken": "r"}))
		},
		"publish": func(d *device) (reply, error) {
			return d.try(codes.POST, "/oic/rd", cborOf(d.t, body{"di": string(d.id), "ttl": 0, "links": []body{{"href": "/a"}}}))
		},
		"unpublish": func(d *device) (reply, error) {
			return d.try(codes.DELETE, "/oic/rd", nil, query("di="+string(d.id)), query(fmt.Sprintf("ins=%d", hub.Href("/a").InstanceID())))
		},
		"discover": func(d *device) (reply, error) { return d.try(codes.GET, "/oic/res", nil) },
		"selector": func(d *device) (reply, error) { return d.try(codes.GET, "/oic/rd", nil) },
		"read":     func(d *device) (reply, error) { return d.try(codes.GET, at(fanID, "/fan"), nil) },
		"update":   func(d *device) (reply, error) { return d.try(codes.POST, at(fanID, "/fan"), []byte{0xa0}) },
		"observe": func(d *device) (reply, error) {
			return d.try(codes.GET, at(fanID, "/fan"), nil, with(message.Observe, ""))
		},
		"stop": func(d *device) (reply, error) {
			return d.try(codes.GET, at(fanID, "/fan"), nil, with(message.Observe, "\x01"))
		},
		"sign-out": func(d *device) (reply, error) {
			return d.try(codes.POST, "/oic/sec/session", cborOf(d.t, d.session(func(b body) { b["login"] = false })))
		},
		"sign-off": func(d *device) (reply, error) {
			return d.try(codes.DELETE, "/oic/sec/account", nil)
		},
	}
	for part, spoil := range breakers {
		for trouble, cause := range troubles {
			t.Run(part+"/"+trouble, func(t *testing.T) {
				t.Parallel()
				for name, ask := range requests {
					broken := slices.Contains(needs[part], name)
					if !broken && trouble != "plain" {
						continue // what does not need the part goes on whatever its trouble is: one will do
					}
					var d *device
					attempt := func() (reply, error) {
						h := start(t, nil)
						h.gw.patience = time.Millisecond
						h.w.own(lampID, "alice")
						h.issue("code", "token", hub.Claims{})
						h.w.refresh["r"] = hub.Tokens{Access: "token", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
						h.w.links[lampID] = links{"/a": {Href: "/a"}}
						h.w.own(fanID, "alice")
						h.w.store(fanID, hub.Change{Href: "/fan", Status: hub.StatusOK})
						if name == "update" && part != "Directory.Command" {
							h.w.ends["order-1"] = hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Code: 0x44}
						}
						d = h.device(lampID)
						d.mute = true // the twin's writes are not what is asked here
						h.connect(d, h.gw.Addresses().Plain, nil)
						switch name {
						case "sign-up", "refresh", "sign-in":
						default:
							d.want(d.signIn("token"), "2.04", "")
							h.w.awaitLog(t, "twin 2")
						}
						h.w.mu.Lock() // waits for what the sign-in began
						spoil(h.w, cause)
						h.w.mu.Unlock()
						return ask(d)
					}
					r, err := attempt()
					for n := 0; n < 2 && err != nil; n++ {
						// go-coap drops an answer when the end of the connection follows it before its reader had its turn.
						r, err = attempt()
					}
					if err != nil && name == "sign-in" && (part == "Directory.SetTwin" || part == "Directory.Device" || part == "Directory.ETags") {
						continue // go-coap drops an answer that is followed at once by the end of the connection
					}
					if err != nil {
						t.Errorf("%s: %v", name, err)
						continue
					}
					if r.code == "4.01" {
						t.Errorf("%s: the device sees 4.01 %q", name, r.body)
					}
					if broken != (r.code == "5.03") {
						t.Errorf("%s: the device sees %s %q", name, r.code, r.body)
					}
					if r.code == "5.03" && r.maxAge == 0 {
						t.Errorf("%s: 5.03 without Max-Age", name)
					}
					switch name { // whoever cannot sign in begins anew; what else is refused costs no connection
					case "sign-up", "refresh", "sign-in", "sign-out", "sign-off":
						if broken {
							d.awaitClosed()
						}
					default:
						if broken {
							d.alive()
						}
					}
				}
			})
		}
	}
}

type net500 struct{}

func (net500) Error() string { return "dial 10.0.0.7: secret" }

// A panic behind a request is trouble of ours for that request; all else goes on.
func TestPanicIsTroubleOfOurs(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	h.w.mu.Lock()
	h.w.dir.publish = func(context.Context, hub.Stamp, []hub.Link) ([]hub.Link, error) { panic("boom") }
	h.w.ids.signUp = func(context.Context, hub.DeviceID, hub.Owner, string, string, time.Time) (hub.Ownership, error) {
		panic("boom")
	}
	h.w.mu.Unlock()
	if r := d.want(d.publish("/a"), "5.03", "internal: "); r.maxAge == 0 || strings.Contains(r.text(), "boom") {
		t.Errorf("got Max-Age %d, %q", r.maxAge, r.body)
	}
	d.want(d.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID))), "4.00", "nothing-published: ") // the session still writes
	h.issue("code", "token", hub.Claims{})
	d.want(d.signUp("code"), "5.03", "internal: ")
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	h.plain(fanID).alive()
}

// A panic in what is done beside the requests ends that connection only.
func TestPanicBesideRequestsEndsTheConnection(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.dir.setTwin = func(context.Context, hub.Stamp, hub.TwinState) error { panic("boom") }
	other := h.plain(fanID)
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	d := h.plain(lampID)
	_, _ = d.try(codes.POST, "/oic/sec/session", cborOf(t, d.session(nil))) // its answer may be overtaken by the end
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	h.w.await(t, "the reason", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == "panic" })
	other.alive()
}
