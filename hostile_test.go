package etcdstore

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/record"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// seal completes a trailer as every version of the format has it: its length, the checksum, the magic.
func seal(payload, fields []byte) []byte {
	b := slices.Concat(payload, fields)
	b = binary.BigEndian.AppendUint16(b, uint16(len(fields)+14))
	b = binary.BigEndian.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return append(b, record.Magic...)
}

// hostileValue makes what may lie in etcd: bytes of any kind, a trailer that is whole with any fields, and a record of
// which a byte was changed, or the end was cut off.
func hostileValue(data, fields []byte, how byte, at uint16) []byte {
	r := record.Record{Payload: data, PrefixLen: len(fakePrefix), Expiry: record.Forever, ID: record.WriteID{1, 2, 3}}
	value := r.Encode()
	switch how % 4 {
	case 0:
		return data
	case 1:
		return seal(data, fields[:min(len(fields), 1000)])
	case 2:
		value[int(at)%len(value)] ^= max(how, 1)
		return value
	}
	return value[:len(value)-int(at)%(len(value)+1)]
}

// served says what value is under a token of scs's: the session that it holds at a time, if it does, and whether it is
// another store's.
func served(value []byte, now record.Millis) (payload []byte, ok, foreign bool) {
	if !bytes.HasSuffix(value, []byte(record.Magic)) {
		return value, true, false
	}
	start := len(value) - 51
	if start < 0 {
		return nil, false, false
	}
	fields := value[start : start+37]
	if fields[0] != 1 || !bytes.Equal(seal(value[:start], fields), value) {
		return nil, false, false
	}
	expiry := record.Millis(binary.BigEndian.Uint64(fields[5:]))
	foreign = binary.BigEndian.Uint32(fields[1:]) != uint32(len(fakePrefix))
	return value[:start], !foreign && (expiry == 0 || expiry > now), foreign
}

// Whatever lies under a session's key: calls do not panic, and either serve just what is there, or say that nothing is, or
// fail and write nothing.
func FuzzStoredValue(f *testing.F) {
	session := gobSession(f, time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC), map[string]any{"n": 1, "s": "text"})
	whole := record.Record{
		Payload: session, PrefixLen: len(fakePrefix),
		Expiry: 0x0123456789abcdef, LeaseEnd: 0x1122334455667788, ID: record.WriteID{1, 2, 3},
	}
	fields := whole.Encode()[len(session) : len(session)+37]
	changed := func(at int, b byte) []byte {
		c := bytes.Clone(fields)
		c[at] = b
		return c
	}
	for how := range byte(4) {
		f.Add(session, fields, how, uint16(0))
		f.Add([]byte("text"), []byte{}, how, uint16(9))
		f.Add(session, changed(0, 2), how, uint16(len(session)-1)) // a newer version; damage in the payload
		f.Add(session, changed(4, 9), how, uint16(len(session)+3)) // another prefix; damage in the trailer
		f.Add(session, changed(5, 0xff), how, uint16(60))          // expired
		f.Add(whole.Encode(), fields[:20], how, uint16(14))
	}
	f.Add([]byte(record.Magic), fields, byte(0), uint16(0))
	f.Fuzz(func(t *testing.T, data, fields []byte, how byte, at uint16) {
		synctest.Test(t, func(t *testing.T) {
			s, fake := newFakeStore(t)
			fake.seed(t, "other", "who", "other")
			before := fake.Keys()
			const token, key = "token", fakePrefix + "token"
			value := hostileValue(data, fields, how, at)
			put := func() int64 {
				if _, err := fake.Put(t.Context(), key, string(value)); err != nil {
					t.Fatal(err)
				}
				return fake.Keys()[key]
			}
			payload, ok, foreign := served(value, s.clock.Now())
			_, values, decodeErr := scs.GobCodec{}.Decode(payload)

			rev := put()
			unreadable := s.decoder.Version([]*mvccpb.KeyValue{fake.At(key, rev)}, rev).Unreadable() != nil
			b, found, findErr := s.Find(token)
			if found != ok || findErr != nil || ok && !bytes.Equal(b, payload) || !ok && b != nil {
				t.Errorf("Find of %q = %q, %v, %v; want %q, %v", value, b, found, findErr, payload, ok)
			}
			all, err := s.All()
			if b, listed := all[token]; err != nil || listed != ok || ok && !bytes.Equal(b, payload) || all["other"] == nil || len(all) > 2 {
				t.Errorf("All over %q = %q, %v", value, all, err)
			}
			for _, change := range []bool{false, true} {
				err = s.Update(t.Context(), token, func(v map[string]any) error {
					if !ok || decodeErr != nil || fmt.Sprint(v) != fmt.Sprint(values) {
						t.Errorf("Update over %q got %v; want %v, %v, %v", value, v, values, ok, decodeErr)
					}
					if change {
						v["changed"] = true
					}
					return nil
				})
				written := fake.Keys()[key] != rev
				if (err == nil) && (!ok || decodeErr != nil) || written != (change && err == nil) {
					t.Errorf("Update (change %v) over %q = %v, written %v", change, value, err, written)
				}
			}

			expiry := time.Now().Add(time.Hour)
			ours := gobSession(t, expiry, map[string]any{"ours": true})
			for name, ctx := range map[string]context.Context{"Commit": t.Context(), "CommitCtx after a Find": Begin(t.Context())} {
				rev := put()
				if explicit(ctx) != nil {
					_, _, _ = s.FindCtx(ctx, token)
				}
				err = s.CommitCtx(ctx, token, ours, expiry)
				written := fake.Keys()[key] != rev
				if (err == nil) != (!unreadable && !foreign) || written != (err == nil) {
					t.Errorf("%s over %q = %v, written %v; unreadable %t", name, value, err, written, unreadable)
				}
				if err == nil {
					wantFound(t, s, token, string(ours))
				}
			}

			put()
			if err := s.Delete(token); err != nil {
				t.Errorf("Delete of %q = %v", value, err)
			}
			if _, kept := fake.Keys()[key]; kept != foreign {
				t.Errorf("Delete of %q kept it: %v", value, kept)
			}
			for k, rev := range before {
				if fake.Keys()[k] != rev {
					t.Errorf("calls over %q touched %q", value, k)
				}
			}
		})
	})
}

// neighbours puts what a token must not reach beside a store's sessions: keys that the store reserves, and the session
// "inner" of a store with a longer prefix. All hold sessions that can be decoded.
func (f *fakeEtcd) neighbours(t *testing.T) {
	t.Helper()
	session := func(who string) []byte {
		return gobSession(t, time.Now().Add(time.Hour), map[string]any{"who": who})
	}
	for _, key := range []string{"~", "~lease/1", "~lock/x", "\x7f", "\xff"} {
		if _, err := f.Put(t.Context(), fakePrefix+key, string(session("reserved"))); err != nil {
			t.Fatal(err)
		}
	}
	inner := record.Record{Payload: session("inner"), PrefixLen: len(fakePrefix) + 2, Expiry: record.Forever}
	for key, value := range map[string][]byte{"1:inner": inner.Encode(), "1:bare": session("inner")} {
		if _, err := f.Put(t.Context(), fakePrefix+key, string(value)); err != nil {
			t.Fatal(err)
		}
	}
}

// Whatever the token: it reaches its own session, or nothing.
func FuzzToken(f *testing.F) {
	for _, token := range []string{
		"", "a", "own", "owner", "ow", "~", "~lease/1", "~lock/x", "\x7f", "\xff", "}", "\x00", "1:inner", "1:bare", "1:", "own~", "own\x00",
		"../own", "%7Elease/1", fakePrefix + "own", strings.Repeat("a", maxToken), strings.Repeat("a", maxToken+1), "é",
		"sGS3GQlPYYV8EH4XkgaKGPaOnFyjUgMwZ8n0LuFBQhw",
	} {
		f.Add(token, []byte("data"))
	}
	f.Add("a", []byte(record.Magic))
	f.Fuzz(func(t *testing.T, token string, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			s, fake := newFakeStore(t)
			fake.seed(t, "own", "who", "own")
			fake.neighbours(t)
			before := fake.Keys()
			own, _, err := s.Find("own")
			if err != nil {
				t.Fatal(err)
			}
			// wantKeys looks whether the keys are as they were, but for the one that is given, and leases.
			wantKeys := func(but string) {
				t.Helper()
				after := fake.Keys()
				for key := range after {
					if _, was := before[key]; !was && key != but && !strings.HasPrefix(key, fakePrefix+"~lease/") {
						t.Errorf("%q made the key %q", token, key)
					}
				}
				for key, rev := range before {
					if after[key] != rev && key != but {
						t.Errorf("%q touched the key %q", token, key)
					}
				}
			}
			expiry := time.Now().Add(time.Hour)
			etcdfake.Sent[any](fake.Etcd)

			if token == "own" {
				wantFound(t, s, token, string(own))
			} else {
				wantAbsent(t, s, token)
				if err := s.Update(t.Context(), token, func(map[string]any) error { return nil }); !errors.Is(err, ErrSessionGone) {
					t.Errorf("Update of %q = %v; want ErrSessionGone", token, err)
				}
				if err := s.Delete(token); err != nil {
					t.Errorf("Delete of %q = %v", token, err)
				}
			}
			wantKeys("")
			err = s.CommitCtx(Begin(t.Context()), token, data, expiry)
			if invalid := token == "" || len(token) > 512 || token[0] >= '~'; invalid || token == "1:inner" || token == "1:bare" {
				if !errors.Is(err, ErrInvalidToken) {
					t.Errorf("Commit of %q = %v; want ErrInvalidToken", token, err)
				}
				if sent := etcdfake.Sent[any](fake.Etcd); invalid && len(sent) > 0 {
					t.Errorf("etcd was asked about %q: %v", token, sent)
				}
				wantKeys("")
				return
			}
			if err != nil {
				t.Errorf("Commit of %q = %v", token, err)
			}
			wantFound(t, s, token, string(data))
			want := map[string][]byte{"own": own, token: data}
			if token == "own" {
				want = map[string][]byte{token: data}
			}
			if all, err := s.All(); err != nil || !maps.EqualFunc(all, want, bytes.Equal) {
				t.Errorf("All = %q, %v; want %q", all, err, want)
			}
			if err := s.Commit(token, own, expiry); err != nil {
				t.Errorf("Commit over %q = %v", token, err)
			}
			if err := s.Update(t.Context(), token, func(v map[string]any) error { v["n"] = 1; return nil }); err != nil {
				t.Errorf("Update of %q = %v", token, err)
			}
			wantValues(t, s, token, map[string]any{"who": "own", "n": 1})
			if err := s.Delete(token); err != nil {
				t.Errorf("Delete of %q = %v", token, err)
			}
			wantAbsent(t, s, token)
			wantKeys(fakePrefix + token)
		})
	})
}

// who is a handler that reads and does not write: it answers with the session's value "who".
func who(sm *scs.SessionManager) http.Handler {
	return sm.LoadAndSave(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, sm.GetString(r.Context(), "who"))
	}))
}

// serve has a handler answer a request with Cookie headers as they are, as net/http's server does.
func serve(h http.Handler, cookies ...string) *httptest.ResponseRecorder {
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), http.ServerContextKey, &http.Server{}))
	defer cancel()
	w := httptest.NewRecorder()
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody)
	r.Header["Cookie"] = cookies
	h.ServeHTTP(w, r)
	return w
}

// Whatever the cookies: the answer is a page, with no other session's data, and nothing is written.
func FuzzCookie(f *testing.F) {
	const token = "sGS3GQlPYYV8EH4XkgaKGPaOnFyjUgMwZ8n0LuFBQhw"
	for _, cookie := range []string{
		"", "session=", "session=" + token, "session=\"" + token + "\"", "session=" + token[1:], "session=" + token + "A",
		"other=1; session=" + token + "; session=x", "session=~lease/1", "session=~", "session=1:inner", "session=1:bare",
		"session=\x7f", "session=\xff", "session=\x00\r\n", "session=" + strings.Repeat("a", 4000), "session", "=", ";;;", "session==",
		"session=a\nsession=" + token, "session=%7Elease/1",
	} {
		f.Add(cookie)
	}
	manager := scs.New() // outside of the bubbles, since it starts a goroutine
	f.Fuzz(func(t *testing.T, cookie string) {
		synctest.Test(t, func(t *testing.T) {
			s, fake := newFakeStore(t)
			fake.seed(t, token, "who", "own")
			fake.neighbours(t)
			sm := *manager
			sm.Store = s
			rev := fake.Revision()
			etcdfake.Sent[any](fake.Etcd)

			w := serve(who(&sm), strings.Split(cookie, "\n")...)
			body := w.Body.String()
			if w.Code != http.StatusOK || body != "" && (body != "own" || !strings.Contains(cookie, token)) {
				t.Errorf("%q was answered with %d, %q", cookie, w.Code, body)
			}
			if set := w.Header().Values("Set-Cookie"); len(set) > 0 {
				t.Errorf("%q was answered with the cookies %q", cookie, set)
			}
			for _, msg := range etcdfake.Sent[any](fake.Etcd) {
				if fakeReads(msg) == nil {
					t.Errorf("%q made a request other than a read: %v", cookie, msg)
				}
			}
			if fake.Revision() != rev {
				t.Errorf("%q wrote something", cookie)
			}
			synctest.Wait()
			if n := s.implicit.len(); n != 0 {
				t.Errorf("%q left %d transactions", cookie, n)
			}
		})
	})
}

// cookieMaker makes cookies that no session has.
type cookieMaker struct {
	*rand.Rand
	token  string   // the victim's
	others []string // what are names of keys, and no tokens of the store's
}

func (m cookieMaker) bytes(n int, from string) string {
	b := make([]byte, n)
	for i := range b {
		if from == "" {
			b[i] = byte(m.IntN(256))
		} else {
			b[i] = from[m.IntN(len(from))]
		}
	}
	return string(b)
}

func (m cookieMaker) make() string {
	const base64url = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	const allowed = base64url + "!#$%&'()*+./:<=>?@[]^`{|}~ "
	switch m.IntN(9) {
	case 0:
		return m.bytes(m.IntN(4001), "") // not even a name
	case 1:
		return "session=" + m.bytes(m.IntN(4001), "")
	case 2:
		return "session=" + m.bytes(m.IntN(4001), allowed)
	case 3:
		return "session=" + m.bytes(43, base64url)
	case 4:
		return "session=~" + []string{"", "lease/", "lock/", "~", "user/"}[m.IntN(5)] + m.bytes(m.IntN(20), "0123456789abcdef")
	case 5:
		return "session=" + m.others[m.IntN(len(m.others))]
	case 6:
		at := m.IntN(len(m.token))
		return "session=" + m.token[:at] + "." + m.token[at+1:]
	case 7:
		return "session=" + m.token[:m.IntN(len(m.token))]
	}
	return "session=" + m.token + m.bytes(1+m.IntN(10), base64url)
}

// idle reports whether the store has nothing queued or in flight, and remembers no request.
func idle(s *EtcdStore) bool {
	p, r := s.pipeline, s.reader
	return p.Idle() && r.Idle() && s.implicit.len() == 0
}

// heap returns how much memory is in use.
func heap() int64 {
	var m runtime.MemStats
	for range 2 { // what pools hold survives one
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// Requests with cookies that no session has leave nothing behind, in etcd or in the process.
func TestHostile_RandomCookies(t *testing.T) {
	requests, workers := 100_000, 32
	if raceEnabled {
		requests = 10_000
	}
	s, cli := newTestStore(t)
	inner := NewWithPrefix(cli, defaultPrefix+"1:")
	defer mustClose(t, inner)
	sm := newManager(s)
	const token = "sGS3GQlPYYV8EH4XkgaKGPaOnFyjUgMwZ8n0LuFBQhw"
	expiry := time.Now().Add(time.Hour)
	victim := gobSession(t, expiry, map[string]any{"who": "victim"})
	for _, s := range []*EtcdStore{s, inner} {
		if err := s.Commit(token, victim, expiry); err != nil {
			t.Fatal(err)
		}
	}
	others := []string{"1:" + token, defaultPrefix + token, "~lease"}
	for _, lease := range etcdtest.Leases(t, cli) {
		others = append(others, "~lease/"+strconv.FormatInt(int64(lease), 16))
	}
	handler := who(sm)
	if got := serve(handler, "session="+token).Body.String(); got != "victim" {
		t.Fatalf("the victim's own page says %q", got)
	}

	run := func(n int, seed uint64) {
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				m := cookieMaker{rand.New(rand.NewPCG(seed, uint64(w))), token, others}
				for range n / workers {
					cookie := m.make()
					if got := serve(handler, cookie); got.Code != http.StatusOK || got.Body.Len() > 0 || len(got.Header().Values("Set-Cookie")) > 0 {
						t.Errorf("%q was answered with %d, %q, %v", cookie, got.Code, got.Body, got.Header())
						return
					}
				}
			})
		}
		wg.Wait()
	}
	state := func() (keys []string, leases []clientv3.LeaseID, rev int64) {
		resp, err := cli.Get(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		leases = etcdtest.Leases(t, cli)
		slices.Sort(leases)
		return etcdtest.Keys(t, cli, ""), leases, resp.Header.Revision
	}
	settled := func() {
		t.Helper()
		etcdtest.Eventually(t, 10*time.Second, func() bool { return idle(s) }, "the store does not come to rest")
	}

	run(requests/10, 1) // connections, pools, tables that grow once
	settled()
	keys, leases, rev := state()
	goroutines, memory := runtime.NumGoroutine(), heap()

	start := time.Now()
	run(requests, 2)
	t.Logf("%d requests in %v", requests, time.Since(start))
	settled()
	if k, l, r := state(); !slices.Equal(k, keys) || !slices.Equal(l, leases) || r != rev {
		t.Errorf("keys %q, leases %x at revision %d; before: %q, %x at %d", k, l, r, keys, leases, rev)
	}
	etcdtest.Eventually(t, 10*time.Second, func() bool { return runtime.NumGoroutine() <= goroutines }, "there are more goroutines than before")
	if grown := heap() - memory; grown > 4<<20 {
		t.Errorf("the heap has grown by %d KiB", grown>>10)
	} else {
		t.Logf("heap: %d KiB more than %d KiB", grown>>10, memory>>10)
	}
}
