package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
	"unicode/utf8"

	josejson "github.com/go-jose/go-jose/v4/json"

	"github.com/coaphub/coaphub/hub"
)

// maxOwner bounds the owner claim: owners become keys in stores.
const maxOwner = 256

// claimSet is a token's payload, claim by claim, names taken literally.
type claimSet map[string]josejson.RawMessage

// parseClaims refuses what is no JSON object and what has a name twice (RFC 7519, 4, leaves that to us): two readers of
// such a token could see two different owners. Names are compared exactly, unlike encoding/json does with structs.
func parseClaims(payload []byte) (claimSet, error) {
	if !utf8.Valid(payload) {
		return nil, errors.New("the claims are not UTF-8")
	}
	var c claimSet
	if err := josejson.Unmarshal(payload, &c); err != nil {
		return nil, fmt.Errorf("read the claims: %w", err)
	}
	if c == nil {
		return nil, errors.New("the claims are null")
	}
	return c, nil
}

func (c claimSet) has(name string) bool {
	raw, ok := c[name]
	return ok && string(raw) != "null"
}

// text returns a string claim; absent is "" without error.
func (c claimSet) text(name string) (string, error) {
	if !c.has(name) {
		return "", nil
	}
	var s string
	if err := json.Unmarshal(c[name], &s); err != nil {
		return "", fmt.Errorf("claim %s is not a string", name)
	}
	return s, nil
}

// texts returns a claim that is a string or a list of strings.
func (c claimSet) texts(name string) ([]string, error) {
	if !c.has(name) {
		return nil, nil
	}
	var s string
	if json.Unmarshal(c[name], &s) == nil {
		return []string{s}, nil
	}
	var list []string
	if err := json.Unmarshal(c[name], &list); err != nil {
		return nil, fmt.Errorf("claim %s is neither a string nor a list of strings", name)
	}
	return list, nil
}

// when returns a NumericDate (RFC 7519, 2: seconds, perhaps with a fraction); absent is the zero time.
func (c claimSet) when(name string) (time.Time, error) {
	if !c.has(name) {
		return time.Time{}, nil
	}
	var f float64
	if err := json.Unmarshal(c[name], &f); err != nil || f <= 0 || f > 253402300799 { // the end of year 9999
		return time.Time{}, fmt.Errorf("claim %s is not a date", name)
	}
	sec, frac := math.Modf(f)
	return time.Unix(int64(sec), int64(frac*1e9)), nil
}

// scopes joins the three claims that providers use. said is false when the token has none of them.
func (c claimSet) scopes() (scopes []string, said bool, err error) {
	for _, name := range []string{"scope", "scp", "permissions"} {
		list, err := c.texts(name)
		if err != nil {
			return nil, false, err
		}
		said = said || c.has(name)
		for _, s := range list {
			scopes = append(scopes, strings.Fields(s)...) // RFC 6749, 3.3: separated by spaces
		}
	}
	return scopes, said, nil
}

// check is everything about a token but its signature, and but an iat that lies ahead (see verify). It returns the claims in
// hub's words and the iat.
func (is *trusted) check(c claimSet, now time.Time, skew time.Duration) (hub.Claims, time.Time, error) {
	fail := func(err error) (hub.Claims, time.Time, error) { return hub.Claims{}, time.Time{}, err }
	exp, err1 := c.when("exp")
	nbf, err2 := c.when("nbf")
	iat, err3 := c.when("iat")
	if err := errors.Join(err1, err2, err3); err != nil {
		return fail(err)
	}
	switch {
	case exp.IsZero():
		return fail(errors.New("there is no exp"))
	case !now.Before(exp.Add(skew)):
		return fail(errExpired)
	case now.Add(skew).Before(nbf) && !now.Add(skew).Before(iat):
		return fail(errors.New("the token is not valid yet"))
	}
	aud, err := c.texts("aud")
	if err != nil {
		return fail(err)
	}
	if !overlap(aud, is.Audience) {
		return fail(errors.New("the token is for another audience"))
	}
	scopes, said, err := c.scopes()
	if err != nil {
		return fail(err)
	}
	use, err := c.text("token_use")
	if err != nil {
		return fail(err)
	}
	switch {
	case use != "" && use != "access":
		return fail(errors.New("it is no access token"))
	case !said && (c.has("nonce") || c.has("at_hash") || c.has("c_hash")):
		// OpenID Connect Core, 2 and 3.1.3.6: these stand in ID tokens, which tell a client who logged in and grant nothing.
		return fail(errors.New("an ID token is not an access token"))
	case !said:
		scopes = is.DefaultScopes
	}
	sub, err1 := c.text("sub")
	owner, err2 := c.text(is.OwnerClaim)
	jti, err3 := c.text("jti")
	client, err4 := c.text("client_id")
	azp, err5 := c.text("azp")
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return fail(err)
	}
	if client == "" {
		client = azp
	}
	switch {
	case owner == "":
		return fail(fmt.Errorf("there is no owner claim %s", is.OwnerClaim))
	case len(owner) > maxOwner || strings.ContainsFunc(owner, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return fail(fmt.Errorf("the owner claim %s is too long or has control characters", is.OwnerClaim))
	}
	for _, p := range is.reserved {
		if strings.HasPrefix(owner, p) {
			// Only the first issuer has plain names; one that begins like another issuer's owners would become one of them.
			return fail(fmt.Errorf("the owner claim begins with %q, which stands for another issuer", p))
		}
	}
	var dev string
	if is.DeviceIDClaim != "" {
		if dev, err = c.text(is.DeviceIDClaim); err != nil {
			return fail(err)
		}
	}
	out := hub.Claims{
		Issuer: is.Authority, Subject: sub, Owner: hub.Owner(is.OwnerPrefix + owner), ClientID: client, TokenID: jti,
		Scopes: scopes, Audience: aud, DeviceID: dev, Expiry: exp,
	}
	if is.Grant != nil {
		out.Grant = is.Grant(jti)
	}
	out.Device = dev != "" || out.Has(hub.ScopeDevice) || client != "" && overlap([]string{client}, is.DeviceClients)
	out.MarksDevices = is.DeviceIDClaim != "" || len(is.DeviceClients) > 0
	return out, iat, nil
}

func overlap(a, b []string) bool {
	for _, x := range a {
		for _, y := range b {
			if x == y {
				return true
			}
		}
	}
	return false
}
