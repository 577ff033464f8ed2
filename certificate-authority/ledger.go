package certificateauthority

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collCertificates is the ledger: one document a certificate, by its serial.
const collCertificates = "certificates"

// Secondary keys of the ledger.
const (
	indexOwner   = "owner="
	indexDevice  = "device="
	indexName    = "name="  // of what is no device's
	indexMonth   = "until=" // the month in which it ends, to find what has ended
	indexRevoked = "revoked"
	indexBadKey  = "compromised=" // the key of one that was revoked because somebody else has it
)

// entry is such a document.
type entry struct {
	Issuer    string               `json:"issuer"`
	Name      string               `json:"name"`
	Key       string               `json:"key"`
	Device    hub.DeviceID         `json:"device,omitempty"`
	Profile   hub.Profile          `json:"profile,omitempty"`
	Owner     hub.Owner            `json:"owner,omitempty"`
	How       hub.RequestMethod    `json:"how"`
	User      string               `json:"user,omitempty"`
	Proof     string               `json:"proof,omitempty"`
	Terms     hub.Acceptance       `json:"terms,omitzero"`
	Algorithm string               `json:"algorithm,omitempty"`
	PEM       string               `json:"pem"`
	Created   time.Time            `json:"created"`
	NotBefore time.Time            `json:"notBefore"`
	NotAfter  time.Time            `json:"notAfter"`
	Revoked   time.Time            `json:"revoked,omitzero"`
	Reason    hub.RevocationReason `json:"reason,omitempty"`
}

func (e *entry) certificate(serial string) hub.Certificate {
	return hub.Certificate{
		Serial: serial, Issuer: e.Issuer, Name: e.Name, Key: e.Key, Device: e.Device, Profile: e.Profile, Owner: e.Owner, How: e.How, User: e.User,
		Proof: e.Proof, Terms: e.Terms, Algorithm: e.Algorithm,
		PEM: e.PEM, Created: e.Created, NotBefore: e.NotBefore, NotAfter: e.NotAfter, Revoked: e.Revoked, Reason: e.Reason,
	}
}

// live reports whether the certificate is good at that time, or will be.
func (e *entry) live(now time.Time) bool { return e.Revoked.IsZero() && now.Before(e.NotAfter) }

func month(t time.Time) string { return indexMonth + t.UTC().Format("2006-01") }

func (e *entry) doc(serial string, rev uint64) (store.Doc, error) {
	value, err := json.Marshal(e)
	if err != nil {
		return store.Doc{}, fmt.Errorf("encode a certificate's entry: %w", err)
	}
	doc := store.Doc{Key: serial, Value: value, Rev: rev, Index: []string{month(e.NotAfter)}}
	if e.Owner != "" {
		doc.Index = append(doc.Index, indexOwner+string(e.Owner))
	}
	switch {
	case e.Device != "":
		doc.Index = append(doc.Index, indexDevice+string(e.Device))
	case e.Name != "":
		doc.Index = append(doc.Index, indexName+e.Name)
	}
	if !e.Revoked.IsZero() {
		doc.Index = append(doc.Index, indexRevoked)
		if e.Reason == hub.RevokedKeyCompromise && e.Key != "" {
			doc.Index = append(doc.Index, indexBadKey+e.Key)
		}
	}
	return doc, nil
}

func decodeEntry(doc store.Doc) (entry, error) {
	var e entry
	if err := json.Unmarshal(doc.Value, &e); err != nil {
		return e, &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "an entry of the certificates' ledger is damaged", Err: err}
	}
	return e, nil
}

// parsePEM reads a certificate of the ledger.
func parsePEM(text string) (*x509.Certificate, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, damaged("a certificate", nil)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, damaged("a certificate", err)
	}
	return c, nil
}

// nameOf names a key as other hubs do: by a UUID of its SubjectPublicKeyInfo.
func nameOf(spki []byte) string { return uuid.NewSHA1(uuid.NameSpaceX500, spki).String() }

// record puts a certificate that nobody has yet into the ledger. Only then it may be handed out. One of a device that is not let
// in is refused; if the device is removed meanwhile, either its removal finds the entry, or this finds the device removed.
func (s *Service) record(ctx context.Context, leaf *x509.Certificate, e entry) error {
	admitted := func() error {
		if e.Profile == hub.ForHub { // a key that was just made; and a part that starts does not wait for another one
			return nil
		}
		return s.owners.Admits(ctx, e.Device, leaf.RawSubjectPublicKeyInfo)
	}
	if err := admitted(); err != nil {
		return err
	}
	by, _ := s.a.issuerOf(leaf)
	e.Name, e.Key, e.Issuer = leaf.Subject.CommonName, nameOf(leaf.RawSubjectPublicKeyInfo), by.name
	e.Algorithm = algorithmOf(leaf.PublicKey)
	e.PEM, e.Created, e.NotBefore, e.NotAfter = string(certPEM(leaf)), time.Now().UTC(), leaf.NotBefore, leaf.NotAfter
	doc, err := e.doc(hub.SerialOf(leaf.SerialNumber), 0)
	if err != nil {
		return err
	}
	if _, err = s.docs.Put(ctx, collCertificates, doc); err != nil {
		return err
	}
	if err := admitted(); err != nil {
		_, failed := s.Revoke(ctx, hub.CertificateFilter{All: true, Serials: []string{doc.Key}}, hub.RevokedCessation)
		return errors.Join(err, failed)
	}
	return nil
}

// HandOver ends the certificates of a device that were signed for others than its owner, but for the one with the serial, by
// which it came to him; "": it came by none. Those of operators are for whoever has the device. It returns what was good until
// then. After an error it may be repeated.
func (s *Service) HandOver(ctx context.Context, dev hub.DeviceID, owner hub.Owner, serial string) ([]hub.Certificate, error) {
	var old []string
	for c, err := range s.Certificates(ctx, hub.CertificateFilter{All: true, Devices: []hub.DeviceID{dev}}) {
		if err != nil {
			return nil, err
		}
		if c.Owner != "" && c.Owner != owner && c.Serial != serial && c.Revoked.IsZero() {
			old = append(old, c.Serial)
		}
	}
	if len(old) == 0 {
		return nil, nil
	}
	return s.Revoke(ctx, hub.CertificateFilter{All: true, Serials: old}, hub.RevokedAffiliation)
}

// found yields the entries that the filter means, and others, in no order, behind a place. An error is the last element.
func (s *Service) found(ctx context.Context, f hub.CertificateFilter, from place) iter.Seq2[placed[store.Doc], error] {
	var steps []step
	switch {
	case !f.All && f.Owner == "":
	case len(f.Serials) > 0:
		steps = stepsOf(f.Serials, byKey, step{})
	case f.All:
		steps = stepsOf(f.Devices, func(dev string) step { return step{index: indexDevice + dev} }, step{})
	default:
		steps = stepsOf(f.Devices, func(dev string) step { return step{index: indexDevice + dev} }, step{index: indexOwner + string(f.Owner)})
	}
	return s.walk(ctx, collCertificates, steps, from)
}

// meaning tells which of the entries that were found by a filter it means.
type meaning struct {
	s   *Service
	f   *hub.CertificateFilter
	his map[hub.DeviceID]bool // devices that were asked for, and whether they are the owner's
}

func (s *Service) meaning(f *hub.CertificateFilter) *meaning {
	return &meaning{s, f, map[hub.DeviceID]bool{}}
}

func (m *meaning) means(ctx context.Context, serial string, e *entry) (bool, error) {
	f := m.f
	among := func(n int, in bool) bool { return n == 0 || in }
	switch {
	case !among(len(f.Serials), slices.Contains(f.Serials, serial)), !among(len(f.Devices), slices.Contains(f.Devices, e.Device)),
		!among(len(f.Names), slices.Contains(f.Names, e.Name)):
		return false, nil
	case f.All, e.Owner == f.Owner:
		return true, nil
	case e.Device == "", len(f.Serials)+len(f.Devices) == 0:
		return false, nil
	}
	is, known := m.his[e.Device]
	if !known {
		own, err := m.s.owners.Owner(ctx, e.Device)
		if err != nil && !hub.IsKind(err, hub.NotFound) {
			return false, err
		}
		is = err == nil && own.Owner == f.Owner
		m.his[e.Device] = is
	}
	return is, nil
}

// Certificates yields what the ledger has of the certificates that the filter means, in no order; also of those that have ended,
// for 90 days. An error is the last element.
func (s *Service) Certificates(ctx context.Context, f hub.CertificateFilter) iter.Seq2[hub.Certificate, error] {
	return only(s.certificates(ctx, f, place{}))
}

func (s *Service) certificates(ctx context.Context, f hub.CertificateFilter, from place) iter.Seq2[placed[hub.Certificate], error] {
	m := s.meaning(&f)
	return each(s.found(ctx, f, from), func(doc store.Doc) (hub.Certificate, bool, error) {
		e, err := decodeEntry(doc)
		if err != nil {
			return hub.Certificate{}, false, err
		}
		meant, err := m.means(ctx, doc.Key, &e)
		return e.certificate(doc.Key), meant, err
	})
}

// Revoke ends the certificates that the filter means, those of them that have not ended yet, and returns them. They are on the
// next list, nobody comes in with them any more, and ended is told. An operator may also name a serial that is not in the ledger:
// a restored hub does not know what it signed after the backup. After an error it may be repeated, and returns what it has
// revoked so far; what could not be stored lets nobody in until a restart.
func (s *Service) Revoke(ctx context.Context, f hub.CertificateFilter, reason hub.RevocationReason) (out []hub.Certificate, err error) {
	out, _, err = s.revokeSome(ctx, f, reason, math.MaxInt)
	return out, err
}

// revokeSome is Revoke of at most so many. more: others may be left, and it is to be repeated.
func (s *Service) revokeSome(
	ctx context.Context, f hub.CertificateFilter, reason hub.RevocationReason, most int,
) (out []hub.Certificate, more bool, err error) {
	var docs []store.Doc
	for doc, err := range s.found(ctx, f, place{}) {
		if err != nil {
			return nil, false, err
		}
		docs = append(docs, doc.of)
	}
	if f.All && len(f.Devices)+len(f.Names) == 0 {
		for _, serial := range f.Serials {
			if !slices.ContainsFunc(docs, func(d store.Doc) bool { return d.Key == serial }) {
				docs = append(docs, store.Doc{Key: serial})
			}
		}
	}
	m := s.meaning(&f)
	for _, doc := range docs {
		if more = len(out) >= most; more {
			break
		}
		var e entry
		var ended bool
		if e, ended, err = s.revoke(ctx, m, doc, reason); err != nil {
			break
		}
		if ended {
			out = append(out, e.certificate(doc.Key))
		}
		if len(out)%maxTold == maxTold-1 {
			if err = s.tell(ctx); err != nil {
				break
			}
		}
	}
	if told := s.tell(ctx); err == nil {
		err = told
	}
	return out, more, err
}

// revoke ends one certificate, unless it is not meant or has ended. A document without revision is of none that the ledger has.
func (s *Service) revoke(ctx context.Context, m *meaning, doc store.Doc, reason hub.RevocationReason) (e entry, ended bool, err error) {
	now := time.Now().UTC()
	for {
		by := s.a.signer(Device) // or another that was in use then: it is on the lists of all
		e = entry{Issuer: by.name, How: hub.Unrecorded, Created: now, NotBefore: now, NotAfter: by.issuing.NotAfter}
		if doc.Rev != 0 {
			if e, err = decodeEntry(doc); err != nil {
				return e, false, err
			}
			if meant, err := m.means(ctx, doc.Key, &e); err != nil || !meant {
				return e, false, err
			}
		}
		if !e.live(now) {
			if !e.Revoked.IsZero() && !s.isRevoked(doc.Key) { // it was stored, and whoever did it was not told
				s.end(doc.Key)
			}
			return e, false, nil
		}
		e.Revoked, e.Reason = now, reason
		next, err := e.doc(doc.Key, doc.Rev)
		if err != nil {
			return e, false, err
		}
		_, err = s.docs.Put(ctx, collCertificates, next)
		if !hub.IsKind(err, hub.Conflict) {
			if err != nil {
				s.mu.Lock()
				s.unstored[doc.Key] = struct{}{}
				s.mu.Unlock()
			}
			s.end(doc.Key) // after an error, too: whoever has it is not to stay because the store has no room
			return e, err == nil, err
		}
		if doc, err = s.docs.Get(ctx, collCertificates, doc.Key); err != nil { // somebody else was faster
			return e, false, err
		}
	}
}

// end makes a revocation that is stored known, here at once and to others with the next tell.
func (s *Service) end(serial string) {
	s.mu.Lock()
	s.untold.Revoked = append(s.untold.Revoked, serial)
	s.mu.Unlock()
	s.learn(serial)
}

// learn makes a revocation known here.
func (s *Service) learn(serial string) {
	s.mu.Lock()
	if _, known := s.revoked[serial]; known {
		s.mu.Unlock()
		return
	}
	s.revoked[serial] = struct{}{}
	clear(s.lists)
	clear(s.answers)
	s.changes++
	ended := s.ended
	s.mu.Unlock()
	if ended != nil {
		ended(serial)
	}
}

// Ended has f called with the serial of each certificate that is revoked from now on, here or by another authority on the same documents,
// once that is stored. f must not block.
func (s *Service) Ended(f func(serial string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = f
}

// Revoked reports whether a verified certificate was revoked, or its issuer retired. Of those of other authorities it knows nothing.
func (s *Service) Revoked(c *x509.Certificate) bool {
	by, ours := s.a.issuerOf(c)
	return ours && (by.key == nil || s.isRevoked(hub.SerialOf(c.SerialNumber)))
}

func (s *Service) isRevoked(serial string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, is := s.revoked[serial]
	return is
}
