package certificateauthority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// town has several authorities with the same keys on the same documents, and a bus.
type town struct {
	t    *testing.T
	dir  string
	docs store.Documents
	own  owners
	url  string
}

func newTown(t *testing.T) *town {
	t.Helper()
	return &town{t: t, dir: filepath.Join(t.TempDir(), "ca"), docs: storetest.NewMemory(), own: owners{}, url: bustest.Server(t, nil).ClientURL()}
}

// overStores runs a test over the store of one machine, too, whose documents are read as they were at one moment.
func overStores(t *testing.T, test func(t *testing.T, w *town)) {
	t.Run("memory", func(t *testing.T) { test(t, newTown(t)) })
	t.Run("pebble", func(t *testing.T) {
		docs, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1, Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := docs.Close(); err != nil {
				t.Error(err)
			}
		})
		w := newTown(t)
		w.docs = docs
		test(t, w)
	})
}

// office opens another authority.
func (w *town) office() *office {
	w.t.Helper()
	o := &office{t: w.t, own: w.own}
	var err error
	o.Service, err = NewService(w.t.Context(), open(w.t, w.dir), w.docs, w.own, "https://hub.example:8080", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		w.t.Fatal(err)
	}
	if err := o.Secret(make([]byte, 32)); err != nil {
		w.t.Fatal(err)
	}
	o.wake = func() {} // it is not alone
	return o
}

func (w *town) bus() *bus.Bus {
	w.t.Helper()
	b, err := bus.Connect(bus.Config{URLs: []string{w.url}}, testHub, "v1", w.t.Name(), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(b.Close)
	return b
}

// background runs a part until stop, or the end of the test.
func (w *town) background(run func(context.Context, func()) error) (stop func()) {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, over := make(chan struct{}), make(chan error, 1)
	go func() { over <- run(ctx, func() { close(ready) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-over; err != nil {
			w.t.Errorf("a part ends with %v", err)
		}
	})
	w.t.Cleanup(stop)
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		w.t.Fatal("a part does not come up")
	}
	return stop
}

// serve puts an authority on the bus.
func (w *town) serve(o *office) (stop func()) {
	w.t.Helper()
	v := NewServer(w.bus(), o.Service, []string{"hub.example"}, slog.New(slog.DiscardHandler))
	service, server := w.background(o.Run), w.background(v.Run)
	return func() { server(); service() }
}

// client makes one that follows.
func (w *town) client() *Client {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 20*time.Second)
	defer cancel()
	c, err := NewClient(ctx, w.bus(), slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	w.background(c.Run)
	return c
}

// until waits for something.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); <-time.After(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("in vain: %s", what)
		}
	}
}

func leafOf(t *testing.T, chain []byte) *x509.Certificate {
	t.Helper()
	c, err := parsePEM(string(chain))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func all[T any](t *testing.T, in iter.Seq2[T, error]) (out []T) {
	t.Helper()
	for v, err := range in {
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, v)
	}
	return out
}

func same(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: %+v over the bus, %+v without", what, got, want)
	}
}

// What a part asks of an authority over the bus, it gets as if that were its own.
func TestBusIsNoDifference(t *testing.T) {
	w := newTown(t)
	o := w.office()
	w.serve(o)
	c := w.client()
	ctx := t.Context()
	w.own[testDev], w.own[otherDev] = "alice", "bob"
	f := newFactory(t)

	chain, err := c.Sign(ctx, "alice", "ann", csrOf(t, newKey(t), named("uuid:"+string(testDev))))
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf(t, chain)
	_, err = c.Sign(ctx, "alice", "ann", csrOf(t, newKey(t), named("uuid:"+string(otherDev))))
	wantCode(t, "sign for another's", err, hub.Denied, "device-owned-by-other")
	_, err = c.Sign(ctx, "alice", "ann", []byte("no request"))
	wantCode(t, "sign nonsense", err, hub.Invalid, "csr-invalid")
	_, err = c.Sign(ctx, "alice", "ann", make([]byte, maxRequest+1))
	wantCode(t, "sign too much", err, hub.TooLarge, "csr-too-large")
	if chain, err = c.SignClient(ctx, "alice", "ann", csrOf(t, newKey(t), named("x"))); err != nil || leafOf(t, chain).Subject.CommonName != "owner:alice" {
		t.Errorf("a client's: %v", err)
	}
	if chain, err = c.SignService(ctx, "alice", "ann", []string{"lamp.example"}, csrOf(t, newKey(t), named("x"))); err != nil || leafOf(t, chain).DNSNames[0] != "lamp.example" {
		t.Errorf("a service's: %v", err)
	}
	_, err = c.SignService(ctx, "alice", "ann", nil, nil)
	wantCode(t, "a service without hosts", err, hub.Invalid, "hosts-missing")

	for what, filter := range map[string]hub.CertificateFilter{
		"all": {All: true}, "alice's": {Owner: "alice"}, "none": {}, "one": {All: true, Serials: []string{hub.SerialOf(leaf.SerialNumber), "00"}},
		"a device's": {Owner: "alice", Devices: []hub.DeviceID{testDev, otherDev}},
	} {
		got, want := all(t, c.Certificates(ctx, filter)), o.list(filter)
		same(t, what+" certificates", got, want)
	}
	report, err := c.Report(ctx, "alice", time.Hour)
	want, _ := o.Report(ctx, "alice", time.Hour)
	if err != nil {
		t.Error(err)
	}
	same(t, "report", report, want)

	list, err := c.List(ctx, c.Issuer())
	wantList, _ := o.List(ctx, o.Issuer())
	if err != nil || !bytes.Equal(list, wantList) {
		t.Errorf("the list: %v", err)
	}
	_, err = c.List(ctx, "nobody")
	wantCode(t, "another's list", err, hub.NotFound, "issuer-unknown")
	if list, err = c.ListOf(ctx, leaf.RawIssuer, leaf.SerialNumber); err != nil || !bytes.Equal(list, wantList) {
		t.Errorf("the list of a certificate: %v", err)
	}
	same(t, "status of nonsense", c.Status(ctx, []byte("x")), o.Status(ctx, []byte("x")))

	g, err := c.SetGroup(ctx, hub.EnrolmentGroup{
		Name: "lamps", Owner: "alice", Chain: string(certPEM(f.root)), PSK: "0123456789abcdef", User: "ann", Terms: hub.Terms{Version: "2"}, Approval: true,
	})
	if err != nil || g.PSK != "" || !g.HasPSK {
		t.Fatalf("group: %+v, %v", g, err)
	}
	_, err = c.SetGroup(ctx, hub.EnrolmentGroup{Owner: "bob", Chain: string(certPEM(f.root))})
	wantCode(t, "a group of the same CA", err, hub.Precondition, "group-ca-taken")
	_, err = c.AcceptTerms(ctx, "alice", g.ID, "3", "ann")
	wantCode(t, "other terms", err, hub.Precondition, "terms-version")
	if g, err = c.AcceptTerms(ctx, "alice", g.ID, "2", "ann"); err != nil || g.Accepted.User != "ann" {
		t.Errorf("terms: %+v, %v", g.Accepted, err)
	}
	gs, err := c.Groups(ctx, "")
	wantGroups, _ := o.Groups(ctx, "")
	if err != nil {
		t.Error(err)
	}
	same(t, "groups", gs, wantGroups)

	lamp := f.device("lamp", nil)
	lampChain := []*x509.Certificate{lamp}
	if err := c.Vouch(ctx, lampChain); err != nil {
		t.Errorf("vouch: %v", err)
	}
	wantCode(t, "vouch for a stranger", c.Vouch(ctx, []*x509.Certificate{newFactory(t).device("x", nil)}), hub.Unauthenticated, "enrolment-unproven")
	applicant, err := c.Applicant(ctx, lampChain)
	wantApplicant, _ := o.Applicant(ctx, lampChain)
	if err != nil || applicant.PSK != "0123456789abcdef" {
		t.Errorf("applicant: %+v, %v", applicant, err)
	}
	same(t, "applicant", applicant, wantApplicant)
	dev := applicant.Device
	_, err = c.Admit(ctx, lampChain, dev)
	wantCode(t, "admit", err, hub.Unavailable, "enrolment-waiting")
	if e := (*hub.Error)(nil); !errors.As(err, &e) || e.RetryAfter != askAgain {
		t.Errorf("admit: again after %v", e.RetryAfter)
	}
	filter := hub.EnrolmentFilter{Owner: "alice"}
	same(t, "enrolments", all(t, c.Enrolments(ctx, filter)), all(t, o.Enrolments(ctx, filter)))
	decided, err := c.Decide(ctx, "alice", []hub.DeviceID{dev, otherDev}, true, "ann")
	wantCode(t, "decide on an unknown one", err, hub.NotFound, "enrolment-unknown")
	if len(decided) != 1 || decided[0].Device != dev {
		t.Errorf("decided before that: %+v", decided)
	}
	if _, err := c.Admit(ctx, lampChain, dev); err != nil {
		t.Errorf("admit: %v", err)
	}
	step := hub.Provisioned{Step: hub.StepCloud, Device: dev, Cloud: hub.Cloud{Provider: "p", Token: "secret", Gateways: []string{"coaps://x"}}}
	if err := c.Provisioned(ctx, lampChain, applicant, step); err != nil {
		t.Errorf("provisioned: %v", err)
	}
	records := hub.ProvisioningFilter{Owner: "alice"}
	same(t, "records", all(t, c.ProvisioningRecords(ctx, records)), all(t, o.ProvisioningRecords(ctx, records)))
	if ids, err := c.DeleteProvisioningRecords(ctx, records); err != nil || len(ids) != 1 {
		t.Errorf("delete records: %v, %v", ids, err)
	}
	if es, err := c.Forget(ctx, filter); err != nil || len(es) != 1 {
		t.Errorf("forget: %v, %v", es, err)
	}
	if gs, err := c.DeleteGroups(ctx, []string{g.ID, "other"}); err != nil || len(gs) != 1 {
		t.Errorf("delete groups: %v, %v", gs, err)
	}

	text, token, err := c.NewToken(ctx, "alice", "", time.Hour, "ann")
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = c.NewToken(ctx, "alice", otherDev, time.Hour, "ann")
	wantCode(t, "a token for another's device", err, hub.Denied, "device-owned-by-other")
	tokens, err := c.Tokens(ctx, "alice")
	if err != nil {
		t.Error(err)
	}
	same(t, "tokens", tokens, []hub.EnrolmentToken{token})
	out, err := c.Enrol(ctx, hub.EnrolmentProof{Token: text}, csrOf(t, newKey(t), named("x")), false)
	if err != nil || out.Serial != hub.SerialOf(out.Chain[0].SerialNumber) {
		t.Errorf("enrol: %v", err)
	}
	_, err = c.Enrol(ctx, hub.EnrolmentProof{Token: text + "\xff"}, csrOf(t, newKey(t), named("x")), false)
	wantCode(t, "a token that is no text", err, hub.Unauthenticated, "token-unknown")
	if ts, err := c.DeleteTokens(ctx, "alice", []string{token.ID}); err != nil || len(ts) != 1 {
		t.Errorf("delete tokens: %v, %v", ts, err)
	}

	if gone, err := c.HandOver(ctx, out.Device, "bob", ""); err != nil || len(gone) != 1 || !c.Revoked(out.Chain[0]) {
		t.Errorf("hand over: %v, %v", gone, err)
	}
	gone, err := c.Revoke(ctx, hub.CertificateFilter{Owner: "alice", Serials: []string{hub.SerialOf(leaf.SerialNumber)}}, hub.RevokedKeyCompromise)
	if err != nil || len(gone) != 1 || gone[0].Reason != hub.RevokedKeyCompromise || !c.Revoked(leaf) || !o.Revoked(leaf) {
		t.Errorf("revoke: %v, %v", gone, err)
	}

	for _, r := range Roots() {
		got, _ := c.RootPEM(r)
		want, _ := o.a.RootPEM(r)
		if !bytes.Equal(got, want) || !c.Pool(r).Equal(o.a.Pool(r)) {
			t.Errorf("the %s root is another one", r)
		}
	}
	_, err = c.RootPEM("other")
	wantCode(t, "another root", err, hub.NotFound, "root-unknown")
	same(t, "anchors", dersOf(c.Anchors()), dersOf(o.Anchors()))
	same(t, "device roots", dersOf(c.DeviceRoots()), dersOf(o.a.DeviceRoots()))
	same(t, "intermediates", dersOf(c.DeviceIntermediates()), dersOf(o.a.DeviceIntermediates()))
	same(t, "parts", c.Parts(), o.a.Parts())
	at, ours := c.RenewAt(leaf)
	wantAt, _ := o.RenewAt(leaf)
	if !ours || !at.Equal(wantAt) || !c.Signs(Device, leaf) || c.Signs(HTTPS, leaf) {
		t.Errorf("renew at %v, want %v", at, wantAt)
	}
	if _, ours := c.RenewAt(lamp); ours {
		t.Error("it renews those of others")
	}
	wantCode(t, "roll with a key", c.Roll(Device, RollFinish, []byte("key")), hub.Unsupported, "root-key-stays")
	wantCode(t, "finish nothing", c.Roll(Device, RollFinish, nil), hub.Precondition, "roll-not-begun")
	wantCode(t, "retire nothing", c.Retire("x", nil), hub.NotFound, "issuer-unknown")
}

// Lists of any length come through whole, page by page.
func TestBusPages(t *testing.T) {
	w := newTown(t)
	o := w.office()
	w.serve(o)
	c := w.client()
	const n = 2*maxItems + 7
	for i := range n {
		e := entry{Owner: "alice", Device: testDev, Name: "uuid:" + string(testDev), How: hub.ByCSR, PEM: fmt.Sprint(i), NotAfter: time.Now().Add(time.Hour).UTC()}
		if i%2 == 1 {
			e.Device = otherDev
		}
		doc, err := e.doc(fmt.Sprintf("%032x", i+1), 0)
		if err == nil {
			_, err = w.docs.Put(t.Context(), collCertificates, doc)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for what, f := range map[string]hub.CertificateFilter{
		"all": {All: true}, "alice's": {Owner: "alice"}, "by device": {All: true, Devices: []hub.DeviceID{otherDev, testDev}},
	} {
		if got := all(t, c.Certificates(t.Context(), f)); len(got) != n {
			t.Errorf("%s: %d of %d", what, len(got), n)
		} else {
			same(t, what, got, o.list(f))
		}
	}
	some := 0
	for range c.Certificates(t.Context(), hub.CertificateFilter{All: true}) {
		if some++; some == maxItems+1 {
			break
		}
	}
	// More than one call revokes at a time.
	out, err := c.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice"}, 0)
	if err != nil || len(out) != n {
		t.Errorf("revoked %d of %d, %v", len(out), n, err)
	}
	if again, err := c.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice"}, 0); err != nil || len(again) > 0 {
		t.Errorf("again: %d, %v", len(again), err)
	}
	if late := w.client(); len(late.revoked) != n {
		t.Errorf("a new client knows %d of %d", len(late.revoked), n)
	}
}

// What one authority revokes, the clients of another refuse within a second, and end.
func TestBusRevocationByAnother(t *testing.T) {
	w := newTown(t)
	first, second := w.office(), w.office()
	w.serve(second) // alone on the bus
	c := w.client()
	ended := make(chan string, 10)
	c.Ended(func(serial string) { ended <- serial })
	leaf, err := first.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if c.Revoked(leaf) || second.Revoked(leaf) {
		t.Error("it is revoked already")
	}
	serial := hub.SerialOf(leaf.SerialNumber)
	if _, err := first.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-ended:
		if got != serial || !c.Revoked(leaf) || !second.Revoked(leaf) {
			t.Errorf("ended %s, want %s; revoked %t and %t", got, serial, c.Revoked(leaf), second.Revoked(leaf))
		}
	case <-time.After(20 * time.Second):
		t.Fatal("nobody was told")
	}
	if late := w.client(); !late.Revoked(leaf) {
		t.Error("one that comes later does not know")
	}
	if len(ended) > 0 {
		t.Errorf("told of %s, too", <-ended)
	}
	// And the list of the other has it, with a status that says so.
	der, err := second.List(t.Context(), second.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	if l, err := x509.ParseRevocationList(der); err != nil || len(l.RevokedCertificateEntries) != 1 {
		t.Errorf("the list: %v, %v", l, err)
	}
}

// None is missed when several authorities revoke at the same time, also by a client for which changes were removed too early.
func TestBusMissesNone(t *testing.T) { overStores(t, missesNone) }

func missesNone(t *testing.T, w *town) {
	t.Helper()
	offices := []*office{w.office(), w.office(), w.office()}
	for _, o := range offices[:2] {
		w.serve(o)
	}
	c := w.client()
	var told atomic.Int64
	c.Ended(func(string) { told.Add(1) })
	const each = 40
	var group sync.WaitGroup
	for i, o := range offices {
		group.Go(func() {
			for j := range each {
				serial := fmt.Sprintf("%032x", i*1000+j+1)
				if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil {
					t.Error(err)
				}
				if i == 0 && j == each/2 { // whoever is behind has to read everything
					for doc := range w.docs.Range(t.Context(), collChanges, "", changeKey(5)) {
						_ = w.docs.Delete(t.Context(), collChanges, doc.Key, doc.Rev)
					}
				}
			}
		})
	}
	group.Wait()
	until(t, "all are known", func() bool { return told.Load() >= int64(each*len(offices)) })
	if n := told.Load(); n != int64(each*len(offices)) {
		t.Errorf("told %d times", n)
	}
	for _, o := range offices {
		if err := o.follow(t.Context()); err != nil || len(o.revoked) != each*len(offices) {
			t.Errorf("an authority knows %d, %v", len(o.revoked), err)
		}
	}
	if n, _, err := offices[0].newest(t.Context()); err != nil || n != uint64(each*len(offices))+1 {
		t.Errorf("%d changes, %v", n, err)
	}
}

// A client that is behind what is still there reads everything anew, and so does one for which the numbers went back.
func TestBusBehind(t *testing.T) {
	w := newTown(t)
	o := w.office()
	v := NewServer(w.bus(), o.Service, nil, slog.New(slog.DiscardHandler))
	w.background(v.Run)
	c, err := NewClient(t.Context(), w.bus(), slog.New(slog.DiscardHandler)) // does not follow
	if err != nil {
		t.Fatal(err)
	}
	var told []string
	c.Ended(func(serial string) { told = append(told, serial) })
	revoke := func(serial string) {
		t.Helper()
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(last bool) {
		for doc := range w.docs.Range(t.Context(), collChanges, "", "") {
			if last || doc.Key != changeKey(o.at) {
				_ = w.docs.Delete(t.Context(), collChanges, doc.Key, doc.Rev)
			}
		}
	}
	look := func(want ...string) {
		t.Helper()
		if err := c.catchUp(t.Context()); err != nil || !slices.Equal(told, want) || len(c.revoked) != len(want) {
			t.Errorf("told %q of %q, knows %d, %v", told, want, len(c.revoked), err)
		}
	}
	revoke("01")
	look("01")
	revoke("02")
	revoke("03")
	remove(false)
	if err := c.catchUp(t.Context()); err != nil || len(told) != 3 {
		t.Errorf("told %q, %v", told, err)
	}
	remove(true) // as after another backup was restored
	revoke("04")
	if err := c.catchUp(t.Context()); err != nil || len(told) != 4 || told[3] != "04" {
		t.Errorf("told %q, %v", told, err)
	}
}

// Whoever stored a revocation and died before he told of it is told for by others, and what the ledger forgets is forgotten.
func TestReconcile(t *testing.T) {
	w := newTown(t)
	first, second := w.office(), w.office()
	e := entry{NotAfter: time.Now().Add(time.Hour), Revoked: time.Now()}
	doc, err := e.doc("0a", 0)
	if err == nil {
		doc.Rev, err = w.docs.Put(t.Context(), collCertificates, doc)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := first.reconcile(t.Context()); err != nil || !first.isRevoked("0a") {
		t.Errorf("%v, known %t", err, first.isRevoked("0a"))
	}
	if err := second.follow(t.Context()); err != nil || !second.isRevoked("0a") {
		t.Errorf("the other: %v, known %t", err, second.isRevoked("0a"))
	}
	if err := w.docs.Delete(t.Context(), collCertificates, "0a", doc.Rev); err != nil {
		t.Fatal(err)
	}
	if err := second.reconcile(t.Context()); err != nil || second.isRevoked("0a") {
		t.Errorf("after it was removed: %v, known %t", err, second.isRevoked("0a"))
	}
}

// The number of a revocation list never goes back, whichever of several authorities is asked, and what is revoked is on the next one.
func TestListNumbersOfTwo(t *testing.T) { overStores(t, numbersNeverGoBack) }

func numbersNeverGoBack(t *testing.T, w *town) {
	t.Helper()
	offices := []*office{w.office(), w.office()}
	issuer := offices[0].Issuer()
	var last *x509.RevocationList
	for i := range 6 {
		serial := fmt.Sprintf("%02x", i+1)
		by, other := offices[i%2], offices[(i+1)%2]
		if _, err := by.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil {
			t.Fatal(err)
		}
		for _, o := range []*office{by, other, by, other, by} {
			if err := o.follow(t.Context()); err != nil {
				t.Fatal(err)
			}
			der, err := o.List(t.Context(), issuer)
			if err != nil {
				t.Fatal(err)
			}
			l, err := x509.ParseRevocationList(der)
			if err != nil {
				t.Fatal(err)
			}
			if len(l.RevokedCertificateEntries) != i+1 || last != nil && l.Number.Cmp(last.Number) < 0 {
				t.Fatalf("%d: a list of %d, number %v after %v", i, len(l.RevokedCertificateEntries), l.Number, last.Number)
			}
			last = l
		}
	}
	// Many ask both while both revoke.
	var group sync.WaitGroup
	var mu sync.Mutex
	high := new(big.Int)
	for i := range 8 {
		o := offices[i%2]
		group.Go(func() {
			for j := range 10 {
				if i < 2 {
					serial := fmt.Sprintf("%032x", i*100+j+1000)
					if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil {
						t.Error(err)
					}
				}
				mu.Lock()
				before := new(big.Int).Set(high)
				mu.Unlock()
				der, err := o.List(t.Context(), issuer)
				if err != nil {
					t.Error(err)
					continue
				}
				l, err := x509.ParseRevocationList(der)
				if err != nil {
					t.Error(err)
					continue
				}
				if l.Number.Cmp(before) < 0 {
					t.Errorf("number %v after %v", l.Number, before)
				}
				mu.Lock()
				if l.Number.Cmp(high) > 0 {
					high.Set(l.Number)
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	parts := 0
	for range w.docs.Range(t.Context(), collListParts, "", "") {
		parts++
	}
	if parts != 1 {
		t.Errorf("%d parts of lists are left, of one list", parts)
	}
}

// While no authority can be reached new things are refused as something that will pass, and what is known goes on for ten seconds.
func TestBusAway(t *testing.T) {
	w := newTown(t)
	o := w.office()
	stop := w.serve(o)
	c := w.client()
	leaf, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(gone.SerialNumber)}}, 0); err != nil {
		t.Fatal(err)
	}
	stop()
	for what, ask := range map[string]func() error{
		"enrol": func() error {
			_, err := c.Enrol(t.Context(), shown(leaf), csrOf(t, newKey(t), named("uuid:"+string(testDev))), true)
			return err
		},
		"vouch": func() error { return c.Vouch(t.Context(), []*x509.Certificate{leaf}) },
		"sign":  func() error { _, err := c.Sign(t.Context(), "alice", "", nil); return err },
		"certificates": func() error {
			for _, err := range c.Certificates(t.Context(), hub.CertificateFilter{All: true}) {
				return err
			}
			return nil
		},
		"revoke": func() error { _, err := c.Revoke(t.Context(), hub.CertificateFilter{All: true}, 0); return err },
		"hub":    func() error { _, err := c.HubCertificate([]string{"hub.example"}); return err },
		"roll":   func() error { return c.Roll(Device, RollIssuing, nil) },
	} {
		wantCode(t, what, ask(), hub.Unavailable, "part-away")
	}
	if st := c.Status(t.Context(), nil); !bytes.Equal(st.DER, failed(tryLater).DER) {
		t.Errorf("status: %x", st.DER)
	}
	if err := c.Behind(); err != nil {
		t.Errorf("at once: %v", err)
	}
	c.mu.Lock()
	c.heard = c.heard.Add(-maxSilence)
	c.mu.Unlock()
	err = c.Behind()
	wantCode(t, "after ten seconds", err, hub.Unavailable, "revocations-behind")
	if c.Revoked(leaf) || !c.Revoked(gone) || len(c.DeviceIntermediates()) != 1 {
		t.Errorf("the replica: revoked %t and %t", c.Revoked(leaf), c.Revoked(gone))
	}
	w.serve(w.office())
	until(t, "it is heard again", func() bool { return c.Behind() == nil })
	if _, err := c.Enrol(t.Context(), shown(leaf), csrOf(t, newKey(t), named("uuid:"+string(testDev))), true); err != nil {
		t.Errorf("a renewal then: %v", err)
	}
}

// An authority whose store is away is none that was heard.
func TestBusStoreAway(t *testing.T) {
	w := newTown(t)
	docs := storetest.NewMemory()
	w.docs = docs
	w.serve(w.office())
	c := w.client()
	docs.Mu.Lock()
	docs.Fail = func(string, string, string) error { return &hub.Error{Kind: hub.Unavailable} }
	docs.Mu.Unlock()
	if err := c.catchUp(t.Context()); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("it follows: %v", err)
	}
}

// tap has all that goes over the bus.
func (w *town) tap() func() []byte {
	w.t.Helper()
	nc, err := nats.Connect(w.url)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	var mu sync.Mutex
	var seen []byte
	if _, err = nc.Subscribe(">", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, m.Data...)
	}); err == nil {
		err = nc.Flush()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return func() []byte {
		_ = nc.Flush()
		mu.Lock()
		defer mu.Unlock()
		return bytes.Clone(seen)
	}
}

// What a part shows as the hub has a key that never leaves it, is for the hub's hosts only, in the ledger, and good to who asks.
func TestBusKeysStay(t *testing.T) {
	w := newTown(t)
	o := w.office()
	w.serve(o)
	tap := w.tap()
	c := w.client()
	cert, err := c.HubCertificate([]string{"hub.example", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	plain, err := o.HubCertificate([]string{"hub.example", "127.0.0.1"})
	if err != nil {
		t.Fatal(err)
	}
	a, b := cert.Leaf, plain.Leaf
	if a.Subject.CommonName != b.Subject.CommonName || a.KeyUsage != b.KeyUsage || !slices.Equal(a.DNSNames, b.DNSNames) || len(a.IPAddresses) != 1 ||
		!reflect.DeepEqual(a.ExtKeyUsage, b.ExtKeyUsage) || !reflect.DeepEqual(a.UnknownExtKeyUsage, b.UnknownExtKeyUsage) || len(cert.Certificate) != 2 {
		t.Errorf("%+v is not as %+v", a, b)
	}
	https, err := c.HTTPSCertificate([]string{"hub.example"})
	if err != nil {
		t.Fatal(err)
	}
	between := x509.NewCertPool()
	issuing, err := x509.ParseCertificate(https.Certificate[1])
	if err != nil {
		t.Fatal(err)
	}
	between.AddCert(issuing)
	if _, err := https.Leaf.Verify(x509.VerifyOptions{Roots: c.Pool(HTTPS), Intermediates: between, DNSName: "hub.example"}); err != nil {
		t.Error(err)
	}
	_, err = c.HTTPSCertificate(nil)
	wantCode(t, "no hosts", err, hub.Invalid, "hosts-missing")
	for _, host := range []string{"bank.example", "*.hub.example", "hub.example."} {
		_, err = c.HubCertificate([]string{"hub.example", host})
		wantCode(t, host, err, hub.Denied, "host-not-of-hub")
	}
	_, err = called(methodIssueHub, c, hubQuestion{Internal, []string{"hub.example"}, csrOf(t, newKey(t), named("x"))})
	wantCode(t, "another root", err, hub.NotFound, "root-unknown")

	for _, shows := range []tls.Certificate{cert, https} {
		in := o.list(hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(shows.Leaf.SerialNumber)}})
		if len(in) != 1 || in[0].Profile != hub.ForHub {
			t.Errorf("the ledger: %+v", in)
		}
		st, err := c.Staple(&shows)
		if err != nil || len(st.DER) < 100 || st.Until.IsZero() {
			t.Errorf("staple: %v", err)
		}
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(cert.Leaf.SerialNumber)}}, 0); err != nil {
		t.Fatal(err)
	}
	_, err = c.Staple(&cert)
	wantCode(t, "a revoked one", err, hub.NotFound, "issuer-unknown")

	id, err := c.IssueDevice(t.Context(), testDev, time.Hour, "alice", "root")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(id.Key)
	deviceKey, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	leaf := leafOf(t, id.Chain)
	if !samePublic(deviceKey.(crypto.Signer), leaf) || leaf.Subject.CommonName != "uuid:"+string(testDev) || len(id.CA) == 0 {
		t.Errorf("%v", leaf.Subject)
	}
	if in := o.list(hub.CertificateFilter{All: true, Devices: []hub.DeviceID{testDev}}); len(in) != 1 || in[0].How != hub.ByOperator {
		t.Errorf("the ledger: %+v", in)
	}
	_, err = c.IssueDevice(t.Context(), testHub, time.Hour, "", "root")
	wantCode(t, "for the hub's ID", err, hub.Denied, "device-id-of-hub")

	ra := c.Registrar()
	raCert, err := ra.Certificate()
	if err != nil {
		t.Fatal(err)
	}
	public, ok := ra.Public().(*rsa.PublicKey)
	if !ok || !public.Equal(raCert.PublicKey) {
		t.Fatalf("the registrar's key is %T", ra.Public())
	}
	secret := []byte("0123456789abcdef")
	sealed, err := rsa.EncryptPKCS1v15(rand.Reader, public, secret) //nolint:staticcheck // SCEP has no other
	if err != nil {
		t.Fatal(err)
	}
	opened, err := ra.Decrypt(rand.Reader, sealed, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: 16}) //nolint:staticcheck // SCEP has no other
	if err != nil || !bytes.Equal(opened, secret) {
		t.Errorf("decrypted %q, %v", opened, err)
	}
	sum := sha256.Sum256(secret)
	signature, err := ra.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil || rsa.VerifyPKCS1v15(public, crypto.SHA256, sum[:], signature) != nil {
		t.Errorf("signed: %v", err)
	}

	seen := tap()
	if !bytes.Contains(seen, cert.Leaf.Raw) {
		t.Error("nothing was heard on the bus")
	}
	keys := [][]byte{o.a.registrar.private().D.Bytes(), o.a.registrar.private().Primes[0].Bytes(), block.Bytes}
	for _, key := range []any{cert.PrivateKey, https.PrivateKey, deviceKey, o.a.signer(Device).key} {
		raw, err := key.(*ecdsa.PrivateKey).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, raw)
	}
	for i, key := range keys {
		if bytes.Contains(seen, key) {
			t.Errorf("private key %d went over the bus", i)
		}
	}
}

// acting does something before an operation on documents.
type acting struct {
	store.Documents
	before, after func(op, collection, key string)
}

func (a *acting) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	if a.before != nil {
		a.before("put", collection, doc.Key)
	}
	rev, err := a.Documents.Put(ctx, collection, doc)
	if a.after != nil {
		a.after("put", collection, doc.Key)
	}
	return rev, err
}

// A device whose answer is lost asks again, of another authority, and gets what it would have got; there is no certificate besides.
func TestBusEnrolAgain(t *testing.T) {
	w := newTown(t)
	docs := &acting{Documents: w.docs}
	w.docs = docs
	first, second := w.office(), w.office()
	f := newFactory(t)
	stop := w.serve(first)
	c := w.client()
	if _, err := c.SetGroup(t.Context(), hub.EnrolmentGroup{Name: "lamps", Owner: "alice", Chain: string(certPEM(f.root))}); err != nil {
		t.Fatal(err)
	}
	lamp, csr := f.device("lamp", nil), csrOf(t, newKey(t), named("x"))
	ctx, cancel := context.WithCancel(t.Context())
	docs.after = func(_, collection, _ string) {
		if collection == collCertificates { // it is in the ledger, and nobody waits any more
			cancel()
		}
	}
	if _, err := c.Enrol(ctx, shown(lamp), csr, false); !hub.IsKind(err, hub.Unavailable) {
		t.Fatalf("the answer came: %v", err)
	}
	stop() // finishes what it has
	docs.after = nil
	in := first.list(hub.CertificateFilter{All: true})
	if len(in) != 1 {
		t.Fatalf("%d certificates", len(in))
	}
	w.serve(second)
	out, err := c.Enrol(t.Context(), shown(lamp), csr, false)
	if err != nil || out.Serial != in[0].Serial || string(certPEM(out.Chain[0])) != in[0].PEM {
		t.Errorf("again: %s, %v, want %s", out.Serial, err, in[0].Serial)
	}
	if in := second.list(hub.CertificateFilter{All: true}); len(in) != 1 {
		t.Errorf("then there are %d certificates", len(in))
	}
	// The same of a renewal.
	renewal := csrOf(t, newKey(t), named("uuid:"+string(out.Device)))
	one, err := c.Enrol(t.Context(), shown(out.Chain[0]), renewal, true)
	if err != nil {
		t.Fatal(err)
	}
	if two, err := c.Enrol(t.Context(), shown(out.Chain[0]), renewal, true); err != nil || two.Serial != one.Serial {
		t.Errorf("a renewal again: %s, %v, want %s", two.Serial, err, one.Serial)
	}
}

// Of two factory keys that say the same ID at two authorities at the same moment, one stands for it, and the other is still free to say
// another.
func TestTwoClaimOneID(t *testing.T) {
	w := newTown(t)
	docs := &acting{Documents: w.docs}
	w.docs = docs
	first, second := w.office(), w.office()
	f := newFactory(t)
	first.group(f, func(g *hub.EnrolmentGroup) { g.Named = true })
	lamp, other := f.device("lamp", nil), f.device("other", nil)
	name := "uuid:" + string(testDev)
	var otherErr error
	docs.before = func(_, collection, key string) {
		if collection == collFactoryKeys || collection == collEnrolments && key == string(testDev) {
			docs.before = nil
			_, otherErr = second.enrol(shown(other), name)
		}
	}
	_, err := first.enrol(shown(lamp), name)
	docs.before = nil
	if (err == nil) == (otherErr == nil) {
		t.Errorf("one got %v, the other %v", err, otherErr)
	}
	keys := 0
	for range w.docs.Range(t.Context(), collFactoryKeys, "", "") {
		keys++
	}
	if live := first.list(hub.CertificateFilter{All: true, Devices: []hub.DeviceID{testDev}}); keys != 1 || len(live) != 1 {
		t.Errorf("%d keys stand for the ID, with %d certificates", keys, len(live))
	}
	_, again := first.enrol(shown(lamp), name)
	wantCode(t, "the one that was late", again, hub.Denied, "enrolment-device-taken")
	if out, err := first.enrol(shown(lamp), "uuid:"+string(otherDev)); err != nil || out.Device != otherDev {
		t.Errorf("with another ID: %s, %v", out.Device, err)
	}
}

// Of two groups that are made of one CA at two authorities at the same moment not both stay, and what one authority changes of groups
// counts at the other.
func TestTwoMakeGroups(t *testing.T) {
	w := newTown(t)
	docs := &acting{Documents: w.docs}
	w.docs = docs
	first, second := w.office(), w.office()
	f := newFactory(t)
	var otherErr error
	docs.before = func(_, collection, _ string) {
		if collection == collGroups {
			docs.before = nil
			_, otherErr = second.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "bob", Chain: string(certPEM(f.root))})
		}
	}
	_, err := first.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "alice", Chain: string(certPEM(f.root))})
	docs.before = nil
	wantCode(t, "the one that was late", err, hub.Precondition, "group-ca-taken")
	gs, err := first.Groups(t.Context(), "")
	if otherErr != nil || err != nil || len(gs) != 1 || gs[0].Owner != "bob" {
		t.Fatalf("%+v; %v, %v", gs, err, otherErr)
	}
	// A change that was refused so leaves what was there.
	g := gs[0]
	g.Name, g.Allow = "lamps", []hub.DeviceID{testDev}
	if g, err = second.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	docs.before = func(_, collection, _ string) {
		if collection == collGroups {
			docs.before = nil
			_, otherErr = second.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "alice", Chain: string(certPEM(f.root)), Allow: []hub.DeviceID{otherDev}})
		}
	}
	open := g
	open.Name, open.Allow = "all", nil
	_, err = first.SetGroup(t.Context(), open)
	docs.before = nil
	wantCode(t, "the change that was late", err, hub.Precondition, "group-ca-taken")
	gs, err = second.Groups(t.Context(), "bob")
	if otherErr != nil || err != nil || len(gs) != 1 || gs[0].Name != "lamps" || len(gs[0].Allow) != 1 {
		t.Errorf("%+v; %v, %v", gs, err, otherErr)
	}

	if err := first.follow(t.Context()); err != nil {
		t.Fatal(err)
	}
	lamp := f.device("uuid:"+string(testDev), nil)
	if err := first.Vouch(t.Context(), []*x509.Certificate{lamp}); err != nil {
		t.Fatal(err)
	}
	if _, err := second.DeleteGroups(t.Context(), []string{g.ID}); err != nil {
		t.Fatal(err)
	}
	if err := first.follow(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = first.enrol(shown(lamp), "x")
	wantCode(t, "a group that the other removed", err, hub.Denied, "enrolment-not-allowed")
	// Who hears nothing of others for long believes nothing that he remembers.
	if _, err := second.DeleteGroups(t.Context(), func() (ids []string) {
		gs, _ := second.Groups(t.Context(), "")
		for _, g := range gs {
			ids = append(ids, g.ID)
		}
		return ids
	}()); err != nil {
		t.Fatal(err)
	}
	first.mu.Lock()
	first.heard = first.heard.Add(-maxSilence)
	first.mu.Unlock()
	_, err = first.enrol(shown(lamp), "x")
	wantCode(t, "without having heard of it", err, hub.Unauthenticated, "enrolment-unproven")
}

// Many enrol at two authorities at once with the same one-time token, or for the same device: all that they got is in the ledger, and of
// a token there is one certificate.
func TestTwoEnrolAtOnce(t *testing.T) { overStores(t, enrolAtOnce) }

func enrolAtOnce(t *testing.T, w *town) {
	t.Helper()
	offices := []*office{w.office(), w.office()}
	f := newFactory(t)
	offices[0].group(f, nil)
	text, _, err := offices[0].NewToken(t.Context(), "alice", "", 0, "ann")
	if err != nil {
		t.Fatal(err)
	}
	lamp := f.device("lamp", nil)
	var mu sync.Mutex
	var serials []string
	byToken := map[string]bool{}
	var group sync.WaitGroup
	for i := range 16 {
		o := offices[i%2]
		group.Go(func() {
			out, err := o.enrol(hub.EnrolmentProof{Token: text}, "x")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				byToken[out.Serial] = true
				serials = append(serials, out.Serial)
			}
		})
		group.Go(func() {
			out, err := o.enrol(shown(lamp), "x")
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				serials = append(serials, out.Serial)
			}
		})
	}
	group.Wait()
	if len(byToken) != 1 || len(serials) < 2 {
		t.Errorf("%d certificates of the token, %d in all", len(byToken), len(serials))
	}
	for _, serial := range serials {
		if in := offices[0].list(hub.CertificateFilter{All: true, Serials: []string{serial}}); len(in) != 1 {
			t.Errorf("%s is not in the ledger", serial)
		}
	}
}

// When one authority is rolled over, others with the same files and all who follow them go along, and what is retired lets nobody in.
func TestBusRollOver(t *testing.T) {
	w := newTown(t)
	first, second := w.office(), w.office()
	w.serve(first)
	c := w.client()
	var changed atomic.Int64
	c.Changed(func() { changed.Add(1) })
	old := c.Issuer()
	leaf, err := second.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Roll(Device, RollIssuing, nil); err != nil {
		t.Fatal(err)
	}
	if c.Issuer() == old || c.Issuer() != first.Issuer() || changed.Load() == 0 || len(c.DeviceIntermediates()) != 2 {
		t.Errorf("%s issues, %s did, %s at the authority", c.Issuer(), old, first.Issuer())
	}
	if err := second.follow(t.Context()); err != nil || second.Issuer() != c.Issuer() {
		t.Errorf("the other: %v, %s issues", err, second.Issuer())
	}
	wantCode(t, "what signs now", c.Retire(c.Issuer(), nil), hub.Precondition, "issuer-in-use")
	if c.Revoked(leaf) {
		t.Error("it is revoked already")
	}
	if err := c.Retire(old, nil); err != nil {
		t.Fatal(err)
	}
	if !c.Revoked(leaf) || len(c.DeviceIntermediates()) != 1 {
		t.Errorf("revoked %t, with %d that issue", c.Revoked(leaf), len(c.DeviceIntermediates()))
	}
	if err := second.follow(t.Context()); err != nil || !second.Revoked(leaf) {
		t.Errorf("the other: %v, revoked %t", err, second.Revoked(leaf))
	}
	// Who does it where the keys are does it for all.
	if err := first.a.Roll(HTTPS, RollRoot, nil); err != nil {
		t.Fatal(err)
	}
	until(t, "the client believes the new root", func() bool { return c.Pool(HTTPS).Equal(first.a.Pool(HTTPS)) })
	if err := second.follow(t.Context()); err != nil || !second.a.Pool(HTTPS).Equal(first.a.Pool(HTTPS)) {
		t.Errorf("the other does not believe it: %v", err)
	}
}

// An authority with older files than another one takes nothing back, and one of another hub is not heard.
func TestBusOlderFiles(t *testing.T) {
	w := newTown(t)
	newer := w.office()
	older := filepath.Join(t.TempDir(), "older")
	if err := os.CopyFS(older, os.DirFS(w.dir)); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(older, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if err := os.Chmod(f, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(older, 0o700); err != nil {
		t.Fatal(err)
	}
	leaf, err := newer.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	stop := w.serve(newer)
	c, err := NewClient(t.Context(), w.bus(), slog.New(slog.DiscardHandler)) // does not follow by itself
	if err != nil {
		t.Fatal(err)
	}
	old := c.Issuer()
	if err := errors.Join(c.Roll(Device, RollIssuing, nil), c.Retire(old, nil)); err != nil || !c.Revoked(leaf) {
		t.Fatalf("%v, revoked %t", err, c.Revoked(leaf))
	}
	stop()
	issuer := c.Issuer()
	w.dir = older
	stop = w.serve(w.office())
	if err := c.catchUp(t.Context()); err != nil || !c.Revoked(leaf) || c.Issuer() != issuer {
		t.Errorf("%v, revoked %t, %s issues, want %s", err, c.Revoked(leaf), c.Issuer(), issuer)
	}
	stop()
	w.dir = filepath.Join(t.TempDir(), "other")
	w.serve(w.office())
	if err := c.catchUp(t.Context()); err == nil || c.Issuer() != issuer {
		t.Errorf("another hub's: %v", err)
	}
}

// An authority whose folder is gone, or is another hub's, goes on with what it has.
func TestReloadKeeps(t *testing.T) {
	w := newTown(t)
	o := w.office()
	issuer := o.Issuer()
	o.a.dir = filepath.Join(t.TempDir(), "empty")
	if err := makeDir(o.a.dir); err != nil {
		t.Fatal(err)
	}
	if err := o.a.reload(); err == nil || o.Issuer() != issuer {
		t.Errorf("an empty folder: %v", err)
	}
	o.a.dir = filepath.Join(t.TempDir(), "other")
	open(t, o.a.dir)
	if err := o.a.reload(); err == nil || o.Issuer() != issuer {
		t.Errorf("another's folder: %v", err)
	}
}

// Of two that make their keys in one folder at the same time, or roll it over, none replaces what the other has made.
func TestOneFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	authorities := make([]*Authority, 8)
	var group sync.WaitGroup
	for i := range authorities {
		group.Go(func() {
			var err error
			if authorities[i], err = Open(dir, testHub); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	last := open(t, dir)
	for _, a := range authorities {
		for _, r := range Roots() {
			if a.signer(r).name != last.signer(r).name {
				t.Errorf("one has another %s key", r)
			}
		}
	}
	for i, a := range authorities[:3] { // none of which knows of the others
		if err := a.Roll(Device, RollIssuing, nil); err != nil || len(a.line(Device).issuers) != 2+i {
			t.Errorf("roll %d: %v, %d that issue", i, err, len(a.line(Device).issuers))
		}
	}
}

// Two that make the registrar's key in one folder at the same time have the same one.
func TestOneRegistrar(t *testing.T) {
	w := newTown(t)
	offices := []*office{w.office(), w.office()}
	var group sync.WaitGroup
	for _, o := range offices {
		group.Go(func() {
			if _, err := o.a.Registrar().Certificate(); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if a, b := offices[0].a.registrar, offices[1].a.registrar; !a.private().Equal(b.private()) {
		t.Error("they have two keys")
	}
}

// A Client has what a Service and an Authority have, so that either can be handed out, but for what is of their own process.
func TestClientHasTheSameMethods(t *testing.T) {
	here := map[string]string{"Secret": "a key that does not travel", "Factories": "a checker in the authority's process"}
	client := reflect.TypeFor[*Client]()
	for _, other := range []reflect.Type{reflect.TypeFor[*Service](), reflect.TypeFor[*Authority]()} {
		for want := range other.Methods() {
			got, has := client.MethodByName(want.Name)
			if here[want.Name] != "" || other == reflect.TypeFor[*Authority]() && want.Name == "IssueDevice" { // a Service's has the ledger
				continue
			}
			signature := func(m reflect.Method) string {
				var out []string
				for i := range m.Type.NumIn() - 1 {
					out = append(out, m.Type.In(i+1).String())
				}
				for i := range m.Type.NumOut() {
					out = append(out, "returns "+m.Type.Out(i).String())
				}
				return fmt.Sprint(out)
			}
			if !has || signature(got) != signature(want) {
				t.Errorf("%v has %s%s, a Client does not", other, want.Name, signature(want))
			}
		}
	}
}
