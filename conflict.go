package etcdstore

import "github.com/seed210be38d/etcdstore/internal/session"

// DeadlineKey is the Key of a Conflict, or of a ConflictError, that is about the session's deadline (its
// absolute lifetime, scs.SessionManager.SetDeadline) and not about a value. Base, Ours and Theirs are then of
// type time.Time. scs reserves keys that begin with two underscores in the same way.
const DeadlineKey = session.DeadlineKey

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

// merger returns what merges sessions as the options say.
func (o *options) merger() session.Merger {
	m := session.Merger{Serializable: o.isolation == Serializable}
	if o.resolver != nil {
		m.Resolve = func(c session.Clash) (any, error) { return o.resolver(Conflict(c)) }
	}
	return m
}
