package main

import (
	"context"
	"errors"
	"time"
)

// arrivals is how many callers arrive a second in the part delay: few enough that a machine with two cores is mostly
// idle, so that what is measured is waiting and not work.
const arrivals = 300

// delays measures callers that arrive at random, with a network in between that takes its time: group commit must not
// make anyone wait for company.
func (b *bench) delays(ctx context.Context) (err error) {
	c, err := startCluster(b.dir, 3, defaultElection)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	value, err := newValue(b.values[0])
	if err != nil {
		return err
	}
	for _, delay := range []time.Duration{time.Millisecond, 5 * time.Millisecond} {
		if err := b.delayed(ctx, c, delay, value); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) delayed(ctx context.Context, c *cluster, delay time.Duration, value []byte) (err error) {
	endpoints, err := c.delayed(delay)
	if err != nil {
		return err
	}
	raw, err := openRaw(c, 0, endpoints...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, raw.close()) }()
	ours, err := openOurs(c, endpoints...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.close()) }()
	contestants := []contestant{{name: nameRaw, store: raw}, {name: nameOurs, store: ours}}
	for i := range contestants {
		if contestants[i].sessions, err = createAll(contestants[i].store, 256, value); err != nil {
			return err
		}
	}
	l := b.load
	l.duration = l.duration * 3 / 2
	for _, op := range operations {
		at := cell{
			Part: partDelay, What: op.name, Members: len(c.members), Value: len(value),
			DelayMS: float64(delay) / float64(time.Millisecond),
		}
		err := b.alternate(ctx, at, contestants, func(con *contestant) sample {
			return l.randomArrivals(ctx, callsOf(con.sessions, op.of), arrivals)
		})
		if err != nil {
			return err
		}
		b.told(at, nameRaw, p50, " ms")
	}
	return nil
}
