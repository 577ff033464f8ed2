package certificateauthority

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// rootList is a root's list as everybody gets it.
func (o *office) rootList(root *x509.Certificate) *x509.RevocationList {
	o.t.Helper()
	der, err := o.List(o.t.Context(), nameOf(root.RawSubjectPublicKeyInfo))
	if err != nil {
		o.t.Fatal(err)
	}
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		o.t.Fatal(err)
	}
	if err := l.CheckSignatureFrom(root); err != nil {
		o.t.Error(err)
	}
	return l
}

func onList(l *x509.RevocationList, c *x509.Certificate) bool {
	return slices.ContainsFunc(l.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(c.SerialNumber) == 0 })
}

// opensslVerify has OpenSSL verify a chain, each of whose certificates is looked up in the lists.
func opensslVerify(t *testing.T, openssl string, by signer, leaf *x509.Certificate) func(lists ...[]byte) string {
	t.Helper()
	dir := t.TempDir()
	return func(lists ...[]byte) string {
		t.Helper()
		var crls []byte
		for _, der := range lists {
			crls = append(crls, pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})...)
		}
		args := []string{"verify", "-x509_strict", "-purpose", "sslclient", "-crl_check_all"}
		for _, f := range []struct {
			flag string
			b    []byte
		}{{"-CRLfile", crls}, {"-CAfile", certPEM(by.root)}, {"-untrusted", certPEM(by.issuing)}, {"", certPEM(leaf)}} {
			path := filepath.Join(dir, "file"+f.flag)
			if err := os.WriteFile(path, f.b, 0o600); err != nil {
				t.Fatal(err)
			}
			if f.flag != "" {
				args = append(args, f.flag)
			}
			args = append(args, path)
		}
		out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput()
		return strings.TrimSpace(string(out)) + map[bool]string{true: "", false: " failed"}[err == nil]
	}
}

// OpenSSL takes a chain whose every certificate is looked up, and no more once the issuing one was retired. The list of that, which
// somebody else can have kept, is good for a day.
func TestRootListByOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	o := newOffice(t)
	leaf, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	by := o.a.signer(Device)
	kept, err := o.List(t.Context(), by.name)
	if err != nil {
		t.Fatal(err)
	}
	verify := opensslVerify(t, openssl, by, leaf)
	if out := verify(kept); !strings.Contains(out, "unable to get certificate CRL") {
		t.Errorf("without the root's list: %s", out)
	}
	if out := verify(kept, o.rootList(by.root).Raw); strings.Contains(out, "failed") || !strings.HasSuffix(out, ": OK") {
		t.Errorf("with both lists: %s", out)
	}
	o.roll(Device, RollIssuing)
	if out := verify(kept, o.rootList(by.root).Raw); !strings.HasSuffix(out, ": OK") {
		t.Errorf("rolled over: %s", out)
	}
	if err := o.a.Retire(by.name, nil); err != nil {
		t.Fatal(err)
	}
	if out := verify(kept, o.rootList(by.root).Raw); !strings.Contains(out, "certificate revoked") || !strings.Contains(out, "failed") {
		t.Errorf("retired: %s", out)
	}
}

// Issuing certificates lead to the list of their root where the hub has an address, and to none else.
func TestRootListIsNamed(t *testing.T) {
	for base, want := range map[string]string{"": "", "https://hub.example:8080": "https://hub.example:8080" + ListsPath} {
		a, err := OpenWith(filepath.Join(t.TempDir(), "ca"), testHub, nil, base)
		if err != nil {
			t.Fatal(err)
		}
		for _, step := range []Step{RollIssuing, RollRoot, RollFinish} {
			if err := a.Roll(Device, step, nil); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range Roots() {
			l := a.line(r)
			signed := map[*x509.Certificate]*x509.Certificate{}
			for _, s := range l.issuers {
				signed[s.issuing] = s.root
			}
			if len(l.roots) > 1 {
				signed[l.roots[1].cross] = l.roots[0].cert
			}
			for c, by := range signed {
				var points []string
				if want != "" {
					points = []string{want + nameOf(by.RawSubjectPublicKeyInfo)}
				}
				if !slices.Equal(c.CRLDistributionPoints, points) {
					t.Errorf("%s of a hub at %q leads to %q, want %q", c.Subject, base, c.CRLDistributionPoints, points)
				}
			}
		}
	}
}

// With a root's key that is brought, what is retired is on the list and stays there; with another nothing is retired.
func TestRootListOfAKeyOffline(t *testing.T) {
	o := newOffice(t)
	root, first := o.a.signer(Device).root, o.a.signer(Device)
	before := o.rootList(root)
	keys, err := o.a.RootKeys(Device)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.a.ForgetRootKeys(Device, keys); err != nil {
		t.Fatal(err)
	}
	left := o.rootList(root)
	if left.Number.Cmp(before.Number) <= 0 {
		t.Errorf("the list that the key leaves behind is %v, behind %v", left.Number, before.Number)
	}
	roll := func() signer {
		t.Helper()
		if err := o.a.Roll(Device, RollIssuing, keys); err != nil {
			t.Fatal(err)
		}
		return o.a.signer(Device)
	}
	second := roll()
	other, err := o.a.RootKeys(HTTPS)
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, "retiring with another key", o.a.Retire(first.name, other), hub.Invalid, "root-key-wrong")
	if _, ok := o.a.issuer(first.name); !ok || onList(o.rootList(root), first.issuing) {
		t.Error("it is retired all the same")
	}
	last := left
	for i, c := range []signer{first, second} {
		next := roll()
		if err := o.a.Retire(c.name, keys); err != nil {
			t.Fatal(err)
		}
		o.start(open(t, o.a.dir))
		l := o.rootList(root)
		if len(l.RevokedCertificateEntries) != i+1 || !onList(l, c.issuing) || onList(l, next.issuing) || l.Number.Cmp(last.Number) <= 0 ||
			l.RevokedCertificateEntries[0].RevocationTime.After(l.ThisUpdate) {
			t.Errorf("list %v behind %v has %v", l.Number, last.Number, l.RevokedCertificateEntries)
		}
		if i > 0 && !l.RevokedCertificateEntries[0].RevocationTime.Equal(last.RevokedCertificateEntries[0].RevocationTime) {
			t.Error("what was revoked was so at another time")
		}
		last = l
	}
	// A hub of before there were such lists has none.
	if err := os.Remove(filepath.Join(o.a.dir, "device-root.crl")); err != nil {
		t.Fatal(err)
	}
	o.start(open(t, o.a.dir))
	_, err = o.List(t.Context(), nameOf(root.RawSubjectPublicKeyInfo))
	wantCode(t, "no list", err, hub.NotFound, "root-list-missing")
	wantCode(t, "a list without the key", o.a.Roll(Device, RollList, nil), hub.Precondition, "root-key-missing")
	if err := o.a.Roll(Device, RollList, keys); err != nil {
		t.Fatal(err)
	}
	if l := o.rootList(root); !onList(l, first.issuing) || !onList(l, second.issuing) {
		t.Errorf("what was retired before is not on the first list: %v", l.RevokedCertificateEntries)
	}
	// A list that is not the root's own is never taken for it.
	if err := os.WriteFile(filepath.Join(o.a.dir, "device-root.crl"), o.rootList(o.a.signer(HTTPS).root).Raw, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(o.a.dir, testHub); err == nil || !strings.Contains(err.Error(), "device-root.crl") {
		t.Errorf("a list of another root: %v", err)
	}
}

// A stolen issuing key is worth nothing at once, where its root's key is far away, too. The list lacks it for so long, which shows, and
// has it when the key is brought: OpenSSL believes it until then and not after.
func TestRetiredWhileTheRootsKeyIsOffline(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	for name, withList := range map[string]bool{"a root with a list": true, "a root from before there were lists": false} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			leaf, err := o.sign("alice", testDev)
			if err != nil {
				t.Fatal(err)
			}
			by := o.a.signer(Device)
			kept, err := o.List(t.Context(), by.name)
			if err != nil {
				t.Fatal(err)
			}
			verify := opensslVerify(t, openssl, by, leaf)
			o.roll(Device, RollIssuing)
			keys, err := o.a.RootKeys(Device)
			if err != nil {
				t.Fatal(err)
			}
			if err := o.a.ForgetRootKeys(Device, keys); err != nil {
				t.Fatal(err)
			}
			if !withList {
				if err := os.Remove(filepath.Join(o.a.dir, "device-root.crl")); err != nil {
					t.Fatal(err)
				}
				o.start(open(t, o.a.dir))
			}
			lacking := func(when string, n int) {
				t.Helper()
				for _, p := range o.a.Parts() {
					want, list := 0, p.Kind == "root"
					if list && p.Root == Device {
						want, list = n, withList
					}
					if p.Lacks != want || p.ListUntil.IsZero() == list {
						t.Errorf("%s: the list of the %s %s lacks %d, want %d; it is good until %v", when, p.Root, p.Kind, p.Lacks, want, p.ListUntil)
					}
				}
				if due := o.a.listsDue(time.Now()); due != n {
					t.Errorf("%s: %d lists are due, want %d", when, due, n)
				}
			}
			lacking("before", 0)
			for range 2 {
				if err := o.a.Retire(by.name, nil); err != nil {
					t.Fatal(err)
				}
			}
			for _, when := range []string{"at once", "after a restart"} {
				if o.believes(leaf) || o.Vouch(t.Context(), []*x509.Certificate{leaf, by.issuing}) == nil {
					t.Errorf("%s: what the retired key has signed is believed", when)
				}
				if _, err := os.Stat(filepath.Join(o.a.dir, "device-issuing.pem")); !os.IsNotExist(err) {
					t.Errorf("%s: the key is there: %v", when, err)
				}
				lacking(when, 1)
				if err := o.a.renewLists(time.Now()); !errors.Is(err, errRootKey) || !strings.Contains(err.Error(), "coaphub ca renew-list device --root-key") {
					t.Errorf("%s: the log would have %v", when, err)
				}
				o.start(open(t, o.a.dir))
			}
			if withList {
				if out := verify(kept, o.rootList(by.root).Raw); !strings.HasSuffix(out, ": OK") {
					t.Errorf("without the entry: %s", out)
				}
			}
			if err := o.a.Roll(Device, RollList, keys); err != nil {
				t.Fatal(err)
			}
			withList = true
			lacking("with the key", 0)
			if !onList(o.rootList(by.root), by.issuing) {
				t.Error("the list still lacks it")
			}
			if out := verify(kept, o.rootList(by.root).Raw); !strings.Contains(out, "certificate revoked") || !strings.Contains(out, "failed") {
				t.Errorf("with the entry: %s", out)
			}
			// What signs now is as good as before.
			second, err := o.sign("alice", testDev)
			if err != nil {
				t.Fatal(err)
			}
			now := o.a.signer(Device)
			current, err := o.List(t.Context(), now.name)
			if err != nil {
				t.Fatal(err)
			}
			if out := opensslVerify(t, openssl, now, second)(current, o.rootList(by.root).Raw); !strings.HasSuffix(out, ": OK") {
				t.Errorf("what is signed now: %s", out)
			}
		})
	}
}

// What a list lacks comes onto it with whatever else the key is brought for.
func TestTheListFollowsWithTheKey(t *testing.T) {
	for name, bring := range map[string]func(a *Authority, keys []byte) error{
		"the next issuing key": func(a *Authority, keys []byte) error { return a.Roll(Device, RollIssuing, keys) },
		"the next root":        func(a *Authority, keys []byte) error { return a.Roll(Device, RollRoot, keys) },
		"retiring another": func(a *Authority, keys []byte) error {
			l := a.line(Device)
			return a.Retire(l.issuers[1].name, keys)
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t)
			first := o.a.signer(Device)
			o.roll(Device, RollIssuing)
			o.roll(Device, RollIssuing)
			keys, err := o.a.RootKeys(Device)
			if err != nil {
				t.Fatal(err)
			}
			if err := o.a.ForgetRootKeys(Device, keys); err != nil {
				t.Fatal(err)
			}
			if err := o.a.Retire(first.name, nil); err != nil {
				t.Fatal(err)
			}
			if o.a.listsDue(time.Now()) != 1 {
				t.Error("the list is not due")
			}
			if err := bring(o.a, keys); err != nil {
				t.Fatal(err)
			}
			if !onList(o.rootList(first.root), first.issuing) || o.a.listsDue(time.Now()) != 0 {
				t.Error("the list lacks it")
			}
		})
	}
}

// A root that is retired before it was used is not believed by the one before it either, and one that is retired after it was has
// all that it has issued on its last list.
func TestRootListOfRoots(t *testing.T) {
	o := newOffice(t)
	o.roll(Device, RollRoot)
	l := o.a.line(Device)
	if err := o.a.Retire(l.roots[1].name, nil); err != nil {
		t.Fatal(err)
	}
	if !onList(o.rootList(l.roots[0].cert), l.roots[1].cross) {
		t.Error("the first root goes on to believe the second")
	}
	o.roll(Device, RollRoot)
	o.roll(Device, RollFinish)
	if err := o.a.Retire(l.roots[0].name, nil); err != nil {
		t.Fatal(err)
	}
	if !onList(o.rootList(l.roots[0].cert), l.issuers[0].issuing) || len(o.rootList(o.a.signer(Device).root).RevokedCertificateEntries) != 0 {
		t.Error("the lists are not what was retired")
	}
}

// A list is renewed a month before it ends while the root's key is there; else the log says that it should be.
func TestRootListIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		var log bytes.Buffer
		o.log = slog.New(slog.NewTextHandler(&log, nil))
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = o.Run(ctx, func() {}) })
		defer running.Wait()
		defer cancel()
		root := o.a.signer(Device).root
		wait := func(d time.Duration) {
			<-time.After(d)
			synctest.Wait()
		}
		first := o.rootList(root)
		wait(rootListValid - rootListRenew - 2*time.Hour)
		if l := o.rootList(root); l.Number.Cmp(first.Number) != 0 {
			t.Error("it is renewed early")
		}
		wait(4 * time.Hour)
		second := o.rootList(root)
		if second.Number.Cmp(first.Number) <= 0 || time.Until(second.NextUpdate) < rootListValid-5*time.Hour {
			t.Errorf("list %v, until %v", second.Number, second.NextUpdate)
		}
		keys, err := o.a.RootKeys(Device)
		if err != nil {
			t.Fatal(err)
		}
		if err := o.a.ForgetRootKeys(Device, keys); err != nil {
			t.Fatal(err)
		}
		if log.Len() > 0 {
			t.Errorf("the log has %s", &log)
		}
		wait(rootListValid - rootListRenew + 2*time.Hour)
		if got := log.String(); !strings.Contains(got, "revocation list cannot be renewed") || !strings.Contains(got, "the device root") || !strings.Contains(got, "--root-key") {
			t.Errorf("the log has %q", got)
		}
	})
}
