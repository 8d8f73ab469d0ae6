package frameworks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/gorilla/handlers"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// jsonErrors is an application's own ErrorFunc.
type jsonErrors struct {
	answered, repeated atomic.Int32
}

func (j *jsonErrors) answer(w http.ResponseWriter, r *http.Request, err error) {
	if etcdstore.WillRetry(r) {
		j.repeated.Add(1)
		return
	}
	j.answered.Add(1)
	status := http.StatusServiceUnavailable
	if errors.Is(err, etcdstore.ErrConflict) {
		status = http.StatusConflict
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]int{"error": status})
}

// newJSONApp is an application that answers errors as JSON, everywhere.
func newJSONApp(t *testing.T, opts ...etcdstore.Option) (*app, *jsonErrors) {
	t.Helper()
	j := new(jsonErrors)
	a := newApp(t, append(opts, etcdstore.WithErrorFunc(j.answer))...)
	a.sm.ErrorFunc = j.answer
	return a, j
}

// want fails the test unless the client got the one JSON answer, alone, and the function gave no
// other.
func (j *jsonErrors) want(t *testing.T, got answer, status int) {
	t.Helper()
	got.want(t, status, fmt.Sprintf("{\"error\":%d}\n", status))
	if kind := got.header.Get("Content-Type"); kind != "application/json" {
		t.Errorf("Content-Type is %q", kind)
	}
	if n := j.answered.Load(); n != 1 {
		t.Errorf("the application's ErrorFunc has answered %d times", n)
	}
}

// unavailable makes etcd unreachable for the store until the test ends, or the result is called.
func (a *app) unavailable() (back func()) {
	a.faults.Intercept(func(string, any) etcdtest.Fate { return etcdtest.Fate{Drop: true} })
	back = func() { a.faults.Intercept(nil) }
	a.t.Cleanup(back)
	return back
}

// Runs that are repeated are not answered by the application's ErrorFunc.
func TestOwnErrorFunc_Repeated(t *testing.T) {
	a, j := newJSONApp(t)
	c := a.clicks(3)
	h := c.retried(func(w http.ResponseWriter, r *http.Request, run int32) {
		if etcdstore.WillRetry(r) {
			t.Errorf("run %d will be repeated before it has lost", run)
		}
		fmt.Fprint(w, "run ", run)
		if lost := run <= 3; etcdstore.WillRetry(r) != lost {
			t.Errorf("run %d has lost: %v, and WillRetry says otherwise", run, lost)
		}
	})
	a.get(h, c.token).want(t, http.StatusOK, "run 4")
	if n, m := j.answered.Load(), j.repeated.Load(); n != 0 || m != 3 {
		t.Errorf("the application's ErrorFunc has answered %d times, and heard of %d repeated runs", n, m)
	}
	c.wantN(t, c.token, 3001)
}

// What Retry cannot repeat is answered once, by the application's ErrorFunc, alone.
func TestOwnErrorFunc_Conflict(t *testing.T) {
	cluster := etcdtest.New(t, etcdtest.Config{})
	for name, tt := range map[string]struct {
		losing  int32
		body    int
		written bool
		once    bool // the chain around LoadAndSave runs only once
	}{
		"gives up":   {losing: 1 << 30},
		"large body": {losing: 1, body: 1<<20 + 1},
		"written":    {losing: 1, written: true},
		"elsewhere":  {losing: 1, once: true},
	} {
		t.Run(name, func(t *testing.T) {
			j := new(jsonErrors)
			a := newAppOn(t, cluster, etcdstore.WithErrorFunc(j.answer))
			a.sm.ErrorFunc = j.answer
			c := a.clicks(tt.losing)
			h := a.sm.LoadAndSave(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				if tt.written {
					if err := a.store.DeleteCtx(r.Context(), a.login()); err != nil {
						t.Error(err)
					}
				}
				c.do(r)
				w.Header().Set("Content-Type", "text/html")
				fmt.Fprint(w, "<p>the handler's page")
			}))
			var calls atomic.Int32
			once := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if calls.Add(1) == 1 || !tt.once {
					h.ServeHTTP(w, r)
				}
			})
			got := a.post(a.store.Retry(once), c.token, bytes.NewReader(make([]byte, tt.body)))
			j.want(t, got, http.StatusConflict)
		})
	}
}

// Where etcd is lost, the application's ErrorFunc says so once, alone: at the lock, at the load,
// and at the commit.
func TestOwnErrorFunc_Unavailable(t *testing.T) {
	for how, around := range map[string]func(a *app, h http.Handler) http.Handler{
		"Retry": func(a *app, h http.Handler) http.Handler { return a.store.Retry(h) },
		"Exclusive": func(a *app, h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, h)
		},
		"Exclusive(Retry)": func(a *app, h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, a.store.Retry(h))
		},
	} {
		for _, when := range []string{"before", "at the commit"} {
			if how == "Exclusive" && when == "at the commit" {
				continue // the handler's body follows, as scs has it without Retry
			}
			t.Run(how+"/"+when, func(t *testing.T) {
				a, j := newJSONApp(t, etcdstore.WithTimeout(300*time.Millisecond))
				c := a.clicks(0)
				h := c.handler(func(w http.ResponseWriter, _ *http.Request, _ int32) {
					if when == "at the commit" {
						a.unavailable()
					}
					fmt.Fprint(w, "the handler's page")
				})
				s := serve(t, around(a, a.sm.LoadAndSave(h)))
				if when == "before" {
					a.unavailable()
				}
				req := s.request(http.MethodGet, "/", c.token, nil)
				j.want(t, s.do(req), http.StatusServiceUnavailable)
				a.faults.Intercept(nil)
			})
		}
	}
}

// Exclusive answers with the application's ErrorFunc where the store is closed.
func TestOwnErrorFunc_Closed(t *testing.T) {
	a, j := newJSONApp(t)
	token := a.login()
	if err := a.store.Close(); err != nil {
		t.Fatal(err)
	}
	h := a.store.Exclusive(a.sm, a.sm.LoadAndSave(http.HandlerFunc(text)))
	j.want(t, a.get(h, token), http.StatusServiceUnavailable)
}

// An ErrorFunc that does not ask WillRetry is not heard in the runs that are repeated, and its
// headers are gone.
func TestOwnErrorFunc_DoesNotAsk(t *testing.T) {
	a := newApp(t)
	a.sm.ErrorFunc = func(w http.ResponseWriter, _ *http.Request, _ error) {
		w.Header().Set("X-Error", "yes")
		http.Error(w, "conflict", http.StatusConflict)
	}
	c := a.clicks(2)
	h := c.retried(func(w http.ResponseWriter, _ *http.Request, run int32) {
		fmt.Fprint(w, "run ", run)
	})
	got := a.get(h, c.token)
	got.want(t, http.StatusOK, "run 3")
	if got.header.Get("X-Error") != "" {
		t.Error("a header of a dropped answer is there")
	}
}

// Without WithErrorFunc, and with a nil one, ErrorFunc answers for Retry and Exclusive.
func TestOwnErrorFunc_Default(t *testing.T) {
	for name, opts := range map[string][]etcdstore.Option{
		"none": nil, "nil": {etcdstore.WithErrorFunc(nil)},
	} {
		t.Run(name, func(t *testing.T) {
			a := newApp(t, opts...)
			c := a.clicks(1 << 30)
			h := c.retried(func(w http.ResponseWriter, _ *http.Request, _ int32) { fmt.Fprint(w, "text") })
			a.get(h, c.token).want(t, http.StatusConflict, conflictPage)
		})
	}
}

// An ErrorFunc of WithErrorFunc that aborts, aborts, as net/http has it.
func TestOwnErrorFunc_Aborts(t *testing.T) {
	abort := func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
	a := newApp(t, etcdstore.WithErrorFunc(abort))
	a.sm.ErrorFunc = abort
	c := a.clicks(1)
	h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprint(w, "text")
	})
	got := a.post(h, c.token, bytes.NewReader(make([]byte, 1<<20+1)))
	if !got.failed {
		t.Errorf("answered %d %q", got.status, got.body)
	}
	c.wantRuns(t, 1)
}

// Outside of a run that has lost WillRetry says no.
func TestWillRetry_No(t *testing.T) {
	a := newApp(t)
	if etcdstore.WillRetry(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)) {
		t.Error("a request without any store will be repeated")
	}
	for how, mw := range a.around() {
		t.Run(how, func(t *testing.T) {
			c := a.clicks(0)
			a.get(mw(c.handler(func(w http.ResponseWriter, r *http.Request, _ int32) {
				before := etcdstore.WillRetry(r)
				fmt.Fprint(w, "text")
				if before || etcdstore.WillRetry(r) {
					t.Error("a run that has passed will be repeated")
				}
			})), c.token).want(t, http.StatusOK, "text")
		})
	}
}

// ErrorFunc removes the headers that describe the handler's body, and leaves the others.
func TestErrorFunc_Headers(t *testing.T) {
	describing := map[string]string{
		"Accept-Ranges":       "bytes",
		"Cache-Control":       "private, max-age=3600",
		"Content-Disposition": `attachment; filename="report.csv"`,
		"Content-Encoding":    "gzip",
		"Content-Language":    "fr",
		"Content-Length":      "4",
		"Content-Location":    "/page.fr",
		"Content-Range":       "bytes 0-3/10",
		"Etag":                `"page-1"`,
		"Expires":             "Thu, 01 Dec 2033 16:00:00 GMT",
		"Last-Modified":       "Thu, 01 Dec 1994 16:00:00 GMT",
	}
	others := map[string]string{
		"Access-Control-Allow-Origin": "https://example.com",
		"Content-Security-Policy":     "default-src 'self'",
		"Set-Cookie":                  "theme=dark",
		"Strict-Transport-Security":   "max-age=63072000",
		"Vary":                        "Cookie",
		"X-Request-Id":                "1",
	}
	for name, err := range map[string]error{
		"conflict":    etcdstore.ErrConflict,
		"unavailable": rpctypes.ErrTimeout,
		"other":       etcdstore.ErrTooLarge,
	} {
		for header, value := range describing {
			t.Run(name+"/"+header, func(t *testing.T) {
				rec := httptest.NewRecorder()
				rec.Header().Set(header, value)
				for key, value := range others {
					rec.Header().Set(key, value)
				}
				req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
				etcdstore.ErrorFunc(rec, req, err)
				if got := rec.Header().Get(header); got == value {
					t.Errorf("%s: %s is still there", header, got)
				}
				for key, value := range others {
					if got := rec.Header().Get(key); got != value {
						t.Errorf("%s is %q, want %q", key, got, value)
					}
				}
				if got := rec.Header().Get("Content-Type"); got != "text/plain; charset=utf-8" {
					t.Errorf("Content-Type is %q", got)
				}
			})
		}
	}
}

// A session that is gone is nothing to answer: the handler's headers stay as they are.
func TestErrorFunc_GoneLeavesHeaders(t *testing.T) {
	rec := httptest.NewRecorder()
	rec.Header().Set("Etag", `"page-1"`)
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	etcdstore.ErrorFunc(rec, req, etcdstore.ErrSessionGone)
	if got := rec.Header().Get("Etag"); got != `"page-1"` || rec.Body.Len() != 0 {
		t.Errorf("Etag is %q, the body %q", got, rec.Body)
	}
}

// The page of ErrorFunc can be read where a compressing middleware has promised gzip, or a handler
// has described its body.
func TestErrorFunc_Readable(t *testing.T) {
	a := newApp(t)
	for name, compress := range map[string]middleware{
		"gorilla": handlers.CompressHandler,
		"chi":     chimiddleware.Compress(5),
		"file":    plain,
	} {
		for how, around := range map[string]middleware{
			"LoadAndSave": plain,
			"Retry":       a.store.Retry,
			"Exclusive":   func(h http.Handler) http.Handler { return a.store.Exclusive(a.sm, h) },
		} {
			t.Run(name+"/"+how, func(t *testing.T) {
				c := a.clicks(1 << 30)
				h := compress(c.handler(func(w http.ResponseWriter, r *http.Request, _ int32) {
					w.Header().Set("Cache-Control", "private, max-age=3600")
					w.Header().Set("Etag", `"page-1"`)
					at := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
					http.ServeContent(w, r, "page.txt", at, strings.NewReader(strings.Repeat("page ", 500)))
				}))
				s := serve(t, around(a.sm.LoadAndSave(h)))
				req := s.request(http.MethodGet, "/", c.token, nil)
				req.Header.Set("Accept-Encoding", "gzip")
				if name == "file" {
					req.Header.Set("Range", "bytes=0-3")
				}
				got := s.do(req)
				if got.status != http.StatusConflict || !strings.HasPrefix(got.body, conflictPage) {
					t.Errorf("answer %d %.40q", got.status, got.body)
				}
				for _, key := range []string{
					"Content-Encoding", "Etag", "Last-Modified", "Content-Range", "Cache-Control",
				} {
					if v := got.header.Get(key); v != "" {
						t.Errorf("%s: %s", key, v)
					}
				}
				if how == "Retry" && (got.failed || got.body != conflictPage) {
					t.Errorf("the page is not alone, or was cut (%v): %.40q", got.failed, got.body)
				}
			})
		}
	}
}

// A conflict is a matter of the users' and is logged at Info; a lost etcd is at Error. Neither has
// a token in it, and runs that are repeated are not logged.
func TestErrorFunc_Log(t *testing.T) {
	levels := func(b *buffer) string {
		return fmt.Sprintf("%d INFO, %d WARN, %d ERROR",
			b.counts("level=INFO"), b.counts("level=WARN"), b.counts("level=ERROR"))
	}
	for name, tt := range map[string]struct {
		serve func(a *app, c *clicks) http.Handler
		want  string
	}{
		"conflict": {func(a *app, c *clicks) http.Handler {
			c.losing = 1
			return a.sm.LoadAndSave(c.handler(func(http.ResponseWriter, *http.Request, int32) {}))
		}, "1 INFO, 0 WARN, 0 ERROR"},
		"Retry gives up": {func(_ *app, c *clicks) http.Handler {
			c.losing = 1 << 30
			return c.retried(func(http.ResponseWriter, *http.Request, int32) {})
		}, "1 INFO, 0 WARN, 0 ERROR"},
		"repeated": {func(_ *app, c *clicks) http.Handler {
			c.losing = 2
			return c.retried(func(http.ResponseWriter, *http.Request, int32) {})
		}, "0 INFO, 0 WARN, 0 ERROR"},
		"etcd lost": {func(a *app, _ *clicks) http.Handler {
			a.unavailable()
			return a.sm.LoadAndSave(http.HandlerFunc(text))
		}, "0 INFO, 0 WARN, 1 ERROR"},
		"etcd lost, Exclusive": {func(a *app, _ *clicks) http.Handler {
			a.unavailable()
			return a.store.Exclusive(a.sm, http.HandlerFunc(text))
		}, "0 INFO, 0 WARN, 1 ERROR"},
		"etcd lost at the commit": {func(a *app, c *clicks) http.Handler {
			return c.retried(func(w http.ResponseWriter, _ *http.Request, _ int32) {
				a.unavailable()
				fmt.Fprint(w, "text")
			})
		}, "0 INFO, 0 WARN, 1 ERROR"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newApp(t, etcdstore.WithTimeout(300*time.Millisecond))
			c := a.clicks(0)
			logged := captureLog(t)
			h := tt.serve(a, c)
			a.get(h, c.token)
			a.faults.Intercept(nil)
			if got := levels(logged); got != tt.want {
				t.Errorf("logged %s, want %s:\n%s", got, tt.want, logged)
			}
			if logged.counts(c.token) != 0 {
				t.Error("the token is in the log")
			}
		})
	}
}
