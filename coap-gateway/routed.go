package coapgateway

import (
	"bytes"
	"context"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// routedPath is where devices reach each other's resources: below it are the device's ID and the resource's href (compat).
const routedPath = "/api/v1/devices"

// routedTree is all that is below routedPath, and routedPath itself.
var routedTree = route{session: true, foreign: true, methods: map[codes.Code]method{
	codes.GET: (*peer).routed, codes.POST: (*peer).routed, codes.DELETE: (*peer).routed,
	codes.Code(hub.MethodFetch): (*peer).routed, codes.Code(hub.MethodPatch): (*peer).routed, codes.Code(hub.MethodIPatch): (*peer).routed,
}}

// routeOf finds who answers a path; the label stands for it in metrics, which are bounded.
func routeOf(path string) (r route, label string, known bool) {
	if r, known = routes[path]; known {
		return r, path, true
	}
	if path == routedPath || strings.HasPrefix(path, routedPath+"/") {
		return routedTree, routedPath, true
	}
	return route{}, "unknown", false
}

// coded is an error that is answered with a code of its own, and no trouble of ours.
type coded struct {
	code codes.Code
	err  error
}

func (e *coded) Error() string { return e.err.Error() }
func (e *coded) Unwrap() error { return e.err }

var (
	errNoResource = hub.NewError(hub.NotFound, "resource-unknown", "the device has no such resource, or nothing is known of it")
	errConditions = &coded{codes.PreconditionFailed, hub.NewError(hub.Precondition, "etag-mismatch", "the resource is not as the condition has it")}
)

// deviceFailed is another device's error.
func deviceFailed(code codes.Code) error {
	return &coded{code, hub.NewError(hub.Precondition, "device-error", "error response from device")}
}

// place is a resource of a device.
type place struct {
	device hub.DeviceID
	href   hub.Href
}

// target is the resource that the request's path leads to.
func target(req *coap.Message) (place, error) {
	var segments []string
	for _, o := range req.Options {
		if o.ID == message.URIPath {
			segments = append(segments, string(o.Value))
		}
	}
	segments = segments[strings.Count(routedPath, "/"):]
	if len(segments) == 0 {
		return place{}, invalid("device-id-missing", "the path has no device ID")
	}
	dev, err := hub.ParseDeviceID(segments[0])
	if err != nil {
		return place{}, err
	}
	for _, s := range segments[1:] {
		if strings.Contains(s, "/") { // it is no separator there (RFC 7252, Section 6.5), and hrefs have none that is not one
			return place{}, invalid("href-invalid", "a segment of the href has a slash in it")
		}
	}
	href, err := hub.ParseHref(strings.Join(segments[1:], "/"))
	return place{dev, href}, err
}

// routed answers a request for another device's resource, or the device's own seen through the hub. A GET is answered from
// the twin; with an interface, as all other methods, it goes to that device as a command.
func (p *peer) routed(ctx context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	to, err := target(req)
	if err != nil {
		return coap.Response{}, err
	}
	reads := req.Code == codes.GET || req.Code == codes.Code(hub.MethodFetch)
	switch mode := p.gw.cfg.DeviceToDevice.Mode; {
	case mode == ModeFull, mode == ModeRead && reads:
	default:
		return coap.Response{}, hub.NewError(hub.Denied, "device-to-device-off", "the hub lets devices not do this with each other")
	}
	q, err := parseQueries(req, hub.Invalid)
	if err != nil {
		return coap.Response{}, err
	}
	if _, never := req.Option(coap.IfNoneMatch); never {
		// RFC 7252, Section 5.10.8.2: it asks for a resource that does not exist, and devices make theirs themselves.
		return coap.Response{}, errConditions
	}
	from := p.sess
	observe, observes := req.Uint(coap.ObserveOption)
	switch {
	case req.Code == codes.GET && observes && observe == 0:
		return p.watch(ctx, req, to)
	case req.Code == codes.GET && (observes && observe == 1 || q.first("if") == ""):
		if observes && observe == 1 {
			p.gw.watches.cancel(from, req.Token)
		}
		r, err := p.twinOf(ctx, to)
		if err == nil && r == nil {
			err = errNoResource
		}
		if err != nil {
			return coap.Response{}, err
		}
		return shown(r, req)
	}
	return coap.Response{}, p.aside(func(ctx context.Context) (coap.Response, error) { return p.command(ctx, from, req, to, q.first("if")) })
}

// aside has the request that is being handled answered by f, beside the connection's goroutine: what it waits for, another
// device, may itself wait for this one. f's context ends with the session. Exhausted if too many of the session wait.
func (p *peer) aside(f func(context.Context) (coap.Response, error)) error {
	s := p.sess
	if s.aside.Add(1) > int32(p.gw.cfg.DeviceToDevice.MaxRequests) {
		s.aside.Add(-1)
		return p.gw.over(errRequests)
	}
	p.later = func(ctx context.Context) (coap.Response, error) {
		defer s.aside.Add(-1)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(s.ctx, cancel)()
		return f(ctx)
	}
	return nil
}

// twinOf reads the twin of a resource: nil if the resource is there and nothing is known of it yet, NotFound if it is not, or
// its device is not one of the owner's.
func (p *peer) twinOf(ctx context.Context, at place) (*hub.Resource, error) {
	dev, err := p.gw.deps.Directory.Device(ctx, p.sess.own.Owner, at.device)
	switch {
	case hub.IsKind(err, hub.NotFound):
		return nil, errNoResource.With("read the twin", err)
	case err != nil:
		return nil, err
	}
	return resourceOf(dev, at.href)
}

// resourceOf is twinOf of a device's picture.
func resourceOf(dev *hub.Device, href hub.Href) (*hub.Resource, error) {
	r, reported := dev.Resources.Get(href)
	_, published := dev.Links.Get(href)
	switch {
	case reported && r.Status != hub.StatusNotFound:
		return r, nil
	case published: // also what was gone and was published again since
		return nil, nil //nolint:nilnil // nothing is known of it
	}
	return nil, errNoResource
}

// shown is how a resource answers a GET from its twin, with the validation and the conditions that the request asks for (RFC
// 7252, Sections 5.10.6.2 and 5.10.8.1).
func shown(r *hub.Resource, req *coap.Message) (coap.Response, error) {
	if code, bad := codeOfStatus[r.Status]; bad {
		return coap.Response{}, deviceFailed(code)
	}
	if !meets(req, r.ETag) {
		return coap.Response{}, errConditions
	}
	for _, e := range coap.ETags(req) {
		if len(e) > 0 && bytes.Equal(e, r.ETag) {
			return coap.Response{Code: codes.Valid, Options: message.Options{{ID: message.ETag, Value: e}}}, nil
		}
	}
	format, ok := fits(req, r.Content.Format)
	if !ok {
		return coap.Response{}, &hub.Error{Kind: hub.NotAcceptable}
	}
	return represented(codes.Content, format, r.Content.Data, r.ETag), nil
}

// represented is an answer with a representation; ETags that CoAP has no room for are left out (RFC 7252, Section 5.10).
func represented(code codes.Code, format int32, body, etag []byte) coap.Response {
	r := coap.Response{Code: code, Payload: body}
	if len(etag) > 0 && len(etag) <= 8 {
		r.Options = coap.AddOption(r.Options, message.ETag, etag)
	}
	if format != hub.FormatNone {
		r.Options = coap.AddUint(r.Options, message.ContentFormat, uint32(format))
	}
	return r
}

// fits returns the format to name for content that is there in one format only, false if the request does not accept it (RFC
// 7252, Section 5.10.4). OCF's CBOR is CBOR.
func fits(req *coap.Message, format int32) (int32, bool) {
	isCBOR := func(f int32) bool { return f == hub.FormatCBOR || f == hub.FormatOCFCBOR }
	want, ok := coap.Accept(req)
	switch {
	case !ok || want == format || format == hub.FormatNone:
		return format, true
	case isCBOR(want) && isCBOR(format):
		return want, true
	}
	return 0, false
}

// conditions are the ETags of If-Match; an empty one stands for any.
func conditions(req *coap.Message) (etags [][]byte) {
	for _, o := range req.Options {
		if o.ID == coap.IfMatch {
			etags = append(etags, o.Value)
		}
	}
	return etags
}

// meets reports whether a resource that exists is what If-Match demands.
func meets(req *coap.Message, etag []byte) bool {
	want := conditions(req)
	for _, e := range want {
		if len(e) == 0 || bytes.Equal(e, etag) {
			return true
		}
	}
	return len(want) == 0
}

// command passes a request on to the device as a command of the session's and waits for its end. When the session ends first,
// the command goes on without it.
func (p *peer) command(ctx context.Context, s *session, req *coap.Message, to place, iface string) (coap.Response, error) {
	o := hub.Order{
		Device: to.device, Href: to.href, Interface: iface, IfMatch: conditions(req), User: *s.user.Load(), Connection: p.conn.Info().ID,
		Content: hub.Content{Format: hub.FormatNone},
	}
	switch req.Code {
	case codes.GET:
		o.Kind, o.ETags = hub.CommandRetrieve, coap.ETags(req)
	case codes.DELETE:
		o.Kind = hub.CommandDelete
	case codes.POST:
		o.Kind = hub.CommandUpdate
		if iface == createInterface {
			o.Kind, o.Interface = hub.CommandCreate, ""
		}
	case codes.Code(hub.MethodFetch):
		o.Kind, o.Method, o.ETags = hub.CommandRetrieve, hub.MethodFetch, coap.ETags(req)
	default: // PATCH and iPATCH
		o.Kind, o.Method = hub.CommandUpdate, uint8(req.Code)
	}
	if req.Code != codes.GET && req.Code != codes.DELETE { // theirs means nothing (RFC 7252, Sections 5.8.1 and 5.8.4)
		o.Content = contentOf(req)
	}
	if o.Kind == hub.CommandRetrieve && len(o.ETags) > hub.MaxCommandTags {
		o.ETags = o.ETags[:hub.MaxCommandTags]
	}
	if err := p.gw.deps.Identities.Reachable(ctx, to.device, s.own.Owner); err != nil {
		return coap.Response{}, err
	}
	out, err := p.gw.deps.Directory.Command(ctx, s.own.Owner, o)
	switch code, _ := hub.Public(err); {
	case err == nil:
		return outcome(req, &out)
	case code == "etag-mismatch":
		return coap.Response{}, errConditions
	case code == "command-expired":
		return coap.Response{}, &coded{codes.ServiceUnavailable, err}
	}
	return coap.Response{}, err
}

// outcome is the answer to a request that went to a device as a command. The device's own error codes reach who asked, but
// for those that would be misunderstood.
func outcome(req *coap.Message, out *hub.Outcome) (coap.Response, error) {
	switch out.End {
	case hub.CommandCancelled:
		return coap.Response{}, &coded{codes.ServiceUnavailable, hub.NewError(hub.Precondition, "command-cancelled", "the command was cancelled")}
	case hub.CommandUnavailable, hub.CommandExpired:
		return coap.Response{}, &coded{codes.ServiceUnavailable, hub.NewError(hub.Unavailable, "command-unavailable",
			"the device gave no answer; it may have carried out the command")}
	case hub.CommandCompleted:
	}
	var code codes.Code
	switch out.Status {
	case hub.StatusOK:
		code = codeOfKind[out.Kind]
	case hub.StatusCreated:
		code = codes.Created
	case hub.StatusNotModified, hub.StatusAccepted:
		return represented(codes.Valid, hub.FormatNone, nil, out.ETag), nil
	default:
		return coap.Response{}, deviceFailed(errorCode(out))
	}
	format, ok := fits(req, out.Content.Format)
	switch {
	case !ok && out.Kind == hub.CommandRetrieve:
		return coap.Response{}, &hub.Error{Kind: hub.NotAcceptable}
	case !ok: // it was carried out; its answer can do without a representation
		return coap.Response{Code: code}, nil
	}
	return represented(code, format, out.Content.Data, out.ETag), nil
}

// errorCode is the code of a device's error for another device.
func errorCode(out *hub.Outcome) codes.Code {
	switch code := codes.Code(out.Code); code {
	case codes.Unauthorized: // it would cost who asked its own credentials
		return codes.Forbidden
	case codes.RequestEntityIncomplete, codes.PreconditionFailed: // iotivity-lite takes them for success
		return codes.BadRequest
	case codes.TooManyRequests: // likewise
		return codes.ServiceUnavailable
	default:
		if class := code >> 5; class == 4 || class == 5 {
			return code
		}
	}
	if code, bad := codeOfStatus[out.Status]; bad {
		return code
	}
	return codes.BadGateway
}

// codeOfKind is the code of a command that was carried out.
var codeOfKind = map[hub.CommandKind]codes.Code{
	hub.CommandCreate: codes.Created, hub.CommandRetrieve: codes.Content, hub.CommandUpdate: codes.Changed, hub.CommandDelete: codes.Deleted,
}

// codeOfStatus is the code of a device's error of which only the status is known. 5.02 says that the device's answer could not
// be used (RFC 7252, Section 5.9.3.3).
var codeOfStatus = map[hub.Status]codes.Code{
	hub.StatusBadRequest: codes.BadRequest, hub.StatusUnauthorized: codes.Forbidden, hub.StatusForbidden: codes.Forbidden,
	hub.StatusNotFound: codes.NotFound, hub.StatusMethodNotAllowed: codes.MethodNotAllowed, hub.StatusNotImplemented: codes.NotImplemented,
	hub.StatusUnavailable: codes.ServiceUnavailable, hub.StatusError: codes.BadGateway, hub.StatusCanceled: codes.ServiceUnavailable,
}
