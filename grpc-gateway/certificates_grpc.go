package grpcgateway

import (
	"cmp"
	"context"

	"google.golang.org/grpc"

	capb "github.com/coaphub/coaphub/api/gen/certificateauthoritypb"
	"github.com/coaphub/coaphub/hub"
)

// certificateServer is the service of certificates over gRPC.
type certificateServer struct {
	capb.UnimplementedCertificateAuthorityServer
	g *Gateway
}

func (s *certificateServer) SignIdentityCertificate(ctx context.Context, r *capb.SignCertificateRequest) (*capb.SignCertificateResponse, error) {
	if s.g.deps.Certificates == nil {
		return nil, errNoCall
	}
	if r.GetProfile() != "" || len(r.GetHosts()) > 0 {
		return nil, invalid("profile-unknown", "an identity has one profile, and no hosts")
	}
	c := claimsOf(ctx)
	chain, err := s.g.deps.Certificates.Sign(ctx, c.Owner, c.Subject, r.GetCertificateSigningRequest())
	return signedAnswer(ctx, chain, err)
}

func (s *certificateServer) SignCertificate(ctx context.Context, r *capb.SignCertificateRequest) (*capb.SignCertificateResponse, error) {
	if s.g.deps.Certificates == nil {
		return nil, errNoCall
	}
	chain, err := s.g.ofProfile(ctx, claimsOf(ctx), r.GetProfile(), r.GetHosts(), r.GetCertificateSigningRequest())
	return signedAnswer(ctx, chain, err)
}

func signedAnswer(ctx context.Context, chain []byte, err error) (*capb.SignCertificateResponse, error) {
	if err != nil {
		return nil, err
	}
	addSigned(targetOf(ctx), chain)
	return &capb.SignCertificateResponse{Certificate: chain}, nil
}

func (s *certificateServer) GetSigningRecords(r *capb.GetSigningRecordsRequest, out grpc.ServerStreamingServer[capb.SigningRecord]) error {
	if s.g.deps.Certificates == nil {
		return errNoCall
	}
	f, err := certificateFilter(r.GetDeviceIdFilter(), r.GetIdFilter(), r.GetCommonNameFilter())
	if err != nil {
		return err
	}
	for c, err := range s.g.deps.Certificates.Certificates(out.Context(), f.ofCertificates(claimsOf(out.Context()).Owner)) {
		if err != nil {
			return err
		}
		if err := out.Send(recordOf(&c)); err != nil {
			return err
		}
	}
	return nil
}

func recordOf(c *hub.Certificate) *capb.SigningRecord {
	m := &capb.SigningRecord{
		Id: c.Serial, Owner: string(c.Owner), CommonName: c.Name, DeviceId: string(c.Device), PublicKey: c.Key, CreationDate: c.Created.UnixNano(),
		Credential: &capb.CredentialStatus{
			Date: c.Created.UnixNano(), CertificatePem: c.PEM, ValidUntilDate: c.NotAfter.UnixNano(), Serial: decimal(c.Serial),
			IssuerId: c.Issuer,
		},
		RequestedBy: c.User, RequestMethod: string(c.How), Profile: string(c.Profile),
	}
	if a := c.Terms; a.Version != "" {
		m.TermsVersion, m.TermsAcceptedBy, m.TermsAcceptanceDate = a.Version, a.User, a.Time.UnixNano()
	}
	if !c.Revoked.IsZero() {
		m.RevokedDate, m.RevocationReason = c.Revoked.UnixNano(), c.Reason.String()
	}
	return m
}

func (s *certificateServer) DeleteSigningRecords(ctx context.Context, r *capb.DeleteSigningRecordsRequest) (*capb.DeletedSigningRecords, error) {
	if s.g.deps.Certificates == nil {
		return nil, errNoCall
	}
	n, err := s.g.revoked(ctx, claimsOf(ctx).Owner, toRevoke{
		devices: r.GetDeviceIdFilter(), serials: r.GetIdFilter(), all: r.GetAll(),
		reason: cmp.Or(r.GetReason(), hub.RevokedUnspecified.String()),
	}, targetOf(ctx))
	if err != nil {
		return nil, err
	}
	return &capb.DeletedSigningRecords{Count: int64(n)}, nil
}
