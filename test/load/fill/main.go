// Command fill makes the data folder of a hub that has been in use: devices of several owners, with links, twins and history,
// which coaphub serve --data opens as its own. It is for measuring what growth costs. Over the hub's doors ten million events
// would take an hour, so it stands below them: the hub's own identity store and resource directory write over its own store,
// and no key is of its making.
//
// It must not know how any of them stores what it is given.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// storeFolder is where a data folder has its store. The hub would not find the devices anywhere else, and the test fails then.
const storeFolder = "store"

func main() {
	f := filling{}
	data := flag.String("data", "", "the folder to make; it must be empty, or not be there")
	flag.IntVar(&f.devices, "devices", 1000, "how many devices")
	flag.IntVar(&f.owners, "owners", 1, "of how many owners: the hub's first account, admin, and owner-2, owner-3 and so on")
	flag.IntVar(&f.events, "events", 10_000, fmt.Sprintf("how many events in all, at least %d a device", leastEvents))
	flag.IntVar(&f.online, "online", 0, "how many devices stay signed in, as when a hub is killed")
	flag.IntVar(&f.atOnce, "at-once", 2048, "how many devices are made at once")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	begin := time.Now()
	err := f.check(*data)
	if err == nil {
		err = f.fill(ctx, *data, os.Stderr)
		made := int(f.made.Load())
		fmt.Printf("%s: %d devices of %d owners, %d online, with %d events, in %s\n", *data, made, min(f.owners, made), f.left.Load(),
			f.stored.Load(), time.Since(begin).Round(time.Second/10))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// filling is what is to be made, and how much of it there is.
type filling struct {
	devices, owners, events, online int
	atOnce                          int

	identities         *identitystore.Store
	directory          *resourcedirectory.Directory
	made, left, stored atomic.Int64 // devices, those of them that are online, events
}

// readings are the resources that a device reports, each an event when it is new and one with each change. leastEvents is what
// it has of them and of its registration, its sign-in, its links, /oic/d and its end.
const (
	readings    = 3
	leastEvents = readings + 5
)

func (f *filling) check(data string) error {
	switch {
	case data == "":
		return errors.New("name the folder to make with -data")
	case f.devices < 1 || f.owners < 1 || f.owners > f.devices || f.online < 0 || f.online > f.devices || f.atOnce < 1:
		return errors.New("-devices, -owners and -at-once must be above zero, and -owners and -online at most -devices")
	case f.events < f.devices*leastEvents:
		return fmt.Errorf("-events must be at least %d for %d devices", f.devices*leastEvents, f.devices)
	}
	there, err := os.ReadDir(data)
	if len(there) > 0 {
		return fmt.Errorf("%s is not empty: what is in it may be a hub's", data)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// fill makes the folder. When ctx ends the devices under way are finished, and those that are made by then are whole.
func (f *filling) fill(ctx context.Context, data string, progress io.Writer) (err error) {
	folder, err := bundle.OpenFolder(data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, folder.Close()) }()
	log := slog.New(slog.NewTextHandler(progress, &slog.HandlerOptions{Level: slog.LevelWarn}))
	// More memory than a hub takes: whether a device is new is asked of all that was written before.
	st, err := pebblestore.Open(filepath.Join(folder.Path, storeFolder), pebblestore.Options{
		Log: log, CacheBytes: 512 << 20, MemTableBytes: 64 << 20,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	reg := prometheus.NewRegistry()
	if f.directory, err = resourcedirectory.New(resourcedirectory.Default(), st, log, reg, "fill"); err != nil {
		return err
	}
	if f.identities, err = identitystore.New(ctx, identitystore.Default(), st, f.directory, log, reg); err != nil {
		return err
	}
	own, end := context.WithCancel(context.WithoutCancel(ctx))
	serving := make(chan error, 1)
	go func() { serving <- f.directory.Run(own, func() {}) }() // until all devices are made
	defer func() { end(); err = errors.Join(err, <-serving) }()

	var (
		next    atomic.Int64
		wait    sync.WaitGroup
		once    sync.Once
		failed  error
		running = make(chan struct{})
	)
	for range min(f.atOnce, f.devices) {
		wait.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= f.devices {
					return
				}
				if err := f.device(ctx, own, i); err != nil {
					once.Do(func() { failed = fmt.Errorf("device %d: %w", i, err) })
					next.Store(int64(f.devices)) // no further ones
					return
				}
			}
		})
	}
	go func() { defer close(running); wait.Wait() }()
	begin, tick := time.Now(), time.NewTicker(5*time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			fmt.Fprintf(progress, "%s: %d of %d devices, %d of %d events\n", time.Since(begin).Round(time.Second), f.made.Load(),
				f.devices, f.stored.Load(), f.events)
		case <-running:
			if failed == nil && f.stored.Load() < int64(f.events) {
				failed = errors.New("ended before all was made")
			}
			return failed
		}
	}
}

// device makes the device of number i with its share of the events. It has no more of them once ctx ends, and is whole all the
// same: whatever it begins to store is stored under own.
func (f *filling) device(ctx, own context.Context, i int) error {
	dev := hub.DeviceID(uuid.NewSHA1(uuid.NameSpaceOID, fmt.Append(nil, "fill ", i)).String()) // spread as devices' IDs are
	owner := hub.Owner("admin")
	if n := i % f.owners; n > 0 {
		owner = hub.Owner(fmt.Sprintf("owner-%d", n+1))
	}
	events := f.events / f.devices
	if i < f.events%f.devices {
		events++
	}
	ownership, err := f.identities.SignUp(own, dev, owner, "", string(owner), time.Time{})
	if err != nil {
		return err
	}
	sess, err := f.directory.SignIn(own, ownership, hub.Connection{
		ID: uuid.NewString(), ConnectedAt: time.Now().UnixNano(), Protocol: hub.ProtocolCoAPSTCP, Service: "fill",
	}, string(owner), nil)
	if err != nil {
		return err
	}
	f.stored.Add(2)
	at := hub.Stamp{Device: dev, Session: sess.Number, User: string(owner)}
	links := []hub.Link{{
		Href: "/oic/d", Types: []string{"oic.wk.d", "oic.d.light"}, Interfaces: []string{"oic.if.r"}, Policy: hub.Discoverable,
	}}
	changes := []hub.Change{representation("/oic/d", map[string]any{
		"n": fmt.Sprintf("light %d", i), "di": dev, "dmno": fmt.Sprintf("model %d", i%10), "rt": links[0].Types,
	})}
	for n := range readings {
		links = append(links, hub.Link{
			Href: reading(n), Types: []string{"oic.r.light.dimming"}, Interfaces: []string{"oic.if.rw", "oic.if.baseline"},
			Policy: hub.Discoverable | hub.Observable,
		})
		changes = append(changes, measured(n, 0))
	}
	at.Message++
	if _, err := f.directory.Publish(own, at, links); err != nil {
		return err
	}
	at.Message++
	if err := f.directory.Notify(own, at, changes); err != nil {
		return err
	}
	f.stored.Add(int64(1 + len(changes)))
	for n := range events - leastEvents {
		if ctx.Err() != nil {
			break
		}
		at.Message++
		if err := f.directory.Notify(own, at, []hub.Change{measured(n%readings, n+1)}); err != nil {
			return err
		}
		f.stored.Add(1)
	}
	at.Message++
	if i < f.online {
		err = f.directory.SetTwin(own, at, hub.TwinInSync)
		f.left.Add(1)
	} else {
		err = f.directory.Offline(own, at)
	}
	if err == nil {
		f.stored.Add(1)
		f.made.Add(1)
	}
	return err
}

func reading(n int) hub.Href { return hub.Href(fmt.Sprintf("/light/%d", n+1)) }

// measured is a resource with another value than before, as large as what small devices report.
func measured(n, value int) hub.Change {
	return representation(reading(n), map[string]any{
		"state": value%2 == 0, "dimmingSetting": value, "name": "a light that has a name of some length",
	})
}

func representation(href hub.Href, v map[string]any) hub.Change {
	data, err := cbor.Marshal(v)
	if err != nil {
		panic(err) // there is nothing in v that CBOR has no form for
	}
	return hub.Change{
		Href: href, Status: hub.StatusOK,
		Content: hub.Content{Type: hub.MediaType(hub.FormatOCFCBOR), Format: hub.FormatOCFCBOR, Data: data},
	}
}
