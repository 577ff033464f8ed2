package hub

import (
	"crypto/sha1"
	"encoding/hex"
	"strings"
	"time"
)

// ProvisioningStep is a step of plgd's device provisioning. They are stored.
type ProvisioningStep string

// The steps, in the order in which iotivity-lite takes them.
const (
	StepTime        ProvisioningStep = "time"
	StepOwnership   ProvisioningStep = "ownership"
	StepCloud       ProvisioningStep = "cloud"
	StepCredentials ProvisioningStep = "credentials"
	StepACLs        ProvisioningStep = "acls"
)

// Applicant is a device that its manufacturer vouches for.
type Applicant struct {
	Device DeviceID // "" if only the device can say, and has not yet
	Owner  Owner    // for whom it comes
	Group  string   // ID
	PSK    string   // the group's key, as much of it as devices get; "" without
}

// Provisioned is how one step ended for a device.
type Provisioned struct {
	Step    ProvisioningStep
	Device  DeviceID // "" if it is not known yet
	Code    uint8    // CoAP's
	Problem string   // stable code; "" if there is none
	// What the device got, if it got it.
	Identity string // its certificate, PEM
	PSK      bool
	Cloud    Cloud // without the token
}

// Cloud is where a device signs up.
type Cloud struct {
	Provider string   // as the device has to call it
	Token    string   // that it signs up with; a secret
	ID       DeviceID // of the hub
	Gateways []string // URIs, the first is the default
	Selected int      // index of the one that the device had selected before, if it is there, else 0
}

// ProvisioningStatus is how a step ended the last time.
type ProvisioningStatus struct {
	Time    time.Time
	Code    uint8 // CoAP's
	Problem string
}

// ProvisioningRecord is what is known of how a device was provisioned. There is one a factory key.
type ProvisioningRecord struct {
	ID          string // names the factory key, a UUID
	Device      DeviceID
	Owner       Owner
	Group       string
	Created     time.Time
	Attested    time.Time // when it showed its factory certificate the last time
	Certificate string    // that one, PEM
	Name        string    // the common name in it
	Steps       map[ProvisioningStep]ProvisioningStatus
	Identity    string // PEM
	PSK         bool
	Cloud       Cloud // without the token
}

// ProvisioningFilter says which records are meant: those of the owner that match all of what else is set.
type ProvisioningFilter struct {
	Owner   Owner
	IDs     []string
	Devices []DeviceID
	Groups  []string
}

// ACE is an entry of a device's access control list (OCF Security, oic.sec.acl2): who may do what with which of its resources.
type ACE struct {
	Subject     string // a UUID; "" is anybody, without encryption
	Permissions uint8  // AllPermissions, or some of them
	Hrefs       []Href // none: all resources but those of security
}

// Permissions of an ACE, which are bits.
const (
	MayCreate uint8 = 1 << iota
	MayRetrieve
	MayUpdate
	MayDelete
	MayNotify
	AllPermissions = MayCreate | MayRetrieve | MayUpdate | MayDelete | MayNotify
)

// DeviceACL is the access control list of a device that the hub provisions: its owner and the hub may do everything, and anybody
// may see what it takes to find the device and to get to know it.
func DeviceACL(owner Owner, hubID DeviceID) []ACE {
	return []ACE{
		{Subject: owner.UUID(), Permissions: AllPermissions},
		{Permissions: MayRetrieve, Hrefs: []Href{"/oic/d", "/oic/p", "/oic/res", "/oic/sec/sdi", "/oic/sec/doxm"}},
		{Subject: string(hubID), Permissions: AllPermissions},
	}
}

// UUID is the owner as devices and other hubs write one: himself if he is a UUID, else version 5 of his name as a URL (RFC 9562,
// Sections 5.5 and 6.6). Two owners may have the same, so it is a label, and decides nothing.
func (o Owner) UUID() string {
	if id, err := ParseDeviceID(string(o)); err == nil {
		return string(id)
	}
	space, _ := hex.DecodeString("6ba7b8119dad11d180b400c04fd430c8") // RFC 9562, Section 6.6: URL
	sum := sha1.Sum(append(space, o...))
	sum[6], sum[8] = sum[6]&0x0f|0x50, sum[8]&0x3f|0x80
	h := hex.EncodeToString(sum[:16])
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}
