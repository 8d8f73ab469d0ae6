// Package record is the form in which a session is stored, and the time that decides whether it has
// expired.
package record

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math"
	"math/rand/v2"
	"time"
)

// The stored format. A session's value in etcd is
//
//	payload ‖ trailer
//
// The payload is what the session manager's codec made, unchanged. It comes first because
// scs.GobCodec reads one value and ignores what follows: an application with scs's own etcdstore
// reads these sessions as they lie in etcd. All numbers of the trailer are big-endian:
//
//	offset  bytes
//	0       1      format version
//	1       4      length of the store's prefix within the key
//	5       8      expiry, in Unix milliseconds
//	13      8      until when the key's lease lasts at least, in Unix milliseconds
//	21      16     write id
//	37      2      length of the trailer
//	39      4      CRC-32C of all bytes before
//	43      8      magic
//
// The length and what follows it keep their distance from the end in every version, so that an
// older reader can tell a newer record from a value without a trailer, which is a session of scs's
// own etcdstore.
//
// The magic decides which of the two a value is, so whatever ends in the magic and does not hold
// together, by its length or its checksum, is a damaged record: nothing of it is served. (A session
// of scs's own etcdstore that ends in the magic by accident counts as one.) Where the damage is in
// the magic itself, or the value's end is cut off, there is no telling: it looks like a session of
// scs's own etcdstore, and is served as such.
const (
	FormatVersion = 1
	Magic         = "\xe7scsetcd"
	tailLen       = 2 + 4 + len(Magic)
	trailerLen    = 37 + tailLen
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// WriteID names one attempt to write, whatever becomes of it: the version in etcd that carries it
// is that attempt's.
type WriteID [16]byte

// NewWriteID returns a write id that no other attempt has.
func NewWriteID() (id WriteID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64())
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

// Record is a session as it is stored.
type Record struct {
	Payload   []byte
	PrefixLen int    // tells stores apart where one prefix begins with the other
	Expiry    Millis // the session is not returned at or after it
	LeaseEnd  Millis // a session that expires by then may stay on its lease
	ID        WriteID
}

// Kind says what a value is.
type Kind int

// The kinds of values.
const (
	KindRecord  Kind = iota // a record of this version
	KindBare                // no trailer: a session of scs's own etcdstore
	KindNewer               // a record of a version that this code does not know
	KindCorrupt             // a record that is damaged
)

// Encode returns the value that stores r.
func (r *Record) Encode() []byte {
	b := make([]byte, 0, len(r.Payload)+trailerLen)
	b = append(b, r.Payload...)
	b = append(b, FormatVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(r.PrefixLen)) //nolint:gosec // keys are far shorter than 4 GiB
	b = binary.BigEndian.AppendUint64(b, uint64(r.Expiry))
	b = binary.BigEndian.AppendUint64(b, uint64(r.LeaseEnd))
	b = append(b, r.ID[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(trailerLen))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, Magic...)
}

// Decode tells what value is and, for a record, what it holds. The payload aliases value; of what
// is damaged there is none.
func Decode(value []byte) (Record, Kind) {
	if !bytes.HasSuffix(value, []byte(Magic)) {
		return Record{Payload: value}, KindBare
	}
	tail := len(value) - tailLen
	if tail < 0 {
		return Record{}, KindCorrupt
	}
	size := int(binary.BigEndian.Uint16(value[tail:]))
	sum := binary.BigEndian.Uint32(value[tail+2:])
	start := len(value) - size
	if size <= tailLen || start < 0 || crc32.Checksum(value[:tail+2], castagnoli) != sum {
		return Record{}, KindCorrupt
	}
	t := value[start:]
	if t[0] != FormatVersion || size != trailerLen {
		return Record{Payload: value[:start:start]}, KindNewer
	}
	return Record{
		Payload:   value[:start:start],
		PrefixLen: int(binary.BigEndian.Uint32(t[1:])),
		Expiry:    Millis(binary.BigEndian.Uint64(t[5:])),
		LeaseEnd:  Millis(binary.BigEndian.Uint64(t[13:])),
		ID:        WriteID(t[21:37]),
	}, KindRecord
}

// Millis is a time in Unix milliseconds, the resolution of everything that the store decides about
// time.
type Millis int64

// Forever is later than every expiry.
const Forever Millis = math.MaxInt64

// ToMillis converts t, saturating where time.Time reaches further than 64 bits of milliseconds do.
func ToMillis(t time.Time) Millis {
	switch s := t.Unix(); {
	case s >= math.MaxInt64/1000:
		return Forever
	case s <= math.MinInt64/1000:
		return math.MinInt64
	}
	return Millis(t.UnixMilli())
}

// Plus returns m + d, saturating at forever.
func (m Millis) Plus(d time.Duration) Millis {
	sum := m + Millis(d.Milliseconds())
	if d > 0 && sum < m {
		return Forever
	}
	return sum
}

// Since returns the time from earlier to m: none if m is not later, and the longest duration if it
// is farther off.
func (m Millis) Since(earlier Millis) time.Duration {
	const most = Millis(math.MaxInt64 / int64(time.Millisecond))
	if d := m - earlier; d >= 0 && d < most {
		return time.Duration(d) * time.Millisecond
	} else if m < earlier {
		return 0
	}
	return math.MaxInt64
}
