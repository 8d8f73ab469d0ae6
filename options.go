package etcdstore

import (
	"net/http"
	"time"

	"github.com/alexedwards/scs/v2"
)

// defaultTimeout bounds a call whose context has no earlier deadline.
const defaultTimeout = 5 * time.Second

// Isolation says which changes by others, between a request's read of a session and its commit,
// make that commit a conflict.
type Isolation int

const (
	// Snapshot lets a commit merge with what others changed, unless they changed the same key. It
	// permits write skew: two requests that each read what the other changes both succeed.
	Snapshot Isolation = iota
	// Serializable makes any change of the session's values by others a conflict.
	Serializable
)

// options are what the Option functions set. They do not change after New.
type options struct {
	codec     scs.Codec
	isolation Isolation
	resolver  Resolver
	touch     time.Duration
	timeout   time.Duration
	errorFunc func(http.ResponseWriter, *http.Request, error)
}

// An Option configures a store.
type Option func(*options)

func newOptions(opts []Option) options {
	o := options{codec: scs.GobCodec{}, timeout: defaultTimeout, errorFunc: ErrorFunc}
	for _, opt := range opts {
		if opt != nil {
			opt(&o)
		}
	}
	return o
}

// WithCodec sets the codec that the store decodes sessions with when it merges two of them. It must
// be the one of the scs.SessionManager. The default is scs.GobCodec, as in scs; a nil codec leaves
// it.
func WithCodec(codec scs.Codec) Option {
	return func(o *options) {
		if codec != nil {
			o.codec = codec
		}
	}
}

// WithIsolation sets the isolation level. The default is Snapshot.
func WithIsolation(level Isolation) Option {
	return func(o *options) { o.isolation = level }
}

// WithResolver sets the function that decides conflicts on a key. Without one they are ErrConflict.
func WithResolver(r Resolver) Option {
	return func(o *options) { o.resolver = r }
}

// WithTouchInterval makes the store skip commits that change no value and would move the session's
// expiry by less than d, as scs makes them on every request with an idle timeout. The session may
// then expire up to d before its idle timeout says, but no earlier than after half of it. The
// default, 0, writes every touch.
func WithTouchInterval(d time.Duration) Option {
	return func(o *options) { o.touch = max(d, 0) }
}

// WithTimeout bounds a call whose context has no earlier deadline. The default is five seconds; a
// duration that is not positive leaves it.
func WithTimeout(d time.Duration) Option {
	return func(o *options) {
		if d > 0 {
			o.timeout = d
		}
	}
}

// WithErrorFunc sets what Retry and Exclusive answer with, where they answer by themselves. The
// default, also for nil, is ErrorFunc. An application whose session manager has an ErrorFunc of its
// own gives it here as well; see [WillRetry].
func WithErrorFunc(f func(http.ResponseWriter, *http.Request, error)) Option {
	return func(o *options) {
		if f != nil {
			o.errorFunc = f
		}
	}
}
