package coapgateway

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// Renewals gives devices another certificate before theirs ends.
type Renewals interface {
	est.Authority
	// RenewAt is when a certificate should be renewed; false if it is none of this authority's.
	RenewAt(cert *x509.Certificate) (time.Time, bool)
}

// A device may renew by itself, with EST over its connection (RFC 9148). That of one that does not is renewed for it: the hub asks it
// for a signing request, and puts the certificate into its credentials (OCF Security, 13.2 and 13.3). Either way it comes with the
// new one when it comes next.

const (
	csrHref  = "/oic/sec/csr"
	credHref = "/oic/sec/cred"
	// renewing is how many devices' certificates are renewed at a time, and renewalQueue how many sessions wait for that; further
	// ones are found at the next look. Nearly all of that time is waiting for a device, and many silent ones must not keep others
	// waiting; what the authority does at a time, it bounds itself.
	renewing, renewalQueue = 512, 1024
	// renewalLook is how often all sessions are looked through, and renewalAgain when a device is asked once more that could not.
	renewalLook, renewalAgain = time.Hour, 24 * time.Hour
	// renewalTime bounds one renewal.
	renewalTime = time.Minute
)

func (p *peer) estAnchors(_ context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	if p.gw.deps.Renewals == nil {
		return coap.Response{}, errNoPath
	}
	format, err := coap.Acceptable(req, hub.FormatCertsOnly, hub.FormatCert)
	if err != nil {
		return coap.Response{}, err
	}
	body, err := est.Anchors(p.gw.deps.Renewals, format)
	return withFormat(codes.Content, format, body), err
}

func (*peer) estAttributes(_ context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	format, err := coap.Acceptable(req, hub.FormatCSRAttributes)
	return withFormat(codes.Content, format, est.Attributes), err
}

// estRenew needs no session: a device whose token has ended keeps its identity all the same.
func (p *peer) estRenew(ctx context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	format, err := coap.Acceptable(req, hub.FormatCertsOnly, hub.FormatCert)
	if err != nil {
		return coap.Response{}, err
	}
	if f, ok := coap.ContentFormat(req); ok && f != hub.FormatCSR {
		return coap.Response{}, hub.NewError(hub.Unsupported, "format-unsupported", "the body must be application/pkcs10 (286)")
	}
	if p.gw.deps.Renewals == nil {
		return coap.Response{}, errNoPath
	}
	if p.cred.cert == nil {
		return coap.Response{}, hub.NewError(hub.Denied, "renewal-without-certificate", "a renewal is made under the certificate that it renews")
	}
	out, err := p.gw.deps.Renewals.Enrol(ctx, hub.EnrolmentProof{Chain: []*x509.Certificate{p.cred.cert}}, req.Payload, true)
	if hub.IsKind(err, hub.Unauthenticated) { // its credential is good, and of another authority: 4.01 would cost it its token
		code, text := hub.Public(err)
		err = hub.NewError(hub.Denied, code, text).With("renew", err)
	}
	if err != nil {
		return coap.Response{}, err
	}
	p.gw.metrics.renewals.WithLabelValues("device", "ok").Inc()
	body, err := est.Certificate(out, format)
	return withFormat(codes.Changed, format, body), err
}

// renewals renews certificates of devices that are connected.
type renewals struct {
	gw  *Gateway
	due chan *session

	mu    sync.Mutex
	tried map[*session]time.Time // when, or until when it is not to be; of sessions that are there
}

func newRenewals(g *Gateway) *renewals {
	return &renewals{gw: g, due: make(chan *session, renewalQueue), tried: map[*session]time.Time{}}
}

// watch has the session's certificate renewed if it is time.
func (r *renewals) watch(s *session) {
	if r.gw.deps.Renewals == nil || s.cert == nil {
		return
	}
	at, ours := r.gw.deps.Renewals.RenewAt(s.cert)
	if now := time.Now(); !ours || now.Before(at) || now.After(s.cert.NotAfter) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if s.ctx.Err() != nil {
		return
	}
	if last, ok := r.tried[s]; ok && time.Since(last) < renewalAgain {
		return
	}
	select {
	case r.due <- s:
		r.tried[s] = time.Now()
	default: // there are many; the next look finds it
	}
}

// leave forgets a session that has ended.
func (r *renewals) leave(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.tried, s)
}

// run renews until ctx ends.
func (r *renewals) run(ctx context.Context) {
	under, ended := 0, make(chan struct{})
	look := time.NewTicker(renewalLook)
	defer look.Stop()
	for {
		due := r.due
		if under == renewing {
			due = nil
		}
		select {
		case s := <-due:
			under++
			go func() {
				defer func() { ended <- struct{}{} }()
				r.renew(s)
			}()
		case <-ended:
			under--
		case <-look.C:
			for _, s := range r.gw.live.withCertificate() {
				r.watch(s)
			}
		case <-ctx.Done():
			for ; under > 0; under-- {
				<-ended
			}
			return
		}
	}
}

// renew renews one session's certificate, and counts what came of it.
func (r *renewals) renew(s *session) {
	if s.ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, renewalTime)
	defer cancel()
	outcome := "ok"
	s.conn.Guard("renewal", func() {
		var err error
		if outcome, err = s.renewCertificate(ctx, r.gw.deps.Renewals); err != nil {
			level := slog.LevelInfo
			if ours(err) && outcome == "failed" {
				level = slog.LevelWarn
			}
			s.log.Log(ctx, level, "the device's certificate was not renewed", "ends", s.cert.NotAfter, "error", err)
		}
	})
	if outcome == "ok" {
		r.mu.Lock()
		// It shows the former one as long as it stays, which may be for weeks: one more a day would be too many of them.
		if _, there := r.tried[s]; there {
			r.tried[s] = s.cert.NotAfter
		}
		r.mu.Unlock()
	}
	r.gw.metrics.renewals.WithLabelValues("hub", outcome).Inc()
}

// renewCertificate asks the device for a request and brings it the certificate.
func (s *session) renewCertificate(ctx context.Context, authority Renewals) (outcome string, err error) {
	m, err := s.askFor(ctx, &coap.Message{Code: codes.GET, Options: coap.AddUint(requestTo(csrHref), message.Accept, uint32(hub.FormatOCFCBOR))})
	if err != nil {
		return "unanswered", err
	}
	if m.Code != codes.Content {
		return "refused", fmt.Errorf("the device answers %s for %s", coap.Dotted(m.Code), csrHref)
	}
	var req struct {
		CSR      any    `cbor:"csr"`
		Encoding string `cbor:"encoding"`
	}
	if err := decoding.Unmarshal(m.Payload, &req); err != nil {
		return "refused", fmt.Errorf("the device's signing request: %w", err)
	}
	var csr []byte
	switch v := req.CSR.(type) {
	case string:
		csr = []byte(v)
	case []byte:
		csr = v
	}
	out, err := authority.Enrol(ctx, hub.EnrolmentProof{Chain: []*x509.Certificate{s.cert}}, csr, true)
	if err != nil {
		return "failed", err
	}
	body, err := encoding.Marshal(credentialsOf(out))
	if err != nil {
		return "failed", fmt.Errorf("encode credentials: %w", err)
	}
	m, err = s.askFor(ctx, &coap.Message{
		Code: codes.POST, Options: coap.AddUint(requestTo(credHref), message.ContentFormat, uint32(hub.FormatOCFCBOR)), Payload: body,
	})
	if err != nil {
		return "unanswered", err
	}
	if m.Code != codes.Changed && m.Code != codes.Created {
		return "refused", fmt.Errorf("the device answers %s for %s", coap.Dotted(m.Code), credHref)
	}
	s.log.Info("the device's certificate was renewed", "serial", out.Serial, "ended", s.cert.NotAfter)
	return "ok", nil
}

// credentials is an update of oic.r.cred (OCF Security, 13.2): the certificate for the key that the device has made.
type credentials struct {
	Creds []deviceCredential `cbor:"creds"`
}

type deviceCredential struct {
	Subject string     `cbor:"subjectuuid"`
	Type    int        `cbor:"credtype"` // 8: asymmetric signing key with certificate
	Usage   string     `cbor:"credusage"`
	Public  publicData `cbor:"publicdata"`
}

type publicData struct {
	Encoding string `cbor:"encoding"`
	Data     string `cbor:"data"`
}

func credentialsOf(out hub.Enrolled) credentials {
	return credentials{[]deviceCredential{{
		Subject: string(out.Device), Type: 8, Usage: "oic.sec.cred.cert", Public: publicData{"oic.sec.encoding.pem", est.PEM(out.Chain...)},
	}}}
}
