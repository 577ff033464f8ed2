package grpcgateway

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"math"
	"math/big"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
)

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Most are the examples of RFC 8949, Appendix A.
func TestCBORAsJSON(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ hex, want string }{
		{"00", "0"},
		{"17", "23"},
		{"1818", "24"},
		{"1903e8", "1000"},
		{"1a000f4240", "1000000"},
		{"1b000000e8d4a51000", "1000000000000"},
		{"1bffffffffffffffff", "18446744073709551615"},
		{"1b0020000000000001", "9007199254740993"}, // 2^53 + 1
		{"c249010000000000000000", "18446744073709551616"},
		{"c349010000000000000000", "-18446744073709551617"},
		{"3bffffffffffffffff", "-18446744073709551616"},
		{"3bfffffffffffffffe", "-18446744073709551615"},
		{"20", "-1"},
		{"3863", "-100"},
		{"c240", "0"},
		{"c340", "-1"},
		{"f90000", "0"},
		{"f98000", "-0"},
		{"f93c00", "1"},
		{"fb3ff199999999999a", "1.1"},
		{"f93e00", "1.5"},
		{"f97bff", "65504"},
		{"fa47c35000", "100000"},
		{"fa7f7fffff", "3.4028234663852886e+38"},
		{"fb7e37e43c8800759c", "1e+300"},
		{"f90001", "5.960464477539063e-08"},
		{"f90400", "0.00006103515625"},
		{"f9c400", "-4"},
		{"fbc010666666666666", "-4.1"},
		{"fa3dcccccd", "0.10000000149011612"}, // single precision 0.1 is this value
		{"f97c00", `"Infinity"`},
		{"f97e00", `"NaN"`},
		{"f9fc00", `"-Infinity"`},
		{"fa7f800000", `"Infinity"`},
		{"fb7ff8000000000000", `"NaN"`},
		{"f4", "false"},
		{"f5", "true"},
		{"f6", "null"},
		{"f7", "null"},
		{"c074323031332d30332d32315432303a30343a30305a", `"2013-03-21T20:04:00Z"`},
		{"c11a514b67b0", "1363896240"},
		{"d74401020304", `"AQIDBA=="`},
		{"d818456449455446", `"ZElFVEY="`},
		{"40", `""`},
		{"4401020304", `"AQIDBA=="`},
		{"60", `""`},
		{"6161", `"a"`},
		{"62225c", `"\"\\"`},
		{"62c3bc", `"ü"`},
		{"64f0908591", `"` + "\U00010151" + `"`},
		{"6a0009 0a0d1f7f3c3e26 2f", `"\u0000\t\n\r\u001f\u007f\u003c\u003e\u0026/"`},
		{"63e280a8", `"\u2028"`},
		{"63e280a9", `"\u2029"`},
		{"63e280a7", `"` + "\u2027" + `"`},
		{"80", "[]"},
		{"83010203", "[1,2,3]"},
		{"8301820203820405", "[1,[2,3],[4,5]]"},
		{"a0", "{}"},
		{"a201020304", `{"1":2,"3":4}`},
		{"a26161016162820203", `{"a":1,"b":[2,3]}`},
		{"a3200141ff02f503", `{"-1":1,"/w==":2,"true":3}`},
		{"5f42010243030405ff", `"AQIDBAU="`},
		{"7f657374726561646d696e67ff", `"streaming"`},
		{"9fff", "[]"},
		{"9f018202039f0405ffff", "[1,[2,3],[4,5]]"},
		{"bf61610161629f0203ffff", `{"a":1,"b":[2,3]}`},
		{"bfff", "{}"},
	} {
		got, err := appendCBOR(nil, unhex(t, c.hex))
		if err != nil {
			t.Errorf("%s: %v", c.hex, err)
			continue
		}
		want(t, c.hex, string(got), c.want)
		if !json.Valid(got) {
			t.Errorf("%s: %s is no JSON", c.hex, got)
		}
	}
}

func TestCBORThatJSONCannotShow(t *testing.T) {
	t.Parallel()
	deep := func(n int) string { return strings.Repeat("81", n) + "00" }
	for what, s := range map[string]string{
		"nothing": "", "cut number": "19 03", "cut text": "62 61", "cut list": "82 01", "cut map": "a1 6161", "cut indefinite": "9f 01",
		"trailing byte": "00 00", "reserved info": "1c", "reserved info 2": "fe", "break alone": "ff", "break in a list": "81 ff",
		"odd indefinite map": "bf 6161 ff", "indefinite number": "1f", "indefinite tag": "df 00", "chunk of another type": "5f 6161 ff",
		"nested chunks": "5f 5f 41 00 ff ff", "bad UTF-8": "61 ff", "UTF-8 cut by chunks": "7f 61 c3 61 bc ff", "simple value 0": "e0",
		"simple value 255": "f8 ff", "list as key": "a1 80 00", "map as key": "a1 a0 00", "float as key": "a1 f93c00 00",
		"tag as key": "a1 c1 00 00", "same key twice": "a2 6161 01 6161 02", "same key after conversion": "a2 01 01 6131 02",
		"huge length": "5b ffffffffffffffff 00", "huge list": "9b ffffffffffffffff 00", "bignum of a text": "c2 6161",
		"large bignum": "c2 59 0201" + strings.Repeat("ff", 513), "deep": deep(maxDepth + 1), "deep tags": strings.Repeat("c1", maxDepth+1) + "00",
	} {
		b := []byte("before")
		got, err := appendCBOR(b, unhex(t, s))
		if err == nil {
			t.Errorf("%s: shown as %s", what, got)
		}
		want(t, what, string(got), "before")
	}
	if _, err := appendCBOR(nil, unhex(t, deep(maxDepth))); err != nil {
		t.Errorf("the deepest: %v", err)
	}
	many := map[int]int{}
	for i := range 200 {
		many[i] = i
	}
	if _, err := appendCBOR(nil, cborOf(many)); err != nil {
		t.Errorf("many keys: %v", err)
	}
	twice := append([]byte{0xb9, 0, 201}, cborOf(many)[2:]...) // a map head of two more bytes, then one key again
	if _, err := appendCBOR(nil, append(twice, 5, 5)); err == nil {
		t.Error("a key that occurs twice among many was shown")
	}
}

func TestContentInSimpleForm(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what string
		in   hub.Content
		want string
	}{
		{"nothing", hub.Content{Format: hub.FormatNone}, `{"coapContentFormat":-1}`},
		{"empty CBOR", hub.Content{Type: "application/cbor", Format: 60}, `{"contentType":"application/cbor","coapContentFormat":60}`},
		{"bad CBOR stays", hub.Content{Type: "application/vnd.ocf+cbor", Format: 10000, Data: []byte{0xff}}, `{"contentType":"application/vnd.ocf+cbor","coapContentFormat":10000,"data":"/w=="}`},
		{"bad JSON stays", hub.Content{Type: "application/json", Format: 50, Data: []byte("{")}, `{"contentType":"application/json","coapContentFormat":50,"data":"ew=="}`},
		{"two JSON documents", hub.Content{Type: "application/json", Format: 50, Data: []byte("1 2")}, `{"contentType":"application/json","coapContentFormat":50,"data":"MSAy"}`},
		{"JSON of bad UTF-8", hub.Content{Type: "application/json", Format: 50, Data: []byte("\"\xff\"")}, `{"contentType":"application/json","coapContentFormat":50,"data":"Iv8i"}`},
		{"JSON digits", hub.Content{Type: "application/json", Format: 50, Data: []byte("[9007199254740993,1e400,0.10]\n")}, `[9007199254740993,1e400,0.10]`},
		{"JSON tags", hub.Content{Type: "application/json", Format: 50, Data: []byte(`"<a>"`)}, `"\u003ca\u003e"`},
		{"text", hub.Content{Type: "Text/Plain;charset=utf-8", Format: 0, Data: []byte("a\nb")}, `"a\nb"`},
		{"text of bad UTF-8", hub.Content{Type: "text/plain", Format: 0, Data: []byte{0xff}}, `{"contentType":"text/plain","coapContentFormat":0,"data":"/w=="}`},
		{"octets", hub.Content{Type: "application/octet-stream", Format: 42, Data: []byte{1}}, `{"contentType":"application/octet-stream","coapContentFormat":42,"data":"AQ=="}`},
		{"unknown format", hub.Content{Format: 12345, Data: []byte{1}}, `{"coapContentFormat":12345,"data":"AQ=="}`},
		{"type from the format", hub.Content{Format: 60, Data: []byte{1}}, `1`},
		{"bad UTF-8 in the type", hub.Content{Type: "a/\xff", Format: -1, Data: []byte{1}}, "{\"contentType\":\"a/\ufffd\",\"coapContentFormat\":-1,\"data\":\"AQ==\"}"},
	} {
		want(t, c.what, string(appendContent(nil, c.in)), c.want)
	}
}

// FuzzContent: whatever a device sends is one line of valid JSON of bounded size, and what fxamacker's strict decoder takes
// for a JSON-like value comes out with the same meaning.
func FuzzContent(f *testing.F) {
	for _, c := range lamp(lampA, "x", true).Resources.(resourceSet) {
		f.Add(uint8(0), c.Content.Data)
		f.Add(uint8(1), c.Content.Data)
	}
	for _, s := range []string{"bf61610161629f0203ffff", "c249010000000000000000", "f97e00", "7f61c361bcff", "a2616101616102", "5b0000000100000000", "fb7e37e43c8800759c", "d74401020304"} {
		f.Add(uint8(0), unhex(f, s))
	}
	f.Add(uint8(1), []byte("{\"a\":[1,\n2.50,\"\\u2028<\"]}"))
	f.Add(uint8(2), []byte("a\x00b\u2028"))
	strict, err := cbor.DecOptions{DupMapKey: cbor.DupMapKeyEnforcedAPF, MaxNestedLevels: 65, UTF8: cbor.UTF8RejectInvalid, DefaultMapType: nil}.DecMode()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, kind uint8, data []byte) {
		if len(data) > 4096 {
			return
		}
		c := hub.Content{Type: []string{"application/cbor", "application/json", "text/plain", "application/octet-stream"}[kind%4], Data: data}
		b := appendContent(nil, c)
		if !json.Valid(b) || !utf8.Valid(b) || bytes.ContainsAny(b, "\n\r") {
			t.Fatalf("no line of JSON: %q", b)
		}
		if len(b) > 8*len(data)+8*maxBignum+128 {
			t.Fatalf("%d bytes became %d", len(data), len(b))
		}
		if kind%4 != 0 || len(data) == 0 {
			return
		}
		var v any
		err := strict.Unmarshal(data, &v)
		got, ours := appendCBOR(nil, data)
		if ours == nil && err != nil {
			// Ours takes keys that only differ before their conversion for the same, the other way cannot be: what the
			// strict decoder refuses must not be shown, but for keys that Go maps cannot hold.
			if !strings.Contains(err.Error(), "map key") && !strings.Contains(err.Error(), "time") && !strings.Contains(err.Error(), "tag") {
				t.Fatalf("shown as %s, but %v", got, err)
			}
			return
		}
		if n, ok := v.(uint64); ok && ours == nil {
			want(t, "number", string(got), new(big.Int).SetUint64(n).String())
		}
		if s, ok := v.(string); ok && ours == nil && data[0]>>5 == 3 {
			var back string
			if json.Unmarshal(got, &back) != nil || back != s {
				t.Fatalf("%q became %s", s, got)
			}
		}
		if f, ok := v.(float64); ok && ours == nil && !math.IsNaN(f) && !math.IsInf(f, 0) && data[0]>>5 == 7 {
			var back float64
			if json.Unmarshal(got, &back) != nil || back != f {
				t.Fatalf("%v became %s", f, got)
			}
		}
	})
}
