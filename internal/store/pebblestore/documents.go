package pebblestore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// docHead is what a write has to know of the document it replaces.
type docHead struct {
	rev   uint64
	index []string
}

// A stored document is its revision (8 bytes), the number of its secondary keys, each with its length before it, and the
// value.
func appendDoc(b []byte, rev uint64, d *store.Doc) []byte {
	b = binary.BigEndian.AppendUint64(b, rev)
	b = append(b, byte(len(d.Index)))
	for _, ix := range d.Index {
		b = binary.BigEndian.AppendUint16(b, uint16(len(ix)))
		b = append(b, ix...)
	}
	return append(b, d.Value...)
}

func decodeDocHead(v []byte) (h docHead, value []byte, err error) {
	bad := errors.New("a document is damaged")
	if len(v) < 9 {
		return docHead{}, nil, bad
	}
	h.rev = binary.BigEndian.Uint64(v)
	n := int(v[8])
	v = v[9:]
	for range n {
		if len(v) < 2 {
			return docHead{}, nil, bad
		}
		size := int(binary.BigEndian.Uint16(v))
		if v = v[2:]; len(v) < size {
			return docHead{}, nil, bad
		}
		h.index = append(h.index, string(v[:size]))
		v = v[size:]
	}
	return h, v, nil
}

func decodeDoc(key string, v []byte) (store.Doc, error) {
	h, value, err := decodeDocHead(v)
	if err != nil {
		return store.Doc{}, fmt.Errorf("document %.64q: %w", key, err)
	}
	value = append(make([]byte, 0, len(value)), value...)
	return store.Doc{Key: key, Value: value, Rev: h.rev, Index: h.index}, nil
}

// head returns the document's head in the group's picture, with rev 0 if there is none.
func (g *group) head(key []byte) (docHead, error) {
	if h, ok := g.docs[string(key)]; ok {
		return h, nil
	}
	return get(g.s.db, key, func(v []byte) (docHead, error) {
		h, _, err := decodeDocHead(v)
		return h, err
	})
}

// Get returns the document, or one with Rev 0.
func (s *Store) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	doc := store.Doc{Key: key}
	if err := store.CheckDoc(collection, &doc); err != nil {
		return store.Doc{}, err
	}
	err := s.read(ctx, "Get", func(v *view) error {
		found, err := get(v.snap, docKey(collection, key), func(v []byte) (store.Doc, error) { return decodeDoc(key, v) })
		if found.Rev != 0 {
			doc = found
		}
		return err
	})
	return doc, err
}

// Put stores the document if the stored revision is doc.Rev.
func (s *Store) Put(ctx context.Context, collection string, doc store.Doc) (rev uint64, err error) {
	if err := store.CheckDoc(collection, &doc); err != nil {
		return 0, err
	}
	if len(doc.Index) > 1 { // a secondary key given twice is one
		doc.Index = slices.Clone(doc.Index)
		slices.Sort(doc.Index)
		doc.Index = slices.Compact(doc.Index)
	}
	var written uint64 // the committer's until it answers, 0 = conflict
	r := &request{cost: int64(len(doc.Value)) + requestCost, build: func(g *group) error {
		key := docKey(collection, doc.Key)
		old, err := g.head(key)
		if err != nil {
			return err
		}
		if old.rev != doc.Rev {
			return nil
		}
		g.state.rev++
		written = g.state.rev
		return g.replace(collection, doc.Key, old, docHead{rev: written, index: doc.Index}, appendDoc(nil, written, &doc))
	}}
	if err := s.submit(ctx, "Put", r); err != nil {
		return 0, err
	}
	if written == 0 {
		return 0, &hub.Error{Kind: hub.Conflict, Op: "pebblestore.Put"}
	}
	return written, nil
}

// Delete removes the document if its revision is rev.
func (s *Store) Delete(ctx context.Context, collection, key string, rev uint64) error {
	if err := store.CheckDoc(collection, &store.Doc{Key: key}); err != nil {
		return err
	}
	deleted := false // the committer's until it answers
	r := &request{build: func(g *group) error {
		old, err := g.head(docKey(collection, key))
		if err != nil {
			return err
		}
		if old.rev == 0 || old.rev != rev {
			return nil
		}
		deleted = true
		return g.replace(collection, key, old, docHead{}, nil)
	}}
	if err := s.submit(ctx, "Delete", r); err != nil {
		return err
	}
	if !deleted {
		return &hub.Error{Kind: hub.Conflict, Op: "pebblestore.Delete"}
	}
	return nil
}

// replace writes a document and its secondary keys in place of the old ones; value nil deletes.
func (g *group) replace(collection, key string, old, now docHead, value []byte) error {
	var err error
	for _, ix := range old.index {
		if !slices.Contains(now.index, ix) {
			err = errors.Join(err, g.batch.Delete(indexKey(collection, ix, key), nil))
		}
	}
	for _, ix := range now.index {
		if !slices.Contains(old.index, ix) {
			err = errors.Join(err, g.batch.Set(indexKey(collection, ix, key), nil, nil))
		}
	}
	k := docKey(collection, key)
	if value == nil {
		err = errors.Join(err, g.batch.Delete(k, nil))
	} else {
		err = errors.Join(err, g.batch.Set(k, value, nil))
	}
	if err != nil {
		g.s.fail(fmt.Errorf("add document %.64q to a batch: %w", key, err))
		return err
	}
	g.docs[string(k)] = now
	return nil
}

// Range yields documents in key order. It reads in pages: what changes meanwhile is seen or not, but each document comes
// once at most.
func (s *Store) Range(ctx context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	prefix := collectionPrefix(prefixDoc, collection)
	end := after(prefix)
	if to != "" {
		end = docKey(collection, to)
	}
	return s.pages(ctx, "Range", collection, docKey(collection, from), end, func(_ *view, key, value []byte) (store.Doc, error) {
		return decodeDoc(string(key[len(prefix):]), value)
	})
}

// Find yields the documents that carry the secondary key, in key order, read in pages as Range does.
func (s *Store) Find(ctx context.Context, collection, index string) iter.Seq2[store.Doc, error] {
	if len(index) > store.MaxIndex { // nothing can carry it
		return func(func(store.Doc, error) bool) {}
	}
	prefix := indexPrefix(collection, index)
	return s.pages(ctx, "Find", collection, prefix, after(prefix), func(v *view, key, _ []byte) (store.Doc, error) {
		name := string(key[len(prefix):])
		doc, err := get(v.snap, docKey(collection, name), func(v []byte) (store.Doc, error) { return decodeDoc(name, v) })
		if err == nil && doc.Rev == 0 {
			err = fmt.Errorf("secondary key %.64q names document %.64q, which is missing", index, name)
		}
		return doc, err
	})
}

// FindKeys reads the secondary keys alone.
func (s *Store) FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error] {
	if len(index) > store.MaxIndex { // nothing can carry it
		return func(func(string, error) bool) {}
	}
	prefix := indexPrefix(collection, index)
	all := s.pages(ctx, "FindKeys", collection, prefix, after(prefix), func(_ *view, key, _ []byte) (store.Doc, error) {
		return store.Doc{Key: string(key[len(prefix):])}, nil
	})
	return func(yield func(string, error) bool) {
		for doc, err := range all {
			if !yield(doc.Key, err) {
				return
			}
		}
	}
}

func (s *Store) pages(ctx context.Context, op, collection string, from, to []byte, decode func(v *view, key, value []byte) (store.Doc, error)) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		if collection == "" || len(collection) > store.MaxCollection {
			yield(store.Doc{}, &hub.Error{Kind: hub.Invalid, Op: "pebblestore." + op, Code: "collection-invalid"})
			return
		}
		next := slices.Clone(from)
		for {
			var page []store.Doc
			size, full := 0, false
			err := s.read(ctx, op, func(v *view) error {
				return each(v.snap, next, to, func(key, value []byte) (bool, error) {
					doc, err := decode(v, key, value)
					if err != nil {
						return false, err
					}
					page = append(page, doc)
					next = append(append(next[:0], key...), 0) // the very next key that can exist
					size += len(doc.Value)
					full = len(page) == pageItems || size >= pageBytes
					return !full, nil
				})
			})
			for _, doc := range page {
				if !yield(doc, nil) {
					return
				}
			}
			if err != nil {
				yield(store.Doc{}, err)
				return
			}
			if !full {
				return
			}
		}
	}
}
