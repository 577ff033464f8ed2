package coapgateway

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/revocation"
)

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
