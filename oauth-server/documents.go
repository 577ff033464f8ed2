package oauthserver

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Collections of documents. Keys and master secret are the only things here that would let their reader make tokens; they are
// in a collection of their own, so that a backup can leave them out.
const (
	collSettings = "oauth-settings"
	collSecrets  = "oauth-secrets"
	collAccounts = "oauth-accounts"
	collGrants   = "oauth-grants"       // what tokens were issued on; found by jti and refresh token, indexed by subject
	collCodes    = "oauth-codes"        // authorization codes, by the hash of the code
	collDevices  = "oauth-device-codes" // pending device grants, by the hash of the device code, indexed by user code
)

// maxTries bounds how often a change is decided again after somebody else was faster.
const maxTries = 32

// read decodes a document; rev 0 means that there is none and leaves v alone.
func read(ctx context.Context, docs store.Documents, collection, key string, v any) (rev uint64, err error) {
	doc, err := docs.Get(ctx, collection, key)
	if err != nil {
		return 0, trouble("read "+collection, err)
	}
	if doc.Rev == 0 {
		return 0, nil
	}
	return doc.Rev, decode(collection, doc, v)
}

func decode(collection string, doc store.Doc, v any) error {
	if err := json.Unmarshal(doc.Value, v); err != nil {
		return &hub.Error{Kind: hub.Internal, Op: "decode " + collection, Err: err}
	}
	return nil
}

// write stores a document if its revision is still rev, else the error is of kind Conflict.
func write(ctx context.Context, docs store.Documents, collection, key string, rev uint64, v any, index ...string) error {
	value, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", collection, err)
	}
	_, err = docs.Put(ctx, collection, store.Doc{Key: key, Value: value, Rev: rev, Index: index})
	if err != nil && !hub.IsKind(err, hub.Conflict) {
		return trouble("write "+collection, err)
	}
	return err
}

// change reads, changes and writes a document until nobody else was faster. do may return an error to leave it as it is, and
// may be called several times. A document that does not exist is v's zero value with rev 0.
func change[T any](ctx context.Context, docs store.Documents, collection, key string, do func(v *T, rev uint64) error, index func(T) []string) error {
	for range maxTries {
		var v T
		rev, err := read(ctx, docs, collection, key, &v)
		if err != nil {
			return err
		}
		if err := do(&v, rev); err != nil {
			return err
		}
		var ix []string
		if index != nil {
			ix = index(v)
		}
		if err := write(ctx, docs, collection, key, rev, v, ix...); !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return trouble("change "+collection, fmt.Errorf("too much contention on %q", key))
}

// trouble makes failures of the store and of other parts of a kind that no door takes for a bad credential.
func trouble(op string, err error) error {
	kind := hub.Unavailable
	if k := hub.KindOf(err); err != nil && (k == hub.Exhausted || k == hub.Deadline) {
		kind = k
	}
	return &hub.Error{Kind: kind, Op: op, Err: err}
}

// ours reports whether err is trouble of ours, not a refusal.
func ours(err error) bool {
	switch hub.KindOf(err) {
	case hub.Internal, hub.Unavailable, hub.Exhausted, hub.Deadline, hub.Conflict:
		return err != nil
	}
	return false
}
