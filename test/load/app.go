package load

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/coder/websocket"
)

// API is where applications ask.
type API struct {
	URL    string   // http://host:port
	Tokens []string // of the owners
	TLS    *tls.Config
}

func (a API) dial(ctx context.Context) (net.Conn, string, error) {
	u, err := url.Parse(a.URL)
	if err != nil {
		return nil, "", err
	}
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), u.Scheme) // the service's name stands for its port
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", host)
	if err != nil || u.Scheme != "https" {
		return c, u.Host, err
	}
	conf := a.TLS.Clone()
	if conf == nil {
		conf = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	conf.ServerName = u.Hostname()
	conf.NextProtos = []string{"http/1.1"}
	return tls.Client(c, conf), u.Host, nil
}

// caller is an application with one connection that it keeps. It is not net/http's client, which would cost more than what is
// measured.
type caller struct {
	api  API
	host string
	c    net.Conn
	r    *bufio.Reader
	out  []byte
	body bytes.Buffer // of the last answer
}

func (c *caller) close() {
	if c.c != nil {
		_ = c.c.Close()
		c.c = nil
	}
}

// do asks for an owner and reads the whole answer; first is when its first byte came. An error is also a status that is no
// success.
func (c *caller) do(ctx context.Context, owner int, method, path, body string) (first time.Time, n int64, err error) {
	if c.c == nil {
		if c.c, c.host, err = c.api.dial(ctx); err != nil {
			return first, 0, err
		}
		c.r = bufio.NewReaderSize(c.c, 16<<10)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.c.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() || err != nil {
			c.close()
		}
	}()
	c.out = fmt.Appendf(c.out[:0], "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nAccept: application/json\r\n", method, path, c.host,
		c.api.Tokens[owner])
	if body != "" {
		c.out = fmt.Appendf(c.out, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	c.out = append(append(c.out, "\r\n"...), body...)
	if _, err = c.c.Write(c.out); err != nil {
		return first, 0, err
	}
	if _, err = c.r.Peek(1); err != nil {
		return first, 0, err
	}
	first = time.Now()
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		return first, 0, err
	}
	defer func() { _ = res.Body.Close() }()
	if res.StatusCode/100 == 2 {
		c.body.Reset()
		n, err = c.body.ReadFrom(res.Body)
		return first, n, err
	}
	b, _ := io.ReadAll(io.LimitReader(res.Body, 1024))
	return first, 0, fmt.Errorf("%s %s: %s %s", method, path, res.Status, bytes.TrimSpace(b))
}

// listen subscribes to all changes of an owner's resources over a WebSocket and hands the value of each to heard, until ctx
// ends. It returns when the subscription is live; if that ends before ctx does, lost is told why.
func listen(ctx context.Context, a API, owner int, heard func(v uint64), lost func(error)) error {
	opts := &websocket.DialOptions{
		HTTPHeader: http.Header{"Authorization": {"Bearer " + a.Tokens[owner]}},
		HTTPClient: &http.Client{
			Transport: &http.Transport{TLSClientConfig: a.TLS},
			// A redirect would measure, and give the token to, somebody else.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	c, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(a.URL, "http")+"/api/v1/ws/events", opts) //nolint:bodyclose // the library's
	if err != nil {
		return err
	}
	c.SetReadLimit(maxMessage)
	if err := c.Write(ctx, websocket.MessageText, []byte(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"]}}`)); err != nil {
		return err
	}
	_, ack, err := c.Read(ctx)
	if err != nil {
		return err
	}
	var m struct {
		Result struct {
			OperationProcessed *struct{ ErrorStatus struct{ Code string } } `json:"operationProcessed"`
		} `json:"result"`
	}
	if err := json.Unmarshal(ack, &m); err != nil || m.Result.OperationProcessed == nil {
		return fmt.Errorf("the subscription was answered %q", ack)
	}
	go func() { // ends with ctx
		defer func() { _ = c.CloseNow() }()
		for {
			_, b, err := c.Read(ctx)
			if err != nil {
				if ctx.Err() == nil {
					lost(fmt.Errorf("the subscription ended: %w", err))
				}
				return
			}
			if v, err := valueIn(b); err == nil {
				heard(v)
			}
		}
	}()
	return nil
}

var errNoValue = errors.New("no value of a light")

// valueIn finds a light's value in an event.
func valueIn(b []byte) (uint64, error) {
	_, rest, ok := bytes.Cut(b, []byte(`"t":`))
	if !ok {
		return 0, errNoValue
	}
	end := bytes.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end <= 0 {
		return 0, errNoValue
	}
	return strconv.ParseUint(string(rest[:end]), 10, 64)
}
