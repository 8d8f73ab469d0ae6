package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

const lockPrefix = defaultPrefix + reserved + "lock/"

// lockKeys returns the keys of all locks that are held or waited for.
func (s *site) lockKeys(t testing.TB) []*lockKey {
	t.Helper()
	resp, err := s.admin.Get(context.Background(), lockPrefix, clientv3.WithPrefix())
	if err != nil {
		t.Error(err)
		return nil
	}
	keys := make([]*lockKey, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		keys[i] = &lockKey{string(kv.Key), string(kv.Value), clientv3.LeaseID(kv.Lease)}
	}
	return keys
}

type lockKey struct {
	key, value string
	lease      clientv3.LeaseID
}

// wantUnlocked waits until no key of a lock is left.
func (s *site) wantUnlocked(t *testing.T) {
	t.Helper()
	etcdtest.Eventually(t, patience, func() bool { return len(s.lockKeys(t)) == 0 }, "a lock's key was left")
}

// queued returns at how many sessions a process takes turns, and how many requests have a turn or wait for one.
func queued(s *EtcdStore) (sessions, users int) { return s.locks.Waiting() }

// newSites starts n sites with Exclusive on a cluster of one.
func newSites(t *testing.T, n int, opts ...Option) []*site {
	t.Helper()
	c := etcdtest.New(t, etcdtest.Config{})
	sites := make([]*site, n)
	for i := range sites {
		sites[i] = newSite(t, c, (*site).exclusive, opts...)
	}
	return sites
}

// begin makes a request on a site in the background.
func (b *browser) begin(t *testing.T, s *site, path string) <-chan response {
	t.Helper()
	req := newRequest(t, http.MethodGet, s.url+path, nil)
	done := make(chan response, 1)
	go func() { done <- b.do(t, req) }()
	return done
}

// stop is a handler that stays until it is told to go on.
type stop struct {
	inside, goOn chan struct{}
}

// handleStop registers a handler that sets a key, and stops.
func (s *site) handleStop(path string) *stop {
	h := &stop{make(chan struct{}, 1), make(chan struct{})}
	s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), path, true)
		h.stay(r)
		fmt.Fprint(w, path)
	})
	return h
}

// stay is called by the handler.
func (h *stop) stay(r *http.Request) {
	h.inside <- struct{}{}
	select {
	case <-h.goOn:
	case <-r.Context().Done(): // the test has failed
	}
}

// entered waits until a request is inside. It fails t if that is answered instead.
func (h *stop) entered(t *testing.T, answer <-chan response) {
	t.Helper()
	select {
	case <-h.inside:
	case got := <-answer:
		t.Fatalf("answer %+v from outside of the handler", got)
	}
}

// handleSet registers a handler that sets a key.
func (s *site) handleSet(path string) {
	s.mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), path, true)
		fmt.Fprint(w, path)
	})
}

// get is do with a GET.
func (s *site) get(t *testing.T, b *browser, path string) response {
	t.Helper()
	return b.do(t, newRequest(t, http.MethodGet, s.url+path, nil))
}

// One request of a session at a time, over three servers and within one. So all increments count, without Retry.
func TestExclusive_OneAtATime(t *testing.T) {
	var inside, counted atomic.Int32
	f := newFarm(t, func(s *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
		app := http.NewServeMux()
		app.Handle("/", mux)
		app.HandleFunc("/alone", func(w http.ResponseWriter, r *http.Request) {
			if n := inside.Add(1); n != 1 {
				t.Errorf("%d requests at a time", n)
			}
			defer inside.Add(-1)
			n := counted.Load()
			sm.Put(r.Context(), "n", sm.GetInt(r.Context(), "n")+1)
			runtime.Gosched()
			fmt.Fprint(w, sm.GetInt(r.Context(), "n"))
			if !counted.CompareAndSwap(n, n+1) {
				t.Error("two requests at a time")
			}
		})
		return s.Exclusive(sm, sm.LoadAndSave(app))
	})
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	pages := f.storm(t, b, 24, func(int) string { return "/alone" })
	one := f.urls[0]
	f.urls = []string{one} // from now on, one server
	pages = append(pages, f.storm(t, b, 16, func(int) string { return "/alone" })...)
	seen := make(map[string]bool)
	for i, p := range pages {
		if p.status != http.StatusOK || seen[p.body] {
			t.Errorf("request %d: %d %q", i, p.status, p.body)
		}
		seen[p.body] = true
	}
	if got := b.get(t, one+"/get?key=n").body; got != "40" || counted.Load() != 40 {
		t.Errorf("counted %s in the session, %d in memory; want 40", got, counted.Load())
	}
	etcdtest.Eventually(t, patience, func() bool { return len(etcdtest.Keys(t, f.admin, lockPrefix)) == 0 }, "a lock's key was left")
	for _, s := range f.stores {
		etcdtest.Eventually(t, patience, func() bool { sessions, _ := queued(s); return sessions == 0 }, "a turn was not given back")
	}
}

// Different sessions do not wait for each other: these requests go on when all of them are inside.
func TestExclusive_OtherSessions(t *testing.T) {
	sites := newSites(t, 2)
	const each = 3
	var entered, looked sync.WaitGroup
	entered.Add(each * len(sites))
	looked.Add(each * len(sites))
	var leases sync.Map
	for _, s := range sites {
		s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
			entered.Done()
			entered.Wait()
			keys := s.lockKeys(t)
			if len(keys) != each*len(sites) {
				t.Errorf("%d locks are held, want %d", len(keys), each*len(sites))
			}
			for _, k := range keys {
				leases.Store(k.lease, true)
			}
			looked.Done()
			looked.Wait()
			fmt.Fprint(w, "ok")
		})
	}
	var answers []<-chan response
	for range each {
		for _, s := range sites {
			answers = append(answers, s.login(t).begin(t, s, "/"))
		}
	}
	for _, a := range answers {
		wantOK(t, <-a, "ok")
	}
	// All locks of a process are on one lease.
	n := 0
	for range leases.Range {
		n++
	}
	if n != len(sites) {
		t.Errorf("%d leases for %d servers", n, len(sites))
	}
}

// The lock's key does not tell the token, and goes with the lock. The lease stays until the store is closed.
func TestExclusive_Key(t *testing.T) {
	s := newSites(t, 1, WithTimeout(time.Minute))[0]
	h := s.handleStop("/")
	b := s.login(t)
	token := b.token(t, s)
	began := time.Now()
	answer := b.begin(t, s, "/")
	<-h.inside
	keys := s.lockKeys(t)
	if len(keys) != 1 {
		t.Fatalf("%d lock keys, want 1", len(keys))
	}
	all := strings.ToLower(keys[0].key + keys[0].value)
	for i := range len(token) - 5 {
		if strings.Contains(all, strings.ToLower(token[i:i+6])) {
			t.Errorf("%q contains %q of the token", all, token[i:i+6])
		}
	}
	close(h.goOn)
	wantOK(t, <-answer, "/")
	s.wantUnlocked(t)
	hasLease := func() bool { return slices.Contains(etcdtest.Leases(t, s.admin), keys[0].lease) }
	if !hasLease() && time.Since(began) < etcd.AttemptTimeout { // it is retired when etcd takes longer to answer
		t.Error("the lease has ended with the request")
	}
	s.close()
	if hasLease() {
		t.Error("the lease has not ended with the store")
	}
	rec := httptest.NewRecorder()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
	req.AddCookie(&http.Cookie{Name: "session", Value: token})
	s.exclusive().ServeHTTP(rec, req)
	if rec.Code != http.StatusInternalServerError {
		t.Errorf("answer after Close: %d", rec.Code)
	}
}

// A wait ends with its request, and leaves nothing behind that keeps others from the lock.
func TestExclusive_WaitEnds(t *testing.T) {
	for name, n := range map[string]int{"on the same server": 1, "on another server": 2} {
		t.Run(name, func(t *testing.T) {
			sites := newSites(t, n)
			first, second := sites[0], sites[n-1]
			h := first.handleStop("/stop")
			second.handleSet("/never")
			second.handleSet("/last")
			b := first.login(t)
			stopped := b.begin(t, first, "/stop")
			<-h.inside

			ctx, leave := context.WithCancel(t.Context())
			req := newRequest(t, http.MethodGet, second.url+"/never", nil).WithContext(ctx)
			gone := make(chan response, 1)
			go func() { gone <- b.do(t, req) }()
			etcdtest.Eventually(t, patience, func() bool {
				_, users := queued(second.store)
				return users == 3-n && len(first.lockKeys(t)) == n
			}, "the request does not wait")
			leave()
			if got := <-gone; !got.failed {
				t.Errorf("answer %+v", got)
			}
			etcdtest.Eventually(t, patience, func() bool { return len(first.lockKeys(t)) == 1 }, "the wait's key was left")

			close(h.goOn)
			wantOK(t, <-stopped, "/stop")
			wantOK(t, second.get(t, b, "/last"), "/last")
			if v := first.values(t, b.token(t, first)); v["/never"] != nil || v["/last"] == nil {
				t.Errorf("the session holds %v", v)
			}
			first.wantUnlocked(t)
		})
	}
}

// A request that loses its lock cannot save any more, whether the session has changed meanwhile or not.
func TestExclusive_Fencing(t *testing.T) {
	for name, wrap := range map[string]func(s *site) http.Handler{
		"Exclusive":        (*site).exclusive,
		"Exclusive, Retry": func(s *site) http.Handler { return s.store.Exclusive(s.manager, s.retried()) },
	} {
		for _, write := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, other writes %v", name, write), func(t *testing.T) {
				c := etcdtest.New(t, etcdtest.Config{})
				first, second := newSite(t, c, wrap), newSite(t, c, (*site).exclusive)
				h := first.handleStop("/slow")
				first.handleSet("/after")
				second.mux.HandleFunc("/look", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "looked") })
				second.handleSet("/write")
				b := first.login(t)
				token := b.token(t, first)
				slow := b.begin(t, first, "/slow")
				<-h.inside
				if _, err := first.admin.Revoke(t.Context(), first.lockKeys(t)[0].lease); err != nil {
					t.Fatal(err)
				}
				if write {
					wantOK(t, second.get(t, b, "/write"), "/write")
				} else {
					wantOK(t, second.get(t, b, "/look"), "looked")
				}
				close(h.goOn)
				if got := <-slow; got.status != http.StatusConflict || got.header["Set-Cookie"] != nil {
					t.Errorf("answer %d %q %v, want 409", got.status, got.body, got.header)
				}
				if n := len(h.inside); n != 0 {
					t.Error("the handler has run again without the lock")
				}
				if v := first.values(t, token); v["/slow"] != nil || (v["/write"] != nil) != write {
					t.Errorf("the session holds %v", v)
				}
				// The process gets another lease, without an error in between.
				wantOK(t, first.get(t, b, "/after"), "/after")
				first.wantUnlocked(t)
			})
		}
	}
}

// Nor can it delete the session.
func TestExclusive_FencedDelete(t *testing.T) {
	s := newSites(t, 1)[0]
	h := &stop{make(chan struct{}, 1), make(chan struct{})}
	var token string
	deleted := make(chan error, 1)
	s.mux.HandleFunc("/delete", func(_ http.ResponseWriter, r *http.Request) {
		h.stay(r)
		deleted <- s.store.DeleteCtx(r.Context(), token)
	})
	b := s.login(t)
	token = b.token(t, s)
	answer := b.begin(t, s, "/delete")
	h.entered(t, answer)
	if _, err := s.admin.Revoke(t.Context(), s.lockKeys(t)[0].lease); err != nil {
		t.Fatal(err)
	}
	close(h.goOn)
	wantErr(t, "delete", <-deleted, ErrConflict)
	<-answer
	if v := s.values(t, token); v["user"] != "alice" {
		t.Errorf("the session holds %v", v)
	}
	s.wantUnlocked(t)
}

// Where nobody else wants the session, the lock costs two requests to etcd.
func TestExclusive_Cost(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	cost := func(wrap func(*site) http.Handler) int32 {
		s := newSite(t, c, wrap, WithTimeout(time.Minute))
		s.handleSet("/")
		b := s.login(t)
		wantOK(t, s.get(t, b, "/"), "/")
		var n atomic.Int32
		s.faults.Intercept(func(method string, req any) etcdtest.Fate {
			if onPath(method, req) {
				n.Add(1)
			}
			return etcdtest.Fate{}
		})
		least := int32(math.MaxInt32) // others have been sent again, as etcd took its time
		for range 10 {
			n.Store(0)
			wantOK(t, s.get(t, b, "/"), "/")
			s.wantUnlocked(t)
			least = min(least, n.Load())
		}
		return least
	}
	plain, locked := cost((*site).loadAndSaved), cost((*site).exclusive)
	if plain == 0 || locked != plain+2 {
		t.Errorf("a request costs %d requests to etcd, without Exclusive %d", locked, plain)
	}
}

// onPath reports whether a request to etcd is one that a call waits for. Those about the leases of sessions are made on
// the side.
func onPath(method string, req any) bool {
	r, ok := req.(interface{ GetKey() []byte })
	lease := ok && strings.HasPrefix(string(r.GetKey()), defaultPrefix+reserved+"lease/")
	return strings.HasPrefix(method, "/etcdserverpb.KV/") && !lease
}

// isLock reports whether a request to etcd is that of a lock.
func isLock(req any) bool {
	txn, ok := req.(*etcdserverpb.TxnRequest)
	return ok && len(txn.Compare) > 0 && strings.HasPrefix(string(txn.Compare[0].Key), lockPrefix)
}

// isUnlock reports whether a request to etcd deletes a lock's key.
func isUnlock(req any) bool {
	del, ok := req.(*etcdserverpb.DeleteRangeRequest)
	return ok && strings.HasPrefix(string(del.Key), lockPrefix)
}

// times lets the first n requests that match have this fate.
func times(n int32, match func(req any) bool, fate etcdtest.Fate) func(string, any) etcdtest.Fate {
	return func(_ string, req any) etcdtest.Fate {
		if match(req) && atomic.AddInt32(&n, -1) >= 0 {
			return fate
		}
		return etcdtest.Fate{}
	}
}

var (
	lostRequest = etcdtest.Fate{Drop: true}
	lostAnswer  = etcdtest.Fate{Err: status.Error(codes.Unavailable, "error reading from server: EOF")}
	refusal     = etcdtest.Fate{Drop: true, Err: rpctypes.ErrGRPCPermissionDenied}
	noAnswer    = etcdtest.Fate{Delay: time.Hour, Drop: true} // ends with the call's context
)

// Neither a lock nor its release that goes wrong locks the session out.
func TestExclusive_Faults(t *testing.T) {
	const always = 1 << 30
	for name, tt := range map[string]struct {
		fn     func(string, any) etcdtest.Fate
		status int
	}{
		"lock's request lost once":       {times(1, isLock, lostRequest), http.StatusOK},
		"lock's answer lost once":        {times(1, isLock, lostAnswer), http.StatusOK},
		"lock is not answered once":      {times(1, isLock, noAnswer), http.StatusOK},
		"lock's answer always lost":      {times(always, isLock, lostAnswer), http.StatusServiceUnavailable},
		"lock is never answered":         {times(always, isLock, noAnswer), http.StatusServiceUnavailable},
		"lock is refused":                {times(1, isLock, refusal), http.StatusInternalServerError},
		"unlock is refused":              {times(always, isUnlock, refusal), http.StatusOK},
		"unlock's request lost once":     {times(1, isUnlock, lostRequest), http.StatusOK},
		"unlock's answer lost once":      {times(1, isUnlock, lostAnswer), http.StatusOK},
		"unlock is not answered once":    {times(1, isUnlock, noAnswer), http.StatusOK},
		"unlock's request always lost":   {times(always, isUnlock, lostRequest), http.StatusOK},
		"unlock is never answered":       {times(always, isUnlock, noAnswer), http.StatusOK},
		"neither is answered in the end": {times(always, func(req any) bool { return isLock(req) || isUnlock(req) }, lostAnswer), http.StatusServiceUnavailable},
		"neither is ever answered":       {times(always, func(req any) bool { return isLock(req) || isUnlock(req) }, noAnswer), http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			sites := newSites(t, 2, WithTimeout(time.Second))
			for _, s := range sites {
				s.handleSet("/set")
				s.handleSet("/again")
			}
			b := sites[0].login(t)
			wantOK(t, sites[0].get(t, b, "/again"), "/again") // there is a lease
			sites[0].faults.Intercept(tt.fn)
			if got := sites[0].get(t, b, "/set"); got.status != tt.status {
				t.Errorf("answer %+v, want %d", got, tt.status)
			}
			if got := sites[0].values(t, b.token(t, sites[0]))["/set"]; (got != nil) != (tt.status == http.StatusOK) {
				t.Errorf("the answer was %d, and the session holds %v", tt.status, got)
			}
			// The faults go on for the first server. The other one gets the lock.
			wantOK(t, sites[1].get(t, b, "/again"), "/again")
			sites[0].faults.Intercept(nil)
			wantOK(t, sites[0].get(t, b, "/again"), "/again")
			sites[0].wantUnlocked(t)
		})
	}
}

// What the lock leaves to be done when the request ends is not waited for, however long etcd takes to answer.
func TestExclusive_EndsWithoutAnswer(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	holder := newSite(t, c, (*site).exclusive)
	ended := make(chan struct{}, 1)
	s := newSite(t, c, func(s *site) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.exclusive().ServeHTTP(w, r)
			ended <- struct{}{}
		})
	}, WithTimeout(time.Hour))
	s.handleSet("/set")
	h := holder.handleStop("/stop")
	b := s.login(t)
	<-ended
	silence := func(match func(req any) bool) (reached chan struct{}) {
		reached = make(chan struct{}, 100)
		s.faults.Intercept(func(_ string, req any) etcdtest.Fate {
			if !match(req) {
				return etcdtest.Fate{}
			}
			reached <- struct{}{}
			return noAnswer
		})
		return reached
	}
	// leave makes a request, and goes away when it waits for an answer of etcd that does not come.
	leave := func(reached <-chan struct{}, waits func() bool, then func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		req := newRequest(t, http.MethodGet, s.url+"/set", nil).WithContext(ctx)
		gone := make(chan response, 1)
		go func() { gone <- b.do(t, req) }()
		if reached != nil {
			<-reached
		}
		etcdtest.Eventually(t, patience, waits, "the request does not wait")
		then()
		cancel()
		if got := <-gone; !got.failed {
			t.Errorf("answer %+v", got)
		}
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatal("the request goes on without its client")
		}
		s.faults.Intercept(nil)
	}

	silence(isUnlock)
	wantOK(t, s.get(t, b, "/set"), "/set")
	<-ended
	s.faults.Intercept(nil)
	holder.wantUnlocked(t)

	leave(silence(isLock), func() bool { return true }, func() {})
	holder.wantUnlocked(t)

	stopped := b.begin(t, holder, "/stop")
	<-h.inside
	leave(nil, func() bool { return len(holder.lockKeys(t)) == 2 }, func() { silence(func(any) bool { return true }) })
	etcdtest.Eventually(t, patience, func() bool { return len(holder.lockKeys(t)) == 1 }, "the wait's key was left")
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	wantOK(t, s.get(t, b, "/set"), "/set")
	<-ended
}

// late is a request to etcd that hangs in the network, and is delivered later.
type late struct {
	mu  sync.Mutex
	req any
}

// catch takes the first request that matches out of the traffic. Its sender hears that the connection broke.
func (l *late) catch(match func(req any) bool) func(string, any) etcdtest.Fate {
	return func(_ string, req any) etcdtest.Fate {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.req != nil || !match(req) {
			return etcdtest.Fate{}
		}
		l.req = req
		return lostRequest
	}
}

// deliver brings the request to etcd.
func (l *late) deliver(t *testing.T, cli *clientv3.Client) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	kv := etcdserverpb.NewKVClient(cli.ActiveConnection())
	var err error
	switch req := l.req.(type) {
	case *etcdserverpb.TxnRequest:
		_, err = kv.Txn(t.Context(), req)
	case *etcdserverpb.DeleteRangeRequest:
		_, err = kv.DeleteRange(t.Context(), req)
	default:
		t.Fatalf("caught %T", req)
	}
	t.Logf("late %T: %v", l.req, err)
}

// A request to lock that etcd gets when the lock was released already does not lock the session.
func TestExclusive_LateLock(t *testing.T) {
	sites := newSites(t, 2)
	s := sites[0]
	s.handleSet("/set")
	sites[1].handleSet("/set")
	b := s.login(t)
	wantOK(t, s.get(t, b, "/set"), "/set")
	var l late
	s.faults.Intercept(l.catch(isLock))
	wantOK(t, s.get(t, b, "/set"), "/set")
	l.mu.Lock()
	lease := clientv3.LeaseID(l.req.(*etcdserverpb.TxnRequest).Success[0].GetRequestPut().Lease)
	l.mu.Unlock()
	etcdtest.Eventually(t, patience, func() bool { return !slices.Contains(etcdtest.Leases(t, s.admin), lease) }, "the lease was not revoked")
	l.deliver(t, s.admin)
	if keys := s.lockKeys(t); len(keys) != 0 {
		t.Errorf("%d keys", len(keys))
	}
	wantOK(t, sites[1].get(t, b, "/set"), "/set")
}

// A request to unlock that etcd gets when the same process has the lock again does not take it away.
func TestExclusive_LateUnlock(t *testing.T) {
	s := newSites(t, 1)[0]
	s.handleSet("/set")
	h := s.handleStop("/stop")
	b := s.login(t)
	var l late
	s.faults.Intercept(l.catch(isUnlock))
	wantOK(t, s.get(t, b, "/set"), "/set")
	answer := b.begin(t, s, "/stop")
	<-h.inside
	l.deliver(t, s.admin)
	if keys := s.lockKeys(t); len(keys) != 1 {
		t.Errorf("%d keys, want 1", len(keys))
	}
	close(h.goOn)
	wantOK(t, <-answer, "/stop")
}

// A lock that is held outlives trouble with another one on the same lease.
func TestExclusive_RetiredLease(t *testing.T) {
	s := newSites(t, 1, WithTimeout(time.Second))[0]
	h := s.handleStop("/stop")
	s.handleSet("/set")
	holder, other := s.login(t), s.login(t)
	answer := holder.begin(t, s, "/stop")
	<-h.inside
	held := s.lockKeys(t)[0]
	s.faults.Intercept(times(1, isLock, noAnswer))
	for range 3 {
		wantOK(t, s.get(t, other, "/set"), "/set")
	}
	if keys := s.lockKeys(t); len(keys) != 1 || *keys[0] != *held {
		t.Errorf("%d keys, want 1", len(keys))
	}
	if id := s.store.locks.LeaseID(); id == clientv3.NoLease || id == held.lease {
		t.Error("the lease is still in use")
	}
	close(h.goOn)
	wantOK(t, <-answer, "/stop")
	etcdtest.Eventually(t, patience, func() bool { return !slices.Contains(etcdtest.Leases(t, s.admin), held.lease) }, "the lease was not revoked")
}

// A request that waits while its process loses the lease waits on.
func TestExclusive_LeaseLostWaiting(t *testing.T) {
	sites := newSites(t, 2)
	h := sites[0].handleStop("/stop")
	sites[1].handleSet("/set")
	b := sites[0].login(t)
	stopped := b.begin(t, sites[0], "/stop")
	<-h.inside
	holder := sites[0].lockKeys(t)[0]
	waiting := b.begin(t, sites[1], "/set")
	var waiter clientv3.LeaseID
	etcdtest.Eventually(t, patience, func() bool {
		for _, k := range sites[0].lockKeys(t) {
			if k.lease != holder.lease {
				waiter = k.lease
			}
		}
		return waiter != 0
	}, "the request does not wait")
	if _, err := sites[0].admin.Revoke(t.Context(), waiter); err != nil {
		t.Fatal(err)
	}
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	wantOK(t, <-waiting, "/set")
	sites[0].wantUnlocked(t)
}

// A request that waits at a member that has lost the others gets the lock from them.
func TestExclusive_Partition(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{Members: 3})
	cut := (c.Leader(t) + 1) % 3
	sites := []*site{newSite(t, c, (*site).exclusive), newSite(t, c, (*site).exclusive)}
	h := sites[0].handleStop("/stop")
	sites[1].handleSet("/set")
	b := sites[0].login(t)
	stopped := b.begin(t, sites[0], "/stop")
	<-h.inside
	cli := sites[1].client
	all := cli.Endpoints()
	cli.SetEndpoints(all[cut])
	waiting := b.begin(t, sites[1], "/set")
	etcdtest.Eventually(t, patience, func() bool { return len(sites[0].lockKeys(t)) == 2 }, "the request does not wait")
	etcdtest.Eventually(t, patience, func() bool { return sites[1].watches.Load() == 1 }, "it does not watch")
	cli.SetEndpoints(all...)
	m := c.Integration().Members
	m[cut].InjectPartition(t, m[(cut+1)%3], m[(cut+2)%3])
	defer m[cut].RecoverPartition(t, m[(cut+1)%3], m[(cut+2)%3])
	sites[0].client.SetEndpoints(all[(cut+1)%3], all[(cut+2)%3])
	sites[0].admin.SetEndpoints(all[(cut+1)%3], all[(cut+2)%3])
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	wantOK(t, <-waiting, "/set")
}

// unreachable returns a client of an etcd that nobody runs.
func unreachable(t *testing.T) *clientv3.Client {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{addr}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cli.Close() })
	return cli
}

// Without etcd all requests are answered in time, not one after another.
func TestExclusive_NoEtcd(t *testing.T) {
	s := New(unreachable(t), WithTimeout(300*time.Millisecond))
	server := httptest.NewServer(s.Exclusive(scs.New(), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the handler runs")
	})))
	defer server.Close()
	b := newBrowser(t)
	b.Timeout = patience // a quarter of what it takes one after another
	var wg sync.WaitGroup
	for i := range 800 {
		wg.Go(func() {
			req := newRequest(t, http.MethodGet, server.URL, nil)
			req.AddCookie(&http.Cookie{Name: "session", Value: "token" + strconv.Itoa(i%40)})
			got := b.do(t, req)
			if got.status != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
				t.Errorf("request %d: %+v", i, got)
			}
		})
	}
	wg.Wait()
	mustClose(t, s)
}

// The same where etcd goes away later, and comes back.
func TestExclusive_EtcdStops(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	s := newSite(t, c, (*site).exclusive, WithTimeout(300*time.Millisecond))
	s.handleSet("/")
	b := s.login(t)
	wantOK(t, s.get(t, b, "/"), "/")
	m := c.Integration().Members[0]
	m.Stop(t)
	for range 3 {
		if got := s.get(t, b, "/"); got.status != http.StatusServiceUnavailable {
			t.Errorf("answer %+v, want 503", got)
		}
	}
	if err := m.Restart(t); err != nil {
		t.Fatal(err)
	}
	c.Leader(t)
	etcdtest.Eventually(t, patience, func() bool { return s.get(t, b, "/").status == http.StatusOK }, "etcd is back, the application is not")
}

// Close ends although a wait cannot be taken back from an etcd that does not answer.
func TestExclusive_CloseWithoutAnswer(t *testing.T) {
	sites := newSites(t, 2, WithTimeout(300*time.Millisecond))
	h := sites[0].handleStop("/stop")
	sites[1].handleSet("/set")
	b := sites[0].login(t)
	stopped := b.begin(t, sites[0], "/stop")
	<-h.inside
	ctx, leave := context.WithCancel(t.Context())
	req := newRequest(t, http.MethodGet, sites[1].url+"/set", nil).WithContext(ctx)
	gone := make(chan response, 1)
	go func() { gone <- b.do(t, req) }()
	etcdtest.Eventually(t, patience, func() bool { return len(sites[0].lockKeys(t)) == 2 }, "the request does not wait")
	sites[1].faults.Intercept(func(string, any) etcdtest.Fate { return noAnswer })
	leave()
	<-gone
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		sites[1].store.Close()
	}()
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("Close does not return")
	}
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	sites[1].faults.Intercept(nil)
}

// Retry outside of Exclusive: each run has the lock, also where it lost against a request that went without.
func TestExclusive_InRetry(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), func(s *site) http.Handler { return s.store.Retry(s.exclusive()) })
	var inside atomic.Int32
	c := s.handle(t, "/", 3, func(w http.ResponseWriter, _ *http.Request, run int32) {
		if n := len(s.lockKeys(t)); n != 1 || inside.Add(1) != 1 {
			t.Errorf("run %d: %d locks", run, n)
		}
		defer inside.Add(-1)
		fmt.Fprint(w, "run ", run)
	})
	b := s.login(t)
	wantOK(t, s.get(t, b, "/"), "run 4")
	c.want(t, 4)
	s.wantCount(t, b, 3001)
	s.wantUnlocked(t)

	// A run whose lock is lost is repeated with another.
	h := s.handleStop("/stop")
	answer := b.begin(t, s, "/stop")
	<-h.inside
	if _, err := s.admin.Revoke(t.Context(), s.lockKeys(t)[0].lease); err != nil {
		t.Fatal(err)
	}
	close(h.goOn)
	<-h.inside
	wantOK(t, <-answer, "/stop")
	s.wantUnlocked(t)
}

// Requests with Retry and such with Exclusive, at the same time and on three servers: all of them count.
func TestExclusive_AmongOthers(t *testing.T) {
	f := newFarm(t, func(s *EtcdStore, sm *scs.SessionManager, mux *http.ServeMux) http.Handler {
		app := http.NewServeMux()
		app.Handle("/", s.Retry(sm.LoadAndSave(mux)))
		app.Handle("/locked/", http.StripPrefix("/locked", s.Retry(s.Exclusive(sm, sm.LoadAndSave(mux)))))
		return app
	})
	b := newBrowser(t)
	b.get(t, f.url(0, "/login?user=alice"))
	for i, p := range f.storm(t, b, 18, func(i int) string { return []string{"/increment", "/locked/increment"}[i/3%2] }) {
		if p.status != http.StatusOK {
			t.Errorf("request %d: %d %s", i, p.status, p.body)
		}
	}
	if got := b.get(t, f.url(1, "/get?key=n")).body; got != "18" {
		t.Errorf("counted %s, want 18", got)
	}
}

// What cannot be a session's token needs no lock, nor etcd.
func TestExclusive_NoSession(t *testing.T) {
	s := newSites(t, 1)[0]
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "ok")
	})
	for name, cookie := range map[string]string{
		"none":      "",
		"empty":     "session=",
		"reserved":  "session=~lease/1",
		"too long":  "session=" + strings.Repeat("a", maxToken+1),
		"another":   "other=abc",
		"malformed": "session",
		"quoted":    `session=""`,
	} {
		req := newRequest(t, http.MethodGet, s.url+"/", nil)
		if name != "none" {
			req.Header.Set("Cookie", cookie)
		}
		wantOK(t, newBrowser(t).do(t, req), "ok")
		for _, m := range []string{"KV/Txn", "KV/Range", "KV/DeleteRange", "Lease/LeaseGrant"} {
			if n := s.faults.Calls("/etcdserverpb." + m); n != 0 {
				t.Errorf("%s: %d calls of %s", name, n, m)
			}
		}
	}
	// A token that no session has is locked like others, as a session may come to be under it.
	req := newRequest(t, http.MethodGet, s.url+"/", nil)
	req.AddCookie(&http.Cookie{Name: "session", Value: "unknown"})
	wantOK(t, newBrowser(t).do(t, req), "ok")
	s.wantUnlocked(t)
}

// Permission for the prefix is all that a lock needs: also to wait for it, and to give back its lease.
func TestExclusive_RBAC(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	etcdtest.EnableAuth(t, c, "app", "secret", defaultPrefix)
	root, app := etcdtest.WithUser("root", "root"), etcdtest.WithUser("app", "secret")
	if _, err := c.Client(t, app).Put(t.Context(), "elsewhere", "x"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Fatalf("the user may write outside of the prefix: %v", err)
	}
	var sites []*site
	for range 2 {
		sites = append(sites, newSiteOf(t, c.Client(t, root), func(opts ...etcdtest.ClientOption) *clientv3.Client {
			return c.Client(t, append(opts, app)...)
		}, (*site).exclusive, WithTimeout(time.Minute)))
	}
	h := sites[0].handleStop("/stop")
	sites[1].handleSet("/set")
	b := sites[0].login(t)
	stopped := b.begin(t, sites[0], "/stop")
	h.entered(t, stopped)
	waiting := b.begin(t, sites[1], "/set")
	etcdtest.Eventually(t, patience, func() bool {
		return len(sites[0].lockKeys(t)) == 2 && sites[1].watches.Load() == 1
	}, "the request does not wait")
	locks := sites[0].lockKeys(t)
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	wantOK(t, <-waiting, "/set")
	if v := sites[0].values(t, b.token(t, sites[0])); v["/stop"] == nil || v["/set"] == nil {
		t.Errorf("the session holds %v", v)
	}
	sites[0].wantUnlocked(t)
	for _, s := range sites {
		s.close()
	}
	left := etcdtest.Leases(t, sites[0].admin)
	for _, l := range locks {
		if slices.Contains(left, l.lease) {
			t.Error("a lock's lease was left")
		}
	}
}

// A handler that panics does not keep its lock.
func TestExclusive_Panics(t *testing.T) {
	s := newSites(t, 1)[0]
	s.mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	s.handleSet("/set")
	b := s.login(t)
	if got := s.get(t, b, "/"); !got.failed {
		t.Errorf("answer %+v", got)
	}
	wantOK(t, s.get(t, b, "/set"), "/set")
	s.wantUnlocked(t)
}

// After Close no goroutine is left, whatever the requests went through.
func TestExclusive_Goroutines(t *testing.T) {
	sites := newSites(t, 2, WithTimeout(time.Second))
	s := sites[0]
	h := sites[1].handleStop("/stop")
	s.handleSet("/set")
	b := s.login(t)
	for i := range 3 {
		stopped := b.begin(t, sites[1], "/stop")
		<-h.inside
		ctx, leave := context.WithCancel(t.Context())
		req := newRequest(t, http.MethodGet, s.url+"/set", nil).WithContext(ctx)
		gone := make(chan response, 1)
		go func() { gone <- b.do(t, req) }()
		etcdtest.Eventually(t, patience, func() bool { return len(s.lockKeys(t)) == 2 }, "the request does not wait")
		leave()
		<-gone
		h.goOn <- struct{}{}
		wantOK(t, <-stopped, "/stop")
		s.faults.Intercept(times(int32(i), func(req any) bool { return isLock(req) || isUnlock(req) }, lostAnswer))
		wantOK(t, s.get(t, b, "/set"), "/set")
	}
	for _, s := range sites {
		s.close()
	}
	s.wantUnlocked(t)
	etcdtest.Eventually(t, patience, func() bool {
		buf := make([]byte, 4<<20)
		stacks := string(buf[:runtime.Stack(buf, true)])
		return !strings.Contains(stacks, "etcdstore.(*lock") && !strings.Contains(stacks, "v3/concurrency.")
	}, "goroutines were left")
}
