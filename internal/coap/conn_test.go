package coap

import (
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

func TestRequestAndAnswer(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("41e10123100000")           // the CSM of a recorded device
		p.frame("7301d00047b36f6963027264") // GET /oic/rd
		m := p.read()
		wantCode(t, m, codes.Content)
		if string(m.Token) != "\xd0\x00\x47" || string(m.Payload) != "/oic/rd" {
			t.Fatalf("answer %x %q", m.Token, m.Payload)
		}
	})
}
