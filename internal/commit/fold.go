package commit

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// queue holds the calls of one key.
type queue struct {
	key     string
	pending []*call
	attempt *attempt        // the one that is ready, being made, or in flight; nil: none
	known   *record.Version // the latest that an answer has shown
}

// offer makes a queue ready if it has something to send and no attempt, and forgets it if it has
// neither.
//
// REQUIRES: mu is held.
func (p *Pipeline) offer(q *queue) {
	switch {
	case q.attempt != nil:
	case len(q.pending) == 0:
		delete(p.queues, q.key)
	default:
		q.attempt = &attempt{queue: q}
		p.makeReady(q.attempt)
	}
}

// REQUIRES: mu is held.
func (p *Pipeline) makeReady(a *attempt) {
	p.ready = append(p.ready, a)
	p.limiter.Offer(len(p.ready))
}

// work carries one batch.
func (p *Pipeline) work() {
	p.mu.Lock()
	n := min(len(p.ready), p.limiter.Took(p.client.BatchKeys()))
	batch := p.ready[:n:n]
	if p.ready = p.ready[n:]; len(p.ready) == 0 {
		p.ready = nil
	}
	for _, a := range batch {
		a.take()
	}
	end := p.limiter.Carry(&p.mu, func() int { return len(p.ready) })
	p.mu.Unlock()
	defer end()
	p.drive(p.foldAll(batch))
}

// foldAll folds the attempts of a batch, and returns those that go with it. What cannot be folded
// without the application's code is folded apart, all at a time. The batch waits for that, but no
// longer than patience: what takes more time goes with a later one.
func (p *Pipeline) foldAll(batch []*attempt) []*attempt {
	g := &gathering{done: make(chan struct{})}
	var apart []*attempt
	for _, a := range batch {
		switch {
		case a.folded:
			g.folded = append(g.folded, a)
		case !p.fold(a, false):
			apart = append(apart, a)
		case a.step != ended:
			g.folded = append(g.folded, a)
		}
	}
	if len(apart) == 0 {
		return g.folded
	}
	g.missing = len(apart)
	for _, a := range apart {
		go p.foldApart(a, g)
	}
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-g.done:
	case <-late.C:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	g.left = true
	return g.folded
}

// patience is how long a batch waits for the application's code. A merge takes far less; a function
// of the application that takes long delays the keys of its batch by this, once.
const patience = time.Millisecond

// gathering is a batch that waits for what is folded apart. Once that has begun, Pipeline.mu guards
// it.
type gathering struct {
	folded  []*attempt
	missing int
	done    chan struct{} // closed when none is missing
	left    bool          // it waits no more
}

// take moves the calls that are folded next from the queue to the attempt. A fold is of those that
// came before the first that goes alone.
//
// REQUIRES: mu is held.
func (a *attempt) take() {
	if a.folded {
		return
	}
	q := a.queue
	n := slices.IndexFunc(q.pending, func(o *call) bool { return o.alone })
	switch {
	case n < 0:
		n = len(q.pending)
	case n == 0:
		n = 1
	}
	a.calls = append(a.calls, q.pending[:n:n]...)
	q.pending = q.pending[n:]
}

// foldApart folds an attempt whose changes run the application's code, and hands it to the batch
// that waits for it. It runs in a goroutine of its own.
func (p *Pipeline) foldApart(a *attempt, g *gathering) {
	exited := a.exited()
	returned := false
	defer func() {
		switch {
		case returned:
		case a.exited() > exited: // a change has ended this goroutine: again, without it
			go p.foldApart(a, g)
		default: // the encoding of what they made has
			p.fail(a, errExited)
			p.gather(a, g)
		}
	}()
	p.fold(a, true)
	returned = true
	p.gather(a, g)
}

// gather hands over what was folded apart: to its batch, or, where that has left, to a later one.
func (p *Pipeline) gather(a *attempt, g *gathering) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case a.step == ended:
	case g.left:
		a.folded = true
		p.makeReady(a)
	default:
		g.folded = append(g.folded, a)
	}
	if g.missing--; g.missing == 0 {
		close(g.done)
	}
}

// exited returns how many of the attempt's calls have ended the goroutine that they ran in.
func (a *attempt) exited() (n int) {
	for _, o := range a.calls {
		if o.exited {
			n++
		}
	}
	return n
}

// run runs the change over cur.
func (o *call) run(cur State) {
	o.running.Lock()
	defer o.running.Unlock()
	o.write, o.err, o.panicked = Write{}, nil, nil
	switch {
	case o.dropped.Load():
		o.err = errAbandoned
		return
	case o.exited:
		o.err = errExited
		return
	}
	o.exited = true
	defer func() {
		if o.panicked = recover(); o.panicked != nil {
			o.exited = false
		}
	}()
	o.write, o.err = o.Change.Next(cur)
	o.exited = false
	if v := o.write.Value; o.err == nil && v != nil && v.Expiry() != 0 && v.Expiry() <= cur.Now {
		o.write.Value, o.write.Also = nil, nil // a value that has ended is one that is deleted
	}
}

// made reports whether the change has run to a result.
func (o *call) made() bool { return o.err == nil && o.panicked == nil }

// fold runs an attempt's changes in order over the latest version that is known, and decides what
// the attempt writes. Where all of them fail, nothing is sent, and the attempt is ended. It reports
// false, and has done nothing, where it would have to run the application's code and is not called
// apart.
//
// A fold ends with a delete, and a value that has ended is deleted before another is made under its
// key: so each value has a key that was created for it, and whoever has read an earlier one finds
// out.
func (p *Pipeline) fold(a *attempt, apart bool) bool {
	a.base = newest(a.queue.known, a.calls)
	f := startFold(a.base, p.now())
	wall := time.Now()
	var late, rest []*call
	for i, o := range a.calls {
		if f.closed {
			rest = a.calls[i:]
			break
		}
		if o.dropped.Load() || wall.After(o.deadline) {
			late = append(late, o)
			continue
		}
		if !apart && !o.exited && !o.Change.Direct(f.cur) {
			return false
		}
		if o.run(f.cur); !f.add(o) {
			rest = a.calls[i:]
			break
		}
	}
	p.regroup(a, f.calls, late, rest)
	p.prepare(a, f)
	return true
}

// newest returns the latest of the versions that are known. Where none is, it is a guess: that the
// key is absent, as it is for a fresh one.
func newest(known *record.Version, calls []*call) *record.Version {
	if known == nil {
		known = &record.Version{}
	}
	for _, o := range calls {
		if o.Hint != nil && o.Hint.AsOf > known.AsOf {
			known = o.Hint
		}
	}
	return known
}

// regroup leaves the attempt the calls that are folded, ends those that came too late, and puts the
// rest back.
func (p *Pipeline) regroup(a *attempt, folded, late, rest []*call) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a.calls = folded
	for _, o := range late {
		p.abandon(o, etcd.Ended(context.DeadlineExceeded, o.last))
	}
	a.queue.putBack(rest)
}

// putBack leaves calls to the next attempt.
//
// REQUIRES: mu is held.
func (q *queue) putBack(calls []*call) {
	q.pending = append(calls[:len(calls):len(calls)], q.pending...)
}

// folding is a fold in the making.
type folding struct {
	base    *record.Version
	current record.Value // what the base holds
	cur     State        // after the changes so far
	guards  []Precondition
	calls   []*call // whose changes have run
	changed bool    // one of them has run to a result
	renews  bool    // the value goes on from one that has ended
	closed  bool    // it takes no more
}

func startFold(base *record.Version, now record.Millis) *folding {
	current := base.Live(now)
	f := &folding{base: base, current: current, cur: State{Value: current, Rev: base.Rev, Born: -1, Now: now, Err: base.Unreadable()}}
	switch {
	case current != nil:
		f.cur.Born, f.cur.Also = base.Created, base.Also
	case base.Expired(now):
		f.cur.Ended, f.cur.EndedBorn = base.Value, base.Created
	}
	return f
}

// add takes in what a change has made. It reports false where that cannot go with what was folded
// before.
func (f *folding) add(o *call) bool {
	if o.made() && o.write.Value != nil && f.base.Err != nil {
		o.err = f.base.Err
	}
	if o.made() {
		if f.changed && !samePreconditions(f.guards, o.write.If) {
			return false
		}
		f.guards, f.changed = o.write.If, true
		there := f.cur.Value != nil || f.cur.Err != nil
		if o.write.Renews && f.cur.Ended != nil && o.write.Value != nil {
			f.renews, f.cur.Born = true, f.cur.EndedBorn
		}
		f.cur.Ended = nil
		f.closed = o.write.Value == nil && there
		if o.write.Value != f.cur.Value {
			f.cur.Value, f.cur.Rev = o.write.Value, 0
		}
		f.cur.Also = o.write.Also
	}
	f.calls = append(f.calls, o)
	return true
}

// samePreconditions reports whether two changes may be refused together.
func samePreconditions(a, b []Precondition) bool {
	return slices.EqualFunc(a, b, func(x, y Precondition) bool {
		return x.Err == y.Err && proto.Equal(x.Cmp.GetCompare(), y.Cmp.GetCompare()) //nolint:errorlint // the very same
	})
}

// prepare decides what an attempt writes.
func (p *Pipeline) prepare(a *attempt, f *folding) {
	final := f.cur.Value
	a.guards = f.guards
	switch {
	case len(f.calls) == 0, !f.changed && !a.base.Expired(f.cur.Now):
		p.settle(a, a.base) // what failed did so over the base, which is no guess for it
	case !f.changed:
		a.kind = validate // that it has expired is still a guess: others may have moved its expiry since it was read
	case final != nil && final != f.current && a.base.Expired(f.cur.Now) && !f.renews:
		a.kind, a.clears = remove, true
	case final != nil && final != f.current:
		a.kind, a.final, a.also = put, final, f.cur.Also
		p.encode(a)
	case final == nil && a.base.Rev != 0 && !a.base.Foreign:
		a.kind = remove
	default:
		a.kind, a.final, a.also = validate, final, f.cur.Also
	}
}

// encode makes the record that an attempt puts. It stays on the key's lease where that covers it;
// else the attempt needs a seat on another.
func (p *Pipeline) encode(a *attempt) {
	payload, err := a.final.Encode()
	if err != nil {
		p.fail(a, err)
		return
	}
	expiry := a.final.Expiry()
	a.record = record.Record{Payload: payload, PrefixLen: len(p.prefix), Expiry: expiry, ID: record.NewWriteID()}
	if a.base.Lease == 0 || !p.leases.Covers(a.base.Until, expiry, p.now()) {
		a.step = toSeat
		return
	}
	a.record.LeaseEnd = a.base.Until
	a.value = string(a.record.Encode())
	a.keep = p.leases.Keep(a.base.Lease)
}
