package etcdstore

import (
	"context"
	"slices"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcd"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// send sends attempts in one request, again and again until each is settled: it has happened, it is folded again,
// or it has failed.
func (p *pipeline) send(batch []*attempt) {
	var last error
	batch = p.begin(batch)
	for b := (etcd.Backoff{}); ; {
		if batch = keep(batch, func(a *attempt) bool { return !p.overdue(a, last) }); len(batch) == 0 {
			return
		}
		resp, err := p.request(batch, min(b.Timeout(), remaining(batch)))
		if err == nil {
			batch = p.settle(batch, resp)
			continue
		}
		last = err
		if batch = p.refused(batch, err); len(batch) > 0 {
			b.Wait(context.Background())
		}
	}
}

// remaining returns the time that a batch has left, until its last call's is up.
func remaining(batch []*attempt) time.Duration {
	var last time.Time
	for _, a := range batch {
		for _, o := range a.ops {
			if o.deadline.After(last) {
				last = o.deadline
			}
		}
	}
	return time.Until(last)
}

// overdue ends the calls of an attempt whose time is up. It reports whether that ends the attempt. last is what etcd said last.
// Calls that came later have the time that they were given: they go on with the attempt, or, if no send of it can be applied
// any more, are folded again without those that have ended.
func (p *pipeline) overdue(a *attempt, last error) bool {
	now := time.Now()
	late := func(o *op) bool { return !o.deadline.After(now) }
	cause := etcd.Ended(context.DeadlineExceeded, last)
	switch {
	case !slices.ContainsFunc(a.ops, late):
		return false
	case !slices.ContainsFunc(a.ops, func(o *op) bool { return !late(o) }):
		p.giveUp(a, cause)
		return true
	}
	p.endCalls(a, late, cause)
	if !a.unknown {
		p.requeue(a, a.base)
	}
	return !a.unknown
}

// endCalls ends some of the calls of an attempt.
func (p *pipeline) endCalls(a *attempt, which func(*op) bool, cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a.ops = slices.DeleteFunc(slices.Clone(a.ops), func(o *op) bool {
		ends := which(o)
		if ends {
			p.abandon(o, a.untold(o, cause))
		}
		return ends
	})
}

// within runs f in the time that a's calls have: until that of the first is up, and again for the others. f finds out
// what became of a, so until it has, that is unknown.
func (p *pipeline) within(a *attempt, f func(ctx context.Context) error) error {
	defer func(was bool) { a.unknown = was }(a.unknown)
	a.unknown = true
	for {
		first := a.firstDeadline()
		ctx, cancel := context.WithDeadline(context.Background(), first)
		err := f(ctx)
		ended := ctx.Err() != nil
		cancel()
		later := func(o *op) bool { return o.deadline.After(first) }
		if err == nil || !ended || !slices.ContainsFunc(a.ops, later) {
			return err
		}
		p.endCalls(a, func(o *op) bool { return !later(o) }, err)
	}
}

// begin marks attempts as sent, from where on their callers can no longer be told that nothing happened. Attempts
// with a call that was told so already are folded again without it.
func (p *pipeline) begin(batch []*attempt) []*attempt {
	since := p.conn.Latest()
	return keep(batch, func(a *attempt) bool {
		if p.markSent(a, since) {
			return true
		}
		p.requeue(a, a.base)
		return false
	})
}

// markSent marks one attempt as sent, unless it must be folded again.
func (p *pipeline) markSent(a *attempt, since int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if a.queue.sent {
		return true
	}
	if slices.ContainsFunc(a.ops, func(o *op) bool { return o.dropped.Load() }) {
		return false
	}
	a.queue.sent = true
	a.since = max(since, a.base.asOf)
	return true
}

// keep filters batch in place.
func keep(batch []*attempt, pred func(*attempt) bool) []*attempt {
	kept := batch[:0]
	for _, a := range batch {
		if pred(a) {
			kept = append(kept, a)
		}
	}
	return kept
}

// request makes one request.
func (p *pipeline) request(batch []*attempt, timeout time.Duration) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	start := time.Now()
	resp, err := p.conn.Send(ctx, batchOp(batch))
	if err != nil {
		return nil, err
	}
	now := time.Now()
	p.mu.Lock()
	p.lane.Observe(now.Sub(start), now)
	p.mu.Unlock()
	return resp.Txn(), nil
}

// settle settles what etcd has answered, and returns the attempts that must be sent again.
func (p *pipeline) settle(batch []*attempt, resp *clientv3.TxnResponse) []*attempt {
	answers := p.answers(batch, resp)
	again := batch[:0]
	for i, a := range batch {
		switch ans := answers[i]; {
		case ans.applied:
			p.applied(a, ans.rev)
		case ans.current == nil:
			go p.look(a)
		case p.refuted(a, ans):
			again = append(again, a)
		}
	}
	return again
}

// refuted settles an attempt whose compare has failed. It reports whether the attempt must be sent again.
func (p *pipeline) refuted(a *attempt, ans answer) bool {
	if ans.current.rev == a.base.rev {
		return p.unguarded(a, ans)
	}
	p.overtaken(a, ans.current)
	return false
}

// look reads what an attempt whose compare has failed did not ask for.
func (p *pipeline) look(a *attempt) {
	gets := a.gets()
	var ans answer
	err := p.within(a, func(ctx context.Context) error {
		return etcd.Retry(ctx, func(ctx context.Context) error {
			resp, err := p.conn.Send(ctx, clientv3.OpTxn(nil, gets, nil))
			if err == nil {
				ans.read(p, resp.Txn().Responses, resp.Txn().Header.Revision)
			}
			return err
		})
	})
	switch {
	case err != nil:
		a.unknown = true
		p.giveUp(a, err)
	case p.refuted(a, ans):
		p.send([]*attempt{a})
	}
}

// applied settles an attempt that was applied at rev.
func (p *pipeline) applied(a *attempt, rev int64) {
	v := &version{rev: rev, asOf: rev, image: a.final, lease: a.base.lease, until: a.record.LeaseEnd, id: a.record.ID, created: a.base.created, nth: a.base.nth + 1}
	switch {
	case a.kind == writeNothing:
		still := *a.base
		still.asOf = rev
		v = &still
	case a.kind == writeDelete:
		v = &version{asOf: rev}
	case a.base.rev == 0:
		v.created, v.nth = rev, 1
	}
	if a.seat.Taken() {
		v.lease = a.seat.Lease()
	}
	if a.base.lease != v.lease {
		p.leases.Leave(a.base.lease)
	}
	if a.clears {
		p.requeue(a, v)
		return
	}
	p.settled(a, v)
}

// unguarded settles an attempt whose compare failed although the session is as it was: it is a guard that no longer
// holds. It reports whether the attempt must be sent again.
func (p *pipeline) unguarded(a *attempt, ans answer) bool {
	switch {
	case a.seat.Taken() && ans.fence != a.seat.Fence():
		if seat, usable := p.leases.Refenced(a.seat, ans.fence); usable {
			a.seat = seat
			return true
		}
		// The lease is lost. The attempt keeps its write id, since an earlier send of it may have been applied
		// before that.
		p.leave(a)
		go p.dispatch([]*attempt{a})
	case a.guard != nil:
		a.unknown = false // an earlier send compares the same guard, and a lock that was lost does not come back
		p.fail(a, errLockLost)
	default:
		p.requeue(a, ans.current)
	}
	return false
}

// overtaken settles an attempt whose compare failed because the session has changed: by others, or by a send of the
// attempt itself whose answer was lost, also behind our back: the client resends when a server gives up on a request.
func (p *pipeline) overtaken(a *attempt, current *version) {
	switch {
	case a.kind == writeNothing, a.clears:
		p.requeue(a, current)
	case a.kind == writeDelete && current.rev != 0 && current.created == a.base.created:
		p.requeue(a, current) // it was never deleted
	case a.kind == writeDelete && current.rev == 0 && a.onlyDeletes():
		p.settled(a, current) // it is not there, whoever did that
	case a.kind == writePut && current.rev != 0 && current.id == a.record.ID:
		p.found(a, current, current)
	case a.kind == writePut && !a.mayPrecede(current):
		p.requeue(a, current)
	default:
		go p.trace(a, current)
	}
}

// onlyDeletes reports whether all of a's calls are told the same when the session is not there.
func (a *attempt) onlyDeletes() bool {
	return !slices.ContainsFunc(a.ops, func(o *op) bool { return o.change != remove{} })
}

// mayPrecede reports whether current may be a later version than one that a has written unnoticed.
func (a *attempt) mayPrecede(current *version) bool {
	switch {
	case current.rev == 0:
		return a.unknown || a.base.rev != 0
	case current.rev <= a.since:
		return false // it was there before the first send, and so had the base been overtaken
	case a.base.rev == 0:
		return current.created > a.since
	}
	return current.created != a.base.created || current.nth != a.base.nth+1
}

// found settles an attempt whose write is a version of its session, and perhaps not the current one.
func (p *pipeline) found(a *attempt, written, current *version) {
	written.image = a.final // decoded, perhaps, and it is the one that ops compare
	p.settledAs(a, written, current)
}

// trace settles an attempt by the session's history: has it been the version after the base?
func (p *pipeline) trace(a *attempt, current *version) {
	written, err := p.written(a, current.asOf)
	switch {
	case err != nil:
		a.unknown = true
		p.giveUp(a, err)
	case written != nil:
		p.found(a, written, current)
	default:
		p.requeue(a, current)
	}
}

// written is inHistory in the time that a's calls have.
func (p *pipeline) written(a *attempt, last int64) (v *version, err error) {
	err = p.within(a, func(ctx context.Context) (err error) {
		v, err = p.inHistory(ctx, a, last)
		return err
	})
	return v, err
}

// inHistory returns the version of a's session that a wrote, at a revision up to last, or nil. For a delete, which bears no
// write id, the write is that the base was followed by no session: if others did that, a's transitions may as well have
// come right before, and deleting once more what was created since would be to do it twice.
//
// It reads the session as of every revision since the first send, many in a request; mostly there are a few. A watch could
// tell as well, but etcd's watchers catch up with history only every 100 ms, and do not tell where it ends if nothing more
// happens.
func (p *pipeline) inHistory(ctx context.Context, a *attempt, last int64) (*version, error) {
	from := a.since
	if a.base.rev == 0 {
		from++
	}
	for rev := from; rev <= last; {
		n := min(last-rev+1, int64(p.conn.BatchKeys()))
		gets := make([]clientv3.Op, n)
		for i := range gets {
			gets[i] = clientv3.OpGet(a.queue.key, clientv3.WithRev(rev+int64(i)))
		}
		var resp *clientv3.TxnResponse
		err := etcd.Retry(ctx, func(ctx context.Context) error {
			answer, err := p.conn.Send(ctx, clientv3.OpTxn(nil, gets, nil))
			resp = answer.Txn()
			return err
		})
		if etcd.Classify(err) == etcd.TooManyOps && n > int64(p.conn.BatchKeys()) {
			continue // batches have become smaller
		}
		if err != nil {
			return nil, err
		}
		for i, r := range resp.Responses {
			v := p.decode(r.GetResponseRange().Kvs, rev+int64(i))
			switch {
			case a.kind == writePut && v.rev != 0 && v.id == a.record.ID:
				return v, nil
			case a.kind == writeDelete && v.rev == 0 && rev+int64(i) > a.since:
				return v, nil
			case a.base.rev != 0 && v.rev != a.base.rev:
				return nil, nil // the base was overtaken, for good
			}
		}
		rev += n
	}
	return nil, nil
}

// refused handles an error of the whole request. It returns the attempts that must be sent again as they are.
func (p *pipeline) refused(batch []*attempt, err error) []*attempt {
	p.heard(batch, err)
	switch k := etcd.Classify(err); {
	case k == etcd.Unknown:
		return keep(batch, func(a *attempt) bool {
			a.unknown = true
			if a.kind == writePut && a.base.rev == 0 {
				p.leases.Doubt(a.seat)
				go p.settleCreate(a)
				return false
			}
			return true
		})
	case k == etcd.Transient:
		return batch
	case len(batch) > 1:
		// One attempt can fail them all. Each alone is settled by its own answer.
		for _, a := range batch {
			if k == etcd.NoSpace && !a.unknown {
				go p.settleRefused(a, err, true)
			} else {
				go p.send([]*attempt{a})
			}
		}
		return nil
	}
	return p.refusedAlone(batch[0], err)
}

// refusedAlone handles a definite error to a lone attempt.
func (p *pipeline) refusedAlone(a *attempt, err error) []*attempt {
	switch k := etcd.Classify(err); {
	case k == etcd.LeaseLost && a.seat.Taken():
		p.leases.Forget(a.seat)
		p.leave(a)
		go p.dispatch([]*attempt{a})
	case a.unknown:
		return []*attempt{a} // this send was refused, an earlier one may yet be applied
	case k == etcd.NoSpace:
		go p.settleRefused(a, err, false)
	case k == etcd.TooLarge:
		p.fail(a, ErrTooLarge)
	default:
		p.fail(a, err)
	}
	return nil
}

// settleCreate settles an attempt to create whose outcome is unknown: first so that no send of it can be applied any
// more, then by what the key and its history show.
//
// What no fence helps against is the client's own second send, within the same attempt, of a create that was applied and
// deleted by others in between: it compares the same fence. That takes a server that answers a write which it applies with
// Canceled or DeadlineExceeded, and a logout within the attempt.
func (p *pipeline) settleCreate(a *attempt) {
	err := p.within(a, func(ctx context.Context) error {
		return etcd.Retry(ctx, func(ctx context.Context) error { return p.leases.Refence(ctx, a.seat) })
	})
	if err != nil {
		p.leases.RefenceLater(a.seat)
		p.giveUp(a, err)
		return
	}
	current, err := p.read(a)
	if err != nil {
		p.giveUp(a, err)
		return
	}
	p.overtaken(a, current)
}

// settleRefused settles an attempt that etcd has refused for want of space, which it also answers to the write that
// crossed the quota. That send is over, so the key shows what became of it.
func (p *pipeline) settleRefused(a *attempt, refusal error, batched bool) {
	current, err := p.read(a)
	var written *version
	if err == nil && current.rev == a.base.rev && current.rev == 0 { // created, and deleted since?
		written, err = p.written(a, current.asOf)
	}
	switch {
	case err != nil:
		a.unknown = true
		p.giveUp(a, err)
	case written != nil:
		p.found(a, written, current)
	case current.rev == a.base.rev && batched:
		p.send([]*attempt{a}) // a batch is refused for what one of it needs
	case current.rev == a.base.rev:
		p.fail(a, refusal)
	default:
		p.overtaken(a, current)
	}
}

// read returns an attempt's session as it is.
func (p *pipeline) read(a *attempt) (v *version, err error) {
	err = p.within(a, func(ctx context.Context) error {
		return etcd.Retry(ctx, func(ctx context.Context) error {
			resp, err := p.conn.Send(ctx, clientv3.OpGet(a.queue.key))
			if err == nil {
				v = p.decode(resp.Get().Kvs, resp.Get().Header.Revision)
			}
			return err
		})
	})
	return v, err
}

// heard notes for the callers what etcd said last.
func (p *pipeline) heard(batch []*attempt, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range batch {
		for _, o := range a.ops {
			o.last = err
		}
	}
}

// giveUp ends an attempt that could not be settled. What it does not write was not written, whatever became of it: where
// there is time, that is folded again.
func (p *pipeline) giveUp(a *attempt, cause error) {
	now := time.Now()
	var again, ended []*op
	for _, o := range a.ops {
		if a.unknown && !a.writes(o) && o.deadline.After(now) {
			again = append(again, o)
			continue
		}
		o.err, o.panicked = a.untold(o, cause), nil
		ended = append(ended, o)
	}
	if !a.unknown {
		p.leave(a)
	}
	p.putBack(a.queue, again)
	a.ops = ended
	p.settled(a, nil)
}

// writes reports whether a, if it is applied, makes o's change.
func (a *attempt) writes(o *op) bool {
	return o.err == nil && o.panicked == nil && a.kind != writeNothing && !a.clears
}

// untold returns the error of a call that ends before its attempt is settled.
func (a *attempt) untold(o *op, cause error) error {
	if a.unknown && a.writes(o) {
		return unknownError(cause)
	}
	return cause
}

// fail ends an attempt that was refused for good. Where it is a fold, each of its transitions is tried alone.
func (p *pipeline) fail(a *attempt, err error) {
	if a.unknown { // an earlier send of it may yet be applied
		p.giveUp(a, err)
		return
	}
	p.leave(a)
	if len(a.ops) > 1 {
		for _, o := range a.ops {
			o.alone = true
		}
		p.requeue(a, a.base)
		return
	}
	a.ops[0].err = err
	p.settled(a, a.base)
}

// settled tells a's callers what came of it, and makes its queue ready for what waits. v is the session as it is
// known to be by now, nil if it is not.
func (p *pipeline) settled(a *attempt, v *version) { p.settledAs(a, v, v) }

// settledAs is settled where the session has changed since it was as stored.
func (p *pipeline) settledAs(a *attempt, stored, known *version) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a.queue.known, a.queue.busy, a.queue.sent = known, false, false
	p.offer(a.queue)
	for _, o := range a.ops {
		o.stored = stored
		p.finish(o, o.err)
	}
}

// requeue has a's transitions folded again, over current.
func (p *pipeline) requeue(a *attempt, current *version) {
	p.leave(a)
	p.mu.Lock()
	defer p.mu.Unlock()
	q := a.queue
	q.pending = append(a.ops[:len(a.ops):len(a.ops)], q.pending...)
	q.known, q.busy, q.sent = current, false, false
	p.offer(q)
}
