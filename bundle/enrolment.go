package bundle

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// listenForEnrolment opens the listeners of the door for devices without identity.
func (a *assembly) listenForEnrolment(ctx context.Context) (err error) {
	api := a.cfg.EnrolmentGateway.API
	const flag, key = "--enrolment-address", "enrolmentGateway.api.coap.address"
	if address := api.CoAP.Address; address != "" {
		if a.enrolCoAP, a.enrolDTLS, err = coap.Listen(ctx, address, true, true); err != nil {
			return listenError(err, address, flag, key)
		}
		a.listeners = append(a.listeners, a.enrolCoAP, a.enrolDTLS)
	}
	if address := api.HTTP.Address; address != "" {
		if a.enrolHTTP, err = a.listen(ctx, address, "--enrolment-http-address", "enrolmentGateway.api.http.address"); err != nil {
			return err
		}
	}
	if path := api.HTTP.Proxies.Socket; path != "" {
		if a.enrolSocket, err = listenUnix(ctx, path); err != nil {
			return &hub.Error{
				Kind: hub.Unavailable, Code: "address-unusable", Err: err,
				Text: "cannot listen on the Unix socket " + path + "; choose another one with enrolmentGateway.api.http.proxies.socket",
			}
		}
		a.listeners = append(a.listeners, a.enrolSocket)
	}
	return nil
}

// listenUnix opens a Unix socket that its group may use. A socket that is there and that nobody answers on is of a hub that was
// killed; anything else at that path stays.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		c, err := new(net.Dialer).DialContext(ctx, "unix", path)
		if err == nil {
			return nil, errors.Join(errors.New("somebody listens on it"), c.Close())
		}
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	ln, err := new(net.ListenConfig).Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(err, ln.Close())
	}
	return ln, nil
}

var errNoCode = hub.NewError(hub.Unavailable, "provisioning-no-code",
	"the accounts are another provider's, which gives this hub nothing that a device could sign up with")

// cloud is where a device that is provisioned signs up, and with what.
func (a *assembly) cloud(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (hub.Cloud, error) {
	if a.provider == nil {
		return hub.Cloud{}, errNoCode.With("cloud configuration", nil)
	}
	c := hub.Cloud{Provider: providerName, ID: hub.DeviceID(a.hubID)}
	for _, p := range []hub.Protocol{hub.ProtocolCoAPSTCP, hub.ProtocolCoAPS} {
		if at := a.doors.endpoint(p); at != "" {
			c.Gateways = append(c.Gateways, at)
		}
	}
	if len(c.Gateways) == 0 {
		return hub.Cloud{}, hub.NewError(hub.Unavailable, "gateway-off", "there is no listener with TLS or DTLS for devices").With("cloud configuration", nil)
	}
	var err error
	c.Token, _, err = a.provider.OnboardCode(ctx, owner, dev, 0)
	if hub.IsKind(err, hub.NotFound) { // the owner's account is gone, and it is not the device's fault
		err = hub.NewError(hub.Unavailable, "provisioning-no-account", "the owner of the device's group has no account").With("cloud configuration", err)
	}
	return c, err
}

// EnrolmentGroup is a set of devices that may enrol because their manufacturer's CA vouches for them.
type EnrolmentGroup struct {
	ID       string   `json:"id,omitempty"` // "" in a request: make one
	Name     string   `json:"name"`
	Owner    string   `json:"owner"`                 // of the devices; "" in a request: the first administrator
	Chain    string   `json:"chain"`                 // PEM: the CA that signs their factory certificates, and what is above it
	Allow    []string `json:"allow,omitempty"`       // device IDs; none: all of that CA
	Approval bool     `json:"approval"`              // a person decides on each
	Expired  bool     `json:"expired"`               // factory certificates that have ended are good, too
	Named    bool     `json:"named"`                 // a device says its own ID when it comes for the first time
	Types    []string `json:"deviceTypes,omitempty"` // that may enrol, as factory certificates have them; none: all
	// Terms have to be accepted before devices enrol. Accepted is who did, and when; a change keeps it.
	Terms    *hub.Terms      `json:"terms,omitempty"`
	Accepted *hub.Acceptance `json:"acceptedTerms,omitempty"`
	// PSK reports that there is a pre-shared key, which is written over the API; a change keeps it.
	PSK     bool      `json:"preSharedKey"`
	Created time.Time `json:"created,omitzero"`
	User    string    `json:"createdBy,omitempty"`
}

func groupFrom(g hub.EnrolmentGroup) EnrolmentGroup {
	out := EnrolmentGroup{
		ID: g.ID, Name: g.Name, Owner: string(g.Owner), Chain: g.Chain, Approval: g.Approval, Expired: g.Expired, Named: g.Named, PSK: g.HasPSK,
		Created: g.Created, User: g.User,
	}
	for _, dev := range g.Allow {
		out.Allow = append(out.Allow, string(dev))
	}
	out.Types = g.Types
	if g.Terms.Version != "" {
		out.Terms = &g.Terms
	}
	out.Accepted = acceptance(g.Accepted)
	return out
}

func acceptance(a hub.Acceptance) *hub.Acceptance {
	if a.Version == "" {
		return nil
	}
	return &a
}

func groupsFrom(gs []hub.EnrolmentGroup) []EnrolmentGroup {
	out := []EnrolmentGroup{} // an empty list for scripts, not null
	for _, g := range gs {
		out = append(out, groupFrom(g))
	}
	return out
}

// EnrolmentToken is a one-time token.
type EnrolmentToken struct {
	ID       string     `json:"id"`
	Token    string     `json:"token,omitempty"`    // only when it is made
	DeviceID string     `json:"deviceId,omitempty"` // "": any device
	Owner    string     `json:"owner"`
	User     string     `json:"createdBy,omitempty"`
	Created  time.Time  `json:"created"`
	Expires  time.Time  `json:"expiresAt"`
	Used     *time.Time `json:"used,omitempty"`
	UsedBy   string     `json:"usedBy,omitempty"` // a device ID
	// When it is made: where the device enrols, and whom it trusts (PEM).
	Endpoints *Endpoints `json:"endpoints,omitempty"`
	CA        string     `json:"ca,omitempty"`
}

func tokenFrom(t hub.EnrolmentToken) EnrolmentToken {
	out := EnrolmentToken{
		ID: t.ID, DeviceID: string(t.Device), Owner: string(t.Owner), User: t.User, Created: t.Created, Expires: t.Expires, UsedBy: string(t.UsedBy),
	}
	if !t.Used.IsZero() {
		out.Used = &t.Used
	}
	return out
}

func tokensFrom(ts []hub.EnrolmentToken) []EnrolmentToken {
	out := []EnrolmentToken{}
	for _, t := range ts {
		out = append(out, tokenFrom(t))
	}
	return out
}

// Enrolment is how far a device has come.
type Enrolment struct {
	DeviceID string    `json:"deviceId"`
	Owner    string    `json:"owner,omitempty"`
	Group    string    `json:"groupId,omitempty"`
	Method   string    `json:"method"`
	Proof    string    `json:"proof,omitempty"`
	Key      string    `json:"publicKey,omitempty"`  // of the proof, a UUID that names it
	Type     string    `json:"deviceType,omitempty"` // that its manufacturer says
	State    string    `json:"state"`
	Waits    string    `json:"waitsFor,omitempty"` // approval, terms
	User     string    `json:"decidedBy,omitempty"`
	Serial   string    `json:"serial,omitempty"` // of its newest certificate
	Problem  string    `json:"problem,omitempty"`
	Created  time.Time `json:"created"`
	Changed  time.Time `json:"changed"`
}

func enrolmentsFrom(es []hub.Enrolment) []Enrolment {
	out := []Enrolment{}
	for _, e := range es {
		out = append(out, Enrolment{
			DeviceID: string(e.Device), Owner: string(e.Owner), Group: e.Group, Method: string(e.By), Proof: e.Proof, Key: e.Key,
			Type: e.Type, State: string(e.State), Waits: string(e.Waits), User: e.User, Serial: e.Serial, Problem: e.Problem, Created: e.Created, Changed: e.Changed,
		})
	}
	return out
}

// EnrolmentsRequest says which enrolments are meant: those that match all that is set.
type EnrolmentsRequest struct {
	DeviceIDs []string `json:"deviceIds,omitempty"`
	Group     string   `json:"groupId,omitempty"`
	State     string   `json:"state,omitempty"`
	Owner     string   `json:"owner,omitempty"`
	Limit     int      `json:"limit,omitempty"` // at most so many, the newest; 0: 10 000, which is the most
	// Allow is for decisions.
	Allow bool `json:"allow,omitempty"`
}

func (q EnrolmentsRequest) filter() (f hub.EnrolmentFilter, err error) {
	f.Owner = hub.Owner(q.Owner)
	if q.Group != "" {
		f.Groups = []string{q.Group}
	}
	if q.State != "" {
		st, err := hub.ParseEnrolmentState(q.State)
		if err != nil {
			return f, err
		}
		f.States = []hub.EnrolmentState{st}
	}
	f.Devices, err = parseDevices(q.DeviceIDs)
	return f, err
}

func parseDevices(ids []string) (out []hub.DeviceID, err error) {
	for _, id := range ids {
		dev, err := hub.ParseDeviceID(id)
		if err != nil {
			return nil, err
		}
		out = append(out, dev)
	}
	return out, nil
}

// NamesRequest names things by their IDs, or those of an owner, or all.
type NamesRequest struct {
	IDs   []string `json:"ids,omitempty"`
	Owner string   `json:"owner,omitempty"`
}

// AcceptTermsRequest accepts the terms of a group, which must have that version.
type AcceptTermsRequest struct {
	ID      string `json:"id"`
	Version string `json:"version"`
}

// NewTokenRequest asks for a one-time token.
type NewTokenRequest struct {
	DeviceID string        `json:"deviceId,omitempty"` // "": any device
	Owner    string        `json:"owner,omitempty"`    // "": the first administrator
	TTL      time.Duration `json:"ttl,omitempty"`      // nanoseconds; 0: a day
}

func (q EnrolmentGroup) target() string { return cmp.Or(q.ID, q.Name) }
func (q AcceptTermsRequest) target() string {
	return q.ID + " " + q.Version
}
func (q NewTokenRequest) target() string   { return q.DeviceID }
func (q NamesRequest) target() string      { return strings.Join(q.IDs, " ") }
func (q EnrolmentsRequest) target() string { return strings.Join(q.DeviceIDs, " ") }

func (a *assembly) listGroups(ctx context.Context, q NamesRequest) ([]EnrolmentGroup, error) {
	gs, err := a.certificates.Groups(ctx, hub.Owner(q.Owner))
	return groupsFrom(gs), err
}

func (a *assembly) setGroup(ctx context.Context, q EnrolmentGroup) (EnrolmentGroup, error) {
	g := hub.EnrolmentGroup{
		ID: q.ID, Name: q.Name, Chain: q.Chain, Approval: q.Approval, Expired: q.Expired, Named: q.Named, HasPSK: q.PSK, User: callerOf(ctx),
	}
	g.Types = q.Types
	if q.Terms != nil {
		g.Terms = *q.Terms
	}
	var err error
	if q.ID == "" {
		if g.Owner, err = a.enrolOwner(ctx, q.Owner); err != nil {
			return EnrolmentGroup{}, err
		}
	}
	if g.Allow, err = parseDevices(q.Allow); err != nil {
		return EnrolmentGroup{}, err
	}
	g, err = a.certificates.SetGroup(ctx, g)
	return groupFrom(g), err
}

func (a *assembly) acceptTerms(ctx context.Context, q AcceptTermsRequest) (EnrolmentGroup, error) {
	g, err := a.certificates.AcceptTerms(ctx, "", q.ID, q.Version, callerOf(ctx))
	return groupFrom(g), err
}

// enrolOwner is for whom devices enrol. Where the accounts are elsewhere nobody knows which there are.
func (a *assembly) enrolOwner(ctx context.Context, named string) (hub.Owner, error) {
	if a.provider != nil {
		owner, err := a.owner(ctx, named)
		if err == nil {
			err = a.provider.MayHaveDevices(ctx, owner)
		}
		return owner, err
	}
	if named == "" {
		return "", hub.NewError(hub.Invalid, "owner-missing", "name the owner of the devices (--owner): the accounts are another provider's")
	}
	return hub.Owner(named), nil
}

func (a *assembly) deleteGroups(ctx context.Context, q NamesRequest) ([]EnrolmentGroup, error) {
	gs, err := a.certificates.DeleteGroups(ctx, q.IDs)
	return groupsFrom(gs), err
}

func (a *assembly) listEnrolmentTokens(ctx context.Context, q NamesRequest) ([]EnrolmentToken, error) {
	ts, err := a.certificates.Tokens(ctx, hub.Owner(q.Owner))
	return tokensFrom(ts), err
}

func (a *assembly) newEnrolmentToken(ctx context.Context, q NewTokenRequest) (EnrolmentToken, error) {
	var dev hub.DeviceID
	var err error
	if q.DeviceID != "" {
		if dev, err = hub.ParseDeviceID(q.DeviceID); err != nil {
			return EnrolmentToken{}, err
		}
	}
	owner, err := a.enrolOwner(ctx, q.Owner)
	if err != nil {
		return EnrolmentToken{}, err
	}
	if dev != "" {
		if err := a.readmit(ctx, dev, ""); err != nil {
			return EnrolmentToken{}, err
		}
	}
	text, t, err := a.certificates.NewToken(ctx, owner, dev, q.TTL, callerOf(ctx))
	if err != nil {
		return EnrolmentToken{}, err
	}
	out := tokenFrom(t)
	at := a.endpoints()
	out.Token, out.Endpoints, out.CA = text, &at, a.deviceRoots()
	return out, nil
}

// enrolments is what owners do about enrolments over the API.
type enrolments struct {
	certificates
	a *assembly
}

// SetGroup is of grpcgateway.Enrolments.
func (e enrolments) SetGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error) {
	if err := e.mayHave(ctx, g.Owner); err != nil {
		return hub.EnrolmentGroup{}, err
	}
	return e.certificates.SetGroup(ctx, g)
}

// NewToken is of grpcgateway.Enrolments.
func (e enrolments) NewToken(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, life time.Duration, user string,
) (string, hub.EnrolmentToken, error) {
	err := e.mayHave(ctx, owner)
	if err == nil && dev != "" {
		err = e.readmit(ctx, owner, dev)
	}
	if err != nil {
		return "", hub.EnrolmentToken{}, err
	}
	return e.certificates.NewToken(ctx, owner, dev, life, user)
}

// Decide is of grpcgateway.Enrolments.
func (e enrolments) Decide(ctx context.Context, owner hub.Owner, devices []hub.DeviceID, allow bool, user string) ([]hub.Enrolment, error) {
	for _, dev := range devices {
		if !allow {
			break
		}
		if err := e.readmit(ctx, owner, dev); err != nil {
			return nil, err
		}
	}
	return e.certificates.Decide(ctx, owner, devices, allow, user)
}

// mayHave reports whether an owner may have devices; of another provider's nobody knows.
func (e enrolments) mayHave(ctx context.Context, owner hub.Owner) error {
	if e.a.provider == nil {
		return nil
	}
	return e.a.provider.MayHaveDevices(ctx, owner)
}

// readmit lets a device that its owner removed come again, as assembly.readmit does for an operator. One that was another's stays out.
func (e enrolments) readmit(ctx context.Context, owner hub.Owner, dev hub.DeviceID) error {
	err := e.a.identities.Admits(ctx, dev, nil)
	if code, _ := hub.Public(err); err == nil || code != "device-removed" {
		return err
	}
	if enabled := e.a.identities.Enable(ctx, dev, owner); !hub.IsKind(enabled, hub.NotFound) {
		return enabled
	}
	return err
}

func (a *assembly) deleteEnrolmentTokens(ctx context.Context, q NamesRequest) ([]EnrolmentToken, error) {
	ts, err := a.certificates.DeleteTokens(ctx, hub.Owner(q.Owner), q.IDs)
	return tokensFrom(ts), err
}

// listEnrolments answers the enrolments that changed last, newest first.
func (a *assembly) listEnrolments(ctx context.Context, q EnrolmentsRequest) ([]Enrolment, error) {
	f, err := q.filter()
	if err != nil {
		return nil, err
	}
	limit := cmp.Or(q.Limit, maxCertificates)
	if limit < 0 || limit > maxCertificates {
		return nil, hub.NewError(hub.Invalid, "limit-invalid", "the limit is from 1 to 10000")
	}
	var out []hub.Enrolment
	newestFirst := func(a, b hub.Enrolment) int {
		return cmp.Or(b.Changed.Compare(a.Changed), cmp.Compare(a.Device, b.Device))
	}
	for e, err := range a.certificates.Enrolments(ctx, f) {
		if err != nil {
			return nil, err
		}
		if out = append(out, e); len(out) >= 2*limit { // there is no order of time
			slices.SortFunc(out, newestFirst)
			out = out[:limit]
		}
	}
	slices.SortFunc(out, newestFirst)
	return enrolmentsFrom(out[:min(limit, len(out))]), nil
}

func (a *assembly) decideEnrolments(ctx context.Context, q EnrolmentsRequest) ([]Enrolment, error) {
	f, err := q.filter()
	if err != nil {
		return nil, err
	}
	for _, dev := range f.Devices {
		if !q.Allow {
			break
		}
		if err := a.readmit(ctx, dev, ""); err != nil {
			return nil, err
		}
	}
	es, err := a.certificates.Decide(ctx, f.Owner, f.Devices, q.Allow, callerOf(ctx))
	return enrolmentsFrom(es), err
}

func (a *assembly) forgetEnrolments(ctx context.Context, q EnrolmentsRequest) ([]Enrolment, error) {
	f, err := q.filter()
	if err != nil {
		return nil, err
	}
	if len(f.Devices) == 0 {
		return nil, hub.NewError(hub.Invalid, "filter-empty", "name the devices")
	}
	es, err := a.certificates.Forget(ctx, f)
	return enrolmentsFrom(es), err
}

// EnrolmentGroups lists the groups, oldest first.
func (c *Control) EnrolmentGroups(ctx context.Context, q NamesRequest) (gs []EnrolmentGroup, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/groups", q, &gs)
	return gs, err
}

// SetEnrolmentGroup makes a group, or changes the one that has the ID.
func (c *Control) SetEnrolmentGroup(ctx context.Context, g EnrolmentGroup) (out EnrolmentGroup, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/groups/set", g, &out)
	return out, err
}

// AcceptTerms accepts the terms of a group.
func (c *Control) AcceptTerms(ctx context.Context, q AcceptTermsRequest) (g EnrolmentGroup, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/groups/accept", q, &g)
	return g, err
}

// DeleteEnrolmentGroups removes groups by their IDs, and returns those that there were.
func (c *Control) DeleteEnrolmentGroups(ctx context.Context, q NamesRequest) (gs []EnrolmentGroup, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/groups/delete", q, &gs)
	return gs, err
}

// EnrolmentTokens lists one-time tokens, newest first.
func (c *Control) EnrolmentTokens(ctx context.Context, q NamesRequest) (ts []EnrolmentToken, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/tokens", q, &ts)
	return ts, err
}

// NewEnrolmentToken makes a one-time token.
func (c *Control) NewEnrolmentToken(ctx context.Context, q NewTokenRequest) (t EnrolmentToken, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/tokens/new", q, &t)
	return t, err
}

// DeleteEnrolmentTokens removes one-time tokens by their IDs, and returns those that there were.
func (c *Control) DeleteEnrolmentTokens(ctx context.Context, q NamesRequest) (ts []EnrolmentToken, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolment/tokens/delete", q, &ts)
	return ts, err
}

// Enrolments lists the enrolments that are meant, those that changed last first.
func (c *Control) Enrolments(ctx context.Context, q EnrolmentsRequest) (es []Enrolment, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolments", q, &es)
	return es, err
}

// DecideEnrolments allows or refuses devices, and returns those for which that was new.
func (c *Control) DecideEnrolments(ctx context.Context, q EnrolmentsRequest) (es []Enrolment, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolments/decide", q, &es)
	return es, err
}

// ForgetEnrolments has devices begin anew, and returns what was known of them.
func (c *Control) ForgetEnrolments(ctx context.Context, q EnrolmentsRequest) (es []Enrolment, err error) {
	err = c.call(ctx, http.MethodPost, "/enrolments/forget", q, &es)
	return es, err
}
