// Package bustest gives tests a NATS server in their process.
//
// It must not be used but by tests, nor know what is said on the bus.
package bustest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// Server starts a server on loopback, which ends with the test. change may change its options; nil changes nothing.
func Server(tb testing.TB, change func(*server.Options)) *server.Server {
	tb.Helper()
	o := &server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true}
	if change != nil {
		change(o)
	}
	s, err := server.NewServer(o)
	if err != nil {
		tb.Fatal(err)
	}
	log := fatal{why: make(chan string, 1)}
	s.SetLoggerV2(log, false, false, false)
	s.Start()
	tb.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	for end := time.Now().Add(time.Minute); !s.ReadyForConnections(100 * time.Millisecond); {
		select {
		case why := <-log.why:
			tb.Fatalf("the NATS server does not start: %s", why)
		default:
		}
		if time.Now().After(end) {
			tb.Fatal("the NATS server does not start")
		}
	}
	return s
}

// Port is one for a server that is stopped and started again. It is none of those that systems give to whoever asks for any: between the
// two somebody else would have it.
func Port(tb testing.TB) int {
	tb.Helper()
	for range 100 {
		port := 10_000 + rand.IntN(20_000)
		l, err := new(net.ListenConfig).Listen(tb.Context(), "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			_ = l.Close()
			return port
		}
	}
	tb.Fatal("no port is free")
	return 0
}

// fatal is a server's log, of which what ends the server is kept.
type fatal struct{ why chan string }

// Noticef implements server.Logger.
func (fatal) Noticef(string, ...any) {}

// Warnf implements server.Logger.
func (fatal) Warnf(string, ...any) {}

// Errorf implements server.Logger.
func (fatal) Errorf(string, ...any) {}

// Debugf implements server.Logger.
func (fatal) Debugf(string, ...any) {}

// Tracef implements server.Logger.
func (fatal) Tracef(string, ...any) {}

// Fatalf implements server.Logger.
func (f fatal) Fatalf(format string, v ...any) {
	select {
	case f.why <- fmt.Sprintf(format, v...):
	default:
	}
}
