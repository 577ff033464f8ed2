package coapgateway

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	simulated "github.com/coaphub/coaphub/test/device"
)

// balancer is a load balancer for one device over UDP. It changes its mind, and lets nothing through of a gateway that it does not send to.
type balancer struct {
	front, back *net.UDPConn
	device      atomic.Pointer[netip.AddrPort]
	to          atomic.Pointer[netip.AddrPort]
}

func startBalancer(t *testing.T) *balancer {
	t.Helper()
	b := &balancer{}
	for _, c := range []**net.UDPConn{&b.front, &b.back} {
		var err error
		if *c, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)}); err != nil {
			t.Fatal(err)
		}
	}
	var all sync.WaitGroup
	forward := func(from, to *net.UDPConn, where func(netip.AddrPort) *netip.AddrPort) {
		buf := make([]byte, 64<<10)
		for {
			n, src, err := from.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if dst := where(src); err == nil && dst != nil {
				_, _ = to.WriteToUDPAddrPort(buf[:n], *dst)
			}
		}
	}
	all.Go(func() {
		forward(b.front, b.back, func(src netip.AddrPort) *netip.AddrPort { b.device.Store(&src); return b.to.Load() })
	})
	all.Go(func() {
		forward(b.back, b.front, func(src netip.AddrPort) *netip.AddrPort {
			if src != *b.to.Load() {
				return nil
			}
			return b.device.Load()
		})
	})
	t.Cleanup(func() {
		_, _ = b.front.Close(), b.back.Close()
		all.Wait()
	})
	return b
}

func (b *balancer) send(h *hall) {
	to := netip.MustParseAddrPort(h.gw.Addresses().SecureUDP)
	b.to.Store(&to)
}

// A device over DTLS keeps its session, and gets its commands, when its records come to another gateway than the one that has it.
func TestRelayOverTheBus(t *testing.T) {
	t.Parallel()
	for _, psk := range []bool{false, true} {
		t.Run(map[bool]string{false: "certificate", true: "pre-shared key"}[psk], func(t *testing.T) {
			t.Parallel()
			url := bustest.Server(t, nil).ClientURL()
			key := []byte("a key of sixteen")
			join := func(_ *Config, d *Deps) {
				var err error
				d.Bus, err = bus.Connect(bus.Config{URLs: []string{url}}, string(hubID), "v1", "gateway", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(d.Bus.Close)
				d.PSK = func(context.Context, hub.DeviceID) ([]byte, error) { return key, nil }
			}
			h, other := start(t, join), start(t, join)
			h.w.own(lampID, "alice")
			h.w.grant("token", hub.Claims{})
			b := startBalancer(t)
			b.send(h)
			cfg := simulated.Config{ID: string(lampID), HubAddr: "coaps://" + b.front.LocalAddr().String(), TLS: h.tlsFor(h.ca.identity(t, lampID, nil))}
			if psk {
				cfg.TLS, cfg.PSK = nil, &simulated.PSK{Identity: string(lampID), Key: key}
			}
			d, err := simulated.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if err := d.Connect(t.Context()); err != nil {
				t.Fatal(err)
			}
			d.SetCredentials(simulated.Credentials{UID: "alice", Access: "token"})
			works := func(what string) {
				t.Helper()
				a, err := d.Do(t.Context(), simulated.Request{Code: codes.GET, Path: "/oic/rd"}) // without a session it is 4.01
				if err != nil || !a.OK() {
					t.Fatalf("%s: %v %v", what, a, err)
				}
				h.give(command(what, hub.CommandRetrieve, "/light/1"))
				if a := h.awaitEnd(what); a.Status != hub.StatusOK {
					t.Fatalf("%s: the command ended with %+v", what, a)
				}
			}
			if a, err := d.SignIn(t.Context()); err != nil || !a.OK() {
				t.Fatalf("%v %v", a, err)
			}
			works("there")
			b.send(other)
			works("elsewhere")
			b.send(h)
			works("back")
			if h.w.count("online "+string(lampID)) != 1 || h.w.count("offline "+string(lampID)) != 0 {
				t.Errorf("%q", h.w.soFar())
			}
			d.Close()
			h.w.awaitLog(t, "offline "+string(lampID))
		})
	}
}
