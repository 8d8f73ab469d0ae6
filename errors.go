package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
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

// class says what is known after etcd, or the way to it, answered a request with an error.
type class int

const (
	// classUnknown: the request may have been applied, or may still be. The zero value, so that an error
	// that nobody foresaw is never taken for an answer.
	classUnknown class = iota
	// classRejected: nothing was applied, and sending the same again gives the same.
	classRejected
	// classTransient: nothing was applied, and sending the same again may succeed.
	classTransient
	// classTooLarge: nothing was applied, the request exceeds etcd's limit on bytes.
	classTooLarge
	// classTooManyOps: nothing was applied, the request exceeds etcd's limit on operations.
	classTooManyOps
	// classLeaseLost: nothing was applied, a lease that the request names does not exist.
	classLeaseLost
	// classCompacted: nothing was applied, the revision that was to be read is compacted.
	classCompacted
	// classNoSpace: a write was refused for want of space, or, where the quota was crossed by this very
	// request, applied (server/etcdserver/apply, applierV3 with quota). The answer proves that the request is
	// not under way any more, so a read settles it, and for a create the history.
	classNoSpace
)

// classes lists the errors that say more than 'unknown'. The file that proves each is in etcd's server,
// version 3.7: api/v3rpc/key.go checks a request before it is proposed; txn/txn.go checks a Txn whole before
// its first effect; apply/auth.go checks permissions before that.
var classes = []struct {
	err   error
	class class
}{
	{rpctypes.ErrTooManyOps, classTooManyOps},
	{rpctypes.ErrDuplicateKey, classRejected},
	{rpctypes.ErrKeyNotFound, classRejected},
	{rpctypes.ErrEmptyKey, classRejected},
	{rpctypes.ErrPermissionDenied, classRejected},
	{rpctypes.ErrPermissionNotGranted, classRejected},
	{rpctypes.ErrUserEmpty, classRejected},
	{rpctypes.ErrAuthFailed, classRejected},
	{rpctypes.ErrInvalidAuthToken, classRejected},
	{rpctypes.ErrAuthOldRevision, classTransient},
	{rpctypes.ErrTooManyRequests, classTransient},
	{rpctypes.ErrNoLeader, classTransient},
	{rpctypes.ErrRequestTooLarge, classTooLarge},
	{rpctypes.ErrLeaseNotFound, classLeaseLost},
	{rpctypes.ErrCompacted, classCompacted},
	{rpctypes.ErrNoSpace, classNoSpace},
}

// classify tells what is known after err.
func classify(err error) class {
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.class
		}
	}
	// The client refuses to send what exceeds its own limit.
	if status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "trying to send message larger than max") {
		return classTooLarge
	}
	return classUnknown
}

// unavailable reports whether err says that etcd, or the time to ask it, was not there.
func unavailable(err error) bool {
	var etcdErr rpctypes.EtcdError
	switch {
	case errors.As(err, &etcdErr):
		return etcdErr.Code() == codes.Unavailable || etcdErr.Code() == codes.DeadlineExceeded || classify(etcdErr) == classTransient
	case errors.Is(err, context.DeadlineExceeded):
		return true
	}
	return clientv3.IsConnCanceled(err) || status.Code(err) == codes.Unavailable
}

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

// endedError is what a call returns that its context, or its time, ended. last is what etcd said last, if it
// said anything: without it 'deadline exceeded' would hide that, say, nothing listens on etcd's port.
func endedError(ended, last error) error {
	if last == nil || errors.Is(last, ended) {
		return ended
	}
	return fmt.Errorf("%w (etcd: %w)", ended, last)
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
