package grpcgateway

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// list names the calls that page; a cursor of one is refused by the others.
type list byte

const (
	listDevices   list = 1
	listLinks     list = 2
	listResources list = 3
	listMetadata  list = 4
	listEvents    list = 5
	listFeed      list = 6 // resume tokens of subscriptions
	listPending   list = 7
	listThings    list = 17
	listAudit     list = 18
	listRefusals  list = 19
	listAccounts  list = 20

	listCertificates list = 21

	listRecords    list = 22
	listGroups     list = 23
	listHubs       list = 24
	listEnrolments list = 25
	listTokens     list = 26
)

// place is where a page ended: after this device, within it after this href (resources) or after this event of this commit
// (events). The zero place is before everything.
type place struct {
	device hub.DeviceID
	href   hub.Href
	seq    uint64
	time   int64 // of that commit, so that reading on starts near it
	index  uint32
}

const cursorVersion = 2 // 1 did not know the filters

// cursor writes a place so that only the same owner can use it, in the same call with the same filters. It grants nothing by
// itself: the caller's token and the stamps decide what is read.
func (g *Gateway) cursor(l list, owner hub.Owner, f *filter, p place) string {
	id, _ := hex.DecodeString(strings.ReplaceAll(string(p.device), "-", "")) // our own device ID cannot fail
	b := append([]byte{cursorVersion, byte(l)}, id...)
	b = binary.BigEndian.AppendUint64(b, p.seq)
	b = binary.BigEndian.AppendUint64(b, uint64(p.time))
	b = binary.BigEndian.AppendUint32(b, p.index)
	b = append(b, p.href...)
	return base64.RawURLEncoding.EncodeToString(append(b, g.cursorMAC(owner, f, b)...))
}

const (
	cursorHead = 2 + 16 + 8 + 8 + 4
	cursorMAC  = 16
)

func (g *Gateway) place(l list, owner hub.Owner, f *filter, cursor string) (place, error) {
	if cursor == "" {
		return place{}, nil
	}
	b, err := base64.RawURLEncoding.DecodeString(cursor)
	if err != nil || len(b) < cursorHead+cursorMAC || len(b) > cursorHead+1+hub.MaxHref+cursorMAC {
		return place{}, errCursor
	}
	b, mac := b[:len(b)-cursorMAC], b[len(b)-cursorMAC:]
	if b[0] != cursorVersion || b[1] != byte(l) || !hmac.Equal(mac, g.cursorMAC(owner, f, b)) {
		return place{}, errCursor
	}
	h := hex.EncodeToString(b[2:18])
	return place{
		device: hub.DeviceID(h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]),
		seq:    binary.BigEndian.Uint64(b[18:]),
		time:   int64(binary.BigEndian.Uint64(b[26:])),
		index:  binary.BigEndian.Uint32(b[34:]),
		href:   hub.Href(b[cursorHead:]),
	}, nil
}

func (g *Gateway) cursorMAC(owner hub.Owner, f *filter, b []byte) []byte {
	m := hmac.New(sha256.New, g.deps.CursorKey)
	var n [4]byte
	binary.BigEndian.PutUint32(n[:], uint32(len(owner))) // so that no owner's text runs into the cursor's
	m.Write(n[:])
	m.Write([]byte(owner))
	if f != nil { // a resume token is good for any
		m.Write(f.digest())
	}
	m.Write(b)
	return m.Sum(nil)[:cursorMAC]
}
