// Package limit decides how many batches of a queue may be on their way to etcd at a time.
package limit

import (
	"runtime"
	"sync"
	"time"
)

// Limits of the dispatch rule.
const (
	minInFlight  = 1
	Initial      = 2 // before etcd has answered
	maxInFlight  = 16
	maxFull      = 64                     // batches in flight, counting full ones that go whatever the rule says
	stuckAfter   = 250 * time.Millisecond // a batch that takes longer no longer counts
	latencyEpoch = 5 * time.Second        // the least latency is taken over the last one to two epochs
)

// Limiter decides when a batch of what waits in a queue may go to etcd. Reads and writes each have
// one. In the field's words it is a concurrency limiter that follows the latency, as TCP Vegas
// does.
//
// While batches are in flight the queue grows, and the more it has grown, the fewer requests carry
// it: that is group commit. What remains to choose is how many batches may be in flight:
//
//   - At most N = 16 · (least latency / average latency)², between 1 and 16. Batches that slow each
//     other down, on a busy machine or etcd, become fewer and larger; where the time goes into the
//     network and not into work, they do not slow each other down, and many of them keep callers
//     from waiting.
//   - A free slot sends at once. There is no linger timer: a lone caller never waits for company.
//     Instead a starting worker yields the processor once, so that callers that can already run get
//     to join its batch.
//   - A full batch goes whatever N is, since waiting cannot make it larger.
//   - A batch in flight for 250 ms, as after the loss of a leader, no longer counts, so that one
//     unreachable member does not hold up what another would answer.
//
// Rejected: the ratio without the square (a fifth to a third more processor time for a commit at 16
// to 64 callers on a machine that is shared with etcd), a fixed N (from 1 to 4: up to 1.6 times
// slower, each in another setting), a timer that collects company (adds its period to every lone
// call), and a standing pool of workers (idle goroutines).
//
// A Limiter has no goroutine of its own: a worker carries one batch and ends. Its fields, and all
// its methods, are guarded by the mutex of the queue that it belongs to.
type Limiter struct {
	batch int    // items that a batch takes at most
	work  func() // carries one

	starting int // workers that have not taken their batch yet
	counted  int // batches in flight that count
	total    int // batches in flight

	average   time.Duration    // exponentially weighted
	least     [2]time.Duration // in this epoch and in the one before; 0: none
	epochEnds time.Time
}

// Offer starts as many workers as the rule allows for what waits.
func (l *Limiter) Offer(waiting int) {
	for waiting -= l.starting * l.batch; waiting > 0; waiting -= l.batch {
		full := waiting >= l.batch && l.total < maxFull
		if l.counted >= l.limit() && !full {
			return
		}
		l.starting++
		l.counted++
		l.total++
		go func() {
			runtime.Gosched()
			l.work()
		}()
	}
}

// New returns a limiter for batches of up to batch items. work runs in a goroutine of its own: it
// yields, locks, calls took and carry, takes a batch, sends it, and calls what ends it.
func New(batch int, work func()) Limiter { return Limiter{batch: batch, work: work} }

// Took says that a starting worker takes its batch now. It returns how many items that holds at
// most, of batch.
func (l *Limiter) Took(batch int) int {
	l.starting--
	l.batch = batch
	return batch
}

// Idle reports whether no batch is starting or in flight.
func (l *Limiter) Idle() bool { return l.starting == 0 && l.counted == 0 && l.total == 0 }

// limit is N.
func (l *Limiter) limit() int {
	least := l.least[0]
	if least == 0 || l.least[1] != 0 && l.least[1] < least {
		least = l.least[1]
	}
	if l.average == 0 || least == 0 {
		return Initial
	}
	ratio := float64(least) / float64(l.average)
	return min(max(int(maxInFlight*ratio*ratio), minInFlight), maxInFlight)
}

// Observe notes how long etcd took to answer a batch.
func (l *Limiter) Observe(latency time.Duration, now time.Time) {
	if now.After(l.epochEnds) {
		l.least[0], l.least[1] = 0, l.least[0]
		l.epochEnds = now.Add(latencyEpoch)
	}
	if l.least[0] == 0 || latency < l.least[0] {
		l.least[0] = latency
	}
	if l.average == 0 {
		l.average = latency
	}
	l.average += (latency - l.average) / 8
}

// Carry takes the clock of a batch: called with mu held when a batch starts, it returns what ends
// it. waiting tells, with mu held, what waits in the queue by then.
func (l *Limiter) Carry(mu *sync.Mutex, waiting func() int) (end func()) {
	counted := true
	t := time.AfterFunc(stuckAfter, func() {
		mu.Lock()
		defer mu.Unlock()
		if counted {
			counted = false
			l.counted--
			l.Offer(waiting())
		}
	})
	return func() {
		t.Stop()
		mu.Lock()
		defer mu.Unlock()
		l.total--
		if counted {
			counted = false
			l.counted--
		}
		l.Offer(waiting())
	}
}
