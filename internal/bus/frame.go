package bus

import (
	"errors"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// version is of the frames below and of all that goes in them, and batchVersion of those that carry batches. A part that is asked in
// another one says so; both are named in the log. Who asked with a batch asks again one by one.
const version, batchVersion = 1, 2

// question is a message to a part. Never change the number of a field: during an update both sides of it run.
type question struct {
	Version uint8         `cbor:"1,keyasint"`
	Build   string        `cbor:"2,keyasint,omitempty"` // the program's version of who asks
	Method  string        `cbor:"3,keyasint,omitempty"`
	Within  time.Duration `cbor:"4,keyasint"` // after which nobody waits for the answer
	Part    []byte        `cbor:"5,keyasint,omitempty"`
	More    bool          `cbor:"6,keyasint,omitempty"` // what follows of the question goes where the answer says
	Batch   []item        `cbor:"7,keyasint,omitempty"` // with batchVersion, instead of all above but Build
}

// item is a question of a batch.
type item struct {
	At      int           `cbor:"1,keyasint"` // by which its outcome is known
	Subject string        `cbor:"2,keyasint"` // where it would go alone, below the hub's prefix
	Method  string        `cbor:"3,keyasint"`
	Within  time.Duration `cbor:"4,keyasint"`
	Body    []byte        `cbor:"5,keyasint,omitempty"`
	until   time.Time
}

// size is about what an item takes of a message.
func (i *item) size() int { return len(i.Subject) + len(i.Method) + len(i.Body) + 32 }

// answer is what comes back for each question.
type answer struct {
	Version uint8    `cbor:"1,keyasint"`
	Build   string   `cbor:"2,keyasint,omitempty"`
	Part    []byte   `cbor:"3,keyasint,omitempty"`
	Next    string   `cbor:"4,keyasint,omitempty"` // where what follows of the question goes, or what follows of the answer is asked for
	Failure *failure `cbor:"5,keyasint,omitempty"`
	// Batch is, with batchVersion, some outcomes of a batch; each comes once, in any order, in as many answers as it takes.
	Batch []outcome `cbor:"6,keyasint,omitempty"`
}

// outcome is what an answer to a question of a batch says.
type outcome struct {
	At      int      `cbor:"1,keyasint"`
	Part    []byte   `cbor:"2,keyasint,omitempty"`
	Next    string   `cbor:"3,keyasint,omitempty"`
	Failure *failure `cbor:"4,keyasint,omitempty"`
	err     error    // of who asked
}

// failure is an error that crosses the bus with what callers and outsiders may know of it; the rest is in the log of who made it.
type failure struct {
	Kind       string        `cbor:"1,keyasint"`
	Code       string        `cbor:"2,keyasint,omitempty"`
	Text       string        `cbor:"3,keyasint,omitempty"`
	RetryAfter time.Duration `cbor:"4,keyasint,omitempty"`
}

func failureOf(err error) *failure {
	f := &failure{Kind: hub.KindOf(err).String()}
	f.Code, f.Text = hub.Public(err)
	if e := (*hub.Error)(nil); errors.As(err, &e) {
		f.RetryAfter = e.RetryAfter
	}
	return f
}

func (f failure) err(op string) error {
	e := &hub.Error{Op: op, Code: f.Code, Text: f.Text, RetryAfter: f.RetryAfter} // Internal: a kind that this version does not know
	for _, k := range hub.Kinds() {
		if k.String() == f.Kind {
			e.Kind = k
		}
	}
	return e
}

// decode reads what the other side sent; build is ours.
func (a *answer) decode(data []byte, build string) error {
	if err := decoding.Unmarshal(data, a); err != nil {
		return fmt.Errorf("decode an answer: %w", err)
	}
	if a.Version != version {
		return strangers(build, a.Build, a.Version)
	}
	return nil
}

var strange = hub.NewError(hub.Unavailable, "part-version", "two parts of the hub are of versions that cannot talk to each other")

// strangers is the error of two programs that cannot talk.
func strangers(own, other string, theirs uint8) error {
	return strange.With("bus",
		fmt.Errorf("this is coaphub %s, which speaks version %d, and the other coaphub %s, which speaks version %d", own, version, other, theirs))
}
