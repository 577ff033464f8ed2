package oauthserver

import (
	"context"
	"iter"
	"slices"
	"sort"
	"sync"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// memory is store.Documents in a map. fail, when set, is asked before each operation ("get", "put", "delete", "range",
// "find").
type memory struct {
	mu   sync.Mutex
	rev  uint64
	docs map[string]map[string]store.Doc
	fail func(op, collection, key string) error
	gets int
}

func newMemory() *memory { return &memory{docs: map[string]map[string]store.Doc{}} }

func (m *memory) check(op, collection, key string) error {
	if m.fail == nil {
		return nil
	}
	return m.fail(op, collection, key)
}

func (m *memory) Get(_ context.Context, collection, key string) (store.Doc, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.gets++
	if err := m.check("get", collection, key); err != nil {
		return store.Doc{}, err
	}
	return m.docs[collection][key], nil
}

func (m *memory) Put(_ context.Context, collection string, doc store.Doc) (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("put", collection, doc.Key); err != nil {
		return 0, err
	}
	if m.docs[collection][doc.Key].Rev != doc.Rev {
		return 0, &hub.Error{Kind: hub.Conflict}
	}
	m.rev++
	doc.Rev = m.rev
	if m.docs[collection] == nil {
		m.docs[collection] = map[string]store.Doc{}
	}
	m.docs[collection][doc.Key] = doc
	return doc.Rev, nil
}

func (m *memory) Delete(_ context.Context, collection, key string, rev uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.check("delete", collection, key); err != nil {
		return err
	}
	if d, ok := m.docs[collection][key]; !ok || d.Rev != rev {
		return &hub.Error{Kind: hub.Conflict}
	}
	delete(m.docs[collection], key)
	return nil
}

func (m *memory) Range(_ context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	return m.list("range", collection, func(d store.Doc) bool { return d.Key >= from && (to == "" || d.Key < to) })
}

func (m *memory) Find(_ context.Context, collection, index string) iter.Seq2[store.Doc, error] {
	return m.list("find", collection, func(d store.Doc) bool { return slices.Contains(d.Index, index) })
}

func (m *memory) FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for d, err := range m.Find(ctx, collection, index) {
			if !yield(d.Key, err) {
				return
			}
		}
	}
}

func (m *memory) list(op, collection string, want func(store.Doc) bool) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		m.mu.Lock()
		var out []store.Doc
		err := m.check(op, collection, "")
		for _, d := range m.docs[collection] {
			if want(d) {
				out = append(out, d)
			}
		}
		m.mu.Unlock()
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
