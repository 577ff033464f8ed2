package bundle

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"

	"github.com/coaphub/coaphub/hub"
)

// listen opens a TCP listener. What can go wrong is an operator's to mend, so the error names the flag and the key.
func listen(ctx context.Context, address, flag, key string) (net.Listener, error) {
	ln, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err == nil {
		return ln, nil
	}
	return nil, listenError(err, address, flag, key)
}

func listenError(err error, address, flag, key string) error {
	var network *net.OpError
	if !errors.As(err, &network) || network.Op != "listen" {
		return err // something else
	}
	e := &hub.Error{Kind: hub.Unavailable, Code: "address-unusable", Err: err}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		e.Code, e.Text = "address-in-use", fmt.Sprintf("the address %s is taken by another program; choose another one with %s (%s)", address, flag, key)
	case errors.Is(err, syscall.EACCES):
		e.Text = fmt.Sprintf("this user may not listen on %s; choose a port from 1024 on with %s (%s)", address, flag, key)
	default:
		e.Text = fmt.Sprintf("cannot listen on %s; choose another address with %s (%s)", address, flag, key)
	}
	return e
}

// loopback reports whether only this machine can reach the address.
func loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// externalHost is the name or address under which others reach this machine: what is configured, else its first address
// that is neither loopback nor link-local, IPv4 before IPv6, else loopback.
func externalHost(configured string) string {
	if configured != "" {
		return configured
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return "127.0.0.1"
	}
	best := ""
	for _, a := range addrs {
		n, ok := a.(*net.IPNet)
		if !ok || !n.IP.IsGlobalUnicast() {
			continue
		}
		if n.IP.To4() != nil {
			return n.IP.String()
		}
		if best == "" {
			best = n.IP.String()
		}
	}
	if best == "" {
		return "127.0.0.1"
	}
	return best
}

// reach is how others reach a listener's address: its own host when it has one, else the external one, with its port.
func reach(address, external string) string {
	if port, all := strings.CutPrefix(address, ":"); all {
		return net.JoinHostPort(external, port)
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return address
	}
	host := ap.Addr().Unmap().String()
	if ap.Addr().IsUnspecified() {
		host = external
	}
	return net.JoinHostPort(host, strconv.Itoa(int(ap.Port())))
}
