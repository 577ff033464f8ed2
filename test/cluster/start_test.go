package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
)

// TestStartInAnyOrder: parts that start before their servers wait, say for what, and come up. Who does not belong to the hub is refused,
// and told why.
func TestStartInAnyOrder(t *testing.T) {
	w := prepare(t, nil)
	w.begin()
	waits := func(what string) func() bool {
		return func() bool {
			for _, name := range w.order {
				if !strings.Contains(w.parts[name].log.String(), "the start waits for "+what) {
					return false
				}
			}
			return true
		}
	}
	until(t, 30*time.Second, "all to say that they wait for NATS", waits("the NATS servers with JetStream"))
	w.startNATS()
	until(t, 30*time.Second, "all to say that they wait for MongoDB", waits("MongoDB"))
	w.startMongo()
	w.ready()
	for _, name := range w.order { // the first login is no business of whichever process was first
		if _, err := os.Stat(filepath.Join(w.parts[name].data, "first-login")); err == nil {
			t.Errorf("%s has put the first login into its folder", name)
		}
	}
	if u, err := w.parts["app-1"].control.SetPassword(t.Context(), bundle.UserRequest{Name: "admin"}); err != nil || u.Password == "" {
		t.Errorf("a one-time password for the first account: %+v, %v", u, err)
	}
	for _, name := range []string{"is", "ca", "app-1", "app-2", "gw-1", "gw-2"} {
		until(t, patience, name+" to answer", func() bool {
			_, err := w.parts[name].control.Onboard(t.Context(), bundle.OnboardRequest{DeviceID: "00000000-0000-4000-8000-000000000001", Certificate: true})
			return err == nil
		})
	}
	for _, c := range []struct{ name, target, env, says string }{
		{"another secret", "identity-store", "COAPHUB_CLUSTER_SECRET=another secret of the hub", "store-of-another-cluster"},
		{"another hub", "resource-directory", "COAPHUB_CLUSTER_HUBID=7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5b", "store-of-another-hub"},
		{"no URI", "resource-directory", "COAPHUB_STORE_MONGODB_URI=mongo:27017", "store.mongodb.uri"},
		{"no user", "resource-directory", "COAPHUB_STORE_MONGODB_URI=mongodb://nobody:wrong@" + w.store.addr() + "/", "password"},
		{"no part", "resource-directories", "", "there is no part \"resource-directories\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, filepath.Join(programs, "coaphub"), "serve", "--config", w.config, "--data", t.TempDir(), "--target", c.target)
			cmd.Env = append(os.Environ(), c.env)
			began := time.Now()
			out, err := cmd.CombinedOutput()
			if err == nil || ctx.Err() != nil || !strings.Contains(string(out), c.says) {
				t.Errorf("after %v: %v\n%s", time.Since(began), err, out)
			}
			if strings.Contains(string(out), "another secret of") || strings.Contains(string(out), ":wrong@") {
				t.Errorf("it tells a secret:\n%s", out)
			}
		})
	}
	t.Run("another version", func(t *testing.T) { w.refusesAnotherVersion(t) })
}

// refusesAnotherVersion starts a part of a program that speaks another version on the bus: it ends, both versions are named, and those who
// were there go on.
func (w *world) refusesAnotherVersion(t *testing.T) {
	const file, is = "../../internal/bus/frame.go", "\nconst version, batchVersion = 1, 2\n"
	text, err := os.ReadFile(file)
	if err != nil || strings.Count(string(text), is) != 1 {
		t.Fatalf("%s does not have its version where it was: %v", file, err)
	}
	replaced, err := filepath.Abs(file)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	by, overlay, program := filepath.Join(dir, "frame.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "coaphub")
	rules, err := json.Marshal(map[string]any{"Replace": map[string]string{replaced: by}})
	if err := errors.Join(err,
		os.WriteFile(by, []byte(strings.Replace(string(text), is, "\nconst version, batchVersion = 9, 10\n", 1)), 0o600), os.WriteFile(overlay, rules, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-overlay", overlay, "-ldflags", "-s -w -X main.version=v9.9.9", "-o", program, "github.com/coaphub/coaphub/cmd/coaphub")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build another version: %v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "serve", "--config", w.config, "--data", t.TempDir(), "--target", "resource-directory").CombinedOutput()
	if err == nil || ctx.Err() != nil || !strings.Contains(string(out), "this is coaphub v9.9.9, which speaks version 9, and they are coaphub "+ours+", which speak version 1") {
		t.Errorf("%v\n%s", err, out)
	}
	for _, name := range w.order {
		if log := w.parts[name].log.String(); !strings.Contains(log, "a part of another version lives") || !strings.Contains(log, "v9.9.9") {
			t.Errorf("%s does not say that it heard of it", name)
		}
		if _, err := w.parts[name].control.Onboard(t.Context(), bundle.OnboardRequest{DeviceID: "00000000-0000-4000-8000-000000000002", Certificate: true}); err != nil && !strings.HasPrefix(name, "rd") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
