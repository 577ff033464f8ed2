package e2e_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/api"
	"github.com/coaphub/coaphub/grpc-gateway/openapitest"
)

var description = sync.OnceValues(func() (*openapitest.Checker, error) {
	doc, err := api.JSON()
	if err != nil {
		return nil, err
	}
	return openapitest.New(doc)
})

// checkFrame checks a message of the WebSocket of events.
func checkFrame(b []byte) error {
	c, err := description()
	if err != nil {
		return err
	}
	if err := c.CheckMessage("/api/v1/ws/events", b); err != nil {
		return fmt.Errorf("%.300s: %w", b, err)
	}
	return nil
}

// checked is a client for the hub's HTTP API. Each answer that came whole must be as the OpenAPI description says, or t
// fails; one that broke off says nothing.
func checked(t testing.TB) *http.Client {
	t.Helper()
	c, err := description()
	if err != nil {
		t.Fatal(err)
	}
	return &http.Client{Transport: &openapitest.Transport{
		Checker: c,
		Report:  func(err error) { t.Errorf("not as the description says: %v", err) },
		// The provider's pages are described elsewhere (OpenID Connect).
		Skip: func(r *http.Request) bool { return strings.HasPrefix(r.URL.Path, "/oauth/") },
	}}
}
