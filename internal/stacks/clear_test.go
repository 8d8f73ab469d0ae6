package stacks

import (
	"context"
	"testing"

	"github.com/alexedwards/scs/v2"
	"github.com/seed210be38d/etcdstore"
)

// emptying is a way in which an application empties a session.
type emptying func(*app, context.Context)

var emptyings = map[string]emptying{
	"Clear": func(a *app, ctx context.Context) {
		if err := a.sm.Clear(ctx); err != nil {
			a.Error(err)
		}
	},
	"Remove": func(a *app, ctx context.Context) {
		for _, key := range a.sm.Keys(ctx) {
			a.sm.Remove(ctx, key)
		}
	},
	"Pop": func(a *app, ctx context.Context) {
		for _, key := range a.sm.Keys(ctx) {
			a.sm.Pop(ctx, key)
		}
	},
}

// empties runs f for each way to empty a session, and for each of the contexts.
func empties(t *testing.T, contexts []testContext, f func(*app, context.Context, emptying)) {
	t.Helper()
	a := newApp(t)
	for name, empty := range emptyings {
		t.Run(name, func(t *testing.T) {
			a.with(t).each(contexts, func(a *app, ctx context.Context) { f(a, ctx, empty) })
		})
	}
}

// Where the context says which request it is, a session that was emptied is validated as any other.
func TestClear(t *testing.T) {
	empties(t, marked, func(a *app, ctx context.Context, empty emptying) {
		token := a.session(values{"k": "base"})
		own := a.load(ctx, token)
		empty(a, own)
		a.put(token, "x", "theirs")
		a.sm.Put(own, "new", 1)
		a.commit(own)
		a.holdsOnly(token, values{"new": 1, "x": "theirs"})

		token = a.session(values{"k": "base"})
		own = a.load(ctx, token)
		empty(a, own)
		a.put(token, "k", "theirs")
		a.sm.Put(own, "new", 1)
		a.refused(own, etcdstore.ErrConflict)
		a.holds(token, values{"k": "theirs"})

		token = a.session(values{"k": "base"})
		own = a.load(ctx, token)
		empty(a, own)
		a.logout(token)
		a.sm.Put(own, "new", 1)
		a.refused(own, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// In every context the commit after that succeeds where nobody else is there, holds nothing of what
// was there before, and the next one is validated.
func TestClear_CommittedAgain(t *testing.T) {
	empties(t, anyContext, func(a *app, ctx context.Context, empty emptying) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		empty(a, ctx)
		a.sm.Put(ctx, "new", 1)
		a.commit(ctx)
		a.holdsOnly(token, values{"new": 1})
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "new", 2)
		a.commit(ctx)
		a.holdsOnly(token, values{"new": 2, "x": "theirs"})
		a.logout(token)
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// Where no context says which request it is, nothing need be known of what others did, and the
// commit overwrites, as the contract of scs says. What was there before is gone in any case.
func TestClear_Overwrites(t *testing.T) {
	unmarked := []testContext{background, derived}
	empties(t, unmarked, func(a *app, ctx context.Context, empty emptying) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		empty(a, ctx)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "new", 1)
		a.commit(ctx)
		got := a.stored(token)
		delete(got, "x") // it may be known all the same
		if len(got) != 1 || got["new"] != 1 {
			a.Errorf("the session holds %v, want what was put after it was emptied", got)
		}
	})
}

// Clear does nothing to a session without values, as its documentation says: others' changes stay.
func TestClear_Empty(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.commit(a.load(context.Background(), ""))
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		emptyings["Clear"](a, ctx)
		if a.sm.Status(ctx) == scs.Modified { // as LoadAndSave does
			a.commit(ctx)
		}
		a.holdsOnly(token, values{"x": "theirs"})
	})
}

// What was emptied before a renewal stays empty, whatever others put there meanwhile.
func TestClear_Renewed(t *testing.T) {
	empties(t, anyContext, func(a *app, ctx context.Context, empty emptying) {
		token := a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		empty(a, ctx)
		a.put(token, "late", "of alice")
		fresh := a.renew(ctx)
		a.sm.Put(ctx, "user", "bob")
		a.commit(ctx)
		a.gone(token)
		a.holdsOnly(fresh, values{"user": "bob"})
	})
}

// Nothing of the user who has logged out reaches the next one, whatever others put there meanwhile.
func TestDestroy(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "late", "of alice")
		a.destroy(ctx)
		a.sm.Put(ctx, "user", "bob")
		fresh := a.commit(ctx)
		a.gone(token)
		a.holdsOnly(fresh, values{"user": "bob"})

		a.put(fresh, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.holdsOnly(fresh, values{"user": "bob", "k": "ours", "x": "theirs"})
	})
}

// The same where the next user's login renews the token.
func TestDestroy_Renewed(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "late", "of alice")
		a.destroy(ctx)
		a.sm.Put(ctx, "user", "bob")
		fresh := a.renew(ctx)
		a.commit(ctx)
		a.gone(token)
		a.holdsOnly(fresh, values{"user": "bob"})
	})
}

// The same where a first login has renewed the token, and committed.
func TestDestroy_AfterRenewal(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "late", "of alice")
		second := a.renew(ctx)
		a.commit(ctx)
		a.put(second, "later", "of alice")
		a.destroy(ctx)
		a.sm.Put(ctx, "user", "bob")
		third := a.renew(ctx)
		a.commit(ctx)
		a.gone(token)
		a.gone(second)
		a.holdsOnly(third, values{"user": "bob"})
	})
}

// A session that was destroyed before it was ever stored leaves a new one that is as any other.
func TestDestroy_New(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		ctx = a.load(ctx, "")
		a.sm.Put(ctx, "secret", 1)
		a.destroy(ctx)
		a.sm.Put(ctx, "user", "alice")
		token := a.commit(ctx)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.holds(token, values{"k": "ours", "x": "theirs"})
	})
}
