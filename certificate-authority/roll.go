package certificateauthority

import (
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Step is one of rolling an authority over to new keys.
type Step string

// The steps.
const (
	// RollIssuing makes a new issuing certificate under the same root, which signs from then on.
	RollIssuing Step = "issuing"
	// RollRoot makes a new root beside the one in use. It is believed and given out, and nothing is signed under it yet.
	RollRoot Step = "root"
	// RollFinish makes an issuing certificate under the new root, which signs from then on.
	RollFinish Step = "finish"
	// RollList changes no key: it makes the revocation lists of the roots anew, before the last ones end.
	RollList Step = "list"
)

var (
	errRoot    = hub.NewError(hub.NotFound, "root-unknown", "the roots are device, https and internal")
	errRootKey = hub.NewError(hub.Precondition, "root-key-missing",
		"the root's key is not in the data folder: give the file that coaphub ca export-root has written, with --root-key")
	errRootKeyWrong = hub.NewError(hub.Invalid, "root-key-wrong", "the file has no private key of this root")
	errInUse        = hub.NewError(hub.Precondition, "issuer-in-use", "this is what signs now: roll over to another first (coaphub ca roll)")
)

// Roll takes one step. rootKeys is PEM with keys of roots, for a root whose key is not in the folder; it is not kept. Precondition
// when a step does not follow from where the authority is, and when the root's key is not to be had ("root-key-missing"). What was
// made is on the disk on return, and is used from then on.
func (a *Authority) Roll(r Root, step Step, rootKeys []byte) error {
	return a.change(r, func(l line) error {
		n, by := len(l.issuers)+1, l.signer()
		switch step {
		case RollRoot:
			return a.addRoot(r, l, rootKeys)
		case RollList:
			return l.signLists(l.anchors(time.Now()), rootKeys)
		}
		under := l.rootOf(by)
		switch step {
		case RollIssuing:
		case RollFinish:
			if under = l.newest(); under.cert == by.root {
				return hub.NewError(hub.Precondition, "roll-not-begun", "there is no new root: make one (coaphub ca roll --root), and give devices time to learn it")
			}
		default:
			return hub.NewError(hub.Invalid, "roll-unknown", "the steps are issuing, root, finish and list")
		}
		if len(l.believed(time.Now())) >= maxIssuers {
			return hub.NewError(hub.Precondition, "issuers-limit", "too many issuing certificates are believed at a time: retire old ones (coaphub ca retire)")
		}
		key, err := rootKey(under, rootKeys)
		if err != nil {
			return err
		}
		if err := l.signList(under, key, ""); err != nil { // who brought the key does not have to again for long
			return err
		}
		_, _, err = makeIssuing(pairFile(a.dir, r, "issuing", n, liveEnd), r, n, a.hubID, under.cert, key, a.keys, a.lists)
		return err
	})
}

func (a *Authority) addRoot(r Root, l line, rootKeys []byte) error {
	if len(l.anchors(time.Now())) > 1 {
		return hub.NewError(hub.Precondition, "roots-overlap",
			"two roots are believed already: finish with the newer one (coaphub ca roll --finish) and retire the other (coaphub ca retire)")
	}
	old := l.rootOf(l.signer())
	oldKey, err := rootKey(old, rootKeys)
	if err != nil {
		return err
	}
	cert, key, err := newRoot(r, a.hubID)
	if err != nil {
		return fmt.Errorf("make the %s root: %w", r, err)
	}
	cross, err := newCross(cert, old.cert, oldKey, a.lists)
	if err != nil {
		return err
	}
	if err := l.signList(old, oldKey, ""); err != nil {
		return err
	}
	n := len(l.roots) + 1
	if err := writePair(pairFile(a.dir, r, "cross", n, liveEnd), cross, nil); err != nil { // first: nobody asks for it without its root
		return err
	}
	if err := writePair(pairFile(a.dir, r, "root", n, liveEnd), cert, key); err != nil {
		return err
	}
	return l.signList(anchor{cert: cert, listFile: pairFile(a.dir, r, "root", n, listEnd)}, key, "")
}

// rootOf finds the root of an issuing certificate.
func (l *line) rootOf(s signer) anchor {
	return l.roots[slices.IndexFunc(l.roots, func(r anchor) bool { return r.cert == s.root })]
}

// rootKey reads a root's key from its file, or finds it among those that were given.
func rootKey(r anchor, given []byte) (crypto.Signer, error) {
	_, key, err := readPair(r.file)
	switch {
	case err != nil || key != nil:
		return key, err
	case len(given) == 0:
		return nil, errRootKey
	}
	keys, err := parseKeys(given)
	if err != nil {
		return nil, err
	}
	for _, key := range keys {
		if samePublic(key, r.cert) {
			return key, nil
		}
	}
	return nil, errRootKeyWrong
}

// parseKeys reads the private keys of a PEM text, whatever else is in it.
func parseKeys(text []byte) (out []crypto.Signer, err error) {
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		var key any
		switch block.Type {
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "EC PRIVATE KEY": // as openssl ec writes it
			key, err = x509.ParseECPrivateKey(block.Bytes)
		default:
			continue
		}
		signer, ok := key.(crypto.Signer)
		if err != nil || !ok {
			return nil, errRootKeyWrong.With("parse", err)
		}
		out = append(out, signer)
	}
	return out, nil
}

// Retire ends the belief in an issuing certificate, or in a root with all that issues under it, by the ID of its key: no device
// comes in with what it has signed. Its key is destroyed, where it is in a file, and its certificate kept. It cannot be taken
// back. Repeated it does nothing. What signs now is a Precondition ("issuer-in-use").
//
// First it is put on the revocation list of the root that has signed it, so that others believe it no more either. That needs the
// root's key, as Roll does. Retiring does not wait for it: without the key the list lacks it, as Parts tells, until somebody brings the
// key (RollList). A root that is retired itself has a last list if its key is to be had: nobody should believe it any more.
func (a *Authority) Retire(id string, rootKeys []byte) error {
	for _, r := range Roots() {
		if l := a.line(r); l.has(id) {
			return a.change(r, func(l line) error { return l.retire(id, rootKeys) })
		}
	}
	return hub.NewError(hub.NotFound, "issuer-unknown", "there is no such issuer; coaphub ca list shows those there are")
}

func (l *line) has(id string) bool {
	return slices.ContainsFunc(l.roots, func(r anchor) bool { return r.name == id }) ||
		slices.ContainsFunc(l.issuers, func(s signer) bool { return s.name == id })
}

func (l *line) retire(id string, rootKeys []byte) error {
	var files []string
	by := l.signer()
	for _, s := range l.issuers {
		switch {
		case s.name != id && l.rootOf(s).name != id:
		case s.name == by.name:
			return errInUse
		case s.key != nil:
			files = append(files, s.file)
		}
	}
	for _, root := range l.roots { // behind its issuers: one that is believed has a root that is
		if root.name == id && !root.retired {
			files = append(files, root.file)
		}
	}
	for _, root := range l.roots {
		if root.retired || len(l.revoked(root, id)) == len(l.revoked(root, "")) {
			continue
		}
		key, err := rootKey(root, rootKeys)
		if err == nil {
			err = l.signList(root, key, id)
		}
		// Whoever has stolen an issuing key must not have it until the root's was fetched from where it is safe.
		if err != nil && !errors.Is(err, errRootKey) {
			return err
		}
	}
	for _, file := range files {
		if err := retire(file); err != nil {
			return err
		}
	}
	return nil
}

// retire writes a file's certificate without its key beside it, and then removes it.
func retire(file string) error {
	cert, _, err := readPair(file)
	if err != nil {
		return err
	}
	if err := writePair(file[:len(file)-len(liveEnd)]+retiredEnd, cert, nil); err != nil {
		return err
	}
	return remove(file)
}

func remove(file string) error {
	switch err := os.Remove(file); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("remove %s: %w", file, err)
	}
	return syncDir(filepath.Dir(file))
}

// RootKeys returns the files of all roots of r whose keys are in the folder: certificates and keys, PEM. Precondition when there
// is none ("root-key-missing").
func (a *Authority) RootKeys(r Root) ([]byte, error) {
	l, err := a.known(r)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, root := range l.roots {
		if !root.keyed || root.retired {
			continue
		}
		cert, key, err := readPair(root.file)
		if err != nil {
			return nil, err
		}
		text, err := keyPEM(key)
		if err != nil {
			return nil, err
		}
		out = slices.Concat(out, certPEM(cert), text)
	}
	if out == nil {
		return nil, hub.NewError(hub.Precondition, "root-key-missing", "the root's key is not in the data folder")
	}
	return out, nil
}

// ForgetRootKeys takes the keys of the roots of r out of the folder, after the caller has put what RootKeys returned where it is
// safe. A key that is not in the copy stays, and is an error ("root-key-wrong"): it would be lost.
func (a *Authority) ForgetRootKeys(r Root, safe []byte) error {
	return a.change(r, func(l line) error {
		keys, err := parseKeys(safe)
		if err != nil {
			return err
		}
		for _, root := range l.roots {
			if !root.keyed || root.retired {
				continue
			}
			if !slices.ContainsFunc(keys, func(k crypto.Signer) bool { return samePublic(k, root.cert) }) {
				return errRootKeyWrong
			}
			if err := l.signLists([]anchor{root}, nil); err != nil { // the last for long
				return err
			}
			if err := writePair(root.file, root.cert, nil); err != nil {
				return err
			}
		}
		return nil
	})
}

// change makes a change of the files of r, and then uses what is there. One is made at a time.
func (a *Authority) change(r Root, to func(line) error) error {
	err := a.changeAlone(r, to)
	if changed := a.changed.Load(); changed != nil {
		(*changed)()
	}
	return err
}

func (a *Authority) changeAlone(r Root, to func(line) error) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	l, err := a.known(r)
	if err != nil {
		return err
	}
	if now, err := a.reread(r); err == nil { // another authority may have changed something
		l = now
	}
	// What was written before an error counts: the next start would find it, too.
	err = to(l)
	if l, readErr := openLine(a.dir, r, a.hubID, a.keys, a.lists); readErr == nil {
		next := maps.Clone(*a.lines.Load())
		next[r] = l
		a.lines.Store(&next)
	} else {
		err = errors.Join(err, readErr)
	}
	return err
}

// reload takes over what others have changed in the folder. What was there must be there still, also if it is retired by now: else
// nothing changes.
func (a *Authority) reload() error {
	a.changing.Lock()
	defer a.changing.Unlock()
	next := make(map[Root]line)
	for _, r := range Roots() {
		var err error
		if next[r], err = a.reread(r); err != nil {
			return err
		}
	}
	a.lines.Store(&next)
	return nil
}

// reread reads the files of r as they are by now. It makes none.
func (a *Authority) reread(r Root) (line, error) {
	old := a.line(r)
	for kind, had := range map[string]int{"root": len(old.roots), "issuing": len(old.issuers)} {
		if there, err := readPairs(a.dir, r, kind); err != nil {
			return line{}, err
		} else if len(there) < had {
			return line{}, fmt.Errorf("files of the %s root are gone from %s: restore them from a backup", r, a.dir)
		}
	}
	l, err := openLine(a.dir, r, a.hubID, a.keys, a.lists)
	if err != nil {
		return line{}, err
	}
	if !l.after(old) {
		return line{}, fmt.Errorf("the files of the %s root in %s are older than what is in use, or of another hub", r, a.dir)
	}
	return l, nil
}

// after reports whether a line has all that another one has, and all retired that is so there: it is the same some time later.
func (l *line) after(old line) bool {
	return len(l.roots) >= len(old.roots) && len(l.issuers) >= len(old.issuers) &&
		slices.EqualFunc(l.roots[:len(old.roots)], old.roots, func(a, b anchor) bool { return a.cert.Equal(b.cert) && (a.retired || !b.retired) }) &&
		slices.EqualFunc(l.issuers[:len(old.issuers)], old.issuers, func(a, b signer) bool {
			return a.issuing.Equal(b.issuing) && (a.key == nil || b.key != nil)
		})
}

// Part is a root or an issuing certificate of the hub.
type Part struct {
	Root  Root
	Kind  string // root, issuing
	ID    string // of its key
	Since time.Time
	Until time.Time
	// State is "in use", "announced" for a root under which nothing was signed yet, "believed" for what was in use and is still
	// good, "ended" and "retired".
	State string
	Key   bool // its key can be used: an issuing one is not retired, a root's is in the folder

	// ListUntil is until when a root's revocation list is good; zero for one without, and for an issuing certificate, whose list is made
	// when it is asked for. Lacks is how many certificates a believed root has signed that are retired and not on its list.
	ListUntil time.Time
	Lacks     int
}

// Parts lists all of them, oldest first, roots before what issues under them.
func (a *Authority) Parts() []Part {
	var out []Part
	now := time.Now()
	for _, r := range Roots() {
		l := a.line(r)
		by := l.signer()
		state := func(c *x509.Certificate, current, retired bool) string {
			switch {
			case retired:
				return "retired"
			case !now.Before(c.NotAfter):
				return "ended"
			case current:
				return "in use"
			}
			return "believed"
		}
		for i, root := range l.roots {
			p := Part{
				Root: r, Kind: "root", ID: root.name, Since: root.cert.NotBefore, Until: root.cert.NotAfter,
				State: state(root.cert, root.cert == by.root, root.retired), Key: root.keyed,
			}
			if root.list != nil {
				p.ListUntil = root.list.NextUpdate
			}
			if p.State != "retired" && p.State != "ended" {
				p.Lacks = len(l.lacks(root))
			}
			if p.State == "believed" && slices.IndexFunc(l.roots, func(o anchor) bool { return o.cert == by.root }) < i {
				p.State = "announced"
			}
			out = append(out, p)
			for _, s := range l.issuers {
				if s.root == root.cert {
					out = append(out, Part{
						Root: r, Kind: "issuing", ID: s.name, Since: s.issuing.NotBefore, Until: s.issuing.NotAfter,
						State: state(s.issuing, s.name == by.name, s.key == nil), Key: s.key != nil,
					})
				}
			}
		}
	}
	return out
}
