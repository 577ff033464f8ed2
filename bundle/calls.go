package bundle

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
)

// calls is what the socket answers. Whoever opened it is administrator (socket.go), so nothing here asks again.
func (a *assembly) calls() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", call(a.countedStatus, a.log))
	mux.HandleFunc("GET /parts", call(a.listParts, a.log))
	mux.HandleFunc("GET /refused", call(a.refused, a.log))
	if a.identities == nil { // a resource-directory by itself
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
			refuse(w, hub.NewError(hub.Unsupported, "call-elsewhere", "this process has the resource directory only; ask another one of the hub's"))
		})
		return mux
	}
	mux.HandleFunc("POST /device", call(a.device, a.log))
	mux.HandleFunc("POST /devices/access", call(a.deviceAccess, a.log))
	mux.HandleFunc("POST /devices/disable", call(a.disableDevice, a.log))
	mux.HandleFunc("POST /devices/quarantine", call(a.quarantineDevice, a.log))
	mux.HandleFunc("GET /quarantine", call(a.listQuarantine, a.log))
	mux.HandleFunc("POST /quarantine/show", call(a.showQuarantine, a.log))
	mux.HandleFunc("POST /devices/enable", call(a.enableDevice, a.log))
	mux.HandleFunc("POST /devices/remove", call(a.removeDevice, a.log))
	mux.HandleFunc("GET /deny", call(a.listDenials, a.log))
	mux.HandleFunc("POST /deny", call(a.deny, a.log))
	mux.HandleFunc("POST /deny/remove", call(a.undeny, a.log))
	mux.HandleFunc("POST /onboard", call(a.onboard, a.log))
	mux.HandleFunc("POST /token", call(a.token, a.log))
	mux.HandleFunc("GET /users", call(a.users, a.log))
	mux.HandleFunc("POST /users/add", call(a.addUser, a.log))
	mux.HandleFunc("POST /users/password", call(a.setPassword, a.log))
	mux.HandleFunc("POST /users/roles", call(a.setRoles, a.log))
	mux.HandleFunc("POST /checkpoint", call(a.checkpoint, a.log))
	mux.HandleFunc("POST /checkpoint/release", call(a.releaseCheckpoint, a.log))
	mux.HandleFunc("POST /audit", call(a.auditLog, a.log))
	mux.HandleFunc("POST /ca/root", call(a.root, a.log))
	mux.HandleFunc("POST /ca/issue", call(a.issue, a.log))
	mux.HandleFunc("GET /ca/parts", call(a.authorities, a.log))
	mux.HandleFunc("POST /ca/roll", call(a.roll, a.log))
	mux.HandleFunc("POST /ca/retire", call(a.retire, a.log))
	mux.HandleFunc("POST /ca/root-keys", call(a.rootKeys, a.log))
	mux.HandleFunc("POST /ca/root-keys/forget", call(a.forgetRootKeys, a.log))
	mux.HandleFunc("POST /certificates", call(a.listCertificates, a.log))
	mux.HandleFunc("POST /certificates/export", call(a.exportCertificates, a.log))
	mux.HandleFunc("POST /certificates/revoke", call(a.revokeCertificates, a.log))
	mux.HandleFunc("POST /certificates/report", call(a.reportCertificates, a.log))
	mux.HandleFunc("POST /enrolment/groups", call(a.listGroups, a.log))
	mux.HandleFunc("POST /enrolment/groups/set", call(a.setGroup, a.log))
	mux.HandleFunc("POST /enrolment/groups/accept", call(a.acceptTerms, a.log))
	mux.HandleFunc("POST /enrolment/groups/delete", call(a.deleteGroups, a.log))
	mux.HandleFunc("POST /enrolment/tokens", call(a.listEnrolmentTokens, a.log))
	mux.HandleFunc("POST /enrolment/tokens/new", call(a.newEnrolmentToken, a.log))
	mux.HandleFunc("POST /enrolment/tokens/delete", call(a.deleteEnrolmentTokens, a.log))
	mux.HandleFunc("POST /enrolments", call(a.listEnrolments, a.log))
	mux.HandleFunc("POST /enrolments/decide", call(a.decideEnrolments, a.log))
	mux.HandleFunc("POST /enrolments/forget", call(a.forgetEnrolments, a.log))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, &hub.Error{Kind: hub.NotFound, Code: "call-unknown", Text: "the hub does not know this call; are hub and command of the same version?"})
	})
	return mux
}

// status is that of a hub whose devices nobody counts: a start does not wait for it.
func (a *assembly) status(ctx context.Context) Status {
	s := Status{
		SystemStatus: grpcgateway.SystemStatus{
			HubID: a.hubID, Version: a.build.Version, Build: a.build, Started: a.started.UTC(), Endpoints: a.endpoints(), NotReady: a.health.Ready(ctx),
		},
		PID: os.Getpid(), Data: a.folder.Path,
	}
	if a.provider != nil {
		s.Issuer = a.provider.Issuer()
	}
	if head, err := a.store.Head(ctx); err == nil {
		s.Feed = Feed{LogID: a.store.LogID(), Day: head.Day, N: head.N}
	}
	if a.pebble != nil && a.pebble.Full() {
		s.ReadOnly = fmt.Sprintf("the disk has less than %s free (store.minFree): reads go on, writes are refused until there is room", a.cfg.Store.MinFree)
	}
	s.FirstLogin = a.firstLoginFile(ctx)
	return s
}

// countedStatus is the status with the number of devices.
func (a *assembly) countedStatus(ctx context.Context, _ struct{}) (Status, error) {
	s := a.status(ctx)
	s.Devices, s.Online = a.count(ctx)
	return s, nil
}

// owned is how many devices there are: those of all accounts, or, where the accounts are elsewhere, all the store knows.
func (a *assembly) owned(ctx context.Context) (n int, err error) {
	if a.provider == nil {
		for _, err := range a.store.Devices(ctx, "") {
			if err != nil {
				return n, err
			}
			n++
		}
		return n, nil
	}
	accounts, err := a.provider.ListUsers(ctx)
	for _, acc := range accounts {
		ids, err := a.identities.Devices(ctx, hub.Owner(acc.Name)) // from memory, mostly
		if err != nil {
			return n, err
		}
		n += len(ids)
	}
	return n, err
}

// count is how many devices have an owner, and how many sessions there are now, at all gateways.
func (a *assembly) count(ctx context.Context) (devices, online int) {
	devices, err := a.owned(ctx)
	if err != nil {
		a.log.WarnContext(ctx, "devices could not be counted", "error", err)
	}
	return devices, a.doors.signedIn()
}

func (a *assembly) endpoints() (e Endpoints) {
	e.CoAPSTCP, e.CoAPS = a.doors.endpoint(hub.ProtocolCoAPSTCP), a.doors.endpoint(hub.ProtocolCoAPS)
	e.CoAPTCP, e.CoAP = a.doors.endpoint(hub.ProtocolCoAPTCP), a.doors.endpoint(hub.ProtocolCoAP)
	e.HTTP, e.GRPC = a.httpURL, a.grpcAddress
	if a.devices != nil && a.devices.WebSocket() != nil {
		if at, secure := strings.CutPrefix(a.httpURL, "https://"); secure {
			e.CoAPSWS = "coaps+ws://" + at
		} else {
			e.CoAPWS = "coap+ws://" + strings.TrimPrefix(at, "http://")
		}
	}
	if a.provider != nil {
		e.OAuth = a.httpURL + issuerPath(a.provider.Issuer())
	}
	if a.enrolCoAP != nil {
		e.Enrolment = "coaps://" + reach(a.enrolCoAP.Addr().String(), a.external)
	}
	if a.enrolHTTP != nil {
		e.EnrolmentHTTP = "https://" + reach(a.enrolHTTP.Addr().String(), a.external)
	}
	if a.admin != nil {
		e.Admin = a.url(a.admin.Addr().String(), false)
	}
	return e
}

// url is an HTTP listener's base address as others reach it: plain on loopback unless always has TLS there, too, and TLS anywhere else.
func (a *assembly) url(address string, always bool) string {
	if loopback(address) && !always {
		return "http://" + address
	}
	return "https://" + reach(address, a.external)
}

func (a *assembly) root(_ context.Context, q rootRequest) (string, error) {
	pem, err := a.authority.RootPEM(certificateauthority.Root(q.Which))
	return string(pem), err
}

// deviceRoots is the PEM of what devices are to trust.
func (a *assembly) deviceRoots() string {
	pem, _ := a.authority.RootPEM(certificateauthority.Device) // which there is
	return string(pem)
}

func (a *assembly) issue(ctx context.Context, q issueRequest) (Identity, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err != nil {
		return Identity{}, err
	}
	if q.Validity == 0 {
		q.Validity = certificateauthority.DeviceValidity
	}
	id, err := a.certificates.IssueDevice(ctx, dev, q.Validity, q.owner, callerOf(ctx))
	return Identity{Chain: string(id.Chain), Key: string(id.Key), CA: string(id.CA)}, err
}

func (a *assembly) refused(ctx context.Context, _ struct{}) ([]Refusal, error) {
	return append([]Refusal{}, administration{a}.Refused(ctx)...), nil // an empty list for scripts, not null
}

// device says how a device is attached, or was until it went, whoever has it.
func (a *assembly) device(ctx context.Context, q deviceRequest) (DeviceStatus, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err != nil {
		return DeviceStatus{}, err
	}
	s, err := a.deviceStatus(ctx, dev, "")
	if hub.IsKind(err, hub.NotFound) {
		code, text := hub.Public(err)
		err = hub.NewError(hub.NotFound, code, text+"; coaphub status --refused lists who was turned away")
	}
	return s, err
}

// deviceStatus says how a device is attached, or was, to the owner who had it then. The owner "" is an operator.
func (a *assembly) deviceStatus(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (DeviceStatus, error) {
	d, ok := a.doors.diagnostics(ctx, dev)
	if !ok || owner != "" && d.Owner != owner {
		return DeviceStatus{}, hub.NewError(hub.NotFound, "device-not-seen", "the device has not signed in since the hub started")
	}
	s := DeviceStatus{
		DeviceID: string(dev), Online: d.Online, Protocol: d.Protocol.String(), TLS: d.TLSVersion, Remote: d.Remote, Session: d.Session, Quarantined: d.Quarantined,
		ConnectedSince: d.ConnectedSince.UTC(), LastError: d.LastError,
		BytesIn: d.BytesIn, BytesOut: d.BytesOut, RoundTrip: d.RoundTrip.Seconds(), EndReason: d.EndReason,
	}
	if !d.EndedAt.IsZero() {
		at := d.EndedAt.UTC()
		s.EndedAt = &at
	}
	if !d.RivalsAt.IsZero() {
		at := d.RivalsAt.UTC()
		s.RivalsAt, s.Rivals = &at, d.Rivals
	}
	if d.Contact.Interval > 0 {
		next := time.Unix(0, d.Contact.Next).UTC()
		s.NextContact, s.ContactInterval = &next, d.Contact.Interval.Seconds()
	}
	return s, nil
}
