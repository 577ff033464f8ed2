package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/run"
)

// Options is what a process gives the hub besides its configuration.
type Options struct {
	Out      io.Writer // gets the ready line, and nothing else; nil: nobody reads it
	Log      io.Writer // gets the log; nil: none
	Terminal bool      // Out is a terminal: the first account's one-time password may be shown there
	Version  string    // what the linker was told; empty: what the Go tool knows
	Warnings []string  // of LoadConfig; they go to the log
	// Started is called once when everything serves; it must not block. The devices are not counted. Nil is allowed.
	Started func(Status)
}

// grace is how long an orderly stop may take in all, once the devices have gone elsewhere.
const grace = 5 * time.Second

// Run is the whole hub: it takes hold of the data folder, starts every part, prints the ready line, and stops in order when
// ctx ends. Nil means just that. Errors are an operator's to read: hub.Public gives their sentence.
func Run(ctx context.Context, cfg Config, o Options) error {
	if o.Log == nil {
		o.Log = io.Discard
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	if err := cfg.Validate(); err != nil {
		return err
	}
	log := obs.NewLogger(o.Log, cfg.Log)
	for _, w := range o.Warnings {
		log.Warn(w)
	}
	folder, err := OpenFolder(cfg.Data)
	if err != nil {
		return err
	}
	defer func() {
		if err := folder.Close(); err != nil {
			log.Warn("the data folder could not be let go", "error", err)
		}
	}()

	a, err := wire(ctx, cfg, folder, o, log)
	if err != nil {
		return err
	}
	log.Info("starting", "version", a.build.Version, "commit", a.build.Commit, "data", folder.Path, "hub", a.hubID)
	err = run.Run(ctx, run.Options{
		Grace: grace + a.drains(),
		Log:   log,
		Started: func() {
			a.health.SetReady(true)
			s := a.status(context.WithoutCancel(ctx))
			log.Info("ready", "took", time.Since(a.started))
			_, _ = io.WriteString(o.Out, a.readyLine(s)) // a closed pipe does not stop a hub
			if o.Started != nil {
				o.Started(s)
			}
		},
		// Before any part stops: probes are answered to the end (parts), and nobody is to be sent here meanwhile.
		Stopping: func() { a.health.SetReady(false) },
	}, a.parts()...)
	err = errors.Join(err, a.close())
	if err == nil {
		log.Info("stopped")
	} else {
		log.Error("stopped", "error", err)
	}
	return err
}

// readyLine is one line for people and programs: the word ready, then key=value pairs without spaces in them.
func (a *assembly) readyLine(s Status) string {
	var b strings.Builder
	b.WriteString("ready")
	add := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, " %s=%s", key, strings.ReplaceAll(value, " ", "%20"))
		}
	}
	add("hub", s.HubID)
	add("coaps+tcp", s.Endpoints.CoAPSTCP)
	add("coaps", s.Endpoints.CoAPS)
	add("coap+tcp", s.Endpoints.CoAPTCP)
	add("coap", s.Endpoints.CoAP)
	add("coaps+ws", s.Endpoints.CoAPSWS)
	add("coap+ws", s.Endpoints.CoAPWS)
	add("http", s.Endpoints.HTTP)
	add("grpc", s.Endpoints.GRPC)
	add("admin", s.Endpoints.Admin)
	add("enrolment", s.Endpoints.Enrolment)
	add("enrolment-http", s.Endpoints.EnrolmentHTTP)
	add("oauth", s.Endpoints.OAuth)
	add("data", s.Data)
	switch {
	case a.first.password != "" && a.terminal:
		add("first-login", a.first.name+":"+a.first.password)
	case s.FirstLogin != "":
		add("first-login", s.FirstLogin)
	}
	b.WriteByte('\n')
	return b.String()
}
