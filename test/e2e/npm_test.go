package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/hubtest"
)

// TestNpmCoAPDevice lets a device on npm's CoAP live over plain UDP: what it notifies ends in its twin byte for byte, whether
// it fits into a block, into a datagram, or has several blocks.
func TestNpmCoAPDevice(t *testing.T) {
	t.Parallel()
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("node is not installed (Debian: nodejs)")
	}
	if _, err := os.Stat("../npm-coap/node_modules/coap"); err != nil {
		t.Skip("npm's coap is not installed (npm ci --prefix test/npm-coap)")
	}
	h := hubtest.Start(t, hubtest.WithConfig(overUDP.config()...))
	a := application(t, h)
	a.accept = "application/protojson" // bytes as they are
	id := deviceID(1)
	_, port, _ := strings.Cut(h.CoAPPlainUDP, ":")
	// Whatever it waits for, it ends: t's own context would kill it before it can leave by itself.
	ctx, kill := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	t.Cleanup(kill)
	cmd := exec.CommandContext(ctx, node, "../npm-coap/device.js", port, id, h.Code(t, id))
	said := &lockedBuffer{}
	cmd.Stderr = said
	in, err := cmd.StdinPipe()
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
	lines := make(chan string)
	go func() { // ends with the program
		defer close(lines)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			lines <- sc.Text()
		}
	}()
	t.Cleanup(func() {
		_ = in.Close()
		for range lines {
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the device ended with %v: %s", err, said)
		}
	})
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
