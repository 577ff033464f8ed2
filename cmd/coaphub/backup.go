package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
)

func newBackup(p process) *cobra.Command {
	var withKeys, asJSON bool
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "backup DIR",
		Short: "Copy the hub's data into a new folder, also while the hub runs",
		Long: "backup makes a consistent copy of the data folder's store. Private keys stay out unless --with-keys, which seals\n" +
			"them with a passphrase. Without them every device must be onboarded again after restoring. Damaged data is copied\n" +
			"too: coaphub verify finds out.",
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			passphrase, err := readPassphrase(p, withKeys, passphraseFile, true)
			if err != nil {
				return err
			}
			show := newProgress(p.err, "copied")
			m, err := bundle.Backup(cmd.Context(), dataFlag(cmd), args[0], passphrase, version, show.at)
			show.end()
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, m)
			}
			keys := "without keys"
			if m.Keys {
				keys = "with keys"
			}
			_, err = fmt.Fprintf(p.out, "backup of hub %s in %s, %s, %s\n", m.HubID, args[0], bytesText(m.Bytes), keys)
			return err
		},
	}
	cmd.Flags().BoolVar(&withKeys, "with-keys", false, "with the private keys, sealed with a passphrase")
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "file with the passphrase (default: asked for on the terminal)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newRestore(p process) *cobra.Command {
	var withKeys, asJSON bool
	var passphraseFile string
	cmd := &cobra.Command{
		Use:   "restore DIR",
		Short: "Make a data folder of a backup",
		Long: "restore makes the data folder named by --data of a backup; it must be empty or not there. Subscribers of the\n" +
			"original start from the current state. Without --with-keys the next start makes new keys,\n" +
			"and certificates and pre-shared keys that were given out are good no more.",
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			passphrase, err := readPassphrase(p, withKeys, passphraseFile, false)
			if err != nil {
				return err
			}
			show := newProgress(p.err, "restored")
			m, err := bundle.Restore(cmd.Context(), args[0], dataFlag(cmd), passphrase, show.at)
			show.end()
			if err != nil {
				return err
			}
			if passphrase == nil {
				_, _ = fmt.Fprintln(p.err, "no keys were restored: the next start makes new ones, and every device must be onboarded again")
			}
			if asJSON {
				return printJSON(p.out, m)
			}
			_, err = fmt.Fprintf(p.out, "restored hub %s of %s to %s\n", m.HubID, m.Time.Local().Format("2006-01-02 15:04:05"), dataFlag(cmd))
			return err
		},
	}
	cmd.Flags().BoolVar(&withKeys, "with-keys", false, "also the private keys that the backup has sealed")
	cmd.Flags().StringVar(&passphraseFile, "passphrase-file", "", "file with the passphrase (default: asked for on the terminal)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newVerify(p process) *cobra.Command {
	var asJSON bool
	var file string
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Check every invariant of the hub's data; exit code 1 if one is broken",
		Long: "verify checks the data folder's store, or a consistent copy of it when the hub runs, and prints each problem. With the\n" +
			"configuration of a cluster it checks its database. The digest is equal where the same is stored: devices' logs and\n" +
			"states, documents and secrets, but not the feed and the keys of the certificate authority. A cluster that runs has none.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := bundle.LoadConfig(file, p.env)
			if err != nil {
				return err
			}
			problems := []string{}
			show := newProgress(p.err, "devices checked")
			show.text = func(n int64) string { return strconv.FormatInt(n, 10) }
			show.begin("checking the store")
			report := func(problem string) {
				problems = append(problems, problem)
				if !asJSON {
					_, _ = fmt.Fprintln(p.out, plain(problem))
				}
			}
			var v bundle.Verified
			if cfg.Shared() {
				v, err = bundle.VerifyShared(cmd.Context(), cfg, report, show.at)
			} else {
				v, err = bundle.Verify(cmd.Context(), dataFlag(cmd), report, show.at)
			}
			show.end()
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(p.out, struct {
					bundle.Verified
					Problems []string `json:"problems"`
				}{v, problems})
			} else {
				_, err = fmt.Fprintf(p.out, "%d devices, %d problems\n", v.Devices, len(problems))
				if err == nil && v.Digest != "" {
					_, err = fmt.Fprintln(p.out, v.Digest)
				}
			}
			if err == nil && len(problems) > 0 {
				err = errSaid
			}
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file of a cluster (YAML), to check its database")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// readPassphrase gets the passphrase of the keys, twice when it is a new one. Nil means no keys.
func readPassphrase(p process, want bool, file string, fresh bool) ([]byte, error) {
	if !want {
		if file != "" {
			return nil, usage("--passphrase-file belongs to --with-keys")
		}
		return nil, nil
	}
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("read the passphrase: %w", err)
		}
		return bytes.TrimRight(b, "\r\n"), nil
	}
	f, ok := p.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil, usage("--with-keys needs a passphrase: there is no terminal to ask on, name a file with --passphrase-file")
	}
	ask := func(what string) ([]byte, error) {
		_, _ = fmt.Fprint(p.err, what+": ")
		b, err := term.ReadPassword(int(f.Fd()))
		_, _ = fmt.Fprintln(p.err)
		if err != nil {
			return nil, fmt.Errorf("read the passphrase: %w", err)
		}
		return b, nil
	}
	first, err := ask("passphrase")
	if err != nil || !fresh {
		return first, err
	}
	again, err := ask("the same again")
	if err == nil && !bytes.Equal(first, again) {
		err = usage("the two passphrases differ")
	}
	return first, err
}

// progress shows how far long work is: a line that is written over on a terminal, nothing where nobody looks.
type progress struct {
	w     io.Writer
	verb  string
	text  func(int64) string // of an amount
	on    bool
	shown int64 // percent; -1: nothing yet
}

func newProgress(w io.Writer, verb string) *progress {
	return &progress{w: w, verb: verb, text: bytesText, on: terminal(w), shown: -1}
}

// begin says what happens before there is anything to count.
func (s *progress) begin(what string) {
	if s.on {
		s.shown = 0
		_, _ = fmt.Fprintf(s.w, "%s ", what)
	}
}

func (s *progress) at(done, total int64) {
	if !s.on || total == 0 || done*100/total == s.shown {
		return
	}
	s.shown = done * 100 / total
	_, _ = fmt.Fprintf(s.w, "\r%s %s of %s (%d %%) ", s.verb, s.text(done), s.text(total), s.shown)
}

func (s *progress) end() {
	if s.shown >= 0 {
		_, _ = fmt.Fprintln(s.w)
	}
}

// bytesText is a number of bytes for people.
func bytesText(n int64) string {
	for _, u := range []struct {
		name string
		size conf.Size
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= int64(u.size) {
			return fmt.Sprintf("%.1f %s", float64(n)/float64(u.size), u.name)
		}
	}
	return fmt.Sprintf("%d B", n)
}
