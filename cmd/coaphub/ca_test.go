package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/hubtest"
)

// The operator takes the root's key away, rolls the authority over with it and without, and retires what was before.
func TestCA(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args string) result { return runs(t, append(strings.Fields(args), "--data", h.Data)...) }
	nextYear := "20[0-9-]{8}" // until when a list is good
	keys := filepath.Join(t.TempDir(), "root-key.pem")
	inFolder := func() bool {
		b, err := os.ReadFile(filepath.Join(h.Data, "keys", "device-root.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(b), "PRIVATE KEY")
	}
	parts := func() (out []string, ids map[string]string) {
		var all []bundle.AuthorityPart
		if err := json.Unmarshal([]byte(on("ca list --json").out), &all); err != nil {
			t.Fatal(err)
		}
		ids = map[string]string{}
		for _, p := range all {
			if p.Root == "device" {
				out = append(out, p.Kind+" "+p.State)
				ids[p.Kind+" "+p.State] = p.ID
			}
		}
		return out, ids
	}

	for args, err := range map[string]string{
		"ca export-root":                    "--out is needed",
		"ca roll --root --finish":           "two steps",
		"ca retire":                         "an argument is missing",
		"ca export-root device https":       "argument",
		"ca roll --root-key x device https": "argument",
	} {
		on(args).want(t, exitUsage, "^$", err)
	}
	on("ca roll --finish").want(t, exitFailure, "^$", "roll-not-begun")
	on("ca roll lamp").want(t, exitFailure, "^$", "root-unknown")
	on("ca retire lamp").want(t, exitFailure, "^$", "issuer-unknown")
	on("ca export-root lamp --out "+keys).want(t, exitFailure, "^$", "root-unknown")
	if _, err := os.Stat(keys); !os.IsNotExist(err) {
		t.Fatal("an export that failed leaves a file")
	}

	on("ca export-root --out "+keys).want(t, 0, "^wrote the device root and its key to "+keys+"\n$", "^$")
	text, err := os.ReadFile(keys)
	if err != nil || !inFolder() {
		t.Fatalf("%v; the key is in the folder: %t", err, inFolder())
	}
	if info, err := os.Stat(keys); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	on("ca export-root --remove --out "+keys).want(t, exitFailure, "^$", "exists")
	if again, err := os.ReadFile(keys); err != nil || string(again) != string(text) || !inFolder() {
		t.Errorf("%v; it was written over: %t; the key is in the folder: %t", err, string(again) != string(text), inFolder())
	}
	on("ca export-root --remove --out "+keys+".2").want(t, 0, "(?s)^wrote .*the key is not in the data folder any more", "^$")
	if again, err := os.ReadFile(keys + ".2"); err != nil || string(again) != string(text) || inFolder() {
		t.Errorf("%v; the second differs: %t; the key is in the folder: %t", err, string(again) != string(text), inFolder())
	}
	on("ca export-root --out "+keys+".3").want(t, exitFailure, "^$", "root-key-missing")

	h.Onboard(t, lamp)
	on("ca roll").want(t, exitFailure, "^$", "--root-key.*root-key-missing")
	on("ca roll --root-key "+keys+".4").want(t, exitFailure, "^$", "no such file")
	on("ca roll --root-key "+keys).want(t, 0, "(?m)^ROOT +KIND +ID +SINCE +UNTIL +STATE +KEY +LIST UNTIL\ndevice +root +.* in use +- +"+nextYear+"\ndevice +issuing .* believed +here +always\ndevice +issuing .* in use +here +always\n", "^$")
	_, former := parts()
	on("ca retire --root-key "+keys+".4 "+former["issuing believed"]).want(t, exitFailure, "^$", "no such file")
	lacks := "^warning: the revocation list of the device root " + former["root in use"] + " lacks what was retired \\(1\\).*\n" +
		"Bring the root's key: coaphub ca renew-list device --root-key FILE\n$"
	for _, args := range []string{"ca retire " + former["issuing believed"], "ca list"} {
		on(args).want(t, 0, "(?m)^device +root .* in use +- +"+nextYear+", lacks 1\ndevice +issuing .* retired +- +-$", lacks)
	}
	on("ca renew-list").want(t, exitFailure, "^$", "--root-key.*root-key-missing")
	on("ca renew-list device --root-key "+keys).want(t, 0, "(?m)^device +root .* in use +- +"+nextYear+"\n", "^$")
	on("ca roll --root-key "+keys).want(t, 0, "^ROOT ", "^$")
	_, former = parts()
	on("ca retire --root-key "+keys+" "+former["issuing believed"]).want(t, 0, "(?m)^device +issuing .* retired +- +-\ndevice .* in use +here +always$", "^$")
	root := on("ca root").out
	on("ca roll --root --root-key "+keys).want(t, 0, "announced +here +"+nextYear, "^$")
	if both := on("ca root").out; !strings.HasPrefix(both, root) || strings.Count(both, "BEGIN CERTIFICATE") != 2 {
		t.Errorf("the roots are %s", both)
	}
	on("ca roll --finish").want(t, 0, "(?m)^device +root .* believed +- +"+nextYear+"$", "^$")
	got, ids := parts()
	if want := "root believed, issuing retired, issuing retired, issuing believed, root in use, issuing in use"; strings.Join(got, ", ") != want {
		t.Errorf("there are %q, want %q", got, want)
	}
	on("ca retire "+ids["root in use"]).want(t, exitFailure, "^$", "issuer-in-use")
	h.Restart(t)
	on("ca retire "+ids["root believed"]).want(t, 0, "(?m)^device +root .* retired +- +"+nextYear+"$", "^$")
	if after := on("ca root").out; after == root || strings.Count(after, "BEGIN CERTIFICATE") != 1 {
		t.Errorf("the root is %s", after)
	}
	if log := h.Log(); strings.Contains(log, "PRIVATE") {
		t.Error("the log has a key")
	}
	h.Onboard(t, lamp)
}
