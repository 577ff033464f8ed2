package bundle

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// code is the stable code of an error, or "".
func code(err error) string {
	var e *hub.Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func mode(t *testing.T, path string) os.FileMode {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

func TestFolderIsOursAlone(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "a", "data")
	f, err := OpenFolder(path)
	if err != nil {
		t.Fatal(err)
	}
	if m := mode(t, path); m != 0o700 {
		t.Errorf("a new folder has mode %o", m)
	}
	_, err = OpenFolder(path)
	if code(err) != "data-folder-in-use" || !strings.Contains(err.Error(), "--data") || !strings.Contains(err.Error(), "process") {
		t.Errorf("a second opener gets %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	f, err = OpenFolder(path)
	if err != nil {
		t.Fatalf("after its end: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestFolderRefusesWhatIsNotOurs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, code string
		make       func(t *testing.T, path string)
	}{
		{"an empty folder that is open to others", "", func(t *testing.T, path string) {
			if err := os.Mkdir(path, 0o755); err != nil {
				t.Fatal(err)
			}
		}},
		{"a folder of other things", "data-folder-not-ours", func(t *testing.T, path string) {
			if err := errors.Join(os.Mkdir(path, 0o755), os.WriteFile(filepath.Join(path, "thesis.txt"), nil, 0o644)); err != nil {
				t.Fatal(err)
			}
		}},
		{"a file", "data-folder-not-ours", func(t *testing.T, path string) {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"a newer layout", "data-too-new", func(t *testing.T, path string) {
			if err := errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, formatFile), []byte("2\n"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}},
		{"a damaged layout", "data-damaged", func(t *testing.T, path string) {
			if err := errors.Join(os.Mkdir(path, 0o700), os.WriteFile(filepath.Join(path, formatFile), []byte("x"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "data")
			c.make(t, path)
			f, err := OpenFolder(path)
			if c.code == "" {
				if err != nil {
					t.Fatal(err)
				}
				if m := mode(t, path); m != 0o700 {
					t.Errorf("it has mode %o afterwards", m)
				}
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || code(err) != c.code && !strings.Contains(err.Error(), "not a directory") {
				t.Errorf("err = %v, want %s", err, c.code)
			}
		})
	}
}

func TestSealedKeysOpenOnlyWithThePassphrase(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{"device-root.pem": "secret one", "oauth-master.json": "secret two"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sealed, err := sealFolder(dir, []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, []byte("secret")) || bytes.Contains(sealed, []byte("oauth")) {
		t.Error("the sealed keys can be read")
	}
	plain, err := unseal(sealed, []byte("correct horse"))
	if err != nil {
		t.Fatal(err)
	}
	back := filepath.Join(t.TempDir(), "keys")
	if err := unpack(plain, back); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(back, "oauth-master.json")); err != nil || string(b) != "secret two" || mode(t, back) != 0o700 {
		t.Errorf("it comes back as %q, %v", b, err)
	}

	if _, err := unseal(sealed, []byte("correct horsf")); code(err) != "passphrase-wrong" {
		t.Errorf("another passphrase: %v", err)
	}
	if _, err := sealFolder(dir, []byte("short")); code(err) != "passphrase-short" {
		t.Errorf("a short passphrase: %v", err)
	}
	for name, damage := range map[string]func([]byte) []byte{
		"empty":         func([]byte) []byte { return nil },
		"cut":           func(b []byte) []byte { return b[:len(b)-1] },
		"header only":   func(b []byte) []byte { return b[:len(sealMagic)+3] },
		"other magic":   func(b []byte) []byte { b[0] ^= 1; return b },
		"all memory":    func(b []byte) []byte { b[len(sealMagic)+4] = 0xff; return b },
		"endless":       func(b []byte) []byte { b[len(sealMagic)] = 0xff; return b },
		"no lanes":      func(b []byte) []byte { b[len(sealMagic)+11] = 0; return b },
		"a bit at last": func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"another salt":  func(b []byte) []byte { b[len(sealMagic)+13] ^= 1; return b },
	} {
		if _, err := unseal(damage(bytes.Clone(sealed)), []byte("correct horse")); hub.KindOf(err) != hub.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}
