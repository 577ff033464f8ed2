package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"math"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/hubtest"
)

// datagrams is what a peer needs of RFC 7252's message layer: message IDs, acknowledgements, retransmission of what was not
// acknowledged, and the same answer to the same message.
type datagrams struct {
	mu      sync.Mutex // guards all below
	next    int32
	unheard map[int32]*time.Timer // of confirmable messages, by their ID
	asks    map[int32]chan<- bool // who wants to know whether it was acknowledged (true) or rejected
	replies map[int32][]byte      // to the hub's confirmable messages
}

func newDatagrams() *datagrams {
	return &datagrams{unheard: map[int32]*time.Timer{}, asks: map[int32]chan<- bool{}, replies: map[int32][]byte{}}
}

func (d *datagrams) settle(id int32, acknowledged bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t := d.unheard[id]; t != nil {
		t.Stop()
		delete(d.unheard, id)
	}
	if heard := d.asks[id]; heard != nil {
		heard <- acknowledged
		delete(d.asks, id)
	}
}

// dialUDP is a peer over plain UDP.
func dialUDP(ctx context.Context, addr string) (*peer, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "udp", addr)
	if err != nil {
		return nil, err
	}
	return newPeer(conn, newDatagrams()), nil
}

// dialDTLS is a peer over DTLS with the certificate and CAs of conf.
func dialDTLS(ctx context.Context, addr string, conf *tls.Config) (*peer, error) {
	opts := []dtls.ClientOption{
		dtls.WithRootCAs(conf.RootCAs), dtls.WithServerName(conf.ServerName),
		dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8),
	}
	if len(conf.Certificates) > 0 {
		opts = append(opts, dtls.WithCertificates(conf.Certificates...))
	}
	return shake(ctx, addr, opts...)
}

// dialPSK is a peer over DTLS with a pre-shared key.
func dialPSK(ctx context.Context, addr, identity string, key []byte) (*peer, error) {
	return shake(ctx, addr,
		dtls.WithPSK(func([]byte) ([]byte, error) { return key, nil }), dtls.WithPSKIdentityHint([]byte(identity)),
		dtls.WithCipherSuites(dtls.TLS_PSK_WITH_AES_128_CCM_8))
}

// shake makes the association. It asks for a connection ID, as devices behind NAT do.
func shake(ctx context.Context, addr string, opts ...dtls.ClientOption) (*peer, error) {
	at, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	sock, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	conn, err := dtls.ClientWithOptions(sock, at, append(opts, dtls.WithConnectionIDGenerator(dtls.OnlySendCIDGenerator()))...)
	if err == nil {
		if err = conn.HandshakeContext(ctx); err == nil {
			return newPeer(conn, newDatagrams()), nil
		}
		conn.Close()
	}
	sock.Close()
	return nil, err
}

// sendDatagram sends a request, or a notification, which both are confirmable, or an answer to a confirmable message. heard,
// which may be nil and must have room, is told whether the hub acknowledged it.
func (p *peer) sendDatagram(m message.Message, heard chan<- bool) error {
	d := p.datagrams
	d.mu.Lock()
	if m.Type != message.Acknowledgement {
		d.next = (d.next + 1) & math.MaxUint16
		m.Type, m.MessageID = message.Confirmable, d.next
		if heard != nil {
			d.asks[m.MessageID] = heard
		}
	}
	d.mu.Unlock()
	b, err := encodeDatagram(m)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if m.Type == message.Acknowledgement {
		d.replies[m.MessageID] = b
	} else {
		p.repeat(m.MessageID, b, 2*time.Second)
	}
	_, err = p.conn.Write(b)
	return err
}

// repeat sends b again unless it is settled; mu is held. What remains ends with the connection, whose writes fail then.
func (p *peer) repeat(id int32, b []byte, after time.Duration) {
	d := p.datagrams
	d.unheard[id] = time.AfterFunc(after, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.unheard[id] == nil {
			return
		}
		delete(d.unheard, id)
		if _, err := p.conn.Write(b); err == nil && after < 20*time.Second {
			p.repeat(id, b, 2*after)
		}
	})
}

func encodeDatagram(m message.Message) ([]byte, error) {
	n, err := coder.DefaultCoder.Size(m)
	if err != nil {
		return nil, err
	}
	b := make([]byte, n)
	_, err = coder.DefaultCoder.Encode(m, b)
	return b, err
}

// readDatagrams reads to the end of the connection.
func (p *peer) readDatagrams() {
	b := make([]byte, math.MaxUint16)
	for {
		n, err := p.conn.Read(b)
		if err != nil {
			break
		}
		m := message.Message{Options: make(message.Options, 0, 32)}
		if _, err := coder.DefaultCoder.Decode(bytes.Clone(b[:n]), &m); err == nil {
			p.takeDatagram(m)
		}
	}
	d := p.datagrams
	d.mu.Lock()
	defer d.mu.Unlock()
	for id, t := range d.unheard {
		t.Stop()
		delete(d.unheard, id)
	}
}

func (p *peer) takeDatagram(m message.Message) {
	d := p.datagrams
	if m.Type == message.Acknowledgement || m.Type == message.Reset {
		d.settle(m.MessageID, m.Type == message.Acknowledgement)
		if m.Type == message.Acknowledgement && m.Code != codes.Empty {
			p.take(m)
		}
		return
	}
	if m.Type == message.Confirmable && m.Code == codes.Empty {
		// RFC 7252, Section 4.3: a ping. So the hub learns that the address is ours.
		if b, err := encodeDatagram(message.Message{Type: message.Reset, MessageID: m.MessageID}); err == nil {
			_, _ = p.conn.Write(b)
		}
		return
	}
	if m.Type == message.Confirmable {
		d.mu.Lock()
		again := d.replies[m.MessageID]
		d.mu.Unlock()
		if again != nil {
			_, _ = p.conn.Write(again)
			return
		}
	}
	if m.Code>>5 == 0 {
		p.take(m)
		return
	}
	if m.Type == message.Confirmable {
		_ = p.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
	}
	p.take(m)
}

// TestReplacedPSKEndsTheSession: who has a key that was replaced is out at once, signed in or not.
func TestReplacedPSKEndsTheSession(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	lamp := deviceID(1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var key []byte
	connect := func() *peer {
		t.Helper()
		p, err := dialPSK(ctx, h.CoAPSUDP, lamp, key)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(p.close)
		return p
	}
	ask := func(p *peer, path string, body map[string]any) message.Message {
		t.Helper()
		b, err := cbor.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		res, closed, err := p.do(ctx, request(codes.POST, path, b))
		if err != nil || closed {
			t.Fatalf("POST %s: %v, closed %v", path, err, closed)
		}
		return res
	}
	_, key = h.PSK(t, lamp)
	p, idle := connect(), connect()
	var tokens struct {
		Access string `cbor:"accesstoken"`
	}
	if res := ask(p, "/oic/sec/account", map[string]any{"accesstoken": h.Code(t, lamp)}); cbor.Unmarshal(res.Payload, &tokens) != nil || tokens.Access == "" {
		t.Fatalf("sign-up: %s %q", codeText(res.Code), res.Payload)
	}
	signIn := map[string]any{"uid": "admin", "accesstoken": tokens.Access, "login": true}
	if res := ask(p, "/oic/sec/session", signIn); res.Code != codes.Changed {
		t.Fatalf("sign-in: %s %q", codeText(res.Code), res.Payload)
	}
	_, key = h.PSK(t, lamp)
	if !p.waitClosed(5 * time.Second) {
		t.Error("the session goes on with a key that was replaced")
	}
	if res := ask(idle, "/oic/sec/session", signIn); res.Code != codes.Unauthorized || !strings.HasPrefix(string(res.Payload), "key-replaced:") {
		t.Errorf("sign-in with a key that was replaced: %s %q", codeText(res.Code), res.Payload)
	}
	if res := ask(connect(), "/oic/sec/session", signIn); res.Code != codes.Changed {
		t.Errorf("sign-in with the newer key: %s %q", codeText(res.Code), res.Payload)
	}
	// Its owner makes a key, and takes it away, over the API.
	a := application(t, h)
	path := "/api/v1/devices/" + lamp + "/pre-shared-key"
	var made struct{ Identity, Key string }
	if status := a.ask(http.MethodPost, path, "", &made); status != http.StatusOK || made.Identity != lamp {
		t.Fatalf("making a key over the API: %d, %+v", status, made)
	}
	key = []byte(made.Key)
	p = connect()
	if res := ask(p, "/oic/sec/session", signIn); res.Code != codes.Changed {
		t.Errorf("sign-in with the key of the API: %s %q", codeText(res.Code), res.Payload)
	}
	if status := a.ask(http.MethodDelete, path, "", nil); status != http.StatusOK {
		t.Errorf("removing the key: %d", status)
	}
	if !p.waitClosed(5 * time.Second) {
		t.Error("the session goes on with a key that was removed")
	}
}

// TestPSK: a key given out by the hub is good for one device, and until the next one is given out.
func TestPSK(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	lamp, fan := deviceID(1), deviceID(2)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	ask := func(identity string, key []byte) (message.Message, error) {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		p, err := dialPSK(ctx, h.CoAPSUDP, identity, key)
		if err != nil {
			return message.Message{}, err
		}
		defer p.close()
		// di is ignored: the key says who it is, and the code of the lamp is worth nothing to another.
		body, err := cbor.Marshal(map[string]any{"di": lamp, "accesstoken": h.Code(t, lamp)})
		if err != nil {
			t.Fatal(err)
		}
		res, _, err := p.do(ctx, request(codes.POST, "/oic/sec/account", body))
		return res, err
	}
	identity, key := h.PSK(t, lamp)
	if res, err := ask(identity, key); err != nil || res.Code != codes.Changed {
		t.Fatalf("sign-up with the key: %v, %v", codeText(res.Code), err)
	}
	other, otherKey := h.PSK(t, fan)
	if res, err := ask(other, otherKey); err != nil || res.Code != codes.Unauthorized {
		t.Errorf("sign-up with another device's key: %v, %v", codeText(res.Code), err)
	}
	h.Restart(t)
	if res, err := ask(identity, key); err != nil || res.Code != codes.Changed {
		t.Errorf("sign-up after a restart: %v, %v", codeText(res.Code), err)
	}
	_, newer := h.PSK(t, lamp)
	var refused sync.WaitGroup
	for name, c := range map[string]struct {
		identity string
		key      []byte
	}{
		"replaced":         {identity, key},
		"another device's": {identity, otherKey},
		"unknown device":   {deviceID(3), key},
		"no device":        {"lamp", key},
	} {
		refused.Go(func() { // a client with a wrong key learns of it when it gives up
			if _, err := ask(c.identity, c.key); err == nil {
				t.Errorf("a key that is worth nothing got in: %s", name)
			}
		})
	}
	refused.Wait()
	if res, err := ask(identity, newer); err != nil || res.Code != codes.Changed {
		t.Errorf("sign-up with the newer key: %v, %v", codeText(res.Code), err)
	}
	// The device signed up with a key: a certificate is another set of credentials.
	p, err := dialDTLS(ctx, h.CoAPSUDP, h.Onboard(t, lamp).TLS)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	body, err := cbor.Marshal(map[string]any{"accesstoken": h.Code(t, lamp)})
	if err != nil {
		t.Fatal(err)
	}
	if res, _, err := p.do(ctx, request(codes.POST, "/oic/sec/account", body)); err != nil || res.Code != codes.Unauthorized {
		t.Errorf("sign-up with a certificate: %v, %v", codeText(res.Code), err)
	}
	off := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.tls.psk=false"))
	if _, err := off.Control.Onboard(ctx, bundle.OnboardRequest{DeviceID: lamp, PSK: true}); err == nil {
		t.Error("a key was given out although keys are off")
	}
	if _, err := dialPSK(ctx, off.CoAPSUDP, identity, newer); err == nil {
		t.Error("a key got in although keys are off")
	}
}
