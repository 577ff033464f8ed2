package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/x509"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// here is the platform of this machine, built from this working tree.
func here(t *testing.T) program {
	t.Helper()
	p := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
	file, err := compile(t.Context(), "../..", t.TempDir(), "v9.9.9", p)
	if err != nil {
		t.Fatal(err)
	}
	return program{p, file}
}

var testSource = source{version: "v9.9.9", revision: "0123456789abcdef0123456789abcdef01234567", created: time.Unix(1_700_000_000, 0).UTC()}

// TestImage builds the image for this machine, and looks at it as those do who run it: at the folder and the file that were written.
func TestImage(t *testing.T) {
	prog := here(t)
	index, err := assemble([]program{prog}, testSource)
	if err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	digest, err := write(index, testSource.version, out)
	if err != nil {
		t.Fatal(err)
	}
	img := readLayout(t, filepath.Join(out, "image"), digest)

	t.Run("says what it is", func(t *testing.T) {
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if c.Config.User != "65532:65532" {
			t.Errorf("it runs as %q", c.Config.User)
		}
		if got := strings.Join(append(slices.Clone(c.Config.Entrypoint), c.Config.Cmd...), " "); got != "/usr/bin/coaphub serve --data /data" {
			t.Errorf("it runs %q", got)
		}
		if _, ok := c.Config.Volumes["/data"]; !ok {
			t.Errorf("volumes: %v", c.Config.Volumes)
		}
		for key, want := range map[string]string{
			"title": "coaphub", "version": "v9.9.9", "revision": testSource.revision, "created": "2023-11-14T22:13:20Z", "licenses": "Apache-2.0",
		} {
			if got := c.Config.Labels["org.opencontainers.image."+key]; got != want {
				t.Errorf("its %s is %q", key, got)
			}
		}
	})

	t.Run("holds nothing else", func(t *testing.T) {
		var got []string
		for h, body := range files(t, img) {
			if !h.ModTime.Equal(testSource.created) {
				t.Errorf("%s is of %v", h.Name, h.ModTime)
			}
			got = append(got, fmt.Sprintf("%s %o %d", h.Name, h.Mode, h.Uid))
			if h.Name == "etc/ssl/certs/ca-certificates.crt" {
				b, err := io.ReadAll(body)
				if err != nil {
					t.Fatal(err)
				}
				if pool := x509.NewCertPool(); !pool.AppendCertsFromPEM(b) || bytes.Count(b, []byte("BEGIN CERTIFICATE")) < 100 {
					t.Error("the certificates cannot be read, or are too few")
				}
			}
		}
		slices.Sort(got)
		want := []string{
			"backup/ 700 65532", "data/ 700 65532", "etc/ 755 0", "etc/group 644 0", "etc/passwd 644 0", "etc/ssl/ 755 0", "etc/ssl/certs/ 755 0",
			"etc/ssl/certs/ca-certificates.crt 644 0", "tmp/ 1777 0", "usr/ 755 0", "usr/bin/ 755 0", "usr/bin/coaphub 755 0",
		}
		if !slices.Equal(got, want) {
			t.Errorf("it holds\n%s\nand not\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})

	t.Run("static", func(t *testing.T) {
		f, err := elf.Open(prog.file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("it has a segment %v: it needs what an empty base does not have", p.Type)
			}
		}
	})

	t.Run("a file that docker load takes", func(t *testing.T) {
		tag, err := name.NewTag("coaphub:v9.9.9")
		if err != nil {
			t.Fatal(err)
		}
		loaded, err := tarball.ImageFromPath(filepath.Join(out, "image.tar"), &tag)
		if err != nil {
			t.Fatal(err)
		}
		want, err := img.ConfigName()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := loaded.ConfigName(); err != nil || got != want {
			t.Errorf("it is %v, %v and not %v", got, err, want)
		}
	})

	t.Run("serves", func(t *testing.T) { serves(t, img) })

	t.Run("push", func(t *testing.T) {
		server := httptest.NewServer(registry.New())
		defer server.Close()
		ref := strings.TrimPrefix(server.URL, "http://") + "/made/coaphub:v9.9.9"
		if err := pushTo(t.Context(), ref, index); err != nil {
			t.Fatal(err)
		}
		parsed, err := name.ParseReference(ref)
		if err != nil {
			t.Fatal(err)
		}
		got, err := remote.Index(parsed)
		if err != nil {
			t.Fatal(err)
		}
		if d, err := got.Digest(); err != nil || d != digest {
			t.Errorf("the registry has %v, %v and not %v", d, err, digest)
		}
		if err := validate.Index(got); err != nil {
			t.Error(err)
		}
	})
}

// TestImageIsReproducible builds two copies of the working tree in different folders: the same input gives the same image, wherever and
// whenever it is built.
func TestImageIsReproducible(t *testing.T) {
	var digests [2]v1.Hash
	var tars [2][]byte
	for i := range digests {
		dir := filepath.Join(t.TempDir(), strings.Repeat("folder", i+1))
		copyTree(t, "../..", dir)
		p := v1.Platform{OS: "linux", Architecture: runtime.GOARCH}
		file, err := compile(t.Context(), dir, t.TempDir(), "v9.9.9", p)
		if err != nil {
			t.Fatal(err)
		}
		index, err := assemble([]program{{p, file}}, testSource)
		if err != nil {
			t.Fatal(err)
		}
		out := t.TempDir()
		if digests[i], err = write(index, "v9.9.9", out); err != nil {
			t.Fatal(err)
		}
		if tars[i], err = os.ReadFile(filepath.Join(out, "image.tar")); err != nil {
			t.Fatal(err)
		}
	}
	if digests[0] != digests[1] {
		t.Errorf("two builds gave %s and %s", digests[0], digests[1])
	}
	if !bytes.Equal(tars[0], tars[1]) {
		t.Error("two builds gave different files")
	}
}

// TestThirtyTwoBits builds the program for the platform with the shortest words that the image is made for: of numbers that do not fit
// them, the compiler finds the constants.
func TestThirtyTwoBits(t *testing.T) {
	p, err := v1.ParsePlatform("linux/arm/v7")
	if err != nil {
		t.Fatal(err)
	}
	file, err := compile(t.Context(), "../..", t.TempDir(), "v9.9.9", *p)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS32 || f.Machine != elf.EM_ARM {
		t.Errorf("it is for %v, %v", f.Machine, f.Class)
	}
}

// TestImageOfSeveralPlatforms looks whether each platform finds its own program.
func TestImageOfSeveralPlatforms(t *testing.T) {
	var programs []program
	for _, s := range []string{"linux/amd64", "linux/arm64", "linux/arm/v7"} {
		p, err := v1.ParsePlatform(s)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "coaphub")
		if err := os.WriteFile(file, []byte(s), 0o755); err != nil {
			t.Fatal(err)
		}
		programs = append(programs, program{*p, file})
	}
	index, err := assemble(programs, testSource)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []string{"linux/amd64", "linux/arm64", "linux/arm/v7"} {
		if got := m.Manifests[i].Platform.String(); got != want {
			t.Errorf("manifest %d is for %s", i, got)
		}
		img, err := index.Image(m.Manifests[i].Digest)
		if err != nil {
			t.Fatal(err)
		}
		c, err := img.ConfigFile()
		if err != nil || c.Platform().String() != want {
			t.Errorf("the image for %s says it is for %v (%v)", want, c.Platform(), err)
		}
		for h, body := range files(t, img) {
			if h.Name != "usr/bin/coaphub" {
				continue
			}
			if b, err := io.ReadAll(body); err != nil || string(b) != want {
				t.Errorf("%s has the program of %q (%v)", want, b, err)
			}
		}
	}
}

// readLayout reads the only image of a layout, which must be in order.
func readLayout(t *testing.T, folder string, digest v1.Hash) v1.Image {
	t.Helper()
	top, err := layout.ImageIndexFromPath(folder)
	if err != nil {
		t.Fatal(err)
	}
	index, err := top.ImageIndex(digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// files are the files and folders of an image, all layers together.
func files(t *testing.T, img v1.Image) func(func(*tar.Header, io.Reader) bool) {
	t.Helper()
	return func(yield func(*tar.Header, io.Reader) bool) {
		rc := mutate.Extract(img)
		defer rc.Close()
		seen := map[string]bool{}
		for r := tar.NewReader(rc); ; {
			h, err := r.Next()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeDir {
				h.Name = strings.TrimSuffix(h.Name, "/") + "/"
			}
			if seen[h.Name] {
				continue
			}
			seen[h.Name] = true
			if !yield(h, r) {
				return
			}
		}
	}
}

// serves unpacks the image and runs what it says, as the user it says, with nothing but the image around it: on loopback only, so the
// addresses are others.
func serves(t *testing.T, img v1.Image) {
	root := t.TempDir()
	for h, body := range files(t, img) {
		file := filepath.Join(root, h.Name)
		var err error
		if h.Typeflag == tar.TypeDir {
			err = os.MkdirAll(file, 0o755)
		} else {
			var b []byte
			if b, err = io.ReadAll(body); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, os.FileMode(h.Mode).Perm()))
			}
		}
		if err == nil && os.Getuid() == 0 {
			err = os.Chown(file, h.Uid, h.Gid)
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid == user {
			if err := os.Chmod(file, os.FileMode(h.Mode).Perm()); err != nil {
				t.Fatal(err)
			}
		}
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	inside := &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: user, Gid: user, NoSetGroups: os.Getuid() != 0}}
	if os.Getuid() != 0 { // only in a namespace of one's own may one change the root
		inside.Cloneflags = syscall.CLONE_NEWUSER
		inside.UidMappings = []syscall.SysProcIDMap{{ContainerID: user, HostID: os.Getuid(), Size: 1}}
		inside.GidMappings = []syscall.SysProcIDMap{{ContainerID: user, HostID: os.Getgid(), Size: 1}}
	}
	run := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), c.Config.Entrypoint[0], args...)
		cmd.Dir, cmd.Env, cmd.SysProcAttr = c.Config.WorkingDir, c.Config.Env, inside
		return cmd
	}
	switch out, err := run("version").CombinedOutput(); {
	case errors.Is(err, syscall.EPERM) && os.Getuid() != 0:
		t.Skip("this user may not make user namespaces: the image cannot be run without root")
	case err != nil || !strings.HasPrefix(string(out), "coaphub v9.9.9"):
		t.Fatalf("version: %v\n%s", err, out)
	}
	serve := run(slices.Concat(c.Config.Cmd, []string{
		"--external-address", "127.0.0.1", "--coap-address", "127.0.0.1:0", "--enrolment-address", "127.0.0.1:0",
		"--enrolment-http-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0",
	})...)
	var log bytes.Buffer
	serve.Stderr = &log
	stdout, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	late := time.AfterFunc(time.Minute, func() { _ = serve.Process.Kill() })
	defer late.Stop()
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		_ = serve.Wait()
		t.Fatalf("no ready line: %v\n%s", err, log.String())
	}
	admin := ""
	for word := range strings.FieldsSeq(line) {
		if v, ok := strings.CutPrefix(word, "admin="); ok {
			admin = v
		}
	}
	resp, err := http.Get(admin + "/ready")
	if err != nil {
		t.Error(err)
	} else {
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("/ready answers %s", resp.Status)
		}
	}
	// What somebody does beside it: docker exec hub coaphub status.
	if out, err := run("status").CombinedOutput(); err != nil || !strings.Contains(string(out), "/data/first-login") {
		t.Errorf("status: %v\n%s", err, out)
	}
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := serve.Wait(); err != nil {
		t.Errorf("it did not stop well: %v\n%s", err, log.String())
	}
	info, err := os.Stat(filepath.Join(root, "data", "store"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; uid == 0 {
		t.Error("the hub ran as root")
	}
}

// copyTree copies what git knows of the working tree.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", "ls-files", "-z")
	cmd.Dir = from
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	for f := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		b, err := os.ReadFile(filepath.Join(from, f))
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted in the working tree
		}
		file := filepath.Join(to, f)
		if err = errors.Join(err, os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, b, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}
