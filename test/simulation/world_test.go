package simulation

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	resourcedirectory "github.com/coaphub/coaphub/resource-directory"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus/bussim"
	"github.com/coaphub/coaphub/internal/store/mongostore/mongosim"
)

var owners = []hub.Owner{"alice", "bob"}

const (
	chaos = 40 * time.Second // how long things go wrong
	// quiet is how long they then go well before anything is looked at: ten seconds make a gateway silent, and what could not be looked
	// after then is tried again every five.
	quiet = 25 * time.Second
	// heardFor is how long a gateway is there before it crashes for good, so that all have heard of it.
	heardFor = 3 * time.Second
	// maxTTL is how long commands wait at most, less than quiet.
	maxTTL = 12 * time.Second
)

// broken is what is wrong with a world on purpose, to see whether it is noticed.
type broken struct {
	unfenced    bool // the database lets two commits have one seq
	forgetful   bool // and says that it has what it lost
	dropped     bool // the feed says so
	oldSessions bool // what is written in an old session is taken for the newest one's
	newNumbers  bool // an unknown outcome is settled under another message number
	repeated    bool // a subscriber tells what it was told before
	skipping    bool // and one takes what it has not seen yet for something that it has
	handedOn    bool // a command that was taken is given to the device's next session
}

// What is left to chance, apart.
const (
	ofWorld = iota
	ofNetwork
	ofFeed
	ofMisfortunes
	ofOrders
	ofReaders
	ofDevices // and on
)

// world is everything that is simulated.
type world struct {
	*chance
	seed   uint64
	broken broken
	talk   bool
	begun  time.Time
	pace   time.Duration
	net    *network
	mongo  *mongosim.Server
	bus    *bussim.Server
	feed   *feed
	all    sync.WaitGroup // of everything that ends with the seed
	undo   sync.WaitGroup // of what ends misfortunes

	slots   []*slot
	devices []*device
	heal    chan struct{} // closed when nothing goes wrong any more

	smu     sync.Mutex // guards all below
	story   []string
	faults  []string
	given   map[string][]uint64     // sessions that a command was given to
	newest  map[hub.DeviceID]string // the command that was
	orders  []*order
	subs    []*subscriber
	weather bool
}

// slot is where one process runs after the other.
type slot struct {
	part string
	base string
	mu   sync.Mutex // guards what follows
	n    int
	now  *process
	away bool // it is to be started again
}

// leave reports whether there is a process that may end now.
func (s *slot) leave() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away {
		return false
	}
	s.away = true
	return true
}

func (s *slot) start(w *world) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	s.away = false
	s.now = w.run(s.part, fmt.Sprintf("%s.%d", s.base, s.n))
}

func (s *slot) process() *process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.now
}

// order is a command that an application gave.
type order struct {
	hub.Order
	text string
	out  hub.Outcome
	err  error
	done bool
}

// subscriber follows an owner's events.
type subscriber struct {
	owner hub.Owner
	got   []hub.Commit // what it told
	seen  map[hub.DeviceID]uint64
}

func newWorld(seed uint64, b broken, talk bool) *world {
	c := newChance(seed, ofWorld)
	w := &world{
		chance: c, seed: seed, broken: b, talk: talk, begun: time.Now(), pace: c.between(300*time.Millisecond, 2*time.Second),
		net: &network{chance: newChance(seed, ofNetwork)}, mongo: mongosim.New(), feed: newFeed(newChance(seed, ofFeed)), heal: make(chan struct{}), given: map[string][]uint64{}, newest: map[hub.DeviceID]string{},
	}
	w.bus = &bussim.Server{Pick: w.net.pick, Copies: w.copies}
	w.mongo.Unfenced, w.feed.drops = b.unfenced, b.dropped
	if b.forgetful {
		w.mongo.Forget = func(name string) bool { return name == "commits" && w.one(50) }
	}
	return w
}

func (w *world) copies(subject string) int {
	w.smu.Lock()
	weather := w.weather
	w.smu.Unlock()
	switch {
	case !weather:
		return 1
	case w.net.one(8):
		return 0
	case w.net.one(8) && !strings.HasSuffix(subject, ".command"): // nobody repeats those, so neither does NATS
		return 2
	}
	return 1
}

// tell adds to the story of the seed, which is for people.
func (w *world) tell(format string, args ...any) {
	if !w.talk {
		return
	}
	w.smu.Lock()
	defer w.smu.Unlock()
	w.story = append(w.story, fmt.Sprintf("%9.4f ", time.Since(w.begun).Seconds())+strings.TrimSpace(fmt.Sprintf(format, args...)))
}

// wrong notes what must not be.
func (w *world) wrong(format string, args ...any) {
	w.tell("WRONG: "+format, args...)
	w.smu.Lock()
	defer w.smu.Unlock()
	w.faults = append(w.faults, fmt.Sprintf(format, args...))
}

func (w *world) calm() bool {
	select {
	case <-w.heal:
		return true
	default:
		return false
	}
}

func (w *world) serveMongo(c *conn) (func([]byte) error, func()) {
	var in []byte
	return func(p []byte) error {
		in = append(in, p...)
		for n := mongosim.Whole(in); n > 0; n = mongosim.Whole(in) {
			out, err := w.mongo.Answer(in[:n])
			if err != nil {
				return err
			}
			in = in[n:]
			c.reply(out)
		}
		return nil
	}, func() {}
}

func (w *world) serveNATS(c *conn) (func([]byte) error, func()) {
	client := w.bus.Connect(c.reply)
	return client.Take, client.Close
}

// gateway is one that takes connections, nil if there is none.
func (w *world) gateway(c *chance) *process {
	var up []*process
	for _, s := range w.slots {
		if p := s.process(); p != nil && s.part == resourcedirectory.GatewayPart && p.heard() {
			up = append(up, p)
		}
	}
	if len(up) == 0 {
		return nil
	}
	return up[c.pick(len(up))]
}

// delivered notes that a command has gone out to a device.
func (w *world) delivered(c hub.Command, s *session) {
	w.tell("%s: command %s goes out in session %d", s.d.id[len(s.d.id)-1:], c.ID, s.sess.Number)
	w.smu.Lock()
	defer w.smu.Unlock()
	w.given[c.ID] = append(w.given[c.ID], s.sess.Number)
	w.newest[s.d.id] = c.ID
}

// handOn is a mutation: the command that the device got last goes out in its next session, too.
func (w *world) handOn(s *session) {
	w.smu.Lock()
	defer w.smu.Unlock()
	if id := w.newest[s.d.id]; id != "" {
		w.given[id] = append(w.given[id], s.sess.Number)
	}
}

// command gives one command and waits for its end.
func (w *world) command(n int, c *chance) {
	g := w.gateway(c)
	if g == nil {
		return
	}
	d := w.devices[c.pick(len(w.devices))]
	o := &order{text: fmt.Sprintf("order%d", n)}
	o.Order = hub.Order{
		Device: d.id, Kind: hub.CommandUpdate, Href: hrefs[c.pick(len(hrefs))], Content: hub.Content{Type: "text/plain", Data: []byte(o.text)},
		TTL: c.between(time.Second, maxTTL), User: "app", Force: true,
	}
	if c.one(2) {
		o.Key = o.text
	}
	w.smu.Lock()
	w.orders = append(w.orders, o)
	w.smu.Unlock()
	owner := d.ownership().Owner
	for try := 0; try < 3; try++ {
		ctx, cancel := context.WithTimeout(context.Background(), o.TTL+3*time.Second)
		out, err := g.client.Command(ctx, owner, o.Order)
		cancel()
		if g.said() {
			w.tell("%s of %s for %s: %d %v", o.text, owner, d.id[len(d.id)-1:], out.End, err)
			if code, _ := hub.Public(err); err == nil || code == "command-expired" {
				o.out, o.err, o.done = out, err, true
				return
			}
			if !doubtful(err) || o.Key == "" {
				return
			}
		}
		if g = w.gateway(c); g == nil || o.Key == "" || w.calm() {
			return
		}
	}
}

// follow is a subscriber, who goes on from his cursor wherever he is served.
func (w *world) follow(ctx context.Context, s *subscriber) {
	cursor, c := hub.Cursor{Log: w.feed.LogID()}, newChance(w.seed, ofReaders)
	for ctx.Err() == nil {
		g := w.gateway(c)
		if g == nil {
			sleep(ctx, 200*time.Millisecond)
			continue
		}
		one, cancel := context.WithTimeout(ctx, c.between(5*time.Second, time.Minute))
		for f, err := range g.client.Feed(one, s.owner, cursor, hub.Position{}) {
			if err != nil || !g.said() {
				break
			}
			cursor = hub.Cursor{Log: w.feed.LogID(), After: f.At}
			w.told(s, *f.Commit)
		}
		cancel()
		sleep(ctx, c.between(10*time.Millisecond, time.Second))
	}
}

// told is a commit at a subscriber, who drops what he had: seqs not above the last seen.
func (w *world) told(s *subscriber, c hub.Commit) {
	w.smu.Lock()
	defer w.smu.Unlock()
	last := s.seen[c.Device]
	if c.Seq <= last && !w.broken.repeated {
		return
	}
	s.seen[c.Device] = max(last, c.Seq)
	if w.broken.skipping && last > 0 && c.Seq > last+1 {
		return // mutation: nothing of another owner's was in between
	}
	s.got = append(s.got, c)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// ownership is as the identity store has it.
func (d *device) ownership() hub.Ownership {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.own
}

// play is the whole of a seed. What it finds wrong is in faults.
func (w *world) play() {
	w.slots = []*slot{
		{part: resourcedirectory.Part, base: "dir1"},
		{part: resourcedirectory.Part, base: "dir2"},
		{part: resourcedirectory.GatewayPart, base: "gw1"},
		{part: resourcedirectory.GatewayPart, base: "gw2"},
	}
	for _, s := range w.slots {
		s.start(w)
	}
	for i := range 2 + w.pick(2) {
		id := hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012x", i+1))
		w.devices = append(w.devices, &device{
			chance: newChance(w.seed, ofDevices+i), w: w, id: id, own: hub.Ownership{Device: id, Owner: owners[i%2], Generation: 1},
		})
	}
	for _, s := range w.slots {
		<-s.process().up
	}
	following, leave := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	for _, o := range owners {
		s := &subscriber{owner: o, seen: map[hub.DeviceID]uint64{}}
		w.subs = append(w.subs, s)
		readers.Go(func() { w.follow(following, s) })
	}
	time.AfterFunc(chaos, func() { close(w.heal) })
	var busy sync.WaitGroup
	last := make([]*session, len(w.devices))
	for i, d := range w.devices {
		busy.Go(func() {
			d.register()
			for !w.calm() {
				d.visit()
			}
			last[i] = d.settle()
		})
	}
	busy.Go(w.misfortunes)
	busy.Go(func() {
		c := newChance(w.seed, ofOrders)
		for n := 0; !w.calm(); n++ {
			one := newChance(c.r.Uint64(), n)
			w.all.Go(func() { w.command(n, one) })
			select {
			case <-time.After(c.between(time.Second, 6*time.Second)):
			case <-w.heal:
			}
		}
	})
	busy.Wait()
	w.undo.Wait()
	w.tell("all goes well from here")
	var gone *process
	if w.one(3) {
		gone = w.slots[2].process()
		time.Sleep(heardFor)
		gone.crash()
		w.tell("%s crashes at last", gone.name)
	}
	// Devices stay, and take what is left for them.
	calm, end := context.WithTimeout(context.Background(), quiet)
	for i := range w.devices {
		if s := last[i]; s != nil && s.g != gone {
			w.all.Go(func() {
				for {
					select {
					case <-s.wakes:
						s.commands()
					case <-s.closed:
						return
					case <-calm.Done():
						return
					}
				}
			})
		}
	}
	<-calm.Done()
	end()
	w.look(last, gone)
	leave()
	readers.Wait()
	for _, s := range w.slots {
		s.process().term()
	}
	w.all.Wait()
	w.check()
}

// simulate plays a seed in a bubble of time.
func simulate(t *testing.T, seed uint64, b broken, talk bool) (w *world) {
	t.Helper()
	// NATS's client keeps timers of one bubble in a sync.Pool, where those of the next must not find them: two collections empty it.
	runtime.GC()
	runtime.GC()
	cryptotest.SetGlobalRandom(t, seed)
	synctest.Test(t, func(*testing.T) {
		w = newWorld(seed, b, talk)
		w.play()
	})
	return w
}
