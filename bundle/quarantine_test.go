package bundle_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// nobody is who delivers nothing.
type nobody struct{}

func (nobody) Close(string)                  {}
func (nobody) Ready(hub.Href, []string) bool { return false }
func (nobody) Deliver(hub.Command)           {}
func (nobody) Wake()                         {}

// A write that was on its way when its device's quarantine began does not come to the directory afterwards: once the quarantine is
// there, nothing of before it is stored any more.
func TestQuarantineFencesWrites(t *testing.T) {
	const lamp hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	docs, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	dir, err := resourcedirectory.New(resourcedirectory.Default(), docs, log, prometheus.NewRegistry(), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- dir.Run(ctx, func() { close(ready) }) }()
	<-ready
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := docs.Close(); err != nil {
			t.Error(err)
		}
	}()
	ids, err := identitystore.New(ctx, identitystore.Default(), docs, dir, log, prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	own, err := ids.SignUp(ctx, lamp, "alice", "pin", "alice", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	sess, err := dir.SignIn(ctx, own, hub.Connection{ID: "conn", Service: "gateway"}, "alice", nobody{})
	if err != nil {
		t.Fatal(err)
	}
	write := func(message uint64, value string) error {
		return dir.Notify(ctx, hub.Stamp{Device: lamp, Session: sess.Number, Message: message}, []hub.Change{
			{Href: "/light", Status: hub.StatusOK, Content: hub.Content{Type: "text/plain", Data: []byte(value)}},
		})
	}
	if err := write(1, "before"); err != nil {
		t.Fatal(err)
	}
	if err := ids.Quarantine(ctx, lamp, "", "root", "a copy"); err != nil {
		t.Fatal(err)
	}
	if err := write(2, "late"); !hub.IsKind(err, hub.Precondition) {
		t.Errorf("a write that comes late: %v", err)
	}
	d, err := dir.Device(ctx, "alice", lamp)
	if err != nil {
		t.Fatal(err)
	}
	if r, _ := d.Resources.Get("/light"); string(r.Content.Data) != "before" || d.Metadata.Connection.Online {
		t.Errorf("the directory has %q, online %t", r.Content.Data, d.Metadata.Connection.Online)
	}
	// The end of its connection is told later, and again; a quarantine that is there already changes nothing.
	at := dir.Changes(lamp)
	if err := dir.Offline(ctx, hub.Stamp{Device: lamp, Session: sess.Number, Message: 3}); err != nil {
		t.Error(err)
	}
	if err := ids.Quarantine(ctx, lamp, "", "root", "again"); err != nil {
		t.Error(err)
	}
	if dir.Changes(lamp) != at {
		t.Error("the device's log goes on")
	}
	// When it is over the device writes as ever.
	if err := ids.Enable(ctx, lamp, ""); err != nil {
		t.Fatal(err)
	}
	if sess, err = dir.SignIn(ctx, own, hub.Connection{ID: "conn-2", Service: "gateway"}, "alice", nobody{}); err != nil {
		t.Fatal(err)
	}
	if err := write(1, "after"); err != nil {
		t.Error(err)
	}
}
