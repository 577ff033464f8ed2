package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/device"
)

// part is a root or an issuing certificate as coaphub ca list has it.
type part struct{ Root, Kind, ID, State string }

// TestSecurity runs the commands of docs/security.md that put secrets out of use, and looks whether they are.
func TestSecurity(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text2, ok := strings.Cut(string(text), "## Putting a secret out of use\n")
	steps := tourStep.FindAllStringSubmatch(text2, -1)
	if !ok || len(steps) != 6 {
		t.Fatalf("there are %d steps", len(steps))
	}
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(hubProgram(t), filepath.Join(home, "bin", "coaphub")); err != nil {
		t.Fatal(err)
	}
	p := serve(t, filepath.Join(home, "data"))
	lamp := deviceID(1)
	parts := func() (out []part) {
		if err := json.Unmarshal([]byte(p.run("ca", "list", "--json")), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	inUse := func(kind string) string {
		ps := parts()
		i := slices.IndexFunc(ps, func(a part) bool { return a.Root == "device" && a.Kind == kind && a.State == "in use" })
		if i < 0 {
			t.Fatalf("none is in use: %+v", ps)
		}
		return ps[i].ID
	}
	retired := func(id string) {
		t.Helper()
		if ps := parts(); !slices.ContainsFunc(ps, func(a part) bool { return a.ID == id && a.State == "retired" }) {
			t.Errorf("%s is not retired: %+v", id, ps)
		}
	}
	// type runs the commands of a step.
	types := func(step int, set ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		sh := exec.CommandContext(ctx, "sh", "-ec", `PATH="$PWD/bin:$PATH"`+"\n"+steps[step][1])
		sh.Dir = home
		sh.Env = append(os.Environ(), set...)
		var out bytes.Buffer
		sh.Stdout, sh.Stderr = &out, &out
		if err := sh.Run(); err != nil {
			t.Errorf("%s\n%v\n%s", steps[step][1], err, out.String())
		}
		return out.String()
	}
	certificates := func() (out []struct{ Revoked *time.Time }) {
		if err := json.Unmarshal([]byte(p.run("certs", "list", "--device-id", lamp, "--json")), &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	o := p.onboard(lamp)
	leave := lives(t, device.Config{ID: lamp, HubAddr: "coaps+tcp://" + p.coaps(), TLS: o.tls, Provider: o.Provider}, o.Code)
	if !eventually(t.Context(), 20*time.Second, func() bool { return p.status().Online == 1 }) {
		t.Fatal("the device does not come")
	}
	leave()
	types(0, "D="+lamp)
	if cs := certificates(); len(cs) != 2 || cs[0].Revoked != nil || cs[1].Revoked == nil {
		t.Errorf("of the device's certificates the first is to be revoked: %+v", cs)
	}
	if out := types(1); !strings.Contains(out, "password") {
		t.Errorf("a new password: %q", out)
	}
	issuer := inUse("issuing")
	types(2, "ISSUER="+issuer)
	retired(issuer)
	root := inUse("root")
	types(3, "ROOT="+root)
	retired(root)
	if inUse("root") == root || inUse("issuing") == issuer {
		t.Error("nothing has taken their place")
	}

	p.run("ca", "export-root", "--remove", "--out", filepath.Join(home, "root-key.pem"))
	files, err := filepath.Glob(filepath.Join(p.data, "keys", "device-issuing*.pem"))
	if err != nil {
		t.Fatal(err)
	}
	files = slices.DeleteFunc(files, func(f string) bool { return strings.HasSuffix(f, ".retired.pem") })
	if len(files) != 1 {
		t.Fatalf("the issuing key is in %q", files)
	}
	issuer = inUse("issuing")
	o = p.onboard(lamp)
	leave = lives(t, device.Config{ID: lamp, HubAddr: "coaps+tcp://" + p.coaps(), TLS: o.tls, Provider: o.Provider}, o.Code)
	if !eventually(t.Context(), 20*time.Second, func() bool { return p.status().Online == 1 }) {
		t.Fatal("the device does not come with what the newest key has signed")
	}
	types(4, "ISSUER="+issuer, "CERT="+files[0])
	retired(issuer)
	if !eventually(t.Context(), 20*time.Second, func() bool { return p.status().Online == 0 }) {
		t.Error("who has what a stolen key has signed is in")
	}
	leave()
	if out := p.run("ca", "list"); strings.Contains(out, "lacks") {
		t.Errorf("a list lacks what was retired:\n%s", out)
	}

	token := strings.TrimSpace(p.run("token"))
	ask := func(token string) int {
		status, _ := p.get(t.Context(), token, "/api/v1/devices")
		return status
	}
	if status := ask(token); status != http.StatusOK {
		t.Fatalf("a token got %d", status)
	}
	keys := func() map[string]string {
		out := map[string]string{}
		for _, name := range []string{"oauth-signing.json", "oauth-master.json", "oauth-psk.json", "oauth-cursor.json"} {
			b, err := os.ReadFile(filepath.Join(p.data, "keys", name))
			if err != nil {
				t.Error(err)
			}
			out[name] = string(b)
		}
		return out
	}
	before := keys()
	p.kill()
	types(5)
	p = serve(t, p.data)
	for name, old := range before {
		if keys()[name] == old {
			t.Errorf("%s is what it was", name)
		}
	}
	if status := ask(token); status != http.StatusUnauthorized {
		t.Errorf("a token of the former key got %d", status)
	}
	if status := ask(strings.TrimSpace(p.run("token"))); status != http.StatusOK {
		t.Errorf("a token of the new key got %d", status)
	}
}
