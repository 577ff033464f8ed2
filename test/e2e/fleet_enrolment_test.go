package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
	"github.com/coaphub/coaphub/test/hubtest"
)

// enrollee is a device of TestFleetEnrolls.
type enrollee struct {
	id       string
	at       string // where it enrols
	ca       []byte // PEM
	hubID    string
	factory  tls.Certificate
	identity tls.Certificate // nothing before it has enrolled
	live     *device.Device
}

// enrol gets a certificate for a new key: the first with the factory's, the next with the one before.
func (e *enrollee) enrol(ctx context.Context) error {
	own, path := e.factory, "/.well-known/est/sen"
	if e.identity.Leaf != nil {
		own, path = e.identity, "/.well-known/est/sren"
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "uuid:" + e.id}}, key)
	if err != nil {
		return err
	}
	conf, err := device.TLS(e.ca, nil, nil, e.hubID)
	if err != nil {
		return err
	}
	conf.Certificates = []tls.Certificate{own}
	d, err := device.New(device.Config{ID: e.id, HubAddr: e.at, TLS: conf, Blockwise: true})
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Connect(ctx); err != nil {
		return err
	}
	for {
		ans, err := d.Do(ctx, device.Request{Code: codes.POST, Path: path, Body: csr, Format: 286, Accept: 281})
		if err == nil && ans.Code == codes.ServiceUnavailable && ans.MaxAge > 0 {
			select {
			case <-time.After(time.Duration(ans.MaxAge) * time.Second):
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil || ans.Code != codes.Changed {
			return fmt.Errorf("%s: %v, %w", path, ans, err)
		}
		bag, err := pkcs7.Parse(ans.Raw)
		if err != nil || len(bag.Certificates) != 1 {
			return fmt.Errorf("%s: %w", path, err)
		}
		leaf := bag.Certificates[0]
		if leaf.Subject.CommonName != "uuid:"+e.id || e.identity.Leaf != nil && leaf.Equal(e.identity.Leaf) {
			return fmt.Errorf("%s: got %s of %s", path, hub.SerialOf(leaf.SerialNumber), leaf.Subject)
		}
		e.identity = tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: key, Leaf: leaf}
		return nil
	}
}

// signIn has the device live with its newest certificate; issuing is what signed it. code is for the first time.
func (e *enrollee) signIn(ctx context.Context, at string, issuing []byte, code string) error {
	conf, err := device.TLS(e.ca, nil, nil, e.hubID)
	if err != nil {
		return err
	}
	own := e.identity
	own.Certificate = append(slices.Clone(own.Certificate), issuing)
	conf.Certificates = []tls.Certificate{own}
	d, err := device.New(device.Config{ID: e.id, HubAddr: at, TLS: conf})
	if err != nil {
		return err
	}
	if e.live != nil {
		d.SetCredentials(e.live.Credentials())
		e.live.Close()
	}
	e.live = d
	if err := d.Connect(ctx); err != nil {
		return err
	}
	ok := func(a device.Answer, err error) error {
		if err == nil && !a.OK() {
			err = errors.New(a.String())
		}
		return err
	}
	if code != "" {
		if err := ok(d.SignUp(ctx, code)); err != nil {
			return fmt.Errorf("sign up: %w", err)
		}
	}
	if err := ok(d.SignIn(ctx)); err != nil {
		return fmt.Errorf("sign in: %w", err)
	}
	return nil
}

// TestFleetEnrolls: 20 devices, 100 or 1000, enrol by EST over CoAP with the factory's certificates, sign in with what they got, renew
// it and sign in with that. Then the new certificates of one in ten are revoked: each of those sessions ends, and no other does.
func TestFleetEnrolls(t *testing.T) {
	t.Parallel()
	devices := dose.Of(20, 100, 1000)
	const oneIn, atOnce = 10, 16
	// The night's fleet shares the machine with all other long doses.
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(dose.Of(5, 5, 25))*time.Minute)
	defer cancel()
	h := hubtest.Start(t, hubtest.WithConfig("log.level=info"))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := tls.Certificate{PrivateKey: key}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Lamps Ltd"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Leaf, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	ca.Certificate = [][]byte{der}
	chain := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	if _, err := h.Control.SetEnrolmentGroup(ctx, bundle.EnrolmentGroup{Name: "lamps", Chain: chain}); err != nil {
		t.Fatal(err)
	}
	root, err := h.Control.Root(ctx, "device")
	if err != nil {
		t.Fatal(err)
	}
	issued, err := h.Control.Issue(ctx, deviceID(0), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	_, rest := pem.Decode([]byte(issued.Chain))
	issuing, _ := pem.Decode(rest)

	fleet := make([]*enrollee, devices)
	defer func() {
		for _, e := range fleet {
			if e != nil && e.live != nil {
				e.live.Close()
			}
		}
	}()
	each := func(what string, do func(i int, e *enrollee) error) {
		t.Helper()
		next, begin := make(chan int), time.Now()
		errs := make(chan error, devices)
		var wg sync.WaitGroup
		for range atOnce {
			wg.Go(func() {
				for i := range next {
					if err := do(i, fleet[i]); err != nil {
						errs <- fmt.Errorf("device %d: %w", i, err)
					}
				}
			})
		}
		for i := range fleet {
			next <- i
		}
		close(next)
		wg.Wait()
		close(errs)
		for err := range errs {
			t.Errorf("%s: %v", what, err)
		}
		if t.Failed() {
			t.FailNow()
		}
		t.Logf("%d devices %s in %v", devices, what, time.Since(begin).Round(time.Millisecond))
	}
	at := [][2]string{
		{h.Endpoints.Enrolment, h.Endpoints.CoAPS}, // DTLS, and TLS
		{"coaps+tcp" + h.Endpoints.Enrolment[len("coaps"):], h.Endpoints.CoAPSTCP},
	}
	each("leave the factory", func(i int, _ *enrollee) error {
		id := deviceID(i + 1)
		certs, key, err := device.Issue(ca, id)
		if err != nil {
			return err
		}
		pair, err := tls.X509KeyPair(certs, key)
		fleet[i] = &enrollee{id: id, at: at[i%2][0], ca: []byte(root), hubID: h.ID, factory: pair}
		return err
	})
	each("enrol", func(_ int, e *enrollee) error { return e.enrol(ctx) })
	each("sign up and in", func(i int, e *enrollee) error {
		on, err := h.Control.Onboard(ctx, bundle.OnboardRequest{DeviceID: e.id})
		if err != nil {
			return err
		}
		return e.signIn(ctx, at[i%2][1], issuing.Bytes, on.AuthorizationCode)
	})
	first := make([]tls.Certificate, devices)
	each("renew", func(i int, e *enrollee) error { first[i] = e.identity; return e.enrol(ctx) })
	each("sign in again", func(i int, e *enrollee) error { return e.signIn(ctx, at[i%2][1], issuing.Bytes, "") })
	st, err := h.Control.Status(ctx)
	if err != nil || st.Online != devices {
		t.Fatalf("%d of %d devices are online, %v", st.Online, devices, err)
	}

	// The certificates before the renewal end nothing: nobody stands on them any more.
	var old, stolen []string
	ended := make(map[*enrollee]bool)
	for i, e := range fleet {
		if i%oneIn == 0 {
			old = append(old, hub.SerialOf(first[i].Leaf.SerialNumber))
			stolen = append(stolen, hub.SerialOf(e.identity.Leaf.SerialNumber))
			ended[e] = true
		}
	}
	if _, err := h.Control.RevokeCertificates(ctx, bundle.CertificatesRequest{Serials: old}); err != nil {
		t.Fatal(err)
	}
	for i, e := range fleet {
		if isOver(e) {
			t.Errorf("device %d is gone, and its former certificate was revoked", i)
		}
	}
	begin := time.Now()
	var slowest time.Duration
	var mu sync.Mutex // guards slowest
	var wg sync.WaitGroup
	for e := range ended {
		wg.Go(func() {
			select {
			case <-e.live.Done():
				mu.Lock()
				defer mu.Unlock()
				slowest = max(slowest, time.Since(begin))
			case <-ctx.Done():
			}
		})
	}
	if _, err := h.Control.RevokeCertificates(ctx, bundle.CertificatesRequest{Serials: stolen}); err != nil {
		t.Fatal(err)
	}
	answered := time.Since(begin)
	wg.Wait()
	t.Logf("%d certificates were revoked in %v; the last of their sessions ended %v after the command, and %v after its answer",
		len(stolen), answered, slowest.Round(time.Millisecond), max(0, slowest-answered).Round(time.Millisecond))
	for i, e := range fleet {
		switch {
		case ended[e] && !isOver(e):
			t.Errorf("device %d is there, and its certificate was revoked", i)
		case !ended[e] && isOver(e):
			t.Errorf("device %d is gone, and its certificate was not revoked", i)
		case !ended[e]:
			if err := e.live.Ping(ctx); err != nil {
				t.Errorf("device %d: %v", i, err)
			}
		}
	}
	if !eventually(ctx, 30*time.Second, func() bool { st, err = h.Control.Status(ctx); return err == nil && st.Online == devices-len(ended) }) {
		t.Errorf("%d devices are online, %v; want %d", st.Online, err, devices-len(ended))
	}
	for e := range ended {
		if err := e.enrol(ctx); err == nil {
			t.Errorf("%s got another certificate with a revoked one", e.id)
		}
		if err := e.signIn(ctx, h.Endpoints.CoAPSTCP, issuing.Bytes, ""); err == nil {
			t.Errorf("%s is in with a revoked certificate", e.id)
		}
		break // one speaks for all
	}
}

func isOver(e *enrollee) bool {
	select {
	case <-e.live.Done():
		return true
	default:
		return false
	}
}
