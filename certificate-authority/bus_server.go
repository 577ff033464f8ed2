package certificateauthority

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"math/big"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

// Subject is where any authority answers, and NewsSubject where all who follow it are woken.
const Subject, NewsSubject = "ca", "ca.changed"

// news is word that there are changes.
const news = bus.Note[newsNote]("ca.changed")

type newsNote struct{}

// The methods. What they carry is in hub's words, and certificates are DER. No private key is among it.
const (
	methodFollow  = bus.Method[followQuestion, followAnswer]("ca.follow")
	methodRevoked = bus.Method[revokedQuestion, revokedAnswer]("ca.revoked")

	methodSign        = bus.Method[signQuestion, []byte]("ca.sign")
	methodReserve     = bus.Method[reserveQuestion, struct{}]("ca.reserve")
	methodIssueDevice = bus.Method[issueQuestion, issueAnswer]("ca.issueDevice")
	methodIssueHub    = bus.Method[hubQuestion, [][]byte]("ca.issueHub")
	methodStaple      = bus.Method[[]byte, hub.CertificateStatus]("ca.staple")

	methodCertificates = bus.Method[pageQuestion[hub.CertificateFilter], page[hub.Certificate]]("ca.certificates")
	methodRevoke       = bus.Method[revokeQuestion, some[hub.Certificate]]("ca.revoke")
	methodHandOver     = bus.Method[handOverQuestion, some[hub.Certificate]]("ca.handOver")
	methodReport       = bus.Method[reportQuestion, hub.CertificateReport]("ca.report")
	methodList         = bus.Method[string, []byte]("ca.list")
	methodListOf       = bus.Method[listOfQuestion, []byte]("ca.listOf")
	methodStatus       = bus.Method[[]byte, hub.CertificateStatus]("ca.status")

	methodEnrol        = bus.Method[enrolQuestion, enrolAnswer]("ca.enrol")
	methodVouch        = bus.Method[[][]byte, struct{}]("ca.vouch")
	methodApplicant    = bus.Method[[][]byte, hub.Applicant]("ca.applicant")
	methodAdmit        = bus.Method[admitQuestion, hub.Applicant]("ca.admit")
	methodProvisioned  = bus.Method[provisionedQuestion, struct{}]("ca.provisioned")
	methodRecords      = bus.Method[pageQuestion[hub.ProvisioningFilter], page[hub.ProvisioningRecord]]("ca.provisioningRecords")
	methodDropRecords  = bus.Method[hub.ProvisioningFilter, some[string]]("ca.deleteProvisioningRecords")
	methodGroups       = bus.Method[pageQuestion[hub.Owner], page[hub.EnrolmentGroup]]("ca.groups")
	methodSetGroup     = bus.Method[hub.EnrolmentGroup, hub.EnrolmentGroup]("ca.setGroup")
	methodAcceptTerms  = bus.Method[termsQuestion, hub.EnrolmentGroup]("ca.acceptTerms")
	methodDeleteGroups = bus.Method[[]string, some[hub.EnrolmentGroup]]("ca.deleteGroups")
	methodEnrolments   = bus.Method[pageQuestion[hub.EnrolmentFilter], page[hub.Enrolment]]("ca.enrolments")
	methodDecide       = bus.Method[decideQuestion, some[hub.Enrolment]]("ca.decide")
	methodForget       = bus.Method[hub.EnrolmentFilter, some[hub.Enrolment]]("ca.forget")
	methodNewToken     = bus.Method[tokenQuestion, tokenAnswer]("ca.newToken")
	methodTokens       = bus.Method[pageQuestion[hub.Owner], page[hub.EnrolmentToken]]("ca.tokens")
	methodDropTokens   = bus.Method[tokensQuestion, some[hub.EnrolmentToken]]("ca.deleteTokens")

	methodRoll      = bus.Method[rollQuestion, struct{}]("ca.roll")
	methodRetire    = bus.Method[string, struct{}]("ca.retire")
	methodRegistrar = bus.Method[struct{}, []byte]("ca.registrar")
	methodRASign    = bus.Method[raSignQuestion, []byte]("ca.registrarSign")
	methodRADecrypt = bus.Method[raDecryptQuestion, []byte]("ca.registrarDecrypt")
)

type (
	followQuestion struct {
		After uint64 // the last change that is known
		Trust []byte // its sum; nil: nothing is known
	}
	followAnswer struct {
		Number  uint64   // of the last change in Revoked, or before it
		Revoked []string // serials
		More    bool
		Behind  bool   // there is no telling what was changed: all is to be read anew
		Trust   *trust // nil: it is the known one
		Sum     []byte
	}
	revokedQuestion struct{ After string }
	revokedAnswer   struct {
		Number  uint64
		Serials []string // in order
		More    bool
	}

	signQuestion struct {
		Profile hub.Profile
		Owner   hub.Owner
		User    string
		Hosts   []string
		CSR     []byte
	}
	issueQuestion struct {
		Device   hub.DeviceID
		Validity time.Duration
		Owner    hub.Owner
		User     string
		CSR      []byte
	}
	issueAnswer struct{ Chain, CA []byte } // PEM
	hubQuestion struct {
		Root  Root
		Hosts []string
		CSR   []byte
	}
	revokeQuestion struct {
		Filter hub.CertificateFilter
		Reason hub.RevocationReason
	}
	reserveQuestion struct {
		Owner  hub.Owner
		Device hub.DeviceID
	}
	handOverQuestion struct {
		Device hub.DeviceID
		Owner  hub.Owner
		Serial string
	}
	reportQuestion struct {
		Owner  hub.Owner
		Within time.Duration
	}
	listOfQuestion struct{ Issuer, Serial []byte }

	enrolQuestion struct {
		Chain              [][]byte
		PSK                hub.DeviceID
		Token, Transaction []byte // whatever the device sent
		CSR                []byte
		Renew              bool
	}
	enrolAnswer struct {
		Device hub.DeviceID
		Serial string
		Chain  [][]byte
	}
	admitQuestion struct {
		Chain [][]byte
		Named hub.DeviceID
	}
	provisionedQuestion struct {
		Chain [][]byte
		To    hub.Applicant
		Step  hub.Provisioned
	}
	termsQuestion struct {
		Owner             hub.Owner
		ID, Version, User string
	}
	decideQuestion struct {
		Owner   hub.Owner
		Devices []hub.DeviceID
		Allow   bool
		User    string
	}
	tokenQuestion struct {
		Owner  hub.Owner
		Device hub.DeviceID
		Life   time.Duration
		User   string
	}
	tokenAnswer struct {
		Text  string
		Token hub.EnrolmentToken
	}
	tokensQuestion struct {
		Owner hub.Owner
		IDs   []string
	}
	rollQuestion struct {
		Root Root
		Step Step
	}
	raSignQuestion struct {
		Digest []byte
		Hash   crypto.Hash
	}
	raDecryptQuestion struct {
		Message    []byte
		SessionKey int // its length
	}
)

// pageQuestion asks for what a filter means, from a place on.
type pageQuestion[F any] struct {
	Filter F
	From   place
}

// page is some of that.
type page[T any] struct {
	Items []T
	Next  *place // from where it goes on; nil: that was all
}

// some is what was done until something went wrong, if anything did.
type some[T any] struct {
	Items   []T
	More    bool // the rest is to be asked for again
	Failure *failure
}

// failure is an error beside a result.
type failure struct {
	Kind, Code, Text string
	RetryAfter       time.Duration
}

func (s some[T]) err(op string) error {
	if s.Failure == nil {
		return nil
	}
	e := &hub.Error{Op: op, Code: s.Failure.Code, Text: s.Failure.Text, RetryAfter: s.Failure.RetryAfter}
	for _, k := range hub.Kinds() {
		if k.String() == s.Failure.Kind {
			e.Kind = k
		}
	}
	return e
}

// trust is what others may know of an Authority.
type trust struct {
	Lines []trustedLine
	Parts []Part
}

type trustedLine struct {
	Root    Root
	Roots   []trustedRoot
	Issuers []trustedIssuer
}

type trustedRoot struct {
	DER, Cross []byte
	Retired    bool
}

type trustedIssuer struct {
	DER     []byte
	Under   int // index of its root
	Retired bool
}

func (a *Authority) trust() (out trust, sum []byte, err error) {
	for _, r := range Roots() {
		l := a.line(r)
		line := trustedLine{Root: r}
		for _, root := range l.roots {
			t := trustedRoot{DER: root.cert.Raw, Retired: root.retired}
			if root.cross != nil {
				t.Cross = root.cross.Raw
			}
			line.Roots = append(line.Roots, t)
		}
		for _, s := range l.issuers {
			line.Issuers = append(line.Issuers, trustedIssuer{
				DER: s.issuing.Raw, Retired: s.key == nil, Under: slices.IndexFunc(l.roots, func(r anchor) bool { return r.cert == s.root }),
			})
		}
		out.Lines = append(out.Lines, line)
	}
	out.Parts = a.Parts()
	text, err := json.Marshal(out)
	if err != nil {
		return out, nil, fmt.Errorf("encode what is believed: %w", err)
	}
	hash := sha256.Sum256(text)
	return out, hash[:], nil
}

const (
	// maxItems and pageBytes bound a page, and pageTime how long it is looked for.
	maxItems, pageBytes = 1000, 400 << 10
	pageTime            = 2 * time.Second
	// maxSerials bounds the serials of an answer.
	maxSerials = 10_000
	// maxAtOnce bounds the certificates that one call revokes.
	maxAtOnce = 500
)

// pageOf takes a page off what was found.
func pageOf[T any](found iter.Seq2[placed[T], error]) (out page[T], err error) {
	size, began := 0, time.Now()
	for p, err := range found {
		if err != nil {
			return page[T]{}, err
		}
		if p.meant {
			text, err := json.Marshal(p.of) // about as large as what is sent
			if err != nil {
				return page[T]{}, fmt.Errorf("encode a page: %w", err)
			}
			out.Items = append(out.Items, p.of)
			size += len(text)
		}
		if len(out.Items) >= maxItems || size >= pageBytes || time.Since(began) > pageTime {
			out.Next = &p.at
			return out, nil
		}
	}
	return out, nil
}

func chainOf(ders [][]byte) (out []*x509.Certificate, err error) {
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read a certificate: %w", err)
		}
		out = append(out, c)
	}
	return out, nil
}

func dersOf(chain []*x509.Certificate) (out [][]byte) {
	for _, c := range chain {
		out = append(out, c.Raw)
	}
	return out
}

// Server answers other parts for a Service.
type Server struct {
	s     *Service
	bus   *bus.Bus
	hosts []string
	log   *slog.Logger
	calls *bus.Server
}

// NewServer makes a server, before the Service runs. hosts are the names and addresses that parts of the hub may have certificates for,
// besides those of their own machine.
func NewServer(b *bus.Bus, s *Service, hosts []string, log *slog.Logger) *Server {
	v := &Server{s: s, bus: b, hosts: slices.Concat(hosts, []string{"localhost", "127.0.0.1", "::1"}), log: log, calls: b.Server(true, log, Subject)}
	s.mu.Lock()
	s.wake = func() {
		if err := news.Send(b, NewsSubject, newsNote{}); err != nil {
			log.Debug("nobody could be woken, they look by themselves", "error", err)
		}
	}
	s.mu.Unlock()
	changed := func() {
		ctx, cancel := context.WithTimeout(context.Background(), callTime)
		defer cancel()
		s.toldLater(ctx, func(c *change) { c.Authorities = true })
	}
	s.a.changed.Store(&changed)
	v.replicas()
	v.signing()
	v.ledger()
	v.enrolment()
	v.keys()
	return v
}

// Run answers until ctx ends.
func (v *Server) Run(ctx context.Context, ready func()) error {
	stop, err := news.Listen(v.bus, NewsSubject, func(newsNote) {
		select {
		case v.s.woken <- struct{}{}:
		default: // it will look
		}
	})
	if err != nil {
		return fmt.Errorf("certificateauthority.Server: %w", err)
	}
	defer stop()
	return v.calls.Run(ctx, ready)
}

func (v *Server) replicas() {
	s := v.s
	bus.Handle(v.calls, methodFollow, func(ctx context.Context, q followQuestion) (out followAnswer, err error) {
		if err := s.follow(ctx); err != nil { // the files may have changed, too
			return out, err
		}
		out.Number = q.After
		out.Behind, err = s.changesAfter(ctx, q.After, func(n uint64, c change) bool {
			if out.More = len(out.Revoked) >= maxSerials; out.More {
				return false
			}
			out.Number, out.Revoked = n, append(out.Revoked, c.Revoked...)
			return true
		})
		if err != nil {
			return out, err
		}
		t, sum, err := s.a.trust()
		if string(sum) != string(q.Trust) {
			out.Trust, out.Sum = &t, sum
		}
		return out, err
	})
	bus.Handle(v.calls, methodRevoked, func(ctx context.Context, q revokedQuestion) (out revokedAnswer, err error) {
		s.following.Lock()
		err = s.catchUp(ctx)
		out.Number = s.at
		s.following.Unlock()
		if err != nil {
			return out, err
		}
		s.mu.Lock()
		serials := slices.Sorted(maps.Keys(s.revoked)) // with all that have such a number, or none yet
		s.mu.Unlock()
		first, found := slices.BinarySearch(serials, q.After)
		if found {
			first++
		}
		out.Serials = serials[first:min(first+maxSerials, len(serials))]
		out.More = first+len(out.Serials) < len(serials)
		return out, nil
	})
}

func (v *Server) signing() {
	s := v.s
	bus.Handle(v.calls, methodSign, func(ctx context.Context, q signQuestion) ([]byte, error) {
		switch q.Profile {
		case hub.ForDevice:
			return s.Sign(ctx, q.Owner, q.User, q.CSR)
		case hub.ForClient:
			return s.SignClient(ctx, q.Owner, q.User, q.CSR)
		case hub.ForService:
			return s.SignService(ctx, q.Owner, q.User, q.Hosts, q.CSR)
		case hub.ForHub:
		}
		return nil, &hub.Error{Kind: hub.Unsupported, Op: "sign"}
	})
	bus.Handle(v.calls, methodReserve, func(ctx context.Context, q reserveQuestion) (struct{}, error) {
		return struct{}{}, s.Reserve(ctx, q.Owner, q.Device)
	})
	bus.Handle(v.calls, methodIssueDevice, func(ctx context.Context, q issueQuestion) (issueAnswer, error) {
		req, err := parseCSR(q.CSR, s.use)
		if err != nil {
			return issueAnswer{}, err
		}
		id, err := s.issueDeviceFor(ctx, req.PublicKey, q.Device, q.Validity, q.Owner, q.User)
		return issueAnswer{id.Chain, id.CA}, err
	})
	bus.Handle(v.calls, methodIssueHub, func(ctx context.Context, q hubQuestion) ([][]byte, error) {
		for _, h := range q.Hosts {
			if !slices.Contains(v.hosts, h) {
				return nil, hub.NewError(hub.Denied, "host-not-of-hub", fmt.Sprintf("%q is no name of this hub", h))
			}
		}
		c, err := s.hubCertificateFor(ctx, q.Root, q.Hosts, q.CSR)
		return c.Certificate, err
	})
	bus.Handle(v.calls, methodStaple, func(ctx context.Context, der []byte) (hub.CertificateStatus, error) {
		chain, err := chainOf([][]byte{der})
		if err != nil {
			return hub.CertificateStatus{}, err
		}
		return s.stapleOf(ctx, chain[0])
	})
}

func (v *Server) ledger() {
	s := v.s
	bus.Handle(v.calls, methodCertificates, func(ctx context.Context, q pageQuestion[hub.CertificateFilter]) (page[hub.Certificate], error) {
		return pageOf(s.certificates(ctx, q.Filter, q.From))
	})
	bus.Handle(v.calls, methodRevoke, func(ctx context.Context, q revokeQuestion) (some[hub.Certificate], error) {
		out, more, err := s.revokeSome(ctx, q.Filter, q.Reason, maxAtOnce)
		return answered(v, methodRevoke, out, more, err)
	})
	bus.Handle(v.calls, methodHandOver, func(ctx context.Context, q handOverQuestion) (some[hub.Certificate], error) {
		out, err := s.HandOver(ctx, q.Device, q.Owner, q.Serial)
		return answered(v, methodHandOver, out, false, err)
	})
	bus.Handle(v.calls, methodReport, func(ctx context.Context, q reportQuestion) (hub.CertificateReport, error) {
		return s.Report(ctx, q.Owner, q.Within)
	})
	bus.Handle(v.calls, methodList, s.List)
	bus.Handle(v.calls, methodListOf, func(ctx context.Context, q listOfQuestion) ([]byte, error) {
		return s.ListOf(ctx, q.Issuer, new(big.Int).SetBytes(q.Serial))
	})
	bus.Handle(v.calls, methodStatus, func(ctx context.Context, q []byte) (hub.CertificateStatus, error) { return s.Status(ctx, q), nil })
}

func (v *Server) enrolment() {
	s := v.s
	bus.Handle(v.calls, methodEnrol, func(ctx context.Context, q enrolQuestion) (enrolAnswer, error) {
		chain, err := chainOf(q.Chain)
		if err != nil {
			return enrolAnswer{}, err
		}
		proof := hub.EnrolmentProof{Chain: chain, PSK: q.PSK, Token: string(q.Token), Transaction: string(q.Transaction)}
		out, err := s.Enrol(ctx, proof, q.CSR, q.Renew)
		return enrolAnswer{out.Device, out.Serial, dersOf(out.Chain)}, err
	})
	bus.Handle(v.calls, methodVouch, func(ctx context.Context, q [][]byte) (struct{}, error) {
		chain, err := chainOf(q)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, s.Vouch(ctx, chain)
	})
	bus.Handle(v.calls, methodApplicant, func(ctx context.Context, q [][]byte) (hub.Applicant, error) {
		chain, err := chainOf(q)
		if err != nil {
			return hub.Applicant{}, err
		}
		return s.Applicant(ctx, chain)
	})
	bus.Handle(v.calls, methodAdmit, func(ctx context.Context, q admitQuestion) (hub.Applicant, error) {
		chain, err := chainOf(q.Chain)
		if err != nil {
			return hub.Applicant{}, err
		}
		return s.Admit(ctx, chain, q.Named)
	})
	bus.Handle(v.calls, methodProvisioned, func(ctx context.Context, q provisionedQuestion) (struct{}, error) {
		chain, err := chainOf(q.Chain)
		if err != nil {
			return struct{}{}, err
		}
		return struct{}{}, s.Provisioned(ctx, chain, q.To, q.Step)
	})
	bus.Handle(v.calls, methodRecords, func(ctx context.Context, q pageQuestion[hub.ProvisioningFilter]) (page[hub.ProvisioningRecord], error) {
		return pageOf(s.provisioningRecords(ctx, q.Filter, q.From))
	})
	bus.Handle(v.calls, methodDropRecords, func(ctx context.Context, f hub.ProvisioningFilter) (some[string], error) {
		out, err := s.DeleteProvisioningRecords(ctx, f)
		return answered(v, methodDropRecords, out, false, err)
	})
	bus.Handle(v.calls, methodGroups, func(ctx context.Context, q pageQuestion[hub.Owner]) (page[hub.EnrolmentGroup], error) {
		gs, err := s.Groups(ctx, q.Filter)
		if err != nil {
			return page[hub.EnrolmentGroup]{}, err
		}
		return pageOf(inOrder(gs, q.From, func(g hub.EnrolmentGroup) string { return g.ID }))
	})
	bus.Handle(v.calls, methodSetGroup, s.SetGroup)
	bus.Handle(v.calls, methodAcceptTerms, func(ctx context.Context, q termsQuestion) (hub.EnrolmentGroup, error) {
		return s.AcceptTerms(ctx, q.Owner, q.ID, q.Version, q.User)
	})
	bus.Handle(v.calls, methodDeleteGroups, func(ctx context.Context, ids []string) (some[hub.EnrolmentGroup], error) {
		out, err := s.DeleteGroups(ctx, ids)
		return answered(v, methodDeleteGroups, out, false, err)
	})
	bus.Handle(v.calls, methodEnrolments, func(ctx context.Context, q pageQuestion[hub.EnrolmentFilter]) (page[hub.Enrolment], error) {
		return pageOf(s.enrolments(ctx, q.Filter, q.From))
	})
	bus.Handle(v.calls, methodDecide, func(ctx context.Context, q decideQuestion) (some[hub.Enrolment], error) {
		out, err := s.Decide(ctx, q.Owner, q.Devices, q.Allow, q.User)
		return answered(v, methodDecide, out, false, err)
	})
	bus.Handle(v.calls, methodForget, func(ctx context.Context, f hub.EnrolmentFilter) (some[hub.Enrolment], error) {
		out, err := s.Forget(ctx, f)
		return answered(v, methodForget, out, false, err)
	})
	bus.Handle(v.calls, methodNewToken, func(ctx context.Context, q tokenQuestion) (tokenAnswer, error) {
		text, t, err := s.NewToken(ctx, q.Owner, q.Device, q.Life, q.User)
		return tokenAnswer{text, t}, err
	})
	bus.Handle(v.calls, methodTokens, func(ctx context.Context, q pageQuestion[hub.Owner]) (page[hub.EnrolmentToken], error) {
		return pageOf(s.tokens(ctx, q.Filter, q.From))
	})
	bus.Handle(v.calls, methodDropTokens, func(ctx context.Context, q tokensQuestion) (some[hub.EnrolmentToken], error) {
		out, err := s.DeleteTokens(ctx, q.Owner, q.IDs)
		return answered(v, methodDropTokens, out, false, err)
	})
}

func (v *Server) keys() {
	a := v.s.a
	bus.Handle(v.calls, methodRoll, func(_ context.Context, q rollQuestion) (struct{}, error) {
		return struct{}{}, a.Roll(q.Root, q.Step, nil)
	})
	bus.Handle(v.calls, methodRetire, func(_ context.Context, id string) (struct{}, error) {
		return struct{}{}, a.Retire(id, nil)
	})
	bus.Handle(v.calls, methodRegistrar, func(context.Context, struct{}) ([]byte, error) {
		cert, err := a.registrar.Certificate()
		if err != nil {
			return nil, err
		}
		return cert.Raw, nil
	})
	bus.Handle(v.calls, methodRASign, func(_ context.Context, q raSignQuestion) ([]byte, error) {
		if _, err := a.registrar.Certificate(); err != nil { // with which the key comes
			return nil, err
		}
		return a.registrar.Sign(rand.Reader, q.Digest, q.Hash)
	})
	bus.Handle(v.calls, methodRADecrypt, func(_ context.Context, q raDecryptQuestion) ([]byte, error) {
		if _, err := a.registrar.Certificate(); err != nil {
			return nil, err
		}
		return a.registrar.Decrypt(rand.Reader, q.Message, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: q.SessionKey}) //nolint:staticcheck // SCEP has no other
	})
}

// answered is what a call has done, also beside an error, which goes to the log as internal/bus has it with others.
func answered[Q, T any](v *Server, method bus.Method[Q, some[T]], items []T, more bool, err error) (some[T], error) {
	out := some[T]{Items: items, More: more}
	if err == nil {
		return out, nil
	}
	if hub.IsKind(err, hub.Internal) {
		v.log.Error("a question was answered in part", "method", method, "error", err)
	}
	out.Failure = &failure{Kind: hub.KindOf(err).String()}
	out.Failure.Code, out.Failure.Text = hub.Public(err)
	if e := (*hub.Error)(nil); errors.As(err, &e) {
		out.Failure.RetryAfter = e.RetryAfter
	}
	return out, nil
}

// inOrder is a list as walk has it.
func inOrder[T any](list []T, from place, key func(T) string) iter.Seq2[placed[T], error] {
	return func(yield func(placed[T], error) bool) {
		first := 0
		if from.Key != "" {
			first = slices.IndexFunc(list, func(v T) bool { return key(v) == from.Key }) + 1
			if first == 0 { // it was removed meanwhile; one may be missed that was moved, and none else
				first = min(from.Step, len(list))
			}
		}
		for i, v := range list[first:] {
			if !yield(placed[T]{v, place{first + i, key(v)}, true}, nil) {
				return
			}
		}
	}
}
