package etcdstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"weak"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/session"
	"github.com/seed210be38d/etcdstore/internal/weakmap"
)

// The version travels in the session.
//
// A commit is validated against what its copy of the session was read from. The link between the
// two is not the context, which frameworks, servers and adapters derive, detach and share at will,
// but the copy itself, as with Kubernetes' resourceVersion and HTTP's ETag: the codec puts a
// reserved value among the session's values when it decodes them, and takes it out when it encodes
// them. It is never stored.
//
//	FindCtx ── bytes ──> Decode ── values with a mark ──> application ──> Encode ── bytes ──> CommitCtx
//
// scs hands on the very bytes that it is given, so on either side of it a registry of weak pointers
// finds what belongs to them: a read, or the marks of a copy. What nobody holds any more is
// forgotten.
//
// Each copy is a transaction of its own, with its own base, moved by its own commits. Two copies in
// one request are as two requests; a copy may be committed several times.
//
// scs's operations on a copy, and what becomes of its mark:
//
//   - RenewToken keeps it. So a copy that is committed under a fresh token, and whose mark names a
//     session that was deleted since, is a renewal (renew).
//   - Clear and Destroy drop it, and so does an application that removes all keys. The copy is
//     still known by its map, which scs never replaces: that gives the base for a commit under the
//     same token, and never makes a renewal, so that after a Destroy nothing of the earlier session
//     reaches the next.
//   - MergeSession copies another session's values, with its mark. Marks are named by their
//     session, so they do not collide.
//
// Where the bytes do not arrive as they were given (a wrapper that copies or encrypts them), or the
// session manager has another codec, the context is the fallback (txn.go).
//
// Rejected: the version in the stored bytes (every commit would carry it, and a codec of the
// application's own would have to know it), and the map alone, which cannot tell RenewToken from
// Destroy followed by new data.

// markPrefix begins the keys of marks. scs reserves keys that begin with two underscores in the
// same way.
const markPrefix = "__etcdstore:"

// Codec is for scs.SessionManager.Codec: around the codec of [WithCodec], it lets each copy of a
// session carry the version that it was read at, so that commits are validated under every server,
// router and adapter, and whatever becomes of contexts:
//
//	sessionManager.Codec = store.Codec()
//
// While a session is loaded, its values have one more key, which begins with "__etcdstore:".
// SessionManager.Keys shows it; it is never stored. An application that carries values over a
// Destroy by hand must not carry that one.
func (e *EtcdStore) Codec() scs.Codec {
	e.linked.Store(true)
	return linkCodec{e}
}

// linkCodec is the codec of Codec.
type linkCodec struct{ store *EtcdStore }

// loaded copies: by the bytes that scs was given, by the bytes that it gives, and by the map of
// their values.
var (
	readsByBytes  weakmap.Map[*origin]
	copiesByBytes weakmap.Map[encoded]
	copiesByMap   weakmap.Map[*loadedCopy]
)

// encoded is what bytes that Encode has returned were made from: the copy whose map it was, and the
// marks in it.
type encoded struct {
	copy  *loadedCopy
	marks []*loadedCopy
}

// origin is what bytes that FindCtx or AllCtx has returned were read from.
type origin struct {
	store *EtcdStore
	token string
	read  session.Read
	by    caller
}

// caller is what tells the request that a call is of, as far as its context does.
type caller struct {
	t    *transaction    // of Begin, Retry or Exclusive
	done <-chan struct{} // of the context
	conn any             // of net/http: its local address, which each connection has of its own
}

func callerOf(ctx context.Context) caller {
	c := caller{t: explicit(ctx), done: ctx.Done()}
	if addr, ok := ctx.Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		c.conn = addr
	}
	return c
}

// is reports whether two calls are of one request.
func (c caller) is(other caller) bool {
	return c.t != nil && c.t == other.t || c.done != nil && c.done == other.done
}

// near reports whether two calls are of one connection: where a handler has derived its context,
// that is of one request, unless the connection carries several at a time.
func (c caller) near(other caller) bool { return c.conn != nil && c.conn == other.conn }

// loadedCopy is a copy of a session that the application has in memory. It is the mark among the
// copy's values.
type loadedCopy struct {
	store *EtcdStore

	mu      sync.Mutex
	token   string // "": it was never stored
	read    session.Read
	by      caller
	deleted *deletion // of the session, since it was read
}

// deletion is what a call found that deleted a session: nil if it found none.
type deletion struct{ image *session.Image }

// String keeps what is in a mark from being printed with the values that it is among.
func (*loadedCopy) String() string { return "version" }

// GoString is String for the verb %#v.
func (*loadedCopy) GoString() string { return "version" }

// markKey names the mark of a session, by a hash of its token.
func markKey(token string) string {
	if token == "" {
		return markPrefix + "new"
	}
	hash := sha256.Sum256([]byte("etcdstore mark " + token))
	return markPrefix + hex.EncodeToString(hash[:8])
}

// give returns what was read for scs, as bytes of their own that Decode finds the read by.
func (e *EtcdStore) give(by caller, token string, r session.Read) []byte {
	b := ownBytes(r.Payload())
	if e.linked.Load() {
		readsByBytes.Put(first(b), &origin{store: e, token: token, read: r, by: by})
	}
	return b
}

// ownBytes returns a copy of b in an allocation of its own: small ones share one otherwise, and
// have no end of their own.
func ownBytes(b []byte) []byte {
	own := make([]byte, len(b), max(len(b), 64))
	copy(own, b)
	return own
}

func first(b []byte) *byte { return &b[:1][0] }

// Decode implements scs.Codec.
func (c linkCodec) Decode(b []byte) (time.Time, map[string]any, error) {
	deadline, values, err := c.store.codec.Decode(b)
	if err != nil || cap(b) == 0 {
		return deadline, values, err
	}
	if o, ok := readsByBytes.Get(first(b)); ok {
		if values == nil {
			values = make(map[string]any, 1)
		}
		l := &loadedCopy{store: o.store, token: o.token, read: o.read, by: o.by}
		o.store.copies.add(l, o.token)
		values[markKey(o.token)] = l
		copiesByMap.Put(mapOf(values), l)
	}
	return deadline, values, nil
}

// mapOf returns where a map begins.
func mapOf(values map[string]any) *byte { return (*byte)(reflect.ValueOf(values).UnsafePointer()) }

// Encode implements scs.Codec. scs calls it with the copy's own map, under its mutex.
func (c linkCodec) Encode(deadline time.Time, values map[string]any) ([]byte, error) {
	if values == nil {
		values = make(map[string]any, 1)
	}
	marks := takeMarks(values)
	l, known := copiesByMap.Get(mapOf(values))
	if !known {
		l = &loadedCopy{store: c.store}
		copiesByMap.Put(mapOf(values), l)
	}
	switch {
	case slices.Contains(marks, l):
	case l.wasDeleted():
		marks = append(marks, &loadedCopy{store: c.store}) // of what begins now
	default:
		marks = append(marks, l)
	}
	defer putMarks(values, marks)
	b, err := c.store.codec.Encode(deadline, values)
	if err != nil {
		return nil, err
	}
	b = ownBytes(b) // the codec may keep, or give again, what it returned
	copiesByBytes.Put(first(b), encoded{l, marks})
	return b, nil
}

// takeMarks takes the marks out of a copy's values.
func takeMarks(values map[string]any) (marks []*loadedCopy) {
	for key, v := range values {
		if l, ok := v.(*loadedCopy); ok && strings.HasPrefix(key, markPrefix) {
			marks = append(marks, l)
			delete(values, key)
		}
	}
	return marks
}

// putMarks puts them back, each under its session's name by now.
func putMarks(values map[string]any, marks []*loadedCopy) {
	for _, l := range marks {
		l.mu.Lock()
		values[markKey(l.token)] = l
		l.mu.Unlock()
	}
}

// source is what a commit comes from.
type source struct {
	store   *EtcdStore
	copy    *loadedCopy   // nil: it is not known
	renewed []*loadedCopy // marks of the sessions that the commit renews
	fresh   *loadedCopy   // the mark of a session that was not stored yet
	by      caller
}

// sourceOf returns what the bytes of a commit come from, under this token.
func (e *EtcdStore) sourceOf(ctx context.Context, token string, b []byte) source {
	s := source{store: e, by: callerOf(ctx)}
	if cap(b) == 0 {
		return s
	}
	from, ok := copiesByBytes.Get(first(b))
	if !ok {
		return s
	}
	for _, l := range slices.Concat(from.marks, []*loadedCopy{from.copy}) {
		if l.store == e && l.names(token) {
			s.copy = l
			return s
		}
	}
	s.copy = from.copy
	for _, l := range from.marks {
		switch {
		case l.store != e:
		case l.wasDeleted():
			s.renewed = append(s.renewed, l)
		case l.names(""):
			s.fresh = l
		}
	}
	if len(s.renewed) == 0 && from.copy.store != e {
		s.copy = &loadedCopy{store: e} // moved to this store from another
	}
	return s
}

func (l *loadedCopy) names(token string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token == token
}

// caller returns whose copy it is.
func (l *loadedCopy) caller() caller {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.by
}

func (l *loadedCopy) wasDeleted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token != "" && l.deleted != nil
}

// base returns what a commit under this token is based on: what its copy was read from or has
// stored since. Of a copy that is not known, the transaction tells. It is nil where the session was
// never read: then the commit overwrites.
func (s source) base(token string, t *transaction) *session.Read {
	if s.copy == nil {
		if r, ok := t.read(readKey{s.store, token}); ok {
			return &r
		}
		return nil
	}
	s.copy.mu.Lock()
	defer s.copy.mu.Unlock()
	if s.copy.token != token {
		return nil
	}
	r := s.copy.read
	return &r
}

// moveTo says that the commit was stored under a token, and what its copy is by now.
func (s source) moveTo(token string, r session.Read) {
	for _, l := range []*loadedCopy{s.copy, s.fresh} {
		if l != nil {
			l.moveTo(token, r, s.by)
		}
	}
}

func (l *loadedCopy) moveTo(token string, r session.Read, by caller) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.by == (caller{}) {
		l.by = by
	}
	if l.token != token {
		l.deleted = nil
		l.store.copies.forget(l.token, weak.Make(l))
		l.store.copies.add(l, token)
	}
	l.token, l.read = token, r
}

// renew returns ours with what others have committed to the sessions that it renews, between the
// read and the deletion of each. Where they changed what this request changed, the resolver
// decides, else this request: a renewal is a login, mostly, and must not be lost. It is not made
// where the session was gone before the request deleted it.
func (e *EtcdStore) renew(ours *session.Image, renewed []*loadedCopy) (*session.Image, error) {
	for _, l := range renewed {
		l.mu.Lock()
		base, theirs := l.read.Image, l.deleted.image
		l.mu.Unlock()
		if theirs == nil {
			return nil, ErrSessionGone
		}
		ours = e.merger().CarryOver(base, ours, theirs)
	}
	return ours, nil
}

// copies finds the loaded copies of a session. Its mutex is taken after a copy's, where both are.
type copies struct {
	mu      sync.Mutex
	byToken map[string]map[weak.Pointer[loadedCopy]]struct{}
}

// add adds a copy, until nobody holds it any more.
func (c *copies) add(l *loadedCopy, token string) {
	p := weak.Make(l)
	c.mu.Lock()
	if c.byToken == nil {
		c.byToken = make(map[string]map[weak.Pointer[loadedCopy]]struct{})
	}
	if c.byToken[token] == nil {
		c.byToken[token] = make(map[weak.Pointer[loadedCopy]]struct{}, 1)
	}
	c.byToken[token][p] = struct{}{}
	c.mu.Unlock()
	runtime.AddCleanup(l, func(p weak.Pointer[loadedCopy]) { c.forget(token, p) }, p)
}

// has reports whether a session is loaded.
func (c *copies) has(token string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byToken[token]) > 0
}

func (c *copies) forget(token string, p weak.Pointer[loadedCopy]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.byToken[token], p)
	if len(c.byToken[token]) == 0 {
		delete(c.byToken, token)
	}
}

// deleted tells the copies of a session that a call has deleted it, and what that found: those of
// the call's own request, or of its connection, or all where there are none. scs does not say which
// copy it is that deletes.
func (c *copies) deleted(ctx context.Context, token string, found *session.Image) {
	by, loaded := callerOf(ctx), c.of(token)
	own := loaded
	for _, ours := range []func(caller) bool{by.near, by.is} { // the closer one counts
		of := slices.DeleteFunc(slices.Clone(loaded), func(l *loadedCopy) bool { return !ours(l.caller()) })
		if len(of) > 0 {
			own = of
		}
	}
	for _, l := range own {
		l.mu.Lock()
		if l.token == token {
			l.deleted = &deletion{found}
		}
		l.mu.Unlock()
	}
}

// of returns the loaded copies of a session.
func (c *copies) of(token string) (loaded []*loadedCopy) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for p := range c.byToken[token] {
		if l := p.Value(); l != nil {
			loaded = append(loaded, l)
		}
	}
	return loaded
}
