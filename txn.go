package etcdstore

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// transaction is what a request has read of sessions, its read set, and on what condition it may write.
//
// Optimistic concurrency control has three phases. In the read phase Find notes what it returned. The request
// computes. In the validation and write phase a commit is a compare of the mod revision that was read and a write, in
// one etcd transaction; where the compare fails, the commit is merged with what is there instead, or fails.
// (Kung and Robinson, On optimistic methods for concurrency control, ACM TODS 6(2), 1981.)
type transaction struct {
	// request says that this is a request's transaction, with a session manager between the store and the application. The
	// manager reads a session once, and keeps what it read: a further Find, as MergeSession makes, is not what the
	// application changes and commits. So the first read counts there, and the last where Begin was called.
	request bool

	mu    sync.Mutex
	reads map[readKey]read
	lost  map[readKey]error // commits that lost against another request, and were not repeated with success since
	guard *guard            // set by Exclusive, before the transaction is used
}

// readKey names a session: a transaction may span stores.
type readKey struct {
	store *EtcdStore
	token string
}

// read is what a request believes about a session.
type read struct {
	image   *image   // nil: absent
	rev     int64    // the mod revision at which etcd holds exactly image; 0: none does, because it was merged
	version *version // what etcd holds, as far as it is known
	copied  bool     // the application has read it twice, and may commit either copy
}

// contextKey is the key of a context's transaction.
type contextKey struct{}

// Begin returns a context that carries a new transaction. What FindCtx and AllCtx return in it is validated when
// CommitCtx and DeleteCtx write: a commit never overwrites what the transaction has not seen.
//
// Requests of net/http need no Begin: each is a transaction by itself. It is for everything else that reads and
// then writes sessions, such as a job, or an RPC handler. A transaction ends with its context and needs no other
// end; it may be used by several goroutines.
func Begin(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, newTransaction())
}

func newTransaction() *transaction {
	return &transaction{reads: make(map[readKey]read, 1)}
}

func newRequestTransaction() *transaction {
	t := newTransaction()
	t.request = true
	return t
}

// explicit returns the transaction that Begin, Retry or Exclusive put into ctx, or nil.
func explicit(ctx context.Context) *transaction {
	t, _ := ctx.Value(contextKey{}).(*transaction)
	return t
}

// implicitTransactions holds the transactions of requests of net/http that did not begin one.
//
// scs derives all contexts of a request from the request's own with values alone, so they share its Done channel, and
// that names the request. The entry goes when the request ends. Only contexts with http.ServerContextKey count: others
// may live as long as the process and serve many logical requests.
type implicitTransactions struct {
	mu     sync.Mutex
	byDone map[<-chan struct{}]*transaction
}

// of returns the transaction of the request that ctx belongs to, or nil.
func (i *implicitTransactions) of(ctx context.Context) *transaction {
	done := ctx.Done()
	if done == nil || ctx.Value(http.ServerContextKey) == nil {
		return nil
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	t := i.byDone[done]
	if t == nil {
		t = newRequestTransaction()
		if i.byDone == nil {
			i.byDone = make(map[<-chan struct{}]*transaction)
		}
		i.byDone[done] = t
		context.AfterFunc(ctx, func() {
			i.mu.Lock()
			defer i.mu.Unlock()
			delete(i.byDone, done)
		})
	}
	return t
}

// len returns the number of requests that have a transaction.
func (i *implicitTransactions) len() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.byDone)
}

// transactionOf returns the transaction that ctx belongs to, or nil.
//
// A commit looks at the end of its context after this, not before: an implicit transaction goes with its request, and
// a commit that no longer found it would overwrite.
func (e *EtcdStore) transactionOf(ctx context.Context) *transaction {
	if t := explicit(ctx); t != nil {
		return t
	}
	return e.implicit.of(ctx)
}

// note adds what a Find returned to the read set. Where a commit has lost, the application reads again to try again. A nil
// transaction has no read set.
func (t *transaction) note(k readKey, r read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, again := t.reads[k]; again && t.request && t.lost[k] == nil {
		return
	}
	t.reads[k] = r
}

// noteListed is note for what a listing returned. It must not replace what the request believes about its own session.
func (t *transaction) noteListed(k readKey, r read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if own, ok := t.reads[k]; ok {
		r, r.copied = own, true
	}
	t.reads[k] = r
}

// read returns what the transaction has read of a session, if anything.
func (t *transaction) read(k readKey) (r read, ok bool) {
	if t == nil {
		return read{}, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok = t.reads[k]
	return r, ok
}

// wrote adds to the read set what the request believes after a write: what it wrote. Where that was merged with what
// others wrote, no revision holds exactly that, so the next commit merges again and never overwrites. Where the request has
// two copies of the session, the other one does not have what this one wrote: its commit is merged from the first read, and
// there is nothing to merge it into if this one was deleted.
func (t *transaction) wrote(k readKey, r read) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if was := t.reads[k]; was.copied {
		if r.version != nil {
			was.version = r.version
		}
		r = was
	}
	t.reads[k] = r
	delete(t.lost, k)
}

// lose notes that a commit lost against another request.
func (t *transaction) lose(k readKey, err error) {
	if t == nil || !errors.Is(err, ErrConflict) && !errors.Is(err, ErrSessionGone) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost == nil {
		t.lost = make(map[readKey]error, 1)
	}
	t.lost[k] = err
}

// defeat returns with which session, and why, the transaction has lost; the error is nil if it has not.
func (t *transaction) defeat() (token string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, err := range t.lost {
		return k.token, err
	}
	return "", nil
}

// commit is the transition of a commit.
type commit struct {
	merger
	base  *read // nil: the session was not read, or there is no transaction
	ours  *image
	touch time.Duration
}

func (c *commit) next(cur state) (*image, error) {
	switch {
	case c.base == nil, c.base.image == nil && cur.image == nil:
		return c.ours, nil
	case cur.image == nil, c.reborn(cur):
		return nil, ErrSessionGone
	case c.base.image != nil && cur.rev != 0 && cur.rev == c.base.rev:
		return c.ours, nil
	}
	return c.merged(cur.image)
}

// reborn reports whether the session that was read has been deleted since, and another created under its token.
func (c *commit) reborn(cur state) bool {
	return c.base.image != nil && c.base.version != nil && c.base.version.created != cur.born
}

// merged merges the commit into theirs. What does not decode is a conflict.
func (c *commit) merged(theirs *image) (*image, error) {
	var b *contents
	if c.base.image != nil {
		var err error
		if b, err = c.base.image.decoded(); err != nil {
			return nil, &ConflictError{}
		}
	}
	o, errOurs := c.ours.decoded()
	t, errTheirs := theirs.decoded()
	if errOurs != nil || errTheirs != nil {
		return nil, &ConflictError{}
	}
	m, err := c.merge(b, o, t)
	if err != nil {
		return nil, err
	}
	expiry := c.expiry(b, o, t, m, theirs.expiry)
	if m == t && (expiry == theirs.expiry || c.withinTouch(theirs.expiry, expiry)) {
		return theirs, nil
	}
	return imageWith(c.ours.codec, m, expiry)
}

// expiry merges the expiry: the side that changed the deadline decides, else the later one holds. Where both changed it,
// a resolver has decided about the deadline, and the expiry follows.
func (c *commit) expiry(base, ours, theirs, merged *contents, theirExpiry record.Millis) record.Millis {
	moved := base != nil && !merged.deadline.Equal(base.deadline)
	later := max(c.ours.expiry, theirExpiry)
	switch {
	case !moved || theirExpiry == 0, ours.deadline.Equal(theirs.deadline):
		return later
	case merged.deadline.Equal(ours.deadline):
		return c.ours.expiry
	case merged.deadline.Equal(theirs.deadline):
		return theirExpiry
	}
	return min(later, record.ToMillis(merged.deadline))
}

// withinTouch reports whether moving the expiry need not be written.
func (c *commit) withinTouch(from, to record.Millis) bool {
	return from != 0 && to >= from && to.Since(from) < c.touch
}

// idle reports whether the commit need not be made at all: it changes nothing but the expiry, and that by less than
// the touch interval.
func (c *commit) idle() bool {
	return c.touch > 0 && c.base != nil && c.base.image != nil && c.base.version.image != nil && // it may be deleted by now
		c.withinTouch(c.base.version.image.expiry, c.ours.expiry) && c.base.image.sameContents(c.ours)
}

// prepare decodes: the session has company, so a merge is likely.
func (c *commit) prepare() {
	_, _ = c.ours.decoded()
	if c.base != nil && c.base.image != nil {
		_, _ = c.base.image.decoded()
	}
}

// remove is the transition of a delete. Delete always wins.
type remove struct{}

func (remove) next(state) (*image, error) { return nil, nil }
func (remove) prepare()                   {}

// update is the transition of Update.
type update struct {
	fn func(values map[string]any) error
}

func (u *update) next(cur state) (*image, error) {
	if cur.image == nil {
		return nil, ErrSessionGone
	}
	if cur.image.expiry == 0 {
		return nil, errBareExpiry
	}
	payload, err := cur.image.encoded()
	if err != nil {
		return nil, err
	}
	copied, err := imageOf(cur.image.codec, payload, 0).decoded() // which fn may change
	if err != nil {
		return nil, err
	}
	values := copied.values
	if values == nil {
		values = make(map[string]any)
	}
	if err := u.fn(values); err != nil {
		return nil, applicationError{err}
	}
	before, err := cur.image.decoded()
	if err != nil {
		return nil, err
	}
	after := &contents{deadline: copied.deadline, values: values, raw: true}
	if after.same(before) {
		return cur.image, nil
	}
	return imageWith(cur.image.codec, after, cur.image.expiry)
}

func (*update) prepare() {}

// Update reads a session, runs fn on its values, and commits what fn left in the map. Where others commit in between,
// fn runs again on what they left; so it should do nothing but change the map, soon, and in the same way each time. It
// never runs after Update has returned. The session's expiry and deadline stay as they are, and where fn changes
// nothing, nothing is written.
//
// fn runs on a goroutine of the store, beside others' sessions: it must return or panic, which reaches Update's caller, but
// not end its goroutine (runtime.Goexit, as testing.T.FailNow does).
//
// An error of fn aborts, and Update returns it as it is. Where there is no such session, or it goes meanwhile, the
// error is ErrSessionGone. Update stands outside of a transaction in ctx: the read set does not change.
func (e *EtcdStore) Update(ctx context.Context, token string, fn func(values map[string]any) error) error {
	if !validToken(token) {
		return ErrSessionGone
	}
	return e.call(ctx, "update", func(deadline time.Time) error {
		for {
			read, err := e.reader.find(ctx, deadline, e.prefix+token)
			if err != nil {
				return err
			}
			if err := read.unreadable(); err != nil {
				return err
			}
			hint, err := e.withExpiry(ctx, deadline, read)
			if err != nil {
				return err
			}
			err = e.pipeline.do(ctx, deadline, &op{key: e.prefix + token, change: &update{fn: fn}, hint: hint})
			if !errors.Is(err, errBareExpiry) {
				return err
			}
		}
	})
}

// withExpiry completes a session of scs's own etcdstore, whose expiry only its lease knows.
func (e *EtcdStore) withExpiry(ctx context.Context, deadline time.Time, v *version) (*version, error) {
	if v.rev == 0 || v.image.expiry != 0 {
		return v, nil
	}
	expiry := record.Forever
	if v.lease != 0 {
		ctx, cancel := context.WithDeadline(ctx, deadline)
		defer cancel()
		err := etcd.Retry(ctx, func(ctx context.Context) error {
			resp, err := e.conn.TimeToLive(ctx, v.lease)
			if err == nil {
				expiry = e.clock.Now().Plus(time.Duration(resp.TTL) * time.Second)
			}
			return clientv3.ContextError(ctx, err)
		})
		if err != nil {
			return nil, err
		}
	}
	completed := *v
	completed.image = imageOf(e.codec, v.image.payload, max(expiry, 1))
	return &completed, nil
}
