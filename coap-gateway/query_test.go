package coapgateway

import (
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/internal/coap"
)

// A slash inside a segment is no separator (RFC 7252, Section 6.5): one option "oic/rd" is another path than /oic/rd.
func TestPathOf(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		want     string
		segments []string
	}{
		{"/", nil},
		{"/oic/rd", []string{"oic", "rd"}},
		{"/.well-known/core", []string{".well-known", "core"}},
		{"/oic%2Frd", []string{"oic/rd"}},
		{"/oic%252Frd", []string{"oic%2Frd"}},
		{"/oic/rd/", []string{"oic", "rd", ""}},
	} {
		req := &coap.Message{}
		for _, s := range tt.segments {
			req.Options = append(req.Options, message.Option{ID: message.URIPath, Value: []byte(s)})
		}
		if got := pathOf(req); got != tt.want {
			t.Errorf("path of %q = %q, want %q", tt.segments, got, tt.want)
		}
	}
}
