package bundle

import (
	"context"
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
	ps = append(ps, a.membership()...)
	ps = append(ps,
		run.Part{Name: "audit", Run: a.audit.Run}, // ends after the doors, whose last calls it still takes
		run.Part{Name: "resource-directory", Run: a.directories.Run},
	)
	ps = append(ps, a.directoryProxies()...)
	ps = append(ps,
		run.Part{Name: "identity-store", Run: a.identityStore.Run},
	)
	ps = append(ps, a.identityProxies()...)
	ps = append(ps,
		run.Part{Name: "certificate-authority", Run: a.certificates.Run},
	)
	if a.provider != nil {
		ps = append(ps, run.Part{Name: "oauth-server", Run: a.provider.Run})
	}
	ps = append(ps,
		run.Part{Name: "grpc-gateway", Run: a.apps.Run},
		run.Part{Name: "coap-gateway", Run: a.runDevices},
		run.Part{Name: "enrolment-gateway", Run: a.enrol.Run},
	)
	ps = append(ps, run.Part{Name: "socket", Run: func(ctx context.Context, ready func()) error {
		return serveSocket(ctx, a.folder, a.calls(), newSocketMetrics(a.registry), a.audit.Record, a.log.With("part", "socket"), ready)
	}})
	return ps
}

// runDevices names the flag when the gateway cannot listen: it opens its listeners itself.
func (a *assembly) runDevices(ctx context.Context, ready func()) error {
	err := a.devices.Run(ctx, ready)
	if err == nil || ctx.Err() != nil {
		return err
	}
	return listenError(err, a.cfg.CoAPGateway.API.CoAP.Address, "--coap-address or --coap-plain-address", "coapGateway.api.coap")
}
