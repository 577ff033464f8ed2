package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/hub"
)

// The files of an identity's folder. cert.pem, key.pem and ca.pem are links into linkNow, which is a link to the folder of one
// certificate: two files cannot be replaced in one step, but a link can. A folder with plain files (coaphub onboard --out) becomes
// one with links when its certificate is replaced.
const (
	linkNow   = ".now"          // -> ".cert-SERIAL"
	linkNew   = ".now.new"      // what is about to become linkNow, or another link
	dirOf     = ".cert-"        // and the serial
	dirBefore = ".cert-before"  // the plain files that were there
	fileNext  = ".next-key.pem" // the key for which there is no certificate yet
)

var identityFiles = []string{"cert.pem", "key.pem", "ca.pem"}

// identity is a folder with a device's key and certificate. One process has it at a time.
type identity struct {
	dir  string
	lock *os.File
}

func openIdentity(dir string) (*identity, error) {
	if err := makeFolder(dir); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open the folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("%s is in use by another coaphub agent: %w", dir, err)
	}
	return &identity{dir, f}, nil
}

func (id *identity) close() { _ = id.lock.Close() }

func (id *identity) path(name string) string { return filepath.Join(id.dir, name) }

// current is the pair that is in the folder, nil if there is none.
func (id *identity) current() (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(id.path("cert.pem"), id.path("key.pem"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("the certificate in %s: %w", id.dir, err)
	}
	return &pair, nil
}

// nextKey is the key that the next certificate is for. It is kept until there is one, so that whoever asks again gets the
// certificate whose answer was lost. have, which may be nil, has another one.
func (id *identity) nextKey(have *tls.Certificate) (crypto.Signer, error) {
	text, err := os.ReadFile(id.path(fileNext))
	if err == nil {
		key, err := parseKey(text)
		if err == nil && (have == nil || !key.PublicKey.Equal(have.Leaf.PublicKey)) { // equal: install did not come to its end
			return key, nil
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the device's key: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	if text, err = keyPEM(key); err != nil {
		return nil, err
	}
	return key, writeFile(id.path(fileNext), text, 0o600)
}

func parseKey(text []byte) (*ecdsa.PrivateKey, error) {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, errors.New("not PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if ec, ok := key.(*ecdsa.PrivateKey); ok {
		return ec, nil
	}
	return nil, errors.Join(errors.New("not a key of ECDSA"), err)
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("write the device's key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// install puts a certificate and its key in place. After each step the folder has the pair that was there, or the new one, and what
// is written is on the disk before a link leads to it: power may fail at any time.
func (id *identity) install(chain []*x509.Certificate, key crypto.Signer, anchors []*x509.Certificate) error {
	steps, err := id.steps(chain, key, anchors)
	for _, step := range steps {
		if err == nil {
			err = step()
		}
	}
	return err
}

func (id *identity) steps(chain []*x509.Certificate, key crypto.Signer, anchors []*x509.Certificate) (steps []func() error, err error) {
	secret, err := keyPEM(key)
	if err != nil {
		return nil, err
	}
	next := dirOf + hub.SerialOf(chain[0].SerialNumber)
	linkAll := func() {
		for _, name := range identityFiles {
			steps = append(steps, func() error { return id.link(filepath.Join(linkNow, name), name) })
		}
	}
	// What is there as plain files moves behind links first; whoever reads them sees no change.
	if id.plain("cert.pem") || id.plain("key.pem") {
		before := map[string][]byte{}
		for _, name := range identityFiles {
			if before[name], err = os.ReadFile(id.path(name)); errors.Is(err, fs.ErrNotExist) {
				delete(before, name)
			} else if err != nil {
				return nil, fmt.Errorf("read %s: %w", name, err)
			}
		}
		steps = append(steps,
			func() error { return id.fill(dirBefore, before) },
			func() error { return id.link(dirBefore, linkNow) })
		linkAll()
	}
	steps = append(steps,
		func() error {
			return id.fill(next, map[string][]byte{"cert.pem": certsPEM(chain...), "key.pem": secret, "ca.pem": certsPEM(anchors...)})
		},
		func() error { return id.link(next, linkNow) })
	linkAll()
	return append(steps, func() error { return id.tidy(next) }), nil
}

// plain reports whether there is a file that is no link.
func (id *identity) plain(name string) bool {
	info, err := os.Lstat(id.path(name))
	return err == nil && info.Mode()&fs.ModeSymlink == 0
}

// tidy removes what is of the past.
func (id *identity) tidy(now string) error {
	if err := os.Remove(id.path(fileNext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a key: %w", err)
	}
	entries, err := os.ReadDir(id.dir)
	if err != nil {
		return fmt.Errorf("read the folder: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), dirOf) && e.Name() != now {
			if err := os.RemoveAll(id.path(e.Name())); err != nil {
				return fmt.Errorf("remove a former certificate: %w", err)
			}
		}
	}
	return nil
}

// fill makes a folder with the files, and has them on the disk.
func (id *identity) fill(name string, files map[string][]byte) error {
	if err := os.MkdirAll(id.path(name), 0o700); err != nil {
		return fmt.Errorf("make a folder: %w", err)
	}
	for file, text := range files {
		mode := os.FileMode(0o644)
		if file == "key.pem" {
			mode = 0o600
		}
		if err := writeFile(filepath.Join(id.path(name), file), text, mode); err != nil {
			return err
		}
	}
	return id.sync(name)
}

// link replaces name, in one step, by a link to what is in the same folder.
func (id *identity) link(to, name string) error {
	if at, err := os.Readlink(id.path(name)); err == nil && at == to {
		return nil
	}
	err := os.Remove(id.path(linkNew))
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = os.Symlink(to, id.path(linkNew))
	}
	if err == nil {
		err = os.Rename(id.path(linkNew), id.path(name))
	}
	if err != nil {
		return fmt.Errorf("put %s in place: %w", name, err)
	}
	return id.sync(".")
}

// sync has a folder's entries on the disk.
func (id *identity) sync(name string) error {
	f, err := os.Open(id.path(name))
	if err != nil {
		return fmt.Errorf("open a folder: %w", err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write a folder to the disk: %w", err)
	}
	return nil
}
