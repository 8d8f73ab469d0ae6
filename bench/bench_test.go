package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestMain lets the test binary be a member of etcd, as the command is.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == memberCommand {
		exit(runMember(os.Args[2]))
	}
	os.Exit(m.Run())
}

func TestHistogram_BucketsAreNarrowAndCoverAll(t *testing.T) {
	for d := time.Duration(0); d >= 0 && d < math.MaxInt64/3; d = d*21/20 + 1 {
		i := bucket(d)
		start, end := bucketStart(i), bucketStart(i+1)
		if d < start || d >= end {
			t.Fatalf("bucket %d from %d to %d holds %d", i, start, end, d)
		}
		if end-start > 1 && float64(end-start) > float64(start)/32 {
			t.Fatalf("bucket %d from %d to %d is too wide", i, start, end)
		}
	}
	if i := bucket(math.MaxInt64); i != histogramBuckets-1 {
		t.Errorf("the longest duration is in bucket %d of %d", i, histogramBuckets)
	}
}

func TestHistogram_Quantile(t *testing.T) {
	var h, other histogram
	if got := h.quantile(0.5); got != 0 {
		t.Errorf("an empty histogram has a median of %v", got)
	}
	for i := 1; i <= 1000; i++ {
		to := &h
		if i%2 == 0 {
			to = &other
		}
		to.add(time.Duration(i) * time.Millisecond)
	}
	h.merge(&other)
	for q, want := range map[float64]time.Duration{0.5: 500 * time.Millisecond, 0.99: 990 * time.Millisecond, 1: time.Second} {
		got := h.quantile(q)
		if diff := math.Abs(float64(got-want)) / float64(want); diff > 0.005 {
			t.Errorf("quantile(%v) = %v, want %v", q, got, want)
		}
	}
	if h.max != time.Second || h.n != 1000 {
		t.Errorf("max = %v, n = %d", h.max, h.n)
	}
}

func TestLoad_ClosedLoop_CountsWhatEndsWhileItMeasures(t *testing.T) {
	failing := errors.New("failing")
	calls := []call{
		func(context.Context) error { time.Sleep(time.Millisecond); return nil },
		func(context.Context) error { time.Sleep(time.Millisecond); return failing },
		func(ctx context.Context) error { <-ctx.Done(); return nil }, // gives up at the end
	}
	s := load{warmup: 20 * time.Millisecond, duration: 60 * time.Millisecond}.closedLoop(t.Context(), calls)
	if s.calls == 0 || s.calls > 60 || s.errors == 0 || !errors.Is(s.firstErr, failing) {
		t.Errorf("calls = %d, errors = %d, first %v", s.calls, s.errors, s.firstErr)
	}
	if s.latency.n != s.calls || s.latency.max > time.Second {
		t.Errorf("the histogram has %d of %d calls, up to %v", s.latency.n, s.calls, s.latency.max)
	}
	if s.elapsed < 60*time.Millisecond {
		t.Errorf("elapsed = %v", s.elapsed)
	}
}

func TestLoad_RandomArrivals_KeepsTheRate(t *testing.T) {
	calls := make([]call, 32)
	for i := range calls {
		calls[i] = func(context.Context) error { return nil }
	}
	s := load{duration: 200 * time.Millisecond}.randomArrivals(t.Context(), calls, 2000)
	if s.calls < 200 || s.calls > 800 { // 400, give or take 20, more on a busy machine
		t.Errorf("%d calls in 200 ms at 2000 a second", s.calls)
	}
}

// testResults are two rounds of raw etcd and etcdstore.
func testResults() *results {
	r := &results{Machine: machine{CPU: "a <fast> one", Cores: 2, Go: "go1", Etcd: "3", Date: "2026-01-01"}}
	for _, what := range []string{"find", "commit"} {
		for i, callers := range []int{1, 16, 256} {
			at := cell{Part: partMatrix, What: what, Members: 3, Value: 256, Callers: callers}
			for round, load := range []float64{1, 0.5, 0.4} { // the machine gets busier
				raw := 1000 * load * float64(i+1)
				r.add(measurement{cell: at, Store: nameRaw, Round: round, PerSecond: raw, P50: 1.5, P99: 20, CPU: 100})
				r.add(measurement{cell: at, Store: nameOurs, Round: round, PerSecond: 3 * raw, P50: 0.5, P99: 10, CPU: 25})
			}
		}
	}
	r.add(measurement{cell: cell{Part: partHot, Members: 3, Callers: 64}, Store: nameLoop, PerSecond: 100})
	r.add(measurement{cell: cell{Part: partHot, Members: 3, Callers: 64}, Store: nameOurs, PerSecond: 5000})
	return r
}

func TestResults_RatioComparesRoundByRound(t *testing.T) {
	r := testResults()
	at := cell{Part: partMatrix, What: "find", Members: 3, Value: 256, Callers: 16}
	if got, ok := r.ratio(at, nameOurs, nameRaw, perSecond); !ok || math.Abs(got-3) > 1e-9 {
		t.Errorf("ratio = %v, %v", got, ok)
	}
	if got, ok := r.median(at, nameRaw, perSecond); !ok || got != 1000 {
		t.Errorf("median = %v, %v", got, ok)
	}
	if _, ok := r.ratio(at, "redis", nameRaw, perSecond); ok {
		t.Error("there is a ratio of what was not measured")
	}
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		of   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{3, 1}, 2}, {[]float64{9, 1, 2}, 2}} {
		if got, ok := median(c.of); !ok || got != c.want {
			t.Errorf("median = %v, %v, want %v", got, ok, c.want)
		}
	}
	if _, ok := median(nil); ok {
		t.Error("nothing has a median")
	}
}

func TestFormats(t *testing.T) {
	for v, want := range map[float64]string{0.123: "0.12", 9.99: "9.99", 12.34: "12.3", 123.4: "123", 1234.5: "1\u00a0234", 1234567: "1\u00a0234\u00a0567"} {
		if got := digits(v); got != want {
			t.Errorf("digits(%v) = %q, want %q", v, got, want)
		}
	}
}

func TestReport(t *testing.T) {
	md := testResults().markdown()
	for _, want := range []string{
		"| find, 3 members, 256 bytes",
		"3\u00a0000 · 3.00x", // 2 x 500 x 3: the median round
		"25.0 · 0.25x",
		"50.0x",
	} {
		if !strings.Contains(md, want) {
			t.Errorf("the report lacks %q:\n%s", want, md)
		}
	}
}

func TestChart_IsWellFormed(t *testing.T) {
	for name, r := range map[string]*results{"empty": {}, "one": testResults()} {
		chart := r.chart()
		d := xml.NewDecoder(strings.NewReader(chart))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v\n%s", name, err, chart)
			}
		}
		if strings.Contains(chart, "NaN") || strings.Contains(chart, "Inf") || strings.Contains(chart, "%!") {
			t.Errorf("%s: a number is missing:\n%s", name, chart)
		}
	}
	if n := strings.Count(testResults().chart(), "3.0x"); n != 6 {
		t.Errorf("%d ratios in the chart, want 6", n)
	}
}

func TestParsePlan(t *testing.T) {
	p, err := parsePlan([]string{"-quick", "-only", "commit,hot", "-callers", "2,8", "-duration", "10ms"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.callers) != 2 || p.load.duration != 10*time.Millisecond || !p.wants("hot") || p.wants("find") || len(p.members) != 1 {
		t.Errorf("%+v", p)
	}
	for _, bad := range [][]string{{"-only", "nothing"}, {"-callers", "0"}, {"-rounds", "0"}, {"more"}} {
		if _, err := parsePlan(bad, io.Discard); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// TestRun measures for a moment, from the command line to the files.
func TestRun(t *testing.T) {
	out := filepath.Join(t.TempDir(), "results")
	p, err := parsePlan([]string{
		"-only", "find,commit,request,hot", "-stores", "Grant,etcdstore", "-members", "1", "-callers", "1,8", "-value", "256",
		"-rounds", "1", "-duration", "100ms", "-warmup", "5ms", "-out", out,
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var stdout, log bytes.Buffer
	if err := p.run(t.Context(), &stdout, &log); err != nil {
		t.Fatalf("%v\n%s", err, &log)
	}
	raw, err := os.ReadFile(filepath.Join(out, "results.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r results
	if err := json.Unmarshal(raw, &r); err != nil {
		t.Fatal(err)
	}
	if n := len(r.Measurements); n != 3*2*3+2*3 {
		t.Errorf("%d measurements", n)
	}
	for _, m := range r.Measurements {
		if m.Errors > 0 || m.Lost > 0 || m.Part == partMatrix && m.Calls == 0 {
			t.Errorf("%+v", m)
		}
	}
	if !strings.Contains(stdout.String(), "## A hot session") {
		t.Errorf("the report is incomplete:\n%s", &stdout)
	}
	for _, name := range []string{"results.md", "results.svg"} {
		if _, err := os.Stat(filepath.Join(out, name)); err != nil {
			t.Error(err)
		}
	}
}
