package simulation

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	resourcedirectory "github.com/coaphub/coaphub/resource-directory"

	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/store/mongostore"
)

const (
	hubID  = "00000000-0000-4000-8000-00000000000b"
	secret = "the secret of the simulation"
)

// process is one run of a process.
type process struct {
	w        *world
	part     string
	name     string // of the instance
	database *path  // nil: it has none
	nats     *path
	log      *slog.Logger

	client *resourcedirectory.Client // of a gateway, once it is up
	dir    *resourcedirectory.Directory

	up   chan struct{} // closed when it serves
	over chan struct{} // closed when it has crashed, or was stopped
	done chan struct{} // closed when nothing of it runs
	end  func()        // closes over
	dead chan struct{} // closed when it has crashed

	mu    sync.Mutex    // guards what follows
	still chan struct{} // closed when it goes on; nil: it does not stand still
}

// run starts a process and returns at once.
func (w *world) run(part, name string) *process {
	p := &process{
		w: w, part: part, name: name, nats: w.net.path(w.serveNATS),
		up: make(chan struct{}), dead: make(chan struct{}), over: make(chan struct{}), done: make(chan struct{}),
	}
	p.end = sync.OnceFunc(func() { close(p.over) })
	p.log = slog.New(slog.DiscardHandler)
	if w.talk {
		p.log = slog.New(slog.NewTextHandler(talker{w, name}, nil))
	}
	if part == resourcedirectory.Part {
		p.database = w.net.path(w.serveMongo)
	}
	w.all.Go(func() {
		defer close(p.done)
		p.live()
	})
	return p
}

// live is the life of a process. After a crash what is left of it goes on for a while, but reaches nobody.
func (p *process) live() {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	reg := prometheus.NewRegistry()
	b, err := bus.Connect(bus.Config{URLs: []string{"nats://192.0.2.1:4222"}}.Over(p.nats.greet), hubID, "v1", p.name, p.log, reg)
	if err != nil {
		panic(err)
	}
	defer b.Close()
	var load func() bus.Load
	if p.part == resourcedirectory.Part {
		load = func() bus.Load { return p.dir.Load() }
	}
	members := b.Members(bus.Member{Part: p.part, Instance: p.name}, load, p.log)
	feed := &view{p.w.feed, p.nats}
	var serve func(context.Context, func()) error
	if p.part == resourcedirectory.Part {
		st := p.open(ctx, feed)
		if st == nil {
			return
		}
		defer func() { _ = st.Close() }()
		cfg := resourcedirectory.Default()
		cfg.Workers = 2
		d, err := resourcedirectory.New(cfg, st, p.log, reg, p.name)
		if err != nil {
			panic(err)
		}
		d.Apart(b, members, p.name)
		p.dir, serve = d, d.Run
	} else {
		reader, err := resourcedirectory.NewReader(feed, reg)
		if err != nil {
			panic(err)
		}
		p.client = resourcedirectory.NewClient(b, reader, p.name, members, p.log)
		serve = p.client.Run
	}
	all, leave := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	defer parts.Wait()
	defer leave()
	parts.Go(func() {
		if err := members.Run(all, func() {}); err != nil {
			p.log.Error("members", "error", err)
		}
	})
	served := make(chan struct{})
	parts.Go(func() {
		defer close(served)
		if err := serve(ctx, sync.OnceFunc(func() { close(p.up) })); err != nil {
			p.log.Error("serve", "error", err)
		}
	})
	<-p.over
	if p.crashed() {
		b.Close()
		leave()
	}
	stop()
	<-served
}

// open opens the store, as often as it takes.
func (p *process) open(ctx context.Context, feed *view) *mongostore.Store {
	for {
		st, err := mongostore.Open(ctx, p.w.database(p.database), mongostore.Options{
			HubID: hubID, ClusterSecret: secret, Feed: feed, Log: p.log, Name: p.name,
		})
		if err == nil {
			return st
		}
		p.log.Warn("the store does not open", "error", err)
		select {
		case <-time.After(time.Second):
		case <-p.over:
			return nil
		}
	}
}

func (w *world) database(p *path) mongostore.Config {
	cfg := mongostore.DefaultConfig()
	cfg.URI = "mongodb://192.0.2.1:27017/"
	return cfg.Over(p.dial)
}

// paths are all that it has.
func (p *process) paths() []*path {
	if p.database == nil {
		return []*path{p.nats}
	}
	return []*path{p.nats, p.database}
}

// crash ends the process where it stands.
func (p *process) crash() {
	close(p.dead)
	for _, x := range p.paths() {
		x.die()
	}
	p.end()
}

// term ends it in order.
func (p *process) term() { p.end() }

func (p *process) crashed() bool {
	select {
	case <-p.dead:
		return true
	default:
		return false
	}
}

// pause has it stand still; what was on its way from it arrives afterwards.
func (p *process) pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.still == nil {
		p.still = make(chan struct{})
		for _, x := range p.paths() {
			x.hold(1, 1)
		}
	}
}

// resume has it go on.
func (p *process) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.still != nil {
		close(p.still)
		p.still = nil
		for _, x := range p.paths() {
			x.hold(-1, -1)
		}
	}
}

// said waits until the process can say something to those outside, and reports whether it ever does.
func (p *process) said() bool {
	for {
		p.mu.Lock()
		still := p.still
		p.mu.Unlock()
		switch {
		case p.crashed():
			return false
		case still == nil:
			return true
		}
		select {
		case <-still:
		case <-p.dead:
		}
	}
}

// heard reports whether the process takes what is said to it now.
func (p *process) heard() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.up:
	default:
		return false
	}
	select {
	case <-p.over:
		return false
	default:
	}
	return p.still == nil
}

// talker writes what processes log into the story.
type talker struct {
	w    *world
	name string
}

func (t talker) Write(b []byte) (int, error) {
	t.w.tell("%s: %s", t.name, b)
	return len(b), nil
}
