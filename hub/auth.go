package hub

import (
	"slices"
	"time"
)

// Scopes that the doors ask for. A token may carry others; they mean nothing here.
const (
	ScopeRead         = "devices:read"  // read devices, links, twins, history
	ScopeWrite        = "devices:write" // commands, deleting devices
	ScopeAdmin        = "admin"         // every owner's devices, accounts
	ScopeDevice       = "device"        // a device's own token: CoAP only, that device only
	ScopeDeviceSignUp = "device:signup" // a JWT that may be used for sign-up in place of a code
)

// Claims is what a verified access token says. Only a verifier makes one.
type Claims struct {
	Issuer   string
	Subject  string // sub, for audit
	Owner    Owner  // principal: issuer and owner claim folded into one; never empty
	ClientID string
	TokenID  string // jti, may be empty
	// Grant names what the token was issued on, in its issuer's words: the issuer tells by it that all tokens of a grant ended
	// before their time. Empty if the issuer does not.
	Grant    string
	Scopes   []string
	Audience []string
	// DeviceID is the raw value of the configured device ID claim; empty when none is configured or the token has none.
	DeviceID string
	// Device reports a device's token: refused by HTTP and gRPC, and good for that device alone over CoAP.
	Device bool
	// MarksDevices reports that the issuer tells devices' tokens from others, by a claim or a client: then a token that is
	// not Device belongs to a person or an application and acts for no device.
	MarksDevices bool
	Expiry       time.Time // never zero: tokens without exp are refused
}

// Has reports whether the token carries the scope.
func (c Claims) Has(scope string) bool { return slices.Contains(c.Scopes, scope) }

// Tokens is what a provider gave for a code or a refresh token.
type Tokens struct {
	Access  string
	Refresh string
	Expiry  time.Time // of the access token; zero = never expires
	// Authorized is when the owner authorized the device, as far as that is known; zero: not known, or the device did it itself.
	Authorized time.Time
}
