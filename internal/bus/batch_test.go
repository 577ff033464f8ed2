package bus

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus/bustest"
)

// counted is a part that asks in batches, with how many questions each of its messages to a subject had.
type counted struct {
	*Batches
	stop  func()     // counting
	mu    sync.Mutex // guards sizes
	sizes []int
}

func (c *counted) messages() []int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]int(nil), c.sizes...)
}

func batches(t *testing.T, ask *Bus, subject string) *counted {
	t.Helper()
	c := &counted{Batches: ask.NewBatches()}
	sub, err := ask.conn.Subscribe(ask.prefix+subject, func(m *nats.Msg) {
		var q question
		if err := decoding.Unmarshal(m.Data, &q); err != nil {
			t.Errorf("a message that cannot be read: %v", err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.sizes = append(c.sizes, len(q.Batch))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := ask.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	c.stop = func() {
		t.Helper()
		if err := errors.Join(sub.Unsubscribe(), ask.conn.Flush()); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// empty reports whether nothing is left of what was asked.
func (c *counted) empty() bool {
	c.Batches.mu.Lock()
	defer c.Batches.mu.Unlock()
	return len(c.lanes) == 0 && len(c.sent) == 0
}

func (c *counted) waiting(lane string) int {
	c.Batches.mu.Lock()
	defer c.Batches.mu.Unlock()
	if l := c.lanes[lane]; l != nil {
		return len(l.wait)
	}
	return 0
}

// While a message is under way the next collects, and each question has its own outcome: answers, errors with their kinds, and of what the
// server does not serve that it is away.
func TestBatches(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default(), "a", "b")
	in, out := make(chan struct{}), make(chan struct{})
	const gate, fail = Method[text, text]("gate"), Method[hub.Kind, text]("fail")
	Handle(s, gate, func(_ context.Context, q text) (text, error) { close(in); <-out; return q, nil })
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	Handle(s, fail, func(_ context.Context, k hub.Kind) (text, error) {
		return text{}, hub.NewError(k, "the-code", "the text")
	})
	stop := serve(t, s)
	c := batches(t, ask, "a")
	c.linger = time.Hour // the first answer lets the next message go
	var all sync.WaitGroup
	all.Go(func() {
		if got, err := gate.Join(t.Context(), c.Batches, "lane", "a", text{[]byte("gate")}); err != nil || string(got.Text) != "gate" {
			t.Errorf("the first: %q, %v", got.Text, err)
		}
	})
	<-in
	for i := range 40 {
		subject := "a"
		if i%2 == 1 {
			subject = "b"
		}
		all.Go(func() {
			body := fmt.Appendf(nil, "%d", i)
			if got, err := echo.Join(t.Context(), c.Batches, "lane", subject, text{body}); err != nil || !bytes.Equal(got.Text, body) {
				t.Errorf("%d: %q, %v", i, got.Text, err)
			}
		})
	}
	for _, k := range hub.Kinds() {
		all.Go(func() {
			_, err := fail.Join(t.Context(), c.Batches, "lane", "a", k)
			if code, _ := hub.Public(err); hub.KindOf(err) != k || code != "the-code" {
				t.Errorf("%s: %v", k, err)
			}
		})
	}
	want := 41 + len(hub.Kinds())
	await(t, "all but one to be asked", func() bool { return c.waiting("lane") == want-1 })
	all.Go(func() {
		_, err := echo.Join(t.Context(), c.Batches, "lane", "c", text{})
		wantCode(t, err, "part-away")
	})
	await(t, "all to be asked", func() bool { return c.waiting("lane") == want })
	close(out)
	all.Wait()
	if err := ask.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	// The second may be addressed to any of its questions' subjects.
	await(t, "the messages", func() bool { return len(c.messages()) >= 1 })
	if got := c.messages(); got[0] != 1 || len(got) > 2 || len(got) == 2 && got[1] != want {
		t.Errorf("messages with %d questions, want 1 and %d", got, want)
	}
	if !c.empty() {
		t.Error("something is left")
	}
	c.stop()
	stop()
	_, err := echo.Join(t.Context(), c.Batches, "lane", "a", text{})
	wantCode(t, err, "part-away")
	ask.Close()
	_, err = echo.Join(t.Context(), c.Batches, "lane", "a", text{})
	wantCode(t, err, "bus-away")
	if !c.empty() {
		t.Error("something is left")
	}
}

// What is slow keeps nothing else: the others of its message are answered, and the next message goes out. Who gives up waiting is told
// what is known: nothing of what was sent, and that nothing was done if it was not.
func TestBatchWithSomethingSlow(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.New(slog.DiscardHandler), "a")
	in, out := make(chan struct{}, 2), make(chan struct{})
	const slow = Method[text, text]("slow")
	Handle(s, slow, func(ctx context.Context, q text) (text, error) {
		in <- struct{}{}
		select {
		case <-out:
		case <-ctx.Done():
		}
		return q, ctx.Err()
	})
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	serve(t, s)
	c := batches(t, ask, "a")
	var all sync.WaitGroup
	all.Go(func() {
		if _, err := slow.Join(t.Context(), c.Batches, "lane", "a", text{}); err != nil {
			t.Errorf("the slow one: %v", err)
		}
	})
	<-in
	for range 10 { // all of them while the slow one is under way
		if _, err := echo.Join(t.Context(), c.Batches, "lane", "a", text{}); err != nil {
			t.Fatal(err)
		}
	}

	c.linger = time.Hour
	first, cancel := context.WithCancel(t.Context())
	all.Go(func() {
		_, err := slow.Join(first, c.Batches, "lane", "a", text{})
		wantCode(t, err, "part-silent")
	})
	<-in
	impatient, end := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer end()
	_, err := echo.Join(impatient, c.Batches, "lane", "a", text{})
	if wantCode(t, err, "part-busy"); !NotDone(err) {
		t.Errorf("it was not sent, and may have been done: %v", err)
	}
	cancel()
	// Nobody waits for the first message any more, so it keeps nobody.
	if _, err := echo.Join(t.Context(), c.Batches, "lane", "a", text{}); err != nil {
		t.Error(err)
	}
	close(out)
	all.Wait()
	await(t, "nothing to be left", c.empty)
}

// Answers of any size come through, together and alone.
func TestBatchSizes(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.Default(), "a")
	const grow = Method[int, text]("grow")
	Handle(s, grow, func(_ context.Context, n int) (text, error) { return text{make([]byte, n)}, nil })
	Handle(s, echo, func(_ context.Context, q text) (text, error) { return q, nil })
	serve(t, s)
	c := batches(t, ask, "a")
	var all sync.WaitGroup
	for i := range 30 {
		all.Go(func() {
			n := i * 50_000
			if got, err := grow.Join(t.Context(), c.Batches, "lane", "a", n); err != nil || len(got.Text) != n {
				t.Errorf("an answer of %d bytes: got %d, %v", n, len(got.Text), err)
			}
		})
		all.Go(func() {
			n := batchQuestion*i/20 + i
			if got, err := echo.Join(t.Context(), c.Batches, "lane", "a", text{make([]byte, n)}); err != nil || len(got.Text) != n {
				t.Errorf("a question of %d bytes: got %d, %v", n, len(got.Text), err)
			}
		})
	}
	all.Wait()
	if !c.empty() || len(s.talks) > 0 {
		t.Error("something is left")
	}
}

// A part of a version without batches is asked one by one, and one that speaks neither version is not asked at all.
func TestBatchesAndVersions(t *testing.T) {
	url := bustest.Server(t, nil).ClientURL()
	ask, old := connect(t, Config{URLs: []string{url}}, "v2"), connect(t, Config{URLs: []string{url}}, "v1")
	var mu sync.Mutex // guards refused
	refused := 0
	speaks := func(subject string, its uint8) {
		t.Helper()
		_, err := old.conn.Subscribe(old.prefix+subject, func(m *nats.Msg) {
			var q question
			_ = decoding.Unmarshal(m.Data, &q)
			a := answer{Version: its, Build: "v1", Part: q.Part}
			if q.Version != its {
				mu.Lock()
				refused++
				mu.Unlock()
				a.Failure = failureOf(strangers("v1", q.Build, q.Version))
			}
			_ = m.Respond(must(encoding.Marshal(a)))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	speaks("old", 1)
	speaks("strange", 9)
	if err := old.conn.Flush(); err != nil {
		t.Fatal(err)
	}
	c := batches(t, ask, "none")
	for range 3 {
		if got, err := echo.Join(t.Context(), c.Batches, "old", "old", text{[]byte("x")}); err != nil || string(got.Text) != "x" {
			t.Fatalf("got %q, %v", got.Text, err)
		}
	}
	mu.Lock()
	if refused != 1 {
		t.Errorf("%d batches were refused, want one: then it is known", refused)
	}
	mu.Unlock()
	_, err := echo.Join(t.Context(), c.Batches, "strange", "strange", text{})
	wantCode(t, err, "part-version")
	if !c.empty() {
		t.Error("something is left")
	}
}

// Many ask in a few lanes for as long as it takes, some of them impatiently, and each gets its own answer.
func TestManyBatches(t *testing.T) {
	ask, answer := pair(t)
	s := answer.Server(true, slog.New(slog.DiscardHandler), "a", "b")
	Handle(s, echo, func(ctx context.Context, q text) (text, error) {
		if len(q.Text) > 0 && q.Text[0]%16 == 3 {
			<-ctx.Done()
		}
		return q, ctx.Err()
	})
	serve(t, s)
	c := batches(t, ask, "a")
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			ctx := t.Context()
			if i%16 == 3 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
			}
			for n := range 100 {
				body := []byte{byte(i), byte(n)}
				got, err := echo.Join(ctx, c.Batches, fmt.Sprint(i%3), string("ab"[i%2]), text{body})
				switch {
				case i%16 == 3:
					if err == nil {
						t.Errorf("%d: it does not end, and is answered", i)
					}
					return
				case err != nil || !bytes.Equal(got.Text, body):
					t.Errorf("%d: got %x for %x, %v", i, got.Text, body, err)
					return
				}
			}
		})
	}
	all.Wait()
	await(t, "nothing to be left", c.empty)
}
