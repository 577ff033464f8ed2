package resourcedirectory

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

// The calls that a directory answers over the bus, at the subjects of the device's partition. What changes devices may be repeated when no
// answer came: session and message number, generation or the connection's ID say that it was done.
const (
	callSignIn         = bus.Method[signInAsked, hub.Session]("rd.signIn")
	callAnnounce       = bus.Method[announced, bool]("rd.announce")
	callAbandon        = bus.Method[abandoned, struct{}]("rd.abandon")
	callSignOut        = bus.Method[hub.Stamp, struct{}]("rd.signOut")
	callEndSession     = bus.Method[endSessionAsked, struct{}]("rd.endSession")
	callOffline        = bus.Method[hub.Stamp, struct{}]("rd.offline")
	callPublish        = bus.Method[publishAsked, []hub.Link]("rd.publish")
	callUnpublish      = bus.Method[unpublishAsked, []hub.Href]("rd.unpublish")
	callNotify         = bus.Method[notified, struct{}]("rd.notify")
	callSetTwin        = bus.Method[twinSet, struct{}]("rd.setTwin")
	callSetEndpoints   = bus.Method[endpointsSet, struct{}]("rd.setLocalEndpoints")
	callSetContact     = bus.Method[contactSet, struct{}]("rd.setContact")
	callTakeCommands   = bus.Method[takeAsked, takeAnswer]("rd.takeCommands")
	callEndCommand     = bus.Method[commandAnswered, struct{}]("rd.endCommand")
	callRegister       = bus.Method[ownershipTold, struct{}]("rd.register")
	callUnregister     = bus.Method[ownershipTold, struct{}]("rd.unregister")
	callCancelCommands = bus.Method[cancelAsked, []string]("rd.cancelCommands")
	callSetLabels      = bus.Method[labelsAsked, hub.Labels]("rd.setLabels")

	callCommand = bus.Method[commandAsked, hub.Outcome]("rd.command")

	callDevices  = bus.Method[devicesAsked, devicesAnswer]("rd.devices")
	callDeviceAt = bus.Method[deviceAtAsked, picture]("rd.deviceAt")
	callETags    = bus.Method[etagsAsked, [][]byte]("rd.etags")
	callHistory  = bus.Method[historyAsked, historyAnswer]("rd.history")

	// tellSession goes the other way, to the gateway that has the session.
	tellSession = bus.Method[sessionTold, struct{}]("gw.session")
)

type (
	signInAsked struct {
		Own  hub.Ownership
		Conn hub.Connection
		User string
	}
	announced struct {
		From       hub.Stamp // Message is not used
		Connection hub.Connection
		Twin       hub.TwinState
	}
	abandoned struct {
		Device     hub.DeviceID
		Connection string
	}
	endSessionAsked struct {
		Owner  hub.Owner
		Device hub.DeviceID
		User   string
	}
	publishAsked struct {
		From  hub.Stamp
		Links []hub.Link
	}
	unpublishAsked struct {
		From  hub.Stamp
		Hrefs []hub.Href
	}
	notified struct {
		From    hub.Stamp
		Changes []hub.Change
	}
	twinSet struct {
		From hub.Stamp
		To   hub.TwinState
	}
	endpointsSet struct {
		From      hub.Stamp
		Endpoints []string
	}
	contactSet struct {
		From hub.Stamp
		To   hub.Contact
	}
	takeAsked struct {
		From hub.Stamp
		Have []hub.Taken
		Most int
	}
	takeAnswer struct {
		Taken []hub.Command
		More  bool
	}
	commandAnswered struct {
		From   hub.Stamp
		ID     string
		Answer hub.Answer
	}
	ownershipTold struct {
		Own  hub.Ownership
		User string
	}
	cancelAsked struct {
		Owner            hub.Owner
		Device           hub.DeviceID
		Pick             hub.CommandPick
		User, Connection string
	}
	labelsAsked struct {
		Owner  hub.Owner
		Device hub.DeviceID
		Change hub.LabelChange
		User   string
	}
	commandAsked struct {
		Owner hub.Owner
		Order hub.Order
	}
	devicesAsked struct {
		Owner hub.Owner
		IDs   []hub.DeviceID
		All   bool // with all commits that are in the feed, as Directory.State
	}
	devicesAnswer struct {
		Devices []picture
		// Left is how many of the IDs at the end were not looked at: the answer is large enough.
		Left int
	}
	deviceAtAsked struct {
		Owner  hub.Owner
		Device hub.DeviceID
		At     int64 // Unix nanoseconds
	}
	etagsAsked struct {
		Device hub.DeviceID
		Most   int
	}
	historyAsked struct {
		Owner  hub.Owner
		Device hub.DeviceID
		After  int64  // Unix nanoseconds; 0: from the start
		From   uint64 // or, if it is not 0, from this seq on
	}
	historyAnswer struct {
		Commits []hub.Commit
		// Next is the seq to go on from, 0 at the end.
		Next uint64
	}
	sessionTold struct {
		Device  hub.DeviceID
		Session uint64
		Close   bool // else: commands wait; without a device, the gateway is to tell of all its sessions again
		Reason  string
	}
)

// picture is a hub.Device.
type picture struct {
	ID                    hub.DeviceID
	Owner                 hub.Owner
	Generation, Seq       uint64
	Metadata              hub.Metadata
	MetaCause, LinksCause hub.Cause
	Links                 []hub.Link
	Resources             []hub.Resource
	Commands              []hub.Command
	Labels                hub.Labels
}

func pictureOf(d *hub.Device) picture {
	p := picture{
		ID: d.ID, Owner: d.Owner, Generation: d.Generation, Seq: d.Seq, Metadata: d.Metadata, MetaCause: d.MetaCause, LinksCause: d.LinksCause,
		Links: make([]hub.Link, 0, d.Links.Len()), Resources: make([]hub.Resource, 0, d.Resources.Len()), Commands: d.Commands, Labels: d.Labels,
	}
	for l := range d.Links.All() {
		p.Links = append(p.Links, l)
	}
	for r := range d.Resources.All() {
		p.Resources = append(p.Resources, *r)
	}
	return p
}

func (p *picture) device() *hub.Device {
	d := &hub.Device{
		ID: p.ID, Owner: p.Owner, Generation: p.Generation, Seq: p.Seq, Metadata: p.Metadata, MetaCause: p.MetaCause, LinksCause: p.LinksCause,
		Commands: p.Commands, Labels: p.Labels,
	}
	var links tree[*hub.Link]
	for i := range p.Links {
		links = links.put(string(p.Links[i].Href), &p.Links[i])
	}
	var twins tree[*twin]
	for i := range p.Resources {
		twins = twins.put(string(p.Resources[i].Href), &twin{Resource: p.Resources[i]})
	}
	d.Links, d.Resources = linkSet{links}, resourceSet{twins}
	return d
}

func (p *picture) size() int {
	n := 1 << 10
	for i := range p.Links {
		n += linkSize(&p.Links[i])
	}
	for i := range p.Resources {
		n += twinSize(&p.Resources[i])
	}
	for i := range p.Commands {
		n += len(p.Commands[i].Content.Data)
	}
	return n
}

// enough is how many bytes of devices or commits go into one answer; one more may be larger.
const enough = 2 << 20

// servers are what a directory answers with. What takes long does not keep the rest waiting.
type servers struct{ writes, reads, commands *bus.Server }

func (d *Directory) servers() *servers {
	b := d.apart.bus
	s := &servers{b.Server(true, d.log), b.Server(true, d.log), b.Server(true, d.log)}
	w, r := s.writes, s.reads
	bus.Handle(w, callSignIn, func(ctx context.Context, q signInAsked) (hub.Session, error) {
		return d.SignIn(ctx, q.Own, q.Conn, q.User, nil)
	})
	bus.Handle(w, callAnnounce, d.announce)
	handle(w, callAbandon, func(ctx context.Context, q abandoned) error { return d.do(ctx, abandon(q.Device, q.Connection)) })
	handle(w, callSignOut, d.SignOut)
	handle(w, callEndSession, func(ctx context.Context, q endSessionAsked) error {
		return d.EndSession(ctx, q.Owner, q.Device, q.User)
	})
	handle(w, callOffline, d.Offline)
	bus.Handle(w, callPublish, func(ctx context.Context, q publishAsked) ([]hub.Link, error) { return d.Publish(ctx, q.From, q.Links) })
	bus.Handle(w, callUnpublish, func(ctx context.Context, q unpublishAsked) ([]hub.Href, error) {
		return d.Unpublish(ctx, q.From, q.Hrefs)
	})
	handle(w, callNotify, func(ctx context.Context, q notified) error { return d.Notify(ctx, q.From, q.Changes) })
	handle(w, callSetTwin, func(ctx context.Context, q twinSet) error { return d.SetTwin(ctx, q.From, q.To) })
	handle(w, callSetEndpoints, func(ctx context.Context, q endpointsSet) error { return d.SetLocalEndpoints(ctx, q.From, q.Endpoints) })
	handle(w, callSetContact, func(ctx context.Context, q contactSet) error { return d.SetContact(ctx, q.From, q.To) })
	bus.Handle(w, callTakeCommands, func(ctx context.Context, q takeAsked) (a takeAnswer, err error) {
		a.Taken, a.More, err = d.TakeCommands(ctx, q.From, q.Have, q.Most)
		return a, err
	})
	handle(w, callEndCommand, func(ctx context.Context, q commandAnswered) error { return d.EndCommand(ctx, q.From, q.ID, q.Answer) })
	handle(w, callRegister, func(ctx context.Context, q ownershipTold) error { return d.Register(ctx, q.Own, q.User) })
	handle(w, callUnregister, func(ctx context.Context, q ownershipTold) error { return d.Unregister(ctx, q.Own, q.User) })
	bus.Handle(w, callCancelCommands, func(ctx context.Context, q cancelAsked) ([]string, error) {
		return d.CancelCommands(ctx, q.Owner, q.Device, q.Pick, q.User, q.Connection)
	})
	bus.Handle(w, callSetLabels, func(ctx context.Context, q labelsAsked) (hub.Labels, error) {
		return d.SetLabels(ctx, q.Owner, q.Device, q.Change, q.User)
	})
	bus.Handle(s.commands, callCommand, func(ctx context.Context, q commandAsked) (hub.Outcome, error) {
		return d.Command(ctx, q.Owner, q.Order)
	})
	bus.Handle(r, callDevices, d.answerDevices)
	bus.Handle(r, callDeviceAt, func(ctx context.Context, q deviceAtAsked) (picture, error) {
		dev, err := d.DeviceAt(ctx, q.Owner, q.Device, time.Unix(0, q.At))
		if err != nil {
			return picture{}, err
		}
		return pictureOf(dev), nil
	})
	bus.Handle(r, callETags, func(ctx context.Context, q etagsAsked) ([][]byte, error) { return d.ETags(ctx, q.Device, q.Most) })
	bus.Handle(r, callHistory, d.answerHistory)
	return s
}

// handle is bus.Handle for what answers with nothing but its success.
func handle[Req any](s *bus.Server, m bus.Method[Req, struct{}], f func(context.Context, Req) error) {
	bus.Handle(s, m, func(ctx context.Context, q Req) (struct{}, error) { return struct{}{}, f(ctx, q) })
}

// announce brings a session online again that goes on although its gateway was taken for gone, and reports whether the session is the
// device's. It keeps its number: nobody else had the device meanwhile.
func (d *Directory) announce(ctx context.Context, q announced) (is bool, _ error) {
	const op = "directory.announce"
	if err := d.mark(ctx, onlineIndex, q.From.Device, d.keeper(q.Connection.Service)); err != nil {
		return false, wrap(op, err)
	}
	r := &request{dev: q.From.Device, op: op}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if is = s.session == q.From.Session; !is || s.meta.Connection.Online {
			return nil, nil
		}
		meta := s.meta
		meta.Connection.Online, meta.Connection.Service = true, q.Connection.Service
		if meta.Twin.Enabled {
			meta.Twin.State = q.Twin
		}
		return []hub.Event{{
			Kind: hub.MetadataUpdated, Session: s.session, Connection: meta.Connection.ID, User: q.From.User, Metadata: &meta,
		}}, nil
	}
	err := d.do(ctx, r)
	d.remark(ctx, q.From.Device) // also if it is not: then the index names a gateway that the device left
	return is, err
}

// abandon sets a device offline that is online on a connection whose gateway was not told of the session.
func abandon(dev hub.DeviceID, connection string) *request {
	r := &request{dev: dev, op: "directory.abandon"}
	r.decide = func(s *state, now int64) ([]hub.Event, error) {
		if s.meta.Connection.ID != connection {
			return nil, nil
		}
		return offline(hub.Stamp{Device: dev, Session: s.session}).decide(s, now)
	}
	return r
}

func (d *Directory) answerDevices(ctx context.Context, q devicesAsked) (a devicesAnswer, _ error) {
	read := d.Devices
	if q.All {
		read = d.State
	}
	size := 0
	for i, id := range q.IDs {
		if size > enough {
			a.Left = len(q.IDs) - i
			break
		}
		for dev, err := range read(ctx, q.Owner, []hub.DeviceID{id}) {
			if err != nil {
				return devicesAnswer{}, err
			}
			p := pictureOf(dev)
			size += p.size()
			a.Devices = append(a.Devices, p)
		}
	}
	return a, nil
}

func (d *Directory) answerHistory(ctx context.Context, q historyAsked) (a historyAnswer, _ error) {
	var commits iter.Seq2[hub.Commit, error]
	switch {
	case q.From != 0:
		commits = d.historyFrom(ctx, q.Owner, q.Device, q.From)
	case q.After != 0:
		commits = d.History(ctx, q.Owner, q.Device, time.Unix(0, q.After))
	default:
		commits = d.History(ctx, q.Owner, q.Device, time.Time{})
	}
	size := 0
	for c, err := range commits {
		if err != nil {
			return historyAnswer{}, err
		}
		if size > enough {
			a.Next = c.Seq
			break
		}
		a.Commits = append(a.Commits, c)
		size += commitSize(&c)
	}
	return a, nil
}

// serve has the servers answer for these partitions and no others.
func (s *servers) serve(which *[partitions]bool) error {
	var writes, reads, commands []string
	for p, is := range which {
		if is {
			writes, reads, commands = append(writes, writesOf(p)), append(reads, readsOf(p)), append(commands, commandsOf(p))
		}
	}
	return errors.Join(s.writes.Serve(writes), s.reads.Serve(reads), s.commands.Serve(commands))
}

// serveApart answers over the bus until ctx ends; then others take over before it stops, if there are any. The workers run.
func (d *Directory) serveApart(ctx context.Context, ready func()) {
	a, s := d.apart, d.servers()
	var all sync.WaitGroup
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	for _, one := range []*bus.Server{s.writes, s.reads, s.commands} {
		all.Go(func() {
			if err := one.Run(serving, func() {}); err != nil {
				d.log.Error("the directory cannot be asked", "error", err)
			}
		})
	}
	all.Go(func() { d.watch(serving, s, ready) })
	<-ctx.Done()
	a.members.Leave()
	if others := a.members.Living(Part); len(others) > 1 || len(others) == 1 && others[0] != a.self {
		time.Sleep(handover)
	}
	close(a.gone)
	stop()
	all.Wait()
}
