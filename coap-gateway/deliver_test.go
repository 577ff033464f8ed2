package coapgateway

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"github.com/coaphub/coaphub/hub"
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

func TestCommandsBecomeRequests(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true // the twin asks nothing
	d := h.online(lampID, func(d *device) {
		d.res["/light"] = resource{format: 10000, body: cborOf(t, body{"n": 1}), etag: []byte{0xe7, 1}}
	})
	content := func(c *hub.Command) {
		c.Content = hub.Content{Type: "application/vnd.ocf+cbor", Format: 10000, Data: []byte{0xa0}}
	}
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
	} {
		h.give(test.c)
		a := h.awaitEnd(test.c.ID)
		if a.End != hub.CommandCompleted || a.Status != hub.StatusOK || !bytes.Equal(a.ETag, []byte{0xe7, 1}) || a.Content.Format != 10000 {
			t.Errorf("%s: answer %+v", test.want, a)
		}
		if got := d.asks(); len(got) != i+1 || got[i] != test.want {
			t.Errorf("the device was asked %q, want %q", got, test.want)
		}
	}
}

func TestAnswersOfCommands(t *testing.T) {
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
			d.res["/"+dotted(code)] = resource{code: code, format: hub.FormatText, body: []byte("device says so")}
		}
	})
	for code, want := range answers {
		for i, kind := range []hub.CommandKind{hub.CommandRetrieve, hub.CommandUpdate} {
			id := fmt.Sprint(dotted(code), kind)
			h.give(command(id, kind, hub.Href("/"+dotted(code))))
			if a := h.awaitEnd(id); a.Status != want[i] || a.End != hub.CommandCompleted || string(a.Content.Data) != "device says so" {
				t.Errorf("%s: %+v, want status %d", id, a, want[i])
			}
		}
	}
}

// 4.04 takes the resource out of the directory, before the command ends.
func TestCommandFindsNothing(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true
	h.published("/gone")
	h.online(lampID, nil)
	h.give(command("1", hub.CommandRetrieve, "/gone"))
	if a := h.awaitEnd("1"); a.Status != hub.StatusNotFound {
		t.Errorf("answer %+v", a)
	}
	want := []string{"taken 1", "unpublished /gone", "ended 1 5"}
	if got := slices.DeleteFunc(slices.Clone(h.w.log), func(s string) bool { return strings.HasPrefix(s, "online") || strings.HasPrefix(s, "changed") }); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// What waited goes out in order, one at a time, and a silent resource holds nothing up for ever.
func TestCommandsWaitTheirTurn(t *testing.T) {
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.KeepAlive.Timeout = time.Second })
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
	if got := d.asks(); !slices.Equal(got, []string{"0.02 /light", "0.02 /silent", "0.02 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
	if i, j := slices.Index(h.w.log, "ended 1 1"), slices.Index(h.w.log, "taken 2"); i < 0 || i > j {
		t.Errorf("a command was bound before it could be sent: %q", h.w.log)
	}
}

// A session that is over ends nothing: the directory does, with the session.
func TestCommandOfASessionThatEnds(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true
	d := h.online(lampID, mute)
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

func TestCommandOutOfTime(t *testing.T) {
	h := start(t, nil)
	h.w.off[lampID] = true
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, false) })
	h.give(command("old", hub.CommandUpdate, "/light", func(c *hub.Command) { c.ValidUntil = 1 }), command("new", hub.CommandRetrieve, "/light"))
	h.awaitEnd("new")
	if got := d.asks(); !slices.Equal(got, []string{"0.01 /light"}) {
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

func TestTwinIsSwitched(t *testing.T) {
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
	h.w.dir.take = func(ctx context.Context, from hub.Stamp, have []string, n int) ([]hub.Command, error) {
		h.w.mu.Lock()
		first := away && len(h.w.queue) == 2
		h.w.mu.Unlock()
		if first {
			defer h.w.lock()()
			h.w.queue = slices.Concat(h.w.queue[:1], h.w.queue[1:], []hub.Command{command("3", hub.CommandRetrieve, "/light")})
			return nil, &hub.Error{Kind: hub.Exhausted}
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
	if got := d.asks(); !slices.Equal(got, []string{"0.02 /light", "0.01 /light", "0.01 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
}

// Over UDP a device that has said nothing for sleepAfter is asleep: what it is asked waits for its next message.
func TestCommandsWaitForASleeper(t *testing.T) {
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.SleepAfter = 300 * time.Millisecond })
	h.w.off[lampID] = true
	h.w.own(lampID, "alice")
	conn, err := net.Dial("udp", h.gw.Addresses().PlainUDP)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	send := func(m message.Message) {
		t.Helper()
		buf := make([]byte, 1500)
		n, err := coder.DefaultCoder.Encode(m, buf)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(buf[:n]); err != nil {
			t.Fatal(err)
		}
	}
	receive := func(wait time.Duration) (m message.Message, ok bool) {
		t.Helper()
		buf := make([]byte, 1500)
		_ = conn.SetReadDeadline(time.Now().Add(wait))
		n, err := conn.Read(buf)
		if err != nil {
			return m, false
		}
		m.Options = make(message.Options, 0, 16)
		if _, err := coder.DefaultCoder.Decode(buf[:n], &m); err != nil {
			t.Fatal(err)
		}
		return m, true
	}
	login := cborOf(t, body{"di": string(lampID), "uid": "alice", "accesstoken": h.w.grant("udp", hub.Claims{}), "login": true})
	options := message.Options{{ID: message.URIPath, Value: []byte("oic")}, {ID: message.URIPath, Value: []byte("sec")}, {ID: message.URIPath, Value: []byte("session")}}
	send(message.Message{Type: message.Confirmable, MessageID: 1, Code: codes.POST, Token: []byte{1}, Options: options, Payload: login})
	if m, ok := receive(10 * time.Second); !ok || m.Code != codes.Changed {
		t.Fatalf("sign-in: %v", m)
	}
	h.w.mu.Lock()
	to := h.w.to[lampID]
	h.w.mu.Unlock()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for end := time.Now().Add(10 * time.Second); to.Ready(); {
		if <-poll.C; time.Now().After(end) {
			t.Fatal("a silent device is not asleep")
		}
	}
	h.give(command("1", hub.CommandUpdate, "/light"))
	if m, ok := receive(200 * time.Millisecond); ok {
		t.Fatalf("a sleeper was sent %v", m)
	}
	h.w.mu.Lock()
	if len(h.w.queue) != 1 {
		t.Error("the command was bound to the session, where it would be lost")
	}
	h.w.mu.Unlock()
	send(message.Message{Type: message.Confirmable, MessageID: 2, Code: codes.Empty}) // a ping (RFC 7252, Section 4.3)
	for {
		m, ok := receive(10 * time.Second)
		if !ok {
			t.Fatal("the device woke and was asked nothing")
		}
		if m.Code == codes.POST {
			send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID, Code: codes.Changed, Token: m.Token})
			break
		}
	}
	if a := h.awaitEnd("1"); a.Status != hub.StatusOK {
		t.Errorf("answer %+v", a)
	}
}
