package commit

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcdfake"
)

// carries tells the requests with an attempt of a key.
func carries(key string) func(r *etcdfake.Request) bool {
	of := func(txn *etcdserverpb.TxnRequest) bool {
		return len(txn.GetCompare()) > 0 && string(txn.Compare[0].Key) == key
	}
	return func(r *etcdfake.Request) bool {
		if of(r.Txn()) {
			return true
		}
		for _, op := range r.Txn().GetSuccess() {
			if of(op.GetRequestTxn()) {
				return true
			}
		}
		return false
	}
}

// sends returns how often attempts of a key were sent since the last call.
func (b *bench) sends(key string) (n int) {
	for _, txn := range etcdfake.Sent[*etcdserverpb.TxnRequest](b.f) {
		if carries(key)(&etcdfake.Request{Msg: txn}) {
			n++
		}
	}
	return n
}

// gets returns the first Get of a request that reads several keys, or one at several revisions.
func gets(r *etcdfake.Request) *etcdserverpb.RangeRequest {
	if then := r.Txn().GetSuccess(); len(then) > 0 {
		return then[0].GetRequestRange()
	}
	return nil
}

func isTrace(r *etcdfake.Request) bool { return gets(r).GetRevision() > 0 }

func isRead(r *etcdfake.Request) bool { return gets(r) != nil && !isTrace(r) }

func isFence(r *etcdfake.Request) bool { _, put := r.Msg.(*etcdserverpb.PutRequest); return put }

// do makes a call from within a hook, where a test may wait for what its requests lead to.
func (b *bench) do(key string, c Change) {
	b.t.Helper()
	_, err := b.Do(context.Background(), time.Now().Add(time.Minute), Call{Key: key, Change: c})
	if err != nil {
		b.t.Error(err)
	}
}

// A call whose time is up before etcd has taken its attempt is told so at once, and that nothing
// was written. So it must not be made by the calls that it was folded with, which have more time.
func TestPipeline_EndedCallIsNotMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		start := time.Now()
		first := b.start("a", time.Second, appending{s: "1"})
		second := b.start("a", 5*time.Second, appending{s: "2"})
		var down atomic.Bool
		down.Store(true)
		b.f.Intercept(func(r *etcdfake.Request) error {
			if isTxn(r) && down.Load() {
				return rpctypes.ErrGRPCNoLeader
			}
			return r.Apply()
		})
		release()
		err := first()
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnknown) {
			t.Errorf("the first: %v", err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("the first was told after %v of a second", took)
		}
		down.Store(false)
		if err := second(); err != nil {
			t.Error(err)
		}
		b.want("a", "2")
	})
}

// A call whose time is up while it waits in the queue is not run any more.
func TestPipeline_LateCallDoesNotRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		var late, inTime atomic.Int32
		first := b.start("a", time.Millisecond, appending{s: "1", fn: func() { late.Add(1) }})
		second := b.start("a", time.Minute, appending{s: "2", fn: func() { inTime.Add(1) }})
		time.Sleep(2 * time.Millisecond)
		release()
		err := first()
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnknown) {
			t.Errorf("the first: %v", err)
		}
		if err := second(); err != nil {
			t.Error(err)
		}
		if late.Load() != 0 || inTime.Load() != 1 {
			t.Errorf("they ran %d and %d times, want 0 and 1", late.Load(), inTime.Load())
		}
		b.want("a", "2")
	})
}

// A request that is under way when the time of one of its calls is up goes on for the others, and
// the call is told what comes of it: nothing is sent again for that.
func TestPipeline_UnderWayAtTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		calls := []func() error{
			b.start("a", 100*time.Millisecond, appending{s: "1"}),
			b.start("a", 5*time.Second, appending{s: "2"}),
		}
		b.sends("a")
		b.f.Intercept(func(r *etcdfake.Request) error {
			if carries("a")(r) {
				select {
				case <-time.After(300 * time.Millisecond):
				case <-r.Done:
					return etcdfake.ErrLost
				}
			}
			return r.Apply()
		})
		release()
		for i, call := range calls {
			if err := call(); err != nil {
				t.Errorf("call %d: %v", i, err)
			}
		}
		if n := b.sends("a"); n != 1 {
			t.Errorf("sent %d times", n)
		}
		b.want("a", "12")
	})
}

// Whatever an attempt waits for an answer to, a call whose time is up is told then, and the others
// have theirs.
func TestPipeline_UnansweredStep(t *testing.T) {
	for name, c := range map[string]struct {
		create  bool
		silence func(r *etcdfake.Request) bool
	}{
		"fence": {true, isFence},
		"read":  {true, isRead},
		"trace": {false, isTrace},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				other := newBenchOn(t, b.f)
				want := []string{"12"}
				if !c.create {
					b.must("a", appending{s: "0"})
					want = []string{"0", "012", "", "9"}
				}
				release := b.stall()
				start := time.Now()
				first := b.start("a", 700*time.Millisecond, appending{s: "1"})
				second := b.start("a", 20*time.Second, appending{s: "2"})
				var lost, silent, answers, based atomic.Bool
				based.Store(c.create)
				b.f.Intercept(func(r *etcdfake.Request) error {
					switch {
					case carries("a")(r) && based.CompareAndSwap(false, true):
						return r.Apply() // it shows the base
					case carries("a")(r) && lost.CompareAndSwap(false, true):
						_ = r.Apply()
						if !c.create {
							other.do("a", Delete{})
							other.do("a", appending{s: "9"})
						}
						return etcdfake.ErrLost
					case lost.Load() && !answers.Load() && c.silence(r):
						silent.Store(true)
						return r.Wait(nil)
					}
					return r.Apply()
				})
				release()
				err := first()
				if took := time.Since(start); took != 700*time.Millisecond || !errors.Is(err, ErrUnknown) {
					t.Errorf("the first, with 700 ms, is told after %v: %v", took, err)
				}
				if !silent.Load() {
					t.Error("it did not take the step")
				}
				answers.Store(true)
				if err := second(); err != nil {
					t.Errorf("the second: %v", err)
				}
				b.want("a", want...)
			})
		})
	}
}

// What tells an attempt's versions from those of before is the revision before its first send.
// Later sends do not move it, however much this process has seen of etcd by then.
func TestPipeline_SinceTheFirstSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		other := newBenchOn(t, b.f)
		b.must("a", appending{s: "0"})
		b.f.Script(carries("a"), etcdfake.Pass, func(r *etcdfake.Request) error { // the first shows the base
			_ = r.Apply()
			other.do("a", appending{s: "9"})
			_, err := b.reader.Find(t.Context(), time.Now().Add(time.Minute), "another")
			if err != nil {
				t.Error(err)
			}
			return etcdfake.ErrLost
		})
		b.must("a", appending{s: "1"})
		b.want("a", "0", "01", "019")
	})
}

// What was refused for want of space is told that, whatever went wrong while it was found out that
// it was not applied.
func TestPipeline_RefusalIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		var traced atomic.Bool
		b.f.Intercept(func(r *etcdfake.Request) error {
			switch {
			case carries("a")(r):
				b.put("another", "") // there is history to look at
				return rpctypes.ErrGRPCNoSpace
			case isTrace(r) && traced.CompareAndSwap(false, true):
				return rpctypes.ErrGRPCNoLeader
			}
			return r.Apply()
		})
		err := b.start("a", time.Minute, appending{s: "1"})()
		if !errors.Is(err, rpctypes.ErrNoSpace) || errors.Is(err, ErrUnknown) {
			t.Errorf("%v, want %v", err, rpctypes.ErrNoSpace)
		}
		if !traced.Load() {
			t.Error("its history was not read")
		}
		b.want("a")
	})
}

// Batches that slow each other down become fewer.
func TestPipeline_FewerInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		var latency atomic.Int64
		latency.Store(int64(time.Millisecond))
		b.f.Intercept(func(r *etcdfake.Request) error {
			time.Sleep(time.Duration(latency.Load()))
			return r.Apply()
		})
		for _, c := range []struct {
			latency time.Duration
			want    int
		}{{time.Millisecond, 8}, {30 * time.Millisecond, 1}} {
			latency.Store(int64(c.latency))
			for range 40 {
				b.must("a", appending{s: "x"})
			}
			release := b.f.Hold(isTxn)
			etcdfake.Sent[any](b.f)
			var results []func() error
			for i := range 8 {
				results = append(results, b.start(fmt.Sprint(i), time.Minute, appending{s: "x"}))
			}
			if n := len(etcdfake.Sent[*etcdserverpb.TxnRequest](b.f)); n != c.want {
				t.Errorf("%d batches in flight after answers of %v, want %d", n, c.latency, c.want)
			}
			release()
			for _, result := range results {
				if err := result(); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

// A create that the client sent twice behind our back, in a batch, is seen by the Else of the
// second: a read after that would find nothing where others have deleted it, and it would be made
// again.
func TestPipeline_HiddenCreateInABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		other := newBenchOn(t, b.f)
		release := b.stall()
		results := []func() error{
			b.start("a", time.Minute, appending{s: "1"}),
			b.start("b", time.Minute, appending{s: "1"}),
		}
		b.f.Script(carries("a"), func(r *etcdfake.Request) error {
			_ = r.Apply()
			err := r.Apply()
			other.do("a", Delete{})
			return err
		})
		release()
		for i, result := range results {
			if err := result(); err != nil {
				t.Errorf("call %d: %v", i, err)
			}
		}
		b.want("a", "1", "")
		b.want("b", "1")
	})
}
