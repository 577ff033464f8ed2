package jetfeed

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/fnv"
	"strconv"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// A message is one commit: a format byte, the device with its length before it, the seq, and the commit as internal/store writes
// it. Whoever makes a format 2 reads it one release before writing it: during an update both versions read the stream.
const format = 1

// buckets is how many subjects owners are spread over. Never change it, nor bucketOf: readers of one owner listen to one subject.
const buckets = 1024

// bucketOf is FNV-1a of 64 bits, modulo buckets.
func bucketOf(owner hub.Owner) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(owner)) // never fails
	return h.Sum64() % buckets
}

func (f *Feed) subject(owner hub.Owner) string {
	return f.subjects + strconv.FormatUint(bucketOf(owner), 10)
}

// messageID is what the servers know a commit by that comes again.
func messageID(c *hub.Commit) string { return hex.EncodeToString(c.ID[:]) }

// encode makes a message of a commit that keeps hub's limits.
func encode(c *hub.Commit) ([]byte, error) {
	b := make([]byte, 0, 256)
	b = append(b, format)
	b = binary.AppendUvarint(b, uint64(len(c.Device)))
	b = append(b, c.Device...)
	b = binary.AppendUvarint(b, c.Seq)
	head := len(b)
	b = store.AppendCommit(b, c)
	return b, store.CheckCommit(c, len(b)-head)
}

var (
	errFormat  = errors.New("a message of the feed is of a format that this version does not know")
	errDamaged = errors.New("a message of the feed is damaged")
)

// decode reads what encode wrote; the commit shares no memory with b.
func decode(b []byte) (hub.Commit, error) {
	if len(b) == 0 {
		return hub.Commit{}, errDamaged
	}
	if b[0] != format {
		return hub.Commit{}, errFormat
	}
	b = b[1:]
	size, n := binary.Uvarint(b)
	if n <= 0 || size > uint64(len(b)-n) {
		return hub.Commit{}, errDamaged
	}
	dev := hub.DeviceID(b[n : n+int(size)])
	b = b[n+int(size):]
	seq, n := binary.Uvarint(b)
	if n <= 0 {
		return hub.Commit{}, errDamaged
	}
	c, err := store.DecodeCommit(b[n:])
	c.Device, c.Seq = dev, seq
	return c, err
}
