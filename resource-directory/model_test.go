package resourcedirectory

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// model is what the directory should say about one device, kept by the simplest means.
type model struct {
	owner    hub.Owner
	gen      uint64
	sessions []*device // all of them, the current one last
	current  bool      // the last one still counts
	online   bool
	twin     hub.TwinState
	off      bool                // the twin is switched off
	places   []string            // local endpoints
	links    map[hub.Href]string // title
	twins    map[hub.Href]string // content, "" is NOT_FOUND
	versions map[hub.Href]uint64
	labels   hub.Labels
	past     map[uint64]*model // by seq
	seq      uint64
	skips    map[hub.Href]uint64 // events of commands since the last change
	loose    uint64
	commands []*modelCommand // that have not ended, in order
	ended    []string        // IDs of those that have
}

// modelCommand is a command and who waits for its end, nil if nobody does.
type modelCommand struct {
	id    string
	kind  hub.CommandKind
	href  hub.Href
	bound bool // to the current session
	asked *asked
}

func (m *model) clone() *model {
	c := *m
	c.links, c.twins, c.labels, c.past = maps.Clone(m.links), maps.Clone(m.twins), maps.Clone(m.labels), nil
	c.commands, c.ended = nil, nil
	return &c
}

func (m *model) clear() {
	m.labels = nil
	m.links, m.twins, m.versions = map[hub.Href]string{}, map[hub.Href]string{}, map[hub.Href]uint64{}
	m.current, m.online, m.twin, m.off, m.places = false, false, hub.TwinOutOfSync, false, nil
	m.skips, m.loose = map[hub.Href]uint64{}, 0
}

// count counts an event of a command, unless it is one of the twin.
func (m *model) count(c *modelCommand) {
	if _, ok := m.twins[c.href]; c.kind.OfTwin() {
		return
	} else if ok {
		m.skips[c.href]++
	} else {
		m.loose++
	}
}

// began is the state of the twin at the beginning of a session, and without one.
func (m *model) began() hub.TwinState {
	if m.off {
		return hub.TwinDisabled
	}
	return hub.TwinOutOfSync
}

// turn does what a twin command does that the device has carried out.
func (m *model) turn(kind hub.CommandKind) {
	switch kind {
	case hub.CommandTwinOff:
		m.off, m.twin = true, hub.TwinDisabled
	case hub.CommandTwinOn:
		if m.off {
			m.off, m.twin = false, hub.TwinOutOfSync
		}
	case hub.CommandTwinSync:
		m.off, m.twin = false, hub.TwinOutOfSync
	case hub.CommandCreate, hub.CommandRetrieve, hub.CommandUpdate, hub.CommandDelete:
	}
}

// end ends the commands that which wants, and compares what those were told who wait for them.
func (m *model) end(t tb, with hub.CommandEnd, which func(*modelCommand) bool) {
	t.Helper()
	m.commands = slices.DeleteFunc(m.commands, func(c *modelCommand) bool {
		if !which(c) {
			return false
		}
		m.count(c)
		m.ended = append(m.ended, c.id)
		if c.asked == nil {
			return true
		}
		out, err := c.asked.wait(t)
		switch {
		case with == hub.CommandExpired && !hub.IsKind(err, hub.Deadline), with != hub.CommandExpired && err != nil:
			t.Fatalf("command %s ended with %v, want end %d", c.id, err, with)
		case out.End != with || out.Cause.Correlation != c.id:
			t.Fatalf("command %s ended with %+v, want end %d", c.id, out, with)
		}
		return true
	})
}

func all(*modelCommand) bool { return true }

func sent(c *modelCommand) bool { return c.bound }

// alone takes away those who wait: their process has ended.
func (m *model) alone() {
	for _, c := range m.commands {
		c.asked = nil
	}
}

func (m *model) set(href hub.Href, content string) {
	if old, ok := m.twins[href]; ok && old == content {
		return
	}
	m.versions[href] = m.next(href)
	m.skips[href] = 0
	m.twins[href] = content
}

// TestDirectoryAgainstAModel does what devices, gateways, owners, crashes and retention do, in random order, and compares all
// that can be seen after each step. The invariants of seqs, versions, times and rebuilding are checked at each restart.
func TestDirectoryAgainstAModel(t *testing.T) {
	t.Parallel()
	hrefs := []hub.Href{"/a", "/b", "/c", "/d"}
	rapid.Check(t, func(rt *rapid.T) {
		f := &fake{}
		h := open(rt, faked(f), func(h *house) {
			if rapid.Bool().Draw(rt, "no room in memory") { // each device leaves it as soon as it may
				h.cfg.Limits.LoadedBytes = 1 << 10
			}
		})
		m := &model{past: map[uint64]*model{}}
		m.clear()
		ctx := context.Background()
		href := func() hub.Href { return rapid.SampledFrom(hrefs).Draw(rt, "href") }
		// someSession is mostly the current session, sometimes one of before.
		someSession := func() (x *device, valid bool) {
			if len(m.sessions) == 0 {
				rt.Skip("no session yet")
			}
			i := len(m.sessions) - 1
			if rapid.IntRange(0, 3).Draw(rt, "stale") == 0 {
				i = rapid.IntRange(0, i).Draw(rt, "session")
			}
			return m.sessions[i], m.current && i == len(m.sessions)-1
		}
		expect := func(err error, valid bool) {
			rt.Helper()
			if valid && err != nil || !valid && !hub.IsKind(err, hub.Precondition) {
				rt.Fatalf("valid session %t: %v", valid, err)
			}
		}
		endIndex := func() { // the start's own work has to be over before the model can say what is online
			h.eventually("former sessions are offline", func() bool {
				for doc := range h.base.Range(ctx, onlineIndex, "", "") {
					if string(doc.Value) != h.d.run {
						return false
					}
				}
				return true
			})
		}
		rt.Repeat(map[string]func(*rapid.T){
			"register": func(rt *rapid.T) {
				owner := rapid.SampledFrom([]hub.Owner{alice, bob}).Draw(rt, "owner")
				m.gen++
				h.must(h.d.Register(ctx, own(lamp, owner, m.gen), "u"))
				m.end(rt, hub.CommandCancelled, all)
				m.clear()
				m.owner = owner
				h.must(h.d.Register(ctx, own(lamp, owner, m.gen), "u"))
			},
			"unregister": func(rt *rapid.T) {
				stale := own(lamp, m.owner, m.gen)
				if m.gen > 0 && rapid.Bool().Draw(rt, "stale") {
					stale.Generation--
				}
				h.must(h.d.Unregister(ctx, stale, "u"))
				if m.owner != "" && stale.Generation == m.gen {
					m.end(rt, hub.CommandCancelled, all)
					m.clear()
					m.owner = ""
				}
			},
			"sign in": func(rt *rapid.T) {
				x := &device{h: h, end: newEnd()}
				var err error
				x.sess, err = h.d.SignIn(ctx, own(lamp, m.owner, m.gen), conn(strconv.Itoa(len(m.sessions))), "u", x.end)
				if m.owner == "" {
					if !hub.IsKind(err, hub.Denied) {
						rt.Fatalf("signed in without an owner: %v", err)
					}
					return
				}
				h.must(err)
				if m.current {
					if got := m.sessions[len(m.sessions)-1].end; len(got.reason) == 0 && m.online {
						got.why(rt)
					}
				}
				m.end(rt, hub.CommandUnavailable, sent)
				if x.sess.Commands != (len(m.commands) > 0) || x.sess.TwinEnabled == m.off {
					rt.Fatalf("the session says that commands wait: %t, and that the twin is on: %t", x.sess.Commands, x.sess.TwinEnabled)
				}
				m.sessions = append(m.sessions, x)
				m.current, m.online, m.twin = true, true, m.began()
			},
			"notify": func(rt *rapid.T) {
				x, valid := someSession()
				var changes []hub.Change
				for range rapid.IntRange(1, 3).Draw(rt, "changes") {
					to := href()
					v := strconv.Itoa(rapid.IntRange(1, 3).Draw(rt, "value"))
					changes = append(changes, value(to, v))
					if valid {
						m.set(to, v)
					}
				}
				expect(x.notify(changes...), valid)
			},
			"notify while the store is away": func(rt *rapid.T) {
				x, valid := someSession()
				before := h.events(lamp)
				f.set(func(f *fake) { f.append = away })
				err := x.notify(value("/a", "away"))
				f.set(func(f *fake) { f.append = nil })
				if valid && !hub.IsKind(err, hub.Unavailable) || !valid && !hub.IsKind(err, hub.Precondition) {
					rt.Fatalf("valid session %t: %v", valid, err)
				}
				if now := h.events(lamp); len(now) != len(before) {
					rt.Fatalf("something was stored: %q", now[len(before):])
				}
				x.msg-- // not done: the number is free
			},
			"repeat a stored message": func(rt *rapid.T) {
				x, valid := someSession()
				if !valid {
					rt.Skip("no current session")
				}
				h.must(x.notify(value("/a", "x")))
				m.set("/a", "x")
				stored := h.device(m.owner, lamp)
				r, _ := stored.Resources.Get("/a")
				if r.Session != x.sess.Number || r.Message != x.msg { // it changed nothing, so its number is not stored
					return
				}
				h.must(h.d.Notify(ctx, x.same(), []hub.Change{value("/a", "repeated")}))
			},
			"publish": func(rt *rapid.T) {
				x, valid := someSession()
				l := link(href())
				l.Title = strconv.Itoa(rapid.IntRange(0, 2).Draw(rt, "title"))
				_, err := x.publish(l)
				expect(err, valid)
				if valid {
					m.links[l.Href] = l.Title
				}
			},
			"unpublish": func(rt *rapid.T) {
				x, valid := someSession()
				var which []hub.Href
				if rapid.Bool().Draw(rt, "one") {
					which = append(which, href())
				}
				removed, err := h.d.Unpublish(ctx, x.stamp(), which)
				expect(err, valid)
				if !valid {
					return
				}
				var want []hub.Href
				for _, to := range slices.Sorted(maps.Keys(m.links)) {
					if len(which) == 0 || slices.Contains(which, to) {
						want = append(want, to)
						delete(m.links, to)
						m.set(to, "")
					}
				}
				if !slices.Equal(removed, want) {
					rt.Fatalf("removed %v, want %v", removed, want)
				}
			},
			"label": func(rt *rapid.T) {
				names := []string{"room", "floor"}
				change := hub.LabelChange{Replace: rapid.Bool().Draw(rt, "replace"), Set: hub.Labels{}}
				for _, name := range names {
					switch rapid.IntRange(0, 2).Draw(rt, name) {
					case 1:
						change.Set[name] = strconv.Itoa(rapid.IntRange(1, 2).Draw(rt, "value"))
					case 2:
						change.Remove = append(change.Remove, name)
					}
				}
				owner := rapid.SampledFrom([]hub.Owner{alice, bob}).Draw(rt, "owner")
				got, err := h.d.SetLabels(ctx, owner, lamp, change, "u")
				if owner != m.owner {
					if !hub.IsKind(err, hub.NotFound) {
						rt.Fatalf("%s labelled what is not theirs: %v", owner, err)
					}
					return
				}
				h.must(err)
				if change.Replace {
					m.labels = nil
				}
				m.labels = maps.Clone(m.labels)
				for _, name := range change.Remove {
					delete(m.labels, name)
				}
				for name, value := range change.Set {
					if m.labels == nil {
						m.labels = hub.Labels{}
					}
					m.labels[name] = value
				}
				if !got.Equal(m.labels) {
					rt.Fatalf("answered %v, want %v", got, m.labels)
				}
			},
			"offline": func(rt *rapid.T) {
				x, valid := someSession()
				h.must(h.d.Offline(ctx, x.stamp()))
				if valid {
					m.end(rt, hub.CommandUnavailable, sent)
					m.online, m.twin = false, m.began()
				}
			},
			"sign out": func(rt *rapid.T) {
				x, valid := someSession()
				expect(h.d.SignOut(ctx, x.stamp()), valid)
				if valid {
					m.end(rt, hub.CommandUnavailable, sent)
					m.current, m.online, m.twin = false, false, m.began()
				}
			},
			"session ended": func(rt *rapid.T) {
				if m.owner == "" || !m.online {
					return
				}
				h.must(h.d.EndSession(ctx, m.owner, lamp, "hub"))
				m.end(rt, hub.CommandUnavailable, sent)
				m.current, m.online, m.twin = false, false, m.began()
			},
			"twin": func(rt *rapid.T) {
				x, valid := someSession()
				to := rapid.SampledFrom([]hub.TwinState{hub.TwinSyncing, hub.TwinInSync}).Draw(rt, "state")
				valid = valid && m.online && !m.off
				expect(h.d.SetTwin(ctx, x.stamp(), to), valid)
				if valid {
					m.twin = to
				}
			},
			"local endpoints": func(rt *rapid.T) {
				x, valid := someSession()
				to := rapid.SampledFrom([][]string{nil, {"coap://a"}, {"coap://a", "coaps://a"}}).Draw(rt, "endpoints")
				before := len(h.events(lamp))
				expect(h.d.SetLocalEndpoints(ctx, x.stamp(), to), valid)
				if changed := len(h.events(lamp)) > before; changed != (valid && !slices.Equal(to, m.places)) {
					rt.Fatalf("%q after %q: an event %t", to, m.places, changed)
				}
				if valid {
					m.places = to
				}
			},
			"another process writes": func(rt *rapid.T) {
				if m.owner == "" || len(m.sessions) == 0 {
					rt.Skip("nobody's device, or none that ever signed in")
				}
				h.behind(lamp, hub.Event{
					Kind: hub.ResourceChanged, Href: "/z", Status: hub.StatusOK, Version: m.next("/z"),
					Content: hub.Content{Format: hub.FormatNone, Data: fmt.Append(nil, m.seq)},
				})
				m.set("/z", fmt.Sprint(m.seq))
				if x, valid := someSession(); valid { // a write of ours finds out by the conflict
					v := fmt.Sprint("after ", m.seq)
					h.must(x.notify(value("/a", v)))
					m.set("/a", v)
				} else {
					m.alone()
					h.restart()
					endIndex()
					m.end(rt, hub.CommandUnavailable, sent)
					m.online, m.twin = false, m.began()
				}
			},
			"command": func(rt *rapid.T) {
				o := update(rapid.IntRange(1, 3).Draw(rt, "value"))
				o.Href, o.Force, o.TTL, o.Supersede = href(), true, time.Hour, rapid.Bool().Draw(rt, "supersede")
				if o.Kind = rapid.SampledFrom([]hub.CommandKind{
					hub.CommandUpdate, hub.CommandUpdate, hub.CommandRetrieve, hub.CommandTwinOff, hub.CommandTwinOn, hub.CommandTwinSync,
				}).Draw(rt, "kind"); o.Kind.OfTwin() {
					o.Href = ""
				}
				if m.owner == "" || len(m.commands) == 5 {
					rt.Skip("nobody's device, or enough")
				}
				var x *device
				if m.online {
					x = m.sessions[len(m.sessions)-1]
					x.end.busy.Store(rapid.Bool().Draw(rt, "busy"))
					x.end.window.Store(int32(rapid.IntRange(1, 3).Draw(rt, "window"))) //nolint:gosec // small
				}
				a := &asked{done: make(chan struct{})}
				c := &modelCommand{kind: o.Kind, href: o.Href, asked: a}
				old := func(d *modelCommand) bool { return o.Supersede && !d.bound && d.kind == c.kind && d.href == c.href }
				left := slices.DeleteFunc(slices.Clone(m.commands), old)
				owner, d := m.owner, h.d // both change, and a caller may wait for long
				go func() {
					defer close(a.done)
					a.out, a.err = d.Command(context.Background(), owner, o)
				}()
				var got []hub.Command
				h.eventually("the command is stored", func() bool {
					got = h.device(m.owner, lamp).Commands
					return len(got) == len(left)+1 && !slices.ContainsFunc(m.commands, func(d *modelCommand) bool { return d.id == got[len(left)].ID })
				})
				// Read from the log, it may have been seen a moment before the worker shows it in the state that is in memory.
				h.must(h.d.do(ctx, &request{dev: lamp, op: "test", decide: func(*state, int64) ([]hub.Event, error) { return nil, nil }}))
				m.end(rt, hub.CommandCancelled, old)
				c.id = got[len(got)-1].ID
				// At once only if nothing waits, nothing of its path is out, and the device takes one more.
				c.bound = x != nil && !x.end.busy.Load() && len(m.commands) < int(x.end.window.Load()) &&
					!slices.ContainsFunc(m.commands, func(d *modelCommand) bool { return !d.bound || d.href == c.href })
				m.commands = append(m.commands, c)
				m.count(c)
				if c.bound && x.end.next(rt).ID != c.id {
					rt.Fatal("another command was delivered")
				}
			},
			"take": func(rt *rapid.T) {
				x, valid := someSession()
				n := rapid.IntRange(1, 3).Draw(rt, "most")
				var have []hub.Taken
				var want []string
				busy, wantMore := map[hub.Href]bool{}, false
				if rapid.Bool().Draw(rt, "one has ended otherwise") {
					have = append(have, hub.Taken{ID: "ended", Href: href()})
					busy[have[0].Href] = true
				}
				for _, c := range m.commands {
					if c.bound {
						have = append(have, hub.Taken{ID: c.id, Href: c.href})
						busy[c.href] = true
					}
				}
				for _, c := range m.commands {
					switch {
					case c.bound:
					case len(want) < n && !busy[c.href]:
						want = append(want, c.id)
						busy[c.href] = true
					default:
						busy[c.href], wantMore = true, true
					}
				}
				cs, more, err := h.d.TakeCommands(ctx, hub.Stamp{Device: lamp, Session: x.sess.Number, User: "u"}, have, n)
				expect(err, valid && m.online)
				if err != nil {
					return
				}
				var got []string
				for _, c := range cs {
					got = append(got, c.ID)
				}
				if !slices.Equal(got, want) || more != wantMore {
					rt.Fatalf("taken %q, more wait: %t; want %q, %t", got, more, want, wantMore)
				}
				for _, c := range m.commands {
					c.bound = c.bound || slices.Contains(want, c.id)
				}
			},
			"answer": func(rt *rapid.T) {
				x, valid := someSession()
				var ids []string
				for _, c := range m.commands {
					if c.bound {
						ids = append(ids, c.id)
					}
				}
				ids = append(ids, m.ended...) // late ones, which change nothing
				if len(ids) == 0 {
					rt.Skip("nothing was sent")
				}
				id := rapid.SampledFrom(ids).Draw(rt, "id")
				expect(x.answer(id, "done"), valid)
				expect(h.d.EndCommand(ctx, x.same(), id, hub.Answer{End: hub.CommandCompleted}), valid) // its answer was lost
				if valid {
					m.end(rt, hub.CommandCompleted, func(c *modelCommand) bool {
						if c.id == id {
							m.turn(c.kind)
						}
						return c.id == id
					})
				}
			},
			"cancel": func(rt *rapid.T) {
				if m.owner == "" {
					rt.Skip("nobody's device")
				}
				pick := hub.CommandPick{Twin: rapid.Bool().Draw(rt, "of the twin")}
				if !pick.Twin {
					pick.Href = href()
				}
				mine := func(c *modelCommand) bool { return c.href == pick.Href }
				ids, err := h.d.CancelCommands(ctx, m.owner, lamp, pick, "u", "")
				if found := slices.ContainsFunc(m.commands, mine); found != (err == nil) || !found && !hub.IsKind(err, hub.NotFound) {
					rt.Fatalf("cancelled %q, %v", ids, err)
				}
				m.end(rt, hub.CommandCancelled, mine)
			},
			"expire": func(rt *rapid.T) {
				if len(m.commands) == 0 {
					rt.Skip("nothing waits")
				}
				c := rapid.SampledFrom(m.commands).Draw(rt, "command")
				h.must(h.d.do(ctx, &request{dev: lamp, op: "test", decide: func(s *state, _ int64) ([]hub.Event, error) {
					return []hub.Event{s.ends(s.command(c.id), hub.Answer{End: hub.CommandExpired}, "", "")}, nil
				}}))
				m.end(rt, hub.CommandExpired, func(d *modelCommand) bool { return d == c })
			},
			"restart": func(rt *rapid.T) {
				m.alone()
				h.restart()
				endIndex()
				m.end(rt, hub.CommandUnavailable, sent)
				m.online, m.twin = false, m.began()
			},
			"trim": func(rt *rapid.T) {
				cs := h.commits(lamp)
				if len(cs) == 0 {
					rt.Skip("nothing to trim")
				}
				edge := time.Unix(0, cs[rapid.IntRange(0, len(cs)-1).Draw(rt, "edge")].Time)
				_, err := h.d.trimDevice(ctx, lamp, edge.Add(neverYounger), time.Nanosecond)
				h.must(err)
			},
			"": func(rt *rapid.T) {
				m.check(rt, h)
			},
		})
	})
}

func (m *model) next(href hub.Href) uint64 {
	if _, ok := m.twins[href]; ok {
		return m.versions[href] + m.skips[href] + 1
	}
	return m.loose
}

func (m *model) check(rt *rapid.T, h *house) {
	cs := h.commits(lamp)
	if len(cs) > 0 {
		m.seq = cs[len(cs)-1].Seq
		m.past[m.seq] = m.clone()
	}
	if m.owner == "" {
		for _, o := range []hub.Owner{alice, bob} {
			if _, err := h.d.Device(rt.Context(), o, lamp); !hub.IsKind(err, hub.NotFound) {
				rt.Fatalf("a device of nobody is shown to %s: %v", o, err)
			}
		}
	} else {
		d := h.device(m.owner, lamp)
		m.same(rt, d)
		if c := d.Metadata.Connection; c.Online != m.online || m.online && c.ID != strconv.Itoa(len(m.sessions)-1) {
			rt.Fatalf("connection %+v, online should be %t", c, m.online)
		}
		if got := d.Metadata.Connection.LocalEndpoints; !slices.Equal(got, m.places) {
			rt.Fatalf("local endpoints %q, want %q", got, m.places)
		}
		if d.Metadata.Twin.State != m.twin {
			rt.Fatalf("twin state %d, want %d", d.Metadata.Twin.State, m.twin)
		}
		var waiting []string
		for i, c := range d.Commands {
			waiting = append(waiting, c.ID)
			if i < len(m.commands) && c.Session != 0 != m.commands[i].bound {
				rt.Fatalf("command %s is bound to session %d, should be bound: %t", c.ID, c.Session, m.commands[i].bound)
			}
		}
		var want []string
		for _, c := range m.commands {
			want = append(want, c.id)
		}
		if !slices.Equal(waiting, want) {
			rt.Fatalf("commands %q wait, want %q", waiting, want)
		}
		for to, v := range m.versions {
			if r, ok := d.Resources.Get(to); ok && r.Version != v {
				rt.Fatalf("%s has version %d, want %d", to, r.Version, v)
			}
		}
	}
	// What the log still has can be seen as it was; three places of it each time, chosen by where the log ends.
	for i, c := range cs {
		then := m.past[c.Seq]
		if i != 0 && i != len(cs)-1 && i != int(m.seq*7)%len(cs) || then == nil || i+1 < len(cs) && cs[i+1].Time == c.Time {
			continue // in the middle of a step, or not told apart by its time
		}
		for _, o := range []hub.Owner{alice, bob} {
			d, err := h.d.DeviceAt(rt.Context(), o, lamp, time.Unix(0, c.Time))
			switch {
			case o != then.owner:
				if !hub.IsKind(err, hub.NotFound) {
					rt.Fatalf("seq %d is shown to %s: %v", c.Seq, o, err)
				}
			case err != nil:
				rt.Fatalf("seq %d: %v", c.Seq, err)
			default:
				then.same(rt, d)
			}
		}
	}
	if _, err := Verify(rt.Context(), h.base, func(_ hub.DeviceID, p string) { rt.Errorf("%s", p) }); err != nil {
		rt.Fatal(err)
	}
}

// same compares links and twins.
func (m *model) same(rt *rapid.T, d *hub.Device) {
	links, twins := map[hub.Href]string{}, map[hub.Href]string{}
	for l := range d.Links.All() {
		links[l.Href] = l.Title
	}
	for r := range d.Resources.All() {
		twins[r.Href] = string(r.Content.Data)
	}
	if !d.Labels.Equal(m.labels) {
		rt.Fatalf("seq %d: labels %v, want %v", d.Seq, d.Labels, m.labels)
	}
	if !maps.Equal(links, m.links) || !maps.Equal(twins, m.twins) {
		rt.Fatalf("seq %d: links %v and twins %v, want %v and %v", d.Seq, links, twins, m.links, m.twins)
	}
}

var _ store.Store = (*fake)(nil)
