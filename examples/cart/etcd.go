package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// cluster is an etcd cluster inside this process, on the loopback interface.
type cluster struct {
	dir     string
	remove  bool // the directory is ours to remove
	members []*member

	mu   sync.Mutex // held while a member is killed, restarted or closed
	down *member    // the member that killLeader stopped, nil when all run
}

// member is one etcd server. Its addresses stay the same over a restart, since the other members know them.
type member struct {
	Name   string
	Client string // host:port for clients
	Peer   string // host:port for the other members

	etcd   *embed.Etcd   // nil while the member is down
	closed chan struct{} // closed when a killed server has let go of its files and ports; nil before the first kill
}

// startAttempts bounds how often startCluster looks for other ports, where somebody took one in the moment between
// finding it free and listening on it.
const startAttempts = 3

// startCluster starts size members below dir and waits until they have a leader. With an empty dir the data lies in a
// temporary directory that Close removes; in any other it is kept, and the next start goes on with it.
func startCluster(ctx context.Context, dir string, size int) (*cluster, error) {
	for attempt := 1; ; attempt++ {
		c, err := newCluster(dir, size)
		if err != nil {
			return nil, err
		}
		err = c.start(ctx)
		if err == nil {
			return c, nil
		}
		c.Close()
		if attempt == startAttempts || dir != "" || ctx.Err() != nil {
			return nil, fmt.Errorf("start etcd: %w", err)
		}
	}
}

func newCluster(dir string, size int) (*cluster, error) {
	if dir == "" {
		tmp, err := os.MkdirTemp("", "cart-etcd-")
		if err != nil {
			return nil, err
		}
		members, err := newMembers(size)
		return &cluster{dir: tmp, remove: true, members: members}, err
	}
	members, err := savedMembers(filepath.Join(dir, "members.json"), size)
	return &cluster{dir: dir, members: members}, err
}

// newMembers finds two free ports for each member. All of them are held open until the last is found, so that none is
// found twice.
func newMembers(size int) ([]*member, error) {
	var found []net.Listener
	defer func() {
		for _, l := range found {
			l.Close()
		}
	}()
	free := func() (string, error) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return "", err
		}
		found = append(found, l)
		return l.Addr().String(), nil
	}

	members := make([]*member, size)
	for i := range members {
		client, errClient := free()
		peer, errPeer := free()
		if err := errors.Join(errClient, errPeer); err != nil {
			return nil, err
		}
		members[i] = &member{Name: fmt.Sprintf("etcd%d", i+1), Client: client, Peer: peer}
	}
	return members, nil
}

// savedMembers returns the members that the file names, or finds new ones and writes the file.
func savedMembers(file string, size int) ([]*member, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return saveNewMembers(file, size)
	}
	if err != nil {
		return nil, err
	}
	var members []*member
	if err := json.Unmarshal(b, &members); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(members) != size {
		return nil, fmt.Errorf("%s holds a cluster of %d, not of %d (see -members)", filepath.Dir(file), len(members), size)
	}
	return members, nil
}

func saveNewMembers(file string, size int) ([]*member, error) {
	members, err := newMembers(size)
	if err != nil {
		return nil, err
	}
	b, err := json.MarshalIndent(members, "", "\t")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, err
	}
	return members, os.WriteFile(file, b, 0o600)
}

// start starts all members side by side: none is ready before a majority is there.
func (c *cluster) start(ctx context.Context) error {
	errs := make([]error, len(c.members))
	var wg sync.WaitGroup
	for i, m := range c.members {
		wg.Go(func() { errs[i] = c.startMember(ctx, m, embed.ClusterStateFlagNew) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *cluster) startMember(ctx context.Context, m *member, state string) error {
	if m.etcd == nil {
		e, err := embed.StartEtcd(c.config(m, state))
		if err != nil {
			return err
		}
		m.etcd = e
	}
	select {
	case <-m.etcd.Server.ReadyNotify():
		return nil
	case err := <-m.etcd.Err():
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *cluster) config(m *member, state string) *embed.Config {
	cfg := embed.NewConfig()
	cfg.Name = m.Name
	cfg.Dir = filepath.Join(c.dir, m.Name)
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = httpURL(m.Client), httpURL(m.Client)
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = httpURL(m.Peer), httpURL(m.Peer)
	cfg.InitialCluster = c.initial()
	cfg.ClusterState = state
	cfg.EnableGRPCGateway = false
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = embed.CompactorModePeriodic, "10m"
	// On one machine heartbeats are quick, so a dead leader may be noticed quicker than after the second that etcd
	// allows for a data centre.
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(fatalLogger())
	return cfg
}

func (c *cluster) initial() string {
	urls := make([]string, len(c.members))
	for i, m := range c.members {
		urls[i] = m.Name + "=http://" + m.Peer
	}
	return strings.Join(urls, ",")
}

func httpURL(addr string) []url.URL {
	return []url.URL{{Scheme: "http", Host: addr}}
}

// fatalLogger writes what ends the process and nothing else: a member that is killed on purpose has much to say.
func fatalLogger() *zap.Logger {
	enc := zapcore.NewConsoleEncoder(zap.NewProductionEncoderConfig())
	return zap.New(zapcore.NewCore(enc, zapcore.Lock(os.Stderr), zap.DPanicLevel))
}

// Endpoints are what a client connects to.
func (c *cluster) Endpoints() []string {
	endpoints := make([]string, len(c.members))
	for i, m := range c.members {
		endpoints[i] = m.Client
	}
	return endpoints
}

// killLeader stops the member that leads, in the middle of whatever it does: nothing is finished, and no other member
// is asked to take over. One member may be down at a time, so one that is still down is restarted first.
func (c *cluster) killLeader(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.restart(ctx); err != nil {
		return err
	}
	m, err := c.leader(ctx)
	if err != nil {
		return err
	}
	m.kill()
	c.down = m
	return nil
}

// restartLeader starts the member again that killLeader stopped, and returns when it has caught up.
func (c *cluster) restartLeader(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.restart(ctx)
}

// restart requires c.mu.
func (c *cluster) restart(ctx context.Context) error {
	m := c.down
	if m == nil {
		return nil
	}
	m.wait()
	if err := c.startMember(ctx, m, embed.ClusterStateFlagExisting); err != nil {
		return fmt.Errorf("restart %s: %w", m.Name, err)
	}
	c.down = nil
	return c.caughtUp(ctx, m)
}

// leader waits until a member says of itself that it leads.
func (c *cluster) leader(ctx context.Context) (*member, error) {
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for {
		for _, m := range c.members {
			if m.etcd != nil && m.etcd.Server.Leader() == m.etcd.Server.MemberID() {
				return m, nil
			}
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// caughtUp reads through m alone: a linearizable read is answered only when m has applied what the cluster has.
func (c *cluster) caughtUp(ctx context.Context, m *member) error {
	client, err := newClient([]string{m.Client})
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = client.Get(ctx, "caught up?", clientv3.WithCountOnly())
	return err
}

// Close stops all members and removes the directory if it is a temporary one.
func (c *cluster) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.members {
		m.kill()
	}
	for _, m := range c.members {
		m.wait()
	}
	if c.remove {
		return os.RemoveAll(c.dir)
	}
	return nil
}

// kill stops the member at once and lets go of its files and ports in the background. Close does not hand the
// leadership over either, as etcd would in a rolling restart: the last member finds nobody to take it.
func (m *member) kill() {
	e := m.etcd
	if e == nil {
		return
	}
	m.etcd, m.closed = nil, make(chan struct{})
	e.Server.HardStop()
	go func() {
		defer close(m.closed)
		e.Close()
	}()
}

// wait returns when a killed member is gone.
func (m *member) wait() {
	if m.closed != nil {
		<-m.closed
	}
}
