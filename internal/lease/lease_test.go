package lease

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/record"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

// newPool returns a pool on a fake. What it leaves to be done has ended with the test.
func newPool(t *testing.T, f etcd.API) *Pool {
	t.Helper()
	var detached sync.WaitGroup
	t.Cleanup(detached.Wait)
	now := func() record.Millis { return record.ToMillis(time.Now()) }
	return New(etcd.NewClient(f), "~lease/", now, detached.Go)
}

// inAnHour is the expiry of a session with an hour to live.
func inAnHour() record.Millis { return record.ToMillis(time.Now().Add(time.Hour)) }

// mustSit returns a seat for a session with an hour to live.
func mustSit(t *testing.T, p *Pool) Seat {
	t.Helper()
	for range 3 {
		if s, ok := p.Attach(inAnHour()); ok {
			return s
		}
		if err := p.Wait(t.Context(), inAnHour()); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("no seat after three grants")
	return Seat{}
}

func isFence(r *etcdfake.Request) bool { _, put := r.Msg.(*etcdserverpb.PutRequest); return put }

func isLook(r *etcdfake.Request) bool {
	_, ttl := r.Msg.(*etcdserverpb.LeaseTimeToLiveRequest)
	return ttl
}

// Where a session's expiry lies decides which lease it shares.
func TestPool_Fitting(t *testing.T) {
	now := record.Millis(1_000_000_000)
	hour := record.Millis(time.Hour.Milliseconds())
	p := New(etcd.NewClient(nil), "", func() record.Millis { return now }, func(func()) {})
	l := &lease{id: 1, fence: 1, until: now + hour + hour/4, closes: record.Forever}
	p.open = []*lease{l}
	for _, c := range []struct {
		name string
		left record.Millis
		want bool
	}{
		{"as granted for", hour, true},
		{"a little earlier", hour - hour/10, true},
		{"so late that it would soon outgrow the lease", hour + hour/4, false},
		{"so early that the lease would hold it far too long", hour / 2, false},
		{"later than the lease", 2 * hour, false},
	} {
		if _, got := p.Attach(now + c.left); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	l.sessions = Seats
	if _, ok := p.Attach(now + hour); ok {
		t.Error("a full lease took another session")
	}
	if len(p.open) != 0 || len(p.closed) != 1 {
		t.Error("a full lease was not closed")
	}
}

// A doubt about an attempt ends when the fence has moved beyond the one that this attempt compares, and not before: moving it
// for an earlier attempt is not enough.
func TestPool_DoubtIsAboutAFence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, etcdfake.New())
		early := mustSit(t, p)
		p.Doubt(early)
		if _, ok := p.Attach(inAnHour()); ok {
			t.Error("a session was attached while an attempt is in doubt")
		}
		if err := p.Refence(t.Context(), early); err != nil {
			t.Fatal(err)
		}
		late := mustSit(t, p)
		if late.Key() != early.Key() || late.Fence() <= early.Fence() {
			t.Fatalf("the seats are at fences %d and %d", early.Fence(), late.Fence())
		}
		p.Doubt(late)
		if err := p.Refence(t.Context(), early); err != nil { // it has moved already
			t.Fatal(err)
		}
		if _, ok := p.Attach(inAnHour()); ok {
			t.Error("moving the fence for the early attempt cleared the doubt about the late one")
		}
		if err := p.Refence(t.Context(), late); err != nil {
			t.Fatal(err)
		}
		if s, ok := p.Attach(inAnHour()); !ok || s.Key() != late.Key() {
			t.Error("the lease is still in doubt after its fence has moved")
		}
	})
}

// What comes into doubt while the fence is being moved in the background is moved beyond as well.
func TestPool_RefenceLaterGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := etcdfake.New()
		p := newPool(t, f)
		early := mustSit(t, p)
		var up atomic.Bool
		f.Intercept(func(r *etcdfake.Request) error {
			if isFence(r) && !up.Load() {
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		p.Doubt(early)
		p.RefenceLater(early)
		time.Sleep(900 * time.Millisecond) // it waits for its next try by now
		up.Store(true)
		if err := p.Refence(t.Context(), early); err != nil { // as a call does that has more time
			t.Fatal(err)
		}
		up.Store(false)
		late := mustSit(t, p)
		p.Doubt(late)
		p.RefenceLater(late)
		time.Sleep(9500 * time.Millisecond) // beyond the time that was given to the first
		up.Store(true)
		time.Sleep(time.Minute)
		if s, ok := p.Attach(inAnHour()); !ok || s.Key() == late.Key() && s.Fence() <= late.Fence() {
			t.Errorf("a minute later the lease is in doubt: %v", ok)
		}
	})
}

// Where etcd does not come back, moving the fence is given up, and the lease is not used any more.
func TestPool_RefenceLaterGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := etcdfake.New()
		p := newPool(t, f)
		s := mustSit(t, p)
		f.Intercept(func(r *etcdfake.Request) error {
			if isFence(r) {
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		p.Doubt(s)
		p.RefenceLater(s)
		time.Sleep(refenceFor + time.Second)
		etcdfake.Sent[any](f)
		time.Sleep(time.Minute)
		if n := len(etcdfake.Sent[any](f)); n != 0 {
			t.Errorf("%d requests a minute after it was given up", n)
		}
		if _, ok := p.Attach(inAnHour()); ok {
			t.Error("the lease in doubt is used")
		}
		f.Intercept(nil)
		p.RefenceLater(s)
		synctest.Wait()
		if _, ok := p.Attach(inAnHour()); !ok {
			t.Error("the fence was not moved when it was asked for again")
		}
	})
}

// cutOff is an etcd that answers what is asked about leases as it once did, like a member that does not know yet that it has
// lost the leadership.
type cutOff struct {
	etcd.API
	once *clientv3.LeaseTimeToLiveResponse
}

func (c *cutOff) TimeToLive(ctx context.Context, id clientv3.LeaseID, opts ...clientv3.LeaseOption) (*clientv3.LeaseTimeToLiveResponse, error) {
	if c.once != nil {
		return c.once, nil
	}
	return c.API.TimeToLive(ctx, id, opts...)
}

// A lease is not revoked because a member that is cut off knows of no session on it.
func TestPool_UnusedLongAgo(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	c := &cutOff{API: cli}
	p := newPool(t, c)
	s := mustSit(t, p)
	before, err := cli.TimeToLive(t.Context(), s.Lease(), clientv3.WithAttachedKeys())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(t.Context(), "session", "x", clientv3.WithLease(s.Lease())); err != nil {
		t.Fatal(err)
	}
	c.once = before
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.lookAfter(ctx, s.lease); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("looking after a lease: %v", err)
	}
	if resp, err := cli.Get(t.Context(), "session"); err != nil || len(resp.Kvs) != 1 {
		t.Errorf("the session went with its lease: %v", err)
	}
}

// manyLeases has n leases granted, each with a session on it.
func manyLeases(t *testing.T, p *Pool, f *etcdfake.Etcd, n int) (seats []Seat) {
	t.Helper()
	for i := range n {
		s := mustSit(t, p)
		if _, err := f.Put(t.Context(), fmt.Sprint("session", i), "x", clientv3.WithLease(s.Lease())); err != nil {
			t.Fatal(err)
		}
		p.mu.Lock()
		p.closed, p.open = append(p.closed, p.open...), nil
		p.mu.Unlock()
		seats = append(seats, s)
	}
	synctest.Wait()
	return seats
}

// Close of a process with many leases in use takes a moment, and is no error, however far etcd is.
func TestPool_CloseManyLeases(t *testing.T) {
	for _, latency := range []time.Duration{6 * time.Millisecond, 400 * time.Millisecond} {
		synctest.Test(t, func(t *testing.T) {
			f := etcdfake.New()
			p := newPool(t, f)
			manyLeases(t, p, f, 1000)
			f.Intercept(func(r *etcdfake.Request) error { time.Sleep(latency); return r.Apply() })
			start := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			if err := p.Close(ctx); err != nil {
				t.Errorf("Close, with %v to etcd: %v", latency, err)
			}
			if took := time.Since(start); took > closeLook+latency {
				t.Errorf("Close took %v, with %v to etcd", took, latency)
			}
			if n := len(f.Keys()); n != 2000 {
				t.Errorf("%d keys are left of 1000 sessions and their leases", n)
			}
		})
	}
}

// Close revokes the leases without sessions: those that this process has seen leave, before the others, and those that
// another process has deleted.
func TestPool_CloseRevokes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := etcdfake.New()
		p := newPool(t, f)
		seats := manyLeases(t, p, f, 40)
		for i := range 20 {
			if _, err := f.Delete(t.Context(), fmt.Sprint("session", i)); err != nil {
				t.Fatal(err)
			}
		}
		f.Intercept(func(r *etcdfake.Request) error {
			if isLook(r) {
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		for _, s := range seats[:10] {
			p.Leave(s.Lease()) // and what is looked at then gets no answer
		}
		synctest.Wait()
		f.Intercept(nil)
		if err := p.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if n := len(f.Keys()); n != 40 {
			t.Errorf("%d keys are left of 20 sessions and their leases", n)
		}
	})
}

// Close says so where a lease without sessions could not be revoked.
func TestPool_CloseFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := etcdfake.New()
		p := newPool(t, f)
		p.Leave(mustSit(t, p).Lease())
		f.Intercept(func(*etcdfake.Request) error { return etcdfake.ErrLost })
		if err := p.Close(t.Context()); err == nil {
			t.Error("Close without etcd succeeded")
		}
		f.Intercept(nil)
	})
}
