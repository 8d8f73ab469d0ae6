package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// markdown returns all tables.
func (r *results) markdown() string {
	var d document
	d.text("# Results")
	d.text("Made by `go run .` in `bench/`; [README.md](../README.md) says what is measured and how to read it.")
	r.writeMachine(&d)
	r.writeSummary(&d)
	r.writeMatrix(&d)
	r.writeDelay(&d)
	r.writeHot(&d)
	r.writeLeader(&d)
	r.writeScale(&d)
	if len(r.Notes) > 0 {
		d.text("## Notes")
		d.text("- %s", strings.Join(r.Notes, "\n- "))
	}
	return d.String()
}

// document is markdown in the making.
type document struct{ strings.Builder }

// text adds a paragraph.
func (d *document) text(format string, args ...any) {
	if d.Len() > 0 {
		d.WriteString("\n")
	}
	fmt.Fprintf(d, format+"\n", args...)
}

// table adds a table, padded so that it can be read as it is. The first column is text, the others are numbers.
func (d *document) table(header []string, rows [][]string) {
	width := make([]int, len(header))
	for _, row := range append([][]string{header}, rows...) {
		for i, s := range row {
			width[i] = max(width[i], utf8.RuneCountInString(s), 3)
		}
	}
	line := func(row []string) {
		for i, s := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(s))
			if i == 0 {
				d.WriteString("| " + s + pad)
			} else {
				d.WriteString(" | " + pad + s)
			}
		}
		d.WriteString(" |\n")
	}
	d.WriteString("\n")
	line(header)
	for i, w := range width {
		if i == 0 {
			d.WriteString("|:" + strings.Repeat("-", w+1))
		} else {
			d.WriteString("|" + strings.Repeat("-", w+1) + ":")
		}
	}
	d.WriteString("|\n")
	for _, row := range rows {
		line(row)
	}
}

func (r *results) writeMachine(d *document) {
	m := &r.Machine
	lines := []string{
		fmt.Sprintf("- %s, %d cores, shared by the clients and all servers; %.0f GiB of memory", m.CPU, m.Cores, float64(m.MemoryMB)/1024),
		fmt.Sprintf("- a durable append of 4 KiB takes %s", m.Fsync),
		fmt.Sprintf("- %s, %s, etcd %s", m.Kernel, m.Go, m.Etcd),
	}
	if m.Redis != "" {
		lines[2] += ", redis " + m.Redis
	}
	if m.Postgres != "" {
		lines[2] += ", PostgreSQL " + m.Postgres
	}
	lines = append(lines, fmt.Sprintf("- %s; %s, of which the median counts", m.Date, r.Settings))
	d.text("%s", strings.Join(lines, "\n"))
}

// writeSummary adds what most readers want: etcdstore's throughput as a multiple of raw etcd's.
func (r *results) writeSummary(d *document) {
	groups := r.matrixGroups()
	if len(groups) == 0 {
		return
	}
	d.text("## etcdstore, as a multiple of raw etcd")
	d.text("Calls a second, by the number of callers. A find is compared with a Get, a commit with a compare-and-swap, " +
		"and a request, which finds and commits, with both. The last rows compare with a store that grants a lease for each commit.")
	var callers []int
	for _, g := range groups {
		for _, c := range g.cells {
			if !slices.Contains(callers, c.Callers) {
				callers = append(callers, c.Callers)
			}
		}
	}
	slices.Sort(callers)
	header := []string{"callers"}
	for _, n := range callers {
		header = append(header, strconv.Itoa(n))
	}
	var rows [][]string
	add := func(g *matrixGroup, what, base, label string) {
		row := []string{label}
		for _, n := range callers {
			at := cell{Part: partMatrix, What: what, Members: g.members, Value: g.value, Callers: n}
			row = append(row, times(r.ratio(at, nameOurs, base, perSecond)))
		}
		rows = append(rows, row)
	}
	for _, g := range groups {
		for _, what := range g.operations() {
			add(g, what, nameRaw, what+", "+g.title())
		}
	}
	for _, g := range groups {
		if slices.Contains(g.operations(), "commit") && slices.Contains(r.stores(g.cells...), nameGrant) {
			add(g, "commit", nameGrant, "commit / "+nameGrant+", "+g.title())
		}
	}
	d.table(header, rows)
}

// matrixGroup is the part of the matrix with one number of members and one size of values.
type matrixGroup struct {
	members, value int
	cells          []cell
}

func (r *results) matrixGroups() []*matrixGroup {
	var groups []*matrixGroup
	for _, c := range r.cells(partMatrix) {
		i := slices.IndexFunc(groups, func(g *matrixGroup) bool { return g.members == c.Members && g.value == c.Value })
		if i < 0 {
			i = len(groups)
			groups = append(groups, &matrixGroup{members: c.Members, value: c.Value})
		}
		groups[i].cells = append(groups[i].cells, c)
	}
	return groups
}

func (g *matrixGroup) title() string {
	members := fmt.Sprintf("%d members", g.members)
	if g.members == 1 {
		members = "1 member"
	}
	return fmt.Sprintf("%s, %d bytes", members, g.value)
}

func (g *matrixGroup) operations() []string {
	var all []string
	for _, c := range g.cells {
		if !slices.Contains(all, c.What) {
			all = append(all, c.What)
		}
	}
	return all
}

func (r *results) writeMatrix(d *document) {
	for _, g := range r.matrixGroups() {
		d.text("## %s", strings.ToUpper(g.title()[:1])+g.title()[1:])
		stores := r.stores(g.cells...)
		grid := func(of func(c cell, store string) string) {
			var rows [][]string
			for _, c := range g.cells {
				row := []string{fmt.Sprintf("%s, %s", c.What, plural(c.Callers, "caller"))}
				for _, s := range stores {
					row = append(row, of(c, s))
				}
				rows = append(rows, row)
			}
			d.table(append([]string{""}, stores...), rows)
		}
		d.text("Calls a second, and as a multiple of raw etcd:")
		grid(func(c cell, store string) string { return r.compared(c, store, perSecond, grouped) })
		d.text("Time of a call, median / 99th percentile, in milliseconds:")
		grid(func(c cell, store string) string {
			middle, ok := r.median(c, store, p50)
			if !ok {
				return "–"
			}
			late, _ := r.median(c, store, p99)
			return digits(middle) + " / " + digits(late)
		})
		d.text("The client's processor time for a call, in microseconds, and as a multiple of raw etcd's:")
		grid(func(c cell, store string) string { return r.compared(c, store, cpuPerCall, digits) })
	}
}

// compared returns a figure, and behind it what multiple of raw etcd's that is.
func (r *results) compared(c cell, store string, f figure, format func(float64) string) string {
	v, ok := r.median(c, store, f)
	if !ok {
		return "–"
	}
	if store == nameRaw {
		return format(v)
	}
	return format(v) + " · " + times(r.ratio(c, store, nameRaw, f))
}

func (r *results) writeDelay(d *document) {
	cells := r.cells(partDelay)
	if len(cells) == 0 {
		return
	}
	d.text("## A network in between")
	d.text("%d callers a second arrive at random; a proxy before each of three members delays every round trip. "+
		"Median time of a call in milliseconds, and as a multiple of raw etcd's:", arrivals)
	stores := r.stores(cells...)
	var rows [][]string
	for _, c := range cells {
		row := []string{fmt.Sprintf("%s, %g ms", c.What, c.DelayMS)}
		for _, s := range stores {
			row = append(row, r.compared(c, s, p50, digits))
		}
		rows = append(rows, row)
	}
	d.table(append([]string{""}, stores...), rows)
}

func (r *results) writeHot(d *document) {
	cells := r.cells(partHot)
	if len(cells) == 0 {
		return
	}
	d.text("## A hot session")
	d.text("All callers change one session at once, each a key of its own; no change may be lost. Three members.")
	var rows [][]string
	for _, c := range cells {
		best := math.Inf(-1)
		for _, s := range r.stores(c) {
			if v, _ := r.median(c, s, perSecond); s != nameOurs {
				best = max(best, v)
			}
		}
		for _, s := range r.stores(c) {
			rate, _ := r.median(c, s, perSecond)
			middle, _ := r.median(c, s, p50)
			late, _ := r.median(c, s, p99)
			lost, _ := r.sum(c, s, func(m *measurement) float64 { return float64(m.Lost) })
			failed, _ := r.sum(c, s, errorCount)
			rows = append(rows, []string{
				fmt.Sprintf("%d callers, %s", c.Callers, s), grouped(rate), times(rate/best, best > 0),
				digits(middle) + " / " + digits(late), grouped(lost), grouped(failed),
			})
		}
	}
	d.table([]string{"", "changes a second", "of the best loop", "median / 99th, ms", "lost", "errors"}, rows)
}

func (r *results) writeLeader(d *document) {
	cells := r.cells(partLeader)
	if len(cells) == 0 {
		return
	}
	d.text("## Another leader")
	d.text("%d callers commit while the leader of three members changes; a call has %v. Sums and maxima over all rounds. "+
		"Before it can elect another leader, a cluster waits for the election timeout, and up to twice of it.",
		leaderCallers, leaderTimeout)
	var rows [][]string
	for _, c := range cells {
		for _, s := range r.stores(c) {
			failed, _ := r.sum(c, s, errorCount)
			_, worst := r.sum(c, s, longest)
			rows = append(rows, []string{c.What, s, grouped(failed), digits(worst / 1000)})
		}
	}
	d.table([]string{"", "store", "errors", "longest call, s"}, rows)
}

func (r *results) writeScale(d *document) {
	cells := r.cells(partScale)
	if len(cells) == 0 {
		return
	}
	d.text("## Many sessions")
	d.text("One member, %d callers, each session committed once. Sessions without leases are plain keys, written a "+
		"hundred at a time: what the sessions take by themselves.", scaleCallers)
	mib := func(n int64) string { return grouped(float64(n) / (1 << 20)) }
	var rows [][]string
	for _, m := range r.Measurements {
		if m.Part == partScale {
			rows = append(rows, []string{
				m.What + ", " + m.Store, digits(m.Seconds), grouped(float64(m.Leases)), mib(m.Heap), mib(m.Resident),
			})
		}
	}
	d.table([]string{"", "seconds", "leases", "member's live heap, MiB", "member's resident memory, MiB"}, rows)
}

// times formats a ratio.
func times(v float64, ok bool) string {
	if !ok {
		return "–"
	}
	return digits(v) + "x"
}

// digits formats a number with as many decimals as say something.
func digits(v float64) string {
	switch {
	case v >= 100:
		return grouped(v)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 2, 64)
}

// grouped formats a whole number with its thousands set apart.
func grouped(v float64) string {
	s := strconv.FormatFloat(v, 'f', 0, 64)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u00a0" + s[i:]
	}
	return s
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}
