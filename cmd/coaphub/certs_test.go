package main

import (
	"encoding/csv"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/hubtest"
)

// The operator finds a certificate, looks at it, and revokes it; openssl's way to write a serial number will do.
func TestCerts(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	on("certs", "list").want(t, 0, "^SERIAL .*\n$", "there is no certificate")
	on("certs", "report").want(t, 0, "^good 0  ended 0  revoked 0  end within 30d 0  shared keys 0  weak keys 0\n$", "^$")
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

// The ledger is searched by what it has of a certificate, and goes out whole for other programs.
func TestCertsSearchAndExport(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args string) result { return runs(t, append(strings.Fields(args), "--data", h.Data)...) }
	h.Onboard(t, lamp)
	h.Onboard(t, fan)
	on("certs revoke --device-id "+fan+" --reason superseded").want(t, 0, fan, "^$")
	all := strings.Count(on("certs list").out, "\n") - 1
	for args, want := range map[string]int{
		"":                                   all,
		"--name uuid:" + lamp:                1,
		"--name " + lamp:                     0,
		"--device-id " + fan:                 all - 1,
		"--method operator":                  all,
		"--method csr":                       0,
		"--state good":                       1,
		"--state revoked":                    all - 1,
		"--state ended":                      0,
		"--since 1h":                         all,
		"--until 1h":                         0,
		"--since 2100-01-01T00:00:00Z":       0,
		"--until 2100-01-01T00:00:00Z":       all,
		"--since 1h --state good":            1,
		"--name uuid:" + lamp + " --owner x": 0,
	} {
		if got := strings.Count(on("certs list "+args).out, "\n") - 1; got != want {
			t.Errorf("list %s: %d, want %d", args, got, want)
		}
		lines := on("certs export " + args)
		lines.want(t, 0, "", "^$")
		n := 0
		for dec := json.NewDecoder(strings.NewReader(lines.out)); dec.More(); n++ {
			var c bundle.Certificate
			if err := dec.Decode(&c); err != nil || c.Serial == "" || c.PEM != "" || c.Name != "uuid:"+c.DeviceID {
				t.Fatalf("export %s: %+v, %v", args, c, err)
			}
		}
		if n != want || strings.Count(lines.out, "\n") != want {
			t.Errorf("export %s: %d in %d lines, want %d", args, n, strings.Count(lines.out, "\n"), want)
		}
	}
	rows, err := csv.NewReader(strings.NewReader(on("certs export --format csv --pem --name uuid:" + fan).out)).ReadAll()
	if err != nil || len(rows) != 2 || len(rows[0]) != len(rows[1]) {
		t.Fatalf("%q, %v", rows, err)
	}
	row := map[string]string{}
	for i, head := range rows[0] {
		row[head] = rows[1][i]
	}
	if row["deviceId"] != fan || row["reason"] != "superseded" || row["requestMethod"] != "operator" || !strings.HasPrefix(row["pem"], "-----BEGIN CERTIFICATE-----\n") {
		t.Errorf("the row is %q", row)
	}
	if _, err := time.Parse(time.RFC3339, row["revoked"]); err != nil {
		t.Error(err)
	}
	for args, err := range map[string]string{
		"certs export --format xml":      "jsonl or csv",
		"certs list --since soon":        "--since: ",
		"certs export --until yesterday": "--until: ",
	} {
		on(args).want(t, exitUsage, "^$", err)
	}
	_, err = h.Control.RevokeCertificates(t.Context(), bundle.CertificatesRequest{DeviceID: lamp, State: "revoked"})
	if code, _ := hub.Public(err); code != "filter-invalid" {
		t.Errorf("a revocation that looks for something: %v", err)
	}
	on("certs list --state lost").want(t, exitFailure, "^$", "state-unknown")
	on("certs export --state lost").want(t, exitFailure, "^$", "state-unknown")
}

// An export that ends before its end is an error, and has what came before.
func TestExportCutShort(t *testing.T) {
	t.Parallel()
	for _, format := range []string{"jsonl", "csv"} {
		var out strings.Builder
		err := exportCertificates(&out, func(yield func(bundle.Certificate, error) bool) {
			if yield(bundle.Certificate{Serial: "0a"}, nil) {
				yield(bundle.Certificate{}, errors.New("the disk"))
			}
		}, format, false)
		if err == nil || !strings.Contains(out.String(), "0a") {
			t.Errorf("%s: %v, %q", format, err, out.String())
		}
	}
}
