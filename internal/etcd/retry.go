package etcd

import (
	"context"
	"math/rand/v2"
	"time"
)

// Retry calls try until it gives a definite answer or ctx ends, each time with a bounded context.
// It is for requests that may be sent twice. The error is etcd's, or that of ctx with what etcd
// said last.
func Retry(ctx context.Context, try func(ctx context.Context) error) error {
	var b Backoff
	return b.Retry(ctx, try)
}

// Backoff spaces attempts: 10 ms, doubling up to 320 ms, half of it random.
type Backoff struct{ attempts int }

// Retry is the function Retry, for a request that was tried before with the same Backoff.
func (b *Backoff) Retry(ctx context.Context, try func(ctx context.Context) error) error {
	var last error
	for {
		attempt, cancel := context.WithTimeout(ctx, b.Timeout())
		err := try(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return Ended(context.Cause(ctx), last)
		}
		if k := Classify(err); k != Unknown && k != Transient {
			return err
		}
		last = err
		if !b.Wait(ctx) {
			return Ended(context.Cause(ctx), last)
		}
	}
}

// Timeout bounds the attempt that comes next.
func (b *Backoff) Timeout() time.Duration { return AttemptTimeout << min(b.attempts/3, 2) }

// Wait waits until the next attempt is due. It reports false when ctx ended before.
func (b *Backoff) Wait(ctx context.Context) bool {
	d := 10 * time.Millisecond << min(b.attempts, 5)
	b.attempts++
	t := time.NewTimer(d/2 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
