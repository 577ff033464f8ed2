package bundle

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/run"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// gateways are the doors for devices, wherever they are: the one of this process, and over the bus those of others.
type gateways struct {
	a *assembly
}

// The words on the bus about gateways. What ends is stored before it is told; a gateway that missed the word finds it where it looks
// what ended, as the embedded provider's Follow does.
const (
	gatewaysSubject = "gateways"

	grantEnded = bus.Note[endedGrant]("gateways.grantEnded")

	callRefused     = bus.Method[struct{}, []coapgateway.Refusal]("door.refused")
	callDiagnostics = bus.Method[hub.DeviceID, diagnosed]("door.diagnostics")
	callTurns       = bus.Method[hub.DeviceID, coapgateway.Turns]("door.turns")
	callSecurity    = bus.Method[struct{}, []secured]("door.security")

	// scatterTime is how long answers of other gateways are waited for.
	scatterTime = 2 * time.Second
)

func doorOf(instance string) string { return "door." + instance }

type (
	endedGrant struct{ Issuer, Grant string }
	diagnosed  struct {
		Known bool
		coapgateway.Diagnostics
	}
	secured struct {
		coapgateway.Security
		Sessions int
	}
)

// endKey ends the sessions that came with a device's former pre-shared key. It is among what identity stores tell, so a gateway that misses
// the word catches up.
func (g gateways) endKey(ctx context.Context, dev hub.DeviceID) {
	g.told(g.a.identities.EndKey(context.WithoutCancel(ctx), dev))
}

// endGrant ends the sessions that stand on a grant of the embedded provider.
func (g gateways) endGrant(issuer, grant string) {
	if g.a.devices != nil {
		g.a.devices.EndGrant(issuer, grant)
	}
	if g.a.bus != nil {
		g.told(grantEnded.Send(g.a.bus, gatewaysSubject, endedGrant{issuer, grant}))
	}
}

func (g gateways) told(err error) {
	if err != nil {
		g.a.log.Error("gateways are not told that sessions end", "error", err)
	}
}

// refused lists the newest refusals of all gateways, newest first.
func (g gateways) refused(ctx context.Context) []coapgateway.Refusal {
	all := slices.Concat(scatter(ctx, g, callRefused, struct{}{})...)
	if g.a.devices != nil {
		all = append(all, g.a.devices.Refused()...)
	}
	slices.SortStableFunc(all, func(a, b coapgateway.Refusal) int { return b.Time.Compare(a.Time) })
	return all[:min(len(all), 1000)]
}

// diagnostics is what is known of a device where it was last.
func (g gateways) diagnostics(ctx context.Context, dev hub.DeviceID) (best coapgateway.Diagnostics, known bool) {
	all := scatter(ctx, g, callDiagnostics, dev)
	if g.a.devices != nil {
		d, ok := g.a.devices.Diagnostics(dev)
		all = append(all, diagnosed{ok, d})
	}
	for _, d := range all {
		if d.Known && (!known || cmp.Or(cmp.Compare(online(d.Diagnostics), online(best)), d.ConnectedSince.Compare(best.ConnectedSince)) > 0) {
			best, known = d.Diagnostics, true
		}
	}
	return best, known
}

func online(d coapgateway.Diagnostics) int {
	if d.Online {
		return 1
	}
	return 0
}

// signedIn is how many devices are signed in at all gateways, those of other processes as they told last: every second, until they are gone.
func (g gateways) signedIn() (n int) {
	if g.a.devices != nil {
		n = g.a.devices.Sessions()
	}
	m := g.a.heard()
	if m == nil {
		return n
	}
	all, at := m.All()
	for i, o := range all {
		if o.Part == TargetCoAPGateway && o.Instance != g.a.instance && time.Since(at[i]) <= bus.Patience {
			n += o.Load.Sessions
		}
	}
	return n
}

// turns asks the gateway of another process what it knows of a device's session there.
func (g gateways) turns(ctx context.Context, instance string, dev hub.DeviceID) (coapgateway.Turns, error) {
	return callTurns.Call(ctx, g.a.bus, doorOf(instance), dev)
}

// security counts the sessions of all gateways, by how they are encrypted.
func (g gateways) security(ctx context.Context) map[coapgateway.Security]int {
	all := map[coapgateway.Security]int{}
	if g.a.devices != nil {
		maps.Copy(all, g.a.devices.Security())
	}
	for _, s := range slices.Concat(scatter(ctx, g, callSecurity, struct{}{})...) {
		all[s.Security] += s.Sessions
	}
	return all
}

// scatter asks all gateways of other processes. Who does not answer is left out: these are for people to look at.
func scatter[Req, Resp any](ctx context.Context, g gateways, m bus.Method[Req, Resp], q Req) []Resp {
	if g.a.bus == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, scatterTime)
	defer cancel()
	var mu sync.Mutex // guards out
	var out []Resp
	var all sync.WaitGroup
	for _, instance := range g.a.heard().Living(resourcedirectory.GatewayPart) {
		if g.a.devices != nil && instance == g.a.instance {
			continue
		}
		all.Go(func() {
			resp, err := m.Call(ctx, g.a.bus, doorOf(instance), q)
			if err != nil {
				g.a.log.WarnContext(ctx, "a gateway does not answer", "gateway", instance, "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			out = append(out, resp)
		})
	}
	all.Wait()
	return out
}

// endpoint is the URI under which devices reach gateways over a protocol, "" for one that is off. Where none is in this process it goes
// by the configuration, which all share.
func (g gateways) endpoint(p hub.Protocol) string {
	if g.a.devices != nil {
		return g.a.devices.Endpoint(p)
	}
	cfg := &g.a.cfg.CoAPGateway
	return cfg.Endpoint(p, cfg.Configured(), func(address string) string { return reach(address, g.a.external) })
}

// doorsOnBus is what answers the others about this process's gateway.
func (a *assembly) doorsOnBus() []run.Part {
	if a.bus == nil || a.devices == nil {
		return nil
	}
	s := a.bus.Server(true, a.log.With("part", "coap-gateway"), doorOf(a.instance))
	bus.Handle(s, callRefused, func(context.Context, struct{}) ([]coapgateway.Refusal, error) { return a.devices.Refused(), nil })
	bus.Handle(s, callDiagnostics, func(_ context.Context, dev hub.DeviceID) (diagnosed, error) {
		d, ok := a.devices.Diagnostics(dev)
		return diagnosed{ok, d}, nil
	})
	bus.Handle(s, callTurns, func(_ context.Context, dev hub.DeviceID) (coapgateway.Turns, error) { return a.devices.Turns(dev), nil })
	bus.Handle(s, callSecurity, func(context.Context, struct{}) (out []secured, _ error) {
		for k, n := range a.devices.Security() {
			out = append(out, secured{k, n})
		}
		return out, nil
	})
	return []run.Part{{Name: "doors", Run: func(ctx context.Context, ready func()) error {
		stopGrants, err := grantEnded.Listen(a.bus, gatewaysSubject, func(e endedGrant) { a.devices.EndGrant(e.Issuer, e.Grant) })
		if err != nil {
			return err
		}
		defer stopGrants()
		return s.Run(ctx, ready)
	}}}
}
