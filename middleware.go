package etcdstore

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/lock"
	"github.com/seed210be38d/etcdstore/internal/replay"
)

const (
	// maxRuns bounds how often Retry runs a handler for one request.
	maxRuns = 64
	// maxTurn is how long a request that has lost waits for others of its session that have.
	maxTurn = time.Second
)

// Retry runs next again, as a new transaction, when its commit lost against another request: the session was changed on
// the same key ([ErrConflict]), or was deleted ([ErrSessionGone]). It goes outside of LoadAndSave:
//
//	handler := store.Retry(sessionManager.LoadAndSave(mux))
//
// It is for handlers whose only effect is the session, and which leave it to LoadAndSave to save that: what a run has
// saved by itself before it lost stays saved. scs commits at the handler's first write, before a byte has reached the
// client, so nothing is buffered: at the first write the outcome is known, and either everything passes straight
// through, so that streaming and flushing work as without Retry, or what this run writes is dropped, headers included,
// and the handler runs again. A run that has lost has its context cancelled, so that a handler that streams until its
// client goes away ends. A handler that flushes, or hijacks the connection, before its first write has answered and does
// not run again.
//
// Where the session is gone, the handler runs again without one, and the session cookie stays as it is: a login in another
// request may have set it anew meanwhile (RenewToken deletes the old session), and must not be undone.
//
// The request's body is kept up to 1 MiB for the next run; with a larger one the handler does not run again. There are
// up to 64 runs with a random wait between them, and the requests of one session that have lost take turns within the
// process. After the last one ErrorFunc answers. A panic of next passes through, except for http.ErrAbortHandler in a
// run whose response is dropped anyway.
func (e *EtcdStore) Retry(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header().Clone()
		body := replay.New(r.Body)
		giveBack := func() {}
		var stale []string
		for n := 1; ; n++ {
			run := newRun(w, r, body, giveBack)
			run.stale = stale
			if !run.serve(next, r) {
				return
			}
			if errors.Is(run.defeat, ErrSessionGone) {
				stale = append(stale, cookiesOf(r, run.token)...)
			}
			clear(w.Header())
			maps.Copy(w.Header(), header.Clone())
			if n == maxRuns || r.Context().Err() != nil {
				ErrorFunc(w, r, fmt.Errorf("%w: gave up after %d runs: %w", ErrConflict, n, run.defeat))
				return
			}
			giveBack = e.awaitTurn(r.Context(), run.token)
			time.Sleep(rand.N(time.Millisecond << min(n, 6)))
		}
	})
}

// awaitTurn waits until the requests of a session that have lost before have run again, but not for long: some handlers
// take their time. What it returns gives the turn back.
func (e *EtcdStore) awaitTurn(ctx context.Context, token string) (giveBack func()) {
	ctx, cancel := context.WithTimeout(ctx, maxTurn)
	defer cancel()
	done, err := e.reruns.Lock(ctx, token)
	if err != nil {
		return func() {}
	}
	return sync.OnceFunc(done)
}

// run is one run of a handler, and the http.ResponseWriter that it gets. It passes the response through once it is known
// that the run has not lost.
type run struct {
	http.ResponseWriter
	transaction *transaction
	guarded     bool // by an Exclusive outside of Retry
	body        *replay.Body
	cancel      context.CancelFunc // of the run's context
	giveBack    func()             // the turn; it may be called again
	stale       []string           // cookies that the run must not set

	verdict verdict
	token   string // the session that the run has lost with, and why
	defeat  error
}

// runKey is the key of a context's run.
type runKey struct{}

type verdict int

const (
	undecided verdict = iota
	passes
	dropped
)

func newRun(w http.ResponseWriter, r *http.Request, body *replay.Body, giveBack func()) *run {
	t := newRequestTransaction()
	if outer := explicit(r.Context()); outer != nil {
		t.guard = outer.guard
	}
	return &run{ResponseWriter: w, transaction: t, guarded: t.guard != nil, body: body, giveBack: giveBack}
}

// serve runs next and reports whether the run has lost.
func (w *run) serve(next http.Handler, r *http.Request) (lost bool) {
	defer w.giveBack()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	w.cancel = cancel
	ctx = context.WithValue(ctx, contextKey{}, w.transaction)
	again := r.Clone(context.WithValue(ctx, runKey{}, w))
	if r.Body != nil && r.Body != http.NoBody {
		again.Body = w.body.Rewind()
	}
	defer func() {
		if w.verdict != dropped {
			return
		}
		lost = true
		if p := recover(); p != nil && p != any(http.ErrAbortHandler) {
			panic(p)
		}
	}()
	next.ServeHTTP(w, again)
	if w.lost() {
		return true
	}
	w.dropStale()
	return false
}

// lost reports whether the run has lost and will be repeated. It is called at the run's first write, which comes after
// its commit, and at its end.
func (w *run) lost() bool {
	if w.verdict != undecided {
		return w.verdict == dropped
	}
	token, err := w.transaction.defeat()
	switch {
	case err == nil:
		return false
	case w.guarded && errors.Is(err, errLockLost):
		return false // and a repeated run would lose in the same way
	case !w.body.Seal():
		return false // it cannot be repeated; scs's ErrorFunc has answered
	}
	w.verdict, w.token, w.defeat = dropped, token, err
	w.giveBack()
	w.cancel()
	return true
}

// pass notes that the client gets to see something of the run.
func (w *run) pass() {
	if w.verdict == undecided {
		w.dropStale()
	}
	w.verdict = passes
	w.giveBack()
}

// dropStale removes the cookies that the run must not set.
func (w *run) dropStale() {
	if len(w.stale) == 0 || w.verdict != undecided {
		return
	}
	set := w.Header().Values("Set-Cookie")
	w.Header()["Set-Cookie"] = slices.DeleteFunc(slices.Clone(set), func(line string) bool {
		cookie, err := http.ParseSetCookie(line)
		return err == nil && slices.Contains(w.stale, cookie.Name)
	})
}

// cookiesOf returns the names of a request's cookies that name a session, as its token or, as scs's HashTokenInStore has it,
// as what the token is the hash of.
func cookiesOf(r *http.Request, token string) (names []string) {
	for _, c := range r.Cookies() {
		hash := sha256.Sum256([]byte(c.Value))
		if c.Value == token || base64.RawURLEncoding.EncodeToString(hash[:]) == token {
			names = append(names, c.Name)
		}
	}
	return names
}

func (w *run) WriteHeader(code int) {
	if w.lost() {
		return
	}
	if code < 100 || code >= 200 || code == http.StatusSwitchingProtocols {
		w.pass()
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *run) Write(b []byte) (int, error) {
	if w.lost() {
		return len(b), nil
	}
	w.pass()
	return w.ResponseWriter.Write(b)
}

// FlushError is what http.ResponseController.Flush calls.
func (w *run) FlushError() error {
	if w.lost() {
		return nil
	}
	err := http.NewResponseController(w.ResponseWriter).Flush()
	if !errors.Is(err, http.ErrNotSupported) {
		w.pass()
	}
	return err
}

// Flush implements http.Flusher.
func (w *run) Flush() { _ = w.FlushError() }

// Hijack implements http.Hijacker.
func (w *run) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.lost() {
		return nil, nil, ErrConflict
	}
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if !errors.Is(err, http.ErrNotSupported) {
		w.pass()
	}
	return conn, rw, err
}

// Unwrap gives http.ResponseController what does not concern the response: deadlines, full duplex.
func (w *run) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Exclusive lets one request of a session run at a time, over all machines that share the store. It is for handlers with
// effects beside the session, such as a payment. sm is the session manager whose cookie names the session; Exclusive
// goes outside of its LoadAndSave:
//
//	handler := store.Exclusive(sessionManager, sessionManager.LoadAndSave(mux))
//
// Requests wait for the lock as long as their context lasts, and where etcd does not answer, ErrorFunc does. A request
// without a session does not wait. A request that has lost its lock, because its process was paused for longer than the
// lock's lease lasts (15 s), cannot commit any more: every commit compares the ownership of the lock (fencing), and
// fails with ErrConflict. What such a handler does elsewhere is not fenced.
//
// Requests that do not go through Exclusive are not kept out; what they commit is merged as always. Without contention
// the lock costs two round trips. A handler in Exclusive must not be in another one for the same session: it would wait
// for itself.
func (e *EtcdStore) Exclusive(sm *scs.SessionManager, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		t := explicit(ctx)
		if t == nil {
			t = newRequestTransaction()
			r = r.WithContext(context.WithValue(ctx, contextKey{}, t))
		}
		cookie, err := r.Cookie(sm.Cookie.Name)
		if err == nil && validToken(cookie.Value) {
			held, err := e.exclude(ctx, cookie.Value)
			if err != nil {
				ErrorFunc(w, r, callError("lock", err))
				return
			}
			defer e.calls.Done()
			defer held.Unlock()
			t.guard = []commit.Precondition{{Cmp: held.Owned(), Err: errLockLost}}
		}
		next.ServeHTTP(w, r)
	})
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

// ErrorFunc is for scs.SessionManager.ErrorFunc. It answers
//
//   - [ErrSessionGone] with nothing: the user has logged out, there is nothing to save, and the handler's response passes
//     without a cookie;
//   - [ErrConflict] with 409;
//   - [ErrOutcomeUnknown], and what says that etcd is not available, with 503 and Retry-After;
//   - everything else with 500.
//
// It logs all but the first with slog, unless the client has gone. In a run that Retry repeats it does nothing. Note that
// scs lets the handler's body follow what ErrorFunc writes.
func ErrorFunc(w http.ResponseWriter, r *http.Request, err error) {
	if run, ok := r.Context().Value(runKey{}).(*run); ok && run.lost() {
		return
	}
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, ErrSessionGone) && !errors.Is(err, ErrConflict):
		return
	case errors.Is(err, ErrConflict):
		status = http.StatusConflict
	case errors.Is(err, ErrOutcomeUnknown), etcd.Unavailable(err):
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	if !errors.Is(r.Context().Err(), context.Canceled) { // else the client has gone, mostly: a server's BaseContext may end, too
		slog.ErrorContext(r.Context(), "etcdstore: session not loaded or saved", "method", r.Method, "status", status, "error", err)
	}
	http.Error(w, http.StatusText(status), status)
}
