package oauthserver

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"strings"
	"unicode/utf8"

	"golang.org/x/crypto/argon2"

	"github.com/coaphub/coaphub/hub"
)

// Limits of a password that somebody chooses.
const (
	minPassword = 10  // characters
	maxPassword = 256 // bytes; more would be work for us and no use to anybody
)

// cost is argon2id's.
type cost struct {
	time, memory uint32 // memory in KiB
	threads      uint8
}

// defaultCost is the second of RFC 9106's recommendations cut to a small machine: 64 MiB, three passes, one lane.
var defaultCost = cost{time: 3, memory: 64 << 10, threads: 1}

// oneTimeCost is for passwords that newPassword made: nobody tries 2^100 of them, however fast each is, and a hub with a new
// one at each start should not take longer to start.
var oneTimeCost = cost{time: 1, memory: 8, threads: 1}

// Passwords hashed at the same time, and waiting for that. Each takes 64 MiB and about 0.2 s of a core; who finds the queue
// full is told to come back.
const (
	hashesAtOnce  = 2
	hashesWaiting = 32
)

// hasher hashes and checks passwords with argon2id, a bounded number at a time.
type hasher struct {
	cost  cost
	slots chan struct{} // holds a token for each hash under way
	queue chan struct{} // holds a token for each caller, under way or waiting
}

func newHasher(c cost) *hasher {
	return &hasher{cost: c, slots: make(chan struct{}, hashesAtOnce), queue: make(chan struct{}, hashesAtOnce+hashesWaiting)}
}

func (h *hasher) slot(ctx context.Context) (release func(), err error) {
	select {
	case h.queue <- struct{}{}:
	default:
		return nil, &hub.Error{Kind: hub.Exhausted, Op: "hash password"}
	}
	select {
	case h.slots <- struct{}{}:
		return func() { <-h.slots; <-h.queue }, nil
	case <-ctx.Done():
		<-h.queue
		return nil, trouble("hash password", ctx.Err())
	}
}

// hash returns the PHC string of a password; oneTime says that newPassword made it.
func (h *hasher) hash(ctx context.Context, password string, oneTime bool) (string, error) {
	c := h.cost
	if oneTime {
		c = oneTimeCost
	}
	release, err := h.slot(ctx)
	if err != nil {
		return "", err
	}
	defer release()
	salt := random(16)
	key := argon2.IDKey([]byte(password), salt, c.time, c.memory, c.threads, 32)
	enc := base64.RawStdEncoding
	return fmt.Sprintf("$argon2id$v=%d$m=%d,t=%d,p=%d$%s$%s", argon2.Version, c.memory, c.time, c.threads,
		enc.EncodeToString(salt), enc.EncodeToString(key)), nil
}

// check reports whether the password belongs to the PHC string. An empty one is never right. Every check takes as long as that
// of a chosen password, so that the time does not tell which accounts exist.
func (h *hasher) check(ctx context.Context, phc, password string) (bool, error) {
	if len(password) > maxPassword {
		return false, nil
	}
	release, err := h.slot(ctx)
	if err != nil {
		return false, err
	}
	defer release()
	waste := func() {
		argon2.IDKey([]byte(password), make([]byte, 16), h.cost.time, h.cost.memory, h.cost.threads, 32)
	}
	if phc == "" {
		waste()
		return false, nil
	}
	var version int
	var c cost
	parts := strings.Split(phc, "$")
	if len(parts) != 6 || parts[1] != "argon2id" {
		return false, &hub.Error{Kind: hub.Internal, Op: "read password hash", Err: fmt.Errorf("%d parts", len(parts))}
	}
	if _, err := fmt.Sscanf(parts[2]+" "+parts[3], "v=%d m=%d,t=%d,p=%d", &version, &c.memory, &c.time, &c.threads); err != nil || version != argon2.Version {
		return false, &hub.Error{Kind: hub.Internal, Op: "read password hash", Err: err}
	}
	salt, err1 := base64.RawStdEncoding.DecodeString(parts[4])
	want, err2 := base64.RawStdEncoding.DecodeString(parts[5])
	if err1 != nil || err2 != nil || len(want) == 0 {
		return false, &hub.Error{Kind: hub.Internal, Op: "read password hash"}
	}
	if c == oneTimeCost {
		waste()
	}
	got := argon2.IDKey([]byte(password), salt, c.time, c.memory, c.threads, uint32(len(want)))
	return subtle.ConstantTimeCompare(got, want) == 1, nil
}

// checkNew says what is wrong with a password that somebody chose.
func checkNew(password string) error {
	text := ""
	switch {
	case !utf8.ValidString(password):
		text = "the password is not UTF-8"
	case utf8.RuneCountInString(password) < minPassword:
		text = fmt.Sprintf("the password is shorter than %d characters", minPassword)
	case len(password) > maxPassword:
		text = fmt.Sprintf("the password is longer than %d bytes", maxPassword)
	default:
		return nil
	}
	return &hub.Error{Kind: hub.Invalid, Code: "password-invalid", Text: text}
}
