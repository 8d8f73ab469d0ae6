// Package lease shares etcd's leases between sessions, and keeps them from being orphaned.
package lease

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
)

const (
	// Seats is how many sessions a lease takes. With authentication on, etcd checks the permission
	// on every key of a lease at each Put that names it (server/etcdserver/apply/auth.go), so
	// leases stay small.
	Seats = 100
	// seatsAhead is the number of free seats at which the next lease is granted ahead of need.
	seatsAhead = 25
	// maxLife bounds what is left of a session's life as far as leases are concerned. etcd takes
	// TTLs of up to 9 000 000 000 s, and a lease outlasts its sessions by up to half.
	maxLife = 5_000_000_000 * time.Second
	// sweeps is how many closed leases are looked after whenever a new one is granted: more than
	// one, so that they are revoked faster than they come.
	sweeps = 4
	// refenceFor is how long a fence goes on to be moved after the call that needs it has ended.
	refenceFor = 10 * time.Second
	// closers is how many leases Close looks after at a time, and closeLook is how long it looks at
	// those that seem to be in use.
	closers   = 16
	closeLook = time.Second
)

// Pool shares leases between sessions. Leases collect garbage and never decide expiry: etcd resets
// them to their full TTL when its leader changes.
//
// A session with R left to live gets a lease that outlasts it by R/16 to R, a new one by R/4, and
// keeps it as long as commits do not move its expiry beyond the lease's end. So most commits name
// no lease, and however the sessions' lifetimes are spread, a few open leases cover them. A lease
// takes 100 sessions; only the process that granted it attaches to it.
//
// For each lease there is a key, `prefix~lease/<id>`, attached to the lease itself. Every Put that
// names the lease compares the key's mod revision, the lease's fence. That does two things:
//
//   - A lease that was lost fails that compare, and with it the one session's nested Txn, instead
//     of ErrLeaseNotFound for the whole batch.
//   - A create whose outcome is unknown may still be under way in a partitioned member, and 'the
//     key does not exist' would hold again once the session was deleted. Putting the lease's key
//     again moves the fence, and no earlier send can be applied any more. Updates need no fence,
//     since a mod revision never returns.
//
// A lease is closed when it is full or too old to be attached to. The owner revokes a closed lease
// when no session is on it any more. It deletes the lease's key first, so that a Put that was under
// way fails its compare and takes another lease, and looks again: else that session would go with
// the lease. A lease whose grant was answered by an error is not known to its owner: if there is
// one, it stays empty and ends by itself.
//
// Rejected: keep-alive (a goroutine and a stream per process, and a crash orphans the sessions),
// one lease per session (slow leader changes), one cached lease (its expiry would be a write stall:
// it deletes key by key in one entry).
type Pool struct {
	client *etcd.Client
	prefix string // of the leases' keys
	now    func() record.Millis
	detach func(func()) // runs in a goroutine that the owner of the pool waits for

	// unchecked says that authentication is off, as of the latest grant: then a Put that names its
	// key's lease is cheaper than one with WithIgnoreLease, for which etcd reads the key twice more
	// (server/etcdserver/txn/put.go).
	unchecked atomic.Bool

	mu     sync.Mutex
	open   []*lease
	closed []*lease // full, too old or retired, in the order in which they are looked after
	byID   map[clientv3.LeaseID]*lease
	grant  *grant // the one under way
}

// lease is a lease that this process granted.
type lease struct {
	id      clientv3.LeaseID
	key     string
	until   record.Millis // it lasts until then at least
	granted record.Millis // when it was
	closes  record.Millis // it is attached to until then

	moving sync.Mutex // held while the fence is being moved: once is enough for all who need it

	// Guarded by Pool.mu.
	fence    int64 // mod revision of key
	sessions int   // attached by this process, less those that it saw leave
	revoking bool  // nothing is attached to it any more, whatever its fence

	// doubt is the latest fence that an attempt compares whose outcome is unknown. Until the fence
	// has moved beyond it, nothing is attached to the lease. It is a revision and no flag, so that
	// moving the fence for one attempt does not clear the doubt about another, which compares a
	// later one.
	doubt        int64
	refenceUntil time.Time // the fence is being moved in the background until then; zero: it is not
}

// doubtful reports whether an attempt that compares the lease's fence may still be under way.
func (l *lease) doubtful() bool { return l.doubt != 0 && l.doubt >= l.fence }

// Seat is a session's place on a lease, with the fence that its Put compares. The zero value is
// none.
type Seat struct {
	lease *lease
	fence int64
}

// Taken reports whether the seat is one.
func (s Seat) Taken() bool { return s.lease != nil }

// Lease returns the lease's id.
func (s Seat) Lease() clientv3.LeaseID { return s.lease.id }

// Until returns until when the lease lasts at least.
func (s Seat) Until() record.Millis { return s.lease.until }

// Key returns the lease's key, and Fence the mod revision that a Put on the seat compares it with.
func (s Seat) Key() string { return s.lease.key }

// Fence is explained at Key.
func (s Seat) Fence() int64 { return s.fence }

// Compare is the compare that fails where the lease was lost, or its fence has moved.
func (s Seat) Compare() clientv3.Cmp {
	return clientv3.Compare(clientv3.ModRevision(s.lease.key), "=", s.fence)
}

// grant is a grant under way. err is set when done is closed.
type grant struct {
	done chan struct{}
	err  error
}

// New returns a pool of leases whose keys begin with prefix. now is the wall clock, and detach runs
// what goes on after a call in a goroutine.
func New(c *etcd.Client, prefix string, now func() record.Millis, detach func(func())) *Pool {
	return &Pool{client: c, prefix: prefix, now: now, detach: detach, byID: make(map[clientv3.LeaseID]*lease)}
}

// covered returns the expiry that a lease has to cover for a session that expires at e.
func covered(e, now record.Millis) record.Millis { return min(e, now.Plus(maxLife)) }

// Attach returns a seat on an open lease for a session that expires at e. It reports false where
// there is none; Wait waits for one.
func (p *Pool) Attach(e record.Millis) (Seat, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	p.retire(now)
	l, free := p.fitting(e, now)
	if l == nil {
		return Seat{}, false
	}
	l.sessions++
	if free <= seatsAhead {
		p.grantFor(e, now)
	}
	return Seat{l, l.fence}, true
}

// Keep returns the option that leaves a key, which is at a known revision, on its lease.
func (p *Pool) Keep(id clientv3.LeaseID) clientv3.OpOption {
	if p.unchecked.Load() {
		return clientv3.WithLease(id) // which exists if the revision is as known, or the key had gone with it
	}
	return clientv3.WithIgnoreLease()
}

// Unchecked reports whether authentication was found to be off.
func (p *Pool) Unchecked() bool { return p.unchecked.Load() }

// Covers reports whether a session that expires at e may keep a lease that is said to last until
// then. One that outlasts the session by more than it has left, as no session is attached to, was
// perhaps granted by a machine whose clock was ahead, and ends earlier.
func (*Pool) Covers(until, e, now record.Millis) bool {
	e = covered(e, now)
	return e <= until && until <= e.Plus(max(e.Since(now), 2*time.Second))
}

// fitting returns the oldest lease that a session may attach to, and how many seats such leases
// have.
//
// REQUIRES: mu is held.
func (p *Pool) fitting(e, now record.Millis) (first *lease, free int) {
	e = covered(e, now)
	left := e.Since(now)
	from, to := e.Plus(left/16), e.Plus(max(left, 2*time.Second))
	for _, l := range p.open {
		if l.until < from || l.until > to || l.doubtful() || l.sessions >= Seats {
			continue
		}
		free += Seats - l.sessions
		if first == nil {
			first = l
		}
	}
	return first, free
}

// Count returns how many leases of this process are known to exist, and how many sessions it has
// attached to them and not seen leave.
func (p *Pool) Count() (leases, sessions int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.byID {
		sessions += l.sessions
	}
	return len(p.byID), sessions
}

// retire closes the leases that nothing will be attached to.
//
// REQUIRES: mu is held.
func (p *Pool) retire(now record.Millis) {
	p.open = slices.DeleteFunc(p.open, func(l *lease) bool {
		// Where the clock has been set back since, the lease ends earlier than its until says.
		over := l.sessions >= Seats || l.closes <= now || now < l.granted
		if over {
			p.closed = append(p.closed, l)
		}
		return over
	})
}

// Wait waits for a grant to end that was under way, or that it starts for a session that expires at
// e. It was perhaps for other sessions, or its seats are taken already when Wait returns nil. The
// error is that of the grant, or of ctx.
func (p *Pool) Wait(ctx context.Context, e record.Millis) error {
	p.mu.Lock()
	g := p.grantFor(e, p.now())
	p.mu.Unlock()
	select {
	case <-g.done:
		return g.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// grantFor starts a grant for a session that expires at e, unless one is under way: grants are
// single-flight, and made outside of the mutex.
//
// REQUIRES: mu is held.
func (p *Pool) grantFor(e, now record.Millis) *grant {
	if p.grant != nil {
		return p.grant
	}
	g := &grant{done: make(chan struct{})}
	p.grant = g
	e = covered(e, now)
	left := e.Since(now)
	p.detach(func() {
		l, err := p.newLease(now, left, e.Plus(max(left/4, time.Second)))
		p.mu.Lock()
		if err == nil {
			p.open = append(p.open, l)
		}
		p.grant, g.err = nil, err
		p.mu.Unlock()
		close(g.done)
		p.askAuth()
		p.sweep(sweeps)
	})
	return g
}

// newLease grants a lease that lasts until then at least, and puts its key.
func (p *Pool) newLease(now record.Millis, left time.Duration, until record.Millis) (*lease, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*etcd.AttemptTimeout)
	defer cancel()
	margin := time.Second + left/16 // for clocks that differ between machines
	ttl := (until.Plus(margin).Since(now) + time.Second - 1) / time.Second
	resp, err := p.client.Grant(ctx, int64(ttl))
	if err != nil {
		return nil, clientv3.ContextError(ctx, err)
	}
	p.client.Saw(resp.ResponseHeader)
	l := &lease{
		id:      resp.ID,
		key:     p.prefix + strconv.FormatInt(int64(resp.ID), 16),
		until:   until,
		granted: now,
		closes:  now.Plus(max(left/4, time.Second)),
	}
	p.mu.Lock()
	p.byID[l.id] = l
	p.mu.Unlock()
	if err := p.putKey(ctx, l); err != nil {
		p.mu.Lock()
		p.closed = append(p.closed, l) // to be revoked
		p.mu.Unlock()
		return nil, err
	}
	return l, nil
}

// askAuth finds out whether authentication is on. What cannot be found out counts as on.
func (p *Pool) askAuth() {
	ctx, cancel := context.WithTimeout(context.Background(), etcd.AttemptTimeout)
	defer cancel()
	resp, err := p.client.AuthStatus(ctx)
	p.unchecked.Store(err == nil && !resp.Enabled)
}

// putKey puts the lease's key, which moves the fence.
func (p *Pool) putKey(ctx context.Context, l *lease) error {
	resp, err := p.client.Send(ctx, clientv3.OpPut(l.key, "", clientv3.WithLease(l.id)))
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l.fence = max(l.fence, resp.Put().Header.Revision)
	return nil
}

// Doubt keeps sessions from being attached to the seat's lease until its fence has moved beyond the
// seat's: an attempt that compares that may still be under way.
func (p *Pool) Doubt(s Seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.lease.doubt = max(s.lease.doubt, s.fence)
}

// Refence makes sure that no attempt that compares the seat's fence can be applied any more. It
// asks etcd once.
func (p *Pool) Refence(ctx context.Context, s Seat) error {
	s.lease.moving.Lock()
	defer s.lease.moving.Unlock()
	p.mu.Lock()
	moved := s.lease.fence > s.fence
	p.mu.Unlock()
	if moved {
		return nil
	}
	err := p.putKey(ctx, s.lease)
	if etcd.Classify(err) == etcd.LeaseLost {
		p.Forget(s) // the key has gone with it, and every attempt that compares it fails
		return nil
	}
	return err
}

// RefenceLater has the lease's fence moved when etcd is there again, after Refence has run out of
// time.
func (p *Pool) RefenceLater(s Seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	running := !s.lease.refenceUntil.IsZero()
	s.lease.refenceUntil = time.Now().Add(refenceFor)
	if !running {
		p.detach(func() { p.refenceAll(s.lease) })
	}
}

// refenceAll moves a lease's fence beyond all doubt, also beyond what comes up meanwhile. Where
// etcd does not answer for too long, the lease stays doubtful until it is swept.
func (p *Pool) refenceAll(l *lease) {
	for {
		p.mu.Lock()
		s, until := Seat{l, l.doubt}, l.refenceUntil
		if !l.doubtful() || !time.Now().Before(until) {
			l.refenceUntil = time.Time{}
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		ctx, cancel := context.WithDeadline(context.Background(), until)
		err := etcd.Retry(ctx, func(ctx context.Context) error { return p.Refence(ctx, s) })
		ended := ctx.Err() != nil
		cancel()
		if p.forgotten(l) || err != nil && !ended {
			p.mu.Lock()
			l.refenceUntil = time.Time{}
			p.mu.Unlock()
			return
		}
	}
}

// Refenced notes the mod revision that the lease's key turned out to have, after an attempt failed
// its compare, and returns the seat with that fence. It reports false where sessions may not be
// attached to the lease any more.
func (p *Pool) Refenced(s Seat, fence int64) (Seat, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := s.lease
	if fence == 0 {
		if !slices.Contains(p.closed, l) { // its owner has not deleted the key
			p.forget(l)
		}
		return s, false
	}
	l.fence = max(l.fence, fence)
	return Seat{l, l.fence}, !l.revoking
}

// Forget forgets the seat's lease, which does not exist any more.
func (p *Pool) Forget(s Seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget(s.lease)
}

// REQUIRES: mu is held.
func (p *Pool) forget(l *lease) {
	is := func(o *lease) bool { return o == l }
	p.open = slices.DeleteFunc(p.open, is)
	p.closed = slices.DeleteFunc(p.closed, is)
	delete(p.byID, l.id)
}

func (p *Pool) forgotten(l *lease) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.byID[l.id] != l
}

// Leave says that a session is no longer on a lease: it was deleted, or moved, or never got there.
// Where it was the last on a lease of ours, that is revoked.
func (p *Pool) Leave(id clientv3.LeaseID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.byID[id]
	if l == nil {
		return
	}
	if l.sessions = max(l.sessions-1, 0); l.sessions > 0 {
		return
	}
	if i := slices.Index(p.open, l); i >= 0 && len(p.open) > 1 {
		p.open = slices.Delete(p.open, i, i+1) // one without sessions, kept for the next, is enough
		p.closed = append(p.closed, l)
	}
	if i := slices.Index(p.closed, l); i >= 0 {
		p.closed = slices.Insert(slices.Delete(p.closed, i, i+1), 0, l)
		p.detach(func() { p.sweep(1) })
	}
}

// sweep looks after the first n closed leases: it revokes those without sessions and puts the
// others last.
func (p *Pool) sweep(n int) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*etcd.AttemptTimeout)
	defer cancel()
	p.mu.Lock()
	n = min(n, len(p.closed))
	batch := slices.Clone(p.closed[:n])
	p.closed = append(p.closed[n:len(p.closed):len(p.closed)], batch...)
	p.mu.Unlock()
	for _, l := range batch {
		_ = p.lookAfter(ctx, l)
	}
}

// lookAfter moves the fence of a closed lease if that has to be done yet, and revokes the lease if
// it has no session. An error leaves it for the next sweep, or for etcd when its time is up.
func (p *Pool) lookAfter(ctx context.Context, l *lease) error {
	p.mu.Lock()
	doubtful, s := l.doubtful(), Seat{l, l.doubt}
	p.mu.Unlock()
	if doubtful {
		if err := etcd.Retry(ctx, func(ctx context.Context) error { return p.Refence(ctx, s) }); err != nil {
			return err
		}
	}
	return p.revokeUnused(ctx, l)
}

// revokeUnused revokes a lease that has no session.
func (p *Pool) revokeUnused(ctx context.Context, l *lease) error {
	unused, err := p.unused(ctx, l, 0)
	if err != nil || !unused {
		return err
	}
	// From here on nothing can be attached to it any more: those with its old fence fail, and
	// Refenced gives no new one.
	p.mu.Lock()
	l.revoking = true
	p.mu.Unlock()
	resp, err := p.client.Send(ctx, clientv3.OpDelete(l.key))
	if err != nil {
		return err
	}
	unused, err = p.unused(ctx, l, resp.Del().Header.Revision)
	if err != nil || !unused {
		return err
	}
	_, err = p.client.Revoke(ctx, l.id)
	if err = clientv3.ContextError(ctx, err); err != nil && etcd.Classify(err) != etcd.LeaseLost {
		return err
	}
	p.Forget(Seat{lease: l})
	return nil
}

// unused reports whether no session is on a lease, or there is no such lease any more, as of
// revision rev or later. A member that lags behind, or is cut off, answers with what it knows: it
// is asked again, as is another.
func (p *Pool) unused(ctx context.Context, l *lease, rev int64) (bool, error) {
	for b := (etcd.Backoff{}); ; {
		resp, err := p.client.TimeToLive(ctx, l.id, clientv3.WithAttachedKeys())
		switch {
		case err != nil:
			return false, clientv3.ContextError(ctx, err)
		case resp.Revision >= rev:
			return !slices.ContainsFunc(resp.Keys, func(key []byte) bool { return string(key) != l.key }), nil
		case !b.Wait(ctx):
			return false, ctx.Err()
		}
	}
}

// Close revokes all leases without sessions. Where this process has attached a session that it has
// not seen leave, the lease is in use, unless another process has deleted the session: Close has a
// look at those for a moment, and leaves what it does not get to, or does not get an answer about,
// to etcd, which ends every lease when its time is up.
func (p *Pool) Close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = append(p.closed, p.open...)
	p.open = nil
	var used, unused []*lease
	for _, l := range p.closed {
		if l.sessions > 0 {
			used = append(used, l)
		} else {
			unused = append(unused, l)
		}
	}
	p.mu.Unlock()
	if err := p.lookAfterAll(ctx, unused); err != nil {
		return err
	}
	moment, cancel := context.WithTimeout(ctx, closeLook)
	defer cancel()
	_ = p.lookAfterAll(moment, used)
	return nil
}

// lookAfterAll looks after several leases at a time, until one returns an error, which it returns.
func (p *Pool) lookAfterAll(ctx context.Context, leases []*lease) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(closers, len(leases)) {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(leases)) && ctx.Err() == nil; i = next.Add(1) - 1 {
				if err := p.lookAfter(ctx, leases[i]); err != nil {
					cancel(err)
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}
