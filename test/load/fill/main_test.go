package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/dose"
	"github.com/coaphub/coaphub/test/hubtest"
)

// A hub takes the folder for its own: it verifies, starts, lists the devices of each owner with their names and twins, sets
// those offline that were online when it was left, and has all of the history.
func TestHubOpensWhatWasMade(t *testing.T) {
	t.Parallel()
	f := filling{devices: dose.Of(2000, 2000, 20_000), owners: 2, online: 50, atOnce: 256}
	f.events = f.devices*10 + 1
	data := filepath.Join(t.TempDir(), "data")
	if err := f.check(data); err != nil {
		t.Fatal(err)
	}
	if err := f.fill(t.Context(), data, io.Discard); err != nil {
		t.Fatal(err)
	}
	if f.made.Load() != int64(f.devices) || f.stored.Load() != int64(f.events) || f.left.Load() != int64(f.online) {
		t.Errorf("made %d devices, %d events, %d online; asked for %d, %d, %d",
			f.made.Load(), f.stored.Load(), f.left.Load(), f.devices, f.events, f.online)
	}
	verify(t, data, f.devices)

	h := hubtest.Start(t, hubtest.WithData(data))
	h.User(t, "owner-2", "a password of some length", "user")
	seen, events := map[string]bool{}, 0
	for _, owner := range []string{"admin", "owner-2"} {
		token := h.TokenOf(t, owner)
		n := list(t, h.HTTP+"/api/v1/devices", token, func(line []byte) {
			var d struct {
				Result struct {
					ID, Name string
					Data     struct{ Content map[string]any }
				}
			}
			if err := json.Unmarshal(line, &d); err != nil || d.Result.Name == "" || d.Result.Data.Content["di"] != d.Result.ID {
				t.Fatalf("%v: %s", err, line)
			}
			seen[d.Result.ID] = true
		})
		if n != f.devices/2 {
			t.Errorf("%s has %d devices, want %d", owner, n, f.devices/2)
		}
		events += list(t, h.HTTP+"/api/v1/events", token, nil)
	}
	if len(seen) != f.devices {
		t.Errorf("%d different devices, want %d", len(seen), f.devices)
	}
	// That a device was registered is not told, and that one went which was online when the folder was made is an event more.
	if least := f.events - f.devices; events < least || events > least+f.online {
		t.Errorf("%d events, want %d, and up to %d more", events, least, f.online)
	}
	token := h.Token(t)
	for deadline := time.Now().Add(time.Minute); ; {
		n := list(t, h.HTTP+"/api/v1/devices?statusFilter=ONLINE", token, nil)
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d devices are online still", n)
		}
		<-time.After(20 * time.Millisecond)
	}
	h.Stop(t)
	verify(t, data, f.devices)
}

// Ctrl-C leaves a hub with fewer devices, each of them whole.
func TestEndedEarly(t *testing.T) {
	t.Parallel()
	f := filling{devices: 1_000_000, owners: 1, events: 100_000_000, atOnce: 16}
	data := filepath.Join(t.TempDir(), "data")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stop := make(chan struct{})
	go func() { // ends with the test at the latest
		defer close(stop)
		for f.made.Load() < 20 && t.Context().Err() == nil {
			<-time.After(5 * time.Millisecond)
		}
		cancel()
	}()
	if err := f.fill(ctx, data, io.Discard); err == nil || !strings.Contains(err.Error(), "ended before") {
		t.Errorf("%v", err)
	}
	<-stop
	verify(t, data, int(f.made.Load()))
	h := hubtest.Start(t, hubtest.WithData(data))
	if n := list(t, h.HTTP+"/api/v1/devices", h.Token(t), nil); int64(n) != f.made.Load() {
		t.Errorf("%d devices are listed, %d were made", n, f.made.Load())
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "format"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	good := filling{devices: 10, owners: 2, events: 80, online: 1, atOnce: 1}
	if err := errors.Join(good.check(t.TempDir()), good.check(filepath.Join(used, "new"))); err != nil {
		t.Error(err)
	}
	if err := good.check(used); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("a folder that is used: %v", err)
	}
	for _, bad := range []*filling{
		{devices: 0, owners: 1, events: 80, atOnce: 1},
		{devices: 10, owners: 11, events: 80, atOnce: 1},
		{devices: 10, owners: 1, events: 79, atOnce: 1},
		{devices: 10, owners: 1, events: 80, online: 11, atOnce: 1},
	} {
		if bad.check(t.TempDir()) == nil {
			t.Errorf("%+v was not refused", bad)
		}
	}
}

func verify(t *testing.T, data string, devices int) {
	t.Helper()
	v, err := bundle.Verify(context.Background(), data, func(p string) { t.Error(p) }, nil)
	if err != nil || v.Devices != int64(devices) {
		t.Errorf("verified %d devices, want %d: %v", v.Devices, devices, err)
	}
}

// list hands each element of a list to each (nil: nobody) and returns how many there are.
func list(t *testing.T, url, token string, each func(line []byte)) (n int) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	lines := bufio.NewScanner(res.Body)
	for lines.Scan() {
		if !strings.HasPrefix(lines.Text(), `{"result":`) {
			if len(lines.Bytes()) > 0 {
				t.Fatalf("%s: %s %s", url, res.Status, lines.Bytes())
			}
			continue // a list ends with an empty line
		}
		n++
		if each != nil {
			each(lines.Bytes())
		}
	}
	if err := lines.Err(); err != nil || res.StatusCode != http.StatusOK {
		t.Fatal(fmt.Errorf("%s: %s, %w", url, res.Status, err))
	}
	return n
}
