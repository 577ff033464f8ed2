package grpcgateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	capb "github.com/coaphub/coaphub/api/gen/certificateauthoritypb"
	"github.com/coaphub/coaphub/hub"
)

const (
	authority = "/certificate-authority/api/v1"
	signPath  = authority + "/sign/identity-csr"
	records   = authority + "/signing/records"
	issuer    = "c0000000-0000-5000-8000-000000000001"
	csrPEM    = "-----BEGIN CERTIFICATE REQUEST-----\nMIH/~~~>>>???\n-----END CERTIFICATE REQUEST-----\n"
)

// certificate is an entry of alice's in the ledger.
func certificate(serial string, dev hub.DeviceID) hub.Certificate {
	return hub.Certificate{
		Serial: serial, Issuer: issuer, Name: "uuid:" + string(dev), Key: "a0000000-0000-5000-8000-000000000002", Device: dev, Owner: alice,
		How: hub.ByCSR, User: "alice-sub", PEM: "-----BEGIN CERTIFICATE-----\n" + serial + "\n-----END CERTIFICATE-----\n",
		Created: time.Unix(0, t0), NotBefore: time.Unix(0, t0), NotAfter: time.Unix(0, t0+int64(24*time.Hour)),
	}
}

// newCertificatesWorld has four certificates of alice's and one of bob's, in no order, and an audit log.
func newCertificatesWorld(t testing.TB) (*world, *fakeAudit) {
	t.Helper()
	w, log, _ := newAdminWorld(t)
	of := certificate("0b", bobs)
	of.Owner = bob
	w.certificates.ledger = []hub.Certificate{
		certificate("ff01", lampA), certificate("0a", lampA), of, certificate("c3", lampB), certificate("b2", fresh),
	}
	return w, log
}

// chainPEM is a certificate of a device, signed by itself.
func chainPEM(t testing.TB, name string, serial int64) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name}}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestSignIdentityCertificate(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	chain := chainPEM(t, "uuid:"+string(lampA), 0xb7)
	var asked []string
	w.certificates.sign = func(owner hub.Owner, user string, csr []byte) ([]byte, error) {
		asked = append(asked, string(owner)+" "+user)
		want(t, "request", string(csr), csrPEM)
		return chain, nil
	}
	std, web := base64.StdEncoding.EncodeToString([]byte(csrPEM)), base64.URLEncoding.EncodeToString([]byte(csrPEM))
	want(t, "the alphabets differ here", std != web, true)
	for _, c := range []string{std, web, strings.TrimRight(std, "="), strings.TrimRight(web, "=")} {
		a := w.send(t, "alice", "POST", signPath, `{"certificateSigningRequest":"`+c+`"}`)
		want(t, "status", a.Code, 200)
		want(t, "certificate", a.json()["certificate"], any(b64(chain)))
	}
	want(t, "older path", w.send(t, "bob", "POST", "/api/v1/sign/identity-csr", `{"certificateSigningRequest":"`+std+`"}`).json()["certificate"], any(b64(chain)))
	want(t, "CBOR", w.send(t, "alice", "POST", signPath, string(cborOf(map[string]any{"certificateSigningRequest": []byte(csrPEM)})), "Content-Type: application/cbor").Code, 200)
	wantList(t, "who asked", asked, "alice alice-sub", "alice alice-sub", "alice alice-sub", "alice alice-sub", "bob bob-sub", "alice alice-sub")
	want(t, "audit", log.lines()[0], "http signIdentityCertificate "+signPath+" device="+string(lampA)+" serial=b7 alice-sub alice  ok")
	want(t, "audit of the older path", log.lines()[4], "http signIdentityCertificateOld /api/v1/sign/identity-csr device="+string(lampA)+" serial=b7 bob-sub bob  ok")
}

// What is no device's is of one of two profiles, and only operators name hosts. It is so over HTTP and gRPC.
func TestSignCertificate(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	chain := chainPEM(t, "owner:a b", 0xb7)
	var asked []string
	w.certificates.others = func(p hub.Profile, owner hub.Owner, user string, hosts []string, csr []byte) ([]byte, error) {
		asked = append(asked, fmt.Sprintf("%s %s %s %s", p, owner, user, hosts))
		want(t, "request", string(csr), csrPEM)
		return chain, nil
	}
	c := capb.NewCertificateAuthorityClient(w.dial(t))
	csr := base64.StdEncoding.EncodeToString([]byte(csrPEM))
	for _, q := range []struct {
		token, profile string
		hosts          []string
		asked          string // "": nothing
		code           int
		reason         string
	}{
		{"alice", "", nil, "client alice alice-sub []", 200, ""},
		{"alice", "client", nil, "client alice alice-sub []", 200, ""},
		{"admin", "client", nil, "client admin admin []", 200, ""},
		{"admin", "service", []string{"a.example", "::1"}, "service admin admin [a.example ::1]", 200, ""},
		{"admin", "service", nil, "service admin admin []", 200, ""}, // the authority refuses it
		{"alice", "service", []string{"a.example"}, "", 403, "scope-missing"},
		{"alice", "client", []string{"a.example"}, "", 400, "profile-unknown"},
		{"alice", "", []string{"a.example"}, "", 400, "profile-unknown"},
		{"admin", "device", nil, "", 400, "profile-unknown"},
	} {
		asked = nil
		body := map[string]any{"certificateSigningRequest": csr}
		if q.profile != "" {
			body["profile"] = q.profile
		}
		if q.hosts != nil {
			body["hosts"] = q.hosts
		}
		text, err := json.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{authority + "/sign/csr", "/api/v1/sign/csr"} {
			a := w.send(t, q.token, "POST", path, string(text))
			want(t, string(text), a.Code, q.code)
			if q.reason != "" {
				want(t, string(text), a.reason(), q.reason)
			} else {
				want(t, string(text), a.json()["certificate"], any(b64(chain)))
			}
		}
		signed, err := c.SignCertificate(as(t, q.token), &capb.SignCertificateRequest{CertificateSigningRequest: []byte(csrPEM), Profile: q.profile, Hosts: q.hosts})
		if q.reason != "" {
			_, reason := reasonOf(t, err)
			want(t, "gRPC "+string(text), reason, q.reason)
		} else {
			want(t, "gRPC "+string(text), string(signed.GetCertificate()), string(chain))
		}
		if q.asked == "" {
			wantList(t, "asked", asked)
		} else {
			wantList(t, "asked", asked, q.asked, q.asked, q.asked)
		}
	}
	want(t, "audit", log.lines()[0], "http signCertificate "+authority+"/sign/csr name=\"owner:a b\" serial=b7 alice-sub alice  ok")
	_, err := c.SignIdentityCertificate(as(t, "alice"), &capb.SignCertificateRequest{CertificateSigningRequest: []byte(csrPEM), Profile: "client"})
	_, reason := reasonOf(t, err)
	want(t, "an identity of another profile", reason, "profile-unknown")
}

func TestBadSigningRequests(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	for body, reason := range map[string]string{
		``:                                       "body-invalid",
		`{}`:                                     "body-incomplete",
		`{"certificateSigningRequest":""}`:       "body-incomplete",
		`{"certificateSigningRequest":null}`:     "body-incomplete",
		`{"certificateSigningRequest":5}`:        "body-invalid",
		`{"certificateSigningRequest":["AAAA"]}`: "body-invalid",
		`{"certificateSigningRequest":"AAAA","x":1}`:   "body-invalid",
		`{"certificateSigningRequest":"AAAA"}{}`:       "body-invalid",
		`{"certificateSigningRequest":"A*AA"}`:         "body-invalid",
		`{"certificateSigningRequest":"+A-A"}`:         "body-invalid", // of both alphabets
		`{"certificateSigningRequest":"A"}`:            "body-invalid",
		`["AAAA"]`:                                     "body-invalid",
		`{"certificateSigningRequest":"AAAA"`:          "body-invalid",
		`{"certificateSigningRequest":"AAAA=AAA"}`:     "body-invalid",
		`{"certificateSigningRequests":"AAAA"}`:        "body-invalid",
		`{"certificateSigningRequest":{"data":"AAA"}}`: "body-invalid",
	} {
		a := w.send(t, "alice", "POST", signPath, body) // whose authority must not be asked
		want(t, body, a.Code, 400)
		want(t, body, a.reason(), reason)
	}
	for _, c := range []struct {
		err  *hub.Error
		code int
	}{
		{hub.NewError(hub.Invalid, "csr-invalid", "no request"), 400},
		{hub.NewError(hub.TooLarge, "csr-too-large", "too large"), 413},
		{hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner"), 403},
		{hub.NewError(hub.Exhausted, "certificates-limit", "too many"), 429},
	} {
		w.certificates.sign = func(hub.Owner, string, []byte) ([]byte, error) { return nil, fmt.Errorf("sign: %w", c.err) }
		a := w.send(t, "alice", "POST", signPath, `{"certificateSigningRequest":"AAAA"}`)
		want(t, c.err.Code, a.Code, c.code)
		want(t, c.err.Code, a.reason(), c.err.Code)
	}
	want(t, "over the limit of bodies", w.send(t, "alice", "POST", signPath, strings.Repeat(" ", 1<<20+1)).reason(), "body-too-large")
	for _, l := range log.lines() {
		if strings.Contains(l, "AAA") {
			t.Errorf("a request is in the audit log: %s", l)
		}
	}
}

func TestGetSigningRecords(t *testing.T) {
	t.Parallel()
	w, _ := newCertificatesWorld(t)
	w.certificates.ledger[1].Revoked, w.certificates.ledger[1].Reason = time.Unix(0, t0+5), hub.RevokedKeyCompromise
	w.certificates.ledger[1].Terms = hub.Acceptance{Version: "2", User: "eve", Time: time.Unix(0, t0+1)}
	a := w.get(t, records)
	rs := a.results()
	wantList(t, "as they are read", ids(rs, "id"), "ff01", "0a", "c3", "b2")
	day := strconv.FormatInt(t0+int64(24*time.Hour), 10)
	want(t, "record", sameJSON(t, []byte(strings.SplitAfter(a.Body.String(), "\n")[1])), sameJSON(t, []byte(`{"result":{
		"id": "0a", "owner": "alice", "commonName": "uuid:`+string(lampA)+`", "deviceId": "`+string(lampA)+`",
		"publicKey": "a0000000-0000-5000-8000-000000000002", "creationDate": "1700000000000000000",
		"credential": {
			"date": "1700000000000000000", "certificatePem": "-----BEGIN CERTIFICATE-----\n0a\n-----END CERTIFICATE-----\n",
			"validUntilDate": "`+day+`", "serial": "10", "issuerId": "`+issuer+`"
		},
		"requestedBy": "alice-sub", "requestMethod": "csr", "revokedDate": "1700000000000000005", "revocationReason": "keyCompromise",
		"termsVersion": "2", "termsAcceptedBy": "eve", "termsAcceptanceDate": "1700000000000000001"}}`)))
	_, revoked := rs[0]["revokedDate"]
	want(t, "of one that is good", revoked, false)
	want(t, "decimal", rs[0]["credential"].(map[string]any)["serial"], any("65281"))

	name := url.QueryEscape("uuid:" + string(lampA))
	for _, path := range []string{records, "/api/v1/signing/records"} {
		for query, found := range map[string][]string{
			"idFilter=c3":                     {"c3"},
			"idFilter=C3&id_filter=0a":        {"0a", "c3"},
			"idFilter=c3&idFilter=c3":         {"c3"},
			"idFilter=0b":                     nil, // bob's
			"idFilter=0c":                     nil,
			"deviceIdFilter=" + string(lampA): {"ff01", "0a"},
			"deviceIdFilter=" + strings.ToUpper(string(lampB)) + "&deviceIdFilter=" + string(fresh): {"c3", "b2"},
			"deviceIdFilter=" + string(bobs):                        nil,
			"commonNameFilter=" + name:                              {"ff01", "0a"},
			"commonNameFilter=x&commonNameFilter=" + name:           {"ff01", "0a"},
			"commonNameFilter=" + name + "&idFilter=0a&idFilter=c3": {"0a"},
			"nonsense=1": {"ff01", "0a", "c3", "b2"},
		} {
			got := ids(w.get(t, path+"?"+query).results(), "id")
			if slices.Sort(got); !slices.Equal(got, slices.Sorted(slices.Values(found))) {
				t.Errorf("%s: got %v, want %v", query, got, found)
			}
		}
		for query, entry := range map[string]string{
			"idFilter=": "idFilter, entry 1", "idFilter=0a&idFilter=x": "idFilter, entry 2", "idFilter=" + strings.Repeat("a", 41): "idFilter, entry 1",
			"idFilter=" + string(lampA): "idFilter, entry 1", "deviceIdFilter=abc": "deviceIdFilter, entry 1", "commonNameFilter=": "commonNameFilter, entry 1",
		} {
			a := w.get(t, path+"?"+query)
			want(t, query, a.Code, 400)
			want(t, query, a.reason(), "filter-invalid")
			if text := a.json()["message"].(string); !strings.HasPrefix(text, entry) {
				t.Errorf("%s: %s", query, text)
			}
		}
	}
	wantList(t, "bob's", ids(w.do(t, "bob", "GET", records).results(), "id"), "0b")
	want(t, "administrators see their own", w.do(t, "admin", "GET", records).Body.String(), "")
	want(t, "one form", w.get(t, records, "Accept: application/protojson").Header().Get("Content-Type"), "application/json")
	want(t, "CBOR", w.get(t, records, "Accept: application/cbor").Header().Get("Content-Type"), "application/cbor-seq")
	want(t, "unchanged", w.get(t, records, "If-None-Match: "+a.Header().Get("ETag")).Code, 304)
}

func TestSigningRecordsComeInPages(t *testing.T) {
	t.Parallel()
	w, _ := newCertificatesWorld(t)
	for i := range 25 {
		w.certificates.ledger = append(w.certificates.ledger, certificate(fmt.Sprintf("%02x", 200-i*7), lampA))
	}
	var all []string
	for _, c := range w.certificates.ledger {
		if c.Owner == alice {
			all = append(all, c.Serial)
		}
	}
	slices.Sort(all)
	for _, limit := range []int{1, 3, 29, 30} {
		var got []string
		cursor := ""
		for range len(all) {
			rs := w.get(t, fmt.Sprintf("%s?limit=%d&cursor=%s", records, limit, cursor)).results()
			got = append(got, ids(rs, "id")...)
			if cursor, _ = rs[len(rs)-1]["cursor"].(string); cursor == "" {
				break
			}
			want(t, "page", len(rs), limit)
		}
		wantList(t, fmt.Sprint("pages of ", limit), got, all...)
	}
	first := w.get(t, records+"?limit=2").results()
	cursor := first[1]["cursor"].(string)
	want(t, "the rest at once", len(w.get(t, records+"?cursor="+cursor).results()), len(all)-2)
	want(t, "at the other path", len(w.get(t, "/api/v1/signing/records?cursor="+cursor).results()), len(all)-2)
	want(t, "other filters", w.get(t, records+"?idFilter=0a&cursor="+cursor).reason(), "cursor-invalid")
	want(t, "other filters", w.get(t, records+"?commonNameFilter=x&cursor="+cursor).reason(), "cursor-invalid")
	want(t, "another owner", w.do(t, "bob", "GET", records+"?cursor="+cursor).reason(), "cursor-invalid")

	w.certificates.ledger = nil
	for i := range maxSorted + 2 {
		w.certificates.ledger = append(w.certificates.ledger, certificate(fmt.Sprintf("%04x", i), lampA))
	}
	want(t, "the largest page", len(w.get(t, records+"?limit=4000000000").results()), maxSorted)
	want(t, "without limit", len(w.get(t, records).results()), maxSorted+2)

	w.certificates.err = hub.NewError(hub.Unavailable, "store-busy", "busy")
	want(t, "a page that cannot be read", w.get(t, records+"?limit=1").reason(), "store-busy")
	w.certificates.ledger = w.certificates.ledger[:3]
	want(t, "a list that cannot be read", w.get(t, records).reason(), "store-busy")
}

func TestRevokeCertificates(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		query   string
		revoked []string
		reason  hub.RevocationReason
	}{
		{"idFilter=c3", []string{"c3"}, hub.RevokedUnspecified},
		{"idFilter=C3&idFilter=0a&reason=keyCompromise", []string{"0a", "c3"}, hub.RevokedKeyCompromise},
		{"deviceIdFilter=" + string(lampA) + "&reason=unspecified", []string{"ff01", "0a"}, hub.RevokedUnspecified},
		{"deviceIdFilter=" + string(lampA) + "&idFilter=0a", []string{"0a"}, hub.RevokedUnspecified},
		{"deviceIdFilter=" + string(lampA) + "&idFilter=c3", nil, 0},
		{"idFilter=0a&idFilter=c3&commonNameFilter=uuid:" + string(lampB), []string{"c3"}, hub.RevokedUnspecified}, // not passed over: that would revoke more
		{"idFilter=0b", nil, 0}, // bob's
		{"deviceIdFilter=" + string(bobs), nil, 0},
		{"all=true&reason=cessationOfOperation", []string{"ff01", "0a", "c3", "b2"}, hub.RevokedCessation},
		{"all=false&idFilter=b2", []string{"b2"}, hub.RevokedUnspecified},
	} {
		for _, path := range []string{records, "/api/v1/signing/records"} {
			w, log := newCertificatesWorld(t)
			a := w.do(t, "alice", "DELETE", path+"?"+c.query)
			want(t, c.query, a.Body.String(), fmt.Sprintf("{\"count\":\"%d\"}\n", len(c.revoked)))
			var revoked []string
			audited := ""
			for _, e := range w.certificates.ledger {
				if !e.Revoked.IsZero() {
					revoked = append(revoked, e.Serial)
					audited += " serial=" + e.Serial
					want(t, "reason", e.Reason, c.reason)
				}
			}
			wantList(t, c.query, revoked, c.revoked...)
			want(t, "audit", log.entries[0].Target, path+"?"+c.query+audited)
			want(t, "again", w.do(t, "alice", "DELETE", path+"?"+c.query).json()["count"], any("0"))
			want(t, "they stay", len(w.get(t, path).results()), 4)
		}
	}
}

func TestRevokingNeedsAFilterOrAll(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	for query, reason := range map[string]string{
		"":                             "filter-empty",
		"idFilter=":                    "filter-empty",
		"idFilter=c3&deviceIdFilter=":  "filter-empty",
		"commonNameFilter=":            "filter-empty",
		"all=false":                    "filter-empty",
		"reason=superseded":            "filter-empty",
		"all=":                         "query-invalid",
		"all=yes":                      "query-invalid",
		"all=true&idFilter=c3":         "filter-and-all",
		"all=true&deviceIdFilter=":     "filter-and-all",
		"all=true&commonNameFilter=x":  "filter-and-all",
		"all=true&reason=":             "reason-unknown",
		"all=true&reason=bored":        "reason-unknown",
		"all=true&reason=Superseded":   "reason-unknown",
		"idFilter=c3&idFilter=x":       "filter-invalid",
		"idFilter=c3&deviceIdFilter=x": "filter-invalid",
		"idFilter=%zz":                 "query-invalid",
	} {
		a := w.do(t, "alice", "DELETE", records+"?"+query)
		want(t, query, a.Code, 400)
		want(t, query, a.reason(), reason)
	}
	for _, c := range w.certificates.ledger {
		want(t, c.Serial, c.Revoked.IsZero(), true)
	}
	// What was revoked before an error is in the audit log, the first of many by name.
	for i := range 20 {
		w.certificates.ledger = append(w.certificates.ledger, certificate(fmt.Sprintf("aa%02x", i), lampB))
	}
	w.certificates.err = hub.NewError(hub.Unavailable, "store-busy", "busy")
	want(t, "an error", w.do(t, "alice", "DELETE", records+"?deviceIdFilter="+string(lampB)).reason(), "store-busy")
	last := log.entries[len(log.entries)-1]
	want(t, "outcome", last.Outcome, "store-busy")
	want(t, "named", strings.Count(last.Target, " serial="), 16)
	want(t, "counted", strings.HasSuffix(last.Target, " and 5 more"), true)
}

func TestRevocationList(t *testing.T) {
	t.Parallel()
	w, _ := newCertificatesWorld(t)
	list := []byte{0x30, 3, 1, 2, 3}
	w.certificates.list = func(i string) ([]byte, error) {
		if i != issuer {
			return nil, hub.NewError(hub.NotFound, "issuer-unknown", "there is no such issuer")
		}
		return list, nil
	}
	const crl = authority + "/signing/crl/"
	for _, token := range []string{"", "nonsense", "lamp"} { // nobody looks at it
		a := w.do(t, token, "GET", crl+issuer)
		want(t, "status", a.Code, 200)
		want(t, "list", a.Body.String(), string(list))
		want(t, "type", a.Header().Get("Content-Type"), "application/pkix-crl")
		want(t, "caches", a.Header().Get("Cache-Control"), "public, max-age=60")
	}
	a := w.do(t, "", "GET", crl+issuer+"/", "Accept: application/cbor") // has one form
	want(t, "list", a.Body.String(), string(list))
	want(t, "unchanged", w.do(t, "", "GET", crl+issuer, "If-None-Match: "+a.Header().Get("ETag")).Code, 304)
	want(t, "HEAD", w.do(t, "", "HEAD", crl+issuer).Code, 200)
	for path, reason := range map[string]string{
		crl + string(unknown): "issuer-unknown", crl + "x%2Fy": "issuer-unknown", crl + "{issuerId}": "issuer-unknown",
	} {
		a := w.do(t, "", "GET", path)
		want(t, path, a.Code, 404)
		want(t, path, a.reason(), reason)
		want(t, "nobody keeps it", a.Header().Get("Cache-Control"), "no-store")
	}
	want(t, "another host", w.do(t, "", "GET", crl+issuer, "Host: evil.example").Code, 421)
	want(t, "a body over the limit", w.ask(t, "", "GET", crl+issuer, strings.NewReader(strings.Repeat(" ", 1<<20+1))).Code, 413)
	want(t, "POST", w.do(t, "", "POST", crl+issuer).Code, 501)
	w.certificates.list = func(string) ([]byte, error) { panic("no") }
	want(t, "panic", w.do(t, "", "GET", crl+issuer).Code, 500)
}

// The calls need a token with their scope, as all others; where there is no authority they are not there, and what is not there
// below its path is no page of anybody's.
func TestCertificatesNeedTheirScope(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	bare := newWorld(t, func(_ *Config, d *Deps) {
		d.Certificates = nil
		d.Pages = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a page was asked for") })
	})
	n := 0
	for template, methods := range routes {
		if !strings.Contains(template, "/sign") {
			continue
		}
		for method, op := range methods {
			n++
			target := strings.NewReplacer("{issuerId}", issuer, "{request}", "AAAA").Replace(template)
			call := method + " " + target
			token := "alice"
			if op.scope == "" {
				token = ""
			}
			want(t, call+" without an authority", bare.ask(t, token, method, target+"?all=true", strings.NewReader("{}")).reason(), "no-such-path")
			if op.scope == "" {
				continue
			}
			refused := map[string]string{"": "token-missing", "scopeless": "scope-missing", "lamp": "device-token"}
			if method != "GET" {
				refused["reader"] = "scope-missing"
			}
			for token, reason := range refused {
				want(t, call+" by "+token, w.ask(t, token, method, target+"?all=true", strings.NewReader("{}")).reason(), reason)
			}
		}
	}
	want(t, "routes", n, 12)
	want(t, "nothing happened", len(log.entries), 0)
	for _, path := range []string{authority + "/sign", authority + "/signing/crl/", authority + "/signing/crl/a/b", "/certificate-authority/api/v2"} {
		want(t, path, bare.get(t, path).reason(), "no-such-path")
		want(t, path+" without token", bare.do(t, "", "GET", path).reason(), "token-missing")
	}
	want(t, "Allow", w.do(t, "", "PUT", records).Header().Get("Allow"), "DELETE, GET, HEAD")
	want(t, "code", w.do(t, "", "GET", signPath).json()["code"], any(json.Number("12")))
}

// Signing and revoking count among the requests of their owner; the open list does not, and waits for nobody's.
func TestCertificatesAndLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerRate, c.Limits.OwnerBurst = 1, 1 })
	want(t, "first", w.get(t, records).Code, 200)
	for method, target := range map[string]string{"GET": records, "POST": signPath, "DELETE": records + "?all=true"} {
		a := w.do(t, "alice", method, target)
		want(t, method, a.Code, 429)
		want(t, method, a.reason(), "owner-rate")
	}
	for range 3 {
		want(t, "list", w.do(t, "", "GET", authority+"/signing/crl/"+issuer).Code, 200)
	}
}

// The same over gRPC.
func TestCertificatesOverGRPC(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	chain := chainPEM(t, "uuid:"+string(lampA), 0xb7)
	w.certificates.sign = func(o hub.Owner, user string, csr []byte) ([]byte, error) {
		if o != "alice" || string(csr) != csrPEM {
			return nil, hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")
		}
		return chain, nil
	}
	c := capb.NewCertificateAuthorityClient(w.dial(t))
	signed, err := c.SignIdentityCertificate(as(t, "alice"), &capb.SignCertificateRequest{CertificateSigningRequest: []byte(csrPEM)})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "certificate", string(signed.GetCertificate()), string(chain))
	want(t, "audit", log.entries[0].Target, " device="+string(lampA)+" serial=b7")
	_, err = c.SignIdentityCertificate(as(t, "bob"), &capb.SignCertificateRequest{CertificateSigningRequest: []byte(csrPEM)})
	code, reason := reasonOf(t, err)
	want(t, "another's", code.String()+" "+reason, "PermissionDenied device-owned-by-other")
	list := func(token string, r *capb.GetSigningRecordsRequest) (out []*capb.SigningRecord) {
		t.Helper()
		s, err := c.GetSigningRecords(as(t, token), r)
		if err != nil {
			t.Fatal(err)
		}
		for {
			m, err := s.Recv()
			if errors.Is(err, io.EOF) {
				return out
			}
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, m)
		}
	}
	want(t, "alice's", len(list("alice", &capb.GetSigningRecordsRequest{})), 4)
	want(t, "bob's", len(list("bob", &capb.GetSigningRecordsRequest{DeviceIdFilter: []string{string(bobs)}})), 1)
	for _, r := range []*capb.DeleteSigningRecordsRequest{{}, {IdFilter: []string{""}}, {All: true, IdFilter: []string{"0a"}}, {All: true, Reason: "bored"}} {
		_, err := c.DeleteSigningRecords(as(t, "alice"), r)
		code, _ := reasonOf(t, err)
		want(t, r.String(), code.String(), "InvalidArgument")
	}
	n, err := c.DeleteSigningRecords(as(t, "alice"), &capb.DeleteSigningRecordsRequest{DeviceIdFilter: []string{string(lampA)}, Reason: "keyCompromise"})
	if err != nil {
		t.Fatal(err)
	}
	want(t, "count", n.GetCount(), int64(2))
	want(t, "audit", log.entries[len(log.entries)-1].Target, string(lampA)+" serial=ff01 serial=0a")
	got := list("alice", &capb.GetSigningRecordsRequest{IdFilter: []string{"0a"}, CommonNameFilter: []string{"uuid:" + string(lampA)}})
	if len(got) != 1 || got[0].GetRevocationReason() != "keyCompromise" || got[0].GetRevokedDate() == 0 || got[0].GetCredential().GetSerial() != "10" ||
		got[0].GetCredential().GetIssuerId() != issuer || got[0].GetOwner() != "alice" || got[0].GetRequestMethod() != "csr" {
		t.Errorf("%v", got)
	}
	_, err = c.SignIdentityCertificate(as(t, ""), &capb.SignCertificateRequest{})
	code, _ = reasonOf(t, err)
	want(t, "without a token", code.String(), "Unauthenticated")
	_, err = c.DeleteSigningRecords(as(t, "reader"), &capb.DeleteSigningRecordsRequest{All: true})
	code, _ = reasonOf(t, err)
	want(t, "with a token that may read", code.String(), "PermissionDenied")
	w.deps.Certificates = nil
	_, err = c.SignIdentityCertificate(as(t, "alice"), &capb.SignCertificateRequest{})
	code, _ = reasonOf(t, err)
	want(t, "without an authority", code.String(), "Unimplemented")
}

// Questions come in a body, or in a path in whatever form of base64 clients write there, and whoever has the certificate may ask.
func TestCertificateStatus(t *testing.T) {
	t.Parallel()
	w, log := newCertificatesWorld(t)
	from := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	st := hub.CertificateStatus{DER: []byte{0x30, 3, 1, 2, 3}, From: from, Until: from.Add(time.Hour)}
	var asked []byte
	w.certificates.status = func(b []byte) hub.CertificateStatus { asked = b; return st }
	const path = authority + "/signing/ocsp"
	question := []byte{0xfb, 0xef, 0xff, 0xff, 0xff, 0xff, 0xfb, 0xff, 0xff} // ends in a slash
	text := base64.StdEncoding.EncodeToString(question)
	for _, c := range []string{text, url.PathEscape(text), url.QueryEscape(text), base64.URLEncoding.EncodeToString(question)} {
		a := w.do(t, "nonsense", "GET", path+"/"+c)
		want(t, c, a.Code, 200)
		want(t, c, string(asked), string(question))
		want(t, c, a.Body.String(), string(st.DER))
		want(t, c, a.Header().Get("Content-Type"), "application/ocsp-response")
		want(t, c, a.Header().Get("Cache-Control"), "max-age=60, public, no-transform, must-revalidate")
		want(t, c, a.Header().Get("Last-Modified"), "Wed, 02 Jan 2030 03:04:05 GMT")
		want(t, c, a.Header().Get("Expires"), "Wed, 02 Jan 2030 04:04:05 GMT")
		want(t, "unchanged", w.do(t, "", "GET", path+"/"+c, "If-None-Match: "+a.Header().Get("ETag")).Code, 304)
	}
	post := func(body string) answer {
		return w.ask(t, "", "POST", path, strings.NewReader(body), "Content-Type: application/ocsp-request")
	}
	want(t, "POST", post(string(question)).Body.String(), string(st.DER))
	want(t, "POST", string(asked), string(question))
	want(t, "entries in the audit log", len(log.entries), 0)

	asked = []byte("before")
	want(t, "no base64", w.do(t, "", "GET", path+"/%00").Code, 200)
	want(t, "no base64", len(asked), 0)
	want(t, "a large body", post(strings.Repeat("x", maxQuestion+1)).Code, 413)
	want(t, "a long path", w.do(t, "", "GET", path+"/"+strings.Repeat("A", maxQuestion+4)).Code, 413)
	want(t, "no question", w.do(t, "", "GET", path+"/").Code, 501)
	want(t, "another host", w.do(t, "", "GET", path+"/AAAA", "Host: evil.example").Code, 421)

	st = hub.CertificateStatus{DER: []byte{0x30, 3, 0xa, 1, 1}} // for whoever asked only
	a := w.do(t, "", "GET", path+"/AAAA")
	want(t, "caches", a.Header().Get("Cache-Control"), "no-store")
	want(t, "caches", a.Header().Get("ETag")+a.Header().Get("Expires"), "")
	want(t, "caches", post("x").Header().Get("Cache-Control"), "no-store")
}
