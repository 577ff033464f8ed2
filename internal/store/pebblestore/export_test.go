package pebblestore

import "github.com/cockroachdb/pebble/v2"

// RawSet and RawDelete damage the store behind its back.
func (s *Store) RawSet(key, value []byte) error { return s.db.Set(key, value, pebble.Sync) }

func (s *Store) RawDelete(key []byte) error { return s.db.Delete(key, pebble.Sync) }

// Keys of the store's records, for RawSet.
var (
	SchemaKey = metaSchema
	StateKey  = metaState
)

var (
	CommitKey  = commitKey
	StateDoc   = stateKey
	FeedKey    = feedKey
	DocKey     = docKey
	IndexKey   = indexKey
	MustDevice = parseDevice
)

// HasRoom says whether a small write would be taken at once.
func (s *Store) HasRoom() bool {
	if !s.room.TryAcquire(requestCost) {
		return false
	}
	s.room.Release(requestCost)
	return true
}

// Flush writes the memtable to tables, as Pebble does when it is full.
func (s *Store) Flush() error { return s.db.Flush() }

const (
	MaxPending    = maxPending
	SpaceInterval = spaceInterval
	BallastName   = ballastName
)
