package etcdstore

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/limit"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// reader coalesces reads of sessions: the keys that wait go out as one Txn of Gets, and callers that ask for the
// same key share an answer.
//
// Invariant: a Get is sent after all callers that share it have asked, so that each of them gets a linearizable
// read. Callers that come while it is in flight make the next one.
//
// The Txn is flat, since etcd answers that without Raft; it would propose a nested one. A lone key is a plain Get, which
// costs the server less. Both may be sent twice, so errors other than definite ones are tried again until the callers'
// time is up: the client does that for a Get, but not for a Txn.
type reader struct {
	conn   *etcd.Client
	decode func(kvs []*mvccpb.KeyValue, asOf int64) *version

	mu      sync.Mutex
	waiting map[string]*find
	order   []*find // first come, first served
	lane    limit.Limiter
	busy    sync.WaitGroup
}

// find is a read of one key, and what came of it once done is closed. Before that, err is what etcd said last,
// guarded by reader.mu.
type find struct {
	key      string
	deadline time.Time // the latest of its callers
	done     chan struct{}
	version  *version
	err      error
}

func newReader(c *etcd.Client, decode func([]*mvccpb.KeyValue, int64) *version) *reader {
	r := &reader{conn: c, decode: decode, waiting: make(map[string]*find)}
	r.lane = limit.New(etcd.MaxBatchKeys, r.work)
	return r
}

// find returns what etcd holds under key. It ends by the deadline, or when ctx does.
func (r *reader) find(ctx context.Context, deadline time.Time, key string) (*version, error) {
	r.mu.Lock()
	f := r.waiting[key]
	if f == nil {
		f = &find{key: key, deadline: deadline, done: make(chan struct{})}
		r.waiting[key] = f
		r.order = append(r.order, f)
		r.busy.Add(1)
		r.lane.Offer(len(r.order))
	} else if deadline.After(f.deadline) {
		f.deadline = deadline
	}
	r.mu.Unlock()
	select {
	case <-f.done:
		return f.version, f.err
	case <-ctx.Done():
		r.mu.Lock()
		defer r.mu.Unlock()
		return nil, etcd.Ended(ctx.Err(), f.err)
	}
}

// work carries one batch.
func (r *reader) work() {
	r.mu.Lock()
	n := min(len(r.order), r.lane.Took(r.conn.BatchKeys()))
	batch := r.order[:n:n]
	r.order = r.order[n:]
	if len(r.order) == 0 {
		r.order = nil
	}
	for _, f := range batch {
		delete(r.waiting, f.key)
	}
	end := r.lane.Carry(&r.mu, func() int { return len(r.order) })
	r.mu.Unlock()
	if n > 0 {
		r.read(batch)
	}
	end()
}

// read settles a batch.
func (r *reader) read(batch []*find) {
	gets := make([]clientv3.Op, len(batch))
	deadline := batch[0].deadline
	for i, f := range batch {
		gets[i] = clientv3.OpGet(f.key)
		if f.deadline.After(deadline) {
			deadline = f.deadline
		}
	}
	request := gets[0]
	if len(batch) > 1 {
		request = clientv3.OpTxn(nil, gets, nil)
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	var resp clientv3.OpResponse
	err := etcd.Retry(ctx, func(ctx context.Context) (err error) {
		start := time.Now()
		resp, err = r.conn.Send(ctx, request)
		r.heard(batch, start, err)
		return err
	})
	switch {
	case err == nil && len(batch) == 1:
		batch[0].version = r.decode(resp.Get().Kvs, resp.Get().Header.Revision)
		r.settle(batch[0], nil)
	case err == nil:
		for i, f := range batch {
			f.version = r.decode(resp.Txn().Responses[i].GetResponseRange().Kvs, resp.Txn().Header.Revision)
			r.settle(f, nil)
		}
	case len(batch) > 1 && ctx.Err() == nil:
		// One key can fail them all: find it by reading each alone.
		for i := range batch {
			r.read(batch[i : i+1])
		}
	default:
		for _, f := range batch {
			r.settle(f, err)
		}
	}
}

// heard notes what etcd answered to a batch that was sent at start.
func (r *reader) heard(batch []*find, start time.Time, err error) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.lane.Observe(now.Sub(start), now)
		return
	}
	for _, f := range batch {
		f.err = err
	}
}

func (r *reader) settle(f *find, err error) {
	r.mu.Lock()
	f.err = err
	r.mu.Unlock()
	close(f.done)
	r.busy.Done()
}
