package etcdstore_test

import (
	"context"
	"encoding/gob"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/alexedwards/scs/v2"
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

// A counter: what two requests added, each to what it had read, adds up.
func ExampleWithResolver_counter() {
	sum := func(c etcdstore.Conflict) (any, error) {
		base, _ := c.Base.(int) // 0 where the key is absent
		ours, isInt := c.Ours.(int)
		theirs, areInts := c.Theirs.(int)
		if !isInt || !areInts {
			return nil, etcdstore.ErrConflict
		}
		return ours + theirs - base, nil
	}

	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(sum))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "visits", 1)

	first, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	second, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	for _, ctx := range []context.Context{first, second} {
		sessionManager.Put(ctx, "visits", sessionManager.GetInt(ctx, "visits")+1)
		if _, _, err := sessionManager.Commit(ctx); err != nil {
			fmt.Println(err)
			return
		}
	}

	now, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.GetInt(now, "visits"))
	// Output: 3
}

// A set: what either request added is in it, and what either removed is not.
func ExampleWithResolver_set() {
	gob.Register([]string{})
	unite := func(c etcdstore.Conflict) (any, error) {
		base, _ := c.Base.([]string) // nil where the key is absent
		ours, _ := c.Ours.([]string)
		theirs, _ := c.Theirs.([]string)
		var set []string
		for _, s := range slices.Concat(ours, theirs) {
			kept := slices.Contains(ours, s) && slices.Contains(theirs, s)
			if (kept || !slices.Contains(base, s)) && !slices.Contains(set, s) {
				set = append(set, s)
			}
		}
		return set, nil
	}

	client, stop := startEtcd()
	defer stop()
	store := etcdstore.New(client, etcdstore.WithResolver(unite))
	defer store.Close()
	sessionManager := newManager(store)
	token := newSession(sessionManager, "cart", []string{"apple", "bread"})

	first, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	second, _ := sessionManager.Load(etcdstore.Begin(context.Background()), token)
	sessionManager.Put(first, "cart", []string{"apple", "bread", "cheese"})
	sessionManager.Put(second, "cart", []string{"bread", "dates"})
	for _, ctx := range []context.Context{first, second} {
		if _, _, err := sessionManager.Commit(ctx); err != nil {
			fmt.Println(err)
			return
		}
	}

	now, _ := sessionManager.Load(context.Background(), token)
	fmt.Println(sessionManager.Get(now, "cart"))
	// Output: [bread dates cheese]
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
