package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// bench is a folder in which somebody types commands against a hub's door for enrolment, with what RFC 7030's examples need beside
// the hub: a manufacturer with two devices, and another manufacturer whom the hub does not know.
type bench struct {
	*process
	dir string
	est string // https://host:port/.well-known/est
}

func newBench(t *testing.T, programs ...string) *bench {
	t.Helper()
	for _, name := range programs {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip(name + " is not installed")
		}
	}
	b := &bench{process: serve(t, t.TempDir()), dir: t.TempDir()}
	b.est = b.ready["enrolment-http"] + "/.well-known/est"
	b.write("ca.pem", []byte(b.run("ca", "root")))
	b.sh(`
for ca in factory other; do
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $ca-ca.key -out $ca-ca.pem -subj "/CN=$ca CA" -days 30
done
make() { # name, CA
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $1.key -out $1.csr -subj "/CN=serial $1"
  openssl x509 -req -in $1.csr -CA $2-ca.pem -CAkey $2-ca.key -out $1.pem -days 30
}
make lamp factory; make fan factory; make stranger other
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -outform DER -out own.csr -subj "/CN=whatever"
base64 own.csr > own.b64; base64 -w0 own.csr > own.b64line
`)
	b.run("enroll", "group", "add", "lamps", "--ca", filepath.Join(b.dir, "factory-ca.pem"))
	return b
}

func (b *bench) write(name string, text []byte) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), text, 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) read(name string) []byte {
	b.t.Helper()
	text, err := os.ReadFile(filepath.Join(b.dir, name))
	if err != nil {
		b.t.Fatal(err)
	}
	return text
}

// sh runs commands, of which each must succeed, and returns what they print.
func (b *bench) sh(commands string) string {
	b.t.Helper()
	out, err := b.try("set -e\n" + commands)
	if err != nil {
		b.t.Fatalf("%s\n%v\n%s", commands, err, out)
	}
	return out
}

func (b *bench) try(commands string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), 40*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", commands)
	cmd.Dir = b.dir
	cmd.Env = append(os.Environ(), "EST="+b.est, "COAP="+strings.TrimPrefix(b.ready["enrolment"], "coaps://"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// token makes a one-time token.
func (b *bench) token(args ...string) string {
	b.t.Helper()
	var t struct{ Token string }
	if err := json.Unmarshal([]byte(b.run(append([]string{"enroll", "token", "add", "--json"}, args...)...)), &t); err != nil {
		b.t.Fatal(err)
	}
	return t.Token
}

// verified is the subject of a certificate, and its serial number, once openssl has verified that it leads to the hub's root and is for
// clients.
func (b *bench) verified(name string) (subject, serial string) {
	b.t.Helper()
	out := b.sh(fmt.Sprintf(`
openssl verify -purpose sslclient -CAfile ca.pem -untrusted crts.pem %[1]s
openssl x509 -in %[1]s -noout -subject -serial -nameopt RFC2253`, name))
	found := regexp.MustCompile(`(?s)^` + name + `: OK\nsubject=(\S+)\nserial=(\S+)\n$`).FindStringSubmatch(out)
	if found == nil {
		b.t.Fatalf("openssl says of %s: %s", name, out)
	}
	return found[1], strings.ToLower(found[2])
}

// of reports whether a certificate is of a key.
func (b *bench) of(cert, key string) bool {
	b.t.Helper()
	_, err := tls.X509KeyPair(b.read(cert), b.read(key))
	return err == nil
}

// waiting are the devices that wait for a person.
func (b *bench) waiting() (ids []string) {
	b.t.Helper()
	var es []struct{ DeviceID string }
	if err := json.Unmarshal([]byte(b.run("enroll", "list", "--state", "waiting", "--json")), &es); err != nil {
		b.t.Fatal(err)
	}
	for _, e := range es {
		ids = append(ids, e.DeviceID)
	}
	return ids
}

// ledger is how many certificates the hub has signed.
func (b *bench) ledger() int {
	b.t.Helper()
	var cs []json.RawMessage
	if err := json.Unmarshal([]byte(b.run("certs", "list", "--json")), &cs); err != nil {
		b.t.Fatal(err)
	}
	return len(cs)
}

// curl prints the answer's headers and, behind an empty line, its body.
const curl = `curl -sS -i --cacert ca.pem `

// TestESTByCurl enrols devices with curl and openssl as RFC 7030's appendix does it.
func TestESTByCurl(t *testing.T) {
	t.Parallel()
	b := newBench(t, "curl", "openssl")
	asks := func(what, commands string, want ...string) string {
		t.Helper()
		out, err := b.try(commands)
		for _, w := range want {
			if !regexp.MustCompile(w).MatchString(out) {
				t.Errorf("%s: it does not say %q: %v\n%s", what, w, err, out)
			}
		}
		return out
	}
	// RFC 7030, Appendix A.1 and A.2.
	asks("cacerts", curl+`$EST/cacerts | tee answer`, `HTTP/1.1 200`, `Content-Type: application/pkcs7-mime; smime-type=certs-only\r`, `Content-Transfer-Encoding: base64\r`)
	if out := b.sh(`sed '1,/^\r$/d' answer | base64 -d | openssl pkcs7 -inform DER -print_certs -out crts.pem; grep -c BEGIN crts.pem`); trim(out) != "2" {
		t.Errorf("%s CA certificates", out)
	}
	if root := bytes.TrimSpace(b.read("ca.pem")); !bytes.Contains(b.read("crts.pem"), root) {
		t.Error("the root is not among the CA certificates")
	}
	b.sh(curl + `$EST/csrattrs | tee answer`)
	asks("csrattrs", `sed '1,/^\r$/d' answer | base64 -d | openssl asn1parse -inform DER`, `:id-ecPublicKey`, `:prime256v1`, `:ecdsa-with-SHA256`)

	// Appendix A.3, with a manufacturer's certificate; the body with the transfer encoding's header, without, in one line, and DER.
	const enroll = curl + `--cert lamp.pem --key lamp.key -H 'Content-Type: application/pkcs10' `
	open := func(name string) {
		b.sh(`sed '1,/^\r$/d' answer | base64 -d | openssl pkcs7 -inform DER -print_certs -out ` + name)
	}
	var device, serial string
	for i, how := range []string{
		`-H 'Content-Transfer-Encoding: base64' --data-binary @own.b64`, `--data-binary @own.b64`, `--data-binary @own.b64line`, `--data-binary @own.csr`,
	} {
		asks("simpleenroll "+how, enroll+how+` $EST/simpleenroll | tee answer`, `HTTP/1.1 200`, `certs-only\r`, `Content-Transfer-Encoding: base64\r`)
		open("cert.pem")
		subject, number := b.verified("cert.pem")
		if !strings.HasPrefix(subject, "CN=uuid:") || !b.of("cert.pem", "own.key") {
			t.Errorf("simpleenroll %s: a certificate of %s", how, subject)
		}
		if i > 0 && (subject != device || number != serial) {
			t.Errorf("simpleenroll %s: %s %s, it was %s %s", how, subject, number, device, serial)
		}
		device, serial = subject, number
	}
	// Section 4.2.2: again, under that certificate, for a new key and the same subject.
	b.sh(`openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -keyout next.key -outform DER -out next.csr -subj "/` + device + `"; base64 next.csr > next.b64`)
	const reenroll = curl + `-H 'Content-Type: application/pkcs10' --data-binary `
	asks("simplereenroll", reenroll+`@next.b64 --cert cert.pem --key own.key $EST/simplereenroll | tee answer`, `HTTP/1.1 200`)
	open("next.pem")
	if subject, number := b.verified("next.pem"); subject != device || number == serial || !b.of("next.pem", "next.key") {
		t.Errorf("simplereenroll: %s %s", subject, number)
	}
	// Section 3.2.3: a one-time token is the password of HTTP Basic.
	id := deviceID(7)
	token := b.token("--device-id", id)
	asks("a token", curl+`-u any:`+token+` -H 'Content-Type: application/pkcs10' --data-binary @next.b64 $EST/simpleenroll`, `HTTP/1.1 400`, `csr-name: `)
	asks("a token", curl+`-u any:`+token+` -H 'Content-Type: application/pkcs10' --data-binary @own.b64 $EST/simpleenroll | tee answer`, `HTTP/1.1 200`)
	open("token.pem")
	if subject, _ := b.verified("token.pem"); subject != "CN=uuid:"+id {
		t.Errorf("a token: %s", subject)
	}
	b.write("token.json", fmt.Appendf(nil, `{"token":%q,"csr":%q}`, b.token("--any-device"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: b.read("own.csr")})))
	asks("a token in JSON", curl+`-H 'Content-Type: application/json' --data-binary @token.json ${EST%/.well-known/est}/api/v1/enrolment`,
		`HTTP/1.1 200`, `"deviceId":"[0-9a-f-]{36}"`, `"certificate":"-----BEGIN CERTIFICATE-----.*"ca":"-----BEGIN`)

	// Nothing of what follows leaves a certificate.
	before := b.ledger()
	b.write("large", bytes.Repeat([]byte("MIIB"), 10<<10))
	b.write("nonsense", []byte("not base64!"))
	body := func(name string) string { return `-H 'Content-Type: application/pkcs10' --data-binary @` + name + ` ` }
	for what, c := range map[string]struct{ args, status, says string }{
		"no proof":                      {body("own.b64") + `$EST/simpleenroll`, "401", `(?is)WWW-Authenticate: Basic realm=.*enrolment-unproven`},
		"a wrong token":                 {`-u x:y ` + body("own.b64") + `$EST/simpleenroll`, "401", "token-unknown"},
		"a token with another key":      {`-u x:` + token + ` ` + body("lamp.csr") + `$EST/simpleenroll`, "400", "csr-invalid"},
		"a used token with another key": {`-u x:` + token + ` ` + body("next.b64") + `$EST/simpleenroll`, "401", "token-unknown"},
		"a renewal with a factory certificate": {
			`--cert lamp.pem --key lamp.key ` + body("next.b64") + `$EST/simplereenroll`, "403", "renewal-without-certificate",
		},
		"a renewal with a token":       {`-u x:` + b.token("--any-device") + ` ` + body("next.b64") + `$EST/simplereenroll`, "401", "enrolment-unproven"},
		"a renewal under another name": {`--cert cert.pem --key own.key ` + body("own.b64") + `$EST/simplereenroll`, "400", "csr-name"},
		"another type":                 {`--cert lamp.pem --key lamp.key -H 'Content-Type: text/plain' --data-binary @own.b64 $EST/simpleenroll`, "415", "format-unsupported"},
		"too large":                    {`--cert lamp.pem --key lamp.key ` + body("large") + `$EST/simpleenroll`, "413", "body-too-large"},
		"nonsense":                     {`--cert lamp.pem --key lamp.key ` + body("nonsense") + `$EST/simpleenroll`, "400", "csr-invalid"},
		"another method":               {`-X PUT $EST/simpleenroll`, "405", `Allow: POST\r`},
		"another path":                 {`$EST/serverkeygen`, "404", "path-unknown"},
	} {
		asks(what, curl+c.args, `HTTP/1.1 `+c.status, c.says)
	}
	if now := b.ledger(); now != before {
		t.Errorf("the ledger has %d certificates, it had %d", now, before)
	}

	// Section 4.2.3: while somebody has to decide it is 202, with a time to come again.
	var groups []struct{ ID string }
	if err := json.Unmarshal([]byte(b.run("enroll", "group", "list", "--json")), &groups); err != nil || len(groups) != 1 {
		t.Fatalf("groups: %v, %v", groups, err)
	}
	b.run("enroll", "group", "change", groups[0].ID, "--approval")
	fan := curl + `--cert fan.pem --key fan.key ` + body("own.b64") + `$EST/simpleenroll`
	asks("waiting", fan, `HTTP/1.1 202`, `Retry-After: 60\r`, `enrolment-waiting: `)
	ids := b.waiting()
	if len(ids) != 1 {
		t.Fatalf("%v wait", ids)
	}
	b.run("enroll", "refuse", ids[0])
	asks("refused", fan, `HTTP/1.1 403`, `enrolment-refused: `)
	b.run("enroll", "approve", ids[0])
	asks("allowed", fan+` | tee answer`, `HTTP/1.1 200`)
	open("fan.crt")
	if subject, _ := b.verified("fan.crt"); subject != "CN=uuid:"+ids[0] {
		t.Errorf("allowed: %s, and it is %s", subject, ids[0])
	}

	// Terms of its group are accepted first, which the certificate's entry says.
	b.run("enroll", "group", "change", groups[0].ID, "--approval=false", "--terms", "2026-1", "--terms-url", "https://terms.example/2026-1")
	b.run("enroll", "forget", ids[0])
	asks("terms", fan, `HTTP/1.1 202`, `Retry-After: 60\r`, `enrolment-waiting: somebody has to accept the terms`)
	if list := b.run("enroll", "list", ids[0]); !strings.Contains(list, "waiting: terms") {
		t.Errorf("the list does not say for what it waits:\n%s", list)
	}
	b.sh(`openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout anew.key -outform DER -out anew.csr -subj "/CN=fan"; base64 anew.csr > anew.b64`)
	b.run("enroll", "group", "accept", groups[0].ID, "--terms", "2026-1")
	asks("accepted", strings.Replace(fan, "own.b64", "anew.b64", 1), `HTTP/1.1 200`)
	var es []struct{ State, Serial string }
	if err := json.Unmarshal([]byte(b.run("enroll", "list", ids[0], "--json")), &es); err != nil || len(es) != 1 || es[0].State != "issued" {
		t.Fatalf("enrolled: %+v, %v", es, err)
	}
	if entry := b.run("certs", "show", "--json", es[0].Serial); !regexp.MustCompile(`"acceptedTerms": \{\s*"version": "2026-1",\s*"user": "[^"]+`).MatchString(entry) {
		t.Errorf("the ledger does not say who accepted which terms:\n%s", entry)
	}
	if list := b.run("enroll", "group", "list"); !strings.Contains(list, "2026-1, accepted by ") {
		t.Errorf("the group's terms:\n%s", list)
	}

	// Whoever nobody vouches for does not get as far as a request, and neither does one whose certificate was revoked.
	asks("a stranger", curl+`--cert stranger.pem --key stranger.key $EST/cacerts`, `curl: \(\d+\)`)
	if got := b.refusedWith("unknown authority"); got != "" {
		t.Errorf("status does not say why the stranger was refused: %s", got)
	}
	b.run("certs", "revoke", serial)
	asks("revoked", curl+`--cert cert.pem --key own.key $EST/cacerts`, `curl: \(\d+\)`)
}

// TestESTByLibcoap enrols devices with libcoap's client as RFC 9148's examples do it, over DTLS and TLS.
func TestESTByLibcoap(t *testing.T) {
	t.Parallel()
	b := newBench(t, "coap-client-openssl", "openssl")
	id := deviceID(3)
	var psk struct{ PSKIdentity, PSK string }
	if err := json.Unmarshal([]byte(b.run("onboard", "--device-id", id, "--psk", "--json")), &psk); err != nil {
		t.Fatal(err)
	}
	// A request that a datagram does not hold: names that nobody asked for are dropped.
	names := make([]string, 200)
	for i := range names {
		names[i] = fmt.Sprintf("DNS:lamp-%d.example", i)
	}
	for _, scheme := range []string{"coaps", "coaps+tcp"} {
		coap := func(args string) string {
			return "coap-client-openssl -B 10 " + strings.ReplaceAll(args, "EST", scheme+"://$COAP/.well-known/est")
		}
		const factory, post = `-c lamp.pem -j lamp.key -R ca.pem `, `-m post -t 286 `
		asks := func(what, commands, want string) {
			t.Helper()
			if out, err := b.try(commands); !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("%s %s: it does not say %q: %v\n%s", scheme, what, want, err, out)
			}
		}
		// RFC 9148, Section 5.1.
		asks("discovery", coap(factory+`'`+scheme+`://'$COAP'/.well-known/core?rt=ace.est*'`), `^</.well-known/est/crts>;rt="ace.est.crts";ct="281 287",.*/sen>.*/sren>.*/att>;rt="ace.est.att";ct=285\n?$`)
		asks("discovery of one", coap(factory+`'`+scheme+`://'$COAP'/.well-known/core?rt=ace.est.sen'`), `^</.well-known/est/sen>;rt="ace.est.sen";ct="281 287"\n?$`)
		// Appendix A.1 and A.4.
		b.sh(coap(factory+`-o crts.der EST/crts`) + `; openssl pkcs7 -inform DER -in crts.der -print_certs -out crts.pem`)
		if n := bytes.Count(b.read("crts.pem"), []byte("BEGIN")); n != 2 {
			t.Errorf("%s: %d CA certificates", scheme, n)
		}
		b.sh(coap(factory + `-A 287 -o root.der EST/crts`))
		if block, _ := pem.Decode(b.read("ca.pem")); !bytes.Equal(b.read("root.der"), block.Bytes) {
			t.Errorf("%s: crts as 287 is not the root", scheme)
		}
		asks("att", coap(factory+`-o att.der EST/att`)+`; openssl asn1parse -inform DER -in att.der`, `(?s):id-ecPublicKey.*:prime256v1.*:ecdsa-with-SHA256`)
		// Appendix A.2: the certificate in PKCS #7, and alone. The key is new to the hub on each transport.
		b.sh(`openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -outform DER -out own.csr -subj "/CN=whatever"`)
		b.sh(coap(factory+post+`-f own.csr -o sen.der EST/sen`) + `; openssl pkcs7 -inform DER -in sen.der -print_certs -out cert.pem`)
		device, serial := b.verified("cert.pem")
		if !strings.HasPrefix(device, "CN=uuid:") || !b.of("cert.pem", "own.key") {
			t.Errorf("%s sen: a certificate of %s", scheme, device)
		}
		b.sh(coap(factory+post+`-A 287 -f own.csr -o sen.der EST/sen`) + `; openssl x509 -inform DER -in sen.der -out again.pem`)
		if d, s := b.verified("again.pem"); d != device || s != serial {
			t.Errorf("%s: the same request as 287: %s %s, it was %s %s", scheme, d, s, device, serial)
		}
		// Section 4.6: in blocks, here of 64 bytes.
		b.sh(`openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout large.key -outform DER -out large.csr -subj "/CN=whatever" -addext "subjectAltName=` + strings.Join(names, ",") + `"`)
		small := `-b 64 -v 7 `
		if scheme == "coaps+tcp" {
			small = "" // a stream needs none
		}
		out := b.sh(coap(small+factory+post+`-f large.csr -o large.der EST/sen`) + `; openssl pkcs7 -inform DER -in large.der -print_certs -out large.pem`)
		if n := len(b.read("large.csr")); n < 3000 || scheme == "coaps" && strings.Count(out, "Block1:") < n/64 {
			t.Errorf("%s: %d bytes went in %d blocks", scheme, n, strings.Count(out, "Block1:"))
		}
		if d, _ := b.verified("large.pem"); d != device || !b.of("large.pem", "large.key") {
			t.Errorf("%s: in blocks: %s", scheme, d)
		}
		if out := b.sh(`openssl x509 -in large.pem -noout -ext subjectAltName 2>&1`); strings.Contains(out, "lamp-1") {
			t.Errorf("%s: names of the request are in the certificate: %s", scheme, out)
		}
		// Appendix A.3's way to the next one, under the one that there is.
		b.sh(`openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout next.key -outform DER -out next.csr -subj "/` + device + `"`)
		b.sh(coap(`-c cert.pem -j own.key -R ca.pem -R crts.pem `+post+`-f next.csr -o next.der EST/sren`) + `; openssl pkcs7 -inform DER -in next.der -print_certs -out next.pem`)
		if d, s := b.verified("next.pem"); d != device || s == serial || !b.of("next.pem", "next.key") {
			t.Errorf("%s sren: %s %s", scheme, d, s)
		}
		asks("a renewal with a factory certificate", coap(factory+post+`-f next.csr EST/sren`), `4\.03 renewal-without-certificate: `)
		asks("another format", coap(factory+`-m post -t 60 -f own.csr EST/sen`), `4\.15 format-unsupported: `)
		asks("an answer that there is not", coap(factory+`-A 60 EST/crts`), `4\.06`)
		asks("half a request", `head -c 100 own.csr > half.csr; `+coap(factory+post+`-f half.csr EST/sen`), `4\.00 csr-invalid: `)
		asks("another method", coap(factory+`EST/sen`), `4\.05`)
		asks("another path", coap(factory+post+`-f own.csr EST/skg`), `4\.04`)
		if scheme == "coaps" {
			// A device with a pre-shared key gets a certificate, for its own ID.
			shared := "-u " + psk.PSKIdentity + " -k '" + psk.PSK + "' "
			b.sh(coap(shared+post+`-A 287 -f own.csr -o psk.der EST/sen`) + `; openssl x509 -inform DER -in psk.der -out psk.pem`)
			if d, _ := b.verified("psk.pem"); d != "CN=uuid:"+id {
				t.Errorf("a pre-shared key: %s", d)
			}
			asks("a wrong key", strings.Replace(coap("-u "+psk.PSKIdentity+" -k wrong "+post+`-f own.csr -o wrong.der EST/sen`), "-B 10", "-B 2", 1)+`; test -e wrong.der || echo nothing`, "nothing")
		}
		// Who is refused in the handshake gets no answer, and the hub says why.
		b.run("certs", "revoke", serial)
		for what, c := range map[string]struct{ args, reason string }{
			"a stranger":            {`-c stranger.pem -j stranger.key -R ca.pem `, "unknown authority"},
			"a revoked certificate": {`-c cert.pem -j own.key -R ca.pem -R crts.pem `, "revoked"},
		} {
			asks(what, `rm -f no.der; `+coap(c.args+`-o no.der EST/crts`)+`; test -e no.der || echo nothing`, `nothing`)
			if got := b.refusedWith(c.reason); got != "" {
				t.Errorf("%s: status does not say why %s was refused: %s", scheme, what, got)
			}
		}
	}
}
