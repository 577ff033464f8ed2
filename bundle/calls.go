package bundle

import (
	"context"
	"net/http"
	"os"
	"time"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	"github.com/coaphub/coaphub/hub"
)

// calls is what the socket answers. Whoever opened it is administrator (socket.go), so nothing here asks again.
func (a *assembly) calls() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", call(func(ctx context.Context, _ struct{}) (Status, error) { return a.status(ctx), nil }, a.log))
	mux.HandleFunc("POST /ca/root", call(a.root, a.log))
	mux.HandleFunc("POST /ca/issue", call(a.issue, a.log))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		refuse(w, &hub.Error{Kind: hub.NotFound, Code: "call-unknown", Text: "the hub does not know this call; are hub and command of the same version?"})
	})
	return mux
}

func (a *assembly) status(ctx context.Context) Status {
	s := Status{
		HubID: a.hubID, Version: a.build.Version, Build: a.build, Started: a.started.UTC(), PID: os.Getpid(), Data: a.folder.Path,
		Endpoints: a.endpoints(), NotReady: a.health.Ready(ctx),
	}
	if head, err := a.store.Head(ctx); err == nil {
		s.Feed = Feed{LogID: a.store.LogID(), Day: head.Day, N: head.N}
	}
	if _, err := os.Stat(a.folder.sub(firstLoginFile)); err == nil {
		s.FirstLogin = a.folder.sub(firstLoginFile)
	}
	return s
}

func (a *assembly) endpoints() (e Endpoints) {
	if a.admin != nil {
		e.Admin = a.url(a.admin.Addr().String())
	}
	return e
}

// url is an HTTP listener's base address as others reach it: plain on loopback, TLS anywhere else.
func (a *assembly) url(address string) string {
	if loopback(address) {
		return "http://" + address
	}
	return "https://" + reach(address, a.external)
}

func (a *assembly) root(_ context.Context, q rootRequest) (string, error) {
	pem, err := a.authority.RootPEM(certificateauthority.Root(q.Which))
	return string(pem), err
}

// deviceValidity is how long an identity certificate lasts when nobody says otherwise.
const deviceValidity = 365 * 24 * time.Hour

func (a *assembly) issue(_ context.Context, q issueRequest) (Identity, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err != nil {
		return Identity{}, err
	}
	if q.Validity == 0 {
		q.Validity = deviceValidity
	}
	id, err := a.authority.IssueDevice(dev, q.Validity)
	return Identity{Chain: string(id.Chain), Key: string(id.Key), CA: string(id.CA)}, err
}
