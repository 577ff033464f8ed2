package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// javascript starts a program of test/npm-coap, which ends with its standard input. lines are what it prints, said what it
// complains of.
func javascript(t *testing.T, program string, args ...string) (in io.WriteCloser, lines <-chan string, said *lockedBuffer) {
	t.Helper()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("node is not installed (Debian: nodejs)")
	}
	for _, of := range []string{"coap", "undici"} {
		if _, err := os.Stat("../npm-coap/node_modules/" + of); err != nil {
			t.Skip("npm's " + of + " is not installed (npm ci --prefix test/npm-coap)")
		}
	}
	// Whatever it waits for, it ends: t's own context would kill it before it can leave by itself.
	ctx, kill := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	t.Cleanup(kill)
	cmd := exec.CommandContext(ctx, node, append([]string{"../npm-coap/" + program}, args...)...)
	said = &lockedBuffer{}
	cmd.Stderr = said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	printed := make(chan string)
	go func() { // ends with the program
		defer close(printed)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			printed <- sc.Text()
		}
	}()
	t.Cleanup(func() {
		_ = stdin.Close()
		for range printed {
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%s ended with %v: %s", program, err, said)
		}
	})
	return stdin, printed, said
}

// TestNpmCoAPDevice lets a device on npm's CoAP live over plain UDP: what it notifies ends in its twin byte for byte, whether
// it fits into a block, into a datagram, or has several blocks.
func TestNpmCoAPDevice(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithConfig(overUDP.config()...))
	a := application(t, h)
	a.accept = "application/protojson" // bytes as they are
	id := deviceID(1)
	_, port, _ := strings.Cut(h.CoAPPlainUDP, ":")
	in, lines, said := javascript(t, "device.js", port, id, h.Code(t, id))
	for got := map[string]bool{}; !got["observed"] || !got["published"]; {
		line, ok := <-lines
		if !ok {
			t.Fatalf("the device ended: %s", said)
		}
		got[line] = true
	}
	shown := func() []byte {
		var c struct{ Data []byte }
		a.ask(http.MethodGet, "/api/v1/devices/"+id+"/resources/log?onlyContent=1", "", &c)
		return c.Data
	}
	a.until("the first value", func() bool { return string(shown()) == "nothing yet" })
	rng := rand.New(rand.NewPCG(1, 1)) //nolint:gosec // the same each time
	for _, size := range []int{100, 1024, 1100, 5000, 20_001, 1, 3000} {
		want := make([]byte, size)
		for i := range want {
			want[i] = byte(rng.Uint32())
		}
		if _, err := fmt.Fprintln(in, base64.StdEncoding.EncodeToString(want)); err != nil {
			t.Fatalf("%v: %s", err, said)
		}
		a.until(fmt.Sprintf("a value of %d bytes", size), func() bool { return bytes.Equal(shown(), want) })
	}
}

// TestPageAsDevice: what a page in a browser can do with nothing but its WebSocket. It signs up and in, publishes a
// slider that the hub observes, finds the light of another device, observes it and switches it; the CoAP is written by hand, and shares nothing with the hub's or go-coap's.
func TestPageAsDevice(t *testing.T) {
	t.Parallel()
	over := transportOf("ws")
	h := hubtest.Start(t, hubtest.WithConfig(over.config()...))
	a := application(t, h)
	cfg := simulation(t, h, transportOf("tls"), deviceID(1))
	cfg.PerResource = true
	lamp, err := device.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lamp.Close)
	come(t, h, a, lamp, "/oic/d", "/light/1")
	a.shows(lamp, "lamp", 1)

	url := "ws" + strings.TrimPrefix(h.HTTP, "http") + "/.well-known/coap"
	in, lines, said := javascript(t, "page.js", url, deviceID(2), h.Code(t, deviceID(2)))
	says := func() string {
		t.Helper()
		line, ok := <-lines
		if !ok {
			t.Fatalf("the page ended: %s", said)
		}
		return line
	}
	if got, want := says(), "found /api/v1/devices/"+lamp.ID()+"/light/1"; got != want {
		t.Fatalf("%q, want %q", got, want)
	}
	state := func(line string) (v light) {
		t.Helper()
		var content, format string
		if n, err := fmt.Sscanf(line, "state %s %s", &content, &format); n != 2 || format != "10000" {
			t.Fatalf("%q, %v", line, err)
		}
		b, err := base64.StdEncoding.DecodeString(content)
		if err == nil {
			err = cbor.Unmarshal(b, &v)
		}
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return v
	}
	if got, want := state(says()), (light{"lamp", true, 1}); got != want {
		t.Fatalf("it observes %v, want %v", got, want)
	}
	a.until("the page to be in sync", func() bool { return a.twin(deviceID(2)) == "ONLINE IN_SYNC" })
	slider := func() (v struct{ Value int }) {
		a.ask(http.MethodGet, "/api/v1/devices/"+deviceID(2)+"/resources/slider?onlyContent=true", "", &v)
		return v
	}
	if got := slider().Value; got != 0 {
		t.Errorf("the slider is at %d", got)
	}
	for power := 2; power < 5; power++ {
		a.shows(lamp, "lamp", power)
		if got, want := state(says()), (light{"lamp", true, power}); got != want {
			t.Fatalf("it heard %v, want %v", got, want)
		}
	}
	if _, err := fmt.Fprintln(in, 77); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
	// Who observes hears of it, too; which of the two comes first nobody promises.
	got := map[string]bool{}
	for range 2 {
		if line := says(); strings.HasPrefix(line, "state ") {
			got[fmt.Sprint(state(line))] = true
		} else {
			got[line] = true
		}
	}
	if !got["answered 2.04"] || !got[fmt.Sprint(light{"lamp", true, 77})] {
		t.Errorf("after a command: %v", got)
	}
	a.until("the slider's place", func() bool { return slider().Value == 77 })
	_ = in.Close()
	if last := says(); last != "closed 1000" {
		t.Errorf("at its end: %q", last)
	}
	a.until("the page to be gone", func() bool { return strings.HasPrefix(a.twin(deviceID(2)), "OFFLINE") })
}
