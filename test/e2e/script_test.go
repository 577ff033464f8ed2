package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"go.yaml.in/yaml/v3"
	"golang.org/x/crypto/ocsp"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/hubtest"

	"github.com/coaphub/coaphub/test/dose"
)

var update = flag.Bool("update", false, "write what came into the scripts")

// TestScripts plays the conversations in test/scripts against a hub. A line is what somebody does, then an arrow, then
// what came: "->" compares at once, "~>" asks again until it is so or 10 s are over. Lines of a script:
//
//	hub config KEY=VALUE …                        before anything else
//	hub has NAME                                  an account with the role user
//	hub restarts
//	hub notes the time
//	hub revokes WHO                               the token of a device or an application
//	device NAME connects [without certificate|with certificate of other CA|...] -> connected
//	device NAME METHOD /path?query {body} [format N] [accept N] [etag HEX]     -> 2.04 {body}
//	device NAME sends HEX                         raw bytes
//	device NAME serves /href {value}              what it answers when the hub asks
//	device NAME notifies /href {value}
//	device NAME ignores /href                     it answers nothing there
//	device NAME tags /href HEX                    the ETag of what it answers there
//	device NAME belongs to WHO                    before it signs up
//	device NAME provisions METHOD /path {body}    -> 2.05 {body}, at the door for enrolment, with a factory certificate of its ID
//	device NAME observes /path                    -> 2.05 {body}, the first state
//	device NAME hears                             -> 2.05 {body}, what came next of all that it observes
//	device NAME forgets /path                     -> 2.05 {body}, and no more of it
//	device NAME was asked                         -> what the hub asked since the last time, but for the twin's questions
//	device NAME disconnects
//	device NAME is closed by the hub              -> yes
//	app WHO METHOD /path {body}                   -> 200 {body}
//	app WHO begins METHOD /path {body}            which goes on beside what follows
//	app WHO gets                                  -> 200 {body}, the answer to that
//	app WHO calls RPC {body}                      -> OK {answer} ...
//	app WHO streams N ?query                      -> 200 {message} ..., the first N of the server-sent events
//	app WHO says {message}                        over a WebSocket, which it opens first
//	app WHO hears                                 -> {message}, or closed CODE
//	app WHO hangs up
//
// A line that begins with "with certificates: " is left out where devices show none, over plain TCP and UDP and WebSocket.
//
// WHO is an account; "nobody", who has no token; a device, who takes the token of its last sign-up; or ACCOUNT-for-3s, whose
// token lasts so long.
//
// NAME in a path or body stands for that device's ID, CSR-OF-NAME for a request for its certificate, base64, ISSUER for the issuer that a
// record of certificates named last, ID-OF-NAME for its ID in a body of the API's, MAKER-CA for the CA of factory certificates, THING
// for the id that an answer had last, OCSP for a question about the certificate that was signed last, CODE for a fresh authorization code, TOKEN-OF-NAME and
// REFRESH-OF-NAME for what its last sign-up or refresh brought, APP-TOKEN for an application's access token, RESUME for the
// resume token of what WHO heard last, CORRELATION for the command that an answer named last, NOTED for the time that the hub
// noted. In what came, IDs become names and values that change from run to run become words in capitals.
func TestScripts(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../scripts/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	var played sync.Map // the files that were played to the end
	t.Cleanup(func() {
		n := 0
		played.Range(func(any, any) bool { n++; return true })
		if n == len(files) && !*update { // and not only some of them
			wantAllReached(t)
		}
	})
	for i, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			t.Parallel()
			one := transports[(i+2)%len(transports)] // not datagrams for the scripts in which many are refused
			ways := dose.Of([]transport{one}, transports, transports)
			if *update {
				ways = transports[:1] // what the scripts are written for
			}
			for _, tr := range ways {
				t.Run(tr.name, func(t *testing.T) {
					t.Parallel() // over DTLS refused devices are let go after ten seconds only
					play(t, f, tr)
					played.Store(f, true)
				})
			}
		})
	}
}

// transport is how devices of a script reach the hub. The scripts say what comes over TLS.
type transport struct {
	name, scheme, protocol string
	secure, datagrams      bool
}

var transports = []transport{
	{"tls", "coaps+tcp", "COAPS_TCP", true, false},
	{"dtls", "coaps", "COAPS", true, true},
	{"psk", "coaps", "COAPS", true, true},
	{"tcp", "coap+tcp", "COAP_TCP", false, false},
	{"udp", "coap", "COAP", false, true},
	{"ws", "coap+ws", "COAP_TCP", false, false}, // of COAP_TCP the client API knows no kinds
}

func transportOf(name string) transport {
	return transports[slices.IndexFunc(transports, func(tr transport) bool { return tr.name == name })]
}

// config is what a hub must be told so that devices may come over tr.
func (tr transport) config() []string {
	switch {
	case tr.name == "ws":
		return []string{"coapGateway.api.coap.webSocket.enabled=true"}
	case !tr.secure:
		return []string{"coapGateway.api.coap.plainAddress=127.0.0.1:0"}
	}
	return nil
}

// says is what a line of a script, written for TLS, means over tr.
func (tr transport) says(want string) string {
	want = strings.ReplaceAll(want, "coaps+tcp://", tr.scheme+"://")
	return strings.ReplaceAll(want, "protocol: COAPS_TCP", "protocol: "+tr.protocol)
}

func play(t *testing.T, file string, tr transport) {
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, over: tr, config: tr.config(), devices: map[string]*actor{}, sockets: map[string]*socket{}, begun: map[string]chan appAnswer{}}
	var out []string
	for i, line := range strings.Split(strings.TrimRight(string(b), "\n"), "\n") {
		act, want, arrow := split(line)
		want = tr.says(want)
		act, certificates := strings.CutPrefix(act, "with certificates: ")
		if certificates && !tr.secure {
			continue
		}
		if act == "" || strings.HasPrefix(act, "#") {
			out = append(out, line)
			continue
		}
		got := w.line(act)
		since, deadline := time.Now(), time.Now().Add(10*time.Second)
		for arrow == "~>" && (got != want || *update) && time.Now().Before(deadline) {
			wait := time.NewTimer(20 * time.Millisecond)
			<-wait.C
			if next := w.line(act); next != got {
				got, since = next, time.Now()
			}
			if *update && time.Since(since) > time.Second { // it will not change any more
				break
			}
		}
		if arrow == "" {
			arrow = "->"
		}
		if got == "" && want == "" {
			out = append(out, line)
			continue
		}
		if got != want && !*update {
			t.Errorf("%s:%d: %s\n  got  %s\n  want %s", file, i+1, act, got, want)
		}
		if certificates {
			act = "with certificates: " + act
		}
		out = append(out, act+"  "+arrow+" "+got)
	}
	for _, p := range w.leaving {
		// What the credential is makes no difference here: one kind is enough to wait for.
		if tr.name == "dtls" && !p.waitClosed(15*time.Second) {
			t.Errorf("the hub did not close the association of %v, which it had refused or replaced", p.conn.LocalAddr())
		}
		p.close()
	}
	if *update {
		if err := os.WriteFile(file, []byte(strings.Join(out, "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func split(line string) (act, want, arrow string) {
	line = strings.TrimSpace(line)
	for _, arrow := range []string{" -> ", " ~> "} {
		if act, want, ok := strings.Cut(line, arrow); ok {
			return strings.TrimSpace(act), strings.TrimSpace(want), strings.TrimSpace(arrow)
		}
	}
	for _, arrow := range []string{" ->", " ~>"} {
		if act, ok := strings.CutSuffix(line, arrow); ok {
			return strings.TrimSpace(act), "", strings.TrimSpace(arrow)
		}
	}
	return line, "", ""
}

// world is one script's hub and everybody who talks to it.
type world struct {
	t       *testing.T
	over    transport
	hub     *hubtest.Hub
	config  []string
	devices map[string]*actor
	leaving []*peer // whom the hub has still to close
	tokens  map[string]string
	sockets map[string]*socket
	grpc    *remote // nil before it is needed
	begun   map[string]chan appAnswer

	correlation string // of the newest command that an answer named
	issuer      string // of the newest record of a certificate that an answer had
	thing       string // the newest id that an answer had
	maker       *maker // nil before it is needed
	question    []byte // about the certificate that was signed last
	noted       string // a time, in nanoseconds
}

// actor is one device of a script.
type actor struct {
	id      string
	onboard hubtest.Onboarding
	peer    *peer
	access  string
	refresh string
	// The pre-shared key, once it was needed.
	identity string
	key      []byte
	// What its manufacturer gave it, once it was needed.
	chain, factoryKey []byte
}

func (w *world) start() *hubtest.Hub {
	if w.hub == nil {
		w.hub = hubtest.Start(w.t, hubtest.WithConfig(w.config...))
		w.tokens = map[string]string{}
	}
	return w.hub
}

func (w *world) device(name string) *actor {
	d := w.devices[name]
	if d == nil {
		n := len(w.devices) + 1
		d = &actor{id: fmt.Sprintf("d0000000-0000-4000-8000-%012d", n)}
		d.onboard = w.start().Onboard(w.t, d.id)
		w.devices[name] = d
		w.t.Cleanup(func() {
			if d.peer != nil {
				d.peer.close()
			}
		})
	}
	return d
}

// line does one thing and says what came of it.
func (w *world) line(act string) string {
	ctx, cancel := context.WithTimeout(w.t.Context(), 40*time.Second)
	defer cancel()
	who, rest, _ := strings.Cut(act, " ")
	name, rest, _ := strings.Cut(strings.TrimSpace(rest), " ")
	rest = strings.TrimSpace(rest)
	got, err := func() (string, error) {
		switch who {
		case "hub":
			return w.hubLine(ctx, name, rest)
		case "device":
			return w.deviceLine(ctx, w.device(name), rest)
		case "app":
			return w.appLine(ctx, name, rest)
		}
		return "", fmt.Errorf("nobody is called %q", who)
	}()
	if err != nil {
		w.t.Fatalf("%s: %v", act, err)
	}
	return got
}

func (w *world) hubLine(ctx context.Context, what, rest string) (string, error) {
	switch what {
	case "config":
		w.config = append(w.config, strings.Fields(rest)...)
		return "", nil
	case "has":
		w.start().User(w.t, rest, "kept as a secret by "+rest, "user")
		return "", nil
	case "restarts":
		w.start().Restart(w.t)
		return "", nil
	case "onboards": // once more: the code of the first time is used up, and its certificate may be revoked
		d := w.device(rest)
		d.onboard, d.key = w.hub.Onboard(w.t, d.id), nil
		return "", nil
	case "notes": // the time
		w.noted = strconv.FormatInt(time.Now().UnixNano(), 10)
		return "", nil
	case "revokes":
		if d := w.devices[rest]; d != nil {
			return w.revoke(ctx, d.access, "coaphub-device")
		}
		token, err := w.token(ctx, rest)
		if err != nil {
			return "", err
		}
		return w.revoke(ctx, token, "coaphub-cli")
	}
	return "", fmt.Errorf("a hub does not %q", what)
}

// revoke ends a token, and what a device's token stands on (RFC 7009), as whoever lost the device would.
func (w *world) revoke(ctx context.Context, token, client string) (string, error) {
	form := url.Values{"token": {token}, "client_id": {client}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.hub.Issuer+"/revoke", strings.NewReader(form.Encode()))
	if err != nil {
		return "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	return strconv.Itoa(res.StatusCode), res.Body.Close()
}

func (w *world) deviceLine(ctx context.Context, d *actor, what string) (string, error) {
	verb, rest, _ := strings.Cut(what, " ")
	switch verb {
	case "connects":
		return w.connect(ctx, d, rest)
	case "disconnects":
		d.peer.close()
		return "", nil
	case "is":
		return w.closed(ctx, d)
	case "lives":
		d.peer.livesAt(strings.Fields(strings.TrimPrefix(rest, "at "))...)
		return "", nil
	case "serves", "notifies":
		href, body, _ := strings.Cut(rest, " ")
		v, err := w.value(body)
		if err != nil {
			return "", err
		}
		if verb == "serves" {
			d.peer.serve(href, v)
			return "", nil
		}
		deadline := time.Now().Add(5 * time.Second)
		for !d.peer.observed(href) && time.Now().Before(deadline) {
			wait := time.NewTimer(5 * time.Millisecond)
			<-wait.C
		}
		return "", d.peer.notify(href, v)
	case "ignores":
		d.peer.ignores(rest)
		return "", nil
	case "tags":
		href, digits, _ := strings.Cut(rest, " ")
		tag, err := hexBytes(digits)
		if err == nil {
			d.peer.tags(href, tag)
		}
		return "", err
	case "provisions":
		return w.provision(ctx, d, rest)
	case "belongs":
		d.onboard, d.key = w.hub.Onboard(w.t, d.id, strings.TrimPrefix(rest, "to ")), nil
		return "", nil
	case "observes", "forgets":
		value := uint32(0)
		if verb == "forgets" {
			value = 1
		}
		res, err := d.peer.observe(ctx, w.ids(rest), value)
		if _, e := res.Options.Observe(); err == nil && (e == nil) != (verb == "observes" && res.Code>>5 == 2) {
			w.t.Errorf("device %s: the answer %v has an Observe option, or lacks it", what, res.Code)
		}
		return strings.TrimSpace(codeText(res.Code) + " " + w.body(res)), err
	case "hears":
		select {
		case res := <-d.peer.heard:
			return strings.TrimSpace(codeText(res.Code) + " " + w.body(res)), nil
		case <-ctx.Done():
			return "", ctx.Err()
		}
	case "was":
		asked := slices.DeleteFunc(d.peer.asked(), func(s string) bool {
			return strings.HasPrefix(s, "GET /oic/res") || strings.Contains(s, "observe=")
		})
		return strings.Join(asked, ", "), nil
	case "sends":
		b, err := hexBytes(rest)
		if err != nil {
			return "", err
		}
		_, err = d.peer.conn.Write(b)
		return "", err
	}
	return w.coap(ctx, d, verb, rest)
}

// closed tells whether the hub lets a device go. Over DTLS it answers duplicates for ten seconds before it does, so that is
// looked at when the script ends; over plain UDP there is nothing to close, but nobody is signed in any more.
func (w *world) closed(ctx context.Context, d *actor) (string, error) {
	switch {
	case w.over.datagrams && w.over.secure:
		w.leaving = append(w.leaving, d.peer)
		d.peer = nil
		return "yes", nil
	case w.over.datagrams:
		res, gone, err := d.peer.do(ctx, request(codes.GET, "/oic/rd", nil))
		if err != nil || gone || res.Code == codes.Unauthorized {
			return "yes", err
		}
		return codeText(res.Code), nil
	case d.peer.waitClosed(5 * time.Second):
		return "yes", nil
	}
	return "no", nil
}

func (w *world) connect(ctx context.Context, d *actor, how string) (string, error) {
	conf, is := d.onboard.TLS.Clone(), d
	switch how {
	case "":
	case "without certificate":
		conf.Certificates = nil
	default:
		other := w.devices[strings.TrimPrefix(how, "as ")]
		if other == nil {
			return "", fmt.Errorf("nobody connects %q", how)
		}
		conf, is = other.onboard.TLS.Clone(), other
	}
	if d.peer != nil {
		d.peer.close()
	}
	var p *peer
	var err error
	switch w.over.name {
	case "tls":
		p, err = dialPeer(ctx, w.hub.CoAPS, conf)
	case "tcp":
		p, err = dialPeer(ctx, w.hub.CoAPPlain, nil)
	case "dtls":
		p, err = dialDTLS(ctx, w.hub.CoAPSUDP, conf)
	case "psk":
		if how == "without certificate" {
			p, err = dialDTLS(ctx, w.hub.CoAPSUDP, conf)
			break
		}
		if is.key == nil {
			is.identity, is.key = w.hub.PSK(w.t, is.id)
		}
		p, err = dialPSK(ctx, w.hub.CoAPSUDP, is.identity, is.key)
	case "udp":
		p, err = dialUDP(ctx, w.hub.CoAPPlainUDP)
	case "ws":
		p, err = dialWebSocket(ctx, w.hub.Endpoints.CoAPWS)
	}
	if err != nil {
		return refusal(err), nil
	}
	d.peer = p
	// With TLS 1.3 a refused certificate is known only after the handshake: the hub's CSM or its end tells.
	if w.over.secure && conf.Certificates == nil && p.waitClosed(3*time.Second) {
		return "refused", nil
	}
	return "connected", nil
}

func refusal(err error) string {
	var alert tls.AlertError
	if errors.As(err, &alert) {
		return "refused: " + alert.Error()
	}
	return "refused"
}

func (w *world) coap(ctx context.Context, d *actor, method, rest string) (string, error) {
	code, err := parseMethod(method)
	if err != nil {
		return "", err
	}
	target, rest, _ := strings.Cut(rest, " ")
	var accept, format *uint32
	var etag []byte
	rest = optionWord.ReplaceAllStringFunc(rest, func(s string) string {
		f := strings.Fields(s)
		if f[0] == "etag" {
			etag, err = hexBytes(f[1])
			return ""
		}
		n, _ := strconv.ParseUint(f[1], 10, 32)
		v := uint32(n)
		if f[0] == "accept" {
			accept = &v
		} else {
			format = &v
		}
		return ""
	})
	if err != nil {
		return "", err
	}
	var payload []byte
	switch rest = strings.TrimSpace(rest); {
	case strings.HasPrefix(rest, "hex:"):
		payload, err = hexBytes(rest[4:])
	case rest != "":
		var v any
		if v, err = w.value(rest); err == nil {
			payload, err = cbor.Marshal(v)
		}
	}
	if err != nil {
		return "", err
	}
	m := request(code, w.ids(target), payload)
	if format != nil {
		m.Options = addUint(m.Options.Remove(message.ContentFormat), message.ContentFormat, *format)
	}
	if accept != nil {
		m.Options = addUint(m.Options, message.Accept, *accept)
	}
	if etag != nil {
		m.Options = m.Options.Add(message.Option{ID: message.ETag, Value: etag})
	}
	res, closed, err := d.peer.do(ctx, m)
	switch {
	case err != nil:
		return "", err
	case closed:
		return "closed", nil
	}
	if res.Code == codes.Changed {
		var body struct {
			Access  string `cbor:"accesstoken"`
			Refresh string `cbor:"refreshtoken"`
		}
		if cbor.Unmarshal(res.Payload, &body) == nil && body.Access != "" {
			d.access, d.refresh = body.Access, body.Refresh
		}
	}
	return strings.TrimSpace(codeText(res.Code) + " " + w.body(res)), nil
}

var optionWord = regexp.MustCompile(`\b(accept|format) \d+( |$)|\betag [0-9a-f]+( |$)`)

func (w *world) body(m message.Message) string {
	if len(m.Payload) == 0 {
		return ""
	}
	format, err := m.Options.ContentFormat()
	switch {
	case err != nil:
		return "(" + w.names(string(m.Payload)) + ")"
	case format == message.AppJSON:
		return w.renderJSON(m.Payload) + " (JSON)"
	case format == message.AppOcfCbor, format == message.AppCBOR:
		var v any
		if err := decodeCBOR(m.Payload, &v); err != nil {
			return "(not CBOR)"
		}
		s := w.render("", v)
		if format == message.AppCBOR {
			s += " (CBOR)"
		}
		return s
	}
	return fmt.Sprintf("(%d) %s", format, w.names(string(m.Payload)))
}

func decodeCBOR(b []byte, v any) error { return cbor.Unmarshal(b, v) }

func (w *world) appLine(ctx context.Context, owner, rest string) (string, error) {
	method, rest, _ := strings.Cut(rest, " ")
	switch method {
	case "says", "hears", "hangs":
		return w.socketLine(ctx, owner, method, rest)
	case "calls":
		return w.callLine(ctx, owner, rest)
	case "streams":
		return w.streamLine(ctx, owner, rest)
	case "begins":
		if w.begun[owner] != nil {
			return "", fmt.Errorf("%s has begun a request already", owner)
		}
		method, rest, _ = strings.Cut(rest, " ")
		req, err := w.request(w.t.Context(), owner, method, rest)
		if err != nil {
			return "", err
		}
		answer := make(chan appAnswer, 1)
		w.begun[owner] = answer
		client := checked(w.t)
		go func() { answer <- ask(client, req) }()
		return "", nil
	case "gets":
		answer := w.begun[owner]
		delete(w.begun, owner)
		select {
		case a := <-answer:
			return w.told(a)
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	req, err := w.request(ctx, owner, method, rest)
	if err != nil {
		return "", err
	}
	return w.told(ask(checked(w.t), req))
}

func (w *world) request(ctx context.Context, owner, method, rest string) (*http.Request, error) {
	target, body, _ := strings.Cut(strings.TrimSpace(rest), " ")
	token, err := w.token(ctx, owner)
	if err != nil {
		return nil, err
	}
	target = strings.ReplaceAll(target, "OCSP", url.PathEscape(base64.StdEncoding.EncodeToString(w.question)))
	if body == "OCSP" {
		body = string(w.question)
	} else {
		body = w.csrs(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, w.start().HTTP+w.ids(target), strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return req, nil
}

// appAnswer is what the HTTP API said.
type appAnswer struct {
	req    *http.Request
	status int
	body   []byte
	err    error
}

func ask(client *http.Client, req *http.Request) (a appAnswer) {
	res, err := client.Do(req)
	if err != nil {
		return appAnswer{err: err}
	}
	defer res.Body.Close()
	a.req, a.status = req, res.StatusCode
	a.body, a.err = io.ReadAll(io.LimitReader(res.Body, 1<<20))
	return a
}

func (w *world) told(a appAnswer) (string, error) {
	if a.err != nil {
		return "", a.err
	}
	if a.status < 300 {
		d, err := description()
		if err != nil {
			return "", err
		}
		reached.Store(d.Name(a.req.Method, a.req.URL.EscapedPath()), true)
	}
	if l, err := x509.ParseRevocationList(a.body); err == nil {
		return fmt.Sprintf("%d with %d revoked", a.status, len(l.RevokedCertificateEntries)), nil
	}
	switch r, err := ocsp.ParseResponse(a.body, nil); {
	case errors.As(err, new(ocsp.ResponseError)):
		return fmt.Sprintf("%d (%v)", a.status, err), nil
	case err == nil:
		return fmt.Sprintf("%d %s", a.status, []string{ocsp.Good: "good", ocsp.Revoked: "revoked", ocsp.Unknown: "unknown"}[r.Status]), nil
	}
	var parts []string
	for line := range bytes.Lines(a.body) {
		if line = bytes.TrimSpace(line); len(line) > 0 {
			parts = append(parts, w.answered(line))
		}
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", a.status, strings.Join(parts, " "))), nil
}

// socket is a WebSocket of an application.
type socket struct {
	conn *websocket.Conn
	last string // resume token
}

func (w *world) socketLine(ctx context.Context, owner, verb, rest string) (string, error) {
	h := w.start()
	s := w.sockets[owner]
	if s == nil {
		s = &socket{}
		w.sockets[owner] = s
	}
	if verb == "hangs" {
		_ = s.conn.Close(websocket.StatusNormalClosure, "") // the hub may have been faster
		s.conn = nil
		return "", nil
	}
	if s.conn == nil {
		token, err := w.token(ctx, owner)
		if err != nil {
			return "", err
		}
		conn, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(h.HTTP, "http")+"/api/v1/ws/events", &websocket.DialOptions{Subprotocols: []string{"Bearer", token}})
		if err != nil {
			return "", err
		}
		w.t.Cleanup(func() { _ = conn.CloseNow() })
		s.conn = conn
		reached.Store("GET /api/v1/ws/events", true)
	}
	if verb == "says" {
		v, err := w.value(strings.ReplaceAll(rest, "RESUME", s.last))
		if err != nil {
			return "", err
		}
		b, err := json.Marshal(v)
		if err != nil {
			return "", err
		}
		return "", s.conn.Write(ctx, websocket.MessageText, b)
	}
	_, b, err := s.conn.Read(ctx)
	if code := websocket.CloseStatus(err); code != -1 {
		return fmt.Sprintf("closed %d", code), nil
	}
	if err != nil {
		return "", err
	}
	var m struct{ Result struct{ ResumeToken string } }
	if err := json.Unmarshal(b, &m); err != nil {
		return "", err
	}
	s.last = m.Result.ResumeToken
	d, err := description()
	if err != nil {
		return "", err
	}
	if err := d.CheckMessage("/api/v1/ws/events", b); err != nil {
		w.t.Errorf("%s: not as the description says: %v", b, err)
	}
	return w.renderJSON(b), nil
}

// token is what the caller named who shows. It is asked for once.
func (w *world) token(ctx context.Context, who string) (string, error) {
	if d := w.devices[who]; d != nil {
		return d.access, nil
	}
	if w.tokens[who] == "" && who != "nobody" {
		owner, lasts, short := strings.Cut(who, "-for-")
		var ttl time.Duration
		if short {
			var err error
			if ttl, err = time.ParseDuration(lasts); err != nil {
				return "", err
			}
		}
		tok, err := w.hub.Control.Token(ctx, bundle.TokenRequest{Owner: owner, TTL: ttl})
		if err != nil {
			return "", err
		}
		w.tokens[who] = tok.AccessToken
	}
	return w.tokens[who], nil
}

func (w *world) renderJSON(b []byte) string {
	var v any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return "(" + string(b) + ")"
	}
	return w.render("", v)
}

// value reads a body as a YAML flow mapping, with names and words replaced.
func (w *world) value(s string) (any, error) {
	var v any
	if err := yaml.Unmarshal([]byte(w.ids(s)), &v); err != nil {
		return nil, fmt.Errorf("read %q: %w", s, err)
	}
	return v, nil
}

// ids replaces words that stand for values of this run.
func (w *world) ids(s string) string {
	if strings.Contains(s, "APP-TOKEN") {
		s = strings.ReplaceAll(s, "APP-TOKEN", w.start().TokenOf(w.t, "admin"))
	}
	s = strings.NewReplacer("CORRELATION", w.correlation, "NOTED", w.noted).Replace(s)
	for name, d := range w.devices {
		if strings.Contains(s, "CODE-OF-"+name) {
			s = strings.ReplaceAll(s, "CODE-OF-"+name, d.onboard.Code)
		}
		s = strings.ReplaceAll(s, "TOKEN-OF-"+name, d.access)
		s = strings.ReplaceAll(s, "REFRESH-OF-"+name, d.refresh)
		s = regexp.MustCompile(`\b`+name+`\b`).ReplaceAllString(s, d.id)
	}
	return strings.NewReplacer("ISSUER", w.issuer, "THING", w.thing).Replace(s)
}

// csrs makes the requests for certificates that a body names, and what else in it stands for values of this run.
func (w *world) csrs(body string) string {
	body = strings.ReplaceAll(body, "THING", w.thing)
	if strings.Contains(body, "MAKER-CA") {
		body = strings.ReplaceAll(body, "MAKER-CA", "data:;base64,"+base64.StdEncoding.EncodeToString([]byte(w.factory().pem)))
	}
	body = idWord.ReplaceAllStringFunc(body, func(word string) string { return w.device(strings.TrimPrefix(word, "ID-OF-")).id })
	return csrWord.ReplaceAllStringFunc(body, func(word string) string {
		csr, _ := csrFor(w.t, w.ids(strings.TrimPrefix(word, "CSR-OF-")))
		return base64.StdEncoding.EncodeToString(csr)
	})
}

func (w *world) names(s string) string {
	for name, d := range w.devices {
		s = strings.ReplaceAll(s, d.id, name)
	}
	if w.hub != nil {
		s = strings.ReplaceAll(s, w.hub.ID, "HUB")
		s = strings.ReplaceAll(s, w.hub.HTTP, "HUB-HTTP") // before its port, which is also that of CoAP over WebSocket
		at := w.hub.CoAPS
		switch {
		case w.over.name == "ws":
			at = strings.TrimPrefix(w.hub.Endpoints.CoAPWS, "coap+ws://")
		case !w.over.secure:
			at = w.hub.CoAPPlain
		}
		s = strings.ReplaceAll(s, at, "HUB-ADDRESS")
	}
	return uuidWord.ReplaceAllString(s, "UUID")
}

var (
	uuidWord = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`)
	csrWord  = regexp.MustCompile(`CSR-OF-[-a-z0-9]+`)
	idWord   = regexp.MustCompile(`ID-OF-[a-z0-9]+`)
	hexWord  = regexp.MustCompile(`^[0-9a-f]{30,32}$`)
	timeWord = regexp.MustCompile(`^\d{4}-\d\d-\d\dT`)
	plain    = regexp.MustCompile(`^[A-Za-z_/.][-A-Za-z0-9_./:+]*$`)
)

// changing are members whose values differ from run to run.
var changing = map[string]string{
	"accesstoken": "TOKEN", "refreshtoken": "TOKEN", "expiresin": "SECONDS", "connectionId": "CONNECTION",
	"timestamp": "TIME", "connectedAt": "TIME", "syncingAt": "TIME", "inSyncAt": "TIME", "forceSynchronizationAt": "TIME",
	"serviceId": "GATEWAY", "sequence": "N", "currentTime": "TIME", "etag": "ETAG", "validUntil": "TIME", "connection.id": "CONNECTION",
	"resumeToken": "RESUME", "certificateAuthorities": "CERTIFICATES", "request": "REQUEST", "remote": "ADDRESS", "number": "N",
	"cursor": "CURSOR", "coapGateway": "GATEWAY-ADDRESS", "certificate": "CERTIFICATE", "certificatePem": "CERTIFICATE", "serial": "SERIAL",
	"certificateChain": "CERTIFICATES", "identityCertificatePem": "CERTIFICATE", "proof": "PROOF", "token": "TOKEN", "expirationDate": "TIME",
	"changeDate": "TIME", "acceptanceDate": "TIME", "gateways": "GATEWAYS", "cis": "GATEWAY-ADDRESS", "x.org.iotivity.servers": "GATEWAYS", "at": "CODE",
	"creationDate": "TIME", "createdAt": "TIME", "key": "KEY", "date": "TIME", "validUntilDate": "TIME", "revokedDate": "TIME",
}

// render writes a decoded body as a YAML flow value with sorted members.
func (w *world) render(key string, v any) string {
	if word := changing[key]; word != "" && v != nil && v != "" && v != "0" && v != json.Number("0") {
		return word
	}
	switch v := v.(type) {
	case map[string]any:
		var parts []string
		for _, k := range slices.Sorted(maps.Keys(v)) {
			name := k
			if key == "connection" && k == "id" {
				name = "connection.id"
			}
			parts = append(parts, k+": "+w.render(name, v[k]))
		}
		return "{" + strings.Join(parts, ", ") + "}"
	case map[any]any:
		m := map[string]any{}
		for k, e := range v {
			m[fmt.Sprint(k)] = e
		}
		return w.render(key, m)
	case []any:
		var parts []string
		for _, e := range v {
			parts = append(parts, w.render("", e))
		}
		if key == "" || key == "links" {
			slices.Sort(parts)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case []byte:
		return fmt.Sprintf("h'%x'", v)
	case string:
		s := w.names(v)
		switch {
		case hexWord.MatchString(s):
			return "SERIAL"
		case timeWord.MatchString(s):
			return "TIME"
		case plain.MatchString(s):
			return s
		}
		return strconv.Quote(s)
	case nil:
		return "null"
	}
	return fmt.Sprint(v)
}

func hexBytes(s string) ([]byte, error) {
	var out []byte
	_, err := fmt.Sscanf(strings.ReplaceAll(s, " ", ""), "%x", &out)
	return out, err
}
