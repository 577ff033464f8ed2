package grpcgateway

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	dppb "github.com/coaphub/coaphub/api/gen/deviceprovisioningservicepb"
	"github.com/coaphub/coaphub/hub"
)

// Which devices get an identity by themselves, and how far they have come: plgd's device provisioning service, and calls of our own
// for what that does not know. Everybody, administrators too, sees those of his own owner. Over HTTP these calls have one form,
// protobuf's JSON without what is empty.

var (
	errDeleteNothing = hub.NewError(hub.Invalid, "filter-empty", "name what to delete, or ask for all of it with all=true")
	errNoGroup       = hub.NewError(hub.NotFound, "group-unknown", "there is no such enrolment group")
	errOneHub        = hub.NewError(hub.MethodNotAllowed, "hub-fixed", "devices are provisioned for this hub, and for no other")
	errGroupHub      = hub.NewError(hub.Invalid, "hub-unknown", "a group's devices come to this hub: name no other")
	errFileValue     = hub.NewError(hub.Invalid, "value-invalid", "a value is text, or data:;base64, and what follows; files are not read")
)

// provisioningFilter reads which things are meant. Filters of different kinds narrow each other.
func provisioningFilter(ids, devices, groups, states []string) (filter, error) {
	f, err := newFilter(devices, nil, nil)
	if err != nil {
		return f, err
	}
	if len(ids) > maxFilter || len(groups) > maxFilter {
		return f, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	}
	for _, s := range states {
		st, err := hub.ParseEnrolmentState(s)
		if err != nil {
			return f, err
		}
		f.states = append(f.states, st)
	}
	f.things, f.groups = ids, groups
	return f, nil
}

func (f *filter) ofRecords(owner hub.Owner) hub.ProvisioningFilter {
	return hub.ProvisioningFilter{Owner: owner, IDs: f.things, Devices: f.ids(), Groups: f.groups}
}

func (f *filter) ofEnrolments(owner hub.Owner) hub.EnrolmentFilter {
	return hub.EnrolmentFilter{Owner: owner, Devices: f.ids(), Groups: f.groups, States: f.states}
}

// toDelete refuses to delete what nobody named, and names beside all.
func toDelete(all bool, named ...string) error {
	switch {
	case all && len(named) > 0:
		return errDeleteBoth
	case !all && (len(named) == 0 || slices.Contains(named, "")):
		return errDeleteNothing
	}
	return nil
}

// removed is how many there were.
type removed struct {
	Count int64 `json:"count,string"`
}

// messageElement is an element that is written as its message is.
type messageElement struct{ m proto.Message }

func (e messageElement) message(string) proto.Message { return e.m }

func (e messageElement) appendJSON(b []byte, cursor string) []byte {
	b = append(b, objectOf(e.m)...)
	return append(appendText(b[:len(b)-1], "cursor", cursor), '}')
}

// objectOf is a message as protobuf's JSON, without the spaces that protobuf adds at random.
func objectOf(m proto.Message) []byte {
	var b bytes.Buffer
	j, err := protojson.Marshal(m)
	if err == nil {
		err = json.Compact(&b, j)
	}
	if err != nil { // a text that is no UTF-8: nothing of ours is
		return []byte("{}")
	}
	return b.Bytes()
}

func writeMessage(w http.ResponseWriter, r *request, m proto.Message) error {
	return writeTagged(w, r, "application/json", append(objectOf(m), '\n'))
}

// readMessage reads a body as protobuf's JSON.
func readMessage(r *request, m proto.Message) error {
	b, err := r.document()
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(b, m); err != nil {
		return errBodyForm.With("http.body", err)
	}
	return nil
}

// paged yields things as they are read, in no order: an owner may have more than should be in memory. Pages are in the order of
// their keys, and at most maxSorted long.
func paged[T any](f *filter, all iter.Seq2[T, error], key func(*T) string, as func(*T) element) iter.Seq2[found, error] {
	f.limit = min(f.limit, maxSorted) // before the page is counted
	return func(yield func(found, error) bool) {
		send := func(v *T) bool {
			return yield(found{as(v), place{device: nobody, href: hub.Href(key(v))}}, nil)
		}
		var page []T
		first := func(n int) { // keeps the first n
			slices.SortFunc(page, func(a, b T) int { return strings.Compare(key(&a), key(&b)) })
			page = page[:min(n, len(page))]
		}
		next := int(f.limit) + 1 // with the one that says that there is more
		for v, err := range all {
			switch {
			case err != nil:
				yield(found{}, err)
				return
			case key(&v) <= string(f.from.href):
			case f.limit == 0:
				if !send(&v) {
					return
				}
			default:
				if page = append(page, v); len(page) == 2*next {
					first(next)
				}
			}
		}
		first(next)
		for i := range page {
			if !send(&page[i]) {
				return
			}
		}
	}
}

// listed is a slice as it is read.
func listed[T any](vs []T, err error) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for _, v := range vs {
			if !yield(v, nil) {
				return
			}
		}
		if err != nil {
			var none T
			yield(none, err)
		}
	}
}

// Provisioning records.

func (g *Gateway) provisioningRecords(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return paged(f, g.deps.Enrolments.ProvisioningRecords(ctx, f.ofRecords(owner)),
		func(r *hub.ProvisioningRecord) string { return r.ID },
		func(r *hub.ProvisioningRecord) element { return messageElement{g.provisioningRecord(r)} })
}

func (g *Gateway) getProvisioningRecords(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	f, err := provisioningFilter(r.query["idFilter"], r.query["deviceIdFilter"], r.query["enrollmentGroupIdFilter"], nil)
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listRecords, &f, g.provisioningRecords)
}

func (g *Gateway) deleteProvisioningRecords(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	all, err := r.query.strictFlag("all")
	if err != nil {
		return err
	}
	n, err := g.deletedRecords(r.Context(), r.claims.Owner, r.query["idFilter"], r.query["deviceIdFilter"], r.query["enrollmentGroupIdFilter"], all)
	if err != nil {
		return err
	}
	return writeJSON(w, r, removed{n})
}

func (g *Gateway) deletedRecords(ctx context.Context, owner hub.Owner, ids, devices, groups []string, all bool) (int64, error) {
	if err := toDelete(all, slices.Concat(ids, devices, groups)...); err != nil {
		return 0, err
	}
	f, err := provisioningFilter(ids, devices, groups, nil)
	if err != nil {
		return 0, err
	}
	gone, err := g.deps.Enrolments.DeleteProvisioningRecords(ctx, f.ofRecords(owner))
	return int64(len(gone)), err
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// provisioningRecord writes a record as other hubs have it; what is secret is not in it, and was not kept.
func (g *Gateway) provisioningRecord(r *hub.ProvisioningRecord) *dppb.ProvisioningRecord {
	m := &dppb.ProvisioningRecord{
		Id: r.ID, DeviceId: string(r.Device), EnrollmentGroupId: r.Group, CreationDate: nanos(r.Created), Owner: string(r.Owner),
		Attestation: &dppb.Attestation{Date: nanos(r.Attested), X509: &dppb.X509Attestation{CertificatePem: r.Certificate, CommonName: r.Name}},
	}
	status := func(step hub.ProvisioningStep) *dppb.ProvisionStatus {
		s, ok := r.Steps[step]
		if !ok {
			return nil
		}
		return &dppb.ProvisionStatus{Date: nanos(s.Time), CoapCode: int32(s.Code), ErrorMessage: s.Problem}
	}
	good := func(s *dppb.ProvisionStatus) bool { return s != nil && s.GetErrorMessage() == "" }
	m.PlgdTime = status(hub.StepTime)
	if s := status(hub.StepOwnership); s != nil {
		m.Ownership = &dppb.OwnershipStatus{Status: s}
		if good(s) {
			m.Ownership.Owner = r.Owner.UUID()
		}
	}
	if s := status(hub.StepCredentials); s != nil {
		m.Credential = &dppb.CredentialStatus{Status: s, IdentityCertificatePem: r.Identity}
		if r.PSK {
			m.Credential.PreSharedKey = &dppb.PreSharedKey{SubjectId: r.Owner.UUID()}
		}
		if r.Identity != "" {
			m.Credential.Credentials = g.credentials(r)
		}
	}
	if s := status(hub.StepACLs); s != nil {
		m.Acl = &dppb.ACLStatus{Status: s}
		if good(s) {
			m.Acl.AccessControlList = accessControl(hub.DeviceACL(r.Owner, hub.DeviceID(g.deps.HubID)))
		}
	}
	if s := status(hub.StepCloud); s != nil {
		m.Cloud = &dppb.CloudStatus{Status: s, ProviderName: r.Cloud.Provider, SelectedGateway: int32(r.Cloud.Selected)}
		for _, uri := range r.Cloud.Gateways {
			m.Cloud.Gateways = append(m.Cloud.Gateways, &dppb.CloudStatus_Gateway{Uri: uri, Id: g.deps.HubID})
		}
	}
	return m
}

func (g *Gateway) credentials(r *hub.ProvisioningRecord) []*dppb.Credential {
	certificate := func(subject string, usage dppb.Credential_CredentialUsage, text string) *dppb.Credential {
		return &dppb.Credential{
			Type: []dppb.Credential_CredentialType{dppb.Credential_ASYMMETRIC_SIGNING_WITH_CERTIFICATE}, Subject: subject, Usage: usage,
			PublicData: &dppb.CredentialPublicData{Data: []byte(text), Encoding: dppb.CredentialPublicData_PEM},
		}
	}
	out := []*dppb.Credential{
		certificate(string(r.Device), dppb.Credential_CERT, r.Identity),
		certificate(r.Owner.UUID(), dppb.Credential_TRUST_CA, g.deps.HubInfo().CertificateAuthorities),
	}
	if r.PSK {
		out = append(out, &dppb.Credential{Type: []dppb.Credential_CredentialType{dppb.Credential_SYMMETRIC_PAIR_WISE}, Subject: r.Owner.UUID()})
	}
	return out
}

func accessControl(aces []hub.ACE) (out []*dppb.AccessControl) {
	for _, e := range aces {
		m := &dppb.AccessControl{}
		if e.Subject == "" {
			m.ConnectionSubject = &dppb.AccessControlConnectionSubject{Type: dppb.AccessControlConnectionSubject_ANON_CLEAR}
		} else {
			m.DeviceSubject = &dppb.AccessControlDeviceSubject{DeviceId: e.Subject}
		}
		for bit := range 5 { // the message numbers the bits
			if e.Permissions>>bit&1 != 0 {
				m.Permissions = append(m.Permissions, dppb.AccessControl_Permission(bit))
			}
		}
		for _, href := range e.Hrefs {
			m.Resources = append(m.Resources, &dppb.AccessControlResource{Href: string(href)})
		}
		if len(e.Hrefs) == 0 {
			m.Resources = []*dppb.AccessControlResource{{Wildcard: dppb.AccessControlResource_NONCFG_ALL}}
		}
		out = append(out, m)
	}
	return out
}

// Enrolment groups. They decide whose the devices of a CA will be, and keep others from having them: so an administrator makes and
// changes them. Their owner sees them, and may remove them.

func (g *Gateway) groupsOf(ctx context.Context, owner hub.Owner, f *filter) ([]hub.EnrolmentGroup, error) {
	gs, err := g.deps.Enrolments.Groups(ctx, owner)
	return slices.DeleteFunc(gs, func(e hub.EnrolmentGroup) bool {
		return len(f.things) > 0 && !slices.Contains(f.things, e.ID) || len(f.names) > 0 && !slices.Contains(f.names, leadOf(e.Chain)) ||
			len(f.groups) > 0 && !slices.Contains(f.groups, g.deps.HubID)
	}), err
}

// groupFilter reads which groups are meant; all of them are of this hub.
func groupFilter(ids, names, hubs []string) (filter, error) {
	f, err := provisioningFilter(ids, nil, hubs, nil)
	f.names = names
	return f, err
}

func (g *Gateway) enrolmentGroups(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return paged(f, listed(g.groupsOf(ctx, owner, f)),
		func(e *hub.EnrolmentGroup) string { return e.ID },
		func(e *hub.EnrolmentGroup) element { return messageElement{g.groupMessage(e)} })
}

func (g *Gateway) getEnrollmentGroups(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	f, err := groupFilter(r.query["idFilter"], r.query["attestationMechanismX509CertificateNames"], r.query["hubIdFilter"])
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listGroups, &f, g.enrolmentGroups)
}

// dataPrefix is how other hubs write a file's content in place of its name.
const dataPrefix = "data:;base64,"

func (g *Gateway) groupMessage(e *hub.EnrolmentGroup) *dppb.EnrollmentGroup {
	m := &dppb.EnrollmentGroup{
		Id: e.ID, Owner: string(e.Owner), Name: e.Name, HubIds: []string{g.deps.HubID}, Approval: e.Approval, Named: e.Named, HasPreSharedKey: e.HasPSK,
		DeviceTypes: e.Types,
		AttestationMechanism: &dppb.AttestationMechanism{X509: &dppb.X509Configuration{
			CertificateChain: dataPrefix + base64.StdEncoding.EncodeToString([]byte(e.Chain)), LeadCertificateName: leadOf(e.Chain),
			ExpiredCertificateEnabled: e.Expired,
		}},
	}
	for _, dev := range e.Allow {
		m.Allow = append(m.Allow, string(dev))
	}
	if e.Terms.Version != "" {
		m.Terms = &dppb.EnrolmentTerms{Version: e.Terms.Version, Url: e.Terms.URL}
	}
	if a := e.Accepted; a.Version != "" {
		m.AcceptedTerms = &dppb.AcceptedTerms{Version: a.Version, AcceptedBy: a.User, AcceptanceDate: nanos(a.Time)}
	}
	return m
}

// leadOf is the common name of the first certificate of a chain, "" if it cannot be read.
func leadOf(chain string) string {
	block, _ := pem.Decode([]byte(chain))
	if block == nil {
		return ""
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return ""
	}
	return c.Subject.CommonName
}

// leadFirst puts the certificate of a common name in front of the others. "" leaves them as they are.
func leadFirst(chain, lead string) (string, error) {
	if lead == "" || leadOf(chain) == lead {
		return chain, nil
	}
	var out, others strings.Builder
	for rest := []byte(chain); ; {
		block, tail := pem.Decode(rest)
		if block == nil {
			break
		}
		to := &others
		if c, err := x509.ParseCertificate(block.Bytes); err == nil && c.Subject.CommonName == lead && out.Len() == 0 {
			to = &out
		}
		to.Write(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes}))
		rest = tail
	}
	if out.Len() == 0 {
		return "", hub.NewError(hub.Invalid, "group-lead-unknown", "no certificate of the group has the name leadCertificateName")
	}
	return out.String() + others.String(), nil
}

// valueOf reads what other hubs take as text, as a data URL (RFC 2397), or as a file's name, which here is refused: the caller is
// not on the hub's machine.
func valueOf(text string) (string, error) {
	rest, ok := strings.CutPrefix(text, "data:")
	if !ok {
		if strings.HasPrefix(text, "file:") || strings.HasPrefix(text, "/") {
			return "", errFileValue
		}
		return text, nil
	}
	kind, data, ok := strings.Cut(rest, ",")
	if !ok {
		return "", errFileValue
	}
	if strings.HasSuffix(kind, ";base64") {
		b, err := fromBase64(data)
		if err != nil {
			return "", errFileValue.With("base64", err)
		}
		return string(b), nil
	}
	v, err := url.PathUnescape(data)
	if err != nil {
		return "", errFileValue.With("unescape", err)
	}
	return v, nil
}

// groupRequest is what a caller says of a group, when he makes or changes it.
type groupRequest interface {
	GetAttestationMechanism() *dppb.AttestationMechanism
	GetHubIds() []string
	GetPreSharedKey() string
	GetName() string
	GetAllow() []string
	GetApproval() bool
	GetDeviceTypes() []string
	GetTerms() *dppb.EnrolmentTerms
}

// setGroup makes a group of the caller's owner, or changes that of an ID, and adds it to the target.
func (g *Gateway) setGroup(ctx context.Context, c hub.Claims, id string, in groupRequest, named *bool, target *string) (*dppb.EnrollmentGroup, error) {
	e := hub.EnrolmentGroup{ID: id, Owner: c.Owner, User: c.Subject, Name: in.GetName(), Approval: in.GetApproval(), Named: true}
	if id != "" {
		gs, err := g.groupsOf(ctx, c.Owner, &filter{things: []string{id}})
		if err != nil {
			return nil, err
		}
		if len(gs) == 0 {
			return nil, errNoGroup
		}
		e.Named, e.HasPSK, e.Terms = gs[0].Named, gs[0].HasPSK && in.GetPreSharedKey() == "", gs[0].Terms
	}
	if t := in.GetTerms(); t != nil { // who does not know them takes nothing away
		e.Terms = hub.Terms{Version: t.GetVersion(), URL: t.GetUrl()}
	}
	if named != nil {
		e.Named = *named
	}
	for _, h := range in.GetHubIds() {
		if h != g.deps.HubID {
			return nil, errGroupHub
		}
	}
	e.Types = in.GetDeviceTypes()
	x := in.GetAttestationMechanism().GetX509()
	e.Expired = x.GetExpiredCertificateEnabled()
	var err error
	if e.Chain, err = valueOf(x.GetCertificateChain()); err != nil {
		return nil, err
	}
	if e.Chain, err = leadFirst(e.Chain, x.GetLeadCertificateName()); err != nil {
		return nil, err
	}
	if e.PSK, err = valueOf(in.GetPreSharedKey()); err != nil {
		return nil, err
	}
	for i, d := range in.GetAllow() {
		dev, err := hub.ParseDeviceID(d)
		if err != nil {
			return nil, badFilter("allow", i, err)
		}
		e.Allow = append(e.Allow, dev)
	}
	out, err := g.deps.Enrolments.SetGroup(ctx, e)
	if err != nil {
		return nil, err
	}
	*target += " group=" + out.ID
	return g.groupMessage(&out), nil
}

func (g *Gateway) createEnrollmentGroup(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	var in dppb.CreateEnrollmentGroupRequest
	if err := readMessage(r, &in); err != nil {
		return err
	}
	m, err := g.setGroup(r.Context(), r.claims, "", &in, in.Named, r.target)
	if err != nil {
		return err
	}
	return writeMessage(w, r, m)
}

func (g *Gateway) updateEnrollmentGroup(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	var in dppb.UpdateEnrollmentGroup
	if err := readMessage(r, &in); err != nil {
		return err
	}
	m, err := g.setGroup(r.Context(), r.claims, r.vars.name, &in, in.Named, r.target)
	if err != nil {
		return err
	}
	return writeMessage(w, r, m)
}

func (g *Gateway) deleteEnrollmentGroups(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	all, err := r.query.strictFlag("all")
	if err != nil {
		return err
	}
	n, err := g.deletedGroups(r.Context(), r.claims.Owner, r.query["idFilter"], all, r.target)
	if err != nil {
		return err
	}
	return writeJSON(w, r, removed{n})
}

func (g *Gateway) deletedGroups(ctx context.Context, owner hub.Owner, named []string, all bool, target *string) (int64, error) {
	if err := toDelete(all, named...); err != nil {
		return 0, err
	}
	gs, err := g.groupsOf(ctx, owner, &filter{things: named}) // a group's owner never changes
	if err != nil {
		return 0, err
	}
	ids := make([]string, 0, len(gs))
	for _, e := range gs {
		ids = append(ids, e.ID)
	}
	gone, err := g.deps.Enrolments.DeleteGroups(ctx, ids)
	for _, e := range gone {
		*target += " group=" + e.ID
	}
	return int64(len(gone)), err
}

// Hubs. There is one.

func (g *Gateway) hubMessage(owner hub.Owner) *dppb.Hub {
	info := g.deps.HubInfo()
	m := &dppb.Hub{
		Id: g.deps.HubID, HubId: g.deps.HubID, Name: "coaphub", Owner: string(owner),
		Authorization: &dppb.AuthorizationConfig{OwnerClaim: info.OwnerClaim, DeviceIdClaim: info.DeviceIDClaim},
	}
	for _, at := range []string{info.CoAPGateway, info.CoAPGatewayDTLS} {
		if at != "" {
			m.Gateways = append(m.Gateways, at)
		}
	}
	if c := info.DeviceClient; c != nil {
		m.Authorization.Provider = &dppb.AuthorizationProviderConfig{
			Name: c.ProviderName, Authority: c.Authority, ClientId: c.ID, Scopes: c.Scopes, Audience: c.Audience,
		}
	}
	return m
}

func (g *Gateway) hubs(_ context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	var ms []*dppb.Hub
	if g.meansThis(f.things, f.groups) {
		ms = append(ms, g.hubMessage(owner))
	}
	return paged(f, listed(ms, nil), func(m **dppb.Hub) string { return (*m).GetId() }, func(m **dppb.Hub) element { return messageElement{*m} })
}

// meansThis reports whether each of the filters is empty or names this hub.
func (g *Gateway) meansThis(filters ...[]string) bool {
	return !slices.ContainsFunc(filters, func(f []string) bool { return len(f) > 0 && !slices.Contains(f, g.deps.HubID) })
}

func (g *Gateway) getHubs(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	f, err := provisioningFilter(r.query["idFilter"], nil, r.query["hubIdFilter"], nil)
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listHubs, &f, g.hubs)
}

// Enrolments, and the decisions of people.

func (g *Gateway) enrolments(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return paged(f, g.deps.Enrolments.Enrolments(ctx, f.ofEnrolments(owner)),
		func(e *hub.Enrolment) string { return string(e.Device) },
		func(e *hub.Enrolment) element { return messageElement{enrolmentMessage(e)} })
}

func enrolmentMessage(e *hub.Enrolment) *dppb.Enrolment {
	return &dppb.Enrolment{
		DeviceId: string(e.Device), Owner: string(e.Owner), EnrollmentGroupId: e.Group, Method: string(e.By), Proof: e.Proof, PublicKey: e.Key,
		State: string(e.State), WaitsFor: string(e.Waits), DeviceType: e.Type, DecidedBy: e.User, Serial: e.Serial, Problem: e.Problem, CreationDate: nanos(e.Created), ChangeDate: nanos(e.Changed),
	}
}

func (g *Gateway) getEnrolments(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	f, err := provisioningFilter(nil, r.query["deviceIdFilter"], r.query["enrollmentGroupIdFilter"], r.query["stateFilter"])
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listEnrolments, &f, g.enrolments)
}

func (g *Gateway) decideEnrolments(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	var in dppb.DecideEnrolmentsRequest
	if err := readMessage(r, &in); err != nil {
		return err
	}
	m, err := g.decided(r.Context(), r.claims, &in, r.target)
	if err != nil {
		return err
	}
	return writeMessage(w, r, m)
}

func (g *Gateway) decided(ctx context.Context, c hub.Claims, in *dppb.DecideEnrolmentsRequest, target *string) (*dppb.DecideEnrolmentsResponse, error) {
	f, err := provisioningFilter(nil, in.GetDeviceIdFilter(), nil, nil)
	if err != nil {
		return nil, err
	}
	if len(in.GetDeviceIdFilter()) == 0 {
		return nil, hub.NewError(hub.Invalid, "filter-empty", "name the devices that are allowed or refused")
	}
	*target += fmt.Sprintf(" allow=%t", in.GetAllow())
	es, err := g.deps.Enrolments.Decide(ctx, c.Owner, f.ids(), in.GetAllow(), c.Subject)
	m := &dppb.DecideEnrolmentsResponse{}
	for _, e := range es {
		m.DeviceIds = append(m.DeviceIds, string(e.Device))
		if len(m.DeviceIds) <= 16 {
			*target += " device=" + string(e.Device)
		}
	}
	return m, err
}

func (g *Gateway) acceptTerms(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	var in dppb.AcceptTermsRequest
	if err := readMessage(r, &in); err != nil {
		return err
	}
	m, err := g.accepted(r.Context(), r.claims, &in, r.target)
	if err != nil {
		return err
	}
	return writeMessage(w, r, m)
}

func (g *Gateway) accepted(ctx context.Context, c hub.Claims, in *dppb.AcceptTermsRequest, target *string) (*dppb.EnrollmentGroup, error) {
	e, err := g.deps.Enrolments.AcceptTerms(ctx, c.Owner, in.GetEnrollmentGroupId(), in.GetVersion(), c.Subject)
	if err != nil {
		return nil, err
	}
	*target += " group=" + e.ID + " terms=" + strconv.Quote(e.Accepted.Version)
	return g.groupMessage(&e), nil
}

// One-time tokens.

func tokenMessage(t *hub.EnrolmentToken) *dppb.EnrolmentToken {
	return &dppb.EnrolmentToken{
		Id: t.ID, DeviceId: string(t.Device), Owner: string(t.Owner), CreatedBy: t.User, CreationDate: nanos(t.Created), ExpirationDate: nanos(t.Expires),
		UseDate: nanos(t.Used), UsedBy: string(t.UsedBy),
	}
}

func (g *Gateway) tokensOf(ctx context.Context, owner hub.Owner, f *filter) ([]hub.EnrolmentToken, error) {
	ts, err := g.deps.Enrolments.Tokens(ctx, owner)
	return slices.DeleteFunc(ts, func(t hub.EnrolmentToken) bool { return len(f.things) > 0 && !slices.Contains(f.things, t.ID) }), err
}

func (g *Gateway) enrolmentTokens(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return paged(f, listed(g.tokensOf(ctx, owner, f)),
		func(t *hub.EnrolmentToken) string { return t.ID },
		func(t *hub.EnrolmentToken) element { return messageElement{tokenMessage(t)} })
}

func (g *Gateway) getEnrolmentTokens(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	f, err := provisioningFilter(r.query["idFilter"], nil, nil, nil)
	if err != nil {
		return err
	}
	return g.writeList(w, r.simple(), listTokens, &f, g.enrolmentTokens)
}

// createEnrolmentToken answers with the token's text: nobody may keep the answer.
func (g *Gateway) createEnrolmentToken(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	var in dppb.CreateEnrolmentTokenRequest
	if err := readMessage(r, &in); err != nil {
		return err
	}
	m, err := g.newToken(r.Context(), r.claims, &in, r.target)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	return writeMessage(w, r, m)
}

func (g *Gateway) newToken(ctx context.Context, c hub.Claims, in *dppb.CreateEnrolmentTokenRequest, target *string) (*dppb.EnrolmentToken, error) {
	var dev hub.DeviceID
	if in.GetDeviceId() != "" {
		var err error
		if dev, err = hub.ParseDeviceID(in.GetDeviceId()); err != nil {
			return nil, err
		}
	}
	text, t, err := g.deps.Enrolments.NewToken(ctx, c.Owner, dev, time.Duration(in.GetTimeToLive()), c.Subject)
	if err != nil {
		return nil, err
	}
	*target += " token=" + t.ID
	m := tokenMessage(&t)
	m.Token = text
	return m, nil
}

func (g *Gateway) deleteEnrolmentTokens(w http.ResponseWriter, r *request) error {
	if g.deps.Enrolments == nil {
		return errNoRoute
	}
	all, err := r.query.strictFlag("all")
	if err != nil {
		return err
	}
	n, err := g.deletedTokens(r.Context(), r.claims.Owner, r.query["idFilter"], all)
	if err != nil {
		return err
	}
	return writeJSON(w, r, removed{n})
}

func (g *Gateway) deletedTokens(ctx context.Context, owner hub.Owner, ids []string, all bool) (int64, error) {
	if err := toDelete(all, ids...); err != nil {
		return 0, err
	}
	if all {
		ts, err := g.deps.Enrolments.Tokens(ctx, owner)
		if err != nil {
			return 0, err
		}
		for _, t := range ts {
			ids = append(ids, t.ID)
		}
	}
	gone, err := g.deps.Enrolments.DeleteTokens(ctx, owner, ids)
	return int64(len(gone)), err
}
