package session

import (
	"fmt"
	"testing"
)

// tenKeys returns contents of ten keys, as a session of a shop may have them, some of them changed.
func tenKeys(changed ...string) *Contents {
	c := with()
	for i := range 10 {
		if key := fmt.Sprint("key", i); i%2 == 0 {
			c.values[key] = i
		} else {
			c.values[key] = "some text, " + key
		}
	}
	for _, key := range changed {
		c.values[key] = "changed"
	}
	return c
}

func BenchmarkMerger_Merge(b *testing.B) {
	base, ours, theirs := tenKeys(), tenKeys("key1"), tenKeys("key2")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := (Merger{}).merge(base, ours, theirs); err != nil {
			b.Fatal(err)
		}
	}
}

// A step of a fold: the base and what the commit wants are decoded already, and so is what the fold has made so far.
func BenchmarkCommit_Next(b *testing.B) {
	base, current := gobImage(b, tenKeys(), 1000), gobImage(b, tenKeys("key2"), 1000)
	c := &Commit{Base: readAt(base, 5), Ours: gobImage(b, tenKeys("key1"), 1000)}
	for _, i := range []*Image{base, current, c.Ours} {
		if _, err := i.Contents(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Next(at(current, 0)); err != nil {
			b.Fatal(err)
		}
	}
}
