package etcdstore

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// testWall is a wall clock that tests can set wrong.
type testWall struct{ ahead atomic.Int64 }

func (w *testWall) now() time.Time       { return time.Now().Add(time.Duration(w.ahead.Load())) }
func (w *testWall) step(d time.Duration) { w.ahead.Add(int64(d)) }

// newWallStore returns a store of which the test holds the clock, and a client of its etcd.
func newWallStore(t *testing.T) (*EtcdStore, *testWall, *clientv3.Client) {
	t.Helper()
	s, cli := newTestStore(t)
	w := new(testWall)
	s.clock.Wall = w.now
	return s, w, cli
}

// pair returns what etcd holds of a session.
func pair(t *testing.T, cli *clientv3.Client, token string) *mvccpb.KeyValue {
	t.Helper()
	resp, err := cli.Get(t.Context(), defaultPrefix+token)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("Get = %v, %v; want a key", resp, err)
	}
	return resp.Kvs[0]
}

// wantHidden fails t unless the store says everywhere that there is no such session, which ctx's transaction has read, and
// which a commit of that does not make last beyond expiry.
func wantHidden(ctx context.Context, t *testing.T, s *EtcdStore, token string, expiry time.Time) {
	t.Helper()
	wantAbsent(t, s, token)
	if all, err := s.All(); err != nil || len(all) != 0 {
		t.Errorf("All = %q, %v; want none", all, err)
	}
	if err := s.CommitCtx(ctx, token, gobSession(t, expiry, map[string]any{"n": 2}), expiry); !errors.Is(err, ErrSessionGone) {
		t.Errorf("the commit of a request that read the session before = %v; want ErrSessionGone", err)
	}
	if err := s.Update(t.Context(), token, func(v map[string]any) error { v["n"] = 3; return nil }); !errors.Is(err, ErrSessionGone) {
		t.Errorf("Update = %v; want ErrSessionGone", err)
	}
}

// A session that has expired stays so when the clock goes back by less than a minute.
func TestStore_ClockJumpsBack(t *testing.T) {
	s, wall, cli := newWallStore(t)
	expiry := wall.now().Add(time.Second)
	if err := s.Commit("a", gobSession(t, expiry, map[string]any{"n": 1}), expiry); err != nil {
		t.Fatal(err)
	}
	rev := pair(t, cli, "a").ModRevision
	before, after := Begin(t.Context()), Begin(t.Context())
	if _, ok, err := s.FindCtx(before, "a"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	wall.step(2 * time.Second)
	if _, ok, err := s.FindCtx(after, "a"); ok || err != nil {
		t.Fatal(ok, err)
	}
	wall.step(-30 * time.Second)
	if !wall.now().Before(expiry) {
		t.Fatal("the wall clock does not say that the session lives")
	}
	wantHidden(before, t, s, "a", expiry)
	if got := pair(t, cli, "a").ModRevision; got != rev {
		t.Errorf("the session was written at revision %d", got)
	}

	// A request that read it absent makes a new one, which inherits nothing.
	expiry = wall.now().Add(time.Hour)
	if err := s.CommitCtx(after, "a", gobSession(t, expiry, map[string]any{"m": 1}), expiry); err != nil {
		t.Fatal(err)
	}
	wantValues(t, s, "a", map[string]any{"m": 1})
}

// A clock that jumps ahead hides sessions while it is wrong, and deletes none.
func TestStore_ClockJumpsAhead(t *testing.T) {
	s, wall, cli := newWallStore(t)
	other := New(cli)
	defer mustClose(t, other)
	expiry := wall.now().Add(time.Hour)
	data := gobSession(t, expiry, map[string]any{"n": 1})
	if err := s.Commit("a", data, expiry); err != nil {
		t.Fatal(err)
	}
	rev := pair(t, cli, "a").ModRevision
	ctx := Begin(t.Context())
	if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
		t.Fatal(ok, err)
	}

	wall.step(24 * time.Hour)
	wantHidden(ctx, t, s, "a", expiry)
	// The application goes on, and the session's lease is looked after as one that is over.
	if err := s.Commit("b", []byte("x"), wall.now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	wantFound(t, s, "b", "x")
	if err := s.Delete("b"); err != nil {
		t.Fatal(err)
	}
	if got := pair(t, cli, "a").ModRevision; got != rev {
		t.Errorf("the session was written at revision %d", got)
	}
	wantFound(t, other, "a", string(data))

	wall.step(-24 * time.Hour)
	wantFound(t, s, "a", string(data))
	if err := s.Update(t.Context(), "a", func(v map[string]any) error { v["n"] = 4; return nil }); err != nil {
		t.Errorf("Update when the clock is right again: %v", err)
	}
	wantValues(t, other, "a", map[string]any{"n": 4})
}

// leaseLeft returns how long the lease of a session still lasts.
func leaseLeft(t *testing.T, cli *clientv3.Client, token string) time.Duration {
	t.Helper()
	resp, err := cli.TimeToLive(t.Context(), clientv3.LeaseID(pair(t, cli, token).Lease))
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(resp.TTL) * time.Second
}

// A lease that was granted while the clock was ahead ends earlier than that clock said: no session may rely on it.
func TestStore_LeaseOfAClockThatWasAhead(t *testing.T) {
	for _, tc := range []struct {
		name        string
		ahead       time.Duration
		first, life time.Duration // of the session that had the lease granted, and of the one that is looked at
		another     bool          // the two are one session, and a machine with the right clock commits it again
	}{
		{"a day", 24 * time.Hour, 2 * time.Hour, 20 * time.Hour, false},
		{"less than a minute", 50 * time.Second, 2 * time.Minute, 190 * time.Second, false},
		{"on another machine", 24 * time.Hour, 30 * time.Minute, 2 * time.Hour, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, wall, cli := newWallStore(t)
			right, first := s, "first"
			if tc.another {
				right, first = New(cli), "a"
				defer mustClose(t, right)
			}
			wall.step(tc.ahead)
			if err := s.Commit(first, []byte("x"), wall.now().Add(tc.first)); err != nil {
				t.Fatal(err)
			}
			wall.step(-tc.ahead)
			mustCommit(t, right, "a", "x", tc.life)
			if left := leaseLeft(t, cli, "a"); left < tc.life-time.Second {
				t.Errorf("a session that lives for %v is on a lease that ends in %v", tc.life, left)
			}
		})
	}
}
