package coapgateway

import (
	"net/url"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// queries are the Uri-Query options of a request by key. Each option is read as a URL query string of its own, so that
// "uid=..&di=.." in one option is as good as two options: devices send both forms.
type queries map[string][]string

// parseQueries reads the request's queries. Broken percent escapes are of the kind given: sign-off answers 4.02, all other
// paths 4.00 (compat).
func parseQueries(req *coap.Message, kind hub.Kind) (queries, error) {
	q := queries{}
	for _, o := range req.Options {
		if o.ID != message.URIQuery {
			continue
		}
		for part := range strings.SplitSeq(string(o.Value), "&") {
			key, value, _ := strings.Cut(part, "=")
			k, err := url.QueryUnescape(key)
			if err == nil {
				value, err = url.QueryUnescape(value)
			}
			if err != nil {
				return nil, hub.NewError(kind, "query-invalid", "a query has a broken percent escape")
			}
			if k != "" {
				q[k] = append(q[k], value)
			}
		}
	}
	return q, nil
}

// first returns the first value of the key, "" if there is none.
func (q queries) first(key string) string {
	if v := q[key]; len(v) > 0 {
		return v[0]
	}
	return ""
}

// pathOf returns the request's path, "/" for none. What would separate segments is escaped inside of them: the one option
// "oic/rd" is not the path /oic/rd (RFC 7252, Section 6.5).
func pathOf(req *coap.Message) string {
	var b strings.Builder
	for _, o := range req.Options {
		if o.ID == message.URIPath {
			b.WriteByte('/')
			b.WriteString(url.PathEscape(string(o.Value)))
		}
	}
	if b.Len() == 0 {
		return "/"
	}
	return b.String()
}
