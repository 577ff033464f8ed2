package bundle_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// caller asks the API with one token.
type caller struct {
	h     *hubtest.Hub
	token string
}

func (c caller) ask(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, c.h.HTTP+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// onboards returns what a device is given.
func (c caller) onboards(t *testing.T, body string) (o bundle.Onboarding) {
	t.Helper()
	code, text := c.ask(t, http.MethodPost, "/api/v1/onboarding", body)
	if err := json.Unmarshal([]byte(text), &o); err != nil || code != http.StatusOK {
		t.Fatalf("onboard %s: %d %s, %v", body, code, text, err)
	}
	return o
}

// refused asks for an onboarding that is refused with a stable code.
func (c caller) refused(t *testing.T, what, body, reason string) {
	t.Helper()
	if code, text := c.ask(t, http.MethodPost, "/api/v1/onboarding", body); code == http.StatusOK || !strings.Contains(text, `"reason":"`+reason+`"`) {
		t.Errorf("%s: %d %s, want %s", what, code, text, reason)
	}
}

// sees asks for something and reports whether the answer has a text.
func (c caller) sees(t *testing.T, path, text string) bool {
	t.Helper()
	_, got := c.ask(t, http.MethodGet, path, "")
	return strings.Contains(got, text)
}

func owner(t *testing.T, h *hubtest.Hub, name string) caller {
	t.Helper()
	h.User(t, name, "correct horse battery", "user")
	return caller{h, h.TokenOf(t, name, hub.ScopeRead, hub.ScopeWrite)}
}

// comes connects a device with what it was given.
func comes(t *testing.T, o bundle.Onboarding) *device.Device {
	t.Helper()
	cfg := device.Config{ID: o.DeviceID, HubAddr: o.Endpoints.CoAPSTCP, Provider: o.AuthorizationProvider}
	var err error
	if o.Identity == nil {
		cfg.HubAddr, cfg.PSK = o.Endpoints.CoAPS, &device.PSK{Identity: o.PSKIdentity, Key: []byte(o.PSK)}
	} else if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID); err != nil {
		t.Fatal(err)
	}
	d, err := device.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

func enters(t *testing.T, o bundle.Onboarding) *device.Device {
	t.Helper()
	d := comes(t, o)
	for _, step := range []func() (device.Answer, error){
		func() (device.Answer, error) { return d.SignUp(t.Context(), o.AuthorizationCode) },
		func() (device.Answer, error) { return d.SignIn(t.Context()) },
	} {
		if a, err := step(); err != nil || !a.OK() {
			t.Fatalf("%v, %v", a, err)
		}
	}
	return d
}

// An owner onboards devices of his own and free ones over the API, and changes nothing of others'.
func TestOwnersOnboardTheirDevices(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	alice, bob := owner(t, h, "alice"), owner(t, h, "bob")
	const (
		free = "d0000000-0000-4000-8000-00000000000b"
		kept = "d0000000-0000-4000-8000-00000000000c"

		operators = "d0000000-0000-4000-8000-00000000000d"
	)
	o := alice.onboards(t, `{"deviceId":"`+lamp+`","certificate":true,"preSharedKey":true}`)
	if o.HubID != h.ID || o.Owner != "alice" || o.DeviceID != lamp || o.AuthorizationProvider != "coaphub" || o.ExpiresAt.IsZero() || o.PSKIdentity != lamp || o.PSK == "" {
		t.Errorf("onboarded: %+v", o)
	}
	if want := h.Endpoints; o.Endpoints.CoAPSTCP != want.CoAPSTCP || o.Endpoints.HTTP != want.HTTP || o.Endpoints.Admin != "" {
		t.Errorf("endpoints: %+v", o.Endpoints)
	}
	d := enters(t, o)
	path := "/api/v1/devices/" + lamp
	if code, text := alice.ask(t, http.MethodGet, path+"/connection", ""); code != http.StatusOK || !strings.Contains(text, `"online":true,"protocol":"coaps+tcp","tls":"TLS 1.3"`) {
		t.Errorf("the connection: %d %s", code, text)
	}
	if !bob.sees(t, path+"/connection", "not-found") {
		t.Error("bob sees how alice's device is attached")
	}

	// What bob is refused leaves the device as it was.
	certificates := "/certificate-authority/api/v1/signing/records"
	_, before := alice.ask(t, http.MethodGet, path+"/pre-shared-key", "")
	_, signed := alice.ask(t, http.MethodGet, certificates, "")
	bob.refused(t, "alice's device", `{"deviceId":"`+lamp+`","certificate":true,"preSharedKey":true}`, "device-owned-by-other")
	if _, after := alice.ask(t, http.MethodGet, path+"/pre-shared-key", ""); after != before {
		t.Errorf("bob changed the key: %s, before %s", after, before)
	}
	if _, after := alice.ask(t, http.MethodGet, certificates, ""); after != signed || bob.sees(t, certificates, lamp) {
		t.Errorf("bob got a certificate: %s", after)
	}
	for what, c := range map[string]struct{ body, reason string }{
		"the hub's ID":             {`{"deviceId":"` + h.ID + `"}`, "device-id-of-hub"},
		"nothing named":            {`{}`, "device-id-missing"},
		"both":                     {`{"deviceId":"` + lamp + `","anyDevice":true}`, "device-id-missing"},
		"a certificate for any":    {`{"anyDevice":true,"certificate":true}`, "device-id-missing"},
		"a pre-shared key for any": {`{"anyDevice":true,"preSharedKey":true}`, "device-id-missing"},
		"no UUID":                  {`{"deviceId":"lamp"}`, "device-id-invalid"},
		"an owner of one's choice": {`{"anyDevice":true,"owner":"bob"}`, "body-invalid"},
	} {
		alice.refused(t, what, c.body, c.reason)
	}
	viewer := caller{h, h.TokenOf(t, "alice", hub.ScopeRead)}
	viewer.refused(t, "who may read only", `{"anyDevice":true}`, "scope-missing")

	// Devices that nobody has are kept for who came first.
	alice.onboards(t, `{"deviceId":"`+free+`","preSharedKey":true}`)
	keyed := alice.onboards(t, `{"deviceId":"`+free+`","preSharedKey":true}`)
	bob.refused(t, "an ID that is kept for alice, by a key", `{"deviceId":"`+free+`","preSharedKey":true}`, "device-owned-by-other")
	bob.refused(t, "the same, a certificate", `{"deviceId":"`+free+`","certificate":true}`, "device-owned-by-other")
	enters(t, keyed).Close()
	if !alice.sees(t, "/api/v1/devices/"+free+"/connection", `"protocol":"coaps","tls":"DTLS 1.2"`) {
		t.Error("a device with a pre-shared key did not come")
	}
	h.PSK(t, operators)
	bob.refused(t, "a key that an operator gave", `{"deviceId":"`+operators+`","preSharedKey":true}`, "psk-of-other")
	bob.onboards(t, `{"deviceId":"`+kept+`","certificate":true}`)
	alice.refused(t, "an ID that is kept for bob", `{"deviceId":"`+kept+`","certificate":true}`, "device-owned-by-other")
	alice.refused(t, "the same, a key", `{"deviceId":"`+kept+`","preSharedKey":true}`, "device-owned-by-other")

	// A device that is not let in is not onboarded, not even by its owner.
	for state, reason := range map[string]string{"disabled": "device-disabled", "quarantined": "device-quarantined"} {
		if code, text := alice.ask(t, http.MethodPut, path+"/access", `{"state":"`+state+`"}`); code != http.StatusOK {
			t.Fatal(text)
		}
		alice.refused(t, state, `{"deviceId":"`+lamp+`","certificate":true}`, reason)
		if code, text := alice.ask(t, http.MethodPut, path+"/access", `{"state":"admitted"}`); code != http.StatusOK {
			t.Fatal(text)
		}
	}
	d.Close()

	// One that was deleted comes again if its former owner says so, and nobody else.
	if code, text := alice.ask(t, http.MethodDelete, path, ""); code != http.StatusOK {
		t.Fatal(text)
	}
	bob.refused(t, "a device that alice deleted", `{"deviceId":"`+lamp+`","certificate":true,"preSharedKey":true}`, "device-removed")
	if !alice.sees(t, path+"/access", `"state":"removed"`) {
		t.Error("bob let alice's device in again")
	}
	again := alice.onboards(t, `{"deviceId":"`+lamp+`","certificate":true}`)
	if alice.sees(t, path+"/access", `"state":"removed"`) {
		t.Error("alice onboarded the device, and it is removed still")
	}
	enters(t, again)
	eventually(t, "the device is here again", func() bool { return alice.sees(t, path+"/connection", `"online":true`) })

	_, audit := get(t, h.HTTP+"/api/v1/audit", h.Token(t))
	for _, want := range []string{
		`"call":"onboard","target":"/api/v1/onboarding device=` + lamp + ` preSharedKey serial=[0-9a-f]+","user":"alice","owner":"alice".*"outcome":"ok"`,
		`"call":"onboard","target":"/api/v1/onboarding device=` + lamp + ` preSharedKey","user":"bob","owner":"bob".*"outcome":"device-owned-by-other"`,
	} {
		if !regexp.MustCompile(want).MatchString(audit) {
			t.Errorf("the audit log has no %s:\n%s", want, audit)
		}
	}
	for _, secret := range []string{o.AuthorizationCode, o.PSK, strings.Split(o.Identity.Key, "\n")[1], again.AuthorizationCode} {
		if strings.Contains(audit, secret) || strings.Contains(h.Log(), secret) {
			t.Error("a secret is in a log")
		}
	}
}

// Who onboards a device sees why it is turned away, and nobody else but its owner and administrators.
func TestOwnersSeeWhyTheirDevicesAreRefused(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	alice, bob := owner(t, h, "alice"), owner(t, h, "bob")
	const refusals, token = "/api/v1/refusals", "d0000000-0000-4000-8000-00000000000b"
	o := alice.onboards(t, `{"deviceId":"`+lamp+`","certificate":true}`)
	bob.onboards(t, `{"anyDevice":true}`)
	turnedAway := func(o bundle.Onboarding) {
		t.Helper()
		if a, err := comes(t, o).SignUp(t.Context(), "no-code"); err == nil && a.OK() {
			t.Fatal("signed up without a code")
		}
	}
	turnedAway(o)
	admin := caller{h, h.Token(t)}
	eventually(t, "the refusal is listed", func() bool { return admin.sees(t, refusals, lamp) })
	if !alice.sees(t, refusals, `"device":"`+lamp+`","what":"sign-up","reason":"code-refused`) {
		t.Error("alice does not see why the device that she onboards is refused")
	}
	if bob.sees(t, refusals, lamp) {
		t.Error("bob sees it, who has a code for any device")
	}

	// An enrolment token does, too.
	turnedAway(h.Onboard(t, token).Onboarding)
	eventually(t, "the other refusal is listed", func() bool { return admin.sees(t, refusals, token) })
	if bob.sees(t, refusals, token) {
		t.Error("bob sees who is refused that he has nothing to do with")
	}
	if code, text := bob.ask(t, http.MethodPost, "/api/v1/enrolment-tokens", `{"deviceId":"`+token+`"}`); code != http.StatusOK {
		t.Fatal(text)
	}
	if !bob.sees(t, refusals, token) || alice.sees(t, refusals, token) {
		t.Error("whoever has an enrolment token for the device, and nobody else, is to see why it is refused")
	}

	// The code is used up, and the device is alice's; bob had a code for it before.
	bob.onboards(t, `{"deviceId":"`+lamp+`"}`)
	if !bob.sees(t, refusals, lamp) {
		t.Error("bob has a code for a device that nobody has, and does not see why it is refused")
	}
	enters(t, o)
	if !alice.sees(t, refusals, lamp) || bob.sees(t, refusals, lamp) {
		t.Error("the device is alice's: she sees why it was refused, and bob does not")
	}
}

// Administrators see over the API what the command line shows on the hub's machine, but for what is of the machine alone.
func TestSystemOverTheAPI(t *testing.T) {
	t.Parallel()
	const secret = "a password that nobody sees"
	h := hubtest.Start(t, hubtest.WithConfig("oauthServer.initialPassword="+secret))
	admin, alice := caller{h, h.Token(t)}, owner(t, h, "alice")
	enters(t, alice.onboards(t, `{"deviceId":"`+lamp+`","certificate":true}`))

	own, err := h.Control.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, text := admin.ask(t, http.MethodGet, "/api/v1/system", "")
	var s bundle.Status
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	if s.HubID != own.HubID || s.Version != own.Version || s.Build != own.Build || !s.Started.Equal(own.Started) || s.Endpoints != own.Endpoints || s.Issuer != own.Issuer || s.Feed.LogID != own.Feed.LogID || s.Devices != 1 || s.Online != 1 {
		t.Errorf("over the API: %s, over the socket: %+v", text, own)
	}
	if s.PID != 0 || s.Data != "" || s.FirstLogin != "" || strings.Contains(text, h.Data) {
		t.Errorf("of the machine: %s", text)
	}

	same := func(a, b bundle.Part) bool {
		return a.Target == b.Target && a.Instance == b.Instance && a.State == b.State
	}
	eventually(t, "all parts were heard of", func() bool { // over a bus each says by itself that it lives
		parts, err := h.Control.Parts(t.Context())
		_, text := admin.ask(t, http.MethodGet, "/api/v1/system/parts", "")
		var ps []bundle.Part
		if err = errors.Join(err, json.Unmarshal([]byte(text), &ps)); err != nil {
			t.Fatal(err)
		}
		return len(ps) == len(bundle.Targets()) && slices.EqualFunc(ps, parts, same)
	})

	names := func(samples string) []string {
		return slices.Compact(regexp.MustCompile(`(?m)^# (HELP|TYPE) .*$`).FindAllString(samples, -1))
	}
	_, listener := get(t, h.Admin+"/metrics", "")
	_, text = admin.ask(t, http.MethodGet, "/api/v1/system/metrics", "")
	missing := func(a, b []string) []string {
		return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
	}
	if a, b := names(text), names(listener); len(a) == 0 || len(missing(b, a)) > 0 {
		t.Errorf("metrics: the API lacks %v", missing(b, a))
	}
	if !strings.Contains(text, "\ncoaphub_coap_gateway_sessions 1\n") {
		t.Errorf("no session is counted:\n%s", text)
	}

	var c struct{ Configuration, Differs string }
	_, text = admin.ask(t, http.MethodGet, "/api/v1/system/configuration", "")
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(c.Configuration, "initialPassword: '***'") || !strings.Contains(c.Configuration, "refreshTokenLifetime:") {
		t.Errorf("the configuration: %s", c.Configuration)
	}
	if !strings.Contains(c.Differs, "externalAddress: 127.0.0.1") || strings.Contains(c.Differs, "refreshTokenLifetime:") {
		t.Errorf("what differs: %s", c.Differs)
	}
	if strings.Contains(text, secret) {
		t.Error("a secret is shown")
	}
	for _, path := range []string{"", "/parts", "/metrics", "/configuration"} {
		if code, _ := alice.ask(t, http.MethodGet, "/api/v1/system"+path, ""); code != http.StatusForbidden {
			t.Errorf("alice asks for system%s: %d", path, code)
		}
	}
}
