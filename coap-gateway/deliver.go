package coapgateway

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

const (
	// createInterface makes a POST one that creates (OCF Core, interface oic.if.create).
	createInterface = "oic.if.create"
	// afterEnd is how long an answer is waited for after the command's end, to record that it came: until then nothing else is
	// asked of the resource.
	afterEnd = time.Second
	// tryBeside is how long a command is out, with others behind it, before the device is asked something else beside it: whether
	// it takes two matters for slow answers only. It is tried at most maxTries times in a session; a device that had more to do
	// than it takes would be slow for it each time.
	tryBeside = time.Second
	maxTries  = 3
	// askDirectoryAgain is the pause after the directory could not be asked, or told.
	askDirectoryAgain = time.Second
)

// outbox carries out the commands of a session: as many at once as the device proved to take, which for most is one (NSTART of
// RFC 7252, Section 4.7), and never two for one resource, of which the order would be anybody's. What is bound to a session but
// not sent would be lost with it, so commands are taken from the directory only when they can go out, and with the turn at the
// device in hand. Its goroutine exists only while there is something to hand out, and one more for each command that is out.
type outbox struct {
	done sync.WaitGroup // the goroutines, while they run

	mu      sync.Mutex // guards all below
	s       *session   // nil before the session has begun
	running bool
	where   bool          // the device is to be asked where it is when nothing else is to do: the twin, which asks otherwise, is off
	waiting bool          // the directory has commands for us
	behind  bool          // all that it has are for resources with a command that is out
	hand    []hub.Command // bound to the session, not begun; the directory hands over what can go out
	out     []underway    // begun, and their ends are not stored; at most Conn.Window, and the hrefs all differ
	tries   int           // how often the device was asked something beside a command
	timer   *time.Timer   // for the next try; set only while the goroutine does not run and commands wait
	gone    func()        // set when the device is to go elsewhere: nothing is taken any more, and it is called when nothing is under way
}

// underway is a command that is being carried out.
type underway struct {
	hub.Taken
	since time.Time
}

// begin starts what waited for the session; where has the device asked where it is in its own network.
func (b *outbox) begin(s *session, waiting, where bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.s = s
	b.waiting, b.where = b.waiting || waiting, where
	b.start()
}

// stop waits for the goroutine. The session's context is over, so nothing starts any more.
func (b *outbox) stop() {
	b.mu.Lock()
	b.disarm()
	b.mu.Unlock()
	b.done.Wait()
}

// ready reports whether a command for href could be sent at once, beside those that are bound to the session.
func (b *outbox) ready(href hub.Href, bound []string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.s == nil, b.s.over(), b.running, b.waiting, b.gone != nil:
		return false
	case href != "" && !b.s.conn.Free(): // one of the twin has no href, and nothing is sent
		return false
	}
	n := len(bound)
	for _, u := range b.out {
		if u.Href == href {
			return false
		}
		if !slices.Contains(bound, u.ID) { // it has ended otherwise
			n++
		}
	}
	return n < b.s.conn.Window() && !b.alone() && b.s.rhythm.awake(time.Now())
}

func (b *outbox) deliver(c hub.Command) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.receive(c)
	b.start()
}

// receive puts a command in hand unless it is known: the directory may bring what was asked for at the same time. b.mu is held.
func (b *outbox) receive(c hub.Command) {
	if !slices.ContainsFunc(b.known(), func(t hub.Taken) bool { return t.ID == c.ID }) {
		b.hand = append(b.hand, c)
	}
}

// known are the commands that the session has. b.mu is held.
func (b *outbox) known() []hub.Taken {
	all := make([]hub.Taken, 0, len(b.out)+len(b.hand))
	for _, u := range b.out {
		all = append(all, u.Taken)
	}
	for i := range b.hand {
		all = append(all, hub.Taken{ID: b.hand[i].ID, Href: b.hand[i].Href})
	}
	return all
}

func (b *outbox) wake() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.waiting = true
	b.start()
}

// listens says that the device listens now: what waits for it goes out.
func (b *outbox) listens() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.start()
}

// heard says that the device, over UDP or DTLS, said something: it may have what waits beside what is out.
func (b *outbox) heard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.waiting && len(b.out) > 0 {
		b.start()
	}
}

// alone reports whether the device may be away since the newest command went out, which is all that is to be lost then. b.mu
// is held.
func (b *outbox) alone() bool {
	return len(b.out) > 0 && !b.s.rhythm.heardSince(b.out[len(b.out)-1].since)
}

// disarm stops the timer. b.mu is held.
func (b *outbox) disarm() {
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
}

// over reports whether the session has begun to end: what would be sent now is lost.
func (s *session) over() bool { return s.ctx.Err() != nil || s.conn.Closing() }

// start runs the goroutine unless it runs. b.mu is held.
func (b *outbox) start() {
	s := b.s
	if s == nil || b.running || !b.waiting && len(b.hand) == 0 && !b.where || b.gone != nil && len(b.hand) == 0 || s.over() {
		return
	}
	b.disarm()
	b.running = true
	b.done.Go(func() {
		if !s.conn.Guard("commands", b.run) {
			s.conn.Close(coap.ErrPanic) // what is under way ends with the session
		}
	})
}

// step is what the outbox's goroutine does next.
type step uint8

const (
	rest     step = iota // nothing: the goroutine ends
	getTurn              // wait for a turn at the device
	begin                // carry out what is in hand
	take                 // ask the directory for more
	askWhere             // ask the device where it is
	askAlive             // ask a device that may not listen for a sign of life
	askMore              // ask a device whether it takes a request beside the one that it has
)

func (b *outbox) run() {
	s := b.s
	var turn *coap.Turn
	drop := func() {
		if turn != nil {
			turn.End()
			turn = nil
		}
	}
	defer drop()
	for {
		next, c, beside := b.next(turn != nil)
		switch next {
		case rest:
			return
		case getTurn:
			var err error
			if turn, err = s.conn.Turn(s.ctx); err != nil {
				return // the session is over; running stays true, so nothing starts again
			}
		case begin:
			its := turn
			if c.Kind.OfTwin() { // is not sent, and what it waits for may need the turn
				its = nil
			} else {
				turn = nil
			}
			b.done.Go(func() {
				if !s.conn.Guard("command", func() { b.carryOut(c, its) }) {
					s.conn.Close(coap.ErrPanic) // what is under way ends with the session
				}
				b.finished(c.ID)
			})
		case take:
			b.take()
		case askWhere:
			drop() // the question takes its own
			// It is worth a short wait: what comes meanwhile waits with it.
			if err := s.learnEndpoints(noReaction); err != nil && s.ctx.Err() == nil {
				s.notStored(err)
				return // the connection is over; running stays true, so nothing starts again
			}
		case askAlive:
			drop() // likewise
			b.try()
		case askMore:
			b.tryBeside(beside)
		}
	}
}

// next says what to do; with rest the goroutine does not run any more.
func (b *outbox) next(turn bool) (_ step, c *hub.Command, beside *coap.Turn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	end := func(again time.Time) (step, *hub.Command, *coap.Turn) {
		if !again.IsZero() {
			b.timer = time.AfterFunc(time.Until(again), b.listens)
		}
		b.running = false
		b.settled()
		return rest, nil, nil
	}
	now := time.Now()
	switch {
	case b.s.over(), len(b.hand) == 0 && (b.gone != nil || !b.waiting && (!b.where || len(b.out) > 0)):
		return end(time.Time{})
	case len(b.hand) == 0 && !b.waiting:
		b.where = false
		return askWhere, nil, nil
	case len(b.hand) > 0:
		if !turn && !b.hand[0].Kind.OfTwin() {
			return getTurn, nil, nil
		}
		c = &b.hand[0]
		b.hand = b.hand[1:]
		b.out = append(b.out, underway{hub.Taken{ID: c.ID, Href: c.Href}, now})
		return begin, c, nil
	case !b.s.rhythm.awake(now):
		// What is bound to the session and finds nobody is lost, so nothing is taken for a device that may not listen. Its next
		// message starts this again, or the time to ask it for a sign of life.
		reach, again := b.s.rhythm.inReach(now)
		if !reach || len(b.out) > 0 { // then what is out is the question
			return end(again)
		}
		return askAlive, nil, nil
	case len(b.out) >= b.s.conn.Window():
		due := b.out[0].since.Add(tryBeside)
		switch {
		case b.tries >= maxTries || b.out[0].Href == "":
			return end(time.Time{}) // the next end goes on
		case now.Before(due):
			return end(due)
		}
		if beside = b.s.conn.Beside(); beside == nil {
			return end(now.Add(tryBeside))
		}
		b.tries++
		return askMore, nil, beside
	case b.alone():
		return end(time.Time{}) // its next message goes on, be it an ACK
	case !turn:
		return getTurn, nil, nil
	}
	b.waiting = false
	return take, nil, nil
}

// finished forgets a command, whose end is stored, and goes on.
func (b *outbox) finished(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.out = slices.DeleteFunc(b.out, func(u underway) bool { return u.ID == id })
	b.waiting, b.behind = b.waiting || b.behind, false
	b.start()
	b.settled()
}

// leave has nothing further be taken from the directory, and calls gone once nothing is bound to the session any more.
func (b *outbox) leave(gone func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.gone = gone
	b.disarm()
	b.settled()
}

// settled calls gone if it is time. b.mu is held.
func (b *outbox) settled() {
	if b.gone != nil && !b.running && len(b.hand) == 0 && len(b.out) == 0 {
		b.gone()
	}
}

// tryBeside asks the device something beside the command that is out. If it answers that first, it takes more than one at a time,
// which the engine then knows; one that does not has only been asked for what every device is asked.
func (b *outbox) tryBeside(turn *coap.Turn) {
	s := b.s
	defer turn.End()
	ctx, cancel := context.WithTimeout(s.ctx, noReaction)
	defer cancel()
	err := s.request(ctx, func(ctx context.Context) error {
		_, err := turn.Do(ctx, whereAreYou())
		return err
	})
	if err != nil {
		s.log.Debug("the device did not answer beside a command", "error", err)
	}
}

// try finds out whether the device listens, by a question that loses nothing if it does not.
func (b *outbox) try() {
	s := b.s
	if err := s.learnEndpoints(s.gw.cfg.API.CoAP.KeepAlive.Timeout); err != nil && s.ctx.Err() == nil {
		s.log.Debug("could not record where the device is in its own network", "error", err)
	}
	if !s.rhythm.awake(time.Now()) {
		b.pause() // it may have failed at once
	}
}

// take gets the next command from the directory, bound to the session.
func (b *outbox) take() {
	s := b.s
	b.mu.Lock()
	have := b.known()
	b.mu.Unlock()
	var cs []hub.Command
	var more bool
	err := retry(s.ctx, s.gw.patience, func() (err error) {
		from := hub.Stamp{Device: s.own.Device, Session: s.number, User: *s.user.Load()}
		cs, more, err = s.gw.deps.Directory.TakeCommands(s.ctx, from, have, 1)
		return err
	})
	if err != nil && transient(err) {
		b.pause()
	} else if err != nil {
		s.log.Debug("the directory gives the session no commands", "error", err) // it is over, and its connection will be
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range cs {
		b.receive(c)
	}
	switch {
	case err != nil, len(cs) > 0 && more, more && len(b.out) < len(have): // what the others waited for may be over
		b.waiting = true
	case more:
		b.behind = true
	}
}

func (b *outbox) pause() {
	t := time.NewTimer(askDirectoryAgain)
	defer t.Stop()
	select {
	case <-t.C:
	case <-b.s.ctx.Done():
	}
}

// carryOut does one command, which is bound to the session, in its turn at the device, nil for one of the twin, and tells the
// directory what came of it.
func (b *outbox) carryOut(c *hub.Command, turn *coap.Turn) {
	s := b.s
	if c.Kind.OfTwin() {
		if time.Now().UnixNano() < c.ValidUntil {
			b.turnTwin(c)
		}
		return
	}
	defer turn.End()
	left := time.Until(time.Unix(0, c.ValidUntil))
	if left <= 0 {
		return // it ends by itself, and was not sent
	}
	req, err := requestOf(c)
	if err != nil {
		_, text := hub.Public(err)
		b.ended(c, hub.Answer{End: hub.CommandCompleted, Status: hub.StatusBadRequest, Content: plainText(text)})
		return
	}
	begun := time.Now()
	ctx, cancel := context.WithTimeout(s.ctx, left+afterEnd)
	defer cancel()
	var m *coap.Message
	err = s.request(ctx, func(ctx context.Context) (err error) {
		m, err = turn.Do(ctx, req)
		return err
	})
	turn.End() // whatever comes now is for the directory
	if err != nil && s.over() {
		return // with the session the command ends
	}
	a := answerTo(c, m)
	switch kind := hub.KindOf(err); {
	case err == nil:
	case kind == hub.Deadline:
		a = hub.Answer{End: hub.CommandUnavailable, Content: plainText("the device did not answer")}
	case kind == hub.Unavailable:
		a = hub.Answer{End: hub.CommandUnavailable, Content: plainText("the request could not be sent, or was not answered")}
	case kind == hub.Exhausted: // of ours, not of the device's
		_, text := hub.Public(err)
		a = hub.Answer{End: hub.CommandUnavailable, Content: plainText(text)}
	default: // an answer that breaks the protocol, or one that is too large; or a request too large for the device
		_, text := hub.Public(err)
		a = hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError, Content: plainText(text)}
	}
	if err != nil {
		s.log.Debug("a command was not answered well", "command", c.ID, "href", c.Href, "error", err)
	}
	s.gw.metrics.commands.WithLabelValues(commandNames[c.Kind], statusNames[a.Status]).Inc()
	s.gw.metrics.commandSeconds.Observe(time.Since(begun).Seconds())
	if a.Status == hub.StatusNotFound {
		// The resource is gone: whoever hears of the command's end finds it so.
		if err := s.goneByCommand(c.Href); err != nil {
			s.log.Debug("could not record that a resource is gone", "href", c.Href, "error", err)
		}
	}
	b.ended(c, a)
}

// goneByCommand unpublishes a resource that the device says it does not have; its twin becomes NOT_FOUND.
func (s *session) goneByCommand(h hub.Href) error {
	select {
	case s.turn <- struct{}{}:
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	defer func() { <-s.turn }()
	return s.goneInTurn(s.ctx, h)
}

// ended tells the directory, for as long as it takes while the session lives: until then the command is bound to it.
func (b *outbox) ended(c *hub.Command, a hub.Answer) {
	s := b.s
	for {
		err := s.write(s.ctx, func(ctx context.Context, from hub.Stamp) error {
			return s.gw.deps.Directory.EndCommand(ctx, from, c.ID, a)
		})
		switch {
		case err == nil || s.ctx.Err() != nil:
			return
		case hub.IsKind(err, hub.TooLarge) && a.Status != hub.StatusError:
			_, text := hub.Public(err)
			a = hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError, Content: plainText(text)}
			continue
		case !transient(err):
			s.log.Debug("the directory does not take a command's answer", "command", c.ID, "error", err)
			return
		}
		s.log.Warn("a command's answer cannot be stored, trying again", "command", c.ID, "error", err)
		b.pause()
	}
}

// turnTwin switches the twin. What it told the directory before is stored before the command ends, and nothing after that.
func (b *outbox) turnTwin(c *hub.Command) {
	s, t := b.s, b.s.twin
	var over []*coap.Observation
	if c.Kind == hub.CommandTwinOff {
		over = t.turnOff()
	}
	b.ended(c, hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK})
	for _, o := range over {
		t.cancel(s.ctx, o)
	}
	// The command may have ended otherwise meanwhile; what the directory says is how it is.
	var dev *hub.Device
	for s.ctx.Err() == nil {
		err := retry(s.ctx, s.gw.patience, func() (err error) {
			dev, err = s.gw.deps.Directory.Device(s.ctx, s.own.Owner, s.own.Device)
			return err
		})
		if err == nil {
			break
		}
		s.log.Warn("the device cannot be read, trying again", "error", err)
		b.pause()
	}
	switch {
	case s.ctx.Err() != nil:
	case dev.Metadata.Twin.Enabled:
		t.turnOn(c.Kind == hub.CommandTwinSync)
	default:
		for _, o := range t.turnOff() {
			t.cancel(s.ctx, o)
		}
	}
}

// requestOf is the request that carries out a command (OCF Core, 8: CRUDN over CoAP; an update is a POST), unless the command
// names a method of RFC 8132.
func requestOf(c *hub.Command) (*coap.Message, error) {
	for seg := range strings.SplitSeq(string(c.Href), "/") {
		if len(seg) > 255 { // RFC 7252, Section 5.10: Uri-Path ends there
			return nil, invalid("href-invalid", "a segment of the href is too long for CoAP")
		}
	}
	m := &coap.Message{Code: codes.GET, Options: requestTo(c.Href)}
	iface := c.Interface
	switch c.Kind {
	case hub.CommandCreate:
		m.Code, iface = codes.POST, createInterface
	case hub.CommandUpdate:
		m.Code = codes.POST
	case hub.CommandDelete:
		m.Code = codes.DELETE
	case hub.CommandRetrieve:
		for _, e := range c.ETags {
			m.Options = coap.AddOption(m.Options, message.ETag, e)
		}
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync: // are not sent
	}
	if iface != "" {
		m.Options = coap.AddOption(m.Options, message.URIQuery, []byte("if="+iface))
	}
	for _, e := range c.IfMatch {
		m.Options = coap.AddOption(m.Options, coap.IfMatch, e)
	}
	if c.Code != 0 {
		m.Code = codes.Code(c.Code)
	}
	if m.Code != codes.GET && m.Code != codes.DELETE {
		m.Payload = c.Content.Data
		if c.Content.Format != hub.FormatNone {
			m.Options = coap.AddUint(m.Options, message.ContentFormat, uint32(c.Content.Format))
		}
	}
	return m, nil
}

// answerTo is what a device's answer means for the command; nil is none.
func answerTo(c *hub.Command, m *coap.Message) hub.Answer {
	if m == nil {
		return hub.Answer{}
	}
	a := hub.Answer{End: hub.CommandCompleted, Status: statusOf(m.Code), Code: uint8(m.Code), Content: contentOf(m), ETag: coap.ETag(m)}
	if m.Code>>5 == 2 && !wellFormed(a.Content) {
		return hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError, Content: plainText("the device's answer is not what its content format says")}
	}
	if c.Kind != hub.CommandRetrieve && a.Status == hub.StatusNotModified {
		a.Status = hub.StatusAccepted
	}
	if m.Code == codes.BadOption && len(c.IfMatch) > 0 {
		// RFC 7252, Section 5.4.1: a critical option that it does not know. iotivity-lite knows no conditions.
		a.Status = hub.StatusNotImplemented
	}
	// RFC 7252, Section 5.5.2: the payload of an error without a format is a text for people.
	if m.Code>>5 != 2 && a.Content.Format == hub.FormatNone && len(m.Payload) > 0 && utf8.Valid(m.Payload) {
		a.Content = plainText(string(m.Payload))
	}
	return a
}

// wellFormed reports whether a content can be read as its format says, as far as the hub reads it.
func wellFormed(c hub.Content) bool {
	switch {
	case len(c.Data) == 0:
		return true
	case c.Format == hub.FormatCBOR || c.Format == hub.FormatOCFCBOR:
		return cbor.Wellformed(c.Data) == nil
	case c.Format == hub.FormatJSON:
		return json.Valid(c.Data)
	}
	return true
}

func plainText(s string) hub.Content {
	return hub.Content{Type: hub.MediaType(hub.FormatText), Format: hub.FormatText, Data: []byte(s)}
}

// The names of the metrics' labels.
var (
	commandNames = map[hub.CommandKind]string{
		hub.CommandCreate: "create", hub.CommandRetrieve: "retrieve", hub.CommandUpdate: "update", hub.CommandDelete: "delete",
	}
	statusNames = map[hub.Status]string{
		hub.StatusUnknown: "unanswered", hub.StatusOK: "ok", hub.StatusCreated: "ok", hub.StatusAccepted: "ok", hub.StatusNotModified: "ok",
		hub.StatusBadRequest: "refused", hub.StatusUnauthorized: "refused", hub.StatusForbidden: "refused", hub.StatusNotFound: "refused",
		hub.StatusMethodNotAllowed: "refused", hub.StatusUnavailable: "failed", hub.StatusNotImplemented: "failed", hub.StatusError: "failed",
	}
)
