package coapgateway

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/revocation"
)

// CASetConfig is one of coapGateway.api.coap.tls.caSets.
type CASetConfig struct {
	// Name of the set, for logs and metrics; unique.
	Name string `yaml:"name"`
	// CAs is files or PEM texts: the roots, and all CAs below them that issue devices' certificates or revocation lists.
	CAs []string `yaml:"cas"`
	// Lists is where revocation lists of the CAs are: http or https URLs, file URLs, or files. What certificates name is not
	// fetched.
	Lists []string `yaml:"lists"`
	// Responder is the URL that is asked for a device's certificate (OCSP) where the lists say nothing of it. Empty: none.
	Responder string `yaml:"responder"`
	// Policy is what becomes of a device of whose certificate nobody knows whether it was revoked, because a list is late or a
	// responder away: closed (default), its account requests are answered by 5.03, or open, it comes in.
	Policy string `yaml:"policy"`
	// Refresh is how long after the last time a list is fetched again at the latest; also sooner, before it ends. 0: an hour.
	Refresh time.Duration `yaml:"refresh"`
}

// Values of CASetConfig.Policy.
const (
	PolicyClosed = "closed"
	PolicyOpen   = "open"
)

const defaultRefresh = time.Hour

// set reads the CAs of a set. Each error begins with the key below it.
func (c CASetConfig) set() (s revocation.Set, errs []error) {
	s = revocation.Set{Name: c.Name, Lists: c.Lists, Responder: c.Responder, Open: c.Policy == PolicyOpen, Refresh: c.Refresh}
	if s.Refresh == 0 {
		s.Refresh = defaultRefresh
	}
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Name == "" {
		bad("name: must be set")
	}
	switch {
	case c.Policy != "" && c.Policy != PolicyClosed && c.Policy != PolicyOpen:
		bad("policy: %q is neither %s nor %s", c.Policy, PolicyClosed, PolicyOpen)
	case c.Policy != "" && len(c.Lists) == 0 && c.Responder == "":
		bad("policy: nobody reads it without lists or responder")
	}
	if s.Refresh < time.Minute {
		bad("refresh: %v is less than 1m", c.Refresh)
	}
	if len(c.Lists) > maxLists {
		bad("lists: there are more than %d", maxLists)
	} else if err := s.Check(); err != nil {
		errs = append(errs, err)
	}
	var err error
	if s.CAs, err = conf.Certificates(c.CAs); err != nil {
		bad("cas: %w", err)
	} else if len(s.CAs) == 0 {
		bad("cas: at least one must be named")
	}
	return s, errs
}

// maxSets and maxLists bound what is fetched.
const maxSets, maxLists = 16, 64

// checkSets returns what is wrong with the sets, as TLSConfig's other keys: by path and text.
func (c *TLSConfig) checkSets(bad func(path, format string, args ...any)) {
	if len(c.CASets) > maxSets {
		bad("caSets", "there are more than %d", maxSets)
		return
	}
	names := map[string]bool{}
	for i, conf := range c.CASets {
		path := fmt.Sprintf("caSets[%d].", i)
		_, errs := conf.set()
		for _, err := range errs {
			key, text, _ := strings.Cut(err.Error(), ": ")
			bad(path+key, "%s", text)
		}
		if names[conf.Name] && conf.Name != "" {
			bad(path+"name", "%q is used twice", conf.Name)
		}
		names[conf.Name] = true
	}
}

// sets reads the CA sets of a configuration.
func (c *TLSConfig) sets() (sets []revocation.Set, err error) {
	for i, conf := range c.CASets {
		s, errs := conf.set()
		if len(errs) > 0 { // files, which may have changed since
			return nil, fmt.Errorf("coapGateway.api.coap.tls.caSets[%d].%w", i, errors.Join(errs...))
		}
		sets = append(sets, s)
	}
	return sets, nil
}

// apart refuses CAs that are trusted without a set, and are one of a set's, or issued by one: a chain would have two tops, and which
// one counts is up to who verifies it.
func apart(sets []revocation.Set, others []*x509.Certificate) error {
	for _, s := range sets {
		for _, ca := range s.CAs {
			for _, other := range others {
				if other.Equal(ca) || other.CheckSignatureFrom(ca) == nil {
					return fmt.Errorf("coapGateway.api.coap.tls.caPool: %s belongs into the set %s", other.Subject, s.Name)
				}
			}
		}
	}
	return nil
}

// revoked reports what is known of a verified chain: that our own authority has revoked its certificate, or that another has.
// It waits for nobody.
func (g *Gateway) revoked(chain []*x509.Certificate) bool {
	return g.deps.Revoked(chain[0]) || g.revocation != nil && g.revocation.Known(chain) == revocation.Revoked
}

// unknownAgain is when to come again, while nobody knows whether a certificate was revoked.
const unknownAgain = 30 * time.Second

var errRevocationUnknown = &hub.Error{
	Kind: hub.Unavailable, Code: "revocation-unknown", RetryAfter: unknownAgain,
	Text: "whether the device's certificate was revoked cannot be found out now",
}

// checkRevocation is of a certificate that other authorities issued: theirs may be asked, and may not answer, which is nothing
// against the device.
func (p *peer) checkRevocation(ctx context.Context) error {
	if p.gw.revocation == nil || p.cred.chain == nil {
		return nil
	}
	switch p.gw.revocation.Ask(ctx, p.cred.chain) {
	case revocation.Revoked:
		return errCertificateRevoked
	case revocation.Unknown:
		return errRevocationUnknown
	case revocation.Good:
	}
	return nil
}

var errCertificateRevoked = unauthenticated("certificate-revoked", "the device's certificate was revoked")
