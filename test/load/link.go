package load

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
	netpacket "github.com/pion/dtls/v3/pkg/net"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	tcpcoder "github.com/plgd-dev/go-coap/v3/tcp/coder"

	"github.com/coaphub/coaphub/test/device"
)

const (
	dialTimeout  = 20 * time.Second
	writeTimeout = 10 * time.Second
	maxMessage   = 1 << 20
	maxOptions   = 32
)

// link is a connection to the hub.
type link interface {
	// send writes a message; several goroutines may. A confirmable one waits for its turn, and is sent again until it is
	// acknowledged.
	send(m message.Message) error
	// recv reads the next message, which is good until the next call. One goroutine may.
	recv() (message.Message, error)
	// datagrams says that messages have a type and an ID.
	datagrams() bool
	close()
}

// dial opens a connection by the scheme of the address: coaps+tcp, coaps, coap+tcp or coap.
func dial(ctx context.Context, on device.Onboarding, n *confirmables) (link, error) {
	u, err := url.Parse(on.HubAddr)
	if err != nil {
		return nil, fmt.Errorf("the hub's address: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	network := "tcp"
	if u.Scheme == "coap" || u.Scheme == "coaps" {
		network = "udp"
	}
	raw, err := new(net.Dialer).DialContext(ctx, network, u.Host)
	if err != nil {
		return nil, err
	}
	switch u.Scheme {
	case "coap":
		return &datagram{c: raw, n: n}, nil
	case "coaps":
		c, err := dtls.ClientWithOptions(netpacket.PacketConnFromConn(raw), raw.RemoteAddr(), device.DTLSOptions(on.TLS, on.PSK, true)...)
		if err == nil {
			if err = c.HandshakeContext(ctx); err == nil {
				return &datagram{c: c, n: n}, nil
			}
			_ = c.Close()
		}
		_ = raw.Close()
		return nil, err
	case "coaps+tcp":
		c := tls.Client(raw, on.TLS)
		if err := c.HandshakeContext(ctx); err != nil {
			_ = raw.Close()
			return nil, err
		}
		raw = c
	}
	s := &stream{c: raw, in: make([]byte, 4096)}
	if err := s.send(message.Message{Code: codes.CSM}); err != nil { // RFC 8323, Section 5.3: the first message
		_ = raw.Close()
		return nil, err
	}
	return s, nil
}

// stream is CoAP over TCP or TLS (RFC 8323).
type stream struct {
	c net.Conn

	mu  sync.Mutex // guards out
	out []byte

	in         []byte
	used, have int
	options    [maxOptions]message.Option
}

func (s *stream) datagrams() bool { return false }
func (s *stream) close()          { _ = s.c.Close() }

func (s *stream) send(m message.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := tcpcoder.DefaultCoder.Encode(m, s.out)
	if errors.Is(err, message.ErrTooSmall) {
		s.out = make([]byte, n)
		n, err = tcpcoder.DefaultCoder.Encode(m, s.out)
	}
	if err != nil {
		return err
	}
	if err := s.c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err = s.c.Write(s.out[:n])
	return err
}

func (s *stream) recv() (message.Message, error) {
	for {
		m := message.Message{Options: s.options[:0]}
		var h tcpcoder.MessageHeader
		rest := s.in[s.used:s.have]
		// The coder takes all that it is given for one message.
		if _, err := tcpcoder.DefaultCoder.DecodeHeader(rest, &h); err == nil && int(h.MessageLength) <= len(rest) {
			s.used += int(h.MessageLength)
			_, err := tcpcoder.DefaultCoder.Decode(rest[:h.MessageLength], &m)
			return m, err
		} else if err != nil && !errors.Is(err, message.ErrShortRead) {
			return m, err
		}
		s.have = copy(s.in, s.in[s.used:s.have])
		s.used = 0
		if s.have == len(s.in) {
			if len(s.in) >= maxMessage {
				return m, errors.New("the hub sent a message of more than a megabyte")
			}
			s.in = append(s.in, make([]byte, len(s.in))...)
		}
		n, err := s.c.Read(s.in[s.have:])
		if n == 0 && err != nil {
			return m, err
		}
		s.have += n
	}
}
