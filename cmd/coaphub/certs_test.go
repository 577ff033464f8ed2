package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/hubtest"
)

// The operator finds a certificate, looks at it, and revokes it; openssl's way to write a serial number will do.
func TestCerts(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	on("certs", "list").want(t, 0, "^SERIAL .*\n$", "there is no certificate")
	on("certs", "report").want(t, 0, "^good 0  ended 0  revoked 0  end within 30d 0  shared keys 0\n$", "^$")
	h.Onboard(t, lamp)
	on("ca", "issue", "--device-id", lamp, "--out", t.TempDir(), "--validity", "10d").want(t, 0, "wrote", "^$")
	on("certs", "list", "--device-id", lamp).want(t, 0, lamp+" +admin +operator", "^$")
	on("certs", "list", "--device-id", fan).want(t, 0, "^SERIAL .*\n$", "there is no certificate")
	on("certs", "report").want(t, 0, "^good 2 .* end within 30d 0 ", "^$") // the device has another one
	var cs []bundle.Certificate
	if err := json.Unmarshal([]byte(on("certs", "list", "--json", "--owner", "admin").out), &cs); err != nil || len(cs) != 1 || cs[0].PEM != "" {
		t.Fatalf("%+v, %v", cs, err)
	}
	serial := cs[0].Serial
	on("certs", "show", serial).want(t, 0, "(?s)"+serial+".*good\n-----BEGIN CERTIFICATE-----\n", "^$")
	on("certs", "show", "abcd").want(t, exitFailure, "^$", "certificate-unknown")
	for args, err := range map[string]string{
		"certs revoke":                         "name certificates, or a device",
		"certs revoke xyz":                     `"xyz" is no serial number`,
		"certs revoke " + serial + " --json x": `"x" is no serial number`,
		"certs report --within soon":           "--within: a time is needed",
		"certs show":                           "an argument is missing",
	} {
		runs(t, append(strings.Fields(args), "--data", h.Data)...).want(t, exitUsage, "^$", err)
	}
	on("certs", "revoke", serial, "--reason", "boredom").want(t, exitFailure, "^$", "reason-unknown")
	on("certs", "revoke", "00:"+strings.ToUpper(serial), "--reason", "keyCompromise").want(t, 0, serial+" .*revoked .*keyCompromise\n", "^$")
	on("certs", "revoke", serial).want(t, 0, serial+" .*revoked .*keyCompromise\n", "^$")
	on("certs", "revoke", "--device-id", fan).want(t, exitFailure, "^$", "none of these certificates was good")
	on("certs", "report").want(t, 0, "^good 1  ended 0  revoked 1  end within 30d 1  (?s).*ends soon +"+lamp, "^$")
	on("certs", "revoke", "--device-id", lamp, "--json").want(t, 0, `"reason": "unspecified"`, "^$")
}
