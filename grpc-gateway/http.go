package grpcgateway

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// request is an HTTP request of the API that may be carried out.
type request struct {
	*http.Request
	claims hub.Claims // zero for public operations
	token  string     // what they were read from
	vars   vars
	query  query
	proto  bool // protobuf's JSON instead of the simple form
	cbor   bool // CBOR instead of it
	// target is what the audit log will say the call was about; nil for reads. Who carries it out may add what the path does not
	// say.
	target *string
}

// newHandler is everything that applies to every request, from the outside in.
func (g *Gateway) newHandler() http.Handler {
	cross := http.NewCrossOriginProtection()
	cross.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		g.metrics.refused.WithLabelValues("origin").Inc()
		writeError(w, errCrossOrigin)
	}))
	inner := cross.Handler(http.HandlerFunc(g.route))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !g.hosts[canonicalHost(r.Host)] { // DNS rebinding
			g.metrics.refused.WithLabelValues("host").Inc()
			writeError(w, errHost)
			return
		}
		if g.crossOrigin(w, r) { // of the configuration: what protects against the others would refuse it
			if r.Method == http.MethodOptions {
				preflight(w)
				return
			}
			g.route(w, r)
			return
		}
		inner.ServeHTTP(w, r)
	})
}

// requestID makes the text that joins an answer with what the log says about it.
func requestID() string { return rand.Text()[:16] }

// canonicalHost takes the port and the brackets of an IPv6 address away.
func canonicalHost(h string) string {
	if host, _, err := net.SplitHostPort(h); err == nil {
		h = host
	}
	h = strings.TrimSuffix(strings.ToLower(strings.Trim(h, "[]")), ".")
	if ip := net.ParseIP(h); ip != nil {
		return ip.String()
	}
	return h
}

// route finds the operation and runs it. What it does not know goes to Deps.Pages, unless its path is the API's.
func (g *Gateway) route(rw http.ResponseWriter, r *http.Request) {
	template, v, err := split(r.URL.EscapedPath())
	page := g.deps.Pages != nil && (template == "" && !ofAPI(r.URL.Path) || template == "/" && forPeople(r))
	method := r.Method
	if method == http.MethodHead { // net/http leaves the body away
		method = http.MethodGet
	}
	op, found := routes[template][method]
	if op.stream && r.Method == http.MethodHead { // a stream has no head to look at
		op, found = operation{}, false
	}
	call := op.id
	switch {
	case page:
		call = "page"
	case !found:
		call = "unknown"
	}
	w := &writer{ResponseWriter: rw, control: http.NewResponseController(rw), stall: g.cfg.Limits.StallTimeout}
	begun := time.Now()
	if r.ContentLength != 0 {
		by := begun.Add(g.cfg.Limits.RequestTimeout)
		_ = w.control.SetReadDeadline(by) // tests' recorders have none
		if r.ProtoMajor == 1 {            // there net/http reads it before it answers, also one that nobody wants
			w.bodyBy = by
		}
		r = r.WithContext(r.Context()) // net/http looks at the body of its own: whether it was asked to continue, and what is left
		r.Body = &timedBody{r.Body, w}
	}
	id := requestID()
	w.Header().Set("X-Request-Id", id)
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler { //nolint:errorlint // net/http compares it like this too
				panic(p)
			}
			g.metrics.panics.WithLabelValues("http").Inc()
			g.log.Error("a request ended in a panic", "request", id, "method", r.Method, "call", call, "panic", p, "stack", string(debug.Stack()))
			err = &hub.Error{Kind: hub.Internal, Op: "http." + call}
			if w.status == 0 {
				writeError(w, err)
			}
		}
		outcome := "ok"
		switch {
		case err != nil && gone(r.Context()), errors.Is(err, errGone):
			outcome = "gone"
		case err != nil:
			outcome = hub.KindOf(err).String()
		}
		took := time.Since(begun)
		g.metrics.requests.WithLabelValues("http", call, outcome).Inc()
		if !op.stream { // how long somebody listened says nothing about us
			g.metrics.seconds.WithLabelValues("http", call).Observe(took.Seconds())
		}
		g.log.LogAttrs(r.Context(), slog.LevelDebug, "request", slog.String("request", id), slog.String("method", r.Method), slog.String("call", call),
			slog.Int("status", w.status), slog.String("outcome", outcome), slog.Duration("took", took))
		if w.cut { // the last line says so; breaking off the connection says it to everybody
			_ = w.control.Flush() // breaking off would drop what is not sent yet
			panic(http.ErrAbortHandler)
		}
	}()
	ctx := r.Context()
	if !op.stream {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, g.cfg.Limits.RequestTimeout)
		defer cancel()
	}
	if page {
		err = nil
		g.deps.Pages.ServeHTTP(pagesFor(w, r), r.WithContext(ctx))
		return
	}
	if err = g.serve(ctx, w, r, template, v, op, found, err); err == nil {
		return
	}
	if hub.KindOf(err) == hub.Internal && !errors.Is(err, errGone) {
		g.log.Error("a request failed", "request", id, "call", call, "error", err)
	}
	if w.status == 0 {
		writeError(w, err)
	}
}

func (g *Gateway) serve(ctx context.Context, w *writer, r *http.Request, template string, v vars, op operation, found bool, bad error) error {
	presented := authorization(r)
	switch {
	case template == "":
		if ofAPI(r.URL.Path) { // strangers do not learn which paths there are
			if _, err := g.authorize(ctx, presented, hub.ScopeRead); err != nil {
				return err
			}
		}
		return errNoRoute
	case !found:
		w.Header().Set("Allow", allow(template))
		return errNoMethod
	}
	req := &request{
		Request: r, token: bearer(presented), vars: v,
		proto: r.Header.Get("Accept") == "application/protojson", cbor: wantsCBOR(r),
	}
	var err error
	if op.scope != "" {
		if req.claims, err = g.authorize(ctx, presented, op.scope); err != nil {
			return err
		}
		in, err := g.admit.enter(ctx, req.claims.Owner, op.stream)
		if err != nil {
			return err
		}
		defer in.leave()
		ctx = context.WithValue(ctx, admittedKey{}, in)
		w.Header().Set("Cache-Control", "private, no-cache") // what it says belongs to one owner
		w.Header().Add("Vary", "Accept, Authorization")
	}
	req.Request = r.WithContext(ctx)
	switch {
	case bad != nil:
		return bad
	case r.ContentLength > int64(g.cfg.Limits.MaxBodyBytes):
		return errBody
	}
	req.Body = http.MaxBytesReader(w, r.Body, int64(g.cfg.Limits.MaxBodyBytes))
	if req.query, err = parseQuery(r.URL.RawQuery); err != nil {
		return err
	}
	serve := func() error { return op.serve(g, w, req) }
	if op.changes(r.Method) {
		e := auditHTTP(r, op.id, w.Header().Get("X-Request-Id"))
		req.target = &e.Target
		err = g.audited(ctx, &e, req.claims, serve)
	} else {
		err = serve()
	}
	w.proto = req.proto // what the body is in says it too
	return err
}

func allow(template string) string {
	var m []string
	for method, op := range routes[template] {
		m = append(m, method)
		if method == http.MethodGet && !op.stream {
			m = append(m, http.MethodHead)
		}
	}
	slices.Sort(m)
	return strings.Join(m, ", ")
}

// writer remembers what was answered, and gives each write a deadline of its own: a reader that takes nothing for so long
// is cut off, one that is slow is not.
type writer struct {
	http.ResponseWriter
	control *http.ResponseController
	stall   time.Duration
	status  int
	bodyBy  time.Time // until when the rest of the request's body may come before the answer; zero when there is none
	proto   bool      // an error is told in protobuf's JSON
	cut     bool      // the answer ended with an error after it had begun
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *writer) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *writer) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	from := time.Now()
	if w.bodyBy.After(from) {
		from = w.bodyBy // what is left of the body comes first
	}
	_ = w.control.SetWriteDeadline(from.Add(w.stall)) // tests' recorders have none
	return w.ResponseWriter.Write(b)
}

// timedBody is a body that has to be there by a deadline, which goes with its end.
type timedBody struct {
	io.ReadCloser
	w *writer
}

func (b *timedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		b.w.bodyBy = time.Time{}
		_ = b.w.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

// contentType of an answer in one of the two forms. protobuf's JSON has the name that other hubs give it.
func (r *request) contentType() string {
	if r.proto {
		return "application/jsonpb"
	}
	return "application/json"
}

// writeOne answers with one message that has no wrapper.
func writeOne(w http.ResponseWriter, r *request, e element) error {
	b, err := appendElement(make([]byte, 0, 1024), r, e, "")
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if w.Header().Get("ETag") != "" { // a twin has its device's
		return writeBody(w, r, r.contentType(), b)
	}
	return writeTagged(w, r, r.contentType(), b)
}

func writeBody(w http.ResponseWriter, r *request, contentType string, b []byte) error {
	contentType, b, err := r.inForm(contentType, b)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("X-Content-Type-Options", "nosniff")
	out, done := compress(w, r.Request, len(b))
	if out == w {
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	}
	_, _ = out.Write(b) // a client that is gone needs no answer
	done()
	return nil
}
