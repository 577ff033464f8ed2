package e2e_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
)

func trim(s string) string { return strings.TrimSpace(s) }

// TestLibcoap talks to the hub with libcoap's client over TLS, built on two TLS libraries.
func TestLibcoap(t *testing.T) {
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		t.Run(client, func(t *testing.T) {
			if _, err := exec.LookPath(client); err != nil {
				t.Skip(client + " is not installed (Debian: libcoap3-bin)")
			}
			libcoap(t, client)
		})
	}
}

func libcoap(t *testing.T, client string) {
	p := serve(t, t.TempDir())
	id := deviceID(1)
	on := p.onboard(id)
	ask := func(on onboarded, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		var certs []string
		if on.dir != "" {
			certs = []string{
				"-c", filepath.Join(on.dir, "cert.pem"), "-j", filepath.Join(on.dir, "key.pem"),
				"-C", filepath.Join(on.dir, "ca.pem"), "-R", filepath.Join(on.dir, "ca.pem"),
			}
		}
		args = slices.Clone(args)
		args[len(args)-1] = "coaps+tcp://" + p.coaps() + args[len(args)-1]
		cmd := exec.CommandContext(ctx, client, append(append([]string{"-B", "5"}, certs...), args...)...)
		out, _ := cmd.CombinedOutput() // an error response is an exit code too
		return string(out)
	}
	body := func(v any) string {
		b, err := cbor.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		f := filepath.Join(t.TempDir(), "body")
		if err := os.WriteFile(f, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"time":              {[]string{"-A", "50", "/x.plgd.dev/time"}, `{"time":"`}, // 50: application/json
		"core":              {[]string{"/.well-known/core"}, "</oic/sec/account>"},
		"unknown path":      {[]string{"/nothing"}, "4.04"},
		"wrong method":      {[]string{"-m", "put", "/oic/rd"}, "4.05"},
		"without a session": {[]string{"/oic/res"}, "4.01"},
		"bad code": {[]string{
			"-m", "post", "-t", "10000", "-f", body(map[string]any{"di": id, "accesstoken": "bad"}), "/oic/sec/account",
		}, "4.01"},
		"no body": {[]string{"-m", "post", "/oic/sec/account"}, "4.00"},
	} {
		if out := ask(on, c.args...); !strings.Contains(out, c.want) {
			t.Errorf("%s: %q does not say %q", name, out, c.want)
		}
	}
	// -v 7 shows the messages; the body's words alone could be those of an error.
	out := ask(on, "-v", "7", "-m", "post", "-t", "10000", "-f", body(map[string]any{"di": id, "accesstoken": on.Code}), "-o", "-", "/oic/sec/account")
	if !strings.Contains(out, "refreshtoken") || !strings.Contains(out, "incoming 2.04 response") {
		t.Errorf("sign-up: %q", out)
	}
	// Each of these certificates fails in one thing; the one that fails in nothing shows that they would get in otherwise.
	letIn := func(on onboarded) bool {
		return strings.Contains(ask(on, "-A", "50", "/x.plgd.dev/time"), `{"time":"`)
	}
	clientAuth, identity := x509.ExtKeyUsageClientAuth, asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 44924, 1, 6}
	name := pkix.AttributeTypeAndValue{Type: asn1.ObjectIdentifier{2, 5, 4, 3}, Value: "uuid:" + id}
	good := x509.Certificate{
		Subject: pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{name}}, ExtKeyUsage: []x509.ExtKeyUsage{clientAuth},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{identity}, NotAfter: time.Now().Add(time.Hour),
	}
	for what, c := range map[string]struct {
		change func(*x509.Certificate)
		reason string // in the hub's list of refusals; "" for the one that is let in
	}{
		"nothing wrong": {func(*x509.Certificate) {}, ""},
		"no name":       {func(c *x509.Certificate) { c.Subject = pkix.Name{Organization: []string{id}} }, "exactly one common name"},
		"two names": {func(c *x509.Certificate) {
			other := name
			other.Value = "uuid:" + deviceID(2)
			c.Subject.ExtraNames = []pkix.AttributeTypeAndValue{name, other}
		}, "exactly one common name"},
		"a name that is no device's": {func(c *x509.Certificate) {
			c.Subject = pkix.Name{CommonName: id}
		}, "common name is not uuid:<device ID>"},
		"not for clients": {func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, "incompatible key usage"},
		"no OCF identity": {func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, "not an OCF identity certificate"},
		"expired":         {func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "expired"},
	} {
		cert := good
		c.change(&cert)
		from := p.issue(on, &cert)
		if in := letIn(from); in != (c.reason == "") {
			t.Errorf("a certificate with %s is let in: %v", what, in)
		}
		if c.reason == "" {
			continue
		}
		if got := p.refusedWith(c.reason); got != "" {
			t.Errorf("status does not say of a certificate with %s %q: %s", what, c.reason, got)
		}
	}
	// A certificate of another hub's authority does not get in.
	stranger := serve(t, t.TempDir()).onboard(id)
	if err := os.WriteFile(filepath.Join(stranger.dir, "ca.pem"), []byte(on.CA), 0o600); err != nil {
		t.Fatal(err)
	}
	if letIn(stranger) {
		t.Error("a certificate of another CA got in")
	}
	reason := "unknown authority"
	if client == "coap-client-gnutls" { // GnuTLS shows no certificate of an authority that the server does not name
		reason = "didn't provide a certificate"
	}
	if got := p.refusedWith(reason); got != "" {
		t.Errorf("status does not say why the stranger was refused: %s", got)
	}
}

// refusedWith returns "" when a refusal has the reason, else the list. A client hears of its refusal before the list has it.
func (p *process) refusedWith(reason string) string {
	p.t.Helper()
	end := time.Now().Add(10 * time.Second)
	for {
		out := p.run("status", "--refused", "--json")
		var refused []struct{ Reason string }
		if err := json.Unmarshal([]byte(out), &refused); err != nil {
			return err.Error()
		}
		for _, r := range refused {
			if strings.Contains(r.Reason, reason) {
				return ""
			}
		}
		if time.Now().After(end) {
			return out
		}
	}
}

// issue signs a certificate with the hub's own key for devices and returns where it is, with the rest of what on has.
func (p *process) issue(on onboarded, template *x509.Certificate) onboarded {
	p.t.Helper()
	text, err := os.ReadFile(filepath.Join(p.data, "keys", "device-issuing.pem"))
	if err != nil {
		p.t.Fatal(err)
	}
	issuing, err := tls.X509KeyPair(text, text)
	if err != nil {
		p.t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	template.SerialNumber, template.NotBefore, template.KeyUsage = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), x509.KeyUsageDigitalSignature
	cert, err := x509.CreateCertificate(rand.Reader, template, issuing.Leaf, &key.PublicKey, issuing.PrivateKey)
	if err != nil {
		p.t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		p.t.Fatal(err)
	}
	on.dir = p.t.TempDir()
	for name, text := range map[string][]byte{
		"cert.pem": slices.Concat(
			pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
			pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuing.Certificate[0]}),
		),
		"key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		"ca.pem":  []byte(on.CA),
	} {
		if err := os.WriteFile(filepath.Join(on.dir, name), text, 0o600); err != nil {
			p.t.Fatal(err)
		}
	}
	return on
}

// TestCurl reads the API as a person with curl would.
func TestCurl(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	p := serve(t, t.TempDir())
	token := trim(p.run("token"))
	curl := func(args ...string) string {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "curl", append([]string{"-sS", "--max-time", "10"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("curl %v: %v %s", args, err, out)
		}
		return string(out)
	}
	auth := "Authorization: Bearer " + token
	code := []string{"-o", os.DevNull, "-w", "%{http_code}"}
	for want, args := range map[string][]string{
		"200": append(code, "-H", auth, p.http("/api/v1/devices")),
		"401": append(code, p.http("/api/v1/resources")),
		"404": append(code, "-H", auth, p.http("/api/v1/devices/"+deviceID(9))),
		"400": append(code, "-H", auth, "-X", "DELETE", p.http("/api/v1/devices")),
		"421": append(code, "-H", auth, "-H", "Host: evil.example", p.http("/api/v1/devices")),
	} {
		if got := curl(args...); got != want {
			t.Errorf("curl %v: %s, want %s", args, got, want)
		}
	}
	var conf struct {
		ID           string `json:"id"`
		CoAPGateway  string `json:"coapGateway"`
		Certificates string `json:"certificateAuthorities"`
	}
	if err := json.Unmarshal([]byte(curl(p.http("/.well-known/configuration"))), &conf); err != nil {
		t.Fatal(err)
	}
	if conf.ID == "" || !strings.HasPrefix(conf.CoAPGateway, "coaps+tcp://") || !strings.Contains(conf.Certificates, "BEGIN CERTIFICATE") {
		t.Errorf("hub configuration: %+v", conf)
	}
	if out := curl(p.http("/api/v1/openapi.json")); !strings.Contains(out, `"openapi"`) {
		t.Errorf("openapi.json: %.100s", out)
	}
	if out := curl("http://" + strings.TrimPrefix(p.ready["admin"], "http://") + "/metrics"); !strings.Contains(out, "# HELP coaphub_") {
		t.Errorf("metrics: %.200s", out)
	}
}

// TestStockGRPC uses what any gRPC client knows: health and reflection, and no generated code of ours.
func TestStockGRPC(t *testing.T) {
	p := serve(t, t.TempDir())
	addr := strings.TrimPrefix(p.ready["grpc"], "grpc://")
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health: %v %v", h, err)
	}
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "grpcgateway.pb.GrpcGateway"},
	})
	if err != nil {
		t.Fatal(err)
	}
	res, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	files := res.GetFileDescriptorResponse().GetFileDescriptorProto()
	if len(files) == 0 || !bytes.Contains(bytes.Join(files, nil), []byte("GetDevicesMetadata")) {
		t.Errorf("reflection: %v", res)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
}
