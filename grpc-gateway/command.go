package grpcgateway

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// order carries out what the caller wants of a device. device and href are as they came. Devices that are unknown, foreign or
// named by no UUID are all alike.
func (g *Gateway) order(ctx context.Context, c hub.Claims, device, href string, o hub.Order) (hub.Outcome, error) {
	id, err := hub.ParseDeviceID(device)
	switch {
	case device == "":
		return hub.Outcome{}, invalid("device-id-missing", "the request names no device")
	case err != nil:
		return hub.Outcome{}, errNotYours
	}
	o.Device, o.User = id, c.Subject
	if !o.Kind.OfTwin() {
		if o.Href, err = hub.ParseHref(href); err != nil {
			return hub.Outcome{}, err
		}
	}
	var unfit error
	if o.Kind == hub.CommandCreate || o.Kind == hub.CommandUpdate {
		var twin *hub.Resource
		known := false
		for d, err := range g.deps.Directory.Devices(ctx, c.Owner, []hub.DeviceID{id}) {
			if err != nil {
				return hub.Outcome{}, err
			}
			known = true
			if r, ok := d.Resources.Get(o.Href); ok {
				twin = r
			} else if _, ok := d.Links.Get(o.Href); ok && mediaType(o.Content) == mediaJSON {
				twin = &hub.Resource{} // published and not reported yet: OCF devices take CBOR
			}
		}
		if !known {
			return hub.Outcome{}, errNotYours
		}
		if o.Key != "" {
			o.Asked = o.Content
		}
		if o.Content, unfit = convert(o.Content, twin); unfit != nil {
			if o.Repeat = len(o.Asked.Data) > 0; !o.Repeat { // what was carried out before had what the resource took then
				return hub.Outcome{}, unfit
			}
		}
	} else {
		o.Content = hub.Content{Format: hub.FormatNone}
	}
	if !o.Async {
		if err := waits(ctx); err != nil {
			return hub.Outcome{}, err
		}
	}
	if !o.Kind.OfTwin() { // which the hub carries out by itself
		if err := g.deps.Identities.Reachable(ctx, o.Device, c.Owner); err != nil {
			return hub.Outcome{}, err
		}
	}
	out, err := g.deps.Directory.Command(ctx, c.Owner, o)
	if o.Repeat && hub.IsKind(err, hub.NotFound) {
		err = unfit
	}
	if err != nil || o.Async {
		return out, err
	}
	switch out.Status {
	case hub.StatusOK, hub.StatusAccepted, hub.StatusCreated, hub.StatusNotModified:
		return out, nil
	default:
		return out, &deviceError{outcomeElement{out, g.deps.HubID}}
	}
}

// deviceError is a command that did not end well. Outsiders get its event with it.
type deviceError struct{ outcomeElement }

// Error implements error.
func (e *deviceError) Error() string { return e.hubError().Error() }

// Unwrap gives the error its kind.
func (e *deviceError) Unwrap() error { return e.hubError() }

func (e *deviceError) hubError() *hub.Error {
	switch e.End {
	case hub.CommandCancelled:
		return hub.NewError(hub.Precondition, "command-cancelled", "the command was cancelled")
	case hub.CommandUnavailable:
		return hub.NewError(hub.Unavailable, "command-unavailable", "the device gave no answer; it may have carried out the command")
	case hub.CommandCompleted, hub.CommandExpired:
	}
	switch e.Code {
	case codeBadOption:
		if e.Status == hub.StatusNotImplemented {
			return hub.NewError(hub.Unsupported, "condition-unsupported", "the device knows no conditions, and has not carried out the command")
		}
	case codePreconditionFailed:
		return hub.NewError(hub.Precondition, "device-condition", "the device does not fulfil the condition, and has not carried out the command")
	}
	err := hub.NewError(hub.Precondition, "device-error", "error response from device")
	if k, ok := kindOfStatus[e.Status]; ok {
		err.Kind = k
	}
	return err
}

// kindOfStatus is what a device's answer means; others have codes of their own, see codeOfError.
var kindOfStatus = map[hub.Status]hub.Kind{
	hub.StatusBadRequest: hub.Invalid, hub.StatusUnauthorized: hub.Unauthenticated, hub.StatusForbidden: hub.Denied,
	hub.StatusNotFound: hub.NotFound, hub.StatusMethodNotAllowed: hub.MethodNotAllowed, hub.StatusUnavailable: hub.Unavailable,
	hub.StatusNotImplemented: hub.Unsupported,
}

// codeMethodNotAllowed is the code that other hubs have for a device's 4.05.
const codeMethodNotAllowed codes.Code = 4097

// Codes of CoAP by which a device says more than its status does (RFC 7252, Sections 5.9.2.3 and 5.9.2.9).
const (
	codeBadOption          = 0x82 // 4.02
	codePreconditionFailed = 0x8c // 4.12
)

// codes are those of gRPC and HTTP that the error's kind alone does not give; ok is false if it does.
func (e *deviceError) codes() (code codes.Code, status int, ok bool) {
	switch {
	case e.End == hub.CommandCancelled, e.Status == hub.StatusUnknown:
		return codes.Unknown, http.StatusInternalServerError, true
	case e.Status == hub.StatusMethodNotAllowed:
		return codeMethodNotAllowed, http.StatusMethodNotAllowed, true
	case e.Code == codePreconditionFailed:
		return codes.FailedPrecondition, http.StatusPreconditionFailed, true
	case e.Status == hub.StatusError:
		return codes.Internal, http.StatusInternalServerError, true
	}
	return 0, 0, false
}

// appendDetail appends the event as a detail of an error.
func (e *deviceError) appendDetail(b []byte, asProto bool) []byte {
	m := e.event()
	name := string(m.ProtoReflect().Descriptor().FullName())
	if !asProto {
		return e.appendEvent(b, `"@type":"type.googleapis.com/`+name+`"`)
	}
	detail, err := anypb.New(m)
	if err == nil {
		if out, err := appendMessage(b, detail); err == nil {
			return out
		}
	}
	return append(b, "{}"...)
}

// outcomeElement is how a command ended: an answer, an event, or the detail of an error.
type outcomeElement struct {
	hub.Outcome
	hubID string
}

func (e outcomeElement) meta() metadataUpdated {
	m := metadataUpdated{device: e.Device, cause: e.Cause, hubID: e.hubID, canceled: e.End != hub.CommandCompleted}
	if e.Metadata != nil {
		m.meta = *e.Metadata
	}
	return m
}

// event is the event's message.
func (e outcomeElement) event() proto.Message {
	audit, meta := causeMessages(e.Cause, e.hubID)
	id := &rapb.ResourceId{DeviceId: string(e.Device), Href: string(e.Href)}
	status, content := rapb.Status(e.Status), contentMessage(e.Content)
	switch e.Kind {
	case hub.CommandCreate:
		return &rapb.ResourceCreated{ResourceId: id, Status: status, Content: content, AuditContext: audit, EventMetadata: meta, ResourceTypes: e.Types}
	case hub.CommandRetrieve:
		return &rapb.ResourceRetrieved{
			ResourceId: id, Status: status, Content: content, AuditContext: audit, EventMetadata: meta, Etag: e.ETag, ResourceTypes: e.Types,
		}
	case hub.CommandUpdate:
		return &rapb.ResourceUpdated{ResourceId: id, Status: status, Content: content, AuditContext: audit, EventMetadata: meta, ResourceTypes: e.Types}
	case hub.CommandDelete:
		return &rapb.ResourceDeleted{ResourceId: id, Status: status, Content: content, AuditContext: audit, EventMetadata: meta, ResourceTypes: e.Types}
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	return e.meta().event("")
}

// appendEvent appends the event in the simple form. first is what the object begins with, after its brace.
func (e outcomeElement) appendEvent(b []byte, first string) []byte {
	if e.Kind.OfTwin() {
		j := e.meta().appendJSON(nil, "")
		if first != "" {
			first += ","
		}
		return append(append(append(b, '{'), first...), j[1:]...)
	}
	b = append(append(b, '{'), first...)
	if first != "" {
		b = append(b, ',')
	}
	c := changed{device: e.Device, href: e.Href, types: e.Types, status: e.Status, content: e.Content, cause: e.Cause, hubID: e.hubID}
	if e.Kind == hub.CommandRetrieve {
		c.etag = e.ETag
	}
	return append(b, c.appendJSON(nil)[1:]...)
}

// response is the whole answer. The outcome of an asynchronous command is not known, so it has no data.
type response struct {
	outcomeElement
	kind hub.CommandKind
}

func (r response) message(string) proto.Message {
	var data proto.Message
	if r.End != 0 {
		data = r.event()
	}
	switch r.kind {
	case hub.CommandCreate:
		d, _ := data.(*rapb.ResourceCreated)
		return &pb.CreateResourceResponse{Data: d}
	case hub.CommandRetrieve:
		d, _ := data.(*rapb.ResourceRetrieved)
		return &pb.GetResourceFromDeviceResponse{Data: d}
	case hub.CommandUpdate:
		d, _ := data.(*rapb.ResourceUpdated)
		return &pb.UpdateResourceResponse{Data: d}
	case hub.CommandDelete:
		d, _ := data.(*rapb.ResourceDeleted)
		return &pb.DeleteResourceResponse{Data: d}
	case hub.CommandTwinOn, hub.CommandTwinOff, hub.CommandTwinSync:
	}
	d, _ := data.(*rapb.DeviceMetadataUpdated)
	return &pb.UpdateDeviceMetadataResponse{Data: d}
}

func (r response) appendJSON(b []byte, _ string) []byte {
	b = append(b, '{')
	if r.End != 0 {
		b = r.appendEvent(appendName(b, "data"), "")
	}
	return append(b, '}')
}

// ttl reads a time to live in nanoseconds. Below zero it is wrong, and whoever says so must not get the default.
func ttl(ns int64) (time.Duration, error) {
	if ns < 0 {
		return 0, hub.NewError(hub.Invalid, "time-to-live-invalid", "timeToLive is between 100 ms and a year, in nanoseconds")
	}
	return time.Duration(ns), nil
}

// caller is where a gRPC call comes from, as events show it.
func caller(ctx context.Context) string {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		return p.Addr.String()
	}
	return ""
}

// call carries out a command of the service.
func (s *server) call(ctx context.Context, id *rapb.ResourceId, ns int64, o hub.Order) (proto.Message, error) {
	var err error
	if o.TTL, err = ttl(ns); err != nil {
		return nil, err
	}
	o.Connection = caller(ctx)
	out, err := s.g.order(ctx, claimsOf(ctx), id.GetDeviceId(), id.GetHref(), o)
	if err != nil {
		return nil, err
	}
	return response{outcomeElement{out, s.g.deps.HubID}, o.Kind}.message(""), nil
}

func (s *server) GetResourceFromDevice(ctx context.Context, r *pb.GetResourceFromDeviceRequest) (*pb.GetResourceFromDeviceResponse, error) {
	m, err := s.call(ctx, r.GetResourceId(), r.GetTimeToLive(), hub.Order{
		Kind: hub.CommandRetrieve, Interface: r.GetResourceInterface(), ETags: r.GetEtag(), Async: r.GetAsync(), Key: r.GetIdempotencyKey(),
	})
	out, _ := m.(*pb.GetResourceFromDeviceResponse)
	return out, err
}

func (s *server) UpdateResource(ctx context.Context, r *pb.UpdateResourceRequest) (*pb.UpdateResourceResponse, error) {
	m, err := s.call(ctx, r.GetResourceId(), r.GetTimeToLive(), hub.Order{
		Kind: hub.CommandUpdate, Interface: r.GetResourceInterface(), Content: contentOf(r.GetContent()), Force: r.GetForce(),
		Async: r.GetAsync(), Key: r.GetIdempotencyKey(), Supersede: r.GetSupersede(),
		IfMatch: r.GetIfMatch(), ForwardIfMatch: r.GetForwardIfMatch(),
	})
	out, _ := m.(*pb.UpdateResourceResponse)
	return out, err
}

func (s *server) CreateResource(ctx context.Context, r *pb.CreateResourceRequest) (*pb.CreateResourceResponse, error) {
	m, err := s.call(ctx, r.GetResourceId(), r.GetTimeToLive(), hub.Order{
		Kind: hub.CommandCreate, Content: contentOf(r.GetContent()), Force: r.GetForce(), Async: r.GetAsync(), Key: r.GetIdempotencyKey(),
		IfMatch: r.GetIfMatch(), ForwardIfMatch: r.GetForwardIfMatch(),
	})
	out, _ := m.(*pb.CreateResourceResponse)
	return out, err
}

func (s *server) DeleteResource(ctx context.Context, r *pb.DeleteResourceRequest) (*pb.DeleteResourceResponse, error) {
	m, err := s.call(ctx, r.GetResourceId(), r.GetTimeToLive(), hub.Order{
		Kind: hub.CommandDelete, Interface: r.GetResourceInterface(), Force: r.GetForce(), Async: r.GetAsync(), Key: r.GetIdempotencyKey(),
		IfMatch: r.GetIfMatch(), ForwardIfMatch: r.GetForwardIfMatch(),
	})
	out, _ := m.(*pb.DeleteResourceResponse)
	return out, err
}

func (s *server) UpdateDeviceMetadata(ctx context.Context, r *pb.UpdateDeviceMetadataRequest) (*pb.UpdateDeviceMetadataResponse, error) {
	kind := hub.CommandTwinOff // as proto3 has it: what is not said is false
	switch {
	case r.GetTwinForceSynchronization():
		kind = hub.CommandTwinSync
	case r.GetTwinEnabled():
		kind = hub.CommandTwinOn
	}
	id := &rapb.ResourceId{DeviceId: r.GetDeviceId()}
	m, err := s.call(ctx, id, r.GetTimeToLive(), hub.Order{Kind: kind, Key: r.GetIdempotencyKey()})
	out, _ := m.(*pb.UpdateDeviceMetadataResponse)
	return out, err
}

// contentOf is a content as the API takes it.
func contentOf(c *pb.Content) hub.Content {
	return hub.Content{Type: c.GetContentType(), Format: hub.FormatNone, Data: c.GetData()}
}

// maxTag bounds an entity tag in a condition.
const maxTag = 512

// command reads what all commands over HTTP have in common.
func (r *request) command(kind hub.CommandKind) (hub.Order, error) {
	ns, err := r.query.nanos("timeToLive")
	if err != nil {
		return hub.Order{}, err
	}
	o := hub.Order{
		Kind: kind, Interface: r.query.get("resourceInterface"), Force: r.query.flag("force", false), Async: r.query.flag("async", false),
		Key: r.query.get("idempotencyKey"), Connection: r.RemoteAddr,
	}
	if k := r.Header.Get("Idempotency-Key"); k != "" {
		o.Key = k
	}
	if o.Supersede, err = r.query.strictFlag("supersede"); err != nil {
		return o, err
	}
	if o.ForwardIfMatch, err = r.query.strictFlag("forwardIfMatch"); err != nil {
		return o, err
	}
	if o.TTL, err = ttl(ns); err != nil {
		return o, err
	}
	return o, r.condition(&o)
}

// condition reads If-Match (RFC 9110, Section 13.1.1). It takes the weak tags that answers carry, although only strong ones
// would be right for it: contents of devices have no others.
func (r *request) condition(o *hub.Order) error {
	bad := invalid("etag-invalid", "If-Match is no list of entity tags as answers carry them")
	for _, h := range r.Header.Values("If-Match") {
		for part := range strings.SplitSeq(h, ",") { // our tags have no comma in them
			part = strings.TrimSpace(part)
			if part == "*" {
				o.IfMatch = append(o.IfMatch, nil)
				continue
			}
			part = strings.TrimPrefix(part, "W/")
			if len(part) < 2 || len(part) > maxTag || part[0] != '"' || part[len(part)-1] != '"' {
				return bad
			}
			part = part[1 : len(part)-1]
			if seq, ok := strings.CutPrefix(part, "@"); ok {
				n, err := strconv.ParseUint(seq, 10, 64)
				if err != nil {
					return bad
				}
				o.IfSeq = append(o.IfSeq, n)
				continue
			}
			// What is no base64 is no tag of ours, and matches nothing.
			tag, err := base64.StdEncoding.DecodeString(part)
			if err != nil || len(tag) == 0 {
				tag = []byte(part + " is not ours")
			}
			o.IfMatch = append(o.IfMatch, tag)
		}
	}
	return nil
}

// content reads a content: protobuf's message in JSON, CBOR if the header says so, and JSON whatever else it says, as on other
// hubs. With the first the answer comes in protobuf's JSON too.
func (r *request) content() (hub.Content, error) {
	media, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	r.proto = r.proto || media == "application/protojson"
	b, err := r.body()
	if err != nil {
		return hub.Content{}, err
	}
	switch media {
	case "application/protojson":
		var m pb.Content
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &m); err != nil {
			return hub.Content{}, hub.NewError(hub.Invalid, "body-invalid", "the body is no Content in protobuf's JSON").With("http.content", err)
		}
		return contentOf(&m), nil
	case cborType, mediaOCFCBOR:
		return hub.Content{Type: media, Format: hub.FormatNone, Data: b}, nil
	}
	return hub.Content{Type: mediaJSON, Format: hub.FormatNone, Data: b}, nil
}

// carryOut gives the order and answers.
func (g *Gateway) carryOut(w http.ResponseWriter, r *request, o hub.Order, onlyContent bool) error {
	out, err := g.order(r.Context(), r.claims, r.vars.device, string(r.vars.href), o)
	if err != nil {
		return err
	}
	if o.Kind == hub.CommandRetrieve && len(out.ETag) > 0 {
		w.Header().Set("ETag", entityTag(&hub.Resource{ETag: out.ETag}))
	}
	switch {
	case out.Status == hub.StatusNotModified:
		w.WriteHeader(http.StatusNotModified)
		return nil
	case o.Async: // without an ETag: that it was accepted is no representation of the resource
		b, err := appendElement(nil, r, response{kind: o.Kind}, "")
		if err != nil {
			return err
		}
		return writeBody(w, r, r.contentType(), append(b, '\n'))
	case onlyContent:
		return writeContent(w, r, out.Content)
	}
	return writeOne(w, r, response{outcomeElement{out, g.deps.HubID}, o.Kind})
}

// readDevice reads a resource from its device.
func (g *Gateway) readDevice(w http.ResponseWriter, r *request) error {
	o, err := r.command(hub.CommandRetrieve)
	if err != nil {
		return err
	}
	o.Force = false
	o.ETags = r.query.etags(r.Header.Get("ETag"))
	return g.carryOut(w, r, o, r.query.flag("onlyContent", false))
}

func (g *Gateway) updateResource(w http.ResponseWriter, r *request) error {
	content, err := r.content() // first: it says in which form to answer
	if err != nil {
		return err
	}
	o, err := r.command(hub.CommandUpdate)
	if err != nil {
		return err
	}
	o.Content = content
	return g.carryOut(w, r, o, r.query.flag("onlyContent", false))
}

func (g *Gateway) createResource(w http.ResponseWriter, r *request) error {
	content, err := r.content()
	if err != nil {
		return err
	}
	o, err := r.command(hub.CommandCreate)
	if err != nil {
		return err
	}
	o.Content, o.Interface = content, ""
	return g.carryOut(w, r, o, false)
}

func (g *Gateway) deleteResource(w http.ResponseWriter, r *request) error {
	o, err := r.command(hub.CommandDelete)
	if err != nil {
		return err
	}
	return g.carryOut(w, r, o, false)
}

// updateMetadata switches the twin. A body that says nothing must not switch it off.
func (g *Gateway) updateMetadata(w http.ResponseWriter, r *request) error {
	b, err := r.document()
	if err != nil {
		return err
	}
	var said map[string]json.RawMessage
	var m pb.UpdateDeviceMetadataRequest
	if len(b) > 0 {
		err = json.Unmarshal(b, &said)
		if err == nil {
			err = (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, &m)
		}
		if err != nil {
			return hub.NewError(hub.Invalid, "body-invalid", "the body is no UpdateDeviceMetadataRequest in JSON").With("http.metadata", err)
		}
	}
	o, err := r.command(hub.CommandTwinOff)
	if err != nil {
		return err
	}
	o.Async, o.IfMatch, o.IfSeq, o.ForwardIfMatch, o.Interface = false, nil, nil, false, ""
	if m.GetTimeToLive() != 0 {
		if o.TTL, err = ttl(m.GetTimeToLive()); err != nil {
			return err
		}
	}
	if k := m.GetIdempotencyKey(); k != "" {
		o.Key = k
	}
	_, camel := said["twinEnabled"]
	_, snake := said["twin_enabled"]
	switch {
	case m.GetTwinForceSynchronization():
		o.Kind = hub.CommandTwinSync
	case m.GetTwinEnabled():
		o.Kind = hub.CommandTwinOn
	case !camel && !snake:
		return invalid("metadata-empty", "the body says neither twinEnabled nor twinForceSynchronization")
	}
	return g.carryOut(w, r, o, false)
}
