package session

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The causes of a change that cannot be made, and of a stored session that cannot be read.
var (
	ErrConflict     = errors.New("etcdstore: conflict with a concurrent request")
	ErrGone         = errors.New("etcdstore: session is gone")
	ErrInvalidToken = errors.New("etcdstore: invalid session token")
	ErrBareExpiry   = errors.New("etcdstore: the expiry of a session of scs's own etcdstore is not known")

	ErrForeignKey = fmt.Errorf("%w: the key belongs to a store with another prefix", ErrInvalidToken)
	ErrFormat     = errors.New("etcdstore: session was stored in a format that this version cannot read")
	ErrCorrupt    = errors.New("etcdstore: stored session is damaged")

	errCodec = errors.New("etcdstore: the codec panicked, or ended its goroutine")
)

// ConflictError names the session keys that two requests changed. It is an ErrConflict.
type ConflictError struct {
	Keys []string // sorted; empty where the values could not be decoded, and so not be told apart
}

func newConflictError(keys []string) *ConflictError {
	slices.Sort(keys)
	return &ConflictError{Keys: keys}
}

func (e *ConflictError) Error() string {
	if len(e.Keys) == 0 {
		return ErrConflict.Error()
	}
	return ErrConflict.Error() + " on " + strings.Join(e.Keys, ", ")
}

// Is makes every ConflictError an ErrConflict.
func (e *ConflictError) Is(target error) bool { return target == ErrConflict }

// ApplicationError marks an error of the application's own code, which a call returns as it is.
type ApplicationError struct{ Err error }

func (e ApplicationError) Error() string { return e.Err.Error() }

// Unwrap returns the application's error.
func (e ApplicationError) Unwrap() error { return e.Err }
