package pebblestore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

var _ store.Archive = (*Store)(nil)

// ImportCommits stores commits of one device as another store has them; store.Archive has the contract. The feed has no references to
// them. For its readers they were trimmed away: a first position that nobody can have read stands for all of them.
func (s *Store) ImportCommits(ctx context.Context, commits []hub.Commit) error {
	if len(commits) == 0 {
		return nil
	}
	d, err := parseDevice(commits[0].Device)
	if err != nil {
		return err
	}
	r := &request{}
	values := make([][]byte, len(commits))
	for i := range commits {
		c := &commits[i]
		if c.Device != commits[0].Device || c.Seq != commits[0].Seq+uint64(i) {
			return &hub.Error{Kind: hub.Internal, Op: "pebblestore.ImportCommits", Err: errors.New("commits of several devices, or with a hole between")}
		}
		values[i] = store.AppendCommit(make([]byte, 0, 256), c)
		if err := store.CheckCommit(c, len(values[i])); err != nil {
			return err
		}
		r.cost += int64(len(values[i])) + requestCost
	}
	r.build = func(g *group) error {
		var err error
		for i := range commits {
			g.buf = commitKey(g.buf[:0], d, commits[i].Seq)
			err = errors.Join(err, g.batch.Set(g.buf, values[i], nil))
		}
		if err != nil { // as in append
			g.s.fail(fmt.Errorf("add commits of %s to a batch: %w", d.id(), err))
			return err
		}
		delete(g.seqs, d) // what it was is read again when it is asked for
		if g.state.head == (hub.Position{}) {
			g.state.trimmed = g.next()
		}
		return nil
	}
	return s.submit(ctx, "ImportCommits", r)
}

// ImportDocs stores documents of a device as they are after its newest commit; store.Archive has the contract.
func (s *Store) ImportDocs(ctx context.Context, dev hub.DeviceID, last uint64, docs []store.StateDoc) error {
	d, err := parseDevice(dev)
	if err != nil {
		return err
	}
	if err := store.CheckDocs(docs); err != nil {
		return err
	}
	r := &request{}
	for i := range docs {
		r.cost += int64(len(docs[i].Key) + len(docs[i].Value))
	}
	r.build = func(g *group) error {
		var err error
		for i := range docs {
			err = errors.Join(err, g.setState(d, &docs[i], last))
		}
		if err != nil {
			g.s.fail(fmt.Errorf("add documents of %s to a batch: %w", d.id(), err))
		}
		return err
	}
	return s.submit(ctx, "ImportDocs", r)
}

// Collections returns the names of all collections that have documents.
func (s *Store) Collections(ctx context.Context) ([]string, error) {
	var out []string
	err := s.read(ctx, "Collections", func(v *view) error {
		for next := []byte{prefixDoc}; next != nil; {
			found := ""
			err := each(v.snap, next, []byte{prefixDoc + 1}, func(key, _ []byte) (bool, error) {
				var ok bool
				if found, _, ok = splitCollection(key); !ok {
					return false, errors.New("a document's key is damaged")
				}
				return false, nil
			})
			if err != nil || found == "" {
				return err
			}
			out = append(out, found)
			next = after(collectionPrefix(prefixDoc, found))
		}
		return nil
	})
	slices.Sort(out) // names of one length are together in the database
	return out, err
}
