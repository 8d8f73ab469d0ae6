package etcdstore

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// Applied by a hidden first send, overtaken, compacted: told a definite error.
func TestPipeline_TraceErrorIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a", "n", 0)
		f.script(isAttempt, func(r *fakeRequest) error {
			_ = r.apply() // the client's first send
			wantErr(t, "another", other.Update(t.Context(), "a", increment), nil)
			f.compact(f.rev())
			return r.apply() // its second, which the store takes for the only one
		})
		err := s.Update(t.Context(), "a", increment)
		t.Log(err, f.sessions(t, "a"))
		wantErr(t, "ours", err, ErrOutcomeUnknown)
		_ = rpctypes.ErrCompacted
	})
}

// History longer than the server's limit of operations.
func TestPipeline_HistoryWithFewerOperations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.maxOps = 64
		other := newFakeStoreOn(t, f)
		f.seed(t, "x", "n", 0)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.script(isAttempt, func(r *fakeRequest) error {
			for range 100 {
				wantErr(t, "another", other.Update(t.Context(), "x", increment), nil)
			}
			_ = r.apply()
			wantErr(t, "another", other.Delete("a"), nil)
			return errFakeLost
		})
		wantErr(t, "ours", committing(t, s, "a", time.Hour, "n", 1)(), nil)
	})
}

// Several batches in flight when the first TooManyOps comes: halved once for each.
func TestPipeline_HalvedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.maxOps = 100
		const n = 6 * maxBatchKeys
		for i := range n {
			f.seed(t, fmt.Sprint(i))
		}
		release := f.hold(isAttempt)
		var results []func() error
		for i := range n {
			results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
		}
		release()
		for _, r := range results {
			wantErr(t, "update", r(), nil)
		}
		if k := s.conn.batchKeys(); k != 60 {
			t.Errorf("%d sessions a batch where 60 would do", k)
		}
	})
}

// What the transaction read has expired meanwhile, but another process has moved the expiry since.
func TestPipeline_StaleExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"n": 0})
		wantErr(t, "commit", s.CommitCtx(t.Context(), "a", b, time.Now().Add(time.Second)), nil)
		ctx := Begin(t.Context())
		if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
			t.Fatal(ok, err)
		}
		wantErr(t, "touch by another process", other.CommitCtx(t.Context(), "a", b, time.Now().Add(time.Hour)), nil)
		time.Sleep(2 * time.Second)
		fakeSent[any](f)
		err := s.CommitCtx(ctx, "a", gobSession(t, time.Now().Add(time.Hour), map[string]any{"n": 1}), time.Now().Add(time.Hour))
		t.Logf("%v, after %d requests", err, len(fakeSent[any](f)))
		_, ok, _ := s.Find("a")
		if ok && errors.Is(err, ErrSessionGone) {
			t.Error("the session is there, and its commit was told that it is gone")
		}
	})
}

func isRevoke(r *fakeRequest) bool { _, ok := r.msg.(*etcdserverpb.LeaseRevokeRequest); return ok }

// Sessions move onto a lease that is being revoked.
func TestPipeline_LeaseRevokedUnderway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		wantErr(t, "off it", s.Delete("warm"), nil)
		l1 := f.granted
		stalled := stall(t, s, f)
		large := started(committing(t, s, "large", time.Hour, "a", strings.Repeat("x", 40<<10)))
		var small []func() error
		for i := range leaseSeats - 1 {
			small = append(small, started(committing(t, s, fmt.Sprint(i), time.Hour, "a", 1)))
		}
		holdSmall := f.hold(func(r *fakeRequest) bool { return isAttempt(r) && len(fakeTokens(r.txn())) > 1 })
		holdLarge := f.hold(func(r *fakeRequest) bool { return isAttempt(r) && fakeTokens(r.txn())[0] == "large" })
		stalled()
		holdRevoke := f.hold(isRevoke)
		for i := range 3 { // leases for other lifetimes, each with a sweep
			wantErr(t, "another lifetime", committing(t, s, fmt.Sprint("long ", i), time.Hour<<(3*i+3))(), nil)
		}
		for _, r := range fakeSent[*etcdserverpb.LeaseRevokeRequest](f) {
			t.Log("revoke of", r.ID, "under way; the lease in question is", l1)
		}
		f.script(func(r *fakeRequest) bool { return isAttempt(r) && fakeTokens(r.txn())[0] == "large" }, fakeDrop)
		fakeSent[any](f)
		holdLarge()
		time.Sleep(100 * time.Millisecond)
		t.Log("large:", large())
		holdSmall()
		for _, result := range small {
			wantErr(t, "small", result(), nil)
		}
		holdRevoke()
		synctest.Wait()
		gone := 0
		for i := range leaseSeats - 1 {
			if _, ok, err := s.Find(fmt.Sprint(i)); !ok || err != nil {
				gone++
			}
		}
		if gone > 0 {
			t.Errorf("%d sessions of %d were committed and are gone", gone, leaseSeats-1)
		}
	})
}

// A create that a hidden send applied, deleted and created by others.
func TestPipeline_HiddenCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.script(isAttempt, func(r *fakeRequest) error {
			_ = r.apply()
			wantErr(t, "another", other.Delete("a"), nil)
			wantErr(t, "another", committing(t, other, "a", time.Hour, "theirs", 1)(), nil)
			return r.apply()
		})
		wantErr(t, "ours", committing(t, s, "a", time.Hour, "ours", 1)(), nil)
		f.wantSession(t, "a", 3, "theirs", 1)
	})
}

// Deleted and created again meanwhile: the commit of the old one is merged into the new one.
func TestPipeline_DeletedAndCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "user", "alice")
		ctx := Begin(t.Context())
		commit := commitOf(t, ctx, s, "a", "secret of", "alice")
		wantErr(t, "delete", s.Delete("a"), nil)
		wantErr(t, "create", committing(t, s, "a", time.Hour, "user", "bob")(), nil)
		err := commit()
		t.Log(f.sessions(t, "a"))
		wantErr(t, "commit of the deleted one", err, ErrSessionGone)
	})
}
