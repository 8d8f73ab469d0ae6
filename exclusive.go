package etcdstore

import (
	"context"
	"net/http"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/lock"
)

// Exclusive lets one request of a session run at a time, over all machines that share the store. It
// is for handlers with effects beside the session, such as a payment. sm is the session manager
// whose cookie names the session; Exclusive goes outside of its LoadAndSave, and around the router:
//
//	handler := store.Exclusive(sessionManager, sessionManager.LoadAndSave(mux))
//
// Inside of LoadAndSave it panics: the session would have been read before the lock was taken.
//
// Requests wait for the lock as long as their context lasts, and where etcd does not answer, the
// function of [WithErrorFunc] does. A request without a session does not wait. A request that has
// lost its lock, because its process was paused for longer than the lock's lease lasts (15 s),
// cannot commit or delete any more: every write to this store compares the ownership of the lock
// (fencing), and fails with ErrConflict. What such a handler does elsewhere is not fenced.
//
// Requests that do not go through Exclusive are not kept out; what they commit is merged as always.
// Without contention the lock costs two round trips. A handler in Exclusive must not be in another
// one for the same session: it would wait for itself.
func (e *EtcdStore) Exclusive(sm *scs.SessionManager, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		if hasSession(ctx, sm) {
			panic("etcdstore: Exclusive is inside of LoadAndSave; put it outside: " +
				"store.Exclusive(sessionManager, sessionManager.LoadAndSave(next))")
		}
		t := explicit(ctx)
		if t == nil {
			t = newRequestTransaction()
			r = r.WithContext(context.WithValue(ctx, contextKey{}, t))
		}
		cookie, err := r.Cookie(sm.Cookie.Name)
		if err == nil && validToken(cookie.Value) {
			held, err := e.exclude(ctx, cookie.Value)
			if err != nil {
				e.errorFunc(w, r, callError("lock", err))
				return
			}
			defer e.calls.Done()
			defer held.Unlock()
			defer t.guardWith(e, commit.Precondition{Cmp: held.Owned(), Err: errLockLost})()
		}
		next.ServeHTTP(w, r)
	})
}

// hasSession reports whether the session manager has loaded a session into ctx. Its methods panic
// where it has not.
func hasSession(ctx context.Context, sm *scs.SessionManager) (has bool) {
	defer func() { has = recover() == nil }()
	sm.Status(ctx)
	return true
}

// exclude locks a session. The lock counts as a call until it is released.
func (e *EtcdStore) exclude(ctx context.Context, token string) (*lock.Lock, error) {
	if !e.enter() {
		return nil, ErrClosed
	}
	held, err := e.locks.Acquire(ctx, token)
	if err != nil {
		e.calls.Done()
	}
	return held, err
}
