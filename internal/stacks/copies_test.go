package stacks

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/seed210be38d/etcdstore"
)

// Two copies of a session under one context are as two requests: both changes are kept.
func TestCopies_OtherKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		one, two := a.load(ctx, token), a.load(ctx, token)
		a.sm.Put(one, "one", 1)
		a.sm.Put(two, "two", 2)
		a.commit(one)
		a.put(token, "x", "theirs")
		a.commit(two)
		a.holds(token, values{"one": 1, "two": 2, "x": "theirs"})
	})
}

// Of two copies that change the same key, the second is told.
func TestCopies_SameKey(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		one, two := a.load(ctx, token), a.load(ctx, token)
		a.sm.Put(one, "k", 1)
		a.sm.Put(two, "k", 2)
		a.commit(one)
		a.refused(two, etcdstore.ErrConflict)
		a.holds(token, values{"k": 1})
	})
}

// What one copy has deleted, another does not bring back.
func TestCopies_Logout(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		one, two := a.load(ctx, token), a.load(ctx, token)
		a.sm.Put(two, "k", "ours")
		a.destroy(one)
		a.refused(two, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// What was read later is what a later copy is validated against: a change of others that the first
// copy has not seen, and the second has, is no conflict for the second.
func TestCopies_ReadLater(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"flag": true})
		a.load(ctx, token)
		a.put(token, "flag", false)
		later := a.load(ctx, token)
		a.sm.Put(later, "k", "ours")
		a.put(token, "flag", true)
		a.commit(later)
		a.holds(token, values{"flag": true, "k": "ours"})

		again := a.load(ctx, token)
		a.sm.Put(again, "flag", "ours")
		a.commit(again)
		a.holds(token, values{"flag": "ours", "k": "ours"})
	})
}

// subRequests runs handlers under the context of one request, each with LoadAndSave: second has
// loaded the session before first begins, and saves it after first is done.
func (a *app) subRequests(ctx context.Context, token string, first, second func(context.Context)) {
	loaded, done := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.HandleFunc("/first", func(_ http.ResponseWriter, r *http.Request) { first(r.Context()) })
	mux.HandleFunc("/second", func(_ http.ResponseWriter, r *http.Request) {
		second(r.Context())
		close(loaded)
		<-done
	})
	h := a.sm.LoadAndSave(mux)
	serve := func(path string) {
		r := httptest.NewRequestWithContext(ctx, http.MethodGet, path, http.NoBody)
		r.AddCookie(sessionCookie(token))
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		a.answered(answer{code: w.Code}, http.StatusOK)
	}
	var wg sync.WaitGroup
	wg.Go(func() { serve("/second") })
	<-loaded
	serve("/first")
	close(done)
	wg.Wait()
}

// The parts of a batch request, which run at once, are as so many requests.
func TestCopies_SubRequests(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		a.subRequests(ctx, token,
			func(ctx context.Context) { a.sm.Put(ctx, "one", 1) },
			func(ctx context.Context) { a.sm.Put(ctx, "two", 2) })
		a.holds(token, values{"one": 1, "two": 2})

		a.subRequests(ctx, token,
			func(ctx context.Context) { a.destroy(ctx) },
			func(ctx context.Context) { a.sm.Put(ctx, "two", 3) })
		a.gone(token)
	})
}

// The parts of a batch request, one after the other, do not conflict with what others do between
// them.
func TestCopies_Cascade(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, want := a.session(values{"x": 0}), values{}
		for i := range 3 {
			key := "k" + strconv.Itoa(i)
			h := a.sm.LoadAndSave(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				a.sm.Put(r.Context(), key, i)
			}))
			r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody)
			r.AddCookie(sessionCookie(token))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			a.answered(answer{code: w.Code}, http.StatusOK)
			a.put(token, "x", i+1)
			want[key], want["x"] = i, i+1
		}
		a.holds(token, want)
	})
}

// A socket that loads the session for each message sees what others did, loses none of it, and
// conflicts with nothing that it has not changed.
func TestCopies_Socket(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"n": 0, "x": 0})
		for i := range 5 {
			message := a.load(ctx, token)
			if got := a.sm.GetInt(message, "x"); got != i {
				a.Errorf("message %d sees x = %d", i, got)
			}
			a.sm.Put(message, "n", a.sm.GetInt(message, "n")+1)
			a.put(token, "other"+strconv.Itoa(i), i)
			a.commit(message)
			a.put(token, "x", i+1)
		}
		want := values{"n": 5, "x": 5}
		for i := range 5 {
			want["other"+strconv.Itoa(i)] = i
		}
		a.holds(token, want)
	})
}

// After a logout a socket's messages find no session, and bring none back.
func TestCopies_SocketLogout(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(nil)
		first := a.load(ctx, token)
		a.sm.Put(first, "k", 1)
		a.commit(first)
		a.logout(token)
		second := a.load(ctx, token)
		if a.sm.Exists(second, "user") {
			a.Error("the second message finds the session")
		}
		a.sm.Put(second, "k", 2)
		if made := a.commit(second); made == token {
			a.Error("the session has come back")
		}
		a.gone(token)
	})
}

// A copy that is committed again and again never undoes what others did in between.
func TestCopies_CommittedAgain(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, want := a.session(nil), values{}
		ctx = a.load(ctx, token)
		for i := range 5 {
			ours, theirs := "ours"+strconv.Itoa(i), "theirs"+strconv.Itoa(i)
			a.sm.Put(ctx, ours, i)
			a.put(token, theirs, i)
			a.commit(ctx)
			a.put(token, ours, "changed") // of what we have committed
			want[ours], want[theirs] = "changed", i
		}
		a.commit(ctx) // changes nothing
		a.holds(token, want)

		a.sm.Put(ctx, "ours0", "again")
		a.refused(ctx, etcdstore.ErrConflict)
		a.sm.Put(ctx, "ours0", 0) // as it was committed
		a.put(token, "last", 1)
		a.commit(ctx)
		want["last"] = 1
		a.holds(token, want)

		a.logout(token)
		a.sm.Put(ctx, "k", "ours")
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.refused(ctx, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// A copy whose commit has lost loses again, and what is loaded then does not.
func TestCopies_CommittedAgainAfterConflict(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		lost := a.load(ctx, token)
		a.sm.Put(lost, "k", "ours")
		a.put(token, "k", "theirs")
		a.refused(lost, etcdstore.ErrConflict)
		a.refused(lost, etcdstore.ErrConflict)
		a.holds(token, values{"k": "theirs"})

		again := a.load(ctx, token)
		a.sm.Put(again, "k", "ours")
		a.commit(again)
		a.holds(token, values{"k": "ours"})
		a.refused(lost, etcdstore.ErrConflict)
		a.holds(token, values{"k": "ours"})
	})
}

// A copy whose commit did not get through is validated when it is committed again.
func TestCopies_CommittedAgainAfterError(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		a.sm.Put(ctx, "k", "ours")
		canceled, cancel := context.WithCancel(ctx)
		cancel()
		a.refused(canceled, context.Canceled)
		a.put(token, "x", "theirs")
		a.commit(ctx)
		a.holds(token, values{"k": "ours", "x": "theirs"})
		a.put(token, "k", "theirs")
		a.sm.Put(ctx, "k", "again")
		a.refused(canceled, context.Canceled)
		a.refused(ctx, etcdstore.ErrConflict)
	})
}

// A session that this request has created is validated from its second commit on, also where the
// browser has come with a token that no session has.
func TestCopies_Created(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		for _, cookie := range []string{"", "a-token-that-no-session-has"} {
			created := a.load(ctx, cookie)
			a.sm.Put(created, "user", "alice")
			token := a.commit(created)
			a.put(token, "x", "theirs")
			a.sm.Put(created, "k", "ours")
			a.commit(created)
			a.holds(token, values{"k": "ours", "x": "theirs"})

			a.put(token, "k", "theirs")
			a.sm.Put(created, "k", "again")
			a.refused(created, etcdstore.ErrConflict)
			a.logout(token)
			a.refused(created, etcdstore.ErrSessionGone)
			a.gone(token)
		}
	})
}

// A new session without values is validated from its second commit on, too.
func TestCopies_CreatedEmpty(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		ctx = a.load(ctx, "")
		token := a.commit(ctx)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.holdsOnly(token, values{"k": "ours", "x": "theirs"})
	})
}

// A copy that several goroutines change and commit at once is validated as ever.
func TestCopies_ManyGoroutines(t *testing.T) {
	const n = 8
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token, want := a.session(nil), values{}
		ctx = a.load(ctx, token)
		var wg sync.WaitGroup
		for i := range n {
			ours, theirs := "ours"+strconv.Itoa(i), "theirs"+strconv.Itoa(i)
			want[ours], want[theirs] = i, i
			wg.Go(func() {
				a.put(token, theirs, i)
				a.sm.Put(ctx, ours, i)
				a.sm.Keys(ctx)
				a.commit(ctx)
			})
		}
		wg.Wait()
		a.holds(token, want)
	})
}

// managers runs f as a handler within two session managers, the first of them outside.
func (a *app) managers(s server, one, two *scs.SessionManager, f func(context.Context)) client {
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { f(r.Context()) })
	return s(a.T, one.LoadAndSave(two.LoadAndSave(h)))
}

var twoServers = map[string]server{"HTTP1": http1, "Serverless": serverless}

// Two session managers on one store, one inside of the other, each keep the promises.
func TestCopies_TwoManagers(t *testing.T) {
	a := newApp(t)
	other := a.manager()
	other.Cookie.Name = "other"
	for name, s := range twoServers {
		t.Run(name, func(t *testing.T) {
			a := a.with(t)
			mine, theirs := a.session(nil), a.session(nil)
			cookies := []*http.Cookie{sessionCookie(mine), {Name: "other", Value: theirs}}
			a.managers(s, a.sm, other, func(ctx context.Context) {
				a.sm.Put(ctx, "k", 1)
				other.Put(ctx, "k", 2)
				a.put(mine, "x", 1)
				a.put(theirs, "x", 2)
			})(cookies...)
			a.holds(mine, values{"k": 1, "x": 1})
			a.holds(theirs, values{"k": 2, "x": 2})

			send := a.managers(s, a.sm, other, func(ctx context.Context) {
				a.sm.Put(ctx, "k", "ours")
				other.Put(ctx, "k", "ours")
				a.put(mine, "k", "theirs")
				a.logout(theirs)
			})
			a.answered(send(cookies...), http.StatusConflict)
			a.holds(mine, values{"k": "theirs", "x": 1})
			a.gone(theirs)
		})
	}
}

// Two session managers with one cookie are as two requests of the session.
func TestCopies_TwoManagersOneSession(t *testing.T) {
	a := newApp(t)
	other := a.manager()
	for name, s := range twoServers {
		t.Run(name, func(t *testing.T) {
			a := a.with(t)
			token := a.session(nil)
			send := a.managers(s, a.sm, other, func(ctx context.Context) {
				a.sm.Put(ctx, "one", 1)
				other.Put(ctx, "two", 2)
				a.put(token, "x", "theirs")
			})
			a.answered(send(sessionCookie(token)), http.StatusOK)
			a.holds(token, values{"one": 1, "two": 2, "x": "theirs"})

			send = a.managers(s, a.sm, other, func(ctx context.Context) {
				a.sm.Put(ctx, "one", 2)
				a.destroy(ctx)
				other.Put(ctx, "two", 3)
			})
			send(sessionCookie(token))
			a.gone(token)
		})
	}
}

// LoadAndSave inside of the same manager's shares its session, which is then committed twice.
func TestCopies_NestedLoadAndSave(t *testing.T) {
	a := newApp(t)
	for name, s := range twoServers {
		t.Run(name, func(t *testing.T) {
			a := a.with(t)
			// nested runs then between the inner manager's commit and the outer one's.
			nested := func(token string, then func()) client {
				inner := a.sm.LoadAndSave(http.HandlerFunc(
					func(_ http.ResponseWriter, r *http.Request) {
						a.put(token, "x", "theirs")
						a.sm.Put(r.Context(), "k", "ours")
					}))
				return s(t, a.sm.LoadAndSave(http.HandlerFunc(
					func(w http.ResponseWriter, r *http.Request) {
						inner.ServeHTTP(w, r)
						then()
						a.sm.Put(r.Context(), "after", "ours")
					})))
			}
			token := a.session(nil)
			send := nested(token, func() { a.put(token, "y", "theirs") })
			a.answered(send(sessionCookie(token)), http.StatusOK)
			a.holds(token, values{"k": "ours", "after": "ours", "x": "theirs", "y": "theirs"})

			send = nested(token, func() { a.put(token, "after", "theirs") })
			a.answered(send(sessionCookie(token)), http.StatusOK) // the request has not changed it
			a.holds(token, values{"k": "ours", "after": "theirs", "x": "theirs", "y": "theirs"})

			token = a.session(nil)
			send = nested(token, func() { a.put(token, "after", "theirs") })
			a.answered(send(sessionCookie(token)), http.StatusConflict)
			a.holds(token, values{"k": "ours", "after": "theirs", "x": "theirs"})

			token = a.session(nil)
			nested(token, func() { a.logout(token) })(sessionCookie(token))
			a.gone(token)
		})
	}
}

// Two stores in one request do not take each other's sessions for their own, not even under one
// token.
func TestCopies_TwoStores(t *testing.T) {
	a := newApp(t)
	b := *a
	b.store = etcdstore.NewWithPrefix(a.cli, "other:")
	t.Cleanup(func() { _ = b.store.Close() })
	b.sm = b.manager()
	expiry := time.Now().Add(time.Hour)
	a.each(anyContext, func(a *app, ctx context.Context) {
		b := b.with(a.T)
		token := a.session(nil)
		payload, _ := b.codec.Encode(expiry, values{"user": "alice", "b": 0})
		if err := b.store.Commit(token, payload, expiry); err != nil {
			a.Fatal(err)
		}
		one, two := a.load(ctx, token), b.load(ctx, token)
		for i, s := range []struct {
			*app
			ctx context.Context
		}{{a, one}, {b, two}} {
			s.put(token, "x", i)
			s.sm.Put(s.ctx, "k", "ours")
			s.commit(s.ctx)
		}
		a.holds(token, values{"k": "ours", "x": 0})
		b.holds(token, values{"k": "ours", "b": 0, "x": 1})

		a.logout(token)
		b.put(token, "k", "theirs")
		a.sm.Put(one, "k", "again")
		b.sm.Put(two, "k", "again")
		a.refused(one, etcdstore.ErrSessionGone)
		b.refused(two, etcdstore.ErrConflict)
		a.gone(token)
		b.holds(token, values{"k": "theirs", "b": 0, "x": 1})
	})
}

// An application may copy all that a session has, as it sees it, into another: that stays the other
// session, and the first is as it was.
func TestCopies_CopiedByHand(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		for _, cookie := range []string{"", a.session(values{"own": 1})} {
			from := a.session(values{"k": "base"})
			source, target := a.load(ctx, from), a.load(ctx, cookie)
			for _, key := range a.sm.Keys(source) {
				a.sm.Put(target, key, a.sm.Get(source, key))
			}
			token := a.commit(target)
			a.put(token, "x", "theirs")
			a.sm.Put(target, "k", "ours")
			a.commit(target)
			want := values{"k": "ours", "x": "theirs"}
			if cookie != "" {
				want["own"] = 1
			}
			a.holds(token, want)
			a.holds(from, values{"k": "base"})

			a.put(from, "x", "theirs")
			a.sm.Put(source, "k", "changed")
			a.commit(source)
			a.holds(from, values{"k": "changed", "x": "theirs"})
			a.logout(from)
			a.sm.Put(target, "y", "ours")
			a.commit(target)
			want["y"] = "ours"
			a.holds(token, want)
		}
	})
}

// A session may be moved to another store by hand: it is a new one there.
func TestCopies_MovedToOtherStore(t *testing.T) {
	a := newApp(t)
	b := *a
	b.store = etcdstore.NewWithPrefix(a.cli, "other:")
	t.Cleanup(func() { _ = b.store.Close() })
	b.sm = b.manager()
	a.each(anyContext, func(a *app, ctx context.Context) {
		b := b.with(a.T)
		old := a.session(values{"k": "base"})
		source, target := a.load(ctx, old), b.load(ctx, "")
		a.put(old, "late", "theirs")
		for _, key := range a.sm.Keys(source) {
			b.sm.Put(target, key, a.sm.Get(source, key))
		}
		a.destroy(source)
		token := b.commit(target)
		b.put(token, "x", "theirs")
		b.sm.Put(target, "k", "ours")
		b.commit(target)
		a.gone(old)
		b.holds(token, values{"k": "ours", "x": "theirs"})
	})
}

// With an idle timeout a request that changes nothing is committed, too: it undoes nothing.
func TestCopies_IdleTimeout(t *testing.T) {
	a := newApp(t)
	a.sm.IdleTimeout = time.Hour
	a.each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		read := a.load(ctx, token)
		a.put(token, "k", "theirs")
		a.commit(read)
		a.holds(token, values{"k": "theirs"})
		a.logout(token)
		a.refused(read, etcdstore.ErrSessionGone)
		a.gone(token)
	})
}

// A commit of a session that was never read overwrites: the contract of scs.
func TestCopies_NeverRead(t *testing.T) {
	newApp(t).each(anyContext, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		expiry := time.Now().Add(time.Hour)
		for i := range 2 {
			want := values{"n": fmt.Sprint(i)}
			payload, err := a.codec.Encode(expiry, want)
			if err != nil {
				a.Fatal(err)
			}
			if err := a.store.CommitCtx(ctx, token, payload, expiry); err != nil {
				a.Error(err)
			}
			a.holdsOnly(token, want)
		}
	})
}
