package mongostore

import (
	"context"
	"errors"

	"github.com/coaphub/coaphub/hub"
)

// publish tells the feed of what was stored. What it does not take stays in the devices' backlogs, is tried again, and keeps the
// devices from being appended to meanwhile. The devices' locks are held.
func (s *Store) publish(ctx context.Context, parts []*part) {
	var commits []hub.Commit
	var of []*part
	for _, p := range parts {
		for _, own := range p.own {
			commits = append(commits, own.commit)
			of = append(of, p)
		}
	}
	if len(commits) == 0 {
		return
	}
	wait, cancel := context.WithTimeout(ctx, s.times.publish)
	defer cancel()
	errs := s.feed.Publish(wait, commits)
	for i, p := range of {
		if errs[i] != nil {
			continue
		}
		// A device's commits are in order, and so are those that were taken.
		if len(p.dev.backlog) > 0 && p.dev.backlog[0].commit.Seq == commits[i].Seq {
			s.published(p.dev, 1)
		}
	}
	if err := errors.Join(errs...); err != nil {
		s.log.Warn("the feed does not take what was stored; it is tried again", "error", err)
	}
}

// published moves the first n commits of a device's backlog on to be folded.
func (s *Store) published(d *device, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, own := range d.backlog[:n] {
		d.published = max(d.published, own.commit.Seq)
		d.add(segmentOf(own))
	}
	d.backlog = append(d.backlog[:0:0], d.backlog[n:]...)
}

// publishBacklog publishes what the feed did not take so far. The device's lock is held.
func (s *Store) publishBacklog(ctx context.Context, d *device) error {
	if len(d.backlog) == 0 {
		return nil
	}
	commits := make([]hub.Commit, len(d.backlog))
	for i, own := range d.backlog {
		commits[i] = own.commit
	}
	wait, cancel := context.WithTimeout(ctx, s.times.publish)
	defer cancel()
	errs := s.feed.Publish(wait, commits)
	n := 0
	for n < len(errs) && errs[n] == nil {
		n++
	}
	s.published(d, n)
	if n < len(errs) {
		return errFeed.With("mongostore.Append", errs[n])
	}
	return nil
}

// tell publishes commits that were read from the log.
func (s *Store) tell(ctx context.Context, commits []hub.Commit) error {
	if len(commits) == 0 {
		return nil
	}
	wait, cancel := context.WithTimeout(ctx, s.times.publish)
	defer cancel()
	if err := errors.Join(s.feed.Publish(wait, commits)...); err != nil {
		return errFeed.With("mongostore.Append", err)
	}
	return nil
}
