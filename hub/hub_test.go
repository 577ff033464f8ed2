package hub_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

func TestParseDeviceID(t *testing.T) {
	for in, want := range map[string]hub.DeviceID{
		"d0000000-0000-4000-8000-000000000001":  "d0000000-0000-4000-8000-000000000001",
		"D0000000-0000-4000-8000-00000000000A":  "d0000000-0000-4000-8000-00000000000a",
		"":                                      "",
		"not-a-uuid":                            "",
		"00000000-0000-0000-0000-000000000000":  "",
		"d0000000-0000-4000-8000-00000000000g":  "",
		"d0000000-0000-4000-8000-0000000000012": "",
		"d0000000+0000-4000-8000-000000000001":  "",
		"{0000000-0000-4000-8000-000000000001}": "",
	} {
		got, err := hub.ParseDeviceID(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseDeviceID(%q) = %q, %v; want %q", in, got, err, want)
		}
		if err != nil && !hub.IsKind(err, hub.Invalid) {
			t.Errorf("ParseDeviceID(%q): kind %v", in, hub.KindOf(err))
		}
	}
}

func TestParseHref(t *testing.T) {
	for in, want := range map[string]hub.Href{
		"/light/1":                               "/light/1",
		"light/1":                                "/light/1",
		"//light///1/":                           "/light/1",
		"/a%2Fb":                                 "/a%2Fb",
		"/ünï/ç":                                 "/ünï/ç",
		"":                                       "",
		"/":                                      "",
		"///":                                    "",
		"/a/../b":                                "",
		"/./a":                                   "",
		"/..a":                                   "/..a",
		"/a\x00b":                                "",
		"/\xff\xfe":                              "",
		"/" + strings.Repeat("a", 4096):          "",
		"/" + strings.Repeat("a", hub.MaxHref-1): hub.Href("/" + strings.Repeat("a", hub.MaxHref-1)),
	} {
		got, err := hub.ParseHref(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseHref(%.40q) = %.40q, %v; want %.40q", in, got, err, want)
		}
	}
}

func FuzzParseHref(f *testing.F) {
	for _, s := range []string{"/light/1", "//a/../b", "", "\xff", "/a/./b/"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := hub.ParseHref(s)
		if err != nil {
			return
		}
		again, err := hub.ParseHref(string(h))
		if err != nil || again != h {
			t.Fatalf("ParseHref(%q) = %q, which parses to %q, %v", s, h, again, err)
		}
	})
}

func TestErrorsShowOnlyWhatIsPublic(t *testing.T) {
	cause := errors.New("pebble: sector 7 is bad")
	err := fmt.Errorf("sign up: %w", (&hub.Error{Kind: hub.Unavailable, Err: cause}).With("store.Append", cause))
	if !hub.IsKind(err, hub.Unavailable) {
		t.Fatalf("kind %v", hub.KindOf(err))
	}
	code, text := hub.Public(err)
	if code != "unavailable" || strings.Contains(text, "sector") {
		t.Errorf("public is %q, %q", code, text)
	}
	if !strings.Contains(err.Error(), "sector 7") {
		t.Errorf("the log must have the cause: %v", err)
	}
	full := hub.NewError(hub.Unavailable, "disk-full", "the disk is full")
	if code, text := hub.Public(fmt.Errorf("a: %w", &hub.Error{Kind: hub.Unavailable, Op: "b", Err: full})); code != "disk-full" || text != "the disk is full" {
		t.Errorf("what passed an error without words is %q, %q", code, text)
	}
	if code, text := hub.Public(&hub.Error{Kind: hub.Internal, Err: full}); code != "internal" || strings.Contains(text, "disk") {
		t.Errorf("what another kind hides is %q, %q", code, text)
	}
	if k := hub.KindOf(fmt.Errorf("x: %w", context.DeadlineExceeded)); k != hub.Deadline {
		t.Errorf("a deadline is %v", k)
	}
	if k := hub.KindOf(cause); k != hub.Internal {
		t.Errorf("an unknown error is %v", k)
	}
}

func TestEachKindHasNameAndSentence(t *testing.T) {
	seen := map[string]bool{}
	for _, k := range hub.Kinds() {
		if strings.HasPrefix(k.String(), "kind-") || k.Sentence() == "unknown error" || seen[k.String()] {
			t.Errorf("kind %d: %q, %q", k, k, k.Sentence())
		}
		seen[k.String()] = true
	}
}

func TestInstanceIDIsOfTheHref(t *testing.T) {
	// CRC-32 (IEEE) of "/light/1", from an independent implementation.
	if got := hub.Href("/light/1").InstanceID(); got != 3810745338 {
		t.Errorf("instance ID %d", got)
	}
}

func TestPositionsAreOrderedByDayThenNumber(t *testing.T) {
	order := []hub.Position{{}, {Day: 0, N: 1}, {Day: 1, N: 0}, {Day: 1, N: 7}, {Day: 2, N: 1}}
	for i, p := range order {
		for j, q := range order {
			want := min(max(i-j, -1), 1)
			if got := p.Compare(q); got != want {
				t.Errorf("%v to %v: %d, want %d", p, q, got, want)
			}
		}
	}
}

func TestProtocolNames(t *testing.T) {
	for p, want := range map[hub.Protocol]string{
		hub.ProtocolUnknown: "unknown", hub.ProtocolCoAP: "coap", hub.ProtocolCoAPS: "coaps", hub.ProtocolCoAPTCP: "coap+tcp",
		hub.ProtocolCoAPSTCP: "coaps+tcp", hub.ProtocolC2C: "c2c", 99: "unknown",
	} {
		if got := p.String(); got != want {
			t.Errorf("protocol %d is %q, want %q", p, got, want)
		}
	}
}

func TestParseDenial(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for in, want := range map[[2]string]string{
		{"device", "6BA7B810-9DAD-41D1-80B4-00C04FD430C8"}: "6ba7b810-9dad-41d1-80b4-00c04fd430c8",
		{"key", sum}: sum,
		{"ca", strings.TrimSuffix(strings.Repeat("0A:", 32), ":")}: sum,
		{"certificate", sum}:               "" + sum,
		{"certificate", sum + "/00:AB:cd"}: sum + "/abcd",
		{"certificate", sum + "/"}:         "",
		{"certificate", sum + "/xy"}:       "",
		{"key", sum + "/abcd"}:             "",
		{"key", sum[2:]}:                   "",
		{"key", ""}:                        "",
		{"device", sum}:                    "",
		{"owner", "alice"}:                 "",
		{"", sum}:                          "",
	} {
		d, err := hub.ParseDenial(hub.DenialOf(in[0]), in[1])
		switch {
		case want == "" && !hub.IsKind(err, hub.Invalid):
			t.Errorf("%v: %+v, %v", in, d, err)
		case want != "" && (err != nil || d.Value != want || string(d.Of) != in[0]):
			t.Errorf("%v: %+v, %v; want %s", in, d, err, want)
		}
	}
}

// An owner's UUID is the one that other hubs make of him.
func TestOwnerUUID(t *testing.T) {
	for owner, want := range map[hub.Owner]string{
		"6BA7B810-9DAD-11D1-80B4-00C04FD430C8": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
		"http://www.example.com/":              "fcde3c85-2270-590f-9e7c-ee003d65e0e2",
		"admin":                                "f0de0e66-e6b6-5bed-9a9f-73459b6adbe7",
	} {
		if got := owner.UUID(); got != want {
			t.Errorf("%s: %s, want %s", owner, got, want)
		}
	}
}
