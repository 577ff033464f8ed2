package hub

import (
	"encoding/hex"
	"math/big"
	"strings"
	"time"
)

// Certificate is what the certificate authority's ledger has of one certificate. Nothing of it changes but its revocation.
type Certificate struct {
	Serial    string   // hexadecimal, lower case
	Issuer    string   // names the key that signed it, a UUID
	Name      string   // the common name of its subject
	Key       string   // names its public key, a UUID
	Algorithm string   // of that key: P-256, P-384, Ed25519, RSA-2048 and the like; "" in entries of older versions
	Device    DeviceID // "" for what is no device's
	Profile   Profile
	Owner     Owner         // for whom it was signed; "" for whoever has the device
	How       RequestMethod // it was requested
	User      string        // who asked, or allowed the device to
	Proof     string        // what the device showed when it enrolled, for people
	Terms     Acceptance    // of the group that it enrolled in
	PEM       string        // the certificate alone
	Created   time.Time
	NotBefore time.Time
	NotAfter  time.Time
	Revoked   time.Time        // zero: it is not
	Reason    RevocationReason // of that
}

// Profile is what a certificate is for. They are stored: never change one.
type Profile string

// The profiles.
const (
	ForDevice  Profile = ""        // a device's identity
	ForClient  Profile = "client"  // an application of an owner's, that shows it to servers
	ForService Profile = "service" // a server, which may be a client, too
	ForHub     Profile = "hub"     // a part of the hub that runs in a process of its own
)

// CertificateStatus is an answer about certificates, DER (RFC 6960).
type CertificateStatus struct {
	DER []byte
	// From and Until are when it is good, for whoever it is given to. Both zero: it is for whoever asked, or says that there is no
	// answer.
	From, Until time.Time
}

// RequestMethod is how somebody came by a certificate. They are stored: never change one.
type RequestMethod string

// The request methods.
const (
	ByCSR      RequestMethod = "csr"      // a certificate signing request over the API
	ByOperator RequestMethod = "operator" // made together with its key, on the hub's machine
	ByFactory  RequestMethod = "factory"  // an enrolment with a manufacturer's certificate
	ByPSK      RequestMethod = "psk"      // an enrolment with a pre-shared key
	ByToken    RequestMethod = "token"    // an enrolment with a one-time token
	ByRenewal  RequestMethod = "renewal"  // under the certificate that it takes the place of
	Unrecorded RequestMethod = "unknown"  // revoked by its serial, and not in the ledger
)

// RevocationReason is a CRLReason (RFC 5280, Section 5.3.1). They are stored.
type RevocationReason uint8

// The reasons that the hub gives.
const (
	RevokedUnspecified   RevocationReason = 0
	RevokedKeyCompromise RevocationReason = 1
	RevokedAffiliation   RevocationReason = 3 // affiliationChanged
	RevokedSuperseded    RevocationReason = 4
	RevokedCessation     RevocationReason = 5 // cessationOfOperation
)

var revocationReasons = map[string]RevocationReason{
	"unspecified": RevokedUnspecified, "keyCompromise": RevokedKeyCompromise, "superseded": RevokedSuperseded,
	"affiliationChanged": RevokedAffiliation, "cessationOfOperation": RevokedCessation,
}

// ParseRevocationReason reads a reason as RFC 5280 names it; others are Invalid.
func ParseRevocationReason(s string) (RevocationReason, error) {
	r, ok := revocationReasons[s]
	if !ok {
		return 0, &Error{Kind: Invalid, Code: "reason-unknown", Text: "the reasons are unspecified, keyCompromise, affiliationChanged, superseded and cessationOfOperation"}
	}
	return r, nil
}

// String is the name that RFC 5280 has for the reason, "unspecified" for one that the hub does not give.
func (r RevocationReason) String() string {
	for name, reason := range revocationReasons {
		if reason == r {
			return name
		}
	}
	return "unspecified"
}

// SerialOf writes a certificate's serial number as Certificate has it.
func SerialOf(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

// ParseSerial reads a serial number in hexadecimal, also with colons, leading zeros or capitals as other programs write it; what
// is none is Invalid.
func ParseSerial(s string) (string, error) {
	serial := strings.TrimLeft(strings.ToLower(strings.ReplaceAll(s, ":", "")), "0")
	if len(serial)%2 == 1 {
		serial = "0" + serial
	}
	if serial == "" || len(serial) > 40 || strings.Trim(serial, "0123456789abcdef") != "" { // RFC 5280, Section 4.1.2.2: 20 bytes
		return "", &Error{Kind: Invalid, Code: "serial-invalid", Text: "this is no serial number in hexadecimal digits"}
	}
	return serial, nil
}

// CertificateFilter says which certificates are meant: those that match all of what is set. An owner means those that were signed
// for him; where serials or devices are named, also those of devices that are his now. All is what only an operator may mean:
// without it and without an owner it matches none.
type CertificateFilter struct {
	All     bool // whoever's they are
	Owner   Owner
	Serials []string
	Devices []DeviceID
	Names   []string
}

// CertificateReport is how a fleet is off for certificates of devices.
type CertificateReport struct {
	Good    int // that let somebody in
	Ended   int // that did until they ended, in the last 90 days
	Revoked int
	// Expiring are devices whose last certificate that is good ends soon, the first to end first; there are Expires of them, and
	// the list has at most 1000.
	Expiring []Certificate
	Expires  int
	// Shared are certificates of one key for several devices, which whoever has one of them can be; by key. There are SharedKeys
	// such keys, and the list has at most 1000 certificates.
	Shared     []Certificate
	SharedKeys int
	// Weak are good certificates of RSA keys below 3072 bits, by device; there are WeakKeys of them, and the list has at most 1000.
	Weak     []Certificate
	WeakKeys int
	Keys     map[string]int // good certificates by Certificate.Algorithm
}
