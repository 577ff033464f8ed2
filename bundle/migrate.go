package bundle

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// Migration is a hub that moves from a data folder to a cluster's database, or back.
type Migration struct {
	Data      string // the folder
	Config    Config // the cluster's
	ToCluster bool   // else from it
	// NewKeys lets a hub move into a folder without the keys of its certificate authority; its first start makes new ones.
	NewKeys bool
	// Progress is told how far it is, often. Nil is allowed.
	Progress func(MigrationProgress)
	// Say is told what somebody should know meanwhile. Nil is allowed.
	Say func(sentence string)
}

// MigrationProgress is how far a migration is.
type MigrationProgress struct {
	Step string // copying devices, copying documents, comparing
	Tally
	Of int64 // devices in all, for the steps that go through them
}

// Migrated is what a migration did.
type Migrated struct {
	HubID string `json:"hubId"`
	From  string `json:"from"`
	To    string `json:"to"`
	Tally
	Digest string `json:"digest"` // of both
	Resume bool   `json:"resumed"`
	Keys   string `json:"keys,omitempty"` // the folder whose files the process with the certificate authority needs
}

// migrationNote is a mark's text: on both ends which migration it is, on the one that is copied to how far it is.
type migrationNote struct {
	ID    string `json:"id"`
	HubID string `json:"hubId"`
	From  string `json:"from"`
	To    string `json:"to"`
	// Device is the last of those that are copied. Then come documents: Collection and Key name the last one.
	Device     hub.DeviceID `json:"device,omitempty"`
	Collection string       `json:"collection,omitempty"`
	Key        string       `json:"key,omitempty"`
	Tally
}

// end is one of the two ends of a migration.
type end interface {
	rest() *atRest
	where() string
	alone(ctx context.Context) error // refuses while a hub runs on it
	mark(ctx context.Context, name string) ([]byte, error)
	setMark(ctx context.Context, name string, note []byte) error
	has(ctx context.Context) ([]string, error) // what is in it, for people
	clear(ctx context.Context, hubID string) error
	close() error
}

// Migrate copies all that a hub has stored from one end to the other, and compares both. It is to be called again when it was broken off,
// and goes on where it was; when a hub ran on the source meanwhile it begins anew. What was copied gets a new log ID, so that older cursors
// are answered as lagged. The source stays as it was.
func Migrate(ctx context.Context, m Migration) (out Migrated, err error) {
	if m.Progress == nil {
		m.Progress = func(MigrationProgress) {}
	}
	if m.Say == nil {
		m.Say = func(string) {}
	}
	from, to, err := m.open(ctx)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, to.close(), from.close()) }()
	r := &migrationRun{Migration: m, from: from, to: to}
	if err := r.begin(ctx); err != nil {
		return out, err
	}
	digest := ""
	if err = r.copy(ctx); err == nil {
		digest, err = r.compare(ctx)
	}
	// A hub that started on the source may be why there was something wrong with it. If there was not, the copy is of no moment in its life.
	if changed := r.unchanged(ctx); changed != nil && (err == nil || hub.IsKind(changed, hub.Conflict)) {
		return out, errors.Join(changed, err)
	}
	if err != nil {
		return out, err
	}
	if err := r.finish(ctx); err != nil {
		return out, err
	}
	out = Migrated{HubID: r.note.HubID, From: r.note.From, To: r.note.To, Tally: r.note.Tally, Digest: digest, Resume: r.resumed}
	if m.ToCluster {
		out.Keys = from.(*folderEnd).folder.sub(keysFolder)
	}
	return out, nil
}

// open opens both ends, the source first.
func (m *Migration) open(ctx context.Context) (from, to end, err error) {
	if err := m.Config.Validate(); err != nil {
		return nil, nil, err
	}
	if !m.Config.Shared() {
		return nil, nil, errNoDatabase
	}
	if m.ToCluster {
		if err := mustBeData(m.Data); err != nil {
			return nil, nil, err
		}
		if from, err = openFolderEnd(ctx, m.Data, m.Config.Store); err != nil {
			return nil, nil, err
		}
		switch id := from.rest().hubID; {
		case id == "":
			err = &hub.Error{Kind: hub.NotFound, Code: "data-missing", Text: "no hub has ever run on " + m.Data}
		case !strings.EqualFold(id, m.Config.Cluster.HubID):
			err = &hub.Error{
				Kind: hub.Precondition, Code: "store-of-another-hub",
				Text: fmt.Sprintf("the hub in %s is %s, cluster.hubId is another: write cluster: {hubId: %s}", m.Data, id, id),
			}
		}
		if err == nil {
			to, err = openDatabaseEnd(ctx, m.Config, true)
		}
	} else {
		if from, err = openDatabaseEnd(ctx, m.Config, false); err != nil {
			return nil, nil, err
		}
		to, err = openFolderEnd(ctx, m.Data, m.Config.Store)
	}
	if err != nil {
		return nil, nil, errors.Join(err, from.close())
	}
	return from, to, nil
}

var errNoDatabase = hub.NewError(hub.Invalid, "cluster-config-missing", "the configuration is of a hub on one machine: name the cluster's, which has store.mongodb, with --config")

// migrationRun is a migration under way.
type migrationRun struct {
	Migration
	from, to end
	note     migrationNote
	resumed  bool
	saved    time.Time
	devices  int64 // of the source
}

// begin sees that nobody uses the ends, and finds out where to go on. The marks come before the look at who uses a database: a hub
// that starts does it the other way round, so that one of the two sees the other.
func (r *migrationRun) begin(ctx context.Context) error {
	if err := errors.Join(r.from.alone(ctx), r.to.alone(ctx)); err != nil {
		return err
	}
	if folder, ok := r.to.(*folderEnd); ok && !r.NewKeys && !keysMade(folder.folder.sub(keysFolder)) {
		return &hub.Error{
			Kind: hub.Precondition, Code: "keys-missing",
			Text: "the keys of the certificate authority are not in " + folder.folder.sub(keysFolder) + ": copy the folder " + keysFolder +
				" of the process with the certificate-authority there, or every device must be onboarded again (--new-keys)",
		}
	}
	hubID := r.from.rest().hubID
	old, err := readNote(ctx, r.to, mongostore.MarkInto)
	if err != nil {
		return err
	}
	source, err := readNote(ctx, r.from, mongostore.MarkFrom)
	if err != nil {
		return err
	}
	if half, err := readNote(ctx, r.from, mongostore.MarkInto); err != nil || half != nil {
		return errors.Join(err, &hub.Error{
			Kind: hub.Precondition, Code: "migration-unfinished",
			Text: r.from.where() + " has half of a hub itself: finish that migration first",
		})
	}
	switch has, err := r.to.has(ctx); {
	case err != nil:
		return err
	case old == nil && len(has) > 0:
		return &hub.Error{
			Kind: hub.Precondition, Code: "target-not-empty",
			Text: fmt.Sprintf("there are %s in %s already: a hub moves to where nothing is", strings.Join(has, ", "), r.to.where()),
		}
	case old != nil && old.HubID != hubID:
		return &hub.Error{
			Kind: hub.Precondition, Code: "target-not-empty",
			Text: fmt.Sprintf("%s has half of another hub, %s of %s: a hub moves to where nothing is", r.to.where(), old.HubID, old.From),
		}
	case old != nil && source != nil && source.ID == old.ID:
		r.note, r.resumed = *old, true
	default:
		r.note = migrationNote{ID: rand.Text(), HubID: hubID, From: r.from.where(), To: r.to.where()}
		if err := r.save(ctx); err != nil {
			return err
		}
		if old != nil {
			r.Say("a hub ran on " + r.from.where() + " since the migration was broken off, or it is another copy: it begins anew")
		}
		if err := r.to.clear(ctx, hubID); err != nil {
			return err
		}
		text, err := json.Marshal(r.note)
		if err == nil {
			err = r.from.setMark(ctx, mongostore.MarkFrom, text)
		}
		if err != nil {
			return err
		}
	}
	return errors.Join(r.from.alone(ctx), r.to.alone(ctx))
}

func readNote(ctx context.Context, e end, name string) (*migrationNote, error) {
	text, err := e.mark(ctx, name)
	if err != nil || text == nil {
		return nil, err
	}
	var n migrationNote
	if err := json.Unmarshal(text, &n); err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "the mark of a migration in " + e.where() + " is damaged", Err: err}
	}
	return &n, nil
}

// save writes down how far it is.
func (r *migrationRun) save(ctx context.Context) error {
	text, err := json.Marshal(r.note)
	if err == nil {
		err = r.to.setMark(ctx, mongostore.MarkInto, text)
	}
	r.saved = time.Now()
	return err
}

// did is called after each thing that is copied. Whoever goes on after a crash copies again what was done since it was last saved.
func (r *migrationRun) did(ctx context.Context, step string) error {
	r.Progress(MigrationProgress{Step: step, Tally: r.note.Tally, Of: r.devices})
	if time.Since(r.saved) < time.Second {
		return nil
	}
	return r.save(ctx)
}

// copy copies what is not copied yet.
func (r *migrationRun) copy(ctx context.Context) (err error) {
	defer func() {
		if err != nil { // where it was broken off, if that can still be said
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			_ = r.save(last)
		}
	}()
	src := r.from.rest()
	for _, err := range src.Devices(ctx, "") {
		if err != nil {
			return fmt.Errorf("count the devices: %w", err)
		}
		r.devices++
	}
	whole, err := resourcedirectory.NewWhole()
	if err != nil {
		return err
	}
	if r.note.Collection == "" {
		devices := func(ctx context.Context) iter.Seq2[hub.DeviceID, error] { return src.Devices(ctx, r.note.Device) }
		err = inOrder(ctx, devices, func(ctx context.Context, dev hub.DeviceID) (weighed, error) {
			w, err := copyDevice(ctx, whole, src, r.to.rest(), dev)
			if err != nil {
				err = fmt.Errorf("copy device %s: %w", dev, err)
			}
			return w, err
		}, func(dev hub.DeviceID, w weighed) error {
			r.note.Device = dev
			r.note.Devices++
			r.note.Commits += w.commits
			r.note.Events += w.events
			return r.did(ctx, "copying devices")
		})
		if err != nil {
			return err
		}
	}
	collections, err := src.collections(ctx)
	if err != nil {
		return err
	}
	for _, c := range collections {
		after := ""
		switch {
		case c < r.note.Collection:
			continue
		case c == r.note.Collection:
			after = r.note.Key
		}
		docs := func(ctx context.Context) iter.Seq2[store.Doc, error] { return src.documents(ctx, c, after) }
		err := inOrder(ctx, docs, func(ctx context.Context, doc store.Doc) (struct{}, error) {
			return struct{}{}, copyDocument(ctx, r.to.rest().opened, c, doc)
		}, func(doc store.Doc, _ struct{}) error {
			r.note.Collection, r.note.Key = c, doc.Key
			r.note.Documents++
			return r.did(ctx, "copying documents")
		})
		if err != nil {
			return fmt.Errorf("copy the collection %s: %w", c, err)
		}
	}
	names, err := src.secrets(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		doc, err := src.opened.Get(ctx, secretCollection, name)
		if err == nil {
			err = copyDocument(ctx, r.to.rest().opened, secretCollection, doc)
		}
		if err != nil {
			return fmt.Errorf("copy a secret: %w", err)
		}
	}
	r.note.Secrets = int64(len(names))
	return nil
}

// pieces bound what is copied of a device at once.
const (
	pieceCommits = 256
	pieceBytes   = 4 << 20
)

// copyDevice copies a device whole. It may be done again.
func copyDevice(ctx context.Context, whole resourcedirectory.Whole, from, to *atRest, dev hub.DeviceID) (w weighed, err error) {
	docs, bases, last, err := whole.Load(ctx, from.Archive, dev)
	if err != nil {
		return w, err
	}
	var first uint64
	var page []hub.Commit
	size := 0
	flush := func() error {
		err := to.ImportCommits(ctx, page)
		page, size = page[:0], 0
		return err
	}
	for c, err := range from.log(ctx, dev, last) {
		if err != nil {
			return w, err
		}
		if first == 0 {
			first = c.Seq
		}
		page = append(page, c)
		for i := range c.Events {
			size += len(c.Events[i].Content.Data) + 64
		}
		w.commits++
		w.events += int64(len(c.Events))
		if len(page) == pieceCommits || size >= pieceBytes {
			if err := flush(); err != nil {
				return w, err
			}
		}
	}
	if err := flush(); err != nil {
		return w, err
	}
	if last > 0 {
		for more := true; more; { // also without any: the device's record comes with them
			var piece []store.StateDoc
			piece, docs, more = cut(docs)
			if err := to.ImportDocs(ctx, dev, last, piece); err != nil {
				return w, err
			}
		}
	}
	for more := len(bases) > 0; more; {
		var piece []store.StateDoc
		piece, bases, more = cut(bases)
		if err := to.Trim(ctx, dev, first, piece); err != nil {
			return w, err
		}
	}
	return w, nil
}

// cut takes a piece of documents off the front.
func cut(docs []store.StateDoc) (piece, rest []store.StateDoc, more bool) {
	n, size := 0, 0
	for n < len(docs) && (n == 0 || size+len(docs[n].Key)+len(docs[n].Value) <= pieceBytes) {
		size += len(docs[n].Key) + len(docs[n].Value)
		n++
	}
	return docs[:n], docs[n:], n < len(docs)
}

// copyDocument puts a document in place, whatever is there.
func copyDocument(ctx context.Context, to store.Documents, collection string, doc store.Doc) error {
	doc.Rev = 0
	for {
		_, err := to.Put(ctx, collection, doc)
		if !hub.IsKind(err, hub.Conflict) {
			return err
		}
		there, err := to.Get(ctx, collection, doc.Key) // copied before a crash
		if err != nil {
			return err
		}
		doc.Rev = there.Rev
	}
}

// compare reads both ends and refuses if they differ.
func (r *migrationRun) compare(ctx context.Context) (string, error) {
	var digests [2]string
	var tallies [2]Tally
	g, ctx := errgroup.WithContext(ctx)
	for i, e := range []end{r.from, r.to} {
		g.Go(func() (err error) {
			var count func(int64)
			if i == 1 {
				count = func(n int64) {
					r.Progress(MigrationProgress{Step: "comparing", Tally: Tally{Devices: n}, Of: r.devices})
				}
			}
			digests[i], tallies[i], err = e.rest().digest(ctx, count)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return "", fmt.Errorf("compare: %w", err)
	}
	if digests[0] != digests[1] {
		return "", &hub.Error{
			Kind: hub.Internal, Code: "migration-differs",
			Text: fmt.Sprintf("what was copied to %s differs from %s (%+v, %+v): run coaphub verify on the source, empty the target, and copy anew; report it", r.to.where(), r.from.where(), tallies[1], tallies[0]),
		}
	}
	r.note.Tally = tallies[0]
	return digests[0], nil
}

// unchanged refuses, as a conflict, when a hub has started on the source since the migration began.
func (r *migrationRun) unchanged(ctx context.Context) error {
	source, err := readNote(ctx, r.from, mongostore.MarkFrom)
	if err == nil && (source == nil || source.ID != r.note.ID) {
		err = &hub.Error{
			Kind: hub.Conflict, Code: "migration-source-changed",
			Text: "a hub started on " + r.from.where() + " while it was copied: stop it and run the same again, which begins anew",
		}
	}
	return err
}

// finish makes the target a hub's.
func (r *migrationRun) finish(ctx context.Context) error {
	if err := r.to.setMark(ctx, mongostore.MarkInto, nil); err != nil {
		return err
	}
	return r.from.setMark(ctx, mongostore.MarkFrom, nil)
}

// folderEnd is a data folder, held alone.
type folderEnd struct {
	folder *Folder
	cfg    StoreConfig
	s      *pebblestore.Store
	at     *atRest
}

func openFolderEnd(ctx context.Context, data string, cfg StoreConfig) (*folderEnd, error) {
	folder, err := takeFolder(data)
	if err != nil {
		return nil, err
	}
	e := &folderEnd{folder: folder, cfg: cfg}
	if err := e.open(ctx); err != nil {
		return nil, errors.Join(err, folder.Close())
	}
	return e, nil
}

func (e *folderEnd) open(ctx context.Context) (err error) {
	if e.s, err = openPebble(e.folder, e.cfg, nil, nil); err != nil {
		return err
	}
	if e.at, err = folderAtRest(ctx, e.s, e.folder.sub(keysFolder)); err != nil {
		return errors.Join(err, e.s.Close())
	}
	return nil
}

func (e *folderEnd) rest() *atRest               { return e.at }
func (e *folderEnd) where() string               { return e.folder.Path }
func (e *folderEnd) alone(context.Context) error { return nil } // the lock says so

func (e *folderEnd) file(name string) string {
	return e.folder.sub(map[string]string{mongostore.MarkInto: intoFile, mongostore.MarkFrom: fromFile}[name])
}

func (e *folderEnd) mark(_ context.Context, name string) ([]byte, error) {
	text, err := os.ReadFile(e.file(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return text, err
}

func (e *folderEnd) setMark(_ context.Context, name string, note []byte) error {
	if note == nil {
		return removeFile(e.file(name))
	}
	return writeFile(e.file(name), note)
}

func (e *folderEnd) has(ctx context.Context) (what []string, err error) {
	for _, err := range e.s.Devices(ctx, "") {
		if err != nil {
			return nil, err
		}
		what = append(what, "devices")
		break
	}
	collections, err := e.s.Collections(ctx)
	if len(collections) > 0 {
		what = append(what, "documents")
	}
	secrets, secretsErr := e.at.secrets(ctx)
	if len(secrets) > 0 {
		what = append(what, "secrets")
	}
	return what, errors.Join(err, secretsErr)
}

// clear begins a new store, with a new log ID, which knows whose it is.
func (e *folderEnd) clear(ctx context.Context, hubID string) error {
	err := errors.Join(e.s.Close(), os.RemoveAll(e.folder.sub(storeFolder)))
	secrets, listErr := e.at.secrets(ctx)
	err = errors.Join(err, listErr)
	for _, name := range secrets {
		err = errors.Join(err, os.Remove(filepath.Join(e.folder.sub(keysFolder), "oauth-"+name+".json")))
	}
	if err == nil {
		err = os.MkdirAll(e.folder.sub(keysFolder), 0o700)
	}
	if err != nil {
		return fmt.Errorf("begin a new store: %w", err)
	}
	if err := e.open(ctx); err != nil {
		return err
	}
	e.at.hubID = hubID
	_, err = e.s.Put(ctx, hubCollection, store.Doc{Key: hubIDKey, Value: []byte(hubID)})
	return err
}

func (e *folderEnd) close() error { return errors.Join(e.s.Close(), e.folder.Close()) }

// databaseEnd is a cluster's database.
type databaseEnd struct {
	*mongostore.Offline
	at *atRest
}

func openDatabaseEnd(ctx context.Context, cfg Config, make bool) (*databaseEnd, error) {
	id, err := hub.ParseDeviceID(cfg.Cluster.HubID)
	if err != nil {
		return nil, err
	}
	o, err := mongostore.OpenOffline(ctx, cfg.Store.MongoDB, mongostore.Options{HubID: string(id), ClusterSecret: cfg.Cluster.Secret}, make)
	if err != nil {
		return nil, err
	}
	docs, err := sealed(o, cfg.Cluster.Secret, string(id))
	if err != nil {
		return nil, errors.Join(err, o.Close())
	}
	return &databaseEnd{o, &atRest{Archive: o, hubID: string(id), opened: docs, secrets: storedSecrets(o)}}, nil
}

func (e *databaseEnd) rest() *atRest                             { return e.at }
func (e *databaseEnd) where() string                             { return e.Where() }
func (e *databaseEnd) alone(ctx context.Context) error           { return e.Alone(ctx) }
func (e *databaseEnd) has(ctx context.Context) ([]string, error) { return e.Has(ctx) }
func (e *databaseEnd) clear(ctx context.Context, _ string) error { return e.Clear(ctx) }
func (e *databaseEnd) close() error                              { return e.Close() }
func (e *databaseEnd) mark(ctx context.Context, name string) ([]byte, error) {
	return e.Mark(ctx, name)
}

func (e *databaseEnd) setMark(ctx context.Context, name string, note []byte) error {
	return e.SetMark(ctx, name, note)
}
