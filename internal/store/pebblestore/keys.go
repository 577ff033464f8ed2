package pebblestore

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/hub"
)

// The key space. Each kind of record has a first byte of its own; numbers are big-endian, so that keys sort as numbers do.
//
//	0x00 name                         the store's own records
//	0x01 device[16] seq[8]            a commit
//	0x02 device[16] key               a state document: seq[8] value
//	0x03 day[4] n[8]                  a feed position: device[16] seq[8]
//	0x04 len[1] collection key        a document: rev[8], indexes, value
//	0x05 len[1] collection len[2] index key   a secondary key: nothing
const (
	prefixMeta = iota
	prefixCommit
	prefixState
	prefixFeed
	prefixDoc
	prefixIndex
)

var (
	metaSchema = []byte{prefixMeta, 's'} // uint32
	metaLogID  = []byte{prefixMeta, 'l'} // text
	metaState  = []byte{prefixMeta, 'h'} // state
)

// device is a DeviceID as its 16 bytes.
type device [16]byte

// parseDevice turns an ID into bytes. Only the form that hub.ParseDeviceID gives is accepted: two texts of one device must
// not be two logs.
func parseDevice(id hub.DeviceID) (device, error) {
	var d device
	if !decodeDevice(&d, string(id)) {
		return d, &hub.Error{Kind: hub.Invalid, Op: "pebblestore", Code: "device-id-invalid", Err: fmt.Errorf("device ID %.64q", string(id))}
	}
	return d, nil
}

func decodeDevice(d *device, s string) bool {
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return false
	}
	at := 0
	for i := 0; i < len(s); {
		if s[i] == '-' {
			if i++; i == len(s) {
				return false
			}
			continue
		}
		if i+1 >= len(s) || at == len(d) {
			return false
		}
		hi, lo := nibble(s[i]), nibble(s[i+1])
		if hi|lo > 15 {
			return false
		}
		d[at] = hi<<4 | lo
		at++
		i += 2
	}
	return at == len(d)
}

func nibble(c byte) byte {
	switch {
	case c >= '0' && c <= '9':
		return c - '0'
	case c >= 'a' && c <= 'f':
		return c - 'a' + 10
	}
	return 0xff
}

func (d device) id() hub.DeviceID {
	var b [36]byte
	hex.Encode(b[:], d[:4])
	hex.Encode(b[9:], d[4:6])
	hex.Encode(b[14:], d[6:8])
	hex.Encode(b[19:], d[8:10])
	hex.Encode(b[24:], d[10:])
	b[8], b[13], b[18], b[23] = '-', '-', '-', '-'
	return hub.DeviceID(b[:])
}

func commitKey(b []byte, d device, seq uint64) []byte {
	b = append(b, prefixCommit)
	b = append(b, d[:]...)
	return binary.BigEndian.AppendUint64(b, seq)
}

func stateKey(b []byte, d device, key string) []byte {
	b = append(b, prefixState)
	b = append(b, d[:]...)
	return append(b, key...)
}

func devicePrefix(prefix byte, d device) []byte { return append([]byte{prefix}, d[:]...) }

// deviceOf reads the device of a commit's or state document's key.
func deviceOf(key []byte) (device, bool) {
	if len(key) < 17 {
		return device{}, false
	}
	return device(key[1:17]), true
}

func seqOf(commitKey []byte) (uint64, bool) {
	if len(commitKey) != 25 {
		return 0, false
	}
	return binary.BigEndian.Uint64(commitKey[17:]), true
}

func feedKey(b []byte, p hub.Position) []byte {
	b = append(b, prefixFeed)
	b = binary.BigEndian.AppendUint32(b, p.Day)
	return binary.BigEndian.AppendUint64(b, p.N)
}

func positionOf(key []byte) (hub.Position, bool) {
	if len(key) != 13 {
		return hub.Position{}, false
	}
	return hub.Position{Day: binary.BigEndian.Uint32(key[1:]), N: binary.BigEndian.Uint64(key[5:])}, true
}

// A feed record refers to a commit by its key without the first byte.
func parseRef(v []byte) (device, uint64, bool) {
	if len(v) != 24 {
		return device{}, 0, false
	}
	return device(v[:16]), binary.BigEndian.Uint64(v[16:]), true
}

func collectionPrefix(prefix byte, collection string) []byte {
	return append([]byte{prefix, byte(len(collection))}, collection...)
}

func docKey(collection, key string) []byte {
	return append(collectionPrefix(prefixDoc, collection), key...)
}

func indexPrefix(collection, index string) []byte {
	b := collectionPrefix(prefixIndex, collection)
	b = binary.BigEndian.AppendUint16(b, uint16(len(index)))
	return append(b, index...)
}

func indexKey(collection, index, key string) []byte {
	return append(indexPrefix(collection, index), key...)
}

// after returns the first key behind all that begin with prefix.
func after(prefix []byte) []byte {
	b := append([]byte(nil), prefix...)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]++; b[i] != 0 {
			return b[:i+1]
		}
	}
	return nil // only 0xff: nothing is behind
}

// state is what the store remembers of itself from batch to batch, and writes in each.
type state struct {
	head    hub.Position // of the newest commit
	trimmed hub.Position // of the newest position that was trimmed away
	rev     uint64       // last revision given to a document; never goes back, so that no revision comes twice
}

func (st state) encode(b []byte) []byte {
	for _, p := range [...]hub.Position{st.head, st.trimmed} {
		b = binary.BigEndian.AppendUint32(b, p.Day)
		b = binary.BigEndian.AppendUint64(b, p.N)
	}
	return binary.BigEndian.AppendUint64(b, st.rev)
}

func decodeState(v []byte) (state, error) {
	if len(v) != 32 {
		return state{}, errors.New("the store's state record is damaged")
	}
	at := func(v []byte) hub.Position {
		return hub.Position{Day: binary.BigEndian.Uint32(v), N: binary.BigEndian.Uint64(v[4:])}
	}
	return state{head: at(v), trimmed: at(v[12:]), rev: binary.BigEndian.Uint64(v[24:])}, nil
}
