package bundle

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"sync"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/store"
)

// secretCollection is where the embedded provider keeps its signing keys and the secret that everything else is derived
// from, and the hub the key of its cursors.
const secretCollection = "oauth-secrets"

// withSecrets is the store's documents, except that the provider's secrets are files in the keys folder: what is in the store
// goes into every backup, and private keys must not.
type withSecrets struct {
	store.Documents
	dir string

	mu sync.Mutex // one writer at a time; the folder is this process's alone
}

// secretFile is such a file.
type secretFile struct {
	Rev   uint64 `json:"rev"`
	Value []byte `json:"value"`
}

func (s *withSecrets) path(key string) (string, error) {
	if key == "" || filepath.Base(key) != key || key[0] == '.' {
		return "", &hub.Error{Kind: hub.Internal, Op: "secrets", Err: fmt.Errorf("%q is no name of a secret", key)}
	}
	return filepath.Join(s.dir, "oauth-"+key+".json"), nil
}

func (s *withSecrets) read(key string) (f secretFile, path string, err error) {
	if path, err = s.path(key); err != nil {
		return f, "", err
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, path, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &f)
	}
	if err != nil {
		return f, path, &hub.Error{Kind: hub.Internal, Op: "secrets", Code: "data-damaged", Text: path + " cannot be read", Err: err}
	}
	return f, path, nil
}

// Get is of store.Documents.
func (s *withSecrets) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	if collection != secretCollection {
		return s.Documents.Get(ctx, collection, key)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f, _, err := s.read(key)
	return store.Doc{Key: key, Value: f.Value, Rev: f.Rev}, err
}

// Put is of store.Documents.
func (s *withSecrets) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	if collection != secretCollection {
		return s.Documents.Put(ctx, collection, doc)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f, path, err := s.read(doc.Key)
	if err != nil {
		return 0, err
	}
	if f.Rev != doc.Rev {
		return 0, &hub.Error{Kind: hub.Conflict, Op: "secrets"}
	}
	b, err := json.Marshal(secretFile{f.Rev + 1, doc.Value})
	if err == nil {
		err = writeFile(path, b)
	}
	if err != nil {
		return 0, &hub.Error{Kind: hub.Unavailable, Op: "secrets", Err: err}
	}
	return f.Rev + 1, nil
}

// Delete is of store.Documents.
func (s *withSecrets) Delete(ctx context.Context, collection, key string, rev uint64) error {
	if collection != secretCollection {
		return s.Documents.Delete(ctx, collection, key, rev)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	f, path, err := s.read(key)
	if err != nil {
		return err
	}
	if f.Rev == 0 || f.Rev != rev {
		return &hub.Error{Kind: hub.Conflict, Op: "secrets"}
	}
	if err := errors.Join(os.Remove(path), syncFolder(s.dir)); err != nil {
		return &hub.Error{Kind: hub.Unavailable, Op: "secrets", Err: err}
	}
	return nil
}

// Range is of store.Documents; secrets are asked for by name only.
func (s *withSecrets) Range(ctx context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	if collection != secretCollection {
		return s.Documents.Range(ctx, collection, from, to)
	}
	return noList
}

// Find is of store.Documents; secrets have no other keys.
func (s *withSecrets) Find(ctx context.Context, collection, index string) iter.Seq2[store.Doc, error] {
	if collection != secretCollection {
		return s.Documents.Find(ctx, collection, index)
	}
	return noList
}

// FindKeys is of store.Documents; secrets have no other keys.
func (s *withSecrets) FindKeys(ctx context.Context, collection, index string) iter.Seq2[string, error] {
	if collection != secretCollection {
		return s.Documents.FindKeys(ctx, collection, index)
	}
	return func(yield func(string, error) bool) { yield("", errListed) }
}

var errListed = &hub.Error{Kind: hub.Internal, Op: "secrets", Err: errors.New("secrets are not listed")}

func noList(yield func(store.Doc, error) bool) {
	yield(store.Doc{}, errListed)
}

// sealedSecrets is the documents of a cluster, whose secrets are in the database with everything else, but sealed with what only the
// hub's processes know: whoever reads the database or its backups does not have them.
type sealedSecrets struct {
	store.Documents
	aead cipher.AEAD
}

func sealed(docs store.Documents, secret conf.Secret, hubID string) (*sealedSecrets, error) {
	key, err := hkdf.Key(sha256.New, []byte(secret.Reveal()), []byte(hubID), "coaphub secrets", 32)
	if err != nil {
		return nil, fmt.Errorf("the key of the hub's secrets: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("the key of the hub's secrets: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	return &sealedSecrets{docs, aead}, err
}

// Get is of store.Documents.
func (s *sealedSecrets) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	doc, err := s.Documents.Get(ctx, collection, key)
	if err != nil || collection != secretCollection || doc.Rev == 0 {
		return doc, err
	}
	doc.Value, err = s.aead.Open(nil, nil, doc.Value, []byte(key))
	if err != nil {
		return store.Doc{}, &hub.Error{
			Kind: hub.Precondition, Op: "secrets", Code: "cluster-secret-wrong", Text: "the hub's secrets in the database were sealed with another cluster.secret", Err: err,
		}
	}
	return doc, nil
}

// Put is of store.Documents.
func (s *sealedSecrets) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	if collection == secretCollection {
		doc.Value = s.aead.Seal(nil, nil, doc.Value, []byte(doc.Key))
	}
	return s.Documents.Put(ctx, collection, doc)
}

// Range is of store.Documents; secrets are asked for by name only.
func (s *sealedSecrets) Range(ctx context.Context, collection, from, to string) iter.Seq2[store.Doc, error] {
	if collection == secretCollection {
		return noList
	}
	return s.Documents.Range(ctx, collection, from, to)
}
