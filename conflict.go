package etcdstore

import (
	"cmp"
	"maps"
	"reflect"
	"time"

	"github.com/seed210be38d/etcdstore/internal/session"
)

// DeadlineKey stands for the session's deadline (its absolute lifetime,
// scs.SessionManager.SetDeadline) among the keys of a ConflictError, under [Serializable]. Under
// [Snapshot] deadlines do not conflict: the later one holds. scs reserves keys that begin with two
// underscores in the same way.
const DeadlineKey = session.DeadlineKey

// A Conflict is one session key that two requests changed, each starting from Base. A field is nil
// where the key is absent.
type Conflict struct {
	Key    string
	Base   any // what this request read
	Ours   any // what this request wants to store
	Theirs any // what the session holds by now
}

// A Resolver decides a conflict: the value that it returns is stored, nil removes the key (also
// where a codec such as JSON knows a null), and an error fails the commit as it is. It is not asked
// under [Serializable], where the changes of others are conflicts as such. It must not change the
// values that it is given, nor call the store or the session manager, nor end its goroutine
// (runtime.Goexit); it is called from several goroutines at a time, and again when the commit is
// tried again.
type Resolver func(Conflict) (value any, err error)

// KeepOurs is a Resolver: the last writer wins.
func KeepOurs(c Conflict) (any, error) { return c.Ours, nil }

// KeepTheirs is a Resolver: the first writer wins, without an error for the second.
func KeepTheirs(c Conflict) (any, error) { return c.Theirs, nil }

// ByKey is a Resolver that lets each key have its own. For keys without one the conflict stands.
func ByKey(resolvers map[string]Resolver) Resolver {
	resolvers = maps.Clone(resolvers)
	return func(c Conflict) (any, error) {
		if r := resolvers[c.Key]; r != nil {
			return r(c)
		}
		return nil, c.stands()
	}
}

// stands is the error of a conflict that a resolver does not decide.
func (c Conflict) stands() error { return &ConflictError{Keys: []string{c.Key}} }

// Sum is a Resolver for counters: the base, and what either request has added to it or taken away.
// An absent number is zero. Where they are not numbers of one type, the conflict stands.
func Sum(c Conflict) (any, error) {
	base, ours, theirs, ok := sameType(c)
	switch {
	case !ok:
	case ours.CanInt():
		return number(ours, ours.Int()+theirs.Int()-base.Int()), nil
	case ours.CanUint():
		return number(ours, ours.Uint()+theirs.Uint()-base.Uint()), nil
	case ours.CanFloat():
		return number(ours, ours.Float()+theirs.Float()-base.Float()), nil
	}
	return nil, c.stands()
}

// number returns n as a number of like's type.
func number[N int64 | uint64 | float64](like reflect.Value, n N) any {
	return reflect.ValueOf(n).Convert(like.Type()).Interface()
}

// Latest is a Resolver for what only grows, such as the time when a user was last seen: the greater
// of two times, numbers or strings. One that is absent is the lesser. Where they are not of one
// such type, the conflict stands.
func Latest(c Conflict) (any, error) {
	switch {
	case c.Ours == nil:
		return c.Theirs, nil
	case c.Theirs == nil:
		return c.Ours, nil
	}
	if ours, ok := c.Ours.(time.Time); ok {
		if theirs, ok := c.Theirs.(time.Time); ok {
			return greater(c, ours.Compare(theirs)), nil
		}
		return nil, c.stands()
	}
	ours, theirs := reflect.ValueOf(c.Ours), reflect.ValueOf(c.Theirs)
	switch {
	case ours.Type() != theirs.Type():
	case ours.CanInt():
		return greater(c, cmp.Compare(ours.Int(), theirs.Int())), nil
	case ours.CanUint():
		return greater(c, cmp.Compare(ours.Uint(), theirs.Uint())), nil
	case ours.CanFloat():
		return greater(c, cmp.Compare(ours.Float(), theirs.Float())), nil
	case ours.Kind() == reflect.String:
		return greater(c, cmp.Compare(ours.String(), theirs.String())), nil
	}
	return nil, c.stands()
}

// greater returns the greater side of a conflict, whose order is that of ours to theirs.
func greater(c Conflict, order int) any {
	if order > 0 {
		return c.Ours
	}
	return c.Theirs
}

// Union is a Resolver for slices that are sets, such as of flash messages or of items seen: what
// either request has added, without what either has removed. An absent slice is empty. Where they
// are not slices of one type, the conflict stands.
func Union(c Conflict) (any, error) {
	base, ours, theirs, ok := sameType(c)
	if !ok || ours.Kind() != reflect.Slice {
		return nil, c.stands()
	}
	union := reflect.MakeSlice(ours.Type(), 0, ours.Len()+theirs.Len())
	for _, side := range []struct{ of, other reflect.Value }{{theirs, ours}, {ours, theirs}} {
		for i := range side.of.Len() {
			v := side.of.Index(i)
			removed := contains(base, v) && !contains(side.other, v)
			if !removed && !contains(union, v) {
				union = reflect.Append(union, v)
			}
		}
	}
	return union.Interface(), nil
}

// contains reports whether a slice holds v.
func contains(s, v reflect.Value) bool {
	for i := range s.Len() {
		if reflect.DeepEqual(s.Index(i).Interface(), v.Interface()) {
			return true
		}
	}
	return false
}

// sameType returns the three sides of a conflict, zero values for what is absent, if they are of
// one type.
func sameType(c Conflict) (base, ours, theirs reflect.Value, ok bool) {
	var t reflect.Type
	for _, v := range []any{c.Base, c.Ours, c.Theirs} {
		switch {
		case v == nil:
		case t == nil:
			t = reflect.TypeOf(v)
		case t != reflect.TypeOf(v):
			return base, ours, theirs, false
		}
	}
	if t == nil {
		return base, ours, theirs, false
	}
	side := func(v any) reflect.Value {
		if v == nil {
			return reflect.Zero(t)
		}
		return reflect.ValueOf(v)
	}
	return side(c.Base), side(c.Ours), side(c.Theirs), true
}

// merger returns what merges sessions as the options say.
func (o *options) merger() session.Merger {
	m := session.Merger{Serializable: o.isolation == Serializable}
	if o.resolver != nil {
		m.Resolve = func(c session.Clash) (any, error) { return o.resolver(Conflict(c)) }
	}
	return m
}
