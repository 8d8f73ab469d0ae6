package session

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"
)

// day0 is the deadline of sessions whose deadline does not matter.
var day0 = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)

func day(n int) time.Time { return day0.AddDate(0, 0, n) }

// with returns contents that hold values, given as keys and values in turn.
func with(pairs ...any) *Contents {
	c := &Contents{deadline: day0, values: make(map[string]any)}
	for i := 0; i < len(pairs); i += 2 {
		c.values[pairs[i].(string)] = pairs[i+1]
	}
	return c
}

func until(deadline time.Time, c *Contents) *Contents {
	c.deadline = deadline
	return c
}

// wantContents fails t unless got holds the values and the deadline of want.
func wantContents(t *testing.T, got, want *Contents) {
	t.Helper()
	if got == nil {
		t.Fatalf("no contents, want %v", want.values)
	}
	if !maps.EqualFunc(got.values, want.values, reflect.DeepEqual) {
		t.Errorf("values = %v, want %v", got.values, want.values)
	}
	if !got.deadline.Equal(want.deadline) {
		t.Errorf("deadline = %v, want %v", got.deadline, want.deadline)
	}
}

// wantConflict fails t unless err is a conflict on exactly these keys.
func wantConflict(t *testing.T, err error, keys ...string) {
	t.Helper()
	var conflict *ConflictError
	if !errors.Is(err, ErrConflict) || !errors.As(err, &conflict) {
		t.Fatalf("error = %v, want a *ConflictError", err)
	}
	if !slices.Equal(conflict.Keys, keys) {
		t.Errorf("keys in conflict = %q, want %q", conflict.Keys, keys)
	}
}

// isolation is the store's: what of others' changes is a conflict.
type isolation int

const (
	snapshot isolation = iota
	serializable
)

// resolver decides a clash.
type resolver = func(Clash) (any, error)

// merger returns what merges under an isolation level, with a resolver or nil.
func merger(level isolation, r resolver) Merger {
	return Merger{Serializable: level == serializable, Resolve: r}
}

func keepOurs(c Clash) (any, error) { return c.Ours, nil }

func keepTheirs(c Clash) (any, error) { return c.Theirs, nil }

// neverAsked is a resolver for cases without a conflict.
func neverAsked(t *testing.T) resolver {
	return func(c Clash) (any, error) {
		t.Errorf("the resolver was asked about %+v", c)
		return nil, errors.New("asked")
	}
}

// absent is the value of a key that is not there, in tables.
const absent = "-"

// oneKey returns contents with the key k, unless it is absent.
func oneKey(v string, more ...any) *Contents {
	c := with(more...)
	if v != absent {
		c.values["k"] = v
	}
	return c
}

// What can happen to one key. The base holds a or nothing; want is what the rule says: a key that one side changed is
// that side's, a key that both sides changed is a conflict, whatever they made of it.
var oneKeyCases = []struct {
	base, ours, theirs string
	want               string // "conflict", or the value
}{
	// Nobody touched it.
	{"a", "a", "a", "a"},
	{absent, absent, absent, absent},
	// Ours alone.
	{"a", "b", "a", "b"},
	{"a", absent, "a", absent},
	{absent, "b", absent, "b"},
	// Theirs alone.
	{"a", "a", "b", "b"},
	{"a", "a", absent, absent},
	{absent, absent, "b", "b"},
	// Both.
	{"a", "b", "c", "conflict"},
	{"a", "b", "b", "conflict"}, // two that add one look like this
	{"a", "b", absent, "conflict"},
	{"a", absent, "b", "conflict"},
	{"a", absent, absent, "conflict"},
	{absent, "b", "c", "conflict"},
	{absent, "b", "b", "conflict"},
}

func TestMerger_Merge_OneKey(t *testing.T) {
	broken := errors.New("broken resolver")
	resolvers := []struct {
		name    string
		resolve resolver
		want    func(ours, theirs string) string // of a conflict: the value, "conflict" or "error"
	}{
		{"none", nil, func(_, _ string) string { return "conflict" }},
		{"keepOurs", keepOurs, func(ours, _ string) string { return ours }},
		{"keepTheirs", keepTheirs, func(_, theirs string) string { return theirs }},
		{"removes", func(Clash) (any, error) { return nil, nil }, func(_, _ string) string { return absent }},
		{"replaces", func(Clash) (any, error) { return "z", nil }, func(_, _ string) string { return "z" }},
		{"fails", func(Clash) (any, error) { return "z", broken }, func(_, _ string) string { return "error" }},
	}
	for _, tc := range oneKeyCases {
		for _, other := range []bool{false, true} { // others have changed another key, too
			for _, level := range []isolation{snapshot, serializable} {
				for _, r := range resolvers {
					name := fmt.Sprintf("%s,%s,%s/other=%v/isolation=%d/%s", tc.base, tc.ours, tc.theirs, other, level, r.name)
					t.Run(name, func(t *testing.T) {
						base, ours, theirs := oneKey(tc.base, "o", 1), oneKey(tc.ours, "o", 1), oneKey(tc.theirs, "o", 1)
						if other {
							theirs.values["o"] = 2
						}
						weWrote, theyWrote := tc.ours != tc.base, tc.theirs != tc.base
						want := tc.want
						switch {
						case level == serializable && weWrote && (theyWrote || other):
							// No resolver is asked: what this request computed rests on what has changed.
							var keys []string
							if theyWrote {
								keys = append(keys, "k")
							}
							if other {
								keys = append(keys, "o")
							}
							_, err := merger(level, neverAsked(t)).merge(base, ours, theirs)
							wantConflict(t, err, keys...)
							_, err = merger(level, nil).merge(base, ours, theirs)
							wantConflict(t, err, keys...)
							return
						case want == "conflict":
							want = r.want(tc.ours, tc.theirs)
						case r.resolve != nil:
							r.resolve = neverAsked(t)
						}
						got, err := merger(level, r.resolve).merge(base, ours, theirs)
						switch want {
						case "conflict":
							wantConflict(t, err, "k")
						case "error":
							if !errors.Is(err, broken) || errors.Is(err, ErrConflict) {
								t.Errorf("error = %v, want the resolver's", err)
							}
						default:
							if err != nil {
								t.Fatal(err)
							}
							wantContents(t, got, oneKey(want, "o", theirs.values["o"]))
						}
					})
				}
			}
		}
	}
}

// A session that the request did not find, and that another has made meanwhile.
func TestMerger_Merge_NilBase(t *testing.T) {
	for _, tc := range []struct {
		name         string
		ours, theirs *Contents
		resolver     resolver
		want         *Contents
		conflict     []string
	}{
		{"both empty", with(), with(), nil, with(), nil},
		{"ours empty", with(), with("a", 1), nil, with("a", 1), nil},
		{"theirs empty", with("a", 1), with(), nil, with("a", 1), nil},
		{"theirs without values", with("a", 1), &Contents{deadline: day0}, nil, with("a", 1), nil},
		{"different keys", with("a", 1), with("b", 2), nil, with("a", 1, "b", 2), nil},
		{"same key", with("a", 1, "c", 3), with("a", 2, "c", 4), nil, nil, []string{"a", "c"}},
		{"same key, same value", with("a", 1), with("a", 1), nil, nil, []string{"a"}},
		{"same key, resolved", with("a", 1), with("a", 2, "b", 2), keepOurs, with("a", 1, "b", 2), nil},
		{"our deadline is later", until(day(2), with("a", 1)), until(day(1), with()), nil, until(day(2), with("a", 1)), nil},
		{"their deadline is later", until(day(1), with("a", 1)), until(day(2), with()), nil, until(day(2), with("a", 1)), nil},
		{"our deadline alone", until(day(2), with()), until(day(1), with("b", 1)), nil, until(day(2), with("b", 1)), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := merger(snapshot, tc.resolver).merge(nil, tc.ours, tc.theirs)
			switch {
			case tc.conflict != nil:
				wantConflict(t, err, tc.conflict...)
			case err != nil:
				t.Error(err)
			default:
				wantContents(t, got, tc.want)
			}
			_, err = merger(serializable, neverAsked(t)).merge(nil, tc.ours, tc.theirs)
			wantConflict(t, err, slices.Sorted(maps.Keys(tc.theirs.values))...)
		})
	}
}

// Of two deadlines the later one holds.
func TestMerger_Merge_Deadline(t *testing.T) {
	local := time.FixedZone("elsewhere", 3600)
	for _, tc := range []struct {
		name               string
		base, ours, theirs time.Time
		resolver           resolver
		want               time.Time
	}{
		{"nobody", day(0), day(0), day(0), nil, day(0)},
		{"ours", day(0), day(1), day(0), nil, day(1)},
		{"ours, earlier", day(1), day(0), day(1), nil, day(0)},
		{"theirs", day(0), day(0), day(1), nil, day(1)},
		{"theirs, earlier", day(1), day(1), day(0), nil, day(0)},
		{"another zone is no change", day(0), day(0).In(local), day(1), nil, day(1)},
		{"another zone is no change of theirs", day(0), day(1), day(0).In(local), nil, day(1)},
		{"both, theirs later", day(0), day(1), day(2), neverAsked(t), day(2)},
		{"both, ours later", day(0), day(2), day(1), neverAsked(t), day(2)},
		{"both, equal", day(0), day(1), day(1), neverAsked(t), day(1)},
		{"both, earlier than before", day(5), day(1), day(2), neverAsked(t), day(2)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// A value of theirs comes along, and must arrive, in every case.
			base, ours, theirs := until(tc.base, with("k", 1)), until(tc.ours, with("k", 1)), until(tc.theirs, with("k", 2))
			got, err := merger(snapshot, tc.resolver).merge(base, ours, theirs)
			if err != nil {
				t.Fatal(err)
			}
			wantContents(t, got, until(tc.want, with("k", 2)))

			got, err = merger(serializable, neverAsked(t)).merge(base, ours, theirs)
			switch {
			case tc.ours.Equal(tc.base): // a touch
				if got != theirs || err != nil {
					t.Errorf("Serializable: %v, %v; want theirs", got, err)
				}
			case tc.theirs.Equal(tc.base):
				wantConflict(t, err, "k")
			default:
				wantConflict(t, err, DeadlineKey, "k")
			}
		})
	}
}

// A deadline that alone was moved by others conflicts with a value under Serializable, and not under Snapshot.
func TestMerger_Merge_TheirDeadlineOurValue(t *testing.T) {
	base, ours, theirs := with("k", 1), with("k", 2), until(day(1), with("k", 1))
	got, err := Merger{}.merge(base, ours, theirs)
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, got, until(day(1), with("k", 2)))
	_, err = Merger{Serializable: true}.merge(base, ours, theirs)
	wantConflict(t, err, DeadlineKey)
}

// Where ours changed nothing, nothing conflicts, and the result is theirs itself.
func TestMerger_Merge_TouchNeverConflicts(t *testing.T) {
	bases := []*Contents{with(), with("k", 1), with("k", 1, "l", []string{"x"})}
	others := []*Contents{with(), with("k", 2), with("l", 3), until(day(5), with("k", 1)), {}}
	for _, level := range []isolation{snapshot, serializable} {
		for _, base := range bases {
			for _, theirs := range others {
				touched := &Contents{deadline: base.deadline, values: maps.Clone(base.values)}
				got, err := merger(level, neverAsked(t)).merge(base, touched, theirs)
				if err != nil || got != theirs {
					t.Errorf("isolation %d: touch of %v beside %v = %v, %v", level, base, theirs, got, err)
				}
			}
		}
	}
}

// All keys in conflict are named, sorted, and no others; and of what a resolver decides all, or nothing, is kept.
func TestMerger_Merge_ManyKeys(t *testing.T) {
	base := with("a", 1, "b", 1, "c", 1, "d", 1, "e", 1)
	ours := until(day(1), with("a", 2, "b", 1, "c", 2, "d", 2, "z", 2)) // changed a, c and d, removed e, added z
	theirs := until(day(2), with("a", 3, "b", 3, "c", 1, "z", 3))       // changed a and b, removed d and e, added z

	_, err := Merger{}.merge(base, ours, theirs)
	wantConflict(t, err, "a", "d", "e", "z")

	asked := make(map[string]Clash)
	var order []string // sorted, so that the same resolver's error comes first each time
	got, err := Merger{Resolve: func(c Clash) (any, error) {
		asked[c.Key] = c
		order = append(order, c.Key)
		return "resolved " + c.Key, nil
	}}.merge(base, ours, theirs)
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, got, until(day(2), with("a", "resolved a", "b", 3, "c", 2, "d", "resolved d", "e", "resolved e", "z", "resolved z")))
	want := map[string]Clash{
		"a": {"a", 1, 2, 3},
		"d": {"d", 1, 2, nil},
		"e": {"e", 1, nil, nil},
		"z": {"z", nil, 2, 3},
	}
	if !maps.Equal(asked, want) {
		t.Errorf("the resolver was asked\n%v, want\n%v", asked, want)
	}
	if want := []string{"a", "d", "e", "z"}; !slices.Equal(order, want) {
		t.Errorf("the resolver was asked about %q, want the order %q", order, want)
	}

	full := errors.New("the cart is full")
	_, err = Merger{Resolve: func(c Clash) (any, error) {
		if c.Key == "z" {
			return nil, full
		}
		return c.Ours, nil
	}}.merge(base, ours, theirs)
	if !errors.Is(err, full) {
		t.Errorf("error = %v, want the resolver's", err)
	}
}

func TestMerger_Merge_Counter(t *testing.T) {
	sum := func(c Clash) (any, error) {
		b, _ := c.Base.(int)
		o, _ := c.Ours.(int)
		th, _ := c.Theirs.(int)
		return o + th - b, nil
	}
	for _, tc := range []struct {
		name               string
		base, ours, theirs *Contents
		want               int
	}{
		{"both add", with("n", 5), with("n", 6), with("n", 8), 9},
		{"both add one", with("n", 5), with("n", 6), with("n", 6), 7},
		{"one subtracts", with("n", 5), with("n", 4), with("n", 8), 7},
		{"both make it", with(), with("n", 1), with("n", 1), 2},
		{"both make the session", nil, with("n", 1), with("n", 1), 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Merger{Resolve: sum}.merge(tc.base, tc.ours, tc.theirs)
			if err != nil {
				t.Fatal(err)
			}
			wantContents(t, got, with("n", tc.want))
		})
	}
}

// unite is a resolver for sets of strings.
func unite(c Clash) (any, error) {
	var set []string
	for _, side := range []any{c.Ours, c.Theirs} {
		s, _ := side.([]string)
		set = append(set, s...)
	}
	slices.Sort(set)
	return slices.Compact(set), nil
}

func TestMerger_Merge_Set(t *testing.T) {
	got, err := Merger{Resolve: unite}.merge(
		with("cart", []string{"apple"}),
		with("cart", []string{"apple", "bread"}),
		with("cart", []string{"apple", "cheese"}))
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, got, with("cart", []string{"apple", "bread", "cheese"}))
}

// Values are equal if they are deeply equal.
func TestMerger_Merge_DeepValues(t *testing.T) {
	type point struct{ X, Y int }
	for _, tc := range []struct {
		name     string
		value    func() any
		modified any
	}{
		{"slice", func() any { return []string{"a", "b"} }, []string{"a", "c"}},
		{"bytes", func() any { return []byte("abc") }, []byte("abd")},
		{"map", func() any { return map[string]int{"a": 1, "b": 2} }, map[string]int{"a": 1, "b": 3}},
		{"struct", func() any { return point{1, 2} }, point{1, 3}},
		{"pointer", func() any { return &point{1, 2} }, &point{1, 3}},
		{"time", func() any { return day(1) }, day(2)},
		{"nested", func() any { return map[string]any{"a": []any{1, "x"}} }, map[string]any{"a": []any{1, "y"}}},
		{"null", func() any { return nil }, "something"},
		{"type", func() any { return int64(1) }, int32(1)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := Merger{}.merge(with("k", tc.value()), with("k", tc.value(), "o", 1), with("k", tc.modified))
			if err != nil {
				t.Fatalf("an equal value is taken for a change: %v", err)
			}
			wantContents(t, got, with("k", tc.modified, "o", 1))
			_, err = Merger{}.merge(with("k", tc.value()), with("k", tc.modified), with("k", "theirs"))
			wantConflict(t, err, "k")
		})
	}
}

// A null that a codec such as JSON's makes is a value: a key that holds it is not absent.
func TestMerger_Merge_NullIsPresent(t *testing.T) {
	got, err := Merger{}.merge(with("k", nil), with("o", 1), with("k", nil))
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, got, with("o", 1))
	got, err = Merger{}.merge(with(), with("k", nil), with("o", 1))
	if err != nil {
		t.Fatal(err)
	}
	wantContents(t, got, with("k", nil, "o", 1))
	_, err = Merger{}.merge(with("k", nil), with(), with("k", 1))
	wantConflict(t, err, "k")
}

// Contents are shared between goroutines: nothing that merge is given may change, neither while it runs nor through
// its result.
func TestMerger_Merge_ArgumentsStay(t *testing.T) {
	sides := func() [3]*Contents {
		return [3]*Contents{
			with("a", 1, "b", []string{"x"}, "c", 1, "d", map[string]int{"x": 1}),
			until(day(1), with("a", 2, "b", []string{"x", "y"}, "e", 1)),
			until(day(2), with("a", 3, "b", []string{"x"}, "c", 1, "d", map[string]int{"x": 2}, "f", 1)),
		}
	}
	for name, r := range map[string]resolver{
		"none": nil, "keepOurs": keepOurs, "keepTheirs": keepTheirs,
		"removes deadline": func(Clash) (any, error) { return nil, nil },
	} {
		for _, level := range []isolation{snapshot, serializable} {
			t.Run(fmt.Sprintf("%s/isolation=%d", name, level), func(t *testing.T) {
				is, was := sides(), sides()
				got, err := merger(level, r).merge(is[0], is[1], is[2])
				if err == nil {
					clear(got.values)
				}
				for i, side := range []string{"base", "ours", "theirs"} {
					if !reflect.DeepEqual(is[i], was[i]) {
						t.Errorf("%s became %v, was %v", side, is[i], was[i])
					}
				}
			})
		}
	}
}

// fuzzContents makes contents of bytes: each sets one key, or the deadline, and few of them make a clash.
func fuzzContents(b []byte) *Contents {
	c := with()
	for _, x := range b {
		key, v := string(rune('a'+x%5)), int(x/5%4)
		switch {
		case x >= 200:
			c.deadline = day(v)
		case v == 0:
			delete(c.values, key)
		case v == 3:
			c.values[key] = []string{key}
		default:
			c.values[key] = v
		}
	}
	return c
}

// differ returns the keys, the deadline's included, in which two sides differ.
func differ(a, b *Contents) map[string]bool {
	keys := make(map[string]bool)
	for _, side := range []*Contents{a, b} {
		for key := range side.values {
			va, inA := a.values[key]
			vb, inB := b.values[key]
			if inA != inB || !reflect.DeepEqual(va, vb) {
				keys[key] = true
			}
		}
	}
	if !a.deadline.Equal(b.deadline) {
		keys[DeadlineKey] = true
	}
	return keys
}

func FuzzMerge(f *testing.F) {
	f.Add([]byte{}, []byte{}, []byte{})
	f.Add([]byte{5, 6}, []byte{5, 6, 12}, []byte{5, 6, 8})
	f.Add([]byte{5, 6, 17}, []byte{10, 6, 17}, []byte{5, 11, 17})
	f.Add([]byte{5, 200}, []byte{5, 205}, []byte{10, 210})
	f.Add([]byte{15, 16}, []byte{0}, []byte{16, 205})
	f.Fuzz(func(t *testing.T, b, o, th []byte) {
		base, ours, theirs := fuzzContents(b), fuzzContents(o), fuzzContents(th)
		snapshot := Merger{}
		merge := func(m Merger, base, ours, theirs *Contents) *Contents {
			t.Helper()
			got, err := m.merge(base, ours, theirs)
			if err != nil {
				t.Fatalf("merge(%v, %v, %v): %v", base, ours, theirs, err)
			}
			return got
		}
		// With a side that changed nothing the result is the other.
		wantContents(t, merge(snapshot, base, fuzzContents(b), theirs), theirs)
		wantContents(t, merge(snapshot, base, ours, fuzzContents(b)), ours)

		weChanged, theyChanged := differ(base, ours), differ(base, theirs)
		var both []string
		for key := range weChanged {
			if theyChanged[key] && key != DeadlineKey {
				both = append(both, key)
			}
		}
		later := theirs.deadline
		if ours.deadline.After(later) {
			later = ours.deadline
		}
		slices.Sort(both)
		if len(both) == 0 {
			wantContents(t, merge(snapshot, base, ours, theirs), merge(snapshot, base, theirs, ours))
		} else {
			_, err := snapshot.merge(base, ours, theirs)
			wantConflict(t, err, both...)
		}
		got, err := Merger{Serializable: true}.merge(base, ours, theirs)
		switch {
		case len(weChanged) > 0 && len(theyChanged) > 0:
			wantConflict(t, err, slices.Sorted(maps.Keys(theyChanged))...)
		case err != nil:
			t.Errorf("Serializable: %v", err)
		default:
			wantContents(t, got, merge(snapshot, base, ours, theirs))
		}

		// Each key is that of the side which changed it, and so none is invented or dropped.
		for _, tc := range []struct {
			resolver resolver
			first    *Contents // what it changed holds
			changed  map[string]bool
			other    *Contents
		}{
			{keepOurs, ours, weChanged, theirs},
			{keepTheirs, theirs, theyChanged, ours},
		} {
			want := &Contents{deadline: tc.other.deadline, values: maps.Clone(tc.other.values)}
			for key := range tc.changed {
				v, ok := tc.first.values[key]
				switch {
				case key == DeadlineKey && weChanged[key] && theyChanged[key]:
					want.deadline = later
				case key == DeadlineKey:
					want.deadline = tc.first.deadline
				case ok:
					want.values[key] = v
				default:
					delete(want.values, key)
				}
			}
			wantContents(t, merge(Merger{Resolve: tc.resolver}, base, ours, theirs), want)
		}

		if !reflect.DeepEqual(base, fuzzContents(b)) || !reflect.DeepEqual(ours, fuzzContents(o)) || !reflect.DeepEqual(theirs, fuzzContents(th)) {
			t.Error("merge changed what it was given")
		}
	})
}

// fuzzMap makes a map of bytes: each sets an entry, to a number or to a map, or removes it.
func fuzzMap(b []byte) map[string]any {
	m := map[string]any{}
	for _, x := range b {
		key, v := string(rune('a'+x%4)), int(x/4%4)
		inner, isMap := m[key].(map[string]any)
		switch {
		case x >= 128 && isMap:
			inner[string(rune('a'+v))] = int(x / 16)
		case x >= 128:
			m[key] = map[string]any{string(rune('a' + v)): int(x / 16)}
		case v == 0:
			delete(m, key)
		default:
			m[key] = v
		}
	}
	return m
}

// The entries of a map are merged as the keys of a session are, and a conflict inside is one on the map's key.
func FuzzMergeMaps(f *testing.F) {
	f.Add([]byte{}, []byte{}, []byte{})
	f.Add([]byte{4, 5}, []byte{4, 5, 10}, []byte{4, 5, 15})
	f.Add([]byte{4}, []byte{8}, []byte{12})
	f.Add([]byte{128, 133}, []byte{128, 133, 140}, []byte{128, 133, 136})
	f.Add([]byte{128}, []byte{160}, []byte{192})
	f.Fuzz(func(t *testing.T, b, o, th []byte) {
		outer := func(m map[string]any) *Contents { return with("m", m, "n", 1) }
		inner := func(m map[string]any) *Contents { return &Contents{deadline: day0, values: m} }
		want, wantErr := Merger{}.merge(inner(fuzzMap(b)), inner(fuzzMap(o)), inner(fuzzMap(th)))
		base, ours, theirs := outer(fuzzMap(b)), outer(fuzzMap(o)), outer(fuzzMap(th))
		got, err := Merger{}.merge(base, ours, theirs)
		switch {
		case wantErr != nil:
			wantConflict(t, err, "m")
		case err != nil:
			t.Fatalf("merge(%v, %v, %v): %v, and entry by entry %v", base, ours, theirs, err, want)
		default:
			wantContents(t, got, outer(want.values))
		}
		if !reflect.DeepEqual(base, outer(fuzzMap(b))) || !reflect.DeepEqual(ours, outer(fuzzMap(o))) ||
			!reflect.DeepEqual(theirs, outer(fuzzMap(th))) {
			t.Error("merge changed what it was given")
		}
	})
}

// Maps of any type with string keys are merged, where all sides have one of the same type; others are values.
func TestMerger_Merge_Maps(t *testing.T) {
	type id string
	for name, tc := range map[string]struct {
		base, ours, theirs any
		want               any // nil: a conflict
	}{
		"of numbers":        {map[string]int{"a": 1}, map[string]int{"a": 1, "b": 2}, map[string]int{"a": 3}, map[string]int{"a": 3, "b": 2}},
		"of own keys":       {map[id]int{}, map[id]int{"b": 2}, map[id]int{"a": 1}, map[id]int{"a": 1, "b": 2}},
		"removed":           {map[string]int{"a": 1, "b": 2}, map[string]int{"b": 2}, map[string]int{"a": 1}, map[string]int{}},
		"nil at first":      {map[string]int(nil), map[string]int{"b": 2}, map[string]int{"a": 1}, map[string]int{"a": 1, "b": 2}},
		"nil inside":        {map[string]any{}, map[string]any{"b": nil}, map[string]any{"a": 1}, map[string]any{"a": 1, "b": nil}},
		"nested":            {map[string]any{"m": map[string]any{}}, map[string]any{"m": map[string]any{"b": 2}}, map[string]any{"m": map[string]any{"a": 1}}, map[string]any{"m": map[string]any{"a": 1, "b": 2}}},
		"same entry":        {map[string]int{"a": 1}, map[string]int{"a": 2}, map[string]int{"a": 3}, nil},
		"of numbers as key": {map[int]int{}, map[int]int{2: 2}, map[int]int{1: 1}, nil},
		"another type":      {map[string]int{}, map[string]any{"b": 2}, map[string]int{"a": 1}, nil},
		"created by both":   {nil, map[string]int{"b": 2}, map[string]int{"a": 1}, nil},
		"slices":            {[]int{1}, []int{1, 2}, []int{1, 3}, nil},
	} {
		base := with()
		if tc.base != nil {
			base = with("k", tc.base)
		}
		got, err := Merger{}.merge(base, with("k", tc.ours), with("k", tc.theirs))
		switch {
		case tc.want == nil:
			wantConflict(t, err, "k")
		case err != nil:
			t.Errorf("%s: %v", name, err)
		default:
			wantContents(t, got, with("k", tc.want))
		}
	}
}

// A renewal never conflicts: it has what only others have changed, and where both have, what the resolver says, else its own.
func TestMerger_CarryOver(t *testing.T) {
	base := with("kept", 1, "theirs", 1, "ours", 1, "both", 1, "null", 1, "gone", 1)
	ours := until(day(3), with("kept", 1, "theirs", 1, "ours", 2, "both", 2, "null", nil, "gone", 2))
	theirs := until(day(5), with("kept", 1, "theirs", 3, "ours", 1, "both", 3, "null", 3, "new", 3))
	carry := func(m Merger) *Image {
		image := func(c *Contents) *Image { return encodedImage(t, jsonCodec{}, c, 1000) }
		return m.CarryOver(image(base), image(ours), image(theirs))
	}
	for name, tc := range map[string]struct {
		resolver resolver
		want     *Contents
	}{
		"without a resolver": {nil, with("kept", 1.0, "theirs", 3.0, "ours", 2.0, "both", 2.0, "null", nil, "gone", 2.0, "new", 3.0)},
		"their side":         {keepTheirs, with("kept", 1.0, "theirs", 3.0, "ours", 2.0, "both", 3.0, "null", 3.0, "new", 3.0)},
		"one that refuses": {
			func(Clash) (any, error) { return nil, errors.New("refused") },
			with("kept", 1.0, "theirs", 3.0, "ours", 2.0, "both", 2.0, "null", nil, "gone", 2.0, "new", 3.0),
		},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := carry(Merger{Serializable: true, Resolve: tc.resolver}).Contents()
			if err != nil {
				t.Fatal(err)
			}
			wantContents(t, got, until(day(3), tc.want))
		})
	}
	opaque := NewImage(jsonCodec{}, []byte("opaque"), 1)
	if got := (Merger{}).CarryOver(opaque, opaque, opaque); got != opaque {
		t.Error("what does not decode was carried over")
	}
}
