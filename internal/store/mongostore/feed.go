package mongostore

import (
	"context"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// LogID names this log: the database and the feed. A feed that was lost or made anew is another log for those who have a place
// in it.
func (s *Store) LogID() string { return s.logID + "." + s.feed.LogID() }

// Head is the feed's.
func (s *Store) Head(ctx context.Context) (hub.Position, error) {
	if err := s.reading(ctx, "Head"); err != nil {
		return hub.Position{}, err
	}
	defer s.calls.Done()
	return s.feed.Head(ctx)
}

// ReadFeed is the feed's.
func (s *Store) ReadFeed(ctx context.Context, after hub.Position, limit int) (entries []store.FeedEntry, next hub.Position, lagged bool, err error) {
	if err := s.reading(ctx, "ReadFeed"); err != nil {
		return nil, after, false, err
	}
	defer s.calls.Done()
	return s.feed.ReadFeed(ctx, after, limit)
}

// WaitFeed is the feed's, and ends when the store closes.
func (s *Store) WaitFeed(ctx context.Context, after hub.Position) error {
	if err := s.enter(); err != nil {
		return err
	}
	s.calls.Done() // Close does not wait for who waits
	wait, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	err := s.feed.WaitFeed(wait, after)
	if err != nil && s.life.Err() != nil && ctx.Err() == nil {
		return errClosed
	}
	return err
}

// TrimFeed is the feed's.
func (s *Store) TrimFeed(ctx context.Context, beforeDay uint32) error {
	if err := s.reading(ctx, "TrimFeed"); err != nil {
		return err
	}
	defer s.calls.Done()
	return s.feed.TrimFeed(ctx, beforeDay)
}
