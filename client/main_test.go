package client_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

const lamp = "d0000000-0000-4000-8000-00000000000a"

func TestMain(m *testing.M) {
	code := m.Run()
	examples.end()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Println(err)
			code = 1
		}
	}
	os.Exit(code)
}

// world is a hub with devices, as an application meets it.
type world struct {
	*hubtest.Hub
	c       *client.Client
	devices []*device.Device
	stop    []func()
}

// start starts a hub, and one device with each of the names, which stay until the test ends.
func start(t testing.TB, names ...string) *world {
	w := &world{Hub: hubtest.Start(t)}
	for i, name := range names {
		w.device(t, fmt.Sprintf("d0000000-0000-4000-8000-%012x", 10+i), name)
	}
	w.c = w.client(t, client.Static(w.Token(t)))
	w.synchronised(t, len(names))
	return w
}

func (w *world) client(t testing.TB, token client.TokenSource) *client.Client {
	c, err := client.New(client.Config{Server: w.HTTP, Token: token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// device lets a device live until the test ends; stop of w.stop ends it earlier.
func (w *world) device(t testing.TB, id, name string) {
	d, stop := w.Device(t, id, name)
	w.devices, w.stop = append(w.devices, d), append(w.stop, stop)
}

// synchronised waits until the twins of n devices are.
func (w *world) synchronised(t testing.TB, n int) {
	eventually(t, func() error {
		found := 0
		for m, err := range w.c.ListMetadata(context.Background(), client.ResourceQuery{}) {
			if err != nil {
				return err
			}
			if m.Twin.State == "IN_SYNC" {
				found++
			}
		}
		if found != n {
			return fmt.Errorf("%d of %d devices are synchronised", found, n)
		}
		return nil
	})
}

// eventually polls what the hub will make true.
func eventually(t testing.TB, ok func() error) {
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(30 * time.Second)
	for {
		err := ok()
		if err == nil {
			return
		}
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("it never came: %v", err)
		}
	}
}

// fails checks an error's kind and code.
func fails(t *testing.T, err error, kind client.Kind, code client.Code) {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) || !errors.Is(err, kind) || !errors.Is(err, code) || e.Message == "" {
		t.Errorf("%#v, want %s, %s", err, kind, code)
	}
}

// collect reads a list to its end.
func collect[T any](t *testing.T, seq func(func(T, error) bool)) (all []T) {
	t.Helper()
	for v, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, v)
	}
	return all
}
