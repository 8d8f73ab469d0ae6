package main

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// plainStore is a session store as one writes it in an afternoon: a commit puts, a find gets, and that is how scs's own
// store for etcd works too. It is here to lose the race against etcdstore, fairly: it does nothing wrong that a look at
// the interface of scs would show.
//
// What is wrong with it is between its calls. A request finds the session, changes one value, and puts all of them
// back, so it takes away what other requests have put in the meantime. It puts also when the session was deleted in
// the meantime, so a logout does not last. And each commit grants a lease: the put moves the session to the new one,
// and the old one stays in etcd without a key until it ends.
type plainStore struct {
	client *clientv3.Client
	prefix string
}

func (s *plainStore) FindCtx(ctx context.Context, token string) ([]byte, bool, error) {
	resp, err := s.client.Get(ctx, s.prefix+token)
	if err != nil || len(resp.Kvs) == 0 {
		return nil, false, err
	}
	return resp.Kvs[0].Value, true, nil
}

func (s *plainStore) CommitCtx(ctx context.Context, token string, b []byte, expiry time.Time) error {
	lease, err := s.client.Grant(ctx, int64(time.Until(expiry).Seconds()))
	if err != nil {
		return err
	}
	_, err = s.client.Put(ctx, s.prefix+token, string(b), clientv3.WithLease(lease.ID))
	return err
}

func (s *plainStore) DeleteCtx(ctx context.Context, token string) error {
	_, err := s.client.Delete(ctx, s.prefix+token)
	return err
}

// Find, Commit and Delete make a scs.Store of it. A session manager calls the methods with a context instead.

func (s *plainStore) Find(token string) ([]byte, bool, error) {
	return s.FindCtx(context.Background(), token)
}

func (s *plainStore) Commit(token string, b []byte, expiry time.Time) error {
	return s.CommitCtx(context.Background(), token, b, expiry)
}

func (s *plainStore) Delete(token string) error {
	return s.DeleteCtx(context.Background(), token)
}
