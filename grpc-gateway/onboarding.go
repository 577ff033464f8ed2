package grpcgateway

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Endpoints is where a hub listens, as URIs that others can use. Empty: no such listener.
type Endpoints struct {
	CoAPSTCP string `json:"coaps+tcp,omitempty"`
	CoAPS    string `json:"coaps,omitempty"`
	CoAPTCP  string `json:"coap+tcp,omitempty"`
	CoAP     string `json:"coap,omitempty"`
	CoAPSWS  string `json:"coaps+ws,omitempty"`
	CoAPWS   string `json:"coap+ws,omitempty"`
	HTTP     string `json:"http,omitempty"`
	GRPC     string `json:"grpc,omitempty"` // host:port
	Admin    string `json:"admin,omitempty"`
	// Enrolment is where devices enrol over CoAP; over TLS it is the same port of TCP.
	Enrolment     string `json:"enrolment,omitempty"`
	EnrolmentHTTP string `json:"enrolmentHttp,omitempty"`
	// OAuth is the embedded provider's base address: its discovery document is below. Tokens name the issuer, which stays when the
	// hub moves.
	OAuth string `json:"oauth,omitempty"`
}

// Onboarding is what a device needs to sign up.
type Onboarding struct {
	HubID                 string    `json:"hubId"`
	DeviceID              string    `json:"deviceId,omitempty"`
	Owner                 string    `json:"owner"`
	Endpoints             Endpoints `json:"endpoints"`
	AuthorizationProvider string    `json:"authorizationProvider"`
	AuthorizationCode     string    `json:"authorizationCode,omitempty"`
	// AuthorizeURL replaces the code where an external provider gives codes: open it in a browser.
	AuthorizeURL string    `json:"authorizeUrl,omitempty"`
	CA           string    `json:"ca"`                 // PEM
	ExpiresAt    time.Time `json:"expiresAt,omitzero"` // of the code
	Identity     *Identity `json:"identity,omitempty"`
	// PSKIdentity and PSK are for DTLS (RFC 4279). The bytes of PSK are the key as they stand.
	PSKIdentity string `json:"pskIdentity,omitempty"`
	PSK         string `json:"psk,omitempty"`
}

// Identity is a device's certificate and key, PEM.
type Identity struct {
	Chain string `json:"chain"`
	Key   string `json:"key"`
	CA    string `json:"ca"`
}

// ToOnboard is what a device is to get besides the code. Either a device is named or any is meant.
type ToOnboard struct {
	DeviceID string `json:"deviceId"`
	Any      bool   `json:"anyDevice"`
	// Certificate and PSK are of a device that is named. A key that it had before is worth nothing then.
	Certificate bool `json:"certificate"`
	PSK         bool `json:"preSharedKey"`
}

// Onboarder makes what devices need to sign up.
type Onboarder interface {
	// Onboard makes it for an owner's device, or for one that nobody has. user asks. Denied for devices of others, for one that another
	// owner removed, that is not let in, or whose ID is the hub's or is kept for somebody else; Exhausted where an owner has too much of
	// what is asked for. Nothing has changed after these.
	Onboard(ctx context.Context, owner hub.Owner, user string, q ToOnboard) (Onboarding, error)
}

// onboard answers secrets, which nobody may keep, and which are in no log: of what was asked for, the audit log has the device and the
// certificate's serial.
func (g *Gateway) onboard(w http.ResponseWriter, r *request) error {
	if g.deps.Onboarding == nil {
		return errNoRoute
	}
	var body ToOnboard
	if err := readJSON(r, &body); err != nil {
		return err
	}
	named := ""
	switch id, err := hub.ParseDeviceID(body.DeviceID); {
	case err == nil:
		named = " device=" + string(id)
	case body.Any:
		named = " any device"
	}
	*r.target += named
	if body.PSK {
		*r.target += " preSharedKey"
	}
	o, err := g.deps.Onboarding.Onboard(r.Context(), r.claims.Owner, r.claims.Subject, body)
	if err != nil {
		return err
	}
	if o.Identity != nil {
		signed := ""
		addSigned(&signed, []byte(o.Identity.Chain))
		*r.target += strings.TrimPrefix(signed, named)
	}
	w.Header().Set("Cache-Control", "no-store")
	return writeJSON(w, r, o)
}
