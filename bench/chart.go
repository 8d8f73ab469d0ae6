package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// The chart's measures, in pixels.
const (
	panelWidth  = 270
	panelHeight = 220
	panelGapX   = 58
	panelGapY   = 88
	chartLeft   = 58
	chartTop    = 126
	chartRight  = 24
	chartBottom = 56
)

// look is how a store is drawn. The colours have enough contrast on white and on black.
var looks = map[string]struct {
	colour string
	dashes string
	width  float64
}{
	nameRaw:               {"#7d8590", "", 2},
	nameGrant:             {"#b7791f", "", 2},
	nameOurs:              {"#2f81f7", "", 3.5},
	"redis":               {"#e5534b", "", 2},
	"redis, fsync always": {"#e5534b", "5 4", 2},
	"PostgreSQL":          {"#2da06f", "", 2},
}

// chart returns the throughput of the matrix as an SVG: a row of panels for each number of members, a panel for each
// operation, a line for each store. It is for the smallest values. It has no background, and its greys can be read on a
// light page and on a dark one.
func (r *results) chart() string {
	var groups []*matrixGroup
	for _, g := range r.matrixGroups() {
		if i := slices.IndexFunc(groups, func(o *matrixGroup) bool { return o.members == g.members }); i < 0 {
			groups = append(groups, g)
		} else if g.value < groups[i].value {
			groups[i] = g
		}
	}
	columns := 0
	var cells []cell
	for _, g := range groups {
		columns = max(columns, len(g.operations()))
		cells = append(cells, g.cells...)
	}
	stores := r.stores(cells...)
	var s svg
	width := chartLeft + max(columns, 2)*(panelWidth+panelGapX) - panelGapX + chartRight
	height := chartTop + max(len(groups), 1)*(panelHeight+panelGapY) - panelGapY + chartBottom
	s.open(width, height)
	s.add(`<text class="title" x="%d" y="30">Calls a second, by concurrent callers</text>`, chartLeft-34)
	if len(groups) == 0 {
		s.add(`<text x="%d" y="52">nothing was measured</text>`, chartLeft-34)
		return s.close()
	}
	s.add(`<text x="%d" y="52">%s; logarithmic scales; below the number of callers: etcdstore as a multiple of raw etcd</text>`,
		chartLeft-34, html.EscapeString(fmt.Sprintf("sessions of %d bytes", groups[0].value)))
	r.legend(&s, stores, width)
	low, high := r.scale(cells)
	for row, g := range groups {
		for column, what := range g.operations() {
			p := panel{
				left: chartLeft + float64(column*(panelWidth+panelGapX)), top: chartTop + float64(row*(panelHeight+panelGapY)),
				low: low, high: high, title: fmt.Sprintf("%s, %s", what, strings.Split(g.title(), ",")[0]),
			}
			for _, c := range g.cells {
				if c.What == what {
					p.cells = append(p.cells, c)
				}
			}
			r.drawPanel(&s, &p, stores)
		}
	}
	return s.close()
}

// legend names the stores, in as many lines as they need.
func (r *results) legend(s *svg, stores []string, width int) {
	x, y := float64(chartLeft-34), 80.0
	for _, name := range stores {
		length := 50 + 6.8*float64(len(name))
		if x+length > float64(width) {
			x, y = chartLeft-34, y+18
		}
		l := looks[name]
		s.add(`<line x1="%.0f" x2="%.0f" y1="%.0f" y2="%.0f" stroke="%s" stroke-width="%g" stroke-dasharray="%s"/>`,
			x, x+22, y-4, y-4, l.colour, l.width, l.dashes)
		s.add(`<text x="%.0f" y="%.0f">%s</text>`, x+28, y, html.EscapeString(name))
		x += length
	}
}

// scale returns round numbers below and above all that is drawn.
func (r *results) scale(cells []cell) (low, high float64) {
	low, high = math.Inf(1), math.Inf(-1)
	for _, c := range cells {
		for _, name := range r.stores(c) {
			if v, ok := r.median(c, name, perSecond); ok && v > 0 {
				low, high = min(low, v), max(high, v)
			}
		}
	}
	if low > high {
		return 1, 10
	}
	return math.Pow(10, math.Floor(math.Log10(low)*2)/2), math.Pow(10, math.Ceil(math.Log10(high)*4)/4)
}

// panel is one diagram: callers to the right, calls a second upwards.
type panel struct {
	left, top float64
	low, high float64
	title     string
	cells     []cell
}

func (p *panel) x(i int) float64 {
	const inset = 16
	if len(p.cells) == 1 {
		return p.left + panelWidth/2
	}
	return p.left + inset + float64(i)*(panelWidth-2*inset)/float64(len(p.cells)-1)
}

func (p *panel) y(v float64) float64 {
	share := math.Log(max(v, p.low)/p.low) / math.Log(p.high/p.low)
	return p.top + panelHeight*(1-share)
}

// ticks returns 1, 2 and 5 times the powers of ten within the scale.
func (p *panel) ticks() []float64 {
	var all []float64
	for power := math.Pow(10, math.Floor(math.Log10(p.low))); power <= p.high; power *= 10 {
		for _, factor := range []float64{1, 2, 5} {
			if v := power * factor; v >= p.low*0.999 && v <= p.high*1.001 {
				all = append(all, v)
			}
		}
	}
	return all
}

func (r *results) drawPanel(s *svg, p *panel, stores []string) {
	s.add(`<text class="panel" x="%.1f" y="%.1f">%s</text>`, p.left, p.top-12, html.EscapeString(p.title))
	for _, v := range p.ticks() {
		s.add(`<line class="grid" x1="%.1f" x2="%.1f" y1="%.1f" y2="%.1f"/>`, p.left, p.left+panelWidth, p.y(v), p.y(v))
		s.add(`<text class="tick" text-anchor="end" x="%.1f" y="%.1f">%s</text>`, p.left-7, p.y(v)+4, thousands(v))
	}
	for i, c := range p.cells {
		s.add(`<text class="tick" text-anchor="middle" x="%.1f" y="%.1f">%d</text>`, p.x(i), p.top+panelHeight+18, c.Callers)
		if ratio, ok := r.ratio(c, nameOurs, nameRaw, perSecond); ok {
			s.add(`<text class="ratio" text-anchor="middle" x="%.1f" y="%.1f">%.1fx</text>`, p.x(i), p.top+panelHeight+34, ratio)
		}
	}
	for _, name := range stores {
		r.drawLine(s, p, name)
	}
}

func (r *results) drawLine(s *svg, p *panel, name string) {
	l := looks[name]
	var points []string
	var marks strings.Builder
	for i, c := range p.cells {
		v, ok := r.median(c, name, perSecond)
		if !ok || v <= 0 {
			continue
		}
		x, y := p.x(i), p.y(v)
		points = append(points, fmt.Sprintf("%.1f,%.1f", x, y))
		fmt.Fprintf(&marks, `<circle cx="%.1f" cy="%.1f" r="%.1f" fill="%s"/>`, x, y, l.width+0.5, l.colour)
	}
	if len(points) == 0 {
		return
	}
	s.add(`<polyline points="%s" fill="none" stroke="%s" stroke-width="%g" stroke-dasharray="%s" stroke-linejoin="round" stroke-linecap="round"/>`,
		strings.Join(points, " "), l.colour, l.width, l.dashes)
	s.add("%s", marks.String())
}

// thousands formats a tick: 500, 2k, 100k.
func thousands(v float64) string {
	if v >= 1000 {
		return fmt.Sprintf("%gk", v/1000)
	}
	return fmt.Sprintf("%g", v)
}

// svg is a drawing in the making.
type svg struct{ strings.Builder }

func (s *svg) open(width, height int) {
	s.add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`, width, height, width, height)
	s.add(`<title>etcdstore, side by side with other session stores</title>`)
	s.add(`<style>
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #6e7781 }
.title { font-size: 18px; font-weight: 600 }
.panel { font-size: 14px; font-weight: 600 }
.tick { font-size: 11px }
.ratio { font-size: 11px; font-weight: 600; fill: #2f81f7 }
.grid { stroke: #7d8590; stroke-opacity: .25 }
</style>`)
}

func (s *svg) add(format string, args ...any) { fmt.Fprintf(s, format+"\n", args...) }

func (s *svg) close() string {
	s.add(`</svg>`)
	return s.String()
}
