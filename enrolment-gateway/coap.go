package enrolmentgateway

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// maxBody bounds a request's body. The authority takes signing requests of 16 KiB.
const maxBody = 24 << 10

// tokenPath is where one-time tokens are good, over HTTP and CoAP alike.
const tokenPath = "/api/v1/enrolment"

// peer is one connection.
type peer struct {
	gw    *Gateway
	log   *slog.Logger
	proof hub.EnrolmentProof // what its handshake has shown
	idle  *time.Timer        // ends the connection
	codes int                // how often it was told how to sign up
	leave func()             // has another one of its network let in
}

var errIdle = errors.New("the device has asked for nothing for a while")

// Open implements coap.Handler.
func (g *Gateway) Open(c *coap.Conn) (coap.ConnHandler, error) {
	info := c.Info()
	leave := g.crowd.enter(info.Remote)
	if leave == nil {
		return nil, errCrowded
	}
	p := &peer{leave: leave, gw: g, log: g.log.With("remote", info.Remote.String())}
	// A device that answers pings is not silent for the engine, however little it wants.
	p.idle = time.AfterFunc(idleTime, func() { c.Close(errIdle) })
	switch {
	case info.Peer.PSKIdentity != nil:
		p.proof.PSK, _ = hub.ParseDeviceID(string(info.Peer.PSKIdentity)) // or it would have no key
	case info.TLS != nil:
		p.proof.Chain = info.TLS.PeerCertificates
	default:
		p.proof.Chain = info.Peer.Chain
	}
	return p, nil
}

// Notifications implements coap.ConnHandler; nothing is observed.
func (*peer) Notifications(context.Context, []coap.Notification) {}

// Closed implements coap.ConnHandler.
func (p *peer) Closed(error) { p.idle.Stop(); p.leave() }

// resource is what there is at a path.
type resource struct {
	code   codes.Code // the method
	format []int32    // of answers, the first one is the default
	do     func(p *peer, ctx context.Context, req *coap.Message, format int32) (codes.Code, []byte, error)
	plgd   bool // as other hubs have it
}

var resources = map[string]resource{
	est.Path + "crts": {codes.GET, []int32{hub.FormatCertsOnly, hub.FormatCert}, (*peer).anchors, false},
	est.Path + "sen":  {codes.POST, []int32{hub.FormatCertsOnly, hub.FormatCert}, (*peer).enrol, false},
	est.Path + "sren": {codes.POST, []int32{hub.FormatCertsOnly, hub.FormatCert}, (*peer).renew, false},
	est.Path + "att":  {codes.GET, []int32{hub.FormatCSRAttributes}, (*peer).attributes, false},
	tokenPath:         {codes.POST, []int32{hub.FormatCBOR, hub.FormatOCFCBOR}, (*peer).enrolByToken, false},

	timePath:                                 provisioned(hub.StepTime, codes.GET, codes.Content, (*step).hubTime),
	provisioningPath + "ownership":           provisioned(hub.StepOwnership, codes.GET, codes.Content, (*step).ownership),
	provisioningPath + "credentials":         provisioned(hub.StepCredentials, codes.POST, codes.Changed, (*step).credentials),
	provisioningPath + "acls":                provisioned(hub.StepACLs, codes.GET, codes.Content, (*step).acls),
	provisioningPath + "cloud-configuration": provisioned(hub.StepCloud, codes.POST, codes.Changed, (*step).cloudConfiguration),
}

var errPath = hub.NewError(hub.NotFound, "path-unknown", "there is nothing at this path")

// Request implements coap.ConnHandler.
func (p *peer) Request(ctx context.Context, req *coap.Message) coap.Response {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	p.idle.Reset(idleTime)
	path := coap.Path(req)
	var resp coap.Response
	var err error
	r, known := resources[path]
	operation := strings.TrimPrefix(strings.TrimPrefix(path, est.Path), provisioningPath)
	switch {
	case path == "/.well-known/core" && req.Code == codes.GET:
		operation = "core"
		resp, err = discovery(req)
	case !known:
		operation, err = "unknown", errPath
	case req.Code != r.code && r.plgd: // other hubs answer 4.03
		err = hub.NewError(hub.Denied, "provisioning-method", "this step has another method")
	case req.Code != r.code:
		err = &hub.Error{Kind: hub.MethodNotAllowed}
	default:
		resp, err = p.answer(ctx, r, req)
	}
	if err != nil {
		resp = coap.Failure(coap.CodeOf(hub.KindOf(err)), err)
		level := slog.LevelInfo
		if resp.Code == codes.ServiceUnavailable {
			level = slog.LevelWarn
		}
		p.log.Log(ctx, level, "a device was refused what it asked for", "path", path, "error", err)
	}
	p.gw.count("coap", operation, coap.Dotted(resp.Code))
	return resp
}

func (p *peer) answer(ctx context.Context, r resource, req *coap.Message) (coap.Response, error) {
	format, err := coap.Acceptable(req, r.format...)
	if err != nil {
		return coap.Response{}, err
	}
	code, body, err := r.do(p, ctx, req, format)
	if err != nil {
		return coap.Response{}, err
	}
	resp := coap.Response{Code: code, Options: coap.AddUint(nil, message.ContentFormat, uint32(format)), Payload: body}
	if r.plgd {
		resp = freshly(resp)
	}
	return resp, nil
}

// links are the resources for discovery (RFC 9148, Section 5.1).
var links = []coap.Link{
	{Href: est.Path + "crts", Type: "ace.est.crts", Formats: "281 287"},
	{Href: est.Path + "sen", Type: "ace.est.sen", Formats: "281 287"},
	{Href: est.Path + "sren", Type: "ace.est.sren", Formats: "281 287"},
	{Href: est.Path + "att", Type: "ace.est.att", Formats: "285"},
	{Href: tokenPath, Formats: "60"},
}

func discovery(req *coap.Message) (coap.Response, error) {
	queries := map[string][]string{}
	for _, q := range coap.Queries(req) {
		name, value, _ := strings.Cut(q, "=")
		queries[name] = append(queries[name], value)
	}
	return coap.Links(req, queries, links)
}

func (p *peer) anchors(_ context.Context, _ *coap.Message, format int32) (codes.Code, []byte, error) {
	body, err := est.Anchors(p.gw.deps.Authority, format)
	return codes.Content, body, err
}

func (*peer) attributes(context.Context, *coap.Message, int32) (codes.Code, []byte, error) {
	return codes.Content, est.Attributes, nil
}

func (p *peer) enrol(ctx context.Context, req *coap.Message, format int32) (codes.Code, []byte, error) {
	return p.certificate(ctx, req, format, false)
}

func (p *peer) renew(ctx context.Context, req *coap.Message, format int32) (codes.Code, []byte, error) {
	return p.certificate(ctx, req, format, true)
}

func (p *peer) certificate(ctx context.Context, req *coap.Message, format int32, renew bool) (codes.Code, []byte, error) {
	if f, ok := coap.ContentFormat(req); ok && f != hub.FormatCSR {
		return 0, nil, hub.NewError(hub.Unsupported, "format-unsupported", "the body must be application/pkcs10 (286)")
	}
	out, err := p.gw.deps.Authority.Enrol(ctx, p.proof, req.Payload, renew)
	if err != nil {
		return 0, nil, err
	}
	p.gw.enrolled(ctx, p.log, out)
	body, err := est.Certificate(out, format)
	return codes.Changed, body, err
}

func (g *Gateway) enrolled(ctx context.Context, log *slog.Logger, out hub.Enrolled) {
	log.InfoContext(ctx, "device enrolled", "device", out.Device, "serial", out.Serial)
}

// tokenRequest is the body of an enrolment with a one-time token, CBOR or JSON.
type tokenRequest struct {
	Token string `cbor:"token" json:"token"`
	CSR   string `cbor:"csr" json:"csr"` // PEM
}

// tokenAnswer is the answer. Certificates are PEM.
type tokenAnswer struct {
	Device string `cbor:"deviceId" json:"deviceId"`
	Chain  string `cbor:"certificate" json:"certificate"` // the device's certificate, and the one that issued it
	CA     string `cbor:"ca" json:"ca"`                   // whom to trust
}

var decoding = func() cbor.DecMode {
	m, err := cbor.DecOptions{MaxNestedLevels: 4, MaxMapPairs: 16, MaxArrayElements: 16}.DecMode()
	if err != nil {
		panic(err) // constants
	}
	return m
}()

var errTokenBody = hub.NewError(hub.Invalid, "body-invalid", "the body must be a map with the texts token and csr, the latter PEM")

func (p *peer) enrolByToken(ctx context.Context, req *coap.Message, _ int32) (codes.Code, []byte, error) {
	if f, ok := coap.ContentFormat(req); ok && f != hub.FormatCBOR && f != hub.FormatOCFCBOR {
		return 0, nil, hub.NewError(hub.Unsupported, "format-unsupported", "the body must be application/cbor (60)")
	}
	var q tokenRequest
	if err := decoding.Unmarshal(req.Payload, &q); err != nil || q.Token == "" || q.CSR == "" {
		return 0, nil, errTokenBody.With("decode", err)
	}
	answer, err := p.gw.byToken(ctx, p.log, q)
	if err != nil {
		return 0, nil, err
	}
	body, err := cbor.Marshal(answer)
	return codes.Changed, body, err
}

func (g *Gateway) byToken(ctx context.Context, log *slog.Logger, q tokenRequest) (tokenAnswer, error) {
	out, err := g.deps.Authority.Enrol(ctx, hub.EnrolmentProof{Token: q.Token}, []byte(q.CSR), false)
	if err != nil {
		return tokenAnswer{}, err
	}
	g.enrolled(ctx, log, out)
	return tokenAnswer{Device: string(out.Device), CA: est.PEM(est.Roots(g.deps.Authority)...), Chain: est.PEM(out.Chain...)}, nil
}
