package coapgateway

import (
	"math"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// link is a resource link as devices send and read it (OCF Core, oic.r.rd and oic.wk.res). Members without a value are left
// out, except those that devices rely on.
type link struct {
	ID     string     `cbor:"id,omitempty" json:"id,omitempty"` // sent back, otherwise ignored
	Href   string     `cbor:"href" json:"href"`
	Types  []string   `cbor:"rt,omitempty" json:"rt,omitempty"`
	Ifs    []string   `cbor:"if,omitempty" json:"if,omitempty"`
	Policy *policy    `cbor:"p,omitempty" json:"p,omitempty"`
	Eps    []endpoint `cbor:"eps,omitempty" json:"eps,omitempty"`
	Anchor string     `cbor:"anchor,omitempty" json:"anchor,omitempty"`
	Device string     `cbor:"di,omitempty" json:"di,omitempty"`
	// Instance is a number of the hub's: what a device sends is ignored, whatever its type.
	Instance any      `cbor:"ins,omitempty" json:"ins,omitempty"`
	Title    string   `cbor:"title,omitempty" json:"title,omitempty"`
	Media    []string `cbor:"type,omitempty" json:"type,omitempty"`
}

// policy is a link's p; only the bit mask is stored, the rest is sent back in the publish's answer.
type policy struct {
	Bits uint8  `cbor:"bm" json:"bm"`
	Port uint64 `cbor:"port,omitempty" json:"port,omitempty"`
	TCP  uint64 `cbor:"x.org.iotivity.tcp,omitempty" json:"x.org.iotivity.tcp,omitempty"`
	TLS  uint64 `cbor:"x.org.iotivity.tls,omitempty" json:"x.org.iotivity.tls,omitempty"`
	Sec  bool   `cbor:"sec,omitempty" json:"sec,omitempty"`
}

type endpoint struct {
	URI      string `cbor:"ep" json:"ep"`
	Priority uint64 `cbor:"pri" json:"pri"`
}

// hubLink returns the link in hub's words, its href cleaned.
func (l *link) hubLink(until int64) (hub.Link, error) {
	href, err := hub.ParseHref(l.Href)
	if err != nil {
		return hub.Link{}, err
	}
	out := hub.Link{
		Href: href, Types: l.Types, Interfaces: l.Ifs, Anchor: l.Anchor, Title: l.Title, ContentTypes: l.Media, ValidUntil: until,
	}
	if l.Policy != nil {
		out.Policy = int32(l.Policy.Bits)
	}
	for _, e := range l.Eps {
		out.Endpoints = append(out.Endpoints, hub.Endpoint{URI: e.URI, Priority: e.Priority})
	}
	return out, nil
}

// routed is a link of a device as another device sees it through the hub: hrefs and endpoints lead to the hub.
func routed(dev hub.DeviceID, l hub.Link, eps []endpoint) link {
	out := link{
		Href: "/api/v1/devices/" + string(dev) + string(l.Href), Types: l.Types, Ifs: l.Interfaces, Eps: eps, Anchor: l.Anchor,
		Device: string(dev), Title: l.Title, Media: l.ContentTypes, Policy: &policy{Bits: uint8(l.Policy)},
	}
	if out.Anchor == "" {
		out.Anchor = "ocf://" + string(dev)
	}
	return out
}

// publication is the body of POST /oic/rd and of its answer.
type publication struct {
	Device   string `cbor:"di" json:"di"`
	Links    []link `cbor:"links" json:"links"`
	TTL      *int64 `cbor:"ttl" json:"ttl"`
	Lifetime *int64 `cbor:"lt" json:"lt"` // legacy name of ttl, used if there is no ttl
}

// validUntil fills ttl and lt from each other and returns the end of the links in Unix nanoseconds, 0 for none.
func (p *publication) validUntil(now time.Time) (int64, error) {
	none := int64(-1)
	ttl, lt := &none, &none
	if p.TTL != nil {
		ttl = p.TTL
	}
	if p.Lifetime != nil {
		lt = p.Lifetime
	}
	seconds := *ttl
	if seconds < 0 {
		seconds = *lt
	}
	if seconds < 0 {
		return 0, invalid("ttl-invalid", "ttl or lt must be given and not be negative")
	}
	p.TTL, p.Lifetime = &seconds, &seconds
	if seconds == 0 {
		return 0, nil
	}
	if seconds > (math.MaxInt64-now.UnixNano())/int64(time.Second) {
		return 0, invalid("ttl-invalid", "ttl is too far in the future")
	}
	return now.UnixNano() + seconds*int64(time.Second), nil
}
