package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	leaderCallers = 64
	leaderTimeout = 5 * time.Second // of a call: etcdstore's default, and for raw etcd likewise
)

// leaderChange is a way for a cluster to change its leader.
type leaderChange struct {
	name     string
	election time.Duration
	change   func(ctx context.Context, c *cluster) (restart *member, err error)
}

var allLeaderChanges = []leaderChange{
	{"leadership handed over", defaultElection, func(ctx context.Context, c *cluster) (*member, error) {
		return nil, c.moveLeader(ctx)
	}},
	{"leader killed, election timeout 100 ms", 100 * time.Millisecond, killLeader},
	{"leader killed, election timeout 1 s", defaultElection, killLeader},
}

func killLeader(ctx context.Context, c *cluster) (*member, error) { return c.killLeader(ctx) }

// leaderChanges measures what callers see of a change of the leader while they commit.
func (b *bench) leaderChanges(ctx context.Context) error {
	for _, l := range allLeaderChanges {
		if err := b.leaderChange(ctx, l); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}

func (b *bench) leaderChange(ctx context.Context, l leaderChange) (err error) {
	c, err := startCluster(b.dir, 3, l.election)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	at := cell{Part: partLeader, What: l.name, Members: 3, Value: b.values[0], Callers: leaderCallers}
	contenders := []contender{
		{nameRaw, func(context.Context, *bench, *cluster) (store, error) { return openRaw(c, leaderTimeout) }},
		{nameOurs, func(context.Context, *bench, *cluster) (store, error) { return openOurs(c) }},
	}
	for round := range b.rounds {
		for _, con := range contenders {
			s, err := b.throughLeaderChange(ctx, c, l, con)
			if err != nil {
				return fmt.Errorf("%s: %w", con.name, err)
			}
			b.add(newMeasurement(at, con.name, round, &s))
			if s.firstErr != nil {
				b.note("A %s: %s had errors, such as %q.", l.name, con.name, s.firstErr)
			}
		}
	}
	for _, con := range contenders {
		failed, _ := b.sum(at, con.name, errorCount)
		_, worst := b.sum(at, con.name, longest)
		b.progress("%s: %s %.0f errors, longest call %.0f ms", l.name, con.name, failed, worst)
	}
	return nil
}

// throughLeaderChange measures one change, and leaves the cluster with all its members.
func (b *bench) throughLeaderChange(ctx context.Context, c *cluster, l leaderChange, con contender) (_ sample, err error) {
	value, err := newValue(b.values[0])
	if err != nil {
		return sample{}, err
	}
	st, err := con.open(ctx, b, c)
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, st.close()) }()
	sessions, err := createAll(st, leaderCallers, value)
	if err != nil {
		return sample{}, err
	}
	type changed struct {
		restart *member
		err     error
	}
	done := make(chan changed, 1)
	go func() {
		wait(ctx, 500*time.Millisecond)
		restart, err := l.change(ctx, c)
		done <- changed{restart, err}
	}()
	long := load{duration: 2500 * time.Millisecond, everything: true}
	s := long.closedLoop(ctx, callsOf(sessions, func(s session) error {
		err := s.commit()
		if err != nil {
			// The caller does not know what the session is now: it reads it, and goes on. This is not counted.
			for try := time.Now(); s.request() != nil && time.Since(try) < leaderTimeout; {
				wait(ctx, 10*time.Millisecond)
			}
		}
		return err
	}))
	ch := <-done
	if ch.restart != nil {
		err = ch.restart.start()
	}
	return s, errors.Join(ch.err, err)
}
