package record

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
var sampleID = WriteID{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}

// sampleRecord is a record with all fields set.
func sampleRecord() Record {
	return Record{Payload: []byte("payload"), PrefixLen: 12, Expiry: 0x0123456789abcdef, LeaseEnd: 0x1122334455667788, ID: sampleID}
}

// wantRecord fails t unless value is a record that holds want.
func wantRecord(t *testing.T, value []byte, want Record) {
	t.Helper()
	got, kind := Decode(value)
	if kind != KindRecord {
		t.Fatalf("decodeRecord: kind %d, want %d", kind, KindRecord)
	}
	if !bytes.Equal(got.Payload, want.Payload) {
		t.Errorf("payload = %q, want %q", got.Payload, want.Payload)
	}
	got.Payload, want.Payload = nil, nil
	if got.PrefixLen != want.PrefixLen || got.Expiry != want.Expiry || got.LeaseEnd != want.LeaseEnd || got.ID != want.ID {
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
		record Record
	}{
		{"sample", sampleRecord()},
		{"zero", Record{}},
		{"empty payload", Record{Payload: []byte{}, PrefixLen: 1, Expiry: 1, LeaseEnd: 2}},
		{"large payload", Record{Payload: bytes.Repeat([]byte("0123456789abcdef"), 1<<16), PrefixLen: 12, Expiry: 1}},
		{"expires first", Record{Expiry: math.MinInt64, LeaseEnd: math.MinInt64}},
		{"expires last", Record{Expiry: Forever - 1, LeaseEnd: Forever - 1}},
		{"expires never", Record{Expiry: Forever, LeaseEnd: Forever}},
		{"lease not known", Record{Payload: []byte("x"), Expiry: 5}},
		{"no prefix", Record{Payload: []byte("x"), PrefixLen: 0, Expiry: 5}},
		{"longest prefix", Record{Payload: []byte("x"), PrefixLen: math.MaxUint32, Expiry: 5}},
		{"payload that is a record", Record{Payload: nested.Encode(), PrefixLen: 3, Expiry: 5, ID: WriteID{7}}},
		{"payload that ends in the magic", Record{Payload: []byte(Magic), PrefixLen: 3, Expiry: 5}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			value := tc.record.Encode()
			if len(value) != len(tc.record.Payload)+trailerLen {
				t.Errorf("encode made %d bytes of %d", len(value), len(tc.record.Payload))
			}
			if !bytes.HasPrefix(value, tc.record.Payload) {
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
	if got := hex.EncodeToString(r.Encode()); got != golden {
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
	r.Payload = payload
	gotDeadline, gotValues, err := scs.GobCodec{}.Decode(r.Encode())
	if err != nil || !gotDeadline.Equal(deadline) || !maps.Equal(gotValues, values) {
		t.Errorf("Decode = %v, %v, %v; want %v, %v", gotDeadline, gotValues, err, deadline, values)
	}
}

// wantKind fails t unless value is of a kind that has no fields, with this payload.
func wantKind(t *testing.T, what string, value []byte, kind Kind, payload []byte) {
	t.Helper()
	got, k := Decode(value)
	if k != kind || !bytes.Equal(got.Payload, payload) {
		t.Errorf("%s: kind %d, payload %q; want kind %d, payload %q", what, k, got.Payload, kind, payload)
	}
	if got.Expiry != 0 || got.LeaseEnd != 0 || got.PrefixLen != 0 || got.ID != (WriteID{}) {
		t.Errorf("%s: fields of what is no record: %+v", what, got)
	}
}

// Without its end a record has no magic, so it looks like a session of scs's own etcdstore.
func TestDecodeRecord_Truncated(t *testing.T) {
	r := sampleRecord()
	value := r.Encode()
	for i := 1; i <= len(value); i++ {
		end, start := value[:len(value)-i], value[i:]
		wantKind(t, fmt.Sprint(i, " bytes cut off the end"), end, KindBare, end)
		if len(start) >= len(Magic) {
			wantKind(t, fmt.Sprint(i, " bytes cut off the start"), start, KindCorrupt, nil)
		} else {
			wantKind(t, fmt.Sprint(i, " bytes cut off the start"), start, KindBare, start)
		}
	}
}

// A value of which any bit was flipped is not served, except where that hides that it was a record.
func TestDecodeRecord_FlippedBit(t *testing.T) {
	for _, payload := range []string{"", "payload"} {
		r := sampleRecord()
		r.Payload = []byte(payload)
		value := r.Encode()
		for bit := range len(value) * 8 {
			flipped := bytes.Clone(value)
			flipped[bit/8] ^= 1 << (bit % 8)
			what := fmt.Sprintf("payload %q, bit %d of byte %d flipped", payload, bit%8, bit/8)
			if bit/8 < len(value)-len(Magic) {
				wantKind(t, what, flipped, KindCorrupt, nil)
			} else {
				wantKind(t, what, flipped, KindBare, flipped)
			}
		}
	}
}

func TestDecodeRecord_Kinds(t *testing.T) {
	r := sampleRecord()
	fields := r.Encode()[len(r.Payload) : len(r.Payload)+37]
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
		kind  Kind
	}{
		{"record", seal([]byte("payload"), fields), KindRecord},
		{"newer, same fields", seal([]byte("payload"), changed(2)), KindNewer},
		{"newer, more fields", seal([]byte("payload"), changed(2, 1, 2, 3)), KindNewer},
		{"newer, fewer fields", seal([]byte("payload"), []byte{2}), KindNewer},
		{"last version", seal([]byte("payload"), changed(255)), KindNewer},
		{"version 0", seal([]byte("payload"), changed(0)), KindNewer},
		{"this version, more fields", seal([]byte("payload"), changed(1, 1, 2, 3)), KindNewer},
		{"this version, fewer fields", seal([]byte("payload"), fields[:36]), KindNewer},
		{"trailer without fields", seal([]byte("payload"), nil), KindCorrupt},
		{"longer trailer than value", seal(nil, fields)[1:], KindCorrupt},
		{"wrong checksum", badSum, KindCorrupt},
		{"nil", nil, KindBare},
		{"empty", []byte{}, KindBare},
		{"session of scs", session, KindBare},
		{"magic alone", []byte(Magic), KindCorrupt},
		{"tail alone", make([]byte, tailLen), KindBare},
		{"text, then the magic", []byte("some text that is long enough for a trailer, and then " + Magic), KindCorrupt},
		{"session of scs, then the magic", slices.Concat(session, []byte(Magic)), KindCorrupt},
		{"text with the magic in it", []byte("some text with " + Magic + " in it"), KindBare},
	} {
		t.Run(tc.name, func(t *testing.T) {
			switch tc.kind {
			case KindRecord:
				wantRecord(t, tc.value, r)
			case KindNewer:
				wantKind(t, tc.name, tc.value, KindNewer, []byte("payload"))
			case KindBare:
				wantKind(t, tc.name, tc.value, KindBare, tc.value)
			case KindCorrupt:
				wantKind(t, tc.name, tc.value, KindCorrupt, nil)
			}
		})
	}
}

// A trailer may claim to be longer than the value that it is in.
func TestDecodeRecord_TrailerLongerThanValue(t *testing.T) {
	for _, size := range []uint16{15, 52, 4096, math.MaxUint16} {
		b := binary.BigEndian.AppendUint16(nil, size)
		b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
		b = append(b, Magic...)
		wantKind(t, fmt.Sprint("size ", size), b, KindCorrupt, nil)
	}
}

// Appending to the payload must not write into the value, which etcd's client may still hold.
func TestDecodeRecord_PayloadHasNoRoom(t *testing.T) {
	r := sampleRecord()
	value := r.Encode()
	got, _ := Decode(value)
	_ = append(got.Payload, "overwritten"...)
	wantRecord(t, value, sampleRecord())
}

func TestNewWriteID_Differs(t *testing.T) {
	seen := make(map[WriteID]bool)
	for range 1000 {
		seen[NewWriteID()] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d ids of 1000 differ", len(seen))
	}
	var or WriteID
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
		want Millis
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
		{"beyond 64 bits of milliseconds", time.Unix(math.MaxInt64/1000+1, 0), Forever},
		{"2^62 seconds", time.Unix(1<<62, 0), Forever},
		{"less than 64 bits of milliseconds", time.Unix(math.MinInt64/1000-1, 0), math.MinInt64},
		{"-2^62 seconds", time.Unix(-1<<62, 0), math.MinInt64},
	} {
		if got := ToMillis(tc.time); got != tc.want {
			t.Errorf("%s: toMillis = %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestMillis_Plus(t *testing.T) {
	for _, tc := range []struct {
		m    Millis
		d    time.Duration
		want Millis
	}{
		{0, 0, 0},
		{5, 0, 5},
		{5, time.Millisecond - 1, 5},
		{5, time.Millisecond, 6},
		{5, time.Hour, 3_600_005},
		{0, 1001 * time.Millisecond, 1001},
		{5, -2 * time.Millisecond, 3},
		{-5, time.Millisecond, -4},
		{Forever, 0, Forever},
		{Forever - 1, time.Millisecond, Forever},
		{Forever - 1, 2 * time.Millisecond, Forever},
		{Forever, time.Millisecond, Forever},
		{Forever, math.MaxInt64, Forever},
		{Forever, -time.Millisecond, Forever - 1},
		{0, math.MaxInt64, 9_223_372_036_854},
	} {
		if got := tc.m.Plus(tc.d); got != tc.want {
			t.Errorf("%d.plus(%v) = %d, want %d", tc.m, tc.d, got, tc.want)
		}
	}
}

func TestMillis_Since(t *testing.T) {
	const mostMillis = math.MaxInt64 / 1_000_000 // that a duration holds
	for _, tc := range []struct {
		m, earlier Millis
		want       time.Duration
	}{
		{0, 0, 0},
		{5, 5, 0},
		{6, 5, time.Millisecond},
		{3_600_000, 0, time.Hour},
		{1, -1, 2 * time.Millisecond},
		{5, 6, 0}, // later: nothing is left
		{-1, 1, 0},
		{0, Forever, 0},
		{math.MinInt64, 5, 0},
		{mostMillis - 1, 0, (mostMillis - 1) * time.Millisecond},
		{mostMillis + 1, 0, math.MaxInt64},
		{Forever, 0, math.MaxInt64},
		{Forever, -1, math.MaxInt64}, // the difference exceeds 64 bits
		{Forever, math.MinInt64, math.MaxInt64},
		{Forever, Forever - 1, time.Millisecond},
	} {
		if got := tc.m.Since(tc.earlier); got != tc.want {
			t.Errorf("%d.since(%d) = %v, want %v", tc.m, tc.earlier, got, tc.want)
		}
	}
}

func FuzzRecord(f *testing.F) {
	r := sampleRecord()
	value := r.Encode()
	f.Add([]byte(nil), uint32(0), int64(0), int64(0), []byte(nil))
	f.Add(value, uint32(12), int64(1), int64(2), []byte("0123456789abcdef"))
	f.Add(value[:len(value)-1], uint32(math.MaxUint32), int64(math.MaxInt64), int64(math.MinInt64), value)
	f.Add(seal([]byte("payload"), []byte{2, 0}), uint32(12), int64(-1), int64(-1), []byte{})
	f.Add([]byte(Magic), uint32(12), int64(1), int64(1), []byte{1})
	f.Add([]byte("payload"), uint32(12), int64(1), int64(1), value[7:44])
	f.Fuzz(func(t *testing.T, payload []byte, prefixLen uint32, expiry, leaseEnd int64, id []byte) {
		// An arbitrary value is a record only if encode makes the same of what it holds.
		switch got, kind := Decode(payload); kind {
		case KindRecord:
			if again := got.Encode(); !bytes.Equal(again, payload) {
				t.Errorf("%q is taken for the record %+v, which is encoded as %q", payload, got, again)
			}
		case KindBare:
			if !bytes.Equal(got.Payload, payload) || bytes.HasSuffix(payload, []byte(Magic)) {
				t.Errorf("payload of the bare value %q = %q", payload, got.Payload)
			}
		case KindCorrupt:
			if got.Payload != nil || !bytes.HasSuffix(payload, []byte(Magic)) {
				t.Errorf("payload of the damaged record %q = %q", payload, got.Payload)
			}
		case KindNewer:
			if !bytes.HasPrefix(payload, got.Payload) || !bytes.HasSuffix(payload, []byte(Magic)) {
				t.Errorf("payload of the newer record %q = %q", payload, got.Payload)
			}
		}
		// Arbitrary fields in a trailer that is whole are a record of this version, or of one that is not known.
		if fields := id; len(fields) < math.MaxUint16-14 {
			sealed := seal(payload, fields)
			got, kind := Decode(sealed)
			switch {
			case len(fields) == 0:
				if kind != KindCorrupt || got.Payload != nil {
					t.Errorf("a trailer without fields: kind %d, payload %q", kind, got.Payload)
				}
			case len(fields) == 37 && fields[0] == 1:
				if kind != KindRecord || !bytes.Equal(got.Encode(), sealed) {
					t.Errorf("fields %x: kind %d, encoded again as %x", fields, kind, got.Encode())
				}
			default:
				if kind != KindNewer || !bytes.Equal(got.Payload, payload) {
					t.Errorf("fields %x: kind %d, payload %q", fields, kind, got.Payload)
				}
			}
		}
		// What was encoded decodes to itself, whatever the payload looks like.
		want := Record{Payload: payload, PrefixLen: int(prefixLen), Expiry: Millis(expiry), LeaseEnd: Millis(leaseEnd)}
		copy(want.ID[:], id)
		value := want.Encode()
		wantRecord(t, value, want)
		// And where a byte of it is another, it is not served. leaseEnd says which byte.
		if at := uint64(leaseEnd) % uint64(len(value)-len(Magic)); len(id) > 0 && id[0] != 0 {
			value[at] ^= id[0]
			wantKind(t, fmt.Sprintf("byte %d changed", at), value, KindCorrupt, nil)
		}
	})
}
