package etcdstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"github.com/alexedwards/scs/v2"
)

const (
	// maxRuns bounds how often Retry runs a handler for one request.
	maxRuns = 64
	// maxReplay is how much of a request's body Retry keeps.
	maxReplay = 1 << 20
)

// Retry runs next again, as a new transaction, when its commit lost against another request: the session was changed on
// the same key (ErrConflict), or was deleted (ErrSessionGone). It goes outside of LoadAndSave:
//
//	handler := store.Retry(sessionManager.LoadAndSave(mux))
//
// It is for handlers whose only effect is the session. scs commits at the handler's first write, before a byte has
// reached the client, so nothing is buffered: at the first write the outcome is known, and either everything passes
// straight through, so that streaming and flushing work as without Retry, or what this run writes is dropped, headers
// included, and the handler runs again. A handler that flushes, or hijacks the connection, before its first write has
// answered and does not run again.
//
// The request's body is kept up to 1 MiB for the next run; with a larger one the handler does not run again. There are
// up to 64 runs with a random wait between them, and the requests of one session that have lost take turns within the
// process. After the last one ErrorFunc answers. A panic of next passes through.
func (e *EtcdStore) Retry(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header().Clone()
		body := &replay{source: r.Body}
		giveBack := func() {}
		defer func() { giveBack() }()
		for run := 1; ; run++ {
			t := newTransaction()
			rw := &retryWriter{ResponseWriter: w, transaction: t, body: body}
			again := r.Clone(context.WithValue(r.Context(), contextKey{}, t))
			if r.Body != nil && r.Body != http.NoBody {
				again.Body = body.rewind()
			}
			next.ServeHTTP(rw, again)
			if !rw.lost() {
				return
			}
			giveBack()
			giveBack = func() {}
			clear(w.Header())
			maps.Copy(w.Header(), header.Clone())
			token, defeat := t.defeat()
			if run == maxRuns {
				ErrorFunc(w, r, fmt.Errorf("%w: gave up after %d runs: %w", ErrConflict, run, defeat))
				return
			}
			turn, err := e.locks.turns.take(r.Context(), token)
			if err != nil {
				return // the client has gone
			}
			giveBack = turn
			time.Sleep(rand.N(time.Millisecond << min(run, 6)))
		}
	})
}

// retryWriter passes a run's response through once it is known that the run has not lost.
type retryWriter struct {
	http.ResponseWriter
	transaction *transaction
	body        *replay
	verdict     verdict
}

type verdict int

const (
	undecided verdict = iota
	passes
	dropped
)

// lost decides about the run and reports whether it has lost. It is called at the run's first write, which comes after
// its commit, or at its end. A run that cannot be repeated passes: scs's ErrorFunc has answered.
func (w *retryWriter) lost() bool {
	if w.verdict == undecided {
		w.verdict = passes
		if _, err := w.transaction.defeat(); err != nil && !w.body.overflowed {
			w.verdict = dropped
		}
	}
	return w.verdict == dropped
}

func (w *retryWriter) WriteHeader(code int) {
	if !w.lost() {
		w.ResponseWriter.WriteHeader(code)
	}
}

func (w *retryWriter) Write(b []byte) (int, error) {
	if w.lost() {
		return len(b), nil
	}
	return w.ResponseWriter.Write(b)
}

// FlushError is what http.ResponseController.Flush calls.
func (w *retryWriter) FlushError() error {
	if w.lost() {
		return nil
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// Flush implements http.Flusher.
func (w *retryWriter) Flush() { _ = w.FlushError() }

// Hijack implements http.Hijacker.
func (w *retryWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	if w.lost() {
		return nil, nil, ErrConflict
	}
	return http.NewResponseController(w.ResponseWriter).Hijack()
}

// Unwrap gives http.ResponseController what does not concern the response: deadlines, full duplex.
func (w *retryWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// replay is a request's body that can be read again, as far as it was read, up to maxReplay bytes.
type replay struct {
	source     io.ReadCloser
	kept       []byte
	overflowed bool
	err        error // the source's last, io.EOF mostly
}

// rewind returns the body from its start.
func (p *replay) rewind() io.ReadCloser {
	return &replayReader{replay: p}
}

// replayReader is the body of one run.
type replayReader struct {
	*replay
	at int
}

func (r *replayReader) Read(b []byte) (int, error) {
	if r.at < len(r.kept) {
		n := copy(b, r.kept[r.at:])
		r.at += n
		return n, nil
	}
	if r.err != nil {
		return 0, r.err
	}
	n, err := r.source.Read(b)
	r.err = err
	if len(r.kept)+n > maxReplay {
		r.overflowed, r.kept, r.at = true, nil, 0
	}
	if !r.overflowed {
		r.kept = append(r.kept, b[:n]...)
		r.at += n
	}
	return n, err
}

// Close does nothing: the next run may read on. The server closes the source.
func (*replayReader) Close() error { return nil }

// Exclusive lets one request of a session run at a time, over all machines that share the store. It is for handlers with
// effects beside the session, such as a payment. sm is the session manager whose cookie names the session; Exclusive
// goes outside of its LoadAndSave:
//
//	handler := store.Exclusive(sessionManager, sessionManager.LoadAndSave(mux))
//
// Requests wait for the lock as long as their context lasts. A request without a session does not wait. A request that
// has lost its lock, because its process was paused for longer than the lock's lease lasts (15 s), cannot commit any
// more: every commit compares the ownership of the lock (fencing), and fails with ErrConflict. What such a handler does
// elsewhere is not fenced.
//
// Requests that do not go through Exclusive are not kept out; what they commit is merged as always. Without contention
// the lock costs two round trips.
func (e *EtcdStore) Exclusive(sm *scs.SessionManager, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		t := explicit(ctx)
		if t == nil {
			t = newTransaction()
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
			defer held.unlock()
			t.guard = held.guard()
		}
		next.ServeHTTP(w, r)
	})
}

// exclude locks a session. The lock counts as a call until it is released.
func (e *EtcdStore) exclude(ctx context.Context, token string) (*lock, error) {
	if !e.enter() {
		return nil, ErrClosed
	}
	held, err := e.locks.lock(ctx, token)
	if err != nil {
		e.calls.Done()
	}
	return held, err
}

// ErrorFunc is for scs.SessionManager.ErrorFunc. It answers
//
//   - ErrSessionGone with nothing: the user has logged out, there is nothing to save, and the handler's response passes
//     without a cookie;
//   - ErrConflict with 409;
//   - ErrOutcomeUnknown, and what says that etcd is not available, with 503 and Retry-After;
//   - everything else with 500.
//
// It logs all but the first with slog. Note that scs lets the handler's body follow what ErrorFunc writes.
func ErrorFunc(w http.ResponseWriter, r *http.Request, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, ErrSessionGone) && !errors.Is(err, ErrConflict):
		return
	case errors.Is(err, ErrConflict):
		status = http.StatusConflict
	case errors.Is(err, ErrOutcomeUnknown), unavailable(err):
		status = http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	slog.ErrorContext(r.Context(), "etcdstore: session not loaded or saved", "method", r.Method, "status", status, "error", err)
	http.Error(w, http.StatusText(status), status)
}
