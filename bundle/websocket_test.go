package bundle_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// A device lives over WebSocket as over anything else, with a token for all its identity: no certificate is asked for, and
// its token is good for itself alone. The HTTP door has one place only, and that stays free.
func TestDeviceOverWebSocket(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, tls, scheme string }{
		{"plain on loopback", "false", "coap+ws"},
		{"TLS", "true", "coaps+ws"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.webSocket.enabled=true", "grpcGateway.api.http.tls="+tc.tls,
				"grpcGateway.limits.maxConnections=1"))
			at := h.Endpoints.CoAPWS + h.Endpoints.CoAPSWS
			if !strings.HasPrefix(at, tc.scheme+"://127.0.0.1:") {
				t.Fatalf("the endpoint is %q", at)
			}
			pem, err := h.Control.Root(t.Context(), "https")
			if err != nil {
				t.Fatal(err)
			}
			roots := x509.NewCertPool()
			roots.AppendCertsFromPEM([]byte(pem))
			conf := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
			enter := func(id string) (*device.Device, hubtest.Onboarding) {
				t.Helper()
				o := h.Onboard(t, id)
				d, err := device.New(device.Config{ID: id, HubAddr: at, TLS: conf, Provider: o.AuthorizationProvider})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(d.Close)
				if err := d.Connect(t.Context()); err != nil {
					t.Fatal(err)
				}
				return d, o
			}
			d, o := enter(lamp)
			for _, step := range []func() (device.Answer, error){
				func() (device.Answer, error) { return d.SignUp(t.Context(), o.Code) },
				func() (device.Answer, error) { return d.SignIn(t.Context()) },
				func() (device.Answer, error) { return d.Publish(t.Context()) },
			} {
				if a, err := step(); err != nil || !a.OK() {
					t.Fatalf("%v, %v", a, err)
				}
			}
			web := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: conf}}
			defer web.CloseIdleConnections()
			twin := func() string {
				code, body := getWith(t, web, h.HTTP+"/api/v1/devices/"+lamp+"/resources/light/1", h.Token(t))
				if code != http.StatusOK {
					return ""
				}
				return body
			}
			eventually(t, "the twin has the light", func() bool { return strings.Contains(twin(), `"state":false`) })
			if _, err := d.Set("/light/1", map[string]any{"state": true}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the notification is in the twin", func() bool { return strings.Contains(twin(), `"state":true`) })
			// The client API has no number for WebSocket.
			want := strings.TrimSuffix(tc.scheme, "ws") + "tcp"
			if s, err := h.Control.Device(t.Context(), lamp); err != nil || !s.Online || s.Protocol != want || s.TLS == "" == (tc.scheme == "coaps+ws") {
				t.Errorf("%+v, %v", s, err)
			}

			web.CloseIdleConnections() // it has the one place
			other, _ := enter("00000000-0000-4000-8000-00000000abcd")
			other.SetCredentials(d.Credentials())
			if a, err := other.SignIn(t.Context()); err != nil || a.Code != codes.Unauthorized {
				t.Errorf("with another device's token: %v, %v", a, err)
			}
			stopsQuickly(t, h, d)
		})
	}
}

// The HTTP door's guards stand before the devices', who look at origins themselves; and nothing is open that nobody opened.
func TestWebSocketDoor(t *testing.T) {
	t.Parallel()
	off := hubtest.Start(t)
	if off.Endpoints.CoAPWS != "" || off.Endpoints.CoAPSWS != "" {
		t.Errorf("endpoints %+v", off.Endpoints)
	}
	if code, body := get(t, off.HTTP+"/.well-known/coap", ""); code != http.StatusNotFound {
		t.Errorf("it is off, and says %d %s", code, body)
	}

	// The devices' door needs no other listener.
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.webSocket.enabled=true", "coapGateway.api.coap.address=",
		"coapGateway.api.coap.webSocket.origins=[https://console.example]"))
	url := "ws" + strings.TrimPrefix(h.HTTP, "http") + "/.well-known/coap"
	dial := func(host, origin string) (*websocket.Conn, int) {
		t.Helper()
		o := &websocket.DialOptions{Subprotocols: []string{"coap"}, Host: host, HTTPHeader: http.Header{}}
		if origin != "" {
			o.HTTPHeader.Set("Origin", origin)
		}
		c, res, err := websocket.Dial(t.Context(), url, o)
		if res == nil {
			t.Fatal(err)
		}
		return c, res.StatusCode
	}
	for _, tc := range []struct {
		host, origin string
		want         int
	}{
		{"evil.example", "", http.StatusMisdirectedRequest},
		{"evil.example", "http://evil.example", http.StatusMisdirectedRequest},
		{"", "https://evil.example", http.StatusForbidden},
		{"", "https://console.example", http.StatusSwitchingProtocols},
		{"", h.HTTP, http.StatusSwitchingProtocols},
	} {
		c, got := dial(tc.host, tc.origin)
		if got != tc.want {
			t.Errorf("host %q, origin %q: %d, want %d", tc.host, tc.origin, got, tc.want)
		}
		if c != nil {
			_ = c.Close(websocket.StatusNormalClosure, "")
		}
	}
	if rs, err := h.Control.Refused(t.Context()); err != nil || len(rs) != 1 || !strings.HasPrefix(rs[0].Reason, "websocket: ") {
		t.Errorf("refused: %+v, %v", rs, err) // the host was refused before
	}

	// A hub that stops says so: Release (RFC 8323, Section 5.5), then "going away".
	c, _ := dial("", "")
	stopped := make(chan struct{})
	go func() { defer close(stopped); h.Stop(t) }()
	var said []codes.Code
	for {
		_, m, err := c.Read(t.Context())
		if err == nil {
			said = append(said, codes.Code(m[1]))
			continue
		}
		var ce websocket.CloseError
		if !errors.As(err, &ce) || ce.Code != websocket.StatusGoingAway || len(said) != 2 || said[0] != codes.CSM || said[1] != codes.Release {
			t.Errorf("after %v: %v", said, err)
		}
		break
	}
	<-stopped
}
