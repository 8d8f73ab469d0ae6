package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// endedContext returns a context whose deadline has passed.
func endedContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	t.Cleanup(cancel)
	return ctx
}

func TestClassify_Server(t *testing.T) {
	cases := []struct {
		grpc error // as the server sends it
		want class
	}{
		{rpctypes.ErrGRPCTooManyOps, classTooManyOps},
		{rpctypes.ErrGRPCDuplicateKey, classRejected},
		{rpctypes.ErrGRPCKeyNotFound, classRejected},
		{rpctypes.ErrGRPCEmptyKey, classRejected},
		{rpctypes.ErrGRPCPermissionDenied, classRejected},
		{rpctypes.ErrGRPCPermissionNotGranted, classRejected},
		{rpctypes.ErrGRPCUserEmpty, classRejected},
		{rpctypes.ErrGRPCAuthFailed, classRejected},
		{rpctypes.ErrGRPCInvalidAuthToken, classRejected},
		{rpctypes.ErrGRPCAuthOldRevision, classTransient},
		{rpctypes.ErrGRPCRequestTooManyRequests, classTransient},
		{rpctypes.ErrGRPCNoLeader, classTransient},
		{rpctypes.ErrGRPCRequestTooLarge, classTooLarge},
		{rpctypes.ErrGRPCLeaseNotFound, classLeaseLost},
		{rpctypes.ErrGRPCCompacted, classCompacted},
		{rpctypes.ErrGRPCNoSpace, classNoSpace},
	}
	if len(cases) != len(classes) {
		t.Errorf("%d cases for %d rows of classes", len(cases), len(classes))
	}
	covered := make(map[error]bool)
	for _, tc := range cases {
		covered[rpctypes.Error(tc.grpc)] = true
		t.Run(rpctypes.ErrorDesc(tc.grpc), func(t *testing.T) {
			received := status.Error(status.Code(tc.grpc), status.Convert(tc.grpc).Message()) // the same, off the wire
			for form, err := range map[string]error{
				"the client's":                rpctypes.Error(tc.grpc),
				"received":                    rpctypes.Error(received),
				"through the client":          clientv3.ContextError(t.Context(), received),
				"after the end of the call":   clientv3.ContextError(endedContext(t), received),
				"wrapped":                     fmt.Errorf("etcd: %w", rpctypes.Error(tc.grpc)),
				"with the context's":          fmt.Errorf("%w: %w", context.DeadlineExceeded, rpctypes.Error(tc.grpc)),
				"an error of a call":          callError("commit", rpctypes.Error(tc.grpc)),
				"what was last before it end": endedError(context.DeadlineExceeded, rpctypes.Error(tc.grpc)),
			} {
				if got := classify(err); got != tc.want {
					t.Errorf("%s: classify(%v) = %d, want %d", form, err, got, tc.want)
				}
			}
		})
	}
	for _, row := range classes {
		if !covered[row.err] {
			t.Errorf("no case for %v", row.err)
		}
	}
}

func TestClassify_Client(t *testing.T) {
	live := t.Context()
	for _, tc := range []struct {
		name string
		err  error
		want class
	}{
		{"none", nil, classUnknown},
		{"leader stopped", status.Error(codes.Unavailable, "error reading from server: EOF"), classUnknown},
		{"connection closed", status.Error(codes.Unavailable, "transport is closing"), classUnknown},
		{"connection refused", status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: connection refused"`), classUnknown},
		{"time-out", rpctypes.ErrTimeout, classUnknown},
		{"time-out, leader failed", rpctypes.ErrTimeoutDueToLeaderFail, classUnknown},
		{"time-out, connection lost", rpctypes.ErrTimeoutDueToConnectionLost, classUnknown},
		{"leader changed", rpctypes.ErrLeaderChanged, classUnknown},
		{"server stopped", rpctypes.ErrStopped, classUnknown},
		{"not leader", rpctypes.ErrNotLeader, classUnknown},
		{"unhealthy", rpctypes.ErrUnhealthy, classUnknown},
		{"corrupt", rpctypes.ErrCorrupt, classUnknown},
		{"proposal dropped", status.Error(codes.Unknown, "etcdserver: raft proposal dropped"), classUnknown},
		{"deadline", context.DeadlineExceeded, classUnknown},
		{"cancelled", context.Canceled, classUnknown},
		{"deadline of gRPC", status.Error(codes.DeadlineExceeded, "context deadline exceeded"), classUnknown},
		{"server's deadline", rpctypes.ErrGRPCDeadlineExceeded, classUnknown},
		{"server cancelled", rpctypes.ErrGRPCCanceled, classUnknown},
		{"EOF", io.EOF, classUnknown},
		{"no status", errors.New("etcdserver: request is too large"), classUnknown},
		{"the client's limit", status.Error(codes.ResourceExhausted, "trying to send message larger than max (3145738 vs. 2097152)"), classTooLarge},
		{"the client's limit on answers", status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)"), classUnknown},
		{"the words alone", status.Error(codes.Unknown, "trying to send message larger than max (5 vs. 4)"), classUnknown},
		{"the words alone, no status", errors.New("trying to send message larger than max (5 vs. 4)"), classUnknown},
	} {
		for form, err := range map[string]error{"as it is": tc.err, "through the client": clientv3.ContextError(live, tc.err)} {
			if form == "through the client" && tc.name == "no status" {
				continue // the client goes by the words
			}
			if got := classify(err); got != tc.want {
				t.Errorf("%s, %s: classify(%v) = %d, want %d", tc.name, form, err, got, tc.want)
			}
			if err == nil {
				continue
			}
			if wrapped := fmt.Errorf("etcd: %w", err); classify(wrapped) != tc.want {
				t.Errorf("%s, %s: classify(%v) = %d, want %d", tc.name, form, wrapped, classify(wrapped), tc.want)
			}
		}
	}
}

// An error that nobody foresaw must never pass for an answer.
func TestClass_ZeroIsUnknown(t *testing.T) {
	var zero class
	if zero != classUnknown {
		t.Errorf("the zero class is %d", zero)
	}
}

func TestUnavailable(t *testing.T) {
	for _, tc := range []struct {
		name string
		err  error
		want bool
	}{
		{"none", nil, false},
		{"no leader", rpctypes.ErrNoLeader, true},
		{"time-out", rpctypes.ErrTimeout, true},
		{"leader changed", rpctypes.ErrLeaderChanged, true},
		{"server stopped", rpctypes.ErrStopped, true},
		{"too many requests", rpctypes.ErrTooManyRequests, true},
		{"old revision of users", rpctypes.ErrAuthOldRevision, true},
		{"deadline", context.DeadlineExceeded, true},
		{"connection refused", status.Error(codes.Unavailable, "connection refused"), true},
		{"connection closed", clientv3.ContextError(t.Context(), status.Error(codes.Unavailable, "transport is closing")), true},
		{"ended call", callError("find", endedError(context.DeadlineExceeded, status.Error(codes.Unavailable, "connection refused"))), true},
		{"wrapped", fmt.Errorf("login: %w", callError("find", rpctypes.ErrTimeout)), true},
		{"permission denied", rpctypes.ErrPermissionDenied, false},
		{"out of space", rpctypes.ErrNoSpace, false},
		{"too large", ErrTooLarge, false},
		{"conflict", &ConflictError{Keys: []string{"a"}}, false},
		{"gone", ErrSessionGone, false},
		{"closed", ErrClosed, false},
		{"format", errFormat, false},
		{"damaged", errCorrupt, false},
		{"application's", errors.New("unavailable"), false},
	} {
		if got := unavailable(tc.err); got != tc.want {
			t.Errorf("%s: unavailable(%v) = %v", tc.name, tc.err, got)
		}
	}
}

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
	if keys := newConflictError([]string{"b", "a"}).Keys; keys[0] != "a" {
		t.Errorf("keys = %q, want them sorted", keys)
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
	if !errors.Is(errForeignKey, ErrInvalidToken) {
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
			"ended call", endedError(context.DeadlineExceeded, etcdDown),
			"etcdstore: commit: context deadline exceeded (etcd: rpc error: code = Unavailable desc = connection refused)",
			[]error{context.DeadlineExceeded, etcdDown},
		},
		{
			"ended call, etcd said nothing else", endedError(context.DeadlineExceeded, fmt.Errorf("last: %w", context.DeadlineExceeded)),
			"etcdstore: commit: context deadline exceeded",
			[]error{context.DeadlineExceeded},
		},
		{
			"unknown outcome", unknownError(endedError(context.Canceled, rpctypes.ErrTimeout)),
			"etcdstore: outcome unknown: context canceled (etcd: etcdserver: request timed out)",
			[]error{ErrOutcomeUnknown, context.Canceled, rpctypes.ErrTimeout},
		},
		{"unknown outcome without a cause", unknownError(nil), "etcdstore: outcome unknown", []error{ErrOutcomeUnknown}},
		{"conflict", &ConflictError{Keys: []string{"a"}}, "etcdstore: conflict with a concurrent request on a", []error{ErrConflict}},
		{"lock lost", errLockLost, "etcdstore: conflict with a concurrent request: the session's lock was lost", []error{ErrConflict, errLockLost}},
		{"gone", ErrSessionGone, "etcdstore: session is gone", []error{ErrSessionGone}},
		{"twice", callError("find", io.EOF), "etcdstore: find: EOF", []error{io.EOF}},
		{"application's", applicationError{own}, "the cart is full", []error{own}},
		{"application's, wrapped", fmt.Errorf("fold: %w", applicationError{own}), "the cart is full", []error{own}},
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
	if err := callError("commit", applicationError{own}); err != own { //nolint:errorlint // as it is, not wrapped
		t.Errorf("an application's error became %#v", err)
	}
	if !errors.Is(applicationError{own}, own) {
		t.Error("an application's error hides its cause")
	}
}

// All that a call returns says whose error it is, once.
func TestErrors_Prefix(t *testing.T) {
	causes := []error{
		ErrConflict, ErrSessionGone, ErrOutcomeUnknown, ErrTooLarge, ErrInvalidToken, ErrClosed,
		errLockLost, errForeignKey, errFormat, errCorrupt, errAbandoned, errBareExpiry,
		&ConflictError{}, &ConflictError{Keys: []string{"a"}},
		context.Canceled, context.DeadlineExceeded, io.EOF, errors.New(""), errors.New("gob: type not registered"),
		status.Error(codes.Unavailable, "EOF"),
	}
	for _, row := range classes {
		causes = append(causes, row.err)
	}
	for _, cause := range causes {
		for _, err := range []error{cause, endedError(context.Canceled, cause), unknownError(cause), unknownError(endedError(context.DeadlineExceeded, cause))} {
			if said := callError("find", err).Error(); !strings.HasPrefix(said, "etcdstore: ") || strings.HasPrefix(said, "etcdstore: find: etcdstore: ") {
				t.Errorf("callError(%v) says %q", err, said)
			}
		}
	}
}
