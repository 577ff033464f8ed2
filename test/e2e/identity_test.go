package e2e_test

import (
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/test/dose"
)

// TestIdentity is the table "TLS and identity" of docs/protocol.md, cell by cell, on hubs of which nothing but their ports is
// known: what a device shows in its handshake, what its token says, how good that token is, and which di it sends, on TLS and
// DTLS, for the five calls of the account paths. Besides its answer, a cell wants that an error is the last that its connection
// says, that anything else leaves it open, and that nothing has happened but what the cell is for: to its device, to the other
// one, to any that has no name here.
//
// Cells have at most one thing wrong; at night two.
func TestIdentity(t *testing.T) {
	t.Parallel()
	faults := dose.Of(1, 1, 2)
	open := make(chan struct{}, 4) // hubs that are busy at a time: a slow machine must not run into their deadlines
	for s := range setups() {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			open <- struct{}{}
			defer func() { <-open }()
			startOffice(t, s).check(slices.Collect(s.cells(faults)))
		})
	}
}

// setup is the configuration of a hub.
type setup struct {
	certificate bool // tls.clientCertificateRequired
	claim       bool // authorization.deviceIDClaim is set
	strict      bool // authorization.strictDeviceID
	anyName     bool // tls.identityPropertiesRequired is false
	embedded    bool // the tokens are the hub's own, else another provider's
}

func (s setup) String() string {
	name := fmt.Sprintf("certificate %v, claim %v", s.certificate, s.claim)
	for _, more := range []struct {
		is   bool
		word string
	}{{s.strict, "strict"}, {s.anyName, "any certificate"}, {s.embedded, "own provider"}} {
		if more.is {
			name += ", " + more.word
		}
	}
	return name
}

func setups() iter.Seq[setup] {
	return func(yield func(setup) bool) {
		booleans := []bool{false, true}
		for _, certificate := range booleans {
			for _, claim := range booleans {
				for _, strict := range booleans {
					for _, embedded := range booleans {
						s := setup{certificate: certificate, claim: claim, strict: strict, embedded: embedded}
						if !yield(s) {
							return
						}
						// With a claim the configuration is refused (TestValidateNamesThePath).
						if s.anyName = true; certificate && !claim && !embedded && !yield(s) {
							return
						}
					}
				}
			}
		}
	}
}

// cell is one thing that a device does. It is the lamp, or says so; "the fan's" is what belongs to another device of the owner.
type cell struct {
	setup
	over   string // "tls" or "dtls"
	call   string
	within bool   // the connection has a session: of the device that it proved to be, else of the lamp
	shows  string // in the handshake
	claim  string // what the token says
	token  string // what the token is worth; at the sign-up that of the code, at the refresh that of the refresh token
	di     string
}

func (c cell) String() string {
	within := ""
	if c.within {
		within = " within a session"
	}
	return fmt.Sprintf("[%v] %s over %s%s, shows: %s, claim: %s, token: %s, di: %s",
		c.setup, c.call, c.over, within, c.shows, c.claim, c.token, c.di)
}

// Values of a cell. The first of each is as it should be.
const (
	good     = "good"
	capitals = "good, in capitals"
	missing  = "missing"
	empty    = "empty"
	noUUID   = "no UUID"
	fans     = "the fan's"
	expired  = "expired"
	revoked  = "revoked"

	forged     = "signed with another key" // under the right name
	stranger   = "of another authority"
	keyless    = "without its key"
	noIdentity = "without OCF's usage"
	hubs       = "the hub's"
	key        = "pre-shared key"
	wrongKey   = "wrong pre-shared key"
	fansKey    = "the fan's pre-shared key"
)

// cells are those with at most so many faults. A session, and a configuration that is stricter, are as good as a fault, but for
// what they are about.
func (s setup) cells(faults int) iter.Seq[cell] {
	return func(yield func(cell) bool) {
		for _, over := range []string{"tls", "dtls"} {
			shows := []string{good, missing, forged, stranger, keyless, expired, revoked, noIdentity, hubs, fans}
			if over == "dtls" {
				shows = append(shows, key, wrongKey, fansKey)
			}
			for _, call := range []string{"sign-up", "sign-in", "sign-out", "sign-off", "refresh"} {
				claims := []string{good, capitals, missing, empty, noUUID, fans}
				tokens := []string{good, forged, expired, missing}
				if s.embedded { // it signs no other claims, and revokes what it signed
					claims, tokens = []string{good, fans}, []string{good, forged, revoked, missing}
					if call == "sign-in" || call == "sign-out" {
						claims = append(claims, missing) // an application's
					}
					if call == "sign-up" { // a code that was revoked is one that is unknown
						tokens = []string{good, forged, missing}
					}
				}
				if call == "sign-off" {
					// A JWT does not fit into an option of 255 bytes (RFC 7252, Section 5.10): devices sign in before. What could be
					// shorter is in TestSignOffWithAToken.
					claims, tokens = []string{good}, []string{missing}
				}
				for _, within := range []bool{false, true} {
					for i, shows := range shows {
						for j, claim := range claims {
							for k, token := range tokens {
								for l, di := range []string{good, capitals, missing, noUUID, fans} {
									wrong := min(i, 1) + min(j, 1) + min(k, 1) + min(l, 1)
									if within && call != "sign-off" {
										wrong++
									}
									if s.strict && l == 0 {
										wrong++
									}
									c := cell{s, over, call, within, shows, claim, token, di}
									if c.possible() && wrong <= faults && !yield(c) {
										return
									}
								}
							}
						}
					}
				}
			}
		}
	}
}

// possible reports whether a device can do what a cell says, and no other cell is the same.
func (c cell) possible() bool {
	in := c.expected()
	alone := c.call == "sign-in" && !c.within && c.claim == good && c.token == good && c.di == good
	switch {
	case in.refused, !c.certificate && slices.Contains([]string{forged, stranger, keyless, expired, revoked, noIdentity, hubs}, c.shows):
		return alone // the handshake is all there is, or the certificate was not looked at
	case c.within:
		return in.identified && c.token != revoked // whose session is over then: test/scripts/revocation.txt
	}
	return c.call != "sign-off"
}

// named is which of the two a value of claim or di names, "" if none.
func named(value string) string {
	switch value {
	case good, capitals:
		return "lamp"
	case fans:
		return "fan"
	}
	return ""
}

// outcome is what a cell comes to.
type outcome struct {
	refused    bool     // there is no connection
	proved     string   // the device that the handshake proved, "" for none
	identified bool     // somebody can sign in on the connection
	acts       string   // the device that the request is about
	faults     []string // the answer is one of these, else the call's success
	atOnce     bool     // the end does not wait until the answer to a fault may have come
}

// expected is the specification: the rows are those of the table "TLS and identity" in docs/protocol.md.
func (c cell) expected() (out outcome) {
	fault := func(codes ...string) { out.faults = append(out.faults, codes...) }

	// A pre-shared key counts as a certificate, also where none is asked for. Where none is asked for, none is looked at.
	byCertificate := c.certificate
	switch c.shows {
	case key, fansKey:
		byCertificate, out.proved = true, map[string]string{key: "lamp", fansKey: "fan"}[c.shows]
	case wrongKey:
		out.refused = true
	case good, fans:
		if c.certificate {
			out.proved = named(c.shows)
		}
	case noIdentity, hubs: // identityPropertiesRequired: false lets them shake hands, and takes them for nobody
		out.refused = c.certificate && !c.anyName
	default:
		out.refused = c.certificate
	}
	out.identified = out.proved != "" || !byCertificate
	session := "" // whose
	if c.within {
		if session = out.proved; session == "" {
			session = "lamp"
		}
	}

	// What a sign-out or sign-off within a session does not say is the session's.
	leaves := c.call == "sign-out" || c.call == "sign-off"
	di, claimed, tokenIsOurs := named(c.di), named(c.claim), false
	if c.di == missing && c.within && leaves {
		di = session
	}
	if c.token == missing {
		if tokenIsOurs = c.within && leaves; tokenIsOurs {
			claimed = session
		} else {
			fault("4.00 body-incomplete", "4.00 code-missing")
		}
	}

	// The rows of the table.
	switch {
	case !byCertificate && !c.setup.claim: // the request's di
		if out.acts = di; di == "" {
			fault("4.00 device-id-" + map[string]string{missing: "missing", noUUID: "invalid"}[c.di])
		}
	case !byCertificate: // the token's claim
		out.acts = claimed
	default: // the certificate, and where there is a claim both, which must be equal
		if out.acts = out.proved; out.proved == "" {
			fault("4.01 device-id-missing")
		}
		if c.setup.claim && claimed != "" && claimed != out.proved {
			fault("4.01 device-claim-mismatch")
		}
	}
	if c.setup.claim && claimed == "" {
		fault("4.01 device-claim-" + map[bool]string{true: "invalid", false: "missing"}[c.claim == noUUID])
	}
	// All rows but the first ignore di, unless they are to compare it. What is no UUID names no device, so not this one.
	if c.strict && (byCertificate || c.setup.claim) && c.di != missing && di != out.acts {
		fault("4.01 device-id-mismatch")
	}
	// A device's own token is good for that device alone, also where no claim is configured; only the hub's provider says whose
	// it is. An application's is good for none. Codes and refresh tokens that provider refuses itself.
	foreign := c.embedded && out.acts != "" && claimed != out.acts
	switch {
	case c.embedded && claimed == "":
		fault("4.01 token-not-of-device")
	case foreign:
		fault("4.01 device-claim-mismatch")
	}
	switch c.token {
	case forged:
		fault("4.01 token-invalid")
	case expired:
		fault("4.01 token-expired")
	case revoked:
		fault("4.01 token-revoked")
	}
	if c.embedded && (c.token == forged || c.token == revoked || foreign) {
		switch c.call {
		case "sign-up":
			fault("4.01 code-refused")
		case "refresh":
			fault("4.01 refresh-token-refused")
		}
	}
	// The tokens of a refresh that is refused after all are revoked, and the session that stands on them is over, as that of any
	// credential that is revoked.
	out.atOnce = c.embedded && c.call == "refresh" && c.within
	// A connection signs out whom it signed in.
	if c.call == "sign-out" && c.within && out.acts != session {
		fault("4.00 device-id-mismatch")
	}
	return out
}

// history is what happens to the lamp and to the fan by a cell, as the hub tells it to subscribers. Before the sign-up nobody is
// registered; before all else both are, if the fan has a part in it.
func (c cell) history() map[string][]string {
	h := map[string][]string{}
	in := c.expected()
	if in.refused {
		return h
	}
	session := ""
	note := func(device, what string) {
		h[device] = append(h[device], what)
		switch {
		case what == "online":
			session = device
		case device == session:
			session = ""
		}
	}
	if c.registered() {
		note("lamp", "registered")
		if c.fanHasPart() {
			note("fan", "registered")
		}
	}
	if c.within {
		if session = in.proved; session == "" {
			session = "lamp"
		}
		note(session, "online")
	}
	if len(in.faults) == 0 {
		switch c.call {
		case "sign-up":
			if !c.registered() {
				note(in.acts, "registered")
			}
		case "sign-in":
			if session != in.acts {
				if session != "" {
					note(session, "offline")
				}
				note(in.acts, "online")
			}
		case "sign-out":
			if session != "" {
				note(session, "offline")
			}
		case "sign-off":
			note(in.acts, "unregistered")
		}
	}
	switch { // the connection ends with the cell, over DTLS by a message that may be lost
	case session != "" && c.over == "dtls":
		note(session, "perhaps offline")
	case session != "":
		note(session, "offline")
	}
	return h
}

func (c cell) registered() bool { return c.call != "sign-up" || c.within }

func (c cell) fanHasPart() bool {
	return slices.ContainsFunc([]string{c.shows, c.claim, c.di}, func(v string) bool { return strings.HasPrefix(v, fans) })
}
