// Package bussim is as much of a NATS server as the bus asks for, in memory and without time or a network of its own: it is given what a
// client sent, and gives what is for one. Tests that simulate both put it at the other end of their connections.
//
// It must not know what is carried.
package bussim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// Server is a NATS server. Its methods may be called from any goroutine.
type Server struct {
	// Pick chooses one of n members of a queue group; nil: the first.
	Pick func(n int) int
	// Copies is how often a message reaches whom it is for; nil: once. Core NATS loses messages when connections break.
	Copies func(subject string) int

	mu      sync.Mutex // guards all below, and what clients have
	clients []*Client
}

// Client is one connection.
type Client struct {
	s       *Server
	send    func([]byte)
	in      []byte
	replies bool // it wants to know when nobody is there to answer
	subs    []*sub
	closed  bool
}

type sub struct {
	subject []string
	queue   string
	sid     string
	left    int // messages until it ends; negative: no end
}

// Connect takes a connection; send takes what is for the client, in order, and does not block or call back.
func (s *Server) Connect(send func([]byte)) *Client {
	c := &Client{s: s, send: send}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, c)
	send([]byte(`INFO {"server_id":"SIM","version":"2.12.0","proto":1,"headers":true,"max_payload":1048576}` + "\r\n"))
	return c
}

// Close ends the connection.
func (c *Client) Close() {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.closed = true
	c.s.clients = slices.DeleteFunc(c.s.clients, func(o *Client) bool { return o == c })
}

// Take takes what the client sent.
func (c *Client) Take(p []byte) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.closed {
		return nil
	}
	c.in = append(c.in, p...)
	for {
		line, rest, ok := bytes.Cut(c.in, []byte("\r\n"))
		if !ok {
			return nil
		}
		n, err := c.line(string(line), rest)
		switch {
		case err != nil:
			return err
		case n < 0:
			return nil // the payload is on its way
		}
		c.in = append(c.in[:0], rest[n:]...)
	}
}

// line carries out a line, and returns what it took of what follows; negative: not all is there.
func (c *Client) line(line string, rest []byte) (took int, err error) {
	words := strings.Fields(line)
	if len(words) == 0 {
		return 0, nil
	}
	switch op := strings.ToUpper(words[0]); op {
	case "CONNECT":
		var opts struct {
			NoResponders bool `json:"no_responders"`
		}
		if err := json.Unmarshal([]byte(line[len("CONNECT"):]), &opts); err != nil {
			return 0, err
		}
		c.replies = opts.NoResponders
	case "PING":
		c.send([]byte("PONG\r\n"))
	case "PONG":
	case "SUB":
		x := &sub{subject: strings.Split(words[1], "."), sid: words[len(words)-1], left: -1}
		if len(words) == 4 {
			x.queue = words[2]
		}
		c.subs = append(c.subs, x)
	case "UNSUB":
		for _, x := range c.subs {
			if x.sid == words[1] {
				x.left = 0
				if len(words) == 3 {
					x.left, err = strconv.Atoi(words[2])
				}
			}
		}
		c.sweep()
	case "PUB", "HPUB":
		size, err := strconv.Atoi(words[len(words)-1])
		if err != nil {
			return 0, err
		}
		if len(rest) < size+2 {
			return -1, nil
		}
		reply := ""
		if fixed := 3; op == "PUB" && len(words) > fixed || len(words) > fixed+1 {
			reply = words[2]
		}
		if op == "HPUB" {
			return 0, errors.New("headers are not simulated")
		}
		c.publish(words[1], reply, rest[:size])
		return size + 2, nil
	default:
		return 0, fmt.Errorf("nobody knows the operation %q", op)
	}
	return 0, err
}

func (c *Client) sweep() {
	c.subs = slices.DeleteFunc(c.subs, func(x *sub) bool { return x.left == 0 })
}

// publish gives a message to all who listen, of each queue group to one. s.mu is held.
func (c *Client) publish(subject, reply string, payload []byte) {
	type taker struct {
		c *Client
		x *sub
	}
	var all []taker
	groups := map[string][]taker{}
	var names []string
	tokens := strings.Split(subject, ".")
	for _, o := range c.s.clients {
		for _, x := range o.subs {
			switch {
			case !covers(x.subject, tokens):
			case x.queue == "":
				all = append(all, taker{o, x})
			default:
				if groups[x.queue] == nil {
					names = append(names, x.queue)
				}
				groups[x.queue] = append(groups[x.queue], taker{o, x})
			}
		}
	}
	for _, name := range names {
		n := 0
		if group := groups[name]; c.s.Pick != nil {
			n = c.s.Pick(len(group))
		}
		all = append(all, groups[name][n])
	}
	if len(all) == 0 {
		if c.replies && reply != "" {
			c.refuse(reply)
		}
		return
	}
	copies := 1
	if c.s.Copies != nil {
		copies = c.s.Copies(subject)
	}
	for _, to := range all {
		head := "MSG " + subject + " " + to.x.sid + " "
		if reply != "" {
			head += reply + " "
		}
		msg := append([]byte(head+strconv.Itoa(len(payload))+"\r\n"), payload...)
		msg = append(msg, "\r\n"...)
		for range copies {
			to.c.send(msg)
		}
		if to.x.left > 0 {
			to.x.left--
			to.c.sweep()
		}
	}
}

// refuse says that nobody is there to answer.
func (c *Client) refuse(reply string) {
	const header = "NATS/1.0 503\r\n\r\n"
	tokens := strings.Split(reply, ".")
	for _, x := range c.subs {
		if covers(x.subject, tokens) {
			c.send(fmt.Appendf(nil, "HMSG %s %s %d %d\r\n%s\r\n", reply, x.sid, len(header), len(header), header))
			return
		}
	}
}

func covers(pattern, subject []string) bool {
	for i, p := range pattern {
		switch {
		case p == ">":
			return len(subject) > i
		case i >= len(subject) || p != "*" && p != subject[i]:
			return false
		}
	}
	return len(pattern) == len(subject)
}
