package etcd

import (
	"context"
	"errors"
	"fmt"
	"io"
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
		want Class
	}{
		{rpctypes.ErrGRPCTooManyOps, TooManyOps},
		{rpctypes.ErrGRPCDuplicateKey, Rejected},
		{rpctypes.ErrGRPCKeyNotFound, Rejected},
		{rpctypes.ErrGRPCEmptyKey, Rejected},
		{rpctypes.ErrGRPCPermissionDenied, Rejected},
		{rpctypes.ErrGRPCPermissionNotGranted, Rejected},
		{rpctypes.ErrGRPCUserEmpty, Rejected},
		{rpctypes.ErrGRPCAuthFailed, Rejected},
		{rpctypes.ErrGRPCInvalidAuthToken, Rejected},
		{rpctypes.ErrGRPCAuthOldRevision, Transient},
		{rpctypes.ErrGRPCRequestTooManyRequests, Transient},
		{rpctypes.ErrGRPCNoLeader, Transient},
		{rpctypes.ErrGRPCRequestTooLarge, TooLarge},
		{rpctypes.ErrGRPCLeaseNotFound, LeaseLost},
		{rpctypes.ErrGRPCCompacted, Compacted},
		{rpctypes.ErrGRPCNoSpace, NoSpace},
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
				"an error of a call":          fmt.Errorf("etcdstore: commit: %w", rpctypes.Error(tc.grpc)),
				"what was last before it end": Ended(context.DeadlineExceeded, rpctypes.Error(tc.grpc)),
			} {
				if got := Classify(err); got != tc.want {
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
		want Class
	}{
		{"none", nil, Unknown},
		{"leader stopped", status.Error(codes.Unavailable, "error reading from server: EOF"), Unknown},
		{"connection closed", status.Error(codes.Unavailable, "transport is closing"), Unknown},
		{"connection refused", status.Error(codes.Unavailable, `connection error: desc = "transport: Error while dialing: connection refused"`), Unknown},
		{"time-out", rpctypes.ErrTimeout, Unknown},
		{"time-out, leader failed", rpctypes.ErrTimeoutDueToLeaderFail, Unknown},
		{"time-out, connection lost", rpctypes.ErrTimeoutDueToConnectionLost, Unknown},
		{"leader changed", rpctypes.ErrLeaderChanged, Unknown},
		{"server stopped", rpctypes.ErrStopped, Unknown},
		{"not leader", rpctypes.ErrNotLeader, Unknown},
		{"unhealthy", rpctypes.ErrUnhealthy, Unknown},
		{"corrupt", rpctypes.ErrCorrupt, Unknown},
		{"proposal dropped", status.Error(codes.Unknown, "etcdserver: raft proposal dropped"), Unknown},
		{"deadline", context.DeadlineExceeded, Unknown},
		{"cancelled", context.Canceled, Unknown},
		{"deadline of gRPC", status.Error(codes.DeadlineExceeded, "context deadline exceeded"), Unknown},
		{"server's deadline", rpctypes.ErrGRPCDeadlineExceeded, Unknown},
		{"server cancelled", rpctypes.ErrGRPCCanceled, Unknown},
		{"EOF", io.EOF, Unknown},
		{"no status", errors.New("etcdserver: request is too large"), Unknown},
		{"the client's limit", status.Error(codes.ResourceExhausted, "trying to send message larger than max (3145738 vs. 2097152)"), TooLarge},
		{"the client's limit on answers", status.Error(codes.ResourceExhausted, "grpc: received message larger than max (5 vs. 4)"), Unknown},
		{"the words alone", status.Error(codes.Unknown, "trying to send message larger than max (5 vs. 4)"), Unknown},
		{"the words alone, no status", errors.New("trying to send message larger than max (5 vs. 4)"), Unknown},
	} {
		for form, err := range map[string]error{"as it is": tc.err, "through the client": clientv3.ContextError(live, tc.err)} {
			if form == "through the client" && tc.name == "no status" {
				continue // the client goes by the words
			}
			if got := Classify(err); got != tc.want {
				t.Errorf("%s, %s: classify(%v) = %d, want %d", tc.name, form, err, got, tc.want)
			}
			if err == nil {
				continue
			}
			if wrapped := fmt.Errorf("etcd: %w", err); Classify(wrapped) != tc.want {
				t.Errorf("%s, %s: classify(%v) = %d, want %d", tc.name, form, wrapped, Classify(wrapped), tc.want)
			}
		}
	}
}

// An error that nobody foresaw must never pass for an answer.
func TestClass_ZeroIsUnknown(t *testing.T) {
	var zero Class
	if zero != Unknown {
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
		{"ended call", fmt.Errorf("etcdstore: find: %w", Ended(context.DeadlineExceeded, status.Error(codes.Unavailable, "connection refused"))), true},
		{"wrapped", fmt.Errorf("login: %w", fmt.Errorf("etcdstore: find: %w", rpctypes.ErrTimeout)), true},
		{"permission denied", rpctypes.ErrPermissionDenied, false},
		{"out of space", rpctypes.ErrNoSpace, false},
		{"application's", errors.New("unavailable"), false},
	} {
		if got := Unavailable(tc.err); got != tc.want {
			t.Errorf("%s: unavailable(%v) = %v", tc.name, tc.err, got)
		}
	}
}
