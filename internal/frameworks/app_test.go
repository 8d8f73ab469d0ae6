package frameworks

import (
	"bytes"
	"context"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// patience bounds waits for what happens soon or never.
const patience = 60 * time.Second

// middleware is what chi, gorilla/mux and echo's WrapMiddleware take.
type middleware = func(http.Handler) http.Handler

// app is an application: a store and a session manager.
type app struct {
	t       *testing.T
	cluster *etcdtest.Cluster
	faults  etcdtest.Faults // of the store's client
	store   *etcdstore.EtcdStore
	sm      *scs.SessionManager
}

// newApp starts an etcd and an application on it.
func newApp(t *testing.T, opts ...etcdstore.Option) *app {
	t.Helper()
	return newAppOn(t, etcdtest.New(t, etcdtest.Config{}), opts...)
}

func newAppOn(t *testing.T, c *etcdtest.Cluster, opts ...etcdstore.Option) *app {
	t.Helper()
	a := &app{t: t, cluster: c}
	a.open(c.Client(t, etcdtest.WithFaults(&a.faults)), opts...)
	return a
}

// beside is another application on the same etcd, with a cookie of its own.
func (a *app) beside(name string, cli *clientv3.Client, opts ...etcdstore.Option) *app {
	a.t.Helper()
	b := &app{t: a.t, cluster: a.cluster}
	b.open(cli, opts...)
	b.sm.Cookie.Name = name
	return b
}

func (a *app) open(cli *clientv3.Client, opts ...etcdstore.Option) {
	a.store = etcdstore.New(cli, opts...)
	a.t.Cleanup(func() { _ = a.store.Close() }) // the test may have closed it
	a.sm = scs.New()
	a.sm.Store, a.sm.Codec, a.sm.ErrorFunc = a.store, a.store.Codec(), etcdstore.ErrorFunc
}

// login stores a session that holds user=alice, and returns its token.
func (a *app) login() string {
	a.t.Helper()
	return login(a.t, a.sm)
}

func login(t *testing.T, sm *scs.SessionManager) string {
	t.Helper()
	ctx, err := sm.Load(context.Background(), "")
	if err != nil {
		t.Fatal(err)
	}
	sm.Put(ctx, "user", "alice")
	token, _, err := sm.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// values returns what a session holds; nil: there is none.
func (a *app) values(token string) map[string]any {
	a.t.Helper()
	b, ok, err := a.store.Find(token)
	if err != nil {
		a.t.Fatal(err)
	}
	if !ok {
		return nil
	}
	_, values, err := scs.GobCodec{}.Decode(b)
	if err != nil {
		a.t.Fatal(err)
	}
	return values
}

// wantN fails the test unless the session has counted n, and is alice's.
func (a *app) wantN(t *testing.T, token string, n int) {
	t.Helper()
	got := a.values(token)
	if counted, _ := got["n"].(int); counted != n || got["user"] != "alice" {
		t.Errorf("the session holds %v, want n=%d and user=alice", got, n)
	}
}

// count counts a request in its session.
func (a *app) count(r *http.Request) {
	a.sm.Put(r.Context(), "n", a.sm.GetInt(r.Context(), "n")+1)
}

// overtake counts 1000 as another request does, so that a request that has counted by now loses.
func (a *app) overtake(token string) {
	err := a.store.Update(context.Background(), token, func(values map[string]any) error {
		n, _ := values["n"].(int)
		values["n"] = n + 1000
		return nil
	})
	if err != nil {
		a.t.Errorf("the other request: %v", err)
	}
}

// clicks is the work of a handler that counts in the session. The first of its runs lose.
type clicks struct {
	*app
	token  string
	losing int32
	runs   atomic.Int32
}

func (a *app) clicks(losing int32) *clicks {
	return &clicks{app: a, token: a.login(), losing: losing}
}

// do is one run. It returns its number, from 1.
func (c *clicks) do(r *http.Request) int32 {
	run := c.runs.Add(1)
	c.count(r)
	if run <= c.losing {
		c.overtake(c.token)
	}
	return run
}

// handler is do and then h.
func (c *clicks) handler(h func(w http.ResponseWriter, r *http.Request, run int32)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h(w, r, c.do(r)) })
}

// retried is the whole application with Retry outermost.
func (c *clicks) retried(h func(w http.ResponseWriter, r *http.Request, run int32)) http.Handler {
	return c.store.Retry(c.sm.LoadAndSave(c.handler(h)))
}

func (c *clicks) wantRuns(t *testing.T, n int32) {
	t.Helper()
	if got := c.runs.Load(); got != n {
		t.Errorf("%d runs, want %d", got, n)
	}
}

// site is a server and a client that sends its session's cookie.
type site struct {
	*http.Client
	t   *testing.T
	url string
	log buffer // the server's
	end func() // ends the server, after its requests; it may be called before the test ends
}

// serve starts a server that ends with the test.
func serve(t *testing.T, h http.Handler, configure ...func(*httptest.Server)) *site {
	t.Helper()
	s := &site{t: t}
	var active sync.WaitGroup // the server does not wait for those that took their connection
	srv := httptest.NewUnstartedServer(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			active.Add(1)
			defer active.Done()
			h.ServeHTTP(w, r)
		}))
	srv.Config.ErrorLog = log.New(&s.log, "", 0)
	for _, c := range configure {
		c(srv)
	}
	if srv.EnableHTTP2 {
		srv.StartTLS()
	} else {
		srv.Start()
	}
	s.Client, s.url = srv.Client(), srv.URL
	s.Timeout = patience
	s.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	transport := s.Transport.(*http.Transport)
	transport.DisableCompression = true
	transport.ExpectContinueTimeout = patience
	s.end = sync.OnceFunc(func() { srv.Close(); active.Wait() })
	t.Cleanup(s.end)
	return s
}

// answer is what a client sees of a response.
type answer struct {
	proto    string
	status   int
	header   http.Header
	body     string
	trailer  http.Header
	early    []string // informational responses, with their Link
	length   int64
	encoding []string
	close    bool
	failed   bool // there is no response, or it ended early
}

// request makes a request to the site with the session's cookie.
func (s *site) request(method, path, token string, body io.Reader) *http.Request {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	req.AddCookie(&http.Cookie{Name: "session", Value: token})
	return req
}

// do sends a request and reads the whole response.
func (s *site) do(req *http.Request) (a answer) {
	s.t.Helper()
	var mu sync.Mutex
	var early []string
	trace := &httptrace.ClientTrace{
		Got1xxResponse: func(code int, header textproto.MIMEHeader) error {
			mu.Lock()
			defer mu.Unlock()
			early = append(early, http.StatusText(code)+" "+header.Get("Link"))
			return nil
		},
		Got100Continue: func() {
			mu.Lock()
			defer mu.Unlock()
			early = append(early, "go on")
		},
	}
	resp, err := s.Do(req.WithContext(httptrace.WithClientTrace(req.Context(), trace)))
	if err == nil {
		defer resp.Body.Close()
		var body []byte
		body, err = io.ReadAll(resp.Body)
		a = answer{
			proto: resp.Proto, status: resp.StatusCode, header: resp.Header, body: string(body),
			trailer: resp.Trailer, length: resp.ContentLength, encoding: resp.TransferEncoding,
			close: resp.Close,
		}
	}
	mu.Lock()
	defer mu.Unlock()
	a.early, a.failed = early, err != nil
	return a
}

// get is a GET of / with the session's cookie.
func (s *site) get(token string) answer {
	s.t.Helper()
	return s.do(s.request(http.MethodGet, "/", token, nil))
}

// get serves one GET of / with the session's cookie.
func (a *app) get(h http.Handler, token string) answer {
	a.t.Helper()
	s := serve(a.t, h)
	defer s.end()
	return s.get(token)
}

// post serves one POST to / with the session's cookie.
func (a *app) post(h http.Handler, token string, body io.Reader) answer {
	a.t.Helper()
	s := serve(a.t, h)
	defer s.end()
	return s.do(s.request(http.MethodPost, "/", token, body))
}

// want fails the test unless the whole body has come, with this status.
func (a answer) want(t *testing.T, status int, body string) {
	t.Helper()
	if a.failed || a.status != status || a.body != body {
		t.Errorf("answer %d %q, failed: %v; want %d %q", a.status, a.body, a.failed, status, body)
	}
}

// conflictPage is what ErrorFunc writes.
const conflictPage = "Conflict\n"

// buffer is a log.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// captureLog returns what slog's default logger gets during the test.
func captureLog(t *testing.T) *buffer {
	t.Helper()
	b := new(buffer)
	before, w, flags := slog.Default(), log.Writer(), log.Flags()
	slog.SetDefault(slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(func() {
		slog.SetDefault(before)
		log.SetOutput(w)
		log.SetFlags(flags)
	})
	return b
}

// counts returns how often a log has a text.
func (b *buffer) counts(text string) int { return strings.Count(b.String(), text) }
