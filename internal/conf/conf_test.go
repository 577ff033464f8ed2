package conf_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/internal/conf"
)

type tlsConfig struct {
	CAPool   []string    `yaml:"caPool"`
	Key      conf.Secret `yaml:"key"`
	Required bool        `yaml:"required"`
}

type issuer struct {
	URL  string `yaml:"url"`
	Skew int8   `yaml:"skew"`
}

type doorConfig struct {
	Address string        `yaml:"address"`
	Wait    time.Duration `yaml:"wait"`
	Limit   conf.Size     `yaml:"limit"`
	TLS     tlsConfig     `yaml:"tls"`
}

type common struct {
	Level string `yaml:"level"`
}

type config struct {
	Log     common            `yaml:",inline"`
	Door    doorConfig        `yaml:"door"`
	Issuers []issuer          `yaml:"issuers"`
	Names   map[string]string `yaml:"names"`
	Ratio   float64           `yaml:"ratio"`
	Count   uint16            `yaml:"count"`
	NoKey   string
}

func defaults() config {
	return config{
		Log:  common{Level: "info"},
		Door: doorConfig{Address: "127.0.0.1:1", Wait: 10 * time.Second, Limit: 256 << 10, TLS: tlsConfig{Required: true}}, Ratio: 0.5,
	}
}

func read(t *testing.T, yaml string, env ...string) (config, []string, error) {
	t.Helper()
	c := defaults()
	warnings, err := conf.Read(&c, conf.Source{
		Name: "hub.yaml", YAML: []byte(yaml), Env: env, Prefix: "HUB_", Except: []string{"HUB_DATA"},
		Foreign: map[string]string{"apis": `write "door"`, "door.old": `write "door.wait"`},
	})
	return c, warnings, err
}

func TestEmptyKeepsDefaults(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n", "door:\n", "door:\n  address:\n"} {
		got, _, err := read(t, text)
		if err != nil || !reflect.DeepEqual(got, defaults()) {
			t.Errorf("%q: %+v, %v", text, got, err)
		}
	}
}

func TestReadsEveryKind(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, _, err := read(t, `
level: debug
door:
  address: "[::]:5684"
  wait: 7d
  limit: 8MiB
  tls: {caPool: one.pem, required: false, key: {file: `+file+`}}
issuers:
- url: https://a
  skew: -3
- {url: https://b}
names: {x: y}
ratio: 1e-1
count: 65535
`)
	want := config{
		Log:     common{Level: "debug"},
		Door:    doorConfig{Address: "[::]:5684", Wait: 168 * time.Hour, Limit: 8 << 20, TLS: tlsConfig{CAPool: []string{"one.pem"}, Key: "s3cret"}},
		Issuers: []issuer{{"https://a", -3}, {URL: "https://b"}}, Names: map[string]string{"x": "y"}, Ratio: 0.1, Count: 65535,
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v\nerr %v", got, want, err)
	}
}

func TestAllMistakesTogetherWithPathAndLine(t *testing.T) {
	_, _, err := read(t, `apis: {http: x}
door:
  addresz: x
  wait: soon
  limit: 3 potatoes
  old: 1
  tls:
    required: maybe
    nonsense: 1
  wait: 3s
issuers:
- skew: 300
  apis: 1
count: -1
ratio: [1]
names: 7
`)
	var ps conf.Problems
	if !errors.As(err, &ps) {
		t.Fatalf("err = %v, want Problems", err)
	}
	want := []string{
		`apis (hub.yaml line 1): not a key of coaphub but of another hub; write "door"`,
		`door.addresz (hub.yaml line 3): unknown key; did you mean "address"?`,
		`door.wait (hub.yaml line 4): "soon" is not a duration; write for example 10s, 5m, 36h or 7d`,
		`door.limit (hub.yaml line 5): "3 potatoes" is not a size; write for example 64KiB, 8MiB or 2GiB`,
		`door.old (hub.yaml line 6): not a key of coaphub but of another hub; write "door.wait"`,
		`door.tls.required (hub.yaml line 8): "maybe" is neither true nor false`,
		`door.tls.nonsense (hub.yaml line 9): unknown key; here may be: caPool, key, required`,
		`door.wait (hub.yaml line 10): the key is there twice`,
		`issuers[0].skew (hub.yaml line 12): "300" is not a whole number that fits`,
		`issuers[0].apis (hub.yaml line 13): not a key of coaphub but of another hub; write "door"`,
		`count (hub.yaml line 14): "-1" is not a whole number from 0 that fits`,
		`ratio (hub.yaml line 15): expected a single value`,
		`names (hub.yaml line 16): expected keys and values`,
	}
	var got []string
	for _, p := range ps {
		got = append(got, p.Error())
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
}

func TestRefusesWhatIsNoConfiguration(t *testing.T) {
	for _, text := range []string{"a: b: c", "- 1\n", "text", "door: &a {}\nlevel: *a\n", "level: a\n---\nlevel: b\n", "door: {tls: {key: {fil: x}}}", "door: {tls: {key: {file: /does/not/exist}}}"} {
		if _, _, err := read(t, text); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

func TestEnvironmentOverrides(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("from file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, warnings, err := read(t, "door: {address: a, wait: 1s}",
		"HUB_DOOR_ADDRESS=b:1", "HUB_DOOR_LIMIT=1KiB", "HUB_DOOR_TLS_CAPOOL=x.pem, y.pem", "HUB_DOOR_TLS_KEY_FILE="+file,
		`HUB_ISSUERS=[{url: u}]`, "HUB_DATA=/x", "HUB_SERVICE_HOST=10.0.0.1", "OTHER=1", "HUB_LEVEL=warn")
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	want.Log.Level = "warn"
	want.Door = doorConfig{"b:1", time.Second, 1 << 10, tlsConfig{[]string{"x.pem", "y.pem"}, "from file", true}}
	want.Issuers = []issuer{{URL: "u"}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if want := []string{"the environment variable HUB_SERVICE_HOST names no key and is ignored"}; !slices.Equal(warnings, want) {
		t.Errorf("warnings %q, want %q", warnings, want)
	}

	_, _, err = read(t, "", "HUB_DOOR_WAIT=never")
	if want := `door.wait (HUB_DOOR_WAIT): "never" is not a duration`; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("err = %v, want %q in it", err, want)
	}
}

func TestWriteIsReadable(t *testing.T) {
	c := defaults()
	c.Issuers = []issuer{{"https://a", 1}}
	c.Names = map[string]string{"b": "true", "a": "1"}
	c.Door.Wait = 36 * time.Hour
	var b bytes.Buffer
	if err := conf.Write(&b, &c); err != nil {
		t.Fatal(err)
	}
	got, _, err := read(t, b.String())
	got.Door.TLS.CAPool = nil // an empty list and none are the same to a reader
	if err != nil || !reflect.DeepEqual(got, c) {
		t.Errorf("got  %+v\nwant %+v\nerr %v\n%s", got, c, err, b.String())
	}
}

func TestWriteDiffShowsOnlyWhatDiffers(t *testing.T) {
	c := defaults()
	c.Door.TLS.Key = "hush"
	c.Log.Level = "debug"
	var b bytes.Buffer
	if err := conf.WriteDiff(&b, c, defaults()); err != nil {
		t.Fatal(err)
	}
	if want := "level: debug\ndoor:\n  tls:\n    key: '***'\n"; b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
	b.Reset()
	if err := conf.WriteDiff(&b, defaults(), defaults()); err != nil || b.String() != "{}\n" {
		t.Errorf("no difference is %q, %v", b.String(), err)
	}
}

func TestSecretsNeverPrint(t *testing.T) {
	c := tlsConfig{Key: "hush"}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", c.Key, "all", c)
	var b bytes.Buffer
	if err := conf.Write(&b, c); err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{fmt.Sprint(c), fmt.Sprintf("%+v %#v %q %s", c, c, c.Key, c.Key), log.String(), b.String()} {
		if strings.Contains(s, "hush") || !strings.Contains(s, conf.Hidden) {
			t.Errorf("it prints %s", s)
		}
	}
	if c.Key.Reveal() != "hush" {
		t.Error("the secret is lost")
	}
}

func TestDurationsAndSizes(t *testing.T) {
	for _, c := range []struct {
		text string
		want time.Duration
		back string
	}{
		{"0s", 0, "0s"},
		{"90s", 90 * time.Second, "1m30s"},
		{"7d", 168 * time.Hour, "7d"},
		{"1d12h", 36 * time.Hour, "36h"},
		{"1h", time.Hour, "1h"},
		{"5m", 5 * time.Minute, "5m"},
		{"10ms", 10 * time.Millisecond, "10ms"},
		{"-1s", -time.Second, "-1s"},
	} {
		got, err := conf.ParseDuration(c.text)
		if err != nil || got != c.want || conf.FormatDuration(got) != c.back {
			t.Errorf("%q = %v (%v), written %q; want %v, %q", c.text, got, err, conf.FormatDuration(got), c.want, c.back)
		}
	}
	for _, text := range []string{"", "10", "d", "1x", "-1d", "1d-1h", "99999999d"} {
		if d, err := conf.ParseDuration(text); err == nil {
			t.Errorf("duration %q = %v", text, d)
		}
	}
	for _, c := range []struct {
		text string
		want conf.Size
		back string
	}{{"0", 0, "0"}, {"1500", 1500, "1500"}, {"64KiB", 64 << 10, "64KiB"}, {"1024 KiB", 1 << 20, "1MiB"}, {"2GiB", 2 << 30, "2GiB"}, {"5B", 5, "5"}} {
		got, err := conf.ParseSize(c.text)
		if err != nil || got != c.want || got.String() != c.back {
			t.Errorf("%q = %v (%v), written %q; want %d, %q", c.text, int64(got), err, got, c.want, c.back)
		}
	}
	for _, text := range []string{"", "-1", "1MB", "KiB", "9999999999TiB", "1.5GiB"} {
		if s, err := conf.ParseSize(text); err == nil {
			t.Errorf("size %q = %v", text, s)
		}
	}
}

func TestKeysNameEveryLeafAndItsComment(t *testing.T) {
	c := defaults()
	var got []string
	for _, k := range conf.Keys(&c) {
		got = append(got, fmt.Sprintf("%s|%s|%s|%s.%s", k.Path, k.Type, k.Default, k.Struct, k.Field))
	}
	want := []string{
		"level|text|info|common.Level",
		"door.address|text|127.0.0.1:1|doorConfig.Address",
		"door.wait|duration|10s|doorConfig.Wait",
		"door.limit|size|256KiB|doorConfig.Limit",
		"door.tls.caPool|list of text|[]|tlsConfig.CAPool",
		`door.tls.key|secret|""|tlsConfig.Key`,
		"door.tls.required|true or false|true|tlsConfig.Required",
		"issuers|list of keys|[]|config.Issuers",
		"issuers[].url|text||issuer.URL",
		"issuers[].skew|whole number||issuer.Skew",
		"names|map of text|{}|config.Names",
		"ratio|number|0.5|config.Ratio",
		"count|whole number|0|config.Count",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n  %s\nwant\n  %s", strings.Join(got, "\n  "), strings.Join(want, "\n  "))
	}
	if v := conf.Variable("HUB_", "door.tls.caPool"); v != "HUB_DOOR_TLS_CAPOOL" {
		t.Errorf("variable = %q", v)
	}
}

func FuzzRead(f *testing.F) {
	f.Add("door: {address: x}")
	f.Add("a: &a [*a]\n")
	f.Add("issuers: [{url: 1}, 2]\nnames: {1: {2: 3}}")
	f.Add("door:\n  wait: [1\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := defaults()
		// Whatever the file says, the answer is a value or a list of problems, and what was read can be written.
		if _, err := conf.Read(&c, conf.Source{Name: "f", YAML: []byte(text), Prefix: "HUB_"}); err != nil {
			return
		}
		if err := conf.Write(new(bytes.Buffer), &c); err != nil {
			t.Errorf("write: %v", err)
		}
	})
}
