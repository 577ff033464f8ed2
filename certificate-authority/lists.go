package certificateauthority

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// The newest revocation list of each issuer is in the store, so that all authorities on the same documents give out the same one:
// else whoever asks one and then another would see its number go back.

// collLists has, by issuer, what is said of its newest revocation list, and collListParts that list in parts.
const collLists, collListParts = "certificate-lists", "certificate-list-parts"

// maxListPart bounds a part.
const maxListPart = 512 << 10

// newestList is such a document. In a store of an older version it is the number alone.
type newestList struct {
	Number int64     `json:"number"`
	Made   time.Time `json:"made"`
	// After is the number of the last change (changes.go) that the list has for certain.
	After uint64 `json:"after"`
	// Name is of its parts, and Parts how many there are; none if nobody but its maker may give it out.
	Name  string `json:"name"`
	Parts int    `json:"parts"`
}

// fresh reports whether the list may be given out for another while.
func (l *newestList) fresh(now time.Time, revokedAt uint64) bool {
	age := now.Sub(l.Made)
	return l.Parts > 0 && age > -time.Minute && age < listAge && l.After >= revokedAt
}

func (s *Service) newestList(ctx context.Context, issuer string) (l newestList, rev uint64, err error) {
	doc, err := s.docs.Get(ctx, collLists, issuer)
	if err != nil || doc.Rev == 0 {
		return l, 0, err
	}
	if l.Number, err = strconv.ParseInt(string(doc.Value), 10, 64); err != nil {
		err = json.Unmarshal(doc.Value, &l)
	}
	if err != nil {
		err = &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "the number of the revocation lists is damaged", Err: err}
	}
	return l, doc.Rev, err
}

// storedList reads a list; nil if it has just been replaced.
func (s *Service) storedList(ctx context.Context, l newestList) (der []byte, err error) {
	for i := range l.Parts {
		doc, err := s.docs.Get(ctx, collListParts, partKey(l.Name, i))
		if err != nil || doc.Rev == 0 {
			return nil, err
		}
		der = append(der, doc.Value...)
	}
	return der, nil
}

func partKey(name string, i int) string { return fmt.Sprintf("%s %04d", name, i) }

// numberAfter numbers the lists of an issuer, each higher than the one before (RFC 5280, Section 5.2.3): by the clock, so that it is so after a
// backup was restored, too.
func numberAfter(last int64, now time.Time) int64 { return max(last+1, now.Unix()) }

// makeList makes an issuer's next list.
func (s *Service) makeList(ctx context.Context, by signer, now time.Time) (revocations, error) {
	for {
		last, rev, err := s.newestList(ctx, by.name)
		if err != nil {
			return revocations{}, err
		}
		next := newestList{
			Number: numberAfter(last.Number, now), Made: now.UTC(), After: s.revokedAt.Load(), // before the ledger is read
			Name: fmt.Sprintf("%016x %s %s", now.Unix(), by.name, rand.Text()),
		}
		der, err := s.newListOf(ctx, by, next.Number, now)
		if err != nil {
			return revocations{}, err
		}
		for part := range slices.Chunk(der, maxListPart) {
			if !s.shared() {
				break // nobody reads it
			}
			if _, err := s.docs.Put(ctx, collListParts, store.Doc{Key: partKey(next.Name, next.Parts), Value: part}); err != nil {
				return revocations{}, err
			}
			next.Parts++
		}
		value, err := json.Marshal(next)
		if err != nil {
			return revocations{}, fmt.Errorf("encode what is said of a revocation list: %w", err)
		}
		_, err = s.docs.Put(ctx, collLists, store.Doc{Key: by.name, Value: value, Rev: rev})
		gone := last
		if hub.IsKind(err, hub.Conflict) {
			gone = next // somebody else made one at the same time
		} else if err != nil {
			return revocations{}, err
		}
		if err := s.deleteParts(ctx, gone); err != nil {
			s.log.WarnContext(ctx, "parts of an old revocation list could not be removed, trying again", "error", err)
		}
		if err == nil {
			return revocations{der, next}, nil
		}
		if err := ctx.Err(); err != nil {
			return revocations{}, err
		}
	}
}

func (s *Service) deleteParts(ctx context.Context, l newestList) error {
	for i := range l.Parts {
		doc, err := s.docs.Get(ctx, collListParts, partKey(l.Name, i))
		if err == nil && doc.Rev != 0 {
			err = s.docs.Delete(ctx, collListParts, doc.Key, doc.Rev)
		}
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return nil
}

// sweepParts removes parts of lists that were not finished, or are long replaced.
func (s *Service) sweepParts(ctx context.Context) error {
	named := map[string]bool{}
	for doc, err := range s.docs.Range(ctx, collLists, "", "") {
		if err != nil {
			return err
		}
		var l newestList
		if json.Unmarshal(doc.Value, &l) == nil {
			named[l.Name] = true
		}
	}
	for doc, err := range s.docs.Range(ctx, collListParts, "", fmt.Sprintf("%016x", time.Now().Add(-time.Hour).Unix())) {
		if err != nil {
			return err
		}
		if end := strings.LastIndexByte(doc.Key, ' '); end >= 0 && named[doc.Key[:end]] {
			continue
		}
		if err := s.docs.Delete(ctx, collListParts, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return nil
}
