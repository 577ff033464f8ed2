package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"go.uber.org/goleak"
)

// built is closed when coaphub is there, as a user builds it, without the race detector. The tests that need none need not wait.
var built = make(chan struct{})

var (
	program    string
	buildError error
)

func hubProgram(t *testing.T) string {
	t.Helper()
	<-built
	if buildError != nil {
		t.Fatal(buildError)
	}
	return program
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "coaphub-e2e")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	program = filepath.Join(dir, "coaphub")
	go func() {
		defer close(built)
		out, err := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "github.com/coaphub/coaphub/cmd/coaphub").CombinedOutput()
		if err != nil {
			buildError = fmt.Errorf("build coaphub: %w\n%s", err, out)
		}
	}()
	// These tests wait for processes, clocks and timeouts most of their time: more of them at once than there are CPUs.
	if err := flag.Set("test.parallel", "24"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	<-built
	http.DefaultClient.CloseIdleConnections()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// process is a running hub of the real binary.
type process struct {
	t     *testing.T
	data  string
	cmd   *exec.Cmd
	line  string            // the ready line
	ready map[string]string // endpoint name -> address, from it
	log   *lockedBuffer
	first chan string // gets the ready line
	ended chan error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var loopback = []string{
	"--coap-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0",
	"--admin-address", "127.0.0.1:0", "--external-address", "127.0.0.1", "--enrolment-address", "127.0.0.1:0", "--enrolment-http-address", "127.0.0.1:0",
}

// serve starts the binary on the data folder and waits for its ready line.
func serve(t *testing.T, data string, args ...string) *process {
	t.Helper()
	p := launch(t, data, args...)
	p.await()
	return p
}

// launch starts the binary on the data folder.
func launch(t *testing.T, data string, args ...string) *process {
	t.Helper()
	p := &process{t: t, data: data, log: &lockedBuffer{}, first: make(chan string, 1), ended: make(chan error, 1)}
	p.cmd = exec.Command(hubProgram(t), append(append([]string{"serve", "--data", data}, loopback...), args...)...)
	p.cmd.Stderr = p.log
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		sc := bufio.NewScanner(io.TeeReader(out, p.log))
		for sc.Scan() {
			if strings.HasPrefix(sc.Text(), "ready") {
				p.first <- sc.Text()
			}
		}
		p.ended <- p.cmd.Wait()
	}()
	t.Cleanup(p.kill)
	return p
}

// await waits for the ready line.
func (p *process) await() {
	t := p.t
	t.Helper()
	select {
	case l := <-p.first:
		p.line, p.ready = l, map[string]string{}
		for _, f := range strings.Fields(l) {
			if k, v, ok := strings.Cut(f, "="); ok {
				p.ready[k] = v
			}
		}
	case err := <-p.ended:
		p.ended <- err
		t.Fatalf("the hub ended before it was ready: %v\n%s", err, p.log)
	case <-time.After(30 * time.Second):
		t.Fatalf("the hub is not ready after 30 s\n%s", p.log)
	}
}

// kill is kill -9; the process is gone on return.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	err := <-p.ended
	p.ended <- err
}

// run runs a coaphub sub-command on the process's data folder and returns its standard output.
func (p *process) run(args ...string) string {
	p.t.Helper()
	out, stderr, err := command(p.t.Context(), append(args, "--data", p.data)...)
	if err != nil {
		p.t.Fatalf("coaphub %s: %v\n%s%s", strings.Join(args, " "), err, out, stderr)
	}
	return out
}

func command(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	if <-built; buildError != nil {
		return "", "", buildError
	}
	cmd := exec.CommandContext(ctx, program, args...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

// onboarded is what `coaphub onboard` printed and wrote for a device.
type onboarded struct {
	HubID     string            `json:"hubId"`
	Endpoints map[string]string `json:"endpoints"`
	Provider  string            `json:"authorizationProvider"`
	Code      string            `json:"authorizationCode"`
	CA        string            `json:"ca"`
	PSK       string            `json:"psk"`
	dir       string
	tls       *tls.Config
}

func (p *process) onboard(id string) onboarded {
	p.t.Helper()
	o := onboarded{dir: p.t.TempDir()}
	out := p.run("onboard", "--device-id", id, "--out", o.dir, "--psk", "--json")
	if err := json.Unmarshal([]byte(out), &o); err != nil {
		p.t.Fatalf("onboard printed %q: %v", out, err)
	}
	cert, err := tls.LoadX509KeyPair(filepath.Join(o.dir, "cert.pem"), filepath.Join(o.dir, "key.pem"))
	if err != nil {
		p.t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(o.CA)) {
		p.t.Fatalf("onboard's ca is no PEM: %q", o.CA)
	}
	o.tls = &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "127.0.0.1"}
	return o
}

// everyWay is the configuration of a hub that devices may come to over each of the transports.
const everyWay = `{coapGateway: {api: {coap: {plainAddress: "127.0.0.1:0", webSocket: {enabled: true}}}}}`

// dial is a peer that comes over tr.
func (p *process) dial(ctx context.Context, tr transport, id string, on onboarded) (*peer, error) {
	at := strings.TrimPrefix(p.ready[tr.scheme], tr.scheme+"://")
	switch tr.name {
	case "dtls":
		return dialDTLS(ctx, at, on.tls)
	case "psk":
		return dialPSK(ctx, at, id, []byte(on.PSK))
	case "udp":
		return dialUDP(ctx, at)
	case "ws":
		return dialWebSocket(ctx, p.ready[tr.scheme])
	case "tcp":
		return dialPeer(ctx, at, nil)
	}
	return dialPeer(ctx, at, on.tls)
}

func (p *process) coaps() string { return strings.TrimPrefix(p.ready["coaps+tcp"], "coaps+tcp://") }

func (p *process) http(path string) string {
	return "http://" + strings.TrimPrefix(p.ready["http"], "http://") + path
}

// get asks the HTTP API and returns status and body; a broken connection is status 0.
func (p *process) get(ctx context.Context, token, path string) (int, []byte) {
	return p.do(ctx, http.MethodGet, token, path)
}

func (p *process) do(ctx context.Context, method, token, path string) (int, []byte) {
	return p.send(ctx, method, token, path, "")
}

// send is do with a body.
func (p *process) send(ctx context.Context, method, token, path, body string) (int, []byte) {
	req, err := http.NewRequestWithContext(ctx, method, p.http(path), strings.NewReader(body))
	if err != nil {
		p.t.Error(err)
		return 0, nil
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := checked(p.t).Do(req)
	if err != nil {
		return 0, nil
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, nil
	}
	return res.StatusCode, b
}

// signedUp is what a device keeps of its sign-up.
type signedUp struct {
	Access  string `cbor:"accesstoken"`
	Refresh string `cbor:"refreshtoken"`
	UID     string `cbor:"uid"`
}

func signUp(ctx context.Context, pe *peer, id, code string) (signedUp, error) {
	var s signedUp
	body, err := cbor.Marshal(map[string]any{"di": id, "accesstoken": code})
	if err != nil {
		return s, err
	}
	res, closed, err := pe.do(ctx, request(codes.POST, "/oic/sec/account", body))
	if err != nil || closed || res.Code != codes.Changed {
		return s, fmt.Errorf("sign-up: %v %s, closed %v, error %v", res.Code, res.Payload, closed, err)
	}
	return s, cbor.Unmarshal(res.Payload, &s)
}

func signIn(ctx context.Context, pe *peer, id string, s signedUp) error {
	body, err := cbor.Marshal(map[string]any{"di": id, "uid": s.UID, "accesstoken": s.Access, "login": true})
	if err != nil {
		return err
	}
	res, closed, err := pe.do(ctx, request(codes.POST, "/oic/sec/session", body))
	if err != nil || closed || res.Code != codes.Changed {
		return fmt.Errorf("sign-in: %v %s, closed %v, error %v", res.Code, res.Payload, closed, err)
	}
	return nil
}

// publish publishes resources that the device also shows when it is asked, so that the hub's look at /oic/res finds them.
func publish(ctx context.Context, pe *peer, id string, revision int, hrefs ...string) (acked bool, err error) {
	_, acked, err = publishLinks(ctx, pe, id, revision, hrefs...)
	return acked, err
}

// publishedLink is a link in the hub's answer.
type publishedLink struct {
	Href string `cbor:"href"`
	Ins  uint32 `cbor:"ins"`
}

// publishLinks is publish with the links of the hub's answer.
func publishLinks(ctx context.Context, pe *peer, id string, revision int, hrefs ...string) (_ []publishedLink, acked bool, err error) {
	var links []map[string]any
	for _, h := range hrefs {
		if !pe.serves(h) {
			pe.serve(h, map[string]any{"n": 0})
		}
		links = append(links, map[string]any{
			"href": h, "rt": []string{fmt.Sprintf("x.r%d", revision)}, "if": []string{"oic.if.rw"}, "p": map[string]any{"bm": 3},
		})
	}
	body, err := cbor.Marshal(map[string]any{"di": id, "ttl": 0, "links": links})
	if err != nil {
		return nil, false, err
	}
	res, closed, err := pe.do(ctx, request(codes.POST, "/oic/rd", body))
	if err != nil || closed {
		return nil, false, nil //nolint:nilerr // the hub died: not acknowledged
	}
	if res.Code != codes.Changed {
		return nil, false, fmt.Errorf("publish: %v %s", res.Code, res.Payload)
	}
	var answer struct {
		Links []publishedLink `cbor:"links"`
	}
	if err := cbor.Unmarshal(res.Payload, &answer); err != nil {
		return nil, false, err
	}
	return answer.Links, true, nil
}

func deviceID(n int) string { return fmt.Sprintf("d0000000-0000-4000-8000-%012d", n) }
