package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/hub"
)

const (
	// silence is how long a stream of events may say nothing at all: the hub sends something every ten seconds.
	silence = 35 * time.Second
	// Pauses before coming again: the first, and the longest.
	firstPause, longestPause = 500 * time.Millisecond, 30 * time.Second
)

func newWatch(p process) *cobra.Command {
	var f apiFlags
	var kinds []string
	var state bool
	cmd := &cobra.Command{
		Use:   "watch [DEVICE [HREF]]",
		Short: "Show what happens to devices, as it happens",
		Long: "watch shows each event of all devices, of one, or of one of its resources, from now on, until it is interrupted.\n" +
			"When the connection breaks it comes back and goes on behind the last event it showed: nothing is missed, also\n" +
			"across a restart of the hub, for as long as the hub keeps its history.",
		Args: between(0, 2), ValidArgsFunction: completeResources(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := url.Values{}
			if len(args) > 0 {
				if _, err := devicePath(args[0]); err != nil {
					return err
				}
				q.Set("deviceIdFilter", args[0])
			}
			if len(args) > 1 {
				h, err := hub.ParseHref(args[1])
				if err != nil {
					_, text := hub.Public(err)
					return usage("%q: %s", args[1], text)
				}
				q.Set("hrefFilter", string(h))
				if len(kinds) == 0 {
					kinds = []string{"RESOURCE_CHANGED"} // the others are about the whole device
				}
			}
			for _, k := range kinds {
				q.Add("eventFilter", strings.ToUpper(strings.ReplaceAll(k, "-", "_")))
			}
			if state {
				q.Set("includeCurrentState", "true")
			}
			a, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			w := &watcher{api: a, path: "/api/v1/events/stream?" + q.Encode(), asJSON: f.asJSON, out: p.out, notes: p.err}
			if f.server == "" { // the token is short-lived and the ports may change: both are asked for again
				w.again = func() (*api, error) { return f.open(cmd, p, hub.ScopeRead) }
			}
			return w.run(cmd.Context())
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&kinds, "kind", nil, "only this kind of events, for example resource-changed or device-metadata-updated; may be repeated")
	cmd.Flags().BoolVar(&state, "state", false, "show the current state first")
	return cmd
}

// watcher follows a stream of events across breaks.
type watcher struct {
	api        *api
	again      func() (*api, error) // finds the hub anew; nil: it stays where it is
	path       string
	asJSON     bool
	out, notes io.Writer
	last       string // the ID of the newest event: where to resume
	met        bool   // the hub has answered
}

func (w *watcher) run(ctx context.Context) error {
	pause, told := firstPause, false
	for {
		heard := w.last
		err := w.follow(ctx)
		if ctx.Err() != nil {
			return nil // it was interrupted, which is how it ends
		}
		if w.last != heard {
			pause, told = firstPause, false
		}
		code, _ := hub.Public(err)
		expired := hub.IsKind(err, hub.Unauthenticated) && w.again != nil
		if !w.met || !expired && !hub.IsKind(err, hub.Unavailable) {
			return err
		}
		if !told && code != "token-expired" {
			_, _ = fmt.Fprintf(w.notes, "coaphub: the stream broke off (%s), coming back\n", code)
			told = true
		}
		wait := time.NewTimer(pause)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil
		}
		pause = min(2*pause, longestPause)
		if w.again == nil {
			continue
		}
		if a, err := w.again(); err == nil { // else it is not there yet: the old place says so too
			w.api = a
		}
	}
}

// follow reads one stream until it ends, which it does with an error.
func (w *watcher) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var header []string
	if w.last != "" {
		header = []string{"Last-Event-ID", w.last}
	}
	resp, err := w.api.request(ctx, http.MethodGet, w.path, "text/event-stream", nil, header...)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	w.met = true
	quiet := time.AfterFunc(silence, cancel) // the other side may be gone without a word
	defer quiet.Stop()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	var id string
	var data []byte
	for lines.Scan() {
		quiet.Reset(silence)
		name, value, _ := bytes.Cut(lines.Bytes(), []byte(": "))
		switch string(name) {
		case "id":
			id = string(value)
		case "data":
			data = bytes.Clone(value)
		case "": // the event is whole (WHATWG HTML, Section 9.2.6); one that was cut off comes again
			if data == nil {
				continue
			}
			if err := w.show(data); err != nil {
				return err
			}
			w.last, data = id, nil
		}
	}
	err = lines.Err()
	if errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("the hub's answer is too long: %w", err)
	}
	return &hub.Error{Kind: hub.Unavailable, Code: "hub-unreachable", Text: "the hub at " + w.api.base + " broke off", Err: err}
}

// show prints one message of the stream. That it begins is not worth a line.
func (w *watcher) show(data []byte) error {
	var m struct {
		Result map[string]json.RawMessage `json:"result"`
		Error  *failure                   `json:"error"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return fmt.Errorf("the hub's answer was not understood: %w", err)
	}
	if m.Error != nil {
		return m.Error.err()
	}
	if raw, ok := m.Result["operationProcessed"]; ok {
		var op struct {
			Lagged bool `json:"lagged"`
		}
		if json.Unmarshal(raw, &op) == nil && op.Lagged {
			_, _ = fmt.Fprintln(w.notes, "coaphub: the hub no longer keeps all that happened meanwhile; what follows first is the current state")
		}
		return nil
	}
	for _, name := range []string{"subscriptionId", "correlationId", "resumeToken"} {
		delete(m.Result, name)
	}
	raw, err := json.Marshal(m.Result)
	if err != nil {
		return err
	}
	if w.asJSON {
		_, err := fmt.Fprintf(w.out, "%s\n", raw)
		return err
	}
	at, kind, what, err := event(raw)
	if err != nil {
		return err
	}
	var of struct {
		change
		DeviceID  string   `json:"deviceId"`
		DeviceIDs []string `json:"deviceIds"`
	}
	_ = json.Unmarshal(m.Result[kind], &of) // event has read it
	device := of.ResourceID.DeviceID + of.DeviceID + strings.Join(of.DeviceIDs, " ")
	if at.UnixNano() == 0 { // that a device came or went has no time of its own
		at = time.Now()
	}
	_, err = fmt.Fprintln(w.out, strings.TrimRight(plain(at.Local().Format("2006-01-02 15:04:05.000")+"  "+device+"  "+
		fmt.Sprintf("%-21s", kind)+"  "+what), " "))
	return err
}
