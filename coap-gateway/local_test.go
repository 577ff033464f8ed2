package coapgateway

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

const whereAsked = "0.01 /oic/res ?if=oic.if.ll ?rt=oic.wk.d"

func eps(uris ...string) []body {
	out := []body{}
	for _, u := range uris {
		out = append(out, body{"ep": u, "pri": 1})
	}
	return out
}

func TestLocalEndpoints(t *testing.T) {
	t.Parallel()
	many := make([]string, maxLocalEndpoints+1)
	for i := range many {
		many[i] = fmt.Sprintf("coap://192.0.2.%d", i)
	}
	for name, c := range map[string]struct {
		links any
		want  []string
		none  bool // nothing is recorded
	}{
		"both of its kind":     {[]body{{"href": "/oic/d", "rt": []string{"oic.wk.d", "x"}, "eps": eps("coaps+tcp://192.0.2.1:5", "coap://[fe80::1%25eth0]")}}, []string{"coaps+tcp://192.0.2.1:5", "coap://[fe80::1%25eth0]"}, false},
		"the query not heeded": {[]body{{"href": "/a", "rt": []string{"x"}, "eps": eps("coap://a")}, {"href": "/oic/d", "rt": []string{"oic.wk.d"}, "eps": eps("coap://d")}, {"href": "/e", "rt": []string{"oic.wk.d"}, "eps": eps("coap://e")}}, []string{"coap://d"}, false},
		"nowhere":              {[]body{{"href": "/oic/d", "rt": []string{"oic.wk.d"}}}, nil, false},
		"without priority":     {[]body{{"rt": []string{"oic.wk.d"}, "eps": []body{{"ep": "coap://d"}}}}, []string{"coap://d"}, false},
		"unusable ones":        {[]body{{"rt": []string{"oic.wk.d"}, "eps": eps("", "coap://a\n", strings.Repeat("x", maxLocalEndpoint+1), "coap://d")}}, []string{"coap://d"}, false},
		"too many":             {[]body{{"rt": []string{"oic.wk.d"}, "eps": eps(many...)}}, many[:maxLocalEndpoints], false},
		"no such link":         {[]body{{"href": "/a", "rt": []string{"x"}, "eps": eps("coap://a")}}, nil, true},
		"no links":             {[]body{}, nil, true},
		"a map":                {body{"rt": []string{"oic.wk.d"}}, nil, true},
		"wrong types":          {[]body{{"rt": "oic.wk.d", "eps": 5}}, nil, true},
		"no CBOR":              {[]byte{0xff}, nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			b, ok := c.links.([]byte)
			if !ok {
				b = cborOf(t, c.links)
			}
			if got, ok := localEndpoints(b); ok == c.none || !slices.Equal(got, c.want) {
				t.Errorf("got %q, %t; want %q, %t", got, ok, c.want, !c.none)
			}
		})
	}
}

// The device is asked where it is once it has listed its links, and with its twin switched off too; what it says is recorded
// before the twin is in sync.
func TestLocalEndpointsAreLearned(t *testing.T) {
	t.Parallel()
	links := []body{{"href": "/oic/d", "rt": []string{"oic.wk.d"}, "eps": eps("coap://192.0.2.1:5683")}}
	const recorded = `local ["coap://192.0.2.1:5683"]`
	t.Run("twin", func(t *testing.T) {
		h := start(t, nil)
		d := h.online(lampID, func(d *device) { d.list = links })
		h.w.awaitLog(t, "twin 3")
		if got := d.asks(); len(got) < 2 || got[1] != whereAsked {
			t.Errorf("the hub asked %q", got)
		}
		h.w.mu.Lock()
		defer h.w.mu.Unlock()
		if i, j := slices.Index(h.w.log, recorded), slices.Index(h.w.log, "twin 3"); i < 0 || i > j {
			t.Errorf("it happened: %q", h.w.log)
		}
	})
	t.Run("no twin", func(t *testing.T) {
		h := start(t, nil)
		h.withoutTwin()
		d := h.online(lampID, func(d *device) { d.list = links })
		h.w.awaitLog(t, recorded)
		if got := d.asks(); !slices.Equal(got, []string{whereAsked}) {
			t.Errorf("the hub asked %q", got)
		}
	})
	// A device that lists nothing is not asked, and its twin does not wait.
	t.Run("unlisted", func(t *testing.T) {
		h := start(t, nil)
		d := h.online(lampID, func(d *device) { d.list = codes.NotFound })
		h.w.awaitLog(t, "twin 3")
		if got := d.asks(); slices.Contains(got, whereAsked) {
			t.Errorf("the hub asked %q", got)
		}
	})
	// What cannot be stored closes the connection as everything does that a device said: it says it again.
	t.Run("not stored", func(t *testing.T) {
		for _, twin := range []bool{true, false} {
			h := start(t, nil)
			if !twin {
				h.withoutTwin()
			}
			h.w.dir.setLocal = func(context.Context, hub.Stamp, []string) error { return &hub.Error{Kind: hub.Unavailable} }
			d := h.online(lampID, func(d *device) { d.list = links })
			d.awaitClosed()
			h.w.awaitLog(t, "offline "+string(lampID))
		}
	})
	// A session whose device never answers ends at once.
	t.Run("mute", func(t *testing.T) {
		h := start(t, nil)
		h.withoutTwin()
		d := h.online(lampID, mute)
		d.awaitAsked(whereAsked)
		d.want(d.post("/oic/sec/session", body{"login": false}), "2.04", "")
		h.w.awaitLog(t, "signed-out "+string(lampID))
	})
}

// withoutTwin makes the twins of all devices be switched off.
func (h *hall) withoutTwin() {
	in := h.w.dir.signIn
	h.w.dir.signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
		s, err := in(ctx, own, c, user, to)
		s.TwinEnabled = false
		return s, err
	}
}
