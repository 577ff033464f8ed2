package coapgateway

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
)

// ward is a Quarantine in memory.
type ward struct {
	mu   sync.Mutex // guards all below
	in   map[hub.DeviceID]bool
	kept []hub.KeptWrite
	err  error // of Keep
}

func (w *ward) Quarantined(dev hub.DeviceID) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.in[dev]
}

func (w *ward) Keep(_ context.Context, own hub.Ownership, k hub.KeptWrite) (uint64, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.err != nil:
		return 0, w.err
	case !w.in[own.Device]:
		return 0, hub.NewError(hub.Precondition, "quarantine-over", "over")
	}
	if k.Number = uint64(len(w.kept) + 1); k.Kind == hub.KeptSignedIn {
		k.Session = k.Number
	}
	w.kept = append(w.kept, k)
	return k.Number, nil
}

func (w *ward) set(dev hub.DeviceID, is bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.in == nil {
		w.in = map[hub.DeviceID]bool{}
	}
	w.in[dev] = is
}

func (w *ward) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.err = err
}

// lines are what is kept, in short.
func (w *ward) lines() (out []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.kept {
		k := &w.kept[i]
		line := fmt.Sprintf("%d %s", k.Session, k.Kind)
		for _, c := range k.Changes {
			line += fmt.Sprintf(" %s=%x", c.Href, c.Data)
		}
		for _, l := range k.Links {
			line += " " + string(l.Href)
		}
		for _, h := range k.Hrefs {
			line += " " + string(h)
		}
		out = append(out, line)
	}
	return out
}

// TestQuarantinedDevice signs in, is observed and answered, and all it says is kept apart: the directory hears nothing of it. Its
// session of before ends, and so does this one with the quarantine. It reaches nobody, and takes nothing from its owner.
func TestQuarantinedDevice(t *testing.T) {
	t.Parallel()
	for name, secure := range map[string]bool{"plain": false, "tls": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w ward
			h := start(t, func(_ *Config, deps *Deps) { deps.Quarantine = &w })
			h.w.own(lampID, "alice")
			h.w.grant("token", hub.Claims{})
			connect := func(n int) *device {
				t.Helper()
				d := h.device(lampID)
				d.res["/x"], d.res["/y"] = value(t, n, true), value(t, n, true)
				if secure {
					return h.connect(d, h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(t, lampID, nil)))
				}
				return h.connect(d, h.gw.Addresses().Plain, nil)
			}
			d := connect(0)
			d.want(d.signIn("token"), "2.04", "")
			d.want(d.publish("/x*"), "2.04", "")
			h.awaitValue("/x", 0)
			w.set(lampID, true)
			h.gw.EndDenied(lampID)
			h.awaitEnded(d, "device-quarantined")
			before := h.w.soFar()

			first, second := connect(1), connect(2)
			for i, d := range []*device{first, second} { // both are here
				d.want(d.signIn("token"), "2.04", "")
				h.w.await(t, "what it has", func() bool {
					return slices.ContainsFunc(w.lines(), func(l string) bool {
						return strings.Contains(l, fmt.Sprintf("/x=%x", cborOf(t, body{"n": i + 1})))
					})
				})
			}
			first.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 7}), nil)
			line := fmt.Sprintf("1 changed /x=%x", cborOf(t, body{"n": 7}))
			h.w.await(t, "the notification", func() bool { return slices.Contains(w.lines(), line) })
			first.want(first.publish("/y*"), "2.04", "")
			if !slices.Contains(w.lines(), "1 published /y") {
				t.Errorf("kept: %q", w.lines())
			}
			first.want(first.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID))), "2.02", "")
			if !slices.Contains(w.lines(), "1 unpublished /x /y") {
				t.Errorf("kept: %q", w.lines())
			}
			first.want(first.do(codes.GET, "/oic/rd", nil), "2.05", "")
			first.want(first.do(codes.GET, "/oic/res", nil), "4.03", "device-quarantined: ")
			first.want(first.do(codes.POST, at(fanID, "/light"), []byte{0xa0}), "4.03", "device-quarantined: ")
			second.want(second.do(codes.DELETE, "/oic/sec/account", nil), "4.03", "device-quarantined: ")
			second.awaitClosed()
			first.alive()
			if x, _ := h.gw.Diagnostics(lampID); !x.Quarantined || !x.RivalsAt.IsZero() {
				t.Errorf("%+v", x)
			}
			if after := h.w.soFar(); len(after) != len(before) {
				t.Errorf("the directory was told %q", after[len(before):])
			}
			w.mu.Lock()
			from := w.kept[0].From
			w.mu.Unlock()
			if credential := map[bool]string{false: "token", true: "certificate "}[secure]; !strings.HasPrefix(from.Credential, credential) ||
				!strings.HasPrefix(from.Remote, "127.0.0.1:") || from.Connection == "" || !strings.HasPrefix(from.Protocol, "coap") {
				t.Errorf("from %+v", from)
			}

			w.set(lampID, false)
			h.gw.EndDenied(lampID)
			first.awaitClosed()
			d = connect(9)
			d.want(d.signIn("token"), "2.04", "")
			h.awaitValue("/x", 9)
		})
	}
}

// TestQuarantineThatFails: what could not be kept is not acknowledged, as in the directory.
func TestQuarantineThatFails(t *testing.T) {
	t.Parallel()
	var w ward
	h := start(t, func(_ *Config, deps *Deps) { deps.Quarantine = &w })
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	w.set(lampID, true)
	w.fail(&hub.Error{Kind: hub.Unavailable})
	d := h.plain(lampID)
	d.want(d.signIn("token"), "5.03", "unavailable: ")
	d.awaitClosed()
	w.fail(nil)
	d = h.device(lampID)
	d.res["/x"] = value(t, 1, true)
	h.connect(d, h.gw.Addresses().Plain, nil)
	d.want(d.signIn("token"), "2.04", "")
	d.want(d.publish("/x*"), "2.04", "")
	h.w.await(t, "the first value", func() bool { return strings.Contains(strings.Join(w.lines(), " "), "/x=") })
	w.fail(&hub.Error{Kind: hub.Unavailable})
	d.want(d.publish("/y*"), "5.03", "unavailable: ")
	d.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 2}), nil)
	d.awaitClosed()
	h.w.await(t, "the reason", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == "not-stored" })
}

// Whoever has the keys of a device in quarantine does not have all connections of the hub with them, and does not push out the other
// one who has them.
func TestQuarantinedSessionsAreBounded(t *testing.T) {
	t.Parallel()
	const many = maxApart + 4
	for name, c := range map[string]struct {
		from func(i int) net.IP
		gone []int
	}{
		"one of two is busy": {func(i int) net.IP { return net.IPv4(127, 0, 0, byte(2+min(i, 1))) }, []int{1, 2, 3, 4}},
		"all are elsewhere":  {func(i int) net.IP { return net.IPv4(127, 0, 1, byte(i)) }, []int{0, 1, 2, 3}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var w ward
			h := start(t, func(_ *Config, deps *Deps) { deps.Quarantine = &w })
			h.w.own(lampID, "alice")
			h.w.grant("token", hub.Claims{})
			w.set(lampID, true)
			var ds []*device
			for i := range many {
				d := h.device(lampID)
				d.from = c.from(i)
				h.connect(d, h.gw.Addresses().Plain, nil)
				d.want(d.signIn("token"), "2.04", "")
				ds = append(ds, d)
			}
			for i, d := range ds {
				if slices.Contains(c.gone, i) {
					d.awaitClosed()
				}
			}
			for i, d := range ds {
				if !slices.Contains(c.gone, i) {
					d.alive()
				}
			}
			h.w.await(t, "why they ended", func() bool {
				return testutil.ToFloat64(h.gw.metrics.sessionsEnded.WithLabelValues("second-session")) == float64(len(c.gone))
			})
		})
	}
}

// A quarantine may begin between the moment it was asked for and the one the session could be found.
func TestQuarantinedDuringSignIn(t *testing.T) {
	t.Parallel()
	var w ward
	var h *hall
	h = start(t, func(_ *Config, deps *Deps) {
		deps.Quarantine = &w
		world := deps.Directory.(*fakeDirectory).signIn
		deps.Directory.(*fakeDirectory).signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
			got, err := world(ctx, own, c, user, to)
			w.set(lampID, true)
			h.gw.EndDenied(lampID)
			return got, err
		}
	})
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	d := h.plain(lampID)
	d.want(d.signIn("token"), "5.03", "quarantine-changed: ")
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	d = h.plain(lampID)
	d.want(d.signIn("token"), "2.04", "")
	if ls := w.lines(); len(ls) == 0 || ls[0] != "1 signed-in" {
		t.Errorf("kept: %q", ls)
	}
}
