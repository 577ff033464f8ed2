package grpcgateway

import (
	"net/http"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
)

// HubConfiguration is what everybody may know of the hub; nothing in it is secret. Empty texts mean "not offered".
type HubConfiguration struct {
	OwnerClaim              string        // name of the claim that holds the owner
	DeviceIDClaim           string        // name of the claim that holds the device ID, may be empty
	CoAPGateway             string        // URI for devices: "coaps+tcp://host:5684"
	CoAPGatewayDTLS         string        // the same over DTLS; "" for none
	CertificateAuthorities  string        // PEM: what devices have to trust
	Authority               string        // issuer of tokens
	CertificateAuthority    string        // base URL of the certificate authority
	HTTPGatewayAddress      string        // base URL of this API
	DefaultCommandTTL       time.Duration // 0 = none
	WebClient, DeviceClient *OAuthClient  // nil = none is set up
	M2MClient               *OAuthClient
	Build                   Build
}

// OAuthClient is an OAuth client that is set up for the console, devices or machines.
type OAuthClient struct {
	ID, Audience, ProviderName, AssertionType, Authority, GrantType string
	Scopes                                                          []string
}

// Build is what was built, and when.
type Build struct{ Version, Date, Commit, CommitDate, ReleaseURL string }

// configuration is the answer at one time.
type configuration struct {
	HubConfiguration
	hubID string
	now   time.Time
}

func (g *Gateway) configuration() configuration {
	return configuration{g.deps.HubInfo(), g.deps.HubID, time.Now()}
}

func (c *OAuthClient) message() *pb.OAuthClient {
	if c == nil {
		return nil
	}
	return &pb.OAuthClient{
		ClientId: c.ID, Audience: c.Audience, Scopes: c.Scopes, ProviderName: c.ProviderName, ClientAssertionType: c.AssertionType,
		Authority: c.Authority, GrantType: c.GrantType,
	}
}

func (c configuration) response() *pb.HubConfigurationResponse {
	return &pb.HubConfigurationResponse{
		CurrentTime: c.now.UnixNano(), JwtOwnerClaim: c.OwnerClaim, JwtDeviceIdClaim: c.DeviceIDClaim, Id: c.hubID,
		CoapGateway: c.CoAPGateway, CertificateAuthorities: c.CertificateAuthorities, Authority: c.Authority,
		DefaultCommandTimeToLive: int64(c.DefaultCommandTTL), CertificateAuthority: c.CertificateAuthority,
		HttpGatewayAddress: c.HTTPGatewayAddress, WebOauthClient: c.WebClient.message(), DeviceOauthClient: c.DeviceClient.message(),
		M2MOauthClient: c.M2MClient.message(),
		BuildInfo: &pb.BuildInfo{
			Version: c.Build.Version, BuildDate: c.Build.Date, CommitHash: c.Build.Commit, CommitDate: c.Build.CommitDate,
			ReleaseUrl: c.Build.ReleaseURL,
		},
	}
}

func (c configuration) message(string) proto.Message { return c.response() }

// appendJSON differs from the simple form of everything else, because clients depend on it: the two times are numbers, and
// empty members stay.
func (c configuration) appendJSON(b []byte, _ string) []byte {
	text := func(name, v string) { b = appendString(appendName(b, name), v) }
	client := func(name string, o *OAuthClient) { b = appendClient(appendName(b, name), o) }
	b = append(b, '{')
	b = strconv.AppendInt(appendName(b, "currentTime"), c.now.UnixNano(), 10)
	text("jwtOwnerClaim", c.OwnerClaim)
	text("jwtDeviceIdClaim", c.DeviceIDClaim)
	text("id", c.hubID)
	text("coapGateway", c.CoAPGateway)
	text("certificateAuthorities", c.CertificateAuthorities)
	text("authority", c.Authority)
	b = strconv.AppendInt(appendName(b, "defaultCommandTimeToLive"), int64(c.DefaultCommandTTL), 10)
	text("certificateAuthority", c.CertificateAuthority)
	text("httpGatewayAddress", c.HTTPGatewayAddress)
	client("webOauthClient", c.WebClient)
	client("deviceOauthClient", c.DeviceClient)
	client("m2mOauthClient", c.M2MClient)
	b = append(appendName(b, "buildInfo"), '{')
	text("version", c.Build.Version)
	text("buildDate", c.Build.Date)
	text("commitHash", c.Build.Commit)
	text("commitDate", c.Build.CommitDate)
	text("releaseUrl", c.Build.ReleaseURL)
	return append(b, "}}"...)
}

// appendClient keeps empty members too.
func appendClient(b []byte, o *OAuthClient) []byte {
	if o == nil {
		return append(b, "null"...)
	}
	text := func(name, v string) { b = appendString(appendName(b, name), v) }
	b = append(b, '{')
	text("clientId", o.ID)
	text("audience", o.Audience)
	b = append(appendName(b, "scopes"), '[')
	for i, s := range o.Scopes {
		if i > 0 {
			b = append(b, ',')
		}
		b = appendString(b, s)
	}
	b = append(b, ']')
	text("providerName", o.ProviderName)
	text("clientAssertionType", o.AssertionType)
	text("authority", o.Authority)
	text("grantType", o.GrantType)
	return append(b, '}')
}

// Pages of plgd's console, by whether this hub has what they show.
var (
	consolePages = []string{"configuration", "devices", "docs", "pendingCommands"}
	consoleNever = []string{
		"apiTokens", "certificates", "chatRoom", "dashboard", "deviceFirmwareUpdate", "deviceLogs", "deviceProvisioning",
		"integrations", "remoteClients", "schemaHub", "snippetService",
	}
)

// appendWeb is what plgd's console asks for before anything else: where things are, how to log in, and which of its pages
// to show.
func (c configuration) appendWeb(b []byte) []byte {
	text := func(name, v string) { b = appendString(appendName(b, name), v) }
	b = append(b, '{')
	text("authority", c.Authority)
	text("httpGatewayAddress", c.HTTPGatewayAddress)
	text("deviceProvisioningService", "")
	text("snippetService", "")
	b = appendClient(appendName(b, "webOauthClient"), c.WebClient)
	b = appendClient(appendName(b, "deviceOauthClient"), c.DeviceClient)
	b = appendClient(appendName(b, "m2mOauthClient"), c.M2MClient)
	b = append(appendName(b, "visibility"), `{"mainSidebar":{`...)
	for _, page := range consolePages {
		b = appendBool(b, page, true)
	}
	for _, page := range consoleNever {
		b = appendBool(b, page, false)
	}
	return append(b, "}}}"...)
}

func (g *Gateway) getWebConfiguration(w http.ResponseWriter, r *request) error {
	w.Header().Set("Cache-Control", "no-cache")
	return writeTagged(w, r, "application/json", append(g.configuration().appendWeb(nil), '\n'))
}
