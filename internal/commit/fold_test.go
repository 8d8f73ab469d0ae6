package commit

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcdfake"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// function is a change.
type function func(cur State) (Write, error)

func (f function) Next(cur State) (Write, error) { return f(cur) }
func (function) Direct(State) bool               { return true }
func (function) Prepare()                        {}

// keeping leaves a value as it is.
func keeping(cur State) (Write, error) { return Write{Value: cur.Value, Also: cur.Also}, nil }

var errAbsent = errors.New("absent")

// existing appends to a value, and fails where there is none.
func existing(s string) Change {
	return function(func(cur State) (Write, error) {
		if cur.Value == nil {
			return Write{}, errAbsent
		}
		return appending{s: s}.Next(cur)
	})
}

// A change sees the revision that holds the value, and none where that was made in the same fold:
// whoever has read the revision would else take the value for what it has read, and overwrite it.
func TestFold_Revision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.must("a", appending{s: "0"})
		rev := b.f.Revision()
		release := b.stall()
		var saw []int64
		look := function(func(cur State) (Write, error) {
			saw = append(saw, cur.Rev)
			return keeping(cur)
		})
		results := []func() error{
			b.startFrom("a", decodeKey(b, "a", 0), look),
			b.start("a", time.Minute, look),
			b.start("a", time.Minute, appending{s: "1"}),
			b.start("a", time.Minute, look),
		}
		release()
		for i, result := range results {
			if err := result(); err != nil {
				t.Errorf("call %d: %v", i, err)
			}
		}
		if len(saw) != 3 || saw[0] != rev || saw[1] != rev || saw[2] != 0 {
			t.Errorf("they saw the revisions %v, want %d twice, and none", saw, rev)
		}
		b.want("a", "0", "01")
	})
}

// That there is no value for a change because it has ended is a guess, as others may have moved its
// expiry: the failure counts only once etcd has confirmed that.
func TestFold_EndedIsAGuess(t *testing.T) {
	for _, moved := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			other := newBenchOn(t, b.f)
			b.must("a", appending{s: "0"}) // for an hour
			known := decodeKey(b, "a", 0)
			time.Sleep(30 * time.Minute)
			if moved {
				other.must("a", appending{s: "9"})
			}
			time.Sleep(40 * time.Minute)
			err := b.startFrom("a", known, existing("1"))()
			if moved {
				if err != nil {
					t.Errorf("over a value that lives: %v", err)
				}
				b.want("a", "0", "09", "091")
			} else {
				if !errors.Is(err, errAbsent) {
					t.Errorf("over a value that has ended: %v", err)
				}
				b.want("a", "0")
			}
		})
	}
}

// A value that has ended when it is made is a deletion, and nothing where there is nothing.
func TestFold_MadeToEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		ended := function(func(cur State) (Write, error) {
			return Write{Value: &text{s: "E", ends: cur.Now}, Also: entriesOf("E")}, nil
		})
		for range 2 {
			b.must("a", appending{s: "A"})
			b.must("a", ended)
			b.must("a", ended)
		}
		b.want("a", "A", "", "A", "")
		b.wantEntries("ended", map[string]int{})
	})
}

// Deleting what is not there ends no fold: what is made after it goes with it.
func TestFold_DeletedNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		release := b.stall()
		results := []func() error{
			b.start("a", time.Minute, Delete{}),
			b.start("a", time.Minute, appending{s: "1"}),
			b.start("a", time.Minute, appending{s: "2"}),
		}
		b.sends("a")
		release()
		for i, result := range results {
			if err := result(); err != nil {
				t.Errorf("call %d: %v", i, err)
			}
		}
		if n := b.sends("a"); n != 1 {
			t.Errorf("%d attempts, want one", n)
		}
		b.want("a", "12")
	})
}

// A call of an attempt that would not have written its change, even if it was applied, is told that
// nothing was written, though the outcome of the attempt is unknown.
func TestSettle_NothingToBeUnknown(t *testing.T) {
	for name, c := range map[string]struct {
		change Change
		after  time.Duration // the value has an hour
	}{
		"keeps the value":                   {function(keeping), 0},
		"clears what has ended, to be made": {appending{s: "1"}, 2 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.must("a", appending{s: "0"})
				known := decodeKey(b, "a", 0)
				time.Sleep(c.after)
				b.f.Intercept(func(r *etcdfake.Request) error {
					if carries("a")(r) {
						return etcdfake.ErrLost
					}
					return r.Apply()
				})
				err := b.startFrom("a", known, c.change)()
				if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnknown) {
					t.Error(err)
				}
				b.want("a", "0")
			})
		})
	}
}

// Where it cannot be found out what became of an attempt, that is told to the calls whose changes it
// wrote. One that failed runs again, and is told what comes of that.
func TestSettle_GivenUpRunsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		other := newBenchOn(t, b.f)
		b.must("a", appending{s: "0"})
		release := b.stall()
		own := errors.New("own")
		writes := b.start("a", time.Minute, appending{s: "1"})
		fails := b.startFrom("a", decodeKey(b, "a", 0), function(func(State) (Write, error) {
			return Write{}, own
		}))
		b.f.Script(carries("a"), func(r *etcdfake.Request) error {
			_ = r.Apply()
			other.do("a", appending{s: "9"})
			b.f.Compact(b.f.Revision())
			return etcdfake.ErrLost
		})
		release()
		if err := writes(); !errors.Is(err, ErrUnknown) {
			t.Errorf("the one that wrote: %v", err)
		}
		if err := fails(); !errors.Is(err, own) {
			t.Errorf("the one that failed: %v", err)
		}
		b.want("a", "0", "01", "019")
	})
}

// The seat of a create is left where it was refused, and kept where it may have been applied.
func TestSettle_Seats(t *testing.T) {
	for name, c := range map[string]struct {
		fate func(r *etcdfake.Request) error
		want int // beside the one of the bench
	}{
		"refused":               {etcdfake.Answer(rpctypes.ErrGRPCPermissionDenied), 0},
		"applied, and unknown":  {etcdfake.Lose, 1},
		"not applied, but sent": {etcdfake.Drop, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.f.Intercept(func(r *etcdfake.Request) error {
					switch {
					case carries("a")(r):
						return c.fate(r)
					case isFence(r):
						return etcdfake.ErrLost
					}
					return r.Apply()
				})
				if err := b.start("a", time.Second, appending{s: "1"})(); err == nil {
					t.Error("it succeeded")
				}
				if _, n := b.leases.Count(); n != 1+c.want {
					t.Errorf("%d seats are taken, want %d", n, 1+c.want)
				}
			})
		})
	}
}

// What an attempt has written is told as the value that its change has made, and not as one that
// was decoded, also where it was found in etcd.
func TestSettle_FoundIsWhatWasMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		made := &text{s: "1", ends: record.ToMillis(time.Now().Add(time.Hour))}
		b.f.Script(carries("a"), etcdfake.Lose)
		stored, err := b.Do(t.Context(), time.Now().Add(time.Minute), Call{
			Key:    "a",
			Change: function(func(State) (Write, error) { return Write{Value: made}, nil }),
		})
		if err != nil {
			t.Fatal(err)
		}
		if stored.Value != made || stored.Rev != b.f.At("a", b.f.Revision()).ModRevision {
			t.Errorf("stored as %+v", stored)
		}
	})
}

// Where an attempt was found in the history, what comes next is folded over what the key holds by
// now: it is sent once.
func TestSettle_NextOverWhatIsThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		other := newBenchOn(t, b.f)
		b.must("a", appending{s: "0"})
		next := make(chan struct{})
		b.f.Script(carries("a"), etcdfake.Pass, func(r *etcdfake.Request) error {
			_ = r.Apply()
			other.do("a", appending{s: "9"})
			go func() {
				defer close(next)
				b.do("a", appending{s: "2"})
			}()
			b.sends("a")
			return etcdfake.ErrLost
		})
		b.must("a", appending{s: "1"})
		<-next
		if n := b.sends("a"); n != 2 { // the first again, and the next
			t.Errorf("sent %d times, want 2", n)
		}
		b.want("a", "0", "01", "019", "0192")
	})
}
