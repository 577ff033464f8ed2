package certificateauthority

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxIssuers bounds how many issuing certificates of a root are believed at a time: each is tried at a handshake.
const maxIssuers = 8

// line is one of the three authorities over the years: its roots, and what issues under them, the oldest first. The newest
// issuing certificate signs. A line is never changed: after each change there is another one.
type line struct {
	roots   []anchor
	issuers []signer
}

// anchor is a root of a line.
type anchor struct {
	cert *x509.Certificate
	// cross is the same key once more, signed by the root before it, so that who knows only that one believes this one. nil:
	// there is none.
	cross   *x509.Certificate
	name    string // of its key
	file    string
	keyed   bool // its key is in the file
	retired bool

	listFile string
	list     *x509.RevocationList // its newest; nil: there is none
}

// signer is an issuing certificate and its root. The root's own key is read when it is used, and not kept in memory.
type signer struct {
	root    *x509.Certificate
	issuing *x509.Certificate
	key     crypto.Signer // nil: it is retired
	name    string        // of its key
	file    string
}

// signer returns what signs now.
func (l *line) signer() signer { return l.issuers[len(l.issuers)-1] }

// newest returns the root that came last and is believed.
func (l *line) newest() anchor {
	for i := len(l.roots) - 1; i > 0; i-- {
		if !l.roots[i].retired {
			return l.roots[i]
		}
	}
	return l.roots[0]
}

// anchors are the roots that are believed, that of the signer first and then the newest first: some clients read one only.
func (l *line) anchors(now time.Time) []anchor {
	var out []anchor
	by := l.signer().root
	for i := len(l.roots) - 1; i >= 0; i-- {
		switch r := l.roots[i]; {
		case r.cert == by:
			out = append([]anchor{r}, out...)
		case !r.retired && now.Before(r.cert.NotAfter):
			out = append(out, r)
		}
	}
	return out
}

// believed are the issuing certificates that are good.
func (l *line) believed(now time.Time) []signer {
	var out []signer
	for _, s := range l.issuers {
		if s.key != nil && now.Before(s.issuing.NotAfter) {
			out = append(out, s)
		}
	}
	return out
}

// chain is what a server shows behind its certificate: what issued it, and what makes a new root believed by those who know only
// the one before it.
func (l *line) chain(now time.Time) [][]byte {
	s := l.signer()
	out := [][]byte{s.issuing.Raw}
	for _, r := range l.roots {
		if r.cert != s.root || r.cross == nil || !now.Before(r.cross.NotAfter) {
			continue
		}
		for _, older := range l.roots {
			if !older.retired && r.cross.CheckSignatureFrom(older.cert) == nil {
				return append(out, r.cross.Raw)
			}
		}
	}
	return out
}

// A line's files are a certificate and its key each: device-root.pem and device-issuing.pem, and with a number those that take their
// place: device-issuing-2.pem. So a change is one file that is there or is not, and an operator can take a root's key out of its
// file and the hub goes on. Of what is retired the certificate stays, in device-issuing.retired.pem: its leaves are told by it. A root's
// revocation list is in device-root.crl.

func pairFile(dir string, r Root, kind string, n int, end string) string {
	name := string(r) + "-" + kind
	if n > 1 {
		name += "-" + strconv.Itoa(n)
	}
	return filepath.Join(dir, name+end)
}

const liveEnd, retiredEnd, listEnd = ".pem", ".retired.pem", ".crl"

// pair is what such a file has.
type pair struct {
	file    string
	cert    *x509.Certificate
	key     crypto.Signer // nil: not in the file
	retired bool
}

// readPairs reads all files of a kind, in their order.
func readPairs(dir string, r Root, kind string) ([]pair, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look at the folder of the certification authority: %w", err)
	}
	last := 0
	for _, e := range entries {
		rest, ok := strings.CutPrefix(e.Name(), string(r)+"-"+kind)
		rest, live := strings.CutSuffix(strings.Replace(rest, retiredEnd, liveEnd, 1), liveEnd)
		if !ok || !live {
			continue
		}
		if rest == "" {
			last = max(last, 1)
		} else if n, err := strconv.Atoi(strings.TrimPrefix(rest, "-")); err == nil && n > 1 && rest == "-"+strconv.Itoa(n) {
			last = max(last, n)
		}
	}
	var out []pair
	for n := 1; n <= last; n++ {
		p := pair{file: pairFile(dir, r, kind, n, retiredEnd), retired: true}
		live := pairFile(dir, r, kind, n, liveEnd)
		p.cert, _, err = readPair(p.file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			p = pair{file: live}
			p.cert, p.key, err = readPair(live)
			if errors.Is(err, fs.ErrNotExist) {
				return nil, fmt.Errorf("%s is missing while one that took its place is there: restore it from a backup", live)
			}
		case err == nil: // a crash may have come before its key was destroyed
			err = remove(live)
		}
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// openLine loads or makes the line of r. The root's file is written first and the issuing one after it, each atomically, so a
// start that is cut short leaves a root without issuing certificate, which the next start completes.
func openLine(dir string, r Root, hubID hub.DeviceID, keys Keys, lists string) (line, error) {
	l, err := openLineOnce(dir, r, hubID, keys, lists)
	for range 2 { // files that it makes
		if hub.IsKind(err, hub.Conflict) { // another authority with the same folder was faster, and this one reads what it has made
			l, err = openLineOnce(dir, r, hubID, keys, lists)
		}
	}
	return l, err
}

func openLineOnce(dir string, r Root, hubID hub.DeviceID, keys Keys, lists string) (line, error) {
	var l line
	roots, err := readPairs(dir, r, "root")
	if err != nil {
		return l, err
	}
	issuers, err := readPairs(dir, r, "issuing")
	if err != nil {
		return l, err
	}
	first := pair{file: pairFile(dir, r, "root", 1, liveEnd)}
	switch {
	case len(roots) == 0 && len(issuers) > 0:
		// A new root would make every certificate that is already out there worthless.
		return l, fmt.Errorf("%s is missing while %s is there: restore it from a backup", first.file, issuers[0].file)
	case len(roots) == 0:
		if first.cert, first.key, err = newRoot(r, hubID); err != nil {
			return l, fmt.Errorf("make the %s root: %w", r, err)
		}
		if err := writeNewPair(first.file, first.cert, first.key); err != nil {
			return l, err
		}
		roots = []pair{first}
	}
	for i, p := range roots {
		if !p.cert.IsCA || p.cert.CheckSignature(p.cert.SignatureAlgorithm, p.cert.RawTBSCertificate, p.cert.Signature) != nil {
			return l, fmt.Errorf("%s: the certificate is not a self-signed authority", p.file)
		}
		cross, err := readCross(pairFile(dir, r, "cross", i+1, liveEnd), p.cert)
		if err != nil {
			return l, err
		}
		root := anchor{
			cert: p.cert, cross: cross, name: nameOf(p.cert.RawSubjectPublicKeyInfo), file: p.file, keyed: p.key != nil, retired: p.retired,
			listFile: pairFile(dir, r, "root", i+1, listEnd),
		}
		if root.list, err = readRootList(root.listFile, root.cert); err != nil {
			return l, err
		}
		l.roots = append(l.roots, root)
	}
	if len(issuers) == 0 {
		p := pair{file: pairFile(dir, r, "issuing", 1, liveEnd)}
		under := roots[len(roots)-1]
		if under.key == nil {
			return l, fmt.Errorf("%s is missing and %s has no key to make it: restore one of them from a backup", p.file, under.file)
		}
		if p.cert, p.key, err = makeIssuing(p.file, r, 1, hubID, under.cert, under.key, keys, lists); err != nil {
			return l, err
		}
		issuers = []pair{p}
	}
	for _, p := range issuers {
		s := signer{issuing: p.cert, key: p.key, name: nameOf(p.cert.RawSubjectPublicKeyInfo), file: p.file}
		for _, root := range l.roots {
			if p.cert.IsCA && p.cert.CheckSignatureFrom(root.cert) == nil {
				s.root = root.cert
			}
		}
		if s.root == nil {
			return l, fmt.Errorf("%s: the certificate was not signed by a root of %s", p.file, roots[0].file)
		}
		if !p.retired {
			if s.key, err = keyOf(p, keys); err != nil {
				return l, err
			}
		}
		l.issuers = append(l.issuers, s)
	}
	if s := l.signer(); s.key == nil {
		return l, fmt.Errorf("%s is retired, and there is none that took its place", s.file)
	}
	return l, nil
}

// keyOf finds the key of an issuing certificate.
func keyOf(p pair, keys Keys) (crypto.Signer, error) {
	switch {
	case p.key != nil:
		return p.key, nil
	case keys == nil:
		return nil, fmt.Errorf("%s has no private key", p.file)
	}
	key, err := keys.Key(p.cert)
	if err != nil {
		return nil, fmt.Errorf("find the key of %s: %w", p.file, err)
	}
	if !samePublic(key, p.cert) {
		return nil, fmt.Errorf("the key that was found for %s is another one", p.file)
	}
	return key, nil
}

func readCross(file string, root *x509.Certificate) (*x509.Certificate, error) {
	cross, _, err := readPair(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case string(cross.RawSubjectPublicKeyInfo) != string(root.RawSubjectPublicKeyInfo):
		return nil, fmt.Errorf("%s: the certificate is of another root", file)
	}
	return cross, nil
}

// makeIssuing makes the issuing certificate of a line's file n under a root, and its key where keys are.
func makeIssuing(
	file string, r Root, n int, hubID hub.DeviceID, root *x509.Certificate, rootKey crypto.Signer, keys Keys, lists string,
) (*x509.Certificate, crypto.Signer, error) {
	key, err := newIssuingKey(r, keys)
	if err != nil {
		return nil, nil, err
	}
	cert, err := newIssuing(r, n, hubID, root, rootKey, key.Public(), lists)
	if err != nil {
		return nil, nil, fmt.Errorf("make the %s issuing certificate: %w", r, err)
	}
	inFile := key
	if keys != nil {
		inFile = nil
	}
	return cert, key, writeNewPair(file, cert, inFile)
}

// newIssuingKey makes an issuing key where they are kept.
func newIssuingKey(r Root, keys Keys) (crypto.Signer, error) {
	if keys == nil {
		return newECDSA()
	}
	key, err := keys.Create(r)
	if err != nil {
		return nil, fmt.Errorf("make the %s issuing key: %w", r, err)
	}
	return key, nil
}
