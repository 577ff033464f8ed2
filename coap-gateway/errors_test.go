package coapgateway

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

func TestEveryKindHasACode(t *testing.T) {
	t.Parallel()
	forbidden := map[codes.Code]bool{ // iotivity-lite takes them for success
		codes.RequestEntityIncomplete: true, codes.PreconditionFailed: true, codes.TooManyRequests: true,
	}
	for _, k := range hub.Kinds() {
		c := coap.CodeOf(k)
		if c < codes.BadRequest {
			t.Errorf("%v has no error code", k)
		}
		if forbidden[c] {
			t.Errorf("%v is %s, which devices take for success", k, coap.Dotted(c))
		}
		if (c == codes.Unauthorized) != (k == hub.Unauthenticated) {
			t.Errorf("%v is %s: 4.01 means a bad credential and nothing else", k, coap.Dotted(c))
		}
	}
	for _, k := range []hub.Kind{hub.Internal, hub.Exhausted, hub.Deadline, hub.Conflict, hub.Unavailable} {
		if coap.CodeOf(k) != codes.ServiceUnavailable {
			t.Errorf("%v is %s, want 5.03: trouble of ours", k, coap.Dotted(coap.CodeOf(k)))
		}
	}
}

func TestFailure(t *testing.T) {
	t.Parallel()
	secret := errors.New("dial 10.0.0.7: no route")
	for name, c := range map[string]struct {
		err    error
		code   codes.Code
		text   string
		maxAge uint32 // 0: none
	}{
		"plain error":      {secret, codes.ServiceUnavailable, "internal: something went wrong in the hub", 5},
		"its own sentence": {invalid("a-code", "a sentence"), codes.BadRequest, "a-code: a sentence", 0},
		"time to retry": {
			&hub.Error{Kind: hub.Exhausted, RetryAfter: 7 * time.Second, Err: secret}, codes.ServiceUnavailable,
			"exhausted: a limit is reached, try again later", 7,
		},
		"deadline": {context.DeadlineExceeded, codes.ServiceUnavailable, "deadline: no answer in time", 5},
	} {
		t.Run(name, func(t *testing.T) {
			r := failure(c.err)
			if r.Code != c.code || string(r.Payload) != c.text {
				t.Errorf("got %s %q, want %s %q", coap.Dotted(r.Code), r.Payload, coap.Dotted(c.code), c.text)
			}
			m := coap.Message{Options: r.Options}
			if _, ok := coap.ContentFormat(&m); ok {
				t.Error("a diagnostic payload must not have a Content-Format")
			}
			if age, ok := m.Uint(message.MaxAge); age != c.maxAge || ok != (c.maxAge > 0) {
				t.Errorf("Max-Age is %d, want %d", age, c.maxAge)
			}
		})
	}
}

func TestAccountErrorTurnsDeniedIntoUnauthenticated(t *testing.T) {
	t.Parallel()
	for _, k := range hub.Kinds() {
		want := k
		if k == hub.Denied {
			want = hub.Unauthenticated
		}
		if got := hub.KindOf(accountError(&hub.Error{Kind: k})); got != want {
			t.Errorf("%v becomes %v, want %v", k, got, want)
		}
	}
	if code, _ := hub.Public(accountError(hub.NewError(hub.Denied, "device-pinned", "x"))); code != "device-pinned" {
		t.Errorf("the stable code is lost: %s", code)
	}
}
