package enrolmentgateway

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/est"
	"github.com/coaphub/coaphub/internal/scep"
)

// scepPaths are where clients look for SCEP: the first is the one that they are told, the last the one that many add or expect by
// themselves (RFC 8894, Section 4.1).
var scepPaths = []string{"/scep", "/scep/pkiclient.exe", "/cgi-bin/pkiclient.exe"}

const (
	// maxOpening and openQueue bound the messages for which the registrar's key is at work, and that wait for it: whoever sends one
	// has shown nothing yet, and costs the hub some milliseconds.
	maxOpening, openQueue = 4, 1024
	openPatience          = 10 * time.Second
	// maxLists and listQueue bound the revocation lists that are encrypted, each to its client, until it has taken it, and the clients
	// that wait for one: a list may be of megabytes.
	maxLists, listQueue = 16, 256
	// scepClock is how far a client's clock may be off, if it says when it signed: a message of before that is not sent again.
	scepClock = 24 * time.Hour
)

// scepCapabilities are what clients should use (RFC 8894, Section 3.5.2). What is weaker is taken in requests, since TLS is around
// them, and not announced. SHA-384 is no word of the RFC's, but one without which strongSwan 5.9.8 does not believe in AES.
const scepCapabilities = "AES\nPOSTPKIOperation\nRenewal\nSCEPStandard\nSHA-256\nSHA-384\nSHA-512\n"

func (g *Gateway) scep(w http.ResponseWriter, r *http.Request) error {
	if g.deps.Registrar == nil {
		return errPath
	}
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		w.Header().Set("Allow", "GET, POST")
		return &hub.Error{Kind: hub.MethodNotAllowed}
	}
	switch r.URL.Query().Get("operation") {
	case "GetCACaps":
		return answerSCEP(w, "text/plain", []byte(scepCapabilities))
	case "GetCACert":
		cert, err := g.deps.Registrar.Certificate()
		if err != nil {
			return err
		}
		// RFC 8894, Section 4.2.1.2. The first is the one to encrypt to; clients find it by its usage, too.
		der, err := est.CertsOnly(append([]*x509.Certificate{cert}, g.deps.Authority.Anchors()...))
		if err != nil {
			return err
		}
		return answerSCEP(w, "application/x-x509-ca-ra-cert", der)
	case "PKIOperation":
		return g.pkiOperation(w, r)
	}
	return hub.NewError(hub.Invalid, "scep-operation-unknown", "the operation is GetCACaps, GetCACert or PKIOperation")
}

func answerSCEP(w http.ResponseWriter, mediaType string, body []byte) error {
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(body) // a client that has gone needs no answer
	return nil
}

// pkiOperation answers a message. What is the client's fault is told in a signed message; what is the hub's, and a message that
// nobody can answer, by HTTP.
func (g *Gateway) pkiOperation(w http.ResponseWriter, r *http.Request) error {
	ctx, log := r.Context(), g.log.With("remote", r.RemoteAddr)
	message, err := scepMessage(r)
	if err != nil {
		return err
	}
	req, err := scep.Parse(message)
	if req == nil {
		return hub.NewError(hub.Invalid, "scep-message-invalid", "this is no message of SCEP").With("parse", err)
	}
	cert, certErr := g.deps.Registrar.Certificate()
	if certErr != nil {
		return certErr
	}
	var out hub.Enrolled
	var list []byte
	switch {
	case err != nil:
	case !req.Signed.IsZero() && time.Since(req.Signed).Abs() > scepClock:
		err = &scep.Failure{Info: scep.BadTime, Err: errors.New("the client's clock says " + req.Signed.String())}
	case req.Type == scep.GetCRL:
		place, again := g.listing.Enter(ctx)
		if again > 0 {
			return errBusy(again)
		}
		defer place.Leave()
		list, err = g.requestedList(ctx, req, cert)
	default:
		out, err = g.requested(ctx, req, cert)
	}
	code, _ := hub.Public(err)
	info, refused := failInfoOf(err)
	var body []byte
	keyErr := g.withKey(ctx, func() (err error) {
		switch {
		case refused:
			body, err = req.Refuse(cert, g.deps.Registrar, info)
		case code == "enrolment-waiting":
			body, err = req.Pending(cert, g.deps.Registrar)
		case len(out.Chain) > 0:
			body, err = req.Success(cert, g.deps.Registrar, out.Chain[0])
		case list != nil:
			body, err = req.SuccessList(cert, g.deps.Registrar, list)
		}
		return err
	})
	switch {
	case keyErr != nil:
		return keyErr
	case body == nil:
		return err
	case err != nil:
		log.InfoContext(ctx, "a device was refused what it asked for", "path", r.URL.Path, "failInfo", string(info), "error", err)
	case list == nil:
		g.enrolled(ctx, log, out)
	}
	return answerSCEP(w, "application/x-pki-message", body)
}

// scepMessage is the message of a request: its body, or in a GET a parameter (RFC 8894, Section 4.1).
func scepMessage(r *http.Request) ([]byte, error) {
	if r.Method == http.MethodPost {
		return readAtMost(r, scep.MaxMessage) // whatever type it says it has: clients disagree
	}
	// A "+" that was not escaped came out as a space, and some clients write the other alphabet.
	text := strings.NewReplacer(" ", "+", "-", "+", "_", "/").Replace(r.URL.Query().Get("message"))
	message, err := io.ReadAll(base64.NewDecoder(base64.StdEncoding, strings.NewReader(text))) // which passes over line breaks
	if err != nil {
		return nil, hub.NewError(hub.Invalid, "scep-message-invalid", "the message is not base64").With("decode", err)
	}
	return message, nil
}

// requested has the authority decide what a client asks for.
func (g *Gateway) requested(ctx context.Context, req *scep.Request, cert *x509.Certificate) (hub.Enrolled, error) {
	proof := hub.EnrolmentProof{Chain: req.Chain, Transaction: req.Transaction}
	switch req.Type {
	case scep.CertPoll:
		// What it contains names the certificate as the client wanted it to be (RFC 8894, Section 3.3.3); the transaction tells.
		return g.deps.Authority.Enrol(ctx, proof, nil, false)
	case scep.PKCSReq, scep.RenewalReq:
	default:
		return hub.Enrolled{}, &scep.Failure{Info: scep.BadRequest, Err: errors.New("messages of type " + string(req.Type) + " are not served")}
	}
	var csr []byte
	if err := g.withKey(ctx, func() (err error) { csr, err = req.Open(cert, g.deps.Registrar); return err }); err != nil {
		return hub.Enrolled{}, err
	}
	var err error
	if proof.Token, err = scep.Challenge(csr); err != nil {
		return hub.Enrolled{}, &scep.Failure{Info: scep.BadMessageCheck, Err: err}
	}
	return g.deps.Authority.Enrol(ctx, proof, csr, req.Type == scep.RenewalReq)
}

// requestedList is the list that a client asks for (RFC 8894, Section 3.3.4). It is no secret, so whoever asks gets it.
func (g *Gateway) requestedList(ctx context.Context, req *scep.Request, cert *x509.Certificate) ([]byte, error) {
	var text []byte
	if err := g.withKey(ctx, func() (err error) { text, err = req.Open(cert, g.deps.Registrar); return err }); err != nil {
		return nil, err
	}
	issuer, serial, err := scep.IssuerAndSerial(text)
	if err != nil {
		return nil, &scep.Failure{Info: scep.BadRequest, Err: err}
	}
	return g.deps.Authority.ListOf(ctx, issuer, serial)
}

// withKey waits until the registrar's key may be used.
func (g *Gateway) withKey(ctx context.Context, use func() error) error {
	place, again := g.opening.Enter(ctx)
	if again > 0 {
		return errBusy(again)
	}
	defer place.Leave()
	return use()
}

func errBusy(again time.Duration) error {
	return &hub.Error{Kind: hub.Exhausted, Code: "enrolments-busy", Text: "too many devices enrol at this moment", RetryAfter: again}
}

// failInfoOf is what a client is told of an error (RFC 8894, Section 3.2.1.4); false if it is not the client's, or nothing is refused.
func failInfoOf(err error) (scep.FailInfo, bool) {
	var f *scep.Failure
	if errors.As(err, &f) {
		return f.Info, true
	}
	if err == nil {
		return "", false
	}
	switch code, _ := hub.Public(err); code {
	case "csr-key":
		return scep.BadAlg, true
	case "csr-signature":
		return scep.BadMessageCheck, true
	case "enrolment-unknown", "issuer-unknown":
		return scep.BadCertID, true
	}
	switch hub.KindOf(err) { //nolint:exhaustive // all others are the hub's own
	case hub.Invalid, hub.Unauthenticated, hub.Denied, hub.NotFound, hub.TooLarge, hub.Precondition:
		return scep.BadRequest, true
	}
	return "", false
}
