package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alexedwards/scs/v2"
	"github.com/anishathalye/porcupine"

	"github.com/seed210be38d/etcdstore/internal/etcd"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
)

// counted counts the writes of sessions that end in an open outcome.
type counted struct {
	etcd.API
	unknown atomic.Int64
}

func (c *counted) Do(ctx context.Context, op clientv3.Op) (clientv3.OpResponse, error) {
	resp, err := c.API.Do(ctx, op)
	if err != nil && writesSessions(op) && etcd.Classify(clientv3.ContextError(ctx, err)) == etcd.Unknown {
		c.unknown.Add(1)
	}
	return resp, err
}

// writesSessions reports whether an operation carries attempts: one, or several as nested Txns. Reads have no compares.
func writesSessions(op clientv3.Op) bool {
	if !op.IsTxn() {
		return false
	}
	cmps, then, _ := op.Txn()
	return len(cmps) > 0 || slices.ContainsFunc(then, clientv3.Op.IsTxn)
}

// told is what a call was told.
type told int

const (
	toldOK told = iota
	toldConflict
	toldGone
	toldNo // any other error that says that nothing was written
	toldUnknown
)

type callKind int

const (
	callFind callKind = iota
	callCommit
	callUpdate
	callDelete
)

// faultCall is one call of the fault run. A commit or an update adds a key of its own to the session. So no two calls
// change the same key, and the session's history shows whether, and when, a call took effect, and that nothing that was
// added gets lost until the session is deleted.
type faultCall struct {
	kind  callKind
	store *EtcdStore
	token string
	key   string // of a commit or an update
	found string // a find: the state that it returned
	based *faultCall
	told  told
	err   error

	call, returns int64 // when
	begin, end    int64 // revisions that etcd had when the call began, and what it was told is no later than
}

func (c *faultCall) String() string {
	kind := [...]string{"find", "commit", "update", "delete"}[c.kind]
	return fmt.Sprintf("%s of %s in %s, told %v, in revisions %d to %d", kind, c.key, c.token, c.err, c.begin, c.end)
}

const faultTokens, faultWriters = 60, 8

type faultRun struct {
	cluster *etcdtest.Cluster
	admin   *clientv3.Client
	counts  []*counted
	stores  []*EtcdStore
	start   time.Time
	serial  atomic.Int64
	mu      sync.Mutex
	calls   []*faultCall
	first   int64                    // the revision from which on the history counts
	history map[string]*faultHistory // by token
	added   map[string][]int64       // by key, the revisions at which it came into its session
}

// faultHistory is all that a session has been.
type faultHistory struct {
	versions   []faultVersion
	tombstones []int64
}

// faultVersion is what a session became at a revision. No keys: it was deleted.
type faultVersion struct {
	rev  int64
	keys map[string]any
}

// deleted reports whether the session was deleted after one revision and up to another.
func (h *faultHistory) deleted(after, last int64) bool {
	i := sort.Search(len(h.tombstones), func(i int) bool { return h.tombstones[i] > after })
	return i < len(h.tombstones) && h.tombstones[i] <= last
}

// absent reports whether there was no session at some revision from first to last.
func (h *faultHistory) absent(first, last int64) bool {
	i := sort.Search(len(h.versions), func(i int) bool { return h.versions[i].rev > first })
	return i == 0 || h.versions[i-1].keys == nil || h.deleted(first, last)
}

func newFaultRun(t *testing.T) *faultRun {
	r := &faultRun{cluster: etcdtest.New(t, etcdtest.Config{Members: 3}), start: time.Now()}
	r.admin = r.cluster.Client(t)
	for range 2 {
		cli := r.cluster.Client(t)
		c := &counted{API: cli}
		r.counts = append(r.counts, c)
		r.stores = append(r.stores, newStore(c, cli, defaultPrefix, nil))
	}
	resp, err := r.admin.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	r.first = resp.Header.Revision + 1
	return r
}

func (r *faultRun) unknown() (n int) {
	for _, c := range r.counts {
		n += int(c.unknown.Load())
	}
	return n
}

func (r *faultRun) count(what told) (n int) {
	for _, c := range r.calls {
		if c.told == what {
			n++
		}
	}
	return n
}

// chaos has the writers work, and the cluster suffer.
func (r *faultRun) chaos(t *testing.T, length time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var wg sync.WaitGroup
	for w := range faultWriters {
		wg.Go(func() {
			for ctx.Err() == nil {
				r.work(t.Context(), r.stores[w%len(r.stores)])
			}
		})
	}
	members := r.cluster.Integration().Members
	for ctx.Err() == nil {
		pause := func() { time.Sleep(20*time.Millisecond + rand.N(60*time.Millisecond)) }
		pause()
		i := rand.N(3)
		m, rest := members[i], slices.Delete(slices.Clone(members), i, i+1)
		switch rand.N(6) {
		case 0, 1: // often the leader
			if rand.N(2) == 0 {
				m = members[r.cluster.Leader(t)]
			}
			m.Stop(t)
			pause()
			if err := m.Restart(t); err != nil {
				t.Fatal(err)
			}
		case 2:
			m.InjectPartition(t, rest...)
			pause()
			m.RecoverPartition(t, rest...)
		case 3:
			m.Pause()
			pause()
			m.Resume()
		case 4:
			r.cluster.MoveLeader(t)
		case 5:
			m.Bridge().DropConnections()
		}
	}
	r.cluster.Leader(t)
	wg.Wait()
	for _, s := range r.stores {
		s.pipeline.Wait() // what calls have left in flight
	}
	r.readHistory(t)
}

func (r *faultRun) finish(t *testing.T) {
	for _, s := range r.stores {
		mustClose(t, s)
	}
	r.readHistory(t)
}

// work is one request of a writer.
func (r *faultRun) work(ctx context.Context, s *EtcdStore) {
	token, key := fmt.Sprint("t", rand.N(faultTokens)), fmt.Sprint("k", r.serial.Add(1))
	if rand.N(10) == 0 { // the client goes away
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, rand.N(10*time.Millisecond))
		defer cancel()
	}
	switch what := rand.N(20); {
	case what < 2:
		r.record(&faultCall{kind: callDelete, store: s, token: token}, func(*faultCall) error { return s.DeleteCtx(ctx, token) })
	case what < 5:
		r.record(&faultCall{kind: callUpdate, store: s, token: token, key: key}, func(*faultCall) error {
			return s.Update(ctx, token, func(v map[string]any) error { v[key] = true; return nil })
		})
	default:
		ctx = Begin(ctx)
		deadline, values := time.Now().Add(time.Hour).Round(0), map[string]any{}
		find := &faultCall{kind: callFind, store: s, token: token}
		r.record(find, func(c *faultCall) error {
			b, ok, err := s.FindCtx(ctx, token)
			if ok {
				deadline, values, err = scs.GobCodec{}.Decode(b)
				c.found = stateOf(values)
			}
			return err
		})
		if find.told != toldOK || what < 8 {
			return
		}
		values[key] = true
		r.record(&faultCall{kind: callCommit, store: s, token: token, key: key, based: find}, func(*faultCall) error {
			b, err := scs.GobCodec{}.Encode(deadline, values)
			if err != nil {
				return err
			}
			return s.CommitCtx(ctx, token, b, deadline)
		})
	}
}

// stateOf names what a session holds.
func stateOf(values map[string]any) string {
	return strings.Join(slices.Sorted(maps.Keys(values)), " ")
}

// record makes a call. The revision that its store knew of at its beginning is below that of its effect, and the one that
// it knows of at its end is not.
func (r *faultRun) record(c *faultCall, f func(*faultCall) error) {
	c.begin, c.call = c.store.etcd.Latest(), r.now()
	c.err = f(c)
	c.end, c.returns = c.store.etcd.Latest(), r.now()
	switch {
	case errors.Is(c.err, ErrOutcomeUnknown):
		c.told = toldUnknown
	case errors.Is(c.err, ErrConflict):
		c.told = toldConflict
	case errors.Is(c.err, ErrSessionGone):
		c.told = toldGone
	case c.err != nil:
		c.told = toldNo
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, c)
}

func (r *faultRun) now() int64 { return int64(time.Since(r.start)) }

// readHistory reads every version of every session from etcd.
func (r *faultRun) readHistory(t *testing.T) {
	t.Helper()
	r.history, r.added = make(map[string]*faultHistory), make(map[string][]int64)
	for i := range faultTokens {
		r.history[fmt.Sprint("t", i)] = &faultHistory{}
	}
	for _, e := range eventsSince(t, r.admin, r.first) {
		if h := r.history[strings.TrimPrefix(string(e.Kv.Key), defaultPrefix)]; h != nil {
			r.happened(t, h, e)
		}
	}
}

// happened adds an event to a session's history.
func (r *faultRun) happened(t *testing.T, h *faultHistory, e *clientv3.Event) {
	t.Helper()
	v := faultVersion{rev: e.Kv.ModRevision}
	if e.Type == clientv3.EventTypeDelete {
		h.tombstones = append(h.tombstones, v.rev)
	} else {
		var err error
		if _, v.keys, err = (scs.GobCodec{}).Decode(e.Kv.Value); err != nil {
			t.Fatal(err)
		}
	}
	var before map[string]any
	if n := len(h.versions); n > 0 {
		before = h.versions[n-1].keys
	}
	for key := range v.keys {
		if before[key] == nil {
			r.added[key] = append(r.added[key], v.rev)
		}
	}
	h.versions = append(h.versions, v)
}

// mismatches counts the calls that were told something else than what happened, and what happened that no call was told
// to have done.
func (r *faultRun) mismatches(t *testing.T, report bool) (n int) {
	mismatch := func(format string, args ...any) {
		if n++; report && n <= 10 {
			t.Logf(format, args...)
		}
	}
	deletes := r.deletes()
	for _, c := range r.calls {
		if !r.agrees(c, deletes) {
			mismatch("%v: it took effect at %v", c, r.added[c.key])
		}
	}
	for token, h := range r.history {
		for i, v := range h.versions {
			if i > 0 && v.keys != nil {
				for key := range h.versions[i-1].keys {
					if v.keys[key] == nil {
						mismatch("%s lost %s at revision %d", token, key, v.rev)
					}
				}
			}
		}
		for _, rev := range h.tombstones {
			if !slices.ContainsFunc(deletes[token], func(d *faultCall) bool { return d.mayHaveMade(rev) }) {
				mismatch("nobody deleted %s at revision %d", token, rev)
			}
		}
	}
	return n
}

// deletes returns the calls that may have deleted a session, by token.
func (r *faultRun) deletes() map[string][]*faultCall {
	deletes := make(map[string][]*faultCall)
	for _, c := range r.calls {
		if c.kind == callDelete && (c.told == toldOK || c.told == toldUnknown) {
			deletes[c.token] = append(deletes[c.token], c)
		}
	}
	return deletes
}

// mayHaveMade reports whether a version at rev may be the call's doing.
func (c *faultCall) mayHaveMade(rev int64) bool {
	return c.begin < rev && (c.told == toldUnknown || rev <= c.end)
}

// agrees reports whether what a call was told is what happened.
func (r *faultRun) agrees(c *faultCall, deletes map[string][]*faultCall) bool {
	h, added := r.history[c.token], r.added[c.key]
	switch {
	case c.kind == callFind:
		return c.told == toldOK || c.told == toldNo
	case c.told == toldConflict:
		return false // no two calls change the same key
	case c.kind == callDelete:
		return c.told != toldOK || h.absent(c.begin, c.end)
	case len(added) == 1 && c.based != nil && c.based.found != "" && h.deleted(c.based.end, added[0]):
		return false // it brought a session back that was deleted after it was read
	}
	switch c.told {
	case toldOK:
		return len(added) == 1 && c.mayHaveMade(added[0]) || len(added) == 0 && r.deletedWith(c, deletes[c.token])
	case toldGone:
		if c.kind == callCommit {
			return len(added) == 0 && c.based.found != "" && h.deleted(c.based.begin, c.end)
		}
		return len(added) == 0 && h.absent(c.begin, c.end)
	case toldNo:
		return len(added) == 0
	}
	return len(added) <= 1
}

// deletedWith reports whether a delete may have been folded over the call: it waited in the same store at the same time, and
// the session was absent then. Such a call has no version in the history.
func (r *faultRun) deletedWith(c *faultCall, deletes []*faultCall) bool {
	return r.history[c.token].absent(c.begin, c.end) && slices.ContainsFunc(deletes, func(d *faultCall) bool {
		waits := d.returns
		if d.told == toldUnknown {
			waits = d.call + int64(defaultTimeout) // it may have gone on when its caller had left
		}
		return d.store == c.store && d.call <= c.returns && c.call <= waits
	})
}

// operations returns the calls for porcupine. What the history tells of unknown outcomes is settled: writes that happened
// did so before anyone knew of their revision, and so did deletes; what did not happen, or without a version of its own,
// because a delete was folded over it, is left out.
func (r *faultRun) operations() []porcupine.Operation {
	var ops []porcupine.Operation
	known := r.knownBy()
	for _, c := range r.calls {
		op := porcupine.Operation{Input: c, Call: c.call, Return: c.returns}
		switch writes := c.kind == callCommit || c.kind == callUpdate; {
		case c.told == toldOK && (!writes || len(r.added[c.key]) > 0):
		case c.told == toldUnknown && len(r.added[c.key]) > 0:
			op.Return = max(c.call, known(r.added[c.key][0]))
		default:
			continue
		}
		ops = append(ops, op)
	}
	return append(ops, r.settledDeletes(known)...)
}

// settledDeletes returns a delete for each deletion in the history that no call was told of: one whose outcome is unknown
// has made it. All the others of those had no effect, or none of their own.
func (r *faultRun) settledDeletes(known func(rev int64) int64) (ops []porcupine.Operation) {
	deletes := r.deletes()
	for token, h := range r.history {
		for _, rev := range h.tombstones {
			var first *faultCall
			claimed := false
			for _, d := range deletes[token] {
				if d.mayHaveMade(rev) {
					claimed = claimed || d.told == toldOK
					if first == nil || d.call < first.call {
						first = d
					}
				}
			}
			if first != nil && !claimed {
				ops = append(ops, porcupine.Operation{Input: first, Call: first.call, Return: max(first.call, known(rev))})
			}
		}
	}
	return ops
}

// knownBy returns a function that tells the time by which a revision was known to somebody, and so what made it was over.
func (r *faultRun) knownBy() func(rev int64) int64 {
	type moment struct{ rev, time int64 }
	moments := make([]moment, 0, 2*len(r.calls)+1)
	for _, c := range r.calls {
		moments = append(moments, moment{c.begin, c.call}, moment{c.end, c.returns})
	}
	moments = append(moments, moment{1 << 62, r.now()})
	slices.SortFunc(moments, func(a, b moment) int { return int(a.rev - b.rev) })
	for i := len(moments) - 2; i >= 0; i-- {
		moments[i].time = min(moments[i].time, moments[i+1].time)
	}
	return func(rev int64) int64 {
		return moments[sort.Search(len(moments), func(i int) bool { return moments[i].rev >= rev })].time
	}
}

// sessionModel is what one session may do. Its state is what it holds, as a stateOf, empty where it is absent.
func sessionModel() porcupine.Model {
	return porcupine.Model{
		Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
			byToken := make(map[string][]porcupine.Operation)
			for _, op := range history {
				token := op.Input.(*faultCall).token
				byToken[token] = append(byToken[token], op)
			}
			return slices.Collect(maps.Values(byToken))
		},
		Init: func() any { return "" },
		Step: func(state, input, _ any) (bool, any) {
			was, c := state.(string), input.(*faultCall)
			switch {
			case c.kind == callFind:
				return was == c.found, was
			case c.kind == callDelete:
				return true, ""
			case was == "":
				return c.kind == callCommit && c.based.found == "", c.key // else there was nothing to change
			}
			keys := append(strings.Fields(was), c.key)
			slices.Sort(keys)
			return true, strings.Join(keys, " ")
		},
	}
}
