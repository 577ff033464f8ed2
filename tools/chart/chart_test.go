package chart

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	helmchart "helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "write what the chart renders into testdata")

const folder = "../../charts/coaphub"

// cases are values and what they are good for; each has a file in testdata with what the chart makes of it.
var cases = map[string]string{
	"default": ``,
	"full": `
image: {repository: registry.example.com/coaphub, tag: v1.2.3, pullSecrets: [registry]}
config:
  externalAddress: hub.example.com
  log: {level: debug, format: json}
  store: {minFree: 256MiB}
  coapGateway:
    api: {coap: {address: "[::]:5683", maxConnections: 12345678, tls: {certFile: /etc/coaphub/secrets/hub-cert/tls.crt, keyFile: /etc/coaphub/secrets/hub-cert/tls.key}}}
    limits: {device: {rate: 1000000}}
  oauthServer: {initialPassword: {file: /etc/coaphub/secrets/first/password}}
secrets: [hub-cert, first]
env: [{name: COAPHUB_LOG_LEVEL, valueFrom: {configMapKeyRef: {name: levels, key: hub}}}]
storage: {size: 100Gi, className: fast}
backup: {existingClaim: backups}
devices: {type: LoadBalancer, applications: true, annotations: {a/b: "1"}, loadBalancerClass: x/y, loadBalancerSourceRanges: [192.0.2.0/24], split: true}
ingress: {enabled: true, className: nginx, host: api.example.com, annotations: {nginx.ingress.kubernetes.io/backend-protocol: HTTPS}, tlsSecret: api-cert}
serviceMonitor: {enabled: true, labels: {release: prometheus}}
networkPolicy:
  enabled: true
  applications: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: apps}}}]
  monitoring: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
podDisruptionBudget: {enabled: true}
resources: {requests: {cpu: 1, memory: 1Gi}, limits: {memory: 2Gi}}
podAnnotations: {x: "y"}
podLabels: {team: iot}
nodeSelector: {kubernetes.io/arch: arm64}
tolerations: [{key: iot, operator: Exists}]
affinity: {nodeAffinity: {}}
priorityClassName: high
`,
	"closed-doors": `
config:
  enrolmentGateway: {api: {coap: {address: ""}, http: {address: ""}}}
devices: {type: NodePort, externalTrafficPolicy: Cluster}
`,
}

func load(t *testing.T) *helmchart.Chart {
	t.Helper()
	c, err := loader.LoadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func valuesOf(t *testing.T, text string) map[string]any {
	t.Helper()
	v := map[string]any{}
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// render is helm template: the files by their name.
func render(t *testing.T, values string) (map[string]string, error) {
	t.Helper()
	c := load(t)
	v, err := chartutil.ToRenderValues(c, valuesOf(t, values),
		chartutil.ReleaseOptions{Name: "coaphub", Namespace: "iot", Revision: 1, IsInstall: true}, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	out, err := engine.Render(c, v)
	files := map[string]string{}
	for name, text := range out {
		if strings.TrimSpace(text) != "" {
			files[strings.TrimPrefix(name, "coaphub/templates/")] = text
		}
	}
	return files, err
}

// objects are what a cluster gets.
func objects(t *testing.T, files map[string]string) []map[string]any {
	t.Helper()
	var out []map[string]any
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if name == "NOTES.txt" {
			continue
		}
		for part := range strings.SplitSeq("\n"+files[name], "\n---") {
			o := map[string]any{}
			if err := yaml.UnmarshalStrict([]byte(part), &o); err != nil {
				t.Fatalf("%s: %v\n%s", name, err, part)
			}
			if len(o) > 0 {
				out = append(out, o)
			}
		}
	}
	return out
}

// at walks down an object by names.
func at(o any, names ...string) any {
	for _, n := range names {
		m, ok := o.(map[string]any)
		if !ok {
			return nil
		}
		o = m[n]
	}
	return o
}

func TestLint(t *testing.T) {
	for name, values := range cases {
		l := lint.All(folder, valuesOf(t, values), "iot", true)
		for _, m := range l.Messages {
			if m.Severity > support.InfoSev {
				t.Errorf("%s: %v", name, m)
			}
		}
	}
}

// TestGolden compares what the chart renders with testdata; go test -run TestGolden ./... -update writes it there.
func TestGolden(t *testing.T) {
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var b strings.Builder
		for _, f := range slices.Sorted(maps.Keys(files)) {
			fmt.Fprintf(&b, "# %s\n%s\n", f, strings.TrimSpace(files[f]))
		}
		file := filepath.Join("testdata", name+".yaml")
		if *update {
			if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if b.String() != string(want) {
			t.Errorf("%s is another one now; look at the difference after: go test -C tools/chart -run TestGolden -update\n%s", file, b.String())
		}
	}
}

// TestKubernetesSchemas holds every object against the schemas of three releases of Kubernetes, and refuses fields that they do not know.
func TestKubernetesSchemas(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kubectl-validate").Output()
	if err != nil {
		t.Fatal(err)
	}
	schemas := filepath.Join(strings.TrimSpace(string(out)), "pkg/openapiclient/builtins")
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		for _, release := range []string{"1.28", "1.29", "1.30"} {
			checked := 0
			for _, o := range objects(t, files) {
				version, kind := o["apiVersion"].(string), o["kind"].(string)
				if kind == "ServiceMonitor" { // not Kubernetes' own
					continue
				}
				s, err := openAPI(filepath.Join(schemas, release), version)
				if err != nil {
					t.Fatal(err)
				}
				for _, wrong := range s.check(s.kind(version, kind), o, kind) {
					t.Errorf("%s, Kubernetes %s: %s", name, release, wrong)
				}
				checked++
			}
			if checked < 5 {
				t.Errorf("%s: only %d objects were checked", name, checked)
			}
		}
	}
	// The test of the test.
	s, err := openAPI(filepath.Join(schemas, "1.30"), "apps/v1")
	if err != nil {
		t.Fatal(err)
	}
	wrong := s.check(s.kind("apps/v1", "StatefulSet"), map[string]any{
		"apiVersion": "apps/v1", "kind": "StatefulSet", "spec": map[string]any{"replicas": "one", "template": map[string]any{}, "servicename": "x", "selector": map[string]any{}},
	}, "StatefulSet")
	if len(wrong) != 3 { // a wrong type, an unknown field, serviceName is missing
		t.Errorf("of three mistakes it finds %q", wrong)
	}
}

var hub = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "coaphub-chart-")
	if err != nil {
		return "", err
	}
	file := filepath.Join(dir, "coaphub")
	cmd := exec.Command("go", "build", "-ldflags", "-s -w", "-o", file, "./cmd/coaphub")
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build coaphub: %w\n%s", err, out)
	}
	return file, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if file, err := hub(); err == nil {
		_ = os.RemoveAll(filepath.Dir(file))
	}
	os.Exit(code)
}

// TestConfigReachesTheHub has the hub read the file that its pod gets: every key of the values is there, as it was written.
func TestConfigReachesTheHub(t *testing.T) {
	program, err := hub()
	if err != nil {
		t.Fatal(err)
	}
	hubReads := func(file string) map[string]any {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), program, "config", "--config", file)
		cmd.Env = []string{} // nothing of what the test runs in
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("the hub refuses its file: %v\n%s", err, out)
		}
		return valuesOf(t, string(out))
	}
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		var config map[string]any
		for _, o := range objects(t, files) {
			if o["kind"] == "ConfigMap" {
				config = at(o, "data").(map[string]any)
			}
		}
		file := filepath.Join(t.TempDir(), "coaphub.yaml")
		// Files that the configuration names are in the cluster's Secrets.
		text := strings.ReplaceAll(config["coaphub.yaml"].(string), "/etc/coaphub/secrets", secretsFolder(t))
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got := hubReads(file)
		for key, want := range map[string]map[string]string{
			"default": {
				"externalAddress": "coaphub.iot.svc", "admin.api.http.address": "[::]:8081", "grpcGateway.api.http.address": "[::]:8080",
			},
			"full": {
				"externalAddress": "hub.example.com", "log.level": "debug", "coapGateway.api.coap.maxConnections": "1.2345678e+07",
				"coapGateway.limits.device.rate": "1e+06", "grpcGateway.api.http.hosts": "[api.example.com]", "oauthServer.issuer": "https://api.example.com/oauth",
				"store.minFree": "256MiB",
			},
			"closed-doors": {"enrolmentGateway.api.http.address": "", "coapGateway.api.coap.address": "[::]:5684"},
		}[name] {
			if g := fmt.Sprint(at(got, strings.Split(key, ".")...)); g != want {
				t.Errorf("%s: %s is %s, not %s", name, key, g, want)
			}
		}
	}
	// The schema of the values knows the sections that the hub knows.
	file := filepath.Join(t.TempDir(), "empty.yaml")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sections := slices.Sorted(maps.Keys(hubReads(file)))
	var schema map[string]any
	if err := json.Unmarshal(load(t).Schema, &schema); err != nil {
		t.Fatal(err)
	}
	known := at(schema, "properties", "config", "properties").(map[string]any)
	if got := slices.Sorted(maps.Keys(known)); !slices.Equal(got, sections) {
		t.Errorf("the schema knows the sections %v, the hub %v", got, sections)
	}
}

func secretsFolder(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, f := range []string{"hub-cert/tls.crt", "hub-cert/tls.key", "first/password"} {
		file := filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte("a long enough password\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestPod looks at what must hold in any case: who the hub runs as, that ports and probes meet, and that what it names is mounted.
func TestPod(t *testing.T) {
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		var pod, c map[string]any
		os := objects(t, files)
		for _, o := range os {
			if o["kind"] == "StatefulSet" {
				pod = at(o, "spec", "template").(map[string]any)
				c = at(pod, "spec", "containers").([]any)[0].(map[string]any)
			}
		}
		if at(pod, "spec", "securityContext", "runAsNonRoot") != true || at(c, "securityContext", "readOnlyRootFilesystem") != true ||
			at(c, "securityContext", "allowPrivilegeEscalation") != false || fmt.Sprint(at(c, "securityContext", "capabilities", "drop")) != "[ALL]" {
			t.Errorf("%s: the container may too much: %v", name, c["securityContext"])
		}
		ports := map[string]bool{}
		for _, p := range c["ports"].([]any) {
			ports[at(p, "name").(string)] = true
		}
		for _, probe := range []string{"startupProbe", "livenessProbe", "readinessProbe"} {
			if !ports[at(c, probe, "httpGet", "port").(string)] || at(c, probe, "httpGet", "scheme") != "HTTPS" {
				t.Errorf("%s: the %s is %v", name, probe, c[probe])
			}
		}
		mounts := map[string]bool{}
		for _, m := range c["volumeMounts"].([]any) {
			mounts[at(m, "mountPath").(string)] = true
		}
		for _, s := range []string{"/data", "/etc/coaphub/coaphub.yaml"} {
			if !mounts[s] {
				t.Errorf("%s: nothing is mounted at %s", name, s)
			}
		}
		if name == "full" && (!mounts["/etc/coaphub/secrets/first"] || !mounts["/backup"]) {
			t.Errorf("the mounts are %v", mounts)
		}
		labels := at(pod, "metadata", "labels").(map[string]any)
		for _, o := range os {
			if o["kind"] != "Service" {
				continue
			}
			for k, v := range at(o, "spec", "selector").(map[string]any) {
				if labels[k] != v {
					t.Errorf("%s: the Service %v does not find the pod", name, at(o, "metadata", "name"))
				}
			}
			for _, p := range at(o, "spec", "ports").([]any) {
				if !ports[at(p, "targetPort").(string)] {
					t.Errorf("%s: the pod has no port for %v", name, p)
				}
			}
		}
	}
}

// TestMistakesAreRefused gives values that cannot work.
func TestMistakesAreRefused(t *testing.T) {
	for values, want := range map[string]string{
		`replicas: 3`:               "replicas",
		`replicaCount: 3`:           "replicaCount",
		`config: {coapgateway: {}}`: "coapgateway",
		`config: {grpcGateway: {api: {grpc: {address: ""}}}}`:               "grpc",
		`config: {externalAddress: https://x/}`:                             "externalAddress",
		`image: {pullPolicy: Sometimes}`:                                    "pullPolicy",
		`storage: {size: much}`:                                             "size",
		`devices: {type: Loadbalancer}`:                                     "type",
		`ingress: {enabled: true}`:                                          "host",
		`secrets: [A_B]`:                                                    "secrets",
		`resources: {request: {cpu: 1}}`:                                    "request",
		`config: {admin: {api: {http: {address: "127.0.0.1:8081"}}}}`:       "nobody would reach it",
		`config: {admin: {api: {http: {address: ""}}}}`:                     "address",
		`config: {grpcGateway: {api: {http: {address: "localhost:8080"}}}}`: "nobody would reach it",
	} {
		if _, err := render(t, values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", values, err)
		}
	}
}

// TestNotes looks whether each command that the notes print is one of the hub's.
func TestNotes(t *testing.T) {
	program, err := hub()
	if err != nil {
		t.Fatal(err)
	}
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for line := range strings.Lines(files["NOTES.txt"]) {
			_, command, ok := strings.Cut(strings.TrimSpace(line), " -- coaphub ")
			if !ok {
				continue
			}
			n++
			if !strings.Contains(line, "-n iot exec coaphub-0 ") {
				t.Errorf("%s: no such pod: %s", name, line)
			}
			words := slices.DeleteFunc(strings.Fields(command), func(w string) bool { return path.Base(w) != w || w == "admin" || w == "--help" })
			if out, err := exec.CommandContext(t.Context(), program, append(words, "--help")...).CombinedOutput(); err != nil || !strings.Contains(string(out), "coaphub "+strings.Join(words, " ")) {
				t.Errorf("%s: %q is no command: %v\n%s", name, words, err, out)
			}
		}
		if n < 2 {
			t.Errorf("%s: the notes have %d commands", name, n)
		}
	}
}
