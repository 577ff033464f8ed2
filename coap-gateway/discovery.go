package coapgateway

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// maxDiscovery bounds the answer of GET /oic/res; above it the device is told to ask for less.
const maxDiscovery = 4 << 20

// Discoveries under way are few, since each may read thousands of devices and build maxDiscovery. Others wait, on the goroutine
// of their connection, for less than a device waits for a Pong (4 s, iotivity-lite).
const (
	discoveriesUnderWay = 8
	discoveriesWaiting  = 1000
	discoveryMaxWait    = 2 * time.Second
)

// deviceLinks is the form that Accept 60 asks for.
type deviceLinks struct {
	Device   string `cbor:"di" json:"di"`
	Links    []link `cbor:"links" json:"links"`
	TTL      int    `cbor:"ttl" json:"ttl"`
	Lifetime int    `cbor:"lt" json:"lt"`
}

// discover lists the links of all devices of the owner, as they are reached through the hub. The queries di and rt select;
// if and all others are ignored (compat).
func (p *peer) discover(ctx context.Context, req *coap.Message, format int32) (coap.Response, error) {
	q, err := parseQueries(req, hub.Invalid)
	if err != nil {
		return coap.Response{}, err
	}
	place, err := p.enter(ctx, p.gw.discoveries, errDiscoveries)
	if err != nil {
		return coap.Response{}, err
	}
	defer place.Leave()
	ids, err := p.discoverable(ctx, q["di"])
	if err != nil {
		return coap.Response{}, err
	}
	types := map[string]bool{}
	for _, rt := range q["rt"] {
		types[rt] = true
	}
	eps := []endpoint{{URI: p.externalEndpoint(), Priority: 1}}
	list := listBody{format: format}
	if len(ids) > 0 { // an empty list would be all devices to nobody's surprise but the owner's
		for dev, err := range p.gw.deps.Directory.Devices(ctx, p.sess.own.Owner, ids) {
			if ended := ctx.Err(); err == nil && ended != nil { // what is in memory comes without a look at it
				err = &hub.Error{Kind: hub.KindOf(ended), Op: "discover", Err: ended}
			}
			if err != nil {
				return coap.Response{}, err
			}
			group := deviceLinks{Device: string(dev.ID), TTL: -1, Lifetime: -1}
			for l := range dev.Links.All() {
				if len(types) > 0 && !slices.ContainsFunc(l.Types, func(t string) bool { return types[t] }) {
					continue
				}
				one := routed(dev.ID, l, eps)
				if format == hub.FormatCBOR {
					group.Links = append(group.Links, one)
				} else if err := list.add(one); err != nil {
					return coap.Response{}, err
				}
			}
			if format == hub.FormatCBOR && len(group.Links) > 0 {
				if err := list.add(group); err != nil {
					return coap.Response{}, err
				}
			}
		}
	}
	return withFormat(codes.Content, format, list.bytes()), nil
}

// discoverable are the devices to look at: all of the owner's, or those that the request names. Whether those are the owner's
// is decided by the stamp on each, so that a few of them need no list of all.
func (p *peer) discoverable(ctx context.Context, di []string) ([]hub.DeviceID, error) {
	self, alone := p.sess.own.Device, p.gw.cfg.DeviceToDevice.Mode == ModeOff
	if len(di) == 0 {
		if alone {
			return []hub.DeviceID{self}, nil
		}
		return p.gw.deps.Identities.Devices(ctx, p.sess.own.Owner)
	}
	named := map[hub.DeviceID]bool{}
	for _, s := range di {
		if id, err := hub.ParseDeviceID(s); err == nil && (id == self || !alone) { // what is no ID is no device's
			named[id] = true
		}
	}
	return slices.Sorted(maps.Keys(named)), nil
}

// externalEndpoint is where the asking device reaches the hub: the scheme is that of its own connection.
func (p *peer) externalEndpoint() string {
	info := p.conn.Info()
	switch {
	case info.Host == "":
		return p.gw.Endpoint(p.protocol())
	case info.Secure:
		return "coaps+ws://" + info.Host // RFC 8323, Sections 8.3 to 8.5
	}
	return "coap+ws://" + info.Host
}

// listBody is a CBOR or JSON array that is encoded member by member, so that it can be given up before it is too large.
type listBody struct {
	format int32
	n      int
	data   []byte
}

func (l *listBody) add(member any) error {
	b, err := encodeBody(l.format, member)
	if err != nil {
		return err
	}
	if len(l.data)+len(b) > maxDiscovery {
		return hub.NewError(hub.TooLarge, "discovery-too-large", "there are too many links; ask with di or rt")
	}
	if l.format == hub.FormatJSON && l.n > 0 {
		l.data = append(l.data, ',')
	}
	l.data = append(l.data, b...)
	l.n++
	return nil
}

func (l *listBody) bytes() []byte {
	if l.format == hub.FormatJSON {
		return append(append([]byte{'['}, l.data...), ']')
	}
	// RFC 8949, Section 3: major type 4 with the number of members.
	var head []byte
	switch {
	case l.n < 24:
		head = []byte{0x80 | byte(l.n)}
	case l.n < 1<<8:
		head = []byte{0x98, byte(l.n)}
	case l.n < 1<<16:
		head = binary.BigEndian.AppendUint16([]byte{0x99}, uint16(l.n))
	default:
		head = binary.BigEndian.AppendUint32([]byte{0x9a}, uint32(l.n))
	}
	return append(head, l.data...)
}
