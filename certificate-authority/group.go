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
	"net/url"
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
	// maxNamed bounds the devices that all groups of an owner name: those IDs are kept for him.
	maxNamed = 1_000_000
	// maxChain bounds the PEM of a group's CA and what is above it.
	maxChain = 64 << 10
	maxName  = 256
	maxURL   = 2048
	maxTypes = 64
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
	Types    []string       `json:"types,omitempty"`
	Terms    hub.Terms      `json:"terms,omitzero"`
	Accepted hub.Acceptance `json:"accepted,omitzero"`
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
	if err := checkTerms(g.Terms); err != nil {
		return nil, err
	}
	if len(g.Types) > maxTypes || slices.ContainsFunc(g.Types, func(t string) bool { return !isDeviceType(t) }) {
		return nil, hub.NewError(hub.Invalid, "group-types-invalid", "a group names at most 64 device types, such as oic.d.light, or x.com.example.lamp")
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
	out.Types = slices.Clone(g.Types)
	slices.Sort(out.Allow)
	out.Allow = slices.Compact(out.Allow)
	return out, nil
}

func checkTerms(t hub.Terms) error {
	if len(t.Version) > maxName || strings.ContainsFunc(t.Version, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
		return hub.NewError(hub.Invalid, "group-terms-invalid", "the version of a group's terms has at most 256 bytes, and no control characters")
	}
	if t.URL == "" {
		return nil
	}
	// A person is to open it.
	u, err := url.Parse(t.URL)
	if err != nil || len(t.URL) > maxURL || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || t.Version == "" {
		return hub.NewError(hub.Invalid, "group-terms-invalid", "the text of a group's terms is at an http or https URL of at most 2048 bytes, and has a version")
	}
	return nil
}

// agreed reports whether the group's terms were accepted, if it has any.
func (g *group) agreed() bool { return g.Terms.Version == "" || g.Accepted.Version == g.Terms.Version }

// putGroup stores a group as it is now.
func (s *Service) putGroup(ctx context.Context, g *group) error {
	value, err := json.Marshal(groupDoc{
		Name: g.Name, Owner: g.Owner, Chain: g.Chain, Allow: g.Allow, Approval: g.Approval, Expired: g.Expired, Named: g.Named,
		Types: g.Types, Terms: g.Terms, Accepted: g.Accepted, PSK: g.psk, Created: g.Created, User: g.User,
	})
	if err != nil {
		return fmt.Errorf("encode an enrolment group: %w", err)
	}
	rev, err := s.docs.Put(ctx, collGroups, store.Doc{Key: g.ID, Value: value, Rev: g.rev, Index: []string{indexOwner + string(g.Owner)}})
	s.groupsChanged(ctx) // also after an error: nobody knows what is stored
	if err == nil {
		g.rev = rev
	}
	return err
}

// groupsChanged has groups read anew, here and by other authorities.
func (s *Service) groupsChanged(ctx context.Context) {
	s.dropGroups()
	s.toldLater(ctx, func(c *change) { c.Groups = true })
}

// dropGroups has groups read anew.
func (s *Service) dropGroups() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.read++
	s.groups.Store(nil)
}

// AcceptTerms keeps that somebody agreed to a version of a group's terms, which must be the one that the group has; once more changes
// nothing. Owner "" is an administrator's, and all groups. It returns the group. Kinds: NotFound ("group-unknown"), Precondition
// ("terms-version") for another version.
func (s *Service) AcceptTerms(ctx context.Context, owner hub.Owner, id, version, user string) (hub.EnrolmentGroup, error) {
	out, err := again(ctx, func() (hub.EnrolmentGroup, error) { return s.acceptTerms(ctx, owner, id, version, user) })
	if err != nil {
		return hub.EnrolmentGroup{}, fmt.Errorf("certificateauthority.AcceptTerms: %w", err)
	}
	return out, nil
}

func (s *Service) acceptTerms(ctx context.Context, owner hub.Owner, id, version, user string) (hub.EnrolmentGroup, error) {
	s.grouping.Lock()
	defer s.grouping.Unlock()
	gs, err := s.readGroups(ctx)
	if err != nil {
		return hub.EnrolmentGroup{}, err
	}
	i := slices.IndexFunc(gs, func(g *group) bool { return g.ID == id && (owner == "" || g.Owner == owner) })
	switch {
	case i < 0:
		return hub.EnrolmentGroup{}, errNoGroup
	case version == "" || gs[i].Terms.Version != version:
		return hub.EnrolmentGroup{}, hub.NewError(hub.Precondition, "terms-version", "the group's terms have another version, or it has none")
	case gs[i].Accepted.Version == version:
		return gs[i].EnrolmentGroup, nil
	}
	g := *gs[i] // others read that one
	g.Accepted = hub.Acceptance{Version: version, User: user, Time: time.Now().UTC()}
	return g.EnrolmentGroup, s.putGroup(ctx, &g)
}

// all returns the groups, oldest first, as they are stored. They are read once, and anew after a change.
func (s *Service) all(ctx context.Context) ([]*group, error) {
	current := s.current() // else others may have changed them
	if gs := s.groups.Load(); gs != nil && current {
		return *gs, nil
	}
	s.grouping.Lock()
	defer s.grouping.Unlock()
	if gs := s.groups.Load(); gs != nil && current {
		return *gs, nil
	}
	return s.readGroups(ctx)
}

// readGroups reads the groups for all. s.grouping is held.
func (s *Service) readGroups(ctx context.Context) ([]*group, error) {
	s.mu.Lock()
	read := s.read
	s.mu.Unlock()
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
			Named: d.Named, Types: d.Types, Terms: d.Terms, Accepted: d.Accepted, HasPSK: len(d.PSK) > 0, Created: d.Created, User: d.User,
		})
		if err != nil {
			return nil, damaged("an enrolment group", err)
		}
		g.rev, g.psk = doc.Rev, d.PSK
		out = append(out, g)
	}
	slices.SortFunc(out, func(a, b *group) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) })
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.read == read { // else they may be older than a change that others heard of
		s.groups.Store(&out)
	}
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
// pre-shared key if HasPSK says so and there is no other, and who accepted its terms. It returns the group as it is stored. Kinds: Invalid and TooLarge for what
// is in it, Exhausted at 1000 groups, NotFound for an ID that there is not, Precondition ("group-ca-taken") if another owner has the
// devices of the same CA and one of both names none: else it could take the other's, or ("group-allow-taken") names one of the devices.
func (s *Service) SetGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	const op = "certificateauthority.SetGroup"
	out, err := again(ctx, func() (hub.EnrolmentGroup, error) { return s.setGroup(ctx, g) })
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
		g.Accepted = gs[i].Accepted
	} else {
		g.Accepted = hub.Acceptance{}
		if len(gs) >= maxGroups {
			return hub.EnrolmentGroup{}, hub.NewError(hub.Exhausted, "groups-limit", "there are 1000 enrolment groups")
		}
		g.ID, g.Created = uuid.NewString(), time.Now().UTC()
	}
	var before []hub.DeviceID
	if i := slices.IndexFunc(gs, func(o *group) bool { return o.ID == g.ID }); i >= 0 {
		before = gs[i].Allow
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
	if err := in.mayStand(gs, before); err != nil {
		return hub.EnrolmentGroup{}, err
	}
	in.rev, in.psk = rev, sealed
	var old *group
	if i := slices.IndexFunc(gs, func(o *group) bool { return o.ID == in.ID }); i >= 0 {
		old = gs[i]
	}
	if err := s.putGroup(ctx, in); err != nil {
		return in.EnrolmentGroup, err
	}
	// Another authority may have stored one that the check before did not see; that one sees this.
	if gs, err = s.readGroups(ctx); err == nil {
		err = in.mayStand(gs, before)
	}
	if err == nil {
		return in.EnrolmentGroup, nil
	}
	if old != nil {
		put := *old
		put.rev = in.rev
		return hub.EnrolmentGroup{}, errors.Join(err, s.putGroup(ctx, &put))
	}
	defer s.groupsChanged(ctx)
	return hub.EnrolmentGroup{}, errors.Join(err, s.docs.Delete(ctx, collGroups, in.ID, in.rev))
}

// mayStand refuses a group whose devices could be meant by another group, too.
func (g *group) mayStand(gs []*group, before []hub.DeviceID) error {
	for _, o := range gs {
		if o.ID != g.ID && g.meets(o) && g.disputes(o) {
			return hub.NewError(hub.Precondition, "group-ca-taken",
				"another group has devices of this CA; name those of this group, none of which is in the other")
		}
	}
	return g.mayName(gs, before)
}

// mayName refuses devices that the group did not name before: those that a group of another owner names, and too many of one owner.
func (g *group) mayName(gs []*group, before []hub.DeviceID) error {
	n := len(g.Allow)
	for _, o := range gs {
		switch {
		case o.ID == g.ID:
		case o.Owner == g.Owner:
			n += len(o.Allow)
		case both(g.Allow, o.Allow, func(dev hub.DeviceID) bool { _, had := slices.BinarySearch(before, dev); return !had }):
			return hub.NewError(hub.Precondition, "group-allow-taken", "a group of another owner names one of these devices")
		}
	}
	if n > maxNamed && len(g.Allow) > len(before) {
		return hub.NewError(hub.Exhausted, "group-allow-limit", "the groups of an owner name at most 1000000 devices")
	}
	return nil
}

// both reports whether two lists in order have a device in common that counts.
func both(a, b []hub.DeviceID, counts func(hub.DeviceID) bool) bool {
	if len(a) > len(b) {
		a, b = b, a
	}
	return slices.ContainsFunc(a, func(dev hub.DeviceID) bool {
		_, found := slices.BinarySearch(b, dev)
		return found && counts(dev)
	})
}

// namedBy is the owner of the oldest group that names a device, "" if none does.
func (s *Service) namedBy(ctx context.Context, dev hub.DeviceID) (hub.Owner, error) {
	gs, err := s.all(ctx)
	if err != nil {
		return "", err
	}
	for _, g := range gs {
		if _, named := slices.BinarySearch(g.Allow, dev); named {
			return g.Owner, nil
		}
	}
	return "", nil
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
	return both(g.Allow, o.Allow, func(hub.DeviceID) bool { return true })
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
	defer s.groupsChanged(ctx)
	return again(ctx, func() ([]hub.EnrolmentGroup, error) {
		gs, err := s.readGroups(ctx)
		if err != nil {
			return out, fmt.Errorf("certificateauthority.DeleteGroups: %w", err)
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
	})
}
