package grpcgateway

import (
	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// element is one message of a list, in both of its forms. cursor is empty but on the last element of a page that a limit
// cut short.
type element interface {
	message(cursor string) proto.Message // for gRPC and protobuf's JSON
	appendJSON(b []byte, cursor string) []byte
}

// changed is a representation of a resource: an event, or the last one in a twin.
type changed struct {
	device  hub.DeviceID
	href    hub.Href
	types   []string
	status  hub.Status
	content hub.Content
	etag    []byte
	cause   hub.Cause
	hubID   string
}

func twinOf(dev hub.DeviceID, r *hub.Resource, hubID string) changed {
	return changed{
		device: dev, href: r.Href, types: r.Types, status: r.Status, content: r.Content, etag: r.ETag, hubID: hubID,
		cause: hub.Cause{
			Known: true, Version: r.Version, Time: r.Time, Session: r.Session, Message: r.Message, Connection: r.Connection,
			User: r.User, Correlation: r.Correlation, Owner: r.Owner,
		},
	}
}

// notModified is what remains of c for a caller who has it already.
func (c changed) notModified() changed {
	c.status, c.content = hub.StatusNotModified, hub.Content{Format: hub.FormatNone}
	return c
}

func contentMessage(c hub.Content) *rapb.Content {
	return &rapb.Content{Data: c.Data, ContentType: toUTF8(c.Type), CoapContentFormat: c.Format}
}

func (c changed) message() *rapb.ResourceChanged {
	audit, meta := causeMessages(c.cause, c.hubID)
	return &rapb.ResourceChanged{
		ResourceId: &rapb.ResourceId{DeviceId: string(c.device), Href: string(c.href)},
		Content:    contentMessage(c.content), Status: rapb.Status(c.status), AuditContext: audit, EventMetadata: meta,
		Etag: c.etag, ResourceTypes: c.types,
	}
}

func (c changed) appendJSON(b []byte) []byte {
	b = append(b, '{')
	b = append(appendName(b, "resourceId"), '{')
	b = appendText(b, "deviceId", string(c.device))
	b = append(appendText(b, "href", string(c.href)), '}')
	b = appendContent(appendName(b, "content"), c.content)
	b = appendEnum(b, "status", rapb.Status_name, int32(c.status))
	b = appendCause(b, c.cause, c.hubID)
	b = appendBytes(b, "etag", c.etag)
	return append(appendTexts(b, "resourceTypes", c.types), '}')
}

// resourceElement is a twin in a list.
type resourceElement struct {
	types []string // of the link
	data  changed
	known bool // false: published, and never reported; then data is absent
}

func (e resourceElement) message(cursor string) proto.Message {
	m := &pb.Resource{Types: e.types, Cursor: optional(cursor)}
	if e.known {
		m.Data = e.data.message()
	}
	return m
}

func (e resourceElement) appendJSON(b []byte, cursor string) []byte {
	b = appendTexts(append(b, '{'), "types", e.types)
	if e.known {
		b = e.data.appendJSON(appendName(b, "data"))
	}
	return append(appendText(b, "cursor", cursor), '}')
}
