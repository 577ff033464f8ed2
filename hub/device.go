package hub

import (
	"strings"
)

// DeviceID is a device's UUID (RFC 9562) as 36 lower-case characters. The zero value names no device. Make one from
// outside text with ParseDeviceID only.
type DeviceID string

// ParseDeviceID accepts the 36-character form of a UUID in any case. Everything else, the nil UUID included, is Invalid.
func ParseDeviceID(s string) (DeviceID, error) {
	bad := &Error{Kind: Invalid, Code: "device-id-invalid", Text: "the device ID is not a UUID"}
	if len(s) != 36 {
		return "", bad
	}
	nonzero := false
	for i := range len(s) {
		switch c := s[i]; {
		case i == 8 || i == 13 || i == 18 || i == 23:
			if c != '-' {
				return "", bad
			}
		case c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F':
			nonzero = nonzero || c != '0'
		default:
			return "", bad
		}
	}
	if !nonzero {
		return "", bad
	}
	return DeviceID(strings.ToLower(s)), nil
}

// Owner is a principal: an issuer and the value of its owner claim, folded into one text. Owners of the first configured
// issuer have the claim's plain text, those of further issuers that issuer's unique prefix before it, so equal texts are
// equal principals. The zero value is nobody.
type Owner string

// Ownership says who owns a device. Generation counts claims of the device and never goes back, so that what was decided
// under an earlier ownership is recognised as stale.
type Ownership struct {
	Device     DeviceID
	Owner      Owner
	Generation uint64
	// Pin names the set of credentials that the device signed up with; empty: none is known, all are good.
	Pin       string
	Releasing bool // a release was begun and not finished yet
}
