package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/issuer"
)

// maker is a manufacturer: its CA.
type maker struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  string
}

func newMaker(t testing.TB, name string) *maker {
	t.Helper()
	m := &maker{t: t}
	m.cert, m.key = m.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	m.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: m.cert.Raw}))
	return m
}

func (m *maker) sign(tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		m.t.Fatal(err)
	}
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		m.t.Fatal(err)
	}
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	parent, by := m.cert, m.key
	if parent == nil {
		parent, by = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, by)
	if err != nil {
		m.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		m.t.Fatal(err)
	}
	return c, key
}

// device makes a device's factory certificate and its key, PEM.
func (m *maker) device(name string) (chain, key []byte) {
	m.t.Helper()
	c, private := m.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		m.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// newcomer is a device of a maker that is connected to the door for enrolment.
type newcomer struct {
	*device.Device
	t testing.TB
}

func comes(t testing.TB, h *hubtest.Hub, tr transport, chain, key []byte) (*newcomer, error) {
	t.Helper()
	root, err := h.Control.Root(t.Context(), "device")
	if err != nil {
		t.Fatal(err)
	}
	conf, err := device.TLS([]byte(root), chain, key, h.ID)
	if err != nil {
		t.Fatal(err)
	}
	at := tr.scheme + strings.TrimPrefix(h.Endpoints.Enrolment, "coaps")
	d, err := device.New(device.Config{ID: "ffffffff-0000-4000-8000-000000000001", HubAddr: at, TLS: conf})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return &newcomer{d, t}, d.Connect(t.Context())
}

// step takes a step of device provisioning, as iotivity-lite asks for it. go-coap's client over UDP never gets an answer of several
// blocks whose first is a message of its own, as that of a hub with much to do is after a second: it asks for the next block in an
// acknowledgement, which carries no requests (RFC 7252, Section 4.2). So it comes again, as a device does.
func (n *newcomer) step(code codes.Code, path string, body any) (a device.Answer) {
	n.t.Helper()
	var err error
	for range 10 {
		ctx, cancel := context.WithTimeout(n.t.Context(), 6*time.Second)
		a, err = n.Do(ctx, device.Request{
			Code: code, Path: path, Body: body, Format: message.AppOcfCbor, Accept: message.AppOcfCbor,
		})
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	if err != nil {
		n.t.Fatalf("%s: %v", path, err)
	}
	return a
}

const provisioning = "/api/v1/provisioning/"

// took wants an answer of 2.05 or 2.04.
func (n *newcomer) took(code codes.Code, path string, body any) device.Answer {
	n.t.Helper()
	a := n.step(code, path, body)
	if want := map[codes.Code]codes.Code{codes.GET: codes.Content, codes.POST: codes.Changed}[code]; a.Code != want || a.Format != 10000 {
		n.t.Fatalf("%s: %s in format %d", path, a, a.Format)
	}
	return a
}

func csrBody(t testing.TB, id string) (body map[string]any, key []byte) {
	t.Helper()
	csr, key := csrFor(t, id)
	return map[string]any{"di": id, "csr": map[string]any{"encoding": "oic.sec.encoding.pem", "data": string(csr)}}, key
}

// dig follows names and indices into an answer.
func dig(t testing.TB, v any, path ...any) any {
	t.Helper()
	for _, p := range path {
		switch p := p.(type) {
		case string:
			m, _ := v.(map[string]any)
			v = m[p]
		case int:
			list, _ := v.([]any)
			if p >= len(list) {
				t.Fatalf("there is no element %d of %v", p, list)
			}
			v = list[p]
		}
	}
	return v
}

// A device with a factory certificate takes the five steps of plgd's device provisioning, in iotivity-lite's order, and with what
// it got it signs up, signs in and is seen.
func TestDeviceProvisioning(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t)
			m := newMaker(t, "lamp maker")
			a := application(t, h)
			group := fmt.Sprintf(`{"name":"lamps","preSharedKey":"0123456789abcdef0123","attestationMechanism":{"x509":{"certificateChain":%q}}}`, m.pem)
			if status := a.ask(http.MethodPost, "/device-provisioning-service/api/v1/enrollment-groups", group, &struct{}{}); status != http.StatusOK {
				t.Fatalf("the group got %d", status)
			}
			const id = "a0000000-0000-4000-8000-00000000000a"
			chain, key := m.device("serial 4711")
			n, err := comes(t, h, tr, chain, key)
			if err != nil {
				t.Fatal(err)
			}
			if at, err := time.Parse(time.RFC3339Nano, n.took(codes.GET, "/x.plgd.dev/time", nil).Text("time")); err != nil || time.Since(at).Abs() > time.Minute {
				t.Errorf("the time: %v, %v", at, err)
			}
			owner := n.took(codes.GET, provisioning+"ownership", nil)
			if len(owner.Map()) != 1 || len(owner.Text("devowneruuid")) != 36 {
				t.Errorf("ownership: %v", owner)
			}
			conf := n.took(codes.POST, provisioning+"cloud-configuration", map[string]any{"di": id})
			if conf.Text("apn") != "coaphub" || conf.Text("sid") != h.ID || conf.Text("at") == "" || conf.Text("cis") != h.Endpoints.CoAPSTCP ||
				dig(t, conf.Body, "x.org.iotivity.servers", 1, "uri") != h.Endpoints.CoAPS || dig(t, conf.Body, "x.org.iotivity.servers", 1, "id") != h.ID {
				t.Errorf("cloud configuration: %v", conf)
			}
			csr, own := csrBody(t, id)
			creds := n.took(codes.POST, provisioning+"credentials", csr)
			cred := func(i int, usage, subject string) string {
				t.Helper()
				c := dig(t, creds.Body, "creds", i)
				if dig(t, c, "credtype") != uint64(8) || dig(t, c, "credusage") != usage || dig(t, c, "subjectuuid") != subject || dig(t, c, "tag") != "dps" ||
					dig(t, c, "credid") != nil || dig(t, c, "publicdata", "encoding") != "oic.sec.encoding.pem" {
					t.Errorf("credential %d: %v", i, c)
				}
				text, _ := dig(t, c, "publicdata", "data").(string)
				return text
			}
			identity, ca := cred(0, "oic.sec.cred.cert", id), cred(1, "oic.sec.cred.trustca", owner.Text("devowneruuid"))
			if c := dig(t, creds.Body, "creds", 2); dig(t, c, "credtype") != uint64(1) || dig(t, c, "subjectuuid") != owner.Text("devowneruuid") ||
				dig(t, c, "privatedata", "data") != "0123456789abcdef" || dig(t, c, "privatedata", "encoding") != "oic.sec.encoding.raw" || dig(t, c, "tag") != "dps" {
				t.Errorf("pre-shared key: %v", c)
			}
			acl := n.took(codes.GET, provisioning+"acls", nil)
			if dig(t, acl.Body, "aclist2", 0, "subject", "uuid") != owner.Text("devowneruuid") || dig(t, acl.Body, "aclist2", 2, "subject", "uuid") != h.ID ||
				dig(t, acl.Body, "aclist2", 1, "subject", "conntype") != "anon-clear" || dig(t, acl.Body, "aclist2", 1, "permission") != uint64(2) ||
				dig(t, acl.Body, "aclist2", 1, "resources", 2, "href") != "/oic/res" {
				t.Errorf("access control list: %v", acl)
			}
			n.Close()

			mine, err := device.TLS([]byte(ca), []byte(identity), own, conf.Text("sid"))
			if err != nil {
				t.Fatal(err)
			}
			d, err := device.New(device.Config{ID: id, HubAddr: h.Endpoints.CoAPSTCP, TLS: mine, Provider: conf.Text("apn")})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(d.Close)
			if err := d.Connect(t.Context()); err != nil {
				t.Fatal(err)
			}
			if a, err := d.SignUp(t.Context(), conf.Text("at")); err != nil || !a.OK() {
				t.Fatalf("sign-up: %v, %v", a, err)
			}
			if a, err := d.SignIn(t.Context()); err != nil || !a.OK() {
				t.Fatalf("sign-in: %v, %v", a, err)
			}
			if a, err := d.Publish(t.Context()); err != nil || !a.OK() {
				t.Fatalf("publish: %v, %v", a, err)
			}
			a.until("the device to be seen", func() bool { return strings.HasPrefix(a.twin(id), "ONLINE") })

			var record struct {
				Result struct {
					DeviceID   string `json:"deviceId"`
					Credential struct {
						Identity string `json:"identityCertificatePem"`
						Status   struct{ CoapCode int }
					}
					Acl, Cloud, Ownership struct{ Status struct{ CoapCode int } }
					PlgdTime              struct{ CoapCode int }
				}
			}
			if status := a.ask(http.MethodGet, "/api/v1/provisioning-records", "", &record); status != http.StatusOK {
				t.Fatalf("the records got %d", status)
			}
			r := record.Result
			if r.DeviceID != id || !strings.HasPrefix(identity, r.Credential.Identity) || r.Credential.Status.CoapCode != 68 || r.Acl.Status.CoapCode != 69 ||
				r.Cloud.Status.CoapCode != 68 || r.Ownership.Status.CoapCode != 69 || r.PlgdTime.CoapCode != 69 {
				t.Errorf("the record: %+v", r)
			}

			// Its owner removes it: it comes back when he allows it, and not before.
			if status := a.ask(http.MethodDelete, "/api/v1/devices/"+id, "", &struct{}{}); status != http.StatusOK {
				t.Fatalf("removing it got %d", status)
			}
			if n, err = comes(t, h, tr, chain, key); err != nil {
				t.Fatal(err)
			}
			again := map[string]any{"di": id}
			n.refused("a device that was removed", n.step(codes.POST, provisioning+"cloud-configuration", again), codes.Forbidden, "device-removed")
			if status := a.ask(http.MethodPost, "/api/v1/enrolments/decisions", `{"deviceIdFilter":["`+id+`"],"allow":true}`, &struct{}{}); status != http.StatusOK {
				t.Fatalf("allowing it got %d", status)
			}
			n.took(codes.POST, provisioning+"cloud-configuration", again)
			csr, _ = csrBody(t, id)
			n.took(codes.POST, provisioning+"credentials", csr)
		})
	}
}

// group makes a group of the maker's devices, which say their IDs themselves.
func (m *maker) group(h *hubtest.Hub, change func(*bundle.EnrolmentGroup)) bundle.EnrolmentGroup {
	m.t.Helper()
	g := bundle.EnrolmentGroup{Name: "lamps", Chain: m.pem, Named: true}
	if change != nil {
		change(&g)
	}
	g, err := h.Control.SetEnrolmentGroup(m.t.Context(), g)
	if err != nil {
		m.t.Fatal(err)
	}
	return g
}

// refused wants an error with a code, and nothing else of ours is 4.01.
func (n *newcomer) refused(what string, a device.Answer, want codes.Code, name string) {
	n.t.Helper()
	if a.Code != want || !strings.HasPrefix(string(a.Raw), name+": ") {
		n.t.Errorf("%s: %s, want %d.%02d %s", what, a, want>>5, want&31, name)
	}
}

// What is not as device provisioning has it, and what the device may not have, is refused; the device stays connected, and can
// go on.
func TestDeviceProvisioningRefuses(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	m := newMaker(t, "lamp maker")
	m.group(h, nil)
	h.User(t, "bob", "a long enough password", "user")
	const id, bobs = "a0000000-0000-4000-8000-00000000000a", "a0000000-0000-4000-8000-00000000000b"
	other := h.Onboard(t, bobs, "bob")
	d, err := device.New(device.Config{ID: bobs, HubAddr: h.Endpoints.CoAPSTCP, TLS: other.TLS})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a, err := d.SignUp(t.Context(), other.Code); err != nil || !a.OK() {
		t.Fatalf("bob's device signs up: %v, %v", a, err)
	}

	tr := transportOf("tls")
	stranger := newMaker(t, "lamp maker")
	chain, key := stranger.device("serial 1")
	if n, err := comes(t, h, tr, chain, key); err == nil {
		if a, err := n.Do(t.Context(), device.Request{Code: codes.GET, Path: provisioning + "ownership"}); err == nil {
			t.Errorf("a device of another maker got %s", a)
		}
	}
	unproven, err := comes(t, h, tr, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	unproven.took(codes.GET, "/x.plgd.dev/time", nil) // which it needs before it can prove anything
	unproven.refused("no certificate", unproven.step(codes.GET, provisioning+"ownership", nil), codes.Unauthorized, "enrolment-unproven")

	chain, key = m.device("serial 4711")
	n, err := comes(t, h, tr, chain, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, _ := csrBody(t, id)
	foreign, _ := csrBody(t, bobs)
	cloud := provisioning + "cloud-configuration"
	for what, c := range map[string]struct {
		code codes.Code
		path string
		body any
		want codes.Code
		name string
	}{
		"another method":                {codes.POST, provisioning + "ownership", map[string]any{}, codes.Forbidden, "provisioning-method"},
		"GET of the cloud":              {codes.GET, cloud, nil, codes.Forbidden, "provisioning-method"},
		"a path that is reserved":       {codes.GET, provisioning + "resources", nil, codes.NotFound, "path-unknown"},
		"no map":                        {codes.POST, cloud, []any{1}, codes.BadRequest, "body-invalid"},
		"no payload":                    {codes.POST, cloud, nil, codes.BadRequest, "body-invalid"},
		"no device":                     {codes.POST, cloud, map[string]any{}, codes.BadRequest, "device-id-invalid"},
		"another owner's device":        {codes.POST, cloud, map[string]any{"di": bobs}, codes.Forbidden, "enrolment-device-taken"},
		"a request for another owner's": {codes.POST, provisioning + "credentials", foreign, codes.Forbidden, "enrolment-device-taken"},
		"the hub's ID":                  {codes.POST, cloud, map[string]any{"di": h.ID}, codes.Forbidden, "device-id-of-hub"},
		"no request":                    {codes.POST, provisioning + "credentials", map[string]any{"csr": map[string]any{"encoding": "oic.sec.encoding.pem"}}, codes.BadRequest, "body-invalid"},
		"an encoding that there is not": {codes.POST, provisioning + "credentials", map[string]any{"csr": map[string]any{"encoding": "jwt", "data": "x"}}, codes.BadRequest, "body-invalid"},
		"a request that is none":        {codes.POST, provisioning + "credentials", map[string]any{"csr": map[string]any{"encoding": "oic.sec.encoding.pem", "data": "x"}}, codes.BadRequest, "csr-invalid"},
		"a request and another di":      {codes.POST, provisioning + "credentials", map[string]any{"di": bobs, "csr": csr["csr"]}, codes.Forbidden, "enrolment-device-taken"},
	} {
		n.refused(what, n.step(c.code, c.path, c.body), c.want, c.name)
	}
	a, err := n.Do(t.Context(), device.Request{Code: codes.GET, Path: provisioning + "acls", Accept: message.AppXML})
	if err != nil {
		t.Fatal(err)
	}
	n.refused("a format that there is not", a, codes.NotAcceptable, "not-acceptable")
	if a, err = n.Do(t.Context(), device.Request{Code: codes.GET, Path: provisioning + "acls", Accept: message.AppJSON}); err != nil || a.Code != codes.Content || a.Format != 50 ||
		!strings.HasPrefix(string(a.Raw), `{"aclist2":[{"subject":{"uuid":`) {
		t.Errorf("as JSON: %s, %v", a, err)
	}

	// It goes on, says which gateway it had, and is that device from then on.
	conf := n.took(codes.POST, cloud, map[string]any{"di": id, "selectedGateway": map[string]any{"id": h.ID, "uri": h.Endpoints.CoAPS}})
	if conf.Text("cis") != h.Endpoints.CoAPS {
		t.Errorf("the selected gateway: %v", conf)
	}
	n.took(codes.POST, provisioning+"credentials", csr)
	n.refused("another ID afterwards", n.step(codes.POST, cloud, map[string]any{"di": "a0000000-0000-4000-8000-00000000000c"}), codes.BadRequest, "csr-name")
	var last device.Answer
	for range 10 {
		last = n.step(codes.POST, cloud, map[string]any{"di": id})
	}
	n.refused("many codes", last, codes.ServiceUnavailable, "provisioning-repeated")
}

// Of two groups of one CA a device gets the key of the one that names it, also when its credentials are the first that it asks for
// and it says only there which device it is.
func TestDeviceProvisioningGivesTheKeyOfItsGroup(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	m := newMaker(t, "lamp maker")
	a := application(t, h)
	const first, second, other = "a0000000-0000-4000-8000-00000000000a", "a0000000-0000-4000-8000-00000000000b", "a0000000-0000-4000-8000-00000000000c"
	group := func(psk, more string) string {
		t.Helper()
		var g struct{ ID string }
		body := fmt.Sprintf(`{"preSharedKey":%q,"attestationMechanism":{"x509":{"certificateChain":%q}}%s}`, psk, m.pem, more)
		if status := a.ask(http.MethodPost, "/api/v1/enrollment-groups", body, &g); status != http.StatusOK {
			t.Fatalf("the group got %d", status)
		}
		return g.ID
	}
	const namedKey, openKey = "key-of-the-named", "key-of-all-other"
	named, open := group(namedKey, `,"allow":["`+first+`","`+second+`"]`), group(openKey, "")
	for _, c := range []struct {
		id, psk, group string
		says           bool // besides its request
	}{{first, namedKey, named, true}, {second, namedKey, named, false}, {other, openKey, open, true}} {
		chain, key := m.device("serial of " + c.id)
		n, err := comes(t, h, transportOf("tls"), chain, key)
		if err != nil {
			t.Fatal(err)
		}
		csr, _ := csrBody(t, c.id)
		if !c.says {
			delete(csr, "di")
		}
		for _, when := range []string{"at first", "once more"} {
			creds := n.took(codes.POST, provisioning+"credentials", csr)
			if got := dig(t, creds.Body, "creds", 2, "privatedata", "data"); got != c.psk {
				t.Errorf("%s %s: the key is %v, not %s", c.id, when, got, c.psk)
			}
			var r struct {
				Result struct{ EnrollmentGroupID string }
			}
			if status := a.ask(http.MethodGet, "/api/v1/provisioning-records?deviceIdFilter="+c.id, "", &r); status != http.StatusOK || r.Result.EnrollmentGroupID != c.group {
				t.Errorf("%s %s: the record has the group %q, not %q", c.id, when, r.Result.EnrollmentGroupID, c.group)
			}
		}
	}
}

// Where a person decides, the device is told to come again, and gets nothing before.
func TestDeviceProvisioningWaitsForAPerson(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	m := newMaker(t, "lamp maker")
	m.group(h, func(g *bundle.EnrolmentGroup) { g.Approval = true })
	const id = "a0000000-0000-4000-8000-00000000000a"
	chain, key := m.device("serial 4711")
	n, err := comes(t, h, transportOf("tls"), chain, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, _ := csrBody(t, id)
	conf := map[string]any{"di": id}
	n.took(codes.GET, provisioning+"ownership", nil)
	a := n.step(codes.POST, provisioning+"cloud-configuration", conf)
	n.refused("before anybody decided", a, codes.ServiceUnavailable, "enrolment-waiting")
	if a.MaxAge != 60 {
		t.Errorf("it may come again after %d s", a.MaxAge)
	}
	n.refused("before anybody decided", n.step(codes.POST, provisioning+"credentials", csr), codes.ServiceUnavailable, "enrolment-waiting")
	if es, err := h.Control.DecideEnrolments(t.Context(), bundle.EnrolmentsRequest{DeviceIDs: []string{id}, Allow: true}); err != nil || len(es) != 1 {
		t.Fatalf("decided: %+v, %v", es, err)
	}
	n.took(codes.POST, provisioning+"cloud-configuration", conf)
	n.took(codes.POST, provisioning+"credentials", csr)
}

// Where the accounts are another provider's there is no code for the device: that is the hub's trouble, and the log says so.
func TestDeviceProvisioningWithAnExternalProvider(t *testing.T) {
	t.Parallel()
	op := issuer.Start(t)
	h := hubtest.Start(t, hubtest.WithConfig(
		fmt.Sprintf(`authorization.issuers=[{"authority":%q,"audience":["hub"]}]`, op.URL()),
		fmt.Sprintf(`coapGateway.api.coap.authorization.providers=[{"name":"op","authority":%q,"clientID":"cloud","redirectURL":"https://localhost/devices"}]`, op.URL()),
	))
	m := newMaker(t, "lamp maker")
	m.group(h, func(g *bundle.EnrolmentGroup) { g.Owner = "alice" })
	chain, key := m.device("serial 4711")
	n, err := comes(t, h, transportOf("tls"), chain, key)
	if err != nil {
		t.Fatal(err)
	}
	const id = "a0000000-0000-4000-8000-00000000000a"
	n.refused("where to sign up", n.step(codes.POST, provisioning+"cloud-configuration", map[string]any{"di": id}), codes.ServiceUnavailable, "provisioning-no-code")
	if !strings.Contains(h.Log(), "the accounts are another provider's") {
		t.Error("the log does not say why")
	}
	csr, _ := csrBody(t, id)
	n.took(codes.POST, provisioning+"credentials", csr)
}
