package frameworks

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/gorilla/handlers"
	"github.com/labstack/echo/v4"
	echomiddleware "github.com/labstack/echo/v4/middleware"
	"go.etcd.io/etcd/client/v3/namespace"

	"github.com/seed210be38d/etcdstore"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// A run that has written anything, to any store, before it lost is not repeated: ErrorFunc answers,
// alone.
func TestRerun_WrittenBefore(t *testing.T) {
	cluster := etcdtest.New(t, etcdtest.Config{})
	a := newAppOn(t, cluster)
	otherPrefix := etcdstore.NewWithPrefix(cluster.Client(t), "other:")
	t.Cleanup(func() { _ = otherPrefix.Close() })
	other := a.beside("other", cluster.Client(t))
	other.sm.Store, other.sm.Codec = otherPrefix, otherPrefix.Codec()
	expiry := time.Now().Add(time.Hour)

	for name, write := range map[string]func(ctx context.Context) error{
		"Commit": func(ctx context.Context) error {
			a.sm.Put(ctx, "step", "one")
			_, _, err := a.sm.Commit(ctx)
			return err
		},
		"MergeSession": func(ctx context.Context) error {
			guest := a.login()
			return a.sm.MergeSession(ctx, guest)
		},
		"DeleteCtx of another session": func(ctx context.Context) error {
			return a.store.DeleteCtx(ctx, a.login())
		},
		"CommitCtx of another session": func(ctx context.Context) error {
			b, _, err := a.store.Find(a.login())
			if err != nil {
				return err
			}
			return a.store.CommitCtx(ctx, "another", b, expiry)
		},
		"CommitCtx in another store": func(ctx context.Context) error {
			return otherPrefix.CommitCtx(ctx, "another", []byte("any"), expiry)
		},
		"DeleteCtx in another store": func(ctx context.Context) error {
			token := login(t, other.sm)
			return otherPrefix.DeleteCtx(ctx, token)
		},
		"Commit of another manager": func(ctx context.Context) error {
			ctx, err := other.sm.Load(ctx, "")
			if err != nil {
				return err
			}
			other.sm.Put(ctx, "paid", true)
			_, _, err = other.sm.Commit(ctx)
			return err
		},
		"Commit with a context of its own": func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			a.sm.Put(ctx, "step", "one")
			_, _, err := a.sm.Commit(ctx)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(0)
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c.runs.Add(1)
				if err := write(r.Context()); err != nil {
					t.Errorf("the write: %v", err)
				}
				c.overtake(c.token)
				c.count(r)
				fmt.Fprint(w, "the handler's text")
			})
			a.get(a.store.Retry(a.sm.LoadAndSave(h)), c.token).want(t, http.StatusConflict, conflictPage)
			c.wantRuns(t, 1)
			c.wantN(t, c.token, 1000)
		})
	}
}

// MergeSession in a run that loses: the guest's cart is in the one session or in the other.
func TestRerun_MergeSession(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	guest := a.login()
	a.set(guest, "cart", "3 items")
	h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
		if err := a.sm.MergeSession(r.Context(), guest); err != nil {
			t.Errorf("MergeSession: %v", err)
		}
		fmt.Fprint(w, "merged")
	})
	got := a.get(h, c.token)
	merged, kept := a.values(c.token)["cart"] != nil, a.values(guest)["cart"] != nil
	if !got.failed && got.status < 400 && !merged {
		t.Errorf("LOST: answered %d %q; merged: %v, kept: %v", got.status, got.body, merged, kept)
	}
}

func (a *app) set(token, key string, value any) {
	a.t.Helper()
	err := a.store.Update(context.Background(), token, func(values map[string]any) error {
		values[key] = value
		return nil
	})
	if err != nil {
		a.t.Error(err)
	}
}

// A commit by hand that has lost has written nothing: the handler runs again.
func TestRerun_OwnCommitThatLost(t *testing.T) {
	a := newApp(t)
	c := a.clicks(2)
	h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
		if _, _, err := a.sm.Commit(r.Context()); err != nil {
			http.Error(w, "cannot save", http.StatusInternalServerError)
			return
		}
		fmt.Fprint(w, "saved")
	})
	a.get(h, c.token).want(t, http.StatusOK, "saved")
	c.wantRuns(t, 3)
	c.wantN(t, c.token, 2001)
}

// Reads are no writes: a run that has loaded other sessions, and listed, runs again.
func TestRerun_ReadBefore(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	another := a.login()
	h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
		if _, ok, err := a.store.FindCtx(r.Context(), another); !ok || err != nil {
			t.Errorf("FindCtx: %v %v", ok, err)
		}
		if _, err := a.store.AllCtx(r.Context()); err != nil {
			t.Errorf("AllCtx: %v", err)
		}
		fmt.Fprint(w, "text")
	})
	a.get(h, c.token).want(t, http.StatusOK, "text")
	c.wantRuns(t, 2)
	c.wantN(t, c.token, 1001)
}

// RenewToken never ends in a conflict: the user keeps the new session, after one run.
func TestRerun_RenewToken(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	var renewed string
	h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
		if err := a.sm.RenewToken(r.Context()); err != nil {
			t.Errorf("RenewToken: %v", err)
		}
		fmt.Fprint(w, "in")
		renewed = a.sm.Token(r.Context())
	})
	a.get(h, c.token).want(t, http.StatusOK, "in")
	c.wantRuns(t, 1)
	if v := a.values(renewed); v["user"] != "alice" || v["n"] != 1 || a.values(c.token) != nil {
		t.Errorf("the new session holds %v, the old one %v", v, a.values(c.token))
	}
}

// A rerun that does not load the session that was lost is none: ErrorFunc answers, and never an
// empty 200, nor what the wrong handler says.
func TestRerun_Elsewhere(t *testing.T) {
	a := newApp(t)
	for name, elsewhere := range map[string]http.HandlerFunc{
		"nothing":     func(http.ResponseWriter, *http.Request) {},
		"text":        text,
		"not found":   http.NotFound,
		"status":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) },
		"flush first": func(w http.ResponseWriter, _ *http.Request) { w.(http.Flusher).Flush() },
		"header": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Elsewhere", "yes")
		},
		"another session": func(w http.ResponseWriter, r *http.Request) {
			r.Header.Set("Cookie", "session="+a.login())
			a.sm.LoadAndSave(http.HandlerFunc(text)).ServeHTTP(w, r)
		},
		"no session": func(w http.ResponseWriter, r *http.Request) {
			r.Header.Del("Cookie")
			a.sm.LoadAndSave(http.HandlerFunc(text)).ServeHTTP(w, r)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(1)
			var calls atomic.Int32
			first := a.sm.LoadAndSave(c.handler(func(w http.ResponseWriter, _ *http.Request, _ int32) {
				fmt.Fprint(w, "first")
			}))
			got := a.get(a.store.Retry(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if calls.Add(1) == 1 {
					first.ServeHTTP(w, r)
				} else {
					elsewhere(w, r)
				}
			})), c.token)
			got.want(t, http.StatusConflict, conflictPage)
			if got.header.Get("X-Elsewhere") != "" {
				t.Error("headers of the rerun are on the page")
			}
			c.wantRuns(t, 1)
			c.wantN(t, c.token, 1000)
		})
	}
}

// A chain inside of LoadAndSave that runs only once: the rerun loads the session and does nothing.
// That is an error answer, too, never an empty 200 with the change lost.
func TestRerun_ChainThatRunsOnce(t *testing.T) {
	a := newApp(t)
	for name, write := range map[string]func(w http.ResponseWriter){
		"text":    func(w http.ResponseWriter) { fmt.Fprint(w, "text") },
		"nothing": func(http.ResponseWriter) {},
		"status":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated) },
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(1)
			var calls atomic.Int32
			h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if calls.Add(1) == 1 {
					c.do(r)
					write(w)
				}
			})
			got := a.get(a.store.Retry(a.sm.LoadAndSave(h)), c.token)
			if !got.failed && got.status < 400 {
				t.Errorf("LOST: answered %d %q after %d runs; the session holds %v",
					got.status, got.body, c.runs.Load(), a.values(c.token))
			}
		})
	}
}

// A rerun may come out otherwise: it reads what the other has left, and refuses, or has nothing to
// do.
func TestRerun_ComesOutOtherwise(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	h := a.store.Retry(a.sm.LoadAndSave(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n := a.sm.GetInt(r.Context(), "n"); n > 0 {
			c.runs.Add(1)
			http.Error(w, fmt.Sprint("sold out: ", n), http.StatusGone)
			return
		}
		c.do(r)
		fmt.Fprint(w, "sold")
	})))
	a.get(h, c.token).want(t, http.StatusGone, "sold out: 1000\n")
	c.wantRuns(t, 2)
	c.wantN(t, c.token, 1000)
}

// Writes and flushes of a run that has lost fail, so that a stream that ends when its client has
// gone ends then, too, and the handler runs again.
// (The error of a flush as well, but scs's own writer drops that.)
func TestRerun_LostWritesFail(t *testing.T) {
	a := newApp(t)
	const enough = 10000 // writes that a run may make before it is one that does not end
	for name, stream := range map[string]func(w http.ResponseWriter) error{
		"Write": func(w http.ResponseWriter) error {
			_, err := w.Write([]byte("data\n"))
			return err
		},
		"WriteString": func(w http.ResponseWriter) error {
			_, err := io.WriteString(w, "data\n")
			return err
		},
		"Copy": func(w http.ResponseWriter) error {
			_, err := io.Copy(w, strings.NewReader("data\n"))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(1)
			h := c.retried(func(w http.ResponseWriter, _ *http.Request, run int32) {
				n, err := 0, error(nil)
				for n < enough && err == nil && (run == 1 || n < 2) {
					n++
					err = stream(w)
				}
				if (run == 1) != (err != nil) {
					t.Errorf("run %d ended after %d writes, with %v", run, n, err)
				}
			})
			a.get(h, c.token).want(t, http.StatusOK, "data\ndata\n")
			c.wantRuns(t, 2)
			c.wantN(t, c.token, 1001)
		})
	}
}

// A run that has lost cannot take the connection, or send early hints.
func TestRerun_LostRunSendsNothing(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	h := c.retried(func(w http.ResponseWriter, _ *http.Request, run int32) {
		w.Header().Set("X-Run", fmt.Sprint(run))
		fmt.Fprint(w, "run ", run)
		if run > 1 {
			return
		}
		w.WriteHeader(http.StatusEarlyHints)
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
			_ = conn.Close()
			t.Error("the run that has lost has the connection")
		}
	})
	got := a.get(h, c.token)
	got.want(t, http.StatusOK, "run 2")
	if len(got.early) != 0 || got.header.Get("X-Run") != "2" {
		t.Errorf("answer %+v", got)
	}
}

// http.ErrAbortHandler out of a session manager's ErrorFunc is a lost run like another.
func TestRerun_ErrorFuncAborts(t *testing.T) {
	a := newApp(t)
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		for kind, write := range map[string]bool{"writes": true, "writes nothing": false} {
			t.Run(method+"/"+kind, func(t *testing.T) {
				c := a.clicks(2)
				a.sm.ErrorFunc = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
				s := serve(t, c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
					b, err := io.ReadAll(r.Body)
					if err != nil {
						t.Error(err)
					}
					if write {
						fmt.Fprintf(w, "got %s", b)
					}
				}))
				var body io.Reader
				want := ""
				if method == http.MethodPost {
					body = strings.NewReader("x")
				}
				if write {
					want = "got " + map[string]string{http.MethodPost: "x"}[method]
				}
				s.do(s.request(method, "/", c.token, body)).want(t, http.StatusOK, want)
				c.wantRuns(t, 3)
				c.wantN(t, c.token, 2001)
			})
		}
	}
}

// The middleware of frameworks that recovers panics does not keep such a run from being repeated.
func TestRerun_ErrorFuncAbortsInRecoverer(t *testing.T) {
	a := newApp(t)
	a.sm.ErrorFunc = func(http.ResponseWriter, *http.Request, error) {
		panic(http.ErrAbortHandler)
	}
	for name, recoverer := range map[string]middleware{
		"chi":     chimiddleware.Recoverer,
		"gorilla": handlers.RecoveryHandler(handlers.RecoveryLogger(silent{})),
		"gin": func(h http.Handler) http.Handler {
			e := gin.New()
			e.Use(gin.CustomRecoveryWithWriter(io.Discard, func(c *gin.Context, _ any) {
				c.AbortWithStatus(http.StatusInternalServerError)
			}))
			e.NoRoute(func(c *gin.Context) {
				c.Status(http.StatusOK)
				h.ServeHTTP(c.Writer, c.Request)
			})
			return e
		},
		"echo": func(h http.Handler) http.Handler {
			e := echo.New()
			e.Use(echomiddleware.RecoverWithConfig(echomiddleware.RecoverConfig{
				LogErrorFunc: func(_ echo.Context, err error, _ []byte) error { return err },
			}))
			e.GET("/", echo.WrapHandler(h))
			return e
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(2)
			h := c.handler(func(w http.ResponseWriter, _ *http.Request, run int32) {
				fmt.Fprint(w, "run ", run)
			})
			a.get(a.store.Retry(recoverer(a.sm.LoadAndSave(h))), c.token).want(t, http.StatusOK, "run 3")
			c.wantN(t, c.token, 2001)
		})
	}
}

// Each run reads the body and then the request's trailers, whatever the one before has read of them.
func TestRerun_RequestTrailers(t *testing.T) {
	a := newApp(t)
	for _, http2 := range []bool{false, true} {
		for kind, first := range map[string]int64{"none": 0, "some": 10, "all": 1 << 20} {
			t.Run(fmt.Sprintf("HTTP2 %v/%s read at first", http2, kind), func(t *testing.T) {
				c := a.clicks(1)
				h := c.retried(func(w http.ResponseWriter, r *http.Request, run int32) {
					if run == 1 {
						_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, first))
						return
					}
					n, err := io.Copy(io.Discard, r.Body)
					fmt.Fprint(w, n, err, r.Trailer)
				})
				s := serve(t, h, func(srv *httptest.Server) { srv.EnableHTTP2 = http2 })
				body := struct{ io.Reader }{strings.NewReader(strings.Repeat("x", 100<<10))}
				req := s.request(http.MethodPost, "/", c.token, body)
				req.Trailer = http.Header{"X-Sum": {"42"}}
				s.do(req).want(t, http.StatusOK, "102400 <nil> map[X-Sum:[42]]")
				c.wantN(t, c.token, 1001)
			})
		}
	}
}

// An abort that does not come from a lost commit is the application's, and aborts, as net/http has
// it.
func TestRerun_HandlerAborts(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	h := c.retried(func(http.ResponseWriter, *http.Request, int32) { panic(http.ErrAbortHandler) })
	if got := a.get(h, c.token); !got.failed {
		t.Errorf("answered %d %q", got.status, got.body)
	}
	c.wantRuns(t, 1)
	c.wantN(t, c.token, 1000)
}

// Where the handler cannot run again, its body does not follow the page of ErrorFunc.
func TestRerun_LargeBody(t *testing.T) {
	a := newApp(t)
	for name, respond := range map[string]func(w http.ResponseWriter){
		"text":    func(w http.ResponseWriter) { fmt.Fprint(w, strings.Repeat("the handler's ", 9999)) },
		"status":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusCreated) },
		"nothing": func(http.ResponseWriter) {},
		"with length": func(w http.ResponseWriter) {
			w.Header().Set("Content-Length", "4")
			fmt.Fprint(w, "text")
		},
		"flushed": func(w http.ResponseWriter) {
			for range 3 {
				fmt.Fprint(w, "text")
				_ = http.NewResponseController(w).Flush()
			}
		},
	} {
		for kind, chunked := range map[string]bool{"sized": false, "chunked": true} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				c := a.clicks(1)
				h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) {
					if n, err := io.Copy(io.Discard, r.Body); err != nil {
						t.Errorf("after %d bytes: %v", n, err)
					}
					respond(w)
				})
				var body io.Reader = bytes.NewReader(make([]byte, 1<<20+1))
				if chunked {
					body = struct{ io.Reader }{body}
				}
				a.post(h, c.token, body).want(t, http.StatusConflict, conflictPage)
				c.wantRuns(t, 1)
				c.wantN(t, c.token, 1000)
			})
		}
	}
}

// After the last of its runs a request is answered by ErrorFunc, alone.
func TestRerun_GivesUp(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1 << 30)
	h := c.retried(func(w http.ResponseWriter, _ *http.Request, _ int32) {
		w.Header().Set("X-Lost", "yes")
		fmt.Fprint(w, "text")
	})
	got := a.get(h, c.token)
	got.want(t, http.StatusConflict, conflictPage)
	if got.header.Get("X-Lost") != "" || got.header.Get("Set-Cookie") != "" {
		t.Errorf("headers of a lost run are on the page: %v", got.header)
	}
}

// The guard of Exclusive counts for its own store only: what the request saves in another one, that
// does not have the lock's key, is saved.
func TestExclusive_OtherStore(t *testing.T) {
	cluster := etcdtest.New(t, etcdtest.Config{})
	a := newAppOn(t, cluster)
	cli := cluster.Client(t)
	cli.KV, cli.Lease = namespace.NewKV(cli.KV, "b/"), namespace.NewLease(cli.Lease, "b/")
	cli.Watcher = namespace.NewWatcher(cli.Watcher, "b/")
	apart := a.beside("other", cli)
	prefixed := a.beside("other", cluster.Client(t))
	store := etcdstore.NewWithPrefix(cluster.Client(t), "b:")
	t.Cleanup(func() { _ = store.Close() })
	prefixed.sm.Store, prefixed.sm.Codec, prefixed.store = store, store.Codec(), store
	for where, b := range map[string]*app{"namespace": apart, "prefix": prefixed} {
		for how, wrap := range map[string]middleware{
			"Exclusive(other(own))": func(h http.Handler) http.Handler {
				return a.store.Exclusive(a.sm, b.sm.LoadAndSave(a.sm.LoadAndSave(h)))
			},
			"Exclusive(own(other))": func(h http.Handler) http.Handler {
				return a.store.Exclusive(a.sm, a.sm.LoadAndSave(b.sm.LoadAndSave(h)))
			},
			"other(Exclusive(own))": func(h http.Handler) http.Handler {
				return b.sm.LoadAndSave(a.store.Exclusive(a.sm, a.sm.LoadAndSave(h)))
			},
			"both Exclusive": func(h http.Handler) http.Handler {
				h = a.sm.LoadAndSave(b.sm.LoadAndSave(h))
				return a.store.Exclusive(a.sm, b.store.Exclusive(b.sm, h))
			},
			"Retry(Exclusive(other(own)))": func(h http.Handler) http.Handler {
				h = b.sm.LoadAndSave(a.sm.LoadAndSave(h))
				return a.store.Retry(a.store.Exclusive(a.sm, h))
			},
		} {
			t.Run(where+"/"+how, func(t *testing.T) {
				token, other := a.login(), b.login()
				s := serve(t, wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					a.count(r)
					b.count(r)
					fmt.Fprint(w, "ok")
				})))
				req := s.request(http.MethodGet, "/", token, nil)
				req.AddCookie(&http.Cookie{Name: "other", Value: other})
				s.do(req).want(t, http.StatusOK, "ok")
				a.wantN(t, token, 1)
				b.wantN(t, other, 1)
			})
		}
	}
}

// A request that has lost its lock cannot commit in the lock's store.
func TestExclusive_LostLock(t *testing.T) {
	a := newApp(t)
	admin := a.cluster.Client(t)
	token := a.login()
	h := a.store.Exclusive(a.sm, a.sm.LoadAndSave(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			a.count(r)
			for _, key := range etcdtest.Keys(t, admin, "scs:session:~") {
				if strings.Contains(key, "lock") {
					if _, err := admin.Delete(context.Background(), key); err != nil {
						t.Error(err)
					}
				}
			}
			_, _, err := a.sm.Commit(r.Context())
			if !errors.Is(err, etcdstore.ErrConflict) {
				t.Errorf("the commit: %v", err)
			}
			fmt.Fprint(w, "text")
		})))
	if got := a.get(h, token); got.status != http.StatusConflict {
		t.Errorf("answered %d %q", got.status, got.body)
	}
	a.wantN(t, token, 0)
}
