package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/redis/go-redis/v9"
)

// errAbsent says that a machine does not have a server.
var errAbsent = errors.New("is not installed here")

// server is a private instance of redis or PostgreSQL, on a port of its own and with data of its own.
type server struct {
	address string
	dir     string
	process *exec.Cmd
}

// stop ends the server and removes its data.
func (s *server) stop() error {
	if s.process != nil && s.process.Process != nil {
		_ = s.process.Process.Signal(syscall.SIGINT) // it may have ended; for PostgreSQL this is the fast shutdown
		late := time.AfterFunc(requestTimeout, func() { _ = s.process.Process.Kill() })
		_ = s.process.Wait() // says that it was interrupted
		late.Stop()
	}
	return os.RemoveAll(s.dir)
}

// startRedis starts a redis with its defaults and these settings.
func startRedis(ctx context.Context, dir string, settings ...string) (*server, error) {
	program := find("redis-server")
	if program == "" {
		return nil, fmt.Errorf("redis %w", errAbsent)
	}
	addresses, err := freeAddresses(1)
	if err != nil {
		return nil, err
	}
	s := &server{address: addresses[0]}
	if s.dir, err = os.MkdirTemp(dir, "redis-"); err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(s.address) // well-formed
	args := append([]string{"--bind", "127.0.0.1", "--port", port, "--dir", s.dir}, settings...)
	s.process = exec.CommandContext(context.Background(), program, args...)
	s.process.SysProcAttr = ownGroup()
	s.process.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := s.process.Start(); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	cli := redis.NewClient(&redis.Options{Addr: s.address})
	defer cli.Close()
	if err := ready(ctx, func() error { return cli.Ping(ctx).Err() }); err != nil {
		return nil, errors.Join(fmt.Errorf("start redis: %w", err), s.stop())
	}
	return s, nil
}

// postgresURL is how to reach the server's database.
func (s *server) postgresURL() string {
	return "postgres://bench@" + s.address + "/postgres?sslmode=disable"
}

// startPostgres starts a PostgreSQL with its defaults. It refuses to run as root, so root runs it as the user
// "postgres" or, where there is none, as "nobody".
func startPostgres(ctx context.Context, dir string) (*server, error) {
	initdb, program := find("initdb"), find("postgres")
	if initdb == "" || program == "" {
		return nil, fmt.Errorf("PostgreSQL %w", errAbsent)
	}
	addresses, err := freeAddresses(1)
	if err != nil {
		return nil, err
	}
	s := &server{address: addresses[0]}
	if s.dir, err = os.MkdirTemp(dir, "postgres-"); err != nil {
		return nil, err
	}
	attributes := ownGroup()
	attributes.Pdeathsig = syscall.SIGKILL
	if os.Getuid() == 0 {
		if attributes.Credential, err = unprivileged(s.dir); err != nil {
			return nil, errors.Join(err, s.stop())
		}
	}
	data := filepath.Join(s.dir, "data")
	command := func(program string, args ...string) *exec.Cmd {
		c := exec.CommandContext(context.Background(), program, args...)
		c.Dir, c.SysProcAttr = s.dir, attributes
		return c
	}
	out, err := command(initdb, "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync").CombinedOutput()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("initdb: %w: %s", err, out), s.stop())
	}
	_, port, _ := net.SplitHostPort(s.address) // well-formed
	s.process = command(program, "-D", data, "-h", "127.0.0.1", "-p", port, "-k", s.dir)
	if err := s.process.Start(); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	pool, err := pgxpool.New(ctx, s.postgresURL())
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	defer pool.Close()
	if err := ready(ctx, func() error { return pool.Ping(ctx) }); err != nil {
		return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), s.stop())
	}
	// As pgxstore's documentation has it.
	_, err = pool.Exec(ctx, `
		CREATE TABLE sessions (token TEXT PRIMARY KEY, data BYTEA NOT NULL, expiry TIMESTAMPTZ NOT NULL);
		CREATE INDEX sessions_expiry_idx ON sessions (expiry);`)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create table: %w", err), s.stop())
	}
	return s, nil
}

// unprivileged returns the credentials of a user without rights, and gives dir to that user.
func unprivileged(dir string) (*syscall.Credential, error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, err
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	// The parent is ours alone by default; others need not list it, but must pass.
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		return nil, err
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, os.Chown(dir, int(uid), int(gid))
}

// ready waits until try succeeds.
func ready(ctx context.Context, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}
