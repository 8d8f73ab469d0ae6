// Package replay keeps a request's body, so that a handler can read it again.
package replay

import (
	"errors"
	"io"
	"net/http"
	"sync"
)

// Max is how much of a body is kept.
const Max = 1 << 20

// errSealed ends the body of a run whose reading on would make it too large to be kept for the
// next.
var errSealed = errors.New("etcdstore: the run has lost, and its request's body is too large to be read on")

// New returns a body that can be read again.
func New(source io.ReadCloser) *Body { return &Body{source: source} }

// Body is a request's body that can be read again, as far as it was read, up to Max bytes. As the
// bodies of net/http it may be read by a goroutine of its own, also one that a handler has left
// behind.
type Body struct {
	reading sync.Mutex // held while source is read; taken before mu
	source  io.ReadCloser

	mu         sync.Mutex
	reader     *reader // of the current run
	kept       []byte
	overflowed bool  // there was more than is kept
	sealed     bool  // the current run will be repeated: it gets no more than is kept
	err        error // the source's last, io.EOF mostly
}

// Rewind returns the body from its start.
func (p *Body) Rewind() io.ReadCloser {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reader, p.sealed = &reader{Body: p}, false
	return p.reader
}

// Seal makes sure that the body stays repeatable. It reports false where it is not.
func (p *Body) Seal() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sealed = !p.overflowed
	return p.sealed
}

// reader is the body of one run.
type reader struct {
	*Body
	at int // guarded by replay.reading
}

func (r *reader) Read(b []byte) (int, error) {
	r.reading.Lock()
	defer r.reading.Unlock()
	if n, done, err := r.again(b); done {
		return n, err
	}
	n, err := r.source.Read(b)
	r.keep(b[:n], err)
	return n, err
}

// again reads what was read before. It reports whether that is all that the Read gets.
func (r *reader) again(b []byte) (n int, done bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.reader != r:
		return 0, true, http.ErrBodyReadAfterClose
	case r.at < len(r.kept):
		n = copy(b, r.kept[r.at:])
		r.at += n
		return n, true, nil
	case r.err != nil:
		return 0, true, r.err
	case r.sealed && len(r.kept) >= Max:
		return 0, true, errSealed
	}
	return 0, false, nil
}

// keep keeps what was read, unless it is too much for a run that may still pass.
func (r *reader) keep(b []byte, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = err
	switch repeated := r.sealed || r.reader != r; {
	case r.overflowed:
	case !repeated && len(r.kept)+len(b) > Max:
		r.overflowed, r.kept, r.at = true, nil, 0
	default:
		r.kept = append(r.kept, b...)
		r.at += len(b)
	}
}

// Close does nothing: the next run may read on. The server closes the source.
func (*reader) Close() error { return nil }
