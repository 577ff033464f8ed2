package certificateauthority

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collProvisioning has, by factory key, how its device was provisioned.
const collProvisioning = "provisioning-records"

const (
	// maxRecords bounds the records of an owner. Devices beyond are served, and leave none.
	maxRecords = 100_000
	// recordKept is for how long a record is kept whose device does not come.
	recordKept = 400 * 24 * time.Hour
	// stepAgain is how soon a step that ended as it did before is written once more.
	stepAgain = 10 * time.Second
)

// provisioning is such a document.
type provisioning struct {
	Device      hub.DeviceID                                    `json:"device,omitempty"`
	Owner       hub.Owner                                       `json:"owner"`
	Group       string                                          `json:"group"`
	Created     time.Time                                       `json:"created"`
	Attested    time.Time                                       `json:"attested"`
	Certificate string                                          `json:"certificate"`
	Name        string                                          `json:"name,omitempty"`
	Steps       map[hub.ProvisioningStep]hub.ProvisioningStatus `json:"steps"`
	Identity    string                                          `json:"identity,omitempty"`
	PSK         bool                                            `json:"psk,omitempty"`
	Provider    string                                          `json:"provider,omitempty"`
	Gateways    []string                                        `json:"gateways,omitempty"`
	Selected    int                                             `json:"selected,omitempty"`
}

func (p *provisioning) record(id string) hub.ProvisioningRecord {
	return hub.ProvisioningRecord{
		ID: id, Device: p.Device, Owner: p.Owner, Group: p.Group, Created: p.Created, Attested: p.Attested, Certificate: p.Certificate, Name: p.Name,
		Steps: p.Steps, Identity: p.Identity, PSK: p.PSK, Cloud: hub.Cloud{Provider: p.Provider, Gateways: p.Gateways, Selected: p.Selected},
	}
}

func decodeProvisioning(doc store.Doc) (provisioning, error) {
	var p provisioning
	if err := json.Unmarshal(doc.Value, &p); err != nil {
		return p, damaged("a provisioning record", err)
	}
	return p, nil
}

// Applicant finds out who comes with a factory certificate, whom a manufacturer vouches for and whose group is for it. Kinds:
// Unauthenticated for all other certificates, and Denied for a device that its group does not name.
func (s *Service) Applicant(ctx context.Context, chain []*x509.Certificate) (hub.Applicant, error) {
	a, err := s.byFactory(ctx, chain, "")
	var out hub.Applicant
	if err == nil {
		out, err = s.applicant(a)
	}
	if err != nil {
		return hub.Applicant{}, fmt.Errorf("certificateauthority.Applicant: %w", err)
	}
	return out, nil
}

func (s *Service) applicant(a applicant) (out hub.Applicant, err error) {
	out = hub.Applicant{Device: a.device, Owner: a.Owner, Group: a.Group}
	switch {
	case a.nameless: // it is asked who owns it before it says who it is
		out.Device = ""
	case !a.mayCome():
		return out, errNotAllowed
	}
	if len(a.group.psk) > 0 {
		out.PSK, err = s.unseal(a.group.ID, a.group.psk)
	}
	return out, err
}

// Admit is Enrol without its end: the device that comes with a factory certificate and says that it is named is allowed, or waits
// for a person, but gets no certificate yet. Kinds are those of Enrol.
func (s *Service) Admit(ctx context.Context, chain []*x509.Certificate, named hub.DeviceID) (hub.Applicant, error) {
	out, err := s.admit(ctx, chain, named)
	if err != nil {
		return hub.Applicant{}, fmt.Errorf("certificateauthority.Admit: %w", err)
	}
	return out, nil
}

func (s *Service) admit(ctx context.Context, chain []*x509.Certificate, named hub.DeviceID) (hub.Applicant, error) {
	place, again := s.enrolling.Enter(ctx)
	if again > 0 {
		return hub.Applicant{}, errBusy(again)
	}
	defer place.Leave()
	a, err := s.byFactory(ctx, chain, named)
	switch {
	case err != nil:
		return hub.Applicant{}, err
	case named != a.device:
		return hub.Applicant{}, errName
	case a.device == s.a.hubID:
		return hub.Applicant{}, errOfHub
	case !a.mayCome():
		return hub.Applicant{}, errNotAllowed
	}
	turn := s.turn(string(a.device))
	turn.Lock()
	defer turn.Unlock()
	if _, err := s.enrol(ctx, a, nil); err != nil {
		return hub.Applicant{}, err
	}
	return s.applicant(a)
}

// Provisioned keeps how a step ended for the device with this factory certificate. Exhausted at 100 000 records of its owner.
func (s *Service) Provisioned(ctx context.Context, chain []*x509.Certificate, to hub.Applicant, p hub.Provisioned) error {
	const op = "certificateauthority.Provisioned"
	leaf, now := chain[0], time.Now().UTC()
	id := nameOf(leaf.RawSubjectPublicKeyInfo)
	for {
		doc, err := s.docs.Get(ctx, collProvisioning, id)
		if err != nil {
			return fmt.Errorf("%s: %w", op, err)
		}
		rec := provisioning{Created: now}
		if doc.Rev != 0 {
			if rec, err = decodeProvisioning(doc); err != nil {
				return fmt.Errorf("%s: %w", op, err)
			}
		}
		if doc.Rev == 0 || rec.Owner != to.Owner {
			if many, err := s.atLeast(ctx, collProvisioning, indexOwner+string(to.Owner), maxRecords); err != nil {
				return fmt.Errorf("%s: %w", op, err)
			} else if many {
				return hub.NewError(hub.Exhausted, "provisioning-records-limit", "the owner has 100000 provisioning records; delete some").With(op, nil)
			}
		}
		if rec.Steps == nil {
			rec.Steps = map[hub.ProvisioningStep]hub.ProvisioningStatus{}
		}
		before := rec.Steps[p.Step]
		if rec.Owner == to.Owner && rec.Group == to.Group && before.Code == p.Code && before.Problem == p.Problem && p.Identity == "" &&
			now.Sub(before.Time) < stepAgain {
			return nil
		}
		rec.Owner, rec.Group, rec.Attested, rec.Name = to.Owner, to.Group, now, leaf.Subject.CommonName
		rec.Certificate = string(certPEM(leaf))
		rec.Device = cmp.Or(p.Device, to.Device, rec.Device)
		rec.Steps[p.Step] = hub.ProvisioningStatus{Time: now, Code: p.Code, Problem: p.Problem}
		switch {
		case p.Problem != "":
		case p.Step == hub.StepCredentials:
			rec.Identity, rec.PSK = p.Identity, p.PSK
		case p.Step == hub.StepCloud:
			rec.Provider, rec.Gateways, rec.Selected = p.Cloud.Provider, p.Cloud.Gateways, p.Cloud.Selected
		}
		value, err := json.Marshal(rec)
		if err != nil {
			return fmt.Errorf("encode a provisioning record: %w", err)
		}
		_, err = s.docs.Put(ctx, collProvisioning, store.Doc{
			Key: id, Value: value, Rev: doc.Rev, Index: []string{indexOwner + string(rec.Owner), indexGroup + rec.Group},
		})
		if !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
}

// ProvisioningRecords yields the records that the filter means, in no order. An error is the last element.
func (s *Service) ProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) iter.Seq2[hub.ProvisioningRecord, error] {
	return only(s.provisioningRecords(ctx, f, place{}))
}

func (s *Service) provisioningRecords(ctx context.Context, f hub.ProvisioningFilter, from place) iter.Seq2[placed[hub.ProvisioningRecord], error] {
	docs := s.walk(ctx, collProvisioning, []step{{index: indexOwner + string(f.Owner)}}, from)
	return each(docs, func(doc store.Doc) (hub.ProvisioningRecord, bool, error) {
		p, err := decodeProvisioning(doc)
		meant := (len(f.IDs) == 0 || slices.Contains(f.IDs, doc.Key)) && (len(f.Devices) == 0 || slices.Contains(f.Devices, p.Device)) &&
			(len(f.Groups) == 0 || slices.Contains(f.Groups, p.Group))
		return p.record(doc.Key), meant, err
	})
}

// DeleteProvisioningRecords removes the records that the filter means, and returns their IDs. Devices keep what they got, and
// their next step begins another record.
func (s *Service) DeleteProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) (out []string, err error) {
	const op = "certificateauthority.DeleteProvisioningRecords"
	var ids []string
	for rec, err := range s.ProvisioningRecords(ctx, f) {
		if err != nil {
			return nil, fmt.Errorf("%s: %w", op, err)
		}
		ids = append(ids, rec.ID)
	}
	for _, id := range ids {
		doc, err := s.docs.Get(ctx, collProvisioning, id)
		if err == nil && doc.Rev != 0 {
			err = s.docs.Delete(ctx, collProvisioning, id, doc.Rev)
		}
		if err != nil && !hub.IsKind(err, hub.Conflict) { // its device is here at this moment, and its record stays
			return out, fmt.Errorf("%s: %w", op, err)
		}
		if err == nil && doc.Rev != 0 {
			out = append(out, id)
		}
	}
	return out, nil
}

// Secret sets the key, of 32 bytes, that seals the pre-shared keys of groups, so that neither the store nor a backup gives them
// away. It is called before anything else; without it groups have none.
func (s *Service) Secret(key []byte) error {
	aead, err := chacha20poly1305.NewX(key)
	if err != nil {
		return fmt.Errorf("certificateauthority.Secret: %w", err)
	}
	s.secret = aead
	return nil
}

var errNoSecret = errors.New("there is no key to seal with")

// seal seals a group's pre-shared key, for that group.
func (s *Service) seal(group, psk string) ([]byte, error) {
	if s.secret == nil {
		return nil, errNoSecret
	}
	nonce := make([]byte, s.secret.NonceSize())
	_, _ = rand.Read(nonce) // never fails
	return s.secret.Seal(nonce, nonce, []byte(psk), []byte(group)), nil
}

// unseal gives as much of a group's key as devices get.
func (s *Service) unseal(group string, sealed []byte) (string, error) {
	if s.secret == nil {
		return "", errNoSecret
	}
	if len(sealed) < s.secret.NonceSize() {
		return "", damaged("a group's pre-shared key", nil)
	}
	nonce, text := sealed[:s.secret.NonceSize()], sealed[s.secret.NonceSize():]
	psk, err := s.secret.Open(nil, nonce, text, []byte(group))
	if err != nil || len(psk) < pskLength {
		return "", damaged("a group's pre-shared key", err)
	}
	return string(psk[:pskLength]), nil
}
