package certificateauthority

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collGroups has the enrolment groups, by ID.
const collGroups = "enrolment-groups"

const (
	// maxGroups bounds the groups, and maxAllow the devices that one names.
	maxGroups = 1000
	maxAllow  = 100_000
	// maxChain bounds the PEM of a group's CA and what is above it.
	maxChain = 64 << 10
	maxName  = 256
	// maxBehind bounds the certificates that come behind a factory certificate.
	maxBehind = 8
	// maxRSA bounds the keys of factory certificates and what is behind them, in bits.
	maxRSA = 8192
	// pskLength is how much of a group's key devices get: it is one for AES-128 (OCF Security, oic.sec.cred).
	pskLength, maxPSK = 16, 256
)

// group is a group ready for use.
type group struct {
	hub.EnrolmentGroup
	rev   uint64
	ca    *x509.Certificate   // the first of Chain
	above []*x509.Certificate // the others
	psk   []byte              // sealed
}

// groupDoc is such a document.
type groupDoc struct {
	Name     string         `json:"name"`
	Owner    hub.Owner      `json:"owner"`
	Chain    string         `json:"chain"`
	Allow    []hub.DeviceID `json:"allow,omitempty"`
	Approval bool           `json:"approval,omitempty"`
	Expired  bool           `json:"expired,omitempty"`
	Named    bool           `json:"named,omitempty"`
	PSK      []byte         `json:"psk,omitempty"` // sealed
	Created  time.Time      `json:"created"`
	User     string         `json:"user,omitempty"`
}

// readGroup reads a group that somebody wrote.
func readGroup(g hub.EnrolmentGroup) (*group, error) {
	switch {
	case g.Owner == "":
		return nil, hub.NewError(hub.Invalid, "owner-missing", "a group's devices need an owner")
	case len(g.Name) > maxName || strings.ContainsFunc(g.Name, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return nil, hub.NewError(hub.Invalid, "group-name-invalid", "a group's name has at most 256 bytes, and no control characters")
	case len(g.Chain) > maxChain:
		return nil, hub.NewError(hub.TooLarge, "group-chain-too-large", "a group's certificates have at most 64 KiB")
	case g.PSK != "" && (len(g.PSK) < pskLength || len(g.PSK) > maxPSK):
		return nil, hub.NewError(hub.Invalid, "group-psk-invalid", "a group's pre-shared key has 16 to 256 bytes, of which devices get 16")
	case len(g.Allow) > maxAllow:
		return nil, hub.NewError(hub.TooLarge, "group-allow-too-long", "a group names at most 100000 devices")
	}
	out := &group{EnrolmentGroup: g}
	for rest := []byte(g.Chain); len(strings.TrimSpace(string(rest))) > 0; {
		block, tail := pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" {
			return nil, hub.NewError(hub.Invalid, "group-chain-invalid", "a group's CA and what is above it are certificates, PEM")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, hub.NewError(hub.Invalid, "group-chain-invalid", "a certificate of the group cannot be read")
		}
		if !c.IsCA || !c.BasicConstraintsValid || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return nil, hub.NewError(hub.Invalid, "group-chain-no-ca", "a certificate of the group is not a CA's")
		}
		if out.ca == nil {
			out.ca = c
		} else {
			out.above = append(out.above, c)
		}
		rest = tail
	}
	if out.ca == nil {
		return nil, hub.NewError(hub.Invalid, "group-chain-invalid", "a group needs the CA that signs its devices' certificates, PEM")
	}
	out.Allow = slices.Clone(g.Allow)
	slices.Sort(out.Allow)
	out.Allow = slices.Compact(out.Allow)
	return out, nil
}

// all returns the groups, oldest first, as they are stored. They are read once, and anew after a change.
func (s *Service) all(ctx context.Context) ([]*group, error) {
	if gs := s.groups.Load(); gs != nil {
		return *gs, nil
	}
	s.grouping.Lock()
	defer s.grouping.Unlock()
	return s.readGroups(ctx)
}

// readGroups is all with s.grouping held.
func (s *Service) readGroups(ctx context.Context) ([]*group, error) {
	if gs := s.groups.Load(); gs != nil {
		return *gs, nil
	}
	var out []*group
	for doc, err := range s.docs.Range(ctx, collGroups, "", "") {
		if err != nil {
			return nil, err
		}
		var d groupDoc
		if err := json.Unmarshal(doc.Value, &d); err != nil {
			return nil, damaged("an enrolment group", err)
		}
		g, err := readGroup(hub.EnrolmentGroup{
			ID: doc.Key, Name: d.Name, Owner: d.Owner, Chain: d.Chain, Allow: d.Allow, Approval: d.Approval, Expired: d.Expired,
			Named: d.Named, HasPSK: len(d.PSK) > 0, Created: d.Created, User: d.User,
		})
		if err != nil {
			return nil, damaged("an enrolment group", err)
		}
		g.rev, g.psk = doc.Rev, d.PSK
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b *group) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	s.groups.Store(&out)
	return out, nil
}

// groupOf finds the group that a chain leads to; of several the first that names the device, else the one that names none.
// What leads nowhere is Unauthenticated, and what is denied Denied. revoked refuses chains that are revoked; it is asked only where
// somebody says what manufacturers revoke.
func (s *Service) groupOf(
	ctx context.Context, chain []*x509.Certificate, said saying, revoked func(context.Context, [][]*x509.Certificate) error,
) (*group, error) {
	gs, err := s.all(ctx)
	if err != nil {
		return nil, err
	}
	var open *group
	var ways [][]*x509.Certificate
	var why error
	for _, g := range gs {
		verified, err := g.verify(chain, time.Now())
		if err != nil {
			why = err
			continue
		}
		_, named := slices.BinarySearch(g.Allow, s.deviceIn(g, chain[0], said))
		if named || open == nil || len(open.Allow) > 0 && len(g.Allow) == 0 {
			open, ways = g, verified
		}
		if named {
			break
		}
	}
	if open == nil {
		return nil, errProof.With("verify", why)
	}
	if err := s.denied(chain, []*x509.Certificate{open.ca}); err != nil {
		return nil, err
	}
	if s.factories == nil {
		return open, nil
	}
	for i := range ways {
		ways[i] = open.upward(ways[i])
	}
	return open, revoked(ctx, ways)
}

// upward goes on with a chain that ends at the group's CA, as far as the group's certificates lead: who says what is revoked may be
// above that CA. A certificate that did not issue the one before is nothing to go by.
func (g *group) upward(chain []*x509.Certificate) []*x509.Certificate {
	for range g.above {
		last := chain[len(chain)-1]
		i := slices.IndexFunc(g.above, func(c *x509.Certificate) bool {
			return !slices.ContainsFunc(chain, c.Equal) && bytes.Equal(last.RawIssuer, c.RawSubject) && last.CheckSignatureFrom(c) == nil
		})
		if i < 0 {
			break
		}
		chain = append(chain, g.above[i])
	}
	return chain
}

var errLargeKey = errors.New("a key of the chain is too large")

// verify verifies a factory certificate. Its chain may end at the group's CA, which need not be a root: whoever made the group
// trusts that one. It returns all ways to that CA.
func (g *group) verify(chain []*x509.Certificate, now time.Time) ([][]*x509.Certificate, error) {
	// Everybody is verified in the handshake, for each group: whoever does not name its CA costs no signature, and others few.
	if len(chain) > 1+maxBehind || !slices.ContainsFunc(chain, func(c *x509.Certificate) bool { return bytes.Equal(c.RawIssuer, g.ca.RawSubject) }) {
		return nil, x509.UnknownAuthorityError{Cert: chain[0]}
	}
	// crypto/tls has the same bound. SCEP, DTLS and proxies have none, and a key of what 48 KiB hold costs more than a second.
	if slices.ContainsFunc(chain, func(c *x509.Certificate) bool {
		key, ok := c.PublicKey.(*rsa.PublicKey)
		return ok && key.N.BitLen() > maxRSA
	}) {
		return nil, errLargeKey
	}
	leaf := chain[0]
	if g.Expired && now.After(leaf.NotAfter) {
		now = leaf.NotAfter
	}
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(g.ca)
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if len(leaf.ExtKeyUsage)+len(leaf.UnknownExtKeyUsage) == 0 { // IEEE 802.1AR has none: all are allowed (RFC 5280, Section 4.2.1.12)
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	}
	return leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: usages})
}

// SetGroup makes a group, if it has no ID yet, or replaces the one that has this ID; then its owner and creation stay, and its
// pre-shared key if HasPSK says so and there is no other. It returns the group as it is stored. Kinds: Invalid and TooLarge for what
// is in it, Exhausted at 1000 groups, NotFound for an ID that there is not, Precondition ("group-ca-taken") if another owner has the
// devices of the same CA and one of both names none: else it could take the other's.
func (s *Service) SetGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	const op = "certificateauthority.SetGroup"
	out, err := s.setGroup(ctx, g)
	if err != nil {
		return out, fmt.Errorf("%s: %w", op, err)
	}
	return out, nil
}

func (s *Service) setGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	s.grouping.Lock()
	defer s.grouping.Unlock()
	gs, err := s.readGroups(ctx)
	if err != nil {
		return hub.EnrolmentGroup{}, err
	}
	rev, sealed := uint64(0), []byte(nil)
	if g.ID != "" {
		i := slices.IndexFunc(gs, func(o *group) bool { return o.ID == g.ID })
		if i < 0 {
			return hub.EnrolmentGroup{}, errNoGroup
		}
		g.Owner, g.Created, g.User, rev, sealed = gs[i].Owner, gs[i].Created, gs[i].User, gs[i].rev, gs[i].psk
	} else {
		if len(gs) >= maxGroups {
			return hub.EnrolmentGroup{}, hub.NewError(hub.Exhausted, "groups-limit", "there are 1000 enrolment groups")
		}
		g.ID, g.Created = uuid.NewString(), time.Now().UTC()
	}
	keep := g.HasPSK // nobody can write again what nobody is shown
	in, err := readGroup(g)
	if err != nil {
		return hub.EnrolmentGroup{}, err
	}
	switch {
	case in.PSK != "":
		if sealed, err = s.seal(in.ID, in.PSK); err != nil {
			return hub.EnrolmentGroup{}, err
		}
	case !keep:
		sealed = nil
	}
	// What it signs is a renewal, and only while it is good.
	if slices.ContainsFunc(append(in.above, in.ca), s.a.ours) {
		return hub.EnrolmentGroup{}, hub.NewError(hub.Invalid, "group-ca-own", "a group's CA is a manufacturer's; this is one of the hub's own")
	}
	in.PSK, in.HasPSK = "", len(sealed) > 0
	for _, o := range gs {
		if o.ID != in.ID && in.meets(o) && in.disputes(o) {
			return hub.EnrolmentGroup{}, hub.NewError(hub.Precondition, "group-ca-taken",
				"another group has devices of this CA; name those of this group, none of which is in the other")
		}
	}
	value, err := json.Marshal(groupDoc{
		Name: in.Name, Owner: in.Owner, Chain: in.Chain, Allow: in.Allow, Approval: in.Approval, Expired: in.Expired, Named: in.Named,
		PSK: sealed, Created: in.Created, User: in.User,
	})
	if err != nil {
		return hub.EnrolmentGroup{}, fmt.Errorf("encode an enrolment group: %w", err)
	}
	_, err = s.docs.Put(ctx, collGroups, store.Doc{Key: in.ID, Value: value, Rev: rev, Index: []string{indexOwner + string(in.Owner)}})
	s.groups.Store(nil) // also after an error: nobody knows what is stored
	return in.EnrolmentGroup, err
}

// meets reports whether one factory certificate may lead to both groups: their CA is the same, or one is below the other of another
// owner, as far as their chains tell.
func (g *group) meets(o *group) bool {
	if g.Owner == o.Owner {
		return sameKey(g.ca, o.ca)
	}
	return g.below(o.ca) || o.below(g.ca)
}

// below reports whether the group's CA is that one, or under it.
func (g *group) below(ca *x509.Certificate) bool {
	return slices.ContainsFunc(append(g.above[:len(g.above):len(g.above)], g.ca), func(c *x509.Certificate) bool {
		return sameKey(c, ca) || bytes.Equal(c.RawIssuer, ca.RawSubject) && c.CheckSignatureFrom(ca) == nil
	})
}

func sameKey(a, b *x509.Certificate) bool {
	return bytes.Equal(a.RawSubjectPublicKeyInfo, b.RawSubjectPublicKeyInfo)
}

// disputes reports whether a device of CAs that meet could be meant by both groups.
func (g *group) disputes(o *group) bool {
	if (g.Named || o.Named) && g.Owner != o.Owner {
		return true // whatever they name: any key of this CA may say it, and is asked for an owner before it does
	}
	if len(g.Allow) == 0 || len(o.Allow) == 0 {
		// One that names devices may stand beside one of all others, if both are of the same owner.
		return g.Owner != o.Owner || len(g.Allow) == len(o.Allow)
	}
	return slices.ContainsFunc(g.Allow, func(dev hub.DeviceID) bool {
		_, both := slices.BinarySearch(o.Allow, dev)
		return both
	})
}

var errNoGroup = hub.NewError(hub.NotFound, "group-unknown", "there is no such enrolment group")

// Groups returns the groups of an owner, or all if owner is "", oldest first.
func (s *Service) Groups(ctx context.Context, owner hub.Owner) ([]hub.EnrolmentGroup, error) {
	gs, err := s.all(ctx)
	if err != nil {
		return nil, fmt.Errorf("certificateauthority.Groups: %w", err)
	}
	var out []hub.EnrolmentGroup
	for _, g := range gs {
		if owner == "" || g.Owner == owner {
			out = append(out, g.EnrolmentGroup)
		}
	}
	return out, nil
}

// DeleteGroups removes groups: no more of their devices enrol. Those that have keep their certificates. It returns what it removed;
// IDs that there are not are passed over.
func (s *Service) DeleteGroups(ctx context.Context, ids []string) (out []hub.EnrolmentGroup, err error) {
	s.grouping.Lock()
	defer s.grouping.Unlock()
	defer s.groups.Store(nil)
	gs, err := s.readGroups(ctx)
	if err != nil {
		return nil, fmt.Errorf("certificateauthority.DeleteGroups: %w", err)
	}
	for _, g := range gs {
		if !slices.Contains(ids, g.ID) {
			continue
		}
		if err := s.docs.Delete(ctx, collGroups, g.ID, g.rev); err != nil {
			return out, fmt.Errorf("certificateauthority.DeleteGroups: %w", err)
		}
		out = append(out, g.EnrolmentGroup)
	}
	return out, nil
}
