package bundle

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/internal/auth"
	"github.com/coaphub/coaphub/internal/conf"
)

func load(t *testing.T, text string, env ...string) (Config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "coaphub.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, _, err := LoadConfig(file, env)
	if err != nil {
		return c, err
	}
	return c, c.Validate()
}

func TestNoConfigurationIsAGoodOne(t *testing.T) {
	t.Parallel()
	c, warnings, err := LoadConfig("", []string{"COAPHUB_DATA=/elsewhere", "PATH=/bin"})
	if err != nil || len(warnings) > 0 || c.Validate() != nil {
		t.Errorf("%v %v %v", err, warnings, c.Validate())
	}
	// And it can be written down and read back.
	var b bytes.Buffer
	if err := conf.Write(&b, c); err != nil {
		t.Fatal(err)
	}
	again, err := load(t, b.String())
	if err != nil {
		t.Fatalf("%v\n%s", err, b.String())
	}
	b.Reset()
	if err := conf.WriteDiff(&b, again, c); err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(b.String()), "\n") {
		if !strings.HasSuffix(line, "[]") && line != "{}" && !strings.HasSuffix(line, ":") { // an empty list and none are the same
			t.Errorf("it changes by being written: %s", line)
		}
	}
}

func TestKeysOfOtherHubsAreRefusedWithTheNameOfOurs(t *testing.T) {
	t.Parallel()
	_, err := load(t, `
hubID: x
log: {level: debug, encoding: json}
apis: {coap: {address: "0.0.0.0:5684"}}
clients: {eventBus: {nats: {url: "nats://x"}}}
coapGateway:
  api:
    coap:
      requireBatchObserveEnabled: true
      ownerCacheExpiration: 1m
`)
	var ps conf.Problems
	if !errors.As(err, &ps) || len(ps) != 6 {
		t.Fatalf("err = %v, want six problems", err)
	}
	for _, p := range ps {
		if !strings.Contains(p.Text, "of another hub") {
			t.Error(p)
		}
	}
	if !strings.Contains(err.Error(), "log.format") {
		t.Errorf("%v does not name the key of ours", err)
	}
}

func TestMistakesOfAllSectionsComeTogether(t *testing.T) {
	c := Default()
	c.ExternalAddress = "https://hub.example"
	c.Log.Level = "loud"
	c.Admin.API.HTTP.Address = "8081"
	c.CoAPGateway.API.CoAP.KeepAlive.Timeout = 1
	c.CoAPGateway.API.CoAP.Authorization.DeviceIDClaim = "urn:di"
	c.GRPCGateway.API.HTTP.Address = "x"
	c.ResourceDirectory.Workers = 0
	c.IdentityStore.CachedDevices = 0
	c.OAuthServer.Audience = ""
	c.Authorization.OwnerClaim = ""
	err := c.Validate()
	var ps conf.Problems
	if !errors.As(err, &ps) {
		t.Fatalf("err = %v", err)
	}
	for _, path := range []string{
		"externalAddress", "log.level", "admin.api.http.address", "coapGateway.api.coap.keepAlive.timeout",
		"coapGateway.api.coap.authorization.deviceIDClaim", "grpcGateway.api.http.address", "resourceDirectory.workers",
		"identityStore.cachedDevices", "oauthServer.audience", "authorization.ownerClaim",
	} {
		n := 0
		for _, p := range ps {
			if p.Path == path {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%s is reported %d times", path, n)
		}
	}
	if len(ps) != 10 {
		t.Errorf("%d problems:\n%v", len(ps), err)
	}
}

func TestMistakesOfFormAndMeaningComeTogether(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(file, []byte("logg: {}\nlog: {level: loud}\nstore: {minFree: -3}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, err := LoadConfig(file, nil)
	var ps conf.Problems
	if !errors.As(err, &ps) || len(ps) != 3 {
		t.Fatalf("err = %v, want three problems", err)
	}
	for i, path := range []string{"logg", "store.minFree", "log.level"} {
		if ps[i].Path != path {
			t.Errorf("problem %d is of %q, want %q", i, ps[i].Path, path)
		}
	}
	if err := os.WriteFile(file, []byte("log: ["), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := LoadConfig(file, nil); err == nil || !strings.Contains(err.Error(), "a mistake: "+file+": this is not YAML") {
		t.Errorf("err = %v", err)
	}
}

func TestProvidersAndIssuersBelongTogether(t *testing.T) {
	const issuers = "authorization:\n  issuers: [{authority: 'https://op.example', audience: [hub]}]\n"
	const provider = "coapGateway: {api: {coap: {authorization: {providers: [{name: op, authority: 'https://op.example', clientID: c}]}}}}\n"
	for _, c := range []struct{ name, text, problem string }{
		{"both", issuers + provider, ""},
		{"issuers without providers", issuers, "coapGateway.api.coap.authorization.providers"},
		{"providers without issuers", provider, "coapGateway.api.coap.authorization.providers"},
		{"no audience", "authorization: {issuers: [{authority: 'https://op.example'}]}\n" + provider, "authorization.issuers[0].audience"},
		{"provider without client", issuers + strings.Replace(provider, ", clientID: c", "", 1), "coapGateway.api.coap.authorization.providers[0].clientID"},
		{"two claims", issuers + "  deviceIDClaim: a\n" + strings.Replace(provider, "authorization: {", "authorization: {deviceIDClaim: b, ", 1), "coapGateway.api.coap.authorization.deviceIDClaim"},
	} {
		_, err := load(t, c.text)
		if c.problem == "" && err != nil || c.problem != "" && (err == nil || !strings.Contains(err.Error(), c.problem)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.problem)
		}
	}
	if c := Default(); !c.Embedded() {
		t.Error("the default has no provider")
	}
	c := Default()
	c.Authorization.Issuers = []auth.IssuerConfig{{}}
	if c.Embedded() {
		t.Error("the embedded provider stays beside external issuers")
	}
}

func TestTheEnvironmentOverridesTheFile(t *testing.T) {
	t.Parallel()
	c, err := load(t, "coapGateway: {api: {coap: {address: '127.0.0.1:1'}}}\n",
		"COAPHUB_COAPGATEWAY_API_COAP_ADDRESS=127.0.0.1:2", "COAPHUB_RESOURCEDIRECTORY_HISTORY_RETENTION=30d")
	if err != nil || c.CoAPGateway.API.CoAP.Address != "127.0.0.1:2" || c.ResourceDirectory.History.Retention.Hours() != 720 {
		t.Errorf("%+v, %v", c.CoAPGateway.API.CoAP.Address, err)
	}
}

func TestAnUnreadableFileIsNamed(t *testing.T) {
	t.Parallel()
	_, _, err := LoadConfig("/does/not/exist.yaml", nil)
	if code(err) != "config-unreadable" || !strings.Contains(err.Error(), "/does/not/exist.yaml") {
		t.Errorf("err = %v", err)
	}
}
