package etcdstore

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/limit"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// batchBytes bounds the values of a batch. etcd measures a request as it is proposed to Raft, and takes
	// 1.5 MiB of it.
	batchBytes = 512 << 10
	// aloneBytes is the value size from which a session travels alone, so that it neither delays small ones nor
	// has them share in its being too large.
	aloneBytes = 32 << 10
)

// pipeline is the write path: it takes transitions in and gives outcomes out.
//
// # The algorithm
//
// Transitions queue per session. While batches are in flight the queues grow; when the lane lets a batch go, its
// worker takes many sessions at once and, for each, folds the transitions that wait, in order, over the latest
// version that it knows, into one new version. What is sent is one Txn of nested Txns, one a session:
//
//	If(mod revision is the version's, guards) Then(one write)
//
// So a batch costs one round trip and one Raft entry, and a session that 64 requests change at once costs a few
// writes instead of 64 rounds of losing and trying again. A lone session goes un-nested.
//
// If the compare succeeded, the folded transitions have happened, in their order, at one revision. If it failed, the
// session is read, in the Else or by a read of its own: either the write is in it or in its history, applied by a send
// whose answer was lost, or the transitions are folded again over what it shows.
//
// # Invariants
//
//   - A session is in at most one attempt at a time, and its transitions take effect in the order in which they
//     came. Different sessions are independent.
//   - A transition runs over what etcd holds, or over a guess that the compare validates. What it makes of a guess,
//     an error included, counts only if that compare succeeds.
//   - An attempt whose outcome is unknown is sent again as it is, with the same compare and the same write id, until
//     etcd gives a definite answer or the time of its calls is up. It is never folded again before, because an earlier
//     send may still be applied, and one revision must not have two candidates that both count as ours.
//   - An attempt to create has no revision to compare that will never come back, so it also compares the fence of its
//     lease. If its outcome is unknown, the fence is moved first; then the key and its history show what became of it,
//     for good (settle.go).
//   - One transition's failure is its own: a batch that etcd refuses as a whole is sent again session by session, and
//     a fold transition by transition.
//
// # Rejected
//
// A queue of etcd operations instead of transitions: a conflict could not be merged without going back to its
// caller, which is the compare-and-swap loop again. Batches over the whole Txn with one compare each and no nesting:
// one conflict would fail all. An Else(Get) for every session of a batch: each is three messages more in the request,
// which the client, the leader's gRPC, and Raft on every member encode and decode, a sixth of what a commit costs, to
// save a round trip where processes contend. A lock per session: a round trip more for everyone, and somebody has to
// release it.
//
// No goroutine runs while nothing waits. The rule for when a batch may go is lane's.
type pipeline struct {
	conn   *etcd.Client
	leases *lease.Pool
	prefix string
	now    func() record.Millis
	decode func(kvs []*mvccpb.KeyValue, asOf int64) *version

	mu     sync.Mutex
	queues map[string]*queue // the sessions that have something pending or in flight
	ready  []*queue          // those with something pending and nothing in flight, first come, first served
	lane   limit.Limiter
	busy   sync.WaitGroup // transitions
}

// A transition is a change of one session: a function from its current state to its next image. It must be pure,
// as it runs again when its outcome did not count.
type transition interface {
	// next returns the session's next image: nil for absent, and cur.image itself for 'as it is'.
	next(cur state) (*image, error)
	// prepare does in advance what next may need. The caller's goroutine runs it while others are in flight.
	prepare()
}

// state is what a transition starts from.
type state struct {
	image *image // nil: there is no session
	rev   int64  // its mod revision; 0 where a transition in the same fold made the image
	now   record.Millis

	// The revision that created its key, which tells it from others under its token; -1: not known yet.
	born int64
}

// guard is a condition besides the session's revision on which a transition may take effect.
type guard struct{ cmp clientv3.Cmp }

// op is one call: a transition on its way, and what came of it once done is closed.
type op struct {
	key      string
	change   transition
	hint     *version // what the call has read of the session, if anything
	guard    *guard   // nil mostly; an op with one is not folded with others
	deadline time.Time
	done     chan struct{}

	// Results: the image that the transition made, and the version that stores it, or what was folded over it.
	made     *image
	stored   *version
	err      error
	panicked any

	running sync.Mutex  // held while the transition runs: it does not run on when its call has returned
	dropped atomic.Bool // its call has returned, and was told that it did not take effect
	alone   bool        // a fold with it was refused: it goes alone to find the culprit
	last    error       // what etcd said last; guarded by pipeline.mu
}

// queue holds the transitions of one session. All fields are guarded by pipeline.mu, except that an attempt's
// worker owns known while the queue is busy.
type queue struct {
	key     string
	pending []*op
	known   *version // the latest that an answer has shown
	busy    bool     // an attempt is being made or in flight
	sent    bool     // it may have reached etcd
	queued  bool     // in pipeline.ready
}

func newPipeline(c *etcd.Client, leases *lease.Pool, prefix string, now func() record.Millis, decode func([]*mvccpb.KeyValue, int64) *version) *pipeline {
	p := &pipeline{conn: c, leases: leases, prefix: prefix, now: now, decode: decode, queues: make(map[string]*queue)}
	p.lane = limit.New(etcd.MaxBatchKeys, p.work)
	return p
}

// do runs a transition and returns what came of it. It ends with the deadline, or with the attempt that is under way by
// then, or when ctx ends: then the error is ErrOutcomeUnknown where the transition may have reached etcd, and it goes on to
// its end within its deadline; else it will not take effect.
func (p *pipeline) do(ctx context.Context, deadline time.Time, o *op) error {
	o.deadline = deadline
	o.done = make(chan struct{})
	p.mu.Lock()
	q := p.queues[o.key]
	if q == nil {
		q = &queue{key: o.key}
		p.queues[o.key] = q
	}
	q.pending = append(q.pending, o)
	p.busy.Add(1)
	contended := q.busy || len(q.pending) > 1
	p.offer(q)
	p.mu.Unlock()
	if contended {
		o.change.prepare()
	}
	select {
	case <-o.done:
	case <-ctx.Done():
		if err := p.withdraw(ctx, o); err != nil {
			return err
		}
	}
	if o.panicked != nil {
		panic(o.panicked)
	}
	return o.err
}

// concerns reports whether something is on its way to a session, of a call that is over perhaps.
func (p *pipeline) concerns(key string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queues[key] != nil
}

// offer makes a queue ready if it has something to send and nothing in flight, and forgets it if it has neither.
//
// REQUIRES: mu is held.
func (p *pipeline) offer(q *queue) {
	switch {
	case q.busy || q.queued:
	case len(q.pending) == 0:
		delete(p.queues, q.key)
	default:
		q.queued = true
		p.ready = append(p.ready, q)
		p.lane.Offer(len(p.ready))
	}
}

// withdraw takes back an op whose context has ended, and returns what its call returns: nil where the op is done and
// knows that itself.
func (p *pipeline) withdraw(ctx context.Context, o *op) error {
	p.mu.Lock()
	select {
	case <-o.done:
		p.mu.Unlock()
		return nil
	default:
	}
	err := etcd.Ended(ctx.Err(), o.last)
	q := p.queues[o.key]
	if i := slices.Index(q.pending, o); i >= 0 {
		q.pending = slices.Delete(q.pending, i, i+1)
		p.finish(o, errAbandoned)
	} else if q.sent {
		err = unknownError(err)
	}
	if _, ours := o.change.(*update); ours || !q.sent {
		o.dropped.Store(true)
	}
	p.mu.Unlock()
	o.running.Lock() // the application's code has returned before its call does
	defer o.running.Unlock()
	return err
}

// work carries one batch.
func (p *pipeline) work() {
	p.mu.Lock()
	n := min(len(p.ready), p.lane.Took(p.conn.BatchKeys()))
	type taken struct {
		queue *queue
		ops   []*op
	}
	batch := make([]taken, 0, n)
	for _, q := range p.ready[:n] {
		q.queued = false
		if ops := q.take(); len(ops) > 0 {
			batch = append(batch, taken{q, ops})
		} else {
			p.offer(q)
		}
	}
	if p.ready = p.ready[n:]; len(p.ready) == 0 {
		p.ready = nil
	}
	end := p.lane.Carry(&p.mu, func() int { return len(p.ready) })
	p.mu.Unlock()
	defer end()

	attempts := make([]*attempt, 0, len(batch))
	for _, t := range batch {
		if a := p.fold(t.queue, t.ops); a != nil {
			attempts = append(attempts, a)
		}
	}
	p.dispatch(attempts)
}

// take takes the ops that the next attempt folds.
//
// REQUIRES: pipeline.mu is held.
func (q *queue) take() []*op {
	n := 0
	for n < len(q.pending) && !q.pending[n].single() {
		n++
	}
	if n == 0 && len(q.pending) > 0 {
		n = 1
	}
	ops := q.pending[:n:n]
	q.pending = q.pending[n:]
	q.busy = n > 0
	return ops
}

// single reports whether the op is not folded with others.
func (o *op) single() bool { return o.guard != nil || o.alone }

// run runs the transition over cur.
func (o *op) run(cur state) {
	o.running.Lock()
	defer o.running.Unlock()
	if o.dropped.Load() {
		o.err = errAbandoned
		return
	}
	defer func() { o.panicked = recover() }()
	o.made, o.err = nil, nil
	o.made, o.err = o.change.next(cur)
	if o.err == nil && o.made != nil && o.made.expiry != 0 && o.made.expiry <= cur.now {
		o.made = nil // a session that has expired is one that is deleted
	}
}

// writeKind is what an attempt does to the session's key.
type writeKind int

const (
	writeNothing writeKind = iota // but validate that it is as it was
	writePut
	writeDelete
)

// attempt is a fold of transitions, as it is sent.
type attempt struct {
	queue  *queue
	ops    []*op
	base   *version // what it is folded over
	final  *image   // nil: the session is deleted
	kind   writeKind
	clears bool // it deletes a session that has expired, and its ops are folded again

	record  record.Record
	value   string
	seat    lease.Seat // a new one, on the lease that the Put names; zero where it keeps the key's lease, or there is no Put
	keep    clientv3.OpOption
	guard   *guard
	since   int64 // a revision that etcd had before the first send, lately: a version up to it is not this attempt's
	unknown bool  // the outcome of a send is unknown
}

// fold runs ops in order over the latest version that is known, and returns the attempt to send. Where all of them
// fail, nothing is sent and it returns nil.
//
// A fold ends with a delete, and a session that has expired is deleted before another is made under its token: so each
// session has a key that was created for it, and a request that has read an earlier one finds out.
func (p *pipeline) fold(q *queue, ops []*op) *attempt {
	a := &attempt{queue: q, base: newest(q.known, ops)}
	now := p.now()
	current := a.base.live(now)
	cur := state{image: current, rev: a.base.rev, born: -1, now: now}
	if current != nil {
		cur.born = a.base.created
	}
	wall := time.Now()
	changed, deleted := false, false
	for i, o := range ops {
		if deleted {
			p.putBack(q, ops[i:])
			break
		}
		if o.dropped.Load() || wall.After(o.deadline) {
			p.expired(o)
			continue
		}
		o.run(cur)
		switch unreadable := a.base.unreadable(); {
		case o.err == nil && o.made != nil && a.base.err != nil:
			o.err = a.base.err
		case unreadable != nil && errors.Is(o.err, ErrSessionGone):
			o.err = unreadable // it is there
		}
		a.ops = append(a.ops, o)
		a.guard = o.guard
		if o.err == nil && o.panicked == nil {
			changed = true
			deleted = o.made == nil && (cur.image != nil || a.base.unreadable() != nil)
			if o.made != cur.image {
				cur.image, cur.rev = o.made, 0
			}
		}
	}
	if len(a.ops) == 0 {
		p.settled(a, a.base)
		return nil
	}
	if !changed {
		if a.base.rev != 0 && a.base.err == nil && current == nil {
			return a // it has expired, unless others have moved its expiry since it was read: that is still a guess
		}
		p.settled(a, a.base) // what failed did so over the base, which is no guess for it
		return nil
	}
	a.final = cur.image
	switch {
	case a.final != nil && a.final != current && a.base.rev != 0 && current == nil && a.base.err == nil:
		a.kind, a.clears = writeDelete, true
	case a.final != nil && a.final != current:
		a.kind = writePut
		payload, err := a.final.encoded()
		if err != nil {
			p.fail(a, err)
			return nil
		}
		a.record = record.Record{Payload: payload, PrefixLen: len(p.prefix), Expiry: a.final.expiry, ID: record.NewWriteID()}
		if a.base.lease != 0 && p.leases.Covers(a.base.until, a.final.expiry, now) {
			a.record.LeaseEnd = a.base.until
			a.value = string(a.record.Encode())
			a.keep = p.leases.Keep(a.base.lease)
		}
	case a.final == nil && a.base.rev != 0 && a.base.err != errForeignKey: //nolint:errorlint // never wrapped here
		a.kind = writeDelete
	}
	return a
}

// putBack leaves ops to the next attempt.
func (p *pipeline) putBack(q *queue, ops []*op) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q.pending = append(ops[:len(ops):len(ops)], q.pending...)
}

// expired ends an op that came too late to be folded.
func (p *pipeline) expired(o *op) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.abandon(o, etcd.Ended(context.DeadlineExceeded, o.last))
}

// abandon is finish for an op of which it is not known what its transition would have come to: one that panicked has
// perhaps done so over a state that never was.
//
// REQUIRES: mu is held.
func (p *pipeline) abandon(o *op, err error) {
	o.panicked = nil
	p.finish(o, err)
}

// finish tells o's caller what came of it.
//
// REQUIRES: mu is held, so that withdraw sees an op either pending, in an attempt, or done.
func (p *pipeline) finish(o *op, err error) {
	o.err = err
	close(o.done)
	p.busy.Done()
}

// newest returns the latest of the versions that are known. Where none is, it is a guess: that the key is absent,
// as it is for the fresh tokens of scs.
func newest(known *version, ops []*op) *version {
	if known == nil {
		known = &version{}
	}
	for _, o := range ops {
		if o.hint != nil && o.hint.asOf > known.asOf {
			known = o.hint
		}
	}
	return known
}

// needsLease reports whether a's Put names a lease and has none yet.
func (a *attempt) needsLease() bool {
	return a.kind == writePut && !a.seat.Taken() && a.record.LeaseEnd == 0
}

// sit puts a on a lease.
func (a *attempt) sit(s lease.Seat) {
	a.seat = s
	a.record.LeaseEnd = s.Until()
	a.value = string(a.record.Encode())
}

// leave gives up a's seat, if it has one.
func (p *pipeline) leave(a *attempt) {
	if a.seat.Taken() {
		p.leases.Leave(a.seat.Lease())
		a.seat, a.record.LeaseEnd = lease.Seat{}, 0
	}
}

// dispatch sends attempts: those without a lease wait for one apart from the others, large ones go alone, and the
// rest in as few batches as the limit on bytes allows, the last of them in this goroutine.
func (p *pipeline) dispatch(attempts []*attempt) {
	var batch, leaseless []*attempt
	size := 0
	for _, a := range attempts {
		if a.needsLease() {
			s, ok := p.leases.Attach(a.final.expiry)
			if !ok {
				leaseless = append(leaseless, a)
				continue
			}
			a.sit(s)
		}
		if len(a.value) >= aloneBytes {
			go p.send([]*attempt{a})
			continue
		}
		if size += len(a.value); size > batchBytes {
			go p.send(batch)
			batch, size = nil, len(a.value)
		}
		batch = append(batch, a)
	}
	if len(leaseless) > 0 {
		go p.seatAll(leaseless)
	}
	p.send(batch)
}

// seatAll waits for leases, and sends the attempts.
func (p *pipeline) seatAll(attempts []*attempt) {
	seated := attempts[:0:0]
	for _, a := range attempts {
		if p.seatOne(a) {
			seated = append(seated, a)
		}
	}
	p.dispatch(seated)
}

// seatOne waits for a lease for a, in the time that its calls have. It reports whether there is something to send.
func (p *pipeline) seatOne(a *attempt) bool {
	for {
		ctx, cancel := context.WithDeadline(context.Background(), a.firstDeadline())
		s, err := p.acquire(ctx, a.final.expiry)
		ended := ctx.Err() != nil
		cancel()
		switch {
		case err == nil:
			a.sit(s)
			return true
		case p.overdue(a, err):
			return false
		case !ended:
			p.fail(a, err)
			return false
		}
	}
}

// acquire returns a seat on a lease, waiting for one where none is open.
func (p *pipeline) acquire(ctx context.Context, expiry record.Millis) (lease.Seat, error) {
	for b := (etcd.Backoff{}); ; {
		if s, ok := p.leases.Attach(expiry); ok {
			return s, nil
		}
		err := p.leases.Wait(ctx, expiry)
		switch k := etcd.Classify(err); {
		case ctx.Err() != nil:
			return lease.Seat{}, etcd.Ended(ctx.Err(), err)
		case err == nil:
		case k != etcd.Unknown && k != etcd.Transient:
			return lease.Seat{}, err
		case !b.Wait(ctx):
			return lease.Seat{}, etcd.Ended(ctx.Err(), err)
		}
	}
}

// firstDeadline returns when the time of the first of a's calls is up.
func (a *attempt) firstDeadline() time.Time {
	return slices.MinFunc(a.ops, func(o, other *op) int { return o.deadline.Compare(other.deadline) }).deadline
}

// txn returns a as a Txn, with an Else that reads what its compares are about, or without.
func (a *attempt) txn(asks bool) clientv3.Op {
	key := a.queue.key
	var then, otherwise []clientv3.Op
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", a.base.rev)}
	switch {
	case a.kind == writeDelete:
		then = append(then, clientv3.OpDelete(key))
	case a.kind == writePut && !a.seat.Taken():
		then = append(then, clientv3.OpPut(key, a.value, a.keep))
	case a.kind == writePut:
		cmps = append(cmps, a.seat.Compare())
		then = append(then, clientv3.OpPut(key, a.value, clientv3.WithLease(a.seat.Lease())))
	}
	if a.guard != nil {
		cmps = append(cmps, a.guard.cmp)
	}
	if asks {
		otherwise = a.gets()
	}
	return clientv3.OpTxn(cmps, then, otherwise)
}

// gets returns what tells why a's compares have failed: the session and, where its lease is a new one, the fence.
func (a *attempt) gets() []clientv3.Op {
	gets := []clientv3.Op{clientv3.OpGet(a.queue.key)}
	if a.seat.Taken() {
		gets = append(gets, clientv3.OpGet(a.seat.Key()))
	}
	return gets
}

// batchOp returns the request for a batch: a lone attempt as it is, several as nested Txns.
func batchOp(batch []*attempt) clientv3.Op {
	if len(batch) == 1 {
		return batch[0].txn(true)
	}
	ops := make([]clientv3.Op, len(batch))
	for i, a := range batch {
		ops[i] = a.txn(a.asks())
	}
	return clientv3.OpTxn(nil, ops, nil)
}

// asks reports whether a has an Else in a batch. Where it need not be known why the compare failed, it has none: a session
// that is still at its base when it is read later was so when the compare failed. That does not hold where the base is an
// absent session, which may have been there in between; nor can a guard be read later.
func (a *attempt) asks() bool { return a.base.rev == 0 || a.guard != nil }

// answer is what etcd answered to an attempt.
type answer struct {
	applied bool
	rev     int64    // the store's revision
	current *version // where it was not applied: the session as it is; nil: not asked for
	fence   int64    // where it was not applied and named a lease: the mod revision of the lease's key
}

// answers reads the response to batchOp(batch).
func (p *pipeline) answers(batch []*attempt, resp *clientv3.TxnResponse) []answer {
	out := make([]answer, len(batch))
	for i := range batch {
		nested := (*etcdserverpb.TxnResponse)(resp)
		if len(batch) > 1 {
			nested = resp.Responses[i].GetResponseTxn()
		}
		out[i] = answer{applied: nested.Succeeded, rev: resp.Header.Revision}
		if !nested.Succeeded && len(nested.Responses) > 0 {
			out[i].read(p, nested.Responses, resp.Header.Revision)
		}
	}
	return out
}

// read reads the answers to the gets of an attempt's Else, at revision rev.
func (ans *answer) read(p *pipeline, gets []*etcdserverpb.ResponseOp, rev int64) {
	ans.current = p.decode(gets[0].GetResponseRange().Kvs, rev)
	if len(gets) > 1 {
		if kvs := gets[1].GetResponseRange().Kvs; len(kvs) > 0 {
			ans.fence = kvs[0].ModRevision
		}
	}
}
