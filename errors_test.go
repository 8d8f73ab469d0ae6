package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/session"
)

func TestConflictError(t *testing.T) {
	for _, tc := range []struct {
		keys []string
		want string
	}{
		{nil, "etcdstore: conflict with a concurrent request"},
		{[]string{"cart"}, "etcdstore: conflict with a concurrent request on cart"},
		{[]string{"cart", "user"}, "etcdstore: conflict with a concurrent request on cart, user"},
	} {
		var err error = &ConflictError{Keys: tc.keys}
		if err.Error() != tc.want {
			t.Errorf("Error = %q, want %q", err, tc.want)
		}
		for _, err := range []error{err, fmt.Errorf("wrapped: %w", err), fmt.Errorf("%w: %w", io.EOF, err), callError("commit", err), errors.Join(io.EOF, err)} {
			var conflict *ConflictError
			if !errors.As(err, &conflict) || len(conflict.Keys) != len(tc.keys) {
				t.Errorf("errors.As(%v) = %v", err, conflict)
			}
			if !errors.Is(err, ErrConflict) {
				t.Errorf("errors.Is(%v, ErrConflict) = false", err)
			}
			for _, other := range []error{ErrSessionGone, ErrOutcomeUnknown, ErrTooLarge, ErrInvalidToken, ErrClosed} {
				if errors.Is(err, other) {
					t.Errorf("errors.Is(%v, %v) = true", err, other)
				}
			}
		}
	}
}

// One cause has one sentinel.
func TestSentinels_AreDistinct(t *testing.T) {
	sentinels := []error{ErrConflict, ErrSessionGone, ErrOutcomeUnknown, ErrTooLarge, ErrInvalidToken, ErrClosed}
	for i, a := range sentinels {
		if !strings.HasPrefix(a.Error(), "etcdstore: ") {
			t.Errorf("%q does not say whose it is", a)
		}
		for j, b := range sentinels {
			if errors.Is(a, b) != (i == j) {
				t.Errorf("errors.Is(%v, %v) = %v", a, b, i != j)
			}
		}
	}
	if !errors.Is(errLockLost, ErrConflict) {
		t.Error("a lost lock is no conflict")
	}
	if err := callError("commit", session.ErrForeignKey); !errors.Is(err, ErrInvalidToken) {
		t.Error("another store's key is no invalid token")
	}
}

func TestCallError(t *testing.T) {
	own := errors.New("the cart is full")
	etcdDown := status.Error(codes.Unavailable, "connection refused")
	for _, tc := range []struct {
		name string
		err  error
		want string
		is   []error
	}{
		{"etcd's", rpctypes.ErrPermissionDenied, "etcdstore: commit: etcdserver: permission denied", []error{rpctypes.ErrPermissionDenied}},
		{"deadline", context.DeadlineExceeded, "etcdstore: commit: context deadline exceeded", []error{context.DeadlineExceeded}},
		{
			"ended call", etcd.Ended(context.DeadlineExceeded, etcdDown),
			"etcdstore: commit: context deadline exceeded (etcd: rpc error: code = Unavailable desc = connection refused)",
			[]error{context.DeadlineExceeded, etcdDown},
		},
		{
			"ended call, etcd said nothing else", etcd.Ended(context.DeadlineExceeded, fmt.Errorf("last: %w", context.DeadlineExceeded)),
			"etcdstore: commit: context deadline exceeded",
			[]error{context.DeadlineExceeded},
		},
		{
			"unknown outcome", commit.Unknown(etcd.Ended(context.Canceled, rpctypes.ErrTimeout)),
			"etcdstore: outcome unknown: context canceled (etcd: etcdserver: request timed out)",
			[]error{ErrOutcomeUnknown, context.Canceled, rpctypes.ErrTimeout},
		},
		{"unknown outcome without a cause", commit.Unknown(nil), "etcdstore: outcome unknown", []error{ErrOutcomeUnknown}},
		{"conflict", &ConflictError{Keys: []string{"a"}}, "etcdstore: conflict with a concurrent request on a", []error{ErrConflict}},
		{"lock lost", errLockLost, "etcdstore: conflict with a concurrent request: the session's lock was lost", []error{ErrConflict, errLockLost}},
		{"gone", ErrSessionGone, "etcdstore: session is gone", []error{ErrSessionGone}},
		{"twice", callError("find", io.EOF), "etcdstore: find: EOF", []error{io.EOF}},
		{"application's", session.ApplicationError{Err: own}, "the cart is full", []error{own}},
		{"application's, wrapped", fmt.Errorf("fold: %w", session.ApplicationError{Err: own}), "the cart is full", []error{own}},
	} {
		err := callError("commit", tc.err)
		if err == nil || err.Error() != tc.want {
			t.Errorf("%s: callError = %q, want %q", tc.name, err, tc.want)
		}
		for _, target := range tc.is {
			if !errors.Is(err, target) {
				t.Errorf("%s: the chain of %q lacks %v", tc.name, err, target)
			}
		}
	}
	if err := callError("commit", nil); err != nil {
		t.Errorf("callError of no error = %v", err)
	}
	if err := callError("commit", session.ApplicationError{Err: own}); err != own { //nolint:errorlint // as it is, not wrapped
		t.Errorf("an application's error became %#v", err)
	}
	if !errors.Is(session.ApplicationError{Err: own}, own) {
		t.Error("an application's error hides its cause")
	}
}

// All that a call returns says whose error it is, once.
func TestErrors_Prefix(t *testing.T) {
	causes := []error{
		ErrConflict, ErrSessionGone, ErrOutcomeUnknown, ErrTooLarge, ErrInvalidToken, ErrClosed,
		errLockLost, session.ErrForeignKey, session.ErrFormat, session.ErrCorrupt, session.ErrBareExpiry,
		&ConflictError{}, &ConflictError{Keys: []string{"a"}},
		context.Canceled, context.DeadlineExceeded, io.EOF, errors.New(""), errors.New("gob: type not registered"),
		status.Error(codes.Unavailable, "EOF"),
	}
	causes = append(causes, etcd.Classified()...)
	for _, cause := range causes {
		for _, err := range []error{cause, etcd.Ended(context.Canceled, cause), commit.Unknown(cause), commit.Unknown(etcd.Ended(context.DeadlineExceeded, cause))} {
			if said := callError("find", err).Error(); !strings.HasPrefix(said, "etcdstore: ") || strings.HasPrefix(said, "etcdstore: find: etcdstore: ") {
				t.Errorf("callError(%v) says %q", err, said)
			}
		}
	}
}

// What the store says by itself does not say that etcd is not there.
func TestErrors_AreNotUnavailable(t *testing.T) {
	for _, err := range []error{
		ErrTooLarge, &ConflictError{Keys: []string{"a"}}, ErrSessionGone, ErrClosed, session.ErrFormat, session.ErrCorrupt,
	} {
		if etcd.Unavailable(err) {
			t.Errorf("unavailable(%v)", err)
		}
	}
}
