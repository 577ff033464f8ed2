package coapgateway

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

func TestDecodeBody(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		body string
		ok   bool
	}{
		"empty map":            {"\xa0", true},
		"unknown members":      {"\xa1\x61x\x01", true},
		"indefinite map":       {"\xbf\x62di\x61x\xff", true},
		"nothing":              {"", false},
		"text":                 {"\x63abc", false},
		"array":                {"\x80", false},
		"JSON":                 {`{"di":"x"}`, false},
		"cut":                  {"\xa1\x62di", false},
		"wrong type":           {"\xa1\x62di\x01", false},
		"bad UTF-8":            {"\xa1\x62di\x62\xff\xfe", false},
		"something behind":     {"\xa0\xa0", false},
		"long promise, cut":    {"\xba\xff\xff\xff\xff", false},
		"nested without bound": {"\xa1\x61x" + strings.Repeat("\x81", 1000) + "\x00", false},
	} {
		t.Run(name, func(t *testing.T) {
			var into signUpRequest
			err := decodeBody([]byte(c.body), &into)
			if c.ok != (err == nil) || err != nil && !hub.IsKind(err, hub.Invalid) {
				t.Errorf("got %v, want success: %v", err, c.ok)
			}
		})
	}
}

func TestAcceptable(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		accept int32 // -1: no option
		want   int32
		ok     bool
	}{
		"none": {-1, hub.FormatOCFCBOR, true}, "10000": {10000, hub.FormatOCFCBOR, true}, "60": {60, hub.FormatCBOR, true},
		"50": {50, hub.FormatJSON, true}, "0": {0, 0, false}, "40": {40, 0, false}, "11050": {11050, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			var m coap.Message
			if c.accept >= 0 {
				m.Options = coap.AddUint(nil, message.Accept, uint32(c.accept))
			}
			got, err := acceptable(&m)
			if got != c.want || c.ok != (err == nil) || err != nil && !hub.IsKind(err, hub.NotAcceptable) {
				t.Errorf("got %d, %v; want %d, success %v", got, err, c.want, c.ok)
			}
		})
	}
}

func queryMessage(options ...string) *coap.Message {
	m := &coap.Message{}
	for _, o := range options {
		m.Options = coap.AddOption(m.Options, message.URIQuery, []byte(o))
	}
	return m
}

func TestParseQueries(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		options []string
		key     string
		want    []string
		bad     bool
	}{
		"separate options":  {[]string{"di=a", "uid=b"}, "uid", []string{"b"}, false},
		"one option":        {[]string{"uid=b&di=a"}, "di", []string{"a"}, false},
		"repeated":          {[]string{"ins=1", "ins=2&ins=3"}, "ins", []string{"1", "2", "3"}, false},
		"escaped":           {[]string{"di=%61%20b"}, "di", []string{"a b"}, false},
		"broken escape":     {[]string{"di=%zz"}, "di", nil, true},
		"key without value": {[]string{"di"}, "di", []string{""}, false},
		"nothing":           {[]string{""}, "di", nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			q, err := parseQueries(queryMessage(c.options...), hub.BadOption)
			if c.bad != (err != nil) || err != nil && !hub.IsKind(err, hub.BadOption) {
				t.Fatalf("got error %v, want one: %v", err, c.bad)
			}
			if !slices.Equal(q[c.key], c.want) {
				t.Errorf("%s is %q, want %q", c.key, q[c.key], c.want)
			}
		})
	}
}

func TestValidUntil(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	i := func(n int64) *int64 { return &n }
	for name, c := range map[string]struct {
		ttl, lt *int64
		want    int64
		ok      bool
	}{
		"ttl":                   {i(60), nil, 1060, true},
		"unlimited":             {i(0), nil, 0, true},
		"legacy lt":             {nil, i(600), 1600, true},
		"negative ttl, good lt": {i(-1), i(5), 1005, true},
		"ttl wins":              {i(7), i(5), 1007, true},
		"neither":               {nil, nil, 0, false},
		"negative":              {i(-5), nil, 0, false},
		"beyond all time":       {i(1 << 62), nil, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			p := publication{TTL: c.ttl, Lifetime: c.lt}
			got, err := p.validUntil(now)
			if c.ok != (err == nil) || got != c.want*1e9 {
				t.Errorf("got %d, %v; want %d", got, err, c.want*1e9)
			}
			if err == nil && *p.TTL != *p.Lifetime {
				t.Errorf("ttl %d and lt %d differ in the answer", *p.TTL, *p.Lifetime)
			}
		})
	}
}

func TestTypesOf(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		format int32
		data   string
		want   []string
	}{
		"CBOR":               {hub.FormatOCFCBOR, "\xa2\x62rt\x81\x61x\x61y\x01", []string{"x"}},
		"CBOR without":       {hub.FormatCBOR, "\xa1\x61y\x01", nil},
		"rt of a wrong type": {hub.FormatCBOR, "\xa1\x62rt\x01", nil},
		"broken":             {hub.FormatCBOR, "\xa1\x62rt\x81", nil},
		"JSON":               {hub.FormatJSON, `{"rt":["x","y"]}`, []string{"x", "y"}},
		"broken JSON":        {hub.FormatJSON, `{"rt":["x"`, nil},
		"two JSON texts":     {hub.FormatJSON, `{"rt":["x"]} 7`, nil},
		"text":               {hub.FormatText, `{"rt":["x"]}`, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if got := typesOf(c.format, []byte(c.data)); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestParseBatch(t *testing.T) {
	t.Parallel()
	type m = map[string]any
	enc := func(v any) []byte {
		b, err := encoding.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	light, info := m{"href": "/light/1", "rep": m{"p": 1}, "etag": []byte{1}}, m{"href": "ocf://d0000000-0000-4000-8000-000000000001/info", "rep": m{"t": "x"}, "etag": []byte{2}}
	bodies := func(cs []hub.Change) (out []string) {
		for _, c := range cs {
			out = append(out, string(c.Href)+" "+string(rune('0'+c.Status)))
		}
		return out
	}
	indefinite := append(enc([]any{light})[:1:1], "\xa2\x64href\x65/info\x63rep\xbf\xff"...)
	for name, c := range map[string]struct {
		body    []byte
		etag    []byte
		want    []string // href and status
		skipped int
		bad     bool
	}{
		"two":                     {enc([]any{light, info}), nil, []string{"/light/1 1", "/info 1"}, 0, false},
		"newest ETag goes last":   {enc([]any{light, info}), []byte{1}, []string{"/info 1", "/light/1 1"}, 0, false},
		"canonical empty map":     {enc([]any{m{"href": "/info", "rep": m{}}}), nil, []string{"/info 5"}, 0, false},
		"indefinite empty map":    {indefinite, nil, []string{"/info 5"}, 0, false},
		"hidden empty maps":       {enc([]any{m{"href": "/oic/sec/pstat", "rep": m{}}, m{"href": "/oc/wk/introspection", "rep": m{}}}), nil, nil, 2, false},
		"href with dots":          {enc([]any{m{"href": "/a/../b", "rep": 1}, light}), nil, []string{"/light/1 1"}, 1, false},
		"no href":                 {enc([]any{m{"rep": 1}, light}), nil, []string{"/light/1 1"}, 1, false},
		"no rep":                  {enc([]any{m{"href": "/x"}, light}), nil, []string{"/light/1 1"}, 1, false},
		"element of a wrong type": {enc([]any{7, light}), nil, []string{"/light/1 1"}, 1, false},
		"href is only a device":   {enc([]any{m{"href": "ocf://x", "rep": 1}}), nil, nil, 1, false},
		"rep is no map":           {enc([]any{m{"href": "/n", "rep": 7}}), nil, []string{"/n 1"}, 0, false},
		"rep over the limit":      {enc([]any{m{"href": "/big", "rep": make([]byte, hub.MaxContent+1)}, light}), nil, []string{"/big 9", "/light/1 1"}, 0, false},
		"empty":                   {enc([]any{}), nil, nil, 0, false},
		"not an array":            {enc(light), nil, nil, 0, true},
		"cut":                     {enc([]any{light, info})[:20], nil, nil, 0, true},
		"nothing":                 {nil, nil, nil, 0, true},
	} {
		t.Run(name, func(t *testing.T) {
			got, skipped, err := parseBatch(hub.FormatOCFCBOR, c.body, c.etag)
			if c.bad != (err != nil) || skipped != c.skipped || !slices.Equal(bodies(got), c.want) {
				t.Errorf("got %q, %d skipped, %v; want %q, %d", bodies(got), skipped, err, c.want, c.skipped)
			}
		})
	}
	if _, _, err := parseBatch(hub.FormatText, enc([]any{light}), nil); !hub.IsKind(err, hub.Unsupported) {
		t.Errorf("a batch of another format: %v", err)
	}
}

func TestAddETags(t *testing.T) {
	t.Parallel()
	e := func(b ...byte) []byte { return b }
	o := addETags(requestTo(resHref, "if=oic.if.b"), [][]byte{e(0xe7, 0, 0, 0, 0, 0, 0, 4), nil, make([]byte, 9), e(0xe7, 0, 0, 0, 0, 0, 0, 3), e(0xe7, 0, 0, 0, 0, 0, 0, 2)})
	m := &coap.Message{Options: o}
	if got := coap.ETags(m); len(got) != 1 || got[0][7] != 4 {
		t.Errorf("ETag options are %x, want the newest", got)
	}
	want := []string{"if=oic.if.b", "incChanges=5wAAAAAAAAM,5wAAAAAAAAI"}
	if got := coap.Queries(m); !slices.Equal(got, want) {
		t.Errorf("queries are %q, want %q", got, want)
	}
	many := make([][]byte, 64)
	for i := range many {
		many[i] = e(1, 2, 3, 4, 5, 6, 7, byte(i))
	}
	total := 0
	for _, q := range coap.Queries(&coap.Message{Options: addETags(nil, many)}) {
		if len(q) > 255 { // RFC 7252, Section 5.10
			t.Errorf("a query has %d bytes", len(q))
		}
		total += strings.Count(q, ",") + 1
	}
	if total != 63 {
		t.Errorf("%d ETags are in incChanges, want 63", total)
	}
	if got := addETags(nil, nil); got != nil {
		t.Errorf("without ETags there is %v", got)
	}
}

func TestListBodyHeads(t *testing.T) {
	t.Parallel()
	for _, n := range []int{0, 1, 23, 24, 255, 256, 70_000} {
		l := listBody{format: hub.FormatCBOR}
		for i := range n {
			if err := l.add(i % 10); err != nil {
				t.Fatal(err)
			}
		}
		var back []int
		if err := decoding.Unmarshal(l.bytes(), &back); err != nil || len(back) != n {
			t.Errorf("a list of %d reads back as %d, %v", n, len(back), err)
		}
	}
	l := listBody{format: hub.FormatJSON}
	if err := l.add(make([]byte, maxDiscovery)); !hub.IsKind(err, hub.TooLarge) {
		t.Errorf("a list over its bound: %v", err)
	}
}
