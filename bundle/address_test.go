package bundle

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ocsp"
	"golang.org/x/sys/unix"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestLoopback(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]bool{
		"127.0.0.1:80": true, "[::1]:80": true, "localhost:80": true, "127.9.9.9:1": true,
		"0.0.0.0:80": false, "[::]:80": false, ":80": false, "192.0.2.1:80": false, "example.org:80": false, "nonsense": false,
	} {
		if got := loopback(address); got != want {
			t.Errorf("loopback(%q) = %v", address, got)
		}
	}
}

func TestReach(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ address, external, want string }{
		{"127.0.0.1:80", "192.0.2.7", "127.0.0.1:80"},
		{"[::]:5684", "192.0.2.7", "192.0.2.7:5684"},
		{"0.0.0.0:5684", "2001:db8::1", "[2001:db8::1]:5684"},
		{"[::]:5684", "hub.example", "hub.example:5684"},
		{"[::ffff:192.0.2.3]:1", "x", "192.0.2.3:1"},
		{"strange", "x", "strange"},
	} {
		if got := reach(c.address, c.external); got != c.want {
			t.Errorf("reach(%q, %q) = %q, want %q", c.address, c.external, got, c.want)
		}
	}
	if got := externalHost("hub.example"); got != "hub.example" {
		t.Errorf("what is configured becomes %q", got)
	}
	if ip := net.ParseIP(externalHost("")); ip == nil {
		t.Errorf("%q is no address", externalHost(""))
	}
}

func TestATakenPortNamesFlagAndKey(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	_, err = listen(t.Context(), taken.Addr().String(), "--http-address", "grpcGateway.api.http.address")
	if code(err) != "address-in-use" {
		t.Errorf("err = %v", err)
	}
	for _, part := range []string{"--http-address", "grpcGateway.api.http.address", taken.Addr().String()} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v does not name %s", err, part)
		}
	}
	if _, err := listen(t.Context(), "192.0.2.1:1", "--x", "x"); code(err) != "address-unusable" {
		t.Errorf("an address of another machine: %v", err)
	}
	other := errors.New("something else")
	if err := listenError(other, "", "", ""); !errors.Is(err, other) || code(err) != "" {
		t.Errorf("another error becomes %v", err)
	}
}

// elsewhere is a listener that claims to be reachable by others.
type elsewhere struct{ net.Listener }

func (elsewhere) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

// stapled wants an answer beside the certificate that says that it is good (RFC 6066, Section 8).
func stapled(t *testing.T, state tls.ConnectionState) {
	t.Helper()
	certs := state.PeerCertificates
	if r, err := ocsp.ParseResponseForCert(state.OCSPResponse, certs[0], certs[1]); err != nil || r.Status != ocsp.Good || time.Until(r.NextUpdate) < 20*time.Minute {
		t.Errorf("the answer beside the certificate: %v, %+v", err, r)
	}
}

// serviceOf keeps the ledger of an authority in memory.
func serviceOf(t *testing.T, a *certificateauthority.Authority) *certificateauthority.Service {
	t.Helper()
	s, err := certificateauthority.NewService(t.Context(), a, storetest.NewMemory(), nil, "", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestTLSBeyondLoopback(t *testing.T) {
	t.Parallel()
	const id = "3a8f7a1c-95a1-4a5e-9f0e-3f9f9d7c1b11"
	authority, err := certificateauthority.Open(filepath.Join(t.TempDir(), "keys"), id)
	if err != nil {
		t.Fatal(err)
	}
	a := &assembly{authority: authority, certificates: serviceOf(t, authority), external: "hub.example", log: slog.New(slog.DiscardHandler)}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	if plain, err := a.secure(ln); err != nil || plain != ln {
		t.Errorf("loopback is not plain: %v", err)
	}
	secure, err := a.secure(elsewhere{ln})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() {
		c, err := secure.Accept()
		if err == nil {
			err = errors.Join(c.(*tls.Conn).HandshakeContext(t.Context()), c.Close())
		}
		served <- err
	}()
	c, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{RootCAs: authority.Pool(certificateauthority.HTTPS), ServerName: "hub.example", MinVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatalf("handshake with the HTTPS root: %v", err)
	}
	stapled(t, c.ConnectionState())
	_ = c.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if u := a.url("[::]:8080", false); u != "https://hub.example:8080" {
		t.Errorf("url = %q", u)
	}
	if u := a.url("127.0.0.1:8080", true); u != "https://127.0.0.1:8080" {
		t.Errorf("with TLS: %q", u)
	}
	if u := a.url("127.0.0.1:8080", false); u != "http://127.0.0.1:8080" {
		t.Errorf("url = %q", u)
	}
}

// The answer beside the hub's certificate never ends while it is shown.
func TestTheHubsCertificateIsKnownToBeGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority, err := certificateauthority.Open(filepath.Join(t.TempDir(), "keys"), "3a8f7a1c-95a1-4a5e-9f0e-3f9f9d7c1b11")
		if err != nil {
			t.Fatal(err)
		}
		a := &assembly{authority: authority, certificates: serviceOf(t, authority), external: "192.0.2.9", cfg: Default(), log: slog.New(slog.DiscardHandler)}
		get, err := a.hubCertificate()
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			cert, err := get()
			if err != nil {
				t.Fatal(err)
			}
			stapled(t, tls.ConnectionState{OCSPResponse: cert.OCSPStaple, PeerCertificates: append([]*x509.Certificate{cert.Leaf}, authority.DeviceIntermediates()...)})
			<-time.After(7 * time.Minute)
		}
	})
}

// slowAuthority is one whose answers wait for the test.
type slowAuthority struct {
	certificates
	asked  chan struct{}
	answer chan error
}

func (s *slowAuthority) HubCertificate(hosts []string) (tls.Certificate, error) {
	s.asked <- struct{}{}
	if err := <-s.answer; err != nil {
		return tls.Certificate{}, err
	}
	return s.certificates.HubCertificate(hosts)
}

// While the authority makes the certificate anew, one handshake waits for it, and the others show the last one; while it cannot, none
// waits but once a minute.
func TestHandshakesDoNotWaitForTheAuthority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		keys, err := certificateauthority.Open(filepath.Join(t.TempDir(), "keys"), "3a8f7a1c-95a1-4a5e-9f0e-3f9f9d7c1b11")
		if err != nil {
			t.Fatal(err)
		}
		slow := &slowAuthority{certificates: serviceOf(t, keys), asked: make(chan struct{}, 1), answer: make(chan error, 1)}
		a := &assembly{authority: keys, certificates: slow, external: "192.0.2.9", cfg: Default(), log: slog.New(slog.DiscardHandler)}
		slow.answer <- nil
		get, err := a.hubCertificate()
		if err != nil {
			t.Fatal(err)
		}
		<-slow.asked
		first, err := get()
		if err != nil {
			t.Fatal(err)
		}
		same := func(what string, want *tls.Certificate) {
			t.Helper()
			if got, err := get(); err != nil || got.Leaf != want.Leaf {
				t.Errorf("%s: another certificate, %v", what, err)
			}
		}
		first.Leaf.NotAfter = time.Now().Add(renewBefore - time.Hour) // as if it neared its end
		type got struct {
			cert *tls.Certificate
			err  error
		}
		ask := func() <-chan got {
			out := make(chan got, 1)
			go func() { cert, err := get(); out <- got{cert, err} }()
			<-slow.asked
			return out
		}
		one := ask()
		same("while it is made anew", first)
		slow.answer <- errors.New("away")
		if g := <-one; g.err != nil || g.cert.Leaf != first.Leaf {
			t.Errorf("without an authority: %v", g.err)
		}
		same("a moment later", first)
		<-time.After(askAgain)
		one = ask()
		slow.answer <- nil
		second := <-one
		if second.err != nil || second.cert.Leaf == first.Leaf {
			t.Errorf("it is not made anew: %v", second.err)
		}
		same("made anew", second.cert)

		second.cert.Leaf.NotAfter = time.Now() // as if it were over: there is nothing to show
		one = ask()
		two := make(chan got, 1)
		go func() { cert, err := get(); two <- got{cert, err} }()
		synctest.Wait()
		if len(two) > 0 {
			t.Error("a certificate is shown that is over")
		}
		slow.answer <- nil
		if a, b := <-one, <-two; a.err != nil || b.err != nil || a.cert != b.cert {
			t.Errorf("who waited: %v, %v", a.err, b.err)
		}
	})
}

func TestHistoryTakesATenthOfTheDisk(t *testing.T) {
	t.Parallel()
	a := &assembly{folder: &Folder{Path: t.TempDir()}}
	var disk unix.Statfs_t
	if err := unix.Statfs(a.folder.Path, &disk); err != nil {
		t.Fatal(err)
	}
	if got, want := a.directoryConfig().History.MaxBytes, int64(disk.Blocks)*int64(disk.Bsize)/10; got != want || got == 0 {
		t.Errorf("at most %d bytes, want %d", got, want)
	}
	if got := (&assembly{folder: a.folder, store: &mongostore.Store{}}).directoryConfig().History.MaxBytes; got != 0 {
		t.Errorf("a database elsewhere may take %d bytes by the size of the disk here", got)
	}
	a.cfg.ResourceDirectory.History.MaxBytes = 4711
	if got := a.directoryConfig().History.MaxBytes; got != 4711 {
		t.Errorf("what is configured became %d", got)
	}
}

func TestTheHubsCertificateIsRenewedBeforeItEnds(t *testing.T) {
	authority, err := certificateauthority.Open(filepath.Join(t.TempDir(), "keys"), "3a8f7a1c-95a1-4a5e-9f0e-3f9f9d7c1b11")
	if err != nil {
		t.Fatal(err)
	}
	cfg := Default()
	cfg.CoAPGateway.API.CoAP.ExternalAddress = "nat.example:5684"
	a := &assembly{authority: authority, certificates: serviceOf(t, authority), external: "192.0.2.9", cfg: cfg, log: slog.New(slog.DiscardHandler)}
	get, err := a.hubCertificate()
	if err != nil {
		t.Fatal(err)
	}
	first, err := get()
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"192.0.2.9", "127.0.0.1", "localhost", "nat.example"} {
		if err := first.Leaf.VerifyHostname(host); err != nil {
			t.Errorf("not for %s: %v", host, err)
		}
	}
	if second, err := get(); err != nil || second != first {
		t.Errorf("made anew without need: %v", err)
	}
	first.Leaf.NotAfter = first.Leaf.NotBefore.Add(1) // as if it were over
	if third, err := get(); err != nil || third == first {
		t.Errorf("not renewed: %v", err)
	}
}
