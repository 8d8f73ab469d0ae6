package etcdstore

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
// The payload is what the session manager's codec made, unchanged. It comes first because scs.GobCodec reads
// one value and ignores what follows: an application with scs's own etcdstore reads these sessions as they
// lie in etcd. All numbers of the trailer are big-endian:
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
// The length and what follows it keep their distance from the end in every version, so that an older reader
// can tell a newer record from a value without a trailer, which is a session of scs's own etcdstore.
//
// The magic decides which of the two a value is, so whatever ends in the magic and does not hold together, by its
// length or its checksum, is a damaged record: nothing of it is served. (A session of scs's own etcdstore that ends
// in the magic by accident counts as one.) Where the damage is in the magic itself, or the value's end is cut off,
// there is no telling: it looks like a session of scs's own etcdstore, and is served as such.
const (
	recordVersion = 1
	recordMagic   = "\xe7scsetcd"
	recordTailLen = 2 + 4 + len(recordMagic)
	recordTrailer = 37 + recordTailLen
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// writeID names one attempt to write, whatever becomes of it: the version in etcd that carries it is that
// attempt's.
type writeID [16]byte

func newWriteID() (id writeID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64())
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	return id
}

// record is a session as it is stored.
type record struct {
	payload   []byte
	prefixLen int    // tells stores apart where one prefix begins with the other
	expiry    millis // the session is not returned at or after it
	leaseEnd  millis // a session that expires by then may stay on its lease
	id        writeID
}

// recordKind says what a value is.
type recordKind int

const (
	kindRecord  recordKind = iota // a record of this version
	kindBare                      // no trailer: a session of scs's own etcdstore
	kindNewer                     // a record of a version that this code does not know
	kindCorrupt                   // a record that is damaged
)

// encode returns the value that stores r.
func (r *record) encode() []byte {
	b := make([]byte, 0, len(r.payload)+recordTrailer)
	b = append(b, r.payload...)
	b = append(b, recordVersion)
	b = binary.BigEndian.AppendUint32(b, uint32(r.prefixLen)) //nolint:gosec // keys are far shorter than 4 GiB
	b = binary.BigEndian.AppendUint64(b, uint64(r.expiry))
	b = binary.BigEndian.AppendUint64(b, uint64(r.leaseEnd))
	b = append(b, r.id[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(recordTrailer))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
	return append(b, recordMagic...)
}

// decodeRecord tells what value is and, for a record, what it holds. The payload aliases value; of what is damaged
// there is none.
func decodeRecord(value []byte) (record, recordKind) {
	if !bytes.HasSuffix(value, []byte(recordMagic)) {
		return record{payload: value}, kindBare
	}
	tail := len(value) - recordTailLen
	if tail < 0 {
		return record{}, kindCorrupt
	}
	size := int(binary.BigEndian.Uint16(value[tail:]))
	sum := binary.BigEndian.Uint32(value[tail+2:])
	start := len(value) - size
	if size <= recordTailLen || start < 0 || crc32.Checksum(value[:tail+2], castagnoli) != sum {
		return record{}, kindCorrupt
	}
	t := value[start:]
	if t[0] != recordVersion || size != recordTrailer {
		return record{payload: value[:start:start]}, kindNewer
	}
	return record{
		payload:   value[:start:start],
		prefixLen: int(binary.BigEndian.Uint32(t[1:])),
		expiry:    millis(binary.BigEndian.Uint64(t[5:])),
		leaseEnd:  millis(binary.BigEndian.Uint64(t[13:])),
		id:        writeID(t[21:37]),
	}, kindRecord
}

// millis is a time in Unix milliseconds, the resolution of everything that the store decides about time.
type millis int64

// forever is later than every expiry.
const forever millis = math.MaxInt64

// toMillis converts t, saturating where time.Time reaches further than 64 bits of milliseconds do.
func toMillis(t time.Time) millis {
	switch s := t.Unix(); {
	case s >= math.MaxInt64/1000:
		return forever
	case s <= math.MinInt64/1000:
		return math.MinInt64
	}
	return millis(t.UnixMilli())
}

// plus returns m + d, saturating at forever.
func (m millis) plus(d time.Duration) millis {
	sum := m + millis(d.Milliseconds())
	if d > 0 && sum < m {
		return forever
	}
	return sum
}

// since returns the time from earlier to m: none if m is not later, and the longest duration if it is farther off.
func (m millis) since(earlier millis) time.Duration {
	const most = millis(math.MaxInt64 / int64(time.Millisecond))
	if d := m - earlier; d >= 0 && d < most {
		return time.Duration(d) * time.Millisecond
	} else if m < earlier {
		return 0
	}
	return math.MaxInt64
}
