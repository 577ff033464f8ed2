package bundle

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http"
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
	"github.com/coaphub/coaphub/internal/store/mongostore"
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
	EndKey(ctx context.Context, dev hub.DeviceID) error
	KeysEnded(f func(hub.DeviceID))
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
	Reserve(ctx context.Context, owner hub.Owner, dev hub.DeviceID) error
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
	a.members = map[string]*bus.Members{}
	for _, target := range Targets() {
		if a.cfg.Runs(target) && (target != TargetOAuthServer || a.cfg.Embedded()) {
			m := bus.Member{Part: target, Instance: a.instance, Name: a.processName()}
			a.members[target] = a.bus.Members(m, a.load(target), a.log.With("part", "bus"))
		}
	}
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

// load is what a part that runs here is at.
func (a *assembly) load(target string) func() bus.Load {
	behind := func() int {
		if s, shared := a.store.(*mongostore.Store); shared {
			return s.Behind()
		}
		return 0
	}
	switch target {
	case TargetResourceDirectory:
		return func() bus.Load {
			l := a.directories.Load()
			l.Behind = behind()
			return l
		}
	case TargetCoAPGateway:
		return func() bus.Load { return bus.Load{Sessions: a.devices.Sessions()} }
	}
	return nil
}

// membership is what tells others of the parts that run here. It begins before them and ends after them.
func (a *assembly) membership() []run.Part {
	var ps []run.Part
	if m := a.heard(); m != nil {
		ps = append(ps, run.Part{Name: "versions", Run: func(ctx context.Context, ready func()) error {
			if err := m.Meet(ctx); err != nil {
				return err
			}
			ready()
			<-ctx.Done()
			return nil
		}})
	}
	for _, target := range Targets() {
		if m := a.members[target]; m != nil {
			ps = append(ps, run.Part{Name: "membership", Run: m.Run})
		}
	}
	return ps
}

// heard is the membership as it is heard here; nil without a bus.
func (a *assembly) heard() *bus.Members {
	for _, m := range a.members {
		return m
	}
	return nil
}

// Part is an instance of a part of the hub.
type Part = grpcgateway.Part

// The states of a Part.
const (
	PartServes = "serves"
	PartLeaves = "leaves"
	PartSilent = "silent" // nothing was heard of it for ten seconds
)

// parts lists the parts of the hub that were heard of in the last hour, by target.
func (a *assembly) listParts(context.Context, struct{}) ([]Part, error) {
	m := a.heard()
	if a.bus == nil { // all are here
		out := []Part{}
		for _, t := range Targets() {
			out = append(out, Part{
				Target: t, Name: a.processName(), Instance: a.instance, Version: a.build.Version, Started: a.started.UTC(), Heard: time.Now().UTC(), State: PartServes,
			})
		}
		return out, nil
	}
	if m == nil {
		return nil, hub.NewError(hub.Precondition, "parts-unknown", "this process runs no part that hears of others; ask another one")
	}
	all, at := m.All()
	out := make([]Part, 0, len(all))
	for i, o := range all {
		p := Part{
			Target: o.Part, Name: o.Name, Instance: o.Instance, Version: o.Build, Started: o.Started, Heard: at[i].UTC(), State: PartServes,
			Partitions: o.Load.Partitions, Sessions: o.Load.Sessions, Behind: o.Load.Behind,
		}
		switch {
		case time.Since(at[i]) > bus.Patience:
			p.State = PartSilent
		case o.Leaving:
			p.State = PartLeaves
		}
		out = append(out, p)
	}
	return out, nil
}

// Parts lists the parts of the hub, by target.
func (c *Control) Parts(ctx context.Context) (ps []Part, err error) {
	err = c.call(ctx, http.MethodGet, "/parts", nil, &ps)
	return ps, err
}
