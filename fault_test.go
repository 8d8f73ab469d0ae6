package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/anishathalye/porcupine"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/read"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

var soak = flag.Duration("soak", 0, "how long the fault run lasts (default 30s, 10s with the race detector)")

// unavailableEOF is what a client sees when its member goes down in the middle of a call.
var unavailableEOF = status.Error(codes.Unavailable, "error reading from server: EOF")

// faultyStore returns a store on a cluster of one, through a client whose calls can be made to fail, and a client without
// faults. A session and its lease are there already.
func faultyStore(t *testing.T, opts ...Option) (*EtcdStore, *etcdtest.Faults, *clientv3.Client) {
	t.Helper()
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)), opts...)
	t.Cleanup(func() {
		faults.Intercept(nil)
		mustClose(t, s)
	})
	mustCommit(t, s, "a", "before", time.Hour)
	return s, faults, c.Client(t)
}

// failOnce has the n-th of the next Txns that write end in a fate.
func failOnce(f *etcdtest.Faults, n int, fate etcdtest.Fate) {
	var mu sync.Mutex
	f.Intercept(func(_ string, req any) etcdtest.Fate {
		txn, ok := req.(*etcdserverpb.TxnRequest)
		if !ok || len(txn.Compare) == 0 {
			return etcdtest.Fate{}
		}
		mu.Lock()
		defer mu.Unlock()
		if n--; n == 0 {
			return fate
		}
		return etcdtest.Fate{}
	})
}

// faultError is an error of a write.
type faultError struct {
	err   error  // as the server, or the client below the store, gives it
	want  error  // what the call is told whose first send gets it, and is not made; nil: that it happened after all
	never string // why it is never given to what is applied, "" where it may be
}

// What never comes from a request that is applied, and why. Its row of classes rests on that.
const (
	checkedFirst   = "api/v3rpc/key.go checks the request before it is proposed"
	checkedInTxn   = "txn/txn.go checks the whole Txn before its first effect"
	checkedInAuth  = "apply/auth.go checks permissions before the request is applied"
	refusedToStart = "v3_server.go refuses the request before it is proposed"
)

// faultErrors returns the errors that a write can get: all that classes lists, others of etcd's, and every code of gRPC
// with words that nobody knows.
func faultErrors() []faultError {
	all := []faultError{
		{rpctypes.ErrGRPCTooManyOps, rpctypes.ErrTooManyOps, checkedFirst},
		{rpctypes.ErrGRPCDuplicateKey, rpctypes.ErrDuplicateKey, checkedFirst},
		{rpctypes.ErrGRPCEmptyKey, rpctypes.ErrEmptyKey, checkedFirst},
		{rpctypes.ErrGRPCKeyNotFound, rpctypes.ErrKeyNotFound, checkedInTxn},
		{rpctypes.ErrGRPCLeaseNotFound, rpctypes.ErrLeaseNotFound, checkedInTxn},
		{rpctypes.ErrGRPCCompacted, rpctypes.ErrCompacted, checkedInTxn},
		{rpctypes.ErrGRPCPermissionDenied, rpctypes.ErrPermissionDenied, checkedInAuth},
		{rpctypes.ErrGRPCPermissionNotGranted, rpctypes.ErrPermissionNotGranted, checkedInAuth},
		{rpctypes.ErrGRPCUserEmpty, rpctypes.ErrUserEmpty, checkedInAuth},
		{rpctypes.ErrGRPCAuthOldRevision, nil, checkedInAuth},
		{rpctypes.ErrGRPCAuthFailed, rpctypes.ErrAuthFailed, refusedToStart},
		{rpctypes.ErrGRPCInvalidAuthToken, rpctypes.ErrInvalidAuthToken, refusedToStart},
		{rpctypes.ErrGRPCRequestTooLarge, ErrTooLarge, refusedToStart},
		{rpctypes.ErrGRPCRequestTooManyRequests, nil, refusedToStart},
		{rpctypes.ErrGRPCNoLeader, nil, "api/v3rpc/interceptor.go refuses the request before it is served"},
		{status.Error(codes.ResourceExhausted, "trying to send message larger than max (3145738 vs. 2097152)"), ErrTooLarge, "the client does not send it"},
		{rpctypes.ErrGRPCNoSpace, rpctypes.ErrNoSpace, ""},
		{rpctypes.ErrGRPCTimeout, nil, ""},
		{rpctypes.ErrGRPCTimeoutDueToLeaderFail, nil, ""},
		{rpctypes.ErrGRPCTimeoutDueToConnectionLost, nil, ""},
		{rpctypes.ErrGRPCTimeoutWaitAppliedIndex, nil, ""},
		{rpctypes.ErrGRPCLeaderChanged, nil, ""},
		{rpctypes.ErrGRPCNotLeader, nil, ""},
		{rpctypes.ErrGRPCStopped, nil, ""},
		{rpctypes.ErrGRPCUnhealthy, nil, ""},
		{rpctypes.ErrGRPCCorrupt, nil, ""},
		{rpctypes.ErrGRPCNotCapable, nil, ""},
		{rpctypes.ErrGRPCNotSupportedForLearner, nil, ""},
		{rpctypes.ErrGRPCCanceled, nil, ""}, // the client resends these two behind our back
		{rpctypes.ErrGRPCDeadlineExceeded, nil, ""},
		{rpctypes.ErrGRPCFutureRev, nil, ""},
		{rpctypes.ErrGRPCLeaseProvided, nil, ""},
		{rpctypes.ErrGRPCValueProvided, nil, ""},
		{rpctypes.ErrGRPCInvalidAuthMgmt, nil, ""},
		{status.Error(codes.Unknown, "raft proposal dropped"), nil, ""},
		{status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)"), nil, ""},
		{unavailableEOF, nil, ""},
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		all = append(all, faultError{status.Error(code, "unheard of"), nil, ""})
	}
	return all
}

// Each error that a write can get, once or always, with the request made and not made: what the call is told is what
// etcd's history shows. Nil says that the write happened, once; ErrOutcomeUnknown leaves it open, and comes only where the
// error does not end; every other error says that it did not happen.
func TestFault_EveryError(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	// With a token that the user has set, the client does not itself get a new one and send again.
	token := func(cfg *clientv3.Config) { cfg.Token = "token" }
	faulty, cli := c.Client(t, etcdtest.WithFaults(faults), token), c.Client(t)
	for _, err := range etcd.Classified() {
		if !slices.ContainsFunc(faultErrors(), func(e faultError) bool { return errors.Is(rpctypes.Error(e.err), err) }) {
			t.Errorf("no case for %v", err)
		}
	}
	var cases []*faultCase
	for i, e := range faultErrors() {
		for _, made := range []bool{false, true} {
			for _, always := range []bool{false, true} {
				for kind := callCommit; kind <= callDelete; kind++ {
					if !made || e.never == "" {
						cases = append(cases, &faultCase{faultError: e, kind: kind, made: made, always: always, token: fmt.Sprintf("%d %v %v %d", i, made, always, kind)})
					}
				}
			}
		}
	}
	byKey := make(map[string]*faultCase)
	seeds := New(cli)
	defer mustClose(t, seeds)
	for _, fc := range cases {
		byKey[defaultPrefix+fc.token] = fc
		if fc.kind != callCommit {
			if err := seeds.Commit(fc.token, gobSession(t, day0, map[string]any{"n": 0}), time.Now().Add(time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
	}
	events := recordEvents(t, cli)
	faults.Intercept(func(_ string, req any) etcdtest.Fate {
		if txn, ok := req.(*etcdserverpb.TxnRequest); ok && len(txn.Compare) > 0 {
			return byKey[string(txn.Compare[0].Key)].fate()
		}
		return etcdtest.Fate{}
	})
	var wg sync.WaitGroup
	places := make(chan struct{}, 64)
	for _, fc := range cases {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			timeout := time.Minute
			if fc.always {
				timeout = 300 * time.Millisecond
			}
			s := New(faulty, WithTimeout(timeout))
			fc.told = fc.do(t, s)
			s.pipeline.Wait()
		})
	}
	wg.Wait()
	for _, e := range events() {
		if fc := byKey[string(e.Kv.Key)]; fc != nil {
			fc.happened++
		}
	}
	for _, fc := range cases {
		fc.check(t)
	}
}

// recordEvents records what happens in etcd from now on, and returns a function that returns it. What is compacted
// meanwhile is not lost.
func recordEvents(t *testing.T, cli *clientv3.Client) func() []*clientv3.Event {
	t.Helper()
	watch := cli.Watch(t.Context(), "", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if created := <-watch; !created.Created {
		t.Fatal(created.Err())
	}
	return func() []*clientv3.Event { return drain(t, cli, watch) }
}

// eventsSince returns what has happened in etcd from a revision on.
func eventsSince(t *testing.T, cli *clientv3.Client, rev int64) []*clientv3.Event {
	t.Helper()
	return drain(t, cli, cli.Watch(t.Context(), "", clientv3.WithPrefix(), clientv3.WithRev(rev)))
}

// drain returns the events of a watch up to now.
func drain(t *testing.T, cli *clientv3.Client, watch clientv3.WatchChan) (events []*clientv3.Event) {
	t.Helper()
	last, err := cli.Put(t.Context(), "end", "x")
	if err != nil {
		t.Fatal(err)
	}
	for resp := range watch {
		for _, e := range resp.Events {
			if e.Kv.ModRevision == last.Header.Revision {
				return events
			}
			events = append(events, e)
		}
	}
	t.Fatal("the watch ended")
	return nil
}

// faultCase is a write that gets an error.
type faultCase struct {
	faultError
	kind   callKind
	made   bool // the error comes in place of the answer; else the request is never made
	always bool // to every send; else to the first
	token  string
	sends  atomic.Int32

	told     error
	happened int // how often, as etcd's history shows it
}

func (c *faultCase) String() string {
	kind := [...]string{"find", "create", "update", "delete"}[c.kind]
	return fmt.Sprintf("%s, %v, made: %v, always: %v: sent %d times, told %v, happened %d times", kind, c.err, c.made, c.always, c.sends.Load(), c.told, c.happened)
}

func (c *faultCase) fate() etcdtest.Fate {
	if c.sends.Add(1) > 1 && !c.always {
		return etcdtest.Fate{}
	}
	return etcdtest.Fate{Err: c.err, Drop: !c.made}
}

// do makes the call.
func (c *faultCase) do(t *testing.T, s *EtcdStore) error {
	switch c.kind {
	case callUpdate:
		return s.Update(t.Context(), c.token, increment)
	case callDelete:
		return s.Delete(c.token)
	}
	return s.CommitCtx(Begin(t.Context()), c.token, gobSession(t, day0, map[string]any{"n": 1}), time.Now().Add(time.Hour))
}

// check compares what the call was told with what happened.
func (c *faultCase) check(t *testing.T) {
	t.Helper()
	agrees := c.happened == 0
	switch {
	case c.told == nil:
		agrees = c.happened == 1
	case errors.Is(c.told, ErrOutcomeUnknown):
		agrees = c.happened <= 1 && c.always
	}
	if !agrees {
		t.Errorf("%v", c)
	}
	if c.told != nil && !strings.HasPrefix(c.told.Error(), "etcdstore: ") {
		t.Errorf("%v: whose error is that?", c)
	}
	want := c.want
	if c.made || c.kind == callCommit && errors.Is(want, rpctypes.ErrLeaseNotFound) {
		want = nil // it did happen; or there are other leases for what needs one
	}
	if !c.always && !errors.Is(c.told, want) {
		t.Errorf("%v, want %v", c, want)
	}
}

// A write that crossed the quota is applied, and answered with ErrNoSpace.
func TestFault_NoSpaceButApplied(t *testing.T) {
	s, faults, _ := faultyStore(t)
	failOnce(faults, 1, etcdtest.Fate{Err: rpctypes.ErrGRPCNoSpace})
	if err := s.Commit("a", []byte("after"), time.Now().Add(time.Hour)); err != nil {
		t.Error(err)
	}
	failOnce(faults, 1, etcdtest.Fate{Err: rpctypes.ErrGRPCNoSpace})
	if err := s.CommitCtx(Begin(t.Context()), "new", []byte("after"), time.Now().Add(time.Hour)); err != nil {
		t.Error(err)
	}
	faults.Intercept(nil)
	wantFound(t, s, "a", "after")
	wantFound(t, s, "new", "after")
}

// aftermath is an etcd that loses the answer to the next write of a session, once it is armed. Before anyone hears of that,
// other things happen.
type aftermath struct {
	etcd.API
	made  bool // the write is made
	armed atomic.Bool
	then  func()
}

func (a *aftermath) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if !writesSessions(op) || !a.armed.CompareAndSwap(true, false) {
		return a.API.Do(ctx, op)
	}
	if a.made {
		if _, err := a.API.Do(ctx, op); err != nil {
			return clientv3.OpResponse{}, err
		}
	}
	a.then()
	return clientv3.OpResponse{}, unavailableEOF
}

// The answer to a write is lost, others write, and etcd compacts its history. The call is told what happened where the
// session as it is shows that, or else the history; only where that is compacted, its outcome stays unknown.
func TestFault_CompactedHistory(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	other := New(cli)
	defer mustClose(t, other)
	for i, c := range []struct {
		ours     callKind
		made     bool
		others   string // what others do then: u(pdate), d(elete), c(reate)
		compact  bool   // all history
		want     error
		happened int
	}{
		{callUpdate, true, "", true, nil, 1}, // the session bears its write id
		{callUpdate, false, "", true, nil, 1},
		{callUpdate, true, "u", false, nil, 1},
		{callUpdate, true, "u", true, ErrOutcomeUnknown, 1},
		{callUpdate, false, "u", false, nil, 1},
		{callUpdate, false, "u", true, nil, 1}, // the session has had one version since, which is not ours
		{callUpdate, true, "ud", false, nil, 1},
		{callUpdate, true, "ud", true, ErrOutcomeUnknown, 1},
		{callUpdate, false, "ud", false, ErrSessionGone, 0},
		{callUpdate, false, "ud", true, ErrOutcomeUnknown, 0},
		{callUpdate, true, "udc", false, nil, 1},
		{callUpdate, true, "udc", true, ErrOutcomeUnknown, 1},
		{callCommit, true, "", true, nil, 1},
		{callCommit, false, "", true, nil, 1},
		{callCommit, true, "ud", false, nil, 1},
		{callCommit, true, "u", true, ErrOutcomeUnknown, 1},
		{callCommit, true, "ud", true, ErrOutcomeUnknown, 1},
		{callDelete, false, "", true, nil, 1},
		{callDelete, false, "u", false, nil, 1},
		{callDelete, false, "u", true, nil, 1}, // the session's key is still the one
		{callDelete, true, "", true, nil, 1},   // the session is not there, whoever deleted it
		{callDelete, false, "d", true, nil, 1},
		{callDelete, true, "c", false, nil, 1},
		{callDelete, true, "c", true, ErrOutcomeUnknown, 1},
	} {
		name := fmt.Sprintf("case %d, %+v", i, c)
		a := &aftermath{API: cli, made: c.made}
		s := newStore(a, cli, defaultPrefix, []Option{WithTimeout(time.Minute)})
		ours := &faultCase{kind: c.ours, token: fmt.Sprint("t", i)}
		create := func() error {
			return other.Commit(ours.token, gobSession(t, day0, map[string]any{"theirs": 0}), time.Now().Add(time.Hour))
		}
		acts := map[rune]func() error{
			'u': func() error { return other.Update(t.Context(), ours.token, setting("theirs", 1)) },
			'd': func() error { return other.Delete(ours.token) },
			'c': create,
		}
		mustCommit(t, s, "warm", "x", time.Hour) // a lease, so that the next write is ours
		if c.ours != callCommit {
			if err := create(); err != nil {
				t.Fatal(err)
			}
		}
		events := recordEvents(t, cli)
		a.then = func() {
			for _, act := range c.others {
				if err := acts[act](); err != nil {
					t.Errorf("%s: another: %v", name, err)
				}
			}
			if !c.compact {
				return
			}
			last, err := cli.Put(t.Context(), "last", "x")
			if err == nil {
				_, err = cli.Compact(t.Context(), last.Header.Revision)
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		a.armed.Store(true)
		if err := ours.do(t, s); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if n := tookEffect(t, ours, events()); n != c.happened {
			t.Errorf("%s: it happened %d times", name, n)
		}
		mustClose(t, s)
	}
}

// tookEffect counts how often a call took effect in what happened since its session was there: that n was set, or moved, or
// the session deleted.
func tookEffect(t *testing.T, c *faultCase, events []*clientv3.Event) (times int) {
	t.Helper()
	var before any
	for _, e := range events {
		if string(e.Kv.Key) != defaultPrefix+c.token {
			continue
		}
		var values map[string]any
		if e.Type == clientv3.EventTypePut {
			var err error
			if _, values, err = (scs.GobCodec{}).Decode(e.Kv.Value); err != nil {
				t.Fatal(err)
			}
		} else if c.kind == callDelete {
			times++
		}
		if values["n"] != nil && values["n"] != before {
			times++
		}
		before = values["n"]
	}
	return times
}

// The client sends a write again when a server gave up on it. The write id tells that the failed compare is our own doing,
// also where another write came on top of it, which the commit must not be made over again.
func TestFault_HiddenResend(t *testing.T) {
	s, faults, cli := faultyStore(t)
	other := New(cli)
	defer mustClose(t, other)
	mustCommit(t, other, "warm", "x", time.Hour) // a lease: its commits must fit into an attempt's time
	base := gobSession(t, time.Now().Add(time.Hour), map[string]any{"n": 0})
	for act, left := range map[string]any{"nothing": 1, "overwritten": 0, "overwritten twice": 0, "deleted": nil} {
		if err := s.Commit("a", base, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
		ctx := Begin(t.Context())
		b, _, err := s.FindCtx(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		deadline, _, err := scs.GobCodec{}.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		var sends atomic.Int32
		faults.Intercept(func(_ string, req any) etcdtest.Fate {
			if txn, ok := req.(*etcdserverpb.TxnRequest); !ok || len(txn.Compare) == 0 {
				return etcdtest.Fate{}
			}
			switch sends.Add(1) {
			case 1:
				return etcdtest.Fate{Err: status.Error(codes.DeadlineExceeded, "the server gave up")}
			case 2:
				return etcdtest.Fate{Before: func() {
					var err error
					switch act {
					case "overwritten twice":
						err = errors.Join(other.Commit("a", base, deadline), other.Commit("a", base, deadline))
					case "overwritten":
						err = other.Commit("a", base, deadline)
					case "deleted":
						err = other.Delete("a")
					}
					if err != nil {
						t.Error(err)
					}
				}}
			}
			return etcdtest.Fate{}
		})
		if err := s.CommitCtx(ctx, "a", gobSession(t, deadline, map[string]any{"n": 1}), deadline); err != nil {
			t.Errorf("then %s: %v; the commit was applied by its first send", act, err)
		}
		faults.Intercept(nil)
		if b, _, err = s.Find("a"); err != nil {
			t.Fatal(err)
		}
		var values map[string]any
		if b != nil {
			if _, values, err = (scs.GobCodec{}).Decode(b); err != nil {
				t.Fatal(err)
			}
		}
		if values["n"] != left {
			t.Errorf("then %s: n is %v, want %v; the commit was made again", act, values["n"], left)
		}
		if n := sends.Load(); n < 2 { // more where an attempt runs out of time
			t.Errorf("then %s: sent %d times", act, n)
		}
	}
}

// A call whose context ends while its write is in flight says that it does not know, and the write goes on to its end.
func TestFault_CallerLeaves(t *testing.T) {
	s, faults, _ := faultyStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	release := make(chan struct{})
	failOnce(faults, 1, etcdtest.Fate{Before: func() { cancel(); <-release }})
	err := s.CommitCtx(ctx, "a", []byte("after"), time.Now().Add(time.Hour))
	if !errors.Is(err, ErrOutcomeUnknown) || !errors.Is(err, context.Canceled) {
		t.Errorf("CommitCtx = %v; want ErrOutcomeUnknown for context.Canceled", err)
	}
	close(release)
	etcdtest.Eventually(t, 5*time.Second, func() bool {
		b, _, err := s.Find("a")
		return err == nil && string(b) == "after"
	}, "the write did not go on to its end")
}

// A call whose context ends while it waits for another of the same session is taken back: nothing happens.
func TestFault_CallerLeavesQueue(t *testing.T) {
	s, faults, _ := faultyStore(t)
	held, release := make(chan struct{}), make(chan struct{})
	failOnce(faults, 1, etcdtest.Fate{Before: func() { close(held); <-release }})
	first := make(chan error, 1)
	go func() { first <- s.CommitCtx(t.Context(), "a", []byte("first"), time.Now().Add(time.Hour)) }()
	<-held
	ctx, cancel := context.WithCancel(t.Context())
	second := make(chan error, 1)
	go func() { second <- s.CommitCtx(ctx, "a", []byte("second"), time.Now().Add(time.Hour)) }()
	etcdtest.Eventually(t, 5*time.Second, func() bool {
		return s.pipeline.Calls(defaultPrefix+"a") == 2
	}, "the second commit does not wait")
	cancel()
	if err := <-second; !errors.Is(err, context.Canceled) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("second: %v; want context.Canceled, and the outcome known", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	wantFound(t, s, "a", "first")
}

// zombie is an etcd whose next create, once it is armed, is delayed in the network: its caller gets an error, and late gets
// the request.
type zombie struct {
	etcd.API
	unfenced bool // as if creates compared no fence
	armed    atomic.Bool
	late     func(op clientv3.Op)
}

func (z *zombie) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	if op.IsTxn() {
		cmps, then, otherwise := op.Txn()
		if len(then) == 1 && then[0].IsPut() && z.armed.CompareAndSwap(true, false) {
			if z.unfenced {
				cmps = cmps[:1]
			}
			z.late(clientv3.OpTxn(cmps, then, otherwise))
			return clientv3.OpResponse{}, unavailableEOF
		}
	}
	return z.API.Do(ctx, op)
}

// The zombie create: it is delayed, sent again, applied, and the session is deleted. Then the first send arrives, and the
// key it is to create does not exist. Without the fence, it brings the session back.
func TestFault_ZombieCreate(t *testing.T) {
	for name, unfenced := range map[string]bool{"without the fence": true, "fenced": false} {
		t.Run(name, func(t *testing.T) {
			cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
			var delayed clientv3.Op
			z := &zombie{API: cli, unfenced: unfenced, late: func(op clientv3.Op) { delayed = op }}
			s := newStore(z, cli, defaultPrefix, nil)
			defer mustClose(t, s)
			createAndDelete(t, s, z)
			resp, err := cli.Do(t.Context(), delayed)
			if err != nil {
				t.Fatal(err)
			}
			wantZombie(t, s, resp, unfenced)
		})
	}
}

// createAndDelete creates the session "a", the first send being delayed, and deletes it.
func createAndDelete(t *testing.T, s *EtcdStore, z *zombie) {
	t.Helper()
	z.armed.Store(true)
	if err := s.CommitCtx(Begin(t.Context()), "a", []byte("x"), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if z.armed.Load() {
		t.Fatal("no create was delayed")
	}
	wantFound(t, s, "a", "x")
	if err := s.Delete("a"); err != nil {
		t.Fatal(err)
	}
}

// wantZombie checks whether the delayed create was applied when it arrived, and so the session is back.
func wantZombie(t *testing.T, s *EtcdStore, resp clientv3.OpResponse, want bool) {
	t.Helper()
	_, back, err := s.Find("a")
	if err != nil || back != want || resp.Txn().Succeeded != want {
		t.Errorf("the late create was applied: %v; the session is back: %v, %v; want %v", resp.Txn().Succeeded, back, err, want)
	}
}

// The same in a real partition. A member that is cut off, and knows that it has no leader, holds what it is to propose
// until it has one again: the first send waits there.
func TestFault_ZombieCreateInPartition(t *testing.T) {
	for name, unfenced := range map[string]bool{"without the fence": true, "fenced": false} {
		t.Run(name, func(t *testing.T) {
			c := etcdtest.New(t, etcdtest.Config{Members: 3})
			leader := c.Leader(t)
			i := (leader + 1) % 3
			cut, rest := c.Integration().Members[i], slices.Delete(slices.Clone(c.Integration().Members), i, i+1)
			cutClient, healthy := c.Client(t, etcdtest.WithMember(i)), c.Client(t, etcdtest.WithMember(leader))
			var resp clientv3.OpResponse
			arrived := make(chan error, 1)
			z := &zombie{API: healthy, unfenced: unfenced, late: func(op clientv3.Op) {
				go func() {
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					defer cancel()
					var err error
					resp, err = cutClient.Do(ctx, op)
					arrived <- err
				}()
			}}
			s := newStore(z, healthy, defaultPrefix, []Option{WithTimeout(time.Minute)})
			defer mustClose(t, s)
			mustCommit(t, s, "warm", "x", time.Hour) // a lease

			cut.InjectPartition(t, rest...)
			etcdtest.Eventually(t, 30*time.Second, func() bool { return cut.Server.Lead() == 0 }, "the member still believes in its leader")
			createAndDelete(t, s, z)
			select {
			case err := <-arrived:
				t.Fatalf("the first send did not wait: %v, %v", resp, err)
			default:
			}
			cut.RecoverPartition(t, rest...)
			if err := <-arrived; err != nil {
				t.Fatalf("the first send never arrived: %v", err)
			}
			wantZombie(t, s, resp, unfenced)
		})
	}
}

// The fault run: members stop, restart, are partitioned and paused, leadership moves and connections drop, while writers
// work on some sessions. What each call was told must agree with etcd's own history of every session, and the calls must be
// linearizable.
func TestFault_Run(t *testing.T) {
	length := *soak
	if length == 0 {
		length = 30 * time.Second
		if raceEnabled {
			length = 10 * time.Second
		}
	}
	run := newFaultRun(t)
	run.chaos(t, length)
	run.finish(t)
	t.Logf("%d calls: %d ok, %d gone, %d refused, %d unknown to their callers; %d writes sent with an unknown outcome",
		len(run.calls), run.count(toldOK), run.count(toldGone), run.count(toldNo), run.count(toldUnknown), run.unknown())
	if n := run.mismatches(t, true); n != 0 {
		t.Errorf("%d mismatches of what calls were told and what happened", n)
	}
	if n := run.unknown(); n < 100 && length >= 30*time.Second {
		t.Errorf("only %d writes with an unknown outcome: the faults do not bite", n)
	}
	if result := porcupine.CheckOperationsTimeout(sessionModel(), run.operations(), 2*time.Minute); result != porcupine.Ok {
		t.Errorf("the history is not linearizable: porcupine says %s", result)
	}
}

// The control: with the check of write ids switched off, the same run must show mismatches.
func TestFault_RunWithoutWriteIDs(t *testing.T) {
	run := newFaultRun(t)
	for _, s := range run.stores {
		decode := func(kvs []*mvccpb.KeyValue, asOf int64) *record.Version {
			v := s.decoder.Version(kvs, asOf)
			v.ID = record.WriteID{}
			return v
		}
		s.reader = read.New(s.etcd, decode)
		s.pipeline = commit.New(s.etcd, s.leases, s.reader, s.prefix, s.clock.Now, decode)
	}
	found := 0
	for round := 0; found == 0 && round < 12; round++ {
		run.chaos(t, 3*time.Second)
		found = run.mismatches(t, false)
	}
	if found == 0 {
		t.Errorf("%d calls without write ids show no mismatch, so the check of the run checks nothing", len(run.calls))
	}
	run.finish(t)
}

// 64 callers see nothing of a leader change but that it takes a moment.
func TestFault_LeaderChange(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{Members: 3})
	s := New(c.Client(t), WithTimeout(time.Minute)) // how long a call takes is for the benchmarks
	defer mustClose(t, s)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var calls atomic.Int64
	for w := range 64 {
		wg.Go(func() {
			token := fmt.Sprint("t", w)
			for {
				select {
				case <-stop:
					return
				default:
				}
				ctx := Begin(t.Context())
				if _, _, err := s.FindCtx(ctx, token); err != nil {
					t.Errorf("Find: %v", err)
				}
				if err := s.CommitCtx(ctx, token, []byte("x"), time.Now().Add(time.Hour)); err != nil {
					t.Errorf("Commit: %v", err)
				}
				calls.Add(1)
			}
		})
	}
	more := func(n int64) {
		t.Helper()
		until := calls.Load() + n
		etcdtest.Eventually(t, time.Minute, func() bool { return calls.Load() >= until }, "calls stand still")
	}
	more(200)
	c.MoveLeader(t)
	more(200)
	leader := c.Integration().Members[c.Leader(t)]
	leader.Stop(t)
	more(200)
	if err := leader.Restart(t); err != nil {
		t.Fatal(err)
	}
	more(200)
	close(stop)
	wg.Wait()
}

// Without a quorum calls end with their time, and clearly: those that were sent without knowing their outcome. When the
// quorum is back everything goes on by itself, what was sent has happened once at most, and nothing of it is left.
func TestFault_NoQuorum(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{Members: 3})
	cli := c.Client(t)
	s := New(cli, WithTimeout(700*time.Millisecond))
	defer mustClose(t, s)
	// What prepares and what looks after it has more time.
	calm := New(cli, WithTimeout(time.Minute))
	defer mustClose(t, calm)
	for _, token := range []string{"a", "b"} {
		mustCommit(t, calm, token, "before", time.Hour)
	}
	ctx := Begin(t.Context())
	etcdtest.Eventually(t, 20*time.Second, func() bool {
		_, a, errA := s.FindCtx(ctx, "a")
		_, b, errB := s.FindCtx(ctx, "b")
		_, none, errNone := s.FindCtx(ctx, "fresh")
		lease := s.Commit("warm", []byte("x"), time.Now().Add(time.Hour))
		return a && b && !none && errors.Join(errA, errB, errNone, lease) == nil
	}, "the sessions cannot be read, or there is no lease")
	resp, err := cli.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}

	members := c.Integration().Members
	members[1].Stop(t)
	members[2].Stop(t)
	_, _, findErr := s.Find("a")
	_, allErr := s.All()
	for call, err := range map[string]error{
		"Find": findErr, "All": allErr,
		"Commit": s.Commit("a", []byte("after"), time.Now().Add(time.Hour)),
		"Delete": s.Delete("b"),
		"Update": s.Update(t.Context(), "a", func(map[string]any) error { return nil }),
	} {
		if !etcd.Unavailable(err) || errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%s without a quorum: %v; nothing of it was sent", call, err)
		}
	}
	// As if etcd had answered just now: else even these would read first, and nothing would be sent.
	heard := func() context.Context { s.etcd.Saw(&etcdserverpb.ResponseHeader{}); return ctx }
	for call, err := range map[string]error{
		"Commit": s.CommitCtx(heard(), "a", []byte("after"), time.Now().Add(time.Hour)),
		"Delete": s.DeleteCtx(heard(), "b"),
		"Create": s.CommitCtx(heard(), "fresh", []byte("x"), time.Now().Add(time.Hour)),
	} {
		if !etcd.Unavailable(err) || !errors.Is(err, ErrOutcomeUnknown) {
			t.Errorf("%s of what was read, without a quorum: %v; want ErrOutcomeUnknown", call, err)
		}
	}
	for _, m := range members[1:] {
		if err := m.Restart(t); err != nil {
			t.Fatal(err)
		}
	}
	etcdtest.Eventually(t, 20*time.Second, func() bool {
		_, _, err := s.Find("a")
		return err == nil && s.Commit("c", []byte("again"), time.Now().Add(time.Hour)) == nil && s.Delete("c") == nil
	}, "calls do not recover")
	etcdtest.Eventually(t, 20*time.Second, func() bool { return idle(s) }, "something of the calls is left")
	happened := make(map[string]int)
	for _, e := range eventsSince(t, cli, resp.Header.Revision+1) {
		happened[strings.TrimPrefix(string(e.Kv.Key), defaultPrefix)]++
	}
	if happened["a"] > 1 || happened["b"] > 1 || happened["fresh"] > 1 || happened["c"] == 0 {
		t.Errorf("after the sessions were read, keys were written so often: %v", happened)
	}
}

// What was acknowledged is there after all members were restarted.
func TestFault_RestartAll(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{Members: 3})
	s := New(c.Client(t))
	defer mustClose(t, s)
	commitMany(t, s, 500)
	c.RestartAll(t)
	etcdtest.Eventually(t, 20*time.Second, func() bool {
		all, err := s.All()
		return err == nil && len(all) == 500
	}, "sessions are missing")
	mustCommit(t, s, "a", "x", time.Hour)
}

// While etcd runs out of space, what is reported as stored is stored, and what is reported as not stored is not.
func TestFault_OutOfSpace(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{QuotaBytes: 16 << 20})
	cli := c.Client(t)
	s := New(cli)
	defer mustClose(t, s)
	mustCommit(t, s, "logout", "x", time.Hour)
	var mu sync.Mutex
	said := make(map[string]error)
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			for i := 0; ; i++ {
				token := fmt.Sprintf("w%di%d", w, i)
				err := s.Commit(token, bytes.Repeat([]byte("x"), 20<<10), time.Now().Add(time.Hour))
				mu.Lock()
				said[token] = err
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	all, err := s.All()
	if err != nil {
		t.Fatal(err)
	}
	for token, err := range said {
		_, stored := all[token]
		if err != nil && !errors.Is(err, rpctypes.ErrNoSpace) || stored != (err == nil) {
			t.Errorf("Commit(%q) = %v; stored: %v", token, err, stored)
		}
	}
	wantFound(t, s, "logout", "x")
	if err := s.DeleteCtx(Begin(t.Context()), "logout"); err != nil {
		t.Errorf("Delete: %v", err)
	}
	for token := range all { // many at a time, so in batches
		wg.Go(func() {
			if err := s.Delete(token); err != nil {
				t.Errorf("Delete: %v", err)
			}
		})
	}
	wg.Wait()
	wantAbsent(t, s, "logout")

	status, err := cli.Status(t.Context(), cli.Endpoints()[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Compact(t.Context(), status.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Defragment(t.Context(), cli.Endpoints()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := cli.AlarmDisarm(t.Context(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	mustCommit(t, s, "a", "again", time.Hour)
	wantFound(t, s, "a", "again")
}
