package coapgateway

import (
	"context"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// ownResource is one of the hub's own resources as RFC 6690 lists it.
type ownResource struct{ href, rt, ct string }

var ownResources = []ownResource{
	{"/oic/sec/account", "oic.r.account", "10000 60 50"},
	{"/oic/sec/session", "oic.r.session", "10000 60 50"},
	{"/oic/sec/tokenrefresh", "oic.r.tokenrefresh", "10000 60 50"},
	{"/oic/rd", "oic.wk.rd", "10000 60 50"},
	{"/oic/res", "oic.wk.res", "10000 60 50"},
	{"/x.plgd.dev/time", "x.plgd.dev.time", "10000 60 50"},
	{est.Path + "crts", "ace.est.crts", "281 287"}, // RFC 9148, Section 5.1
	{est.Path + "att", "ace.est.att", "285"},
	{est.Path + "sren", "ace.est.sren", "281 287"},
}

// core lists the hub's own resources in the CoRE link format (RFC 6690, Section 4). Devices' resources are behind a session.
func (p *peer) core(_ context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	if _, err := coap.Acceptable(req, hub.FormatLink); err != nil {
		return coap.Response{}, err
	}
	q, err := parseQueries(req, hub.Invalid)
	if err != nil {
		return coap.Response{}, err
	}
	var b strings.Builder
	for _, r := range ownResources {
		if strings.HasPrefix(r.href, est.Path) && p.gw.deps.Renewals == nil || !coreMatches(q["href"], r.href) || !coreMatches(q["rt"], r.rt) {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString("<" + r.href + `>;rt="` + r.rt + `";ct="` + r.ct + `"`)
	}
	return withFormat(codes.Content, hub.FormatLink, []byte(b.String())), nil
}

// coreMatches filters as RFC 6690, Section 4.1 says: equal, or with the same beginning if the value ends in a star.
func coreMatches(want []string, value string) bool {
	for _, w := range want {
		if prefix, ok := strings.CutSuffix(w, "*"); ok && strings.HasPrefix(value, prefix) || w == value {
			continue
		}
		return false
	}
	return true
}
