package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/record"
	"github.com/seed210be38d/etcdstore/internal/session"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// yes is an etcd that does nothing and says that every Txn succeeded.
type yes struct{ revision atomic.Int64 }

// header is that of an answer, each at a revision of its own.
func (y *yes) header() *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{Revision: y.revision.Add(1)}
}

func (y *yes) Do(_ context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	header := y.header()
	switch { // other than a Txn: of a lease's key
	case op.IsPut():
		return (&clientv3.PutResponse{Header: header}).OpResponse(), nil
	case op.IsDelete():
		return (&clientv3.DeleteResponse{Header: header}).OpResponse(), nil
	}
	_, then, _ := op.Txn()
	responses := make([]*etcdserverpb.ResponseOp, len(then))
	for i, nested := range then {
		responses[i] = &etcdserverpb.ResponseOp{}
		if nested.IsTxn() {
			responses[i].Response = &etcdserverpb.ResponseOp_ResponseTxn{ResponseTxn: &etcdserverpb.TxnResponse{Succeeded: true}}
		}
	}
	return (&clientv3.TxnResponse{Header: header, Succeeded: true, Responses: responses}).OpResponse(), nil
}

func (y *yes) Grant(context.Context, int64) (*clientv3.LeaseGrantResponse, error) {
	header := y.header()
	return &clientv3.LeaseGrantResponse{ID: clientv3.LeaseID(header.Revision), ResponseHeader: header}, nil
}

func (y *yes) Revoke(context.Context, clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	return &clientv3.LeaseRevokeResponse{Header: y.header()}, nil
}

func (y *yes) TimeToLive(context.Context, clientv3.LeaseID, ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error) {
	return &clientv3.LeaseTimeToLiveResponse{ResponseHeader: y.header()}, nil
}

func (*yes) AuthStatus(context.Context) (*clientv3.AuthStatusResponse, error) {
	return &clientv3.AuthStatusResponse{}, nil
}

// What the queue costs by itself: without etcd, without the network, and with commits that overwrite.
func BenchmarkPipeline_Do(b *testing.B) {
	for _, callers := range []int{1, 64} {
		for _, sessions := range []int{1, 64} {
			b.Run(fmt.Sprintf("callers=%d/sessions=%d", callers, sessions), func(b *testing.B) {
				store := newStore(&yes{}, nil, defaultPrefix, nil)
				defer func() { _ = store.Close() }()
				ctx, cancel := context.WithTimeout(b.Context(), time.Hour)
				defer cancel()
				payload := gobSession(b, time.Now().Add(time.Hour), map[string]any{"user": "alice", "cart": "some text", "n": 1})
				ours := session.NewImage(store.codec, payload, record.ToMillis(time.Now().Add(time.Hour)))
				var next atomic.Int64
				b.ReportAllocs()
				b.ResetTimer()
				err := inParallel(callers, b.N, func() error {
					key := fmt.Sprint(defaultPrefix, next.Add(1)%int64(sessions))
					_, err := store.pipeline.Do(ctx, time.Now().Add(time.Minute), commit.Call{Key: key, Change: &session.Commit{Ours: ours}})
					return err
				})
				if err != nil {
					b.Fatal(err)
				}
			})
		}
	}
}

// inParallel calls f n times, from as many goroutines as there are callers, each until its first error.
func inParallel(callers, n int, f func() error) error {
	errs := make(chan error, callers)
	var left atomic.Int64
	left.Store(int64(n))
	for range callers {
		go func() {
			for left.Add(-1) >= 0 {
				if err := f(); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var all []error
	for range callers {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}
