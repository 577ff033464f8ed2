package grpcgateway

import (
	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
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

// subscribables are the kinds of events that subscribers are told; a kind that is not here is passed over. A new kind is a
// row here, and in the table of the recorded filters in subscribe_filter_test.go.
var subscribables = map[hub.EventKind]subscribable{
	hub.Registered: {
		pb.SubscribeToEvents_CreateSubscription_REGISTERED, ofOwner, "deviceRegistered",
		func(b []byte, e eventElement) []byte { return e.owned().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceRegistered_{DeviceRegistered: &pb.Event_DeviceRegistered{DeviceIds: e.owned().ids(), EventMetadata: e.owned().metadata()}}
		},
	},
	hub.Unregistered: {
		pb.SubscribeToEvents_CreateSubscription_UNREGISTERED, ofOwner, "deviceUnregistered",
		func(b []byte, e eventElement) []byte { return e.owned().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceUnregistered_{DeviceUnregistered: &pb.Event_DeviceUnregistered{DeviceIds: e.owned().ids(), EventMetadata: e.owned().metadata()}}
		},
	},
	hub.MetadataUpdated: {
		pb.SubscribeToEvents_CreateSubscription_DEVICE_METADATA_UPDATED, ofDevice, "deviceMetadataUpdated",
		func(b []byte, e eventElement) []byte { return e.metadata().appendJSON(b, "") },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_DeviceMetadataUpdated{DeviceMetadataUpdated: e.metadata().event("")}
		},
	},
	hub.LinksPublished: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_PUBLISHED, ofDevice, "resourcePublished",
		func(b []byte, e eventElement) []byte { return e.published().appendJSON(b, "") },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourcePublished{ResourcePublished: e.published().event("")}
		},
	},
	hub.LinksUnpublished: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_UNPUBLISHED, ofDevice, "resourceUnpublished",
		func(b []byte, e eventElement) []byte { return e.unpublished().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourceUnpublished{ResourceUnpublished: e.unpublished().event()}
		},
	},
	hub.ResourceChanged: {
		pb.SubscribeToEvents_CreateSubscription_RESOURCE_CHANGED, ofResource, "resourceChanged",
		func(b []byte, e eventElement) []byte { return e.changed().appendJSON(b) },
		func(m *pb.Event, e eventElement) {
			m.Type = &pb.Event_ResourceChanged{ResourceChanged: e.changed().message()}
		},
	},
}
