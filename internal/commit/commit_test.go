package commit

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/lease"
	"github.com/seed210be38d/etcdstore/internal/read"
	"github.com/seed210be38d/etcdstore/internal/record"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

// text is a value. What stands with it are entries named by its upper-case letters.
type text struct {
	s    string
	ends record.Millis
}

func (v *text) Expiry() record.Millis { return v.ends }

func (v *text) Encode() ([]byte, error) {
	if strings.Contains(v.s, "!") {
		runtime.Goexit()
	}
	return []byte(v.s), nil
}

func entriesOf(s string) (entries []record.Entry) {
	for _, c := range s {
		if 'A' <= c && c <= 'Z' {
			entries = append(entries, record.Entry{Key: "index/" + string(c), Value: "of a"})
		}
	}
	return entries
}

// decode reads what a test has stored.
func decode(kvs []*mvccpb.KeyValue, asOf int64) *record.Version {
	if len(kvs) == 0 {
		return &record.Version{AsOf: asOf}
	}
	kv := kvs[0]
	r, kind := record.Decode(kv.Value)
	v := &record.Version{
		Rev: kv.ModRevision, AsOf: asOf, Created: kv.CreateRevision, Count: kv.Version,
		Value: &text{string(r.Payload), r.Expiry}, Also: entriesOf(string(r.Payload)),
		Lease: clientv3.LeaseID(kv.Lease), Until: r.LeaseEnd, ID: r.ID,
	}
	if kind != record.KindRecord {
		v.Err, v.Foreign = errors.New("foreign"), true
	}
	return v
}

// appending is a change that appends to the value. The function, if there is one, is the application's.
type appending struct {
	s  string
	fn func()
	If []Precondition
}

func (c appending) Next(cur State) (Write, error) {
	if c.fn != nil {
		c.fn()
	}
	v := &text{s: c.s, ends: cur.Now.Plus(time.Hour)}
	if old, ok := cur.Value.(*text); ok {
		v.s = old.s + c.s
	}
	return Write{Value: v, Also: entriesOf(v.s), If: c.If}, nil
}

func (c appending) Direct(State) bool { return c.fn == nil }
func (appending) Prepare()            {}

// bench is a pipeline on a fake.
type bench struct {
	*Pipeline
	t *testing.T
	f *etcdfake.Etcd
}

// newBench returns a pipeline with a lease that has seats. At the test's end nothing may be left on its way.
func newBench(t *testing.T) *bench {
	t.Helper()
	return newBenchOn(t, etcdfake.New())
}

func newBenchOn(t *testing.T, f *etcdfake.Etcd) *bench {
	t.Helper()
	var detached sync.WaitGroup
	now := func() record.Millis { return record.ToMillis(time.Now()) }
	c := etcd.NewClient(f)
	leases := lease.New(c, "~lease/", now, detached.Go)
	b := &bench{New(c, leases, read.New(c, decode), "", now, decode), t, f}
	t.Cleanup(func() {
		f.Intercept(nil)
		b.Wait()
		detached.Wait()
		synctest.Wait()
		if !b.Idle() {
			t.Error("the pipeline is not idle")
		}
	})
	b.must("warm", appending{s: "x"})
	synctest.Wait()
	return b
}

// start makes a call with its own time, and returns what waits for its error.
func (b *bench) start(key string, d time.Duration, c Change) func() error {
	done := make(chan error, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				done <- fmt.Errorf("panic: %v", p)
			}
		}()
		_, err := b.Do(context.Background(), time.Now().Add(d), Call{Key: key, Change: c})
		done <- err
	}()
	synctest.Wait()
	return func() error { return <-done }
}

func (b *bench) must(key string, c Change) {
	b.t.Helper()
	if err := b.start(key, time.Minute, c)(); err != nil {
		b.t.Fatal(err)
	}
}

// want checks all that a key has held, "" for deletions.
func (b *bench) want(key string, want ...string) {
	b.t.Helper()
	var got []string
	for _, kv := range b.f.Versions(key) {
		r, _ := record.Decode(kv.Value)
		got = append(got, string(r.Payload))
	}
	if !reflect.DeepEqual(got, want) {
		b.t.Errorf("%s has been %q, want %q", key, got, want)
	}
}

func isTxn(r *etcdfake.Request) bool {
	txn := r.Txn()
	return txn != nil && (len(txn.Compare) > 0 || len(txn.Success) > 0 && txn.Success[0].GetRequestTxn() != nil)
}

// stall holds all writes, so that what comes queues up behind two batches.
func (b *bench) stall() (release func()) {
	release = b.f.Hold(isTxn)
	b.start("block 1", time.Minute, appending{s: "x"})
	b.start("block 2", time.Minute, appending{s: "x"})
	return release
}

func (b *bench) put(key, value string) {
	b.t.Helper()
	if _, err := b.f.Put(b.t.Context(), key, value); err != nil {
		b.t.Fatal(err)
	}
}

// created is the precondition that a key is the one that there is now.
func (b *bench) created(key string, err error) Precondition {
	return Precondition{Cmp: clientv3.Compare(clientv3.CreateRevision(key), "=", b.f.At(key, b.f.Revision()).GetCreateRevision()), Err: err}
}

var errLock, errGuard = errors.New("lock lost"), errors.New("guard raised")

// Changes with the same preconditions are folded, and fail together; others go apart, and go on.
func TestPipeline_Preconditions(t *testing.T) {
	for _, held := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.must("a", appending{s: "0"})
			b.put("lock", "")
			guarded := []Precondition{b.created("lock", errLock)}
			release := b.stall()
			var results []func() error
			for i, If := range [][]Precondition{nil, nil, guarded, guarded, nil, nil} {
				results = append(results, b.start("a", time.Minute, appending{s: fmt.Sprint(i), If: If}))
			}
			if !held {
				b.f.LetPass(t, func() error { _, err := b.f.Delete(t.Context(), "lock"); return err })
			}
			release()
			for i, result := range results {
				var want error
				if !held && (i == 2 || i == 3) {
					want = errLock
				}
				if err := result(); !errors.Is(err, want) {
					t.Errorf("call %d: %v, want %v", i, err, want)
				}
			}
			if held {
				b.want("a", "0", "001", "00123", "0012345")
			} else {
				b.want("a", "0", "001", "00145")
			}
		})
	}
}

// Of several preconditions the error is that of the one which does not hold, also where it is a revision that must not have
// passed, and also in a batch.
func TestPipeline_WhichPrecondition(t *testing.T) {
	for _, batched := range []bool{false, true} {
		for name, breach := range map[error]string{errLock: "lock", errGuard: "guard"} {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.must("a", appending{s: "0"})
				b.put("lock", "")
				If := []Precondition{
					b.created("lock", errLock),
					{Cmp: clientv3.Compare(clientv3.ModRevision("guard"), "<", b.f.Revision()+1), Err: errGuard},
				}
				b.must("a", appending{s: "1", If: If})
				release := func() {}
				var other func() error
				if batched {
					release = b.stall()
					other = b.start("b", time.Minute, appending{s: "x"})
				}
				call := func() func() error { return b.start("a", time.Minute, appending{s: "2", If: If}) }
				var result func() error
				if batched {
					result = call()
				}
				b.f.LetPass(t, func() (err error) {
					if breach == "lock" {
						_, err = b.f.Delete(t.Context(), "lock")
					} else {
						_, err = b.f.Put(t.Context(), "guard", "")
					}
					return err
				})
				if !batched {
					result = call()
				}
				release()
				if err := result(); !errors.Is(err, name) {
					t.Errorf("%s, batched %t: %v", breach, batched, err)
				}
				if other != nil && other() != nil {
					t.Error("its neighbour failed")
				}
				b.want("a", "0", "01")
			})
		}
	}
}

// A delete has preconditions like any other change.
func TestPipeline_DeletePrecondition(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must("a", appending{s: "0"})
		b.put("lock", "")
		If := []Precondition{b.created("lock", errLock)}
		if _, err := b.f.Delete(t.Context(), "lock"); err != nil {
			t.Fatal(err)
		}
		if err := b.start("a", time.Minute, Delete{If: If})(); !errors.Is(err, errLock) {
			t.Errorf("a delete without its lock: %v", err)
		}
		b.want("a", "0")
	})
}

// entries returns what stands beside the values, and how many versions each has had.
func (b *bench) entries() map[string]int {
	entries := make(map[string]int)
	for key := range b.f.Keys() {
		if strings.HasPrefix(key, "index/") {
			entries[key] = len(b.f.Versions(key))
		}
	}
	return entries
}

func (b *bench) wantEntries(what string, want map[string]int) {
	b.t.Helper()
	if got := b.entries(); !reflect.DeepEqual(got, want) {
		b.t.Errorf("%s: entries %v, want %v", what, got, want)
	}
}

// What stands with a value is written and deleted with it, at one revision and on its lease, and not touched where neither
// it nor the lease changes.
func TestPipeline_Entries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		same := func(what string) {
			t.Helper()
			a := b.f.At("a", b.f.Revision())
			for key := range b.entries() {
				if e := b.f.At(key, b.f.Revision()); e.Lease != a.Lease {
					t.Errorf("%s: %s is on lease %x, and the value on %x", what, key, e.Lease, a.Lease)
				}
			}
		}
		b.must("a", appending{s: "A"})
		b.wantEntries("created", map[string]int{"index/A": 1})
		same("created")
		b.must("a", appending{s: "x"})
		b.wantEntries("changed", map[string]int{"index/A": 1})
		b.must("a", appending{s: "B"})
		b.wantEntries("one more", map[string]int{"index/A": 1, "index/B": 1})
		same("one more")
		time.Sleep(50 * time.Minute) // the value moves to another lease
		b.must("a", appending{s: "y"})
		b.wantEntries("moved", map[string]int{"index/A": 2, "index/B": 2})
		same("moved")
		b.must("a", Delete{})
		b.wantEntries("deleted", map[string]int{})
		for _, key := range []string{"a", "index/A", "index/B"} {
			versions := b.f.Versions(key)
			if last := versions[len(versions)-1]; last.Version != 0 || last.ModRevision != b.f.Revision() {
				t.Errorf("%s was last changed at %d, and the value deleted at %d", key, last.ModRevision, b.f.Revision())
			}
		}
		b.must("a", appending{s: "C"})
		time.Sleep(2 * time.Hour)
		b.must("a", appending{s: "D"}) // over a value that has ended
		b.wantEntries("ended, and made anew", map[string]int{"index/D": 1})
	})
}

// A change that takes its time holds up no other key.
func TestPipeline_SlowChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		slow := b.start("slow", time.Minute, appending{s: "s", fn: func() { time.Sleep(4 * time.Second) }})
		start := time.Now()
		var results []func() error
		for i := range 3 {
			results = append(results, b.start(fmt.Sprint("quick ", i), time.Minute, appending{s: "q", fn: func() {}}))
		}
		results = append(results, b.start("direct", time.Minute, appending{s: "d"}))
		release()
		for _, result := range results {
			if err := result(); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(start); took > 2*patience {
			t.Errorf("the others took %v", took)
		}
		if err := slow(); err != nil {
			t.Error(err)
		}
		b.want("slow", "s")
	})
}

// A change whose time is up while it runs is told so, and is not made.
func TestPipeline_SlowChangeOutOfTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		err := b.start("a", time.Second, appending{s: "s", fn: func() { time.Sleep(4 * time.Second) }})()
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnknown) {
			t.Errorf("a change of 4 s within 1 s: %v", err)
		}
		b.want("a")
	})
}

// A change that panics does so for its caller, one that ends its goroutine fails, and those that they are folded with go on.
func TestPipeline_ChangeEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		var runs atomic.Int32
		results := []func() error{
			b.start("a", time.Minute, appending{s: "1"}),
			b.start("a", time.Minute, appending{s: "2", fn: func() { runs.Add(1); runtime.Goexit() }}),
			b.start("a", time.Minute, appending{s: "3", fn: func() {}}),
			b.start("a", time.Minute, appending{s: "4", fn: func() { panic("four") }}),
			b.start("a", time.Minute, appending{s: "5", fn: runtime.Goexit}),
			b.start("b", time.Minute, appending{s: "6"}),
		}
		release()
		for i, result := range results {
			err := result()
			switch i {
			case 1, 4:
				if !errors.Is(err, errExited) {
					t.Errorf("call %d: %v", i+1, err)
				}
			case 3:
				if err == nil || err.Error() != "panic: four" {
					t.Errorf("call 4: %v", err)
				}
			default:
				if err != nil {
					t.Errorf("call %d: %v", i+1, err)
				}
			}
		}
		if n := runs.Load(); n != 1 {
			t.Errorf("what ends its goroutine ran %d times", n)
		}
		b.want("a", "13")
		b.want("b", "6")
	})
}

// An encoding that ends its goroutine fails the change that needs it, alone.
func TestPipeline_EncodingEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		bad := b.start("a", time.Minute, appending{s: "!", fn: func() {}})
		good := b.start("a", time.Minute, appending{s: "good", fn: func() {}})
		release()
		if err := bad(); !errors.Is(err, errExited) {
			t.Errorf("bad: %v", err)
		}
		if err := good(); err != nil {
			t.Error(err)
		}
		b.want("a", "good")
	})
}

// The calls of an attempt that waits for another lease, after a send with an unknown outcome, have their own time each.
func TestPipeline_SeatlessTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.f.Intercept(func(r *etcdfake.Request) error {
			if _, ok := r.Msg.(*etcdserverpb.LeaseGrantRequest); ok {
				<-r.Done
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		start := time.Now()
		far := record.ToMillis(start.Add(1000 * time.Hour)) // on no lease that there is
		a := &attempt{
			base: &record.Version{Rev: 5, AsOf: 5, Created: 5}, kind: put, step: toSeat, doubt: true, sent: true,
			final: &text{s: "x", ends: far}, queue: &queue{key: "a"},
		}
		a.queue.attempt = a
		b.queues["a"] = a.queue
		for _, d := range []time.Duration{time.Second, 5 * time.Second} {
			a.calls = append(a.calls, &call{Call: Call{Key: "a", Change: Delete{}}, deadline: start.Add(d), done: make(chan struct{})})
			b.calls.Add(1)
		}
		first, second := a.calls[0], a.calls[1]
		go b.drive([]*attempt{a})
		<-first.done
		if took := time.Since(start); took > 1100*time.Millisecond || !errors.Is(first.err, ErrUnknown) {
			t.Errorf("the first call, with 1 s, is told after %v: %v", took, first.err)
		}
		<-second.done
		if took := time.Since(start); took < 4*time.Second {
			t.Errorf("the second call, with 5 s, is told after %v: %v", took, second.err)
		}
	})
}

// What a batch could not settle is read in one request, however much that is.
func TestPipeline_ReadTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		other := newBenchOn(t, b.f)
		const n = 30
		for i := range n {
			b.must(fmt.Sprint("k", i), appending{s: "0"})
		}
		for i := range n {
			other.must(fmt.Sprint("k", i), Delete{})
			other.must(fmt.Sprint("k", i), appending{s: "9"})
		}
		release := b.stall()
		var results []func() error
		for i := range n {
			known := decodeKey(b, fmt.Sprint("k", i), 0)
			results = append(results, b.startFrom(fmt.Sprint("k", i), known, appending{s: "1"}))
		}
		etcdfake.Sent[any](b.f)
		release()
		for _, result := range results {
			if err := result(); err != nil {
				t.Error(err)
			}
		}
		reads := 0
		for _, msg := range etcdfake.Sent[any](b.f) {
			switch r := msg.(type) {
			case *etcdserverpb.RangeRequest:
				reads++
			case *etcdserverpb.TxnRequest:
				if len(r.Success) > 0 && r.Success[0].GetRequestRange() != nil {
					reads++
				}
			}
		}
		if reads > 3 {
			t.Errorf("%d reads for what %d keys hold", reads, n)
		}
		for i := range n {
			if v := b.f.At(fmt.Sprint("k", i), b.f.Revision()); v == nil {
				t.Errorf("k%d is gone", i)
			}
		}
	})
}

// decodeKey returns the i-th version of a key.
func decodeKey(b *bench, key string, i int) *record.Version {
	kv := b.f.Versions(key)[i]
	return decode([]*mvccpb.KeyValue{kv}, kv.ModRevision)
}

// startFrom is start for a caller that has read a version.
func (b *bench) startFrom(key string, hint *record.Version, c Change) func() error {
	done := make(chan error, 1)
	go func() {
		_, err := b.Do(context.Background(), time.Now().Add(time.Minute), Call{Key: key, Change: c, Hint: hint})
		done <- err
	}()
	synctest.Wait()
	return func() error { return <-done }
}

// A delete whose precondition is lost fails, also where others have deleted the key meanwhile, or made it anew.
func TestPipeline_DeleteBreached(t *testing.T) {
	for _, anew := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.must("a", appending{s: "0"})
			b.put("lock", "")
			If := []Precondition{b.created("lock", errLock)}
			hint := decodeKey(b, "a", 0)
			for _, key := range []string{"lock", "a"} {
				if _, err := b.f.Delete(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
			if anew {
				newBenchOn(t, b.f).must("a", appending{s: "new"})
			}
			if err := b.startFrom("a", hint, Delete{If: If})(); !errors.Is(err, errLock) {
				t.Errorf("made anew %t: %v", anew, err)
			}
		})
	}
}

// A delete says what it found, and not what others have deleted before it got there.
func TestPipeline_DeleteFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must("a", appending{s: "0"})
		hint := decodeKey(b, "a", 0)
		var found record.Value
		if err := b.startFrom("a", hint, Delete{Found: &found})(); err != nil || found.(*text).s != "0" {
			t.Errorf("the value of the key: %v, %v", found, err)
		}
		if err := b.startFrom("a", hint, Delete{Found: &found})(); err != nil || found != nil {
			t.Errorf("what was deleted before: %v, %v", found, err)
		}
	})
}

// A call that waits behind another's attempt ends with its own time.
func TestPipeline_PendingTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must("a", appending{s: "0"})
		b.f.Intercept(func(r *etcdfake.Request) error {
			if isTxn(r) {
				<-r.Done
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		start := time.Now()
		patient := b.startFrom("a", decodeKey(b, "a", 0), appending{s: "1"})
		err := b.start("a", time.Second, appending{s: "2"})()
		if took := time.Since(start); took > 2*time.Second || !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnknown) {
			t.Errorf("a call with 1 s is told after %v: %v", took, err)
		}
		b.f.Intercept(nil)
		if err := patient(); err != nil {
			t.Error(err)
		}
		b.want("a", "0", "01")
	})
}

// crowded is a change with many entries beside its value.
type crowded int

func (n crowded) Next(cur State) (Write, error) {
	w := Write{Value: &text{s: "v", ends: cur.Now.Plus(time.Hour)}}
	for i := range int(n) {
		w.Also = append(w.Also, record.Entry{Key: fmt.Sprint("index/", i), Value: "x"})
	}
	return w, nil
}

func (crowded) Direct(State) bool { return true }
func (crowded) Prepare()          {}

// A write that has too many operations by itself does not make the batches of others smaller.
func TestPipeline_TooManyAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		if err := b.start("a", time.Minute, crowded(140))(); etcd.Classify(err) != etcd.TooManyOps {
			t.Errorf("140 entries: %v", err)
		}
		if n := b.client.BatchKeys(); n != etcd.MaxBatchKeys {
			t.Errorf("batches of %d keys", n)
		}
	})
}
