package grpcgateway

import (
	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
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
	case hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.ResourceChanged, hub.CommandPending, hub.CommandEnded:
		return true
	case hub.Registered, hub.Unregistered, hub.LabelsChanged, hub.CommandBound, hub.CommandLate:
	}
	return false
}

func (e eventElement) cause() hub.Cause {
	return hub.CauseOf(e.commit, e.index)
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

func (e eventElement) pending() pendingElement {
	return pendingElement{pendingOf(e.commit, e.index), e.hubID}
}

func (e eventElement) ended() outcomeElement {
	return outcomeElement{hub.OutcomeOf(e.commit, e.index), e.hubID}
}

// setEvent makes the history's message hold the event.
func (p pendingElement) setEvent(m *pb.GetEventsResponse) {
	switch e := p.event().(type) {
	case *rapb.ResourceCreatePending:
		m.Type = &pb.GetEventsResponse_ResourceCreatePending{ResourceCreatePending: e}
	case *rapb.ResourceRetrievePending:
		m.Type = &pb.GetEventsResponse_ResourceRetrievePending{ResourceRetrievePending: e}
	case *rapb.ResourceUpdatePending:
		m.Type = &pb.GetEventsResponse_ResourceUpdatePending{ResourceUpdatePending: e}
	case *rapb.ResourceDeletePending:
		m.Type = &pb.GetEventsResponse_ResourceDeletePending{ResourceDeletePending: e}
	case *rapb.DeviceMetadataUpdatePending:
		m.Type = &pb.GetEventsResponse_DeviceMetadataUpdatePending{DeviceMetadataUpdatePending: e}
	}
}

// setEvent makes the history's message hold the event.
func (e outcomeElement) setEvent(m *pb.GetEventsResponse) {
	switch e := e.event().(type) {
	case *rapb.ResourceCreated:
		m.Type = &pb.GetEventsResponse_ResourceCreated{ResourceCreated: e}
	case *rapb.ResourceRetrieved:
		m.Type = &pb.GetEventsResponse_ResourceRetrieved{ResourceRetrieved: e}
	case *rapb.ResourceUpdated:
		m.Type = &pb.GetEventsResponse_ResourceUpdated{ResourceUpdated: e}
	case *rapb.ResourceDeleted:
		m.Type = &pb.GetEventsResponse_ResourceDeleted{ResourceDeleted: e}
	case *rapb.DeviceMetadataUpdated:
		m.Type = &pb.GetEventsResponse_DeviceMetadataUpdated{DeviceMetadataUpdated: e}
	}
}

// name is the member that holds the event in the history.
func (e outcomeElement) name() string {
	switch e.Kind {
	case hub.CommandCreate:
		return "resourceCreated"
	case hub.CommandRetrieve:
		return "resourceRetrieved"
	case hub.CommandUpdate:
		return "resourceUpdated"
	case hub.CommandDelete:
		return "resourceDeleted"
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	return "deviceMetadataUpdated"
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
	case hub.CommandPending:
		e.pending().setEvent(m)
	case hub.CommandEnded:
		e.ended().setEvent(m)
	case hub.Registered, hub.Unregistered, hub.LabelsChanged, hub.CommandBound, hub.CommandLate: // inHistory keeps them out
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
	case hub.CommandPending:
		p := e.pending()
		b = p.appendEvent(appendName(b, p.name()))
	case hub.CommandEnded:
		o := e.ended()
		b = o.appendEvent(appendName(b, o.name()), "")
	case hub.Registered, hub.Unregistered, hub.LabelsChanged, hub.CommandBound, hub.CommandLate: // inHistory keeps them out
	}
	return append(appendText(b, "cursor", cursor), '}')
}
