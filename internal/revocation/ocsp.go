package revocation

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"slices"
	"sync"
	"time"

	"golang.org/x/crypto/ocsp"
)

const (
	// maxAsking bounds the questions to one responder that are under way, maxWaiting those that wait.
	maxAsking, maxWaiting = 16, 1000
	// askTimeout bounds the waiting for a turn and that for an answer, so that a device has its answer before it gives up on it.
	askTimeout = 5 * time.Second
	// askPause is for how long a responder is left alone that did not answer.
	askPause = 5 * time.Second
	// unknownFor is for how long an answer holds that says that the responder knows nothing.
	unknownFor = time.Minute
	// maxAnswer bounds an answer, maxAnswers those that are remembered.
	maxAnswer, maxAnswers = 64 << 10, 100_000
)

// answers are what responders have said.
type answers struct {
	mu     sync.Mutex // guards all below
	known  map[string]said
	asked  map[string]chan struct{} // closed when somebody else has an answer, or none
	paused map[*set]time.Time       // until when a responder is left alone
}

// said is an answer: Unknown is one, too.
type said struct {
	status Status
	until  time.Time
	by     *x509.Certificate // who signed, if it was not the issuer
}

func keyOf(issuer, cert *x509.Certificate) string {
	return idOf(issuer) + string(cert.SerialNumber.Bytes())
}

// get returns an answer that has not ended.
func (a *answers) get(issuer, cert *x509.Certificate, now time.Time) (Status, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s, ok := a.known[keyOf(issuer, cert)]
	return s.status, ok && now.Before(s.until)
}

func (a *answers) put(key string, s said, now time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, there := a.known[key]; !there && len(a.known) >= maxAnswers {
		for k, old := range a.known {
			if !now.Before(old.until) {
				delete(a.known, k)
			}
		}
		for k := range a.known { // whichever: it is asked for again
			if len(a.known) < maxAnswers {
				break
			}
			delete(a.known, k)
		}
	}
	a.known[key] = s
}

// turn returns nil to who is to ask about a certificate, else what to wait for; ok is false while nobody may ask.
func (a *answers) turn(s *set, key string, now time.Time) (wait chan struct{}, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if now.Before(a.paused[s]) {
		return nil, false
	}
	if wait = a.asked[key]; wait == nil {
		a.asked[key] = make(chan struct{})
	}
	return wait, true
}

func (a *answers) done(s *set, key string, pause time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.asked[key])
	delete(a.asked, key)
	if !pause.IsZero() {
		if a.paused == nil {
			a.paused = map[*set]time.Time{}
		}
		a.paused[s] = pause
	}
}

// ask asks the set's responder about a certificate, once for all who want to know at the same time. It returns when there is an
// answer, or will be none.
func (c *Checker) ask(ctx context.Context, s *set, cert, issuer *x509.Certificate) {
	key := keyOf(issuer, cert)
	for {
		if _, ok := c.answers.get(issuer, cert, time.Now()); ok {
			return
		}
		wait, ok := c.answers.turn(s, key, time.Now())
		switch {
		case !ok:
			return
		case wait == nil:
			var pause time.Time
			err := c.question(ctx, s, key, cert, issuer)
			if r := (*refusal)(nil); err != nil && ctx.Err() == nil {
				c.metrics.failed(s, "ocsp", err)
				c.log.WarnContext(ctx, "a certificate's status cannot be had", "set", s.Name, "error", err)
				if errors.As(err, &r) && r.why == unreachable {
					pause = time.Now().Add(askPause)
				}
			}
			c.answers.done(s, key, pause)
			return
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return
		}
	}
}

// question asks, and remembers the answer.
func (c *Checker) question(ctx context.Context, s *set, key string, cert, issuer *x509.Certificate) error {
	place, again := s.asking.Enter(ctx)
	if again > 0 {
		return refused(busy, "too many certificates are asked for")
	}
	defer place.Leave()
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	der, err := ocsp.CreateRequest(cert, issuer, nil)
	if err != nil {
		return &refusal{invalid, err}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.Responder, bytes.NewReader(der))
	if err != nil {
		return refused(unreachable, "the address is no URL")
	}
	req.Header.Set("Content-Type", "application/ocsp-request")
	req.Header.Set("Accept", "application/ocsp-response")
	resp, err := c.client.Do(req)
	if err != nil {
		return unreached(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refused(unreachable, "the answer was %s", resp.Status)
	}
	b, err := limited(resp.Body, maxAnswer)
	if err != nil {
		return err
	}
	now := time.Now()
	a, err := read(b, cert, issuer, now)
	if err == nil && a.by != nil && c.issuers[idOf(issuer)] != nil && c.issuers[idOf(issuer)].status(a.by, now) == Revoked {
		err = refused(invalid, "the certificate of who signed the answer was revoked")
	}
	if err != nil {
		return err
	}
	a.by = nil // of no use any more
	c.answers.put(key, a, now)
	if a.status == Revoked {
		c.tell()
	}
	return nil
}

// read verifies an answer (RFC 6960, Section 3.2; RFC 5019, Sections 2.2 and 4).
func read(b []byte, cert, issuer *x509.Certificate, now time.Time) (said, error) {
	r, err := ocsp.ParseResponseForCert(b, cert, issuer)
	if re := (ocsp.ResponseError{}); errors.As(err, &re) {
		return said{}, refused(unreachable, "the responder says: %v", re.Status)
	}
	if err != nil {
		return said{}, &refusal{invalid, err}
	}
	// The library has verified that the issuer signed the answer, or has issued who did. Not everybody whom it has issued may:
	// devices are among them (RFC 6960, Section 4.2.2.2).
	by := r.Certificate
	if by != nil && bytes.Equal(by.RawSubjectPublicKeyInfo, issuer.RawSubjectPublicKeyInfo) {
		by = nil
	}
	if d := by; d != nil {
		switch {
		case !slices.Contains(d.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning), d.KeyUsage != 0 && d.KeyUsage&x509.KeyUsageDigitalSignature == 0:
			return said{}, refused(invalid, "the answer was signed by %s, who may not", d.Subject)
		case now.Before(d.NotBefore.Add(-skew)), now.After(d.NotAfter.Add(skew)):
			return said{}, refused(invalid, "the certificate of who signed the answer is not valid now")
		}
	}
	switch {
	case r.SignatureAlgorithm == x509.SHA1WithRSA, r.SignatureAlgorithm == x509.ECDSAWithSHA1:
		return said{}, refused(invalid, "the answer is signed with SHA-1")
	case r.NextUpdate.IsZero(): // RFC 5019, Section 4: it could be shown for ever
		return said{}, refused(invalid, "the answer does not say how long it is good")
	case now.Before(r.ThisUpdate.Add(-skew)):
		return said{}, refused(early, "the answer begins at %v", r.ThisUpdate)
	case now.After(r.NextUpdate.Add(skew)):
		return said{}, refused(late, "the answer ended at %v", r.NextUpdate)
	}
	switch r.Status {
	case ocsp.Good:
		return said{Good, r.NextUpdate.Add(skew), by}, nil
	case ocsp.Revoked:
		return said{Revoked, r.NextUpdate.Add(skew), by}, nil
	}
	return said{Unknown, now.Add(unknownFor), by}, nil
}
