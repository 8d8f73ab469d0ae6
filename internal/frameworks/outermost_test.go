package frameworks

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/gorilla/handlers"
)

const itemPath = "/shop/items/7"

// shop are routes that count. They say which item and which run it is.
func (c *clicks) shop(decoys *atomic.Int32) routes {
	return routes{
		work: func(r *http.Request, id string) string {
			return fmt.Sprintf("item %s, run %d", id, c.do(r))
		},
		decoy: func(*http.Request, string) string {
			decoys.Add(1)
			return "decoy"
		},
	}
}

// Retry around the router runs the same route again: 200, and both requests' changes are in effect.
func TestOutermost_Retry(t *testing.T) {
	a := newApp(t)
	for _, p := range placements {
		for _, losing := range []int32{0, 1, 3} {
			t.Run(fmt.Sprintf("%s/%d lost", p.name, losing), func(t *testing.T) {
				var decoys atomic.Int32
				c := a.clicks(losing)
				router := p.build(plain, c.shop(&decoys))
				s := serve(t, a.store.Retry(a.sm.LoadAndSave(router)))
				got := s.do(s.request(http.MethodPost, itemPath, c.token, strings.NewReader("x")))
				got.want(t, http.StatusOK, fmt.Sprintf("item 7, run %d", losing+1))
				c.wantRuns(t, losing+1)
				c.wantN(t, c.token, int(1000*losing+1))
				if n := decoys.Load(); n != 0 {
					t.Errorf("another handler ran %d times", n)
				}
			})
		}
	}
}

// fiveClicks makes five requests for the item at once. The first that runs goes on when all have
// come.
func fiveClicks(t *testing.T, a *app, wrap func(rt routes) http.Handler) (n int, got []answer) {
	t.Helper()
	var arrived sync.WaitGroup
	arrived.Add(5)
	var running, most atomic.Int32
	h := wrap(routes{
		work: func(r *http.Request, _ string) string {
			arrived.Wait()
			if now := running.Add(1); now > 1 {
				most.Store(now)
			}
			defer running.Add(-1)
			a.count(r)
			return "clicked"
		},
		decoy: func(*http.Request, string) string {
			t.Error("another handler ran")
			return "decoy"
		},
	})
	s := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived.Done()
		h.ServeHTTP(w, r)
	}))
	token := a.login()
	got = make([]answer, 5)
	var clicked sync.WaitGroup
	for i := range got {
		req := s.request(http.MethodPost, itemPath, token, strings.NewReader("x"))
		clicked.Go(func() { got[i] = s.do(req) })
	}
	clicked.Wait()
	if most.Load() != 0 {
		t.Errorf("%d ran at the same time", most.Load())
	}
	n, _ = a.values(token)["n"].(int)
	return n, got
}

// Exclusive around the router: of five concurrent clicks one runs at a time, and all count.
func TestOutermost_Exclusive(t *testing.T) {
	a := newApp(t)
	for _, p := range placements {
		t.Run(p.name, func(t *testing.T) {
			n, got := fiveClicks(t, a, func(rt routes) http.Handler {
				return a.store.Exclusive(a.sm, a.sm.LoadAndSave(p.build(plain, rt)))
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

// Retry in Exclusive, and Exclusive in Retry, run the handler again under the lock.
func TestOutermost_Both(t *testing.T) {
	a := newApp(t)
	for name, wrap := range map[string]middleware{
		"Exclusive(Retry)": func(h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, a.store.Retry(a.sm.LoadAndSave(h)))
		},
		"Retry(Exclusive)": func(h http.Handler) http.Handler {
			return a.store.Retry(a.store.Exclusive(a.sm, a.sm.LoadAndSave(h)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(2)
			h := c.handler(func(w http.ResponseWriter, _ *http.Request, run int32) { fmt.Fprint(w, run) })
			a.get(wrap(h), c.token).want(t, http.StatusOK, "3")
			c.wantN(t, c.token, 2001)
		})
	}
}

// Middleware between Retry and the handler that changes the request (its path, method, address,
// context) does so in each run from the start.
func TestOutermost_Stack(t *testing.T) {
	a := newApp(t)
	for name, stack := range map[string]func(h http.Handler) http.Handler{
		"chi": func(h http.Handler) http.Handler {
			m := chi.NewRouter()
			m.Use(chimiddleware.RequestID, chimiddleware.ClientIPFromRemoteAddr,
				chimiddleware.Recoverer, chimiddleware.StripSlashes, chimiddleware.CleanPath,
				chimiddleware.Compress(5), chimiddleware.Throttle(1),
				chimiddleware.Timeout(time.Minute), chimiddleware.GetHead)
			m.Use(a.sm.LoadAndSave)
			m.Route("/shop", func(shop chi.Router) { shop.Method("DELETE", "/items/{id}", h) })
			m.Method("POST", "/items/{id}", http.NotFoundHandler())
			return handlers.HTTPMethodOverrideHandler(m)
		},
		"gorilla": func(h http.Handler) http.Handler {
			m := http.NewServeMux()
			m.Handle("DELETE /shop/items/{id}", h)
			wrapped := handlers.ProxyHeaders(handlers.CompressHandler(a.sm.LoadAndSave(m)))
			wrapped = handlers.RecoveryHandler()(wrapped)
			wrapped = handlers.CombinedLoggingHandler(io.Discard, wrapped)
			return handlers.HTTPMethodOverrideHandler(http.StripPrefix("/app", wrapped))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(2)
			var mu sync.Mutex
			var seen []string
			h := stack(c.handler(func(w http.ResponseWriter, r *http.Request, run int32) {
				mu.Lock()
				seen = append(seen, r.Method+" "+r.PathValue("id"))
				mu.Unlock()
				w.Header().Set("Content-Type", "text/plain")
				fmt.Fprintf(w, "form %q, run %d", r.FormValue("note"), run)
			}))
			s := serve(t, a.store.Retry(h))
			path := map[string]string{"chi": itemPath + "/", "gorilla": "/app" + itemPath}[name]
			req := s.request(http.MethodPost, path, c.token, strings.NewReader("note=hello"))
			req.Header.Set("X-HTTP-Method-Override", "DELETE")
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			s.do(req).want(t, http.StatusOK, `form "hello", run 3`)
			if got := strings.Join(seen, ", "); got != "DELETE 7, DELETE 7, DELETE 7" {
				t.Errorf("the runs saw %s", got)
			}
			c.wantN(t, c.token, 2001)
		})
	}
}

// A proxy behind Retry: the run that has lost ends, though the proxy aborts it, and the backend of
// the next gets the whole body.
func TestOutermost_ReverseProxy(t *testing.T) {
	a := newApp(t)
	var requests atomic.Int32
	backend := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the proxy has dropped a run
		}
		requests.Add(1)
		w.Header().Set("X-Backend", "yes")
		_, _ = w.Write(body)
	}))
	target, err := url.Parse(backend.url)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(p *httputil.ProxyRequest) { p.SetURL(target) },
		Transport: backend.Transport,
	}
	for name, sized := range map[string]bool{"sized": true, "chunked": false} {
		t.Run(name, func(t *testing.T) {
			c := a.clicks(2)
			body := bytes.Repeat([]byte("0123456789abcdef"), 20<<10)
			var reader io.Reader = bytes.NewReader(body)
			if !sized {
				reader = struct{ io.Reader }{reader}
			}
			h := c.retried(func(w http.ResponseWriter, r *http.Request, _ int32) { proxy.ServeHTTP(w, r) })
			got := a.post(h, c.token, reader)
			if got.failed || got.status != http.StatusOK || got.body != string(body) {
				t.Errorf("answer %d with %d bytes, failed: %v", got.status, len(got.body), got.failed)
			}
			c.wantN(t, c.token, 2001)
		})
	}
	backend.end()
	if requests.Load() == 0 {
		t.Error("the backend got no request")
	}
}

// A test that is served without a server, or by httptest's recorder, is as one over the network.
func TestOutermost_Recorder(t *testing.T) {
	a := newApp(t)
	for _, p := range placements {
		t.Run(p.name, func(t *testing.T) {
			var decoys atomic.Int32
			c := a.clicks(1)
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, itemPath, nil)
			req.AddCookie(&http.Cookie{Name: "session", Value: c.token})
			rec := httptest.NewRecorder()
			a.store.Retry(a.sm.LoadAndSave(p.build(plain, c.shop(&decoys)))).ServeHTTP(rec, req)
			if rec.Code != http.StatusOK || rec.Body.String() != "item 7, run 2" {
				t.Errorf("answer %d %q", rec.Code, rec.Body)
			}
			c.wantN(t, c.token, 1001)
		})
	}
}
