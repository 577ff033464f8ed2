// Command growth measures what a large store costs a hub: how long it takes to start, and what it takes to list the devices of
// one owner. It builds the hub from this checkout, has fill make the data, and keeps everything on loopback and in a folder
// below the system's temporary directory, which it removes.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/load"
)

func main() {
	var g growth
	flag.IntVar(&g.devices, "devices", 1_000_000, "devices of the hub")
	flag.IntVar(&g.owners, "owners", 10, "of how many owners; the devices of one of them are listed")
	flag.IntVar(&g.events, "events", 10_000_000, "events of their history")
	flag.IntVar(&g.online, "online", 2000, "devices that are online when the hub is killed")
	flag.IntVar(&g.rounds, "rounds", 3, "how often everything is measured")
	flag.StringVar(&g.data, "data", "", "a folder that fill has made, which is changed; empty: one is made and removed")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := g.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// growth is what is to be measured, and the figures so far.
type growth struct {
	devices, owners, events, online, rounds int
	data                                    string

	dir  string // of all that is made
	rows []row
}

// row is what was measured of one thing, a value a round.
type row struct {
	what    string
	figures map[string][]float64
}

// columns are what is measured, in the order of the table.
var columns = []string{"first s", "total s", "CPU s", "RSS before MiB", "RSS MiB", "devices"}

func (g *growth) note(what, column string, v float64) {
	i := slices.IndexFunc(g.rows, func(r row) bool { return r.what == what })
	if i < 0 {
		i = len(g.rows)
		g.rows = append(g.rows, row{what, map[string][]float64{}})
	}
	g.rows[i].figures[column] = append(g.rows[i].figures[column], v)
}

func (g *growth) run(ctx context.Context) (err error) {
	if g.dir, err = os.MkdirTemp("", "coaphub-growth-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(g.dir)) }()
	for name, pkg := range map[string]string{"coaphub": "./cmd/coaphub", "fill": "./test/load/fill"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(g.dir, name), pkg)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	if g.data == "" {
		g.data = filepath.Join(g.dir, "data")
		cmd := exec.CommandContext(ctx, filepath.Join(g.dir, "fill"), "-data", g.data, "-devices", fmt.Sprint(g.devices),
			"-owners", fmt.Sprint(g.owners), "-events", fmt.Sprint(g.events), "-online", fmt.Sprint(g.online))
		cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("fill the store: %w", err)
		}
	}
	defer func() { fmt.Print(g.table()) }()
	if err := g.first(ctx); err != nil {
		return err
	}
	for round := range g.rounds {
		fmt.Fprintf(os.Stderr, "round %d of %d\n", round+1, g.rounds)
		for _, s := range []struct {
			after string
			end   os.Signal // how it ends then
		}{{"an orderly end", os.Kill}, {"a kill", os.Interrupt}} {
			h, err := g.start(ctx, "start after "+s.after)
			if err != nil {
				return err
			}
			if err := errors.Join(g.settle(ctx, h, "idle after "+s.after), h.end(s.end)); err != nil {
				return err
			}
		}
		for _, l := range lists {
			h, err := g.start(ctx, "")
			if err != nil {
				return err
			}
			if err := errors.Join(g.list(ctx, h, l), h.end(os.Interrupt)); err != nil {
				return fmt.Errorf("%s: %w", l.what, err)
			}
		}
	}
	return nil
}

// first starts the hub for the first time, which finds devices online as after a kill, and makes the owners' accounts.
func (g *growth) first(ctx context.Context) error {
	h, err := g.start(ctx, "first start, devices online")
	if err != nil {
		return err
	}
	have, err := h.control.Users(ctx) // more than the first if the folder was measured before
	if err != nil {
		return errors.Join(err, h.end(os.Interrupt))
	}
	for n := len(have); n < g.owners; n++ {
		account := bundle.UserRequest{Name: fmt.Sprintf("owner-%d", n+1), Roles: []string{"user"}}
		if _, err := h.control.AddUser(ctx, account); err != nil {
			return errors.Join(err, h.end(os.Interrupt))
		}
	}
	return errors.Join(g.settle(ctx, h, "idle after it"), h.end(os.Interrupt))
}

// process is a hub that runs.
type process struct {
	cmd     *exec.Cmd
	out     io.Reader
	began   time.Time
	control *bundle.Control
	at      map[string]string // what the ready line says, by its keys
}

// start starts the hub and waits until it is ready; what names the row, empty for none.
func (g *growth) start(ctx context.Context, what string) (*process, error) {
	cmd := exec.CommandContext(context.WithoutCancel(ctx), filepath.Join(g.dir, "coaphub"), "serve", "--data", g.data,
		"--coap-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0", "--grpc-address", "127.0.0.1:0", "--admin-address", "", "--enrolment-address", "", "--enrolment-http-address", "")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	h := &process{cmd: cmd, out: out, began: time.Now(), at: map[string]string{}}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(out)
	for ready := false; !ready; ready = strings.HasPrefix(lines.Text(), "ready ") {
		if !lines.Scan() {
			return nil, errors.Join(fmt.Errorf("the hub did not start: %s", said.String()), cmd.Wait())
		}
	}
	if what != "" {
		g.note(what, "total s", time.Since(h.began).Seconds())
		g.note(what, "CPU s", h.cpu())
		g.note(what, "RSS MiB", h.rss())
	}
	for _, word := range strings.Fields(lines.Text()) {
		key, value, _ := strings.Cut(word, "=")
		h.at[key] = value
	}
	if h.control, err = bundle.Dial(g.data); err != nil {
		return nil, errors.Join(err, h.end(os.Interrupt))
	}
	return h, nil
}

func (h *process) end(how os.Signal) error {
	err := h.cmd.Process.Signal(how)
	_, _ = io.Copy(io.Discard, h.out)
	if end := h.cmd.Wait(); how != os.Kill {
		err = errors.Join(err, end)
	}
	return err
}

// cpu and rss are 0 when the process has gone; the next call of the hub says so.
func (h *process) cpu() float64 {
	n, _ := load.CPU([]int{h.cmd.Process.Pid})
	return n
}

func (h *process) rss() float64 {
	n, err := load.RSS([]int{h.cmd.Process.Pid})
	if err != nil {
		return 0
	}
	return float64(n) / (1 << 20)
}

// settle waits until the hub has done what it does beside serving after a start: until it needs less than a tenth of a core
// for three seconds.
func (g *growth) settle(ctx context.Context, h *process, what string) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	quiet, done, last := 0, h.began, h.cpu()
	for quiet < 3 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case now := <-tick.C:
			cpu := h.cpu()
			if cpu-last < 0.1 {
				quiet++
			} else {
				quiet, done = 0, now
			}
			last = cpu
		}
	}
	g.note(what, "total s", done.Sub(h.began).Seconds())
	g.note(what, "CPU s", last)
	g.note(what, "RSS MiB", h.rss())
	return nil
}

// listing is a way to list the devices of the first owner. Each is measured on a hub that was just started, without what it
// remembers and with it.
type listing struct {
	what  string
	query string
	grpc  bool
	pages bool          // one page after the other, to the end
	pause time.Duration // of a reader that is slow, after each 64 KiB
}

var lists = []listing{
	{what: "HTTP, limit=10000", query: "limit=10000"},
	{what: "HTTP"},
	{what: "HTTP, slow reader", pause: 5 * time.Millisecond},
	{what: "HTTP, search: all", query: "search=light"},
	{what: "HTTP, search: few", query: "search=77777"},
	{what: "HTTP, sorted, first page", query: "sort=name&limit=100"},
	{what: "HTTP, sorted, all pages", query: "sort=name&limit=1000", pages: true},
	{what: "gRPC", grpc: true},
}

func (g *growth) list(ctx context.Context, h *process, l listing) error {
	token, err := h.control.Token(ctx, bundle.TokenRequest{})
	if err != nil {
		return err
	}
	for _, what := range []string{l.what + ", cold", l.what + ", warm"} {
		before, cpu, begin := h.rss(), h.cpu(), time.Now()
		peak, stop := h.peak()
		var first time.Time
		var n int
		if l.grpc {
			first, n, err = overGRPC(ctx, h.at["grpc"], token.AccessToken)
		} else {
			first, n, err = overHTTP(ctx, h.at["http"], token.AccessToken, l)
		}
		took := time.Since(begin)
		stop()
		if err != nil {
			return err
		}
		g.note(what, "first s", first.Sub(begin).Seconds())
		g.note(what, "total s", took.Seconds())
		g.note(what, "CPU s", h.cpu()-cpu)
		g.note(what, "RSS before MiB", before)
		g.note(what, "RSS MiB", *peak)
		g.note(what, "devices", float64(n))
	}
	return nil
}

// peak looks at the hub's memory until stop; the highest value is good then.
func (h *process) peak() (highest *float64, stop func()) {
	highest = new(float64)
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			*highest = max(*highest, h.rss())
			select {
			case <-tick.C:
			case <-end:
				return
			}
		}
	}()
	return highest, func() { close(end); <-ended }
}

func overHTTP(ctx context.Context, base, token string, l listing) (first time.Time, devices int, err error) {
	part := make([]byte, 64<<10)
	for cursor := ""; ; {
		query := l.query
		if cursor != "" {
			query += "&cursor=" + url.QueryEscape(cursor)
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/api/v1/devices?"+query, nil)
		if err != nil {
			return first, devices, err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Accept-Encoding", "identity")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return first, devices, err
		}
		var end []byte // of the list: its last element has the cursor of the next page
		for err == nil {
			var n int
			n, err = res.Body.Read(part)
			if first.IsZero() { // or the end of a list that has nothing
				first = time.Now()
			}
			devices += bytes.Count(part[:n], []byte("\n"))
			end = append(end, part[:n]...)
			end = end[max(0, len(end)-4096):]
			if l.pause > 0 {
				<-time.After(l.pause)
			}
		}
		_ = res.Body.Close()
		switch {
		case !errors.Is(err, io.EOF):
			return first, devices, err
		case res.StatusCode != http.StatusOK:
			return first, devices, fmt.Errorf("%s: %s", res.Status, end)
		}
		cursor = ""
		last := end[bytes.LastIndexByte(bytes.TrimSpace(end), '\n')+1:]
		if _, after, ok := bytes.Cut(last, []byte(`"cursor":"`)); ok && l.pages {
			text, _, _ := bytes.Cut(after, []byte(`"`))
			cursor = string(text)
		}
		if cursor == "" {
			return first, devices, nil
		}
	}
}

func overGRPC(ctx context.Context, address, token string) (first time.Time, devices int, err error) {
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return first, 0, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	all, err := pb.NewGrpcGatewayClient(conn).GetDevices(ctx, &pb.GetDevicesRequest{})
	if err != nil {
		return first, 0, err
	}
	for {
		if _, err := all.Recv(); errors.Is(err, io.EOF) {
			return first, devices, nil
		} else if err != nil {
			return first, devices, err
		}
		if devices++; devices == 1 {
			first = time.Now()
		}
	}
}

// table is the figures in Markdown: medians, with the range where there is more than one.
func (g *growth) table() string {
	var out strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&out, format, args...) }
	p("%s\n\n%d devices of %d owners, %d events, %d rounds: the median, with the lowest and the highest.\n\n",
		load.Machine(), g.devices, g.owners, g.events, g.rounds)
	p("| |")
	for _, c := range columns {
		p(" %s |", c)
	}
	p("\n|---|%s\n", strings.Repeat("---|", len(columns)))
	for _, r := range g.rows {
		p("| %s |", r.what)
		for _, c := range columns {
			vs := slices.Sorted(slices.Values(r.figures[c]))
			switch {
			case len(vs) == 0:
				p(" – |")
			case c == "devices":
				p(" %.0f |", vs[0])
			case vs[0] == vs[len(vs)-1]:
				p(" %.3g |", vs[0])
			default:
				p(" %.3g (%.3g–%.3g) |", (vs[(len(vs)-1)/2]+vs[len(vs)/2])/2, vs[0], vs[len(vs)-1])
			}
		}
		p("\n")
	}
	return out.String()
}
