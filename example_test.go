package etcdstore_test

import (
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/alexedwards/scs/v2/memstore"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore"
)

// With a session manager of scs, each request is a transaction. The application needs no change for it.
func ExampleNew() {
	client, stop := startEtcd() // or clientv3.New
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()

	sessionManager := scs.New()
	sessionManager.Store = store
	sessionManager.ErrorFunc = etcdstore.ErrorFunc

	mux := http.NewServeMux()
	mux.HandleFunc("/put", func(_ http.ResponseWriter, r *http.Request) {
		sessionManager.Put(r.Context(), "message", "Hello from a session!")
	})
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, sessionManager.GetString(r.Context(), "message"))
	})
	get, stopServer := serve(sessionManager.LoadAndSave(mux))
	defer stopServer()

	get("/put")
	fmt.Println(get("/get"))
	// Output: Hello from a session!
}

// Stores with different prefixes do not see each other's sessions, also where one prefix begins with the other.
func ExampleNewWithPrefix() {
	client, stop := startEtcd()
	defer stop()
	shop := etcdstore.NewWithPrefix(client, "sessions:")
	defer shop.Close()
	admin := etcdstore.NewWithPrefix(client, "sessions:admin:")
	defer admin.Close()

	if err := admin.Commit("token", []byte("data"), time.Now().Add(time.Hour)); err != nil {
		fmt.Println(err)
		return
	}
	_, inAdmin, _ := admin.Find("token")
	_, inShop, _ := shop.Find("token")
	_, byPrefix, _ := shop.Find("admin:token")
	fmt.Println(inAdmin, inShop, byPrefix)
	// Output: true false false
}

// Outside of net/http, Begin makes a transaction of what one job does. Here two jobs have read the same session before
// either of them commits.
func ExampleBegin() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "name", "Ann")

	first, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	second, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	third, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)

	sessionManager.Put(first, "name", "Ann Lee")
	sessionManager.Put(second, "theme", "dark")
	sessionManager.Put(third, "name", "Anna")
	for _, ctx := range []context.Context{first, second, third} {
		_, _, err := sessionManager.Commit(ctx)
		fmt.Println(err)
	}

	now, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.GetString(now, "name"), sessionManager.GetString(now, "theme"))
	// Output:
	// <nil>
	// <nil>
	// etcdstore: conflict with a concurrent request on name
	// Ann Lee dark
}

// Update changes a session on the server's side, here from a webhook that no browser sent.
func ExampleEtcdStore_Update() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "credit", 10)

	err := store.Update(context.Background(), token, func(values map[string]any) error {
		credit, _ := values["credit"].(int)
		values["credit"] = credit + 5
		return nil
	})
	if err != nil {
		fmt.Println(err)
		return
	}

	ctx, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.GetInt(ctx, "credit"))
	// Output: 15
}

// A resolver of the application's own decides what two changes of one key mean together: here, the cheaper offer holds.
func ExampleWithResolver() {
	cheaper := func(c etcdstore.Conflict) (any, error) {
		ours, isInt := c.Ours.(int)
		theirs, areInts := c.Theirs.(int)
		if !isInt || !areInts { // one of them has removed it
			return nil, etcdstore.ErrConflict
		}
		return min(ours, theirs), nil
	}

	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(cheaper))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "offer", 100)

	fmt.Println(bothChange(sessionManager, token, "offer", 80, 90))
	// Output: 80
}

// Each key of the session can have its own resolver. Those without one conflict.
func ExampleByKey() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(etcdstore.ByKey(map[string]etcdstore.Resolver{
		"visits":    etcdstore.Sum,
		"last seen": etcdstore.Latest,
		"flash":     etcdstore.KeepTheirs, // a message that two requests take away was shown once
	})))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "visits", 1)

	fmt.Println(bothChange(sessionManager, token, "visits", 2, 2))
	fmt.Println(bothChange(sessionManager, token, "theme", "light", "dark"))
	// Output:
	// 3
	// etcdstore: conflict with a concurrent request on theme
}

// A counter that two requests have added to counts both.
func ExampleSum() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(etcdstore.Sum))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "points", 10)

	fmt.Println(bothChange(sessionManager, token, "points", 15, 11))
	// Output: 16
}

// Of two stamps the later one holds, whichever request commits last.
func ExampleLatest() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(etcdstore.Latest))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "seen", "09:00")

	fmt.Println(bothChange(sessionManager, token, "seen", "09:03", "09:01"))
	// Output: 09:03
}

// A set holds what either request has added, without what either has removed.
func ExampleUnion() {
	gob.Register([]string{})
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(etcdstore.Union))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "cart", []string{"apple", "bread"})

	fmt.Println(bothChange(sessionManager, token, "cart", []string{"apple", "bread", "cheese"}, []string{"bread", "dates"}))
	// Output: [bread cheese dates]
}

// With the store's codec, commits are validated whatever becomes of contexts: here two copies of a session are loaded under
// contexts that have nothing to do with a request.
func ExampleEtcdStore_Codec() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := scs.New()
	sessionManager.Store = store
	sessionManager.Codec = store.Codec()
	token := newSession(sessionManager, "user", "alice")

	tab, _ := sessionManager.Load(context.Background(), token)
	other, _ := sessionManager.Load(context.Background(), token)
	sessionManager.Put(tab, "theme", "dark")
	sessionManager.Put(other, "language", "en")
	for _, ctx := range []context.Context{tab, other} {
		if _, _, err := sessionManager.Commit(ctx); err != nil {
			fmt.Println(err)
			return
		}
	}

	now, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.GetString(now, "theme"), sessionManager.GetString(now, "language"))
	// Output: dark en
}

// A JSON API answers what goes wrong as JSON, and nothing besides: in the session manager's ErrorFunc, and where Retry
// answers. It tells a client whose session was revoked that nothing was saved.
func ExampleWithErrorFunc() {
	answer := func(w http.ResponseWriter, r *http.Request, err error) {
		if etcdstore.WillRetry(r) {
			return // the handler runs again, or Retry answers
		}
		status, text := http.StatusServiceUnavailable, "try again later"
		switch {
		case errors.Is(err, etcdstore.ErrConflict):
			status, text = http.StatusConflict, "changed in another tab"
		case errors.Is(err, etcdstore.ErrSessionGone):
			status, text = http.StatusUnauthorized, "logged out; nothing was saved"
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(map[string]string{"error": text})
	}

	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithErrorFunc(answer))
	defer store.Close()
	sessionManager := newManager(store)
	sessionManager.ErrorFunc = answer
	mux := http.NewServeMux()
	mux.HandleFunc("/login", func(_ http.ResponseWriter, r *http.Request) { sessionManager.Put(r.Context(), "n", 1) })
	mux.HandleFunc("/busy", func(_ http.ResponseWriter, r *http.Request) { // each run loses against another request
		sessionManager.Put(r.Context(), "n", 2)
		_ = store.Update(context.Background(), sessionManager.Token(r.Context()), func(values map[string]any) error {
			values["n"] = values["n"].(int) + 1
			return nil
		})
	})
	get, stopServer := serve(store.Retry(sessionManager.LoadAndSave(mux)))
	defer stopServer()

	get("/login")
	fmt.Print(get("/busy"))
	// Output: {"error":"changed in another tab"}
}

// Under Serializable a commit that is based on anything but the session as it is fails. Here both requests look at the
// whole order and then change a part of it; under Snapshot both would succeed, and the order would be over its limit.
func ExampleWithIsolation() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithIsolation(etcdstore.Serializable))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "limit", 10)

	first, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	second, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	order := func(ctx context.Context, item string, n int) error {
		total := sessionManager.GetInt(ctx, "apples") + sessionManager.GetInt(ctx, "pears")
		if total+n > sessionManager.GetInt(ctx, "limit") {
			return fmt.Errorf("no more than %d", sessionManager.GetInt(ctx, "limit"))
		}
		sessionManager.Put(ctx, item, n)
		_, _, err := sessionManager.Commit(ctx)
		return err
	}
	fmt.Println(order(first, "apples", 7))
	fmt.Println(order(second, "pears", 7))
	// Output:
	// <nil>
	// etcdstore: conflict with a concurrent request on apples
}

// With an idle timeout scs commits every session that a request loads. With WithTouchInterval most of these commits
// cost no write.
func ExampleWithTouchInterval() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithTouchInterval(time.Minute))
	defer store.Close()
	sessionManager := newManager(store)
	sessionManager.IdleTimeout = 20 * time.Minute

	mux := http.NewServeMux()
	mux.HandleFunc("/login", func(_ http.ResponseWriter, r *http.Request) {
		sessionManager.Put(r.Context(), "user", 1)
	})
	mux.HandleFunc("/look", func(http.ResponseWriter, *http.Request) {})
	get, stopServer := serve(sessionManager.LoadAndSave(mux))
	defer stopServer()

	get("/login")
	for range 5 {
		get("/look")
	}

	resp, err := client.Get(context.Background(), "scs:session:", clientv3.WithRange("scs:session:~"))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("written", resp.Kvs[0].Version, "time")
	// Output: written 1 time
}

// With Retry a handler runs again when its commit lost against another request, so that concurrent requests may change
// the same key.
func ExampleEtcdStore_Retry() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)

	count := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n := sessionManager.GetInt(r.Context(), "n") + 1
		sessionManager.Put(r.Context(), "n", n)
		fmt.Fprint(w, n)
	})
	get, stopServer := serve(store.Retry(sessionManager.LoadAndSave(count)))
	defer stopServer()

	get("/") // makes the session
	var requests sync.WaitGroup
	for range 10 {
		requests.Go(func() { get("/") })
	}
	requests.Wait()
	fmt.Println(get("/"))
	// Output: 12
}

// Exclusive lets one request of a session run at a time, for handlers with effects elsewhere: here a payment, that an
// impatient user asks for five times.
func ExampleEtcdStore_Exclusive() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)

	var payments atomic.Int32
	mux := http.NewServeMux()
	mux.HandleFunc("/order", func(_ http.ResponseWriter, r *http.Request) {
		sessionManager.Put(r.Context(), "unpaid", true)
	})
	mux.HandleFunc("/pay", func(_ http.ResponseWriter, r *http.Request) {
		if sessionManager.PopBool(r.Context(), "unpaid") {
			payments.Add(1)
		}
	})
	get, stopServer := serve(store.Exclusive(sessionManager, sessionManager.LoadAndSave(mux)))
	defer stopServer()

	get("/order")
	var requests sync.WaitGroup
	for range 5 {
		requests.Go(func() { get("/pay") })
	}
	requests.Wait()
	fmt.Println("payments:", payments.Load())
	// Output: payments: 1
}

// A commit that lost against another on the same key names that key. What the application does about it is its own affair:
// here it does what a person would, and looks again.
func ExampleConflictError() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "address", "12 Low Road")

	ours, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	theirs, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	sessionManager.Put(theirs, "address", "3 High Street")
	if _, _, err := sessionManager.Commit(theirs); err != nil {
		fmt.Println(err)
		return
	}

	sessionManager.Put(ours, "address", "7 Mill Lane")
	_, _, err := sessionManager.Commit(ours)
	var conflict *etcdstore.ConflictError
	if errors.As(err, &conflict) {
		now, _ := sessionManager.Load(context.Background(), token)
		fmt.Println("changed meanwhile:", conflict.Keys, "is", sessionManager.GetString(now, conflict.Keys[0]))
	}
	// Output: changed meanwhile: [address] is 3 High Street
}

// ErrorFunc answers for a session that could not be saved. Here two requests change the same key, so the second is
// answered with 409.
func ExampleErrorFunc() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := scs.New()
	sessionManager.Store = store
	sessionManager.ErrorFunc = etcdstore.ErrorFunc

	reading, written := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/theme", func(_ http.ResponseWriter, r *http.Request) {
		if r.FormValue("is") == "slow" {
			close(reading)
			<-written
		}
		sessionManager.Put(r.Context(), "theme", r.FormValue("is"))
	})
	get, stopServer := serve(sessionManager.LoadAndSave(mux))
	defer stopServer()

	get("/theme?is=light") // makes the session
	slow := make(chan string)
	go func() { slow <- get("/theme?is=slow") }()
	<-reading
	get("/theme?is=dark")
	close(written)
	fmt.Print(<-slow)
	// Output: Conflict
}

// jsonCodec encodes sessions as JSON, so that programs in other languages can read them.
type jsonCodec struct{}

type jsonSession struct {
	Deadline time.Time      `json:"deadline"`
	Values   map[string]any `json:"values"`
}

func (jsonCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	return json.Marshal(jsonSession{deadline, values})
}

func (jsonCodec) Decode(b []byte) (time.Time, map[string]any, error) {
	var s jsonSession
	err := json.Unmarshal(b, &s)
	return s.Deadline, s.Values, err
}

// The store decodes sessions to merge them, so it has to know the session manager's codec where that is not scs's own.
func ExampleWithCodec() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithCodec(jsonCodec{}))
	defer store.Close()
	sessionManager := newManager(store)
	sessionManager.Codec = jsonCodec{}
	token := newSession(sessionManager, "name", "Ann")

	err := store.Update(context.Background(), token, func(values map[string]any) error {
		values["theme"] = "dark"
		return nil
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.GetString(ctx, "name"), sessionManager.GetString(ctx, "theme"))
	// Output: Ann dark
}

// A job that goes through all sessions begins a transaction, so that what it writes is merged with what requests write
// at the same time, and what they delete stays deleted.
func Example_iterate() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	sessionManager := newManager(store)
	newSession(sessionManager, "user", "Ann")
	newSession(sessionManager, "user", "Mallory")

	err := sessionManager.Iterate(etcdstore.Begin(context.Background()), func(ctx context.Context) error {
		if sessionManager.GetString(ctx, "user") != "Mallory" {
			return nil
		}
		return sessionManager.Destroy(ctx)
	})
	if err != nil {
		fmt.Println(err)
		return
	}

	err = sessionManager.Iterate(context.Background(), func(ctx context.Context) error {
		fmt.Println(sessionManager.GetString(ctx, "user"))
		return nil
	})
	if err != nil {
		fmt.Println(err)
	}
	// Output: Ann
}

// moving takes sessions over from an old store, each when it is first asked for.
type moving struct {
	*etcdstore.EtcdStore
	mover *etcdstore.EtcdStore // Serializable: its commit creates the session, or conflicts
	old   scs.Store
	codec scs.Codec // the session manager's
}

func (m moving) FindCtx(ctx context.Context, token string) ([]byte, bool, error) {
	b, ok, err := m.EtcdStore.FindCtx(ctx, token)
	if ok || err != nil {
		return b, ok, err
	}
	if err := m.move(etcdstore.Begin(ctx), token); err != nil {
		return nil, false, err
	}
	return m.EtcdStore.FindCtx(ctx, token) // again, so that the request's transaction has read it
}

// move does nothing if another request has moved the session meanwhile. If that one's session was even deleted since,
// the old store does not have it any more either, and what move has made is taken back.
func (m moving) move(ctx context.Context, token string) error {
	b, ok, err := m.old.Find(token)
	if !ok || err != nil {
		return err
	}
	deadline, _, err := m.codec.Decode(b)
	if err != nil {
		return err
	}
	if _, ok, err := m.mover.FindCtx(ctx, token); ok || err != nil {
		return err
	}
	err = m.mover.CommitCtx(ctx, token, b, deadline)
	if errors.Is(err, etcdstore.ErrConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, ok, err := m.old.Find(token); !ok || err != nil {
		return errors.Join(err, m.mover.DeleteCtx(ctx, token))
	}
	return m.old.Delete(token)
}

func (m moving) DeleteCtx(ctx context.Context, token string) error {
	return errors.Join(m.old.Delete(token), m.EtcdStore.DeleteCtx(ctx, token))
}

// Sessions of another store move when they are first asked for, also by many requests at once.
func Example_movingOver() {
	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client)
	defer store.Close()
	mover := etcdstore.New(client, etcdstore.WithIsolation(etcdstore.Serializable))
	defer mover.Close()
	old := memstore.NewWithCleanupInterval(0) // or redisstore.New(pool)

	sessionManager := scs.New()
	sessionManager.Store = old
	token := newSession(sessionManager, "user", "Ann")

	sessionManager.Store = moving{store, mover, old, sessionManager.Codec}
	var requests sync.WaitGroup
	for n := range 10 {
		requests.Go(func() {
			ctx, err := sessionManager.Load(etcdstore.Begin(context.Background()), token)
			if err != nil {
				fmt.Println(err)
				return
			}
			sessionManager.Put(ctx, fmt.Sprint("item", n), true)
			if _, _, err := sessionManager.Commit(ctx); err != nil {
				fmt.Println(err)
			}
		})
	}
	requests.Wait()

	ctx, _ := sessionManager.Load(context.Background(), token)
	_, inOld, _ := old.Find(token)
	fmt.Println(sessionManager.GetString(ctx, "user"), "and", len(sessionManager.Keys(ctx))-1, "items, in the old store:", inOld)
	// Output: Ann and 10 items, in the old store: false
}
