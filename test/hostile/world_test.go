package hostile_test

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

func TestMain(m *testing.M) {
	hubtest.Main()
	// These tests wait for timeouts of the hub most of their time: more of them at once than there are CPUs.
	if err := flag.Set("test.parallel", "12"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// patience is how long anything may take that must happen; nothing is measured by it.
const patience = 30 * time.Second

// world is a hub in a process of its own, and beside it those who must notice nothing: a device over TLS, one over DTLS, and an
// application that commands both all the time.
type world struct {
	*hubtest.Hub
	t      *testing.T
	token  string
	client *http.Client
	rounds atomic.Int64 // of the application, each with both devices
	before usage        // when there was no attack yet
}

// deviceID makes the ID of a device.
func deviceID(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

// lamp and fan are the devices beside; attackers have higher numbers.
var (
	lamp = deviceID(1)
	fan  = deviceID(2)
)

func newWorld(t *testing.T, config ...string) *world {
	t.Helper()
	w := &world{t: t, Hub: hubtest.Start(t, hubtest.Apart(), hubtest.WithConfig(config...))}
	w.token = w.Token(t)
	w.client = &http.Client{Transport: &http.Transport{}}
	t.Cleanup(w.client.CloseIdleConnections)
	w.lives(lamp, w.Endpoints.CoAPSTCP)
	w.lives(fan, w.Endpoints.CoAPS)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { // ends with cancel
		defer close(ended)
		w.command(ctx)
	}()
	t.Cleanup(func() { cancel(); <-ended })
	w.undisturbed()
	w.before = w.usage()
	return w
}

// device makes a device that reaches the hub at an endpoint.
func (w *world) device(id, endpoint string) *device.Device {
	w.t.Helper()
	o := w.Onboard(w.t, id)
	conf, err := device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), w.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := device.New(device.Config{ID: id, HubAddr: endpoint, TLS: conf, PerResource: true})
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// lives lets a device live until the test ends.
func (w *world) lives(id, endpoint string) {
	w.t.Helper()
	w.runs(w.device(id, endpoint))
	w.until("a device to be there", func() bool {
		_, ok := w.power(w.t.Context(), id)
		return ok
	})
}

// runs is lives for a device that was made.
func (w *world) runs(d *device.Device) {
	w.t.Helper()
	code := w.Code(w.t, d.ID())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { // ends with cancel
		defer close(ended)
		_ = d.Run(ctx, func(context.Context) (string, error) { return code, nil })
	}()
	w.t.Cleanup(func() {
		cancel()
		<-ended
		if n := d.Stats().Failures.Load(); n > 0 {
			w.t.Errorf("%s lost its connection %d times", d.ID(), n)
		}
	})
}

// command switches both devices' lights and waits until their twins show it, again and again.
func (w *world) command(ctx context.Context) {
	for n := 1; ctx.Err() == nil; n++ {
		for _, id := range []string{lamp, fan} {
			own, stop := context.WithTimeout(ctx, patience)
			body := fmt.Sprintf(`{"power":%d}`, n)
			status, answer, err := w.request(own, http.MethodPut, "/api/v1/devices/"+id+"/resources/light/1", body)
			if err == nil && status != http.StatusOK {
				err = fmt.Errorf("%d %s", status, answer)
			}
			if err == nil {
				err = poll(own, func() bool {
					is, _ := w.power(own, id)
					return is == n
				})
			}
			stop()
			if err != nil && ctx.Err() == nil {
				w.t.Errorf("the application's command %d to %s: %v", n, id, err)
				return
			}
		}
		w.rounds.Add(1)
		_ = poll(ctx, func() bool { return true }) // not all the time the machine has
	}
}

// undisturbed waits until the application has done a whole round that began after the call.
func (w *world) undisturbed() {
	w.t.Helper()
	n := w.rounds.Load() + 2
	w.until("the application's commands to be carried out", func() bool { return w.rounds.Load() >= n })
}

// newcomer lets a device sign up and in that was never there before.
func (w *world) newcomer(id, endpoint string) {
	w.t.Helper()
	d := w.device(id, endpoint)
	defer d.Close()
	ctx, stop := context.WithTimeout(w.t.Context(), patience)
	defer stop()
	if err := poll(ctx, func() bool { return d.Connect(ctx) == nil }); err != nil {
		w.t.Errorf("a device cannot connect to %s: %v", endpoint, err)
		return
	}
	if a, err := d.SignUp(ctx, w.Code(w.t, id)); err != nil || !a.OK() {
		w.t.Errorf("a device cannot sign up at %s: %v, %v", endpoint, a, err)
	}
	if a, err := d.SignIn(ctx); err != nil || !a.OK() {
		w.t.Errorf("a device cannot sign in at %s: %v, %v", endpoint, a, err)
	}
}

// power is what the twin of a device's light shows.
func (w *world) power(ctx context.Context, id string) (n int, ok bool) {
	status, b, err := w.request(ctx, http.MethodGet, "/api/v1/devices/"+id+"/resources/light/1?onlyContent=true", "")
	var light struct{ Power *int }
	if err != nil || status != http.StatusOK || json.Unmarshal(b, &light) != nil || light.Power == nil { // null: published, not reported
		return 0, false
	}
	return *light.Power, true
}

// request asks the API as the owner.
func (w *world) request(ctx context.Context, method, path, body string) (status int, answer []byte, err error) {
	return w.ask(ctx, method, path, w.token, body)
}

// ask asks the API with any token.
func (w *world) ask(ctx context.Context, method, path, token, body string) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, w.HTTP+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, b, err
}

// usage is what the hub's metrics say: each sample by its name with labels, and each metric's sum by its name alone.
type usage map[string]float64

func (w *world) usage() usage {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodGet, w.Admin+"/metrics", http.NoBody)
	if err != nil {
		w.t.Fatal(err)
	}
	resp, err := w.client.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	u := usage{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		sample, text, ok := strings.Cut(lines.Text(), " ")
		if v, err := strconv.ParseFloat(text, 64); ok && err == nil {
			name, _, labels := strings.Cut(sample, "{")
			if u[name] += v; labels {
				u[sample] = v
			}
		}
	}
	return u
}

func (u usage) goroutines() int { return int(u["go_goroutines"]) }

func (u usage) connections() int { return int(u["coaphub_coap_connections"]) }

// memory is heap and stacks, with garbage that was not collected yet.
func (u usage) memory() int {
	return int(u["go_memstats_heap_inuse_bytes"] + u["go_memstats_stack_inuse_bytes"])
}

const mebibyte = 1 << 20

// costs compares what an attack costs at this moment with what it may. The store's caches grow meanwhile, too, with what the
// application does, and garbage waits: bounds on memory have some 40 MiB for that.
func (w *world) costs(goroutines, memory int) {
	w.t.Helper()
	u := w.usage()
	w.t.Logf("%d goroutines and %d KiB, before the attack %d and %d KiB", u.goroutines(), u.memory()>>10, w.before.goroutines(), w.before.memory()>>10)
	if n := u.goroutines() - w.before.goroutines(); n > goroutines {
		w.t.Errorf("the attack costs %d goroutines, want no more than %d", n, goroutines)
	}
	if n := u.memory() - w.before.memory(); n > memory {
		w.t.Errorf("the attack costs %d bytes, want no more than %d", n, memory)
	}
}

// remembered is the most that the hub keeps of the fan's messages, to know duplicates of them.
const remembered = 64 << 10

// givenBack waits until the hub has no more of anything than before the attack. Some goroutines and some memory come and go
// with what the application does.
func (w *world) givenBack() {
	w.t.Helper()
	var u usage
	w.untilOr("the hub to be as before the attack", func() bool {
		u = w.usage()
		return u.goroutines() <= w.before.goroutines()+10 && u.connections() <= w.before.connections() &&
			u["coaphub_coap_buffered_bytes"] <= remembered &&
			u["process_open_fds"] <= w.before["process_open_fds"]+10 && u.memory() <= w.before.memory()+48*mebibyte
	}, func() string {
		of := func(u usage) string {
			return fmt.Sprintf("%d goroutines, %d connections, %v buffered bytes, %v files, %d bytes of memory",
				u.goroutines(), u.connections(), u["coaphub_coap_buffered_bytes"], u["process_open_fds"], u.memory())
		}
		return of(u) + "; before " + of(w.before)
	})
}

// until waits for what the hub comes to in its own time.
func (w *world) until(what string, ok func() bool) {
	w.t.Helper()
	w.untilOr(what, ok, func() string { return "" })
}

func (w *world) untilOr(what string, ok func() bool, is func() string) {
	w.t.Helper()
	ctx, stop := context.WithTimeout(w.t.Context(), patience)
	defer stop()
	if poll(ctx, ok) != nil {
		w.t.Fatalf("waited in vain for %s: %s", what, is())
	}
}

// poll waits until ok, which it asks now and then.
func poll(ctx context.Context, ok func() bool) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if ok() {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
