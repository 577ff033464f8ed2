package load

import (
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// hubSide is the other end of a datagram link.
type hubSide struct {
	*datagram
	t *testing.T
}

// linked has a device's link and the other end, which the caller reads.
func linked(t *testing.T) (*datagram, hubSide) {
	a, b := net.Pipe()
	d := &datagram{c: a, n: &confirmables{}}
	t.Cleanup(d.close)
	hub := hubSide{&datagram{c: b, n: &confirmables{}}, t}
	t.Cleanup(hub.close)
	return d, hub
}

func confirmable(id int32) message.Message {
	return message.Message{Type: message.Confirmable, MessageID: id, Code: codes.Content, Token: message.Token{byte(id)}}
}

// next is the ID of the next message and when it came.
func (h hubSide) next() (int32, time.Time) {
	h.t.Helper()
	m, err := h.recv()
	if err != nil {
		h.t.Fatal(err)
	}
	return m.MessageID, time.Now()
}

// What is not acknowledged is sent again four times at doubled distances; then the next message has its turn, not before.
func TestRetransmission(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, hub := linked(t)
		go func() {
			_ = d.send(confirmable(1))
			_ = d.send(confirmable(2))
		}()
		_, last := hub.next()
		var first time.Duration
		for try := range maxRetransmit + 1 {
			id, at := hub.next()
			gap := at.Sub(last)
			switch last = at; {
			case try == 0 && (gap < ackTimeout || gap > ackTimeout+ackSpread):
				t.Errorf("sent again after %v", gap)
			case try == 0:
				first = gap
			case gap != first<<try:
				t.Errorf("try %d came after %v, the first after %v", try, gap, first)
			}
			if want := int32(1 + try/maxRetransmit); id != want {
				t.Errorf("try %d was of message %d", try, id)
			}
		}
		if sent, again := d.n.sent.Load(), d.n.again.Load(); sent != 2 || again != maxRetransmit {
			t.Errorf("counted %d and %d", sent, again)
		}
	})
}

// An acknowledgement, a reset or the answer itself ends what is under way, and nothing else does.
func TestWhatEndsATransmission(t *testing.T) {
	t.Parallel()
	ask := message.Message{Type: message.Confirmable, MessageID: 1, Code: codes.POST, Token: message.Token{7}}
	for name, c := range map[string]struct {
		sent, got message.Message
		ends      bool
	}{
		"acknowledgement":         {confirmable(1), message.Message{Type: message.Acknowledgement, MessageID: 1}, true},
		"reset":                   {confirmable(1), message.Message{Type: message.Reset, MessageID: 1}, true},
		"of another message":      {confirmable(1), message.Message{Type: message.Acknowledgement, MessageID: 9}, false},
		"separate answer":         {ask, message.Message{Type: message.Confirmable, MessageID: 9, Code: codes.Changed, Token: message.Token{7}}, true},
		"answer to somebody else": {ask, message.Message{Type: message.Confirmable, MessageID: 9, Code: codes.Changed, Token: message.Token{8}}, false},
		"request":                 {confirmable(1), message.Message{Type: message.Confirmable, MessageID: 9, Code: codes.GET, Token: message.Token{1}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				d, hub := linked(t)
				go func() {
					_ = d.send(c.sent)
					_ = d.send(confirmable(2))
					for {
						if _, err := d.recv(); err != nil {
							return
						}
					}
				}()
				hub.next()
				begin := time.Now()
				hub.mu.Lock()
				err := hub.write(c.got)
				hub.mu.Unlock()
				if err != nil {
					t.Fatal(err)
				}
				id, at := hub.next()
				if ended := id == 2 && at.Equal(begin); ended != c.ends {
					t.Errorf("message %d came after %v", id, at.Sub(begin))
				}
			})
		})
	}
}

// A device whose messages nobody acknowledges does not collect them.
func TestWaitingIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, hub := linked(t)
		go func() { _, _ = hub.recv() }()
		for i := range maxWaiting {
			if err := d.send(confirmable(int32(i))); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.send(confirmable(maxWaiting)); err != errWaiting {
			t.Errorf("%v", err)
		}
	})
}

// A device does not use a message ID twice within the time that the hub remembers it for.
func TestMessageIDs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d, hub := linked(t)
		go func() {
			for {
				m, err := hub.recv()
				if err == nil {
					err = hub.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
				}
				if err != nil {
					return
				}
			}
		}()
		go func() {
			for {
				if _, err := d.recv(); err != nil {
					return
				}
			}
		}()
		send := func(want error) {
			t.Helper()
			if err := d.send(confirmable(int32(d.ids % messageIDs))); err != want {
				t.Fatalf("message %d: %v, want %v", d.ids, err, want)
			}
			synctest.Wait()
		}
		for range messageIDs {
			send(nil)
		}
		send(errNoID)
		time.Sleep(exchangeLifetime)
		send(nil)
	})
}
