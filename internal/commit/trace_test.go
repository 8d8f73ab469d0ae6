package commit

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/seed210be38d/etcdstore/internal/record"
)

// past is the history of a key: its version as of each revision.
type past []record.Version

func (h past) at(rev int64) *record.Version {
	v := h[rev]
	v.AsOf = rev
	return &v
}

// randomPast makes the history of a key over n revisions: puts, deletions, and revisions at which others changed.
func randomPast(rng *rand.Rand, n int) past {
	h := past{{}}
	for rev := int64(1); rev < int64(n); rev++ {
		v := h[rev-1]
		switch rng.IntN(8) {
		case 0:
			v = record.Version{}
		case 1, 2:
			if v.Rev == 0 {
				v.Created, v.Count = rev, 0
			}
			v.Rev, v.Count = rev, v.Count+1
			v.ID = record.WriteID{byte(rev), byte(rev >> 8), 1}
		}
		h = append(h, v)
	}
	return h
}

// look runs a trace over a history, n revisions at a time, and returns what it found and in how many requests.
func (h past) look(a *attempt, n int64) (proof *record.Version, requests int) {
	a.window = a.history()
	for {
		revs := a.window.next(a.base.Rev == 0, n)
		if len(revs) == 0 {
			a.conclude()
			return a.proof, requests
		}
		requests++
		versions := make([]*record.Version, len(revs))
		for i, rev := range revs {
			versions[i] = h.at(rev)
		}
		if a.base.Rev == 0 {
			a.lookForCreate(revs, versions)
		} else {
			a.lookForUpdate(revs, versions)
		}
		if requests > 10_000 {
			panic(fmt.Sprintf("no end: %+v", a.window))
		}
	}
}

// Whatever the history, the trace finds what reading it whole would: the write of an attempt, if it was applied.
func TestTrace_Random(t *testing.T) {
	for seed := range uint64(3000) {
		rng := rand.New(rand.NewPCG(5, seed))
		h := randomPast(rng, 3+rng.IntN(60))
		last := int64(len(h) - 1)
		from := rng.Int64N(last)
		base := h.at(from)
		a := &attempt{base: base, kind: put, since: from + rng.Int64N(last-from+1), current: h.at(last), record: record.Record{ID: record.WriteID{255, 255}}}
		if base.Rev != 0 && rng.IntN(3) == 0 {
			a.kind = remove
		}
		// One of the versions, perhaps, is the attempt's: one that it can have written after since.
		overtaken := from
		for overtaken <= last && h[overtaken].Rev == base.Rev {
			overtaken++
		}
		var candidates []int64
		for rev := a.since + 1; rev <= last; rev++ {
			first := h[rev].Rev == rev && h[rev].Count == 1
			if base.Rev == 0 && first || base.Rev != 0 && rev == overtaken && a.kind == put && h[rev].Rev == rev {
				candidates = append(candidates, rev)
			}
		}
		want := int64(0)
		if a.kind == remove && overtaken > a.since && overtaken <= last && h[overtaken].Rev == 0 {
			want = overtaken
		}
		if len(candidates) > 0 && rng.IntN(3) > 0 {
			want = candidates[rng.IntN(len(candidates))]
			for rev := want; rev <= last && h[rev].Rev == want; rev++ {
				h[rev].ID = a.record.ID
			}
			a.current = h.at(last)
		}
		if r := a.relate(a.current); r == atBase && base.Rev != 0 || r == ours || r == kept || r == unpreceded {
			continue // no trace is made
		}
		proof, _ := h.look(a, 1+rng.Int64N(6))
		got := int64(0)
		if proof != nil {
			got = cmpOr(proof.Rev, proof.AsOf)
		}
		if got != want {
			t.Fatalf("seed %d: found %d, want %d; %+v since %d, base %+v\n%+v", seed, got, want, a.kind, a.since, base, h)
		}
	}
}

// cmpOr returns the first that is not zero: a deletion has no revision of its own but the one it was seen at.
func cmpOr(a, b int64) int64 {
	if a != 0 {
		return a
	}
	return b
}

// However long the history of others, the version after a base is found in a few requests, and lives of a key are skipped.
func TestTrace_Requests(t *testing.T) {
	const n = 1_000_000
	h := make(past, n)
	v := record.Version{Rev: 1, Created: 1, Count: 1}
	for rev := range int64(n) {
		if rev > 700_000 && rev%2 == 0 {
			v.Rev, v.Count = rev, v.Count+1
		}
		h[rev] = v
	}
	h[0] = record.Version{}
	a := &attempt{base: h.at(1), kind: put, since: 5, current: h.at(n - 1), record: record.Record{ID: record.WriteID{9}}}
	if proof, requests := h.look(a, 120); proof != nil || requests > 4 {
		t.Errorf("an update that was not applied: %v, %d requests for %d revisions", proof, requests, n)
	}
	create := &attempt{base: h.at(0), kind: put, since: 0, current: h.at(n - 1), record: record.Record{ID: record.WriteID{9}}}
	if proof, requests := h.look(create, 120); proof != nil || requests > 1 {
		t.Errorf("a create that was not applied: %v, %d requests for one life of the key", proof, requests)
	}
}
