package mongostore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/coaphub/coaphub/hub"
)

// Every opening of a store is a writer with a document of its own, which says up to which running number all its commits are
// published and folded, and changes with every beat. Whose document stands still is taken for dead, by the watch of whoever looks,
// and what it may not have published is published by everybody who notices: twice does no harm, and neither does taking a writer
// for dead that only slept.

// writer is a writer's document.
type writer struct {
	ID   string `bson:"_id"`
	Name string `bson:"name"`
	Feed string `bson:"feed"` // its log ID
	Done int64  `bson:"done"`
	Beat int64  `bson:"beat"`
}

// seen is what is known of another writer.
type seen struct {
	beat   int64
	missed int
	after  int // look again when so many beats were missed
}

// beats writes the writer's own document and looks after those of others, until the store closes.
func (s *Store) beats() {
	tick := time.NewTicker(s.times.beat)
	defer tick.Stop()
	others := map[string]*seen{}
	for beat := int64(1); ; beat++ {
		err := errors.Join(s.beat(s.life, beat), s.watch(s.life, others))
		if beat%30 == 1 {
			err = errors.Join(err, s.removeMarks(s.life))
		}
		if s.life.Err() != nil {
			return
		}
		if err != nil {
			s.log.Warn("the database does not take this writer's beat; it is tried again", "error", err)
		}
		select {
		case <-tick.C:
		case <-s.life.Done():
			return
		}
	}
}

// doneTo is the running number up to which all commits are refused, or published and folded.
func (s *Store) doneTo() (done uint64, all bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	done = s.number
	for n := range s.open {
		done = min(done, n-1)
	}
	return done, len(s.open) == 0
}

// reached is the document that says how far the feed was known to have come, so that one that was set back while no process lived is
// noticed. It is behind by a beat at most, and so is done: what is not known to be in the feed is published again by others.
type reached struct {
	Day int32 `bson:"day"`
	N   int64 `bson:"n"`
}

const nameReached = "feed"

// remember tells the feed how far it had come.
func (s *Store) remember(ctx context.Context) error {
	var at reached
	err := s.again(ctx, "Open", func(ctx context.Context) error {
		_, err := s.hub.InsertOne(ctx, bson.D{{Key: "_id", Value: nameReached}, {Key: "day", Value: int32(0)}, {Key: "n", Value: int64(0)}})
		if err != nil && !mongo.IsDuplicateKeyError(err) {
			return err
		}
		return s.hub.FindOne(ctx, bson.D{{Key: "_id", Value: nameReached}}).Decode(&at)
	})
	if err != nil || at.N == 0 {
		return err
	}
	return s.feed.Remember(ctx, hub.Position{Day: uint32(at.Day), N: uint64(at.N)})
}

// note writes down how far the feed has come; others may have written more.
func (s *Store) note(ctx context.Context) error {
	at := s.feed.Known()
	if at.N == s.noted {
		return nil
	}
	err := s.once(ctx, func(ctx context.Context) error {
		_, err := s.hub.UpdateOne(ctx, bson.D{{Key: "_id", Value: nameReached}, {Key: "n", Value: bson.D{{Key: "$lt", Value: int64(at.N)}}}},
			bson.D{{Key: "$set", Value: bson.D{{Key: "day", Value: int32(at.Day)}, {Key: "n", Value: int64(at.N)}}}})
		return err
	})
	if err == nil {
		s.noted = at.N
	}
	return err
}

func (s *Store) beat(ctx context.Context, beat int64) error {
	done, _ := s.doneTo()
	if err := s.note(ctx); err != nil {
		return err
	}
	w := writer{s.writerID, s.name, s.feed.LogID(), int64(done), beat}
	return s.once(ctx, func(ctx context.Context) error {
		_, err := s.writers.ReplaceOne(ctx, bson.D{{Key: "_id", Value: w.ID}}, w, options.Replace().SetUpsert(true))
		return err
	})
}

// retire ends this writer: of one that left nothing nothing remains.
func (s *Store) retire(ctx context.Context) error {
	if _, all := s.doneTo(); !all {
		return s.beat(ctx, -1)
	}
	if err := s.note(ctx); err != nil {
		return err
	}
	return s.removeWriter(ctx, s.writerID)
}

func (s *Store) removeWriter(ctx context.Context, id string) error {
	return s.once(ctx, func(ctx context.Context) error {
		_, err := s.writers.DeleteOne(ctx, bson.D{{Key: "_id", Value: id}})
		return err
	})
}

func (s *Store) allWriters(ctx context.Context) (out []writer, err error) {
	return find[writer](ctx, s, s.writers, "writers", bson.D{{Key: "_id", Value: bson.D{{Key: "$ne", Value: s.writerID}}}}, 0)
}

// checkFeeds refuses a database to which somebody else writes who tells another feed: two clusters that were given the same hub ID
// and secret have that much apart.
func (s *Store) checkFeeds(ctx context.Context) error {
	suspects := map[string]int64{}
	look := func(found func(w writer)) error {
		all, err := s.allWriters(ctx)
		for _, w := range all {
			if w.Feed != s.feed.LogID() {
				found(w)
			}
		}
		return err
	}
	if err := look(func(w writer) { suspects[w.ID] = w.Beat }); err != nil || len(suspects) == 0 {
		return err
	}
	t := time.NewTimer(2*s.times.beat + s.times.beat/2) // who lives beats meanwhile
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	var living error
	return errors.Join(look(func(w writer) {
		if before, ok := suspects[w.ID]; ok && before != w.Beat {
			living = configError("store-of-another-cluster",
				fmt.Sprintf("another process that writes to the database %s has another feed: give each cluster a database of its own, and all processes of one the same feed", s.cfg.Database),
				fmt.Errorf("writer %s, %q", w.ID, w.Name))
		}
	}), living)
}

// watch looks at the other writers once, and after those that are dead.
func (s *Store) watch(ctx context.Context, others map[string]*seen) error {
	all, err := s.allWriters(ctx)
	if err != nil {
		return err
	}
	there := make(map[string]bool, len(all))
	var failed error
	for _, w := range all {
		there[w.ID] = true
		o := others[w.ID]
		if o == nil || o.beat != w.Beat {
			others[w.ID] = &seen{beat: w.Beat, after: s.times.dead}
			continue
		}
		if o.missed++; o.missed < o.after {
			continue
		}
		left, err := s.takeOver(ctx, w)
		if failed = errors.Join(failed, err); err != nil {
			continue
		}
		if left { // its documents wait for somebody who loads the devices
			o.after = o.missed + 10*s.times.dead
		} else if err := s.removeWriter(ctx, w.ID); err != nil {
			failed = errors.Join(failed, err)
		}
	}
	for id := range others {
		if !there[id] {
			delete(others, id)
		}
	}
	return failed
}

// takeOver publishes what a dead writer may have left. left: some of it is not folded.
func (s *Store) takeOver(ctx context.Context, w writer) (left bool, err error) {
	done := w.Done
	for {
		var commits []commitDoc
		err := s.again(ctx, "take over", func(ctx context.Context) error {
			commits = nil
			cur, err := s.commits.Find(ctx, bson.D{{Key: "w", Value: w.ID}, {Key: "n", Value: bson.D{{Key: "$gt", Value: done}}}},
				options.Find().SetSort(bson.D{{Key: "n", Value: 1}}).SetLimit(pageItems).SetProjection(bson.D{{Key: "n", Value: 1}}))
			if err != nil {
				return err
			}
			return cur.All(ctx, &commits)
		})
		if err != nil {
			return false, err
		}
		last := map[hub.DeviceID]uint64{}
		for _, c := range commits {
			seq, err := seqOf(c.ID)
			if err != nil {
				return false, err
			}
			dev := hub.DeviceID(c.ID[:len(c.ID)-seqDigits-1])
			last[dev] = max(last[dev], seq)
			done = c.Number
		}
		for dev, seq := range last {
			folded, err := s.republish(ctx, dev)
			if err != nil {
				return false, err
			}
			left = left || folded < seq
		}
		if len(commits) < pageItems {
			return left, nil
		}
	}
}

// republish publishes what may be missing of a device in the feed, and returns up to where it is folded.
func (s *Store) republish(ctx context.Context, dev hub.DeviceID) (folded uint64, err error) {
	p := []*part{{dev: s.pin(dev)}}
	defer s.unpin(p)
	d := p[0].dev
	if err := d.take(ctx); err != nil {
		return 0, err
	}
	defer d.leave()
	if err := s.ready(ctx, d, true); err != nil {
		return 0, err
	}
	rec, err := s.record(ctx, dev)
	return uint64(rec.Folded), err
}
