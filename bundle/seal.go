package bundle

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/coaphub/coaphub/hub"
)

// A sealed folder is a header and the XChaCha20-Poly1305 of a tar of its files under a key that argon2id makes of the
// passphrase (RFC 9106, the second recommended set: 64 MiB, 3 passes, 4 lanes). The header is authenticated too.
const sealMagic = "coaphub keys 1\n"

// sealHeader follows the magic. Its parameters are read back within bounds, so that later versions may raise them and a
// crafted file cannot ask for all memory.
type sealHeader struct {
	Passes uint32
	Memory uint32 // KiB
	Lanes  uint32
	Salt   [16]byte
	Nonce  [chacha20poly1305.NonceSizeX]byte
}

const (
	maxSealMemory = 1 << 20 // KiB
	maxSealPasses = 32
	maxSealLanes  = 64
	maxSealed     = 16 << 20 // bytes; keys are a few KiB
)

var errPassphrase = hub.NewError(hub.Invalid, "passphrase-wrong", "the passphrase is wrong, or the sealed keys are damaged")

// sealFolder packs the files of a folder (none below it) and seals them with a passphrase.
func sealFolder(dir string, passphrase []byte) ([]byte, error) {
	if len(passphrase) < 8 {
		return nil, &hub.Error{Kind: hub.Invalid, Code: "passphrase-short", Text: "the passphrase is shorter than 8 characters"}
	}
	plain, err := pack(dir)
	if err != nil {
		return nil, fmt.Errorf("pack the keys: %w", err)
	}
	h := sealHeader{Passes: 3, Memory: 64 << 10, Lanes: 4}
	_, _ = rand.Read(h.Salt[:]) // never fails
	_, _ = rand.Read(h.Nonce[:])
	head := bytes.NewBufferString(sealMagic)
	if err := binary.Write(head, binary.BigEndian, h); err != nil {
		return nil, fmt.Errorf("seal the keys: %w", err)
	}
	aead, err := chacha20poly1305.NewX(h.key(passphrase))
	if err != nil {
		return nil, fmt.Errorf("seal the keys: %w", err)
	}
	return aead.Seal(head.Bytes(), h.Nonce[:], plain, head.Bytes()), nil
}

func (h sealHeader) key(passphrase []byte) []byte {
	return argon2.IDKey(passphrase, h.Salt[:], h.Passes, h.Memory, uint8(h.Lanes), chacha20poly1305.KeySize)
}

// unseal gives the tar back.
func unseal(sealed, passphrase []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(sealed, []byte(sealMagic))
	var h sealHeader
	size := binary.Size(h)
	if !ok || len(rest) < size || len(sealed) > maxSealed {
		return nil, &hub.Error{Kind: hub.Invalid, Code: "backup-damaged", Text: "the sealed keys are damaged, or of a newer version"}
	}
	if err := binary.Read(bytes.NewReader(rest[:size]), binary.BigEndian, &h); err != nil {
		return nil, fmt.Errorf("read the sealed keys: %w", err)
	}
	if h.Passes < 1 || h.Passes > maxSealPasses || h.Memory > maxSealMemory || h.Lanes < 1 || h.Lanes > maxSealLanes {
		return nil, &hub.Error{Kind: hub.Invalid, Code: "backup-damaged", Text: "the sealed keys are damaged, or of a newer version"}
	}
	aead, err := chacha20poly1305.NewX(h.key(passphrase))
	if err != nil {
		return nil, fmt.Errorf("unseal the keys: %w", err)
	}
	plain, err := aead.Open(nil, h.Nonce[:], rest[size:], sealed[:len(sealMagic)+size])
	if err != nil {
		return nil, errPassphrase.With("unseal", err)
	}
	return plain, nil
}

func pack(dir string) ([]byte, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Name: e.Name(), Mode: 0o600, Size: int64(len(text)), Typeflag: tar.TypeReg}); err != nil {
			return nil, err
		}
		if _, err := w.Write(text); err != nil {
			return nil, err
		}
	}
	return b.Bytes(), w.Close()
}

// unpack writes the files of a tar into a new folder. Names that lead elsewhere are refused.
func unpack(plain []byte, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("make the keys folder: %w", err)
	}
	r := tar.NewReader(bytes.NewReader(plain))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unpack the keys: %w", err)
		}
		if h.Typeflag != tar.TypeReg || filepath.Base(h.Name) != h.Name || strings.HasPrefix(h.Name, ".") || strings.ContainsAny(h.Name, `/\`) {
			return &hub.Error{Kind: hub.Invalid, Code: "backup-damaged", Text: fmt.Sprintf("the sealed keys have a file of a strange name: %q", h.Name)}
		}
		text, err := io.ReadAll(io.LimitReader(r, maxSealed))
		if err != nil {
			return fmt.Errorf("unpack the keys: %w", err)
		}
		if err := writeFile(filepath.Join(dir, h.Name), text); err != nil {
			return err
		}
	}
}
