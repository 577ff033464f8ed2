package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// atRest is what a hub has stored, in a data folder or in a cluster's database, while nobody serves from it.
type atRest struct {
	store.Archive
	hubID   string          // empty while it is being copied to a new folder
	opened  store.Documents // those of the archive, but with secrets as the hub sees them
	secrets func(ctx context.Context) ([]string, error)
}

// Tally is how much of what a hub has stored. Documents are those of collections, not the states of devices.
type Tally struct {
	Devices   int64 `json:"devices"`
	Commits   int64 `json:"commits"`
	Events    int64 `json:"events"`
	Documents int64 `json:"documents"`
	Secrets   int64 `json:"secrets"`
}

// folderSecrets lists the secrets that are files.
func folderSecrets(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list the hub's secrets: %w", err)
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), "oauth-")
		name, isJSON := strings.CutSuffix(name, ".json")
		if ok && isJSON && e.Type().IsRegular() {
			names = append(names, name)
		}
	}
	return names, nil // in order, since the entries are
}

// storedSecrets lists the secrets that are sealed documents.
func storedSecrets(docs store.Documents) func(context.Context) ([]string, error) {
	return func(ctx context.Context) (names []string, err error) {
		for doc, err := range docs.Range(ctx, secretCollection, "", "") {
			if err != nil {
				return nil, err
			}
			names = append(names, doc.Key)
		}
		return names, nil
	}
}

// collections lists those that are the same in a folder and in a database, which the secrets are not.
func (r *atRest) collections(ctx context.Context) ([]string, error) {
	all, err := r.Collections(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the collections: %w", err)
	}
	return slices.DeleteFunc(all, func(c string) bool { return c == secretCollection }), nil
}

// documents yields those of a collection behind a key, but the hub's ID, which a database has elsewhere.
func (r *atRest) documents(ctx context.Context, collection, after string) iter.Seq2[store.Doc, error] {
	return func(yield func(store.Doc, error) bool) {
		for doc, err := range r.Range(ctx, collection, after, "") {
			if err == nil && (doc.Key == after || collection == hubCollection && doc.Key == hubIDKey) {
				continue
			}
			if !yield(doc, err) {
				return
			}
		}
	}
}

// width is how many devices or documents are under way at a time: it hides how long a server takes to answer, and bounds memory.
const width = 16

// inOrder does work for each of all, several at a time, and done for each in the order of all.
func inOrder[T, R any](
	ctx context.Context, all func(context.Context) iter.Seq2[T, error], work func(context.Context, T) (R, error), done func(T, R) error,
) error {
	type job struct {
		in  T
		out chan R
	}
	queue := make(chan job, width) // whoever finds it full waits for the oldest
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(queue)
		for in, err := range all(ctx) {
			if err != nil {
				return err
			}
			j := job{in, make(chan R, 1)}
			select {
			case queue <- j:
			case <-ctx.Done():
				return ctx.Err()
			}
			g.Go(func() error {
				out, err := work(ctx, in)
				if err == nil {
					j.out <- out
				}
				return err
			})
		}
		return nil
	})
	g.Go(func() error {
		for j := range queue {
			select {
			case out := <-j.out:
				if err := done(j.in, out); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	return g.Wait()
}

// scale adds what it is given to a hash, each with its length before it, so that no two contents look the same.
type scale struct {
	hash.Hash
	size [binary.MaxVarintLen64]byte
}

func (s *scale) add(parts ...string) {
	for _, p := range parts {
		s.number(uint64(len(p)))
		_, _ = s.Write([]byte(p))
	}
}

func (s *scale) number(n uint64) { _, _ = s.Write(s.size[:binary.PutUvarint(s.size[:], n)]) }

func (s *scale) docs(docs []store.StateDoc) {
	s.number(uint64(len(docs)))
	for _, d := range docs {
		s.add(d.Key, string(d.Value))
	}
}

// weighed is one device's part in a digest.
type weighed struct {
	sum             []byte
	commits, events int64
}

// digest makes one number of all that a hub has stored and that counts: its ID, each device's log (seq, time, ID, writer, owner and
// events of each commit) and documents as they are after it, the bases of its history, the documents of all collections with their
// secondary keys, and the hub's secrets as it sees them. Where a document is only as new as some commit, the rest is folded first. Not
// in it are revisions, the feed and its places, and the keys of the certificate authority, which are files everywhere. Two hubs with the
// same content have the same digest, wherever they are kept.
func (r *atRest) digest(ctx context.Context, count func(devices int64)) (digest string, t Tally, err error) {
	whole, err := resourcedirectory.NewWhole()
	if err != nil {
		return "", t, err
	}
	h := &scale{Hash: sha256.New()}
	h.add("coaphub digest 1", r.hubID, "devices")
	devices := func(ctx context.Context) iter.Seq2[hub.DeviceID, error] { return r.Devices(ctx, "") }
	err = inOrder(ctx, devices, func(ctx context.Context, dev hub.DeviceID) (weighed, error) { return r.weigh(ctx, whole, dev) },
		func(dev hub.DeviceID, w weighed) error {
			h.add(string(dev), string(w.sum))
			t.Devices++
			t.Commits += w.commits
			t.Events += w.events
			if count != nil {
				count(t.Devices)
			}
			return nil
		})
	if err != nil {
		return "", t, err
	}
	collections, err := r.collections(ctx)
	if err != nil {
		return "", t, err
	}
	for _, c := range collections {
		named := false // a collection of nothing else than what is left out is none
		for doc, err := range r.documents(ctx, c, "") {
			if err != nil {
				return "", t, fmt.Errorf("read the collection %s: %w", c, err)
			}
			if !named {
				h.add("collection", c)
				named = true
			}
			slices.Sort(doc.Index)
			h.add("document", doc.Key, string(doc.Value))
			h.number(uint64(len(doc.Index)))
			h.add(doc.Index...)
			t.Documents++
		}
	}
	h.add("secrets")
	names, err := r.secrets(ctx)
	if err != nil {
		return "", t, err
	}
	for _, name := range names {
		doc, err := r.opened.Get(ctx, secretCollection, name)
		if err != nil {
			return "", t, err
		}
		h.add(name, string(doc.Value))
		t.Secrets++
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), t, nil
}

func (r *atRest) weigh(ctx context.Context, whole resourcedirectory.Whole, dev hub.DeviceID) (w weighed, err error) {
	docs, bases, last, err := whole.Load(ctx, r.Archive, dev)
	if err != nil {
		return w, err
	}
	h := &scale{Hash: sha256.New()}
	var buf []byte
	for c, err := range r.log(ctx, dev, last) {
		if err != nil {
			return w, err
		}
		buf = store.AppendCommit(buf[:0], &c)
		h.number(c.Seq)
		h.add(string(buf))
		w.commits++
		w.events += int64(len(c.Events))
	}
	h.number(0) // of no commit
	h.docs(docs)
	h.docs(bases)
	w.sum = h.Sum(nil)
	return w, nil
}

// log yields a device's commits, and refuses a log with a hole, or that does not end with last.
func (r *atRest) log(ctx context.Context, dev hub.DeviceID, last uint64) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		var before uint64
		for c, err := range r.Commits(ctx, dev, 0) {
			if err == nil && before != 0 && c.Seq != before+1 {
				err = holed(dev, before+1)
			}
			if !yield(c, err) || err != nil {
				return
			}
			before = c.Seq
		}
		if before != last {
			yield(hub.Commit{}, holed(dev, before+1))
		}
	}
}

func holed(dev hub.DeviceID, seq uint64) error {
	return &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: fmt.Sprintf("commit %s/%d is missing: coaphub verify says more; restore a backup", dev, seq)}
}

// folderAtRest is what is in the store of a data folder and in its keys.
func folderAtRest(ctx context.Context, a store.Archive, keys string) (*atRest, error) {
	id, err := a.Get(ctx, hubCollection, hubIDKey)
	if err != nil {
		return nil, fmt.Errorf("the hub's ID: %w", err)
	}
	return &atRest{
		Archive: a, hubID: string(id.Value), opened: &withSecrets{Documents: a, dir: keys},
		secrets: func(context.Context) ([]string, error) { return folderSecrets(keys) },
	}, nil
}

// keysMade reports whether a folder has the keys of a certificate authority.
func keysMade(dir string) bool {
	made, err := filepath.Glob(filepath.Join(dir, "device-root*.pem"))
	return err == nil && len(made) > 0
}
