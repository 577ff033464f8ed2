package grpcgateway

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The page for people needs no token, loads what the hub itself serves, and nothing else.
func TestDocsPageLoadsNothingFromElsewhere(t *testing.T) {
	w := newWorld(t)
	var files []string
	for _, path := range []string{"/api/v1/docs", "/api/v1/docs/docs.js", "/api/v1/docs/docs.css"} {
		a := w.do(t, "", "GET", path)
		want(t, path, a.Code, 200)
		policy := a.Header().Get("Content-Security-Policy")
		for _, part := range []string{"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"} {
			want(t, path+": "+part, strings.Contains(policy, part), true)
		}
		want(t, "nothing inline", strings.Contains(policy, "unsafe"), false)
		body := a.Body.String()
		if m := regexp.MustCompile(`(?i)https?:|\bstyle=|\bon[a-z]+="|innerHTML|eval\(|document\.write`).FindString(body); m != "" {
			t.Errorf("%s has %q", path, m)
		}
		for _, m := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(body, -1) {
			files = append(files, m[1])
		}
		for _, m := range regexp.MustCompile(`fetch\("([^"]*)"`).FindAllStringSubmatch(body, -1) {
			files = append(files, m[1])
		}
	}
	slices.Sort(files)
	for _, f := range slices.Compact(files) {
		want(t, f, w.do(t, "", "GET", f).Code, 200)
	}
	if !slices.Contains(files, "/api/v1/openapi.json") || !slices.Contains(files, "/api/v1/docs/docs.js") {
		t.Errorf("the page leads to %v", files)
	}
}

func TestWebConfiguration(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.do(t, "", "GET", "/web_configuration.json").json()
	want(t, "authority", c["authority"], any("https://localhost:8080"))
	want(t, "client", c["webOauthClient"].(map[string]any)["clientId"], any("web"))
	want(t, "no client", c["m2mOauthClient"], any(nil))
	sidebar := c["visibility"].(map[string]any)["mainSidebar"].(map[string]any)
	want(t, "devices", sidebar["devices"], any(true))
	want(t, "commands", sidebar["pendingCommands"], any(true))
	want(t, "remote clients", sidebar["remoteClients"], any(false))
	want(t, "pages", len(sidebar), 15) // all that such a console asks for
}
