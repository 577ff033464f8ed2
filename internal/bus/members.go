package bus

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

const (
	// beat is how often a part says that it lives, and lost after how long without a word it is taken for gone.
	beat, lost = time.Second, 5 * time.Second
	// Patience is how long a part has heard itself without a gap before it says of others that they are silent.
	Patience = 10 * time.Second
	// answerIn is how soon a part says to one that has just come that it lives: once, if several come together. Who has heard itself for
	// acquaint has heard of all who live.
	answerIn, acquaint = 20 * time.Millisecond, 300 * time.Millisecond
	// maxMembers bounds who is remembered; more instances than this are not told apart from noise.
	maxMembers = 4096
)

// alive is what a part tells of itself, to alive.<part>.<instance>.
const alive = Note[Member]("alive")

// Member is an instance of a part, as it tells of itself. Fields may be added, never renamed.
type Member struct {
	Part     string    // a target's name
	Instance string    // random, of this run of it
	Name     string    // of the process, for people
	Build    string    // the program's version
	Started  time.Time //
	Leaving  bool      // it takes nothing on any more
	Load     Load
}

// Load is what a part is at; what a part has none of is zero.
type Load struct {
	Partitions int    // that it serves
	Wrote      []byte // a bit for each partition in which it stored something in the last few seconds, whoever serves it
	Sessions   int    // of devices
	Behind     int    // events that are stored and not yet where readers find them
	Position   uint64 // of the feed, up to which it has read
}

// Members is who lives, as it is heard on the bus. Make it with Bus.Members, and run it.
type Members struct {
	bus  *Bus
	self Member
	load func() Load
	log  *slog.Logger

	mu        sync.Mutex // guards all below
	seen      map[memberKey]heard
	own       time.Time     // when it last heard itself
	since     time.Time     // since when it has heard itself without a gap
	moved     chan struct{} // closed when somebody came, left or went silent
	left      bool
	strangers map[string]struct{} // the programs' versions of those that this one cannot read
	answering bool                // it is about to say that it lives
}

// memberKey tells members apart: a process may have several parts, under the same name.
type memberKey struct{ part, instance string }

type heard struct {
	Member
	at time.Time
}

// Members is the membership of an instance of a part; load says what it is at, nil says nothing.
func (b *Bus) Members(self Member, load func() Load, log *slog.Logger) *Members {
	self.Build, self.Started = b.build, time.Now().UTC()
	if load == nil {
		load = func() Load { return Load{} }
	}
	return &Members{bus: b, self: self, load: load, log: log, seen: map[memberKey]heard{}, moved: make(chan struct{}), strangers: map[string]struct{}{}}
}

// who asks those who cannot read it to say that they live, which they do at once.
const who = Note[Member]("who")

// meeting is for how long Meet waits for them.
const meeting = 300 * time.Millisecond

// Meet returns an error that names both versions if parts live that this one cannot talk to: the two would take each other's questions,
// and answer them with nothing but that. It is asked before anything is served.
func (m *Members) Meet(ctx context.Context) error {
	met := make(chan error, 1)
	stop, err := alive.listen(m.bus, "alive.>", func(Member) {}, func(n note) {
		select {
		case met <- strangersAt(m.bus.build, n):
		default:
		}
	})
	if err != nil {
		return err
	}
	defer stop()
	if m.bus.conn.IsConnected() {
		if err := m.bus.conn.FlushTimeout(patience); err != nil {
			m.log.Warn("the bus does not answer", "error", err)
		}
	}
	if err := who.Send(m.bus, m.subject(), m.self); err != nil {
		return nil // nobody can be met; while the bus is away nobody can be disturbed either
	}
	t := time.NewTimer(meeting)
	defer t.Stop()
	select {
	case err := <-met:
		return err
	case <-t.C:
	case <-ctx.Done():
	}
	return nil
}

func (m *Members) subject() string { return "alive." + m.self.Part + "." + m.self.Instance }

func strangersAt(build string, n note) error {
	return hub.NewError(hub.Precondition, "part-version", fmt.Sprintf(
		"parts of the hub run that this one cannot talk to: this is coaphub %s, which speaks version %d, and they are coaphub %s, which speak version %d; stop them first",
		build, version, n.Build, n.Version)).With("bus", nil)
}

// stranger takes note of one whose version this one cannot read: it says so once, and that it lives itself, so that a newcomer finds out.
func (m *Members) stranger(n note) {
	m.mu.Lock()
	_, known := m.strangers[n.Build]
	if known = known || len(m.strangers) >= maxStrangers; !known {
		m.strangers[n.Build] = struct{}{}
	}
	if n.Name == string(who) {
		m.answer()
	}
	m.mu.Unlock()
	if !known {
		m.log.Error("a part of another version lives, and cannot be talked to", "error", strangers(m.bus.build, n.Build, n.Version))
	}
}

// answer has it say soon that it lives. m.mu is held.
func (m *Members) answer() {
	if m.answering {
		return
	}
	m.answering = true
	time.AfterFunc(answerIn, func() {
		m.mu.Lock()
		m.answering = false
		m.mu.Unlock()
		m.say()
	})
}

// maxStrangers bounds the versions that are remembered.
const maxStrangers = 64

// Run says that the instance lives, and listens to the others, until ctx ends; then it says that it is gone.
func (m *Members) Run(ctx context.Context, ready func()) error {
	stop, err := alive.listen(m.bus, "alive.>", func(o Member) {
		if m.heard(o, time.Now()) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.answer()
		}
	}, m.stranger)
	if err != nil {
		return err
	}
	defer stop()
	ready()
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for {
		m.say()
		select {
		case now := <-tick.C:
			m.sweep(now)
		case <-ctx.Done():
			m.Leave()
			return nil
		}
	}
}

// Leave says that the instance takes nothing on any more. It may be said before Run ends, so that others take over meanwhile.
func (m *Members) Leave() {
	m.mu.Lock()
	m.left = true
	m.mu.Unlock()
	m.say()
}

func (m *Members) say() {
	m.mu.Lock()
	self := m.self
	self.Leaving = m.left
	m.mu.Unlock()
	self.Load = m.load()
	if err := alive.Send(m.bus, m.subject(), self); err != nil {
		m.log.Debug("nobody is told that this part lives", "error", err)
	}
}

// heard takes what a member said at now. came: it may not have heard of this one.
func (m *Members) heard(o Member, now time.Time) (came bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if o.Instance == m.self.Instance && o.Part == m.self.Part {
		if now.Sub(m.own) > lost {
			m.since = now
			time.AfterFunc(acquaint, func() {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.move()
			})
		}
		m.own = now
	}
	key := memberKey{o.Part, o.Instance}
	old, known := m.seen[key]
	if !known && len(m.seen) >= maxMembers {
		return false
	}
	m.seen[key] = heard{o, now}
	if !known || old.Leaving != o.Leaving || now.Sub(old.at) > lost {
		m.move()
		return key != (memberKey{m.self.Part, m.self.Instance})
	}
	return false
}

// sweep tells of those that went silent, and forgets them after an hour.
func (m *Members) sweep(now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, h := range m.seen {
		switch quiet := now.Sub(h.at); {
		case quiet > time.Hour:
			delete(m.seen, key)
		case quiet > lost && quiet <= lost+2*beat, quiet > Patience && quiet <= Patience+2*beat:
			m.move()
		}
	}
	if sure := now.Sub(m.since); sure > Patience && sure <= Patience+2*beat {
		m.move()
	}
}

// move wakes those who wait for a change. m.mu is held.
func (m *Members) move() {
	close(m.moved)
	m.moved = make(chan struct{})
}

// Moved is closed when somebody came, left or went silent since it was asked for.
func (m *Members) Moved() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.moved
}

// Since is since when the instance has heard itself without a gap: when it changes, others may have taken it for gone meanwhile.
func (m *Members) Since() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.since
}

// All is who was heard of in the last hour, and when, by part and instance.
func (m *Members) All() (all []Member, at []time.Time) {
	m.mu.Lock()
	hs := slices.Collect(maps.Values(m.seen))
	m.mu.Unlock()
	slices.SortFunc(hs, func(a, b heard) int { return cmp.Or(cmp.Compare(a.Part, b.Part), cmp.Compare(a.Instance, b.Instance)) })
	for _, h := range hs {
		all, at = append(all, h.Member), append(at, h.at)
	}
	return all, at
}

// Living is the instances of a part that take work on, in order.
func (m *Members) Living(part string) []string { return m.living(part, time.Now()) }

func (m *Members) living(part string, now time.Time) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []string
	for key, h := range m.seen {
		if key.part == part && !h.Leaving && now.Sub(h.at) <= lost {
			ids = append(ids, key.instance)
		}
	}
	slices.Sort(ids)
	return ids
}

// Silent reports that nothing was heard of an instance of a part for as long as makes one sure, or that it said that it was leaving
// and then nothing any more, while this one would have heard it: it has heard itself all the time.
func (m *Members) Silent(part, instance string) bool { return m.silent(part, instance, time.Now()) }

func (m *Members) silent(part, instance string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.sure(now) {
		return false
	}
	h, known := m.seen[memberKey{part, instance}]
	switch {
	case !known:
		return true
	case h.Leaving:
		return now.Sub(h.at) > lost
	}
	return now.Sub(h.at) > Patience
}

// Acquainted reports whether the instance has heard itself for long enough to have heard of all who live.
func (m *Members) Acquainted() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	return now.Sub(m.own) <= lost && now.Sub(m.since) >= acquaint
}

// Sure reports whether the instance has heard itself for long enough to say who is silent.
func (m *Members) Sure() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.sure(time.Now())
}

// sure is Sure. m.mu is held.
func (m *Members) sure(now time.Time) bool {
	return now.Sub(m.own) <= 2*beat && now.Sub(m.since) > Patience
}

// Home is which of the instances a partition belongs to, "" without any: the one with the highest score for it (rendezvous hashing), so
// that one more or less moves its own share only, and all who know the same instances agree.
func Home(partition int, instances []string) string {
	var best string
	var most uint64
	for _, id := range instances {
		h := fnv.New64a()
		_, _ = h.Write([]byte{byte(partition), byte(partition >> 8)})
		_, _ = h.Write([]byte(id))
		// FNV's last bytes hardly reach the upper bits; the finalizer of MurmurHash3 spreads them.
		score := h.Sum64()
		score = (score ^ score>>33) * 0xff51afd7ed558ccd
		score = (score ^ score>>33) * 0xc4ceb9fe1a85ec53
		score ^= score >> 33
		if best == "" || score > most || score == most && id < best {
			best, most = id, score
		}
	}
	return best
}
