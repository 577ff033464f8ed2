package issuer

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// What the provider knows unless a test says otherwise.
const (
	Audience     = "https://hub.example"
	ClientID     = "hub"
	ClientSecret = "hub-secret"
	RedirectURL  = "https://hub.example/callback"
)

// Issuer is one provider. Any goroutine may use it.
type Issuer struct {
	t      testing.TB
	url    string
	server *httptest.Server // nil when it is only a RoundTripper

	keyFetches, discoveries, exchanges atomic.Int64

	mu      sync.Mutex // guards all below
	down    bool
	refuse  int // status of the token endpoint; 0 = normal
	keys    []signingKey
	lost    bool // the key set leaves the newest key out
	codes   map[string]tokens
	refresh map[string]tokens
	revoked []string
	number  int
}

// tokens is what a code or a refresh token is good for: tokens with these claims, which a wrong key signs if they are forged.
type tokens struct {
	claims map[string]any
	forged bool
}

type signingKey struct {
	id  string
	key *rsa.PrivateKey
}

// Start runs a provider on a loopback port until the test ends.
func Start(t testing.TB) *Issuer {
	t.Helper()
	i := newIssuer(t)
	i.server = httptest.NewServer(i)
	i.url = i.server.URL
	t.Cleanup(i.server.Close)
	return i
}

// StartTLS is Start with HTTPS. It returns the certificate to trust.
func StartTLS(t testing.TB) (*Issuer, *x509.Certificate) {
	t.Helper()
	i := newIssuer(t)
	i.server = httptest.NewUnstartedServer(i)
	i.server.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes that a test lets fail
	i.server.StartTLS()
	i.url = i.server.URL
	t.Cleanup(i.server.Close)
	return i, i.server.Certificate()
}

// New makes a provider without a listener: it is reached only as the RoundTripper of an HTTP client, which works inside a
// synctest bubble. Its URL is one that no resolver knows.
func New(t testing.TB) *Issuer {
	t.Helper()
	i := newIssuer(t)
	i.url = "https://issuer.invalid"
	return i
}

func newIssuer(t testing.TB) *Issuer {
	i := &Issuer{t: t, codes: map[string]tokens{}, refresh: map[string]tokens{}}
	i.Rotate()
	return i
}

// URL is the issuer's identifier and base.
func (i *Issuer) URL() string { return i.url }

// Rotate makes a new signing key and keeps the old ones in the key set.
func (i *Issuer) Rotate() {
	i.t.Helper()
	key := nextKey()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.number++
	i.keys = append(i.keys, signingKey{id: fmt.Sprintf("key-%d", i.number), key: key})
}

// DropOldKeys leaves only the newest key in the key set.
func (i *Issuer) DropOldKeys() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys = i.keys[len(i.keys)-1:]
}

// HideNewestKey leaves the newest key out of the key set: its tokens have a kid that nobody can find. ShowKeys undoes it.
func (i *Issuer) HideNewestKey() { i.set(func() { i.lost = true }) }

// ShowKeys undoes HideNewestKey.
func (i *Issuer) ShowKeys() { i.set(func() { i.lost = false }) }

// Down makes every request fail without an answer, Up makes them work again.
func (i *Issuer) Down() { i.set(func() { i.down = true }) }

// Up undoes Down.
func (i *Issuer) Up() { i.set(func() { i.down = false }) }

// RefuseTokens makes the token endpoint answer with status and no useful body; 0 makes it work again.
func (i *Issuer) RefuseTokens(status int) { i.set(func() { i.refuse = status }) }

func (i *Issuer) set(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f()
}

// KeyFetches counts requests for the key set, answered or not.
func (i *Issuer) KeyFetches() int { return int(i.keyFetches.Load()) }

// Discoveries counts requests for the discovery document, answered or not.
func (i *Issuer) Discoveries() int { return int(i.discoveries.Load()) }

// Exchanges counts requests to the token endpoint, answered or not.
func (i *Issuer) Exchanges() int { return int(i.exchanges.Load()) }

// Revoked returns the tokens that were revoked, in order.
func (i *Issuer) Revoked() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.revoked...)
}

// Mint signs an access token with the newest key. Without more it has iss, sub "alice", aud, iat, exp in an hour, jti and
// the scopes devices:read and devices:write; claims override, and a nil value takes a claim away.
func (i *Issuer) Mint(claims map[string]any) string {
	i.t.Helper()
	i.mu.Lock()
	k := i.keys[len(i.keys)-1]
	i.mu.Unlock()
	return i.sign(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: k.key, KeyID: k.id}}, claims)
}

// MintWithForeignKey signs with a key that is not the issuer's but says it is the newest one.
func (i *Issuer) MintWithForeignKey(claims map[string]any) string {
	i.t.Helper()
	i.mu.Lock()
	id := i.keys[len(i.keys)-1].id
	i.mu.Unlock()
	return i.MintWithUnknownKey(id, claims)
}

// MintWithUnknownKey signs with a fresh key under the given key ID ("" = none).
func (i *Issuer) MintWithUnknownKey(kid string, claims map[string]any) string {
	i.t.Helper()
	return i.sign(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: foreignKey(), KeyID: kid}}, claims)
}

func newKey() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err) // crypto/rand never fails
	}
	return key
}

var foreignKey = sync.OnceValue(newKey)

// made are the keys of all issuers of the process, given out in turn: making one takes longer than most tests. The same key
// comes back after len(made) others, under another ID, so an issuer and its neighbours have different ones.
var made = func() (keys [6]func() *rsa.PrivateKey) {
	for n := range keys {
		keys[n] = sync.OnceValue(newKey)
	}
	return keys
}()

var given atomic.Uint32

func nextKey() *rsa.PrivateKey { return made[given.Add(1)%uint32(len(made))]() }

// MintHS256 signs with HS256 and the newest public key as the secret: the old confusion of algorithms.
func (i *Issuer) MintHS256(claims map[string]any) string {
	i.t.Helper()
	i.mu.Lock()
	k := i.keys[len(i.keys)-1]
	i.mu.Unlock()
	der, err := x509.MarshalPKIXPublicKey(&k.key.PublicKey)
	if err != nil {
		i.t.Fatalf("issuer: encode a key: %v", err)
	}
	secret := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return i.sign(jose.SigningKey{Algorithm: jose.HS256, Key: jose.JSONWebKey{Key: secret, KeyID: k.id}}, claims)
}

// MintNone makes a token with algorithm "none" and an empty signature.
func (i *Issuer) MintNone(claims map[string]any) string {
	i.t.Helper()
	body, err := json.Marshal(i.fill(claims))
	if err != nil {
		i.t.Fatalf("issuer: encode claims: %v", err)
	}
	i.mu.Lock()
	id := i.keys[len(i.keys)-1].id
	i.mu.Unlock()
	return b64(fmt.Appendf(nil, `{"alg":"none","typ":"JWT","kid":%q}`, id)) + "." + b64(body) + "."
}

func (i *Issuer) sign(key jose.SigningKey, claims map[string]any) string {
	i.t.Helper()
	signer, err := jose.NewSigner(key, (&jose.SignerOptions{}).WithType("at+jwt"))
	if err != nil {
		i.t.Fatalf("issuer: make a signer: %v", err)
	}
	body, err := json.Marshal(i.fill(claims))
	if err != nil {
		i.t.Fatalf("issuer: encode claims: %v", err)
	}
	signed, err := signer.Sign(body)
	if err != nil {
		i.t.Fatalf("issuer: sign: %v", err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		i.t.Fatalf("issuer: write the token: %v", err)
	}
	return text
}

func (i *Issuer) fill(claims map[string]any) map[string]any {
	now := time.Now()
	all := map[string]any{
		"iss": i.url, "sub": "alice", "aud": Audience, "iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
		"jti": rand.Text(), "scope": "devices:read devices:write",
	}
	maps.Copy(all, claims)
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	return all
}

// Code returns an authorization code that works once and gives tokens with these claims (as Mint takes them).
func (i *Issuer) Code(claims map[string]any) string { return i.code(tokens{claims: claims}) }

// ForgedCode is Code with tokens as MintWithForeignKey makes them: somebody else answers in the issuer's place.
func (i *Issuer) ForgedCode(claims map[string]any) string { return i.code(tokens{claims, true}) }

func (i *Issuer) code(t tokens) string {
	code := "code-" + rand.Text()
	i.set(func() { i.codes[code] = t })
	return code
}

// Refresh returns a refresh token, good for one use, as Code does a code.
func (i *Issuer) Refresh(claims map[string]any) string { return i.refreshToken(tokens{claims: claims}) }

// ForgedRefresh is to Refresh what ForgedCode is to Code.
func (i *Issuer) ForgedRefresh(claims map[string]any) string {
	return i.refreshToken(tokens{claims, true})
}

func (i *Issuer) refreshToken(t tokens) string {
	token := "refresh-" + rand.Text()
	i.set(func() { i.refresh[token] = t })
	return token
}

// RoundTrip serves the request without a network.
func (i *Issuer) RoundTrip(r *http.Request) (*http.Response, error) {
	if base, err := url.Parse(i.url); err != nil || base.Host != r.URL.Host {
		return nil, fmt.Errorf("issuer: no such host %s", r.URL.Host)
	}
	i.mu.Lock()
	down := i.down
	i.mu.Unlock()
	if down {
		i.count(r.URL.Path)
		return nil, fmt.Errorf("issuer: connection refused")
	}
	rec := httptest.NewRecorder()
	i.ServeHTTP(rec, r)
	return rec.Result(), nil
}
