package etcdstore

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"net/http"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// What the resolvers for usual kinds of values make of a conflict, and what they leave to be one.
func TestResolvers(t *testing.T) {
	type points int
	type any3 = [3]any // base, ours, theirs
	day := func(n int) time.Time { return day0.AddDate(0, 0, n) }
	refuse := errors.New("refused")
	for name, c := range map[string]struct {
		resolver Resolver
		of       any3
		want     any // nil: the conflict stands
	}{
		"sum of numbers":            {Sum, any3{1, 3, 5}, 7},
		"sum of own numbers":        {Sum, any3{points(1), points(3), points(5)}, points(7)},
		"sum of floats":             {Sum, any3{1.5, 2.0, 2.5}, 3.0},
		"sum of unsigned, less":     {Sum, any3{uint8(5), uint8(4), uint8(3)}, uint8(2)},
		"sum without a base":        {Sum, any3{nil, 3, 5}, 8},
		"sum where one was removed": {Sum, any3{4, nil, 5}, 1},
		"sum of texts":              {Sum, any3{"a", "b", "c"}, nil},
		"sum of different types":    {Sum, any3{1, 2, int64(3)}, nil},

		"latest time, ours":         {Latest, any3{day(0), day(2), day(1)}, day(2)},
		"latest time, theirs":       {Latest, any3{day(0), day(1), day(2)}, day(2)},
		"latest of numbers":         {Latest, any3{1, 5, 3}, 5},
		"latest of unsigned":        {Latest, any3{uint(1), uint(2), uint(3)}, uint(3)},
		"latest of floats":          {Latest, any3{1.0, 2.5, 2.0}, 2.5},
		"latest of texts":           {Latest, any3{"a", "b", "c"}, "c"},
		"latest, ours removed":      {Latest, any3{1, nil, 3}, 3},
		"latest, theirs removed":    {Latest, any3{1, 2, nil}, 2},
		"latest of different types": {Latest, any3{1, day(1), 2}, nil},
		"latest of two types":       {Latest, any3{1, 2, "3"}, nil},
		"latest of slices":          {Latest, any3{nil, []int{1}, []int{2}}, nil},

		"union":                   {Union, any3{[]string{"a", "b"}, []string{"a", "b", "c"}, []string{"b", "d"}}, []string{"b", "d", "c"}},
		"union of what both add":  {Union, any3{[]string{}, []string{"x", "y"}, []string{"x"}}, []string{"x", "y"}},
		"union without a base":    {Union, any3{nil, []int{1}, []int{2}}, []int{2, 1}},
		"union, removed by both":  {Union, any3{[]int{1, 2}, []int{2, 3}, []int{2}}, []int{2, 3}},
		"union, all removed":      {Union, any3{[]int{1, 2}, nil, []int{1, 2, 3}}, []int{3}},
		"union of structures":     {Union, any3{[]any3{}, []any3{{1}}, []any3{{1}, {2}}}, []any3{{1}, {2}}},
		"union of different ones": {Union, any3{[]int{}, []int{1}, []string{"a"}}, nil},
		"union of numbers":        {Union, any3{1, 2, 3}, nil},

		"by key":                 {ByKey(map[string]Resolver{"k": Sum}), any3{1, 2, 3}, 4},
		"by another key":         {ByKey(map[string]Resolver{"other": Sum}), any3{1, 2, 3}, nil},
		"by key, without one":    {ByKey(map[string]Resolver{"k": nil}), any3{1, 2, 3}, nil},
		"by key, that leaves it": {ByKey(map[string]Resolver{"k": Union}), any3{1, 2, 3}, nil},
	} {
		got, err := c.resolver(Conflict{Key: "k", Base: c.of[0], Ours: c.of[1], Theirs: c.of[2]})
		var conflict *ConflictError
		switch {
		case c.want == nil:
			if !errors.As(err, &conflict) || !slices.Equal(conflict.Keys, []string{"k"}) {
				t.Errorf("%s: %v, %v; want the conflict to stand", name, got, err)
			}
		case err != nil || !reflect.DeepEqual(got, c.want):
			t.Errorf("%s: %v, %v; want %v", name, got, err, c.want)
		}
	}
	if _, err := ByKey(map[string]Resolver{"k": func(Conflict) (any, error) { return nil, refuse }})(Conflict{Key: "k"}); err != refuse { //nolint:errorlint // as it is
		t.Errorf("an error of a key's resolver: %v", err)
	}
}

// A message that is shown once is shown once, however many requests come at the same time, and none of them fails.
func TestResolvers_Flash(t *testing.T) {
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).loadAndSaved,
		WithResolver(ByKey(map[string]Resolver{"flash": KeepTheirs, "seen": Sum})))
	var gate sync.WaitGroup
	gate.Add(6)
	var shown atomic.Int32
	s.mux.HandleFunc("/flash", func(_ http.ResponseWriter, r *http.Request) { s.manager.Put(r.Context(), "flash", "saved") })
	s.mux.HandleFunc("/page", func(_ http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), "seen", s.manager.GetInt(r.Context(), "seen")+1)
		gate.Done()
		gate.Wait()
		if s.manager.PopString(r.Context(), "flash") != "" {
			shown.Add(1)
		}
	})
	b := s.login(t)
	wantOK(t, s.get(t, b, "/flash"), "")
	var pages sync.WaitGroup
	for range 6 {
		pages.Go(func() { wantOK(t, s.get(t, b, "/page"), "") })
	}
	pages.Wait()
	got := s.values(t, b.token(t, s))
	if got["flash"] != nil || got["seen"] != 6 {
		t.Errorf("the session holds %v; the message was read by %d", got, shown.Load())
	}
}

// Two requests that change entries of one map (a cart under one key) both succeed.
func TestMerge_CartAsOneMap(t *testing.T) {
	gob.Register(map[string]int{})
	s := newSite(t, etcdtest.New(t, etcdtest.Config{}), (*site).loadAndSaved)
	var gate sync.WaitGroup
	gate.Add(20)
	s.mux.HandleFunc("/empty", func(_ http.ResponseWriter, r *http.Request) {
		s.manager.Put(r.Context(), "cart", map[string]int{})
	})
	s.mux.HandleFunc("/add", func(_ http.ResponseWriter, r *http.Request) {
		cart := make(map[string]int)
		for item, n := range s.manager.Get(r.Context(), "cart").(map[string]int) {
			cart[item] = n
		}
		cart[r.FormValue("item")]++
		gate.Done()
		gate.Wait()
		s.manager.Put(r.Context(), "cart", cart)
	})
	b := s.login(t)
	wantOK(t, s.get(t, b, "/empty"), "")
	var adds sync.WaitGroup
	for i := range 20 {
		adds.Go(func() { wantOK(t, s.get(t, b, fmt.Sprint("/add?item=", i)), "") })
	}
	adds.Wait()
	if cart, _ := s.values(t, b.token(t, s))["cart"].(map[string]int); len(cart) != 20 {
		t.Errorf("%d of 20 adds are in the cart", len(cart))
	}
}

// A session that ends while a request of it is under way goes on with the request's commit; one that was deleted does not.
func TestCommit_AfterExpiryInFlight(t *testing.T) {
	s, w, cli := newWallStore(t)
	data := func(n int) []byte { return gobSession(t, day0, map[string]any{"n": n}) }
	// expire makes a session, and has it end after a request has read it.
	expire := func(token string) context.Context {
		if err := s.Commit(token, data(1), w.now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		ctx := Begin(t.Context())
		if _, ok, err := s.FindCtx(ctx, token); !ok || err != nil {
			t.Fatal(ok, err)
		}
		w.step(61 * time.Second)
		wantAbsent(t, s, token)
		return ctx
	}
	ctx := expire("a")
	before := pair(t, cli, "a")
	if err := s.CommitCtx(ctx, "a", data(2), w.now().Add(time.Hour)); err != nil {
		t.Errorf("after the expiry: %v", err)
	}
	wantFound(t, s, "a", string(data(2)))
	if after := pair(t, cli, "a"); after.CreateRevision != before.CreateRevision {
		t.Error("the session was made anew")
	}
	ctx = expire("b")
	if err := s.Delete("b"); err != nil {
		t.Fatal(err)
	}
	if err := s.CommitCtx(ctx, "b", data(2), w.now().Add(time.Hour)); !errors.Is(err, ErrSessionGone) {
		t.Errorf("after a logout: %v", err)
	}
	wantAbsent(t, s, "b")
}
