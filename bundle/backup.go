package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// Files of a backup beside the store's.
const (
	manifestFile   = "backup.json"
	sealedKeysFile = "keys.sealed"
)

// Manifest says what a backup is.
type Manifest struct {
	Format  int       `json:"format"` // layout of the data folder it was made from
	HubID   string    `json:"hubId"`
	Version string    `json:"version"` // of the program that made it
	Time    time.Time `json:"time"`
	LogID   string    `json:"logId"`
	Keys    bool      `json:"keys"` // the private keys are in it, sealed with a passphrase
	Bytes   int64     `json:"bytes"`
}

// Progress is told how much of a long work is done; total 0 means that nobody knows.
type Progress func(done, total int64)

// Backup copies a hub's data into a new folder: consistent, also while the hub runs. Private keys stay out, unless there is a
// passphrase to seal them with. Nothing is in target until everything is.
func Backup(ctx context.Context, data, target string, passphrase []byte, version string, progress Progress) (m Manifest, err error) {
	if err := mustBeFree(target); err != nil {
		return m, err
	}
	target = filepath.Clean(target)
	part := target + ".part"
	if err := os.RemoveAll(part); err != nil {
		return m, fmt.Errorf("remove what an earlier backup left: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return m, fmt.Errorf("make the backup's folder: %w", err)
	}
	if err := os.Mkdir(part, 0o700); err != nil {
		return m, fmt.Errorf("make the backup's folder: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(part)
		}
	}()
	m = Manifest{Format: format, Version: obs.ReadBuild(version).Version, Time: time.Now().UTC(), Keys: passphrase != nil}
	err = withCheckpoint(ctx, data, func(dir string) error {
		if m.Bytes, err = copyFolder(ctx, dir, filepath.Join(part, storeFolder), progress); err != nil {
			return err
		}
		if passphrase == nil {
			return nil
		}
		sealed, err := sealFolder(filepath.Join(data, keysFolder), passphrase)
		if err != nil {
			return err
		}
		return writeFile(filepath.Join(part, sealedKeysFile), sealed)
	})
	if err != nil {
		return m, err
	}
	// The copy is opened once: one that no hub can start from is found now and not on the day it is needed. It is not verified:
	// a backup of data that is damaged somewhere is better than none.
	if m.HubID, m.LogID, err = identify(ctx, filepath.Join(part, storeFolder)); err != nil {
		return m, fmt.Errorf("read the backup back: %w", err)
	}
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return m, fmt.Errorf("write the manifest: %w", err)
	}
	if err := writeFile(filepath.Join(part, manifestFile), append(b, '\n')); err != nil {
		return m, err
	}
	if err := os.Remove(target); err != nil && !errors.Is(err, fs.ErrNotExist) { // an empty folder
		return m, fmt.Errorf("put the backup in place: %w", err)
	}
	if err := os.Rename(part, target); err != nil {
		return m, fmt.Errorf("put the backup in place: %w", err)
	}
	return m, syncFolder(filepath.Dir(target))
}

// ReadManifest reads what a backup is.
func ReadManifest(backup string) (m Manifest, err error) {
	b, err := os.ReadFile(filepath.Join(backup, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, &hub.Error{Kind: hub.NotFound, Code: "backup-missing", Text: backup + " is no backup: it has no " + manifestFile}
	}
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	switch {
	case err != nil:
		return m, &hub.Error{Kind: hub.Invalid, Code: "backup-damaged", Text: "the manifest of " + backup + " cannot be read", Err: err}
	case m.Format > format:
		return m, &hub.Error{
			Kind: hub.Invalid, Code: "data-too-new",
			Text: fmt.Sprintf("the backup has layout %d, this program knows %d; restore it with version %s", m.Format, format, m.Version),
		}
	}
	return m, nil
}

// Restore makes a data folder of a backup. The folder must be empty or not there. The log gets a new ID, so that cursors into
// the original start from the current state instead of skipping what the backup does not have. Without a passphrase the keys
// stay out, and the next start makes new ones: every device must be onboarded again then.
func Restore(ctx context.Context, backup, data string, passphrase []byte, progress Progress) (m Manifest, err error) {
	if m, err = ReadManifest(backup); err != nil {
		return m, err
	}
	if passphrase != nil && !m.Keys {
		return m, &hub.Error{Kind: hub.Precondition, Code: "backup-without-keys", Text: "the backup has no keys; restore it without --with-keys"}
	}
	if err := mustBeFree(data); err != nil {
		return m, err
	}
	var keys []byte
	if passphrase != nil { // first: a wrong passphrase should cost nothing
		sealed, err := os.ReadFile(filepath.Join(backup, sealedKeysFile))
		if err != nil {
			return m, fmt.Errorf("read the sealed keys: %w", err)
		}
		if keys, err = unseal(sealed, passphrase); err != nil {
			return m, err
		}
	}
	data, err = filepath.Abs(data)
	if err != nil {
		return m, fmt.Errorf("data folder: %w", err)
	}
	part := data + ".part"
	if err := os.RemoveAll(part); err != nil {
		return m, fmt.Errorf("remove what an earlier restore left: %w", err)
	}
	folder, err := OpenFolder(part)
	if err != nil {
		return m, err
	}
	defer func() {
		err = errors.Join(err, folder.Close())
		if err != nil {
			_ = os.RemoveAll(part)
		}
	}()
	if _, err := copyFolder(ctx, filepath.Join(backup, storeFolder), folder.sub(storeFolder), progress); err != nil {
		return m, err
	}
	if keys != nil {
		if err := unpack(keys, folder.sub(keysFolder)); err != nil {
			return m, err
		}
	}
	if err := pebblestore.Renew(folder.sub(storeFolder)); err != nil {
		return m, fmt.Errorf("give the log a new ID: %w", err)
	}
	if err := os.Remove(data); err != nil && !errors.Is(err, fs.ErrNotExist) { // an empty folder
		return m, fmt.Errorf("put the data folder in place: %w", err)
	}
	if err := os.Rename(part, data); err != nil {
		return m, fmt.Errorf("put the data folder in place: %w", err)
	}
	return m, syncFolder(filepath.Dir(data))
}

// mustBeFree refuses a path that has something in it.
func mustBeFree(path string) error {
	entries, err := os.ReadDir(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(entries) == 0:
		return nil
	case err != nil:
		return &hub.Error{Kind: hub.Precondition, Code: "target-not-empty", Text: cause(err), Err: err}
	}
	return &hub.Error{Kind: hub.Precondition, Code: "target-not-empty", Text: path + " is not empty; name a folder that does not exist yet"}
}

// mustBeData refuses a path that is no data folder.
func mustBeData(path string) error {
	switch _, err := os.Stat(filepath.Join(path, formatFile)); {
	case errors.Is(err, fs.ErrPermission):
		return notOurs(path, err)
	case err != nil:
		return &hub.Error{Kind: hub.NotFound, Code: "data-missing", Text: path + " is no data folder; name one with --data", Err: err}
	}
	return nil
}

// withCheckpoint calls do with a consistent copy of the data folder's store: of the hub that runs on it, else of the folder
// itself, which is held meanwhile.
func withCheckpoint(ctx context.Context, data string, do func(dir string) error) (err error) {
	if err := mustBeData(data); err != nil {
		return err
	}
	c, err := Dial(data)
	if err != nil {
		return err
	}
	path, err := c.Checkpoint(ctx)
	var e *hub.Error
	switch {
	case err == nil:
		defer func() {
			// Also after the caller gave up: the copy keeps old files of the hub's alive.
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
			defer cancel()
			err = errors.Join(err, c.Release(last, path))
		}()
		return do(filepath.Join(data, path))
	case !errors.As(err, &e) || e.Code != ErrNoHub:
		return err
	}
	folder, err := OpenFolder(data)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, folder.Close()) }()
	s, err := pebblestore.Open(folder.sub(storeFolder), pebblestore.Options{MinFree: -1})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	dir := folder.sub(filepath.Join(scratchFolder, "copy"))
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(filepath.Dir(dir), 0o700)); err != nil {
		return fmt.Errorf("make the scratch folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := s.Checkpoint(ctx, dir); err != nil {
		return err
	}
	return do(dir)
}

// identify opens the store in a folder and says whose it is.
func identify(ctx context.Context, dir string) (hub, log string, err error) {
	s, err := pebblestore.Open(dir, pebblestore.Options{MinFree: -1})
	if err != nil {
		return "", "", err
	}
	doc, err := s.Get(ctx, hubCollection, hubIDKey)
	return string(doc.Value), s.LogID(), errors.Join(err, s.Close())
}

// copyFolder copies the files of a folder and those below it, each on the disk before it counts as done.
func copyFolder(ctx context.Context, from, to string, progress Progress) (done int64, err error) {
	var total int64
	err = filepath.WalkDir(from, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("copy %s: %w", from, err)
	}
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case !d.Type().IsRegular():
			return nil
		}
		n, err := copyFile(path, filepath.Join(to, rel))
		done += n
		if progress != nil {
			progress(done, total)
		}
		return err
	})
	if err != nil {
		return done, fmt.Errorf("copy %s: %w", from, err)
	}
	return done, syncFolder(to)
}

func copyFile(from, to string) (n int64, err error) {
	r, err := os.Open(from)
	if err != nil {
		return 0, err
	}
	defer func() { _ = r.Close() }()
	w, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	n, err = io.Copy(w, r)
	return n, errors.Join(err, w.Sync(), w.Close())
}
