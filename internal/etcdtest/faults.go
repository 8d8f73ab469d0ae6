package etcdtest

import (
	"context"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Faults decides the fate of a client's unary calls. Streams, that is watches and
// keep-alives, pass by it. The zero value passes everything through. It is safe
// for concurrent use, and several clients may share one.
type Faults struct {
	mu    sync.Mutex
	fn    func(method string, req any) Fate
	calls map[string]int
}

// Fate is what happens to one call. The zero value passes it through.
type Fate struct {
	// Before runs first, in the caller's goroutine: it may block to hold the call.
	Before func()
	// Delay passes before the call is made. It ends early, and the call is not made,
	// when the call's context ends.
	Delay time.Duration
	// Drop leaves the call out: the server never sees it. The caller gets Err, or
	// Unavailable where that is nil.
	Drop bool
	// Err is returned in place of the server's answer, after the call was made. The
	// etcd client takes it for an answer of the server only if it is one of gRPC's
	// status errors, such as rpctypes.ErrGRPCTimeout.
	Err error
}

// WithFaults makes f decide the fate of the client's calls.
//
// f sits between the client's own retries and the network: clientv3 installs its
// retrying interceptor with grpc.WithUnaryInterceptor, which gRPC runs before all
// chained ones. So f sees, and counts, every attempt of a call, and what it
// returns is subject to the client's retries. A call that was made and then got
// codes.DeadlineExceeded from f, for instance, is sent again by the client while
// the caller's context lives, also where it is a write that was applied.
func WithFaults(f *Faults) ClientOption {
	return func(cfg *clientv3.Config) {
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithChainUnaryInterceptor(f.unary))
	}
}

// Intercept makes fn decide from now on; nil lets all calls pass. fn gets the full
// name of the method, such as "/etcdserverpb.KV/Txn", and the request, such as
// *etcdserverpb.TxnRequest. It may be called from several goroutines at once.
func (f *Faults) Intercept(fn func(method string, req any) Fate) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fn = fn
}

// Calls returns how many attempts to call method there were since the last Reset,
// dropped ones included.
func (f *Faults) Calls(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// Reset sets all counts to zero.
func (f *Faults) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	clear(f.calls)
}

// unary is the grpc.UnaryClientInterceptor.
func (f *Faults) unary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	fate := f.fate(method, req)
	if fate.Before != nil {
		fate.Before()
	}
	if fate.Delay > 0 {
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-time.After(fate.Delay):
		}
	}
	if fate.Drop {
		if fate.Err == nil {
			return status.Error(codes.Unavailable, "etcdtest: dropped")
		}
		return fate.Err
	}
	err := invoke(ctx, method, req, reply, conn, opts...)
	if fate.Err != nil {
		return fate.Err
	}
	return err
}

// fate counts a call and decides on it. The deciding function runs outside the
// lock, since it may block or use f.
func (f *Faults) fate(method string, req any) Fate {
	f.mu.Lock()
	if f.calls == nil {
		f.calls = make(map[string]int)
	}
	f.calls[method]++
	fn := f.fn
	f.mu.Unlock()

	if fn == nil {
		return Fate{}
	}
	return fn(method, req)
}
