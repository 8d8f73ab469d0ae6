package stacks

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/fcgi"
	"net/http/httptest"
	"net/textproto"
	"strings"
	"sync"
	"testing"

	"github.com/quic-go/quic-go/http3"
)

// server starts a server with a handler, which ends with the test.
type server func(*testing.T, http.Handler) client

// client sends a request with these cookies. Several goroutines may use it at once.
type client func(...*http.Cookie) answer

// answer is what came back.
type answer struct {
	code   int
	header http.Header
}

// sessionCookie returns the cookie that names a session.
func sessionCookie(token string) *http.Cookie {
	return &http.Cookie{Name: "session", Value: token}
}

func http1(t *testing.T, h http.Handler) client {
	t.Helper()
	srv := unstarted(h)
	srv.Start()
	t.Cleanup(srv.Close)
	return fetch(t, srv.Client(), srv.URL, "HTTP/1.1")
}

func http2(t *testing.T, h http.Handler) client {
	t.Helper()
	srv := unstarted(h)
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	return fetch(t, srv.Client(), srv.URL, "HTTP/2.0")
}

func http3Server(t *testing.T, h http.Handler) client {
	t.Helper()
	pair := unstarted(nil) // for its certificate, and a client that knows it
	pair.StartTLS()
	defer pair.Close()
	known := pair.Client().Transport.(*http.Transport).TLSClientConfig

	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http3.Server{
		Handler:   h,
		TLSConfig: http3.ConfigureTLSConfig(&tls.Config{Certificates: pair.TLS.Certificates}),
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := srv.Serve(conn); !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	transport := &http3.Transport{TLSClientConfig: known.Clone()}
	t.Cleanup(func() {
		_ = transport.Close()
		_ = srv.Close()
		wg.Wait()
		_ = conn.Close()
	})
	url := "https://" + conn.LocalAddr().String()
	return fetch(t, &http.Client{Transport: transport}, url, "HTTP/3.0")
}

func unstarted(h http.Handler) *httptest.Server {
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	return srv
}

// fetch sends requests with a client of net/http's, and checks what they are sent over.
func fetch(t *testing.T, c *http.Client, url, proto string) client {
	return func(cookies ...*http.Cookie) answer {
		resp, err := c.Do(newRequest(t, url, cookies))
		if err != nil {
			t.Error(err)
			return answer{}
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Error(err)
		}
		if resp.Proto != proto {
			t.Errorf("sent over %s, want %s", resp.Proto, proto)
		}
		return answer{resp.StatusCode, resp.Header}
	}
}

// newRequest returns a request as an adapter makes it from its event: its context is no request's.
func newRequest(t *testing.T, url string, cookies []*http.Cookie) *http.Request {
	//nolint:usetesting // the test's context would be another kind
	r, err := http.NewRequestWithContext(context.Background(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Error(err)
	}
	for _, cookie := range cookies {
		r.AddCookie(cookie)
	}
	return r
}

// recorder is no server: a test calls the handler.
func recorder(_ *testing.T, h http.Handler) client {
	return func(cookies ...*http.Cookie) answer {
		r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
		for _, cookie := range cookies {
			r.AddCookie(cookie)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return answer{w.Code, w.Header()}
	}
}

// serverless is an adapter to a platform that calls a function with an event, and wants the answer.
func serverless(t *testing.T, h http.Handler) client {
	return func(cookies ...*http.Cookie) answer {
		w := &buffered{header: make(http.Header)}
		h.ServeHTTP(w, newRequest(t, "/", cookies))
		w.WriteHeader(http.StatusOK) // unless the handler has
		return answer{w.code, w.header}
	}
}

// buffered is a plain http.ResponseWriter.
type buffered struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (w *buffered) Header() http.Header { return w.header }

func (w *buffered) WriteHeader(code int) {
	if w.code == 0 {
		w.code = code
	}
}

func (w *buffered) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.body.Write(b)
}

// fastCGI is net/http/fcgi, with a web server in front of it that opens a connection for a request.
func fastCGI(t *testing.T, h http.Handler) client {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = fcgi.Serve(l, h) })
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return func(cookies ...*http.Cookie) answer {
		got, err := fastCGIRequest(l.Addr().String(), cookies)
		if err != nil {
			t.Error(err)
		}
		return got
	}
}

// The kinds of FastCGI's records.
const (
	fcgiBegin  = 1
	fcgiEnd    = 3
	fcgiParams = 4
	fcgiStdin  = 5
	fcgiStdout = 6
)

func fastCGIRequest(addr string, cookies []*http.Cookie) (answer, error) {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return answer{}, err
	}
	defer conn.Close()

	var pairs []string
	for _, cookie := range cookies {
		pairs = append(pairs, cookie.String())
	}
	var out bytes.Buffer
	fcgiRecord(&out, fcgiBegin, []byte{0, 1, 0, 0, 0, 0, 0, 0}) // a responder; close the connection
	fcgiRecord(&out, fcgiParams, fcgiPairs(
		"REQUEST_METHOD", http.MethodGet,
		"SERVER_PROTOCOL", "HTTP/1.1",
		"REQUEST_URI", "/",
		"HTTP_HOST", "localhost",
		"HTTP_COOKIE", strings.Join(pairs, "; "),
	))
	fcgiRecord(&out, fcgiParams, nil)
	fcgiRecord(&out, fcgiStdin, nil)
	if _, err := out.WriteTo(conn); err != nil {
		return answer{}, err
	}
	stdout, err := fcgiAnswer(conn)
	if err != nil {
		return answer{}, err
	}
	head, err := textproto.NewReader(bufio.NewReader(stdout)).ReadMIMEHeader()
	if err != nil {
		return answer{}, err
	}
	got := answer{header: http.Header(head)}
	_, err = fmt.Sscan(got.header.Get("Status"), &got.code)
	return got, err
}

// fcgiRecord writes a record of the first request of a connection.
func fcgiRecord(w *bytes.Buffer, kind byte, b []byte) {
	w.Write([]byte{1, kind, 0, 1, byte(len(b) >> 8), byte(len(b)), 0, 0})
	w.Write(b)
}

// fcgiPairs encodes names and values of less than 128 bytes each.
func fcgiPairs(s ...string) (b []byte) {
	for i := 0; i < len(s); i += 2 {
		b = append(b, byte(len(s[i])), byte(len(s[i+1])))
		b = append(b, s[i]+s[i+1]...)
	}
	return b
}

// fcgiAnswer reads records to the end of the answer, and returns what they hold.
func fcgiAnswer(r io.Reader) (*bytes.Buffer, error) {
	var stdout bytes.Buffer
	for {
		var head [8]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return nil, err
		}
		size, padding := int(head[4])<<8|int(head[5]), int(head[6])
		b := make([]byte, size+padding)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		switch head[1] {
		case fcgiStdout:
			stdout.Write(b[:size])
		case fcgiEnd:
			return &stdout, nil
		}
	}
}
