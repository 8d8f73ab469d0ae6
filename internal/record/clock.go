package record

import (
	"sync/atomic"
	"time"
)

// clockSlack is by how much the wall clock may fall behind without being followed.
const clockSlack = time.Minute

// Clock is the store's notion of now. It decides expiry.
//
// The wall clock decides, since scs computes expiries from it. But it does not go back by small
// steps, as NTP, a machine that was resumed, or a leap second make: while the wall clock lags
// behind what now has returned by a minute at most, now stands still, so what this process has
// called expired stays expired. Early ends only a session that is made meanwhile and is to end
// before the wall clock has caught up.
//
// A larger step back means that the clock was wrong before, and is followed at once. Sessions that
// seemed to have expired are there again, as they should have been all the time: reading an expiry
// deletes nothing, so a clock that jumps ahead hides sessions while it is wrong, and etcd keeps
// them.
//
// Rejected:
//
//   - A monotonic clock, anchored when the store is made: a clock that was wrong then stays wrong
//     for as long as the process lives.
//   - A high-water mark without bound: until the wall clock has caught up with it, in a day or in a
//     year, every new session of the application, whose expiry scs takes from the corrected clock,
//     would have expired when it is made, and the others would be hidden.
type Clock struct {
	Wall func() time.Time
	last atomic.Int64 // what now returned last, in Unix milliseconds
}

// WallTime returns the time of the wall clock as it is, for leases: what one granted while that was
// ahead is said to last does not hold once it is set right, however small the step.
func (c *Clock) WallTime() Millis { return ToMillis(c.Wall()) }

// Now returns the time.
func (c *Clock) Now() Millis {
	for {
		// The wall clock is read after last, and last is moved only if it is as it was: a reading
		// that another goroutine has overtaken does not look like a step back, however long its
		// goroutine did not run.
		last := Millis(c.last.Load())
		wall := ToMillis(c.Wall())
		if wall <= last && last.Since(wall) <= clockSlack {
			return last
		}
		if c.last.CompareAndSwap(int64(last), int64(wall)) {
			return wall
		}
	}
}
