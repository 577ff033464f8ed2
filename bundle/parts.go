package bundle

import (
	"context"
	"slices"
	"time"

	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/run"
)

// parts lists what runs, in the order of starting: probes are answered first and last, doors open once what is behind them
// serves, and the socket comes last, so that whoever is answered on it finds a hub that works.
func (a *assembly) parts() []run.Part {
	var ps []run.Part
	if a.admin != nil {
		ps = append(ps, run.Part{Name: "admin", Run: func(ctx context.Context, ready func()) error {
			ln, err := a.secure(a.admin)
			if err != nil {
				return err
			}
			return obs.ServeHTTP(ctx, ln, obs.AdminHandler(a.health, a.registry, a.log), time.Second, a.log, ready)
		}})
	}
	add := func(name string, f func(context.Context, func()) error) {
		ps = append(ps, run.Part{Name: name, Run: f})
	}
	ps = append(ps, a.membership()...)
	add("audit", a.audit.Run) // ends after the doors, whose last calls it still takes
	if a.directories != nil {
		add(TargetResourceDirectory, a.directories.Run)
	}
	if a.sessions != nil {
		add("sessions", a.sessions.Run)
	}
	if a.identityStore != nil {
		add(TargetIdentityStore, a.identityStore.Run)
	}
	if a.answersIdentities != nil {
		add("identity-store on the bus", a.answersIdentities.Run)
	}
	if a.identityClient != nil {
		add("identities", a.identityClient.Run)
	}
	if a.quarantine != nil {
		// It asks who is in quarantine of what was known when it was opened.
		known := func() error { return a.identities.Denied("", nil) }
		if a.identityStore != nil {
			known = func() error { return a.identityStore.Denied("", nil) }
		}
		add("quarantine", func(ctx context.Context, ready func()) error { return a.quarantine.Run(ctx, known, ready) })
	}
	if a.certificateService != nil {
		add(TargetCertificateAuthority, a.certificateService.Run)
	}
	if a.factories != nil {
		add("factories", a.factories.Run)
	}
	if a.certificateClient != nil {
		add("certificates", a.certificateClient.Run)
	}
	if a.provider != nil && a.cfg.Runs(TargetOAuthServer) {
		add(TargetOAuthServer, a.provider.Run)
	}
	if a.apps != nil {
		add(TargetGRPCGateway, a.apps.Run)
	}
	if a.devices != nil {
		add(TargetCoAPGateway, a.runDevices)
		ps = append(ps, a.doorsOnBus()...)
		if a.bus != nil && a.provider != nil {
			add("grants", func(ctx context.Context, ready func()) error {
				return a.provider.Follow(ctx, func(grant string) { a.devices.EndGrant(a.provider.Issuer(), grant) }, ready)
			})
		}
	}
	if a.enrol != nil {
		add(TargetEnrolmentGateway, a.enrol.Run)
	}
	ps = append(ps, run.Part{Name: "socket", Run: func(ctx context.Context, ready func()) error {
		return serveSocket(ctx, a.folder, a.calls(), newSocketMetrics(a.registry), a.audit.Record, a.log.With("part", "socket"), ready)
	}})
	if a.devices != nil && a.bus != nil {
		add("drain", a.drain)
	}
	return ps
}

// drains is how long devices may take to go elsewhere.
func (a *assembly) drains() time.Duration {
	if a.devices == nil || a.bus == nil {
		return 0
	}
	return a.cfg.CoAPGateway.Drain.Spread + a.cfg.CoAPGateway.Drain.Commands
}

// drain is the part that ends first, while all others still do what they do: its end is that the devices have gone to other gateways. A
// gateway that is the only one has nowhere to send them; it stops at once, as a hub in one process does.
func (a *assembly) drain(ctx context.Context, ready func()) error {
	ready()
	<-ctx.Done()
	m := a.members[TargetCoAPGateway]
	if !slices.ContainsFunc(m.Living(TargetCoAPGateway), func(instance string) bool { return instance != a.instance }) {
		return nil
	}
	m.Leave()
	a.devices.Drain(context.WithoutCancel(ctx)) // bounded by itself
	return nil
}

// runDevices names the flag when the gateway cannot listen: it opens its listeners itself.
func (a *assembly) runDevices(ctx context.Context, ready func()) error {
	err := a.devices.Run(ctx, ready)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return listenError(err, a.cfg.CoAPGateway.API.CoAP.Address, "--coap-address or --coap-plain-address", "coapGateway.api.coap")
}
