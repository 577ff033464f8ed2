package coapgateway

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

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
						func() coap.Stats { return coap.Stats{} })
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
