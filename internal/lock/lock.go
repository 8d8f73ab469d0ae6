// Package lock is the lock of a session over all machines, and a mutex for each key within one
// process.
package lock

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcd"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const (
	// lockTTL is how long, in seconds, the locks of a process outlive it when it dies.
	lockTTL = 15
	// lockIdle is how long the process keeps its lease for locks after the last was released.
	lockIdle = 10 * time.Second
	// lockPause is how long no lease for locks is asked for after that has failed.
	lockPause = 500 * time.Millisecond
)

// Locks are locks over all machines: a concurrency.Mutex for each session, over all machines.
//
// All mutexes of a process hang on one lease, a concurrency.Session, that is kept alive while locks
// are in use and a little longer. Such a mutex is the process's and not the goroutine's, so
// goroutines first take turns.
//
// A request to etcd whose outcome is unknown may be applied late: it would put the key of a lock
// that was released already, or delete that of one that was taken again. Keys carry the lease's id.
// So a lease with such a request is retired: no more locks are hung on it, and when the last of
// those on it is released, it is revoked, and with it goes whatever key was left behind.
type Locks struct {
	client  *clientv3.Client
	prefix  string
	timeout time.Duration
	detach  func(func())
	turns   Keyed

	mu      sync.Mutex
	lease   *lockLease // the one for new locks; nil: none
	idle    *time.Timer
	grant   chan struct{} // closed when the grant that is under way has ended; nil: none is
	failed  time.Time     // when a grant failed last
	failure error
}

// lockLease is a lease that locks hang on. It is kept alive until it ends.
type lockLease struct {
	session *concurrency.Session
	end     context.CancelFunc // of the session's context
	users   int                // locks, and waits for them; guarded by locks.mu
}

// Lock is a lock that is held.
type Lock struct {
	Locks *Locks
	lease *lockLease
	mutex *concurrency.Mutex
	done  func() // the turn
}

// New returns locks whose keys begin with prefix. detach runs what goes on after a call in a
// goroutine.
func New(client *clientv3.Client, prefix string, timeout time.Duration, detach func(func())) *Locks {
	return &Locks{client: client, prefix: prefix, timeout: timeout, detach: detach}
}

// Acquire waits for the lock of a session, as long as ctx lasts and etcd can be reached. The lock's
// key holds a hash of the token.
func (l *Locks) Acquire(ctx context.Context, token string) (*Lock, error) {
	done, err := l.turns.Lock(ctx, token)
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256([]byte(token))
	name := l.prefix + hex.EncodeToString(hash[:])
	for {
		lease, err := l.join(ctx)
		if err != nil {
			done()
			return nil, err
		}
		held := &Lock{l, lease, concurrency.NewMutex(lease.session, name), done}
		returned, err := held.wait(ctx)
		if err == nil {
			return held, nil
		}
		if ctx.Err() != nil {
			l.detach(func() {
				<-returned
				held.release()
				done()
			})
			return nil, ctx.Err()
		}
		l.retire(lease) // so that the next lock has another key, which the clean-up does not touch
		l.detach(func() {
			<-returned
			held.release()
		})
		if !waitAgain(err) {
			done()
			return nil, err
		}
	}
}

// wait waits for the mutex. The channel that it returns is closed when the mutex has returned,
// which may take longer.
func (k *Lock) wait(ctx context.Context) (returned <-chan struct{}, err error) {
	waiting, stop := context.WithCancel(clientv3.WithRequireLeader(ctx)) // a watch of a member without one is silent
	defer stop()
	acquired, end := make(chan error, 1), make(chan struct{})
	k.Locks.detach(func() {
		defer close(end)
		acquired <- k.mutex.Lock(waiting)
	})
	select {
	case err = <-acquired:
	case <-ctx.Done():
		err = ctx.Err()
	case <-k.lease.session.Done():
		err = concurrency.ErrSessionExpired
	}
	return end, err
}

// waitAgain reports whether a wait for a lock ended with err because it lost its lease or its
// watch. What says that etcd did not answer in time is no such error.
func waitAgain(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	k := etcd.Classify(err)
	return errors.Is(err, concurrency.ErrSessionExpired) || k == etcd.LeaseLost || k == etcd.Compacted || k == etcd.Transient
}

// Owned is the compare that holds as long as the holder may still write: fencing. A holder that
// slept through the end of its lease finds the lock's key gone, or another's.
func (k *Lock) Owned() clientv3.Cmp { return k.mutex.IsOwner() }

// Waiting returns how many keys the goroutines of this process hold or wait for, and how many those
// are.
func (l *Locks) Waiting() (keys, users int) { return l.turns.Count() }

// LeaseID returns the lease that new locks are hung on, 0 where there is none.
func (l *Locks) LeaseID() clientv3.LeaseID {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease == nil {
		return clientv3.NoLease
	}
	return l.lease.session.Lease()
}

// Unlock releases the lock. If etcd does not answer at once, that goes on in the background.
func (k *Lock) Unlock() {
	released := make(chan struct{})
	k.Locks.detach(func() {
		defer close(released)
		k.release()
		k.done()
	})
	late := time.NewTimer(etcd.AttemptTimeout)
	defer late.Stop()
	select {
	case <-released:
	case <-late.C:
	}
}

// release deletes the lock's key, if there is one, and ends the use of the lease.
func (k *Lock) release() {
	defer k.Locks.leave(k.lease)
	key := k.mutex.Key()
	if !strings.HasPrefix(key, k.Locks.prefix) {
		return // the mutex has deleted it, when its wait ended, or has not come to put it
	}
	if _, err := k.lease.session.Client().Delete(context.Background(), key); err != nil {
		k.Locks.retire(k.lease)
	}
}

// join returns the process's lease for locks. leave ends its use. A grant that failed is not tried
// again at once: if etcd cannot be reached, the requests that wait for a turn need not find that
// out one after another.
func (l *Locks) join(ctx context.Context) (*lockLease, error) {
	for {
		lease, grant, err := l.tryJoin()
		if lease != nil || err != nil {
			return lease, err
		}
		select {
		case <-grant:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tryJoin returns the process's lease for locks, or the grant of one that is under way.
func (l *Locks) tryJoin() (*lockLease, <-chan struct{}, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease != nil {
		select {
		case <-l.lease.session.Done():
			l.drop()
		default:
			l.idle.Stop()
			l.lease.users++
			return l.lease, nil, nil
		}
	}
	if time.Since(l.failed) < lockPause {
		return nil, nil, l.failure
	}
	if l.grant == nil {
		l.grant = make(chan struct{})
		l.detach(l.newLease)
	}
	return nil, l.grant, nil
}

// newLease grants a lease for locks, and keeps it alive.
func (l *Locks) newLease() {
	life, end := context.WithCancel(l.client.Ctx())
	lease := &lockLease{end: end}
	err := l.grantTo(life, lease)
	if err != nil {
		end()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.grant)
	l.grant = nil
	if err != nil {
		l.failed, l.failure = time.Now(), err
		return
	}
	l.lease = lease
	l.idle = time.AfterFunc(lockIdle, func() { l.retireIdle(lease) })
}

// grantTo makes the session of a lease, which lives as long as life does.
func (l *Locks) grantTo(life context.Context, lease *lockLease) error {
	ctx, cancel := context.WithTimeout(life, l.timeout)
	defer cancel()
	var id clientv3.LeaseID
	err := etcd.Retry(ctx, func(ctx context.Context) error { // a grant whose answer is lost runs out
		resp, err := l.client.Grant(ctx, lockTTL)
		if err == nil {
			id = resp.ID
		}
		return clientv3.ContextError(ctx, err)
	})
	if err != nil {
		return err
	}
	lease.session, err = concurrency.NewSession(l.clientOf(life, lease), concurrency.WithLease(id), concurrency.WithTTL(lockTTL), concurrency.WithContext(life))
	return err
}

// leave ends a use of a lease.
func (l *Locks) leave(lease *lockLease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch lease.users--; {
	case lease.users > 0:
	case l.lease == lease:
		l.idle.Reset(lockIdle)
	default:
		l.detach(func() { l.revoke(lease) })
	}
}

// retire keeps locks from being hung on the lease. The last to leave it revokes it.
func (l *Locks) retire(lease *lockLease) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease == lease {
		l.drop()
	}
}

// drop retires the current lease.
//
// REQUIRES: mu is held, in a call or in what a call has detached.
func (l *Locks) drop() {
	lease := l.lease
	l.lease = nil
	l.idle.Stop()
	if lease.users == 0 {
		l.detach(func() { l.revoke(lease) })
	}
}

// retireIdle revokes the lease if it is not in use.
func (l *Locks) retireIdle(lease *lockLease) {
	l.mu.Lock()
	unused := l.lease == lease && lease.users == 0
	if unused {
		l.lease = nil
	}
	l.mu.Unlock()
	if unused {
		l.revoke(lease)
	}
}

// revoke ends a lease that is not in use any more. If etcd cannot be reached, it runs out.
func (l *Locks) revoke(lease *lockLease) {
	late := time.AfterFunc(l.timeout, lease.end)
	defer late.Stop()
	defer lease.end()
	_ = lease.session.Close()
}

// Close revokes the lease for locks.
func (l *Locks) Close() {
	l.mu.Lock()
	lease := l.lease
	if lease != nil {
		l.idle.Stop()
	}
	l.mu.Unlock()
	if lease != nil {
		l.retireIdle(lease)
	}
}

// clientOf returns the client that the mutexes on a lease use.
func (l *Locks) clientOf(life context.Context, lease *lockLease) *clientv3.Client {
	c := clientv3.NewCtxClient(life)
	c.KV = &lockKV{KV: l.client.KV, Locks: l, lease: lease}
	c.Lease = l.client.Lease
	c.Watcher = l.client.Watcher
	return c
}

// lockKV is etcd as a concurrency.Mutex sees it. A mutex asks once, with the context of whoever
// waits or with one that does not end. Of neither would be known what became of the request: here
// it does not end with its context, but is bounded in time, and sent again until etcd has answered.
// What a mutex sends may be sent twice.
type lockKV struct {
	clientv3.KV
	Locks *Locks
	lease *lockLease
}

// Do sends op.
func (kv *lockKV) Do(ctx context.Context, op clientv3.Op) (resp clientv3.OpResponse, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), kv.Locks.timeout)
	defer cancel()
	err = etcd.Retry(ctx, func(ctx context.Context) (err error) {
		resp, err = kv.KV.Do(ctx, op)
		err = clientv3.ContextError(ctx, err)
		if err != nil && !op.IsGet() && etcd.Classify(err) == etcd.Unknown {
			kv.Locks.retire(kv.lease)
		}
		return err
	})
	return resp, err
}

// Get implements clientv3.KV.
func (kv *lockKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	resp, err := kv.Do(ctx, clientv3.OpGet(key, opts...))
	return resp.Get(), err
}

// Delete implements clientv3.KV.
func (kv *lockKV) Delete(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.DeleteResponse, error) {
	resp, err := kv.Do(ctx, clientv3.OpDelete(key, opts...))
	return resp.Del(), err
}

// Txn implements clientv3.KV.
func (kv *lockKV) Txn(ctx context.Context) clientv3.Txn { return &lockTxn{kv: kv, ctx: ctx} }

// lockTxn is a Txn of a lockKV.
type lockTxn struct {
	kv              *lockKV
	ctx             context.Context
	cmps            []clientv3.Cmp
	then, otherwise []clientv3.Op
}

func (t *lockTxn) If(cmps ...clientv3.Cmp) clientv3.Txn {
	t.cmps = cmps
	return t
}

func (t *lockTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	t.then = ops
	return t
}

func (t *lockTxn) Else(ops ...clientv3.Op) clientv3.Txn {
	t.otherwise = ops
	return t
}

func (t *lockTxn) Commit() (*clientv3.TxnResponse, error) {
	resp, err := t.kv.Do(t.ctx, clientv3.OpTxn(t.cmps, t.then, t.otherwise))
	return resp.Txn(), err
}
