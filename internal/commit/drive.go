package commit

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
)

const (
	// batchBytes bounds the values of a batch. etcd measures a request as it is proposed to Raft,
	// and takes 1.5 MiB of it.
	batchBytes = 512 << 10
	// aloneBytes is the value size from which a key travels alone, so that it neither delays small
	// ones nor has them share in its being too large.
	aloneBytes = 32 << 10
)

// drive takes attempts through their steps until each has ended. Attempts at the same step take it
// in one request; where their ways part, those that leave are driven by a goroutine of their own,
// so that none holds up another.
func (p *Pipeline) drive(attempts []*attempt) {
	for b := (etcd.Backoff{}); ; {
		now := time.Now()
		attempts = slices.DeleteFunc(attempts, func(a *attempt) bool { return a.step == ended })
		p.endPending(attempts, now)
		attempts = slices.DeleteFunc(attempts, func(a *attempt) bool { return p.overdue(a, now) })
		p.attach(attempts)
		parcels := p.parcels(attempts)
		if len(parcels) == 0 {
			return
		}
		for _, others := range parcels[1:] {
			go p.drive(others)
		}
		attempts = parcels[0]
		if err := p.take(attempts, b.Timeout()); err != nil {
			p.pause(attempts, &b)
		}
	}
}

// late reports whether the time of a call is up.
func (o *call) late(now time.Time) bool { return !o.deadline.After(now) }

// endPending ends the calls whose time is up behind attempts.
func (p *Pipeline) endPending(attempts []*attempt, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range attempts {
		a.queue.pending = p.endLate(a.queue.pending, now, func(_ *call, cause error) error { return cause })
	}
}

// endLate ends the calls whose time is up with what told makes of that, and returns the others.
//
// REQUIRES: mu is held.
func (p *Pipeline) endLate(calls []*call, now time.Time, told func(o *call, cause error) error) []*call {
	if !slices.ContainsFunc(calls, func(o *call) bool { return o.late(now) }) {
		return calls
	}
	return slices.DeleteFunc(slices.Clone(calls), func(o *call) bool {
		if o.late(now) {
			p.abandon(o, told(o, etcd.Ended(context.DeadlineExceeded, o.last)))
		}
		return o.late(now)
	})
}

// pause waits until the next try is due, or the time of a call is up.
func (p *Pipeline) pause(attempts []*attempt, b *etcd.Backoff) {
	attempts = slices.DeleteFunc(slices.Clone(attempts), func(a *attempt) bool { return a.step == ended })
	if len(attempts) == 0 {
		return
	}
	ctx, cancel := context.WithDeadline(context.Background(), p.firstDeadline(attempts))
	defer cancel()
	b.Wait(ctx)
}

// overdue ends the calls of an attempt whose time is up. It reports whether that ends the attempt.
// Calls that came later have the time that they were given: they go on with the attempt, or, if no
// send of it can be applied any more, are folded again without those that have ended.
func (p *Pipeline) overdue(a *attempt, now time.Time) bool {
	switch {
	case !slices.ContainsFunc(a.calls, func(o *call) bool { return o.late(now) }):
		return false
	case !slices.ContainsFunc(a.calls, func(o *call) bool { return !o.late(now) }):
		p.giveUp(a, context.DeadlineExceeded)
		return true
	}
	p.mu.Lock()
	a.calls = p.endLate(a.calls, now, a.untold)
	p.mu.Unlock()
	if a.unsettled() {
		return false
	}
	p.foldAgain(a, a.base)
	return true
}

// attach gives the attempts that need a lease a seat, where there is one.
func (p *Pipeline) attach(attempts []*attempt) {
	for _, a := range attempts {
		if a.step != toSeat {
			continue
		}
		if s, ok := p.leases.Attach(a.final.Expiry()); ok {
			a.sit(s)
			p.advance(a, answer{kind: advanced})
		}
	}
}

// parcels groups attempts that take their next step together: in the requests of a send within the
// limits on operations and on bytes; a history is read for one key.
func (p *Pipeline) parcels(attempts []*attempt) (parcels [][]*attempt) {
	var together [ended][]*attempt
	bytes := 0
	for _, a := range attempts {
		size := a.size()
		alone := a.step == toTrace || a.step == toSend && (a.lone || size >= aloneBytes)
		if alone {
			parcels = append(parcels, []*attempt{a})
			continue
		}
		if group := together[a.step]; a.step == toSend {
			if bytes += size; bytes > batchBytes || len(group) == p.client.BatchKeys() {
				parcels = append(parcels, group)
				together[toSend], bytes = nil, size
			}
		}
		together[a.step] = append(together[a.step], a)
	}
	for _, group := range together {
		if len(group) > 0 {
			parcels = append(parcels, group)
		}
	}
	return parcels
}

// take takes the next step of attempts that are at the same one. It returns what etcd answered if
// that was an error.
func (p *Pipeline) take(attempts []*attempt, timeout time.Duration) error {
	switch attempts[0].step {
	case toSeat:
		return p.seat(attempts)
	case toSend:
		return p.send(attempts, timeout)
	case toFence:
		return p.fence(attempts, timeout)
	case toRead:
		return p.read(attempts)
	default:
		return p.trace(attempts[0], timeout)
	}
}

// firstDeadline returns when the time of the first call is up that waits for one of the attempts,
// or behind it.
func (p *Pipeline) firstDeadline(attempts []*attempt) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	first := attempts[0].calls[0].deadline
	for _, a := range attempts {
		for _, o := range slices.Concat(a.calls, a.queue.pending) {
			if o.deadline.Before(first) {
				first = o.deadline
			}
		}
	}
	return first
}

func lastDeadline(attempts []*attempt) time.Time {
	last := attempts[0].lastDeadline()
	for _, a := range attempts[1:] {
		if d := a.lastDeadline(); d.After(last) {
			last = d
		}
	}
	return last
}

// seat waits for a lease to be granted.
func (p *Pipeline) seat(attempts []*attempt) error {
	ctx, cancel := context.WithDeadline(context.Background(), p.firstDeadline(attempts))
	defer cancel()
	err := p.leases.Wait(ctx, attempts[0].final.Expiry())
	if err != nil && ctx.Err() == nil {
		for _, a := range attempts {
			p.refuse(a, err)
		}
	}
	return err
}

// send sends attempts in one request.
func (p *Pipeline) send(batch []*attempt, timeout time.Duration) error {
	batch = p.markSent(batch)
	if len(batch) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, time.Until(lastDeadline(batch))))
	defer cancel()
	start := time.Now()
	resp, err := p.client.Send(ctx, batchOp(batch))
	if err != nil {
		for _, a := range batch {
			a.lone = len(batch) == 1
			p.refuse(a, err)
		}
		return err
	}
	p.observe(start)
	for i, a := range batch {
		p.answer(a, nestedOf(resp.Txn(), i, len(batch)), resp.Txn().Header.Revision)
	}
	return nil
}

// markSent marks attempts as sent, from where on their callers can no longer be told that nothing
// happened. Attempts with a call that was told so already are folded again without it. It returns
// those that may be sent.
func (p *Pipeline) markSent(batch []*attempt) []*attempt {
	latest := p.client.Latest()
	var marked, dropped []*attempt
	p.mu.Lock()
	for _, a := range batch {
		switch {
		case a.sent:
			marked = append(marked, a)
		case slices.ContainsFunc(a.calls, func(o *call) bool { return o.dropped.Load() }):
			dropped = append(dropped, a)
		default:
			a.sent, a.since = true, max(latest, a.base.AsOf)
			marked = append(marked, a)
		}
	}
	p.mu.Unlock()
	for _, a := range dropped {
		p.foldAgain(a, a.base)
	}
	return marked
}

// observe tells the limiter how long a batch took that was sent at start.
func (p *Pipeline) observe(start time.Time) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.limiter.Observe(now.Sub(start), now)
}

// answer takes what etcd answered, at revision rev, to one attempt of a request.
func (p *Pipeline) answer(a *attempt, resp *etcdserverpb.TxnResponse, rev int64) {
	switch {
	case resp.Succeeded:
		a.current = a.written(rev)
		if a.current.Lease != a.base.Lease {
			p.leases.Leave(a.base.Lease)
		}
		p.advance(a, answer{kind: applied})
	case len(resp.Responses) == 0:
		p.advance(a, answer{kind: unasked})
	default:
		versions := make([]*record.Version, len(resp.Responses))
		for i, r := range resp.Responses {
			versions[i] = p.decode(r.GetResponseRange().Kvs, rev)
		}
		p.see(a, versions)
	}
}

// fence moves the fences that attempts to create compare.
func (p *Pipeline) fence(attempts []*attempt, timeout time.Duration) (last error) {
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, time.Until(p.firstDeadline(attempts))))
	defer cancel()
	for _, a := range attempts {
		if err := p.leases.Refence(ctx, a.seat); err != nil {
			last = err
			p.refuse(a, err)
		} else {
			p.advance(a, answer{kind: advanced})
		}
	}
	return last
}

// read reads the keys of attempts, and what else their compares are about, through the reader's
// batches.
func (p *Pipeline) read(attempts []*attempt) (last error) {
	var keys []string
	for _, a := range attempts {
		keys = append(keys, a.keys()...)
	}
	versions, errs := p.reader.FindAll(context.Background(), p.firstDeadline(attempts), keys)
	for _, a := range attempts {
		n := len(a.keys())
		if err := errors.Join(errs[:n]...); err != nil {
			last = err
			p.refuse(a, err)
		} else {
			p.see(a, versions[:n])
		}
		versions, errs = versions[n:], errs[n:]
	}
	return last
}

// trace takes the next look at the history of an attempt's key.
func (p *Pipeline) trace(a *attempt, timeout time.Duration) error {
	revs := a.search.Next(int64(p.client.BatchKeys()))
	if len(revs) == 0 {
		a.proof = a.search.Found()
		p.advance(a, answer{kind: traced, relation: a.relate(a.current), found: a.proof != nil})
		return nil
	}
	versions, err := p.asOf(a, revs, timeout)
	switch {
	case etcd.Classify(err) == etcd.TooManyOps && len(revs) > p.client.BatchKeys(): // batches have become smaller
	case err != nil:
		p.refuse(a, err)
		return err
	default:
		a.search.See(revs, versions)
	}
	p.advance(a, answer{kind: continued})
	return nil
}

// asOf reads an attempt's key as of several revisions.
func (p *Pipeline) asOf(a *attempt, revs []int64, timeout time.Duration) ([]*record.Version, error) {
	gets := make([]clientv3.Op, len(revs))
	for i, rev := range revs {
		gets[i] = clientv3.OpGet(a.queue.key, clientv3.WithRev(rev))
	}
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, time.Until(p.firstDeadline([]*attempt{a}))))
	defer cancel()
	resp, err := p.client.Send(ctx, clientv3.OpTxn(nil, gets, nil))
	if err != nil {
		return nil, err
	}
	versions := make([]*record.Version, len(revs))
	for i, r := range resp.Txn().Responses {
		versions[i] = p.decode(r.GetResponseRange().Kvs, revs[i])
	}
	return versions, nil
}

// see takes what an attempt's keys hold.
func (p *Pipeline) see(a *attempt, versions []*record.Version) {
	a.current = versions[0]
	ans, rest := answer{kind: seen, relation: a.relate(a.current)}, versions[1:]
	if a.seat.Taken() {
		if fence := rest[0].Rev; ans.relation == atBase && fence != a.seat.Fence() {
			ans.fence = p.reseat(a, fence)
		}
		rest = rest[1:]
	}
	for i, g := range a.guards {
		if !g.holds(rest[i]) {
			ans.breached, a.failure = true, g.Err
			break
		}
	}
	p.advance(a, ans)
}

// reseat takes the mod revision that the key of an attempt's lease turned out to have, where that
// is not the fence.
func (p *Pipeline) reseat(a *attempt, rev int64) fence {
	s, usable := p.leases.Refenced(a.seat, rev)
	if !usable {
		return fenceLost
	}
	a.seat = s
	return fenceMoved
}

// refuse takes an error.
func (p *Pipeline) refuse(a *attempt, err error) {
	ans := refusedBy(err)
	if a.step == toSend && ans.class == etcd.LeaseLost && a.lone && a.seat.Taken() {
		p.leases.Forget(a.seat)
	}
	p.note(a, err)
	p.advance(a, ans)
}

// note keeps for an attempt and its callers what etcd said last.
func (p *Pipeline) note(a *attempt, err error) {
	a.failure = err
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range a.calls {
		o.last = err
	}
}

// advance takes an attempt where decide says. A delete that was not answered by its success has found
// nothing, as far as its calls may rely on that: others may have deleted the key before it, or the
// client have sent it twice. It has happened all the same.
func (p *Pipeline) advance(a *attempt, ans answer) {
	d := decide(a.facts(), ans)
	if d.verdict != carryOn && ans.kind != applied && !a.doubt {
		a.findsNothing()
	}
	switch d.verdict {
	case carryOn:
		p.enter(a, d)
	case happened:
		p.settle(a, a.current)
	case overwritten:
		p.settleAs(a, a.found(), a.current)
	case foldAgain:
		p.foldAgain(a, a.current)
	case fails:
		p.fail(a, cmp.Or(a.refusal, a.failure))
	case breach:
		p.fail(a, a.failure)
	case gaveUp:
		p.giveUp(a, a.failure)
	}
}
