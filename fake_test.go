package etcdstore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// fakeEtcd is an etcd in memory, for tests that decide what becomes of each request. It keeps all history, and knows
// what the store uses: transactions within transactions, reads of the past, leases, and the limits of a server. The
// client's own code makes the requests. TestFake_IsLikeEtcd holds it to the real thing.
//
// Time does not pass in it: a lease ends when it is revoked.
type fakeEtcd struct {
	clientv3.KV

	mu       sync.Mutex
	held     []*fakeHold
	hook     func(r *fakeRequest) error
	requests []any // as they came
	maxOps   int
	maxBytes int
	denied   map[string]bool // keys that may be neither read nor written

	revision  int64
	before    int64 // the revision before the request that is being applied
	compacted int64
	history   map[string][]*mvccpb.KeyValue // a deletion has version 0, and the lease that took the key with it
	leases    map[clientv3.LeaseID]int64    // with their TTLs
	granted   clientv3.LeaseID
}

var _ etcd.API = (*fakeEtcd)(nil)

func newFakeEtcd() *fakeEtcd {
	f := &fakeEtcd{
		maxOps:   128,
		maxBytes: 1.5 * 1024 * 1024,
		denied:   make(map[string]bool),
		revision: 1,
		history:  make(map[string][]*mvccpb.KeyValue),
		leases:   make(map[clientv3.LeaseID]int64),
	}
	f.KV = clientv3.NewKVFromKVClient(fakeKV{f: f}, nil)
	return f
}

// fakeRequest is a request on its way. A hook calls apply to let etcd have it, and returns the error that the caller
// gets in place of etcd's answer. It may also hold the request, or call apply later or more than once, as a network may
// deliver a request.
type fakeRequest struct {
	done  <-chan struct{} // of the caller's context
	msg   any             // *etcdserverpb.TxnRequest, and so on
	apply func() error    // returns the error that etcd answers
}

// txn returns the request if it is a Txn, else nil.
func (r *fakeRequest) txn() *etcdserverpb.TxnRequest {
	txn, _ := r.msg.(*etcdserverpb.TxnRequest)
	return txn
}

// wait waits until c is closed, as long as the request's caller does.
func (r *fakeRequest) wait(c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-r.done:
		return status.FromContextError(context.Canceled).Err()
	}
}

// fakeHold holds requests until its gate is closed.
type fakeHold struct {
	match func(r *fakeRequest) bool
	gate  chan struct{}
}

// hold holds the requests that match before etcd, or a hook, gets them, until release is called in a synctest bubble.
func (f *fakeEtcd) hold(match func(r *fakeRequest) bool) (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &fakeHold{match, make(chan struct{})}
	f.held = append(f.held, h)
	return func() {
		f.mu.Lock()
		f.held = slices.DeleteFunc(slices.Clone(f.held), func(o *fakeHold) bool { return o == h })
		f.mu.Unlock()
		close(h.gate)
		synctest.Wait()
	}
}

// letPass makes a call that nothing holds.
func (f *fakeEtcd) letPass(t *testing.T, call func() error) {
	t.Helper()
	f.mu.Lock()
	held := f.held
	f.held = nil
	f.mu.Unlock()
	if err := call(); err != nil {
		t.Error(err)
	}
	f.mu.Lock()
	f.held = held
	f.mu.Unlock()
}

// script has the requests that match meet their fates one after the other. The rest pass.
func (f *fakeEtcd) script(match func(r *fakeRequest) bool, fates ...func(r *fakeRequest) error) {
	var next atomic.Int32
	f.intercept(func(r *fakeRequest) error {
		if match(r) {
			if i := int(next.Add(1)) - 1; i < len(fates) {
				return fates[i](r)
			}
		}
		return r.apply()
	})
}

// What can become of a request.

var errFakeLost = status.Error(codes.Unavailable, "error reading from server: EOF")

func fakePass(r *fakeRequest) error { return r.apply() }
func fakeDrop(*fakeRequest) error   { return errFakeLost }
func fakeLose(r *fakeRequest) error { _ = r.apply(); return errFakeLost }
func fakeAnswer(err error) func(*fakeRequest) error {
	return func(*fakeRequest) error { return err }
}

// intercept has all requests from now on pass through hook.
func (f *fakeEtcd) intercept(hook func(r *fakeRequest) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

// fakeSent returns the requests of a type that came since the last call, and forgets the others.
func fakeSent[Q any](f *fakeEtcd) (sent []Q) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, msg := range f.requests {
		if q, ok := msg.(Q); ok {
			sent = append(sent, q)
		}
	}
	f.requests = nil
	return sent
}

// fakeServe carries one request from its caller to etcd and back.
func fakeServe[R any](ctx context.Context, f *fakeEtcd, msg any, handle func() (R, error)) (R, error) {
	var none, resp R
	if ctx.Err() != nil {
		return none, status.FromContextError(ctx.Err()).Err()
	}
	r := &fakeRequest{done: ctx.Done(), msg: msg, apply: func() (err error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.before = f.revision
		resp, err = handle()
		return err
	}}
	f.mu.Lock()
	f.requests = append(f.requests, msg)
	held := f.held
	f.mu.Unlock()
	for _, h := range held {
		if h.match(r) {
			if err := r.wait(h.gate); err != nil {
				return none, err
			}
		}
	}
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		hook = fakePass
	}
	if err := hook(r); err != nil {
		return none, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return resp, nil
}

// fakeKV is the server's side of a fakeEtcd's KV.
type fakeKV struct {
	etcdserverpb.KVClient // what the store does not call
	f                     *fakeEtcd
}

func (kv fakeKV) Range(ctx context.Context, r *etcdserverpb.RangeRequest, _ ...grpc.CallOption) (*etcdserverpb.RangeResponse, error) {
	return fakeServe(ctx, kv.f, r, func() (*etcdserverpb.RangeResponse, error) {
		if err := cmp.Or(kv.f.permit(string(r.Key)), kv.f.checkRange(r)); err != nil {
			return nil, err
		}
		return kv.f.get(r), nil
	})
}

func (kv fakeKV) Put(ctx context.Context, r *etcdserverpb.PutRequest, _ ...grpc.CallOption) (*etcdserverpb.PutResponse, error) {
	return fakeServe(ctx, kv.f, r, func() (*etcdserverpb.PutResponse, error) {
		if err := cmp.Or(kv.f.checkSize(r), kv.f.permit(string(r.Key)), kv.f.checkPut(r)); err != nil {
			return nil, err
		}
		kv.f.put(r)
		return &etcdserverpb.PutResponse{Header: kv.f.header()}, nil
	})
}

func (kv fakeKV) DeleteRange(ctx context.Context, r *etcdserverpb.DeleteRangeRequest, _ ...grpc.CallOption) (*etcdserverpb.DeleteRangeResponse, error) {
	return fakeServe(ctx, kv.f, r, func() (*etcdserverpb.DeleteRangeResponse, error) {
		if err := kv.f.permit(string(r.Key)); err != nil {
			return nil, err
		}
		n := kv.f.remove(string(r.Key), 0)
		return &etcdserverpb.DeleteRangeResponse{Header: kv.f.header(), Deleted: n}, nil
	})
}

func (kv fakeKV) Txn(ctx context.Context, r *etcdserverpb.TxnRequest, _ ...grpc.CallOption) (*etcdserverpb.TxnResponse, error) {
	return fakeServe(ctx, kv.f, r, func() (*etcdserverpb.TxnResponse, error) {
		_, _, errThen := fakeWrites(r.Success)
		_, _, errElse := fakeWrites(r.Failure)
		if err := cmp.Or(fakeCount(r, kv.f.maxOps), errThen, errElse, kv.f.checkSize(r), kv.f.permitTxn(r)); err != nil {
			return nil, err
		}
		taken := make(fakePath)
		kv.f.compare(r, taken)
		if err := kv.f.checkTxn(r, taken); err != nil {
			return nil, err
		}
		resp := kv.f.execute(r, taken)
		resp.Header = kv.f.header()
		return resp, nil
	})
}

// Grant grants a lease.
func (f *fakeEtcd) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	resp, err := fakeServe(ctx, f, &etcdserverpb.LeaseGrantRequest{TTL: ttl}, func() (*clientv3.LeaseGrantResponse, error) {
		f.granted++
		f.leases[f.granted] = ttl
		return &clientv3.LeaseGrantResponse{ResponseHeader: f.header(), ID: f.granted, TTL: ttl}, nil
	})
	return resp, clientv3.ContextError(ctx, err)
}

// Revoke ends a lease, and its keys with it.
func (f *fakeEtcd) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	resp, err := fakeServe(ctx, f, &etcdserverpb.LeaseRevokeRequest{ID: int64(id)}, func() (*clientv3.LeaseRevokeResponse, error) {
		if _, ok := f.leases[id]; !ok {
			return nil, rpctypes.ErrGRPCLeaseNotFound
		}
		for _, key := range f.attached(id) {
			f.remove(key, id)
		}
		delete(f.leases, id)
		return &clientv3.LeaseRevokeResponse{Header: f.header()}, nil
	})
	return resp, clientv3.ContextError(ctx, err)
}

// TimeToLive returns a lease's TTL, -1 where there is none, and always its keys.
func (f *fakeEtcd) TimeToLive(ctx context.Context, id clientv3.LeaseID, _ ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error) {
	resp, err := fakeServe(ctx, f, &etcdserverpb.LeaseTimeToLiveRequest{ID: int64(id)}, func() (*clientv3.LeaseTimeToLiveResponse, error) {
		resp := &clientv3.LeaseTimeToLiveResponse{ResponseHeader: f.header(), ID: id, TTL: -1}
		if ttl, ok := f.leases[id]; ok {
			resp.TTL, resp.GrantedTTL = ttl, ttl
		}
		for _, key := range f.attached(id) {
			resp.Keys = append(resp.Keys, []byte(key))
		}
		return resp, nil
	})
	return resp, clientv3.ContextError(ctx, err)
}

// What follows is etcd itself, and runs with mu held.

func (f *fakeEtcd) header() *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{Revision: f.revision}
}

// at returns what a key held at a revision, nil for nothing.
func (f *fakeEtcd) at(key string, revision int64) *mvccpb.KeyValue {
	for _, kv := range slices.Backward(f.history[key]) {
		if kv.ModRevision > revision {
			continue
		}
		if kv.Version == 0 {
			return nil
		}
		return kv
	}
	return nil
}

// attached returns the keys on a lease.
func (f *fakeEtcd) attached(id clientv3.LeaseID) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(f.history)), func(key string) bool {
		kv := f.at(key, f.revision)
		return kv == nil || kv.Lease != int64(id)
	})
}

// write adds a version to a key's history. All writes of a request have one revision.
func (f *fakeEtcd) write(kv *mvccpb.KeyValue) {
	f.revision = f.before + 1
	kv.ModRevision = f.revision
	f.history[string(kv.Key)] = append(f.history[string(kv.Key)], kv)
}

func (f *fakeEtcd) put(r *etcdserverpb.PutRequest) {
	old := f.at(string(r.Key), f.revision)
	kv := &mvccpb.KeyValue{Key: r.Key, Value: r.Value, Lease: r.Lease, CreateRevision: f.before + 1, Version: 1}
	if old != nil {
		kv.CreateRevision, kv.Version = old.CreateRevision, old.Version+1
	}
	if r.IgnoreLease {
		kv.Lease = old.Lease
	}
	f.write(kv)
}

// remove deletes a key, and returns how many that were.
func (f *fakeEtcd) remove(key string, revoked clientv3.LeaseID) int64 {
	if f.at(key, f.revision) == nil {
		return 0
	}
	f.write(&mvccpb.KeyValue{Key: []byte(key), Lease: int64(revoked)})
	return 1
}

func (f *fakeEtcd) get(r *etcdserverpb.RangeRequest) *etcdserverpb.RangeResponse {
	keys := []string{string(r.Key)}
	if len(r.RangeEnd) > 0 {
		keys = slices.DeleteFunc(slices.Sorted(maps.Keys(f.history)), func(key string) bool {
			return key < string(r.Key) || key >= string(r.RangeEnd)
		})
	}
	resp := &etcdserverpb.RangeResponse{Header: f.header()}
	for _, key := range keys {
		kv := f.at(key, cmp.Or(r.Revision, f.revision))
		if kv == nil {
			continue
		}
		if resp.Count++; r.Limit > 0 && resp.Count > r.Limit {
			resp.More = true
			continue
		}
		resp.Kvs = append(resp.Kvs, kv)
	}
	return resp
}

// fakePath says of each Txn that is carried out whether its compares succeeded.
type fakePath map[*etcdserverpb.TxnRequest]bool

// ops returns the branch that is taken.
func (p fakePath) ops(r *etcdserverpb.TxnRequest) []*etcdserverpb.RequestOp {
	if p[r] {
		return r.Success
	}
	return r.Failure
}

// compare decides which branches are taken. All compares see the state before the Txn.
func (f *fakeEtcd) compare(r *etcdserverpb.TxnRequest, taken fakePath) {
	taken[r] = !slices.ContainsFunc(r.Compare, func(c *etcdserverpb.Compare) bool { return !f.holds(c) })
	for _, op := range taken.ops(r) {
		if nested := op.GetRequestTxn(); nested != nil {
			f.compare(nested, taken)
		}
	}
}

// holds reports whether a compare succeeds. All that the store makes are for equality.
func (f *fakeEtcd) holds(c *etcdserverpb.Compare) bool {
	kv := f.at(string(c.Key), f.revision)
	switch c.Target {
	case etcdserverpb.Compare_MOD:
		return kv.GetModRevision() == c.GetModRevision()
	case etcdserverpb.Compare_CREATE:
		return kv.GetCreateRevision() == c.GetCreateRevision()
	}
	panic("the fake does not know " + c.String())
}

// execute carries out the branches that are taken.
func (f *fakeEtcd) execute(r *etcdserverpb.TxnRequest, taken fakePath) *etcdserverpb.TxnResponse {
	resp := &etcdserverpb.TxnResponse{Header: &etcdserverpb.ResponseHeader{}, Succeeded: taken[r]}
	for _, op := range taken.ops(r) {
		answer := &etcdserverpb.ResponseOp{}
		switch q := op.Request.(type) {
		case *etcdserverpb.RequestOp_RequestRange:
			answer.Response = &etcdserverpb.ResponseOp_ResponseRange{ResponseRange: f.get(q.RequestRange)}
		case *etcdserverpb.RequestOp_RequestPut:
			f.put(q.RequestPut)
			answer.Response = &etcdserverpb.ResponseOp_ResponsePut{ResponsePut: &etcdserverpb.PutResponse{Header: f.header()}}
		case *etcdserverpb.RequestOp_RequestDeleteRange:
			n := f.remove(string(q.RequestDeleteRange.Key), 0)
			answer.Response = &etcdserverpb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: &etcdserverpb.DeleteRangeResponse{Header: f.header(), Deleted: n}}
		case *etcdserverpb.RequestOp_RequestTxn:
			answer.Response = &etcdserverpb.ResponseOp_ResponseTxn{ResponseTxn: f.execute(q.RequestTxn, taken)}
		}
		resp.Responses = append(resp.Responses, answer)
	}
	return resp
}

// The checks of the server, each with its own error.

// checkTxn checks the branches that are taken, before their first effect.
func (f *fakeEtcd) checkTxn(r *etcdserverpb.TxnRequest, taken fakePath) error {
	for _, op := range taken.ops(r) {
		var err error
		switch q := op.Request.(type) {
		case *etcdserverpb.RequestOp_RequestRange:
			err = f.checkRange(q.RequestRange)
		case *etcdserverpb.RequestOp_RequestPut:
			err = f.checkPut(q.RequestPut)
		case *etcdserverpb.RequestOp_RequestTxn:
			err = f.checkTxn(q.RequestTxn, taken)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *fakeEtcd) checkRange(r *etcdserverpb.RangeRequest) error {
	switch {
	case r.Revision > f.revision:
		return rpctypes.ErrGRPCFutureRev
	case r.Revision != 0 && r.Revision < f.compacted:
		return rpctypes.ErrGRPCCompacted
	}
	return nil
}

func (f *fakeEtcd) checkPut(r *etcdserverpb.PutRequest) error {
	_, exists := f.leases[clientv3.LeaseID(r.Lease)]
	switch {
	case r.IgnoreLease && r.Lease != 0:
		return rpctypes.ErrGRPCLeaseProvided
	case r.Lease != 0 && !exists:
		return rpctypes.ErrGRPCLeaseNotFound
	case r.IgnoreLease && f.at(string(r.Key), f.revision) == nil:
		return rpctypes.ErrGRPCKeyNotFound
	}
	return nil
}

// checkSize checks the size of a request that is proposed to Raft.
func (f *fakeEtcd) checkSize(m proto.Message) error {
	if proto.Size(m) > f.maxBytes {
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return nil
}

func (f *fakeEtcd) permit(key string) error {
	if f.denied[key] {
		return rpctypes.ErrGRPCPermissionDenied
	}
	return nil
}

// permitTxn checks both branches.
func (f *fakeEtcd) permitTxn(r *etcdserverpb.TxnRequest) error {
	for _, c := range r.Compare {
		if err := f.permit(string(c.Key)); err != nil {
			return err
		}
	}
	for _, op := range slices.Concat(r.Success, r.Failure) {
		var err error
		if nested := op.GetRequestTxn(); nested != nil {
			err = f.permitTxn(nested)
		} else {
			err = f.permit(fakeKey(op))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fakeKey returns the key of an operation, "" for a Txn.
func fakeKey(op *etcdserverpb.RequestOp) string {
	return string(slices.Concat(op.GetRequestRange().GetKey(), op.GetRequestPut().GetKey(), op.GetRequestDeleteRange().GetKey()))
}

// fakeCount checks how many operations a Txn has: those of its longest list, and of the longest one in that.
func fakeCount(r *etcdserverpb.TxnRequest, most int) error {
	most -= max(len(r.Compare), len(r.Success), len(r.Failure))
	if most < 0 {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, op := range slices.Concat(r.Success, r.Failure) {
		if nested := op.GetRequestTxn(); nested != nil {
			if err := fakeCount(nested, most); err != nil {
				return err
			}
		}
	}
	return nil
}

// fakeWrites returns the keys that a list of operations may put and delete, and an error where it may put one twice, or
// put one that it may delete.
func fakeWrites(ops []*etcdserverpb.RequestOp) (puts, deletes map[string]bool, err error) {
	puts, deletes = make(map[string]bool), make(map[string]bool)
	put := func(key string) {
		if puts[key] || deletes[key] {
			err = rpctypes.ErrGRPCDuplicateKey
		}
		puts[key] = true
	}
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			deletes[string(d.Key)] = true
		}
	}
	for _, op := range ops {
		nested := op.GetRequestTxn()
		if nested == nil {
			continue
		}
		putsThen, deletesThen, errThen := fakeWrites(nested.Success)
		putsElse, deletesElse, errElse := fakeWrites(nested.Failure)
		if err := cmp.Or(errThen, errElse); err != nil {
			return nil, nil, err
		}
		maps.Copy(putsThen, putsElse) // one of the branches is taken
		for key := range putsThen {
			put(key)
		}
		maps.Copy(deletes, deletesThen)
		maps.Copy(deletes, deletesElse)
	}
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			put(string(p.Key))
		}
	}
	return puts, deletes, err
}

// fakePair is a fake and a real etcd, which get the same requests.
type fakePair struct {
	fake   *fakeEtcd
	real   *clientv3.Client
	leases [2][]clientv3.LeaseID // the real ids and the fake's
}

// do has both do an operation, and compares what they answer. The operation is made for each, as they name leases
// differently; lease returns the id of the i-th.
func (p *fakePair) do(t *testing.T, name string, op func(lease func(i int) clientv3.LeaseID) clientv3.Op) {
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
func (p *fakePair) lease(side, i int) clientv3.LeaseID {
	if i < len(p.leases[side]) {
		return p.leases[side][i]
	}
	return 123456789
}

// describe returns what matters of an answer.
func (p *fakePair) describe(side int, resp clientv3.OpResponse, err error) string {
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

func (p *fakePair) grant(t *testing.T) {
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
func (p *fakePair) revoke(t *testing.T, i int) {
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

// compact compacts both.
func (p *fakePair) compact(t *testing.T, revision int64) {
	t.Helper()
	if _, err := p.real.Compact(t.Context(), revision); err != nil {
		t.Fatal(err)
	}
	p.fake.compact(revision)
}

// compact forgets what was before a revision.
func (f *fakeEtcd) compact(revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.compacted = revision
}

// rev returns the revision.
func (f *fakeEtcd) rev() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revision
}

// The fake answers as etcd does: first to what tests rest on, then to all kinds of operations at random.
func TestFake_IsLikeEtcd(t *testing.T) {
	const maxOps = 24
	c := etcdtest.New(t, etcdtest.Config{MaxTxnOps: maxOps})
	p := &fakePair{fake: newFakeEtcd(), real: c.Client(t)}
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
	for rev := range p.fake.rev() + 2 {
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
func randomOp(rng *rand.Rand, f *fakeEtcd, lease func(i int) clientv3.LeaseID, depth int) clientv3.Op {
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
			clientv3.Compare(clientv3.ModRevision(key()), "=", rng.Int64N(9)),
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
	f := newFakeEtcd()
	lost := errors.New("lost")
	var late func() error
	put := func(hook func(r *fakeRequest) error) (string, error) {
		f.intercept(hook)
		_, err := f.Do(t.Context(), clientv3.OpPut("a", fmt.Sprint(f.rev())))
		f.intercept(nil)
		resp, _ := f.Get(t.Context(), "a")
		if len(resp.Kvs) == 0 {
			return "", err
		}
		return string(resp.Kvs[0].Value), err
	}
	for _, step := range []struct {
		hook func(r *fakeRequest) error
		want string
		err  error
	}{
		{func(r *fakeRequest) error { late = r.apply; return lost }, "", lost},
		{func(r *fakeRequest) error { return errors.Join(r.apply(), lost) }, "1", lost},
		{func(r *fakeRequest) error { return r.apply() }, "2", nil},
		{func(*fakeRequest) error { _ = late(); return lost }, "1", lost},
	} {
		if got, err := put(step.hook); got != step.want || errors.Is(err, lost) != (step.err != nil) {
			t.Errorf("%q, %v, want %q, %v", got, err, step.want, step.err)
		}
	}
}

// AuthStatus implements etcd: authentication is off.
func (f *fakeEtcd) AuthStatus(context.Context) (*clientv3.AuthStatusResponse, error) {
	return &clientv3.AuthStatusResponse{}, nil
}
