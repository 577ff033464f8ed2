// Package audit keeps a durable, bounded log of calls that changed something: who made which, when, and how it ended.
//
// It must not know doors or services: they hand it hub's words.
package audit

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	collection = "audit"
	// Keep is how many entries are kept; then the oldest go, a page at a time.
	Keep = 100_000
	// perPage is how many entries share a document: few enough that rewriting it for one more costs little, enough that a
	// start reads no more than Keep/perPage keys.
	perPage = 64
	// maxWaiting bounds the entries that wait to be written; more callers wait outside.
	maxWaiting = 256
	// maxText bounds each text of an entry, in bytes.
	maxText  = 512
	maxTries = 8
	// maxWait is how long Record waits.
	maxWait = 10 * time.Second
)

// Log is the audit log. All methods are safe for concurrent use.
type Log struct {
	docs    store.Documents
	keep    int
	log     *slog.Logger
	metrics *metrics
	in      chan *waiting // full: see Record
	stopped chan struct{} // closed when Run has ended

	// newest is the page that begins at newestFirst as it is stored, while its revision is newestRev; Run's. With it a page is neither read nor decoded
	// again for each entry.
	newest      []byte
	newestFirst uint64
	newestRev   uint64

	mu    sync.Mutex // guards what follows
	pages []page     // oldest first; only Run changes it
	last  uint64     // number of the newest entry
}

// page is a document of entries whose numbers begin at first and go on without gaps.
type page struct {
	first uint64
	n     int
	rev   uint64
}

func (p page) key() string { return fmt.Sprintf("%016x", p.first) }

type waiting struct {
	entry hub.AuditEntry
	done  chan error // one place, so that the writer never waits
}

// Open reads how far the log goes. Entries are taken once Run runs.
func Open(ctx context.Context, docs store.Documents, log *slog.Logger, reg prometheus.Registerer) (*Log, error) {
	l := &Log{
		docs: docs, keep: Keep, log: log, metrics: newMetrics(reg), in: make(chan *waiting, maxWaiting), stopped: make(chan struct{}),
	}
	return l, l.load(ctx)
}

// load finds the pages. A document that is damaged ends with an error: numbers must not be given twice.
func (l *Log) load(ctx context.Context) error {
	var pages []page
	var last uint64
	for doc, err := range l.docs.Range(ctx, collection, "", "") {
		if err != nil {
			return fmt.Errorf("read the audit log: %w", err)
		}
		entries, err := decode(doc)
		if err != nil {
			return err
		}
		if len(entries) == 0 {
			continue
		}
		pages = append(pages, page{entries[0].Number, len(entries), doc.Rev})
		last = entries[len(entries)-1].Number
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pages, l.last = pages, max(l.last, last)
	return nil
}

func decode(doc store.Doc) ([]hub.AuditEntry, error) {
	var entries []hub.AuditEntry
	if doc.Rev == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(doc.Value, &entries); err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "audit.read", Err: fmt.Errorf("page %.32s: %w", doc.Key, err)}
	}
	return entries, nil
}

// Run writes what Record hands in until ctx ends; what waits then is written first. The error is always nil.
func (l *Log) Run(ctx context.Context, ready func()) error {
	defer close(l.stopped)
	ready()
	for {
		select {
		case w := <-l.in:
			l.write(w)
		case <-ctx.Done():
			select {
			case w := <-l.in:
				l.write(w)
			default:
				return nil
			}
		}
	}
}

var errStopping = hub.NewError(hub.Unavailable, "audit-stopping", "the audit log is closed, since the hub is stopping")

// Record adds an entry, durably on return; number and, if it is zero, time are set here. Texts are cut at 512 bytes. What is
// recorded has happened, also if who did it has gone: the end of ctx does not matter. When the store is slow callers wait for
// it, but not longer than ten seconds: then the outcome is not known.
func (l *Log) Record(ctx context.Context, e hub.AuditEntry) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), maxWait)
	defer cancel()
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Time = e.Time.UTC()
	for _, s := range []*string{&e.Call, &e.Target, &e.User, (*string)(&e.Owner), &e.Client, &e.Remote, &e.Request, &e.Outcome} {
		*s = cut(*s)
	}
	w := &waiting{e, make(chan error, 1)}
	select {
	case l.in <- w:
	case <-l.stopped:
		return errStopping.With("audit.Record", nil)
	case <-ctx.Done():
		return fmt.Errorf("audit.Record: %w", ctx.Err())
	}
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("audit.Record: %w", ctx.Err())
	case <-l.stopped:
		select {
		case err := <-w.done:
			return err
		default:
			return errStopping.With("audit.Record", nil)
		}
	}
}

// cut keeps a text short and valid UTF-8; what is no UTF-8, also where it was cut, becomes U+FFFD.
func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "\uFFFD") }

// write stores w and all that wait behind it, as far as one page takes them: a synced write is shared.
func (l *Log) write(w *waiting) {
	batch := []*waiting{w}
	for more := true; more && len(batch) < perPage; {
		select {
		case w := <-l.in:
			batch = append(batch, w)
		default:
			more = false
		}
	}
	// Not the callers' contexts: one of them ends for all otherwise. The store's own end ends the write.
	ctx := context.Background()
	err := l.append(ctx, batch)
	if err != nil {
		l.metrics.entries.WithLabelValues("failed").Add(float64(len(batch)))
		err = fmt.Errorf("write the audit log: %w", err)
	} else {
		l.metrics.entries.WithLabelValues("ok").Add(float64(len(batch)))
	}
	for _, w := range batch {
		w.done <- err
	}
	if err == nil {
		l.trim(ctx)
	}
}

func (l *Log) append(ctx context.Context, batch []*waiting) error {
	for try := 0; ; try++ {
		err := l.tryAppend(ctx, batch)
		if !hub.IsKind(err, hub.Conflict) || try == maxTries {
			return err
		}
		if err := l.load(ctx); err != nil { // another process wrote
			return err
		}
	}
}

func (l *Log) tryAppend(ctx context.Context, batch []*waiting) error {
	l.mu.Lock()
	last := l.last
	at := page{first: last + 1}
	if n := len(l.pages); n > 0 && l.pages[n-1].n+len(batch) <= perPage {
		at = l.pages[n-1]
	}
	l.mu.Unlock()
	entries := make([]hub.AuditEntry, len(batch))
	for i, w := range batch {
		entries[i] = w.entry
		entries[i].Number = last + 1 + uint64(i)
	}
	b, err := json.Marshal(entries)
	if err != nil {
		return &hub.Error{Kind: hub.Internal, Op: "audit.append", Err: err}
	}
	if at.rev != 0 {
		if l.newestFirst != at.first || l.newestRev != at.rev { // the first entry of this run, or another process wrote
			doc, err := l.docs.Get(ctx, collection, at.key())
			switch {
			case err != nil:
				return err
			case doc.Rev != at.rev || len(doc.Value) == 0:
				return &hub.Error{Kind: hub.Conflict, Op: "audit.append"}
			}
			l.newest, l.newestFirst, l.newestRev = doc.Value, at.first, doc.Rev
		}
		// Two arrays become one: the brackets between them a comma.
		b = slices.Concat(l.newest[:len(l.newest)-1], []byte(","), b[1:])
	}
	rev, err := l.docs.Put(ctx, collection, store.Doc{Key: at.key(), Value: b, Rev: at.rev})
	if err != nil {
		return err
	}
	l.newest, l.newestFirst, l.newestRev = b, at.first, rev
	l.mu.Lock()
	defer l.mu.Unlock()
	now := page{at.first, at.n + len(batch), rev}
	if at.rev != 0 {
		l.pages[len(l.pages)-1] = now
	} else {
		l.pages = append(l.pages, now)
	}
	l.last = last + uint64(len(batch))
	return nil
}

// trim removes the oldest pages while more than keep entries would be left without them.
func (l *Log) trim(ctx context.Context) {
	for {
		l.mu.Lock()
		total := 0
		for _, p := range l.pages {
			total += p.n
		}
		var oldest page
		if len(l.pages) > 1 && total-l.pages[0].n >= l.keep {
			oldest = l.pages[0]
		}
		l.mu.Unlock()
		if oldest.n == 0 {
			return
		}
		if err := l.docs.Delete(ctx, collection, oldest.key(), oldest.rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			l.log.Warn("old entries of the audit log stay for now", "error", err) // the next entry tries again
			return
		}
		l.mu.Lock()
		l.pages = slices.Delete(l.pages, 0, 1)
		l.mu.Unlock()
	}
}

// List returns entries with numbers below before (0: all), newest first, at most limit.
func (l *Log) List(ctx context.Context, before uint64, limit int) ([]hub.AuditEntry, error) {
	l.mu.Lock()
	pages := slices.Clone(l.pages)
	l.mu.Unlock()
	out := []hub.AuditEntry{}
	for _, p := range slices.Backward(pages) {
		if before != 0 && p.first >= before {
			continue
		}
		if len(out) == limit {
			break
		}
		doc, err := l.docs.Get(ctx, collection, p.key())
		if err != nil {
			return nil, fmt.Errorf("read the audit log: %w", err)
		}
		entries, err := decode(doc) // none if it was trimmed meanwhile
		if err != nil {
			return nil, errors.Join(err, ctx.Err())
		}
		slices.SortFunc(entries, func(a, b hub.AuditEntry) int { return cmp.Compare(b.Number, a.Number) })
		for _, e := range entries {
			if (before == 0 || e.Number < before) && len(out) < limit {
				out = append(out, e)
			}
		}
	}
	return out, nil
}
