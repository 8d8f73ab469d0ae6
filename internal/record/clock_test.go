package record

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestClock_Steps(t *testing.T) {
	const slack = Millis(time.Minute / time.Millisecond)
	start := ToMillis(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	for _, tc := range []struct {
		name       string
		wall, want []Millis // from start
	}{
		{"stands", []Millis{0, 0, 0}, []Millis{0, 0, 0}},
		{"goes", []Millis{0, 1, 1000, 5000}, []Millis{0, 1, 1000, 5000}},
		{"ahead by a day", []Millis{0, 86_400_000}, []Millis{0, 86_400_000}},
		{"a little back", []Millis{1000, 999, 0, 999, 1000, 1001}, []Millis{1000, 1000, 1000, 1000, 1000, 1001}},
		{"a minute back", []Millis{slack, 0, 1, slack - 1, slack + 1}, []Millis{slack, slack, slack, slack, slack + 1}},
		{"further back", []Millis{slack + 1, 0, 1}, []Millis{slack + 1, 0, 1}},
		{"a day ahead, and right again", []Millis{0, 86_400_000, 5, 4, 6}, []Millis{0, 86_400_000, 5, 5, 6}},
		// What counts is how far the wall clock lags, not how far it went in one step.
		{"further back in small steps", []Millis{slack, slack / 2, 0, -1, 0}, []Millis{slack, slack, slack, -1, 0}},
		{"the ends of time", []Millis{Forever - start, -start, 0}, []Millis{Forever - start, -start, 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var at Millis
			c := Clock{Wall: func() time.Time { return time.UnixMilli(int64(start + at)) }}
			for i := range tc.wall {
				at = tc.wall[i]
				if got := c.Now() - start; got != tc.want[i] {
					t.Errorf("reading %d, at %d: now = %d, want %d", i, at, got, tc.want[i])
				}
			}
		})
	}
}

// A goroutine that read the wall clock and then did not run for long sets nobody's clock back.
func TestClock_StaleReading(t *testing.T) {
	start := time.Now()
	var c Clock
	c.Wall = func() time.Time {
		c.Wall = func() time.Time { return start.Add(time.Hour) }
		c.Now()
		return start
	}
	if got, want := c.Now(), ToMillis(start.Add(time.Hour)); got != want {
		t.Errorf("now = %v before another's now", time.Duration(want-got)*time.Millisecond)
	}
}

// Goroutines that read a wall clock which jumps about by less than a minute see one clock that does not go back.
func TestClock_Concurrent(t *testing.T) {
	start := time.Now()
	var ticks, seen atomic.Int64
	c := Clock{Wall: func() time.Time {
		return start.Add(time.Duration(ticks.Add(1))*time.Millisecond - rand.N(clockSlack))
	}}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 5000 {
				before := seen.Load() // what some goroutine was told before this one asks
				now := int64(c.Now())
				if now < before {
					t.Errorf("the clock went back by %d ms", before-now)
					return
				}
				for s := seen.Load(); now > s; s = seen.Load() {
					seen.CompareAndSwap(s, now)
				}
			}
		})
	}
	wg.Wait()
	if total := ToMillis(start.Add(time.Duration(ticks.Load()) * time.Millisecond)); Millis(seen.Load()) < total-5000 {
		t.Errorf("the clock stands %d ms behind", total-Millis(seen.Load()))
	}
}
