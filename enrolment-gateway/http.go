package enrolmentgateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"mime"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/est"
)

// statusOf is the door's table. EST clients repeat a request on 503 with Retry-After (RFC 7030, Section 4.2.3), and know no 429.
var statusOf = map[hub.Kind]int{
	hub.Invalid:          http.StatusBadRequest,
	hub.Unauthenticated:  http.StatusUnauthorized,
	hub.Denied:           http.StatusForbidden,
	hub.NotFound:         http.StatusNotFound,
	hub.MethodNotAllowed: http.StatusMethodNotAllowed,
	hub.NotAcceptable:    http.StatusNotAcceptable,
	hub.Unsupported:      http.StatusUnsupportedMediaType,
	hub.BadOption:        http.StatusBadRequest,
	hub.Precondition:     http.StatusBadRequest,
	hub.TooLarge:         http.StatusRequestEntityTooLarge,
	hub.Conflict:         http.StatusServiceUnavailable,
	hub.Exhausted:        http.StatusServiceUnavailable,
	hub.Unavailable:      http.StatusServiceUnavailable,
	hub.Deadline:         http.StatusServiceUnavailable,
	hub.Internal:         http.StatusInternalServerError,
}

// retryAfter is told when an error does not say how long to wait.
const retryAfter = 5 * time.Second

// bodyTime bounds how long a request's body may take to arrive.
const bodyTime = 20 * time.Second

// exchangeTime bounds a request from its header to the last byte of its answer, of which some are more than a system keeps for a client
// that does not read: answerTime, and as long again for what is before and behind it.
const exchangeTime = bodyTime + 2*answerTime

// operations are the paths of EST over HTTPS (RFC 7030, Section 3.2.2), and ours.
func (g *Gateway) handler() http.Handler {
	type operation struct {
		method string // "": several
		do     func(w http.ResponseWriter, r *http.Request) error
	}
	operations := map[string]operation{
		est.Path + "cacerts":        {http.MethodGet, g.getAnchors},
		est.Path + "csrattrs":       {http.MethodGet, g.getAttributes},
		est.Path + "simpleenroll":   {http.MethodPost, func(w http.ResponseWriter, r *http.Request) error { return g.postRequest(w, r, false) }},
		est.Path + "simplereenroll": {http.MethodPost, func(w http.ResponseWriter, r *http.Request) error { return g.postRequest(w, r, true) }},
		tokenPath:                   {http.MethodPost, g.postToken},
	}
	for _, path := range scepPaths {
		operations[path] = operation{"", g.scep}
	}
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w := &recorder{ResponseWriter: rw, code: http.StatusOK}
		w.Header().Set("Connection", "close") // whoever has his answer keeps nobody out
		op, known := operations[r.URL.Path]
		name := strings.TrimPrefix(r.URL.Path, est.Path)
		defer func() {
			if v := recover(); v != nil {
				g.log.Error("a request to enrol ended in a panic", "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
				refuse(w, &hub.Error{Kind: hub.Internal})
			}
			g.count("http", name, strconv.Itoa(w.code))
		}()
		var err error
		switch {
		case !known:
			name, err = "unknown", errPath
		case op.method != "" && r.Method != op.method:
			w.Header().Set("Allow", op.method)
			err = &hub.Error{Kind: hub.MethodNotAllowed}
		default:
			rc, now := http.NewResponseController(rw), time.Now()
			_, _ = rc.SetReadDeadline(now.Add(bodyTime)), rc.SetWriteDeadline(now.Add(exchangeTime))
			err = op.do(w, r)
		}
		if err == nil {
			return
		}
		refuse(w, err)
		level := slog.LevelInfo
		if w.code >= http.StatusInternalServerError {
			level = slog.LevelWarn
		}
		g.log.Log(r.Context(), level, "a device was refused what it asked for", "remote", r.RemoteAddr, "path", r.URL.Path, "error", err)
	})
}

type recorder struct {
	http.ResponseWriter
	code int
}

func (r *recorder) WriteHeader(code int) { r.code = code; r.ResponseWriter.WriteHeader(code) }

// refuse answers with an error: a line for people, which EST allows in any form (RFC 7030, Section 4.2.3).
func refuse(w http.ResponseWriter, err error) {
	code, text := hub.Public(err)
	status := statusOf[hub.KindOf(err)]
	if code == "enrolment-waiting" {
		status = http.StatusAccepted // RFC 7030, Section 4.2.3
	}
	h := w.Header()
	if status == http.StatusAccepted || status == http.StatusServiceUnavailable {
		wait := retryAfter
		var e *hub.Error
		if errors.As(err, &e) && e.RetryAfter > 0 {
			wait = e.RetryAfter
		}
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	}
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", `Basic realm="a one-time token as the password"`) // RFC 7030, Section 3.2.3
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, code+": "+text+"\n") // a client that has gone needs no answer
}

// answer writes a body of EST. The header that says how it is encoded is for clients from before RFC 8951.
func answer(w http.ResponseWriter, mediaType string, der []byte) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Content-Transfer-Encoding", "base64")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(est.Encode(der)) // a client that has gone needs no answer
	return nil
}

func (g *Gateway) getAnchors(w http.ResponseWriter, _ *http.Request) error {
	der, err := est.Anchors(g.deps.Authority, hub.FormatCertsOnly)
	if err != nil {
		return err
	}
	return answer(w, hub.MediaType(hub.FormatCertsOnly), der)
}

func (g *Gateway) getAttributes(w http.ResponseWriter, _ *http.Request) error {
	return answer(w, hub.MediaType(hub.FormatCSRAttributes), est.Attributes)
}

func (g *Gateway) postRequest(w http.ResponseWriter, r *http.Request, renew bool) error {
	body, err := readBody(r, hub.MediaType(hub.FormatCSR))
	if err != nil {
		return err
	}
	csr, err := est.Decode(body)
	if err != nil {
		return hub.NewError(hub.Invalid, "csr-invalid", "the body is neither base64 nor DER").With("decode", err)
	}
	chain, err := g.shown(r)
	if err != nil {
		return err
	}
	proof := hub.EnrolmentProof{Chain: chain}
	if token := tokenOf(r); token != "" && !renew {
		proof = hub.EnrolmentProof{Token: token}
	}
	out, err := g.deps.Authority.Enrol(r.Context(), proof, csr, renew)
	if err != nil {
		return err
	}
	g.enrolled(r.Context(), g.log.With("remote", r.RemoteAddr), out)
	der, err := est.Certificate(out, hub.FormatCertsOnly)
	if err != nil {
		return err
	}
	return answer(w, hub.MediaType(hub.FormatCertsOnly), der)
}

// tokenOf is the one-time token of a request: the password of RFC 7617, whatever the user's name, or a bearer.
func tokenOf(r *http.Request) string {
	if _, password, ok := r.BasicAuth(); ok {
		return password
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return ""
}

// readBody reads a request's body, which says of itself that it is of that type, or nothing.
func readBody(r *http.Request, mediaType string) ([]byte, error) {
	if h := r.Header.Get("Content-Type"); h != "" {
		if t, _, err := mime.ParseMediaType(h); err != nil || t != mediaType {
			return nil, hub.NewError(hub.Unsupported, "format-unsupported", "the body must be "+mediaType)
		}
	}
	return readAtMost(r, maxBody)
}

func readAtMost(r *http.Request, most int64) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, most))
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		return nil, hub.NewError(hub.TooLarge, "body-too-large", fmt.Sprintf("the body has at most %d KiB", most>>10))
	case err != nil:
		return nil, hub.NewError(hub.Invalid, "body-incomplete", "the body did not arrive").With("read", err)
	}
	return body, nil
}

func (g *Gateway) postToken(w http.ResponseWriter, r *http.Request) error {
	body, err := readBody(r, "application/json")
	if err != nil {
		return err
	}
	var q tokenRequest
	if err := json.Unmarshal(body, &q); err != nil || q.Token == "" || q.CSR == "" {
		return errTokenBody.With("decode", err)
	}
	a, err := g.byToken(r.Context(), g.log.With("remote", r.RemoteAddr), q)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(a) // a client that has gone needs no answer
	return nil
}
