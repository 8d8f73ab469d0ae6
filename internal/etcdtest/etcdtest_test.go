package etcdtest

import (
	"context"
	"errors"
	"runtime"
	"slices"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	methodPut   = "/etcdserverpb.KV/Put"
	methodRange = "/etcdserverpb.KV/Range"
)

func TestMain(m *testing.M) { Main(m) }

// put writes a key, and fails the test when that fails.
func put(t testing.TB, cli *clientv3.Client, key, value string, opts ...clientv3.OpOption) {
	t.Helper()
	if _, err := cli.Put(t.Context(), key, value, opts...); err != nil {
		t.Fatalf("Put(%q): %v", key, err)
	}
}

// get returns a key's value and the number of times that it was written.
func get(t testing.TB, cli *clientv3.Client, key string) (value string, version int64) {
	t.Helper()
	resp, err := cli.Get(t.Context(), key)
	if err != nil {
		t.Fatalf("Get(%q): %v", key, err)
	}
	if len(resp.Kvs) == 0 {
		return "", 0
	}
	return string(resp.Kvs[0].Value), resp.Kvs[0].Version
}

func TestNew(t *testing.T) {
	for name, cfg := range map[string]Config{
		"zero":         {},
		"three":        {Members: 3},
		"TLS":          {TLS: true},
		"TCP":          {Members: 3, TCP: true},
		"TCP with TLS": {TCP: true, TLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := New(t, cfg)
			if got, want := len(c.Endpoints()), max(cfg.Members, 1); got != want {
				t.Fatalf("%d endpoints, want %d", got, want)
			}
			put(t, c.Client(t), "k", "v")
			for i := range c.Endpoints() {
				cli := c.Client(t, WithMember(i))
				if got := cli.Endpoints(); !slices.Equal(got, c.Endpoints()[i:i+1]) {
					t.Errorf("client of member %d has endpoints %q", i, got)
				}
				if v, _ := get(t, cli, "k"); v != "v" {
					t.Errorf("member %d: value %q, want %q", i, v, "v")
				}
			}
		})
	}
}

func TestNew_TwoAtOnce(t *testing.T) {
	a, b := New(t, Config{}), New(t, Config{TCP: true})
	put(t, a.Client(t), "k", "a")
	put(t, b.Client(t), "k", "b")
	if v, _ := get(t, a.Client(t), "k"); v != "a" {
		t.Errorf("the clusters share their keys: got %q", v)
	}
}

func TestNew_TLSNeedsCertificate(t *testing.T) {
	c := New(t, Config{TLS: true})
	connect := func(certificate bool) error {
		tls, err := c.Integration().Cfg.ClientTLS.ClientConfig()
		if err != nil {
			t.Fatal(err)
		}
		if !certificate {
			tls.Certificates, tls.GetClientCertificate = nil, nil
		}
		cli, err := clientv3.New(clientv3.Config{
			Endpoints:   c.Endpoints(),
			DialTimeout: time.Second,
			Logger:      zap.NewNop(),
			TLS:         tls,
			Username:    "any", // logging in makes New connect
			Password:    "any",
		})
		if err == nil {
			_ = cli.Close()
		}
		return err
	}
	if err := connect(true); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	if err := connect(false); err == nil {
		t.Error("a client without a certificate was served")
	}
}

func TestNew_Limits(t *testing.T) {
	c := New(t, Config{QuotaBytes: 1 << 20, MaxTxnOps: 2})
	cli := c.Client(t)

	get := clientv3.OpGet("k")
	if _, err := cli.Txn(t.Context()).Then(get, get, get).Commit(); !errors.Is(err, rpctypes.ErrTooManyOps) {
		t.Errorf("three operations: %v, want ErrTooManyOps", err)
	}
	big := string(make([]byte, 300<<10))
	Eventually(t, 10*time.Second, func() bool {
		_, err := cli.Put(t.Context(), "k", big)
		return errors.Is(err, rpctypes.ErrNoSpace)
	}, "the quota was not enforced")
}

func TestCluster_MoveLeader(t *testing.T) {
	c := New(t, Config{Members: 3})
	for range 5 {
		old := c.Leader(t)
		c.MoveLeader(t)
		now := c.Leader(t)
		if now == old {
			t.Fatalf("member %d still leads", old)
		}
		for i, m := range c.Integration().Members {
			if got, want := m.Server.Lead(), uint64(c.Integration().Members[now].ID()); got != want {
				t.Errorf("member %d takes %x for the leader, want %x", i, got, want)
			}
		}
	}
}

func TestCluster_LeaderWithoutStoppedMember(t *testing.T) {
	c := New(t, Config{Members: 3})
	old := c.Leader(t)
	c.Integration().Members[old].Stop(t)
	if now := c.Leader(t); now == old {
		t.Errorf("member %d is stopped, and named the leader", old)
	}
	c.MoveLeader(t)
}

func TestCluster_RestartAll(t *testing.T) {
	for name, cfg := range map[string]Config{
		"one":   {},
		"three": {Members: 3},
		"TCP":   {Members: 3, TCP: true, TLS: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := New(t, cfg)
			before := c.Client(t)
			put(t, before, "k", "v")
			c.RestartAll(t)
			for _, cli := range []*clientv3.Client{before, c.Client(t)} {
				if v, _ := get(t, cli, "k"); v != "v" {
					t.Errorf("after the restart: value %q, want %q", v, "v")
				}
			}
		})
	}
}

func TestFaults_Drop(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	faults.Intercept(func(method string, req any) Fate {
		put, ok := req.(*etcdserverpb.PutRequest)
		if ok && method != methodPut {
			t.Errorf("method %q, want %q", method, methodPut)
		}
		return Fate{Drop: ok && string(put.Key) == "dropped"}
	})
	put(t, cli, "other", "v")
	if _, err := cli.Put(t.Context(), "dropped", "v"); err == nil {
		t.Error("a dropped call succeeded")
	}
	if got := Keys(t, cli, ""); !slices.Equal(got, []string{"other"}) {
		t.Errorf("keys %q, want only %q", got, "other")
	}

	faults.Intercept(nil)
	put(t, cli, "dropped", "v")
}

func TestFaults_ErrAfterCall(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	faults.Intercept(func(string, any) Fate { return Fate{Err: rpctypes.ErrGRPCTimeout} })
	if _, err := cli.Put(t.Context(), "k", "v"); !errors.Is(err, rpctypes.ErrTimeout) {
		t.Errorf("got %v, want %v", err, rpctypes.ErrTimeout)
	}
	faults.Intercept(nil)
	if v, _ := get(t, cli, "k"); v != "v" {
		t.Error("the call was not made")
	}
	if got := faults.Calls(methodPut); got != 1 {
		t.Errorf("%d calls, want 1", got)
	}
}

// The interceptor sits inside the client's retries: the client itself resends an
// applied write whose answer was DeadlineExceeded, and its caller sees no error.
func TestFaults_InsideRetries(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	faults.Intercept(func(string, any) Fate {
		if faults.Calls(methodPut) == 1 {
			return Fate{Err: status.Error(codes.DeadlineExceeded, "lost")}
		}
		return Fate{}
	})
	put(t, cli, "k", "v")
	if got := faults.Calls(methodPut); got != 2 {
		t.Errorf("%d attempts, want 2", got)
	}
	if _, version := get(t, cli, "k"); version != 2 {
		t.Errorf("written %d times, want 2", version)
	}
}

func TestFaults_Delay(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	const delay = 50 * time.Millisecond
	faults.Intercept(func(string, any) Fate { return Fate{Delay: delay} })
	start := time.Now()
	put(t, cli, "k", "v")
	if took := time.Since(start); took < delay {
		t.Errorf("the call took %v, want at least %v", took, delay)
	}
}

func TestFaults_DelayEndsWithContext(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	ctx, cancel := context.WithCancel(t.Context())
	faults.Intercept(func(string, any) Fate { return Fate{Before: cancel, Delay: time.Hour} })
	if _, err := cli.Put(ctx, "k", "v"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	faults.Intercept(nil)
	if keys := Keys(t, cli, ""); len(keys) != 0 {
		t.Errorf("the call was made: keys %q", keys)
	}
}

func TestFaults_Before(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	// The write that is held back is applied after one that was begun later.
	held, release := make(chan struct{}), make(chan struct{})
	faults.Intercept(func(_ string, req any) Fate {
		if put, ok := req.(*etcdserverpb.PutRequest); !ok || string(put.Value) != "first" {
			return Fate{}
		}
		return Fate{Before: func() { close(held); <-release }}
	})
	done := make(chan error)
	go func() {
		_, err := cli.Put(t.Context(), "k", "first")
		done <- err
	}()
	<-held
	put(t, cli, "k", "second")
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if v, version := get(t, cli, "k"); v != "first" || version != 2 {
		t.Errorf("got %q in version %d, want %q in version 2", v, version, "first")
	}
}

func TestFaults_Reset(t *testing.T) {
	var faults Faults
	c := New(t, Config{})
	cli := c.Client(t, WithFaults(&faults))

	put(t, cli, "k", "v")
	put(t, cli, "k", "v")
	get(t, cli, "k")
	if puts, ranges := faults.Calls(methodPut), faults.Calls(methodRange); puts != 2 || ranges != 1 {
		t.Errorf("%d puts and %d ranges, want 2 and 1", puts, ranges)
	}
	faults.Reset()
	put(t, cli, "k", "v")
	if puts, ranges := faults.Calls(methodPut), faults.Calls(methodRange); puts != 1 || ranges != 0 {
		t.Errorf("after Reset: %d puts and %d ranges, want 1 and 0", puts, ranges)
	}
}

func TestLeases(t *testing.T) {
	c := New(t, Config{Members: 3})
	cli := c.Client(t)
	if got := Leases(t, cli); len(got) != 0 {
		t.Fatalf("leases of a new cluster: %v", got)
	}

	var want []clientv3.LeaseID
	for range 20 {
		lease, err := cli.Grant(t.Context(), 60)
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, lease.ID)
		if got := Leases(t, cli); !sameLeases(got, want) {
			t.Fatalf("leases %v, want %v", got, want)
		}
	}
	for len(want) > 0 {
		if _, err := cli.Revoke(t.Context(), want[0]); err != nil {
			t.Fatal(err)
		}
		want = want[1:]
		if got := Leases(t, cli); !sameLeases(got, want) {
			t.Fatalf("leases %v, want %v", got, want)
		}
	}

	// A stopped member does not matter.
	c.Integration().Members[0].Stop(t)
	c.Leader(t)
	if got := Leases(t, cli); len(got) != 0 {
		t.Errorf("leases %v, want none", got)
	}
}

func sameLeases(a, b []clientv3.LeaseID) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

func TestKeys(t *testing.T) {
	cli := New(t, Config{}).Client(t)
	for _, key := range []string{"b/2", "a/1", "b/1", "b"} {
		put(t, cli, key, "v")
	}
	if got, want := Keys(t, cli, "b/"), []string{"b/1", "b/2"}; !slices.Equal(got, want) {
		t.Errorf("Keys(b/) = %q, want %q", got, want)
	}
	if got, want := Keys(t, cli, ""), []string{"a/1", "b", "b/1", "b/2"}; !slices.Equal(got, want) {
		t.Errorf("Keys() = %q, want %q", got, want)
	}
}

func TestEnableAuth(t *testing.T) {
	c := New(t, Config{Members: 3})
	nobody := c.Client(t)
	for _, round := range []string{"first", "again"} {
		t.Run(round, func(t *testing.T) {
			EnableAuth(t, c, "app", "secret", "p/")
			cli := c.Client(t, WithUser("app", "secret"))
			put(t, cli, "p/k", "v")
			if v, _ := get(t, cli, "p/k"); v != "v" {
				t.Errorf("value %q, want %q", v, "v")
			}
			for _, key := range []string{"k", "p", "p0"} {
				if _, err := cli.Put(t.Context(), key, "v"); !errors.Is(err, rpctypes.ErrPermissionDenied) {
					t.Errorf("Put(%q): %v, want ErrPermissionDenied", key, err)
				}
				if _, err := cli.Get(t.Context(), key); !errors.Is(err, rpctypes.ErrPermissionDenied) {
					t.Errorf("Get(%q): %v, want ErrPermissionDenied", key, err)
				}
			}
			if _, err := nobody.Put(t.Context(), "p/k", "v"); !errors.Is(err, rpctypes.ErrUserEmpty) {
				t.Errorf("Put without a user: %v, want ErrUserEmpty", err)
			}
		})
		put(t, nobody, "p/k", "off")
	}
}

func TestEventually(t *testing.T) {
	calls := 0
	Eventually(t, time.Minute, func() bool { calls++; return calls == 3 }, "never")
	if calls != 3 {
		t.Errorf("%d calls, want 3", calls)
	}

	rec := &recorder{TB: t}
	rec.run(func() { Eventually(rec, time.Millisecond, func() bool { return false }, "never") })
	if !rec.failed {
		t.Error("a condition that is never true did not fail the test")
	}
}

// What the framework skips fails.
func TestSkipFails(t *testing.T) {
	for name, skip := range map[string]func(testing.TB){
		"Skip":    func(tb testing.TB) { tb.Skip("why") },
		"Skipf":   func(tb testing.TB) { tb.Skipf("why %d", 1) },
		"SkipNow": func(tb testing.TB) { tb.SkipNow() },
	} {
		rec := &recorder{TB: t}
		rec.run(func() { skip(quiet{rec}) })
		if !rec.failed {
			t.Errorf("%s did not fail the test", name)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	cli := New(b, Config{}).Client(b)
	for b.Loop() {
		put(b, cli, "k", "v")
	}
}

// recorder is a testing.TB that notes a failure instead of failing.
type recorder struct {
	testing.TB
	failed bool
}

func (r *recorder) Fatal(...any) {
	r.failed = true
	runtime.Goexit()
}

func (r *recorder) Fatalf(string, ...any) { r.Fatal() }

// run runs fn to its end, or to its Fatal.
func (r *recorder) run(fn func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	<-done
}
