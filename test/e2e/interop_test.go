package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
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
		"time":              {[]string{"/x.plgd.dev/time"}, "time"},
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
	out := ask(on, "-m", "post", "-t", "10000", "-f", body(map[string]any{"di": id, "accesstoken": on.Code}), "-o", "-", "/oic/sec/account")
	if !strings.Contains(out, "refreshtoken") {
		t.Errorf("sign-up: %q", out)
	}
	// A certificate of another hub's authority does not get in.
	stranger := serve(t, t.TempDir()).onboard(id)
	if err := os.WriteFile(filepath.Join(stranger.dir, "ca.pem"), []byte(on.CA), 0o600); err != nil {
		t.Fatal(err)
	}
	if out := ask(stranger, "/x.plgd.dev/time"); strings.Contains(out, "time\"") || strings.Contains(out, "dtime") {
		t.Errorf("a certificate of another CA got in: %q", out)
	}
	if out := p.run("status", "--refused", "--json"); !strings.Contains(out, "unknown authority") && !strings.Contains(out, "certificate") {
		t.Errorf("status does not say why the stranger was refused: %s", out)
	}
}

// TestLibcoapDatagrams talks to the hub with libcoap's client over DTLS, with certificates and with a pre-shared key, and over
// plain TCP and UDP: up to the sign-up, whose answer over UDP comes in blocks once the client has proven its address.
func TestLibcoapDatagrams(t *testing.T) {
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
