// Package read reads keys, many in a request.
package read

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/limit"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// Decode reads what a Get of a key answered at revision asOf: no pair, or one.
type Decode func(kvs []*mvccpb.KeyValue, asOf int64) *record.Version

// Reader coalesces reads: the keys that wait go out as one Txn of Gets, and callers that ask for
// the same key share an answer.
//
// Invariants:
//
//   - A Get is sent after all callers that share it have asked, so that each of them gets a
//     linearizable read. Callers that come while it is in flight make the next one.
//   - Nobody waits longer than the own time allows. What callers share ends with the time of the
//     first of them, and those that have more ask again. No caller has a timer of its own, which
//     would cost a good part of a find.
//
// The Txn is flat, since etcd answers that without Raft; it would propose a nested one. A lone key
// is a plain Get, which costs the server less. Both may be sent twice, so errors other than
// definite ones are tried again until the callers' time is up: the client does that for a Get, but
// not for a Txn.
type Reader struct {
	client *etcd.Client
	decode Decode

	mu      sync.Mutex
	waiting map[string]*find
	order   []*find // first come, first served
	limiter limit.Limiter
	finds   sync.WaitGroup
}

// find is a read of one key, and what came of it once done is closed. Before that, err is what etcd
// said last, guarded by Reader.mu.
type find struct {
	key      string
	deadline time.Time // the earliest of its callers
	done     chan struct{}
	version  *record.Version
	err      error
}

// New returns a reader of keys whose values decode reads.
func New(c *etcd.Client, decode Decode) *Reader {
	r := &Reader{client: c, decode: decode, waiting: make(map[string]*find)}
	r.limiter = limit.New(etcd.MaxBatchKeys, r.work)
	return r
}

// Wait waits until nothing is being read.
func (r *Reader) Wait() { r.finds.Wait() }

// Idle reports whether nothing is being read.
func (r *Reader) Idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.waiting) == 0 && len(r.order) == 0 && r.limiter.Idle()
}

// Find returns what etcd holds under key. It ends by the deadline, or when ctx does.
func (r *Reader) Find(ctx context.Context, deadline time.Time, key string) (*record.Version, error) {
	r.mu.Lock()
	f := r.ask(deadline, key)
	r.mu.Unlock()
	return r.await(ctx, deadline, f)
}

// FindAll is Find of several keys, in the same requests. Of each key there is a version or an
// error.
func (r *Reader) FindAll(ctx context.Context, deadline time.Time, keys []string) ([]*record.Version, []error) {
	finds := make([]*find, len(keys))
	r.mu.Lock()
	for i, key := range keys {
		finds[i] = r.ask(deadline, key)
	}
	r.mu.Unlock()
	versions, errs := make([]*record.Version, len(keys)), make([]error, len(keys))
	for i, f := range finds {
		versions[i], errs[i] = r.await(ctx, deadline, f)
	}
	return versions, errs
}

// ask returns the read of a key that goes out next.
//
// REQUIRES: mu is held.
func (r *Reader) ask(deadline time.Time, key string) *find {
	f := r.waiting[key]
	if f == nil {
		f = &find{key: key, deadline: deadline, done: make(chan struct{})}
		r.waiting[key] = f
		r.order = append(r.order, f)
		r.finds.Add(1)
		r.limiter.Offer(len(r.order))
	} else if deadline.Before(f.deadline) {
		f.deadline = deadline
	}
	return f
}

// await returns what came of a find, or of the next where this one has ended with the time of
// another caller.
func (r *Reader) await(ctx context.Context, deadline time.Time, f *find) (*record.Version, error) {
	for {
		select {
		case <-f.done:
		case <-ctx.Done():
			r.mu.Lock()
			defer r.mu.Unlock()
			return nil, etcd.Ended(ctx.Err(), f.err)
		}
		if f.err == nil || !errors.Is(f.err, context.DeadlineExceeded) || !time.Now().Before(deadline) {
			return f.version, f.err
		}
		r.mu.Lock()
		f = r.ask(deadline, f.key)
		r.mu.Unlock()
	}
}

// work carries one batch.
func (r *Reader) work() {
	r.mu.Lock()
	n := min(len(r.order), r.limiter.Took(r.client.BatchKeys()))
	batch := r.order[:n:n]
	r.order = r.order[n:]
	if len(r.order) == 0 {
		r.order = nil
	}
	for _, f := range batch {
		delete(r.waiting, f.key)
	}
	end := r.limiter.Carry(&r.mu, func() int { return len(r.order) })
	r.mu.Unlock()
	r.read(batch)
	end()
}

// read settles a batch. Finds whose time is up are settled without an answer, and do not end the
// others.
func (r *Reader) read(batch []*find) {
	for b := (etcd.Backoff{}); len(batch) > 0; {
		ctx, cancel := context.WithDeadline(context.Background(), earliest(batch))
		versions, err := r.request(ctx, batch, &b)
		cancel()
		switch {
		case err == nil:
			for i, f := range batch {
				f.version = versions[i]
				r.settle(f, nil)
			}
			return
		case errors.Is(err, context.DeadlineExceeded):
			batch = r.late(batch)
		case len(batch) > 1:
			// One key can fail them all: find it by reading each alone.
			for i := range batch {
				r.read(batch[i : i+1])
			}
			return
		default:
			r.settle(batch[0], err)
			return
		}
	}
}

// request asks for a batch until etcd gives a definite answer, or ctx ends.
func (r *Reader) request(ctx context.Context, batch []*find, b *etcd.Backoff) (versions []*record.Version, err error) {
	op := getsOf(batch)
	err = b.Retry(ctx, func(ctx context.Context) error {
		start := time.Now()
		resp, err := r.client.Send(ctx, op)
		r.note(batch, start, err)
		if err != nil {
			return err
		}
		versions = r.versions(batch, resp)
		return nil
	})
	return versions, err
}

// getsOf returns the request for a batch.
func getsOf(batch []*find) clientv3.Op {
	gets := make([]clientv3.Op, len(batch))
	for i, f := range batch {
		gets[i] = clientv3.OpGet(f.key)
	}
	if len(gets) == 1 {
		return gets[0]
	}
	return clientv3.OpTxn(nil, gets, nil)
}

// versions reads the answer to getsOf(batch).
func (r *Reader) versions(batch []*find, resp clientv3.OpResponse) []*record.Version {
	if get := resp.Get(); get != nil {
		return []*record.Version{r.decode(get.Kvs, get.Header.Revision)}
	}
	txn := resp.Txn()
	versions := make([]*record.Version, len(batch))
	for i := range batch {
		versions[i] = r.decode(txn.Responses[i].GetResponseRange().Kvs, txn.Header.Revision)
	}
	return versions
}

// earliest returns when the time of the first of a batch is up.
func earliest(batch []*find) time.Time {
	first := batch[0].deadline
	for _, f := range batch[1:] {
		if f.deadline.Before(first) {
			first = f.deadline
		}
	}
	return first
}

// late settles the finds whose time is up, and returns the others.
func (r *Reader) late(batch []*find) []*find {
	now := time.Now()
	var inTime []*find
	for _, f := range batch {
		if f.deadline.After(now) {
			inTime = append(inTime, f)
		} else {
			r.settle(f, etcd.Ended(context.DeadlineExceeded, f.err))
		}
	}
	return inTime
}

// note notes what etcd answered to a batch that was sent at start.
func (r *Reader) note(batch []*find, start time.Time, err error) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err == nil {
		r.limiter.Observe(now.Sub(start), now)
		return
	}
	for _, f := range batch {
		f.err = err
	}
}

func (r *Reader) settle(f *find, err error) {
	r.mu.Lock()
	f.err = err
	r.mu.Unlock()
	close(f.done)
	r.finds.Done()
}
