package resourcedirectory

import (
	"hash/crc32"
	"sync/atomic"

	"github.com/coaphub/coaphub/hub"
)

// deviceHref is the resource that tells what a device is (OCF Core, 11.3.4: oic.wk.d).
const deviceHref hub.Href = "/oic/d"

// changes counts, for devices that share a place, the commits that changed how a device looks in a list: its ownership,
// metadata, links, labels or /oic/d. Two devices in one place cost a needless look at one of them, nothing else; so there is
// one number for each of some thousand places, and nothing to clean up.
type changes [1 << 14]atomic.Uint64

func (c *changes) of(dev hub.DeviceID) *atomic.Uint64 {
	return &c[crc32.ChecksumIEEE([]byte(dev))%uint32(len(c))]
}

// Changes returns a number that differs from an earlier one if the device looks different in a list since. Whoever reads the
// number first and the device then may keep what it made of it until the number differs: a commit is counted after readers
// see it. Writes of other processes are not counted.
func (d *Directory) Changes(dev hub.DeviceID) uint64 { return d.changes.of(dev).Load() }

// count notes the commits of a build, also those whose fate is not known.
func (c *changes) count(b *build) {
	for _, draft := range b.commits {
		for i := range draft.c.Events {
			if looksDifferent(&draft.c.Events[i]) {
				c.of(b.e.dev).Add(1)
				return
			}
		}
	}
}

func looksDifferent(ev *hub.Event) bool {
	switch ev.Kind {
	case hub.Registered, hub.Unregistered, hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.LabelsChanged:
		return true
	case hub.ResourceChanged:
		return ev.Href == deviceHref
	case hub.CommandEnded:
		return ev.Metadata != nil
	case hub.CommandPending, hub.CommandBound, hub.CommandLate: // no list shows them
	}
	return false
}
