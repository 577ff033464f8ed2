package bundle

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
)

// onboarding is what is to be made for a device, and for whom.
type onboarding struct {
	dev   hub.DeviceID // "": any
	owner hub.Owner
	user  string
	// operator is whoever may open the socket. Nobody asks him whose the device is, what he is given is for whoever has the device,
	// and he may leave out the owner: the first administrator, or whoever an external provider says.
	operator         bool
	certificate, psk bool
}

// onboard is the socket's call.
func (a *assembly) onboard(ctx context.Context, q OnboardRequest) (Onboarding, error) {
	return a.makeOnboarding(ctx, q.DeviceID, q.AnyDevice, onboarding{
		owner: hub.Owner(q.Owner), user: callerOf(ctx), operator: true, certificate: q.Certificate, psk: q.PSK,
	})
}

// onboarder is grpcgateway.Onboarder.
type onboarder struct{ a *assembly }

// Onboard is of grpcgateway.Onboarder.
func (o onboarder) Onboard(ctx context.Context, owner hub.Owner, user string, q grpcgateway.ToOnboard) (Onboarding, error) {
	return o.a.makeOnboarding(ctx, q.DeviceID, q.Any, onboarding{owner: owner, user: user, certificate: q.Certificate, psk: q.PSK})
}

func (a *assembly) makeOnboarding(ctx context.Context, named string, anyDevice bool, m onboarding) (o Onboarding, err error) {
	switch {
	case (named == "") == !anyDevice:
		return o, hub.NewError(hub.Invalid, "device-id-missing", "name a device or ask for any, not both")
	case m.certificate && anyDevice:
		return o, hub.NewError(hub.Invalid, "device-id-missing", "a certificate needs a device ID")
	case m.psk && anyDevice:
		return o, hub.NewError(hub.Invalid, "device-id-missing", "a pre-shared key needs a device ID")
	case m.psk && a.takesKeys() != nil:
		return o, a.takesKeys()
	case named != "":
		if m.dev, err = hub.ParseDeviceID(named); err != nil {
			return o, err
		}
	}
	if m.dev != "" && !m.operator {
		if err := a.mayOnboard(ctx, m); err != nil {
			return o, err
		}
	}
	o = Onboarding{HubID: a.hubID, DeviceID: string(m.dev), Endpoints: a.endpoints(), CA: a.deviceRoots()}
	if !m.operator {
		o.Endpoints.Admin = "" // it is nobody's but the operator's
	}
	if err := a.authorizeDevice(ctx, m, &o); err != nil {
		return Onboarding{}, err
	}
	m.owner = hub.Owner(o.Owner)
	if err := a.credentials(ctx, m, &o); err != nil {
		return Onboarding{}, err
	}
	return o, nil
}

var errOther = hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")

// mayOnboard refuses an owner a device of somebody else's, one that somebody else had when it was removed, and one that is not let in,
// before anything is made: who is refused has changed nothing.
func (a *assembly) mayOnboard(ctx context.Context, m onboarding) error {
	if m.dev == hub.DeviceID(a.hubID) {
		return hub.NewError(hub.Denied, "device-id-of-hub", "the ID is the hub's own")
	}
	own, err := a.ownership(ctx, m.owner, m.dev)
	if err != nil {
		return err
	}
	err = a.identities.Admits(ctx, m.dev, nil)
	if code, _ := hub.Public(err); err != nil && code == "device-removed" {
		if _, not := a.identities.Access(ctx, m.dev, m.owner); hub.IsKind(not, hub.NotFound) {
			return err // it was another's: he lets it in again, or an operator
		} else if err = not; err != nil {
			return err
		}
	}
	if err == nil && m.psk && own.Owner == "" {
		err = a.psk.mayOffer(ctx, m.dev, m.owner, a.whose(ctx, m.owner))
	}
	return err
}

// ownership is that of an owner's device, zero for one that nobody has, Denied for another's.
func (a *assembly) ownership(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (hub.Ownership, error) {
	own, err := a.identities.Owner(ctx, dev)
	switch {
	case hub.IsKind(err, hub.NotFound):
		return hub.Ownership{}, nil
	case err == nil && own.Owner != owner:
		return hub.Ownership{}, errOther
	}
	return own, err
}

func (a *assembly) whose(ctx context.Context, owner hub.Owner) func(hub.DeviceID) (hub.Ownership, error) {
	return func(dev hub.DeviceID) (hub.Ownership, error) { return a.ownership(ctx, owner, dev) }
}

// authorizeDevice says by which code the device signs up, and for whom.
func (a *assembly) authorizeDevice(ctx context.Context, m onboarding, o *Onboarding) (err error) {
	if a.provider == nil {
		p := a.cfg.CoAPGateway.API.CoAP.Authorization.Providers[0]
		o.AuthorizationProvider, o.Owner = p.Name, string(m.owner)
		o.AuthorizeURL, err = authorizeURL(ctx, p)
		return err
	}
	if m.operator {
		if m.owner, err = a.owner(ctx, string(m.owner)); err != nil {
			return err
		}
	}
	o.AuthorizationProvider, o.Owner = providerName, string(m.owner)
	o.AuthorizationCode, o.ExpiresAt, err = a.provider.OnboardCode(ctx, m.owner, m.dev, 0)
	return err
}

// credentials lets a device that was removed come again, and makes what it was to be given.
func (a *assembly) credentials(ctx context.Context, m onboarding, o *Onboarding) error {
	if m.dev == "" {
		return nil
	}
	of := m.owner // whose it was when it was removed
	if m.operator {
		of = ""
	}
	if err := a.readmit(ctx, m.dev, of); err != nil {
		return err
	}
	if m.certificate {
		id, err := a.identityFor(ctx, m)
		if err != nil {
			return err
		}
		o.Identity = &id
	}
	if m.psk {
		text, err := a.keyFor(ctx, m)
		if err != nil {
			return err
		}
		a.doors.endKey(ctx, m.dev) // whoever has the former one
		o.PSK, o.PSKIdentity = text, string(m.dev)
	}
	return nil
}

// identityFor makes a key and a certificate. An owner's is signed as if he had made the key himself, and the request: whose the device
// is, for whom its ID is kept, and how many there may be is asked there.
func (a *assembly) identityFor(ctx context.Context, m onboarding) (Identity, error) {
	if m.operator {
		return a.issue(ctx, issueRequest{DeviceID: string(m.dev), owner: m.owner})
	}
	const op = "onboard"
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return Identity{}, fmt.Errorf("%s: make a key: %w", op, err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "uuid:" + string(m.dev)}}, key)
	if err != nil {
		return Identity{}, fmt.Errorf("%s: make a request: %w", op, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return Identity{}, fmt.Errorf("%s: encode a key: %w", op, err)
	}
	chain, err := a.certificates.Sign(ctx, m.owner, m.user, csr)
	if err != nil {
		return Identity{}, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return Identity{Chain: string(chain), Key: string(text), CA: a.deviceRoots()}, nil
}

// keyFor makes a pre-shared key. Whoever has one is the device as much as who has its certificate, so an ID is kept for an owner likewise.
func (a *assembly) keyFor(ctx context.Context, m onboarding) (text string, err error) {
	if m.operator {
		text, _, err = a.psk.replace(ctx, m.dev, "", m.user)
		return text, err
	}
	if err := a.certificates.Reserve(ctx, m.owner, m.dev); err != nil {
		return "", err
	}
	return a.psk.offer(ctx, m.dev, m.owner, m.user, a.whose(ctx, m.owner))
}
