package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
)

func newCA(p process) *cobra.Command {
	root := &cobra.Command{
		Use:       "root [device|https|internal]",
		Short:     "Print a root certificate (PEM)",
		Long:      "root prints a root certificate as PEM: of the devices' side (default), of HTTPS, or of the inside. While it is rolled over there are two.",
		Args:      between(0, 1),
		ValidArgs: whichRoots,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			pem, err := c.Root(cmd.Context(), whichRoot(args))
			if err == nil {
				_, err = io.WriteString(p.out, pem)
			}
			return err
		},
	}
	var device, out, validity string
	issue := &cobra.Command{
		Use:   "issue --device-id ID --out DIR",
		Short: "Make an identity certificate for a device",
		Long:  "issue makes a key and an identity certificate for a device, and writes cert.pem (the chain), key.pem and ca.pem.",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if device == "" || out == "" {
				return usage("--device-id and --out are needed")
			}
			d, err := conf.ParseDuration(validity)
			if err != nil {
				return usage("--validity: %w", err)
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			if err := makeFolder(out); err != nil {
				return err
			}
			id, err := c.Issue(cmd.Context(), device, d)
			if err != nil {
				return err
			}
			if err := writeIdentity(out, id); err != nil {
				return err
			}
			_, err = fmt.Fprintf(p.out, "wrote cert.pem, key.pem and ca.pem to %s\n", out)
			return err
		},
	}
	issue.Flags().StringVar(&device, "device-id", "", "the device's ID, a UUID")
	issue.Flags().StringVar(&out, "out", "", "folder for the files")
	issue.Flags().StringVar(&validity, "validity", conf.FormatDuration(365*24*time.Hour), "how long the certificate lasts")
	return group("ca", "The hub's own certification authorities", root, issue, newCAList(p), newCARoll(p), newCARetire(p), newCARenewList(p), newCAExport(p))
}

var whichRoots = []string{"device", "https", "internal"}

// whichRoot is the root that an optional argument names.
func whichRoot(args []string) string {
	if len(args) == 1 {
		return args[0]
	}
	return whichRoots[0]
}

func newCAList(p process) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the roots, and what issues under them",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			as, err := c.Authorities(cmd.Context())
			if err == nil && asJSON {
				return printJSON(p.out, as)
			}
			return printAuthorities(p, as, err)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	return cmd
}

func newCARoll(p process) *cobra.Command {
	var newRoot, finish bool
	var keyFile string
	cmd := &cobra.Command{
		Use:   "roll [device|https|internal]",
		Short: "Roll an authority over to new keys",
		Long: "roll makes a new issuing key and its certificate under the same root; it signs from then on. What the former one has signed is\n" +
			"good until it ends, or until the former one is retired.\n\n" +
			"With --root it makes a new root beside the one in use. It is given out and believed, and nothing is signed under it until --finish,\n" +
			"so that devices can learn it before it matters.",
		Example:   "  coaphub ca roll\n  coaphub ca roll --root-key root-key.pem\n  coaphub ca roll --root\n  coaphub ca roll --finish",
		Args:      between(0, 1),
		ValidArgs: whichRoots,
		RunE: func(cmd *cobra.Command, args []string) error {
			q := bundle.RollRequest{Which: whichRoot(args), Step: "issuing"}
			switch {
			case newRoot && finish:
				return usage("--root and --finish are two steps, and devices need time between")
			case newRoot:
				q.Step = "root"
			case finish:
				q.Step = "finish"
			}
			var err error
			if q.RootKey, err = readRootKey(keyFile); err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			as, err := c.Roll(cmd.Context(), q)
			return printAuthorities(p, as, err)
		},
	}
	cmd.Flags().BoolVar(&newRoot, "root", false, "make a new root, and only announce it")
	cmd.Flags().BoolVar(&finish, "finish", false, "sign under the new root from now on")
	rootKeyFlag(cmd, &keyFile)
	return cmd
}

func rootKeyFlag(cmd *cobra.Command, file *string) {
	cmd.Flags().StringVar(file, "root-key", "", "what coaphub ca export-root has written, when the root's key is not in the data folder")
}

// readRootKey reads the file of --root-key, if there is one.
func readRootKey(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the root's key: %w", err)
	}
	return string(text), nil
}

func newCARenewList(p process) *cobra.Command {
	var keyFile string
	cmd := &cobra.Command{
		Use:   "renew-list [device|https|internal]",
		Short: "Sign a root's revocation list anew",
		Long: "renew-list makes the list of the issuing certificates that were retired anew, good for a year. While the root's key is in the data\n" +
			"folder the hub does that itself; else it warns in its log when the list ends within 30 days, or lacks what was retired meanwhile.",
		Example:   "  coaphub ca renew-list --root-key root-key.pem",
		Args:      between(0, 1),
		ValidArgs: whichRoots,
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := readRootKey(keyFile)
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			as, err := c.Roll(cmd.Context(), bundle.RollRequest{Which: whichRoot(args), Step: "list", RootKey: key})
			return printAuthorities(p, as, err)
		},
	}
	rootKeyFlag(cmd, &keyFile)
	return cmd
}

func newCARetire(p process) *cobra.Command {
	var keyFile string
	cmd := &cobra.Command{
		Use:   "retire ID",
		Short: "End the belief in a root or an issuing certificate: nobody comes in with what it has signed",
		Long: "retire ends the belief in an issuing certificate that another has taken the place of, or in a root with all that issues under it.\n" +
			"Sessions that stand on what it has signed end, and its key is destroyed. It cannot be taken back.\n\n" +
			"An issuing certificate is put on the revocation list of its root, too, for those who verify devices besides the hub. That needs the\n" +
			"root's key. If it is far away, retire without it: the hub believes nothing of it from then on, and the list has it with renew-list.",
		Example: "  coaphub ca retire ID\n  coaphub ca retire ID --root-key root-key.pem",
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, err := readRootKey(keyFile)
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			as, err := c.Retire(cmd.Context(), args[0], key)
			return printAuthorities(p, as, err)
		},
	}
	rootKeyFlag(cmd, &keyFile)
	return cmd
}

func printAuthorities(p process, as []bundle.AuthorityPart, err error) error {
	if err != nil {
		return err
	}
	t := newTable(p.out, "ROOT", "KIND", "ID", "SINCE", "UNTIL", "STATE", "KEY", "LIST UNTIL")
	for _, a := range as {
		key, list := "-", "-"
		if a.Key {
			key = "here"
		}
		switch {
		case a.ListUntil != nil:
			list = a.ListUntil.Local().Format(time.DateOnly)
		case a.Kind == "issuing" && a.Key:
			list = "always" // it is made when somebody asks
		}
		if a.ListLacks > 0 {
			list += ", lacks " + strconv.Itoa(a.ListLacks)
		}
		t.row(a.Root, a.Kind, a.ID, a.Since.Local().Format(time.DateOnly), a.Until.Local().Format(time.DateOnly), a.State, key, list)
	}
	if err := t.finish(p.err, nil); err != nil {
		return err
	}
	for _, a := range as {
		if a.ListLacks > 0 {
			_, _ = fmt.Fprintf(p.err, "warning: the revocation list of the %s root %s lacks what was retired (%d): this hub believes none of it, but who goes by "+
				"that list does.\nBring the root's key: coaphub ca renew-list %s --root-key FILE\n", a.Root, a.ID, a.ListLacks, a.Root)
		}
	}
	return nil
}

func newCAExport(p process) *cobra.Command {
	var out string
	var remove bool
	cmd := &cobra.Command{
		Use:   "export-root [device|https|internal] --out FILE",
		Short: "Write a root's certificate and private key into a file, to be kept offline",
		Long: "export-root writes a root's certificate and private key, PEM, into a new file. Whoever has it can make himself every device, and the\n" +
			"hub: keep it where nobody gets at it. With --remove the key leaves the data folder once the file was written and read back. The hub\n" +
			"goes on without; roll and, once a year and after retire, renew-list need it (--root-key FILE).",
		Args:      between(0, 1),
		ValidArgs: whichRoots,
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usage("--out is needed")
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			which := whichRoot(args)
			f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) // first: what is there is never written over
			if err != nil {
				return fmt.Errorf("write the root's key: %w", err)
			}
			text, err := c.RootKeys(cmd.Context(), which)
			if err == nil {
				_, err = io.WriteString(f, text)
			}
			if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
				_ = os.Remove(out)
				return err
			}
			if err := syncFolder(filepath.Dir(out)); err != nil {
				return err
			}
			safe, err := os.ReadFile(out)
			if err != nil {
				return fmt.Errorf("read the root's key back: %w", err)
			}
			if string(safe) != text {
				return fmt.Errorf("read the root's key back: %s is not what was written", out)
			}
			if _, err := fmt.Fprintf(p.out, "wrote the %s root and its key to %s\n", which, out); err != nil || !remove {
				return err
			}
			if err := c.ForgetRootKeys(cmd.Context(), which, string(safe)); err != nil {
				return err
			}
			_, err = fmt.Fprintln(p.out, "the key is not in the data folder any more; copies of the folder, and its disk's free space, may still have it")
			return err
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "the file, which must not exist")
	cmd.Flags().BoolVar(&remove, "remove", false, "then take the key out of the data folder")
	return cmd
}

// syncFolder puts on the disk that a folder has a new file.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// makeFolder makes a folder for secrets, or sees that it can be written: before there is anything that would be lost.
func makeFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the folder: %w", err)
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("write to the folder %s: %w", dir, err)
	}
	return nil
}

// writeIdentity writes a device's three files; the key is readable by its owner only. ca.pem has the issuing certificate after
// the root: libcoap with OpenSSL sends only the first certificate of cert.pem, and completes the chain from what it trusts.
func writeIdentity(dir string, id bundle.Identity) error {
	_, issuing := pem.Decode([]byte(id.Chain))
	for _, f := range []struct {
		name, text string
		mode       os.FileMode
	}{{"cert.pem", id.Chain, 0o644}, {"key.pem", id.Key, 0o600}, {"ca.pem", id.CA + string(issuing), 0o644}} {
		if err := writeFile(filepath.Join(dir, f.name), []byte(f.text), f.mode); err != nil {
			return err
		}
	}
	return nil
}

// writeFile puts a file in place in one step, also if power fails: one that was there may have another mode, and others may have it
// open.
func writeFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
