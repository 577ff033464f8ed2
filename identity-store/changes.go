package identitystore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collChanges is the last slots records of what changed; the record of a number is in the slot number % slots.
const collChanges = "identities-changes"

const (
	// slots is how many records are kept. Who is further behind reads everything anew.
	slots = 2048
	// maxChanges bounds the changes of one record.
	maxChanges = 64
	// maxWaiting bounds the records' worth of changes that wait to be written; beyond, who decides is refused, and tried again.
	maxWaiting = 256
	// maxNews is about how many changes a client is told of at once.
	maxNews = 4096
	// readEvery is how often the next record is looked for by a Store that nobody wakes, and readTime for how long at most.
	readEvery, readTime = 250 * time.Millisecond, 3 * time.Second
	// announceTime bounds the writing of a record.
	announceTime = 10 * time.Second
)

// changes is how Stores on the same documents, and their clients, keep in memory what the documents say. A record of what changed
// has a number, one more than the last, and says where to look, not what is there: whoever reads it looks into the documents.
//
// It is written after the document, so whoever reads it finds what it is about; and before whoever asked for the change has an
// answer. A process that dies between the two loses nothing, because the document itself says that a record is due until one was
// written: a claim is claimed, and a release releasing, until that is so; other decisions are Unannounced. All of these have the key
// "pending", by which finishAll finds them and does what is left. The other order would need more: a record that comes first tells
// others to look at what is not there yet, and when they may stop to do so nobody could say of a writer that is paused.
//
// Two records never have one number: the slot is taken by compare-and-swap from the record of the round before, so a writer that was
// paused, for however long, is refused if its number was taken meanwhile. And none is left out, since a writer has read the one before.
type changes struct {
	docs   store.Documents
	follow func(context.Context, []change) error // has it in memory what the documents say now
	reload func(context.Context) error           // the same of everything
	heard  func(time.Time)                       // is told up to when all was read
	log    *slog.Logger
	wake   chan struct{} // has one when there may be something to read
	told   func()        // wakes the others
	listen func(func()) (stop func(), err error)

	turn chan struct{} // has one while somebody reads or writes, who alone changes read
	read time.Time     // when the last reading began that came to the end

	mu      sync.Mutex // guards all below
	at      uint64     // the number of the last record that was followed
	recent  [slots]numbered
	waiting []*batch
}

// change is where to look.
type change struct {
	Device hub.DeviceID `json:"device,omitempty"` // how it stands
	Owner  hub.Owner    `json:"owner,omitempty"`  // which devices are its own
	Denial string       `json:"denial,omitempty"` // the entry of the deny list, by denialKey
	Key    hub.DeviceID `json:"key,omitempty"`    // which of its sessions came with a pre-shared key that is its own no more
}

// numbered is a record.
type numbered struct {
	Number  uint64   `json:"number"`
	Changes []change `json:"changes"`
}

// batch is changes that wait to be written together.
type batch struct {
	changes map[change]struct{}
	done    chan struct{} // closed when err says what came of it
	err     error
}

func newChanges(docs store.Documents, log *slog.Logger) *changes {
	return &changes{docs: docs, log: log, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
}

func slot(number uint64) string { return fmt.Sprintf("%04d", number%slots) }

// announce has c read by all who share the documents; it returns once that is sure. Others that wait at the same time go into the
// same record.
func (c *changes) announce(ctx context.Context, ch change) error {
	own, err := c.join(ch)
	if err != nil {
		return err
	}
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-own.done:
		return own.err
	case <-ctx.Done(): // whoever comes next writes it, too; and if nobody does, the document says so
		return trouble("announce a change", ctx.Err())
	}
	// It is of others, too, who may have more time.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), announceTime)
	defer cancel()
	for {
		select {
		case <-own.done:
			return own.err
		default:
		}
		b := c.take()
		if b.err = c.write(ctx, slices.Collect(maps.Keys(b.changes))); b.err != nil {
			b.err = trouble("announce a change", b.err)
		}
		close(b.done)
	}
}

// join adds a change to those that wait.
func (c *changes) join(ch change) (*batch, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := len(c.waiting) - 1
	if last < 0 || len(c.waiting[last].changes) >= maxChanges {
		if len(c.waiting) >= maxWaiting {
			return nil, trouble("announce a change", errors.New("too many wait"))
		}
		c.waiting = append(c.waiting, &batch{changes: map[change]struct{}{}, done: make(chan struct{})})
		last++
	}
	b := c.waiting[last]
	b.changes[ch] = struct{}{}
	return b, nil
}

// take takes out those that wait longest. There are some: whoever takes has not found its own done.
func (c *changes) take() *batch {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.waiting[0]
	c.waiting = slices.Delete(c.waiting, 0, 1)
	return b
}

// write writes the next record, and follows it. The caller has the turn.
func (c *changes) write(ctx context.Context, cs []change) error {
	for range maxTries {
		began := time.Now()
		rev, err := c.forward(ctx)
		if err != nil {
			return err
		}
		rec := numbered{c.last() + 1, cs}
		value, err := json.Marshal(rec)
		if err != nil {
			return fmt.Errorf("encode a record of changes: %w", err)
		}
		_, err = c.docs.Put(ctx, collChanges, store.Doc{Key: slot(rec.Number), Value: value, Rev: rev})
		if hub.IsKind(err, hub.Conflict) {
			continue
		}
		if err != nil {
			return err
		}
		c.told()
		if err := c.follow(ctx, cs); err != nil {
			return err
		}
		c.followed(rec)
		c.ended(began)
		return nil
	}
	return errors.New("too much contention")
}

// refresh reads whatever was written before it was called. Of those who call at the same time one reads for all.
func (c *changes) refresh(ctx context.Context) error {
	came := time.Now()
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if c.read.After(came) {
		return nil
	}
	began := time.Now()
	if _, err := c.forward(ctx); err != nil {
		return err
	}
	c.ended(began)
	return nil
}

// forward reads and follows records up to the last one, and returns the revision of what is in the slot behind it. The caller has
// the turn.
func (c *changes) forward(ctx context.Context) (rev uint64, err error) {
	for {
		next := c.last() + 1
		doc, err := c.docs.Get(ctx, collChanges, slot(next))
		if err != nil {
			return 0, err
		}
		rec, err := decodeNumbered(doc)
		switch {
		case err != nil:
			return 0, err
		case rec.Number < next:
			return doc.Rev, nil
		case rec.Number > next: // a round or more was missed
			err = c.restart(ctx)
		default:
			if err = c.follow(ctx, rec.Changes); err == nil {
				c.followed(rec)
			}
		}
		if err != nil {
			return 0, err
		}
	}
}

// restart reads which record is the last, and then everything. The caller has the turn, or is the only one.
func (c *changes) restart(ctx context.Context) error {
	last := uint64(0)
	for doc, err := range c.docs.Range(ctx, collChanges, "", "") {
		var rec numbered
		if err == nil {
			rec, err = decodeNumbered(doc)
		}
		if err != nil {
			return err
		}
		last = max(last, rec.Number)
	}
	if err := c.reload(ctx); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.recent = last, [slots]numbered{}
	return nil
}

func decodeNumbered(doc store.Doc) (rec numbered, err error) {
	if doc.Rev == 0 {
		return rec, nil
	}
	if err := json.Unmarshal(doc.Value, &rec); err != nil {
		return rec, &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "a record of changes of identities is damaged", Err: err}
	}
	return rec, nil
}

func (c *changes) followed(rec numbered) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at, c.recent[rec.Number%slots] = rec.Number, rec
}

func (c *changes) ended(began time.Time) {
	c.read = began
	c.heard(began)
}

// last is the number of the last record that was followed.
func (c *changes) last() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

// since is what changed behind a record, up to that of the number at, each once. Not ok: it is not known any more.
func (c *changes) since(number uint64) (all map[change]struct{}, at uint64, more, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if number > c.at || c.at-number > slots { // or it is of other documents, which were restored since
		return nil, 0, false, false
	}
	all = map[change]struct{}{}
	for at = number; at < c.at && len(all) < maxNews; at++ {
		rec := &c.recent[(at+1)%slots]
		if rec.Number != at+1 {
			return nil, 0, false, false
		}
		for _, ch := range rec.Changes {
			all[ch] = struct{}{}
		}
	}
	return all, at, at < c.at, true
}

// run reads what others write, until ctx ends.
func (c *changes) run(ctx context.Context) {
	stop, err := c.listen(c.woken)
	if err != nil {
		c.log.WarnContext(ctx, "changes of identities are read a little later: nobody wakes us", "error", err)
	} else {
		defer stop()
	}
	tick := time.NewTicker(readEvery)
	defer tick.Stop()
	away := false
	for {
		within, cancel := context.WithTimeout(ctx, readTime)
		err := c.refresh(within)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && !away:
			c.log.WarnContext(ctx, "changes of identities cannot be read", "error", err)
		case err == nil && away:
			c.log.InfoContext(ctx, "changes of identities are read again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.wake:
		}
	}
}

// woken does not block.
func (c *changes) woken() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// share has the Store announce what changes, and read what others announce. told wakes those, and listen is how they wake this one.
func (s *Store) share(ctx context.Context, told func(), listen func(func()) (func(), error)) error {
	c := newChanges(s.docs, s.log)
	c.told, c.listen, c.heard, c.follow = told, listen, s.hear, s.follow
	c.reload = func(ctx context.Context) error {
		s.lists.dropAll()
		if err := s.keep(ctx); err != nil {
			return err
		}
		s.tellKey("")
		return nil
	}
	began := time.Now()
	if err := c.restart(ctx); err != nil {
		return fmt.Errorf("read who is not let in: %w", err)
	}
	s.changes = c
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shared, s.heard = true, began
	return nil
}

// reach reads on if a record of changes was not read yet that who asks knows of.
func (s *Store) reach(ctx context.Context, number uint64) error {
	if number <= s.changes.last() {
		return nil
	}
	if err := s.changes.refresh(ctx); err != nil {
		return trouble("read what changed", err)
	}
	return nil // if it is still not there, it is of other documents, which were restored
}

// announce says what changed to those who share the documents, if any do.
func (s *Store) announce(ctx context.Context, c change) error {
	if s.changes == nil {
		return nil
	}
	return s.changes.announce(ctx, c)
}

// EndKey tells all who let devices in that a device's pre-shared key was replaced or forgotten, after that was stored: see KeysEnded.
func (s *Store) EndKey(ctx context.Context, dev hub.DeviceID) error {
	if s.changes == nil {
		s.tellKey(dev)
		return nil
	}
	return s.announce(ctx, change{Key: dev})
}

// settle announces what was decided on a device, if its record says that this is due.
func (s *Store) settle(ctx context.Context, dev hub.DeviceID) error {
	if s.changes == nil {
		return nil
	}
	for range maxTries {
		rec, rev, err := s.get(ctx, dev)
		if err != nil || !rec.Unannounced {
			return err
		}
		if err := s.announce(ctx, change{Device: dev}); err != nil {
			return err
		}
		rec.Unannounced = false
		if _, err = s.put(ctx, dev, rec, rev); !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return trouble("announce a decision", errors.New("too much contention"))
}

// settleDenial is settle for an entry of the deny list, which goes if it was taken off the list.
func (s *Store) settleDenial(ctx context.Context, key string) error {
	if s.changes == nil {
		return nil
	}
	for range maxTries {
		doc, err := s.docs.Get(ctx, collDenied, key)
		if err != nil {
			return trouble("read a denial", err)
		}
		if doc.Rev == 0 {
			return nil
		}
		d, err := decodeDenial(doc)
		if err != nil || !d.Unannounced {
			return err
		}
		if err := s.announce(ctx, change{Denial: key}); err != nil {
			return err
		}
		if d.Gone {
			err = s.docs.Delete(ctx, collDenied, key, doc.Rev)
		} else {
			d.Unannounced = false
			err = s.writeDenial(ctx, key, d, doc.Rev)
		}
		if err == nil {
			return nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return trouble("write a denial", err)
		}
	}
	return trouble("announce a denial", errors.New("too much contention"))
}

// follow has in memory what the documents say of what changed.
func (s *Store) follow(ctx context.Context, cs []change) error {
	for _, c := range cs {
		if c.Owner != "" {
			s.lists.drop(c.Owner)
		}
		if c.Key != "" {
			s.tellKey(c.Key)
		}
		if c.Device != "" {
			err := s.look(ctx, func() (set func() bool, err error) {
				rec, _, err := s.get(ctx, c.Device)
				st := standing{Device: c.Device, Disabled: rec.Disabled != nil, Apart: rec.Quarantined != nil}
				if st.Apart {
					st.Generation = rec.Generation
				}
				return func() bool { return s.stand(st) }, err
			}, c.Device)
			if err != nil {
				return err
			}
		}
		if c.Denial != "" {
			of, value, _ := strings.Cut(c.Denial, " ")
			err := s.look(ctx, func() (set func() bool, err error) {
				doc, err := s.docs.Get(ctx, collDenied, c.Denial)
				var d denial
				if err == nil && doc.Rev != 0 {
					d, err = decodeDenial(doc)
				}
				if doc.Rev == 0 || d.Gone {
					return func() bool { delete(s.denied, c.Denial); return false }, err
				}
				return func() bool { return s.list(d.Denial) }, err
			}, concerns(hub.Denial{Of: hub.DenialOf(of), Value: value}))
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// look keeps what read has read, unless something was decided here since, and tells of it.
func (s *Store) look(ctx context.Context, read func() (set func() bool, err error), dev hub.DeviceID) error {
	for range maxTries {
		version := s.now()
		set, err := read()
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.version != version {
			s.mu.Unlock()
			continue
		}
		tell := set()
		s.mu.Unlock()
		if tell {
			s.tell(dev)
		}
		return nil
	}
	return trouble("read what was decided", ctx.Err())
}
