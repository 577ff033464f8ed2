package coapgateway

import (
	"context"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// signOff deletes the device: DELETE /oic/sec/account. Values that the query lacks are those of the session. The connection
// stays open, its session is gone.
func (p *peer) signOff(ctx context.Context, req *coap.Message, _ int32) (coap.Response, error) {
	q, err := parseQueries(req, hub.BadOption)
	if err != nil {
		return coap.Response{}, err
	}
	di, uid, token := q.first("di"), q.first("uid"), q.first("accesstoken")
	s := p.sess
	if s == nil && (uid == "" || token == "") {
		return coap.Response{}, invalid("query-incomplete", "di, uid and accesstoken are needed without a session")
	}
	claims, dev, err := p.whose(ctx, di, uid, token)
	if err != nil {
		return coap.Response{}, err
	}
	if p.gw.quarantined(dev) { // else a copy could end it, and take the device from its owner
		return coap.Response{}, errQuarantined
	}
	own := s != nil && s.own.Device == dev
	if !own {
		// A session's pin was checked at its sign-in. What is not there, or being released, SignOff knows.
		switch o, err := p.gw.deps.Identities.Owner(ctx, dev); {
		case err == nil && o.Owner == claims.Owner:
			if err := p.pinned(o); err != nil {
				return coap.Response{}, err
			}
		case err != nil && !hub.IsKind(err, hub.NotFound):
			return coap.Response{}, err
		}
	}
	if own {
		// The directory closes the live session of a deleted device; this one ends by its own wish and still has to answer.
		s.to.detached.Store(true)
		s.stop()
	}
	// A device that hangs up early is deleted all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.gw.cfg.API.CoAP.KeepAlive.Timeout)
	defer cancel()
	switch err := p.gw.deps.Identities.SignOff(ctx, dev, claims.Owner, claims.Subject); {
	case hub.IsKind(err, hub.NotFound):
		return coap.Response{}, invalid("device-not-registered", "the device is not registered").(*hub.Error).With("sign off", err)
	case err != nil:
		return coap.Response{}, err
	}
	p.log.Info("device signed off", "device", dev, "owner", claims.Owner)
	if own {
		p.endSession("sign-off", false)
	}
	return coap.Response{Code: codes.Deleted}, nil
}
