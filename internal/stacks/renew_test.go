package stacks

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/seed210be38d/etcdstore"
)

// What others committed to the old session before it was deleted is in the new one, where this
// request has not changed it.
func TestRenewToken(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"n": 0, "old": true})
		ctx = a.load(ctx, token)
		a.put(token, "n", 1)
		a.put(token, "x", "theirs")
		a.sm.Remove(ctx, "old")
		fresh := a.renew(ctx)
		a.sm.Put(ctx, "k", "ours")
		if err := a.update(token, "late", 1); !errors.Is(err, etcdstore.ErrSessionGone) {
			a.Errorf("a change of the old session: %v, want ErrSessionGone", err)
		}
		a.commit(ctx)
		a.gone(token)
		a.holds(fresh, values{"n": 1, "x": "theirs", "k": "ours"})
	})
}

// What others removed from the old session is not in the new one.
func TestRenewToken_Removed(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"message": "hello"})
		ctx = a.load(ctx, token)
		other := a.load(context.Background(), token)
		a.sm.Remove(other, "message")
		a.commit(other)
		fresh := a.renew(ctx)
		a.commit(ctx)
		a.holds(fresh, values{})
	})
}

// Where both have changed a key, a renewal does not fail: what this request wants is stored.
func TestRenewToken_SameKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		a.put(token, "k", "theirs")
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		fresh := a.renew(ctx)
		a.commit(ctx)
		a.holds(fresh, values{"k": "ours", "x": "theirs"})
	})
}

// Where both have changed a key and there is a resolver, it decides; where it does not either, what
// this request wants is stored.
func TestRenewToken_Resolver(t *testing.T) {
	a := newApp(t, etcdstore.WithResolver(func(c etcdstore.Conflict) (any, error) {
		if c.Key != "theirs" {
			return nil, etcdstore.ErrConflict
		}
		return c.Theirs, nil
	}))
	a.each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx = a.load(ctx, token)
		for _, key := range []string{"ours", "theirs"} {
			a.put(token, key, "theirs")
			a.sm.Put(ctx, key, "ours")
		}
		fresh := a.renew(ctx)
		a.commit(ctx)
		a.holds(fresh, values{"ours": "ours", "theirs": "theirs"})
	})
}

// Under Serializable a renewal does not fail with a conflict either.
func TestRenewToken_Serializable(t *testing.T) {
	a := newApp(t, etcdstore.WithIsolation(etcdstore.Serializable))
	a.each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		fresh := a.renew(ctx)
		a.commit(ctx)
		if got := a.stored(fresh)["k"]; got != "ours" {
			a.Errorf("k = %v, want ours", got)
		}
	})
}

// The lifetime of a renewed session is its own, whatever others did to the old one.
func TestRenewToken_Deadline(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx = a.load(ctx, token)
		other := a.load(context.Background(), token)
		a.sm.SetDeadline(other, time.Now().Add(time.Minute))
		a.commit(other)
		fresh := a.renew(ctx)
		want := a.sm.Deadline(ctx)
		a.commit(ctx)
		if got := a.sm.Deadline(a.load(context.Background(), fresh)); !got.Equal(want) {
			a.Errorf("deadline %v, want %v", got, want)
		}
	})
}

// A token that is renewed again, before its first commit or after, carries on what the one before
// had.
func TestRenewToken_Again(t *testing.T) {
	a := newApp(t)
	for name, commit := range map[string]bool{"Committed": true, "NotCommitted": false} {
		t.Run(name, func(t *testing.T) {
			a.with(t).each(anyContext, func(a *app, ctx context.Context) {
				token, want := a.session(nil), values{"x": "theirs", "k": "ours"}
				ctx = a.load(ctx, token)
				a.put(token, "x", "theirs")
				second := a.renew(ctx)
				a.sm.Put(ctx, "k", "ours")
				if commit {
					a.commit(ctx)
					a.put(second, "y", "theirs")
					want["y"] = "theirs"
				}
				third := a.renew(ctx)
				a.commit(ctx)
				a.gone(token)
				a.gone(second)
				a.holds(third, want)
			})
		})
	}
}

// A renewed session is validated from its second commit on as any other.
func TestRenewToken_CommittedAgain(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		fresh := a.renew(ctx)
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.put(fresh, "x", "changed")
		a.put(fresh, "y", "theirs")
		a.sm.Put(ctx, "k", "again")
		a.commit(ctx)
		a.holds(fresh, values{"x": "changed", "y": "theirs", "k": "again"})

		a.put(fresh, "k", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.refused(ctx, etcdstore.ErrConflict)
		a.logout(fresh)
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.gone(fresh)
	})
}

// A request in flight that has the old session can neither commit it nor bring it back.
func TestRenewToken_OtherCopy(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		own, other := a.load(ctx, token), a.load(ctx, token)
		fresh := a.renew(own)
		a.sm.Put(other, "k", "theirs")
		a.refused(other, etcdstore.ErrSessionGone)
		a.commit(own)
		a.refused(other, etcdstore.ErrSessionGone)
		a.gone(token)
		a.holds(fresh, values{})
	})
}

// A logout before the renewal is one: what was read before it does not come back under a new token.
func TestRenewToken_AfterLogout(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx = a.load(ctx, token)
		a.logout(token)
		fresh := a.renew(ctx)
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.gone(token)
		a.gone(fresh)
	})
}

// A new session that has a token by RenewToken alone is a new session.
func TestRenewToken_New(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		for _, cookie := range []string{"", "a-token-that-no-session-has"} {
			ctx := a.load(ctx, cookie)
			fresh := a.renew(ctx)
			a.sm.Put(ctx, "user", "alice")
			a.commit(ctx)
			a.put(fresh, "x", "theirs")
			a.sm.Put(ctx, "k", "ours")
			a.commit(ctx)
			a.holds(fresh, values{"k": "ours", "x": "theirs"})
		}
	})
}

// A browser that leaves after its login's RenewToken does not lose its user the session.
func TestRenewToken_ClientLeaves(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"n": 0})
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		fresh := a.renew(ctx)
		a.sm.Put(ctx, "k", "ours")
		cancel()
		_, _, _ = a.sm.Commit(ctx) // nobody is there to be told
		a.gone(token)
		a.holds(fresh, values{"n": 0, "x": "theirs", "k": "ours"})
	})
}

// A request whose time is up, before its RenewToken or after, leaves one of the two sessions.
func TestRenewToken_TimeIsUp(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx, cancel := context.WithTimeout(a.load(ctx, token), 50*time.Millisecond)
		defer cancel()
		err := a.sm.RenewToken(ctx)
		<-ctx.Done()
		fresh := a.sm.Token(ctx)
		if err == nil {
			_, _, _ = a.sm.Commit(ctx)
		}
		if a.stored(token) == nil && a.stored(fresh) == nil {
			a.Error("both sessions are gone")
		}
	})
}

// leave serves a request whose client leaves when the handler has done its work on the session, and
// returns when the handler, and LoadAndSave, have ended.
func (a *app) leave(token string, work func(context.Context)) {
	a.Helper()
	worked, ended := make(chan struct{}), make(chan struct{})
	h := a.sm.LoadAndSave(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		work(r.Context())
		close(worked)
		<-r.Context().Done()
	}))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		h.ServeHTTP(w, r)
	}))
	defer srv.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	r := newRequest(a.T, srv.URL, []*http.Cookie{sessionCookie(token)}).WithContext(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		resp, err := srv.Client().Do(r)
		if err == nil {
			_ = resp.Body.Close()
		}
	})
	<-worked
	cancel()
	<-ended
	wg.Wait()
}

// The same with a real browser.
func TestRenewToken_BrowserLeaves(t *testing.T) {
	a := newApp(t)
	var fresh string
	token := a.session(values{"n": 0})
	a.leave(token, func(ctx context.Context) {
		a.put(token, "x", "theirs")
		fresh = a.renew(ctx)
		a.sm.Put(ctx, "k", "ours")
	})
	a.gone(token)
	a.holds(fresh, values{"n": 0, "x": "theirs", "k": "ours"})
}

// After a Destroy there is neither of the two, whether the browser has left or not.
func TestRenewToken_Destroyed(t *testing.T) {
	a := newApp(t)
	var fresh string
	token := a.session(nil)
	a.leave(token, func(ctx context.Context) {
		fresh = a.renew(ctx)
		a.destroy(ctx)
	})
	a.gone(token)
	a.gone(fresh)

	a.each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		fresh := a.renew(ctx)
		a.destroy(ctx)
		a.sm.Put(ctx, "k", "ours")
		third := a.commit(ctx)
		a.gone(token)
		a.gone(fresh)
		a.holdsOnly(third, values{"k": "ours"})
	})
}

// A browser that leaves after a Destroy, and what its request put into the session then, bring
// nothing back.
func TestRenewToken_DestroyedAndLeft(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		ctx = a.load(ctx, token)
		a.destroy(ctx)
		fresh := a.renew(ctx)
		a.sm.Put(ctx, "k", "ours")
		cancel()
		_, _, _ = a.sm.Commit(ctx)
		a.gone(token)
		if got := a.stored(fresh); got["user"] != nil {
			a.Errorf("the session of before is back: %v", got)
		}
	})
}

// Renewals, merges, and hashed tokens go together.
func TestRenewToken_Hashed(t *testing.T) {
	a := newApp(t)
	a.sm.HashTokenInStore = true
	a.each(anyContext, func(a *app, ctx context.Context) {
		token, other := a.session(nil), a.session(values{"cart": "book"})
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		a.merge(ctx, token)
		fresh := a.renew(ctx)
		a.merge(ctx, other)
		a.commit(ctx)
		a.put(fresh, "y", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.gone(token)
		a.gone(other)
		a.holds(fresh, values{"cart": "book", "x": "theirs", "y": "theirs", "k": "ours"})
	})
}
