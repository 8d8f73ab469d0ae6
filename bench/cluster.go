package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
)

const (
	startTimeout    = 30 * time.Second
	requestTimeout  = 10 * time.Second // of what the command asks for itself, between measurements
	defaultElection = time.Second      // etcd's own
)

// cluster is an etcd of one or more members, each in a process of its own.
type cluster struct {
	members []*member
}

// member is a member of a cluster, and the process that runs it.
type member struct {
	memberConfig
	process *exec.Cmd
	stdin   io.WriteCloser
	answers *bufio.Scanner
}

// startCluster starts members with empty data directories under dir.
func startCluster(dir string, n int, election time.Duration) (*cluster, error) {
	c := &cluster{}
	addresses, err := freeAddresses(2 * n)
	if err != nil {
		return nil, err
	}
	dir, err = os.MkdirTemp(dir, "etcd-")
	if err != nil {
		return nil, err
	}
	initial := make([]string, n)
	for i := range n {
		m := &member{memberConfig: memberConfig{
			Name:     fmt.Sprint("m", i),
			Dir:      filepath.Join(dir, strconv.Itoa(i)),
			Client:   addresses[2*i],
			Peer:     addresses[2*i+1],
			Election: election,
		}}
		initial[i] = m.Name + "=http://" + m.Peer
		c.members = append(c.members, m)
	}
	var all errgroup.Group
	for _, m := range c.members {
		m.Initial = strings.Join(initial, ",")
		all.Go(m.start)
	}
	if err := all.Wait(); err != nil {
		return nil, errors.Join(fmt.Errorf("start etcd: %w", err), c.close())
	}
	return c, nil
}

// freeAddresses returns addresses on the loopback interface that nobody listens on now.
func freeAddresses(n int) ([]string, error) {
	addresses := make([]string, n)
	for i := range addresses {
		l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // all at the end, so that they differ
		addresses[i] = l.Addr().String()
	}
	return addresses, nil
}

// start starts the member, with the data that it has, and waits until it is ready.
func (m *member) start() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argument, err := json.Marshal(m.memberConfig)
	if err != nil {
		return err
	}
	m.process = exec.CommandContext(context.Background(), self, memberCommand, string(argument))
	m.process.Stderr = os.Stderr
	m.process.SysProcAttr = ownGroup() // a ^C is for the command, which then stops its members
	m.stdin, err = m.process.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := m.process.StdoutPipe()
	if err != nil {
		return err
	}
	m.answers = bufio.NewScanner(stdout)
	if err := m.process.Start(); err != nil {
		return err
	}
	_, err = m.answer()
	return err
}

// ask sends the member a line and returns its answer.
func (m *member) ask(line string) (string, error) {
	if _, err := fmt.Fprintln(m.stdin, line); err != nil {
		return "", err
	}
	return m.answer()
}

func (m *member) answer() (string, error) {
	if !m.answers.Scan() {
		return "", fmt.Errorf("%s ended: %w", m.Name, errors.Join(m.answers.Err(), m.process.Wait()))
	}
	return m.answers.Text(), nil
}

// kill ends the member's process at once, as a power cut would.
func (m *member) kill() {
	if m.process == nil || m.process.Process == nil {
		return
	}
	_ = m.process.Process.Kill() // it may have ended
	_ = m.process.Wait()         // says that it was killed
}

func (c *cluster) close() error {
	for _, m := range c.members {
		m.kill()
	}
	return os.RemoveAll(filepath.Dir(c.members[0].Dir))
}

func (c *cluster) endpoints() []string {
	var all []string
	for _, m := range c.members {
		all = append(all, m.Client)
	}
	return all
}

// client returns a client that spreads its calls over the endpoints, by default all members.
func (c *cluster) client(endpoints ...string) (*clientv3.Client, error) {
	if len(endpoints) == 0 {
		endpoints = c.endpoints()
	}
	return clientv3.New(clientv3.Config{
		Endpoints:   endpoints,
		DialTimeout: requestTimeout,
		Logger:      zap.NewNop(),
	})
}

// delayed returns endpoints of all members behind proxies that add delay to each round trip.
func (c *cluster) delayed(delay time.Duration) ([]string, error) {
	var all []string
	for _, m := range c.members {
		address, err := m.ask("proxy " + delay.String())
		if err != nil {
			return nil, err
		}
		all = append(all, address)
	}
	return all, nil
}

// compact drops the history, so that what was measured before is not in the way of what comes next.
func (c *cluster) compact(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cli, err := c.client()
	if err != nil {
		return err
	}
	defer cli.Close()
	now, err := cli.Get(ctx, "any")
	if err != nil {
		return err
	}
	_, err = cli.Compact(ctx, now.Header.Revision, clientv3.WithCompactPhysical())
	if errors.Is(err, rpctypes.ErrCompacted) { // nothing was written since the last time
		return nil
	}
	return err
}

// leader returns the member that leads, and its id and that of another.
func (c *cluster) leader(ctx context.Context, cli *clientv3.Client) (m *member, other uint64, err error) {
	for _, candidate := range c.members {
		status, err := cli.Status(ctx, candidate.Client)
		switch {
		case err != nil:
			return nil, 0, err
		case status.Leader == status.Header.MemberId:
			m = candidate
		default:
			other = status.Header.MemberId
		}
	}
	if m == nil {
		return nil, 0, errors.New("no member leads")
	}
	return m, other, nil
}

// moveLeader makes another member the leader.
func (c *cluster) moveLeader(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cli, err := c.client()
	if err != nil {
		return err
	}
	defer cli.Close()
	leader, other, err := c.leader(ctx, cli)
	if err != nil {
		return err
	}
	direct, err := c.client(leader.Client)
	if err != nil {
		return err
	}
	defer direct.Close()
	_, err = direct.MoveLeader(ctx, other)
	return err
}

// killLeader kills the member that leads, and returns it so that it can be started again.
func (c *cluster) killLeader(ctx context.Context) (*member, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	cli, err := c.client()
	if err != nil {
		return nil, err
	}
	defer cli.Close()
	leader, _, err := c.leader(ctx, cli)
	if err != nil {
		return nil, err
	}
	leader.kill()
	return leader, nil
}

// memory returns what the members' processes hold, all together: resident, and live on their heaps.
func (c *cluster) memory() (resident, heap int64, err error) {
	for _, m := range c.members {
		answer, err := m.ask("heap")
		if err != nil {
			return 0, 0, err
		}
		live, err := strconv.ParseInt(answer, 10, 64)
		if err != nil {
			return 0, 0, err
		}
		kib, err := strconv.ParseInt(procValue(fmt.Sprintf("/proc/%d/status", m.process.Process.Pid), "VmRSS"), 10, 64)
		if err != nil {
			return 0, 0, err
		}
		resident, heap = resident+kib<<10, heap+live
	}
	return resident, heap, nil
}
