package certificateauthority

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collTokens has the one-time tokens, by a hash of their text.
const collTokens = "enrolment-tokens"

const (
	// TokenLife is how long a one-time token is good if nobody says how long, and MaxTokenLife the longest.
	TokenLife, MaxTokenLife = 24 * time.Hour, 90 * 24 * time.Hour
	maxTokens               = 100_000 // of an owner, used ones and those that have ended included
	tokenKeptAfter          = 30 * 24 * time.Hour
)

// tokenDoc is such a document.
type tokenDoc struct {
	Device  hub.DeviceID `json:"device,omitempty"`
	Owner   hub.Owner    `json:"owner"`
	User    string       `json:"user,omitempty"`
	Created time.Time    `json:"created"`
	Expires time.Time    `json:"expires"`
	Used    time.Time    `json:"used,omitzero"`
	By      hub.DeviceID `json:"by,omitempty"`
	Key     string       `json:"key,omitempty"` // that it was used for
}

func (d *tokenDoc) token(id string) hub.EnrolmentToken {
	return hub.EnrolmentToken{
		ID: id, Device: d.Device, Owner: d.Owner, User: d.User, Created: d.Created, Expires: d.Expires, Used: d.Used, UsedBy: d.By,
	}
}

// tokenID names a token. Its text has 144 random bits, so a hash without salt gives nothing away.
func tokenID(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:16])
}

// NewToken makes a one-time token with which one device enrols: dev, or any that nobody owns or the owner does if dev is "". life is
// how long it is good, 0 for TokenLife. Its text is returned here and is kept nowhere. Kinds: Invalid for a life that is not
// positive or too long, Denied for the hub's ID and for devices of others, Exhausted at 100 000 tokens of an owner.
func (s *Service) NewToken(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, life time.Duration, user string,
) (text string, t hub.EnrolmentToken, err error) {
	const op = "certificateauthority.NewToken"
	if life == 0 {
		life = TokenLife
	}
	switch {
	case owner == "":
		return "", t, hub.NewError(hub.Invalid, "owner-missing", "a token's device needs an owner").With(op, nil)
	case life < time.Second || life > MaxTokenLife:
		return "", t, hub.NewError(hub.Invalid, "token-life-invalid", "a token is good for a second to 90 days").With(op, nil)
	case dev == s.a.hubID:
		return "", t, errOfHub.With(op, nil)
	}
	if dev != "" {
		now, err := s.ownerOf(ctx, dev)
		switch {
		case err != nil:
			return "", t, fmt.Errorf("%s: %w", op, err)
		case now != "" && now != owner:
			return "", t, errOther.With(op, nil)
		}
	}
	if many, err := s.atLeast(ctx, collTokens, indexOwner+string(owner), maxTokens); err != nil {
		return "", t, fmt.Errorf("%s: %w", op, err)
	} else if many {
		return "", t, hub.NewError(hub.Exhausted, "tokens-limit", "the owner has 100000 one-time tokens; remove some").With(op, nil)
	}
	b := make([]byte, 18)
	_, _ = rand.Read(b) // never fails
	text = base64.RawURLEncoding.EncodeToString(b)
	now := time.Now().UTC()
	d := tokenDoc{Device: dev, Owner: owner, User: user, Created: now, Expires: now.Add(life)}
	if err := s.putToken(ctx, tokenID(text), &d, 0); err != nil {
		return "", t, fmt.Errorf("%s: %w", op, err)
	}
	return text, d.token(tokenID(text)), nil
}

func (s *Service) putToken(ctx context.Context, id string, d *tokenDoc, rev uint64) error {
	value, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("encode a one-time token: %w", err)
	}
	_, err = s.docs.Put(ctx, collTokens, store.Doc{Key: id, Value: value, Rev: rev, Index: []string{indexOwner + string(d.Owner)}})
	return err
}

func decodeToken(doc store.Doc) (tokenDoc, error) {
	var d tokenDoc
	if err := json.Unmarshal(doc.Value, &d); err != nil {
		return d, damaged("a one-time token", err)
	}
	return d, nil
}

var errToken = hub.NewError(hub.Unauthenticated, "token-unknown", "the one-time token is unknown, has ended, or was used with another key")

// byToken is the device that a token is for. Who comes again with the same key is the same.
func (s *Service) byToken(ctx context.Context, text string, req request, named hub.DeviceID) (applicant, error) {
	id := tokenID(text)
	doc, err := s.docs.Get(ctx, collTokens, id)
	if err != nil {
		return applicant{}, err
	}
	if doc.Rev == 0 {
		return applicant{}, errToken
	}
	d, err := decodeToken(doc)
	if err != nil {
		return applicant{}, err
	}
	key := nameOf(req.spki)
	switch now := time.Now(); {
	case !d.Used.IsZero() && (d.Key != key || now.Sub(d.Used) > repeated):
		return applicant{}, errToken
	case d.Used.IsZero() && !now.Before(d.Expires):
		return applicant{}, errToken
	}
	a := applicant{
		device: d.Device, allowed: true, token: &doc, made: d.Created, repeats: !d.Used.IsZero(),
		enrolment: enrolment{By: hub.ByToken, Owner: d.Owner, User: d.User, Proof: "token " + id, Key: key},
	}
	switch {
	case d.By != "":
		a.device = d.By
	case d.Device == "" && named != "":
		a.device = named
	case d.Device == "":
		a.device = hub.DeviceID(uuid.NewSHA1(uuid.MustParse(string(s.a.hubID)), req.spki).String())
	}
	return a, nil
}

// redeem uses a token up, before anything is signed for it: of two that come with it at a time, one gets nothing.
func (s *Service) redeem(ctx context.Context, a applicant, req request) error {
	d, err := decodeToken(*a.token)
	if err != nil {
		return err
	}
	if !d.Used.IsZero() {
		return nil // by this key
	}
	// What would be refused does not cost the token.
	if err := s.room(ctx, a.Owner, req); err != nil {
		return err
	}
	if err := s.entitled(ctx, a.Owner, a.device, true); err != nil {
		return err
	}
	d.Used, d.By, d.Key = time.Now().UTC(), a.device, nameOf(req.spki)
	if err := s.putToken(ctx, a.token.Key, &d, a.token.Rev); hub.IsKind(err, hub.Conflict) {
		return errToken
	} else if err != nil {
		return err
	}
	return nil
}

// Tokens returns the one-time tokens of an owner, or all if owner is "", newest first; also those that were used or have ended, for
// 30 days.
func (s *Service) Tokens(ctx context.Context, owner hub.Owner) ([]hub.EnrolmentToken, error) {
	return newestFirst(only(s.tokens(ctx, owner, place{})))
}

func (s *Service) tokens(ctx context.Context, owner hub.Owner, from place) iter.Seq2[placed[hub.EnrolmentToken], error] {
	var of step
	if owner != "" {
		of.index = indexOwner + string(owner)
	}
	return each(s.walk(ctx, collTokens, []step{of}, from), func(doc store.Doc) (hub.EnrolmentToken, bool, error) {
		d, err := decodeToken(doc)
		return d.token(doc.Key), true, err
	})
}

func newestFirst(tokens iter.Seq2[hub.EnrolmentToken, error]) (out []hub.EnrolmentToken, err error) {
	for t, err := range tokens {
		if err != nil {
			return nil, fmt.Errorf("certificateauthority.Tokens: %w", err)
		}
		out = append(out, t)
	}
	slices.SortFunc(out, func(a, b hub.EnrolmentToken) int { return b.Created.Compare(a.Created) })
	return out, nil
}

// DeleteTokens removes tokens of an owner, "" for all, by their IDs, used or not: nobody enrols with them any more. It returns what
// it removed; IDs that there are not are passed over.
func (s *Service) DeleteTokens(ctx context.Context, owner hub.Owner, ids []string) (out []hub.EnrolmentToken, err error) {
	const op = "certificateauthority.DeleteTokens"
	for _, id := range ids {
		gone, err := again(ctx, func() (*hub.EnrolmentToken, error) { return s.deleteToken(ctx, owner, id) })
		if err != nil {
			return out, fmt.Errorf("%s: %w", op, err)
		}
		if gone != nil {
			out = append(out, *gone)
		}
	}
	return out, nil
}

// deleteToken removes a token; nil if there is none, or it is another owner's.
func (s *Service) deleteToken(ctx context.Context, owner hub.Owner, id string) (*hub.EnrolmentToken, error) {
	doc, err := s.docs.Get(ctx, collTokens, id)
	if err != nil || doc.Rev == 0 {
		return nil, err
	}
	d, err := decodeToken(doc)
	if err != nil || owner != "" && d.Owner != owner {
		return nil, err
	}
	t := d.token(id)
	return &t, s.docs.Delete(ctx, collTokens, id, doc.Rev)
}
