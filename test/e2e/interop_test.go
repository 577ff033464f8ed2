package e2e_test

import (
	"bufio"
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
	"errors"
	"io"
	"maps"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

func trim(s string) string { return strings.TrimSpace(s) }

// TestLibcoap talks to the hub with libcoap's client over TLS, built on two TLS libraries.
func TestLibcoap(t *testing.T) {
	t.Parallel()
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

// TestLibcoapDatagrams talks to the hub with libcoap's client over DTLS, with certificates and with a pre-shared key, and over
// plain TCP and UDP: up to the sign-up, whose answer over UDP comes in blocks once the client has proven its address.
func TestLibcoapDatagrams(t *testing.T) {
	t.Parallel()
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		t.Run(client, func(t *testing.T) {
			if _, err := exec.LookPath(client); err != nil {
				t.Skip(client + " is not installed (Debian: libcoap3-bin)")
			}
			p := serve(t, t.TempDir(), "--coap-plain-address", "127.0.0.1:0")
			for i, c := range []struct{ name, scheme string }{
				{"certificate", "coaps"}, {"psk", "coaps"}, {"plain TCP", "coap+tcp"}, {"plain UDP", "coap"},
			} {
				t.Run(c.name, func(t *testing.T) {
					id := deviceID(i + 1)
					on := p.onboard(id)
					var credential []string
					switch c.name {
					case "certificate":
						credential = []string{
							"-c", filepath.Join(on.dir, "cert.pem"), "-j", filepath.Join(on.dir, "key.pem"), "-R", filepath.Join(on.dir, "ca.pem"),
						}
					case "psk":
						var o struct{ PSKIdentity, PSK string }
						if err := json.Unmarshal([]byte(p.run("onboard", "--device-id", id, "--psk", "--json")), &o); err != nil {
							t.Fatal(err)
						}
						credential = []string{"-u", o.PSKIdentity, "-k", o.PSK}
					}
					ask := func(credential []string, args ...string) string {
						ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
						defer cancel()
						args[len(args)-1] = p.ready[c.scheme] + args[len(args)-1]
						out, _ := exec.CommandContext(ctx, client, append(append([]string{"-B", "5"}, credential...), args...)...).CombinedOutput()
						return string(out) // an error response is an exit code too
					}
					for path, want := range map[string]string{
						"/x.plgd.dev/time": "time", "/.well-known/core": "</oic/sec/account>", "/nothing": "4.04", "/oic/res": "4.01",
					} {
						if out := ask(credential, path); !strings.Contains(out, want) {
							t.Errorf("%s: %q does not say %q", path, out, want)
						}
					}
					b, err := cbor.Marshal(map[string]any{"di": id, "accesstoken": on.Code})
					if err != nil {
						t.Fatal(err)
					}
					body := filepath.Join(t.TempDir(), "body")
					if err := os.WriteFile(body, b, 0o600); err != nil {
						t.Fatal(err)
					}
					if out := ask(credential, "-m", "post", "-t", "10000", "-f", body, "-o", "-", "/oic/sec/account"); !strings.Contains(out, "refreshtoken") {
						t.Errorf("sign-up: %q", out)
					}
					if c.name == "psk" {
						credential[3] += "x"
						if out := ask(credential, "/x.plgd.dev/time"); strings.Contains(out, "dtime") {
							t.Errorf("a wrong key got in: %q", out)
						}
					}
				})
			}
		})
	}
}

// TestCurl reads the API as a person with curl would.
func TestCurl(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	p := serve(t, t.TempDir())
	token := trim(p.run("token"))
	description, err := description()
	if err != nil {
		t.Fatal(err)
	}
	// curl asks and checks the answer, as it came over the wire, against the OpenAPI description; the URL is the last argument.
	curl := func(args ...string) (int, string) {
		t.Helper()
		args = append([]string{"-sS", "--max-time", "10", "-i", "--raw"}, args...)
		out, err := exec.CommandContext(t.Context(), "curl", args...).Output()
		if err != nil {
			t.Fatalf("curl %v: %v %s", args, err, out)
		}
		method := http.MethodGet
		if i := slices.Index(args, "-X"); i > 0 {
			method = args[i+1]
		}
		target, err := url.Parse(args[len(args)-1])
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(out)), &http.Request{Method: method})
		if err != nil {
			t.Fatalf("curl %v: %v in %q", args, err, out)
		}
		raw, err := io.ReadAll(resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			t.Fatalf("curl %v: %v in %q", args, err, out)
		}
		if target.Path == "/metrics" { // of the admin listener
			return resp.StatusCode, string(raw)
		}
		if err := description.Check(method, target, resp.StatusCode, resp.Header, raw); err != nil {
			t.Errorf("curl %v: not as the description says: %v", args, err)
		}
		return resp.StatusCode, string(raw)
	}
	lamp(t, p)
	auth := "Authorization: Bearer " + token
	for _, c := range []struct {
		want int
		says string
		args []string
	}{
		{200, deviceID(1), []string{"-H", auth, p.http("/api/v1/devices")}},
		{200, `"power":42`, []string{"-H", auth, p.http("/api/v1/devices/" + deviceID(1) + "/resources/light")}},
		{200, `"/light"`, []string{"-H", auth, p.http("/api/v1/resource-links")}},
		{200, "resourceChanged", []string{"-H", auth, p.http("/api/v1/events")}},
		{401, "", []string{p.http("/api/v1/resources")}},
		{404, "", []string{"-H", auth, p.http("/api/v1/devices/" + deviceID(9))}},
		{400, "filter-empty", []string{"-H", auth, "-X", "DELETE", p.http("/api/v1/devices")}},
		{421, "", []string{"-H", auth, "-H", "Host: evil.example", p.http("/api/v1/devices")}},
		{200, "coapGateway", []string{p.http("/.well-known/hub-configuration")}},
	} {
		if got, body := curl(c.args...); got != c.want || !strings.Contains(body, c.says) {
			t.Errorf("curl %v: %d %.300s, want %d and %q", c.args, got, body, c.want, c.says)
		}
	}
	var conf struct {
		ID           string `json:"id"`
		CoAPGateway  string `json:"coapGateway"`
		Certificates string `json:"certificateAuthorities"`
	}
	_, body := curl(p.http("/.well-known/configuration"))
	if err := json.Unmarshal([]byte(body), &conf); err != nil {
		t.Fatal(err)
	}
	if conf.ID == "" || !strings.HasPrefix(conf.CoAPGateway, "coaps+tcp://") || !strings.Contains(conf.Certificates, "BEGIN CERTIFICATE") {
		t.Errorf("hub configuration: %+v", conf)
	}
	if _, out := curl(p.http("/api/v1/openapi.json")); !strings.Contains(out, `"openapi"`) {
		t.Errorf("openapi.json: %.100s", out)
	}
	if _, out := curl("http://" + strings.TrimPrefix(p.ready["admin"], "http://") + "/metrics"); !strings.Contains(out, "# HELP coaphub_") {
		t.Errorf("metrics: %.200s", out)
	}
}

// lamp is device 1, with a light and what makes a device visible.
func lamp(t *testing.T, p *process) {
	t.Helper()
	id := deviceID(1)
	signedIn(t, p, id, map[string]any{
		"/oic/d": map[string]any{"di": id, "n": "lamp", "rt": []string{"oic.wk.d", "x.lamp"}}, "/light": map[string]any{"power": 42},
	})
	// The hub asks for it on its own; until then the device may be unknown.
	token := trim(p.run("token"))
	for end := time.Now().Add(10 * time.Second); ; {
		if status, body := p.get(t.Context(), token, "/api/v1/devices/"+id+"/resources/light"); status == 200 && bytes.Contains(body, []byte("42")) {
			if status, _ := p.get(t.Context(), token, "/api/v1/devices/"+id); status == 200 {
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("the lamp is not seen\n%s", p.log)
		}
	}
}

// signedIn is a device that has published what it serves.
func signedIn(t *testing.T, p *process, id string, serves map[string]any) *peer {
	t.Helper()
	on := p.onboard(id)
	pe, err := dialPeer(t.Context(), p.coaps(), on.tls)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pe.close)
	acc, err := signUp(t.Context(), pe, id, on.Code)
	if err != nil {
		t.Fatal(err)
	}
	for href, v := range serves {
		pe.serve(href, v)
	}
	if err := signIn(t.Context(), pe, id, acc); err != nil {
		t.Fatal(err)
	}
	for _, href := range slices.Sorted(maps.Keys(serves)) {
		if ok, err := publish(t.Context(), pe, id, 1, href); err != nil || !ok {
			t.Fatalf("publish %s: %v %v", href, ok, err)
		}
	}
	return pe
}

// TestStockGRPC uses what any gRPC client knows: health and reflection, and no generated code of ours.
func TestStockGRPC(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	lamp(t, p)
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
	files := reflected(ctx, t, conn)
	found, err := files.FindDescriptorByName("grpcgateway.pb.GrpcGateway.GetDevices")
	if err != nil {
		t.Fatalf("reflection: %v", err)
	}
	method := found.(protoreflect.MethodDescriptor)
	if !method.IsStreamingServer() || method.IsStreamingClient() {
		t.Fatalf("%s does not stream its answer", method.FullName())
	}
	getDevices := func(ctx context.Context) (devices []string, err error) {
		calls, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/grpcgateway.pb.GrpcGateway/GetDevices")
		if err != nil {
			return nil, err
		}
		if err := errors.Join(calls.SendMsg(dynamicpb.NewMessage(method.Input())), calls.CloseSend()); err != nil {
			return nil, err
		}
		for {
			dev := dynamicpb.NewMessage(method.Output())
			if err := calls.RecvMsg(dev); errors.Is(err, io.EOF) {
				return devices, nil
			} else if err != nil {
				return nil, err
			}
			devices = append(devices, dev.Get(method.Output().Fields().ByName("id")).String())
		}
	}
	if _, err := getDevices(ctx); grpcstatus.Code(err) != codes.Unauthenticated {
		t.Errorf("GetDevices without a token: %v", err)
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+trim(p.run("token")))
	if devices, err := getDevices(ctx); err != nil || !slices.Equal(devices, []string{deviceID(1)}) {
		t.Errorf("GetDevices: %v, %v", devices, err)
	}
}

// reflected is what a server says of its service. A stock client knows nothing else of it.
func reflected(ctx context.Context, t *testing.T, conn *grpc.ClientConn) *protoregistry.Files {
	t.Helper()
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
	var set descriptorpb.FileDescriptorSet
	for _, raw := range res.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var f descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &f); err != nil {
			t.Fatal(err)
		}
		set.File = append(set.File, &f)
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		t.Fatalf("reflection does not give whole descriptions: %v", err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
	return files
}
