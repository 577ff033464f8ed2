// Package bus carries calls between the parts of a hub that run in processes of their own, over NATS: one question, one answer, each of
// any size, with a deadline. What becomes of a call that was not answered is the caller's to find out: it may have been done.
//
// It must not know what is asked, nor who asks whom: the parts' own bus_server.go and bus_client.go do.
package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

const (
	// maxPart is how much of a question or an answer goes into one message; NATS takes 1 MB unless its operator says otherwise.
	maxPart = 480 << 10
	// maxQuestion and maxAnswer bound what is put together of parts.
	maxQuestion, maxAnswer = 16 << 20, 64 << 20
	// patience bounds a call whose context has no earlier end.
	patience = 10 * time.Second
)

// Bus is this process's connection. Its methods are safe for concurrent use.
type Bus struct {
	conn    *nats.Conn
	prefix  string // of all subjects of the hub
	build   string
	metrics *metrics
}

// Connect makes a connection for the parts of the hub that run in this process; build is the version of the program, and name what the
// operator of the servers sees. It does not wait for a server: until there is one, calls are Unavailable, and served as soon as there is.
// The configuration must be valid.
func Connect(cfg Config, hubID, build, name string, log *slog.Logger, reg prometheus.Registerer) (*Bus, error) {
	b := &Bus{prefix: Prefix(hubID), build: build, metrics: newMetrics(reg)}
	var err error
	if b.conn, err = Dial(cfg, hubID, name, log.With("connection", "bus"), b.metrics.changed); err != nil {
		return nil, err
	}
	return b, nil
}

// Close ends the connection and whatever is under way on it.
func (b *Bus) Close() { b.conn.Close() }

// Health returns an error while no server is reached.
func (b *Bus) Health(context.Context) error {
	if b.conn.IsConnected() {
		return nil
	}
	if err := b.conn.LastError(); err != nil {
		return fmt.Errorf("the bus is not connected: %w", err)
	}
	return errors.New("the bus is not connected")
}

// Method is a call that a part serves, by its name. Req and Resp are what it is asked with and what it answers, encoded as CBOR; they
// have exported fields only, and a newer version of them may have more, which older ones do not see.
type Method[Req, Resp any] string

// Call asks whoever serves subject. Errors are those of the other side, with its kind, code and text, and hub.Unavailable: with the code
// "bus-away" or "part-away" nothing was done, and with "part-silent" that is not known.
func (m Method[Req, Resp]) Call(ctx context.Context, b *Bus, subject string, req Req) (Resp, error) {
	var resp Resp
	body, err := encoding.Marshal(req)
	if err != nil {
		return resp, fmt.Errorf("encode %s: %w", m, err)
	}
	return answered[Resp](b, string(m), body, func() ([]byte, error) { return b.ask(ctx, b.prefix+subject, string(m), body) })
}

// answered asks and reads the answer.
func answered[Resp any](b *Bus, method string, body []byte, ask func() ([]byte, error)) (resp Resp, err error) {
	if len(body) > maxQuestion {
		return resp, hub.NewError(hub.TooLarge, "", "").With(method, nil)
	}
	began := time.Now()
	out, err := ask()
	b.metrics.asked(method, err, time.Since(began))
	if err != nil {
		return resp, err
	}
	if err := decoding.Unmarshal(out, &resp); err != nil {
		return resp, fmt.Errorf("decode the answer of %s: %w", method, err)
	}
	return resp, nil
}

// ask sends a question and collects the answer.
func (b *Bus) ask(ctx context.Context, subject, method string, body []byte) ([]byte, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	return b.talk(ctx, subject, method, body, nil)
}

// bounded is ctx, with an end.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, patience)
}

// talk goes on with a question, of which body is left, and with its answer, of which out came. Whatever goes beyond one message is sent,
// and asked for, part by part: who has asked for a part has room for it, and nobody is sent more than that.
func (b *Bus) talk(ctx context.Context, subject, method string, body, out []byte) ([]byte, error) {
	deadline, _ := ctx.Deadline()
	q := question{Version: version, Build: b.build, Method: method, Within: time.Until(deadline)}
	for {
		q.Part, body = cut(body)
		q.More = len(body) > 0
		a, err := b.send(ctx, subject, q)
		if err == nil && a.Failure != nil {
			err = a.Failure.err(method)
		}
		switch {
		case len(out) > 0 && NotDone(err):
			return nil, partSilent.With(method, err) // it was done, and the rest of what became of it is lost
		case err != nil:
			return nil, err
		case q.More && a.Next == "":
			return nil, fmt.Errorf("%s: the other side took a part of the question for all of it", method)
		case q.More:
		case len(out)+len(a.Part) > maxAnswer:
			return nil, fmt.Errorf("%s: the answer is larger than %d bytes", method, maxAnswer)
		case a.Next == "":
			return append(out, a.Part...), nil
		default:
			out = append(out, a.Part...)
		}
		subject = a.Next
	}
}

// cut takes off what goes into a message.
func cut(body []byte) (part, rest []byte) {
	n := min(len(body), maxPart)
	return body[:n], body[n:]
}

// send sends one message and returns what comes back for it.
func (b *Bus) send(ctx context.Context, subject string, q question) (answer, error) {
	data, err := encoding.Marshal(q)
	if err != nil {
		return answer{}, fmt.Errorf("encode a question: %w", err)
	}
	msg, err := b.conn.RequestWithContext(ctx, subject, data)
	if err != nil {
		return answer{}, unsent(q.Method, err)
	}
	var a answer
	if err := a.decode(msg.Data, b.build); err != nil {
		return a, err
	}
	return a, nil
}

// unsent is what NATS's error says of a message that it did not answer.
func unsent(method string, err error) error {
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return partAway.With(method, err)
	case errors.Is(err, nats.ErrReconnectBufExceeded), errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, nats.ErrConnectionDraining):
		return busAway.With(method, err)
	}
	return partSilent.With(method, err) // its time is over, or the connection went in the middle
}

// The kinds of not getting an answer.
var (
	busAway    = hub.NewError(hub.Unavailable, "bus-away", "the parts of the hub cannot reach each other at the moment")
	partAway   = hub.NewError(hub.Unavailable, "part-away", "a part of the hub is away at the moment")
	partSilent = hub.NewError(hub.Unavailable, "part-silent", "a part of the hub did not answer in time")
	partBusy   = &hub.Error{Kind: hub.Unavailable, Code: "part-busy", Text: "a part of the hub has too much to do", RetryAfter: time.Second}
)

// NotDone reports whether an error of a call says that nothing was done, so that it may be made again whatever it is.
func NotDone(err error) bool {
	code, _ := hub.Public(err)
	return err != nil && (code == partAway.Code || code == busAway.Code || code == partBusy.Code)
}

var (
	encoding = must(cbor.EncOptions{Time: cbor.TimeRFC3339Nano}.EncMode())
	// Bodies are bounded, and what is in them is the other parts': the limits are those of the largest page.
	decoding = must(cbor.DecOptions{MaxArrayElements: 1 << 20, MaxMapPairs: 1 << 20, MaxNestedLevels: 64}.DecMode())
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
