package etcdstore

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/session"
)

// transaction is what a request has read of sessions, its read set, and on what condition it may write.
//
// Optimistic concurrency control has three phases. In the read phase Find notes what it returned. The request
// computes. In the validation and write phase a commit is a compare of the mod revision that was read and a write, in
// one etcd transaction; where the compare fails, the commit is merged with what is there instead, or fails.
// (Kung and Robinson, On optimistic methods for concurrency control, ACM TODS 6(2), 1981.)
type transaction struct {
	// request says that this is a request's transaction, with a session manager between the store and the application. The
	// manager reads a session once, and keeps what it read: a further Find, as MergeSession makes, is not what the
	// application changes and commits. So the first read counts there, and the last where Begin was called.
	request bool

	mu    sync.Mutex
	reads map[readKey]belief
	lost  []loss                // commits that lost against another request, and were not repeated with success since, oldest first
	guard []commit.Precondition // set by Exclusive, before the transaction is used
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

// belief is what a request believes about a session.
type belief struct {
	session.Read
	copied bool // the application has read it twice, and may commit either copy
}

// contextKey is the key of a context's transaction.
type contextKey struct{}

// Begin returns a context that carries a new transaction. What FindCtx and AllCtx return in it is validated when
// CommitCtx and DeleteCtx write: a commit never overwrites what the transaction has not seen.
//
// Requests of net/http need no Begin: each is a transaction by itself. It is for everything else that reads and
// then writes sessions, such as a job, or an RPC handler. A transaction ends with its context and needs no other
// end; it may be used by several goroutines.
func Begin(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, newTransaction())
}

func newTransaction() *transaction {
	return &transaction{reads: make(map[readKey]belief, 1)}
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
// scs derives all contexts of a request from the request's own with values alone, so they share its Done channel, and
// that names the request. The entry goes when the request ends. Only contexts with http.ServerContextKey count: others
// may live as long as the process and serve many logical requests.
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
// A commit looks at the end of its context after this, not before: an implicit transaction goes with its request, and
// a commit that no longer found it would overwrite.
func (e *EtcdStore) transactionOf(ctx context.Context) *transaction {
	if t := explicit(ctx); t != nil {
		return t
	}
	return e.implicit.of(ctx)
}

// note adds what a Find returned to the read set. Where a commit has lost, the application reads again to try again. A nil
// transaction has no read set.
func (t *transaction) note(k readKey, r session.Read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, again := t.reads[k]; again && t.request && !t.hasLost(k) {
		return
	}
	t.reads[k] = belief{Read: r}
}

// noteListed is note for what a listing returned. It must not replace what the request believes about its own session.
func (t *transaction) noteListed(k readKey, r session.Read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if own, ok := t.reads[k]; ok {
		t.reads[k] = belief{own.Read, true}
		return
	}
	t.reads[k] = belief{Read: r}
}

// read returns what the transaction has read of a session, if anything.
func (t *transaction) read(k readKey) (r session.Read, ok bool) {
	if t == nil {
		return session.Read{}, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	own, ok := t.reads[k]
	return own.Read, ok
}

// wrote adds to the read set what the request believes after a write: what it wrote. Where that was merged with what
// others wrote, no revision holds exactly that, so the next commit merges again and never overwrites. Where the request has
// two copies of the session, the other one does not have what this one wrote: its commit is merged from the first read, and
// there is nothing to merge it into if this one was deleted.
func (t *transaction) wrote(k readKey, r session.Read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	own := belief{Read: r}
	if was := t.reads[k]; was.copied {
		if r.Version != nil {
			was.Version = r.Version
		}
		own = was
	}
	t.reads[k] = own
	t.lost = slices.DeleteFunc(t.lost, func(l loss) bool { return l.readKey == k })
}

// preconditions returns on what the transaction may write.
func (t *transaction) preconditions() []commit.Precondition {
	if t == nil {
		return nil
	}
	return t.guard
}

// lose notes that a commit lost against another request.
func (t *transaction) lose(k readKey, err error) {
	if t == nil || !errors.Is(err, ErrConflict) && !errors.Is(err, ErrSessionGone) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lost = append(slices.DeleteFunc(t.lost, func(l loss) bool { return l.readKey == k }), loss{k, err})
}

// hasLost reports whether the last commit of a session lost.
//
// REQUIRES: mu is held.
func (t *transaction) hasLost(k readKey) bool {
	return slices.ContainsFunc(t.lost, func(l loss) bool { return l.readKey == k })
}

// defeat returns with which session, and why, the transaction has lost first; the error is nil if it has not.
func (t *transaction) defeat() (token string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.lost) == 0 {
		return "", nil
	}
	return t.lost[0].token, t.lost[0].err
}
