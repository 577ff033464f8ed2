package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/hub"
)

// What is in a data folder. Everything of a hub is below it, and nothing of it is anywhere else.
const (
	storeFolder    = "store"               // event log and documents; the store's own files
	keysFolder     = "keys"                // certification authorities
	listsFolder    = "revocation"          // other authorities' lists, fetched again when they are missing
	scratchFolder  = "scratch"             // checkpoints under way; emptied at start
	lockFile       = "lock"                // held while a process uses the folder; its text is the process ID
	formatFile     = "format"              // version of this layout
	socketFile     = "hub.sock"            // see socket.go
	intoFile       = "migration-into.json" // a hub is being copied to here: none starts; see migrate.go
	fromFile       = "migration-from.json" // a hub was being copied from here; whoever starts removes it
	firstLoginFile = "first-login"         // the first account's one-time password, when no terminal could show it
)

// format is the version of the layout above. The store's contents have a version of their own.
const format = 1

// Folder is a data folder that this process holds alone.
type Folder struct {
	Path string // absolute
	lock *os.File
}

// OpenFolder makes the folder where there is none, and takes hold of it. Before anything is in it nobody but its owner may
// look inside (0700); a folder that is already there and open to others is closed to them, and refused where that is not
// possible. Codes: "data-folder-in-use", "data-too-new", "data-folder-not-ours", "migration-unfinished".
func OpenFolder(path string) (*Folder, error) {
	f, err := takeFolder(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(f.sub(intoFile)); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(&hub.Error{
			Kind: hub.Precondition, Code: "migration-unfinished", Err: err,
			Text: "a hub is being copied into the data folder " + f.Path + ": finish it with coaphub migrate, which goes on where it was",
		}, f.Close())
	}
	return f, nil
}

// takeFolder is OpenFolder, also of a folder that a hub is being copied into.
func takeFolder(path string) (*Folder, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make the data folder: %w", err)
	}
	if err := onlyOurs(path); err != nil {
		return nil, err
	}
	lock, err := takeLock(path)
	if err != nil {
		return nil, err
	}
	f := &Folder{Path: path, lock: lock}
	if err := f.checkFormat(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Close lets go of the folder. The lock file stays: removing it would let two processes lock two files of one name.
func (f *Folder) Close() error { return f.lock.Close() }

func (f *Folder) sub(name string) string { return filepath.Join(f.Path, name) }

func onlyOurs(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if !info.IsDir() {
		return &hub.Error{Kind: hub.Invalid, Code: "data-folder-not-ours", Text: path + " is not a folder; name another one with --data"}
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	// A folder full of other things is more likely a slip (--data ~) than a data folder with wrong permissions.
	if _, err := os.Stat(filepath.Join(path, formatFile)); len(entries) > 0 && errors.Is(err, fs.ErrNotExist) {
		return &hub.Error{Kind: hub.Invalid, Code: "data-folder-not-ours", Text: path + " holds other things and is open to other users; name an empty folder with --data"}
	}
	if err := os.Chmod(path, 0o700); err != nil {
		return &hub.Error{
			Kind: hub.Invalid, Code: "data-folder-not-ours",
			Text: path + " is open to other users and its permissions cannot be changed; run chmod 700 on it as its owner", Err: err,
		}
	}
	return nil
}

// notOurs is the error of a data folder that this user may not open.
func notOurs(path string, err error) error {
	return &hub.Error{
		Kind: hub.Denied, Code: "data-folder-not-ours", Err: err,
		Text: "the data folder " + path + " belongs to another user; run the command as the user the hub runs as, or name another folder with --data",
	}
}

func takeLock(path string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, fs.ErrPermission) {
		return nil, notOurs(path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	// flock goes with the process, however it ends: there are no stale locks.
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer func() { _ = f.Close() }()
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock the data folder: %w", err)
		}
		holder := ""
		if b, err := os.ReadFile(f.Name()); err == nil && len(b) > 0 && len(b) < 16 {
			holder = " (process " + strings.TrimSpace(string(b)) + ")"
		}
		return nil, &hub.Error{
			Kind: hub.Conflict, Code: "data-folder-in-use",
			Text: "the data folder " + path + " is in use by another coaphub" + holder + "; stop it, or name another folder with --data",
		}
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("data folder: %w", err), f.Close())
	}
	if _, err := f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0); err != nil {
		return nil, errors.Join(fmt.Errorf("data folder: %w", err), f.Close())
	}
	return f, nil
}

func (f *Folder) checkFormat() error {
	b, err := os.ReadFile(f.sub(formatFile))
	if errors.Is(err, fs.ErrNotExist) {
		return writeFile(f.sub(formatFile), []byte(strconv.Itoa(format)+"\n"))
	}
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	n, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	switch {
	case err != nil:
		return &hub.Error{Kind: hub.Invalid, Code: "data-damaged", Text: f.sub(formatFile) + " is damaged: it should hold the number " + strconv.Itoa(format)}
	case n > format:
		return &hub.Error{
			Kind: hub.Invalid, Code: "data-too-new",
			Text: fmt.Sprintf("the data folder %s has layout %d, this program knows %d; start the newer version that wrote it", f.Path, n, format),
		}
	}
	return nil
}

// writeFile puts a small file in place in one step, readable by its owner only, and on the disk before it returns.
func writeFile(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// removeFile removes a small file, if it is there, for good.
func removeFile(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
