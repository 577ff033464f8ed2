package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/issuer"
)

func TestMain(m *testing.M) {
	// These tests wait for fleets and clocks most of their time: more of them at once than there are CPUs.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const fan = "d0000000-0000-4000-8000-00000000000f"

const lamp = "d0000000-0000-4000-8000-00000000000a"

// result is what a command line did.
type result struct {
	code     int
	out, err string
}

// runs executes a command line in this process.
func runs(t *testing.T, args ...string) result {
	t.Helper()
	return runsWith(t, "", nil, args...)
}

func runsWith(t *testing.T, in string, env []string, args ...string) result {
	t.Helper()
	var out, err bytes.Buffer
	code := execute(t.Context(), args, process{strings.NewReader(in), &out, &err, env})
	return result{code, out.String(), err.String()}
}

func (r result) want(t *testing.T, code int, out, err string) {
	t.Helper()
	if r.code != code || !regexp.MustCompile(out).MatchString(r.out) || !regexp.MustCompile(err).MatchString(r.err) {
		t.Errorf("it ended with %d, printed %q and %q; want %d, %q and %q", r.code, r.out, r.err, code, out, err)
	}
}

// as reads JSON that a command printed.
func as[T any](t *testing.T, r result) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || r.code != exitOK {
		t.Fatalf("it ended with %d and printed %q, %q: %v", r.code, r.out, r.err, err)
	}
	return v
}

func TestExitCodesAndWhatToDoNext(t *testing.T) {
	t.Parallel()
	nothing := t.TempDir()
	for _, c := range []struct {
		args string
		code int
		err  string
	}{
		{"nonsense", exitUsage, `unknown command "nonsense".*\nSee "coaphub --help"`},
		{"serve --nonsense", exitUsage, `unknown flag: --nonsense\nSee "coaphub serve --help"`},
		{"serve surplus", exitUsage, `"surplus" is one argument too many; write coaphub serve`},
		{"serve --target=coap-gateway,toaster", exitUsage, `--target=coap-gateway,toaster: there is no part "toaster"; there are all, resource-directory`},
		{"serve --config /does/not/exist.yaml", exitFailure, `/does/not/exist.yaml: no such file.*config-unreadable`},
		{"serve --external-address a:b", exitFailure, `externalAddress: "a:b" is neither`},
		{"status", exitFailure, `no hub runs on the data folder .*coaphub serve.*\[hub-not-running\]`},
		{"token", exitFailure, `hub-not-running`},
		{"token --ttl soon", exitUsage, `--ttl: "soon" is not a duration`},
		{"token --ttl 0s", exitUsage, `--ttl`},
		{"onboard", exitUsage, `exactly one of --device-id and --any-device`},
		{"onboard --any-device --device-id " + lamp, exitUsage, `exactly one`},
		{"onboard --any-device --out x", exitUsage, `--out needs --device-id`},
		{"ca issue", exitUsage, `--device-id and --out are needed`},
		{"ca issue --device-id x --out y --validity z", exitUsage, `--validity`},
		{"ca root a b", exitUsage, `"b" is one argument too many`},
		{"devices --online --offline", exitUsage, `--online and --offline`},
		{"devices --token x", exitUsage, `belong to --server`},
		{"devices --server nonsense --token x", exitUsage, `is not a URL`},
		{"devices --server http://127.0.0.1:1", exitUsage, `needs a token`},
		{"devices --server http://127.0.0.1:1 --token x", exitLater, `cannot be reached.*connection refused`},
		{"get", exitUsage, `an argument is missing; write coaphub get DEVICE \[HREF\]`},
		{"get lamp", exitUsage, `"lamp" is not a device ID`},
		{"get " + lamp + " ..", exitUsage, `dot segment`},
		{"history " + lamp + " --since soon", exitUsage, `--since`},
		{"history " + lamp + " --since 2999-01-01T00:00:00Z", exitUsage, `--since`},
		{"agent enroll", exitUsage, `--out is missing`},
		{"agent enroll --out x --server coaps://hub --token t", exitUsage, `is not coaps://host:port`},
		{"agent enroll --out x --server coaps://hub:1", exitUsage, `exactly one of --token`},
		{"agent enroll --out x --server coaps://hub:1 --token t --renew", exitUsage, `exactly one of --token`},
		{"agent enroll --out x --server coaps://hub:1 --token t", exitUsage, `--ca or --ca-sha256 is needed`},
		{"agent enroll --out x --server coaps://hub:1 --token t --ca-sha256 00", exitUsage, `64 hexadecimal digits`},
		{"agent enroll --out x --server coaps://hub:1 --cert f --ca c", exitUsage, `--cert and --key belong together`},
		{"agent enroll --out x --server coaps+tcp://hub:1 --psk-identity i --psk k", exitUsage, `--psk is for`},
		{"agent enroll --out x --server coaps://hub:1 --token t --ca c --before 1d", exitUsage, `--before belongs to --renew`},
		{"simulate --devices 0", exitUsage, `--devices must be`},
		{"simulate --duration never", exitUsage, `--duration`},
		{"simulate --code x", exitUsage, `belong to --device-id`},
		{"simulate --device-id " + lamp, exitUsage, `needs --code and --server`},
		{"simulate --device-id " + lamp + " --code x --server coaps://hub:5684", exitUsage, `needs --cert, or --key`},
		{"simulate --device-id " + lamp + " --code x --server coap://hub:5683 --key y", exitUsage, `--key is for`},
		{"simulate --device-id " + lamp + " --code x --server coaps://hub:5684 --key y --cert z", exitUsage, `exclude each other`},
		{"simulate --device-id " + lamp + " --code x --server coaps+ws://hub:8080 --cert z", exitUsage, `--cert is not for`},
		{"simulate --psk", exitUsage, `--psk goes with --scheme coaps`},
		{"simulate", exitFailure, `hub-not-running`},
		{"user add", exitUsage, `an argument is missing; write coaphub user add NAME`},
		{"user nonsense", exitUsage, `unknown command "nonsense" for "coaphub user"\nSee "coaphub user --help"`},
		{"ca nonsense", exitUsage, `unknown command "nonsense" for "coaphub ca"`},
		{"user roles alice", exitUsage, `an argument is missing; write coaphub user roles NAME ROLE`},
		{"user add alice --password-stdin", exitUsage, `standard input is empty`},
		{"backup", exitUsage, `an argument is missing; write coaphub backup DIR`},
		{"backup x", exitFailure, `is no data folder.*data-missing`},
		{"backup x --with-keys", exitUsage, `--passphrase-file`},
		{"backup x --passphrase-file y", exitUsage, `belongs to --with-keys`},
		{"restore /does/not/exist", exitFailure, `is no backup`},
		{"verify", exitFailure, `is no data folder`},
	} {
		t.Run(c.args, func(t *testing.T) {
			runsWith(t, "", []string{"COAPHUB_DATA=" + nothing}, strings.Fields(c.args)...).want(t, c.code, "^$", c.err)
		})
	}
	if left, err := os.ReadDir(nothing); err != nil || len(left) > 0 {
		t.Errorf("they left %v, %v", left, err)
	}
}

func TestHelpVersionAndCompletion(t *testing.T) {
	t.Parallel()
	runs(t, "--help").want(t, exitOK, `(?s)serve.*status`, "^$")
	runs(t, "version").want(t, exitOK, `^coaphub \S+ .*go1`, "^$")
	if v := as[map[string]any](t, runs(t, "version", "--json")); v["version"] == "" {
		t.Errorf("%v", v)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		runs(t, "completion", shell).want(t, exitOK, "coaphub", "^$")
	}
	root := newRoot(process{})
	for _, cmd := range root.Commands() {
		if cmd.Short == "" {
			t.Errorf("%s says nothing of itself", cmd.Name())
		}
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "c.yaml")
	text := "externalAddress: hub.example\noauthServer: {initialPassword: hush hush hush}\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	runs(t, "config").want(t, exitOK, `(?s)externalAddress: "".*coapGateway:`, "^$")
	runs(t, "config", "--diff").want(t, exitOK, `^\{\}\n$`, "^$")
	r := runsWith(t, "", []string{"COAPHUB_LOG_LEVEL=debug", "COAPHUB_PORT=tcp://10.0.0.1"}, "config", "--diff", "--config", file, "--http-address", "127.0.0.1:9")
	r.want(t, exitOK, `(?s)^externalAddress: hub.example\nlog:\n  level: debug\ngrpcGateway:\n.*address: 127.0.0.1:9\noauthServer:\n  initialPassword: '\*\*\*'\n$`, `warning: .*COAPHUB_PORT`)
	if strings.Contains(r.out, "hush") {
		t.Error("a secret is printed")
	}
	if err := os.WriteFile(file, []byte("apis: {}\nlogg: {}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	runs(t, "config", "--config", file).want(t, exitFailure, "^$", `(?s)apis .*line 1.*another hub.*logg .*line 2.*did you mean "log"`)
}

func TestAgainstARunningHub(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { t.Helper(); return runs(t, append(args, "--data", h.Data)...) }

	on("status").want(t, exitOK, `(?s)hub +`+h.ID+`.*coaps\+tcp +coaps\+tcp://127.*devices +0, 0 of them online.*first login`, "^$")
	if s := as[bundle.Status](t, on("status", "--json")); s.HubID != h.ID || s.Endpoints.HTTP != h.HTTP {
		t.Errorf("%+v", s)
	}
	on("parts").want(t, exitOK, `(?s)^PART +PROCESS.*resource-directory .*serves.*coap-gateway`, "^$")
	ps := as[[]bundle.Part](t, on("parts", "--json"))
	if len(ps) != len(bundle.Targets()) || slices.ContainsFunc(ps, func(p bundle.Part) bool { return p.State != bundle.PartServes || p.Started.IsZero() }) {
		t.Errorf("the parts of a hub in one process are %+v", ps)
	}
	on("status", "--refused").want(t, exitOK, "^TIME +FROM +WHAT", "^nothing was refused")
	if rs := as[[]bundle.Refusal](t, on("status", "--refused", "--json")); rs == nil || len(rs) != 0 {
		t.Errorf("%v", rs)
	}
	on("devices").want(t, exitOK, "^DEVICE .*\n$", "no devices; coaphub onboard")
	on("ca", "root").want(t, exitOK, "^-----BEGIN CERTIFICATE-----", "^$")
	for _, which := range []string{"device", "https", "internal"} {
		on("ca", "root", which).want(t, exitOK, "^-----BEGIN CERTIFICATE-----", "^$")
	}
	on("ca", "root", "other").want(t, exitFailure, "^$", "coaphub: ")

	dir := filepath.Join(t.TempDir(), "with space", "lamp")
	on("ca", "issue", "--device-id", lamp, "--out", dir).want(t, exitOK, "wrote cert.pem", "^$")
	r := on("onboard", "--device-id", lamp, "--out", dir)
	r.want(t, exitOK, `(?s)hub +`+h.ID+`.*provider +coaphub.*coap-client-openssl .*'\S*with space/lamp/cert.pem'.*coaphub simulate --device-id.*cloud_server`, "^$")
	for name, want := range map[string]os.FileMode{"cert.pem": 0o644, "key.pem": 0o600, "ca.pem": 0o644, "signup.cbor": 0o600} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want %o", name, info, err, want)
		}
	}
	if ca, err := os.ReadFile(filepath.Join(dir, "ca.pem")); err != nil || bytes.Count(ca, []byte("BEGIN CERT")) != 2 {
		t.Errorf("ca.pem has %d certificates, %v", bytes.Count(ca, []byte("BEGIN CERT")), err)
	}
	o := as[map[string]any](t, on("onboard", "--any-device", "--json"))
	for _, key := range []string{"hubId", "endpoints", "authorizationProvider", "authorizationCode", "ca", "expiresAt"} {
		if o[key] == nil || o[key] == "" {
			t.Errorf("onboard --json has no %s", key)
		}
	}
	if j := on("onboard", "--device-id", lamp, "--out", dir, "--json"); strings.Contains(j.out, "PRIVATE KEY") {
		t.Error("the key is printed")
	}

	on("user", "add", "alice").want(t, exitOK, `^added alice \(user\)\none-time password: \S+\n$`, "^$")
	runsWith(t, "correct horse battery\n", nil, "user", "add", "bob", "--role", "viewer", "--password-stdin", "--data", h.Data).want(t, exitOK, `^added bob \(viewer\)\n$`, "^$")
	on("user", "list").want(t, exitOK, `(?s)admin .*alice +user +must change.*bob +viewer +active`, "^$")
	on("user", "passwd", "bob").want(t, exitOK, "one-time password", "^$")
	on("user", "roles", "bob", "user", "admin").want(t, exitOK, "^changed bob", "^$")
	on("user", "passwd", "nobody").want(t, exitFailure, "^$", "coaphub: .*account")
	if us := as[[]bundle.User](t, on("user", "list", "--json")); len(us) != 3 {
		t.Errorf("%+v", us)
	}

	on("audit").want(t, exitOK, `(?s)^TIME +USER +DOOR +CALL +TARGET +OUTCOME\n.*socket +POST /users/password +nobody +account-unknown.*POST /users/add +alice +ok`, "^$")
	on("audit", "--json", "--limit", "2").want(t, exitOK, `^\{"number":"\d+".*"target":"nobody".*\}\n\{"number":.*\}\n$`, "^$")
	on("audit", "--limit", "0").want(t, exitUsage, "^$", "--limit is from 1 to 10000")

	token := on("token", "--owner", "alice", "--scope", hub.ScopeRead, "--ttl", "2h")
	token.want(t, exitOK, `^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\n$`, "^$")
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token.out), 0o600); err != nil {
		t.Fatal(err)
	}
	runs(t, "devices", "--server", h.HTTP, "--token-file", file).want(t, exitOK, "^DEVICE", "no devices")
	runsWith(t, token.out, nil, "devices", "--server", h.HTTP+"/", "--token-file", "-").want(t, exitOK, "^DEVICE", "no devices")
	runs(t, "devices", "--server", h.HTTP, "--token", "nonsense").want(t, exitDenied, "", `coaphub: .*\[`)

	// Devices that behave, for a moment.
	on("simulate", "--devices", "2", "--duration", "3s", "--rate", "20").want(t, exitOK, `devices 2 .*signed up 2 `, "^$")
	on("simulate", "--scheme", "coap", "--duration", "2s").want(t, exitFailure, "^$", "the hub has no coap endpoint")
	on("simulate", "--scheme", "http").want(t, exitUsage, "^$", `--scheme: "http" is none of`)
	on("devices").want(t, exitOK, `(?s)simulated.*offline.*oic.d.light`, "^$")
	on("devices", "--online").want(t, exitOK, "^DEVICE .*\n$", "no such devices")
	var dev struct {
		ID string `json:"id"`
	}
	lines := strings.Split(strings.TrimSpace(on("devices", "--json").out), "\n")
	if len(lines) != 2 || json.Unmarshal([]byte(lines[0]), &dev) != nil || dev.ID == "" {
		t.Fatalf("devices --json printed %q", lines)
	}
	on("get", dev.ID).want(t, exitOK, `(?s)HREF.*/light/1 +OK +\{.*"power":\d+`, "^$")
	on("get", dev.ID, "/light/1").want(t, exitOK, `^HREF.*\n/light/1 +OK +\{.*\n$`, "^$")
	on("get", dev.ID, "light//1/", "--json").want(t, exitOK, `"href":"/light/1"`, "^$")
	on("get", dev.ID, "/nothing").want(t, exitNotFound, "^$", `knows no value of /nothing of this device; coaphub get `+dev.ID+` shows`)
	on("get", lamp).want(t, exitOK, `^HREF +STATUS +CONTENT\n$`, "^the hub knows no values of this device; coaphub devices")
	on("history", lamp).want(t, exitOK, `^TIME +EVENT +WHAT\n$`, "^no events; coaphub devices")
	runs(t, "__complete", "--data", h.Data, "get", dev.ID[:4]).want(t, exitOK, "^"+dev.ID+`\tsimulated`, "")
	runs(t, "__complete", "--data", h.Data, "history", dev.ID, "/li").want(t, exitOK, `^/light/1\n`, "")
	runs(t, "__complete", "get", "--data", t.TempDir(), "").want(t, exitOK, "^:4\n", "")
	on("history", dev.ID).want(t, exitOK, `(?s)resourcePublished +.*/light/1.*resourceChanged +/light/1 OK`, "^$")
	on("history", dev.ID, "/light/1", "--since", "1h").want(t, exitOK, `(?s)resourceChanged +/light/1 OK .*\n.*resourceChanged`, "^$")
	on("history", dev.ID, "--since", "2200-01-01T00:00:00Z").want(t, exitOK, `^TIME +EVENT +WHAT\n$`, "^no events since then\n$")
	on("history", dev.ID, "--json").want(t, exitOK, `"resourceChanged":\{`, "^$")

	on("verify").want(t, exitOK, `^2 devices, 0 problems\nsha256:[0-9a-f]{64}\n$`, "^$")
	if v := as[map[string]any](t, on("verify", "--json")); v["devices"] != 2.0 {
		t.Errorf("%v", v)
	}
	phrase, target := filepath.Join(t.TempDir(), "phrase"), filepath.Join(t.TempDir(), "backup")
	if err := os.WriteFile(phrase, []byte("correct horse battery\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	on("backup", target, "--with-keys", "--passphrase-file", phrase).want(t, exitOK, `^backup of hub `+h.ID+` in .*with keys\n$`, "^$")
	on("restore", target).want(t, exitFailure, "^$", "is not empty")
	data := filepath.Join(t.TempDir(), "restored")
	runs(t, "restore", target, "--data", data).want(t, exitOK, `^restored hub `+h.ID, "every device must be onboarded again")
	runs(t, "verify", "--data", data).want(t, exitOK, `^2 devices, 0 problems\nsha256:[0-9a-f]{64}\n$`, "^$")
	with := filepath.Join(t.TempDir(), "restored")
	runs(t, "restore", target, "--data", with, "--with-keys", "--passphrase-file", phrase).want(t, exitOK, `^restored hub`, "^$")
}

func TestOneSimulatedDevice(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	dir := filepath.Join(t.TempDir(), "lamp")
	r := runs(t, "onboard", "--device-id", lamp, "--out", dir, "--data", h.Data)
	re := regexp.MustCompile(`(?m)^  coaphub (simulate .*)$`)
	found := re.FindStringSubmatch(r.out)
	if found == nil {
		t.Fatalf("onboard printed no command line: %q", r.out)
	}
	args := append(strings.Fields(strings.ReplaceAll(found[1], "'", "")), "--duration", "5s")
	runs(t, "status", "--device", lamp, "--data", h.Data).want(t, exitFailure, "^$", `not signed in since .*status --refused.*\[device-not-seen\]`)
	runs(t, args...).want(t, exitOK, "device "+lamp+" is online at coaps", "^$")
	// The simulator hung up; the hub may still be at it.
	for end := time.Now().Add(10 * time.Second); ; {
		d := as[bundle.DeviceStatus](t, runs(t, "status", "--device", lamp, "--json", "--data", h.Data))
		if !d.Online && d.Protocol == "coaps+tcp" && d.BytesIn > 0 && d.BytesOut > 0 && d.EndedAt != nil && d.EndReason != "" && d.Session > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("of a device that went: %+v", d)
		}
	}
	runs(t, "status", "--device", lamp, "--data", h.Data).want(t, exitOK,
		`(?s)^device +`+lamp+`\nstate +offline\nprotocol +coaps\+tcp, TLS 1\.3\nfrom +127\.0\.0\.1:\d+\nconnected +since .*, session \d+\n`+
			`bytes +\d+ from the device, \d+ to it\n.*last end +\S+ \S+, \S+`, "^$")
	runs(t, "status", "--device", "lamp", "--data", h.Data).want(t, exitFailure, "^$", "UUID")
	// The code was used: another device with it is told what to do.
	other := filepath.Join(t.TempDir(), "other")
	const id = "d0000000-0000-4000-8000-00000000000b"
	if r := runs(t, "ca", "issue", "--device-id", id, "--out", other, "--data", h.Data); r.code != exitOK {
		t.Fatal(r)
	}
	for i, a := range args {
		args[i] = strings.ReplaceAll(strings.ReplaceAll(a, lamp, id), dir, other)
	}
	runs(t, args...).want(t, exitFailure, "^$", "refused the sign-up; coaphub onboard")
	runs(t, "status", "--refused", "--data", h.Data).want(t, exitOK, `sign-up +`+id, "^$")
}

// Secrets are not written into files that others have open, or may read.
func TestSecretsReplaceFiles(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	dir := t.TempDir()
	old := map[string]*os.File{}
	for _, name := range []string{"key.pem", "signup.cbor"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		old[path] = f
	}
	runs(t, "onboard", "--device-id", lamp, "--out", dir, "--data", h.Data).want(t, exitOK, "wrote cert.pem", "^$")
	for path, f := range old {
		if b, err := io.ReadAll(f); err != nil || len(b) > 0 {
			t.Errorf("who had %s open reads %q, %v", path, b, err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 || info.Size() == 0 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 4 {
		t.Errorf("they left %v, %v", files, err)
	}
}

// Where another provider gives the codes, onboard has none: it prints no command lines that would need one.
func TestOnboardWithAnExternalProvider(t *testing.T) {
	t.Parallel()
	op := issuer.Start(t)
	h := hubtest.Start(t, hubtest.WithConfig(
		`authorization.issuers=[{"authority":"`+op.URL()+`","audience":["hub"]}]`,
		`coapGateway.api.coap.authorization.providers=[{"name":"op","authority":"`+op.URL()+`","clientID":"cloud","redirectURL":"https://localhost/devices"}]`,
	))
	dir := filepath.Join(t.TempDir(), "lamp")
	r := runs(t, "onboard", "--device-id", lamp, "--psk", "--out", dir, "--data", h.Data)
	r.want(t, exitOK, `(?s)provider +op\nauthorize +`+op.URL()+`.*open the authorize address in a browser.*-u \S+ -k \S+ .*wrote cert.pem, key.pem and ca.pem to.*-m get -c`, "^$")
	for _, with := range []string{"simulate", "cloud_server", "-m post", "signup"} {
		if strings.Contains(r.out, with) {
			t.Errorf("without a code it printed %q:\n%s", with, r.out)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "signup.cbor")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a sign-up without a code: %v", err)
	}
}

// A fleet over each: DTLS with certificates and with keys, UDP, plain TCP.
func TestSimulateOverDatagrams(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.plainAddress=127.0.0.1:0"))
	for _, way := range []string{"--scheme coaps", "--scheme coaps --psk", "--scheme coap", "--scheme coap+tcp"} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"simulate", "--devices", "2", "--seed", way, "--duration", "6s", "--data", h.Data}, strings.Fields(way)...)
			runs(t, args...).want(t, exitOK, `devices 2  online 2  signed up 2 `, "^$")
		})
	}
}

// One device over DTLS with a pre-shared key as onboard prints it, and one over UDP without anything but a code.
func TestOneDeviceOverDatagrams(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.plainAddress=127.0.0.1:0"))
	t.Run("dtls", func(t *testing.T) {
		t.Parallel()
		r := runs(t, "onboard", "--device-id", lamp, "--psk", "--data", h.Data)
		found := regexp.MustCompile(`(?m)^  coaphub (simulate .*--key .*)$`).FindStringSubmatch(r.out)
		if found == nil {
			t.Fatalf("onboard printed no command line: %q", r.out)
		}
		// A key that could not be written anywhere is not made: the device keeps its own.
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		runs(t, "onboard", "--device-id", lamp, "--psk", "--out", filepath.Join(file, "lamp"), "--data", h.Data).want(t, exitFailure, "^$", "not a directory")
		args := append(strings.Fields(strings.ReplaceAll(found[1], "'", "")), "--duration", "5s", "--rate", "0")
		runs(t, args...).want(t, exitOK, "device "+lamp+" is online at coaps://", "^$")
		runs(t, "status", "--device", lamp, "--data", h.Data).want(t, exitOK, `(?s)protocol +coaps, DTLS 1\.2`, "^$")
	})
	t.Run("udp", func(t *testing.T) {
		t.Parallel()
		runs(t, "simulate", "--device-id", fan, "--code", h.Code(t, fan), "--server", h.Endpoints.CoAP, "--duration", "5s", "--rate", "1e-12").
			want(t, exitOK, "device "+fan+" is online at coap://", "^$")
		if r := runs(t, "history", fan, "/light/1", "--data", h.Data); r.code != exitOK || strings.Count(r.out, "resourceChanged") > 2 {
			t.Errorf("notified once in many years, it ended with %d: %.300s", r.code, r.out) // what it had at first is there
		}
		// It signed out: nothing else would tell the hub.
		runs(t, "status", "--device", fan, "--data", h.Data).want(t, exitOK, `(?s)state +offline\nprotocol +coap\n`, "^$")
	})
}

// Devices over WebSocket, on an HTTP port that is plain and on one with TLS: a fleet over each, and a device without
// anything.
func TestSimulateOverWebSocket(t *testing.T) {
	t.Parallel()
	web := "coapGateway.api.coap.webSocket.enabled=true"
	plain := hubtest.Start(t, hubtest.WithConfig(web))
	secure := hubtest.Start(t, hubtest.WithConfig(web, "grpcGateway.api.http.tls=true"))
	for scheme, h := range map[string]*hubtest.Hub{"coap+ws": plain, "coaps+ws": secure} {
		t.Run(scheme, func(t *testing.T) {
			t.Parallel()
			runs(t, "simulate", "--devices", "3", "--scheme", scheme, "--duration", "6s", "--rate", "20", "--data", h.Data).
				want(t, exitOK, `devices 3  online 3  signed up 3  links \d+  notified [1-9].*failures 0\n$`, "^$")
		})
	}
	runs(t, "simulate", "--scheme", "coaps+ws", "--duration", "2s", "--data", plain.Data).want(t, exitFailure, "^$", "the hub has no coaps.ws endpoint")
	runs(t, "simulate", "--device-id", fan, "--code", plain.Code(t, fan), "--server", plain.Endpoints.CoAPWS, "--duration", "5s").
		want(t, exitOK, "device "+fan+" is online at coap.ws://", "^$")
}

func TestServeInProcess(t *testing.T) {
	t.Parallel()
	data := filepath.Join(t.TempDir(), "data")
	ctx, stop := context.WithCancel(t.Context())
	r, w := io.Pipe()
	ended := make(chan int, 1)
	var log bytes.Buffer
	go func() {
		ended <- execute(ctx, []string{
			"serve", "--data", data, "--coap-address", "127.0.0.1:0", "--coap-plain-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0",
			"--grpc-address", "127.0.0.1:0", "--admin-address", "", "--enrolment-address", "127.0.0.1:0", "--enrolment-http-address", "127.0.0.1:0", "--external-address", "localhost",
		}, process{nil, w, &log, nil})
		_ = w.Close()
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || !regexp.MustCompile(`^ready .* coap\+tcp=coap\+tcp://127`).MatchString(line) || strings.Contains(line, "admin=") {
		t.Errorf("it printed %q, %v", line, err)
	}
	go func() { _, _ = io.Copy(io.Discard, r) }() // ends with the pipe
	stop()
	if code := <-ended; code != exitOK {
		t.Errorf("it ended with %d: %s", code, log.String())
	}
}

// TestTheRealBinary builds coaphub as users do, and shows what only a process of its own can: signals.
func TestTheRealBinary(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	binary := filepath.Join(dir, "coaphub")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-s -w -X main.version=v1.2.3", "-o", binary, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	out, err := exec.CommandContext(t.Context(), binary, "version").Output()
	if err != nil || !strings.HasPrefix(string(out), "coaphub v1.2.3 ") {
		t.Errorf("version printed %q, %v", out, err)
	}
	for _, signals := range []int{1, 2} {
		cmd := exec.CommandContext(t.Context(), binary, "serve", "--coap-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0", "--enrolment-address", "127.0.0.1:0", "--enrolment-http-address", "127.0.0.1:0")
		cmd.Env = append(slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, bundle.EnvPrefix) }), bundle.EnvData+"="+filepath.Join(dir, "data"))
		var log bytes.Buffer
		cmd.Stderr = &log
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(stdout).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "ready ") {
			t.Fatalf("it printed %q, %v\n%s", line, err, log.String())
		}
		begin := time.Now()
		for range signals {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
		err = cmd.Wait()
		if took := time.Since(begin); took > 5*time.Second {
			t.Errorf("%d signals: it took %s", signals, took)
		}
		var exit *exec.ExitError
		switch {
		case signals == 1 && err != nil:
			t.Errorf("one signal: %v\n%s", err, log.String())
		case signals == 2 && err != nil && (!errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM):
			t.Errorf("two signals: %v\n%s", err, log.String())
		}
	}
}

func TestTextsAreSafeForTerminalsAndShells(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{"plain é": "plain é", "\x1b[2J": "\ufffd[2J", "a\nb": "a\ufffdb", "\u202egpj": "\ufffdgpj"} {
		if got := plain(in); got != want {
			t.Errorf("plain(%q) = %q", in, got)
		}
	}
	for in, want := range map[string]string{"/a/b-1": "/a/b-1", "a b": "'a b'", "it's": `'it'\''s'`, "": "''", "$(x)": "'$(x)'"} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s", in, got)
		}
	}
	passed := func(op string, err error) error { return &hub.Error{Kind: hub.KindOf(err), Op: op, Err: err} }
	for want, err := range map[string]error{
		"the disk is full [disk-full]":             passed("a", fmt.Errorf("b: %w", passed("c", hub.NewError(hub.Unavailable, "disk-full", "the disk is full")))),
		"outer words [outer]":                      &hub.Error{Kind: hub.Invalid, Code: "outer", Text: "outer words", Err: hub.NewError(hub.Invalid, "inner", "inner words")},
		"there is no such thing: gone [not-found]": &hub.Error{Kind: hub.NotFound, Err: errors.New("gone")},
		"read the token: gone":                     fmt.Errorf("read the token: %w", errors.New("gone")),
	} {
		if got := sentence(err); got != want {
			t.Errorf("sentence(%v) = %q, want %q", err, got, want)
		}
	}
	now := time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)
	for in, want := range map[string]time.Time{"1d": now.Add(-24 * time.Hour), "2026-05-01T12:00:00Z": time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)} {
		if got, err := sinceTime("--since", in, now); err != nil || !got.Equal(want) {
			t.Errorf("since %q = %v, %v", in, got, err)
		}
	}
	for in, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1536: "1.5 KiB", 3 << 30: "3.0 GiB"} {
		if got := bytesText(in); got != want {
			t.Errorf("bytesText(%d) = %q", in, got)
		}
	}
}

// A device that sleeps is not simply online: when it will be back is what people ask.
func TestDevicesThatSleep(t *testing.T) {
	t.Parallel()
	now := time.Now()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for i, next := range []time.Time{now.Add(time.Hour), now.Add(-time.Hour), now.Add(-2 * time.Hour)} {
			_, _ = fmt.Fprintf(w, `{"result":{"id":"%d","metadata":{"connection":{"status":"ONLINE"},"twinSynchronization":{"state":"IN_SYNC"},`+
				`"nextContact":"%d","contactInterval":"%d"}}}`+"\n", i, next.UnixNano(), 6*time.Hour)
		}
		_, _ = fmt.Fprintln(w, `{"result":{"id":"3","metadata":{"connection":{"status":"ONLINE"},"twinSynchronization":{"state":"IN_SYNC"}}}}`)
	}))
	defer api.Close()
	at := func(d time.Duration) string { return now.Add(d).Local().Format(time.DateTime) }
	runs(t, "devices", "--server", api.URL, "--token", "x").want(t, exitOK,
		`(?s)0 +online, expected at `+at(time.Hour)+` +in-sync.*1 +online, expected at `+at(-time.Hour)+` .*2 +online, overdue since `+at(-2*time.Hour)+` .*3 +online +in-sync`, "^$")

	var out bytes.Buffer
	next := now.Add(time.Hour)
	d := bundle.DeviceStatus{DeviceID: lamp, Online: true, NextContact: &next, ContactInterval: 6 * 3600}
	if err := printDevice(process{out: &out}, d); err != nil {
		t.Fatal(err)
	}
	result{out: out.String()}.want(t, 0, `(?s)^device +`+lamp+`\nstate +online, expected at `+at(time.Hour)+`\nsleeps +for 6h0m0s at a time\n`, "")
}

// The list of enrolments says for what a device waits, who allowed it before, and of which type one is that was turned down for that.
func TestEnrolmentsForPeople(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	err := printEnrolments(process{out: &out}, []bundle.Enrolment{
		{DeviceID: "1", State: "waiting", Waits: "approval"},
		{DeviceID: "2", State: "waiting", Waits: "terms", User: "eve"},
		{DeviceID: "3", State: "issued", User: "eve", Type: "oic.d.light"},
		{DeviceID: "4", State: "refused", Type: "oic.d.door", Problem: "enrolment-type-not-allowed"},
	}, nil, false, "")
	if err != nil {
		t.Fatal(err)
	}
	result{out: out.String()}.want(t, 0, `(?m)^1 +waiting: approval  .*\n2 +waiting: terms, allowed by eve  .*\n3 +issued by eve .* oic\.d\.light .*\n`+
		`4 +refused .* oic\.d\.door .* enrolment-type-not-allowed$`, "")

	out.Reset()
	err = printGroups(process{out: &out}, []bundle.EnrolmentGroup{
		{ID: "1", Terms: &hub.Terms{Version: "v1"}},
		{ID: "2", Terms: &hub.Terms{Version: "v2", URL: "https://terms.example"}, Accepted: &hub.Acceptance{Version: "v1", User: "eve"}},
		{ID: "3", Terms: &hub.Terms{Version: "v1"}, Accepted: &hub.Acceptance{Version: "v1", User: "eve"}},
	}, nil, false, "")
	if err != nil {
		t.Fatal(err)
	}
	result{out: out.String()}.want(t, 0, `(?m)^1 .* v1, to be accepted .*\n2 .* v2 https://terms.example, to be accepted .*\n3 .* v1, accepted by eve `, "")
}
