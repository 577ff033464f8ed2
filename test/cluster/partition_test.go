package cluster_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/dose"
)

// Addresses between the namespace of the test and that of a gateway that can be cut off: one link for devices and MongoDB, one for NATS.
const (
	testSide, gatewaySide       = "10.97.1.1", "10.97.1.2"
	busTestSide, busGatewaySide = "10.97.2.1", "10.97.2.2"
)

// namespace is a network of its own, for as long as a process in it lives.
type namespace struct {
	t      *testing.T
	holder int // the process
}

func ip(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// inside is the command that runs something in the namespace; it becomes that program, so it is the same process.
func (n *namespace) inside(args ...string) []string {
	return append([]string{"nsenter", "--net=/proc/" + fmt.Sprint(n.holder) + "/ns/net", "--"}, args...)
}

func (n *namespace) ip(args ...string) {
	n.t.Helper()
	cmd := n.inside(append([]string{"ip"}, args...)...)
	if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
		n.t.Fatalf("%s: %v\n%s", strings.Join(cmd, " "), err, out)
	}
}

// newNamespace makes a namespace with the two links to this one.
func newNamespace(t *testing.T) *namespace {
	t.Helper()
	holder := exec.Command("cat")
	holder.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	in, err := holder.StdinPipe()
	if err == nil {
		err = holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = holder.Wait() })
	n := &namespace{t, holder.Process.Pid}
	n.ip("link", "set", "lo", "up")
	for _, l := range []struct{ name, here, there string }{{"front", testSide, gatewaySide}, {"bus", busTestSide, busGatewaySide}} {
		ip(t, "link", "add", "name", l.name, "type", "veth", "peer", "name", l.name, "netns", fmt.Sprint(n.holder))
		ip(t, "addr", "add", l.here+"/24", "dev", l.name)
		ip(t, "link", "set", l.name, "up")
		n.ip("addr", "add", l.there+"/24", "dev", l.name)
		n.ip("link", "set", l.name, "up")
	}
	return n
}

// deaf is an Ethernet address that nobody has: what is sent to it gets lost, and nobody is told.
const deaf = "02:00:00:00:00:99"

// cut has what goes to NATS get lost, or what comes from there, or both, until join.
func (n *namespace) cut(to, from bool) {
	n.t.Helper()
	if to {
		n.ip("neigh", "replace", busTestSide, "lladdr", deaf, "dev", "bus", "nud", "permanent")
	}
	if from {
		ip(n.t, "neigh", "replace", busGatewaySide, "lladdr", deaf, "dev", "bus", "nud", "permanent")
	}
}

func (n *namespace) join(to, from bool) {
	n.t.Helper()
	if to {
		n.ip("neigh", "del", busTestSide, "dev", "bus")
	}
	if from {
		ip(n.t, "neigh", "del", busGatewaySide, "dev", "bus")
	}
}

// apart tells the process that it has a network of its own.
const apart = "COAPHUB_TEST_NETWORK"

// TestPartition: a gateway that the directories cannot hear, or that cannot hear them, or both, loses nothing that it acknowledged, and
// when they can again all its devices are served. It needs network namespaces: it makes itself one to be alone in, and one for the gateway.
func TestPartition(t *testing.T) {
	if os.Getenv(apart) == "" {
		inOwnNetwork(t)
		return
	}
	ip(t, "link", "set", "lo", "up")
	n := newNamespace(t)
	w := runWith(t, n)
	f := w.crowd(dose.Of(20, 20, 60), dose.Of(4, 4, 20))
	type side struct {
		name     string
		to, from bool
	}
	for _, s := range dose.Of(
		[]side{{"both ways", true, true}}, []side{{"both ways", true, true}},
		[]side{{"both ways", true, true}, {"only what the gateway sends", true, false}, {"only what it is sent", false, true}},
	) {
		// Long enough for the directories to take the gateway for gone.
		for range dose.Of(1, 1, 3) {
			notices := func() int { return strings.Count(w.parts["gw-1"].log.String(), "NATS is away") }
			before := notices()
			f.suffer(fault{name: "gw-1 and NATS cut off, " + s.name, bound: reunited, begin: func() { n.cut(s.to, s.from) }, end: func() {
				until(t, patience, "gw-1 to notice that it is cut off", func() bool { return notices() > before })
				pause(t.Context(), dose.Of(15*time.Second, 15*time.Second, 30*time.Second))
				n.join(s.to, s.from)
			}})
		}
	}
	f.judge()
}

// inOwnNetwork runs the test in a process of its own.
func inOwnNetwork(t *testing.T) {
	t.Helper()
	for _, program := range []string{"ip", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(program + " is not installed (Debian: iproute2 util-linux)")
		}
	}
	probe := exec.Command("ip", "link", "add", "name", "probe", "type", "veth", "peer", "name", "other")
	probe.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if out, err := probe.CombinedOutput(); err != nil {
		t.Skipf("there are no network namespaces for this user: %v: %s", err, out)
	}
	self := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestPartition$", "-test.v", "-test.timeout=10m")
	self.Env = append(os.Environ(), apart+"=own", programsVariable+"="+programs)
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	log := &buffer{}
	self.Stdout, self.Stderr = log, log
	err := self.Run()
	if err != nil {
		t.Fatalf("%v\n%s", err, log)
	}
	t.Log(log)
}
