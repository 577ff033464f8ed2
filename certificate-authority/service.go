package certificateauthority

import (
	"cmp"
	"context"
	"crypto"
	"crypto/cipher"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/revocation"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// DeviceValidity is how long a device's identity certificate lasts.
	DeviceValidity = 365 * 24 * time.Hour
	// maxLive bounds the certificates of a device that are good at a time: the one in use, one that takes its place, and some
	// that were lost on the way.
	maxLive = 16
	// maxMade bounds how many are made for a device in a day, those that were revoked included.
	maxMade = 32
	// reservedFor is for how long an ID without owner is kept for whoever had a certificate made for it, and maxReserved for how
	// many IDs an owner may do that.
	reservedFor = 24 * time.Hour
	maxReserved = 1000
	// keptAfter is for how long the ledger keeps certificates that have ended.
	keptAfter = 90 * 24 * time.Hour
	// listValid is how long a revocation list is good, and listAge how old the one that is given out may be.
	listValid, listAge = 24 * time.Hour, 10 * time.Minute
	// listBackdate is for verifiers whose clock is a little behind ours.
	listBackdate = 5 * time.Minute

	sweepEvery = time.Hour
	// measureAfter is when the fleet is counted first: a start has other things to do.
	measureAfter = time.Minute
	// soon is the end that the metrics warn of.
	soon = 30 * 24 * time.Hour
)

// collReserved has, by device, for whom an ID without owner is kept.
const collReserved = "certificate-reservations"

type reservation struct {
	Owner   hub.Owner `json:"owner"`
	Until   time.Time `json:"until"`
	Vouched bool      `json:"vouched,omitempty"` // by a manufacturer: it does not count
}

// Owners says who owns a device: NotFound if nobody does.
type Owners interface {
	Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error)
	// Admits refuses certificates for a device that is disabled, removed or denied, and for a public key (SubjectPublicKeyInfo)
	// that is denied: Denied.
	Admits(ctx context.Context, dev hub.DeviceID, spki []byte) error
	// Denied refuses whoever comes with a chain in which the certificate or its key is denied, or a CA: Denied. It does not block.
	Denied(dev hub.DeviceID, chain []*x509.Certificate) error
}

// Service is the device side of an Authority: it decides who gets a certificate for which device, keeps the ledger of all of
// them, and revokes them. Its methods may be called from any goroutine.
type Service struct {
	a      *Authority
	docs   store.Documents
	owners Owners
	log    *slog.Logger
	use    usage // of devices' certificates
	issued *prometheus.CounterVec

	enrolled  *prometheus.CounterVec
	fleet     *prometheus.GaugeVec
	enrolling *admission.Queue
	secret    cipher.AEAD              // nil: groups have no pre-shared keys
	factories *revocation.Checker      // nil: nobody says what manufacturers have revoked
	groups    atomic.Pointer[[]*group] // nil: they have to be read
	grouping  sync.Mutex               // held by who reads or changes them; before following

	// What several authorities on the same documents know of each other's changes; see changes.go.
	following sync.Mutex    // held by who reads changes or makes them; before mu. It guards at
	at        uint64        // number of the last change that is known
	revokedAt atomic.Uint64 // of the last one with revocations
	woken     chan struct{} // has one when somebody says that there are changes

	signing [64]sync.Mutex // by device: what there is of it is counted before one more is made

	mu      sync.Mutex          // guards all below
	revoked map[string]struct{} // serials of those that the ledger has as revoked
	// unstored are those of them that could not be stored.
	unstored map[string]struct{}
	untold   change    // is stored and has no number yet
	heard    time.Time // when all changes were known
	read     uint64    // counts how often groups have to be read anew
	ended    func(serial string)
	wake     func()                 // wakes other authorities, and who follows them
	lists    map[string]revocations // by issuer, without those that do not have the newest revocation
	changes  uint64                 // counts revocations
	listing  sync.Mutex             // held by who makes the next one; before mu

	// responders answer for the issuing keys of what is out there; see ocsp.go.
	responders map[string]*responder // by the names of their issuers; mu
	answering  *admission.Queue
	questions  *prometheus.CounterVec
	answers    map[string]answer     // to be given out again, by DER of the question's CertID; mu
	shown      map[shownID]time.Time // what the hub shows itself, and until when; mu
}

// revocations is an issuer's newest revocation list.
type revocations struct {
	der []byte
	newestList
}

// ListsPath is where the doors serve the revocation lists, below which each issuer's has its name.
const ListsPath = "/certificate-authority/api/v1/signing/crl/"

// NewService makes a Service. It reads which certificates are revoked, and fails when it cannot: then nobody could be let in.
// The certificates that it makes name the revocation list and who answers for them below base, the URL of the applications' door
// as everybody reaches it; "": they name none.
func NewService(
	ctx context.Context, a *Authority, docs store.Documents, owners Owners, base string, log *slog.Logger, reg prometheus.Registerer,
) (*Service, error) {
	s := &Service{
		a: a, docs: docs, owners: owners, log: log, use: deviceUsage,
		revoked: map[string]struct{}{}, unstored: map[string]struct{}{}, lists: map[string]revocations{}, woken: make(chan struct{}, 1),
		issued: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_certificates_total",
			Help: "Certificates that were asked for by what came of it: issued, or refused. Many that are refused: somebody asks for devices of others, or tries what a request may hold.",
		}, []string{"outcome"}),
		enrolled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_enrolments_total",
			Help: "Enrolments and renewals by what the device showed, and what came of it: issued, or the code of the refusal.",
		}, []string{"method", "outcome"}),
		fleet: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "coaphub_certificates",
			Help: "Certificates of devices, counted once an hour: good, revoked, devices whose last one ends within 30 days (ends-soon), keys that several devices have (shared-key), RSA keys below 3072 bits (weak-key). See coaphub certs report for which.",
		}, []string{"state"}),
		enrolling:  admission.NewQueue(maxEnrolling, enrolQueue, enrolPatience),
		responders: map[string]*responder{},
		answering:  admission.NewQueue(4, 256, 5*time.Second),
		questions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_certificate_questions_total",
			Help: "Questions about single certificates (OCSP) by answer; again: one that was made before. try-later: more come than can be answered, or the store is away.",
		}, []string{"answer"}),
		answers: map[string]answer{}, shown: map[shownID]time.Time{},
	}
	if base != "" {
		s.use.lists = base + ListsPath
		s.use.responders = []string{base + StatusPath}
	}
	if reg != nil {
		reg.MustRegister(s.fleet, s.issued, s.enrolled, s.questions, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_root_lists_due",
			Help: "Roots whose revocation list lacks what was retired, or ends within 30 days. Above 0 for hours: their keys are offline. coaphub ca list shows which; bring the key: coaphub ca renew-list --root-key FILE.",
		}, func() float64 { return float64(a.listsDue(time.Now())) }))
	}
	began := time.Now()
	n, revoked, err := s.newest(ctx) // first: what comes meanwhile is read once more
	if err != nil {
		return nil, fmt.Errorf("read the number of changes: %w", err)
	}
	s.at, s.heard = n, began
	s.revokedAt.Store(revoked)
	for serial, err := range docs.FindKeys(ctx, collCertificates, indexRevoked) {
		if err != nil {
			return nil, fmt.Errorf("read which certificates are revoked: %w", err)
		}
		s.revoked[serial] = struct{}{}
	}
	s.renewRootLists(ctx)
	return s, nil
}

// Run follows what other authorities on the same documents change, removes what has ended from the ledger, and renews the roots' revocation
// lists, now and then, until ctx ends. The error is always nil.
func (s *Service) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	first := time.NewTimer(measureAfter)
	defer first.Stop()
	var look, compare <-chan time.Time
	agree := true
	if s.shared() {
		l, c := time.NewTicker(followEvery), time.NewTicker(reconcileEvery)
		defer l.Stop()
		defer c.Stop()
		look, compare = l.C, c.C
	}
	if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
		s.log.WarnContext(ctx, "certificates that have ended could not be removed from the ledger, trying again", "error", err)
	}
	for {
		select {
		case <-look:
			agree = s.keepUp(ctx, agree)
		case <-s.woken:
			agree = s.keepUp(ctx, agree)
		case <-compare:
			if err := s.reconcile(ctx); err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "revocations could not be compared with the ledger, trying again", "error", err)
			}
		case <-first.C:
			s.measure(ctx)
		case <-tick.C:
			s.renewRootLists(ctx)
			if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
				s.log.WarnContext(ctx, "certificates that have ended could not be removed from the ledger, trying again", "error", err)
			}
			s.measure(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// renewRootLists has the roots' lists renewed in time. Without one the hub goes on: it does not need them itself.
func (s *Service) renewRootLists(ctx context.Context) {
	if err := s.a.renewLists(time.Now()); err != nil {
		s.log.WarnContext(ctx, "a root's revocation list cannot be renewed", "error", err)
	}
}

// sweep removes what ended longer ago than keptAfter; from the month before the oldest that can be kept, a year back.
func (s *Service) sweep(ctx context.Context) error {
	before := time.Now().UTC().Add(-keptAfter)
	first := time.Date(before.Year(), before.Month(), 1, 0, 0, 0, 0, time.UTC)
	for back := range 13 {
		for doc, err := range s.docs.Find(ctx, collCertificates, month(first.AddDate(0, -back, 0))) {
			if err != nil {
				return err
			}
			e, err := decodeEntry(doc)
			if err != nil {
				return err
			}
			if !e.NotAfter.Before(before) {
				continue
			}
			if err := s.docs.Delete(ctx, collCertificates, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
				return err
			}
			s.mu.Lock()
			delete(s.revoked, doc.Key)
			s.mu.Unlock()
		}
	}
	now := time.Now()
	return errors.Join(
		s.sweepAll(ctx, collReserved, func(value []byte) bool {
			var r reservation
			return json.Unmarshal(value, &r) != nil || !now.Before(r.Until)
		}),
		s.sweepAll(ctx, collTokens, func(value []byte) bool {
			var d tokenDoc
			return json.Unmarshal(value, &d) != nil || now.Sub(d.Expires) > tokenKeptAfter
		}),
		s.sweepAll(ctx, collEnrolments, func(value []byte) bool {
			var e enrolment
			return json.Unmarshal(value, &e) == nil && (e.State == hub.EnrolmentWaiting || e.unfit()) && now.Sub(e.Changed) > waitsFor
		}),
		s.sweepAll(ctx, collProvisioning, func(value []byte) bool {
			var p provisioning
			return json.Unmarshal(value, &p) == nil && now.Sub(p.Attested) > recordKept
		}),
		s.sweepParts(ctx),
	)
}

// sweepAll removes the documents of a collection that have had their time.
func (s *Service) sweepAll(ctx context.Context, collection string, over func(value []byte) bool) error {
	for doc, err := range s.docs.Range(ctx, collection, "", "") {
		if err != nil {
			return err
		}
		if !over(doc.Value) {
			continue
		}
		if err := s.docs.Delete(ctx, collection, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return nil
}

// Sign answers a certificate signing request of an owner with a certificate, PEM, and the one that issued it behind it. It is
// for a device of the owner, or for one that nobody owns, which is kept for the owner for 24 hours then. Kinds: Invalid and
// TooLarge for what is wrong with the request, Denied for the hub's ID ("device-id-of-hub") and for devices of others
// ("device-owned-by-other"), Exhausted when the device has 16 certificates that are good ("certificates-limit") or the owner
// 1000 IDs that are kept ("reservations-limit"). Denied, too, for a device that is not let in, with the codes of Owners.Admits.
// What is returned is in the ledger.
func (s *Service) Sign(ctx context.Context, owner hub.Owner, user string, csr []byte) (chain []byte, err error) {
	defer func() { s.count(err) }()
	const op = "certificateauthority.Sign"
	if owner == "" {
		return nil, hub.NewError(hub.Denied, "owner-missing", "certificates are for owners").With(op, nil)
	}
	req, err := parseRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if req.device == s.a.hubID {
		return nil, errOfHub.With(op, nil)
	}
	turn := s.turn(string(req.device))
	turn.Lock()
	defer turn.Unlock()
	leaf, err := s.sign(ctx, req, entry{Device: req.device, Owner: owner, How: hub.ByCSR, User: user})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	by, _ := s.a.issuerOf(leaf)
	return slices.Concat(certPEM(leaf), certPEM(by.issuing)), nil
}

// Reserve keeps the ID of a device for an owner as a certificate of Sign does, if nobody owns the device: the owner gets something
// else by which it comes in. Kinds are those of Sign.
func (s *Service) Reserve(ctx context.Context, owner hub.Owner, dev hub.DeviceID) error {
	const op = "certificateauthority.Reserve"
	switch {
	case owner == "":
		return hub.NewError(hub.Denied, "owner-missing", "an ID is kept for an owner").With(op, nil)
	case dev == s.a.hubID:
		return errOfHub.With(op, nil)
	}
	turn := s.turn(string(dev))
	turn.Lock()
	defer turn.Unlock()
	err := s.owners.Admits(ctx, dev, nil)
	if err == nil {
		err = s.entitled(ctx, owner, dev, true)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return nil
}

// turn is held by who has something made for a device, or under a name.
func (s *Service) turn(name string) *sync.Mutex {
	return &s.signing[crc32.ChecksumIEEE([]byte(name))%uint32(len(s.signing))]
}

// sign makes the certificate that an entry of the ledger is about, and puts it there. Without an owner nobody is asked whose the
// device is. The device's turn is taken.
func (s *Service) sign(ctx context.Context, req request, e entry) (*x509.Certificate, error) {
	if err := s.room(ctx, e.Owner, req); err != nil {
		return nil, err
	}
	if err := s.owners.Admits(ctx, req.device, req.spki); err != nil { // before an ID is kept for the owner
		return nil, err
	}
	if e.Owner != "" {
		if err := s.entitled(ctx, e.Owner, req.device, !req.vouched); err != nil {
			return nil, err
		}
	}
	by := s.a.signer(Device)
	leaf, err := by.signKey(req.key, "uuid:"+string(req.device), DeviceValidity, s.use, nil)
	if err != nil {
		return nil, err
	}
	if err := s.record(ctx, leaf, e); err != nil {
		return nil, err
	}
	// Somebody else may have signed the device up meanwhile.
	if own, err := s.owners.Owner(ctx, req.device); e.Owner != "" && err == nil && own.Owner != e.Owner {
		_, err = s.Revoke(ctx, hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(leaf.SerialNumber)}}, hub.RevokedSuperseded)
		return nil, cmp.Or[error](err, errOther)
	}
	return leaf, nil
}

// IssueDevice is Authority.IssueDevice for an operator, whom nobody asks who owns the device. The ledger has it as signed for
// owner, "" for whoever has the device. What is returned is in the ledger.
func (s *Service) IssueDevice(ctx context.Context, dev hub.DeviceID, validity time.Duration, owner hub.Owner, user string) (Identity, error) {
	return withKey(func(key crypto.PublicKey) (Identity, error) {
		return s.issueDeviceFor(ctx, key, dev, validity, owner, user)
	})
}

// issueDeviceFor is IssueDevice for a key that somebody else has.
func (s *Service) issueDeviceFor(
	ctx context.Context, key crypto.PublicKey, dev hub.DeviceID, validity time.Duration, owner hub.Owner, user string,
) (id Identity, err error) {
	defer func() { s.count(err) }()
	if id, err = s.a.issueDeviceFor(key, dev, validity, s.use); err != nil {
		return Identity{}, err
	}
	if err := s.record(ctx, id.leaf, entry{Device: dev, Owner: owner, How: hub.ByOperator, User: user}); err != nil {
		return Identity{}, fmt.Errorf("certificateauthority.IssueDevice: %w", err)
	}
	return id, nil
}

func (s *Service) count(err error) {
	outcome := "issued"
	if err != nil {
		outcome = "refused"
	}
	s.issued.WithLabelValues(outcome).Inc()
}

// whose refuses a device of another owner, and one that nobody owns and is kept for another: by a certificate that was made, else by
// a group that names it. his: it is the owner's; else the reservation that there is of its ID, or was, and its revision.
func (s *Service) whose(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (his bool, r reservation, rev uint64, err error) {
	switch own, err := s.owners.Owner(ctx, dev); {
	case err == nil && own.Owner == owner:
		return true, r, 0, nil
	case err == nil:
		return false, r, 0, errOther
	case !hub.IsKind(err, hub.NotFound):
		return false, r, 0, err
	}
	doc, err := s.docs.Get(ctx, collReserved, string(dev))
	if err != nil {
		return false, r, 0, err
	}
	if doc.Rev != 0 {
		if err := json.Unmarshal(doc.Value, &r); err != nil {
			return false, r, 0, damaged("a reservation of a device ID", err)
		}
	}
	by := r.Owner // who came first
	if !time.Now().Before(r.Until) {
		if by, err = s.namedBy(ctx, dev); err != nil {
			return false, r, 0, err
		}
	}
	if by != "" && by != owner {
		return false, r, 0, errOther
	}
	return false, r, doc.Rev, nil
}

// entitled reports whether the owner may have certificates for a device, and keeps an ID without owner for him. How many he may have
// kept is bounded by those that count: a production line enrols more devices in a day than have signed up.
func (s *Service) entitled(ctx context.Context, owner hub.Owner, dev hub.DeviceID, counted bool) error {
	for {
		his, old, rev, err := s.whose(ctx, owner, dev)
		if err != nil {
			return err
		}
		if his {
			return s.release(ctx, dev)
		}
		switch by, err := s.namedBy(ctx, dev); {
		case err != nil:
			return err
		case by != "" && by != owner: // he came before the list, and has what is left of his time
			return nil
		}
		now := time.Now().UTC()
		mine := old.Owner == owner
		if counted && (!mine || old.Vouched) {
			if err := s.mayReserve(ctx, owner, now); err != nil {
				return err
			}
		}
		vouched := !counted && (!mine || old.Vouched) // what counts once, counts until it ends
		value, err := json.Marshal(reservation{owner, now.Add(reservedFor), vouched})
		if err != nil {
			return fmt.Errorf("encode a reservation: %w", err)
		}
		next := store.Doc{Key: string(dev), Value: value, Rev: rev}
		if !vouched {
			next.Index = []string{indexOwner + string(owner)}
		}
		_, err = s.docs.Put(ctx, collReserved, next)
		if !hub.IsKind(err, hub.Conflict) {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

var errCompromised = hub.NewError(hub.Denied, "csr-key-compromised", "a certificate of this key was revoked because somebody else has the key; make another")

var (
	errOther    = hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")
	errReserved = hub.NewError(hub.Exhausted, "reservations-limit", "too many devices were given certificates or pre-shared keys and have not signed up")
	errMade     = hub.NewError(hub.Exhausted, "certificates-limit", "too many certificates of the device were made within a day")
	errLive     = hub.NewError(hub.Exhausted, "certificates-limit", "the device has too many certificates that are good; revoke some")
)

// release forgets that an ID was kept: it has an owner now.
func (s *Service) release(ctx context.Context, dev hub.DeviceID) error {
	doc, err := s.docs.Get(ctx, collReserved, string(dev))
	if err != nil || doc.Rev == 0 {
		return err
	}
	if err := s.docs.Delete(ctx, collReserved, doc.Key, doc.Rev); !hub.IsKind(err, hub.Conflict) {
		return err
	}
	return nil
}

// mayReserve refuses one more ID for an owner who has many that are kept, and have not signed up.
func (s *Service) mayReserve(ctx context.Context, owner hub.Owner, now time.Time) error {
	// Some of them may have had their time.
	if many, err := s.atLeast(ctx, collReserved, indexOwner+string(owner), maxReserved); err != nil || !many {
		return err
	}
	var kept []hub.DeviceID
	for doc, err := range s.docs.Find(ctx, collReserved, indexOwner+string(owner)) {
		if err != nil {
			return err
		}
		var r reservation
		if json.Unmarshal(doc.Value, &r) == nil && now.Before(r.Until) {
			kept = append(kept, hub.DeviceID(doc.Key))
		}
	}
	if len(kept) < maxReserved {
		return nil
	}
	left := len(kept)
	for _, dev := range kept { // which is dear, and makes room
		owner, err := s.ownerOf(ctx, dev)
		if err == nil && owner != "" {
			err = s.release(ctx, dev)
			left--
		}
		if err != nil {
			return err
		}
	}
	if left >= maxReserved {
		return errReserved
	}
	return nil
}

// room refuses one more certificate for a device that has many of that owner, or of the operator, and one for a key that somebody
// else is known to have. Those of others count for nothing: else they could keep the owner from getting one.
func (s *Service) room(ctx context.Context, owner hub.Owner, req request) error {
	if err := s.mayHave(ctx, req.spki); err != nil {
		return err
	}
	live, made, err := s.tally(ctx, indexDevice+string(req.device), func(e *entry) bool { return e.Owner == owner || e.How == hub.ByOperator })
	switch {
	case err != nil:
		return err
	case live >= maxLive:
		return errLive
	case made >= maxMade:
		return errMade
	}
	return nil
}

// tally counts certificates of the ledger that count: those that are good, and those that were made within a day.
func (s *Service) tally(ctx context.Context, index string, counts func(*entry) bool) (live, made int, err error) {
	now := time.Now()
	for doc, err := range s.docs.Find(ctx, collCertificates, index) {
		if err != nil {
			return 0, 0, err
		}
		e, err := decodeEntry(doc)
		if err != nil {
			return 0, 0, err
		}
		if !counts(&e) {
			continue
		}
		if e.live(now) {
			live++
		}
		if now.Sub(e.Created) < 24*time.Hour {
			made++
		}
	}
	return live, made, nil
}

// atLeast reports whether a collection has so many documents of an index, without reading them.
func (s *Service) atLeast(ctx context.Context, collection, index string, most int) (bool, error) {
	n := 0
	for _, err := range s.docs.FindKeys(ctx, collection, index) {
		if err != nil {
			return false, err
		}
		if n++; n >= most {
			return true, nil
		}
	}
	return false, nil
}

// ownerOf is who owns a device; "" if nobody does.
func (s *Service) ownerOf(ctx context.Context, dev hub.DeviceID) (hub.Owner, error) {
	own, err := s.owners.Owner(ctx, dev)
	if hub.IsKind(err, hub.NotFound) {
		return "", nil
	}
	return own.Owner, err
}

// mayHave refuses a key that somebody else is known to have.
func (s *Service) mayHave(ctx context.Context, spki []byte) error {
	for _, err := range s.docs.FindKeys(ctx, collCertificates, indexBadKey+nameOf(spki)) {
		if err != nil {
			return err
		}
		return errCompromised
	}
	return nil
}

// List returns the revocation list of an issuer, DER (RFC 5280, Section 5): what it has signed and was revoked before its time, as
// long as it would have been good. It is at most ten minutes old, or newer than the newest revocation, and good for a day. NotFound
// for an issuer that is not ours, or was retired: nothing that it has signed is good. A root's list has the issuing certificates
// that were retired, and is good for a year; NotFound, too, for one that has none yet ("root-list-missing").
func (s *Service) List(ctx context.Context, issuer string) ([]byte, error) {
	const op = "certificateauthority.List"
	if root, ok := s.a.root(issuer); ok {
		if root.list == nil {
			return nil, errNoRootList.With(op, nil)
		}
		return root.list.Raw, nil
	}
	by, ok := s.a.issuer(issuer)
	if !ok {
		return nil, hub.NewError(hub.NotFound, "issuer-unknown", "there is no such issuer").With(op, nil)
	}
	s.listing.Lock() // all who ask at the same time get the same
	defer s.listing.Unlock()
	now := time.Now()
	s.mu.Lock()
	last, changes, untold := s.lists[issuer], s.changes, len(s.untold.Revoked) > 0
	s.mu.Unlock()
	if !s.shared() && last.der != nil && now.Sub(last.Made) < listAge {
		return last.der, nil
	}
	if s.shared() && !untold {
		if stored, _, err := s.newestList(ctx, issuer); err == nil && stored.fresh(now, s.revokedAt.Load()) {
			if stored.Name == last.Name {
				return last.der, nil
			}
			if der, err := s.storedList(ctx, stored); err == nil && der != nil {
				s.keepList(issuer, revocations{der, stored}, changes)
				return der, nil
			}
		}
	}
	next, err := s.makeList(ctx, by, now)
	if err != nil && last.der != nil && now.Sub(last.Made) < listValid/2 { // it has all that was revoked
		s.log.WarnContext(ctx, "no new revocation list can be made, the last one goes on", "error", err)
		return last.der, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	s.keepList(issuer, next, changes)
	return next.der, nil
}

func (s *Service) keepList(issuer string, l revocations, changes uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changes == changes { // else there may be a revocation that it does not have
		s.lists[issuer] = l
	}
}

// ListOf is List of the issuer that a certificate names, DER, and that has issued its serial number, as far as the ledger knows it; else
// of the newest issuer of that name.
func (s *Service) ListOf(ctx context.Context, issuer []byte, serial *big.Int) ([]byte, error) {
	doc, err := s.docs.Get(ctx, collCertificates, hub.SerialOf(serial))
	if err != nil {
		return nil, fmt.Errorf("certificateauthority.ListOf: %w", err)
	}
	var e entry
	if doc.Rev != 0 {
		if e, err = decodeEntry(doc); err != nil {
			return nil, err
		}
	}
	name := ""
	for _, by := range s.a.named(issuer) {
		if name = by.name; name == e.Issuer {
			break
		}
	}
	return s.List(ctx, name)
}

func (s *Service) newListOf(ctx context.Context, by signer, number int64, now time.Time) ([]byte, error) {
	var entries []x509.RevocationListEntry
	for doc, err := range s.docs.Find(ctx, collCertificates, indexRevoked) {
		if err != nil {
			return nil, err
		}
		e, err := decodeEntry(doc)
		if err != nil {
			return nil, err
		}
		serial, ok := new(big.Int).SetString(doc.Key, 16)
		if !ok || now.After(e.NotAfter.Add(listValid)) { // RFC 5280, Section 3.3: it is on one list beyond its end
			continue
		}
		if e.Issuer != by.name && e.How != hub.Unrecorded { // of which nobody knows who has signed it
			continue
		}
		entries = append(entries, x509.RevocationListEntry{
			// As much earlier as the list: nothing on it may be later than that (RFC 5280, Sections 5.1.2.4 and 5.1.2.6), and what is
			// on one list at a time is on all of them at that time.
			SerialNumber: serial, RevocationTime: e.Revoked.Add(-listBackdate), ReasonCode: int(e.Reason),
		})
	}
	return newList(by.issuing, by.key, number, entries, now, listValid)
}

// newList signs a revocation list.
func newList(
	by *x509.Certificate, key crypto.Signer, number int64, entries []x509.RevocationListEntry, now time.Time, valid time.Duration,
) ([]byte, error) {
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(number), ThisUpdate: now.Add(-listBackdate), NextUpdate: now.Add(valid), RevokedCertificateEntries: entries,
	}, by, key)
	if err != nil {
		return nil, fmt.Errorf("sign the list: %w", err)
	}
	return der, nil
}

// Issuer names the key that signs devices' certificates now, as List takes it.
func (s *Service) Issuer() string { return s.a.signer(Device).name }
