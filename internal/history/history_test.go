package history

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

// look runs a search over a history, n revisions at a time, and returns what it found and in how many requests.
func (h past) look(w Write, current *record.Version, n int64) (found *record.Version, requests int) {
	s := NewSearch(w, current)
	for revs := s.Next(n); len(revs) > 0; revs = s.Next(n) {
		versions := make([]*record.Version, len(revs))
		for i, rev := range revs {
			versions[i] = h.at(rev)
		}
		s.See(revs, versions)
		if requests++; requests > 10_000 {
			panic(fmt.Sprintf("no end: %+v", s))
		}
	}
	return s.Found(), requests
}

// Whatever the history, the search finds what reading it whole would: the write of an attempt, if it was applied.
func TestSearch_Random(t *testing.T) {
	for seed := range uint64(3000) {
		rng := rand.New(rand.NewPCG(5, seed))
		h := randomPast(rng, 3+rng.IntN(60))
		last := int64(len(h) - 1)
		from := rng.Int64N(last)
		base := h.at(from)
		w := Write{Base: base, ID: record.WriteID{255, 255}, Since: from + rng.Int64N(last-from+1)}
		w.Deletes = base.Rev != 0 && rng.IntN(3) == 0
		// One of the versions, perhaps, is the attempt's: one that it can have written after since.
		overtaken := from
		for overtaken <= last && h[overtaken].Rev == base.Rev {
			overtaken++
		}
		var candidates []int64
		for rev := w.Since + 1; rev <= last; rev++ {
			first := h[rev].Rev == rev && h[rev].Count == 1
			if base.Rev == 0 && first || base.Rev != 0 && rev == overtaken && !w.Deletes && h[rev].Rev == rev {
				candidates = append(candidates, rev)
			}
		}
		want := int64(0)
		if w.Deletes && overtaken > w.Since && overtaken <= last && h[overtaken].Rev == 0 {
			want = overtaken
		}
		if len(candidates) > 0 && rng.IntN(3) > 0 {
			want = candidates[rng.IntN(len(candidates))]
			for rev := want; rev <= last && h[rev].Rev == want; rev++ {
				h[rev].ID = w.ID
			}
		}
		current := h.at(last)
		if current.Rev == base.Rev && base.Rev != 0 || current.Rev != 0 && current.ID == w.ID && !w.Deletes {
			continue // that tells by itself
		}
		proof, _ := h.look(w, current, 1+rng.Int64N(6))
		got := int64(0)
		if proof != nil {
			got = cmpOr(proof.Rev, proof.AsOf)
		}
		if got != want {
			t.Fatalf("seed %d: found %d, want %d; %+v\n%+v", seed, got, want, w, h)
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
func TestSearch_Requests(t *testing.T) {
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
	w := Write{Base: h.at(1), ID: record.WriteID{9}, Since: 5}
	if found, requests := h.look(w, h.at(n-1), 120); found != nil || requests > 4 {
		t.Errorf("an update that was not applied: %v, %d requests for %d revisions", found, requests, n)
	}
	w = Write{Base: h.at(0), ID: record.WriteID{9}}
	if found, requests := h.look(w, h.at(n-1), 120); found != nil || requests > 1 {
		t.Errorf("a create that was not applied: %v, %d requests for one life of the key", found, requests)
	}
}
