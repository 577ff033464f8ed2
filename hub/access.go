package hub

import (
	"encoding/hex"
	"strings"
	"time"
)

// Access is whether the hub lets a device in, and if not, who decided so, when and why. Its JSON form goes out on the API.
type Access struct {
	State  AccessState `json:"state"`
	Reason string      `json:"reason,omitempty"` // in the words of whoever decided
	User   string      `json:"user,omitempty"`
	Since  time.Time   `json:"since,omitzero"` // zero while the device is admitted
	Until  time.Time   `json:"until,omitzero"` // zero: until somebody decides otherwise
}

// AccessState says how a device stands with the hub. They go out on the API: never change one.
type AccessState string

// The states. Each of them hides those above it.
const (
	AccessAdmitted    AccessState = "admitted"
	AccessQuarantined AccessState = "quarantined" // let in, and what it writes is kept apart
	AccessDisabled    AccessState = "disabled"    // by its owner or an operator; its data stays
	AccessRemoved     AccessState = "removed"     // deleted, and not onboarded since
	AccessDenied      AccessState = "denied"      // on the deny list
)

// DenialOf says what a denial is about. They are stored.
type DenialOf string

// What can be denied.
const (
	DenyDevice      DenialOf = "device"      // by its ID
	DenyKey         DenialOf = "key"         // the public key of a device's certificate
	DenyCertificate DenialOf = "certificate" // one certificate of a device
	DenyCA          DenialOf = "ca"          // whatever a certification authority vouches for
)

// Denial is an entry of the deny list: whoever comes with what it names is not let in. Its JSON form is what is stored and what
// people get.
type Denial struct {
	Of DenialOf `json:"of"`
	// Value is a device ID, or a SHA-256 in 64 hexadecimal digits: of a key or CA that of its SubjectPublicKeyInfo, of a
	// certificate or CA that of the certificate. A certificate may also be "issuer/serial", the issuer being the SHA-256 of the
	// issuing CA's SubjectPublicKeyInfo.
	Value  string    `json:"value"`
	Reason string    `json:"reason,omitempty"`
	User   string    `json:"user,omitempty"`
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until,omitzero"` // zero: until it is taken off the list
}

// ParseDenial reads what a denial is about as people write it: digits in capitals, with colons. What is none is Invalid.
func ParseDenial(of DenialOf, value string) (Denial, error) {
	d := Denial{Of: of}
	switch of {
	case DenyDevice:
		dev, err := ParseDeviceID(value)
		d.Value = string(dev)
		return d, err
	case DenyKey, DenyCertificate, DenyCA:
	default:
		return d, &Error{Kind: Invalid, Code: "denial-invalid", Text: "what can be denied are a device, a key, a certificate and a ca"}
	}
	sum, serial, two := strings.Cut(value, "/")
	d.Value = strings.ToLower(strings.ReplaceAll(sum, ":", ""))
	if b, err := hex.DecodeString(d.Value); err != nil || len(b) != 32 || two && of != DenyCertificate {
		return d, &Error{Kind: Invalid, Code: "denial-invalid", Text: "this is no SHA-256 in hexadecimal digits"}
	}
	if !two {
		return d, nil
	}
	serial, err := ParseSerial(serial)
	d.Value += "/" + serial
	return d, err
}
