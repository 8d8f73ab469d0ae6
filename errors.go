package etcdstore

import (
	"errors"
	"fmt"
	"strings"
)

// What a commit can run into.
var (
	// ErrConflict says that another request changed the same part of the session first. Nothing was written.
	// The error is a *ConflictError where the keys are known.
	ErrConflict = errors.New("etcdstore: conflict with a concurrent request")

	// ErrSessionGone says that the session was deleted, or has expired, since the request read it.
	// Nothing was written.
	ErrSessionGone = errors.New("etcdstore: session is gone")

	// ErrOutcomeUnknown says that the write may or may not have happened, and that the store could not find
	// out in the time the call had. It wraps what ended the call, for example context.DeadlineExceeded.
	ErrOutcomeUnknown = errors.New("etcdstore: outcome unknown")
)

// What is wrong with a call.
var (
	// ErrTooLarge says that the session exceeds what etcd takes in one request (1.5 MiB unless configured
	// otherwise). Nothing was written.
	ErrTooLarge = errors.New("etcdstore: session is too large")

	// ErrInvalidToken says that a session cannot be stored under this token: it is empty, longer than 512
	// bytes, begins with '~' or a byte above it, or names the session of a store with a longer prefix.
	ErrInvalidToken = errors.New("etcdstore: invalid session token")

	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("etcdstore: store is closed")
)

// ConflictError names the session keys that two concurrent requests both changed.
// errors.Is(err, ErrConflict) holds for it.
type ConflictError struct {
	Keys []string // sorted; empty where the values could not be decoded, and so not be told apart
}

func (e *ConflictError) Error() string {
	if len(e.Keys) == 0 {
		return ErrConflict.Error()
	}
	return ErrConflict.Error() + " on " + strings.Join(e.Keys, ", ")
}

// Is makes every ConflictError an ErrConflict.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// Causes that only this package tells apart.
var (
	errLockLost   = fmt.Errorf("%w: the session's lock was lost", ErrConflict)
	errForeignKey = fmt.Errorf("%w: the key belongs to a store with another prefix", ErrInvalidToken)
	errFormat     = errors.New("etcdstore: session was stored in a format that this version cannot read")
	errCorrupt    = errors.New("etcdstore: stored session is damaged")
	errCodec      = errors.New("etcdstore: the codec panicked")
	errAbandoned  = errors.New("etcdstore: call was abandoned")
	errBareExpiry = errors.New("etcdstore: the expiry of a session of scs's own etcdstore is not known")
)

// applicationError marks an error of the application's own code, which a call returns as it is.
type applicationError struct{ error }

func (e applicationError) Unwrap() error { return e.error }

// callError is an error of a call, said by its operation. It keeps the chain below it.
func callError(op string, err error) error {
	var app applicationError
	if errors.As(err, &app) {
		return app.error
	}
	if err == nil || strings.HasPrefix(err.Error(), "etcdstore: ") {
		return err
	}
	return fmt.Errorf("etcdstore: %s: %w", op, err)
}

// unknownError is an ErrOutcomeUnknown with its cause.
func unknownError(cause error) error {
	switch {
	case cause == nil:
		return ErrOutcomeUnknown
	case errors.Is(cause, ErrOutcomeUnknown):
		return cause
	}
	return fmt.Errorf("%w: %w", ErrOutcomeUnknown, cause)
}
