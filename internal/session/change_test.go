package session

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// at is a state that holds an image at a revision; 0: a change in the same fold made it.
func at(i *Image, rev int64) commit.State { return commit.State{Value: valueOf(i), Rev: rev} }

// readAt is what a request believes that has read an image at a revision; 0: after a merge.
func readAt(i *Image, rev int64) *Read { return &Read{Image: i, Rev: rev} }

// next returns the image that a change makes of a state, nil where it makes none.
func next(t *testing.T, c commit.Change, cur commit.State) (*Image, error) {
	t.Helper()
	w, err := c.Next(cur)
	i := ImageOf(w.Value)
	if i == nil && w.Value != nil {
		t.Errorf("the value is %#v, and no image", w.Value)
	}
	if w.If != nil || w.Also != nil {
		t.Errorf("next writes under %v, and beside the session %v", w.If, w.Also)
	}
	return i, err
}

// fromApplication returns the application's error that a call returns for err, nil for none.
func fromApplication(err error) error {
	var app ApplicationError
	if !errors.As(err, &app) {
		return nil
	}
	return app.Err
}

func TestCommit_Next(t *testing.T) {
	// What is in etcd, and what the commit wants, is undecodable where the commit must not look at it.
	opaque := func(expiry record.Millis) *Image {
		return NewImage(scs.GobCodec{}, []byte("opaque"), expiry)
	}
	ourOpaque := opaque(1000)
	mine := gobImage(t, with("a", 2, "b", 1), 1000)
	seen := gobImage(t, with("a", 1, "b", 1), 1000)
	for _, tc := range []struct {
		name     string
		base     *Read
		ours     *Image
		cur      commit.State
		want     *Image    // itself
		merged   *Contents // or merged to this
		gone     bool
		conflict []string
	}{
		{
			name: "not read, absent",
			ours: ourOpaque, cur: commit.State{}, want: ourOpaque,
		},
		{
			name: "not read, present: overwritten",
			ours: ourOpaque, cur: at(opaque(5), 7), want: ourOpaque,
		},
		{
			name: "read absent, still absent",
			base: &Read{}, ours: ourOpaque, cur: commit.State{}, want: ourOpaque,
		},
		{
			name: "read absent, created with other keys",
			base: &Read{}, ours: mine, cur: at(gobImage(t, with("c", 3), 1000), 7),
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read absent, created with the same key",
			base: &Read{}, ours: mine, cur: at(gobImage(t, with("a", 2, "c", 3), 1000), 7),
			conflict: []string{"a"},
		},
		{
			name: "read absent, created in the same fold",
			base: &Read{}, ours: mine, cur: at(gobImage(t, with("c", 3), 1000), 0),
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read at the current revision",
			base: readAt(opaque(5), 7), ours: ourOpaque, cur: at(opaque(5), 7),
			want: ourOpaque,
		},
		{
			name: "read before the current revision, other keys",
			base: readAt(seen, 5), ours: mine, cur: at(gobImage(t, with("a", 1, "b", 2, "c", 3), 1000), 7),
			merged: with("a", 2, "b", 2, "c", 3),
		},
		{
			name: "read before the current revision, same key",
			base: readAt(seen, 5), ours: mine, cur: at(gobImage(t, with("a", 3, "b", 1), 1000), 7),
			conflict: []string{"a"},
		},
		{
			// A guess may be older than what the call has read; it is merged all the same, and fails its compare.
			name: "read behind the current revision",
			base: readAt(seen, 9), ours: mine, cur: at(gobImage(t, with("a", 1, "b", 2), 1000), 7),
			merged: with("a", 2, "b", 2),
		},
		{
			name: "changed in the same fold",
			base: readAt(seen, 5), ours: mine, cur: at(gobImage(t, with("a", 1, "b", 1, "c", 3), 1000), 0),
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "after a merge: no revision holds what the request believes",
			base: readAt(seen, 0), ours: mine, cur: at(gobImage(t, with("a", 1, "b", 1, "c", 3), 1000), 7),
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "after a merge, changed in the same fold",
			base: readAt(seen, 0), ours: mine, cur: at(gobImage(t, with("a", 1, "b", 1, "c", 3), 1000), 0),
			merged: with("a", 2, "b", 1, "c", 3),
		},
		{
			name: "read, then deleted",
			base: readAt(opaque(5), 5), ours: ourOpaque, cur: commit.State{Rev: 0},
			gone: true,
		},
		{
			name: "read, then expired where it is",
			base: readAt(opaque(5), 5), ours: ourOpaque, cur: commit.State{Rev: 5},
			gone: true,
		},
		{
			name: "merged, then deleted",
			base: readAt(opaque(5), 0), ours: ourOpaque, cur: commit.State{},
			gone: true,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &Commit{Base: tc.base, Ours: tc.ours}
			for range 2 { // a transition runs again when its outcome did not count
				got, err := next(t, c, tc.cur)
				switch {
				case tc.gone:
					if !errors.Is(err, ErrGone) || errors.Is(err, ErrConflict) || got != nil {
						t.Errorf("next = %v, %v; want ErrGone", got, err)
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

// A session that was deleted, and made anew under its token, is not the one that was read, also
// where the commit would merge with it, or is of its very revision.
func TestCommit_Next_Reborn(t *testing.T) {
	base := readAt(gobImage(t, with("a", 1), 1000), 5)
	base.Version = &record.Version{Created: 5}
	c := &Commit{Base: base, Ours: gobImage(t, with("a", 2), 1000)}
	for _, rev := range []int64{0, 5, 7} {
		for _, born := range []int64{-1, 5, 6} {
			cur := at(gobImage(t, with("a", 1, "b", 1), 1000), rev)
			cur.Born = born
			got, err := next(t, c, cur)
			if gone := errors.Is(err, ErrGone); gone != (born != 5) || gone != (got == nil) {
				t.Errorf("at %d, born at %d: next = %v, %v", rev, born, got, err)
			}
		}
	}
}

// What is there and cannot be read is not said to be gone.
func TestChange_Next_Unreadable(t *testing.T) {
	cur := commit.State{Rev: 7, Err: ErrCorrupt}
	for _, c := range []commit.Change{
		&Commit{Base: readAt(gobImage(t, with("a", 1), 1000), 5), Ours: gobImage(t, with(), 1000)},
		&Update{Fn: func(map[string]any) error { t.Error("fn ran"); return nil }},
	} {
		got, err := next(t, c, cur)
		if got != nil || !errors.Is(err, ErrCorrupt) || errors.Is(err, ErrGone) {
			t.Errorf("next = %v, %v; want ErrCorrupt", got, err)
		}
	}
}

// What is merged is written on the same condition as what is stored as it is.
func TestCommit_Next_If(t *testing.T) {
	own := errors.New("no")
	c := &Commit{
		Base: readAt(gobImage(t, with("a", 1), 1000), 5),
		Ours: gobImage(t, with("a", 2), 1000),
		If: []commit.Precondition{
			{Cmp: clientv3.Compare(clientv3.Version("b"), "=", 1), Err: own},
		},
	}
	for _, rev := range []int64{5, 7} {
		w, err := c.Next(at(gobImage(t, with("a", 1), 1000), rev))
		if err != nil || len(w.If) != 1 || w.If[0].Err != own { //nolint:errorlint // the very same
			t.Errorf("at %d: next = %+v, %v", rev, w, err)
		}
	}
}

// The isolation level and the resolver of a commit reach the merge.
func TestCommit_Next_Options(t *testing.T) {
	base := readAt(gobImage(t, with("a", 1, "b", 1), 1000), 5)
	ours := gobImage(t, with("a", 2, "b", 1), 1000)
	other := at(gobImage(t, with("a", 1, "b", 2), 1000), 7)
	same := at(gobImage(t, with("a", 3, "b", 1), 1000), 7)

	_, err := next(t, &Commit{Merger: Merger{Serializable: true}, Base: base, Ours: ours}, other)
	wantConflict(t, err, "b")
	got, err := next(t, &Commit{Merger: Merger{Resolve: keepOurs}, Base: base, Ours: ours}, same)
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, got, with("a", 2, "b", 1), 1000)

	own := errors.New("no")
	refuse := func(Clash) (any, error) { return nil, own }
	_, err = next(t, &Commit{Merger: Merger{Resolve: refuse}, Base: base, Ours: ours}, same)
	if fromApplication(err) != own { //nolint:errorlint // it must arrive as it is
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
			base := &Read{}
			if tc.base != absent {
				base = readAt(gobImage(t, until(day(tc.base.deadline), with()), tc.base.expiry), 5)
			}
			ours := gobImage(t, until(day(tc.ours.deadline), with("a", 1)), tc.ours.expiry)
			c := &Commit{Base: base, Ours: ours}
			theirs := gobImage(t, until(day(tc.theirs.deadline), with("b", 1)), tc.theirs.expiry)
			got, err := next(t, c, at(theirs, 7))
			if err != nil {
				t.Fatal(err)
			}
			wantImage(t, got, until(day(tc.want.deadline), with("a", 1, "b", 1)), tc.want.expiry)
		})
	}
}

// The expiry is that of the side whose deadline holds.
func TestCommit_ExpiryFollowsTheDeadline(t *testing.T) {
	for _, ours := range []int{1, 3} {
		c := &Commit{
			Base: readAt(gobImage(t, until(day(9), with()), 9000), 5),
			Ours: gobImage(t, until(day(ours), with()), record.Millis(1000*ours)),
		}
		got, err := next(t, c, at(gobImage(t, until(day(2), with()), 2000), 7))
		if err != nil {
			t.Fatal(err)
		}
		later := max(ours, 2)
		wantImage(t, got, until(day(later), with()), record.Millis(1000*later))
	}
}

// A session that has ended since it was read goes on with the commit, if nobody has deleted or replaced it.
func TestCommit_Next_Ended(t *testing.T) {
	base := gobImage(t, with("a", 1), 5000)
	ours := gobImage(t, with("a", 1, "b", 2), 9000)
	read := &Read{Image: base, Rev: 5, Version: &record.Version{Rev: 5, Created: 3, Value: base}}
	state := func(ended *Image, born int64) commit.State {
		return commit.State{Ended: valueOf(ended), EndedBorn: born, Rev: 5, Born: -1, Now: 6000}
	}
	w, err := (&Commit{Base: read, Ours: ours}).Next(state(base, 3))
	if ImageOf(w.Value) != ours || !w.Renews || err != nil {
		t.Errorf("as it was read: %+v, %v", w, err)
	}
	touched := state(gobImage(t, with("a", 1, "c", 3), 5500), 3)
	touched.Rev = 6
	w, err = (&Commit{Base: read, Ours: ours}).Next(touched)
	if err != nil || !w.Renews {
		t.Fatalf("changed before it ended: %+v, %v", w, err)
	}
	wantImage(t, ImageOf(w.Value), with("a", 1, "b", 2, "c", 3), 9000)
	// A touch of a session that others have changed, deadline and all, before it ended: what they left, for longer.
	others := state(gobImage(t, until(day(1), with("a", 2, "c", 3)), 5500), 3)
	others.Rev = 6
	w, err = (&Commit{Base: read, Ours: gobImage(t, with("a", 1), 9000)}).Next(others)
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, ImageOf(w.Value), until(day(1), with("a", 2, "c", 3)), 9000)
	if _, err := (&Commit{Base: read, Ours: gobImage(t, with("a", 1), 5900)}).Next(state(base, 3)); !errors.Is(err, ErrGone) {
		t.Errorf("a commit that has ended by itself: %v", err)
	}
	if _, err := (&Commit{Base: read, Ours: ours}).Next(state(base, 4)); !errors.Is(err, ErrGone) {
		t.Errorf("replaced, and that has ended: %v", err)
	}
	if _, err := (&Commit{Base: read, Ours: ours}).Next(state(nil, 0)); !errors.Is(err, ErrGone) {
		t.Errorf("deleted: %v", err)
	}
	if w, err := (&Commit{Ours: ours}).Next(state(base, 3)); err != nil || w.Renews {
		t.Errorf("not read: %+v, %v; want a session of its own", w, err)
	}
}

// A touch is written when half of the life that it gives is over, however long the interval.
func TestCommit_Idle_HalfOfTheLife(t *testing.T) {
	base := gobImage(t, with("a", 1), 20_000) // written at 10 000, for 10 s
	for now, want := range map[record.Millis]bool{10_001: true, 14_999: true, 15_000: false, 19_999: false} {
		c := &Commit{Base: stored(base, 5), Ours: gobImage(t, with("a", 1), now+10_000), Touch: time.Hour}
		if got := c.Idle(now); got != want {
			t.Errorf("at %d: idle %t", now, got)
		}
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
		for _, level := range []isolation{snapshot, serializable} {
			t.Run(fmt.Sprintf("%s/isolation=%d", tc.name, level), func(t *testing.T) {
				theirs := gobImage(t, with("a", 2, "b", 1), tc.theirs)
				c := &Commit{
					Merger: merger(level, neverAsked(t)),
					Base:   readAt(gobImage(t, with("a", 1), 500), 5),
					Ours:   gobImage(t, with("a", 1), tc.ours),
					Touch:  tc.interval,
				}
				got, err := next(t, c, at(theirs, 7))
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
func stored(i *Image, rev int64) *Read {
	return &Read{Image: i, Rev: rev, Version: &record.Version{Rev: rev, Value: valueOf(i)}}
}

// At the revision that was read, a shorter expiry is written, whatever the touch interval.
func TestCommit_Next_ShorterExpiry(t *testing.T) {
	base := gobImage(t, with("a", 1), 5000)
	ours := gobImage(t, with("a", 1), 4000)
	c := &Commit{Base: stored(base, 5), Ours: ours, Touch: time.Hour}
	if c.Idle(0) {
		t.Error("a shorter expiry is taken for a touch")
	}
	if got, err := next(t, c, at(base, 5)); got != ours || err != nil {
		t.Errorf("next = %v, %v; want ours", got, err)
	}
}

func TestCommit_Idle(t *testing.T) {
	base := gobImage(t, with("a", 1), 5000)
	for _, tc := range []struct {
		name     string
		interval time.Duration
		base     *Read
		ours     *Image
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
		{"read absent", time.Second, &Read{}, gobImage(t, with("a", 1), 5001), false},
		{"base undecodable", time.Second, stored(NewImage(scs.GobCodec{}, []byte("x"), 5000), 5), gobImage(t, with("a", 1), 5001), false},
		{"ours undecodable", time.Second, stored(base, 5), NewImage(scs.GobCodec{}, []byte("x"), 5001), false},
	} {
		c := &Commit{Base: tc.base, Ours: tc.ours, Touch: tc.interval}
		if got := c.Idle(0); got != tc.want {
			t.Errorf("%s: idle = %v", tc.name, got)
		}
	}
}

// prepare decodes what a merge will need, and tolerates what is not there or does not decode.
func TestCommit_Prepare(t *testing.T) {
	base, ours := gobImage(t, with("a", 1), 1000), gobImage(t, with("a", 2), 1000)
	c := &Commit{Base: readAt(base, 5), Ours: ours}
	c.Prepare()
	if base.contents == nil || ours.contents == nil {
		t.Error("not decoded")
	}
	for _, base := range []*Read{nil, {}, {Image: NewImage(scs.GobCodec{}, []byte("x"), 1)}} {
		(&Commit{Base: base, Ours: NewImage(scs.GobCodec{}, nil, 1)}).Prepare()
	}
}

// A commit is merged through the codec: images in, payload out.
func TestCommit_Next_Codecs(t *testing.T) {
	registerTypes()
	for _, tc := range []struct {
		name   string
		codec  scs.Codec
		shared map[string]any // values that nobody changes, and that must not look changed
		ours   any
		theirs any
	}{
		{
			"gob",
			scs.GobCodec{},
			map[string]any{
				"account": account{"Ann", []string{"admin"}},
				"time":    time.Date(2030, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600)),
				"now":     time.Now(), // with a monotonic reading, which no codec keeps
				"list":    []string{"a", "b"},
				"empty":   []string{},
				"map":     map[string]int{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6},
				"nested":  map[string]any{"a": []any{1, "x", 2.5}, "b": map[string]int{"x": 1, "y": 2, "z": 3}},
				"bytes":   []byte("abc"),
				"float":   1.5,
			},
			account{"Bob", nil},
			map[string]int{"x": 1},
		},
		{
			"JSON",
			jsonCodec{},
			map[string]any{
				"object": map[string]any{"a": 1.0, "b": []any{"x", nil, true}},
				"list":   []any{1.0, "a"},
				"null":   nil,
				"number": 1.5,
				"int":    7,
				"empty":  []any{},
			},
			map[string]any{"name": "Bob"},
			[]any{"x"},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ourValues, theirValues, wantValues := maps.Clone(tc.shared), maps.Clone(tc.shared), maps.Clone(tc.shared)
			ourValues["ours"], theirValues["theirs"] = tc.ours, tc.theirs
			wantValues["ours"], wantValues["theirs"] = tc.ours, tc.theirs

			encoded := func(values map[string]any) *Image {
				return encodedImage(t, tc.codec, &Contents{deadline: day0, values: values}, 1000)
			}
			c := &Commit{Base: readAt(encoded(tc.shared), 5), Ours: encoded(ourValues)}
			got, err := next(t, c, at(encoded(theirValues), 6))
			if err != nil {
				t.Fatal(err)
			}
			payload, err := got.Encode()
			if err != nil {
				t.Fatal(err)
			}
			deadline, values, err := tc.codec.Decode(payload)
			if err != nil {
				t.Fatal(err)
			}
			// What is wanted went through the codec as well: JSON's numbers are all float64.
			want, err := encoded(wantValues).Contents()
			if err != nil {
				t.Fatal(err)
			}
			wantContents(t, &Contents{deadline: deadline, values: values}, want)
		})
	}
}

// Gob writes maps in random order: equal sessions with different payloads are the same.
func TestCommit_Next_EqualValuesInOtherBytes(t *testing.T) {
	registerTypes()
	values := map[string]any{"map": map[string]int{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}}
	base := encodedImage(t, scs.GobCodec{}, &Contents{deadline: day0, values: values}, 1000)
	theirs := base
	for i := 0; bytes.Equal(theirs.payload, base.payload); i++ {
		if i == 1000 {
			t.Fatal("gob always wrote the same")
		}
		theirs = encodedImage(t, scs.GobCodec{}, &Contents{deadline: day0, values: values}, 1000)
	}
	changed := maps.Clone(values)
	changed["map"] = map[string]int{"a": 2}
	ours := encodedImage(t, scs.GobCodec{}, &Contents{deadline: day0, values: changed}, 1000)
	for _, level := range []isolation{snapshot, serializable} {
		c := &Commit{Merger: merger(level, neverAsked(t)), Base: readAt(base, 5), Ours: ours}
		got, err := next(t, c, at(theirs, 6))
		if err != nil {
			t.Fatalf("isolation %d: %v", level, err)
		}
		wantImage(t, got, &Contents{deadline: day0, values: changed}, 1000)
	}
}

// What does not decode is a conflict, not a guess.
func TestCommit_Next_Undecodable(t *testing.T) {
	good := func() *Image { return encodedImage(t, scs.GobCodec{}, with("k", 1), 1000) }
	bad := func() *Image { return NewImage(scs.GobCodec{}, []byte("secret garbage"), 1000) }
	for _, tc := range []struct {
		name               string
		base, ours, theirs *Image
	}{
		{"base", bad(), good(), good()},
		{"ours", good(), bad(), good()},
		{"theirs", good(), good(), bad()},
		{"all", bad(), bad(), bad()},
		{"ours, base absent", nil, bad(), good()},
		{"theirs, base absent", nil, good(), bad()},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &Commit{Merger: Merger{Resolve: neverAsked(t)}, Base: readAt(tc.base, 5), Ours: tc.ours}
			got, err := next(t, c, at(tc.theirs, 6))
			wantConflict(t, err)
			if got != nil {
				t.Errorf("image = %v", got)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows the session: %v", err)
			}
		})
	}
}

func TestUpdate_Next(t *testing.T) {
	registerTypes()
	own := errors.New("no")
	for _, tc := range []struct {
		name string
		fn   func(values map[string]any) error
		want *Contents // nil: the current image itself
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
			image := gobImage(t, before, 1000)
			cur := at(image, 7)
			if _, err := image.Contents(); err != nil {
				t.Fatal(err)
			}
			runs := 0
			u := &Update{Fn: func(values map[string]any) error { runs++; return tc.fn(values) }}
			u.Prepare()
			for n := 1; n <= 2; n++ { // it runs again over what others left, here the same
				got, err := next(t, u, cur)
				if runs != n {
					t.Errorf("fn ran %d times in %d", runs, n)
				}
				switch {
				case tc.err != nil:
					if got != nil || fromApplication(err) != tc.err { //nolint:errorlint // it must arrive as it is
						t.Errorf("next = %v, %v; want %v", got, err, tc.err)
					}
				case err != nil:
					t.Error(err)
				case tc.want == nil:
					if got != image {
						t.Errorf("next = %+v, want the current image itself", got)
					}
				default:
					wantImage(t, got, tc.want, 1000)
				}
				wantContents(t, image.contents, before)
				wantImage(t, image, before, 1000)
			}
		})
	}
}

func TestUpdate_Next_Absent(t *testing.T) {
	u := &Update{Fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	if got, err := next(t, u, commit.State{}); got != nil || !errors.Is(err, ErrGone) {
		t.Errorf("next = %v, %v; want ErrGone", got, err)
	}
}

func TestUpdate_Next_Undecodable(t *testing.T) {
	u := &Update{Fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	got, err := next(t, u, at(NewImage(scs.GobCodec{}, []byte("x"), 1000), 7))
	if got != nil || err == nil {
		t.Errorf("next = %v, %v; want an error", got, err)
	}
}

// What is written under an expiry that is not known would be deleted, or never expire.
func TestUpdate_Next_ExpiryNotKnown(t *testing.T) {
	u := &Update{Fn: func(map[string]any) error { t.Error("fn ran"); return nil }}
	got, err := next(t, u, at(gobImage(t, with("a", 1), 0), 7))
	if got != nil || !errors.Is(err, ErrBareExpiry) {
		t.Errorf("next = %v, %v; want ErrBareExpiry", got, err)
	}
}

// A session without values has no map, but fn gets one.
func TestUpdate_Next_NoValues(t *testing.T) {
	u := &Update{Fn: func(values map[string]any) error { values["a"] = 1; return nil }}
	got, err := next(t, u, at(encodedImage(t, jsonCodec{}, &Contents{deadline: day0}, 1000), 7))
	if err != nil {
		t.Fatal(err)
	}
	wantImage(t, got, with("a", 1.0), 1000)
}

// Changes fold: each runs over what the one before has made, which no revision holds.
func TestChange_Next_Fold(t *testing.T) {
	base := gobImage(t, with("n", 0), 1000)
	sum := func(c Clash) (any, error) { return c.Ours.(int) + c.Theirs.(int) - c.Base.(int), nil }
	increment := func() commit.Change {
		ours := gobImage(t, with("n", 1), 1000)
		return &Commit{Merger: Merger{Resolve: sum}, Base: readAt(base, 5), Ours: ours}
	}
	cur := at(base, 5)
	run := func(c commit.Change) {
		t.Helper()
		made, err := next(t, c, cur)
		if err != nil {
			t.Fatal(err)
		}
		cur = at(made, 0)
	}
	for range 3 {
		run(increment())
	}
	run(&Update{Fn: func(values map[string]any) error { values["n"] = values["n"].(int) * 10; return nil }})
	run(increment())
	wantImage(t, ImageOf(cur.Value), with("n", 31), 1000)
	run(commit.Delete{})
	if _, err := next(t, increment(), cur); !errors.Is(err, ErrGone) {
		t.Errorf("after a delete: %v, want ErrGone", err)
	}
}

// counting is a codec that counts its calls.
type counting struct {
	scs.GobCodec
	calls int
}

func (c *counting) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	c.calls++
	return c.GobCodec.Encode(deadline, values)
}

func (c *counting) Decode(b []byte) (time.Time, map[string]any, error) {
	c.calls++
	return c.GobCodec.Decode(b)
}

// states returns what a change may start from: nothing, what cannot be read, and a session that has
// not been decoded, there or ended, at all revisions and births that differ to a base of revision 5,
// born at 3. They are of the time 900, or 1100.
func (c *counting) states(payload []byte, expiry record.Millis) (states []commit.State) {
	for _, now := range []record.Millis{900, 1100} {
		states = append(states, commit.State{Born: -1, Now: now})
		states = append(states, commit.State{Rev: 7, Born: -1, Err: ErrCorrupt, Now: now})
		for _, rev := range []int64{0, 5, 7} {
			for _, born := range []int64{-1, 3, 6} {
				there, ended := NewImage(c, payload, expiry), NewImage(c, payload, expiry)
				states = append(states,
					commit.State{Value: there, Rev: rev, Born: born, Now: now},
					commit.State{Rev: rev, Born: -1, Ended: ended, EndedBorn: born, Now: now})
			}
		}
	}
	return states
}

// A change that says that it runs none of the application's code runs none: it runs on the
// pipeline's worker. And a commit says so wherever that is true, else it gets a goroutine for nothing.
func TestCommit_Direct(t *testing.T) {
	codec := &counting{}
	payload := func(c *Contents) []byte { return gobImage(t, c, 1000).payload }
	base, ours, theirs := payload(with("a", 1)), payload(with("a", 2)), payload(with("a", 3))
	bases := map[string]func() *Read{ // a new one each time, of which nothing has been decoded
		"not read":    func() *Read { return nil },
		"deleted":     func() *Read { return &Read{} },
		"read absent": func() *Read { return &Read{Version: &record.Version{AsOf: 4}} },
		"read": func() *Read {
			r := stored(NewImage(codec, base, 500), 5)
			r.Version.Created = 3
			return r
		},
		"merged": func() *Read {
			r := stored(NewImage(codec, base, 500), 0)
			r.Version.Created = 3
			return r
		},
		"no version": func() *Read { return readAt(NewImage(codec, base, 500), 5) },
	}
	resolvers := map[string]resolver{"none": nil, "one": func(c Clash) (any, error) {
		codec.calls++ // the application's code, too
		return c.Ours, nil
	}}
	seen := make(map[bool]bool)
	for name, fresh := range bases {
		for resolver, r := range resolvers {
			for _, level := range []isolation{snapshot, serializable} {
				for _, cur := range codec.states(theirs, 1000) {
					c := &Commit{
						Merger: merger(level, r), Base: fresh(), Ours: NewImage(codec, ours, 1000),
						Touch: time.Hour,
					}
					codec.calls = 0
					direct := c.Direct(cur)
					if codec.calls > 0 {
						t.Fatalf("%s: Direct itself made %d calls", name, codec.calls)
					}
					seen[direct] = true
					if _, err := c.Next(cur); direct != (codec.calls == 0) {
						t.Errorf("%s, resolver %s, isolation %d, over %+v: Direct = %v, Next made %d calls (%v)",
							name, resolver, level, cur, direct, codec.calls, err)
					}
				}
			}
		}
	}
	if len(seen) != 2 {
		t.Errorf("Direct was only ever one of both: %v", seen)
	}
}

// An update runs its function over each session; only where that is not there, it runs nothing.
func TestUpdate_Direct(t *testing.T) {
	codec := &counting{}
	u := &Update{Fn: func(values map[string]any) error {
		codec.calls++
		values["a"] = 2
		return nil
	}}
	payload := gobImage(t, with("a", 1), 1000).payload
	for _, cur := range slices.Concat(codec.states(payload, 1000), codec.states(payload, 0)) {
		codec.calls = 0
		direct := u.Direct(cur)
		if codec.calls > 0 || direct != (cur.Value == nil) {
			t.Errorf("over %+v: Direct = %v, and made %d calls", cur, direct, codec.calls)
		}
		_, err := u.Next(cur)
		if direct && codec.calls > 0 {
			t.Errorf("over %+v: Direct, but Next made %d calls", cur, codec.calls)
		}
		// The expiry that is not known is rare, and need not be direct.
		if !direct && codec.calls == 0 && !errors.Is(err, ErrBareExpiry) {
			t.Errorf("over %+v: not Direct, but Next made no calls (%v)", cur, err)
		}
	}
}
