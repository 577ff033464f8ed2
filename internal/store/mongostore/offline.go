package mongostore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Offline is a database that no process of its hub has open, for those who check it or copy it.
type Offline struct {
	store.Archive // of the store, but what the feed would have to be told of is not appended
	s             *Store
	dead          map[string]int64 // writers whose beat did not change while Alive waited, with the beat
}

// ErrNoHub is the code of the error that the database has no hub.
const ErrNoHub = "database-empty"

// OpenOffline opens the database for those who check or copy it. Options need no Feed. With make a database without a hub becomes this
// one's; else it is refused. It waits for nobody: who asks for it sees why it cannot be.
func OpenOffline(ctx context.Context, cfg Config, opts Options, make bool) (*Offline, error) {
	opts.Feed = noFeed{}
	s, err := prepare(cfg, opts)
	if err != nil {
		return nil, err
	}
	s.offline, s.existing = true, !make
	if err := s.start(ctx, opts, migrations[:]); err != nil {
		return nil, err
	}
	return &Offline{Archive: s, s: s, dead: map[string]int64{}}, nil
}

// Close disconnects.
func (o *Offline) Close() error { return o.s.Close() }

// Where names the database for people, without secrets.
func (o *Offline) Where() string { return o.s.where() }

func (s *Store) where() string { return "mongodb://" + s.address() + "/" + s.cfg.Database }

// Alone refuses while a process of the hub has the database open: each has a document of its own that changes with every beat. One that
// starts later sees the marks that were set before (MarkInto), or removes them (MarkFrom).
func (o *Offline) Alone(ctx context.Context) error {
	alive, err := o.Alive(ctx)
	if err == nil && len(alive) > 0 {
		err = configError("database-in-use", fmt.Sprintf("the database %s is in use by the hub, in %s: stop all its processes", o.Where(), strings.Join(alive, ", ")), nil)
	}
	return err
}

// Alive returns the names of the processes that have the database open. Where some may have ended without an orderly end it waits for
// their next beats.
func (o *Offline) Alive(ctx context.Context) ([]string, error) {
	s := o.s
	before, err := o.doubtful(ctx)
	// One beat more may have been on its way when its writer ended.
	for n := 0; err == nil && len(before) > 0; n++ {
		t := time.NewTimer(2*s.times.beat + s.times.beat/2)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, ctx.Err()
		}
		now, err := o.doubtful(ctx)
		if err != nil {
			return nil, err
		}
		var names []string
		for id, w := range now {
			was, waited := before[id]
			switch {
			case waited && was.Beat == w.Beat:
				o.dead[id] = w.Beat
				delete(now, id)
			case n > 0 || waited && w.Beat > was.Beat+1:
				names = append(names, fmt.Sprintf("%q", w.Name))
			}
		}
		if len(names) > 0 {
			slices.Sort(names)
			return names, nil
		}
		before = now
	}
	return nil, err
}

// doubtful returns the writers that may live, by their IDs: all that are not known to be dead. One that signed off and left something to
// publish or to fold has a negative beat.
func (o *Offline) doubtful(ctx context.Context) (map[string]writer, error) {
	all, err := o.s.allWriters(ctx)
	if err != nil {
		return nil, o.s.explain(err)
	}
	out := map[string]writer{}
	for _, w := range all {
		if beat, known := o.dead[w.ID]; w.Beat >= 0 && (!known || beat != w.Beat) {
			out[w.ID] = w
		}
	}
	return out, nil
}

// Marks are notes in the database of those who copy it, which outlive them.
const (
	// MarkInto is on a database that is being copied to. No hub starts on it.
	MarkInto = "migration-into"
	// MarkFrom is on a database that is being copied from. A hub that starts on it removes the mark, so that whoever copies notices.
	MarkFrom = "migration-from"
)

// mark is such a note.
type mark struct {
	ID   string `bson:"_id"`
	Note []byte `bson:"note"`
}

// Mark returns a mark's note, nil if there is none.
func (o *Offline) Mark(ctx context.Context, name string) ([]byte, error) { return o.s.mark(ctx, name) }

func (s *Store) mark(ctx context.Context, name string) ([]byte, error) {
	all, err := find[mark](ctx, s, s.hub, "mark", bson.D{{Key: "_id", Value: name}}, 1)
	if err != nil || len(all) == 0 {
		return nil, err
	}
	return all[0].Note, nil
}

// SetMark sets a mark; nil removes it.
func (o *Offline) SetMark(ctx context.Context, name string, note []byte) error {
	s := o.s
	if note == nil {
		return s.removeMark(ctx, name)
	}
	return s.again(ctx, "mark", func(ctx context.Context) error {
		_, err := s.hub.ReplaceOne(ctx, bson.D{{Key: "_id", Value: name}}, mark{name, note}, options.Replace().SetUpsert(true))
		return err
	})
}

func (s *Store) removeMark(ctx context.Context, name string) error {
	return s.again(ctx, "mark", func(ctx context.Context) error {
		_, err := s.hub.DeleteOne(ctx, bson.D{{Key: "_id", Value: name}})
		return err
	})
}

// checkMarks is what a hub does that starts. Its writer's document is there already, so that one of the two sees the other, whoever
// copies and whoever starts.
func (s *Store) checkMarks(ctx context.Context) error {
	into, err := s.mark(ctx, MarkInto)
	if err == nil && into != nil {
		err = configError("migration-unfinished", "a hub is being copied into the database "+s.where()+": finish it with coaphub migrate, which goes on where it was", nil)
	}
	if err == nil {
		err = s.removeMark(ctx, MarkFrom)
	}
	if err != nil {
		return errors.Join(err, s.removeWriter(context.WithoutCancel(ctx), s.writerID))
	}
	return nil
}

// Has says what is in the database, empty if nothing is.
func (o *Offline) Has(ctx context.Context) (what []string, err error) {
	s := o.s
	for _, c := range []struct {
		of   *mongo.Collection
		what string
	}{{s.devices, "devices"}, {s.commits, "events"}, {s.state, "devices' states"}, {s.documents, "documents"}} {
		found, err := find[mark](ctx, s, c.of, "look", bson.D{}, 1, "_id")
		if err != nil {
			return nil, err
		}
		if len(found) > 0 {
			what = append(what, c.what)
		}
	}
	return what, nil
}

// Clear removes all that a migration has copied. Marks stay, and whose database it is.
func (o *Offline) Clear(ctx context.Context) error {
	s := o.s
	for _, c := range []*mongo.Collection{s.devices, s.commits, s.state, s.documents} {
		err := s.again(ctx, "clear", func(ctx context.Context) error {
			_, err := c.DeleteMany(ctx, bson.D{})
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Collections returns the names of all collections that have documents.
func (s *Store) Collections(ctx context.Context) ([]string, error) {
	if err := s.reading(ctx, "Collections"); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	var out []string
	for from := ""; ; {
		// Marks of what was deleted do not count; nothing else is looked over, for each document found begins behind a collection.
		found, err := find[document](ctx, s, s.documents, "Collections", bson.D{
			{Key: "_id", Value: bson.D{{Key: "$gte", Value: from}}}, {Key: "del", Value: nil},
		}, 1, "_id")
		if err != nil || len(found) == 0 {
			return out, err
		}
		name, _, ok := cutText(found[0].ID)
		collection, good := decodeText(name)
		if !ok || !good {
			return nil, damaged(found[0].ID)
		}
		out = append(out, collection)
		from = name + "\x02"
	}
}

// ImportCommits stores commits of one device as another store has them; store.Archive has the contract. They have a writer without a
// document of its own: nobody publishes them, and nobody takes them over.
func (s *Store) ImportCommits(ctx context.Context, commits []hub.Commit) error {
	if len(commits) == 0 {
		return nil
	}
	if err := checkDevice(commits[0].Device); err != nil {
		return err
	}
	if err := s.reading(ctx, "ImportCommits"); err != nil {
		return err
	}
	defer s.calls.Done()
	docs := make([]any, len(commits))
	for i := range commits {
		c := &commits[i]
		if c.Device != commits[0].Device || c.Seq != commits[0].Seq+uint64(i) {
			return &hub.Error{Kind: hub.Internal, Op: "mongostore.ImportCommits", Err: errors.New("commits of several devices, or with a hole between")}
		}
		value := store.AppendCommit(make([]byte, 0, 256), c)
		if err := store.CheckCommit(c, len(value)); err != nil {
			return err
		}
		docs[i] = commitDoc{commitKey(c.Device, c.Seq), value, c.Time, "import", 0}
	}
	return s.again(ctx, "ImportCommits", func(ctx context.Context) error {
		_, err := s.commits.InsertMany(ctx, docs, options.InsertMany().SetOrdered(false))
		return ignoreDuplicates(err)
	})
}

// ImportDocs stores documents of a device as they are after its newest commit, and says in its record that they are; store.Archive has
// the contract.
func (s *Store) ImportDocs(ctx context.Context, dev hub.DeviceID, last uint64, docs []store.StateDoc) error {
	if err := errors.Join(checkDevice(dev), store.CheckDocs(docs)); err != nil {
		return err
	}
	if err := s.reading(ctx, "ImportDocs"); err != nil {
		return err
	}
	defer s.calls.Done()
	versions := make([]any, 0, foldDocs)
	flush := func() error {
		err := s.insertVersions(ctx, versions)
		versions = versions[:0]
		return err
	}
	for _, d := range docs {
		versions = append(versions, newStateDoc(dev, d.Key, version{last, d.Value}, false))
		if len(versions) == foldDocs {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	return s.again(ctx, "ImportDocs", func(ctx context.Context) error {
		rec := record{ID: string(dev), Folded: int64(last)}
		_, err := s.devices.ReplaceOne(ctx, bson.D{{Key: "_id", Value: rec.ID}}, rec, options.Replace().SetUpsert(true))
		return err
	})
}

// noFeed is the feed of a store that nothing is appended to.
type noFeed struct{ store.PublishedFeed }

// LogID is of store.Feed.
func (noFeed) LogID() string { return "" }
