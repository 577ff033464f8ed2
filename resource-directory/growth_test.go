package resourcedirectory

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// A day of devices that come, are commanded, are watched, and leave in every way leaves nothing behind in the directory: no device in
// memory, session, command's deadline or waiter, and nothing that a gateway gave it. The bubble sees to the goroutines.
func TestNoGrowth(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.History.Retention = time.Hour
	inBubble(t, cfg, func(t *testing.T, h *house, f *fake) {
		d := h.d
		generation, registered := map[hub.DeviceID]uint64{}, map[hub.DeviceID]bool{}
		var ends []weak.Pointer[end]
		come := func(id hub.DeviceID) *device {
			if !registered[id] {
				registered[id] = true
				generation[id]++
				h.must(d.Register(t.Context(), own(id, alice, generation[id]), "user-1"))
			}
			x := h.signIn(id, alice, generation[id], "conn")
			ends = append(ends, weak.Make(x.end))
			_, err := x.publish(link("/light"), link("/lock"))
			h.must(err)
			h.must(x.notify(value("/light", 1), value("/lock", 1)))
			return x
		}
		order := func(id hub.DeviceID, href hub.Href, ttl time.Duration) hub.Order {
			o := update(len(ends))
			o.Device, o.Href, o.TTL = id, href, ttl
			return o
		}
		offline := func(x *device) { h.must(d.Offline(t.Context(), x.stamp())) }
		leave := []func(id hub.DeviceID, x *device){
			func(_ hub.DeviceID, x *device) { offline(x) },
			func(_ hub.DeviceID, x *device) { h.must(d.SignOut(t.Context(), x.stamp())) },
			func(id hub.DeviceID, _ *device) {
				h.must(d.Unregister(t.Context(), own(id, alice, generation[id]), "user-1"))
				registered[id] = false
			},
			func(id hub.DeviceID, _ *device) { offline(come(id)) }, // the former session is superseded
			func(id hub.DeviceID, x *device) { // commands that nobody takes, and one that nobody answers
				for i := range 3 {
					h.async(order(id, "/light", time.Duration(1+i)*time.Minute))
				}
				h.async(order(id, "/lock", 10*time.Minute))
				x.take(2)
				offline(x)
			},
			func(id hub.DeviceID, x *device) { // one that is answered, to somebody who waits, and one to somebody who does not any more
				ctx, cancel := context.WithCancel(t.Context())
				done, gone := make(chan error, 1), make(chan error, 1)
				light, lock := order(id, "/light", time.Minute), order(id, "/lock", time.Minute)
				go func() { _, err := d.Command(t.Context(), alice, light); done <- err }()
				go func() { _, err := d.Command(ctx, alice, lock); gone <- err }()
				synctest.Wait()
				for _, c := range x.take(2) {
					if c.Href == "/light" {
						h.must(x.answer(c.ID, "done"))
					}
				}
				cancel()
				if err := <-done; err != nil || <-gone == nil {
					t.Errorf("the command: %v", err)
				}
				offline(x)
			},
			func(id hub.DeviceID, x *device) { // one that is refused, one that came before, and one that does not matter any more
				refused := order(id, "/light", time.Minute)
				refused.IfMatch = [][]byte{[]byte("another")}
				_, err := d.Command(t.Context(), alice, refused)
				wantKind(t, err, hub.Precondition, "")
				o := order(id, "/light", time.Minute)
				o.Key = fmt.Sprint("key ", len(ends))
				h.async(o)
				for _, c := range x.take(1) {
					h.must(x.answer(c.ID, "done"))
				}
				if _, err := d.Command(t.Context(), alice, o); err != nil { // the same once more
					t.Error(err)
				}
				offline(x)
			},
			func(id hub.DeviceID, x *device) { // one that is cancelled
				h.async(order(id, "/light", time.Hour))
				_, err := d.CancelCommands(t.Context(), alice, id, hub.CommandPick{Href: "/light"}, "user-2", "app-1")
				h.must(err)
				offline(x)
			},
			func(id hub.DeviceID, x *device) { // somebody reads the feed, and leaves
				head, err := d.FeedHead(t.Context())
				h.must(err)
				h.must(x.notify(value("/light", len(ends))))
				for _, err := range d.Feed(t.Context(), alice, head, hub.Position{}) {
					h.must(err)
					break
				}
				offline(x)
			},
			func(id hub.DeviceID, x *device) { // the store is away when it goes, and nobody tries again
				f.set(func(f *fake) { f.append = away })
				wantKind(t, d.Offline(t.Context(), x.stamp()), hub.Unavailable, "")
				<-time.After(time.Minute)
				f.set(func(f *fake) { f.append = nil })
			},
			func(id hub.DeviceID, x *device) { // a write whose outcome nobody waits for
				ctx, cancel := context.WithCancel(t.Context())
				f.set(func(f *fake) {
					f.append = func(c context.Context, e []store.Entry) []error { cancel(); return f.Store.Append(c, e) }
				})
				_ = d.Notify(ctx, x.stamp(), []hub.Change{value("/light", "?")})
				f.set(func(f *fake) { f.append = nil })
				synctest.Wait()
				offline(x)
			},
			func(id hub.DeviceID, x *device) {
				h.must(d.SetContact(t.Context(), x.stamp(), hub.Contact{}))
				_, err := d.SetLabels(t.Context(), alice, id, hub.LabelChange{Set: map[string]string{"room": fmt.Sprint(len(ends))}}, "user-2")
				h.must(err)
				offline(x)
			},
		}
		for hour := range 24 {
			for i, end := range leave {
				id := testID((hour + i) % 20)
				end(id, come(id))
			}
			<-time.After(time.Hour)
		}
		<-time.After(cfg.ColdAfter + time.Minute)
		synctest.Wait()
		for range 3 {
			runtime.GC()
			synctest.Wait()
		}
		held := 0
		for _, p := range ends {
			if p.Value() != nil {
				held++
			}
		}
		if held > 0 || len(ends) < 250 {
			t.Errorf("%d of %d sessions' ends are held by something", held, len(ends))
		}
		if n := d.loadedBytes.Load(); n != 0 || len(h.loaded()) != 0 {
			t.Errorf("%d bytes of %v are in memory", n, h.loaded())
		}
		d.waiters.mu.Lock()
		if n := len(d.waiters.of); n != 0 {
			t.Errorf("somebody waits for commands of %d devices", n)
		}
		d.waiters.mu.Unlock()
		d.tail.mu.Lock()
		if d.tail.readers != 0 || len(d.tail.entries) != 0 || d.tail.bytes != 0 {
			t.Errorf("%d readers, %d commits of %d bytes in the tail", d.tail.readers, len(d.tail.entries), d.tail.bytes)
		}
		d.tail.mu.Unlock()
		h.stop() // the workers' fields are theirs
		for i, w := range d.workers {
			n := len(w.devices) + w.coldest.Len() + len(w.live) + len(w.gone) + len(w.lost) + w.due.Len() + len(w.due.byID) + w.asked + len(w.ready)
			if n != 0 || w.bytes != 0 {
				t.Errorf("worker %d: %d devices, %d live, %d gone, %d lost, %d deadlines, %d asked, %d bytes", i,
					len(w.devices), len(w.live), len(w.gone), len(w.lost), w.due.Len(), w.asked, w.bytes)
			}
		}
	})
}
