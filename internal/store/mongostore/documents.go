package mongostore

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math/rand/v2"
	"slices"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// document is one of a typed collection, as it is stored. Revisions are random, so that none comes twice and each says whose it
// is; the one before tells somebody who was overtaken while he did not know his outcome that he had been there.
type document struct {
	ID       string   `bson:"_id"`
	Rev      int64    `bson:"r"`
	Previous int64    `bson:"p"`
	Value    []byte   `bson:"v"`
	Index    []string `bson:"x,omitempty"`   // each with its collection in front
	Deleted  int64    `bson:"del,omitempty"` // when, in Unix milliseconds: there is none, and the mark is removed later
}

func newRev() int64 { return 1 + rand.Int64N(1<<63-1) }

func (d *document) doc(key string) (store.Doc, error) {
	out := store.Doc{Key: key, Value: d.Value, Rev: uint64(d.Rev)}
	for _, x := range d.Index {
		_, x, ok := cutText(x)
		ix, good := decodeText(x)
		if !ok || !good {
			return store.Doc{}, damaged(d.ID)
		}
		out.Index = append(out.Index, ix)
	}
	return out, nil
}

// document reads what stands under a key, also what is about to be removed; nil if there is nothing.
func (s *Store) document(ctx context.Context, id string) (*document, error) {
	docs, err := find[document](ctx, s, s.documents, "Get", bson.D{{Key: "_id", Value: id}}, 1)
	if err != nil || len(docs) == 0 {
		return nil, err
	}
	return &docs[0], nil
}

// Get returns the document, or one with Rev 0.
func (s *Store) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	if err := store.CheckDoc(collection, &store.Doc{Key: key}); err != nil {
		return store.Doc{}, err
	}
	if err := s.reading(ctx, "Get"); err != nil {
		return store.Doc{}, err
	}
	defer s.calls.Done()
	d, err := s.document(ctx, docKey(collection, key))
	if err != nil || d == nil || d.Deleted != 0 {
		return store.Doc{Key: key}, err
	}
	return d.doc(key)
}

// Put stores the document if the stored revision is doc.Rev.
func (s *Store) Put(ctx context.Context, collection string, doc store.Doc) (rev uint64, err error) {
	if err := store.CheckDoc(collection, &doc); err != nil {
		return 0, err
	}
	if err := s.reading(ctx, "Put"); err != nil {
		return 0, err
	}
	defer s.calls.Done()
	d := &document{ID: docKey(collection, doc.Key), Rev: newRev(), Previous: int64(doc.Rev), Value: doc.Value}
	if d.Value == nil {
		d.Value = []byte{}
	}
	for _, ix := range doc.Index {
		d.Index = append(d.Index, docKey(collection, ix))
	}
	slices.Sort(d.Index)
	d.Index = slices.Compact(d.Index) // a secondary key given twice is one
	if err := s.swap(ctx, "Put", d); err != nil {
		return 0, err
	}
	return uint64(d.Rev), nil
}

// keepMarks is how long a deleted document's mark is kept: longer than anybody asks what became of a write.
const keepMarks = 10 * time.Minute

// Delete removes the document if its revision is rev. What it leaves is a mark, by which those who do not know their outcome find
// out that they had been there; it is removed later.
func (s *Store) Delete(ctx context.Context, collection, key string, rev uint64) error {
	if err := store.CheckDoc(collection, &store.Doc{Key: key}); err != nil {
		return err
	}
	if err := s.reading(ctx, "Delete"); err != nil {
		return err
	}
	defer s.calls.Done()
	if rev == 0 {
		return errConflict
	}
	mark := &document{ID: docKey(collection, key), Rev: newRev(), Previous: int64(rev), Deleted: time.Now().UnixMilli()}
	return s.swap(ctx, "Delete", mark)
}

// removeMarks removes what deletions left.
func (s *Store) removeMarks(ctx context.Context) error {
	return s.once(ctx, func(ctx context.Context) error {
		old := time.Now().Add(-keepMarks).UnixMilli()
		_, err := s.documents.DeleteMany(ctx, bson.D{{Key: "del", Value: bson.D{{Key: "$gt", Value: int64(0)}, {Key: "$lt", Value: old}}}})
		return err
	})
}

var turnSeed = maphash.MakeSeed()

// swap puts d in the place of the document with the revision d.Previous; 0 means that there is none.
func (s *Store) swap(ctx context.Context, op string, d *document) error {
	turn := s.turns[maphash.String(turnSeed, d.ID)%uint64(len(s.turns))]
	select {
	case turn <- struct{}{}:
		defer func() { <-turn }()
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", op, ctx.Err())
	}
	whole, cancel := context.WithTimeout(ctx, s.cfg.SettleTimeout)
	defer cancel()
	begin, create := time.Now(), d.Previous == 0
	tried := false // an earlier attempt may have done it
	for n := 0; ; n++ {
		out, err := s.swapOnce(whole, d)
		if out == repeat && err == nil {
			out, err = s.overtaken(whole, d, create, tried)
		}
		switch out {
		case swapped:
			return nil
		case refused:
			return errConflict
		case repeat:
		}
		switch {
		case err == nil: // what stood in the way is gone
		case errors.Is(err, errOvertaken):
			return errUnknown.With("mongostore."+op, err)
		case tried:
		case notSent(err) && ctx.Err() != nil:
			return fmt.Errorf("%s: %w", op, ctx.Err())
		case notSent(err) && (!movedPrimary(err) || time.Since(begin) > s.cfg.SelectTimeout), !transient(err):
			return wrap(op, err)
		case !notSent(err):
			tried = true
		}
		s.metrics.repeated.Inc()
		if pause(whole, n) != nil {
			if !tried {
				return errUnreachable.With("mongostore."+op, errors.Join(err, ctx.Err()))
			}
			return errUnknown.With("mongostore."+op, errors.Join(err, ctx.Err()))
		}
	}
}

var errOvertaken = errors.New("others changed the document meanwhile")

// outcome is what one attempt came to.
type outcome int

const (
	repeat outcome = iota // or there is an error
	swapped
	refused
)

// swapOnce tries once. To be repeated without an error means that something else stands there.
func (s *Store) swapOnce(ctx context.Context, d *document) (out outcome, err error) {
	err = s.once(ctx, func(ctx context.Context) error {
		if d.Previous == 0 {
			_, err := s.documents.InsertOne(ctx, d)
			if err == nil {
				out = swapped
			}
			if mongo.IsDuplicateKeyError(err) {
				return nil
			}
			return err
		}
		// Nobody knows the revision of a mark but who is about to replace it.
		res, err := s.documents.ReplaceOne(ctx, bson.D{{Key: "_id", Value: d.ID}, {Key: "r", Value: d.Previous}}, d)
		if err == nil && res.MatchedCount == 1 {
			out = swapped
		}
		return err
	})
	return out, err
}

// overtaken looks at what stands in d's way: d itself, from an earlier attempt, or somebody else's. With create there should be
// nothing, or the mark of something that was deleted, whose place d takes.
func (s *Store) overtaken(ctx context.Context, d *document, create, tried bool) (outcome, error) {
	is, err := s.document(ctx, d.ID)
	switch {
	case err != nil:
		return repeat, err
	case tried && is != nil && (is.Rev == d.Rev || is.Previous == d.Rev):
		return swapped, nil
	case create && is == nil: // what was there a moment ago is gone
		d.Previous = 0
		return repeat, nil
	case create && is.Deleted != 0:
		d.Previous = is.Rev
		return repeat, nil
	case !tried, is != nil && (is.Previous == d.Previous || create && is.Previous == 0):
		return refused, nil // d never stood there
	}
	return repeat, errOvertaken
}

// Range yields documents in key order. It reads in pages: what changes meanwhile is seen or not, but each document comes once at
// most.
func (s *Store) Range(ctx context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	end := text(collection) + "\x02"
	if to != "" {
		end = docKey(collection, to)
	}
	return s.pages(ctx, "Range", collection, docKey(collection, from), end, nil)
}

// Find yields the documents that carry the secondary key, in key order, read in pages as Range does.
func (s *Store) Find(ctx context.Context, collection, index string) iter.Seq2[store.Doc, error] {
	prefix := text(collection)
	return s.pages(ctx, "Find", collection, prefix+separator, prefix+"\x02", bson.D{{Key: "x", Value: docKey(collection, index)}})
}

// FindKeys reads only the keys.
func (s *Store) FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error] {
	prefix := text(collection)
	all := s.pages(ctx, "FindKeys", collection, prefix+separator, prefix+"\x02", bson.D{{Key: "x", Value: docKey(collection, index)}}, "r", "del")
	return func(yield func(string, error) bool) {
		for doc, err := range all {
			if !yield(doc.Key, err) {
				return
			}
		}
	}
}

func (s *Store) pages(ctx context.Context, op, collection, from, to string, filter bson.D, fields ...string) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		if collection == "" || len(collection) > store.MaxCollection {
			yield(store.Doc{}, &hub.Error{Kind: hub.Invalid, Op: "mongostore." + op, Code: "collection-invalid"})
			return
		}
		prefix := len(text(collection)) + len(separator)
		first := "$gte"
		for {
			page, err := s.docPage(ctx, op, append(slices.Clone(filter), bson.E{
				Key: "_id", Value: bson.D{{Key: first, Value: from}, {Key: "$lt", Value: to}},
			}), fields)
			for i := range page {
				d := &page[i]
				from, first = d.ID, "$gt"
				if d.Deleted != 0 {
					continue
				}
				key, ok := decodeText(d.ID[prefix:])
				if !ok {
					yield(store.Doc{}, damaged(d.ID))
					return
				}
				doc, err := d.doc(key)
				if !yield(doc, err) || err != nil {
					return
				}
			}
			if err != nil {
				yield(store.Doc{}, err)
				return
			}
			if len(page) < pageDocs {
				return
			}
		}
	}
}

// pageDocs bounds a page of documents, each of a megabyte at most.
const pageDocs = 64

func (s *Store) docPage(ctx context.Context, op string, filter bson.D, fields []string) ([]document, error) {
	if err := s.reading(ctx, op); err != nil {
		return nil, err
	}
	defer s.calls.Done()
	return find[document](ctx, s, s.documents, op, filter, pageDocs, fields...)
}
