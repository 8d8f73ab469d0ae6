package etcdstore

import (
	"maps"
	"reflect"
	"slices"
	"time"
)

// DeadlineKey is the Key of a Conflict, or of a ConflictError, that is about the session's deadline (its
// absolute lifetime, scs.SessionManager.SetDeadline) and not about a value. Base, Ours and Theirs are then of
// type time.Time. scs reserves keys that begin with two underscores in the same way.
const DeadlineKey = "__deadline"

// A Conflict is one session key that two requests changed, each starting from Base. A field is nil where the
// key is absent.
type Conflict struct {
	Key    string
	Base   any // what this request read
	Ours   any // what this request wants to store
	Theirs any // what the session holds by now
}

// A Resolver decides a conflict: the value that it returns is stored, nil removes the key (also where a codec such
// as JSON knows a null), and an error fails the commit as it is. It is not asked under [Serializable], where the changes
// of others are conflicts as such. It must not change the values that it is given, nor call the store or the session
// manager, nor end its goroutine (runtime.Goexit); it is called from several goroutines at a time, and again when the
// commit is tried again.
type Resolver func(Conflict) (value any, err error)

// KeepOurs is a Resolver: the last writer wins.
func KeepOurs(c Conflict) (any, error) { return c.Ours, nil }

// KeepTheirs is a Resolver: the first writer wins, without an error for the second.
func KeepTheirs(c Conflict) (any, error) { return c.Theirs, nil }

// contents is what a codec makes of a payload. It is shared between goroutines and never changed.
type contents struct {
	deadline time.Time
	values   map[string]any
	raw      bool // some values come from the application's code, not from the codec
}

// same reports whether c and o hold the same values and deadline.
func (c *contents) same(o *contents) bool {
	return c.deadline.Equal(o.deadline) && maps.EqualFunc(c.values, o.values, equal)
}

// set puts v under key, or removes the key. Only merge uses it, on a result that nobody shares yet.
func (c *contents) set(key string, v value) {
	if v.present {
		c.values[key] = v.v
	} else {
		delete(c.values, key)
	}
}

// value is one key of a session: absent, or present with what may be nil (a codec such as JSON has nulls).
type value struct {
	v       any
	present bool
}

func (c *contents) at(key string) value {
	v, ok := c.values[key]
	return value{v, ok}
}

func (a value) equal(b value) bool { return a.present == b.present && equal(a.v, b.v) }

// equal compares decoded values. Encoded ones do not do: gob writes maps in random order.
func equal(a, b any) bool { return reflect.DeepEqual(a, b) }

// merger merges the changes of two requests to one session.
type merger struct {
	isolation Isolation
	resolver  Resolver
}

// merge returns theirs with what changed from base to ours: a three-way merge by session key, in which the
// deadline is one more key. Keys that changed on both sides are conflicts, also where both sides wrote the
// same value: two requests that add one to a counter look like that. A nil base stands for a session that was
// absent.
//
// Neither argument is changed. Where ours changed nothing the result is theirs itself, and it is never a
// conflict.
func (m merger) merge(base, ours, theirs *contents) (*contents, error) {
	absent := base == nil // then both sides have set a deadline; they need not agree, the later one holds
	if absent {
		base = &contents{}
	}
	changes := changed(base, ours)
	moved := !absent && !ours.deadline.Equal(base.deadline)
	if len(changes) == 0 && !moved && !absent {
		return theirs, nil
	}
	if m.isolation == Serializable {
		keys := changed(base, theirs)
		if !absent && !theirs.deadline.Equal(base.deadline) {
			keys = append(keys, DeadlineKey)
		}
		if len(keys) > 0 || absent {
			return nil, newConflictError(keys)
		}
	}

	merged := &contents{deadline: theirs.deadline, values: maps.Clone(theirs.values)}
	if merged.values == nil {
		merged.values = make(map[string]any, len(changes))
	}
	var clashes []clash
	for _, key := range changes {
		b, o, t := base.at(key), ours.at(key), theirs.at(key)
		if t.equal(b) {
			merged.set(key, o)
			continue
		}
		clashes = append(clashes, clash{
			Conflict{Key: key, Base: b.v, Ours: o.v, Theirs: t.v},
			func(v any) bool {
				merged.set(key, value{v, v != nil})
				return true
			},
		})
	}
	switch {
	case absent:
		if ours.deadline.After(theirs.deadline) {
			merged.deadline = ours.deadline
		}
	case moved && theirs.deadline.Equal(base.deadline):
		merged.deadline = ours.deadline
	case moved:
		clashes = append(clashes, clash{
			Conflict{Key: DeadlineKey, Base: base.deadline, Ours: ours.deadline, Theirs: theirs.deadline},
			func(v any) (ok bool) { merged.deadline, ok = v.(time.Time); return ok },
		})
	}
	return merged, m.resolve(clashes, merged)
}

// clash is a conflict and where its resolution goes. A session cannot be without a deadline, so that one
// refuses what is not a time.
type clash struct {
	Conflict
	settle func(v any) bool
}

// resolve lets the resolver decide the clashes.
func (m merger) resolve(clashes []clash, merged *contents) error {
	var undecided []string
	for _, c := range clashes {
		if m.resolver == nil {
			undecided = append(undecided, c.Key)
			continue
		}
		v, err := m.resolver(c.Conflict)
		if err != nil {
			return applicationError{err}
		}
		merged.raw = true
		if !c.settle(v) {
			undecided = append(undecided, c.Key)
		}
	}
	if len(undecided) > 0 {
		return newConflictError(undecided)
	}
	return nil
}

func newConflictError(keys []string) *ConflictError {
	slices.Sort(keys)
	return &ConflictError{Keys: keys}
}

// changed returns the keys that differ between base and side, sorted.
func changed(base, side *contents) []string {
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
