package etcdstore

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/session"
)

// transaction is what a request has read of sessions, its read set, and on what condition it may
// write.
//
// Optimistic concurrency control has three phases. In the read phase Find notes what it returned.
// The request computes. In the validation and write phase a commit is a compare of the mod revision
// that was read and a write, in one etcd transaction; where the compare fails, the commit is merged
// with what is there instead, or fails. (Kung and Robinson, On optimistic methods for concurrency
// control, ACM TODS 6(2), 1981.)
type transaction struct {
	// request says that this is a request's transaction, with a session manager between the store
	// and the application. The manager reads a session once, and keeps what it read: a further
	// Find, as MergeSession makes, is not what the application changes and commits. So the first
	// read counts there, and the last where Begin was called.
	request bool
	rerun   bool // by Retry: whether it has an effect is looked at

	mu      sync.Mutex
	reads   map[readKey]session.Read
	loaded  map[string]bool // tokens that Find was asked for
	lost    []loss          // commits that lost against another request, and were not repeated with success since, oldest first
	failed  *loss           // the last write that failed, whyever; nil: none has, or one has succeeded since
	written bool            // something was committed or deleted
	effect  bool            // and changed a session's values
	guards  []*guard        // of Exclusive
}

// guard is a lock that a request holds, until it is released: what the request writes to the lock's
// store compares it.
type guard struct {
	store    *EtcdStore
	held     commit.Precondition
	released atomic.Bool
}

// readKey names a session: a transaction may span stores.
type readKey struct {
	store *EtcdStore
	token string
}

// loss is a commit that lost against another request, and why.
type loss struct {
	readKey
	err error
}

// contextKey is the key of a context's transaction.
type contextKey struct{}

// Begin returns a context that carries a new transaction. What FindCtx returns in it is validated
// when CommitCtx writes: a commit does not overwrite what others have made of a session that the
// transaction has read.
//
// With [EtcdStore.Codec] no session manager needs it, and without, requests of net/http do not:
// each is a transaction by itself. It is for everything else that reads and then writes sessions,
// such as a job, or an RPC handler. A transaction ends with its context and needs no other end; it
// may be used by several goroutines.
func Begin(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, newTransaction())
}

func newTransaction() *transaction {
	return &transaction{reads: make(map[readKey]session.Read, 1)}
}

func newRequestTransaction() *transaction {
	t := newTransaction()
	t.request = true
	return t
}

// explicit returns the transaction that Begin, Retry or Exclusive put into ctx, or nil.
func explicit(ctx context.Context) *transaction {
	t, _ := ctx.Value(contextKey{}).(*transaction)
	return t
}

// implicitTransactions holds the transactions of requests of net/http that did not begin one.
//
// scs derives all contexts of a request from the request's own with values alone, so they share its
// Done channel, and that names the request. The entry goes when the request ends. Only contexts
// with http.ServerContextKey count: others may live as long as the process and serve many logical
// requests.
type implicitTransactions struct {
	mu     sync.Mutex
	byDone map[<-chan struct{}]*transaction
}

// of returns the transaction of the request that ctx belongs to, or nil.
func (i *implicitTransactions) of(ctx context.Context) *transaction {
	done := ctx.Done()
	if done == nil || ctx.Value(http.ServerContextKey) == nil {
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.byDone[done]
	if t == nil {
		t = newRequestTransaction()
		if i.byDone == nil {
			i.byDone = make(map[<-chan struct{}]*transaction)
		}
		i.byDone[done] = t
		context.AfterFunc(ctx, func() {
			i.mu.Lock()
			defer i.mu.Unlock()
			delete(i.byDone, done)
		})
	}
	return t
}

// len returns the number of requests that have a transaction.
func (i *implicitTransactions) len() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.byDone)
}

// transactionOf returns the transaction that ctx belongs to, or nil.
//
// A commit looks at the end of its context after this, not before: an implicit transaction goes
// with its request, and a commit that no longer found it would overwrite.
func (e *EtcdStore) transactionOf(ctx context.Context) *transaction {
	if t := explicit(ctx); t != nil {
		return t
	}
	return e.implicit.of(ctx)
}

// note adds what a Find returned to the read set. Where a commit has lost, the application reads
// again to try again. A nil transaction has no read set.
func (t *transaction) note(k readKey, r session.Read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.loaded == nil {
		t.loaded = make(map[string]bool, 1)
	}
	t.loaded[k.token] = true
	if _, again := t.reads[k]; again && t.request && !t.hasLost(k) {
		return
	}
	t.reads[k] = r
}

// read returns what the transaction has read of a session, if anything.
func (t *transaction) read(k readKey) (r session.Read, ok bool) {
	if t == nil {
		return session.Read{}, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok = t.reads[k]
	return r, ok
}

// wrote adds to the read set what the request believes after a write.
func (t *transaction) wrote(k readKey, r session.Read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.reads[k], t.failed = r, nil
	t.lost = slices.DeleteFunc(t.lost, func(l loss) bool { return l.readKey == k })
}

// guardWith has the transaction's writes to a store compare that a lock is held, until the function
// that it returns is called.
func (t *transaction) guardWith(e *EtcdStore, held commit.Precondition) (release func()) {
	g := &guard{store: e, held: held}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.guards = append(t.guards, g)
	return func() { g.released.Store(true) }
}

// activeGuards returns the guards for a transaction within this one.
func (t *transaction) activeGuards() []*guard {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.guards)
}

// preconditions returns on what the transaction may write to a store.
func (t *transaction) preconditions(e *EtcdStore) (held []commit.Precondition) {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, g := range t.guards {
		if g.store == e && !g.released.Load() {
			held = append(held, g.held)
		}
	}
	return held
}

// lose notes that a write has failed, and whether it lost against another request.
func (t *transaction) lose(k readKey, err error) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed = &loss{k, err}
	if errors.Is(err, ErrConflict) || errors.Is(err, ErrSessionGone) {
		t.lost = append(slices.DeleteFunc(t.lost, func(l loss) bool { return l.readKey == k }), *t.failed)
	}
}

// failure returns the last write that has failed, nil if none has since.
func (t *transaction) failure() *loss {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failed
}

// hasLost reports whether the last commit of a session lost.
//
// REQUIRES: mu is held.
func (t *transaction) hasLost(k readKey) bool {
	return slices.ContainsFunc(t.lost, func(l loss) bool { return l.readKey == k })
}

// outcome returns with which session, and why, the transaction has lost first, and whether it had
// written anything by then; the error is nil if it has not lost.
func (t *transaction) outcome() (token string, err error, written bool) { //nolint:revive // the error is a value here
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.lost) == 0 {
		return "", nil, t.written
	}
	return t.lost[0].token, t.lost[0].err, t.written
}

// hasLoaded reports whether the transaction has asked for a session.
func (t *transaction) hasLoaded(token string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.loaded[token]
}

// hasEffect reports whether the transaction has changed a session.
func (t *transaction) hasEffect() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.effect
}

// reruns reports whether the transaction is a further run of Retry's.
func (t *transaction) reruns() bool { return t != nil && t.rerun }

// wroteSomething notes that a call under the transaction's context has written; changes says that
// values have changed.
func (t *transaction) wroteSomething(changes bool) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.written = true
	t.effect = t.effect || changes
}
