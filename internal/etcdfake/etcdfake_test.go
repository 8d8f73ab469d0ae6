package etcdfake

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// pair is a fake and a real etcd, which get the same requests.
type pair struct {
	fake   *Etcd
	real   *clientv3.Client
	leases [2][]clientv3.LeaseID // the real ids and the fake's
}

// do has both do an operation, and compares what they answer. The operation is made for each, as they name leases
// differently; lease returns the id of the i-th.
func (p *pair) do(t *testing.T, name string, op func(lease func(i int) clientv3.LeaseID) clientv3.Op) {
	t.Helper()
	var answers [2]string
	for side, api := range []etcd.API{p.real, p.fake} {
		resp, err := api.Do(t.Context(), op(func(i int) clientv3.LeaseID { return p.lease(side, i) }))
		answers[side] = p.describe(side, resp, clientv3.ContextError(t.Context(), err))
	}
	if answers[0] != answers[1] {
		t.Fatalf("%s\netcd: %s\nfake: %s", name, answers[0], answers[1])
	}
}

// lease returns the id of the i-th lease, or of one that does not exist.
func (p *pair) lease(side, i int) clientv3.LeaseID {
	if i < len(p.leases[side]) {
		return p.leases[side][i]
	}
	return 123456789
}

// describe returns what matters of an answer.
func (p *pair) describe(side int, resp clientv3.OpResponse, err error) string {
	if err != nil {
		return err.Error()
	}
	var s strings.Builder
	var txn func(r *etcdserverpb.TxnResponse)
	get := func(r *etcdserverpb.RangeResponse) {
		fmt.Fprint(&s, "get ", r.Count, r.More)
		for _, kv := range r.Kvs {
			value := string(kv.Value[:min(len(kv.Value), 10)])
			lease := slices.Index(p.leases[side], clientv3.LeaseID(kv.Lease))
			fmt.Fprintf(&s, " {%s=%s created %d mod %d version %d lease %d}", kv.Key, value, kv.CreateRevision, kv.ModRevision, kv.Version, lease)
		}
	}
	txn = func(r *etcdserverpb.TxnResponse) {
		fmt.Fprint(&s, "txn ", r.Succeeded, " [")
		for _, op := range r.Responses {
			switch a := op.Response.(type) {
			case *etcdserverpb.ResponseOp_ResponseRange:
				get(a.ResponseRange)
			case *etcdserverpb.ResponseOp_ResponsePut:
				fmt.Fprint(&s, "put")
			case *etcdserverpb.ResponseOp_ResponseDeleteRange:
				fmt.Fprint(&s, "deleted ", a.ResponseDeleteRange.Deleted)
			case *etcdserverpb.ResponseOp_ResponseTxn:
				txn(a.ResponseTxn)
			}
			fmt.Fprint(&s, "; ")
		}
		fmt.Fprint(&s, "]")
	}
	switch {
	case resp.Txn() != nil:
		txn((*etcdserverpb.TxnResponse)(resp.Txn()))
		fmt.Fprint(&s, " at ", resp.Txn().Header.Revision)
	case resp.Get() != nil:
		get((*etcdserverpb.RangeResponse)(resp.Get()))
		fmt.Fprint(&s, " at ", resp.Get().Header.Revision)
	case resp.Put() != nil:
		fmt.Fprint(&s, "put at ", resp.Put().Header.Revision)
	case resp.Del() != nil:
		fmt.Fprint(&s, "deleted ", resp.Del().Deleted, " at ", resp.Del().Header.Revision)
	}
	return s.String()
}

func (p *pair) grant(t *testing.T) {
	t.Helper()
	for side, api := range []etcd.API{p.real, p.fake} {
		resp, err := api.Grant(t.Context(), 600)
		if err != nil {
			t.Fatal(err)
		}
		p.leases[side] = append(p.leases[side], resp.ID)
	}
}

// revoke revokes the i-th lease of both, after it has compared the keys on it.
func (p *pair) revoke(t *testing.T, i int) {
	t.Helper()
	var answers [2]string
	for side, api := range []etcd.API{p.real, p.fake} {
		ttl, err := api.TimeToLive(t.Context(), p.lease(side, i), clientv3.WithAttachedKeys())
		if err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(ttl.Keys, bytes.Compare)
		resp, err := api.Revoke(t.Context(), p.lease(side, i))
		answers[side] = fmt.Sprintf("exists %t, keys %s, %v", ttl.TTL > 0, ttl.Keys, err)
		if err == nil {
			answers[side] += fmt.Sprint(", revoked at ", resp.Header.Revision)
		}
	}
	if answers[0] != answers[1] {
		t.Fatalf("revoke\netcd: %s\nfake: %s", answers[0], answers[1])
	}
}

// Compact compacts both.
func (p *pair) compact(t *testing.T, revision int64) {
	t.Helper()
	if _, err := p.real.Compact(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	p.fake.Compact(revision)
}

// The fake answers as etcd does: first to what tests rest on, then to all kinds of operations at random.
func TestFake_IsLikeEtcd(t *testing.T) {
	const maxOps = 24
	c := etcdtest.New(t, etcdtest.Config{MaxTxnOps: maxOps})
	p := &pair{fake: New(), real: c.Client(t)}
	p.fake.maxOps = maxOps
	type id = func(i int) clientv3.LeaseID
	plain := func(name string, op clientv3.Op) {
		t.Helper()
		p.do(t, name, func(id) clientv3.Op { return op })
	}
	mod := func(key string, rev int64) []clientv3.Cmp {
		return []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", rev)}
	}
	get, put, del := clientv3.OpGet("a"), clientv3.OpPut("a", "1"), clientv3.OpDelete("a")
	list := func(ops ...clientv3.Op) []clientv3.Op { return ops }
	nest := func(ops ...clientv3.Op) clientv3.Op { return clientv3.OpTxn(nil, ops, nil) }

	p.grant(t)
	p.grant(t)
	plain("get nothing", get)
	plain("delete nothing", del)
	plain("create", clientv3.OpTxn(mod("a", 0), list(put), list(get)))
	plain("create again", clientv3.OpTxn(mod("a", 0), list(put), list(get)))
	p.do(t, "put on a lease", func(lease id) clientv3.Op { return clientv3.OpPut("a", "2", clientv3.WithLease(lease(0))) })
	plain("keep the lease", clientv3.OpPut("a", "3", clientv3.WithIgnoreLease()))
	plain("keep the lease of nothing", clientv3.OpPut("b", "3", clientv3.WithIgnoreLease()))
	plain("keep the lease of nothing, nested", nest(put, nest(clientv3.OpPut("b", "3", clientv3.WithIgnoreLease()))))
	plain("keep the lease of nothing, not taken", clientv3.OpTxn(mod("b", 7), list(clientv3.OpPut("b", "3", clientv3.WithIgnoreLease())), list(get)))
	p.do(t, "no such lease", func(lease id) clientv3.Op {
		return nest(put, nest(clientv3.OpPut("b", "3", clientv3.WithLease(lease(9)))))
	})
	p.do(t, "no such lease, not taken", func(lease id) clientv3.Op {
		return clientv3.OpTxn(mod("b", 7), list(clientv3.OpPut("b", "3", clientv3.WithLease(lease(9)))), nil)
	})
	plain("drop the lease", put)
	p.do(t, "nested compares see the state before", func(lease id) clientv3.Op {
		return nest(
			clientv3.OpTxn(mod("b", 0), list(clientv3.OpPut("b", "1", clientv3.WithLease(lease(1)))), nil),
			clientv3.OpTxn(mod("b", 0), list(clientv3.OpPut("c", "1", clientv3.WithLease(lease(1)))), list(get)),
			clientv3.OpGet("b"))
	})
	plain("duplicate among siblings", nest(nest(put), nest(put)))
	plain("duplicate across levels", nest(put, nest(put)))
	plain("put and delete among siblings", nest(nest(put), nest(del)))
	plain("delete and put among siblings", nest(nest(del), nest(put)))
	plain("put and delete", nest(put, del))
	plain("delete twice", nest(del, nest(del)))
	plain("put in both branches", clientv3.OpTxn(mod("a", 0), list(put), list(put)))
	plain("put in both nested branches", nest(clientv3.OpTxn(mod("a", 0), list(put), list(put))))
	plain("past", clientv3.OpGet("a", clientv3.WithRev(3)))
	plain("future", clientv3.OpGet("a", clientv3.WithRev(1000)))
	plain("past and future, in a Txn", nest(clientv3.OpGet("a", clientv3.WithRev(3)), clientv3.OpGet("a", clientv3.WithRev(1000))))
	plain("range", clientv3.OpGet("a", clientv3.WithRange("z"), clientv3.WithLimit(2)))
	plain("too large", clientv3.OpPut("a", strings.Repeat("x", 1600<<10)))
	for n := maxOps - 3; n <= maxOps+1; n++ {
		plain(fmt.Sprint(n, " reads"), nest(slices.Repeat(list(get), n)...))
		inner := clientv3.OpTxn(mod("b", 0), nil, list(get, get))
		plain(fmt.Sprint(n, " nested"), nest(slices.Repeat(list(inner), n)...))
	}
	p.revoke(t, 1)
	p.revoke(t, 1)
	plain("after the revoke", clientv3.OpGet("a", clientv3.WithRange("z")))
	p.compact(t, 5)
	for rev := range p.fake.Revision() + 2 {
		plain(fmt.Sprint("as of ", rev), nest(clientv3.OpGet("a", clientv3.WithRev(rev)), clientv3.OpGet("b", clientv3.WithRev(rev))))
	}
	for i := range 400 {
		rng := rand.New(rand.NewPCG(1, uint64(i)))
		switch rng.IntN(20) {
		case 0:
			p.grant(t)
		case 1:
			p.revoke(t, rng.IntN(len(p.leases[0])))
		default:
			p.do(t, fmt.Sprint("random ", i), func(lease id) clientv3.Op {
				return randomOp(rand.New(rand.NewPCG(2, uint64(i))), p.fake, lease, 3)
			})
		}
	}
}

// randomOp makes an operation over a few keys and leases, with Txns nested up to depth.
func randomOp(rng *rand.Rand, f *Etcd, lease func(i int) clientv3.LeaseID, depth int) clientv3.Op {
	key := func() string { return string("abcdef"[rng.IntN(6)]) }
	ops := func() []clientv3.Op {
		ops := make([]clientv3.Op, rng.IntN(4))
		for i := range ops {
			ops[i] = randomOp(rng, f, lease, depth-1)
		}
		return ops
	}
	switch n := rng.IntN(10); {
	case n < 5 && depth > 0:
		k := key()
		f.mu.Lock()
		kv := f.at(k, f.revision)
		f.mu.Unlock()
		cmps := []clientv3.Cmp{
			clientv3.Compare(clientv3.ModRevision(k), "=", kv.GetModRevision()),
			clientv3.Compare(clientv3.CreateRevision(k), "=", kv.GetCreateRevision()),
			clientv3.Compare(clientv3.ModRevision(key()), []string{"=", "<", ">", "!="}[rng.IntN(4)], rng.Int64N(9)),
		}
		rng.Shuffle(len(cmps), func(i, j int) { cmps[i], cmps[j] = cmps[j], cmps[i] })
		return clientv3.OpTxn(cmps[:rng.IntN(3)], ops(), ops())
	case n < 6:
		return clientv3.OpGet(key())
	case n < 7:
		return clientv3.OpDelete(key())
	case n < 8:
		return clientv3.OpPut(key(), fmt.Sprint(rng.IntN(100)), clientv3.WithIgnoreLease())
	case n < 9:
		return clientv3.OpPut(key(), fmt.Sprint(rng.IntN(100)), clientv3.WithLease(lease(rng.IntN(12))))
	}
	return clientv3.OpPut(key(), fmt.Sprint(rng.IntN(100)))
}

// Requests can be held, lost before and after etcd took them, and delivered late.
func TestFake_Intercept(t *testing.T) {
	f := New()
	lost := errors.New("lost")
	var late func() error
	put := func(hook func(r *Request) error) (string, error) {
		f.Intercept(hook)
		_, err := f.Do(t.Context(), clientv3.OpPut("a", fmt.Sprint(f.Revision())))
		f.Intercept(nil)
		resp, _ := f.Get(t.Context(), "a")
		if len(resp.Kvs) == 0 {
			return "", err
		}
		return string(resp.Kvs[0].Value), err
	}
	for _, step := range []struct {
		hook func(r *Request) error
		want string
		err  error
	}{
		{func(r *Request) error { late = r.Apply; return lost }, "", lost},
		{func(r *Request) error { return errors.Join(r.Apply(), lost) }, "1", lost},
		{func(r *Request) error { return r.Apply() }, "2", nil},
		{func(*Request) error { _ = late(); return lost }, "1", lost},
	} {
		if got, err := put(step.hook); got != step.want || errors.Is(err, lost) != (step.err != nil) {
			t.Errorf("%q, %v, want %q, %v", got, err, step.want, step.err)
		}
	}
}
