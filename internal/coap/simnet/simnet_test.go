package simnet

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func listen(t *testing.T, f func(string) (*Conn, error), addr string) *Conn {
	t.Helper()
	c, err := f(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// read reads one datagram within d.
func read(t *testing.T, c *Conn, d time.Duration) (string, string) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(d))
	b := make([]byte, 2000)
	n, from, err := c.ReadFrom(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "", ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n]), from.String()
}

func write(t *testing.T, c *Conn, to, text string) {
	t.Helper()
	if _, err := c.WriteTo([]byte(text), Addr(to)); err != nil {
		t.Fatal(err)
	}
}

// The same seed gives the same fates, another one others.
func TestSeed(t *testing.T) {
	run := func(seed uint64) (trace []string, got []string) {
		synctest.Test(t, func(t *testing.T) {
			n := New(seed, func(e Event) { trace = append(trace, e.String()) })
			n.SetPath(Path{Loss: 0.2, Duplicate: 0.2, Reorder: 0.2, Delay: 50 * time.Millisecond, Jitter: 20 * time.Millisecond})
			a, b := listen(t, n.Listen, "192.0.2.1:1"), listen(t, n.Listen, "192.0.2.2:2")
			for i := range 100 {
				write(t, a, "192.0.2.2:2", fmt.Sprint(i))
			}
			for {
				text, _ := read(t, b, time.Second)
				if text == "" {
					return
				}
				got = append(got, text)
			}
		})
		return trace, got
	}
	trace, got := run(1)
	again, gotAgain := run(1)
	if !slices.Equal(trace, again) || !slices.Equal(got, gotAgain) {
		t.Error("the same seed gave another trace")
	}
	if other, _ := run(2); slices.Equal(trace, other) {
		t.Error("another seed gave the same trace")
	}
	seen := make(map[string]int)
	for _, text := range got {
		seen[text]++
	}
	twice := 0
	for _, n := range seen {
		if n > 1 {
			twice++
		}
	}
	if len(seen) < 60 || len(seen) == 100 || twice == 0 || slices.IsSortedFunc(got, func(a, b string) int { return len(a) - len(b) }) {
		t.Errorf("%d of 100 arrived, %d twice: %v", len(seen), twice, got)
	}
}

func TestDelayBandwidthMTU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, nil)
		n.SetPath(Path{Delay: time.Second, Bandwidth: 1000, MTU: 500})
		a, b := listen(t, n.Listen, "192.0.2.1:1"), listen(t, n.Listen, "192.0.2.2:2")
		start := time.Now()
		text := string(make([]byte, 500))
		write(t, a, "192.0.2.2:2", text)
		write(t, a, "192.0.2.2:2", text)
		write(t, a, "192.0.2.2:2", text+"x")
		for i, want := range []time.Duration{1500 * time.Millisecond, 2 * time.Second} {
			if got, _ := read(t, b, time.Minute); got != text || time.Since(start) != want {
				t.Fatalf("datagram %d after %v, want %v", i, time.Since(start), want)
			}
		}
		if got, _ := read(t, b, time.Minute); got != "" {
			t.Fatal("a datagram over the MTU arrived")
		}
		for range 10 {
			write(t, a, "192.0.2.2:2", text)
		}
		count := 0
		for got := text; got != ""; got, _ = read(t, b, time.Minute) {
			count++
		}
		if count--; count < 2 || count > 4 {
			t.Fatalf("%d of 10 arrived through a second's backlog", count)
		}
		n.SetPathFrom(Addr("192.0.2.1:1").AddrPort().Addr(), Addr("192.0.2.2:2").AddrPort().Addr(), Path{})
		start = time.Now()
		write(t, a, "192.0.2.2:2", "now")
		if got, _ := read(t, b, time.Minute); got != "now" || time.Since(start) != 0 {
			t.Fatalf("%q after %v", got, time.Since(start))
		}
	})
}

func TestNAT(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, nil)
		hub := listen(t, n.Listen, "192.0.2.1:5683")
		r := n.NAT("198.51.100.1", time.Minute)
		a, b := listen(t, r.Listen, "10.0.0.1:1000"), listen(t, r.Listen, "10.0.0.2:1000")
		hear := func(want string) string {
			t.Helper()
			text, from := read(t, hub, time.Second)
			if text != want {
				t.Fatalf("the hub got %q, want %q", text, want)
			}
			return from
		}
		write(t, a, "192.0.2.1:5683", "a")
		pa := hear("a")
		write(t, b, "192.0.2.1:5683", "b")
		if pb := hear("b"); pa == pb || pa != "198.51.100.1:20000" {
			t.Fatalf("public addresses %s and %s", pa, pb)
		}
		write(t, hub, pa, "to a")
		if text, from := read(t, a, time.Second); text != "to a" || from != "192.0.2.1:5683" {
			t.Fatalf("%q from %s", text, from)
		}
		other := listen(t, n.Listen, "203.0.113.9:9")
		write(t, other, pa, "spoof")
		if text, _ := read(t, a, time.Second); text != "" {
			t.Fatal("a stranger came in")
		}

		<-time.After(time.Minute) // the mappings are forgotten, and the first to come gets the first port
		write(t, hub, pa, "late")
		if text, _ := read(t, a, time.Second); text != "" {
			t.Fatal("came in by a mapping that is over")
		}
		write(t, b, "192.0.2.1:5683", "b")
		if from := hear("b"); from != pa {
			t.Fatalf("the port was not used again: %s", from)
		}
		r.Rebind()
		write(t, b, "192.0.2.1:5683", "b")
		from := hear("b")
		if from == pa {
			t.Fatal("the port is the same after a rebinding")
		}
		r.Forget()
		write(t, a, "192.0.2.1:5683", "a")
		if got := hear("a"); got != from {
			t.Fatalf("%s, want %s again", got, from)
		}
	})
}

// An address is free once its socket is closed, and what is under way arrives at whoever has it then.
func TestReuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := New(1, nil)
		n.SetPath(Path{Delay: time.Second})
		a, b := listen(t, n.Listen, "192.0.2.1:0"), listen(t, n.Listen, "192.0.2.2:2")
		if _, err := n.Listen("192.0.2.2:2"); err == nil {
			t.Fatal("an address was given twice")
		}
		write(t, a, "192.0.2.2:2", "first")
		write(t, a, "192.0.2.3:3", "nobody")
		_ = b.Close()
		if _, _, err := b.ReadFrom(nil); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("read after close: %v", err)
		}
		if _, err := b.WriteTo(nil, a.LocalAddr()); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("write after close: %v", err)
		}
		b = listen(t, n.Listen, "192.0.2.2:2")
		if text, from := read(t, b, time.Minute); text != "first" || from != a.LocalAddr().String() {
			t.Fatalf("%q from %s", text, from)
		}
	})
}
