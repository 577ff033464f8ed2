package enrolmentgateway

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// fuzzed is a gateway without listeners, for a fuzzer's messages.
func fuzzed(f *testing.F) (*Gateway, *fake) {
	f.Helper()
	ca := issuer(f)
	a := &fake{certs: append([]*x509.Certificate{pair(f, ca, lampID).Leaf}, ca.Leaf)}
	g, err := New(Default(), Deps{Authority: a, EngineMetrics: coap.NewMetrics(nil)}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		f.Fatal(err)
	}
	return g, a
}

// Whatever is asked over HTTP, the answer is one of the protocol's, and the authority is asked only about a request that was whole.
func FuzzHTTP(f *testing.F) {
	g, a := fuzzed(f)
	h := g.handler()
	const csr = "\x30\x03abc"
	text := base64.StdEncoding.EncodeToString([]byte(csr))
	for _, op := range []string{"cacerts", "csrattrs", "simpleenroll", "simplereenroll", "serverkeygen", ""} {
		f.Add(http.MethodPost, est.Path+op, "application/pkcs10", "", []byte(text))
		f.Add(http.MethodGet, est.Path+op, "", "Basic eDp5", []byte(csr))
	}
	f.Add(http.MethodPost, tokenPath, "application/json", "Bearer x", []byte(`{"token":"t","csr":"c"}`))
	f.Add(http.MethodPost, tokenPath, "", "", []byte(`{"token":"t","token":{},"csr":[[[[]]]]}`))
	f.Add("\x00", "//", "a/b;c=\"", "Basic", bytes.Repeat([]byte("A"), maxBody+1))
	codes := []int{200, 400, 401, 404, 405, 413, 415}
	f.Fuzz(func(t *testing.T, method, path, format, auth string, body []byte) {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", bytes.NewReader(body))
		r.Method, r.URL.Path, r.TLS = method, path, &tls.ConnectionState{}
		r.Header.Set("Content-Type", format)
		r.Header.Set("Authorization", auth)
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		a.mu.Lock()
		asked := a.asked
		a.asked = nil
		a.mu.Unlock()
		if !slices.Contains(codes, w.Code) {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		issued := w.Code == http.StatusOK && r.Method == http.MethodPost
		if len(asked) > 1 || (len(asked) == 1) != issued {
			t.Errorf("%d, and the authority was asked %d times", w.Code, len(asked))
		}
		for _, q := range asked {
			if q.csr == "" || len(q.csr) > maxBody {
				t.Errorf("a request of %d bytes", len(q.csr))
			}
			if path == est.Path+"simplereenroll" && q.proof.Token != "" {
				t.Error("a token renews")
			}
		}
	})
}

// Whatever a request with a one-time token holds over CoAP, it is refused as such, or both texts are there.
func FuzzTokenRequest(f *testing.F) {
	g, a := fuzzed(f)
	p := &peer{gw: g, log: slog.New(slog.DiscardHandler)}
	for _, v := range []any{
		map[string]any{"token": "t", "csr": "c"},
		map[string]any{"token": "t"},
		map[string]any{"token": 1, "csr": []byte("c")},
		map[string]any{"csr": strings.Repeat("c", 300), "token": "t", "more": map[string]any{"x": []int{1}}},
		[]any{},
		nil,
	} {
		b, err := cbor.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	for _, b := range [][]byte{{0xbf, 0xff}, {0xbb, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, bytes.Repeat([]byte{0x81}, 100), {0xa1, 0x65, 't', 'o', 'k', 'e', 'n', 0x61, 0xff}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, answer, err := p.enrolByToken(t.Context(), &coap.Message{Payload: b}, 0)
		a.mu.Lock()
		asked := a.asked
		a.asked = nil
		a.mu.Unlock()
		if err != nil {
			if code, _ := hub.Public(err); code != "body-invalid" || len(asked) > 0 {
				t.Errorf("%v, and the authority was asked %d times", err, len(asked))
			}
			return
		}
		if len(asked) != 1 || asked[0].proof.Token == "" || asked[0].csr == "" || len(answer) == 0 {
			t.Errorf("the authority was asked %+v", asked)
		}
	})
}
