package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/namespace"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// newTestStore returns a store on a cluster of one, and a client of it without faults.
func newTestStore(t *testing.T, opts ...Option) (*EtcdStore, *clientv3.Client) {
	t.Helper()
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	s := New(cli, opts...)
	t.Cleanup(func() { mustClose(t, s) })
	return s, cli
}

func mustClose(t testing.TB, s *EtcdStore) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func mustCommit(t testing.TB, s *EtcdStore, token, data string, life time.Duration) {
	t.Helper()
	if err := s.Commit(token, []byte(data), time.Now().Add(life)); err != nil {
		t.Fatalf("Commit(%q): %v", token, err)
	}
}

// wantFound fails t unless the session holds data.
func wantFound(t testing.TB, s *EtcdStore, token, data string) {
	t.Helper()
	b, ok, err := s.Find(token)
	if err != nil || !ok || string(b) != data {
		t.Errorf("Find(%q) = %q, %v, %v; want %q", token, b, ok, err, data)
	}
}

// wantAbsent fails t if there is such a session.
func wantAbsent(t testing.TB, s *EtcdStore, token string) {
	t.Helper()
	if b, ok, err := s.Find(token); err != nil || ok || b != nil {
		t.Errorf("Find(%q) = %q, %v, %v; want none", token, b, ok, err)
	}
}

func TestStore_Contract(t *testing.T) {
	s, _ := newTestStore(t)
	wantAbsent(t, s, "a")
	if all, err := s.All(); err != nil || all == nil || len(all) != 0 {
		t.Errorf("All of nothing = %v, %v; want an empty map", all, err)
	}
	mustCommit(t, s, "a", "one", time.Hour)
	wantFound(t, s, "a", "one")
	mustCommit(t, s, "a", "two", time.Hour)
	wantFound(t, s, "a", "two")
	mustCommit(t, s, "b", "", time.Hour)
	wantFound(t, s, "b", "")
	all, err := s.All()
	if want := map[string][]byte{"a": []byte("two"), "b": {}}; err != nil || !maps.EqualFunc(all, want, bytes.Equal) {
		t.Errorf("All = %q, %v; want %q", all, err, want)
	}
	for range 2 { // deleting what is not there succeeds
		if err := s.Delete("a"); err != nil {
			t.Errorf("Delete: %v", err)
		}
		wantAbsent(t, s, "a")
	}
	wantFound(t, s, "b", "")
}

func TestStore_CtxContract(t *testing.T) {
	s, _ := newTestStore(t)
	ctx := Begin(t.Context())
	if err := s.CommitCtx(ctx, "a", []byte("one"), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if b, ok, err := s.FindCtx(ctx, "a"); err != nil || !ok || string(b) != "one" {
		t.Errorf("FindCtx = %q, %v, %v", b, ok, err)
	}
	if all, err := s.AllCtx(ctx); err != nil || len(all) != 1 {
		t.Errorf("AllCtx = %q, %v", all, err)
	}
	if err := s.DeleteCtx(ctx, "a"); err != nil {
		t.Error(err)
	}
	wantAbsent(t, s, "a")
}

// What a caller does to the slices that it passed, or was given, does not reach the store.
func TestStore_SlicesAreNotShared(t *testing.T) {
	s, _ := newTestStore(t)
	ctx := Begin(t.Context())
	b := []byte("value")
	if err := s.CommitCtx(ctx, "a", b, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	clear(b)
	got, _, err := s.FindCtx(ctx, "a")
	if err != nil || string(got) != "value" {
		t.Fatalf("Find = %q, %v", got, err)
	}
	clear(got)
	wantFound(t, s, "a", "value")
}

// The program of scs's README, with nothing but the store changed.
func TestStore_LoadAndSave(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	sessionManager := scs.New()
	sessionManager.Store = New(cli)
	mux := http.NewServeMux()
	mux.HandleFunc("/put", func(_ http.ResponseWriter, r *http.Request) {
		sessionManager.Put(r.Context(), "message", "Hello from a session!")
	})
	mux.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, sessionManager.GetString(r.Context(), "message"))
	})
	server := httptest.NewServer(sessionManager.LoadAndSave(mux))
	defer server.Close()
	browser := newBrowser(t)
	browser.get(t, server.URL+"/put")
	if got := browser.get(t, server.URL+"/get"); got.body != "Hello from a session!" {
		t.Errorf("/get = %+v", got)
	}
	if got := newBrowser(t).get(t, server.URL+"/get"); got.body != "" {
		t.Errorf("another browser's /get = %+v", got)
	}
}

// newManager returns a session manager on a store.
func newManager(s scs.Store) *scs.SessionManager {
	sm := scs.New()
	sm.Store = s
	if e, ok := s.(*EtcdStore); ok {
		sm.Codec = e.Codec()
	}
	return sm
}

// browser is an HTTP client with cookies.
type browser struct{ http.Client }

func newBrowser(t testing.TB) *browser {
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	b := &browser{http.Client{Jar: jar, Transport: &http.Transport{MaxIdleConnsPerHost: 256}}}
	t.Cleanup(b.CloseIdleConnections)
	return b
}

type page struct {
	status int
	body   string
	header http.Header
}

func (b *browser) get(t testing.TB, url string) page {
	t.Helper()
	resp, err := b.Get(url)
	if err != nil {
		t.Error(err)
		return page{}
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil {
		t.Error(err)
	}
	return page{resp.StatusCode, body.String(), resp.Header}
}

// Expiry is exact: what is found is found before it, what is not is asked for at or after it. Neither leases nor how
// long a call takes make a difference.
func TestStore_ExpiryIsExact(t *testing.T) {
	s, cli := newTestStore(t, WithTimeout(time.Minute))
	mustCommit(t, s, "connects", "x", time.Hour)
	for _, life := range []time.Duration{30 * time.Millisecond, 400 * time.Millisecond, 1100 * time.Millisecond} {
		token := life.String()
		expiry := watchLife(t, s, token, life, func() {})
		resp, err := cli.Get(t.Context(), defaultPrefix+token)
		if err != nil {
			t.Fatal(err)
		}
		// Leases outlast their sessions by more than a second, after which a key may be gone.
		if len(resp.Kvs) == 0 && time.Since(expiry) < time.Second {
			t.Error("the key was gone when its session expired, so its lease decided")
		}
	}
}

// watchLife commits a session, has something happen, and looks at the session until it has expired. Where the machine was
// so slow that the session was never seen, that shows nothing, and it is done again with a longer life.
func watchLife(t *testing.T, s *EtcdStore, token string, life time.Duration, meanwhile func()) (expiry time.Time) {
	t.Helper()
	for ; life < patience; life *= 2 {
		expiry = time.Now().Add(life)
		if err := s.Commit(token, []byte("x"), expiry); err != nil {
			t.Fatal(err)
		}
		meanwhile()
		if watchExpiry(t, s, token, expiry) {
			return expiry
		}
	}
	t.Fatalf("a session of %v was never seen", life/2)
	return expiry
}

// watchExpiry looks at a session until it has expired, and reports whether it has seen it before that.
func watchExpiry(t *testing.T, s *EtcdStore, token string, expiry time.Time) (seen bool) {
	t.Helper()
	expiry = expiry.Truncate(time.Millisecond)
	for found := true; found; {
		before := time.Now()
		_, found1, err1 := s.Find(token)
		all, err2 := s.All()
		after := time.Now()
		_, found2 := all[token]
		found = found1 || found2
		seen = seen || found1 && found2
		switch {
		case err1 != nil || err2 != nil:
			t.Fatal(err1, err2)
		case found && !before.Before(expiry):
			t.Fatalf("found %v after its expiry", before.Sub(expiry))
		case (!found1 || !found2) && after.Before(expiry):
			t.Fatalf("gone %v before its expiry", expiry.Sub(after))
		}
	}
	return seen
}

func TestStore_ExpiryInThePast(t *testing.T) {
	s, cli := newTestStore(t)
	for _, expiry := range []time.Time{{}, time.Unix(0, 0), time.Unix(-1, 0), time.Now().Add(-time.Second), time.Now()} {
		mustCommit(t, s, "a", "x", time.Hour)
		if err := s.Commit("a", []byte("y"), expiry); err != nil {
			t.Errorf("Commit until %v: %v", expiry, err)
		}
		wantAbsent(t, s, "a")
		if keys := etcdtest.Keys(t, cli, defaultPrefix+"a"); len(keys) != 0 {
			t.Errorf("left behind: %q", keys)
		}
		if err := s.Commit("never", []byte("y"), expiry); err != nil {
			t.Errorf("Commit of a new session until %v: %v", expiry, err)
		}
		wantAbsent(t, s, "never")
	}
}

func TestStore_ExpiryFarAhead(t *testing.T) {
	s, cli := newTestStore(t)
	for i, expiry := range []time.Time{
		time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		time.Unix(1<<60, 0),
		time.Now().AddDate(300, 0, 0),
	} {
		token := fmt.Sprint("t", i)
		for range 3 {
			if err := s.Commit(token, []byte("x"), expiry); err != nil {
				t.Fatalf("Commit until %v: %v", expiry, err)
			}
		}
		wantFound(t, s, token, "x")
	}
	if n := len(etcdtest.Leases(t, cli)); n > 2 {
		t.Errorf("%d leases for sessions that never end", n)
	}
}

// Leases are reset to their full TTL when the leader changes, and run on while no member does. Neither moves an
// expiry.
func TestStore_ExpiryAcrossLeaderChangeAndRestart(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{Members: 3})
	s := New(c.Client(t), WithTimeout(time.Minute))
	defer mustClose(t, s)
	mustCommit(t, s, "stays", "x", time.Hour)
	watchLife(t, s, "moved", 2*time.Second, func() { c.MoveLeader(t) })
	watchLife(t, s, "restarted", 2*time.Second, func() { c.RestartAll(t) })
	wantFound(t, s, "stays", "x")
}

// What the store decodes, merges and encodes goes through the codec that it was given.
func TestStore_CustomCodec(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).loadAndSaved, WithCodec(jsonCodec{}), WithTimeout(time.Minute))
	s.manager.Codec = jsonCodec{}
	h := &stop{make(chan struct{}, 1), make(chan struct{})}
	s.mux.HandleFunc("/quick", func(_ http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), r.FormValue("key"), "quick")
	})
	s.mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), r.FormValue("key"), "slow")
		h.stay(r)
	})
	b := s.login(t)
	token := b.token(t, s)
	// slow makes a request for which others go on between its read and its commit.
	slow := func(key string, others func()) response {
		answer := b.begin(t, s, "/slow?key="+key)
		h.entered(t, answer)
		others()
		h.goOn <- struct{}{}
		return <-answer
	}
	quick := func(key string) func() {
		return func() { wantOK(t, s.get(t, b, "/quick?key="+key), "") }
	}
	count := func() {
		err := s.store.Update(t.Context(), token, func(values map[string]any) error {
			n, _ := values["n"].(float64) // as JSON has it
			values["n"] = int(n) + 1
			return nil
		})
		if err != nil {
			t.Errorf("Update: %v", err)
		}
	}
	wantOK(t, slow("a", quick("b")), "")
	if got := slow("same", quick("same")); got.status != http.StatusConflict {
		t.Errorf("two requests set the same key: %d %q, want 409", got.status, got.body)
	}
	count()
	wantOK(t, slow("c", count), "")
	want := map[string]any{"user": "alice", "a": "slow", "b": "quick", "same": "quick", "c": "slow", "n": 2.0}
	if got := s.values(t, token); !maps.Equal(got, want) {
		t.Errorf("the session holds %v, want %v", got, want)
	}
}

// barePut stores a session as scs's own etcdstore does.
func barePut(t *testing.T, cli *clientv3.Client, key string, data []byte, ttl int64) clientv3.LeaseID {
	t.Helper()
	lease, err := cli.Grant(t.Context(), ttl)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(t.Context(), key, string(data), clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	return lease.ID
}

func gobSession(t testing.TB, deadline time.Time, values map[string]any) []byte {
	t.Helper()
	b, err := scs.GobCodec{}.Encode(deadline, values)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestStore_BareSessions(t *testing.T) {
	s, cli := newTestStore(t)
	deadline := time.Now().Add(time.Hour).Round(0)
	bare := gobSession(t, deadline, map[string]any{"n": 1})
	for _, token := range []string{"read", "updated", "committed", "deleted"} {
		barePut(t, cli, defaultPrefix+token, bare, 3600)
	}
	wantFound(t, s, "read", string(bare))
	if all, err := s.All(); err != nil || len(all) != 4 || !bytes.Equal(all["read"], bare) {
		t.Errorf("All = %q, %v", all, err)
	}

	if err := s.Update(t.Context(), "updated", func(v map[string]any) error { v["n"] = v["n"].(int) + 1; return nil }); err != nil {
		t.Errorf("Update: %v", err)
	}
	raw, err := cli.Get(t.Context(), defaultPrefix+"updated")
	if err != nil || len(raw.Kvs) != 1 {
		t.Fatal(raw, err)
	}
	if _, kind := record.Decode(raw.Kvs[0].Value); kind != record.KindRecord {
		t.Error("an update did not upgrade the session")
	}
	// What the old store makes of our value, as it lies in etcd.
	if d, v, err := (scs.GobCodec{}).Decode(raw.Kvs[0].Value); err != nil || !d.Equal(deadline) || v["n"] != 2 {
		t.Errorf("scs.GobCodec of a stored value = %v, %v, %v", d, v, err)
	}
	if left := s.decoder.Version(raw.Kvs, 0).Value.Expiry().Since(s.clock.Now()); left > time.Hour || left < 50*time.Minute {
		t.Errorf("an update did not keep the lease's end as the expiry: %v left", left)
	}

	ctx := Begin(t.Context())
	if _, ok, err := s.FindCtx(ctx, "committed"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	barePut(t, cli, defaultPrefix+"committed", gobSession(t, deadline, map[string]any{"n": 1, "theirs": 1}), 3600)
	if err := s.CommitCtx(ctx, "committed", gobSession(t, deadline, map[string]any{"n": 1, "ours": 1}), deadline); err != nil {
		t.Fatal(err)
	}
	wantValues(t, s, "committed", map[string]any{"n": 1, "theirs": 1, "ours": 1})

	if err := s.Delete("deleted"); err != nil {
		t.Error(err)
	}
	wantAbsent(t, s, "deleted")
}

// wantValues fails t unless the session holds values.
func wantValues(t testing.TB, s *EtcdStore, token string, want map[string]any) {
	t.Helper()
	b, ok, err := s.Find(token)
	if err != nil || !ok {
		t.Errorf("Find(%q) = %v, %v", token, ok, err)
		return
	}
	if _, got, err := (scs.GobCodec{}).Decode(b); err != nil || !maps.Equal(got, want) {
		t.Errorf("session %q holds %v, %v; want %v", token, got, err, want)
	}
}

// Stores see their own sessions only, also where one prefix begins with the other, whatever the tokens.
func TestStore_Prefixes(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	outer, inner := New(cli), NewWithPrefix(cli, "scs:session:1:")
	bare, letter := NewWithPrefix(cli, ""), NewWithPrefix(cli, "scs:session:a")
	mustCommit(t, outer, "aa", "outer", time.Hour)
	mustCommit(t, inner, "aa", "inner", time.Hour)
	mustCommit(t, letter, "b", "letter", time.Hour)
	wantFound(t, outer, "aa", "outer")
	wantFound(t, inner, "aa", "inner")

	// The inner session under the name that it has in the outer store.
	wantAbsent(t, outer, "1:aa")
	wantAbsent(t, outer, "ab")
	wantAbsent(t, bare, "scs:session:aa")
	if err := outer.Commit("1:aa", []byte("x"), time.Now().Add(time.Hour)); !errors.Is(err, ErrInvalidToken) {
		t.Errorf("Commit over another store's session: %v", err)
	}
	if err := outer.CommitCtx(Begin(t.Context()), "1:aa", []byte("x"), time.Now().Add(time.Hour)); !errors.Is(err, ErrInvalidToken) {
		t.Errorf("CommitCtx over another store's session: %v", err)
	}
	if err := outer.Update(t.Context(), "1:aa", func(map[string]any) error { return nil }); !errors.Is(err, ErrSessionGone) {
		t.Errorf("Update of another store's session: %v", err)
	}
	if err := outer.Delete("1:aa"); err != nil {
		t.Errorf("Delete of another store's session: %v", err)
	}
	wantFound(t, inner, "aa", "inner")
	for _, c := range []struct {
		store *EtcdStore
		want  []string
	}{{outer, []string{"aa"}}, {inner, []string{"aa"}}, {letter, []string{"b"}}, {bare, nil}} {
		all, err := c.store.All()
		if got := slices.Sorted(maps.Keys(all)); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("All under %q = %q, %v; want %q", c.store.prefix, got, err, c.want)
		}
	}
	// A session of the old store, under the inner prefix.
	barePut(t, cli, "scs:session:1:old", []byte("old"), 3600)
	wantFound(t, inner, "old", "old")
	wantAbsent(t, outer, "1:old")
	for _, s := range []*EtcdStore{outer, inner, letter, bare} {
		mustClose(t, s)
	}
	wantFound(t, New(cli), "aa", "outer")
}

func TestStore_Tokens(t *testing.T) {
	s, cli := newTestStore(t)
	for _, token := range []string{"", "~", "~lease/1", "\x7f", "\xff\xfe", "é", strings.Repeat("a", 513)} {
		wantAbsent(t, s, token)
		if err := s.Delete(token); err != nil {
			t.Errorf("Delete(%q): %v", token, err)
		}
		if err := s.Commit(token, []byte("x"), time.Now().Add(time.Hour)); !errors.Is(err, ErrInvalidToken) {
			t.Errorf("Commit(%q) = %v; want ErrInvalidToken", token, err)
		}
		if err := s.Update(t.Context(), token, func(map[string]any) error { return nil }); !errors.Is(err, ErrSessionGone) {
			t.Errorf("Update(%q) = %v; want ErrSessionGone", token, err)
		}
	}
	if keys := etcdtest.Keys(t, cli, ""); len(keys) != 0 {
		t.Errorf("bad tokens left keys: %q", keys)
	}
	odd := []string{"\x00", "\x00\xff", "a\x00b", "a~b", "}", " ", "\n", "a/../b", strings.Repeat("a", 512), "a", "aa"}
	for i, token := range odd {
		mustCommit(t, s, token, fmt.Sprint(i), time.Hour)
	}
	for i, token := range odd {
		wantFound(t, s, token, fmt.Sprint(i))
	}
	if all, err := s.All(); err != nil || len(all) != len(odd) {
		t.Errorf("All found %d of %d odd tokens, %v", len(all), len(odd), err)
	}
}

// A listing of several pages is of one revision, and starts again where that is compacted between them.
func TestStore_AllPages(t *testing.T) {
	const n = 1100 // more than two pages
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	cli, admin := c.Client(t, etcdtest.WithFaults(faults)), c.Client(t)
	s := New(cli)
	defer mustClose(t, s)
	for i := 0; i < n; i += 100 {
		var puts []clientv3.Op
		for j := range 100 {
			puts = append(puts, clientv3.OpPut(fmt.Sprintf("%s%05d", defaultPrefix, i+j), "x"))
		}
		if _, err := admin.Txn(t.Context()).Then(puts...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	first, last := "00000", fmt.Sprintf("%05d", n-1)
	moved := defaultPrefix + "moved"
	betweenPages := func(act func()) {
		pages := 0
		faults.Intercept(func(method string, _ any) etcdtest.Fate {
			if method != "/etcdserverpb.KV/Range" {
				return etcdtest.Fate{}
			}
			if pages++; pages == 2 {
				act()
			}
			return etcdtest.Fate{}
		})
	}

	betweenPages(func() { // between pages a session goes from the last page to the first
		_, err := admin.Txn(t.Context()).Then(clientv3.OpDelete(defaultPrefix+last), clientv3.OpPut(defaultPrefix+first+"0", "x")).Commit()
		if err != nil {
			t.Error(err)
		}
	})
	all, err := s.All()
	if err != nil || len(all) != n || all[last] == nil {
		t.Errorf("All = %d sessions, %v; want the %d of one revision", len(all), err, n)
	}

	betweenPages(func() {
		put, err := admin.Put(t.Context(), moved, "x")
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := admin.Compact(t.Context(), put.Header.Revision); err != nil {
			t.Error(err)
		}
	})
	all, err = s.All()
	if err != nil || len(all) != n+1 || all["moved"] == nil {
		t.Errorf("All across a compaction = %d sessions, %v; want the %d that there are by now", len(all), err, n+1)
	}
}

// Commit and Delete are one Txn each that compares the mod revision, with the lease in the same Txn.
func TestStore_WritesAreComparedTxns(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{})
	faults := &etcdtest.Faults{}
	s := New(c.Client(t, etcdtest.WithFaults(faults)))
	defer mustClose(t, s)
	ctx := Begin(t.Context())
	mustCommit(t, s, "first", "x", time.Hour) // grants the lease
	var writes []*etcdserverpb.TxnRequest
	faults.Intercept(func(method string, req any) etcdtest.Fate {
		if r, ok := req.(*etcdserverpb.TxnRequest); ok {
			writes = append(writes, r)
		} else if strings.HasPrefix(method, "/etcdserverpb.KV/") {
			t.Errorf("a call other than a Txn: %s", method)
		}
		return etcdtest.Fate{}
	})
	expiry := time.Now().Add(time.Hour)
	for i := range 2 { // a create, and an update that keeps the lease
		if err := s.CommitCtx(ctx, "a", []byte{byte(i)}, expiry); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.DeleteCtx(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if len(writes) != 3 {
		t.Fatalf("%d writes for two commits and a delete", len(writes))
	}
	for i, w := range writes {
		cmp := w.Compare[0]
		if string(cmp.Key) != defaultPrefix+"a" || cmp.Target != etcdserverpb.Compare_MOD || cmp.Result != etcdserverpb.Compare_EQUAL || (cmp.GetModRevision() == 0) != (i == 0) {
			t.Errorf("write %d compares %v", i, cmp)
		}
	}
	if put := writes[0].Success[0].GetRequestPut(); put == nil || put.Lease == 0 {
		t.Errorf("the create does not attach a lease: %v", writes[0].Success)
	}
	if put := writes[1].Success[0].GetRequestPut(); put == nil || !put.IgnoreLease && put.Lease != writes[0].Success[0].GetRequestPut().Lease {
		t.Errorf("the update does not keep the lease: %v", writes[1].Success)
	}
	if writes[2].Success[0].GetRequestDeleteRange() == nil {
		t.Errorf("the delete is not one: %v", writes[2].Success)
	}
}

func TestStore_TooLarge(t *testing.T) {
	s, cli := newTestStore(t)
	mustCommit(t, s, "a", "small", time.Hour)
	before := etcdtest.Keys(t, cli, "")
	for _, size := range []int{1<<20 + 1<<19, 4 << 20} { // above etcd's limit, and above the client's
		for _, token := range []string{"a", "new"} {
			err := s.Commit(token, bytes.Repeat([]byte("secret"), size/6), time.Now().Add(time.Hour))
			if !errors.Is(err, ErrTooLarge) || strings.Contains(err.Error(), "secret") {
				t.Errorf("Commit of %d bytes: %v; want ErrTooLarge", size, err)
			}
		}
	}
	wantFound(t, s, "a", "small")
	wantAbsent(t, s, "new")
	if after := etcdtest.Keys(t, cli, ""); !slices.Equal(before, after) {
		t.Errorf("keys before %q, after %q", before, after)
	}
	large := strings.Repeat("x", 1<<20)
	mustCommit(t, s, "a", large, time.Hour)
	wantFound(t, s, "a", large)
}

func TestStore_Closed(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	s := New(cli)
	mustCommit(t, s, "a", "x", time.Hour)
	mustClose(t, s)
	mustClose(t, s)
	_, _, findErr := s.Find("a")
	_, allErr := s.All()
	for call, err := range map[string]error{
		"Find": findErr, "All": allErr,
		"Commit": s.Commit("a", nil, time.Now().Add(time.Hour)),
		"Delete": s.Delete("a"),
		"Update": s.Update(t.Context(), "a", func(map[string]any) error { return nil }),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s on a closed store: %v", call, err)
		}
	}
	if _, err := cli.Get(t.Context(), "a"); err != nil {
		t.Errorf("Close has closed the client: %v", err)
	}
	wantFound(t, New(cli), "a", "x")
}

// A store that was never closed, and one that was closed in the middle of calls, leave nothing behind and lose nothing:
// TestMain looks for goroutines.
func TestStore_CloseDuringCalls(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	s := New(cli, WithTimeout(time.Minute))
	var mu sync.Mutex
	var committed []string
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				token := fmt.Sprint("w", w, "i", i)
				err := s.Commit(token, []byte("x"), time.Now().Add(time.Hour))
				if errors.Is(err, ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				committed = append(committed, token)
				mu.Unlock()
			}
		})
	}
	etcdtest.Eventually(t, patience, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(committed) > 100
	}, "no commits")
	mustClose(t, s)
	wg.Wait()
	check := New(cli, WithTimeout(time.Minute))
	for _, token := range committed {
		wantFound(t, check, token, "x")
	}
}

func TestStore_CancelledContext(t *testing.T) {
	s, _ := newTestStore(t)
	mustCommit(t, s, "a", "x", time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, _, findErr := s.FindCtx(ctx, "a")
	_, allErr := s.AllCtx(ctx)
	for call, err := range map[string]error{
		"Find": findErr, "All": allErr,
		"Commit": s.CommitCtx(ctx, "a", []byte("y"), time.Now().Add(time.Hour)),
		"Delete": s.DeleteCtx(ctx, "a"),
		"Update": s.Update(ctx, "a", func(v map[string]any) error { v["x"] = 1; return nil }),
	} {
		if !errors.Is(err, context.Canceled) || errors.Is(err, ErrOutcomeUnknown) || !strings.HasPrefix(err.Error(), "etcdstore: ") {
			t.Errorf("%s with a cancelled context: %v", call, err)
		}
	}
	wantFound(t, s, "a", "x")
}

// Nothing listens there: every call returns within its time, with an error that says so and names no token.
func TestStore_NoEtcd(t *testing.T) {
	s := New(unreachable(t), WithTimeout(300*time.Millisecond))
	_, _, findErr := s.Find("token")
	_, allErr := s.All()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	for call, err := range map[string]error{
		"Find": findErr, "All": allErr,
		"Commit":    s.Commit("token", []byte("value"), time.Now().Add(time.Hour)),
		"CommitCtx": s.CommitCtx(Begin(ctx), "token", []byte("value"), time.Now().Add(time.Hour)),
		"Delete":    s.Delete("token"),
		"Update":    s.Update(t.Context(), "token", func(map[string]any) error { return nil }),
	} {
		if err == nil {
			t.Errorf("%s: no error", call)
			continue
		}
		for _, leak := range []string{"token", "value"} {
			if strings.Contains(err.Error(), leak) {
				t.Errorf("%s: the message names the %s: %v", call, leak, err)
			}
		}
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrOutcomeUnknown) || !etcd.Unavailable(err) {
			t.Errorf("%s: %v", call, err)
		}
	}
	mustClose(t, s)
}

func TestStore_OutOfSpace(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{QuotaBytes: 4 << 20})
	cli := c.Client(t)
	s := New(cli)
	defer mustClose(t, s)
	mustCommit(t, s, "a", "before", time.Hour)
	mustCommit(t, s, "b", "before", time.Hour)
	filler := strings.Repeat("x", 256<<10)
	for i := 0; ; i++ {
		if _, err := cli.Put(t.Context(), fmt.Sprint("filler", i), filler); errors.Is(err, rpctypes.ErrNoSpace) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Commit("a", []byte("full"), time.Now().Add(time.Hour)); !errors.Is(err, rpctypes.ErrNoSpace) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("Commit: %v; want etcd's ErrNoSpace", err)
	}
	if err := s.Commit("new", []byte("full"), time.Now().Add(time.Hour)); !errors.Is(err, rpctypes.ErrNoSpace) || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("Commit of a new session: %v; want etcd's ErrNoSpace", err)
	}
	wantFound(t, s, "a", "before")
	wantAbsent(t, s, "new")
	if err := s.Delete("b"); err != nil {
		t.Errorf("Delete: %v", err)
	}
	wantAbsent(t, s, "b")
}

// On a client whose KV, Lease and Watcher are wrapped all is as without, and under the wrappers' prefix.
func TestStore_Namespace(t *testing.T) {
	sites := newSites(t, 2, WithTimeout(time.Minute))
	for _, s := range sites {
		cli := s.client
		cli.KV = namespace.NewKV(cli.KV, "app/")
		cli.Lease = namespace.NewLease(cli.Lease, "app/")
		cli.Watcher = namespace.NewWatcher(cli.Watcher, "app/")
	}
	s, admin := sites[0].store, sites[0].admin
	commitMany(t, s, 300)
	conflict(t, s)

	// A lock that is waited for takes all three.
	h := sites[0].handleStop("/stop")
	sites[1].handleSet("/set")
	b := sites[0].login(t)
	b.Timeout = patience
	stopped := b.begin(t, sites[0], "/stop")
	h.entered(t, stopped)
	waiting := b.begin(t, sites[1], "/set")
	etcdtest.Eventually(t, patience, func() bool {
		return len(etcdtest.Keys(t, admin, "app/"+lockPrefix)) == 2 && sites[1].watches.Load() == 1
	}, "the request does not wait")
	close(h.goOn)
	wantOK(t, <-stopped, "/stop")
	wantOK(t, <-waiting, "/set")

	all, err := s.All()
	if err != nil || len(all) != 302 {
		t.Errorf("All = %d sessions, %v", len(all), err)
	}
	keys := etcdtest.Keys(t, admin, "")
	if len(keys) <= len(all) {
		t.Errorf("%d keys for %d sessions and their leases", len(keys), len(all))
	}
	for _, key := range keys {
		if !strings.HasPrefix(key, "app/"+defaultPrefix) {
			t.Errorf("a key outside of the namespace: %q", key)
		}
	}
	for token := range all {
		if err := s.Delete(token); err != nil {
			t.Error(err)
		}
	}
	for _, s := range sites {
		s.close()
	}
	if keys, leases := etcdtest.Keys(t, admin, ""), etcdtest.Leases(t, admin); len(keys) != 0 || len(leases) != 0 {
		t.Errorf("left behind: %q, %v", keys, leases)
	}
}

func TestStore_TLS(t *testing.T) {
	c := etcdtest.New(t, etcdtest.Config{TLS: true})
	s := New(c.Client(t))
	commitMany(t, s, 50)
	conflict(t, s)
	mustClose(t, s)
}

// commitMany commits n sessions at the same time.
func commitMany(t testing.TB, s *EtcdStore, n int) {
	t.Helper()
	errs := make(chan error)
	for i := range n {
		go func() { errs <- s.Commit(fmt.Sprint("t", i), []byte("x"), time.Now().Add(time.Hour)) }()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// conflict has two transactions change the same key, and different ones.
func conflict(t testing.TB, s *EtcdStore) {
	t.Helper()
	deadline := time.Now().Add(time.Hour)
	session := func(values map[string]any) []byte { return gobSession(t, deadline, values) }
	if err := s.Commit("conflict", session(map[string]any{"n": 1}), deadline); err != nil {
		t.Fatal(err)
	}
	ctx := []context.Context{Begin(t.Context()), Begin(t.Context()), Begin(t.Context())}
	for _, ctx := range ctx {
		if _, ok, err := s.FindCtx(ctx, "conflict"); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	if err := s.CommitCtx(ctx[0], "conflict", session(map[string]any{"n": 2}), deadline); err != nil {
		t.Error(err)
	}
	if err := s.CommitCtx(ctx[1], "conflict", session(map[string]any{"n": 1, "m": 1}), deadline); err != nil {
		t.Error(err)
	}
	if err := s.CommitCtx(ctx[2], "conflict", session(map[string]any{"n": 3}), deadline); !errors.Is(err, ErrConflict) {
		t.Errorf("a commit that changes the same key: %v; want ErrConflict", err)
	}
	wantValues(t, s, "conflict", map[string]any{"n": 2, "m": 1})
}
