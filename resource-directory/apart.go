package resourcedirectory

import (
	"context"
	"fmt"
	"hash/crc32"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

// What differs when the directory is one of several, in processes of their own: each serves the devices of some partitions, and reaches
// sessions at their gateways. Who serves what decides nothing but where caches are warm: two that disagree for a while cost conflicts, since
// the log fences each write.

const (
	// Part and GatewayPart are under what names the directories and the gateways with devices' sessions are known as members.
	Part, GatewayPart = "resource-directory", "coap-gateway"
	// partitions is among how many shares the devices are spread. It never changes: parts of all versions have to agree.
	partitions = 256
	// watchEvery is how often the membership is looked at, if nothing moves.
	watchEvery = 2 * time.Second
	// handover is how long a directory that leaves goes on to serve beside those that take over.
	handover = time.Second
	// telling is to how many sessions something is being told at a time, and tellFor how long it is tried.
	telling, tellFor = 1024, 10 * time.Second
	// tellTry is how long one answer is waited for.
	tellTry = time.Second
	// maxNamed bounds the gateways that are remembered for sessions that began there; beyond, they are not without a heartbeat.
	maxNamed = 4096
	// settled is how long after that nobody else serves a partition of the directory's any more.
	settled = 15 * time.Second
	// toldWrites is for how long the others are told where a directory has written: some heartbeats get lost.
	toldWrites = 5 * time.Second
	// closeWait is how long a device's end waits for its session's.
	closeWait = time.Second
)

// partitionOf is a device's share. Workers go by other bits of the same sum, so each has devices of each partition.
func partitionOf(dev hub.DeviceID) int {
	return int(crc32.ChecksumIEEE([]byte(dev))>>16) % partitions
}

// The subjects of a partition: what changes devices, what reads them, and commands, which take long.
func writesOf(partition int) string   { return fmt.Sprintf("rd.%d.write", partition) }
func readsOf(partition int) string    { return fmt.Sprintf("rd.%d.read", partition) }
func commandsOf(partition int) string { return fmt.Sprintf("rd.%d.command", partition) }

// gatewayOf is where a gateway with sessions is told of them.
func gatewayOf(service string) string { return "gw." + service }

// apart is what a directory has that is one of several.
type apart struct {
	bus     *bus.Bus
	members *bus.Members
	self    string // its instance
	log     *slog.Logger
	mine    atomic.Pointer[[partitions]bool]
	moved   atomic.Int64             // Unix nanoseconds: when partitions moved last, or others wrote in them, or it had not heard itself for a while
	wrote   [partitions]atomic.Int64 // Unix nanoseconds: when something was stored last
	heard   time.Time                // up to when others' words of where they wrote are dealt with; only watch uses it
	// gone is closed when others have taken over: what waits for a device here waits no longer.
	gone chan struct{}

	life    context.Context // ends with Run
	end     context.CancelFunc
	under   sync.WaitGroup
	telling *semaphore.Weighted

	mu    sync.Mutex          // guards words and named
	words map[spoken]struct{} // being told; a second wake of a session is the same word
	// named are gateways at which sessions began lately, and when the last one did, whether their heartbeat was ever heard or not.
	named map[string]time.Time
}

type spoken struct {
	service string
	what    sessionTold
}

func (a *apart) told(word spoken) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.words, word)
}

// Apart makes the directory one of several, as which members has it under the instance's name; it serves on b once it runs, and cannot
// be asked before that. It must be called before Run.
func (d *Directory) Apart(b *bus.Bus, members *bus.Members, instance string) {
	a := &apart{bus: b, members: members, self: instance, log: d.log, telling: semaphore.NewWeighted(telling), words: map[spoken]struct{}{}, named: map[string]time.Time{}, gone: make(chan struct{})}
	a.mine.Store(new([partitions]bool))
	a.life, a.end = context.WithCancel(context.Background())
	d.apart = a
}

// Load is what the directory tells others of itself, as a member.
func (d *Directory) Load() bus.Load {
	l := bus.Load{Partitions: d.Partitions()}
	if d.apart == nil {
		return l
	}
	l.Wrote = make([]byte, partitions/8)
	recent := time.Now().Add(-toldWrites).UnixNano()
	for p := range d.apart.wrote {
		if d.apart.wrote[p].Load() > recent {
			l.Wrote[p/8] |= 1 << (p % 8)
		}
	}
	return l
}

// stored notes that something of a device was stored here.
func (a *apart) stored(dev hub.DeviceID) {
	if a != nil {
		a.wrote[partitionOf(dev)].Store(time.Now().UnixNano())
	}
}

// meddled returns the directory's partitions in which others say that they wrote, since it was asked before; nil: none. That happens
// while they disagree about who serves them (one that has just come hears itself before it hears the others), and when somebody stood
// still with a write under way: all that its own memory has of these devices may be old, and nothing else would show it.
func (a *apart) meddled() *[partitions]bool {
	mine, which, any := a.mine.Load(), new([partitions]bool), false
	all, at := a.members.All()
	newest := a.heard
	for i, m := range all {
		if m.Part != Part || m.Instance == a.self || !at[i].After(a.heard) || len(m.Load.Wrote) != partitions/8 {
			continue
		}
		if at[i].After(newest) {
			newest = at[i]
		}
		for p := range which {
			if mine[p] && m.Load.Wrote[p/8]&(1<<(p%8)) != 0 {
				which[p], any = true, true
			}
		}
	}
	a.heard = newest
	if !any {
		return nil
	}
	return which
}

// Partitions is how many partitions the directory serves: all that there are if it is the only one.
func (d *Directory) Partitions() int {
	if d.apart == nil {
		return partitions
	}
	n := 0
	for _, mine := range d.apart.mine.Load() {
		if mine {
			n++
		}
	}
	return n
}

// overtaken is closed when the directory stops and others have taken over; nil: there are none.
func (d *Directory) overtaken() <-chan struct{} {
	if d.apart == nil {
		return nil
	}
	return d.apart.gone
}

// keeper is by what the index of online devices knows who ends a session when its process is gone: the gateway that holds it, or, in
// one process, its run.
func (d *Directory) keeper(service string) string {
	if d.apart == nil {
		return d.run
	}
	return service
}

// gone reports whether that is gone.
func (d *Directory) gone(keeper string) bool {
	if d.apart == nil {
		return keeper != d.run
	}
	return d.apart.members.Silent(GatewayPart, keeper)
}

// sure reports whether gone knows.
func (d *Directory) sure() bool { return d.apart == nil || d.apart.members.Sure() }

// serves reports whether a device is one of the directory's.
func (d *Directory) serves(dev hub.DeviceID) bool {
	return d.apart == nil || d.apart.mine.Load()[partitionOf(dev)]
}

// reach returns how the session that s names is reached, nil if it is not online, or nobody knows.
func (w *worker) reach(s *state) hub.Deliverer {
	if l := w.live[s.dev]; l != nil {
		if l.session == s.session {
			return l.to
		}
		return nil
	}
	if to := w.d.apart.reach(s.meta.Connection, s.dev, s.session); to != nil {
		return to
	}
	return nil
}

// reach is worker.reach for a session elsewhere.
func (a *apart) reach(conn hub.Connection, dev hub.DeviceID, number uint64) *elsewhere {
	if a == nil || !conn.Online || conn.Service == "" {
		return nil
	}
	return &elsewhere{a, conn.Service, dev, number}
}

// remind tells a session elsewhere of commands that wait, when its device was loaded: whoever had it before may not have come to it.
func (w *worker) remind(s *state) {
	to := w.d.apart.reach(s.meta.Connection, s.dev, s.session)
	if to != nil && slices.ContainsFunc(s.commands, func(c *hub.Command) bool { return c.Session == 0 }) {
		to.Wake()
	}
}

// closing is a session elsewhere that is to be closed once its end is stored. The zero value is none.
type closing struct {
	to     *elsewhere
	reason string
	told   <-chan struct{}
}

func (w *worker) closes(s *state, reason string) *closing {
	return &closing{to: w.d.apart.reach(s.meta.Connection, s.dev, s.session), reason: reason}
}

// begin has the session closed; it does not block.
func (c *closing) begin() {
	if c.to != nil {
		c.told = c.to.close(c.reason)
	}
}

// wait waits a moment until the gateway knows: what ends next of the device's should not be what the session is said to end by.
func (c *closing) wait(ctx context.Context) {
	if c.told == nil {
		return
	}
	moment := time.NewTimer(closeWait)
	defer moment.Stop()
	select {
	case <-c.told:
	case <-moment.C:
	case <-ctx.Done():
	}
}

// elsewhere is a session in another process.
type elsewhere struct {
	a       *apart
	service string
	dev     hub.DeviceID
	number  uint64
}

// Close implements hub.Deliverer.
func (e *elsewhere) Close(reason string) { e.close(reason) }

func (e *elsewhere) close(reason string) (told <-chan struct{}) {
	return e.a.tell(e.service, sessionTold{Device: e.dev, Session: e.number, Close: true, Reason: reason})
}

// Wake implements hub.Deliverer.
func (e *elsewhere) Wake() { e.a.tell(e.service, sessionTold{Device: e.dev, Session: e.number}) }

// Ready implements hub.Deliverer: nobody knows from here, so commands wait for the session to take them.
func (e *elsewhere) Ready(hub.Href, []string) bool { return false }

// Deliver implements hub.Deliverer. It is not called, since no command is bound before the session takes it.
func (e *elsewhere) Deliver(hub.Command) { e.Wake() }

// unknown reports whether an error leaves it open what became of a call.
func unknown(err error) bool {
	return hub.IsKind(err, hub.Unavailable) || hub.IsKind(err, hub.Deadline)
}

// tell tells a gateway about a session, and tries again for a while: a word that is lost is a command that waits, or a session too many.
// It does not block; what it returns is closed when it is done with that.
func (a *apart) tell(service string, what sessionTold) <-chan struct{} {
	done := make(chan struct{})
	word := spoken{service, what}
	if !a.telling.TryAcquire(1) {
		a.log.Warn("a session is not told: too many others are being told", "gateway", service, "device", what.Device)
		close(done)
		return done
	}
	a.mu.Lock()
	_, is := a.words[word]
	a.words[word] = struct{}{}
	a.mu.Unlock()
	if is && !what.Close { // it is being told
		a.telling.Release(1)
		close(done)
		return done
	}
	a.under.Go(func() {
		defer close(done)
		defer a.telling.Release(1)
		ctx, cancel := context.WithTimeout(a.life, tellFor)
		defer cancel()
		defer a.told(word)
		err := persist(ctx, unknown, func(ctx context.Context) error {
			// What got lost with the connection is said again.
			ctx, cancel := context.WithTimeout(ctx, tellTry)
			defer cancel()
			_, err := tellSession.Call(ctx, a.bus, gatewayOf(service), what)
			if err != nil && a.members.Silent(GatewayPart, service) {
				return nil // its sessions are set offline
			}
			return err
		})
		if err != nil && a.life.Err() == nil {
			a.log.Warn("a session is not told", "gateway", service, "device", what.Device, "error", err)
		}
	})
	return done
}

// watch follows the membership until ctx ends: it takes on the partitions that are the directory's, gives up the others, and sees to
// sessions and commands that were somebody's who is gone. ready is called once there are partitions that are the directory's, or others
// that have all of them.
func (d *Directory) watch(ctx context.Context, s *servers, ready func()) {
	a := d.apart
	ready, patience := sync.OnceFunc(ready), time.Now().Add(watchEvery)
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var passes sync.WaitGroup
	defer passes.Wait()
	var sessions, commands pass
	everything := new([partitions]bool)
	for p := range everything {
		everything[p] = true
	}
	var since time.Time
	judged := map[string]bool{} // gateways that were found silent
	for {
		moved := a.members.Moved()
		var living []string
		if a.members.Acquainted() { // else it would take all that belongs to those it has not heard of yet
			living = a.members.Living(Part)
		}
		changed := a.share(living)
		if now := a.members.Since(); now != since {
			// It stood still, or was away, and others may have had its partitions meanwhile.
			since, changed = now, everything
		}
		if which := a.meddled(); which != nil {
			a.moved.Store(time.Now().UnixNano())
			a.names("") // sessions may have begun there at gateways that nobody here has heard of
			for _, w := range d.workers {
				w.leave(which)
			}
		}
		if changed != nil {
			a.moved.Store(time.Now().UnixNano())
			for _, w := range d.workers {
				w.leave(changed)
			}
			if err := s.serve(a.mine.Load()); err != nil {
				a.log.Error("partitions cannot be served", "error", err)
			}
			commands.start(ctx, &passes, func(ctx context.Context) {
				d.former(ctx, commandIndex, d.metrics.formerCommands, "commands of other directories cannot be looked up, trying again",
					func(run string) bool { return run != d.run }, d.findCommands)
			})
		}
		if silent, unheard := a.silent(judged), a.unheard(); silent || unheard || changed != nil {
			sessions.start(ctx, &passes, func(ctx context.Context) {
				d.former(ctx, onlineIndex, d.metrics.former, "devices of gateways that are gone cannot be set offline, trying again", d.gone, d.endSession)
			})
		}
		if len(living) > 0 {
			ready()
		} else if time.Now().After(patience) {
			a.log.Warn("the directory waits for the bus: it does not hear its own heartbeat")
			patience = time.Now().Add(10 * time.Second)
		}
		select {
		case <-moved:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// share takes what of the partitions belongs to the directory among those that live, and returns which are new or lost; nil: none.
func (a *apart) share(living []string) *[partitions]bool {
	if !slices.Contains(living, a.self) {
		// It does not hear itself, so what it hears of others is as little worth; or it leaves, and serves until others do. Nobody minds
		// that two serve a partition.
		return nil
	}
	now, old := new([partitions]bool), a.mine.Load()
	changed, any := new([partitions]bool), false
	for p := range partitions {
		now[p] = bus.Home(p, living) == a.self
		changed[p] = now[p] != old[p]
		any = any || changed[p]
	}
	if !any {
		return nil
	}
	a.mine.Store(now)
	return changed
}

// silent reports whether a gateway has gone silent that was not when it was asked before. The first time that it may judge, it says so:
// sessions of gateways may be left that nobody here has ever heard of.
func (a *apart) silent(judged map[string]bool) bool {
	more := false
	look := func(instance string) {
		is := a.members.Silent(GatewayPart, instance)
		if is && !judged[instance] {
			more = true
		}
		if !is && judged[instance] && instance != "" && slices.Contains(a.members.Living(GatewayPart), instance) {
			a.tell(instance, sessionTold{}) // its devices were set offline, and it may not know
		}
		judged[instance] = is
	}
	look("") // nobody has that name
	all, _ := a.members.All()
	for _, m := range all {
		if m.Part == GatewayPart {
			look(m.Instance)
		}
	}
	return more
}

// names notes that a session begins at a gateway.
func (a *apart) names(gateway string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, is := a.named[gateway]; is || len(a.named) < maxNamed {
		a.named[gateway] = time.Now()
	}
}

// unheard reports whether there is a gateway that sessions began at, and that should have been heard since and was not: it was gone before
// its first heartbeat, so that nobody would notice its silence.
func (a *apart) unheard() (any bool) {
	if !a.members.Sure() {
		return false
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for gateway, at := range a.named {
		if time.Since(at) > bus.Patience {
			any = any || a.members.Silent(GatewayPart, gateway)
			delete(a.named, gateway)
		}
	}
	return any
}

// pass is work over an index that is done from the start whenever it is started, one at a time.
type pass struct {
	stop context.CancelFunc
	done chan struct{}
}

func (p *pass) start(ctx context.Context, all *sync.WaitGroup, work func(context.Context)) {
	former := p.done
	if p.stop != nil {
		p.stop()
	}
	ctx, p.stop = context.WithCancel(ctx)
	done := make(chan struct{})
	p.done = done
	all.Go(func() {
		defer close(done)
		if former != nil {
			<-former
		}
		work(ctx)
	})
}

// leave forgets what is in memory of the devices of some partitions: others have written them since, or will.
func (w *worker) leave(which *[partitions]bool) {
	w.leftMu.Lock()
	defer w.leftMu.Unlock()
	if w.left == nil {
		w.left = new([partitions]bool)
	}
	for p, is := range which {
		w.left[p] = w.left[p] || is
	}
	select {
	case w.lefts <- struct{}{}:
	default:
	}
}

// forget does what leave asked for.
func (w *worker) forget() {
	w.leftMu.Lock()
	which := w.left
	w.left = nil
	w.leftMu.Unlock()
	if which == nil {
		return
	}
	for dev, e := range w.devices {
		switch {
		case !which[partitionOf(dev)]:
		case e.dirty():
			e.stale = true
			e.public.Store(nil)
		default:
			w.drop(e)
		}
	}
}

// doubts has a request decided once more that wrote nothing, on what the store has, if the picture that it was decided on may be old: only
// what is written is checked against what others have written.
func (w *worker) doubts(r *request, err error) bool {
	a := w.d.apart
	if a == nil || r.reread || err == nil && w.d.serves(r.dev) && time.Since(time.Unix(0, a.moved.Load())) > settled {
		return false
	}
	r.reread = true
	if e := w.devices[r.dev]; e != nil {
		e.stale = true
		e.public.Store(nil)
	}
	w.ready = append(w.ready, r)
	return true
}

// persist repeats do while again says so of its error, for as long as ctx lasts.
func persist(ctx context.Context, again func(error) bool, do func(context.Context) error) error {
	for wait := 25 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		err := do(ctx)
		if err == nil || !again(err) {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}
