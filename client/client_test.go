package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

func TestReads(t *testing.T) {
	t.Parallel()
	w := start(t, "lamp", "bulb")
	ctx, c := t.Context(), w.c
	if conf, err := c.GetConfiguration(ctx); err != nil || conf.HubID != w.ID || conf.Authority != w.Issuer || time.Since(conf.Now.Time) > time.Minute {
		t.Errorf("%+v, %v", conf, err)
	}
	all := collect(t, c.ListDevices(ctx, client.DeviceQuery{}))
	if len(all) != 2 || all[0].ID != lamp || all[0].Name != "lamp" || !all[0].Metadata.Connection.Online() || !slices.Contains(all[0].Types, "oic.d.light") {
		t.Fatalf("%+v", all)
	}
	for _, q := range []client.DeviceQuery{
		{IDs: []string{lamp}}, {Search: "lam"}, {Sort: "-name", Limit: 1}, {Types: []string{"oic.d.light"}, Status: []string{"ONLINE"}, Limit: 1},
	} {
		if got := collect(t, c.ListDevices(ctx, q)); len(got) != 1 || got[0].ID != lamp {
			t.Errorf("%+v: %+v", q, got)
		}
	}
	if got := collect(t, c.ListDevices(ctx, client.DeviceQuery{At: time.Now().Add(-time.Hour)})); len(got) != 0 {
		t.Errorf("an hour ago: %+v", got)
	}
	d, err := c.GetDevice(ctx, lamp)
	if err != nil || d.Name != "lamp" || !json.Valid(d.Raw) || d.Metadata.Connection.ConnectedAt.IsZero() || d.Data == nil {
		t.Errorf("%+v, %v", d, err)
	}
	one := "kitchen"
	if got, err := c.UpdateLabels(ctx, lamp, map[string]*string{"room": &one, "gone": nil}); err != nil || got["room"] != one || len(got) != 1 {
		t.Errorf("%v, %v", got, err)
	}
	links := collect(t, c.ListLinks(ctx, client.ResourceQuery{DeviceIDs: []string{lamp}}))
	if len(links) != 1 || !slices.ContainsFunc(links[0].Resources, func(l client.Link) bool { return l.Href == "/light/1" && l.Types[0] == "core.light" }) {
		t.Errorf("%+v", links)
	}
	twins := collect(t, c.ListResources(ctx, client.ResourceQuery{Resources: []client.ResourceID{{lamp, "/light/1"}}}))
	if len(twins) != 1 || twins[0].Data.Resource != (client.ResourceID{DeviceID: lamp, Href: "/light/1"}) {
		t.Errorf("%+v", twins)
	}
	if twins := collect(t, c.ListResources(ctx, client.ResourceQuery{Types: []string{"core.light"}})); len(twins) != 2 {
		t.Errorf("%+v", twins)
	}
	r, err := c.GetResource(ctx, lamp, "light//1/")
	var light struct{ Power int }
	if err != nil || r.Data.Decode(&light) != nil || r.Data.Status != "OK" || r.Tag == "" || len(r.Data.ETag) != 8 || r.Data.Event.Version == 0 && r.Data.Event.Time.IsZero() {
		t.Errorf("%+v, %v", r, err)
	}
	kinds := map[client.EventKind]int{}
	for _, e := range collect(t, c.ListEvents(ctx, client.EventQuery{DeviceIDs: []string{lamp}, After: time.Now().Add(-time.Hour)})) {
		kinds[e.Kind]++
		if e.DeviceIDs[0] != lamp || time.Since(e.Time) > time.Minute || !json.Valid(e.Raw) {
			t.Errorf("%+v", e)
		}
	}
	if kinds[client.Changed] < 3 || kinds[client.Published] != 1 || kinds[client.MetadataUpdated] < 2 {
		t.Errorf("%v", kinds)
	}
	things := collect(t, c.ListThings(ctx))
	if !slices.Equal(things, []string{all[0].ID, all[1].ID}) {
		t.Errorf("%v", things)
	}
	if td, err := c.GetThing(ctx, lamp); err != nil || !strings.Contains(string(td), `"title":"lamp"`) {
		t.Errorf("%s, %v", td, err)
	}
	if got, err := c.DeleteDevices(ctx, all[1].ID); err != nil || !slices.Equal(got, []string{all[1].ID}) {
		t.Errorf("%v, %v", got, err)
	}
	audit := collect(t, c.ListAudit(ctx, 1))
	if len(audit) != 1 || audit[0].Call != "deleteDevices" || audit[0].Outcome != "ok" {
		t.Errorf("%+v", audit)
	}
}

func TestCommands(t *testing.T) {
	t.Parallel()
	w := start(t, "lamp")
	ctx, c := t.Context(), w.c
	var none client.CommandOptions
	was, err := c.GetResource(ctx, lamp, "/light/1")
	if err != nil {
		t.Fatal(err)
	}
	var light struct{ Power int }
	got, err := c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": 5}, client.CommandOptions{IfMatch: was.Tag, TTL: time.Minute, Interface: "oic.if.a"})
	if err != nil || got.Status != "OK" || got.Decode(&light) != nil || light.Power != 5 || got.By.CorrelationID == "" || !json.Valid(got.Raw) {
		t.Fatalf("%+v, %v", got, err)
	}
	eventually(t, func() error { // the device notifies what it changed
		now, err := c.GetResource(ctx, lamp, "/light/1")
		if err == nil && now.Tag == was.Tag {
			err = errors.New("the twin is as it was")
		}
		return err
	})
	_, err = c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": 6}, client.CommandOptions{IfMatch: was.Tag})
	fails(t, err, client.Precondition, "etag-mismatch")
	now, err := c.GetResource(ctx, lamp, "/light/1")
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": 6}, client.CommandOptions{IfMatch: now.Tag, ForwardIfMatch: true})
	fails(t, err, client.Unsupported, "condition-unsupported") // like most devices, it knows no conditions
	_, err = c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": 6}, client.CommandOptions{ForwardIfMatch: true})
	fails(t, err, client.Invalid, "condition-invalid")
	got, err = c.UpdateResource(ctx, lamp, "/light/1", client.CBOR("\xa1\x65power\x07"), none)
	if err != nil || got.Decode(&light) != nil || light.Power != 7 {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = c.RetrieveResource(ctx, lamp, "/light/1", none)
	if err != nil || got.Decode(&light) != nil || light.Power != 7 {
		t.Errorf("%+v, %v", got, err)
	}
	// Not waited for, what the device answers is an event.
	answered := func() (n int) {
		for _, e := range collect(t, c.ListEvents(ctx, client.EventQuery{DeviceIDs: []string{lamp}})) {
			if e.Kind == client.Retrieved && e.Change.Decode(&light) == nil && light.Power == 7 {
				n++
			}
		}
		return n
	}
	already := answered()
	if got, err := c.RetrieveResource(ctx, lamp, "/light/1", client.CommandOptions{Async: true}); err != nil || got != nil {
		t.Errorf("%+v, %v", got, err)
	}
	eventually(t, func() error {
		if answered() != already+1 {
			return errors.New("the answer is no event yet")
		}
		return nil
	})
	_, err = c.CreateResource(ctx, lamp, "/info", struct{}{}, none)
	fails(t, err, client.Unsupported, "device-error")
	var e *client.Error
	if errors.As(err, &e); e.Outcome == nil || e.Outcome.Status != "METHOD_NOT_ALLOWED" || e.Outcome.Resource.Href != "/info" {
		t.Errorf("%+v", e)
	}
	_, err = c.DeleteResource(ctx, lamp, "/light/1", none)
	fails(t, err, client.Unsupported, "device-error")
	_, err = c.UpdateResource(ctx, lamp, "/none", 1, none)
	fails(t, err, client.NotFound, "resource-unknown")
	_, err = c.UpdateResource(ctx, lamp, "/none/events", 1, client.CommandOptions{Force: true}) // an href, and no events of /none
	fails(t, err, client.NotFound, "device-error")
	_, err = c.UpdateResource(ctx, lamp, "/light/1", 1, client.CommandOptions{TTL: time.Millisecond})
	fails(t, err, client.Invalid, "time-to-live-invalid")
	off, on := false, true
	if m, err := c.UpdateTwin(ctx, lamp, client.TwinUpdate{Enabled: &off}); err != nil || m.TwinEnabled || m.Twin.State != "DISABLED" {
		t.Errorf("%+v, %v", m, err)
	}
	if m, err := c.UpdateTwin(ctx, lamp, client.TwinUpdate{Enabled: &on, TTL: time.Minute, Key: "on"}); err != nil || !m.TwinEnabled {
		t.Errorf("%+v, %v", m, err)
	}

	// The device is away.
	w.stop[0]()
	eventually(t, func() error {
		if d, err := c.GetDevice(ctx, lamp); err != nil || d.Metadata.Connection.Online() {
			return fmt.Errorf("it is online, or %w", err)
		}
		return nil
	})
	_, err = c.UpdateResource(ctx, lamp, "/light/1", 1, client.CommandOptions{TTL: 200 * time.Millisecond})
	fails(t, err, client.Deadline, "command-expired")
	async := client.CommandOptions{Async: true, TTL: time.Hour}
	for i := range 3 {
		o := async
		o.Supersede = i == 2
		o.Key = []string{"once", "once", ""}[i]
		if got, err := c.UpdateResource(ctx, lamp, "/light/1", map[string]int{"power": i / 2}, o); err != nil || got != nil {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if got, err := c.DeleteResource(ctx, lamp, "/info", async); err != nil || got != nil {
		t.Errorf("%+v, %v", got, err)
	}
	waiting := collect(t, c.ListCommands(ctx, client.CommandQuery{}))
	if len(waiting) != 2 || waiting[0].Kind != client.UpdatePending || string(waiting[0].Content) != `{"power":1}` || time.Until(waiting[0].Until.Time) < time.Minute ||
		waiting[1].Kind != client.DeletePending || waiting[1].Resource != (client.ResourceID{DeviceID: lamp, Href: "/info"}) {
		t.Fatalf("%+v", waiting)
	}
	if one := collect(t, c.ListCommands(ctx, client.CommandQuery{Resources: []client.ResourceID{{lamp, "/info"}}})); len(one) != 1 {
		t.Errorf("%+v", one)
	}
	_, err = c.CancelCommands(ctx, lamp, "/light/1", "")
	fails(t, err, client.Invalid, "command-id-invalid")
	_, err = c.CancelCommands(ctx, lamp, "/light/1", "nonsense")
	fails(t, err, client.NotFound, "command-unknown")
	id := waiting[0].By.CorrelationID
	if ids, err := c.CancelCommands(ctx, lamp, "/light/1", id); err != nil || !slices.Equal(ids, []string{id}) {
		t.Errorf("%v, %v", ids, err)
	}
	if ids, err := c.CancelCommands(ctx, lamp, "/info"); err != nil || len(ids) != 1 {
		t.Errorf("%v, %v", ids, err)
	}
	_, err = c.CancelCommands(ctx, lamp, "")
	fails(t, err, client.NotFound, "command-unknown")
}

func TestErrors(t *testing.T) {
	t.Parallel()
	w := start(t)
	ctx := t.Context()
	_, err := w.c.GetDevice(ctx, lamp)
	fails(t, err, client.NotFound, "not-found")
	if errors.Is(err, client.Invalid) || errors.Is(err, client.Code("other")) || err.Error() != "not found [not-found]" {
		t.Errorf("%v", err)
	}
	_, err = w.c.DeleteDevices(ctx)
	fails(t, err, client.Invalid, "filter-empty")
	_, err = w.c.DeleteDevices(ctx, "")
	fails(t, err, client.Invalid, "filter-empty")
	_, err = w.c.GetDevice(ctx, "")
	fails(t, err, client.Invalid, "device-id-invalid")
	_, err = w.c.GetThing(ctx, "")
	fails(t, err, client.Invalid, "device-id-invalid")
	_, err = w.c.GetResource(ctx, lamp, "//")
	fails(t, err, client.Invalid, "href-invalid")
	_, err = w.c.GetResource(ctx, lamp, "/a/../b")
	fails(t, err, client.Invalid, "href-invalid")
	_, err = w.c.UpdateResource(ctx, lamp, "/a", func() {}, client.CommandOptions{})
	fails(t, err, client.Invalid, "content-invalid")
	_, err = w.c.UpdateResource(ctx, lamp, "/a", 1, client.CommandOptions{})
	fails(t, err, client.Denied, "device-not-yours")
	odd := []client.ResourceID{{DeviceID: lamp, Href: "/a?etag=x"}}
	if got := collect(t, w.c.ListEvents(ctx, client.EventQuery{Resources: odd})); len(got) != 0 { // one is in the path
		t.Errorf("%+v", got)
	}
	for _, err := range w.c.ListResources(ctx, client.ResourceQuery{Resources: odd}) {
		fails(t, err, client.Invalid, "href-invalid")
	}
	for _, err := range w.c.Watch(ctx, client.EventFilter{Resources: odd}) {
		fails(t, err, client.Invalid, "href-invalid")
	}
	for _, err := range w.c.ListCommands(ctx, client.CommandQuery{Resources: []client.ResourceID{{DeviceID: lamp}}}) {
		fails(t, err, client.Invalid, "href-invalid")
	}
	for _, err := range w.c.ListDevices(ctx, client.DeviceQuery{Sort: "colour"}) {
		fails(t, err, client.Invalid, "query-invalid")
	}
	_, err = w.client(t, nil).GetDevice(ctx, lamp)
	fails(t, err, client.Unauthenticated, "token-missing")
	_, err = w.client(t, client.Static("nonsense")).GetDevice(ctx, lamp)
	fails(t, err, client.Unauthenticated, "token-invalid")
	_, err = w.client(t, client.Static(w.Token(t, hub.ScopeRead))).DeleteDevices(ctx, lamp)
	fails(t, err, client.Denied, "scope-missing")
	broken := errors.New("no token today")
	if _, err = w.client(t, func(context.Context) (client.Token, error) { return client.Token{}, broken }).GetDevice(ctx, lamp); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	over, cancel := context.WithCancelCause(ctx)
	cancel(broken)
	if _, err = w.c.GetDevice(over, lamp); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	for _, s := range []string{"", "hub.example:8080", "ftp://hub", "https://user@hub", "https://hub?x=1"} {
		_, err := client.New(client.Config{Server: s})
		fails(t, err, client.Invalid, "server-invalid")
	}
}

// A hub of httptest says what a proxy, a fault or another program may say.
func TestStrangeAnswers(t *testing.T) {
	t.Parallel()
	var answer func(http.ResponseWriter, *http.Request)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL + "/", Token: client.Static("secret")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	say := func(status int, body string, header ...string) {
		answer = func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(status)
			_, _ = w.Write([]byte(body))
		}
	}
	for _, s := range []struct {
		status int
		kind   client.Kind
	}{
		{302, client.Invalid},
		{400, client.Invalid},
		{401, client.Unauthenticated},
		{403, client.Denied},
		{404, client.NotFound},
		{405, client.Unsupported},
		{409, client.Conflict},
		{412, client.Precondition},
		{413, client.TooLarge},
		{429, client.Exhausted},
		{500, client.Internal},
		{502, client.Unavailable},
		{503, client.Unavailable},
		{504, client.Deadline},
	} {
		say(s.status, "<html>", "Location", srv.URL+"/elsewhere", "Retry-After", "7")
		_, err := c.GetDevice(t.Context(), lamp)
		fails(t, err, s.kind, client.ErrRefused)
		var e *client.Error
		if errors.As(err, &e); e.Status != s.status || e.RetryAfter != 7*time.Second {
			t.Errorf("%+v", e)
		}
	}
	say(503, `{"code":14,"message":"later","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"store-full"},7,
		{"@type":"type.googleapis.com/google.rpc.RetryInfo","retryDelay":"3.5s"}]}`)
	_, err = c.GetDevice(t.Context(), lamp)
	fails(t, err, client.Unavailable, "store-full")
	var e *client.Error
	if errors.As(err, &e); e.RetryAfter != 3500*time.Millisecond {
		t.Errorf("%+v", e)
	}
	say(304, "")
	if got, err := c.RetrieveResource(t.Context(), lamp, "/a", client.CommandOptions{}); err != nil || got.Status != "NOT_MODIFIED" || got.Resource.Href != "/a" {
		t.Errorf("%+v, %v", got, err)
	}
	say(200, `not JSON`)
	_, err = c.GetDevice(t.Context(), lamp)
	fails(t, err, client.Invalid, client.ErrRefused)
	say(200, `{"id":`, "Content-Length", "100")
	_, err = c.GetDevice(t.Context(), lamp)
	fails(t, err, client.Unavailable, client.ErrUnreachable)
	// What came before a failure in the middle of a list is handed on.
	say(200, `{"result":{"id":"a"}}`+"\n"+`{"result":{"id":"b"}}`+"\n"+`{"error":{"code":14,"message":"stopping","details":[{"reason":"hub-stopping"}]}}`)
	var ids []string
	for d, err := range c.ListDevices(t.Context(), client.DeviceQuery{}) {
		if err != nil {
			fails(t, err, client.Unavailable, "hub-stopping")
			break
		}
		ids = append(ids, d.ID)
	}
	if !slices.Equal(ids, []string{"a", "b"}) {
		t.Errorf("%v", ids)
	}
	srv.Close()
	_, err = c.GetDevice(t.Context(), lamp)
	fails(t, err, client.Unavailable, client.ErrUnreachable)
}

// Whom a client trusts is said by its caller.
func TestTrust(t *testing.T) {
	t.Parallel()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{}`)) }))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	defer srv.Close()
	pool := x509.NewCertPool()
	pool.AddCert(srv.Certificate())
	for _, trust := range []*tls.Config{nil, {MinVersion: tls.VersionTLS12}, {MinVersion: tls.VersionTLS12, RootCAs: pool}} {
		c, err := client.New(client.Config{Server: srv.URL, TLS: trust})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = c.GetDevice(t.Context(), lamp)
		if trust == nil || trust.RootCAs == nil {
			fails(t, err, client.Unavailable, client.ErrUnreachable)
		} else if err != nil {
			t.Error(err)
		}
	}
}

// A list goes on from page to page, with the same filters, and hands on no cursor.
func TestPages(t *testing.T) {
	t.Parallel()
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		asked = append(asked, q.Get("limit")+q.Get("cursor")+q.Get("search"))
		for i := range min(2, len(asked)*100) {
			cursor := ""
			if i == 1 && len(asked) < 4 {
				cursor = fmt.Sprintf(`"cursor":"after%d"`, len(asked))
			}
			if len(asked) == 1 && cursor != "" {
				_, _ = fmt.Fprintf(w, `{"result":{"name":"<&>","id":"%d",%s}}`+"\n", i, cursor)
				continue
			}
			if cursor != "" { // not where our hub has it
				cursor += ","
			}
			_, _ = fmt.Fprintf(w, `{"result":{%s"id":"%d","name":"<&>"}}`+"\n", cursor, i)
		}
	}))
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	all := collect(t, c.ListDevices(t.Context(), client.DeviceQuery{Search: "x"}))
	if len(all) != 8 || string(all[1].Raw) != `{"name":"<&>","id":"1"}` || string(all[3].Raw) != `{"id":"1","name":"<&>"}` || all[3].Name != "<&>" {
		t.Errorf("%s, %s", all[1].Raw, all[3].Raw)
	}
	if want := []string{"200x", "200after1x", "200after2x", "200after3x"}; !slices.Equal(asked, want) {
		t.Errorf("asked %q", asked)
	}
	asked = nil
	if all := collect(t, c.ListDevices(t.Context(), client.DeviceQuery{Limit: 4})); len(all) != 4 || !slices.Equal(asked, []string{"4", "2after1"}) {
		t.Errorf("%d, asked %q", len(all), asked)
	}
	asked = nil
	for range c.ListDevices(t.Context(), client.DeviceQuery{}) {
		break
	}
	if len(asked) != 1 {
		t.Errorf("a loop that was left asked %q", asked)
	}
}

// A token is asked for when it is needed: at first, before it ends, and when the hub refused it; and then once for all calls.
func TestTokens(t *testing.T) {
	t.Parallel()
	good := "t1"
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+good {
			w.WriteHeader(http.StatusUnauthorized)
			_, _ = w.Write([]byte(`{"code":16,"message":"no","details":[{"reason":"token-expired"}]}`))
			return
		}
		_, _ = w.Write([]byte(`{}`))
	}))
	defer srv.Close()
	n, lifetime := 0, time.Duration(0)
	c, err := client.New(client.Config{Server: srv.URL, Token: func(context.Context) (client.Token, error) {
		n++
		tok := client.Token{Access: fmt.Sprint("t", n)}
		if lifetime > 0 {
			tok.Expires = time.Now().Add(lifetime)
		}
		return tok, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	get := func(want int) {
		t.Helper()
		if _, err := c.GetDevice(t.Context(), lamp); err != nil || n != want {
			t.Errorf("after %d tokens: %v", n, err)
		}
	}
	get(1)
	get(1)
	good, lifetime = "t2", time.Second
	get(2) // refused, replaced, and asked again
	good = "t3"
	get(3) // the second one was about to end
	good = "none"
	_, err = c.GetDevice(t.Context(), lamp)
	fails(t, err, client.Unauthenticated, "token-expired")
	if n != 5 { // about to end, then refused; and no more
		t.Errorf("%d tokens", n)
	}
}

// A device that answers 4.01 has got the command: it is not given again with another token.
func TestDevicesThatRefuse(t *testing.T) {
	t.Parallel()
	given, asked := 0, 0
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		given++
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = w.Write([]byte(`{"code":16,"message":"error response from device","details":[{"reason":"device-error"}]}`))
	}))
	defer srv.Close()
	c, err := client.New(client.Config{Server: srv.URL, Token: func(context.Context) (client.Token, error) {
		asked++
		return client.Token{Access: fmt.Sprint("t", asked)}, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.UpdateResource(t.Context(), lamp, "/light/1", map[string]int{"power": 1}, client.CommandOptions{})
	fails(t, err, client.Unauthenticated, "device-error")
	if given != 1 || asked != 1 {
		t.Errorf("the command was given %d times, with %d tokens", given, asked)
	}
}

// A path is below the server: nothing makes another host of it, which would get the token.
func TestPathsStayAtTheServer(t *testing.T) {
	t.Parallel()
	asked := 0
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked++ }))
	defer srv.Close()
	c, err := client.New(client.Config{Server: "http://hub.invalid", Token: client.Static("secret")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	elsewhere := strings.TrimPrefix(srv.URL, "http://")
	for _, path := range []string{"@" + elsewhere + "/x", "x:y@" + elsewhere, ".example/x", ":1/x", "api/v1/devices", ""} {
		_, err := c.Do(t.Context(), client.Request{Path: path})
		fails(t, err, client.Invalid, "request-invalid")
	}
	if asked > 0 {
		t.Errorf("another host was asked %d times", asked)
	}
}
