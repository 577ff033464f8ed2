// Command mongo is a MongoDB server for tests that need one and have none: FerretDB over SQLite in the folder that its argument
// names. It listens on a loopback port, prints its URI on one line, and ends when its standard input does. It is a module of its
// own, so that FerretDB does not lift the product's versions.
//
// It is built by build, which says why, and proves what commands mean, not how long they take. Where FerretDB does not mean what MongoDB
// does, a relay in front of it makes up for that; see relay.go.
//
// It must not know the hub.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"os"

	"github.com/FerretDB/FerretDB/ferretdb"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mongo:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("usage: mongo FOLDER")
	}
	f, err := ferretdb.New(&ferretdb.Config{
		Listener: ferretdb.ListenerConfig{TCP: "127.0.0.1:0"},
		Handler:  "sqlite", SQLiteURL: "file:" + os.Args[1] + "/?_pragma=synchronous(off)&_txlock=immediate",
		Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	front, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go func() { // ends with the process
		back, err := url.Parse(f.MongoDBURI()) // waits for the listener, which Run opens
		if err != nil {
			fmt.Fprintln(os.Stderr, "mongo:", err)
			stop()
			return
		}
		go relay(ctx, front, back.Host)
		fmt.Printf("mongodb://%s/\n", front.Addr())
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	return f.Run(ctx)
}
