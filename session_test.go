package etcdstore

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// A payload that does not decode is stored as it is all the same.
func TestImage_EncodesWhatDoesNotDecode(t *testing.T) {
	i := imageOf(scs.GobCodec{}, []byte("opaque"), 1000)
	if _, err := i.decoded(); err == nil {
		t.Fatal("it decodes")
	}
	if b, err := i.encoded(); err != nil || string(b) != "opaque" {
		t.Errorf("encoded = %q, %v", b, err)
	}
}

// Also where the store decoded it in vain, since others commit to the session.
func TestImage_OpaqueContended(t *testing.T) {
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t))
	defer mustClose(t, s)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if err := s.Commit("a", []byte("opaque"), time.Now().Add(time.Hour)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Also where the store decoded it in vain, to see whether it is a touch.
func TestImage_OpaqueTouch(t *testing.T) {
	s := New(etcdtest.New(t, etcdtest.Config{}).Client(t), WithTouchInterval(time.Hour))
	defer mustClose(t, s)
	ctx := Begin(t.Context())
	for range 2 {
		if err := s.CommitCtx(ctx, "a", []byte("opaque"), time.Now().Add(time.Hour)); err != nil {
			t.Error(err)
		}
	}
}

// What Update's function leaves is seen by others as the codec gives it back: in JSON all numbers are floats.
func TestImage_ApplicationValuesPassTheCodec(t *testing.T) {
	base := encodedImage(t, jsonCodec{}, with("n", 1), 1000)
	made, err := (&update{fn: func(v map[string]any) error { v["n"] = 2; return nil }}).next(state{image: base, rev: 5})
	if err != nil {
		t.Fatal(err)
	}
	sum := func(c Conflict) (any, error) { return c.Ours.(float64) + c.Theirs.(float64) - c.Base.(float64), nil }
	c := &commit{merger: merger{resolver: sum}, base: &read{image: base, rev: 5}, ours: encodedImage(t, jsonCodec{}, with("n", 2), 1000)}
	defer func() {
		if p := recover(); p != nil {
			t.Error(p)
		}
	}()
	if _, err := c.next(state{image: made}); err != nil {
		t.Error(err)
	}
}

// The same with gob, which drops what a time knows of the process's clock.
func TestImage_MonotonicTime(t *testing.T) {
	registerTypes()
	base := gobImage(t, with(), 1000)
	now := time.Now()
	made, err := (&update{fn: func(v map[string]any) error { v["t"] = now; return nil }}).next(state{image: base, rev: 5})
	if err != nil {
		t.Fatal(err)
	}
	payload, err := made.encoded()
	if err != nil {
		t.Fatal(err)
	}
	// A request reads what Update wrote (from etcd), changes t, and commits over the image in memory with one more change.
	seen := imageOf(scs.GobCodec{}, payload, 1000)
	more, err := (&commit{base: &read{image: base, rev: 5}, ours: gobImage(t, with("x", 1), 1000)}).next(state{image: made})
	if err != nil {
		t.Fatal(err)
	}
	c := &commit{base: &read{image: seen, rev: 6}, ours: gobImage(t, with("t", day(1)), 1000)}
	if _, err := c.next(state{image: more}); err != nil {
		t.Error(err)
	}
}

func TestCommit_ExpiryFollowsTheResolvedDeadline(t *testing.T) {
	c := &commit{
		merger: merger{resolver: KeepOurs},
		base:   &read{image: gobImage(t, until(day(9), with()), 9000), rev: 5},
		ours:   gobImage(t, until(day(1), with()), 1000),
	}
	got, err := c.next(state{image: gobImage(t, until(day(2), with()), 2000), rev: 7})
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, got, until(day(1), with()), 1000)
}

type panicky struct{ scs.GobCodec }

func (panicky) Decode([]byte) (time.Time, map[string]any, error) { panic("codec") }

// A codec that panicked has not decoded to nothing.
func TestImage_PanickingCodec(t *testing.T) {
	i := imageOf(panicky{}, []byte("x"), 1)
	func() {
		defer func() { _ = recover() }()
		_, _ = i.decoded()
	}()
	if c, err := i.decoded(); c == nil && err == nil {
		t.Error("nil contents, nil error")
	}
}

func TestUnknownError_KeepsItsCause(t *testing.T) {
	if got := unknownError(unknownError(context.Canceled)); !strings.Contains(got.Error(), "canceled") {
		t.Error(got)
	}
}

// Touches that are not written do not add up: what counts is the expiry that is stored.
func TestCommit_TouchesDoNotAddUp(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	s := New(cli, WithTouchInterval(time.Hour))
	defer mustClose(t, s)
	start := time.Now().Add(24 * time.Hour)
	enc := func(c *contents) []byte { return gobSession(t, c.deadline, c.values) }
	if err := s.Commit("a", enc(with("k", 1)), start); err != nil {
		t.Fatal(err)
	}
	ctx := Begin(t.Context())
	if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := s.Commit("a", enc(with("k", 1)), start.Add(time.Hour)); err != nil { // another request's touch
		t.Fatal(err)
	}
	for _, d := range []time.Duration{100 * time.Minute, 150 * time.Minute} {
		if err := s.CommitCtx(ctx, "a", enc(with("k", 1)), start.Add(d)); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := cli.Get(t.Context(), defaultPrefix+"a")
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatal(resp, err)
	}
	rec, _ := record.Decode(resp.Kvs[0].Value)
	if behind := record.ToMillis(start.Add(150 * time.Minute)).Since(rec.Expiry); behind >= time.Hour {
		t.Errorf("stored expiry is %v behind, the interval is 1h", behind)
	}
}

// What cannot be read is not served, not listed, and not overwritten, but it can be deleted.
func TestStore_Unreadable(t *testing.T) {
	whole := func(token string) []byte {
		r := record.Record{Payload: gobSession(t, time.Now().Add(time.Hour), map[string]any{"n": 1, "of": token}), PrefixLen: len(fakePrefix), Expiry: record.Forever}
		return r.Encode()
	}
	damaged, newer := whole("damaged"), seal([]byte("payload"), []byte{record.FormatVersion + 1})
	damaged[len(damaged)/2] ^= 1
	for _, tc := range []struct {
		name  string
		value []byte
		err   error
	}{
		{"damaged", damaged, errCorrupt},
		{"newer", newer, errFormat},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, f := newFakeStore(t)
				f.seed(t, "whole", "n", 1)
				f.seed(t, "a", "n", 1)
				ctx := Begin(t.Context())
				if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
					t.Fatal(ok, err)
				}
				for _, token := range []string{"a", "a:b"} {
					if _, err := f.Put(t.Context(), fakePrefix+token, string(tc.value)); err != nil {
						t.Fatal(err)
					}
				}
				versions := func() [2]int {
					return [2]int{len(f.Versions(fakePrefix + "a")), len(f.Versions(fakePrefix + "a:b"))}
				}
				before := versions()

				expiry := time.Now().Add(time.Hour)
				data := gobSession(t, expiry, map[string]any{"n": 2})
				if b, ok, err := s.Find("a"); b != nil || ok || !errors.Is(err, tc.err) {
					t.Errorf("Find = %q, %v, %v; want %v", b, ok, err, tc.err)
				}
				if all, err := s.All(); err != nil || len(all) != 1 || all["whole"] == nil {
					t.Errorf("All = %q, %v; want what can be read", all, err)
				}
				if err := s.Commit("a", data, expiry); !errors.Is(err, tc.err) {
					t.Errorf("Commit = %v; want %v", err, tc.err)
				}
				if err := s.CommitCtx(ctx, "a", data, expiry); !errors.Is(err, tc.err) {
					t.Errorf("the commit of a request that read the session before = %v; want %v", err, tc.err)
				}
				failed := Begin(t.Context())
				if _, _, err := s.FindCtx(failed, "a"); !errors.Is(err, tc.err) {
					t.Errorf("FindCtx = %v; want %v", err, tc.err)
				}
				if err := s.CommitCtx(failed, "a", data, expiry); !errors.Is(err, tc.err) {
					t.Errorf("CommitCtx = %v; want %v", err, tc.err)
				}
				err := s.Update(t.Context(), "a", func(map[string]any) error {
					t.Error("Update ran its function")
					return nil
				})
				if !errors.Is(err, tc.err) {
					t.Errorf("Update = %v; want %v", err, tc.err)
				}
				// Whose it is under such a token it does not say, so it is not this store's.
				wantAbsent(t, s, "a:b")
				if err := s.Commit("a:b", data, expiry); !errors.Is(err, ErrInvalidToken) {
					t.Errorf("Commit over what may be another store's = %v; want ErrInvalidToken", err)
				}
				if err := s.Delete("a:b"); err != nil {
					t.Errorf("Delete of what may be another store's = %v", err)
				}
				if after := versions(); after != before {
					t.Errorf("versions of the keys before: %d, after: %d", before, after)
				}

				if err := s.Delete("a"); err != nil {
					t.Errorf("Delete = %v", err)
				}
				wantAbsent(t, s, "a")
				mustCommit(t, s, "a", "new", time.Hour)
				wantFound(t, s, "a", "new")
			})
		})
	}
}
