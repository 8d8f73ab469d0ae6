package record

import (
	"fmt"
	"testing"
)

func BenchmarkRecord_Encode(b *testing.B) {
	for _, size := range []int{256, 4 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			r := Record{Payload: make([]byte, size), PrefixLen: 12, Expiry: 1, LeaseEnd: 2, ID: NewWriteID()}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				r.Encode()
			}
		})
	}
}

func BenchmarkRecord_Decode(b *testing.B) {
	for _, size := range []int{256, 4 << 10, 64 << 10} {
		b.Run(fmt.Sprintf("bytes=%d", size), func(b *testing.B) {
			r := Record{Payload: make([]byte, size), PrefixLen: 12, Expiry: 1, LeaseEnd: 2, ID: NewWriteID()}
			value := r.Encode()
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				if _, kind := Decode(value); kind != KindRecord {
					b.Fatal("no record")
				}
			}
		})
	}
}
