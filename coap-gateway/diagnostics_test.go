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
		d.begin(Diagnostics{Device: id(i), Session: session}, func() coap.Stats { return coap.Stats{BytesIn: session} })
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
	d.begin(Diagnostics{Device: id(2), Session: session + 1}, func() coap.Stats { return coap.Stats{BytesOut: 7, RoundTrip: time.Second} })
	for i := range maxEnded + 1 {
		visit(maxEnded + 1 + i)
	}
	if x, ok := d.get(id(2)); !ok || !x.Online || x.EndReason != "peer-closed" || x.BytesOut != 7 || x.RoundTrip != time.Second {
		t.Errorf("of a device that is here: %+v, %v", x, ok)
	}
}
