package coapgateway

import (
	"context"
	"fmt"
	"net"
	"strconv"
)

// listeners are those of one address, on one port number; nil for a protocol that is off.
type listeners struct {
	tcp net.Listener
	udp net.PacketConn
}

// listen opens the listeners of the configured protocols; none if address is "". If the system chooses the port, it chooses
// one for TCP, and for UDP somebody else may have that one: then it chooses again.
func listen(ctx context.Context, co *CoAPConfig, address string) (l listeners, err error) {
	if address == "" {
		return l, nil
	}
	const attempts = 10
	for i := 1; ; i++ {
		if l, err = open(ctx, co, address); err == nil {
			return l, nil
		}
		_, port, _ := net.SplitHostPort(address)
		if n, _ := strconv.ParseUint(port, 10, 16); n != 0 || i == attempts {
			return l, fmt.Errorf("listen for CoAP: %w", err)
		}
	}
}

func open(ctx context.Context, co *CoAPConfig, address string) (l listeners, err error) {
	var lc net.ListenConfig
	if co.speaks(ProtocolTCP) {
		if l.tcp, err = lc.Listen(ctx, "tcp", address); err != nil {
			return listeners{}, err
		}
		address = l.tcp.Addr().String()
	}
	if co.speaks(ProtocolUDP) {
		if l.udp, err = lc.ListenPacket(ctx, "udp", address); err != nil {
			l.udp = nil // not an interface that holds nothing
			l.close()
			return listeners{}, err
		}
	}
	return l, nil
}

func (l listeners) close() {
	if l.tcp != nil {
		_ = l.tcp.Close()
	}
	if l.udp != nil {
		_ = l.udp.Close()
	}
}

func (l listeners) addresses() (tcp, udp string) {
	if l.tcp != nil {
		tcp = l.tcp.Addr().String()
	}
	if l.udp != nil {
		udp = l.udp.LocalAddr().String()
	}
	return tcp, udp
}
