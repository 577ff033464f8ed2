package grpcgateway

import (
	"context"
	"iter"
	"net/http"
	"strings"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// Audit is what the door needs of the audit log.
type Audit interface {
	// Record adds an entry, durably on return, whether or not ctx ended; number and time are set there.
	Record(ctx context.Context, e hub.AuditEntry) error
	// List returns entries with numbers below before (0: all), newest first, at most limit.
	List(ctx context.Context, before uint64, limit int) ([]hub.AuditEntry, error)
}

// changes reports whether an operation is one that changes something: these are in the audit log. Reading is not, also not by
// administrators.
func (o operation) changes(method string) bool {
	return o.scope != "" && o.scope != hub.ScopeRead && method != http.MethodGet && method != http.MethodHead
}

// audited runs what changes something and notes how it ended, before the answer is whole. A call whose entry cannot be
// written has happened nevertheless: the log and a metric say so, the caller is answered as if it were there. do may add to the
// entry's target.
func (g *Gateway) audited(ctx context.Context, e *hub.AuditEntry, c hub.Claims, do func() error) (err error) {
	if g.deps.Audit == nil {
		return do()
	}
	e.User, e.Owner, e.Client = c.Subject, c.Owner, c.ClientID
	e.Outcome = hub.Internal.String() // unless it ends without a panic
	defer func() {
		if failed := g.deps.Audit.Record(ctx, *e); failed != nil {
			g.log.ErrorContext(ctx, "a call is missing in the audit log", "request", e.Request, "call", e.Call, "user", e.User,
				"target", e.Target, "outcome", e.Outcome, "error", failed)
		}
	}()
	err = do()
	e.Outcome = "ok"
	if err != nil {
		e.Outcome, _ = hub.Public(err)
	}
	return err
}

// auditHTTP describes a request. Paths and queries hold no secrets: tokens and passwords are never in them.
func auditHTTP(r *http.Request, call, id string) hub.AuditEntry {
	return hub.AuditEntry{Door: "http", Call: call, Target: r.URL.RequestURI(), Remote: r.RemoteAddr, Request: id}
}

// auditGRPC describes a call by the fields that name what it is about.
func auditGRPC(ctx context.Context, call, id string, req any) hub.AuditEntry {
	e := hub.AuditEntry{Door: "grpc", Call: call, Request: id}
	if p, ok := peer.FromContext(ctx); ok {
		e.Remote = p.Addr.String()
	}
	if m, ok := req.(interface{ GetResourceId() *rapb.ResourceId }); ok {
		e.Target = m.GetResourceId().GetDeviceId() + m.GetResourceId().GetHref()
	}
	if m, ok := req.(interface{ GetDeviceId() string }); ok {
		e.Target = m.GetDeviceId()
	}
	if m, ok := req.(interface{ GetDeviceIdFilter() []string }); ok {
		e.Target = strings.Join(m.GetDeviceIdFilter()[:min(len(m.GetDeviceIdFilter()), 16)], ",")
	}
	if m, ok := req.(interface{ GetAll() bool }); ok && m.GetAll() {
		e.Target = "all"
	}
	return e
}

type auditElement struct{ hub.AuditEntry }

func (auditElement) message(string) proto.Message { return nil } // there is no such call over gRPC

func (e auditElement) appendJSON(b []byte, cursor string) []byte {
	return appendDocument(b, e.AuditEntry, cursor)
}

// auditPage is how many entries are read at a time.
const auditPage = 256

func (g *Gateway) audit(ctx context.Context, _ hub.Owner, f *filter) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		for before := f.from.seq; ; {
			es, err := g.deps.Audit.List(ctx, before, auditPage)
			if err != nil {
				yield(found{}, err)
				return
			}
			for _, e := range es {
				if !yield(found{auditElement{e}, place{device: nobody, seq: e.Number}}, nil) {
					return
				}
				before = e.Number
			}
			if len(es) < auditPage {
				return
			}
		}
	}
}

func (g *Gateway) getAudit(w http.ResponseWriter, r *request) error {
	if g.deps.Audit == nil {
		return errNoRoute
	}
	return g.writeList(w, r.simple(), listAudit, &filter{}, g.audit)
}
