package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// farm is an application on three machines: a cluster of three members, and three servers, each with a client, a store
// and a session manager of its own. Browsers talk to all of them with the same cookies: cookies do not
// tell ports apart.
type farm struct {
	cluster  *etcdtest.Cluster
	admin    *clientv3.Client
	stores   []*EtcdStore
	managers []*scs.SessionManager
	urls     []string
	gate     gate
}

// gate holds requests between their read of the session and their commit.
type gate struct {
	mu     sync.Mutex
	loaded sync.WaitGroup
	open   chan struct{}
}

// wait is called by a request that has loaded its session.
func (g *gate) wait() {
	g.mu.Lock()
	open := g.open
	g.mu.Unlock()
	g.loaded.Done()
	<-open
}

// inFlight has 8 requests of b load the session, each to set a key of its own. When all have, act runs; they go on to commit
// when it says so. All of them must get the response that they would get without it.
func (f *farm) inFlight(t *testing.T, b *browser, act func(goOn func())) {
	t.Helper()
	const requests = 8
	f.gate.mu.Lock()
	f.gate.open = make(chan struct{})
	f.gate.mu.Unlock()
	f.gate.loaded.Add(requests)
	var wg sync.WaitGroup
	for i := range requests {
		wg.Go(func() {
			if p := b.get(t, f.url(i, fmt.Sprintf("/slow?key=k%d", i))); p.status != http.StatusOK || p.body != "done" {
				t.Errorf("a request in flight was answered with %d %q", p.status, p.body)
			}
		})
	}
	f.gate.loaded.Wait()
	act(func() { close(f.gate.open) })
	wg.Wait()
}

// newFarm starts the application. wrap makes the handler of one server. No request fails for want of time, however slow the
// machine is.
func newFarm(t *testing.T, wrap func(s *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler, opts ...Option) *farm {
	t.Helper()
	f := &farm{cluster: etcdtest.New(t, etcdtest.Config{Members: 3})}
	f.admin = f.cluster.Client(t)
	opts = append([]Option{WithTimeout(time.Minute)}, opts...)
	for range 3 {
		s := New(f.cluster.Client(t), opts...)
		sm := newManager(s)
		sm.ErrorFunc = ErrorFunc
		server := httptest.NewServer(wrap(s, sm, shop(sm, &f.gate)))
		t.Cleanup(func() {
			server.Close()
			mustClose(t, s)
			etcdtest.Eventually(t, patience, func() bool { return s.implicit.len() == 0 }, "a request has left a transaction")
		})
		f.stores = append(f.stores, s)
		f.managers = append(f.managers, sm)
		f.urls = append(f.urls, server.URL)
	}
	return f
}

// url returns a path on the i-th server, counting round.
func (f *farm) url(i int, path string) string { return f.urls[i%len(f.urls)] + path }

// storm has n requests at the same time, path(i) each, over all servers.
func (f *farm) storm(t *testing.T, b *browser, n int, path func(i int) string) []page {
	t.Helper()
	pages := make([]page, n)
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			pages[i] = b.get(t, f.url(i, path(i)))
		})
	}
	close(start)
	wg.Wait()
	return pages
}

// sessions returns what all sessions hold.
func (f *farm) sessions(t *testing.T) []map[string]any {
	t.Helper()
	all, err := f.stores[0].All()
	if err != nil {
		t.Fatal(err)
	}
	var sessions []map[string]any
	for _, b := range all {
		_, values, err := scs.GobCodec{}.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		sessions = append(sessions, values)
	}
	return sessions
}

// shop is the application that the races run on.
func shop(sm *scs.SessionManager, gate *gate) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("/login", func(_ http.ResponseWriter, r *http.Request) {
		sm.Put(r.Context(), "user", r.FormValue("user"))
	})
	mux.HandleFunc("/set", func(_ http.ResponseWriter, r *http.Request) {
		sm.Put(r.Context(), r.FormValue("key"), r.FormValue("value"))
	})
	mux.HandleFunc("/increment", func(w http.ResponseWriter, r *http.Request) {
		n := sm.GetInt(r.Context(), "n") + 1
		sm.Put(r.Context(), "n", n)
		fmt.Fprint(w, n)
	})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		sm.Put(r.Context(), r.FormValue("key"), "x")
		gate.wait()
		fmt.Fprint(w, "done")
	})
	mux.HandleFunc("/switch", func(w http.ResponseWriter, r *http.Request) {
		if err := sm.Destroy(r.Context()); err != nil {
			http.Error(w, "destroy", http.StatusServiceUnavailable)
		}
		sm.Put(r.Context(), "user", "bob")
	})
	mux.HandleFunc("/renew", func(w http.ResponseWriter, r *http.Request) {
		if err := sm.RenewToken(r.Context()); err != nil {
			http.Error(w, "renew", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/logout", func(w http.ResponseWriter, r *http.Request) {
		if err := sm.Destroy(r.Context()); err != nil {
			http.Error(w, "destroy", http.StatusServiceUnavailable)
		}
	})
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, sm.Get(r.Context(), r.FormValue("key")))
	})
	return mux
}

func loadAndSave(_ *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
	return sm.LoadAndSave(mux)
}

// 200 requests of one session at the same time, each setting a key of its own: none is lost, none fails, and none costs
// a lease.
func TestRace_DifferentKeys(t *testing.T) {
	f := newFarm(t, loadAndSave)
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	for i := range 3 { // each server has its lease
		newBrowser(t).get(t, f.url(i, "/login?user=bob"))
	}
	leases := etcdtest.Leases(t, f.admin)
	for i, p := range f.storm(t, b, 200, func(i int) string { return fmt.Sprintf("/set?key=k%d&value=%d", i, i) }) {
		if p.status != http.StatusOK {
			t.Errorf("request %d: %d %s", i, p.status, p.body)
		}
	}
	want := map[string]any{"user": "alice"}
	for i := range 200 {
		want["k"+strconv.Itoa(i)] = strconv.Itoa(i)
	}
	if !slices.ContainsFunc(f.sessions(t), func(got map[string]any) bool { return maps.Equal(got, want) }) {
		t.Errorf("no session with all %d keys: %v", len(want), f.sessions(t))
	}
	if after := etcdtest.Leases(t, f.admin); len(after) != len(leases) {
		t.Errorf("%d leases before, %d after", len(leases), len(after))
	}
}

// Increments of one counter without Retry: what is answered with 200 is counted, everything else is answered with 409.
func TestRace_SameKey(t *testing.T) {
	f := newFarm(t, loadAndSave)
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	won, lost := 0, 0
	for range 5 {
		for _, p := range f.storm(t, b, 40, func(int) string { return "/increment" }) {
			switch p.status {
			case http.StatusOK:
				won++
			case http.StatusConflict:
				lost++
			default:
				t.Errorf("%d %s", p.status, p.body)
			}
		}
	}
	if got := b.get(t, f.url(1, "/get?key=n")).body; got != strconv.Itoa(won) {
		t.Errorf("counted %s; %d requests were answered with 200", got, won)
	}
	if lost == 0 {
		t.Error("no request lost, so there was no race")
	}
}

// wantAllCounted has 64 requests increment one counter at the same time, all of which must succeed and count.
func (f *farm) wantAllCounted(t *testing.T) {
	t.Helper()
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	for i, p := range f.storm(t, b, 64, func(int) string { return "/increment" }) {
		if p.status != http.StatusOK {
			t.Errorf("request %d: %d %s", i, p.status, p.body)
		}
	}
	if got := b.get(t, f.url(1, "/get?key=n")).body; got != "64" {
		t.Errorf("counted %s of 64", got)
	}
}

// The same with Retry: all of them count.
func TestRace_SameKeyRetry(t *testing.T) {
	f := newFarm(t, func(s *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
		return s.Retry(sm.LoadAndSave(mux))
	})
	f.wantAllCounted(t)
}

// The same with a resolver that sums.
func TestRace_SameKeyResolver(t *testing.T) {
	sum := func(c Conflict) (any, error) {
		base, _ := c.Base.(int)
		ours, _ := c.Ours.(int)
		theirs, _ := c.Theirs.(int)
		return theirs + ours - base, nil
	}
	f := newFarm(t, loadAndSave, WithResolver(sum))
	f.wantAllCounted(t)
}

// A logout while 8 requests are in flight, 200 times: the session does not come back, and no request fails.
func TestRace_Logout(t *testing.T) {
	f := newFarm(t, loadAndSave)
	for n := range 200 {
		b := newBrowser(t)
		b.get(t, f.url(n, "/login?user=alice"))
		f.inFlight(t, b, func(goOn func()) {
			goOn()
			if p := b.get(t, f.url(n, "/logout")); p.status != http.StatusOK {
				t.Errorf("logout: %d", p.status)
			}
		})
		b.CloseIdleConnections()
		if back := f.sessions(t); len(back) != 0 {
			t.Fatalf("round %d: the session came back: %v", n, back)
		}
	}
}

// Updates while the token is renewed. The new session has what the renewing request read and wrote. An update by another
// request is in it if it was committed before that read; one that is committed after the old session was deleted is
// refused, and its response passes without a cookie; one in between went with the old session. The old session does not
// stay.
func TestRace_RenewToken(t *testing.T) {
	f := newFarm(t, loadAndSave)
	for n := range 50 {
		b := newBrowser(t)
		b.get(t, f.url(n, "/login?user=alice"))
		f.inFlight(t, b, func(goOn func()) {
			goOn()
			b.get(t, f.url(n, "/renew"))
		})
		f.wantOneLogin(t, "alice", func(map[string]any) bool { return true })
		if err := f.destroyAll(t); err != nil {
			t.Fatal(err)
		}
	}
}

// What a login that follows a logout in the same request finds: nothing of the session before, whatever other requests
// write to that.
func TestRace_DestroyAndLoginAgain(t *testing.T) {
	f := newFarm(t, loadAndSave)
	for n := range 50 {
		b := newBrowser(t)
		b.get(t, f.url(n, "/login?user=alice"))
		f.inFlight(t, b, func(goOn func()) {
			goOn()
			b.get(t, f.url(n, "/switch"))
		})
		f.wantOneLogin(t, "bob", func(s map[string]any) bool { return len(s) == 1 })
		if err := f.destroyAll(t); err != nil {
			t.Fatal(err)
		}
	}
}

// wantOneLogin fails t unless there is one session with a user, and that one is as it should be.
func (f *farm) wantOneLogin(t *testing.T, user string, valid func(map[string]any) bool) {
	t.Helper()
	sessions := f.sessions(t)
	logins := slices.DeleteFunc(slices.Clone(sessions), func(s map[string]any) bool { return s["user"] == nil })
	if len(logins) != 1 || logins[0]["user"] != user || !valid(logins[0]) {
		t.Fatalf("sessions %v; want one login, %s's", sessions, user)
	}
}

func (f *farm) destroyAll(t *testing.T) error {
	t.Helper()
	return f.managers[0].Iterate(Begin(t.Context()), func(ctx context.Context) error { return f.managers[0].Destroy(ctx) })
}

// Everybody logs out at once, before requests that are in flight commit.
func TestRace_DestroyDestroy(t *testing.T) {
	f := newFarm(t, loadAndSave)
	for n := range 30 {
		b := newBrowser(t)
		b.get(t, f.url(n, "/login?user=alice"))
		f.inFlight(t, b, func(goOn func()) {
			for _, p := range f.storm(t, b, 8, func(int) string { return "/logout" }) {
				if p.status != http.StatusOK {
					t.Errorf("logout: %d %s", p.status, p.body)
				}
			}
			goOn()
		})
		if left := f.sessions(t); len(left) != 0 {
			t.Fatalf("round %d: %v", n, left)
		}
	}
}

// A job goes through all sessions, marks those with an even number and destroys the others, while requests write to them.
// No write is lost, and none brings a session back.
func TestRace_Iterate(t *testing.T) {
	const sessions = 30
	f := newFarm(t, loadAndSave)
	browsers := make([]*browser, sessions)
	for i := range browsers {
		browsers[i] = newBrowser(t)
		browsers[i].get(t, f.url(i, fmt.Sprintf("/login?user=%d", i)))
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	written := make([]map[string]any, sessions) // what was answered with a cookie, so was stored
	for i, b := range browsers {
		written[i] = map[string]any{"user": strconv.Itoa(i), "job": "done"}
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				key := "k" + strconv.Itoa(n)
				p := b.get(t, f.url(i+n, "/set?value=x&key="+key))
				if p.status != http.StatusOK {
					t.Errorf("%d %s", p.status, p.body)
				}
				if p.header.Get("Set-Cookie") == "" || i%2 == 1 {
					return // its session was destroyed; another request would begin a new one
				}
				written[i][key] = "x"
			}
		})
	}
	err := f.managers[0].Iterate(Begin(t.Context()), func(ctx context.Context) error {
		n, err := strconv.Atoi(f.managers[0].GetString(ctx, "user"))
		if err != nil || n%2 == 1 {
			return f.managers[0].Destroy(ctx)
		}
		f.managers[0].Put(ctx, "job", "done")
		_, _, err = f.managers[0].Commit(ctx)
		return err
	})
	if err != nil {
		t.Errorf("Iterate: %v", err)
	}
	close(stop)
	wg.Wait()
	left := make(map[string]map[string]any)
	for _, s := range f.sessions(t) {
		user, _ := s["user"].(string)
		left[user] = s
	}
	for i := range sessions {
		got := left[strconv.Itoa(i)]
		switch {
		case i%2 == 1 && got != nil:
			t.Errorf("session %d came back: %v", i, got)
		case i%2 == 0 && !maps.Equal(got, written[i]):
			t.Errorf("session %d holds %d keys, %d were written", i, len(got), len(written[i]))
		}
	}
}

// Implicit transactions are gone when their requests are: also where the browser left in the middle.
func TestRace_ImplicitTransactionsEnd(t *testing.T) {
	f := newFarm(t, func(_ *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
		mux.HandleFunc("/wait", func(_ http.ResponseWriter, r *http.Request) {
			sm.Put(r.Context(), "wait", "x")
			<-r.Context().Done()
		})
		return sm.LoadAndSave(mux)
	})
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := range 200 {
				resp, err := b.Get(f.url(w+i, "/get?key=user"))
				if err != nil {
					t.Error(err)
					continue
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
	wg.Wait()
	none := func() bool {
		return !slices.ContainsFunc(f.stores, func(s *EtcdStore) bool { return s.implicit.len() != 0 })
	}
	etcdtest.Eventually(t, patience, none, "transactions are left after 10 000 requests")
	for i := range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.url(i, "/wait"), nil)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			if resp, err := b.Do(req); err == nil {
				resp.Body.Close()
			}
		})
		etcdtest.Eventually(t, patience, func() bool { return f.stores[i%3].implicit.len() > 0 }, "a request has no transaction")
		cancel()
		wg.Wait()
		etcdtest.Eventually(t, patience, none, "a transaction is left after its client went away")
	}
	if got := b.get(t, f.url(0, "/get?key=wait")).body; got != "<nil>" {
		t.Errorf("a request whose client had gone committed %q", got)
	}
}

// Jobs on all machines update one session, next to requests.
func TestRace_Update(t *testing.T) {
	f := newFarm(t, loadAndSave)
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	all, err := f.stores[0].All()
	if err != nil || len(all) != 1 {
		t.Fatal(len(all), err)
	}
	token := slices.Collect(maps.Keys(all))[0]
	var wg sync.WaitGroup
	for i, s := range f.stores {
		for range 10 {
			wg.Go(func() {
				for range 5 {
					err := s.Update(t.Context(), token, func(values map[string]any) error {
						n, _ := values["n"].(int)
						values["n"] = n + 1
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Go(func() { b.get(t, f.url(i, fmt.Sprintf("/set?key=k%d&value=x", i))) })
	}
	wg.Wait()
	wantValues(t, f.stores[1], token, map[string]any{"user": "alice", "n": 150, "k0": "x", "k1": "x", "k2": "x"})

	failure := errors.New("the application's own")
	if err := f.stores[0].Update(t.Context(), token, func(v map[string]any) error { v["n"] = 0; return failure }); err != failure { //nolint:errorlint // as it is
		t.Errorf("Update: %v; want the function's error", err)
	}
	if err := f.stores[0].Delete(token); err != nil {
		t.Fatal(err)
	}
	if err := f.stores[1].Update(t.Context(), token, func(map[string]any) error { return nil }); !errors.Is(err, ErrSessionGone) {
		t.Errorf("Update of a deleted session: %v", err)
	}
}

// What becomes of an update by another request while a token is renewed, case by case. RenewToken deletes the old session
// at once and commits the new one at the end.
func TestRenewToken_OtherRequests(t *testing.T) {
	s, _ := newTestStore(t)
	sm := newManager(s)
	load := func(token string) context.Context {
		t.Helper()
		ctx, err := sm.Load(Begin(t.Context()), token)
		if err != nil {
			t.Fatal(err)
		}
		return ctx
	}
	commit := func(ctx context.Context) (string, error) {
		token, _, err := sm.Commit(ctx)
		return token, err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, destroy := range []bool{false, true} {
		first := load("")
		sm.Put(first, "user", "alice")
		old, err := commit(first)
		must(err)

		early := load(old)
		sm.Put(early, "early", 1)
		_, err = commit(early)
		must(err)

		renewing, between, late := load(old), load(old), load(old)
		sm.Put(between, "between", 1)
		_, err = commit(between)
		must(err)
		if destroy {
			must(sm.Destroy(renewing))
			sm.Put(renewing, "user", "bob")
		} else {
			must(sm.RenewToken(renewing))
		}
		wantAbsent(t, s, old)
		sm.Put(late, "late", 1)
		if _, err := commit(late); !errors.Is(err, ErrSessionGone) {
			t.Errorf("a commit to the old session after its deletion: %v; want ErrSessionGone", err)
		}
		renewed, err := commit(renewing)
		must(err)
		if _, err := commit(late); !errors.Is(err, ErrSessionGone) {
			t.Errorf("a commit to the old session after the renewal: %v; want ErrSessionGone", err)
		}
		want := map[string]any{"user": "alice", "early": 1, "between": 1} // a renewal carries over what came between
		if destroy {
			want = map[string]any{"user": "bob"}
		}
		wantValues(t, s, renewed, want)
		wantAbsent(t, s, old)
	}
}

// MergeSession takes over what it has read of the second session, and deletes that.
func TestMergeSession_OtherRequests(t *testing.T) {
	s, _ := newTestStore(t)
	sm := newManager(s)
	session := func(values ...string) string {
		t.Helper()
		ctx, err := sm.Load(Begin(t.Context()), "")
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range values {
			sm.Put(ctx, v, 1)
		}
		token, _, err := sm.Commit(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	one, two := session("one"), session("two")
	merging, err := sm.Load(Begin(t.Context()), one)
	if err != nil {
		t.Fatal(err)
	}
	late, err := sm.Load(Begin(t.Context()), two)
	if err != nil {
		t.Fatal(err)
	}
	if err := sm.MergeSession(merging, two); err != nil {
		t.Fatal(err)
	}
	sm.Put(late, "late", 1)
	if _, _, err := sm.Commit(late); !errors.Is(err, ErrSessionGone) {
		t.Errorf("a commit to the merged session: %v; want ErrSessionGone", err)
	}
	if err := s.Update(t.Context(), one, func(v map[string]any) error { v["meanwhile"] = 1; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, _, err := sm.Commit(merging); err != nil {
		t.Fatal(err)
	}
	wantValues(t, s, one, map[string]any{"one": 1, "two": 1, "meanwhile": 1})
	wantAbsent(t, s, two)
}
