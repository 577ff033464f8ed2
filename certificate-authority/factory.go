package certificateauthority

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/revocation"
	"github.com/coaphub/coaphub/internal/store"
)

// collFactoryKeys has, by factory key, the device that it stands for, where the device said so and not its manufacturer. What is
// there stays: a key that could change its mind could be one device after the other.
const collFactoryKeys = "factory-keys"

type factoryKey struct {
	Device hub.DeviceID `json:"device"`
	Since  time.Time    `json:"since"`
}

// saying is what is known of a device's ID besides its factory certificate.
type saying struct {
	device hub.DeviceID // "" for nothing
	kept   bool         // it said so before
}

// errIDInUse keeps a factory key from being a device that somebody else is, or may be: one that somebody owns or has a certificate for.
// The owner's other devices are no exception, since a key in a lamp must not open his door.
var errIDInUse = hub.NewError(hub.Denied, "enrolment-device-taken", "the ID that the device gives itself is another's")

// byFactory is a device whose manufacturer vouches for it. named is the ID that it gives itself, "" for none.
func (s *Service) byFactory(ctx context.Context, chain []*x509.Certificate, named hub.DeviceID) (applicant, error) {
	if len(chain) == 0 {
		return applicant{}, errProof
	}
	leaf := chain[0]
	said, err := s.said(ctx, leaf, named)
	if err != nil {
		return applicant{}, err
	}
	g, err := s.groupOf(ctx, chain, said, s.askRevoked)
	if err != nil {
		return applicant{}, err
	}
	kind, fits := g.typeOf(leaf)
	return applicant{
		device: s.deviceIn(g, leaf, said), allowed: !g.Approval, group: g, unfit: !fits,
		claims:   g.Named && said.device != "" && !said.kept,
		nameless: g.Named && named == "" && said.device == "" && identityIn(leaf.Subject) == "",
		enrolment: enrolment{
			By: hub.ByFactory, Group: g.ID, Owner: g.Owner, Key: nameOf(leaf.RawSubjectPublicKeyInfo), Type: kind,
			Proof: fmt.Sprintf("factory certificate %s of %s", hub.SerialOf(leaf.SerialNumber), leaf.Issuer.CommonName),
		},
	}, nil
}

// maxType bounds the name of a device type, as an organizational unit has it (RFC 5280, Appendix A.1: ub-organizational-unit-name).
const maxType = 64

// isDeviceType reports whether a text has the form of a device type: OCF's begin with oic.d., and others' with x.
func isDeviceType(text string) bool {
	return len(text) <= maxType && (strings.HasPrefix(text, "oic.d.") || strings.HasPrefix(text, "x.")) &&
		!strings.ContainsFunc(text, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '.' && r != '-' })
}

// typeOf is the device type that the manufacturer gives a device: an organizational unit in the subject of its factory certificate,
// the first that the group lets in, else the first that there is. What a device says of itself, in its request or in /oic/d, proves
// nothing, since whoever has the factory key may say it. fits: the group lets it in.
func (g *group) typeOf(leaf *x509.Certificate) (kind string, fits bool) {
	for _, unit := range leaf.Subject.OrganizationalUnit {
		switch {
		case !isDeviceType(unit):
		case slices.Contains(g.Types, unit):
			return unit, true
		case kind == "":
			kind = unit
		}
	}
	return kind, len(g.Types) == 0
}

// Factories has c say which factory certificates were revoked. It is called before anybody enrols.
func (s *Service) Factories(c *revocation.Checker) { s.factories = c }

var errRevocationUnknown = &hub.Error{
	Kind: hub.Unavailable, Code: "revocation-unknown", RetryAfter: 30 * time.Second,
	Text: "whether the device's certificate was revoked cannot be found out now",
}

// knownRevoked refuses verified chains of which something is known to be revoked. It is for handshakes, and waits for nobody.
func (s *Service) knownRevoked(_ context.Context, chains [][]*x509.Certificate) error {
	for _, chain := range chains {
		if s.factories.Known(chain) == revocation.Revoked {
			return errRevoked
		}
	}
	return nil
}

// askRevoked is knownRevoked behind the handshake: a responder may be asked, and where nobody knows the policy of the CA set decides.
// All ways to the group's CA count: which of them there are is the device's to say, by what it sends.
func (s *Service) askRevoked(ctx context.Context, chains [][]*x509.Certificate) error {
	if err := s.knownRevoked(ctx, chains); err != nil {
		return err
	}
	for _, chain := range chains {
		switch s.factories.Ask(ctx, chain) {
		case revocation.Revoked:
			return errRevoked
		case revocation.Unknown:
			return errRevocationUnknown
		case revocation.Good:
		}
	}
	return nil
}

// vouched reports whether a manufacturer says which device it is, and not the device itself or its owner.
func (a *applicant) vouched() bool { return a.group != nil && !a.group.Named }

// mayCome reports whether the device's group has no list of devices, or names it.
func (a *applicant) mayCome() bool {
	return len(a.group.Allow) == 0 || slices.Contains(a.group.Allow, a.device)
}

// deviceIn is the device that a factory key stands for in a group.
func (s *Service) deviceIn(g *group, leaf *x509.Certificate, said saying) hub.DeviceID {
	if said.kept || g.Named && said.device != "" {
		return said.device
	}
	return s.deviceOf(leaf)
}

// said is what a device's ID may be if its group lets it say so: what it said before, or what it says now. Nothing if the
// manufacturer names the device, or if it enrolled under the ID that is made of its key.
func (s *Service) said(ctx context.Context, leaf *x509.Certificate, named hub.DeviceID) (saying, error) {
	if identityIn(leaf.Subject) != "" {
		return saying{}, nil
	}
	key := nameOf(leaf.RawSubjectPublicKeyInfo)
	kept, err := s.keptFor(ctx, key)
	if kept != "" || err != nil {
		return saying{kept, true}, err
	}
	if named == "" {
		return saying{}, nil
	}
	doc, err := s.docs.Get(ctx, collEnrolments, string(s.deviceOf(leaf)))
	if err != nil {
		return saying{}, err
	}
	if doc.Rev != 0 {
		e, err := decodeEnrolment(doc)
		if err != nil || e.Key == key {
			return saying{}, err
		}
	}
	return saying{device: named}, nil
}

// keptFor is the device that a factory key stands for since it said so; "" if it did not.
func (s *Service) keptFor(ctx context.Context, key string) (hub.DeviceID, error) {
	doc, err := s.docs.Get(ctx, collFactoryKeys, key)
	if err != nil || doc.Rev == 0 {
		return "", err
	}
	var k factoryKey
	if err := json.Unmarshal(doc.Value, &k); err != nil {
		return "", damaged("what a factory key stands for", err)
	}
	return k.Device, nil
}

// claim has a factory key stand for the ID that its device gives itself, if nobody has that one. It returns the revision of the
// device's enrolment, which was had: one is put there, since another key may say the same at another authority at this moment, and of
// the two one is first. The device's turn is taken.
func (s *Service) claim(ctx context.Context, a applicant, e enrolment, had uint64) (rev uint64, err error) {
	if err := s.mayClaim(ctx, a); err != nil {
		return had, err
	}
	if rev = had; rev == 0 {
		e.State, e.Waits = hub.EnrolmentWaiting, hub.WaitsForApproval // nothing was decided
		doc, err := e.doc(a.device, 0)
		if err == nil {
			rev, err = s.docs.Put(ctx, collEnrolments, doc)
		}
		if hub.IsKind(err, hub.Conflict) {
			return 0, &hub.Error{Kind: hub.Unavailable, Op: "enrolment", Err: err} // it comes again
		}
		if err != nil {
			return 0, err
		}
	}
	if err := s.standFor(ctx, a); err != nil {
		if rev != had {
			err = errors.Join(err, s.docs.Delete(ctx, collEnrolments, string(a.device), rev))
		}
		return had, err
	}
	return rev, nil
}

// standFor keeps that a factory key stands for a device.
func (s *Service) standFor(ctx context.Context, a applicant) error {
	value, err := json.Marshal(factoryKey{a.device, time.Now().UTC()})
	if err != nil {
		return fmt.Errorf("encode what a factory key stands for: %w", err)
	}
	_, err = s.docs.Put(ctx, collFactoryKeys, store.Doc{Key: a.Key, Value: value})
	if !hub.IsKind(err, hub.Conflict) {
		return err
	}
	// It said something at the same time elsewhere.
	if kept, err := s.keptFor(ctx, a.Key); err != nil || kept == a.device {
		return err
	}
	return errName
}

// mayClaim refuses an ID that somebody has, or may have.
func (s *Service) mayClaim(ctx context.Context, a applicant) error {
	if err := s.owners.Admits(ctx, a.device, nil); err != nil { // it may have been removed
		return err
	}
	switch _, err := s.owners.Owner(ctx, a.device); {
	case err == nil:
		return errIDInUse
	case !hub.IsKind(err, hub.NotFound):
		return err
	}
	now := time.Now()
	for doc, err := range s.docs.Find(ctx, collCertificates, indexDevice+string(a.device)) {
		if err != nil {
			return err
		}
		if e, err := decodeEntry(doc); err != nil {
			return err
		} else if e.live(now) {
			return errIDInUse
		}
	}
	return s.entitled(ctx, a.Owner, a.device, true) // somebody may keep it
}
