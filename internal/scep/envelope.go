package scep

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"

	"github.com/smallstep/pkcs7"
)

// envelopedData is RFC 5652, Section 6.1.
type envelopedData struct {
	Version     int
	Originator  asn1.RawValue   `asn1:"optional,tag:0"`
	Recipients  []asn1.RawValue `asn1:"set"`
	Content     encryptedContent
	Unprotected asn1.RawValue `asn1:"optional,tag:1"`
}

type recipient struct {
	Version   int
	ID        asn1.RawValue
	Algorithm pkix.AlgorithmIdentifier
	Key       []byte
}

type encryptedContent struct {
	Type      asn1.ObjectIdentifier
	Algorithm pkix.AlgorithmIdentifier
	Content   asn1.RawValue `asn1:"optional,tag:0"`
}

// ciphers are what a request may be encrypted with, all in CBC. DES is among them, since it is all that some clients have and do not
// ask: what it would have to hide is hidden by the TLS around it. Nothing is announced of it, and no answer is made with it.
var ciphers = []struct {
	oid asn1.ObjectIdentifier
	key int
	new func([]byte) (cipher.Block, error)
}{
	{pkcs7.OIDEncryptionAlgorithmAES128CBC, 16, aes.NewCipher},
	{pkcs7.OIDEncryptionAlgorithmAES256CBC, 32, aes.NewCipher},
	{pkcs7.OIDEncryptionAlgorithmDESEDE3CBC, 24, des.NewTripleDESCipher},
	{pkcs7.OIDEncryptionAlgorithmDESCBC, 8, des.NewCipher},
}

// Open decrypts what the message is about, for the holder of a certificate: a certificate signing request, or what it is that the
// client asks again for. All errors are Failures; one about the key's encryption looks like one about what it encrypts.
func (r *Request) Open(cert *x509.Certificate, key Key) ([]byte, error) {
	der, err := toDER(r.envelope)
	if err != nil {
		return nil, &Failure{BadMessageCheck, err}
	}
	var ed envelopedData
	if err := unwrap(der, oidEnvelopedData, &ed); err != nil {
		return nil, &Failure{BadMessageCheck, err}
	}
	to, err := recipientOf(ed.Recipients, cert)
	if err != nil {
		return nil, err
	}
	if !to.Algorithm.Algorithm.Equal(oidRSA) {
		return nil, failure(BadAlg, "the key is not encrypted by RSA (PKCS #1 v1.5)")
	}
	text, err := octets(ed.Content.Content)
	if err != nil {
		return nil, &Failure{BadMessageCheck, err}
	}
	for _, c := range ciphers {
		if !c.oid.Equal(ed.Content.Algorithm.Algorithm) {
			continue
		}
		// RFC 5246, Section 7.4.7.1 has the attack: with a length, a wrong padding gives a random key instead of an error.
		k, err := key.Decrypt(rand.Reader, to.Key, &rsa.PKCS1v15DecryptOptions{SessionKeyLen: c.key}) //nolint:staticcheck // SCEP has no other
		if err != nil {
			return nil, &Failure{BadMessageCheck, err}
		}
		block, err := c.new(k)
		if err != nil {
			return nil, &Failure{BadMessageCheck, err}
		}
		var iv []byte
		if unmarshal(ed.Content.Algorithm.Parameters.FullBytes, &iv) != nil || len(iv) != block.BlockSize() ||
			len(text) == 0 || len(text)%block.BlockSize() != 0 {
			return nil, failure(BadMessageCheck, "the content is not encrypted as it says")
		}
		plain := make([]byte, len(text))
		cipher.NewCBCDecrypter(block, iv).CryptBlocks(plain, text)
		pad := int(plain[len(plain)-1])
		if pad == 0 || pad > block.BlockSize() || !bytes.HasSuffix(plain, bytes.Repeat([]byte{byte(pad)}, pad)) {
			return nil, failure(BadMessageCheck, "the content cannot be decrypted")
		}
		return plain[:len(plain)-pad], nil
	}
	return nil, failure(BadAlg, "the content is not encrypted by AES in CBC mode")
}

// recipientOf finds the encrypted key for the holder of a certificate.
func recipientOf(all []asn1.RawValue, cert *x509.Certificate) (recipient, error) {
	if len(all) > maxRecipients {
		return recipient{}, failure(BadMessageCheck, "the message is for too many")
	}
	for _, raw := range all {
		var r recipient
		if unmarshal(raw.FullBytes, &r) == nil && identifies(r.ID, cert) { // else one of another kind
			return r, nil
		}
	}
	return recipient{}, failure(BadMessageCheck, "the message is not encrypted to the registration authority's certificate")
}

// seal encrypts to the holder of a certificate, whose key is RSA, with AES of 128 bits, which all clients have (RFC 8894, Section 2.9).
func seal(content []byte, to *x509.Certificate) ([]byte, error) {
	pub, ok := to.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, failure(BadAlg, "the client's key is not RSA")
	}
	key, iv := make([]byte, 16), make([]byte, aes.BlockSize)
	_, _ = rand.Read(key) // never fails
	_, _ = rand.Read(iv)
	encrypted, err := rsa.EncryptPKCS1v15(rand.Reader, pub, key) //nolint:staticcheck // as above
	if err != nil {
		return nil, &Failure{BadAlg, err}
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("encrypt an answer: %w", err)
	}
	pad := aes.BlockSize - len(content)%aes.BlockSize
	text := append(bytes.Clone(content), bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, iv).CryptBlocks(text, text)
	id, err := asn1.Marshal(issuerAndSerial{asn1.RawValue{FullBytes: to.RawIssuer}, to.SerialNumber})
	if err != nil {
		return nil, fmt.Errorf("name the client: %w", err)
	}
	info, err := asn1.Marshal(recipient{
		ID: asn1.RawValue{FullBytes: id}, Algorithm: pkix.AlgorithmIdentifier{Algorithm: oidRSA, Parameters: asn1.NullRawValue}, Key: encrypted,
	})
	if err != nil {
		return nil, fmt.Errorf("encrypt an answer: %w", err)
	}
	inner, err := asn1.Marshal(envelopedData{Recipients: []asn1.RawValue{{FullBytes: info}}, Content: encryptedContent{
		Type: oidData,
		Algorithm: pkix.AlgorithmIdentifier{
			Algorithm: pkcs7.OIDEncryptionAlgorithmAES128CBC, Parameters: asn1.RawValue{Tag: asn1.TagOctetString, Bytes: iv},
		},
		Content: asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, Bytes: text},
	}})
	if err != nil {
		return nil, fmt.Errorf("encrypt an answer: %w", err)
	}
	return asn1.Marshal(contentInfo{oidEnvelopedData, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true, Bytes: inner}})
}
