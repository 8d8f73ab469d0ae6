package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"runtime"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// memberCommand is the hidden sub-command that runs one member of etcd.
const memberCommand = "etcd-member"

// memberConfig is what a member has to know. It is the argument of the sub-command, as JSON.
type memberConfig struct {
	Name     string
	Dir      string
	Client   string // host:port
	Peer     string // host:port
	Initial  string // name=url,…
	Election time.Duration
}

// runMember is a process of its own: a member of etcd, with etcd's defaults. It says "ready", then answers one line
// with one line, and ends with its standard input, so it never outlives the command:
//
//	heap          bytes that are live on the heap
//	proxy 1ms     address of a new proxy before this member that delays by so much per round trip
func runMember(argument string) error {
	var c memberConfig
	if err := json.Unmarshal([]byte(argument), &c); err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir, cfg.InitialCluster = c.Name, c.Dir, c.Initial
	client, peer := url.URL{Scheme: "http", Host: c.Client}, url.URL{Scheme: "http", Host: c.Peer}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.ElectionMs = uint(c.Election.Milliseconds())
	cfg.TickMs = uint(c.Election.Milliseconds() / 10)
	cfg.QuotaBackendBytes = 8 << 30 // a run with long rounds writes more than the default of 2 GiB
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		return err
	case <-time.After(startTimeout):
		return errors.New("the member was not ready in time")
	}
	fmt.Println("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		answer, err := memberCall(strings.Fields(lines.Text()), c.Client)
		if err != nil {
			return err
		}
		fmt.Println(answer)
	}
	return lines.Err() // not closed in an orderly way: its data is of no use to anyone
}

func memberCall(words []string, client string) (string, error) {
	switch {
	case len(words) == 1 && words[0] == "heap":
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return fmt.Sprint(m.HeapAlloc), nil
	case len(words) == 2 && words[0] == "proxy":
		delay, err := time.ParseDuration(words[1])
		if err != nil {
			return "", err
		}
		return startProxy(client, delay)
	}
	return "", fmt.Errorf("the member does not understand %q", words)
}

// startProxy listens on a port of the loopback interface, forwards what comes to target, and delays it by half of
// delay in each direction.
func startProxy(target string, delay time.Duration) (address string, err error) {
	l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := new(net.Dialer).DialContext(context.Background(), "tcp", target)
			if err != nil {
				_ = near.Close()
				continue
			}
			go forward(far, near, delay/2)
			go forward(near, far, delay/2)
		}
	}()
	return l.Addr().String(), nil
}

// forward copies from src to dst, each piece delay after it came, however many are under way.
func forward(dst, src net.Conn, delay time.Duration) {
	type piece struct {
		data []byte
		due  time.Time
	}
	underway := make(chan piece, 4096)
	go func() {
		defer close(underway)
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 {
				underway <- piece{append([]byte(nil), buf[:n]...), time.Now().Add(delay)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range underway {
		pause(time.Until(p.due))
		if _, err := dst.Write(p.data); err != nil {
			break
		}
	}
	_, _ = dst.Close(), src.Close()
	for range underway { // so that the reader is not stuck before it sees that
	}
}

// pause sleeps, more exactly than time.Sleep does in a process without work, which rounds up to a millisecond.
func pause(d time.Duration) {
	if d <= 0 {
		return
	}
	t := syscall.NsecToTimespec(d.Nanoseconds())
	_ = syscall.Nanosleep(&t, nil) // a signal may cut it short, by little
}
