package commit

import (
	"context"
	"errors"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/history"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// enter takes an attempt to its next step.
func (p *Pipeline) enter(a *attempt, d decision) {
	from := a.step
	a.step, a.doubt, a.lone = d.step, d.doubt, d.lone
	if d.noSpace != a.noSpace {
		a.noSpace, a.refusal = d.noSpace, nil
		if d.noSpace {
			a.refusal = a.failure
		}
	}
	if a.step == from {
		return
	}
	switch a.step {
	case toFence:
		p.leases.Doubt(a.seat)
	case toSeat:
		p.leave(a)
	case toTrace:
		a.search = history.NewSearch(history.Write{
			Base: a.base, ID: a.record.ID, Deletes: a.kind == remove, Since: a.since,
		}, a.current)
	}
}

// leave gives up an attempt's seat, if it has one.
func (p *Pipeline) leave(a *attempt) {
	if a.seat.Taken() {
		p.leases.Leave(a.seat.Lease())
		a.seat, a.record.LeaseEnd = lease.Seat{}, 0
	}
}

// found returns the version that an attempt has written.
func (a *attempt) found() *record.Version {
	v := *a.current
	if a.proof != nil {
		v = *a.proof
	}
	v.Value = a.final // decoded, perhaps, and it is the one that calls compare
	return &v
}

// foldAgain has an attempt's changes folded again, over current. It was not applied, and will not
// be.
func (p *Pipeline) foldAgain(a *attempt, current *record.Version) {
	p.leave(a)
	a.step = ended
	p.mu.Lock()
	defer p.mu.Unlock()
	a.queue.putBack(a.calls)
	p.release(a.queue, current)
}

// release ends a queue's attempt. known is the key as it is known to be by now, nil if it is not.
//
// REQUIRES: mu is held.
func (p *Pipeline) release(q *queue, known *record.Version) {
	q.known, q.attempt = known, nil
	p.offer(q)
}

// settle tells an attempt's callers what came of it. v is the key as it is known to be by now, nil
// if it is not.
func (p *Pipeline) settle(a *attempt, v *record.Version) { p.settleAs(a, v, v) }

// settleAs is settle where the key has changed since it was as stored.
func (p *Pipeline) settleAs(a *attempt, stored, known *record.Version) {
	a.step = ended
	p.mu.Lock()
	defer p.mu.Unlock()
	p.release(a.queue, known)
	for _, o := range a.calls {
		o.stored = stored
		p.finish(o, o.err)
	}
}

// fail ends an attempt that was refused for good, and not applied. Where it is a fold, each of its
// changes is tried alone.
func (p *Pipeline) fail(a *attempt, err error) {
	if len(a.calls) > 1 {
		for _, o := range a.calls {
			o.alone = true
		}
		p.foldAgain(a, a.base)
		return
	}
	p.leave(a)
	if etcd.Classify(err) == etcd.TooLarge {
		err = ErrTooLarge
	}
	for _, o := range a.calls {
		o.err = err
	}
	p.settle(a, a.base)
}

// giveUp ends an attempt that could not be settled. What it does not write was not written,
// whatever became of it: where there is time, that is folded again.
func (p *Pipeline) giveUp(a *attempt, cause error) {
	if a.step == toFence {
		p.leases.RefenceLater(a.seat)
	}
	if !a.unsettled() {
		p.leave(a)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	var again []*call
	for _, o := range a.calls {
		if a.unsettled() && !a.writes(o) && o.deadline.After(now) {
			again = append(again, o)
			continue
		}
		p.abandon(o, a.untold(o, untilNow(cause, o.last)))
	}
	a.step = ended
	a.queue.putBack(again)
	p.release(a.queue, nil)
}

// untilNow is the cause of a call's end, with what etcd said last where that is the end of its
// time.
func untilNow(cause, last error) error {
	if errors.Is(cause, context.DeadlineExceeded) {
		return etcd.Ended(context.DeadlineExceeded, last)
	}
	return cause
}
