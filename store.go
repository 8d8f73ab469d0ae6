package etcdstore

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/lock"
	"github.com/seed210be38d/etcdstore/internal/read"
	"github.com/seed210be38d/etcdstore/internal/record"
	"github.com/seed210be38d/etcdstore/internal/session"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// defaultPrefix is that of scs's own etcdstore.
	defaultPrefix = "scs:session:"
	// reserved begins the part of a prefix that holds what is not a session: leases, locks. It
	// sorts behind every token that scs makes, so that one range holds all of a store, and [prefix,
	// prefix+reserved) its sessions.
	reserved = "~"
	// maxToken bounds a token. Those of scs have 43 bytes.
	maxToken = 512
)

// EtcdStore is a session store on etcd for scs. It is safe for concurrent use, and a process needs
// one for each prefix.
type EtcdStore struct {
	options
	clock      record.Clock
	prefix     string
	etcd       *etcd.Client
	decoder    session.Decoder
	leases     *lease.Pool
	reader     *read.Reader
	pipeline   *commit.Pipeline
	locks      *lock.Locks
	reruns     lock.Keyed // of Retry: apart from those of Exclusive, which a request may go through while it holds its turn
	implicit   implicitTransactions
	unreadable unreadable
	linked     atomic.Bool // Codec was called: reads are kept for what it decodes
	copies     copies

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup

	background sync.WaitGroup // what calls start on the side: grants, sweeps, the release of locks
}

var (
	_ scs.Store            = (*EtcdStore)(nil)
	_ scs.CtxStore         = (*EtcdStore)(nil)
	_ scs.IterableStore    = (*EtcdStore)(nil)
	_ scs.IterableCtxStore = (*EtcdStore)(nil)
)

// New returns a store for sessions under the prefix "scs:session:", as scs's own etcdstore has it.
// The client stays the caller's: it must outlive the store, and Close does not close it. New does
// not talk to etcd.
func New(client *clientv3.Client, opts ...Option) *EtcdStore {
	return NewWithPrefix(client, defaultPrefix, opts...)
}

// NewWithPrefix is New with another prefix, for several applications on one etcd. Stores with
// different prefixes do not see each other's sessions, also where one prefix begins with the other.
func NewWithPrefix(client *clientv3.Client, prefix string, opts ...Option) *EtcdStore {
	return newStore(client, client, prefix, opts)
}

func newStore(api etcd.API, client *clientv3.Client, prefix string, opts []Option) *EtcdStore {
	e := &EtcdStore{
		options: newOptions(opts), clock: record.Clock{Wall: time.Now},
		prefix: prefix, etcd: etcd.NewClient(api),
	}
	e.decoder = session.Decoder{Codec: e.codec, Prefix: prefix}
	e.leases = lease.New(e.etcd, prefix+reserved+"lease/", e.clock.WallTime, e.background.Go)
	e.reader = read.New(e.etcd, e.decoder.Version)
	e.pipeline = commit.New(e.etcd, e.leases, e.reader, prefix, e.clock.Now, e.decoder.Version)
	e.locks = lock.New(client, prefix+reserved+"lock/", e.timeout, e.background.Go)
	return e
}

// validToken reports whether a session can have this token. It must sort before the reserved part
// of the prefix.
func validToken(token string) bool {
	return token != "" && len(token) <= maxToken && token[0] < reserved[0]
}

// Find is FindCtx with a background context.
func (e *EtcdStore) Find(token string) (b []byte, exists bool, err error) {
	return e.FindCtx(context.Background(), token)
}

// FindCtx returns the data of the session with this token, as it was at some moment of the call. A
// token that no session has, or only one that has expired, and a token that no session can have,
// give false and no error.
func (e *EtcdStore) FindCtx(ctx context.Context, token string) (b []byte, exists bool, err error) {
	err = e.call(ctx, "find", func(deadline time.Time) error {
		if !validToken(token) {
			return nil
		}
		t := e.transactionOf(ctx)
		v, err := e.reader.Find(ctx, deadline, e.prefix+token)
		switch {
		case err != nil:
			return err
		case v.Unreadable() != nil:
			e.unreadable.note(v.Unreadable())
		}
		r := session.ReadOf(v, e.clock.Now())
		t.note(readKey{e, token}, r)
		if r.Image != nil {
			b, exists = e.give(callerOf(ctx), token, r), true
		}
		return nil
	})
	return b, exists, err
}

// unreadable tells of stored sessions that cannot be read: they count as not found, so that a user
// with such a cookie can log in again, and somebody should know.
type unreadable struct {
	count atomic.Int64
	said  atomic.Int64 // when that was logged last, in Unix nanoseconds
}

// note counts one, and logs that once a minute at most.
func (u *unreadable) note(err error) {
	n, now, said := u.count.Add(1), time.Now().UnixNano(), u.said.Load()
	if now-said >= int64(time.Minute) && u.said.CompareAndSwap(said, now) {
		slog.Error("etcdstore: stored session cannot be read, and counts as not found", "error", err, "found so far", n)
	}
}

// Commit is CommitCtx with a background context. It overwrites what the session holds.
func (e *EtcdStore) Commit(token string, b []byte, expiry time.Time) error {
	return e.CommitCtx(context.Background(), token, b, expiry)
}

// CommitCtx stores a session until expiry, to the millisecond. An expiry that has passed deletes
// it.
//
// The commit is validated against what its copy of the session was read from, with
// [EtcdStore.Codec], or else its transaction (a request of net/http is one): it is merged with what
// others changed since, and fails with [ErrConflict] where they changed the same key, or with
// [ErrSessionGone] where the session was deleted. A session that has only expired meanwhile goes
// on, unless etcd has removed it. Where nothing was read the commit overwrites.
//
// Other errors are [ErrInvalidToken], [ErrTooLarge], [ErrClosed], and [ErrOutcomeUnknown] where the
// context or the time-out ends the call after the commit was sent. After every other error nothing
// was written.
func (e *EtcdStore) CommitCtx(ctx context.Context, token string, b []byte, expiry time.Time) error {
	t, from := e.transactionOf(ctx), e.sourceOf(ctx, token, b)
	if len(from.renewed) > 0 { // the session is deleted already: a browser that leaves must not lose its user the next
		ctx = context.WithoutCancel(ctx)
	}
	return e.call(ctx, "commit", func(deadline time.Time) error {
		if !validToken(token) {
			return ErrInvalidToken
		}
		ours := session.NewImage(e.codec, bytes.Clone(b), max(record.ToMillis(expiry), 1))
		change := &session.Commit{
			Merger: e.merger(), Touch: e.touch, If: t.preconditions(e),
			Ours: ours, Base: from.base(token, t),
		}
		err := e.commit(ctx, deadline, readKey{e, token}, change, from, t)
		if err != nil {
			t.lose(readKey{e, token}, callError("commit", err))
		}
		return err
	})
}

// commit makes a commit, and notes what the request believes then.
func (e *EtcdStore) commit(ctx context.Context, deadline time.Time, k readKey, change *session.Commit, from source, t *transaction) (err error) {
	ours := change.Ours
	if len(from.renewed) > 0 {
		if change.Ours, err = e.renew(ours, from.renewed); err != nil {
			return err
		}
	}
	if change.Idle(e.clock.Now()) {
		t.wrote(k, *change.Base)
		return nil
	}
	call := commit.Call{Key: e.prefix + k.token, Change: change}
	if change.Base != nil {
		call.Hint = change.Base.Version
	}
	// A failed guess costs more than a read.
	if known := change.Base != nil || from.copy != nil || t != nil; !known || e.etcd.Stale() {
		if call.Hint, err = e.reader.Find(ctx, deadline, call.Key); err != nil {
			return err
		}
	}
	stored, err := e.pipeline.Do(ctx, deadline, call)
	if err != nil {
		return err
	}
	after := session.Stored(ours, stored)
	from.moveTo(k.token, after)
	t.wrote(k, after)
	t.wroteSomething(t.reruns() && change.Changes()) // that decodes
	return nil
}

// Delete is DeleteCtx with a background context.
func (e *EtcdStore) Delete(token string) error {
	return e.DeleteCtx(context.Background(), token)
}

// DeleteCtx deletes a session, whatever others make of it meanwhile: requests that read it before
// cannot commit it any more. Deleting what is not there succeeds. Once it has begun, a delete does
// not heed the end of its context, but that of its time: RenewToken deletes the old session before
// the new one is stored, and must not lose both.
func (e *EtcdStore) DeleteCtx(ctx context.Context, token string) error {
	return e.call(ctx, "delete", func(deadline time.Time) error {
		if !validToken(token) {
			return nil
		}
		t, k := e.transactionOf(ctx), readKey{e, token}
		found, err := e.delete(context.WithoutCancel(ctx), deadline, t, k)
		if err != nil {
			t.lose(k, callError("delete", err))
			return err
		}
		e.copies.deleted(ctx, token, found)
		t.wrote(k, session.Read{})
		if found != nil {
			t.wroteSomething(true)
		}
		return nil
	})
}

// delete deletes a session, and returns what it found: nil if there was none.
func (e *EtcdStore) delete(ctx context.Context, deadline time.Time, t *transaction, k readKey) (*session.Image, error) {
	var found record.Value
	r, read := t.read(k)
	call := commit.Call{Key: e.prefix + k.token, Change: commit.Delete{If: t.preconditions(e), Found: &found}, Hint: r.Version}
	if !read || e.etcd.Stale() || e.copies.has(k.token) { // a renewal has to know that nobody has deleted it before
		// What is on its way to the session, of a call that is over perhaps, must not come after
		// the delete. It is looked for before the read: what is settled by then, the read sees.
		concerned := e.pipeline.Calls(call.Key) > 0
		v, err := e.reader.Find(ctx, deadline, call.Key)
		if err != nil || v.Rev == 0 && !concerned {
			return nil, err
		}
		call.Hint = v
	}
	if _, err := e.pipeline.Do(ctx, deadline, call); err != nil {
		return nil, err
	}
	return session.ImageOf(found), nil
}

// All is AllCtx with a background context.
func (e *EtcdStore) All() (map[string][]byte, error) {
	return e.AllCtx(context.Background())
}

// AllCtx returns the data of all sessions by token, as they were at one moment of the call. It
// reads them in pages, but holds all of them in memory. Sessions that cannot be read are left out.
//
// With [EtcdStore.Codec], what the session manager makes of it may be committed and deleted as what
// FindCtx has returned. Without it, the commit of a listed session overwrites what others have
// committed since.
func (e *EtcdStore) AllCtx(ctx context.Context) (map[string][]byte, error) {
	var all map[string][]byte
	err := e.call(ctx, "list", func(deadline time.Time) error {
		bounded, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		for {
			versions, err := e.list(bounded)
			if etcd.Classify(err) == etcd.Compacted {
				continue // from the start, at the revision that etcd has by now
			}
			if err != nil {
				return err
			}
			now, by := e.clock.Now(), callerOf(ctx)
			all = make(map[string][]byte, len(versions))
			for token, v := range versions {
				if r := session.ReadOf(v, now); r.Image != nil {
					all[token] = e.give(by, token, r)
				}
			}
			return nil
		}
	})
	return all, err
}

// list reads all keys of the store that can be sessions, at one revision.
func (e *EtcdStore) list(ctx context.Context) (map[string]*record.Version, error) {
	versions := make(map[string]*record.Version)
	err := e.reader.List(ctx, e.prefix, e.prefix+reserved, func(key string, v *record.Version) {
		if token := key[len(e.prefix):]; validToken(token) {
			versions[token] = v
		}
	})
	return versions, err
}

// call runs one call of the API: counted for Close, and with errors that say what failed. It passes
// the time at which the call must end. That is no context of its own, since the batches that carry
// calls end in time by themselves, and a timer for each call costs a good part of a find.
func (e *EtcdStore) call(ctx context.Context, name string, f func(deadline time.Time) error) error {
	if !e.enter() {
		return ErrClosed
	}
	defer e.calls.Done()
	if err := ctx.Err(); err != nil {
		return callError(name, err)
	}
	deadline := time.Now().Add(e.timeout)
	if earlier, ok := ctx.Deadline(); ok && earlier.Before(deadline) {
		deadline = earlier
	}
	return callError(name, f(deadline))
}

// enter counts a call, unless the store is closed.
func (e *EtcdStore) enter() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.calls.Add(1)
	}
	return !e.closed
}

// Close waits for the calls in flight, and for what they left to be settled, revokes the leases
// that no session is on, and leaves the client open. Later calls return [ErrClosed]; closing again
// does nothing.
//
// Calling Close is optional: a store that is not used has no goroutines, and every lease ends by
// itself.
func (e *EtcdStore) Close() error {
	e.mu.Lock()
	already := e.closed
	e.closed = true
	e.mu.Unlock()
	if already {
		return nil
	}
	e.calls.Wait()
	e.reader.Wait()
	e.pipeline.Wait()
	e.background.Wait()
	e.locks.Close()
	ctx, cancel := context.WithTimeout(context.Background(), e.timeout)
	defer cancel()
	return callError("close", e.leases.Close(ctx))
}
