package jetfeed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/coaphub/coaphub/hub"
)

// The stream's identity is in its metadata: a random ID, and the number before which there is nothing of it. The numbers of one
// that is made later are all higher: it starts at the microseconds since 1970, which no stream adds messages faster than. So a
// place in a stream that was lost is below what the new one starts with, and everybody who stands there lags, whatever the new
// one gets.
const (
	metaID    = "coaphub-feed"
	metaStart = "coaphub-start"
)

// stream is what the servers said of the stream at some moment.
type stream struct {
	id          string
	start       uint64
	first, last uint64 // of its messages; first is last+1 when there are none
	config      jetstream.StreamConfig
}

// configuration is the stream's as it is made.
func (f *Feed) configuration(start uint64) jetstream.StreamConfig {
	c := jetstream.StreamConfig{
		Name: f.name, Description: "the feed of a coaphub: all commits of all devices", Subjects: []string{f.subjects + "*"},
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage,
		MaxConsumers: -1, MaxMsgs: -1, MaxMsgsPerSubject: -1, MaxMsgSize: -1, FirstSeq: start,
		Metadata: map[string]string{metaID: rand.Text(), metaStart: strconv.FormatUint(start, 10)},
	}
	f.adjust(&c)
	return c
}

// adjust sets what a stream that is there can be brought to.
func (f *Feed) adjust(c *jetstream.StreamConfig) {
	c.Replicas, c.MaxAge, c.Duplicates = f.cfg.Replicas, f.cfg.MaxAge, f.cfg.DuplicateWindow
	c.MaxBytes = int64(f.cfg.MaxBytes)
	if c.MaxBytes == 0 {
		c.MaxBytes = -1
	}
	c.AllowDirect = true
}

// adjusted reports whether adjust would change nothing.
func (f *Feed) adjusted(c jetstream.StreamConfig) bool {
	to := c
	f.adjust(&to)
	return to.Replicas == c.Replicas && to.MaxAge == c.MaxAge && to.Duplicates == c.Duplicates && to.MaxBytes == c.MaxBytes && c.AllowDirect
}

// unfit says what of a stream cannot be brought to what the feed needs; empty if all can.
func (f *Feed) unfit(st stream) string {
	c := st.config
	var out []string
	for what, is := range map[string]bool{
		"it was not made by a hub":                st.id == "" || st.start == 0,
		"it has other subjects":                   !slices.Equal(c.Subjects, []string{f.subjects + "*"}),
		"it does not keep what was read":          c.Retention != jetstream.LimitsPolicy,
		"it is not kept in files":                 c.Storage != jetstream.FileStorage,
		"it drops what is new when it is full":    c.Discard != jetstream.DiscardOld,
		"it bounds the number or size of commits": c.MaxMsgs > 0 || c.MaxMsgsPerSubject > 0 || c.MaxMsgSize > 0,
		"it is sealed, or does not acknowledge":   c.Sealed || c.NoAck,
		"it cannot be trimmed":                    c.DenyPurge,
		"it is fed by other streams":              c.Mirror != nil || len(c.Sources) > 0 || c.SubjectTransform != nil,
	} {
		if is {
			out = append(out, what)
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// unfitError says why a stream cannot be used.
type unfitError struct{ name, what string }

func (e unfitError) Error() string {
	return "the stream " + e.name + " is not one that a hub can use (" + e.what + "): delete it, the hub makes it anew"
}

// ask asks the servers for the stream.
func (f *Feed) ask(ctx context.Context) (stream, error) {
	s, err := f.js.Stream(ctx, f.name)
	if err != nil {
		return stream{}, err
	}
	return streamOf(s.CachedInfo()), nil
}

func streamOf(info *jetstream.StreamInfo) stream {
	start, _ := strconv.ParseUint(info.Config.Metadata[metaStart], 10, 64) // 0: unfit
	return stream{
		id: info.Config.Metadata[metaID], start: start, config: info.Config,
		first: max(info.State.FirstSeq, 1), last: info.State.LastSeq,
	}
}

// newStart is where a stream starts that is made, or set forward, now.
func (f *Feed) newStart() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return max(uint64(time.Now().UnixMicro()), f.seen+1)
}

// look finds out what the stream is now, makes it if it is not there, and sets it forward if it was set back: then it has lost
// what somebody has read, and its next commits would get numbers that were given before.
func (f *Feed) look(ctx context.Context) (stream, error) {
	f.mu.Lock()
	before := view{f.id, f.seen, f.suspect}
	f.mu.Unlock()
	st, err := f.ask(ctx)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		st, err = f.create(ctx)
	}
	if err != nil {
		return st, err
	}
	if what := f.unfit(st); what != "" {
		return st, unfitError{f.name, what}
	}
	if before.contradicts(st) {
		if st, err = f.renew(ctx, before); err != nil {
			return st, err
		}
	}
	if st.last+1 < st.start { // whoever set it forward did not finish
		if err := f.purge(ctx, st.start); err != nil {
			return st, err
		}
		st.first, st.last = st.start, st.start-1
	}
	return st, f.adopt(st)
}

func (f *Feed) create(ctx context.Context) (stream, error) {
	// A second, within what one question may take.
	for try := 0; ; try++ {
		s, err := f.js.CreateStream(ctx, f.configuration(f.newStart()))
		if err == nil {
			f.log.Info("the feed's stream was made", "stream", f.name)
			return streamOf(s.CachedInfo()), nil
		}
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another process was faster
			return f.ask(ctx)
		}
		// While another process makes the stream, the servers have set the room for it aside, and may have none left for the same again.
		var refused *jetstream.APIError
		if !errors.As(err, &refused) || refused.ErrorCode != noRoom || try == makeTries {
			return stream{}, err
		}
		if st, there := f.ask(ctx); there == nil {
			return st, nil
		}
		select {
		case <-time.After(time.Second / makeTries):
		case <-ctx.Done():
			return stream{}, err
		}
	}
}

// makeTries is how often the stream is tried to be made while there is no room for it and nobody else has made it, and noRoom is the
// servers' word for that (JSStorageResourcesExceededErr).
const (
	makeTries = 4
	noRoom    = 10047
)

// view is what this process held for known before it asked.
type view struct {
	id      string
	seen    uint64
	suspect bool
}

// contradicts reports whether a stream gives numbers that were given before.
func (v view) contradicts(st stream) bool { return st.last < v.seen || v.suspect && st.id == v.id }

// renew gives a stream that was set back another identity, with numbers that were never given. What is in it is dropped: its
// readers lag and begin with the current state, which has all of it.
func (f *Feed) renew(ctx context.Context, before view) (stream, error) {
	select {
	case f.renewing <- struct{}{}: // by one call of this process at a time
		defer func() { <-f.renewing }()
	case <-ctx.Done():
		return stream{}, ctx.Err()
	}
	var st stream
	for n := 0; ; n++ {
		var err error
		if st, err = f.ask(ctx); err != nil {
			return st, err
		}
		if !before.contradicts(st) {
			return st, nil // somebody else has renewed it, or it has caught up
		}
		// A server that leads the stream since just now may not know yet what the one before it had said.
		if before.suspect && st.id == before.id || n >= f.times.confirm {
			break
		}
		if err := wait(ctx, f.times.attempt/16); err != nil {
			return st, err
		}
	}
	start := max(f.newStart(), st.last+2) // so that it is seen to need emptying, whoever looks
	c := st.config
	c.Metadata = maps.Clone(c.Metadata)
	c.Metadata[metaID], c.Metadata[metaStart] = rand.Text(), strconv.FormatUint(start, 10)
	s, err := f.js.UpdateStream(ctx, c)
	if err != nil {
		return st, err
	}
	f.log.Error("the feed's stream was set back: it is emptied, and subscribers start again from the current state", "stream", f.name, "had", before.seen, "has", st.last)
	return streamOf(s.CachedInfo()), nil
}

// purge drops all messages below a number; with one behind the last the next message gets it.
func (f *Feed) purge(ctx context.Context, below uint64) error {
	s, err := f.js.Stream(ctx, f.name)
	if err != nil {
		return err
	}
	return s.Purge(ctx, jetstream.WithPurgeSequence(below))
}

var errMoving = errors.New("the feed's stream was made anew meanwhile")

// adopt takes what the servers said for what is. It fails when something newer is known already.
func (f *Feed) adopt(st stream) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if st.id == f.id {
		f.kept, f.seen = max(f.kept, st.first), max(f.seen, st.last)
		return nil
	}
	if st.last < f.seen {
		return errMoving
	}
	if f.id != "" {
		f.renewed = true
		f.metrics.renewed.Inc()
		f.log.Warn("the feed's stream is another one: subscribers start again from the current state", "stream", f.name)
	}
	f.id, f.start, f.kept, f.seen, f.suspect = st.id, st.start, st.first, st.last, false
	f.clear(st.last)
	return nil
}

// Head returns the position of the newest commit.
func (f *Feed) Head(ctx context.Context) (hub.Position, error) {
	ctx, leave, err := f.enter(ctx, "Head")
	if err != nil {
		return hub.Position{}, err
	}
	defer leave()
	st, err := again(ctx, f, "Head", f.look)
	if err != nil {
		return hub.Position{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if st.last < f.start && !f.renewed {
		return hub.Position{}, nil
	}
	return f.position(max(st.last, f.start-1)), nil
}

// Known is how far the stream is known to have come.
func (f *Feed) Known() hub.Position {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.position(f.seen)
}

// Remember tells how far the stream had come when a process of the hub lived that knew; store.PublishedFeed has the contract. Streams that
// were made later begin behind that.
func (f *Feed) Remember(ctx context.Context, known hub.Position) error {
	ctx, leave, err := f.enter(ctx, "Remember")
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	f.seen = max(f.seen, known.N)
	f.mu.Unlock()
	_, err = again(ctx, f, "Remember", f.look)
	return err
}

// position makes a position of a number. Its day is the one on which the stream was made, for all its commits: the times of
// messages are those of whichever server leads, which may go back when another does, and a place must compare with another in
// every process as the numbers do. mu is held.
func (f *Feed) position(n uint64) hub.Position {
	return hub.Position{Day: uint32(f.start / uint64(24*time.Hour/time.Microsecond)), N: n}
}

// TrimFeed removes the commits that the servers took before the given day (UTC).
func (f *Feed) TrimFeed(ctx context.Context, beforeDay uint32) error {
	ctx, leave, err := f.enter(ctx, "TrimFeed")
	if err != nil {
		return err
	}
	defer leave()
	edge := time.Unix(int64(beforeDay)*24*60*60, 0)
	_, err = again(ctx, f, "TrimFeed", func(ctx context.Context) (struct{}, error) { return struct{}{}, f.trim(ctx, edge) })
	return err
}

func (f *Feed) trim(ctx context.Context, edge time.Time) error {
	st, err := f.look(ctx)
	if err != nil || st.last < st.first {
		return err
	}
	s, err := f.js.Stream(ctx, f.name)
	if err != nil {
		return err
	}
	// The lowest number from which on messages are of the edge or later.
	low, high := st.first, st.last+1
	for low < high {
		mid := low + (high-low)/2
		m, err := s.GetMsg(ctx, mid, jetstream.WithGetMsgSubject(f.subjects+"*")) // it, or the next one that is there
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			high = mid
		case err != nil:
			return fmt.Errorf("find the edge of the feed: %w", err)
		case m.Time.Before(edge):
			low = m.Sequence + 1
		default:
			high = mid
		}
	}
	if low <= st.first {
		return nil
	}
	if err := s.Purge(ctx, jetstream.WithPurgeSequence(low)); err != nil {
		return err
	}
	_, err = f.look(ctx)
	return err
}
