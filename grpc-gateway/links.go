package grpcgateway

import (
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// published is links of one device: an event, or those that match in a list.
type published struct {
	device hub.DeviceID
	links  []hub.Link
	cause  hub.Cause
	hubID  string
}

func (p published) message(cursor string) proto.Message { return p.event(cursor) }

func (p published) event(cursor string) *rapb.ResourceLinksPublished {
	audit, meta := causeMessages(p.cause, p.hubID)
	m := &rapb.ResourceLinksPublished{DeviceId: string(p.device), AuditContext: audit, EventMetadata: meta, Cursor: optional(cursor)}
	for _, l := range p.links {
		r := &rapb.Resource{
			Href: string(l.Href), DeviceId: string(p.device), ResourceTypes: l.Types, Interfaces: l.Interfaces, Anchor: l.Anchor,
			Title: l.Title, SupportedContentTypes: l.ContentTypes, ValidUntil: l.ValidUntil, Policy: &rapb.Policy{BitFlags: l.Policy},
		}
		for _, e := range l.Endpoints {
			r.EndpointInformations = append(r.EndpointInformations, &rapb.EndpointInformation{Endpoint: e.URI, Priority: e.Priority})
		}
		m.Resources = append(m.Resources, r)
	}
	return m
}

func (p published) appendJSON(b []byte, cursor string) []byte {
	b = appendText(append(b, '{'), "deviceId", string(p.device))
	if len(p.links) > 0 {
		b = append(appendName(b, "resources"), '[')
		for i, l := range p.links {
			if i > 0 {
				b = append(b, ',')
			}
			b = p.appendLink(b, l)
		}
		b = append(b, ']')
	}
	b = appendCause(b, p.cause, p.hubID)
	return append(appendText(b, "cursor", cursor), '}')
}

func (p published) appendLink(b []byte, l hub.Link) []byte {
	b = appendText(append(b, '{'), "href", string(l.Href))
	b = appendText(b, "deviceId", string(p.device))
	b = appendTexts(b, "resourceTypes", l.Types)
	b = appendTexts(b, "interfaces", l.Interfaces)
	b = appendText(b, "anchor", l.Anchor)
	b = appendText(b, "title", l.Title)
	b = appendTexts(b, "supportedContentTypes", l.ContentTypes)
	b = appendInt(b, "validUntil", l.ValidUntil)
	b = append(appendName(b, "policy"), `{"bitFlags":`...)
	b = append(strconv.AppendInt(b, int64(l.Policy), 10), '}')
	if len(l.Endpoints) > 0 {
		b = append(appendName(b, "endpointInformations"), '[')
		for i, e := range l.Endpoints {
			if i > 0 {
				b = append(b, ',')
			}
			b = appendText(append(b, '{'), "endpoint", e.URI)
			b = append(appendUint(b, "priority", e.Priority), '}')
		}
		b = append(b, ']')
	}
	return append(b, '}')
}

// unpublished is hrefs of one device whose links are gone.
type unpublished struct {
	device hub.DeviceID
	hrefs  []hub.Href
	cause  hub.Cause
	hubID  string
}

func (u unpublished) event() *rapb.ResourceLinksUnpublished {
	audit, meta := causeMessages(u.cause, u.hubID)
	m := &rapb.ResourceLinksUnpublished{DeviceId: string(u.device), AuditContext: audit, EventMetadata: meta}
	for _, h := range u.hrefs {
		m.Hrefs = append(m.Hrefs, string(h))
	}
	return m
}

func (u unpublished) appendJSON(b []byte) []byte {
	b = appendText(append(b, '{'), "deviceId", string(u.device))
	b = appendTexts(b, "hrefs", u.hrefs)
	return append(appendCause(b, u.cause, u.hubID), '}')
}

func causeMessages(c hub.Cause, hubID string) (*rapb.AuditContext, *rapb.EventMetadata) {
	var audit *rapb.AuditContext
	if c.Owner != "" || c.User != "" || c.Correlation != "" {
		audit = &rapb.AuditContext{UserId: c.User, CorrelationId: c.Correlation, Owner: string(c.Owner)}
	}
	if !c.Known {
		return audit, nil
	}
	return audit, &rapb.EventMetadata{
		Version: c.Version, Timestamp: c.Time, ConnectionId: c.Connection, Sequence: c.Message, HubId: hubID,
	}
}

// optional leaves the field out of messages to clients that did not ask for it.
func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

// toUTF8 keeps one bad byte of a device from making a whole protobuf message invalid.
func toUTF8(s string) string { return strings.ToValidUTF8(s, "\ufffd") }
