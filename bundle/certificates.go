package bundle

import (
	"cmp"
	"context"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxCertificates bounds how many entries of the ledger one call answers.
const maxCertificates = 10_000

// CertificatesRequest says which certificates of the ledger are meant: those that match all that is set. Nothing: all.
type CertificatesRequest struct {
	DeviceID string   `json:"deviceId,omitempty"`
	Owner    string   `json:"owner,omitempty"`
	Serials  []string `json:"serials,omitempty"` // hexadecimal
	Limit    int      `json:"limit,omitempty"`   // at most so many, the newest; 0: 10 000, which is the most
	PEM      bool     `json:"pem,omitempty"`     // with the certificates themselves
	// Reason is for revocations: unspecified, keyCompromise, affiliationChanged, superseded, cessationOfOperation. "": unspecified.
	Reason string `json:"reason,omitempty"`
	// Below is for lists alone: a revocation says exactly what it means.

	Name   string    `json:"name,omitempty"`          // the common name
	Method string    `json:"requestMethod,omitempty"` // csr, operator, …
	State  string    `json:"state,omitempty"`         // good, ended, revoked
	Since  time.Time `json:"since,omitzero"`          // made then or later
	Until  time.Time `json:"until,omitzero"`          // made before
}

// Certificate is an entry of the ledger.
type Certificate struct {
	Serial    string     `json:"serial"`
	DeviceID  string     `json:"deviceId"` // "": of none
	Name      string     `json:"commonName"`
	Profile   string     `json:"profile,omitempty"` // client, service; "": a device's identity
	Owner     string     `json:"owner,omitempty"`   // "": an operator made it for whoever has the device
	Method    string     `json:"requestMethod"`
	User      string     `json:"requestedBy,omitempty"`
	Key       string     `json:"publicKey"` // names it, a UUID
	Issuer    string     `json:"issuerId"`  // likewise
	Created   time.Time  `json:"created"`
	NotBefore time.Time  `json:"notBefore"`
	NotAfter  time.Time  `json:"notAfter"`
	Revoked   *time.Time `json:"revoked,omitempty"`
	Reason    string     `json:"reason,omitempty"`
	PEM       string     `json:"pem,omitempty"`
	// Terms are those of the enrolment group, and who accepted them; nil without.
	Terms *hub.Acceptance `json:"acceptedTerms,omitempty"`
}

func certificateFrom(c hub.Certificate, withPEM bool) Certificate {
	out := Certificate{
		Serial: c.Serial, DeviceID: string(c.Device), Name: c.Name, Profile: string(c.Profile), Owner: string(c.Owner), Method: string(c.How), User: c.User, Key: c.Key, Issuer: c.Issuer,
		Created: c.Created, NotBefore: c.NotBefore, NotAfter: c.NotAfter,
	}
	out.Terms = acceptance(c.Terms)
	if withPEM {
		out.PEM = c.PEM
	}
	if !c.Revoked.IsZero() {
		out.Revoked = &c.Revoked
		out.Reason = c.Reason.String()
	}
	return out
}

func certificatesFrom(cs []hub.Certificate) []Certificate {
	out := []Certificate{} // an empty list for scripts, not null
	for _, c := range cs {
		out = append(out, certificateFrom(c, false))
	}
	return out
}

func (q CertificatesRequest) filter() (hub.CertificateFilter, error) {
	f := hub.CertificateFilter{All: q.Owner == "", Owner: hub.Owner(q.Owner)}
	for _, s := range q.Serials {
		// The ledger takes one that it does not have, too: written in another way it would end a certificate that nobody has.
		serial, err := hub.ParseSerial(s)
		if err != nil {
			return f, err
		}
		f.Serials = append(f.Serials, serial)
	}
	if q.DeviceID != "" {
		dev, err := hub.ParseDeviceID(q.DeviceID)
		if err != nil {
			return f, err
		}
		f.Devices = []hub.DeviceID{dev}
	}
	return f, nil
}

// found yields the certificates that a search means, in no order. An error is the last element.
func (a *assembly) found(ctx context.Context, q CertificatesRequest) iter.Seq2[Certificate, error] {
	return func(yield func(Certificate, error) bool) {
		f, err := q.filter()
		if q.Name != "" {
			f.Names = []string{q.Name}
		}
		if q.State != "" && q.State != "good" && q.State != "ended" && q.State != "revoked" {
			err = hub.NewError(hub.Invalid, "state-unknown", "the states are good, ended and revoked")
		}
		if err != nil {
			yield(Certificate{}, err)
			return
		}
		now := time.Now()
		for c, err := range a.certificates.Certificates(ctx, f) {
			if err != nil {
				yield(Certificate{}, err)
				return
			}
			out := certificateFrom(c, q.PEM)
			switch {
			case q.Method != "" && q.Method != out.Method, q.State != "" && q.State != out.State(now),
				out.Created.Before(q.Since), !q.Until.IsZero() && !out.Created.Before(q.Until):
				continue
			}
			if !yield(out, nil) {
				return
			}
		}
	}
}

// State is good, ended or revoked; what was revoked before its end stays so.
func (c *Certificate) State(now time.Time) string {
	switch {
	case c.Revoked != nil:
		return "revoked"
	case !now.Before(c.NotAfter):
		return "ended"
	}
	return "good"
}

// listCertificates answers the newest entries of the ledger, newest first.
func (a *assembly) listCertificates(ctx context.Context, q CertificatesRequest) ([]Certificate, error) {
	limit := cmp.Or(q.Limit, maxCertificates)
	if limit < 0 || limit > maxCertificates {
		return nil, hub.NewError(hub.Invalid, "limit-invalid", "the limit is from 1 to 10000")
	}
	out := []Certificate{}
	newestFirst := func(a, b Certificate) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.Serial, b.Serial))
	}
	for c, err := range a.found(ctx, q) {
		if err != nil {
			return nil, err
		}
		out = append(out, c)
		if len(out) >= 2*limit { // the ledger has no order of time
			slices.SortFunc(out, newestFirst)
			out = out[:limit]
		}
	}
	slices.SortFunc(out, newestFirst)
	return out[:min(limit, len(out))], nil
}

// exportLine is a line of an export. The last one is an error, or says that it is.
type exportLine struct {
	Certificate *Certificate `json:"certificate,omitempty"`
	Error       *wireError   `json:"error,omitempty"`
	Last        bool         `json:"last,omitempty"`
}

// exportCertificates answers all certificates that are meant as they are read, however many they are.
func (a *assembly) exportCertificates(ctx context.Context, q CertificatesRequest) (iter.Seq[exportLine], error) {
	if q.Limit != 0 {
		return nil, hub.NewError(hub.Invalid, "limit-invalid", "an export has no limit")
	}
	return func(yield func(exportLine) bool) {
		for c, err := range a.found(ctx, q) {
			if err != nil {
				code, text := hub.Public(err)
				a.log.ErrorContext(ctx, "an export of the certificates' ledger ended before its end", "error", err)
				yield(exportLine{Error: &wireError{hub.KindOf(err), code, text}})
				return
			}
			if !yield(exportLine{Certificate: &c}) {
				return
			}
		}
		yield(exportLine{Last: true})
	}, nil
}

// revokeCertificates revokes what is named, and answers what was good until then. Nothing named is no way to say all.
func (a *assembly) revokeCertificates(ctx context.Context, q CertificatesRequest) ([]Certificate, error) {
	f, err := q.filter()
	if err != nil {
		return nil, err
	}
	reason, err := hub.ParseRevocationReason(cmp.Or(q.Reason, "unspecified"))
	if err != nil {
		return nil, err
	}
	if q.Name != "" || q.Method != "" || q.State != "" || !q.Since.IsZero() || !q.Until.IsZero() {
		return nil, hub.NewError(hub.Invalid, "filter-invalid", "a revocation names certificates, or a device, and looks for nothing")
	}
	if len(f.Serials) == 0 && len(f.Devices) == 0 {
		return nil, hub.NewError(hub.Invalid, "filter-empty", "name certificates or a device")
	}
	revoked, err := a.certificates.Revoke(ctx, f, reason)
	a.logRevoked(ctx, revoked)
	return certificatesFrom(revoked), err
}

// ReportRequest asks how the fleet is off for certificates.
type ReportRequest struct {
	Within time.Duration `json:"within"` // nanoseconds; what ends in that time ends soon
}

// CertificateReport is the answer. Lists have at most 1000 entries.
type CertificateReport struct {
	Good       int           `json:"good"`
	Ended      int           `json:"ended"` // in the last 90 days
	Revoked    int           `json:"revoked"`
	Expires    int           `json:"expires"`  // devices whose last certificate ends soon
	Expiring   []Certificate `json:"expiring"` // those, the first first
	SharedKeys int           `json:"sharedKeys"`
	Shared     []Certificate `json:"shared"` // certificates of one key for several devices, by key
	WeakKeys   int           `json:"weakKeys"`
	Weak       []Certificate `json:"weak"` // good certificates of RSA keys below 3072 bits
	// Keys counts the good certificates by the kind of their key: P-256, RSA-2048.
	Keys map[string]int `json:"keys"`
	// Sessions are how the devices that are here are encrypted, most first.
	Sessions []SessionSecurity `json:"sessions"`
}

// SessionSecurity is how many sessions are encrypted in a way.
type SessionSecurity struct {
	TLS      string `json:"tls,omitempty"` // version; "" for those that are not encrypted
	Suite    string `json:"suite,omitempty"`
	Sessions int    `json:"sessions"`
	Old      bool   `json:"old,omitempty"` // no encryption that new devices should have (RFC 9325, Sections 3.1 and 4.2)
}

func (a *assembly) sessionSecurity(ctx context.Context) []SessionSecurity {
	out := []SessionSecurity{}
	for s, n := range a.doors.security(ctx) {
		out = append(out, SessionSecurity{TLS: s.TLSVersion, Suite: s.Suite, Sessions: n, Old: s.TLSVersion == "" || strings.Contains(s.Suite, "_CBC_")})
	}
	slices.SortFunc(out, func(a, b SessionSecurity) int {
		return cmp.Or(cmp.Compare(b.Sessions, a.Sessions), cmp.Compare(a.TLS, b.TLS), cmp.Compare(a.Suite, b.Suite))
	})
	return out
}

func (a *assembly) reportCertificates(ctx context.Context, q ReportRequest) (CertificateReport, error) {
	if q.Within < 0 {
		return CertificateReport{}, hub.NewError(hub.Invalid, "limit-invalid", "the time is negative")
	}
	r, err := a.certificates.Report(ctx, "", q.Within)
	return CertificateReport{
		Good: r.Good, Ended: r.Ended, Revoked: r.Revoked, Expires: r.Expires, Expiring: certificatesFrom(r.Expiring),
		SharedKeys: r.SharedKeys, Shared: certificatesFrom(r.Shared), WeakKeys: r.WeakKeys, Weak: certificatesFrom(r.Weak),
		Keys: r.Keys, Sessions: a.sessionSecurity(ctx),
	}, err
}
