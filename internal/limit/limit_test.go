package limit

import (
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimiter_Offer(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		Limiter Limiter
		waiting int
		want    int // workers that start
	}{
		"nothing waits":                         {Limiter{}, 0, 0},
		"one waits":                             {Limiter{}, 1, 1},
		"one batch waits":                       {Limiter{}, 10, 1},
		"more than a batch waits":               {Limiter{}, 11, 2},
		"more than the limit, not full":         {Limiter{}, 25, 2},
		"more than the limit, full":             {Limiter{}, 35, 3},
		"a starting worker will take it":        {Limiter{starting: 1, counted: 1, total: 1}, 10, 0},
		"a starting worker will not take all":   {Limiter{starting: 1, counted: 1, total: 1}, 11, 1},
		"one in flight":                         {Limiter{counted: 1, total: 1}, 1, 1},
		"two in flight":                         {Limiter{counted: 2, total: 2}, 9, 0},
		"two in flight, full":                   {Limiter{counted: 2, total: 2}, 10, 1},
		"two in flight, full and a rest":        {Limiter{counted: 2, total: 2}, 19, 1},
		"63 in flight, full":                    {Limiter{counted: 63, total: 63}, 100, 1},
		"64 in flight, full":                    {Limiter{counted: 64, total: 64}, 100, 0},
		"64 in flight, all stuck":               {Limiter{counted: 0, total: 64}, 1, 1},
		"as fast as ever, 15 in flight":         {Limiter{average: ms, least: [2]time.Duration{ms}, counted: 15, total: 15}, 5, 1},
		"as fast as ever, 16 in flight":         {Limiter{average: ms, least: [2]time.Duration{ms}, counted: 16, total: 16}, 5, 0},
		"half as fast, 3 in flight":             {Limiter{average: 2 * ms, least: [2]time.Duration{ms}, counted: 3, total: 3}, 5, 1},
		"half as fast, 4 in flight":             {Limiter{average: 2 * ms, least: [2]time.Duration{ms}, counted: 4, total: 4}, 5, 0},
		"far slower, 1 in flight":               {Limiter{average: 99 * ms, least: [2]time.Duration{ms}, counted: 1, total: 1}, 5, 0},
		"far slower, nothing waits":             {Limiter{average: 99 * ms, least: [2]time.Duration{ms}}, 0, 0},
		"as fast as ever, nothing waits":        {Limiter{average: ms, least: [2]time.Duration{ms}}, 0, 0},
		"as fast as ever, many wait, not full":  {Limiter{average: ms, least: [2]time.Duration{ms}, batch: 100}, 99, 1},
		"two in flight, starting, nothing else": {Limiter{starting: 2, counted: 2, total: 2}, 20, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				started := 0
				l := c.Limiter
				if l.batch == 0 {
					l.batch = 10
				}
				l.work = func() {
					mu.Lock()
					defer mu.Unlock()
					started++
				}
				before := l
				mu.Lock()
				l.Offer(c.waiting)
				mu.Unlock()
				synctest.Wait()
				if started != c.want {
					t.Errorf("%d workers started, want %d", started, c.want)
				}
				if l.starting-before.starting != started || l.counted-before.counted != started || l.total-before.total != started {
					t.Errorf("after %d starts, %d more starting, %d more counted, %d more in all",
						started, l.starting-before.starting, l.counted-before.counted, l.total-before.total)
				}
			})
		})
	}
}

func TestLimiter_Limit(t *testing.T) {
	for _, c := range []struct {
		least   [2]time.Duration
		average time.Duration
		want    int
	}{
		{[2]time.Duration{}, 0, 2},
		{[2]time.Duration{0, 0}, 10, 2},
		{[2]time.Duration{10, 0}, 10, 16},
		{[2]time.Duration{10, 0}, 9, 16}, // the average lags behind
		{[2]time.Duration{0, 10}, 10, 16},
		{[2]time.Duration{10, 5}, 10, 4},
		{[2]time.Duration{5, 10}, 10, 4},
		{[2]time.Duration{10, 0}, 15, 7},
		{[2]time.Duration{10, 0}, 28, 2},
		{[2]time.Duration{10, 0}, 29, 1},
		{[2]time.Duration{10, 0}, 1000, 1},
	} {
		l := Limiter{least: c.least, average: c.average}
		if got := l.limit(); got != c.want {
			t.Errorf("least %v, average %v: %d, want %d", c.least, c.average, got, c.want)
		}
	}
}

func TestLimiter_Observe(t *testing.T) {
	var l Limiter
	now := time.Unix(0, 0)
	observe := func(n int, latency time.Duration, want int) {
		t.Helper()
		for range n {
			now = now.Add(10 * time.Millisecond)
			l.Observe(latency, now)
			if got := l.limit(); got < minInFlight || got > maxInFlight {
				t.Fatalf("a limit of %d", got)
			}
		}
		if got := l.limit(); got != want && got != want-1 { // the average comes near, not there
			t.Errorf("after %d batches of %v a limit of %d, want %d; average %v, least %v", n, latency, got, want, l.average, l.least)
		}
	}
	observe(1, 8*time.Millisecond, 16)
	observe(150, time.Millisecond, 16)
	observe(1, 2*time.Millisecond, 13) // a single one hardly counts
	observe(50, 2*time.Millisecond, 4)
	observe(50, 100*time.Millisecond, 1)
	observe(700, 2*time.Millisecond, 4) // 7 s: the least is still known from the epoch before
	observe(600, 2*time.Millisecond, 16)
	now = now.Add(time.Hour)
	observe(1, 2*time.Millisecond, 16)
	observe(40, time.Millisecond, 16)
}

// laneQueue is a queue of items that a lane has carried.
type laneQueue struct {
	mu      sync.Mutex
	Limiter Limiter
	waiting int
	taken   []int       // the sizes of the batches
	carry   func(i int) // takes as long as the i-th batch does
}

func newLaneQueue(batch int, carry func(i int)) *laneQueue {
	q := &laneQueue{carry: carry}
	q.Limiter = New(batch, q.work)
	return q
}

func (q *laneQueue) work() {
	q.mu.Lock()
	n := min(q.waiting, q.Limiter.Took(q.Limiter.batch))
	q.waiting -= n
	i := len(q.taken)
	q.taken = append(q.taken, n)
	end := q.Limiter.Carry(&q.mu, func() int { return q.waiting })
	q.mu.Unlock()
	start := time.Now()
	q.carry(i)
	now := time.Now()
	q.mu.Lock()
	q.Limiter.Observe(now.Sub(start), now)
	q.mu.Unlock()
	end()
}

func (q *laneQueue) add(n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting += n
	q.Limiter.Offer(q.waiting)
}

func (q *laneQueue) want(t *testing.T, counted, total int, taken ...int) {
	t.Helper()
	synctest.Wait()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.Limiter.counted != counted || q.Limiter.total != total || q.Limiter.starting != 0 {
		t.Errorf("%d batches count of %d, %d starting, want %d of %d", q.Limiter.counted, q.Limiter.total, q.Limiter.starting, counted, total)
	}
	if !slices.Equal(q.taken, taken) {
		t.Fatalf("batches of %v, want %v", q.taken, taken)
	}
}

// What waits goes when a batch ends, and a batch that is stuck makes room before.
func TestLimiter_Stuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gates := make([]chan struct{}, 10)
		for i := range gates {
			gates[i] = make(chan struct{})
		}
		q := newLaneQueue(10, func(i int) { <-gates[i] })
		q.add(1)
		q.want(t, 1, 1, 1)
		q.add(1)
		q.want(t, 2, 2, 1, 1)
		q.add(3)
		q.want(t, 2, 2, 1, 1)
		close(gates[0]) // one ends, and what waits goes
		q.want(t, 2, 2, 1, 1, 3)
		q.add(4)
		q.want(t, 2, 2, 1, 1, 3)
		time.Sleep(stuckAfter - 1)
		q.want(t, 2, 2, 1, 1, 3)
		time.Sleep(time.Nanosecond) // both are stuck; one worker is enough
		q.want(t, 1, 3, 1, 1, 3, 4)
		close(gates[1])
		close(gates[2]) // stuck ones that end after all
		q.want(t, 1, 1, 1, 1, 3, 4)
		time.Sleep(time.Hour)
		q.want(t, 0, 1, 1, 1, 3, 4)
		close(gates[3])
		q.want(t, 0, 0, 1, 1, 3, 4)
	})
}

// Callers that can already run join the batch of a starting worker.
func TestLimiter_Joins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newLaneQueue(10, func(int) {})
		q.mu.Lock()
		for range 7 {
			q.waiting++
			q.Limiter.Offer(q.waiting)
		}
		q.mu.Unlock()
		q.want(t, 0, 0, 7)
	})
}

// Whatever comes when, and however long it takes, all of it is carried, and never by more workers than the rule allows.
func TestLimiter_Random(t *testing.T) {
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			slowest := time.Duration(1+rng.IntN(400)) * time.Millisecond
			var mu sync.Mutex
			q := newLaneQueue(1+rng.IntN(20), func(int) {
				mu.Lock()
				d := time.Duration(rng.Int64N(int64(slowest)))
				mu.Unlock()
				time.Sleep(d)
			})
			sum := 0
			for range 200 {
				mu.Lock()
				n, d := rng.IntN(30), time.Duration(rng.IntN(40))*time.Millisecond
				mu.Unlock()
				q.add(n)
				sum += n
				q.mu.Lock()
				rest := q.waiting - q.Limiter.starting*q.Limiter.batch
				if l := q.Limiter; rest > 0 && (l.counted < l.limit() || rest >= l.batch && l.total < maxFull) {
					t.Errorf("%d wait, %d batches count of %d, the limit is %d", rest, l.counted, l.total, l.limit())
				}
				q.mu.Unlock()
				time.Sleep(d)
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			for _, n := range q.taken {
				sum -= n
			}
			if sum != 0 || q.waiting != 0 || q.Limiter.counted != 0 || q.Limiter.total != 0 || q.Limiter.starting != 0 {
				t.Errorf("seed %d: %d not carried, %d wait, %d batches count of %d, %d starting", seed, sum, q.waiting, q.Limiter.counted, q.Limiter.total, q.Limiter.starting)
			}
		})
	}
}
