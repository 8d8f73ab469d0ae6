package etcdstore

import (
	"encoding/json"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/record"
	"github.com/seed210be38d/etcdstore/internal/session"
)

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

// Touches that are not written do not add up: what counts is the expiry that is stored.
func TestCommit_TouchesDoNotAddUp(t *testing.T) {
	cli := etcdtest.New(t, etcdtest.Config{}).Client(t)
	s := New(cli, WithTouchInterval(time.Hour))
	defer mustClose(t, s)
	start := time.Now().Add(24 * time.Hour)
	enc := func(values map[string]any) []byte { return gobSession(t, day0, values) }
	if err := s.Commit("a", enc(map[string]any{"k": 1}), start); err != nil {
		t.Fatal(err)
	}
	ctx := Begin(t.Context())
	if _, ok, err := s.FindCtx(ctx, "a"); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if err := s.Commit("a", enc(map[string]any{"k": 1}), start.Add(time.Hour)); err != nil { // another request's touch
		t.Fatal(err)
	}
	for _, d := range []time.Duration{100 * time.Minute, 150 * time.Minute} {
		if err := s.CommitCtx(ctx, "a", enc(map[string]any{"k": 1}), start.Add(d)); err != nil {
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
		{"damaged", damaged, session.ErrCorrupt},
		{"newer", newer, session.ErrFormat},
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
				if b, ok, err := s.Find("a"); b != nil || ok || err != nil { // so that its user can log in again
					t.Errorf("Find = %q, %v, %v; want not found", b, ok, err)
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
				if _, ok, err := s.FindCtx(failed, "a"); ok || err != nil {
					t.Errorf("FindCtx = %v, %v; want not found", ok, err)
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

// day0 is the deadline of sessions whose deadline does not matter.
var day0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

// jsonCodec is a codec that an application may have in place of gob.
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
