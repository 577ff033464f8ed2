package coap

import (
	"strings"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// Link is a resource as /.well-known/core lists it (RFC 6690).
type Link struct {
	Href    string
	Type    string // "" for none
	Formats string // of its representations, numbers with a space between them
}

// Links answers a request for /.well-known/core: in the CoRE link format (RFC 6690, Section 4), with the links that its queries mean by
// href and rt (Section 4.1). Others filter nothing. NotAcceptable if another format is asked for.
func Links(req *Message, queries map[string][]string, links []Link) (Response, error) {
	format, err := Acceptable(req, hub.FormatLink)
	if err != nil {
		return Response{}, err
	}
	var b strings.Builder
	for _, l := range links {
		if !linkMatches(queries["href"], l.Href) || !linkMatches(queries["rt"], l.Type) {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString("<" + l.Href + ">")
		if l.Type != "" {
			b.WriteString(`;rt="` + l.Type + `"`)
		}
		if strings.Contains(l.Formats, " ") { // RFC 7252, Section 7.2.1: several are quoted
			b.WriteString(`;ct="` + l.Formats + `"`)
		} else {
			b.WriteString(";ct=" + l.Formats)
		}
	}
	return Response{
		Code: codes.Content, Options: AddUint(nil, message.ContentFormat, uint32(format)), Payload: []byte(b.String()),
	}, nil
}

// linkMatches reports whether a value is what each query wants: equal, or with the same beginning if that ends in a star.
func linkMatches(want []string, value string) bool {
	for _, w := range want {
		if prefix, ok := strings.CutSuffix(w, "*"); ok && value != "" && strings.HasPrefix(value, prefix) || w == value {
			continue
		}
		return false
	}
	return true
}
