package mongostore_test

import (
	"context"
	"slices"
	"testing"

	"go.mongodb.org/mongo-driver/v2/bson"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// offline opens a database for who copies it.
func offline(tb testing.TB, cfg mongostore.Config, make bool) *mongostore.Offline {
	tb.Helper()
	o, err := mongostore.OpenOffline(tb.Context(), cfg, opts(nil), make)
	must(tb, err)
	tb.Cleanup(func() { must(tb, o.Close()) })
	return o
}

func TestArchive(t *testing.T) {
	t.Parallel()
	storetest.RunArchive(t, func(t *testing.T) (store.Archive, func() store.Store) {
		cfg := config(uri, database(t))
		o := offline(t, cfg, true)
		return o, func() store.Store {
			must(t, o.Close())
			s := open(t, cfg, opts(storetest.NewFeed()), fast)
			t.Cleanup(func() { closeStore(t, s) })
			return s
		}
	})
}

// TestOfflineDatabase: who copies a database and the processes of its hub see each other, whoever comes first.
func TestOfflineDatabase(t *testing.T) {
	t.Parallel()
	cfg := config(uri, database(t))
	ctx := t.Context()
	_, err := mongostore.OpenOffline(ctx, cfg, opts(nil), false)
	wantError(t, "a database without a hub", err, hub.NotFound, "database-empty")

	feed := storetest.NewFeed()
	s := open(t, cfg, opts(feed), fast)
	must(t, add(ctx, s, storetest.Device(1), 1))
	o := offline(t, cfg, false)
	wantError(t, "while the hub runs", o.Alone(ctx), hub.Precondition, "database-in-use")
	if what, err := o.Has(ctx); err != nil || !slices.Contains(what, "devices") {
		t.Errorf("there are %v, %v", what, err)
	}
	s.Kill() // its document stays
	must(t, o.Alone(ctx))

	must(t, o.SetMark(ctx, mongostore.MarkFrom, []byte("from")))
	must(t, o.SetMark(ctx, mongostore.MarkInto, []byte("into")))
	before := len(writers(t, cfg.Database))
	refused(t, "a hub on half of one", cfg, opts(feed), fast, "migration-unfinished")
	if n := len(writers(t, cfg.Database)); n != before {
		t.Errorf("a hub that was refused left a writer's document: %d, before there were %d", n, before)
	}
	for name, want := range map[string]string{mongostore.MarkFrom: "from", mongostore.MarkInto: "into"} {
		if note, err := o.Mark(ctx, name); err != nil || string(note) != want {
			t.Errorf("the mark %s is %q, %v", name, note, err)
		}
	}
	must(t, o.SetMark(ctx, mongostore.MarkInto, nil))
	s = open(t, cfg, opts(feed), fast)
	if note, err := o.Mark(ctx, mongostore.MarkFrom); err != nil || note != nil {
		t.Errorf("after a hub's start the mark of who copied it is %q, %v", note, err)
	}
	closeStore(t, s)
	must(t, o.Alone(ctx))

	must(t, o.Clear(ctx))
	if what, err := o.Has(ctx); err != nil || len(what) > 0 {
		t.Errorf("what was cleared has %v, %v", what, err)
	}
	c := connect(t)
	defer func() { must(t, c.Disconnect(context.Background())) }()
	if n, err := c.Database(cfg.Database).Collection("hub").CountDocuments(ctx, bson.D{{Key: "_id", Value: "hub"}}); err != nil || n != 1 {
		t.Errorf("whose database it is, is told by %d documents, %v", n, err)
	}
}
