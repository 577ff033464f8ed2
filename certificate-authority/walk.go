package certificateauthority

import (
	"context"
	"iter"

	"github.com/coaphub/coaphub/internal/store"
)

// place is where somebody is who reads documents one after the other, so that he can go on from there later: behind the document Key
// of the step with the number Step.
type place struct {
	Step int
	Key  string
}

// step is some documents of a collection: one, those of an index, or all.
type step struct{ key, index string }

// stepsOf are steps for names; for none of them the other one.
func stepsOf[T ~string](names []T, to func(string) step, other step) (out []step) {
	for _, name := range names {
		out = append(out, to(string(name)))
	}
	if out == nil {
		out = []step{other}
	}
	return out
}

func byKey(key string) step { return step{key: key} }

// placed is something that was found in a document.
type placed[T any] struct {
	of    T
	at    place
	meant bool // else it is there only to say how far the search has come
}

// walk yields the documents of steps behind a place. An error is the last element.
func (s *Service) walk(ctx context.Context, collection string, steps []step, from place) iter.Seq2[placed[store.Doc], error] {
	return func(yield func(placed[store.Doc], error) bool) {
		for i := max(from.Step, 0); i < len(steps); i++ {
			after := ""
			if i == from.Step {
				after = from.Key
			}
			docs := func(yield func(store.Doc, error) bool) {
				if steps[i].key <= after {
					return
				}
				if doc, err := s.docs.Get(ctx, collection, steps[i].key); err != nil || doc.Rev != 0 {
					yield(doc, err)
				}
			}
			switch {
			case steps[i].index != "":
				docs = s.docs.Find(ctx, collection, steps[i].index)
			case steps[i].key == "":
				first := ""
				if after != "" {
					first = after + "\x00"
				}
				docs = s.docs.Range(ctx, collection, first, "")
			}
			for doc, err := range docs {
				if err == nil && doc.Key <= after {
					continue
				}
				if !yield(placed[store.Doc]{doc, place{i, doc.Key}, true}, err) || err != nil {
					return
				}
			}
		}
	}
}

// only is what is meant of what was found.
func only[T any](in iter.Seq2[placed[T], error]) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for p, err := range in {
			if (p.meant || err != nil) && !yield(p.of, err) || err != nil {
				return
			}
		}
	}
}

// each makes something of each document. read also reports whether that is meant.
func each[T any](docs iter.Seq2[placed[store.Doc], error], read func(store.Doc) (T, bool, error)) iter.Seq2[placed[T], error] {
	return func(yield func(placed[T], error) bool) {
		for doc, err := range docs {
			out := placed[T]{at: doc.at}
			if err == nil {
				out.of, out.meant, err = read(doc.of)
			}
			if !yield(out, err) || err != nil {
				return
			}
		}
	}
}
