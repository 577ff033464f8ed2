package coap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Signalling options have numbers of their own for each code (RFC 8323, Section 5.2).
const (
	csmMaxMessageSize message.OptionID = 2
	csmBlockWise      message.OptionID = 4
	pingCustody       message.OptionID = 2
	abortBadCSM       message.OptionID = 2
)

// baseMessageSize is what a peer takes that says nothing (RFC 8323, Section 5.3.1).
const baseMessageSize = 1152

// csm is our first message (RFC 8323, Section 5.3).
func (s *Server) csm() *Message {
	opts := AddUint(nil, csmMaxMessageSize, uint32(s.cfg.MaxMessageSize)) //nolint:gosec // a few hundred KiB
	return &Message{Code: codes.CSM, Options: AddOption(opts, csmBlockWise, nil)}
}

// signal handles a signalling message (RFC 8323, Section 5). It runs in the reader, so a Ping is answered while a handler is
// busy.
func (s *stream) signal(code codes.Code, token, body []byte) error {
	c := s.c
	c.messagesIn.Add(1)
	c.srv.metrics.in[kindSignal].Inc()
	m := &Message{Code: code, Token: token}
	var f fault
	var err error
	m.Options, m.Payload, f, err = decodeBody(body, nil, true)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if m.Code == codes.Abort {
		return fmt.Errorf("%w: %q", ErrAborted, clip(m.Payload))
	}
	if f.many {
		return fmt.Errorf("%w: %s", ErrMalformed, f)
	}
	for _, o := range m.Options {
		if o.ID&1 == 1 { // RFC 8323, Section 5.2: none of the critical ones is defined
			return &badSignal{option: o.ID, code: m.Code}
		}
	}
	switch m.Code {
	case codes.CSM:
		for _, o := range m.Options {
			switch {
			case o.ID == csmMaxMessageSize && len(o.Value) <= 4:
				var v [4]byte
				copy(v[4-len(o.Value):], o.Value)
				most := binary.BigEndian.Uint32(v[:])
				if most < maxHeader+maxToken {
					return &badSignal{option: o.ID, code: m.Code, absurd: true} // RFC 8323, Section 5.6: not even an error fits
				}
				s.peerMax.Store(most)
			case o.ID == csmBlockWise && len(o.Value) == 0:
				s.peerBlocks.Store(true)
			}
		}
	case codes.Ping:
		pong := &Message{Code: codes.Pong, Token: m.Token}
		if _, asked := m.Option(pingCustody); asked && c.settled() {
			// RFC 8323, Section 5.4.1: the option says that everything before the Ping has been processed. When that is not
			// so, the Pong goes without it rather than late: devices take a late Pong for a dead hub.
			pong.Options = AddOption(nil, pingCustody, nil)
		}
		c.sendNow(pong)
	case codes.Pong:
		if sent := time.Duration(c.lastPing.Load()); sent != 0 {
			c.pingTime.Store(int64(c.srv.now() - sent))
		}
	case codes.Release:
		// RFC 8323, Section 5.5: the peer wants an end; what it asked before is still answered, then we close.
		c.shut(ErrReleased, true)
	default:
		c.srv.metrics.dropped.WithLabelValues("signal").Inc()
	}
	return nil
}

// abort sends RFC 8323, Section 5.6, with what is wrong as diagnostic payload.
func (s *stream) abort(err error) {
	m := &Message{Code: codes.Abort, Payload: []byte(err.Error())}
	var option *badSignal
	if errors.As(err, &option) && option.code == codes.CSM {
		m.Options = AddUint(nil, abortBadCSM, uint32(option.option))
	}
	_ = s.send(s.c.ctx, m, false) // a peer that does not read learns nothing
	s.c.shut(err, false)
}

// settled reports that nothing the peer sent is still waiting or being handled.
func (c *Conn) settled() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.queued == 0 && !c.fetching
}

// badSignal is a critical signalling option that is not understood, or one whose value is absurd.
type badSignal struct {
	option message.OptionID
	code   codes.Code
	absurd bool
}

func (e *badSignal) Error() string {
	if e.absurd {
		return fmt.Sprintf("the value of option %d in a signalling message with code 7.%02d leaves no room for any message", e.option, e.code&0x1f)
	}
	return fmt.Sprintf("critical option %d in a signalling message with code 7.%02d is not understood", e.option, e.code&0x1f)
}

func (e *badSignal) Unwrap() error { return ErrBadSignal }

// clip bounds what of a peer's text goes into a log.
func clip(b []byte) []byte { return b[:min(len(b), 120)] }
