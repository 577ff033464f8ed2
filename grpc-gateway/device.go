package grpcgateway

import (
	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// deviceHref is the resource that tells what a device is (OCF Core, 11.3.4: oic.wk.d). A device without it is not listed.
const deviceHref hub.Href = "/oic/d"

// localized is a text in one language.
type localized struct {
	Language string `json:"language"`
	Value    string `json:"value"`
}

// deviceElement is a device in a list.
type deviceElement struct {
	id        hub.DeviceID
	meta      hub.Metadata
	metaCause hub.Cause
	link      hub.Link
	data      changed // of /oic/d
	says      *description
	labels    hub.Labels
}

// newDevice makes the element of a device, or reports false for one that is not listed: never attached, /oic/d not
// published, not reported, or not a decodable object.
func (g *Gateway) newDevice(d *hub.Device) (deviceElement, bool) {
	link, ok := d.Links.Get(deviceHref)
	if !ok || !d.MetaCause.Known {
		return deviceElement{}, false
	}
	res, ok := d.Resources.Get(deviceHref)
	if !ok {
		return deviceElement{}, false
	}
	says := g.descriptions.of(d.ID, res)
	if says == nil {
		return deviceElement{}, false
	}
	return deviceElement{
		id: d.ID, meta: d.Metadata, metaCause: d.MetaCause, link: link, data: twinOf(d.ID, res, g.deps.HubID), says: says, labels: d.Labels,
	}, true
}

func (e deviceElement) endpoints() []string {
	var uris []string
	for _, ep := range e.link.Endpoints {
		uris = append(uris, ep.URI)
	}
	return uris
}

func (e deviceElement) message(cursor string) proto.Message {
	next, interval := contactFields(e.meta.Contact)
	m := &pb.Device{
		Id: string(e.id), Types: e.link.Types, Name: e.says.name,
		Metadata: &pb.Device_Metadata{
			Connection: connectionMessage(e.meta.Connection), TwinSynchronization: twinMessage(e.meta.Twin, e.metaCause),
			TwinEnabled: e.meta.Twin.Enabled, NextContact: next, ContactInterval: interval,
		},
		ModelNumber: e.says.model, Interfaces: e.link.Interfaces, ProtocolIndependentId: e.says.piid, Data: e.data.message(),
		OwnershipStatus: pb.Device_OWNED, Endpoints: e.endpoints(), Cursor: optional(cursor),
		Labels: e.labels,
	}
	for _, t := range e.says.manufacturer {
		m.ManufacturerName = append(m.ManufacturerName, &pb.LocalizedString{Language: t.Language, Value: t.Value})
	}
	return m
}

func (e deviceElement) appendJSON(b []byte, cursor string) []byte {
	b = appendText(append(b, '{'), "id", string(e.id))
	b = appendTexts(b, "types", e.link.Types)
	b = appendText(b, "name", e.says.name)
	b = append(appendName(b, "metadata"), '{')
	b = appendConnection(b, e.meta.Connection)
	b = appendTwin(b, e.meta.Twin, e.metaCause)
	b = append(appendContact(b, e.meta.Contact), '}')
	if len(e.says.manufacturer) > 0 {
		b = append(appendName(b, "manufacturerName"), '[')
		first := true
		for _, t := range e.says.manufacturer {
			if t == (localized{}) { // an empty object is left out, like all empty ones
				continue
			}
			if !first {
				b = append(b, ',')
			}
			first = false
			b = appendText(append(b, '{'), "language", t.Language)
			b = append(appendText(b, "value", t.Value), '}')
		}
		b = append(b, ']')
	}
	b = appendText(b, "modelNumber", e.says.model)
	b = appendTexts(b, "interfaces", e.link.Interfaces)
	b = appendText(b, "protocolIndependentId", e.says.piid)
	b = e.data.appendJSON(appendName(b, "data"))
	b = appendEnum(b, "ownershipStatus", pb.Device_OwnershipStatus_name, int32(pb.Device_OWNED))
	b = appendTexts(b, "endpoints", e.endpoints())
	b = appendLabels(b, e.labels)
	return append(appendText(b, "cursor", cursor), '}')
}
