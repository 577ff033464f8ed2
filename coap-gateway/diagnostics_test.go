package coapgateway

import (
	"fmt"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// A device that comes and goes all the time must not be forgotten by the first of its ends, nor push others out.
func TestDiagnosticsForgetWhoLeftFirst(t *testing.T) {
	t.Parallel()
	d := newDiagnostics()
	id := func(i int) hub.DeviceID { return hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012d", i)) }
	session := uint64(0)
	visit := func(i int) {
		session++
		d.begin(Diagnostics{Device: id(i), Session: session}, func() coap.Stats { return coap.Stats{BytesIn: session} }, false)
		d.end(id(i), session, "peer-closed", time.Unix(int64(session), 0))
		d.end(id(i), session, "again", time.Unix(0, 0))
	}
	visit(1)
	for range maxEnded {
		visit(0)
	}
	if _, ok := d.get(id(1)); !ok {
		t.Error("one device's visits pushed another one out")
	}
	for i := range maxEnded - 2 { // with 0 and 1 as many as are remembered
		visit(2 + i)
	}
	visit(0)
	visit(maxEnded) // one too many: 1 left first
	x, ok := d.get(id(0))
	if want := (Diagnostics{
		Device: id(0), Session: session - 1, EndedAt: time.Unix(int64(session-1), 0), EndReason: "peer-closed", BytesIn: session - 1,
	}); !ok || x != want {
		t.Errorf("of the device that comes and goes: %+v, %v; want %+v", x, ok, want)
	}
	if _, ok := d.get(id(1)); ok || len(d.byDev) != maxEnded || d.ended.Len() != maxEnded {
		t.Errorf("%d devices are remembered, %d in the list; the one that left first: %v", len(d.byDev), d.ended.Len(), ok)
	}
	// Whoever is here is in no danger.
	d.begin(Diagnostics{Device: id(2), Session: session + 1}, func() coap.Stats { return coap.Stats{BytesOut: 7, RoundTrip: time.Second} }, false)
	for i := range maxEnded + 1 {
		visit(maxEnded + 1 + i)
	}
	if x, ok := d.get(id(2)); !ok || !x.Online || x.EndReason != "peer-closed" || x.BytesOut != 7 || x.RoundTrip != time.Second {
		t.Errorf("of a device that is here: %+v, %v", x, ok)
	}
}

// A device in quarantine may be here more than once: it is here as long as one of its sessions is, and the newest of those is shown.
func TestDiagnosticsOfQuarantine(t *testing.T) {
	t.Parallel()
	d := newDiagnostics()
	begin := func(session uint64, quarantined bool) {
		d.begin(Diagnostics{Device: lampID, Session: session, Quarantined: quarantined, TLSVersion: "TLS 1.3"}, func() coap.Stats { return coap.Stats{BytesIn: session} }, false)
	}
	want := func(what string, online bool, session uint64, sessions int) {
		t.Helper()
		if x, _ := d.get(lampID); x.Online != online || x.Session != session || x.BytesIn != session {
			t.Errorf("%s: %+v", what, x)
		}
		if n := d.security()[Security{TLSVersion: "TLS 1.3"}]; n != sessions {
			t.Errorf("%s: %d sessions are counted, want %d", what, n, sessions)
		}
	}
	now := time.Now()
	begin(77, false)
	for session := range uint64(4) {
		begin(session+1, true)
	}
	d.end(lampID, 77, "device-quarantined", now)
	want("four", true, 4, 4)
	d.end(lampID, 4, "peer-closed", now)
	want("the newest went", true, 3, 3)
	if x, _ := d.get(lampID); x.EndReason != "peer-closed" {
		t.Errorf("%+v", x)
	}
	d.end(lampID, 1, "peer-closed", now)
	want("the oldest went", true, 3, 2)
	d.end(lampID, 3, "peer-closed", now)
	want("one is left", true, 2, 1)
	begin(78, false)
	want("the quarantine is over", true, 78, 1)
	d.end(lampID, 2, "quarantine-over", now)
	want("its last session went", true, 78, 1)
	d.end(lampID, 78, "peer-closed", now)
	want("all went", false, 78, 0)
}

// Where a device was is its owner's to know: of sessions of a former one nothing is left.
func TestDiagnosticsOfAnotherOwner(t *testing.T) {
	t.Parallel()
	const dev hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	d := newDiagnostics()
	begin := func(owner hub.Owner, session uint64) {
		d.begin(Diagnostics{Device: dev, Owner: owner, Session: session, Remote: "192.0.2.1:5684"}, func() coap.Stats { return coap.Stats{} }, false)
	}
	at := time.Unix(1700000000, 0)
	begin("alice", 1)
	d.end(dev, 1, "deleted", at)
	begin("bob", 2)
	if x, _ := d.get(dev); x.Owner != "bob" || x.EndReason != "" || !x.EndedAt.IsZero() {
		t.Errorf("bob's device is %+v", x)
	}
	d.end(dev, 2, "idle", at)
	begin("bob", 3)
	if x, _ := d.get(dev); x.EndReason != "idle" || !x.EndedAt.Equal(at) {
		t.Errorf("bob's device, once more: %+v", x)
	}
}
