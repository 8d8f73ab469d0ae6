package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/seed210be38d/etcdstore/internal/etcdtest"
	"github.com/seed210be38d/etcdstore/internal/session"
)

func TestTransaction_ReadSet(t *testing.T) {
	storeA, storeB := &EtcdStore{}, &EtcdStore{prefix: "b"}
	a, otherToken, otherStore := readKey{storeA, "a"}, readKey{storeA, "b"}, readKey{storeB, "a"}
	readOf := func(rev int64) session.Read {
		return session.Read{Image: session.NewImage(nil, nil, 0), Rev: rev}
	}
	read1, read2, read3 := readOf(1), readOf(2), readOf(3)

	tx := newTransaction()
	want := func(step string, k readKey, want session.Read, known bool) {
		t.Helper()
		if got, ok := tx.read(k); got != want || ok != known {
			t.Errorf("%s: read = %+v, %v; want %+v, %v", step, got, ok, want, known)
		}
	}
	want("new", a, session.Read{}, false)
	tx.note(a, read1)
	want("noted", a, read1, true)
	want("another token", otherToken, session.Read{}, false)
	want("another store", otherStore, session.Read{}, false)
	tx.note(a, read2)
	want("read again", a, read2, true)
	tx.wrote(a, read3)
	want("written", a, read3, true)
	tx.wrote(a, session.Read{})
	want("deleted", a, session.Read{}, true) // which differs from not read at all
	tx.note(otherStore, session.Read{})
	want("read absent", otherStore, session.Read{}, true)
}

func TestTransaction_Outcome(t *testing.T) {
	a, b := readKey{&EtcdStore{}, "a"}, readKey{&EtcdStore{}, "b"}
	conflict := &ConflictError{Keys: []string{"k"}}
	tx := newTransaction()
	want := func(step, token string, want error) {
		t.Helper()
		if got, err, _ := tx.outcome(); got != token || err != want { //nolint:errorlint // the very error
			t.Errorf("%s: defeat = %q, %v; want %q, %v", step, got, err, token, want)
		}
	}
	want("new", "", nil)
	for _, err := range []error{nil, ErrTooLarge, ErrInvalidToken, ErrClosed, ErrOutcomeUnknown, context.Canceled, errors.New("other")} {
		tx.lose(a, err)
		want(fmt.Sprint(err), "", nil)
	}
	for _, err := range []error{conflict, ErrConflict, ErrSessionGone, errLockLost, fmt.Errorf("wrapped: %w", ErrSessionGone)} {
		tx.lose(a, err)
		want(fmt.Sprint(err), "a", err)
	}
	tx.note(a, session.Read{Rev: 5})
	if _, err, _ := tx.outcome(); err == nil {
		t.Error("reading the session again undid the defeat")
	}
	tx.wrote(b, session.Read{Rev: 6})
	if _, err, _ := tx.outcome(); err == nil {
		t.Error("writing another session undid the defeat")
	}
	tx.lose(b, conflict)
	tx.wrote(a, session.Read{Rev: 7})
	want("written with success", "b", conflict)
	tx.wrote(b, session.Read{Rev: 8})
	want("both written", "", nil)
}

// Where a request has lost several sessions, it is told of the one that it lost first.
func TestTransaction_OutcomeIsTheFirst(t *testing.T) {
	for range 20 {
		tx, s := newTransaction(), &EtcdStore{}
		tx.lose(readKey{s, "own"}, ErrSessionGone)
		for i := range 10 {
			tx.lose(readKey{s, fmt.Sprint("other ", i)}, ErrConflict)
		}
		if token, err, _ := tx.outcome(); token != "own" || !errors.Is(err, ErrSessionGone) {
			t.Errorf("outcome = %q, %v", token, err)
		}
	}
}

// Outside of a transaction there is no read set; the calls on it do nothing.
func TestTransaction_Nil(t *testing.T) {
	var tx *transaction
	k := readKey{&EtcdStore{}, "a"}
	tx.note(k, session.Read{Rev: 1})
	tx.wrote(k, session.Read{Rev: 1})
	tx.lose(k, ErrConflict)
	if got, ok := tx.read(k); ok || got != (session.Read{}) {
		t.Errorf("read = %+v, %v", got, ok)
	}
}

func TestTransaction_ConcurrentUse(t *testing.T) {
	tx := newTransaction()
	store := &EtcdStore{}
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			k := readKey{store, fmt.Sprint(i % 4)}
			for rev := range int64(100) {
				tx.note(k, session.Read{Rev: rev})
				tx.lose(k, ErrConflict)
				if r, ok := tx.read(k); !ok || r.Rev < 0 {
					t.Errorf("read = %+v, %v", r, ok)
				}
				_, _, _ = tx.outcome()
				tx.wrote(k, session.Read{Rev: rev})
			}
		})
	}
	wg.Wait()
	if _, err, _ := tx.outcome(); err != nil {
		t.Errorf("defeat = %v after all were written", err)
	}
}

func TestBegin(t *testing.T) {
	type anyKey struct{}
	parent := context.WithValue(t.Context(), anyKey{}, "value")
	if explicit(parent) != nil {
		t.Error("a transaction that nobody began")
	}
	ctx := Begin(parent)
	tx := explicit(ctx)
	if tx == nil || ctx.Value(anyKey{}) != "value" || ctx.Done() != parent.Done() {
		t.Error("Begin does not carry on the context")
	}
	derived, cancel := context.WithCancel(context.WithValue(ctx, anyKey{}, "other"))
	defer cancel()
	if explicit(derived) != tx {
		t.Error("a derived context has another transaction")
	}
	if inner := explicit(Begin(ctx)); inner == nil || inner == tx {
		t.Error("Begin in a transaction begins none")
	}
}

// requestContext returns a context as net/http gives it to a handler, and what ends the request.
func requestContext(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(context.WithValue(context.Background(), http.ServerContextKey, &http.Server{}))
}

func TestImplicitTransactions_Of(t *testing.T) {
	type anyKey struct{}
	var implicit implicitTransactions
	ctx, end := requestContext(t)
	defer end()
	other, endOther := requestContext(t)
	defer endOther()

	tx := implicit.of(ctx)
	if tx == nil {
		t.Fatal("a request has no transaction")
	}
	tx.note(readKey{nil, "a"}, session.Read{Rev: 1})
	// scs derives the contexts of commits with values.
	derived := context.WithValue(context.WithValue(ctx, anyKey{}, 1), anyKey{}, 2)
	if implicit.of(derived) != tx || implicit.of(ctx) != tx {
		t.Error("the contexts of one request have different transactions")
	}
	if otherTx := implicit.of(other); otherTx == nil || otherTx == tx {
		t.Error("two requests share a transaction")
	}
	if n := implicit.len(); n != 2 {
		t.Errorf("%d transactions of 2 requests", n)
	}

	end()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 1 }, "the transaction outlives its request")
	if n := implicit.len(); n != 1 || implicit.of(other) == nil {
		t.Error("the end of one request ended another's transaction")
	}
	// scs may still commit for a request whose browser has gone: what it gets then must not stay.
	if late := implicit.of(derived); late == tx {
		t.Error("the transaction of a request that has ended is still there")
	}
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 1 }, "a late call leaves an entry")
	endOther()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 0 }, "the transaction outlives its request")
}

// Contexts that are not a request's are not tracked: they may live as long as the process.
func TestImplicitTransactions_Of_NoRequest(t *testing.T) {
	var implicit implicitTransactions
	cancellable, cancel := context.WithCancel(context.Background())
	defer cancel()
	local := context.WithValue(cancellable, http.LocalAddrContextKey, "127.0.0.1")
	endless := context.WithValue(context.Background(), http.ServerContextKey, &http.Server{})
	for name, ctx := range map[string]context.Context{
		"background":           context.Background(),
		"cancellable":          cancellable,
		"without the server":   local,
		"request without end":  endless,
		"request's, detached":  context.WithoutCancel(endless),
		"values of a request'": context.WithValue(endless, http.LocalAddrContextKey, "127.0.0.1"),
	} {
		if tx := implicit.of(ctx); tx != nil {
			t.Errorf("%s: a transaction", name)
		}
	}
	if n := implicit.len(); n != 0 {
		t.Errorf("%d entries", n)
	}
}

func TestImplicitTransactions_Of_Concurrent(t *testing.T) {
	var implicit implicitTransactions
	var wg sync.WaitGroup
	for range 8 {
		ctx, end := requestContext(t)
		found := make(chan *transaction, 8)
		var request sync.WaitGroup
		for range cap(found) {
			request.Go(func() { found <- implicit.of(ctx) })
		}
		wg.Go(func() {
			request.Wait()
			first := <-found
			for range cap(found) - 1 {
				if tx := <-found; tx == nil || tx != first {
					t.Error("goroutines of one request have different transactions")
				}
			}
			end()
		})
	}
	wg.Wait()
	etcdtest.Eventually(t, 10*time.Second, func() bool { return implicit.len() == 0 }, "transactions outlive their requests")
}

func TestEtcdStore_TransactionOf(t *testing.T) {
	var e, another EtcdStore
	ctx, end := requestContext(t)
	defer end()
	implicit := e.transactionOf(ctx)
	if implicit == nil {
		t.Fatal("a request has no transaction")
	}
	began := Begin(ctx)
	if got := e.transactionOf(began); got == nil || got == implicit || got != explicit(began) {
		t.Error("what Begin began does not come first")
	}
	if another.transactionOf(began) != explicit(began) {
		t.Error("a transaction does not span stores")
	}
	if another.transactionOf(ctx) == implicit {
		t.Error("stores share implicit transactions")
	}
	if e.transactionOf(context.Background()) != nil {
		t.Error("a transaction outside of a request")
	}
	end()
	for _, s := range []*EtcdStore{&e, &another} {
		etcdtest.Eventually(t, 10*time.Second, func() bool { return s.implicit.len() == 0 }, "the transaction outlives its request")
	}
}
