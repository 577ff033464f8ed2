package coapgateway

import (
	"context"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/coap"
)

type timeResponse struct {
	Time string `cbor:"time" json:"time"`
}

// hubTime is for devices that have no clock and need one to check certificates; so it asks for no session.
func (p *peer) hubTime(_ context.Context, _ *coap.Message, format int32) (coap.Response, error) {
	r, err := success(codes.Content, format, timeResponse{time.Now().UTC().Format(time.RFC3339Nano)})
	r.Options = coap.AddUint(r.Options, coap.MaxAge, 0) // RFC 7252, Section 5.6.1: a proxy must not keep it for a minute
	return r, err
}
