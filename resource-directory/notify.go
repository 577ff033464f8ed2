package resourcedirectory

import (
	"bytes"
	"context"
	"slices"

	"github.com/coaphub/coaphub/hub"
)

// maxTypes bounds a change's resource types in bytes.
const maxTypes = 16 << 10

// Notify stores changes of the session's device in one go, durably on return. Changes that change nothing make no event.
// Invalid for an href that is not clean, TooLarge for content over hub.MaxContent or beyond the device's limits; then nothing
// is stored. Of several changes of one resource each makes its event, in the given order.
func (d *Directory) Notify(ctx context.Context, from hub.Stamp, changes []hub.Change) error {
	const op = "directory.Notify"
	for i := range changes {
		if err := checkChange(&changes[i]); err != nil {
			return wrap(op, err)
		}
	}
	r := &request{dev: from.Device, op: op}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		done, err := s.fence(from)
		if done || err != nil {
			return nil, err
		}
		count, size := s.twins.n, s.twinBytes
		var events []hub.Event
		var earlier map[hub.Href]*hub.Resource // what changes before this one in the same request made
		for i := range changes {
			c := changes[i]
			if len(c.Types) == 0 {
				if l, ok := s.links.get(string(c.Href)); ok {
					c.Types = l.Types
				}
			}
			old, ok := earlier[c.Href]
			if !ok {
				var t *twin
				if t, ok = s.twins.get(string(c.Href)); ok {
					old = &t.Resource
				}
			}
			if ok && unchanged(old, &c) {
				continue
			}
			now := &hub.Resource{Href: c.Href, Types: c.Types, Status: c.Status, Content: c.Content, ETag: c.ETag}
			size += twinSize(now)
			if ok {
				size -= twinSize(old)
			} else {
				count++
			}
			events = append(events, s.changed(from, &c))
			if len(changes) > 1 {
				if earlier == nil {
					earlier = make(map[hub.Href]*hub.Resource, len(changes))
				}
				earlier[c.Href] = now
			}
		}
		if lim := d.cfg.Limits; len(events) > 0 && (count > lim.Resources || size > lim.TwinBytes && size > s.twinBytes) {
			return nil, hub.NewError(hub.TooLarge, "twin-limit", "the device reports more than the hub keeps for one device")
		}
		return events, nil
	}
	return d.do(ctx, r)
}

func checkChange(c *hub.Change) error {
	if err := checkHref(c.Href); err != nil {
		return err
	}
	switch {
	case len(c.Content.Data) > hub.MaxContent:
		return hub.NewError(hub.TooLarge, "content-too-large", "the content is larger than 256 KiB")
	case len(c.ETag) > 255 || len(c.Content.Type) > 255 || textsSize(c.Types) > maxTypes:
		return hub.NewError(hub.TooLarge, "change-too-large", "the ETag, media type or resource types are too long")
	}
	return nil
}

func (s *state) changed(from hub.Stamp, c *hub.Change) hub.Event {
	ev := s.event(hub.ResourceChanged, from)
	ev.Href, ev.Status, ev.Content, ev.ETag, ev.Types = c.Href, c.Status, c.Content, c.ETag, c.Types
	return ev
}

// unchanged compares the ETag too: a new one with equal content must be kept, or the device resends what it need not.
func unchanged(r *hub.Resource, c *hub.Change) bool {
	return r.Status == c.Status && r.Content.Format == c.Content.Format && r.Content.Type == c.Content.Type &&
		bytes.Equal(r.Content.Data, c.Content.Data) && bytes.Equal(r.ETag, c.ETag) && slices.Equal(r.Types, c.Types)
}
