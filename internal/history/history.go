// Package history finds out from the history of a key what became of a write.
package history

import "github.com/seed210be38d/etcdstore/internal/record"

// Write is a write to a key whose answer was lost, or whose compare has failed since others wrote.
type Write struct {
	Base    *record.Version // what it compares
	ID      record.WriteID  // what its version carries
	Deletes bool            // it has no version: what it leaves is an absent key
	Since   int64           // a revision that etcd had before it was sent
}

// Search looks for the version that a write has made. A watch would tell as well, but etcd's
// watchers catch up with history only every 100 ms, and do not tell where it ends if nothing more
// happens.
//
// A write that compares a revision has made, if it was applied, the version right after its base.
// As of each revision the key either still is at the base or is not any more, and so the one at
// which it was overtaken is found as in a sorted list: a request of n reads leaves an n-th of the
// revisions.
//
// A write that compares an absent key has no such order: its key may have come and gone several
// times. From the end to the start, the first version of each life of the key is looked at, which
// says when that began; and where the key was absent, every revision until it was not, n in a
// request.
//
// For a delete, the write is that the base was followed by nothing: if others did that, the delete
// may as well have come right before, and deleting once more what was created since would be to do
// it twice.
type Search struct {
	write Write

	// What is left to look through: revisions after from, up to to.
	from, to int64
	at       *record.Version // what the key held as of to, where that is known
	born     int64           // the start of the life that ends there, which is looked at next; 0: none
	unsure   bool            // that the key was at the base as of from has to be looked at yet

	found *record.Version
}

// NewSearch returns a search up to current, which is what the key held when it was read last.
func NewSearch(w Write, current *record.Version) *Search {
	s := &Search{write: w, from: w.Since, to: current.AsOf, at: current, unsure: w.Since > w.Base.AsOf}
	if current.Rev != 0 {
		s.to = current.Rev
	}
	if s.creates() {
		s.skip(current)
	}
	return s
}

// creates reports whether the write compares an absent key.
func (s *Search) creates() bool { return s.write.Base.Rev == 0 }

// skip has what is left end with the life of the key that v is of, or before that where v is its
// first version and no other needs to be looked at.
func (s *Search) skip(v *record.Version) {
	switch {
	case v.Rev == 0:
	case v.Created <= s.from:
		s.to = s.from // it was there before the write was sent, and has been ever since
	case v.Count == 1:
		s.to = v.Created - 1
	default:
		s.born = v.Created
	}
}

// Next returns the revisions to look at, n at most, in ascending order; none where everything was
// looked at.
func (s *Search) Next(n int64) (revs []int64) {
	switch {
	case s.creates() && s.to <= s.from:
	case s.creates() && s.born != 0:
		revs = append(revs, s.born)
	case s.creates():
		for rev := max(s.from+1, s.to-n+1); rev <= s.to; rev++ {
			revs = append(revs, rev)
		}
	default:
		if s.unsure {
			revs = append(revs, s.from)
		}
		between := s.to - s.from - 1
		looks := min(between, max(n-int64(len(revs)), 1))
		for i := range looks {
			revs = append(revs, s.from+1+i*between/looks)
		}
	}
	return revs
}

// See takes what the key held as of the revisions that Next has returned.
func (s *Search) See(revs []int64, versions []*record.Version) {
	if s.creates() {
		s.seeLives(revs, versions)
	} else {
		s.seeOvertaken(revs, versions)
	}
}

// seeOvertaken narrows what is left to the revisions between which the base was overtaken.
func (s *Search) seeOvertaken(revs []int64, versions []*record.Version) {
	s.unsure = false
	for i, v := range versions {
		if v.Rev != s.write.Base.Rev {
			s.to, s.at = revs[i], v
			if s.to <= s.from {
				s.at = nil // before the first send
			}
			return
		}
		s.from = revs[i]
	}
}

// seeLives narrows what is left from its end.
func (s *Search) seeLives(revs []int64, versions []*record.Version) {
	if s.born != 0 {
		s.to, s.born = s.born-1, 0
	}
	for i := len(versions) - 1; i >= 0; i-- {
		v := versions[i]
		if v.Rev != 0 && v.ID == s.write.ID {
			s.found, s.to = v, s.from
			return
		}
		if v.Rev != 0 && v.Created <= s.to {
			s.to = revs[i]
			s.skip(v)
			return
		}
	}
	s.to = min(s.to, revs[0]-1)
}

// Found returns the version that the write has made, nil if there is none, once Next returns
// nothing.
func (s *Search) Found() *record.Version {
	switch v := s.at; {
	case s.creates():
		return s.found
	case v != nil && s.write.Deletes && v.Rev == 0, v != nil && !s.write.Deletes && v.Rev != 0 && v.ID == s.write.ID:
		return v
	}
	return nil
}
