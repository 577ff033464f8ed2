package bundle

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/obs"
)

// maxSun is the length of a socket's path that every system takes (sun_path on Linux: 108 bytes with a final zero).
const maxSun = 107

// socketPath returns a path by which the data folder's socket can be bound or dialled. Longer ones go through a descriptor
// of the folder, which release closes.
func socketPath(data string) (path string, release func(), err error) {
	path = filepath.Join(data, socketFile)
	if len(path) <= maxSun {
		return path, func() {}, nil
	}
	fd, err := unix.Open(data, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", nil, fmt.Errorf("open the data folder: %w", err)
	}
	return fmt.Sprintf("/proc/self/fd/%d/%s", fd, socketFile), func() { _ = unix.Close(fd) }, nil
}

// serveSocket answers h on the folder's socket until ctx ends. Who may open the socket is decided by the folder's
// permissions (0700) and the socket's own (0600): whoever can is administrator.
func serveSocket(ctx context.Context, f *Folder, h http.Handler, m *socketMetrics, record recordFunc, log *slog.Logger, ready func()) error {
	path, release, err := socketPath(f.Path)
	if err != nil {
		return err
	}
	defer release()
	// A socket that is there is a dead one: the folder's lock is ours.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove an old socket: %w", err)
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listen on the data folder's socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return errors.Join(err, ln.Close())
	}
	return obs.ServeHTTP(ctx, peerListener{ln}, audited(h, m, record, log), 2*time.Second, log, ready)
}

// peerListener notes who is at the other end of each connection, as its remote address.
type peerListener struct{ net.Listener }

func (l peerListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		cred, err := peerOf(c)
		if err != nil { // nobody known, no service
			_ = c.Close()
			continue
		}
		return peerConn{c, cred}, nil
	}
}

type peerConn struct {
	net.Conn
	cred *unix.Ucred
}

// RemoteAddr is user and process of the peer, which http.Request.RemoteAddr then holds.
func (c peerConn) RemoteAddr() net.Addr { return peerAddr(*c.cred) }

type peerAddr unix.Ucred

func (peerAddr) Network() string  { return "unix" }
func (a peerAddr) String() string { return fmt.Sprintf("uid=%d,pid=%d", a.Uid, a.Pid) }

func peerOf(c net.Conn) (cred *unix.Ucred, err error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, errors.New("not a Unix socket")
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	if err2 := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err2 != nil {
		return nil, err2
	}
	return cred, err
}

// recordFunc adds an entry to the audit log, also if the caller has gone.
type recordFunc = func(context.Context, hub.AuditEntry) error

// audited counts each call and writes a line about it: at debug level for reading the status, which scripts do all the time.
// Those that change something are in the audit log too. A panic ends one call.
func audited(h http.Handler, m *socketMetrics, record recordFunc, log *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name := "unknown"
		rec := &statusRecorder{ResponseWriter: w, code: http.StatusOK}
		user := userOf(r.RemoteAddr)
		r = r.WithContext(context.WithValue(r.Context(), callerKey{}, user))
		defer func() {
			how := outcome(rec.code)
			if v := recover(); v != nil {
				how = "panic"
				log.Error("call over the socket panicked", "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
				refuse(rec, &hub.Error{Kind: hub.Internal})
			}
			m.calls.WithLabelValues(name, how).Inc()
			level := slog.LevelInfo
			if name == "GET /status" {
				level = slog.LevelDebug
			}
			log.Log(r.Context(), level, "administrator's call over the socket",
				"peer", r.RemoteAddr, "user", user, "call", r.Method+" "+r.URL.Path, "answer", rec.code)
			if name == "unknown" || socketReads[name] {
				return
			}
			err := record(r.Context(), hub.AuditEntry{
				Door: "socket", Call: name, User: user, Remote: r.RemoteAddr, Target: rec.target,
				Outcome: cmp.Or(rec.reason, "ok"),
			})
			if err != nil {
				log.ErrorContext(r.Context(), "a call over the socket is missing in the audit log", "call", name, "error", err)
			}
		}()
		if mux, ok := h.(*http.ServeMux); ok { // the pattern and not the path, which anybody chooses
			if _, pattern := mux.Handler(r); pattern != "" && pattern != "/" {
				name = pattern
			}
		}
		h.ServeHTTP(rec, r)
	})
}

type statusRecorder struct {
	http.ResponseWriter
	code   int
	reason string // stable code of the error that was answered
	target string // what the call is about
}

func (r *statusRecorder) WriteHeader(code int) { r.code = code; r.ResponseWriter.WriteHeader(code) }

// userOf names the user of a peerAddr's text, as well as this system knows.
func userOf(peer string) string {
	var uid, pid int
	if _, err := fmt.Sscanf(peer, "uid=%d,pid=%d", &uid, &pid); err != nil {
		return ""
	}
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		return u.Username
	}
	return strconv.Itoa(uid)
}

type callerKey struct{}

// callerOf names the user who makes the call over the socket.
func callerOf(ctx context.Context) string {
	user, _ := ctx.Value(callerKey{}).(string)
	return user
}

// statusOf says with which HTTP status a kind of error is answered on the socket. The client reads kind and code from the
// body; the status is for people with curl.
func statusOf(k hub.Kind) int {
	switch k {
	case hub.Invalid, hub.BadOption, hub.Unsupported, hub.NotAcceptable, hub.TooLarge:
		return http.StatusBadRequest
	case hub.Unauthenticated:
		return http.StatusUnauthorized
	case hub.Denied:
		return http.StatusForbidden
	case hub.NotFound:
		return http.StatusNotFound
	case hub.MethodNotAllowed:
		return http.StatusMethodNotAllowed
	case hub.Conflict, hub.Precondition:
		return http.StatusConflict
	case hub.Exhausted:
		return http.StatusTooManyRequests
	case hub.Unavailable:
		return http.StatusServiceUnavailable
	case hub.Deadline:
		return http.StatusGatewayTimeout
	case hub.Internal:
		return http.StatusInternalServerError
	}
	return http.StatusInternalServerError
}

// wireError is an error on the socket.
type wireError struct {
	Kind    hub.Kind `json:"kind"`
	Code    string   `json:"code"`
	Message string   `json:"message"`
}

func refuse(w http.ResponseWriter, err error) {
	code, text := hub.Public(err)
	if rec, ok := w.(*statusRecorder); ok {
		rec.reason = code
	}
	reply(w, statusOf(hub.KindOf(err)), wireError{hub.KindOf(err), code, text})
}

func reply(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the caller is gone, nobody to tell
}

// maxCall bounds the body of a call. A group may name 100 000 devices.
const maxCall = 8 << 20

// call makes a handler of a function from request to answer.
func call[Q, A any](do func(ctx context.Context, q Q) (A, error), log *slog.Logger) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		var q Q
		dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxCall))
		dec.DisallowUnknownFields()
		if err := dec.Decode(&q); err != nil && !errors.Is(err, io.EOF) {
			refuse(w, &hub.Error{Kind: hub.Invalid, Code: "request-malformed", Text: "the call's body is not what was expected", Err: err})
			return
		}
		if rec, ok := w.(*statusRecorder); ok {
			if named, ok := any(q).(interface{ target() string }); ok {
				rec.target = named.target()
			}
		}
		a, err := do(r.Context(), q)
		if err != nil {
			if k := hub.KindOf(err); k == hub.Internal || k == hub.Unavailable {
				log.Error("call over the socket failed", "call", r.URL.Path, "error", err)
			}
			refuse(w, err)
			return
		}
		if lines, ok := any(a).(iter.Seq[exportLine]); ok {
			replyLines(w, lines)
			return
		}
		reply(w, http.StatusOK, a)
	}
}

// replyLines answers one line of JSON after another.
func replyLines(w http.ResponseWriter, lines iter.Seq[exportLine]) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	for line := range lines {
		if enc.Encode(line) != nil {
			return // the caller is gone, nobody to tell
		}
	}
}
