package issuer

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// ServeHTTP answers discovery, key set, token and revocation requests.
func (i *Issuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.count(r.URL.Path)
	i.mu.Lock()
	down := i.down
	i.mu.Unlock()
	if down {
		panic(http.ErrAbortHandler) // the connection breaks, as with a process that died
	}
	switch r.URL.Path {
	case "/.well-known/openid-configuration":
		reply(w, http.StatusOK, map[string]any{
			"issuer": i.url, "jwks_uri": i.url + "/keys", "token_endpoint": i.url + "/token",
			"authorization_endpoint": i.url + "/authorize", "revocation_endpoint": i.url + "/revoke",
			"response_types_supported": []string{"code"}, "subject_types_supported": []string{"public"},
			"id_token_signing_alg_values_supported": []string{"RS256"},
		})
	case "/keys":
		i.mu.Lock()
		keys := i.keys
		if i.lost {
			keys = keys[:len(keys)-1]
		}
		var set jose.JSONWebKeySet
		for _, k := range keys {
			set.Keys = append(set.Keys, jose.JSONWebKey{Key: &k.key.PublicKey, KeyID: k.id, Algorithm: "RS256", Use: "sig"})
		}
		i.mu.Unlock()
		reply(w, http.StatusOK, set)
	case "/token":
		i.token(w, r)
	case "/revoke":
		if i.client(r) {
			i.set(func() {
				token := r.PostFormValue("token")
				i.revoked = append(i.revoked, token)
				delete(i.refresh, token)
			})
			w.WriteHeader(http.StatusOK)
			return
		}
		refuse(w, http.StatusUnauthorized, "invalid_client")
	default:
		http.NotFound(w, r)
	}
}

func (i *Issuer) count(path string) {
	switch path {
	case "/.well-known/openid-configuration":
		i.discoveries.Add(1)
	case "/keys":
		i.keyFetches.Add(1)
	case "/token":
		i.exchanges.Add(1)
	}
}

func (i *Issuer) client(r *http.Request) bool {
	id, secret, ok := r.BasicAuth()
	if !ok {
		id, secret = r.PostFormValue("client_id"), r.PostFormValue("client_secret")
	}
	return r.Method == http.MethodPost && id == ClientID && secret == ClientSecret
}

func (i *Issuer) token(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	status := i.refuse
	i.mu.Unlock()
	switch {
	case status != 0:
		http.Error(w, "refused as the test wished", status)
		return
	case !i.client(r):
		refuse(w, http.StatusUnauthorized, "invalid_client")
		return
	}
	var t tokens
	found := false
	withRefresh := true
	switch r.PostFormValue("grant_type") {
	case "authorization_code":
		code := r.PostFormValue("code")
		i.mu.Lock()
		if r.PostFormValue("redirect_uri") == RedirectURL {
			t, found = i.codes[code]
			delete(i.codes, code) // RFC 6749, 4.1.2: a code works once
		}
		i.mu.Unlock()
	case "refresh_token":
		token := r.PostFormValue("refresh_token")
		i.mu.Lock()
		t, found = i.refresh[token]
		delete(i.refresh, token) // rotation: the old one is gone with its use
		i.mu.Unlock()
	case "client_credentials":
		t.claims, found, withRefresh = map[string]any{"sub": ClientID, "client_id": ClientID}, true, false
	default:
		refuse(w, http.StatusBadRequest, "unsupported_grant_type")
		return
	}
	if !found {
		refuse(w, http.StatusBadRequest, "invalid_grant")
		return
	}
	mint := i.Mint
	if t.forged {
		mint = i.MintWithForeignKey
	}
	body := map[string]any{"access_token": mint(t.claims), "token_type": "Bearer", "expires_in": 3600}
	if withRefresh {
		body["refresh_token"] = i.refreshToken(t)
	}
	w.Header().Set("Cache-Control", "no-store")
	reply(w, http.StatusOK, body)
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func refuse(w http.ResponseWriter, status int, code string) {
	reply(w, status, map[string]string{"error": code, "error_description": strings.ReplaceAll(code, "_", " ")})
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
