package grpcgateway

import (
	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// apiKind is a kind of event as subscribers name it.
type apiKind = pb.SubscribeToEvents_CreateSubscription_Event

// reach says which filters of a subscription apply to a kind of event.
type reach uint8

const (
	ofOwner    reach = iota // none: it concerns the owner's set of devices
	ofDevice                // those that name devices
	ofResource              // all
)

// subscribable is what subscribers are told of a kind of event.
type subscribable struct {
	api    apiKind
	reach  reach
	member string                            // of Event, in JSON
	json   func([]byte, eventElement) []byte // appends the member's value in the simple form
	set    func(*pb.Event, eventElement)     // sets the member
}

// eventKind is a kind of events as the API tells them apart: those of commands also by what they ask, but all of the twin are
// one.
type eventKind struct {
	event   hub.EventKind
	command hub.CommandKind // CommandTwinOn for all of the twin; 0 = it is no event of a command
}

func kindOfEvent(ev *hub.Event) eventKind {
	k := eventKind{event: ev.Kind}
	if ev.Command != nil {
		if k.command = ev.Command.Kind; k.command.OfTwin() {
			k.command = hub.CommandTwinOn
		}
	}
	return k
}

// subscribables are the kinds of events that subscribers are told; a kind that is not here is passed over. A new kind is a
// row here, and in the table of the recorded filters in subscribe_filter_test.go.
var subscribables = map[eventKind]subscribable{
	{event: hub.Registered}: {
		pb.SubscribeToEvents_CreateSubscription_REGISTERED, ofOwner, "deviceRegistered",
		func(b []byte, e eventElement) []byte { return e.owned().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceRegistered_{DeviceRegistered: &pb.Event_DeviceRegistered{DeviceIds: e.owned().ids(), EventMetadata: e.owned().metadata()}}
		},
	},
	{event: hub.Unregistered}: {
		pb.SubscribeToEvents_CreateSubscription_UNREGISTERED, ofOwner, "deviceUnregistered",
		func(b []byte, e eventElement) []byte { return e.owned().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceUnregistered_{DeviceUnregistered: &pb.Event_DeviceUnregistered{DeviceIds: e.owned().ids(), EventMetadata: e.owned().metadata()}}
		},
	},
	{event: hub.MetadataUpdated}: {
		pb.SubscribeToEvents_CreateSubscription_DEVICE_METADATA_UPDATED, ofDevice, "deviceMetadataUpdated",
		func(b []byte, e eventElement) []byte { return e.metadata().appendJSON(b, "") },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceMetadataUpdated{DeviceMetadataUpdated: e.metadata().event("")}
		},
	},
	{event: hub.LinksPublished}: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_PUBLISHED, ofDevice, "resourcePublished",
		func(b []byte, e eventElement) []byte { return e.published().appendJSON(b, "") },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourcePublished{ResourcePublished: e.published().event("")}
		},
	},
	{event: hub.LinksUnpublished}: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_UNPUBLISHED, ofDevice, "resourceUnpublished",
		func(b []byte, e eventElement) []byte { return e.unpublished().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourceUnpublished{ResourceUnpublished: e.unpublished().event()}
		},
	},
	{event: hub.ResourceChanged}: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_CHANGED, ofResource, "resourceChanged",
		func(b []byte, e eventElement) []byte { return e.changed().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourceChanged{ResourceChanged: e.changed().message()}
		},
	},
	{hub.CommandPending, hub.CommandCreate}:   pendingKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_CREATE_PENDING, ofResource, "resourceCreatePending"),
	{hub.CommandEnded, hub.CommandCreate}:     endedKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_CREATED, ofResource, "resourceCreated"),
	{hub.CommandPending, hub.CommandRetrieve}: pendingKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_RETRIEVE_PENDING, ofResource, "resourceRetrievePending"),
	{hub.CommandEnded, hub.CommandRetrieve}:   endedKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_RETRIEVED, ofResource, "resourceRetrieved"),
	{hub.CommandPending, hub.CommandUpdate}:   pendingKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_UPDATE_PENDING, ofResource, "resourceUpdatePending"),
	{hub.CommandEnded, hub.CommandUpdate}:     endedKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_UPDATED, ofResource, "resourceUpdated"),
	{hub.CommandPending, hub.CommandDelete}:   pendingKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_DELETE_PENDING, ofResource, "resourceDeletePending"),
	{hub.CommandEnded, hub.CommandDelete}:     endedKind(pb.SubscribeToEvents_CreateSubscription_RESOURCE_DELETED, ofResource, "resourceDeleted"),
	{hub.CommandPending, hub.CommandTwinOn}:   pendingKind(pb.SubscribeToEvents_CreateSubscription_DEVICE_METADATA_UPDATE_PENDING, ofDevice, "deviceMetadataUpdatePending"),
	// How a command of the twin ended is told as the metadata that it left.
	{hub.CommandEnded, hub.CommandTwinOn}: endedKind(pb.SubscribeToEvents_CreateSubscription_DEVICE_METADATA_UPDATED, ofDevice, "deviceMetadataUpdated"),
}

// pendingKind is a row for commands that were given.
func pendingKind(api apiKind, r reach, member string) subscribable {
	return subscribable{
		api, r, member,
		func(b []byte, e eventElement) []byte { return e.pending().appendEvent(b) },
		func(m *pb.Event, e eventElement) {
			switch p := e.pending().event().(type) {
			case *rapb.ResourceCreatePending:
				m.Type = &pb.Event_ResourceCreatePending{ResourceCreatePending: p}
			case *rapb.ResourceRetrievePending:
				m.Type = &pb.Event_ResourceRetrievePending{ResourceRetrievePending: p}
			case *rapb.ResourceUpdatePending:
				m.Type = &pb.Event_ResourceUpdatePending{ResourceUpdatePending: p}
			case *rapb.ResourceDeletePending:
				m.Type = &pb.Event_ResourceDeletePending{ResourceDeletePending: p}
			case *rapb.DeviceMetadataUpdatePending:
				m.Type = &pb.Event_DeviceMetadataUpdatePending{DeviceMetadataUpdatePending: p}
			}
		},
	}
}

// endedKind is a row for commands that ended.
func endedKind(api apiKind, r reach, member string) subscribable {
	return subscribable{
		api, r, member,
		func(b []byte, e eventElement) []byte { return e.ended().appendEvent(b, "") },
		func(m *pb.Event, e eventElement) {
			switch o := e.ended().event().(type) {
			case *rapb.ResourceCreated:
				m.Type = &pb.Event_ResourceCreated{ResourceCreated: o}
			case *rapb.ResourceRetrieved:
				m.Type = &pb.Event_ResourceRetrieved{ResourceRetrieved: o}
			case *rapb.ResourceUpdated:
				m.Type = &pb.Event_ResourceUpdated{ResourceUpdated: o}
			case *rapb.ResourceDeleted:
				m.Type = &pb.Event_ResourceDeleted{ResourceDeleted: o}
			case *rapb.DeviceMetadataUpdated:
				m.Type = &pb.Event_DeviceMetadataUpdated{DeviceMetadataUpdated: o}
			}
		},
	}
}
