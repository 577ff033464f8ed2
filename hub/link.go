package hub

import "hash/crc32"

// Link is one published resource (OCF Core, 7.8.2: links of a device; RFC 6690 in its JSON form).
type Link struct {
	Href         Href
	Types        []string // rt
	Interfaces   []string // if
	Anchor       string
	Title        string
	ContentTypes []string   // type: media types the resource supports
	Policy       int32      // p.bm: bit 0 discoverable, bit 1 observable, others passed through
	Endpoints    []Endpoint // eps
	ValidUntil   int64      // Unix nanoseconds, from the publish's ttl; 0 = no end
}

// Bits of Link.Policy.
const (
	Discoverable int32 = 1 << 0
	Observable   int32 = 1 << 1
)

// Endpoint is where a resource can be reached locally (eps).
type Endpoint struct {
	URI      string // ep
	Priority uint64 // pri
}

// InstanceID is the link's ins: CRC-32 (IEEE) of the cleaned href, so that instance IDs persist across hubs and restarts.
func (h Href) InstanceID() uint32 { return crc32.ChecksumIEEE([]byte(h)) }
