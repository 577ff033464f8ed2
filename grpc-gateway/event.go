package grpcgateway

import (
	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// eventElement is one event of the history.
type eventElement struct {
	commit *hub.Commit
	index  int
	hubID  string
}

// inHistory reports whether the API has a form for the event. Registered and Unregistered are told to
// subscribers only; of labels it has the present ones.
func inHistory(k hub.EventKind) bool {
	switch k {
	case hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.ResourceChanged:
		return true
	case hub.Registered, hub.Unregistered, hub.LabelsChanged:
	}
	return false
}

func (e eventElement) cause() hub.Cause {
	ev := &e.commit.Events[e.index]
	return hub.Cause{
		Known: true, Version: ev.Version, Time: e.commit.Time, Session: ev.Session, Message: ev.Message, Connection: ev.Connection,
		User: ev.User, Correlation: ev.Correlation, Owner: e.commit.Owner,
	}
}

func (e eventElement) published() published {
	return published{device: e.commit.Device, links: e.commit.Events[e.index].Links, cause: e.cause(), hubID: e.hubID}
}

func (e eventElement) unpublished() unpublished {
	return unpublished{device: e.commit.Device, hrefs: e.commit.Events[e.index].Hrefs, cause: e.cause(), hubID: e.hubID}
}

func (e eventElement) metadata() metadataUpdated {
	m := metadataUpdated{device: e.commit.Device, cause: e.cause(), hubID: e.hubID}
	if p := e.commit.Events[e.index].Metadata; p != nil {
		m.meta = *p
	}
	return m
}

func (e eventElement) changed() changed {
	ev := &e.commit.Events[e.index]
	return changed{
		device: e.commit.Device, href: ev.Href, types: ev.Types, status: ev.Status, content: ev.Content, etag: ev.ETag,
		cause: e.cause(), hubID: e.hubID,
	}
}

func (e eventElement) message(cursor string) proto.Message {
	m := &pb.GetEventsResponse{Cursor: optional(cursor)}
	switch e.commit.Events[e.index].Kind {
	case hub.LinksPublished:
		m.Type = &pb.GetEventsResponse_ResourceLinksPublished{ResourceLinksPublished: e.published().event("")}
	case hub.LinksUnpublished:
		m.Type = &pb.GetEventsResponse_ResourceLinksUnpublished{ResourceLinksUnpublished: e.unpublished().event()}
	case hub.ResourceChanged:
		m.Type = &pb.GetEventsResponse_ResourceChanged{ResourceChanged: e.changed().message()}
	case hub.MetadataUpdated:
		m.Type = &pb.GetEventsResponse_DeviceMetadataUpdated{DeviceMetadataUpdated: e.metadata().event("")}
	case hub.Registered, hub.Unregistered, hub.LabelsChanged: // inHistory keeps them out
	}
	return m
}

func (e eventElement) appendJSON(b []byte, cursor string) []byte {
	b = append(b, '{')
	switch e.commit.Events[e.index].Kind {
	case hub.LinksPublished:
		b = e.published().appendJSON(appendName(b, "resourceLinksPublished"), "")
	case hub.LinksUnpublished:
		b = e.unpublished().appendJSON(appendName(b, "resourceLinksUnpublished"))
	case hub.ResourceChanged:
		b = e.changed().appendJSON(appendName(b, "resourceChanged"))
	case hub.MetadataUpdated:
		b = e.metadata().appendJSON(appendName(b, "deviceMetadataUpdated"), "")
	case hub.Registered, hub.Unregistered, hub.LabelsChanged: // inHistory keeps them out
	}
	return append(appendText(b, "cursor", cursor), '}')
}
