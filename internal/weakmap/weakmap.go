// Package weakmap keeps what is known about objects that others hold, for as long as they hold
// them.
package weakmap

import (
	"runtime"
	"sync"
	"weak"
)

// Map has a value for objects in the heap. It does not keep them, and forgets what nobody holds any
// more. The zero value is ready. The value must not refer to its object, or both stay.
type Map[V any] struct {
	mu     sync.Mutex
	values map[weak.Pointer[byte]]V
}

// Put sets the value of the object that begins at p.
func (m *Map[V]) Put(p *byte, v V) {
	key := weak.Make(p)
	m.mu.Lock()
	if m.values == nil {
		m.values = make(map[weak.Pointer[byte]]V)
	}
	_, known := m.values[key]
	m.values[key] = v
	m.mu.Unlock()
	if !known {
		runtime.AddCleanup(p, m.forget, key)
	}
}

// Get returns the value of the object that begins at p.
func (m *Map[V]) Get(p *byte) (v V, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok = m.values[weak.Make(p)]
	return v, ok
}

// Len returns how many objects have a value.
func (m *Map[V]) Len() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.values)
}

func (m *Map[V]) forget(key weak.Pointer[byte]) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.values, key)
}
