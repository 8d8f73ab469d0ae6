package commit

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// A key's history tells what became of an attempt whose write is not what the key holds: others may have written since. A
// watch would tell as well, but etcd's watchers catch up with history only every 100 ms, and do not tell where it ends if
// nothing more happens.
//
// An attempt that compares a revision has written, if it was applied, the version right after its base. As of each revision
// the key either still is at the base or is not any more, and so the one at which it was overtaken is found as in a sorted
// list: a request of n reads leaves an n-th of the revisions.
//
// An attempt to create has no such order: its key may have come and gone several times. From the end to the start, the first
// version of each life of the key is looked at, which says when that began; and where the key was absent, every revision
// until it was not, n in a request.
//
// For a delete, which bears no write id, the write is that the base was followed by nothing: if others did that, the
// attempt's changes may as well have come right before, and deleting once more what was created since would be to do it
// twice.

// window is the part of a key's history that is left to look through: revisions after from, up to to.
type window struct {
	from, to int64
	at       *record.Version // what the key held as of to, where that is known
	born     int64           // the start of the life that ends in the window, which is looked at next; 0: none
	unsure   bool            // that the key was at the base as of from has to be looked at yet
}

// history returns the window of an attempt whose key was read as a.current.
func (a *attempt) history() window {
	w := window{from: a.since, to: a.current.AsOf, at: a.current, unsure: a.since > a.base.AsOf}
	if a.current.Rev != 0 {
		w.to = a.current.Rev
	}
	if a.base.Rev == 0 {
		w.life(a.current)
	}
	return w
}

// life has the window end with the life of the key that v is of, or before that where v is its first version and no other
// needs to be looked at.
func (w *window) life(v *record.Version) {
	switch {
	case v.Rev == 0:
	case v.Created <= w.from:
		w.to = w.from // it was there before the attempt was sent, and has been ever since
	case v.Count == 1:
		w.to = v.Created - 1
	default:
		w.born = v.Created
	}
}

// next returns the revisions to look at, n at most, in ascending order; none where everything was looked at.
func (w *window) next(create bool, n int64) (revs []int64) {
	switch {
	case create && w.to <= w.from:
	case create && w.born != 0:
		revs = append(revs, w.born)
	case create:
		for rev := max(w.from+1, w.to-n+1); rev <= w.to; rev++ {
			revs = append(revs, rev)
		}
	default:
		if w.unsure {
			revs = append(revs, w.from)
		}
		between := w.to - w.from - 1
		looks := min(between, max(n-int64(len(revs)), 1))
		for i := range looks {
			revs = append(revs, w.from+1+i*between/looks)
		}
	}
	return revs
}

// trace takes the next look at the history of an attempt's key.
func (p *Pipeline) trace(a *attempt, timeout time.Duration) error {
	revs := a.window.next(a.base.Rev == 0, int64(p.client.BatchKeys()))
	if len(revs) == 0 {
		a.conclude()
		p.advance(a, answer{kind: traced, relation: a.relate(a.current), found: a.proof != nil})
		return nil
	}
	versions, err := p.asOf(a, revs, timeout)
	switch {
	case etcd.Classify(err) == etcd.TooManyOps && len(revs) > p.client.BatchKeys(): // batches have become smaller
	case err != nil:
		p.refuse(a, err)
		return err
	case a.base.Rev == 0:
		a.lookForCreate(revs, versions)
	default:
		a.lookForUpdate(revs, versions)
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
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, time.Until(a.firstDeadline())))
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

// lookForUpdate narrows the window to the revisions between which the base was overtaken.
func (a *attempt) lookForUpdate(revs []int64, versions []*record.Version) {
	w := &a.window
	w.unsure = false
	for i, v := range versions {
		if v.Rev != a.base.Rev {
			w.to, w.at = revs[i], v
			if w.to <= w.from {
				w.at = nil // before the first send
			}
			return
		}
		w.from = revs[i]
	}
}

// lookForCreate narrows the window from its end.
func (a *attempt) lookForCreate(revs []int64, versions []*record.Version) {
	w := &a.window
	if w.born != 0 {
		w.to, w.born = w.born-1, 0
	}
	for i := len(versions) - 1; i >= 0; i-- {
		v := versions[i]
		if v.Rev != 0 && v.ID == a.record.ID {
			a.proof, w.to = v, w.from
			return
		}
		if v.Rev != 0 && v.Created <= w.to {
			w.to = revs[i]
			w.life(v)
			return
		}
	}
	w.to = min(w.to, revs[0]-1)
}

// conclude says whether the version that overtook the base is the attempt's.
func (a *attempt) conclude() {
	v := a.window.at
	switch {
	case a.base.Rev == 0, v == nil:
	case a.kind == put && v.Rev != 0 && v.ID == a.record.ID, a.kind == remove && v.Rev == 0:
		a.proof = v
	}
}
