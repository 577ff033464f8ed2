package coapgateway

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// What a device says of its own network is bounded by number, further ones are left out, and by the length of each, a longer
// one is left out. A host's name has at most 255 bytes (RFC 7252, Section 5.10).
const (
	maxLocalEndpoints = 32
	maxLocalEndpoint  = 512
)

// learnEndpoints asks the device where it is reached in its own network, and records it. Errors are the directory's. A device
// that does not answer in time, or not with its link of type oic.wk.d, changes nothing.
func (s *session) learnEndpoints(patience time.Duration) error {
	ctx, cancel := context.WithTimeout(s.ctx, patience)
	defer cancel()
	m, err := s.askFor(ctx, whereAreYou())
	if err != nil || m.Code != codes.Content {
		s.log.Debug("the device did not say where it is in its own network", "error", err)
		return nil
	}
	at, ok := localEndpoints(m.Payload)
	if !ok {
		s.log.Debug("the device answered without a link of type oic.wk.d that can be used")
		return nil
	}
	return s.write(s.ctx, func(ctx context.Context, from hub.Stamp) error {
		return s.records.SetLocalEndpoints(ctx, from, at)
	})
}

func whereAreYou() *coap.Message {
	return &coap.Message{Code: codes.GET, Options: requestTo(resHref, "if=oic.if.ll", "rt=oic.wk.d")}
}

// localEndpoints are those of the first link of type oic.wk.d among a device's links (OCF Core, link parameter `eps`); nil where it
// has none. False: there is no such link.
func localEndpoints(links []byte) (at []string, ok bool) {
	var parsed []struct {
		Types []string `cbor:"rt"`
		Eps   []struct {
			URI string `cbor:"ep"`
		} `cbor:"eps"`
	}
	if decoding.Unmarshal(links, &parsed) != nil {
		return nil, false
	}
	for _, l := range parsed {
		if !slices.Contains(l.Types, "oic.wk.d") { // the device need not heed the query
			continue
		}
		for _, e := range l.Eps {
			if usable := e.URI != "" && len(e.URI) <= maxLocalEndpoint && !strings.ContainsFunc(e.URI, control); usable {
				at = append(at, e.URI)
			}
			if len(at) == maxLocalEndpoints {
				break
			}
		}
		return at, true
	}
	return nil, false
}

func control(r rune) bool { return r < 0x20 || r == 0x7f }
