package coapgateway

import (
	"context"
	"slices"
	"strings"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// ownResources are the hub's own resources.
var ownResources = []coap.Link{
	{Href: "/oic/sec/account", Type: "oic.r.account", Formats: "10000 60 50"},
	{Href: "/oic/sec/session", Type: "oic.r.session", Formats: "10000 60 50"},
	{Href: "/oic/sec/tokenrefresh", Type: "oic.r.tokenrefresh", Formats: "10000 60 50"},
	{Href: "/oic/rd", Type: "oic.wk.rd", Formats: "10000 60 50"},
	{Href: "/oic/res", Type: "oic.wk.res", Formats: "10000 60 50"},
	{Href: "/x.plgd.dev/time", Type: "x.plgd.dev.time", Formats: "10000 60 50"},
	{Href: est.Path + "crts", Type: "ace.est.crts", Formats: "281 287"}, // RFC 9148, Section 5.1
	{Href: est.Path + "att", Type: "ace.est.att", Formats: "285"},
	{Href: est.Path + "sren", Type: "ace.est.sren", Formats: "281 287"},
}

// core lists the hub's own resources. Devices' resources are behind a session.
func (p *peer) core(_ context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	q, err := parseQueries(req, hub.Invalid)
	if err != nil {
		return coap.Response{}, err
	}
	links := ownResources
	if p.gw.deps.Renewals == nil {
		links = slices.DeleteFunc(slices.Clone(links), func(l coap.Link) bool { return strings.HasPrefix(l.Href, est.Path) })
	}
	return coap.Links(req, q, links)
}
