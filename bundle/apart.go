package bundle

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"os"
	"time"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	enrolmentgateway "github.com/coaphub/coaphub/enrolment-gateway"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/run"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// The targets: what may run in a process of its own. The names of some are those of members on the bus.
const (
	TargetResourceDirectory    = resourcedirectory.Part
	TargetIdentityStore        = "identity-store"
	TargetCertificateAuthority = "certificate-authority"
	TargetOAuthServer          = "oauth-server"
	TargetGRPCGateway          = "grpc-gateway"
	TargetCoAPGateway          = resourcedirectory.GatewayPart
	TargetEnrolmentGateway     = "enrolment-gateway"
)

// Targets is all of them, in the order of starting.
func Targets() []string {
	return []string{
		TargetResourceDirectory, TargetIdentityStore, TargetCertificateAuthority, TargetOAuthServer, TargetGRPCGateway, TargetCoAPGateway,
		TargetEnrolmentGateway,
	}
}

// directory is what the other parts have of the resource directory: itself, or what reaches it over the bus.
type directory interface {
	coapgateway.Directory
	grpcgateway.Directory
	identitystore.Directory
}

// identities is what the other parts have of the identity store, likewise.
type identities interface {
	coapgateway.Identities
	grpcgateway.Identities
	certificateauthority.Owners
	oauthserver.Ownership
	Quarantined(dev hub.DeviceID) (generation uint64, is bool)
	InQuarantine() []hub.DeviceID
	Denials() []hub.Denial
	Deny(ctx context.Context, d hub.Denial) (hub.Denial, error)
	Undeny(ctx context.Context, of hub.DenialOf, value string) error
	Barred(f func(hub.DeviceID))
}

// certificates is what the other parts have of the certificate authority, and authority what of its keys' certificates, likewise.
type certificates interface {
	grpcgateway.Certificates
	grpcgateway.Enrolments
	coapgateway.Renewals
	enrolmentgateway.Authority
	HubCertificate(hosts []string) (tls.Certificate, error)
	HTTPSCertificate(hosts []string) (tls.Certificate, error)
	Staple(cert *tls.Certificate) (hub.CertificateStatus, error)
	HandOver(ctx context.Context, dev hub.DeviceID, owner hub.Owner, serial string) ([]hub.Certificate, error)
	IssueDevice(ctx context.Context, dev hub.DeviceID, validity time.Duration, owner hub.Owner, user string) (certificateauthority.Identity, error)
	Forget(ctx context.Context, f hub.EnrolmentFilter) ([]hub.Enrolment, error)
	Ended(f func(serial string))
	Revoked(cert *x509.Certificate) bool
}

type authority interface {
	Parts() []certificateauthority.Part
	Roll(r certificateauthority.Root, step certificateauthority.Step, rootKeys []byte) error
	Retire(id string, rootKeys []byte) error
	DevicePool() *x509.CertPool
	DeviceIntermediates() []*x509.Certificate
	DeviceRoots() []*x509.Certificate
	RootKeys(r certificateauthority.Root) ([]byte, error)
	ForgetRootKeys(r certificateauthority.Root, safe []byte) error
	RootPEM(r certificateauthority.Root) ([]byte, error)
	Signs(r certificateauthority.Root, cert *x509.Certificate) bool
	Registrar() certificateauthority.KeyOfRegistrar
}

// connect connects to the bus, if there is one in the configuration.
func (a *assembly) connect() (err error) {
	if len(a.cfg.Bus.URLs) == 0 {
		return nil
	}
	if a.bus, err = bus.Connect(a.cfg.Bus, a.hubID, a.build.Version, a.processName(), a.log.With("part", "bus"), a.registry); err != nil {
		return err
	}
	a.health.Check("bus", a.bus.Health)
	return nil
}

// processName is what people see of this process.
func (a *assembly) processName() string {
	name, err := os.Hostname()
	if err != nil {
		return a.instance
	}
	return name
}

// member makes the process a member as a part.
func (a *assembly) member(part string) *bus.Members {
	var load func() bus.Load
	switch part {
	case TargetResourceDirectory:
		load = func() bus.Load { return bus.Load{Partitions: a.directories.Partitions()} }
	case TargetCoAPGateway:
		load = func() bus.Load {
			sessions := 0
			for _, n := range a.devices.Security() {
				sessions += n
			}
			return bus.Load{Sessions: sessions}
		}
	}
	m := a.bus.Members(bus.Member{Part: part, Instance: a.instance, Name: a.processName()}, load, a.log.With("part", "bus"))
	a.members = append(a.members, m)
	return m
}

// membership is the parts that tell others of those that run here. They begin before them and end after them.
func (a *assembly) membership() []run.Part {
	var ps []run.Part
	for _, m := range a.members {
		ps = append(ps, run.Part{Name: "membership", Run: m.Run})
	}
	return ps
}
