package frameworks

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/gin-gonic/gin"
	"github.com/labstack/echo/v4"
)

// around are the store's ways around LoadAndSave.
func (a *app) around() map[string]middleware {
	return map[string]middleware{
		"LoadAndSave": a.sm.LoadAndSave,
		"Retry":       func(h http.Handler) http.Handler { return a.store.Retry(a.sm.LoadAndSave(h)) },
		"Exclusive": func(h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, a.sm.LoadAndSave(h))
		},
	}
}

// echo answers the error of a handler after its middleware has returned: it reaches the client, as
// it does without Retry and Exclusive.
func TestWrittenAfter_Echo(t *testing.T) {
	a := newApp(t)
	for name, mw := range a.around() {
		for _, place := range []string{"Use", "Pre", "route"} {
			t.Run(name+"/"+place, func(t *testing.T) {
				token := a.login()
				e := echo.New()
				wrapped := echo.WrapMiddleware(mw)
				h := func(c echo.Context) error {
					a.count(c.Request())
					return echo.NewHTTPError(http.StatusBadRequest, "bad input")
				}
				switch place {
				case "Use":
					e.Use(wrapped)
					e.GET("/", h)
				case "Pre":
					e.Pre(wrapped)
					e.GET("/", h)
				case "route":
					e.GET("/", h, wrapped)
				}
				a.get(e, token).want(t, http.StatusBadRequest, `{"message":"bad input"}`+"\n")
				a.wantN(t, token, 1)
			})
		}
	}
}

// The same with an error handler of the application's own that leaves a note in the session: it is
// saved, and it is not kept from that by a lock that was given back.
func TestWrittenAfter_EchoSaves(t *testing.T) {
	a := newApp(t)
	for name, mw := range a.around() {
		for _, kind := range []string{"with a session", "without"} {
			t.Run(name+"/"+kind, func(t *testing.T) {
				token := ""
				if kind == "with a session" {
					token = a.login()
				}
				e := echo.New()
				e.Use(echo.WrapMiddleware(mw))
				e.HTTPErrorHandler = func(err error, c echo.Context) {
					a.sm.Put(c.Request().Context(), "flash", err.Error())
					_ = c.String(http.StatusUnprocessableEntity, "sorry")
				}
				e.GET("/", func(c echo.Context) error {
					a.count(c.Request())
					return errors.New("bad input")
				})
				got := a.get(e, token)
				got.want(t, http.StatusUnprocessableEntity, "sorry")
				if token == "" {
					for _, line := range got.header["Set-Cookie"] {
						if c, err := http.ParseSetCookie(line); err == nil {
							token = c.Value
						}
					}
				}
				if v := a.values(token); v["flash"] != "bad input" || v["n"] != 1 {
					t.Errorf("the session holds %v", v)
				}
			})
		}
	}
}

// The error of a run that has lost is not that of the request.
func TestWrittenAfter_EchoRerun(t *testing.T) {
	a := newApp(t)
	e := echo.New()
	e.Use(echo.WrapMiddleware(func(h http.Handler) http.Handler {
		return a.store.Retry(a.sm.LoadAndSave(h))
	}))
	var c *clicks
	e.GET("/last", func(ec echo.Context) error {
		if c.do(ec.Request()) == 1 {
			return ec.String(http.StatusOK, "first")
		}
		return echo.NewHTTPError(http.StatusBadRequest, "bad input")
	})
	e.GET("/first", func(ec echo.Context) error {
		if c.do(ec.Request()) == 1 {
			return echo.NewHTTPError(http.StatusBadRequest, "bad input")
		}
		return ec.String(http.StatusOK, "last")
	})
	s := serve(t, e)
	c = a.clicks(1)
	s.do(s.request(http.MethodGet, "/last", c.token, nil)).
		want(t, http.StatusBadRequest, `{"message":"bad input"}`+"\n")
	c.wantRuns(t, 2)
	c.wantN(t, c.token, 1001)
	c = a.clicks(1)
	s.do(s.request(http.MethodGet, "/first", c.token, nil)).want(t, http.StatusOK, "last")
	c.wantRuns(t, 2)
	c.wantN(t, c.token, 1001)
}

// A middleware of gin that answers the errors of what came after it.
func TestWrittenAfter_Gin(t *testing.T) {
	a := newApp(t)
	for name, mw := range a.around() {
		t.Run(name, func(t *testing.T) {
			token := a.login()
			e := gin.New()
			e.Use(func(c *gin.Context) {
				c.Next()
				if len(c.Errors) > 0 {
					c.JSON(http.StatusBadRequest, gin.H{"error": c.Errors.Last().Error()})
				}
			})
			e.Use(func(c *gin.Context) { // as ginMiddleware, but it leaves the writer as it is
				before := c.Writer
				mw(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					c.Request, c.Writer = r, &ginWriter{ResponseWriter: before, to: w}
					c.Next()
				})).ServeHTTP(before, c.Request)
			})
			e.GET("/", func(c *gin.Context) {
				a.count(c.Request)
				_ = c.Error(errors.New("bad input"))
				c.Abort()
			})
			a.get(e, token).want(t, http.StatusBadRequest, `{"error":"bad input"}`)
			a.wantN(t, token, 1)
		})
	}
}

// innermost lets after write to the innermost ResponseWriter once all of the store has returned.
func innermost(wrap middleware, h http.Handler,
	after func(w http.ResponseWriter, r *http.Request),
) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		innerW, innerR := w, r
		wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			innerW, innerR = w, r
			h.ServeHTTP(w, r)
		})).ServeHTTP(w, r)
		after(innerW, innerR)
	})
}

// Whatever is written after Retry or Exclusive has returned reaches the client.
func TestWrittenAfter_ByHand(t *testing.T) {
	a := newApp(t)
	for name, after := range map[string]func(w http.ResponseWriter, r *http.Request){
		"status and body": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, "bad input")
		},
		"body, flushed": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			for _, part := range strings.SplitAfter("bad input", " ") {
				if _, err := fmt.Fprint(w, part); err != nil {
					t.Errorf("Write: %v", err)
				}
				if err := http.NewResponseController(w).Flush(); err != nil {
					t.Errorf("Flush: %v", err)
				}
			}
		},
		"through the session manager's writer": func(w http.ResponseWriter, _ *http.Request) {
			for {
				u, ok := w.(interface{ Unwrap() http.ResponseWriter })
				if !ok {
					break
				}
				w = u.Unwrap()
			}
			http.Error(w, "bad input", http.StatusBadRequest)
		},
	} {
		for how, mw := range a.around() {
			for kind, losing := range map[string]int32{"alone": 0, "after a lost run": 1} {
				if losing > 0 && how != "Retry" {
					continue
				}
				t.Run(name+"/"+how+"/"+kind, func(t *testing.T) {
					c := a.clicks(losing)
					h := c.handler(func(http.ResponseWriter, *http.Request, int32) {})
					got := a.get(innermost(mw, h, after), c.token)
					got.body = strings.TrimSuffix(got.body, "\n")
					got.want(t, http.StatusBadRequest, "bad input")
					c.wantRuns(t, losing+1)
					c.wantN(t, c.token, int(1000*losing+1))
				})
			}
		}
	}
}

// A change that is made and saved after Retry or Exclusive has returned is saved, or conflicts, as
// without them: never silence, and no run more.
func TestWrittenAfter_Conflict(t *testing.T) {
	a := newApp(t)
	for how, mw := range a.around() {
		t.Run(how, func(t *testing.T) {
			c := a.clicks(0)
			h := c.handler(func(http.ResponseWriter, *http.Request, int32) {})
			got := a.get(innermost(mw, h, func(w http.ResponseWriter, r *http.Request) {
				c.overtake(c.token) // 1001
				c.count(r)          // 2, of 1
				fmt.Fprint(w, "saved")
			}), c.token)
			if got.status != http.StatusConflict {
				t.Errorf("answered %d %q", got.status, got.body)
			}
			c.wantRuns(t, 1)
			c.wantN(t, c.token, 1001)
		})
	}
}

// What outlives Retry and Exclusive, but not the request, still has the request's context: it is
// cancelled only where the run has lost, and at the request's end.
func TestContext_AfterReturn(t *testing.T) {
	a := newApp(t)
	for how, mw := range a.around() {
		for name, h := range map[string]func(w http.ResponseWriter, r *http.Request, run int32){
			"writes":  func(w http.ResponseWriter, _ *http.Request, _ int32) { fmt.Fprint(w, "text") },
			"nothing": func(http.ResponseWriter, *http.Request, int32) {},
			"flushes": func(w http.ResponseWriter, _ *http.Request, _ int32) {
				fmt.Fprint(w, "text")
				_ = http.NewResponseController(w).Flush()
			},
			"status": func(w http.ResponseWriter, _ *http.Request, _ int32) {
				w.WriteHeader(http.StatusAccepted)
			},
		} {
			for kind, losing := range map[string]int32{"alone": 0, "after lost runs": 2} {
				if losing > 0 && how != "Retry" {
					continue
				}
				t.Run(how+"/"+name+"/"+kind, func(t *testing.T) {
					c := a.clicks(losing)
					var contexts []context.Context
					var after error
					a.get(innermost(mw, c.handler(func(w http.ResponseWriter, r *http.Request, run int32) {
						contexts = append(contexts, r.Context())
						h(w, r, run)
					}), func(_ http.ResponseWriter, r *http.Request) { after = r.Context().Err() }), c.token)
					c.wantRuns(t, losing+1)
					if after != nil {
						t.Errorf("the run that has passed had its context cancelled: %v", after)
					}
					for i, ctx := range contexts {
						if ctx.Err() == nil {
							t.Errorf("the context of run %d outlives the request", i+1)
						}
					}
				})
			}
		}
	}
}

// The context of a run that has lost is cancelled at once; a context that the run has handed on
// sees it.
func TestContext_LostRun(t *testing.T) {
	a := newApp(t)
	c := a.clicks(1)
	h := c.retried(func(w http.ResponseWriter, r *http.Request, run int32) {
		if err := r.Context().Err(); err != nil {
			t.Errorf("run %d begins with its context cancelled: %v", run, err)
		}
		fmt.Fprint(w, "run ", run)
		if run == 1 {
			<-r.Context().Done()
		} else if err := r.Context().Err(); err != nil {
			t.Errorf("run %d has passed, and its context was cancelled: %v", run, err)
		}
	})
	a.get(h, c.token).want(t, http.StatusOK, "run 2")
	c.wantN(t, c.token, 1001)
}

// The guard of Exclusive ends with its lock: the session can be saved by hand after it has
// returned, also where another request has the lock by then.
func TestExclusive_GuardEnds(t *testing.T) {
	a := newApp(t)
	token := a.login()
	mw := a.around()["Exclusive"]
	h := innermost(mw, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}),
		func(w http.ResponseWriter, r *http.Request) {
			held := a.store.Exclusive(a.sm, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				a.count(r)
				if _, _, err := a.sm.Commit(r.Context()); err != nil {
					t.Errorf("the commit while another has the lock: %v", err)
				}
			}))
			again := r.Clone(context.Background()) // another request
			held.ServeHTTP(w, again)
			a.count(r)
			if _, _, err := a.sm.Commit(r.Context()); err != nil {
				t.Errorf("the commit after the lock: %v", err)
			}
		})
	a.get(h, token)
	a.wantN(t, token, 2)
}
