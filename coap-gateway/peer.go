package coapgateway

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// peer is one connection and whoever is signed in on it. The engine calls it from one goroutine at a time.
type peer struct {
	gw   *Gateway
	conn *coap.Conn
	cred credential
	log  *slog.Logger

	sess *session // nil when nobody is signed in
	// listening is sess for Heard, which the connection's goroutine does not call.
	listening atomic.Pointer[session]
	closing   atomic.Bool // an answer was given after which the connection ends; the engine's refusals set it too
	request   uint64      // counts requests, for the log
	told      uint64      // how many ends of credentials were told when the account request under way began
	helpers   sync.WaitGroup
}

// Open implements coap.Handler.
func (g *Gateway) Open(c *coap.Conn) (coap.ConnHandler, error) {
	info := c.Info()
	p := &peer{gw: g, conn: c, cred: g.credentialOf(info)}
	p.log = g.log.With("connection", info.ID, "remote", info.Remote.String())
	return p, nil
}

// closeDelay is between an answer that ends the connection and its end. Devices rely on both; go-coap's clients drop an
// answer that they have not handled when the connection ends.
const closeDelay = 100 * time.Millisecond

// route is one row of the table of paths: what answers each method.
type route struct {
	session bool // needs a device that is signed in
	account bool // any error is answered and then ends the connection
	own     bool // no path of OCF's, which devices read their own way: clients are answered as the RFCs have it
	methods map[codes.Code]method
}

// method answers a request; format is that of the body it may answer with. Errors become responses by errors.go's table.
type method func(p *peer, ctx context.Context, req *coap.Message, format int32) (coap.Response, error)

var routes = map[string]route{
	"/oic/sec/account": {account: true, methods: map[codes.Code]method{
		codes.POST: (*peer).signUp, codes.DELETE: (*peer).signOff,
	}},
	"/oic/sec/session":      {account: true, methods: map[codes.Code]method{codes.POST: (*peer).signInOrOut}},
	"/oic/sec/tokenrefresh": {account: true, methods: map[codes.Code]method{codes.POST: (*peer).refresh}},
	"/oic/rd": {session: true, methods: map[codes.Code]method{
		codes.GET: (*peer).selector, codes.POST: (*peer).publish, codes.DELETE: (*peer).unpublish,
	}},
	"/oic/res":          {session: true, methods: map[codes.Code]method{codes.GET: (*peer).discover}},
	"/x.plgd.dev/time":  {own: true, methods: map[codes.Code]method{codes.GET: (*peer).hubTime}},
	"/.well-known/core": {own: true, methods: map[codes.Code]method{codes.GET: (*peer).core}},
}

// Request implements coap.ConnHandler. The order of refusals is path, method, session, format, body: a 4.01 costs a device
// its token, so nothing is 4.01 that would not work with a session either.
func (p *peer) Request(ctx context.Context, req *coap.Message) coap.Response {
	if p.closing.Load() {
		return coap.Response{Silent: true} // what came behind the refused request is not carried out
	}
	start := time.Now()
	p.request++
	path := pathOf(req)
	r, known := routes[path]
	var resp coap.Response
	var err error
	if !p.conn.Guard("request", func() { resp, err = p.answer(ctx, r, known, path, req) }) {
		err = &hub.Error{Kind: hub.Internal} // the engine would answer 5.00; here it is trouble of ours like any other
	}
	if err != nil {
		resp = r.failure(req, err)
		if r.account || resp.Code == codes.Unauthorized {
			p.close()
		}
		if p.sess != nil {
			code, _ := hub.Public(err)
			p.gw.devices.failed(p.sess.own.Device, p.sess.number, code)
		}
	}
	resp.Challenge = r.own
	label := path
	if !known {
		label = "unknown" // paths are unbounded
	}
	p.gw.metrics.requests.WithLabelValues(label, dotted(resp.Code)).Inc()
	level := slog.LevelDebug
	if err != nil && ours(err) {
		level = slog.LevelWarn // somebody of ours must look at it; faults of devices are for their makers
	}
	if p.log.Enabled(ctx, level) {
		log := p.log
		if p.sess != nil {
			log = p.sess.log
		}
		args := []any{"request", p.request, "method", dotted(req.Code), "path", path, "code", dotted(resp.Code), "took", time.Since(start)}
		if err != nil {
			args = append(args, "error", err)
		}
		log.Log(ctx, level, "request answered", args...)
	}
	return resp
}

// Refused implements coap.Refuser: an error on an account path ends the connection, also where the engine gave it. It runs
// before anything behind that request is handled, so nothing of that is carried out. Requests before it that still wait may
// be given up too, unanswered, because the reader refuses before their turn comes; the one under way is answered.
func (p *peer) Refused(req *coap.Message) {
	path := pathOf(req)
	r, known := routes[path]
	if !known {
		path = "unknown"
	}
	p.gw.metrics.requests.WithLabelValues(path, "refused").Inc()
	if r.account {
		p.close()
	}
}

// close ends the connection once the answer has had time to arrive; no request is carried out any more. Over UDP and DTLS
// the engine then goes on to answer duplicates of the request for a while, since the answer may be lost. It may be called
// from any goroutine, and more than once.
func (p *peer) close() {
	if p.closing.CompareAndSwap(false, true) {
		time.AfterFunc(closeDelay, func() { p.conn.Close(coap.ErrAnswered) })
	}
}

func (p *peer) answer(ctx context.Context, r route, known bool, path string, req *coap.Message) (coap.Response, error) {
	if !known {
		return coap.Response{}, hub.NewError(hub.NotFound, "path-unknown", "there is nothing at this path")
	}
	m, ok := r.methods[req.Code]
	if !ok {
		return coap.Response{}, &hub.Error{Kind: hub.MethodNotAllowed}
	}
	if r.session && p.sess == nil {
		return coap.Response{}, unauthenticated("not-signed-in", "nobody is signed in on this connection")
	}
	if !fulfilled(req) {
		return coap.Response{}, &hub.Error{Kind: hub.Precondition}
	}
	var format int32
	if path != "/.well-known/core" && req.Code != codes.DELETE { // they have their own format, and none
		var err error
		if format, err = acceptable(req); err != nil {
			return coap.Response{}, err
		}
	}
	// Whatever a request waits for ends before the device gives up on it.
	ctx, cancel := context.WithTimeout(ctx, p.gw.cfg.API.CoAP.KeepAlive.Timeout)
	defer cancel()
	if !r.account {
		return m(p, ctx, req, format)
	}
	p.told = p.gw.live.soFar() // before anything is checked
	err := p.checkKey(ctx)
	var resp coap.Response
	if err == nil {
		resp, err = m(p, ctx, req, format)
	}
	if err != nil {
		err = accountError(err)
	}
	return resp, err
}

// fulfilled reports that the conditions of a request are (RFC 7252, Section 5.10.8). All our resources exist, and none has an
// ETag that could be given.
func fulfilled(req *coap.Message) bool {
	matches, conditional := false, false
	for i := range req.Options {
		switch o := &req.Options[i]; o.ID {
		case coap.IfNoneMatch:
			return false
		case coap.IfMatch:
			conditional = true
			matches = matches || len(o.Value) == 0
		}
	}
	return matches || !conditional
}

// Closed implements coap.ConnHandler.
func (p *peer) Closed(err error) {
	reason := closeReason(err)
	if p.sess != nil {
		p.endSession(reason, true)
	}
	p.helpers.Wait()
	p.log.Debug("connection closed", "reason", reason, "error", err)
}

// protocol is how this connection shows in a device's metadata. The client API has no number for WebSocket, which is TCP with
// other frames.
func (p *peer) protocol() hub.Protocol {
	switch info := p.conn.Info(); {
	case info.Stream && info.Secure:
		return hub.ProtocolCoAPSTCP
	case info.Stream:
		return hub.ProtocolCoAPTCP
	case info.Secure:
		return hub.ProtocolCoAPS
	}
	return hub.ProtocolCoAP
}

// dotted writes a code as RFC 7252, Section 5.1 does: "4.04".
func dotted(c codes.Code) string {
	return string([]byte{'0' + byte(c>>5&7), '.', '0' + byte(c&31)/10, '0' + byte(c&31)%10})
}
