package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/issuer"
)

// office is a hub at which cells of TestIdentity are played, and everything that good and bad papers are made of.
type office struct {
	*hubtest.Hub
	t *testing.T
	setup
	op          *issuer.Issuer // nil: the embedded provider
	owner       string
	application string // an access token of the owner's
	roots       *x509.CertPool

	key               *ecdsa.PrivateKey // of all devices
	other             *ecdsa.PrivateKey // of nobody
	issuing, stranger tls.Certificate   // the hub's authority, and another's
	double            tls.Certificate   // has the names of the hub's authority, and the other key
	revoked           tls.Certificate

	number atomic.Int32

	mu      sync.Mutex // guards all below
	happens map[string][]string
	bump    chan struct{}
}

// claimName is that of the claim with the device's ID. Names like URIs are literal; the hub's own provider has its default.
func (s setup) claimName() string {
	if s.embedded {
		return "device_id"
	}
	return "https://example.com/deviceId"
}

func startOffice(t *testing.T, s setup) *office {
	t.Helper()
	o := &office{t: t, setup: s, owner: "alice", happens: map[string][]string{}, bump: make(chan struct{})}
	config := []string{
		fmt.Sprintf("coapGateway.api.coap.tls.clientCertificateRequired=%v", s.certificate),
		fmt.Sprintf("coapGateway.api.coap.tls.identityPropertiesRequired=%v", !s.anyName),
		fmt.Sprintf("coapGateway.api.coap.authorization.strictDeviceID=%v", s.strict),
	}
	if s.claim {
		config = append(config, "coapGateway.api.coap.authorization.deviceIDClaim="+s.claimName())
	}
	if !s.embedded {
		o.op = issuer.Start(t)
		o.op.MintWithForeignKey(nil) // the key is made here, not while a device waits
		secret := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(secret, []byte(issuer.ClientSecret), 0o600); err != nil {
			t.Fatal(err)
		}
		setting := func(v map[string]any) string {
			b, err := json.Marshal([]any{v})
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		issuers := map[string]any{"authority": o.op.URL(), "audience": []string{issuer.Audience}}
		if s.claim {
			issuers["deviceIDClaim"] = s.claimName()
		}
		config = append(config, "authorization.issuers="+setting(issuers),
			"coapGateway.api.coap.authorization.providers="+setting(map[string]any{
				"name": "op", "authority": o.op.URL(), "clientID": issuer.ClientID, "clientSecretFile": secret, "redirectURL": issuer.RedirectURL,
			}))
	}
	o.Hub = hubtest.Start(t, hubtest.WithConfig(config...))
	if s.embedded {
		o.owner, o.application = "admin", o.Token(t)
	} else {
		o.application = o.op.Mint(nil)
	}
	text, err := os.ReadFile(filepath.Join(o.Data, "keys", "device-issuing.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if o.issuing, err = tls.X509KeyPair(text, text); err != nil {
		t.Fatal(err)
	}
	on, err := o.Control.Onboard(t.Context(), bundle.OnboardRequest{DeviceID: deviceID(1), Certificate: true})
	if err != nil {
		t.Fatal(err)
	}
	o.roots = x509.NewCertPool()
	o.roots.AppendCertsFromPEM([]byte(on.CA))
	for _, k := range []**ecdsa.PrivateKey{&o.key, &o.other} {
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	authority := func(name pkix.Name, id []byte) tls.Certificate {
		c := *o.issuing.Leaf
		c.Subject, c.RawSubject, c.SubjectKeyId, c.PublicKey = name, nil, id, &o.other.PublicKey
		return o.sign(&c, tls.Certificate{Leaf: &c, PrivateKey: o.other}, o.other)
	}
	o.stranger = authority(pkix.Name{CommonName: "a stranger"}, nil)
	o.double = authority(o.issuing.Leaf.Subject, o.issuing.Leaf.SubjectKeyId)
	o.revoked = o.identity(o.id(), nil, o.issuing)
	serial := fmt.Sprintf("%X", o.revoked.Leaf.SerialNumber) // as openssl prints it
	if _, err := o.Control.RevokeCertificates(t.Context(), bundle.CertificatesRequest{Serials: []string{serial}}); err != nil {
		t.Fatal(err)
	}
	o.listen()
	return o
}

// id makes the ID of a device that nobody has.
func (o *office) id() string { return deviceID(0xabc000 + int(o.number.Add(1))) }

// sign has a certificate signed; it is shown with the one of its authority.
func (o *office) sign(template *x509.Certificate, by tls.Certificate, key *ecdsa.PrivateKey) tls.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, template, by.Leaf, &key.PublicKey, by.PrivateKey)
	if err != nil {
		o.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		o.t.Fatal(err)
	}
	return tls.Certificate{Certificate: append([][]byte{der}, by.Certificate...), Leaf: leaf, PrivateKey: key}
}

// identity makes a device's certificate, as the hub would but for what spoil does.
func (o *office) identity(id string, spoil func(*x509.Certificate), by tls.Certificate) tls.Certificate {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		o.t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "uuid:" + id}, KeyUsage: x509.KeyUsageDigitalSignature,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		ExtKeyUsage:        []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 44924, 1, 6}},
	}
	if spoil != nil {
		spoil(c)
	}
	return o.sign(c, by, o.key)
}

// papers are those that a value of shows stands for. lamp and fan are the devices' IDs.
func (o *office) papers(shows, lamp, fan string) (*tls.Certificate, error) {
	cert := o.issuing
	id, spoil := lamp, func(*x509.Certificate) {}
	switch shows {
	case missing:
		return nil, nil
	case revoked:
		return &o.revoked, nil
	case forged:
		cert = o.double
	case stranger:
		cert = o.stranger
	case expired:
		spoil = func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	case noIdentity:
		spoil = func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }
	case hubs:
		id = o.ID
	case fans:
		id = fan
	case good, keyless:
	default:
		return nil, fmt.Errorf("no certificate is %s", shows)
	}
	cert = o.identity(id, spoil, cert)
	if shows == keyless {
		cert.PrivateKey = crypto.PrivateKey(o.other)
	}
	return &cert, nil
}

// visit is a connection, and how it ended.
type visit struct {
	*peer
	end   *ending
	alert atomic.Bool // the hub ended the handshake with an alert
	// separate tells of the last answer that it came in a message of its own (RFC 7252, Section 5.2.2).
	separate bool
}

// ending notes with what a stream ended.
type ending struct {
	net.Conn
	head []byte // was read already
	err  error  // set before the peer is closed
}

func (e *ending) Read(b []byte) (int, error) {
	if len(e.head) > 0 {
		n := copy(b, e.head)
		e.head = e.head[n:]
		return n, nil
	}
	n, err := e.Conn.Read(b)
	if err != nil {
		e.err = err
	}
	return n, err
}

// watched is a socket that tells of alerts in the clear: they are those of a handshake. pion waits for better ones.
type watched struct {
	net.PacketConn
	alert func()
}

func (w watched) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := w.PacketConn.ReadFrom(b)
	const header, alert, fatal = 13, 21, 2 // RFC 6347, Section 4.1; RFC 5246, Section 7.2
	if err == nil && n == header+2 && b[0] == alert && b[3] == 0 && b[4] == 0 && b[header] == fatal {
		w.alert()
	}
	return n, from, err
}

// visit connects.
func (o *office) visit(ctx context.Context, over, shows, lamp, fan string) (*visit, error) {
	v := &visit{}
	var cert *tls.Certificate
	var err error
	if shows != key && shows != wrongKey && shows != fansKey {
		if cert, err = o.papers(shows, lamp, fan); err != nil {
			return nil, err
		}
	}
	if over == "tls" {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", o.CoAPS)
		if err != nil {
			return nil, err
		}
		conf := &tls.Config{RootCAs: o.roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}
		if cert != nil { // whatever authorities the hub names: a client must not be the one that notices
			conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		}
		tc := tls.Client(conn, conf)
		if err := tc.HandshakeContext(ctx); err != nil {
			conn.Close()
			return v, err
		}
		// With TLS 1.3 a client is done before the hub has looked at its certificate. What it says at once the hub may leave unread,
		// and then TCP loses the alert: it hears first.
		head := make([]byte, 1)
		if deadline, ok := ctx.Deadline(); ok {
			_ = conn.SetReadDeadline(deadline)
		}
		if _, err := tc.Read(head); err != nil {
			conn.Close()
			return v, err
		}
		_ = conn.SetReadDeadline(time.Time{})
		v.end = &ending{Conn: tc, head: head}
		v.peer, err = startPeer(v.end)
		return v, err
	}
	opts := []dtls.ClientOption{dtls.WithConnectionIDGenerator(dtls.OnlySendCIDGenerator())}
	switch {
	case cert == nil && shows != missing:
		id, shared := lamp, []byte("not what the hub gave it")
		if shows == fansKey {
			id = fan
		}
		if shows != wrongKey {
			_, shared = o.PSK(o.t, id)
		} else {
			o.PSK(o.t, id)
		}
		opts = append(opts, dtls.WithPSK(func([]byte) ([]byte, error) { return shared, nil }), dtls.WithPSKIdentityHint([]byte(id)),
			dtls.WithCipherSuites(dtls.TLS_PSK_WITH_AES_128_CCM_8))
	default:
		opts = append(opts, dtls.WithRootCAs(o.roots), dtls.WithServerName("127.0.0.1"),
			dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8))
		if cert != nil {
			opts = append(opts, dtls.WithGetClientCertificate(func(*dtls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }))
		}
	}
	at, err := net.ResolveUDPAddr("udp", o.CoAPSUDP)
	if err != nil {
		return nil, err
	}
	sock, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := dtls.ClientWithOptions(watched{sock, func() { v.alert.Store(true); cancel() }}, at, opts...)
	if err == nil {
		if err = conn.HandshakeContext(ctx); err == nil {
			v.peer = newPeer(conn, newDatagrams())
			return v, nil
		}
		conn.Close()
	}
	sock.Close()
	return v, err
}

// turnedAway says how a handshake failed: with an alert, or not as it should.
func (v *visit) turnedAway(err error) string {
	switch {
	case err == nil:
		return "the handshake is done"
	case v.alert.Load() || strings.Contains(err.Error(), "remote error: tls:"):
		return "alert"
	}
	return fmt.Sprintf("no alert: %v", err)
}

// tokens are what a sign-up gave.
type tokensOf struct {
	Access  string `cbor:"accesstoken"`
	Refresh string `cbor:"refreshtoken"`
}

// post sends a request and says what came: "2.04", or the code and the stable code of the error.
func (v *visit) post(ctx context.Context, m message.Message, into any) (string, error) {
	res, closed, err := v.do(ctx, m)
	v.separate = res.Type == message.Confirmable
	switch {
	case closed:
		how := error(nil)
		if v.end != nil {
			how = v.end.err
		}
		return fmt.Sprintf("closed without an answer: %v", how), nil
	case err != nil:
		return "", err
	case res.Code >= codes.BadRequest:
		word, _, _ := strings.Cut(string(res.Payload), ":")
		return codeText(res.Code) + " " + word, nil
	case into != nil:
		if err := cbor.Unmarshal(res.Payload, into); err != nil {
			return "", err
		}
	}
	return codeText(res.Code), nil
}

func post(path string, body map[string]any) (message.Message, error) {
	b, err := cbor.Marshal(body)
	return request(codes.POST, path, b), err
}

// signUp registers a device with everything as it should be.
func (o *office) signUp(ctx context.Context, v *visit, id string) (t tokensOf, _ error) {
	var code string
	if o.embedded {
		code = o.Code(o.t, id)
	} else {
		code = o.op.Code(o.claims(id))
	}
	m, err := post("/oic/sec/account", map[string]any{"di": id, "accesstoken": code})
	if err != nil {
		return t, err
	}
	if got, err := v.post(ctx, m, &t); err != nil || got != "2.04" {
		return t, fmt.Errorf("the sign-up of %s got %s, %w", id, got, err)
	}
	return t, nil
}

func (o *office) claims(id string) map[string]any {
	return map[string]any{"scope": "device", o.claimName(): id}
}

// play does what a cell says, and says what came of it.
func (o *office) play(ctx context.Context, c cell, lamp, fan string) (string, error) {
	want := c.expected()
	v, err := o.visit(ctx, c.over, c.shows, lamp, fan)
	switch {
	case v == nil:
		return "", err
	case v.peer != nil:
		defer v.close()
	}
	if want.refused {
		return v.turnedAway(err), nil
	}
	if err != nil {
		return "no connection: " + err.Error(), nil
	}
	ids := map[string]string{"lamp": lamp, "fan": fan}
	tokens := map[string]tokensOf{}
	for _, name := range []string{"lamp", "fan"} {
		if !c.registered() || name == "fan" && !c.fanHasPart() {
			continue
		}
		at := v
		if !want.identified || want.proved != "" && want.proved != name {
			as := map[string]string{"lamp": good, "fan": fans}[name] // with the same kind of papers: it is pinned to them
			if strings.Contains(c.shows, key) {
				as = map[string]string{"lamp": key, "fan": fansKey}[name]
			}
			if at, err = o.visit(ctx, c.over, as, lamp, fan); err != nil {
				return "", err
			}
			defer at.close()
		}
		if tokens[name], err = o.signUp(ctx, at, ids[name]); err != nil {
			return "", err
		}
	}
	if c.within {
		who := want.proved
		if who == "" {
			who = "lamp"
		}
		m, err := post("/oic/sec/session", map[string]any{
			"di": ids[who], "uid": o.owner, "accesstoken": tokens[who].Access, "login": true,
		})
		if err != nil {
			return "", err
		}
		if got, err := v.post(ctx, m, nil); err != nil || got != "2.04" {
			return "", fmt.Errorf("the sign-in of the %s got %s, %w", who, got, err)
		}
	}
	m, err := o.request(ctx, c, ids, tokens)
	if err != nil {
		return "", err
	}
	var t tokensOf
	into := any(&t)
	if c.call == "sign-off" {
		into = nil
	}
	got, err := v.post(ctx, m, into)
	if err != nil {
		return "", err
	}
	if got[0] != '2' {
		return got + v.over(ctx, m, want.atOnce), nil
	}
	if (c.call == "sign-up" || c.call == "refresh") && (t.Access == "" || t.Refresh == "") {
		got += " without tokens"
	}
	if after, err := v.post(ctx, request(codes.GET, "/x.plgd.dev/time", nil), nil); err != nil || after != "2.05" {
		got += fmt.Sprintf(", and then %s %v", after, err)
	}
	return got, nil
}

// request makes the request of a cell.
func (o *office) request(ctx context.Context, c cell, ids map[string]string, tokens map[string]tokensOf) (message.Message, error) {
	spelled := func(value string) string {
		switch value {
		case capitals:
			return strings.ToUpper(ids["lamp"])
		case noUUID:
			return "lamp"
		}
		return ids[named(value)]
	}
	body := map[string]any{}
	if c.di != missing {
		body["di"] = spelled(c.di)
	}
	path, member := "/oic/sec/session", "accesstoken"
	switch c.call {
	case "sign-up":
		path = "/oic/sec/account"
	case "refresh":
		path, member = "/oic/sec/tokenrefresh", "refreshtoken"
		body["uid"] = o.owner
	case "sign-off":
		target := "/oic/sec/account"
		if di, ok := body["di"].(string); ok {
			target += "?di=" + di
		}
		return request(codes.DELETE, target, nil), nil
	default:
		body["uid"], body["login"] = o.owner, c.call == "sign-in"
	}
	if c.token != missing {
		token, err := o.token(ctx, c, ids, tokens, spelled)
		if err != nil {
			return message.Message{}, err
		}
		body[member] = token
	}
	return post(path, body)
}

// token makes what a cell has for a token: a code, an access token or a refresh token.
func (o *office) token(ctx context.Context, c cell, ids map[string]string, tokens map[string]tokensOf, spelled func(string) string) (string, error) {
	if !o.embedded {
		claims := o.claims(spelled(c.claim))
		switch c.claim {
		case missing:
			claims[o.claimName()] = nil
		case empty:
			claims[o.claimName()] = ""
		}
		if c.token == expired {
			claims["exp"] = time.Now().Add(-time.Hour).Unix()
		}
		make := map[string]func(map[string]any) string{"sign-up": o.op.Code, "refresh": o.op.Refresh}[c.call]
		if c.token == forged {
			make = map[string]func(map[string]any) string{"sign-up": o.op.ForgedCode, "refresh": o.op.ForgedRefresh}[c.call]
		}
		switch {
		case make != nil:
			return make(claims), nil
		case c.token == forged:
			return o.op.MintWithForeignKey(claims), nil
		}
		return o.op.Mint(claims), nil
	}
	who := named(c.claim)
	of, token := tokens[who], ""
	switch {
	case c.call == "sign-up":
		token = o.Code(o.t, ids[who])
	case c.call == "refresh":
		token = of.Refresh
	case c.claim == missing:
		token = o.application
	default:
		token = of.Access
	}
	switch c.token {
	case revoked:
		if token == o.application {
			token = o.Token(o.t)
			return token, o.revoke(ctx, token, "coaphub-cli")
		}
		return token, o.revoke(ctx, token, "coaphub-device")
	case forged: // another signature, or another code
		b := []byte(token)
		i := len(b) - 10
		b[i] = map[bool]byte{true: 'B', false: 'A'}[b[i] == 'A']
		token = string(b)
	}
	return token, nil
}

// revoke is RFC 7009.
func (o *office) revoke(ctx context.Context, token, client string) error {
	form := url.Values{"token": {token}, "client_id": {client}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.Issuer+"/revoke", strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("revoke a token: %s", res.Status)
	}
	return nil
}

// over says what is wrong with the end of a connection after an error, "" for nothing. Over TLS it is closed in order; over DTLS
// the request is answered again when it comes again, since the answer may be lost, and nothing else is; unless it is over at once.
func (v *visit) over(ctx context.Context, m message.Message, atOnce bool) string {
	if v.datagrams == nil || atOnce {
		switch {
		case atOnce: // or as always: the end may be of either kind
		case !v.waitClosed(20 * time.Second):
			return ", and the connection stays open"
		case !errors.Is(v.end.err, io.EOF):
			return fmt.Sprintf(", and the connection ends with %v", v.end.err)
		}
		return ""
	}
	v.datagrams.mu.Lock()
	m.Type, m.MessageID = message.Confirmable, v.datagrams.next
	v.datagrams.mu.Unlock()
	m.Token = v.last()
	more := request(codes.GET, "/x.plgd.dev/time", nil)
	more.Type, more.MessageID, more.Token = message.Confirmable, m.MessageID+1, message.Token("more")
	said, again := make(chan message.Message, 1), make(chan message.Message, 1)
	acknowledged := make(chan bool, 2)
	// If it answered what is new, that would come before the second answer to what is not.
	for range 2 {
		v.mu.Lock()
		v.wait[string(more.Token)], v.wait[string(m.Token)] = said, again
		v.mu.Unlock()
		if v.separate { // and was acknowledged: no more than that is needed
			v.datagrams.mu.Lock()
			v.datagrams.asks[m.MessageID] = acknowledged
			v.datagrams.mu.Unlock()
		}
		for _, m := range []message.Message{more, m} {
			b, err := encodeDatagram(m)
			if err == nil {
				_, err = v.conn.Write(b)
			}
			if err != nil {
				return fmt.Sprintf(", and then %v", err)
			}
		}
		select {
		case <-again:
		case <-acknowledged:
		case <-v.closed:
			return ", and the association ends before the same request is answered again"
		case <-ctx.Done():
			return ", and the same request gets no answer any more"
		}
	}
	select {
	case res := <-said:
		return ", and another request gets " + codeText(res.Code)
	default:
	}
	return ""
}

// last is the token of the last request.
func (v *visit) last() message.Token {
	v.mu.Lock()
	defer v.mu.Unlock()
	return append(message.Token{0xd0}, byte(v.next>>24), byte(v.next>>16), byte(v.next>>8), byte(v.next))
}

// listen hears what happens to devices, until the test ends.
func (o *office) listen() {
	o.t.Helper()
	query := "/api/v1/events/stream?eventFilter=REGISTERED&eventFilter=UNREGISTERED&eventFilter=DEVICE_METADATA_UPDATED"
	req, err := http.NewRequestWithContext(o.t.Context(), http.MethodGet, o.HTTP+query, http.NoBody)
	if err != nil {
		o.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+o.application)
	res, err := http.DefaultClient.Do(req)
	if err != nil || res.StatusCode != http.StatusOK {
		o.t.Fatalf("subscribe: %v, %+v", err, res)
	}
	lines, ended := bufio.NewScanner(res.Body), make(chan struct{})
	for lines.Scan() && !bytes.HasPrefix(lines.Bytes(), []byte("data:")) { // the first one says that it is live
	}
	go func() { // ends with the body
		defer close(ended)
		for lines.Scan() {
			if data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data:")); ok {
				o.hear(data)
			}
		}
	}()
	o.t.Cleanup(func() { res.Body.Close(); <-ended })
}

func (o *office) hear(data []byte) {
	var m struct {
		Result struct {
			DeviceRegistered, DeviceUnregistered *struct{ DeviceIDs []string }
			DeviceMetadataUpdated                *struct {
				DeviceID   string
				Connection struct{ Status string }
			}
		}
	}
	if err := json.Unmarshal(data, &m); err != nil {
		o.t.Errorf("an event: %v in %s", err, data)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	note := func(id, what string) {
		if is := o.happens[id]; !slices.Contains(is[max(0, len(is)-1):], what) {
			o.happens[id] = append(is, what)
		}
	}
	switch r := m.Result; {
	case r.DeviceRegistered != nil:
		for _, id := range r.DeviceRegistered.DeviceIDs {
			note(id, "registered")
		}
	case r.DeviceUnregistered != nil:
		for _, id := range r.DeviceUnregistered.DeviceIDs {
			note(id, "unregistered")
		}
	case r.DeviceMetadataUpdated != nil: // the twin's state, too
		note(r.DeviceMetadataUpdated.DeviceID, strings.ToLower(r.DeviceMetadataUpdated.Connection.Status))
	}
	close(o.bump)
	o.bump = make(chan struct{})
}

// check plays cells, some at a time, and compares what came with what is specified.
func (o *office) check(cells []cell) {
	ctx, cancel := context.WithTimeout(o.t.Context(), 30*time.Minute)
	defer cancel()
	type part struct {
		cell cell
		want []string
	}
	var mu sync.Mutex // guards parts
	parts := map[string]part{}
	var crowd errgroup.Group
	crowd.SetLimit(16)
	for _, c := range cells {
		crowd.Go(func() error {
			lamp, fan := o.id(), o.id()
			h := c.history()
			mu.Lock()
			parts[lamp], parts[fan] = part{c, h["lamp"]}, part{c, h["fan"]}
			mu.Unlock()
			own, stop := context.WithTimeout(ctx, time.Minute)
			defer stop()
			want := []string{"2.04"}
			switch in := c.expected(); {
			case in.refused:
				want = []string{"alert"}
			case len(in.faults) > 0:
				want = in.faults
			case c.call == "sign-off":
				want = []string{"2.02"}
			}
			got, err := o.play(own, c, lamp, fan)
			if err != nil {
				return fmt.Errorf("%v: %w", c, err)
			}
			if !slices.Contains(want, got) {
				o.t.Errorf("%v\n  got  %s\n  want %s", c, got, strings.Join(want, " or "))
			}
			return nil
		})
	}
	if err := crowd.Wait(); err != nil {
		o.t.Error(err)
	}
	// All that the cells did is in front of this in the feed, but for sessions that end behind their connections.
	mark := o.id()
	parts[mark] = part{want: []string{"registered"}}
	shows := good
	v, err := o.visit(ctx, "tls", shows, mark, mark)
	if err != nil {
		o.t.Fatal(err)
	}
	defer v.close()
	if _, err := o.signUp(ctx, v, mark); err != nil {
		o.t.Fatal(err)
	}
	wanted := func(id string, is []string) bool {
		want := parts[id].want
		if last := len(want) - 1; last >= 0 && want[last] == "perhaps offline" {
			return slices.Equal(is, want[:last]) || slices.Equal(is, append(slices.Clone(want[:last]), "offline"))
		}
		return slices.Equal(is, want)
	}
	deadline := time.After(20 * time.Second)
	for late := false; ; {
		o.mu.Lock()
		wrong := map[string][]string{}
		for id, is := range o.happens {
			if !wanted(id, is) {
				wrong[id] = slices.Clone(is)
			}
		}
		for id, p := range parts {
			if len(p.want) > 0 && len(o.happens[id]) == 0 {
				wrong[id] = nil
			}
		}
		marked, bump := len(o.happens[mark]) > 0, o.bump
		o.mu.Unlock()
		if marked && len(wrong) == 0 {
			break
		}
		if late {
			for id, is := range wrong {
				o.t.Errorf("%v\n  to %s happened %q\n  want %q", parts[id].cell, id, is, parts[id].want)
			}
			break
		}
		select {
		case <-bump:
		case <-deadline:
			late = true
		}
	}
	o.t.Logf("%d cells", len(cells))
}
