// Package store is the ground that everything durable stands on: a log per device fenced by its key, a feed over all
// devices, and typed documents. Back ends live in sub-packages; storetest is the one suite that each of them passes.
//
// It must not know services, doors or protocols: it stores commits of hub's events and bytes it does not understand.
package store

import (
	"context"
	"iter"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Store is what a back end offers. All methods are safe for concurrent use.
type Store interface {
	Log
	Feed
	Documents
}

// Entry is one commit to append, with the state documents it changes.
type Entry struct {
	// Commit has Seq set to the seq the writer expects to be next (1 for a device without commits), and everything else but
	// Time's monotony decided: the store does not change it.
	Commit hub.Commit
	// Docs replace the documents of the same device and key. Value nil deletes. A document is only replaced by one of a
	// higher seq; the entry's documents carry Commit.Seq.
	Docs []StateDoc
}

// StateDoc is a piece of a device's state: one resource, one page of links, the device itself. Keys are the directory's
// business.
type StateDoc struct {
	Key   string
	Value []byte
}

// State is a device as the store knows it: its documents and the commits that the documents may not contain yet.
type State struct {
	Docs     []StateDoc   // in key order, each as it was after FoldedTo
	Commits  []hub.Commit // in seq order, all after FoldedTo (Pebble: always empty)
	FoldedTo uint64       // of the newest commit that the documents contain
	LastSeq  uint64       // of the newest commit, 0 = the device has none
}

// Log is a log per device.
type Log interface {
	// Append stores the entries, durably on return. Each succeeds or fails by itself: errs[i] is nil, of kind hub.Conflict
	// (somebody else wrote that seq: Load and decide again), hub.Exhausted or hub.Unavailable (nothing was stored), or
	// hub.Deadline (a server did not say in time what became of it: Load), and the slice is as long as entries. One device may
	// occur several times with rising seqs; if one of them fails the later ones conflict. Concurrent calls may share one synced
	// batch. After the context's end the outcome is still reported truthfully.
	Append(ctx context.Context, entries []Entry) (errs []error)
	// Load reads a device's state in one consistent snapshot. An unknown device is an empty State, not an error.
	Load(ctx context.Context, dev hub.DeviceID) (State, error)
	// Fold hands over the documents that the commits of st, which Load returned, changed, as they are after st.LastSeq. Whoever
	// loads a device to append to it or to trim it and finds commits folds them first: only then do the documents of later entries
	// make a whole. They need not be durable on return, since the log has what they say.
	Fold(ctx context.Context, dev hub.DeviceID, st State, docs []StateDoc) error
	// Commits reads a device's commits in seq order from the seq on, or from the first that is still there. Stop early by
	// breaking off. An error is the last element.
	Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error]
	// SeqAt returns the seq of the newest commit at or before t, 0 if there is none (any more).
	SeqAt(ctx context.Context, dev hub.DeviceID, t time.Time) (uint64, error)
	// Devices yields the IDs of all devices that have documents or commits, in order, later than after.
	Devices(ctx context.Context, after hub.DeviceID) iter.Seq2[hub.DeviceID, error]
	// Trim removes the device's commits below seq (never the newest, nor one that documents do not contain yet) and stores docs
	// (the bases for history) so that readers see either both or neither.
	Trim(ctx context.Context, dev hub.DeviceID, below uint64, docs []StateDoc) error
}

// Archive is a store that nobody serves from, as those see it who check it or copy it from one back end to another.
type Archive interface {
	Documents
	// Devices, Load, Commits and Trim are those of Log.
	Devices(ctx context.Context, after hub.DeviceID) iter.Seq2[hub.DeviceID, error]
	Load(ctx context.Context, dev hub.DeviceID) (State, error)
	Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error]
	Trim(ctx context.Context, dev hub.DeviceID, below uint64, docs []StateDoc) error
	// Collections returns the names of all collections that have documents, in order.
	Collections(ctx context.Context) ([]string, error)
	// ImportCommits stores commits of one device as another store has them, in seq order and without holes, durably on return. The
	// first of all may have any seq, for logs are trimmed. They are in no feed: it begins behind them. It may be called again with
	// the same commits; with others in their place the log is neither.
	ImportCommits(ctx context.Context, commits []hub.Commit) error
	// ImportDocs stores documents of a device as they are after all its commits, of which last is the newest. They may come in
	// pieces, after the commits.
	ImportDocs(ctx context.Context, dev hub.DeviceID, last uint64, docs []StateDoc) error
}

// Sizer is implemented by back ends that know what they take on disk. Without it history.maxBytes has no effect.
type Sizer interface {
	// DiskBytes returns about how many bytes log and documents take on disk, and the feed where it is kept with them. Space that was
	// given back for others of them to use does not count, whether or not the disk has it again.
	DiskBytes(ctx context.Context) (uint64, error)
}

// FeedEntry is a commit with its place in the feed.
type FeedEntry struct {
	Position hub.Position
	Commit   hub.Commit
}

// Feed is all commits of all devices in one order, in which each device's commits keep theirs. No commit becomes readable
// before all in front of it are.
type Feed interface {
	// LogID names this log: a restored or new store has another. Cursors of other logs are lagged.
	LogID() string
	// Head returns the position of the newest readable commit (zero when there is none).
	Head(ctx context.Context) (hub.Position, error)
	// ReadFeed returns at most limit commits after the position, and the position to go on from. An empty result means the
	// reader is at the head. lagged means that commits after the position were trimmed away; then nothing is returned.
	ReadFeed(ctx context.Context, after hub.Position, limit int) (entries []FeedEntry, next hub.Position, lagged bool, err error)
	// WaitFeed blocks until there is a commit after the position, or the context ends (its error is returned).
	WaitFeed(ctx context.Context, after hub.Position) error
	// TrimFeed removes all positions of days before the given one.
	TrimFeed(ctx context.Context, beforeDay uint32) error
}

// PublishedFeed is a feed that is not part of the store that writes commits, but told of them: a cluster's. In it a commit may
// come again, also after newer ones, when a writer ended between storing and publishing; readers drop seqs not above the last
// seen.
type PublishedFeed interface {
	Feed
	// Publish adds commits that are stored, durably on return, each by itself: the slice is as long as commits. A device's
	// commits are added in their order, and if one of them fails the later ones of the call are not added.
	Publish(ctx context.Context, commits []hub.Commit) []error
	// Known is how far the feed is known to have come, by what this process has read or published; it asks nobody.
	Known() hub.Position
	// Remember tells how far it had come, as Known said to some process: a feed that is not as far has lost commits and would give
	// their places to others. It becomes another log.
	Remember(ctx context.Context, known hub.Position) error
}

// Doc is a document of a typed collection.
type Doc struct {
	Key   string
	Value []byte
	// Rev changes with every write; 0 means the document does not exist.
	Rev uint64
	// Index holds secondary keys, for example "owner=alice"; Find looks them up. At most 8.
	Index []string
}

// Documents is a set of collections with compare-and-swap.
type Documents interface {
	// Get returns the document, or one with Rev 0 if there is none.
	Get(ctx context.Context, collection, key string) (Doc, error)
	// Put stores doc if the stored revision equals doc.Rev (0: it must not exist), durably on return, and returns the new
	// revision. Otherwise: hub.Conflict.
	Put(ctx context.Context, collection string, doc Doc) (rev uint64, err error)
	// Delete removes the document if its revision equals rev. Otherwise, and if there is none: hub.Conflict.
	Delete(ctx context.Context, collection, key string, rev uint64) error
	// Range yields documents in key order, from ≤ key < to; to "" means to the end.
	Range(ctx context.Context, collection, from, to string) iter.Seq2[Doc, error]
	// Find yields the documents that carry the secondary key, in key order.
	Find(ctx context.Context, collection, index string) iter.Seq2[Doc, error]
	// FindKeys yields the keys of the documents that Find does, without reading them.
	FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error]
}
