package etcdstore

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
)

// sampleID is a write id with all bytes different.
var sampleID = writeID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

// sampleRecord is a record with all fields set.
func sampleRecord() record {
	return record{payload: []byte("payload"), prefixLen: 12, expiry: 0x0123456789abcdef, leaseEnd: 0x1122334455667788, id: sampleID}
}

// wantRecord fails t unless value is a record that holds want.
func wantRecord(t *testing.T, value []byte, want record) {
	t.Helper()
	got, kind := decodeRecord(value)
	if kind != kindRecord {
		t.Fatalf("decodeRecord: kind %d, want %d", kind, kindRecord)
	}
	if !bytes.Equal(got.payload, want.payload) {
		t.Errorf("payload = %q, want %q", got.payload, want.payload)
	}
	got.payload, want.payload = nil, nil
	if got.prefixLen != want.prefixLen || got.expiry != want.expiry || got.leaseEnd != want.leaseEnd || got.id != want.id {
		t.Errorf("decodeRecord = %+v, want %+v", got, want)
	}
}

// seal completes a trailer as every version of the format has it: its length, the checksum, the magic.
func seal(payload, fields []byte) []byte {
	b := slices.Concat(payload, fields)
	b = binary.BigEndian.AppendUint16(b, uint16(len(fields)+14))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return append(b, "\xe7scsetcd"...)
}

func TestRecord_RoundTrip(t *testing.T) {
	nested := sampleRecord()
	for _, tc := range []struct {
		name   string
		record record
	}{
		{"sample", sampleRecord()},
		{"zero", record{}},
		{"empty payload", record{payload: []byte{}, prefixLen: 1, expiry: 1, leaseEnd: 2}},
		{"large payload", record{payload: bytes.Repeat([]byte("0123456789abcdef"), 1<<16), prefixLen: 12, expiry: 1}},
		{"expires first", record{expiry: math.MinInt64, leaseEnd: math.MinInt64}},
		{"expires last", record{expiry: forever - 1, leaseEnd: forever - 1}},
		{"expires never", record{expiry: forever, leaseEnd: forever}},
		{"lease not known", record{payload: []byte("x"), expiry: 5}},
		{"no prefix", record{payload: []byte("x"), prefixLen: 0, expiry: 5}},
		{"longest prefix", record{payload: []byte("x"), prefixLen: math.MaxUint32, expiry: 5}},
		{"payload that is a record", record{payload: nested.encode(), prefixLen: 3, expiry: 5, id: writeID{7}}},
		{"payload that ends in the magic", record{payload: []byte(recordMagic), prefixLen: 3, expiry: 5}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			value := tc.record.encode()
			if len(value) != len(tc.record.payload)+recordTrailer {
				t.Errorf("encode made %d bytes of %d", len(value), len(tc.record.payload))
			}
			if !bytes.HasPrefix(value, tc.record.payload) {
				t.Error("the value does not begin with the payload")
			}
			wantRecord(t, value, tc.record)
		})
	}
}

// What is in etcd must stay readable: this value was made by version 1 of the format.
func TestRecord_Layout(t *testing.T) {
	const golden = "7061796c6f6164" + // payload
		"01" + // version
		"0000000c" + // length of the prefix
		"0123456789abcdef" + // expiry
		"1122334455667788" + // end of the lease
		"0102030405060708090a0b0c0d0e0f10" + // write id
		"0033" + // length of the trailer
		"2b33ded0" + // checksum
		"e773637365746364" // magic
	value, err := hex.DecodeString(golden)
	if err != nil {
		t.Fatal(err)
	}
	wantRecord(t, value, sampleRecord())
	r := sampleRecord()
	if got := hex.EncodeToString(r.encode()); got != golden {
		t.Errorf("encode = %s\nwant     %s", got, golden)
	}
}

// An application with scs's own etcdstore reads what lies in etcd with the codec alone.
func TestRecord_GobCodecReadsStoredValue(t *testing.T) {
	deadline := time.Date(2030, 1, 2, 3, 4, 5, 6, time.UTC)
	values := map[string]any{"name": "Ann", "n": 42, "ok": true}
	payload, err := scs.GobCodec{}.Encode(deadline, values)
	if err != nil {
		t.Fatal(err)
	}
	r := sampleRecord()
	r.payload = payload
	gotDeadline, gotValues, err := scs.GobCodec{}.Decode(r.encode())
	if err != nil || !gotDeadline.Equal(deadline) || !maps.Equal(gotValues, values) {
		t.Errorf("Decode = %v, %v, %v; want %v, %v", gotDeadline, gotValues, err, deadline, values)
	}
}

// wantKind fails t unless value is of a kind that has no fields, with this payload.
func wantKind(t *testing.T, what string, value []byte, kind recordKind, payload []byte) {
	t.Helper()
	got, k := decodeRecord(value)
	if k != kind || !bytes.Equal(got.payload, payload) {
		t.Errorf("%s: kind %d, payload %q; want kind %d, payload %q", what, k, got.payload, kind, payload)
	}
	if got.expiry != 0 || got.leaseEnd != 0 || got.prefixLen != 0 || got.id != (writeID{}) {
		t.Errorf("%s: fields of what is no record: %+v", what, got)
	}
}

// Without its end a record has no magic, so it looks like a session of scs's own etcdstore.
func TestDecodeRecord_Truncated(t *testing.T) {
	r := sampleRecord()
	value := r.encode()
	for i := 1; i <= len(value); i++ {
		end, start := value[:len(value)-i], value[i:]
		wantKind(t, fmt.Sprint(i, " bytes cut off the end"), end, kindBare, end)
		if len(start) >= len(recordMagic) {
			wantKind(t, fmt.Sprint(i, " bytes cut off the start"), start, kindCorrupt, nil)
		} else {
			wantKind(t, fmt.Sprint(i, " bytes cut off the start"), start, kindBare, start)
		}
	}
}

// A value of which any bit was flipped is not served, except where that hides that it was a record.
func TestDecodeRecord_FlippedBit(t *testing.T) {
	for _, payload := range []string{"", "payload"} {
		r := sampleRecord()
		r.payload = []byte(payload)
		value := r.encode()
		for bit := range len(value) * 8 {
			flipped := bytes.Clone(value)
			flipped[bit/8] ^= 1 << (bit % 8)
			what := fmt.Sprintf("payload %q, bit %d of byte %d flipped", payload, bit%8, bit/8)
			if bit/8 < len(value)-len(recordMagic) {
				wantKind(t, what, flipped, kindCorrupt, nil)
			} else {
				wantKind(t, what, flipped, kindBare, flipped)
			}
		}
	}
}

func TestDecodeRecord_Kinds(t *testing.T) {
	r := sampleRecord()
	fields := r.encode()[len(r.payload) : len(r.payload)+37]
	changed := func(version byte, more ...byte) []byte {
		return slices.Concat([]byte{version}, fields[1:], more)
	}
	session, err := scs.GobCodec{}.Encode(time.Unix(1, 0), map[string]any{"a": 1})
	if err != nil {
		t.Fatal(err)
	}
	badSum := seal([]byte("payload"), fields)
	badSum[len(badSum)-9]++
	for _, tc := range []struct {
		name  string
		value []byte
		kind  recordKind
	}{
		{"record", seal([]byte("payload"), fields), kindRecord},
		{"newer, same fields", seal([]byte("payload"), changed(2)), kindNewer},
		{"newer, more fields", seal([]byte("payload"), changed(2, 1, 2, 3)), kindNewer},
		{"newer, fewer fields", seal([]byte("payload"), []byte{2}), kindNewer},
		{"last version", seal([]byte("payload"), changed(255)), kindNewer},
		{"version 0", seal([]byte("payload"), changed(0)), kindNewer},
		{"this version, more fields", seal([]byte("payload"), changed(1, 1, 2, 3)), kindNewer},
		{"this version, fewer fields", seal([]byte("payload"), fields[:36]), kindNewer},
		{"trailer without fields", seal([]byte("payload"), nil), kindCorrupt},
		{"longer trailer than value", seal(nil, fields)[1:], kindCorrupt},
		{"wrong checksum", badSum, kindCorrupt},
		{"nil", nil, kindBare},
		{"empty", []byte{}, kindBare},
		{"session of scs", session, kindBare},
		{"magic alone", []byte(recordMagic), kindCorrupt},
		{"tail alone", make([]byte, recordTailLen), kindBare},
		{"text, then the magic", []byte("some text that is long enough for a trailer, and then " + recordMagic), kindCorrupt},
		{"session of scs, then the magic", slices.Concat(session, []byte(recordMagic)), kindCorrupt},
		{"text with the magic in it", []byte("some text with " + recordMagic + " in it"), kindBare},
	} {
		t.Run(tc.name, func(t *testing.T) {
			switch tc.kind {
			case kindRecord:
				wantRecord(t, tc.value, r)
			case kindNewer:
				wantKind(t, tc.name, tc.value, kindNewer, []byte("payload"))
			case kindBare:
				wantKind(t, tc.name, tc.value, kindBare, tc.value)
			case kindCorrupt:
				wantKind(t, tc.name, tc.value, kindCorrupt, nil)
			}
		})
	}
}

// A trailer may claim to be longer than the value that it is in.
func TestDecodeRecord_TrailerLongerThanValue(t *testing.T) {
	for _, size := range []uint16{15, 52, 4096, math.MaxUint16} {
		b := binary.BigEndian.AppendUint16(nil, size)
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
		b = append(b, recordMagic...)
		wantKind(t, fmt.Sprint("size ", size), b, kindCorrupt, nil)
	}
}

// Appending to the payload must not write into the value, which etcd's client may still hold.
func TestDecodeRecord_PayloadHasNoRoom(t *testing.T) {
	r := sampleRecord()
	value := r.encode()
	got, _ := decodeRecord(value)
	_ = append(got.payload, "overwritten"...)
	wantRecord(t, value, sampleRecord())
}

func TestNewWriteID_Differs(t *testing.T) {
	seen := make(map[writeID]bool)
	for range 1000 {
		seen[newWriteID()] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d ids of 1000 differ", len(seen))
	}
	var or writeID
	for id := range seen {
		for i, b := range id {
			or[i] |= b
		}
	}
	if i := slices.Index(or[:], 0); i >= 0 {
		t.Errorf("byte %d is never set", i)
	}
}

func TestToMillis(t *testing.T) {
	for _, tc := range []struct {
		name string
		time time.Time
		want millis
	}{
		{"epoch", time.Unix(0, 0), 0},
		{"one second", time.Unix(1, 0), 1000},
		{"less than a millisecond", time.Unix(1, 999_999), 1000},
		{"one millisecond", time.Unix(1, 1_000_000), 1001},
		{"before the epoch", time.Unix(-1, 0), -1000},
		{"another zone", time.Date(1970, 1, 1, 2, 0, 0, 0, time.FixedZone("", 2*60*60)), 0},
		{"zero time", time.Time{}, -62_135_596_800_000},
		{"year 9999", time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC), 253_402_300_799_999},
		{"just below forever", time.Unix(math.MaxInt64/1000-1, 999_999_999), 9_223_372_036_854_774_999},
		{"just above the least", time.Unix(math.MinInt64/1000+1, 0), -9_223_372_036_854_774_000},
		{"beyond 64 bits of milliseconds", time.Unix(math.MaxInt64/1000+1, 0), forever},
		{"2^62 seconds", time.Unix(1<<62, 0), forever},
		{"less than 64 bits of milliseconds", time.Unix(math.MinInt64/1000-1, 0), math.MinInt64},
		{"-2^62 seconds", time.Unix(-1<<62, 0), math.MinInt64},
	} {
		if got := toMillis(tc.time); got != tc.want {
			t.Errorf("%s: toMillis = %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestMillis_Plus(t *testing.T) {
	for _, tc := range []struct {
		m    millis
		d    time.Duration
		want millis
	}{
		{0, 0, 0},
		{5, 0, 5},
		{5, time.Millisecond - 1, 5},
		{5, time.Millisecond, 6},
		{5, time.Hour, 3_600_005},
		{0, 1001 * time.Millisecond, 1001},
		{5, -2 * time.Millisecond, 3},
		{-5, time.Millisecond, -4},
		{forever, 0, forever},
		{forever - 1, time.Millisecond, forever},
		{forever - 1, 2 * time.Millisecond, forever},
		{forever, time.Millisecond, forever},
		{forever, math.MaxInt64, forever},
		{forever, -time.Millisecond, forever - 1},
		{0, math.MaxInt64, 9_223_372_036_854},
	} {
		if got := tc.m.plus(tc.d); got != tc.want {
			t.Errorf("%d.plus(%v) = %d, want %d", tc.m, tc.d, got, tc.want)
		}
	}
}

func TestMillis_Since(t *testing.T) {
	const mostMillis = math.MaxInt64 / 1_000_000 // that a duration holds
	for _, tc := range []struct {
		m, earlier millis
		want       time.Duration
	}{
		{0, 0, 0},
		{5, 5, 0},
		{6, 5, time.Millisecond},
		{3_600_000, 0, time.Hour},
		{1, -1, 2 * time.Millisecond},
		{5, 6, 0}, // later: nothing is left
		{-1, 1, 0},
		{0, forever, 0},
		{math.MinInt64, 5, 0},
		{mostMillis - 1, 0, (mostMillis - 1) * time.Millisecond},
		{mostMillis + 1, 0, math.MaxInt64},
		{forever, 0, math.MaxInt64},
		{forever, -1, math.MaxInt64}, // the difference exceeds 64 bits
		{forever, math.MinInt64, math.MaxInt64},
		{forever, forever - 1, time.Millisecond},
	} {
		if got := tc.m.since(tc.earlier); got != tc.want {
			t.Errorf("%d.since(%d) = %v, want %v", tc.m, tc.earlier, got, tc.want)
		}
	}
}

func FuzzRecord(f *testing.F) {
	r := sampleRecord()
	value := r.encode()
	f.Add([]byte(nil), uint32(0), int64(0), int64(0), []byte(nil))
	f.Add(value, uint32(12), int64(1), int64(2), []byte("0123456789abcdef"))
	f.Add(value[:len(value)-1], uint32(math.MaxUint32), int64(math.MaxInt64), int64(math.MinInt64), value)
	f.Add(seal([]byte("payload"), []byte{2, 0}), uint32(12), int64(-1), int64(-1), []byte{})
	f.Add([]byte(recordMagic), uint32(12), int64(1), int64(1), []byte{1})
	f.Add([]byte("payload"), uint32(12), int64(1), int64(1), value[7:44])
	f.Fuzz(func(t *testing.T, payload []byte, prefixLen uint32, expiry, leaseEnd int64, id []byte) {
		// An arbitrary value is a record only if encode makes the same of what it holds.
		switch got, kind := decodeRecord(payload); kind {
		case kindRecord:
			if again := got.encode(); !bytes.Equal(again, payload) {
				t.Errorf("%q is taken for the record %+v, which is encoded as %q", payload, got, again)
			}
		case kindBare:
			if !bytes.Equal(got.payload, payload) || bytes.HasSuffix(payload, []byte(recordMagic)) {
				t.Errorf("payload of the bare value %q = %q", payload, got.payload)
			}
		case kindCorrupt:
			if got.payload != nil || !bytes.HasSuffix(payload, []byte(recordMagic)) {
				t.Errorf("payload of the damaged record %q = %q", payload, got.payload)
			}
		case kindNewer:
			if !bytes.HasPrefix(payload, got.payload) || !bytes.HasSuffix(payload, []byte(recordMagic)) {
				t.Errorf("payload of the newer record %q = %q", payload, got.payload)
			}
		}
		// Arbitrary fields in a trailer that is whole are a record of this version, or of one that is not known.
		if fields := id; len(fields) < math.MaxUint16-14 {
			sealed := seal(payload, fields)
			got, kind := decodeRecord(sealed)
			switch {
			case len(fields) == 0:
				if kind != kindCorrupt || got.payload != nil {
					t.Errorf("a trailer without fields: kind %d, payload %q", kind, got.payload)
				}
			case len(fields) == 37 && fields[0] == 1:
				if kind != kindRecord || !bytes.Equal(got.encode(), sealed) {
					t.Errorf("fields %x: kind %d, encoded again as %x", fields, kind, got.encode())
				}
			default:
				if kind != kindNewer || !bytes.Equal(got.payload, payload) {
					t.Errorf("fields %x: kind %d, payload %q", fields, kind, got.payload)
				}
			}
		}
		// What was encoded decodes to itself, whatever the payload looks like.
		want := record{payload: payload, prefixLen: int(prefixLen), expiry: millis(expiry), leaseEnd: millis(leaseEnd)}
		copy(want.id[:], id)
		value := want.encode()
		wantRecord(t, value, want)
		// And where a byte of it is another, it is not served. leaseEnd says which byte.
		if at := uint64(leaseEnd) % uint64(len(value)-len(recordMagic)); len(id) > 0 && id[0] != 0 {
			value[at] ^= id[0]
			wantKind(t, fmt.Sprintf("byte %d changed", at), value, kindCorrupt, nil)
		}
	})
}
