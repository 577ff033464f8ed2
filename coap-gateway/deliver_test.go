package coapgateway

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

func command(id string, kind hub.CommandKind, href hub.Href, change ...func(*hub.Command)) hub.Command {
	c := hub.Command{
		CommandEvent: hub.CommandEvent{Kind: kind, ValidUntil: time.Now().Add(time.Minute).UnixNano()}, Device: lampID, ID: id, Href: href,
		Content: hub.Content{Format: hub.FormatNone},
	}
	for _, f := range change {
		f(&c)
	}
	return c
}

// give puts commands where the directory has them and wakes the session.
func (h *hall) give(cs ...hub.Command) {
	h.t.Helper()
	unlock := h.w.lock()
	h.w.queue = append(h.w.queue, cs...)
	to := h.w.to[lampID]
	unlock()
	if to != nil {
		to.Wake()
	}
}

func (h *hall) awaitEnd(id string) hub.Answer {
	h.t.Helper()
	var a hub.Answer
	h.w.await(h.t, "the end of command "+id, func() (ok bool) { a, ok = h.w.ends[id]; return ok })
	return a
}

// commands returns what the device was asked, but for where it is, which every device is asked.
func (d *device) commands() []string {
	return slices.DeleteFunc(d.asks(), func(s string) bool { return s == "0.01 /oic/res ?if=oic.if.ll ?rt=oic.wk.d" })
}

func TestCommandsBecomeRequests(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true // the twin asks nothing
	d := h.online(lampID, func(d *device) {
		d.res["/light"] = resource{format: 10000, body: cborOf(t, body{"n": 1}), etag: []byte{0xe7, 1}}
	})
	content := func(c *hub.Command) {
		c.Content = hub.Content{Type: "application/vnd.ocf+cbor", Format: 10000, Data: []byte{0xa0}}
	}
	method := func(m uint8) func(*hub.Command) { return func(c *hub.Command) { c.Code = m } }
	iface := func(c *hub.Command) { c.Interface = "oic.if.rw" }
	for i, test := range []struct {
		c    hub.Command
		want string
	}{
		{command("0", hub.CommandRetrieve, "/light"), "0.01 /light"},
		{command("1", hub.CommandRetrieve, "/light", iface, func(c *hub.Command) { c.ETags = [][]byte{{1}, {0xe7, 2}} }), "0.01 /light etag=01 etag=e702 ?if=oic.if.rw"},
		{command("2", hub.CommandUpdate, "/light", content), "0.02 /light"},
		{command("3", hub.CommandUpdate, "/light", content, iface), "0.02 /light ?if=oic.if.rw"},
		{command("4", hub.CommandCreate, "/light", content), "0.02 /light ?if=oic.if.create"},
		{command("5", hub.CommandDelete, "/light"), "0.04 /light"},
		{command("6", hub.CommandDelete, "/light", iface), "0.04 /light ?if=oic.if.rw"},
		{command("condition", hub.CommandUpdate, "/light", content, iface, func(c *hub.Command) { c.IfMatch = [][]byte{{1, 2}, nil} }), "0.02 /light if-match=0102 if-match= ?if=oic.if.rw"},
		// RFC 8132
		{command("7", hub.CommandRetrieve, "/light", content, method(hub.MethodFetch)), "0.05 /light"},
		{command("8", hub.CommandUpdate, "/light", content, method(hub.MethodPatch), iface), "0.06 /light ?if=oic.if.rw"},
		{command("9", hub.CommandUpdate, "/light", content, method(hub.MethodIPatch)), "0.07 /light"},
	} {
		h.give(test.c)
		a := h.awaitEnd(test.c.ID)
		if a.End != hub.CommandCompleted || a.Status != hub.StatusOK || a.Code != 0x45 || !bytes.Equal(a.ETag, []byte{0xe7, 1}) || a.Content.Format != 10000 {
			t.Errorf("%s: answer %+v", test.want, a)
		}
		if got := d.commands(); len(got) != i+1 || got[i] != test.want {
			t.Errorf("the device was asked %q, want %q", got, test.want)
		}
	}
}

func TestAnswersOfCommands(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	answers := map[codes.Code][2]hub.Status{ // of a retrieve, of an update
		codes.Created: {hub.StatusCreated, hub.StatusCreated}, codes.Deleted: {hub.StatusOK, hub.StatusOK}, codes.Changed: {hub.StatusOK, hub.StatusOK},
		codes.Valid:      {hub.StatusNotModified, hub.StatusAccepted},
		codes.BadRequest: {hub.StatusBadRequest, hub.StatusBadRequest}, codes.Unauthorized: {hub.StatusUnauthorized, hub.StatusUnauthorized},
		codes.Forbidden: {hub.StatusForbidden, hub.StatusForbidden}, codes.MethodNotAllowed: {hub.StatusMethodNotAllowed, hub.StatusMethodNotAllowed},
		codes.NotAcceptable: {hub.StatusError, hub.StatusError}, codes.InternalServerError: {hub.StatusError, hub.StatusError},
		codes.NotImplemented:     {hub.StatusNotImplemented, hub.StatusNotImplemented},
		codes.ServiceUnavailable: {hub.StatusUnavailable, hub.StatusUnavailable},
	}
	h.online(lampID, func(d *device) {
		for code := range answers {
			d.res["/"+coap.Dotted(code)] = resource{code: code, format: hub.FormatText, body: []byte("device says so")}
		}
	})
	for code, want := range answers {
		for i, kind := range []hub.CommandKind{hub.CommandRetrieve, hub.CommandUpdate} {
			id := fmt.Sprint(coap.Dotted(code), kind)
			h.give(command(id, kind, hub.Href("/"+coap.Dotted(code))))
			if a := h.awaitEnd(id); a.Status != want[i] || a.End != hub.CommandCompleted || string(a.Content.Data) != "device says so" {
				t.Errorf("%s: %+v, want status %d", id, a, want[i])
			}
		}
	}
}

// A device that knows no conditions refuses a command with one (RFC 7252, Section 5.4.1), which is another matter than that it
// does not fulfil it.
func TestAnswersToConditions(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	h.online(lampID, func(d *device) {
		d.res["/unknown"], d.res["/missed"] = resource{code: codes.BadOption}, resource{code: codes.PreconditionFailed}
	})
	condition := func(c *hub.Command) { c.IfMatch = [][]byte{{1}} }
	for _, test := range []struct {
		c      hub.Command
		status hub.Status
		code   uint8
	}{
		{command("1", hub.CommandUpdate, "/unknown", condition), hub.StatusNotImplemented, 0x82},
		{command("2", hub.CommandUpdate, "/unknown"), hub.StatusError, 0x82},
		{command("3", hub.CommandDelete, "/missed", condition), hub.StatusError, 0x8c},
	} {
		h.give(test.c)
		if a := h.awaitEnd(test.c.ID); a.End != hub.CommandCompleted || a.Status != test.status || a.Code != test.code {
			t.Errorf("command %s: answer %+v", test.c.ID, a)
		}
	}
}

// 4.04 takes the resource out of the directory, before the command ends.
func TestCommandFindsNothing(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	h.published("/gone")
	h.online(lampID, nil)
	h.give(command("1", hub.CommandRetrieve, "/gone"))
	if a := h.awaitEnd("1"); a.Status != hub.StatusNotFound {
		t.Errorf("answer %+v", a)
	}
	want := []string{"taken 1", "unpublished /gone", "ended 1 5"}
	if got := slices.DeleteFunc(h.w.soFar(), func(s string) bool { return strings.HasPrefix(s, "online") || strings.HasPrefix(s, "changed") }); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// What waited goes out in order, one at a time, and a silent resource holds nothing up for ever.
func TestCommandsWaitTheirTurn(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.KeepAlive.Timeout = 3 * time.Second })
	h.w.off[lampID] = true
	h.w.queue = []hub.Command{command("1", hub.CommandUpdate, "/light"), command("2", hub.CommandUpdate, "/silent"), command("3", hub.CommandUpdate, "/light")}
	d := h.online(lampID, func(d *device) {
		d.res["/light"], d.res["/silent"] = value(t, 1, false), resource{silent: true}
	})
	h.awaitEnd("3")
	if a := h.awaitEnd("2"); a.End != hub.CommandUnavailable {
		t.Errorf("a command without an answer ended with %+v", a)
	}
	if a := h.awaitEnd("1"); a.Status != hub.StatusOK {
		t.Errorf("the first ended with %+v", a)
	}
	if got := d.commands(); !slices.Equal(got, []string{"0.02 /light", "0.02 /silent", "0.02 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
	log := h.w.soFar()
	if i, j := slices.Index(log, "ended 1 1"), slices.Index(log, "taken 2"); i < 0 || i > j {
		t.Errorf("a command was bound before it could be sent: %q", log)
	}
}

// A device that answers something else while a command is out has more than one at once, never two for one resource, each of
// which are in order. So a resource that never answers holds up nothing but what is for itself, and nothing is bound to the
// session that cannot go out.
func TestCommandsAtOnce(t *testing.T) {
	t.Parallel()
	silence(t, 10, func(h *hall, _ *quiet) {
		h.w.off[lampID] = true
		for i, href := range []hub.Href{"/never", "/never", "/a", "/b", "/a", "/c"} {
			h.w.queue = append(h.w.queue, command(fmt.Sprint(i+1), hub.CommandUpdate, href))
		}
	}, func(t *testing.T, w *world, q *quiet) {
		// is says what the device was asked so far, in any order of what went out at once, and what waits in the directory.
		is := func(posts, waiting string) {
			t.Helper()
			got, _ := q.asking()
			slices.Sort(got)
			var left []string
			w.mu.Lock()
			for _, c := range w.queue {
				left = append(left, c.ID)
			}
			w.mu.Unlock()
			if strings.Join(got, " ") != posts || strings.Join(left, " ") != waiting {
				t.Fatalf("the device was asked %q and %q wait, want %s and %s; %q", got, left, posts, waiting, w.soFar())
			}
		}
		after(tryBeside - time.Millisecond)
		is("/never", "2 3 4 5 6")
		after(time.Millisecond)
		is("/a /b /c /never", "2 5") // four, of which more than one may be no more
		w.mu.Lock()
		to := w.to[lampID]
		w.mu.Unlock()
		if to.Ready("/d", []string{"1", "3", "4", "6"}) {
			t.Error("a fifth could be sent")
		}
		q.answer("/b")
		if a := (&hall{t: t, w: w}).awaitEnd("4"); a.Status != hub.StatusOK {
			t.Fatalf("ended with %+v", a)
		}
		is("/a /b /c /never", "2 5")
		for _, test := range []struct {
			href  hub.Href
			bound []string
			want  bool
		}{
			{"/d", []string{"1", "3", "6"}, true},
			{"/d", []string{"1", "3"}, true}, // one was cancelled, and is out all the same
			{"/a", []string{"1", "6"}, false},
			{"/d", []string{"1", "3", "6", "just now"}, false},
			{"/d", []string{"1", "3", "just now"}, false},
		} {
			if got := to.Ready(test.href, test.bound); got != test.want {
				t.Errorf("ready for %s beside %q: %t", test.href, test.bound, got)
			}
		}
		seventh := command("7", hub.CommandUpdate, "/d")
		to.Deliver(seventh)
		to.Deliver(seventh) // it was asked for at the same time
		synctest.Wait()
		is("/a /b /c /d /never", "2 5")
		q.answer("/a")
		is("/a /a /b /c /d /never", "2")
		for _, href := range []string{"/c", "/d", "/a"} {
			q.answer(href)
		}
		is("/a /a /b /c /d /never", "2")
		after(20 * time.Second)
		w.mu.Lock()
		if w.ends["1"].End != hub.CommandUnavailable || len(w.ends) != 6 {
			t.Errorf("ended %v", w.ends)
		}
		w.mu.Unlock()
		is("/a /a /b /c /d /never /never", "")
		q.answer("/never")
	})
}

// A command ends just when the directory says that all others wait for it.
func TestCommandEndsWhileOthersAreAskedFor(t *testing.T) {
	t.Parallel()
	var hold chan struct{} // of the bubble
	silence(t, 10, func(h *hall, _ *quiet) {
		h.w.off[lampID] = true
		for i, href := range []hub.Href{"/never", "/a", "/a"} {
			h.w.queue = append(h.w.queue, command(fmt.Sprint(i+1), hub.CommandUpdate, href))
		}
		hold = make(chan struct{})
		take := h.w.dir.take
		h.w.dir.take = func(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) ([]hub.Command, bool, error) {
			cs, more, err := take(ctx, from, have, n)
			if len(cs) == 0 && more {
				<-hold
			}
			return cs, more, err
		}
	}, func(t *testing.T, w *world, q *quiet) {
		after(tryBeside)
		q.answer("/a")
		close(hold)
		synctest.Wait()
		if got, _ := q.asking(); !slices.Equal(got, []string{"/never", "/a", "/a"}) {
			t.Errorf("asked %q; %q", got, w.soFar())
		}
	})
}

// One that answers everything in order has one command at a time, and loses none that it did not get.
func TestCommandsOneAtATime(t *testing.T) {
	t.Parallel()
	silence(t, 10, func(h *hall, q *quiet) {
		h.w.off[lampID], q.serial = true, true
		for i, href := range []hub.Href{"/a", "/b", "/c", "/a", "/b", "/c"} {
			h.w.queue = append(h.w.queue, command(fmt.Sprint(i+1), hub.CommandUpdate, href))
		}
	}, func(t *testing.T, w *world, q *quiet) {
		for i := range 6 {
			after(3 * time.Second)
			posts, open := q.asking()
			w.mu.Lock()
			waiting, to := len(w.queue), w.to[lampID]
			w.mu.Unlock()
			if open != 1 || len(posts) != i+1 || waiting != 5-i || to.Ready("/d", nil) {
				t.Fatalf("asked %q, %d are open, %d wait", posts, open, waiting)
			}
			if i < 5 { // the last is lost with the session
				q.answer(posts[i])
			}
		}
		if n := len(q.times("/oic/res")); n != maxTries { // beside the first commands
			t.Errorf("it was asked %d other things", n)
		}
	})
}

// A device whose twin is off is asked where it is when nothing else is for it, and holds up what comes then for a short time if
// it does not answer.
func TestCommandsBeforeTheQuestionWhere(t *testing.T) {
	t.Parallel()
	silence(t, 10, func(h *hall, q *quiet) {
		h.w.off[lampID], q.silent["/oic/res"] = true, true
		h.w.queue = []hub.Command{command("1", hub.CommandUpdate, "/a"), command("2", hub.CommandUpdate, "/a")}
	}, func(t *testing.T, w *world, q *quiet) {
		synctest.Wait()
		for range 2 {
			if _, open := q.asking(); open != 1 || len(q.times("/oic/res")) != 0 {
				t.Fatalf("%d commands are out, and the question %d times", open, len(q.times("/oic/res")))
			}
			q.answer("/a")
		}
		if len(q.times("/oic/res")) != 1 {
			t.Fatal("the device was not asked where it is")
		}
		(&hall{t: t, w: w}).give(command("3", hub.CommandUpdate, "/a"))
		after(noReaction - time.Millisecond)
		if _, open := q.asking(); open != 0 {
			t.Fatal("the device has two requests")
		}
		after(time.Millisecond)
		if _, open := q.asking(); open != 1 || len(q.times("/oic/res")) != 1 {
			t.Errorf("%d commands are out, and the question %d times", open, len(q.times("/oic/res")))
		}
		q.answer("/a")
	})
}

// Over DTLS a device needs both: four answers without a retransmission (RFC 7252, Section 4.7), and one beside a command.
func TestCommandsAtOnceOverDatagrams(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		published []string
		second    bool
	}{
		"proved":     {[]string{"/1*", "/2*", "/3*", "/4*"}, true},
		"not proved": {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			doze(t, test.published, nil, func(d *dozer) {
				d.busy["/slow"] = true
				d.w.off[lampID] = !test.second // else the twin asks enough
			}, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
				h := &hall{t: t, w: w}
				after(time.Second)
				h.give(command("1", hub.CommandUpdate, "/slow"), command("2", hub.CommandUpdate, "/slow"), command("3", hub.CommandUpdate, "/light"))
				after(2 * time.Second)
				w.mu.Lock() // what ends when all is over races with reading it
				_, ended := w.ends["3"]
				w.mu.Unlock()
				if ended != test.second {
					t.Errorf("the second ended: %t; asked %q; %q", ended, d.heardOf(), w.soFar())
				}
				after(20 * time.Second)
				if a := h.awaitEnd("1"); a.End != hub.CommandUnavailable {
					t.Errorf("the first ended with %+v", a)
				}
			})
		})
	}
}

// A device that proved to take more than one command and is away by now loses one all the same: the next goes out when it has
// said something since, be it that it got the one before.
func TestCommandsAtOnceFindNobody(t *testing.T) {
	t.Parallel()
	var all []string // so many questions that it may have three
	for i := range 12 {
		all = append(all, fmt.Sprintf("/%d*", i))
	}
	for name, away := range map[string]time.Duration{"for long": 10 * time.Minute, "for a second": time.Second} {
		t.Run(name, func(t *testing.T) {
			slow := func(d *dozer) { d.busy["/slow"], d.busy["/slower"] = true, true }
			doze(t, all, nil, slow, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
				h := &hall{t: t, w: w}
				after(time.Second)
				h.give(command("1", hub.CommandUpdate, "/slow"), command("2", hub.CommandUpdate, "/slower"), command("light", hub.CommandUpdate, "/light"))
				after(2 * time.Second)
				w.mu.Lock()
				if w.ends["light"].Status != hub.StatusOK || len(w.ends) != 1 {
					t.Errorf("beside two that it got the device answered %+v", w.ends)
				}
				w.mu.Unlock()
				after(time.Minute)
				d.ask(get("/oic/rd", 2)) // it answered neither of them
				after(time.Second)
				d.sleep()
				long := func(c *hub.Command) { c.ValidUntil = time.Now().Add(time.Hour).UnixNano() }
				h.give(command("3", hub.CommandUpdate, "/a", long), command("4", hub.CommandUpdate, "/b", long), command("5", hub.CommandUpdate, "/c", long))
				after(away)
				w.mu.Lock()
				first, ended := w.ends["3"]
				to, waiting := w.to[lampID], len(w.queue)
				w.mu.Unlock()
				if waiting != 2 || to.Ready("/d", nil) {
					t.Errorf("%d wait", waiting)
				}
				if lost := away > time.Minute; ended != lost || lost && first.End != hub.CommandUnavailable {
					t.Errorf("the first ended: %t, %+v", ended, first)
				}
				d.set(func() { d.asleep = false }) // at the same address, where nothing has to be proved first
				d.ask(get("/oic/rd", 2))
				synctest.Wait()
				w.mu.Lock()
				defer w.mu.Unlock()
				if w.ends["4"].Status != hub.StatusOK || w.ends["5"].Status != hub.StatusOK {
					t.Errorf("when it spoke again it answered %+v", w.ends)
				}
			})
		})
	}
}

// A session that is over ends nothing: the directory does, with the session.
func TestCommandOfASessionThatEnds(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	d := h.online(lampID, func(d *device) { d.res["/light"] = resource{silent: true} })
	h.give(command("1", hub.CommandUpdate, "/light"), command("2", hub.CommandUpdate, "/light"))
	d.awaitAsked("0.02 /light")
	_ = d.conn.Close()
	h.w.awaitLog(t, "offline "+string(lampID))
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if len(h.w.ends) != 0 || len(h.w.queue) != 1 {
		t.Errorf("ended %v, left %v", h.w.ends, h.w.queue)
	}
}

// A connection that is being closed takes no more commands, although its session is not over before its work is: those that
// wait go to the next session.
func TestCommandsOfAConnectionThatCloses(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	busy, release := make(chan struct{}), make(chan struct{})
	publish := h.w.dir.publish
	h.w.dir.publish = func(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error) {
		close(busy)
		<-release
		return publish(ctx, from, links)
	}
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, false) })
	var answered sync.WaitGroup
	answered.Go(func() {
		_, _ = d.try(codes.POST, "/oic/rd", cborOf(t, body{"di": string(lampID), "ttl": 0, "links": []body{{"href": "/light"}}}))
	}) // its end
	<-busy
	h.w.mu.Lock()
	to := h.w.to[lampID].(*deliverer)
	h.w.mu.Unlock()
	to.Close("deleted")
	h.give(command("1", hub.CommandUpdate, "/light"), command("2", hub.CommandUpdate, "/light"))
	to.box.done.Wait()
	h.w.mu.Lock()
	if len(h.w.queue) != 2 || len(h.w.ends) != 0 {
		t.Errorf("%d commands wait, ended %v", len(h.w.queue), h.w.ends)
	}
	h.w.mu.Unlock()
	if to.Ready("/light", nil) {
		t.Error("a connection that closes is ready for commands")
	}
	close(release)
	h.w.awaitLog(t, "offline "+string(lampID))
	answered.Wait()
}

func TestCommandOutOfTime(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, false) })
	h.give(command("old", hub.CommandUpdate, "/light", func(c *hub.Command) { c.ValidUntil = 1 }), command("new", hub.CommandRetrieve, "/light"))
	h.awaitEnd("new")
	if got := d.commands(); !slices.Equal(got, []string{"0.01 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
}

// Contents that cannot be had end the command with the device's fault; the session lives.
func TestCommandWithAnAnswerThatIsTooLarge(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true
	h.online(lampID, func(d *device) {
		d.res["/large"] = resource{format: 42, body: make([]byte, hub.MaxContent+1)}
		d.res["/light"] = value(t, 1, false)
	})
	h.give(command("large", hub.CommandRetrieve, "/large"), command("path", hub.CommandRetrieve, hub.Href("/"+strings.Repeat("x", 256))),
		command("small", hub.CommandRetrieve, "/light"))
	if a := h.awaitEnd("large"); a.Status != hub.StatusError || len(a.Content.Data) == 0 {
		t.Errorf("answer %+v", a)
	}
	if a := h.awaitEnd("path"); a.Status != hub.StatusBadRequest {
		t.Errorf("answer %+v", a)
	}
	if a := h.awaitEnd("small"); a.Status != hub.StatusOK {
		t.Errorf("answer %+v", a)
	}
}

// An answer that is not what it says ends the command with the device's fault; the session goes on.
func TestCommandWithAnAnswerThatIsGarbage(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	garbage := map[hub.Href]resource{
		"/cbor": {format: hub.FormatCBOR, body: []byte("\xbf\x61")}, "/ocf": {format: hub.FormatOCFCBOR, body: []byte("\xa1\x61")},
		"/json": {format: hub.FormatJSON, body: []byte("{nope")},
	}
	h.online(lampID, func(d *device) {
		for href, r := range garbage {
			d.res[string(href)] = r
		}
		d.res["/light"] = value(t, 1, false)
	})
	for href := range garbage {
		for _, kind := range []hub.CommandKind{hub.CommandRetrieve, hub.CommandUpdate} {
			id := fmt.Sprint(href, kind)
			h.give(command(id, kind, href))
			if a := h.awaitEnd(id); a.End != hub.CommandCompleted || a.Status != hub.StatusError || !strings.Contains(string(a.Content.Data), "content format") {
				t.Errorf("%s: answer %+v", id, a)
			}
		}
	}
	h.give(command("good", hub.CommandRetrieve, "/light"))
	if a := h.awaitEnd("good"); a.Status != hub.StatusOK {
		t.Errorf("answer %+v", a)
	}
}

func TestTwinIsSwitched(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*")
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, true) })
	h.w.awaitLog(t, "twin 3")
	h.give(command("off", hub.CommandTwinOff, ""))
	h.awaitEnd("off")
	d.awaitAsked("0.01 /light observe=1")
	// Whatever still comes is not stored, and nothing new is observed.
	d.want(d.publish("/light*", "/late*"), "2.04", "")
	n := len(d.asks())
	h.give(command("on", hub.CommandTwinOn, ""))
	h.w.await(t, "a second IN_SYNC", func() bool { return strings.Count(strings.Join(h.w.log, "\n"), "twin 3") == 2 })
	if got := d.asks()[n:]; !slices.Contains(got, "0.01 /light observe=0") {
		t.Errorf("after it was switched on the hub asked %q", got)
	}
	h.give(command("on", hub.CommandTwinOn, ""), command("sync", hub.CommandTwinSync, ""))
	h.w.await(t, "a third IN_SYNC", func() bool { return strings.Count(strings.Join(h.w.log, "\n"), "twin 3") == 3 })
	got := d.asks()
	if i, j := lastIndex(got, "0.01 /light observe=1"), lastIndex(got, "0.01 /light observe=0"); i < 0 || i > j {
		t.Errorf("the hub asked %q", got)
	}
}

func lastIndex(all []string, s string) int {
	for i := range all {
		if at := len(all) - 1 - i; all[at] == s {
			return at
		}
	}
	return -1
}

// A command that ended while the twin was being switched leaves it as the directory says.
func TestTwinCommandThatEndedMeanwhile(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*")
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, true) })
	h.w.awaitLog(t, "twin 3")
	h.give(command("off, in vain", hub.CommandTwinOff, ""))
	h.awaitEnd("off, in vain")
	h.w.await(t, "a second IN_SYNC", func() bool { return strings.Count(strings.Join(h.w.log, "\n"), "twin 3") == 2 })
	d.notify("/light", codes.Content, 10000, cborOf(t, body{"n": 5}), nil)
	h.awaitValue("/light", 5)
}

// An answer that cannot be stored is told again until it is: the device is not asked twice.
func TestCommandWhileTheDirectoryIsAway(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID] = true
	away := true
	end, take := h.w.dir.end, h.w.dir.take
	h.w.dir.end = func(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error {
		h.w.mu.Lock()
		if away {
			h.w.mu.Unlock()
			return &hub.Error{Kind: hub.Unavailable}
		}
		h.w.mu.Unlock()
		return end(ctx, from, id, a)
	}
	h.w.dir.take = func(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) ([]hub.Command, bool, error) {
		h.w.mu.Lock()
		first := away && len(h.w.queue) == 2
		h.w.mu.Unlock()
		if first {
			defer h.w.lock()()
			h.w.queue = slices.Concat(h.w.queue[:1], h.w.queue[1:], []hub.Command{command("3", hub.CommandRetrieve, "/light")})
			return nil, false, &hub.Error{Kind: hub.Exhausted}
		}
		return take(ctx, from, have, n)
	}
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, false) })
	h.give(command("1", hub.CommandUpdate, "/light"), command("2", hub.CommandRetrieve, "/light"))
	d.awaitAsked("0.02 /light")
	unlock := h.w.lock()
	away = false
	unlock()
	h.awaitEnd("3")
	if got := d.commands(); !slices.Equal(got, []string{"0.02 /light", "0.01 /light", "0.01 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
}

// What a device that sleeps is asked waits for its next message, and is bound to no session before; also when its twin is off.
func TestCommandsWaitForASleeper(t *testing.T) {
	t.Parallel()
	for _, twin := range []string{"on", "off"} {
		t.Run("twin "+twin, func(t *testing.T) {
			doze(t, []string{"/light*"}, nil, func(d *dozer) {
				d.w.off[lampID] = twin == "off"
				d.w.contacts[lampID] = hub.Contact{Interval: time.Hour, Next: time.Now().UnixNano()}
			}, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
				h := &hall{t: t, w: w}
				after(openFor + time.Second)
				if w.to[lampID].Ready("/light", nil) {
					t.Fatal("a silent device is not asleep")
				}
				d.sleep()
				long := func(c *hub.Command) { c.ValidUntil = time.Now().Add(time.Hour).UnixNano() }
				h.give(command("1", hub.CommandUpdate, "/light", long), command("2", hub.CommandUpdate, "/light", long))
				after(30 * time.Minute)
				if n := d.missedSoFar(); n != 0 {
					t.Errorf("a sleeper was sent %d messages", n)
				}
				if len(w.queue) != 2 {
					t.Error("a command was bound to the session, where it would be lost")
				}
				d.wake()
				d.ask(get("/oic/rd", 2))
				synctest.Wait()
				got := slices.DeleteFunc(d.heardOf(), func(s string) bool { return s != "update /light" })
				if len(got) != 2 || w.ends["1"].Status != hub.StatusOK || w.ends["2"].Status != hub.StatusOK {
					t.Errorf("the device woke and was asked %q; %v", got, w.ends)
				}
				if i, j := slices.Index(w.log, "ended 1 1"), slices.Index(w.log, "taken 2"); i < 0 || i > j {
					t.Errorf("a command was bound before it could be sent: %q", w.log)
				}
				if got := w.count("sleeps 1h0m0s"); got != 2 {
					t.Errorf("the directory was told %d times when the device is expected, want at each wake: %q", got, w.log)
				}
			})
		})
	}
}

// A device that was not known to sleep loses one command: it is asked for a sign of life before it is given another, ever more
// rarely. A command whose time was too short for an answer says nothing about it.
func TestCommandsFindNobody(t *testing.T) {
	t.Parallel()
	doze(t, nil, nil, func(d *dozer) { d.w.off[lampID] = true }, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		h := &hall{t: t, w: w}
		d.sleep()
		short := func(c *hub.Command) { c.ValidUntil = time.Now().Add(time.Second).UnixNano() }
		for _, id := range []string{"a", "b", "c"} {
			h.give(command(id, hub.CommandUpdate, "/light", short))
			after(10 * time.Second)
			if w.ends[id].End != hub.CommandUnavailable || !w.to[lampID].Ready("/light", nil) {
				t.Fatalf("a command in vain ended with %+v", w.ends[id])
			}
		}
		long := func(c *hub.Command) { c.ValidUntil = time.Now().Add(24 * time.Hour).UnixNano() }
		h.give(command("1", hub.CommandUpdate, "/light", long), command("2", hub.CommandUpdate, "/light", long), command("3", hub.CommandUpdate, "/light", long))
		after(3 * time.Hour)
		if w.ends["1"].End != hub.CommandUnavailable || len(w.queue) != 2 || w.to[lampID].Ready("/light", nil) {
			t.Fatalf("after a command in vain: %v, %d wait", w.ends, len(w.queue))
		}
		if n := d.missedSoFar(); n > 80 { // at most five transmissions of each
			t.Errorf("it was sent %d messages", n)
		}
		d.set(func() { d.asleep = false }) // it says nothing by itself
		after(askAgain[len(askAgain)-1] + time.Minute)
		if w.ends["2"].Status != hub.StatusOK || w.ends["3"].Status != hub.StatusOK {
			t.Errorf("the device was not asked for a sign of life: %v", w.ends)
		}
		if i, j := slices.Index(d.heardOf(), "/oic/res"), slices.Index(d.heardOf(), "update /light"); i < 0 || i > j {
			t.Errorf("it was asked %q", d.heardOf())
		}
		// Once more, but now it speaks first.
		d.sleep()
		d.set(func() { d.asked = nil })
		h.give(command("4", hub.CommandUpdate, "/light", long), command("5", hub.CommandUpdate, "/light", long))
		after(2 * time.Hour)
		d.wake()
		d.ask(get("/oic/rd", 2))
		synctest.Wait()
		if w.ends["4"].End != hub.CommandUnavailable || w.ends["5"].Status != hub.StatusOK || !slices.Equal(d.heardOf(), []string{"update /light"}) {
			t.Errorf("the device spoke and was asked %q; %v", d.heardOf(), w.ends)
		}
	})
}
