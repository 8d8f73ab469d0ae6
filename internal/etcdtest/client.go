package etcdtest

import (
	"context"
	"testing"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// ClientOption changes the configuration of a new client.
type ClientOption func(*clientv3.Config)

// WithUser makes the client log in.
func WithUser(name, password string) ClientOption {
	return func(cfg *clientv3.Config) { cfg.Username, cfg.Password = name, password }
}

// WithMember makes the client talk to one member only.
func WithMember(i int) ClientOption {
	// The configuration that options get lists the endpoints in the members' order.
	return func(cfg *clientv3.Config) { cfg.Endpoints = cfg.Endpoints[i : i+1] }
}

// Client returns a client that balances its calls over all members, and is closed
// with tb.
func (c *Cluster) Client(tb testing.TB, opts ...ClientOption) *clientv3.Client {
	tb.Helper()
	cfg := clientv3.Config{
		Endpoints:   c.Endpoints(),
		DialTimeout: requestTimeout,
		Logger:      zap.NewNop(),
	}
	if info := c.members.Cfg.ClientTLS; info != nil {
		tls, err := info.ClientConfig()
		if err != nil {
			tb.Fatalf("client certificate: %v", err)
		}
		cfg.TLS = tls
	}
	for _, opt := range opts {
		opt(&cfg)
	}
	cli, err := clientv3.New(cfg)
	if err != nil {
		tb.Fatalf("client: %v", err)
	}
	tb.Cleanup(func() { _ = cli.Close() }) // the test may have closed it
	return cli
}

// Keys returns the keys that begin with prefix, sorted.
func Keys(tb testing.TB, cli *clientv3.Client, prefix string) []string {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), requestTimeout)
	defer cancel()
	resp, err := cli.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		tb.Fatalf("Keys: %v", err)
	}
	keys := make([]string, len(resp.Kvs))
	for i, kv := range resp.Kvs {
		keys[i] = string(kv.Key)
	}
	return keys
}

// Leases returns the ids of all leases that the cluster has.
func Leases(tb testing.TB, cli *clientv3.Client) []clientv3.LeaseID {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), requestTimeout)
	defer cancel()

	var err error
	for _, endpoint := range cli.Endpoints() {
		var ids []clientv3.LeaseID
		if ids, err = memberLeases(ctx, cli, endpoint); err == nil {
			return ids
		}
	}
	tb.Fatalf("Leases: no member answered: %v", err)
	return nil
}

// memberLeases asks a single member. Members list the leases they know of without
// asking the leader; a linearizable read of the same member beforehand makes it
// apply everything that was committed until now.
func memberLeases(ctx context.Context, cli *clientv3.Client, endpoint string) ([]clientv3.LeaseID, error) {
	conn, err := cli.Dial(endpoint)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()

	_, err = etcdserverpb.NewKVClient(conn).Range(ctx, &etcdserverpb.RangeRequest{Key: []byte("\x00")})
	if err != nil {
		return nil, err
	}
	resp, err := etcdserverpb.NewLeaseClient(conn).LeaseLeases(ctx, &etcdserverpb.LeaseLeasesRequest{})
	if err != nil {
		return nil, err
	}
	ids := make([]clientv3.LeaseID, len(resp.Leases))
	for i, l := range resp.Leases {
		ids[i] = clientv3.LeaseID(l.ID)
	}
	return ids, nil
}

// EnableAuth turns authentication on. There is then a user who may read and write
// the keys that begin with prefix and nothing else, and the user "root" with the
// password "root"; clients without WithUser are refused. When tb ends it is turned
// off and the users are removed.
func EnableAuth(tb testing.TB, c *Cluster, user, password, prefix string) {
	tb.Helper()
	const root, role = "root", "prefix"
	try := func(what string, err error) {
		tb.Helper()
		if err != nil {
			tb.Fatalf("authentication: %s: %v", what, err)
		}
	}

	ctx, cancel := context.WithTimeout(tb.Context(), requestTimeout)
	defer cancel()
	cli := c.Client(tb)
	_, err := cli.UserAdd(ctx, root, root)
	try("add root", err)
	_, err = cli.UserGrantRole(ctx, root, root)
	try("make root an administrator", err)
	_, err = cli.RoleAdd(ctx, role)
	try("add role", err)
	_, err = cli.RoleGrantPermission(ctx, role, prefix, clientv3.GetPrefixRangeEnd(prefix),
		clientv3.PermissionType(clientv3.PermReadWrite))
	try("grant permission", err)
	_, err = cli.UserAdd(ctx, user, password)
	try("add user", err)
	_, err = cli.UserGrantRole(ctx, user, role)
	try("grant role", err)
	_, err = cli.AuthEnable(ctx)
	try("enable", err)

	admin := c.Client(tb, WithUser(root, root))
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), requestTimeout)
		defer cancel()
		_, err := admin.AuthDisable(ctx)
		try("disable", err)
		for _, name := range []string{root, user} {
			_, err = admin.UserDelete(ctx, name)
			try("remove user", err)
		}
		_, err = admin.RoleDelete(ctx, role)
		try("remove role", err)
	})
}
