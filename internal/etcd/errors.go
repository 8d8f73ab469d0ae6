package etcd

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

// Class says what is known after etcd, or the way to it, answered a request with an error.
type Class int

const (
	// Unknown says that the request may have been applied, or may still be. The zero value, so that
	// an error that nobody foresaw is never taken for an answer.
	Unknown Class = iota
	// Rejected says that nothing was applied, and sending the same again gives the same.
	Rejected
	// Transient says that nothing was applied, and sending the same again may succeed.
	Transient
	// TooLarge says that nothing was applied, the request exceeds etcd's limit on bytes.
	TooLarge
	// TooManyOps says that nothing was applied, the request exceeds etcd's limit on operations.
	TooManyOps
	// LeaseLost says that nothing was applied, a lease that the request names does not exist.
	LeaseLost
	// Compacted says that nothing was applied, the revision that was to be read is compacted.
	Compacted
	// NoSpace says that a write was refused for want of space, or, where the quota was crossed by
	// this very request, applied (server/etcdserver/apply, applierV3 with quota). The answer proves
	// that the request is not under way any more, so a read settles it, and for a create the
	// history.
	NoSpace
)

// classes lists the errors that say more than 'unknown'. The file that proves each is in etcd's
// server, version 3.7: api/v3rpc/key.go checks a request before it is proposed; txn/txn.go checks a
// Txn whole before its first effect; apply/auth.go checks permissions before that.
var classes = []struct {
	err   error
	class Class
}{
	{rpctypes.ErrTooManyOps, TooManyOps},
	{rpctypes.ErrDuplicateKey, Rejected},
	{rpctypes.ErrKeyNotFound, Rejected},
	{rpctypes.ErrEmptyKey, Rejected},
	{rpctypes.ErrPermissionDenied, Rejected},
	{rpctypes.ErrPermissionNotGranted, Rejected},
	{rpctypes.ErrUserEmpty, Rejected},
	{rpctypes.ErrAuthFailed, Rejected},
	{rpctypes.ErrInvalidAuthToken, Rejected},
	{rpctypes.ErrAuthOldRevision, Transient},
	{rpctypes.ErrTooManyRequests, Transient},
	{rpctypes.ErrNoLeader, Transient},
	{rpctypes.ErrRequestTooLarge, TooLarge},
	{rpctypes.ErrLeaseNotFound, LeaseLost},
	{rpctypes.ErrCompacted, Compacted},
	{rpctypes.ErrNoSpace, NoSpace},
}

// Classified returns the errors that Classify tells more of than that the outcome is unknown.
func Classified() []error {
	errs := make([]error, len(classes))
	for i, c := range classes {
		errs[i] = c.err
	}
	return errs
}

// Classify tells what is known after err.
func Classify(err error) Class {
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.class
		}
	}
	// The client refuses to send what exceeds its own limit.
	if status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "trying to send message larger than max") {
		return TooLarge
	}
	return Unknown
}

// Unavailable reports whether err says that etcd, or the time to ask it, was not there.
func Unavailable(err error) bool {
	var etcdErr rpctypes.EtcdError
	switch {
	case errors.As(err, &etcdErr):
		return etcdErr.Code() == codes.Unavailable || etcdErr.Code() == codes.DeadlineExceeded || Classify(etcdErr) == Transient
	case errors.Is(err, context.DeadlineExceeded):
		return true
	}
	return clientv3.IsConnCanceled(err) || status.Code(err) == codes.Unavailable
}

// Ended is the error of a call that its context, or its time, ended. last is what etcd said last,
// if it said anything: without it 'deadline exceeded' would hide that, say, nothing listens on
// etcd's port.
func Ended(ended, last error) error {
	if last == nil || errors.Is(last, ended) {
		return ended
	}
	return fmt.Errorf("%w (etcd: %w)", ended, last)
}
