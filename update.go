package etcdstore

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/commit"
	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
	"github.com/seed210be38d/etcdstore/internal/session"
)

// Update reads a session, runs fn on its values, and commits what fn left in the map. Where others
// commit in between, fn runs again on what they left; so it should do nothing but change the map,
// soon, and in the same way each time. It never runs after Update has returned. The session's
// expiry and deadline stay as they are, and where fn changes nothing, nothing is written.
//
// fn runs on a goroutine of the store. A panic of it reaches Update's caller, and where it ends its
// goroutine (runtime.Goexit, as testing.T.FailNow does), the Update fails.
//
// An error of fn aborts, and Update returns it as it is. Where there is no such session, or it goes
// meanwhile, the error is ErrSessionGone. Update stands outside of a transaction in ctx: the read
// set does not change. But a run of Retry that has updated a session has written, and is not
// repeated.
func (e *EtcdStore) Update(ctx context.Context, token string, fn func(values map[string]any) error) error {
	if !validToken(token) {
		return ErrSessionGone
	}
	return e.call(ctx, "update", func(deadline time.Time) error {
		for {
			read, err := e.reader.Find(ctx, deadline, e.prefix+token)
			if err != nil {
				return err
			}
			if err := read.Unreadable(); err != nil {
				return err
			}
			hint, err := e.withExpiry(ctx, deadline, read)
			if err != nil {
				return err
			}
			_, err = e.pipeline.Do(ctx, deadline, commit.Call{
				Key: e.prefix + token, Change: &session.Update{Fn: fn}, Hint: hint, Attended: true,
			})
			if err == nil {
				explicit(ctx).wroteSomething(true)
			}
			if !errors.Is(err, session.ErrBareExpiry) {
				return err
			}
		}
	})
}

// withExpiry completes a session of scs's own etcdstore, whose expiry only its lease knows.
func (e *EtcdStore) withExpiry(ctx context.Context, deadline time.Time, v *record.Version) (*record.Version, error) {
	if v.Rev == 0 || v.Value.Expiry() != 0 {
		return v, nil
	}
	expiry := record.Forever
	if v.Lease != 0 {
		ctx, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		err := etcd.Retry(ctx, func(ctx context.Context) error {
			resp, err := e.etcd.TimeToLive(ctx, v.Lease)
			if err == nil {
				expiry = e.clock.Now().Plus(time.Duration(resp.TTL) * time.Second)
			}
			return clientv3.ContextError(ctx, err)
		})
		if err != nil {
			return nil, err
		}
	}
	return e.decoder.WithExpiry(v, expiry)
}
