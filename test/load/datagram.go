package load

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	udpcoder "github.com/plgd-dev/go-coap/v3/udp/coder"
)

// The transmission parameters of RFC 7252, Section 4.8.
const (
	ackTimeout    = 2 * time.Second
	ackSpread     = time.Second // ACK_TIMEOUT * (ACK_RANDOM_FACTOR - 1)
	maxRetransmit = 4
	// A message ID is not used again for EXCHANGE_LIFETIME (Sections 4.4 and 4.8.2): who does it is not heard.
	exchangeLifetime = 247 * time.Second
	messageIDs       = 1 << 16
)

// maxWaiting bounds the confirmable messages of one device that are not acknowledged; a further one is not sent.
const maxWaiting = 64

var (
	errWaiting = errors.New("too many messages of a device wait for their acknowledgement")
	errNoID    = errors.New("a device has used all its message IDs within 247 s (RFC 7252, Section 4.4): measure with more devices")
)

// confirmables counts the confirmable messages of all devices, and how often one was sent again.
type confirmables struct{ sent, again atomic.Int64 }

// datagram is CoAP over UDP or DTLS (RFC 7252). Of the confirmable messages one is under way (NSTART, Section 4.7) and is sent
// again until it is acknowledged or was sent too often (Section 4.2); the others wait behind it.
type datagram struct {
	c net.Conn
	n *confirmables

	mu      sync.Mutex // guards all below to the empty line
	out     [2048]byte
	waiting []message.Message // the first is under way
	ids     int               // how many message IDs were used since begun
	begun   time.Time
	tries   int           // how often it was sent again
	timeout time.Duration // until it is sent again
	timer   *time.Timer

	in      [2048]byte
	options [maxOptions]message.Option
}

func (d *datagram) datagrams() bool { return true }

func (d *datagram) close() {
	d.mu.Lock()
	d.waiting = nil
	if d.timer != nil {
		d.timer.Stop()
	}
	d.mu.Unlock()
	_ = d.c.Close()
}

func (d *datagram) send(m message.Message) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.Type != message.Confirmable {
		return d.write(m)
	}
	if len(d.waiting) >= maxWaiting {
		return errWaiting
	}
	if d.ids == messageIDs {
		if time.Since(d.begun) < exchangeLifetime {
			return errNoID
		}
		d.ids = 0
	}
	if d.ids++; d.ids == 1 {
		d.begun = time.Now()
	}
	if d.waiting = append(d.waiting, m); len(d.waiting) > 1 {
		return nil
	}
	return d.begin()
}

// begin sends the first of the waiting messages. The caller holds mu.
func (d *datagram) begin() error {
	d.tries, d.timeout = 0, ackTimeout+rand.N(ackSpread)
	d.n.sent.Add(1)
	id := d.waiting[0].MessageID
	d.timer = time.AfterFunc(d.timeout, func() { d.overdue(id) })
	return d.write(d.waiting[0])
}

func (d *datagram) write(m message.Message) error {
	n, err := udpcoder.DefaultCoder.Encode(m, d.out[:])
	if err != nil {
		return err
	}
	_, err = d.c.Write(d.out[:n])
	return err
}

// overdue sends the message under way again, or gives it up (RFC 7252, Section 4.2). What does not leave is found by recv.
func (d *datagram) overdue(id int32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case len(d.waiting) == 0 || d.waiting[0].MessageID != id: // it was acknowledged just now
	case d.tries == maxRetransmit:
		d.next()
	default:
		d.tries++
		d.timeout *= 2
		d.timer.Reset(d.timeout)
		d.n.again.Add(1)
		_ = d.write(d.waiting[0])
	}
}

// next forgets the message under way and sends the one behind it. The caller holds mu.
func (d *datagram) next() {
	d.timer.Stop()
	if d.waiting = slices.Delete(d.waiting, 0, 1); len(d.waiting) > 0 {
		_ = d.begin()
	}
}

func (d *datagram) recv() (message.Message, error) {
	m := message.Message{Options: d.options[:0]}
	n, err := d.c.Read(d.in[:])
	if err == nil {
		_, err = udpcoder.DefaultCoder.Decode(d.in[:n], &m)
	}
	if err == nil {
		d.settle(&m)
	}
	return m, err
}

// settle lets the next message go if m ends the one under way. A reset gets its token, so that the reader knows what it is about.
func (d *datagram) settle(m *message.Message) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.waiting) == 0 {
		return
	}
	first := d.waiting[0]
	switch {
	case m.Type == message.Acknowledgement || m.Type == message.Reset:
		if m.MessageID != first.MessageID {
			return
		}
		if m.Type == message.Reset {
			m.Token = first.Token
		}
	case m.Code < codes.Created || first.Code >= codes.Created || !bytes.Equal(m.Token, first.Token):
		return // else the answer stands for an acknowledgement that was lost (RFC 7252, Section 5.2.2)
	}
	d.next()
}
