package lock

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

// One holds a key at a time, also where many want it, and another key is not held up.
func TestKeyed_OneAtATime(t *testing.T) {
	var k Keyed
	var wg sync.WaitGroup
	inside, entered := 0, 0
	for range 100 {
		wg.Go(func() {
			unlock, err := k.Lock(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			inside++ // the race detector sees two at a time, and so does the count
			if entered++; inside != 1 {
				t.Errorf("%d hold the key", inside)
			}
			inside--
			unlock()
		})
	}
	unlock, err := k.Lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if keys, users := k.Count(); keys != 1 || users != 1 || entered != 100 {
		t.Errorf("%d entered; %d keys and %d users are left, want the one of b", entered, keys, users)
	}
	unlock()
	if keys, _ := k.Count(); keys != 0 {
		t.Errorf("%d keys are left", keys)
	}
}

// Whoever stops waiting leaves nothing behind, and does not get the key later.
func TestKeyed_ContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var k Keyed
		unlock, err := k.Lock(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			_, err := k.Lock(ctx, "a")
			ended <- err
		}()
		synctest.Wait()
		if _, users := k.Count(); users != 2 {
			t.Errorf("%d users, want the holder and the one that waits", users)
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the wait ended with %v", err)
		}
		unlock()
		if keys, users := k.Count(); keys != 0 || users != 0 {
			t.Errorf("%d keys and %d users are left", keys, users)
		}
	})
}
