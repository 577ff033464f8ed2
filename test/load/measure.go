package load

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Result is what was measured of one phase.
type Result struct {
	Phase     string  `json:"phase"`
	Transport string  `json:"transport,omitempty"`
	AtOnce    int     `json:"atOnce,omitempty"`
	Seconds   float64 `json:"seconds"`
	Ops       int     `json:"ops"`
	PerSecond float64 `json:"perSecond,omitempty"` // zero: nothing was done
	Failed    int     `json:"failed"`
	Error     string  `json:"error,omitempty"` // the first one
	// CPU seconds of the hub for 1000 operations; nil where its processes are not known.
	HubCPU *float64 `json:"hubCpuPer1000,omitempty"`
	// OwnCPU is our part of all the CPU time that the two of us took, from 0 to 1, nil if we are one process; OwnCores is how many
	// cores we kept busy.
	OwnCPU   *float64 `json:"ownCpuShare,omitempty"`
	OwnCores *float64 `json:"ownCores,omitempty"`
	// Latencies in milliseconds.
	P50 *float64 `json:"p50ms,omitempty"`
	P90 *float64 `json:"p90ms,omitempty"`
	P99 *float64 `json:"p99ms,omitempty"`
	Max *float64 `json:"maxMs,omitempty"`
	// FirstByte is the median time to the first byte, in milliseconds.
	FirstByte *float64 `json:"firstByteMs,omitempty"`
	// Late are sends more than a millisecond after their time, LateBy is by how many milliseconds the worst was: we were too slow.
	Late   int      `json:"late,omitempty"`
	LateBy *float64 `json:"lateByMs,omitempty"`
	// Retransmitted is how often devices sent a confirmable message again; nil where they sent none.
	Retransmitted *int     `json:"retransmitted,omitempty"`
	RSS           *float64 `json:"hubRssMiB,omitempty"`
	PerDevice     *float64 `json:"kibPerDevice,omitempty"`
	// Missing says that nothing was measured, and why.
	Missing string `json:"missing,omitempty"`
}

// Doubts says why the figures may be those of the load in place of the hub's.
func (r Result) Doubts() (doubts []string) {
	if sent := r.Ops + r.Failed; r.LateBy != nil && r.Late*100 > sent { // one in a hundred is what the p99 shows
		doubts = append(doubts, fmt.Sprintf("the load was late with %d of %d sends, by up to %.1f ms", r.Late, sent, *r.LateBy))
	}
	switch {
	case r.OwnCPU != nil && *r.OwnCPU > 0.5:
		doubts = append(doubts, fmt.Sprintf("the load took %.0f%% of the CPU time that it and the hub used", *r.OwnCPU*100))
	case r.OwnCores != nil && *r.OwnCores > 0.8*float64(runtime.NumCPU()):
		doubts = append(doubts, fmt.Sprintf("the load kept %.1f of %d cores busy", *r.OwnCores, runtime.NumCPU()))
	}
	return doubts
}

func ptr[T any](v T) *T { return &v }

// meter takes what one phase costs.
type meter struct {
	r     *Result
	pids  []int
	n     *confirmables
	begin time.Time
	// CPU seconds, and confirmable messages, so far; cpuErr says why the hub's are not known.
	hub, own    float64
	cpuErr      error
	sent, again int64

	ops, failed atomic.Int64
	mu          sync.Mutex // guards all below
	lat         []time.Duration
	first       []time.Duration
	err         error
}

func newMeter(phase, transport string, atOnce int, pids []int, n *confirmables) *meter {
	m := &meter{r: &Result{Phase: phase, Transport: transport, AtOnce: atOnce}, pids: pids, n: n, begin: time.Now()}
	m.hub, m.cpuErr = CPU(pids)
	m.own, _ = CPU([]int{os.Getpid()})
	m.sent, m.again = n.sent.Load(), n.again.Load()
	return m
}

// did notes an operation.
func (m *meter) did(took time.Duration) {
	m.ops.Add(1)
	m.mu.Lock()
	m.lat = append(m.lat, took)
	m.mu.Unlock()
}

func (m *meter) fail(err error) {
	m.failed.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
	}
}

func (m *meter) end() Result {
	r := m.r
	m.mu.Lock()
	defer m.mu.Unlock()
	r.Seconds = time.Since(m.begin).Seconds()
	r.Ops, r.Failed = int(m.ops.Load()), int(m.failed.Load())
	r.PerSecond = float64(r.Ops) / r.Seconds
	if m.err != nil {
		r.Error = m.err.Error()
		if r.Ops == 0 {
			r.Missing = fmt.Sprintf("all %d failed: %s", r.Failed, r.Error)
		}
	}
	own, ownErr := CPU([]int{os.Getpid()})
	own -= m.own
	if ownErr == nil {
		r.OwnCores = ptr(own / r.Seconds)
	}
	if hub, err := CPU(m.pids); err == nil && m.cpuErr == nil && hub > m.hub {
		if !slices.Contains(m.pids, os.Getpid()) {
			r.OwnCPU = ptr(own / (own + hub - m.hub))
		}
		if r.Ops > 0 {
			r.HubCPU = ptr((hub - m.hub) / float64(r.Ops) * 1000)
		}
	}
	if m.n.sent.Load() > m.sent {
		r.Retransmitted = ptr(int(m.n.again.Load() - m.again))
	}
	if rss, err := RSS(m.pids); err == nil {
		r.RSS = ptr(float64(rss) / (1 << 20))
	}
	if len(m.lat) > 0 {
		slices.Sort(m.lat)
		r.P50, r.P90, r.P99 = quantile(m.lat, 0.5), quantile(m.lat, 0.9), quantile(m.lat, 0.99)
		r.Max = quantile(m.lat, 1)
	}
	if len(m.first) > 0 {
		slices.Sort(m.first)
		r.FirstByte = quantile(m.first, 0.5)
	}
	return *r
}

// quantile is that of sorted values, in milliseconds.
func quantile(sorted []time.Duration, q float64) *float64 {
	i := min(int(q*float64(len(sorted))), len(sorted)-1)
	return ptr(float64(sorted[i]) / float64(time.Millisecond))
}

// closed has so many workers do op one after the other, until it was begun n times (if n is above zero) or time is over. What
// ends with ctx is no failure.
func (m *meter) closed(ctx context.Context, workers, n int, during time.Duration, op func(ctx context.Context, worker, k int) error) {
	until := time.Now().Add(during)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for ctx.Err() == nil && (during == 0 || time.Now().Before(until)) {
				k := int(next.Add(1)) - 1
				if n > 0 && k >= n {
					return
				}
				begin := time.Now()
				switch err := op(ctx, w, k); {
				case err == nil:
					m.did(time.Since(begin))
				case ctx.Err() == nil:
					m.fail(err)
				}
			}
		})
	}
	wg.Wait()
}

// CPU is the seconds that processes have used (proc(5): utime and stime, in hundredths).
func CPU(pids []int) (float64, error) {
	if len(pids) == 0 {
		return 0, errNoPID
	}
	var ticks int
	for _, pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
		}
		_, rest, _ := strings.Cut(string(b), ") ") // behind the name, which may have anything in it
		f := strings.Fields(rest)
		if len(f) > 12 {
			u, _ := strconv.Atoi(f[11])
			s, _ := strconv.Atoi(f[12])
			ticks += u + s
		}
	}
	return float64(ticks) / 100, nil
}

var errNoPID = errors.New("the hub's processes are not known; name them with --pid")

// RSS is the resident memory of processes in bytes.
func RSS(pids []int) (int64, error) {
	if len(pids) == 0 {
		return 0, errNoPID
	}
	if runtime.GOOS != "linux" {
		return 0, errors.New("memory is read from /proc, which this system has not")
	}
	var sum int64
	for _, pid := range pids {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
		if err != nil {
			return 0, fmt.Errorf("read the memory of process %d: %w", pid, err)
		}
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kb, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
				sum += kb << 10
			}
		}
	}
	return sum, nil
}

// Machine says where the figures come from.
func Machine() string {
	model := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	version := "unknown"
	if out, err := exec.CommandContext(context.Background(), "git", "describe", "--tags", "--always", "--dirty").Output(); err == nil {
		version = strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("coaphub %s, %s, %s/%s, %d cores (%s), hub and load together.", version, runtime.Version(), runtime.GOOS, runtime.GOARCH,
		runtime.NumCPU(), model)
}
