package scep

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/internal/scep/sceptest"
)

// registrar is the same in each process, so that the fuzzer's corpus can be decrypted.
func registrar(t testing.TB) (*x509.Certificate, *rsa.PrivateKey) {
	t.Helper()
	b, err := os.ReadFile("testdata/registrar.pem")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.X509KeyPair(b, b)
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf, pair.PrivateKey.(*rsa.PrivateKey)
}

var clientKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

// What a client of another house says is read, with each cipher and hash that there are clients for, and with lengths as BER has them.
func TestParse(t *testing.T) {
	cert, key := registrar(t)
	own := sceptest.SelfSigned(t, clientKey())
	csr := sceptest.CSR(t, "lamp", "the challenge", clientKey())
	for name, m := range map[string]sceptest.Message{
		"AES-128, SHA-256": {},
		"AES-256, SHA-512": {Cipher: pkcs7.EncryptionAlgorithmAES256CBC, Digest: pkcs7.OIDDigestAlgorithmSHA512},
		"SHA-384":          {Digest: pkcs7.OIDDigestAlgorithmSHA384},
		"DES, SHA-1":       {Cipher: sceptest.DES, Digest: pkcs7.OIDDigestAlgorithmSHA1},
		"renewal":          {Type: "17", Transaction: "A-Za+/=", Nonce: []byte{1}},
		"envelope in BER":  {Envelope: indefinite(t, sceptest.Envelope(t, pkcs7.EncryptionAlgorithmAES128CBC, csr, cert))},
	} {
		t.Run(name, func(t *testing.T) {
			m.Content = csr
			message := m.Sign(t, cert, own, clientKey(), cert)
			for _, b := range [][]byte{message, indefinite(t, message)} {
				r, err := Parse(b)
				if err != nil {
					t.Fatal(err)
				}
				if len(r.Chain) != 2 || !r.Chain[0].Equal(own) || !r.Chain[1].Equal(cert) || time.Since(r.Signed).Abs() > time.Minute {
					t.Errorf("the chain has %d, signed at %v", len(r.Chain), r.Signed)
				}
				if m.Type != "" && (string(r.Type) != m.Type || r.Transaction != m.Transaction) {
					t.Errorf("it is %s of %s", r.Type, r.Transaction)
				}
				got, err := r.Open(cert, key)
				if err != nil || !bytes.Equal(got, csr) {
					t.Fatalf("it contains %d bytes, %v", len(got), err)
				}
				if challenge, err := Challenge(got); err != nil || challenge != "the challenge" {
					t.Errorf("the challenge is %q, %v", challenge, err)
				}
			}
		})
	}
	if challenge, err := Challenge(sceptest.CSR(t, "lamp", "", clientKey())); err != nil || challenge != "" {
		t.Errorf("without a challenge it is %q, %v", challenge, err)
	}
}

// indefinite writes DER with all lengths of what has elements in the indefinite form, and octet strings in pieces.
func indefinite(t testing.TB, der []byte) []byte {
	t.Helper()
	var out []byte
	for rest := der; len(rest) > 0; {
		var v asn1.RawValue
		next, err := asn1.Unmarshal(rest, &v)
		if err != nil {
			t.Fatal(err)
		}
		switch element := rest[:len(rest)-len(next)]; {
		// What is signed as it is stays as it is: certificates and attributes ([0] in both); see also what is in an envelope's [0].
		case v.Tag == asn1.TagOctetString && v.Class == asn1.ClassUniversal && len(v.Bytes) > 100:
			out = append(out, 0x24, 0x80, 0x04, 50)
			out = append(out, v.Bytes[:50]...)
			tail, err := asn1.Marshal(v.Bytes[50:])
			if err != nil {
				t.Fatal(err)
			}
			out = append(append(out, tail...), 0, 0)
		case !v.IsCompound || v.Tag == asn1.TagSet && v.Class == asn1.ClassUniversal, v.Class == asn1.ClassContextSpecific && len(out) > 40:
			out = append(out, element...)
		default:
			out = append(append(append(out, element[0], 0x80), indefinite(t, v.Bytes)...), 0, 0)
		}
		rest = next
	}
	return out
}

// A message of which something is wrong is refused for what is wrong, and what cannot be answered is no message.
func TestParseRefuses(t *testing.T) {
	cert, key := registrar(t)
	own := sceptest.SelfSigned(t, clientKey())
	csr := sceptest.CSR(t, "lamp", "", clientKey())
	good := sceptest.Message{Content: csr}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ofEC := &x509.Certificate{SerialNumber: big.NewInt(7), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, ofEC, ofEC, &ec.PublicKey, ec)
	if err != nil {
		t.Fatal(err)
	}
	if ofEC, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	changed := func(b []byte, at int) []byte { // counted from the end
		b = bytes.Clone(b)
		b[len(b)-at] ^= 1
		return b
	}
	envelope := sceptest.Envelope(t, pkcs7.EncryptionAlgorithmAES128CBC, csr, cert)
	message := sceptest.Message{Envelope: envelope}.Sign(t, cert, own, clientKey())
	// A byte of the content before the last two blocks, with which it can be decrypted all the same.
	tampered := changed(message, len(message)-bytes.Index(message, envelope)-len(envelope)+40)
	twice := sceptest.Message{Content: csr, More: []pkcs7.Attribute{{Type: oidMessageType, Value: "19"}}}
	for name, c := range map[string]struct {
		message []byte
		want    FailInfo // "": nobody can answer
	}{
		"empty":            {nil, ""},
		"text":             {[]byte("operation"), ""},
		"cut":              {message[:len(message)-1], ""},
		"a certificate":    {own.Raw, ""},
		"only an envelope": {sceptest.Envelope(t, pkcs7.EncryptionAlgorithmAES128CBC, csr, cert), ""},
		"too large":        {append(bytes.Clone(message), make([]byte, MaxMessage)...), ""},
		"deeply nested":    {bytes.Repeat([]byte{0x30, 0x80}, 20_000), ""},
		"no nonce":         {sceptest.Message{Content: csr, Nonce: []byte{}}.Sign(t, cert, own, clientKey()), ""},
		"long transaction": {sceptest.Message{Content: csr, Transaction: strings.Repeat("x", 257)}.Sign(t, cert, own, clientKey()), ""},
		"two types":        {twice.Sign(t, cert, own, clientKey()), ""},

		"another content":      {tampered, BadMessageCheck},
		"another signature":    {changed(message, 1), BadMessageCheck},
		"key of another":       {good.Sign(t, cert, own, key), BadMessageCheck},
		"EC signer":            {good.Sign(t, cert, ofEC, ec), BadAlg},
		"RSA of 1024":          {good.Sign(t, cert, sceptest.SelfSigned(t, small), small), BadAlg},
		"to somebody else":     {good.Sign(t, own, own, clientKey()), BadMessageCheck},
		"not encrypted":        {sceptest.Message{Envelope: csr}.Sign(t, cert, own, clientKey()), BadMessageCheck},
		"GCM":                  {sceptest.Message{Content: csr, Cipher: pkcs7.EncryptionAlgorithmAES128GCM}.Sign(t, cert, own, clientKey()), BadAlg},
		"a byte of the cipher": {sceptest.Message{Envelope: changed(sceptest.Envelope(t, pkcs7.EncryptionAlgorithmAES128CBC, csr, cert), 17)}.Sign(t, cert, own, clientKey()), BadMessageCheck},
	} {
		r, err := Parse(c.message)
		if err == nil {
			_, err = r.Open(cert, key)
		}
		var f *Failure
		switch {
		case err == nil:
			t.Errorf("%s: taken", name)
		case c.want == "" && r != nil:
			t.Errorf("%s: %v is a message", name, err)
		case c.want != "" && (r == nil || !errors.As(err, &f) || f.Info != c.want):
			t.Errorf("%s: %v, want failInfo %s", name, err, c.want)
		}
	}
	nested := append(bytes.Repeat([]byte{0x30, 0x80}, maxDepth+2), make([]byte, 2*(maxDepth+2))...)
	if _, err := toDER(nested); err == nil {
		t.Error("there is no end to nesting")
	}
	if _, err := toDER([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff, 0, 0}); err == nil { // less than nothing for a hub of 32 bits
		t.Error("a length of 4 GiB was taken")
	}
	if _, err := (&Request{envelope: nil}).Open(cert, key); err == nil {
		t.Error("nothing was opened")
	}
	// What is wrong about the key looks like what is wrong about the content. By chance nothing is, one time in 256.
	for range 4 {
		var f *Failure
		bad := &Request{envelope: changed(envelope, len(envelope)-bytes.Index(envelope, []byte{0x04, 0x82, 0x01, 0x00})-60)}
		if _, err := bad.Open(cert, key); err != nil && (!errors.As(err, &f) || f.Info != BadMessageCheck || !strings.Contains(err.Error(), "the content")) {
			t.Errorf("with another encrypted key: %v", err)
		}
	}
}

// An answer is signed by the registrar, of the client's transaction and nonce, and only with a certificate it has a content, encrypted
// with AES to the client.
func TestAnswers(t *testing.T) {
	cert, key := registrar(t)
	own := sceptest.SelfSigned(t, clientKey())
	nonce := []byte("a nonce of client")
	r, err := Parse(sceptest.Message{Content: sceptest.CSR(t, "lamp", "", clientKey()), Transaction: "A+/=", Nonce: nonce}.Sign(t, cert, own, clientKey()))
	if err != nil {
		t.Fatal(err)
	}
	check := func(b []byte, err error) sceptest.Answer {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		a := sceptest.Read(t, b, cert, own, clientKey())
		if a.Transaction != "A+/=" || !bytes.Equal(a.Nonce, nonce) {
			t.Errorf("the answer is of transaction %q, nonce %q", a.Transaction, a.Nonce)
		}
		return a
	}
	success, err := r.Success(cert, key, cert)
	if a := check(success, err); a.Status != "0" || !a.Certificate.Equal(cert) {
		t.Errorf("success is %+v", a)
	}
	if aes, _ := asn1.Marshal(pkcs7.OIDEncryptionAlgorithmAES128CBC); !bytes.Contains(success, aes) {
		t.Error("the answer is not encrypted by AES")
	}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(7), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
	}, signing(cert), key)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := r.SuccessList(cert, key, list)
	a := check(answer, err)
	if a.Status != "0" || a.List == nil || !bytes.Equal(a.List.Raw, list) {
		t.Errorf("a list is %+v", a)
	}
	if openssl, err := exec.LookPath("openssl"); err == nil { // who reads it as others do
		cmd := exec.CommandContext(t.Context(), openssl, "pkcs7", "-inform", "DER", "-print_certs")
		cmd.Stdin = bytes.NewReader(a.Content)
		if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("BEGIN X509 CRL")) {
			t.Errorf("openssl says of the list: %s, %v", out, err)
		}
	}
	if a := check(r.Pending(cert, key)); a.Status != "3" {
		t.Errorf("pending is %+v", a)
	}
	if a := check(r.Refuse(cert, key, BadCertID)); a.Status != "2" || a.FailInfo != "4" {
		t.Errorf("refused is %+v", a)
	}
}

// signing is a certificate that may sign lists.
func signing(c *x509.Certificate) *x509.Certificate {
	out := *c
	out.KeyUsage |= x509.KeyUsageCRLSign
	out.SubjectKeyId = []byte{1}
	return &out
}

// A certificate is named by its issuer's name and a serial number as there are.
func TestIssuerAndSerial(t *testing.T) {
	cert, _ := registrar(t)
	issuer, serial, err := IssuerAndSerial(sceptest.Named(t, cert))
	if err != nil || !bytes.Equal(issuer, cert.RawIssuer) || serial.Cmp(cert.SerialNumber) != 0 {
		t.Errorf("%x %v, %v", issuer, serial, err)
	}
	for name, serial := range map[string]*big.Int{
		"0": new(big.Int), "negative": big.NewInt(-1), "of 21 bytes": new(big.Int).Lsh(big.NewInt(1), maxSerial),
	} {
		c := *cert
		c.SerialNumber = serial
		if _, _, err := IssuerAndSerial(sceptest.Named(t, &c)); err == nil {
			t.Errorf("the serial number %s is taken", name)
		}
	}
	if _, _, err := IssuerAndSerial([]byte("x")); err == nil {
		t.Error("nonsense is taken")
	}
}

// Nothing that comes from the network does more than be refused.
func FuzzMessage(f *testing.F) {
	cert, key := registrar(f)
	own := sceptest.SelfSigned(f, clientKey())
	csr := sceptest.CSR(f, "lamp", "the challenge", clientKey())
	named := sceptest.Named(f, cert)
	envelope := sceptest.Envelope(f, pkcs7.EncryptionAlgorithmAES128CBC, csr, cert)
	message := sceptest.Message{Envelope: envelope}.Sign(f, cert, own, clientKey(), cert)
	for _, b := range [][]byte{
		message, envelope, csr, indefinite(f, message), sceptest.Envelope(f, sceptest.DES, csr, cert), named,
		sceptest.Message{Type: "22", Content: named}.Sign(f, cert, own, clientKey()),
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Parse(b)
		var failed *Failure
		if (r == nil) == (err == nil || errors.As(err, &failed)) {
			t.Errorf("%v, %v", r, err)
		}
		if r != nil && (r.Transaction == "" || len(r.Transaction) > maxTransaction || err == nil && len(r.Chain) == 0) {
			t.Errorf("%+v", r)
		}
		if der, err := toDER(b); err == nil {
			if again, err := toDER(der); err != nil || !bytes.Equal(der, again) || len(der) > len(b) {
				t.Errorf("%x, then %x, %v", der, again, err)
			}
		}
		if _, err := (&Request{envelope: b}).Open(cert, key); err != nil && !errors.As(err, &failed) {
			t.Error(err)
		}
		_, _ = Challenge(b)
		if issuer, serial, err := IssuerAndSerial(b); err == nil && (len(issuer) == 0 || serial.Sign() <= 0 || serial.BitLen() > maxSerial) {
			t.Errorf("%x %v", issuer, serial)
		}
	})
}
