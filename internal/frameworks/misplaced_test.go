package frameworks

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/alexedwards/scs/v2"
	"github.com/go-chi/chi/v5"
	"github.com/gorilla/handlers"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// panics serves h, and keeps what it panics with.
func panics(value *atomic.Value, h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				value.Store(fmt.Sprint(p))
				panic(http.ErrAbortHandler)
			}
		}()
		h.ServeHTTP(w, r)
	})
}

// wantAdvice fails the test unless the panic says how to mend the wiring.
func wantAdvice(t *testing.T, value *atomic.Value, got answer) {
	t.Helper()
	p, _ := value.Load().(string)
	if p == "" {
		t.Errorf("no panic; answered %d %q", got.status, got.body)
	} else if !strings.HasPrefix(p, "etcdstore: ") || !strings.Contains(p, "LoadAndSave") {
		t.Errorf("the panic does not say how to mend it: %s", p)
	}
}

// insides are ways to put a middleware of the store inside of LoadAndSave.
func insides(a *app, of middleware) map[string]func(p placement, rt routes) http.Handler {
	return map[string]func(p placement, rt routes) http.Handler{
		"router in LoadAndSave": func(p placement, rt routes) http.Handler {
			return a.sm.LoadAndSave(p.build(of, rt))
		},
		"LoadAndSave before": func(p placement, rt routes) http.Handler {
			mw := func(next http.Handler) http.Handler { return a.sm.LoadAndSave(of(next)) }
			return p.build(mw, rt)
		},
		"LoadAndSave on both sides": func(p placement, rt routes) http.Handler {
			mw := func(next http.Handler) http.Handler { return of(a.sm.LoadAndSave(next)) }
			return a.sm.LoadAndSave(p.build(mw, rt))
		},
	}
}

// Inside of LoadAndSave Retry and Exclusive panic with advice, at the first request there is: with
// a session or without, alone or not. The handler does not run.
func TestInside_Panics(t *testing.T) {
	a := newApp(t)
	for what, of := range map[string]middleware{
		"Retry":     a.store.Retry,
		"Exclusive": func(next http.Handler) http.Handler { return a.store.Exclusive(a.sm, next) },
		"Retry(Exclusive)": func(next http.Handler) http.Handler {
			return a.store.Retry(a.store.Exclusive(a.sm, next))
		},
	} {
		for how, build := range insides(a, of) {
			for _, p := range placements {
				t.Run(what+"/"+how+"/"+p.name, func(t *testing.T) {
					var decoys atomic.Int32
					c := a.clicks(0)
					var value atomic.Value
					s := serve(t, panics(&value, build(p, c.shop(&decoys))))
					for kind, token := range map[string]string{"with": c.token, "without": ""} {
						value.Store("")
						got := s.do(s.request(http.MethodPost, itemPath, token, nil))
						t.Logf("%s a session", kind)
						wantAdvice(t, &value, got)
					}
					if n := c.runs.Load() + decoys.Load(); n != 0 {
						t.Errorf("a handler ran %d times", n)
					}
					c.wantN(t, c.token, 0)
				})
			}
		}
	}
}

// The same within a Retry that is where it belongs, whose reruns must not hide it.
func TestInside_PanicsInRetry(t *testing.T) {
	a := newApp(t)
	for what, of := range map[string]middleware{
		"Retry":     a.store.Retry,
		"Exclusive": func(next http.Handler) http.Handler { return a.store.Exclusive(a.sm, next) },
		"Retry(LoadAndSave)": func(next http.Handler) http.Handler {
			return a.store.Retry(a.sm.LoadAndSave(next))
		},
	} {
		t.Run(what, func(t *testing.T) {
			c := a.clicks(1)
			h := c.handler(func(w http.ResponseWriter, _ *http.Request, _ int32) { fmt.Fprint(w, "text") })
			var value atomic.Value
			got := a.get(panics(&value, a.store.Retry(a.sm.LoadAndSave(of(h)))), c.token)
			wantAdvice(t, &value, got)
			c.wantRuns(t, 0)
		})
	}
}

// verdict says what a misplaced middleware made of a request that lost: right, or refused. For both
// it fails the test if a change was lost, was made twice, or if another handler ran.
func (c *clicks) verdict(t *testing.T, got answer, decoys int32, body string) {
	t.Helper()
	n, _ := c.values(c.token)["n"].(int)
	others := 1000 * int(min(c.losing, c.runs.Load()))
	switch {
	case decoys != 0:
		t.Errorf("WRONG HANDLER: it ran %d times; answered %d %q", decoys, got.status, got.body)
	case !got.failed && got.status == http.StatusOK:
		if n != others+1 || got.body != body {
			t.Errorf("LOST: answered 200 %q after %d runs, counted %d, want %d",
				got.body, c.runs.Load(), n, others+1)
		}
	case got.failed || got.status == http.StatusConflict || got.status >= 500:
		if n != others {
			t.Errorf("refused with %d %q, but counted %d, want %d", got.status, got.body, n, others)
		}
	default:
		t.Errorf("answered %d %q after %d runs, counted %d", got.status, got.body, c.runs.Load(), n)
	}
}

// Retry(LoadAndSave(next)) as the middleware of a router, which cannot call next again as it was: a
// request that loses is right, or refused. It is never answered with 200 and its change lost, by
// another handler, or with a handler twice in effect.
func TestWithin_Retry(t *testing.T) {
	a := newApp(t)
	mw := func(next http.Handler) http.Handler { return a.store.Retry(a.sm.LoadAndSave(next)) }
	for _, p := range placements {
		for _, losing := range []int32{0, 1, 3} {
			t.Run(fmt.Sprintf("%s/%d lost", p.name, losing), func(t *testing.T) {
				var decoys atomic.Int32
				c := a.clicks(losing)
				s := serve(t, p.build(mw, c.shop(&decoys)))
				got := s.do(s.request(http.MethodPost, itemPath, c.token, strings.NewReader("x")))
				c.verdict(t, got, decoys.Load(), fmt.Sprintf("item 7, run %d", c.runs.Load()))
				if losing == 0 && got.status != http.StatusOK {
					t.Errorf("answered %d %q, and nobody else was there", got.status, got.body)
				}
			})
		}
	}
}

// Retry as one middleware of the router and LoadAndSave as the next: as before.
func TestWithin_RetryThenLoadAndSave(t *testing.T) {
	a := newApp(t)
	for name, build := range map[string]func(rt routes) http.Handler{
		"chi": func(rt routes) http.Handler {
			m, shop := chi.NewRouter(), chi.NewRouter()
			m.Use(a.store.Retry)
			shop.Use(a.sm.LoadAndSave)
			shop.Post("/items/{id}", rt.chi(rt.work))
			m.Mount("/shop", shop)
			m.With(a.sm.LoadAndSave).Post("/items/{id}", rt.chi(rt.decoy))
			m.NotFound(func(http.ResponseWriter, *http.Request) {}) // an empty 200
			return m
		},
		"chi, without a session elsewhere": func(rt routes) http.Handler {
			m, shop := chi.NewRouter(), chi.NewRouter()
			m.Use(a.store.Retry)
			shop.Use(a.sm.LoadAndSave)
			shop.Post("/items/{id}", rt.chi(rt.work))
			m.Mount("/shop", shop)
			m.NotFound(func(http.ResponseWriter, *http.Request) {})
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			var decoys atomic.Int32
			c := a.clicks(1)
			s := serve(t, build(c.shop(&decoys)))
			got := s.do(s.request(http.MethodPost, itemPath, c.token, strings.NewReader("x")))
			c.verdict(t, got, decoys.Load(), fmt.Sprintf("item 7, run %d", c.runs.Load()))
		})
	}
}

// The same where the session is deleted meanwhile: it does not come back, and no other handler
// runs.
func TestWithin_RetryGone(t *testing.T) {
	a := newApp(t)
	mw := func(next http.Handler) http.Handler { return a.store.Retry(a.sm.LoadAndSave(next)) }
	for _, p := range placements {
		t.Run(p.name, func(t *testing.T) {
			token := a.login()
			var runs, decoys atomic.Int32
			s := serve(t, p.build(mw, routes{
				work: func(r *http.Request, _ string) string {
					a.count(r)
					if runs.Add(1) == 1 {
						if err := a.store.Delete(token); err != nil {
							t.Error(err)
						}
					}
					return "text"
				},
				decoy: func(*http.Request, string) string {
					decoys.Add(1)
					return "decoy"
				},
			}))
			s.do(s.request(http.MethodPost, itemPath, token, strings.NewReader("x")))
			if got := a.values(token); got != nil {
				t.Errorf("RESURRECTED: the session holds %v", got)
			}
			if n := decoys.Load(); n != 0 {
				t.Errorf("WRONG HANDLER: it ran %d times", n)
			}
		})
	}
}

// Exclusive(LoadAndSave(next)) as the middleware of a router: five clicks run one at a time, and
// each counts or is refused.
func TestWithin_Exclusive(t *testing.T) {
	a := newApp(t)
	mw := func(next http.Handler) http.Handler {
		return a.store.Exclusive(a.sm, a.sm.LoadAndSave(next))
	}
	for _, p := range placements {
		t.Run(p.name, func(t *testing.T) {
			n, got := fiveClicks(t, a, func(rt routes) http.Handler { return p.build(mw, rt) })
			counted := 0
			for _, g := range got {
				switch {
				case !g.failed && g.status == http.StatusOK:
					counted++
				case g.failed, g.status == http.StatusConflict, g.status >= 500:
				default:
					t.Errorf("answered %d %q", g.status, g.body)
				}
			}
			if n != counted {
				t.Errorf("LOST: %d clicks were answered with 200, and %d counted", counted, n)
			}
		})
	}
}

// A middleware in between that hides scs's ResponseWriter, or the context's values, hides nothing
// from Exclusive, and makes Retry right, or refuse, at the worst.
func TestInside_Hidden(t *testing.T) {
	a := newApp(t)
	for between, hide := range map[string]middleware{
		"CompressHandler": handlers.CompressHandler,
		"bare ResponseWriter": func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				next.ServeHTTP(struct{ http.ResponseWriter }{w}, r)
			})
		},
		"context of its own": func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				ctx, cancel := context.WithCancel(r.Context())
				defer cancel()
				next.ServeHTTP(struct{ http.ResponseWriter }{w}, r.WithContext(ctx))
			})
		},
	} {
		t.Run(between+"/Exclusive", func(t *testing.T) {
			c := a.clicks(0)
			h := a.store.Exclusive(a.sm, c.handler(func(http.ResponseWriter, *http.Request, int32) {}))
			var value atomic.Value
			wantAdvice(t, &value, a.get(panics(&value, a.sm.LoadAndSave(hide(h))), c.token))
		})
		t.Run(between+"/Retry", func(t *testing.T) {
			c := a.clicks(1)
			h := a.store.Retry(c.handler(func(w http.ResponseWriter, _ *http.Request, run int32) {
				fmt.Fprint(w, "run ", run)
			}))
			got := a.get(a.sm.LoadAndSave(hide(h)), c.token)
			c.verdict(t, got, 0, fmt.Sprint("run ", c.runs.Load()))
		})
	}
}

// Inside of another session manager's LoadAndSave Exclusive is where it belongs: outside of its
// own.
func TestInside_AnotherManager(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	a := newAppOn(t, c)
	other := a.beside("other", c.Client(t))
	memory := scs.New()
	memory.Cookie.Name = "memory"
	for name, outside := range map[string]*scs.SessionManager{"etcd": other.sm, "memory": memory} {
		t.Run(name, func(t *testing.T) {
			n, got := fiveClicks(t, a, func(rt routes) http.Handler {
				h := a.store.Exclusive(a.sm, a.sm.LoadAndSave(rt.std(rt.work)))
				return outside.LoadAndSave(h)
			})
			for _, g := range got {
				g.want(t, http.StatusOK, "clicked")
			}
			if n != 5 {
				t.Errorf("counted %d of 5 clicks", n)
			}
		})
	}
}
