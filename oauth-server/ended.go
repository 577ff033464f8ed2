package oauthserver

import (
	"context"
	"errors"
	"strconv"
	"time"
)

// How processes on the same documents hear of grants that another one has ended. The grant has the minute of its end as a secondary
// key, so nothing is written but the grant, and nothing is lost when its writer dies: the others look through the last minutes again
// and again, and further back when they could not for a while.
const (
	lookEvery = 500 * time.Millisecond
	// lookTime is how long a look may take.
	lookTime = 3 * time.Second
	// apart is how much the clocks of two processes may differ, and half of it how long storing an end takes at most.
	apart = 2 * time.Minute
	// lookBack is how far back is looked after the store could not be reached.
	lookBack = 24 * time.Hour
)

// revokedIn is the secondary key of the grants that ended in the same minute.
func revokedIn(t time.Time) string { return "revoked=" + strconv.FormatInt(t.Unix()/60, 10) }

// end notes in a grant that it ended.
func (s *Server) end(g *grant) { g.Revoked, g.RevokedAt = true, s.clock.Now().UTC() }

// tellEnded says that a grant's tokens are good no more, after that was stored.
func (s *Server) tellEnded(ctx context.Context, id string) {
	if s.cfg.Ended != nil {
		s.cfg.Ended(id)
	}
	if !s.cfg.Several { // nobody follows
		return
	}
	// A process that was paused before it stored the end comes too late for those who look for it.
	punctual := errors.New("nothing to store")
	err := change(context.WithoutCancel(ctx), s.docs, collGrants, id, func(g *grant, rev uint64) error {
		if rev == 0 || !g.Revoked || s.clock.Now().Sub(g.RevokedAt) < apart/2 {
			return punctual
		}
		s.end(g)
		return nil
	}, grantIndex)
	if err != nil && !errors.Is(err, punctual) {
		s.log.WarnContext(ctx, "other parts may hear late that a grant has ended", "error", err)
	}
}

// ends is what a process has heard of grants that ended.
type ends struct {
	tell func(grant string)
	upTo time.Time            // all that ended before apart earlier was told
	told map[string]time.Time // and of those since: the minute
}

// hear tells of the grants that ended since the last time.
func (s *Server) hear(ctx context.Context, e *ends) error {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	now := s.clock.Now()
	from := e.upTo
	if now.Before(from) { // the clock was set back
		from = now
	}
	if earliest := now.Add(-lookBack); from.Before(earliest) {
		from = earliest
	}
	from = from.Add(-apart).Truncate(time.Minute)
	for minute := from; !minute.After(now.Add(apart)); minute = minute.Add(time.Minute) {
		for id, err := range s.docs.FindKeys(ctx, collGrants, revokedIn(minute)) {
			if err != nil {
				return trouble("look for grants that ended", err)
			}
			if _, is := e.told[id]; is {
				continue
			}
			e.told[id] = minute
			s.standing.forget(collGrants, id)
			e.tell(id)
		}
	}
	e.upTo = now
	for id, minute := range e.told {
		if minute.Before(now.Add(-apart).Truncate(time.Minute)) {
			delete(e.told, id)
		}
	}
	return nil
}

// Follow tells ended of each grant whose tokens ended before their time, here or in another process, within a second while the store is
// reached, until ctx ends: what Config.Ended is told of may be told to others before, but nobody knows that they hear it. ended must
// not block; after a start it may be told what ended shortly before. The error is always nil.
func (s *Server) Follow(ctx context.Context, ended func(grant string), ready func()) error {
	e := &ends{tell: ended, upTo: s.clock.Now(), told: map[string]time.Time{}}
	ready()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	away := false
	for {
		err := s.hear(ctx, e)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !away:
			s.log.WarnContext(ctx, "grants that other parts end are not heard of", "error", err)
		case err == nil && away:
			s.log.InfoContext(ctx, "grants that other parts end are heard of again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
