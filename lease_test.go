package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

const grantMethod = "/etcdserverpb.Lease/LeaseGrant"

func TestLease_ManySessions(t *testing.T) {
	s, cli := newTestStore(t)
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := range 40 {
				for range 3 {
					mustCommitTo(t, s, fmt.Sprint(w, "-", i))
				}
			}
		})
	}
	wg.Wait()
	if n := len(etcdtest.Leases(t, cli)); n > 40 {
		t.Errorf("%d leases for 2000 sessions", n)
	}
	if all, err := s.All(); err != nil || len(all) != 2000 {
		t.Errorf("%d sessions, %v", len(all), err)
	}
}

func mustCommitTo(t *testing.T, s *EtcdStore, token string) {
	t.Helper()
	if err := s.Commit(token, []byte("x"), time.Now().Add(time.Hour)); err != nil {
		t.Errorf("Commit: %v", err)
	}
}

// Sessions with lifetimes from a minute to a month share a few leases.
func TestLease_ManyLifetimes(t *testing.T) {
	s, cli := newTestStore(t)
	for i := range 300 {
		life := time.Minute << (i % 15) * time.Duration(100+i) / 100
		mustCommit(t, s, fmt.Sprint("t", i), "x", life)
	}
	if n := len(etcdtest.Leases(t, cli)); n > 40 {
		t.Errorf("%d leases for 300 sessions", n)
	}
}

func TestLease_OneSessionManyCommits(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)))
	defer mustClose(t, s)
	ctx := Begin(t.Context())
	mustCommit(t, s, "a", "x", 20*time.Minute)
	etcdtest.Eventually(t, 5*time.Second, s.leases.Unchecked, "without authentication, the store does not find that out")
	if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	faults.Reset()
	for i := range 100 {
		mustCommit(t, s, "a", fmt.Sprint(i), 20*time.Minute)
	}
	for i := range 100 {
		if err := s.CommitCtx(Begin(t.Context()), "a", []byte(fmt.Sprint(i)), time.Now().Add(20*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	if n := faults.Calls(grantMethod); n != 0 {
		t.Errorf("%d leases granted for 200 commits of one session", n)
	}
}

// A session whose expiry moves on and on changes its lease now and then, and leaves none behind.
func TestLease_MovingExpiry(t *testing.T) {
	s, cli := newTestStore(t)
	base := time.Now().Add(time.Hour)
	for i := range 200 {
		if err := s.Commit("a", []byte("x"), base.Add(time.Duration(i)*10*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	etcdtest.Eventually(t, 10*time.Second, func() bool { return len(etcdtest.Leases(t, cli)) <= 3 }, "leases pile up behind a session that moves")
	resp, err := cli.Get(t.Context(), defaultPrefix+"a")
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatal(resp, err)
	}
	ttl, err := cli.TimeToLive(t.Context(), clientv3.LeaseID(resp.Kvs[0].Lease))
	if err != nil {
		t.Fatal(err)
	}
	if end := time.Now().Add(time.Duration(ttl.TTL) * time.Second); end.Before(base.Add(199 * 10 * time.Minute)) {
		t.Errorf("the lease ends %v before the session", base.Add(1990*time.Minute).Sub(end))
	}
}

// When the sessions are gone so are the leases, at Close the last.
func TestLease_NoneLeft(t *testing.T) {
	s, cli := newTestStore(t)
	commitMany(t, s, 500)
	all, err := s.All()
	if err != nil || len(all) != 500 {
		t.Fatal(len(all), err)
	}
	var wg sync.WaitGroup
	for token := range all {
		wg.Go(func() {
			if err := s.Delete(token); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return len(etcdtest.Leases(t, cli)) <= 2 }, "the owner does not revoke leases without sessions")
	mustClose(t, s)
	if leases, keys := etcdtest.Leases(t, cli), etcdtest.Keys(t, cli, ""); len(leases) != 0 || len(keys) != 0 {
		t.Errorf("left behind: leases %v, keys %q", leases, keys)
	}
}

// Logins and logouts, one after the other, do not use up leases.
func TestLease_Turnover(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)))
	defer mustClose(t, s)
	for i := range 300 {
		token := fmt.Sprint("t", i)
		mustCommit(t, s, token, "x", time.Hour)
		if err := s.Delete(token); err != nil {
			t.Fatal(err)
		}
	}
	if n := faults.Calls(grantMethod); n > 2 {
		t.Errorf("%d leases granted for 300 sessions, one after the other", n)
	}
}

// Close keeps the leases that sessions are on.
func TestLease_CloseKeepsSessions(t *testing.T) {
	s, cli := newTestStore(t)
	mustCommit(t, s, "a", "x", time.Hour)
	mustClose(t, s)
	wantFound(t, New(cli), "a", "x")
	if n := len(etcdtest.Leases(t, cli)); n != 1 {
		t.Errorf("%d leases", n)
	}
}

// A lease that is revoked behind the store's back costs a new grant and no failed call. The sessions on it are lost with
// it; etcd deletes their keys.
func TestLease_Lost(t *testing.T) {
	s, cli := newTestStore(t)
	mustCommit(t, s, "a", "x", time.Hour)
	revokeAll := func() {
		for _, id := range etcdtest.Leases(t, cli) {
			if _, err := cli.Revoke(t.Context(), id); err != nil {
				t.Fatal(err)
			}
		}
	}
	revokeAll()
	wantAbsent(t, s, "a")
	mustCommit(t, s, "b", "y", time.Hour)
	wantFound(t, s, "b", "y")

	ctx := Begin(t.Context())
	if _, ok, err := s.FindCtx(ctx, "b"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	revokeAll()
	if err := s.CommitCtx(ctx, "b", []byte("z"), time.Now().Add(time.Hour)); !errors.Is(err, ErrSessionGone) {
		t.Errorf("a commit based on a session that went with its lease: %v", err)
	}
	commitMany(t, s, 200) // in batches, with others
	if all, err := s.All(); err != nil || len(all) != 200 {
		t.Errorf("%d sessions, %v", len(all), err)
	}
}

// Members that refuse a lease by its name, as before its key was compared, are believed too.
func TestLease_LostByError(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)))
	defer mustClose(t, s)
	mustCommit(t, s, "a", "x", time.Hour)
	once := sync.OnceValue(func() etcdtest.Fate { return etcdtest.Fate{Drop: true, Err: rpctypes.ErrGRPCLeaseNotFound} })
	first := true
	faults.Intercept(func(method string, _ any) etcdtest.Fate {
		if method == "/etcdserverpb.KV/Txn" && first {
			first = false
			return once()
		}
		return etcdtest.Fate{}
	})
	faults.Reset()
	if err := s.CommitCtx(Begin(t.Context()), "b", []byte("y"), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if n := faults.Calls(grantMethod); n != 1 {
		t.Errorf("%d leases granted in place of the one that was lost", n)
	}
	wantFound(t, s, "b", "y")
}

// Grants are made once for all who wait, and an error of one is tried again.
func TestLease_GrantFails(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)))
	defer mustClose(t, s)
	var mu sync.Mutex
	left := 3
	faults.Intercept(func(method string, _ any) etcdtest.Fate {
		mu.Lock()
		defer mu.Unlock()
		if method == grantMethod && left > 0 {
			left--
			return etcdtest.Fate{Drop: true}
		}
		return etcdtest.Fate{}
	})
	commitMany(t, s, 50)
	if n := faults.Calls(grantMethod); n != 4 {
		t.Errorf("%d grants; want three that failed and one", n)
	}
}

// A user that may only read and write the store's prefix can do everything.
func TestLease_RBAC(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	etcdtest.EnableAuth(t, c, "app", "secret", defaultPrefix)
	cli, root := c.Client(t, etcdtest.WithUser("app", "secret")), c.Client(t, etcdtest.WithUser("root", "root"))
	if _, err := cli.Put(t.Context(), "elsewhere", "x"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Fatalf("the user may write outside of the prefix: %v", err)
	}
	s := New(cli)
	commitMany(t, s, 250)
	conflict(t, s)
	if s.leases.Unchecked() {
		t.Error("with authentication on, a Put must not name the lease that its key stays on")
	}
	all, err := s.All()
	if err != nil || len(all) != 251 {
		t.Errorf("All = %d sessions, %v", len(all), err)
	}
	for token := range all {
		if err := s.Delete(token); err != nil {
			t.Fatal(err)
		}
		wantAbsent(t, s, token)
	}
	mustClose(t, s)
	if leases := etcdtest.Leases(t, root); len(leases) != 0 {
		t.Errorf("left behind: %v", leases)
	}

	foreign := NewWithPrefix(cli, "elsewhere:", WithTimeout(time.Second))
	defer mustClose(t, foreign)
	_, _, findErr := foreign.Find("token")
	for call, err := range map[string]error{"Find": findErr, "Commit": foreign.Commit("token", []byte("x"), time.Now().Add(time.Hour)), "Delete": foreign.Delete("token")} {
		if !errors.Is(err, rpctypes.ErrPermissionDenied) || strings.Contains(err.Error(), "token") {
			t.Errorf("%s without permission: %v", call, err)
		}
	}
}

// Close does not wait for an answer about each of many leases in use.
func TestLease_CloseWithManyInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFakeEtcd()
		s := newStore(f, nil, fakePrefix, nil)
		const n, life = 1000, 365 * 24 * time.Hour
		for i := range n {
			wantErr(t, "commit", committing(t, s, fmt.Sprint(i), life)(), nil)
			time.Sleep(life/4 + time.Second) // the lease takes no more sessions
		}
		if leases, sessions := s.leases.Count(); leases != n || sessions != n {
			t.Fatalf("%d leases with %d sessions, want %d each", leases, sessions, n)
		}
		f.Intercept(func(r *etcdfake.Request) error {
			time.Sleep(60 * time.Millisecond)
			return r.Apply()
		})
		start := time.Now()
		wantErr(t, "Close", s.Close(), nil)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("Close took %v", took)
		}
		for i := range n {
			if f.At(fmt.Sprint(fakePrefix, i), f.Revision()) == nil {
				t.Fatalf("session %d went with its lease", i)
			}
		}
	})
}

func TestLease_AcquireEndsWithContext(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)), WithTimeout(200*time.Millisecond))
	defer mustClose(t, s)
	faults.Intercept(func(method string, _ any) etcdtest.Fate { return etcdtest.Fate{Drop: method == grantMethod} })
	err := s.Commit("a", []byte("x"), time.Now().Add(time.Hour))
	if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("Commit without a lease: %v; want the time-out, and nothing sent", err)
	}
	faults.Intercept(nil)
	wantAbsent(t, s, "a")
	mustCommit(t, s, "a", "x", time.Hour)
}

// leaseLimit returns until when a lease may last that took a session with this life and expiry. The window of fitting ends
// as long after the session as that has to live, two seconds at least. For clocks newLease adds a second and a sixteenth
// of the life that the lease was granted for, four fifths of the window's end at most, and rounds up to a second; one
// more is for the grant's own time.
func leaseLimit(expiry time.Time, life time.Duration) time.Time {
	until := max(life, 2*time.Second)
	return expiry.Add(until + (life+until)/20 + 3*time.Second)
}

// An application process is killed: it does not close its store, and nobody looks after its leases any more. No lease
// outlives a session that has been on it by more than the window, and in the end neither sessions nor leases are left.
func TestLease_ProcessKilled(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	killed, cli := c.Client(t), c.Client(t)
	s := New(killed)
	limits := make(map[clientv3.LeaseID]time.Time) // the earliest, of all sessions that a lease took
	var brief []clientv3.LeaseID
	day := 24 * time.Hour
	for i, life := range []time.Duration{30 * day, 7 * day, day, 12 * time.Hour, time.Hour, 20 * time.Minute, 2 * time.Minute, 20 * time.Second, 3 * time.Second, time.Second} {
		for k := range 10 {
			// From long to short, so that each finds the leases of longer ones, and by less than a quarter, so that some
			// share a lease that was granted for others.
			life := life + life/40*time.Duration(k)
			token, expiry := fmt.Sprintf("%d-%d", i, k), time.Now().Add(life)
			if err := s.Commit(token, []byte("x"), expiry); err != nil {
				t.Fatal(err)
			}
			id := leaseOf(t, cli, token)
			if limit := leaseLimit(expiry, life); limits[id].IsZero() || limit.Before(limits[id]) {
				limits[id] = limit
			}
			if life < 2*time.Second {
				brief = append(brief, id)
			}
			if k%3 == 1 || i == 5 { // all of one kind
				if err := s.Delete(token); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := killed.Close(); err != nil {
		t.Fatal(err)
	}

	now := time.Now()
	for _, id := range etcdtest.Leases(t, cli) {
		ttl, err := cli.TimeToLive(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		limit, known := limits[id]
		if end := now.Add(time.Duration(ttl.TTL) * time.Second); !known || end.After(limit) {
			t.Errorf("a lease of %d s lasts for %v more, which is %v too long", ttl.GrantedTTL, end.Sub(now), end.Sub(limit))
		}
	}
	etcdtest.Eventually(t, 30*time.Second, func() bool {
		left := etcdtest.Leases(t, cli)
		return !slices.ContainsFunc(brief, func(id clientv3.LeaseID) bool { return slices.Contains(left, id) })
	}, "the leases of sessions of a second are still there")
	for _, key := range etcdtest.Keys(t, cli, "") {
		if strings.HasPrefix(key, defaultPrefix+"9-") || slices.ContainsFunc(brief, func(id clientv3.LeaseID) bool {
			return strings.HasSuffix(key, fmt.Sprintf("~lease/%x", int64(id)))
		}) {
			t.Errorf("%q is left of the sessions of a second", key)
		}
	}
}

// leaseOf returns the lease that a session is on.
func leaseOf(t *testing.T, cli *clientv3.Client, token string) clientv3.LeaseID {
	t.Helper()
	resp, err := cli.Get(t.Context(), defaultPrefix+token)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatal(resp, err)
	}
	return clientv3.LeaseID(resp.Kvs[0].Lease)
}
