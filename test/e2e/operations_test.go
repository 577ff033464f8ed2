package e2e_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestSecondInstanceIsRefused(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	_, stderr, err := command(t.Context(), append([]string{"serve", "--data", p.data}, loopback...)...)
	if err == nil || !strings.Contains(stderr, "in use") {
		t.Fatalf("a second hub on the same data folder: %v, %q", err, stderr)
	}
	if p.status().HubID == "" {
		t.Error("the first hub does not answer any more")
	}
}

func TestTakenPortNamesTheFlag(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	args := append([]string{"serve", "--data", t.TempDir()}, loopback...)
	_, stderr, err := command(t.Context(), append(args, "--http-address", strings.TrimPrefix(p.ready["http"], "http://"))...)
	if err == nil || !strings.Contains(stderr, "--http-address") {
		t.Fatalf("a taken port: %v, %q", err, stderr)
	}
}

func TestGracefulStop(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	pe, err := dialPeer(t.Context(), p.coaps(), p.onboard(deviceID(1)).tls)
	if err != nil {
		t.Fatal(err)
	}
	defer pe.close()
	start := time.Now()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	err = <-p.ended
	p.ended <- err
	if err != nil {
		t.Errorf("ended with %v\n%s", err, p.log)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("stopping took %v", d)
	}
	if !pe.waitClosed(time.Second) {
		t.Error("the device's connection is still open")
	}
}

func TestStatusWithoutHub(t *testing.T) {
	t.Parallel()
	_, stderr, err := command(t.Context(), "status", "--data", t.TempDir())
	if err == nil || !strings.Contains(stderr, "coaphub serve") {
		t.Errorf("status without a hub: %v, %q", err, stderr)
	}
}

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	id := deviceID(1)
	on := p.onboard(id)
	pe, err := dialPeer(t.Context(), p.coaps(), on.tls)
	if err != nil {
		t.Fatal(err)
	}
	defer pe.close()
	acc, err := signUp(t.Context(), pe, id, on.Code)
	if err != nil {
		t.Fatal(err)
	}
	if err := signIn(t.Context(), pe, id, acc); err != nil {
		t.Fatal(err)
	}
	if ok, err := publish(t.Context(), pe, id, 1, "/kept"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	copied := filepath.Join(t.TempDir(), "backup")
	p.run("backup", copied)
	err = filepath.WalkDir(copied, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), "PRIVATE KEY") {
			t.Errorf("%s has a private key", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	restored := filepath.Join(t.TempDir(), "restored")
	if out, stderr, err := command(t.Context(), "restore", copied, "--data", restored); err != nil {
		t.Fatalf("restore: %v %s%s", err, out, stderr)
	}
	if _, _, err := command(t.Context(), "restore", copied, "--data", restored); err == nil {
		t.Error("restoring over a data folder that is not empty was allowed")
	}
	if out, stderr, err := command(t.Context(), "verify", "--data", restored); err != nil {
		t.Fatalf("verify: %v %s%s", err, out, stderr)
	}
	q := serve(t, restored)
	if q.ready["hub"] != p.ready["hub"] {
		t.Errorf("hub %s became %s", p.ready["hub"], q.ready["hub"])
	}
	token := trim(q.run("token"))
	if status, body := q.get(t.Context(), token, "/api/v1/devices/"+id+"/resource-links"); !strings.Contains(string(body), "/kept") {
		t.Errorf("after restore: %d %s", status, body)
	}
}
