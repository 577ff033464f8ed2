package grpcgateway

import (
	"context"

	"google.golang.org/grpc"

	dppb "github.com/coaphub/coaphub/api/gen/deviceprovisioningservicepb"
)

// provisioningServer is the service of device provisioning over gRPC.
type provisioningServer struct {
	dppb.UnimplementedDeviceProvisionServiceServer
	g *Gateway
}

// sendAll sends a list without pages.
func sendAll[M any](s *provisioningServer, out grpc.ServerStreamingServer[M], f filter, err error, read reader) error {
	switch {
	case s.g.deps.Enrolments == nil:
		return errNoCall
	case err != nil:
		return err
	}
	for e, err := range read(out.Context(), claimsOf(out.Context()).Owner, &f) {
		if err != nil {
			return err
		}
		if err := out.SendMsg(e.element.message("")); err != nil {
			return err
		}
	}
	return nil
}

func (s *provisioningServer) GetProvisioningRecords(
	r *dppb.GetProvisioningRecordsRequest, out grpc.ServerStreamingServer[dppb.ProvisioningRecord],
) error {
	f, err := provisioningFilter(r.GetIdFilter(), r.GetDeviceIdFilter(), r.GetEnrollmentGroupIdFilter(), nil)
	return sendAll(s, out, f, err, s.g.provisioningRecords)
}

func (s *provisioningServer) DeleteProvisioningRecords(
	ctx context.Context, r *dppb.DeleteProvisioningRecordsRequest,
) (*dppb.DeleteProvisioningRecordsResponse, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	n, err := s.g.deletedRecords(ctx, claimsOf(ctx).Owner, r.GetIdFilter(), r.GetDeviceIdFilter(), r.GetEnrollmentGroupIdFilter(), r.GetAll())
	if err != nil {
		return nil, err
	}
	return &dppb.DeleteProvisioningRecordsResponse{Count: n}, nil
}

func (s *provisioningServer) GetEnrollmentGroups(r *dppb.GetEnrollmentGroupsRequest, out grpc.ServerStreamingServer[dppb.EnrollmentGroup]) error {
	f, err := groupFilter(r.GetIdFilter(), r.GetAttestationMechanismX509CertificateNames(), r.GetHubIdFilter())
	return sendAll(s, out, f, err, s.g.enrolmentGroups)
}

func (s *provisioningServer) CreateEnrollmentGroup(ctx context.Context, r *dppb.CreateEnrollmentGroupRequest) (*dppb.EnrollmentGroup, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	return s.g.setGroup(ctx, claimsOf(ctx), "", r, r.Named, targetOf(ctx))
}

func (s *provisioningServer) UpdateEnrollmentGroup(ctx context.Context, r *dppb.UpdateEnrollmentGroupRequest) (*dppb.EnrollmentGroup, error) {
	switch in := r.GetEnrollmentGroup(); {
	case s.g.deps.Enrolments == nil:
		return nil, errNoCall
	case r.GetId() == "" || in == nil:
		return nil, errNoGroup
	default:
		return s.g.setGroup(ctx, claimsOf(ctx), r.GetId(), in, in.Named, targetOf(ctx))
	}
}

func (s *provisioningServer) DeleteEnrollmentGroups(
	ctx context.Context, r *dppb.DeleteEnrollmentGroupsRequest,
) (*dppb.DeleteEnrollmentGroupsResponse, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	n, err := s.g.deletedGroups(ctx, claimsOf(ctx).Owner, r.GetIdFilter(), r.GetAll(), targetOf(ctx))
	if err != nil {
		return nil, err
	}
	return &dppb.DeleteEnrollmentGroupsResponse{Count: n}, nil
}

func (s *provisioningServer) GetHubs(r *dppb.GetHubsRequest, out grpc.ServerStreamingServer[dppb.Hub]) error {
	f, err := provisioningFilter(r.GetIdFilter(), nil, r.GetHubIdFilter(), nil)
	return sendAll(s, out, f, err, s.g.hubs)
}

func (*provisioningServer) CreateHub(context.Context, *dppb.CreateHubRequest) (*dppb.Hub, error) {
	return nil, errOneHub
}

func (*provisioningServer) UpdateHub(context.Context, *dppb.UpdateHubRequest) (*dppb.Hub, error) {
	return nil, errOneHub
}

func (*provisioningServer) DeleteHubs(context.Context, *dppb.DeleteHubsRequest) (*dppb.DeleteHubsResponse, error) {
	return nil, errOneHub
}

func (s *provisioningServer) GetEnrolments(r *dppb.GetEnrolmentsRequest, out grpc.ServerStreamingServer[dppb.Enrolment]) error {
	f, err := provisioningFilter(nil, r.GetDeviceIdFilter(), r.GetEnrollmentGroupIdFilter(), r.GetStateFilter())
	return sendAll(s, out, f, err, s.g.enrolments)
}

func (s *provisioningServer) DecideEnrolments(ctx context.Context, r *dppb.DecideEnrolmentsRequest) (*dppb.DecideEnrolmentsResponse, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	m, err := s.g.decided(ctx, claimsOf(ctx), r, targetOf(ctx))
	if err != nil {
		return nil, err
	}
	return m, nil
}

func (s *provisioningServer) AcceptTerms(ctx context.Context, r *dppb.AcceptTermsRequest) (*dppb.EnrollmentGroup, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	return s.g.accepted(ctx, claimsOf(ctx), r, targetOf(ctx))
}

func (s *provisioningServer) CreateEnrolmentToken(ctx context.Context, r *dppb.CreateEnrolmentTokenRequest) (*dppb.EnrolmentToken, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	return s.g.newToken(ctx, claimsOf(ctx), r, targetOf(ctx))
}

func (s *provisioningServer) GetEnrolmentTokens(r *dppb.GetEnrolmentTokensRequest, out grpc.ServerStreamingServer[dppb.EnrolmentToken]) error {
	f, err := provisioningFilter(r.GetIdFilter(), nil, nil, nil)
	return sendAll(s, out, f, err, s.g.enrolmentTokens)
}

func (s *provisioningServer) DeleteEnrolmentTokens(
	ctx context.Context, r *dppb.DeleteEnrolmentTokensRequest,
) (*dppb.DeleteEnrolmentTokensResponse, error) {
	if s.g.deps.Enrolments == nil {
		return nil, errNoCall
	}
	n, err := s.g.deletedTokens(ctx, claimsOf(ctx).Owner, r.GetIdFilter(), r.GetAll())
	if err != nil {
		return nil, err
	}
	return &dppb.DeleteEnrolmentTokensResponse{Count: n}, nil
}
