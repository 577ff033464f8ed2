package revocation

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cryptobyte_asn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// list is a revocation list that was verified.
type list struct {
	issuer  *issuer
	from    time.Time // thisUpdate
	until   time.Time // nextUpdate
	number  *big.Int  // nil: it has none
	serials map[string]struct{}
	scope   scope
	sum     [sha256.Size]byte
}

// scope is which of an issuer's certificates a list is about (RFC 5280, Section 5.2.5).
type scope struct {
	raw        string   // the extension
	points     []string // it is about those that name one of these; nil: about all
	users, cas bool     // it is about those only
}

// Why a list is not taken. They are labels of a metric.
type trouble string

const (
	unreachable trouble = "unreachable"
	invalid     trouble = "invalid" // no list, not of the set's CAs, or of a kind that is not understood
	late        trouble = "late"
	early       trouble = "early" // not yet
	back        trouble = "back"  // older than the one before
	busy        trouble = "busy"
)

// refusal says why a list, or an answer, is not taken.
type refusal struct {
	why trouble
	err error
}

func (r *refusal) Error() string { return string(r.why) + ": " + r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

func refused(why trouble, format string, args ...any) error {
	return &refusal{why, fmt.Errorf(format, args...)}
}

var (
	oidNumber      = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidReason      = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidInvalidity  = asn1.ObjectIdentifier{2, 5, 29, 24}
	oidDelta       = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidScope       = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidOtherIssuer = asn1.ObjectIdentifier{2, 5, 29, 29}
	oidKeyID       = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// parse reads a list, DER or PEM, and verifies that a CA of the set made it (RFC 5280, Sections 5 and 6.3.3). Whether it is of
// today it does not look at.
func (s *set) parse(b []byte) (*list, error) {
	if bytes.HasPrefix(bytes.TrimSpace(b), []byte("-----BEGIN ")) {
		block, _ := pem.Decode(b)
		if block == nil || block.Type != "X509 CRL" {
			return nil, refused(invalid, "the text is no list in PEM")
		}
		b = block.Bytes
	}
	rl, err := x509.ParseRevocationList(b)
	if err != nil {
		return nil, refused(invalid, "read the list: %w", err)
	}
	l := &list{from: rl.ThisUpdate, until: rl.NextUpdate, number: rl.Number, sum: sha256.Sum256(b)}
	for _, iss := range s.issuers {
		if bytes.Equal(iss.cert.RawSubject, rl.RawIssuer) && rl.CheckSignatureFrom(iss.cert) == nil { // which wants cRLSign
			l.issuer = iss
			break
		}
	}
	switch {
	case l.issuer == nil:
		return nil, refused(invalid, "the list of %s was signed by no CA of the set", rl.Issuer)
	case rl.SignatureAlgorithm == x509.SHA1WithRSA || rl.SignatureAlgorithm == x509.ECDSAWithSHA1:
		return nil, refused(invalid, "the list is signed with SHA-1")
	case l.until.IsZero(): // RFC 5280, Section 5.1.2.5
		return nil, refused(invalid, "the list does not say how long it is good")
	case l.until.Before(l.from):
		return nil, refused(invalid, "the list ends before it begins")
	}
	for _, ext := range rl.Extensions {
		switch {
		case ext.Id.Equal(oidDelta):
			return nil, refused(invalid, "the list is a delta")
		case ext.Id.Equal(oidScope):
			if l.scope, err = parseScope(ext.Value); err != nil {
				return nil, &refusal{invalid, err}
			}
		case ext.Id.Equal(oidNumber), ext.Id.Equal(oidKeyID), !ext.Critical:
		default: // RFC 5280, Section 5.2
			return nil, refused(invalid, "the list has a critical extension %v that is not understood", ext.Id)
		}
	}
	l.serials = make(map[string]struct{}, len(rl.RevokedCertificateEntries))
	for i := range rl.RevokedCertificateEntries {
		entry := &rl.RevokedCertificateEntries[i]
		for _, ext := range entry.Extensions {
			if ext.Critical && !ext.Id.Equal(oidReason) && !ext.Id.Equal(oidInvalidity) || ext.Id.Equal(oidOtherIssuer) { // RFC 5280, Section 5.3
				return nil, refused(invalid, "an entry of the list has an extension %v that is not understood", ext.Id)
			}
		}
		l.serials[string(entry.SerialNumber.Bytes())] = struct{}{}
	}
	return l, nil
}

var (
	errScope    = errors.New("the list's issuing distribution point cannot be read")
	errIndirect = errors.New("the list is indirect, of some reasons, or about attributes, which is not understood")
)

// parseScope reads an IssuingDistributionPoint.
func parseScope(der []byte) (sc scope, err error) {
	in := cryptobyte.String(der)
	var body cryptobyte.String
	if !in.ReadASN1(&body, cryptobyte_asn1.SEQUENCE) || !in.Empty() {
		return sc, errScope
	}
	sc.raw = string(der)
	tag := func(n uint8) cryptobyte_asn1.Tag { return cryptobyte_asn1.Tag(n).ContextSpecific() }
	var point, names cryptobyte.String
	var has bool
	if !body.ReadOptionalASN1(&point, &has, tag(0).Constructed()) {
		return sc, errScope
	}
	if has {
		if !point.ReadASN1(&names, tag(0).Constructed()) || !point.Empty() { // else it is a name relative to another
			return sc, errScope
		}
		for !names.Empty() {
			var name cryptobyte.String
			var kind cryptobyte_asn1.Tag
			if !names.ReadAnyASN1(&name, &kind) {
				return sc, errScope
			}
			if kind == tag(6) {
				sc.points = append(sc.points, string(name))
			}
		}
		if len(sc.points) == 0 {
			return sc, errScope
		}
	}
	for n := uint8(1); n <= 5; n++ {
		var value cryptobyte.String
		if !body.ReadOptionalASN1(&value, &has, tag(n)) {
			return sc, errScope
		}
		set := has && len(value) == 1 && value[0] != 0
		switch {
		case !has:
		case n == 1:
			sc.users = set
		case n == 2:
			sc.cas = set
		case n == 3 || set: // onlySomeReasons, indirectCRL, onlyContainsAttributeCerts
			return sc, errIndirect
		}
	}
	if !body.Empty() {
		return sc, errScope
	}
	return sc, nil
}

// covers reports whether the list is about a certificate of its issuer. A list of some points is about those that name one of
// them, whether or not it was found there (RFC 5280, Section 6.3.3 (b) (2)).
func (l *list) covers(c *x509.Certificate) bool {
	switch {
	case l.scope.users && c.IsCA, l.scope.cas && !c.IsCA:
		return false
	case l.scope.points == nil:
		return true
	}
	return slices.ContainsFunc(c.CRLDistributionPoints, func(p string) bool { return slices.Contains(l.scope.points, p) })
}

func (l *list) has(c *x509.Certificate) bool {
	_, ok := l.serials[string(c.SerialNumber.Bytes())]
	return ok
}

func (l *list) fresh(now time.Time) bool { return !now.After(l.until.Add(skew)) }

// follows reports what speaks against taking the list in the place of one of the same issuer and scope.
func (l *list) follows(old *list) error {
	switch {
	case l.number != nil && old.number != nil && l.number.Cmp(old.number) < 0, l.number == nil && old.number != nil:
		return refused(back, "the list has number %v, the one before had %v", l.number, old.number)
	case l.from.Before(old.from):
		return refused(back, "the list is of %v, the one before was of %v", l.from, old.from)
	}
	return nil
}
