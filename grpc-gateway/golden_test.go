package grpcgateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "write the answers into the golden files")

// The answers of all reads, in simple JSON and in that of protobuf, are in testdata/json.golden and testdata/protojson.golden:
// a change of either form shows as a difference there. White space and the order of fields are nobody's contract.
func TestGoldenForms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	history(w)
	const device = "/api/v1/devices/" + string(lampA)
	for _, form := range []struct{ file, accept string }{
		{"testdata/json.golden", "application/json"}, {"testdata/protojson.golden", "application/protojson"},
	} {
		var got bytes.Buffer
		for _, path := range []string{
			"/api/v1/devices", device, device + "?twin=true", "/api/v1/resource-links", device + "/resource-links", "/api/v1/resources",
			device + "/resources", light, light + "?onlyContent=true", "/api/v1/devices-metadata", "/api/v1/events",
			device + "/events", light + "/events", "/api/v1/pending-commands", device + "/labels", "/api/v1/things", "/api/v1/things/" + string(lampA),
			"/api/v1/devices/" + string(unknown), light + "/nothing", "/api/v1/resources?typeFilter=none",
		} {
			a := w.get(t, path, "Accept: "+form.accept)
			fmt.Fprintf(&got, "GET %s  -> %d %s\n", path, a.Code, a.Header().Get("Content-Type"))
			d := json.NewDecoder(a.Body)
			d.UseNumber()
			for {
				var v any
				if err := d.Decode(&v); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				b, err := json.MarshalIndent(v, "", "  ")
				if err != nil {
					t.Fatal(err)
				}
				got.Write(append(b, '\n'))
			}
		}
		if *update {
			if err := os.WriteFile(form.file, got.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(form.file)
		if err != nil {
			t.Fatal(err)
		}
		at := 0
		for a, b := bytes.Split(got.Bytes(), []byte("\n")), bytes.Split(want, []byte("\n")); at < len(a) || at < len(b); at++ {
			if at >= len(a) || at >= len(b) || !bytes.Equal(a[at], b[at]) {
				t.Errorf("%s: line %d differs (go test -run TestGoldenForms -update writes it; git diff shows what changed):\ngot  %s\nwant %s",
					form.file, at+1, bytes.Join(a[min(at, len(a)):min(at+3, len(a))], []byte("\n")), bytes.Join(b[min(at, len(b)):min(at+3, len(b))], []byte("\n")))
				break
			}
		}
	}
}
