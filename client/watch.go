package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"iter"
	"net/http"
	"net/url"
	"time"
)

const (
	// silence is how long a stream of events may say nothing at all: the hub sends something every ten seconds.
	silence = 35 * time.Second
	// Pauses before coming again: the first, and the longest.
	firstPause, longestPause = 500 * time.Millisecond, 30 * time.Second
)

// EventFilter says which events are watched. What is empty matches everything; devices and hrefs are a product.
type EventFilter struct {
	Kinds     []EventKind
	DeviceIDs []string
	Hrefs     []string // as they stand, with their leading slash
	Resources []ResourceID
	Types     []string // resource types, for events of resources; one match is enough
	// State asks for the current state first, as events.
	State bool
	// Resume is Event.ResumeToken of the last event that was dealt with: it goes on behind that one, also after a restart of
	// this program or of the hub. Empty: from now on.
	Resume string
	// Broken, if it is not nil, is told each time that the connection was lost and Watch is about to come back. It must not
	// block.
	Broken func(error)
}

func (f EventFilter) values() (url.Values, error) {
	v, err := ResourceQuery{DeviceIDs: f.DeviceIDs, Resources: f.Resources}.values()
	if err != nil {
		return nil, err
	}
	for _, k := range f.Kinds {
		v.Add("eventFilter", k.filter())
	}
	v["hrefFilter"] = f.Hrefs
	v["leadResourceTypeFilter"] = f.Types
	if f.State {
		v.Set("includeCurrentState", "true")
	}
	return v, nil
}

// Watch hears events as they happen: each once, in each device's order, for as long as the loop goes on. When the connection
// breaks or the hub restarts it comes back and goes on behind the last event that the loop got; if that is not possible, since
// the hub no longer keeps what happened meanwhile or the current state had not been told whole, an event Lagged says so, and
// the current state follows. The first event is Live. A loop that is slow loses nothing: the hub keeps the place.
//
// It ends with an error: that of the first connection if there never was one, one that coming back does not help, or the cause
// of ctx's end.
func (c *Client) Watch(ctx context.Context, f EventFilter) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		query, err := f.values()
		if err != nil {
			yield(Event{}, err)
			return
		}
		w := &watch{c: c, query: query, last: f.Resume, yield: yield}
		if err := w.run(ctx, f.Broken); err != nil && !w.left {
			yield(Event{}, err)
		}
	}
}

// watch follows a stream of events across breaks.
type watch struct {
	c     *Client
	query url.Values
	yield func(Event, error) bool
	last  string // the resume token of the newest event
	met   bool   // the hub has answered
	live  bool   // Live or Lagged was told
	left  bool   // the loop was left
}

func (w *watch) run(ctx context.Context, broken func(error)) error {
	pause, told := firstPause, false
	var token string
	var refused error // why the hub refused token
	for {
		heard, opened := w.last, false
		err := refused
		if w.c.tokens != nil {
			old := token
			if refused == nil {
				old = ""
			}
			next, tokenErr := w.c.tokens.get(ctx, old)
			switch {
			case tokenErr != nil:
				err = tokenErr
			case next == old && old != "":
				return refused // there is no other
			default:
				token, err = next, nil
			}
		}
		if err == nil {
			opened, err = w.follow(ctx, token)
		}
		switch {
		case w.left:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case opened && w.last != heard:
			pause, told = firstPause, false
		}
		switch {
		case errors.Is(err, Unauthenticated) && w.c.tokens != nil && (opened || refused == nil):
			refused = err // another one may do
		case w.met && (errors.Is(err, Unavailable) || errors.Is(err, Exhausted)):
			if !told && broken != nil {
				broken(err)
			}
			refused, told = nil, true
		default:
			return err
		}
		again := pause
		if e := (*Error)(nil); errors.As(err, &e) {
			again = max(pause, e.RetryAfter) // the hub knows when it has time
		}
		wait := time.NewTimer(again)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return context.Cause(ctx)
		}
		pause = min(2*pause, longestPause)
	}
}

// follow reads one stream until it ends, which it does with an error; opened reports whether the hub took the request.
func (w *watch) follow(ctx context.Context, token string) (opened bool, err error) {
	own, cancel := context.WithCancel(ctx)
	defer cancel()
	h := http.Header{"Accept": {"text/event-stream"}}
	if w.last != "" {
		h.Set("Last-Event-ID", w.last)
	}
	resp, err := w.c.once(own, Request{Path: "/api/v1/events/stream", Query: w.query, Header: h}, token)
	if err != nil {
		return false, err
	}
	defer func() { _ = resp.Body.Close() }()
	w.met = true
	quiet := time.AfterFunc(silence, cancel) // the other side may be gone without a word
	defer quiet.Stop()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	var id string
	var data []byte
	for lines.Scan() {
		quiet.Reset(silence)
		name, value, _ := bytes.Cut(lines.Bytes(), []byte(":"))
		value = bytes.TrimPrefix(value, []byte(" "))
		switch {
		case string(name) == "id":
			id = string(value)
		case string(name) == "data":
			data = bytes.Clone(value) // one line: the hub's JSON has no line breaks
		case len(lines.Bytes()) > 0 || data == nil: // a comment, another field, or nothing
		default: // the event is whole (WHATWG HTML, Section 9.2.6); one that was cut off comes again
			quiet.Stop() // the loop may take its time
			more, err := w.tell(id, data)
			if err != nil {
				return true, err
			}
			w.last, data = id, nil
			if !more {
				w.left = true
				return true, nil
			}
			quiet.Reset(silence)
		}
	}
	return true, w.c.brokeOff(ctx, lines.Err())
}

// tell hands one message of the stream on; more is false when the loop was left.
func (w *watch) tell(id string, data []byte) (more bool, err error) {
	var m struct {
		Result map[string]json.RawMessage `json:"result"`
		Error  *status                    `json:"error"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return false, strange(err)
	}
	if m.Error != nil {
		return false, m.Error.err()
	}
	e := Event{ResumeToken: id}
	if raw, ok := m.Result["operationProcessed"]; ok {
		var op struct {
			Lagged bool `json:"lagged"`
		}
		if err := json.Unmarshal(raw, &op); err != nil {
			return false, strange(err)
		}
		switch {
		case op.Lagged:
			e.Kind = Lagged
		case w.live: // it came back
			return true, nil
		default:
			e.Kind = Live
		}
		w.live = true
		return w.yield(e, nil), nil
	}
	for _, name := range []string{"subscriptionId", "correlationId", "resumeToken"} {
		delete(m.Result, name)
	}
	raw, err := encode(m.Result)
	if err == nil {
		err = json.Unmarshal(raw, &e)
	}
	if err != nil {
		return false, strange(err)
	}
	e.keep(raw)
	return w.yield(e, nil), nil
}
