package read

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/limit"
	"github.com/seed210be38d/etcdstore/internal/record"
)

func TestMain(m *testing.M) { etcdtest.Main(m) }

// decode keeps of a key where it stands in etcd's history.
func decode(kvs []*mvccpb.KeyValue, asOf int64) *record.Version {
	v := &record.Version{AsOf: asOf}
	if len(kvs) > 0 {
		v.Rev, v.Created, v.Count = kvs[0].ModRevision, kvs[0].CreateRevision, kvs[0].Version
	}
	return v
}

// bench is a reader of a fake.
type bench struct {
	*Reader
	t *testing.T
	f *etcdfake.Etcd
}

// newBench returns a reader. At the test's end nothing may be left of what it did.
func newBench(t *testing.T) *bench {
	t.Helper()
	f := etcdfake.New()
	b := &bench{New(etcd.NewClient(f), decode), t, f}
	t.Cleanup(func() {
		f.Intercept(nil)
		b.Wait()
		synctest.Wait()
		if !b.Idle() {
			t.Error("the reader is not idle")
		}
	})
	return b
}

// put writes keys, and returns the revision of the last.
func (b *bench) put(keys ...string) int64 {
	b.t.Helper()
	for _, key := range keys {
		if _, err := b.f.Put(b.t.Context(), key, ""); err != nil {
			b.t.Fatal(err)
		}
	}
	return b.f.Revision()
}

// remove deletes a key.
func (b *bench) remove(key string) {
	b.t.Helper()
	if _, err := b.f.Delete(b.t.Context(), key); err != nil {
		b.t.Fatal(err)
	}
}

// keysOf returns the keys that a request reads, nil for a page of a listing.
func keysOf(msg any) (keys []string) {
	switch r := msg.(type) {
	case *etcdserverpb.RangeRequest:
		if len(r.RangeEnd) == 0 {
			keys = append(keys, string(r.Key))
		}
	case *etcdserverpb.TxnRequest:
		for _, op := range r.Success {
			keys = append(keys, string(op.GetRequestRange().GetKey()))
		}
	}
	return keys
}

func isFind(r *etcdfake.Request) bool { return keysOf(r.Msg) != nil }

func isPage(r *etcdfake.Request) bool {
	get, ok := r.Msg.(*etcdserverpb.RangeRequest)
	return ok && len(get.RangeEnd) > 0
}

// requests returns the keys of each request since the last call.
func (b *bench) requests() (requests [][]string) {
	for _, msg := range etcdfake.Sent[any](b.f) {
		if keys := keysOf(msg); keys != nil {
			requests = append(requests, keys)
		}
	}
	return requests
}

// answer is what a call returned, and how long it took.
type answer struct {
	version *record.Version
	err     error
	took    time.Duration
}

// find starts a Find, and returns what waits for its answer.
func (b *bench) find(ctx context.Context, life time.Duration, key string) func() answer {
	start, done := time.Now(), make(chan answer, 1)
	go func() {
		v, err := b.Find(ctx, start.Add(life), key)
		done <- answer{v, err, time.Since(start)}
	}()
	synctest.Wait()
	return func() answer { return <-done }
}

// stall holds all reads, so that what comes waits behind as many as may be in flight.
func (b *bench) stall() (release func()) {
	release = b.f.Hold(isFind)
	for i := range limit.Initial {
		b.find(b.t.Context(), time.Minute, fmt.Sprint("stalled ", i))
	}
	if n := len(b.requests()); n != limit.Initial {
		b.t.Fatalf("%d reads are in flight, want %d", n, limit.Initial)
	}
	return release
}

// What waits goes in one request, each key once, whoever asks for it and through which call; and
// all of it is as of one revision.
func TestReader_Coalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		a := b.put("a")
		c := b.put("c")
		last := b.put("b")
		release := b.stall()
		finds := []func() answer{b.find(t.Context(), time.Minute, "a"), b.find(t.Context(), time.Minute, "a")}
		var versions []*record.Version
		var errs []error
		all := make(chan struct{})
		go func() {
			defer close(all)
			versions, errs = b.FindAll(t.Context(), time.Now().Add(time.Minute), []string{"b", "a", "missing", "b", "c"})
		}()
		synctest.Wait()
		release()
		for i, find := range finds {
			if got := find(); got.err != nil || got.version.Rev != a || got.version.AsOf != last {
				t.Errorf("find %d: %+v, want revision %d as of %d", i, got, a, last)
			}
		}
		<-all
		if err := errors.Join(errs...); err != nil || len(errs) != 5 {
			t.Fatalf("FindAll: %d errors, %v", len(errs), err)
		}
		for i, want := range []int64{last, a, 0, last, c} {
			if got := versions[i]; got.Rev != want || got.AsOf != last {
				t.Errorf("FindAll, %d: %+v, want revision %d as of %d", i, got, want, last)
			}
		}
		if got, want := b.requests(), [][]string{{"a", "b", "missing", "c"}}; !slices.EqualFunc(got, want, slices.Equal) {
			t.Errorf("reads of %q, want %q", got, want)
		}
	})
}

// A lone key is a plain Get, and keys that wait are a flat Txn, neither of which etcd proposes to
// Raft.
func TestReader_Requests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.find(t.Context(), time.Minute, "a")()
		if _, errs := b.FindAll(t.Context(), time.Now().Add(time.Minute), []string{"a", "b"}); errors.Join(errs...) != nil {
			t.Error(errs)
		}
		sent := etcdfake.Sent[any](b.f)
		if len(sent) != 2 {
			t.Fatalf("%d requests, want 2", len(sent))
		}
		if _, get := sent[0].(*etcdserverpb.RangeRequest); !get {
			t.Errorf("a lone key: %v", sent[0])
		}
		txn, _ := sent[1].(*etcdserverpb.TxnRequest)
		if len(txn.GetSuccess()) != 2 || len(txn.GetCompare()) != 0 || txn.Success[0].GetRequestRange() == nil {
			t.Errorf("two keys: %v", sent[1])
		}
	})
}

// FindAll of no keys asks for nothing.
func TestReader_FindAllOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		if versions, errs := b.FindAll(t.Context(), time.Now().Add(time.Minute), nil); len(versions) != 0 || len(errs) != 0 {
			t.Errorf("FindAll = %v, %v", versions, errs)
		}
		if got := b.requests(); len(got) != 0 {
			t.Errorf("reads of %q", got)
		}
	})
}

// Of each key there is a version or an error, and one that may not be read does not fail the
// others.
func TestReader_FindAllErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		var keys []string
		for i := range 10 {
			keys = append(keys, fmt.Sprint(i))
		}
		b.put(keys...)
		b.f.Deny("3")
		b.f.Deny("7")
		versions, errs := b.FindAll(t.Context(), time.Now().Add(time.Minute), keys)
		for i := range keys {
			if i == 3 || i == 7 {
				if !errors.Is(errs[i], rpctypes.ErrPermissionDenied) || versions[i] != nil {
					t.Errorf("key %d, which is denied: %v, %v", i, versions[i], errs[i])
				}
			} else if errs[i] != nil || versions[i].Rev != int64(i+2) {
				t.Errorf("key %d: %+v, %v", i, versions[i], errs[i])
			}
		}
	})
}

// Keys whose time is up fail, and those of the same request that have more are read when etcd is
// there again.
func TestReader_OwnDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.put("shared", "short", "long")
		release := b.stall()
		var down atomic.Bool
		down.Store(true)
		b.f.Intercept(func(r *etcdfake.Request) error {
			if down.Load() {
				return rpctypes.ErrGRPCNoLeader
			}
			return r.Apply()
		})
		const short, long = time.Second, 5 * time.Second
		first := map[string]func() answer{
			"the first of a shared key": b.find(t.Context(), short, "shared"),
			"its own key":               b.find(t.Context(), short, "short"),
		}
		more := map[string]func() answer{
			"the second of a shared key": b.find(t.Context(), long, "shared"),
			"its own key":                b.find(t.Context(), long, "long"),
		}
		release()
		for name, find := range first {
			got := find()
			if !errors.Is(got.err, context.DeadlineExceeded) || !errors.Is(got.err, rpctypes.ErrNoLeader) {
				t.Errorf("%s: %v, want the end of its time, and what etcd said", name, got.err)
			}
			if got.took != short {
				t.Errorf("%s: took %v of %v", name, got.took, short)
			}
		}
		down.Store(false)
		for name, find := range more {
			if got := find(); got.err != nil || got.took > short+time.Second {
				t.Errorf("%s: %+v", name, got)
			}
		}
	})
}

// A caller that joins another has not more time for that, also where it has less.
func TestReader_JoinsWithLessTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.put("a")
		b.f.Intercept(func(r *etcdfake.Request) error { return r.Wait(nil) })
		for i := range limit.Initial {
			b.find(t.Context(), 100*time.Millisecond, fmt.Sprint("stalled ", i))
		}
		patient := b.find(t.Context(), 2*time.Second, "a")
		hasty := b.find(t.Context(), time.Second, "a")
		if got := hasty(); !errors.Is(got.err, context.DeadlineExceeded) || got.took != time.Second {
			t.Errorf("the one with a second: %+v", got)
		}
		if got := patient(); !errors.Is(got.err, context.DeadlineExceeded) || got.took != 2*time.Second {
			t.Errorf("the one with two: %+v", got)
		}
	})
}

// A caller whose context ends leaves, and those that share its read do not notice.
func TestReader_ContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		rev := b.put("a")
		release := b.stall()
		ctx, cancel := context.WithCancel(t.Context())
		leaving, staying := b.find(ctx, time.Minute, "a"), b.find(t.Context(), time.Minute, "a")
		cancel()
		if got := leaving(); !errors.Is(got.err, context.Canceled) {
			t.Errorf("the one that leaves: %+v", got)
		}
		release()
		if got := staying(); got.err != nil || got.version.Rev != rev {
			t.Errorf("the one that stays: %+v", got)
		}
	})
}

// fill puts n keys that sort in their order, and returns them and the revision of the last.
func (b *bench) fill(n int) (keys []string, rev int64) {
	b.t.Helper()
	for i := range n {
		keys = append(keys, fmt.Sprintf("k/%05d", i))
	}
	return keys, b.put(keys...)
}

// betweenPages has change called after each page but the last.
func (b *bench) betweenPages(change func(page int)) {
	var pages int
	b.f.Intercept(func(r *etcdfake.Request) error {
		if !isPage(r) {
			return r.Apply()
		}
		if pages > 0 {
			change(pages)
		}
		pages++
		return r.Apply()
	})
}

// list returns what a listing yields, in its order, and the revisions as of which it is.
func (b *bench) list(from, end string) (keys []string, asOf []int64, err error) {
	b.t.Helper()
	err = b.List(b.t.Context(), from, end, func(key string, v *record.Version) {
		keys = append(keys, key)
		if len(asOf) == 0 || asOf[len(asOf)-1] != v.AsOf {
			asOf = append(asOf, v.AsOf)
		}
		if v.Rev == 0 || v.Rev > v.AsOf {
			b.t.Errorf("%s is at %d as of %d", key, v.Rev, v.AsOf)
		}
	})
	return keys, asOf, err
}

// A listing of several pages is as of one revision, whatever changes between them.
func TestList_OneRevision(t *testing.T) {
	for _, n := range []int{0, 1, pageKeys - 1, pageKeys, pageKeys + 1, 3*pageKeys + 7} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.put("a", "k", "k0", "z") // outside of the range
				keys, _ := b.fill(n)
				rev := b.f.Revision()
				b.betweenPages(func(page int) {
					next := page * pageKeys
					b.put(keys[0], keys[next], fmt.Sprintf("k/%05d+", next)) // changed, and made
					b.remove(keys[next])
					b.remove(keys[n-1])
				})
				got, asOf, err := b.list("k/", "k0")
				if err != nil || !slices.Equal(got, keys) {
					t.Errorf("%d keys, want %d: %v", len(got), n, err)
				}
				if n > 0 && !slices.Equal(asOf, []int64{rev}) {
					t.Errorf("as of %v, want %d", asOf, rev)
				}
				sent := etcdfake.Sent[*etcdserverpb.RangeRequest](b.f)
				if want := max(1, (n+pageKeys-1)/pageKeys); len(sent) != want {
					t.Errorf("%d pages of %d keys, want %d", len(sent), n, want)
				}
			})
		})
	}
}

// All keys there are can be listed, though etcd takes no empty key.
func TestList_FromTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.put("b", "a", "\x00", "c")
		got, _, err := b.list("", "c")
		if want := []string{"\x00", "a", "b"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("keys %q, %v; want %q", got, err, want)
		}
		for _, get := range etcdfake.Sent[*etcdserverpb.RangeRequest](b.f) {
			if len(get.Key) == 0 {
				t.Error("a request names an empty key, which a server refuses")
			}
		}
	})
}

// A page whose answer is lost is read again, as of the same revision.
func TestList_Retries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		keys, rev := b.fill(2*pageKeys + 1)
		b.f.Script(isPage, etcdfake.Pass, func(r *etcdfake.Request) error {
			b.remove(keys[len(keys)-1])
			return etcdfake.Lose(r)
		}, etcdfake.Answer(rpctypes.ErrGRPCNoLeader), etcdfake.Pass, etcdfake.Drop)
		got, asOf, err := b.list("k/", "k0")
		if err != nil || !slices.Equal(got, keys) || !slices.Equal(asOf, []int64{rev}) {
			t.Errorf("%d keys as of %v, want %d as of %d: %v", len(got), asOf, len(keys), rev, err)
		}
	})
}

// Where the revision is compacted between two pages, the error is etcd's, and the caller starts
// again.
func TestList_Compacted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		keys, _ := b.fill(2*pageKeys + 1)
		b.betweenPages(func(int) {
			b.put("noise")
			b.f.Compact(b.f.Revision())
		})
		got, _, err := b.list("k/", "k0")
		if !errors.Is(err, rpctypes.ErrCompacted) || etcd.Classify(err) != etcd.Compacted {
			t.Errorf("List = %v, want %v", err, rpctypes.ErrCompacted)
		}
		if !slices.Equal(got, keys[:pageKeys]) {
			t.Errorf("%d keys before that, want one page", len(got))
		}
	})
}

// A listing ends with its context.
func TestList_ContextEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.fill(pageKeys + 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		b.f.Script(isPage, etcdfake.Pass, func(r *etcdfake.Request) error { return r.Wait(nil) },
			func(r *etcdfake.Request) error { return r.Wait(nil) })
		start, keys := time.Now(), 0
		err := b.List(ctx, "k/", "k0", func(string, *record.Version) { keys++ })
		if took := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || took != time.Second || keys != pageKeys {
			t.Errorf("%d keys after %v: %v", keys, took, err)
		}
	})
}
