package commit

import (
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/history"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// attempt is a fold of changes, as it is sent.
type attempt struct {
	queue  *queue
	calls  []*call
	sent   bool // it may have reached etcd
	folded bool // apart, and is ready again

	base   *record.Version // what it is folded over
	kind   kind
	clears bool           // it deletes a value that has ended, and its changes are folded again
	final  record.Value   // what is there when it was applied; nil: nothing
	also   []record.Entry // what stands with that
	guards []Precondition

	record record.Record
	value  string
	seat   lease.Seat        // a new one, on the lease that the Put names; none where it keeps the key's lease, or there is no Put
	keep   clientv3.OpOption // leaves the key on its lease

	// Where it is on its way, as decide says.
	step    step
	doubt   bool // an earlier send may have been applied, or may be yet
	lone    bool // it goes by itself
	noSpace bool // the step finds out about a send that was refused for want of space

	since   int64           // a revision that etcd had before the first send, lately: a version up to it is not this attempt's
	current *record.Version // what the key held when it was read last
	search  *history.Search // through the key's history
	proof   *record.Version // the version there that the attempt has written
	failure error           // what etcd said last, or what a precondition that does not hold means
	refusal error           // with noSpace, what etcd refused the send with
}

// facts returns what decide knows of an attempt.
func (a *attempt) facts() facts {
	return facts{
		step: a.step, kind: a.kind, create: a.base.Rev == 0, clears: a.clears, idempotent: a.onlyDeletes(),
		seated: a.seat.Taken(), lone: a.lone, noSpace: a.noSpace, doubt: a.doubt,
	}
}

// unsettled reports whether it is not known whether a was applied, or may be yet.
func (a *attempt) unsettled() bool {
	return a.doubt || a.step == toFence || a.step == toRead || a.step == toTrace
}

// onlyDeletes reports whether all of a's calls are told the same where the key is not there.
func (a *attempt) onlyDeletes() bool {
	return !slices.ContainsFunc(a.calls, func(o *call) bool { _, ok := o.Change.(Delete); return !ok })
}

// findsNothing has a's deletes say that they have found nothing. Where they are folded again, they
// say what they find then.
func (a *attempt) findsNothing() {
	for _, o := range a.calls {
		if d, ok := o.Change.(Delete); ok && d.Found != nil {
			*d.Found = nil
		}
	}
}

// sit puts a on a lease.
func (a *attempt) sit(s lease.Seat) {
	a.seat = s
	a.record.LeaseEnd = s.Until()
	a.value = string(a.record.Encode())
}

// lastDeadline returns when the time of the last of a's calls is up.
func (a *attempt) lastDeadline() time.Time {
	return slices.MaxFunc(a.calls, func(o, other *call) int { return o.deadline.Compare(other.deadline) }).deadline
}

// writes reports whether a, if it is applied, makes o's change.
func (a *attempt) writes(o *call) bool { return o.made() && a.kind != validate && !a.clears }

// untold returns the error of a call that ends before its attempt is settled.
func (a *attempt) untold(o *call, cause error) error {
	if a.unsettled() && a.writes(o) {
		return Unknown(cause)
	}
	return cause
}

// size returns how many bytes a adds to a request.
func (a *attempt) size() int {
	n := len(a.value)
	for _, e := range a.also {
		n += len(e.Key) + len(e.Value)
	}
	return n
}

// txn returns a as a Txn, with an Else that reads what its compares are about, or without.
func (a *attempt) txn(asks bool) clientv3.Op {
	cmps := []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(a.queue.key), "=", a.base.Rev)}
	if a.seat.Taken() {
		cmps = append(cmps, a.seat.Compare())
	}
	for _, g := range a.guards {
		cmps = append(cmps, g.Cmp)
	}
	var otherwise []clientv3.Op
	if asks {
		for _, key := range a.keys() {
			otherwise = append(otherwise, clientv3.OpGet(key))
		}
	}
	return clientv3.OpTxn(cmps, a.writeOps(), otherwise)
}

// writeOps returns what a does where its compares hold.
func (a *attempt) writeOps() (ops []clientv3.Op) {
	moved := a.seat.Taken()
	switch {
	case a.kind == validate:
		return nil
	case a.kind == remove:
		ops = append(ops, clientv3.OpDelete(a.queue.key))
	case moved:
		ops = append(ops, clientv3.OpPut(a.queue.key, a.value, clientv3.WithLease(a.seat.Lease())))
	default:
		ops = append(ops, clientv3.OpPut(a.queue.key, a.value, a.keep))
	}
	on := clientv3.WithLease(a.base.Lease)
	if moved {
		on = clientv3.WithLease(a.seat.Lease())
	}
	for _, e := range a.also {
		if moved || !slices.Contains(a.base.Also, e) {
			ops = append(ops, clientv3.OpPut(e.Key, e.Value, on))
		}
	}
	for _, e := range a.base.Also {
		if !slices.ContainsFunc(a.also, func(o record.Entry) bool { return o.Key == e.Key }) {
			ops = append(ops, clientv3.OpDelete(e.Key))
		}
	}
	return ops
}

// keys returns what tells why a's compares have failed: the key, that of the lease where it is a
// new one, and those of the preconditions.
func (a *attempt) keys() []string {
	keys := []string{a.queue.key}
	if a.seat.Taken() {
		keys = append(keys, a.seat.Key())
	}
	for _, g := range a.guards {
		keys = append(keys, string(g.Cmp.KeyBytes()))
	}
	return keys
}

// asks reports whether a has an Else in a batch. Where it need not be known why the compare failed,
// it has none: a key that is still at its base when it is read later was so when the compare
// failed. That does not hold where the base is an absent key, which may have been there in between.
// A precondition could be read later, too, as one that has failed does not come true again: who
// loses it is told a round trip earlier.
func (a *attempt) asks() bool { return a.base.Rev == 0 || len(a.guards) > 0 }

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

// nestedOf returns the answer to the i-th of n attempts of a batch.
func nestedOf(resp *clientv3.TxnResponse, i, n int) *etcdserverpb.TxnResponse {
	if n == 1 {
		return (*etcdserverpb.TxnResponse)(resp)
	}
	return resp.Responses[i].GetResponseTxn()
}

// relate returns what current is to a.
func (a *attempt) relate(current *record.Version) relation {
	switch {
	case current.Rev == a.base.Rev:
		return atBase
	case current.Rev == 0:
		return absent
	case a.kind == put && current.ID == a.record.ID:
		return ours
	case a.kind == remove && current.Created == a.base.Created:
		return kept
	case a.kind == put && !a.mayPrecede(current):
		return unpreceded
	}
	return later
}

// mayPrecede reports whether current, which is a version, may be a later one than one that a has
// written unnoticed.
func (a *attempt) mayPrecede(current *record.Version) bool {
	switch {
	case current.Rev <= a.since:
		return false // it was there before the first send, and so had the base been overtaken
	case a.base.Rev == 0:
		return current.Created > a.since
	}
	return current.Created != a.base.Created || current.Count != a.base.Count+1
}

// holds reports whether a precondition holds for what its key holds.
func (g Precondition) holds(v *record.Version) bool {
	cmp := g.Cmp.GetCompare()
	var is, want int64
	switch cmp.Target {
	case etcdserverpb.Compare_CREATE:
		is, want = v.Created, cmp.GetCreateRevision()
	case etcdserverpb.Compare_MOD:
		is, want = v.Rev, cmp.GetModRevision()
	case etcdserverpb.Compare_VERSION:
		is, want = v.Count, cmp.GetVersion()
	}
	switch cmp.Result {
	case etcdserverpb.Compare_GREATER:
		return is > want
	case etcdserverpb.Compare_LESS:
		return is < want
	case etcdserverpb.Compare_NOT_EQUAL:
		return is != want
	default:
		return is == want
	}
}

// written returns the version that a has written at rev.
func (a *attempt) written(rev int64) *record.Version {
	if a.kind == validate {
		still := *a.base
		still.AsOf = rev
		return &still
	}
	if a.kind == remove {
		return &record.Version{AsOf: rev}
	}
	v := &record.Version{
		Rev: rev, AsOf: rev, Value: a.final, Also: a.also, Lease: a.base.Lease, Until: a.record.LeaseEnd, ID: a.record.ID,
		Created: a.base.Created, Count: a.base.Count + 1,
	}
	if a.base.Rev == 0 {
		v.Created, v.Count = rev, 1
	}
	if a.seat.Taken() {
		v.Lease = a.seat.Lease()
	}
	return v
}

// refusedBy is what decide knows of an error.
func refusedBy(err error) answer { return answer{kind: refused, class: etcd.Classify(err)} }
