package grpcgateway

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	dppb "github.com/coaphub/coaphub/api/gen/deviceprovisioningservicepb"
	"github.com/coaphub/coaphub/hub"
)

const (
	provisioningService = "/device-provisioning-service/api/v1"
	groupA              = "a0000000-0000-4000-8000-00000000000a"
	groupB              = "b0000000-0000-4000-8000-00000000000b"
)

// fakeEnrolments keeps what it is told, in memory.
type fakeEnrolments struct {
	groups  []hub.EnrolmentGroup
	records []hub.ProvisioningRecord
	devices []hub.Enrolment
	tokens  []hub.EnrolmentToken
	secret  string // the pre-shared key that was set last
	err     error
}

func (f *fakeEnrolments) Groups(_ context.Context, owner hub.Owner) ([]hub.EnrolmentGroup, error) {
	return slices.DeleteFunc(slices.Clone(f.groups), func(g hub.EnrolmentGroup) bool { return g.Owner != owner }), f.err
}

func (f *fakeEnrolments) SetGroup(_ context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	if g.PSK != "" {
		f.secret, g.PSK, g.HasPSK = g.PSK, "", true
	}
	if i := slices.IndexFunc(f.groups, func(o hub.EnrolmentGroup) bool { return o.ID == g.ID }); g.ID != "" && i >= 0 {
		f.groups[i] = g
		return g, f.err
	}
	g.ID = groupA
	f.groups = append(f.groups, g)
	return g, f.err
}

func (f *fakeEnrolments) AcceptTerms(_ context.Context, owner hub.Owner, id, version, user string) (hub.EnrolmentGroup, error) {
	i := slices.IndexFunc(f.groups, func(o hub.EnrolmentGroup) bool { return o.ID == id && o.Owner == owner })
	switch {
	case i < 0:
		return hub.EnrolmentGroup{}, hub.NewError(hub.NotFound, "group-unknown", "there is no such enrolment group")
	case f.groups[i].Terms.Version != version:
		return hub.EnrolmentGroup{}, hub.NewError(hub.Precondition, "terms-version", "the group's terms have another version, or it has none")
	}
	f.groups[i].Accepted = hub.Acceptance{Version: version, User: user, Time: time.Unix(0, t0)}
	return f.groups[i], f.err
}

func (f *fakeEnrolments) DeleteGroups(_ context.Context, ids []string) (out []hub.EnrolmentGroup, err error) {
	f.groups = slices.DeleteFunc(f.groups, func(g hub.EnrolmentGroup) bool {
		gone := slices.Contains(ids, g.ID)
		if gone {
			out = append(out, g)
		}
		return gone
	})
	return out, f.err
}

func (f *fakeEnrolments) ProvisioningRecords(_ context.Context, q hub.ProvisioningFilter) iter.Seq2[hub.ProvisioningRecord, error] {
	rs := slices.DeleteFunc(slices.Clone(f.records), func(r hub.ProvisioningRecord) bool {
		return r.Owner != q.Owner || len(q.IDs) > 0 && !slices.Contains(q.IDs, r.ID) || len(q.Devices) > 0 && !slices.Contains(q.Devices, r.Device) ||
			len(q.Groups) > 0 && !slices.Contains(q.Groups, r.Group)
	})
	return listed(rs, f.err)
}

func (f *fakeEnrolments) DeleteProvisioningRecords(ctx context.Context, q hub.ProvisioningFilter) (out []string, err error) {
	for r := range f.ProvisioningRecords(ctx, q) {
		out = append(out, r.ID)
	}
	f.records = slices.DeleteFunc(f.records, func(r hub.ProvisioningRecord) bool { return slices.Contains(out, r.ID) })
	return out, f.err
}

func (f *fakeEnrolments) Enrolments(_ context.Context, q hub.EnrolmentFilter) iter.Seq2[hub.Enrolment, error] {
	return listed(slices.DeleteFunc(slices.Clone(f.devices), func(e hub.Enrolment) bool {
		return e.Owner != q.Owner || len(q.Devices) > 0 && !slices.Contains(q.Devices, e.Device) || len(q.States) > 0 && !slices.Contains(q.States, e.State)
	}), f.err)
}

func (f *fakeEnrolments) Decide(_ context.Context, owner hub.Owner, devices []hub.DeviceID, allow bool, user string) (out []hub.Enrolment, err error) {
	for _, dev := range devices {
		i := slices.IndexFunc(f.devices, func(e hub.Enrolment) bool { return e.Owner == owner && e.Device == dev })
		if i < 0 {
			return out, hub.NewError(hub.NotFound, "enrolment-unknown", "this device has not asked to enrol")
		}
		e := &f.devices[i]
		e.User, e.State = user, hub.EnrolmentRefused
		if allow {
			e.State = hub.EnrolmentAllowed
		}
		out = append(out, *e)
	}
	return out, f.err
}

func (f *fakeEnrolments) NewToken(
	_ context.Context, owner hub.Owner, dev hub.DeviceID, life time.Duration, user string,
) (string, hub.EnrolmentToken, error) {
	t := hub.EnrolmentToken{
		ID: fmt.Sprintf("%032d", len(f.tokens)), Device: dev, Owner: owner, User: user, Created: time.Unix(0, t0), Expires: time.Unix(0, t0).Add(life),
	}
	f.tokens = append(f.tokens, t)
	return "the token's text", t, f.err
}

func (f *fakeEnrolments) Tokens(_ context.Context, owner hub.Owner) ([]hub.EnrolmentToken, error) {
	return slices.DeleteFunc(slices.Clone(f.tokens), func(t hub.EnrolmentToken) bool { return t.Owner != owner }), f.err
}

func (f *fakeEnrolments) DeleteTokens(_ context.Context, owner hub.Owner, ids []string) (out []hub.EnrolmentToken, err error) {
	f.tokens = slices.DeleteFunc(f.tokens, func(t hub.EnrolmentToken) bool {
		gone := t.Owner == owner && slices.Contains(ids, t.ID)
		if gone {
			out = append(out, t)
		}
		return gone
	})
	return out, f.err
}

// newProvisioningWorld has two records, two groups and a device that waits of alice's, and one of each of bob's.
func newProvisioningWorld(t testing.TB) (*world, *fakeAudit) {
	t.Helper()
	w, log, _ := newAdminWorld(t)
	at := time.Unix(0, t0)
	record := func(id string, dev hub.DeviceID, owner hub.Owner) hub.ProvisioningRecord {
		return hub.ProvisioningRecord{
			ID: id, Device: dev, Owner: owner, Group: groupA, Created: at, Attested: at, Certificate: "PEM of the factory", Name: "serial 1",
			Steps: map[hub.ProvisioningStep]hub.ProvisioningStatus{
				hub.StepTime: {Time: at, Code: 69}, hub.StepOwnership: {Time: at, Code: 69}, hub.StepACLs: {Time: at, Code: 69},
				hub.StepCredentials: {Time: at, Code: 68}, hub.StepCloud: {Time: at, Code: 163, Problem: "enrolment-waiting"},
			},
			Identity: "PEM of the device", PSK: true, Cloud: hub.Cloud{Provider: "coaphub", Gateways: []string{"coaps+tcp://hub:5684"}},
		}
	}
	unknown := record("0003", "", alice)
	unknown.Steps, unknown.Group, unknown.Identity = map[hub.ProvisioningStep]hub.ProvisioningStatus{hub.StepTime: {Time: at, Code: 69}}, groupB, ""
	w.enrolments.records = []hub.ProvisioningRecord{unknown, record("0002", bobs, bob), record("0001", lampA, alice)}
	w.enrolments.groups = []hub.EnrolmentGroup{
		{ID: groupA, Name: "lamps", Owner: alice, Chain: string(chainPEM(t, "lamp maker", 1)), Named: true, HasPSK: true},
		{ID: groupB, Name: "bob's", Owner: bob, Chain: string(chainPEM(t, "other maker", 2))},
	}
	w.enrolments.devices = []hub.Enrolment{
		{Device: lampA, Owner: alice, Group: groupA, By: hub.ByFactory, Proof: "shown", Key: issuer, State: hub.EnrolmentWaiting, Waits: hub.WaitsForTerms, Created: at, Changed: at},
		{Device: bobs, Owner: bob, By: hub.ByToken, State: hub.EnrolmentIssued, User: "bob-sub", Serial: "0a", Created: at, Changed: at},
	}
	return w, log
}

func TestProvisioningRecords(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	for _, path := range []string{provisioningService + "/provisioning-records", "/api/v1/provisioning-records"} {
		for query, found := range map[string][]string{
			"":                                {"0003", "0001"},
			"idFilter=0001":                   {"0001"},
			"idFilter=0002":                   nil, // bob's
			"deviceIdFilter=" + string(lampA): {"0001"},
			"deviceIdFilter=" + string(bobs):  nil,
			"enrollmentGroupIdFilter=" + groupB + "&idFilter=0003": {"0003"},
			"enrollmentGroupIdFilter=" + groupB + "&idFilter=0001": nil,
		} {
			wantList(t, query, ids(w.get(t, path+"?"+query).results(), "id"), found...)
		}
		want(t, "no device ID", w.get(t, path+"?deviceIdFilter=x").reason(), "filter-invalid")
	}
	path := provisioningService + "/provisioning-records"
	page := w.get(t, path+"?limit=1").results()
	wantList(t, "first page", ids(page, "id"), "0001")
	wantList(t, "the rest", ids(w.get(t, path+"?limit=1&cursor="+page[0]["cursor"].(string)).results(), "id"), "0003")
	want(t, "another list's cursor", w.get(t, "/api/v1/enrolments?cursor="+page[0]["cursor"].(string)).reason(), "cursor-invalid")
	r := w.get(t, path+"?idFilter=0001").Body.String()
	for _, part := range []string{
		`"attestation":{"date":"` + strconv.FormatInt(t0, 10) + `","x509":{"certificatePem":"PEM of the factory","commonName":"serial 1"}}`,
		`"cloud":{"status":{"date":"` + strconv.FormatInt(t0, 10) + `","coapCode":163,"errorMessage":"enrolment-waiting"},"providerName":"coaphub","gateways":[{"uri":"coaps+tcp://hub:5684","id":"` + hubID + `"}]}`,
		`"ownership":{"status":{"date":"` + strconv.FormatInt(t0, 10) + `","coapCode":69},"owner":"` + alice.UUID() + `"}`,
		`"identityCertificatePem":"PEM of the device","preSharedKey":{"subjectId":"` + alice.UUID() + `"}`,
		`{"type":["ASYMMETRIC_SIGNING_WITH_CERTIFICATE"],"subject":"` + string(lampA) + `","usage":"CERT"`,
		`{"connectionSubject":{},"permissions":["READ"],"resources":[{"href":"/oic/d"}`,
		`{"deviceSubject":{"deviceId":"` + hubID + `"},"permissions":["CREATE","READ","WRITE","DELETE","NOTIFY"],"resources":[{"wildcard":"NONCFG_ALL"}]}`,
	} {
		if !strings.Contains(r, part) {
			t.Errorf("the record lacks %s:\n%s", part, r)
		}
	}
	for query, reason := range map[string]string{"": "filter-empty", "idFilter=": "filter-empty", "all=true&idFilter=0001": "filter-and-all", "all=yes": "query-invalid"} {
		want(t, "delete "+query, w.do(t, "alice", "DELETE", path+"?"+query).reason(), reason)
	}
	want(t, "bob's", w.do(t, "alice", "DELETE", path+"?idFilter=0002").json()["count"], any("0"))
	want(t, "deleted", w.do(t, "alice", "DELETE", path+"?deviceIdFilter="+string(lampA)).json()["count"], any("1"))
	want(t, "all", w.do(t, "alice", "DELETE", "/api/v1/provisioning-records?all=true").json()["count"], any("1"))
	want(t, "left", len(w.enrolments.records), 1)
	want(t, "audit", log.lines()[len(log.lines())-1], "http deleteProvisioningRecordsShort /api/v1/provisioning-records?all=true alice-sub alice  ok")
}

func TestEnrolmentGroupsOverTheAPI(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	w.tokens["boss"] = hub.Claims{Subject: "boss", Owner: alice, Scopes: []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin}, Expiry: time.Now().Add(time.Hour)}
	path := provisioningService + "/enrollment-groups"
	list := w.get(t, path)
	wantList(t, "alice's", ids(list.results(), "id"), groupA)
	g := list.results()[0]
	x509 := g["attestationMechanism"].(map[string]any)["x509"].(map[string]any)
	want(t, "chain", x509["certificateChain"].(string), "data:;base64,"+base64.StdEncoding.EncodeToString([]byte(w.enrolments.groups[0].Chain)))
	want(t, "lead", x509["leadCertificateName"], any("lamp maker"))
	want(t, "hub", g["hubIds"].([]any)[0], any(hubID))
	want(t, "has a key", g["hasPreSharedKey"], any(true))
	want(t, "and does not show it", g["preSharedKey"], nil)
	for query, n := range map[string]int{
		"idFilter=" + groupA: 1, "idFilter=" + groupB: 0, "hubIdFilter=" + hubID: 1, "hubIdFilter=" + groupA: 0,
		"attestationMechanismX509CertificateNames=lamp%20maker": 1, "attestationMechanismX509CertificateNames=x": 0,
	} {
		want(t, query, len(w.get(t, "/api/v1/enrollment-groups?"+query).results()), n)
	}

	// Of two certificates the lead one is the CA.
	root, between := string(chainPEM(t, "root", 3)), string(chainPEM(t, "between", 4))
	body := func(chain, more string) string {
		return fmt.Sprintf(`{"attestationMechanism":{"x509":{"certificateChain":%q,"leadCertificateName":"between"}}%s}`, chain, more)
	}
	data := "data:application/x-pem-file;base64," + base64.StdEncoding.EncodeToString([]byte(root+between))
	const psk = "0123456789abcdef"
	a := w.send(t, "boss", "POST", path, body(data, `,"name":"new","preSharedKey":"`+psk+`","hubIds":["`+hubID+`"],"allow":["`+strings.ToUpper(string(lampB))+`"]`))
	want(t, "created", a.Code, 200)
	made := w.enrolments.groups[2]
	want(t, "whose", made.Owner, alice)
	want(t, "who", made.User, "boss")
	want(t, "chain", made.Chain, between+root)
	want(t, "its devices say their IDs", made.Named, true)
	wantList(t, "devices", made.Allow, lampB)
	want(t, "key", w.enrolments.secret, psk)
	want(t, "nobody sees it", strings.Contains(a.Body.String(), psk), false)
	want(t, "audit", log.lines()[0], "http createEnrollmentGroup "+path+" group="+groupA+" boss alice  ok")

	// A change keeps the key, unless it has another or removes it.
	w.enrolments.groups = w.enrolments.groups[:2]
	put := func(more string) {
		t.Helper()
		want(t, "changed "+more, w.send(t, "boss", "PUT", "/api/v1/enrollment-groups/"+groupA, body(root+between, more)).Code, 200)
	}
	put(`,"named":false`)
	want(t, "key", w.enrolments.groups[0].HasPSK, true)
	want(t, "named", w.enrolments.groups[0].Named, false)
	put(`,"preSharedKey":"data:,"`)
	want(t, "key", w.enrolments.groups[0].HasPSK, false)
	want(t, "named", w.enrolments.groups[0].Named, false)

	// And the terms, unless it has others or removes them.
	put(`,"terms":{"version":"2","url":"https://terms.example"}`)
	want(t, "terms", w.enrolments.groups[0].Terms, hub.Terms{Version: "2", URL: "https://terms.example"})
	put("")
	want(t, "terms", w.enrolments.groups[0].Terms.Version, "2")
	const accept = "/api/v1/enrolments/terms"
	a = w.send(t, "alice", "POST", accept, `{"enrollmentGroupId":"`+groupA+`","version":"2"}`)
	want(t, "accepted", a.json()["acceptedTerms"].(map[string]any)["acceptedBy"], any("alice-sub"))
	want(t, "terms", a.json()["terms"].(map[string]any)["url"], any("https://terms.example"))
	want(t, "audit", log.lines()[len(log.lines())-1], "http acceptTerms "+accept+" group="+groupA+` terms="2" alice-sub alice  ok`)
	put(`,"terms":{},"deviceTypes":["oic.d.light"]`)
	wantList(t, "types", w.enrolments.groups[0].Types, "oic.d.light")
	want(t, "types", w.get(t, path+"?idFilter="+groupA).results()[0]["deviceTypes"].([]any)[0], any("oic.d.light"))
	want(t, "terms", w.enrolments.groups[0].Terms.Version, "")

	for what, c := range map[string]struct{ token, method, path, body, reason string }{
		"another owner's terms":        {"alice", "POST", accept, `{"enrollmentGroupId":"` + groupB + `","version":"2"}`, "group-unknown"},
		"another version of the terms": {"alice", "POST", accept, `{"enrollmentGroupId":"` + groupA + `","version":"3"}`, "terms-version"},
		"a reader accepts nothing":     {"reader", "POST", accept, `{"enrollmentGroupId":"` + groupA + `","version":"2"}`, "scope-missing"},
		"no administrator makes one":   {"alice", "POST", path, body(data, ""), "scope-missing"},
		"no administrator changes one": {"alice", "PUT", path + "/" + groupA, body(data, ""), "scope-missing"},
		"a reader removes none":        {"reader", "DELETE", path + "?idFilter=" + groupA, "", "scope-missing"},
		"another owner's group":        {"boss", "PUT", path + "/" + groupB, body(data, ""), "group-unknown"},
		"a group that there is not":    {"boss", "PUT", path + "/x", body(data, ""), "group-unknown"},
		"a file of the hub's":          {"boss", "POST", path, body("file:///etc/passwd", ""), "value-invalid"},
		"a path of the hub's":          {"boss", "POST", path, body("/etc/passwd", ""), "value-invalid"},
		"a key that is a file":         {"boss", "POST", path, body(data, `,"preSharedKey":"file:///etc/passwd"`), "value-invalid"},
		"data that is none":            {"boss", "POST", path, body("data:;base64,**", ""), "value-invalid"},
		"a lead that there is not":     {"boss", "POST", path, body(string(chainPEM(t, "x", 5)), ""), "group-lead-unknown"},
		"another hub":                  {"boss", "POST", path, body(data, `,"hubIds":["`+groupA+`"]`), "hub-unknown"},
		"a device ID that is none":     {"boss", "POST", path, body(data, `,"allow":["x"]`), "filter-invalid"},
		"a member that there is not":   {"boss", "POST", path, body(data, `,"x":1`), "body-invalid"},
		"no body":                      {"boss", "POST", path, "", "body-invalid"},
		"a removal that names nothing": {"alice", "DELETE", path, "", "filter-empty"},
		"a removal of names and all":   {"alice", "DELETE", path + "?all=true&idFilter=x", "", "filter-and-all"},
	} {
		want(t, what, w.send(t, c.token, c.method, c.path, c.body).reason(), c.reason)
	}
	want(t, "bob's", w.do(t, "alice", "DELETE", path+"?idFilter="+groupB).json()["count"], any("0"))
	want(t, "removed", w.do(t, "alice", "DELETE", path+"?all=true").json()["count"], any("1"))
	want(t, "left", w.enrolments.groups[0].ID, groupB)
}

func TestHubsOverTheAPI(t *testing.T) {
	t.Parallel()
	w, _ := newProvisioningWorld(t)
	for _, path := range []string{provisioningService + "/hubs", "/api/v1/hubs"} {
		hubs := w.get(t, path).results()
		want(t, "hubs", len(hubs), 1)
		want(t, "ID", hubs[0]["hubId"], any(hubID))
		want(t, "gateway", hubs[0]["gateways"].([]any)[0], any("coaps+tcp://localhost:5684"))
		want(t, "another", len(w.get(t, path+"?hubIdFilter="+groupA).results()), 0)
		want(t, "this", len(w.get(t, path+"?idFilter="+hubID).results()), 1)
		want(t, "none is made", w.send(t, "alice", "POST", path, `{}`).reason(), "method-not-allowed")
	}
}

func TestEnrolmentsOverTheAPI(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	wantList(t, "alice's", ids(w.get(t, "/api/v1/enrolments?stateFilter=waiting").results(), "deviceId"), string(lampA))
	want(t, "for what", w.get(t, "/api/v1/enrolments").results()[0]["waitsFor"], any("terms"))
	want(t, "issued", len(w.get(t, "/api/v1/enrolments?stateFilter=issued").results()), 0)
	want(t, "a state that there is not", w.get(t, "/api/v1/enrolments?stateFilter=x").reason(), "state-unknown")
	const decisions = "/api/v1/enrolments/decisions"
	a := w.send(t, "alice", "POST", decisions, `{"deviceIdFilter":["`+string(lampA)+`"],"allow":true}`)
	want(t, "allowed", a.json()["deviceIds"].([]any)[0], any(string(lampA)))
	want(t, "state", w.enrolments.devices[0].State, hub.EnrolmentAllowed)
	want(t, "audit", log.lines()[0], "http decideEnrolments "+decisions+" allow=true device="+string(lampA)+" alice-sub alice  ok")
	want(t, "another owner's", w.send(t, "alice", "POST", decisions, `{"deviceIdFilter":["`+string(bobs)+`"],"allow":true}`).reason(), "enrolment-unknown")
	want(t, "nobody", w.send(t, "alice", "POST", decisions, `{"allow":true}`).reason(), "filter-empty")
	want(t, "by a reader", w.send(t, "reader", "POST", decisions, `{}`).reason(), "scope-missing")
}

func TestEnrolmentTokensOverTheAPI(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	const tokens = "/api/v1/enrolment-tokens"
	a := w.send(t, "alice", "POST", tokens, `{"deviceId":"`+string(lampA)+`","timeToLive":"60000000000"}`)
	want(t, "text", a.json()["token"], any("the token's text"))
	want(t, "nobody keeps it", a.Header().Get("Cache-Control"), "no-store")
	want(t, "life", w.enrolments.tokens[0].Expires.Sub(w.enrolments.tokens[0].Created), time.Minute)
	want(t, "audit", log.lines()[0], "http createEnrolmentToken "+tokens+" token="+w.enrolments.tokens[0].ID+" alice-sub alice  ok")
	want(t, "for any device", w.send(t, "bob", "POST", tokens, `{}`).Code, 200)
	list := w.get(t, tokens)
	wantList(t, "alice's", ids(list.results(), "id"), w.enrolments.tokens[0].ID)
	want(t, "not shown again", strings.Contains(list.Body.String(), "text"), false)
	want(t, "no device ID", w.send(t, "alice", "POST", tokens, `{"deviceId":"x"}`).reason(), "device-id-invalid")
	want(t, "by a reader", w.send(t, "reader", "POST", tokens, `{}`).reason(), "scope-missing")
	want(t, "none named", w.do(t, "alice", "DELETE", tokens).reason(), "filter-empty")
	want(t, "bob's", w.do(t, "alice", "DELETE", tokens+"?idFilter="+w.enrolments.tokens[1].ID).json()["count"], any("0"))
	want(t, "all", w.do(t, "alice", "DELETE", tokens+"?all=true").json()["count"], any("1"))
	want(t, "left", w.enrolments.tokens[0].Owner, bob)
}

// The same over gRPC, with the same scopes.
func TestProvisioningOverGRPC(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	w.tokens["boss"] = hub.Claims{Subject: "boss", Owner: alice, Scopes: []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin}, Expiry: time.Now().Add(time.Hour)}
	c := dppb.NewDeviceProvisionServiceClient(w.dial(t))
	fails := func(what string, err error, expected string) {
		t.Helper()
		code, reason := reasonOf(t, err)
		want(t, what, code.String()+" "+reason, expected)
	}
	rs, err := c.GetProvisioningRecords(as(t, "reader"), &dppb.GetProvisioningRecordsRequest{IdFilter: []string{"0001", "0002"}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := rs.Recv()
	if err != nil || r.GetId() != "0001" || r.GetCloud().GetStatus().GetErrorMessage() != "enrolment-waiting" {
		t.Errorf("%v, %v", r, err)
	}
	if _, err = rs.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after that: %v", err)
	}
	x := &dppb.AttestationMechanism{X509: &dppb.X509Configuration{CertificateChain: w.enrolments.groups[0].Chain}}
	_, err = c.CreateEnrollmentGroup(as(t, "alice"), &dppb.CreateEnrollmentGroupRequest{AttestationMechanism: x})
	fails("a group by alice", err, "PermissionDenied scope-missing")
	g, err := c.CreateEnrollmentGroup(as(t, "boss"), &dppb.CreateEnrollmentGroupRequest{AttestationMechanism: x, Name: "more"})
	if err != nil || g.GetName() != "more" || !g.GetNamed() {
		t.Errorf("%v, %v", g, err)
	}
	_, err = c.UpdateEnrollmentGroup(as(t, "boss"), &dppb.UpdateEnrollmentGroupRequest{Id: groupB, EnrollmentGroup: &dppb.UpdateEnrollmentGroup{AttestationMechanism: x}})
	fails("bob's group", err, "NotFound group-unknown")
	_, err = c.UpdateEnrollmentGroup(as(t, "boss"), &dppb.UpdateEnrollmentGroupRequest{EnrollmentGroup: &dppb.UpdateEnrollmentGroup{AttestationMechanism: x}})
	fails("no group", err, "NotFound group-unknown")
	if g, err = c.UpdateEnrollmentGroup(as(t, "boss"), &dppb.UpdateEnrollmentGroupRequest{Id: groupA, EnrollmentGroup: &dppb.UpdateEnrollmentGroup{AttestationMechanism: x, Name: "renamed"}}); err != nil || g.GetName() != "renamed" {
		t.Errorf("%v, %v", g, err)
	}
	w.enrolments.groups[0].Terms.Version = "1"
	if g, err = c.AcceptTerms(as(t, "alice"), &dppb.AcceptTermsRequest{EnrollmentGroupId: groupA, Version: "1"}); err != nil || g.GetAcceptedTerms().GetAcceptedBy() != "alice-sub" {
		t.Errorf("%v, %v", g, err)
	}
	_, err = c.AcceptTerms(as(t, "reader"), &dppb.AcceptTermsRequest{EnrollmentGroupId: groupA, Version: "1"})
	fails("a reader accepts nothing", err, "PermissionDenied scope-missing")
	_, err = c.DeleteEnrollmentGroups(as(t, "alice"), &dppb.DeleteEnrollmentGroupsRequest{})
	fails("no filter", err, "InvalidArgument filter-empty")
	for what, do := range map[string]func() error{
		"make":   func() error { _, err := c.CreateHub(as(t, "boss"), &dppb.CreateHubRequest{}); return err },
		"change": func() error { _, err := c.UpdateHub(as(t, "boss"), &dppb.UpdateHubRequest{}); return err },
		"remove": func() error { _, err := c.DeleteHubs(as(t, "boss"), &dppb.DeleteHubsRequest{}); return err },
	} {
		fails(what+" a hub", do(), "Unimplemented hub-fixed")
	}
	hubs, err := c.GetHubs(as(t, "reader"), &dppb.GetHubsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if h, err := hubs.Recv(); err != nil || h.GetHubId() != hubID || h.GetAuthorization().GetProvider().GetClientId() != "device" {
		t.Errorf("%v, %v", h, err)
	}
	d, err := c.DecideEnrolments(as(t, "alice"), &dppb.DecideEnrolmentsRequest{DeviceIdFilter: []string{string(lampA)}})
	if err != nil || len(d.GetDeviceIds()) != 1 || w.enrolments.devices[0].State != hub.EnrolmentRefused {
		t.Errorf("%v, %v", d, err)
	}
	tok, err := c.CreateEnrolmentToken(as(t, "alice"), &dppb.CreateEnrolmentTokenRequest{TimeToLive: int64(time.Hour)})
	if err != nil || tok.GetToken() == "" {
		t.Errorf("%v, %v", tok, err)
	}
	n, err := c.DeleteEnrolmentTokens(as(t, "alice"), &dppb.DeleteEnrolmentTokensRequest{IdFilter: []string{tok.GetId()}})
	want(t, "tokens", fmt.Sprint(n.GetCount(), err), "1 <nil>")
	del, err := c.DeleteProvisioningRecords(as(t, "alice"), &dppb.DeleteProvisioningRecordsRequest{All: true})
	want(t, "records", fmt.Sprint(del.GetCount(), err), "2 <nil>")
	gs, err := c.DeleteEnrollmentGroups(as(t, "alice"), &dppb.DeleteEnrollmentGroupsRequest{All: true})
	want(t, "groups", fmt.Sprint(gs.GetCount(), err), "2 <nil>")
	for _, l := range log.lines() {
		if strings.Contains(l, "text") {
			t.Errorf("a token is in the audit log: %s", l)
		}
	}
	w.deps.Enrolments = nil
	_, err = c.DecideEnrolments(as(t, "alice"), &dppb.DecideEnrolmentsRequest{})
	fails("without an authority", err, "Unimplemented no-such-call")
}

// The calls need a token with their scope; where there is no authority they are not there.
func TestProvisioningNeedsItsScope(t *testing.T) {
	t.Parallel()
	w, log := newProvisioningWorld(t)
	bare := newWorld(t, func(_ *Config, d *Deps) { d.Enrolments = nil })
	bare.tokens["admin"] = w.tokens["admin"]
	n := 0
	for template, methods := range routes {
		if !strings.HasPrefix(template, provisioningService) && !strings.Contains(template, "/enrol") && !strings.HasSuffix(template, "/hubs") &&
			!strings.HasSuffix(template, "/provisioning-records") {
			continue
		}
		for method, op := range methods {
			n++
			target := strings.ReplaceAll(template, "{id}", groupA)
			want(t, method+" "+target+" without an authority", bare.ask(t, "admin", method, target, strings.NewReader("{}")).reason(), "no-such-path")
			refused := map[string]string{"": "token-missing", "scopeless": "scope-missing", "lamp": "device-token"}
			if method != http.MethodGet {
				refused["reader"] = "scope-missing"
			}
			if op.scope == hub.ScopeAdmin {
				refused["alice"] = "scope-missing"
			}
			for token, reason := range refused {
				want(t, method+" "+target+" by "+token, w.ask(t, token, method, target, strings.NewReader("{}")).reason(), reason)
			}
		}
	}
	want(t, "routes", n, 20)
	want(t, "nothing happened", len(log.entries), 0)
	want(t, "nobody's page", w.get(t, provisioningService+"/nothing").reason(), "no-such-path")
}
