package etcdstore

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// attemptTimeout bounds one request to etcd. It is far below the server's own time-out, so that the client
// hardly ever resends a write behind our back because the server gave up on it (client/v3/retry_interceptor.go), and so
// that the next attempt reaches another member soon after a leader is lost. It doubles, up to twice, when attempts
// keep running out of time.
const attemptTimeout = 500 * time.Millisecond

// etcd is what the store needs of a *clientv3.Client. Tests put a fake in its place.
type etcd interface {
	Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error)
	Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error)
	Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error)
	TimeToLive(ctx context.Context, id clientv3.LeaseID, opts ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error)
	AuthStatus(ctx context.Context) (*clientv3.AuthStatusResponse, error)
}

// maxBatchKeys is how many sessions a batch takes. etcd allows 128 operations in a Txn: the outer list plus the
// longest inner one (server/etcdserver/api/v3rpc/key.go), and ours have at most two inside.
const maxBatchKeys = 120

// conn is etcd, and what its answers have told about it.
type conn struct {
	etcd
	revision atomic.Int64 // the latest that it is known to have had
	made     time.Time
	heard    atomic.Int64 // when an answer said so last, as a time since made: the wall clock may be set back; 0: never
	halvings atomic.Int32 // of maxBatchKeys, because its limit on operations is set lower
}

// batchKeys is how many sessions a batch takes.
func (c *conn) batchKeys() int { return max(maxBatchKeys>>c.halvings.Load(), 1) }

// do sends op and notes the revision of the answer.
func (c *conn) do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	halvings := c.halvings.Load()
	resp, err := c.Do(ctx, op)
	if err != nil {
		err = clientv3.ContextError(ctx, err)
		if classify(err) == classTooManyOps && c.batchKeys() > 1 {
			c.halvings.CompareAndSwap(halvings, halvings+1) // once for all that were under way
		}
		return resp, err
	}
	switch {
	case resp.Txn() != nil:
		c.saw(resp.Txn().Header)
	case resp.Get() != nil:
		c.saw(resp.Get().Header)
	case resp.Put() != nil:
		c.saw(resp.Put().Header)
	case resp.Del() != nil:
		c.saw(resp.Del().Header)
	}
	return resp, nil
}

func (c *conn) saw(h *etcdserverpb.ResponseHeader) {
	c.heard.Store(max(int64(time.Since(c.made)), 1))
	for {
		known := c.revision.Load()
		if h.GetRevision() <= known || c.revision.CompareAndSwap(known, h.GetRevision()) {
			return
		}
	}
}

// stale reports whether revision is not that of the last second. Whoever is about to write then reads first: what became of
// a write that fails its compare is told by the history since the revision before it, which must not be long, nor compacted.
func (c *conn) stale() bool {
	heard := time.Duration(c.heard.Load())
	return heard == 0 || time.Since(c.made)-heard > time.Second
}

// retry calls try until it gives a definite answer or ctx ends, each time with a bounded context. It is for
// requests that may be sent twice. The error is etcd's, or that of ctx with what etcd said last.
func retry(ctx context.Context, try func(ctx context.Context) error) error {
	var last error
	for b := (backoff{}); ; {
		attempt, cancel := context.WithTimeout(ctx, b.timeout())
		err := try(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return endedError(context.Cause(ctx), last)
		}
		if k := classify(err); k != classUnknown && k != classTransient {
			return err
		}
		last = err
		if !b.wait(ctx) {
			return endedError(context.Cause(ctx), last)
		}
	}
}

// backoff spaces attempts: 10 ms, doubling up to 320 ms, half of it random.
type backoff struct{ attempts int }

// timeout bounds the attempt that comes next.
func (b *backoff) timeout() time.Duration { return attemptTimeout << min(b.attempts/3, 2) }

// wait waits until the next attempt is due. It reports false when ctx ended before.
func (b *backoff) wait(ctx context.Context) bool {
	d := 10 * time.Millisecond << min(b.attempts, 5)
	b.attempts++
	t := time.NewTimer(d/2 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
