package client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// answers plays a provider without a network, so that its time is simulated.
type answers func(path, form string) (status int, body string)

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) {
	form := ""
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		form = string(b)
	}
	status, body := a(r.URL.Path, form)
	if status == 0 {
		return nil, errors.New("no route to the provider")
	}
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
}

const discovery = `{"device_authorization_endpoint":"https://id/device","token_endpoint":"https://id/token"}`

// A login asks as often as the provider says, backs off when it is told to or hears nothing, and ends in time.
func TestLoginWaits(t *testing.T) {
	for name, s := range map[string]struct {
		polls []string // error codes of the answers, "" = a token, "away" = none; the last one again and again
		took  time.Duration
		n     int
		kind  Kind
	}{
		"approved":            {[]string{"authorization_pending", "authorization_pending", ""}, 4 * time.Second, 3, ""},
		"too fast":            {[]string{"slow_down", "authorization_pending", ""}, 14 * time.Second, 3, ""},
		"nothing was heard":   {[]string{"away", "away", "authorization_pending", ""}, (4 + 8 + 8) * time.Second, 4, ""},
		"denied":              {[]string{"authorization_pending", "access_denied"}, 2 * time.Second, 2, Unauthenticated},
		"the provider's end":  {[]string{"expired_token"}, 0, 1, Unauthenticated},
		"nobody was there":    {[]string{"authorization_pending"}, 60 * time.Second, 30, Unauthenticated},
		"an answer is absurd": {[]string{"absurd"}, 0, 1, Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				play := answers(func(path, form string) (int, string) {
					switch path {
					case "/.well-known/openid-configuration":
						return 200, discovery
					case "/device":
						if form != "client_id=me&scope=devices%3Aread+offline_access" {
							t.Errorf("asked with %s", form)
						}
						return 200, `{"device_code":"secret","user_code":"ABCD","verification_uri":"https://id/","expires_in":60,"interval":2}`
					}
					code := s.polls[min(n, len(s.polls)-1)]
					n++
					switch code {
					case "":
						return 200, `{"access_token":"at","refresh_token":"rt","expires_in":3600}`
					case "away":
						return 0, ""
					case "absurd":
						return 200, `[]`
					}
					return 400, `{"error":"` + code + `"}`
				})
				begin := time.Now()
				p := &provider{Provider: Provider{Issuer: "https://id", ClientID: "me"}, http: &http.Client{Transport: play}}
				g, err := p.login(t.Context(), []string{"devices:read"}, func(p Prompt) error {
					if p.Code != "ABCD" || p.URL != "https://id/" || time.Until(p.Expires) != time.Minute {
						t.Errorf("%+v", p)
					}
					return nil
				})
				if took := time.Since(begin); took != s.took || n != s.n {
					t.Errorf("it took %s and %d polls", took, n)
				}
				if s.kind != "" {
					if !errors.Is(err, s.kind) || !errors.Is(err, ErrLogin) {
						t.Errorf("%+v", err)
					}
				} else if err != nil || g.Access != "at" || g.Refresh != "rt" || time.Until(g.Expires) != time.Hour || g.Issuer != "https://id" || g.ClientID != "me" {
					t.Errorf("%+v, %v", g, err)
				}
			})
		})
	}
}

func TestLoginIsCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		play := answers(func(path, _ string) (int, string) {
			switch path {
			case "/.well-known/openid-configuration":
				return 200, discovery
			case "/device":
				return 200, `{"device_code":"secret","user_code":"ABCD","verification_uri":"https://id/","expires_in":600}`
			}
			return 400, `{"error":"authorization_pending"}`
		})
		p := &provider{Provider: Provider{Issuer: "https://id", ClientID: "me"}, http: &http.Client{Transport: play}}
		why := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(12*time.Second, func() { cancel(why) })
		begin := time.Now()
		if _, err := p.login(ctx, nil, func(Prompt) error { return nil }); !errors.Is(err, why) || time.Since(begin) != 12*time.Second {
			t.Errorf("%v after %s", err, time.Since(begin))
		}
		if _, err := p.login(t.Context(), nil, func(Prompt) error { return why }); !errors.Is(err, why) {
			t.Errorf("%v", err)
		}
	})
}

func TestProvidersThatCannot(t *testing.T) {
	for name, s := range map[string]struct {
		answer answers
		kind   Kind
		code   Code
	}{
		"is away":             {func(string, string) (int, string) { return 0, "" }, Unavailable, ErrUnreachable},
		"has trouble":         {func(string, string) (int, string) { return 503, "" }, Unavailable, ErrUnreachable},
		"is no provider":      {func(string, string) (int, string) { return 200, "{}" }, Invalid, ErrLogin},
		"is another program":  {func(string, string) (int, string) { return 200, "<html>" }, Invalid, ErrLogin},
		"is another program,": {func(string, string) (int, string) { return 404, "<html>" }, Invalid, ErrLogin},
		"has no device grant": {func(string, string) (int, string) { return 200, `{"token_endpoint":"https://id/token"}` }, Unsupported, ErrLogin},
		"knows us not": {func(path, _ string) (int, string) {
			if path == "/device" {
				return 401, `{"error":"invalid_client","error_description":"who are you?"}`
			}
			return 200, discovery
		}, Unauthenticated, ErrLogin},
	} {
		p := &provider{Provider: Provider{Issuer: "https://id"}, http: &http.Client{Transport: s.answer}}
		_, err := p.login(t.Context(), nil, nil)
		if !errors.Is(err, s.kind) || !errors.Is(err, s.code) {
			t.Errorf("one that %s: %+v", name, err)
		}
	}
}
