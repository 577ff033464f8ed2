package revocation

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxList bounds a list: some 200 000 certificates.
	maxList = 8 << 20
	// maxScopes bounds how many lists of different issuers and scopes are taken from one place.
	maxScopes = 64
	// fetchTimeout bounds the fetching of one.
	fetchTimeout = 2 * time.Minute
	// soonest is how soon a list is fetched again at the earliest.
	soonest = time.Minute
	// firstRetry and lastRetry bound the time until somebody tries again; it doubles in between.
	firstRetry, lastRetry = 5 * time.Second, 5 * time.Minute
)

// source is a place where lists are.
type source struct {
	set  *set
	at   string // URL, or path of a file
	name string // for logs, without a query
	file bool
	etag string // of the last one; belongs to who fetches

	mu sync.Mutex // guards lists
	// lists has the newest of each issuer and scope. Whatever comes from there, it only takes the place of its like: else who can
	// change what is fetched could have one forgotten by handing out another.
	lists map[string]*list
}

func newSource(s *set, at string) *source {
	src := &source{set: s, at: at, name: at, lists: map[string]*list{}}
	if !strings.Contains(at, "://") {
		src.file = true
		return src
	}
	if u, err := url.Parse(at); err == nil {
		if u.Scheme == "file" {
			src.at, src.file = u.Path, true
		}
		u.RawQuery, u.User = "", nil
		src.name = u.String()
	}
	return src
}

// begin takes what is on this machine: a list in a file, or the one that was fetched last.
func (c *Checker) begin(src *source) {
	path := src.at
	if !src.file {
		if path = c.kept(src); path == "" {
			return
		}
	}
	b, err := readFile(path)
	if errors.Is(err, os.ErrNotExist) && !src.file {
		return
	}
	if err == nil {
		_, err = c.take(src, b)
	}
	if err != nil { // it is fetched in any case
		c.log.Warn("a revocation list of the last time is of no use", "set", src.set.Name, "source", src.name, "error", err)
	}
}

// follow fetches the lists of a place again and again.
func (c *Checker) follow(ctx context.Context, src *source) {
	for failures := 0; ; {
		err := c.fetch(ctx, src)
		if ctx.Err() != nil {
			return
		}
		wait := src.next(time.Now())
		if err != nil {
			c.metrics.failed(src.set, "list", err)
			c.log.WarnContext(ctx, "a revocation list cannot be had, trying again", "set", src.set.Name, "source", src.name, "error", err)
			wait = retry(failures)
			failures++
		} else {
			failures = 0
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// retry is when to try again, each at another time.
func retry(failures int) time.Duration {
	wait := min(firstRetry<<min(failures, 10), lastRetry)
	return wait/2 + rand.N(wait/2)
}

// next is when to fetch again: a tenth of its time before one of the lists ends, and after Refresh at the latest; each at another
// time, but never later.
func (src *source) next(now time.Time) time.Duration {
	src.mu.Lock()
	defer src.mu.Unlock()
	wait := src.set.Refresh
	for _, l := range src.lists {
		wait = min(wait, l.until.Sub(now)-l.until.Sub(l.from)/10)
	}
	wait -= rand.N(max(wait, 1)/10 + 1)
	return max(wait, soonest)
}

// fetch gets what is there now.
func (c *Checker) fetch(ctx context.Context, src *source) error {
	b, etag, err := c.read(ctx, src)
	if err != nil {
		return err
	}
	if b == nil { // what is there is what we have
		return src.current(time.Now())
	}
	changed, err := c.take(src, b)
	if err != nil {
		return err
	}
	src.etag = etag
	if changed && !src.file {
		c.keep(src, b)
	}
	return src.current(time.Now())
}

// current is an error when a list has ended: then there should be a newer one.
func (src *source) current(now time.Time) error {
	src.mu.Lock()
	defer src.mu.Unlock()
	for _, l := range src.lists {
		if !l.fresh(now) {
			return refused(late, "the list ended at %v", l.until)
		}
	}
	return nil
}

// read gets the bytes; none if they are the same as the last time.
func (c *Checker) read(ctx context.Context, src *source) (b []byte, etag string, err error) {
	if src.file {
		b, err = readFile(src.at)
		return b, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, src.at, http.NoBody)
	if err != nil {
		return nil, "", refused(unreachable, "the address is no URL")
	}
	if src.etag != "" {
		req.Header.Set("If-None-Match", src.etag)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, "", unreached(err)
	}
	defer resp.Body.Close()
	switch {
	case resp.StatusCode == http.StatusNotModified && src.etag != "":
		return nil, "", nil
	case resp.StatusCode != http.StatusOK:
		return nil, "", refused(unreachable, "the answer was %s", resp.Status)
	}
	b, err = limited(resp.Body, maxList)
	return b, resp.Header.Get("ETag"), err
}

// unreached leaves the URL out of an error of net/http: its query may be a secret.
func unreached(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	return &refusal{unreachable, err}
}

func limited(r io.Reader, most int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, most+1))
	switch {
	case err != nil:
		return nil, unreached(err)
	case int64(len(b)) > most:
		return nil, refused(invalid, "it has more than %d bytes", most)
	}
	return b, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, &refusal{unreachable, err}
	}
	defer f.Close()
	return limited(f, maxList)
}

// take verifies a list and puts it in the place of the one before; changed reports whether it is another one.
func (c *Checker) take(src *source, b []byte) (changed bool, err error) {
	l, err := src.set.parse(b)
	if err != nil {
		return false, err
	}
	if l.from.After(time.Now().Add(skew)) {
		return false, refused(early, "the list begins at %v", l.from)
	}
	src.mu.Lock()
	key := l.issuer.id + l.scope.raw
	old := src.lists[key]
	switch {
	case old != nil && old.sum == l.sum:
		src.mu.Unlock()
		return false, nil
	case old != nil:
		err = l.follows(old)
	case len(src.lists) >= maxScopes:
		err = refused(invalid, "there are too many different lists at one place")
	}
	if err == nil {
		src.lists[key] = l
		l.issuer.replace(old, l)
	}
	src.mu.Unlock()
	if err != nil {
		return false, err
	}
	c.log.Info("revocation list", "set", src.set.Name, "source", src.name, "issuer", l.issuer.cert.Subject.String(), "revoked", len(l.serials),
		"number", l.number, "until", l.until)
	c.tell()
	return true, nil
}

// replace makes l one of the issuer's lists, in the place of old.
func (iss *issuer) replace(old, l *list) {
	iss.mu.Lock()
	defer iss.mu.Unlock()
	next := slices.DeleteFunc(slices.Clone(*iss.lists.Load()), func(x *list) bool { return x == old })
	next = append(next, l)
	iss.lists.Store(&next)
}

// kept is the file of what was fetched last, "" where nothing is kept.
func (c *Checker) kept(src *source) string {
	if c.dir == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(src.set.Name + "\n" + src.at))
	return filepath.Join(c.dir, hex.EncodeToString(sum[:16])+".crl")
}

// keep writes it, whole or not at all. It is a copy, so no care is taken that it survives a power cut; that it was not changed shows
// by its signature.
func (c *Checker) keep(src *source, b []byte) {
	path := c.kept(src)
	if path == "" {
		return
	}
	err := os.WriteFile(path+".new", b, 0o600)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		c.log.Warn("a revocation list cannot be kept for the next start", "set", src.set.Name, "source", src.name, "error", err)
	}
}
