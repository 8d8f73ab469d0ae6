package weakmap

import (
	"runtime"
	"testing"
	"time"
)

// An object has its value as long as somebody holds it, and no longer.
func TestMap_ForgetsWhatNobodyHolds(t *testing.T) {
	var m Map[int]
	kept := make([]byte, 64)
	m.Put(&kept[0], 7)
	m.Put(&kept[0], 8)
	for i := range 1000 {
		b := make([]byte, 64)
		m.Put(&b[0], i)
		if v, ok := m.Get(&b[0]); !ok || v != i {
			t.Fatalf("object %d has %d, %t", i, v, ok)
		}
	}
	for end := time.Now().Add(10 * time.Second); m.Len() > 1; runtime.Gosched() {
		runtime.GC()
		if time.Now().After(end) {
			t.Fatalf("%d values are left", m.Len())
		}
	}
	if v, ok := m.Get(&kept[0]); !ok || v != 8 {
		t.Errorf("what is held has %d, %t", v, ok)
	}
	other := make([]byte, 64)
	if _, ok := m.Get(&other[0]); ok {
		t.Error("another object has a value")
	}
	runtime.KeepAlive(kept)
}
