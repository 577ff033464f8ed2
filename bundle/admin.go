package bundle

import (
	"context"
	"net/http"
	"slices"
	"strings"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
)

// administration is what administrators do over the API: the same as over the socket.
type administration struct{ a *assembly }

func (d administration) Refused(ctx context.Context) []grpcgateway.Refusal {
	var out []grpcgateway.Refusal
	for _, r := range d.a.doors.refused(ctx) {
		out = append(out, grpcgateway.Refusal{Time: r.Time.UTC(), Remote: r.Remote, Device: string(r.Device), What: r.What, Reason: r.Reason})
	}
	return out
}

func (d administration) RefusedOf(ctx context.Context, owner hub.Owner) ([]grpcgateway.Refusal, error) {
	all := d.Refused(ctx)
	mine, err := d.a.identities.Devices(ctx, owner)
	if err != nil {
		return nil, err
	}
	sees := map[string]bool{"": false}
	var rest []string
	for _, r := range all {
		if _, known := sees[r.Device]; known {
			continue
		}
		_, sees[r.Device] = slices.BinarySearch(mine, hub.DeviceID(r.Device))
		if !sees[r.Device] {
			rest = append(rest, r.Device)
		}
	}
	if len(rest) > 0 {
		awaited, err := d.awaited(ctx, owner)
		if err != nil {
			return nil, err
		}
		for _, dev := range rest {
			if !awaited[hub.DeviceID(dev)] {
				continue
			}
			own, err := d.a.ownership(ctx, owner, hub.DeviceID(dev)) // it may be another's meanwhile
			if err != nil && !hub.IsKind(err, hub.Denied) {
				return nil, err
			}
			sees[dev] = err == nil && (own.Owner == "" || own.Owner == owner)
		}
	}
	return slices.DeleteFunc(all, func(r grpcgateway.Refusal) bool { return !sees[r.Device] }), nil
}

// awaited are the devices for which an owner has a code of the embedded provider, or an enrolment token, that was not used.
func (d administration) awaited(ctx context.Context, owner hub.Owner) (out map[hub.DeviceID]bool, err error) {
	out = map[hub.DeviceID]bool{}
	if d.a.provider != nil {
		if out, err = d.a.provider.Awaited(ctx, owner); err != nil {
			return nil, err
		}
	}
	tokens, err := d.a.certificates.Tokens(ctx, owner)
	for _, t := range tokens {
		if t.Used.IsZero() && t.Device != "" {
			out[t.Device] = true
		}
	}
	return out, err
}

func (d administration) Accounts(ctx context.Context) ([]grpcgateway.Account, error) {
	if d.a.provider == nil {
		return nil, errNoProvider.With("accounts", nil)
	}
	accounts, err := d.a.provider.ListUsers(ctx)
	var out []grpcgateway.Account
	for _, a := range accounts {
		out = append(out, accountFrom(a))
	}
	return out, err
}

func accountFrom(a oauthserver.Account) grpcgateway.Account {
	return grpcgateway.Account{Name: a.Name, Roles: a.Roles, MustChange: a.MustChange, Created: a.Created.UTC(), LastLogin: a.LastLogin.UTC()}
}

// account reads an account after a change of it.
func (d administration) account(ctx context.Context, name string, err error) (grpcgateway.Account, error) {
	if err != nil {
		return grpcgateway.Account{}, err
	}
	accounts, err := d.a.provider.ListUsers(ctx)
	for _, a := range accounts {
		if strings.EqualFold(a.Name, name) {
			return accountFrom(a), nil
		}
	}
	return grpcgateway.Account{Name: name}, err
}

func (d administration) AddAccount(ctx context.Context, name, password string, roles []string) (grpcgateway.Account, string, error) {
	if d.a.provider == nil {
		return grpcgateway.Account{}, "", errNoProvider.With("add account", nil)
	}
	oneTime, err := d.a.provider.AddUser(ctx, name, password, roles)
	a, err := d.account(ctx, name, err)
	return a, oneTime, err
}

func (d administration) SetPassword(ctx context.Context, name, password string) (grpcgateway.Account, string, error) {
	if d.a.provider == nil {
		return grpcgateway.Account{}, "", errNoProvider.With("set password", nil)
	}
	oneTime, err := d.a.provider.SetPassword(ctx, name, password)
	a, err := d.account(ctx, name, err)
	return a, oneTime, err
}

func (d administration) SetRoles(ctx context.Context, name string, roles []string) (grpcgateway.Account, error) {
	if d.a.provider == nil {
		return grpcgateway.Account{}, errNoProvider.With("set roles", nil)
	}
	return d.account(ctx, name, d.a.provider.SetRoles(ctx, name, roles))
}

// auditRequest asks for the newest entries of the audit log.
type auditRequest struct {
	Before uint64 `json:"before,omitempty"` // only entries with lower numbers; 0: all
	Limit  int    `json:"limit"`
}

// maxAudit is how many entries one call over the socket gets.
const maxAudit = 10_000

func (a *assembly) auditLog(ctx context.Context, q auditRequest) ([]hub.AuditEntry, error) {
	if q.Limit < 1 || q.Limit > maxAudit {
		return nil, hub.NewError(hub.Invalid, "limit-invalid", "the limit is from 1 to 10000")
	}
	return a.audit.List(ctx, q.Before, q.Limit)
}

// Audit lists the newest entries of the audit log, newest first: at most limit of those with numbers below before (0: all).
func (c *Control) Audit(ctx context.Context, before uint64, limit int) (es []hub.AuditEntry, err error) {
	err = c.call(ctx, http.MethodPost, "/audit", auditRequest{before, limit}, &es)
	return es, err
}

// socketReads are the calls over the socket that change nothing; all others are in the audit log.
var socketReads = map[string]bool{
	"GET /status": true, "GET /refused": true, "GET /users": true, "POST /device": true, "POST /ca/root": true, "GET /ca/parts": true, "POST /audit": true,
	"POST /enrolment/groups": true, "POST /enrolment/tokens": true, "POST /enrolments": true,
	"POST /certificates": true, "POST /certificates/export": true, "POST /certificates/report": true, "POST /devices/access": true, "GET /quarantine": true, "POST /quarantine/show": true, "GET /deny": true,
	"POST /checkpoint": true, "POST /checkpoint/release": true, // verify and backup: they read
}

// What calls over the socket are about, for the audit log.

func (q OnboardRequest) target() string { return q.DeviceID }

func (q CertificatesRequest) target() string {
	about := slices.DeleteFunc([]string{q.DeviceID, strings.Join(q.Serials[:min(16, len(q.Serials))], " "), q.Reason}, func(s string) bool { return s == "" })
	return strings.Join(about, " ")
}

func (q TokenRequest) target() string { return q.Owner }

func (q UserRequest) target() string { return q.Name }

func (q issueRequest) target() string { return q.DeviceID }

func (q RollRequest) target() string { return q.Which + " " + q.Step }

func (q retireRequest) target() string { return q.ID }

func (q rootRequest) target() string { return q.Which }

func (q forgetRequest) target() string { return q.Which }
