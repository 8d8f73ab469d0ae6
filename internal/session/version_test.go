package session

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"reflect"
	"slices"
	"testing"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/seed210be38d/etcdstore/internal/record"
)

// seal completes a trailer as every version of the format has it: its length, the checksum, the
// magic.
func seal(payload, fields []byte) []byte {
	b := slices.Concat(payload, fields)
	b = binary.BigEndian.AppendUint16(b, uint16(len(fields)+14))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return append(b, record.Magic...)
}

func TestDecoder_Version(t *testing.T) {
	const prefix = "scs:session:"
	const expiry, leaseEnd = record.Millis(1000), record.Millis(2000)
	id := record.NewWriteID()
	encoded := func(prefix string) []byte {
		r := record.Record{
			Payload: []byte("payload"), PrefixLen: len(prefix),
			Expiry: expiry, LeaseEnd: leaseEnd, ID: id,
		}
		return r.Encode()
	}
	newer := seal([]byte("payload"), []byte{record.FormatVersion + 1})
	damaged := encoded(prefix)
	damaged[len(damaged)/2] ^= 1
	const none, whole, bare = "", "whole", "bare"
	for _, tc := range []struct {
		name    string
		prefix  string
		token   string
		value   []byte
		is      string // what there is to be read: a record, a session of scs's own etcdstore, or none
		err     error
		foreign bool
	}{
		{"record", prefix, "abc", encoded(prefix), whole, nil, false},
		{"record, odd token", prefix, "a:b", encoded(prefix), whole, nil, false},
		{"record, no prefix", "", "abc", encoded(""), whole, nil, false},
		{"record of a longer prefix", prefix, "1:abc", encoded(prefix + "1:"), none, ErrForeignKey, true},
		{"record of another prefix", prefix, "1abc", encoded(prefix + "1"), none, ErrForeignKey, true},
		{"record of a shorter prefix", prefix, "abc", encoded("scs:"), none, ErrForeignKey, true},
		{"bare", prefix, "Az09-_.=", []byte("payload"), bare, nil, false},
		{"bare, empty", prefix, "abc", nil, bare, nil, false},
		{"bare, of a longer prefix", prefix, "1:abc", []byte("payload"), none, ErrForeignKey, true},
		{"bare, no token's letters", prefix, "ab/c", []byte("payload"), none, ErrForeignKey, true},
		{"newer", prefix, "abc", newer, none, ErrFormat, false},
		{"newer, of a longer prefix", prefix, "1:abc", newer, none, ErrForeignKey, true},
		{"damaged", prefix, "abc", damaged, none, ErrCorrupt, false},
		{"damaged, of a longer prefix", prefix, "1:abc", damaged, none, ErrForeignKey, true},
		{"the magic alone", prefix, "abc", []byte(record.Magic), none, ErrCorrupt, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kv := &mvccpb.KeyValue{
				Key: []byte(tc.prefix + tc.token), Value: tc.value,
				CreateRevision: 5, ModRevision: 7, Version: 3, Lease: 9,
			}
			got := Decoder{scs.GobCodec{}, tc.prefix}.Version([]*mvccpb.KeyValue{kv}, 11)
			if !errors.Is(got.Err, tc.err) || got.Foreign != tc.foreign {
				t.Errorf("error = %v, foreign = %v; want %v, %v", got.Err, got.Foreign, tc.err, tc.foreign)
			}
			if errors.Is(got.Err, ErrInvalidToken) != tc.foreign {
				t.Errorf("error = %v, foreign = %v", got.Err, tc.foreign)
			}
			if unreadable := tc.err != nil && !tc.foreign; (got.Unreadable() != nil) != unreadable {
				t.Errorf("Unreadable = %v", got.Unreadable())
			}
			// Where it stands is known of everything: it is what a compare needs.
			if got.Rev != 7 || got.AsOf != 11 || got.Created != 5 || got.Count != 3 || got.Lease != 9 {
				t.Errorf("version = %+v", got)
			}
			live := ImageOf(got.Live(expiry - 1))
			if (live != nil) != (tc.is != none) {
				t.Fatalf("it holds %v", live)
			}
			switch tc.is {
			case whole:
				if string(live.payload) != "payload" || live.expiry != expiry ||
					got.Until != leaseEnd || got.ID != id {
					t.Errorf("version = %+v with %+v", got, live)
				}
				if got.Live(expiry) != nil || !got.Expired(expiry) {
					t.Error("it does not end")
				}
			case bare:
				if string(live.payload) != string(tc.value) || live.expiry != 0 ||
					got.Until != 0 || got.ID != (record.WriteID{}) {
					t.Errorf("version = %+v with %+v", got, live)
				}
				if got.Live(record.Forever) == nil {
					t.Error("it has ended, which only its lease can know")
				}
			default:
				if got.Expired(record.Forever) {
					t.Error("what cannot be read has expired")
				}
			}
		})
	}
}

func TestDecoder_Version_Missing(t *testing.T) {
	got := Decoder{scs.GobCodec{}, "scs:session:"}.Version(nil, 11)
	if want := (&record.Version{AsOf: 11}); !reflect.DeepEqual(got, want) {
		t.Errorf("version = %+v, want %+v", got, want)
	}
	if got.Live(0) != nil || got.Expired(record.Forever) || got.Unreadable() != nil {
		t.Errorf("version = %+v is something", got)
	}
}

// An expiry that is known is never the one that says that it is not, and the version that is
// completed, which others have, stays as it is.
func TestDecoder_WithExpiry(t *testing.T) {
	d := Decoder{scs.GobCodec{}, "scs:session:"}
	kv := &mvccpb.KeyValue{Key: []byte("scs:session:abc"), Value: []byte("payload"), ModRevision: 7}
	for expiry, want := range map[record.Millis]record.Millis{
		1000: 1000, 1: 1, 0: 1, -5: 1, record.Forever: record.Forever,
	} {
		v := d.Version([]*mvccpb.KeyValue{kv}, 11)
		got, err := d.WithExpiry(v, expiry)
		if err != nil {
			t.Fatal(err)
		}
		i := ImageOf(got.Value)
		if i.expiry != want || string(i.payload) != "payload" || got.Rev != 7 || got.AsOf != 11 {
			t.Errorf("with %d: %+v, %+v", expiry, got, i)
		}
		if v.Value.Expiry() != 0 {
			t.Errorf("with %d: the version itself was changed", expiry)
		}
	}
}
