// Package etcd is etcd as the store sees it: what it needs of a client, what the answers have told,
// what errors mean, and when a request is sent again.
package etcd

import (
	"context"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// AttemptTimeout bounds one request to etcd. It is far below the server's own time-out, so that the
// client hardly ever resends a write behind our back because the server gave up on it
// (client/v3/retry_interceptor.go), and so that the next attempt reaches another member soon after
// a leader is lost. It doubles, up to twice, when attempts keep running out of time.
const AttemptTimeout = 500 * time.Millisecond

// API is what the store needs of a *clientv3.Client. Tests put a fake in its place.
type API interface {
	Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error)
	Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error)
	Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error)
	TimeToLive(ctx context.Context, id clientv3.LeaseID, opts ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error)
	AuthStatus(ctx context.Context) (*clientv3.AuthStatusResponse, error)
}

// MaxBatchKeys is how many sessions a batch takes. etcd allows 128 operations in a Txn: the outer
// list plus the longest inner one (server/etcdserver/api/v3rpc/key.go), and ours have at most two
// inside.
const MaxBatchKeys = 120

// Client is etcd, and what its answers have told about it.
type Client struct {
	API
	revision atomic.Int64 // the latest that it is known to have had
	made     time.Time
	answered atomic.Int64 // when an answer said so last, as a time since made: the wall clock may be set back; 0: never
	halvings atomic.Int32 // of MaxBatchKeys, because its limit on operations is set lower
}

// NewClient returns a client of what api reaches.
func NewClient(api API) *Client { return &Client{API: api, made: time.Now()} }

// Latest returns the latest revision that etcd is known to have had.
func (c *Client) Latest() int64 { return c.revision.Load() }

// BatchKeys is how many sessions a batch takes.
func (c *Client) BatchKeys() int { return max(MaxBatchKeys>>c.halvings.Load(), 1) }

// Send sends op and notes the revision of the answer.
func (c *Client) Send(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	halvings := c.halvings.Load()
	resp, err := c.Do(ctx, op)
	if err != nil {
		err = clientv3.ContextError(ctx, err)
		if Classify(err) == TooManyOps && isBatch(op) && c.BatchKeys() > 1 {
			c.halvings.CompareAndSwap(halvings, halvings+1) // once for all that were under way
		}
		return resp, err
	}
	switch {
	case resp.Txn() != nil:
		c.Saw(resp.Txn().Header)
	case resp.Get() != nil:
		c.Saw(resp.Get().Header)
	case resp.Put() != nil:
		c.Saw(resp.Put().Header)
	case resp.Del() != nil:
		c.Saw(resp.Del().Header)
	}
	return resp, nil
}

// isBatch reports whether a request is for several keys. One that is too much by itself says
// nothing about batches.
func isBatch(op clientv3.Op) bool {
	cmps, then, _ := op.Txn()
	return len(cmps) == 0 && len(then) > 1
}

// Saw notes the revision of an answer.
func (c *Client) Saw(h *etcdserverpb.ResponseHeader) {
	c.answered.Store(max(int64(time.Since(c.made)), 1))
	for {
		known := c.revision.Load()
		if h.GetRevision() <= known || c.revision.CompareAndSwap(known, h.GetRevision()) {
			return
		}
	}
}

// Stale reports whether revision is not that of the last second. Whoever is about to write then
// reads first: what became of a write that fails its compare is told by the history since the
// revision before it, which must not be long, nor compacted.
func (c *Client) Stale() bool {
	heard := time.Duration(c.answered.Load())
	return heard == 0 || time.Since(c.made)-heard > time.Second
}
