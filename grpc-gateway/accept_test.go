package grpcgateway

import (
	"bytes"
	"encoding/json"
	"math"
	"reflect"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
)

// items decodes a CBOR sequence.
func (a answer) items() []any {
	a.t.Helper()
	mode, err := cbor.DecOptions{DefaultMapType: reflect.TypeFor[map[string]any]()}.DecMode()
	if err != nil {
		a.t.Fatal(err)
	}
	var out []any
	for b := a.Body.Bytes(); len(b) > 0; {
		var v any
		if b, err = mode.UnmarshalFirst(b, &v); err != nil {
			a.t.Fatal(err)
		}
		out = append(out, v)
	}
	return out
}

// CBOR says the same as simple JSON; do checks it against the description too.
func TestAnswersInCBOR(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	history(w)
	const device = "/api/v1/devices/" + string(lampA)
	for _, path := range []string{
		"/api/v1/devices", device, "/api/v1/resource-links", device + "/resource-links", "/api/v1/resources", "/api/v1/devices-metadata",
		"/api/v1/events", light, "/api/v1/things", "/api/v1/things/" + string(lampA), device + "/labels", "/web_configuration.json",
	} {
		plain, packed := w.get(t, path), w.get(t, path, "Accept: application/cbor")
		var want []any
		d := json.NewDecoder(plain.Body)
		d.UseNumber()
		for d.More() {
			var v any
			if err := d.Decode(&v); err != nil {
				t.Fatal(err)
			}
			want = append(want, v)
		}
		got, err := json.Marshal(packed.items())
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		if sameJSON(t, got) != sameJSON(t, text) {
			t.Errorf("%s:\ngot  %s\nwant %s", path, got, text)
		}
	}
	want(t, "a list", w.get(t, "/api/v1/devices", "Accept: application/cbor").Header().Get("Content-Type"), "application/cbor-seq")
	want(t, "one", w.get(t, light, "Accept: application/cbor").Header().Get("Content-Type"), "application/cbor")
	want(t, "among others", w.get(t, light, "Accept: application/cbor, application/json").Header().Get("Content-Type"), "application/json")
	want(t, "an error", w.get(t, "/api/v1/devices/"+string(unknown), "Accept: application/cbor").reason(), "not-found")
	tag := w.get(t, "/api/v1/devices", "Accept: application/cbor").Header().Get("ETag")
	want(t, "conditional", w.get(t, "/api/v1/devices", "Accept: application/cbor", "If-None-Match: "+tag).Code, 304)
	want(t, "not the ETag of the other form", w.get(t, "/api/v1/devices", "If-None-Match: "+tag).Code, 200)
	if packed := w.get(t, "/api/v1/devices", "Accept: application/cbor").Body.Len(); packed >= w.get(t, "/api/v1/devices").Body.Len() {
		t.Errorf("CBOR takes %d bytes, more than JSON", packed)
	}
}

// A content that is CBOR comes as the device sent it; others are converted.
func TestContentsInCBOR(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const device = "/api/v1/devices/" + string(lampA) + "/resources"
	types, _ := w.pictures[lampA].Resources.Get("/types")
	a := w.get(t, device+"/types?onlyContent=1", "Accept: application/cbor")
	want(t, "as it came", bytes.Equal(a.Body.Bytes(), types.Content.Data), true)
	for path, value := range map[string]any{
		"/json": map[string]any{"a": uint64(1), "b": []any{1.5, nil}}, "/text": "plain words", "/late": nil,
	} {
		got := w.get(t, device+path+"?onlyContent=1", "Accept: application/cbor").items()
		if len(got) != 1 || !reflect.DeepEqual(got[0], value) {
			t.Errorf("%s: %#v", path, got)
		}
	}
}

func TestCBORKeepsDigits(t *testing.T) {
	t.Parallel()
	for doc, hex := range map[string][]byte{
		`9007199254740993`: {0x1b, 0, 0x20, 0, 0, 0, 0, 0, 1}, `-1`: {0x20}, `18446744073709551616`: {0xc2, 0x49, 1, 0, 0, 0, 0, 0, 0, 0, 0},
		`1.5`: {0xf9, 0x3e, 0}, `-0`: {0xf9, 0x80, 0}, `1e3`: {0xf9, 0x63, 0xd0}, `""`: {0x60}, `null`: {0xf6}, `{"b":1,"a":true}`: {0xa2, 0x61, 'a', 0xf5, 0x61, 'b', 1},
		`18446744073709551615`: {0x1b, 255, 255, 255, 255, 255, 255, 255, 255},
	} {
		got, err := cborFrom([]byte(doc))
		if err != nil || !bytes.Equal(got, hex) {
			t.Errorf("%s is %x, %v; want %x", doc, got, err, hex)
		}
	}
	if f, _ := withNumbers(json.Number("1e999")).(float64); !math.IsInf(f, 1) {
		t.Errorf("out of range is %v", f)
	}
}

func TestBodiesInCBOR(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const path = "/api/v1/devices/" + string(lampA) + "/labels"
	put := func(body []byte) answer {
		return w.ask(t, "alice", "PUT", path, bytes.NewReader(body), "Content-Type: application/cbor")
	}
	want(t, "put", put(cborOf(map[string]any{"labels": hub.Labels{"room": "hall"}})).Body.String(), `{"labels":{"room":"hall"}}`+"\n")
	for what, body := range map[string][]byte{"JSON": []byte(`{"labels":{}}`), "nothing": nil, "half": {0xa1}, "another object": cborOf(map[string]any{"x": 1})} {
		want(t, what, put(body).reason(), "body-invalid")
	}
}
