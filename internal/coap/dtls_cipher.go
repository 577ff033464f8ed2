package coap

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/gob"
	"errors"
	"fmt"
	"hash"
	"sync"

	"github.com/pion/dtls/v3"
	"github.com/pion/dtls/v3/pkg/crypto/ccm"
	"github.com/pion/dtls/v3/pkg/crypto/prf"
)

const (
	fixedNonce    = 4 // of each nonce, made with the keys (RFC 5288, Section 3; RFC 6655, Section 3)
	explicitNonce = 8 // stands in each record
	fullNonce     = fixedNonce + explicitNonce
	maxTag        = 16
	maxCID        = 255
	maxAdditional = 23 + maxCID
	// maxOverhead is what sealing adds to a datagram at most: header, connection ID, nonce, inner type and tag.
	maxOverhead = recordHeader + maxCID + explicitNonce + 1 + maxTag
	// dataEpoch is the only epoch with keys: there is no renegotiation.
	dataEpoch = 1
	// maxSequence is the last number of an epoch; the association is of no use then (RFC 6347, Section 4.1).
	maxSequence = 1<<48 - 1
)

// cipherState seals and opens the records of an association once its handshake, which is pion's, is complete (RFC 6347,
// Section 4.1.2). pion would keep three goroutines and some 40 KiB for each; this is two ciphers and some numbers.
type cipherState struct {
	in, out     cipher.AEAD
	inIV, outIV [fixedNonce]byte
	withCID     bool   // the peer's records have a connection ID of ours
	outCID      []byte // the peer's; empty: it wants none
	replay      replayWindow
	next        uint64 // sequence number of the next record of ours; guarded by the association's mu
}

// suite is what a cipher suite means for records.
type suite struct {
	keySize int
	aead    func(cipher.Block) (cipher.AEAD, error)
	hash    func() hash.Hash // of the PRF
}

func withCCM(tag int) func(cipher.Block) (cipher.AEAD, error) {
	return func(b cipher.Block) (cipher.AEAD, error) { return ccm.NewCCM(b, tag, fullNonce) }
}

// suites are those of certificateSuites and pskSuites.
var suites = map[dtls.CipherSuiteID]suite{
	dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8:      {16, withCCM(8), sha256.New},
	dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM:        {16, withCCM(16), sha256.New},
	dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256: {16, cipher.NewGCM, sha256.New},
	dtls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384: {32, cipher.NewGCM, sha512.New384},
	dtls.TLS_PSK_WITH_AES_128_CCM_8:              {16, withCCM(8), sha256.New},
	dtls.TLS_PSK_WITH_AES_128_CCM:                {16, withCCM(16), sha256.New},
	dtls.TLS_PSK_WITH_AES_128_GCM_SHA256:         {16, cipher.NewGCM, sha256.New},
	dtls.TLS_PSK_WITH_AES_256_CCM_8:              {32, withCCM(8), sha256.New},
}

// handshakeResult is what pion's exported state says about keys; gob finds the fields by name.
type handshakeResult struct {
	LocalEpoch         uint16
	LocalRandom        [32]byte
	RemoteRandom       [32]byte
	CipherSuiteID      uint16
	MasterSecret       []byte
	SequenceNumber     uint64
	LocalConnectionID  []byte
	RemoteConnectionID []byte
}

var errNoKeys = errors.New("the handshake has left no keys")

// newCipherState takes the keys of a server's complete handshake from pion.
func newCipherState(conn *dtls.Conn) (*cipherState, error) {
	state, ok := conn.ConnectionState()
	if !ok {
		return nil, errNoKeys
	}
	b, err := state.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("export the state of a DTLS handshake: %w", err)
	}
	var h handshakeResult
	if err := gob.NewDecoder(bytes.NewReader(b)).Decode(&h); err != nil {
		return nil, fmt.Errorf("read the state of a DTLS handshake: %w", err)
	}
	how, ok := suites[dtls.CipherSuiteID(h.CipherSuiteID)]
	if !ok || h.LocalEpoch != dataEpoch || len(h.MasterSecret) == 0 {
		return nil, errNoKeys
	}
	keys, err := prf.GenerateEncryptionKeys(h.MasterSecret, h.RemoteRandom[:], h.LocalRandom[:], 0, how.keySize, fixedNonce, how.hash)
	if err != nil {
		return nil, fmt.Errorf("derive the keys of a DTLS association: %w", err)
	}
	c := &cipherState{next: h.SequenceNumber, withCID: len(h.LocalConnectionID) > 0, outCID: bytes.Clone(h.RemoteConnectionID)}
	copy(c.inIV[:], keys.ClientWriteIV)
	copy(c.outIV[:], keys.ServerWriteIV)
	if c.in, err = how.cipher(keys.ClientWriteKey); err != nil {
		return nil, err
	}
	if c.out, err = how.cipher(keys.ServerWriteKey); err != nil {
		return nil, err
	}
	return c, nil
}

func (s *suite) cipher(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("make the cipher of a DTLS association: %w", err)
	}
	return s.aead(block)
}

// cipherParameters are what a cipher is called with, from a pool: the compiler cannot tell that no cipher keeps them.
type cipherParameters struct {
	nonce      [fullNonce]byte
	additional [maxAdditional]byte
}

var parameters = sync.Pool{New: func() any { return new(cipherParameters) }}

// appendAdditional appends what a record's tag protects besides its content (RFC 6347, Section 4.1.2.1 and RFC 5246, Section
// 6.2.3.3; with a connection ID RFC 9146, Section 5.3). size is that of the content in the clear.
func appendAdditional(b []byte, typ byte, version, epochSeq, cid []byte, size int) []byte {
	if typ == recordCID {
		b = binary.BigEndian.AppendUint64(b, ^uint64(0))
		b = append(b, recordCID, byte(len(cid)), recordCID) // a connection ID has at most 255 bytes
		b = append(append(append(b, version...), epochSeq...), cid...)
	} else {
		b = append(append(append(b, epochSeq...), typ), version...)
	}
	return binary.BigEndian.AppendUint16(b, uint16(size)) //nolint:gosec // of a datagram
}

// size is that of a record with so many bytes of content.
func (c *cipherState) size(content int) int {
	n := recordHeader + len(c.outCID) + explicitNonce + content + c.out.Overhead()
	if len(c.outCID) > 0 {
		n++ // the type
	}
	return n
}

// seal appends a record with the sequence number seq, which must be used once.
func (c *cipherState) seal(b []byte, seq uint64, typ byte, content []byte) []byte {
	start, outer, size := len(b), typ, len(content)
	if len(c.outCID) > 0 {
		outer = recordCID
		size++
	}
	b = append(b, outer, 0xfe, 0xfd)
	b = binary.BigEndian.AppendUint64(b, dataEpoch<<48|seq)
	b = append(b, c.outCID...)
	b = binary.BigEndian.AppendUint16(b, uint16(explicitNonce+size+c.out.Overhead())) //nolint:gosec // of a datagram
	header := b[start:]

	p := parameters.Get().(*cipherParameters)
	defer parameters.Put(p)
	copy(p.nonce[:], c.outIV[:])
	copy(p.nonce[fixedNonce:], header[3:11]) // epoch and number, which no other record has
	additional := appendAdditional(p.additional[:0], outer, header[1:3], header[3:11], c.outCID, size)

	b = append(b, p.nonce[fixedNonce:]...)
	at := len(b)
	b = append(b, content...)
	if outer == recordCID {
		b = append(b, typ) // RFC 9146, Section 4: the type is inside; we do not pad
	}
	return c.out.Seal(b[:at], p.nonce[:], b[at:], additional)
}

// open decrypts a record in its place. newest reports that no later one was opened before. ok is false for what the peer did
// not seal, and for what was opened before, unless it is of the handshake. The caller alone may use the state's incoming side meanwhile.
func (c *cipherState) open(r *record) (typ byte, content []byte, newest, ok bool) {
	overhead := explicitNonce + c.in.Overhead()
	if r.epoch != dataEpoch || (r.typ == recordCID) != c.withCID || len(r.body) < overhead {
		return 0, nil, false, false
	}
	p := parameters.Get().(*cipherParameters)
	defer parameters.Put(p)
	copy(p.nonce[:], c.inIV[:])
	copy(p.nonce[fixedNonce:], r.body)
	additional := appendAdditional(p.additional[:0], r.typ, r.raw[1:3], r.raw[3:11], r.cid[:], len(r.body)-overhead)
	sealed := r.body[explicitNonce:]
	content, err := c.in.Open(sealed[:0], p.nonce[:], sealed, additional)
	if err != nil {
		return 0, nil, false, false
	}
	typ = r.typ
	if typ == recordCID {
		content = bytes.TrimRight(content, "\x00")
		if len(content) == 0 { // RFC 9146, Section 4: no content is all padding
			return 0, nil, false, false
		}
		typ, content = content[len(content)-1], content[:len(content)-1]
	}
	again, newest := c.replay.take(r.seq)
	if again && typ != recordHandshake { // of a handshake a repetition is wanted, see association.repeat
		return 0, nil, false, false
	}
	return typ, content, newest, true
}

// replayWindow remembers which of the newest 64 records have been opened (RFC 6347, Section 4.1.2.6). The zero value has
// opened none.
type replayWindow struct {
	newest uint64 // plus one; 0: none
	seen   uint64 // bit n is newest-n
}

// take notes a sequence number. again reports that it was taken before, or is too old to tell.
func (w *replayWindow) take(seq uint64) (again, newest bool) {
	seq++
	if seq > w.newest {
		w.seen = w.seen<<min(seq-w.newest, 64) | 1
		w.newest = seq
		return false, true
	}
	bit := uint64(1) << (w.newest - seq)
	if w.newest-seq >= 64 || w.seen&bit != 0 {
		return true, false
	}
	w.seen |= bit
	return false, false
}
