package etcdstore

import (
	"context"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// leaseSeats is how many sessions a lease takes. With authentication on, etcd checks the permission on
	// every key of a lease at each Put that names it (server/etcdserver/apply/auth.go), so leases stay small.
	leaseSeats = 100
	// leaseAhead is the number of free seats at which the next lease is granted ahead of need.
	leaseAhead = 25
	// leaseMax bounds what is left of a session's life as far as leases are concerned. etcd takes TTLs of up
	// to 9 000 000 000 s, and a lease outlasts its sessions by up to half.
	leaseMax = 5_000_000_000 * time.Second
	// leaseSweeps is how many closed leases are looked after whenever a new one is granted: more than one, so
	// that they are revoked faster than they come.
	leaseSweeps = 4
	// refenceFor is how long a call that has ended without settling its create goes on to move the lease's fence.
	refenceFor = 10 * time.Second
)

// leasePool shares leases between sessions. Leases collect garbage and never decide expiry: etcd resets them
// to their full TTL when its leader changes.
//
// A session with R left to live gets a lease that outlasts it by R/16 to R, a new one by R/4, and keeps it as long
// as commits do not move its expiry beyond the lease's end. So most commits name no lease, and however the sessions'
// lifetimes are spread, a few open leases cover them. A lease takes 100 sessions; only the process that granted
// it attaches to it.
//
// For each lease there is a key, `prefix~lease/<id>`, attached to the lease itself. Every Put that names the
// lease compares the key's mod revision, the lease's fence. That does two things:
//
//   - A lease that was lost fails that compare, and with it the one session's nested Txn, instead of
//     ErrLeaseNotFound for the whole batch.
//   - A create whose outcome is unknown may still be under way in a partitioned member, and 'the key does not
//     exist' would hold again once the session was deleted. Putting the lease's key again moves the fence, and
//     no earlier send can be applied any more. Updates need no fence, since a mod revision never returns.
//
// A lease is closed when it is full or too old to be attached to. The owner revokes a closed lease when no
// session is on it any more. It deletes the lease's key first, so that a Put that was under way fails its compare
// and takes another lease, and looks again: else that session would go with the lease. A lease whose grant was answered
// by an error is not known to its owner: if there is one, it stays empty and ends by itself.
//
// Rejected: keep-alive (a goroutine and a stream per process, and a crash orphans the sessions), one lease per
// session (slow leader changes), one cached lease (its expiry would be a write stall: it deletes key by key in one
// entry).
type leasePool struct {
	conn   *etcd.Client
	prefix string // of the leases' keys
	now    func() record.Millis
	detach func(func()) // runs in a goroutine that Close waits for

	// unchecked says that authentication is off, as of the latest grant: then a Put that names its key's lease is
	// cheaper than one with WithIgnoreLease, for which etcd reads the key twice more (server/etcdserver/txn/put.go).
	unchecked atomic.Bool

	mu     sync.Mutex
	open   []*lease
	closed []*lease // full, too old or retired, in the order in which they are looked after
	byID   map[clientv3.LeaseID]*lease
	grant  *grant // the one under way
}

// lease is a lease that this process granted.
type lease struct {
	id    clientv3.LeaseID
	key   string
	until record.Millis // it lasts until then at least
	since record.Millis // it was granted then
	opens record.Millis // it is attached to until then

	moving sync.Mutex // held while the fence is being moved: once is enough for all who need it

	// Guarded by leasePool.mu.
	fence    int64 // mod revision of key
	sessions int   // attached by this process, less those that it saw leave
	revoking bool  // nothing is attached to it any more, whatever its fence
	suspect  bool  // an attempt's outcome is unknown: the fence must move before the next attempt
	// refencing says that this goes on in the background.
	refencing bool
}

// seat is a session's place on a lease, with the fence that its Put compares.
type seat struct {
	*lease
	fence int64
}

// grant is a grant under way. err is set when done is closed.
type grant struct {
	done chan struct{}
	err  error
}

func newLeasePool(c *etcd.Client, prefix string, now func() record.Millis, detach func(func())) *leasePool {
	return &leasePool{conn: c, prefix: prefix, now: now, detach: detach, byID: make(map[clientv3.LeaseID]*lease)}
}

// leased returns the expiry that a lease has to cover for a session that expires at e.
func leased(e, now record.Millis) record.Millis { return min(e, now.Plus(leaseMax)) }

// attach returns a seat on an open lease for a session that expires at e. It reports false where there is none;
// acquire waits for one.
func (p *leasePool) attach(e record.Millis) (seat, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	p.retire(now)
	l, free := p.fitting(e, now)
	if l == nil {
		return seat{}, false
	}
	l.sessions++
	if free <= leaseAhead {
		p.grantFor(e, now)
	}
	return seat{l, l.fence}, true
}

// keep returns the option that leaves a key, which is at a known revision, on its lease.
func (p *leasePool) keep(id clientv3.LeaseID) clientv3.OpOption {
	if p.unchecked.Load() {
		return clientv3.WithLease(id) // which exists if the revision is as known, or the key had gone with it
	}
	return clientv3.WithIgnoreLease()
}

// covers reports whether a session that expires at e may keep a lease that is said to last until then. One that outlasts the
// session by more than it has left, as no session is attached to, was perhaps granted by a machine whose clock was ahead,
// and ends earlier.
func (p *leasePool) covers(until, e, now record.Millis) bool {
	e = leased(e, now)
	return e <= until && until <= e.Plus(max(e.Since(now), 2*time.Second))
}

// fitting returns the oldest lease that a session may attach to, and how many seats such leases have.
//
// REQUIRES: mu is held.
func (p *leasePool) fitting(e, now record.Millis) (first *lease, free int) {
	e = leased(e, now)
	left := e.Since(now)
	from, to := e.Plus(left/16), e.Plus(max(left, 2*time.Second))
	for _, l := range p.open {
		if l.until < from || l.until > to || l.suspect || l.sessions >= leaseSeats {
			continue
		}
		free += leaseSeats - l.sessions
		if first == nil {
			first = l
		}
	}
	return first, free
}

// retire closes the leases that nothing will be attached to.
//
// REQUIRES: mu is held.
func (p *leasePool) retire(now record.Millis) {
	p.open = slices.DeleteFunc(p.open, func(l *lease) bool {
		// Where the clock has been set back since, the lease ends earlier than its until says.
		over := l.sessions >= leaseSeats || l.opens <= now || now < l.since
		if over {
			p.closed = append(p.closed, l)
		}
		return over
	})
}

// acquire returns a seat for a session that expires at e, waiting for a lease where none is open.
func (p *leasePool) acquire(ctx context.Context, e record.Millis) (seat, error) {
	for b := (etcd.Backoff{}); ; {
		if s, ok := p.attach(e); ok {
			return s, nil
		}
		p.mu.Lock()
		g := p.grantFor(e, p.now())
		p.mu.Unlock()
		select {
		case <-g.done:
		case <-ctx.Done():
			return seat{}, ctx.Err()
		}
		switch {
		case g.err == nil: // perhaps for other sessions, or its seats are taken already
		case etcd.Classify(g.err) != etcd.Unknown && etcd.Classify(g.err) != etcd.Transient:
			return seat{}, g.err
		case !b.Wait(ctx):
			return seat{}, etcd.Ended(ctx.Err(), g.err)
		}
	}
}

// grantFor starts a grant for a session that expires at e, unless one is under way: grants are single-flight,
// and made outside of the mutex.
//
// REQUIRES: mu is held.
func (p *leasePool) grantFor(e, now record.Millis) *grant {
	if p.grant != nil {
		return p.grant
	}
	g := &grant{done: make(chan struct{})}
	p.grant = g
	e = leased(e, now)
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
		p.sweep(leaseSweeps)
	})
	return g
}

// newLease grants a lease that lasts until then at least, and puts its key.
func (p *leasePool) newLease(now record.Millis, left time.Duration, until record.Millis) (*lease, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*etcd.AttemptTimeout)
	defer cancel()
	margin := time.Second + left/16 // for clocks that differ between machines
	ttl := (until.Plus(margin).Since(now) + time.Second - 1) / time.Second
	resp, err := p.conn.Grant(ctx, int64(ttl))
	if err != nil {
		return nil, clientv3.ContextError(ctx, err)
	}
	p.conn.Saw(resp.ResponseHeader)
	l := &lease{
		id:    resp.ID,
		key:   p.prefix + strconv.FormatInt(int64(resp.ID), 16),
		until: until,
		since: now,
		opens: now.Plus(max(left/4, time.Second)),
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
func (p *leasePool) askAuth() {
	ctx, cancel := context.WithTimeout(context.Background(), etcd.AttemptTimeout)
	defer cancel()
	resp, err := p.conn.AuthStatus(ctx)
	p.unchecked.Store(err == nil && !resp.Enabled)
}

// putKey puts the lease's key, which moves the fence.
func (p *leasePool) putKey(ctx context.Context, l *lease) error {
	resp, err := p.conn.Send(ctx, clientv3.OpPut(l.key, "", clientv3.WithLease(l.id)))
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	l.fence = max(l.fence, resp.Put().Header.Revision)
	return nil
}

// suspect keeps sessions from being attached to the lease until refence: an attempt that compares its fence may
// still be under way.
func (p *leasePool) suspect(s seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.suspect = true
}

// refence makes sure that no attempt that compares s.fence can be applied any more.
func (p *leasePool) refence(ctx context.Context, s seat) error {
	err := etcd.Retry(ctx, func(ctx context.Context) error {
		s.moving.Lock()
		defer s.moving.Unlock()
		p.mu.Lock()
		moved := s.lease.fence > s.fence
		p.mu.Unlock()
		if moved {
			return nil
		}
		return p.putKey(ctx, s.lease)
	})
	if etcd.Classify(err) == etcd.LeaseLost {
		p.lost(s.lease) // the key has gone with it, and every attempt that compares it fails
		err = nil
	}
	if err == nil {
		p.mu.Lock()
		s.suspect = false
		p.mu.Unlock()
	}
	return err
}

// refenceLater has the fence moved when etcd is there again, after refence has run out of time.
func (p *leasePool) refenceLater(s seat) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.refencing {
		return
	}
	s.refencing = true
	p.detach(func() {
		ctx, cancel := context.WithTimeout(context.Background(), refenceFor)
		defer cancel()
		_ = p.refence(ctx, s) // else the lease stays suspect, until it is swept
		p.mu.Lock()
		defer p.mu.Unlock()
		s.refencing = false
	})
}

// fenced notes the mod revision that the lease's key turned out to have, after an attempt failed its compare.
// It reports whether sessions may still be attached to the lease.
func (p *leasePool) fenced(l *lease, rev int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if rev == 0 {
		if !slices.Contains(p.closed, l) { // its owner has not deleted the key
			p.forget(l)
		}
		return false
	}
	l.fence = max(l.fence, rev)
	return !l.revoking
}

// seatAgain returns the seat with the fence as it is now.
func (p *leasePool) seatAgain(s seat) seat {
	p.mu.Lock()
	defer p.mu.Unlock()
	return seat{s.lease, s.lease.fence}
}

// lost forgets a lease that does not exist any more.
func (p *leasePool) lost(l *lease) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget(l)
}

// REQUIRES: mu is held.
func (p *leasePool) forget(l *lease) {
	is := func(o *lease) bool { return o == l }
	p.open = slices.DeleteFunc(p.open, is)
	p.closed = slices.DeleteFunc(p.closed, is)
	delete(p.byID, l.id)
}

// left says that a session is no longer on a lease: it was deleted, or moved, or never got there. Where it was
// the last on a lease of ours, that is revoked.
func (p *leasePool) left(id clientv3.LeaseID) {
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

// sweep looks after the first n closed leases: it revokes those without sessions and puts the others last.
func (p *leasePool) sweep(n int) {
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

// lookAfter moves the fence of a closed lease if that has to be done yet, and revokes the lease if it has no session. An
// error leaves it for the next sweep, or for etcd when its time is up.
func (p *leasePool) lookAfter(ctx context.Context, l *lease) error {
	p.mu.Lock()
	suspect, s := l.suspect, seat{l, l.fence}
	p.mu.Unlock()
	if suspect {
		if err := p.refence(ctx, s); err != nil {
			return err
		}
	}
	return p.revokeUnused(ctx, l)
}

// revokeUnused revokes a lease that has no session.
func (p *leasePool) revokeUnused(ctx context.Context, l *lease) error {
	unused, err := p.unused(ctx, l, 0)
	if err != nil || !unused {
		return err
	}
	// From here on nothing can be attached to it any more: those with its old fence fail, and fenced gives no new one.
	p.mu.Lock()
	l.revoking = true
	p.mu.Unlock()
	resp, err := p.conn.Send(ctx, clientv3.OpDelete(l.key))
	if err != nil {
		return err
	}
	unused, err = p.unused(ctx, l, resp.Del().Header.Revision)
	if err != nil || !unused {
		return err
	}
	_, err = p.conn.Revoke(ctx, l.id)
	if err = clientv3.ContextError(ctx, err); err != nil && etcd.Classify(err) != etcd.LeaseLost {
		return err
	}
	p.lost(l)
	return nil
}

// unused reports whether no session is on a lease, or there is no such lease any more, as of revision rev or later. A member
// that lags behind, or is cut off, answers with what it knows: it is asked again, as is another.
func (p *leasePool) unused(ctx context.Context, l *lease, rev int64) (bool, error) {
	for b := (etcd.Backoff{}); ; {
		resp, err := p.conn.TimeToLive(ctx, l.id, clientv3.WithAttachedKeys())
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

// close revokes all leases without sessions.
func (p *leasePool) close(ctx context.Context) error {
	p.mu.Lock()
	p.closed = append(p.closed, p.open...)
	p.open = nil
	all := slices.Clone(p.closed)
	p.mu.Unlock()
	for _, l := range all {
		if err := p.lookAfter(ctx, l); err != nil {
			return err
		}
	}
	return nil
}
