// Command coaphub is a hub for constrained devices that speak CoAP, and the tools around it.
//
// It must not know anything of the hub's logic: one file a sub-command, each of which asks package bundle, the running hub's
// socket or its API.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// version is set by the linker (-X main.version=v1.2.3); empty otherwise.
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// After the first signal the next one does what the system does by default: it ends the process at once.
	context.AfterFunc(ctx, stop)
	code := execute(ctx, os.Args[1:], process{os.Stdin, os.Stdout, os.Stderr, os.Environ()})
	stop()
	os.Exit(code)
}

// process is what a command gets from outside.
type process struct {
	in       io.Reader
	out, err io.Writer
	env      []string
}

func (p process) getenv(name string) string {
	for _, kv := range p.env {
		if k, v, ok := strings.Cut(kv, "="); ok && k == name {
			return v
		}
	}
	return ""
}

// terminal reports whether w is one.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Exit codes: scripts depend on them.
const (
	exitOK      = 0
	exitFailure = 1 // it could not be done
	exitUsage   = 2 // it was asked in a way that cannot be understood
	// What a hub's API answered to a command that is its client:
	exitDenied   = 3 // there is no good token, or it does not allow this
	exitNotFound = 4 // there is no such thing
	exitLater    = 5 // not now: the hub or the device is away, busy or late
)

// usageError is a mistake in the command line.
type usageError struct{ error }

func usage(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// execute runs a command line and returns the exit code.
func execute(ctx context.Context, args []string, p process) int {
	root := newRoot(p)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	var u usageError
	if errors.As(err, &u) || strings.HasPrefix(err.Error(), "unknown command") { // cobra has no type for this one
		_, _ = fmt.Fprintf(p.err, "coaphub: %s\nSee %q.\n", err, cmd.CommandPath()+" --help")
		return exitUsage
	}
	if !errors.Is(err, errSaid) {
		_, _ = fmt.Fprintln(p.err, "coaphub: "+sentence(err))
	}
	var answer *client.Error
	if errors.As(err, &answer) {
		switch answer.Kind {
		case client.Unauthenticated, client.Denied:
			if answer.Code != "device-error" { // that is the device, which has not seen the caller's token
				return exitDenied
			}
		case client.NotFound:
			return exitNotFound
		case client.Unavailable, client.Exhausted, client.Deadline:
			return exitLater
		}
	}
	return exitFailure
}

// errSaid ends a command whose output has said everything already.
var errSaid = errors.New("said")

// sentence is what a person reads of an error: everything, since on the command line there are no outsiders; but without the
// operation's name that logs want.
func sentence(err error) string {
	var ps conf.Problems
	if errors.As(err, &ps) {
		return ps.Error()
	}
	var e *hub.Error
	var answer *client.Error
	switch {
	case errors.As(err, &e):
	case errors.As(err, &answer):
		text := answer.Message
		if answer.Outcome != nil {
			text += ": " + plain(answer.Outcome.Status) // that of the device
		}
		return text + " [" + string(answer.Code) + "]"
	default:
		return err.Error()
	}
	// The outermost error that was given words says it best; those around it only say where it passed.
	for inner := e; e.Text == "" && errors.As(inner.Err, &inner); {
		if inner.Text != "" {
			e = inner
		}
	}
	code, text := hub.Public(e)
	if e.Err != nil && e.Text == "" {
		text += ": " + e.Err.Error()
	}
	return text + " [" + code + "]"
}

func newRoot(p process) *cobra.Command {
	root := &cobra.Command{
		Use:   "coaphub",
		Short: "A hub for constrained devices that speak CoAP",
		Long: "coaphub is a hub for constrained devices that speak CoAP: they sign up, publish and notify,\n" +
			"applications see and query them over HTTP and gRPC. \"coaphub serve\" is the whole hub.\n\n" +
			"Commands end with 0 when it is done, 1 when it could not be, 2 when they were not understood; clients of a hub's API\n" +
			"with 3 when they may not, 4 when there is no such thing, and 5 when it may work later.",
		SilenceErrors: true, SilenceUsage: true,
	}
	root.SetIn(p.in)
	root.SetOut(p.out)
	root.SetErr(p.err)
	data := p.getenv(bundle.EnvData)
	if data == "" {
		data = bundle.Default().Data
	}
	root.PersistentFlags().String("data", data, "data folder; also "+bundle.EnvData)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newServe(p), newStatus(p), newParts(p), newAudit(p), newOnboard(p), newToken(p), newUser(p), newCA(p), newCerts(p), newDeny(p), newEnroll(p), newAgent(p), newDevices(p), newGet(p), newWatch(p),
		newSet(p), newCreate(p), newDelete(p), newCommands(p),
		newThings(p), newCall(p), newLogin(p), newLogout(p),
		newHistory(p), newSimulate(p), newLoad(p), newConfig(p), newVerify(p), newBackup(p), newRestore(p), newMigrate(p), newVersion(p),
	)
	return root
}

// between, exactly and none say how many arguments a command takes. Mistakes are answered with how to write it.
func between(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return usage("an argument is missing; write %s", cmd.UseLine())
		case len(args) > most:
			return usage("%q is one argument too many; write %s", args[most], cmd.UseLine())
		}
		return nil
	}
}

func exactly(n int) cobra.PositionalArgs { return between(n, n) }

func none(cmd *cobra.Command, args []string) error { return between(0, 0)(cmd, args) }

// group is a command that only holds others: alone it shows them, and a slip in their name is a mistake and not a question.
func group(name, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, Args: cobra.ArbitraryArgs, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return usage("unknown command %q for %q", args[0], cmd.CommandPath())
	}}
	cmd.AddCommand(commands...)
	return cmd
}

// dataFlag is the data folder of a command.
func dataFlag(cmd *cobra.Command) string {
	f := cmd.Flag("data")
	return f.Value.String()
}

// control is the connection to the hub of the command's data folder.
func control(cmd *cobra.Command) (*bundle.Control, error) { return bundle.Dial(dataFlag(cmd)) }
