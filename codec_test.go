package etcdstore

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// newSession makes a session that holds one value, and returns its token.
func newSession(t *testing.T, sm *scs.SessionManager, key string, value any) string {
	t.Helper()
	ctx, err := sm.Load(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	sm.Put(ctx, key, value)
	token, _, err := sm.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// A copy that was cleared, destroyed, or merged into is known under its next token: a renewal of that carries over what others
// have committed to it, and nothing of the session before.
func TestCodec_RenewedAgain(t *testing.T) {
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t))
	defer mustClose(t, s)
	sm := newManager(s)
	for name, begin := range map[string]func(token string) (context.Context, error){
		"cleared": func(token string) (context.Context, error) {
			ctx, err := sm.Load(t.Context(), token)
			if err == nil {
				err = sm.Clear(ctx)
			}
			return ctx, err
		},
		"destroyed": func(token string) (context.Context, error) {
			ctx, err := sm.Load(t.Context(), token)
			if err == nil {
				err = sm.Destroy(ctx)
			}
			return ctx, err
		},
		"merged into a new one": func(token string) (context.Context, error) {
			ctx, err := sm.Load(t.Context(), "")
			if err == nil {
				err = sm.MergeSession(ctx, token)
			}
			return ctx, err
		},
	} {
		t.Run(name, func(t *testing.T) {
			token := newSession(t, sm, "before", 1)
			ctx, err := begin(token)
			if err != nil {
				t.Fatal(err)
			}
			sm.Put(ctx, "a", 1)
			if token, _, err = sm.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.Update(t.Context(), token, setting("theirs", 2)); err != nil {
				t.Fatal(err)
			}
			if err := sm.RenewToken(ctx); err != nil {
				t.Fatal(err)
			}
			if token, _, err = sm.Commit(ctx); err != nil {
				t.Fatal(err)
			}
			want := map[string]any{"a": 1, "theirs": 2}
			if name == "merged into a new one" {
				want["before"] = 1
			}
			wantValues(t, s, token, want)
		})
	}
}

// A session that ends between a request's read and its RenewToken is renewed all the same: expiry is not a logout.
func TestCodec_RenewedAfterExpiry(t *testing.T) {
	s, w, _ := newWallStore(t)
	sm := newManager(s)
	sm.Lifetime = time.Minute
	token := newSession(t, sm, "cart", "x")
	sm.Lifetime = 24 * time.Hour
	ctx, err := sm.Load(t.Context(), token)
	if err != nil {
		t.Fatal(err)
	}
	w.step(61 * time.Second)
	if err := sm.RenewToken(ctx); err != nil {
		t.Fatal(err)
	}
	sm.Put(ctx, "user", "alice")
	if token, _, err = sm.Commit(ctx); err != nil {
		t.Fatalf("the login is lost: %v", err)
	}
	wantValues(t, s, token, map[string]any{"cart": "x", "user": "alice"})
}

// Copies do not pile up under the tokens that they have had.
func TestCodec_ForgetsTokens(t *testing.T) {
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t))
	defer mustClose(t, s)
	sm := newManager(s)
	ctx, err := sm.Load(t.Context(), newSession(t, sm, "n", 0))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := sm.RenewToken(ctx); err != nil {
			t.Fatal(err)
		}
		if _, _, err := sm.Commit(ctx); err != nil {
			t.Fatal(err)
		}
	}
	s.copies.mu.Lock()
	defer s.copies.mu.Unlock()
	if n := len(s.copies.byToken); n > 3 {
		t.Errorf("%d tokens are kept of one copy", n)
	}
}

// Of two logins at once one at least is made, also where the handler's context is not the one that the session was loaded under;
// under Retry both are.
func TestCodec_TwoLogins(t *testing.T) {
	for name, wrap := range map[string]func(s *site) http.Handler{
		"plain":          (*site).loadAndSaved,
		"Retry":          (*site).retried,
		"TimeoutHandler": func(s *site) http.Handler { return s.manager.LoadAndSave(http.TimeoutHandler(s.mux, time.Minute, "")) },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, etcdtest.New(t, etcdtest.Config{}), wrap)
			loaded, both := make(chan struct{}, 10), make(chan struct{})
			deleted, gate := make(chan struct{}, 10), make(chan struct{})
			s.mux.HandleFunc("/enter", func(w http.ResponseWriter, r *http.Request) {
				loaded <- struct{}{}
				<-both
				if err := s.manager.RenewToken(r.Context()); err != nil {
					t.Error(err)
				}
				deleted <- struct{}{}
				<-gate
				s.manager.Put(r.Context(), "as", r.FormValue("as"))
				fmt.Fprint(w, "welcome")
			})
			b := s.login(t)
			token := b.token(t, s)
			answers := make(chan response)
			for _, as := range []string{"1", "2"} {
				go func() {
					req := newRequest(t, http.MethodGet, s.url+"/enter?as="+as, nil)
					req.AddCookie(&http.Cookie{Name: "session", Value: token})
					answers <- newBrowser(t).do(t, req)
				}()
			}
			<-loaded
			<-loaded
			close(both)
			<-deleted
			<-deleted
			close(gate)
			in := 0
			for range 2 {
				got := <-answers
				if got.status != http.StatusOK || got.body != "welcome" {
					t.Errorf("answer %d %q", got.status, got.body)
				}
				if len(got.header["Set-Cookie"]) > 0 {
					in++
				}
			}
			if in == 0 || name == "Retry" && in != 2 {
				t.Errorf("%d of 2 are logged in", in)
			}
		})
	}
}
