package certificateauthority

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"math/big"
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
	indexMonth   = "until=" // the month in which it ends, to find what has ended
	indexRevoked = "revoked"
)

// entry is such a document.
type entry struct {
	Issuer    string               `json:"issuer"`
	Name      string               `json:"name"`
	Key       string               `json:"key"`
	Device    hub.DeviceID         `json:"device,omitempty"`
	Owner     hub.Owner            `json:"owner,omitempty"`
	How       hub.RequestMethod    `json:"how"`
	User      string               `json:"user,omitempty"`
	PEM       string               `json:"pem"`
	Created   time.Time            `json:"created"`
	NotBefore time.Time            `json:"notBefore"`
	NotAfter  time.Time            `json:"notAfter"`
	Revoked   time.Time            `json:"revoked,omitzero"`
	Reason    hub.RevocationReason `json:"reason,omitempty"`
}

func (e *entry) certificate(serial string) hub.Certificate {
	return hub.Certificate{
		Serial: serial, Issuer: e.Issuer, Name: e.Name, Key: e.Key, Device: e.Device, Owner: e.Owner, How: e.How, User: e.User,
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
	if e.Device != "" {
		doc.Index = append(doc.Index, indexDevice+string(e.Device))
	}
	if !e.Revoked.IsZero() {
		doc.Index = append(doc.Index, indexRevoked)
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

func serialOf(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

// nameOf names a key as other hubs do: by a UUID of its SubjectPublicKeyInfo.
func nameOf(spki []byte) string { return uuid.NewSHA1(uuid.NameSpaceX500, spki).String() }

// record puts a certificate that nobody has yet into the ledger. Only then it may be handed out.
func (s *Service) record(ctx context.Context, leaf *x509.Certificate, e entry) error {
	e.Name, e.Key, e.Issuer = leaf.Subject.CommonName, nameOf(leaf.RawSubjectPublicKeyInfo), s.issuer
	e.PEM, e.Created, e.NotBefore, e.NotAfter = string(certPEM(leaf)), time.Now().UTC(), leaf.NotBefore, leaf.NotAfter
	doc, err := e.doc(serialOf(leaf.SerialNumber), 0)
	if err != nil {
		return err
	}
	_, err = s.docs.Put(ctx, collCertificates, doc)
	return err
}

// found yields the entries that the filter means, in no order. An error is the last element.
func (s *Service) found(ctx context.Context, f hub.CertificateFilter) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		switch {
		case !f.All && f.Owner == "":
		case len(f.Serials) > 0:
			for _, serial := range f.Serials {
				doc, err := s.docs.Get(ctx, collCertificates, serial)
				if (err != nil || doc.Rev != 0) && !yield(doc, err) || err != nil {
					return
				}
			}
		case len(f.Devices) > 0:
			for _, dev := range f.Devices {
				for doc, err := range s.docs.Find(ctx, collCertificates, indexDevice+string(dev)) {
					if !yield(doc, err) || err != nil {
						return
					}
				}
			}
		case f.All:
			s.docs.Range(ctx, collCertificates, "", "")(yield)
		default:
			s.docs.Find(ctx, collCertificates, indexOwner+string(f.Owner))(yield)
		}
	}
}

// means reports whether the filter means an entry that was found by it.
func means(f *hub.CertificateFilter, serial string, e *entry) bool {
	among := func(n int, in bool) bool { return n == 0 || in }
	return (f.All || e.Owner == f.Owner) && among(len(f.Serials), slices.Contains(f.Serials, serial)) &&
		among(len(f.Devices), slices.Contains(f.Devices, e.Device)) && among(len(f.Names), slices.Contains(f.Names, e.Name))
}

// Certificates yields what the ledger has of the certificates that the filter means, in no order; also of those that have ended,
// for 90 days. An error is the last element.
func (s *Service) Certificates(ctx context.Context, f hub.CertificateFilter) iter.Seq2[hub.Certificate, error] {
	return func(yield func(hub.Certificate, error) bool) {
		for doc, err := range s.found(ctx, f) {
			var e entry
			if err == nil {
				e, err = decodeEntry(doc)
			}
			if err != nil {
				yield(hub.Certificate{}, err)
				return
			}
			if means(&f, doc.Key, &e) && !yield(e.certificate(doc.Key), nil) {
				return
			}
		}
	}
}

// Revoke ends the certificates that the filter means, those of them that have not ended yet, and returns them. They are on the
// next list, nobody comes in with them any more, and ended is told. After an error it may be repeated.
func (s *Service) Revoke(ctx context.Context, f hub.CertificateFilter, reason hub.RevocationReason) (out []hub.Certificate, err error) {
	now := time.Now().UTC()
	var docs []store.Doc
	for doc, err := range s.found(ctx, f) {
		if err != nil {
			return nil, err
		}
		docs = append(docs, doc)
	}
	for _, doc := range docs {
		for {
			e, err := decodeEntry(doc)
			if err != nil {
				return out, err
			}
			if doc.Rev == 0 || !means(&f, doc.Key, &e) || !e.live(now) {
				break
			}
			e.Revoked, e.Reason = now, reason
			next, err := e.doc(doc.Key, doc.Rev)
			if err != nil {
				return out, err
			}
			if _, err = s.docs.Put(ctx, collCertificates, next); err == nil {
				s.end(doc.Key)
				out = append(out, e.certificate(doc.Key))
				break
			}
			if !hub.IsKind(err, hub.Conflict) {
				return out, err
			}
			if doc, err = s.docs.Get(ctx, collCertificates, doc.Key); err != nil { // somebody else was faster
				return out, err
			}
		}
	}
	return out, nil
}

// end makes a revocation that is stored known.
func (s *Service) end(serial string) {
	s.mu.Lock()
	s.revoked[serial] = struct{}{}
	s.list = nil
	s.changes++
	ended := s.ended
	s.mu.Unlock()
	if ended != nil {
		ended(serial)
	}
}

// Ended has f called with the serial of each certificate that is revoked from now on, once that is stored. f must not block.
func (s *Service) Ended(f func(serial string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = f
}

// Revoked reports whether a verified certificate was revoked. Of those of other authorities it knows nothing.
func (s *Service) Revoked(c *x509.Certificate) bool {
	if !slices.Equal(c.AuthorityKeyId, s.a.signers[Device].issuing.SubjectKeyId) {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, is := s.revoked[serialOf(c.SerialNumber)]
	return is
}
