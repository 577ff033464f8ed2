package mongostore

import (
	"context"
	"time"
)

// Tuning is what tests set otherwise; zero leaves it as it is.
type Tuning struct {
	Fold, Beat, Publish, Patience, Fresh time.Duration
	Lag                                  int
	Steps                                []func(context.Context) error // migrations, from schema 1 on
}

// OpenTuned is Open with other times and limits.
func OpenTuned(ctx context.Context, cfg Config, opts Options, t Tuning) (*Store, error) {
	s, err := prepare(cfg, opts)
	if err != nil {
		return nil, err
	}
	for at, d := range map[*time.Duration]time.Duration{
		&s.times.fold: t.Fold, &s.times.beat: t.Beat, &s.times.publish: t.Publish, &s.times.fresh: t.Fresh, &s.limits.patience: t.Patience,
	} {
		if d != 0 {
			*at = d
		}
	}
	if t.Lag != 0 {
		s.limits.events = t.Lag
	}
	steps := migrations[:]
	for _, step := range t.Steps {
		steps = append(steps[:len(steps):len(steps)], func(ctx context.Context, _ *Store) error { return step(ctx) })
	}
	if err := s.start(ctx, opts, steps); err != nil {
		return nil, err
	}
	return s, nil
}

// Kill ends the store as a crash does: what is not stored, published or folded stays so.
func (s *Store) Kill() {
	s.mu.Lock()
	closing := s.closing
	s.closing = true
	s.mu.Unlock()
	if closing {
		return
	}
	s.kill()
	s.calls.Wait()
	s.done.Wait()
	end, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_ = s.client.Disconnect(end)
}

// Lag returns how many events are stored and not yet published and folded.
func (s *Store) Lag() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lag.events
}

// Done reports whether everything this process stored is published and folded.
func (s *Store) Done() bool {
	_, all := s.doneTo()
	return all
}
