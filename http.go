package etcdstore

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"github.com/seed210be38d/etcdstore/internal/etcd"
)

// ErrorFunc is for scs.SessionManager.ErrorFunc. It answers
//
//   - [ErrSessionGone] with nothing: the user has logged out, there is nothing to save, and the
//     handler's response passes without a cookie;
//   - [ErrConflict] with 409;
//   - [ErrOutcomeUnknown], and what says that etcd is not available, with 503 and Retry-After;
//   - everything else with 500.
//
// It removes the headers that describe the handler's body, and logs with slog, unless the client
// has gone: a conflict at Info, since two requests of one user are no fault, everything else but
// the first at Error. In a run that Retry drops it does nothing. Note that scs lets the handler's
// body follow what ErrorFunc writes; Retry does not.
func ErrorFunc(w http.ResponseWriter, r *http.Request, err error) {
	if WillRetry(r) {
		return
	}
	status, level := http.StatusInternalServerError, slog.LevelError
	switch {
	case errors.Is(err, ErrSessionGone) && !errors.Is(err, ErrConflict):
		return
	case errors.Is(err, ErrConflict):
		status, level = http.StatusConflict, slog.LevelInfo
	case errors.Is(err, ErrOutcomeUnknown), etcd.Unavailable(err):
		status = http.StatusServiceUnavailable
	}
	for _, name := range describing {
		w.Header().Del(name)
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "1")
	}
	if !errors.Is(r.Context().Err(), context.Canceled) { // else the client has gone, mostly: a server's BaseContext may end, too
		slog.Log(r.Context(), level, "etcdstore: session not loaded or saved", "method", r.Method, "status", status, "error", err)
	}
	http.Error(w, http.StatusText(status), status)
}

// describing are the headers that describe the body of a response, and would be wrong for another.
var describing = []string{
	"Accept-Ranges", "Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Length",
	"Content-Location", "Content-Range", "Digest", "Content-Digest", "Repr-Digest", "Etag", "Expires", "Last-Modified", "Trailer",
}
