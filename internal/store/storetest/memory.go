package storetest

import (
	"context"
	"iter"
	"slices"
	"sort"
	"sync"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Memory is store.Documents in a map, for the tests of those who need no more of a store.
type Memory struct {
	Mu   sync.Mutex // guards all below
	Docs map[string]map[string]store.Doc
	// Fail, when set, is asked before each operation ("get", "put", "delete", "range", "find").
	Fail func(op, collection, key string) error
	Gets int // so far
	rev  uint64
}

// NewMemory has nothing in it.
func NewMemory() *Memory { return &Memory{Docs: map[string]map[string]store.Doc{}} }

func (m *Memory) check(op, collection, key string) error {
	if m.Fail == nil {
		return nil
	}
	return m.Fail(op, collection, key)
}

// Get implements store.Documents.
func (m *Memory) Get(_ context.Context, collection, key string) (store.Doc, error) {
	m.Mu.Lock()
	defer m.Mu.Unlock()
	m.Gets++
	if err := m.check("get", collection, key); err != nil {
		return store.Doc{}, err
	}
	return m.Docs[collection][key], nil
}

// Put implements store.Documents.
func (m *Memory) Put(_ context.Context, collection string, doc store.Doc) (uint64, error) {
	m.Mu.Lock()
	defer m.Mu.Unlock()
	if err := m.check("put", collection, doc.Key); err != nil {
		return 0, err
	}
	if m.Docs[collection][doc.Key].Rev != doc.Rev {
		return 0, &hub.Error{Kind: hub.Conflict}
	}
	m.rev++
	doc.Rev = m.rev
	if m.Docs[collection] == nil {
		m.Docs[collection] = map[string]store.Doc{}
	}
	m.Docs[collection][doc.Key] = doc
	return doc.Rev, nil
}

// Delete implements store.Documents.
func (m *Memory) Delete(_ context.Context, collection, key string, rev uint64) error {
	m.Mu.Lock()
	defer m.Mu.Unlock()
	if err := m.check("delete", collection, key); err != nil {
		return err
	}
	if d, ok := m.Docs[collection][key]; !ok || d.Rev != rev {
		return &hub.Error{Kind: hub.Conflict}
	}
	delete(m.Docs[collection], key)
	return nil
}

// Range implements store.Documents.
func (m *Memory) Range(_ context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	return m.list("range", collection, func(d store.Doc) bool { return d.Key >= from && (to == "" || d.Key < to) })
}

// Find implements store.Documents.
func (m *Memory) Find(_ context.Context, collection, index string) iter.Seq2[store.Doc, error] {
	return m.list("find", collection, func(d store.Doc) bool { return slices.Contains(d.Index, index) })
}

// FindKeys implements store.Documents.
func (m *Memory) FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for d, err := range m.Find(ctx, collection, index) {
			if !yield(d.Key, err) {
				return
			}
		}
	}
}

func (m *Memory) list(op, collection string, want func(store.Doc) bool) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		m.Mu.Lock()
		var out []store.Doc
		err := m.check(op, collection, "")
		for _, d := range m.Docs[collection] {
			if want(d) {
				out = append(out, d)
			}
		}
		m.Mu.Unlock()
		if err != nil {
			yield(store.Doc{}, err)
			return
		}
		sort.Slice(out, func(i, j int) bool { return out[i].Key < out[j].Key })
		for _, d := range out {
			if !yield(d, nil) {
				return
			}
		}
	}
}
