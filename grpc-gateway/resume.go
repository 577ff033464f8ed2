package grpcgateway

import (
	"crypto/hmac"
	"encoding/base64"
	"encoding/binary"

	"github.com/coaphub/coaphub/hub"
)

// resume is where a subscription goes on.
type resume struct {
	at hub.Cursor
	// state: the current state had not been told whole, so it is told (again), and at does not matter.
	state bool
}

var errResume = hub.NewError(hub.Invalid, "resume-token-invalid", "resumeToken: it is not one of this hub and this caller")

const resumeHead = 2 + 1 + 1 // version, list, flags, length of the log's ID

// resumeToken writes the place so that only the same owner can use it, at any instance of this hub. Like a cursor it grants
// nothing by itself.
func (g *Gateway) resumeToken(owner hub.Owner, r resume) string {
	var flags byte
	if r.state {
		flags = 1
	}
	b := make([]byte, 0, resumeHead+len(r.at.Log)+16+cursorMAC)
	b = append(b, cursorVersion, byte(listFeed), flags, byte(len(r.at.Log)))
	b = append(b, r.at.Log...)
	b = binary.BigEndian.AppendUint32(b, r.at.After.Day)
	b = binary.BigEndian.AppendUint64(b, r.at.After.N)
	b = binary.BigEndian.AppendUint32(b, r.at.Skip)
	return base64.RawURLEncoding.EncodeToString(append(b, g.cursorMAC(owner, nil, b)...))
}

func (g *Gateway) resumeAt(owner hub.Owner, token string) (resume, error) {
	if len(token) > 1024 {
		return resume{}, errResume
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) < resumeHead+16+cursorMAC {
		return resume{}, errResume
	}
	b, mac := b[:len(b)-cursorMAC], b[len(b)-cursorMAC:]
	if b[0] != cursorVersion || b[1] != byte(listFeed) || !hmac.Equal(mac, g.cursorMAC(owner, nil, b)) || len(b) != resumeHead+int(b[3])+16 {
		return resume{}, errResume
	}
	log := string(b[resumeHead : resumeHead+int(b[3])])
	p := b[resumeHead+len(log):]
	return resume{
		at: hub.Cursor{
			Log: log, After: hub.Position{Day: binary.BigEndian.Uint32(p), N: binary.BigEndian.Uint64(p[4:])}, Skip: binary.BigEndian.Uint32(p[12:]),
		},
		state: b[2] == 1,
	}, nil
}
