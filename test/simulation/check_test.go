package simulation

import (
	"context"
	"slices"
	"time"

	resourcedirectory "github.com/coaphub/coaphub/resource-directory"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/mongostore"
)

// look asks the parts, all of which are well, what they know.
func (w *world) look(last []*session, gone *process) {
	for i, d := range w.devices {
		s := last[i]
		if s == nil {
			w.wrong("device %s could not have a last session", d.id)
			continue
		}
		g := w.gateway(w.chance)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		got, err := g.client.Device(ctx, d.ownership().Owner, d.id)
		cancel()
		if err != nil {
			w.wrong("device %s cannot be read: %v", d.id, err)
			continue
		}
		for _, at := range w.slots[:2] {
			if x, err := at.process().dir.Device(context.Background(), d.ownership().Owner, d.id); err == nil {
				w.tell("%s: seq %d at %s, which serves %d", d.id[len(d.id)-1:], x.Seq, at.process().name, at.process().dir.Partitions())
			}
		}
		online := s.g != gone
		switch c := got.Metadata.Connection; {
		case c.Online != online:
			w.wrong("device %s is shown online: %t", d.id, c.Online)
		case online && s.over():
			w.wrong("the last session of device %s was closed", d.id)
		case online && c.ID != s.conn.ID:
			w.wrong("device %s is shown on the connection %s, it is on %s", d.id, c.ID, s.conn.ID)
		}
		if len(got.Commands) > 0 {
			w.wrong("commands of device %s never end: %+v", d.id, got.Commands)
		}
		newest := map[hub.Href]*note{}
		for _, n := range d.notes {
			if !n.link && n.session == s.sess.Number {
				newest[n.href] = n
			}
		}
		for _, href := range hrefs {
			r, is := got.Resources.Get(href)
			if n := newest[href]; !is || string(r.Content.Data) != `"`+n.value+`"` {
				w.wrong("the twin of %s %s is not %s, which the device said last: %+v", d.id, href, n.value, r)
			}
		}
	}
}

// check looks at everything that is stored, after all processes have ended.
func (w *world) check() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	p := w.net.path(w.serveMongo)
	st, err := mongostore.Open(ctx, w.database(p), mongostore.Options{
		HubID: hubID, ClusterSecret: secret, Feed: &view{w.feed, w.net.path(w.serveNATS)}, Name: "check",
	})
	if err != nil {
		w.wrong("the store does not open: %v", err)
		return
	}
	defer func() { _ = st.Close() }()
	if _, err := resourcedirectory.Verify(ctx, st, func(dev hub.DeviceID, problem string) { w.wrong("device %s: %s", dev, problem) }); err != nil {
		w.wrong("verify: %v", err)
	}
	fed := map[[16]byte]bool{}
	for _, e := range w.feed.all {
		fed[e.Commit.ID] = true
	}
	owned := map[hub.Owner]map[hub.DeviceID][]uint64{}
	for _, o := range owners {
		owned[o] = map[hub.DeviceID][]uint64{}
	}
	ends := map[string][]hub.CommandEnd{} // of commands, by content
	for _, d := range w.devices {
		l := &log{w: w, d: d, values: map[string]int{}, stored: map[string]uint64{}, bound: map[string]uint64{}, texts: map[string]string{}, begun: map[string]bool{}, ended: map[string]bool{}, ends: ends}
		for c, err := range st.Commits(ctx, d.id, 0) {
			if err != nil {
				w.wrong("device %s cannot be read: %v", d.id, err)
				break
			}
			w.tell("%s: commit %d of %s at %.4f", d.id[len(d.id)-1:], c.Seq, c.Writer, time.Unix(0, c.Time).Sub(w.begun).Seconds())
			if !fed[c.ID] {
				w.wrong("commit %d of device %s is not in the feed", c.Seq, d.id)
			}
			delete(fed, c.ID)
			owned[c.Owner][d.id] = append(owned[c.Owner][d.id], c.Seq)
			l.commit(&c)
		}
		l.end()
	}
	if len(fed) > 0 {
		w.wrong("%d commits are in the feed and not in the log", len(fed))
	}
	for _, s := range w.subs {
		got := map[hub.DeviceID][]uint64{}
		for _, c := range s.got {
			got[c.Device] = append(got[c.Device], c.Seq)
		}
		for dev, seqs := range owned[s.owner] {
			if !slices.Equal(got[dev], seqs) {
				w.wrong("the subscriber of %s was told %v of device %s, it has %v", s.owner, got[dev], dev, seqs)
			}
			delete(got, dev)
		}
		for dev, seqs := range got {
			w.wrong("the subscriber of %s was told %v of device %s, which is not theirs", s.owner, seqs, dev)
		}
	}
	for _, o := range w.orders {
		said := o.out.End
		if o.err != nil {
			said = hub.CommandExpired
		}
		if o.done && !slices.Contains(ends[o.text], said) {
			w.wrong("command %s was said to end as %d, and ended as %v", o.text, said, ends[o.text])
		}
	}
}

// log is what the log of one device says, read by the contract of its events alone.
type log struct {
	w       *world
	d       *device
	seq     uint64
	time    int64
	session uint64            // the device's current one
	message uint64            // of it
	live    bool              // it is one that signed in
	values  map[string]int    // how often they are stored
	stored  map[string]uint64 // and by which session
	order   []string
	bound   map[string]uint64 // sessions of commands, by ID; 0: not bound yet
	texts   map[string]string // contents of commands, by ID
	begun   map[string]bool   // by content, since the device is its owner's: keys of former owners are forgotten
	ended   map[string]bool   // by ID
	ends    map[string][]hub.CommandEnd
}

func (l *log) commit(c *hub.Commit) {
	wrong := func(format string, args ...any) {
		l.w.wrong("device %s, commit %d: "+format, append([]any{l.d.id, c.Seq}, args...)...)
	}
	if c.Seq != l.seq+1 {
		wrong("follows commit %d", l.seq)
	}
	if c.Time < l.time {
		wrong("its time is before the one of the commit in front")
	}
	l.seq, l.time = c.Seq, c.Time
	for i := range c.Events {
		ev := &c.Events[i]
		switch ev.Kind {
		case hub.Registered, hub.Unregistered:
			l.session, l.message, l.live = c.Seq, 0, false
			clear(l.begun)
		case hub.MetadataUpdated:
			if ev.Session == c.Seq {
				l.session, l.message, l.live = c.Seq, 0, ev.Metadata.Connection.Online
			} else if ev.Session != l.session {
				wrong("session %d changes the metadata, the current one is %d", ev.Session, l.session)
			}
		case hub.ResourceChanged, hub.LinksPublished:
			if ev.Session != l.session || !l.live {
				wrong("session %d writes, the current one is %d", ev.Session, l.session)
			}
			if ev.Message < l.message {
				wrong("message %d comes after message %d", ev.Message, l.message)
			}
			l.message = ev.Message
			value := ""
			if ev.Kind == hub.ResourceChanged {
				value = string(ev.Content.Data[1 : len(ev.Content.Data)-1])
			} else {
				value = ev.Links[0].Title
			}
			l.values[value]++
			l.stored[value] = ev.Session
			l.order = append(l.order, value)
		case hub.CommandPending:
			text := string(ev.Content.Data)
			if l.begun[text] {
				wrong("command %s (%s) begins twice", ev.Correlation, text)
			}
			l.begun[text] = true
			l.texts[ev.Correlation] = text
			l.bound[ev.Correlation] = ev.Command.Session
		case hub.CommandBound:
			if l.bound[ev.Correlation] != 0 {
				wrong("command %s is bound again", ev.Correlation)
			}
			l.bound[ev.Correlation] = ev.Command.Session
		case hub.CommandEnded:
			if l.ended[ev.Correlation] {
				wrong("command %s ends again, as %d", ev.Correlation, ev.Command.End)
			}
			l.ended[ev.Correlation] = true
			text := l.texts[ev.Correlation]
			l.ends[text] = append(l.ends[text], ev.Command.End)
		case hub.CommandLate, hub.LinksUnpublished, hub.LabelsChanged:
		}
	}
}

// end compares the log with what the device knows.
func (l *log) end() {
	for _, n := range l.d.notes {
		switch times := l.values[n.value]; {
		case times > 1:
			l.w.wrong("device %s: %s is stored %d times", l.d.id, n.value, times)
		case times == 0 && n.acked:
			l.w.wrong("device %s: %s was acknowledged and is lost", l.d.id, n.value)
		case times == 1 && l.stored[n.value] != n.session:
			l.w.wrong("device %s: %s was said in session %d and is stored as said in session %d", l.d.id, n.value, n.session, l.stored[n.value])
		}
	}
	// Of one session everything is in the order in which it was said.
	last := map[uint64]int{}
	place := map[string]int{}
	session := map[string]uint64{}
	for i, n := range l.d.notes {
		place[n.value], session[n.value] = i, n.session
	}
	for _, v := range l.order {
		s := session[v]
		if p := place[v]; p < last[s] {
			l.w.wrong("device %s: %s is stored behind what was said later in session %d", l.d.id, v, s)
		} else {
			last[s] = p
		}
	}
	for id, text := range l.texts {
		if !l.ended[id] {
			l.w.wrong("device %s: command %s (%s) never ended", l.d.id, id, text)
		}
		for _, s := range l.w.given[id] {
			if s != l.bound[id] {
				l.w.wrong("device %s: command %s is bound to session %d, and went out in session %d", l.d.id, id, l.bound[id], s)
			}
		}
		delete(l.w.given, id)
	}
}
