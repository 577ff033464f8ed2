package certificateauthority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

const (
	// wakeEvery is how soon after a look whoever was woken looks again.
	wakeEvery = 100 * time.Millisecond
	// anewEvery is when the replica is made anew: it keeps what the ledger has forgotten by then.
	anewEvery = 24 * time.Hour
	// callTime bounds a call that nobody else bounds, and readTime one that reads much.
	callTime, readTime = 10 * time.Second, time.Minute
	// registrarKept is for how long the registrar's certificate is not asked for again.
	registrarKept = time.Minute
)

// Client is a Service, and an Authority, that runs elsewhere, with their methods and their errors; hub.Unavailable, too, while none can be
// reached. What is asked for in handshakes it answers itself, from a replica that follows the authorities: which certificates are
// revoked, and who is believed. Private keys are made and stay where it is.
type Client struct {
	bus *bus.Bus
	log *slog.Logger
	// replica has the certificates of the authorities, and no keys.
	replica *Authority
	wake    chan struct{}

	following sync.Mutex // held by who takes changes over, before mu; guards the next three
	number    uint64     // of the last change that is known
	sum       []byte     // of what is believed
	made      time.Time  // when everything was read

	registrar remoteRegistrar

	mu      sync.Mutex // guards all below
	revoked map[string]struct{}
	late    map[string]struct{} // what was revoked while everything is read; nil: it is not
	parts   []Part
	heard   time.Time
	ended   func(serial string)
	changed func()
}

// remote stands for a key that is elsewhere.
type remote struct{ public crypto.PublicKey }

func (r remote) Public() crypto.PublicKey { return r.public }

var errElsewhere = errors.New("the key is elsewhere")

func (remote) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errElsewhere }

// NewClient makes a Client. It waits until ctx ends for a Server that runs: without what is revoked nobody can be let in.
func NewClient(ctx context.Context, b *bus.Bus, log *slog.Logger) (*Client, error) {
	c := &Client{bus: b, log: log, replica: &Authority{}, wake: make(chan struct{}, 1)}
	c.registrar.c = c
	c.following.Lock()
	defer c.following.Unlock()
	for {
		err := c.anew(ctx)
		if err == nil {
			return c, nil
		}
		select {
		case <-time.After(wakeEvery):
		case <-ctx.Done():
			return nil, fmt.Errorf("certificateauthority.NewClient: %w", err)
		}
	}
}

// Run follows the authorities until ctx ends. Its error is that of a bus that is closed.
func (c *Client) Run(ctx context.Context, ready func()) error {
	stop, err := news.Listen(c.bus, NewsSubject, func(newsNote) {
		select {
		case c.wake <- struct{}{}:
		default: // it will look
		}
	})
	if err != nil {
		return fmt.Errorf("certificateauthority.Client: %w", err)
	}
	defer stop()
	ready()
	look := time.NewTicker(followEvery)
	defer look.Stop()
	silent := false
	for {
		err := c.catchUp(ctx)
		switch late := c.Behind() != nil; {
		case ctx.Err() != nil:
			return nil
		case late && !silent:
			c.log.ErrorContext(ctx, "no certificate authority can be reached, no new sessions are let in", "error", err)
			silent = true
		case err == nil && silent:
			c.log.InfoContext(ctx, "a certificate authority can be reached again")
			silent = false
		}
		select {
		case <-time.After(wakeEvery):
		case <-ctx.Done():
			return nil
		}
		select {
		case <-look.C:
		case <-c.wake:
		case <-ctx.Done():
			return nil
		}
	}
}

// catchUp takes over what was changed.
func (c *Client) catchUp(ctx context.Context) error {
	c.following.Lock()
	defer c.following.Unlock()
	if time.Since(c.made) > anewEvery {
		return c.anew(ctx)
	}
	for {
		began := time.Now()
		a, err := c.follow(ctx, c.number)
		switch {
		case err != nil:
			return err
		case a.Behind:
			return c.anew(ctx)
		}
		c.number = a.Number
		c.learn(a.Revoked)
		if a.More {
			continue
		}
		c.mu.Lock()
		c.heard = began // what was revoked before is known
		c.mu.Unlock()
		return nil
	}
}

// follow asks for changes, and takes over who is believed.
func (c *Client) follow(ctx context.Context, after uint64) (followAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, maxSilence/2)
	defer cancel()
	a, err := methodFollow.Call(ctx, c.bus, Subject, followQuestion{after, c.sum})
	if err == nil && a.Trust != nil {
		err = c.believe(*a.Trust, a.Sum)
	}
	return a, err
}

// anew reads everything. c.following is held.
func (c *Client) anew(ctx context.Context) error {
	began := time.Now()
	all := map[string]struct{}{}
	c.mu.Lock()
	c.late = map[string]struct{}{}
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.late = nil
		c.mu.Unlock()
	}()
	var number uint64
	for q, first := (revokedQuestion{}), true; ; first = false {
		a, err := func() (revokedAnswer, error) {
			ctx, cancel := context.WithTimeout(ctx, maxSilence/2)
			defer cancel()
			return methodRevoked.Call(ctx, c.bus, Subject, q)
		}()
		if err != nil {
			return err
		}
		if first || a.Number < number {
			number = a.Number // each answers by what it knows, and whoever knew least counts
		}
		for _, serial := range a.Serials {
			all[serial] = struct{}{}
			q.After = serial
		}
		if !a.More {
			break
		}
	}
	if _, err := c.follow(ctx, number); err != nil { // for who is believed
		return err
	}
	c.mu.Lock()
	old := c.revoked
	maps.Copy(all, c.late)
	c.revoked = all
	c.heard = began
	ended := c.ended
	c.mu.Unlock()
	c.number, c.made = number, began
	for serial := range all {
		if _, known := old[serial]; !known && ended != nil {
			ended(serial)
		}
	}
	return nil
}

// learn makes revocations known.
func (c *Client) learn(serials []string) {
	for _, serial := range serials {
		c.mu.Lock()
		_, known := c.revoked[serial]
		c.revoked[serial] = struct{}{}
		if c.late != nil {
			c.late[serial] = struct{}{}
		}
		ended := c.ended
		c.mu.Unlock()
		if !known && ended != nil {
			ended(serial)
		}
	}
}

// believe takes over who is believed. What an authority says whose files are older than those of another counts for nothing.
func (c *Client) believe(t trust, sum []byte) error {
	lines := map[Root]line{}
	for _, in := range t.Lines {
		var l line
		for _, r := range in.Roots {
			root := anchor{retired: r.Retired}
			var err error
			if root.cert, err = x509.ParseCertificate(r.DER); err == nil && r.Cross != nil {
				root.cross, err = x509.ParseCertificate(r.Cross)
			}
			if err != nil {
				return fmt.Errorf("a root of the authorities: %w", err)
			}
			root.name = nameOf(root.cert.RawSubjectPublicKeyInfo)
			l.roots = append(l.roots, root)
		}
		for _, i := range in.Issuers {
			cert, err := x509.ParseCertificate(i.DER)
			if err != nil || i.Under < 0 || i.Under >= len(l.roots) {
				return fmt.Errorf("an issuing certificate of the authorities: %w", err)
			}
			s := signer{root: l.roots[i.Under].cert, issuing: cert, name: nameOf(cert.RawSubjectPublicKeyInfo)}
			if !i.Retired {
				s.key = remote{cert.PublicKey}
			}
			l.issuers = append(l.issuers, s)
		}
		if len(l.issuers) == 0 {
			return fmt.Errorf("there is nothing that issues under the %s root", in.Root)
		}
		lines[in.Root] = l
	}
	known := c.replica.lines.Load()
	for _, r := range Roots() {
		l, there := lines[r]
		if !there {
			return fmt.Errorf("there is no %s root", r)
		}
		if known == nil || l.after((*known)[r]) {
			continue
		}
		if old := (*known)[r]; old.after(l) {
			return nil
		}
		return fmt.Errorf("the authority that answers has another %s root than the others had", r)
	}
	c.replica.lines.Store(&lines)
	c.sum = sum
	c.mu.Lock()
	c.parts = t.Parts
	changed := c.changed
	c.mu.Unlock()
	if changed != nil {
		changed()
	}
	return nil
}

// Ended is Service.Ended, of what this Client hears: within a second.
func (c *Client) Ended(f func(serial string)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = f
}

// Changed has f called when other authorities are believed than before: DevicePool and the like have changed. f must not block, nor roll
// over.
func (c *Client) Changed(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = f
}

// Revoked is Service.Revoked, as far as is known here. It does not block.
func (c *Client) Revoked(cert *x509.Certificate) bool {
	by, ours := c.replica.issuerOf(cert)
	if !ours {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_, is := c.revoked[hub.SerialOf(cert.SerialNumber)]
	return is || by.key == nil
}

var errBehind = &hub.Error{
	Kind: hub.Unavailable, Code: "revocations-behind", RetryAfter: maxSilence,
	Text: "which certificates were revoked cannot be found out now",
}

// Behind is an error when nothing was heard of the authorities for ten seconds: Unavailable ("revocations-behind"). Then Revoked does not
// know what was revoked since, and nobody new is to be let in by what it says; sessions go on.
func (c *Client) Behind() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if since := time.Since(c.heard); since >= maxSilence {
		return errBehind.With("revoked", fmt.Errorf("nothing was heard for %s", since.Round(time.Second)))
	}
	return nil
}

// DevicePool is Authority.DevicePool.
func (c *Client) DevicePool() *x509.CertPool { return c.replica.DevicePool() }

// DeviceRoots is Authority.DeviceRoots.
func (c *Client) DeviceRoots() []*x509.Certificate { return c.replica.DeviceRoots() }

// DeviceIntermediates is Authority.DeviceIntermediates.
func (c *Client) DeviceIntermediates() []*x509.Certificate { return c.replica.DeviceIntermediates() }

// Pool is Authority.Pool.
func (c *Client) Pool(r Root) *x509.CertPool { return c.replica.Pool(r) }

// RootPEM is Authority.RootPEM.
func (c *Client) RootPEM(r Root) ([]byte, error) { return c.replica.RootPEM(r) }

// Signs is Authority.Signs.
func (c *Client) Signs(r Root, cert *x509.Certificate) bool { return c.replica.Signs(r, cert) }

// Parts is Authority.Parts.
func (c *Client) Parts() []Part {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.parts)
}

// Issuer is Service.Issuer.
func (c *Client) Issuer() string { return c.replica.signer(Device).name }

// Anchors is Service.Anchors.
func (c *Client) Anchors() []*x509.Certificate { return c.replica.deviceAnchors() }

// RenewAt is Service.RenewAt.
func (c *Client) RenewAt(cert *x509.Certificate) (time.Time, bool) { return c.replica.renewAt(cert) }

var errKeyStays = hub.NewError(hub.Unsupported, "root-key-stays",
	"the keys of roots do not travel between the parts of the hub: do this in the keys' folder, and have the authorities take it over")

// Roll is Authority.Roll, for a root whose key the authorities have: root keys do not travel (Unsupported, "root-key-stays").
func (c *Client) Roll(r Root, step Step, rootKeys []byte) error {
	if len(rootKeys) > 0 {
		return errKeyStays.With("certificateauthority.Roll", nil)
	}
	_, err := called(methodRoll, c, rollQuestion{r, step})
	return c.believeNow(err)
}

// Refresh has the Client know what was stored before it was called.
func (c *Client) Refresh(ctx context.Context) error { return c.catchUp(ctx) }

// believeNow has a change of the authorities known here. What was written before an error counts.
func (c *Client) believeNow(err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	return errors.Join(err, c.catchUp(ctx))
}

// Retire is Authority.Retire, with the root's key as Roll has it.
func (c *Client) Retire(id string, rootKeys []byte) error {
	if len(rootKeys) > 0 {
		return errKeyStays.With("certificateauthority.Retire", nil)
	}
	_, err := called(methodRetire, c, id)
	return c.believeNow(err)
}

// RootKeys is Authority.RootKeys, which there is not over the bus.
func (c *Client) RootKeys(Root) ([]byte, error) {
	return nil, errKeyStays.With("certificateauthority.RootKeys", nil)
}

// ForgetRootKeys is Authority.ForgetRootKeys, which there is not over the bus.
func (c *Client) ForgetRootKeys(Root, []byte) error {
	return errKeyStays.With("certificateauthority.ForgetRootKeys", nil)
}

// call asks an authority.
func call[Q, A any](ctx context.Context, m bus.Method[Q, A], c *Client, q Q) (A, error) {
	return m.Call(ctx, c.bus, Subject, q)
}

// called is call of methods without context.
func called[Q, A any](m bus.Method[Q, A], c *Client, q Q) (A, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	return call(ctx, m, c, q)
}

// reading gives calls that read much the time for that.
func reading(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, readTime)
}

// pages reads one page after the other. A page that did not come is asked for once more: it changes nothing.
func pages[F, T any](ctx context.Context, m bus.Method[pageQuestion[F], page[T]], c *Client, f F) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		q := pageQuestion[F]{Filter: f}
		for {
			p, err := call(ctx, m, c, q)
			if hub.IsKind(err, hub.Unavailable) && ctx.Err() == nil {
				p, err = call(ctx, m, c, q)
			}
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			for _, item := range p.Items {
				if !yield(item, nil) {
					return
				}
			}
			if p.Next == nil {
				return
			}
			q.From = *p.Next
		}
	}
}

// done asks for something that may be done in part only.
func done[Q, T any](ctx context.Context, m bus.Method[Q, some[T]], c *Client, q Q) (out []T, err error) {
	for {
		a, err := call(ctx, m, c, q)
		if err != nil {
			return out, err
		}
		out = append(out, a.Items...)
		if err := a.err(string(m)); err != nil || !a.More {
			return out, err
		}
	}
}

// Sign is Service.Sign.
func (c *Client) Sign(ctx context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error) {
	return call(ctx, methodSign, c, signQuestion{Profile: hub.ForDevice, Owner: owner, User: user, CSR: csr})
}

// SignClient is Service.SignClient.
func (c *Client) SignClient(ctx context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error) {
	return call(ctx, methodSign, c, signQuestion{Profile: hub.ForClient, Owner: owner, User: user, CSR: csr})
}

// SignService is Service.SignService.
func (c *Client) SignService(ctx context.Context, owner hub.Owner, user string, hosts []string, csr []byte) ([]byte, error) {
	return call(ctx, methodSign, c, signQuestion{hub.ForService, owner, user, hosts, csr})
}

// Reserve is Service.Reserve.
func (c *Client) Reserve(ctx context.Context, owner hub.Owner, dev hub.DeviceID) error {
	_, err := call(ctx, methodReserve, c, reserveQuestion{owner, dev})
	return err
}

// IssueDevice is Service.IssueDevice.
func (c *Client) IssueDevice(ctx context.Context, dev hub.DeviceID, validity time.Duration, owner hub.Owner, user string) (Identity, error) {
	key, csr, err := newRequest()
	if err != nil {
		return Identity{}, err
	}
	a, err := call(ctx, methodIssueDevice, c, issueQuestion{dev, validity, owner, user, csr})
	if err != nil {
		return Identity{}, err
	}
	text, err := keyPEM(key)
	if err != nil {
		return Identity{}, err
	}
	leaf, err := parsePEM(string(a.Chain))
	if err != nil {
		return Identity{}, err
	}
	return Identity{Chain: a.Chain, Key: text, CA: a.CA, leaf: leaf}, nil
}

// newRequest makes a key, and a request that proves that somebody has it.
func newRequest() (crypto.Signer, []byte, error) {
	key, err := newECDSA()
	if err != nil {
		return nil, nil, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a signing request: %w", err)
	}
	return key, csr, nil
}

// HubCertificate is Service.HubCertificate, of a key that is made here and goes nowhere, and in the ledger. Denied ("host-not-of-hub") for
// hosts that the authorities do not know to be the hub's.
func (c *Client) HubCertificate(hosts []string) (tls.Certificate, error) {
	return c.hubCertificate(Device, hosts)
}

// HTTPSCertificate is Service.HTTPSCertificate, likewise.
func (c *Client) HTTPSCertificate(hosts []string) (tls.Certificate, error) {
	return c.hubCertificate(HTTPS, hosts)
}

func (c *Client) hubCertificate(r Root, hosts []string) (tls.Certificate, error) {
	key, csr, err := newRequest()
	if err != nil {
		return tls.Certificate{}, err
	}
	chain, err := called(methodIssueHub, c, hubQuestion{r, hosts, csr})
	if err != nil {
		return tls.Certificate{}, err
	}
	out := tls.Certificate{Certificate: chain, PrivateKey: key}
	if len(chain) == 0 {
		return tls.Certificate{}, errors.New("the authority answers without a certificate")
	}
	if out.Leaf, err = x509.ParseCertificate(chain[0]); err != nil {
		return tls.Certificate{}, fmt.Errorf("read the hub's certificate: %w", err)
	}
	if public, ok := key.Public().(*ecdsa.PublicKey); !ok || !public.Equal(out.Leaf.PublicKey) {
		return tls.Certificate{}, errors.New("the authority answers with a certificate of another key")
	}
	return out, nil
}

// Staple is Service.Staple.
func (c *Client) Staple(cert *tls.Certificate) (hub.CertificateStatus, error) {
	return called(methodStaple, c, cert.Leaf.Raw)
}

// Certificates is Service.Certificates.
func (c *Client) Certificates(ctx context.Context, f hub.CertificateFilter) iter.Seq2[hub.Certificate, error] {
	return pages(ctx, methodCertificates, c, f)
}

// Revoke is Service.Revoke. On return it is known here.
func (c *Client) Revoke(ctx context.Context, f hub.CertificateFilter, reason hub.RevocationReason) ([]hub.Certificate, error) {
	out, err := done(ctx, methodRevoke, c, revokeQuestion{f, reason})
	c.revokedNow(out)
	return out, err
}

// HandOver is Service.HandOver. On return it is known here.
func (c *Client) HandOver(ctx context.Context, dev hub.DeviceID, owner hub.Owner, serial string) ([]hub.Certificate, error) {
	out, err := done(ctx, methodHandOver, c, handOverQuestion{dev, owner, serial})
	c.revokedNow(out)
	return out, err
}

func (c *Client) revokedNow(certs []hub.Certificate) {
	for _, cert := range certs {
		c.learn([]string{cert.Serial})
	}
}

// Report is Service.Report.
func (c *Client) Report(ctx context.Context, owner hub.Owner, within time.Duration) (hub.CertificateReport, error) {
	ctx, cancel := reading(ctx)
	defer cancel()
	return call(ctx, methodReport, c, reportQuestion{owner, within})
}

// List is Service.List.
func (c *Client) List(ctx context.Context, issuer string) ([]byte, error) {
	return call(ctx, methodList, c, issuer)
}

// ListOf is Service.ListOf.
func (c *Client) ListOf(ctx context.Context, issuer []byte, serial *big.Int) ([]byte, error) {
	return call(ctx, methodListOf, c, listOfQuestion{issuer, serial.Bytes()})
}

// Status is Service.Status.
func (c *Client) Status(ctx context.Context, request []byte) hub.CertificateStatus {
	st, err := call(ctx, methodStatus, c, request)
	if err != nil {
		return failed(tryLater)
	}
	return st
}

// Enrol is Service.Enrol. When the answer was lost, the same request gets the same certificate.
func (c *Client) Enrol(ctx context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error) {
	a, err := call(ctx, methodEnrol, c, enrolQuestion{
		Chain: dersOf(proof.Chain), PSK: proof.PSK, Token: []byte(proof.Token), Transaction: []byte(proof.Transaction), CSR: csr, Renew: renew,
	})
	if err != nil {
		return hub.Enrolled{}, err
	}
	chain, err := chainOf(a.Chain)
	return hub.Enrolled{Device: a.Device, Serial: a.Serial, Chain: chain}, err
}

// Vouch is Service.Vouch.
func (c *Client) Vouch(ctx context.Context, chain []*x509.Certificate) error {
	_, err := call(ctx, methodVouch, c, dersOf(chain))
	return err
}

// Applicant is Service.Applicant.
func (c *Client) Applicant(ctx context.Context, chain []*x509.Certificate) (hub.Applicant, error) {
	return call(ctx, methodApplicant, c, dersOf(chain))
}

// Admit is Service.Admit.
func (c *Client) Admit(ctx context.Context, chain []*x509.Certificate, named hub.DeviceID) (hub.Applicant, error) {
	return call(ctx, methodAdmit, c, admitQuestion{dersOf(chain), named})
}

// Provisioned is Service.Provisioned.
func (c *Client) Provisioned(ctx context.Context, chain []*x509.Certificate, to hub.Applicant, p hub.Provisioned) error {
	to.PSK, p.Cloud.Token = "", "" // which the record does not have
	_, err := call(ctx, methodProvisioned, c, provisionedQuestion{dersOf(chain), to, p})
	return err
}

// ProvisioningRecords is Service.ProvisioningRecords.
func (c *Client) ProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) iter.Seq2[hub.ProvisioningRecord, error] {
	return pages(ctx, methodRecords, c, f)
}

// DeleteProvisioningRecords is Service.DeleteProvisioningRecords.
func (c *Client) DeleteProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) ([]string, error) {
	return done(ctx, methodDropRecords, c, f)
}

// Groups is Service.Groups.
func (c *Client) Groups(ctx context.Context, owner hub.Owner) (out []hub.EnrolmentGroup, err error) {
	for g, err := range pages(ctx, methodGroups, c, owner) {
		if err != nil {
			return nil, err
		}
		out = append(out, g)
	}
	return out, nil
}

// SetGroup is Service.SetGroup.
func (c *Client) SetGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	return call(ctx, methodSetGroup, c, g)
}

// AcceptTerms is Service.AcceptTerms.
func (c *Client) AcceptTerms(ctx context.Context, owner hub.Owner, id, version, user string) (hub.EnrolmentGroup, error) {
	return call(ctx, methodAcceptTerms, c, termsQuestion{owner, id, version, user})
}

// DeleteGroups is Service.DeleteGroups.
func (c *Client) DeleteGroups(ctx context.Context, ids []string) ([]hub.EnrolmentGroup, error) {
	return done(ctx, methodDeleteGroups, c, ids)
}

// Enrolments is Service.Enrolments.
func (c *Client) Enrolments(ctx context.Context, f hub.EnrolmentFilter) iter.Seq2[hub.Enrolment, error] {
	return pages(ctx, methodEnrolments, c, f)
}

// Decide is Service.Decide.
func (c *Client) Decide(ctx context.Context, owner hub.Owner, devices []hub.DeviceID, allow bool, user string) ([]hub.Enrolment, error) {
	return done(ctx, methodDecide, c, decideQuestion{owner, devices, allow, user})
}

// Forget is Service.Forget.
func (c *Client) Forget(ctx context.Context, f hub.EnrolmentFilter) ([]hub.Enrolment, error) {
	return done(ctx, methodForget, c, f)
}

// NewToken is Service.NewToken.
func (c *Client) NewToken(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, life time.Duration, user string,
) (string, hub.EnrolmentToken, error) {
	a, err := call(ctx, methodNewToken, c, tokenQuestion{owner, dev, life, user})
	return a.Text, a.Token, err
}

// Tokens is Service.Tokens.
func (c *Client) Tokens(ctx context.Context, owner hub.Owner) ([]hub.EnrolmentToken, error) {
	return newestFirst(pages(ctx, methodTokens, c, owner))
}

// DeleteTokens is Service.DeleteTokens.
func (c *Client) DeleteTokens(ctx context.Context, owner hub.Owner, ids []string) ([]hub.EnrolmentToken, error) {
	return done(ctx, methodDropTokens, c, tokensQuestion{owner, ids})
}

// Registrar is Authority.Registrar: its key stays there, and decrypts and signs there.
func (c *Client) Registrar() KeyOfRegistrar { return &c.registrar }

type remoteRegistrar struct {
	c    *Client
	cert atomic.Pointer[x509.Certificate]

	mu    sync.Mutex // guards until, and is held by who asks
	until time.Time
}

// Certificate is Registrar.Certificate.
func (r *remoteRegistrar) Certificate() (*x509.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if cert := r.cert.Load(); cert != nil && time.Now().Before(r.until) {
		return cert, nil
	}
	der, err := called(methodRegistrar, r.c, struct{}{})
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read the registrar's certificate: %w", err)
	}
	if old := r.cert.Load(); old != nil && bytes.Equal(old.Raw, der) {
		cert = old
	}
	r.cert.Store(cert)
	r.until = time.Now().Add(registrarKept)
	return cert, nil
}

// Public is Registrar.Public.
func (r *remoteRegistrar) Public() crypto.PublicKey {
	if cert := r.cert.Load(); cert != nil {
		return cert.PublicKey
	}
	return nil
}

var errScheme = errors.New("the registrar's key signs and decrypts as PKCS #1 1.5 has it only")

// Sign is Registrar.Sign.
func (r *remoteRegistrar) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if _, pss := opts.(*rsa.PSSOptions); pss {
		return nil, errScheme
	}
	return called(methodRASign, r.c, raSignQuestion{digest, opts.HashFunc()})
}

// Decrypt is Registrar.Decrypt.
func (r *remoteRegistrar) Decrypt(_ io.Reader, msg []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	o, ok := opts.(*rsa.PKCS1v15DecryptOptions) //nolint:staticcheck // SCEP has no other
	if !ok {
		return nil, errScheme
	}
	return called(methodRADecrypt, r.c, raDecryptQuestion{msg, o.SessionKeyLen})
}
