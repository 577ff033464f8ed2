package coap

import (
	"context"
	"fmt"
	"net"
	"strconv"
)

// Listen opens listeners on one address, for TCP, UDP or both on one port number; nil for what is not wanted. If the system chooses
// the port, it chooses one for TCP, and for UDP somebody else may have that one: then it chooses again.
func Listen(ctx context.Context, address string, tcp, udp bool) (l net.Listener, c net.PacketConn, err error) {
	const attempts = 10
	for i := 1; ; i++ {
		if l, c, err = open(ctx, address, tcp, udp); err == nil {
			return l, c, nil
		}
		_, port, _ := net.SplitHostPort(address)
		if n, _ := strconv.ParseUint(port, 10, 16); n != 0 || i == attempts {
			return nil, nil, fmt.Errorf("listen for CoAP: %w", err)
		}
	}
}

func open(ctx context.Context, address string, tcp, udp bool) (l net.Listener, c net.PacketConn, err error) {
	var lc net.ListenConfig
	if tcp {
		if l, err = lc.Listen(ctx, "tcp", address); err != nil {
			return nil, nil, err
		}
		address = l.Addr().String()
	}
	if udp {
		if c, err = lc.ListenPacket(ctx, "udp", address); err != nil {
			if l != nil {
				_ = l.Close()
			}
			return nil, nil, err
		}
	}
	return l, c, nil
}
