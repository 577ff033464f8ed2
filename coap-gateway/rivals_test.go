package coapgateway

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// TestRivals: two places that take turns are found, a device that moves, reboots or comes back is not.
func TestRivals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		from  string // a letter is a host, a dash that the device goes by itself, a dot half an hour
		found int    // how often
	}{
		"two that take turns":                    {"abababab", 1},
		"three":                                  {"abcabc", 1},
		"it goes on for hours":                   {"ababab.ab.ababab", 2},
		"a device that reboots":                  {"aaaaaaaaaa", 0},
		"a device that moves":                    {"abcdefgh", 0},
		"there and back":                         {"ababb", 0},
		"there and back, now and then":           {"aba.aba.aba.aba", 0},
		"it takes nothing over, it was gone":     {"a-b-a-b-a-b-a", 0},
		"many addresses, each once in a while":   {"abcdefabcdef", 0},
		"one of two reboots more than it fights": {"aaabbbaaabbbaaa", 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDiagnostics()
				session, found := uint64(0), 0
				for _, at := range c.from {
					switch at {
					case '.':
						time.Sleep(30 * time.Minute)
						continue
					case '-':
						d.end(lampID, session, "peer-closed", time.Now())
						continue
					}
					session++
					// Each from another port. The end of the session that was taken over comes sooner or later.
					if session%2 == 0 {
						d.end(lampID, session-1, "second-session", time.Now())
					}
					where, is := d.begin(Diagnostics{Device: lampID, Session: session, Remote: "10.0.0." + string(at) + ":" + string('0'+rune(session%10))},
						func() coap.Stats { return coap.Stats{} }, false)
					if is {
						found++
						if !strings.Contains(where, "10.0.0."+string(at)) {
							t.Errorf("found at %q", where)
						}
					}
					time.Sleep(time.Second)
				}
				if found != c.found {
					t.Errorf("found %d times, want %d", found, c.found)
				}
				if x, _ := d.get(lampID); x.RivalsAt.IsZero() != (c.found == 0) {
					t.Errorf("%+v", x)
				}
			})
		})
	}
}

// Two that take turns are found when each has a gateway of its own, and a device that moves from one gateway to the other is none of them.
func TestRivalsAtTwoGateways(t *testing.T) {
	t.Parallel()
	for _, two := range []bool{true, false} {
		t.Run(map[bool]string{true: "two", false: "one"}[two], func(t *testing.T) {
			t.Parallel()
			var halls [2]*hall
			var mu sync.Mutex // guards told
			var told []string
			join := func(_ *Config, d *Deps) {
				d.Turns = func(_ context.Context, gateway string, dev hub.DeviceID) (Turns, error) {
					return halls[map[string]int{"gateway-1": 0, "gateway-2": 1}[gateway]].gw.Turns(dev), nil
				}
				d.Rivals = func(_ context.Context, _ hub.DeviceID, where string) {
					mu.Lock()
					defer mu.Unlock()
					told = append(told, where)
				}
			}
			halls[0] = start(t, join)
			halls[1] = start(t, func(c *Config, d *Deps) {
				join(c, d)
				w := halls[0].w
				d.Directory, d.Identities, d.Verifier, d.Service = &w.dir, &w.ids, &w.ver, "gateway-2"
			})
			halls[1].w = halls[0].w
			hosts := [2]net.IP{net.IPv4(127, 0, 0, 2), net.IPv4(127, 0, 0, 3)}
			if !two {
				hosts[1] = hosts[0]
			}
			found := func() int {
				mu.Lock()
				defer mu.Unlock()
				return len(told)
			}
			for i := range 2 * (rivalryTurns + 1) {
				before, n := halls[(i+1)%2], halls[0].w.count("online "+string(lampID))
				halls[i%2].online(lampID, func(d *device) { d.from = hosts[i%2] })
				if n > 0 {
					before.w.await(t, "the end of the session before", func() bool { x, _ := before.gw.Diagnostics(lampID); return !x.Online })
				}
				p := halls[i%2]
				p.w.await(t, "what the other gateway says", func() bool {
					p.gw.devices.mu.Lock()
					defer p.gw.devices.mu.Unlock()
					r := p.gw.devices.byDev[lampID].rivalry
					return n == 0 || !two || r.turns == max(0, n-1)
				})
			}
			if two {
				halls[0].w.await(t, "the rivals to be found", func() bool { return found() == 1 })
			}
			if n := found(); n != map[bool]int{true: 1, false: 0}[two] {
				t.Errorf("found %d times", n)
			}
		})
	}
}
