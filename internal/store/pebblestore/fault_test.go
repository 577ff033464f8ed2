package pebblestore_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func isLog(path string) bool { return strings.HasSuffix(path, ".log") }

// TestCrash takes what the disk has at random moments, as a machine that loses power leaves it: synced data, and any part of
// the rest. All that was acknowledged before the moment is there, with its documents; nothing that was refused is.
func TestCrash(t *testing.T) {
	const writers, clones = 8, 16
	fs := vfs.NewCrashableMem()
	s, err := pebblestore.Open("store", pebblestore.Options{FS: fs, MemTableBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	var acked, asked [writers]atomic.Uint64
	var docs atomic.Uint64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			dev := storetest.Device(w)
			for seq := uint64(1); ; seq++ {
				select {
				case <-stop:
					return
				default:
				}
				asked[w].Store(seq)
				if err := appendOne(context.Background(), s, storetest.Commit(dev, seq), store.StateDoc{Key: "last", Value: fmt.Append(nil, seq)}); err != nil {
					t.Errorf("append %d/%d: %v", w, seq, err)
					return
				}
				acked[w].Store(seq)
				bad := storetest.Commit(dev, seq)
				bad.Writer = "refused"
				if err := appendOne(context.Background(), s, bad, store.StateDoc{Key: "refused", Value: []byte("x")}); !hub.IsKind(err, hub.Conflict) {
					t.Errorf("append %d/%d again: %v", w, seq, err)
				}
			}
		})
	}
	wg.Go(func() { // documents too
		var rev uint64
		for n := uint64(1); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			var err error
			if rev, err = s.Put(context.Background(), "c", store.Doc{Key: "n", Rev: rev, Value: fmt.Append(nil, n), Index: []string{fmt.Sprint(n % 3)}}); err != nil {
				t.Errorf("put %d: %v", n, err)
				return
			}
			docs.Store(n)
		}
	})
	const seed = 7
	rng := rand.New(rand.NewPCG(seed, seed))
	type crash struct {
		fs          *vfs.MemFS
		least, most [writers]uint64
		doc         uint64
	}
	var crashes []crash
	for i := range clones {
		// Wait for some progress, not for time.
		target := acked[0].Load() + uint64(rng.IntN(40))
		for acked[0].Load() < target && !t.Failed() {
			head, err := s.Head(t.Context())
			if err == nil {
				err = s.WaitFeed(t.Context(), head)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		var c crash
		for w := range writers {
			c.least[w] = acked[w].Load()
		}
		c.doc = docs.Load()
		c.fs = fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: []int{0, 30, 70, 100}[i%4], RNG: rng})
		for w := range writers {
			c.most[w] = asked[w].Load()
		}
		crashes = append(crashes, c)
	}
	close(stop)
	wg.Wait()
	closeStore(t, s)
	for i, c := range crashes {
		s := open(t, c.fs, "store")
		verify(t, s)
		for w := range writers {
			st, err := s.Load(t.Context(), storetest.Device(w))
			if err != nil || st.LastSeq < c.least[w] || st.LastSeq > c.most[w] {
				t.Errorf("crash %d: writer %d has %d commits, %v; %d were acknowledged, %d asked for", i, w, st.LastSeq, err, c.least[w], c.most[w])
			}
			if st.LastSeq > 0 && (len(st.Docs) != 1 || string(st.Docs[0].Value) != fmt.Sprint(st.LastSeq)) {
				t.Errorf("crash %d: writer %d's documents are %v, the last commit is %d", i, w, st.Docs, st.LastSeq)
			}
			for got, err := range s.Commits(t.Context(), storetest.Device(w), 1) {
				if err != nil {
					t.Fatal(err)
				}
				storetest.SameCommit(t, got, storetest.Commit(storetest.Device(w), got.Seq))
			}
			add(t, s, storetest.Device(w), st.LastSeq+1, st.LastSeq+1) // and it goes on
		}
		d, err := s.Get(t.Context(), "c", "n")
		var n uint64
		if _, scanErr := fmt.Sscan(string(d.Value), &n); d.Rev != 0 && scanErr != nil {
			t.Error(scanErr)
		}
		if err != nil || n < c.doc {
			t.Errorf("crash %d: document %d, %v, %d was acknowledged", i, n, err, c.doc)
		}
		closeStore(t, s)
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// gate is a file system on which syncing the write-ahead log can be held up.
type gate struct {
	vfs.FS
	closed atomic.Bool
	held   chan struct{} // gets one for each sync that waits
	open   chan struct{}
}

func newGate(fs vfs.FS) *gate {
	g := &gate{held: make(chan struct{}, 100), open: make(chan struct{})}
	g.FS = errorfs.Wrap(fs, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if isLog(op.Path) && (op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData) && g.closed.Load() {
			g.held <- struct{}{}
			<-g.open
		}
		return nil
	}))
	return g
}

// Pebble shows a batch before it is synced; the store must not.
func TestReadersSeeOnlyWhatIsDurable(t *testing.T) {
	g := newGate(vfs.NewMem())
	s := open(t, g.FS, "store")
	defer closeStore(t, s)
	ctx, dev := t.Context(), storetest.Device(1)
	add(t, s, dev, 1, 1)
	before, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	look := func() (last uint64, commits int, feed int, rev uint64, devices int) {
		st, err1 := s.Load(ctx, dev)
		for range s.Commits(ctx, dev, 1) {
			commits++
		}
		entries, _, _, err2 := s.ReadFeed(ctx, hub.Position{}, 10)
		d, err3 := s.Get(ctx, "c", "k")
		for range s.Devices(ctx, "") {
			devices++
		}
		if err1 != nil || err2 != nil || err3 != nil {
			t.Error(err1, err2, err3)
		}
		return st.LastSeq, commits, len(entries), d.Rev, devices
	}
	g.closed.Store(true)
	done := make(chan error, 2)
	go func() { done <- appendOne(ctx, s, storetest.Commit(dev, 2)) }()
	<-g.held // the second commit is in Pebble's memory now, its sync waits
	go func() {
		_, err := s.Put(ctx, "c", store.Doc{Key: "k"})
		done <- err
	}()
	if last, commits, feed, rev, devices := look(); last != 1 || commits != 1 || feed != 1 || rev != 0 || devices != 1 {
		t.Errorf("before the sync: last %d, %d commits, %d in the feed, rev %d, %d devices", last, commits, feed, rev, devices)
	}
	if head, err := s.Head(ctx); err != nil || head != before {
		t.Errorf("before the sync the head is %v, %v", head, err)
	}
	select {
	case err := <-done:
		t.Errorf("a write was answered before its sync: %v", err)
	default:
	}
	close(g.open)
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if last, commits, feed, rev, devices := look(); last != 2 || commits != 2 || feed != 2 || rev == 0 || devices != 1 {
		t.Errorf("after the sync: last %d, %d commits, %d in the feed, rev %d, %d devices", last, commits, feed, rev, devices)
	}
}

// impatient is a context whose few milliseconds begin when somebody starts to wait for its end; on a busy machine others are
// over before the write has begun. One goroutine uses it.
type impatient struct {
	context.Context
	begun context.Context
	stop  context.CancelFunc
}

func (c *impatient) Done() <-chan struct{} {
	if c.begun == nil {
		c.begun, c.stop = context.WithTimeout(c.Context, 5*time.Millisecond)
	}
	return c.begun.Done()
}

func (c *impatient) Err() error {
	if c.begun == nil {
		return nil
	}
	return c.begun.Err()
}

// What waits for the disk is bounded; beyond that, writers wait until their context ends.
func TestBusyStoreIsExhausted(t *testing.T) {
	t.Parallel()
	g := newGate(vfs.NewMem())
	s := open(t, g.FS, "store")
	defer closeStore(t, s)
	room := s.Shrink()
	ctx := t.Context()
	g.closed.Store(true)
	const size = 400 << 10
	big := func(n int) hub.Commit {
		c := storetest.Commit(storetest.Device(n), 1)
		c.Events[0].Content.Data = make([]byte, size)
		return c
	}
	outcomes := make(chan error, 1000)
	var wg sync.WaitGroup
	n := 0
	put := func() {
		n++
		c := big(n)
		wg.Go(func() { outcomes <- appendOne(ctx, s, c) })
	}
	put()
	<-g.held
	for n < room/size+20 { // more than fits
		put()
	}
	for deadline := time.Now().Add(10 * time.Second); s.HasRoom(); runtime.Gosched() {
		if time.Now().After(deadline) {
			close(g.open)
			t.Fatal("there is always room")
		}
	}
	short := &impatient{Context: ctx, stop: func() {}}
	_, err := s.Put(short, "c", store.Doc{Key: "k"})
	short.stop()
	wantCode(t, "a write without room", err, hub.Exhausted, "store-busy")
	if _, err := s.Load(ctx, storetest.Device(1)); err != nil {
		t.Errorf("reading while writes wait: %v", err)
	}
	close(g.open)
	wg.Wait()
	for range n {
		if err := <-outcomes; err != nil {
			t.Errorf("a write that waited: %v", err)
		}
	}
	verify(t, s)
}

func TestFullDiskRefusesAhead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		free := func(bytes uint64) { fs.TestingSetDiskUsage(vfs.DiskUsage{AvailBytes: bytes, TotalBytes: 1 << 40}) }
		free(1 << 30)
		s := open(t, fs, "store")
		ctx, dev := t.Context(), storetest.Device(1)
		ballast := fs.PathJoin("store", pebblestore.BallastName)
		if _, err := fs.Stat(ballast); err != nil {
			t.Errorf("there is no ballast: %v", err)
		}
		add(t, s, dev, 1, 5)
		free(100 << 20)
		time.Sleep(2 * pebblestore.SpaceInterval)
		if _, err := fs.Stat(ballast); err == nil {
			t.Error("the ballast was not given back")
		}
		wantCode(t, "Append", appendOne(ctx, s, storetest.Commit(dev, 6)), hub.Unavailable, "disk-full")
		_, err := s.Put(ctx, "c", store.Doc{Key: "k"})
		wantCode(t, "Put", err, hub.Unavailable, "disk-full")
		if st, err := s.Load(ctx, dev); err != nil || st.LastSeq != 5 {
			t.Errorf("reading while full: %+v, %v", st, err)
		}
		if entries, _, _, err := s.ReadFeed(ctx, hub.Position{}, 10); err != nil || len(entries) != 5 {
			t.Errorf("the feed while full: %d, %v", len(entries), err)
		}
		if err := s.Trim(ctx, dev, 3, nil); err != nil { // this is how room is made
			t.Errorf("trimming while full: %v", err)
		}
		closeStore(t, s)
		s = open(t, fs, "store") // a full disk can be opened, and refuses from the start
		defer closeStore(t, s)
		wantCode(t, "Append after reopening", appendOne(ctx, s, storetest.Commit(dev, 6)), hub.Unavailable, "disk-full")
		free(1 << 30)
		time.Sleep(2 * pebblestore.SpaceInterval)
		add(t, s, dev, 6, 7)
		if _, err := fs.Stat(ballast); err != nil {
			t.Errorf("the ballast did not come back: %v", err)
		}
		verify(t, s)
	})
}

// torn is a file system whose writes to files of one kind reach the disk by half and then fail, once it breaks.
type torn struct {
	vfs.FS
	broken atomic.Bool
}

func (t *torn) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := t.FS.Create(name, c)
	return &tornFile{File: f, fs: t, name: name}, err
}

func (t *torn) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := t.FS.ReuseForWrite(from, to, c)
	return &tornFile{File: f, fs: t, name: to}, err
}

type tornFile struct {
	vfs.File
	fs   *torn
	name string
}

func (f *tornFile) Write(p []byte) (int, error) {
	if isLog(f.name) && f.fs.broken.Load() {
		n, _ := f.File.Write(p[:len(p)/2])
		return n, errInjected
	}
	return f.File.Write(p)
}

// Failures of the disk end the process, so they are tested in one of their own: this test binary, started again.
const (
	childMode = "COAPHUB_STORE_TEST_CHILD"
	childDir  = "COAPHUB_STORE_TEST_DIR"
)

func runChild(t *testing.T, mode, dir string) (out string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), childMode+"="+mode, childDir+"="+dir)
	var buf bytes.Buffer
	cmd.Stdout, cmd.Stderr = &buf, &buf
	_ = cmd.Run() // its code says it
	return buf.String(), cmd.ProcessState.ExitCode()
}

// child is the other process. It never returns to the tests.
func child(mode string) {
	dir := os.Getenv(childDir)
	opts := pebblestore.Options{Log: slog.New(slog.NewTextHandler(os.Stdout, nil)), MemTableBytes: 64 << 10}
	var broken atomic.Bool
	breaks := func(kinds ...errorfs.OpKind) {
		opts.FS = errorfs.Wrap(vfs.Default, errorfs.InjectorFunc(func(op errorfs.Op) error {
			for _, k := range kinds {
				if broken.Load() && op.Kind == k && (isLog(op.Path) || strings.Contains(op.Path, "MANIFEST")) {
					return syscall.ENOSPC
				}
			}
			return nil
		}))
	}
	halves := &torn{FS: vfs.Default}
	failed := make(chan error, 10)
	switch mode {
	case "open":
	case "write":
		breaks(errorfs.OpFileWrite)
	case "sync":
		breaks(errorfs.OpFileSync, errorfs.OpFileSyncData)
	case "create": // the next log file, when the memtable is full
		breaks(errorfs.OpCreate, errorfs.OpReuseForWrite)
	case "torn":
		opts.FS = halves
	case "returns": // a Fatal that returns, which it must not; even then nothing may be acknowledged
		breaks(errorfs.OpFileSync, errorfs.OpFileSyncData)
		opts.Fatal = func(err error) { failed <- err }
	}
	s, err := pebblestore.Open(dir, opts)
	if err != nil {
		fmt.Println(err)
		if code, _ := hub.Public(err); code == "data-folder-in-use" {
			os.Exit(3)
		}
		os.Exit(4)
	}
	if mode == "open" {
		fmt.Println(s.Close())
		os.Exit(0)
	}
	const breakAfter = 100
	var total atomic.Int64
	var wg sync.WaitGroup
	var out sync.Mutex
	for w := range 4 {
		wg.Go(func() {
			dev := storetest.Device(w)
			for seq := uint64(1); seq < 20000; seq++ {
				c := storetest.Commit(dev, seq)
				c.Events[0].Content.Data = make([]byte, 200)
				if err := appendOne(context.Background(), s, c); err != nil {
					out.Lock()
					fmt.Printf("refused %d %d %v\n", w, seq, err)
					out.Unlock()
					return
				}
				out.Lock()
				fmt.Printf("acked %d %d\n", w, seq)
				out.Unlock()
				if total.Add(1) == breakAfter {
					broken.Store(true)
					halves.broken.Store(true)
				}
			}
		})
	}
	wg.Wait()
	if mode != "returns" { // the default Fatal ends the process in a moment
		<-time.After(20 * time.Second)
		os.Exit(5)
	}
	ctx := context.Background()
	fmt.Println("fatal:", <-failed)
	broken.Store(false) // the disk recovers, the store does not
	for i := range 20 {
		if err := appendOne(ctx, s, storetest.Commit(storetest.Device(50+i), 1)); !hub.IsKind(err, hub.Unavailable) {
			fmt.Println("appended after the failure:", err)
			os.Exit(6)
		}
	}
	if _, err := s.Load(ctx, storetest.Device(0)); !hub.IsKind(err, hub.Unavailable) {
		fmt.Println("loaded after the failure:", err)
		os.Exit(7)
	}
	if err := s.WaitFeed(ctx, hub.Position{Day: 1 << 30}); !hub.IsKind(err, hub.Unavailable) {
		fmt.Println("waited after the failure:", err)
		os.Exit(8)
	}
	if err := s.Close(); !hub.IsKind(err, hub.Unavailable) {
		fmt.Println("closed after the failure:", err)
		os.Exit(9)
	}
	select {
	case err := <-failed:
		fmt.Println("fatal twice:", err)
		os.Exit(10)
	default:
	}
	os.Exit(0)
}

// TestFailingDiskEndsTheProcess: a log that cannot be written ends the process with code 1 and a clear message; everything
// acknowledged until then is there for the next one.
func TestFailingDiskEndsTheProcess(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"write", "sync", "create", "torn"} {
		t.Run(mode, func(t *testing.T) {
			dir := t.TempDir()
			out, code := runChild(t, mode, dir)
			if code != 1 || !strings.Contains(out, "nothing more is acknowledged") {
				t.Errorf("the process ended with code %d", code)
			}
			checkLedger(t, dir, out)
		})
	}
}

// TestFatalThatReturns: even a Fatal that does not end the process makes no lost write a success.
func TestFatalThatReturns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out, code := runChild(t, "returns", dir)
	if code != 0 || strings.Count(out, "fatal:") != 1 || strings.Count(out, "refused") != 4 {
		t.Errorf("code %d", code)
	}
	checkLedger(t, dir, out)
}

// checkLedger opens what a child left, and compares it with what the child said it was told.
func checkLedger(t *testing.T, dir, out string) {
	t.Helper()
	acked := map[int]uint64{}
	for line := range strings.Lines(out) {
		var w int
		var seq uint64
		if n, _ := fmt.Sscanf(line, "acked %d %d", &w, &seq); n == 2 {
			acked[w] = seq
		}
	}
	if len(acked) == 0 {
		t.Fatalf("nothing was acknowledged: %s", out)
	}
	s := open(t, nil, dir)
	defer closeStore(t, s)
	verify(t, s)
	for w, want := range acked {
		st, err := s.Load(t.Context(), storetest.Device(w))
		if err != nil || st.LastSeq < want || st.LastSeq > want+1 { // one more may have been under way
			t.Errorf("writer %d was told %d, the store has %d, %v", w, want, st.LastSeq, err)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}
