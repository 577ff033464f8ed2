package pebblestore

import (
	"github.com/cockroachdb/pebble/v2"
	"golang.org/x/sync/semaphore"
)

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

// Shrink gives a store that has not written yet an eighth of the room, and returns its bytes.
func (s *Store) Shrink() int {
	s.room = semaphore.NewWeighted(maxPending / 8)
	return maxPending / 8
}

// HasRoom says whether a small write would be taken at once.
func (s *Store) HasRoom() bool {
	if !s.room.TryAcquire(requestCost) {
		return false
	}
	s.room.Release(requestCost)
	return true
}

// Forget makes a store that has not written yet read all of its feed from the disk.
func (s *Store) Forget() { s.remembers = -1 }

// Flush writes the memtable to tables, as Pebble does when it is full.
func (s *Store) Flush() error { return s.db.Flush() }

// BlocksRead is how many blocks were read that the cache did not have.
func (s *Store) BlocksRead() int64 { return s.db.Metrics().BlockCache.Misses }

const (
	SpaceInterval = spaceInterval
	BallastName   = ballastName
)
