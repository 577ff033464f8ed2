package coapgateway

import (
	"context"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

const (
	// createInterface makes a POST one that creates (OCF Core, interface oic.if.create).
	createInterface = "oic.if.create"
	// afterEnd is how long an answer is waited for after the command's end, to record that it came: until then nothing else is
	// asked of the device.
	afterEnd = time.Second
	// askDirectoryAgain is the pause after the directory could not be asked, or told.
	askDirectoryAgain = time.Second
)

// outbox carries out the commands of a session, one after the other: most devices take one request at a time (NSTART of RFC
// 7252, Section 4.7), and what is bound to a session but not sent would be lost with it, so commands are taken from the
// directory only when they can go out. Its goroutine exists only while there is work.
type outbox struct {
	done sync.WaitGroup // the goroutine, while it runs

	mu      sync.Mutex // guards all below
	s       *session   // nil before the session has begun
	running bool
	waiting bool          // the directory has commands for us
	hand    []hub.Command // bound to the session, not begun; the directory hands over one, and only while we are ready
	timer   *time.Timer   // for the next try; set only while the goroutine does not run and commands wait
}

// begin starts what waited for the session.
func (b *outbox) begin(s *session, waiting bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.s = s
	b.waiting = b.waiting || waiting
	b.start()
}

// stop waits for the goroutine. The session's context is over, so nothing starts any more.
func (b *outbox) stop() {
	b.mu.Lock()
	b.disarm()
	b.mu.Unlock()
	b.done.Wait()
}

// ready reports whether a command could be sent at once.
func (b *outbox) ready() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.s == nil || b.s.over() || b.running || b.waiting {
		return false
	}
	return b.s.rhythm.awake(time.Now())
}

func (b *outbox) deliver(c hub.Command) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hand = append(b.hand, c)
	b.start()
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
	if s == nil || b.running || !b.waiting && len(b.hand) == 0 || s.over() {
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

func (b *outbox) run() {
	for {
		b.mu.Lock()
		var c *hub.Command
		try := false
		switch {
		case b.s.over(), len(b.hand) == 0 && !b.waiting:
			b.running = false
			b.mu.Unlock()
			return
		case len(b.hand) > 0:
			c = &b.hand[0]
			b.hand = b.hand[1:]
		default:
			// What is bound to the session and finds nobody is lost, so nothing is taken for a device that may not listen. Its
			// next message starts this again, or the time to ask it for a sign of life.
			now := time.Now()
			if b.s.rhythm.awake(now) {
				b.waiting = false
				break
			}
			var again time.Time
			if try, again = b.s.rhythm.inReach(now); !try {
				if !again.IsZero() {
					b.timer = time.AfterFunc(time.Until(again), b.listens)
				}
				b.running = false
				b.mu.Unlock()
				return
			}
		}
		b.mu.Unlock()
		switch {
		case c != nil:
			b.carryOut(c)
		case try:
			b.try()
		default:
			b.take()
		}
	}
}

// try finds out whether the device listens, by a question that loses nothing if it does not.
func (b *outbox) try() {
	s := b.s
	if err := s.learnEndpoints(); err != nil && s.ctx.Err() == nil {
		s.log.Debug("could not record where the device is in its own network", "error", err)
	}
	if !s.rhythm.awake(time.Now()) {
		b.pause() // it may have failed at once
	}
}

// take gets the next command from the directory, bound to the session.
func (b *outbox) take() {
	s := b.s
	var cs []hub.Command
	err := retry(s.ctx, s.gw.patience, func() (err error) {
		from := hub.Stamp{Device: s.own.Device, Session: s.number, User: *s.user.Load()}
		cs, err = s.gw.deps.Directory.TakeCommands(s.ctx, from, nil, 1)
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
	b.hand = append(b.hand, cs...)
	b.waiting = b.waiting || err != nil || len(cs) > 0 // there may be more
}

func (b *outbox) pause() {
	t := time.NewTimer(askDirectoryAgain)
	defer t.Stop()
	select {
	case <-t.C:
	case <-b.s.ctx.Done():
	}
}

// carryOut does one command, which is bound to the session, and tells the directory what came of it.
func (b *outbox) carryOut(c *hub.Command) {
	s := b.s
	left := time.Until(time.Unix(0, c.ValidUntil))
	if left <= 0 {
		return // it ends by itself, and was not sent
	}
	if c.Kind.OfTwin() {
		b.turnTwin(c)
		return
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
		m, err = s.conn.Do(ctx, req)
		return err
	})
	if err != nil && s.over() {
		return // with the session the command ends
	}
	a := answerTo(c.Kind, m)
	switch kind := hub.KindOf(err); {
	case err == nil:
	case kind == hub.Deadline:
		a = hub.Answer{End: hub.CommandUnavailable, Content: plainText("the device did not answer")}
	case kind == hub.Unavailable:
		a = hub.Answer{End: hub.CommandUnavailable, Content: plainText("the request could not be sent, or was not answered")}
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
func answerTo(kind hub.CommandKind, m *coap.Message) hub.Answer {
	if m == nil {
		return hub.Answer{}
	}
	a := hub.Answer{End: hub.CommandCompleted, Status: statusOf(m.Code), Code: uint8(m.Code), Content: contentOf(m), ETag: coap.ETag(m)}
	if kind != hub.CommandRetrieve && a.Status == hub.StatusNotModified {
		a.Status = hub.StatusAccepted
	}
	// RFC 7252, Section 5.5.2: the payload of an error without a format is a text for people.
	if m.Code>>5 != 2 && a.Content.Format == hub.FormatNone && len(m.Payload) > 0 && utf8.Valid(m.Payload) {
		a.Content = plainText(string(m.Payload))
	}
	return a
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
