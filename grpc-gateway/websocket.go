package grpcgateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/protobuf/encoding/protojson"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

const (
	// lastWords is how long the end of a WebSocket may take: the message that says why, and the closing handshake.
	lastWords = time.Second
	// passOver is how many times the limit of a message are read and dropped, to keep the connection of a client that sent
	// one too large.
	passOver = 16
)

var (
	errMessage      = hub.NewError(hub.Invalid, "message-invalid", "the message is not JSON of SubscribeToEvents")
	errMessageLarge = hub.NewError(hub.TooLarge, "message-too-large", "the message is larger than the limit")
)

// originAllowed reports whether a page may open a WebSocket. The same-origin policy does not protect those (RFC 6455, Section
// 10.2); clients that are no browsers send no Origin.
func (g *Gateway) originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil || u.Host == "" {
		return false
	}
	return strings.EqualFold(u.Host, r.Host) || g.origins[strings.ToLower(origin)]
}

// subscribeWebSocket is a stream of subscriptions over a WebSocket (RFC 6455): each message of either side is one JSON text.
func (g *Gateway) subscribeWebSocket(w http.ResponseWriter, r *request) error {
	if !upgrade(r.Request) {
		return errNoMethod
	}
	if !g.originAllowed(r.Request) {
		g.metrics.refused.WithLabelValues("origin").Inc()
		return errCrossOrigin
	}
	select {
	case <-g.closing: // the WaitGroup is being waited for
		return errStopping
	default:
	}
	g.sockets.Add(1)
	defer g.sockets.Done()
	keepPlace(r.Request)
	c, err := websocket.Accept(w, r.Request, &websocket.AcceptOptions{
		Subprotocols: []string{bearerProtocol}, InsecureSkipVerify: true, // the origin was looked at, by exact comparison
	})
	if err != nil { // it has answered
		return &hub.Error{Kind: hub.Invalid, Op: "websocket.accept", Err: err}
	}
	c.SetReadLimit(-1) // messages have a limit of their own, which does not close the connection
	st := g.newStream(r.Context(), "websocket", r.claims, r.token)
	// Reading and writing end a little after the stream, since the library breaks the connection off with their context.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	last := context.AfterFunc(st.ctx, func() {
		t := time.NewTimer(lastWords)
		defer t.Stop()
		select {
		case <-t.C:
			cancel()
		case <-ctx.Done():
		}
	})
	s := &socket{g: g, c: c, st: st, ctx: ctx, proto: r.proto || r.query.get("accept") == "application/protojson"}
	st.send = s.send
	st.work.Go(s.keepAlive)
	read := make(chan struct{})
	go func() {
		defer close(read)
		st.end(g.guarded("websocket", s.read))
	}()
	<-st.ctx.Done()
	err = context.Cause(st.ctx)
	st.close() // nobody writes any more
	code, text := websocket.StatusNormalClosure, ""
	if !errors.Is(err, errGone) {
		_ = s.write(append(appendError([]byte(`{"error":`), err, false), '}'))
		code, text = closing(err)
	}
	_ = c.Close(code, text) // a client that is gone needs no answer
	cancel()
	last()
	<-read
	return err
}

// closing is how a WebSocket is closed that ends with an error.
func closing(err error) (websocket.StatusCode, string) {
	code, _ := hub.Public(err)
	switch {
	case errors.Is(err, errStopping):
		return websocket.StatusGoingAway, code
	case hub.IsKind(err, hub.Unauthenticated), hub.IsKind(err, hub.Denied):
		return websocket.StatusPolicyViolation, code
	case hub.IsKind(err, hub.TooLarge):
		return websocket.StatusMessageTooBig, code
	case hub.IsKind(err, hub.Unavailable):
		return websocket.StatusTryAgainLater, code
	}
	return websocket.StatusInternalError, code
}

// socket is a WebSocket with a stream.
type socket struct {
	g     *Gateway
	c     *websocket.Conn
	st    *stream
	ctx   context.Context //nolint:containedctx // of reading and writing
	proto bool
	// A message was taken since keepAlive looked; one is being written.
	took, writing atomic.Bool
}

func (s *socket) send(t told) error {
	b, err := s.g.appendFrame(make([]byte, 0, 1024), &t, s.proto)
	if err != nil {
		return err
	}
	return s.write(b)
}

// write sends a message; a reader that takes nothing for too long is cut off.
func (s *socket) write(b []byte) error {
	s.writing.Store(true)
	defer s.writing.Store(false)
	err := s.inTime(func(ctx context.Context) error { return s.c.Write(ctx, websocket.MessageText, b) })
	if err == nil {
		s.took.Store(true)
	}
	return err
}

// inTime does something that waits for the peer. When that takes too long, the stream ends with this reason before the library
// breaks the connection off, which its reader takes for a peer that is gone.
func (s *socket) inTime(do func(context.Context) error) error {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	stalled := time.AfterFunc(s.g.cfg.Limits.StallTimeout, func() {
		s.st.end(errStalled)
		cancel()
	})
	defer stalled.Stop()
	if err := do(ctx); err != nil {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return nil
}

// keepAlive finds out when the peer is gone without a word.
func (s *socket) keepAlive() {
	tick := time.NewTicker(keepAlive)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-s.st.ctx.Done():
			return
		}
		if s.took.Swap(false) || s.writing.Load() {
			// It is there, or write finds out. A slow reader finds a ping behind megabytes that are in the connection's
			// buffers, and the library gives a ping five seconds to get there at all.
			continue
		}
		if err := s.inTime(s.c.Ping); err != nil {
			s.st.end(err)
			return
		}
	}
}

// read carries out what the peer asks for until it closes. A message that is not understood is answered and changes nothing.
func (s *socket) read() error {
	limit := int64(s.g.cfg.Limits.MaxBodyBytes)
	for {
		_, r, err := s.c.Reader(s.ctx)
		if err != nil { // it closed, in order or not
			return fmt.Errorf("%w: %w", errGone, err)
		}
		b, err := io.ReadAll(io.LimitReader(r, limit+1))
		if err != nil {
			return fmt.Errorf("%w: %w", errGone, err)
		}
		if int64(len(b)) > limit {
			n, err := io.Copy(io.Discard, io.LimitReader(r, passOver*limit))
			if err != nil {
				return fmt.Errorf("%w: %w", errGone, err)
			}
			if n == passOver*limit {
				return errMessageLarge
			}
			if err := s.refuse(errMessageLarge); err != nil {
				return err
			}
			continue
		}
		if err := s.message(b); err != nil {
			return err
		}
	}
}

// message may hold several documents, one behind the other, or none.
func (s *socket) message(b []byte) error {
	d := json.NewDecoder(bytes.NewReader(b))
	for {
		var doc json.RawMessage
		err := d.Decode(&doc)
		if errors.Is(err, io.EOF) {
			return nil
		}
		var m *pb.SubscribeToEvents
		if err == nil {
			m, err = parseSubscribe(doc)
		}
		if err != nil {
			return s.refuse(errMessage.With("websocket.parse", err)) // where the next one would begin nobody knows
		}
		if err := s.st.handle(m); err != nil {
			return err
		}
	}
}

func (s *socket) refuse(err error) error {
	s.st.sending.Lock()
	defer s.st.sending.Unlock()
	return s.write(append(appendError([]byte(`{"error":`), err, false), '}'))
}

// parseSubscribe reads protobuf's JSON, with two additions that clients are used to: members that are not known are passed
// over, and entries of resourceIdFilter may be texts. A kind of events that is not known matches nothing, instead of being
// passed over: a filter of such alone would ask for everything.
func parseSubscribe(doc json.RawMessage) (*pb.SubscribeToEvents, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(doc, &members); err != nil {
		return nil, err
	}
	if members == nil { // null
		return nil, errors.New("no object")
	}
	for _, name := range []string{"createSubscription", "create_subscription"} {
		var create map[string]json.RawMessage
		if json.Unmarshal(members[name], &create) != nil || create == nil {
			continue // protojson says what is wrong
		}
		var kinds []json.RawMessage
		for _, list := range []string{"eventFilter", "event_filter"} {
			if json.Unmarshal(create[list], &kinds) != nil || kinds == nil {
				continue
			}
			for i := range kinds {
				var kind string
				if json.Unmarshal(kinds[i], &kind) != nil {
					continue
				}
				if _, known := pb.SubscribeToEvents_CreateSubscription_Event_value[kind]; !known {
					kinds[i] = json.RawMessage("-1")
				}
			}
			create[list], _ = json.Marshal(kinds) // what was read can be written
		}
		var texts []string
		for _, list := range []string{"resourceIdFilter", "resource_id_filter"} {
			var entries []json.RawMessage
			if json.Unmarshal(create[list], &entries) != nil || entries == nil {
				continue
			}
			rest := []json.RawMessage{}
			for _, e := range entries {
				var text string
				if json.Unmarshal(e, &text) == nil && len(e) > 0 && e[0] == '"' {
					texts = append(texts, text)
				} else {
					rest = append(rest, e)
				}
			}
			create[list], _ = json.Marshal(rest)
		}
		if len(texts) > 0 {
			for _, list := range []string{"httpResourceIdFilter", "http_resource_id_filter"} {
				var more []string
				if json.Unmarshal(create[list], &more) == nil {
					texts = append(texts, more...)
				}
				delete(create, list)
			}
			create["httpResourceIdFilter"], _ = json.Marshal(texts)
		}
		members[name], _ = json.Marshal(create)
	}
	whole, err := json.Marshal(members)
	if err != nil {
		return nil, err
	}
	m := &pb.SubscribeToEvents{}
	return m, protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(whole, m)
}
