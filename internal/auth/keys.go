package auth

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"errors"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coaphub/coaphub/hub"
)

// Times of a key set. They trade how soon a change at the provider is seen against how often the provider is asked.
const (
	keysTTL  = time.Hour   // a key that left the set is good for about so long, while the provider answers
	embedTTL = time.Minute // the same for an issuer in this process, where asking costs nothing
	// keysMaxStale is how long known keys go on being used while the provider is away: an outage of a day must not take the
	// fleet down.
	keysMaxStale = 24 * time.Hour
	// negativeTTL is how long a kid that a fetch did not bring is refused without asking again.
	negativeTTL = 30 * time.Second
	// fetchInterval is the least time between two fetches, whoever asks for whatever.
	fetchInterval = 5 * time.Second
	// maxNegative bounds the remembered unknown kids. When it is full the oldest half goes; the fetch interval still holds.
	maxNegative = 1024
	maxKeys     = 256 // of one key set; the rest is ignored
)

var (
	errUnknownKey   = errors.New("the issuer has no key of that ID")
	errKeysOverdue  = errors.New("the issuer's keys could not be fetched")
	errJustFetched  = errors.New("the key is unknown and the keys were fetched just now")
	errVerifierDone = errors.New("the verifier is closed")
)

// keySet caches an issuer's keys. It asks the issuer when a kid is unknown or the cache is old, never because a signature
// is bad, at most once at a time and not more often than its interval.
type keySet struct {
	fetch    func(context.Context) (jose.JSONWebKeySet, error)
	interval time.Duration // fetchInterval, or 0 for an issuer in this process
	ttl      time.Duration
	metrics  *metrics

	ctx  context.Context // ends with the Verifier
	done *sync.WaitGroup // of the Verifier

	mu        sync.Mutex // guards all below; never held while fetching
	keys      map[string]jose.JSONWebKey
	version   uint64    // grows when a fetch brought other keys than before
	fetched   time.Time // when the keys were last fetched successfully; zero: never
	attempted time.Time // when a fetch last ended
	failed    bool      // the last attempt failed
	unknown   map[string]time.Time
	flight    chan struct{} // closed when the fetch under way has ended; nil: none is
}

// key returns the key of that ID. issued is the token's iat, zero when unknown. Errors: errUnknownKey when the issuer
// certainly does not have it; errKeysOverdue or errJustFetched when that could not be found out, or a context's error.
func (s *keySet) key(ctx context.Context, kid string, issued time.Time) (jose.JSONWebKey, uint64, error) {
	started := false // we started a fetch ourselves, after the token came, and it has ended
	for {
		s.mu.Lock()
		now := time.Now()
		age := now.Sub(s.fetched)
		k, known := s.keys[kid]
		idle := s.flight == nil
		limited := !s.attempted.IsZero() && now.Sub(s.attempted) < s.interval
		switch {
		case known && age < s.ttl:
			v := s.version
			s.mu.Unlock()
			return k, v, nil
		case known && age < keysMaxStale && (age < 2*s.ttl || s.failed):
			// A little old, or the provider is away: nobody waits for it.
			if idle && !limited && s.ctx.Err() == nil {
				s.start(kid)
			}
			v := s.version
			s.mu.Unlock()
			return k, v, nil
		case !known && now.Before(s.unknown[kid]):
			s.mu.Unlock()
			return jose.JSONWebKey{}, 0, errUnknownKey
		case s.ctx.Err() != nil:
			s.mu.Unlock()
			return jose.JSONWebKey{}, 0, errVerifierDone
		case started && s.failed, idle && limited && (s.failed || known):
			s.mu.Unlock()
			return jose.JSONWebKey{}, 0, errKeysOverdue
		case idle && limited && !issued.IsZero() && issued.Before(s.fetched.Add(-maxSkew)):
			// The token is older than the keys we have, so its key would be among them if there were one.
			s.mu.Unlock()
			return jose.JSONWebKey{}, 0, errUnknownKey
		case idle && limited:
			s.mu.Unlock()
			return jose.JSONWebKey{}, 0, errJustFetched
		case idle:
			s.start(kid)
			started = true
		}
		flight := s.flight
		s.mu.Unlock()
		select {
		case <-flight:
		case <-ctx.Done():
			return jose.JSONWebKey{}, 0, ctx.Err()
		}
	}
}

// start begins a fetch. It belongs to the key set, not to a caller, whose patience may be shorter than others'; it ends
// after fetchTimeout or with the Verifier, whose Close waits for it. Callers hold mu.
func (s *keySet) start(kid string) {
	s.flight = make(chan struct{})
	s.done.Go(func() { s.refresh(kid) })
}

// current reports whether what was verified under this version of the keys still stands without looking again.
func (s *keySet) current(version uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return version == s.version && time.Since(s.fetched) < s.ttl
}

// refresh fetches the keys once, for kid, and wakes whoever waits.
func (s *keySet) refresh(kid string) {
	ctx, stop := context.WithTimeout(s.ctx, fetchTimeout)
	defer stop()
	set, err := s.fetch(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.attempted, s.failed = now, err != nil
	defer func() { close(s.flight); s.flight = nil }()
	if err != nil {
		s.metrics.fetched("failed")
		return
	}
	s.metrics.fetched("ok")
	keys := make(map[string]jose.JSONWebKey)
	for _, k := range set.Keys {
		if len(keys) < maxKeys && usable(k) {
			keys[k.KeyID] = k
		}
	}
	if !sameKeys(keys, s.keys) {
		s.version++
	}
	s.keys, s.fetched = keys, now
	if _, ok := keys[kid]; ok {
		return
	}
	if len(s.unknown) >= maxNegative {
		for k, until := range s.unknown {
			if now.After(until) || len(s.unknown) > maxNegative/2 {
				delete(s.unknown, k)
			}
		}
	}
	s.unknown[kid] = now.Add(negativeTTL)
}

// usable accepts public keys for signatures that are strong enough. A key without kid cannot be asked for.
func usable(k jose.JSONWebKey) bool {
	if k.KeyID == "" || k.Use != "" && k.Use != "sig" {
		return false
	}
	switch key := k.Key.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() >= 2048
	case *ecdsa.PublicKey:
		return true
	}
	return false // symmetric keys have no place in a public set, private ones neither
}

func sameKeys(a, b map[string]jose.JSONWebKey) bool {
	if len(a) != len(b) {
		return false
	}
	for id, k := range a {
		if other, ok := b[id]; !ok || !equalKey(k, other) {
			return false
		}
	}
	return true
}

func equalKey(a, b jose.JSONWebKey) bool {
	switch k := a.Key.(type) {
	case *rsa.PublicKey:
		return a.Algorithm == b.Algorithm && k.Equal(b.Key)
	case *ecdsa.PublicKey:
		return a.Algorithm == b.Algorithm && k.Equal(b.Key)
	}
	return false
}

// verdict turns a failure to get a key into a hub error.
func verdict(err error) error {
	const op = "auth.Verify"
	if errors.Is(err, errUnknownKey) {
		return badToken(op, "the token's key is unknown", err)
	}
	return unavailable(op, err)
}

func badToken(op, text string, err error) error {
	return (&hub.Error{Kind: hub.Unauthenticated, Code: "token-invalid", Text: text}).With(op, err)
}

func unavailable(op string, err error) error {
	return &hub.Error{
		Kind: hub.Unavailable, Op: op, Code: "provider-unavailable", Text: "the identity provider cannot be asked now",
		RetryAfter: fetchInterval, Err: err,
	}
}
