package bundle

import (
	"context"
	"os"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/run"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// directory is what the other parts have of the resource directory: itself, or what reaches it over the bus.
type directory interface {
	coapgateway.Directory
	grpcgateway.Directory
	identitystore.Directory
}

// apart connects to the bus, if there is one in the configuration, and puts it between the parts. instance is this process's.
func (a *assembly) apart(instance string) (err error) {
	if len(a.cfg.Bus.URLs) == 0 {
		return nil
	}
	name, err := os.Hostname()
	if err != nil {
		name = instance
	}
	log := a.log.With("part", "bus")
	if a.bus, err = bus.Connect(a.cfg.Bus, a.hubID, a.build.Version, name, log, a.registry); err != nil {
		return err
	}
	a.health.Check("bus", a.bus.Health)
	member := func(part string, load func() bus.Load) *bus.Members {
		m := a.bus.Members(bus.Member{Part: part, Instance: instance, Name: name}, load, log)
		a.members = append(a.members, m)
		return m
	}
	directories := member(resourcedirectory.Part, func() bus.Load { return bus.Load{Partitions: a.directories.Partitions()} })
	a.directories.Apart(a.bus, directories, instance)
	member(resourcedirectory.GatewayPart, nil)
	a.remote = resourcedirectory.NewClient(a.bus, a.directories.Reader, instance, a.log.With("part", "resource-directory"))
	a.directory = a.remote
	return nil
}

// membership is the parts that tell others of those that run here. They begin before them and end after them.
func (a *assembly) membership() []run.Part {
	var ps []run.Part
	for _, m := range a.members {
		ps = append(ps, run.Part{Name: "membership", Run: m.Run})
	}
	return ps
}

// directoryProxies is what stands here for the directory when it is asked over the bus.
func (a *assembly) directoryProxies() []run.Part {
	if a.remote == nil {
		return nil
	}
	return []run.Part{{Name: "sessions", Run: a.remote.Run}}
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

// askForIdentities puts the bus between the identity store and the others.
func (a *assembly) askForIdentities(ctx context.Context, cfg identitystore.Config) (err error) {
	log := a.log.With("part", "identity-store")
	if a.answers, err = a.identityStore.Serve(ctx, a.bus, log); err != nil {
		return err
	}
	a.knows = identitystore.NewClient(cfg, a.bus, log)
	a.identities = a.knows
	return nil
}

func (a *assembly) identityProxies() []run.Part {
	if a.knows == nil {
		return nil
	}
	return []run.Part{{Name: "identity-store's bus", Run: a.answers.Run}, {Name: "identities", Run: a.knows.Run}}
}
