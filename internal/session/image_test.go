package session

import (
	"encoding/gob"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/record"
)

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

// encodedImage returns an image as it is read from etcd, or given by the session manager.
func encodedImage(t testing.TB, codec scs.Codec, c *Contents, expiry record.Millis) *Image {
	t.Helper()
	payload, err := codec.Encode(c.deadline, c.values)
	if err != nil {
		t.Fatal(err)
	}
	return NewImage(codec, payload, expiry)
}

// account is a type of an application's own.
type account struct {
	Name  string
	Roles []string
}

func registerTypes() {
	gob.Register(account{})
	gob.Register(time.Time{})
	gob.Register([]string{})
	gob.Register(map[string]int{})
	gob.Register([]any{})
	gob.Register(map[string]any{})
}

// gobImage returns an image as it is read from etcd.
func gobImage(t testing.TB, c *Contents, expiry record.Millis) *Image {
	t.Helper()
	return encodedImage(t, scs.GobCodec{}, c, expiry)
}

// wantImage fails t unless what i stores has this expiry and these contents.
func wantImage(t *testing.T, i *Image, want *Contents, expiry record.Millis) {
	t.Helper()
	if i == nil {
		t.Fatal("no image")
	}
	payload, err := i.Encode()
	if err != nil {
		t.Fatal(err)
	}
	stored, err := NewImage(i.codec, payload, i.expiry).Contents()
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, stored, want)
	if i.expiry != expiry {
		t.Errorf("expiry = %d, want %d", i.expiry, expiry)
	}
}

// A payload that does not decode is stored as it is all the same.
func TestImage_EncodesWhatDoesNotDecode(t *testing.T) {
	i := NewImage(scs.GobCodec{}, []byte("opaque"), 1000)
	if _, err := i.Contents(); err == nil {
		t.Fatal("it decodes")
	}
	if b, err := i.Encode(); err != nil || string(b) != "opaque" {
		t.Errorf("encoded = %q, %v", b, err)
	}
}

// What Update's function leaves is seen by others as the codec gives it back: in JSON all numbers are floats.
func TestImage_ApplicationValuesPassTheCodec(t *testing.T) {
	base := encodedImage(t, jsonCodec{}, with("n", 1), 1000)
	made, err := next(t, &Update{Fn: func(v map[string]any) error { v["n"] = 2; return nil }}, at(base, 5))
	if err != nil {
		t.Fatal(err)
	}
	sum := func(c Clash) (any, error) { return c.Ours.(float64) + c.Theirs.(float64) - c.Base.(float64), nil }
	ours := encodedImage(t, jsonCodec{}, with("n", 2), 1000)
	c := &Commit{Merger: Merger{Resolve: sum}, Base: readAt(base, 5), Ours: ours}
	defer func() {
		if p := recover(); p != nil {
			t.Error(p)
		}
	}()
	if _, err := next(t, c, at(made, 0)); err != nil {
		t.Error(err)
	}
}

// The same with gob, which drops what a time knows of the process's clock.
func TestImage_MonotonicTime(t *testing.T) {
	registerTypes()
	base := gobImage(t, with(), 1000)
	now := time.Now()
	made, err := next(t, &Update{Fn: func(v map[string]any) error { v["t"] = now; return nil }}, at(base, 5))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := made.Encode()
	if err != nil {
		t.Fatal(err)
	}
	// A request reads what Update wrote (from etcd), changes t, and commits over the image in memory with one more change.
	seen := NewImage(scs.GobCodec{}, payload, 1000)
	ours := gobImage(t, with("x", 1), 1000)
	more, err := next(t, &Commit{Base: readAt(base, 5), Ours: ours}, at(made, 0))
	if err != nil {
		t.Fatal(err)
	}
	c := &Commit{Base: readAt(seen, 6), Ours: gobImage(t, with("t", day(1)), 1000)}
	if _, err := next(t, c, at(more, 0)); err != nil {
		t.Error(err)
	}
}

type panicky struct{ scs.GobCodec }

func (panicky) Decode([]byte) (time.Time, map[string]any, error) { panic("codec") }

// A codec that panicked has not decoded to nothing.
func TestImage_PanickingCodec(t *testing.T) {
	i := NewImage(panicky{}, []byte("x"), 1)
	func() {
		defer func() { _ = recover() }()
		_, _ = i.Contents()
	}()
	if c, err := i.Contents(); c == nil && err == nil {
		t.Error("nil contents, nil error")
	}
}

// broken is a codec that does not return.
type broken struct{ fail func() }

func (b broken) Encode(time.Time, map[string]any) ([]byte, error) {
	b.fail()
	return nil, nil
}

func (b broken) Decode([]byte) (time.Time, map[string]any, error) {
	b.fail()
	return time.Time{}, nil, nil
}

// apart runs f in a goroutine of its own, and reports whether it returned.
func apart(f func()) (returned bool) {
	var wg sync.WaitGroup
	wg.Go(func() {
		defer func() { _ = recover() }()
		f()
		returned = true
	})
	wg.Wait()
	return returned
}

// A codec that panicked, or ended its goroutine, has made nothing, and whoever asks is told so: the
// first call, where it returns, and those after it. What the panic said may be a session's, and is not.
func TestImage_BrokenCodec(t *testing.T) {
	for _, tc := range []struct {
		name    string
		codec   broken
		returns bool
	}{
		{"panics", broken{func() { panic("secret") }}, true},
		{"ends its goroutine", broken{runtime.Goexit}, false},
	} {
		check := func(t *testing.T, call func() (nothing bool, err error)) {
			t.Helper()
			ask := func() {
				nothing, err := call()
				if !nothing || !errors.Is(err, errCodec) {
					t.Errorf("nothing: %v, error: %v; want errCodec", nothing, err)
				}
				if err != nil && strings.Contains(err.Error(), "secret") {
					t.Errorf("the error shows the session: %v", err)
				}
			}
			if returned := apart(ask); returned != tc.returns {
				t.Errorf("the first call returned: %v, want %v", returned, tc.returns)
			}
			for range 2 {
				if !apart(ask) {
					t.Error("a later call did not return")
				}
			}
		}
		t.Run(tc.name+"/Decode", func(t *testing.T) {
			i := NewImage(tc.codec, []byte("opaque"), 1000)
			check(t, func() (bool, error) {
				c, err := i.Contents()
				return c == nil, err
			})
			if b, err := i.Encode(); err != nil || string(b) != "opaque" {
				t.Errorf("Encode = %q, %v; want the payload", b, err)
			}
		})
		t.Run(tc.name+"/Encode", func(t *testing.T) {
			i, err := imageWith(tc.codec, with("k", 1), 1000)
			if err != nil {
				t.Fatal(err)
			}
			check(t, func() (bool, error) {
				b, err := i.Encode()
				return b == nil, err
			})
			c, err := i.Contents()
			if err != nil {
				t.Fatal(err)
			}
			wantContents(t, c, with("k", 1))
		})
	}
}

// What the application's code has made and the codec fails on is no image, and fails at once.
func TestImage_BrokenCodecOfApplicationValues(t *testing.T) {
	c := with("k", 1)
	c.raw = true
	i, err := imageWith(broken{func() { panic("secret") }}, c, 1000)
	if i != nil || !errors.Is(err, errCodec) {
		t.Errorf("image = %v, error = %v; want errCodec", i, err)
	}
}
