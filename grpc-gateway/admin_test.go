package grpcgateway

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// fakeAudit keeps entries in memory.
type fakeAudit struct {
	mu      sync.Mutex // guards what follows
	entries []hub.AuditEntry
	err     error
}

func (f *fakeAudit) Record(_ context.Context, e hub.AuditEntry) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	e.Number, e.Time = uint64(len(f.entries)+1), time.Unix(0, t0).UTC()
	f.entries = append(f.entries, e)
	return nil
}

func (f *fakeAudit) List(_ context.Context, before uint64, limit int) ([]hub.AuditEntry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []hub.AuditEntry
	for _, e := range slices.Backward(f.entries) {
		if (before == 0 || e.Number < before) && len(out) < limit {
			out = append(out, e)
		}
	}
	return out, f.err
}

func (f *fakeAudit) lines() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []string
	for _, e := range f.entries {
		out = append(out, strings.Join([]string{e.Door, e.Call, e.Target, e.User, string(e.Owner), e.Client, e.Outcome}, " "))
	}
	return out
}

type fakeAdministration struct {
	refused  []Refusal
	accounts map[string]Account
}

func (f *fakeAdministration) Refused(context.Context) []Refusal { return f.refused }

func (f *fakeAdministration) RefusedOf(_ context.Context, owner hub.Owner) (out []Refusal, _ error) {
	if owner == alice {
		for _, r := range f.refused {
			if r.Device == string(lampA) {
				out = append(out, r)
			}
		}
	}
	return out, nil
}

func (f *fakeAdministration) Accounts(context.Context) ([]Account, error) {
	if f.accounts == nil {
		return nil, hub.NewError(hub.Precondition, "no-embedded-provider", "elsewhere")
	}
	var out []Account
	for _, a := range f.accounts {
		out = append(out, a)
	}
	return out, nil
}

func (f *fakeAdministration) AddAccount(_ context.Context, name, password string, roles []string) (Account, string, error) {
	if _, ok := f.accounts[name]; ok {
		return Account{}, "", hub.NewError(hub.Conflict, "account-exists", "there")
	}
	f.accounts[name] = Account{Name: name, Roles: roles, MustChange: password == ""}
	return f.SetPassword(context.Background(), name, password)
}

func (f *fakeAdministration) SetPassword(_ context.Context, name, password string) (Account, string, error) {
	a, ok := f.accounts[name]
	if !ok {
		return Account{}, "", hub.NewError(hub.NotFound, "account-unknown", "none")
	}
	if password == "" {
		return a, "one-time", nil
	}
	return a, "", nil
}

func (f *fakeAdministration) SetRoles(_ context.Context, name string, roles []string) (Account, error) {
	a, ok := f.accounts[name]
	if !ok {
		return Account{}, hub.NewError(hub.NotFound, "account-unknown", "none")
	}
	a.Roles = roles
	f.accounts[name] = a
	return a, nil
}

// newAdminWorld is a world with everything for administrators.
func newAdminWorld(t testing.TB) (*world, *fakeAudit, *fakeAdministration) {
	t.Helper()
	log := &fakeAudit{}
	admin := &fakeAdministration{accounts: map[string]Account{"admin": {Name: "admin", Roles: []string{"admin"}, Created: time.Unix(0, t0).UTC()}}}
	w := newWorld(t, func(_ *Config, d *Deps) { d.Audit, d.Administration = log, admin })
	w.tokens["admin"] = hub.Claims{Subject: "admin", Owner: "admin", ClientID: "web", Scopes: []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin}, Expiry: time.Now().Add(time.Hour)}
	return w, log, admin
}

func TestAccountsOverTheAPI(t *testing.T) {
	t.Parallel()
	w, log, admin := newAdminWorld(t)
	add := w.send(t, "admin", "POST", "/api/v1/accounts", `{"name":"carol","roles":["user"]}`)
	want(t, "one-time password", add.json()["password"], any("one-time"))
	want(t, "nobody keeps it", add.Header().Get("Cache-Control"), "no-store")
	want(t, "with a password", w.send(t, "admin", "POST", "/api/v1/accounts", `{"name":"dave@example.com","password":"correct horse","roles":["viewer"]}`).json()["password"] == nil, true)
	want(t, "again", w.send(t, "admin", "POST", "/api/v1/accounts", `{"name":"carol","roles":["user"]}`).Code, 409)
	list := w.do(t, "admin", "GET", "/api/v1/accounts", "Accept: application/protojson").results() // one form only
	wantList(t, "accounts", ids(list, "name"), "admin", "carol", "dave@example.com")
	page := w.do(t, "admin", "GET", "/api/v1/accounts?limit=2").results()
	cursor := page[1]["cursor"].(string)
	wantList(t, "the rest", ids(w.do(t, "admin", "GET", "/api/v1/accounts?cursor="+cursor).results(), "name"), "dave@example.com")
	want(t, "roles", w.send(t, "admin", "PUT", "/api/v1/accounts/dave%40example.com/roles", `{"roles":["user","viewer"]}`).Code, 200)
	wantList(t, "roles", admin.accounts["dave@example.com"].Roles, "user", "viewer")
	want(t, "password", w.send(t, "admin", "PUT", "/api/v1/accounts/carol/password", `{}`).json()["password"], any("one-time"))
	want(t, "unknown", w.send(t, "admin", "PUT", "/api/v1/accounts/erin/password", `{}`).reason(), "account-unknown")
	want(t, "body", w.send(t, "admin", "POST", "/api/v1/accounts", `{"name":"x","admin":true}`).reason(), "body-invalid")
	for _, l := range log.lines() {
		if strings.Contains(l, "horse") || strings.Contains(l, "one-time") {
			t.Errorf("a password is in the audit log: %s", l)
		}
	}
	admin.accounts = nil
	want(t, "elsewhere", w.do(t, "admin", "GET", "/api/v1/accounts").reason(), "no-embedded-provider")
}

func TestRefusalsOverTheAPI(t *testing.T) {
	t.Parallel()
	w, _, admin := newAdminWorld(t)
	for i := range 3 {
		admin.refused = append(admin.refused, Refusal{Time: time.Unix(0, t0-int64(i)).UTC(), Remote: "192.0.2.1:5684", What: "sign-up", Reason: "code-refused"})
	}
	admin.refused[1].Device = string(lampA)
	rs := w.do(t, "admin", "GET", "/api/v1/refusals?limit=2").results()
	want(t, "page", len(rs), 2)
	want(t, "device", rs[1]["device"], any(string(lampA)))
	rest := w.do(t, "admin", "GET", "/api/v1/refusals?cursor="+rs[1]["cursor"].(string)).results()
	want(t, "the rest", len(rest), 1)
	want(t, "time", rest[0]["time"], any(time.Unix(0, t0-2).UTC().Format(time.RFC3339Nano)))
	want(t, "an owner's", len(w.get(t, "/api/v1/refusals").results()), 1)
	want(t, "who may read only", len(w.do(t, "reader", "GET", "/api/v1/refusals").results()), 1)
	want(t, "another owner's", len(w.do(t, "bob", "GET", "/api/v1/refusals").results()), 0)
	want(t, "cursor of another list", w.do(t, "admin", "GET", "/api/v1/audit?cursor="+rs[1]["cursor"].(string)).reason(), "cursor-invalid")
}

// Only administrators get in, whatever else a token may do; where there is nothing to administrate it is not there.
func TestAdministrationNeedsItsScope(t *testing.T) {
	t.Parallel()
	w, log, _ := newAdminWorld(t)
	bare := newWorld(t, func(_ *Config, d *Deps) { d.Enrolments = nil })
	bare.tokens["admin"] = w.tokens["admin"]
	for template, methods := range routes {
		for method, op := range methods {
			if op.scope != hub.ScopeAdmin {
				continue
			}
			target := strings.ReplaceAll(template, "{name}", "admin")
			for token, reason := range map[string]string{"": "token-missing", "alice": "scope-missing", "reader": "scope-missing", "lamp": "device-token"} {
				want(t, method+" "+target+" by "+token, w.ask(t, token, method, target, strings.NewReader("{}")).reason(), reason)
			}
			want(t, method+" "+target+" without anything behind it", bare.ask(t, "admin", method, target, strings.NewReader("{}")).reason(), "no-such-path")
		}
	}
	want(t, "nothing happened", len(log.entries), 0)
}

func TestCallsThatChangeSomethingAreAudited(t *testing.T) {
	t.Parallel()
	w, log, _ := newAdminWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	w.get(t, "/api/v1/devices") // reading is not
	w.do(t, "admin", "GET", "/api/v1/audit")
	w.do(t, "reader", "DELETE", "/api/v1/devices?all=true") // refused before it was one
	a := w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampA))
	w.do(t, "alice", "DELETE", "/api/v1/devices?deviceIdFilter=")
	w.send(t, "alice", "PATCH", "/api/v1/devices/"+string(lampB)+"/labels", `{"labels":{"room":"hall"}}`)
	w.send(t, "alice", "PATCH", "/api/v1/devices/"+string(lampA)+"/labels", `{"labels":{}}`)
	if _, err := c.GetHubConfiguration(t.Context(), &pb.HubConfigurationRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.DeleteDevices(as(t, "alice"), &pb.DeleteDevicesRequest{DeviceIdFilter: []string{string(lampB)}}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.DeleteDevices(as(t, "bob"), &pb.DeleteDevicesRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	other := "/api/v1/devices/" + string(nameless) + "/resources/light/1"
	if _, err := c.UpdateResource(as(t, "alice"), &pb.UpdateResourceRequest{
		ResourceId: &rapb.ResourceId{DeviceId: string(nameless), Href: "/light/1"}, Content: &pb.Content{ContentType: mediaJSON, Data: []byte(`{}`)},
	}); err != nil {
		t.Fatal(err)
	}
	w.send(t, "alice", "PUT", other, `{`)
	w.get(t, other+"?twin=false") // asks the device, and changes nothing
	if _, err := c.GetResourceFromDevice(as(t, "alice"), &pb.GetResourceFromDeviceRequest{
		ResourceId: &rapb.ResourceId{DeviceId: string(nameless), Href: "/light/1"},
	}); err != nil {
		t.Fatal(err)
	}
	w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(nameless)+"/pending-metadata-updates")
	wantList(t, "entries", log.lines(),
		"http deleteDevice /api/v1/devices/"+string(lampA)+" alice-sub alice  ok",
		"http deleteDevices /api/v1/devices?deviceIdFilter= alice-sub alice  filter-empty",
		"http patchLabels /api/v1/devices/"+string(lampB)+"/labels alice-sub alice  ok",
		"http patchLabels /api/v1/devices/"+string(lampA)+"/labels alice-sub alice  not-found",
		"grpc DeleteDevices "+string(lampB)+" alice-sub alice  ok",
		"grpc DeleteDevices all bob-sub bob  ok",
		"grpc UpdateResource "+string(nameless)+"/light/1 alice-sub alice  ok",
		"http updateResource "+other+" alice-sub alice  content-invalid",
		"http cancelPendingMetadataUpdates /api/v1/devices/"+string(nameless)+"/pending-metadata-updates alice-sub alice  ok",
	)
	first := log.entries[0]
	want(t, "request", first.Request, a.Header().Get("X-Request-Id"))
	want(t, "remote", first.Remote != "", true)
	want(t, "remote of gRPC", log.entries[4].Remote != "", true)

	var numbers []string
	cursor := ""
	for range 10 {
		rs := w.do(t, "admin", "GET", "/api/v1/audit?limit=4&cursor="+cursor).results()
		numbers = append(numbers, ids(rs, "number")...)
		if cursor, _ = rs[len(rs)-1]["cursor"].(string); cursor == "" {
			break
		}
	}
	wantList(t, "newest first, in pages", numbers, "9", "8", "7", "6", "5", "4", "3", "2", "1")
}

// A call that ended in a panic is in the log, and one whose entry cannot be written is answered all the same.
func TestAuditOfWhatWentWrong(t *testing.T) {
	t.Parallel()
	w, log, _ := newAdminWorld(t)
	w.identities.signOff = func(context.Context, hub.DeviceID, hub.Owner, string) error { panic("no") }
	want(t, "panic", w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampA)).Code, 500)
	want(t, "outcome", log.entries[0].Outcome, "internal")
	log.err = hub.NewError(hub.Unavailable, "disk-full", "full")
	a := w.send(t, "alice", "PUT", "/api/v1/devices/"+string(lampA)+"/labels", `{"labels":{}}`)
	want(t, "answered", a.Code, 200)
	want(t, "logged", strings.Contains(w.log.String(), "missing in the audit log"), true)
	want(t, "reading it fails", w.do(t, "admin", "GET", "/api/v1/audit").reason(), "disk-full")
}
