package mongostore

import (
	"context"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// maxTombstones bounds how many versions that say "deleted" one Trim removes.
const maxTombstones = 1000

// Trim removes commits below seq and stores the documents that stand for them; store.Log has the contract. The documents come
// first and count from the moment in which the record says so; the commits go after that.
func (s *Store) Trim(ctx context.Context, dev hub.DeviceID, below uint64, docs []store.StateDoc) error {
	if err := checkDevice(dev); err != nil {
		return err
	}
	if err := store.CheckDocs(docs); err != nil {
		return err
	}
	if err := s.reading(ctx, "Trim"); err != nil {
		return err
	}
	defer s.calls.Done()
	if err := s.foldDevice(ctx, dev); err != nil {
		return err
	}
	rec, err := s.record(ctx, dev)
	if err != nil {
		return err
	}
	_, last, err := s.ends(ctx, dev)
	if err != nil {
		return err
	}
	if last == 0 && len(docs) == 0 {
		return nil
	}
	if rec.ID == "" {
		if err := s.makeRecords(ctx, []any{record{ID: string(dev)}}); err != nil {
			return err
		}
	}
	below = min(below, last, uint64(rec.Folded)+1)
	seq := max(below, 1) - 1
	var versions, removes []mongo.WriteModel
	for _, d := range docs {
		doc := newStateDoc(dev, d.Key, version{seq, d.Value}, true)
		versions = append(versions, mongo.NewReplaceOneModel().SetFilter(bson.D{{Key: "_id", Value: doc.ID}}).SetReplacement(doc).SetUpsert(true))
		removes = append(removes, removeBefore(dev, d.Key, doc.ID))
	}
	if len(versions) > 0 {
		err := s.again(ctx, "Trim", func(ctx context.Context) error {
			_, err := s.state.BulkWrite(ctx, versions, options.BulkWrite().SetOrdered(false))
			return ignoreDuplicates(err) // somebody else trims the device, to the same
		})
		if err != nil {
			return err
		}
	}
	if err := s.rebase(ctx, dev, seq, len(docs) > 0); err != nil {
		return err
	}
	err = s.again(ctx, "Trim", func(ctx context.Context) error {
		_, err := s.commits.DeleteMany(ctx, between(commitKey(dev, 0), commitKey(dev, below)))
		return err
	})
	if err != nil {
		return err
	}
	// Nobody writes a version as old as this any more: a deletion need not be remembered.
	gone, err := find[stateDoc](ctx, s, s.state, "Trim", bson.D{
		{Key: "_id", Value: bson.D{{Key: "$gte", Value: string(dev) + "|"}, {Key: "$lt", Value: past(dev)}}},
		{Key: "v", Value: nil},
		{Key: "e", Value: nil},
		{Key: "s", Value: bson.D{{Key: "$lt", Value: int64(below)}}},
	}, maxTombstones)
	if err != nil {
		return err
	}
	for _, d := range gone {
		key := d.ID
		if d.Trim {
			key = key[:len(key)-1]
		}
		prefix := key[:max(0, len(key)-seqDigits)]
		removes = append(removes, mongo.NewDeleteManyModel().SetFilter(bson.D{
			{Key: "_id", Value: bson.D{{Key: "$gte", Value: prefix}, {Key: "$lte", Value: d.ID}}},
		}))
	}
	s.remove(ctx, removes)
	return nil
}

// rebase makes the versions that Trim stored up to seq count.
func (s *Store) rebase(ctx context.Context, dev hub.DeviceID, seq uint64, docs bool) error {
	if err := s.foldAlone(ctx); err != nil {
		return err
	}
	defer func() { <-s.folding }()
	change := bson.D{{Key: "$max", Value: bson.D{{Key: "b", Value: int64(seq)}}}}
	if docs {
		change = append(change, bson.E{Key: "$set", Value: bson.D{{Key: "d", Value: true}}})
	}
	return s.again(ctx, "Trim", func(ctx context.Context) error {
		_, err := s.devices.UpdateOne(ctx, bson.D{{Key: "_id", Value: string(dev)}}, change)
		return err
	})
}

// DiskBytes is what the database takes on the servers' disks, once of all copies. Files of WiredTiger do not shrink when documents are
// removed; what is free in them is used again, so it does not count.
func (s *Store) DiskBytes(ctx context.Context) (uint64, error) {
	if err := s.reading(ctx, "DiskBytes"); err != nil {
		return 0, err
	}
	defer s.calls.Done()
	var stats struct {
		Total float64 `bson:"totalSize"` // collections and indexes
		Free  float64 `bson:"totalFreeStorageSize"`
	}
	err := s.again(ctx, "DiskBytes", func(ctx context.Context) error {
		return s.commits.Database().RunCommand(ctx, bson.D{{Key: "dbStats", Value: 1}, {Key: "freeStorage", Value: 1}}).Decode(&stats)
	})
	if err != nil {
		return 0, err
	}
	return uint64(max(0, stats.Total-stats.Free)), nil
}
