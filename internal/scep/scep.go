// Package scep reads and writes the messages of SCEP (RFC 8894) on the side of the authority: CMS (RFC 5652) around a certificate
// signing request, and around a certificate.
//
// It must not know HTTP, or who decides, and trusts no certificate of its own accord.
package scep

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/internal/est"
)

// MaxMessage bounds a message. One with a request of 4096 bits and a chain of three has about 8 KiB.
const MaxMessage = 64 << 10

const (
	maxTransaction = 256
	maxNonce       = 64 // RFC 8894, Section 3.2.1.5: it has 16 bytes
	maxRecipients  = 16
	maxCerts       = 10
)

// MessageType is what a message is for (RFC 8894, Section 3.2.1.2).
type MessageType string

// The types.
const (
	CertRep    MessageType = "3"
	RenewalReq MessageType = "17"
	PKCSReq    MessageType = "19"
	CertPoll   MessageType = "20"
	GetCRL     MessageType = "22"
)

// FailInfo is why a request is refused (RFC 8894, Section 3.2.1.4).
type FailInfo string

// The reasons.
const (
	BadAlg          FailInfo = "0"
	BadMessageCheck FailInfo = "1" // signature or encryption is wrong
	BadRequest      FailInfo = "2"
	BadTime         FailInfo = "3"
	BadCertID       FailInfo = "4" // nothing is known of what it is about
)

// Failure is an error that the client is told of in a message, since it is one of the message's.
type Failure struct {
	Info FailInfo
	Err  error
}

func (f *Failure) Error() string { return "SCEP failure " + string(f.Info) + ": " + f.Err.Error() }

// Unwrap returns what happened.
func (f *Failure) Unwrap() error { return f.Err }

func failure(info FailInfo, text string) error { return &Failure{info, errors.New(text)} }

// Key is the key of the certificate that clients encrypt to, and that answers are signed by. It is RSA.
type Key interface {
	crypto.Signer
	crypto.Decrypter
}

// Request is a client's message. The key of the first certificate of Chain has signed it; whether that counts for anything is for
// others to say, and what is behind it in Chain is whatever the client sent along.
type Request struct {
	Type        MessageType
	Transaction string
	Chain       []*x509.Certificate
	Signed      time.Time // by the client's clock; zero if it does not say

	transaction, nonce asn1.RawValue // as they came, for the answer
	envelope           []byte
}

var (
	oidSignedData    = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 2}
	oidEnvelopedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}

	oidContentType   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 3}
	oidMessageDigest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 4}
	oidSigningTime   = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 5}
	oidChallenge     = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 7}

	oidMessageType    = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 2}
	oidStatus         = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 3}
	oidFailInfo       = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 4}
	oidSenderNonce    = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 5}
	oidRecipientNonce = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 6}
	oidTransaction    = asn1.ObjectIdentifier{2, 16, 840, 1, 113733, 1, 9, 7}

	oidRSA = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 1}
)

// digests are the hashes that a message may be signed over. SHA-1 is among them for the clients that know no other and look at no
// capabilities: what they sign nobody else has chosen, so nobody has a second message of the same hash for them to have signed.
var digests = []struct {
	oid       asn1.ObjectIdentifier
	hash      crypto.Hash
	algorithm x509.SignatureAlgorithm
	signature asn1.ObjectIdentifier // that says the hash, too; others say only RSA
}{
	{pkcs7.OIDDigestAlgorithmSHA256, crypto.SHA256, x509.SHA256WithRSA, pkcs7.OIDEncryptionAlgorithmRSASHA256},
	{pkcs7.OIDDigestAlgorithmSHA384, crypto.SHA384, x509.SHA384WithRSA, pkcs7.OIDEncryptionAlgorithmRSASHA384},
	{pkcs7.OIDDigestAlgorithmSHA512, crypto.SHA512, x509.SHA512WithRSA, pkcs7.OIDEncryptionAlgorithmRSASHA512},
	{pkcs7.OIDDigestAlgorithmSHA1, crypto.SHA1, x509.SHA1WithRSA, pkcs7.OIDEncryptionAlgorithmRSASHA1},
}

type contentInfo struct {
	Type    asn1.ObjectIdentifier
	Content asn1.RawValue `asn1:"explicit,optional,tag:0"`
}

// signedData is RFC 5652, Section 5.1.
type signedData struct {
	Version      int
	Digests      asn1.RawValue
	Content      contentInfo
	Certificates asn1.RawValue `asn1:"optional,tag:0"`
	Lists        asn1.RawValue `asn1:"optional,tag:1"`
	Signers      []signerInfo  `asn1:"set"`
}

type signerInfo struct {
	Version    int
	ID         asn1.RawValue
	Digest     pkix.AlgorithmIdentifier
	Attributes asn1.RawValue `asn1:"optional,tag:0"`
	Algorithm  pkix.AlgorithmIdentifier
	Signature  []byte
	Unsigned   asn1.RawValue `asn1:"optional,tag:1"`
}

type attribute struct {
	Type   asn1.ObjectIdentifier
	Values asn1.RawValue `asn1:"set"`
}

type issuerAndSerial struct {
	Issuer asn1.RawValue
	Serial *big.Int
}

// Parse reads a message and verifies its signature. If the error is a Failure there is a Request all the same, for an answer; nothing
// else of it is to be believed then.
func Parse(message []byte) (*Request, error) {
	if len(message) > MaxMessage {
		return nil, errors.New("the message is too large")
	}
	der, err := toDER(message)
	if err != nil {
		return nil, err
	}
	var sd signedData
	if err := unwrap(der, oidSignedData, &sd); err != nil {
		return nil, err
	}
	if len(sd.Signers) != 1 {
		return nil, errors.New("the message has not one signer")
	}
	si := sd.Signers[0]
	set := bytes.Clone(si.Attributes.FullBytes)
	if len(set) == 0 {
		return nil, errors.New("the message has no signed attributes")
	}
	set[0] = 0x31 // RFC 5652, Section 5.4: signed is a SET OF, not what stands here
	attributes, err := attributesOf(set)
	if err != nil {
		return nil, err
	}
	r := &Request{transaction: attributes[oidTransaction.String()], nonce: attributes[oidSenderNonce.String()]}
	var nonce []byte
	if unmarshal(r.transaction.FullBytes, &r.Transaction) != nil || r.Transaction == "" || len(r.Transaction) > maxTransaction {
		return nil, errors.New("the message has no good transaction ID")
	}
	if unmarshal(r.nonce.FullBytes, &nonce) != nil || len(nonce) == 0 || len(nonce) > maxNonce {
		return nil, errors.New("the message has no good nonce")
	}
	var kind string
	if err := unmarshal(attributes[oidMessageType.String()].FullBytes, &kind); err != nil {
		return nil, fmt.Errorf("the message's type: %w", err)
	}
	r.Type = MessageType(kind)
	if signed, has := attributes[oidSigningTime.String()]; has {
		if err := unmarshal(signed.FullBytes, &r.Signed); err != nil {
			return r, &Failure{BadTime, err}
		}
	}
	return r, r.verify(sd, si, attributes, set)
}

func (r *Request) verify(sd signedData, si signerInfo, attributes map[string]asn1.RawValue, set []byte) error {
	content, err := eContent(sd.Content)
	if err != nil {
		return &Failure{BadMessageCheck, err}
	}
	r.envelope = content
	if err := r.chain(sd.Certificates.Bytes, si.ID); err != nil {
		return &Failure{BadMessageCheck, err}
	}
	// RFC 8894, Section 3.2.2: the answer is encrypted to this key.
	key, ok := r.Chain[0].PublicKey.(*rsa.PublicKey)
	if !ok || key.N.BitLen() < 2048 || key.N.BitLen() > 8192 {
		return failure(BadAlg, "the signer's key is not RSA of 2048 to 8192 bits")
	}
	for _, d := range digests {
		if !d.oid.Equal(si.Digest.Algorithm) {
			continue
		}
		if !si.Algorithm.Algorithm.Equal(oidRSA) && !si.Algorithm.Algorithm.Equal(d.signature) {
			break
		}
		// RFC 5652, Section 5.4: what is signed are the attributes, and they say what the content is and its hash.
		var kind asn1.ObjectIdentifier
		var digest []byte
		h := d.hash.New()
		h.Write(content)
		if unmarshal(attributes[oidContentType.String()].FullBytes, &kind) != nil || !kind.Equal(sd.Content.Type) ||
			unmarshal(attributes[oidMessageDigest.String()].FullBytes, &digest) != nil || subtle.ConstantTimeCompare(digest, h.Sum(nil)) != 1 {
			return failure(BadMessageCheck, "the signed attributes are of another content")
		}
		if err := r.Chain[0].CheckSignature(d.algorithm, set, si.Signature); err != nil {
			return &Failure{BadMessageCheck, err}
		}
		return nil
	}
	return failure(BadAlg, "the message is not signed by RSA and SHA-2")
}

// chain reads the certificates that came with a message, and puts the signer's first.
func (r *Request) chain(certs []byte, signer asn1.RawValue) error {
	all, err := x509.ParseCertificates(certs)
	if err != nil {
		return err
	}
	if len(all) > maxCerts {
		return errors.New("the message has too many certificates")
	}
	for i, c := range all {
		if identifies(signer, c) {
			all[0], all[i] = all[i], all[0]
			r.Chain = all
			return nil
		}
	}
	return errors.New("the signer's certificate is not with the message")
}

// identifies reports whether a certificate is the one that a SignerIdentifier or RecipientIdentifier means: by issuer and serial
// number, or by the key's identifier (RFC 5652, Sections 5.3 and 6.2.1).
func identifies(id asn1.RawValue, c *x509.Certificate) bool {
	if id.Class == asn1.ClassContextSpecific && id.Tag == 0 {
		return len(c.SubjectKeyId) > 0 && bytes.Equal(id.Bytes, c.SubjectKeyId)
	}
	var is issuerAndSerial
	return unmarshal(id.FullBytes, &is) == nil && bytes.Equal(is.Issuer.FullBytes, c.RawIssuer) && is.Serial.Cmp(c.SerialNumber) == 0
}

// attributesOf reads a set of attributes, each of one value and once (RFC 5652, Section 11).
func attributesOf(set []byte) (map[string]asn1.RawValue, error) {
	var list []attribute
	if rest, err := asn1.UnmarshalWithParams(set, &list, "set"); err != nil || len(rest) > 0 {
		return nil, errors.New("the signed attributes are none")
	}
	out := make(map[string]asn1.RawValue, len(list))
	for _, a := range list {
		var v asn1.RawValue
		if _, twice := out[a.Type.String()]; twice || unmarshal(a.Values.Bytes, &v) != nil {
			return nil, errors.New("a signed attribute has not one value")
		}
		out[a.Type.String()] = v
	}
	return out, nil
}

// eContent is what a message contains.
func eContent(c contentInfo) ([]byte, error) {
	var v asn1.RawValue
	if !c.Type.Equal(oidData) || unmarshal(c.Content.Bytes, &v) != nil || v.Class != asn1.ClassUniversal || v.Tag != asn1.TagOctetString {
		return nil, errors.New("the message contains no data")
	}
	return octets(v)
}

// unwrap reads a ContentInfo of that type.
func unwrap(der []byte, kind asn1.ObjectIdentifier, v any) error {
	var c contentInfo
	if err := unmarshal(der, &c); err != nil {
		return err
	}
	if !c.Type.Equal(kind) {
		return errors.New("the message is of another type of content")
	}
	return unmarshal(c.Content.Bytes, v)
}

func unmarshal(der []byte, v any) error {
	rest, err := asn1.Unmarshal(der, v)
	if err == nil && len(rest) > 0 {
		err = errors.New("something follows")
	}
	return err
}

// Challenge is the challengePassword of a certificate signing request, DER (RFC 2985, Section 5.4.1); "" if it has none.
func Challenge(csr []byte) (string, error) {
	var q struct {
		Info struct {
			Version    int
			Subject    asn1.RawValue
			Key        asn1.RawValue
			Attributes []asn1.RawValue `asn1:"tag:0,set"`
		}
		Algorithm asn1.RawValue
		Signature asn1.BitString
	}
	if err := unmarshal(csr, &q); err != nil {
		return "", fmt.Errorf("read a request: %w", err)
	}
	challenge := ""
	for _, raw := range q.Info.Attributes {
		var a attribute
		if unmarshal(raw.FullBytes, &a) != nil || !a.Type.Equal(oidChallenge) {
			continue
		}
		if challenge != "" {
			return "", errors.New("a request has two challenges")
		}
		if err := unmarshal(a.Values.Bytes, &challenge); err != nil {
			return "", fmt.Errorf("read a request's challenge: %w", err)
		}
	}
	return challenge, nil
}

// maxSerial is RFC 5280, Section 4.1.2.2, in bits.
const maxSerial = 20 * 8

// IssuerAndSerial reads what a GetCRL contains: a certificate by the name of its issuer, DER, and its serial number.
func IssuerAndSerial(der []byte) (issuer []byte, serial *big.Int, err error) {
	var is issuerAndSerial
	if err := unmarshal(der, &is); err != nil {
		return nil, nil, fmt.Errorf("read which certificate is meant: %w", err)
	}
	if is.Serial.Sign() <= 0 || is.Serial.BitLen() > maxSerial {
		return nil, nil, errors.New("a certificate has no such serial number")
	}
	return is.Issuer.FullBytes, is.Serial, nil
}

// Success is the answer with a certificate, encrypted to the client.
func (r *Request) Success(by *x509.Certificate, key Key, issued *x509.Certificate) ([]byte, error) {
	certs, err := est.CertsOnly([]*x509.Certificate{issued})
	if err != nil {
		return nil, err
	}
	envelope, err := seal(certs, r.Chain[0])
	if err != nil {
		return nil, err
	}
	return r.answer(by, key, envelope, pkcs7.Attribute{Type: oidStatus, Value: "0"})
}

// SuccessList is the answer to GetCRL: a revocation list, DER, encrypted to the client (RFC 8894, Section 3.3.4).
func (r *Request) SuccessList(by *x509.Certificate, key Key, list []byte) ([]byte, error) {
	inner, err := asn1.Marshal(signedData{
		Version: 1, Digests: asn1.RawValue{Tag: asn1.TagSet, IsCompound: true}, Content: contentInfo{Type: oidData},
		Lists: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 1, IsCompound: true, Bytes: list},
	})
	if err != nil {
		return nil, fmt.Errorf("pack a revocation list: %w", err)
	}
	der, err := asn1.Marshal(contentInfo{oidSignedData, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}})
	if err != nil {
		return nil, fmt.Errorf("pack a revocation list: %w", err)
	}
	envelope, err := seal(der, r.Chain[0])
	if err != nil {
		return nil, err
	}
	return r.answer(by, key, envelope, pkcs7.Attribute{Type: oidStatus, Value: "0"})
}

// Pending is the answer that somebody has to decide first.
func (r *Request) Pending(by *x509.Certificate, key Key) ([]byte, error) {
	return r.answer(by, key, nil, pkcs7.Attribute{Type: oidStatus, Value: "3"})
}

// Refuse is the answer that there will be no certificate.
func (r *Request) Refuse(by *x509.Certificate, key Key, info FailInfo) ([]byte, error) {
	return r.answer(by, key, nil, pkcs7.Attribute{Type: oidStatus, Value: "2"}, pkcs7.Attribute{Type: oidFailInfo, Value: string(info)})
}

// answer signs a CertRep (RFC 8894, Section 3.3.2).
func (r *Request) answer(by *x509.Certificate, key Key, envelope []byte, status ...pkcs7.Attribute) ([]byte, error) {
	nonce := make([]byte, 16)
	_, _ = rand.Read(nonce) // never fails
	sd, err := pkcs7.NewSignedData(envelope)
	if err != nil {
		return nil, fmt.Errorf("make an answer: %w", err)
	}
	sd.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	err = sd.AddSigner(by, key, pkcs7.SignerInfoConfig{ExtraSignedAttributes: append([]pkcs7.Attribute{
		{Type: oidTransaction, Value: r.transaction},
		{Type: oidMessageType, Value: string(CertRep)},
		{Type: oidSenderNonce, Value: nonce},
		{Type: oidRecipientNonce, Value: r.nonce},
	}, status...)})
	if err != nil {
		return nil, fmt.Errorf("sign an answer: %w", err)
	}
	// RFC 8017 has the hash in the name, too, and so the library; strongSwan takes only the plain one, which all do (RFC 3370, Section 3.2).
	sd.GetSignedData().SignerInfos[0].DigestEncryptionAlgorithm = pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue}
	if envelope == nil {
		sd.Detach() // RFC 8894, Section 3.3.2: then it has no content at all
	}
	out, err := sd.Finish()
	if err != nil {
		return nil, fmt.Errorf("make an answer: %w", err)
	}
	return out, nil
}
