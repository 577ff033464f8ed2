package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/dose"
)

// TestKill9DuringACommand kills the hub when commands have reached their device and are not answered yet, two at once over a
// stream: nobody knows whether they were carried out, so they end UNAVAILABLE and are never sent again. What was not sent yet
// goes out at the next sign-in. There is a device for each transport, one after the other.
func TestKill9DuringACommand(t *testing.T) {
	t.Parallel()
	rounds := dose.Of(1, 1, 10) // with each device
	data, config := t.TempDir(), filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(config, []byte(everyWay), 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, data, "--config", config)
	ctx := t.Context()
	token := trim(p.run("token", "--ttl", "24h"))
	for i, over := range transports {
		// Over datagrams the next command waits for a sign of life, which a device that ignores the first does not give.
		hrefs := []string{"/light", "/fan"}
		if over.datagrams {
			hrefs = hrefs[:1]
		}
		id := deviceID(i + 1)
		on := p.onboard(id)
		pe, err := p.dial(ctx, over, id, on)
		if err != nil {
			t.Fatalf("%s: %v", over.name, err)
		}
		acc, err := signUp(ctx, pe, id, on.Code)
		if err != nil {
			t.Fatalf("%s: %v", over.name, err)
		}
		resource := func(href string) string { return "/api/v1/devices/" + id + "/resources" + href }
		give := func(href, content string) {
			t.Helper()
			if status, b := p.send(ctx, http.MethodPut, token, resource(href)+"?async=true&timeToLive=600000000000", content); status != http.StatusOK {
				t.Fatalf("%s: command: %d %s", over.name, status, b)
			}
		}
		begin := func() {
			t.Helper()
			for _, href := range hrefs {
				pe.serve(href, map[string]any{"n": 0})
			}
			if err := signIn(ctx, pe, id, acc); err != nil {
				t.Fatalf("%s: %v", over.name, err)
			}
		}
		begin()
		for i, href := range hrefs {
			if ok, err := publish(ctx, pe, id, i+1, href); !ok || err != nil {
				t.Fatal(over.name, ok, err)
			}
		}
		for round := range rounds {
			await(t, "the twin", func() bool {
				_, links := p.get(ctx, token, "/api/v1/devices/"+id+"/resource-links")
				for _, href := range hrefs {
					_, b := p.get(ctx, token, resource(href))
					if !bytes.Contains(links, []byte(href)) || !bytes.Contains(b, []byte(`"content"`)) {
						return false
					}
				}
				return true
			})
			for _, href := range hrefs {
				pe.ignores(href)
				give(href, `{"sent":true}`)
			}
			give("/light", `{"waits":true}`)
			var asked []string
			await(t, "the commands at the device", func() bool {
				asked = append(asked, pe.asked()...)
				return !slices.ContainsFunc(hrefs, func(href string) bool { return !slices.Contains(asked, "POST "+href) })
			})
			p.kill()
			pe.close()
			p = serve(t, data, "--config", config)
			if pe, err = p.dial(ctx, over, id, on); err != nil {
				t.Fatalf("%s: %v", over.name, err)
			}
			begin()
			await(t, "the end of all", func() bool {
				_, b := p.get(ctx, token, "/api/v1/pending-commands?includeHiddenResources=true")
				return len(b) == 0
			})
			posts := slices.DeleteFunc(pe.asked(), func(s string) bool { return s != "POST /light" && s != "POST /fan" })
			if !slices.Equal(posts, []string{"POST /light"}) || pe.value("/light")["waits"] != true || pe.value("/light")["sent"] == true {
				t.Fatalf("%s, round %d: the device was asked %q and has %v", over.name, round, posts, pe.value("/light"))
			}
			ends := ended(ctx, t, p, token, resource("/light")+"/events")
			if got := ends[len(ends)-2:]; !slices.Equal(got, []string{"UNAVAILABLE", "OK"}) || len(ends) != 2*(round+1) {
				t.Fatalf("%s, round %d: the commands ended %q", over.name, round, ends)
			}
			for _, href := range hrefs[1:] {
				if ends = ended(ctx, t, p, token, resource(href)+"/events"); len(ends) != round+1 || ends[round] != "UNAVAILABLE" {
					t.Fatalf("%s, round %d: the commands beside ended %q", over.name, round, ends)
				}
			}
		}
		pe.close()
	}
	p.kill()
	if out, stderr, err := command(ctx, "verify", "--data", data); err != nil {
		t.Fatalf("verify: %v\n%s%s", err, out, stderr)
	}
}

// ended lists how the updates in the history ended.
func ended(ctx context.Context, t *testing.T, p *process, token, path string) (statuses []string) {
	t.Helper()
	_, b := p.get(ctx, token, path)
	for line := range bytes.Lines(b) {
		var e struct {
			Result struct {
				Updated struct {
					Status string `json:"status"`
				} `json:"resourceUpdated"`
			} `json:"result"`
		}
		if err := json.Unmarshal(line, &e); err != nil {
			t.Fatal(err)
		}
		if s := e.Result.Updated.Status; s != "" {
			statuses = append(statuses, s)
		}
	}
	return statuses
}

// await polls until ok.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("it never came: %s", what)
		}
	}
}

// value is the map that the peer serves at an href.
func (p *peer) value(href string) map[string]any {
	p.mu.Lock()
	defer p.mu.Unlock()
	v, _ := p.resources[href].value.(map[string]any)
	return v
}
