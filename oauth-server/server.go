package oauthserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
	"github.com/coaphub/coaphub/internal/store"
)

// sweepEvery is how often documents that nobody needs any more are removed.
const sweepEvery = time.Hour

// Ownership says who owns a device; the identity store is one.
type Ownership interface {
	// Owner returns who owns the device; NotFound if nobody does.
	Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error)
}

// Server is the provider. All methods are safe for concurrent use; several processes may work on the same documents.
type Server struct {
	cfg       Config
	docs      store.Documents
	standing  *standing // the same, for what it remembers
	ownership Ownership
	log       *slog.Logger
	metrics   *metrics
	clock     *clock.Watch // says what has ended, of all that devices hold and that is stored

	issuer  string
	first   string // one-time password set by this start, or empty
	secrets secrets
	keys    *keys
	hasher  *hasher
	clients map[string]*client
	limits  serverLimits

	provider http.Handler // the library's
}

// Open reads or makes what the provider needs in the store: its issuer, keys and first account. It returns an error of kind
// Invalid for a wrong configuration, also ("issuer-fixed") for another issuer than the stored one.
func Open(ctx context.Context, cfg Config, docs store.Documents, ownership Ownership, log *slog.Logger, reg prometheus.Registerer) (*Server, error) {
	return openWith(ctx, cfg, docs, ownership, log, reg, defaultCost)
}

func openWith(ctx context.Context, cfg Config, docs store.Documents, ownership Ownership, log *slog.Logger, reg prometheus.Registerer, c cost) (*Server, error) {
	return openAt(ctx, cfg, docs, ownership, log, reg, c, clock.New())
}

func openAt(ctx context.Context, cfg Config, docs store.Documents, ownership Ownership, log *slog.Logger, reg prometheus.Registerer, c cost, at *clock.Watch) (*Server, error) {
	if errs := cfg.Validate(); len(errs) > 0 {
		return nil, &hub.Error{Kind: hub.Invalid, Op: "oauthServer", Code: "config-invalid", Err: errors.Join(errs...)}
	}
	stand := &standing{Documents: docs}
	docs = stand
	s := &Server{
		cfg: cfg, docs: docs, standing: stand, ownership: ownership, log: log, metrics: newMetrics(reg), clock: at,
		keys: &keys{docs: docs, lifetime: cfg.KeyLifetime, clock: at}, hasher: newHasher(c),
	}
	var err error
	if s.issuer, err = fixIssuer(ctx, docs, cfg); err != nil {
		return nil, err
	}
	if s.secrets, err = openSecrets(ctx, docs); err != nil {
		return nil, err
	}
	if _, _, err = s.keys.current(ctx); err != nil {
		return nil, err
	}
	if err = s.firstLogin(ctx); err != nil {
		return nil, err
	}
	s.clients, s.limits = clients(cfg, strings.TrimSuffix(cfg.BaseURL, "/"), s.path()+"/login"), newServerLimits()
	if s.provider, err = s.newProvider(); err != nil {
		return nil, &hub.Error{Kind: hub.Invalid, Op: "oauthServer.issuer", Code: "config-invalid", Err: err}
	}
	return s, nil
}

// fixIssuer returns the stored issuer, or stores the one of the first start. Devices and applications hold tokens with it, and
// what they do with another one is not ours to decide.
func fixIssuer(ctx context.Context, docs store.Documents, cfg Config) (string, error) {
	issuer := cfg.Issuer
	if issuer == "" && cfg.BaseURL != "" {
		issuer = strings.TrimSuffix(cfg.BaseURL, "/") + "/oauth"
	}
	for range maxTries {
		var stored string
		rev, err := read(ctx, docs, collSettings, "issuer", &stored)
		switch {
		case err != nil:
			return "", err
		case rev != 0 && cfg.Issuer != "" && cfg.Issuer != stored:
			return "", &hub.Error{
				Kind: hub.Invalid, Op: "oauthServer.issuer", Code: "issuer-fixed",
				Text: "the issuer was fixed at the first start as " + stored + " and cannot become " + cfg.Issuer,
			}
		case rev != 0:
			return stored, nil
		case issuer == "":
			return "", &hub.Error{Kind: hub.Invalid, Op: "oauthServer.issuer", Code: "config-invalid", Text: "no issuer is configured"}
		}
		if err := write(ctx, docs, collSettings, "issuer", 0, issuer); err != nil && !hub.IsKind(err, hub.Conflict) {
			return "", err
		}
	}
	return "", trouble("fix the issuer", nil)
}

// Issuer is the `iss` of all tokens.
func (s *Server) Issuer() string { return s.issuer }

// Audience is the `aud` of all access tokens.
func (s *Server) Audience() string { return s.cfg.Audience }

// path is the issuer's path, below which everything is served: empty or "/oauth".
func (s *Server) path() string {
	u, err := url.Parse(s.issuer)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(u.Path, "/")
}

// Run rotates keys and removes what outlived its use until ctx ends. The error is always nil.
func (s *Server) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			if _, _, err := s.keys.current(ctx); err != nil {
				s.log.WarnContext(ctx, "signing keys not rotated", "error", err)
			}
			s.sweep(ctx)
		}
	}
}

// sweep removes grants, codes and device codes that ended a repeat window ago or earlier. What the clock leapt over stays: a
// clock that is set wrong for an hour must not cost the fleet its credentials.
func (s *Server) sweep(ctx context.Context) {
	for _, collection := range []string{collGrants, collCodes, collDevices} {
		for doc, err := range s.docs.Range(ctx, collection, "", "") {
			var end struct {
				Expires time.Time `json:"expires"`
				Used    time.Time `json:"used"`
			}
			if err == nil {
				err = decode(collection, doc, &end)
			}
			if err == nil && (!s.clock.Ended(end.Expires.Add(repeatWindow)) || !s.clock.Ended(end.Used.Add(repeatWindow))) {
				continue
			}
			if err == nil {
				err = s.docs.Delete(ctx, collection, doc.Key, doc.Rev)
			}
			if err != nil && !hub.IsKind(err, hub.Conflict) {
				s.log.WarnContext(ctx, "sweep stopped", "collection", collection, "error", err)
				break
			}
		}
	}
}

// unverifiedTokenID reads the jti of an access token whose holder is trusted to name it.
func unverifiedTokenID(token string) (string, bool) {
	t, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return "", false
	}
	var c jwt.Claims
	if err := t.UnsafeClaimsWithoutVerification(&c); err != nil || c.ID == "" {
		return "", false
	}
	return c.ID, true
}
