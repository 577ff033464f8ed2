package grpcgateway

import (
	"google.golang.org/protobuf/proto"

	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// metadataUpdated is the metadata of one device: an event, or the current one in a list.
type metadataUpdated struct {
	device hub.DeviceID
	meta   hub.Metadata
	cause  hub.Cause
	hubID  string
	// canceled: of a command that did not change it.
	canceled bool
}

func (m metadataUpdated) message(cursor string) proto.Message { return m.event(cursor) }

func (m metadataUpdated) event(cursor string) *rapb.DeviceMetadataUpdated {
	audit, meta := causeMessages(m.cause, m.hubID)
	next, interval := contactFields(m.meta.Contact)
	return &rapb.DeviceMetadataUpdated{
		DeviceId: string(m.device), Connection: connectionMessage(m.meta.Connection),
		TwinSynchronization: twinMessage(m.meta.Twin, m.cause), TwinEnabled: m.meta.Twin.Enabled, NextContact: next, ContactInterval: interval,
		AuditContext: audit, EventMetadata: meta, Canceled: m.canceled, Cursor: optional(cursor),
	}
}

func (m metadataUpdated) appendJSON(b []byte, cursor string) []byte {
	b = appendText(append(b, '{'), "deviceId", string(m.device))
	b = appendConnection(b, m.meta.Connection)
	b = appendTwin(b, m.meta.Twin, m.cause)
	b = appendContact(b, m.meta.Contact)
	b = appendCause(b, m.cause, m.hubID)
	b = appendBool(b, "canceled", m.canceled)
	return append(appendText(b, "cursor", cursor), '}')
}

func connectionStatus(c hub.Connection) rapb.Connection_Status {
	if c.Online {
		return rapb.Connection_ONLINE
	}
	return rapb.Connection_OFFLINE
}

func connectionMessage(c hub.Connection) *rapb.Connection {
	return &rapb.Connection{
		Status: connectionStatus(c), Id: c.ID, ConnectedAt: c.ConnectedAt, Protocol: rapb.Connection_Protocol(c.Protocol),
		ServiceId: c.Service, LocalEndpoints: c.LocalEndpoints,
	}
}

func appendConnection(b []byte, c hub.Connection) []byte {
	b = append(appendName(b, "connection"), '{')
	b = appendEnum(b, "status", rapb.Connection_Status_name, int32(connectionStatus(c)))
	b = appendText(b, "id", c.ID)
	b = appendInt(b, "connectedAt", c.ConnectedAt)
	b = appendEnum(b, "protocol", rapb.Connection_Protocol_name, int32(c.Protocol))
	b = appendText(b, "serviceId", c.Service)
	return append(appendTexts(b, "localEndpoints", c.LocalEndpoints), '}')
}

func twinMessage(t hub.Twin, c hub.Cause) *rapb.TwinSynchronization {
	return &rapb.TwinSynchronization{
		State: rapb.TwinSynchronization_State(t.State), SyncingAt: t.SyncingAt, InSyncAt: t.InSyncAt,
		CommandMetadata:        &rapb.CommandMetadata{ConnectionId: c.Connection, Sequence: c.Message},
		ForceSynchronizationAt: t.ForcedAt,
	}
}

// contactFields are nil for a device that is not known to sleep.
func contactFields(c hub.Contact) (next, interval *int64) {
	if c == (hub.Contact{}) {
		return nil, nil
	}
	i := int64(c.Interval)
	return &c.Next, &i
}

func appendContact(b []byte, c hub.Contact) []byte {
	if c == (hub.Contact{}) {
		return b
	}
	return appendInt(appendInt(b, "nextContact", c.Next), "contactInterval", int64(c.Interval))
}

// appendTwin appends twinSynchronization and twinEnabled.
func appendTwin(b []byte, t hub.Twin, c hub.Cause) []byte {
	b = append(appendName(b, "twinSynchronization"), '{')
	b = appendEnum(b, "state", rapb.TwinSynchronization_State_name, int32(t.State))
	b = appendInt(b, "syncingAt", t.SyncingAt)
	b = appendInt(b, "inSyncAt", t.InSyncAt)
	b = append(appendName(b, "commandMetadata"), '{')
	b = appendText(b, "connectionId", c.Connection)
	b = append(appendUint(b, "sequence", c.Message), '}')
	b = append(appendInt(b, "forceSynchronizationAt", t.ForcedAt), '}')
	return appendBool(b, "twinEnabled", t.Enabled)
}
