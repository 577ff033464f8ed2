package certificateauthority

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/test/dose"
)

// slow is a store that answers nobody until it is opened.
type slow struct {
	store.Documents
	opened chan struct{}
}

func (s slow) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	<-s.opened
	return s.Documents.Get(ctx, collection, key)
}

// 300 devices at once, 1 000 or 10 000, and a store that is slow: as many as there is room for wait, all others are told at once when
// to come again, and do. Each has its certificate then, and the ledger has those that were handed out.
func TestManyEnrolAtOnce(t *testing.T) {
	const lords = 10 // each of whom may have 1000 IDs that have not signed up
	devices := dose.Of(300, 1000, 10_000)
	docs, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1, Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := docs.Close(); err != nil {
			t.Error(err)
		}
	}()
	gate := slow{docs, make(chan struct{})}
	s, err := NewService(t.Context(), open(t, filepath.Join(t.TempDir(), "ca")), gate, owners{}, "", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	places, room := maxEnrolling, enrolQueue
	if !dose.Night() { // so that there are more devices than room
		places, room = 8, devices/3
		s.enrolling = admission.NewQueue(places, room, time.Minute)
	}
	factories := make([]*factory, lords)
	for i := range factories {
		factories[i] = newFactory(t)
		g := hub.EnrolmentGroup{Name: fmt.Sprint(i), Owner: hub.Owner(fmt.Sprint("owner", i)), Chain: string(certPEM(factories[i].root))}
		if _, err := s.SetGroup(t.Context(), g); err != nil {
			t.Fatal(err)
		}
	}
	type device struct {
		leaf *x509.Certificate
		csr  []byte
	}
	all := make([]device, devices)
	var making sync.WaitGroup
	for worker := range runtime.NumCPU() {
		making.Go(func() {
			for i := worker; i < devices; i += runtime.NumCPU() {
				f := factories[i%lords]
				all[i] = device{f.device(fmt.Sprintf("serial %d", i), nil), csrOf(t, newKey(t), x509.CertificateRequest{Subject: pkix.Name{CommonName: "x"}})}
			}
		})
	}
	making.Wait()

	type answer struct {
		i   int
		out hub.Enrolled
		err error
	}
	answers := make(chan answer, devices)
	for i, d := range all {
		go func() { // ends with its answer
			out, err := s.Enrol(context.Background(), shown(d.leaf), d.csr, false)
			answers <- answer{i, out, err}
		}()
	}
	serials, known := map[string]hub.DeviceID{}, map[hub.DeviceID]bool{}
	var again []int
	take := func(a answer) {
		var e *hub.Error
		switch {
		case a.err == nil:
			serials[a.out.Serial], known[a.out.Device] = a.out.Device, true
		case errors.As(a.err, &e) && e.Code == "enrolments-busy" && e.RetryAfter > 0:
			again = append(again, a.i)
		default:
			t.Fatalf("device %d: %v", a.i, a.err)
		}
	}
	for range devices - places - room { // nobody has been served
		take(<-answers)
	}
	if len(again) != devices-places-room {
		t.Errorf("%d were sent away, want %d", len(again), devices-places-room)
	}
	close(gate.opened)
	for range places + room {
		take(<-answers)
	}
	for len(again) > 0 {
		next := again[:min(places, len(again))]
		again = again[len(next):]
		for _, i := range next {
			go func() {
				out, err := s.Enrol(context.Background(), shown(all[i].leaf), all[i].csr, false)
				answers <- answer{i, out, err}
			}()
		}
		for range next {
			take(<-answers)
		}
	}
	if len(serials) != devices || len(known) != devices {
		t.Errorf("%d certificates of %d devices were handed out, want %d", len(serials), len(known), devices)
	}
	n := 0
	for c, err := range s.Certificates(t.Context(), hub.CertificateFilter{All: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; serials[c.Serial] != c.Device {
			t.Errorf("the ledger has %s of %s, which nobody got", c.Serial, c.Device)
		}
	}
	if n != devices {
		t.Errorf("the ledger has %d certificates, want %d", n, devices)
	}
}
