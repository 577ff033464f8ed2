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

// The operator disables a device, enables it, removes it, and lets it come again.
func TestDeviceAccess(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	on("devices", "disable", lamp).want(t, exitFailure, "^$", "device-not-owned")
	on("devices", "disable", "lamp").want(t, exitUsage, "^$", `"lamp" is not a device ID`)
	_, stop := h.Device(t, lamp, "lamp")
	eventually(t, "the device", func() bool { return strings.Contains(on("devices").out, lamp) })
	on("devices", "access", lamp).want(t, 0, "access +admitted\n$", "^$")
	on("devices", "disable", lamp, "--reason", "stolen").want(t, 0, "access +disabled\nby .*\nreason +stolen\nsince ", "^$")
	eventually(t, "its end", func() bool { return strings.Contains(on("status", "--device", lamp).out, "device-disabled") })
	eventually(t, "a refusal", func() bool { return strings.Contains(on("status", "--refused").out, "the device is disabled") })
	on("set", lamp, "/light/1", "{}").want(t, exitFailure, "^$", "device-disabled")
	on("get", lamp, "/light/1").want(t, 0, "power", "^$")
	on("devices", "enable", lamp, "--json").want(t, 0, `"state": "admitted"`, "^$")
	eventually(t, "it to be back", func() bool { return strings.Contains(on("status", "--device", lamp).out, "online") })
	on("devices", "quarantine", "list").want(t, 0, "^DEVICE .*\n$", "no device is in quarantine")
	on("devices", "quarantine", "add", lamp, "--reason", "a copy").want(t, 0, "access +quarantined\nby .*\nreason +a copy\nsince ", "^$")
	eventually(t, "what it says", func() bool {
		return strings.Contains(on("devices", "quarantine", "show", lamp).out, `"power"`)
	})
	on("devices", "quarantine", "show", lamp).want(t, 0, `(?s)^TIME .*coaps\+tcp://127.0.0.1:\d+ +certificate [0-9a-f]{64} +signed-in.* changed +/light/1 +.*"power"`, "^$")
	on("devices", "quarantine", "show", lamp, "--json").want(t, 0, `(?s)"kind": "changed".*"dropped": 0`, "^$")
	on("devices", "quarantine", "list").want(t, 0, lamp+" +quarantined +.*a copy", "^$")
	on("status", "--device", lamp).want(t, 0, "quarantine +what it writes is kept apart", "^$")
	on("set", lamp, "/light/1", "{}").want(t, exitFailure, "^$", "device-quarantined")
	on("devices", "enable", lamp).want(t, 0, "access +admitted\n$", "^$")
	on("devices", "quarantine", "show", lamp).want(t, 0, "^TIME .*\n$", "nothing is kept")
	eventually(t, "it to be back once more", func() bool {
		out := on("status", "--device", lamp).out
		return strings.Contains(out, "online") && !strings.Contains(out, "kept apart") // why its last session ended says quarantine, too
	})
	on("devices", "remove", lamp, "--json").want(t, 0, `"state": "removed"`, "^$")
	stop()
	on("ca", "issue", "--device-id", lamp, "--out", t.TempDir()).want(t, exitFailure, "^$", "device-removed")
	on("devices", "enable", lamp).want(t, 0, "access +admitted\n$", "^$")
	on("devices", "enable", lamp).want(t, exitFailure, "^$", "device-not-owned")
	on("ca", "issue", "--device-id", lamp, "--out", t.TempDir()).want(t, 0, "wrote", "^$")
	on("audit").want(t, 0, "POST /devices/disable +"+lamp, "^$")
}

// Keys and CAs are named by a file with a certificate, or by a hash as other programs print it.
func TestDeny(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	on("deny", "list").want(t, 0, "^WHAT .*\n$", "nothing is denied")
	dir := t.TempDir()
	on("ca", "issue", "--device-id", lamp, "--out", dir).want(t, 0, "wrote", "^$")
	cert, ca := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "ca.pem")
	on("deny", "add", "device", lamp, "--reason", "stolen, case 42", "--for", "30d").want(t, 0, "device +"+lamp+" .*stolen, case 42", "^$")
	on("deny", "add", "key", cert).want(t, 0, "key +[0-9a-f]{64} ", "^$")
	on("deny", "add", "certificate", cert).want(t, 0, "certificate +[0-9a-f]{64} ", "^$")
	on("deny", "add", "certificate", "0A:0B", "--issuer", ca).want(t, 0, "certificate +[0-9a-f]{64}/0a0b ", "^$")
	on("deny", "add", "ca", strings.Repeat("AB:", 31)+"AB").want(t, 0, "ca +(ab){32} ", "^$")
	var ds []bundle.Denial
	if err := json.Unmarshal([]byte(on("deny", "list", "--json").out), &ds); err != nil || len(ds) != 5 || ds[3].Until.IsZero() || !ds[4].Until.IsZero() {
		t.Errorf("%+v, %v", ds, err)
	}
	on("deny", "remove", "key", cert).want(t, 0, "^$", "^$")
	on("deny", "remove", "key", cert).want(t, exitFailure, "^$", "denial-unknown")
	on("audit").want(t, 0, "POST /deny +device "+lamp, "^$")
	empty := filepath.Join(dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"deny add owner alice":                      "what can be denied",
		"deny add key 00":                           "no SHA-256",
		"deny add key " + empty:                     "holds no certificate",
		"deny add device " + lamp + " --for soon":   "--for: a time is needed",
		"deny add ca":                               "an argument is missing",
		"deny add certificate xyz --issuer " + ca:   "no serial number",
		"deny add certificate 0a --issuer /nowhere": "no such file",
	} {
		runs(t, append(strings.Fields(args), "--data", h.Data)...).want(t, exitUsage, "^$", want)
	}
}
