package coap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/tcp/coder"
)

func unhex(t testing.TB, digits string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// RFC 8323, Section 3.2.
func TestParseHeader(t *testing.T) {
	for _, tc := range []struct {
		name, in string
		want     header
		ok       bool
		err      error
	}{
		{"nothing", "", header{}, false, nil},
		{"half", "01", header{tkl: 1}, false, nil},
		{"empty message", "00 00", header{size: 2}, true, nil},
		{"short", "72 01", header{code: codes.GET, size: 2, tkl: 2, body: 7}, true, nil},
		{"length 12", "c0 45", header{code: codes.Content, size: 2, body: 12}, true, nil},
		{"extended by one byte, lowest", "d0 00 45", header{code: codes.Content, size: 3, body: 13}, true, nil},
		{"extended by one byte, highest", "d8 ff 45", header{code: codes.Content, size: 3, tkl: 8, body: 268}, true, nil},
		{"extended by two bytes, lowest", "e0 0000 45", header{code: codes.Content, size: 4, body: 269}, true, nil},
		{"extended by two bytes, highest", "e0 ffff 45", header{code: codes.Content, size: 4, body: 65804}, true, nil},
		{"extended by four bytes, lowest", "f0 00000000 45", header{code: codes.Content, size: 6, body: 65805}, true, nil},
		{"extended by four bytes, highest", "f0 ffffffff 45", header{code: codes.Content, size: 6, body: maxBodyLength}, true, nil},
		{"extended and cut", "f0 0000", header{size: 6}, false, nil},
		{"token length 9", "09 01", header{tkl: 9}, false, errTokenLength},
		{"token length 15", "0f", header{tkl: 15}, false, errTokenLength},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h, ok, err := parseHeader(unhex(t, tc.in))
			if ok != tc.ok || !errors.Is(err, tc.err) || ok && h != tc.want {
				t.Fatalf("got %+v %v %v", h, ok, err)
			}
			if h.whole() < h.body {
				t.Errorf("the whole frame has %d bytes", h.whole())
			}
		})
	}
}

// RFC 7252, Sections 3.1, 5.4.1, 5.4.3 and 5.4.5.
func TestDecodeBody(t *testing.T) {
	for _, tc := range []struct {
		name, in string
		options  string // number:hex …
		payload  string
		fault    fault
		err      error
	}{
		{name: "nothing"},
		{name: "path", in: "b3 6f6963 02 7264", options: "11:6f6963 11:7264"},
		{name: "payload", in: "ff 01", payload: "01"},
		{name: "marker without payload", in: "ff", err: errNoPayload},
		{name: "option and marker without payload", in: "b0 ff", err: errNoPayload},
		{name: "reserved delta", in: "f1 00", err: errOptionHeader},
		{name: "reserved length", in: "1f 00", err: errOptionHeader},
		{name: "delta cut", in: "d0", err: errOptionShort},
		{name: "two byte delta cut", in: "e0 00", err: errOptionShort},
		{name: "length cut", in: "1d", err: errOptionShort},
		{name: "value cut", in: "b3 6f69", err: errOptionShort},
		{name: "number too high", in: "e0 ffff", err: errOptionNumber},
		{name: "OCF versions", in: "e1 06f4 00 41 00", options: "2049:00 2053:00"},
		{name: "unknown critical 9", in: "91 01 23 6f6963", options: "11:6f6963", fault: fault{option: 9}},
		{name: "unknown critical 2051", in: "e1 06f6 00", fault: fault{option: 2051}},
		{name: "unknown elective 2048 stays", in: "e1 06f3 01", options: "2048:01"},
		{name: "critical of a wrong length", in: "53 010203", fault: fault{option: 5}},
		{name: "accept too long", in: "d3 04 010203", fault: fault{option: 17}},
		{name: "block1 too long", in: "d4 0e 01020304", fault: fault{option: 27}},
		{name: "empty uri-host", in: "30", fault: fault{option: 3}},
		{name: "elective of a wrong length goes", in: "c3 010203 51 0a", options: "17:0a"},
		{name: "empty etag goes", in: "40 71 61", options: "11:61"},
		{name: "critical repeated", in: "d1 04 32 01 3c", options: "17:32", fault: fault{option: 17}},
		{name: "elective repeated", in: "c1 32 01 3c", options: "12:32"},
		{name: "repeatable repeated", in: "41 01 01 02", options: "4:01 4:02"},
		{name: "proxy-uri", in: "d1 16 61", options: "35:61", fault: fault{proxy: true}},
		{name: "proxy-scheme", in: "d1 1a 61", options: "39:61", fault: fault{proxy: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			opts, payload, f, err := decodeBody(unhex(t, tc.in), nil, false)
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if err != nil {
				return
			}
			if got := describe(opts); got != tc.options || hex.EncodeToString(payload) != tc.payload || f != tc.fault {
				t.Fatalf("options %q payload %x fault %+v", got, payload, f)
			}
		})
	}
}

func TestDecodeLongCriticalOption(t *testing.T) {
	// A path segment of 300 bytes must not vanish: DELETE /a/<300 bytes> is not DELETE /a.
	b := appendBody(nil, &Message{Options: message.Options{{ID: URIPath, Value: []byte("a")}, {ID: URIPath, Value: make([]byte, 300)}}})
	if _, _, f, err := decodeBody(b, nil, false); err != nil || f.option != URIPath {
		t.Fatalf("fault %+v, error %v", f, err)
	}
}

func TestDecodeManyOptions(t *testing.T) {
	opts, _, f, err := decodeBody(bytes.Repeat([]byte{0}, 10_000), nil, true)
	if err != nil || !f.many || len(opts) != maxOptions {
		t.Fatalf("%d options, fault %+v, error %v", len(opts), f, err)
	}
}

func describe(opts message.Options) string {
	out := make([]string, 0, len(opts))
	for _, o := range opts {
		out = append(out, fmt.Sprintf("%d:%x", uint16(o.ID), o.Value))
	}
	return strings.Join(out, " ")
}

// TestEncodeAgainstGoCoAP writes messages of all length classes and has another implementation read them.
func TestEncodeAgainstGoCoAP(t *testing.T) {
	for _, n := range []int{0, 1, 12, 13, 268, 269, 65804, 65805, 70_000} {
		for _, opts := range []message.Options{
			nil,
			AddPath(nil, "/oic/rd"),
			AddUint(AddPath(nil, "/"+strings.Repeat("x", 200)), OCFContentVersion, 2048),
			{{ID: ProxyURI, Value: bytes.Repeat([]byte("u"), 600)}},
		} {
			m := &Message{Code: codes.Content, Token: []byte{1, 2, 3}, Options: opts, Payload: pattern(n)}
			b := appendFrame(nil, m)
			if len(b) != frameSize(m) {
				t.Fatalf("%d bytes, frameSize says %d", len(b), frameSize(m))
			}
			theirs := message.Message{Options: make(message.Options, 0, 16)}
			if _, err := coder.DefaultCoder.Decode(b, &theirs); err != nil {
				t.Fatalf("payload %d, options %s: %v", n, describe(opts), err)
			}
			if theirs.Code != m.Code || !bytes.Equal(theirs.Token, m.Token) || !bytes.Equal(theirs.Payload, m.Payload) ||
				describe(theirs.Options) != describe(opts) {
				t.Fatalf("payload %d, options %s: read as %v", n, describe(opts), theirs)
			}
			h, ok, err := parseHeader(b)
			if !ok || err != nil || h.whole() != len(b) {
				t.Fatalf("header %+v of %d bytes, %v", h, len(b), err)
			}
		}
	}
}

func TestSortOptions(t *testing.T) {
	in := message.Options{{ID: URIQuery, Value: []byte("a")}, {ID: URIPath, Value: []byte("b")}, {ID: URIPath, Value: []byte("c")}}
	if got := describe(sortOptions(in)); got != "11:62 11:63 15:61" {
		t.Fatal(got)
	}
	if in[0].ID != URIQuery {
		t.Fatal("the argument was changed")
	}
}

func TestOptionHelpers(t *testing.T) {
	m := get("/a//b/")
	if got := Path(m); got != "/a//b/" {
		t.Errorf("path %q", got)
	}
	if got := Path(get("/")); got != "/" {
		t.Errorf("root %q", got)
	}
	m.Options = AddOption(AddOption(m.Options, URIQuery, []byte("x=1")), URIQuery, []byte("y"))
	if q := Queries(m); len(q) != 2 || q[0] != "x=1" || q[1] != "y" {
		t.Errorf("queries %q", q)
	}
	if _, ok := ContentFormat(m); ok {
		t.Error("a content format out of nothing")
	}
	m = m.with(ContentFormatOpt, 10000).with(AcceptOption, 0)
	if f, ok := ContentFormat(m); !ok || f != 10000 {
		t.Errorf("content format %d", f)
	}
	if f, ok := Accept(m); !ok || f != 0 {
		t.Errorf("accept %d", f)
	}
	m.Options = AddOption(AddOption(m.Options, ETagOption, []byte{1}), ETagOption, []byte{2})
	if e := ETags(m); len(e) != 2 || !bytes.Equal(ETag(m), []byte{1}) {
		t.Errorf("etags %x", e)
	}
	for n, want := range map[uint32]string{0: "", 1: "01", 255: "ff", 256: "0100", 1 << 16: "010000", 1 << 24: "01000000"} {
		if got := hex.EncodeToString(appendUint(nil, n)); got != want {
			t.Errorf("%d is %s", n, got)
		}
	}
}
