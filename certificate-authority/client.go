package certificateauthority

import (
	"context"
	"encoding/pem"
	"fmt"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
)

const (
	// clientValidity is how long an application's certificate lasts.
	clientValidity = 365 * 24 * time.Hour
	// maxCommonName is how long a common name may be (RFC 5280, Appendix A: ub-common-name).
	maxCommonName = 64
	// maxHosts bounds the names of a service.
	maxHosts = 16
)

// Certificates that are no device's are under the HTTPS root: the devices' door believes it in nothing. Of the request only the key
// is taken. What is returned is PEM, the certificate first, and in the ledger; errors are those of Sign, but nobody asks whose a
// device is, and the limits are those of a name.

// SignClient answers a request with a certificate for an application of the owner: clientAuth, and the common name owner:<owner>,
// which no device and no host has. It lasts a year.
func (s *Service) SignClient(ctx context.Context, owner hub.Owner, user string, csr []byte) (chain []byte, err error) {
	if owner == "" {
		return nil, hub.NewError(hub.Denied, "owner-missing", "certificates are for owners").With("certificateauthority.SignClient", nil)
	}
	return s.signName(ctx, csr, clientName(owner), nil, clientValidity, clientUsage, entry{Profile: hub.ForClient, Owner: owner, User: user})
}

// SignService answers a request with a certificate for a server that an operator runs, of the hosts that he names (names or
// addresses without port, at least one): serverAuth and clientAuth, and the first host as its common name. It lasts 397 days.
func (s *Service) SignService(ctx context.Context, owner hub.Owner, user string, hosts []string, csr []byte) (chain []byte, err error) {
	const op = "certificateauthority.SignService"
	switch {
	case len(hosts) == 0:
		return nil, errNoHosts.With(op, nil)
	case len(hosts) > maxHosts:
		return nil, hub.NewError(hub.TooLarge, "hosts-too-many", "a server certificate has at most 16 hosts").With(op, nil)
	}
	for i, h := range hosts {
		// A device's ID is a host name by its letters, and not to be taken for one.
		if _, err := hub.ParseDeviceID(h); err == nil || !validHost(h) || i == 0 && len(h) > maxCommonName {
			return nil, hub.NewError(hub.Invalid, "host-invalid", fmt.Sprintf("%q is neither a host name nor an address", h)).With(op, nil)
		}
	}
	return s.signName(ctx, csr, hosts[0], hosts, serverValidity, serviceUsage, entry{Profile: hub.ForService, Owner: owner, User: user})
}

// clientName is the common name of an owner's applications. An owner whose name has no place in one is named by a UUID of it.
func clientName(owner hub.Owner) string {
	name := "owner:" + string(owner)
	if len(name) > maxCommonName || !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return "owner-id:" + uuid.NewSHA1(uuid.NameSpaceURL, []byte(owner)).String()
	}
	return name
}

func (s *Service) signName(
	ctx context.Context, csr []byte, name string, hosts []string, validity time.Duration, use usage, e entry,
) (chain []byte, err error) {
	defer func() { s.count(err) }()
	op := "certificateauthority.Sign " + string(e.Profile)
	req, err := parseCSR(csr, use)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	turn := s.turn(name)
	turn.Lock()
	defer turn.Unlock()
	if err := s.mayHave(ctx, req.RawSubjectPublicKeyInfo); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if err := s.roomFor(ctx, name); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	l := s.a.line(HTTPS)
	signer := l.signer()
	use.lists, use.responders = s.use.lists, s.use.responders
	leaf, err := signer.signKey(req.PublicKey, name, validity, use, hosts)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	e.How = hub.ByCSR
	if err := s.record(ctx, leaf, e); err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	chain = certPEM(leaf)
	for _, der := range l.chain(time.Now()) {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return chain, nil
}

// roomFor refuses one more certificate of a name that has many.
func (s *Service) roomFor(ctx context.Context, name string) error {
	live, made, err := s.tally(ctx, indexName+name, func(*entry) bool { return true })
	if err != nil {
		return err
	}
	if live >= maxLive || made >= maxMade {
		return hub.NewError(hub.Exhausted, "certificates-limit", "there are too many certificates of this name; revoke some, or wait")
	}
	return nil
}
