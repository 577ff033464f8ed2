package bus

import (
	"fmt"

	"github.com/nats-io/nats.go"
)

const (
	// untaken and untakenBytes bound the notes of one listener that wait for it; beyond, notes are lost, and the log says so.
	untaken, untakenBytes = 16 << 10, 16 << 20
)

// Note is word of something, by its name, to whoever listens to a subject at the moment: nobody knows who did, and some may be lost.
// What has to arrive is asked for; a note says that it is time to. T is as in Method.
type Note[T any] string

// note is a message to those who listen. As with question, numbers never change.
type note struct {
	Version uint8  `cbor:"1,keyasint"`
	Build   string `cbor:"2,keyasint,omitempty"`
	Name    string `cbor:"3,keyasint,omitempty"`
	Body    []byte `cbor:"4,keyasint,omitempty"`
}

// Send sends a note, of one message at most; it does not wait. An error is "bus-away", or that the note is too large.
func (n Note[T]) Send(b *Bus, subject string, v T) error {
	body, err := encoding.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", n, err)
	}
	if len(body) > maxPart {
		return fmt.Errorf("%s: %d bytes are too many for a note", n, len(body))
	}
	data, err := encoding.Marshal(note{version, b.build, string(n), body})
	if err != nil {
		return fmt.Errorf("encode a note: %w", err)
	}
	if err := b.conn.Publish(b.prefix+subject, data); err != nil {
		return busAway.With(string(n), err)
	}
	return nil
}

// Listen has f called with each note of this name to the subject, one at a time, until stop was called. The subject may have NATS's
// wildcards. Notes of versions that this one cannot read are passed over, and those that f has no time for.
func (n Note[T]) Listen(b *Bus, subject string, f func(T)) (stop func(), err error) {
	return n.listen(b, subject, f, func(note) {})
}

// listen is Listen, and has other called with notes of versions that this one cannot read.
func (n Note[T]) listen(b *Bus, subject string, f func(T), other func(note)) (stop func(), err error) {
	sub, err := b.conn.Subscribe(b.prefix+subject, func(msg *nats.Msg) {
		var got note
		switch {
		case decoding.Unmarshal(msg.Data, &got) != nil:
			return
		case got.Version != version:
			other(got)
			return
		case got.Name != string(n):
			return
		}
		var v T
		if decoding.Unmarshal(got.Body, &v) == nil {
			f(v)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("listen to %s: %w", subject, err)
	}
	if err := sub.SetPendingLimits(untaken, untakenBytes); err != nil {
		return nil, fmt.Errorf("listen to %s: %w", subject, err)
	}
	return func() { _ = sub.Unsubscribe() }, nil // of a connection that is closed there is nothing to take back
}
