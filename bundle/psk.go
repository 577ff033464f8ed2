package bundle

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// pskCollection has, by device, the salt of its pre-shared key. The key itself is nowhere: it is made of the salt and a secret
// that is a file in the keys folder, so that neither the store nor a backup of it gives it away.
const pskCollection = "psk"

// pskRecord is such a document.
type pskRecord struct {
	Salt []byte `json:"salt"`
}

// preShared has the pre-shared keys of devices. The identity that goes with a key is the device's ID.
type preShared struct {
	docs   store.Documents
	secret []byte
}

// replace makes a key for a device, in place of the one it may have had. It is text, as people and programs hand it on, and
// its bytes are the key.
func (p *preShared) replace(ctx context.Context, dev hub.DeviceID) (string, error) {
	for {
		old, err := p.docs.Get(ctx, pskCollection, string(dev))
		if err != nil {
			return "", fmt.Errorf("read the salt of a pre-shared key: %w", err)
		}
		rec := pskRecord{Salt: make([]byte, 16)}
		_, _ = rand.Read(rec.Salt) // never fails
		value, err := json.Marshal(rec)
		if err != nil {
			return "", fmt.Errorf("encode the salt of a pre-shared key: %w", err)
		}
		_, err = p.docs.Put(ctx, pskCollection, store.Doc{Key: string(dev), Value: value, Rev: old.Rev})
		if err == nil {
			return p.make(dev, rec), nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return "", fmt.Errorf("store the salt of a pre-shared key: %w", err)
		}
	}
}

// key returns a device's key, nil if it has none.
func (p *preShared) key(ctx context.Context, dev hub.DeviceID) ([]byte, error) {
	doc, err := p.docs.Get(ctx, pskCollection, string(dev))
	if err != nil {
		return nil, fmt.Errorf("read the salt of a pre-shared key: %w", err)
	}
	if doc.Rev == 0 {
		return nil, nil
	}
	var rec pskRecord
	if err := json.Unmarshal(doc.Value, &rec); err != nil {
		return nil, fmt.Errorf("the salt of a pre-shared key: %w", err)
	}
	return []byte(p.make(dev, rec)), nil
}

// forget makes a device's key useless, if it has one.
func (p *preShared) forget(ctx context.Context, dev hub.DeviceID) error {
	for {
		doc, err := p.docs.Get(ctx, pskCollection, string(dev))
		if err == nil && doc.Rev != 0 {
			err = p.docs.Delete(ctx, pskCollection, string(dev), doc.Rev)
		}
		if !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
}

func (p *preShared) make(dev hub.DeviceID, rec pskRecord) string {
	mac := hmac.New(sha256.New, p.secret)
	mac.Write([]byte(dev))
	mac.Write(rec.Salt)
	// 144 bits: no padding, and no more than the 64 bytes that RFC 4279, Section 5.3 asks devices to take.
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:18])
}
