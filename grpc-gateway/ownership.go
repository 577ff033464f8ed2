package grpcgateway

import (
	idpb "github.com/coaphub/coaphub/api/gen/identitystorepb"
	"github.com/coaphub/coaphub/hub"
)

// owned is a device that became the owner's, or is no more.
type owned struct {
	device hub.DeviceID
	hubID  string
}

func (e eventElement) owned() owned { return owned{e.commit.Device, e.hubID} }

func (o owned) ids() []string { return []string{string(o.device)} }

func (o owned) metadata() *idpb.EventMetadata { return &idpb.EventMetadata{HubId: o.hubID} }

func (o owned) appendJSON(b []byte) []byte {
	b = appendTexts(append(b, '{'), "deviceIds", o.ids())
	b = append(appendName(b, "eventMetadata"), '{')
	return append(appendText(b, "hubId", o.hubID), '}', '}')
}
