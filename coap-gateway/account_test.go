package coapgateway

import (
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// issue makes code good for tokens of the claims.
func (h *hall) issue(code, access string, c hub.Claims) {
	h.w.grant(access, c)
	defer h.w.lock()()
	h.w.codes[code] = hub.Tokens{Access: access, Refresh: "refresh-" + access, Expiry: time.Now().Add(time.Hour)}
}

func (d *device) signUp(code string) reply {
	d.t.Helper()
	return d.post("/oic/sec/account", map[string]any{"di": string(d.id), "devicetype": "device", "accesstoken": code, "authprovider": "main"})
}

func TestTime(t *testing.T) {
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
	h := start(t, nil)
	d := h.device(lampID)
	d.res["/light"] = resource{format: 10000, body: cborOf(t, map[string]any{"power": 1}), observable: true}
	h.connect(d, h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(t, lampID, nil)))
	h.issue("code", "token", hub.Claims{DeviceID: string(lampID), Device: true})

	up := d.want(d.signUp("code"), "2.04", "").members(t)
	if up["uid"] != "alice" || up["accesstoken"] != "token" || up["refreshtoken"] != "refresh-token" || up["redirecturi"] != "" {
		t.Errorf("sign-up answered %v", up)
	}
	if n := up["expiresin"].(uint64); n < 3500 || n > 3600 {
		t.Errorf("expiresin is %d, want nearly an hour", n)
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
	d.notify("/light", codes.Content, 10000, cborOf(t, map[string]any{"power": 2}), nil)
	h.w.await(t, "the new value", func() bool {
		return string(h.w.twin[lampID]["/light"].Content.Data) == string(cborOf(t, map[string]any{"power": 2}))
	})
	if c := h.w.conns[0]; !c.Online || c.Protocol != hub.ProtocolCoAPSTCP || c.Service != "gateway-1" || c.ID == "" {
		t.Errorf("the connection is recorded as %+v", c)
	}
	_ = d.conn.Close()
	h.w.awaitLog(t, "offline "+string(lampID))
}
