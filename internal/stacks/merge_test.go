package stacks

import (
	"context"
	"errors"
	"testing"

	"github.com/seed210be38d/etcdstore"
)

// A session that another was merged into holds that, too, and what others changed meanwhile.
func TestMergeSession(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(values{"n": 0}), a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "before", 1)
		a.put(other, "note", "gift")
		a.merge(ctx, other)
		a.put(token, "after", 2)
		if err := a.update(other, "late", 3); !errors.Is(err, etcdstore.ErrSessionGone) {
			a.Errorf("a change of the session that was merged: %v, want ErrSessionGone", err)
		}
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		want := values{"n": 0, "cart": "book", "note": "gift", "before": 1, "after": 2, "k": "ours"}
		a.holds(token, want)
		a.gone(other)

		a.put(token, "last", 3)
		a.sm.Put(ctx, "k", "again")
		a.commit(ctx)
		want["last"], want["k"] = 3, "again"
		a.holds(token, want)
	})
}

// A key that came with the other session, and that others have changed in ours, is a conflict.
func TestMergeSession_SameKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(values{"n": 0}), a.session(values{"n": 7})
		ctx = a.load(ctx, token)
		a.put(token, "n", 1)
		a.merge(ctx, other)
		a.refused(ctx, etcdstore.ErrConflict)
		a.holds(token, values{"n": 1})
	})
}

// A key that is the same in both was not changed by the merge: others' change of it stays.
func TestMergeSession_EqualKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(values{"n": 0}), a.session(values{"n": 0, "cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "n", 1)
		a.merge(ctx, other)
		a.commit(ctx)
		a.holds(token, values{"n": 1, "cart": "book"})
	})
}

// A session that was deleted meanwhile does not come back by what was merged into it.
func TestMergeSession_Logout(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(nil), a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.merge(ctx, other)
		a.logout(token)
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.gone(token)
		a.gone(other)
	})
}

// Merging a session with itself does nothing; above all it is no new read of what this request has
// changed.
func TestMergeSession_OwnToken(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		own := a.load(ctx, token)
		a.put(token, "x", "theirs")
		a.merge(own, token)
		a.sm.Put(own, "y", "ours")
		a.commit(own)
		a.holds(token, values{"k": "base", "x": "theirs", "y": "ours"})

		own = a.load(ctx, token)
		a.put(token, "k", "theirs")
		a.merge(own, token)
		a.sm.Put(own, "k", "ours")
		a.refused(own, etcdstore.ErrConflict)
		a.holds(token, values{"k": "theirs", "x": "theirs", "y": "ours"})

		own = a.load(ctx, token)
		a.sm.Put(own, "k", "ours")
		a.logout(token)
		a.merge(own, token)
		a.refused(own, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// A new session may take in another, and is validated from its second commit on.
func TestMergeSession_IntoNew(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		other := a.session(values{"cart": "book"})
		ctx = a.load(ctx, "")
		a.sm.Put(ctx, "k", "ours")
		a.merge(ctx, other)
		token := a.commit(ctx)
		a.gone(other)
		a.holds(token, values{"cart": "book", "k": "ours"})
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "again")
		a.commit(ctx)
		a.holds(token, values{"cart": "book", "k": "again", "x": "theirs"})
	})
}

// Two others may be merged one after the other.
func TestMergeSession_Two(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		one, two := a.session(values{"one": 1}), a.session(values{"two": 2})
		ctx = a.load(ctx, token)
		a.merge(ctx, one)
		a.put(token, "x", "theirs")
		a.merge(ctx, two)
		a.commit(ctx)
		a.gone(one)
		a.gone(two)
		a.holds(token, values{"one": 1, "two": 2, "x": "theirs"})
	})
}

// Another copy of the session that was merged cannot be committed any more.
func TestMergeSession_OtherCopy(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(nil), a.session(values{"cart": "book"})
		own, copied := a.load(ctx, token), a.load(ctx, other)
		a.merge(own, other)
		a.sm.Put(copied, "k", "late")
		a.refused(copied, etcdstore.ErrSessionGone)
		a.commit(own)
		a.gone(other)
		a.holds(token, values{"cart": "book"})
	})
}

// A login that renews the token and takes in another session, in either order, keeps what others
// committed to the old session meanwhile.
func TestMergeSession_Renewed(t *testing.T) {
	a := newApp(t)
	for name, renewFirst := range map[string]bool{"RenewFirst": true, "MergeFirst": false} {
		t.Run(name, func(t *testing.T) {
			a.with(t).each(anyContext, func(a *app, ctx context.Context) {
				token, other := a.session(values{"n": 0}), a.session(values{"cart": "book"})
				ctx = a.load(ctx, token)
				a.put(token, "x", "theirs")
				if renewFirst {
					a.renew(ctx)
				}
				a.merge(ctx, other)
				if !renewFirst {
					a.renew(ctx)
				}
				a.sm.Put(ctx, "k", "ours")
				fresh := a.commit(ctx)
				a.gone(token)
				a.gone(other)
				a.holds(fresh, values{"n": 0, "cart": "book", "x": "theirs", "k": "ours"})
			})
		})
	}
}
