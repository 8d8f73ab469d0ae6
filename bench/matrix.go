package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
)

// contestant is a store that takes part, with its callers' sessions.
type contestant struct {
	name     string
	store    store
	sessions []session
}

// operations are what is measured of a session.
var operations = []struct {
	name string
	of   func(session) error
}{
	{"find", session.find},
	{"commit", session.commit},
	{"request", session.request},
}

// matrix measures each operation with each number of callers, size of values, and number of members.
func (b *bench) matrix(ctx context.Context) error {
	for _, members := range b.members {
		if err := b.matrixOn(ctx, members); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) matrixOn(ctx context.Context, members int) (err error) {
	c, err := startCluster(b.dir, members, defaultElection)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	contestants, err := b.enter(ctx, c, onEtcd)
	defer func() { err = errors.Join(err, leave(contestants)) }()
	if err != nil {
		return err
	}
	// Those that have one server are compared with the smallest etcd, and with small values, which is enough for an
	// idea of where etcd stands.
	var others []contestant
	if members == slices.Min(b.members) {
		others, err = b.enter(ctx, c, onOthers)
		defer func() { err = errors.Join(err, leave(others)) }()
		if err != nil {
			return err
		}
	}
	for i, value := range b.values {
		all := slices.Concat(contestants, others)
		if i > 0 {
			all = contestants
		}
		if err := b.matrixWith(ctx, c, all, value); err != nil {
			return err
		}
	}
	return nil
}

// enter opens the stores that are wanted and there.
func (b *bench) enter(ctx context.Context, c *cluster, contenders []contender) ([]contestant, error) {
	var all []contestant
	for _, con := range contenders {
		if !b.wantsStore(con.name) {
			continue
		}
		s, err := con.open(ctx, b, c)
		if errors.Is(err, errAbsent) {
			b.note("Without a comparison with %s: %v.", con.name, err)
			continue
		}
		if err != nil {
			return all, fmt.Errorf("%s: %w", con.name, err)
		}
		all = append(all, contestant{name: con.name, store: s})
	}
	return all, nil
}

func leave(all []contestant) (err error) {
	for _, c := range all {
		err = errors.Join(err, c.store.close())
	}
	return err
}

// matrixWith measures with values of one size.
func (b *bench) matrixWith(ctx context.Context, c *cluster, contestants []contestant, size int) error {
	value, err := newValue(size)
	if err != nil {
		return err
	}
	for i := range contestants {
		con := &contestants[i]
		if con.sessions, err = createAll(con.store, slices.Max(b.callers), value); err != nil {
			return fmt.Errorf("%s: %w", con.name, err)
		}
	}
	l := b.load
	l.patient = true
	for _, op := range operations {
		if !b.wants(op.name) {
			continue
		}
		for _, callers := range b.callers {
			at := cell{Part: partMatrix, What: op.name, Members: len(c.members), Value: size, Callers: callers}
			if err := c.compact(ctx); err != nil {
				return fmt.Errorf("compact: %w", err)
			}
			err := b.alternate(ctx, at, contestants, func(con *contestant) sample {
				return l.closedLoop(ctx, callsOf(con.sessions[:callers], op.of))
			})
			if err != nil {
				return err
			}
			b.told(at, nameRaw, perSecond, "/s")
		}
	}
	return nil
}

// callsOf returns the calls that do the same with each session.
func callsOf(sessions []session, do func(session) error) []call {
	calls := make([]call, len(sessions))
	for i, s := range sessions {
		calls[i] = func(context.Context) error { return do(s) }
	}
	return calls
}

// alternate measures the contestants in turn, round by round, so that what else happens on the machine meets them all.
func (b *bench) alternate(ctx context.Context, at cell, contestants []contestant, measure func(*contestant) sample) error {
	for round := range b.rounds {
		for i := range contestants {
			con := &contestants[i]
			runtime.GC() // one's garbage is not to be another's work
			s := measure(con)
			if err := ctx.Err(); err != nil {
				return err
			}
			b.add(newMeasurement(at, con.name, round, &s))
			if s.firstErr != nil {
				b.note("%s: %s had errors, such as %q.", at, con.name, s.firstErr)
			}
			if err := con.store.tidy(); err != nil {
				return fmt.Errorf("tidy up after %s: %w", con.name, err)
			}
		}
	}
	return nil
}

// told tells how a cell came out, as multiples of base.
func (b *bench) told(at cell, base string, f figure, unit string) {
	var line []string
	for _, name := range b.stores(at) {
		v, _ := b.median(at, name, f)
		line = append(line, fmt.Sprintf("%s %s%s (%s)", name, digits(v), unit, times(b.ratio(at, name, base, f))))
	}
	b.progress("%s: %s", at, strings.Join(line, ", "))
}

func (c cell) String() string {
	s := fmt.Sprintf("%s, %s", c.What, plural(c.Members, "member"))
	if c.Callers > 0 {
		s += ", " + plural(c.Callers, "caller")
	}
	if c.Value > 0 {
		s += fmt.Sprintf(", %d bytes", c.Value)
	}
	if c.DelayMS > 0 {
		s += fmt.Sprintf(", %g ms delay", c.DelayMS)
	}
	return s
}
