package certificateauthority

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Several authorities may stand on the same documents, and others keep copies of what they need at once (bus_client.go). So each change
// of what is kept in memories is numbered, once it is stored: whoever has seen all numbers up to one knows all that was changed up to
// it. An authority that no Server was made for is alone, and tells nobody.

// collChanges has the changes, by their numbers, without holes. Two that want the same number find out by writing it.
const collChanges = "certificate-changes"

const (
	// followEvery is how often an authority looks for what others have changed, if nobody wakes it.
	followEvery = time.Second
	// maxSilence is for how long whoever has heard nothing goes on with what he knows.
	maxSilence = 10 * time.Second
	// changesKept is for how long changes are kept. Whoever is further behind reads everything anew.
	changesKept = time.Hour
	// reconcileEvery is how often everything is read anew all the same: whoever stored a revocation may have died before he said so.
	reconcileEvery = 5 * time.Minute
	// maxTold bounds the revocations of one change.
	maxTold = 256
)

// change is such a document.
type change struct {
	Revoked     []string  `json:"revoked,omitempty"`     // serials
	Groups      bool      `json:"groups,omitempty"`      // they have to be read anew
	Authorities bool      `json:"authorities,omitempty"` // their files have
	Time        time.Time `json:"time"`
}

func (c *change) empty() bool { return len(c.Revoked) == 0 && !c.Groups && !c.Authorities }

func changeKey(n uint64) string { return fmt.Sprintf("%016x", n) }

func decodeChange(doc store.Doc) (n uint64, c change, err error) {
	if n, err = strconv.ParseUint(doc.Key, 16, 64); err == nil {
		err = json.Unmarshal(doc.Value, &c)
	}
	if err != nil {
		return 0, c, damaged("a change of the certificates", err)
	}
	return n, c, nil
}

// changesAfter yields the changes after the nth, up to the newest. behind: there are some that are not there any more, or were never.
func (s *Service) changesAfter(ctx context.Context, n uint64, yield func(uint64, change) bool) (behind bool, err error) {
	found := false
	for doc, err := range s.docs.Range(ctx, collChanges, changeKey(n), "") {
		if err != nil {
			return false, err
		}
		next, c, err := decodeChange(doc)
		switch {
		case err != nil:
			return false, err
		case next == n && !found:
		case next != n+1:
			return true, nil
		default:
			n = next
			if !yield(n, c) {
				return false, nil
			}
		}
		found = true
	}
	return !found, nil
}

// follow takes over what others have changed. On return all is known that had its number when it was called.
func (s *Service) follow(ctx context.Context) error {
	s.following.Lock()
	defer s.following.Unlock()
	return s.catchUp(ctx)
}

// catchUp is follow with s.following held.
func (s *Service) catchUp(ctx context.Context) error {
	began := time.Now()
	behind, err := s.changesAfter(ctx, s.at, func(n uint64, c change) bool {
		s.at = n
		s.apply(ctx, n, c)
		return true
	})
	if err == nil && behind {
		err = s.reread(ctx)
	}
	if err == nil {
		s.mu.Lock()
		s.heard = began
		s.mu.Unlock()
	}
	return err
}

func (s *Service) apply(ctx context.Context, n uint64, c change) {
	if len(c.Revoked) > 0 {
		s.revokedAt.Store(n)
	}
	for _, serial := range c.Revoked {
		s.learn(serial)
	}
	if c.Groups {
		s.dropGroups()
	}
	if c.Authorities {
		s.reload(ctx)
	}
}

func (s *Service) reload(ctx context.Context) {
	if err := s.a.reload(); err != nil {
		s.log.ErrorContext(ctx, "what another authority has changed of the keys cannot be read, the old ones go on", "error", err)
	}
}

// current reports whether all that others have changed is known, but for what is quite new.
func (s *Service) current() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wake == nil || time.Since(s.heard) < maxSilence
}

// shared reports whether others may stand on the same documents.
func (s *Service) shared() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wake != nil
}

// newest is the number of the newest change, and of the newest that has revocations. In a new store it makes the first one: the newest
// is never removed, and so nobody is ever without a number.
func (s *Service) newest(ctx context.Context) (n, revoked uint64, err error) {
	for {
		if n, revoked, err = s.lookNewest(ctx); n != 0 || err != nil {
			return n, revoked, err
		}
		value, err := json.Marshal(change{Time: time.Now().UTC()})
		if err != nil {
			return 0, 0, fmt.Errorf("encode a change: %w", err)
		}
		if _, err = s.docs.Put(ctx, collChanges, store.Doc{Key: changeKey(1), Value: value}); err == nil || !hub.IsKind(err, hub.Conflict) {
			return 1, 0, err
		}
	}
}

func (s *Service) lookNewest(ctx context.Context) (n, revoked uint64, err error) {
	for doc, err := range s.docs.Range(ctx, collChanges, "", "") {
		if err != nil {
			return 0, 0, err
		}
		at, c, err := decodeChange(doc)
		if err != nil {
			return 0, 0, err
		}
		if n = at; len(c.Revoked) > 0 {
			revoked = at
		}
	}
	return n, revoked, nil
}

// reread reads everything anew. s.following is held.
func (s *Service) reread(ctx context.Context) error {
	n, revoked, err := s.newest(ctx) // first: what comes meanwhile is read once more
	if err != nil {
		return err
	}
	for serial, err := range s.docs.FindKeys(ctx, collCertificates, indexRevoked) {
		if err != nil {
			return err
		}
		s.learn(serial)
	}
	s.at = n
	s.revokedAt.Store(revoked)
	s.dropGroups()
	s.reload(ctx)
	return nil
}

// tell numbers what was changed here and has no number yet. What fails is tried again.
func (s *Service) tell(ctx context.Context) error {
	if !s.shared() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.untold = change{}
		return nil
	}
	s.following.Lock()
	defer s.following.Unlock()
	for {
		s.mu.Lock()
		c := change{Revoked: s.untold.Revoked[:min(len(s.untold.Revoked), maxTold)], Groups: s.untold.Groups, Authorities: s.untold.Authorities}
		s.untold = change{Revoked: s.untold.Revoked[len(c.Revoked):]}
		s.mu.Unlock()
		if c.empty() {
			return nil
		}
		if err := s.number(ctx, c); err != nil {
			s.mu.Lock()
			s.untold.Revoked = slices.Concat(c.Revoked, s.untold.Revoked)
			s.untold.Groups, s.untold.Authorities = s.untold.Groups || c.Groups, s.untold.Authorities || c.Authorities
			s.mu.Unlock()
			return err
		}
	}
}

// number gives a change the next number. s.following is held.
func (s *Service) number(ctx context.Context, c change) error {
	c.Time = time.Now().UTC()
	value, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode a change: %w", err)
	}
	for {
		rev, err := s.docs.Put(ctx, collChanges, store.Doc{Key: changeKey(s.at + 1), Value: value})
		var before store.Doc
		if err == nil {
			before, err = s.docs.Get(ctx, collChanges, changeKey(s.at))
		}
		switch {
		case err == nil && before.Rev != 0:
		case err == nil: // so far behind that this number was taken, and removed
			err = errors.Join(s.docs.Delete(ctx, collChanges, changeKey(s.at+1), rev), s.reread(ctx), ctx.Err())
			if err == nil {
				continue
			}
		case hub.IsKind(err, hub.Conflict): // somebody else has it
			if err = errors.Join(s.catchUp(ctx), ctx.Err()); err == nil {
				continue
			}
		}
		if err != nil {
			return err
		}
		break
	}
	s.at++
	if len(c.Revoked) > 0 {
		s.revokedAt.Store(s.at)
	}
	s.mu.Lock()
	wake := s.wake
	s.mu.Unlock()
	if wake != nil {
		wake()
	}
	return nil
}

// toldLater has a change numbered that is stored already: now, or when the store takes it again.
func (s *Service) toldLater(ctx context.Context, mark func(*change)) {
	s.mu.Lock()
	mark(&s.untold)
	s.mu.Unlock()
	if err := s.tell(ctx); err != nil {
		s.log.WarnContext(ctx, "other authorities could not be told of a change, trying again", "error", err)
	}
}

// keepUp is what is done now and then so that authorities agree. It reports whether they do; they did before.
func (s *Service) keepUp(ctx context.Context, did bool) bool {
	err := errors.Join(s.follow(ctx), s.tell(ctx))
	if err != nil && ctx.Err() == nil && did {
		s.log.WarnContext(ctx, "what other authorities have changed could not be read, trying again", "error", err)
	}
	return err == nil
}

// reconcile compares what is known with the ledger: a revocation that was stored and told to nobody is told, and one whose
// certificate the ledger has forgotten is forgotten. It removes old changes.
func (s *Service) reconcile(ctx context.Context) error {
	s.mu.Lock()
	before := make([]string, 0, len(s.revoked))
	for serial := range s.revoked {
		before = append(before, serial)
	}
	s.mu.Unlock()
	stored := map[string]struct{}{}
	for serial, err := range s.docs.FindKeys(ctx, collCertificates, indexRevoked) {
		if err != nil {
			return err
		}
		stored[serial] = struct{}{}
	}
	if err := s.follow(ctx); err != nil { // what is known by now was told
		return err
	}
	for serial := range stored {
		if !s.isRevoked(serial) {
			s.end(serial)
		}
	}
	s.mu.Lock()
	for _, serial := range before {
		_, is := stored[serial]
		_, failed := s.unstored[serial]
		if !is && !failed {
			delete(s.revoked, serial)
		}
	}
	s.mu.Unlock()
	s.reload(ctx)
	return errors.Join(s.tell(ctx), s.trimChanges(ctx))
}

// trimChanges removes old changes, but never the newest, which has the number.
func (s *Service) trimChanges(ctx context.Context) error {
	var last store.Doc
	for doc, err := range s.docs.Range(ctx, collChanges, "", "") {
		if err != nil {
			return err
		}
		if last.Rev != 0 {
			if err := s.docs.Delete(ctx, collChanges, last.Key, last.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
				return err
			}
			last = store.Doc{}
		}
		_, c, err := decodeChange(doc)
		if err != nil {
			return err
		}
		if time.Since(c.Time) < changesKept {
			return nil
		}
		last = doc
	}
	return nil
}

// again repeats what another authority was faster with.
func again[T any](ctx context.Context, do func() (T, error)) (T, error) {
	for {
		out, err := do()
		if !hub.IsKind(err, hub.Conflict) || ctx.Err() != nil {
			return out, err
		}
	}
}
