package coapgateway

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
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
	closing   atomic.Bool      // an answer was given after which the connection ends; the engine's refusals set it too
	request   uint64           // counts requests, for the log
	told      uint64           // how many ends of credentials were told when the account request under way began
	bucket    admission.Bucket // what the device has left of its rate
	helpers   sync.WaitGroup
	// later is set by the method that is being called, to answer beside the connection's goroutine.
	later func(context.Context) (coap.Response, error)
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
	foreign bool // bodies are other devices': what Accept and conditions mean is the method's to say
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
	"/oic/res":         {session: true, methods: map[codes.Code]method{codes.GET: (*peer).discover}},
	"/x.plgd.dev/time": {own: true, methods: map[codes.Code]method{codes.GET: (*peer).hubTime}},
	// Bodies are in formats of their own.
	est.Path + "crts":   {own: true, foreign: true, methods: map[codes.Code]method{codes.GET: (*peer).estAnchors}},
	est.Path + "att":    {own: true, foreign: true, methods: map[codes.Code]method{codes.GET: (*peer).estAttributes}},
	est.Path + "sren":   {own: true, foreign: true, methods: map[codes.Code]method{codes.POST: (*peer).estRenew}},
	"/.well-known/core": {own: true, methods: map[codes.Code]method{codes.GET: (*peer).core}},
}

// Request implements coap.ConnHandler. The order of refusals is path, method, session, rate, format, body: a 4.01 costs a device
// its token, so nothing is 4.01 that would not work with a session either.
func (p *peer) Request(ctx context.Context, req *coap.Message) coap.Response {
	if p.closing.Load() {
		return coap.Response{Silent: true} // what came behind the refused request is not carried out
	}
	p.request++
	path := pathOf(req)
	r, label, known := routeOf(path)
	a := asked{route: r, label: label, path: path, req: req, number: p.request, start: time.Now()}
	var resp coap.Response
	var err error
	p.later = nil
	if !p.conn.Guard("request", func() { resp, err = p.answer(ctx, r, known, path, req) }) {
		err, p.later = &hub.Error{Kind: hub.Internal}, nil // the engine would answer 5.00; here it is trouble of ours like any other
	}
	if later := p.later; later != nil {
		s := p.sess
		return coap.Response{Later: func(ctx context.Context) (resp coap.Response) {
			var err error
			if !p.conn.Guard("request", func() { resp, err = later(ctx) }) {
				err = &hub.Error{Kind: hub.Internal}
			}
			return p.answered(ctx, a, s, resp, err)
		}}
	}
	return p.answered(ctx, a, p.sess, resp, err)
}

var errNoPath = hub.NewError(hub.NotFound, "path-unknown", "there is nothing at this path")

// asked is a request that is being answered.
type asked struct {
	route
	label, path string
	req         *coap.Message
	number      uint64
	start       time.Time
}

// answered makes err the answer, if there is one, and records it. s is the session of who asked, nil for none. It may be
// called from any goroutine.
func (p *peer) answered(ctx context.Context, a asked, s *session, resp coap.Response, err error) coap.Response {
	if err != nil {
		resp = a.failure(a.req, err)
		if a.account || resp.Code == codes.Unauthorized {
			p.close()
		}
		if s != nil {
			code, _ := hub.Public(err)
			p.gw.devices.failed(s.own.Device, s.number, code)
		}
	}
	resp.Challenge = a.own
	p.gw.metrics.requests.WithLabelValues(a.label, coap.Dotted(resp.Code)).Inc()
	level := slog.LevelDebug
	if err != nil && ours(err) {
		level = slog.LevelWarn // somebody of ours must look at it; faults of devices are for their makers
	}
	if p.log.Enabled(ctx, level) {
		log := p.log
		if s != nil {
			log = s.log
		}
		args := []any{
			"request", a.number, "method", coap.Dotted(a.req.Code), "path", a.path, "code", coap.Dotted(resp.Code), "took", time.Since(a.start),
		}
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
	r, label, _ := routeOf(pathOf(req))
	p.gw.metrics.requests.WithLabelValues(label, "refused").Inc()
	if r.account {
		p.close()
	}
}

// close ends the connection once the answer has had time to arrive; no request is carried out any more. Over UDP and DTLS
// the engine then goes on to answer duplicates of the request for a while, since the answer may be lost. It may be called
// from any goroutine, and more than once.
func (p *peer) close() {
	if p.closing.CompareAndSwap(false, true) {
		p.conn.CloseAnswered(closeDelay)
	}
}

func (p *peer) answer(ctx context.Context, r route, known bool, path string, req *coap.Message) (coap.Response, error) {
	if !known && req.Code <= codes.Code(hub.MethodIPatch) { // what is no method is 4.05 wherever it goes (RFC 7252, Section 5.8)
		return coap.Response{}, errNoPath
	}
	m, ok := r.methods[req.Code]
	if !ok {
		return coap.Response{}, &hub.Error{Kind: hub.MethodNotAllowed}
	}
	if r.session && p.sess == nil {
		return coap.Response{}, unauthenticated("not-signed-in", "nobody is signed in on this connection")
	}
	if r.session && p.sess.apart && path != "/oic/rd" { // a copy of a device is to learn of, and reach, nobody
		return coap.Response{}, errQuarantined
	}
	if !r.account && (path != "/oic/rd" || req.Code != codes.GET) { // which keeps a session alive, and is never refused
		if err := p.admit(r); err != nil {
			return coap.Response{}, err
		}
	}
	if !r.foreign && !fulfilled(req) {
		return coap.Response{}, &hub.Error{Kind: hub.Precondition}
	}
	var format int32
	if !r.foreign && path != "/.well-known/core" && req.Code != codes.DELETE { // they have their own format, and none
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
	err := p.checkCredential(ctx)
	if err != nil {
		p.refuse("account", p.cred.device, "", err)
	}
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
