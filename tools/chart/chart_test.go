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
	"gateway": `
config: {externalAddress: hub.example.com}
gateway:
  enabled: true
  parents: [{name: edge, namespace: infra, sectionName: https}]
  host: api.example.com
  devices: {coaps-tcp: {name: edge, namespace: infra, sectionName: coaps-tcp}, coaps-udp: {name: edge, namespace: infra, sectionName: coaps-udp}}
devices: {type: ClusterIP}
`,
	"cluster": cluster,
	"cluster-full": overCluster + `
image: {repository: registry.example.com/coaphub, tag: v1.2.3}
config:
  externalAddress: hub.example.com
  cluster: {hubId: 7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a}
  bus: {urls: ["tls://nats-0.nats:4222", "tls://nats-1.nats:4222"], tls: {caFiles: [/etc/coaphub/secrets/nats-ca/ca.crt]}}
  store:
    mongodb: {uri: "mongodb://mongo-0.mongo,mongo-1.mongo/?replicaSet=rs0", user: coaphub, tls: {enabled: true}}
    feed: {replicas: 1}
  coapGateway:
    api: {coap: {externalAddress: "devices.example.com:5684", tls: {clientCertificateRequired: true}, authorization: {deviceIDClaim: device, providers: [{name: idp, authority: "https://idp.example.com", clientID: hub, clientSecretFile: /etc/coaphub/secrets/first/password}]}}}
  authorization: {ownerClaim: owner, deviceIDClaim: device, audience: [hub], issuers: [{authority: "https://idp.example.com"}]}
secrets: [nats-ca, first]
cluster: {existingSecret: "", secret: a text of the cluster's}
mongodb: {password: a password}
nats: {kind: creds, identities: {resource-directory: a, identity-store: b, certificate-authority: c, grpc-gateway: d, coap-gateway: e, enrolment-gateway: f}}
parts:
  oauth-server: null
  coap-gateway: {autoscaling: {minReplicas: 2, maxReplicas: 10, cpu: 60}}
  grpc-gateway: {replicas: 3, autoscaling: {minReplicas: 1, maxReplicas: 3, cpu: 70}}
storage: {className: fast}
devices: {applications: true, split: true, annotations: {external-dns.alpha.kubernetes.io/hostname: devices.example.com}}
doors: {annotations: {external-dns.alpha.kubernetes.io/hostname: hub.example.com}}
ingress: {enabled: true, className: nginx, host: api.example.com, grpc: {host: grpc.example.com, annotations: {nginx.ingress.kubernetes.io/backend-protocol: GRPCS}, tlsSecret: grpc-cert}}
serviceMonitor: {enabled: true}
networkPolicy:
  enabled: true
  applications: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: apps}}}]
  monitoring: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]
podLabels: {team: iot}
`,
	"cluster-one-address": cluster + `
devices: {externalTrafficPolicy: Cluster}
config: {store: {mongodb: {user: coaphub}}, coapGateway: {api: {coap: {externalAddress: ""}}}}
nats: {existingSecret: coaphub-nats}
mongodb: {existingSecret: coaphub-mongodb}
networkPolicy: {enabled: true}
gateway: {enabled: true, parents: [{name: edge}, {name: inner, sectionName: https}], host: api.example.com, grpcHost: grpc.example.com, ca: coaphub-ca}
`,
}

// gatewayAPI is where the version of the Gateway API lies that the chart is for.
var gatewayAPI = sync.OnceValues(func() (string, error) { return moduleFolder("sigs.k8s.io/gateway-api") })

func moduleFolder(module string) (string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	return strings.TrimSpace(string(out)), err
}

// overCluster begins values that are put over values-cluster.yaml, and cluster is the least that must be said then. Several documents
// are put over each other.
const (
	overCluster = "# over values-cluster.yaml"
	cluster     = overCluster + `
config:
  externalAddress: hub.example.com
  cluster: {hubId: 7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a}
  bus: {urls: ["nats://nats.nats.svc:4222"]}
  store: {mongodb: {uri: "mongodb://mongo.mongo.svc/?replicaSet=rs0"}}
  coapGateway: {api: {coap: {externalAddress: "devices.example.com:5684"}}}
---`
)

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
	if strings.HasPrefix(text, overCluster) {
		b, err := os.ReadFile(folder + "/values-cluster.yaml")
		if err != nil {
			t.Fatal(err)
		}
		text = string(b) + "\n---\n" + text
	}
	v := map[string]any{}
	for part := range strings.SplitSeq(text, "\n---") {
		over := map[string]any{}
		if err := yaml.UnmarshalStrict([]byte(part), &over); err != nil {
			t.Fatal(err)
		}
		merge(v, over)
	}
	return v
}

// merge puts values over others as helm -f does, which keeps null.
func merge(v, over map[string]any) {
	for k, o := range over {
		below, isTable := v[k].(map[string]any)
		if above, ok := o.(map[string]any); ok && isTable {
			merge(below, above)
		} else {
			v[k] = o
		}
	}
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
	folder, err := moduleFolder("sigs.k8s.io/kubectl-validate")
	if err != nil {
		t.Fatal(err)
	}
	schemas := filepath.Join(folder, "pkg/openapiclient/builtins")
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		for _, release := range []string{"1.28", "1.29", "1.30"} {
			checked := 0
			for _, o := range objects(t, files) {
				version, kind := o["apiVersion"].(string), o["kind"].(string)
				if kind == "ServiceMonitor" || strings.HasPrefix(version, "gateway.networking.k8s.io/") { // not Kubernetes' own
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

// TestGatewayAPISchemas holds the routes against the definitions of the Gateway API, of the standard channel but for those of layer 4.
func TestGatewayAPISchemas(t *testing.T) {
	folder, err := gatewayAPI()
	if err != nil {
		t.Fatal(err)
	}
	channels := map[string]string{
		"HTTPRoute": "standard", "GRPCRoute": "standard", "BackendTLSPolicy": "standard", "TCPRoute": "experimental", "UDPRoute": "experimental",
	}
	definition := func(kind, version string) *schema {
		t.Helper()
		plural := strings.TrimSuffix(strings.ToLower(kind), "y") + map[bool]string{true: "ies", false: "s"}[strings.HasSuffix(kind, "y")]
		s, err := customResource(filepath.Join(folder, "config/crd", channels[kind], "gateway.networking.k8s.io_"+plural+".yaml"), version)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	checked := map[string]bool{}
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		services := map[string][]float64{}
		var routes []map[string]any
		for _, o := range objects(t, files) {
			kind := o["kind"].(string)
			if kind == "Service" {
				for _, p := range at(o, "spec", "ports").([]any) {
					s := at(o, "metadata", "name").(string)
					services[s] = append(services[s], at(p, "port").(float64))
				}
			}
			version, ok := strings.CutPrefix(o["apiVersion"].(string), "gateway.networking.k8s.io/")
			if !ok {
				continue
			}
			checked[kind] = true
			for _, wrong := range (&document{}).check(definition(kind, version), o, kind) {
				t.Errorf("%s: %s", name, wrong)
			}
			if kind != "BackendTLSPolicy" {
				routes = append(routes, o)
			}
		}
		for _, o := range routes {
			to := at(at(o, "spec", "rules").([]any)[0], "backendRefs").([]any)[0]
			if !slices.Contains(services[at(to, "name").(string)], at(to, "port").(float64)) {
				t.Errorf("%s: %v leads nowhere: %v", name, at(o, "metadata", "name"), to)
			}
		}
	}
	if got, want := slices.Sorted(maps.Keys(checked)), slices.Sorted(maps.Keys(channels)); !slices.Equal(got, want) {
		t.Errorf("there are %v, not %v", got, want)
	}
	// The test of the test.
	wrong := (&document{}).check(definition("UDPRoute", "v1alpha2"), map[string]any{"spec": map[string]any{
		"parentRefs": []any{map[string]any{"name": "edge", "section": "x"}}, "rules": []any{map[string]any{"backendRefs": []any{map[string]any{"port": 1.0}}}},
	}}, "UDPRoute")
	if len(wrong) != 2 { // an unknown field, the backend's name is missing
		t.Errorf("of two mistakes it finds %q", wrong)
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
		folder := secretsFolder(t)
		identityFolder := folder + "/identity"
		text := strings.ReplaceAll(config["coaphub.yaml"].(string), "/etc/coaphub/secrets", folder)
		text = strings.ReplaceAll(text, "/etc/coaphub/identity", identityFolder)
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
			"cluster": {
				"cluster.hubId": "7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a", "cluster.secret": "***", "bus.urls": "[nats://nats.nats.svc:4222]",
				"store.mongodb.uri": "mongodb://mongo.mongo.svc/?replicaSet=rs0", "store.feed.replicas": "3", "bus.nkeyFile": "",
				"coapGateway.api.coap.externalAddress": "devices.example.com:5684", "store.mongodb.password": "",
			},
			"cluster-full": {
				"bus.credentialsFile": identityFolder + "/nats", "store.mongodb.password": "***", "store.mongodb.user": "coaphub", "store.mongodb.tls.enabled": "true",
				"coapGateway.api.coap.tls.clientCertificateRequired": "true", "coapGateway.api.coap.authorization.deviceIDClaim": "device",
				"authorization.ownerClaim": "owner", "authorization.audience": "[hub]", "grpcGateway.api.http.hosts": "[api.example.com]",
			},
			"gateway":             {"grpcGateway.api.http.hosts": "[api.example.com]", "oauthServer.issuer": "https://api.example.com/oauth"},
			"cluster-one-address": {"grpcGateway.api.http.hosts": "[api.example.com]", "bus.nkeyFile": identityFolder + "/nats", "coapGateway.api.coap.externalAddress": ""},
			"closed-doors":        {"enrolmentGateway.api.http.address": "", "coapGateway.api.coap.address": "[::]:5684"},
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
	for _, f := range []string{"hub-cert/tls.crt", "hub-cert/tls.key", "first/password", "nats-ca/ca.crt", "identity/cluster-secret", "identity/mongodb-password", "identity/nats"} {
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

// TestPod looks at what must hold of every pod: who the hub runs as, that ports and probes meet, that what it names is mounted, and that
// every Service's port leads to a pod.
func TestPod(t *testing.T) {
	for name, values := range cases {
		files, err := render(t, values)
		if err != nil {
			t.Fatal(err)
		}
		all := objects(t, files)
		pods := map[string]map[string]any{} // by target; "": the whole hub
		for _, o := range all {
			if o["kind"] != "StatefulSet" && o["kind"] != "Deployment" {
				continue
			}
			pod := at(o, "spec", "template").(map[string]any)
			c := at(pod, "spec", "containers").([]any)[0].(map[string]any)
			target := targetOf(c)
			pods[target] = pod
			checkPod(t, name+"/"+target, pod, c)
			mounts := mountsOf(c)
			if name == "full" && (!mounts["/etc/coaphub/secrets/first"] || !mounts["/backup"]) {
				t.Errorf("the mounts are %v", mounts)
			}
			if kept := o["kind"] == "StatefulSet"; kept != (target == "" || target == "certificate-authority") {
				t.Errorf("%s: %s is a %v", name, target, o["kind"])
			}
			for k, v := range at(o, "spec", "selector", "matchLabels").(map[string]any) {
				if at(pod, "metadata", "labels").(map[string]any)[k] != v {
					t.Errorf("%s: %s does not find its pods", name, target)
				}
			}
		}
		want := []string{""}
		if strings.HasPrefix(values, overCluster) {
			want = targets
			if name == "cluster-full" {
				want = slices.DeleteFunc(slices.Clone(targets), func(s string) bool { return s == "oauth-server" })
			}
		}
		if got := slices.Sorted(maps.Keys(pods)); !slices.Equal(got, slices.Sorted(slices.Values(want))) {
			t.Errorf("%s: the pods are %v", name, got)
		}
		for _, o := range all {
			if o["kind"] != "Service" {
				continue
			}
			for _, p := range at(o, "spec", "ports").([]any) {
				var there []string
				for target, pod := range pods {
					if finds(at(o, "spec", "selector"), pod) && portsOf(at(pod, "spec", "containers").([]any)[0])[at(p, "targetPort").(string)] {
						there = append(there, target)
					}
				}
				// The parts have a port admin each, in Services of their own.
				if len(there) != 1 {
					t.Errorf("%s: the Service %v leads %v to %v", name, at(o, "metadata", "name"), p, there)
				}
			}
			if at(o, "spec", "externalTrafficPolicy") == "Local" {
				found := 0
				for _, pod := range pods {
					if finds(at(o, "spec", "selector"), pod) {
						found++
					}
				}
				if found != 1 {
					t.Errorf("%s: behind %v with Local are pods of %d kinds", name, at(o, "metadata", "name"), found)
				}
			}
		}
	}
}

var targets = []string{"certificate-authority", "coap-gateway", "enrolment-gateway", "grpc-gateway", "identity-store", "oauth-server", "resource-directory"}

// targetOf is what a container is told to run, "" for all.
func targetOf(c any) string {
	args := at(c, "args").([]any)
	if i := slices.Index(args, any("--target")); i >= 0 {
		return args[i+1].(string)
	}
	return ""
}

func finds(selector any, pod map[string]any) bool {
	labels := at(pod, "metadata", "labels").(map[string]any)
	for k, v := range selector.(map[string]any) {
		if labels[k] != v {
			return false
		}
	}
	return true
}

func portsOf(c any) map[string]bool {
	ports := map[string]bool{}
	for _, p := range at(c, "ports").([]any) {
		ports[at(p, "name").(string)] = true
	}
	return ports
}

func mountsOf(c any) map[string]bool {
	mounts := map[string]bool{}
	for _, m := range at(c, "volumeMounts").([]any) {
		mounts[at(m, "mountPath").(string)] = true
	}
	return mounts
}

func checkPod(t *testing.T, name string, pod, c map[string]any) {
	t.Helper()
	if at(pod, "spec", "securityContext", "runAsNonRoot") != true || at(c, "securityContext", "readOnlyRootFilesystem") != true ||
		at(c, "securityContext", "allowPrivilegeEscalation") != false || fmt.Sprint(at(c, "securityContext", "capabilities", "drop")) != "[ALL]" {
		t.Errorf("%s: the container may too much: %v", name, c["securityContext"])
	}
	if at(c, "resources", "requests", "memory") == nil || at(c, "resources", "requests", "cpu") == nil {
		t.Errorf("%s: it asks for no memory, or no CPU", name)
	}
	ports := portsOf(c)
	for _, probe := range []string{"startupProbe", "livenessProbe", "readinessProbe"} {
		if !ports[at(c, probe, "httpGet", "port").(string)] || at(c, probe, "httpGet", "scheme") != "HTTPS" {
			t.Errorf("%s: the %s is %v", name, probe, c[probe])
		}
	}
	mounts := mountsOf(c)
	for _, s := range []string{"/data", "/etc/coaphub/coaphub.yaml"} {
		if !mounts[s] {
			t.Errorf("%s: nothing is mounted at %s", name, s)
		}
	}
}

// TestDocumentedValues renders the file that docs/operations.md has people write for a cluster.
func TestDocumentedValues(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "`cluster.yaml`:\n\n```yaml\n")
	text, _, ok := strings.Cut(rest, "```\n")
	if !ok {
		t.Fatal("there is no cluster.yaml")
	}
	files, err := render(t, overCluster+"\n"+text)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(objects(t, files)); n < 20 {
		t.Errorf("there are only %d objects", n)
	}
}

// TestParts looks at what a cluster is asked for besides pods: that parts with several are spread and kept, scaled by one of the two
// ways, and that each pod has its own account at NATS and no other's.
func TestParts(t *testing.T) {
	files, err := render(t, cases["cluster-full"])
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string][]string{}
	for _, o := range objects(t, files) {
		target, _ := at(o, "metadata", "labels", "app.kubernetes.io/component").(string)
		kind := o["kind"].(string)
		kinds[kind] = append(kinds[kind], target)
		if kind != "Deployment" && kind != "StatefulSet" {
			continue
		}
		if scaled := slices.Contains([]string{"coap-gateway", "grpc-gateway"}, target); scaled == (at(o, "spec", "replicas") != nil) {
			t.Errorf("%s is scaled by %v", target, at(o, "spec", "replicas"))
		}
		pod := at(o, "spec", "template", "spec")
		if at(pod, "topologySpreadConstraints") == nil {
			t.Errorf("%s is not spread", target)
		}
		identity := ""
		for _, v := range at(pod, "volumes").([]any) {
			if at(v, "name") == "identity" {
				identity = fmt.Sprint(at(v, "projected", "sources"))
			}
		}
		if !strings.Contains(identity, "key:"+target+".creds") || strings.Count(identity, ".creds") != 1 || !strings.Contains(identity, "key:secret") {
			t.Errorf("%s is %s", target, identity)
		}
	}
	for kind, want := range map[string][]string{
		"HorizontalPodAutoscaler": {"coap-gateway", "grpc-gateway"},
		"PodDisruptionBudget":     {"coap-gateway", "enrolment-gateway", "identity-store", "resource-directory"},
		"NetworkPolicy":           {"certificate-authority", "coap-gateway", "enrolment-gateway", "grpc-gateway", "identity-store", "resource-directory"},
	} {
		if got := slices.Sorted(slices.Values(kinds[kind])); !slices.Equal(got, want) {
			t.Errorf("there are %ss of %v", kind, got)
		}
	}
}

// TestMistakesAreRefused gives values that cannot work.
func TestMistakesAreRefused(t *testing.T) {
	for values, want := range map[string]string{
		`replicas: 3`:               "replicas",
		`replicaCount: 3`:           "replicaCount",
		`config: {coapgateway: {}}`: "coapgateway",
		`config: {grpcGateway: {api: {grpc: {address: ""}}}}`:                         "grpc",
		`config: {externalAddress: https://x/}`:                                       "externalAddress",
		`image: {pullPolicy: Sometimes}`:                                              "pullPolicy",
		`storage: {size: much}`:                                                       "size",
		`devices: {type: Loadbalancer}`:                                               "type",
		`ingress: {enabled: true}`:                                                    "host",
		`gateway: {enabled: true, host: api.example.com}`:                             "parents",
		`gateway: {enabled: true, parents: [{name: edge}]}`:                           "host",
		`gateway: {enabled: true, parents: [{gateway: edge}], host: api.example.com}`: "name",
		`gateway: {devices: {coaps: {name: edge, sectionName: x}}}`:                   "coaps",
		`gateway: {devices: {coaps-udp: {name: edge}}}`:                               "sectionName",
		"ingress: {enabled: true, host: api.example.com}\ngateway: {enabled: true, parents: [{name: edge}], host: api.example.com}":                                                  "/gateway/enabled",
		"config: {enrolmentGateway: {api: {coap: {address: \"\"}}}}\ngateway: {enabled: true, parents: [{name: edge}], host: x, devices: {enrol-udp: {name: edge, sectionName: x}}}": "does not open",
		`secrets: [A_B]`:                 "secrets",
		`resources: {request: {cpu: 1}}`: "request",
		`config: {admin: {api: {http: {address: "127.0.0.1:8081"}}}}`:                  "nobody would reach it",
		`config: {admin: {api: {http: {address: ""}}}}`:                                "address",
		`config: {grpcGateway: {api: {http: {address: "localhost:8080"}}}}`:            "nobody would reach it",
		`config: {cluster: {secret: in the open}}`:                                     "secret",
		`config: {store: {mongodb: {password: in the open}}}`:                          "password",
		`config: {target: [coap-gateway]}`:                                             "target",
		`parts: {coap-gateway: {}}`:                                                    "resource-directory",
		overCluster:                                                                    "hubId",
		cluster + "\nconfig: {cluster: {hubId: one}}":                                  "hubId",
		cluster + "\nconfig: {bus: {urls: []}}":                                        "urls",
		cluster + "\nconfig: {bus: {urls: [\"nats://user:password@nats\"]}}":           "urls",
		cluster + "\nconfig: {store: {mongodb: {uri: \"mongodb://u:p@mongo\"}}}":       "uri",
		cluster + "\nconfig: {store: {mongodb: {uri: \"\"}}}":                          "uri",
		cluster + "\ncluster: {existingSecret: \"\"}":                                  "cluster",
		cluster + "\ncluster: {existingSecret: \"\", secret: short}":                   "secret",
		cluster + "\ncluster: {secret: one of two that are given}":                     "cluster",
		cluster + "\nnats: {kind: password}":                                           "kind",
		cluster + "\nnats: {identities: {toaster: x}}":                                 "toaster",
		cluster + "\nnats: {identities: {coap-gateway: x}}":                            "has none",
		cluster + "\nmongodb: {existingSecret: x}":                                     "user",
		cluster + "\nparts: {toaster: {}}":                                             "toaster",
		cluster + "\nparts: {certificate-authority: {replicas: 2}}":                    "certificate-authority",
		cluster + "\nparts: {certificate-authority: {autoscaling: {}}}":                "autoscaling",
		cluster + "\nparts: {coap-gateway: {replicas: 0}}":                             "replicas",
		cluster + "\nparts: {coap-gateway: {autoscaling: {maxReplicas: 3}}}":           "minReplicas",
		cluster + "\nparts: {identity-store: null}":                                    "identity-store",
		cluster + "\nparts: {oauth-server: null}":                                      "without an oauth-server",
		cluster + "\nconfig: {coapGateway: {api: {coap: {externalAddress: \"\"}}}}":    "Give gateways for devices an address of their own",
		cluster + "\nconfig: {coapGateway: {api: {coap: {externalAddress: devices}}}}": "externalAddress",
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
			pod := "coaphub-0"
			if strings.HasPrefix(values, overCluster) {
				pod = "deployment/coaphub-grpc-gateway"
			}
			if !strings.Contains(line, "-n iot exec "+pod+" ") {
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
