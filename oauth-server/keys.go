package oauthserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
	"github.com/coaphub/coaphub/internal/store"
)

// publishedAhead is how long a key is in the key set before it signs: longer than any verifier keeps a key set.
const publishedAhead = 24 * time.Hour

// keysFresh is how long this process signs with its copy of the keys. Another process may rotate, but the older key is still good.
const keysFresh = 5 * time.Minute

// signingKey is an ES256 key. It is published from its creation, signs between From and To, and is forgotten when the last
// token it can have signed has ended.
type signingKey struct {
	ID      string    `json:"id"`
	Private []byte    `json:"private"` // PKCS #8
	From    time.Time `json:"from"`
	To      time.Time `json:"to"`

	key *ecdsa.PrivateKey
}

// keyring is the document of all keys, oldest first.
type keyring struct {
	Keys []signingKey `json:"keys"`
}

// keys keeps the signing keys in the store and a copy in memory.
type keys struct {
	docs     store.Documents
	lifetime time.Duration
	clock    *clock.Watch

	mu   sync.Mutex // guards the copy; held while it is renewed, so that a rotation is decided once
	ring []signingKey
	rev  uint64 // of the document that the copy is of; 0 is unknown
	at   time.Time
}

// current returns the key that signs now and all that are published, rotating when it is time.
func (k *keys) current(ctx context.Context) (signingKey, []signingKey, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	now := k.clock.Now()
	if now.Sub(k.at) > keysFresh || now.Before(k.at) || k.due(k.ring, now) {
		if err := k.renew(ctx, now); err != nil {
			// The copy still verifies, and signs as long as its key does.
			if _, ok := signer(k.ring, now); !ok {
				return signingKey{}, nil, err
			}
		}
	}
	key, ok := signer(k.ring, now)
	if !ok {
		return signingKey{}, nil, trouble("signing key", errors.New("no key signs now"))
	}
	return key, k.ring, nil
}

// published returns all keys that are published, also one that another process has made just now: it may sign at once, if there was no
// other any more or a clock leapt, and who asks here for it and does not find it refuses its tokens.
func (k *keys) published(ctx context.Context) ([]signingKey, error) {
	doc, err := k.docs.Get(ctx, collSecrets, "signing")
	if err != nil {
		return nil, trouble("read "+collSecrets, err)
	}
	k.mu.Lock()
	if doc.Rev != k.rev {
		k.at = time.Time{}
	}
	k.mu.Unlock()
	_, ring, err := k.current(ctx)
	return ring, err
}

// renew reads the keys, makes the next one if it is time, and forgets those that nobody needs any more.
func (k *keys) renew(ctx context.Context, now time.Time) error {
	var ring keyring
	for range maxTries {
		ring = keyring{}
		rev, err := read(ctx, k.docs, collSecrets, "signing", &ring)
		if err != nil {
			return err
		}
		if rev == 0 || k.due(ring.Keys, now) {
			if ring.Keys, err = k.rotate(ring.Keys, now); err != nil {
				return err
			}
			if err := write(ctx, k.docs, collSecrets, "signing", rev, ring); hub.IsKind(err, hub.Conflict) {
				continue
			} else if err != nil {
				return err
			}
			rev = 0
		}
		for i := range ring.Keys {
			key, err := x509.ParsePKCS8PrivateKey(ring.Keys[i].Private)
			if err != nil {
				return &hub.Error{Kind: hub.Internal, Op: "parse signing key", Err: err}
			}
			var ok bool
			if ring.Keys[i].key, ok = key.(*ecdsa.PrivateKey); !ok {
				return &hub.Error{Kind: hub.Internal, Op: "parse signing key", Err: errors.New("not ECDSA")}
			}
		}
		k.ring, k.rev, k.at = ring.Keys, rev, now
		return nil
	}
	return trouble("rotate signing keys", nil)
}

// due reports whether a key has to be made (the last one ends within publishedAhead) or can be forgotten.
func (k *keys) due(ring []signingKey, now time.Time) bool {
	return len(ring) == 0 || !now.Before(ring[len(ring)-1].To.Add(-publishedAhead)) || k.outlived(ring[0])
}

// outlived: no token signed by the key can be good any more, also if the clock leapt and is set right again.
func (k *keys) outlived(key signingKey) bool { return k.clock.Ended(key.To.Add(MaxTokenLifetime)) }

func (k *keys) rotate(ring []signingKey, now time.Time) ([]signingKey, error) {
	ring = slices.DeleteFunc(slices.Clone(ring), k.outlived)
	if !k.due(ring, now) {
		return ring, nil
	}
	from := now
	if len(ring) > 0 && ring[len(ring)-1].To.After(now) {
		from = ring[len(ring)-1].To
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	id := make([]byte, 8)
	_, _ = rand.Read(id) // never fails
	// A lifetime below publishedAhead would make the next key due at once, for ever.
	to := from.Add(max(k.lifetime, 2*publishedAhead))
	return append(ring, signingKey{ID: hex.EncodeToString(id), Private: der, From: from.UTC(), To: to.UTC()}), nil
}

// signer picks the key that signs now; between two, the older one. Keys follow each other without a gap, unless one was made
// while the clock was ahead: it signs before it begins, since a clock that was set right must not leave us without.
func signer(ring []signingKey, now time.Time) (signingKey, bool) {
	for _, k := range ring {
		if now.Before(k.To) {
			return k, true
		}
	}
	return signingKey{}, false
}

// Keys returns the public keys of all tokens that may be good, for verifiers in this process.
func (s *Server) Keys(ctx context.Context) (jose.JSONWebKeySet, error) {
	ring, err := s.keys.published(ctx)
	if err != nil {
		return jose.JSONWebKeySet{}, err
	}
	var set jose.JSONWebKeySet
	for _, k := range ring {
		set.Keys = append(set.Keys, jose.JSONWebKey{KeyID: k.ID, Algorithm: string(jose.ES256), Use: "sig", Key: &k.key.PublicKey})
	}
	return set, nil
}

// signingHandle is op.SigningKey, and op.Key of the public half.
type signingHandle struct {
	id  string
	key any
}

func (h signingHandle) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.ES256 }
func (h signingHandle) Algorithm() jose.SignatureAlgorithm          { return jose.ES256 }
func (h signingHandle) Use() string                                 { return "sig" }
func (h signingHandle) ID() string                                  { return h.id }
func (h signingHandle) Key() any                                    { return h.key }

var (
	_ op.SigningKey = signingHandle{}
	_ op.Key        = signingHandle{}
)
