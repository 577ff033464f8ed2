package coapgateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"iter"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// A device in quarantine signs in as ever, but not with the directory: to that it is offline. Its session reads and writes what is
// kept apart, so that it is observed and answered like any other, and two with one identity may be here at the same time.

var (
	errQuarantined = hub.NewError(hub.Denied, "device-quarantined", "the device is in quarantine")
	// errMoved ends a session whose device's quarantine began or ended; the device's next one is of the other kind.
	errMoved = hub.NewError(hub.Unavailable, "quarantine-changed", "the device's quarantine has just begun or ended, sign in again")
)

// quarantined reports whether what a device writes is to be kept apart.
func (g *Gateway) quarantined(dev hub.DeviceID) bool {
	return g.deps.Quarantine != nil && g.deps.Quarantine.Quarantined(dev)
}

// maxApart bounds the sessions of a device in quarantine: nobody's session takes the place of another's there, and one identity is not
// to have all connections.
const maxApart = 16

// misplaced reports that the session is of the wrong kind by now.
func (s *session) misplaced() bool { return s.apart != s.gw.quarantined(s.own.Device) }

// keptApart is the records of a session in quarantine.
type keptApart struct {
	keep  Quarantine
	own   hub.Ownership
	from  hub.KeptFrom
	limit int // of links

	mu    sync.Mutex // guards links
	links map[hub.Href]hub.Link
}

// keepApart begins a session in quarantine. It knows of the links that the directory had, as if nothing had happened.
func (p *peer) keepApart(ctx context.Context, own hub.Ownership, conn hub.Connection) (*keptApart, hub.Session, error) {
	a := &keptApart{
		keep: p.gw.deps.Quarantine, own: own, limit: p.gw.cfg.API.CoAP.MaxLinks, links: map[hub.Href]hub.Link{},
		from: hub.KeptFrom{Remote: p.conn.Info().Remote.String(), Connection: conn.ID, Protocol: conn.Protocol.String(), Credential: p.cred.shown()},
	}
	got := hub.Session{Device: own.Device, Owner: own.Owner, TwinEnabled: true}
	switch dev, err := p.gw.deps.Directory.Device(ctx, own.Owner, own.Device); {
	case err == nil:
		got.TwinEnabled = dev.Metadata.Twin.Enabled
		for l := range dev.Links.All() {
			if len(a.links) < a.limit {
				a.links[l.Href] = l
			}
		}
	case !hub.IsKind(err, hub.NotFound):
		return nil, got, err
	}
	err := retry(ctx, p.gw.patience, func() (err error) {
		got.Number, err = a.keep.Keep(ctx, own, hub.KeptWrite{Time: time.Now(), Kind: hub.KeptSignedIn, From: a.from})
		return err
	})
	if hub.IsKind(err, hub.Precondition) { // it is over already
		err = errMoved
	}
	return a, got, err
}

// shown is the credential for people, who may put the fingerprint on the deny list.
func (c credential) shown() string {
	switch {
	case c.psk:
		return "pre-shared-key"
	case c.cert != nil:
		sum := sha256.Sum256(c.cert.Raw)
		return "certificate " + hex.EncodeToString(sum[:])
	}
	return "token"
}

func (a *keptApart) write(ctx context.Context, from hub.Stamp, w hub.KeptWrite) error {
	w.Time, w.Session, w.Message, w.From = time.Now(), from.Session, from.Message, a.from
	_, err := a.keep.Keep(ctx, a.own, w)
	return err
}

// Notify implements records.
func (a *keptApart) Notify(ctx context.Context, from hub.Stamp, changes []hub.Change) error {
	w := hub.KeptWrite{Kind: hub.KeptChanged, Changes: make([]hub.KeptChange, len(changes))}
	for i, c := range changes {
		w.Changes[i] = hub.KeptChange{Href: c.Href, Status: c.Status, ContentType: c.Content.Type, Format: c.Content.Format, Data: c.Content.Data}
	}
	return a.write(ctx, from, w)
}

// Publish implements records.
func (a *keptApart) Publish(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error) {
	w := hub.KeptWrite{Kind: hub.KeptPublished, Links: make([]hub.KeptLink, len(links))}
	a.mu.Lock()
	all := maps.Clone(a.links)
	a.mu.Unlock()
	for i, l := range links {
		w.Links[i] = hub.KeptLink{Href: l.Href, Types: l.Types, Interfaces: l.Interfaces}
		all[l.Href] = l
	}
	if len(all) > a.limit {
		return nil, hub.NewError(hub.TooLarge, "links-limit", "the device publishes more links than the hub keeps for one device")
	}
	if err := a.write(ctx, from, w); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.links = all
	return links, nil
}

// Unpublish implements records.
func (a *keptApart) Unpublish(ctx context.Context, from hub.Stamp, hrefs []hub.Href) ([]hub.Href, error) {
	a.mu.Lock()
	var gone []hub.Href
	for h := range a.links {
		if len(hrefs) == 0 || slices.Contains(hrefs, h) {
			gone = append(gone, h)
		}
	}
	a.mu.Unlock()
	if len(gone) == 0 {
		return nil, nil
	}
	slices.Sort(gone)
	if err := a.write(ctx, from, hub.KeptWrite{Kind: hub.KeptUnpublished, Hrefs: gone}); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range gone {
		delete(a.links, h)
	}
	return gone, nil
}

// Device implements records: of the picture, the links.
func (a *keptApart) Device(context.Context, hub.Owner, hub.DeviceID) (*hub.Device, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	links := make(linkList, 0, len(a.links))
	for _, l := range a.links {
		links = append(links, l)
	}
	slices.SortFunc(links, func(a, b hub.Link) int { return cmp.Compare(a.Href, b.Href) })
	return &hub.Device{ID: a.own.Device, Owner: a.own.Owner, Generation: a.own.Generation, Links: links}, nil
}

// ETags implements records: all is asked for, so that each session tells the whole story.
func (a *keptApart) ETags(context.Context, hub.DeviceID, int) ([][]byte, error) { return nil, nil }

// What the directory is told of a session's state it is not told of these.

// SignOut implements records.
func (a *keptApart) SignOut(context.Context, hub.Stamp) error { return nil }

// Offline implements records.
func (a *keptApart) Offline(context.Context, hub.Stamp) error { return nil }

// SetTwin implements records.
func (a *keptApart) SetTwin(context.Context, hub.Stamp, hub.TwinState) error { return nil }

// SetLocalEndpoints implements records.
func (a *keptApart) SetLocalEndpoints(context.Context, hub.Stamp, []string) error { return nil }

// SetContact implements records.
func (a *keptApart) SetContact(context.Context, hub.Stamp, hub.Contact) error { return nil }

// linkList is a hub.LinkSet.
type linkList []hub.Link

func (l linkList) Len() int { return len(l) }

func (l linkList) Get(h hub.Href) (hub.Link, bool) {
	if i := slices.IndexFunc(l, func(x hub.Link) bool { return x.Href == h }); i >= 0 {
		return l[i], true
	}
	return hub.Link{}, false
}

func (l linkList) All() iter.Seq[hub.Link] { return slices.Values(l) }
