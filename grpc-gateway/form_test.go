package grpcgateway

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// simple makes the simple form of protobuf's JSON the slow way: contents inlined, then everything empty left out.
func simple(t testing.TB, v any) any {
	switch v := v.(type) {
	case map[string]any:
		if ct, ok := v["contentType"].(string); ok && v["data"] != nil && v["coapContentFormat"] != nil {
			data, err := base64.StdEncoding.DecodeString(v["data"].(string))
			if err != nil {
				t.Fatal(err)
			}
			if out, ok := appendDecoded(nil, hub.Content{Type: ct, Data: data}); ok {
				var content any
				d := json.NewDecoder(bytes.NewReader(out))
				d.UseNumber()
				if err := d.Decode(&content); err != nil {
					t.Fatal(err)
				}
				return content // nothing is left out inside of it
			}
		}
		out := map[string]any{}
		for k, m := range v {
			s := simple(t, m)
			switch e := s.(type) {
			case nil:
				continue
			case string:
				if e == "" {
					continue
				}
			case []any:
				if len(e) == 0 {
					continue
				}
			case map[string]any:
				if len(e) == 0 && k != "content" {
					continue
				}
			}
			out[k] = s
		}
		return out
	case []any:
		for i := range v {
			v[i] = simple(t, v[i])
		}
	}
	return v
}

// Both forms say the same: the simple one, written directly, is what inlining and leaving out makes of protobuf's JSON.
func TestSimpleFormIsProtobufFormWithContentsInlined(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	history(w)
	d := w.pictures[lampA]
	d.Links = append(linkSet{}, d.Links.(linkSet)...)
	d.Links.(linkSet)[1] = hub.Link{Href: "/cbor"} // nothing but an href
	d.Resources = append(resourceSet{}, d.Resources.(resourceSet)...)
	d.Resources.(resourceSet)[1] = &hub.Resource{Href: "/cbor", Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}}
	for _, path := range []string{
		"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", "/api/v1/devices-metadata", "/api/v1/events",
		"/api/v1/devices?limit=1", "/api/v1/resources?limit=3", "/api/v1/events?limit=2",
		"/api/v1/devices/" + string(lampA), "/api/v1/devices/" + string(lampA) + "/resource-links", light,
	} {
		fast := strings.Split(w.get(t, path).Body.String(), "\n")
		slow := strings.Split(w.get(t, path, "Accept: application/protojson").Body.String(), "\n")
		if len(fast) != len(slow) {
			t.Errorf("%s: %d and %d lines", path, len(fast), len(slow))
			continue
		}
		for i := range fast {
			if fast[i] == "" && slow[i] == "" {
				continue
			}
			var v any
			dec := json.NewDecoder(strings.NewReader(slow[i]))
			dec.UseNumber()
			if err := dec.Decode(&v); err != nil {
				t.Fatal(err)
			}
			b, err := json.Marshal(simple(t, v))
			if err != nil {
				t.Fatal(err)
			}
			want(t, path, sameJSON(t, []byte(fast[i])), string(b))
		}
	}
}

func TestValidateNamesEachKey(t *testing.T) {
	if errs := Default().Validate(); len(errs) > 0 {
		t.Errorf("the default: %v", errs)
	}
	c := Config{API: APIConfig{HTTP: HTTPConfig{Address: "8080", Hosts: []string{"ok.example", "a:1", "", "*", "::1"}}, GRPC: GRPCConfig{Address: "x"}}}
	var all []string
	for _, err := range c.Validate() {
		key, _, _ := strings.Cut(err.Error(), ":")
		all = append(all, key)
	}
	wantList(t, "keys", all, "api.http.address", "api.grpc.address", "api.http.hosts[1]", "api.http.hosts[2]", "api.http.hosts[3]",
		"limits.headerTimeout", "limits.idleTimeout", "limits.stallTimeout", "limits.requestTimeout", "limits.maxWait",
		"limits.maxConnections", "limits.maxHeaderBytes", "limits.maxBodyBytes", "limits.maxStreams", "limits.maxRequests",
		"limits.ownerRequests")
	rate := Default()
	rate.Limits.OwnerRate = 5
	if errs := rate.Validate(); len(errs) != 1 || !strings.HasPrefix(errs[0].Error(), "limits.ownerBurst: ") {
		t.Errorf("a rate without a burst: %v", errs)
	}
}

// discard is an answer nobody reads.
type discard struct{ h http.Header }

func (d discard) Header() http.Header         { return d.h }
func (d discard) Write(b []byte) (int, error) { return len(b), nil }
func (d discard) WriteHeader(int)             {}

func BenchmarkTwinRead(b *testing.B) {
	w := newWorld(b)
	w.Gateway.log = slog.New(slog.DiscardHandler)
	for _, form := range []string{"application/json", "application/protojson"} {
		b.Run(form, func(b *testing.B) {
			r, err := http.NewRequestWithContext(b.Context(), "GET", "http://localhost"+light, nil)
			if err != nil {
				b.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer alice")
			r.Header.Set("Accept", form)
			h := w.HTTPHandler()
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(discard{http.Header{}}, r)
			}
		})
	}
	b.Run("encode", func(b *testing.B) {
		d := w.pictures[lampA]
		l, _ := d.Links.Get("/light/1")
		buf := make([]byte, 0, 4096)
		b.ReportAllocs()
		for b.Loop() {
			buf = w.twin(d, l, nil).appendJSON(buf[:0], "")
		}
	})
}

// BenchmarkFrame is an event of the feed as it goes to a WebSocket: to the first subscriber, and to each further one.
func BenchmarkFrame(b *testing.B) {
	w := newWorld(b)
	buf := make([]byte, 0, 4096)
	b.Run("first", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			t := w.reported()
			buf, _ = w.appendFrame(buf[:0], &t, false)
		}
	})
	b.Run("further", func(b *testing.B) {
		t := w.reported()
		b.ReportAllocs()
		for b.Loop() {
			buf, _ = w.appendFrame(buf[:0], &t, false)
		}
	})
}

// reported is a change of a light as a subscriber is told it, in a commit of its own.
func (w *world) reported() told {
	light, _ := w.pictures[lampA].Resources.Get("/light/1")
	c := &hub.Commit{Device: lampA, Seq: 5, Time: t0, Owner: alice, Generation: 1, Events: []hub.Event{{
		Kind: hub.ResourceChanged, Href: "/light/1", Version: 5, Status: hub.StatusOK, Content: light.Content, ETag: []byte{1}, Types: []string{"core.light"},
	}}}
	return told{sub: "s", token: "t", event: eventElement{c, 0, hubID}, shared: true}
}

// What one subscriber was told costs the others no memory.
func TestFurtherSubscribersCostNoAllocation(t *testing.T) {
	w := newWorld(t)
	m := w.reported()
	buf := make([]byte, 0, 4096)
	tell := func() { buf, _ = w.appendFrame(buf[:0], &m, false) }
	tell()
	if n := testing.AllocsPerRun(100, tell); n != 0 {
		t.Errorf("a frame that is known took %v allocations", n)
	}
}

func BenchmarkDeviceList(b *testing.B) {
	w := newWorld(b)
	d := w.pictures[lampA]
	b.ReportAllocs()
	buf := make([]byte, 0, 4096)
	for b.Loop() {
		e, _ := w.newDevice(d)
		buf = e.appendJSON(buf[:0], "")
	}
}
