package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/limit"
)

// fakeReads returns the tokens that a request reads, nil if it is no request of a reader.
func fakeReads(msg any) (tokens []string) {
	if get, ok := msg.(*etcdserverpb.RangeRequest); ok && len(get.RangeEnd) == 0 {
		return []string{string(get.Key[len(fakePrefix):])}
	}
	r, _ := msg.(*etcdserverpb.TxnRequest)
	for _, op := range r.GetSuccess() {
		get := op.GetRequestRange()
		if get == nil || len(r.Compare) > 0 {
			return nil
		}
		tokens = append(tokens, string(get.Key[len(fakePrefix):]))
	}
	return tokens
}

// isRead reports whether a request is a reader's.
func isRead(r *etcdfake.Request) bool { return len(fakeReads(r.Msg)) > 0 }

// reads returns the tokens of each read since the last call.
func (f *fakeEtcd) reads() (reads [][]string) {
	for _, msg := range etcdfake.Sent[any](f.Etcd) {
		if tokens := fakeReads(msg); tokens != nil {
			reads = append(reads, tokens)
		}
	}
	return reads
}

// finding starts a Find, and returns what waits for the session's value of "a".
func finding(t *testing.T, ctx context.Context, s *EtcdStore, token string) func() (any, error) {
	t.Helper()
	var b []byte
	result := started(func() (err error) {
		b, _, err = s.FindCtx(ctx, token)
		return err
	})
	return func() (any, error) {
		if err := result(); err != nil || b == nil {
			return nil, err
		}
		_, values, err := s.codec.Decode(b)
		return values["a"], err
	}
}

// wantFind checks what a Find has found.
func wantFind(t *testing.T, what string, result func() (any, error), want any, wantErr error) {
	t.Helper()
	if got, err := result(); got != want || !errors.Is(err, wantErr) {
		t.Errorf("%s: %v, %v, want %v, %v", what, got, err, want, wantErr)
	}
}

// stallReads fills the lane of reads with two batches that are held.
func stallReads(t *testing.T, s *EtcdStore, f *fakeEtcd) (release func()) {
	t.Helper()
	f.reads()
	release = f.Hold(isRead)
	for range limit.Initial {
		finding(t, t.Context(), s, "stalled")
	}
	if n := len(f.reads()); n != limit.Initial {
		t.Fatalf("%d reads are in flight, want %d", n, limit.Initial)
	}
	return release
}

// Keys that wait go in one flat Txn, and callers of one key share an answer.
func TestReader_Coalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 50 {
			f.seed(t, fmt.Sprint(i), "a", i)
		}
		release := stallReads(t, s, f)
		var results []func() (any, error)
		for i := range 100 {
			results = append(results, finding(t, t.Context(), s, fmt.Sprint(i%50)))
		}
		missing := finding(t, t.Context(), s, "missing")
		if n := len(f.reads()); n != 0 {
			t.Errorf("%d reads while two are in flight", n)
		}
		release()
		for i, result := range results {
			wantFind(t, fmt.Sprint("find ", i), result, i%50, nil)
		}
		wantFind(t, "the missing one", missing, nil, nil)
		if reads := f.reads(); len(reads) != 1 || len(reads[0]) != 51 {
			t.Errorf("reads of %v, want one of 51 keys", reads)
		}
	})
}

// A caller that comes while a Get of its key is in flight gets a later one: what it returns is true at some moment of
// its call.
func TestReader_LaterCallersReadLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "a", 1)
		answer := make(chan struct{})
		f.Script(isRead, func(r *etcdfake.Request) error {
			err := r.Apply()
			<-answer
			return err
		})
		first := finding(t, t.Context(), s, "a")
		other := newFakeStoreOn(t, f)
		wantErr(t, "update", other.Update(t.Context(), "a", setting("a", 2)), nil)
		second := finding(t, t.Context(), s, "a")
		wantFind(t, "second", second, 2, nil)
		close(answer)
		wantFind(t, "first", first, 1, nil)
	})
}

// Many keys go in reads of at most 120.
func TestReader_FullBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		release := stallReads(t, s, f)
		var results []func() (any, error)
		find := func(from, to, want int) {
			t.Helper()
			for i := from; i < to; i++ {
				results = append(results, finding(t, t.Context(), s, fmt.Sprint(i)))
			}
			sum := 0
			for _, tokens := range f.reads() {
				sum += len(tokens)
			}
			if sum != want {
				t.Errorf("reads of %d keys once %d wait, want %d", sum, to, want)
			}
		}
		find(0, etcd.MaxBatchKeys-1, 0)
		find(etcd.MaxBatchKeys-1, etcd.MaxBatchKeys, etcd.MaxBatchKeys)
		find(etcd.MaxBatchKeys, 2*etcd.MaxBatchKeys-1, 0)
		release()
		for i, result := range results {
			wantFind(t, fmt.Sprint("find ", i), result, nil, nil)
		}
		if reads := f.reads(); len(reads) != 1 || len(reads[0]) != etcd.MaxBatchKeys-1 {
			t.Errorf("at the end reads of %v", reads)
		}
	})
}

// A server may take fewer operations in a Txn than ours.
func TestReader_FewerOperations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.LimitTo(16, 1536<<10)
		for range 5 {
			release := stallReads(t, s, f)
			var results []func() (any, error)
			for i := range s.etcd.BatchKeys() {
				results = append(results, finding(t, t.Context(), s, fmt.Sprint(i)))
			}
			release()
			for i, result := range results {
				wantFind(t, fmt.Sprint("find ", i), result, nil, nil)
			}
		}
		if n := s.etcd.BatchKeys(); n != 15 {
			t.Errorf("%d keys a read, want 15", n)
		}
	})
}

// A read that did not reach etcd, or whose answer was lost, is made again.
func TestReader_Retries(t *testing.T) {
	for name, fate := range map[string]func(*etcdfake.Request) error{
		"dropped":     etcdfake.Drop,
		"answer lost": etcdfake.Lose,
		"no leader":   etcdfake.Answer(rpctypes.ErrGRPCNoLeader),
		"timed out":   etcdfake.Answer(rpctypes.ErrGRPCTimeout),
		"silence":     func(r *etcdfake.Request) error { return r.Wait(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				f.seed(t, "a", "a", 1)
				f.Script(isRead, fate, fate, fate)
				wantFind(t, "find", finding(t, t.Context(), s, "a"), 1, nil)
				if n := len(f.reads()); n != 4 {
					t.Errorf("%d reads, want 4", n)
				}
			})
		})
	}
}

// A key that may not be read fails alone.
func TestReader_DeniedKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		for i := range 10 {
			f.seed(t, fmt.Sprint(i), "a", i)
		}
		f.Deny(fakePrefix + "3")
		release := stallReads(t, s, f)
		var results []func() (any, error)
		for i := range 10 {
			results = append(results, finding(t, t.Context(), s, fmt.Sprint(i)))
		}
		release()
		for i, result := range results {
			if i == 3 {
				wantFind(t, "the denied one", result, nil, rpctypes.ErrPermissionDenied)
			} else {
				wantFind(t, fmt.Sprint("find ", i), result, i, nil)
			}
		}
	})
}

// Callers that share a read have their own contexts, and are told what etcd said last.
func TestReader_ContextsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t)
		f.seed(t, "a", "a", 1)
		release := stallReads(t, s, f)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		cancelled, cancelNow := context.WithCancel(t.Context())
		one, two, three := finding(t, short, s, "a"), finding(t, cancelled, s, "a"), finding(t, t.Context(), s, "a")
		cancelNow()
		wantFind(t, "the cancelled one", two, nil, context.Canceled)
		f.Script(func(r *etcdfake.Request) bool { return slices.Contains(fakeReads(r.Msg), "a") },
			slices.Repeat([]func(*etcdfake.Request) error{etcdfake.Answer(rpctypes.ErrGRPCNoLeader)}, 12)...) // for more than a second
		release()
		_, err := one()
		wantErr(t, "the short one", err, context.DeadlineExceeded)
		wantErr(t, "the short one", err, rpctypes.ErrNoLeader)
		wantFind(t, "the patient one", three, 1, nil)
	})
}

// Finds that share a request, or an answer, end with their own time each: one that came first does not wait as long as those that
// joined it, and they do not end with it.
func TestReader_OwnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, f := newFakeStore(t, WithTimeout(100*time.Millisecond))
		f.seed(t, "a", "a", 1)
		f.Intercept(func(r *etcdfake.Request) error {
			if isRead(r) {
				<-r.Done
				return etcdfake.ErrLost
			}
			return r.Apply()
		})
		for i := range limit.Initial {
			finding(t, t.Context(), s, fmt.Sprint("stalled ", i))
		}
		find := func(token string) func() {
			start := time.Now()
			var took time.Duration
			result := started(func() error {
				_, _, err := s.Find(token)
				took = time.Since(start)
				return err
			})
			return func() {
				t.Helper()
				wantErr(t, token, result(), context.DeadlineExceeded)
				if took < s.timeout || took > s.timeout+time.Millisecond {
					t.Errorf("a find of %s took %v, and has %v", token, took, s.timeout)
				}
			}
		}
		var finds []func()
		for _, token := range []string{"a", "a", "b"} {
			finds = append(finds, find(token))
			time.Sleep(45 * time.Millisecond)
		}
		for _, find := range finds {
			find()
		}
	})
}
