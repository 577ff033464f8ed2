package certificateauthority

import (
	"context"
	"crypto/subtle"
	"encoding/base64"

	"github.com/coaphub/coaphub/hub"
)

// waiting is the request that was kept for SCEP's transaction, for the device with the same factory key that it came from.
func (s *Service) waiting(ctx context.Context, proof hub.EnrolmentProof) ([]byte, error) {
	a, err := s.byFactory(ctx, proof.Chain, "")
	if err != nil {
		return nil, err
	}
	doc, err := s.docs.Get(ctx, collEnrolments, string(a.device))
	if err != nil {
		return nil, err
	}
	if doc.Rev == 0 {
		return nil, errNotEnrolled
	}
	e, err := decodeEnrolment(doc)
	if err != nil {
		return nil, err
	}
	if e.Transaction != proof.Transaction || e.Key != a.Key {
		return nil, errNotEnrolled
	}
	csr, err := base64.StdEncoding.DecodeString(e.CSR)
	if err != nil {
		return nil, damaged("an enrolment", err)
	}
	return csr, nil
}

// renews decides whether a device may renew by SCEP, beyond having a good certificate: it must have enrolled, and a challenge that it
// shows must be the one with which it did, or a new one for it, which is used up and takes the other's place. Its turn is taken.
func (s *Service) renews(ctx context.Context, a *applicant, e *enrolment, req request, known bool) error {
	if a.challenge == "" {
		if !known {
			return errNotEnrolled
		}
		return nil
	}
	shown := "token " + tokenID(a.challenge)
	if subtle.ConstantTimeCompare([]byte(shown), []byte(e.Proof)) != 1 {
		t, err := s.byToken(ctx, a.challenge, req, a.device)
		if err != nil {
			return err
		}
		if t.device != a.device || a.Owner != "" && a.Owner != t.Owner {
			return errToken
		}
		a.Owner, a.token, a.made, a.repeats = t.Owner, t.token, t.made, t.repeats
		e.Owner, e.Group, e.By, e.Proof, e.Key, e.Type, e.User, e.Terms = t.Owner, "", t.By, t.Proof, t.Key, "", t.User, hub.Acceptance{}
	}
	a.Proof += ", " + shown
	return nil
}
