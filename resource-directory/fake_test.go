package resourcedirectory

import (
	"context"
	"sync"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// fake is a store in front of another; functions that are set take over.
type fake struct {
	store.Store
	mu     sync.Mutex
	append func(ctx context.Context, entries []store.Entry) []error
	load   func(ctx context.Context, dev hub.DeviceID) (store.State, error)
	put    func(ctx context.Context, collection string, doc store.Doc) (uint64, error)
	bytes  func() uint64
}

func (f *fake) set(change func(f *fake)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

func (f *fake) Append(ctx context.Context, entries []store.Entry) []error {
	f.mu.Lock()
	do := f.append
	f.mu.Unlock()
	if do != nil {
		return do(ctx, entries)
	}
	return f.Store.Append(ctx, entries)
}

func (f *fake) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	f.mu.Lock()
	do := f.load
	f.mu.Unlock()
	if do != nil {
		return do(ctx, dev)
	}
	return f.Store.Load(ctx, dev)
}

func (f *fake) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	f.mu.Lock()
	do := f.put
	f.mu.Unlock()
	if do != nil {
		return do(ctx, collection, doc)
	}
	return f.Store.Put(ctx, collection, doc)
}

func (f *fake) DiskBytes(context.Context) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.bytes == nil {
		return 0, nil
	}
	return f.bytes(), nil
}

// faked puts a fake in front of the store; the pointer is filled when the house starts.
func faked(f *fake) func(*house) {
	return func(h *house) {
		h.wrap = func(s store.Store) store.Store {
			f.set(func(f *fake) { f.Store = s })
			return f
		}
	}
}

// away answers everything as a store that cannot be reached.
func away(_ context.Context, entries []store.Entry) []error {
	errs := make([]error, len(entries))
	for i := range errs {
		errs[i] = &hub.Error{Kind: hub.Unavailable, Op: "fake.Append"}
	}
	return errs
}
