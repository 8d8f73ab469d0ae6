package etcdstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

const (
	// lockTTL is how long, in seconds, the locks of a process outlive it when it dies.
	lockTTL = 15
	// lockIdle is how long the process keeps its lease for locks after the last was released.
	lockIdle = 10 * time.Second
)

// turns lets the goroutines of this process take turns at a session. It needs no network.
type turns struct {
	mu    sync.Mutex
	queue map[string]*turn
}

// turn is the queue at one session: a semaphore of one, and how many hold it or wait for it.
type turn struct {
	slot  chan struct{}
	users int
}

// take waits for the turn at a session. The function that it returns gives the turn back.
func (t *turns) take(ctx context.Context, token string) (done func(), err error) {
	t.mu.Lock()
	q := t.queue[token]
	if q == nil {
		q = &turn{slot: make(chan struct{}, 1)}
		if t.queue == nil {
			t.queue = make(map[string]*turn)
		}
		t.queue[token] = q
	}
	q.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if q.users--; q.users == 0 {
			delete(t.queue, token)
		}
	}
	select {
	case q.slot <- struct{}{}:
		return func() { <-q.slot; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// locks are the locks of Exclusive: a concurrency.Mutex for each session, over all machines.
//
// All mutexes of a process hang on one lease, a concurrency.Session, that is kept alive while locks are in use and a
// little longer. Such a mutex is the process's and not the goroutine's, so goroutines first take turns.
type locks struct {
	client  *clientv3.Client
	prefix  string
	timeout time.Duration
	detach  func(func())
	turns   turns

	making sync.Mutex // held while a session is made; taken before mu
	mu     sync.Mutex
	lease  *concurrency.Session // nil: none
	users  int                  // of lease
	idle   *time.Timer          // ends lease
}

// lock is a lock that is held.
type lock struct {
	locks *locks
	mutex *concurrency.Mutex
	lease *concurrency.Session
	done  func() // the turn
}

func newLocks(client *clientv3.Client, prefix string, timeout time.Duration, detach func(func())) *locks {
	return &locks{client: client, prefix: prefix, timeout: timeout, detach: detach}
}

// lock waits for the lock of a session, as long as ctx lasts. The lock's key holds a hash of the token.
func (l *locks) lock(ctx context.Context, token string) (*lock, error) {
	done, err := l.turns.take(ctx, token)
	if err != nil {
		return nil, err
	}
	lease, err := l.join(ctx)
	if err != nil {
		done()
		return nil, err
	}
	hash := sha256.Sum256([]byte(token))
	held := &lock{l, concurrency.NewMutex(lease, l.prefix+hex.EncodeToString(hash[:])), lease, done}
	acquired := make(chan error, 1)
	l.detach(func() { acquired <- held.mutex.Lock(ctx) })
	select {
	case err = <-acquired:
	case <-ctx.Done():
		// When its wait ends, the mutex deletes its key with a context that does not.
		l.detach(func() {
			<-acquired
			held.unlock()
		})
		return nil, ctx.Err()
	}
	if err != nil {
		held.unlock()
		return nil, clientv3.ContextError(ctx, err)
	}
	return held, nil
}

// guard is the condition on which the holder may still write: fencing. A holder that slept through the end of its lease
// finds the lock's key gone, or another's.
func (k *lock) guard() *guard { return &guard{k.mutex.IsOwner()} }

// unlock releases the lock, and ends a wait for it. If etcd does not answer at once, it goes on in the background.
func (k *lock) unlock() {
	ctx, cancel := context.WithTimeout(context.Background(), attemptTimeout)
	defer cancel()
	if k.release(ctx) == nil {
		k.end(true)
		return
	}
	k.locks.detach(func() {
		ctx, cancel := context.WithTimeout(context.Background(), k.locks.timeout)
		defer cancel()
		k.end(retry(ctx, k.release) == nil)
	})
}

// release deletes the lock's key.
func (k *lock) release(ctx context.Context) error {
	key := k.mutex.Key()
	if !strings.HasPrefix(key, k.locks.prefix) {
		return nil // the mutex has done it, when its wait ended
	}
	_, err := k.locks.client.Delete(ctx, key)
	return err
}

// end lets the next take its turn.
func (k *lock) end(clean bool) {
	k.locks.leave(k.lease, clean)
	k.done()
}

// join returns the process's lease for locks. leave ends its use.
func (l *locks) join(ctx context.Context) (*concurrency.Session, error) {
	l.making.Lock()
	defer l.making.Unlock()
	if s := l.current(); s != nil {
		return s, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	// The session lives as long as the context that it was made with, so that must not be the request's.
	life, end := context.WithCancel(l.client.Ctx())
	late := time.AfterFunc(min(l.timeout, 4*attemptTimeout), end)
	s, err := concurrency.NewSession(l.client, concurrency.WithTTL(lockTTL), concurrency.WithContext(life))
	if err != nil || !late.Stop() {
		end()
		return nil, endedError(context.DeadlineExceeded, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lease, l.users = s, 1
	return s, nil
}

// current joins the lease if there is one that is alive.
func (l *locks) current() *concurrency.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease == nil {
		return nil
	}
	select {
	case <-l.lease.Done():
		l.lease = nil
		return nil
	default:
	}
	if l.idle != nil {
		l.idle.Stop()
	}
	l.users++
	return l.lease
}

// leave ends a use of the lease. With clean false a key may have stayed on it, and would lock its session out for as
// long as the lease is kept alive; so it is left to run out.
func (l *locks) leave(s *concurrency.Session, clean bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lease != s {
		return
	}
	l.users--
	switch {
	case !clean:
		l.lease = nil
		l.detach(s.Orphan)
	case l.users == 0:
		l.idle = time.AfterFunc(lockIdle, func() { l.end(s) })
	}
}

// end revokes the lease if it is not in use.
func (l *locks) end(s *concurrency.Session) {
	l.mu.Lock()
	unused := l.lease == s && l.users == 0
	if unused {
		l.lease = nil
	}
	l.mu.Unlock()
	if unused {
		_ = s.Close() // else it runs out
	}
}

// close revokes the lease for locks.
func (l *locks) close() {
	l.mu.Lock()
	s := l.lease
	if l.idle != nil {
		l.idle.Stop()
	}
	l.mu.Unlock()
	if s != nil {
		l.end(s)
	}
}
