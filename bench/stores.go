package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/alexedwards/scs/goredisstore"
	"github.com/alexedwards/scs/pgxstore"
	"github.com/alexedwards/scs/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"github.com/seed210be38d/etcdstore"
)

const (
	sessionPrefix = "scs:session:"
	lifetime      = 12 * time.Hour // of a session, from each commit on
	poolSize      = 64             // connections to redis and to PostgreSQL; their defaults are too few for 1024 callers
)

// A store is a contender. Each has a client of its own.
type store interface {
	// create makes a session and returns it for the one caller that uses it.
	create(token string, value []byte) (session, error)
	// tidy removes what the store left behind, so that it does not slow down the next contender.
	tidy() error
	close() error
}

// A session is what one caller has of a store. Its methods are what is measured.
type session interface {
	find() error    // reads the session
	commit() error  // writes it, where it can after a check that nobody else has since it was last read or written
	request() error // reads and then writes it
}

// contender is a store that can be opened.
type contender struct {
	name string
	open func(ctx context.Context, b *bench, c *cluster) (store, error)
}

const (
	nameRaw   = "raw etcd"
	nameGrant = "Grant-and-Put"
	nameOurs  = "etcdstore"
)

// onEtcd are the contenders on etcd. The first is what the others are compared with.
var onEtcd = []contender{
	{nameRaw, func(_ context.Context, _ *bench, c *cluster) (store, error) { return openRaw(c, 0) }},
	{nameGrant, func(_ context.Context, _ *bench, c *cluster) (store, error) { return openGrant(c) }},
	{nameOurs, func(_ context.Context, _ *bench, c *cluster) (store, error) { return openOurs(c) }},
}

// onOthers are the contenders on servers of their own.
var onOthers = []contender{
	{"redis", func(ctx context.Context, b *bench, _ *cluster) (store, error) { return openRedis(ctx, b.dir) }},
	{"redis, fsync always", func(ctx context.Context, b *bench, _ *cluster) (store, error) {
		return openRedis(ctx, b.dir, "--appendonly", "yes", "--appendfsync", "always")
	}},
	{"PostgreSQL", func(ctx context.Context, b *bench, _ *cluster) (store, error) { return openPostgres(ctx, b.dir) }},
}

// createAll creates n sessions.
func createAll(s store, n int, value []byte) ([]session, error) {
	sessions := make([]session, n)
	var all errgroup.Group
	all.SetLimit(256)
	for i := range sessions {
		all.Go(func() (err error) {
			sessions[i], err = s.create(newToken(), value)
			return err
		})
	}
	return sessions, all.Wait()
}

// newToken returns a token as scs makes them.
func newToken() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}

// newValue returns a session of scs that has size bytes when encoded.
func newValue(size int) ([]byte, error) {
	deadline := time.Now().Add(lifetime)
	for pad := size; pad >= 0; pad-- {
		b, err := scs.GobCodec{}.Encode(deadline, map[string]any{"note": strings.Repeat("x", pad)})
		if err != nil || len(b) == size {
			return b, err
		}
	}
	return nil, fmt.Errorf("no session has exactly %d bytes", size)
}

// found checks what a store found.
func found(b, want []byte, exists bool, err error) error {
	if err == nil && (!exists || len(b) != len(want)) {
		return errors.New("the session is not as it was written")
	}
	return err
}

// rawStore is etcd as one would use it by hand: a Get, and a compare-and-swap where the caller knows the revision.
type rawStore struct {
	client  *clientv3.Client
	timeout time.Duration // of each call; 0: none, which costs least
}

func openRaw(c *cluster, timeout time.Duration, endpoints ...string) (*rawStore, error) {
	cli, err := c.client(endpoints...)
	return &rawStore{cli, timeout}, err
}

func (r *rawStore) context() (context.Context, context.CancelFunc) {
	if r.timeout == 0 {
		return context.Background(), func() {}
	}
	return context.WithTimeout(context.Background(), r.timeout)
}

func (r *rawStore) create(token string, value []byte) (session, error) {
	s := &rawSession{rawStore: r, key: "raw:" + token, value: string(value)}
	return s, s.commit()
}

func (r *rawStore) tidy() error  { return nil }
func (r *rawStore) close() error { return r.client.Close() }

type rawSession struct {
	*rawStore
	key      string
	value    string
	revision int64
}

var errSwap = errors.New("the compare failed")

func (s *rawSession) find() error {
	_, err := s.get()
	return err
}

func (s *rawSession) get() (revision int64, err error) {
	ctx, cancel := s.context()
	defer cancel()
	resp, err := s.client.Get(ctx, s.key)
	switch {
	case err != nil:
		return 0, err
	case len(resp.Kvs) == 0 || len(resp.Kvs[0].Value) != len(s.value):
		return 0, errors.New("the session is not as it was written")
	}
	return resp.Kvs[0].ModRevision, nil
}

func (s *rawSession) commit() error {
	ctx, cancel := s.context()
	defer cancel()
	resp, err := s.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(s.key), "=", s.revision)).
		Then(clientv3.OpPut(s.key, s.value)).
		Commit()
	switch {
	case err != nil:
		return err
	case !resp.Succeeded:
		return errSwap
	}
	s.revision = resp.Header.Revision
	return nil
}

func (s *rawSession) request() (err error) {
	if s.revision, err = s.get(); err != nil {
		return err
	}
	return s.commit()
}

// ourStore is the store of this module.
type ourStore struct {
	client *clientv3.Client
	store  *etcdstore.EtcdStore
}

func openOurs(c *cluster, endpoints ...string) (*ourStore, error) {
	cli, err := c.client(endpoints...)
	if err != nil {
		return nil, err
	}
	return &ourStore{cli, etcdstore.NewWithPrefix(cli, sessionPrefix)}, nil
}

func (o *ourStore) create(token string, value []byte) (session, error) {
	s := &ourSession{store: o.store, transaction: etcdstore.Begin(context.Background()), token: token, value: value}
	return s, s.commit()
}

func (o *ourStore) tidy() error  { return nil }
func (o *ourStore) close() error { return errors.Join(o.store.Close(), o.client.Close()) }

// ourSession keeps the transaction in which it last read or wrote the session. So commit knows the revision, as the
// raw compare-and-swap does.
type ourSession struct {
	store       *etcdstore.EtcdStore
	transaction context.Context
	token       string
	value       []byte
}

func (s *ourSession) find() error {
	b, exists, err := s.store.Find(s.token)
	return found(b, s.value, exists, err)
}

func (s *ourSession) commit() error {
	return s.store.CommitCtx(s.transaction, s.token, s.value, time.Now().Add(lifetime))
}

func (s *ourSession) request() error {
	s.transaction = etcdstore.Begin(context.Background())
	b, exists, err := s.store.FindCtx(s.transaction, s.token)
	if err := found(b, s.value, exists, err); err != nil {
		return err
	}
	return s.commit()
}

// plainSession is a session in a store that overwrites.
type plainSession struct {
	store scs.CtxStore
	token string
	value []byte
}

func (s *plainSession) find() error {
	b, exists, err := s.store.FindCtx(context.Background(), s.token)
	return found(b, s.value, exists, err)
}

func (s *plainSession) commit() error {
	return s.store.CommitCtx(context.Background(), s.token, s.value, time.Now().Add(lifetime))
}

func (s *plainSession) request() error {
	if err := s.find(); err != nil {
		return err
	}
	return s.commit()
}

// plainStore is a store that overwrites.
type plainStore struct {
	scs.CtxStore

	clean func() error
	end   func() error
}

func (p *plainStore) create(token string, value []byte) (session, error) {
	s := &plainSession{p.CtxStore, token, value}
	return s, s.commit()
}

func (p *plainStore) tidy() error {
	if p.clean == nil {
		return nil
	}
	return p.clean()
}

func (p *plainStore) close() error { return p.end() }

// grantStore does what scs's own etcdstore did: each commit grants a lease, and puts the session with it.
type grantStore struct {
	scs.Store // the methods that nobody calls

	client *clientv3.Client

	mu     sync.Mutex
	leases map[string]clientv3.LeaseID // by token
	stale  []clientv3.LeaseID          // without a session: in real life they stay until they end
}

func openGrant(c *cluster) (store, error) {
	cli, err := c.client()
	if err != nil {
		return nil, err
	}
	g := &grantStore{client: cli, leases: make(map[string]clientv3.LeaseID)}
	return &plainStore{g, g.revokeStale, cli.Close}, nil
}

func (g *grantStore) FindCtx(ctx context.Context, token string) (b []byte, found bool, err error) {
	resp, err := g.client.Get(ctx, "grant:"+token)
	if err != nil || len(resp.Kvs) == 0 {
		return nil, false, err
	}
	return resp.Kvs[0].Value, true, nil
}

func (g *grantStore) CommitCtx(ctx context.Context, token string, b []byte, expiry time.Time) error {
	lease, err := g.client.Grant(ctx, int64(time.Until(expiry).Seconds()))
	if err != nil {
		return err
	}
	if _, err = g.client.Put(ctx, "grant:"+token, string(b), clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if old, ok := g.leases[token]; ok {
		g.stale = append(g.stale, old)
	}
	g.leases[token] = lease.ID
	return nil
}

func (g *grantStore) DeleteCtx(ctx context.Context, token string) error {
	_, err := g.client.Delete(ctx, "grant:"+token)
	return err
}

func (g *grantStore) revokeStale() error {
	g.mu.Lock()
	stale := g.stale
	g.stale = nil
	g.mu.Unlock()
	var all errgroup.Group
	all.SetLimit(256)
	for _, id := range stale {
		all.Go(func() error {
			_, err := g.client.Revoke(context.Background(), id)
			return err
		})
	}
	return all.Wait()
}

func openRedis(ctx context.Context, dir string, settings ...string) (store, error) {
	s, err := startRedis(ctx, dir, settings...)
	if err != nil {
		return nil, err
	}
	cli := redis.NewClient(&redis.Options{Addr: s.address, PoolSize: poolSize})
	return &plainStore{CtxStore: goredisstore.New(cli), end: func() error {
		return errors.Join(cli.Close(), s.stop())
	}}, nil
}

func openPostgres(ctx context.Context, dir string) (store, error) {
	s, err := startPostgres(ctx, dir)
	if err != nil {
		return nil, err
	}
	cfg, err := pgxpool.ParseConfig(s.postgresURL())
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	cfg.MaxConns = poolSize
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return &plainStore{CtxStore: pgxstore.NewWithCleanupInterval(pool, 0), end: func() error {
		pool.Close()
		return s.stop()
	}}, nil
}
