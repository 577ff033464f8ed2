package device

import (
	"bytes"
	"context"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Request is anything to ask the hub.
type Request struct {
	Code    codes.Code
	Path    string
	Query   []string // "name=value", one option each
	Body    any      // encoded as CBOR; nil: no payload. []byte is sent as it is
	Format  message.MediaType
	Accept  message.MediaType // 0: no Accept option
	Options message.Options   // more of them
}

// Answer is the hub's.
type Answer struct {
	Code   codes.Code
	Body   any    // decoded if it was CBOR, else nil
	Raw    []byte // payload
	Format int    // Content-Format, -1 when there is none
	ETag   []byte
	MaxAge int // seconds, -1 when there is no option
}

// OK reports a 2.xx.
func (a Answer) OK() bool { return a.Code>>5 == 2 }

// Map returns the body as a map with text keys; nil when it is none.
func (a Answer) Map() map[string]any {
	m, _ := a.Body.(map[string]any)
	return m
}

// Text returns a text field of the body, "" when there is none.
func (a Answer) Text(key string) string {
	s, _ := a.Map()[key].(string)
	return s
}

// Int returns a number of the body; ok is false when there is none.
func (a Answer) Int(key string) (n int64, ok bool) {
	switch v := a.Map()[key].(type) {
	case uint64:
		return int64(v), v <= 1<<62
	case int64:
		return v, true
	}
	return 0, false
}

// String is the code and what came with it, for messages.
func (a Answer) String() string {
	s := fmt.Sprintf("%d.%02d", a.Code>>5, a.Code&31)
	switch {
	case a.Body != nil:
		return fmt.Sprintf("%s %v", s, a.Body)
	case len(a.Raw) > 0:
		return fmt.Sprintf("%s %q", s, a.Raw)
	}
	return s
}

var (
	encoder = func() cbor.EncMode {
		m, err := cbor.CoreDetEncOptions().EncMode()
		if err != nil {
			panic(err) // constant options
		}
		return m
	}()
	decoder = func() cbor.DecMode {
		m, err := cbor.DecOptions{
			DefaultMapType: mapType, IntDec: cbor.IntDecConvertNone, MaxArrayElements: 1 << 20, MaxMapPairs: 1 << 20,
		}.DecMode()
		if err != nil {
			panic(err) // constant options
		}
		return m
	}()
)

// Do asks the hub. An error means that there was no answer; a 4.xx or 5.xx is an answer. Without a deadline in ctx it waits
// 20 s.
func (d *Device) Do(ctx context.Context, r Request) (Answer, error) {
	cc := d.current()
	if cc == nil {
		return Answer{}, errNotConnected
	}
	if _, ok := ctx.Deadline(); !ok {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, 20*time.Second)
		defer stop()
	}
	cc.CheckExpirations(time.Now())
	req := cc.AcquireMessage(ctx)
	defer cc.ReleaseMessage(req)
	token, err := message.GetToken()
	if err != nil {
		return Answer{}, fmt.Errorf("make a token: %w", err)
	}
	req.SetToken(token)
	req.SetCode(r.Code)
	if r.Path != "" {
		if err := req.SetPath(r.Path); err != nil {
			return Answer{}, fmt.Errorf("path %s: %w", r.Path, err)
		}
	}
	for _, q := range r.Query {
		req.AddQuery(q)
	}
	for _, o := range r.Options {
		req.AddOptionBytes(o.ID, o.Value)
	}
	if r.Accept != 0 {
		req.SetAccept(r.Accept)
	}
	if r.Body != nil {
		payload, ok := r.Body.([]byte)
		if !ok {
			if payload, err = encoder.Marshal(r.Body); err != nil {
				return Answer{}, fmt.Errorf("encode the body: %w", err)
			}
		}
		format := r.Format
		if format == 0 {
			format = ocf
		}
		req.SetContentFormat(format)
		req.SetBody(bytes.NewReader(payload))
	}
	resp, err := cc.Do(req)
	if err != nil {
		return Answer{}, fmt.Errorf("%v %s: %w", r.Code, r.Path, err)
	}
	defer cc.ReleaseMessage(resp)
	a := Answer{Code: resp.Code(), Format: -1, MaxAge: -1}
	if b, err := resp.GetOptionUint32(message.Block2); err == nil && !d.cfg.Blockwise {
		return Answer{}, fmt.Errorf("%v %s: the answer comes in blocks (%d), which this device does not do", r.Code, r.Path, b)
	}
	if a.Raw, err = resp.ReadBody(); err != nil {
		return Answer{}, fmt.Errorf("read the answer to %v %s: %w", r.Code, r.Path, err)
	}
	if f, err := resp.ContentFormat(); err == nil {
		a.Format = int(f)
	}
	if e, err := resp.ETag(); err == nil {
		a.ETag = bytes.Clone(e)
	}
	if n, err := resp.GetOptionUint32(message.MaxAge); err == nil {
		a.MaxAge = int(n)
	}
	if a.Format == int(message.AppCBOR) || a.Format == int(ocf) {
		if err := decoder.Unmarshal(a.Raw, &a.Body); err != nil {
			return Answer{}, fmt.Errorf("decode the answer to %v %s: %w", r.Code, r.Path, err)
		}
	}
	return a, nil
}

// Get asks for a path of the hub.
func (d *Device) Get(ctx context.Context, path string, query ...string) (Answer, error) {
	return d.Do(ctx, Request{Code: codes.GET, Path: path, Query: query})
}

// Post sends a body to a path of the hub.
func (d *Device) Post(ctx context.Context, path string, body any, query ...string) (Answer, error) {
	return d.Do(ctx, Request{Code: codes.POST, Path: path, Query: query, Body: body})
}

// SignUp redeems a code (OCF Cloud: oic.r.account) and keeps the credentials when it succeeds.
func (d *Device) SignUp(ctx context.Context, code string) (Answer, error) {
	body := map[string]any{"di": d.cfg.ID, "accesstoken": code, "devicetype": "device"} // as iotivity-lite sends it
	if d.cfg.Provider != "" {
		body["authprovider"] = d.cfg.Provider
	}
	a, err := d.Post(ctx, "/oic/sec/account", body)
	if err == nil && a.OK() {
		d.stats.SignUps.Add(1)
		d.keep(a)
	}
	return a, err
}

// keep takes the credentials of a sign-up or refresh.
func (d *Device) keep(a Answer) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.creds.Access, d.creds.Refresh = a.Text("accesstoken"), a.Text("refreshtoken")
	if uid := a.Text("uid"); uid != "" {
		d.creds.UID = uid
	}
	d.expires(a)
}

// expires takes an answer's expiresin; -1 means never. Callers hold mu.
func (d *Device) expires(a Answer) {
	d.creds.Expires = time.Time{}
	if n, ok := a.Int("expiresin"); ok && n >= 0 {
		d.creds.Expires = time.Now().Add(time.Duration(min(n, 1<<31)) * time.Second)
	}
}

// SignIn begins a session with the credentials kept.
func (d *Device) SignIn(ctx context.Context) (Answer, error) {
	c := d.Credentials()
	a, err := d.Post(ctx, "/oic/sec/session", map[string]any{"di": d.cfg.ID, "uid": c.UID, "accesstoken": c.Access, "login": true})
	if err == nil && a.OK() {
		d.stats.SignIns.Add(1)
		d.mu.Lock()
		d.expires(a)
		d.mu.Unlock()
	}
	return a, err
}

// SignOut ends the session; the connection stays.
func (d *Device) SignOut(ctx context.Context) (Answer, error) {
	c := d.Credentials()
	return d.Post(ctx, "/oic/sec/session", map[string]any{"di": d.cfg.ID, "uid": c.UID, "accesstoken": c.Access, "login": false})
}

// SignOff deletes the device at the hub. A session must be there: the token is left out, because Uri-Query takes 255 bytes.
func (d *Device) SignOff(ctx context.Context) (Answer, error) {
	a, err := d.Do(ctx, Request{
		Code: codes.DELETE, Path: "/oic/sec/account",
		Query: []string{"di=" + d.cfg.ID, "uid=" + url.QueryEscape(d.Credentials().UID)},
	})
	if err == nil && a.OK() {
		d.SetCredentials(Credentials{})
	}
	return a, err
}

// Refresh asks for new tokens with the refresh token and keeps them.
func (d *Device) Refresh(ctx context.Context) (Answer, error) {
	c := d.Credentials()
	body := map[string]any{"di": d.cfg.ID, "uid": c.UID, "refreshtoken": c.Refresh, "granttype": "refresh_token"}
	if d.cfg.Provider != "" {
		body["authprovider"] = d.cfg.Provider
	}
	a, err := d.Post(ctx, "/oic/sec/tokenrefresh", body)
	if err == nil && a.OK() {
		d.stats.Refreshes.Add(1)
		d.keep(a)
	}
	return a, err
}

// Publish sends the links of all resources, or of the given ones, and remembers the instance IDs of the answer.
func (d *Device) Publish(ctx context.Context, hrefs ...string) (Answer, error) {
	d.mu.Lock()
	links := d.links(func(r *resource) bool { return r.published && (len(hrefs) == 0 || slices.Contains(hrefs, r.href)) })
	d.mu.Unlock()
	a, err := d.Post(ctx, "/oic/rd", map[string]any{"di": d.cfg.ID, "n": d.cfg.Name, "ttl": 0, "links": links}, "rt=oic.wk.rdpub")
	if err != nil || !a.OK() {
		return a, err
	}
	d.stats.Published.Add(int64(len(links)))
	d.mu.Lock()
	defer d.mu.Unlock()
	list, _ := a.Map()["links"].([]any)
	for _, l := range list {
		m, _ := l.(map[string]any)
		href, _ := m["href"].(string)
		if n, ok := (Answer{Body: m}).Int("ins"); ok {
			d.instances[href] = n
		}
	}
	return a, nil
}

// Unpublish removes the links of the given resources by their instance IDs; without hrefs, all.
func (d *Device) Unpublish(ctx context.Context, hrefs ...string) (Answer, error) {
	query := []string{"di=" + d.cfg.ID}
	d.mu.Lock()
	for _, h := range hrefs {
		ins, ok := d.instances[h]
		if !ok {
			d.mu.Unlock()
			return Answer{}, fmt.Errorf("%s was not published", h)
		}
		query = append(query, "ins="+strconv.FormatInt(ins, 10))
	}
	d.mu.Unlock()
	return d.Do(ctx, Request{Code: codes.DELETE, Path: "/oic/rd", Query: query})
}
