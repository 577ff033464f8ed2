package bundle

import (
	"context"
	"os"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/run"
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

// proxies is the parts that stand here for those that are reached over the bus.
func (a *assembly) proxies() []run.Part {
	if a.remote == nil {
		return nil
	}
	return []run.Part{{Name: "sessions", Run: func(ctx context.Context, ready func()) error { return a.remote.Run(ctx, ready) }}}
}
