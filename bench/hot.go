package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore"
)

// hotCallers are how many callers change one session at once.
var hotCallers = []int{64, 256}

const (
	nameLoop    = "compare-and-swap loop"
	nameBackoff = "the same with back-off"
)

// hot measures many callers that change one session at the same time, each a key of its own: the pages and scripts of
// one browser, or one account on many devices.
func (b *bench) hot(ctx context.Context) (err error) {
	c, err := startCluster(b.dir, 3, defaultElection)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	raw, err := openRaw(c, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, raw.close()) }()
	ours, err := openOurs(c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.close()) }()
	plain, patient, merging := &swapLoop{client: raw.client}, &swapLoop{client: raw.client, backoff: true}, &hotStore{ours}
	for _, callers := range hotCallers {
		at := cell{Part: partHot, What: "change a key", Members: len(c.members), Callers: callers}
		for round := range b.rounds {
			for _, h := range []struct {
				name    string
				changer changer
			}{{nameLoop, plain}, {nameBackoff, patient}, {nameOurs, merging}} {
				m, err := b.heat(ctx, h.changer, callers)
				if err != nil {
					return fmt.Errorf("hot session, %s: %w", h.name, err)
				}
				if m.sample.firstErr != nil {
					b.note("Hot session, %d callers: %s had errors, such as %q.", callers, h.name, m.sample.firstErr)
				}
				entry := newMeasurement(at, h.name, round, &m.sample)
				entry.Lost = m.lost
				b.add(entry)
			}
		}
		b.told(at, nameLoop, perSecond, "/s")
	}
	return nil
}

// changer changes values of a session, losing nobody else's changes.
type changer interface {
	set(token string, values map[string]any) error
	get(token string) (map[string]any, error)
	// change makes one change, and gives up with ctx.
	change(ctx context.Context, token string, f func(values map[string]any)) error
}

type heated struct {
	sample sample
	lost   int // changes that a caller was told had been made and that are not there
}

// heat has callers change a new session, and checks what is in it afterwards.
func (b *bench) heat(ctx context.Context, s changer, callers int) (heated, error) {
	token := newToken()
	values := make(map[string]any, callers)
	for i := range callers {
		values[hotKey(i)] = 0
	}
	if err := s.set(token, values); err != nil {
		return heated{}, err
	}
	made := make([]int, callers) // what each caller was last told that it is
	calls := make([]call, callers)
	for i := range calls {
		calls[i] = func(ctx context.Context) error {
			err := s.change(ctx, token, func(values map[string]any) { values[hotKey(i)] = made[i] + 1 })
			if err == nil {
				made[i]++
			}
			return err
		}
	}
	l := b.load
	l.duration *= 2 // the loops are slow
	h := heated{sample: l.closedLoop(ctx, calls)}
	values, err := s.get(token)
	if err != nil {
		return h, err
	}
	for i, want := range made {
		if n, _ := values[hotKey(i)].(int); n < want { // more: a change whose outcome was not known, or that was given up
			h.lost++
		}
	}
	return h, nil
}

func hotKey(caller int) string { return fmt.Sprint("key", caller) }

var errGivenUp = errors.New("given up at the end of the measurement")

// swapLoop reads, changes and compare-and-swaps until that succeeds.
type swapLoop struct {
	client  *clientv3.Client
	backoff bool
}

func (l *swapLoop) set(token string, values map[string]any) error {
	b, err := encode(values)
	if err != nil {
		return err
	}
	_, err = l.client.Put(context.Background(), "hot:"+token, string(b))
	return err
}

func (l *swapLoop) get(token string) (map[string]any, error) {
	values, _, err := l.read(token)
	return values, err
}

func (l *swapLoop) read(token string) (values map[string]any, revision int64, err error) {
	resp, err := l.client.Get(context.Background(), "hot:"+token)
	if err != nil {
		return nil, 0, err
	}
	if len(resp.Kvs) == 0 {
		return nil, 0, errors.New("the session is not there")
	}
	_, values, err = scs.GobCodec{}.Decode(resp.Kvs[0].Value)
	return values, resp.Kvs[0].ModRevision, err
}

func (l *swapLoop) change(ctx context.Context, token string, f func(values map[string]any)) error {
	for ceiling := time.Millisecond; ctx.Err() == nil; ceiling = min(2*ceiling, 256*time.Millisecond) {
		values, revision, err := l.read(token)
		if err != nil {
			return err
		}
		f(values)
		b, err := encode(values)
		if err != nil {
			return err
		}
		resp, err := l.client.Txn(context.Background()).
			If(clientv3.Compare(clientv3.ModRevision("hot:"+token), "=", revision)).
			Then(clientv3.OpPut("hot:"+token, string(b))).
			Commit()
		if err != nil {
			return err
		}
		if resp.Succeeded {
			return nil
		}
		if l.backoff {
			wait(ctx, rand.N(ceiling))
		}
	}
	return errGivenUp
}

// hotStore is a request in etcdstore.
type hotStore struct{ *ourStore }

func (h *hotStore) set(token string, values map[string]any) error {
	b, err := encode(values)
	if err != nil {
		return err
	}
	return h.store.Commit(token, b, time.Now().Add(lifetime))
}

func (h *hotStore) get(token string) (map[string]any, error) {
	return h.find(context.Background(), token)
}

func (h *hotStore) find(ctx context.Context, token string) (map[string]any, error) {
	b, exists, err := h.store.FindCtx(ctx, token)
	if err != nil {
		return nil, err
	}
	if !exists {
		return nil, errors.New("the session is not there")
	}
	_, values, err := scs.GobCodec{}.Decode(b)
	return values, err
}

func (h *hotStore) change(_ context.Context, token string, f func(values map[string]any)) error {
	ctx := etcdstore.Begin(context.Background())
	values, err := h.find(ctx, token)
	if err != nil {
		return err
	}
	f(values)
	b, err := encode(values)
	if err != nil {
		return err
	}
	return h.store.CommitCtx(ctx, token, b, time.Now().Add(lifetime))
}

// hotDeadline is the session's own: the same in all of its versions, as it is in scs.
var hotDeadline = time.Now().Add(lifetime)

func encode(values map[string]any) ([]byte, error) {
	return scs.GobCodec{}.Encode(hotDeadline, values)
}
