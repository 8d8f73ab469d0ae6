package etcdstore

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/lease"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// A send that the client repeated behind our back has no lost answer, and still its outcome is unknown where others wrote
// over it and the history is compacted: it was applied, and must not be told to have failed, nor be made again.
func TestPipeline_TraceErrorIsUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a", "n", 0)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply() // the client's first send
			wantErr(t, "another", other.Update(t.Context(), "a", increment), nil)
			f.Compact(f.Revision())
			return r.Apply() // its second, which the store takes for the only one
		})
		wantErr(t, "ours", s.Update(t.Context(), "a", increment), ErrOutcomeUnknown)
		f.wantSession(t, "a", 3, "n", 2)
	})
}

// The search of a long history meets the server's limit on operations, and goes on in smaller steps.
func TestPipeline_HistoryWithFewerOperations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.LimitTo(64, 1536<<10)
		other := newFakeStoreOn(t, f)
		f.seed(t, "x", "n", 0)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			for range 100 {
				wantErr(t, "another", other.Update(t.Context(), "x", increment), nil)
			}
			_ = r.Apply()
			wantErr(t, "another", other.Delete("a"), nil)
			return etcdfake.ErrLost
		})
		wantErr(t, "ours", committing(t, s, "a", time.Hour, "n", 1)(), nil)
		f.wantSession(t, "a", 2)
		if k := s.etcd.BatchKeys(); k != 60 {
			t.Errorf("%d operations a request after 120 were too many, want 60", k)
		}
	})
}

// Many full batches are in flight when the server's limit on operations shows: batches are halved once for all of them.
func TestPipeline_HalvedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.LimitTo(100, 1536<<10)
		const n = 6 * etcd.MaxBatchKeys
		for i := range n {
			f.seed(t, fmt.Sprint(i))
		}
		release := f.Hold(isAttempt)
		var results []func() error
		for i := range n {
			results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
		}
		release()
		for i, r := range results {
			wantErr(t, "update", r(), nil)
			f.wantSession(t, fmt.Sprint(i), 2, "a", 1)
		}
		if k := s.etcd.BatchKeys(); k != 60 {
			t.Errorf("%d sessions a batch where 60 would do", k)
		}
	})
}

// What a transaction read has expired by its commit, but another process has moved the expiry since: the commit succeeds.
func TestPipeline_StaleExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"n": 0})
		wantErr(t, "commit", s.CommitCtx(t.Context(), "a", b, time.Now().Add(time.Second)), nil)
		ctx := Begin(t.Context())
		commit := commitOf(t, ctx, s, "a", "n", 1)
		wantErr(t, "touch by another process", other.CommitCtx(t.Context(), "a", b, time.Now().Add(time.Hour)), nil)
		time.Sleep(2 * time.Second)
		wantErr(t, "commit over what has expired", commit(), nil)
		f.wantSession(t, "a", 3, "n", 1)
	})
}

// isTTL reports whether a request asks for a lease's keys.
func isTTL(r *etcdfake.Request) bool {
	_, ok := r.Msg.(*etcdserverpb.LeaseTimeToLiveRequest)
	return ok
}

func isRevoke(r *etcdfake.Request) bool { _, ok := r.Msg.(*etcdserverpb.LeaseRevokeRequest); return ok }

// onLease narrows match to requests about one lease.
func onLease(id clientv3.LeaseID, match func(r *etcdfake.Request) bool) func(r *etcdfake.Request) bool {
	return func(r *etcdfake.Request) bool {
		q, ok := r.Msg.(interface{ GetID() int64 })
		return match(r) && ok && q.GetID() == int64(id)
	}
}

// ofSession tells the attempts that carry one session.
func ofSession(token string) func(r *etcdfake.Request) bool {
	return func(r *etcdfake.Request) bool { return slices.Contains(fakeTokens(r.Txn()), token) }
}

// A lease is found to be unused while a create that names it is under way. Where the create arrives first, the second look
// shows its session, and the lease stays; where it arrives after that, the lease's key has gone, and with it the create's
// fence, and it takes another lease. Either way the session does not go with the lease.
func TestPipeline_RevokeLooksAgain(t *testing.T) {
	for look, stays := range map[int32]bool{1: true, 2: false} {
		t.Run(fmt.Sprintf("created after look %d", look), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
				wantErr(t, "off it", s.Delete("warm"), nil)
				l := f.LastLease()
				time.Sleep(15*time.Minute - time.Millisecond) // the last moment in which it takes a session
				create := f.Hold(ofSession("late"))
				late := started(committing(t, s, "late", 50*time.Minute, "n", 1))

				time.Sleep(2 * time.Millisecond)
				seen := make(chan struct{})
				var looked atomic.Int32
				f.Intercept(func(r *etcdfake.Request) error {
					err := r.Apply()
					if onLease(l, isTTL)(r) {
						if looked.Add(1) == look {
							return r.Wait(seen)
						}
					}
					return err
				})
				wantErr(t, "another lifetime, and a sweep", committing(t, s, "long", 24*time.Hour)(), nil)
				synctest.Wait()
				if n := looked.Load(); n != look {
					t.Fatalf("the owner has looked %d times after the lease, want %d", n, look)
				}
				create()
				wantErr(t, "late", late(), nil)
				close(seen)
				synctest.Wait()
				f.wantSession(t, "late", 1, "n", 1)
				if ttl, err := f.TimeToLive(t.Context(), l); err != nil || ttl.TTL > 0 != stays {
					t.Errorf("the lease is there: %v, want %v, %v", ttl.TTL > 0, stays, err)
				}
			})
		})
	}
}

// A lease is being revoked, and a create that was lost puts its key, and a fence, back. The creates that wait with the old
// fence take another lease, and do not go with this one.
func TestPipeline_LeaseRevokedUnderway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		wantErr(t, "off it", s.Delete("warm"), nil)
		l := f.LastLease()
		stalled := stall(t, s, f)
		large := started(committing(t, s, "large", time.Hour, "a", strings.Repeat("x", 40<<10)))
		var small []func() error
		for i := range lease.Seats - 1 {
			small = append(small, started(committing(t, s, fmt.Sprint(i), time.Hour, "a", 1)))
		}
		holdSmall := f.Hold(ofSession("0"))
		holdLarge := f.Hold(ofSession("large"))
		stalled()
		holdRevoke := f.Hold(isRevoke)
		for i := range 3 { // leases for other lifetimes, each with a sweep
			wantErr(t, "another lifetime", committing(t, s, fmt.Sprint("long ", i), time.Hour<<(3*i+3))(), nil)
		}
		revokes := etcdfake.Sent[*etcdserverpb.LeaseRevokeRequest](f.Etcd)
		if len(revokes) == 0 || slices.ContainsFunc(revokes, func(r *etcdserverpb.LeaseRevokeRequest) bool { return r.ID != int64(l) }) {
			t.Fatalf("revokes under way: %v, want some of lease %d", revokes, l)
		}
		f.Script(ofSession("large"), etcdfake.Drop)
		holdLarge()
		wantErr(t, "large", large(), nil)
		holdSmall()
		for _, result := range small {
			wantErr(t, "small", result(), nil)
		}
		holdRevoke()
		synctest.Wait()
		if ttl, err := f.TimeToLive(t.Context(), l); err != nil || ttl.TTL > 0 {
			t.Errorf("the lease was not revoked: %v, %v", ttl, err)
		}
		f.wantSession(t, "large", 1, "a", strings.Repeat("x", 40<<10))
		for i := range lease.Seats - 1 {
			f.wantSession(t, fmt.Sprint(i), 1, "a", 1)
		}
	})
}

// The answer to a batch is lost, and before it is sent again so is the lease that one of its sessions names, or was on.
// That session is written exactly once, if need be on another lease, and the others do not notice.
func TestPipeline_LeaseLostBetweenSends(t *testing.T) {
	n := func(n int) map[string]any { return map[string]any{"n": n} }
	var gone map[string]any
	for name, c := range map[string]struct {
		seeded  bool // the session was there, on a lease of its own
		read    bool // and the commit's transaction has read it: an update; else the first send is a create
		applied bool // by the first send
		old     bool // the lease that is lost is the one that the session was on, not the one that the commit names
		history []map[string]any
	}{
		"create, applied":                          {false, false, true, false, []map[string]any{n(1), gone}},
		"create, not applied":                      {false, false, false, false, []map[string]any{n(1)}},
		"overwrite, its compare failed":            {true, false, true, false, []map[string]any{n(0), n(1)}},
		"overwrite, its compare failed, old lease": {true, false, true, true, []map[string]any{n(0), gone, n(1)}},
		"overwrite, not applied":                   {true, false, false, false, []map[string]any{n(0), n(1)}},
		"update, applied":                          {true, true, true, false, []map[string]any{n(0), n(1), gone}},
		"update, applied, old lease":               {true, true, true, true, []map[string]any{n(0), n(1)}},
		"update, not applied":                      {true, true, false, false, []map[string]any{n(0), n(1)}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				wantErr(t, "a lease for the session", committing(t, s, "warm", 4*time.Hour)(), nil)
				wantErr(t, "a lease for neighbours", committing(t, s, "warm too", time.Hour)(), nil)
				if c.seeded {
					f.seed(t, "a", "n", 0)
				}
				var oldLease clientv3.LeaseID
				if kv := f.At(fakePrefix+"a", f.Revision()); kv != nil {
					oldLease = clientv3.LeaseID(kv.Lease)
				}
				for i := range 4 {
					f.seed(t, fmt.Sprint("update ", i), "n", 0)
				}
				ctx := Begin(t.Context())
				if c.read {
					commitOf(t, ctx, s, "a")
				}
				release := stall(t, s, f)
				var results []func() error
				for i := range 4 {
					results = append(results,
						started(func() error { return s.Update(t.Context(), fmt.Sprint("update ", i), increment) }),
						started(committing(t, s, fmt.Sprint("create ", i), time.Hour, "n", 1)))
				}
				ours := started(func() error {
					return s.CommitCtx(ctx, "a", gobSession(t, day0, n(1)), time.Now().Add(4*time.Hour))
				})
				f.Script(ofSession("a"), func(r *etcdfake.Request) error {
					if n := len(fakeTokens(r.Txn())); n != 9 {
						t.Errorf("%d sessions are in the batch, want 9", n)
					}
					if c.applied {
						wantErr(t, "the first send", r.Apply(), nil)
					}
					lost := oldLease
					if !c.old {
						lost = clientv3.LeaseID(fakePuts([]*etcdserverpb.TxnRequest{r.Txn()}, "a")[0].Lease)
					}
					_, err := f.Revoke(t.Context(), lost)
					wantErr(t, "revoke", err, nil)
					return etcdfake.ErrLost
				})
				release()
				wantErr(t, "ours", ours(), nil)
				for _, result := range results {
					wantErr(t, "a neighbour", result(), nil)
				}
				if got := f.sessions(t, "a"); !reflect.DeepEqual(got, c.history) {
					t.Errorf("the session has been %v, want %v", got, c.history)
				}
				for i := range 4 {
					f.wantSession(t, fmt.Sprint("update ", i), 2, "n", 1)
					f.wantSession(t, fmt.Sprint("create ", i), 1, "n", 1)
				}
			})
		})
	}
}

// A create that a hidden first send applied is found although others have deleted the session and created it anew: it is
// not made again over theirs.
func TestPipeline_HiddenCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			wantErr(t, "another", other.Delete("a"), nil)
			wantErr(t, "another", committing(t, other, "a", time.Hour, "theirs", 1)(), nil)
			return r.Apply()
		})
		wantErr(t, "ours", committing(t, s, "a", time.Hour, "ours", 1)(), nil)
		f.wantSession(t, "a", 3, "theirs", 1)
	})
}

// A session was deleted and another created under its token: a commit based on the old one is gone, and nothing of it is
// in the new one.
func TestPipeline_DeletedAndCreated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "user", "alice")
		commit := commitOf(t, Begin(t.Context()), s, "a", "secret of", "alice")
		wantErr(t, "delete", s.Delete("a"), nil)
		wantErr(t, "create", committing(t, s, "a", time.Hour, "user", "bob")(), nil)
		wantErr(t, "commit of the deleted one", commit(), ErrSessionGone)
		f.wantSession(t, "a", 3, "user", "bob")
	})
}
