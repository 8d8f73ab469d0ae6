package lock

import (
	"context"
	"sync"
)

// Keyed is a mutex for each key, between the goroutines of this process. It needs no network. The
// zero value is ready.
type Keyed struct {
	mu    sync.Mutex
	slots map[string]*slot
}

// slot is the mutex of one key: a semaphore of one, and how many hold it or wait for it.
type slot struct {
	held  chan struct{}
	users int
}

// Lock waits for the mutex of a key, as long as ctx lasts. The function that it returns unlocks it.
func (k *Keyed) Lock(ctx context.Context, key string) (unlock func(), err error) {
	s := k.enter(key)
	select {
	case s.held <- struct{}{}:
		return func() { <-s.held; k.leave(key, s) }, nil
	case <-ctx.Done():
		k.leave(key, s)
		return nil, ctx.Err()
	}
}

func (k *Keyed) enter(key string) *slot {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.slots[key]
	if s == nil {
		s = &slot{held: make(chan struct{}, 1)}
		if k.slots == nil {
			k.slots = make(map[string]*slot)
		}
		k.slots[key] = s
	}
	s.users++
	return s
}

func (k *Keyed) leave(key string, s *slot) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(k.slots, key)
	}
}

// Count returns how many keys are locked, and how many hold those locks or wait for them.
func (k *Keyed) Count() (keys, users int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range k.slots {
		users += s.users
	}
	return len(k.slots), users
}
