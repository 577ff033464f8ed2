package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"testing"
	"time"
)

// TestKill9DuringACommand kills the hub when commands have reached their device, two at once, and are not answered yet: nobody
// knows whether they were carried out, so they end UNAVAILABLE and are never sent again. What was not sent yet goes out at the
// next sign-in.
func TestKill9DuringACommand(t *testing.T) {
	t.Parallel()
	rounds := 3
	if nightly() {
		rounds = 50
	}
	p := serve(t, t.TempDir())
	ctx := t.Context()
	token := trim(p.run("token", "--ttl", "24h"))
	id := deviceID(1)
	on := p.onboard(id)
	pe, err := dialPeer(ctx, p.coaps(), on.tls)
	if err != nil {
		t.Fatal(err)
	}
	acc, err := signUp(ctx, pe, id, on.Code)
	if err != nil {
		t.Fatal(err)
	}
	light, fan := "/api/v1/devices/"+id+"/resources/light", "/api/v1/devices/"+id+"/resources/fan"
	give := func(to, content string) {
		t.Helper()
		if status, b := p.send(ctx, http.MethodPut, token, to+"?async=true&timeToLive=600000000000", content); status != http.StatusOK {
			t.Fatalf("command: %d %s", status, b)
		}
	}
	serves := func() {
		pe.serve("/light", map[string]any{"n": 0})
		pe.serve("/fan", map[string]any{"n": 0})
	}
	serves()
	if err := signIn(ctx, pe, id, acc); err != nil {
		t.Fatal(err)
	}
	for i, href := range []string{"/light", "/fan"} {
		if ok, err := publish(ctx, pe, id, i+1, href); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	for round := range rounds {
		await(t, "the twin", func() bool {
			_, b := p.get(ctx, token, "/api/v1/devices/"+id+"/resource-links")
			_, c := p.get(ctx, token, light)
			_, d := p.get(ctx, token, fan)
			return bytes.Contains(b, []byte("/light")) && bytes.Contains(c, []byte(`"content"`)) && bytes.Contains(d, []byte(`"content"`))
		})
		pe.ignores("/light")
		pe.ignores("/fan")
		give(light, `{"sent":true}`)
		give(light, `{"waits":true}`)
		give(fan, `{"sent":true}`)
		var asked []string
		await(t, "both commands at the device", func() bool {
			asked = append(asked, pe.asked()...)
			return slices.Contains(asked, "POST /light") && slices.Contains(asked, "POST /fan")
		})
		p.kill()
		pe.close()
		p = serve(t, p.data)
		if pe, err = dialPeer(ctx, p.coaps(), on.tls); err != nil {
			t.Fatal(err)
		}
		serves()
		if err := signIn(ctx, pe, id, acc); err != nil {
			t.Fatal(err)
		}
		await(t, "the end of all", func() bool {
			_, b := p.get(ctx, token, "/api/v1/pending-commands?includeHiddenResources=true")
			return len(b) == 0
		})
		posts := slices.DeleteFunc(pe.asked(), func(s string) bool { return s != "POST /light" && s != "POST /fan" })
		if !slices.Equal(posts, []string{"POST /light"}) || pe.value("/light")["waits"] != true || pe.value("/light")["sent"] == true {
			t.Fatalf("round %d: the device was asked %q and has %v", round, posts, pe.value("/light"))
		}
		ends := ended(ctx, t, p, token, light+"/events")
		if got := ends[len(ends)-2:]; !slices.Equal(got, []string{"UNAVAILABLE", "OK"}) || len(ends) != 2*(round+1) {
			t.Fatalf("round %d: the commands ended %q", round, ends)
		}
		if ends = ended(ctx, t, p, token, fan+"/events"); len(ends) != round+1 || ends[round] != "UNAVAILABLE" {
			t.Fatalf("round %d: the commands beside ended %q", round, ends)
		}
	}
	pe.close()
	p.kill()
	if out, stderr, err := command(ctx, "verify", "--data", p.data); err != nil {
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
