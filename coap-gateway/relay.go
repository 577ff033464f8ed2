package coapgateway

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/coap"
)

// relayed is a datagram of DTLS between gateways, told to records.<number> of the one that it is for. Where there is no such gateway nobody
// listens, and it is lost, as it is to be. It goes over the bus, and not from socket to socket: the bus knows the gateways and has them
// prove who they are, needs no further port, and what goes by it is little, for load balancers seldom change their minds.
const relayed = bus.Note[coap.Relayed]("gateways.record")

func recordsOf(number uint16) string { return fmt.Sprintf("records.%04x", number) }

// newRelay makes the gateway's relay. Two gateways that have one number by chance are both told what is for either, and know by the rest
// of a connection ID whether it is theirs.
func newRelay(number uint16) *coap.Relay {
	for number == 0 { // which is everybody's without a bus
		number = uint16(rand.Uint32()) //nolint:gosec // no secret, and cut on purpose
	}
	return coap.NewRelay(number)
}

// relayRecords has datagrams go between this gateway and others until stop is called, which waits.
func (g *Gateway) relayRecords() (stop func(), err error) {
	if g.relay == nil {
		return func() {}, nil
	}
	unlisten, err := relayed.Listen(g.deps.Bus, recordsOf(g.relay.Number()), g.relay.Take)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		g.relay.Run(ctx, func(to uint16, d coap.Relayed) {
			if err := relayed.Send(g.deps.Bus, recordsOf(to), d); err != nil { // lost, as on any network
				g.log.Debug("a datagram cannot be passed on to another gateway", "gateway", to, "error", err)
			}
		})
	})
	return func() { unlisten(); cancel(); running.Wait() }, nil
}
