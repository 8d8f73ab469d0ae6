package main

import (
	"context"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// sample is what a load has measured of the calls that it made.
type sample struct {
	calls    int // without errors
	errors   int
	firstErr error
	elapsed  time.Duration
	cpu      time.Duration // that this process used meanwhile
	latency  histogram     // of the calls without errors, and with them where the load says so
}

// load is how long to measure.
type load struct {
	warmup   time.Duration
	duration time.Duration
	// patient lets a closed loop take longer where calls are slow: its warm-up until each caller has made a call, and
	// its measurement until each has made another few, on average and within limits.
	patient bool
	// everything counts all calls, those of the warm-up and those that end late and those that fail included. It
	// is for finding the longest.
	everything bool
}

// A call is one thing that a caller does again and again. It should give up when ctx ends, if it is a loop itself; a
// request that is under way then goes on.
type call = func(ctx context.Context) error

const (
	enoughCalls = 3 // of a caller, for a measurement
	mostTimes   = 4 // the longest measurement, as a multiple of load.duration
)

const (
	phaseWarmup = iota
	phaseMeasure
	phaseOver
)

// closedLoop has each caller make its call again as soon as it is done.
func (l load) closedLoop(ctx context.Context, callers []call) sample {
	ctx, end := context.WithCancel(ctx)
	defer end()
	var phase atomic.Int32
	var done atomic.Int64
	samples := make([]sample, len(callers))
	var all sync.WaitGroup
	for i, c := range callers {
		all.Go(func() {
			s := &samples[i]
			for phase.Load() != phaseOver {
				start := time.Now()
				err := c(ctx)
				took := time.Since(start)
				done.Add(1)
				if l.everything || phase.Load() == phaseMeasure {
					s.count(took, err, l.everything)
				}
			}
		})
	}
	waitFor := func(d time.Duration, calls int) {
		until, enough := time.Now().Add(mostTimes*l.duration), done.Load()+int64(calls)
		for wait(ctx, d); l.patient && done.Load() < enough && time.Now().Before(until) && ctx.Err() == nil; {
			wait(ctx, d/10)
		}
	}
	waitFor(l.warmup, len(callers))
	start, cpu := time.Now(), clientCPU()
	phase.Store(phaseMeasure)
	waitFor(l.duration, enoughCalls*len(callers))
	phase.Store(phaseOver)
	total := sample{elapsed: time.Since(start), cpu: clientCPU() - cpu}
	end()
	all.Wait()
	for i := range samples {
		total.add(&samples[i])
	}
	return total
}

// randomArrivals has callers arrive independently of each other, at rate a second on average: a Poisson process. A
// caller takes one of the calls that nobody makes at the moment; where all are taken, it goes away.
func (l load) randomArrivals(ctx context.Context, calls []call, rate float64) sample {
	free := make(chan call, len(calls))
	for _, c := range calls {
		free <- c
	}
	var (
		mu    sync.Mutex
		total sample
		all   sync.WaitGroup
	)
	begin := time.Now()
	measured := begin.Add(l.warmup)
	over := measured.Add(l.duration)
	cpu := time.Duration(0)
	for next := begin; next.Before(over) && ctx.Err() == nil; {
		pause(time.Until(next))
		next = next.Add(time.Duration(rand.ExpFloat64() / rate * float64(time.Second)))
		counts := time.Now().After(measured)
		if counts && cpu == 0 {
			cpu = clientCPU()
		}
		select {
		case c := <-free:
			all.Go(func() {
				start := time.Now()
				err := c(ctx)
				took := time.Since(start)
				if counts {
					mu.Lock()
					defer mu.Unlock()
					total.count(took, err, false)
				}
				free <- c
			})
		default:
		}
	}
	total.elapsed, total.cpu = time.Since(measured), clientCPU()-cpu
	all.Wait()
	return total
}

// wait waits for d or until ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (s *sample) count(took time.Duration, err error, everything bool) {
	if err != nil {
		s.errors++
		if s.firstErr == nil {
			s.firstErr = err
		}
		if !everything {
			return
		}
	} else {
		s.calls++
	}
	s.latency.add(took)
}

func (s *sample) add(other *sample) {
	s.calls += other.calls
	s.errors += other.errors
	if s.firstErr == nil {
		s.firstErr = other.firstErr
	}
	s.latency.merge(&other.latency)
}

// perSecond returns how many calls succeeded a second.
func (s *sample) perSecond() float64 { return float64(s.calls) / s.elapsed.Seconds() }

// cpuPerCall returns how much of the client's processor time a call took.
func (s *sample) cpuPerCall() time.Duration {
	if s.calls == 0 {
		return 0
	}
	return s.cpu / time.Duration(s.calls)
}

// histogram counts durations in buckets whose width is 1/32 of what they hold, at most. The zero histogram is empty.
type histogram struct {
	counts [histogramBuckets]uint32
	n      int
	max    time.Duration
}

const (
	histogramBits    = 5
	histogramBuckets = (64 - histogramBits) << histogramBits
)

// bucket returns the bucket of a duration: the position of its highest bit, and the five bits that follow.
func bucket(d time.Duration) int {
	v := uint64(max(d, 0))
	shift := max(bits.Len64(v)-histogramBits-1, 0)
	return shift<<histogramBits + int(v>>shift)
}

// bucketStart returns the shortest duration in a bucket.
func bucketStart(i int) time.Duration {
	shift := max(i>>histogramBits-1, 0)
	return time.Duration(i-shift<<histogramBits) << shift
}

func (h *histogram) add(d time.Duration) {
	h.counts[bucket(d)]++
	h.n++
	h.max = max(h.max, d)
}

func (h *histogram) merge(other *histogram) {
	if other.n == 0 {
		return
	}
	for i, n := range other.counts {
		h.counts[i] += n
	}
	h.n += other.n
	h.max = max(h.max, other.max)
}

// quantile returns the duration that a share of q of all is at most, taking those in a bucket as evenly spread.
func (h *histogram) quantile(q float64) time.Duration {
	rank := q * float64(h.n)
	for i, n := range h.counts {
		if n := float64(n); rank > n || n == 0 {
			rank -= n
			continue
		}
		start, end := bucketStart(i), bucketStart(i+1)
		return min(start+time.Duration(rank/float64(n)*float64(end-start)), h.max)
	}
	return h.max
}
