package stacks

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/seed210be38d/etcdstore"
)

// jsonCodec encodes sessions as JSON.
type jsonCodec struct{}

type jsonSession struct {
	Deadline time.Time
	Values   map[string]any
}

func (jsonCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	return json.Marshal(jsonSession{deadline, values})
}

func (jsonCodec) Decode(b []byte) (time.Time, map[string]any, error) {
	var s jsonSession
	err := json.Unmarshal(b, &s)
	return s.Deadline, s.Values, err
}

// lineCodec encodes sessions as lines, sorted, and knows nothing but strings. What it makes of a
// session of one short value has less than 16 bytes.
type lineCodec struct{}

func (lineCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	b := strconv.AppendInt(nil, deadline.Unix(), 36)
	for _, key := range slices.Sorted(maps.Keys(values)) {
		value, ok := values[key].(string)
		if !ok || strings.HasPrefix(key, "_") {
			return nil, fmt.Errorf("cannot encode the %T of %s", values[key], key)
		}
		b = append(b, "\n"+key+"="+value...)
	}
	return b, nil
}

func (lineCodec) Decode(b []byte) (time.Time, map[string]any, error) {
	lines := strings.Split(string(b), "\n")
	seconds, err := strconv.ParseInt(lines[0], 36, 64)
	values := make(map[string]any)
	for _, line := range lines[1:] {
		key, value, _ := strings.Cut(line, "=")
		values[key] = value
	}
	return time.Unix(seconds, 0).UTC(), values, err
}

// wrapped is a store around the store, such as an application has it to measure its calls.
type wrapped struct {
	*etcdstore.EtcdStore
	copies bool               // what it passes on
	commit func(token string) // called before a commit
}

func (s wrapped) FindCtx(ctx context.Context, token string) ([]byte, bool, error) {
	b, ok, err := s.EtcdStore.FindCtx(ctx, token)
	return s.passed(b), ok, err
}

func (s wrapped) CommitCtx(ctx context.Context, token string, b []byte, expiry time.Time) error {
	if s.commit != nil {
		s.commit(token)
	}
	return s.EtcdStore.CommitCtx(ctx, token, s.passed(b), expiry)
}

func (s wrapped) passed(b []byte) []byte {
	if s.copies {
		return slices.Clone(b)
	}
	return b
}

// A store around the store that hands on what it is given changes nothing.
func TestCodec_WrappedStore(t *testing.T) {
	a := newApp(t)
	a.sm.Store = wrapped{EtcdStore: a.store}
	a.contract(stack{server: serverless})
}

// plain is a store as scs's first ones were: its methods take no context.
type plain struct{ scs.Store }

// A store around the store that has lost the contexts changes nothing either.
func TestCodec_PlainStore(t *testing.T) {
	a := newApp(t)
	a.sm.Store = plain{a.store}
	a.contract(stack{server: http1})
}

// Where a store around the store copies what it is given, the request is known from its context.
func TestCodec_CopyingStore(t *testing.T) {
	a := newApp(t)
	a.sm.Store = wrapped{EtcdStore: a.store, copies: true}
	for _, c := range contract {
		if c.name == "Renewed" {
			continue // a new token does not say then which session it renews
		}
		t.Run(c.name, func(t *testing.T) { c.check(a.with(t), stack{server: http1}) })
	}
	a.each(marked, func(a *app, ctx context.Context) {
		token := a.session(values{"k": "base"})
		ctx = a.load(ctx, token)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.commit(ctx)
		a.holds(token, values{"k": "ours", "x": "theirs"})
	})
}

// Sessions of a few bytes are told apart as others are.
func TestCodec_TinySessions(t *testing.T) {
	const n = 50
	a := newAppWithCodec(t, lineCodec{})
	var tokens []string
	var loaded []context.Context
	for range n {
		ctx := a.load(context.Background(), "")
		a.sm.Put(ctx, "k", "b")
		token := a.commit(ctx)
		tokens, loaded = append(tokens, token), append(loaded, a.load(context.Background(), token))
	}
	for i, token := range tokens {
		a.put(token, "x", "t")
		a.sm.Put(loaded[i], "o", strconv.Itoa(i))
	}
	for i, token := range tokens {
		a.commit(loaded[i])
		a.holdsOnly(token, values{"k": "b", "x": "t", "o": strconv.Itoa(i)})
	}
}

// cachingCodec returns the same slice for equal sessions.
type cachingCodec struct {
	lineCodec
	mu   *sync.Mutex
	made map[string][]byte
}

func (c cachingCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	b, err := c.lineCodec.Encode(deadline, values)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.made[string(b)]; !ok {
		c.made[string(b)] = b
	}
	return c.made[string(b)], err
}

// Two requests that save equal sessions at once, which a codec encodes as the same slice, do not
// take each other's place.
func TestCodec_SharedSlice(t *testing.T) {
	a := newAppWithCodec(t, cachingCodec{mu: new(sync.Mutex), made: make(map[string][]byte)})
	tokens := []string{a.session(nil), a.session(nil)}
	both := a.meeting(2)
	a.sm.Store = wrapped{EtcdStore: a.store, commit: func(string) { both() }}
	deadline := time.Now().Add(time.Hour)
	var wg sync.WaitGroup
	for _, token := range tokens {
		ctx := a.load(context.Background(), token)
		a.put(token, "x", "theirs")
		a.sm.Put(ctx, "k", "ours")
		a.sm.SetDeadline(ctx, deadline)
		wg.Go(func() { a.commit(ctx) })
	}
	wg.Wait()
	for _, token := range tokens {
		a.holds(token, values{"k": "ours", "x": "theirs"})
	}
}

// brittleCodec fails where it is told to.
type brittleCodec struct {
	scs.GobCodec
	fails *bool
}

func (c brittleCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	if *c.fails {
		return nil, errors.New("not now")
	}
	return c.GobCodec.Encode(deadline, values)
}

// A session that could not be encoded is validated when it can be.
func TestCodec_EncodeFails(t *testing.T) {
	var fails bool
	a := newAppWithCodec(t, brittleCodec{fails: &fails})
	token := a.session(values{"k": "base"})
	ctx := a.load(context.Background(), token)
	a.sm.Put(ctx, "k", "ours")
	fails = true
	if _, _, err := a.sm.Commit(ctx); err == nil {
		t.Error("a session that cannot be encoded was committed")
	}
	fails = false
	a.put(token, "x", "theirs")
	a.commit(ctx)
	a.holds(token, values{"k": "ours", "x": "theirs"})
}

// A session that the codec cannot decode is an error of Load, not a panic, and not a new session.
func TestCodec_DecodeFails(t *testing.T) {
	a := newApp(t)
	token := a.session(nil)
	if err := a.store.Commit(token, []byte("no gob"), time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.sm.Load(context.Background(), token); err == nil {
		t.Error("what does not decode was loaded")
	}
}

// A codec may decode a session without values as no map: it can be changed all the same.
func TestCodec_NoMap(t *testing.T) {
	defer func() {
		if p := recover(); p != nil {
			t.Errorf("panic: %v", p)
		}
	}()
	a := newAppWithCodec(t, jsonCodec{})
	token := a.session(nil)
	deadline := time.Now().Add(time.Hour).UTC()
	b, _ := json.Marshal(jsonSession{Deadline: deadline})
	if err := a.store.Commit(token, b, deadline); err != nil {
		t.Fatal(err)
	}
	ctx := a.load(context.Background(), token)
	a.sm.Put(ctx, "k", "ours")
	a.put(token, "x", "theirs")
	a.commit(ctx)
	a.holdsOnly(token, values{"k": "ours", "x": "theirs"})
}

// What a session carries beside its values has a name that scs's own has, and tells nobody what the
// session is; others than the session manager never see it.
func TestCodec_Reserved(t *testing.T) {
	var conflicts []string
	a := newApp(t, etcdstore.WithResolver(func(c etcdstore.Conflict) (any, error) {
		conflicts = append(conflicts, c.Key)
		return nil, etcdstore.ErrConflict
	}))
	token := a.session(values{"secret": "swordfish"})
	ctx := a.load(context.Background(), token)
	a.sm.Put(ctx, "k", "ours")

	var own []string
	for _, key := range a.sm.Keys(ctx) {
		if !strings.HasPrefix(key, "__") {
			own = append(own, key)
			continue
		}
		value := a.sm.Get(ctx, key)
		said := fmt.Sprintf("%s %v %+v %#v", key, value, value, value)
		if strings.Contains(said, token) || strings.Contains(said, "swordfish") {
			t.Errorf("the value under %s shows the token, or what the session holds", key)
		}
	}
	if want := []string{"k", "secret", "user"}; !slices.Equal(own, want) {
		t.Errorf("keys %q, want %q", own, want)
	}

	err := a.store.Update(context.Background(), token, func(v map[string]any) error {
		if want := (values{"user": "alice", "secret": "swordfish"}); !maps.Equal(v, want) {
			t.Errorf("Update got %v, want %v", v, want)
		}
		v["k"] = "theirs"
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	a.refused(ctx, etcdstore.ErrConflict)
	if want := []string{"k"}; !slices.Equal(conflicts, want) {
		t.Errorf("the resolver was asked about %q, want %q", conflicts, want)
	}
	a.holds(token, values{"secret": "swordfish", "k": "theirs"})
}

// A conflict names the keys of the application.
func TestCodec_ConflictKeys(t *testing.T) {
	a := newApp(t)
	token := a.session(nil)
	ctx := a.load(context.Background(), token)
	a.sm.Put(ctx, "k", "ours")
	a.put(token, "k", "theirs")
	_, _, err := a.sm.Commit(ctx)
	var conflict *etcdstore.ConflictError
	if !errors.As(err, &conflict) || !slices.Equal(conflict.Keys, []string{"k"}) {
		t.Errorf("commit: %v, want a conflict on k", err)
	}
}
