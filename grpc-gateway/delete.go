package grpcgateway

import (
	"context"
	"slices"

	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// deleteDevices deletes the named devices, or with all every one of the owner's, and returns what was deleted. Names that
// are no device of the owner are passed over, what is no UUID is Invalid. A filter that names nothing, because it is empty or
// holds an empty text, is an error too: a client that lost its variable must not lose its devices.
func (g *Gateway) deleteDevices(ctx context.Context, c hub.Claims, names []string, all bool) (deleted, error) {
	var ids []hub.DeviceID
	switch {
	case len(names) > maxFilter:
		return deleted{}, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	case all && len(names) > 0:
		return deleted{}, errDeleteBoth
	case all:
		var err error
		if ids, err = g.deps.Identities.Devices(ctx, c.Owner); err != nil {
			return deleted{}, err
		}
	case len(names) == 0 || slices.Contains(names, ""):
		return deleted{}, errDeleteAll
	default:
		f, err := newFilter(names, nil, nil)
		if err != nil {
			return deleted{}, err
		}
		ids = f.ids()
	}
	var out deleted
	for _, id := range ids {
		switch err := g.deps.Identities.Remove(ctx, id, c.Owner, c.Subject, ""); {
		case hub.IsKind(err, hub.NotFound):
		case err != nil: // what was deleted before stays so; asking again deletes the rest
			return deleted{}, err
		default:
			out.ids = append(out.ids, id)
		}
	}
	return out, nil
}

type deleted struct{ ids []hub.DeviceID }

func (d deleted) response() *pb.DeleteDevicesResponse {
	m := &pb.DeleteDevicesResponse{}
	for _, id := range d.ids {
		m.DeviceIds = append(m.DeviceIds, string(id))
	}
	return m
}

func (d deleted) message(string) proto.Message { return d.response() }

func (d deleted) appendJSON(b []byte, _ string) []byte {
	return append(appendTexts(append(b, '{'), "deviceIds", d.ids), '}')
}
