package coapgateway

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

type body = map[string]any

// account is the body of a sign-up, after change.
func (d *device) account(change func(body)) body {
	b := body{"di": string(d.id), "devicetype": "device", "accesstoken": "code", "authprovider": "main"}
	if change != nil {
		change(b)
	}
	return b
}

// issue makes code good for tokens of the claims.
func (h *hall) issue(code, access string, c hub.Claims) {
	h.w.grant(access, c)
	defer h.w.lock()()
	h.w.codes[code] = hub.Tokens{Access: access, Refresh: "refresh-" + access, Expiry: time.Now().Add(time.Hour)}
}

func (d *device) signUp(code string) reply {
	d.t.Helper()
	return d.post("/oic/sec/account", d.account(func(b body) { b["accesstoken"] = code }))
}

func TestTime(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.secure(lampID)
	for format, want := range map[int32]int32{-1: 10000, 10000: 10000, 60: 60, 50: 50} {
		var opts []option
		if format >= 0 {
			opts = append(opts, accept(format))
		}
		r := d.want(d.do(codes.GET, "/x.plgd.dev/time", nil, opts...), "2.05", "")
		if r.format != want {
			t.Errorf("Accept %d is answered in %d, want %d", format, r.format, want)
		}
		if format == 50 {
			if !strings.HasPrefix(r.text(), `{"time":"`) {
				t.Errorf("the JSON form is %s", r.body)
			}
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, r.members(t)["time"].(string))
		if err != nil || time.Since(at).Abs() > time.Minute {
			t.Errorf("the time is %v, %v", at, err)
		}
	}
	d.want(d.do(codes.GET, "/x.plgd.dev/time", nil, accept(0)), "4.06", "not-acceptable: ")
	d.alive()
}

func TestLifeOfADevice(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.device(lampID)
	d.res["/light"] = resource{format: 10000, body: cborOf(t, body{"power": 1}), observable: true}
	h.connect(d, h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(t, lampID, nil)))
	h.issue("code", "token", hub.Claims{DeviceID: string(lampID), Device: true})

	up := d.want(d.signUp("code"), "2.04", "").members(t)
	if up["uid"] != "alice" || up["accesstoken"] != "token" || up["refreshtoken"] != "refresh-token" || up["redirecturi"] != "" {
		t.Errorf("sign-up answered %v", up)
	}
	if n := up["expiresin"].(uint64); n < 3500 || n > 3600 {
		t.Errorf("expiresin is %d, want nearly an hour", n)
	}
	if pin := h.w.pins[lampID]; !strings.HasPrefix(pin, "identity-ca:") {
		t.Errorf("the device is pinned to %q", pin)
	}
	// Sign-in works at once after sign-up.
	in := d.want(d.signIn("token"), "2.04", "").members(t)
	if n := in["expiresin"].(uint64); n < 3500 || n > 3590 {
		t.Errorf("expiresin is %d, want an hour less a margin", n)
	}
	h.w.awaitLog(t, "twin 3")
	d.want(d.publish("/light*"), "2.04", "")
	h.w.awaitLog(t, "changed /light 1")
	d.awaitAsked("0.01 /light observe=0")
	d.notify("/light", codes.Content, 10000, cborOf(t, body{"power": 2}), nil)
	h.w.await(t, "the new value", func() bool {
		return string(h.w.twin[lampID]["/light"].Content.Data) == string(cborOf(t, body{"power": 2}))
	})
	if c := h.w.conns[0]; !c.Online || c.Protocol != hub.ProtocolCoAPSTCP || c.Service != "gateway-1" || c.ID == "" {
		t.Errorf("the connection is recorded as %+v", c)
	}
	if diag, ok := h.gw.Diagnostics(lampID); !ok || !diag.Online || diag.Protocol != hub.ProtocolCoAPSTCP || diag.TLSVersion != "TLS 1.3" ||
		diag.BytesIn == 0 || diag.BytesOut == 0 {
		t.Errorf("diagnostics say %+v", diag)
	}
	_ = d.conn.Close()
	h.w.awaitLog(t, "offline "+string(lampID))
	if diag, _ := h.gw.Diagnostics(lampID); diag.EndReason == "" {
		h.w.await(t, "the end in diagnostics", func() bool { x, _ := h.gw.Diagnostics(lampID); return !x.Online && x.EndReason != "" })
	}
}

func TestSignUpForms(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(body){
		"authcode":           func(b body) { b["authcode"] = b["accesstoken"]; delete(b, "accesstoken") },
		"no provider":        func(b body) { delete(b, "authprovider") },
		"unknown members":    func(b body) { b["x"], b["uid"] = []int{1}, "someone" },
		"di in capitals":     func(b body) { b["di"] = strings.ToUpper(string(lampID)) },
		"as devices send it": nil,
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			d := h.plain(lampID)
			h.issue("code", "token", hub.Claims{})
			d.want(d.post("/oic/sec/account", d.account(change)), "2.04", "")
			h.w.awaitLog(t, "signed-up "+string(lampID)+" alice")
			// Again, as after a lost answer.
			d.want(d.post("/oic/sec/account", d.account(change)), "2.04", "")
			d.alive()
		})
	}
	t.Run("answer in the accepted form", func(t *testing.T) {
		h := start(t, nil)
		d := h.plain(lampID)
		h.issue("code", "token", hub.Claims{})
		for format, first := range map[int32]byte{60: 0xa5, 50: '{', 10000: 0xa5} {
			r := d.want(d.post("/oic/sec/account", d.account(nil), accept(format)), "2.04", "")
			if r.format != format || r.body[0] != first {
				t.Errorf("Accept %d is answered in %d: %x", format, r.format, r.body)
			}
		}
	})
}

// What the engine refuses by itself ends the connection too, on the account paths and only there.
func TestSignUpOfTooMuch(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.device(lampID)
	d.whole = true
	h.connect(d, h.gw.Addresses().Plain, nil)
	much := make([]byte, coap.MaxBody+1)
	d.want(d.do(codes.POST, "/oic/rd", much), "4.13", "too-large: ")
	d.want(d.do(codes.POST, "/nothing", much), "4.13", "too-large: ")
	d.alive()
	d.want(d.do(codes.POST, "/oic/sec/account", much), "4.13", "too-large: ")
	d.awaitClosed()
}

// Every refusal on the account path is answered and then closes the connection.
func TestSignUpRefusals(t *testing.T) {
	t.Parallel()
	raw := func(s string) []byte { return []byte(s) }
	for name, c := range map[string]struct {
		body   any // a body, or raw bytes
		opts   []option
		code   string
		text   string
		claims *hub.Claims
	}{
		"no payload":            {nil, nil, "4.00", "body-missing: ", nil},
		"not CBOR":              {raw("hello"), nil, "4.00", "body-invalid: ", nil},
		"cut":                   {raw("\xa1\x62d"), nil, "4.00", "body-invalid: ", nil},
		"empty map":             {body{}, nil, "4.00", "code-missing: ", nil},
		"no di":                 {body{"accesstoken": "code"}, nil, "4.00", "device-id-missing: ", nil},
		"di is no UUID":         {body{"di": "not-a-uuid", "accesstoken": "code"}, nil, "4.00", "device-id-invalid: ", nil},
		"di of a wrong type":    {body{"di": 7, "accesstoken": "code"}, nil, "4.00", "body-invalid: ", nil},
		"no code":               {body{"di": string(lampID)}, nil, "4.00", "code-missing: ", nil},
		"unknown provider":      {body{"di": string(lampID), "accesstoken": "code", "authprovider": "x"}, nil, "4.01", "provider-unknown: ", nil},
		"code not issued":       {body{"di": string(lampID), "accesstoken": "other"}, nil, "4.01", "code-refused: ", nil},
		"format not acceptable": {body{"di": string(lampID), "accesstoken": "code"}, []option{accept(0)}, "4.06", "not-acceptable: ", nil},
		"token of another device": {
			body{"di": string(lampID), "accesstoken": "code"},
			nil, "4.01", "device-claim-mismatch: ",
			&hub.Claims{Device: true, DeviceID: string(fanID)},
		},
		"owned by other": {body{"di": string(lampID), "accesstoken": "code"}, nil, "4.01", "device-owned-by-other: ", &hub.Claims{Owner: "mallory"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.w.own(lampID, "alice")
			claims := hub.Claims{}
			if c.claims != nil {
				claims = *c.claims
			}
			h.issue("code", "token", claims)
			d := h.plain(lampID)
			b, ok := c.body.([]byte)
			if !ok && c.body != nil {
				b = cborOf(t, c.body)
			}
			d.want(d.do(codes.POST, "/oic/sec/account", b, c.opts...), c.code, c.text)
			d.awaitClosed()
			if c.claims != nil && !slices.Contains(h.w.revoked, "token") {
				t.Error("tokens that a check refused were not revoked")
			}
			h.w.await(t, "nothing to be registered", func() bool {
				return !slices.ContainsFunc(h.w.log, func(l string) bool { return strings.HasPrefix(l, "signed-up") })
			})
			if r := h.gw.Refused(); c.code != "4.06" && (len(r) == 0 || r[0].What != "sign-up" || !strings.HasPrefix(r[0].Reason, c.text)) {
				t.Errorf("the refusal is not recorded: %+v", r)
			}
		})
	}
}

// A verified token that cannot be checked because of trouble of ours is kept for the repeat of the code.
func TestSignUpKeepsTokensAfterTroubleOfOurs(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.issue("code", "token", hub.Claims{})
	h.w.ids.signUp = func(context.Context, hub.DeviceID, hub.Owner, string, string, time.Time) (hub.Ownership, error) {
		return hub.Ownership{}, &hub.Error{Kind: hub.Unavailable}
	}
	d := h.plain(lampID)
	d.want(d.signUp("code"), "5.03", "unavailable: ")
	d.awaitClosed()
	if len(h.w.revoked) > 0 {
		t.Error("the tokens were revoked, a repeat of the code would fail")
	}
}

// A provider that gives no refresh token, which devices need, is the trouble, not the code.
func TestSignUpWithoutRefreshToken(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.issue("code", "token", hub.Claims{})
	h.w.codes["code"] = hub.Tokens{Access: "token"}
	d := h.plain(lampID)
	d.want(d.signUp("code"), "5.03", "provider-no-refresh-token: ")
	d.awaitClosed()
	if h.w.count("signed-up "+string(lampID)+" alice") > 0 {
		t.Error("the device was registered")
	}
}

// A JWT in place of a code needs a provider that takes it, and the scope for it.
func TestSignUpWithClientCredentials(t *testing.T) {
	h := start(t, func(_ *Config, d *Deps) {
		d.Providers = append(d.Providers, NamedProvider{Name: "m2m", ClientCredentials: true, Provider: d.Providers[0].Provider})
	})
	h.w.grant("good-jwt", hub.Claims{Scopes: []string{hub.ScopeDeviceSignUp}})
	h.w.grant("other-jwt", hub.Claims{Scopes: []string{hub.ScopeRead}})
	h.issue("good-jwt", "token", hub.Claims{})
	h.issue("other-jwt", "token", hub.Claims{})
	h.w.mu.Lock()
	h.w.codes["good-jwt"] = hub.Tokens{Access: "token"} // such providers give no refresh token
	h.w.mu.Unlock()
	for jwt, code := range map[string]string{"good-jwt": "2.04", "other-jwt": "4.01", "no-jwt": "4.01"} {
		// The default provider would take it as a code: nothing tells them apart but the configuration.
		d := h.plain(lampID)
		r := d.post("/oic/sec/account", d.account(func(b body) { b["accesstoken"], b["authprovider"] = jwt, "m2m" }))
		if r.code != code {
			t.Errorf("%s: got %s %q, want %s", jwt, r.code, r.body, code)
		}
		if code == "2.04" && r.members(t)["refreshtoken"] != "token" {
			t.Errorf("the refresh token is %v, want the access token", r.members(t)["refreshtoken"])
		}
	}
}

// The pin of the first sign-up holds: a device that came with a certificate is not taken over by one without.
func TestSignUpIsPinnedToTheCredential(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.issue("code", "token", hub.Claims{})
	d := h.secure(lampID)
	d.want(d.signUp("code"), "2.04", "")
	d.want(d.signIn("token"), "2.04", "")
	h.w.refresh["r"] = hub.Tokens{Access: "token", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
	for name, ask := range map[string]func(*device) reply{
		"sign-up": func(d *device) reply { return d.signUp("code") },
		"sign-in": func(d *device) reply { return d.signIn("token") },
		"refresh": func(d *device) reply {
			return d.post("/oic/sec/tokenrefresh", body{"di": string(lampID), "uid": "alice", "refreshtoken": "r"})
		},
		"sign-off": func(d *device) reply {
			return d.do(codes.DELETE, "/oic/sec/account", nil, query("uid=alice"), query("accesstoken=token"), query("di="+string(lampID)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			other := h.plain(lampID)
			other.want(ask(other), "4.01", "device-pinned: ")
			other.awaitClosed()
		})
	}
	d.alive()
	if h.w.count("signed-off "+string(lampID)) > 0 {
		t.Error("somebody without the device's certificate deleted it")
	}
}

func (d *device) session(change func(body)) body {
	b := body{"di": string(d.id), "uid": "alice", "accesstoken": "token", "login": true}
	if change != nil {
		change(b)
	}
	return b
}

func TestSignInRefusals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(body)
		raw    []byte
		opts   []option
		setup  func(h *hall)
		code   string
		text   string
	}{
		"no payload":    {nil, []byte{}, nil, nil, "4.00", "body-missing: "},
		"not CBOR":      {nil, []byte("nonsense"), nil, nil, "4.00", "body-invalid: "},
		"no di":         {func(b body) { delete(b, "di") }, nil, nil, nil, "4.00", "device-id-missing: "},
		"no uid":        {func(b body) { delete(b, "uid") }, nil, nil, nil, "4.00", "body-incomplete: "},
		"no token":      {func(b body) { delete(b, "accesstoken") }, nil, nil, nil, "4.00", "body-incomplete: "},
		"login no bool": {func(b body) { b["login"] = "yes" }, nil, nil, nil, "4.00", "body-invalid: "},
		"wrong uid":     {func(b body) { b["uid"] = "someone" }, nil, nil, nil, "4.01", "uid-mismatch: "},
		"bad token":     {func(b body) { b["accesstoken"] = "nonsense" }, nil, nil, nil, "4.01", "token-invalid: "},
		"expired token": {nil, nil, nil, func(h *hall) { h.w.grant("token", hub.Claims{Expiry: time.Now().Add(-time.Second)}) }, "4.01", "token-invalid: "},
		"token of another device": {nil, nil, nil, func(h *hall) {
			h.w.grant("token", hub.Claims{Device: true, DeviceID: string(fanID)})
		}, "4.01", "device-claim-mismatch: "},
		"token of an application": {nil, nil, nil, func(h *hall) {
			h.w.grant("token", hub.Claims{MarksDevices: true, Scopes: []string{hub.ScopeRead, hub.ScopeWrite}})
		}, "4.01", "token-not-of-device: "},
		"not registered": {func(b body) { b["di"] = string(fanID) }, nil, nil, nil, "4.01", "device-not-registered: "},
		"token of another owner": {func(b body) { b["uid"] = "mallory" }, nil, nil, func(h *hall) {
			h.w.grant("token", hub.Claims{Owner: "mallory"})
		}, "4.01", "device-owned-by-other: "},
		"being deleted": {nil, nil, nil, func(h *hall) {
			h.w.owned[lampID] = hub.Ownership{Device: lampID, Owner: "alice", Generation: 1, Releasing: true}
		}, "4.01", "device-not-registered: "},
		"format not acceptable": {nil, nil, []option{accept(40)}, nil, "4.06", "not-acceptable: "},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.w.own(lampID, "alice")
			h.w.grant("token", hub.Claims{})
			if c.setup != nil {
				c.setup(h)
			}
			d := h.plain(lampID)
			b := c.raw
			if b == nil {
				b = cborOf(t, d.session(c.change))
			} else if len(b) == 0 {
				b = nil
			}
			d.want(d.do(codes.POST, "/oic/sec/session", b, c.opts...), c.code, c.text)
			d.awaitClosed()
			if h.w.count("online "+string(lampID)) != 0 {
				t.Error("the device was recorded online")
			}
		})
	}
}

func TestRepeatedSignInKeepsTheSession(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, nil)
	h.w.awaitLog(t, "twin 3")
	r := d.want(d.signIn(h.w.grant("newer", hub.Claims{Expiry: time.Now().Add(2 * time.Hour)})), "2.04", "")
	if n := r.members(t)["expiresin"].(uint64); n < 7000 {
		t.Errorf("expiresin is %d, want that of the new token", n)
	}
	d.want(d.publish("/a"), "2.04", "")
	h.w.awaitLog(t, "published 1")
	if n := h.w.count("online " + string(lampID)); n != 1 {
		t.Errorf("the device came online %d times, want once", n)
	}
}

// Over plain UDP a device that signs in where it is signed in may have rebooted: it gets another session, which observes it
// again, and nobody hears that it was away. If it cannot be, the device is offline.
func TestSignInAgainOverPlainUDP(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := &hall{t: t, w: w}
		h.published("/a*")
		w.own(lampID, "alice")
		w.grant("token", hub.Claims{})
		f := newField(t, w, 1, nil)
		defer f.end()
		sock, err := f.net.Listen("192.0.2.2:5000")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sock.Close() }()
		d := newDozer(t)
		d.conn, d.value["/a"] = plainSocket{sock}, "1"
		f.running.Go(d.serve)
		signIn := func() codes.Code {
			t.Helper()
			a := d.ask(post("/oic/sec/session", 1, cborOf(t, h.device(lampID).session(nil))))
			after(time.Second)
			return a.Code
		}
		knows := func(value string, sessions int) {
			t.Helper()
			if got := string(w.twin[lampID]["/a"].Content.Data); got != value {
				t.Errorf("the twin has %q, want %q; %q", got, value, w.log)
			}
			if w.count("online "+string(lampID)) != sessions || w.count("twin 3") != sessions || w.count("offline "+string(lampID)) != 0 {
				t.Errorf("not %d sessions without an end: %q", sessions, w.log)
			}
			if n := testutil.ToFloat64(f.gw.metrics.sessions); n != 1 {
				t.Errorf("%v sessions go on", n)
			}
		}
		if c := signIn(); c != codes.Changed {
			t.Fatal(c)
		}
		knows("1", 1)
		d.set(func() { d.value["/a"] = "2"; clear(d.tokens); d.number = 0 }) // it rebooted
		if c := signIn(); c != codes.Changed {
			t.Fatal(c)
		}
		knows("2", 2)
		if !slices.Contains(d.heardOf(), "end /a") { // it may have been no reboot, and the device would notify for ever
			t.Errorf("the observation of before was not ended: %q", d.heardOf())
		}
		d.notify("/a", "3")
		knows("3", 2)
		w.dir.signIn = func(context.Context, hub.Ownership, hub.Connection, string, Deliverer) (hub.Session, error) {
			return hub.Session{}, hub.NewError(hub.Unavailable, "store-unavailable", "the store is away")
		}
		if c := signIn(); c != codes.ServiceUnavailable {
			t.Errorf("sign-in without a store: %v", c)
		}
		after(time.Minute)
		if w.count("offline "+string(lampID)) != 1 {
			t.Errorf("the session that ended is not offline: %q", w.log)
		}
	})
}

func TestSignInAsAnotherDeviceEndsTheFirstSession(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, nil)
	h.w.own(fanID, "alice")
	d.id = fanID
	d.want(d.signIn("token-"+string(lampID)), "2.04", "")
	h.w.awaitLog(t, "online "+string(fanID))
	h.w.mu.Lock() // the second one's twin is at work
	log := slices.Clone(h.w.log)
	h.w.mu.Unlock()
	off := slices.Index(log, "offline "+string(lampID))
	if off < 0 || off > slices.Index(log, "online "+string(fanID)) {
		t.Errorf("the first device did not go before the second came: %q", log)
	}
	d.want(d.publish("/a"), "2.04", "")
}

// Requests that do not wait for the sign-in's answer are handled after it, in order.
func TestPipelinedRequestsFollowTheSignIn(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	d := h.plain(lampID)
	replies := make(chan reply, 3)
	go func() { replies <- d.post("/oic/sec/session", d.session(nil)) }()
	h.w.awaitLog(t, "online "+string(lampID))
	<-replies
	// And truly in one write: the three messages go out before any answer is read.
	second := h.rawPlain()
	second.write(post("/oic/sec/session", 1, cborOf(t, d.session(nil))), post("/oic/rd", 2, cborOf(t, body{
		"di": string(lampID), "ttl": 0, "links": []body{{"href": "/a"}},
	})), get("/oic/rd", 3))
	for i, want := range []codes.Code{codes.Changed, codes.Changed, codes.Content} {
		m := second.readAnswer()
		if m.Code != want || m.Token[0] != byte(i+1) {
			t.Errorf("answer %d is %s for %x, want %s", i, coap.Dotted(m.Code), m.Token, coap.Dotted(want))
		}
	}
}

// What follows a refused request is neither carried out nor answered.
func TestPipelinedRequestsEndWithARefusedSignIn(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.issue("code", "token", hub.Claims{})
	d := h.device(lampID)
	r := h.rawPlain()
	r.write(
		post("/oic/sec/session", 1, cborOf(t, d.session(func(b body) { b["accesstoken"] = "nonsense" }))),
		post("/oic/sec/account", 2, cborOf(t, d.account(nil))), get("/x.plgd.dev/time", 3),
	)
	if m := r.readAnswer(); m.Code != codes.Unauthorized {
		t.Fatalf("got %s", coap.Dotted(m.Code))
	}
	for {
		m, ok := r.read()
		if !ok {
			break
		}
		if m.Code < 224 {
			t.Errorf("a request behind it was answered: %s %x", coap.Dotted(m.Code), m.Token)
		}
	}
	if h.w.count("signed-up "+string(lampID)+" alice") > 0 {
		t.Error("the sign-up behind it was carried out")
	}
}

// The same behind an account request that the engine refused, at once or after its first block.
func TestPipelinedRequestsEndWithARefusalOfTheEngine(t *testing.T) {
	t.Parallel()
	option := func(m message.Message, id message.OptionID, value ...byte) message.Message {
		m.Options = coap.AddOption(m.Options, id, value)
		return m
	}
	for name, c := range map[string]struct {
		refused message.Message
		code    codes.Code
	}{
		"unknown critical option":    {option(request(codes.DELETE, "/oic/sec/account", 1, nil), 65001, 1), codes.BadOption},
		"proxy":                      {option(post("/oic/sec/session", 1, nil), message.ProxyURI, 'x'), codes.ProxyingNotSupported},
		"last block without a first": {option(post("/oic/sec/tokenrefresh", 1, make([]byte, 16)), message.Block1, 0x50), codes.RequestEntityIncomplete},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.issue("code", "token", hub.Claims{})
			r := h.rawPlain()
			r.write(c.refused, post("/oic/sec/account", 2, cborOf(t, h.device(lampID).account(nil))), get("/x.plgd.dev/time", 3))
			if m := r.readAnswer(); m.Code != c.code || m.Token[0] != 1 {
				t.Fatalf("got %s for %x", coap.Dotted(m.Code), m.Token)
			}
			for {
				m, ok := r.read()
				if !ok {
					break
				}
				if m.Code < 224 {
					t.Errorf("a request behind it was answered: %s %x", coap.Dotted(m.Code), m.Token)
				}
			}
			if h.w.count("signed-up "+string(lampID)+" alice") > 0 {
				t.Error("the sign-up behind it was carried out")
			}
		})
	}
}

// The answer to a sign-in never waits for the device, whatever the hub asks it meanwhile.
func TestSignInDoesNotWaitForTheDevice(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, func(d *device) { d.mute = true })
	d.awaitAsked("0.01 /oic/res ?if=oic.if.ll")
	d.want(d.publish("/a*"), "2.04", "")
	d.want(d.do(codes.GET, "/oic/rd", nil), "2.05", "")
	d.want(d.post("/oic/sec/session", body{}), "2.04", "") // nor does the sign-out
}

func TestSignOut(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		body body
		code string
		text string
		gone bool
	}{
		"empty map":          {body{}, "2.04", "\xa0", true},
		"login false":        {body{"di": string(lampID), "uid": "alice", "accesstoken": "token-" + string(lampID), "login": false}, "2.04", "\xa0", true},
		"wrong token":        {body{"accesstoken": "nonsense"}, "4.01", "token-invalid: ", false},
		"wrong uid":          {body{"uid": "someone"}, "4.01", "uid-mismatch: ", false},
		"di of other device": {body{"di": string(fanID)}, "4.00", "device-id-mismatch: ", false},
		"di of a wrong type": {body{"di": 1}, "4.00", "body-invalid: ", false},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			d := h.online(lampID, func(d *device) {
				d.batch = func(int) *answerOf { return &answerOf{code: codes.Content, body: []body{}} }
			})
			h.w.awaitLog(t, "twin 3")
			r := d.want(d.post("/oic/sec/session", c.body), c.code, c.text)
			if !c.gone {
				d.awaitClosed()
				h.w.awaitLog(t, "offline "+string(lampID))
				return
			}
			if r.format != 10000 {
				t.Errorf("the empty map has format %d", r.format)
			}
			h.w.awaitLog(t, "signed-out "+string(lampID))
			d.awaitAsked("0.01 /oic/res observe=1 ?if=oic.if.b")
			d.alive()
			d.want(d.signIn("token-"+string(lampID)), "2.04", "") // again, on the same connection
			d.want(d.publish("/a"), "2.04", "")
			if h.w.count("offline "+string(lampID)) != 0 {
				t.Error("a device that signed out was recorded offline as well")
			}
		})
	}
	t.Run("without a session", func(t *testing.T) {
		h := start(t, nil)
		h.w.grant("token", hub.Claims{})
		d := h.plain(lampID)
		d.want(d.post("/oic/sec/session", d.session(func(b body) { b["login"] = false })), "2.04", "\xa0")
		d.alive()
		d.want(d.post("/oic/sec/session", body{}), "4.00", "body-incomplete: ")
		d.awaitClosed()
	})
	t.Run("then publish", func(t *testing.T) {
		h := start(t, nil)
		d := h.online(lampID, nil)
		d.want(d.post("/oic/sec/session", body{}), "2.04", "")
		d.want(d.publish("/a"), "4.01", "not-signed-in: ")
		d.awaitClosed()
	})
}

func TestSignOff(t *testing.T) {
	t.Parallel()
	token := "token-" + string(lampID)
	for name, c := range map[string]struct {
		queries []string
		session bool
		code    string
		text    string
		closes  bool
	}{
		"session, nothing in the query": {nil, true, "2.02", "", false},
		"session, di and uid":           {[]string{"di=" + string(lampID), "uid=alice"}, true, "2.02", "", false},
		"session, one option":           {[]string{"uid=alice&di=" + string(lampID)}, true, "2.02", "", false},
		"no session, separate options":  {[]string{"di=" + string(lampID), "uid=alice", "accesstoken=" + token}, false, "2.02", "", false},
		"no session, missing values":    {[]string{"di=" + string(lampID)}, false, "4.00", "query-incomplete: ", true},
		// RFC 7252, Section 5.4.3: Uri-Query ends at 255 bytes, a longer one is not understood and critical.
		"option of 256 bytes": {[]string{"di=" + string(lampID) + "&uid=alice&accesstoken=" + strings.Repeat("x", 194)}, true, "4.02", "critical option 15 ", true},
		"broken escape":       {[]string{"di=%zz"}, true, "4.02", "query-invalid: ", true},
		"wrong uid":           {[]string{"uid=someone"}, true, "4.01", "uid-mismatch: ", true},
		"wrong token":         {[]string{"accesstoken=nonsense"}, true, "4.01", "token-invalid: ", true},
		"not registered":      {[]string{"di=" + string(fanID), "uid=alice", "accesstoken=" + token}, false, "4.00", "device-not-registered: ", true},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.w.own(lampID, "alice")
			h.w.grant(token, hub.Claims{})
			var d *device
			if c.session {
				d = h.online(lampID, nil)
			} else {
				d = h.plain(lampID)
			}
			var opts []option
			for _, q := range c.queries {
				opts = append(opts, query(q))
			}
			r := d.want(d.do(codes.DELETE, "/oic/sec/account", nil, opts...), c.code, c.text)
			if c.closes {
				d.awaitClosed()
				return
			}
			if len(r.body) > 0 || r.format != -1 {
				t.Errorf("the answer has a body: %x", r.body)
			}
			h.w.awaitLog(t, "signed-off "+string(lampID))
			d.alive()
			d.want(d.do(codes.GET, "/oic/rd", nil), "4.01", "not-signed-in: ")
			d.awaitClosed()
			again := h.plain(lampID)
			again.want(again.signIn(token), "4.01", "device-not-registered: ")
		})
	}
}

// The same device twice: the newer session has the word, the older one is closed, and its end does not make the device
// offline.
func TestSecondSessionOfADevice(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	old := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 1, true) })
	h.awaitValue("/x", 1)
	again := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 2, true) })
	old.awaitClosed()
	h.awaitValue("/x", 2)
	h.w.awaitLog(t, "stale offline "+string(lampID))
	again.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 3}), nil)
	h.awaitValue("/x", 3)
	again.want(again.publish("/x*"), "2.04", "")
	if x, ok := h.gw.Diagnostics(lampID); !ok || !x.Online || x.Session != h.w.current[lampID] {
		t.Errorf("diagnostics are of the older session: %+v", x)
	}
	if h.w.count("offline "+string(lampID)) > 0 {
		t.Error("the end of the older session made the device offline")
	}
}

// An old session that is still connected, because nobody reached its gateway, writes nothing any more.
func TestOldSessionWritesLate(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	old := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 1, true) })
	h.w.awaitLog(t, "twin 3")
	h.w.mu.Lock()
	h.w.current[lampID]++ // signed in elsewhere
	h.w.mu.Unlock()
	old.want(old.publish("/y"), "4.00", "session-superseded: ")
	old.want(old.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID))), "4.00", "session-superseded: ")
	old.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 2}), nil)
	old.awaitClosed()
	h.w.awaitLog(t, "stale offline "+string(lampID))
	h.awaitValue("/x", 1)
	if _, ok := h.w.links[lampID]["/y"]; ok || len(h.w.links[lampID]) != 1 {
		t.Errorf("the old session published or unpublished: %v", h.w.links[lampID])
	}
	h.w.await(t, "the reason", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == "superseded" })
}

// A device that is deleted from elsewhere loses its connection.
func TestDeletedDeviceIsClosed(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, nil)
	if err := h.w.ids.SignOff(context.Background(), lampID, "alice", "x"); err != nil {
		t.Fatal(err)
	}
	d.awaitClosed()
	h.w.await(t, "the reason in diagnostics", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == "deleted" })
}

func TestRefresh(t *testing.T) {
	t.Parallel()
	refresh := func(h *hall, token string, c hub.Claims, renewed string) {
		h.w.grant("access-"+token, c)
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		h.w.refresh[token] = hub.Tokens{Access: "access-" + token, Refresh: renewed, Expiry: time.Now().Add(time.Hour)}
	}
	for name, c := range map[string]struct {
		body body
		code string
		text string
	}{
		"ok":                     {body{"di": string(lampID), "uid": "alice", "refreshtoken": "r", "authprovider": "main", "granttype": "refresh_token"}, "2.04", ""},
		"no provider":            {body{"di": string(lampID), "uid": "alice", "refreshtoken": "r"}, "2.04", ""},
		"uid is not compared":    {body{"di": string(lampID), "uid": "someone", "refreshtoken": "r"}, "2.04", ""},
		"provider keeps the old": {body{"di": string(lampID), "uid": "alice", "refreshtoken": "keep"}, "2.04", ""},
		"no di":                  {body{"uid": "alice", "refreshtoken": "r"}, "4.00", "device-id-missing: "},
		"no uid":                 {body{"di": string(lampID), "refreshtoken": "r"}, "4.00", "body-incomplete: "},
		"no refresh token":       {body{"di": string(lampID), "uid": "alice"}, "4.00", "body-incomplete: "},
		"unknown provider":       {body{"di": string(lampID), "uid": "alice", "refreshtoken": "r", "authprovider": "x"}, "4.01", "provider-unknown: "},
		"refused":                {body{"di": string(lampID), "uid": "alice", "refreshtoken": "bad"}, "4.01", "refresh-token-refused: "},
		"device not registered":  {body{"di": string(fanID), "uid": "alice", "refreshtoken": "r"}, "4.01", "device-not-registered: "},
		"token of another owner": {body{"di": string(lampID), "uid": "alice", "refreshtoken": "mallory"}, "4.01", "device-owned-by-other: "},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.w.own(lampID, "alice")
			refresh(h, "r", hub.Claims{}, "r2")
			refresh(h, "keep", hub.Claims{}, "")
			refresh(h, "mallory", hub.Claims{Owner: "mallory"}, "r2")
			d := h.plain(lampID)
			r := d.want(d.post("/oic/sec/tokenrefresh", c.body), c.code, c.text)
			if c.code != "2.04" {
				d.awaitClosed()
				return
			}
			old := c.body["refreshtoken"].(string)
			want := map[string]string{"r": "r2", "keep": "keep"}[old]
			if m := r.members(t); m["accesstoken"] != "access-"+old || m["refreshtoken"] != want || len(m) != 3 {
				t.Errorf("the answer is %v", m)
			}
			d.alive()
		})
	}
	t.Run("no payload", func(t *testing.T) {
		h := start(t, nil)
		d := h.plain(lampID)
		d.want(d.do(codes.POST, "/oic/sec/tokenrefresh", nil), "4.00", "body-missing: ")
		d.awaitClosed()
	})
	t.Run("one provider refuses and another is away", func(t *testing.T) {
		away := fakeProvider{refresh: func(context.Context, hub.DeviceID, string) (hub.Tokens, error) {
			return hub.Tokens{}, &hub.Error{Kind: hub.Unavailable}
		}}
		h := start(t, func(_ *Config, d *Deps) {
			d.Providers = append(d.Providers, NamedProvider{Name: "away", Provider: &away})
		})
		d := h.plain(lampID)
		// It may be the one that knows the token: this must not cost the device its credentials.
		d.want(d.post("/oic/sec/tokenrefresh", body{"di": string(lampID), "uid": "alice", "refreshtoken": "bad"}), "5.03", "unavailable: ")
	})
}

// A token is refreshed while the twin writes; what is written from then on has the new token's user.
func TestRefreshWhileTheTwinWrites(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	d := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 0, true) })
	h.w.awaitLog(t, "twin 3")
	h.w.grant("access", hub.Claims{Subject: "another subject"})
	h.w.mu.Lock()
	h.w.refresh["r"] = hub.Tokens{Access: "access", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
	h.w.mu.Unlock()
	d.want(d.publish("/x*", "/a*", "/b*", "/c*"), "2.04", "") // the hub asks for these now, and stores NOT_FOUND
	d.want(d.post("/oic/sec/tokenrefresh", body{"di": string(lampID), "uid": "alice", "refreshtoken": "r"}), "2.04", "")
	d.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 1}), nil)
	h.awaitValue("/x", 1)
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if last := h.w.stamps[len(h.w.stamps)-1]; last.User != "another subject" {
		t.Errorf("the last write is stamped %+v", last)
	}
}

// The session ends with its token, and a refresh in the session moves its end.
func TestSessionEndsWithItsToken(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	h.w.grant("short", hub.Claims{Expiry: time.Now().Add(1200 * time.Millisecond)})
	h.w.grant("long", hub.Claims{})
	h.w.mu.Lock()
	h.w.refresh["r"] = hub.Tokens{Access: "long", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
	h.w.mu.Unlock()
	lamp, fan := h.plain(lampID), h.plain(fanID)
	lamp.want(lamp.signIn("short"), "2.04", "")
	fan.want(fan.signIn("short"), "2.04", "")
	fan.want(fan.post("/oic/sec/tokenrefresh", body{"di": string(fanID), "uid": "alice", "refreshtoken": "r"}), "2.04", "")
	lamp.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	fan.want(fan.do(codes.GET, "/oic/rd", nil), "2.05", "")
	h.w.await(t, "the reason", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == "expired" })
}
