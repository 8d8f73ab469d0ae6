package etcdtest

import (
	"context"
	"crypto/x509"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/tests/v3/framework/integration"
	"go.uber.org/zap"
)

// Config says what a cluster is like.
type Config struct {
	Members    int   // 1 where it is 0
	TLS        bool  // clients and members show each other certificates
	QuotaBytes int64 // size of the backend at which the space alarm goes off
	MaxTxnOps  uint  // operations that a transaction may have

	// TCP makes the members listen on TCP instead of unix sockets. Of the clusters
	// that a process has at one time, all but one need it. Such members have no
	// bridge: the framework cannot put one in front of a TCP port.
	TCP bool
}

// Cluster is an etcd cluster inside this process.
type Cluster struct {
	members *integration.Cluster
}

// contexts counts the clusters that are up. The framework allows a single test
// context per process, which the first of them opens for all.
var contexts int

// New starts a cluster that ends with tb, and waits for its leader.
func New(tb testing.TB, cfg Config) *Cluster {
	tb.Helper()
	members := quiet{tb}

	if contexts == 0 {
		integration.BeforeTestExternal(members)
	}
	contexts++
	tb.Cleanup(func() { contexts-- })

	icfg := &integration.ClusterConfig{
		Size:              max(cfg.Members, 1),
		QuotaBackendBytes: cfg.QuotaBytes,
		MaxTxnOps:         cfg.MaxTxnOps,
		UseTCP:            cfg.TCP,
		UseBridge:         !cfg.TCP,
	}
	if cfg.TLS {
		icfg.ClientTLS = newTLS(tb)
	}
	c := &Cluster{members: integration.NewCluster(members, icfg)}
	tb.Cleanup(func() { c.members.Terminate(members) })
	c.Leader(tb)
	return c
}

// newTLS makes a certificate that members and clients both show, and demand of each
// other. The framework's own ones are found from within etcd's repository only.
func newTLS(tb testing.TB) *transport.TLSInfo {
	tb.Helper()
	hosts := []string{"localhost:0", "127.0.0.1:0", "[::1]:0"} // the ports are ignored
	cert, err := transport.SelfCert(zap.NewNop(), tb.TempDir(), hosts, 1, x509.ExtKeyUsageClientAuth)
	if err != nil {
		tb.Fatalf("certificate: %v", err)
	}
	return &transport.TLSInfo{
		CertFile:       cert.CertFile,
		KeyFile:        cert.KeyFile,
		TrustedCAFile:  cert.CertFile,
		ClientCertAuth: true,
	}
}

// Integration returns the framework's own cluster, whose members can be stopped,
// cut off and restarted.
func (c *Cluster) Integration() *integration.Cluster { return c.members }

// Endpoints returns the members' addresses, in the members' order.
func (c *Cluster) Endpoints() []string { return c.members.Endpoints() }

// Leader waits until a majority of the members agree on a leader that is running,
// and returns its index. For an election timeout after the leader was cut off, that
// is still the old one.
func (c *Cluster) Leader(tb testing.TB) int {
	tb.Helper()
	leader := -1
	Eventually(tb, electionTimeout, func() bool {
		leader = c.leader(len(c.members.Members)/2 + 1)
		return leader >= 0
	}, "the cluster has no leader")
	return leader
}

// MoveLeader moves the leadership to another member, and waits until all running
// members agree on it.
func (c *Cluster) MoveLeader(tb testing.TB) {
	tb.Helper()
	running := c.running()
	if len(running) < 2 {
		tb.Fatal("MoveLeader: a leader needs another running member to hand over to")
	}

	old := c.Leader(tb)
	next := running[0]
	if next == old {
		next = running[1]
	}
	from, to := c.members.Members[old], c.members.Members[next]
	Eventually(tb, electionTimeout, func() bool {
		leader := c.leader(len(running))
		if leader == old {
			// Raft gives a transfer up after one election timeout, and does not say so.
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_ = from.Server.MoveLeader(ctx, uint64(from.ID()), uint64(to.ID()))
			return false
		}
		return leader >= 0
	}, "the leadership did not move")
}

// RestartAll stops all members, starts them again with their data, and waits for
// a leader.
func (c *Cluster) RestartAll(tb testing.TB) {
	tb.Helper()
	for _, m := range c.members.Members {
		m.Stop(quiet{tb})
	}
	for _, m := range c.members.Members {
		if err := m.Restart(quiet{tb}); err != nil {
			tb.Fatalf("RestartAll: %s: %v", m.Name, err)
		}
	}
	c.Leader(tb)
}

// leader returns the index of the running member that at least quorum running
// members take for the leader, or -1.
func (c *Cluster) leader(quorum int) int {
	votes := make(map[uint64]int)
	for _, i := range c.running() {
		votes[c.members.Members[i].Server.Lead()]++
	}
	for _, i := range c.running() {
		if votes[uint64(c.members.Members[i].ID())] >= quorum {
			return i
		}
	}
	return -1
}

// running returns the indexes of the members that are not stopped.
func (c *Cluster) running() []int {
	var running []int
	for i, m := range c.members.Members {
		select {
		case <-m.StopNotify():
		default:
			running = append(running, i)
		}
	}
	return running
}
