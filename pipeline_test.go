package etcdstore

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/limit"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
)

// The tests of this file run in synctest bubbles: synctest.Wait returns when nothing goes on by itself any more, so that
// what waits does wait; time passes only when nothing else happens, so that no test is slow, or hangs on time.

const fakePrefix = "p:"

// newFakeStore returns a store on a fake etcd. At the test's end nothing may be left of what it did.
func newFakeStore(t *testing.T, opts ...Option) (*EtcdStore, *fakeEtcd) {
	t.Helper()
	f := newFakeEtcd()
	return newFakeStoreOn(t, f, opts...), f
}

// newFakeStoreOn returns a further store on a fake, as another process has it.
func newFakeStoreOn(t *testing.T, f *fakeEtcd, opts ...Option) *EtcdStore {
	t.Helper()
	s := newStore(f, nil, fakePrefix, opts)
	t.Cleanup(func() {
		f.Intercept(nil)
		mustClose(t, s)
		wantIdle(t, s)
	})
	return s
}

// wantIdle checks that a store that has nothing to do has nothing.
func wantIdle(t *testing.T, s *EtcdStore) {
	t.Helper()
	synctest.Wait()
	if !s.pipeline.Idle() {
		t.Error("the pipeline is not idle")
	}
	if !s.reader.Idle() {
		t.Error("the reader is not idle")
	}
}

// seed stores a session on a lease that lasts, as another process would.
func (f *fakeEtcd) seed(t *testing.T, token string, pairs ...any) {
	t.Helper()
	deadline := time.Now().Add(time.Hour)
	lease, err := f.Grant(t.Context(), 7200)
	if err != nil {
		t.Fatal(err)
	}
	r := record.Record{
		Payload:   gobSession(t, deadline, fakePairs(pairs)),
		PrefixLen: len(fakePrefix),
		Expiry:    record.ToMillis(deadline),
		LeaseEnd:  record.ToMillis(deadline.Add(time.Hour)),
		ID:        record.NewWriteID(),
	}
	if _, err := f.Put(t.Context(), fakePrefix+token, string(r.Encode()), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
}

// sessions returns all versions that a session has had, nil for its deletions.
func (f *fakeEtcd) sessions(t *testing.T, token string) (all []map[string]any) {
	t.Helper()
	for _, kv := range f.Versions(fakePrefix + token) {
		all = append(all, fakeValues(t, kv))
	}
	return all
}

// fakeValues returns the values of a session's version, nil for its deletion.
func fakeValues(t *testing.T, kv *mvccpb.KeyValue) map[string]any {
	t.Helper()
	if kv.Version == 0 {
		return nil
	}
	r, kind := record.Decode(kv.Value)
	_, values, err := newOptions(nil).codec.Decode(r.Payload)
	if kind != record.KindRecord || err != nil {
		t.Fatalf("%s holds kind %d, %v", kv.Key, kind, err)
	}
	if values == nil {
		values = map[string]any{}
	}
	return values
}

// wantSession checks what a session holds, pairs of keys and values, and how many versions of it there have been;
// no pairs stand for no session.
func (f *fakeEtcd) wantSession(t *testing.T, token string, versions int, pairs ...any) {
	t.Helper()
	all := f.sessions(t, token)
	var got map[string]any
	if len(all) > 0 {
		got = all[len(all)-1]
	}
	var want map[string]any
	if len(pairs) > 0 {
		want = fakePairs(pairs)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s is %v, want %v", token, got, want)
	}
	if len(all) != versions {
		t.Errorf("%s has had %d versions, want %d: %v", token, len(all), versions, all)
	}
}

// fakePairs returns the values that keys and values in turn stand for.
func fakePairs(pairs []any) map[string]any {
	values := make(map[string]any)
	_ = setting(pairs...)(values)
	return values
}

// setting returns a function for Update that sets values.
func setting(pairs ...any) func(map[string]any) error {
	return func(values map[string]any) error {
		for i := 0; i < len(pairs); i += 2 {
			values[pairs[i].(string)] = pairs[i+1]
		}
		return nil
	}
}

// commitOf changes values of what ctx's transaction finds, and returns the commit of that.
func commitOf(t *testing.T, ctx context.Context, s *EtcdStore, token string, pairs ...any) func() error {
	t.Helper()
	b, _, err := s.FindCtx(ctx, token)
	if err != nil {
		t.Fatal(err)
	}
	expiry, values := time.Now().Add(time.Hour), map[string]any{}
	if b != nil {
		if expiry, values, err = s.codec.Decode(b); err != nil {
			t.Fatal(err)
		}
	}
	_ = setting(pairs...)(values)
	b = gobSession(t, expiry, values)
	return func() error { return s.CommitCtx(ctx, token, b, expiry) }
}

// fakePanic is the error of a call that panicked.
type fakePanic struct{ value any }

func (p fakePanic) Error() string { return fmt.Sprint("panic: ", p.value) }

// started starts a call, and returns when it waits for something, or has returned. The function that it returns waits for
// the call's result.
func started(call func() error) (result func() error) {
	err, done := error(nil), make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if v := recover(); v != nil {
				err = fakePanic{v}
			}
		}()
		err = call()
	}()
	synctest.Wait()
	return func() error {
		<-done
		return err
	}
}

// wantErr checks a call's error; nil wants none.
func wantErr(t *testing.T, what string, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// fakeAttempts returns the attempts that a request carries: the Txns in it, or itself. For what writes nothing of sessions
// that is none.
func fakeAttempts(txn *etcdserverpb.TxnRequest) (attempts []*etcdserverpb.TxnRequest) {
	if len(txn.GetCompare()) > 0 {
		return []*etcdserverpb.TxnRequest{txn}
	}
	for _, op := range txn.GetSuccess() {
		if nested := op.GetRequestTxn(); nested != nil {
			attempts = append(attempts, nested)
		}
	}
	return attempts
}

// isAttempt reports whether a request carries attempts, other than those of stall.
func isAttempt(r *etcdfake.Request) bool {
	tokens := fakeTokens(r.Txn())
	return len(tokens) > 0 && !strings.HasPrefix(tokens[0], "stalled")
}

// isGrant reports whether a request grants a lease.
func isGrant(r *etcdfake.Request) bool {
	_, ok := r.Msg.(*etcdserverpb.LeaseGrantRequest)
	return ok
}

// fakeTokens returns whose sessions a request's attempts are.
func fakeTokens(txn *etcdserverpb.TxnRequest) (tokens []string) {
	for _, a := range fakeAttempts(txn) {
		tokens = append(tokens, strings.TrimPrefix(string(a.Compare[0].Key), fakePrefix))
	}
	return tokens
}

// batches returns whose sessions were in each of the requests with attempts since the last call.
func (f *fakeEtcd) batches() (batches [][]string) {
	for _, txn := range etcdfake.Sent[*etcdserverpb.TxnRequest](f.Etcd) {
		if tokens := fakeTokens(txn); tokens != nil {
			batches = append(batches, tokens)
		}
	}
	return batches
}

// stall fills the lane of writes with two batches that are held, so that what comes queues up.
func stall(t *testing.T, s *EtcdStore, f *fakeEtcd) (release func()) {
	t.Helper()
	tokens := []string{"stalled 1", "stalled 2"}
	for _, token := range tokens {
		f.seed(t, token)
	}
	f.batches()
	releaseAll := f.Hold(func(r *etcdfake.Request) bool { return len(fakeAttempts(r.Txn())) > 0 })
	var results []func() error
	for _, token := range tokens {
		results = append(results, started(func() error { return s.Update(t.Context(), token, setting("a", 1)) }))
	}
	if n := len(f.batches()); n != limit.Initial {
		t.Fatalf("%d batches are in flight, want %d", n, limit.Initial)
	}
	return func() {
		t.Helper()
		releaseAll()
		for _, result := range results {
			wantErr(t, "a stalled update", result(), nil)
		}
	}
}

// The transitions of one session take effect in the order in which they came, also where the first of them has to be
// folded again; and those that wait together are one write.
func TestPipeline_Order(t *testing.T) {
	for _, overtaken := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s, f := newFakeStore(t)
			other := newFakeStoreOn(t, f)
			f.seed(t, "a", "log", "")
			release := f.Hold(isAttempt)
			var results []func() error
			want := ""
			for i := range 20 {
				want += fmt.Sprint(i, " ")
				results = append(results, started(func() error {
					return s.Update(t.Context(), "a", func(values map[string]any) error {
						values["log"] = values["log"].(string) + fmt.Sprint(i, " ")
						return nil
					})
				}))
			}
			if overtaken {
				want = "other " + want
				f.LetPass(t, func() error { return other.Update(t.Context(), "a", setting("log", "other ")) })
			}
			release()
			for i, result := range results {
				wantErr(t, fmt.Sprint("update ", i), result(), nil)
			}
			f.wantSession(t, "a", 3, "log", want) // the seed, the first or the other, and the fold
		})
	}
}

// 64 transitions of one session that wait together are one write, or two with a delete among them, and each gets its own
// result: what fails among them fails alone.
func TestPipeline_Fold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		var txs [3]context.Context
		for i := range txs {
			txs[i] = Begin(t.Context())
		}
		conflicting := commitOf(t, txs[0], s, "a", "n", 7)
		merging := commitOf(t, txs[1], s, "a", "merged", 1)
		late := commitOf(t, txs[2], s, "a", "late", 1)
		own := errors.New("own")

		update := func(pairs ...any) func() error {
			return func() error { return s.Update(t.Context(), "a", setting(pairs...)) }
		}
		calls := []func() error{update("n", 1)}
		wants := []error{nil}
		add := func(call func() error, want error) {
			calls, wants = append(calls, call), append(wants, want)
		}
		add(conflicting, ErrConflict)
		add(merging, nil)
		add(func() error { return s.Update(t.Context(), "a", func(map[string]any) error { return own }) }, own)
		for i := range 20 {
			add(update(fmt.Sprint("before ", i), 1), nil)
		}
		add(func() error { return s.Delete("a") }, nil)
		add(late, ErrSessionGone)
		add(update("late", 2), ErrSessionGone)
		fresh := gobSession(t, time.Now().Add(time.Hour), map[string]any{"fresh": 1})
		add(func() error { return s.CommitCtx(Begin(t.Context()), "a", fresh, time.Now().Add(time.Hour)) }, nil)
		pairs := []any{"fresh", 1}
		for i := range 64 - len(calls) {
			key := fmt.Sprint("after ", i)
			pairs = append(pairs, key, 1)
			add(update(key, 1), nil)
		}

		release := f.Hold(isAttempt)
		var results []func() error
		for _, call := range calls {
			results = append(results, started(call))
		}
		release()
		for i, result := range results {
			wantErr(t, fmt.Sprint("call ", i), result(), wants[i])
		}
		f.wantSession(t, "a", 4, pairs...) // the seed, the fold up to the delete as one, and what came after it
	})
}

// What a transition makes of a guess, an error included, counts only if the compare succeeds.
func TestPipeline_FailureOverGuess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a")
		release := stall(t, s, f)
		missing, runs := errors.New("not there yet"), 0
		first := started(func() error { return s.Update(t.Context(), "a", setting("first", 1)) })
		second := started(func() error {
			return s.Update(t.Context(), "a", func(values map[string]any) error {
				if runs++; values["other"] == nil {
					return missing
				}
				values["second"] = 1
				return nil
			})
		})
		f.LetPass(t, func() error { return other.Update(t.Context(), "a", setting("other", 1)) })
		release()
		wantErr(t, "first", first(), nil)
		wantErr(t, "second", second(), nil)
		f.wantSession(t, "a", 3, "other", 1, "first", 1, "second", 1)
		if runs != 2 {
			t.Errorf("the second ran %d times, want once over the guess and once over what is there", runs)
		}
	})
}

// A lone session goes un-nested, sessions that wait together go in one request.
func TestPipeline_GroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 50 {
			f.seed(t, fmt.Sprint(i))
		}
		etcdfake.Sent[any](f.Etcd)
		wantErr(t, "a lone update", s.Update(t.Context(), "0", setting("a", 0)), nil)
		for _, txn := range etcdfake.Sent[*etcdserverpb.TxnRequest](f.Etcd) {
			if len(fakeAttempts(txn)) == 1 && len(txn.Compare) == 0 {
				t.Error("a lone session is nested")
			}
		}

		release := stall(t, s, f)
		var results []func() error
		for i := range 50 {
			results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
		}
		wantBatches(t, f, []int{}, "while two batches are in flight")
		release()
		wantBatches(t, f, []int{50}, "once they have ended")
		for i, result := range results {
			wantErr(t, fmt.Sprint("update ", i), result(), nil)
			f.wantSession(t, fmt.Sprint(i), min(2+(50-i)/50, 3), "a", 1)
		}
	})
}

// wantBatches checks how many sessions were in each request since the last call.
func wantBatches(t *testing.T, f *fakeEtcd, want []int, when string) {
	t.Helper()
	got := []int{}
	for _, tokens := range f.batches() {
		got = append(got, len(tokens))
	}
	if !slices.Equal(got, want) {
		t.Errorf("batches of %v sessions, want %v, %s", got, want, when)
	}
}

// A full batch goes at once, and 120 sessions fill it.
func TestPipeline_FullBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 2*etcd.MaxBatchKeys - 1 {
			f.seed(t, fmt.Sprint(i))
		}
		release := stall(t, s, f)
		var results []func() error
		update := func(from, to int) {
			for i := from; i < to; i++ {
				results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
			}
		}
		update(0, etcd.MaxBatchKeys-1)
		wantBatches(t, f, []int{}, "one short of a full batch")
		update(etcd.MaxBatchKeys-1, etcd.MaxBatchKeys)
		wantBatches(t, f, []int{etcd.MaxBatchKeys}, "with a full batch")
		update(etcd.MaxBatchKeys, 2*etcd.MaxBatchKeys-1)
		wantBatches(t, f, []int{}, "one short of another full batch")
		release()
		wantBatches(t, f, []int{etcd.MaxBatchKeys - 1}, "at the end")
		for i, result := range results {
			wantErr(t, fmt.Sprint("update ", i), result(), nil)
			f.wantSession(t, fmt.Sprint(i), 2, "a", 1)
		}
	})
}

// A request has at most 512 KiB of values, and a value of 32 KiB goes alone.
func TestPipeline_Bytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		sizes := map[string]int{"large": 40 << 10, "small": 10}
		for i := range 40 {
			sizes[fmt.Sprint("medium ", i)] = 20 << 10
		}
		for token := range sizes {
			f.seed(t, token)
		}
		release := stall(t, s, f)
		var results []func() error
		for token, size := range sizes {
			results = append(results, started(func() error { return s.Update(t.Context(), token, setting("a", strings.Repeat("x", size))) }))
		}
		release()
		for _, result := range results {
			wantErr(t, "update", result(), nil)
		}
		var batches int
		for _, txn := range etcdfake.Sent[*etcdserverpb.TxnRequest](f.Etcd) {
			tokens := fakeTokens(txn)
			if slices.Contains(tokens, "large") {
				if len(tokens) > 1 {
					t.Errorf("a large value is among %d others", len(tokens)-1)
				}
				continue
			}
			if size := proto.Size(txn); size > 512<<10+4<<10 {
				t.Errorf("a request with %d bytes", size)
			}
			if len(tokens) > 0 {
				batches++
			}
		}
		if batches != 2 {
			t.Errorf("%d batches for 800 KiB", batches)
		}
	})
}

// A server may take fewer operations in a Txn than ours. The batches become smaller, and nobody notices.
func TestPipeline_FewerOperations(t *testing.T) {
	for _, c := range []struct{ operations, sessions int }{{128, 120}, {64, 60}, {16, 15}, {4, 3}, {2, 1}} {
		synctest.Test(t, func(t *testing.T) {
			s, f := newFakeStore(t)
			for i := range etcd.MaxBatchKeys {
				f.seed(t, fmt.Sprint(i))
			}
			f.LimitTo(c.operations, 1536<<10)
			for range 8 {
				release := stall(t, s, f)
				var results []func() error
				for i := range s.etcd.BatchKeys() {
					results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
				}
				release()
				for i, result := range results {
					wantErr(t, fmt.Sprint("update ", i), result(), nil)
				}
			}
			if got := s.etcd.BatchKeys(); got != c.sessions {
				t.Errorf("with %d operations allowed, %d sessions a batch, want %d", c.operations, got, c.sessions)
			}
		})
	}
}

// In a batch that etcd refuses as a whole only the culprit fails, if anything has to.
func TestPipeline_PoisonedBatch(t *testing.T) {
	unregistered := struct{ A int }{1}
	conflicting := gobSession(t, day0, map[string]any{"n": 2})
	panicking := func(c Conflict) (any, error) { panic(c.Key) }
	for name, c := range map[string]struct {
		bad    func(s *EtcdStore, ctx context.Context) error
		poison func(f *fakeEtcd)
		want   error
		panics any
	}{
		"too large": {
			bad: func(s *EtcdStore, ctx context.Context) error {
				return s.Update(ctx, "bad", setting("a", strings.Repeat("x", 20<<10)))
			},
			poison: func(f *fakeEtcd) { f.LimitTo(128, 16<<10) },
			want:   ErrTooLarge,
		},
		"no permission": {
			bad:    func(s *EtcdStore, ctx context.Context) error { return s.Update(ctx, "bad", setting("a", 1)) },
			poison: func(f *fakeEtcd) { f.Deny(fakePrefix + "bad") },
			want:   rpctypes.ErrPermissionDenied,
		},
		"does not encode": {
			bad: func(s *EtcdStore, ctx context.Context) error { return s.Update(ctx, "bad", setting("a", unregistered)) },
		},
		"function panics": {
			bad: func(s *EtcdStore, ctx context.Context) error {
				return s.Update(ctx, "bad", func(map[string]any) error { panic("own") })
			},
			panics: "own",
		},
		"resolver panics": {
			bad: func(s *EtcdStore, ctx context.Context) error {
				return s.CommitCtx(ctx, "bad", conflicting, day0)
			},
			panics: "n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t, WithResolver(panicking))
				f.seed(t, "bad", "n", 0)
				for i := range 10 {
					f.seed(t, fmt.Sprint(i))
				}
				ctx := Begin(t.Context())
				commitOf(t, ctx, s, "bad") // reads it
				wantErr(t, "an update since", s.Update(t.Context(), "bad", setting("n", 1)), nil)

				release := stall(t, s, f)
				var results []func() error
				for i := range 10 {
					if i == 5 {
						results = append(results, started(func() error { return c.bad(s, ctx) }))
					}
					results = append(results, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
				}
				if c.poison != nil {
					c.poison(f)
				}
				release()
				bad := results[5]()
				for _, result := range slices.Delete(results, 5, 6) {
					wantErr(t, "a good one", result(), nil)
				}
				for i := range 10 {
					f.wantSession(t, fmt.Sprint(i), 2, "a", 1)
				}
				switch {
				case c.panics != nil:
					wantErr(t, "the bad one", bad, fakePanic{c.panics})
				case c.want != nil:
					wantErr(t, "the bad one", bad, c.want)
				case bad == nil:
					t.Error("the bad one succeeded")
				}
				f.wantSession(t, "bad", 2, "n", 1)
			})
		})
	}
}

// A fold that etcd refuses is tried again transition by transition.
func TestPipeline_PoisonedFold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		f.LimitTo(128, 16<<10)
		release := stall(t, s, f)
		var results []func() error
		for i := range 9 {
			results = append(results, started(func() error {
				if i == 4 {
					return s.Update(t.Context(), "a", setting("large", strings.Repeat("x", 20<<10)))
				}
				return s.Update(t.Context(), "a", func(values map[string]any) error {
					values["n"] = values["n"].(int) + 1
					return nil
				})
			}))
		}
		release()
		for i, result := range results {
			var want error
			if i == 4 {
				want = ErrTooLarge
			}
			wantErr(t, fmt.Sprint("update ", i), result(), want)
		}
		f.wantSession(t, "a", 9, "n", 8)
	})
}

// committing returns the commit of a session that was not there.
func committing(t *testing.T, s *EtcdStore, token string, life time.Duration, pairs ...any) func() error {
	t.Helper()
	expiry := time.Now().Add(life)
	b := gobSession(t, expiry, fakePairs(pairs))
	return func() error { return s.CommitCtx(Begin(t.Context()), token, b, expiry) }
}

// puts returns what the attempts on a session's behalf would put, in the order in which they were sent.
func fakePuts(txns []*etcdserverpb.TxnRequest, token string) (puts []*etcdserverpb.PutRequest) {
	for _, txn := range txns {
		for _, a := range fakeAttempts(txn) {
			if string(a.Compare[0].Key) == fakePrefix+token && len(a.Success) > 0 {
				puts = append(puts, a.Success[0].GetRequestPut())
			}
		}
	}
	return puts
}

// One session of a batch is on a lease that is lost: it gets another, with the same write id, and the others do not
// notice.
func TestPipeline_LostLease(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, f *fakeEtcd, id clientv3.LeaseID){
		"with its key": func(t *testing.T, f *fakeEtcd, id clientv3.LeaseID) {
			if _, err := f.Revoke(t.Context(), id); err != nil {
				t.Error(err)
			}
		},
		"before its key": func(_ *testing.T, f *fakeEtcd, id clientv3.LeaseID) {
			f.LoseLease(id)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				wantErr(t, "a lease for an hour", committing(t, s, "1h", time.Hour, "a", 1)(), nil)
				wantErr(t, "a lease for a day", committing(t, s, "24h", 24*time.Hour, "a", 1)(), nil)
				lost := f.LastLease()
				release := stall(t, s, f)
				var results []func() error
				for i := range 10 {
					life := time.Hour
					if i == 5 {
						life = 24 * time.Hour
					}
					results = append(results, started(committing(t, s, fmt.Sprint(i), life, "a", 1)))
				}
				lose(t, f, lost)
				release()
				for i, result := range results {
					wantErr(t, fmt.Sprint("commit ", i), result(), nil)
					f.wantSession(t, fmt.Sprint(i), 1, "a", 1)
				}
				puts := fakePuts(etcdfake.Sent[*etcdserverpb.TxnRequest](f.Etcd), "5")
				first, last := puts[0], puts[len(puts)-1]
				a, _ := record.Decode(first.Value)
				b, _ := record.Decode(last.Value)
				if first.Lease == last.Lease || a.ID != b.ID {
					t.Errorf("lease %x, then %x, write id %x, then %x", first.Lease, last.Lease, a.ID, b.ID)
				}
			})
		})
	}
}

// increment is a function for Update that tells how often it took effect.
func increment(values map[string]any) error {
	n, _ := values["n"].(int)
	values["n"] = n + 1
	return nil
}

// Whatever becomes of requests, what they carry happens once, and its callers are told so.
func TestPipeline_UnknownOutcome(t *testing.T) {
	type fates = []func(r *etcdfake.Request) error
	for name, script := range map[string]fates{
		"applied":                        {etcdfake.Lose},
		"not applied":                    {etcdfake.Drop},
		"twice":                          {etcdfake.Drop, etcdfake.Drop},
		"applied by the second":          {etcdfake.Drop, etcdfake.Lose},
		"and again":                      {etcdfake.Lose, etcdfake.Drop, etcdfake.Lose, etcdfake.Lose},
		"half of the answers lost":       {etcdfake.Lose, etcdfake.Pass, etcdfake.Lose, etcdfake.Pass, etcdfake.Lose, etcdfake.Pass, etcdfake.Lose, etcdfake.Pass},
		"refused, applied":               {etcdfake.Answer(rpctypes.ErrGRPCNoLeader), etcdfake.Lose},
		"applied, then refused a while":  {etcdfake.Lose, etcdfake.Answer(rpctypes.ErrGRPCRequestTooManyRequests)},
		"out of space, yet applied":      {func(r *etcdfake.Request) error { return cmp.Or(r.Apply(), rpctypes.ErrGRPCNoSpace) }},
		"unknown, then denied, for once": {etcdfake.Lose, etcdfake.Answer(rpctypes.ErrGRPCPermissionDenied), etcdfake.Answer(rpctypes.ErrGRPCPermissionDenied)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				const n = 8
				for i := range n {
					f.seed(t, fmt.Sprint("update ", i), "n", 0)
					f.seed(t, fmt.Sprint("delete ", i), "n", 0)
				}
				wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
				release := stall(t, s, f)
				var results []func() error
				for i := range n {
					results = append(results,
						started(committing(t, s, fmt.Sprint("create ", i), time.Hour, "n", 1)),
						started(func() error { return s.Update(t.Context(), fmt.Sprint("update ", i), increment) }),
						started(func() error { return s.Delete(fmt.Sprint("delete ", i)) }))
				}
				f.Script(isAttempt, script...)
				release()
				for i, result := range results {
					wantErr(t, fmt.Sprint("call ", i), result(), nil)
				}
				for i := range n {
					f.wantSession(t, fmt.Sprint("create ", i), 1, "n", 1)
					f.wantSession(t, fmt.Sprint("update ", i), 2, "n", 1)
					f.wantSession(t, fmt.Sprint("delete ", i), 2)
				}
			})
		})
	}
}

// A create whose outcome is unknown is fenced before it is sent again: delivered late, the first one has no effect,
// not even where the session has been deleted since.
func TestPipeline_CreateIsFenced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		etcdfake.Sent[any](f.Etcd)
		var late func() error
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			late = r.Apply
			return etcdfake.ErrLost
		})
		wantErr(t, "commit", committing(t, s, "a", time.Hour, "n", 1)(), nil)
		var steps []string
		var fences []int64
		for _, msg := range etcdfake.Sent[proto.Message](f.Etcd) {
			switch r := msg.(type) {
			case *etcdserverpb.TxnRequest:
				for _, a := range fakeAttempts(r) {
					fences = append(fences, a.Compare[1].GetModRevision())
					steps = append(steps, "create")
				}
			case *etcdserverpb.PutRequest:
				steps = append(steps, "fence")
			}
		}
		if got := strings.Join(steps, ", "); got != "create, fence, create" || fences[0] == fences[1] {
			t.Errorf("%s, with fences %v", got, fences)
		}

		deliver := func() {
			t.Helper()
			if err := late(); err != nil {
				t.Error(err)
			}
		}
		deliver()
		f.wantSession(t, "a", 1, "n", 1)
		wantErr(t, "delete", s.Delete("a"), nil)
		deliver()
		f.wantSession(t, "a", 2)
	})
}

// An update whose outcome is unknown is sent again as it is, to the byte, also when its batch has become smaller.
func TestPipeline_ResendIsIdentical(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 4 {
			f.seed(t, fmt.Sprint(i))
		}
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		release := stall(t, s, f)
		var results []func() error
		for i := range 4 {
			results = append(results,
				started(committing(t, s, fmt.Sprint("new ", i), time.Hour)),
				started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
		}
		f.Script(isAttempt, etcdfake.Drop, etcdfake.Drop, etcdfake.Drop, etcdfake.Drop)
		release()
		for _, result := range results {
			wantErr(t, "call", result(), nil)
		}
		sends := make(map[string][]*etcdserverpb.TxnRequest)
		for _, txn := range etcdfake.Sent[*etcdserverpb.TxnRequest](f.Etcd) {
			for _, a := range fakeAttempts(txn) {
				sends[string(a.Compare[0].Key)] = append(sends[string(a.Compare[0].Key)], a)
			}
		}
		for i := range 4 {
			same := sends[fakePrefix+fmt.Sprint(i)]
			for _, a := range same[1:] {
				if !proto.Equal(a, same[0]) {
					t.Errorf("sent %v, then %v", same[0], a)
				}
			}
			if len(same) < 2 {
				t.Errorf("sent %d times", len(same))
			}
		}
	})
}

// An attempt finds what it wrote although others have written over it, or deleted it, before it could know; and what it
// did not write it writes then.
func TestPipeline_Overtaken(t *testing.T) {
	update := func(t *testing.T, s *EtcdStore) error { return s.Update(t.Context(), "a", increment) }
	remove := func(_ *testing.T, s *EtcdStore) error { return s.Delete("a") }
	create := func(t *testing.T, s *EtcdStore) error { return committing(t, s, "a", time.Hour, "n", 1)() }
	type act = func(t *testing.T, s *EtcdStore) error
	for name, c := range map[string]struct {
		seeded   bool
		ours     act
		applied  bool
		others   []act
		want     error
		versions int
		n        int // -1: no session
	}{
		"update, applied, updated":                     {true, update, true, []act{update, update}, nil, 4, 3},
		"update, applied, deleted":                     {true, update, true, []act{remove}, nil, 3, -1},
		"update, applied, updated, deleted":            {true, update, true, []act{update, remove}, nil, 4, -1},
		"update, applied, deleted, created":            {true, update, true, []act{remove, create}, nil, 4, 1},
		"update, not applied, updated":                 {true, update, false, []act{update, update}, nil, 4, 3},
		"update, not applied, deleted":                 {true, update, false, []act{remove}, ErrSessionGone, 2, -1},
		"update, not applied, deleted, created":        {true, update, false, []act{remove, create}, nil, 4, 2},
		"delete, applied, created":                     {true, remove, true, []act{create}, nil, 3, 1},
		"delete, not applied, updated":                 {true, remove, false, []act{update}, nil, 3, -1},
		"delete, not applied, deleted":                 {true, remove, false, []act{remove}, nil, 2, -1},
		"create, applied, updated":                     {false, create, true, []act{update, update}, nil, 3, 3},
		"create, applied, deleted":                     {false, create, true, []act{remove}, nil, 2, -1},
		"create, applied, deleted, created":            {false, create, true, []act{remove, create, update}, nil, 4, 2},
		"create, not applied, created, deleted":        {false, create, false, []act{create, remove}, nil, 3, 1},
		"create, not applied, created, so overwritten": {false, create, false, []act{create, update, update}, nil, 4, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				other := newFakeStoreOn(t, f)
				if c.seeded {
					f.seed(t, "a", "n", 0)
				}
				f.Script(isAttempt, func(r *etcdfake.Request) error {
					f.seed(t, "noise")
					if c.applied {
						if err := r.Apply(); err != nil {
							t.Error(err)
						}
					}
					for _, act := range c.others {
						wantErr(t, "another process", act(t, other), nil)
					}
					return etcdfake.ErrLost
				})
				wantErr(t, "ours", c.ours(t, s), c.want)
				if c.n < 0 {
					f.wantSession(t, "a", c.versions)
				} else {
					f.wantSession(t, "a", c.versions, "n", c.n)
				}
			})
		})
	}
}

// Where the history that would tell is compacted, the outcome stays unknown.
func TestPipeline_CompactedHistory(t *testing.T) {
	for _, seeded := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s, f := newFakeStore(t)
			other := newFakeStoreOn(t, f)
			ours := committing(t, s, "a", time.Hour, "n", 1)
			if seeded {
				f.seed(t, "a", "n", 0)
				ours = func() error { return s.Update(t.Context(), "a", increment) }
			}
			f.Script(isAttempt, func(r *etcdfake.Request) error {
				if err := r.Apply(); err != nil {
					t.Error(err)
				}
				wantErr(t, "another process", other.Update(t.Context(), "a", increment), nil)
				wantErr(t, "another process", other.Delete("a"), nil)
				f.Compact(f.Revision())
				return etcdfake.ErrLost
			})
			err := ours()
			wantErr(t, "ours", err, ErrOutcomeUnknown)
			wantErr(t, "ours", err, rpctypes.ErrCompacted)
		})
	}
}

// Where the history that tells is long, it is read in as many requests as it takes.
func TestPipeline_LongHistory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			for range 3 * etcd.MaxBatchKeys {
				wantErr(t, "another process", other.Update(t.Context(), "warm", increment), nil)
			}
			if err := r.Apply(); err != nil {
				t.Error(err)
			}
			wantErr(t, "another process", other.Delete("a"), nil)
			return etcdfake.ErrLost
		})
		wantErr(t, "commit", committing(t, s, "a", time.Hour, "n", 1)(), nil)
		f.wantSession(t, "a", 2)
	})
}

// A call whose context ends while it waits for others has no effect.
func TestPipeline_WithdrawPending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		release := f.Hold(isAttempt)
		first := started(func() error { return s.Update(t.Context(), "a", increment) })
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		second := started(commitOf(t, Begin(ctx), s, "a", "second", 1))
		third := started(func() error { return s.Update(t.Context(), "a", increment) })
		cancel()
		err := second()
		wantErr(t, "the cancelled one", err, context.Canceled)
		if errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%v, of a call that was never sent", err)
		}
		release()
		wantErr(t, "first", first(), nil)
		wantErr(t, "third", third(), nil)
		f.wantSession(t, "a", 3, "n", 2)
	})
}

// A call whose context ends when it is folded but not sent, here for want of a lease, has no effect, and those that were
// folded with it have theirs.
func TestPipeline_WithdrawFolded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		release := stall(t, s, f)
		grant := f.Hold(isGrant)
		ctx, cancel := context.WithCancel(Begin(t.Context()))
		defer cancel()
		before := started(commitOf(t, Begin(t.Context()), s, "a", "before", 1))
		gone := started(commitOf(t, ctx, s, "a", "gone", 1))
		after := started(commitOf(t, Begin(t.Context()), s, "a", "after", 1))
		release()
		synctest.Wait()
		if n := len(etcdfake.Sent[*etcdserverpb.LeaseGrantRequest](f.Etcd)); n != 1 {
			t.Fatalf("%d leases are asked for, want 1", n)
		}
		cancel()
		err := gone()
		wantErr(t, "the cancelled one", err, context.Canceled)
		if errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%v, of a call that was never sent", err)
		}
		grant()
		wantErr(t, "before", before(), nil)
		wantErr(t, "after", after(), nil)
		f.wantSession(t, "a", 1, "before", 1, "after", 1)
	})
}

// A call whose context ends when it was sent is told that its outcome is unknown, and goes on to its end. An Update is
// not tried again after that, since its function must not run any more.
func TestPipeline_WithdrawSent(t *testing.T) {
	for _, overtaken := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s, f := newFakeStore(t)
			other := newFakeStoreOn(t, f)
			f.seed(t, "update")
			f.seed(t, "commit")
			commits := Begin(t.Context())
			ctx, cancel := context.WithCancel(commits)
			defer cancel()
			commit := commitOf(t, ctx, s, "commit", "ours", 1)
			release := f.Hold(isAttempt)
			runs := 0
			results := []func() error{
				started(commit),
				started(func() error {
					return s.Update(ctx, "update", func(values map[string]any) error {
						runs++
						values["ours"] = 1
						return nil
					})
				}),
			}
			cancel()
			for _, result := range results {
				err := result()
				wantErr(t, "the cancelled one", err, ErrOutcomeUnknown)
				wantErr(t, "the cancelled one", err, context.Canceled)
			}
			if overtaken {
				f.LetPass(t, func() error {
					return errors.Join(
						other.Update(t.Context(), "commit", setting("theirs", 1)),
						other.Update(t.Context(), "update", setting("theirs", 1)))
				})
			}
			release()
			if overtaken {
				f.wantSession(t, "commit", 3, "ours", 1, "theirs", 1)
				f.wantSession(t, "update", 2, "theirs", 1)
			} else {
				f.wantSession(t, "commit", 2, "ours", 1)
				f.wantSession(t, "update", 2, "ours", 1)
			}
			if runs != 1 {
				t.Errorf("the function ran %d times, want once", runs)
			}
		})
	}
}

// Update does not return while its function runs, whatever becomes of its context.
func TestPipeline_WithdrawRunning(t *testing.T) { // not in a bubble, which would wait for a mutex
	f := newFakeEtcd()
	s := newStore(f, nil, fakePrefix, nil)
	f.seed(t, "a")
	for range 20 {
		var returned atomic.Bool
		ctx, cancel := context.WithCancel(t.Context())
		err := s.Update(ctx, "a", func(map[string]any) error {
			cancel()
			for range 1000 {
				runtime.Gosched()
			}
			if returned.Load() {
				t.Error("Update has returned while its function runs")
			}
			return nil
		})
		returned.Store(true)
		if err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	mustClose(t, s)
}

// Close waits for what calls that have returned left to be settled.
func TestPipeline_CloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a")
		release := f.Hold(isAttempt)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		left := started(func() error { return s.Update(ctx, "a", setting("a", 1)) })
		cancel()
		wantErr(t, "the cancelled one", left(), ErrOutcomeUnknown)
		var closed atomic.Bool
		closing := started(func() error {
			err := s.Close()
			closed.Store(true)
			return err
		})
		if closed.Load() {
			t.Error("Close has not waited")
		}
		wantErr(t, "a call during Close", s.Update(t.Context(), "a", increment), ErrClosed)
		release()
		wantErr(t, "Close", closing(), nil)
		f.wantSession(t, "a", 2, "a", 1)
	})
}

// A store that is idle has no goroutine, and does nothing as time passes.
func TestPipeline_Idle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 300 {
			wantErr(t, "commit", committing(t, s, fmt.Sprint(i), time.Hour)(), nil)
		}
		f.Script(isAttempt, etcdfake.Lose, etcdfake.Drop)
		wantErr(t, "update", s.Update(t.Context(), "1", increment), nil)
		wantIdle(t, s)
		synctest.Wait()
		stacks := make([]byte, 8<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for _, owner := range []string{"pipeline", "reader", "leasePool", "Limiter"} {
			if bytes.Contains(stacks, []byte("etcdstore.(*"+owner+").")) {
				t.Errorf("a goroutine of the %s is left:\n%s", owner, stacks)
			}
		}
		etcdfake.Sent[any](f.Etcd)
		if n := testing.AllocsPerRun(100, func() { time.Sleep(time.Hour) }); n != 0 {
			t.Errorf("%v allocations an hour", n)
		}
		if n := len(etcdfake.Sent[any](f.Etcd)); n != 0 {
			t.Errorf("%d requests while idle", n)
		}
	})
}

// modelCall is a call of the model test, and what it was told.
type modelCall struct {
	store  *EtcdStore
	token  string
	marker string // the key that a commit or an update adds; "" for a delete
	err    error
	begin  int64 // etcd's revisions when it began and when it returned
	end    int64
}

func (c *modelCall) String() string {
	return fmt.Sprintf("a call of session %s with marker %q, told %v, between revisions %d and %d,", c.token, c.marker, c.err, c.begin, c.end)
}

// modelRun is several processes that change a few sessions, over a network that loses, delays and repeats requests.
type modelRun struct {
	f      *fakeEtcd
	stores []*EtcdStore
	faults int // in a hundred requests

	mu    sync.Mutex
	rng   *rand.Rand
	calls []*modelCall
	lost  []func() error // attempts that the store had no answer to
}

// FuzzPipeline compares what calls were told with what has happened: all that was told to have happened has, once, and
// until it was deleted; nothing else has; and nothing comes back.
func FuzzPipeline(f *testing.F) {
	for seed := range uint64(12) {
		f.Add(seed, byte(4), byte(3*seed))
	}
	f.Fuzz(func(t *testing.T, seed uint64, workers, faults byte) {
		synctest.Test(t, func(t *testing.T) {
			m := &modelRun{f: newFakeEtcd(), faults: int(faults % 60), rng: rand.New(rand.NewPCG(seed, 0))}
			for range 2 {
				m.stores = append(m.stores, newFakeStoreOn(t, m.f))
			}
			m.f.Intercept(m.network)
			var wg sync.WaitGroup
			for w := range int(workers)%8 + 1 {
				wg.Go(func() { m.work(t, fmt.Sprint(w)) })
			}
			wg.Wait()
			m.f.Intercept(nil)
			time.Sleep(time.Minute) // until the last delayed request has arrived
			for _, s := range m.stores {
				mustClose(t, s)
			}
			m.check(t)
			for _, deliver := range m.lost {
				_ = deliver()
			}
			m.check(t)
		})
	})
}

// roll returns a number from 0 to n-1.
func (m *modelRun) roll(n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rng.IntN(n)
}

// delay returns a random time up to n ms.
func (m *modelRun) delay(n int) time.Duration {
	return time.Duration(m.roll(1+1000*n)) * time.Microsecond
}

// network carries a request.
func (m *modelRun) network(r *etcdfake.Request) error {
	_, put := r.Msg.(*etcdserverpb.PutRequest)
	if !put { // of a lease's key, under a mutex: with others waiting for that, time would not pass in the bubble
		time.Sleep(m.delay(3))
	}
	if m.roll(100) >= m.faults {
		return r.Apply()
	}
	if m.roll(50) == 0 {
		m.f.Compact(m.f.Revision())
	}
	fate := m.roll(8)
	if put {
		fate %= 6
	}
	if creates(r.Txn()) { // a send arrives once at most; with all others once more makes no difference
		r.Apply = sync.OnceValue(r.Apply)
	}
	if fate != 0 && isAttempt(r) {
		m.mu.Lock()
		m.lost = append(m.lost, r.Apply)
		m.mu.Unlock()
	}
	switch fate {
	case 0:
		return rpctypes.ErrGRPCNoLeader
	case 1:
		return etcdfake.Drop(r)
	case 2, 3:
		return etcdfake.Lose(r)
	case 4:
		time.AfterFunc(m.delay(3000), func() { _ = r.Apply() })
		return rpctypes.ErrGRPCTimeout
	case 5:
		time.AfterFunc(m.delay(3000), func() { _ = r.Apply() })
		return etcdfake.Lose(r)
	case 6:
		_ = r.Apply()
		time.Sleep(m.delay(100))
		return r.Apply()
	default:
		return r.Wait(nil)
	}
}

// creates reports whether an attempt of the request compares that there is no session.
func creates(txn *etcdserverpb.TxnRequest) bool {
	return slices.ContainsFunc(fakeAttempts(txn), func(a *etcdserverpb.TxnRequest) bool { return a.Compare[0].GetModRevision() == 0 })
}

// work makes calls.
func (m *modelRun) work(t *testing.T, name string) {
	for i := range 30 {
		time.Sleep(m.delay(5))
		s := m.stores[m.roll(len(m.stores))]
		c := &modelCall{store: s, token: fmt.Sprint("t", m.roll(3)), marker: fmt.Sprint(name, "-", i), begin: m.f.Revision()}
		ctx, cancel := t.Context(), context.CancelFunc(func() {})
		if m.roll(4) == 0 {
			ctx, cancel = context.WithTimeout(ctx, m.delay(300))
		}
		switch kind := m.roll(10); {
		case kind < 5:
			c.err = m.commit(t, ctx, s, c)
		case kind < 9:
			c.err = s.Update(ctx, c.token, setting(c.marker, 1))
		default:
			c.marker = ""
			c.err = s.DeleteCtx(ctx, c.token)
		}
		cancel()
		c.end = m.f.Revision()
		m.mu.Lock()
		m.calls = append(m.calls, c)
		m.mu.Unlock()
	}
}

// commit finds a session, adds the call's marker to it, and commits it.
func (m *modelRun) commit(t *testing.T, ctx context.Context, s *EtcdStore, c *modelCall) error {
	ctx = Begin(ctx)
	b, found, err := s.FindCtx(ctx, c.token)
	if err != nil {
		return err
	}
	values := make(map[string]any)
	if found {
		if _, values, err = s.codec.Decode(b); err != nil {
			t.Error(err)
		}
	}
	values[c.marker] = 1
	time.Sleep(m.delay(5))
	life := []time.Duration{10 * time.Minute, time.Hour, 24 * time.Hour}[m.roll(3)]
	return s.CommitCtx(ctx, c.token, gobSession(t, day0, values), time.Now().Add(life))
}

// check compares what the calls were told with the history.
func (m *modelRun) check(t *testing.T) {
	t.Helper()
	added := make(map[string][]int64) // the revisions at which a session came to have a marker that it had not
	for i := range 3 {
		m.checkSession(t, fmt.Sprint("t", i), added)
	}
	var happened, unknown int
	for _, c := range m.calls {
		times := added[c.marker]
		switch {
		case errors.Is(c.err, ErrOutcomeUnknown):
			unknown++
			if len(times) > 1 {
				t.Errorf("%v has happened at %v", c, times)
			}
		case c.err == nil && c.marker != "":
			happened++
			if len(times) == 0 && m.deletedWith(c) {
				continue
			}
			if len(times) != 1 || times[0] <= c.begin || times[0] > c.end {
				t.Errorf("%v has happened at %v", c, times)
			}
		case errors.Is(c.err, ErrSessionGone):
			if len(times) > 0 || !m.absent(c) {
				t.Errorf("%v has happened at %v, deleted: %t", c, times, m.absent(c))
			}
		case c.err == nil, errors.Is(c.err, context.DeadlineExceeded):
			if len(times) > 0 {
				t.Errorf("%v has happened at %v", c, times)
			}
		default:
			t.Error(c)
		}
	}
	t.Logf("%d calls, %d happened, %d unknown, %d revisions", len(m.calls), happened, unknown, m.f.Revision())
}

// checkSession checks the history of a session, and notes when which markers were added.
func (m *modelRun) checkSession(t *testing.T, token string, added map[string][]int64) {
	t.Helper()
	var before map[string]any
	for _, kv := range m.f.Versions(fakePrefix + token) {
		after := fakeValues(t, kv)
		for marker := range after {
			if before[marker] == nil {
				added[marker] = append(added[marker], kv.ModRevision)
			}
		}
		for marker := range before {
			if after[marker] == nil && (kv.Version == 0 && kv.Lease != 0 || !m.deleting(token, kv.ModRevision)) {
				t.Errorf("%s lost %s at %d, by lease %d", token, marker, kv.ModRevision, kv.Lease)
				break
			}
		}
		before = after
	}
	for _, c := range m.calls {
		if c.token == token && c.marker == "" && c.err == nil {
			old, now := m.f.At(fakePrefix+token, c.begin), m.f.At(fakePrefix+token, c.end)
			if old == nil || now == nil {
				continue
			}
			left := fakeValues(t, now)
			for marker := range fakeValues(t, old) {
				if left[marker] != nil {
					t.Errorf("%v, and %s is there at its end", c, marker)
				}
			}
		}
	}
}

// deleting reports whether a call may have deleted the session at a revision.
func (m *modelRun) deleting(token string, revision int64) bool {
	return slices.ContainsFunc(m.calls, func(c *modelCall) bool {
		unknown := errors.Is(c.err, ErrOutcomeUnknown)
		return c.token == token && c.marker == "" && c.begin < revision && (unknown || c.err == nil && c.end >= revision)
	})
}

// absent reports whether there was no session at some moment of a call.
func (m *modelRun) absent(c *modelCall) bool {
	for rev := c.begin; rev <= c.end; rev++ {
		if m.f.At(fakePrefix+c.token, rev) == nil {
			return true
		}
	}
	return m.deletedWith(c)
}

// deletedWith reports whether a call may have been folded with a deletion of the session. Then history shows only what
// came of both.
func (m *modelRun) deletedWith(c *modelCall) bool {
	return slices.ContainsFunc(m.calls, func(o *modelCall) bool {
		return o.store == c.store && o.token == c.token && o.marker == "" && o.begin <= c.end && c.begin <= o.end
	})
}

// A process that has not heard from etcd for a while reads before it writes: a failed compare is then not settled by a history
// that is long, or compacted. No answer was lost, so nothing is unknown.
func TestPipeline_CompactionIsNotUnknown(t *testing.T) {
	for name, c := range map[string]struct {
		act  func(t *testing.T, other *EtcdStore)
		del  bool
		want error
	}{
		"merge": {func(t *testing.T, other *EtcdStore) {
			wantErr(t, "another", other.Update(t.Context(), "a", setting("y", 1)), nil)
			wantErr(t, "another", other.Update(t.Context(), "a", setting("y", 2)), nil)
		}, false, nil},
		"gone":    {func(t *testing.T, other *EtcdStore) { wantErr(t, "another", other.Delete("a"), nil) }, false, ErrSessionGone},
		"deleted": {func(t *testing.T, other *EtcdStore) { wantErr(t, "another", other.Delete("a"), nil) }, true, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				other := newFakeStoreOn(t, f)
				f.seed(t, "a", "n", 0)
				ctx := Begin(t.Context())
				call := commitOf(t, ctx, s, "a", "x", 1)
				if c.del {
					call = func() error { return s.DeleteCtx(ctx, "a") }
				}
				time.Sleep(10 * time.Minute)
				c.act(t, other)
				f.seed(t, "noise")
				f.Compact(f.Revision())
				wantErr(t, "ours", call(), c.want)
			})
		})
	}
}

// The client sent a delete twice behind our back, and another session was created in between: that stays.
func TestPipeline_HiddenDelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a", "n", 0)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			wantErr(t, "another", committing(t, other, "a", time.Hour, "theirs", 1)(), nil)
			return r.Apply()
		})
		wantErr(t, "ours", s.Delete("a"), nil)
		f.wantSession(t, "a", 3, "theirs", 1)
	})
}

// A delete that the client has sent twice behind our back has happened, and its caller is told so, though etcd does not answer
// any more.
func TestPipeline_HiddenDeleteIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		var gone atomic.Bool
		f.Intercept(func(r *etcdfake.Request) error {
			if gone.Load() {
				<-r.Done
				return etcdfake.ErrLost
			}
			if !isAttempt(r) {
				return r.Apply()
			}
			gone.Store(true)
			_ = r.Apply()
			return r.Apply()
		})
		wantErr(t, "delete", s.Delete("a"), nil)
		f.wantSession(t, "a", 2)
	})
}

// A create whose outcome could not be settled in time is fenced when etcd is there again, and does not come late.
func TestPipeline_CreateIsFencedAfterGivingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		var late atomic.Pointer[etcdfake.Request]
		var up atomic.Bool
		f.Intercept(func(r *etcdfake.Request) error {
			_, put := r.Msg.(*etcdserverpb.PutRequest)
			if up.Load() || !put && !isAttempt(r) {
				return r.Apply()
			}
			if !put {
				late.CompareAndSwap(nil, r) // it waits in a member that is cut off
			}
			<-r.Done
			return etcdfake.ErrLost
		})
		ctx, cancel := context.WithTimeout(Begin(t.Context()), 300*time.Millisecond)
		defer cancel()
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"user": "alice"})
		wantErr(t, "create", s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)), ErrOutcomeUnknown)
		time.Sleep(time.Second)
		up.Store(true)
		wantErr(t, "create again", s.CommitCtx(Begin(t.Context()), "a", b, time.Now().Add(time.Hour)), nil)
		time.Sleep(time.Second)
		wantErr(t, "delete", s.Delete("a"), nil)
		_ = late.Load().Apply()
		if _, back, err := s.Find("a"); back || err != nil {
			t.Errorf("the deleted session is back: %v, %v", back, err)
		}
	})
}

// Three creates share a lease, and none of them is answered. The first gives up at once, and its fence is moved in the background;
// the second moves it meanwhile, and so the third compares a later one. That is moved as well once the third has given up: it
// does not come late, after the delete of its session. The tries are spaced at random, hence several runs.
func TestPipeline_LateCreateOfALaterFence(t *testing.T) {
	sent := 0
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			s, f := newFakeStore(t)
			wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
			var down, gap atomic.Bool // in the gap, one fence is moved
			moved := make(chan struct{})
			var third atomic.Pointer[etcdfake.Request]
			f.Intercept(func(r *etcdfake.Request) error {
				_, put := r.Msg.(*etcdserverpb.PutRequest)
				switch {
				case !down.Load() || !put && !isAttempt(r):
					return r.Apply()
				case put && gap.CompareAndSwap(true, false):
					defer close(moved)
					return r.Apply()
				case ofSession("b")(r) && !ofSession("a")(r):
					return etcdfake.Lose(r)
				case ofSession("c")(r):
					third.Store(r)
				}
				return etcdfake.ErrLost
			})
			create := func(token string, life time.Duration) func() error {
				ctx, cancel := context.WithTimeout(Begin(t.Context()), life)
				t.Cleanup(cancel)
				b := gobSession(t, day0, map[string]any{"user": "alice"})
				return started(func() error { return s.CommitCtx(ctx, token, b, time.Now().Add(time.Hour)) })
			}
			down.Store(true)
			release := f.Hold(isAttempt) // so that the first two compare the same fence
			a, b := create("a", 600*time.Millisecond), create("b", 4*time.Second)
			release()
			wantErr(t, "the first create", a(), ErrOutcomeUnknown)
			time.Sleep(900 * time.Millisecond)
			gap.Store(true)
			<-moved
			synctest.Wait()
			err := create("c", 15*time.Millisecond)()
			down.Store(false)
			wantErr(t, "the second create", b(), nil)
			time.Sleep(30 * time.Second)
			if third.Load() == nil {
				return // it found no seat in its time
			}
			sent++
			wantErr(t, "the third create", err, ErrOutcomeUnknown)
			wantErr(t, "delete", s.Delete("c"), nil)
			_ = third.Load().Apply()
			if _, back, err := s.Find("c"); back || err != nil {
				t.Errorf("the deleted session is back: %v, %v", back, err)
			}
		})
	}
	if sent == 0 {
		t.Error("the third create was never sent")
	}
}

// A call has its own time, also where it is folded with one that came later.
func TestPipeline_TimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) {
				<-r.Done
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		timed := func() func() (time.Duration, error) {
			start := time.Now()
			var took time.Duration
			result := started(func() error {
				err := s.Update(t.Context(), "a", increment)
				took = time.Since(start)
				return err
			})
			return func() (time.Duration, error) {
				err := result()
				return took, err
			}
		}
		calls := []func() (time.Duration, error){timed()}
		for _, pause := range []time.Duration{600 * time.Millisecond, 4300 * time.Millisecond} {
			time.Sleep(pause)
			calls = append(calls, timed())
		}
		for i, call := range calls {
			if took, err := call(); !etcd.Unavailable(err) || took < s.timeout || took > s.timeout+2*etcd.AttemptTimeout {
				t.Errorf("call %d: %v after %v", i, err, took)
			}
		}
	})
}

// A transition that has failed wrote nothing, whatever became of the attempt that it was folded into.
func TestPipeline_FailedIsNotUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		own := errors.New("own")
		release := f.Hold(isAttempt)
		first := started(func() error { return s.Update(t.Context(), "a", increment) })
		good := started(func() error { return s.Update(t.Context(), "a", increment) })
		bad := started(func() error { return s.Update(t.Context(), "a", func(map[string]any) error { return own }) })
		var n atomic.Int32
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) && n.Add(1) > 1 {
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		release()
		wantErr(t, "first", first(), nil)
		wantErr(t, "good", good(), ErrOutcomeUnknown)
		if err := bad(); err == nil || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("bad: %v", err)
		}
	})
}

// Updates have no Else in a batch. One that another process has overtaken is read afterwards, and merged; its neighbours
// are not concerned.
func TestPipeline_OvertakenInABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		tokens := []string{"a", "b", "c"}
		var commits []func() error
		for _, token := range tokens {
			f.seed(t, token, "n", 0)
			commits = append(commits, commitOf(t, Begin(t.Context()), s, token, "ours", 1))
		}
		wantErr(t, "another process", other.Update(t.Context(), "b", setting("theirs", 1)), nil)
		stalled := stall(t, s, f)
		var results []func() error
		for _, commit := range commits {
			results = append(results, started(commit))
		}
		stalled()
		for i, result := range results {
			wantErr(t, tokens[i], result(), nil)
		}
		var batches, reads [][]string
		for _, msg := range etcdfake.Sent[any](f.Etcd) {
			if gets := fakeReads(msg); len(gets) > 0 {
				reads = append(reads, gets)
			}
			txn, _ := msg.(*etcdserverpb.TxnRequest)
			if len(fakeAttempts(txn)) > 0 {
				batches = append(batches, fakeTokens(txn))
			}
			for _, a := range fakeAttempts(txn) {
				if batched := len(txn.Compare) == 0; batched != (len(a.Failure) == 0) {
					t.Errorf("%s in a batch: %t, with %d operations in its Else", fakeTokens(txn), batched, len(a.Failure))
				}
			}
		}
		if want := [][]string{{"a", "b", "c"}, {"b"}}; !reflect.DeepEqual(batches[len(batches)-2:], want) {
			t.Errorf("batches %v, want them to end with %v", batches, want)
		}
		if want := [][]string{{"b"}}; !reflect.DeepEqual(reads, want) {
			t.Errorf("reads %v, want %v", reads, want)
		}
		f.wantSession(t, "a", 2, "n", 0, "ours", 1)
		f.wantSession(t, "b", 3, "n", 0, "ours", 1, "theirs", 1)
		f.wantSession(t, "c", 2, "n", 0, "ours", 1)
	})
}

type panicEncode struct{ scs.GobCodec }

func (panicEncode) Encode(time.Time, map[string]any) ([]byte, error) { panic("encode") }

// A codec that panics fails the commit that needs it, and nothing else.
func TestPipeline_PanickingCodec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t, WithCodec(panicEncode{}))
		f.seed(t, "a", "n", 0)
		commit := commitOf(t, Begin(t.Context()), s, "a", "x", 1)
		wantErr(t, "another", newFakeStoreOn(t, f).Update(t.Context(), "a", setting("y", 1)), nil)
		if err := commit(); err == nil || !strings.Contains(err.Error(), "codec") {
			t.Errorf("a commit that must be merged: %v", err)
		}
		f.wantSession(t, "a", 2, "n", 0, "y", 1)
	})
}

// A function for Update that takes its time holds up no other session of its batch, and its own no longer than that.
func TestPipeline_SlowFunction(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "slow", "n", 0)
		f.seed(t, "quick", "n", 0)
		release := stall(t, s, f)
		start := time.Now()
		update := func(token string, fn func(map[string]any) error) func(most time.Duration) {
			var took time.Duration
			result := started(func() error {
				err := s.Update(t.Context(), token, fn)
				took = time.Since(start)
				return err
			})
			return func(most time.Duration) {
				t.Helper()
				if err := result(); err != nil || took > most {
					t.Errorf("an update of %s took %v: %v", token, took, err)
				}
			}
		}
		slow := update("slow", func(values map[string]any) error {
			time.Sleep(4 * time.Second)
			return increment(values)
		})
		behind := update("slow", increment)
		quick := update("quick", increment)
		release()
		quick(100 * time.Millisecond)
		slow(4100 * time.Millisecond)
		behind(4100 * time.Millisecond)
		f.wantSession(t, "quick", 2, "n", 1)
		f.wantSession(t, "slow", 2, "n", 2)
	})
}

// faultyCodec calls a function for sessions that have the key 'bad'.
type faultyCodec struct {
	scs.GobCodec
	at func(where string)
}

func (c faultyCodec) Decode(b []byte) (time.Time, map[string]any, error) {
	deadline, values, err := c.GobCodec.Decode(b)
	if values["bad"] != nil {
		c.at("decode")
	}
	return deadline, values, err
}

func (c faultyCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	if values["bad"] != nil {
		c.at("encode")
	}
	return c.GobCodec.Encode(deadline, values)
}

// The application's code panics, or ends its goroutine, for one session of a batch. That call fails by itself, and nothing was
// written; its neighbours do not notice, nor does the session's next call.
func TestPipeline_FaultyApplication(t *testing.T) {
	for _, c := range []struct {
		name, where string
		clash       bool // another process has changed the same key
		told        bool // a panic is the caller's
	}{
		{"function", "function", false, true},
		{"resolver", "resolver", true, true},
		{"decoding", "decode", false, false},
		{"encoding", "encode", false, false},
		{"encoding of what a resolver made", "encode", true, false},
	} {
		for how, fault := range map[string]func(){"panics": func() { panic("own") }, "ends its goroutine": runtime.Goexit} {
			t.Run(c.name+" "+how, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var armed atomic.Bool
					at := func(where string) {
						if where == c.where && armed.Load() {
							fault()
						}
					}
					resolver := func(c Conflict) (any, error) { at("resolver"); return c.Ours, nil }
					s, f := newFakeStore(t, WithCodec(faultyCodec{at: at}), WithResolver(resolver))
					f.seed(t, "bad", "bad", 1, "n", 0)
					for i := range 4 {
						f.seed(t, fmt.Sprint(i))
					}
					call := commitOf(t, Begin(t.Context()), s, "bad", "n", 1)
					if c.where == "function" {
						call = func() error {
							return s.Update(t.Context(), "bad", func(map[string]any) error { at("function"); return nil })
						}
					}
					change := setting("theirs", 1)
					if c.clash {
						change = setting("n", 2)
					}
					wantErr(t, "another process", newFakeStoreOn(t, f).Update(t.Context(), "bad", change), nil)

					release := stall(t, s, f)
					armed.Store(true)
					bad := started(call)
					var good []func() error
					for i := range 4 {
						good = append(good, started(func() error { return s.Update(t.Context(), fmt.Sprint(i), setting("a", 1)) }))
					}
					release()
					for i, result := range good {
						wantErr(t, fmt.Sprint("neighbour ", i), result(), nil)
					}
					err := bad()
					var p fakePanic
					switch {
					case c.told && how == "panics":
						wantErr(t, "the bad one", err, fakePanic{"own"})
					case err == nil, errors.As(err, &p), errors.Is(err, ErrOutcomeUnknown):
						t.Errorf("the bad one: %v", err)
					}
					if n := len(f.sessions(t, "bad")); n != 2 {
						t.Errorf("its session has had %d versions, want 2", n)
					}
					armed.Store(false)
					wantErr(t, "the next call", s.Update(t.Context(), "bad", setting("next", 1)), nil)
				})
			})
		}
	}
}

// A create that crossed the quota is applied, answered with ErrNoSpace, and deleted by another process: it is not made again.
func TestPipeline_NoSpaceAppliedAndDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			wantErr(t, "another", other.Delete("a"), nil)
			return rpctypes.ErrGRPCNoSpace
		})
		wantErr(t, "ours", committing(t, s, "a", time.Hour, "n", 1)(), nil)
		f.wantSession(t, "a", 2)
	})
}

// The same in a batch.
func TestPipeline_NoSpaceBatchAppliedAndDeleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		release := stall(t, s, f)
		calls := []func() error{started(committing(t, s, "a", time.Hour, "n", 1)), started(committing(t, s, "b", time.Hour, "n", 1))}
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			wantErr(t, "another", other.Delete("a"), nil)
			return rpctypes.ErrGRPCNoSpace
		})
		release()
		for i, call := range calls {
			wantErr(t, fmt.Sprint("call ", i), call(), nil)
		}
		f.wantSession(t, "a", 2)
		f.wantSession(t, "b", 1, "n", 1)
	})
}

// A batch that crossed the quota has happened: no call of it is told that it has not, also not when its time is up.
func TestPipeline_NoSpaceBatchTimeIsUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t, WithTimeout(300*time.Millisecond))
		f.seed(t, "a", "n", 0)
		f.seed(t, "b", "n", 0)
		release := stall(t, s, f)
		calls := []func() error{started(func() error { return s.Update(t.Context(), "a", increment) }), started(func() error { return s.Update(t.Context(), "b", increment) })}
		f.Script(isAttempt, func(r *etcdfake.Request) error {
			_ = r.Apply()
			time.Sleep(301 * time.Millisecond)
			return rpctypes.ErrGRPCNoSpace
		})
		release()
		for i, call := range calls {
			if err := call(); err != nil && !errors.Is(err, ErrOutcomeUnknown) {
				t.Errorf("call %d, which has happened: %v", i, err)
			}
		}
		f.wantSession(t, "a", 2, "n", 1)
	})
}

// An attempt that gives up without having been applied leaves its seat on the lease.
func TestPipeline_GivenUpLeavesItsSeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) {
				return rpctypes.ErrGRPCNoLeader
			}
			return r.Apply()
		})
		for i := range 10 {
			err := committing(t, s, fmt.Sprint(i), time.Hour)()
			if err == nil || errors.Is(err, ErrOutcomeUnknown) {
				t.Error(err)
			}
		}
		if _, n := s.leases.Count(); n != 1 {
			t.Errorf("%d seats are taken, of 1 session", n)
		}
	})
}

// A session that cannot be read is deleted, and another made under its token, in calls that wait together.
func TestPipeline_DeletedUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		if _, err := f.Put(t.Context(), fakePrefix+"a", "rubbish"+record.Magic); err != nil {
			t.Fatal(err)
		}
		release := stall(t, s, f)
		del := started(func() error { return s.Delete("a") })
		create := started(committing(t, s, "a", time.Hour, "n", 1))
		release()
		wantErr(t, "delete", del(), nil)
		wantErr(t, "create", create(), nil)
	})
}

// A delete comes after a create of the same process whose caller has left, though etcd does not have the session yet.
func TestPipeline_DeleteAfterOwnCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		release := f.Hold(isAttempt)
		ctx, cancel := context.WithCancel(Begin(t.Context()))
		defer cancel()
		b := gobSession(t, time.Now().Add(time.Hour), map[string]any{"user": "alice"})
		create := started(func() error { return s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)) })
		cancel()
		wantErr(t, "create", create(), ErrOutcomeUnknown)
		del := started(func() error { return s.Delete("a") })
		release()
		wantErr(t, "delete", del(), nil)
		time.Sleep(10 * time.Second)
		if _, ok, _ := s.Find("a"); ok {
			t.Error("it is there after the delete")
		}
	})
}

// The same where the create is settled between the delete's read, which does not see it, and what comes after: a delete that
// looked after the read at what is on its way would find nothing to do.
func TestPipeline_DeleteBesideOwnCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		wantErr(t, "a lease", committing(t, s, "warm", time.Hour)(), nil)
		release := f.Hold(isAttempt)
		ctx, cancel := context.WithCancel(Begin(t.Context()))
		defer cancel()
		b := gobSession(t, day0, map[string]any{"user": "alice"})
		create := started(func() error { return s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)) })
		cancel()
		wantErr(t, "create", create(), ErrOutcomeUnknown)
		answer := make(chan struct{})
		f.Script(isRead, func(r *etcdfake.Request) error {
			err := r.Apply()
			<-answer
			return err
		})
		del := started(func() error { return s.Delete("a") })
		release()
		f.wantSession(t, "a", 1, "user", "alice")
		close(answer)
		wantErr(t, "delete", del(), nil)
		f.wantSession(t, "a", 2)
	})
}

// A panic over a guess that nothing confirmed is not told.
func TestPipeline_PanicOverAGuess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		release := f.Hold(isAttempt)
		first := started(func() error { return s.Update(t.Context(), "a", increment) })
		panicking := started(func() error {
			return s.Update(t.Context(), "a", func(map[string]any) error { panic("over a guess") })
		})
		time.Sleep(2 * time.Second)
		later := started(func() error { return s.Update(t.Context(), "a", increment) })
		var n atomic.Int32
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) && n.Add(1) > 1 {
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		release()
		wantErr(t, "first", first(), nil)
		var p fakePanic
		if err := panicking(); err == nil || errors.As(err, &p) {
			t.Errorf("panicking: %v", err)
		}
		wantErr(t, "later", later(), ErrOutcomeUnknown)
	})
}

// A delete does not heed the end of its context, but that of its time, also behind another call.
func TestPipeline_DeleteEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "n", 0)
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) {
				<-r.Done
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		ahead := started(func() error { return s.Update(t.Context(), "a", increment) })
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		start := time.Now()
		wantErr(t, "delete", s.DeleteCtx(ctx, "a"), context.DeadlineExceeded)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("a delete with 500 ms took %v", took)
		}
		wantErr(t, "the update ahead", ahead(), ErrOutcomeUnknown)
	})
}

// A logout between RenewToken's look at the session and its delete stays one: the renewal is not made.
func TestPipeline_LogoutBesideRenewal(t *testing.T) {
	sm := newManager(nil) // outside of the bubble, since it starts a goroutine
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		other := newFakeStoreOn(t, f)
		f.seed(t, "a", "user", "bob")
		sm.Store, sm.Codec = s, s.Codec()
		ctx, err := sm.Load(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		var once atomic.Bool
		f.Intercept(func(r *etcdfake.Request) error {
			if isAttempt(r) && once.CompareAndSwap(false, true) {
				wantErr(t, "logout", other.Delete("a"), nil)
			}
			return r.Apply()
		})
		wantErr(t, "renewal", sm.RenewToken(ctx), nil)
		if token, _, err := sm.Commit(ctx); !errors.Is(err, ErrSessionGone) {
			t.Errorf("the commit of the renewed session: %q, %v", token, err)
		}
	})
}
