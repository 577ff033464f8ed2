package oauthserver

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// secrets are the keys derived from the one master secret of the store.
type secrets struct {
	refresh []byte // derives the next refresh token from the last
	ticket  []byte // seals what the browser carries between two pages
	replay  []byte // seals answers kept for a repeated code
	csrf    []byte
}

func openSecrets(ctx context.Context, docs store.Documents) (secrets, error) {
	var master []byte
	for range maxTries {
		rev, err := read(ctx, docs, collSecrets, "master", &master)
		if err != nil {
			return secrets{}, err
		}
		if rev != 0 {
			break
		}
		master = random(32)
		if err := write(ctx, docs, collSecrets, "master", 0, master); err == nil {
			break
		} else if !hub.IsKind(err, hub.Conflict) {
			return secrets{}, err
		}
		master = nil
	}
	if len(master) != 32 {
		return secrets{}, &hub.Error{Kind: hub.Internal, Op: "read master secret", Err: errors.New("wrong length")}
	}
	var s secrets
	for name, key := range map[string]*[]byte{"refresh": &s.refresh, "ticket": &s.ticket, "replay": &s.replay, "csrf": &s.csrf} {
		var err error
		if *key, err = hkdf.Key(sha256.New, master, nil, "coaphub oauth "+name, 32); err != nil {
			return secrets{}, &hub.Error{Kind: hub.Internal, Op: "derive key", Err: err}
		}
	}
	return s, nil
}

// random returns n bytes nobody can guess.
func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

func mac(key []byte, parts ...[]byte) []byte {
	m := hmac.New(sha256.New, key)
	for _, p := range parts {
		m.Write([]byte{byte(len(p) >> 8), byte(len(p))}) // so that no two lists of parts are the same text
		m.Write(p)
	}
	return m.Sum(nil)
}

// fingerprint is how codes and tokens are stored.
func fingerprint(secret string) string {
	h := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(h[:])
}

// seal encrypts v so that only open with the same key and purpose reads it.
func seal(key []byte, purpose string, v any) (string, error) {
	plain, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	aead, err := newAEAD(key)
	if err != nil {
		return "", err
	}
	return base64.RawURLEncoding.EncodeToString(aead.Seal(nil, nil, plain, []byte(purpose))), nil
}

var errSeal = errors.New("not sealed by this hub for this purpose")

func open(key []byte, purpose, sealed string, v any) error {
	raw, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil {
		return errSeal
	}
	aead, err := newAEAD(key)
	if err != nil {
		return err
	}
	plain, err := aead.Open(nil, nil, raw, []byte(purpose))
	if err != nil {
		return errSeal
	}
	return json.Unmarshal(plain, v)
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
