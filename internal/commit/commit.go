// Package commit is the write path of a store: group commit, exactly once, of changes to keys and
// of what stands with them. It knows neither sessions nor what a change means.
//
// # The algorithm
//
// Changes queue per key. While batches are in flight the queues grow; when the limiter lets a batch
// go, its worker takes many keys at once and, for each, folds the changes that wait, in order, over
// the latest version that it knows, into one new version. What is sent is one Txn of nested Txns,
// one a key:
//
//	If(mod revision is the version's, preconditions) Then(one write, and what stands with it)
//
// So a batch costs one round trip and one Raft entry, and a key that 64 calls change at once costs
// a few writes instead of 64 rounds of losing and trying again. A lone key goes un-nested.
//
// If the compare succeeded, the folded changes have happened, in their order, at one revision. If
// it failed, the key is read, in the Else or by a read of its own: either the write is in it or in
// its history, applied by a send whose answer was lost, or the changes are folded again over what
// it shows.
//
// # Steps
//
// An attempt to write a fold is in one of a few steps. One loop (drive) takes attempts through
// them, those at the same step together; a pure function (decide) says from what is known of an
// attempt and what was answered where it goes next.
//
//	toSeat  -> toSend | ended                   a lease was found | none can be had
//	toSend  -> ended                            applied | folded again | refused for good
//	toSend  -> toSend                           transient error; unknown outcome of an update or delete; the fence was moved
//	toSend  -> toSeat                           the lease is lost (same write id)
//	toSend  -> toFence -> toRead                unknown outcome of a create
//	toSend  -> toRead                           the compare failed and nobody asked why; refused for want of space
//	toRead  -> toSend | toSeat | toTrace | ended
//	toTrace -> toSend | ended
//
// Each step is one request, and leads to itself when that was not answered. Before each, the calls
// whose time is up are ended, and the attempt with its last call.
//
// # Invariants
//
//   - A key is in at most one attempt at a time, and its changes take effect in the order in which
//     they came. Different keys are independent.
//   - A change runs over what etcd holds, or over a guess that the compare validates. What it makes
//     of a guess, an error included, counts only if that compare succeeds.
//   - An attempt whose outcome is unknown is sent again as it is, with the same compare and the
//     same write id, until etcd gives a definite answer or the time of its calls is up. It is never
//     folded again before, because an earlier send may still be applied, and one revision must not
//     have two candidates that both count as ours.
//   - An attempt to create has no revision to compare that will never come back, so it also
//     compares the fence of its lease. If its outcome is unknown, the fence is moved first; then
//     the key and its history show what became of it, for good.
//   - One change's failure is its own: a batch that etcd refuses as a whole is sent again key by
//     key, and a fold change by change.
//   - The application's code runs beside the worker, never on it: a slow change delays its own key,
//     and one that ends its goroutine its own call.
//
// # Ownership
//
// Pipeline.mu guards the queues, what is ready, the limiter, of each queue what is pending and its
// attempt, of an attempt whether it was sent and which calls it has, and of a call what etcd said
// last. Everything else of an attempt, and what its queue knows of the key, belongs to the
// goroutine that drives it. A call's results belong to the attempt until done is closed, and then
// to the caller.
//
// Lock order: call.running, then Pipeline.mu, then the lease pool's.
//
// # Rejected
//
// A queue of etcd operations instead of changes: a conflict could not be merged without going back
// to its caller, which is the compare-and-swap loop again. Batches over the whole Txn with one
// compare each and no nesting: one conflict would fail all. An Else(Get) for every key of a batch:
// each is three messages more in the request, which the client, the leader's gRPC, and Raft on
// every member encode and decode, a sixth of what a commit costs, to save a round trip where
// processes contend. A lock per key: a round trip more for everyone, and somebody has to release
// it.
//
// No goroutine runs while nothing waits. The rule for when a batch may go is the limiter's.
package commit

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/limit"
	"github.com/seed210be38d/etcdstore/internal/read"
	"github.com/seed210be38d/etcdstore/internal/record"
)

var (
	// ErrUnknown says that a write may or may not have happened. It wraps what ended the call.
	ErrUnknown = errors.New("etcdstore: outcome unknown")
	// ErrTooLarge says that a value exceeds what etcd takes in one request.
	ErrTooLarge = errors.New("etcdstore: session is too large")

	errAbandoned = errors.New("etcdstore: call was abandoned")
	errExited    = errors.New("etcdstore: the application's code ended its goroutine")
)

// A Change is a change of one key: a function from its current state to what is to be written. It
// must be pure, as it runs again when its outcome did not count.
type Change interface {
	// Next returns what is to be written over cur.
	Next(cur State) (Write, error)
	// Direct reports whether Next(cur) runs none of the application's code, and so neither takes
	// its time nor panics nor ends its goroutine.
	Direct(cur State) bool
	// Prepare does in advance what Next may need. The caller's goroutine runs it while others are
	// in flight.
	Prepare()
}

// State is what a change starts from.
type State struct {
	Value record.Value // nil: there is none
	Also  []record.Entry
	Rev   int64 // its mod revision; 0 where a change in the same fold made the value
	Now   record.Millis

	// The revision that created its key, which tells the value from others under the key; -1: not
	// known yet.
	Born int64

	// A value that has ended, where the key holds one, and the revision that created its key. To a
	// change that does not know it, it is as none.
	Ended     record.Value
	EndedBorn int64

	Err error // why what the key holds cannot be taken for a value, where it cannot
}

// Write is what a change makes of a key.
type Write struct {
	Value record.Value   // nil: the key is deleted; the state's own: it stays as it is
	Also  []record.Entry // what stands with the value, all of it
	If    []Precondition // changes with different ones are not folded

	// Renews says that the value goes on from the state's Ended. Else what has ended is deleted
	// first, and the value gets a key of its own.
	Renews bool
}

// Precondition is a condition besides the key's revision on which a change may take effect. It must
// be one that does not come true again once it has failed.
type Precondition struct {
	Cmp clientv3.Cmp // of a key's mod or create revision, or its version
	Err error        // what it means that it does not hold
}

// Delete is the change that deletes a key, whatever it holds.
type Delete struct {
	If    []Precondition
	Found *record.Value // if not nil, where it leaves what the key held, if that has ended, too; to be read when the call has succeeded
}

// Next deletes the key.
func (d Delete) Next(cur State) (Write, error) {
	if d.Found != nil {
		if *d.Found = cur.Value; cur.Value == nil {
			*d.Found = cur.Ended
		}
	}
	return Write{If: d.If}, nil
}

// Direct implements Change.
func (Delete) Direct(State) bool { return true }

// Prepare implements Change.
func (Delete) Prepare() {}

// Call is a change that somebody waits for.
type Call struct {
	Key    string
	Change Change
	// Hint is what the caller has read of the key, if anything. A change that may fail needs one:
	// without it, and where nothing else is known, it runs over the guess that the key is absent,
	// and a failure over that is not validated.
	Hint *record.Version

	// Attended says that the change must not run any more once the call has returned.
	Attended bool
}

// Pipeline takes calls in and gives outcomes out.
type Pipeline struct {
	client *etcd.Client
	leases *lease.Pool
	reader *read.Reader
	prefix string
	now    func() record.Millis
	decode read.Decode

	mu      sync.Mutex
	queues  map[string]*queue // the keys that have something pending or in flight
	ready   []*attempt        // those that a worker may take, first come, first served
	limiter limit.Limiter
	calls   sync.WaitGroup
}

// call is a Call on its way, and what came of it once done is closed.
type call struct {
	Call
	deadline time.Time
	done     chan struct{}

	// What the change has made, and the version that stores it, or what was folded over it.
	write    Write
	stored   *record.Version
	err      error
	panicked any

	running sync.Mutex  // held while the change runs: it does not run on when its call has returned
	dropped atomic.Bool // its call has returned, and was told that it did not take effect
	exited  bool        // the change has ended its goroutine: it fails, and does not run again
	alone   bool        // a fold with it was refused: it goes alone to find the culprit
	last    error       // what etcd said last
}

// New returns a pipeline for the keys that begin with prefix.
func New(c *etcd.Client, leases *lease.Pool, reader *read.Reader, prefix string, now func() record.Millis, decode read.Decode) *Pipeline {
	p := &Pipeline{
		client: c, leases: leases, reader: reader, prefix: prefix, now: now, decode: decode,
		queues: make(map[string]*queue),
	}
	p.limiter = limit.New(etcd.MaxBatchKeys, p.work)
	return p
}

// Do makes a change and returns the version that stores it, or what was folded over it. It ends
// with the deadline, or with the attempt that is under way by then, or when ctx ends: then the
// error is ErrUnknown where the change may have reached etcd, and it goes on to its end within its
// deadline; else it will not take effect. A panic of the change is the caller's.
func (p *Pipeline) Do(ctx context.Context, deadline time.Time, c Call) (*record.Version, error) {
	o := &call{Call: c, deadline: deadline, done: make(chan struct{})}
	if p.enqueue(o) {
		o.Change.Prepare()
	}
	select {
	case <-o.done:
	case <-ctx.Done():
		if err := p.withdraw(ctx, o); err != nil {
			return nil, err
		}
	}
	if o.panicked != nil {
		panic(o.panicked)
	}
	return o.stored, o.err
}

// enqueue adds a call to its key's queue. It reports whether the call has company there.
func (p *Pipeline) enqueue(o *call) (contended bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.queues[o.Key]
	if q == nil {
		q = &queue{key: o.Key}
		p.queues[o.Key] = q
	}
	contended = q.attempt != nil || len(q.pending) > 0
	q.pending = append(q.pending, o)
	p.calls.Add(1)
	p.offer(q)
	return contended
}

// Calls returns how many calls are on their way to a key, those included that are over for their
// callers.
func (p *Pipeline) Calls(key string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := p.queues[key]
	switch {
	case q == nil:
		return 0
	case q.attempt == nil:
		return len(q.pending)
	}
	return len(q.pending) + len(q.attempt.calls)
}

// Wait waits until all calls are settled, also those whose callers have left.
func (p *Pipeline) Wait() { p.calls.Wait() }

// Idle reports whether nothing is on its way.
func (p *Pipeline) Idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.queues) == 0 && len(p.ready) == 0 && p.limiter.Idle()
}

// withdraw takes back a call whose context has ended, and returns what it returns: nil where it is
// done and knows that itself.
func (p *Pipeline) withdraw(ctx context.Context, o *call) error {
	p.mu.Lock()
	select {
	case <-o.done:
		p.mu.Unlock()
		return nil
	default:
	}
	err := etcd.Ended(ctx.Err(), o.last)
	q := p.queues[o.Key]
	sent := q.attempt != nil && q.attempt.sent
	if i := slices.Index(q.pending, o); i >= 0 {
		q.pending = slices.Delete(q.pending, i, i+1)
		p.finish(o, errAbandoned)
	} else if sent {
		err = Unknown(err)
	}
	if o.Attended || !sent {
		o.dropped.Store(true)
	}
	p.mu.Unlock()
	o.running.Lock() // the application's code has returned before its call does
	defer o.running.Unlock()
	return err
}

// finish tells the caller what came of a call.
//
// REQUIRES: mu is held, so that withdraw sees a call either pending, in an attempt, or done.
func (p *Pipeline) finish(o *call, err error) {
	o.err = err
	close(o.done)
	p.calls.Done()
}

// abandon is finish for a call of which it is not known what its change would have come to: one
// that panicked has perhaps done so over a state that never was.
//
// REQUIRES: mu is held.
func (p *Pipeline) abandon(o *call, err error) {
	o.panicked = nil
	p.finish(o, err)
}

// Unknown is an ErrUnknown with its cause.
func Unknown(cause error) error {
	switch {
	case cause == nil:
		return ErrUnknown
	case errors.Is(cause, ErrUnknown):
		return cause
	}
	return fmt.Errorf("%w: %w", ErrUnknown, cause)
}
