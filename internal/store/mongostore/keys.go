package mongostore

import (
	"fmt"
	"strconv"

	"github.com/coaphub/coaphub/hub"
)

// Names of collections and the keys of what is in them. Texts that others choose are written so that every byte string is a
// valid text of its own and all sort as the byte strings do: a byte is the code point of its number, but 0, 1 and 2, which
// become two; 1 is free to separate, and sorts before all that may follow.
//
//	commits    device|seq                  c commit, t time, w writer, n its running number
//	devices    device                      f folded to, b based on
//	state      device|key 1 seq[t]         s seq, v value (none: deleted), t of Trim
//	documents  collection 1 key            r revision, p the one before, v value, x secondary keys, d deleted
//	writers    ID                          name, feed, done to, beat
//	hub        "hub"                       schema, hub ID, log ID, cluster's proof
const (
	nameCommits   = "commits"
	nameDevices   = "devices"
	nameState     = "state"
	nameDocuments = "documents"
	nameWriters   = "writers"
	nameHub       = "hub"
)

const separator = "\x01"

func encodeText[T ~string](b []byte, s T) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c <= 2:
			b = append(b, 2, c+1)
		case c < 0x80:
			b = append(b, c)
		default:
			b = append(b, 0xc0|c>>6, 0x80|c&0x3f)
		}
	}
	return b
}

func text(s string) string { return string(encodeText(nil, s)) }

func decodeText(s string) (string, bool) {
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == 2 || c == 0xc2 || c == 0xc3:
			if i++; i == len(s) {
				return "", false
			}
			if c == 2 {
				b = append(b, s[i]-1)
			} else {
				b = append(b, c<<6|s[i]&0x3f)
			}
		case c < 2 || c >= 0x80:
			return "", false
		default:
			b = append(b, c)
		}
	}
	return string(b), true
}

// cutText cuts off the first of several texts: a byte 1 that is the second of two separates nothing.
func cutText(s string) (first, rest string, ok bool) {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case 2:
			i++
		case 1:
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}

// checkDevice accepts only the form that hub.ParseDeviceID gives: two texts of one device must not be two logs, and all are of
// one length.
func checkDevice(id hub.DeviceID) error {
	if p, err := hub.ParseDeviceID(string(id)); err == nil && p == id {
		return nil
	}
	return &hub.Error{Kind: hub.Invalid, Op: "mongostore", Code: "device-id-invalid", Err: fmt.Errorf("device ID %.64q", string(id))}
}

const seqDigits = 16

// seqText is a seq in hexadecimal, of fixed width.
func seqText(seq uint64) string { return fmt.Sprintf("%0*x", seqDigits, seq) }

func commitKey(dev hub.DeviceID, seq uint64) string { return string(dev) + "|" + seqText(seq) }

// past is behind all keys of the device in commits and state: "|" and what may follow it is less.
func past(dev hub.DeviceID) string { return string(dev) + "}" }

func seqOf(commitKey string) (uint64, error) {
	if len(commitKey) <= seqDigits {
		return 0, fmt.Errorf("the key of commit %.64q is damaged", commitKey)
	}
	return strconv.ParseUint(commitKey[len(commitKey)-seqDigits:], 16, 64)
}

// statePrefix begins the keys of all versions of a state document.
func statePrefix(dev hub.DeviceID, key string) string {
	return string(dev) + "|" + text(key) + separator
}

func docKey(collection, key string) string { return text(collection) + separator + text(key) }
