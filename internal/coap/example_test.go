package coap_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/udp"

	"github.com/coaphub/coaphub/internal/coap"
)

// greeter is a Handler; each connection is one of its guests.
type greeter struct{}

func (greeter) Open(c *coap.Conn) (coap.ConnHandler, error) { return guest{c}, nil }

type guest struct{ conn *coap.Conn }

func (g guest) Request(_ context.Context, req *coap.Message) coap.Response {
	if coap.Path(req) != "/hello" {
		return coap.Response{Code: codes.NotFound}
	}
	over := map[bool]string{true: "a stream", false: "datagrams"}[g.conn.Info().Stream]
	return coap.Response{Code: codes.Content, Payload: []byte("hello over " + over)}
}

func (guest) Notifications(context.Context, []coap.Notification) {} // of what we observe at a guest: nothing
func (guest) Closed(error)                                       {}

// One handler serves every transport. The clients are go-coap's.
func ExampleServer() {
	srv := coap.NewServer(coap.DefaultConfig(), greeter{}, slog.New(slog.DiscardHandler), coap.NewMetrics(nil))
	datagrams, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	streams, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() { _ = srv.ServeUDP(ctx, datagrams) })
	serving.Go(func() { _ = srv.ServeTCP(ctx, streams, nil) }) // without TLS

	noTimers := options.WithPeriodicRunner(func(func(time.Time) bool) {})
	if c, err := udp.Dial(datagrams.LocalAddr().String(), noTimers); err == nil {
		m, err := c.Get(ctx, "/hello")
		if err == nil {
			body, _ := m.ReadBody()
			fmt.Printf("%v: %s\n", m.Code(), body)
		}
		_ = c.Close()
		<-c.Done()
	}
	if c, err := tcp.Dial(streams.Addr().String(), noTimers); err == nil {
		m, err := c.Get(ctx, "/hello")
		if err == nil {
			body, _ := m.ReadBody()
			fmt.Printf("%v: %s\n", m.Code(), body)
		}
		_ = c.Close()
		<-c.Done()
	}
	stop()
	serving.Wait()
	// Output:
	// Content: hello over datagrams
	// Content: hello over a stream
}
