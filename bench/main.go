// Command bench compares etcdstore with etcd used by hand, with a store that grants a lease for each commit, and with
// redis and PostgreSQL, side by side on one machine. README.md says what is measured and how to read it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == memberCommand {
		exit(runMember(os.Args[2]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	context.AfterFunc(ctx, stop) // a second ^C ends it at once
	p, err := parsePlan(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		err = p.run(ctx, os.Stdout, os.Stderr)
	}
	exit(err)
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// plan is what to measure.
type plan struct {
	parts      []string
	contenders []string // parts of names; empty: all
	callers    []int
	members    []int
	values     []int
	rounds     int
	load       load
	sessions   int
	out        string
	profile    string
}

// allParts are what -only takes: three columns of the matrix, and the other parts, in the order of the run.
var allParts = []string{"find", "commit", "request", partDelay, partHot, partLeader, partScale}

func parsePlan(args []string, usage io.Writer) (*plan, error) {
	p := &plan{}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(usage)
	f.Usage = func() {
		fmt.Fprintln(f.Output(), "usage: go run . [flags]   (README.md says what it measures)")
		f.PrintDefaults()
	}
	quick := f.Bool("quick", false, "a sanity run of about two minutes; other flags still count")
	f.Func("only", "parts to run, of "+strings.Join(allParts, ","), func(s string) error {
		for part := range strings.SplitSeq(s, ",") {
			if !slices.Contains(allParts, part) {
				return fmt.Errorf("there is no part %q", part)
			}
			p.parts = append(p.parts, part)
		}
		return nil
	})
	f.Func("stores", "stores to compare with raw etcd, by parts of their names (default all)", func(s string) error {
		p.contenders = strings.Split(s, ",")
		return nil
	})
	f.Func("callers", "concurrent callers (default 1,16,64,256,1024)", numbers(&p.callers))
	f.Func("members", "members of the etcd clusters (default 3,1)", numbers(&p.members))
	f.Func("value", "bytes of a session (default 256,2048)", numbers(&p.values))
	f.IntVar(&p.rounds, "rounds", 3, "rounds, of which the median counts")
	f.DurationVar(&p.load.duration, "duration", 700*time.Millisecond, "time of each measurement")
	f.DurationVar(&p.load.warmup, "warmup", 150*time.Millisecond, "time before each measurement")
	f.IntVar(&p.sessions, "sessions", 100_000, "sessions to load in the part scale")
	f.StringVar(&p.out, "out", "results", "directory for the tables, the chart and the raw numbers; empty: write nothing")
	f.StringVar(&p.profile, "cpuprofile", "", "file for a profile of the client's processor time")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 || p.rounds < 1 || p.load.duration <= 0 {
		return nil, fmt.Errorf("see -help: %q", args)
	}
	set := make(map[string]bool)
	f.Visit(func(f *flag.Flag) { set[f.Name] = true })
	if *quick {
		orInts(&p.callers, 16, 64, 256)
		orInts(&p.members, 3)
		orInts(&p.values, 256)
		if !set["duration"] {
			p.load.duration = 300 * time.Millisecond
		}
		if !set["rounds"] {
			p.rounds = 2
		}
		if !set["sessions"] {
			p.sessions = 10_000
		}
	}
	orInts(&p.callers, 1, 16, 64, 256, 1024)
	orInts(&p.members, 3, 1)
	orInts(&p.values, 256, 2048)
	if len(p.parts) == 0 {
		p.parts = allParts
	}
	return p, nil
}

// numbers returns the function of a flag that takes positive numbers separated by commas.
func numbers(to *[]int) func(string) error {
	return func(s string) error {
		for word := range strings.SplitSeq(s, ",") {
			n, err := strconv.Atoi(word)
			if err != nil || n < 1 {
				return fmt.Errorf("%q is not a positive number", word)
			}
			*to = append(*to, n)
		}
		return nil
	}
}

func orInts(to *[]int, defaults ...int) {
	if len(*to) == 0 {
		*to = defaults
	}
}

func (p *plan) wants(part string) bool { return slices.Contains(p.parts, part) }

// wantsStore reports whether a store is to be measured. Raw etcd always is.
func (p *plan) wantsStore(name string) bool {
	return len(p.contenders) == 0 || name == nameRaw ||
		slices.ContainsFunc(p.contenders, func(part string) bool { return strings.Contains(name, part) })
}

// bench is a run.
type bench struct {
	*plan
	*results

	dir string    // for the data of all servers
	log io.Writer // for whoever waits
}

// run measures, prints the tables and writes them.
func (p *plan) run(ctx context.Context, stdout, log io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "etcdstore-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{plan: p, dir: dir, log: log, results: &results{
		Machine:  describeMachine(dir),
		Settings: fmt.Sprintf("%s of %v each, after %v of warm-up", plural(p.rounds, "round"), p.load.duration, p.load.warmup),
	}}
	if p.profile != "" {
		stop, err := startProfile(p.profile)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	start := time.Now()
	for _, part := range []struct {
		wanted bool
		run    func(context.Context) error
	}{
		{p.wants("find") || p.wants("commit") || p.wants("request"), b.matrix},
		{p.wants(partDelay), b.delays},
		{p.wants(partHot), b.hot},
		{p.wants(partLeader), b.leaderChanges},
		{p.wants(partScale), b.scale},
	} {
		if !part.wanted {
			continue
		}
		if err := errors.Join(part.run(ctx), ctx.Err()); err != nil {
			return err
		}
	}
	b.progress("done in %v", time.Since(start).Round(time.Second))
	if _, err := io.WriteString(stdout, b.markdown()); err != nil {
		return err
	}
	if p.out == "" {
		return nil
	}
	return b.write(p.out)
}

// progress tells whoever waits how far the run is.
func (b *bench) progress(format string, args ...any) {
	_, _ = fmt.Fprintf(b.log, format+"\n", args...) // it is only for comfort
}

func startProfile(name string) (stop func() error, err error) {
	f, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}, nil
}
