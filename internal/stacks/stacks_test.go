package stacks

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"golang.org/x/sync/errgroup"
)

// stack is a way in which an application runs.
type stack struct {
	name   string
	server server
	around middleware // LoadAndSave
	inside middleware // of LoadAndSave
	commit derivation // under which the handler commits by hand, before LoadAndSave does
}

type middleware func(http.Handler) http.Handler

// derivation runs f with a context that is derived from ctx.
type derivation func(ctx context.Context, f func(context.Context))

var stacks = []stack{
	{name: "HTTP1", server: http1},
	{name: "HTTP2", server: http2},
	{name: "HTTP3", server: http3Server},
	{name: "Recorder", server: recorder},
	{name: "FastCGI", server: fastCGI},
	{name: "Serverless", server: serverless},
	{name: "WithoutCancel", server: http1, around: under(withoutCancel)},
	{name: "Timeout", server: http1, around: under(withTimeout)},
	{name: "Group", server: http1, around: under(inGroup)},
	{name: "TimeoutHandler", server: http1, around: timeoutHandler},
	{name: "WithoutCancelInside", server: http1, inside: under(withoutCancel)},
	{name: "TimeoutInside", server: http1, inside: under(withTimeout)},
	{name: "GroupInside", server: http1, inside: under(inGroup)},
	{name: "TimeoutHandlerInside", server: http1, inside: timeoutHandler},
	{name: "CommitByHand", server: http1, commit: asItIs},
	{name: "CommitWithoutCancel", server: http1, commit: withoutCancel},
	{name: "CommitTimeout", server: http1, commit: withTimeout},
	{name: "CommitInGroup", server: http1, commit: inGroup},
	{name: "CommitServerless", server: serverless, commit: withTimeout},
}

func asItIs(ctx context.Context, f func(context.Context)) { f(ctx) }

func withoutCancel(ctx context.Context, f func(context.Context)) { f(context.WithoutCancel(ctx)) }

func withTimeout(ctx context.Context, f func(context.Context)) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	f(ctx)
}

func inGroup(ctx context.Context, f func(context.Context)) {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { f(ctx); return nil })
	_ = g.Wait()
}

// under returns a middleware that derives the request's context.
func under(derive derivation) middleware {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			derive(r.Context(), func(ctx context.Context) { next.ServeHTTP(w, r.WithContext(ctx)) })
		})
	}
}

func timeoutHandler(next http.Handler) http.Handler {
	return http.TimeoutHandler(next, time.Minute, "too late")
}

// start starts the stack with a handler that works on the request's session and then answers.
func (s stack) start(a *app, work func(ctx context.Context)) client {
	a.Helper()
	return s.server(a.T, s.handler(a, work))
}

func (s stack) handler(a *app, work func(ctx context.Context)) http.Handler {
	var h http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		work(r.Context())
		if s.commit != nil {
			// LoadAndSave's commit, which follows, tells the client whether it has succeeded.
			s.commit(r.Context(), func(ctx context.Context) { _, _, _ = a.sm.Commit(ctx) })
		}
		_, _ = io.WriteString(w, "ok")
	})
	if s.inside != nil {
		h = s.inside(h)
	}
	h = a.sm.LoadAndSave(h)
	if s.around != nil {
		h = s.around(h)
	}
	return h
}

// contract is what holds on every stack.
var contract = []struct {
	name  string
	check func(*app, stack)
}{
	{"OtherKey", otherKey},
	{"SameKey", sameKey},
	{"Logout", logout},
	{"TwentyKeys", twentyKeys},
	{"Created", created},
	{"Renewed", renewed},
}

// The session holds what this request changed and what another has changed meanwhile.
func otherKey(a *app, s stack) {
	token := a.session(values{"k": "base"})
	send := s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "k", a.sm.GetString(ctx, "k")+" and ours")
		a.put(token, "x", "theirs")
	})
	a.answered(send(sessionCookie(token)), http.StatusOK)
	a.holds(token, values{"k": "base and ours", "x": "theirs"})
}

// Another request has changed the same key first: that stays, and this request is told.
func sameKey(a *app, s stack) {
	token := a.session(values{"k": "base"})
	send := s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "k", "ours")
		a.put(token, "k", "theirs")
	})
	a.answered(send(sessionCookie(token)), http.StatusConflict)
	a.holds(token, values{"k": "theirs"})
}

// A logout meanwhile stays one; there is nothing to tell this request, and no cookie.
func logout(a *app, s stack) {
	token := a.session(values{"k": "base"})
	send := s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "k", "ours")
		a.logout(token)
	})
	got := send(sessionCookie(token))
	a.answered(got, http.StatusOK)
	if cookie := got.header.Values("Set-Cookie"); len(cookie) > 0 {
		a.Error("the browser gets a cookie for a session that there is not")
	}
	a.gone(token)
}

// Of 20 requests at once that each set another key, none is lost.
func twentyKeys(a *app, s stack) {
	const n = 20
	token, all := a.session(nil), a.meeting(n)
	var mu sync.Mutex
	want := values{}
	send := s.start(a, func(ctx context.Context) {
		mu.Lock()
		key := "k" + strconv.Itoa(len(want))
		want[key] = "ours"
		mu.Unlock()
		a.sm.Put(ctx, key, "ours")
		all()
	})
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { a.answered(send(sessionCookie(token)), http.StatusOK) })
	}
	wg.Wait()
	a.holds(token, want)
}

// A session that this request has made and committed is validated from then on as any other.
func created(a *app, s stack) {
	var kept, left string
	s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "user", "alice")
		kept = a.commit(ctx)
		a.put(kept, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
	})()
	a.holds(kept, values{"k": "ours", "x": "theirs"})
	s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "user", "alice")
		left = a.commit(ctx)
		a.logout(left)
		a.sm.Put(ctx, "k", "ours")
	})()
	a.gone(left)
}

// A renewed session holds what another request committed to the old one meanwhile.
func renewed(a *app, s stack) {
	var fresh string
	token := a.session(values{"k": "base"})
	send := s.start(a, func(ctx context.Context) {
		a.sm.Put(ctx, "k", "ours")
		a.put(token, "x", "theirs")
		fresh = a.renew(ctx)
	})
	a.answered(send(sessionCookie(token)), http.StatusOK)
	a.gone(token)
	a.holds(fresh, values{"k": "ours", "x": "theirs"})
}

func TestStacks(t *testing.T) {
	a := newApp(t)
	for _, s := range stacks {
		t.Run(s.name, func(t *testing.T) { a.with(t).contract(s) })
	}
}

func (a *app) contract(s stack) {
	a.Helper()
	for _, c := range contract {
		a.Run(c.name, func(t *testing.T) { c.check(a.with(t), s) })
	}
}

// With Retry outermost, requests at once that add to one counter have all added to it.
func TestStacks_Retry(t *testing.T) {
	const n = 8
	a := newApp(t)
	for _, s := range stacks {
		t.Run(s.name, func(t *testing.T) {
			a := a.with(t)
			token := a.session(values{"n": 0})
			send := s.server(t, a.store.Retry(s.handler(a, func(ctx context.Context) {
				a.sm.Put(ctx, "n", a.sm.GetInt(ctx, "n")+1)
			})))
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() { a.answered(send(sessionCookie(token)), http.StatusOK) })
			}
			wg.Wait()
			a.holds(token, values{"n": n})
		})
	}
}

// The contract does not depend on what else a session manager is set to.
func TestStacks_Settings(t *testing.T) {
	for name, set := range map[string]func(*scs.SessionManager){
		"HashTokenInStore": func(sm *scs.SessionManager) { sm.HashTokenInStore = true },
		"IdleTimeout":      func(sm *scs.SessionManager) { sm.IdleTimeout = time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			a := newApp(t)
			set(a.sm)
			a.contract(stack{server: serverless})
		})
	}
}

// The contract does not depend on how sessions are encoded.
func TestStacks_Codecs(t *testing.T) {
	for _, codec := range []scs.Codec{jsonCodec{}, lineCodec{}} {
		t.Run(fmt.Sprintf("%T", codec), func(t *testing.T) {
			newAppWithCodec(t, codec).contract(stack{server: serverless})
		})
	}
}
