package certificateauthority

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collEnrolments has, by device, how far it has come.
const collEnrolments = "enrolments"

// Secondary keys of enrolments; owners have the ledger's.
const (
	indexGroup = "group="
	indexState = "state="
)

const (
	// maxEnrolling and enrolQueue bound the enrolments that are under way and that wait; the store commits many at once.
	maxEnrolling, enrolQueue = 64, 4096
	enrolPatience            = 10 * time.Second
	// maxUndecided bounds the devices of a group that wait for a person, and waitsFor how long each is kept that does not come again.
	maxUndecided = 10_000
	waitsFor     = 30 * 24 * time.Hour
	// renewBefore is how long before its end a certificate may be renewed without being asked.
	renewBefore = 60 * 24 * time.Hour
	// askAgain is when a device that waits for a person may come again.
	askAgain = time.Minute
	// recorded is how often it is at least recorded that a device that waits comes again.
	recorded = 24 * time.Hour
	// repeated is for how long whoever comes with the same key gets the same certificate: its answer may have been lost.
	repeated = 24 * time.Hour
)

// enrolment is such a document.
type enrolment struct {
	Owner   hub.Owner          `json:"owner,omitempty"`
	Group   string             `json:"group,omitempty"`
	By      hub.RequestMethod  `json:"by"`
	Proof   string             `json:"proof,omitempty"`
	Key     string             `json:"key,omitempty"`
	Type    string             `json:"type,omitempty"`
	State   hub.EnrolmentState `json:"state"`
	Waits   hub.EnrolmentWaits `json:"waits,omitempty"`
	Terms   hub.Acceptance     `json:"terms,omitzero"` // under which it may have certificates
	User    string             `json:"user,omitempty"`
	Decided time.Time          `json:"decided,omitzero"`
	Serial  string             `json:"serial,omitempty"`
	Problem string             `json:"problem,omitempty"`
	Created time.Time          `json:"created"`
	Changed time.Time          `json:"changed"`
	// The request that had to wait, base64, and SCEP's name for it.
	Transaction string `json:"transaction,omitempty"`
	CSR         string `json:"csr,omitempty"`
}

func (e *enrolment) enrolment(dev string) hub.Enrolment {
	return hub.Enrolment{
		Device: hub.DeviceID(dev), Owner: e.Owner, Group: e.Group, By: e.By, Proof: e.Proof, Key: e.Key, Type: e.Type, State: e.State, Waits: e.waits(), User: e.User,
		Serial: e.Serial, Problem: e.Problem, Created: e.Created, Changed: e.Changed,
	}
}

// waits is what the device waits for; "" if it does not.
func (e *enrolment) waits() hub.EnrolmentWaits {
	if e.State != hub.EnrolmentWaiting {
		return ""
	}
	return cmp.Or(e.Waits, hub.WaitsForApproval) // all did once
}

func (e *enrolment) doc(dev hub.DeviceID, rev uint64) (store.Doc, error) {
	e.Changed = time.Now().UTC()
	value, err := json.Marshal(e)
	if err != nil {
		return store.Doc{}, fmt.Errorf("encode an enrolment: %w", err)
	}
	doc := store.Doc{Key: string(dev), Value: value, Rev: rev, Index: []string{indexState + string(e.State)}}
	if e.Owner != "" {
		doc.Index = append(doc.Index, indexOwner+string(e.Owner))
	}
	if e.Group != "" {
		doc.Index = append(doc.Index, indexGroup+e.Group, indexState+string(e.State)+" "+indexGroup+e.Group)
	}
	return doc, nil
}

func decodeEnrolment(doc store.Doc) (enrolment, error) {
	var e enrolment
	if err := json.Unmarshal(doc.Value, &e); err != nil {
		return e, damaged("an enrolment", err)
	}
	return e, nil
}

func damaged(what string, err error) error {
	return &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: what + " in the store is damaged", Err: err}
}

var (
	errProof       = hub.NewError(hub.Unauthenticated, "enrolment-unproven", "nothing was shown that this hub takes for an enrolment")
	errRevoked     = hub.NewError(hub.Unauthenticated, "certificate-revoked", "the device's certificate was revoked")
	errNotAllowed  = hub.NewError(hub.Denied, "enrolment-not-allowed", "the group of this device does not name it")
	errType        = hub.NewError(hub.Denied, "enrolment-type-not-allowed", "the group of this device is for other types, and the type is that in its factory certificate")
	errRefused     = hub.NewError(hub.Denied, "enrolment-refused", "somebody refused this device")
	errTaken       = hub.NewError(hub.Denied, "enrolment-device-taken", "another factory key enrolled as this device")
	errRenewal     = hub.NewError(hub.Denied, "renewal-without-certificate", "a renewal is made under the certificate that it renews")
	errName        = hub.NewError(hub.Invalid, "csr-name", "the request does not name the device: its common name is uuid: and the ID, or on the first request anything else")
	errNotEnrolled = hub.NewError(hub.NotFound, "enrolment-unknown", "this device has not asked to enrol")
	errUndecided   = hub.NewError(hub.Exhausted, "enrolments-limit", "too many devices wait for a decision")
)

func errBusy(again time.Duration) error {
	return &hub.Error{Kind: hub.Exhausted, Code: "enrolments-busy", Text: "too many devices enrol at this moment", RetryAfter: again}
}

func errWaiting(waits hub.EnrolmentWaits) error {
	text := "somebody has to allow this device; it may ask again"
	if waits == hub.WaitsForTerms {
		text = "somebody has to accept the terms of this device's group; it may ask again"
	}
	return &hub.Error{Kind: hub.Unavailable, Code: "enrolment-waiting", Text: text, RetryAfter: askAgain}
}

// applicant is a device that has proven who it is.
type applicant struct {
	enrolment // as it would be, if it is the first
	device    hub.DeviceID
	allowed   bool // nobody need be asked
	claims    bool // the device says its ID itself, for the first time
	nameless  bool // its group lets it say its ID, and it did not yet
	current   string
	token     *store.Doc
	made      time.Time // the token
	repeats   bool      // the token is used up: this is the same request once more
	challenge string    // SCEP's, beside the certificate that is renewed
	group     *group
	unfit     bool // its group is for other device types
	again     bool // it has enrolled with the same key in the same group
}

// Enrol gives a device its identity certificate, or another one: for a chain of certificates that leads to a group's CA, for a
// certificate of this authority that is good (a renewal, the only thing that is allowed if renew is set), for the device's
// pre-shared key, or for a one-time token. The subject is the device's, whatever the request says; a request that names another
// device is Invalid. Whoever comes again within a day with the same key gets the same certificate. Kinds: Unauthenticated
// ("enrolment-unproven", "certificate-revoked", "token-unknown"), Denied, Invalid and TooLarge for the request, Exhausted, and
// Unavailable with the code "enrolment-waiting" while somebody has to decide. What is returned is in the ledger.
func (s *Service) Enrol(ctx context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (out hub.Enrolled, err error) {
	const op = "certificateauthority.Enrol"
	how := hub.RequestMethod("none")
	defer func() {
		outcome := "issued"
		if err != nil {
			outcome, _ = hub.Public(err)
			err = fmt.Errorf("%s: %w", op, err)
		}
		s.enrolled.WithLabelValues(string(how), outcome).Inc()
	}()
	place, again := s.enrolling.Enter(ctx)
	if again > 0 {
		return out, errBusy(again)
	}
	defer place.Leave()
	scep := proof.Transaction != ""
	if csr == nil && scep {
		if csr, err = s.waiting(ctx, proof); err != nil {
			return out, err
		}
	}
	req, named, err := parseKey(csr, scep)
	if err != nil {
		return out, err
	}
	a, err := s.prove(ctx, proof, req, named)
	if err != nil {
		return out, err
	}
	how = a.By
	if scep {
		a.Transaction, a.CSR, a.challenge = proof.Transaction, base64.StdEncoding.EncodeToString(csr), proof.Token
	}
	switch {
	case renew && a.By != hub.ByRenewal:
		return out, errRenewal
	// RFC 7030, Section 4.2.2: a renewal has the subject of the certificate that is renewed. The first request may have any,
	// since the subject is ours to choose, but another device's. So may those of SCEP, whose clients have it in their configuration.
	case renew && !scep && named != a.device, named != "" && named != a.device:
		return out, errName
	case a.device == s.a.hubID:
		return out, errOfHub
	}
	req.device = a.device
	turn := s.turn(string(a.device))
	turn.Lock()
	defer turn.Unlock()
	req.vouched = a.vouched()
	leaf, err := s.enrol(ctx, a, &req)
	if err != nil {
		return out, err
	}
	by, _ := s.a.issuerOf(leaf)
	return hub.Enrolled{Device: a.device, Serial: hub.SerialOf(leaf.SerialNumber), Chain: []*x509.Certificate{leaf, by.issuing}}, nil
}

// enrol brings a device one step on in its enrolment, and keeps what went wrong. Without a request it is allowed only, and gets
// nothing. Its turn is taken.
func (s *Service) enrol(ctx context.Context, a applicant, req *request) (*x509.Certificate, error) {
	doc, err := s.docs.Get(ctx, collEnrolments, string(a.device))
	if err != nil {
		return nil, err
	}
	e, before, stored := a.enrolment, enrolment{}, enrolment{}
	e.Transaction, e.CSR = "", "" // it did not have to wait yet
	if doc.Rev != 0 {
		if e, err = decodeEnrolment(doc); err != nil {
			return nil, err
		}
		stored = e
		if e.unfit() {
			e.State = "" // its group may be for others now
		}
		if a.By == hub.ByFactory && e.By == hub.ByFactory && e.Key != a.Key && e.State != "" {
			// One that somebody made beside the first. A person has to decide, by forgetting the first.
			return nil, errTaken
		}
		before = e
		a.again = before.State == hub.EnrolmentIssued && before.Group == a.Group && before.Key == a.Key
		if a.By == hub.ByFactory && before.Key != a.Key && !a.allowed && before.State != hub.EnrolmentRefused {
			e.State, e.User, e.Decided = "", "", time.Time{} // what was allowed was not this key
		}
		e.Owner = a.Owner
		if a.By != hub.ByRenewal { // which changes nothing of how it came here
			e.Group, e.By, e.Proof, e.Key, e.Type = a.Group, a.By, a.Proof, a.Key, a.Type
		}
	} else {
		e.Created = time.Now().UTC()
	}
	if a.claims && a.unfit {
		return nil, errType // nothing is kept of an ID that it says and does not get
	}
	if a.claims {
		if doc.Rev != 0 && before.Key != a.Key {
			return nil, errIDInUse
		}
		if doc.Rev, err = s.claim(ctx, a, e, doc.Rev); err != nil {
			return nil, err
		}
	}
	// Whoever cannot have the device leaves what is known of it as it is: else a stranger's token would make its enrolment his.
	if a.By != hub.ByRenewal && a.Owner != "" && a.Owner != before.Owner {
		if err := s.owners.Admits(ctx, a.device, nil); err != nil {
			return nil, err
		}
		if _, _, _, err := s.whose(ctx, a.Owner, a.device); err != nil {
			return nil, err
		}
	}
	if a.By == hub.ByRenewal && a.Transaction != "" {
		err = s.renews(ctx, &a, &e, *req, doc.Rev != 0)
	}
	var leaf *x509.Certificate
	if err == nil {
		leaf, err = s.step(ctx, a, &e, req)
	}
	e.Problem = ""
	if err != nil {
		e.Problem, _ = hub.Public(err)
		if e.Problem == "enrolment-waiting" {
			e.Problem, e.Transaction, e.CSR = "", a.Transaction, a.CSR
		}
	} else if leaf != nil {
		e.State, e.Serial = hub.EnrolmentIssued, hub.SerialOf(leaf.SerialNumber)
		if e.Transaction != a.Transaction { // else its answer may be lost, and it asks again
			e.Transaction, e.CSR = "", ""
		}
	}
	if a.By == hub.ByRenewal && before.State == hub.EnrolmentWaiting {
		e.State, e.Waits = before.State, before.Waits // a factory key waits, and is not allowed by that
	}
	if e.State == "" && a.claims && stored.Created.IsZero() { // the claim has put it there
		if gone := s.docs.Delete(ctx, collEnrolments, string(a.device), doc.Rev); gone != nil && !hub.IsKind(gone, hub.Conflict) {
			err = errors.Join(err, gone)
		}
		return leaf, err
	}
	if e.State == "" || e == stored && time.Since(e.Changed) < recorded { // refused for a reason that says nothing about the device
		return leaf, err
	}
	next, encodeErr := e.doc(a.device, doc.Rev)
	if encodeErr != nil {
		return nil, encodeErr
	}
	if _, putErr := s.docs.Put(ctx, collEnrolments, next); putErr != nil && !hub.IsKind(putErr, hub.Conflict) {
		// The certificate is in the ledger, and the same key gets it again.
		return nil, errors.Join(putErr, err)
	} else if putErr != nil && err == nil {
		return nil, &hub.Error{Kind: hub.Unavailable, Op: "enrolment", Err: putErr} // somebody decided meanwhile; it comes again
	}
	return leaf, err
}

// step decides what a device may have now.
func (s *Service) step(ctx context.Context, a applicant, e *enrolment, req *request) (*x509.Certificate, error) {
	switch {
	case a.unfit:
		return nil, s.turnDown(ctx, e)
	case e.State == hub.EnrolmentRefused && (a.token == nil || a.repeats || a.made.Before(e.Decided)): // one made later says otherwise
		return nil, errRefused
	case !a.allowed && !e.approved():
		return nil, s.wait(ctx, e, hub.WaitsForApproval)
	case !a.agreed(e):
		return nil, s.wait(ctx, e, hub.WaitsForTerms)
	}
	if e.State == "" || e.State == hub.EnrolmentWaiting {
		e.State = hub.EnrolmentAllowed
	}
	e.Waits = ""
	if req == nil {
		if err := s.owners.Admits(ctx, a.device, nil); err != nil {
			return nil, err
		}
		return nil, s.entitled(ctx, e.Owner, a.device, !a.vouched())
	}
	if a.token != nil {
		if err := s.redeem(ctx, a, *req); err != nil {
			return nil, err
		}
	}
	if leaf, err := s.lately(ctx, a, *req); leaf != nil || err != nil {
		return leaf, err
	}
	return s.sign(ctx, *req, entry{Device: a.device, Owner: e.Owner, How: a.By, User: e.User, Proof: a.Proof, Terms: e.Terms})
}

// turnDown refuses a device of a type that its group is not for. What a person decided on it stays, and it is let in once its group
// is for it.
func (s *Service) turnDown(ctx context.Context, e *enrolment) error {
	if e.State != "" {
		return errType
	}
	if e.Problem != errType.Code { // else it is one of those that were counted
		refused := indexState + string(hub.EnrolmentRefused) + " " + indexGroup + e.Group
		if many, err := s.atLeast(ctx, collEnrolments, refused, maxUndecided); err != nil {
			return err
		} else if many { // nobody is told of this one but itself
			return errType
		}
	}
	e.State, e.User, e.Decided = hub.EnrolmentRefused, "", time.Time{}
	return errType
}

// unfit reports whether the device was refused for its type, by nobody.
func (e *enrolment) unfit() bool {
	return e.State == hub.EnrolmentRefused && e.Decided.IsZero() && e.Problem == errType.Code
}

// wait has a device wait, if not too many of its group do.
func (s *Service) wait(ctx context.Context, e *enrolment, waits hub.EnrolmentWaits) error {
	if e.State != hub.EnrolmentWaiting {
		waiting := indexState + string(hub.EnrolmentWaiting) + " " + indexGroup + e.Group
		if many, err := s.atLeast(ctx, collEnrolments, waiting, maxUndecided); err != nil {
			return err
		} else if many {
			return errUndecided
		}
	}
	e.State, e.Waits = hub.EnrolmentWaiting, waits
	return errWaiting(waits)
}

// approved reports whether a person allowed the device, or none had to be asked. It waits for the terms only after that.
func (e *enrolment) approved() bool {
	return e.State == hub.EnrolmentAllowed || e.State == hub.EnrolmentIssued || e.waits() == hub.WaitsForTerms && !e.Decided.IsZero()
}

// agreed reports whether somebody accepted the terms of the device's group, and keeps for its certificates what they stand on. What
// was enrolled goes on with what it has: new terms are asked for with a new enrolment, neither with a renewal nor with the same
// factory key once more.
func (a *applicant) agreed(e *enrolment) bool {
	switch {
	case a.By == hub.ByRenewal:
		return true
	case a.group != nil && a.group.Terms.Version != "" && a.group.agreed():
		e.Terms = a.group.Accepted
		return true
	case a.again:
		return true
	}
	e.Terms = hub.Acceptance{}
	return a.group == nil || a.group.agreed()
}

// lately is what the device got for this key within the last day, other than the certificate that it showed; nil if there is none.
// A token that was used gives nothing else: errRevoked if what it gave was revoked.
func (s *Service) lately(ctx context.Context, a applicant, req request) (*x509.Certificate, error) {
	key, now, revoked := nameOf(req.spki), time.Now(), false
	for doc, err := range s.docs.Find(ctx, collCertificates, indexDevice+string(a.device)) {
		if err != nil {
			return nil, err
		}
		e, err := decodeEntry(doc)
		if err != nil {
			return nil, err
		}
		if e.Key != key || e.How != a.By || doc.Key == a.current || now.Sub(e.Created) > repeated {
			continue
		}
		if !e.live(now) {
			revoked = revoked || a.repeats && e.Proof == a.Proof
			continue
		}
		leaf, err := parsePEM(e.PEM)
		if err != nil {
			return nil, err
		}
		if err := s.owners.Admits(ctx, a.device, req.spki); err != nil {
			return nil, err
		}
		return leaf, nil
	}
	if revoked {
		return nil, errRevoked
	}
	return nil, nil
}

// prove finds out which device it is.
func (s *Service) prove(ctx context.Context, proof hub.EnrolmentProof, req request, named hub.DeviceID) (applicant, error) {
	if len(proof.Chain) > 0 { // SCEP's challenge may stand beside it
		if ours, err := s.verifyOwn(proof.Chain); err != nil {
			return applicant{}, err
		} else if ours {
			return s.byCurrent(ctx, proof.Chain[0])
		}
	}
	switch {
	case proof.Token != "":
		return s.byToken(ctx, proof.Token, req, named)
	case proof.PSK != "":
		// Whoever gave it the key allowed the device by that.
		owner, err := s.ownerOf(ctx, proof.PSK)
		return applicant{device: proof.PSK, allowed: true, enrolment: enrolment{By: hub.ByPSK, Owner: owner, Proof: "pre-shared key"}}, err
	case len(proof.Chain) == 0:
		return applicant{}, errProof
	}
	a, err := s.byFactory(ctx, proof.Chain, named)
	if err == nil && !a.mayCome() {
		return a, errNotAllowed
	}
	return a, err
}

// deviceOf is the device that a factory key stands for: the one that the manufacturer names, else an ID that is made of the key
// and this hub's ID, and so always the same.
func (s *Service) deviceOf(leaf *x509.Certificate) hub.DeviceID {
	if dev := identityIn(leaf.Subject); dev != "" {
		return dev
	}
	return hub.DeviceID(uuid.NewSHA1(uuid.MustParse(string(s.a.hubID)), leaf.RawSubjectPublicKeyInfo).String())
}

// byCurrent is a device that renews: its certificate is of this authority and was verified.
func (s *Service) byCurrent(ctx context.Context, leaf *x509.Certificate) (applicant, error) {
	serial := hub.SerialOf(leaf.SerialNumber)
	doc, err := s.docs.Get(ctx, collCertificates, serial)
	if err != nil {
		return applicant{}, err
	}
	a := applicant{device: identityIn(leaf.Subject), allowed: true, current: serial}
	if a.device == "" {
		return a, errProof
	}
	a.enrolment = enrolment{By: hub.ByRenewal, Proof: "certificate " + serial}
	if doc.Rev != 0 { // else a restored backup does not know it
		e, err := decodeEntry(doc)
		if err != nil {
			return a, err
		}
		if !e.Revoked.IsZero() { // by another authority, this moment
			return a, errRevoked
		}
		a.Owner = e.Owner
	}
	// The device stays the device when somebody else owns it.
	owner, err := s.ownerOf(ctx, a.device)
	a.Owner = cmp.Or(owner, a.Owner)
	return a, err
}

// verifyOwn reports whether a chain begins with an identity certificate of this authority, and refuses one that is revoked or denied:
// whatever a group trusts, revoked is revoked.
func (s *Service) verifyOwn(chain []*x509.Certificate) (ours bool, err error) {
	leaf, between := chain[0], x509.NewCertPool()
	for _, c := range s.a.DeviceIntermediates() {
		between.AddCert(c)
	}
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: s.a.DevicePool(), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	switch {
	case err != nil, !slices.ContainsFunc(leaf.UnknownExtKeyUsage, OCFIdentity.Equal):
		return false, nil
	case s.Revoked(leaf):
		return true, errRevoked
	}
	return true, s.denied(chain, s.above(leaf))
}

// Vouch reports whether a chain of certificates may be used to enrol: nil if it leads to a group's CA, or to the hub's device root
// and is not revoked. It is asked in the handshake, where the peer has proven that it has the key of the first.
func (s *Service) Vouch(ctx context.Context, chain []*x509.Certificate) error {
	if len(chain) == 0 {
		return errProof
	}
	if ours, err := s.verifyOwn(chain); ours || err != nil {
		return err
	}
	_, err := s.groupOf(ctx, chain, saying{}, s.knownRevoked)
	return err
}

// denied refuses a chain with something in it that is on the deny list. Above is what the first is known to be under, whatever the
// peer sent behind it.
func (s *Service) denied(chain, above []*x509.Certificate) error {
	return s.owners.Denied("", slices.Concat(chain[:1], above, chain[1:]))
}

// above are the CAs that a certificate of this authority is under.
func (s *Service) above(leaf *x509.Certificate) []*x509.Certificate {
	return slices.DeleteFunc(s.Anchors(), func(ca *x509.Certificate) bool {
		return !bytes.Equal(ca.SubjectKeyId, leaf.AuthorityKeyId) && ca.CheckSignatureFrom(ca) != nil
	})
}

// RenewAt is when a certificate of this authority should be renewed: in the last 60 days of its life, or its last third if that is
// less; somewhere in the first half of that, at another time for each certificate, so that a fleet that came at once does not
// come at once again. False: it is of another authority.
func (s *Service) RenewAt(c *x509.Certificate) (time.Time, bool) { return s.a.renewAt(c) }

func (a *Authority) renewAt(c *x509.Certificate) (time.Time, bool) {
	if _, ours := a.issuerOf(c); !ours {
		return time.Time{}, false
	}
	half := min(renewBefore, c.NotAfter.Sub(c.NotBefore)/3) / 2
	spread := float64(crc32.ChecksumIEEE(c.SerialNumber.Bytes())) / (1 << 32)
	return c.NotAfter.Add(-2*half + time.Duration(spread*float64(half))), true
}

// Anchors are the certificates that a device needs to verify those of this authority: the root, or both while it is rolled over, that
// in use first; the new one signed by the one before it (RFC 7030, Section 4.1.3); and what issues under them.
func (s *Service) Anchors() []*x509.Certificate { return s.a.deviceAnchors() }

func (a *Authority) deviceAnchors() (out []*x509.Certificate) {
	l := a.line(Device)
	roots := l.anchors(time.Now())
	for _, r := range roots {
		out = append(out, r.cert)
	}
	for _, r := range roots {
		if r.cross != nil {
			out = append(out, r.cross)
		}
	}
	return append(out, a.DeviceIntermediates()...)
}

// Enrolments yields what is known of devices' enrolments, in no order. An error is the last element.
func (s *Service) Enrolments(ctx context.Context, f hub.EnrolmentFilter) iter.Seq2[hub.Enrolment, error] {
	return only(s.enrolments(ctx, f, place{}))
}

func (s *Service) enrolments(ctx context.Context, f hub.EnrolmentFilter, from place) iter.Seq2[placed[hub.Enrolment], error] {
	return func(yield func(placed[hub.Enrolment], error) bool) {
		gs, err := s.all(ctx)
		if err != nil {
			yield(placed[hub.Enrolment]{}, err)
			return
		}
		agreed := map[string]bool{}
		for _, g := range gs {
			agreed[g.ID] = g.agreed()
		}
		each(s.walk(ctx, collEnrolments, enrolmentSteps(f), from), func(doc store.Doc) (hub.Enrolment, bool, error) {
			e, err := decodeEnrolment(doc)
			if err != nil {
				return hub.Enrolment{}, false, err
			}
			if e.waits() == hub.WaitsForTerms && agreed[e.Group] {
				e.State = hub.EnrolmentAllowed // it will see that when it comes again
			}
			meant := (f.Owner == "" || e.Owner == f.Owner) && (len(f.Groups) == 0 || slices.Contains(f.Groups, e.Group)) &&
				(len(f.States) == 0 || slices.Contains(f.States, e.State))
			return e.enrolment(doc.Key), meant, nil
		})(yield)
	}
}

func enrolmentSteps(f hub.EnrolmentFilter) []step {
	other := step{}
	switch {
	case f.Owner != "":
		other.index = indexOwner + string(f.Owner)
	case len(f.Groups) == 1:
		other.index = indexGroup + f.Groups[0]
	case len(f.States) == 1 && f.States[0] != hub.EnrolmentAllowed: // to which terms bring those that wait
		other.index = indexState + string(f.States[0])
	}
	return stepsOf(f.Devices, byKey, other)
}

// Decide allows devices that wait or were refused, or refuses those that wait, were allowed or have a certificate; what they have
// is not revoked by that. One that waits for terms alone was allowed. It returns those whose state changed. A device that is not known, or is not the owner's, is NotFound;
// owner "" is all.
func (s *Service) Decide(
	ctx context.Context, owner hub.Owner, devices []hub.DeviceID, allow bool, user string,
) (out []hub.Enrolment, err error) {
	for _, dev := range devices {
		changed := false
		e, err := again(ctx, func() (e enrolment, err error) {
			e, changed, err = s.decide(ctx, owner, dev, allow, user)
			return e, err
		})
		if err != nil {
			return out, fmt.Errorf("certificateauthority.Decide: %w", err)
		}
		if changed {
			out = append(out, e.enrolment(string(dev)))
		}
	}
	return out, nil
}

func (s *Service) decide(ctx context.Context, owner hub.Owner, dev hub.DeviceID, allow bool, user string) (e enrolment, changed bool, err error) {
	turn := s.turn(string(dev))
	turn.Lock()
	defer turn.Unlock()
	doc, err := s.docs.Get(ctx, collEnrolments, string(dev))
	if err != nil {
		return e, false, err
	}
	if doc.Rev == 0 {
		return e, false, errNotEnrolled
	}
	if e, err = decodeEnrolment(doc); err != nil {
		return e, false, err
	}
	if owner != "" {
		now, err := s.ownerOf(ctx, dev)
		if err != nil {
			return e, false, err
		}
		if e.Owner != owner || now != "" && now != owner { // it may have changed hands since
			return e, false, errNotEnrolled
		}
	}
	state := hub.EnrolmentRefused
	if allow {
		state = hub.EnrolmentAllowed
	}
	if e.State == state && !e.unfit() || allow && (e.State == hub.EnrolmentIssued || e.waits() == hub.WaitsForTerms) { // which nobody decides here
		return e, false, nil
	}
	e.State, e.User, e.Decided, e.Problem = state, user, time.Now().UTC(), ""
	next, err := e.doc(dev, doc.Rev)
	if err == nil {
		_, err = s.docs.Put(ctx, collEnrolments, next)
	}
	return e, err == nil, err
}

// Forget removes what is known of devices' enrolments, so that they begin anew, also with another factory key; their certificates
// stay. It returns what was there.
func (s *Service) Forget(ctx context.Context, f hub.EnrolmentFilter) (out []hub.Enrolment, err error) {
	for e, err := range s.Enrolments(ctx, f) {
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	for i, e := range out {
		if _, err := again(ctx, func() (struct{}, error) { return struct{}{}, s.forget(ctx, e.Device) }); err != nil {
			return out[:i], fmt.Errorf("certificateauthority.Forget: %w", err)
		}
	}
	return out, nil
}

func (s *Service) forget(ctx context.Context, dev hub.DeviceID) error {
	turn := s.turn(string(dev))
	turn.Lock()
	defer turn.Unlock()
	doc, err := s.docs.Get(ctx, collEnrolments, string(dev))
	if err != nil || doc.Rev == 0 {
		return err
	}
	return s.docs.Delete(ctx, collEnrolments, doc.Key, doc.Rev)
}
