// Package etcdtest starts etcd clusters inside a test's own process, and clients
// of them whose calls can be made to fail.
//
// It wraps etcd's integration framework, which changes the working directory and
// other state of the process while a cluster is up. So a test that has a cluster
// must not run in parallel with others, and finds its own files only by absolute
// paths.
package etcdtest

import (
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	// requestTimeout bounds the helpers' own requests.
	requestTimeout = 10 * time.Second
	// electionTimeout is how long a cluster may take to agree on a leader. It takes
	// about 0.1 s; a loaded machine with the race detector on takes longer.
	electionTimeout = 30 * time.Second
)

// Main runs the tests of a package and exits. It fails the run when goroutines
// are left over at its end. Call it from TestMain.
func Main(m *testing.M) {
	// scs.New starts this for the store that a test replaces at once. It can be stopped,
	// but not without a data race.
	memstore := goleak.IgnoreAnyFunction("github.com/alexedwards/scs/v2/memstore.(*MemStore).startCleanup")
	goleak.VerifyTestMain(m, memstore)
}

// Eventually polls until cond is true, and fails tb with msg when that takes
// longer than timeout. It runs cond at least once.
func Eventually(tb testing.TB, timeout time.Duration, cond func() bool, msg string) {
	tb.Helper()
	for end := time.Now().Add(timeout); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("after %v: %s", timeout, msg)
		}
	}
}

// quiet is the testing.TB that the members of a cluster get. They log hundreds of
// lines, also after the test's end, where a Logf panics.
type quiet struct{ testing.TB }

func (quiet) Log(...any)          {}
func (quiet) Logf(string, ...any) {}

// A test that the framework skips would look like one that passed, so the ways to
// skip are failures.

func (q quiet) Skip(args ...any) {
	q.Helper()
	q.Fatal(append([]any{"the etcd framework skips this test:"}, args...)...)
}

func (q quiet) Skipf(format string, args ...any) {
	q.Helper()
	q.Fatalf("the etcd framework skips this test: "+format, args...)
}

func (q quiet) SkipNow() {
	q.Helper()
	q.Fatal("the etcd framework skips this test")
}
