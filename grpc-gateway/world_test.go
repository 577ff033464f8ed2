package grpcgateway

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The devices of the tests: of alice lamp A (online, batch), lamp B (offline), one that only signed up, one without /oic/d;
// one of bob.
const (
	lampA    hub.DeviceID = "d0000000-0000-4000-8000-0000000000a1"
	lampB    hub.DeviceID = "d0000000-0000-4000-8000-0000000000b2"
	fresh    hub.DeviceID = "d0000000-0000-4000-8000-0000000000c3"
	nameless hub.DeviceID = "d0000000-0000-4000-8000-0000000000d4"
	bobs     hub.DeviceID = "d0000000-0000-4000-8000-0000000000e5"
	unknown  hub.DeviceID = "d0000000-0000-4000-8000-0000000000ff"
	hubID                 = "b0000000-0000-4000-8000-000000000001"
	alice    hub.Owner    = "alice"
	bob      hub.Owner    = "bob"
)

type fakeDirectory struct {
	changes   func(hub.DeviceID) uint64 // nil: everything changes all the time
	asked     atomic.Uint64
	setLabels func(context.Context, hub.Owner, hub.DeviceID, hub.LabelChange, string) (hub.Labels, error)
	devices   func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error]
	deviceAt  func(context.Context, hub.Owner, hub.DeviceID, time.Time) (*hub.Device, error)
	history   func(context.Context, hub.Owner, hub.DeviceID, time.Time) iter.Seq2[hub.Commit, error]
	*fakeFeed
	command func(context.Context, hub.Owner, hub.Order) (hub.Outcome, error)
	cancel  func(context.Context, hub.Owner, hub.DeviceID, hub.CommandPick) ([]string, error)
}

func (f *fakeDirectory) Command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
	return f.command(ctx, owner, o)
}

func (f *fakeDirectory) CancelCommands(ctx context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, _, _ string) ([]string, error) {
	return f.cancel(ctx, owner, dev, pick)
}

func (f *fakeDirectory) Devices(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return f.devices(ctx, o, ids)
}

func (f *fakeDirectory) DeviceAt(ctx context.Context, o hub.Owner, d hub.DeviceID, t time.Time) (*hub.Device, error) {
	return f.deviceAt(ctx, o, d, t)
}

func (f *fakeDirectory) History(ctx context.Context, o hub.Owner, d hub.DeviceID, after time.Time) iter.Seq2[hub.Commit, error] {
	return f.history(ctx, o, d, after)
}

func (f *fakeDirectory) Changes(d hub.DeviceID) uint64 {
	if f.changes != nil {
		return f.changes(d)
	}
	return f.asked.Add(1)
}

func (f *fakeDirectory) SetLabels(ctx context.Context, o hub.Owner, d hub.DeviceID, c hub.LabelChange, user string) (hub.Labels, error) {
	return f.setLabels(ctx, o, d, c, user)
}

type fakeIdentities struct {
	devices     func(context.Context, hub.Owner) ([]hub.DeviceID, error)
	signOff     func(context.Context, hub.DeviceID, hub.Owner, string) error
	eventsOwned func(context.Context, hub.Owner) ([]hub.DeviceID, error)
	reachable   func(hub.DeviceID) error // nil: all are
	access      map[hub.DeviceID]hub.Access
}

func (f *fakeIdentities) Devices(ctx context.Context, o hub.Owner) ([]hub.DeviceID, error) {
	return f.devices(ctx, o)
}

func (f *fakeIdentities) Remove(ctx context.Context, d hub.DeviceID, o hub.Owner, user, _ string) error {
	return f.signOff(ctx, d, o, user)
}

func (f *fakeIdentities) Access(ctx context.Context, d hub.DeviceID, o hub.Owner) (hub.Access, error) {
	if ids, err := f.devices(ctx, o); err != nil || !slices.Contains(ids, d) {
		return hub.Access{}, cmp.Or[error](err, hub.NewError(hub.NotFound, "device-not-owned", ""))
	}
	return cmp.Or(f.access[d], hub.Access{State: hub.AccessAdmitted}), nil
}

func (f *fakeIdentities) Disable(ctx context.Context, d hub.DeviceID, o hub.Owner, user, reason string) error {
	_, err := f.Access(ctx, d, o)
	if err == nil {
		f.access[d] = hub.Access{State: hub.AccessDisabled, User: user, Reason: reason, Since: time.Unix(1700000000, 0).UTC()}
	}
	return err
}

func (f *fakeIdentities) Quarantine(ctx context.Context, d hub.DeviceID, o hub.Owner, user, reason string) error {
	_, err := f.Access(ctx, d, o)
	if err == nil {
		f.access[d] = hub.Access{State: hub.AccessQuarantined, User: user, Reason: reason, Since: time.Unix(1700000000, 0).UTC()}
	}
	return err
}

// Kept implements Quarantine.
func (f *fakeIdentities) Kept(ctx context.Context, d hub.DeviceID, o hub.Owner) (hub.Kept, error) {
	k := hub.Kept{Writes: []hub.KeptWrite{}}
	a, err := f.Access(ctx, d, o)
	if a.State == hub.AccessQuarantined {
		k.Dropped = 3
		k.Writes = append(k.Writes, hub.KeptWrite{
			Number: 5, Session: 4, Message: 1, Time: time.Unix(1700000000, 0).UTC(), Kind: hub.KeptChanged,
			From:    hub.KeptFrom{Remote: "192.0.2.1:5683", Connection: "c", Protocol: "coaps", Credential: "certificate 00ff"},
			Changes: []hub.KeptChange{{Href: "/light", ContentType: "application/cbor", Format: hub.FormatCBOR, Data: []byte{0xa0}}},
		})
	}
	return k, err
}

func (f *fakeIdentities) Enable(ctx context.Context, d hub.DeviceID, o hub.Owner) error {
	_, err := f.Access(ctx, d, o)
	delete(f.access, d)
	return err
}

func (f *fakeIdentities) Reachable(_ context.Context, d hub.DeviceID, _ hub.Owner) error {
	if f.reachable == nil {
		return nil
	}
	return f.reachable(d)
}

func (f *fakeIdentities) EventsOwned(ctx context.Context, o hub.Owner) ([]hub.DeviceID, error) {
	return f.eventsOwned(ctx, o)
}

// fakeCertificates is a ledger in memory. What is signed, and the list, are up to the tests.
type fakeCertificates struct {
	ledger []hub.Certificate
	sign   func(owner hub.Owner, user string, csr []byte) ([]byte, error)
	others func(profile hub.Profile, owner hub.Owner, user string, hosts []string, csr []byte) ([]byte, error)
	list   func(issuer string) ([]byte, error)
	status func(request []byte) hub.CertificateStatus
	err    error // behind what is yielded or revoked
}

func (f *fakeCertificates) Sign(_ context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error) {
	return f.sign(owner, user, csr)
}

func (f *fakeCertificates) SignClient(_ context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error) {
	return f.others(hub.ForClient, owner, user, nil, csr)
}

func (f *fakeCertificates) SignService(_ context.Context, owner hub.Owner, user string, hosts []string, csr []byte) ([]byte, error) {
	return f.others(hub.ForService, owner, user, hosts, csr)
}

// means is the contract of the filter.
func (*fakeCertificates) means(f hub.CertificateFilter, c hub.Certificate) bool {
	return c.Owner == f.Owner && !f.All && (len(f.Serials) == 0 || slices.Contains(f.Serials, c.Serial)) &&
		(len(f.Devices) == 0 || slices.Contains(f.Devices, c.Device)) && (len(f.Names) == 0 || slices.Contains(f.Names, c.Name))
}

func (f *fakeCertificates) Certificates(_ context.Context, filter hub.CertificateFilter) iter.Seq2[hub.Certificate, error] {
	return func(yield func(hub.Certificate, error) bool) {
		for _, c := range f.ledger {
			if f.means(filter, c) && !yield(c, nil) {
				return
			}
		}
		if f.err != nil {
			yield(hub.Certificate{}, f.err)
		}
	}
}

func (f *fakeCertificates) Revoke(_ context.Context, filter hub.CertificateFilter, reason hub.RevocationReason) ([]hub.Certificate, error) {
	var out []hub.Certificate
	for i := range f.ledger {
		if c := &f.ledger[i]; f.means(filter, *c) && c.Revoked.IsZero() {
			c.Revoked, c.Reason = time.Unix(0, t0+7), reason
			out = append(out, *c)
		}
	}
	return out, f.err
}

func (*fakeCertificates) Report(context.Context, hub.Owner, time.Duration) (hub.CertificateReport, error) {
	return hub.CertificateReport{Good: 1, Keys: map[string]int{"P-256": 1}}, nil
}

func (f *fakeCertificates) List(_ context.Context, issuer string) ([]byte, error) {
	return f.list(issuer)
}

func (f *fakeCertificates) Status(_ context.Context, request []byte) hub.CertificateStatus {
	return f.status(request)
}

type fakeVerifier struct {
	verify func(context.Context, string) (hub.Claims, error)
}

func (f *fakeVerifier) Verify(ctx context.Context, token string) (hub.Claims, error) {
	return f.verify(ctx, token)
}

// sets of a picture: sorted slices are enough for tests.
type linkSet []hub.Link

func (s linkSet) Len() int { return len(s) }
func (s linkSet) Get(h hub.Href) (hub.Link, bool) {
	i, ok := slices.BinarySearchFunc(s, h, func(l hub.Link, h hub.Href) int { return cmp.Compare(l.Href, h) })
	if !ok {
		return hub.Link{}, false
	}
	return s[i], true
}
func (s linkSet) All() iter.Seq[hub.Link] { return slices.Values(s) }

type resourceSet []*hub.Resource

func (s resourceSet) Len() int { return len(s) }
func (s resourceSet) Get(h hub.Href) (*hub.Resource, bool) {
	i, ok := slices.BinarySearchFunc(s, h, func(r *hub.Resource, h hub.Href) int { return cmp.Compare(r.Href, h) })
	if !ok {
		return nil, false
	}
	return s[i], true
}
func (s resourceSet) All() iter.Seq[*hub.Resource] { return slices.Values(s) }

// world is a hub around the door: what the fakes answer from. Tests change its functions and maps before they ask.
type world struct {
	*Gateway
	pictures map[hub.DeviceID]*hub.Device
	commits  map[hub.DeviceID][]hub.Commit
	tokens   map[string]hub.Claims
	signOffs []hub.DeviceID
	orders   []hub.Order
	picks    []hub.CommandPick
	outcome  func(hub.Order) hub.Outcome

	directory    *fakeDirectory
	identities   *fakeIdentities
	certificates *fakeCertificates
	enrolments   *fakeEnrolments
	verifier     *fakeVerifier
	registry     *prometheus.Registry
	log          *logBuffer
}

func newWorld(t testing.TB, change ...func(*Config, *Deps)) *world {
	t.Helper()
	w := &world{
		pictures: map[hub.DeviceID]*hub.Device{}, commits: map[hub.DeviceID][]hub.Commit{}, registry: prometheus.NewRegistry(),
		log: &logBuffer{},
		tokens: map[string]hub.Claims{
			"alice":     {Subject: "alice-sub", Owner: alice, Scopes: []string{hub.ScopeRead, hub.ScopeWrite}, Expiry: time.Now().Add(time.Hour)},
			"bob":       {Subject: "bob-sub", Owner: bob, Scopes: []string{hub.ScopeRead, hub.ScopeWrite}, Expiry: time.Now().Add(time.Hour)},
			"reader":    {Subject: "alice-sub", Owner: alice, Scopes: []string{hub.ScopeRead}, Expiry: time.Now().Add(time.Hour)},
			"scopeless": {Subject: "alice-sub", Owner: alice, Expiry: time.Now().Add(time.Hour)},
			"lamp":      {Subject: "alice-sub", Owner: alice, Device: true, DeviceID: string(lampA), Scopes: []string{hub.ScopeDevice, hub.ScopeRead}, Expiry: time.Now().Add(time.Hour)},
		},
	}
	for _, d := range []*hub.Device{lamp(lampA, "lamp A", true), lamp(lampB, "lamp B", false), signedUp(fresh), published1(nameless), lamp(bobs, "bob's lamp", true)} {
		w.pictures[d.ID] = d
	}
	w.pictures[bobs].Owner = bob
	w.directory = &fakeDirectory{
		fakeFeed: newFakeFeed(w),
		devices: func(_ context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
			return func(yield func(*hub.Device, error) bool) {
				for _, id := range ids {
					if d := w.pictures[id]; d != nil && d.Owner == o && !yield(d, nil) {
						return
					}
				}
			}
		},
		deviceAt: func(_ context.Context, o hub.Owner, id hub.DeviceID, _ time.Time) (*hub.Device, error) {
			if d := w.pictures[id]; d != nil && d.Owner == o {
				return d, nil
			}
			return nil, hub.NewError(hub.NotFound, "", "")
		},
		setLabels: func(_ context.Context, o hub.Owner, id hub.DeviceID, c hub.LabelChange, user string) (hub.Labels, error) {
			d := w.pictures[id]
			if d == nil || d.Owner != o {
				return nil, hub.NewError(hub.NotFound, "", "")
			}
			if user == "" {
				t.Error("labels without a user")
			}
			labels, err := c.Apply(d.Labels)
			if err == nil {
				next := *d
				next.Labels = labels
				w.pictures[id] = &next
			}
			return labels, err
		},
		history: func(_ context.Context, o hub.Owner, id hub.DeviceID, after time.Time) iter.Seq2[hub.Commit, error] {
			return func(yield func(hub.Commit, error) bool) {
				for _, c := range w.commits[id] {
					if c.Owner == o && time.Unix(0, c.Time).After(after) && !yield(c, nil) {
						return
					}
				}
			}
		},
	}
	w.directory.command = func(_ context.Context, o hub.Owner, order hub.Order) (hub.Outcome, error) {
		w.orders = append(w.orders, order)
		if d := w.pictures[order.Device]; d == nil || d.Owner != o {
			return hub.Outcome{}, errNotYours
		}
		if order.Async {
			return hub.Outcome{}, nil
		}
		return w.outcome(order), nil
	}
	w.directory.cancel = func(_ context.Context, o hub.Owner, dev hub.DeviceID, pick hub.CommandPick) ([]string, error) {
		w.picks = append(w.picks, pick)
		if d := w.pictures[dev]; d == nil || d.Owner != o {
			return nil, errNotYours
		}
		return []string{"c1", "c2"}, nil
	}
	w.outcome = func(o hub.Order) hub.Outcome {
		out := hub.Outcome{
			Kind: o.Kind, Device: o.Device, Href: o.Href, Types: []string{"core.light"}, Cause: cause(5),
			Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Content: ocf(map[string]any{"power": 7}), ETag: []byte{0xe7, 1}},
		}
		out.Cause.Correlation = "c1"
		if o.Kind.OfTwin() {
			meta := w.pictures[o.Device].Metadata
			meta.Twin.Enabled = o.Kind != hub.CommandTwinOff
			out.Metadata, out.Content, out.ETag = &meta, hub.Content{}, nil
		}
		return out
	}
	owned := func(_ context.Context, o hub.Owner) ([]hub.DeviceID, error) {
		var ids []hub.DeviceID
		for id, d := range w.pictures {
			if d.Owner == o {
				ids = append(ids, id)
			}
		}
		slices.Sort(ids)
		return ids, nil
	}
	w.identities = &fakeIdentities{
		devices: owned, eventsOwned: owned,
		access: map[hub.DeviceID]hub.Access{},
		signOff: func(_ context.Context, id hub.DeviceID, o hub.Owner, user string) error {
			if d := w.pictures[id]; d == nil || d.Owner != o {
				return hub.NewError(hub.NotFound, "", "")
			}
			if user == "" {
				t.Error("sign-off without a user")
			}
			delete(w.pictures, id)
			w.signOffs = append(w.signOffs, id)
			return nil
		},
	}
	w.verifier = &fakeVerifier{verify: func(_ context.Context, token string) (hub.Claims, error) {
		if c, ok := w.tokens[token]; ok {
			return c, nil
		}
		return hub.Claims{}, hub.NewError(hub.Unauthenticated, "token-invalid", "the access token is not valid")
	}}
	w.enrolments = &fakeEnrolments{}
	w.certificates = &fakeCertificates{list: func(string) ([]byte, error) { return []byte{0x30, 0}, nil }, status: func([]byte) hub.CertificateStatus {
		return hub.CertificateStatus{DER: []byte{0x30, 0}, From: time.Unix(0, t0), Until: time.Unix(3600, t0)}
	}}
	cfg := Default()
	cfg.API.HTTP.Address, cfg.API.GRPC.Address = "127.0.0.1:0", "127.0.0.1:0"
	deps := Deps{
		Directory: w.directory, Identities: w.identities, Quarantine: w.identities, Certificates: w.certificates, Enrolments: w.enrolments, PreSharedKeys: &fakeKeys{}, Verifier: w.verifier, HubID: hubID,
		Hosts:     []string{"example.com"},
		CursorKey: []byte("0123456789abcdef0123456789abcdef"),
		HubInfo: func() HubConfiguration {
			return HubConfiguration{
				OwnerClaim: "sub", HTTPGatewayAddress: "http://localhost:8080", CoAPGateway: "coaps+tcp://localhost:5684", Authority: "https://localhost:8080",
				CertificateAuthorities: "-----BEGIN CERTIFICATE-----\n", DefaultCommandTTL: 10 * time.Second,
				WebClient: &OAuthClient{ID: "web", Scopes: []string{"openid"}}, DeviceClient: &OAuthClient{ID: "device"},
				Build: Build{Version: "v0"},
			}
		},
	}
	for _, c := range change {
		c(&cfg, &deps)
	}
	g, err := New(cfg, deps, slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})), w.registry)
	if err != nil {
		t.Fatal(err)
	}
	w.Gateway = g
	return w
}

func cborOf(t any) []byte {
	mode, err := cbor.CanonicalEncOptions().EncMode() // maps in one order
	if err != nil {
		panic(err)
	}
	b, err := mode.Marshal(t)
	if err != nil {
		panic(err)
	}
	return b
}

func ocf(v any) hub.Content {
	return hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatOCFCBOR, Data: cborOf(v)}
}

const t0 = int64(1_700_000_000_000_000_000)

func cause(version uint64) hub.Cause {
	return hub.Cause{Known: true, Version: version, Time: t0 + int64(version), Session: 3, Message: 9, Connection: "conn-1", User: "alice-sub", Owner: alice}
}

func twin(h hub.Href, c hub.Content, etag string, types ...string) *hub.Resource {
	return &hub.Resource{
		Href: h, Owner: alice, Types: types, Status: hub.StatusOK, Content: c, ETag: []byte(etag), Version: 4, Seq: 17, Time: t0,
		Session: 3, Message: 9, Connection: "conn-1", User: "alice-sub",
	}
}

// later is a picture whose resources have all been reported again.
func later(d *hub.Device) *hub.Device {
	rs := d.Resources.(resourceSet)
	for i := range rs {
		rs[i].Seq += 10
	}
	return d
}

// lamp is a device with contents of all kinds. /late is published and never reported; /hidden reported, not published.
func lamp(id hub.DeviceID, name string, online bool) *hub.Device {
	link := func(h hub.Href, types ...string) hub.Link {
		return hub.Link{Href: h, Types: types, Interfaces: []string{"oic.if.rw", "oic.if.baseline"}, Anchor: "ocf://" + string(id), Policy: 3}
	}
	d := &hub.Device{
		ID: id, Owner: alice, Generation: 1, Seq: 20, MetaCause: cause(2), LinksCause: cause(1),
		Metadata: hub.Metadata{
			Connection: hub.Connection{Online: online, ID: "conn-1", ConnectedAt: t0, Protocol: hub.ProtocolCoAPSTCP, Service: "gw-1", LocalEndpoints: []string{"coaps://127.0.0.1:40001"}},
			Twin:       hub.Twin{Enabled: true, State: hub.TwinInSync, SyncingAt: t0, InSyncAt: t0 + 1},
			Contact:    hub.Contact{Interval: 6 * time.Hour, Next: t0 + 2},
		},
		Links: linkSet{
			link("/a/events", "x.odd"), link("/cbor", "x.cbor"), link("/json", "x.json"), link("/late", "x.late"), link("/light/1", "core.light"),
			link("/octets", "x.octets"),
			{Href: "/oic/d", Types: []string{"oic.wk.d", "oic.d.light"}, Interfaces: []string{"oic.if.r"}, Policy: 3, Title: "what it is", ContentTypes: []string{"application/vnd.ocf+cbor"}, Endpoints: []hub.Endpoint{{URI: "coaps://[fe80::1]:5684", Priority: 1}}, ValidUntil: t0},
			link("/text", "x.text"), link("/types", "x.types"),
		},
		Resources: resourceSet{
			twin("/a/events", ocf(map[string]any{"odd": true}), ""),
			twin("/cbor", hub.Content{Type: "application/cbor", Format: 60, Data: cborOf(map[string]any{"c": 60})}, "", "x.cbor"),
			twin("/hidden", ocf(map[string]any{"h": 1}), "h"),
			twin("/json", hub.Content{Type: "application/json", Format: 50, Data: []byte("{\"a\":1,\n \"b\":[1.5,null]}")}, "", "x.json"),
			twin("/light/1", ocf(map[string]any{"name": "Light", "power": 0, "state": false}), "\xb1\xb2", "core.light"),
			twin("/octets", hub.Content{Type: "application/octet-stream", Format: 42, Data: []byte{1, 2, 3, 255}}, "", "x.octets"),
			twin("/oic/d", ocf(map[string]any{
				"n": name, "di": id, "dmno": "L-1", "piid": "a0000000-0000-4000-8000-000000000021",
				"dmn": []map[string]any{{"language": "en", "value": "Example Maker"}}, "rt": []string{"oic.wk.d", "oic.d.light"},
			}), "\xe7\x00", "oic.wk.d", "oic.d.light"),
			twin("/text", hub.Content{Type: "text/plain; charset=utf-8", Format: 0, Data: []byte("plain words")}, "", "x.text"),
			twin("/types", ocf(map[string]any{
				"big": uint64(9007199254740993), "neg": -3, "html": "<a>&b", "null": nil, "bytes": []byte{1, 2, 3}, "empty": "",
				"float": 1.5, "nested": map[string]any{"x": map[string]any{"y": []any{}}}, "emptyObj": map[string]any{}, "arr": []any{1, "a", true, []any{}},
			}), "t", "x.types"),
		},
	}
	return d
}

func signedUp(id hub.DeviceID) *hub.Device {
	return &hub.Device{ID: id, Owner: alice, Generation: 1, Seq: 1, Links: linkSet{}, Resources: resourceSet{}}
}

func published1(id hub.DeviceID) *hub.Device {
	d := lamp(id, "", true)
	d.Links = linkSet{{Href: "/x", Types: []string{"x.x"}}}
	d.Resources = resourceSet{}
	return d
}

// answer is an HTTP answer with its lines decoded.
type answer struct {
	*httptest.ResponseRecorder
	t testing.TB
}

func (a answer) json() map[string]any {
	a.t.Helper()
	var v map[string]any
	d := json.NewDecoder(strings.NewReader(a.Body.String()))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		a.t.Fatalf("status %d, body %q: %v", a.Code, a.Body, err)
	}
	return v
}

// results decodes a list: one {"result":…} a line.
func (a answer) results() []map[string]any {
	a.t.Helper()
	if a.Code != http.StatusOK {
		a.t.Fatalf("status %d: %s", a.Code, a.Body)
	}
	var out []map[string]any
	body := a.Body.String()
	if body != "" && !strings.HasSuffix(body, "\n") {
		a.t.Fatalf("the last line has no end: %q", body)
	}
	for line := range strings.Lines(body) {
		var v struct{ Result map[string]any }
		d := json.NewDecoder(strings.NewReader(line))
		d.UseNumber()
		if err := d.Decode(&v); err != nil || v.Result == nil {
			a.t.Fatalf("line %q: %v", line, err)
		}
		out = append(out, v.Result)
	}
	return out
}

// reason returns the stable code of an error answer.
func (a answer) reason() string {
	a.t.Helper()
	details, _ := a.json()["details"].([]any)
	for _, d := range details { // behind the event of a command, if it is one
		info := d.(map[string]any)
		if info["domain"] == "coaphub" && info["@type"] == "type.googleapis.com/google.rpc.ErrorInfo" {
			return info["reason"].(string)
		}
	}
	a.t.Fatalf("no ErrorInfo: %s", a.Body)
	return ""
}

// do asks over HTTP; headers are "Name: value". Every answer is checked against the OpenAPI description.
func (w *world) do(t testing.TB, token, method, target string, headers ...string) answer {
	t.Helper()
	return w.ask(t, token, method, target, nil, headers...)
}

// send asks with a JSON body, unless a header says what it is.
func (w *world) send(t testing.TB, token, method, target, body string, headers ...string) answer {
	t.Helper()
	if !slices.ContainsFunc(headers, func(h string) bool { return strings.HasPrefix(h, "Content-Type: ") }) {
		headers = append(slices.Clone(headers), "Content-Type: application/json")
	}
	return w.ask(t, token, method, target, strings.NewReader(body), headers...)
}

func (w *world) ask(t testing.TB, token, method, target string, body io.Reader, headers ...string) answer {
	t.Helper()
	r := httptest.NewRequest(method, target, body)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		if name == "Host" {
			r.Host = value
			continue
		}
		r.Header.Add(name, value)
	}
	rec := httptest.NewRecorder()
	w.HTTPHandler().ServeHTTP(rec, r)
	checkAnswer(t, r, rec)
	return answer{rec, t}
}

func (w *world) get(t testing.TB, target string, headers ...string) answer {
	t.Helper()
	return w.do(t, "alice", "GET", target, headers...)
}

func ids(rs []map[string]any, field string) []string {
	var out []string
	for _, r := range rs {
		s, _ := r[field].(string)
		out = append(out, s)
	}
	return out
}

func insertLink(s linkSet, l hub.Link) linkSet {
	s = slices.DeleteFunc(slices.Clone(s), func(o hub.Link) bool { return o.Href == l.Href })
	i, _ := slices.BinarySearchFunc(s, l.Href, func(o hub.Link, h hub.Href) int { return cmp.Compare(o.Href, h) })
	return slices.Insert(s, i, l)
}

func insertTwin(s resourceSet, r *hub.Resource) resourceSet {
	s = slices.DeleteFunc(slices.Clone(s), func(o *hub.Resource) bool { return o.Href == r.Href })
	i, _ := slices.BinarySearchFunc(s, r.Href, func(o *hub.Resource, h hub.Href) int { return cmp.Compare(o.Href, h) })
	return slices.Insert(s, i, r)
}

// manyLamps gives alice n more lamps and returns the list of them.
func manyLamps(w *world, n int) func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
	var ids []hub.DeviceID
	for i := range n {
		id := hub.DeviceID(fmt.Sprintf("d1000000-0000-4000-8000-%012x", i))
		w.pictures[id] = lamp(id, fmt.Sprintf("lamp %d", i), true)
		ids = append(ids, id)
	}
	return func(context.Context, hub.Owner) ([]hub.DeviceID, error) { return ids, nil }
}

func newRequest(method, target string, headers ...string) *http.Request {
	r := httptest.NewRequest(method, target, nil)
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	return r
}

func newRecorder() *httptest.ResponseRecorder { return httptest.NewRecorder() }

// abort asks for an answer that must be broken off after it began.
func (w *world) abort(t testing.TB, target string) answer {
	t.Helper()
	r := httptest.NewRequest("GET", target, nil)
	r.Header.Set("Authorization", "Bearer alice")
	rec := httptest.NewRecorder()
	func() {
		defer func() {
			if p := recover(); p != http.ErrAbortHandler {
				t.Errorf("the answer was not broken off: %v", p)
			}
		}()
		w.HTTPHandler().ServeHTTP(rec, r)
	}()
	return answer{rec, t}
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// sameJSON brings JSON into one form, with members in order and digits as they are.
func sameJSON(t testing.TB, b []byte) string {
	t.Helper()
	var v any
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", b, err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// counter returns a counter's value; its labels' values are given in the order of the labels' names.
func (w *world) counter(t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	c, _ := w.metric(t, name, labels)
	return c
}

func (w *world) metric(t testing.TB, name string, labels []string) (counter, gauge float64) {
	t.Helper()
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var values []string
			for _, l := range m.GetLabel() {
				values = append(values, l.GetValue())
			}
			if slices.Equal(values, labels) {
				return m.GetCounter().GetValue(), m.GetGauge().GetValue()
			}
		}
	}
	return 0, 0
}

// gauge is counter for gauges.
func (w *world) gauge(t testing.TB, name string, labels ...string) float64 {
	t.Helper()
	_, g := w.metric(t, name, labels)
	return g
}

// logBuffer is what the gateway logged.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
