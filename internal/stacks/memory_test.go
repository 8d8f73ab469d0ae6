package stacks

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// heap returns how many bytes the heap holds. What etcd needs, which runs in this process, is among
// them.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// within waits until the heap holds no more than it did before, and a bit.
func (a *app) within(before, most int64) {
	a.Helper()
	var grown int64
	defer func() { a.Logf("%d KiB more than before", grown>>10) }()
	etcdtest.Eventually(a.T, 10*time.Second, func() bool {
		grown = heap() - before
		return grown <= most
	}, fmt.Sprintf("more than %d KiB are left behind", most>>10))
}

// Sessions that are loaded and not committed leave nothing behind, under no context.
func TestMemory_Loads(t *testing.T) {
	for _, c := range []struct {
		testContext
		loads int
		most  int64
	}{
		{background, 200_000, 8 << 20}, // 40 bytes of each
		{request, 20_000, 4 << 20},     // a fifth of what each session holds
		{begun, 20_000, 4 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newApp(t)
			token := a.session(values{"data": strings.Repeat("x", 1000)})
			ctx := c.of(t)
			a.loads(ctx, token, 1000) // for what is made once
			before := heap()
			a.loads(ctx, token, c.loads)
			a.within(before, c.most)
			runtime.KeepAlive(ctx)
		})
	}
}

// loads loads a session n times.
func (a *app) loads(ctx context.Context, token string, n int) {
	const workers = 32
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range n / workers {
				if _, err := a.sm.Load(ctx, token); err != nil {
					a.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// A request that lists sessions again and again holds none of them.
func TestMemory_Listing(t *testing.T) {
	const sessions, size = 200, 50_000
	a := newApp(t)
	data := strings.Repeat("x", size)
	for range sessions {
		a.session(values{"data": data})
	}
	ctx := requestContext(t)
	before := heap()
	for range 10 {
		all, err := a.store.AllCtx(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if len(all) != sessions {
			t.Fatalf("%d sessions, want %d", len(all), sessions)
		}
	}
	a.within(before, sessions*size/4)
	if ctx.Err() != nil {
		t.Error("the request has ended")
	}
}

// Nor does one that goes through them with the session manager.
func TestMemory_Iterate(t *testing.T) {
	const sessions, size = 200, 50_000
	a := newApp(t)
	data := strings.Repeat("x", size)
	for range sessions {
		a.session(values{"data": data})
	}
	ctx := requestContext(t)
	before := heap()
	for range 5 {
		a.iterate(ctx, func(context.Context) {})
	}
	a.within(before, sessions*size/4)
	if ctx.Err() != nil {
		t.Error("the request has ended")
	}
}
