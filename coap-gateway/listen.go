package coapgateway

import (
	"context"
	"net"

	"github.com/coaphub/coaphub/internal/coap"
)

// listeners are those of one address, on one port number; nil for a protocol that is off.
type listeners struct {
	tcp net.Listener
	udp net.PacketConn
}

// listen opens the listeners of the configured protocols; none if address is "".
func listen(ctx context.Context, co *CoAPConfig, address string) (l listeners, err error) {
	if address == "" {
		return l, nil
	}
	l.tcp, l.udp, err = coap.Listen(ctx, address, co.speaks(ProtocolTCP), co.speaks(ProtocolUDP))
	return l, err
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
