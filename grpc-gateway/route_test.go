package grpcgateway

import (
	"net/url"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

func TestSplit(t *testing.T) {
	t.Parallel()
	const d = "/api/v1/devices/{deviceId}"
	for _, c := range []struct {
		path, template, device string
		href                   hub.Href
	}{
		{"/", "/", "", ""},
		{"", "/", "", ""},
		{"/api/v1/devices", "/api/v1/devices", "", ""},
		{"/api/v1/devices/", "/api/v1/devices", "", ""},
		{"/api/v1/devices//", "/api/v1/devices", "", ""},
		{"/api/v1/devices/x", d, "x", ""},
		{"/api/v1/devices/x%2Fy/", d, "x/y", ""},
		{"/api/v1/devices/x/resources/", d + "/resources", "x", ""},
		{"/api/v1/devices/x/resources/a", d + "/resources/{href}", "x", "/a"},
		{"/api/v1/devices/x/resources/a/b%20c/", d + "/resources/{href}", "x", "/a/b c"},
		{"/api/v1/devices/x/resources//a", d + "/resources/{href}", "x", "/a"},
		{"/api/v1/devices/x/resources/%2Fa%2Fb", d + "/resources/{href}", "x", "/a/b"},
		{"/api/v1/devices/x/resources/.well-known/wot", d + "/resources/{href}", "x", "/.well-known/wot"},
		{"/api/v1/devices/x/resources/a.b;c=d", d + "/resources/{href}", "x", "/a.b;c=d"},
		{"/api/v1/devices/x/resources/a/events", d + "/resources/{href}/events", "x", "/a"},
		{"/api/v1/devices/x/resources/a/b/events/", d + "/resources/{href}/events", "x", "/a/b"},
		{"/api/v1/devices/x/resources/events", d + "/resources/{href}", "x", "/events"},
		{"/api/v1/devices/x/resources/a/eventsource", d + "/resources/{href}", "x", "/a/eventsource"}, // others take it for events
		{"/api/v1/devices/x/resources/a%2Fevents", d + "/resources/{href}", "x", "/a/events"},
		{"/api/v1/devices/x/resources/a/%65vents", d + "/resources/{href}", "x", "/a/events"},
		{"/api/v1/devices/x/resources/a/events/events", d + "/resources/{href}/events", "x", "/a/events"},
		{"/api/v1/devices/x/resources/a/pending-commands", d + "/resources/{href}/pending-commands", "x", "/a"},
		{"/api/v1/devices/x/resources/a/pending-commands/c", d + "/resources/{href}/pending-commands/{correlationId}", "x", "/a"},
		{"/api/v1/devices/x/resources/pending-commands/c", d + "/resources/{href}", "x", "/pending-commands/c"},
		{"/api/v1/devices/x/resource-links/a/events", d + "/resource-links/{href}", "x", "/a/events"},
		{"/api/v1/devices/x/pending-metadata-updates/c", d + "/pending-metadata-updates/{correlationId}", "x", ""},
		{"/api/v1/devices/x/metadata", d + "/metadata", "x", ""},
		{"/api/v1/devices/x/metadata/y", "", "", ""},
		{"/api/v1/devices/x/y", "", "", ""},
		{"/api/v1/devices//resources", "", "", ""},
		{d, d, "{deviceId}", ""},
		{"/api/v1/nothing", "", "", ""},
		{"/api/v1/devicesx", "", "", ""},
		{"*", "", "", ""},
	} {
		template, v, err := split(c.path)
		if err != nil {
			t.Errorf("%s: %v", c.path, err)
		}
		want(t, c.path, template, c.template)
		if c.template != "" {
			id := ""
			if strings.HasSuffix(c.template, "/{correlationId}") {
				id = "c"
			}
			want(t, c.path, v, vars{device: c.device, href: c.href, correlation: id})
		}
	}
	for _, path := range []string{"/a/../b", "/%2e%2e", "/%00", "/a%0Ab", "/%ff", "/%zz", "/" + strings.Repeat("x/", 1024)} {
		template, _, err := split("/api/v1/devices/x/resources" + path)
		if !hub.IsKind(err, hub.Invalid) || template == "" {
			t.Errorf("%s: %q, %v", path, template, err)
		}
	}
}

// FuzzSplit: an href that is found is a clean one, every template is a route, and escaping an href leads back to it.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{"/", "/api/v1/devices/x/resources/a/events", "/api/v1/devices/x/resources/%2Fa//b/", "/api/v1/devices/x/resource-links/a%2e", "/api/v1/devices/x/resources/a/pending-commands/c", "/api/v1/devices/%zz"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, path string) {
		template, v, err := split(path)
		if template != "" && routes[template] == nil {
			t.Fatalf("%q leads to %q, which is no route", path, template)
		}
		if err != nil || v.href == "" {
			return
		}
		if clean, err := hub.ParseHref(string(v.href)); (err != nil || clean != v.href) && len(v.href) <= hub.MaxHref {
			t.Fatalf("%q gives %q, clean is %q, %v", path, v.href, clean, err)
		}
		again, back, err := split("/api/v1/devices/x/resources/" + url.PathEscape(strings.TrimPrefix(string(v.href), "/")))
		if len(v.href) <= hub.MaxHref && (err != nil || back.href != v.href || again != "/api/v1/devices/{deviceId}/resources/{href}") {
			t.Fatalf("%q escaped leads to %q %q, %v", v.href, again, back.href, err)
		}
	})
}

// FuzzQuery: no query panics or yields a name that the door does not know, and values are those of net/url.
func FuzzQuery(f *testing.F) {
	for _, s := range []string{"type=a&typeFilter=b", "DEVICE_ID_FILTER=x&deviceid=y", "etag=%zz", "resourceIdFilter=x/y%3Fetag%3Dsb%2BI=", "a;b", "at=2020-01-01T00:00:00Z&limit=5&cursor=x&all=1&timestampFilter=7&statusFilter=ONLINE"} {
		f.Add(s)
	}
	known := map[string]bool{}
	for _, n := range queryNames {
		known[n] = true
	}
	f.Fuzz(func(t *testing.T, raw string) {
		q, err := parseQuery(raw)
		values, bad := url.ParseQuery(raw)
		if (err == nil) != (bad == nil) {
			t.Fatalf("%v, but %v", err, bad)
		}
		n := 0
		for name, vs := range q {
			if !known[name] {
				t.Fatalf("unknown name %q", name)
			}
			n += len(vs)
		}
		total := 0
		for _, vs := range values {
			total += len(vs)
		}
		if n > total {
			t.Fatalf("%d values of %d", n, total)
		}
		_, _ = q.at()
		_, _ = q.limit()
		_, _ = q.status()
		_, _ = q.nanos("timestampFilter")
		_, _ = q.strictFlag("all")
		q.etags("")
		filter, err := newFilter(q["deviceIdFilter"], nil, q["resourceIdFilter"])
		if err != nil {
			if !hub.IsKind(err, hub.Invalid) && !hub.IsKind(err, hub.TooLarge) {
				t.Fatal(err)
			}
			return
		}
		for _, id := range filter.ids() {
			if clean, err := hub.ParseDeviceID(string(id)); err != nil || clean != id {
				t.Fatalf("device %q", id)
			}
		}
	})
}

func FuzzCursor(f *testing.F) {
	w := newWorld(f)
	good := place{device: lampA, href: "/light/1", seq: 7, time: t0, index: 3}
	query := &filter{any: true, types: []string{"x.light"}}
	f.Add(w.cursor(listResources, alice, query, good))
	f.Add("")
	f.Add("AQIDBAU")
	f.Fuzz(func(t *testing.T, s string) {
		p, err := w.place(listResources, alice, query, s)
		if err != nil || s == "" {
			return
		}
		if w.cursor(listResources, alice, query, p) != s && p != good {
			t.Fatalf("forged: %q is %v", s, p)
		}
	})
}

func TestPlaceSurvivesACursor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, p := range []place{{device: lampA}, {device: lampB, href: "/light/1"}, {device: bobs, seq: 1 << 60, time: t0, index: 255}} {
		got, err := w.place(listEvents, alice, &filter{}, w.cursor(listEvents, alice, &filter{}, p))
		if err != nil {
			t.Fatal(err)
		}
		want(t, "place", got, p)
	}
}

func TestParseResourceFilter(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ in, device, href, etags string }{
		{"d/a/b", "d", "/a/b", ""},
		{"/d/a", "d", "/a", ""},
		{"d", "d", "", ""},
		{"d/", "d", "", ""},
		{"", "", "", ""},
		{"d/a?etag=AQ==", "d", "/a", "\x01;"},
		{"d/a?etag=AQ==&etag=Ag==&etag=*&x=y", "d", "/a", "\x01;\x02;"},
		{"d?etag=AQ==", "d", "", "\x01;"},
	} {
		r := parseResourceFilter(c.in)
		var etags string
		for _, e := range r.GetEtag() {
			etags += string(e) + ";"
		}
		want(t, c.in, r.GetResourceId().GetDeviceId()+r.GetResourceId().GetHref()+" "+etags, c.device+c.href+" "+c.etags)
	}
}
