package main

import (
	"maps"
	"os/exec"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/types"
)

// TestCompose reads deploy/compose.yaml as Compose does, and compares it with the image and the hub: every port it publishes is one of
// the image's, every volume a folder that the hub may write, and the hub understands every key.
func TestCompose(t *testing.T) {
	env := types.Mapping{"COAPHUB_IMAGE": "coaphub:v9.9.9", "COAPHUB_EXTERNALADDRESS": "hub.example.com"}
	load := func(env types.Mapping) (*types.Project, error) {
		return loader.LoadWithContext(t.Context(), types.ConfigDetails{
			WorkingDir: "../../deploy", ConfigFiles: []types.ConfigFile{{Filename: "../../deploy/compose.yaml"}}, Environment: env,
		})
	}
	for name := range env {
		less := maps.Clone(env)
		delete(less, name)
		if _, err := load(less); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
	}
	project, err := load(env)
	if err != nil {
		t.Fatal(err)
	}
	hub, err := project.GetService("hub")
	if err != nil {
		t.Fatal(err)
	}
	prog := here(t)
	index, err := assemble([]program{prog}, testSource)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	img, err := index.Image(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range hub.Ports {
		if _, ok := c.Config.ExposedPorts[strconv.Itoa(int(p.Target))+"/"+p.Protocol]; !ok {
			t.Errorf("the image has no port %d/%s", p.Target, p.Protocol)
		}
	}
	own := map[string]bool{}
	for h := range files(t, img) {
		own["/"+path.Clean(h.Name)] = h.Uid == user
	}
	for _, v := range hub.Volumes {
		if !own[v.Target] {
			t.Errorf("the hub may not write %s", v.Target)
		}
	}
	if want := append([]string{"CMD"}, c.Config.Entrypoint...); hub.HealthCheck == nil || !slices.Equal([]string(hub.HealthCheck.Test)[:2], want) {
		t.Errorf("the health check is %+v", hub.HealthCheck)
	}
	cmd := exec.CommandContext(t.Context(), prog.file, "config", "--diff")
	cmd.Env = slices.Clone(c.Config.Env) // and nothing of what the test runs in
	for key, value := range hub.Environment {
		cmd.Env = append(cmd.Env, key+"="+*value)
	}
	out, err := cmd.CombinedOutput()
	want := "externalAddress: hub.example.com\ngrpcGateway:\n  api:\n    http:\n      address: '[::]:8080'\n    grpc:\n      address: '[::]:8082'\n"
	if err != nil || string(out) != want {
		t.Errorf("the hub understands %v\n%s", err, out)
	}
}
