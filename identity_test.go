package etcdstore

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// No request inherits from a session that it has not read, or of which it has another copy.

// A session is made under the token of one that has expired, and that etcd has not collected yet.
func TestIdentity_CreatedOverExpired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"user": "alice"})
		wantErr(t, "create", s.CommitCtx(t.Context(), "a", b, time.Now().Add(time.Second)), nil)
		commit := commitOf(t, Begin(t.Context()), s, "a", "secret", "alice's")
		time.Sleep(2 * time.Second)
		wantErr(t, "create", committing(t, s, "a", time.Hour, "user", "bob")(), nil)
		wantErr(t, "commit of the expired one", commit(), ErrSessionGone)
		f.wantSession(t, "a", 3, "user", "bob")
	})
}

// alices returns a commit of alice's session under the token a, in her transaction.
func alices(t *testing.T, tx context.Context, s *EtcdStore, pairs ...any) func() error {
	t.Helper()
	b := gobSession(t, time.Now().Add(time.Hour), fakePairs(append(pairs, "user", "alice")))
	return func() error { return s.CommitCtx(tx, "a", b, time.Now().Add(time.Hour)) }
}

// A session is deleted and another made under its token in one fold, whether etcd has ever held the first or not.
func TestIdentity_DeletedAndCreatedInOneFold(t *testing.T) {
	for _, stored := range []bool{true, false} {
		t.Run(fmt.Sprint("stored ", stored), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
				tx := Begin(t.Context())
				alice := func(pairs ...any) func() error { return alices(t, tx, s, pairs...) }
				if stored {
					wantErr(t, "create", alice()(), nil)
				}
				deleting := Begin(t.Context())
				if _, ok, err := s.FindCtx(deleting, "a"); ok != stored || err != nil {
					t.Fatal(ok, err)
				}
				stalled := stall(t, s, f)
				calls := []func() error{
					started(alice("n", 1)),
					started(func() error { return s.DeleteCtx(deleting, "a") }),
					started(committing(t, s, "a", time.Hour, "user", "bob")),
				}
				stalled()
				for i, call := range calls {
					wantErr(t, fmt.Sprint("call ", i), call(), nil)
				}
				wantErr(t, "commit of the deleted one", alice("n", 1, "secret", "alice's")(), ErrSessionGone)
				b, ok, err := s.Find("a")
				if _, values, _ := (scs.GobCodec{}).Decode(b); !ok || err != nil || values["user"] != "bob" || len(values) != 1 {
					t.Errorf("a is %v, %v, %v", values, ok, err)
				}
			})
		})
	}
}

// A commit and a delete end in one fold; then the request's next commit is folded behind a create by another. Neither session
// has a revision yet by which to tell them apart.
func TestIdentity_DeletedAndFoldedBehindACreate(t *testing.T) {
	for _, stored := range []bool{true, false} {
		t.Run(fmt.Sprint("stored ", stored), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
				tx := Begin(t.Context())
				alice := func(pairs ...any) func() error { return alices(t, tx, s, pairs...) }
				if stored {
					wantErr(t, "create", alice()(), nil)
				}
				deleting := Begin(t.Context())
				if _, ok, err := s.FindCtx(deleting, "a"); ok != stored || err != nil {
					t.Fatal(ok, err)
				}
				release := stall(t, s, f)
				calls := []func() error{started(alice("n", 1)), started(func() error { return s.DeleteCtx(deleting, "a") })}
				release()
				for i, call := range calls {
					wantErr(t, fmt.Sprint("call ", i), call(), nil)
				}
				release = f.Hold(isAttempt)
				var block []func() error // fills the lane, so that the next two wait together
				for i := range 16 {
					block = append(block, started(committing(t, s, fmt.Sprint("y", i), time.Hour)))
				}
				bob := started(committing(t, s, "a", time.Hour, "bob", 1))
				second := started(alice("n", 1, "secret", "alice's"))
				release()
				for _, b := range block {
					wantErr(t, "block", b(), nil)
				}
				wantErr(t, "bob", bob(), nil)
				wantErr(t, "alice", second(), ErrSessionGone)
				b, _, err := s.Find("a")
				if _, values, _ := (scs.GobCodec{}).Decode(b); err != nil || values["bob"] != 1 || len(values) != 1 {
					t.Errorf("a is %v, %v", values, err)
				}
			})
		})
	}
}

// A commit whose answer was lost was applied, and the session deleted and created anew since: what the request knows is its
// own session, not the one that is there.
func TestIdentity_AppliedDeletedAndCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a", "user", "alice")
		ctx := Begin(t.Context())
		commit := commitOf(t, ctx, s, "a", "x", 1)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			wantErr(t, "another", other.Delete("a"), nil)
			wantErr(t, "another", committing(t, other, "a", time.Hour, "user", "bob")(), nil)
			return etcdfake.ErrLost
		})
		wantErr(t, "first", commit(), nil)
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"user": "alice", "x": 1, "secret": "alice's"})
		wantErr(t, "second", s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)), ErrSessionGone)
	})
}

// A session that its own request has let expire is gone for the request's next commit, a mere touch included.
func TestIdentity_ExpiredByItsRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t, WithTouchInterval(time.Minute))
		f.seed(t, "a", "n", 0)
		ctx := Begin(t.Context())
		b, _, err := s.FindCtx(ctx, "a")
		wantErr(t, "find", err, nil)
		wantErr(t, "first", s.CommitCtx(ctx, "a", b, time.Now().Add(-time.Second)), nil)
		wantErr(t, "second", s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)), ErrSessionGone)
	})
}

// ownSession has a handler do something to the session of its own request besides what the session manager does, and set a
// key. It returns what the session holds afterwards, nil if it is gone.
func ownSession(t *testing.T, s *EtcdStore, codec scs.Codec, act func(ctx context.Context, s *EtcdStore, sm *scs.SessionManager) error) map[string]any {
	t.Helper()
	sm := newManager(s)
	sm.ErrorFunc, sm.Codec = ErrorFunc, codec
	deadline := time.Now().Add(time.Hour)
	if err := s.Commit("tok", gobSession(t, deadline, map[string]any{"user": "alice"}), deadline); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(sm.LoadAndSave(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if err := act(r.Context(), s, sm); err != nil {
			t.Error(err)
		}
		sm.Put(r.Context(), "ours", 1)
	})))
	defer server.Close()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	req.AddCookie(&http.Cookie{Name: sm.Cookie.Name, Value: "tok"})
	resp, err := server.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	b, ok, err := s.Find("tok")
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		return nil
	}
	_, values, err := scs.GobCodec{}.Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// MergeSession with the request's own token reads the session again, and scs throws away what it read.
func TestIdentity_MergeSessionOfItself(t *testing.T) {
	merge := func(another func(s *EtcdStore) error) func(context.Context, *EtcdStore, *scs.SessionManager) error {
		return func(ctx context.Context, s *EtcdStore, sm *scs.SessionManager) error {
			if err := another(s); err != nil {
				return err
			}
			return sm.MergeSession(ctx, sm.Token(ctx))
		}
	}
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t))
	defer mustClose(t, s)
	for name, codec := range map[string]scs.Codec{"by the copy": s.Codec(), "by the context": scs.GobCodec{}} {
		got := ownSession(t, s, codec, merge(func(s *EtcdStore) error { return s.Update(t.Context(), "tok", setting("theirs", 1)) }))
		if got["theirs"] != 1 || got["ours"] != 1 {
			t.Errorf("%s: after another request's change: %v", name, got)
		}
		if got := ownSession(t, s, codec, merge(func(s *EtcdStore) error { return s.Delete("tok") })); got != nil {
			t.Errorf("%s: after a logout the session is back: %v", name, got)
		}
	}
}

// Iterate in a request gives the request a second copy of its own session. Neither overwrites the other.
func TestIdentity_IterateOverItself(t *testing.T) {
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t))
	defer mustClose(t, s)
	got := ownSession(t, s, s.Codec(), func(ctx context.Context, _ *EtcdStore, sm *scs.SessionManager) error {
		return sm.Iterate(ctx, func(ctx context.Context) error {
			sm.Put(ctx, "notice", "hello")
			_, _, err := sm.Commit(ctx)
			return err
		})
	})
	if got["notice"] != "hello" || got["ours"] != 1 {
		t.Errorf("after a commit in Iterate: %v", got)
	}
	got = ownSession(t, s, s.Codec(), func(ctx context.Context, _ *EtcdStore, sm *scs.SessionManager) error {
		return sm.Iterate(ctx, sm.Destroy)
	})
	if got != nil {
		t.Errorf("after a Destroy in Iterate the session is back: %v", got)
	}
}
