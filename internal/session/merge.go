package session

import (
	"maps"
	"reflect"
	"slices"
	"time"
)

// DeadlineKey stands for the session's deadline among the keys of a conflict.
const DeadlineKey = "__deadline"

// Contents is what a codec makes of a payload. It is shared between goroutines and never changed.
type Contents struct {
	deadline time.Time
	values   map[string]any
	raw      bool // some values come from the application's code, not from the codec
}

// same reports whether c and o hold the same values and deadline.
func (c *Contents) same(o *Contents) bool {
	return c.deadline.Equal(o.deadline) && maps.EqualFunc(c.values, o.values, equal)
}

// set puts v under key, or removes the key. Only merge uses it, on a result that nobody shares yet.
func (c *Contents) set(key string, v value) {
	if v.present {
		c.values[key] = v.v
	} else {
		delete(c.values, key)
	}
}

// value is one key of a session: absent, or present with what may be nil (a codec such as JSON has
// nulls).
type value struct {
	v       any
	present bool
}

func (c *Contents) at(key string) value {
	v, ok := c.values[key]
	return value{v, ok}
}

func (a value) equal(b value) bool { return a.present == b.present && equal(a.v, b.v) }

// equal compares decoded values. Encoded ones do not do: gob writes maps in random order.
func equal(a, b any) bool { return reflect.DeepEqual(a, b) }

// A Clash is one session key that two requests changed, each starting from Base. A field is nil
// where the key is absent.
type Clash struct {
	Key                string
	Base, Ours, Theirs any
}

// Merger merges the changes of two requests to one session.
type Merger struct {
	Serializable bool                     // any change of others is a conflict
	Resolve      func(Clash) (any, error) // decides a clash; a nil value removes the key; nil: clashes are conflicts
}

// merge returns theirs with what changed from base to ours: a three-way merge by session key, in
// which the deadline is one more key. Keys that changed on both sides are conflicts, also where
// both sides wrote the same value: two requests that add one to a counter look like that. But where
// a key holds a map with string keys on all sides, the entries of the map are merged in the same
// way, and so on inside; a conflict there is one on the session's key. Of two deadlines the later
// one holds. A nil base stands for a session that was absent.
//
// Neither argument is changed. Where ours changed nothing the result is theirs itself, and it is
// never a conflict.
func (m Merger) merge(base, ours, theirs *Contents) (*Contents, error) {
	absent := base == nil // then both sides have set a deadline
	if absent {
		base = &Contents{}
	}
	changes := changed(base, ours)
	moved := !absent && !ours.deadline.Equal(base.deadline)
	if len(changes) == 0 && !moved && !absent {
		return theirs, nil
	}
	if m.Serializable {
		if keys := differences(base, theirs, absent); len(keys) > 0 || absent {
			return nil, newConflictError(keys)
		}
	}

	merged := &Contents{deadline: theirs.deadline, values: maps.Clone(theirs.values)}
	if merged.values == nil {
		merged.values = make(map[string]any, len(changes))
	}
	if (absent || moved) && (ours.deadline.After(theirs.deadline) || theirs.deadline.Equal(base.deadline)) {
		merged.deadline = ours.deadline
	}
	var clashes []Clash
	for _, key := range changes {
		b, o, t := base.at(key), ours.at(key), theirs.at(key)
		if v, ok := mergeValues(b, o, t); ok {
			merged.set(key, v)
		} else {
			clashes = append(clashes, Clash{Key: key, Base: b.v, Ours: o.v, Theirs: t.v})
		}
	}
	return merged, m.resolve(clashes, merged)
}

// differences returns the keys that others have changed, the deadline included.
func differences(base, theirs *Contents, absent bool) []string {
	keys := changed(base, theirs)
	if !absent && !theirs.deadline.Equal(base.deadline) {
		keys = append(keys, DeadlineKey)
	}
	return keys
}

// mergeValues merges the value of one key that ours has changed. It reports false where theirs has
// changed it, too, and they are not maps, or conflict inside.
func mergeValues(base, ours, theirs value) (value, bool) {
	if theirs.equal(base) {
		return ours, true
	}
	if !base.present || !ours.present || !theirs.present {
		return value{}, false
	}
	m, ok := mergeMaps(reflect.ValueOf(base.v), reflect.ValueOf(ours.v), reflect.ValueOf(theirs.v))
	if !ok {
		return value{}, false
	}
	return value{m.Interface(), true}, true
}

// mergeMaps merges the entries of maps with string keys. It reports false where they are none, or
// conflict.
func mergeMaps(base, ours, theirs reflect.Value) (reflect.Value, bool) {
	if !base.IsValid() || base.Kind() != reflect.Map || base.Type().Key().Kind() != reflect.String ||
		!ours.IsValid() || ours.Type() != base.Type() || !theirs.IsValid() || theirs.Type() != base.Type() {
		return reflect.Value{}, false
	}
	merged := reflect.MakeMapWithSize(base.Type(), theirs.Len())
	for _, key := range theirs.MapKeys() {
		merged.SetMapIndex(key, theirs.MapIndex(key))
	}
	for _, key := range slices.Concat(ours.MapKeys(), base.MapKeys()) { // those of both twice, to the same effect
		b, o, t := entry(base, key), entry(ours, key), entry(theirs, key)
		if o.equal(b) {
			continue
		}
		v, ok := mergeValues(b, o, t)
		if !ok {
			return reflect.Value{}, false
		}
		merged.SetMapIndex(key, v.reflected(base.Type().Elem()))
	}
	return merged, true
}

// entry returns what a map holds under a key.
func entry(m, key reflect.Value) value {
	v := m.MapIndex(key)
	if !v.IsValid() {
		return value{}
	}
	return value{v.Interface(), true}
}

// reflected returns v as an element of a map, the zero Value for none.
func (a value) reflected(elem reflect.Type) reflect.Value {
	switch {
	case !a.present:
		return reflect.Value{}
	case a.v == nil:
		return reflect.Zero(elem)
	}
	return reflect.ValueOf(a.v)
}

// resolve lets the resolver decide the clashes.
func (m Merger) resolve(clashes []Clash, merged *Contents) error {
	var undecided []string
	for _, c := range clashes {
		if m.Resolve == nil {
			undecided = append(undecided, c.Key)
			continue
		}
		v, err := m.Resolve(c)
		if err != nil {
			return ApplicationError{err}
		}
		merged.raw = true
		merged.set(c.Key, value{v, v != nil})
	}
	if len(undecided) > 0 {
		return newConflictError(undecided)
	}
	return nil
}

// changed returns the keys that differ between base and side, sorted.
func changed(base, side *Contents) []string {
	var keys []string
	for key := range side.values {
		if !side.at(key).equal(base.at(key)) {
			keys = append(keys, key)
		}
	}
	for key := range base.values {
		if !side.at(key).present {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// CarryOver returns ours with what theirs has changed since base, where ours has not changed the
// same: there Resolve decides, or else ours stands, as its deadline and its expiry do in any case.
// What does not decode carries nothing over.
func (m Merger) CarryOver(base, ours, theirs *Image) *Image {
	if base == nil {
		return ours
	}
	b, errBase := base.Contents()
	o, errOurs := ours.Contents()
	t, errTheirs := theirs.Contents()
	if errBase != nil || errOurs != nil || errTheirs != nil {
		return ours
	}
	var undecided []string
	lenient := Merger{Resolve: func(c Clash) (any, error) {
		if m.Resolve != nil {
			if v, err := m.Resolve(c); err == nil {
				return v, nil
			}
		}
		undecided = append(undecided, c.Key)
		return nil, nil
	}}
	merged, err := lenient.merge(b, o, t)
	if err != nil {
		return ours
	}
	for _, key := range undecided {
		merged.set(key, o.at(key))
	}
	carried, err := imageWith(ours.codec, &Contents{deadline: o.deadline, values: merged.values, raw: true}, ours.expiry)
	if err != nil {
		return ours
	}
	return carried
}
