package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
)

const (
	scaleCallers = 256
	scaleMembers = 1
	nameBare     = "sessions without leases"
)

// scale loads many sessions and measures what they cost etcd: leases, and memory.
func (b *bench) scale(ctx context.Context) error {
	for _, con := range []struct {
		name string
		load func(ctx context.Context, c *cluster, value []byte) error
	}{
		{nameBare, b.loadBare},
		{nameGrant, func(ctx context.Context, c *cluster, value []byte) error {
			s, err := openGrant(c)
			return b.loadStore(ctx, s, err, value)
		}},
		{nameOurs, func(ctx context.Context, c *cluster, value []byte) error {
			s, err := openOurs(c)
			return b.loadStore(ctx, s, err, value)
		}},
	} {
		if err := b.scaleOne(ctx, con.name, con.load); err != nil {
			return fmt.Errorf("load %d sessions, %s: %w", b.sessions, con.name, err)
		}
	}
	return nil
}

func (b *bench) scaleOne(ctx context.Context, name string, load func(context.Context, *cluster, []byte) error) (err error) {
	value, err := newValue(b.values[0])
	if err != nil {
		return err
	}
	c, err := startCluster(b.dir, scaleMembers, defaultElection)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	start, cpu := time.Now(), clientCPU()
	if err := load(ctx, c, value); err != nil {
		return err
	}
	s := sample{calls: b.sessions, elapsed: time.Since(start), cpu: clientCPU() - cpu}
	at := cell{Part: partScale, What: fmt.Sprintf("load %d sessions", b.sessions), Members: scaleMembers, Value: len(value)}
	m := newMeasurement(at, name, 0, &s)
	if m.Resident, m.Heap, err = c.memory(); err != nil {
		return err
	}
	cli, err := c.client()
	if err != nil {
		return err
	}
	defer cli.Close()
	leases, err := cli.Leases(ctx)
	if err != nil {
		return err
	}
	m.Leases = len(leases.Leases)
	b.add(m)
	b.progress("%s: %s %.1f s, %d leases, %d MiB live", at.What, name, m.Seconds, m.Leases, m.Heap>>20)
	return nil
}

// loadStore loads the sessions into a store that was just opened.
func (b *bench) loadStore(ctx context.Context, s store, err error, value []byte) error {
	if err != nil {
		return err
	}
	var all errgroup.Group
	all.SetLimit(scaleCallers)
	for range b.sessions {
		all.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, err := s.create(newToken(), value)
			return err
		})
	}
	// The sessions stay, and so do the leases that hold them.
	return errors.Join(all.Wait(), s.close())
}

// loadBare loads the sessions as plain keys, a hundred at a time: what they take by themselves.
func (b *bench) loadBare(ctx context.Context, c *cluster, value []byte) error {
	cli, err := c.client()
	if err != nil {
		return err
	}
	defer cli.Close()
	for left := b.sessions; left > 0; left -= 100 {
		ops := make([]clientv3.Op, min(left, 100))
		for i := range ops {
			ops[i] = clientv3.OpPut(sessionPrefix+newToken(), string(value))
		}
		if _, err := cli.Txn(ctx).Then(ops...).Commit(); err != nil {
			return err
		}
	}
	return nil
}
