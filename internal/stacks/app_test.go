package stacks

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net/http"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/seed210be38d/etcdstore"
	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// values are what a session holds.
type values = map[string]any

// app is an application: an etcd, a store on it, and a session manager with the store's codec.
type app struct {
	*testing.T
	cli   *clientv3.Client
	store *etcdstore.EtcdStore
	codec scs.Codec // which knows nothing of versions
	sm    *scs.SessionManager
}

func newApp(t *testing.T, opts ...etcdstore.Option) *app {
	t.Helper()
	return newAppWithCodec(t, scs.GobCodec{}, opts...)
}

func newAppWithCodec(t *testing.T, codec scs.Codec, opts ...etcdstore.Option) *app {
	t.Helper()
	a := &app{T: t, cli: etcdtest.New(t, etcdtest.Config{}).Client(t), codec: codec}
	a.store = etcdstore.New(a.cli, append(opts, etcdstore.WithCodec(codec))...)
	t.Cleanup(func() { _ = a.store.Close() })
	a.sm = a.manager()
	return a
}

// manager returns another session manager on the store.
func (a *app) manager() *scs.SessionManager {
	sm := scs.New()
	sm.Store, sm.Codec, sm.ErrorFunc = a.store, a.store.Codec(), etcdstore.ErrorFunc
	return sm
}

// each runs f as a subtest for each of the contexts.
func (a *app) each(contexts []testContext, f func(a *app, ctx context.Context)) {
	a.Helper()
	for _, c := range contexts {
		a.Run(c.name, func(t *testing.T) { f(a.with(t), c.of(t)) })
	}
}

// with returns the application in a subtest.
func (a *app) with(t *testing.T) *app {
	sub := *a
	sub.T = t
	return &sub
}

// session stores a session with user=alice and what else it is given, and returns its token.
func (a *app) session(more values) (token string) {
	a.Helper()
	ctx := a.load(context.Background(), "")
	a.sm.Put(ctx, "user", "alice")
	for key, value := range more {
		a.sm.Put(ctx, key, value)
	}
	return a.commit(ctx)
}

// load loads a session by hand.
func (a *app) load(ctx context.Context, token string) context.Context {
	a.Helper()
	loaded, err := a.sm.Load(ctx, token)
	if err != nil {
		a.Fatalf("load: %v", err)
	}
	return loaded
}

// commit commits a session by hand, which must succeed.
func (a *app) commit(ctx context.Context) (token string) {
	a.Helper()
	token, _, err := a.sm.Commit(ctx)
	if err != nil {
		a.Errorf("commit: %v", err)
	}
	return token
}

// refused commits a session by hand, which must fail with want.
func (a *app) refused(ctx context.Context, want error) {
	a.Helper()
	if _, _, err := a.sm.Commit(ctx); !errors.Is(err, want) {
		a.Errorf("commit: %v, want %v", err, want)
	}
}

// put is what another request does that sets a key meanwhile.
func (a *app) put(token, key string, value any) {
	a.Helper()
	if err := a.update(token, key, value); err != nil {
		a.Errorf("the other request: %v", err)
	}
}

func (a *app) update(token, key string, value any) error {
	return a.store.Update(context.Background(), a.key(token), func(v map[string]any) error {
		v[key] = value
		return nil
	})
}

// logout is another request that deletes the session meanwhile.
func (a *app) logout(token string) {
	a.Helper()
	if err := a.store.Delete(a.key(token)); err != nil {
		a.Errorf("the logout: %v", err)
	}
}

// renew renews the session's token, and returns the new one.
func (a *app) renew(ctx context.Context) (token string) {
	a.Helper()
	if err := a.sm.RenewToken(ctx); err != nil {
		a.Errorf("RenewToken: %v", err)
	}
	return a.sm.Token(ctx)
}

// merge merges another session into that of ctx.
func (a *app) merge(ctx context.Context, token string) {
	a.Helper()
	if err := a.sm.MergeSession(ctx, token); err != nil {
		a.Errorf("MergeSession: %v", err)
	}
}

// destroy destroys the session of ctx.
func (a *app) destroy(ctx context.Context) {
	a.Helper()
	if err := a.sm.Destroy(ctx); err != nil {
		a.Errorf("Destroy: %v", err)
	}
}

// key returns the token that the store knows a session by.
func (a *app) key(token string) string {
	if !a.sm.HashTokenInStore {
		return token
	}
	hash := sha256.Sum256([]byte(token))
	return base64.RawURLEncoding.EncodeToString(hash[:])
}

// stored returns what a session holds; nil: there is none.
func (a *app) stored(token string) values {
	a.Helper()
	b, ok, err := a.store.Find(a.key(token))
	if err != nil {
		a.Fatalf("find: %v", err)
	}
	if !ok {
		return nil
	}
	_, v, err := a.codec.Decode(b)
	if err != nil {
		a.Fatalf("decode: %v", err)
	}
	return v
}

// holds checks that a session holds want and user=alice, and nothing else.
func (a *app) holds(token string, want values) {
	a.Helper()
	all := values{"user": "alice"}
	for key, value := range want {
		all[key] = value
	}
	a.holdsOnly(token, all)
}

// holdsOnly checks that a session holds want, and nothing else.
func (a *app) holdsOnly(token string, want values) {
	a.Helper()
	if got := a.stored(token); !reflect.DeepEqual(got, want) {
		a.Errorf("the session holds %v, want %v", got, want)
	}
}

// gone checks that there is no session with this token.
func (a *app) gone(token string) {
	a.Helper()
	if got := a.stored(token); got != nil {
		a.Errorf("the session is there, and holds %v", got)
	}
}

// answered checks the status that a request was answered with.
func (a *app) answered(got answer, want int) {
	a.Helper()
	if got.code != want {
		a.Errorf("answered with %d, want %d", got.code, want)
	}
}

// meeting returns a function that waits until it was called n times, so that n requests are at the
// same point at once.
func (a *app) meeting(n int) (wait func()) {
	var mu sync.Mutex
	all := make(chan struct{})
	return func() {
		mu.Lock()
		if n--; n == 0 {
			close(all)
		}
		mu.Unlock()
		select {
		case <-all:
		case <-time.After(time.Minute):
			a.Error("not all have come")
		}
	}
}

// testContext is a kind of context that sessions are loaded under.
type testContext struct {
	name string
	of   func(*testing.T) context.Context
}

var (
	background = testContext{"Background", func(*testing.T) context.Context {
		return context.Background() //nolint:usetesting // one that tells nothing of whose it is
	}}
	begun = testContext{"Begin", func(*testing.T) context.Context {
		return etcdstore.Begin(context.Background()) //nolint:usetesting // as above
	}}
	request = testContext{"Request", requestContext}
	derived = testContext{"Derived", func(t *testing.T) context.Context {
		return context.WithoutCancel(requestContext(t))
	}}

	// anyContext are all kinds; in those of marked the store knows the request from the context.
	anyContext = []testContext{background, begun, request, derived}
	marked     = []testContext{begun, request}
)

// requestContext returns the context of a request of net/http that lasts until the test ends.
func requestContext(t *testing.T) context.Context {
	t.Helper()
	var wg sync.WaitGroup
	contexts, end := make(chan context.Context, 1), make(chan struct{})
	send := http1(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		contexts <- r.Context()
		<-end
	}))
	wg.Go(func() { send() })
	t.Cleanup(func() { close(end); wg.Wait() }) // before the server's own
	return <-contexts
}
