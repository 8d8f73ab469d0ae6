package stacks

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/seed210be38d/etcdstore"
)

// Iterate changes each session, and loses nothing that others change meanwhile.
func TestIterate(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		tokens := a.sessions(5)
		a.iterate(ctx, func(ctx context.Context) {
			a.put(a.sm.Token(ctx), "x", "theirs")
			a.sm.Put(ctx, "seen", true)
			a.commit(ctx)
		})
		for _, token := range tokens {
			a.holds(token, values{"seen": true, "x": "theirs"})
		}
	})
}

// A key that others have changed meanwhile is a conflict in Iterate as elsewhere.
func TestIterate_SameKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		tokens := a.sessions(5)
		a.iterate(ctx, func(ctx context.Context) {
			a.put(a.sm.Token(ctx), "k", "theirs")
			a.sm.Put(ctx, "k", "ours")
			a.refused(ctx, etcdstore.ErrConflict)
		})
		for _, token := range tokens {
			a.holds(token, values{"k": "theirs"})
		}
	})
}

// A session that is deleted while Iterate runs stays deleted.
func TestIterate_Logout(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		tokens := a.sessions(5)
		left, stay := tokens[:2], tokens[2:]
		var once sync.Once
		a.iterate(ctx, func(ctx context.Context) {
			once.Do(func() {
				for _, token := range left {
					a.logout(token)
				}
			})
			a.sm.Put(ctx, "k", "ours")
			if slices.Contains(left, a.sm.Token(ctx)) {
				a.refused(ctx, etcdstore.ErrSessionGone)
			} else {
				a.commit(ctx)
			}
		})
		for _, token := range left {
			a.gone(token)
		}
		for _, token := range stay {
			a.holds(token, values{"k": "ours"})
		}
	})
}

// Iterate may destroy sessions that others change: they are gone, and the others are told.
func TestIterate_Destroy(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		tokens := a.sessions(3)
		other := a.load(context.Background(), tokens[0])
		a.sm.Put(other, "k", "theirs")
		a.iterate(ctx, func(ctx context.Context) { a.destroy(ctx) })
		a.refused(other, etcdstore.ErrSessionGone)
		for _, token := range tokens {
			a.gone(token)
		}
	})
}

// A request that has its own session open may change it through Iterate as well: both changes stay.
func TestIterate_OwnSession(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.sessions(3)[1]
		own := a.load(ctx, token)
		a.sm.Put(own, "k", "ours")
		a.iterate(ctx, func(ctx context.Context) {
			a.sm.Put(ctx, "seen", true)
			a.commit(ctx)
		})
		a.put(token, "x", "theirs")
		a.commit(own)
		a.holds(token, values{"k": "ours", "seen": true, "x": "theirs"})
	})
}

// sessions deletes all sessions, and makes n others.
func (a *app) sessions(n int) (tokens []string) {
	a.Helper()
	all, err := a.store.All()
	if err != nil {
		a.Fatal(err)
	}
	for token := range all {
		a.logout(token)
	}
	for range n {
		tokens = append(tokens, a.session(nil))
	}
	return tokens
}

func (a *app) iterate(ctx context.Context, f func(context.Context)) {
	a.Helper()
	err := a.sm.Iterate(ctx, func(ctx context.Context) error { f(ctx); return nil })
	if err != nil {
		a.Errorf("Iterate: %v", err)
	}
}
