package coapgateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// pipes is a listener without a network: time in a bubble goes on while its connections wait.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	if c, ok := <-p; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (p pipes) Close() error   { return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{} }

// patient is an end of a pipe that waits as long as it takes, and then ends as a stream does.
type patient struct{ net.Conn }

func (patient) SetReadDeadline(time.Time) error { return nil }

func (p patient) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

// quiet is a device some of whose resources do not answer; everything else it answers at once, but for a POST, which it answers
// when it is told to.
type quiet struct {
	send func(message.Message)

	mu     sync.Mutex // guards all below
	silent map[string]bool
	asked  map[string][]time.Duration // when each resource was asked for, since the beginning
	serial bool                       // while a POST is open nothing else is looked at
	posts  []string                   // their paths, in order
	open   map[string]message.Token   // those that have no answer
	line   []message.Message          // what is looked at later
	tokens map[string]message.Token   // of the observations
}

// answer answers the POST to a resource, and then what came meanwhile.
func (q *quiet) answer(path string) {
	q.mu.Lock()
	m := message.Message{Code: codes.Changed, Token: q.open[path]}
	delete(q.open, path)
	line := q.line
	q.line = nil
	q.mu.Unlock()
	q.send(m)
	for _, m := range line {
		q.hear(m, 0)
	}
	synctest.Wait()
}

// asking returns the paths of the POSTs that came, and how many of them are open.
func (q *quiet) asking() (posts []string, open int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.posts), len(q.open)
}

// answers makes a resource answer from now on.
func (q *quiet) answers(path string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.silent, path)
}

// times is when a resource was asked for.
func (q *quiet) times(path string) []time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.asked[path])
}

// serve answers the hub until the connection ends.
func (q *quiet) serve(r *raw, begin time.Time) {
	for {
		m, ok := r.read()
		if !ok {
			return
		}
		q.hear(m, time.Since(begin).Truncate(time.Second))
	}
}

// hear answers one message.
func (q *quiet) hear(m message.Message, at time.Duration) {
	answer := message.Message{Token: m.Token}
	path, _ := m.Options.Path()
	q.mu.Lock()
	later := q.serial && len(q.open) > 0 && m.Code != codes.Ping && m.Code>>5 == 0
	if later {
		q.line = append(q.line, m)
	}
	q.mu.Unlock()
	switch {
	case later:
		return
	case m.Code == codes.Ping:
		answer.Code = codes.Pong
	case m.Code == codes.POST:
		q.mu.Lock()
		defer q.mu.Unlock()
		q.posts = append(q.posts, path)
		q.open[path] = m.Token
		return
	case m.Code == codes.GET:
		observe, err := m.Options.Observe()
		if err == nil && observe == 1 {
			return // a deregistration, which is worth no answer here
		}
		q.mu.Lock()
		q.asked[path] = append(q.asked[path], at)
		if err == nil {
			if q.tokens == nil {
				q.tokens = map[string]message.Token{}
			}
			q.tokens[path] = slices.Clone(m.Token)
		}
		silent := q.silent[path]
		q.mu.Unlock()
		answer.Code = codes.NotFound
		if path != "/oic/res" {
			answer.Code, answer.Payload = codes.Content, []byte(path)
			if err == nil {
				answer.Options = coap.AddOption(nil, message.Observe, []byte{2})
			}
		}
		if silent {
			return
		}
	default:
		return
	}
	q.send(answer)
}

// silence runs a gateway and a device with the resources /a, which answers, and /x and /y, which do not yet, in a bubble; most is how many
// resources of a session are observed. prepare may be nil.
func silence(t *testing.T, most int, prepare func(*hall, *quiet), test func(t *testing.T, w *world, q *quiet)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := &hall{t: t, w: w}
		h.published("/a*", "/x*", "/y")
		w.own(lampID, "alice")
		w.grant("token", hub.Claims{Expiry: time.Now().Add(24 * time.Hour)})
		cfg := Default()
		cfg.API.CoAP.Address, cfg.API.CoAP.PlainAddress = "", "127.0.0.1:0"
		cfg.API.CoAP.MaxLinks = most
		gw, err := New(cfg, Deps{
			Directory: &w.dir, Identities: &w.ids, Verifier: &w.ver, HubID: hubID, Service: "gateway-1",
			Providers: []NamedProvider{{Name: "main", Provider: &w.prov}},
		}, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ln, ended := make(pipes, 1), make(chan error, 1)
		go func() { ended <- gw.engine.ServeTCP(ctx, ln, nil) }()
		here, there := net.Pipe()
		ln <- there
		r := &raw{t: t, conn: patient{here}}
		q := &quiet{silent: map[string]bool{"/x": true, "/y": true}, asked: map[string][]time.Duration{}, open: map[string]message.Token{}}
		q.send = func(m message.Message) {
			if _, err := here.Write(r.encode(m)); err != nil && !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("send: %v", err)
			}
		}
		if prepare != nil {
			prepare(h, q)
		}
		served := make(chan struct{})
		begin := time.Now()
		go func() { defer close(served); q.serve(r, begin) }()
		q.send(message.Message{Code: codes.CSM})
		q.send(post("/oic/sec/session", 1, cborOf(t, h.device(lampID).session(nil))))
		defer func() {
			_ = here.Close()
			<-served
			synctest.Wait()
			if w.to[lampID] != nil {
				t.Error("the session has not ended")
			}
			cancel()
			close(ln)
			if err := <-ended; err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, net.ErrClosed) {
				t.Errorf("the engine ended with %v", err)
			}
		}()
		test(t, w, q)
	})
}

func unpublish(href hub.Href) message.Message {
	m := request(codes.DELETE, "/oic/rd", 2, nil)
	m.Options = coap.AddOption(m.Options, message.URIQuery, []byte("di="+string(lampID)))
	m.Options = coap.AddOption(m.Options, message.URIQuery, fmt.Appendf(nil, "ins=%d", href.InstanceID()))
	return m
}

// after lets the bubble's time pass, then everything that it brings.
func after(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// What did not answer is asked again, ever more rarely; when the last of it has answered the twin is in sync, and observed.
func TestSilentResourceIsAskedAgain(t *testing.T) {
	t.Parallel()
	silence(t, 10, nil, func(t *testing.T, w *world, q *quiet) {
		after(130 * time.Second)
		if w.count("twin 2") != 1 || w.count("twin 3") != 0 || w.twin[lampID]["/a"].Content.Data == nil {
			t.Fatalf("after the first round: %q", w.log)
		}
		// 20 s is what a request waits: /x is asked at 0 s and 1 min after 20 s, /y behind it.
		if got, want := q.times("/x"), []time.Duration{0, 80 * time.Second}; !slices.Equal(got, want) {
			t.Errorf("/x was asked for at %v, want %v", got, want)
		}
		q.answers("/y")
		after(6 * time.Minute)
		if len(w.twin[lampID]["/y"].Content.Data) == 0 || w.count("twin 3") != 0 {
			t.Errorf("with one still missing: %q", w.log)
		}
		after(2 * time.Hour)
		// 1, 5, 30, 30, … min after the last answer was given up.
		want := []time.Duration{0, 80, 400, 2220, 4040, 5860, 7680}
		for i := range want {
			want[i] *= time.Second
		}
		if got := q.times("/x"); !slices.Equal(got, want) {
			t.Errorf("/x was asked for at %v, want %v", got, want)
		}
		q.answers("/x")
		after(31 * time.Minute)
		if w.count("twin 3") != 1 || w.count("twin 2") != 1 || string(w.twin[lampID]["/x"].Content.Data) != "/x" {
			t.Fatalf("when all answered: %q", w.log)
		}
		n, a := len(q.times("/x")), len(q.times("/a"))
		after(3 * time.Hour)
		if len(q.times("/x")) != n || a != 1 || len(q.times("/a")) != 1 || len(q.times("/y")) != 3 {
			t.Errorf("asked for what had answered: /a at %v, /x at %v, /y at %v", q.times("/a"), q.times("/x"), q.times("/y"))
		}
	})
}

// Nothing is asked for that the device unpublished, and what it leaves is in sync.
func TestSilentResourceIsUnpublished(t *testing.T) {
	t.Parallel()
	silence(t, 10, nil, func(t *testing.T, w *world, q *quiet) {
		q.answers("/y")
		after(50 * time.Second) // before the second question
		q.send(unpublish("/x"))
		after(time.Hour)
		if len(q.times("/x")) != 1 || w.count("unpublished /x") != 1 || w.count("twin 3") != 1 {
			t.Errorf("/x was asked for at %v; %q", q.times("/x"), w.log)
		}
	})
}

// A session that observes all it may leaves what is missing alone, until there is room.
func TestSilentResourceOfAFullSession(t *testing.T) {
	t.Parallel()
	silence(t, 2, nil, func(t *testing.T, w *world, q *quiet) {
		q.answers("/y")
		after(50 * time.Second)
		q.send(post("/oic/rd", 3, cborOf(t, body{"di": string(lampID), "ttl": 0, "links": []body{{"href": "/y", "p": body{"bm": 3}}}})))
		after(3 * time.Hour)
		q.answers("/x")
		if len(q.times("/x")) != 1 || len(q.times("/y")) != 1 || w.count("twin 3") != 0 {
			t.Fatalf("/x was asked for at %v, /y at %v; %q", q.times("/x"), q.times("/y"), w.log)
		}
		q.send(unpublish("/a"))
		after(31 * time.Minute)
		if len(q.times("/x")) != 2 || w.count("twin 3") != 1 {
			t.Errorf("/x was asked for at %v; %q", q.times("/x"), w.log)
		}
	})
}
