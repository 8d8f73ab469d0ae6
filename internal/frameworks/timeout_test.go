package frameworks

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// soon is how long http.TimeoutHandler waits for a handler that waits for that.
const soon = 30 * time.Millisecond

// meddle does all that a handler may do which goes on after its time is over.
func (a *app) meddle(w http.ResponseWriter, r *http.Request) {
	for n := range 50 {
		w.Header().Set("X-Late", fmt.Sprint(n))
		r.Header.Set("X-Late", fmt.Sprint(n))
		a.sm.Put(r.Context(), "late", n)
		_, _ = r.Body.Read(make([]byte, 10))
		_, _ = fmt.Fprint(w, "late")
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		_ = r.Trailer.Get("X-Sum")
		_ = r.FormValue("late")
	}
}

// http.TimeoutHandler on either side of Retry and Exclusive: a handler that goes on after its time,
// in the first or in the last run, is no data race, and the client gets the one answer or the
// other.
func TestTimeoutHandler(t *testing.T) {
	a := newApp(t)
	var left sync.WaitGroup // handlers that go on
	timeout := func(h http.Handler) http.Handler {
		limited := http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer left.Done()
			h.ServeHTTP(w, r)
		}), soon, "too late")
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			left.Add(1)
			limited.ServeHTTP(w, r)
		})
	}
	for name, wrap := range map[string]middleware{
		"LoadAndSave(TimeoutHandler)": func(h http.Handler) http.Handler {
			return a.sm.LoadAndSave(timeout(h))
		},
		"TimeoutHandler(LoadAndSave)": func(h http.Handler) http.Handler {
			return timeout(a.sm.LoadAndSave(h))
		},
		"Retry(TimeoutHandler(LoadAndSave))": func(h http.Handler) http.Handler {
			return a.store.Retry(timeout(a.sm.LoadAndSave(h)))
		},
		"Retry(LoadAndSave(TimeoutHandler))": func(h http.Handler) http.Handler {
			return a.store.Retry(a.sm.LoadAndSave(timeout(h)))
		},
		"TimeoutHandler(Retry(LoadAndSave))": func(h http.Handler) http.Handler {
			return timeout(a.store.Retry(a.sm.LoadAndSave(h)))
		},
		"Exclusive(LoadAndSave(TimeoutHandler))": func(h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, a.sm.LoadAndSave(timeout(h)))
		},
		"TimeoutHandler(Exclusive(LoadAndSave))": func(h http.Handler) http.Handler {
			return timeout(a.store.Exclusive(a.sm, a.sm.LoadAndSave(h)))
		},
		"Exclusive(Retry(TimeoutHandler))": func(h http.Handler) http.Handler {
			return a.store.Exclusive(a.sm, a.store.Retry(timeout(a.sm.LoadAndSave(h))))
		},
	} {
		for _, losing := range []int32{0, 1} {
			for late := range losing + 1 {
				t.Run(fmt.Sprintf("%s/%d lost, run %d is late", name, losing, late+1), func(t *testing.T) {
					c := a.clicks(losing)
					var others atomic.Int32
					s := serve(t, wrap(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						run := c.do(r)
						if run <= losing {
							others.Add(1)
						}
						if run == late+1 {
							<-r.Context().Done()
							a.meddle(w, r)
							return
						}
						b, err := io.ReadAll(r.Body)
						fmt.Fprintf(w, "run %d read %d %v", run, len(b), err)
					})))
					body := strings.NewReader(strings.Repeat("x", 100<<10))
					got := s.do(s.request(http.MethodPost, "/", c.token, body))
					s.end()
					left.Wait()
					n, _ := a.values(c.token)["n"].(int)
					if others := int(others.Load()); n%1000 > 1 || n/1000 != others {
						t.Errorf("counted %d, and the others %d", n, 1000*others)
					}
					whole := fmt.Sprintf("run %d read %d <nil>", losing+1, 100<<10)
					switch {
					case got.status == http.StatusOK && got.body == whole && n%1000 == 1:
					case got.status == http.StatusServiceUnavailable, got.status == http.StatusConflict:
					default:
						t.Errorf("answered %d %q, failed: %v; counted %d", got.status, got.body, got.failed, n)
					}
				})
			}
		}
	}
}
