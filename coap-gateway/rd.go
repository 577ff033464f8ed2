package coapgateway

import (
	"context"
	"strconv"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// selectorResponse is the body of GET /oic/rd: 0 means "this directory" (OCF Core, oic.r.rd).
type selectorResponse struct {
	Selector int `cbor:"sel" json:"sel"`
}

// selector is how iotivity-lite keeps its session alive where it has no pings: it asks nobody else and is never refused.
func (p *peer) selector(_ context.Context, _ *coap.Message, format int32) (coap.Response, error) {
	return success(codes.Content, format, selectorResponse{})
}

// publish merges the device's links into the directory.
func (p *peer) publish(ctx context.Context, req *coap.Message, format int32) (coap.Response, error) {
	s := p.sess
	var body publication
	if err := decodeBody(req.Payload, &body); err != nil {
		return coap.Response{}, err
	}
	switch {
	case body.Device == "":
		return coap.Response{}, invalid("device-id-missing", "di is missing")
	case !s.named(body.Device):
		// compat lets a device publish for any device of its owner; a device's credential is good for that device.
		return coap.Response{}, invalid("device-id-mismatch", "di is not the device that is signed in")
	case len(body.Links) == 0:
		return coap.Response{}, invalid("links-missing", "links are missing")
	case len(body.Links) > p.gw.cfg.API.CoAP.MaxLinks:
		return coap.Response{}, hub.NewError(hub.TooLarge, "too-many-links", "there are more links than a publish may have")
	}
	until, err := body.validUntil(time.Now())
	if err != nil {
		return coap.Response{}, err
	}
	links := make([]hub.Link, len(body.Links))
	for i := range body.Links {
		if links[i], err = body.Links[i].hubLink(until); err != nil {
			return coap.Response{}, err
		}
	}
	var stored []hub.Link
	err = s.write(ctx, func(ctx context.Context, from hub.Stamp) (err error) {
		if stored, err = s.records.Publish(ctx, from, links); err == nil {
			s.twin.tell(links, true)
		}
		return err
	})
	if err != nil {
		return coap.Response{}, err
	}
	for i := range body.Links {
		l := &body.Links[i]
		href := links[i].Href
		if i < len(stored) {
			href = stored[i].Href
		}
		// iotivity-lite skips links without ins. It is computed over the cleaned href, which is what unpublish compares.
		l.Href, l.Device, l.Instance = string(href), string(s.own.Device), href.InstanceID()
	}
	body.Device = string(s.own.Device)
	s.twin.published(links)
	return success(codes.Changed, format, body)
}

// unpublish removes links by instance ID, all of them if the query names none.
func (p *peer) unpublish(ctx context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	s := p.sess
	q, err := parseQueries(req, hub.Invalid)
	if err != nil {
		return coap.Response{}, err
	}
	if len(q["di"]) != 1 || !s.named(q.first("di")) {
		return coap.Response{}, invalid("device-id-mismatch", "di must name the device that is signed in, once")
	}
	want := map[uint32]bool{}
	for _, v := range q["ins"] {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return coap.Response{}, invalid("instance-invalid", "ins is not an instance ID")
		}
		want[uint32(n)] = true
	}
	var hrefs []hub.Href
	if len(want) > 0 {
		dev, err := s.records.Device(ctx, s.own.Owner, s.own.Device)
		if err != nil {
			return coap.Response{}, err
		}
		for l := range dev.Links.All() {
			if want[l.Href.InstanceID()] {
				hrefs = append(hrefs, l.Href)
			}
		}
	}
	var removed []hub.Href
	if len(want) == 0 || len(hrefs) > 0 { // an empty list would mean all
		err = s.write(ctx, func(ctx context.Context, from hub.Stamp) (err error) {
			if removed, err = s.records.Unpublish(ctx, from, hrefs); err == nil {
				gone := make([]hub.Link, len(removed))
				for i, h := range removed {
					gone[i].Href = h
				}
				s.twin.tell(gone, false)
			}
			return err
		})
		if err != nil {
			return coap.Response{}, err
		}
	}
	if len(removed) == 0 {
		return coap.Response{}, invalid("nothing-published", "nothing that the query names is published")
	}
	s.twin.unpublished(removed)
	return coap.Response{Code: codes.Deleted}, nil
}

// named reports whether di is the session's device.
func (s *session) named(di string) bool {
	dev, err := hub.ParseDeviceID(di)
	return err == nil && dev == s.own.Device
}
