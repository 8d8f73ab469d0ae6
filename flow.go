package etcdstore

import (
	"runtime"
	"sync"
	"time"
)

// Limits of the dispatch rule.
const (
	minInFlight  = 1
	newInFlight  = 2 // before etcd has answered
	maxInFlight  = 16
	maxFull      = 64                     // batches in flight, counting full ones that go whatever the rule says
	stuckAfter   = 250 * time.Millisecond // a batch that takes longer no longer counts
	latencyEpoch = 5 * time.Second        // the least latency is taken over the last one to two epochs
)

// lane decides when a batch of what waits in a queue may go to etcd. Reads and writes each have one.
//
// While batches are in flight the queue grows, and the more it has grown, the fewer requests carry it: that is
// group commit. What remains to choose is how many batches may be in flight:
//
//   - At most N = 16 · (least latency / average latency)², between 1 and 16. Batches that slow each other down,
//     on a busy machine or etcd, become fewer and larger; where the time goes into the network and not into
//     work, they do not slow each other down, and many of them keep callers from waiting.
//   - A free slot sends at once. There is no linger timer: a lone caller never waits for company. Instead a
//     starting worker yields the processor once, so that callers that can already run get to join its batch.
//   - A full batch goes whatever N is, since waiting cannot make it larger.
//   - A batch in flight for 250 ms, as after the loss of a leader, no longer counts, so that one unreachable
//     member does not hold up what another would answer.
//
// Rejected: the ratio without the square (a fifth to a third more processor time for a commit at 16 to 64 callers on a
// machine that is shared with etcd), a fixed N (from 1 to 4: up to 1.6 times slower, each in another setting), a timer
// that collects company (adds its period to every lone call), and a standing pool of workers (idle goroutines).
//
// A lane has no goroutine of its own: a worker carries one batch and ends. Its fields, and all its methods, are
// guarded by the mutex of the queue that it belongs to.
type lane struct {
	batch int    // items that a batch takes at most
	work  func() // runs in a goroutine of its own: yields, locks, calls took and begin, takes a batch, sends it, calls end

	starting int // workers that have not taken their batch yet
	counted  int // batches in flight that count
	total    int // batches in flight

	average   time.Duration    // exponentially weighted
	least     [2]time.Duration // in this epoch and in the one before; 0: none
	epochEnds time.Time
}

// kick starts as many workers as the rule allows for what waits.
func (l *lane) kick(waiting int) {
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

// took says that a starting worker takes its batch now.
func (l *lane) took() { l.starting-- }

// limit is N.
func (l *lane) limit() int {
	least := l.least[0]
	if least == 0 || l.least[1] != 0 && l.least[1] < least {
		least = l.least[1]
	}
	if l.average == 0 || least == 0 {
		return newInFlight
	}
	ratio := float64(least) / float64(l.average)
	return min(max(int(maxInFlight*ratio*ratio), minInFlight), maxInFlight)
}

// observe notes how long etcd took to answer a batch.
func (l *lane) observe(latency time.Duration, now time.Time) {
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

// begin takes the clock of a batch: called with mu held when a batch starts, it returns what ends it. waiting
// tells, with mu held, what waits in the queue by then.
func (l *lane) begin(mu *sync.Mutex, waiting func() int) (end func()) {
	counted := true
	t := time.AfterFunc(stuckAfter, func() {
		mu.Lock()
		defer mu.Unlock()
		if counted {
			counted = false
			l.counted--
			l.kick(waiting())
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
		l.kick(waiting())
	}
}
