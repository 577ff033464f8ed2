package bundle

import (
	"bytes"
	"context"
	"strings"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/obs"
)

// system is grpcgateway.System: what administrators see of the hub over the API, the same as over the socket.
type system struct{ a *assembly }

// Status is of grpcgateway.System.
func (s system) Status(ctx context.Context) (grpcgateway.SystemStatus, error) {
	status, err := s.a.countedStatus(ctx, struct{}{})
	return status.SystemStatus, err
}

// Parts is of grpcgateway.System.
func (s system) Parts(ctx context.Context) ([]grpcgateway.Part, error) {
	return s.a.listParts(ctx, struct{}{})
}

// Metrics is of grpcgateway.System.
func (s system) Metrics() ([]byte, error) {
	var b bytes.Buffer
	err := obs.WriteMetrics(&b, s.a.registry)
	return b.Bytes(), err
}

// Configuration is of grpcgateway.System.
func (s system) Configuration() (grpcgateway.SystemConfiguration, error) {
	var all, differs strings.Builder
	err := conf.Write(&all, s.a.cfg)
	if err == nil {
		err = conf.WriteDiff(&differs, s.a.cfg, Default())
	}
	return grpcgateway.SystemConfiguration{Configuration: all.String(), Differs: differs.String()}, err
}

// connections is grpcgateway.Connections.
type connections struct{ a *assembly }

// Connection is of grpcgateway.Connections.
func (c connections) Connection(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (DeviceStatus, error) {
	return c.a.deviceStatus(ctx, dev, owner)
}
