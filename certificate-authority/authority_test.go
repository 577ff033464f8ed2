package certificateauthority

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

const (
	testHub = "0f2b3c4d-1111-4222-8333-444455556666"
	testDev = hub.DeviceID("aaaaaaaa-1111-4222-8333-444455556666")
)

func open(t *testing.T, dir string) *Authority {
	t.Helper()
	a, err := Open(dir, testHub)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestOpenMakesThreeSeparateRootsAndKeepsThem(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	a, b := open(t, dir), open(t, dir)
	seen := map[string]bool{}
	for _, r := range Roots() {
		first, err := a.RootPEM(r)
		if err != nil {
			t.Fatal(err)
		}
		second, err := b.RootPEM(r)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("the %s root changed when it was opened again", r)
		}
		if seen[string(first)] {
			t.Errorf("the %s root is another one's too", r)
		}
		seen[string(first)] = true
		s := a.signer(r)
		if samePublic(s.key, s.root) {
			t.Errorf("the %s root's key is its issuing key", r)
		}
		if s.root.SerialNumber.Cmp(s.issuing.SerialNumber) == 0 {
			t.Errorf("the %s root and its issuing certificate have the same serial", r)
		}
	}
	if _, err := a.RootPEM("other"); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("unknown root: %v, want NotFound", err)
	}
}

func TestFilesArePrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	open(t, dir)
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Fatalf("folder: %v %v, want 0700", info.Mode().Perm(), err)
	}
	n := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		n++
		info, err := d.Info()
		if err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o, want 600", path, info.Mode().Perm())
		}
		return err
	})
	if err != nil || n != 6 {
		t.Fatalf("%d files, %v; want 6", n, err)
	}
	file := filepath.Join(dir, "device-issuing.pem")
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testHub); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a key that others can read: %v, want an error that names the file", err)
	}
	if err := errors.Join(os.Chmod(file, 0o600), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testHub); err == nil {
		t.Error("a folder that others can read was accepted")
	}
}

func TestOpenRefusesDamage(t *testing.T) {
	read := func(t *testing.T, dir, name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(t *testing.T, dir, name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		want   string
	}{
		{"empty file", func(t *testing.T, dir string) { write(t, dir, "device-root.pem", nil) }, "device-root.pem"},
		{"cut in the middle", func(t *testing.T, dir string) {
			b := read(t, dir, "https-issuing.pem")
			write(t, dir, "https-issuing.pem", b[:len(b)-40])
		}, "https-issuing.pem"},
		{"no certificate", func(t *testing.T, dir string) {
			b := read(t, dir, "device-issuing.pem")
			write(t, dir, "device-issuing.pem", b[bytes.Index(b, []byte("-----BEGIN PRIVATE")):])
		}, "device-issuing.pem"},
		{"issuing key gone", func(t *testing.T, dir string) {
			b := read(t, dir, "device-issuing.pem")
			write(t, dir, "device-issuing.pem", b[:bytes.Index(b, []byte("-----BEGIN PRIVATE"))])
		}, "device-issuing.pem"},
		{"key of another", func(t *testing.T, dir string) {
			b, o := read(t, dir, "device-issuing.pem"), read(t, dir, "https-issuing.pem")
			key := []byte("-----BEGIN PRIVATE")
			write(t, dir, "device-issuing.pem", append(slices.Clone(b[:bytes.Index(b, key)]), o[bytes.Index(o, key):]...))
		}, "device-issuing.pem"},
		{"issuing of another root", func(t *testing.T, dir string) {
			write(t, dir, "device-issuing.pem", read(t, dir, "https-issuing.pem"))
		}, "device-issuing.pem"},
		{"root lost", func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, "internal-root.pem")); err != nil {
				t.Fatal(err)
			}
		}, "internal-root.pem"},
		{"a leaf in the root's place", func(t *testing.T, dir string) {
			id, err := open(t, dir).IssueDevice(testDev, time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			leaf := id.Chain[:bytes.Index(id.Chain, []byte("-----END CERTIFICATE-----"))+26]
			write(t, dir, "device-root.pem", append(slices.Clone(leaf), id.Key...))
		}, "device-root.pem"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "ca")
			open(t, dir)
			tc.damage(t, dir)
			if _, err := Open(dir, testHub); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error that names %s", err, tc.want)
			}
		})
	}
}

func TestOpenFinishesAStartThatWasCutShort(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	before, _ := open(t, dir).RootPEM(Device)
	if err := os.Remove(filepath.Join(dir, "device-issuing.pem")); err != nil {
		t.Fatal(err)
	}
	a := open(t, dir)
	if after, _ := a.RootPEM(Device); !bytes.Equal(before, after) {
		t.Error("the root changed")
	}
	if _, err := a.IssueDevice(testDev, time.Hour); err != nil {
		t.Error(err)
	}
}

func TestRootKeyMayBeTakenAway(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	root, _ := open(t, dir).RootPEM(Device)
	if err := os.WriteFile(filepath.Join(dir, "device-root.pem"), root, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, dir).IssueDevice(testDev, time.Hour); err != nil {
		t.Error(err)
	}
	if err := os.Remove(filepath.Join(dir, "device-issuing.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testHub); err == nil {
		t.Error("opened without any key of the device root")
	}
}

func TestOpenRefusesHubIDThatIsNoUUID(t *testing.T) {
	if _, err := Open(t.TempDir(), "my-hub"); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("got %v, want Invalid", err)
	}
}

func TestIssueDeviceProfile(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	id, err := a.IssueDevice(testDev, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(id.Chain, id.Key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := pair.Leaf
	if want, _ := a.RootPEM(Device); !bytes.Equal(id.CA, want) {
		t.Error("the CA is not the device root")
	}
	if got := leaf.Subject.String(); got != "CN=uuid:"+string(testDev) {
		t.Errorf("subject %s", got)
	}
	if want := x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement; leaf.KeyUsage != want {
		t.Errorf("key usage %b, want %b", leaf.KeyUsage, want)
	}
	if !slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}) {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	if len(leaf.UnknownExtKeyUsage) != 1 || !leaf.UnknownExtKeyUsage[0].Equal(OCFIdentity) {
		t.Errorf("other extended key usages %v, want the OCF identity one", leaf.UnknownExtKeyUsage)
	}
	if leaf.IsCA || leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() < 64 {
		t.Errorf("CA %v, serial %v", leaf.IsCA, leaf.SerialNumber)
	}
	if d := time.Until(leaf.NotAfter); d > 24*time.Hour || d < 23*time.Hour {
		t.Errorf("ends in %v, want about a day", d)
	}
	inter := x509.NewCertPool()
	inter.AddCert(a.signer(Device).issuing)
	for r, ok := range map[Root]bool{Device: true, HTTPS: false, Internal: false} {
		_, err := leaf.Verify(x509.VerifyOptions{Roots: a.Pool(r), Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if (err == nil) != ok {
			t.Errorf("verified under the %s root: %v, want %v", r, err, ok)
		}
	}
}

// Some clients send their own certificate only: the root and the device intermediates, as trust anchors, verify it, and admit
// nothing that the root alone would not.
func TestDeviceIntermediatesVerifyALeafAlone(t *testing.T) {
	a, other := open(t, filepath.Join(t.TempDir(), "ca")), open(t, filepath.Join(t.TempDir(), "ca"))
	pool := a.DevicePool()
	for _, c := range a.DeviceIntermediates() {
		if _, err := c.Verify(x509.VerifyOptions{Roots: a.DevicePool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("%s is not under the device root: %v", c.Subject, err)
		}
		if !c.IsCA || !c.MaxPathLenZero || c.MaxPathLen != 0 {
			t.Errorf("%s: CA %v, path length %d; want a CA of leaves only", c.Subject, c.IsCA, c.MaxPathLen)
		}
		pool.AddCert(c)
	}
	leaf := func(id Identity, err error) *x509.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.X509KeyPair(id.Chain, id.Key)
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf
	}
	server := func(cert tls.Certificate, err error) *x509.Certificate {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return cert.Leaf
	}
	for _, tc := range []struct {
		name string
		cert *x509.Certificate
		pool *x509.CertPool
		ok   bool
	}{
		{"a device", leaf(a.IssueDevice(testDev, time.Hour)), pool, true},
		{"a device, without the intermediates", leaf(a.IssueDevice(testDev, time.Hour)), a.DevicePool(), false},
		{"a device of another hub", leaf(other.IssueDevice(testDev, time.Hour)), pool, false},
		{"an HTTPS certificate", server(a.HTTPSCertificate([]string{"localhost"})), pool, false},
		{"the HTTPS issuing certificate", a.signer(HTTPS).issuing, pool, false},
		{"the internal issuing certificate", a.signer(Internal).issuing, pool, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := tc.cert.Verify(x509.VerifyOptions{Roots: tc.pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
			if (err == nil) != tc.ok {
				t.Errorf("verified: %v, want %v", err, tc.ok)
			}
		})
	}
}

func TestIssueDeviceRefuses(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	for _, tc := range []struct {
		name     string
		dev      hub.DeviceID
		validity time.Duration
		want     hub.Kind
	}{
		{"the hub's own ID", testHub, time.Hour, hub.Denied},
		{"the hub's own ID in capitals", hub.DeviceID(strings.ToUpper(testHub)), time.Hour, hub.Denied},
		{"no UUID", "lamp", time.Hour, hub.Invalid},
		{"empty", "", time.Hour, hub.Invalid},
		{"no validity", testDev, 0, hub.Invalid},
		{"negative validity", testDev, -time.Hour, hub.Invalid},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := a.IssueDevice(tc.dev, tc.validity); !hub.IsKind(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestValidityIsClampedToTheIssuer(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	id, err := a.IssueDevice(testDev, 100*365*24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(id.Chain, id.Key)
	if err != nil {
		t.Fatal(err)
	}
	if iss := a.signer(Device).issuing; pair.Leaf.NotAfter.After(iss.NotAfter) || pair.Leaf.NotBefore.Before(iss.NotBefore) {
		t.Errorf("valid %v to %v, issuer %v to %v", pair.Leaf.NotBefore, pair.Leaf.NotAfter, iss.NotBefore, iss.NotAfter)
	}
}

func TestNothingIsIssuedAfterTheIssuerExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, filepath.Join(t.TempDir(), "ca"))
		time.Sleep((issuingYears*365 + 10) * 24 * time.Hour) // the bubble's clock, no waiting
		if _, err := a.IssueDevice(testDev, time.Hour); !hub.IsKind(err, hub.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
	})
}

func TestHubCertificate(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	cert, err := a.HubCertificate([]string{"127.0.0.1", "::1", "hub.example"})
	if err != nil {
		t.Fatal(err)
	}
	if got := cert.Leaf.Subject.CommonName; got != "uuid:"+testHub {
		t.Errorf("common name %s", got)
	}
	if len(cert.Leaf.UnknownExtKeyUsage) != 1 || !cert.Leaf.UnknownExtKeyUsage[0].Equal(OCFIdentity) {
		t.Error("no OCF identity usage")
	}
	for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if !slices.Contains(cert.Leaf.ExtKeyUsage, use) {
			t.Errorf("extended key usage %v is missing", use)
		}
	}
	for _, host := range []string{"127.0.0.1", "::1", "hub.example"} {
		if err := cert.Leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if cert.Leaf.VerifyHostname("127.0.0.2") == nil {
		t.Error("good for a host that was not asked for")
	}
}

func TestHTTPSCertificateNeedsTheHTTPSRoot(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	cert, err := a.HTTPSCertificate([]string{"localhost"})
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(cert.Leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth) || len(cert.Leaf.UnknownExtKeyUsage) != 0 {
		t.Error("an HTTPS certificate can be used as a device's identity")
	}
	inter := x509.NewCertPool()
	inter.AddCert(a.signer(HTTPS).issuing)
	opts := x509.VerifyOptions{DNSName: "localhost", Intermediates: inter, Roots: a.Pool(HTTPS)}
	if _, err := cert.Leaf.Verify(opts); err != nil {
		t.Error(err)
	}
	opts.Roots = a.DevicePool()
	if _, err := cert.Leaf.Verify(opts); err == nil {
		t.Error("verified under the device root")
	}
	for _, hosts := range [][]string{nil, {""}, {"localhost:8080"}, {"https://localhost"}, {"a b"}} {
		if _, err := a.HTTPSCertificate(hosts); !hub.IsKind(err, hub.Invalid) {
			t.Errorf("hosts %q: %v, want Invalid", hosts, err)
		}
	}
}
