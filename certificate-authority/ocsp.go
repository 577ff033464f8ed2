package certificateauthority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha1" // RFC 6960, Section 4.2.1 names keys by it, and most who ask name certificates so
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/coaphub/coaphub/hub"
)

// StatusPath is where the doors answer questions about single certificates (RFC 6960, Appendix A).
const StatusPath = "/certificate-authority/api/v1/signing/ocsp"

const (
	// answerValid is for how long an answer is good. Whoever stole a device can show one that was true when it was made.
	answerValid = time.Hour
	// answerAge is how old one that is given out again may be.
	answerAge = 10 * time.Minute
	// maxAnswers bounds those that are kept to be given out again.
	maxAnswers = 4096
	// responderValidity is how long the certificate of the key that signs answers lasts. Nobody asks whether it was revoked, so
	// it is short; it is made anew when it would end before an answer of the longest kind.
	responderValidity = 7 * 24 * time.Hour
	// responderRenew is how long before that.
	responderRenew = 24 * time.Hour
)

// responder answers for one issuing key, whose certificates it tells apart from those of others. It signs with a key of its
// own, delegated by that key (RFC 6960, Section 4.2.2.2): the issuing certificate allows its key certificates and lists only, and
// a key that is not on this machine is not to be asked for each answer.
type responder struct {
	signer signer

	mu   sync.Mutex // guards cert and key
	cert *x509.Certificate
	key  crypto.Signer
}

// answer is one that is given out again.
type answer struct {
	hub.CertificateStatus
	made time.Time
}

// question is what an OCSP request asks (RFC 6960, Section 4.1.1).
type question struct {
	ids   []certID
	nonce []byte // the extension's value; nil: none
}

// certID names a certificate.
type certID struct {
	raw       []byte // DER
	hash      crypto.Hash
	name, key []byte // of the issuer, hashed
	serial    *big.Int
}

// certStatus is what is known of a certificate.
type certStatus struct {
	word    string // good, revoked or unknown
	revoked time.Time
	reason  hub.RevocationReason
}

// maxQuestions bounds the certificates that one request asks for.
const maxQuestions = 16

// maxNonce is RFC 9654, Section 2.1's.
const maxNonce = 128

var (
	oidOCSPBasic   = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 1}
	oidOCSPNonce   = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 2}
	oidOCSPNoCheck = asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 48, 1, 5}
	oidSHA1        = asn1.ObjectIdentifier{1, 3, 14, 3, 2, 26}
	oidECDSASHA256 = asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}

	hashes = map[string]crypto.Hash{
		"1.3.14.3.2.26":          crypto.SHA1,
		"2.16.840.1.101.3.4.2.1": crypto.SHA256,
		"2.16.840.1.101.3.4.2.2": crypto.SHA384,
		"2.16.840.1.101.3.4.2.3": crypto.SHA512,
	}
)

// responderUsage is of the certificates of keys that sign answers. Their holder needs no status of his own (RFC 6960, Section
// 4.2.2.2.1).
var responderUsage = usage{
	key:   x509.KeyUsageDigitalSignature,
	ext:   []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning},
	extra: []pkix.Extension{{Id: oidOCSPNoCheck, Value: asn1.NullBytes}},
}

// failed is an answer without one: OCSPResponseStatus alone.
func failed(status byte) hub.CertificateStatus {
	return hub.CertificateStatus{DER: []byte{0x30, 0x03, 0x0a, 0x01, status}}
}

// OCSPResponseStatus (RFC 6960, Section 4.2.1).
const (
	malformedRequest = 1
	internalError    = 2
	tryLater         = 3
	unauthorized     = 6
)

// Status answers a question about certificates of the hub's authorities, DER (RFC 6960): each is good, revoked, or unknown if the
// hub has not made it or has forgotten it. A question about those of others gets "unauthorized", as RFC 5019, Section 2.2.3 has
// it. There always is an answer, which may be that there is none now.
func (s *Service) Status(ctx context.Context, request []byte) hub.CertificateStatus {
	st, word := s.status(ctx, request)
	s.questions.WithLabelValues(word).Inc()
	return st
}

func (s *Service) status(ctx context.Context, request []byte) (_ hub.CertificateStatus, word string) {
	q, err := parseQuestion(request)
	if err != nil {
		return failed(malformedRequest), "malformed"
	}
	var r *responder
	for _, id := range q.ids { // one signature cannot be of several
		if of := s.responderOf(id); of == nil || r != nil && of != r {
			return failed(unauthorized), "unauthorized"
		} else {
			r = of
		}
	}
	again := q.nonce == nil && len(q.ids) == 1
	if again {
		s.mu.Lock()
		a, ok := s.answers[string(q.ids[0].raw)]
		s.mu.Unlock()
		if ok && time.Since(a.made) < answerAge {
			return a.CertificateStatus, "again"
		}
	}
	// Each costs a signature and a read, and anybody may ask.
	place, wait := s.answering.Enter(ctx)
	if wait > 0 {
		return failed(tryLater), "try-later"
	}
	defer place.Leave()
	s.mu.Lock()
	changes := s.changes
	s.mu.Unlock()
	statuses := make([]certStatus, len(q.ids))
	for i, id := range q.ids {
		if statuses[i], err = s.statusOf(ctx, r, id.serial); err != nil {
			return failed(tryLater), "try-later"
		}
	}
	now := time.Now()
	st, err := r.sign(q, statuses, now)
	if err != nil {
		s.log.ErrorContext(ctx, "no answer about a certificate can be signed", "error", err)
		return failed(internalError), "failed"
	}
	if !again {
		st.From, st.Until = time.Time{}, time.Time{}
	} else if statuses[0].word != "unknown" { // of which there is no end
		s.mu.Lock()
		if s.changes == changes { // else it may be about this one
			if len(s.answers) >= maxAnswers {
				clear(s.answers)
			}
			s.answers[string(q.ids[0].raw)] = answer{st, now}
		}
		s.mu.Unlock()
	}
	return st, statuses[0].word
}

// responderOf finds who answers for the issuer of a certificate, nil if it is none of ours. Of what was retired nobody says
// anything: its key is gone.
func (s *Service) responderOf(id certID) *responder {
	for _, r := range []Root{Device, HTTPS} { // what is under the third nobody outside sees
		for _, sg := range s.a.line(r).issuers {
			if sg.key == nil {
				continue
			}
			h := id.hash.New()
			h.Write(sg.issuing.RawSubject)
			if !bytes.Equal(h.Sum(nil), id.name) {
				continue
			}
			h.Reset()
			h.Write(publicKey(sg.issuing))
			if bytes.Equal(h.Sum(nil), id.key) {
				return s.responder(sg)
			}
		}
	}
	return nil
}

func (s *Service) responder(sg signer) *responder {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.responders[sg.name]
	if r == nil {
		r = &responder{signer: sg}
		s.responders[sg.name] = r
	}
	return r
}

// publicKey is what of a certificate's key is hashed: its bits without algorithm (RFC 6960, Section 4.1.1).
func publicKey(c *x509.Certificate) []byte {
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	_, _ = asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki) // it was parsed before
	return spki.Key.RightAlign()
}

// statusOf looks a serial up. What was revoked and could not be stored is revoked.
func (s *Service) statusOf(ctx context.Context, r *responder, n *big.Int) (certStatus, error) {
	unknown := certStatus{word: "unknown"}
	if n.Sign() <= 0 { // RFC 5280, Section 4.1.2.2
		return unknown, nil
	}
	serial := hub.SerialOf(n)
	s.mu.Lock()
	_, own := s.shown[shownID{r.signer.name, serial}]
	s.mu.Unlock()
	if own {
		return certStatus{word: "good"}, nil
	}
	doc, err := s.docs.Get(ctx, collCertificates, serial)
	if err != nil {
		return unknown, err
	}
	known := doc.Rev != 0
	var e entry
	if known {
		if e, err = decodeEntry(doc); err != nil {
			return unknown, err
		}
		known = e.Issuer == r.signer.name || e.How == hub.Unrecorded // of which nobody knows whose it is
	}
	switch {
	case known && !e.Revoked.IsZero():
		return certStatus{"revoked", e.Revoked, e.Reason}, nil
	case s.isRevoked(serial):
		return certStatus{"revoked", time.Now(), hub.RevokedUnspecified}, nil
	case known:
		return certStatus{word: "good"}, nil
	}
	return unknown, nil
}

// delegate returns the key that signs answers, and its certificate.
func (r *responder) delegate(now time.Time) (*x509.Certificate, crypto.Signer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cert == nil || r.cert.NotAfter.Sub(now) < responderRenew {
		cert, key, err := r.signer.sign("coaphub OCSP", responderValidity, responderUsage, nil)
		if err != nil {
			return nil, nil, err
		}
		r.cert, r.key = cert, key
	}
	return r.cert, r.key, nil
}

// sign makes a response (RFC 6960, Section 4.2.1).
func (r *responder) sign(q question, statuses []certStatus, now time.Time) (st hub.CertificateStatus, err error) {
	cert, key, err := r.delegate(now)
	if err != nil {
		return st, err
	}
	st.From, st.Until = now.Add(-listBackdate).Truncate(time.Second), earlier(now.Add(answerValid), cert.NotAfter).Truncate(time.Second)
	var (
		sequence = cryptobyte_asn1.SEQUENCE
		inside   = func(n uint8) cryptobyte_asn1.Tag { return cryptobyte_asn1.Tag(n).ContextSpecific().Constructed() }
		keyHash  = sha1.Sum(publicKey(cert))
	)
	var b cryptobyte.Builder
	b.AddASN1(sequence, func(b *cryptobyte.Builder) { // ResponseData
		b.AddASN1(inside(2), func(b *cryptobyte.Builder) { b.AddASN1OctetString(keyHash[:]) })
		b.AddASN1GeneralizedTime(now.UTC())
		b.AddASN1(sequence, func(b *cryptobyte.Builder) {
			for i, id := range q.ids {
				b.AddASN1(sequence, func(b *cryptobyte.Builder) { // SingleResponse
					b.AddBytes(id.raw)
					statuses[i].add(b)
					b.AddASN1GeneralizedTime(st.From.UTC())
					b.AddASN1(inside(0), func(b *cryptobyte.Builder) { b.AddASN1GeneralizedTime(st.Until.UTC()) })
				})
			}
		})
		if q.nonce != nil {
			b.AddASN1(inside(1), func(b *cryptobyte.Builder) {
				b.AddASN1(sequence, func(b *cryptobyte.Builder) {
					b.AddASN1(sequence, func(b *cryptobyte.Builder) {
						b.AddASN1ObjectIdentifier(oidOCSPNonce)
						b.AddASN1OctetString(q.nonce)
					})
				})
			})
		}
	})
	data, err := b.Bytes()
	if err != nil {
		return st, fmt.Errorf("encode an answer about a certificate: %w", err)
	}
	sum := sha256.Sum256(data)
	signature, err := key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return st, fmt.Errorf("sign an answer about a certificate: %w", err)
	}
	b = cryptobyte.Builder{}
	b.AddASN1(sequence, func(b *cryptobyte.Builder) { // OCSPResponse
		b.AddASN1Enum(0)
		b.AddASN1(inside(0), func(b *cryptobyte.Builder) {
			b.AddASN1(sequence, func(b *cryptobyte.Builder) {
				b.AddASN1ObjectIdentifier(oidOCSPBasic)
				b.AddASN1(cryptobyte_asn1.OCTET_STRING, func(b *cryptobyte.Builder) {
					b.AddASN1(sequence, func(b *cryptobyte.Builder) { // BasicOCSPResponse
						b.AddBytes(data)
						b.AddASN1(sequence, func(b *cryptobyte.Builder) { b.AddASN1ObjectIdentifier(oidECDSASHA256) })
						b.AddASN1BitString(signature)
						b.AddASN1(inside(0), func(b *cryptobyte.Builder) {
							b.AddASN1(sequence, func(b *cryptobyte.Builder) { b.AddBytes(cert.Raw) })
						})
					})
				})
			})
		})
	})
	if st.DER, err = b.Bytes(); err != nil {
		return st, fmt.Errorf("encode an answer about a certificate: %w", err)
	}
	return st, nil
}

// add writes a CertStatus.
func (c certStatus) add(b *cryptobyte.Builder) {
	tag := func(n uint8) cryptobyte_asn1.Tag { return cryptobyte_asn1.Tag(n).ContextSpecific() }
	switch c.word {
	case "good":
		b.AddASN1(tag(0), func(*cryptobyte.Builder) {})
	case "revoked":
		b.AddASN1(tag(1).Constructed(), func(b *cryptobyte.Builder) {
			b.AddASN1GeneralizedTime(c.revoked.UTC())
			if c.reason != hub.RevokedUnspecified { // RFC 5280, Section 5.3.1: rather none than this
				b.AddASN1(tag(0).Constructed(), func(b *cryptobyte.Builder) { b.AddASN1Enum(int64(c.reason)) })
			}
		})
	default:
		b.AddASN1(tag(2), func(*cryptobyte.Builder) {})
	}
}

var errQuestion = errors.New("this is no OCSP request that can be answered")

// parseQuestion reads an OCSPRequest (RFC 6960, Section 4.1.1). Who asks, and whether he signed, makes no difference.
func parseQuestion(der []byte) (q question, err error) {
	var (
		in                              = cryptobyte.String(der)
		request, tbs, list, extensions  cryptobyte.String
		version                         int64
		requestor, signature            cryptobyte.String
		hasExtensions, hasVersion, some bool
		versionIn                       cryptobyte.String
	)
	inside := func(n uint8) cryptobyte_asn1.Tag { return cryptobyte_asn1.Tag(n).ContextSpecific().Constructed() }
	if !in.ReadASN1(&request, cryptobyte_asn1.SEQUENCE) || !in.Empty() ||
		!request.ReadASN1(&tbs, cryptobyte_asn1.SEQUENCE) || !request.ReadOptionalASN1(&signature, &some, inside(0)) || !request.Empty() ||
		!tbs.ReadOptionalASN1(&versionIn, &hasVersion, inside(0)) ||
		hasVersion && (!versionIn.ReadASN1Integer(&version) || !versionIn.Empty() || version != 0) ||
		!tbs.ReadOptionalASN1(&requestor, &some, inside(1)) ||
		!tbs.ReadASN1(&list, cryptobyte_asn1.SEQUENCE) ||
		!tbs.ReadOptionalASN1(&extensions, &hasExtensions, inside(2)) || !tbs.Empty() {
		return q, errQuestion
	}
	for !list.Empty() {
		var single, more cryptobyte.String
		var id certID
		if len(q.ids) == maxQuestions || !list.ReadASN1(&single, cryptobyte_asn1.SEQUENCE) || !id.read(&single) ||
			!single.ReadOptionalASN1(&more, &some, inside(0)) || !single.Empty() {
			return q, errQuestion
		}
		if some && !eachExtension(more, func(asn1.ObjectIdentifier, []byte) bool { return true }) {
			return q, errQuestion
		}
		q.ids = append(q.ids, id)
	}
	if len(q.ids) == 0 {
		return q, errQuestion
	}
	if hasExtensions && !eachExtension(extensions, func(oid asn1.ObjectIdentifier, value []byte) bool {
		if !oid.Equal(oidOCSPNonce) {
			return true
		}
		var nonce cryptobyte.String
		in := cryptobyte.String(value)
		if q.nonce != nil || !in.ReadASN1(&nonce, cryptobyte_asn1.OCTET_STRING) || !in.Empty() || len(nonce) == 0 || len(nonce) > maxNonce {
			return false // RFC 9654, Section 2.1
		}
		q.nonce = value
		return true
	}) {
		return q, errQuestion
	}
	return q, nil
}

func (id *certID) read(s *cryptobyte.String) bool {
	var raw, body, algorithm, null cryptobyte.String
	var oid asn1.ObjectIdentifier
	id.serial = new(big.Int)
	if !s.ReadASN1Element(&raw, cryptobyte_asn1.SEQUENCE) {
		return false
	}
	id.raw = raw
	if !raw.ReadASN1(&body, cryptobyte_asn1.SEQUENCE) ||
		!body.ReadASN1(&algorithm, cryptobyte_asn1.SEQUENCE) || !algorithm.ReadASN1ObjectIdentifier(&oid) ||
		!algorithm.Empty() && (!algorithm.ReadASN1(&null, cryptobyte_asn1.NULL) || !null.Empty() || !algorithm.Empty()) ||
		!body.ReadASN1((*cryptobyte.String)(&id.name), cryptobyte_asn1.OCTET_STRING) ||
		!body.ReadASN1((*cryptobyte.String)(&id.key), cryptobyte_asn1.OCTET_STRING) ||
		!body.ReadASN1Integer(id.serial) || !body.Empty() {
		return false
	}
	id.hash = hashes[oid.String()]
	return id.hash != 0
}

// eachExtension calls f for each of some extensions that we know, and is false when they cannot be read, one is critical that we
// do not know (RFC 6960, Section 4.4), or f says so.
func eachExtension(s cryptobyte.String, f func(oid asn1.ObjectIdentifier, value []byte) bool) bool {
	var list cryptobyte.String
	if !s.ReadASN1(&list, cryptobyte_asn1.SEQUENCE) || !s.Empty() {
		return false
	}
	for !list.Empty() {
		var ext, value cryptobyte.String
		var oid asn1.ObjectIdentifier
		critical := false
		if !list.ReadASN1(&ext, cryptobyte_asn1.SEQUENCE) || !ext.ReadASN1ObjectIdentifier(&oid) ||
			ext.PeekASN1Tag(cryptobyte_asn1.BOOLEAN) && !ext.ReadASN1Boolean(&critical) ||
			!ext.ReadASN1(&value, cryptobyte_asn1.OCTET_STRING) || !ext.Empty() ||
			critical && !oid.Equal(oidOCSPNonce) || !f(oid, value) {
			return false
		}
	}
	return true
}

// shownID names a certificate that the hub shows itself, and no device has.
type shownID struct{ issuer, serial string }

// HubCertificate is Authority.HubCertificate, of a certificate that is good to whoever asks.
func (s *Service) HubCertificate(hosts []string) (tls.Certificate, error) {
	c, err := s.a.HubCertificate(hosts)
	return s.show(c, err)
}

// HTTPSCertificate is Authority.HTTPSCertificate, likewise.
func (s *Service) HTTPSCertificate(hosts []string) (tls.Certificate, error) {
	c, err := s.a.HTTPSCertificate(hosts)
	return s.show(c, err)
}

// hubCertificateFor is HubCertificate, under the device root, or HTTPSCertificate, under the HTTPS root, for the key of a part that runs
// elsewhere, which has signed the request; nothing else of that counts. What is returned is in the ledger.
func (s *Service) hubCertificateFor(ctx context.Context, r Root, hosts []string, csr []byte) (c tls.Certificate, err error) {
	defer func() { s.count(err) }()
	use, name := hubUsage, s.a.hubName()
	switch {
	case r == HTTPS && len(hosts) == 0:
		return c, errNoHosts
	case r == HTTPS:
		use, name = serverUsage, httpsName
	case r != Device:
		return c, errRoot
	}
	req, err := parseCSR(csr, use)
	if err != nil {
		return c, err
	}
	if err := s.mayHave(ctx, req.RawSubjectPublicKeyInfo); err != nil {
		return c, err
	}
	if c, err = s.a.serverCertificateFor(req.PublicKey, r, name, hosts, use); err != nil {
		return c, err
	}
	return c, s.record(ctx, c.Leaf, entry{Profile: hub.ForHub, How: hub.ByCSR})
}

// show remembers a certificate of the hub. They are not in the ledger: their keys end with the process.
func (s *Service) show(c tls.Certificate, err error) (tls.Certificate, error) {
	if err != nil {
		return c, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	for id, until := range s.shown {
		if now.After(until) {
			delete(s.shown, id)
		}
	}
	by, _ := s.a.issuerOf(c.Leaf)
	s.shown[shownID{by.name, hub.SerialOf(c.Leaf.SerialNumber)}] = c.Leaf.NotAfter
	return c, nil
}

// Staple is an answer about a certificate of these two, for the hub to show with it (RFC 6066, Section 8). It is NotFound for any
// other, and for one whose issuer was retired.
func (s *Service) Staple(c *tls.Certificate) (hub.CertificateStatus, error) {
	by, _ := s.a.issuerOf(c.Leaf)
	s.mu.Lock()
	_, own := s.shown[shownID{by.name, hub.SerialOf(c.Leaf.SerialNumber)}]
	s.mu.Unlock()
	if !own || by.key == nil {
		return hub.CertificateStatus{}, errNotShown
	}
	return s.staple(by, c.Leaf)
}

var errNotShown = hub.NewError(hub.NotFound, "issuer-unknown", "the certificate is none that the hub shows")

func (s *Service) staple(by signer, leaf *x509.Certificate) (hub.CertificateStatus, error) {
	r := s.responder(by)
	id, err := r.idOf(leaf)
	if err != nil {
		return hub.CertificateStatus{}, err
	}
	return r.sign(question{ids: []certID{id}}, []certStatus{{word: "good"}}, time.Now())
}

// stapleOf is Staple for a certificate of a part that runs elsewhere.
func (s *Service) stapleOf(ctx context.Context, leaf *x509.Certificate) (hub.CertificateStatus, error) {
	by, ours := s.a.issuerOf(leaf)
	if !ours || by.key == nil {
		return hub.CertificateStatus{}, errNotShown
	}
	doc, err := s.docs.Get(ctx, collCertificates, hub.SerialOf(leaf.SerialNumber))
	if err != nil {
		return hub.CertificateStatus{}, err
	}
	e, err := decodeEntry(doc)
	if doc.Rev == 0 || err == nil && (e.Profile != hub.ForHub || e.Issuer != by.name || !e.live(time.Now())) {
		return hub.CertificateStatus{}, errNotShown
	}
	if err != nil {
		return hub.CertificateStatus{}, err
	}
	return s.staple(by, leaf)
}

// idOf names a certificate as most clients do, by SHA-1.
func (r *responder) idOf(leaf *x509.Certificate) (id certID, err error) {
	name, key := sha1.Sum(r.signer.issuing.RawSubject), sha1.Sum(publicKey(r.signer.issuing))
	id.raw, err = asn1.Marshal(struct {
		Hash      pkix.AlgorithmIdentifier
		Name, Key []byte
		Serial    *big.Int
	}{pkix.AlgorithmIdentifier{Algorithm: oidSHA1, Parameters: asn1.NullRawValue}, name[:], key[:], leaf.SerialNumber})
	if err != nil {
		return id, fmt.Errorf("name a certificate: %w", err)
	}
	return id, nil
}
