package etcdstore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// patience bounds waits for what happens soon or never.
const patience = 60 * time.Second

// site is an application on one machine. Sites on one cluster are one application on several machines.
type site struct {
	store   *EtcdStore
	client  *clientv3.Client // the store's
	manager *scs.SessionManager
	faults  etcdtest.Faults  // of the store's client
	admin   *clientv3.Client // another client
	mux     *http.ServeMux   // its "/login" makes a session
	url     string
	log     syncBuffer   // the server's
	watches atomic.Int32 // streams for watches that the store's client has opened
	close   func()       // ends the server and the store; it may be called before the test ends
}

// newSite starts a site. wrap makes the handler of its server.
func newSite(t *testing.T, c *etcdtest.Cluster, wrap func(s *site) http.Handler, opts ...Option) *site {
	t.Helper()
	client := func(opts ...etcdtest.ClientOption) *clientv3.Client { return c.Client(t, opts...) }
	return newSiteOf(t, client(), client, wrap, opts...)
}

// newSiteOf is newSite with clients that the test makes.
func newSiteOf(t *testing.T, admin *clientv3.Client, client func(...etcdtest.ClientOption) *clientv3.Client, wrap func(s *site) http.Handler, opts ...Option) *site {
	t.Helper()
	s := &site{admin: admin, mux: http.NewServeMux()}
	s.client = client(etcdtest.WithFaults(&s.faults), s.countWatches)
	s.store = New(s.client, opts...)
	s.manager = newManager(s.store)
	s.manager.ErrorFunc = ErrorFunc
	s.mux.HandleFunc("/login", func(_ http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), "user", "alice")
	})
	server := httptest.NewUnstartedServer(wrap(s))
	server.Config.ErrorLog = log.New(&s.log, "", 0)
	server.Start()
	s.url = server.URL
	s.close = sync.OnceFunc(func() {
		server.Close()
		mustClose(t, s.store)
	})
	t.Cleanup(s.close)
	return s
}

// countWatches is an etcdtest.ClientOption.
func (s *site) countWatches(cfg *clientv3.Config) {
	cfg.DialOptions = append(cfg.DialOptions, grpc.WithChainStreamInterceptor(
		func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			stream, err := open(ctx, desc, conn, method, opts...)
			if err == nil && strings.HasSuffix(method, "/Watch") {
				s.watches.Add(1)
			}
			return stream, err
		}))
}

// loadAndSaved is the application without any of the store's middleware.
func (s *site) loadAndSaved() http.Handler { return s.manager.LoadAndSave(s.mux) }

// retried is the application with Retry.
func (s *site) retried() http.Handler { return s.store.Retry(s.loadAndSaved()) }

// exclusive is the application with Exclusive.
func (s *site) exclusive() http.Handler { return s.store.Exclusive(s.manager, s.loadAndSaved()) }

// login returns a browser with a session.
func (s *site) login(t *testing.T) *browser {
	t.Helper()
	b := newBrowser(t)
	b.get(t, s.url+"/login")
	if b.token(t, s) == "" {
		t.Fatal("no cookie")
	}
	return b
}

// token returns the token of the session that the browser has.
func (b *browser) token(t *testing.T, s *site) string {
	t.Helper()
	u, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range b.Jar.Cookies(u) {
		if c.Name == s.manager.Cookie.Name {
			return c.Value
		}
	}
	return ""
}

// values returns what the session holds, nil where there is none.
func (s *site) values(t *testing.T, token string) map[string]any {
	t.Helper()
	b, ok, err := s.store.Find(token)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return nil
	}
	_, values, err := s.store.codec.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// count counts the request in its session.
func (s *site) count(r *http.Request) {
	s.manager.Put(r.Context(), "n", s.manager.GetInt(r.Context(), "n")+1)
}

// overtake counts by 1000 from outside of the request, so that one that has counted will lose.
func (s *site) overtake(t *testing.T, r *http.Request) {
	err := s.store.Update(context.Background(), s.manager.Token(r.Context()), func(values map[string]any) error {
		n, _ := values["n"].(int)
		values["n"] = n + 1000
		return nil
	})
	if err != nil {
		t.Errorf("overtake: %v", err)
	}
}

// runs counts the runs of a handler. The first of them lose.
type runs struct {
	atomic.Int32
	losing int32
}

// handle registers a handler that counts in the session. It is told which run it is, from 1.
func (s *site) handle(t *testing.T, path string, losing int32, h func(w http.ResponseWriter, r *http.Request, run int32)) *runs {
	c := &runs{losing: losing}
	s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		run := c.Add(1)
		s.count(r)
		if run <= c.losing {
			s.overtake(t, r)
		}
		h(w, r, run)
	})
	return c
}

func (c *runs) want(t *testing.T, n int32) {
	t.Helper()
	if got := c.Load(); got != n {
		t.Errorf("%d runs, want %d", got, n)
	}
}

// wantCount fails t unless the session has counted n.
func (s *site) wantCount(t *testing.T, b *browser, n int) {
	t.Helper()
	if got := s.values(t, b.token(t, s))["n"]; got != n {
		t.Errorf("counted %v, want %d", got, n)
	}
}

// response is all that a client sees of a response. Dates and cookies' values are left out.
type response struct {
	early   []int // 1xx
	status  int
	header  http.Header
	body    string
	trailer http.Header
	failed  bool
}

// do makes a request and reads the whole response.
func (b *browser) do(t *testing.T, req *http.Request) response {
	t.Helper()
	var got response
	var mu sync.Mutex
	ctx := httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
		mu.Lock()
		defer mu.Unlock()
		got.early = append(got.early, code)
		return nil
	}})
	resp, err := b.Do(req.WithContext(ctx))
	mu.Lock()
	defer mu.Unlock()
	if err != nil {
		got.failed = true
		return got
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	got.status, got.header, got.body, got.trailer, got.failed = resp.StatusCode, resp.Header, string(body), resp.Trailer, err != nil
	got.header.Del("Date")
	for i, c := range got.header["Set-Cookie"] {
		got.header["Set-Cookie"][i], _, _ = strings.Cut(c, "=")
	}
	return got
}

// newRequest is http.NewRequest with the test's context.
func newRequest(t *testing.T, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// wantOK fails t unless the answer is 200 with this body.
func wantOK(t *testing.T, got response, body string) {
	t.Helper()
	if got.failed || got.status != http.StatusOK || got.body != body {
		t.Errorf("answer %d %q, failed: %v; want 200 %q", got.status, got.body, got.failed, body)
	}
}

// syncBuffer is a log.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// captureLog returns what slog's default logger logs during the test.
func captureLog(t *testing.T) *syncBuffer {
	t.Helper()
	buf := &syncBuffer{}
	before, w, flags := slog.Default(), log.Writer(), log.Flags()
	slog.SetDefault(slog.New(slog.NewTextHandler(buf, nil)))
	t.Cleanup(func() {
		slog.SetDefault(before)
		log.SetOutput(w)
		log.SetFlags(flags)
	})
	return buf
}

// What does not lose is served as without Retry, down to the connection.
func TestRetry_AsWithout(t *testing.T) {
	handlers := map[string]func(w http.ResponseWriter, r *http.Request){
		"writes":         func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "text") },
		"writes nothing": func(http.ResponseWriter, *http.Request) {},
		"writes a status only": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Handler", "x")
			w.WriteHeader(http.StatusAccepted)
		},
		"no content": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) },
		"two statuses": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusTeapot)
			w.WriteHeader(http.StatusOK)
		},
		"content length": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "4")
			if n, err := io.WriteString(w, "more than that"); err == nil {
				fmt.Fprintf(w, "wrote %d", n)
			}
		},
		"flushes": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "one")
			if err := http.NewResponseController(w).Flush(); err != nil {
				fmt.Fprint(w, err)
			}
			fmt.Fprint(w, "two")
		},
		"flushes before the first write": func(w http.ResponseWriter, _ *http.Request) {
			if err := http.NewResponseController(w).Flush(); err != nil {
				fmt.Fprint(w, err)
			}
			fmt.Fprint(w, "text")
		},
		"early hints": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusProcessing)
			fmt.Fprint(w, "text")
		},
		"trailers": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "X-Declared")
			fmt.Fprint(w, "text")
			w.Header().Set("X-Declared", "a")
			w.Header().Set(http.TrailerPrefix+"X-Late", "b")
		},
		"deadlines": func(w http.ResponseWriter, _ *http.Request) {
			c := http.NewResponseController(w)
			soon := time.Now().Add(patience)
			fmt.Fprint(w, c.SetReadDeadline(soon), c.SetWriteDeadline(soon), c.EnableFullDuplex())
		},
		"passed write deadline": func(w http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(-time.Second))
			fmt.Fprint(w, "text")
		},
		"hijacks": func(w http.ResponseWriter, r *http.Request) {
			conn, rw, err := http.NewResponseController(w).Hijack()
			if err != nil {
				fmt.Fprint(w, err)
				return
			}
			defer conn.Close()
			fmt.Fprint(rw, "HTTP/1.1 200 OK\r\nX-Raw: yes\r\nContent-Length: 3\r\n\r\n")
			if r.Method != http.MethodHead {
				fmt.Fprint(rw, "raw")
			}
			rw.Flush()
		},
		"hijacks after writing": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "text")
			_ = http.NewResponseController(w).Flush()
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				fmt.Fprint(w, err)
				return
			}
			conn.Close()
		},
		"aborts": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"aborts after writing": func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "text")
			_ = http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		},
		"panics": func(http.ResponseWriter, *http.Request) { panic("ordinary") },
		"destroys": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, r.Context().Value(siteKey{}).(*site).manager.Destroy(r.Context()))
		},
		"commits by itself": func(w http.ResponseWriter, r *http.Request) {
			_, _, err := r.Context().Value(siteKey{}).(*site).manager.Commit(r.Context())
			fmt.Fprint(w, err)
		},
		"renews the token": func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprint(w, r.Context().Value(siteKey{}).(*site).manager.RenewToken(r.Context()))
		},
	}
	c := etcdtest.New(t, etcdtest.Config{})
	plain, retried := newSite(t, c, (*site).loadAndSaved), newSite(t, c, (*site).retried)
	for name, h := range handlers {
		for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
			t.Run(name+" "+method, func(t *testing.T) {
				var got [2]response
				var log [2]string
				for i, s := range []*site{plain, retried} {
					path := "/" + url.PathEscape(t.Name())
					s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
						s.count(r)
						h(w, r.WithContext(context.WithValue(r.Context(), siteKey{}, s)))
					})
					b := s.login(t)
					before := s.log.String()
					got[i] = b.do(t, newRequest(t, method, s.url+path, nil))
					if panics := strings.HasPrefix(name, "panics"); panics {
						etcdtest.Eventually(t, patience, func() bool { return s.log.String() != before }, "the server has not logged the panic")
					}
					log[i], _, _ = strings.Cut(strings.TrimPrefix(s.log.String(), before), "\n")
					log[i], _, _ = strings.Cut(log[i], "127.0.0.1")
					log[i], _, _ = strings.Cut(log[i], " call from ")
				}
				if !reflect.DeepEqual(got[0], got[1]) {
					t.Errorf("without Retry:\n%+v\nwith:\n%+v", got[0], got[1])
				}
				if name != "hijacks" && log[0] != log[1] { // that one logs when it comes to it
					t.Errorf("log without Retry: %q, with: %q", log[0], log[1])
				}
			})
		}
	}
}

type siteKey struct{}

// The handler runs again until it wins, on what the session holds by then, and the client sees the last run only.
func TestRetry_UntilItWins(t *testing.T) {
	logged := captureLog(t)
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	for name, write := range map[string]func(w http.ResponseWriter, r *http.Request, run int32){
		"body":    func(w http.ResponseWriter, _ *http.Request, run int32) { fmt.Fprint(w, "run ", run) },
		"nothing": func(http.ResponseWriter, *http.Request, int32) {},
		"status": func(w http.ResponseWriter, _ *http.Request, run int32) {
			if run == 4 {
				w.WriteHeader(http.StatusOK)
			} else {
				w.WriteHeader(http.StatusTeapot)
			}
		},
		"flushed": func(w http.ResponseWriter, _ *http.Request, run int32) {
			fmt.Fprint(w, "run ")
			_ = http.NewResponseController(w).Flush()
			fmt.Fprint(w, run)
		},
	} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			t.Run(name+" "+method, func(t *testing.T) {
				path := "/" + name + method
				c := s.handle(t, path, 3, write)
				b := s.login(t)
				want := "run 4"
				if method == http.MethodHead || name == "nothing" || name == "status" {
					want = ""
				}
				got := b.do(t, newRequest(t, method, s.url+path, nil))
				wantOK(t, got, want)
				if cookies := got.header["Set-Cookie"]; len(cookies) != 1 {
					t.Errorf("%d cookies", len(cookies))
				}
				c.want(t, 4)
				s.wantCount(t, b, 3001)
			})
		}
	}
	if l := logged.String(); l != "" {
		t.Errorf("runs that were repeated are in the log:\n%s", l)
	}
}

// 64 increments of one counter at the same time, through three servers: each is answered with the number that it made.
func TestRetry_Increments(t *testing.T) {
	f := newFarm(t, func(s *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
		return s.Retry(sm.LoadAndSave(mux))
	})
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	seen := make(map[string]bool)
	for i, p := range f.storm(t, b, 64, func(int) string { return "/increment" }) {
		if p.status != http.StatusOK || seen[p.body] {
			t.Errorf("request %d: %d %s, seen: %v", i, p.status, p.body, seen[p.body])
		}
		seen[p.body] = true
	}
	if got := b.get(t, f.url(1, "/get?key=n")).body; got != "64" || len(seen) != 64 {
		t.Errorf("counted %s, and %d numbers were seen; want 64", got, len(seen))
	}
	for i, s := range f.stores {
		if n, _ := s.reruns.Count(); n != 0 {
			t.Errorf("server %d: %d turns were not given back", i, n)
		}
	}
}

// The first chunk reaches the client while the handler still runs: it goes on when the client has it.
func TestRetry_Streams(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	arrived := make(chan struct{})
	c := s.handle(t, "/", 2, func(w http.ResponseWriter, _ *http.Request, run int32) {
		fmt.Fprint(w, "run ", run)
		if err := http.NewResponseController(w).Flush(); err != nil {
			t.Errorf("Flush: %v", err)
		}
		if run == 3 {
			<-arrived
		}
		fmt.Fprint(w, ", end")
	})
	b := s.login(t)
	resp, err := b.Do(newRequest(t, http.MethodGet, s.url+"/", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	chunk := make([]byte, len("run 3"))
	if _, err := io.ReadFull(resp.Body, chunk); err != nil || string(chunk) != "run 3" {
		t.Fatalf("first chunk %q, %v", chunk, err)
	}
	// The turn that the request took to run again is not held by one that streams.
	if n, _ := s.store.reruns.Count(); n != 0 {
		t.Errorf("%d turns are held", n)
	}
	close(arrived)
	if rest, err := io.ReadAll(resp.Body); err != nil || string(rest) != ", end" {
		t.Errorf("the rest is %q, %v", rest, err)
	}
	c.want(t, 3)
	s.wantCount(t, b, 2001)
}

// A handler that streams until its client goes away learns that its run has lost, though the client stays.
func TestRetry_LostStreamEnds(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, r *http.Request, run int32) {
		fmt.Fprint(w, "run ", run)
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	b := s.login(t)
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	resp, err := b.Do(newRequest(t, http.MethodGet, s.url+"/", nil).WithContext(ctx))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	chunk := make([]byte, len("run 2"))
	if _, err := io.ReadFull(resp.Body, chunk); err != nil || string(chunk) != "run 2" {
		t.Errorf("first chunk %q, %v", chunk, err)
	}
	leave()
	c.want(t, 2)
}

// A run that lost leaves no header behind, and takes none away.
func TestRetry_Headers(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Outer", "outer")
			w.Header().Set("X-Changed", "outer")
			w.Header().Add("X-Many", "outer")
			w.Header().Add("Set-Cookie", "outer=1")
			w.Header()["X-Nil"] = nil
			s.retried().ServeHTTP(w, r)
		})
	})
	s.handle(t, "/", 2, func(w http.ResponseWriter, _ *http.Request, run int32) {
		h := w.Header()
		if run <= 2 {
			if got := h.Get("X-Outer"); got != "outer" {
				t.Errorf("run %d: X-Outer is %q", run, got)
			}
			h.Del("X-Outer")
			h.Set("X-Lost", "yes")
			h["X-Changed"][0] = "changed in place"
			http.SetCookie(w, &http.Cookie{Name: "lost", Value: "1"})
			h.Set("Trailer", "X-Lost-Trailer")
		}
		if _, ok := h["X-Nil"]; !ok {
			t.Errorf("run %d: X-Nil is gone", run)
		}
		h.Add("X-Many", strconv.Itoa(int(run)))
		fmt.Fprint(w, run)
		_ = http.NewResponseController(w).Flush() // makes it a response that can have trailers
		h.Set("X-Lost-Trailer", "yes")
		h.Set(http.TrailerPrefix+"X-Run", strconv.Itoa(int(run)))
	})
	got := s.login(t).do(t, newRequest(t, http.MethodGet, s.url+"/", nil))
	wantOK(t, got, "3")
	for key, want := range map[string][]string{
		"X-Outer":       {"outer"},
		"X-Changed":     {"outer"},
		"X-Many":        {"outer", "3"},
		"X-Lost":        nil,
		"Set-Cookie":    {"outer", "session"},
		"Vary":          {"Cookie"},
		"Cache-Control": {`no-cache="Set-Cookie"`},
	} {
		if !slices.Equal(got.header[key], want) {
			t.Errorf("%s: %q, want %q", key, got.header[key], want)
		}
	}
	if want := (http.Header{"X-Run": {"3"}}); !reflect.DeepEqual(got.trailer, want) {
		t.Errorf("trailers %v, want %v", got.trailer, want)
	}
}

// chunked hides what the length of a body is.
type chunked struct{ io.Reader }

// A run gets the same body as the one before, whatever of it that had read.
func TestRetry_Bodies(t *testing.T) {
	text := func(n int) []byte { return bytes.Repeat([]byte("0123456789abcde\n"), n/16+1)[:n] }
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	_ = mw.WriteField("field", "value")
	fw, _ := mw.CreateFormFile("file", "name")
	_, _ = fw.Write(text(100 << 10))
	mw.Close()

	digest := func(t *testing.T, body io.Reader) string {
		h := sha256.New()
		n, err := io.Copy(h, body)
		if err != nil {
			t.Errorf("after %d bytes: %v", n, err)
		}
		return fmt.Sprintf("%d %x", n, h.Sum(nil)[:4])
	}
	all := func(t *testing.T, _ http.ResponseWriter, r *http.Request, _ int32) string { return digest(t, r.Body) }
	tests := map[string]struct {
		body        []byte
		chunked     bool
		contentType string
		read        func(t *testing.T, w http.ResponseWriter, r *http.Request, run int32) string
		want        string // "": the digest of the body
		once        bool   // the handler does not run again
	}{
		"empty":         {body: nil, read: all},
		"small":         {body: text(10), read: all},
		"chunked":       {body: text(70 << 10), chunked: true, read: all},
		"empty chunked": {body: nil, chunked: true, read: all},
		"1 MiB":         {body: text(1 << 20), read: all},
		"1 MiB chunked": {body: text(1 << 20), chunked: true, read: all},
		"1 MiB + 1":     {body: text(1<<20 + 1), read: all, once: true},
		"3 MiB":         {body: text(3 << 20), read: all, once: true},
		"3 MiB chunked": {body: text(3 << 20), chunked: true, read: all, once: true},
		"read in part at first": {body: text(200 << 10), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, run int32) string {
			if run == 1 {
				return digest(t, io.LimitReader(r.Body, 1000))
			}
			return digest(t, r.Body)
		}},
		"3 MiB, read in part at first": {body: text(3 << 20), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, run int32) string {
			if run == 1 {
				return digest(t, io.LimitReader(r.Body, 1<<20))
			}
			return digest(t, r.Body)
		}},
		"read in part in the end": {body: text(200 << 10), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, run int32) string {
			if run == 1 {
				return digest(t, r.Body)
			}
			return digest(t, io.LimitReader(r.Body, 1000))
		}, want: digest(t, bytes.NewReader(text(1000)))},
		"closed": {body: text(1000), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, run int32) string {
			if run > 1 {
				return digest(t, r.Body)
			}
			if err := r.Body.Close(); err != nil {
				t.Error(err)
			}
			return ""
		}},
		"read byte by byte": {body: text(1000), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, run int32) string {
			if run == 1 {
				_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(r.Body, 333), make([]byte, 1))
			}
			return digest(t, r.Body)
		}, want: digest(t, bytes.NewReader(text(1000)))},
		"MaxBytesReader": {body: text(1000), read: func(t *testing.T, w http.ResponseWriter, r *http.Request, _ int32) string {
			n, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 100))
			var tooLarge *http.MaxBytesError
			if !errors.As(err, &tooLarge) {
				t.Errorf("after %d bytes: %v", n, err)
			}
			return fmt.Sprint(n)
		}, want: "100"},
		"form": {body: []byte("a=1&b=2"), contentType: "application/x-www-form-urlencoded", read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, _ int32) string {
			if err := r.ParseForm(); err != nil {
				t.Error(err)
			}
			return r.PostForm.Encode()
		}, want: "a=1&b=2"},
		"multipart form": {body: form.Bytes(), contentType: mw.FormDataContentType(), read: func(t *testing.T, _ http.ResponseWriter, r *http.Request, _ int32) string {
			f, _, err := r.FormFile("file")
			if err != nil {
				t.Error(err)
				return ""
			}
			defer f.Close()
			return r.FormValue("field") + " " + digest(t, f)
		}, want: "value " + digest(t, bytes.NewReader(text(100<<10)))},
	}
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			path := "/" + url.PathEscape(name)
			c := s.handle(t, path, 2, func(w http.ResponseWriter, r *http.Request, run int32) {
				fmt.Fprint(w, tt.read(t, w, r, run))
			})
			var body io.Reader = bytes.NewReader(tt.body)
			if tt.chunked {
				body = chunked{body}
			}
			req := newRequest(t, http.MethodPost, s.url+path, body)
			req.Header.Set("Content-Type", tt.contentType)
			want := tt.want
			if want == "" {
				want = digest(t, bytes.NewReader(tt.body))
			}
			got := s.login(t).do(t, req)
			switch {
			case !tt.once && name == "3 MiB, read in part at first":
				// The second run has read all, so there is no third.
				c.want(t, 2)
			case !tt.once:
				wantOK(t, got, want)
				c.want(t, 3)
				return
			default:
				c.want(t, 1)
			}
			// Where a handler cannot run again, its body does not follow the error page.
			if got.body != "Conflict\n" || got.status != http.StatusConflict {
				t.Errorf("answer %d %q, want 409 alone", got.status, got.body)
			}
		})
	}
}

// A run that has lost may read on. That must not take from the next run what cannot be kept.
func TestRetry_BodyReadAfterLoss(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	const size = 3 << 20
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, r *http.Request, run int32) {
		fmt.Fprint(w, "read ") // the server keeps that back
		n, err := io.Copy(io.Discard, r.Body)
		if run == 1 {
			if err == nil || n >= size {
				t.Errorf("the run that lost could read %d bytes", n)
			}
			return
		}
		fmt.Fprint(w, n, err)
	})
	b := s.login(t)
	wantOK(t, b.do(t, newRequest(t, http.MethodPost, s.url+"/", bytes.NewReader(make([]byte, size)))), fmt.Sprint("read ", size, nil))
	c.want(t, 2)
	s.wantCount(t, b, 1001)
}

// A goroutine that a run has left behind may sit in a Read of the body. What it gets, the next run gets too.
func TestRetry_BodyReadByLeftover(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	pr, pw := io.Pipe()
	var leftover sync.WaitGroup
	second := make(chan struct{})
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, r *http.Request, run int32) {
		if run == 1 {
			body := r.Body
			reading := make(chan struct{})
			leftover.Go(func() {
				b := make([]byte, 64)
				_, err := io.ReadFull(body, b[:3])
				close(reading)
				for err == nil {
					_, err = body.Read(b)
				}
				// The second run has begun. What was under way may have been the end.
				if _, err = body.Read(b); !errors.Is(err, http.ErrBodyReadAfterClose) {
					t.Errorf("the run that lost can still read the body: %v", err)
				}
			})
			<-reading
			return
		}
		close(second)
		b, err := io.ReadAll(r.Body)
		fmt.Fprint(w, string(b), err)
	})
	go func() {
		_, _ = io.WriteString(pw, "one")
		<-second
		_, _ = io.WriteString(pw, "two")
		pw.Close()
	}()
	wantOK(t, s.login(t).do(t, newRequest(t, http.MethodPost, s.url+"/", pr)), "onetwo<nil>")
	leftover.Wait()
	c.want(t, 2)
}

// A handler that flushes before its first write has answered: it does not run again.
func TestRetry_FlushFirst(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, _ *http.Request, _ int32) {
		_ = http.NewResponseController(w).Flush()
		fmt.Fprint(w, "text")
	})
	b := s.login(t)
	got := b.do(t, newRequest(t, http.MethodGet, s.url+"/", nil))
	if got.status != http.StatusOK || got.body != http.StatusText(http.StatusConflict)+"\ntext" {
		t.Errorf("answer %d %q", got.status, got.body)
	}
	c.want(t, 1)
	s.wantCount(t, b, 1000)
}

// A panic passes through Retry also where the run has lost. An abort of a response that is dropped anyway does not.
func TestRetry_PanicsInLosingRun(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	s.manager.ErrorFunc = func(http.ResponseWriter, *http.Request, error) {}
	commit := func(r *http.Request) {
		if _, _, err := s.manager.Commit(r.Context()); !errors.Is(err, ErrConflict) {
			t.Errorf("the commit: %v", err)
		}
	}
	for name, tt := range map[string]struct {
		first int32 // the run that panics first; those before lose
		write bool  // before the panic, so that it comes from a run that is dropped
		value any
		runs  int32
	}{
		"abort":               {1, false, http.ErrAbortHandler, 3}, // as an ErrorFunc may end the handler
		"panic":               {1, false, "ordinary", 1},
		"abort of second run": {2, false, http.ErrAbortHandler, 3},
		"panic of second run": {2, false, "ordinary", 2},
		"panic after a write": {1, true, "ordinary", 1},
		"abort after a write": {1, true, http.ErrAbortHandler, 3},
	} {
		t.Run(name, func(t *testing.T) {
			path := "/" + url.PathEscape(name)
			c := s.handle(t, path, 2, func(w http.ResponseWriter, r *http.Request, run int32) {
				if run == 3 {
					fmt.Fprint(w, "won")
					return
				}
				commit(r)
				if tt.write {
					fmt.Fprint(w, "lost")
				}
				if run >= tt.first {
					panic(tt.value)
				}
			})
			before := s.log.String()
			got := s.login(t).do(t, newRequest(t, http.MethodPost, s.url+path, strings.NewReader("x")))
			if tt.runs == 3 {
				wantOK(t, got, "won")
			} else if !got.failed {
				t.Errorf("answer %d %q, want none", got.status, got.body)
			}
			c.want(t, tt.runs)
			if tt.value == "ordinary" {
				etcdtest.Eventually(t, patience, func() bool {
					return strings.Contains(strings.TrimPrefix(s.log.String(), before), ": ordinary\n")
				}, "the server has not logged the panic")
			}
			if n, _ := s.store.reruns.Count(); n != 0 {
				t.Errorf("%d turns are held", n)
			}
		})
	}
}

// A run that has lost does not get the connection; one that has it does not run again.
func TestRetry_HijackInLosingRun(t *testing.T) {
	ended := make(chan struct{}, 2)
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.retried().ServeHTTP(w, r)
			if r.URL.Path != "/login" {
				ended <- struct{}{}
			}
		})
	})
	hijack := func(w http.ResponseWriter) error {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return err
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nraw")
		return rw.Flush()
	}
	known := s.handle(t, "/known", 1, func(w http.ResponseWriter, r *http.Request, run int32) {
		_, _, _ = s.manager.Commit(r.Context())
		if err := hijack(w); (run == 1) != errors.Is(err, ErrConflict) || run == 2 && err != nil {
			t.Errorf("run %d: %v", run, err)
		}
	})
	unknown := s.handle(t, "/unknown", 1, func(w http.ResponseWriter, _ *http.Request, _ int32) {
		if err := hijack(w); err != nil {
			t.Error(err)
		}
	})
	b := s.login(t)
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/known", nil)), "raw")
	<-ended
	known.want(t, 2)
	s.wantCount(t, b, 1001)
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/unknown", nil)), "raw")
	<-ended
	unknown.want(t, 1)
	s.wantCount(t, b, 2001)
}

// Where the connection can neither be flushed nor hijacked, trying so decides nothing.
func TestRetry_Unsupported(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).loadAndSaved)
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, _ *http.Request, run int32) {
		rc := http.NewResponseController(w)
		if _, _, err := rc.Hijack(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("Hijack: %v", err)
		}
		_ = rc.Flush() // scs does not return the error
		fmt.Fprint(w, run)
	})
	b := s.login(t)
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	req.AddCookie(&http.Cookie{Name: "session", Value: b.token(t, s)})
	rec := httptest.NewRecorder()
	s.retried().ServeHTTP(struct{ http.ResponseWriter }{rec}, req)
	if rec.Code != http.StatusOK || rec.Body.String() != "2" {
		t.Errorf("answer %d %q", rec.Code, rec.Body)
	}
	c.want(t, 2)
}

// Informational responses pass at once, and leave the run undecided.
func TestRetry_Informational(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return s.store.Retry(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/outside" {
				w.WriteHeader(http.StatusEarlyHints)
			}
			s.loadAndSaved().ServeHTTP(w, r)
		}))
	})
	outside := s.handle(t, "/outside", 1, func(w http.ResponseWriter, _ *http.Request, run int32) {
		fmt.Fprint(w, run)
	})
	inside := s.handle(t, "/inside", 1, func(w http.ResponseWriter, _ *http.Request, run int32) {
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, run)
	})
	b := s.login(t)
	for path, want := range map[string]int{"/outside": 2, "/inside": 1} { // the run that lost sends none
		got := b.do(t, newRequest(t, http.MethodGet, s.url+path, nil))
		wantOK(t, got, "2")
		if len(got.early) != want {
			t.Errorf("%s: informational responses %d", path, got.early)
		}
	}
	outside.want(t, 2)
	inside.want(t, 2)
}

// A handler that saves by itself learns that it has lost, and runs again all the same.
func TestRetry_OwnCommit(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	c := s.handle(t, "/", 1, func(w http.ResponseWriter, r *http.Request, run int32) {
		_, _, err := s.manager.Commit(r.Context())
		if (run == 1) != errors.Is(err, ErrConflict) {
			t.Errorf("run %d: %v", run, err)
		}
		if err != nil {
			http.Error(w, "cannot save", http.StatusInternalServerError)
		}
	})
	b := s.login(t)
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/", nil)), "")
	c.want(t, 2)
	s.wantCount(t, b, 1001)
}

// A request whose session is deleted runs again without one. It does not bring the old one back, and leaves the cookie
// to whoever deleted the session, who may have set another.
func TestRetry_Gone(t *testing.T) {
	for _, hashed := range []bool{false, true} {
		t.Run(fmt.Sprintf("HashTokenInStore %v", hashed), func(t *testing.T) {
			s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
			s.manager.HashTokenInStore = hashed
			for path, write := range map[string]func(w http.ResponseWriter){
				"/writes":  func(w http.ResponseWriter) { fmt.Fprint(w, "text") },
				"/flushes": func(w http.ResponseWriter) { fmt.Fprint(w, "text"); _ = http.NewResponseController(w).Flush() },
				"/status":  func(w http.ResponseWriter) { w.WriteHeader(http.StatusOK) },
				"/nothing": func(http.ResponseWriter) {},
			} {
				t.Run(path, func(t *testing.T) {
					var runs atomic.Int32
					s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
						if runs.Add(1) == 1 {
							if got := s.manager.GetString(r.Context(), "user"); got != "alice" {
								t.Errorf("first run: user %q", got)
							}
							all, err := s.store.All()
							for token := range all {
								err = errors.Join(err, s.store.Delete(token))
							}
							if err != nil || len(all) != 1 {
								t.Errorf("%d sessions, %v", len(all), err)
							}
						} else if keys := s.manager.Keys(r.Context()); len(keys) != 0 {
							t.Errorf("second run: the session holds %q", keys)
						}
						s.manager.Put(r.Context(), "late", true)
						http.SetCookie(w, &http.Cookie{Name: "other", Value: "x"})
						write(w)
					})
					b := s.login(t)
					got := b.do(t, newRequest(t, http.MethodGet, s.url+path, nil))
					if got.status != http.StatusOK || !slices.Equal(got.header["Set-Cookie"], []string{"other"}) {
						t.Errorf("answer %+v", got)
					}
					if runs.Load() != 2 {
						t.Errorf("%d runs, want 2", runs.Load())
					}
					all, err := s.store.All()
					for token, data := range all {
						if _, values, _ := s.store.codec.Decode(data); len(values) != 1 || values["late"] != true {
							t.Errorf("a session holds %v", values)
						}
						err = errors.Join(err, s.store.Delete(token))
					}
					if err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

// Each run is a transaction of its own, also where the request is in one already.
func TestRetry_InTransaction(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.retried().ServeHTTP(w, r.WithContext(Begin(r.Context())))
		})
	})
	var n atomic.Int32
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if n.Add(1) == 1 {
			s.count(r)
			s.overtake(t, r)
			return
		}
		fmt.Fprint(w, "nothing to save")
	})
	b := s.login(t)
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/", nil)), "nothing to save")
	if n.Load() != 2 {
		t.Errorf("%d runs, want 2", n.Load())
	}
	s.wantCount(t, b, 1000)
}

// Where every run loses there is an end, and ErrorFunc answers.
func TestRetry_GivesUp(t *testing.T) {
	logged := captureLog(t)
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	c := s.handle(t, "/", 1000, func(w http.ResponseWriter, _ *http.Request, _ int32) {
		w.Header().Set("X-Lost", "yes")
		fmt.Fprint(w, "text")
	})
	b := s.login(t)
	got := b.do(t, newRequest(t, http.MethodGet, s.url+"/", nil))
	if got.status != http.StatusConflict || got.body != http.StatusText(http.StatusConflict)+"\n" || got.header["X-Lost"] != nil || got.header["Set-Cookie"] != nil {
		t.Errorf("answer %+v", got)
	}
	c.want(t, maxRuns)
	s.wantCount(t, b, 1000*maxRuns)
	if l := logged.String(); strings.Count(l, "\n") != 1 || !strings.Contains(l, "status=409") || strings.Contains(l, b.token(t, s)) {
		t.Errorf("log:\n%s", l)
	}
}

// A request whose client has gone does not run again, nor wait.
func TestRetry_ClientGone(t *testing.T) {
	ended := make(chan struct{})
	var request context.Context
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/" {
				request = r.Context()
				defer close(ended)
			}
			s.retried().ServeHTTP(w, r)
		})
	})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	c := s.handle(t, "/", 1000, func(w http.ResponseWriter, _ *http.Request, run int32) {
		fmt.Fprint(w, "text")
		if run == 3 {
			leave()
			<-request.Done()
		}
	})
	got := s.login(t).do(t, newRequest(t, http.MethodGet, s.url+"/", nil).WithContext(ctx))
	if !got.failed {
		t.Errorf("answer %+v", got)
	}
	<-ended
	c.want(t, 3)
}

// A request that has run out of time is not answered as if it had been saved.
func TestRetry_OutOfTime(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			s.retried().ServeHTTP(w, r.WithContext(context.WithValue(ctx, endKey{}, cancel)))
		})
	})
	c := s.handle(t, "/", 1000, func(w http.ResponseWriter, r *http.Request, _ int32) {
		fmt.Fprint(w, "text")
		r.Context().Value(endKey{}).(context.CancelFunc)()
	})
	if got := s.login(t).do(t, newRequest(t, http.MethodGet, s.url+"/", nil)); got.status != http.StatusConflict {
		t.Errorf("answer %+v", got)
	}
	c.want(t, 1)
}

type endKey struct{}

// Those that have lost take turns, but not at any price: here the one whose turn it is waits for the other.
func TestRetry_TurnsDoNotBlock(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	other := make(chan struct{})
	second := make(chan struct{})
	s.handle(t, "/slow", 1, func(_ http.ResponseWriter, _ *http.Request, run int32) {
		if run == 2 {
			close(second)
			<-other
		}
	})
	c := s.handle(t, "/other", 1, func(w http.ResponseWriter, _ *http.Request, run int32) { fmt.Fprint(w, run) })
	b := s.login(t)
	slow := make(chan response)
	go func() { slow <- b.do(t, newRequest(t, http.MethodGet, s.url+"/slow", nil)) }()
	<-second
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/other", nil)), "2")
	c.want(t, 2)
	close(other)
	wantOK(t, <-slow, "") // it loses against the other, and runs a third time
	s.wantCount(t, b, 2002)
}

// RenewToken deletes the old session at once, and the new one is saved like any other. A request that read the old one
// runs again without a session: what it changed does not come back, and it does not get into the new one.
func TestRetry_RenewToken(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).retried)
	loaded, renewed := make(chan struct{}), make(chan struct{})
	renew := s.handle(t, "/renew", 0, func(w http.ResponseWriter, r *http.Request, _ int32) {
		if err := s.manager.RenewToken(r.Context()); err != nil {
			t.Error(err)
		}
		fmt.Fprint(w, "renewed")
	})
	var late atomic.Int32
	s.mux.HandleFunc("/late", func(w http.ResponseWriter, r *http.Request) {
		if late.Add(1) == 1 {
			s.manager.Put(r.Context(), "late", true)
			close(loaded)
			<-renewed
		}
		fmt.Fprintf(w, "user %q", s.manager.GetString(r.Context(), "user"))
	})
	b := s.login(t)
	old := b.token(t, s)
	req := newRequest(t, http.MethodGet, s.url+"/late", nil)
	req.AddCookie(&http.Cookie{Name: "session", Value: old})
	done, other := make(chan response), newBrowser(t)
	go func() { done <- other.do(t, req) }()
	<-loaded
	wantOK(t, b.do(t, newRequest(t, http.MethodGet, s.url+"/renew", nil)), "renewed")
	close(renewed)
	wantOK(t, <-done, `user ""`)
	renew.want(t, 1)
	fresh := b.token(t, s)
	if fresh == old || s.values(t, old) != nil {
		t.Errorf("the token has changed: %v; the old session holds %v", fresh != old, s.values(t, old))
	}
	if got := s.values(t, fresh); len(got) != 2 || got["user"] != "alice" || got["n"] != 1 {
		t.Errorf("the renewed session holds %v", got)
	}
}

// What ErrorFunc makes of an error.
func TestErrorFunc(t *testing.T) {
	const none = -1
	deadline := fmt.Errorf("%w (etcd: %w)", context.DeadlineExceeded, rpctypes.ErrNoLeader)
	for name, tt := range map[string]struct {
		err    error
		status int
	}{
		"gone":                 {ErrSessionGone, none},
		"gone, wrapped":        {fmt.Errorf("commit: %w", ErrSessionGone), none},
		"gone, given up":       {fmt.Errorf("%w: gave up: %w", ErrConflict, ErrSessionGone), http.StatusConflict},
		"conflict":             {ErrConflict, http.StatusConflict},
		"conflict on keys":     {&ConflictError{Keys: []string{"a"}}, http.StatusConflict},
		"conflict, wrapped":    {fmt.Errorf("commit: %w", &ConflictError{}), http.StatusConflict},
		"lock lost":            {errLockLost, http.StatusConflict},
		"unknown":              {ErrOutcomeUnknown, http.StatusServiceUnavailable},
		"unknown, wrapped":     {fmt.Errorf("x: %w", commit.Unknown(context.Canceled)), http.StatusServiceUnavailable},
		"unknown and conflict": {fmt.Errorf("%w: %w", ErrOutcomeUnknown, ErrConflict), http.StatusConflict},
		"deadline":             {context.DeadlineExceeded, http.StatusServiceUnavailable},
		"deadline, wrapped":    {callError("find", deadline), http.StatusServiceUnavailable},
		"no leader":            {rpctypes.ErrNoLeader, http.StatusServiceUnavailable},
		"etcd timed out":       {fmt.Errorf("x: %w", rpctypes.ErrTimeout), http.StatusServiceUnavailable},
		"leader failed":        {rpctypes.ErrTimeoutDueToLeaderFail, http.StatusServiceUnavailable},
		"unavailable":          {status.Error(codes.Unavailable, "connection refused"), http.StatusServiceUnavailable},
		"permission":           {rpctypes.ErrPermissionDenied, http.StatusInternalServerError},
		"too large":            {ErrTooLarge, http.StatusInternalServerError},
		"closed":               {ErrClosed, http.StatusInternalServerError},
		"no space":             {rpctypes.ErrNoSpace, http.StatusInternalServerError},
		"other":                {errors.New("other"), http.StatusInternalServerError},
	} {
		t.Run(name, func(t *testing.T) {
			logged := captureLog(t)
			rec := httptest.NewRecorder()
			rec.Code = none
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPut, "/path?token=secret", nil)
			req.AddCookie(&http.Cookie{Name: "session", Value: "secret"})
			ErrorFunc(rec, req, tt.err)
			retryAfter := ""
			if tt.status == http.StatusServiceUnavailable {
				retryAfter = "1"
			}
			if rec.Code != tt.status || rec.Header().Get("Retry-After") != retryAfter {
				t.Errorf("answer %d, Retry-After %q; want %d, %q", rec.Code, rec.Header().Get("Retry-After"), tt.status, retryAfter)
			}
			l := logged.String()
			if tt.status == none {
				if l != "" || rec.Body.Len() != 0 || len(rec.Header()) != 0 {
					t.Errorf("answer %q %v, log %q; want nothing", rec.Body, rec.Header(), l)
				}
				return
			}
			if want := http.StatusText(tt.status) + "\n"; rec.Body.String() != want {
				t.Errorf("body %q, want %q", rec.Body, want)
			}
			if strings.Count(l, "\n") != 1 || !strings.Contains(l, "method=PUT") || !strings.Contains(l, fmt.Sprintf("status=%d", tt.status)) ||
				!strings.Contains(l, strconv.Quote(tt.err.Error())) && !strings.Contains(l, "error="+tt.err.Error()) || strings.Contains(l, "secret") {
				t.Errorf("log: %s", l)
			}
		})
	}
}

// A context that was cancelled means mostly that the client has gone, which nobody needs to read of. But who is still
// there must not take the answer for success.
func TestErrorFunc_Cancelled(t *testing.T) {
	logged := captureLog(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for err, want := range map[error]int{
		ErrConflict:                      http.StatusConflict,
		context.Canceled:                 http.StatusServiceUnavailable,
		commit.Unknown(context.Canceled): http.StatusServiceUnavailable,
	} {
		rec := httptest.NewRecorder()
		ErrorFunc(rec, httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil), err)
		if rec.Code != want {
			t.Errorf("%v: answer %d, want %d", err, rec.Code, want)
		}
	}
	if l := logged.String(); l != "" {
		t.Errorf("log: %s", l)
	}
}

// ErrorFunc as scs calls it, and what it logs then.
func TestErrorFunc_InApplication(t *testing.T) {
	logged := captureLog(t)
	failure := errors.New("the resolver's own")
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).loadAndSaved, WithTimeout(300*time.Millisecond), WithResolver(func(c Conflict) (any, error) {
		if c.Ours == "fails" {
			return nil, failure
		}
		return nil, &ConflictError{Keys: []string{c.Key}}
	}))
	const secret = "a secret value"
	update := func(r *http.Request, fn func(values map[string]any) error) {
		if err := s.store.Update(context.Background(), s.manager.Token(r.Context()), fn); err != nil {
			t.Error(err)
		}
	}
	lose := func(r *http.Request, value string) {
		s.manager.Put(r.Context(), "note", value)
		update(r, func(values map[string]any) error { values["note"] = secret; return nil })
	}
	unreachable := func(string, any) etcdtest.Fate { return etcdtest.Fate{Drop: true} }
	lost := func(string, any) etcdtest.Fate { return etcdtest.Fate{Err: status.Error(codes.Unavailable, "EOF")} }
	for name, tt := range map[string]struct {
		act    func(r *http.Request)
		status int
		log    string
	}{
		"gone": {func(r *http.Request) {
			s.manager.Put(r.Context(), "note", secret)
			if err := s.store.Delete(s.manager.Token(r.Context())); err != nil {
				t.Error(err)
			}
		}, http.StatusOK, ""},
		"conflict": {func(r *http.Request) { lose(r, secret) }, http.StatusConflict, "on note"},
		"resolver": {func(r *http.Request) { lose(r, "fails") }, http.StatusInternalServerError, failure.Error()},
		"unavailable": {func(r *http.Request) {
			s.manager.Put(r.Context(), "note", secret)
			s.faults.Intercept(unreachable)
		}, http.StatusServiceUnavailable, "deadline"},
		"unknown": {func(r *http.Request) {
			s.manager.Put(r.Context(), "note", secret)
			s.faults.Intercept(lost)
		}, http.StatusServiceUnavailable, ErrOutcomeUnknown.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			s.mux.HandleFunc("/"+name, func(w http.ResponseWriter, r *http.Request) {
				tt.act(r)
				fmt.Fprint(w, "text")
			})
			b := s.login(t)
			token := b.token(t, s)
			before := logged.String()
			got := b.do(t, newRequest(t, http.MethodGet, s.url+"/"+name, nil))
			s.faults.Intercept(nil)
			if got.status != tt.status || got.header["Set-Cookie"] != nil || !strings.HasSuffix(got.body, "text") {
				t.Errorf("answer %+v, want %d", got, tt.status)
			}
			l := strings.TrimPrefix(logged.String(), before)
			if strings.Contains(l, token) || strings.Contains(l, secret) || !strings.Contains(l, tt.log) || (l == "") != (tt.log == "") {
				t.Errorf("log: %s", l)
			}
		})
	}
}
