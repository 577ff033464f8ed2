package grpcgateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

var update = flag.Bool("update", false, "write the answers into the golden files")

// forms are the two forms of JSON, each with its prefix of the golden files.
var forms = []struct{ file, accept string }{{"json", "application/json"}, {"protojson", "application/protojson"}}

// golden is what is compared with a golden file. White space and the order of fields are nobody's contract.
type golden struct {
	t testing.TB
	bytes.Buffer
}

// add writes a line of its own, and then each document as JSON that people can read.
func (g *golden) add(docs io.Reader, line string, args ...any) {
	g.t.Helper()
	fmt.Fprintf(g, line+"\n", args...)
	d := json.NewDecoder(docs)
	d.UseNumber()
	for {
		var v any
		if err := d.Decode(&v); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			g.t.Fatalf(line+": %v", append(args, err)...)
		}
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			g.t.Fatal(err)
		}
		g.Write(append(b, '\n'))
	}
}

// compare compares with the file, or writes it.
func (g *golden) compare(file string) {
	g.t.Helper()
	file = "testdata/" + file + ".golden"
	if *update {
		if err := os.WriteFile(file, g.Bytes(), 0o600); err != nil {
			g.t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		g.t.Fatal(err)
	}
	at := 0
	for a, b := bytes.Split(g.Bytes(), []byte("\n")), bytes.Split(want, []byte("\n")); at < len(a) || at < len(b); at++ {
		if at >= len(a) || at >= len(b) || !bytes.Equal(a[at], b[at]) {
			g.t.Errorf("%s: line %d differs (go test -run TestGolden -update writes it; git diff shows what changed):\ngot  %s\nwant %s",
				file, at+1, bytes.Join(a[min(at, len(a)):min(at+3, len(a))], []byte("\n")), bytes.Join(b[min(at, len(b)):min(at+3, len(b))], []byte("\n")))
			return
		}
	}
}

// The answers of all reads, in simple JSON and in that of protobuf, are in testdata/json.golden and testdata/protojson.golden:
// a change of either form shows as a difference there.
func TestGoldenForms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	history(w)
	const device = "/api/v1/devices/" + string(lampA)
	for _, form := range forms {
		got := golden{t: t}
		for _, path := range []string{
			"/api/v1/devices", device, device + "?twin=true", "/api/v1/resource-links", device + "/resource-links", "/api/v1/resources",
			device + "/resources", light, light + "?onlyContent=true", "/api/v1/devices-metadata", "/api/v1/events",
			device + "/events", light + "/events", "/api/v1/pending-commands", device + "/labels", "/api/v1/things", "/api/v1/things/" + string(lampA),
			"/api/v1/devices/" + string(unknown), light + "/nothing", "/api/v1/resources?typeFilter=none",
		} {
			a := w.get(t, path, "Accept: "+form.accept)
			got.add(a.Body, "GET %s  -> %d %s", path, a.Code, a.Header().Get("Content-Type"))
		}
		got.compare(form.file)
	}
}

// What a command is answered, well or not, and what the lists show of commands, is in testdata/json-commands.golden and
// testdata/protojson-commands.golden.
func TestGoldenCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.pendings()
	for i := range w.pictures[lampA].Commands {
		if c := &w.pictures[lampA].Commands[i]; c.ValidUntil > 1 {
			c.ValidUntil = 1<<63 - 1 // it waits whenever this runs
		}
	}
	w.commits[lampB] = []hub.Commit{{Device: lampB, Seq: 1, Time: t0, Owner: alice, Events: commandEvents(w)}}
	well := w.outcome
	for _, form := range forms {
		got := golden{t: t}
		ask := func(method, path, body string) {
			t.Helper()
			a := w.ask(t, "alice", method, path, strings.NewReader(body), "Accept: "+form.accept, "Content-Type: application/json")
			got.add(a.Body, "%s %s %s  -> %d %s", method, path, body, a.Code, a.Header().Get("Content-Type"))
		}
		all := func() {
			t.Helper()
			ask("PUT", light, `{"power":7}`)
			ask("POST", linkA, `{"power":7}`)
			ask("GET", light+"?twin=false", "")
			ask("DELETE", linkA, "")
			ask("PUT", devA+"/metadata", `{"twinEnabled":false}`)
			ask("PUT", devA+"/metadata", `{"twinForceSynchronization":true}`)
		}
		w.outcome = well
		all()
		ask("PUT", light+"?onlyContent=true", `{"power":7}`)
		ask("GET", light+"?twin=false&onlyContent=true", "")
		for _, c := range [][2]string{{"PUT", light}, {"POST", linkA}, {"DELETE", linkA}} {
			ask(c[0], c[1]+"?async=true", `{"power":7}`)
		}
		ask("GET", light+"?twin=false&async=true", "")
		w.outcome = func(o hub.Order) hub.Outcome {
			out := well(o)
			out.Status, out.Content, out.ETag = hub.StatusForbidden, hub.Content{Type: "text/plain; charset=utf-8", Data: []byte("device says no")}, nil
			return out
		}
		all()
		ask("PUT", "/api/v1/devices/"+string(bobs)+"/resources/light/1", `{"power":7}`)
		ask("GET", "/api/v1/pending-commands?includeHiddenResources=true", "")
		ask("DELETE", light+"/pending-commands", "")
		ask("DELETE", devA+"/pending-metadata-updates", "")
		ask("GET", "/api/v1/devices/"+string(lampB)+"/events", "")
		got.compare(form.file + "-commands")
	}
}

// What subscribers are told, an event of each kind and whatever else is said on a stream, is in testdata/json-stream.golden
// and testdata/protojson-stream.golden. The listener checks each message against the description, too.
func TestGoldenEvents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	d := w.pictures[lampA]
	link, _ := d.Links.Get("/oic/d")
	events := []hub.Event{
		{Kind: hub.Registered},
		{Kind: hub.MetadataUpdated, Metadata: &d.Metadata},
		{Kind: hub.LinksPublished, Links: []hub.Link{link}},
		{Kind: hub.ResourceChanged, Href: "/oic/d", Status: hub.StatusOK, Types: link.Types, Content: ocf(map[string]any{"n": "lamp"}), ETag: []byte{1}},
		{Kind: hub.ResourceChanged, Href: "/gone", Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}},
		{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{"/gone"}},
	}
	events = append(append(events, commandEvents(w)...), hub.Event{Kind: hub.Unregistered})
	told := 0
	for i := range events {
		ev := &events[i]
		ev.Version, ev.Message, ev.User, ev.Connection = uint64(i), 9, "alice-sub", "conn-1"
		if _, ok := subscribables[kindOfEvent(ev)]; ok {
			told++
		}
	}
	for _, form := range forms {
		got, seen := golden{t: t}, map[string]bool{}
		l := w.listen(t, "alice", "?accept="+form.accept)
		sub := "none yet"
		say := func(message string) {
			t.Helper()
			l.say("%s", message)
			got.add(strings.NewReader(""), "says %s", strings.ReplaceAll(message, sub, "SUBSCRIPTIONID"))
		}
		hear := func() {
			t.Helper()
			var m map[string]map[string]any
			d := json.NewDecoder(bytes.NewReader(l.raw()))
			d.UseNumber()
			if err := d.Decode(&m); err != nil {
				t.Fatal(err)
			}
			r := m["result"]
			for member := range r {
				seen[member] = true
			}
			for _, own := range []string{"subscriptionId", "resumeToken"} { // another one each time
				if v, ok := r[own].(string); ok && v != "" {
					if own == "subscriptionId" {
						sub = v
					}
					r[own] = strings.ToUpper(own)
				}
			}
			got.add(bytes.NewReader(bytesOf(t, m)), "hears")
		}
		say(`{"createSubscription":{},"correlationId":"golden"}`)
		hear()
		w.directory.happen(lampA, events...)
		for range told {
			hear()
		}
		say(fmt.Sprintf(`{"cancelSubscription":{"subscriptionId":%q},"correlationId":"end"}`, sub))
		hear()
		hear()
		say(`{"createSubscription":{"deviceIdFilter":["abc"]},"correlationId":"wrong"}`)
		hear()
		say(`nonsense`)
		hear()
		got.compare(form.file + "-stream")
		for api := range pb.SubscribeToEvents_CreateSubscription_Event_name {
			for _, k := range subscribables {
				if k.api == apiKind(api) && !seen[k.member] {
					t.Errorf("%s: %v was not told", form.file, k.api)
				}
			}
		}
	}
}
