package hub

import (
	"crypto/x509"
	"time"
)

// EnrolmentProof is what a device shows of itself to get its first identity certificate, or another one. One of Chain, PSK and Token
// is set. SCEP's messages have Chain always, and Token, too, when they come with a challenge.
type EnrolmentProof struct {
	// Chain begins with the certificate whose key the peer has; behind it is what the peer sent along. Nobody has verified it.
	Chain []*x509.Certificate
	// PSK is the device whose pre-shared key the peer has.
	PSK DeviceID
	// Token is a one-time token.
	Token string
	// Transaction is set for SCEP, where it names what the client wants: a request that has to wait is kept under it, and goes on
	// when it comes without request. Only with it a key may be RSA.
	Transaction string
}

// Enrolled is what a device gets.
type Enrolled struct {
	Device DeviceID
	Serial string              // of its certificate
	Chain  []*x509.Certificate // its certificate, and the one that issued it
}

// EnrolmentGroup is a set of devices that may enrol because a manufacturer vouches for them.
type EnrolmentGroup struct {
	ID    string // a UUID
	Name  string // for people
	Owner Owner  // of the devices
	// Chain is PEM: the CA that signs the factory certificates, first, and what is above it. A device's chain must lead to the
	// first, whoever is above.
	Chain string
	// Allow are devices that may enrol; nobody else may then. Empty: all of that CA.
	Allow []DeviceID
	// Approval has a person decide on each device.
	Approval bool
	// Expired takes factory certificates that have ended, too: many devices cannot get another.
	Expired bool
	// Named lets a device say its own ID when it comes for the first time, unless its manufacturer does: one that nobody has. Its
	// factory key stands for that ID from then on.
	Named bool
	// Types are the device types (`rt` of /oic/d) that may enrol, as the manufacturer vouches for them. Empty: all.
	Types []string
	// Terms have to be accepted before a device enrols, and Accepted says who did, and which: it is read only.
	Terms    Terms
	Accepted Acceptance
	// PSK is a key that all devices of the group get for talking to their owner. It is written only: what is read has HasPSK.
	PSK     string
	HasPSK  bool
	Created time.Time
	User    string // who made it
}

// Terms are what a device's owner has to agree to, a licence for one; none without a version. The version names the text: whoever
// changes the text gives it another.
type Terms struct {
	Version string `json:"version"`
	URL     string `json:"url,omitempty"` // where the text is; "" without
}

// Acceptance is who agreed to which version of terms; zero: nobody to any.
type Acceptance struct {
	Version string    `json:"version"`
	User    string    `json:"user"`
	Time    time.Time `json:"time"`
}

// EnrolmentState is how far a device has come. They are stored.
type EnrolmentState string

// The states.
const (
	EnrolmentWaiting EnrolmentState = "waiting" // for a person; see Waits
	EnrolmentAllowed EnrolmentState = "allowed" // by a person, or because nobody is asked; the device may come for its certificate
	EnrolmentRefused EnrolmentState = "refused" // by a person
	EnrolmentIssued  EnrolmentState = "issued"  // it has a certificate
)

// EnrolmentWaits is what a device waits for. They are stored.
type EnrolmentWaits string

// What there is to wait for, in this order.
const (
	WaitsForApproval EnrolmentWaits = "approval" // of this device
	WaitsForTerms    EnrolmentWaits = "terms"    // of its group, to be accepted
)

// ParseEnrolmentState reads a state; others are Invalid.
func ParseEnrolmentState(s string) (EnrolmentState, error) {
	switch st := EnrolmentState(s); st {
	case EnrolmentWaiting, EnrolmentAllowed, EnrolmentRefused, EnrolmentIssued:
		return st, nil
	}
	return "", &Error{Kind: Invalid, Code: "state-unknown", Text: "the states are waiting, allowed, refused and issued"}
}

// Enrolment is what is known of a device's enrolment; there is one a device.
type Enrolment struct {
	Device  DeviceID
	Owner   Owner  // for whom it enrols; "" for whoever has the device
	Group   string // ID; "" without
	By      RequestMethod
	Proof   string // what it showed, for people
	Key     string // names the key that it showed, a UUID; "" without
	Type    string // its device type, which its manufacturer says; "" without
	State   EnrolmentState
	Waits   EnrolmentWaits // "" if it does not
	User    string         // who allowed or refused it
	Serial  string         // of the newest certificate
	Problem string         // stable code of what went wrong the last time; "" if nothing did
	Created time.Time
	Changed time.Time
}

// EnrolmentFilter says which enrolments are meant: those that match all of what is set.
type EnrolmentFilter struct {
	Owner   Owner // "": whoever's
	Devices []DeviceID
	Groups  []string
	States  []EnrolmentState
}

// EnrolmentToken is a one-time token without its text, which is shown once and kept nowhere.
type EnrolmentToken struct {
	ID      string   // names it
	Device  DeviceID // that it is for; "" for any one
	Owner   Owner    // of the device
	User    string   // who made it
	Created time.Time
	Expires time.Time
	Used    time.Time // zero: not yet
	UsedBy  DeviceID
}
