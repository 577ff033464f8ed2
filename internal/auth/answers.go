package auth

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

const (
	codeWindow    = 60 * time.Second
	refreshWindow = 24 * time.Hour
	// maxAnswers bounds the kept answers and the requests under way together, some 5 KB each. When it is full, the answer that
	// ends first goes; when all are under way, the next is refused.
	maxAnswers = 4096
)

// inquiry is who asked for what: the name it is found under, and the key that what came of it is encrypted with. Both are
// made of the code or refresh token, and neither can be made of the other: while an answer is kept, whoever reads the memory
// has its tokens only if he has the code too.
type inquiry struct{ name, key [32]byte }

func inquire(fields ...string) inquiry {
	return inquiry{digest(append([]string{"name"}, fields...)...), digest(append([]string{"key"}, fields...)...)}
}

// digest hashes the fields with their lengths, so that none can be shifted into another.
func digest(fields ...string) [32]byte {
	h := sha256.New()
	for _, f := range fields {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(f))))
		h.Write([]byte(f))
	}
	return [32]byte(h.Sum(nil))
}

// flight is a request under way. Its outcome is set before ready is closed and then never changed.
type flight struct {
	ready  chan struct{}
	tokens hub.Tokens
	err    error
}

// answer is a request under way, or what is kept of it.
type answer struct {
	flight          *flight // nil: it has ended
	sealed          []byte
	until           time.Time
	access, refresh [32]byte // digests of the tokens in it, for forget
	next            [32]byte // name of the inquiry with the refresh token in it; zero: none
}

// answers remembers what a provider gave, for devices that lost it.
type answers struct {
	mu     sync.Mutex // guards all below
	items  map[[32]byte]*answer
	before map[[32]byte][32]byte // of a refresh token's inquiry: the one whose answer it came in
	swept  time.Time             // when ended answers were last removed
}

func newAnswers() *answers {
	return &answers{items: map[[32]byte]*answer{}, before: map[[32]byte][32]byte{}}
}

// join returns the kept tokens of the inquiry (found), or the request under way and whether the caller is the first and has
// to end it. Nothing of all that means that there is no room.
func (s *answers) join(q inquiry) (t hub.Tokens, found bool, f *flight, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.sweep(now)
	if a := s.items[q.name]; a != nil {
		switch {
		case a.flight != nil:
			return hub.Tokens{}, false, a.flight, false
		case now.Before(a.until):
			if t, err := q.open(a.sealed); err == nil {
				return t, true, nil, false
			}
		}
		s.remove(q.name)
	}
	if len(s.items) >= maxAnswers && !s.makeRoom() {
		return hub.Tokens{}, false, nil, false
	}
	f = &flight{ready: make(chan struct{})}
	s.items[q.name] = &answer{flight: f}
	return hub.Tokens{}, false, f, true
}

// end gives the outcome to all who wait, and keeps it for the window if it is a success. A failure is not kept: the next
// repeat asks again.
func (s *answers) end(q inquiry, f *flight, t hub.Tokens, window time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.tokens, f.err = t, err
	defer close(f.ready)
	if err == nil && window > 0 {
		if sealed, err := q.seal(t); err == nil {
			s.items[q.name] = &answer{
				sealed: sealed, until: time.Now().Add(window), access: digest(t.Access), refresh: digest(t.Refresh),
			}
			return
		}
	}
	s.remove(q.name)
}

// follow records that the refresh token of the inquiry next came in the answer of q.
func (s *answers) follow(next, q inquiry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.items[q.name]; a != nil {
		a.next, s.before[next.name] = next.name, q.name
	}
}

// used drops the answer that the refresh token of q came in.
func (s *answers) used(q inquiry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if prev, ok := s.before[q.name]; ok {
		s.remove(prev)
	}
}

// forget drops answers with these tokens, which are being revoked.
func (s *answers) forget(t hub.Tokens) {
	access, refresh := digest(t.Access), digest(t.Refresh)
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, a := range s.items {
		if a.flight == nil && (t.Access != "" && a.access == access || t.Refresh != "" && a.refresh == refresh) {
			s.remove(name)
		}
	}
}

func (s *answers) remove(name [32]byte) {
	if a := s.items[name]; a != nil {
		delete(s.items, name)
		delete(s.before, a.next)
	}
}

// sweep removes what has ended, once in a while: tokens should not stay in memory longer than they must.
func (s *answers) sweep(now time.Time) {
	if now.Sub(s.swept) < codeWindow {
		return
	}
	s.swept = now
	for name, a := range s.items {
		if a.flight == nil && !now.Before(a.until) {
			s.remove(name)
		}
	}
}

// makeRoom removes what ends first. It is false when everything is under way.
func (s *answers) makeRoom() bool {
	var first [32]byte
	var end time.Time
	for name, a := range s.items {
		if a.flight == nil && (end.IsZero() || a.until.Before(end)) {
			first, end = name, a.until
		}
	}
	if end.IsZero() {
		return false
	}
	s.remove(first)
	return true
}

func (q inquiry) aead() (cipher.AEAD, error) {
	block, err := aes.NewCipher(q.key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func (q inquiry) seal(t hub.Tokens) ([]byte, error) {
	text, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encode tokens: %w", err)
	}
	box, err := q.aead()
	if err != nil {
		return nil, fmt.Errorf("seal tokens: %w", err)
	}
	return box.Seal(nil, nil, text, nil), nil
}

func (q inquiry) open(sealed []byte) (hub.Tokens, error) {
	var t hub.Tokens
	box, err := q.aead()
	if err != nil {
		return t, fmt.Errorf("open tokens: %w", err)
	}
	text, err := box.Open(nil, nil, sealed, nil)
	if err != nil {
		return t, fmt.Errorf("open tokens: %w", err)
	}
	if err := json.Unmarshal(text, &t); err != nil {
		return t, fmt.Errorf("decode tokens: %w", err)
	}
	return t, nil
}
