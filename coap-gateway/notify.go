package coapgateway

import (
	"context"
	"slices"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// Notifications implements coap.ConnHandler: all that arrived goes to the directory in one write. Over TCP a notification has
// no answer, so if it cannot be stored the connection is closed, and the device reports again on its next one.
func (p *peer) Notifications(_ context.Context, ns []coap.Notification) {
	s := p.sess
	if s == nil || s.twin.isOff() {
		return // late ones of a session that is over
	}
	if err := s.notified(s.ctx, ns); err != nil {
		s.notStored(err)
	}
}

// notStored ends the connection because of a failed write.
func (s *session) notStored(err error) {
	s.gw.metrics.notStored.Inc()
	s.log.Warn("closing the connection, so that the device reports again", "error", err)
	reason := "not-stored"
	if hub.IsKind(err, hub.Precondition) {
		reason = "superseded" // a newer session of the device has the word
	}
	s.conn.Close(closing{reason})
}

// notified stores what notifications bring, in their order.
func (s *session) notified(ctx context.Context, ns []coap.Notification) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return nil // the session is over, nothing of it counts any more
	}
	defer func() { <-s.turn }()
	var changes []hub.Change
	for _, n := range ns {
		o, m := n.Observation, n.Message
		href, err := hub.ParseHref(o.Path())
		if err != nil {
			continue
		}
		if of, ok := o.Tag().(*session); ok && of != s {
			continue // of a session that was signed out on this connection
		}
		var here []hub.Change
		batch := s.twin.isBatch(href)
		switch {
		case m.Code == codes.Valid:
		case m.Code == codes.NotFound && !batch:
			// The resource is gone: nothing of it may be stored after its NOT_FOUND.
			if err := s.storeInTurn(ctx, changes); err != nil {
				return err
			}
			changes = nil
			if err := s.goneInTurn(ctx, href); err != nil {
				return err
			}
		case m.Code == codes.GatewayTimeout && !n.Ended:
			// There was something newer whose blocks could not be fetched: ask again rather than show the old value.
			s.twin.renew(o, href, batch)
		case batch && m.Code == codes.Content:
			c := contentOf(m)
			var skipped int
			here, skipped, err = parseBatch(c.Format, c.Data, coap.ETag(m))
			s.gw.metrics.batchSkipped.Add(float64(skipped))
			if err != nil {
				// What the batch says is lost; ask for everything again rather than live with a hole.
				s.log.Debug("a batch notification does not decode", "error", err)
				s.twin.renew(o, href, true)
			}
		case batch:
			if !n.Ended { // 4.13: too large to be fetched; whatever it was, it is not in the twin
				s.gw.metrics.tooLarge.Inc()
			}
		default:
			here = []hub.Change{s.changeOf(href, m)}
		}
		if o.Tag() == nil { // its first answer is not stored yet, and must not overwrite this
			hrefs := s.early[o]
			if hrefs == nil {
				hrefs = map[hub.Href]bool{}
				s.early[o] = hrefs
			}
			for _, c := range here {
				hrefs[c.Href] = true
			}
			if m.Code == codes.NotFound {
				hrefs[href] = true
			}
		}
		changes = append(changes, here...)
		if n.Ended {
			s.twin.ended(o, href, batch, m.Code)
		}
	}
	return s.storeInTurn(ctx, changes)
}

// storeFirst stores the first answer of an observation (nil: of a single request), but for what notifications, which are
// newer, have stored already, and for what the device unpublished since it was asked.
func (s *session) storeFirst(o *coap.Observation, changes []hub.Change) error {
	select {
	case s.turn <- struct{}{}:
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	defer func() { <-s.turn }()
	if o != nil {
		newer := s.early[o]
		changes = slices.DeleteFunc(changes, func(c hub.Change) bool { return newer[c.Href] })
		delete(s.early, o)
		o.SetTag(s)
	}
	t := s.twin
	t.mu.Lock()
	changes = slices.DeleteFunc(changes, func(c hub.Change) bool { return t.dropped(c.Href) })
	t.mu.Unlock()
	return s.storeInTurn(s.ctx, changes)
}

// maxNotifyBytes bounds the contents of one write, well below what a commit may hold.
const maxNotifyBytes = 400 << 10

// storeInTurn writes changes in pieces that a commit can hold. The caller has the turn.
func (s *session) storeInTurn(ctx context.Context, changes []hub.Change) error {
	for len(changes) > 0 {
		n, size := 0, 0
		for n < len(changes) && n < hub.MaxCommitEvents {
			size += len(changes[n].Content.Data) + len(changes[n].Href) + 64
			if n > 0 && size > maxNotifyBytes {
				break
			}
			n++
		}
		if err := s.storePiece(ctx, changes[:n]); err != nil {
			return err
		}
		changes = changes[n:]
	}
	return nil
}

func (s *session) storePiece(ctx context.Context, changes []hub.Change) error {
	err := s.writeInTurn(ctx, func(ctx context.Context, from hub.Stamp) error {
		return s.records.Notify(ctx, from, changes)
	})
	switch {
	case err == nil:
		s.gw.metrics.changes.Add(float64(len(changes)))
		return nil
	case !hub.IsKind(err, hub.Invalid) && !hub.IsKind(err, hub.TooLarge):
		return err
	case len(changes) > 1:
		// One of them is not acceptable; closing would bring the same again for ever. Find it.
		for i := range changes {
			if err := s.storePiece(ctx, changes[i:i+1]); err != nil {
				return err
			}
		}
		return nil
	case changes[0].Status != hub.StatusError || len(changes[0].Content.Data) > 0:
		return s.storePiece(ctx, []hub.Change{{Href: changes[0].Href, Status: hub.StatusError, Content: hub.Content{Format: hub.FormatNone}}})
	}
	s.log.Warn("a change is not acceptable to the directory", "href", changes[0].Href, "error", err)
	return nil
}

// gone unpublishes a resource of which the device, asked, said that it does not have it; its twin becomes NOT_FOUND. If the
// device has published it since, it is asked once more.
func (s *session) gone(l hub.Link) error {
	select {
	case s.turn <- struct{}{}:
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	defer func() { <-s.turn }()
	if s.twin.republished(l.Href) {
		s.twin.again(l)
		return nil
	}
	return s.goneInTurn(s.ctx, l.Href)
}

func (s *session) goneInTurn(ctx context.Context, href hub.Href) error {
	var removed []hub.Href
	err := s.writeInTurn(ctx, func(ctx context.Context, from hub.Stamp) (err error) {
		removed, err = s.records.Unpublish(ctx, from, []hub.Href{href})
		return err
	})
	if err != nil && !hub.IsKind(err, hub.NotFound) || len(removed) > 0 {
		return err
	}
	return s.storePiece(ctx, []hub.Change{{Href: href, Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}}})
}

// changeOf makes a change of a device's answer.
func (s *session) changeOf(href hub.Href, m *coap.Message) hub.Change {
	if len(m.Payload) > hub.MaxContent {
		s.gw.metrics.tooLarge.Inc()
	}
	return change(href, statusOf(m.Code), contentOf(m), coap.ETag(m))
}

// statusOf is how a device's answer shows in the twin.
func statusOf(c codes.Code) hub.Status {
	switch c {
	case codes.Content, codes.Changed, codes.Deleted:
		return hub.StatusOK
	case codes.Created:
		return hub.StatusCreated
	case codes.Valid:
		return hub.StatusNotModified
	case codes.BadRequest:
		return hub.StatusBadRequest
	case codes.Unauthorized:
		return hub.StatusUnauthorized
	case codes.Forbidden:
		return hub.StatusForbidden
	case codes.NotFound:
		return hub.StatusNotFound
	case codes.MethodNotAllowed:
		return hub.StatusMethodNotAllowed
	case codes.NotImplemented:
		return hub.StatusNotImplemented
	case codes.ServiceUnavailable:
		return hub.StatusUnavailable
	default:
		return hub.StatusError
	}
}
