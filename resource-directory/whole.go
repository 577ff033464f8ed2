package resourcedirectory

import (
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Kept is what those need of a store who only look at devices, all of them or one.
type Kept interface {
	Devices(ctx context.Context, after hub.DeviceID) iter.Seq2[hub.DeviceID, error]
	Load(ctx context.Context, dev hub.DeviceID) (store.State, error)
	Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error]
}

// Whole makes devices whole, of which documents may lag behind the log.
type Whole struct{ codec codec }

// NewWhole returns one that may be used by many at a time.
func NewWhole() (Whole, error) {
	k, err := newCodec()
	return Whole{k}, err
}

// Load returns a device's documents as they are after its newest commit, of which last is the seq, and the bases of its history, each
// in the order of their keys.
func (w Whole) Load(ctx context.Context, st Kept, dev hub.DeviceID) (docs, bases []store.StateDoc, last uint64, err error) {
	stored, err := st.Load(ctx, dev)
	if err != nil {
		return nil, nil, 0, fmt.Errorf("load device: %w", err)
	}
	last = stored.LastSeq
	later := map[string][]byte{}
	if len(stored.Commits) > 0 {
		s, changed, err := w.codec.replay(dev, &stored)
		if err != nil {
			return nil, nil, 0, err
		}
		folded, err := w.codec.docs(s, changed, "")
		if err != nil {
			return nil, nil, 0, err
		}
		for _, d := range folded {
			later[d.Key] = d.Value
		}
	}
	for _, d := range stored.Docs {
		if d.Key != "" && d.Key[0] == basePrefix[0] {
			bases = append(bases, d)
			continue
		}
		if value, ok := later[d.Key]; ok {
			d.Value = value
			delete(later, d.Key)
		}
		if d.Value != nil {
			docs = append(docs, d)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(later)) {
		if later[key] != nil {
			docs = append(docs, store.StateDoc{Key: key, Value: later[key]})
		}
	}
	byKey := func(a, b store.StateDoc) int { return strings.Compare(a.Key, b.Key) }
	slices.SortFunc(docs, byKey)
	slices.SortFunc(bases, byKey)
	return docs, bases, last, nil
}
