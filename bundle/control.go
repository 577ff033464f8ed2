package bundle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"path/filepath"
	"time"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
)

// What the API has, too.
type (
	Endpoints    = grpcgateway.Endpoints
	Feed         = grpcgateway.Feed
	Refusal      = grpcgateway.Refusal      // a connection, sign-up or sign-in that was refused
	DeviceStatus = grpcgateway.DeviceStatus // how a device is attached, or was until it went; of this run of the hub only
	Onboarding   = grpcgateway.Onboarding   // what a device needs to sign up
	Identity     = grpcgateway.Identity     // a device's certificate and key, PEM
)

// Status is what `coaphub status` shows.
type Status struct {
	grpcgateway.SystemStatus
	PID  int    `json:"pid"`
	Data string `json:"data"`
	// FirstLogin is where the first account's one-time password waits; empty when it was shown on a terminal or used.
	FirstLogin string `json:"firstLogin,omitempty"`
}

type deviceRequest struct {
	DeviceID string `json:"deviceId"`
}

// OnboardRequest asks for what a device needs to sign up. One of DeviceID and AnyDevice must be set.
type OnboardRequest struct {
	DeviceID  string `json:"deviceId,omitempty"`
	AnyDevice bool   `json:"anyDevice,omitempty"`
	Owner     string `json:"owner,omitempty"` // empty: the first administrator
	// Certificate asks for an identity certificate too; needs DeviceID.
	Certificate bool `json:"certificate,omitempty"`
	// PSK asks for a pre-shared key too; needs DeviceID. A key that the device had before is worth nothing then.
	PSK bool `json:"psk,omitempty"`
}

// TokenRequest asks for an access token for the API.
type TokenRequest struct {
	Owner  string        `json:"owner,omitempty"` // empty: the first administrator
	Scopes []string      `json:"scopes,omitempty"`
	TTL    time.Duration `json:"ttl,omitempty"` // nanoseconds; 0: the provider's default
}

// Token is an access token.
type Token struct {
	AccessToken string    `json:"accessToken"`
	ExpiresAt   time.Time `json:"expiresAt"`
}

// User is an account of the embedded provider.
type User struct {
	Name     string   `json:"name"`
	Roles    []string `json:"roles"`
	Disabled bool     `json:"disabled,omitempty"`
	// MustChange reports that the password works once, to set another one.
	MustChange bool `json:"mustChange,omitempty"`
}

// UserRequest adds or changes an account. Which fields are read depends on the call.
type UserRequest struct {
	Name     string   `json:"name"`
	Password string   `json:"password,omitempty"` // empty: the hub makes a one-time password
	Roles    []string `json:"roles,omitempty"`
}

// UserAnswer is the account and, if the hub made it, its one-time password.
type UserAnswer struct {
	User     User   `json:"user"`
	Password string `json:"password,omitempty"`
}

// Control is a connection to the hub that runs on a data folder.
type Control struct {
	http *http.Client
}

// ErrNoHub is the code of the error when no hub runs on the data folder.
const ErrNoHub = "hub-not-running"

// Dial returns a Control for the data folder. It does not connect yet: the first call says whether a hub runs there.
func Dial(data string) (*Control, error) {
	data, err := filepath.Abs(data)
	if err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		path, release, err := socketPath(data)
		if err == nil {
			defer release()
			var c net.Conn
			if c, err = new(net.Dialer).DialContext(ctx, "unix", path); err == nil {
				return c, nil
			}
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, notOurs(data, err)
		}
		return nil, &hub.Error{
			Kind: hub.Unavailable, Code: ErrNoHub, Err: err,
			Text: "no hub runs on the data folder " + data + "; start one with coaphub serve, or name another folder with --data",
		}
	}
	return &Control{&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}, nil
}

// maxAnswer bounds an answer: lists of accounts and refusals are well below.
const maxAnswer = 16 << 20

func (c *Control) call(ctx context.Context, method, path string, q, a any) error {
	answer, err := c.ask(ctx, method, path, q)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Close() }()
	if a == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(answer, maxAnswer)).Decode(a); err != nil {
		return notUnderstood(err)
	}
	return nil
}

func notUnderstood(err error) error {
	return &hub.Error{Kind: hub.Internal, Code: "answer-malformed", Text: "the hub's answer was not understood; are hub and command of the same version?", Err: err}
}

// ask makes a call and returns the body of the answer, which the caller closes; an error that was answered is an error.
func (c *Control) ask(ctx context.Context, method, path string, q any) (io.ReadCloser, error) {
	var body io.Reader
	if q != nil {
		b, err := json.Marshal(q)
		if err != nil {
			return nil, fmt.Errorf("write the call: %w", err)
		}
		body = bytes.NewReader(b)
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://hub"+path, body)
	if err != nil {
		return nil, fmt.Errorf("write the call: %w", err)
	}
	resp, err := c.http.Do(r)
	if err != nil {
		var e *hub.Error
		if errors.As(err, &e) {
			return nil, e
		}
		return nil, &hub.Error{Kind: hub.Unavailable, Code: "hub-gone", Text: "the hub did not answer; it may be stopping", Err: err}
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var e wireError
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&e); err != nil || e.Code == "" {
		return nil, &hub.Error{Kind: hub.Internal, Code: "answer-malformed", Text: "the hub answered " + resp.Status, Err: err}
	}
	return nil, e.error()
}

func (e wireError) error() error { return &hub.Error{Kind: e.Kind, Code: e.Code, Text: e.Message} }

// Status asks how the hub is.
func (c *Control) Status(ctx context.Context) (s Status, err error) {
	err = c.call(ctx, http.MethodGet, "/status", nil, &s)
	return s, err
}

// Refused lists the newest refusals, newest first.
func (c *Control) Refused(ctx context.Context) (rs []Refusal, err error) {
	err = c.call(ctx, http.MethodGet, "/refused", nil, &rs)
	return rs, err
}

// Device says how a device is attached. One that was not here since the hub started is NotFound ("device-not-seen").
func (c *Control) Device(ctx context.Context, deviceID string) (d DeviceStatus, err error) {
	err = c.call(ctx, http.MethodPost, "/device", deviceRequest{deviceID}, &d)
	return d, err
}

// Onboard makes what a device needs to sign up.
func (c *Control) Onboard(ctx context.Context, q OnboardRequest) (o Onboarding, err error) {
	err = c.call(ctx, http.MethodPost, "/onboard", q, &o)
	return o, err
}

// Token makes an access token for the API.
func (c *Control) Token(ctx context.Context, q TokenRequest) (t Token, err error) {
	err = c.call(ctx, http.MethodPost, "/token", q, &t)
	return t, err
}

// Users lists the accounts.
func (c *Control) Users(ctx context.Context) (us []User, err error) {
	err = c.call(ctx, http.MethodGet, "/users", nil, &us)
	return us, err
}

// AddUser makes an account.
func (c *Control) AddUser(ctx context.Context, q UserRequest) (a UserAnswer, err error) {
	err = c.call(ctx, http.MethodPost, "/users/add", q, &a)
	return a, err
}

// SetPassword gives an account another password.
func (c *Control) SetPassword(ctx context.Context, q UserRequest) (a UserAnswer, err error) {
	err = c.call(ctx, http.MethodPost, "/users/password", q, &a)
	return a, err
}

// SetRoles gives an account other roles.
func (c *Control) SetRoles(ctx context.Context, q UserRequest) (a UserAnswer, err error) {
	err = c.call(ctx, http.MethodPost, "/users/roles", q, &a)
	return a, err
}

// Root returns a root's certificate, PEM: device, https or internal.
func (c *Control) Root(ctx context.Context, which string) (pem string, err error) {
	err = c.call(ctx, http.MethodPost, "/ca/root", rootRequest{which}, &pem)
	return pem, err
}

// Authorities lists the roots, and what issues under them.
func (c *Control) Authorities(ctx context.Context) (as []AuthorityPart, err error) {
	err = c.call(ctx, http.MethodGet, "/ca/parts", nil, &as)
	return as, err
}

// Roll takes a step in rolling an authority over to new keys, and returns what there is then.
func (c *Control) Roll(ctx context.Context, q RollRequest) (as []AuthorityPart, err error) {
	err = c.call(ctx, http.MethodPost, "/ca/roll", q, &as)
	return as, err
}

// Retire ends the belief in a root or an issuing certificate, by the ID of its key, and returns what there is then. rootKey is PEM, for
// a root whose key is not in the data folder. Without it such a root's list lacks what was retired (AuthorityPart.ListLacks).
func (c *Control) Retire(ctx context.Context, id, rootKey string) (as []AuthorityPart, err error) {
	err = c.call(ctx, http.MethodPost, "/ca/retire", retireRequest{id, rootKey}, &as)
	return as, err
}

// RootKeys returns the certificates and private keys of a root that are in the data folder, PEM.
func (c *Control) RootKeys(ctx context.Context, which string) (pem string, err error) {
	err = c.call(ctx, http.MethodPost, "/ca/root-keys", rootRequest{which}, &pem)
	return pem, err
}

// ForgetRootKeys takes a root's keys out of the data folder. safe is what RootKeys returned, read back from where it is now.
func (c *Control) ForgetRootKeys(ctx context.Context, which, safe string) error {
	return c.call(ctx, http.MethodPost, "/ca/root-keys/forget", forgetRequest{which, safe}, nil)
}

// Issue makes an identity certificate for a device.
func (c *Control) Issue(ctx context.Context, deviceID string, validity time.Duration) (id Identity, err error) {
	err = c.call(ctx, http.MethodPost, "/ca/issue", issueRequest{DeviceID: deviceID, Validity: validity}, &id)
	return id, err
}

// Certificates lists the newest of the certificates that are meant, newest first.
func (c *Control) Certificates(ctx context.Context, q CertificatesRequest) (cs []Certificate, err error) {
	err = c.call(ctx, http.MethodPost, "/certificates", q, &cs)
	return cs, err
}

// ExportCertificates yields all certificates that are meant as the hub reads them, in no order. An error is the last element, also
// when the answer ends before its end.
func (c *Control) ExportCertificates(ctx context.Context, q CertificatesRequest) iter.Seq2[Certificate, error] {
	return func(yield func(Certificate, error) bool) {
		answer, err := c.ask(ctx, http.MethodPost, "/certificates/export", q)
		if err != nil {
			yield(Certificate{}, err)
			return
		}
		defer func() { _ = answer.Close() }()
		for dec := json.NewDecoder(answer); ; {
			var line exportLine
			err := dec.Decode(&line)
			switch {
			case err != nil:
				err = notUnderstood(err)
			case line.Last:
				return
			case line.Error != nil:
				err = line.Error.error()
			case line.Certificate == nil:
				err = notUnderstood(errors.New("a line has nothing"))
			}
			if err != nil {
				yield(Certificate{}, err)
				return
			}
			if !yield(*line.Certificate, nil) {
				return
			}
		}
	}
}

// RevokeCertificates revokes the certificates that are meant, which must name some or a device, and returns what was good until
// then.
func (c *Control) RevokeCertificates(ctx context.Context, q CertificatesRequest) (cs []Certificate, err error) {
	err = c.call(ctx, http.MethodPost, "/certificates/revoke", q, &cs)
	return cs, err
}

// CertificateReport says how the fleet is off for certificates.
func (c *Control) CertificateReport(ctx context.Context, q ReportRequest) (r CertificateReport, err error) {
	err = c.call(ctx, http.MethodPost, "/certificates/report", q, &r)
	return r, err
}

// Checkpoint makes a consistent copy of the store below the data folder and returns its path relative to it. Release removes
// it.
func (c *Control) Checkpoint(ctx context.Context) (path string, err error) {
	err = c.call(ctx, http.MethodPost, "/checkpoint", nil, &path)
	return path, err
}

// Release removes a checkpoint.
func (c *Control) Release(ctx context.Context, path string) error {
	return c.call(ctx, http.MethodPost, "/checkpoint/release", releaseRequest{path}, nil)
}

type rootRequest struct {
	Which string `json:"which"`
}

type issueRequest struct {
	DeviceID string        `json:"deviceId"`
	Validity time.Duration `json:"validity"` // nanoseconds; 0: a year

	owner hub.Owner // for whom, "" for whoever has the device; not over the socket
}

type releaseRequest struct {
	Path string `json:"path"`
}
