package auth

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

const (
	codeWindow    = 60 * time.Second
	refreshWindow = 24 * time.Hour
	// maxAnswers bounds the kept answers and the requests under way together, some 5 KB each. When it is full, an old answer
	// goes; when all are under way, the next is refused.
	maxAnswers = 4096
)

// answerKey names who asked for what: the fields are hashed with their lengths, so that none can be shifted into another.
type answerKey [32]byte

func keyOf(fields ...string) answerKey {
	h := sha256.New()
	for _, f := range fields {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(f)))
		h.Write(n[:])
		h.Write([]byte(f))
	}
	return answerKey(h.Sum(nil))
}

// answer is one exchange: under way until ready is closed, then kept until its end.
type answer struct {
	ready  chan struct{}
	tokens hub.Tokens // set before ready is closed, then never changed
	err    error
	until  time.Time // zero while under way
	next   answerKey // of the refresh token in it; zero: not known
}

// answers remembers what a provider gave, for devices that lost it.
type answers struct {
	mu     sync.Mutex // guards all below
	items  map[answerKey]*answer
	before map[answerKey]answerKey // of a refresh token: the one whose answer it came in
	swept  time.Time               // when ended answers were last removed
}

func newAnswers() *answers {
	return &answers{items: map[answerKey]*answer{}, before: map[answerKey]answerKey{}}
}

// join returns the answer of key and whether the caller is the first and has to end it. It is nil when there is no room.
func (s *answers) join(key answerKey) (a *answer, first bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.sweep(now)
	if a := s.items[key]; a != nil {
		if a.until.IsZero() || now.Before(a.until) {
			return a, false
		}
		s.remove(key)
	}
	if len(s.items) >= maxAnswers && !s.makeRoom() {
		return nil, false
	}
	a = &answer{ready: make(chan struct{})}
	s.items[key] = a
	return a, true
}

// end gives the outcome to all who wait, and keeps it for the window if it is a success. A failure is not kept: the next
// repeat asks again.
func (s *answers) end(key answerKey, a *answer, t hub.Tokens, window time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	a.tokens, a.err = t, err
	if err != nil || window == 0 {
		s.remove(key)
	} else {
		a.until = time.Now().Add(window)
	}
	close(a.ready)
}

// follow records that the refresh token of key came in the answer of prev.
func (s *answers) follow(key, prev answerKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if a := s.items[prev]; a != nil {
		a.next, s.before[key] = key, prev
	}
}

// used drops the answer that the refresh token of key came in.
func (s *answers) used(key answerKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if prev, ok := s.before[key]; ok {
		s.remove(prev)
	}
}

// forget drops answers with these tokens, which are being revoked.
func (s *answers) forget(t hub.Tokens) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, a := range s.items {
		if !a.until.IsZero() && (a.tokens.Access == t.Access || t.Refresh != "" && a.tokens.Refresh == t.Refresh) {
			s.remove(k)
		}
	}
}

func (s *answers) remove(key answerKey) {
	if a := s.items[key]; a != nil {
		delete(s.items, key)
		delete(s.before, a.next)
	}
}

// sweep removes what has ended, once in a while: tokens should not stay in memory longer than they must.
func (s *answers) sweep(now time.Time) {
	if now.Sub(s.swept) < codeWindow {
		return
	}
	s.swept = now
	for k, a := range s.items {
		if !a.until.IsZero() && !now.Before(a.until) {
			s.remove(k)
		}
	}
}

// makeRoom removes what ends first. It is false when everything is under way.
func (s *answers) makeRoom() bool {
	var first answerKey
	var end time.Time
	for k, a := range s.items {
		if !a.until.IsZero() && (end.IsZero() || a.until.Before(end)) {
			first, end = k, a.until
		}
	}
	if end.IsZero() {
		return false
	}
	s.remove(first)
	return true
}
