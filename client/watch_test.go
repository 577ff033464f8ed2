package client_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

// heard are the events of a watch that runs beside the test.
type heard struct {
	events chan client.Event
	err    chan error
	broken chan error
	stop   func()
}

func watch(t *testing.T, c *client.Client, f client.EventFilter) *heard {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	h := &heard{events: make(chan client.Event), err: make(chan error, 1), broken: make(chan error, 10)}
	f.Broken = func(err error) { h.broken <- err }
	ended := make(chan struct{})
	go func() { // ends with cancel
		defer close(ended)
		for e, err := range c.Watch(ctx, f) {
			if err != nil {
				h.err <- err
				return
			}
			select {
			case h.events <- e:
			case <-ctx.Done():
				return
			}
		}
	}()
	h.stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(h.stop)
	return h
}

// next is the next event, or the error that ended the watch.
func (h *heard) next(t *testing.T) (client.Event, error) {
	t.Helper()
	select {
	case e := <-h.events:
		return e, nil
	case err := <-h.err:
		return client.Event{}, err
	case <-time.After(30 * time.Second):
		t.Fatal("nothing was heard")
		return client.Event{}, nil
	}
}

func (h *heard) want(t *testing.T, kind client.EventKind) client.Event {
	t.Helper()
	e, err := h.next(t)
	if err != nil || e.Kind != kind || e.ResumeToken == "" {
		t.Fatalf("%+v, %v; want %s", e, err, kind)
	}
	return e
}

// power is a reading of the lamp.
func power(t *testing.T, e client.Event) (n int) {
	t.Helper()
	var light struct{ Power int }
	if e.Change == nil || e.Href() != "/light/1" || e.Change.Decode(&light) != nil {
		t.Fatalf("%+v", e)
	}
	return light.Power
}

// Each reading is heard once and in order, across restarts of the hub on other ports and of the program.
func TestWatchResumes(t *testing.T) {
	t.Parallel()
	w := start(t, "lamp")
	var mu sync.Mutex // the watch looks for the hub while the test restarts it
	server := w.HTTP
	c, err := client.New(client.Config{
		Locate: func(context.Context) (string, error) {
			mu.Lock()
			defer mu.Unlock()
			if server == "" {
				return "", &client.Error{Kind: client.Unavailable, Code: "away", Message: "it is away"}
			}
			return server, nil
		},
		Token: client.Static(w.Token(t)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	f := client.EventFilter{Kinds: []client.EventKind{client.Updated}, DeviceIDs: []string{lamp}, Hrefs: []string{"/light/1"}}
	h := watch(t, c, f)
	h.want(t, client.Live)
	set := func(n int) {
		t.Helper()
		if _, err := w.c.UpdateResource(t.Context(), lamp, "/light/1", map[string]int{"power": n}, client.CommandOptions{TTL: 20 * time.Second}); err != nil {
			t.Fatal(err)
		}
	}
	set(1)
	first := h.want(t, client.Updated)
	if power(t, first) != 1 || first.DeviceIDs[0] != lamp || first.Time.IsZero() || len(first.Raw) == 0 {
		t.Errorf("%+v", first)
	}

	mu.Lock()
	server = ""
	mu.Unlock()
	// The device finds the hub again by its address.
	w.stop[0]()
	w.Restart(t)
	w.c = w.client(t, client.Static(w.Token(t)))
	w.device(t, lamp, "lamp")
	w.synchronised(t, 1)
	set(2)
	set(3)
	mu.Lock()
	server = w.HTTP
	mu.Unlock()
	var last client.Event
	for _, n := range []int{2, 3} {
		if last = h.want(t, client.Updated); power(t, last) != n {
			t.Errorf("%+v, want %d", last, n)
		}
	}
	select {
	case err := <-h.broken:
		if !errors.Is(err, client.Unavailable) {
			t.Errorf("%v", err)
		}
	default:
		t.Error("nobody was told of the break")
	}
	h.stop()
	set(4)
	f.Resume = last.ResumeToken
	again := watch(t, c, f)
	again.want(t, client.Live)
	if e := again.want(t, client.Updated); power(t, e) != 4 {
		t.Errorf("%+v", e)
	}
	f.Resume = first.ResumeToken
	all := watch(t, c, f)
	all.want(t, client.Live)
	for n := 2; n <= 4; n++ {
		if e := all.want(t, client.Updated); power(t, e) != n {
			t.Errorf("%+v, want %d", e, n)
		}
	}
}

// The kinds of events and what they hold.
func TestWatchTellsAll(t *testing.T) {
	t.Parallel()
	w := start(t)
	h := watch(t, w.c, client.EventFilter{State: true})
	kinds := map[client.EventKind]client.Event{}
	until := func(kind client.EventKind) client.Event {
		t.Helper()
		for {
			e, err := h.next(t)
			if err != nil {
				t.Fatal(err)
			}
			kinds[e.Kind] = e
			if e.Kind == kind {
				return e
			}
		}
	}
	until(client.Live)
	w.device(t, lamp, "lamp")
	if e := until(client.Registered); !slices.Equal(e.DeviceIDs, []string{lamp}) || e.Href() != "" {
		t.Errorf("%+v", e)
	}
	if e := until(client.MetadataUpdated); !e.Metadata.Connection.Online() || e.DeviceIDs[0] != lamp {
		t.Errorf("%+v", e)
	}
	if e := until(client.Published); len(e.Links.Resources) < 3 || e.DeviceIDs[0] != lamp {
		t.Errorf("%+v", e)
	}
	if e := until(client.Changed); e.Change.Resource.DeviceID != lamp || e.Change.Status != "OK" {
		t.Errorf("%+v", e)
	}
	for until(client.MetadataUpdated).Metadata.Twin.State != "IN_SYNC" {
		continue
	}
	ended := make(chan error, 1)
	go func() { // ends with the command
		_, err := w.c.UpdateResource(t.Context(), lamp, "/light/1", map[string]int{"power": 9}, client.CommandOptions{})
		ended <- err
	}()
	if e := until(client.UpdatePending); e.Command.Resource.Href != "/light/1" || string(e.Command.Content) != `{"power":9}` || e.Href() != "/light/1" || e.DeviceIDs[0] != lamp {
		t.Errorf("%+v", e)
	}
	if e := until(client.Updated); power(t, e) != 9 || e.Change.By.CorrelationID != kinds[client.UpdatePending].Command.By.CorrelationID {
		t.Errorf("%+v", e)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if _, err := w.devices[0].Unpublish(t.Context(), "/info"); err != nil {
		t.Fatal(err)
	}
	if e := until(client.Unpublished); !slices.Equal(e.Unpublished, []string{"/info"}) || e.DeviceIDs[0] != lamp {
		t.Errorf("%+v", e)
	}
	if _, err := w.c.DeleteDevices(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	if e := until(client.Unregistered); !slices.Equal(e.DeviceIDs, []string{lamp}) {
		t.Errorf("%+v", e)
	}
}

func TestWatchEnds(t *testing.T) {
	t.Parallel()
	w := start(t)
	ends := func(c *client.Client, f client.EventFilter, kind client.Kind, code client.Code) {
		t.Helper()
		_, err := watch(t, c, f).next(t)
		fails(t, err, kind, code)
	}
	ends(w.c, client.EventFilter{Kinds: []client.EventKind{"nonsense"}}, client.Invalid, "query-invalid")
	ends(w.c, client.EventFilter{Resume: "nonsense"}, client.Invalid, "resume-token-invalid")
	ends(w.client(t, client.Static("nonsense")), client.EventFilter{}, client.Unauthenticated, "token-invalid")
	ends(w.client(t, nil), client.EventFilter{}, client.Unauthenticated, "token-missing")
	away, err := client.New(client.Config{Server: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	ends(away, client.EventFilter{}, client.Unavailable, client.ErrUnreachable)

	// The loop is left, and the caller ends it.
	for e, err := range w.c.Watch(t.Context(), client.EventFilter{}) {
		if e.Kind != client.Live || err != nil {
			t.Errorf("%+v, %v", e, err)
		}
		break
	}
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	n := 0
	for e, err := range w.c.Watch(ctx, client.EventFilter{}) {
		if n++; n == 1 {
			cancel(why)
		} else if !errors.Is(err, why) {
			t.Errorf("%+v, %v", e, err)
		}
	}
	if n != 2 {
		t.Errorf("%d rounds", n)
	}

	// A token that ends is replaced, as long as there is another: a subscription outlives its tokens.
	short := func() client.TokenSource {
		left := 2
		return func(context.Context) (client.Token, error) {
			if left == 0 {
				return client.Token{}, &client.Error{Kind: client.Denied, Code: "no-more", Message: "there is no more"}
			}
			left--
			tok, err := w.Control.Token(t.Context(), bundle.TokenRequest{TTL: time.Second})
			return client.Token{Access: tok.AccessToken}, err
		}
	}
	h := watch(t, w.client(t, short()), client.EventFilter{})
	h.want(t, client.Live)
	_, err = h.next(t)
	fails(t, err, client.Denied, "no-more")
	h = watch(t, w.client(t, client.Static(w.Token(t, hub.ScopeRead))), client.EventFilter{})
	h.want(t, client.Live)
}

// What a hub says that lost what came next, that comes back slowly, and that breaks off in the middle of an event.
func TestWatchAcrossFaults(t *testing.T) {
	t.Parallel()
	frame := func(id, what string) string { return "id: " + id + "\ndata: {\"result\":" + what + "}\n\n" }
	changed := func(n int) string {
		return fmt.Sprintf(`{"resourceChanged":{"resourceId":{"deviceId":%q,"href":"/light/1"},"content":{"power":%d}},"resumeToken":"x"}`, lamp, n)
	}
	const processed, lagged = `{"operationProcessed":{"errorStatus":{"code":"OK"}}}`, `{"operationProcessed":{"errorStatus":{"code":"OK"},"lagged":true}}`
	answers := []string{
		":\n\n" + frame("A1", processed) + frame("A2", changed(1)) + "id: A3\ndata: {\"resu", // cut off
		"503",
		frame("B1", processed) + "event: other\nretry:5\n" + frame("B2", changed(2)) + `data: {"error":{"code":14,"message":"stopping","details":[{"reason":"hub-stopping"}]}}` + "\n\n",
		frame("C1", lagged) + frame("C2", changed(3)),
		frame("D1", processed) + "data:nonsense\n\n",
	}
	var asked []string
	var refused, back time.Time
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Header.Get("Last-Event-ID"))
		a := answers[len(asked)-1]
		switch {
		case a == "503":
			refused = time.Now()
			w.Header().Set("Retry-After", "2")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		case back.IsZero() && !refused.IsZero():
			back = time.Now()
		}
		_, _ = w.Write([]byte(a))
	}))
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	h := watch(t, c, client.EventFilter{})
	h.want(t, client.Live)
	for n, kind := range []client.EventKind{client.Changed, client.Changed, client.Lagged, client.Changed} {
		e := h.want(t, kind)
		if kind == client.Changed && power(t, e) != []int{1, 2, 0, 3}[n] {
			t.Errorf("%+v", e)
		}
	}
	_, err = h.next(t)
	fails(t, err, client.Invalid, client.ErrRefused)
	if want := []string{"", "A2", "A2", "B2", "C2"}; !slices.Equal(asked, want) {
		t.Errorf("asked for what came behind %q, want %q", asked, want)
	}
	if d := back.Sub(refused); d < 2*time.Second {
		t.Errorf("it came back %v after it was told to come in 2 s", d)
	}
	if n := len(h.broken); n != 3 { // the second one did not get anywhere: it is the same break
		t.Errorf("told of %d breaks", n)
	}
}
