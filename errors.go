package etcdstore

import (
	"errors"
	"fmt"
	"strings"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/session"
)

// What a commit can run into.
var (
	// ErrConflict says that another request changed the same part of the session first. Nothing was
	// written. The error is a *ConflictError where the keys are known.
	ErrConflict = session.ErrConflict

	// ErrSessionGone says that the session was deleted since the request read it, or has expired
	// and was removed. Nothing was written.
	ErrSessionGone = session.ErrGone

	// ErrOutcomeUnknown says that the write may or may not have happened, and that the store could
	// not find out in the time the call had. It wraps what ended the call, for example
	// context.DeadlineExceeded.
	ErrOutcomeUnknown = commit.ErrUnknown
)

// What is wrong with a call.
var (
	// ErrTooLarge says that the session exceeds what etcd takes in one request (1.5 MiB unless
	// configured otherwise). Nothing was written.
	ErrTooLarge = commit.ErrTooLarge

	// ErrInvalidToken says that a session cannot be stored under this token: it is empty, longer
	// than 512 bytes, begins with '~' or a byte above it, or names the session of a store with a
	// longer prefix.
	ErrInvalidToken = session.ErrInvalidToken

	// ErrClosed says that the store was closed.
	ErrClosed = errors.New("etcdstore: store is closed")
)

// ConflictError names the session keys that two concurrent requests both changed.
// errors.Is(err, ErrConflict) holds for it.
type ConflictError struct {
	Keys []string // sorted; empty where the values could not be decoded, and so not be told apart
}

func (e *ConflictError) Error() string { return (*session.ConflictError)(e).Error() }

// Is makes every ConflictError an ErrConflict.
func (e *ConflictError) Is(target error) bool { return (*session.ConflictError)(e).Is(target) }

// errLockLost is what a request of Exclusive gets whose lock is another's by now.
var errLockLost = fmt.Errorf("%w: the session's lock was lost", ErrConflict)

// callError is an error of a call as the API has it, said by its operation, unless it is the
// application's own. It keeps the chain below it.
func callError(op string, err error) error {
	var app session.ApplicationError
	var conflict *session.ConflictError
	switch {
	case errors.As(err, &app):
		return app.Err
	case errors.As(err, &conflict):
		return (*ConflictError)(conflict)
	case err == nil, strings.HasPrefix(err.Error(), "etcdstore: "):
		return err
	}
	return fmt.Errorf("etcdstore: %s: %w", op, err)
}
