package grpcgateway

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"iter"
	"math/big"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coaphub/coaphub/hub"
)

// Certificates of devices. Everybody, administrators too, sees those of his own owner. Over HTTP these calls have one
// form, which is protobuf's JSON of other hubs with members of our own.

// certificateFilter reads which certificates are meant. Filters of different kinds narrow each other.
func certificateFilter(devices, serials, names []string) (filter, error) {
	f, err := newFilter(devices, nil, nil)
	if err != nil {
		return f, err
	}
	if len(serials) > maxFilter || len(names) > maxFilter {
		return f, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	}
	for i, s := range serials {
		serial, err := hub.ParseSerial(s)
		if err != nil {
			return f, badFilter("idFilter", i, invalid("filter-invalid", "this is no serial number in hexadecimal digits"))
		}
		f.serials = append(f.serials, serial)
	}
	for i, name := range names {
		if name == "" {
			return f, badFilter("commonNameFilter", i, invalid("filter-invalid", "the name is empty"))
		}
		f.names = append(f.names, name)
	}
	slices.Sort(f.serials)
	slices.Sort(f.names)
	f.serials, f.names = slices.Compact(f.serials), slices.Compact(f.names)
	return f, nil
}

func (f *filter) ofCertificates(owner hub.Owner) hub.CertificateFilter {
	return hub.CertificateFilter{Owner: owner, Serials: f.serials, Devices: f.ids(), Names: f.names}
}

// signBody is a request for a certificate; its member is PEM in base64.
type signBody struct {
	Request string `json:"certificateSigningRequest"`
}

type signAnswer struct {
	Certificate []byte `json:"certificate"` // PEM, what issued it behind it
}

func (g *Gateway) signIdentity(w http.ResponseWriter, r *request) error {
	var body signBody
	return g.sign(w, r, &body, &body.Request, func(csr []byte) ([]byte, error) {
		return g.deps.Certificates.Sign(r.Context(), r.claims.Owner, r.claims.Subject, csr)
	})
}

// signCertificate is for what is no device: other hubs sign whatever the request asks for.
func (g *Gateway) signCertificate(w http.ResponseWriter, r *request) error {
	var body struct {
		signBody
		Profile string   `json:"profile"`
		Hosts   []string `json:"hosts"`
	}
	return g.sign(w, r, &body, &body.Request, func(csr []byte) ([]byte, error) {
		return g.ofProfile(r.Context(), r.claims, body.Profile, body.Hosts, csr)
	})
}

// ofProfile has a request signed that is for no device. A server can be taken for another, so only operators name its hosts.
func (g *Gateway) ofProfile(ctx context.Context, c hub.Claims, profile string, hosts []string, csr []byte) ([]byte, error) {
	switch p := hub.Profile(profile); {
	case p == hub.ForService && !c.Has(hub.ScopeAdmin):
		return nil, errScopeMissing
	case p == hub.ForService:
		return g.deps.Certificates.SignService(ctx, c.Owner, c.Subject, hosts, csr)
	case p != hub.ForClient && profile != "":
		return nil, invalid("profile-unknown", "the profiles are client and service")
	case len(hosts) > 0:
		return nil, invalid("profile-unknown", "a client has no hosts; the profile service has")
	}
	return g.deps.Certificates.SignClient(ctx, c.Owner, c.Subject, csr)
}

// sign reads a body, which has the request as one of its members, and answers what was signed.
func (g *Gateway) sign(w http.ResponseWriter, r *request, body any, member *string, signed func(csr []byte) ([]byte, error)) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	if err := readJSON(r, body); err != nil {
		return err
	}
	if *member == "" {
		return invalid("body-incomplete", "the body lacks the member certificateSigningRequest")
	}
	csr, err := fromBase64(*member)
	if err != nil {
		return invalid("body-invalid", "certificateSigningRequest is not base64")
	}
	chain, err := signed(csr)
	if err != nil {
		return err
	}
	addSigned(r.target, chain)
	return writeJSON(w, r, signAnswer{chain})
}

// addSigned adds to the target what was signed.
func addSigned(target *string, chain []byte) {
	block, _ := pem.Decode(chain)
	if block == nil {
		return
	}
	leaf, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return
	}
	what := fmt.Sprintf("name=%q", leaf.Subject.CommonName)
	if dev, ok := strings.CutPrefix(leaf.Subject.CommonName, "uuid:"); ok {
		what = "device=" + dev
	}
	*target += " " + what + " serial=" + hub.SerialOf(leaf.SerialNumber)
}

// fromBase64 takes what protobuf's JSON does: the standard alphabet or that of URLs, with or without padding.
func fromBase64(s string) ([]byte, error) {
	s = strings.TrimRight(s, "=")
	if strings.ContainsAny(s, "-_") {
		return base64.RawURLEncoding.DecodeString(s)
	}
	return base64.RawStdEncoding.DecodeString(s)
}

type certificateElement struct{ hub.Certificate }

func (e certificateElement) message(string) proto.Message { return recordOf(&e.Certificate) }

func (e certificateElement) appendJSON(b []byte, cursor string) []byte {
	b = appendText(append(b, '{'), "id", e.Serial)
	b = appendText(b, "owner", string(e.Owner))
	b = appendText(b, "commonName", e.Name)
	b = appendText(b, "deviceId", string(e.Device))
	b = appendText(b, "publicKey", e.Key)
	b = appendInt(b, "creationDate", e.Created.UnixNano())
	b = append(appendName(b, "credential"), '{')
	b = appendInt(b, "date", e.Created.UnixNano())
	b = appendText(b, "certificatePem", e.PEM)
	b = appendInt(b, "validUntilDate", e.NotAfter.UnixNano())
	b = appendText(b, "serial", decimal(e.Serial))
	b = append(appendText(b, "issuerId", e.Issuer), '}')
	b = appendText(b, "requestedBy", e.User)
	b = appendText(b, "requestMethod", string(e.How))
	b = appendText(b, "profile", string(e.Profile))
	if a := e.Terms; a.Version != "" {
		b = appendText(b, "termsVersion", a.Version)
		b = appendText(b, "termsAcceptedBy", a.User)
		b = appendInt(b, "termsAcceptanceDate", a.Time.UnixNano())
	}
	if !e.Revoked.IsZero() {
		b = appendInt(b, "revokedDate", e.Revoked.UnixNano())
		b = appendText(b, "revocationReason", e.Reason.String())
	}
	return append(appendText(b, "cursor", cursor), '}')
}

// decimal is a serial as other hubs write it; "" for what is none.
func decimal(serial string) string {
	n, ok := new(big.Int).SetString(serial, 16)
	if !ok {
		return ""
	}
	return n.String()
}

func (g *Gateway) certificates(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return paged(f, g.deps.Certificates.Certificates(ctx, f.ofCertificates(owner)),
		func(c *hub.Certificate) string { return c.Serial },
		func(c *hub.Certificate) element { return certificateElement{*c} })
}

func (g *Gateway) getCertificates(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	f, err := certificateFilter(r.query["deviceIdFilter"], r.query["idFilter"], r.query["commonNameFilter"])
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listCertificates, &f, g.certificates)
}

// revokeCertificates is other hubs' deletion of records: here the record stays until after the certificate's end, as revoked. As
// with devices, a filter that names nothing is an error.
func (g *Gateway) revokeCertificates(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	all, err := r.query.strictFlag("all")
	if err != nil {
		return err
	}
	reason := hub.RevokedUnspecified.String()
	if names, ok := r.query["reason"]; ok {
		reason = names[0]
	}
	n, err := g.revoked(r.Context(), r.claims.Owner, toRevoke{
		devices: r.query["deviceIdFilter"], serials: r.query["idFilter"], names: r.query["commonNameFilter"], all: all, reason: reason,
	}, r.target)
	if err != nil {
		return err
	}
	return writeJSON(w, r, struct {
		Count int `json:"count,string"`
	}{n})
}

// toRevoke is what a caller says of the certificates that are to be revoked.
type toRevoke struct {
	devices, serials, names []string
	all                     bool
	reason                  string // as RFC 5280 names it
}

// revoked revokes an owner's certificates, counts them, and adds them to the target.
func (g *Gateway) revoked(ctx context.Context, owner hub.Owner, q toRevoke, target *string) (int, error) {
	named := slices.Concat(q.devices, q.serials, q.names)
	switch {
	case q.all && len(named) > 0:
		return 0, errDeleteBoth
	case !q.all && (len(named) == 0 || slices.Contains(named, "")):
		return 0, errRevokeAll
	}
	f, err := certificateFilter(q.devices, q.serials, q.names)
	if err != nil {
		return 0, err
	}
	why, err := hub.ParseRevocationReason(q.reason)
	if err != nil {
		return 0, err
	}
	cs, err := g.deps.Certificates.Revoke(ctx, f.ofCertificates(owner), why)
	*target += serialsOf(cs)
	return len(cs), err
}

// serialsOf says for the audit log which certificates were revoked; the first of many, since the ledger has when each was.
func serialsOf(cs []hub.Certificate) string {
	const most = 16
	var b strings.Builder
	for i, c := range cs {
		if i == most {
			fmt.Fprintf(&b, " and %d more", len(cs)-most)
			break
		}
		b.WriteString(" serial=" + c.Serial)
	}
	return b.String()
}

// getRevocationList is open: whoever is shown a certificate must be able to ask. Caches may keep the list for a minute, which is
// little beside its validity, and much beside how often somebody asks.
func (g *Gateway) getRevocationList(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	list, err := g.deps.Certificates.List(r.Context(), r.vars.issuer)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "public, max-age=60")
	return writeTagged(w, r, "application/pkix-crl", list)
}

// certificateReport is hub.CertificateReport as the API has it.
type certificateReport struct {
	Good       int            `json:"good"`
	Ended      int            `json:"ended"`
	Revoked    int            `json:"revoked"`
	Expires    int            `json:"expires"`
	Expiring   []reported     `json:"expiring"`
	SharedKeys int            `json:"sharedKeys"`
	Shared     []reported     `json:"shared"`
	WeakKeys   int            `json:"weakKeys"`
	Weak       []reported     `json:"weak"`
	Keys       map[string]int `json:"keys"`
}

// reported is one certificate in it.
type reported struct {
	ID         string    `json:"id"`
	DeviceID   string    `json:"deviceId"`
	PublicKey  string    `json:"publicKey"`
	ValidUntil time.Time `json:"validUntil"`
}

func reportedFrom(cs []hub.Certificate) []reported {
	out := []reported{}
	for _, c := range cs {
		out = append(out, reported{c.Serial, string(c.Device), c.Key, c.NotAfter.UTC()})
	}
	return out
}

// defaultSoon is which end is soon if nobody says, and maxSoon the longest that can be asked for.
const defaultSoon, maxSoon = 30, 3650

func (g *Gateway) getCertificateReport(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	days := defaultSoon
	if s := r.query.get("withinDays"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 || n > maxSoon {
			return invalid("query-invalid", "withinDays is no number from 0 to 3650")
		}
		days = n
	}
	rep, err := g.deps.Certificates.Report(r.Context(), r.claims.Owner, time.Duration(days)*24*time.Hour)
	if err != nil {
		return err
	}
	return writeJSON(w, r, certificateReport{
		Good: rep.Good, Ended: rep.Ended, Revoked: rep.Revoked, Expires: rep.Expires, Expiring: reportedFrom(rep.Expiring),
		SharedKeys: rep.SharedKeys, Shared: reportedFrom(rep.Shared), WeakKeys: rep.WeakKeys, Weak: reportedFrom(rep.Weak), Keys: rep.Keys,
	})
}
