// Package audit keeps a durable, bounded log of calls that changed something: who made which, when, and how it ended.
//
// It must not know doors or services: they hand it hub's words.
package audit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// collection is a ring of pages: that of a number is in the slot number % slots, in place of the one a round before. A page has
	// perPage entries before the next one begins, so the number of an entry says where it is.
	//
	// A page is written by compare-and-swap, a new one from that of the round before. So of two processes that would give the same
	// number one is refused, also one that was paused for however long, and reads on to where the log is now.
	collection = "audit-pages"
	// former is where entries were before there was a ring: pages of various lengths by the number of their first entry.
	former = "audit"
	// Keep is how many entries are kept, by all processes together; then the oldest go, a page at a time.
	Keep = 100_000
	// perPage is how many entries share a document: few enough that rewriting it for one more costs little.
	perPage = 64
	// maxWaiting bounds the entries that wait to be written; more callers wait outside.
	maxWaiting = 256
	// maxText bounds each text of an entry, in bytes.
	maxText = 512
	// maxWait is how long Record waits, and for how long it is tried to write what others are faster with.
	maxWait = 10 * time.Second
	// maxPause bounds the time to the next try after two others were faster.
	maxPause = 10 * time.Millisecond
)

// Log is the audit log. All methods are safe for concurrent use, and several processes may write one log.
type Log struct {
	docs    store.Documents
	slots   uint64
	metrics *metrics
	in      chan *waiting // full: see Record
	stopped chan struct{} // closed when Run has ended

	mu   sync.Mutex // guards head
	head page       // the newest page, as far as is known: with it a page is neither read nor decoded again for each entry
}

// page is a page as it is stored, or the place for the next one.
type page struct {
	number uint64 // of the page
	last   uint64 // the number of its last entry, or of that before if it has none
	value  []byte // nil if it has none
	rev    uint64 // of the document in its slot: this page's, or that of the round before
}

// room is how many entries it takes yet.
func (p page) room() int { return int((p.number+1)*perPage - p.last) } //nolint:gosec // at most perPage

type waiting struct {
	entry hub.AuditEntry
	done  chan error // one place, so that the writer never waits
}

// Open finds how far the log goes. Entries are taken once Run runs.
func Open(ctx context.Context, docs store.Documents, log *slog.Logger, reg prometheus.Registerer) (*Log, error) {
	return open(ctx, docs, log, reg, Keep)
}

func open(ctx context.Context, docs store.Documents, log *slog.Logger, reg prometheus.Registerer, keep int) (*Log, error) {
	l := &Log{
		docs: docs, slots: uint64((keep+perPage-1)/perPage + 1), metrics: newMetrics(reg), //nolint:gosec // keep is above 0
		in: make(chan *waiting, maxWaiting), stopped: make(chan struct{}),
	}
	if err := l.move(ctx, log); err != nil {
		return nil, fmt.Errorf("move the audit log: %w", err)
	}
	head, err := l.search(ctx)
	if err == nil {
		head, err = l.forward(ctx, head)
	}
	if err != nil {
		return nil, fmt.Errorf("read the audit log: %w", err)
	}
	l.head = head
	return l, nil
}

// move moves entries of before there was a ring into it. It may be repeated after it came halfway, since nothing else is written then.
func (l *Log) move(ctx context.Context, log *slog.Logger) error {
	var old []store.Doc
	pages := map[uint64][]hub.AuditEntry{}
	var numbers []uint64
	for doc, err := range l.docs.Range(ctx, former, "", "") {
		if err != nil {
			return err
		}
		entries, err := decode(doc)
		if err != nil {
			return err
		}
		old = append(old, store.Doc{Key: doc.Key, Rev: doc.Rev})
		for _, e := range entries {
			p := pageOf(e.Number)
			if pages[p] == nil {
				numbers = append(numbers, p)
			}
			pages[p] = append(pages[p], e)
		}
	}
	if len(old) == 0 {
		return nil
	}
	log.InfoContext(ctx, "the entries of the audit log move to where several processes can write them", "pages", len(numbers))
	for _, p := range numbers[max(0, len(numbers)-int(l.slots)):] { //nolint:gosec // it was an int
		value, err := json.Marshal(pages[p])
		if err != nil {
			return &hub.Error{Kind: hub.Internal, Op: "audit.move", Err: err}
		}
		_, err = l.docs.Put(ctx, collection, store.Doc{Key: l.slot(p), Value: value})
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	for _, doc := range old {
		if err := l.docs.Delete(ctx, former, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return nil
}

func pageOf(number uint64) uint64 { return (number - 1) / perPage }

func (l *Log) slot(page uint64) string { return fmt.Sprintf("%06d", page%l.slots) }

// read reads what is in the slot of a page: entries of it, or of one a round or more before or behind; none if there never was one.
func (l *Log) read(ctx context.Context, number uint64) (p page, entries []hub.AuditEntry, err error) {
	doc, err := l.docs.Get(ctx, collection, l.slot(number))
	if err != nil {
		return p, nil, err
	}
	entries, err = decode(doc)
	if err != nil || len(entries) == 0 {
		return page{number: number, last: number * perPage, rev: doc.Rev}, nil, err
	}
	last := entries[len(entries)-1].Number
	return page{pageOf(last), last, doc.Value, doc.Rev}, entries, nil
}

// search finds a page that is the newest at this moment, or was.
func (l *Log) search(ctx context.Context) (page, error) {
	first, entries, err := l.read(ctx, 0)
	if err != nil {
		return page{}, err
	}
	if len(entries) == 0 { // the log is empty, or was moved here and has not gone round
		newest := first
		for doc, err := range l.docs.Range(ctx, collection, "", "") {
			if err != nil {
				return page{}, err
			}
			entries, err := decode(doc)
			if err != nil {
				return page{}, err
			}
			if n := len(entries); n > 0 && entries[n-1].Number > newest.last {
				newest = page{pageOf(entries[n-1].Number), entries[n-1].Number, doc.Value, doc.Rev}
			}
		}
		return newest, nil
	}
	// The pages of this round are in the first slots, those of the one before in the rest.
	newest := first
	low, high := uint64(1), l.slots
	for low < high {
		middle := low + (high-low)/2
		p, entries, err := l.read(ctx, middle)
		if err != nil {
			return page{}, err
		}
		if len(entries) > 0 && p.number >= first.number+middle {
			newest, low = p, middle+1
		} else {
			high = middle
		}
	}
	return newest, nil
}

// forward reads on from a page to the newest one that has room for another entry.
func (l *Log) forward(ctx context.Context, from page) (page, error) {
	for number := from.number; ; {
		p, entries, err := l.read(ctx, number)
		switch {
		case err != nil:
			return page{}, err
		case len(entries) == 0 || p.number < number: // nobody has begun it
			return page{number: number, last: number * perPage, rev: p.rev}, nil
		case p.number > number: // others have gone round
			if p, err = l.search(ctx); err != nil {
				return page{}, err
			}
			number = p.number
		case p.room() > 0:
			return p, nil
		default:
			number++
		}
	}
}

// known is the newest page that is known.
func (l *Log) known() page {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// found notes a newer page than is known.
func (l *Log) found(p page) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.number > l.head.number || p.number == l.head.number && p.last >= l.head.last {
		l.head = p
	}
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
	room := l.known().room()
	if room == 0 {
		room = perPage
	}
	for more := true; more && len(batch) < room; {
		select {
		case w := <-l.in:
			batch = append(batch, w)
		default:
			more = false
		}
	}
	// Not the callers' contexts: one of them ends for all otherwise. The store's own end ends the write.
	ctx := context.Background()
	for len(batch) > 0 {
		n, err := l.append(ctx, batch)
		outcome := "ok"
		if err != nil {
			n, err, outcome = len(batch), fmt.Errorf("write the audit log: %w", err), "failed"
		}
		l.metrics.entries.WithLabelValues(outcome).Add(float64(n))
		for _, w := range batch[:n] {
			w.done <- err
		}
		batch = batch[n:]
	}
}

// append stores the first n of the batch, as many as the newest page takes.
func (l *Log) append(ctx context.Context, batch []*waiting) (n int, err error) {
	start := time.Now()
	for try := 0; ; try++ {
		p := l.known()
		if try > 0 || p.room() == 0 {
			if p, err = l.forward(ctx, p); err != nil {
				return 0, err
			}
			l.found(p)
		}
		n, err := l.tryAppend(ctx, p, batch)
		if !hub.IsKind(err, hub.Conflict) || time.Since(start) > maxWait {
			return n, err
		}
		if try > 0 { // others write at the same time: not all of them again at once
			time.Sleep(rand.N(maxPause))
		}
	}
}

func (l *Log) tryAppend(ctx context.Context, p page, batch []*waiting) (int, error) {
	batch = batch[:min(len(batch), p.room())]
	entries := make([]hub.AuditEntry, len(batch))
	for i, w := range batch {
		entries[i] = w.entry
		entries[i].Number = p.last + 1 + uint64(i)
	}
	b, err := json.Marshal(entries)
	if err != nil {
		return 0, &hub.Error{Kind: hub.Internal, Op: "audit.append", Err: err}
	}
	if len(p.value) > 0 {
		// Two arrays become one: the brackets between them a comma.
		b = slices.Concat(p.value[:len(p.value)-1], []byte(","), b[1:])
	}
	rev, err := l.docs.Put(ctx, collection, store.Doc{Key: l.slot(p.number), Value: b, Rev: p.rev})
	if err != nil {
		return 0, err
	}
	l.found(page{p.number, p.last + uint64(len(batch)), b, rev})
	return len(batch), nil
}

// List returns entries with numbers below before (0: all), newest first, at most limit, also those that other processes wrote.
func (l *Log) List(ctx context.Context, before uint64, limit int) ([]hub.AuditEntry, error) {
	const op = "read the audit log: %w"
	newest, err := l.forward(ctx, l.known())
	if err != nil {
		return nil, fmt.Errorf(op, err)
	}
	l.found(newest)
	out := []hub.AuditEntry{}
	below := newest.last + 1
	if before != 0 {
		below = min(below, before)
	}
	for below > 1 && len(out) < limit {
		number := pageOf(below - 1)
		p, entries, err := l.read(ctx, number)
		if err != nil {
			return nil, errors.Join(fmt.Errorf(op, err), ctx.Err())
		}
		if len(entries) == 0 || p.number != number { // it made room
			break
		}
		for _, e := range slices.Backward(entries) {
			if e.Number < below && len(out) < limit {
				out = append(out, e)
			}
		}
		below = number*perPage + 1
	}
	return out, nil
}
