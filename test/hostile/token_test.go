package hostile_test

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"google.golang.org/grpc"
	grpccodes "google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/bundle"
)

// asked lets the device answer the hub until it is closed: that there is nothing, but for one path, whose requests go to the
// channel. There is room for all of a test's.
func (s *stranger) asked(path string) <-chan message.Message {
	out := make(chan message.Message, 16)
	var serving sync.WaitGroup
	serving.Go(func() {
		for m, ok := s.read(); ok; m, ok = s.read() {
			if m.Code == 0 || m.Code>>5 != 0 {
				continue
			}
			if at, _ := m.Options.Path(); at == path {
				out <- m
			} else {
				write(s, frame(message.Message{Code: codes.NotFound, Token: m.Token}))
			}
		}
	})
	s.t.Cleanup(func() { _ = s.raw.Close(); serving.Wait() })
	return out
}

// next takes what a channel must bring.
func next[T any](t *testing.T, from <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		t.Fatal("waited in vain")
	}
	return v
}

// content answers the hub.
func content(code codes.Code, token []byte, observe uint32, value any) message.Message {
	m := message.Message{Code: code, Token: token}
	if observe > 0 {
		m.Options = withUint(m.Options, message.Observe, observe)
	}
	m.Options = withUint(m.Options, message.ContentFormat, uint32(message.AppOcfCbor))
	m.Payload, _ = cbor.Marshal(value)
	return m
}

// TestTokensOfOthers: a token of CoAP means something on its own connection alone (RFC 7252, Section 5.3.1): neither a notification
// nor the answer to a command can come from another device, which knows the token.
func TestTokensOfOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good, bad := w.signedIn(deviceID(3)), w.signedIn(deviceID(4))
	link := map[string]any{"href": "/valve", "rt": []string{"x"}, "if": []string{"oic.if.baseline"}, "p": map[string]any{"bm": 3}}
	good.want(codes.Changed, post("/oic/rd", map[string]any{"di": good.id, "ttl": 0, "links": []any{link}}, "rt=oic.wk.rdpub"))
	asks := good.asked("/valve")
	observation := next(t, asks)
	write(good, frame(content(codes.Content, observation.Token, 1, map[string]any{"open": 1})))
	shows := func(want string) func() bool {
		return func() bool {
			_, b, err := w.request(t.Context(), http.MethodGet, "/api/v1/devices/"+good.id+"/resources/valve?onlyContent=true", "")
			return err == nil && strings.TrimSpace(string(b)) == want
		}
	}
	w.until("the first value", shows(`{"open":1}`))

	write(bad, frame(content(codes.Content, observation.Token, 2, map[string]any{"open": 666})))
	if !bad.answers() { // so the hub has read it
		t.Error("a notification of nobody ended the connection")
	}
	if !shows(`{"open":1}`)() {
		t.Error("another device's notification was taken")
	}

	type outcome struct {
		status int
		body   string
	}
	done := make(chan outcome, 1)
	go func() { // ends with the command
		status, b, _ := w.request(t.Context(), http.MethodPut, "/api/v1/devices/"+good.id+"/resources/valve", `{"open":2}`)
		done <- outcome{status, string(b)}
	}()
	command := next(t, asks)
	for command.Code != codes.POST {
		command = next(t, asks)
	}
	write(bad, frame(content(codes.Changed, command.Token, 0, map[string]any{"open": 666})))
	if !bad.answers() {
		t.Error("an answer of nobody ended the connection")
	}
	write(good, frame(content(codes.Changed, command.Token, 0, map[string]any{"open": 2})))
	if got := next(t, done); got.status != http.StatusOK || strings.Contains(got.body, `"open":666`) || !strings.Contains(got.body, `"open":2`) {
		t.Errorf("the command got %d %s", got.status, got.body)
	}
	write(good, frame(content(codes.Content, observation.Token, 3, map[string]any{"open": 2})))
	w.until("what the device itself reported", shows(`{"open":2}`))
	w.undisturbed()
	_, _ = good.Close(), bad.Close()
	w.givenBack()
}

// TestOneTokenForMany: a device that has several requests under way with one token gets as many answers, and others none of them.
func TestOneTokenForMany(t *testing.T) {
	t.Parallel()
	const requests = 200
	w := newWorld(t)
	c := w.signedIn(deviceID(3))
	ask := append(frame(get("/oic/rd")), frame(get("/nothing/here"))...)
	var asking sync.WaitGroup
	asking.Go(func() { write(c, bytes.Repeat(ask, requests)) })
	for i := range 2 * requests {
		m, ok := c.read()
		for ok && (m.Code>>5 == 0 || m.Code>>5 == 7) {
			m, ok = c.read()
		}
		if found := m.Code != codes.NotFound; !ok || !bytes.Equal(m.Token, []byte{1}) || found != (i%2 == 0) {
			t.Fatalf("answer %d: %v %x, %t", i, m.Code, m.Token, ok)
		}
	}
	asking.Wait()
	w.undisturbed()
	_ = c.Close()
	w.givenBack()
}

// TestCredentialsOfOthers: what was given to one device is of no use to another, nor to an application, and the other way round.
func TestCredentialsOfOthers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	victim := w.secure(deviceID(3))
	code := w.Code(t, victim.id)
	// refused tries something as another device: it is 4.01, and the connection ends with it.
	refused := func(what string, m message.Message) {
		t.Helper()
		c := w.secure(deviceID(4))
		if a := c.ask(m); a.Code != codes.Unauthorized {
			t.Errorf("%s: %v %q", what, a.Code, a.Payload)
		}
		if _, over := c.end(); !over {
			t.Errorf("%s: the connection is still open", what)
		}
		_ = c.Close()
	}
	signUp := func(code string) message.Message {
		return post("/oic/sec/account", map[string]any{"di": deviceID(4), "accesstoken": code})
	}
	refresh := func(with tokens) message.Message {
		return post("/oic/sec/tokenrefresh", map[string]any{"di": victim.id, "uid": with.UID, "refreshtoken": with.Refresh, "granttype": "refresh_token"})
	}
	refused("another device's code", signUp(code))
	first := victim.signUp(code)
	refused("a code that was used", signUp(code))
	o, err := w.Control.Onboard(t.Context(), bundle.OnboardRequest{AnyDevice: true})
	if err != nil {
		t.Fatal(err)
	}
	somebody := w.secure(deviceID(5))
	somebody.signUp(o.AuthorizationCode)
	refused("a code for anybody that somebody used", signUp(o.AuthorizationCode))
	refused("another device's token", signIn(deviceID(4), first))
	refused("another device's token under its name", signIn(victim.id, first))
	refused("an application's token", signIn(deviceID(4), tokens{UID: first.UID, Access: w.token}))
	refused("another device's refresh token as its own", signIn(victim.id, tokens{UID: first.UID, Access: first.Refresh}))
	refused("another device's refresh token", refresh(first))

	victim.signIn(first)
	for path, method := range map[string]string{"/api/v1/devices": http.MethodGet, "/api/v1/devices/" + lamp + "/resources/light/1": http.MethodPut} {
		if status, b, err := w.ask(t.Context(), method, path, first.Access, ""); err != nil || status != http.StatusForbidden {
			t.Errorf("a device's token at %s %s: %d %s, %v", method, path, status, b, err)
		}
		if status, b, err := w.ask(t.Context(), method, path, first.Refresh, ""); err != nil || status != http.StatusUnauthorized {
			t.Errorf("a device's refresh token at %s %s: %d %s, %v", method, path, status, b, err)
		}
	}
	conn, err := grpc.NewClient(w.GRPC, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, stop := context.WithTimeout(metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+first.Access), patience)
	defer stop()
	if _, err := pb.NewGrpcGatewayClient(conn).DeleteDevices(ctx, &pb.DeleteDevicesRequest{All: true}); status.Code(err) != grpccodes.PermissionDenied {
		t.Errorf("a device's token over gRPC: %v", err)
	}

	renewed := func(old tokens) (now tokens) {
		t.Helper()
		a := victim.want(codes.Changed, refresh(old))
		if err := cbor.Unmarshal(a.Payload, &now); err != nil {
			t.Fatal(err)
		}
		now.UID = old.UID
		return now
	}
	second := renewed(first)
	refused("another device's refresh token that was used", refresh(first))
	refused("another device's newest refresh token", refresh(second))
	renewed(second)
	refused("another device's refresh token of long ago", refresh(first))
	if a := w.secure(victim.id).ask(refresh(first)); a.Code != codes.Unauthorized {
		t.Errorf("its own of long ago, from elsewhere: %v %q", a.Code, a.Payload)
	}

	w.undisturbed()
}
