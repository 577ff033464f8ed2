package certificateauthority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/coaphub/coaphub/hub"
)

func samePublic(key crypto.Signer, c *x509.Certificate) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey)
}

func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the folder of the certification authority: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at the folder of the certification authority: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s can be read by others (mode %o): chmod 700 it", dir, info.Mode().Perm())
	}
	return nil
}

// readSecret reads a file with a private key, which nobody else may read. A file that does not exist is fs.ErrNotExist.
func readSecret(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", file, err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s holds a private key and can be read by others (mode %o): chmod 600 it", file, info.Mode().Perm())
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return text, nil
}

// readPair reads a certificate and its key; the key is nil when the file has none. A file that does not exist is
// fs.ErrNotExist.
func readPair(file string) (*x509.Certificate, crypto.Signer, error) {
	text, err := readSecret(file)
	if err != nil {
		return nil, nil, err
	}
	cert, key, err := parsePair(text)
	if err != nil {
		// Not wrapped in a way that looks like "does not exist": a damaged file must never be replaced by a new one.
		return nil, nil, fmt.Errorf("%s is damaged, restore it from a backup: %w", file, err)
	}
	return cert, key, nil
}

func parsePair(text []byte) (*x509.Certificate, crypto.Signer, error) {
	var cert *x509.Certificate
	var key crypto.Signer
	for rest := bytes.TrimSpace(text); len(rest) > 0; {
		block, tail := pem.Decode(rest)
		if block == nil {
			return nil, nil, errors.New("there is text that is not PEM")
		}
		rest = bytes.TrimSpace(tail)
		switch {
		case block.Type == "CERTIFICATE" && cert == nil:
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("read the certificate: %w", err)
			}
			cert = c
		case block.Type == "PRIVATE KEY" && key == nil:
			k, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, nil, fmt.Errorf("read the private key: %w", err)
			}
			ec, ok := k.(*ecdsa.PrivateKey)
			if !ok {
				return nil, nil, fmt.Errorf("the private key is %T, not ECDSA", k)
			}
			key = ec
		default:
			return nil, nil, fmt.Errorf("there is an unexpected or second %s", block.Type)
		}
	}
	if cert == nil {
		return nil, nil, errors.New("there is no certificate")
	}
	if key != nil && !samePublic(key, cert) {
		return nil, nil, errors.New("certificate and private key do not belong together")
	}
	return cert, key, nil
}

// writePair writes the file whole or not at all, and it is on the disk on return: a root that was given to devices must
// not be lost with the machine's next crash. A nil key is not in it.
func writePair(file string, cert *x509.Certificate, key crypto.Signer) error {
	text, err := pairPEM(cert, key)
	if err != nil {
		return err
	}
	return writeSecret(file, text)
}

// writeNewPair is writePair of a file that must not be there: Conflict.
func writeNewPair(file string, cert *x509.Certificate, key crypto.Signer) error {
	text, err := pairPEM(cert, key)
	if err != nil {
		return err
	}
	return writeNewSecret(file, text)
}

func pairPEM(cert *x509.Certificate, key crypto.Signer) ([]byte, error) {
	text := certPEM(cert)
	if key != nil {
		keyText, err := keyPEM(key)
		if err != nil {
			return nil, err
		}
		text = append(text, keyText...)
	}
	return text, nil
}

func writeSecret(file string, text []byte) error { return writeWhole(file, text, os.Rename) }

// writeNewSecret is writeSecret of a file that must not be there: Conflict.
func writeNewSecret(file string, text []byte) error {
	err := writeWhole(file, text, func(from, to string) error {
		switch err := os.Link(from, to); {
		case err == nil:
			return os.Remove(from)
		case errors.Is(err, fs.ErrExist):
			return err
		}
		// A file system without links is nobody's but this process's.
		if _, err := os.Lstat(to); err == nil {
			return fs.ErrExist
		}
		return os.Rename(from, to)
	})
	if errors.Is(err, fs.ErrExist) {
		return &hub.Error{Kind: hub.Conflict, Op: "certificateauthority", Err: err}
	}
	return err
}

func writeWhole(file string, text []byte, put func(from, to string) error) (err error) {
	dir := filepath.Dir(file)
	f, err := os.CreateTemp(dir, ".new-*") // CreateTemp makes it 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err = put(f.Name(), file); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return syncDir(dir)
}

// syncDir puts what was renamed or removed in a folder on the disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	if err = errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func keyPEM(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode a private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
