package main

import (
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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
		Long:      "root prints a root certificate as PEM: of the devices' side (default), of HTTPS, or of the inside.",
		Args:      between(0, 1),
		ValidArgs: []string{"device", "https", "internal"},
		RunE: func(cmd *cobra.Command, args []string) error {
			which := "device"
			if len(args) == 1 {
				which = args[0]
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			pem, err := c.Root(cmd.Context(), which)
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
	return group("ca", "The hub's own certification authorities", root, issue)
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

// writeFile puts a file in place in one step: one that was there may have another mode, and others may have it open.
func writeFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
