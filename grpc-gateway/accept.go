package grpcgateway

import (
	"bytes"
	"encoding/json"
	"math/big"
	"net/http"
	"strings"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
)

// Media types of answers in CBOR: one item, and for lists a sequence of items (RFC 8742).
const (
	cborType     = "application/cbor"
	cborSequence = "application/cbor-seq"
)

// wantsCBOR reports whether the caller asks for CBOR and nothing else. As with protobuf's JSON the header has to be exactly
// that: whoever takes JSON too gets what older clients get.
func wantsCBOR(r *http.Request) bool {
	a := r.Header.Get("Accept")
	return a == cborType || a == cborSequence
}

// inForm turns a body of simple JSON into what the caller asked for. Only JSON has another form; pages and the like have not.
func (r *request) inForm(contentType string, b []byte) (string, []byte, error) {
	if !r.cbor || contentType != "application/json" {
		return contentType, b, nil
	}
	b, err := cborFrom(b)
	return cborType, b, err
}

// cborFrom makes the CBOR of a JSON document of ours (RFC 8949, Section 6.2): integers stay integers with all their digits,
// other numbers are 64-bit floats, or shorter ones of the same value.
func cborFrom(doc []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "http.cbor", Err: err}
	}
	b, err := cborMode.Marshal(withNumbers(v))
	if err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "http.cbor", Err: err}
	}
	return b, nil
}

// cborMode is deterministic (RFC 8949, Section 4.2.1), so that equal answers have equal ETags.
var cborMode = func() cbor.EncMode {
	m, err := cbor.EncOptions{Sort: cbor.SortBytewiseLexical, ShortestFloat: cbor.ShortestFloat16, BigIntConvert: cbor.BigIntConvertShortest}.EncMode()
	if err != nil {
		panic(err) // these options are good
	}
	return m
}()

// withNumbers replaces the digits that were kept by numbers.
func withNumbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		if !strings.ContainsAny(string(v), ".eE") && v != "-0" {
			if n, ok := new(big.Int).SetString(string(v), 10); ok {
				return n
			}
		}
		f, _ := v.Float64() // out of range is infinite, which JSON has no digits for
		return f
	case []any:
		for i := range v {
			v[i] = withNumbers(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = withNumbers(v[k])
		}
	}
	return v
}

// isCBOR reports whether a media type is one of CBOR.
func isCBOR(media string) bool { return media == cborType || media == mediaOCFCBOR }
