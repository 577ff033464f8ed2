package bus

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus/bustest"
)

// Those who run are heard by all, with what they are at; one that leaves takes nothing on any more.
func TestMembersHearEachOther(t *testing.T) {
	url := bustest.Server(t, nil).ClientURL()
	var all []*Members
	for i := range 3 {
		b := connect(t, Config{URLs: []string{url}}, "v1")
		m := b.Members(Member{Part: "part", Instance: fmt.Sprint(i), Name: "here"}, func() Load { return Load{Sessions: i} }, slog.New(slog.DiscardHandler))
		all = append(all, m)
		over := make(chan error, 1)
		go func() { over <- m.Run(t.Context(), func() {}) }()
		t.Cleanup(func() { <-over })
	}
	for _, m := range all {
		within(t, func() bool { return slices.Equal(m.Living("part"), []string{"0", "1", "2"}) })
		if ids := m.Living("other"); len(ids) != 0 {
			t.Errorf("of another part live %v", ids)
		}
	}
	who, _ := all[0].All()
	if len(who) != 3 || who[2].Load.Sessions != 2 || who[2].Build != "v1" || who[2].Name != "here" || who[2].Started.IsZero() {
		t.Errorf("the members are %+v", who)
	}
	// Another part under the same name, as in one process, is somebody else.
	both := connect(t, Config{URLs: []string{url}}, "v1").Members(Member{Part: "other", Instance: "0"}, nil, slog.New(slog.DiscardHandler))
	for range 2 {
		both.say()
		within(t, func() bool { return slices.Equal(all[0].Living("other"), []string{"0"}) })
		if ids := all[0].Living("part"); !slices.Equal(ids, []string{"0", "1", "2"}) {
			t.Errorf("beside another part live %v", ids)
		}
	}
	moved := all[0].Moved()
	all[1].Leave()
	<-moved
	within(t, func() bool { return slices.Equal(all[0].Living("part"), []string{"0", "2"}) })
	if all[0].Silent("part", "1") {
		t.Error("who has just left is called silent")
	}
}

// Those who cannot talk to each other find out at the start of the later one, and both name both versions.
func TestStrangersMeet(t *testing.T) {
	srv := bustest.Server(t, nil)
	var logged bytes.Buffer
	b := connect(t, Config{URLs: []string{srv.ClientURL()}}, "v1.2.3")
	m := b.Members(Member{Part: "part", Instance: "0"}, nil, slog.New(slog.NewTextHandler(&logged, nil)))
	if err := m.Meet(t.Context()); err != nil {
		t.Fatalf("nobody is there, and it met %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	over, ready := make(chan error, 1), make(chan struct{})
	go func() { over <- m.Run(ctx, func() { close(ready) }) }()
	<-ready
	if err := b.Members(Member{Part: "part", Instance: "1"}, nil, slog.New(slog.DiscardHandler)).Meet(t.Context()); err != nil {
		t.Errorf("it met one of its own version: %v", err)
	}

	conn, err := nats.Connect(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// A stranger comes: it is answered by a word of who lives.
	heard, err := conn.SubscribeSync(b.prefix + "alive.part.0")
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := conn.Publish(b.prefix+"alive.part.9", must(encoding.Marshal(note{Version: 9, Build: "v9.9.9", Name: string(who)}))); err != nil {
			t.Fatal(err)
		}
		if _, err := heard.NextMsg(10 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	// A stranger lives: who comes is refused.
	_, err = conn.Subscribe(b.prefix+"alive.part.1", func(*nats.Msg) {
		_ = conn.Publish(b.prefix+"alive.part.9", must(encoding.Marshal(note{Version: 9, Build: "v9.9.9", Name: string(alive)})))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	err = b.Members(Member{Part: "part", Instance: "1"}, nil, slog.New(slog.DiscardHandler)).Meet(t.Context())
	code, text := hub.Public(err)
	if code != "part-version" || !hub.IsKind(err, hub.Precondition) || !strings.Contains(text, "v9.9.9") || !strings.Contains(text, "v1.2.3") {
		t.Errorf("it met %v", err)
	}
	cancel()
	if err := <-over; err != nil {
		t.Error(err)
	}
	if s := logged.String(); strings.Count(s, "v9.9.9") != 1 || !strings.Contains(s, "v1.2.3") {
		t.Errorf("the log says %s", s)
	}
	if who, _ := m.All(); len(who) != 1 {
		t.Errorf("the members are %+v", who)
	}
}

// Nobody is called silent by one that may not have heard: because it has just come, or was away itself.
func TestSilence(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	m := &Members{self: Member{Part: "me", Instance: "self"}, seen: map[memberKey]heard{}, moved: make(chan struct{})}
	self, other, leaver := m.self, Member{Part: "gw", Instance: "other"}, Member{Part: "gw", Instance: "leaver", Leaving: true}
	expect := func(s float64, instance string, want bool) {
		t.Helper()
		if got := m.silent("gw", instance, at(s)); got != want {
			t.Errorf("after %v s, %s is silent: %v", s, instance, got)
		}
	}
	expect(0, "nobody", false)
	for s := 0.0; s <= 30; s++ {
		m.heard(self, at(s))
		if s == 5 {
			m.heard(other, at(s))
			m.heard(leaver, at(s))
		}
		switch s {
		case 10: // for ten seconds it judges nobody
			expect(s, "nobody", false)
		case 11:
			expect(s, "nobody", true)
			expect(s, "leaver", true)
			expect(s, "other", false)
		case 15:
			expect(s, "other", false)
		case 16:
			expect(s, "other", true)
		}
	}
	// The bus was away, or this process stood still: what the others said then is lost.
	since := m.Since()
	expect(60, "other", false)
	for s := 60.0; s <= 71; s++ {
		m.heard(self, at(s))
		expect(s, "nobody", s > 70)
	}
	if m.Since() == since {
		t.Error("nobody can tell that it did not hear itself for half a minute")
	}
	moved := m.Moved()
	m.heard(other, at(71))
	<-moved
	expect(71, "other", false)
	if ids := m.living("gw", at(76)); !slices.Equal(ids, []string{"other"}) {
		t.Errorf("living: %v", ids)
	}
	moved = m.Moved()
	m.sweep(at(77))
	<-moved
	if ids := m.living("gw", at(77)); len(ids) != 0 {
		t.Errorf("living after silence: %v", ids)
	}
	m.sweep(at(71 + 3601))
	if len(m.seen) != 0 {
		t.Errorf("%d are remembered for ever", len(m.seen))
	}
}

// One more or less moves its own share of the partitions and no other, and the shares are about the same.
func TestHome(t *testing.T) {
	const partitions = 256
	ids := []string{"a", "b", "c", "d"}
	share := map[string]int{}
	for p := range partitions {
		home := Home(p, ids)
		share[home]++
		if less := Home(p, ids[:3]); home != "d" && less != home {
			t.Errorf("partition %d moves from %s to %s, and neither is the one that went", p, home, less)
		}
		if other := Home(p, []string{"d", "c", "b", "a"}); other != home {
			t.Errorf("partition %d: the order decides", p)
		}
	}
	for _, id := range ids {
		if share[id] < partitions/len(ids)/2 || share[id] > partitions/len(ids)*2 {
			t.Errorf("%s has %d of %d partitions", id, share[id], partitions)
		}
	}
	if Home(1, nil) != "" {
		t.Error("a partition has a home where nobody lives")
	}
}
