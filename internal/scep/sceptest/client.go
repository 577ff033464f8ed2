// Package sceptest makes messages of SCEP as a client does, and reads answers, for tests. It is built on another CMS than the hub's: we
// must not only agree with ourselves.
//
// It must not be used outside of tests.
package sceptest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"
)

func attribute(n int) asn1.ObjectIdentifier {
	return asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, n}
}

// Message is what a client says. Zero fields are what a good client has there.
type Message struct {
	Type        string // "19", PKCSReq
	Transaction string // "transaction 1"
	Nonce       []byte // 16 bytes
	Cipher      int    // of pkcs7, or DES; AES128CBC
	Digest      asn1.ObjectIdentifier
	Content     []byte // what is in the envelope
	// Envelope goes in place of it, as it is.
	Envelope []byte
	// More attributes.
	More []pkcs7.Attribute
}

// ciphering guards pkcs7's choice of a cipher, which is one for all.
var ciphering sync.Mutex

// Sign makes a message to the holder of a certificate, signed by another and with what is above that one.
func (m Message) Sign(t testing.TB, to, by *x509.Certificate, key any, above ...*x509.Certificate) []byte {
	t.Helper()
	if m.Type == "" {
		m.Type = "19"
	}
	if m.Transaction == "" {
		m.Transaction = "transaction 1"
	}
	if m.Nonce == nil {
		m.Nonce = []byte("0123456789abcdef")
	}
	if m.Cipher == 0 {
		m.Cipher = pkcs7.EncryptionAlgorithmAES128CBC
	}
	if m.Digest == nil {
		m.Digest = pkcs7.OIDDigestAlgorithmSHA256
	}
	if m.Envelope == nil {
		m.Envelope = Envelope(t, m.Cipher, m.Content, to)
	}
	sd, err := pkcs7.NewSignedData(m.Envelope)
	if err != nil {
		t.Fatal(err)
	}
	sd.SetDigestAlgorithm(m.Digest)
	attributes := append([]pkcs7.Attribute{
		{Type: attribute(2), Value: m.Type}, {Type: attribute(7), Value: m.Transaction}, {Type: attribute(5), Value: m.Nonce},
	}, m.More...)
	if err := sd.AddSigner(by, key, pkcs7.SignerInfoConfig{ExtraSignedAttributes: attributes}); err != nil {
		t.Fatal(err)
	}
	for _, c := range above {
		sd.AddCertificate(c)
	}
	out, err := sd.Finish()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Named is how a GetCRL names a certificate, by its issuer's name and its serial number.
func Named(t testing.TB, c *x509.Certificate) []byte {
	t.Helper()
	der, err := asn1.Marshal(struct {
		Issuer asn1.RawValue
		Serial *big.Int
	}{asn1.RawValue{FullBytes: c.RawIssuer}, c.SerialNumber})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// DES is the cipher that pkcs7 numbers 0.
const DES = -1

// Envelope encrypts to the holder of a certificate.
func Envelope(t testing.TB, cipher int, content []byte, to *x509.Certificate) []byte {
	t.Helper()
	ciphering.Lock()
	defer ciphering.Unlock()
	was := pkcs7.ContentEncryptionAlgorithm
	defer func() { pkcs7.ContentEncryptionAlgorithm = was }()
	if pkcs7.ContentEncryptionAlgorithm = cipher; cipher == DES {
		pkcs7.ContentEncryptionAlgorithm = pkcs7.EncryptionAlgorithmDESCBC
	}
	out, err := pkcs7.Encrypt(content, []*x509.Certificate{to})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Answer is what a client reads of an answer.
type Answer struct {
	Status, FailInfo, Transaction string
	Nonce                         []byte // the recipient's
	Certificate                   *x509.Certificate
	List                          *x509.RevocationList // in its place
	Content                       []byte               // that either is in
}

// Read reads an answer that the holder of a certificate has signed, to another.
func Read(t testing.TB, answer []byte, by, to *x509.Certificate, key any) Answer {
	t.Helper()
	p, err := pkcs7.Parse(answer)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify(); err != nil {
		t.Fatal(err)
	}
	if signer := p.GetOnlySigner(); signer == nil || !signer.Equal(by) {
		t.Fatal("the answer is signed by somebody else")
	}
	var a Answer
	var kind string
	for n, v := range map[int]any{2: &kind, 3: &a.Status, 6: &a.Nonce, 7: &a.Transaction} {
		if err := p.UnmarshalSignedAttribute(attribute(n), v); err != nil {
			t.Fatal(err)
		}
	}
	if kind != "3" {
		t.Errorf("the answer is of type %s", kind)
	}
	if a.Status == "2" {
		if err := p.UnmarshalSignedAttribute(attribute(4), &a.FailInfo); err != nil {
			t.Fatal(err)
		}
	}
	if a.Status != "0" {
		if p.Content != nil {
			t.Error("an answer without certificate has a content")
		}
		return a
	}
	inner, err := pkcs7.Parse(p.Content)
	if err != nil {
		t.Fatal(err)
	}
	certs, err := inner.Decrypt(to, key)
	if err != nil {
		t.Fatal(err)
	}
	a.Content = certs
	if inner, err = pkcs7.Parse(certs); err != nil || len(inner.Certificates)+len(inner.CRLs) != 1 {
		t.Fatalf("the answer has not one certificate or list: %v", err)
	}
	if len(inner.Certificates) == 0 {
		der, err := asn1.Marshal(inner.CRLs[0])
		if err != nil {
			t.Fatal(err)
		}
		if a.List, err = x509.ParseRevocationList(der); err != nil {
			t.Fatal(err)
		}
		return a
	}
	a.Certificate = inner.Certificates[0]
	return a
}

// CSR makes a request with a challenge, "" for none.
func CSR(t testing.TB, name, challenge string, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	if challenge == "" {
		return der
	}
	// crypto/x509 makes no such attribute, so it is put in, and all is signed once more.
	type info struct {
		Version      int
		Subject, Key asn1.RawValue
		Attributes   []pkcs7.Attribute `asn1:"tag:0,set"`
	}
	var q struct {
		Info      asn1.RawValue
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if _, err := asn1.Unmarshal(der, &q); err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := asn1.Marshal(info{
		0,
		asn1.RawValue{FullBytes: parsed.RawSubject},
		asn1.RawValue{FullBytes: parsed.RawSubjectPublicKeyInfo},
		[]pkcs7.Attribute{{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}, Value: set(t, challenge)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(signed)
	signature, err := key.Sign(rand.Reader, hash[:], crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	q.Info, q.Signature = asn1.RawValue{FullBytes: signed}, asn1.BitString{Bytes: signature, BitLength: len(signature) * 8}
	if der, err = asn1.Marshal(q); err != nil {
		t.Fatal(err)
	}
	return der
}

func set(t testing.TB, v any) asn1.RawValue {
	t.Helper()
	b, err := asn1.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return asn1.RawValue{Tag: asn1.TagSet, IsCompound: true, Bytes: b}
}

// SelfSigned makes a certificate as clients do that have none.
func SelfSigned(t testing.TB, key *rsa.PrivateKey) *x509.Certificate {
	t.Helper()
	now := time.Now()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "SCEP client"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(48 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c
}
