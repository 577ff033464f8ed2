package mongostore_test

import (
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"

	"go.mongodb.org/mongo-driver/v2/bson"
)

// proxy stands between a store and the server, reads the commands, and does to them what a test wants.
type proxy struct {
	tb    testing.TB
	l     net.Listener
	back  string
	conns sync.WaitGroup

	mu   sync.Mutex // guards what follows
	do   func(c command) action
	down bool
	open map[net.Conn]bool
}

// command is what a driver sends.
type command struct {
	name       string // insert, find, …
	collection string
	body       bson.Raw
}

// action is what the proxy does with a command.
type action struct {
	// before and after cut the connection before the server sees the command, or after it answered.
	before, after bool
	// answer is sent instead of handing the command on, or with after instead of the server's answer.
	answer bson.D
	// hold is waited for before the command goes on.
	hold <-chan struct{}
}

const (
	opMsg      = 2013
	headerSize = 16 // length, request, response to, op code: 32 bits each in little endian
)

// newProxy starts one in front of the server of the tests; with a TLS configuration it speaks TLS to its clients.
func newProxy(tb testing.TB, conf ...*tls.Config) *proxy {
	tb.Helper()
	u, err := url.Parse(uri)
	if err != nil {
		tb.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	if len(conf) > 0 {
		l = tls.NewListener(l, conf[0])
	}
	p := &proxy{tb: tb, l: l, back: strings.Split(u.Host, ",")[0], open: map[net.Conn]bool{}}
	p.conns.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			p.conns.Go(func() { p.serve(client) })
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		p.set(func() { p.down = true })
		p.cut()
		p.conns.Wait()
	})
	return p
}

// uri is what a store is given to connect by way of the proxy; no other server is asked for.
func (p *proxy) uri() string { return "mongodb://" + p.l.Addr().String() + "/?directConnection=true" }

func (p *proxy) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

// on makes the proxy ask do about each command.
func (p *proxy) on(do func(c command) action) { p.set(func() { p.do = do }) }

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		_ = c.Close()
	}
}

// leave takes the server away, and comes back with it.
func (p *proxy) leave()    { p.set(func() { p.down = true }); p.cut() }
func (p *proxy) comeBack() { p.set(func() { p.down = false }) }

func (p *proxy) ask(c command) action {
	p.mu.Lock()
	do := p.do
	p.mu.Unlock()
	if do == nil {
		return action{}
	}
	return do(c)
}

func (p *proxy) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.down {
		p.open[c] = true
	}
	return !p.down
}

func (p *proxy) serve(client net.Conn) {
	defer client.Close()
	if !p.add(client) {
		return
	}
	defer p.set(func() { delete(p.open, client) })
	server, err := net.Dial("tcp", p.back)
	if err != nil {
		return
	}
	defer server.Close()
	for {
		msg, err := message(client)
		if err != nil {
			return
		}
		do := action{}
		if c, ok := parse(msg); ok {
			do = p.ask(c)
		}
		if do.hold != nil {
			<-do.hold
		}
		if do.before {
			return
		}
		if do.answer != nil && !do.after {
			if _, err := client.Write(reply(p.tb, msg, do.answer)); err != nil {
				return
			}
			continue
		}
		if _, err := server.Write(msg); err != nil {
			return
		}
		for {
			answer, err := message(server)
			if err != nil || do.after && do.answer == nil {
				return
			}
			if do.answer != nil {
				answer = reply(p.tb, msg, do.answer)
			}
			if _, err := client.Write(answer); err != nil {
				return
			}
			if binary.LittleEndian.Uint32(answer[12:]) != opMsg || answer[headerSize]&2 == 0 { // no more to come
				break
			}
		}
	}
}

func message(from io.Reader) ([]byte, error) {
	var size [4]byte
	if _, err := io.ReadFull(from, size[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(size[:])
	if n < headerSize || n > 64<<20 {
		return nil, io.ErrUnexpectedEOF
	}
	msg := make([]byte, n)
	copy(msg, size[:])
	_, err := io.ReadFull(from, msg[len(size):])
	return msg, err
}

// parse reads the command of an OP_MSG whose first section is of kind 0.
func parse(msg []byte) (command, bool) {
	if binary.LittleEndian.Uint32(msg[12:]) != opMsg || len(msg) < headerSize+9 || msg[headerSize+4] != 0 {
		return command{}, false
	}
	body := bson.Raw(msg[headerSize+5:])
	if n := binary.LittleEndian.Uint32(body); int(n) <= len(body) {
		body = body[:n]
	}
	first, err := body.IndexErr(0)
	if err != nil {
		return command{}, false
	}
	c := command{name: first.Key(), body: body}
	c.collection, _ = first.Value().StringValueOK()
	return c, true
}

// reply makes an OP_MSG that answers one.
func reply(tb testing.TB, to []byte, doc bson.D) []byte {
	body, err := bson.Marshal(doc)
	if err != nil {
		tb.Errorf("encode an answer: %v", err)
		return nil
	}
	b := make([]byte, headerSize+5, headerSize+5+len(body))
	binary.LittleEndian.PutUint32(b, uint32(headerSize+5+len(body)))
	copy(b[8:12], to[4:8])
	binary.LittleEndian.PutUint32(b[12:], opMsg)
	return append(b, body...)
}

// fails is a server's answer to a command that it refuses.
func fails(code int32, name string) bson.D {
	return bson.D{{Key: "ok", Value: 0.0}, {Key: "errmsg", Value: name}, {Key: "code", Value: code}, {Key: "codeName", Value: name}}
}
