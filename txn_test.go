package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// gobImage returns an image as it is read from etcd.
func gobImage(t testing.TB, c *contents, expiry record.Millis) *image {
	t.Helper()
	return encodedImage(t, scs.GobCodec{}, c, expiry)
}

// wantImage fails t unless what i stores has this expiry and these contents.
func wantImage(t *testing.T, i *image, want *contents, expiry record.Millis) {
	t.Helper()
	if i == nil {
		t.Fatal("no image")
	}
	payload, err := i.encoded()
	if err != nil {
		t.Fatal(err)
	}
	stored, err := imageOf(i.codec, payload, i.expiry).decoded()
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, stored, want)
	if i.expiry != expiry {
		t.Errorf("expiry = %d, want %d", i.expiry, expiry)
	}
}

func TestCommit_Next(t *testing.T) {
	// What is in etcd, and what the commit wants, is undecodable where the commit must not look at it.
	opaque := func(expiry record.Millis) *image { return imageOf(scs.GobCodec{}, []byte("opaque"), expiry) }
	ourOpaque := opaque(1000)
	mine := gobImage(t, with("a", 2, "b", 1), 1000)
	seen := gobImage(t, with("a", 1, "b", 1), 1000)
	for _, tc := range []struct {
		name     string
		base     *read
		ours     *image
		cur      state
		want     *image    // itself
		merged   *contents // or merged to this
		gone     bool
		conflict []string
	}{
		{
			name: "not read, absent",
			ours: ourOpaque, cur: state{}, want: ourOpaque,
		},
		{
			name: "not read, present: overwritten",
			ours: ourOpaque, cur: state{image: opaque(5), rev: 7}, want: ourOpaque,
		},
		{
			name: "read absent, still absent",
			base: &read{}, ours: ourOpaque, cur: state{}, want: ourOpaque,
		},
		{
			name: "read absent, created with other keys",
			base: &read{}, ours: mine, cur: state{image: gobImage(t, with("c", 3), 1000), rev: 7},
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read absent, created with the same key",
			base: &read{}, ours: mine, cur: state{image: gobImage(t, with("a", 2, "c", 3), 1000), rev: 7},
			conflict: []string{"a"},
		},
		{
			name: "read absent, created in the same fold",
			base: &read{}, ours: mine, cur: state{image: gobImage(t, with("c", 3), 1000)},
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read at the current revision",
			base: &read{image: opaque(5), rev: 7}, ours: ourOpaque, cur: state{image: opaque(5), rev: 7},
			want: ourOpaque,
		},
		{
			name: "read before the current revision, other keys",
			base: &read{image: seen, rev: 5}, ours: mine, cur: state{image: gobImage(t, with("a", 1, "b", 2, "c", 3), 1000), rev: 7},
			merged: with("a", 2, "b", 2, "c", 3),
		},
		{
			name: "read before the current revision, same key",
			base: &read{image: seen, rev: 5}, ours: mine, cur: state{image: gobImage(t, with("a", 3, "b", 1), 1000), rev: 7},
			conflict: []string{"a"},
		},
		{
			// A guess may be older than what the call has read; it is merged all the same, and fails its compare.
			name: "read behind the current revision",
			base: &read{image: seen, rev: 9}, ours: mine, cur: state{image: gobImage(t, with("a", 1, "b", 2), 1000), rev: 7},
			merged: with("a", 2, "b", 2),
		},
		{
			name: "changed in the same fold",
			base: &read{image: seen, rev: 5}, ours: mine, cur: state{image: gobImage(t, with("a", 1, "b", 1, "c", 3), 1000)},
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "after a merge: no revision holds what the request believes",
			base: &read{image: seen}, ours: mine, cur: state{image: gobImage(t, with("a", 1, "b", 1, "c", 3), 1000), rev: 7},
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "after a merge, changed in the same fold",
			base: &read{image: seen}, ours: mine, cur: state{image: gobImage(t, with("a", 1, "b", 1, "c", 3), 1000)},
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read, then deleted",
			base: &read{image: opaque(5), rev: 5}, ours: ourOpaque, cur: state{rev: 0},
			gone: true,
		},
		{
			name: "read, then expired where it is",
			base: &read{image: opaque(5), rev: 5}, ours: ourOpaque, cur: state{rev: 5},
			gone: true,
		},
		{
			name: "merged, then deleted",
			base: &read{image: opaque(5)}, ours: ourOpaque, cur: state{},
			gone: true,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &commit{base: tc.base, ours: tc.ours}
			for range 2 { // a transition runs again when its outcome did not count
				got, err := c.next(tc.cur)
				switch {
				case tc.gone:
					if !errors.Is(err, ErrSessionGone) || errors.Is(err, ErrConflict) || got != nil {
						t.Errorf("next = %v, %v; want ErrSessionGone", got, err)
					}
				case tc.conflict != nil:
					wantConflict(t, err, tc.conflict...)
				case err != nil:
					t.Error(err)
				case tc.want != nil:
					if got != tc.want {
						t.Errorf("next = %+v, want ours itself", got)
					}
				default:
					wantImage(t, got, tc.merged, 1000)
				}
			}
		})
	}
}

// The isolation level and the resolver of a commit reach the merge.
func TestCommit_Next_Options(t *testing.T) {
	base := &read{image: gobImage(t, with("a", 1, "b", 1), 1000), rev: 5}
	ours := gobImage(t, with("a", 2, "b", 1), 1000)
	other := state{image: gobImage(t, with("a", 1, "b", 2), 1000), rev: 7}
	same := state{image: gobImage(t, with("a", 3, "b", 1), 1000), rev: 7}

	_, err := (&commit{merger: merger{isolation: Serializable}, base: base, ours: ours}).next(other)
	wantConflict(t, err, "b")
	got, err := (&commit{merger: merger{resolver: KeepOurs}, base: base, ours: ours}).next(same)
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, got, with("a", 2, "b", 1), 1000)

	own := errors.New("no")
	refuse := func(Conflict) (any, error) { return nil, own }
	_, err = (&commit{merger: merger{resolver: refuse}, base: base, ours: ours}).next(same)
	if callError("commit", err) != own { //nolint:errorlint // it must arrive as it is
		t.Errorf("error = %v, want the resolver's", err)
	}
}

// The side that changed the deadline decides the expiry; else the later one holds.
func TestCommit_Next_Expiry(t *testing.T) {
	type side struct {
		deadline int // a day
		expiry   record.Millis
	}
	absent := side{-1, 0}
	for _, tc := range []struct {
		name                     string
		base, ours, theirs, want side
	}{
		{"ours is later", side{0, 500}, side{0, 2000}, side{0, 1000}, side{0, 2000}},
		{"theirs is later", side{0, 500}, side{0, 1000}, side{0, 2000}, side{0, 2000}},
		{"equal", side{0, 500}, side{0, 1000}, side{0, 1000}, side{0, 1000}},
		{"both are shorter than the base", side{0, 5000}, side{0, 2000}, side{0, 1000}, side{0, 2000}},
		{"we moved the deadline, later", side{0, 500}, side{1, 2000}, side{0, 1000}, side{1, 2000}},
		{"we moved the deadline, earlier", side{1, 500}, side{0, 1000}, side{1, 2000}, side{0, 1000}},
		{"they moved the deadline, later", side{0, 500}, side{0, 1000}, side{1, 2000}, side{1, 2000}},
		{"they moved the deadline, earlier", side{1, 500}, side{1, 2000}, side{0, 1000}, side{0, 1000}},
		{"no base, ours is later", absent, side{1, 2000}, side{0, 1000}, side{1, 2000}},
		{"no base, theirs is later", absent, side{0, 1000}, side{1, 2000}, side{1, 2000}},
		{"theirs is not known", side{0, 500}, side{0, 1000}, side{0, 0}, side{0, 1000}},
		{"theirs is not known, they moved the deadline", side{0, 500}, side{0, 1000}, side{1, 0}, side{1, 1000}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			base := &read{}
			if tc.base != absent {
				base = &read{image: gobImage(t, until(day(tc.base.deadline), with()), tc.base.expiry), rev: 5}
			}
			c := &commit{base: base, ours: gobImage(t, until(day(tc.ours.deadline), with("a", 1)), tc.ours.expiry)}
			theirs := gobImage(t, until(day(tc.theirs.deadline), with("b", 1)), tc.theirs.expiry)
			got, err := c.next(state{image: theirs, rev: 7})
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, got, until(day(tc.want.deadline), with("a", 1, "b", 1)), tc.want.expiry)
		})
	}
}

// A touch beside other changes: what they left stays, and within the touch interval nothing is written at all.
func TestCommit_Next_Touch(t *testing.T) {
	const stored = record.Millis(1_000_000)
	for _, tc := range []struct {
		name     string
		interval time.Duration
		theirs   record.Millis
		ours     record.Millis
		want     record.Millis // 0: theirs itself, not written
	}{
		{"no interval", 0, stored, stored + 1, stored + 1},
		{"no interval, not moved", 0, stored, stored, 0},
		{"within", time.Second, stored, stored + 999, 0},
		{"not moved", time.Second, stored, stored, 0},
		{"at", time.Second, stored, stored + 1000, stored + 1000},
		{"beyond", time.Second, stored, stored + 5000, stored + 5000},
		{"earlier than theirs", time.Second, stored, stored - 5000, 0},
		{"theirs is not known", time.Hour, 0, stored, stored},
	} {
		for _, level := range []Isolation{Snapshot, Serializable} {
			t.Run(fmt.Sprintf("%s/isolation=%d", tc.name, level), func(t *testing.T) {
				theirs := gobImage(t, with("a", 2, "b", 1), tc.theirs)
				c := &commit{
					merger: merger{level, neverAsked(t)},
					base:   &read{image: gobImage(t, with("a", 1), 500), rev: 5},
					ours:   gobImage(t, with("a", 1), tc.ours),
					touch:  tc.interval,
				}
				got, err := c.next(state{image: theirs, rev: 7})
				switch {
				case err != nil:
					t.Error(err)
				case tc.want != 0:
					wantImage(t, got, with("a", 2, "b", 1), tc.want)
				case got != theirs:
					t.Errorf("next = %+v, want theirs itself", got)
				}
			})
		}
	}
}

// stored is what a request believes that has read or stored an image.
func stored(i *image, rev int64) *read {
	return &read{image: i, rev: rev, version: &version{rev: rev, image: i}}
}

// At the revision that was read, a shorter expiry is written, whatever the touch interval.
func TestCommit_Next_ShorterExpiry(t *testing.T) {
	base := gobImage(t, with("a", 1), 5000)
	ours := gobImage(t, with("a", 1), 4000)
	c := &commit{base: stored(base, 5), ours: ours, touch: time.Hour}
	if c.idle() {
		t.Error("a shorter expiry is taken for a touch")
	}
	if got, err := c.next(state{image: base, rev: 5}); got != ours || err != nil {
		t.Errorf("next = %v, %v; want ours", got, err)
	}
}

func TestCommit_Idle(t *testing.T) {
	base := gobImage(t, with("a", 1), 5000)
	for _, tc := range []struct {
		name     string
		interval time.Duration
		base     *read
		ours     *image
		want     bool
	}{
		{"within", time.Second, stored(base, 5), gobImage(t, with("a", 1), 5999), true},
		{"not moved", time.Second, stored(base, 5), gobImage(t, with("a", 1), 5000), true},
		{"after a merge", time.Second, stored(base, 0), gobImage(t, with("a", 1), 5999), true},
		{"at", time.Second, stored(base, 5), gobImage(t, with("a", 1), 6000), false},
		{"shorter", time.Second, stored(base, 5), gobImage(t, with("a", 1), 4999), false},
		{"no interval", 0, stored(base, 5), gobImage(t, with("a", 1), 5000), false},
		{"value changed", time.Second, stored(base, 5), gobImage(t, with("a", 2), 5001), false},
		{"value added", time.Second, stored(base, 5), gobImage(t, with("a", 1, "b", 1), 5001), false},
		{"value removed", time.Second, stored(base, 5), gobImage(t, with(), 5001), false},
		{"deadline moved", time.Second, stored(base, 5), gobImage(t, until(day(1), with("a", 1)), 5001), false},
		{"expiry not known", time.Hour, stored(gobImage(t, with("a", 1), 0), 5), gobImage(t, with("a", 1), 5000), false},
		{"not read", time.Second, nil, gobImage(t, with("a", 1), 5001), false},
		{"read absent", time.Second, &read{}, gobImage(t, with("a", 1), 5001), false},
		{"base undecodable", time.Second, stored(imageOf(scs.GobCodec{}, []byte("x"), 5000), 5), gobImage(t, with("a", 1), 5001), false},
		{"ours undecodable", time.Second, stored(base, 5), imageOf(scs.GobCodec{}, []byte("x"), 5001), false},
	} {
		c := &commit{base: tc.base, ours: tc.ours, touch: tc.interval}
		if got := c.idle(); got != tc.want {
			t.Errorf("%s: idle = %v", tc.name, got)
		}
	}
}

// prepare decodes what a merge will need, and tolerates what is not there or does not decode.
func TestCommit_Prepare(t *testing.T) {
	base, ours := gobImage(t, with("a", 1), 1000), gobImage(t, with("a", 2), 1000)
	c := &commit{base: &read{image: base, rev: 5}, ours: ours}
	c.prepare()
	if base.contents == nil || ours.contents == nil {
		t.Error("not decoded")
	}
	for _, base := range []*read{nil, {}, {image: imageOf(scs.GobCodec{}, []byte("x"), 1)}} {
		(&commit{base: base, ours: imageOf(scs.GobCodec{}, nil, 1)}).prepare()
	}
}

func TestRemove_Next(t *testing.T) {
	for name, cur := range map[string]state{
		"absent":      {},
		"present":     {image: gobImage(t, with("a", 1), 1000), rev: 7},
		"in a fold":   {image: gobImage(t, with("a", 1), 1000)},
		"undecodable": {image: imageOf(scs.GobCodec{}, []byte("x"), 1000), rev: 7},
	} {
		remove{}.prepare()
		if got, err := (remove{}).next(cur); got != nil || err != nil {
			t.Errorf("%s: next = %v, %v", name, got, err)
		}
	}
}

func TestUpdate_Next(t *testing.T) {
	registerTypes()
	own := errors.New("no")
	for _, tc := range []struct {
		name string
		fn   func(values map[string]any) error
		want *contents // nil: the current image itself
		err  error
	}{
		{"sets", func(v map[string]any) error { v["a"] = 2; return nil }, with("a", 2, "m", map[string]int{"x": 1}), nil},
		{"adds", func(v map[string]any) error { v["b"] = true; return nil }, with("a", 1, "b", true, "m", map[string]int{"x": 1}), nil},
		{"removes", func(v map[string]any) error { delete(v, "a"); return nil }, with("m", map[string]int{"x": 1}), nil},
		{"clears", func(v map[string]any) error { clear(v); return nil }, with(), nil},
		{
			"changes a value in place",
			func(v map[string]any) error { v["m"].(map[string]int)["x"] = 2; return nil },
			with("a", 1, "m", map[string]int{"x": 2}), nil,
		},
		{"does nothing", func(map[string]any) error { return nil }, nil, nil},
		{"sets what is there", func(v map[string]any) error { v["a"] = 1; v["m"] = map[string]int{"x": 1}; return nil }, nil, nil},
		{"fails", func(v map[string]any) error { v["a"] = 2; v["m"].(map[string]int)["x"] = 2; return own }, nil, own},
		{"fails with a sentinel of ours", func(map[string]any) error { return ErrConflict }, nil, ErrConflict},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := with("a", 1, "m", map[string]int{"x": 1})
			cur := state{image: gobImage(t, before, 1000), rev: 7}
			if _, err := cur.image.decoded(); err != nil {
				t.Fatal(err)
			}
			runs := 0
			u := &update{fn: func(values map[string]any) error { runs++; return tc.fn(values) }}
			u.prepare()
			for n := 1; n <= 2; n++ { // it runs again over what others left, here the same
				got, err := u.next(cur)
				if runs != n {
					t.Errorf("fn ran %d times in %d", runs, n)
				}
				switch {
				case tc.err != nil:
					if got != nil || callError("update", err) != tc.err { //nolint:errorlint // it must arrive as it is
						t.Errorf("next = %v, %v; want %v", got, err, tc.err)
					}
				case err != nil:
					t.Error(err)
				case tc.want == nil:
					if got != cur.image {
						t.Errorf("next = %+v, want the current image itself", got)
					}
				default:
					wantImage(t, got, tc.want, 1000)
				}
				wantContents(t, cur.image.contents, before)
				wantImage(t, cur.image, before, 1000)
			}
		})
	}
}

func TestUpdate_Next_Absent(t *testing.T) {
	u := &update{fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	if got, err := u.next(state{}); got != nil || !errors.Is(err, ErrSessionGone) {
		t.Errorf("next = %v, %v; want ErrSessionGone", got, err)
	}
}

func TestUpdate_Next_Undecodable(t *testing.T) {
	u := &update{fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	got, err := u.next(state{image: imageOf(scs.GobCodec{}, []byte("x"), 1000), rev: 7})
	if got != nil || err == nil {
		t.Errorf("next = %v, %v; want an error", got, err)
	}
}

// What is written under an expiry that is not known would be deleted, or never expire.
func TestUpdate_Next_ExpiryNotKnown(t *testing.T) {
	u := &update{fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	if got, err := u.next(state{image: gobImage(t, with("a", 1), 0), rev: 7}); got != nil || !errors.Is(err, errBareExpiry) {
		t.Errorf("next = %v, %v; want errBareExpiry", got, err)
	}
}

// A session without values has no map, but fn gets one.
func TestUpdate_Next_NoValues(t *testing.T) {
	u := &update{fn: func(values map[string]any) error { values["a"] = 1; return nil }}
	got, err := u.next(state{image: encodedImage(t, jsonCodec{}, &contents{deadline: day0}, 1000), rev: 7})
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, got, with("a", 1.0), 1000)
}

// Transitions fold: each runs over what the one before has made, which no revision holds.
func TestTransition_Next_Fold(t *testing.T) {
	base := gobImage(t, with("n", 0), 1000)
	sum := func(c Conflict) (any, error) { return c.Ours.(int) + c.Theirs.(int) - c.Base.(int), nil }
	increment := func() transition {
		return &commit{merger: merger{resolver: sum}, base: &read{image: base, rev: 5}, ours: gobImage(t, with("n", 1), 1000)}
	}
	cur := state{image: base, rev: 5}
	run := func(next transition) {
		t.Helper()
		made, err := next.next(cur)
		if err != nil {
			t.Fatal(err)
		}
		cur = state{image: made}
	}
	for range 3 {
		run(increment())
	}
	run(&update{fn: func(values map[string]any) error { values["n"] = values["n"].(int) * 10; return nil }})
	run(increment())
	wantImage(t, cur.image, with("n", 31), 1000)
	run(remove{})
	if _, err := increment().next(cur); !errors.Is(err, ErrSessionGone) {
		t.Errorf("after a delete: %v, want ErrSessionGone", err)
	}
}

func TestTransaction_ReadSet(t *testing.T) {
	storeA, storeB := &EtcdStore{}, &EtcdStore{prefix: "b"}
	a, otherToken, otherStore := readKey{storeA, "a"}, readKey{storeA, "b"}, readKey{storeB, "a"}
	read1, read2, read3 := read{image: &image{}, rev: 1}, read{image: &image{}, rev: 2}, read{image: &image{}, rev: 3}

	tx := newTransaction()
	want := func(step string, k readKey, want read, known bool) {
		t.Helper()
		if got, ok := tx.read(k); got != want || ok != known {
			t.Errorf("%s: read = %+v, %v; want %+v, %v", step, got, ok, want, known)
		}
	}
	want("new", a, read{}, false)
	tx.note(a, read1)
	want("noted", a, read1, true)
	want("another token", otherToken, read{}, false)
	want("another store", otherStore, read{}, false)
	tx.noteListed(a, read2)
	twice := read1
	twice.copied = true
	want("listed after it was read", a, twice, true)
	tx.noteListed(otherToken, read2)
	want("listed", otherToken, read2, true)
	tx.note(a, read2)
	want("read again", a, read2, true)
	tx.wrote(a, read3)
	want("written", a, read3, true)
	tx.wrote(a, read{})
	want("deleted", a, read{}, true) // which differs from not read at all
	tx.noteListed(a, read1)
	want("listed after it was deleted", a, read{copied: true}, true)
	tx.note(otherStore, read{})
	want("read absent", otherStore, read{}, true)
}

func TestTransaction_Defeat(t *testing.T) {
	a, b := readKey{&EtcdStore{}, "a"}, readKey{&EtcdStore{}, "b"}
	conflict := &ConflictError{Keys: []string{"k"}}
	tx := newTransaction()
	want := func(step, token string, want error) {
		t.Helper()
		if got, err := tx.defeat(); got != token || err != want { //nolint:errorlint // the very error
			t.Errorf("%s: defeat = %q, %v; want %q, %v", step, got, err, token, want)
		}
	}
	want("new", "", nil)
	for _, err := range []error{nil, ErrTooLarge, ErrInvalidToken, ErrClosed, ErrOutcomeUnknown, context.Canceled, errors.New("other")} {
		tx.lose(a, err)
		want(fmt.Sprint(err), "", nil)
	}
	for _, err := range []error{conflict, ErrConflict, ErrSessionGone, errLockLost, fmt.Errorf("wrapped: %w", ErrSessionGone)} {
		tx.lose(a, err)
		want(fmt.Sprint(err), "a", err)
	}
	tx.note(a, read{rev: 5})
	if _, err := tx.defeat(); err == nil {
		t.Error("reading the session again undid the defeat")
	}
	tx.wrote(b, read{rev: 6})
	if _, err := tx.defeat(); err == nil {
		t.Error("writing another session undid the defeat")
	}
	tx.lose(b, conflict)
	tx.wrote(a, read{rev: 7})
	want("written with success", "b", conflict)
	tx.wrote(b, read{rev: 8})
	want("both written", "", nil)
}

// Outside of a transaction there is no read set; the calls on it do nothing.
func TestTransaction_Nil(t *testing.T) {
	var tx *transaction
	k := readKey{&EtcdStore{}, "a"}
	tx.note(k, read{rev: 1})
	tx.noteListed(k, read{rev: 1})
	tx.wrote(k, read{rev: 1})
	tx.lose(k, ErrConflict)
	if got, ok := tx.read(k); ok || got != (read{}) {
		t.Errorf("read = %+v, %v", got, ok)
	}
}

func TestTransaction_ConcurrentUse(t *testing.T) {
	tx := newTransaction()
	store := &EtcdStore{}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			k := readKey{store, fmt.Sprint(i % 4)}
			for rev := range int64(100) {
				tx.note(k, read{rev: rev})
				tx.noteListed(k, read{rev: -1})
				tx.lose(k, ErrConflict)
				if r, ok := tx.read(k); !ok || r.rev < 0 {
					t.Errorf("read = %+v, %v", r, ok)
				}
				_, _ = tx.defeat()
				tx.wrote(k, read{rev: rev})
			}
		})
	}
	wg.Wait()
	if _, err := tx.defeat(); err != nil {
		t.Errorf("defeat = %v after all were written", err)
	}
}

func TestBegin(t *testing.T) {
	type anyKey struct{}
	parent := context.WithValue(t.Context(), anyKey{}, "value")
	if explicit(parent) != nil {
		t.Error("a transaction that nobody began")
	}
	ctx := Begin(parent)
	tx := explicit(ctx)
	if tx == nil || ctx.Value(anyKey{}) != "value" || ctx.Done() != parent.Done() {
		t.Error("Begin does not carry on the context")
	}
	derived, cancel := context.WithCancel(context.WithValue(ctx, anyKey{}, "other"))
	defer cancel()
	if explicit(derived) != tx {
		t.Error("a derived context has another transaction")
	}
	if inner := explicit(Begin(ctx)); inner == nil || inner == tx {
		t.Error("Begin in a transaction begins none")
	}
}

// requestContext returns a context as net/http gives it to a handler, and what ends the request.
func requestContext(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(context.WithValue(context.Background(), http.ServerContextKey, &http.Server{}))
}

func TestImplicitTransactions_Of(t *testing.T) {
	type anyKey struct{}
	var implicit implicitTransactions
	ctx, end := requestContext(t)
	defer end()
	other, endOther := requestContext(t)
	defer endOther()

	tx := implicit.of(ctx)
	if tx == nil {
		t.Fatal("a request has no transaction")
	}
	tx.note(readKey{nil, "a"}, read{rev: 1})
	// scs derives the contexts of commits with values.
	derived := context.WithValue(context.WithValue(ctx, anyKey{}, 1), anyKey{}, 2)
	if implicit.of(derived) != tx || implicit.of(ctx) != tx {
		t.Error("the contexts of one request have different transactions")
	}
	if otherTx := implicit.of(other); otherTx == nil || otherTx == tx {
		t.Error("two requests share a transaction")
	}
	if n := implicit.len(); n != 2 {
		t.Errorf("%d transactions of 2 requests", n)
	}

	end()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 1 }, "the transaction outlives its request")
	if n := implicit.len(); n != 1 || implicit.of(other) == nil {
		t.Error("the end of one request ended another's transaction")
	}
	// scs may still commit for a request whose browser has gone: what it gets then must not stay.
	if late := implicit.of(derived); late == tx {
		t.Error("the transaction of a request that has ended is still there")
	}
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 1 }, "a late call leaves an entry")
	endOther()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 0 }, "the transaction outlives its request")
}

// Contexts that are not a request's are not tracked: they may live as long as the process.
func TestImplicitTransactions_Of_NoRequest(t *testing.T) {
	var implicit implicitTransactions
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	local := context.WithValue(cancellable, http.LocalAddrContextKey, "127.0.0.1")
	endless := context.WithValue(context.Background(), http.ServerContextKey, &http.Server{})
	for name, ctx := range map[string]context.Context{
		"background":           context.Background(),
		"cancellable":          cancellable,
		"without the server":   local,
		"request without end":  endless,
		"request's, detached":  context.WithoutCancel(endless),
		"values of a request'": context.WithValue(endless, http.LocalAddrContextKey, "127.0.0.1"),
	} {
		if tx := implicit.of(ctx); tx != nil {
			t.Errorf("%s: a transaction", name)
		}
	}
	if n := implicit.len(); n != 0 {
		t.Errorf("%d entries", n)
	}
}

func TestImplicitTransactions_Of_Concurrent(t *testing.T) {
	var implicit implicitTransactions
	var wg sync.WaitGroup
	for range 8 {
		ctx, end := requestContext(t)
		found := make(chan *transaction, 8)
		var request sync.WaitGroup
		for range cap(found) {
			request.Go(func() { found <- implicit.of(ctx) })
		}
		wg.Go(func() {
			request.Wait()
			first := <-found
			for range cap(found) - 1 {
				if tx := <-found; tx == nil || tx != first {
					t.Error("goroutines of one request have different transactions")
				}
			}
			end()
		})
	}
	wg.Wait()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 0 }, "transactions outlive their requests")
}

func TestEtcdStore_TransactionOf(t *testing.T) {
	var e, another EtcdStore
	ctx, end := requestContext(t)
	defer end()
	implicit := e.transactionOf(ctx)
	if implicit == nil {
		t.Fatal("a request has no transaction")
	}
	began := Begin(ctx)
	if got := e.transactionOf(began); got == nil || got == implicit || got != explicit(began) {
		t.Error("what Begin began does not come first")
	}
	if another.transactionOf(began) != explicit(began) {
		t.Error("a transaction does not span stores")
	}
	if another.transactionOf(ctx) == implicit {
		t.Error("stores share implicit transactions")
	}
	if e.transactionOf(context.Background()) != nil {
		t.Error("a transaction outside of a request")
	}
	end()
	for _, s := range []*EtcdStore{&e, &another} {
		etcdtest.Eventually(t, 10*time.Second, func() bool { return s.implicit.len() == 0 }, "the transaction outlives its request")
	}
}
