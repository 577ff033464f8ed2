// Command nats is a NATS server with JetStream for tests that need one as a process: what it keeps is in the folder that its argument
// names. It listens where a second argument says, HOST:PORT, or on any port of loopback, prints its URL on one line, and ends when its
// standard input does.
//
// It must not know the hub.
package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nats:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 1 || len(args) > 2 {
		return errors.New("usage: nats FOLDER [HOST:PORT]")
	}
	host, port := "127.0.0.1", server.RANDOM_PORT
	if len(args) == 2 {
		at, err := netip.ParseAddrPort(args[1])
		if err != nil {
			return err
		}
		host, port = at.Addr().String(), int(at.Port())
	}
	s, err := server.NewServer(&server.Options{
		Host: host, Port: port, NoLog: true, NoSigs: true, JetStream: true, StoreDir: args[0], SyncAlways: true,
	})
	if err != nil {
		return err
	}
	s.Start()
	if !s.ReadyForConnections(30 * time.Second) {
		return errors.New("the server does not come up")
	}
	fmt.Println(s.ClientURL())
	_, err = io.Copy(io.Discard, os.Stdin)
	s.Shutdown()
	s.WaitForShutdown()
	return err
}
