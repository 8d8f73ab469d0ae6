package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// cell is one thing that is compared between stores.
type cell struct {
	Part    string  `json:"part"`
	What    string  `json:"what"`
	Members int     `json:"members"`
	Value   int     `json:"value_bytes,omitempty"`
	Callers int     `json:"callers,omitempty"`
	DelayMS float64 `json:"delay_ms,omitempty"`
}

// The parts of a run.
const (
	partMatrix = "matrix"
	partDelay  = "delay"
	partHot    = "hot"
	partLeader = "leader"
	partScale  = "scale"
)

// measurement is what was measured of one store in one round.
type measurement struct {
	cell

	Store string `json:"store"`
	Round int    `json:"round"`

	Calls     int     `json:"calls"`
	Errors    int     `json:"errors"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"calls_per_second"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	Max       float64 `json:"max_ms"`
	CPU       float64 `json:"client_cpu_us_per_call"`

	Lost     int   `json:"lost_updates,omitempty"`
	Leases   int   `json:"leases,omitempty"`
	Resident int64 `json:"members_resident_bytes,omitempty"`
	Heap     int64 `json:"members_live_heap_bytes,omitempty"`
}

func newMeasurement(c cell, store string, round int, s *sample) measurement {
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	return measurement{
		cell: c, Store: store, Round: round,
		Calls:     s.calls,
		Errors:    s.errors,
		Seconds:   s.elapsed.Seconds(),
		PerSecond: s.perSecond(),
		P50:       ms(s.latency.quantile(0.5)),
		P99:       ms(s.latency.quantile(0.99)),
		Max:       ms(s.latency.max),
		CPU:       float64(s.cpuPerCall()) / float64(time.Microsecond),
	}
}

// results is all that a run has found out.
type results struct {
	Machine      machine       `json:"machine"`
	Settings     string        `json:"settings"`
	Notes        []string      `json:"notes"`
	Measurements []measurement `json:"measurements"`
}

// note adds a note for the reader, once.
func (r *results) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(r.Notes, n) {
		r.Notes = append(r.Notes, n)
	}
}

func (r *results) add(m measurement) { r.Measurements = append(r.Measurements, m) }

// cells returns the cells of a part, in the order in which they were measured.
func (r *results) cells(part string) []cell {
	var all []cell
	for _, m := range r.Measurements {
		if m.Part == part && !slices.Contains(all, m.cell) {
			all = append(all, m.cell)
		}
	}
	return all
}

// stores returns the stores that were measured in any of these cells, in order.
func (r *results) stores(cells ...cell) []string {
	var all []string
	for _, m := range r.Measurements {
		if slices.Contains(cells, m.cell) && !slices.Contains(all, m.Store) {
			all = append(all, m.Store)
		}
	}
	return all
}

// figure is one of the numbers of a measurement.
type figure func(m *measurement) float64

func perSecond(m *measurement) float64  { return m.PerSecond }
func p50(m *measurement) float64        { return m.P50 }
func p99(m *measurement) float64        { return m.P99 }
func longest(m *measurement) float64    { return m.Max }
func cpuPerCall(m *measurement) float64 { return m.CPU }
func errorCount(m *measurement) float64 { return float64(m.Errors) }

// byRound returns a figure by round.
func (r *results) byRound(c cell, store string, f figure) map[int]float64 {
	all := make(map[int]float64)
	for i := range r.Measurements {
		if m := &r.Measurements[i]; m.cell == c && m.Store == store {
			all[m.Round] = f(m)
		}
	}
	return all
}

// median returns the median of a figure over the rounds, and whether there is one.
func (r *results) median(c cell, store string, f figure) (float64, bool) {
	var all []float64
	for _, v := range r.byRound(c, store, f) {
		all = append(all, v)
	}
	return median(all)
}

// ratio returns the median over the rounds of what a store reached as a multiple of what base did in the same round,
// and whether there is one. Rounds are compared each by itself since what else a machine does changes between them.
func (r *results) ratio(c cell, store, base string, f figure) (float64, bool) {
	bases := r.byRound(c, base, f)
	var all []float64
	for round, v := range r.byRound(c, store, f) {
		if b := bases[round]; b > 0 {
			all = append(all, v/b)
		}
	}
	return median(all)
}

// sum returns the sum of a figure over the rounds, and most its largest.
func (r *results) sum(c cell, store string, f figure) (sum, most float64) {
	for _, v := range r.byRound(c, store, f) {
		sum, most = sum+v, max(most, v)
	}
	return sum, most
}

func median(v []float64) (float64, bool) {
	n := len(v)
	if n == 0 {
		return 0, false
	}
	slices.Sort(v)
	return (v[(n-1)/2] + v[n/2]) / 2, true
}

// write writes the tables, the chart and the raw numbers into a directory.
func (r *results) write(dir string) error {
	raw, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for name, content := range map[string]string{
		"results.md":   r.markdown(),
		"results.json": string(raw) + "\n",
		"results.svg":  r.chart(),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
