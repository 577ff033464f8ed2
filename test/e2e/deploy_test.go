package e2e_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/device"
)

// installation is a machine of one's own in a folder: what docs/operations.md does to /etc, /usr and /var happens below it. systemd,
// Docker and root are played by this type.
type installation struct {
	t    *testing.T
	home string
	hubs map[string]*process // unit, container
}

// service is the hub of the unit, container that of the compose file.
const (
	service   = "/var/lib/private/coaphub"
	container = "/data"
)

var (
	composeCommand = regexp.MustCompile(`^docker compose -f deploy/compose\.yaml (\S+) ?(.*)$`)
	configMapOf    = regexp.MustCompile(`^kubectl create configmap \S+ --from-literal=ca\.crt="\$\((.*)\)"$`)
)

// types runs one line.
func (m *installation) types(line string) string {
	m.t.Helper()
	rest, isUnit := strings.CutPrefix(line, "sudo systemctl ")
	if isUnit {
		switch rest {
		case "daemon-reload":
		case "enable --now coaphub", "start coaphub":
			m.start(service, "--config", m.home+"/etc/coaphub/coaphub.yaml")
		case "stop coaphub":
			m.stop(service)
		case "restart coaphub":
			m.stop(service)
			m.start(service, "--config", m.home+"/etc/coaphub/coaphub.yaml")
		default:
			m.t.Fatalf("nobody plays %q", line)
		}
		return ""
	}
	if line == "docker volume rm coaphub_data" {
		if err := os.RemoveAll(m.home + container); err != nil {
			m.t.Fatal(err)
		}
		return ""
	}
	if c := composeCommand.FindStringSubmatch(line); c != nil {
		switch c[1] {
		case "up":
			m.start(container)
			return ""
		case "down":
			m.stop(container)
			return ""
		case "exec", "run":
			args, ok := strings.CutPrefix(strings.TrimPrefix(c[2], "--rm "), "hub ")
			if !ok {
				m.t.Fatalf("the service is hub: %q", line)
			}
			line = "coaphub " + strings.TrimPrefix(args, "coaphub ")
		case "cp":
			line = strings.Replace("cp -r "+c[2], "hub:", "", 1)
		default:
			m.t.Fatalf("nobody plays %q", line)
		}
	} else if c := configMapOf.FindStringSubmatch(line); c != nil {
		return m.types(c[1])
	} else if command, ok := strings.CutPrefix(line, "kubectl exec coaphub-0 -- "); ok {
		line = command
	} else if command, ok := strings.CutPrefix(line, "kubectl exec deployment/coaphub-grpc-gateway -- "); ok {
		line = command // any process of a cluster answers these as a whole hub does
	} else if strings.HasPrefix(line, "helm ") || strings.HasPrefix(line, "kubectl create secret ") || strings.HasPrefix(line, "kubectl rollout status ") {
		return "" // tools/chart tests what it does
	} else if strings.HasPrefix(line, "docker load ") || strings.HasPrefix(line, "export COAPHUB_IMAGE=") {
		return "" // tools/image tests both
	}
	line = regexp.MustCompile(`(^|[ '])/(etc|usr|var|data|backup)\b`).ReplaceAllString(line, "${1}"+m.home+"/$2")
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	sh := exec.CommandContext(ctx, "sh", "-ec", `sudo() { "$@"; }`+"\n"+line)
	sh.Dir = m.home
	sh.Env = append(os.Environ(), "PATH="+m.home+"/usr/local/bin:"+os.Getenv("PATH"), "COAPHUB_DATA="+m.home+container)
	out, err := sh.CombinedOutput()
	if err != nil {
		m.t.Errorf("%s\n%v\n%s", line, err, out)
	}
	return string(out)
}

func (m *installation) start(data string, args ...string) {
	m.t.Helper()
	if err := os.MkdirAll(m.home+data, 0o700); err != nil { // as systemd and Docker do
		m.t.Fatal(err)
	}
	m.hubs[data] = serve(m.t, m.home+data, args...)
}

func (m *installation) stop(data string) {
	m.t.Helper()
	p := m.hubs[data]
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		m.t.Fatal(err)
	}
	err := <-p.ended
	p.ended <- err
	if err != nil {
		m.t.Errorf("the hub did not stop well: %v\n%s", err, p.log)
	}
}

// TestOperations types the commands of docs/operations.md from its first to its last, and looks whether the metrics of its alarms exist.
func TestOperations(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(b)
	m := &installation{t: t, home: t.TempDir(), hubs: map[string]*process{}}
	for _, dir := range []string{"bin", "etc/systemd/system", "usr/local/bin", "var/lib/private", "var/backups", "var/tmp", "backup"} {
		if err := os.MkdirAll(filepath.Join(m.home, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	deploy, err := filepath.Abs("../../deploy")
	if err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"bin/coaphub": hubProgram(t), "deploy": deploy, "var/lib/coaphub": "private/coaphub"} {
		if err := os.Symlink(to, filepath.Join(m.home, link)); err != nil {
			t.Fatal(err)
		}
	}
	before, moving, ok := strings.Cut(doc, "\n## Moving to a cluster and back\n")
	_, behind, ok2 := strings.Cut(moving, "\n## ")
	if !ok || !ok2 {
		t.Fatal("there is no section about moving")
	}
	ids := map[string]string{}
	n, restores, lamp := 0, 0, deviceID(1)
	for _, step := range tourStep.FindAllStringSubmatch(before+behind, -1) { // moving needs servers: test/cluster types that
		for line := range strings.Lines(step[1]) {
			line = strings.TrimSpace(line)
			out := m.types(line)
			n++
			switch {
			case strings.Contains(line, "first-login") && !strings.Contains(out, "password: "):
				t.Errorf("%s\nprints no password: %q", line, out)
			case strings.Contains(line, "user passwd") && !strings.Contains(out, "password"):
				t.Errorf("%s\nprints no password: %q", line, out)
			case strings.Contains(line, "ca root https") && !strings.Contains(out, "BEGIN CERTIFICATE"):
				t.Errorf("%s\nprints no certificate: %q", line, out)
			case strings.Contains(line, "coaphub verify") && !strings.Contains(out, ", 0 problems"):
				t.Errorf("%s\nprints %q", line, out)
			case strings.Contains(line, " up -d"), strings.HasSuffix(line, "start coaphub"), strings.HasSuffix(line, "--now coaphub"):
				data := service
				if strings.HasPrefix(line, "docker") {
					data = container
				}
				p := m.hubs[data]
				before, now := ids[data], p.status()
				ids[data] = now.HubID
				switch {
				case before == "" && data == service:
					o := p.onboard(lamp)
					leave := lives(t, device.Config{ID: lamp, HubAddr: "coaps+tcp://" + p.coaps(), TLS: o.tls, Provider: o.Provider}, o.Code)
					if !eventually(t.Context(), 20*time.Second, func() bool { return p.status().Online == 1 }) {
						t.Fatal("the device does not come")
					}
					leave()
				case before != "" && (before != now.HubID || data == service && now.Devices != 1):
					t.Errorf("after %s it is another hub: %+v", line, now)
				}
			case strings.Contains(line, " restore "):
				restores++
			}
		}
	}
	if n < 35 || restores != 3 || len(ids) != 2 {
		t.Errorf("%d commands were typed, %d of them restored, for the hubs %v", n, restores, ids)
	}

	p := m.hubs[service]
	_, table, ok := strings.Cut(doc, "\n## Alarms\n")
	var alone, apart strings.Builder // a cluster has some metrics more
	for row := range strings.Lines(table) {
		if strings.Contains(row, "(cluster)") {
			apart.WriteString(row)
		} else {
			alone.WriteString(row)
		}
	}
	metric := regexp.MustCompile("`(coaphub_[a-z_]+)`")
	names, clusterNames := metric.FindAllStringSubmatch(alone.String(), -1), metric.FindAllStringSubmatch(apart.String(), -1)
	if !ok || len(names) < 10 || len(clusterNames) < 10 {
		t.Fatalf("the alarms name %d metrics, and %d of a cluster", len(names), len(clusterNames))
	}
	var sources strings.Builder
	for _, dir := range []string{"bus", "store/jetfeed", "store/mongostore"} {
		b, err := os.ReadFile("../../internal/" + dir + "/metrics.go")
		if err != nil {
			t.Fatal(err)
		}
		sources.Write(b)
	}
	for _, name := range clusterNames {
		if !strings.Contains(sources.String(), `"`+strings.TrimSuffix(name[1], "_count")+`"`) {
			t.Errorf("there is no metric %s", name[1])
		}
	}
	o := p.onboard(deviceID(2))
	leave := lives(t, device.Config{ID: deviceID(2), HubAddr: "coaps+tcp://" + p.coaps(), TLS: o.tls, Provider: o.Provider}, o.Code)
	if !eventually(t.Context(), 20*time.Second, func() bool { return p.status().Online == 1 }) {
		t.Fatal("the device does not come")
	}
	leave() // metrics with labels are there only once something happened
	for _, name := range names {
		if !eventually(t.Context(), 20*time.Second, func() bool { return strings.Contains(p.metrics(), "\n"+name[1]) }) {
			t.Errorf("there is no metric %s", name[1])
		}
	}
}

// TestSystemdUnit has systemd read the unit, and say how much of the machine it leaves to the hub.
func TestSystemdUnit(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		t.Skip("systemd-analyze is not installed (Debian: systemd)")
	}
	b, err := os.ReadFile("../../deploy/coaphub.service")
	if err != nil {
		t.Fatal(err)
	}
	const command = "/usr/local/bin/coaphub serve --data /var/lib/coaphub --config /etc/coaphub/coaphub.yaml\n"
	if !strings.Contains(string(b), "\nExecStart="+command) {
		t.Error("TestOperations plays another command than the unit's")
	}
	unit := filepath.Join(t.TempDir(), "coaphub.service") // the program must be there to be verified
	if err := os.WriteFile(unit, []byte(strings.Replace(string(b), "/usr/local/bin/coaphub", hubProgram(t), 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	analyze := func(args ...string) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", append(args, unit)...).CombinedOutput()
		if err != nil || strings.Contains(string(out), unit+":") { // a key that is not known is a warning
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
	analyze("verify", "--man=no")
	analyze("security", "--offline=true", "--threshold=20", "--no-pager")
}
