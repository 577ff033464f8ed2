package enrolmentgateway

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
)

// plgd's device provisioning: a device that shows its factory certificate gets, step by step, all that makes it a device of an
// owner at this hub. iotivity-lite asks for the time, its owner, where to sign up, its credentials, and its access control list, in
// this order, and is strict about what the answers hold.

// provisioningPath is where its steps are. timePath is the coap-gateway's, too.
const (
	provisioningPath = "/api/v1/provisioning/"
	timePath         = "/x.plgd.dev/time"
)

// ours are the formats of its answers.
var ours = []int32{hub.FormatOCFCBOR, hub.FormatCBOR, hub.FormatJSON}

// provisioningTag is on all that a device gets here: iotivity-lite finds by it what it has to replace the next time.
const provisioningTag = "dps"

// maxCodes bounds how often a device may be told on one connection how to sign up, since each time costs a code.
const maxCodes = 8

// step is a request of device provisioning that is being answered.
type step struct {
	*peer
	req  *coap.Message
	to   hub.Applicant
	done hub.Provisioned // what is kept of it
}

// provisioned makes a resource of a step. Whatever comes of it is recorded, once it is known who comes.
func provisioned(name hub.ProvisioningStep, method, code codes.Code, do func(*step, context.Context) (any, error)) resource {
	answer := func(p *peer, ctx context.Context, req *coap.Message, format int32) (codes.Code, []byte, error) {
		s := &step{peer: p, req: req, done: hub.Provisioned{Step: name, Code: uint8(code)}}
		var err error
		s.to, err = p.gw.deps.Authority.Applicant(ctx, p.proof.Chain)
		if err != nil && name != hub.StepTime { // which is no secret
			return 0, nil, err
		}
		known := err == nil
		body, err := do(s, ctx)
		if err != nil {
			s.done.Code = uint8(coap.CodeOf(hub.KindOf(err)))
			s.done.Problem, _ = hub.Public(err)
		}
		if known {
			// A device does not wait for its record, nor does it fail with it.
			if kept := p.gw.deps.Authority.Provisioned(context.WithoutCancel(ctx), p.proof.Chain, s.to, s.done); kept != nil {
				p.log.WarnContext(ctx, "a step of provisioning is not recorded", "step", name, "device", s.done.Device, "error", kept)
			}
		}
		if err != nil {
			return 0, nil, err
		}
		var b []byte
		if format == hub.FormatJSON {
			b, err = json.Marshal(body)
		} else {
			b, err = cbor.Marshal(body)
		}
		return code, b, err
	}
	return resource{method, ours, answer, true}
}

// hubTime is for devices without a clock: they need one to see which certificates are good.
func (*step) hubTime(context.Context) (any, error) {
	return struct {
		Time string `cbor:"time" json:"time"`
	}{time.Now().UTC().Format(time.RFC3339Nano)}, nil
}

// ownership is who owns the device; iotivity-lite takes no other member (oic.r.doxm).
func (s *step) ownership(context.Context) (any, error) {
	return struct {
		Owner string `cbor:"devowneruuid" json:"devowneruuid"`
	}{s.to.Owner.UUID()}, nil
}

// gateway is a way to a hub, and that hub's ID.
type gateway struct {
	ID  string `cbor:"id" json:"id"`
	URI string `cbor:"uri" json:"uri"`
}

// cloud is oic.r.coapcloudconf.
type cloud struct {
	Provider string    `cbor:"apn" json:"apn"`
	Server   string    `cbor:"cis" json:"cis"`
	ID       string    `cbor:"sid" json:"sid"`
	Token    string    `cbor:"at" json:"at"`
	Servers  []gateway `cbor:"x.org.iotivity.servers" json:"x.org.iotivity.servers"`
}

var errSteps = hub.NewError(hub.Invalid, "body-invalid", "the body must be a map as the step of device provisioning has it")

// cloudConfiguration is where and with what the device signs up. It comes before the certificate, so the device may say here for
// the first time who it is.
func (s *step) cloudConfiguration(ctx context.Context) (any, error) {
	var q struct {
		Device   string  `cbor:"di"`
		Selected gateway `cbor:"selectedGateway"`
	}
	if err := decoding.Unmarshal(s.req.Payload, &q); err != nil {
		return nil, errSteps.With("decode", err)
	}
	dev, err := hub.ParseDeviceID(q.Device)
	if err != nil {
		return nil, err
	}
	if s.codes++; s.codes > maxCodes {
		return nil, hub.NewError(hub.Exhausted, "provisioning-repeated", "the device asked too often on this connection how to sign up")
	}
	s.done.Device = dev
	to, err := s.gw.deps.Authority.Admit(ctx, s.proof.Chain, dev)
	if err != nil {
		return nil, err
	}
	s.to = to
	c, err := s.gw.deps.Cloud(ctx, to.Owner, dev)
	if err != nil {
		return nil, err
	}
	c.Selected = max(0, slices.Index(c.Gateways, q.Selected.URI))
	out := cloud{Provider: c.Provider, Server: c.Gateways[c.Selected], ID: string(c.ID), Token: c.Token}
	for _, uri := range c.Gateways {
		out.Servers = append(out.Servers, gateway{string(c.ID), uri})
	}
	c.Token = ""
	s.done.Cloud = c
	return out, nil
}

// credential is an entry of oic.r.cred. It has no credid: the device gives one that is free, and ours could be its factory
// certificate's.
type credential struct {
	Subject string          `cbor:"subjectuuid" json:"subjectuuid"`
	Type    int             `cbor:"credtype" json:"credtype"`
	Usage   string          `cbor:"credusage,omitempty" json:"credusage,omitempty"`
	Public  *credentialData `cbor:"publicdata,omitempty" json:"publicdata,omitempty"`
	Private *credentialData `cbor:"privatedata,omitempty" json:"privatedata,omitempty"`
	Tag     string          `cbor:"tag" json:"tag"`
}

type credentialData struct {
	Data     string `cbor:"data" json:"data"`
	Encoding string `cbor:"encoding" json:"encoding"`
}

// OCF Security, oic.r.cred.
const (
	pairwiseKey = 1
	certificate = 8
	usageCert   = "oic.sec.cred.cert"
	usageAnchor = "oic.sec.cred.trustca"
	encodingPEM = "oic.sec.encoding.pem"
	encodingDER = "oic.sec.encoding.der"
	encodingRaw = "oic.sec.encoding.raw"
)

// credentials are the device's identity certificate, whom it is to trust, and the group's key, if it has one.
func (s *step) credentials(ctx context.Context) (any, error) {
	var q struct {
		Device string `cbor:"di"`
		CSR    struct {
			Encoding string `cbor:"encoding"`
			Data     any    `cbor:"data"`
		} `cbor:"csr"`
	}
	if err := decoding.Unmarshal(s.req.Payload, &q); err != nil {
		return nil, errSteps.With("decode", err)
	}
	var csr []byte
	switch data := q.CSR.Data.(type) {
	case string:
		csr = []byte(data)
	case []byte:
		csr = data
	}
	if len(csr) == 0 || q.CSR.Encoding != encodingPEM && q.CSR.Encoding != encodingDER {
		return nil, errSteps
	}
	if q.Device != "" {
		dev, err := hub.ParseDeviceID(q.Device)
		if err != nil {
			return nil, err
		}
		s.done.Device = dev
		if _, err := s.gw.deps.Authority.Admit(ctx, s.proof.Chain, dev); err != nil {
			return nil, err
		}
	}
	out, err := s.gw.deps.Authority.Enrol(ctx, s.proof, csr, false)
	if err != nil {
		return nil, err
	}
	s.gw.enrolled(ctx, s.log, out)
	if s.to.Device != out.Device { // it says so only now, and of two groups of its CA another one may name it
		if s.to, err = s.gw.deps.Authority.Applicant(ctx, s.proof.Chain); err != nil {
			return nil, err
		}
	}
	s.done.Device, s.done.Identity, s.done.PSK = out.Device, est.PEM(out.Chain[0]), s.to.PSK != ""
	creds := []credential{{
		Subject: string(out.Device), Type: certificate, Usage: usageCert, Tag: provisioningTag, Public: &credentialData{est.PEM(out.Chain...), encodingPEM},
	}}
	for _, c := range est.Roots(s.gw.deps.Authority) {
		creds = append(creds, credential{
			Subject: s.to.Owner.UUID(), Type: certificate, Usage: usageAnchor, Tag: provisioningTag,
			Public: &credentialData{est.PEM(c), encodingPEM},
		})
	}
	if s.to.PSK != "" {
		creds = append(creds, credential{
			Subject: s.to.Owner.UUID(), Type: pairwiseKey, Tag: provisioningTag, Private: &credentialData{s.to.PSK, encodingRaw},
		})
	}
	return struct {
		Credentials []credential `cbor:"creds" json:"creds"`
	}{creds}, nil
}

// rule is an entry of oic.sec.acl2. As with credentials the device numbers them.
type rule struct {
	Subject    map[string]string   `cbor:"subject" json:"subject"`
	Permission uint8               `cbor:"permission" json:"permission"`
	Resources  []map[string]string `cbor:"resources" json:"resources"`
	Tag        string              `cbor:"tag" json:"tag"`
}

func (s *step) acls(context.Context) (any, error) {
	var out struct {
		Rules []rule `cbor:"aclist2" json:"aclist2"`
	}
	for _, e := range hub.DeviceACL(s.to.Owner, s.gw.deps.HubID) {
		r := rule{Permission: e.Permissions, Tag: provisioningTag, Subject: map[string]string{"uuid": e.Subject}}
		if e.Subject == "" {
			r.Subject = map[string]string{"conntype": "anon-clear"}
		}
		for _, href := range e.Hrefs {
			r.Resources = append(r.Resources, map[string]string{"href": string(href)})
		}
		if len(e.Hrefs) == 0 {
			r.Resources = []map[string]string{{"wc": "*"}}
		}
		out.Rules = append(out.Rules, r)
	}
	return out, nil
}

// freshly adds that an answer is not to be kept (RFC 7252, Section 5.10.5): the time is of now, and a code is good once.
func freshly(r coap.Response) coap.Response {
	r.Options = coap.AddUint(r.Options, message.MaxAge, 0)
	return r
}
