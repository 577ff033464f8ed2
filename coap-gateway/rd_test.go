package coapgateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// The order of refusals: path, method, session, format. Nothing is 4.01 that would not work with a session either.
func TestOrderOfRefusals(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		code   codes.Code
		path   string
		opts   []option
		want   string
		text   string
		closes bool
	}{
		"unknown path":            {codes.GET, "/foo/bar", nil, "4.04", "path-unknown: ", false},
		"PUT to another device":   {codes.PUT, "/api/v1/devices/" + string(fanID) + "/fan", nil, "4.05", "method-not-allowed: ", false},
		"another device":          {codes.GET, "/api/v1/devices/" + string(fanID) + "/fan", nil, "4.01", "not-signed-in: ", true},
		"like devices":            {codes.GET, "/api/v1/devicesX", nil, "4.04", "path-unknown: ", false},
		"no path":                 {codes.GET, "/", nil, "4.04", "path-unknown: ", false},
		"FETCH":                   {codes.Code(5), "/oic/res", nil, "4.05", "method-not-allowed: ", false}, // RFC 8132
		"PATCH":                   {codes.Code(6), "/oic/rd", nil, "4.05", "method-not-allowed: ", false},
		"iPATCH":                  {codes.Code(7), "/oic/rd", nil, "4.05", "method-not-allowed: ", false},
		"no method that exists":   {codes.Code(31), "/oic/res", nil, "4.05", "method-not-allowed: ", false},
		"nor does the path":       {codes.Code(31), "/foo/bar", nil, "4.05", "method-not-allowed: ", false},
		"method, needs a session": {codes.PUT, "/oic/rd", nil, "4.05", "method-not-allowed: ", false},
		"method, account path":    {codes.GET, "/oic/sec/session", nil, "4.05", "method-not-allowed: ", true},
		"method, time":            {codes.POST, "/x.plgd.dev/time", nil, "4.05", "method-not-allowed: ", false},
		"session":                 {codes.GET, "/oic/rd", nil, "4.01", "not-signed-in: ", true},
		"session before format":   {codes.GET, "/oic/res", []option{accept(0)}, "4.01", "not-signed-in: ", true},
		"publish without session": {codes.POST, "/oic/rd", nil, "4.01", "not-signed-in: ", true},
		"format":                  {codes.GET, "/x.plgd.dev/time", []option{accept(11050)}, "4.06", "not-acceptable: ", false},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			d := h.plain(lampID)
			d.want(d.do(c.code, c.path, nil, c.opts...), c.want, c.text)
			if c.closes {
				d.awaitClosed()
			} else {
				d.alive()
			}
		})
	}
}

func TestSelector(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	for format, want := range map[int32]string{10000: "\xa1\x63sel\x00", 60: "\xa1\x63sel\x00", 50: `{"sel":0}`} {
		r := d.want(d.do(codes.GET, "/oic/rd", nil, accept(format)), "2.05", want)
		if r.format != format {
			t.Errorf("Accept %d is answered in %d", format, r.format)
		}
	}
	d.want(d.do(codes.GET, "/oic/rd", nil, accept(0)), "4.06", "not-acceptable: ")
	d.alive()
}

func (d *device) publication(links any) body {
	return body{"di": string(d.id), "ttl": 0, "links": links, "n": "a lamp"}
}

func TestPublishAnswersWhatDevicesRead(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	r := d.want(d.post("/oic/rd", d.publication([]body{
		{
			"href": "/full", "rt": []string{"x.a", "x.b"}, "if": []string{"oic.if.r"}, "title": "all keys", "id": "some-id", "ins": 12345,
			"di": string(fanID), "anchor": "ocf://" + string(lampID), "type": []string{"application/cbor"}, "tag-pos-desc": "top",
			"p":   body{"bm": 7, "sec": true, "port": 5, "x.org.iotivity.tcp": 1, "x.org.iotivity.tls": 2},
			"eps": []body{{"ep": "coaps+tcp://127.0.0.1:1", "pri": 2}, {"ep": "coaps://127.0.0.1:2"}},
		},
		{"href": "/min"},
		{"href": "noslash"},
		{"href": "/trailing/"},
		{"href": "/dou//ble"},
	}), query("rt=oic.wk.rdpub")), "2.04", "")
	var got struct {
		Device string           `cbor:"di"`
		TTL    int              `cbor:"ttl"`
		LT     int              `cbor:"lt"`
		Links  []map[string]any `cbor:"links"`
	}
	if err := decoding.Unmarshal(r.body, &got); err != nil {
		t.Fatal(err)
	}
	if got.Device != string(lampID) || got.TTL != 0 || got.LT != 0 || len(got.Links) != 5 {
		t.Errorf("the answer is %+v", got)
	}
	full := got.Links[0]
	if full["ins"] != uint64(1149781108) || full["di"] != string(lampID) || full["id"] != "some-id" || full["title"] != "all keys" {
		t.Errorf("the full link came back as %v", full)
	}
	if _, ok := got.Links[1]["p"]; ok || got.Links[1]["ins"] != uint64(2268046518) {
		t.Errorf("the minimal link came back as %v", got.Links[1])
	}
	for i, want := range []struct {
		href string
		ins  uint64 // CRC-32 of the cleaned href
	}{{"/noslash", 0}, {"/trailing", 2709046449}, {"/dou/ble", 0}} {
		l := got.Links[i+2]
		if l["href"] != want.href || want.ins != 0 && l["ins"] != want.ins || l["ins"] != uint64(hub.Href(want.href).InstanceID()) {
			t.Errorf("got %v, want %+v", l, want)
		}
	}
	stored := h.w.links[lampID]["/full"]
	if stored.Policy != 7 || stored.Title != "all keys" || len(stored.Endpoints) != 2 || stored.Endpoints[0].Priority != 2 || stored.ValidUntil != 0 {
		t.Errorf("stored is %+v", stored)
	}
	// ins of the cleaned href unpublishes, that of the href as it was sent does not.
	d.want(d.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID)), query("ins=3306432778")), "4.00", "nothing-published: ")
	d.want(d.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID)), query("ins=2709046449")), "2.02", "")
}

func TestPublishForms(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	for format, first := range map[int32]byte{60: 0xa4, 50: '{', 10000: 0xa4} {
		r := d.want(d.post("/oic/rd", d.publication([]body{{"href": "/a"}}), accept(format)), "2.04", "")
		if r.format != format || r.body[0] != first {
			t.Errorf("Accept %d is answered in %d: %x", format, r.format, r.body)
		}
	}
	before := time.Now()
	r := d.want(d.post("/oic/rd", body{"di": string(lampID), "lt": 600, "links": []body{{"href": "/lt"}}}), "2.04", "").members(t)
	if r["ttl"] != uint64(600) || r["lt"] != uint64(600) {
		t.Errorf("lt came back as %v", r)
	}
	if until := time.Unix(0, h.w.links[lampID]["/lt"].ValidUntil).Sub(before); until < 599*time.Second || until > 610*time.Second {
		t.Errorf("the link is valid for %v", until)
	}
	// A content format that is wrong, or none: the body is CBOR all the same.
	d.want(d.do(codes.POST, "/oic/rd", cborOf(t, d.publication([]body{{"href": "/b"}})), option{ID: 12, Value: []byte{50}}), "2.04", "")
	raw := h.rawPlain()
	raw.write(post("/oic/sec/session", 1, cborOf(t, d.session(func(b body) { b["accesstoken"] = "token-" + string(lampID) }))))
	if m := raw.readAnswer(); m.Code != codes.Changed {
		t.Fatalf("sign-in without Content-Format: %s %s", coap.Dotted(m.Code), m.Payload)
	}
}

func TestPublishRefusals(t *testing.T) {
	t.Parallel()
	one := func(href any) any { return []body{{"href": href}} }
	for name, c := range map[string]struct {
		body any
		code string
		text string
	}{
		"no payload":                   {nil, "4.00", "body-missing: "},
		"not CBOR":                     {[]byte("nonsense"), "4.00", "body-invalid: "},
		"no di":                        {body{"ttl": 0, "links": one("/a")}, "4.00", "device-id-missing: "},
		"di of another device":         {body{"di": string(fanID), "ttl": 0, "links": one("/a")}, "4.00", "device-id-mismatch: "},
		"di is no UUID":                {body{"di": "lamp", "ttl": 0, "links": one("/a")}, "4.00", "device-id-mismatch: "},
		"no links":                     {body{"di": string(lampID), "ttl": 0}, "4.00", "links-missing: "},
		"empty links":                  {body{"di": string(lampID), "ttl": 0, "links": []any{}}, "4.00", "links-missing: "},
		"neither ttl nor lt":           {body{"di": string(lampID), "links": one("/a")}, "4.00", "ttl-invalid: "},
		"negative ttl":                 {body{"di": string(lampID), "ttl": -1, "links": one("/a")}, "4.00", "ttl-invalid: "},
		"ttl of a wrong type":          {body{"di": string(lampID), "ttl": "x", "links": one("/a")}, "4.00", "body-invalid: "},
		"link without href":            {body{"di": string(lampID), "ttl": 0, "links": []body{{"rt": []string{"x"}}}}, "4.00", "href-invalid: "},
		"empty href":                   {body{"di": string(lampID), "ttl": 0, "links": one("")}, "4.00", "href-invalid: "},
		"root href":                    {body{"di": string(lampID), "ttl": 0, "links": one("/")}, "4.00", "href-invalid: "},
		"slashes only":                 {body{"di": string(lampID), "ttl": 0, "links": one("//")}, "4.00", "href-invalid: "},
		"href with dots":               {body{"di": string(lampID), "ttl": 0, "links": one("/a/../b")}, "4.00", "href-invalid: "},
		"href of 4 KB":                 {body{"di": string(lampID), "ttl": 0, "links": one("/" + strings.Repeat("x", 4096))}, "4.00", "href-invalid: "},
		"href with control characters": {body{"di": string(lampID), "ttl": 0, "links": one("/a\x01")}, "4.00", "href-invalid: "},
		"href of a wrong type":         {body{"di": string(lampID), "ttl": 0, "links": one(7)}, "4.00", "body-invalid: "},
		"rt of a wrong type":           {body{"di": string(lampID), "ttl": 0, "links": []body{{"href": "/a", "rt": "x"}}}, "4.00", "body-invalid: "},
		"bm too large":                 {body{"di": string(lampID), "ttl": 0, "links": []body{{"href": "/a", "p": body{"bm": 300}}}}, "4.00", "body-invalid: "},
		"one good and one bad link":    {body{"di": string(lampID), "ttl": 0, "links": []body{{"href": "/a"}, {"href": ".."}}}, "4.00", "href-invalid: "},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			d := h.online(lampID, mute)
			b, ok := c.body.([]byte)
			if !ok && c.body != nil {
				b = cborOf(t, c.body)
			}
			d.want(d.do(codes.POST, "/oic/rd", b), c.code, c.text)
			d.alive()
			if len(h.w.links[lampID]) > 0 {
				t.Errorf("something of it stays: %v", h.w.links[lampID])
			}
		})
	}
	t.Run("bad UTF-8 in the href", func(t *testing.T) {
		h := start(t, nil)
		d := h.online(lampID, mute)
		b := bytes.Replace(cborOf(t, d.publication(one("/good"))), []byte("/good"), []byte("/g\xff\xfed"), 1)
		d.want(d.do(codes.POST, "/oic/rd", b), "4.00", "body-invalid: ")
		d.alive()
	})
}

func TestPublishOfManyLinks(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	many := make([]body, 10_001)
	for i := range many {
		many[i] = body{"href": fmt.Sprintf("/r/%d", i)}
	}
	d.want(d.post("/oic/rd", d.publication(many[:10_000])), "2.04", "")
	if n := len(h.w.links[lampID]); n != 10_000 {
		t.Errorf("%d links are stored", n)
	}
	d.want(d.post("/oic/rd", d.publication(many)), "4.13", "too-many-links: ")
	d.alive()
}

func TestUnpublish(t *testing.T) {
	t.Parallel()
	di := "di=" + string(lampID)
	ins := func(h hub.Href) string { return fmt.Sprintf("ins=%d", h.InstanceID()) }
	for name, c := range map[string]struct {
		queries []string
		code    string
		text    string
		left    []string
	}{
		"one":                    {[]string{di, ins("/a")}, "2.02", "", []string{"/b", "/c"}},
		"two":                    {[]string{di, ins("/a"), ins("/b")}, "2.02", "", []string{"/c"}},
		"single option":          {[]string{di + "&" + ins("/a")}, "2.02", "", []string{"/b", "/c"}},
		"all":                    {[]string{di}, "2.02", "", nil},
		"one known, one unknown": {[]string{di, ins("/a"), "ins=1"}, "2.02", "", []string{"/b", "/c"}},
		"di in capitals":         {[]string{strings.ToUpper(di[:2]), "di=" + strings.ToUpper(string(lampID)), ins("/a")}, "2.02", "", []string{"/b", "/c"}},
		"unknown":                {[]string{di, "ins=1"}, "4.00", "nothing-published: ", []string{"/a", "/b", "/c"}},
		"no query":               {nil, "4.00", "device-id-mismatch: ", []string{"/a", "/b", "/c"}},
		"di of another":          {[]string{"di=" + string(fanID), ins("/a")}, "4.00", "device-id-mismatch: ", []string{"/a", "/b", "/c"}},
		"di twice":               {[]string{di, di}, "4.00", "device-id-mismatch: ", []string{"/a", "/b", "/c"}},
		"ins no number":          {[]string{di, "ins=abc"}, "4.00", "instance-invalid: ", []string{"/a", "/b", "/c"}},
		"ins empty is not all":   {[]string{di, "ins="}, "4.00", "instance-invalid: ", []string{"/a", "/b", "/c"}},
		"broken escape":          {[]string{"di=%zz"}, "4.00", "query-invalid: ", []string{"/a", "/b", "/c"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			d := h.online(lampID, mute)
			d.want(d.publish("/a", "/b", "/c"), "2.04", "")
			var opts []option
			for _, q := range c.queries {
				opts = append(opts, query(q))
			}
			d.want(d.do(codes.DELETE, "/oic/rd", nil, opts...), c.code, c.text)
			var left []string
			for l := range h.w.links[lampID].All() {
				left = append(left, string(l.Href))
			}
			if !slices.Equal(left, c.left) {
				t.Errorf("left are %q, want %q", left, c.left)
			}
		})
	}
	t.Run("again", func(t *testing.T) {
		h := start(t, nil)
		d := h.online(lampID, mute)
		d.want(d.publish("/a"), "2.04", "")
		d.want(d.do(codes.DELETE, "/oic/rd", nil, query(di)), "2.02", "")
		d.want(d.do(codes.DELETE, "/oic/rd", nil, query(di)), "4.00", "nothing-published: ")
	})
}

func TestDiscovery(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	h.w.own(fanID, "alice")
	h.w.own("d0000000-0000-4000-8000-000000000009", "mallory")
	h.w.mu.Lock()
	h.w.links[lampID] = links{
		"/light": {Href: "/light", Types: []string{"core.light"}, Interfaces: []string{"oic.if.rw"}, Policy: 3, Anchor: "ocf://x", Title: "t", ContentTypes: []string{"application/cbor"}},
	}
	h.w.links[fanID] = links{"/fan": {Href: "/fan", Types: []string{"x.fan"}, Policy: 1}}
	h.w.links["d0000000-0000-4000-8000-000000000009"] = links{"/secret": {Href: "/secret"}}
	h.w.mu.Unlock()
	hrefs := func(r reply) (out []string) {
		t.Helper()
		var ls []map[string]any
		if err := decoding.Unmarshal(r.body, &ls); err != nil {
			t.Fatalf("%x: %v", r.body, err)
		}
		for _, l := range ls {
			out = append(out, l["href"].(string))
		}
		return out
	}
	lamp, fan := "/api/v1/devices/"+string(lampID)+"/light", "/api/v1/devices/"+string(fanID)+"/fan"
	for name, c := range map[string]struct {
		queries []string
		want    []string
	}{
		"all":            {nil, []string{lamp, fan}},
		"di of self":     {[]string{"di=" + string(lampID)}, []string{lamp}},
		"di twice":       {[]string{"di=" + string(lampID), "di=" + string(fanID)}, []string{lamp, fan}},
		"di unknown":     {[]string{"di=d0000000-0000-4000-8000-000000000099"}, nil},
		"di no UUID":     {[]string{"di=abc"}, nil},
		"of other owner": {[]string{"di=d0000000-0000-4000-8000-000000000009"}, nil},
		"rt":             {[]string{"rt=core.light"}, []string{lamp}},
		"rt two":         {[]string{"rt=core.light", "rt=x.fan"}, []string{lamp, fan}},
		"rt none":        {[]string{"rt=x.none"}, nil},
		"if is ignored":  {[]string{"if=oic.if.b"}, []string{lamp, fan}},
	} {
		t.Run(name, func(t *testing.T) {
			var opts []option
			for _, q := range c.queries {
				opts = append(opts, query(q))
			}
			r := d.want(d.do(codes.GET, "/oic/res", nil, opts...), "2.05", "")
			if got := hrefs(r); !slices.Equal(got, c.want) || r.format != 10000 {
				t.Errorf("got %q in %d, want %q", got, r.format, c.want)
			}
		})
	}
	t.Run("link rewriting", func(t *testing.T) {
		var ls []map[string]any
		if err := decoding.Unmarshal(d.do(codes.GET, "/oic/res", nil).body, &ls); err != nil {
			t.Fatal(err)
		}
		if ls[0]["anchor"] != "ocf://x" || ls[1]["anchor"] != "ocf://"+string(fanID) || ls[0]["di"] != string(lampID) || ls[0]["title"] != "t" {
			t.Errorf("links are %v", ls)
		}
		if _, ok := ls[0]["ins"]; ok {
			t.Error("ins is not for other devices")
		}
	})
	t.Run("Accept 60", func(t *testing.T) {
		var groups []map[string]any
		r := d.do(codes.GET, "/oic/res", nil, accept(60))
		if err := decoding.Unmarshal(r.body, &groups); err != nil || len(groups) != 2 || r.format != 60 {
			t.Fatalf("got %v, %v", groups, err)
		}
		if groups[0]["di"] != string(lampID) || groups[0]["ttl"] != int64(-1) || groups[0]["lt"] != int64(-1) || len(groups[0]["links"].([]any)) != 1 {
			t.Errorf("the first group is %v", groups[0])
		}
		if r := d.do(codes.GET, "/oic/res", nil, accept(60), query("rt=x.none")); !bytes.Equal(r.body, []byte{0x80}) {
			t.Errorf("nothing found is %x", r.body)
		}
	})
	t.Run("Accept 50", func(t *testing.T) {
		var ls []map[string]any
		r := d.do(codes.GET, "/oic/res", nil, accept(50))
		if err := json.Unmarshal(r.body, &ls); err != nil || len(ls) != 2 || ls[0]["href"] != lamp || r.format != 50 {
			t.Errorf("got %s, %v", r.body, err)
		}
		if r := d.do(codes.GET, "/oic/res", nil, accept(50), query("rt=x.none")); r.text() != "[]" {
			t.Errorf("nothing found is %s", r.body)
		}
	})
	t.Run("refusals", func(t *testing.T) {
		d.want(d.do(codes.GET, "/oic/res", nil, accept(0)), "4.06", "not-acceptable: ")
		d.want(d.do(codes.GET, "/oic/res", nil, query("rt=%zz")), "4.00", "query-invalid: ")
		d.alive()
	})
}

// Links lead to the listener that the asking device came to, as it is reached from outside: api.coap.externalAddress is the
// secure one's, all others have the hub's own host.
func TestDiscoveredEndpoints(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ external, secure, plain string }{
		"configured":            {"nat.example:443", "coaps+tcp://nat.example:443", "coap+tcp://hub.example:"},
		"as the hub is reached": {"", "coaps+tcp://hub.example:", "coap+tcp://hub.example:"},
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, func(cfg *Config, deps *Deps) {
				cfg.API.CoAP.ExternalAddress = c.external
				deps.Reach = func(address string) string { return strings.Replace(address, "127.0.0.1", "hub.example", 1) }
			})
			port := func(uri, address string) string {
				if !strings.HasSuffix(uri, ":") {
					return uri
				}
				_, port, _ := net.SplitHostPort(address)
				return uri + port
			}
			at := h.gw.Addresses()
			secure, plain := port(c.secure, at.Secure), port(c.plain, at.Plain)
			h.w.own(fanID, "alice")
			lamp, fan := h.online(lampID, mute), h.secure(fanID)
			fan.mute = true
			fan.want(fan.signIn("token-"+string(lampID)), "2.04", "")
			h.w.mu.Lock()
			h.w.links[lampID] = links{"/light": {Href: "/light"}}
			h.w.mu.Unlock()
			for d, want := range map[*device]string{lamp: plain, fan: secure} {
				var ls []map[string]any
				if err := decoding.Unmarshal(d.do(codes.GET, "/oic/res", nil).body, &ls); err != nil || len(ls) != 1 {
					t.Fatalf("links are %v, %v", ls, err)
				}
				if got := fmt.Sprint(ls[0]["eps"]); got != "[map[ep:"+want+" pri:1]]" {
					t.Errorf("eps are %s, want %s", got, want)
				}
			}
		})
	}
}

// Who asks for a few devices gets them without a look at all others of the owner.
func TestDiscoveryOfAFew(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	h.w.own(fanID, "alice")
	h.w.own(bobsID, "bob")
	h.w.mu.Lock()
	for _, id := range []hub.DeviceID{lampID, fanID, bobsID} {
		h.w.links[id] = links{"/light": {Href: "/light"}}
	}
	var asked []hub.DeviceID
	devices := h.w.dir.devices
	h.w.dir.devices = func(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		asked = ids
		return devices(ctx, owner, ids)
	}
	h.w.ids.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
		t.Error("the owner's devices were listed")
		return nil, nil
	}
	h.w.mu.Unlock()
	r := d.want(d.do(codes.GET, "/oic/res", nil, accept(60), query("di="+strings.ToUpper(string(fanID))), query("di="+string(bobsID)),
		query("di="+string(fanID)), query("di=x")), "2.05", "")
	var groups []map[string]any
	if err := decoding.Unmarshal(r.body, &groups); err != nil || len(groups) != 1 || groups[0]["di"] != string(fanID) {
		t.Errorf("got %v, %v", groups, err)
	}
	want := []hub.DeviceID{fanID, bobsID} // each once; that bob's is not alice's is the directory's to say
	slices.Sort(want)
	if !slices.Equal(asked, want) {
		t.Errorf("the directory was asked for %q, want %q", asked, want)
	}
}

// An answer that would not end is given up, and the device told what to do.
func TestDiscoveryOfTooMuch(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	d := h.online(lampID, mute)
	long := strings.Repeat("x", 1<<20)
	h.w.mu.Lock()
	h.w.links[lampID] = links{"/small": {Href: "/small", Types: []string{"x.small"}}}
	for i := range 5 {
		href := hub.Href(fmt.Sprintf("/big/%d", i))
		h.w.links[lampID][href] = hub.Link{Href: href, Title: long}
	}
	h.w.mu.Unlock()
	for _, format := range []int32{10000, 60, 50} {
		d.want(d.do(codes.GET, "/oic/res", nil, accept(format)), "4.13", "discovery-too-large: ")
	}
	d.want(d.do(codes.GET, "/oic/res", nil, query("rt=x.small")), "2.05", "")
}

func TestCore(t *testing.T) {
	t.Parallel()
	h := start(t, func(_ *Config, d *Deps) { d.Renewals = &registrar{} })
	d := h.plain(lampID)
	r := d.want(d.do(codes.GET, "/.well-known/core", nil), "2.05", "</oic/sec/account>;rt=\"oic.r.account\"")
	if r.format != 40 || strings.Count(r.text(), ",<") != len(ownResources)-1 {
		t.Errorf("got %q in %d", r.body, r.format)
	}
	for path := range routes {
		if path != "/.well-known/core" && !strings.Contains(r.text(), "<"+path+">") {
			t.Errorf("%s is not listed", path)
		}
	}
	for q, want := range map[string]string{
		"rt=oic.wk.rd":      `</oic/rd>;rt="oic.wk.rd";ct="10000 60 50"`,
		"href=/x.plgd.*":    `</x.plgd.dev/time>;rt="x.plgd.dev.time";ct="10000 60 50"`,
		"rt=nothing":        "",
		"href=/oic/rd&rt=x": "",
	} {
		if r := d.do(codes.GET, "/.well-known/core", nil, query(q)); r.code != "2.05" || r.text() != want {
			t.Errorf("%s: got %s %q, want %q", q, r.code, r.body, want)
		}
	}
	d.want(d.do(codes.GET, "/.well-known/core", nil, accept(40)), "2.05", "<")
	d.want(d.do(codes.GET, "/.well-known/core", nil, accept(50)), "4.06", "not-acceptable: ")
	d.alive()
}
