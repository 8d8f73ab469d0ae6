package etcdstore

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/seed210be38d/etcdstore/internal/replay"
)

const (
	// maxRuns bounds how often Retry runs a handler for one request.
	maxRuns = 64
	// maxTurn is how long a request that has lost waits for others of its session that have.
	maxTurn = time.Second
)

// errRunLost is what the writes of a lost run fail with.
var errRunLost = fmt.Errorf("%w: the response of this run is dropped", ErrConflict)

// Retry runs next again, as a new transaction, when its commit lost against another request: the
// session was changed on the same key ([ErrConflict]), or was deleted ([ErrSessionGone]). It goes
// outside of LoadAndSave, and around the router:
//
//	handler := store.Retry(sessionManager.LoadAndSave(mux))
//
// Inside of LoadAndSave it panics, since the session that it would have loaded again is already
// there. As the middleware of a router it works only where the router's chain can run twice. Where
// Retry finds that it cannot (the rest of the path is in the context, and the first run has
// consumed it; or the second run does nothing), it answers with an error.
//
// It is for handlers whose only effect is the session, and which leave it to LoadAndSave to save
// that: a run that has written anything before it lost, to any store, is not repeated, but answered
// with an error. scs commits at the handler's first write, before a byte has reached the client, so
// nothing is buffered: at the first write the outcome is known, and either everything passes
// straight through, so that streaming and flushing work as without Retry, or what this run writes
// is dropped, headers included, and the handler runs again. The writes of a run that has lost fail,
// and its context is cancelled, so that a handler that streams until its client goes away ends. A
// handler that flushes, or hijacks the connection, before its first write has answered and does not
// run again.
//
// Where the session is gone, the handler runs again without one, and the session cookie stays as it
// is: a login in another request may have set it anew meanwhile (RenewToken deletes the old
// session), and must not be undone.
//
// The request's body is kept up to 1 MiB for the next run; with a larger one the handler does not
// run again. There are up to 64 runs with a random wait between them, and the requests of one
// session that have lost take turns within the process. After the last one, and where a lost run is
// not repeated, the function of [WithErrorFunc] answers. A panic of next passes through, except for
// http.ErrAbortHandler in a run whose response is dropped anyway.
func (e *EtcdStore) Retry(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if insideLoadAndSave(w) {
			panic("etcdstore: Retry is inside of LoadAndSave; put it outside: store.Retry(sessionManager.LoadAndSave(next))")
		}
		header := w.Header().Clone()
		body := replay.New(r.Body)
		giveBack := func() {}
		var last *run
		for n := 1; ; n++ {
			run := newRun(w, r, body, last, giveBack)
			if !run.serve(next, r) {
				return
			}
			clear(w.Header())
			maps.Copy(w.Header(), header.Clone())
			switch {
			case run.final:
				e.errorFunc(w, r, run.defeat)
				return
			case n == maxRuns || r.Context().Err() != nil:
				e.errorFunc(w, r, fmt.Errorf("%w: gave up after %d runs: %w", ErrConflict, n, run.defeat))
				return
			}
			giveBack = e.awaitTurn(r.Context(), run.token)
			time.Sleep(rand.N(time.Millisecond << min(n, 6)))
			last = run
		}
	})
}

// insideLoadAndSave reports whether the response goes through scs.
func insideLoadAndSave(w http.ResponseWriter) bool {
	for {
		if t := reflect.TypeOf(w); t.Kind() == reflect.Pointer && t.Elem().PkgPath() == "github.com/alexedwards/scs/v2" {
			return true
		}
		wrapper, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return false
		}
		if w = wrapper.Unwrap(); w == nil {
			return false
		}
	}
}

// awaitTurn waits until the requests of a session that have lost before have run again, but not for
// long: some handlers take their time. What it returns gives the turn back.
func (e *EtcdStore) awaitTurn(ctx context.Context, token string) (giveBack func()) {
	ctx, cancel := context.WithTimeout(ctx, maxTurn)
	defer cancel()
	done, err := e.reruns.Lock(ctx, token)
	if err != nil {
		return func() {}
	}
	return sync.OnceFunc(done)
}

// run is one run of a handler, and a tentative http.ResponseWriter: it passes the response through
// once it is known that the run has not lost.
type run struct {
	http.ResponseWriter
	transaction *transaction
	after       *run // the run that was lost before; nil for the first
	guarded     bool // by an Exclusive outside of Retry: a lock that is lost then is lost to further runs, too
	body        *replay.Body
	path        routing
	cancel      context.CancelFunc // of the run's context
	giveBack    func()             // the turn; it may be called again
	stale       []string           // cookies that the run must not set

	mu      sync.Mutex // http.TimeoutHandler answers while its handler goes on
	verdict verdict
	token   string // the session that the run has lost with, and why
	defeat  error
	final   bool // it is not repeated
}

// runKey is the key of a context's run.
type runKey struct{}

type verdict int

const (
	undecided verdict = iota
	passes
	dropped
)

func newRun(w http.ResponseWriter, r *http.Request, body *replay.Body, after *run, giveBack func()) *run {
	t := newRequestTransaction()
	if outer := explicit(r.Context()); outer != nil {
		t.guards = outer.activeGuards()
	}
	run := &run{
		ResponseWriter: w, transaction: t, guarded: len(t.guards) > 0, after: after, body: body, giveBack: giveBack,
	}
	if after != nil {
		t.rerun = true
		run.stale = after.stale
		if errors.Is(after.defeat, ErrSessionGone) {
			run.stale = append(slices.Clone(after.stale), cookiesOf(r, after.token)...)
		}
	}
	return run
}

// serve runs next and reports whether the run has lost.
func (w *run) serve(next http.Handler, r *http.Request) (lost bool) {
	defer w.giveBack()
	ctx, cancel := context.WithCancel(r.Context()) // it ends with the request, or when the run has lost
	w.cancel = cancel
	w.path = routing{Context: ctx, path: r.URL.Path}
	ctx = context.WithValue(&w.path, contextKey{}, w.transaction)
	again := r.Clone(context.WithValue(ctx, runKey{}, w))
	again.Trailer = r.Trailer // which the server fills
	if r.Body != nil && r.Body != http.NoBody {
		again.Body = trailing{w.body.Rewind(), r, again}
	}
	defer func() {
		p := recover()
		lost = w.end(p)
		if form := again.MultipartForm; form != nil && form != r.MultipartForm {
			if lost {
				_ = form.RemoveAll()
			} else {
				r.MultipartForm = form // which the server removes
			}
		}
		if p != nil && (!lost || p != any(http.ErrAbortHandler)) {
			panic(p)
		}
	}()
	next.ServeHTTP(w, again)
	return lost
}

// end decides about a run that has returned, or panicked with p. It reports whether the run has
// lost.
func (w *run) end(p any) bool {
	if w.lost() {
		return true
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.verdict == undecided && w.after != nil && p == nil && !w.transaction.hasEffect() {
		// A chain that runs once does nothing the second time. A handler that saves and answers
		// nothing looks the same, and is told that it conflicts: better than a change that is lost
		// with a 200.
		w.lose(w.after.token, w.after.defeat, true)
		return true
	}
	if w.verdict == undecided {
		w.dropStale()
	}
	w.verdict = passes // also for what is written after Retry has returned
	return false
}

// lost reports whether the run has lost, so that its response is dropped. It is called at the run's
// first write, which comes after its commit, and at its end.
func (w *run) lost() bool { return w.lostBy(true) }

// lostBy is lost. What is written before the answer says nothing yet about a run that is another
// handler's.
func (w *run) lostBy(answer bool) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.verdict != undecided {
		return w.verdict == dropped
	}
	token, err, written := w.transaction.outcome()
	switch {
	case err == nil && answer && w.after != nil && w.after.transaction.hasLoaded(w.after.token) &&
		!w.transaction.hasLoaded(w.after.token):
		w.lose(w.after.token, w.after.defeat, true) // it is another handler's run
	case err == nil:
		return false
	case written || w.guarded && errors.Is(err, errLockLost) || w.path.consumed() || !w.body.Seal():
		if errors.Is(err, ErrSessionGone) && !errors.Is(err, ErrConflict) {
			return false // there is nothing to save, and the response passes
		}
		if w.path.consumed() {
			err = fmt.Errorf("%w; Retry stands inside of a router that cannot route again: put it around the router", err)
		}
		w.lose(token, err, true)
	default:
		w.lose(token, err, false)
	}
	return true
}

// lose drops the run's response. A final loss is not repeated.
//
// REQUIRES: mu is held.
func (w *run) lose(token string, err error, final bool) {
	w.verdict, w.token, w.defeat, w.final = dropped, token, err, final
	w.giveBack()
	w.cancel()
}

// pass notes that the client gets to see something of the run.
func (w *run) pass() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.verdict == undecided {
		w.dropStale()
	}
	w.verdict = passes
	w.giveBack()
}

// dropStale removes the cookies that the run must not set.
func (w *run) dropStale() {
	set := w.Header().Values("Set-Cookie")
	if len(w.stale) == 0 || len(set) == 0 {
		return
	}
	w.Header()["Set-Cookie"] = slices.DeleteFunc(slices.Clone(set), func(line string) bool {
		cookie, err := http.ParseSetCookie(line)
		return err == nil && slices.Contains(w.stale, cookie.Name)
	})
}

// cookiesOf returns the names of a request's cookies that name a session, as its token or, as scs's
// HashTokenInStore has it, as what the token is the hash of.
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
	answer := code < 100 || code >= 200 || code == http.StatusSwitchingProtocols
	if w.lostBy(answer) {
		return
	}
	if answer {
		w.pass()
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *run) Write(b []byte) (int, error) {
	if w.lost() {
		return 0, errRunLost
	}
	w.pass()
	return w.ResponseWriter.Write(b)
}

// FlushError is what http.ResponseController.Flush calls.
func (w *run) FlushError() error {
	if w.lost() {
		return errRunLost
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
		return nil, nil, errRunLost
	}
	conn, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if !errors.Is(err, http.ErrNotSupported) {
		w.pass()
	}
	return conn, rw, err
}

// Unwrap gives http.ResponseController what does not concern the response: deadlines, full duplex.
func (w *run) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WillRetry is for an application's own ErrorFunc: it reports whether what this run of a handler
// answers is dropped, because [EtcdStore.Retry] runs the handler again, or answers by itself (see
// [WithErrorFunc]). The function should then do nothing:
//
//	sessionManager.ErrorFunc = func(w http.ResponseWriter, r *http.Request, err error) {
//		if etcdstore.WillRetry(r) {
//			return
//		}
//		...
//	}
func WillRetry(r *http.Request) bool {
	run, ok := r.Context().Value(runKey{}).(*run)
	return ok && (run.lost() || run.fails())
}

// fails gives up a run whose session could not be saved, for another reason than that it lost:
// Retry answers, so that the handler's body does not follow the page. It is called for an
// ErrorFunc: a commit of the handler's own may fail as well, and that is the handler's affair.
func (w *run) fails() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	failed := w.transaction.failure()
	if w.verdict != undecided || failed == nil || errors.Is(failed.err, ErrSessionGone) {
		return false
	}
	w.lose(failed.token, failed.err, true)
	return true
}

// trailing is the body of a run, whose trailers are there when it was read, as those of the
// request.
type trailing struct {
	io.ReadCloser
	request, run *http.Request
}

func (b trailing) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.run.Trailer = b.request.Trailer
	}
	return n, err
}

// routing is the context of a run, and finds routers outside of Retry that keep what is left of the
// path in the context, as chi does: inside of such a router the handler of a second run would be
// another's. It looks at what the run asks the request's context for, before the run can have
// changed it.
type routing struct {
	context.Context
	path string

	mu   sync.Mutex
	left map[any]string // by the pointer that the context holds: the strings there
}

// Value implements context.Context.
func (c *routing) Value(key any) any {
	v := c.Context.Value(key)
	if p := reflect.ValueOf(v); p.Kind() == reflect.Pointer && !p.IsNil() && routable(p.Elem()) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if _, seen := c.left[v]; !seen {
			if c.left == nil {
				c.left = make(map[any]string)
			}
			c.left[v] = routeOf(p.Elem())
		}
	}
	return v
}

// consumed reports whether a router has consumed a part of the path in this run.
func (c *routing) consumed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for v, before := range c.left {
		now := routeOf(reflect.ValueOf(v).Elem())
		if now != before && now != c.path && now != "" && strings.HasSuffix(c.path, now) {
			return true
		}
	}
	return false
}

// routable reports whether a router could keep what is left of the path there.
func routable(v reflect.Value) bool {
	if v.Kind() == reflect.String {
		return true
	}
	if v.Kind() != reflect.Struct {
		return false
	}
	f, ok := v.Type().FieldByName("RoutePath")
	return ok && len(f.Index) == 1 && f.Type.Kind() == reflect.String
}

// routeOf returns what a router keeps there.
func routeOf(v reflect.Value) string {
	if v.Kind() == reflect.Struct {
		v = v.FieldByName("RoutePath")
	}
	return v.String()
}
