package resourcedirectory

import (
	"context"
	"slices"

	"github.com/coaphub/coaphub/hub"
)

// maxLink bounds one link, so that a page of them stays small.
const maxLink = 16 << 10

// Publish merges links by href and returns what is now stored for each given one, in the given order. Only new and changed
// links make an event. Invalid for no links or an href that is not clean, TooLarge beyond the device's limits; then nothing
// is stored.
func (d *Directory) Publish(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error) {
	const op = "directory.Publish"
	if len(links) == 0 {
		return nil, hub.NewError(hub.Invalid, "links-empty", "there are no links to publish").With(op, nil)
	}
	// The last of several links with one href is what the device means.
	last := make(map[hub.Href]int, len(links))
	for i := range links {
		if err := checkHref(links[i].Href); err != nil {
			return nil, wrap(op, err)
		}
		if linkSize(&links[i]) > maxLink {
			return nil, hub.NewError(hub.TooLarge, "link-too-large", "a link is larger than 16 KiB").With(op, nil)
		}
		last[links[i].Href] = i
	}
	var out []hub.Link
	r := &request{dev: from.Device, op: op}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		done, err := s.fence(from)
		if err != nil {
			return nil, err
		}
		out = make([]hub.Link, 0, len(links))
		if done {
			for i := range links { // what the first try stored, or what came after it
				if l, ok := s.links.get(string(links[i].Href)); ok {
					out = append(out, *l)
				}
			}
			return nil, nil
		}
		var changed []hub.Link
		count, bytes := s.links.n, s.linkBytes
		for i := range links {
			l := &links[i]
			out = append(out, links[last[l.Href]])
			if last[l.Href] != i {
				continue
			}
			old, ok := s.links.get(string(l.Href))
			if ok && sameLink(old, l) {
				continue
			}
			changed = append(changed, *l)
			bytes += linkSize(l)
			if ok {
				bytes -= linkSize(old)
			} else {
				count++
			}
		}
		if lim := d.cfg.Limits; len(changed) > 0 && (count > lim.Links || bytes > lim.LinkBytes) {
			return nil, hub.NewError(hub.TooLarge, "links-limit", "the device publishes more links than the hub keeps for one device")
		}
		return published(s, from, changed), nil
	}
	if err := d.do(ctx, r); err != nil {
		return nil, err
	}
	return out, nil
}

// published makes the events of a publish, more than one when the links do not fit one commit.
func published(s *state, from hub.Stamp, links []hub.Link) []hub.Event {
	var events []hub.Event
	for len(links) > 0 {
		n, size := 0, 0
		for n < len(links) && (n == 0 || size+linkSize(&links[n]) <= maxPiece) {
			size += linkSize(&links[n])
			n++
		}
		ev := s.event(hub.LinksPublished, from)
		ev.Links = links[:n:n]
		events = append(events, ev)
		links = links[n:]
	}
	return events
}

// Unpublish removes links by href and, for each removed one, sets its twin to NOT_FOUND. Empty hrefs means all. It returns
// what was removed, in href order; repeating the same message returns what is still as the first try left it.
func (d *Directory) Unpublish(ctx context.Context, from hub.Stamp, hrefs []hub.Href) ([]hub.Href, error) {
	const op = "directory.Unpublish"
	hrefs = slices.Clone(hrefs)
	slices.Sort(hrefs)
	hrefs = slices.Compact(hrefs)
	var removed []hub.Href
	r := &request{dev: from.Device, op: op}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		removed = nil
		done, err := s.fence(from)
		if err != nil {
			return nil, err
		}
		if done {
			for t := range s.twins.all() {
				if t.Status == hub.StatusNotFound && t.Session == from.Session && t.Message == from.Message {
					removed = append(removed, t.Href)
				}
			}
			return nil, nil
		}
		if len(hrefs) == 0 {
			for l := range s.links.all() {
				removed = append(removed, l.Href)
			}
		} else {
			for _, h := range hrefs {
				if _, ok := s.links.get(string(h)); ok {
					removed = append(removed, h)
				}
			}
		}
		return s.unpublished(from, removed), nil
	}
	if err := d.do(ctx, r); err != nil {
		return nil, err
	}
	return removed, nil
}

func (s *state) unpublished(from hub.Stamp, hrefs []hub.Href) []hub.Event {
	var events []hub.Event
	for rest := hrefs; len(rest) > 0; {
		n, size := 0, 0
		for n < len(rest) && (n == 0 || size+len(rest[n])+5 <= maxPiece) {
			size += len(rest[n]) + 5
			n++
		}
		ev := s.event(hub.LinksUnpublished, from)
		ev.Hrefs = rest[:n:n]
		events = append(events, ev)
		rest = rest[n:]
	}
	for _, h := range hrefs {
		l, _ := s.links.get(string(h))
		gone := hub.Change{
			Href: h, Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}, Types: l.Types,
		}
		if old, ok := s.twins.get(string(h)); !ok || !unchanged(&old.Resource, &gone) {
			events = append(events, s.changed(from, &gone))
		}
	}
	return events
}

// event begins an event that a session's message causes.
func (s *state) event(kind hub.EventKind, from hub.Stamp) hub.Event {
	return hub.Event{
		Kind: kind, Session: from.Session, Message: from.Message, Connection: s.meta.Connection.ID, User: from.User,
	}
}

func checkHref(h hub.Href) error {
	clean, err := hub.ParseHref(string(h))
	if err == nil && clean != h {
		err = hub.NewError(hub.Invalid, "href-invalid", "the href is not clean")
	}
	return err
}

func sameLink(a, b *hub.Link) bool {
	return a.Href == b.Href && a.Anchor == b.Anchor && a.Title == b.Title && a.Policy == b.Policy &&
		a.ValidUntil == b.ValidUntil && slices.Equal(a.Types, b.Types) && slices.Equal(a.Interfaces, b.Interfaces) &&
		slices.Equal(a.ContentTypes, b.ContentTypes) && slices.Equal(a.Endpoints, b.Endpoints)
}
