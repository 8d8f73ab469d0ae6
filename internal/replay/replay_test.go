package replay

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"
)

// body returns the body of a request, and how much is left of its source.
func body(s string) (*Body, *strings.Reader) {
	r := strings.NewReader(s)
	return New(io.NopCloser(r)), r
}

// wantRead fails t unless r goes on with want and ends with err.
func wantRead(t *testing.T, r io.Reader, want string, err error) {
	t.Helper()
	got, gotErr := io.ReadAll(r)
	if string(got) != want {
		if len(got)+len(want) > 100 {
			t.Errorf("read %d bytes, want %d others", len(got), len(want))
		} else {
			t.Errorf("read %q, want %q", got, want)
		}
	}
	if !errors.Is(gotErr, err) {
		t.Errorf("error = %v, want %v", gotErr, err)
	}
}

// wantFirst fails t unless the next bytes of r are want.
func wantFirst(t *testing.T, r io.Reader, want string) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(r, got); err != nil || string(got) != want {
		t.Errorf("read %q, %v; want %q", got[:n], err, want)
	}
}

// wantSeal fails t unless Seal says that b is repeatable, or is not.
func wantSeal(t *testing.T, b *Body, want bool) {
	t.Helper()
	if got := b.Seal(); got != want {
		t.Fatalf("Seal = %v", got)
	}
}

func TestBody_ReadsAgain(t *testing.T) {
	for name, read := range map[string]func(*testing.T, io.Reader){
		"nothing": func(*testing.T, io.Reader) {},
		"a part":  func(t *testing.T, r io.Reader) { wantFirst(t, r, "some ") },
		"all":     func(t *testing.T, r io.Reader) { wantRead(t, r, "some body", nil) },
		"bytes":   func(t *testing.T, r io.Reader) { wantRead(t, iotest.OneByteReader(r), "some body", nil) },
	} {
		t.Run(name, func(t *testing.T) {
			b, _ := body("some body")
			for range 3 {
				r := b.Rewind()
				read(t, r)
				if err := r.Close(); err != nil {
					t.Error(err)
				}
				wantSeal(t, b, true)
			}
			wantRead(t, b.Rewind(), "some body", nil)
		})
	}
}

// A run that reads on where the one before has stopped gets what is kept, and then what the source has left.
func TestBody_ReadsOn(t *testing.T) {
	b, source := body("some body")
	wantFirst(t, b.Rewind(), "some")
	if source.Len() != 5 {
		t.Errorf("%d bytes are left, want 5: more was read than was asked for", source.Len())
	}
	r := b.Rewind()
	wantFirst(t, r, "some bo")
	wantRead(t, r, "dy", nil)
	wantRead(t, r, "", nil)
	wantRead(t, b.Rewind(), "some body", nil)
}

// The source's error is the end of every run, after what came before it. The source is not asked again.
func TestBody_SourceFails(t *testing.T) {
	broken := errors.New("broken")
	b := New(io.NopCloser(io.MultiReader(iotest.DataErrReader(strings.NewReader("some")), &failing{t: t, err: broken})))
	for range 2 {
		wantRead(t, b.Rewind(), "some", broken)
		wantSeal(t, b, true)
	}
	// Also where it comes with the last bytes.
	b = New(io.NopCloser(iotest.DataErrReader(strings.NewReader("some"))))
	for range 2 {
		wantRead(t, b.Rewind(), "some", nil)
	}
}

// failing is a source that fails, and must not be asked again.
type failing struct {
	t     *testing.T
	err   error
	asked bool
}

func (f *failing) Read([]byte) (int, error) {
	if f.asked {
		f.t.Error("the source that has failed is asked again")
	}
	f.asked = true
	return 0, f.err
}

// A body of Max bytes is kept; of a larger one the run that reads it gets all, but it is the last.
func TestBody_Overflow(t *testing.T) {
	for _, over := range []int{0, 1} {
		large := strings.Repeat("x", Max-1) + strings.Repeat("y", 1+over)
		b, _ := body(large)
		wantFirst(t, b.Rewind(), large[:100])
		r := b.Rewind()
		wantRead(t, r, large, nil)
		wantSeal(t, b, over == 0)
		if over == 0 {
			wantRead(t, b.Rewind(), large, nil)
			continue
		}
		wantRead(t, r, "", nil) // still the end, and no longer what was kept
		if b.kept != nil {
			t.Errorf("%d bytes are kept for nobody", len(b.kept))
		}
	}
}

// The body does not overflow where the run does not read that far.
func TestBody_LargeUnread(t *testing.T) {
	b, source := body(strings.Repeat("x", 2*Max))
	wantFirst(t, b.Rewind(), strings.Repeat("x", Max))
	wantSeal(t, b, true)
	if source.Len() != Max {
		t.Errorf("%d bytes are left, want %d", source.Len(), Max)
	}
	wantFirst(t, b.Rewind(), strings.Repeat("x", Max))
	wantSeal(t, b, true)
}

// A run that is sealed, as it will be repeated, cannot spoil that by reading on, and the next run is not sealed.
func TestBody_Seal(t *testing.T) {
	large := strings.Repeat("x", 2*Max)
	b, source := body(large)
	r := b.Rewind()
	wantFirst(t, r, large[:100])
	wantSeal(t, b, true)
	got, err := io.ReadAll(r)
	if !errors.Is(err, errSealed) || len(got) < Max-100 || source.Len() == 0 {
		t.Errorf("a sealed run read %d bytes, %v; want to be ended after %d", len(got), err, Max)
	}
	wantSeal(t, b, true)
	wantRead(t, b.Rewind(), large, nil)
	wantSeal(t, b, false)
}

// A small body is read to its end all the same.
func TestBody_SealSmall(t *testing.T) {
	b, _ := body("some body")
	r := b.Rewind()
	wantFirst(t, r, "some")
	wantSeal(t, b, true)
	wantRead(t, r, " body", nil)
	wantRead(t, b.Rewind(), "some body", nil)
}

// A goroutine that a run has left behind does not read on: neither takes it from the next run what is its, nor does it see
// that.
func TestBody_OldRun(t *testing.T) {
	b, _ := body("some body")
	old := b.Rewind()
	wantFirst(t, old, "some")
	r := b.Rewind()
	wantRead(t, old, "", http.ErrBodyReadAfterClose)
	wantFirst(t, r, "some b")
	wantRead(t, old, "", http.ErrBodyReadAfterClose)
	wantRead(t, r, "ody", nil)
	wantRead(t, old, "", http.ErrBodyReadAfterClose)
	wantRead(t, b.Rewind(), "some body", nil)
}

// waiting is a source each of whose Reads says that it is under way, and then waits for what it gets.
type waiting struct {
	underWay chan struct{}
	gets     chan string
}

func (w waiting) Read(b []byte) (int, error) {
	w.underWay <- struct{}{}
	s, ok := <-w.gets
	if !ok {
		return 0, io.EOF
	}
	return copy(b, s), nil
}

// What a Read that was under way when its run ended gets from the source is the next run's, too, in its place, and however
// much it is: the run that it would spoil is not the one that it is for.
func TestBody_ReadUnderWay(t *testing.T) {
	large := strings.Repeat("z", Max)
	for name, leave := range map[string]func(*Body) io.Reader{
		"rewound": func(b *Body) io.Reader { return b.Rewind() },
		"sealed": func(b *Body) io.Reader {
			wantSeal(t, b, true)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := waiting{make(chan struct{}, 10), make(chan string, 10)}
			b := New(io.NopCloser(w))
			old := b.Rewind()
			w.gets <- "some "
			wantFirst(t, old, "some ")
			<-w.underWay

			got := make(chan []byte)
			go func() {
				buf := make([]byte, Max)
				n, err := old.Read(buf)
				if err != nil {
					t.Error(err)
				}
				got <- buf[:n]
			}()
			<-w.underWay
			r := leave(b)
			w.gets <- large
			if read := <-got; string(read) != large {
				t.Errorf("the old run read %d bytes, want %d", len(read), len(large))
			}
			if r == nil {
				r = b.Rewind()
			}
			wantFirst(t, r, "some "+large)
			wantSeal(t, b, true)
			r = b.Rewind()
			wantFirst(t, r, "some "+large)
			close(w.gets)
			wantRead(t, r, "", nil)
		})
	}
}

// exclusive is a source that no two may read at once.
type exclusive struct {
	io.Reader
	t  *testing.T
	in atomic.Int32
}

func (e *exclusive) Read(b []byte) (int, error) {
	if e.in.Add(1) != 1 {
		e.t.Error("the source is read by two at once")
	}
	defer e.in.Add(-1)
	time.Sleep(10 * time.Microsecond)
	return e.Reader.Read(b)
}

// A run and what others have left behind may read at once. The race detector looks on.
func TestBody_Concurrent(t *testing.T) {
	content := bytes.Repeat([]byte("0123456789"), 10_000)
	b := New(io.NopCloser(&exclusive{Reader: iotest.HalfReader(bytes.NewReader(content)), t: t}))
	begun, done := make(chan struct{}), make(chan struct{})
	const runs = 8
	for range runs {
		old := b.Rewind()
		go func() {
			defer func() { done <- struct{}{} }()
			wantFirst(t, old, "0")
			begun <- struct{}{}
			got, err := io.ReadAll(old)
			if err != nil && !errors.Is(err, http.ErrBodyReadAfterClose) {
				t.Error(err)
			}
			if !bytes.HasPrefix(content, append([]byte("0"), got...)) {
				t.Error("an old run read something else than the body's start")
			}
		}()
		<-begun
	}
	wantRead(t, b.Rewind(), string(content), nil)
	for range runs {
		<-done
	}
}
