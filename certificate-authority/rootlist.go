package certificateauthority

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

const (
	// rootListValid is for how long a root's list is good. Its key may be offline, and is not to be brought more often than this.
	rootListValid = 365 * 24 * time.Hour
	// rootListRenew is how long before its end it is made anew, if the key is there, and warned of if it is not.
	rootListRenew = 30 * 24 * time.Hour
)

var errNoRootList = hub.NewError(hub.NotFound, "root-list-missing", "the root has no revocation list yet: its key was offline ever since there are such lists")

// root finds a root by the name of its key, retired or not.
func (a *Authority) root(name string) (anchor, bool) {
	for _, l := range *a.lines.Load() {
		for _, r := range l.roots {
			if r.name == name {
				return r, true
			}
		}
	}
	return anchor{}, false
}

// readRootList reads a root's newest list; nil: there is none.
func readRootList(file string, root *x509.Certificate) (*x509.RevocationList, error) {
	der, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	list, err := x509.ParseRevocationList(der)
	if err == nil {
		err = list.CheckSignatureFrom(root)
	}
	if err == nil && (list.Number == nil || !list.Number.IsInt64()) {
		err = errors.New("it has no number")
	}
	if err != nil {
		return nil, fmt.Errorf("%s is damaged, restore it from a backup: %w", file, err)
	}
	return list, nil
}

// revoked is what a root has signed and is retired, or will be with what has that ID ("": nothing): issuing certificates, and those
// of the roots after it.
func (l *line) revoked(by anchor, id string) (out []*x509.Certificate) {
	for _, s := range l.issuers {
		if s.root == by.cert && (s.key == nil || s.name == id || by.name == id) {
			out = append(out, s.issuing)
		}
	}
	for _, r := range l.roots {
		if r.cross != nil && (r.retired || r.name == id) && r.cross.CheckSignatureFrom(by.cert) == nil {
			out = append(out, r.cross)
		}
	}
	return out
}

// signList makes the next revocation list of a root (RFC 5280, Section 5), with what is retired and what has that ID. What was on the
// last one stays, with its time. It has no end: there are few, and who believes the root is told for as long as it lasts.
func (l *line) signList(root anchor, key crypto.Signer, id string) error {
	now := time.Now()
	var last int64
	var entries []x509.RevocationListEntry
	if root.list != nil {
		last = root.list.Number.Int64()
		for _, e := range root.list.RevokedCertificateEntries {
			entries = append(entries, x509.RevocationListEntry{SerialNumber: e.SerialNumber, RevocationTime: e.RevocationTime})
		}
	}
	for _, c := range l.revoked(root, id) {
		if !lists(entries, c) {
			// Why is not known: as a matter of course, or since somebody else has the key. Since when, for one that the list lacked, is not
			// either: who believed it until now is told that he may not.
			entries = append(entries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: now.Add(-listBackdate)})
		}
	}
	der, err := newList(root.cert, key, numberAfter(last, now), entries, now, rootListValid)
	if err != nil {
		return err
	}
	return writeSecret(root.listFile, der)
}

// lacks is what a root has signed and is retired, and its list does not have: its key was not there.
func (l *line) lacks(root anchor) []*x509.Certificate {
	return slices.DeleteFunc(l.revoked(root, ""), func(c *x509.Certificate) bool {
		return root.list != nil && lists(root.list.RevokedCertificateEntries, c)
	})
}

func lists(entries []x509.RevocationListEntry, c *x509.Certificate) bool {
	return slices.ContainsFunc(entries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(c.SerialNumber) == 0 })
}

// signLists is signList for several roots, whose keys are in the folder or among those given. All that can be are signed; the error
// is of the first that could not.
func (l *line) signLists(roots []anchor, rootKeys []byte) (first error) {
	for _, root := range roots {
		key, err := rootKey(root, rootKeys)
		if err == nil {
			err = l.signList(root, key, "")
		}
		if first == nil {
			first = err
		}
	}
	return first
}

// due are the believed roots whose list is to be made: it ends soon, or lacks something. A root without one whose key is not in the
// folder, and under which nothing was retired, is not: it is from before there were such lists, and nothing that it has signed names
// one.
func (l *line) due(now time.Time) []anchor {
	return slices.DeleteFunc(l.anchors(now), func(r anchor) bool {
		switch {
		case len(l.lacks(r)) > 0:
			return false
		case r.list == nil:
			return !r.keyed
		}
		return r.list.NextUpdate.Sub(now) >= rootListRenew
	})
}

// listsDue is how many lists of roots are to be made, which the hub does by itself where it has the key.
func (a *Authority) listsDue(now time.Time) (n int) {
	for _, l := range *a.lines.Load() {
		n += len(l.due(now))
	}
	return n
}

// renewLists makes the lists of roots that have none yet, lack something, or end soon. An error is also that the key which is needed
// is not in the folder.
func (a *Authority) renewLists(now time.Time) error {
	var all error
	for _, r := range Roots() {
		if l := a.line(r); len(l.due(now)) == 0 {
			continue
		}
		err := a.change(r, func(l line) error { return l.signLists(l.due(now), nil) })
		if errors.Is(err, errRootKey) {
			err = fmt.Errorf("the list of the %s root lacks what was retired, or ends within 30 days (coaphub ca renew-list %s --root-key FILE): %w", r, r, err)
		}
		all = errors.Join(all, err)
	}
	return all
}
