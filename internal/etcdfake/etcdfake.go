// Package etcdfake is an etcd in memory, for tests that decide what becomes of each request.
package etcdfake

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/seed210be38d/etcdstore/internal/etcd"
)

// Etcd is an etcd in memory, for tests that decide what becomes of each request. It keeps all history, and knows
// what the store uses: transactions within transactions, reads of the past, leases, and the limits of a server. The
// client's own code makes the requests. TestFake_IsLikeEtcd holds it to the real thing.
//
// Time does not pass in it: a lease ends when it is revoked.
type Etcd struct {
	clientv3.KV

	mu       sync.Mutex
	held     []*hold
	hook     func(r *Request) error
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

var _ etcd.API = (*Etcd)(nil)

// New returns an etcd that holds nothing.
func New() *Etcd {
	f := &Etcd{
		maxOps:   128,
		maxBytes: 1.5 * 1024 * 1024,
		denied:   make(map[string]bool),
		revision: 1,
		history:  make(map[string][]*mvccpb.KeyValue),
		leases:   make(map[clientv3.LeaseID]int64),
	}
	f.KV = clientv3.NewKVFromKVClient(server{f: f}, nil)
	return f
}

// Request is a request on its way. A hook calls apply to let etcd have it, and returns the error that the caller
// gets in place of etcd's answer. It may also hold the request, or call apply later or more than once, as a network may
// deliver a request.
type Request struct {
	Done  <-chan struct{} // of the caller's context
	Msg   any             // *etcdserverpb.TxnRequest, and so on
	Apply func() error    // returns the error that etcd answers
}

// Txn returns the request if it is a Txn, else nil.
func (r *Request) Txn() *etcdserverpb.TxnRequest {
	txn, _ := r.Msg.(*etcdserverpb.TxnRequest)
	return txn
}

// Wait waits until c is closed, as long as the request's caller does.
func (r *Request) Wait(c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-r.Done:
		return status.FromContextError(context.Canceled).Err()
	}
}

// hold holds requests until its gate is closed.
type hold struct {
	match func(r *Request) bool
	gate  chan struct{}
}

// Hold holds the requests that match before etcd, or a hook, gets them, until release is called in a synctest bubble.
func (f *Etcd) Hold(match func(r *Request) bool) (release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	h := &hold{match, make(chan struct{})}
	f.held = append(f.held, h)
	return func() {
		f.mu.Lock()
		f.held = slices.DeleteFunc(slices.Clone(f.held), func(o *hold) bool { return o == h })
		f.mu.Unlock()
		close(h.gate)
		synctest.Wait()
	}
}

// LetPass makes a call that nothing holds.
func (f *Etcd) LetPass(t *testing.T, call func() error) {
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

// Script has the requests that match meet their fates one after the other. The rest pass.
func (f *Etcd) Script(match func(r *Request) bool, fates ...func(r *Request) error) {
	var next atomic.Int32
	f.Intercept(func(r *Request) error {
		if match(r) {
			if i := int(next.Add(1)) - 1; i < len(fates) {
				return fates[i](r)
			}
		}
		return r.Apply()
	})
}

// ErrLost is what a caller gets whose connection ends.
var ErrLost = status.Error(codes.Unavailable, "error reading from server: EOF")

// What can become of a request.

// Pass lets a request through.
func Pass(r *Request) error { return r.Apply() }

// Drop loses a request on its way.
func Drop(*Request) error { return ErrLost }

// Lose loses the answer to a request that was applied.
func Lose(r *Request) error { _ = r.Apply(); return ErrLost }

// Answer returns what answers an error to a request, and applies nothing.
func Answer(err error) func(*Request) error {
	return func(*Request) error { return err }
}

// Intercept has all requests from now on pass through hook.
func (f *Etcd) Intercept(hook func(r *Request) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

// Sent returns the requests of a type that came since the last call, and forgets the others.
func Sent[Q any](f *Etcd) (sent []Q) {
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

// serve carries one request from its caller to etcd and back.
func serve[R any](ctx context.Context, f *Etcd, msg any, handle func() (R, error)) (R, error) {
	var none, resp R
	if ctx.Err() != nil {
		return none, status.FromContextError(ctx.Err()).Err()
	}
	r := &Request{Done: ctx.Done(), Msg: msg, Apply: func() (err error) {
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
			if err := r.Wait(h.gate); err != nil {
				return none, err
			}
		}
	}
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		hook = Pass
	}
	if err := hook(r); err != nil {
		return none, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return resp, nil
}

// server is the server's side of a Etcd's KV.
type server struct {
	etcdserverpb.KVClient // what the store does not call
	f                     *Etcd
}

func (kv server) Range(ctx context.Context, r *etcdserverpb.RangeRequest, _ ...grpc.CallOption) (*etcdserverpb.RangeResponse, error) {
	return serve(ctx, kv.f, r, func() (*etcdserverpb.RangeResponse, error) {
		if err := cmp.Or(kv.f.permit(string(r.Key)), kv.f.checkRange(r)); err != nil {
			return nil, err
		}
		return kv.f.get(r), nil
	})
}

func (kv server) Put(ctx context.Context, r *etcdserverpb.PutRequest, _ ...grpc.CallOption) (*etcdserverpb.PutResponse, error) {
	return serve(ctx, kv.f, r, func() (*etcdserverpb.PutResponse, error) {
		if err := cmp.Or(kv.f.checkSize(r), kv.f.permit(string(r.Key)), kv.f.checkPut(r)); err != nil {
			return nil, err
		}
		kv.f.put(r)
		return &etcdserverpb.PutResponse{Header: kv.f.header()}, nil
	})
}

func (kv server) DeleteRange(ctx context.Context, r *etcdserverpb.DeleteRangeRequest, _ ...grpc.CallOption) (*etcdserverpb.DeleteRangeResponse, error) {
	return serve(ctx, kv.f, r, func() (*etcdserverpb.DeleteRangeResponse, error) {
		if err := kv.f.permit(string(r.Key)); err != nil {
			return nil, err
		}
		n := kv.f.remove(string(r.Key), 0)
		return &etcdserverpb.DeleteRangeResponse{Header: kv.f.header(), Deleted: n}, nil
	})
}

func (kv server) Txn(ctx context.Context, r *etcdserverpb.TxnRequest, _ ...grpc.CallOption) (*etcdserverpb.TxnResponse, error) {
	return serve(ctx, kv.f, r, func() (*etcdserverpb.TxnResponse, error) {
		_, _, errThen := writes(r.Success)
		_, _, errElse := writes(r.Failure)
		if err := cmp.Or(count(r, kv.f.maxOps), errThen, errElse, kv.f.checkSize(r), kv.f.permitTxn(r)); err != nil {
			return nil, err
		}
		taken := make(path)
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
func (f *Etcd) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	resp, err := serve(ctx, f, &etcdserverpb.LeaseGrantRequest{TTL: ttl}, func() (*clientv3.LeaseGrantResponse, error) {
		f.granted++
		f.leases[f.granted] = ttl
		return &clientv3.LeaseGrantResponse{ResponseHeader: f.header(), ID: f.granted, TTL: ttl}, nil
	})
	return resp, clientv3.ContextError(ctx, err)
}

// Revoke ends a lease, and its keys with it.
func (f *Etcd) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	resp, err := serve(ctx, f, &etcdserverpb.LeaseRevokeRequest{ID: int64(id)}, func() (*clientv3.LeaseRevokeResponse, error) {
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
func (f *Etcd) TimeToLive(ctx context.Context, id clientv3.LeaseID, _ ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error) {
	resp, err := serve(ctx, f, &etcdserverpb.LeaseTimeToLiveRequest{ID: int64(id)}, func() (*clientv3.LeaseTimeToLiveResponse, error) {
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

func (f *Etcd) header() *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{Revision: f.revision}
}

// at returns what a key held at a revision, nil for nothing.
func (f *Etcd) at(key string, revision int64) *mvccpb.KeyValue {
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
func (f *Etcd) attached(id clientv3.LeaseID) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(f.history)), func(key string) bool {
		kv := f.at(key, f.revision)
		return kv == nil || kv.Lease != int64(id)
	})
}

// write adds a version to a key's history. All writes of a request have one revision.
func (f *Etcd) write(kv *mvccpb.KeyValue) {
	f.revision = f.before + 1
	kv.ModRevision = f.revision
	f.history[string(kv.Key)] = append(f.history[string(kv.Key)], kv)
}

func (f *Etcd) put(r *etcdserverpb.PutRequest) {
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
func (f *Etcd) remove(key string, revoked clientv3.LeaseID) int64 {
	if f.at(key, f.revision) == nil {
		return 0
	}
	f.write(&mvccpb.KeyValue{Key: []byte(key), Lease: int64(revoked)})
	return 1
}

func (f *Etcd) get(r *etcdserverpb.RangeRequest) *etcdserverpb.RangeResponse {
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

// path says of each Txn that is carried out whether its compares succeeded.
type path map[*etcdserverpb.TxnRequest]bool

// ops returns the branch that is taken.
func (p path) ops(r *etcdserverpb.TxnRequest) []*etcdserverpb.RequestOp {
	if p[r] {
		return r.Success
	}
	return r.Failure
}

// compare decides which branches are taken. All compares see the state before the Txn.
func (f *Etcd) compare(r *etcdserverpb.TxnRequest, taken path) {
	taken[r] = !slices.ContainsFunc(r.Compare, func(c *etcdserverpb.Compare) bool { return !f.holds(c) })
	for _, op := range taken.ops(r) {
		if nested := op.GetRequestTxn(); nested != nil {
			f.compare(nested, taken)
		}
	}
}

// holds reports whether a compare succeeds.
func (f *Etcd) holds(c *etcdserverpb.Compare) bool {
	kv := f.at(string(c.Key), f.revision)
	var order int
	switch c.Target {
	case etcdserverpb.Compare_MOD:
		order = cmp.Compare(kv.GetModRevision(), c.GetModRevision())
	case etcdserverpb.Compare_CREATE:
		order = cmp.Compare(kv.GetCreateRevision(), c.GetCreateRevision())
	default:
		panic("the fake does not know " + c.String())
	}
	switch c.Result {
	case etcdserverpb.Compare_GREATER:
		return order > 0
	case etcdserverpb.Compare_LESS:
		return order < 0
	case etcdserverpb.Compare_NOT_EQUAL:
		return order != 0
	default:
		return order == 0
	}
}

// execute carries out the branches that are taken.
func (f *Etcd) execute(r *etcdserverpb.TxnRequest, taken path) *etcdserverpb.TxnResponse {
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
func (f *Etcd) checkTxn(r *etcdserverpb.TxnRequest, taken path) error {
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

func (f *Etcd) checkRange(r *etcdserverpb.RangeRequest) error {
	switch {
	case r.Revision > f.revision:
		return rpctypes.ErrGRPCFutureRev
	case r.Revision != 0 && r.Revision < f.compacted:
		return rpctypes.ErrGRPCCompacted
	}
	return nil
}

func (f *Etcd) checkPut(r *etcdserverpb.PutRequest) error {
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
func (f *Etcd) checkSize(m proto.Message) error {
	if proto.Size(m) > f.maxBytes {
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return nil
}

func (f *Etcd) permit(key string) error {
	if f.denied[key] {
		return rpctypes.ErrGRPCPermissionDenied
	}
	return nil
}

// permitTxn checks both branches.
func (f *Etcd) permitTxn(r *etcdserverpb.TxnRequest) error {
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
			err = f.permit(KeyOf(op))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// KeyOf returns the key of an operation, "" for a Txn.
func KeyOf(op *etcdserverpb.RequestOp) string {
	return string(slices.Concat(op.GetRequestRange().GetKey(), op.GetRequestPut().GetKey(), op.GetRequestDeleteRange().GetKey()))
}

// count checks how many operations a Txn has: those of its longest list, and of the longest one in that.
func count(r *etcdserverpb.TxnRequest, most int) error {
	most -= max(len(r.Compare), len(r.Success), len(r.Failure))
	if most < 0 {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, op := range slices.Concat(r.Success, r.Failure) {
		if nested := op.GetRequestTxn(); nested != nil {
			if err := count(nested, most); err != nil {
				return err
			}
		}
	}
	return nil
}

// writes returns the keys that a list of operations may put and delete, and an error where it may put one twice, or
// put one that it may delete.
func writes(ops []*etcdserverpb.RequestOp) (puts, deletes map[string]bool, err error) {
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
		putsThen, deletesThen, errThen := writes(nested.Success)
		putsElse, deletesElse, errElse := writes(nested.Failure)
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

// Compact forgets what was before a revision.
func (f *Etcd) Compact(revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.compacted = revision
}

// Revision returns the revision.
func (f *Etcd) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.revision
}

// AuthStatus implements etcd: authentication is off.
func (f *Etcd) AuthStatus(context.Context) (*clientv3.AuthStatusResponse, error) {
	return &clientv3.AuthStatusResponse{}, nil
}

// Keys returns the keys that there are, with their mod revisions.
func (f *Etcd) Keys() map[string]int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	keys := make(map[string]int64)
	for key := range f.history {
		if kv := f.at(key, f.revision); kv != nil {
			keys[key] = kv.ModRevision
		}
	}
	return keys
}

// Versions returns all that a key has held, oldest first; a deletion has version 0, and the lease that took the key with it.
func (f *Etcd) Versions(key string) []*mvccpb.KeyValue {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.history[key])
}

// LoseLease forgets a lease, but not yet its keys.
func (f *Etcd) LoseLease(id clientv3.LeaseID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.leases, id)
}

// Deny refuses permission on a key.
func (f *Etcd) Deny(key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.denied[key] = true
}

// LimitTo sets the server's limits on operations and on bytes.
func (f *Etcd) LimitTo(ops, bytes int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.maxOps, f.maxBytes = ops, bytes
}

// At returns what a key held at a revision, nil for nothing.
func (f *Etcd) At(key string, revision int64) *mvccpb.KeyValue {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at(key, revision)
}

// LastLease returns the lease that was granted last.
func (f *Etcd) LastLease() clientv3.LeaseID {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.granted
}
