package bus

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sync/semaphore"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus/bustest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const hubID = "00000000-0000-4000-8000-00000000000b"

func connect(t *testing.T, cfg Config, build string) *Bus {
	t.Helper()
	b, err := Connect(cfg, hubID, build, t.Name(), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// serve runs s until the test or stop ends it.
func serve(t *testing.T, s *Server) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, over := make(chan struct{}), make(chan error, 1)
	go func() { over <- s.Run(ctx, func() { close(ready) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-over; err != nil {
			t.Errorf("the server ends with %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		t.Fatal("the server does not come up")
	}
	return stop
}

type text struct{ Text []byte }

const echo = Method[text, text]("echo")

func pair(t *testing.T) (ask, answer *Bus) {
	url := bustest.Server(t, nil).ClientURL()
	return connect(t, Config{URLs: []string{url}}, "v1"), connect(t, Config{URLs: []string{url}}, "v1")
}

// Questions and answers of any size come through whole, those that fit into one message and those that do not.
func TestSizes(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default(), "echo")
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	serve(t, s)
	for _, n := range []int{0, 1, maxPart - 100, maxPart, maxPart + 1, 3*maxPart + 7, 10 << 20} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			body := make([]byte, n)
			_, _ = rand.Read(body)
			got, err := echo.Call(t.Context(), ask, "echo", text{body})
			if err != nil || !bytes.Equal(got.Text, body) {
				t.Errorf("got %d bytes, %v", len(got.Text), err)
			}
		})
	}
	if _, err := echo.Call(t.Context(), ask, "echo", text{make([]byte, maxQuestion)}); !hub.IsKind(err, hub.TooLarge) {
		t.Errorf("a question over the limit: %v", err)
	}
	if n := len(s.talks); n != 0 {
		t.Errorf("%d talks are left", n)
	}
}

// Many talk at the same time, each gets its own answer, and of several servers each question has one.
func TestManyAtOnce(t *testing.T) {
	ask, answer := pair(t)
	var asked atomic.Int64
	for range 3 {
		s := answer.Server(true, slog.Default(), "echo")
		Handle(s, echo, func(_ context.Context, q text) (text, error) { asked.Add(1); return q, nil })
		serve(t, s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var all sync.WaitGroup
	for i := range 40 {
		all.Go(func() {
			body := bytes.Repeat([]byte{byte(i)}, i*20_000)
			if got, err := echo.Call(ctx, ask, "echo", text{body}); err != nil || !bytes.Equal(got.Text, body) {
				t.Errorf("%d: got %d bytes, %v", i, len(got.Text), err)
			}
		})
	}
	all.Wait()
	if n := asked.Load(); n != 40 {
		t.Errorf("40 questions were answered %d times", n)
	}
}

// An error keeps its kind, code, text and time to wait; what the part itself knows of it stays there.
func TestErrorsCross(t *testing.T) {
	ask, answer := pair(t)
	var logged bytes.Buffer
	s := answer.Server(true, slog.New(slog.NewTextHandler(&logged, nil)), "fail")
	const fail = Method[hub.Kind, struct{}]("fail")
	Handle(s, fail, func(_ context.Context, k hub.Kind) (struct{}, error) {
		return struct{}{}, fmt.Errorf("inside: %w", &hub.Error{Kind: k, Code: "the-code", Text: "the text", RetryAfter: time.Minute, Err: errors.New("secret")})
	})
	const panics = Method[struct{}, struct{}]("panics")
	Handle(s, panics, func(context.Context, struct{}) (struct{}, error) { panic("oh no") })
	stop := serve(t, s)
	for _, k := range hub.Kinds() {
		_, err := fail.Call(t.Context(), ask, "fail", k)
		var e *hub.Error
		if !errors.As(err, &e) || e.Kind != k || e.Code != "the-code" || e.Text != "the text" || e.RetryAfter != time.Minute || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: got %#v", k, e)
		}
	}
	if _, err := panics.Call(t.Context(), ask, "fail", struct{}{}); !hub.IsKind(err, hub.Internal) {
		t.Errorf("a panic: %v", err)
	}
	const unknown = Method[struct{}, struct{}]("unknown")
	if _, err := unknown.Call(t.Context(), ask, "fail", struct{}{}); !hub.IsKind(err, hub.Unsupported) {
		t.Errorf("a method that is not there: %v", err)
	}
	stop()
	if s := logged.String(); !strings.Contains(s, "oh no") || !strings.Contains(s, "secret") {
		t.Errorf("the log says %s", s)
	}
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if got, _ := hub.Public(err); !hub.IsKind(err, hub.Unavailable) || got != code {
		t.Errorf("got %v, want %s", err, code)
	}
}

// Nobody there, no answer, and no bus: a caller is told at once what can be known at once, and at its deadline what can not.
func TestNoAnswer(t *testing.T) {
	srv := bustest.Server(t, nil)
	ask := connect(t, Config{URLs: []string{srv.ClientURL()}}, "v1")
	_, err := echo.Call(t.Context(), ask, "echo", text{})
	wantCode(t, err, "part-away")

	hang := ask.Server(true, slog.New(slog.DiscardHandler), "hang")
	over := make(chan error, 1)
	Handle(hang, echo, func(ctx context.Context, _ text) (text, error) {
		<-ctx.Done()
		over <- ctx.Err()
		return text{}, ctx.Err()
	})
	other := connect(t, Config{URLs: []string{srv.ClientURL()}}, "v1")
	hang.bus = other
	serve(t, hang)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = echo.Call(ctx, ask, "hang", text{})
	wantCode(t, err, "part-silent")
	if err := <-over; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the one who was asked works on: %v", err)
	}

	srv.Shutdown()
	srv.WaitForShutdown()
	await(t, "the bus to be away", func() bool { return ask.Health(t.Context()) != nil })
	_, err = echo.Call(t.Context(), ask, "echo", text{})
	wantCode(t, err, "bus-away")
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

// Parts start in any order, and a bus that comes back is used again, by those who ask and by those who answer.
func TestTheBusComesLaterAndAgain(t *testing.T) {
	port := bustest.Port(t)
	cfg := Config{URLs: []string{fmt.Sprintf("nats://127.0.0.1:%d", port)}}
	ask, answer := connect(t, cfg, "v1"), connect(t, cfg, "v1")
	s := answer.Server(true, slog.New(slog.DiscardHandler), "echo")
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	serve(t, s)
	_, err := echo.Call(t.Context(), ask, "echo", text{})
	wantCode(t, err, "bus-away")
	for range 2 {
		again := bustest.Server(t, func(o *server.Options) { o.Port = port })
		await(t, "an answer", func() bool { _, err := echo.Call(t.Context(), ask, "echo", text{}); return err == nil })
		again.Shutdown()
		again.WaitForShutdown()
		await(t, "the bus to be away", func() bool { return ask.Health(t.Context()) != nil })
	}
}

// Who ends has answered what it was asked before, and takes nothing more.
func TestLeaving(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default(), "echo")
	in, out := make(chan struct{}), make(chan struct{})
	Handle(s, echo, func(_ context.Context, q text) (text, error) { close(in); <-out; return q, nil })
	stop := serve(t, s)
	got := make(chan error, 1)
	go func() { _, err := echo.Call(t.Context(), ask, "echo", text{}); got <- err }()
	<-in
	left := make(chan struct{})
	go func() { stop(); close(left) }()
	await(t, "the server to take nothing more", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := echo.Call(ctx, ask, "echo", text{})
		code, _ := hub.Public(err)
		return code == "part-away"
	})
	select {
	case <-left:
		t.Fatal("it left and had not answered")
	default:
	}
	close(out)
	if err := <-got; err != nil {
		t.Errorf("what was asked before: %v", err)
	}
	<-left
}

// More than can be worked on is refused, and told to come again.
func TestOverload(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default(), "echo")
	s.slots = make(chan struct{}, 2)
	in, out := make(chan struct{}, 2), make(chan struct{})
	Handle(s, echo, func(_ context.Context, q text) (text, error) { in <- struct{}{}; <-out; return q, nil })
	serve(t, s)
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			if _, err := echo.Call(t.Context(), ask, "echo", text{}); err != nil {
				t.Error(err)
			}
		})
	}
	<-in
	<-in
	_, err := echo.Call(t.Context(), ask, "echo", text{})
	wantCode(t, err, "part-busy")
	close(out)
	all.Wait()
}

// bare is a server without a bus.
func bare() *Server {
	return &Server{
		bus: &Bus{metrics: newMetrics(prometheus.NewRegistry())}, methods: map[string]handler{}, talks: map[string]*talk{},
		room: semaphore.NewWeighted(talking), log: slog.New(slog.DiscardHandler),
	}
}

// Talks are bounded, and end when nobody goes on with them. What was done waits for room for its answer, and is never said to be refused.
func TestTalksAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := bare()
		const room = 4 * maxPart
		s.room = semaphore.NewWeighted(room)
		s.methods["long"] = func(context.Context, []byte) ([]byte, error) { return make([]byte, 3*maxPart), nil }
		ask := func(within time.Duration) answer {
			return s.turn(t.Context(), &talk{q: question{Version: version, Method: "long", Within: within}}, nil, false)
		}
		first := ask(time.Second)
		if first.Failure != nil || len(first.Part) != maxPart || first.Next == "" {
			t.Fatalf("got %d bytes, %+v", len(first.Part), first.Failure)
		}
		if a := ask(time.Second); a.Failure == nil || a.Failure.Code != "part-silent" {
			t.Errorf("an answer without room: %+v", a.Failure)
		}
		if a := s.turn(t.Context(), &talk{}, make([]byte, 2*maxPart), true); a.Failure == nil || a.Failure.Code != "part-busy" {
			t.Errorf("a question without room: %+v", a.Failure)
		}
		second := make(chan answer, 1)
		go func() { second <- ask(5 * time.Second) }()
		synctest.Wait()
		last := s.part(s.claim(first.Next))
		if len(last.Part) != maxPart || last.Next == "" || last.Next == first.Next || s.claim(first.Next) != nil {
			t.Errorf("the second part: %d bytes", len(last.Part))
		}
		if last = s.part(s.claim(last.Next)); last.Next != "" {
			t.Error("there is a fourth part")
		}
		if a := <-second; a.Failure != nil || len(a.Part) != maxPart {
			t.Errorf("an answer that waited for room: %+v", a.Failure)
		}
		time.Sleep(talkTime + time.Second)
		synctest.Wait()
		if len(s.talks) != 0 || !s.room.TryAcquire(room) {
			t.Errorf("%d talks are left", len(s.talks))
		}
		s.room = semaphore.NewWeighted(talking)
		asking := &talk{}
		for i := 0; ; i++ {
			a := s.turn(t.Context(), asking, make([]byte, maxPart), true)
			if (a.Failure != nil) != (i == maxQuestion/maxPart) {
				t.Fatalf("part %d of a question: %+v", i, a.Failure)
			}
			if a.Failure != nil {
				if a.Failure.Kind != "too-large" || !s.room.TryAcquire(talking) {
					t.Errorf("a question that does not end: %+v", a.Failure)
				}
				break
			}
			s.claim(a.Next)
		}
	})
}

// When the rest of an answer is lost it is not said that nothing was done.
func TestLostInTheMiddle(t *testing.T) {
	ask, answers := pair(t)
	_, err := answers.conn.Subscribe(answers.prefix+"a", func(m *nats.Msg) {
		var q question
		_ = decoding.Unmarshal(m.Data, &q)
		a := answer{Version: version, Part: []byte("x"), Next: answers.prefix + "inbox.nobody"}
		if q.Version == batchVersion {
			a = answer{Version: batchVersion, Batch: []outcome{{Part: a.Part, Next: a.Next}}}
		}
		_ = m.Respond(must(encoding.Marshal(a)))
	})
	if err == nil {
		err = answers.conn.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	_, err = echo.Call(t.Context(), ask, "a", text{})
	wantCode(t, err, "part-silent")
	_, err = echo.Join(t.Context(), ask.NewBatches(), "a", "a", text{})
	wantCode(t, err, "part-silent")
}

// Two versions that cannot talk say so, and the log names both.
func TestVersions(t *testing.T) {
	srv := bustest.Server(t, nil)
	var logged bytes.Buffer
	answer := connect(t, Config{URLs: []string{srv.ClientURL()}}, "v1.2.3")
	s := answer.Server(true, slog.New(slog.NewTextHandler(&logged, nil)), "echo")
	stop := serve(t, s)
	conn, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	other := must(encoding.Marshal(question{Version: 9, Build: "v9.9.9", Method: "echo"}))
	msg, err := conn.Request(answer.prefix+"echo", other, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	var a frameOfOther
	if err := decoding.Unmarshal(msg.Data, &a); err != nil || a.Failure == nil || a.Failure.Code != "part-version" || a.Build != "v1.2.3" {
		t.Errorf("got %+v, %v", a, err)
	}
	if _, err := conn.Request(answer.prefix+"echo", []byte("no CBOR at all"), 10*time.Second); err != nil {
		t.Errorf("a question that is none is not answered: %v", err)
	}
	stop()
	if s := logged.String(); !strings.Contains(s, "v9.9.9") || !strings.Contains(s, "v1.2.3") {
		t.Errorf("the log says %s", s)
	}

	if _, err := conn.Subscribe(answer.prefix+"old", func(m *nats.Msg) { _ = m.Respond(must(encoding.Marshal(frameOfOther{Version: 9, Build: "v9.9.9"}))) }); err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	_, err = echo.Call(t.Context(), answer, "old", text{})
	wantCode(t, err, "part-version")
	if !strings.Contains(err.Error(), "v9.9.9") || !strings.Contains(err.Error(), "v1.2.3") {
		t.Errorf("got %v", err)
	}
}

// frameOfOther is an answer; the bus of the test has its name.
type frameOfOther = answer

// The connection is kept by TLS, and proves itself by NKEY or certificate.
func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	kp, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	seed, _ := kp.Seed()
	public, _ := kp.PublicKey()
	good, bad := filepath.Join(dir, "good.nk"), filepath.Join(dir, "bad.nk")
	stranger, _ := nkeys.CreateUser()
	strange, _ := stranger.Seed()
	for path, data := range map[string][]byte{good: seed, bad: strange} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ca, cert, key := certificates(t, dir)
	pool := x509.NewCertPool()
	caPEM, _ := os.ReadFile(ca)
	pool.AppendCertsFromPEM(caPEM)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	srv := bustest.Server(t, func(o *server.Options) {
		o.Nkeys = []*server.NkeyUser{{Nkey: public}}
		o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
		o.TLSTimeout = 5
	})
	url := strings.Replace(srv.ClientURL(), "nats://", "tls://", 1)
	full := Config{URLs: []string{url}, NKeyFile: good, TLS: TLSConfig{CAFiles: []string{ca}, CertFile: cert, KeyFile: key}}
	b := connect(t, full, "v1")
	await(t, "the bus", func() bool { return b.Health(t.Context()) == nil })
	for name, change := range map[string]func(*Config){
		"another key":    func(c *Config) { c.NKeyFile = bad },
		"no certificate": func(c *Config) { c.TLS.CertFile, c.TLS.KeyFile = "", "" },
		"no CA":          func(c *Config) { c.TLS.CAFiles = nil },
	} {
		cfg := full
		change(&cfg)
		refused := connect(t, cfg, "v1")
		await(t, "a refusal of "+name, func() bool { return refused.conn.LastError() != nil })
		if err := refused.Health(t.Context()); err == nil {
			t.Errorf("%s: connected", name)
		}
	}
	if _, err := Connect(Config{URLs: []string{url}, NKeyFile: filepath.Join(dir, "none")}, hubID, "v1", "", slog.New(slog.NewTextHandler(io.Discard, nil)), prometheus.NewRegistry()); err == nil {
		t.Error("a key file that is not there is taken")
	}
}

func TestConfig(t *testing.T) {
	for want, c := range map[string]Config{
		"":                        {URLs: []string{"nats://a:4222", "tls://b"}},
		"urls[0]: it is no":       {URLs: []string{"http://a"}},
		"urls[1]: it is no":       {URLs: []string{"nats://a", "b:4222"}},
		"urls[0]: credentials go": {URLs: []string{"nats://me:secret@a"}},
		"nkeyFile: ":              {CredentialsFile: "a", NKeyFile: "b"},
		"tls: certFile":           {TLS: TLSConfig{CertFile: "a"}},
	} {
		err := errors.Join(c.Validate()...)
		switch {
		case want == "" && err != nil, want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)):
			t.Errorf("want %q, got %v", want, err)
		case err != nil && strings.Contains(err.Error(), "secret"):
			t.Errorf("%v tells the password", err)
		}
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(must(encoding.Marshal(question{Version: version, Method: "echo", Within: time.Second, Part: []byte{0xa0}})))
	f.Add(must(encoding.Marshal(answer{Version: version, Next: "x", Failure: &failure{Kind: "denied"}})))
	f.Fuzz(func(t *testing.T, data []byte) {
		var a answer
		if err := a.decode(data, "v1"); err == nil && a.Failure != nil {
			if err := a.Failure.err("fuzz"); err == nil {
				t.Error("a failure is no error")
			}
		}
		s := bare()
		Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
		var q question
		if decoding.Unmarshal(data, &q) == nil {
			s.turn(t.Context(), &talk{q: q}, q.Part, q.More)
		}
		for name := range s.talks {
			s.claim(name)
		}
	})
}

// A note reaches all who listen to its subject under its name, the sender too, and nobody after stop.
func TestNotes(t *testing.T) {
	one, two := pair(t)
	const word, other = Note[text]("word"), Note[text]("other")
	got := make(chan string, 10)
	listen := func(b *Bus, who, subject string) (stop func()) {
		t.Helper()
		stop, err := word.Listen(b, subject, func(v text) { got <- who + " " + string(v.Text) })
		if err != nil {
			t.Fatal(err)
		}
		if err := b.conn.Flush(); err != nil {
			t.Fatal(err)
		}
		return stop
	}
	heard := func(want ...string) {
		t.Helper()
		var all []string
		for range want {
			select {
			case s := <-got:
				all = append(all, s)
			case <-time.After(10 * time.Second):
				t.Fatalf("heard %q, want %q", all, want)
			}
		}
		slices.Sort(all)
		if !slices.Equal(all, want) {
			t.Fatalf("heard %q, want %q", all, want)
		}
	}
	say := func(n Note[text], what string) {
		t.Helper()
		if err := n.Send(one, "news.a", text{[]byte(what)}); err != nil {
			t.Fatal(err)
		}
	}
	stopOne := listen(one, "one", "news.>")
	listen(two, "two", "news.*")
	say(other, "not for them")
	say(word, "1")
	heard("one 1", "two 1")
	stopOne()
	say(word, "2")
	heard("two 2")
	if err := word.Send(one, "news.a", text{make([]byte, maxPart+1)}); err == nil {
		t.Error("a note of more than one message was sent")
	}
	two.Close()
	one.Close()
	if err := word.Send(one, "news.a", text{}); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("without a connection: %v", err)
	}
}

// A server takes subjects on and gives them up while it runs; what it was asked before is answered.
func TestSubjectsChange(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default())
	asked, goOn := make(chan struct{}), make(chan struct{})
	const slow = Method[text, text]("slow")
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	Handle(s, slow, func(_ context.Context, q text) (text, error) {
		close(asked)
		<-goOn
		return q, nil
	})
	if err := s.Serve([]string{"a", "b"}); err != nil { // before it runs
		t.Fatal(err)
	}
	stop := serve(t, s)
	expect := func(away bool, subjects ...string) {
		t.Helper()
		for _, subject := range subjects {
			within(t, func() bool { // the servers of the bus are told beside
				_, err := echo.Call(t.Context(), ask, subject, text{[]byte(subject)})
				code := ""
				if err != nil {
					code, _ = hub.Public(err)
				}
				return away == (code == "part-away")
			})
		}
	}
	expect(false, "a", "b")
	expect(true, "c")
	last := make(chan error, 1)
	go func() {
		_, err := slow.Call(t.Context(), ask, "a", text{})
		last <- err
	}()
	<-asked
	if err := s.Serve([]string{"b", "c"}); err != nil {
		t.Fatal(err)
	}
	expect(false, "b", "c")
	expect(true, "a")
	close(goOn)
	if err := <-last; err != nil {
		t.Errorf("what was asked before: %v", err)
	}
	stop()
	expect(true, "a", "b", "c")
}

// within polls until ok, for ten seconds.
func within(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it does not come to that")
		}
	}
}
