// Command cart is a small shop on three servers that share sessions through etcd, and a demonstration of what becomes
// of a session when requests race for it.
//
//	go run ./examples/cart
//
// starts three etcd members in this process, with their data in a temporary directory, and serves the shop on
// http://localhost:4000, 4001 and 4002. Ctrl-C ends it. The flags:
//
//	-addr host:port   address of the first server; the others use the next two ports (0: any free ports)
//	-members 1|3      members of the embedded etcd
//	-data dir         keep etcd's data there
//	-endpoints a,b,c  use this etcd cluster and start none
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// servers is how many servers share the sessions.
const servers = 3

type config struct {
	addr      string
	members   int
	data      string
	endpoints []string

	started func(urls []string) // for tests: called when all servers answer
}

func main() {
	cfg, err := parseFlags(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second Ctrl-C ends the process at once
	err = run(ctx, cfg, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "cart:", err)
		os.Exit(1)
	}
}

func parseFlags(args []string, out io.Writer) (config, error) {
	var cfg config
	flags := flag.NewFlagSet("cart", flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&cfg.addr, "addr", "localhost:4000",
		"`host:port` of the first server, as the browser will call it; the others use the next two ports")
	flags.IntVar(&cfg.members, "members", 3, "members of the embedded etcd, 1 or 3")
	flags.StringVar(&cfg.data, "data", "", "`directory` to keep etcd's data in (default: a temporary one)")
	endpoints := flags.String("endpoints", "", "comma-separated `addresses` of an etcd cluster to use instead")
	if err := flags.Parse(args); err != nil {
		return cfg, err
	}
	if *endpoints != "" {
		cfg.endpoints = strings.Split(*endpoints, ",")
	}
	err := cfg.check(flags.NArg())
	if err != nil {
		fmt.Fprintln(out, "cart:", err)
	}
	return cfg, err
}

func (cfg config) check(args int) error {
	switch {
	case args > 0:
		return errors.New("takes flags only, see -help")
	case cfg.members != 1 && cfg.members != 3:
		return errors.New("-members must be 1 or 3")
	case cfg.endpoints != nil && cfg.data != "":
		return errors.New("-data is for the embedded etcd, -endpoints for another one: use either")
	}
	return nil
}

// run serves until ctx ends, and has stopped everything when it returns.
func run(ctx context.Context, cfg config, out io.Writer) (err error) {
	listeners, urls, err := listen(cfg.addr)
	if err != nil {
		return err
	}
	d := &demo{origins: urls, stopping: ctx.Done()}
	endpoints := cfg.endpoints
	if endpoints == nil {
		d.cluster, err = startCluster(ctx, cfg.data, cfg.members)
		if err != nil {
			closeAll(listeners)
			if ctx.Err() != nil {
				return nil // stopped while starting
			}
			return err
		}
		defer func() { err = errors.Join(err, d.cluster.Close()) }()
		endpoints = d.cluster.Endpoints()
	}

	apps, err := newApps(endpoints, d)
	if err != nil {
		closeAll(listeners)
		return err
	}
	defer func() {
		for _, a := range apps {
			err = errors.Join(err, a.Close())
		}
	}()
	return serve(ctx, listeners, apps, func() {
		announce(out, urls, cfg)
		if cfg.started != nil {
			cfg.started(urls)
		}
	})
}

func newApps(endpoints []string, d *demo) ([]*app, error) {
	var apps []*app
	for number := range servers {
		a, err := newApp(number+1, endpoints, d)
		if err != nil {
			for _, a := range apps {
				a.Close()
			}
			return nil, err
		}
		apps = append(apps, a)
	}
	return apps, nil
}

// listen opens the servers' ports and returns with them the origins by which a browser knows them.
func listen(addr string) (listeners []net.Listener, urls []string, err error) {
	host, portName, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, nil, fmt.Errorf("-addr: %w", err)
	}
	first, err := strconv.ParseUint(portName, 10, 16)
	if err != nil {
		return nil, nil, fmt.Errorf("-addr: port %q is not a number up to 65535", portName)
	}
	for i := range servers {
		port := int(first)
		if port > 0 {
			port += i
		}
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			closeAll(listeners)
			return nil, nil, fmt.Errorf("%w (-addr takes another first port)", err)
		}
		listeners = append(listeners, l)
		urls = append(urls, origin(host, l.Addr().(*net.TCPAddr).Port))
	}
	return listeners, urls, nil
}

// origin names a server as a browser does: "http://localhost:4000". A server that listens on all interfaces is called
// by the name that every machine has for itself.
func origin(host string, port int) string {
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "localhost"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(port))
}

func closeAll(listeners []net.Listener) {
	for _, l := range listeners {
		l.Close()
	}
}

func announce(out io.Writer, urls []string, cfg config) {
	if cfg.endpoints != nil {
		fmt.Fprintf(out, "Using etcd at %s.\n", strings.Join(cfg.endpoints, ", "))
	} else {
		fmt.Fprintf(out, "Started etcd with %d member(s).\n", cfg.members)
	}
	fmt.Fprintf(out, "Open %s (the other servers are %s). Ctrl-C stops.\n", urls[0], strings.Join(urls[1:], " and "))
}

// serve runs one http.Server for each app until ctx ends or one of them fails.
func serve(ctx context.Context, listeners []net.Listener, apps []*app, started func()) error {
	failed := make(chan error, len(apps))
	running := make([]*http.Server, len(apps))
	var wg sync.WaitGroup
	for i, a := range apps {
		srv := &http.Server{
			Handler:           a.handler(),
			ReadHeaderTimeout: 5 * time.Second,
			IdleTimeout:       time.Minute,
		}
		running[i] = srv
		wg.Go(func() { failed <- srv.Serve(listeners[i]) })
	}
	started()

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	for _, srv := range running {
		wg.Go(func() { shutdown(srv) })
	}
	wg.Wait()
	return err
}

// shutdown lets requests end for a while, and then closes what is left. Browsers keep connections open on which they
// never asked anything, so something usually is.
func shutdown(srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if srv.Shutdown(ctx) != nil {
		srv.Close()
	}
}
