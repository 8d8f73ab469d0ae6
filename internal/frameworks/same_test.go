package frameworks

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/alexedwards/scs/v2"
	chimiddleware "github.com/go-chi/chi/v5/middleware"
	"github.com/gorilla/handlers"
	"github.com/gorilla/websocket"
)

// stage is where a scenario is played: one session store, one arrangement.
type stage struct {
	*site
	t     *testing.T
	sm    *scs.SessionManager
	token string
	dir   string        // with page.html and large.bin
	step  chan struct{} // for scenarios in which client and handler wait for each other

	seen []string // what the client saw
	ends []func() // of the backends

	mu    sync.Mutex
	notes []string // what the handlers saw
}

// note keeps what a handler saw.
func (s *stage) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// saw keeps what the client saw.
func (s *stage) saw(format string, args ...any) {
	s.seen = append(s.seen, fmt.Sprintf(format, args...))
}

// touch changes the session as most handlers do.
func (s *stage) touch(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.sm.Put(r.Context(), "n", s.sm.GetInt(r.Context(), "n")+1)
		h.ServeHTTP(w, r)
	})
}

// proxy serves from a backend.
func (s *stage) proxy(flush time.Duration, backend http.HandlerFunc) http.Handler {
	b := serve(s.t, backend)
	s.ends = append(s.ends, b.end)
	target, err := url.Parse(b.url)
	if err != nil {
		s.t.Fatal(err)
	}
	return &httputil.ReverseProxy{
		Rewrite:       func(p *httputil.ProxyRequest) { p.SetURL(target) },
		Transport:     b.Transport,
		FlushInterval: flush,
	}
}

// play makes requests one after the other, and notes the answers.
func (s *stage) play(requests ...*http.Request) {
	for _, req := range requests {
		s.noteAnswer(s.do(req))
	}
}

var (
	dates    = regexp.MustCompile(`(?m)^Date: .*\n|; Expires=[^;\n]*|; Max-Age=\d+`)
	tokens   = regexp.MustCompile(`session=[\w-]{43}`)
	boundary = regexp.MustCompile(`[0-9a-f]{60}`)
)

// scrub removes what differs from one answer to the next.
func scrub(text string) string {
	text = dates.ReplaceAllString(strings.ReplaceAll(text, "\r\n", "\n"), "")
	return boundary.ReplaceAllString(tokens.ReplaceAllString(text, "session=TOKEN"), "BOUNDARY")
}

func (s *stage) noteAnswer(a answer) {
	a.header.Del("Date")
	for _, values := range a.header {
		for i := range values {
			values[i] = scrub(values[i])
		}
	}
	if len(a.body) > 4096 {
		a.body = fmt.Sprintf("%d bytes, %x", len(a.body), sha256.Sum256([]byte(a.body)))
	} else {
		a.body = scrub(a.body)
	}
	s.saw("%+v", a)
}

// raw sends text over a connection of its own, and notes all that comes back. It makes COOKIE the
// session's, and waits for an answer of one line before what follows a line of "---".
func (s *stage) raw(text string) {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	text = strings.ReplaceAll(text, "COOKIE", "Cookie: session="+s.token)
	text = strings.ReplaceAll(text, "\n", "\r\n")
	r := bufio.NewReader(conn)
	parts := strings.Split(text, "---\r\n")
	for i, part := range parts {
		if _, err := io.WriteString(conn, part); err != nil {
			s.saw("send: failed")
		}
		if i < len(parts)-1 {
			line, err := r.ReadString('\n')
			s.saw("%q, failed: %v", line, err != nil)
		}
	}
	rest, err := io.ReadAll(r)
	s.saw("%s\nfailed: %v", scrub(string(rest)), err != nil)
}

// scenario is an application without conflicts, and what its clients do.
type scenario struct {
	http1   bool                                           // it is about HTTP/1 only
	handler func(s *stage) http.Handler                    // inside of LoadAndSave
	between func(s *stage, next http.Handler) http.Handler // around LoadAndSave
	outside func(next http.Handler) http.Handler           // around all of the store
	talk    func(s *stage)                                 // default: GET, HEAD and POST of /
}

func text(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat("text ", 400)) }

func handle(f http.HandlerFunc) func(*stage) http.Handler {
	return func(*stage) http.Handler { return f }
}

// inside is text in a middleware.
func inside(mw middleware) func(*stage) http.Handler {
	return func(*stage) http.Handler { return mw(http.HandlerFunc(text)) }
}

func between(mw middleware) func(*stage, http.Handler) http.Handler {
	return func(_ *stage, next http.Handler) http.Handler { return mw(next) }
}

// noteWrite writes, and notes what that returns.
func (s *stage) noteWrite(w io.Writer, text string) {
	n, err := io.WriteString(w, text)
	s.note("wrote %d, %v", n, err)
}

func gzipped(s *stage) {
	for _, accept := range []string{"", "gzip", "deflate", "gzip, br"} {
		for _, method := range []string{http.MethodGet, http.MethodHead} {
			req := s.request(method, "/", s.token, nil)
			req.Header.Set("Accept-Encoding", accept)
			s.play(req)
		}
	}
}

// partsOf makes requests for parts of a file, and for it if it has changed.
func partsOf(path string) func(s *stage) {
	return func(s *stage) {
		whole := s.do(s.request(http.MethodGet, path, s.token, nil))
		modified, tag := whole.header.Get("Last-Modified"), whole.header.Get("Etag")
		s.noteAnswer(whole)
		for _, h := range [][]string{
			{"Range", "bytes=0-9"},
			{"Range", "bytes=-5"},
			{"Range", "bytes=0-1,4-5"},
			{"Range", "bytes=999999999-"},
			{"Range", "nonsense"},
			{"If-Modified-Since", modified},
			{"If-Unmodified-Since", "Mon, 02 Jan 2006 15:04:05 GMT"},
			{"If-None-Match", tag},
			{"If-None-Match", `"other"`},
			{"If-Match", `"other"`},
			{"If-Range", modified, "Range", "bytes=0-3"},
			{"If-Range", `"other"`, "Range", "bytes=0-3"},
		} {
			for _, method := range []string{http.MethodGet, http.MethodHead} {
				req := s.request(method, path, s.token, nil)
				for i := 0; i < len(h); i += 2 {
					req.Header.Set(h[i], h[i+1])
				}
				s.play(req)
			}
		}
	}
}

// hijacker gives gorilla/websocket, which does not unwrap, the connection of a writer that can be.
type hijacker struct{ http.ResponseWriter }

func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return http.NewResponseController(h.ResponseWriter).Hijack()
}

var upgrader websocket.Upgrader

// wsEcho is a websocket that says what it hears.
func wsEcho(s *stage, w http.ResponseWriter, r *http.Request) {
	conn, err := upgrader.Upgrade(w, r, http.Header{"X-Upgraded": {"yes"}})
	if err != nil {
		s.note("upgrade: %v", err)
		return
	}
	defer conn.Close()
	for {
		kind, text, err := conn.ReadMessage()
		if err != nil {
			s.note("read: %v", err)
			return
		}
		if err := conn.WriteMessage(kind, append([]byte("you said "), text...)); err != nil {
			s.note("write: %v", err)
			return
		}
	}
}

func wsTalk(path string) func(s *stage) {
	return func(s *stage) {
		header := http.Header{"Cookie": {"session=" + s.token}}
		addr := "ws" + strings.TrimPrefix(s.url, "http") + path
		conn, resp, err := websocket.DefaultDialer.Dial(addr, header)
		if resp != nil {
			defer resp.Body.Close()
			resp.Header.Del("Date")
			resp.Header.Del("Sec-Websocket-Accept")
			s.saw("%d %v", resp.StatusCode, resp.Header)
		}
		if err != nil {
			s.saw("dial: %v", err)
			return
		}
		defer conn.Close()
		for _, text := range []string{"hello", strings.Repeat("large", 20000)} {
			if err := conn.WriteMessage(websocket.TextMessage, []byte(text)); err != nil {
				s.saw("write: %v", err)
			}
			_, got, err := conn.ReadMessage()
			s.saw("heard %d bytes, %v, %v", len(got), string(got) == "you said "+text, err)
		}
		bye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "bye")
		_ = conn.WriteMessage(websocket.CloseMessage, bye)
		_, _, err = conn.ReadMessage()
		s.saw("closed: %v", err)
	}
}

// upload is a multipart form with a field and a file.
func upload(s *stage, size int) *http.Request {
	var b bytes.Buffer
	m := multipart.NewWriter(&b)
	_ = m.WriteField("name", "value")
	f, _ := m.CreateFormFile("file", "a.txt")
	_, _ = f.Write(bytes.Repeat([]byte("x"), size))
	_ = m.Close()
	req := s.request(http.MethodPost, "/", s.token, &b)
	req.Header.Set("Content-Type", m.FormDataContentType())
	return req
}

var scenarios = map[string]scenario{
	"text":    {handler: handle(text)},
	"nothing": {handler: handle(func(http.ResponseWriter, *http.Request) {})},
	"status": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusTeapot)
	})},
	"two statuses": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusAccepted)
		w.WriteHeader(http.StatusTeapot)
	})},
	"204": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNoContent)
			s.noteWrite(w, "body")
		})
	}},
	"304": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Etag", `"x"`)
			w.WriteHeader(http.StatusNotModified)
			s.noteWrite(w, "body")
		})
	}},
	"impossible status": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(0)
	})},
	"redirect": {handler: handle(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "/elsewhere", http.StatusSeeOther)
	})},
	"declared length": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "4")
			s.noteWrite(w, "more than that")
			s.noteWrite(w, "four")
		})
	}},
	"less than the declared length": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "4")
		fmt.Fprint(w, "two")
	})},
	"early hints": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Link", "</script.js>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprint(w, "text")
	})},
	"gorilla's CompressHandler inside": {
		handler: inside(handlers.CompressHandler), talk: gzipped,
	},
	"gorilla's CompressHandler between": {
		handler: handle(text), between: between(handlers.CompressHandler), talk: gzipped,
	},
	"gorilla's CompressHandler outside": {
		handler: handle(text), outside: handlers.CompressHandler, talk: gzipped,
	},
	"chi's Compress inside": {
		handler: inside(chimiddleware.Compress(5)), talk: gzipped,
	},
	"chi's Compress between": {
		handler: handle(text), between: between(chimiddleware.Compress(5)), talk: gzipped,
	},
	"chi's Compress outside": {
		handler: handle(text), outside: chimiddleware.Compress(5), talk: gzipped,
	},
	"compressed stream": {
		handler: handle(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			for range 3 {
				fmt.Fprint(w, "text")
				_ = http.NewResponseController(w).Flush()
			}
		}),
		outside: chimiddleware.Compress(5),
		talk:    gzipped,
	},
	"FileServer": {
		handler: func(s *stage) http.Handler { return http.FileServer(http.Dir(s.dir)) },
		talk: func(s *stage) {
			for _, path := range []string{"/", "/page.html", "/missing", "/large.bin", "/sub"} {
				s.play(s.request(http.MethodGet, path, s.token, nil))
			}
			partsOf("/page.html")(s)
			partsOf("/large.bin")(s)
		},
	},
	"ServeContent": {handler: handle(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Etag", `"content-1"`)
		modified := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
		http.ServeContent(w, r, "page.txt", modified, strings.NewReader("0123456789"))
	}), talk: partsOf("/")},
	"ServeContent that fails": {handler: handle(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "page.txt", time.Time{}, failing{strings.NewReader("0123456789")})
	})},
	"large file by io.Copy": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			f, err := os.Open(filepath.Join(s.dir, "large.bin"))
			if err != nil {
				s.note("%v", err)
				return
			}
			defer f.Close()
			n, err := io.Copy(w, f)
			s.note("copied %d, %v", n, err)
		})
	}},
	"large file by io.Copy outside of LoadAndSave": {
		handler: handle(text),
		between: func(s *stage, _ http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				f, err := os.Open(filepath.Join(s.dir, "large.bin"))
				if err != nil {
					s.note("%v", err)
					return
				}
				defer f.Close()
				n, err := io.Copy(w, f)
				s.note("copied %d, %v", n, err)
			})
		},
	},
	"reader that fails": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			r := io.MultiReader(strings.NewReader("text"), iotest.ErrReader(io.ErrUnexpectedEOF))
			n, err := io.Copy(w, r)
			s.note("copied %d, %v", n, err)
		})
	}},
	"MaxBytesReader": {
		handler: handle(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, 100)); err != nil {
				http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
				return
			}
			fmt.Fprint(w, "ok")
		}),
		talk: func(s *stage) {
			for _, n := range []int{0, 100, 101, 1000} {
				body := strings.NewReader(strings.Repeat("x", n))
				s.play(s.request(http.MethodPost, "/", s.token, body))
			}
			if strings.HasPrefix(s.url, "http:") {
				s.raw("POST / HTTP/1.1\nHost: x\nCOOKIE\nContent-Length: 3000000\n\n" +
					strings.Repeat("x", 101))
			}
		},
	},
	"MaxBytesHandler outside": {
		handler: handle(func(w http.ResponseWriter, r *http.Request) {
			if _, err := io.Copy(io.Discard, r.Body); err != nil {
				http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
				return
			}
			fmt.Fprint(w, "ok")
		}),
		outside: func(h http.Handler) http.Handler { return http.MaxBytesHandler(h, 100) },
		talk: func(s *stage) {
			for _, n := range []int{0, 100, 101, 1000} {
				body := strings.NewReader(strings.Repeat("x", n))
				s.play(s.request(http.MethodPost, "/", s.token, body))
			}
		},
	},
	"multipart upload": {
		handler: func(s *stage) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				f, header, err := r.FormFile("file")
				if err != nil {
					http.Error(w, err.Error(), http.StatusBadRequest)
					return
				}
				defer f.Close()
				n, err := io.Copy(io.Discard, f)
				fmt.Fprint(w, r.FormValue("name"), header.Filename, header.Size, n, err)
			})
		},
		talk: func(s *stage) {
			s.play(upload(s, 100), upload(s, 3<<20), s.request(http.MethodPost, "/", s.token, nil))
		},
	},
	"request trailers": {
		handler: handle(func(w http.ResponseWriter, r *http.Request) {
			before := len(r.Trailer)
			b, err := io.ReadAll(r.Body)
			fmt.Fprint(w, before, len(b), err, r.Trailer)
		}),
		talk: func(s *stage) {
			for _, n := range []int{0, 10, 100 << 10} {
				body := struct{ io.Reader }{strings.NewReader(strings.Repeat("x", n))}
				req := s.request(http.MethodPost, "/", s.token, body)
				req.Trailer = http.Header{"X-Sum": {"42"}, "X-Other": {"yes"}}
				s.play(req)
			}
		},
	},
	"response trailers": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Declared")
		fmt.Fprint(w, "text")
		_ = http.NewResponseController(w).Flush()
		w.Header().Set("X-Declared", "a")
		w.Header().Set(http.TrailerPrefix+"X-Late", "b")
	})},
	"trailers without a body": {handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Trailer", "X-Declared")
		w.WriteHeader(http.StatusOK)
		w.Header().Set("X-Declared", "a")
	})},
	"Expect: 100-continue": {
		http1: true,
		handler: handle(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/refuse" {
				http.Error(w, "no", http.StatusForbidden)
				return
			}
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n, err)
		}),
		talk: func(s *stage) {
			for _, path := range []string{"/", "/refuse"} {
				req := s.request(http.MethodPost, path, s.token, strings.NewReader("0123456789"))
				req.Header.Set("Expect", "100-continue")
				s.play(req)
			}
			s.raw("POST / HTTP/1.1\nHost: x\nCOOKIE\nConnection: close\nExpect: 100-continue\n" +
				"Content-Length: 4\n\n---\nbody")
			s.raw("POST /refuse HTTP/1.1\nHost: x\nCOOKIE\nConnection: close\nExpect: 100-continue\n" +
				"Content-Length: 4\n\n")
		},
	},
	"HTTP/1.0, pipelined, and unread bodies": {
		http1: true,
		handler: func(s *stage) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/some" {
					_, _ = io.CopyN(io.Discard, r.Body, 3)
				}
				if r.URL.Path == "/close" {
					_ = r.Body.Close()
				}
				fmt.Fprint(w, r.Method, r.URL.Path)
			})
		},
		talk: func(s *stage) {
			s.raw("GET / HTTP/1.0\nCOOKIE\n\n")
			s.raw("GET / HTTP/1.0\nCOOKIE\nConnection: keep-alive\n\nGET /last HTTP/1.0\n\n")
			last := "GET /last HTTP/1.1\nHost: x\nConnection: close\nCOOKIE\n\n"
			for _, path := range []string{"/none", "/some", "/close"} {
				post := "POST " + path + " HTTP/1.1\nHost: x\nCOOKIE\n"
				s.raw(post + "Content-Length: 10\n\n0123456789" + last)
				s.raw(post + "Transfer-Encoding: chunked\n\n4\n0123\n6\n456789\n0\n\n" + last)
				s.raw(post + "Transfer-Encoding: chunked\n\n4\n0123\nnonsense\n" + last)
			}
		},
	},
	"panic":             {handler: handle(panicking("boom"))},
	"panic nil":         {handler: handle(panicking(error(nil)))},
	"abort":             {handler: handle(panicking(http.ErrAbortHandler))},
	"panic in a stream": {handler: breakOff("boom"), talk: brokenOff},
	"abort in a stream": {handler: breakOff(http.ErrAbortHandler), talk: brokenOff},
	"panic and Recoverer": {
		handler: handle(func(http.ResponseWriter, *http.Request) { panic("boom") }),
		outside: handlers.RecoveryHandler(handlers.RecoveryLogger(silent{})),
	},
	"hijack": {http1: true, handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		fmt.Fprint(rw, "HTTP/1.1 200 OK\r\nX-Raw: yes\r\nContent-Length: 3\r\n\r\nraw")
		_ = rw.Flush()
	}), talk: func(s *stage) { s.play(s.request(http.MethodGet, "/", s.token, nil)) }},
	"writes after a hijack": {http1: true, handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				s.note("%v", err)
				return
			}
			defer conn.Close()
			_, err = fmt.Fprint(w, "text")
			s.note("write: %v", err)
			s.note("flush: %v", http.NewResponseController(w).Flush())
			_, _, err = http.NewResponseController(w).Hijack()
			s.note("hijack: %v", err)
		})
	}, talk: func(s *stage) { s.play(s.request(http.MethodGet, "/", s.token, nil)) }},
	"hijack after writing": {http1: true, handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "text")
			_ = http.NewResponseController(w).Flush()
			<-s.step
			conn, _, err := http.NewResponseController(w).Hijack()
			s.note("hijack: %v", err)
			if err == nil {
				_ = conn.Close()
			}
		})
	}, talk: brokenOff},
	"websocket": {http1: true, handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			wsEcho(s, hijacker{w}, r)
		})
	}, talk: wsTalk("/")},
	"websocket that scs hides": {http1: true, handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { wsEcho(s, w, r) })
	}, talk: wsTalk("/")},
	"websocket outside of LoadAndSave": {
		http1: true, handler: handle(text), talk: wsTalk("/ws"),
		between: func(s *stage, next http.Handler) http.Handler {
			m := http.NewServeMux()
			m.Handle("/", next)
			m.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) { wsEcho(s, w, r) })
			return m
		},
	},
	"server-sent events": {
		handler: func(s *stage) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				for n := range 3 {
					fmt.Fprintf(w, "data: %d\n\n", n)
					s.note("flush: %v", http.NewResponseController(w).Flush())
					<-s.step
				}
				<-r.Context().Done()
				s.note("the client has gone: %v", r.Context().Err())
			})
		},
		talk: func(s *stage) {
			resp, err := s.Do(s.request(http.MethodGet, "/", s.token, nil))
			if err != nil {
				s.saw("%v", err)
				return
			}
			defer resp.Body.Close()
			r := bufio.NewReader(resp.Body)
			for range 3 {
				line, err := r.ReadString('\n')
				_, _ = r.ReadString('\n')
				s.saw("%q %v", line, err)
				s.step <- struct{}{}
			}
		},
	},
	"full duplex": {
		handler: func(s *stage) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c := http.NewResponseController(w)
				s.note("full duplex: %v", c.EnableFullDuplex())
				b := make([]byte, 4)
				for {
					n, err := r.Body.Read(b)
					if n > 0 {
						fmt.Fprintf(w, "<%s>", b[:n])
						_ = c.Flush()
					}
					if err != nil {
						s.note("read: %v", err)
						return
					}
				}
			})
		},
		talk: func(s *stage) {
			pr, pw := io.Pipe()
			go func() { _, _ = io.WriteString(pw, "abcd") }()
			resp, err := s.Do(s.request(http.MethodPost, "/", s.token, pr))
			if err != nil {
				s.saw("%v", err)
				return
			}
			defer resp.Body.Close()
			b := make([]byte, 6)
			_, err = io.ReadFull(resp.Body, b)
			s.saw("%s %v", b, err)
			_, _ = io.WriteString(pw, "ef")
			_, err = io.ReadFull(resp.Body, b[:4])
			s.saw("%s %v", b[:4], err)
			_ = pw.Close()
			rest, err := io.ReadAll(resp.Body)
			s.saw("%q %v", rest, err)
		},
	},
	"deadlines": {handler: func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			c, later := http.NewResponseController(w), time.Now().Add(patience)
			s.note("%v %v", c.SetReadDeadline(later), c.SetWriteDeadline(later))
			fmt.Fprint(w, "text")
		})
	}},
	// These end the request's context, and with it the commit of any store that heeds it.
	"deadlines that have passed, outside of LoadAndSave": {
		handler: handle(text),
		between: func(s *stage, _ http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c, past := http.NewResponseController(w), time.Now().Add(-time.Second)
				if r.URL.Path == "/write" {
					s.note("write: %v", c.SetWriteDeadline(past))
				} else {
					s.note("read: %v", c.SetReadDeadline(past))
					_, err := io.ReadAll(r.Body)
					s.note("read timed out: %v", os.IsTimeout(err))
				}
				fmt.Fprint(w, "text")
			})
		},
		talk: func(s *stage) {
			s.play(s.request(http.MethodGet, "/write", s.token, nil))
			pr, pw := io.Pipe()
			a := s.do(s.request(http.MethodPost, "/read", s.token, pr))
			_ = pw.Close()
			s.noteAnswer(a)
		},
	},
	"what the writer is": {http1: true, handler: handle(func(w http.ResponseWriter, _ *http.Request) {
		_, flusher := w.(http.Flusher)
		_, hijacker := w.(http.Hijacker)
		_, pusher := w.(http.Pusher)
		fmt.Fprint(w, "flusher ", flusher, ", hijacker ", hijacker, ", pusher ", pusher)
	})},
	"what the writer is outside of LoadAndSave": {
		http1: true, handler: handle(text),
		between: func(*stage, http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				_, flusher := w.(http.Flusher)
				_, hijacker := w.(http.Hijacker)
				_, pusher := w.(http.Pusher)
				fmt.Fprint(w, "flusher ", flusher, ", hijacker ", hijacker, ", pusher ", pusher)
			})
		},
	},
	"pusher over HTTP/2": {handler: handle(func(w http.ResponseWriter, r *http.Request) {
		_, pusher := w.(http.Pusher)
		fmt.Fprint(w, r.ProtoMajor, pusher)
	})},
	"proxy with early hints and trailers": {
		handler: func(s *stage) http.Handler {
			return s.proxy(0, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Link", "</style.css>; rel=preload")
				w.WriteHeader(http.StatusEarlyHints)
				w.Header().Set("Trailer", "X-Declared")
				_, _ = io.Copy(w, r.Body)
				fmt.Fprint(w, "from the backend")
				w.Header().Set("X-Declared", "a")
				w.Header().Set(http.TrailerPrefix+"X-Late", "b")
			})
		},
		talk: func(s *stage) {
			for _, method := range []string{http.MethodGet, http.MethodHead, http.MethodPost} {
				body := strings.NewReader(strings.Repeat("x", 1000))
				s.play(s.request(method, "/", s.token, body))
			}
		},
	},
	"proxy of a stream": {
		handler: func(s *stage) http.Handler {
			return s.proxy(-1, func(w http.ResponseWriter, r *http.Request) {
				for n := range 3 {
					fmt.Fprintf(w, "%d\n", n)
					_ = http.NewResponseController(w).Flush()
					<-s.step
				}
			})
		},
		talk: func(s *stage) {
			resp, err := s.Do(s.request(http.MethodGet, "/", s.token, nil))
			if err != nil {
				s.saw("%v", err)
				return
			}
			defer resp.Body.Close()
			r := bufio.NewReader(resp.Body)
			for range 3 {
				line, err := r.ReadString('\n')
				s.saw("%q %v", line, err)
				s.step <- struct{}{}
			}
			rest, err := io.ReadAll(r)
			s.saw("%q %v", rest, err)
		},
	},
	"proxy whose backend breaks off": {
		handler: func(s *stage) http.Handler {
			return s.proxy(-1, breakOff(http.ErrAbortHandler)(s).ServeHTTP)
		},
		talk: brokenOff,
	},
	"proxy of an upgrade": {
		http1: true,
		handler: func(s *stage) http.Handler {
			return s.proxy(0, func(w http.ResponseWriter, r *http.Request) { wsEcho(s, w, r) })
		},
		talk: wsTalk("/"),
	},
	"proxy of an upgrade by hand": {
		http1: true,
		handler: func(s *stage) http.Handler {
			return s.proxy(0, func(w http.ResponseWriter, r *http.Request) {
				conn, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					return
				}
				defer conn.Close()
				fmt.Fprint(rw, "HTTP/1.1 101 Switching Protocols\r\n"+
					"Connection: upgrade\r\nUpgrade: shout\r\n\r\n")
				_ = rw.Flush()
				line, _ := rw.ReadString('\n')
				fmt.Fprint(rw, strings.ToUpper(line))
				_ = rw.Flush()
			})
		},
		talk: func(s *stage) {
			s.raw("GET / HTTP/1.1\nHost: x\nCOOKIE\nConnection: upgrade\nUpgrade: shout\n\n---\nhello\n")
		},
	},
}

func panicking(with any) http.HandlerFunc {
	return func(http.ResponseWriter, *http.Request) { panic(with) }
}

// breakOff streams, and panics when the client has the first part.
func breakOff(with any) func(s *stage) http.Handler {
	return func(s *stage) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "text")
			_ = http.NewResponseController(w).Flush()
			<-s.step
			panic(with)
		})
	}
}

func brokenOff(s *stage) {
	resp, err := s.Do(s.request(http.MethodGet, "/", s.token, nil))
	if err != nil {
		s.saw("%v", err)
		return
	}
	defer resp.Body.Close()
	b := make([]byte, 4)
	_, err = io.ReadFull(resp.Body, b)
	s.saw("%s, %v", b, err)
	close(s.step)
	_, err = io.ReadAll(resp.Body)
	s.saw("%d, the rest failed: %v", resp.StatusCode, err != nil)
}

type failing struct{ io.ReadSeeker }

func (failing) Seek(int64, int) (int64, error) { return 0, io.ErrUnexpectedEOF }

type silent struct{}

func (silent) Println(...any) {}

// Where nobody conflicts, everything is byte by byte as with scs's own store, with whatever stands
// around LoadAndSave: status, headers, body, trailers, what the handler saw, and the server's log.
func TestSame(t *testing.T) {
	dir := t.TempDir()
	modified := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	for name, size := range map[string]int{"page.html": 300, "large.bin": 5 << 20, "sub/a.txt": 1} {
		name = filepath.Join(dir, name)
		_ = os.Mkdir(filepath.Dir(name), 0o700)
		content := bytes.Repeat([]byte("0123456789abcde\n"), size/16+1)
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, modified, modified); err != nil {
			t.Fatal(err)
		}
	}
	a := newApp(t)
	memory := scs.New()
	for name, sc := range scenarios {
		for _, http2 := range []bool{false, true} {
			if http2 && sc.http1 {
				continue
			}
			t.Run(fmt.Sprintf("%s/HTTP2 %v", name, http2), func(t *testing.T) {
				want := sc.perform(t, memory, dir, http2, memory.LoadAndSave, plain)
				for how, mw := range map[string]middleware{
					"LoadAndSave": plain,
					"Retry":       a.store.Retry,
					"Exclusive":   func(h http.Handler) http.Handler { return a.store.Exclusive(a.sm, h) },
				} {
					got := sc.perform(t, a.sm, dir, http2, a.sm.LoadAndSave, mw)
					if !reflect.DeepEqual(got, want) {
						t.Errorf("%s: %s", how, difference(got, want))
					}
				}
			})
		}
	}
}

// perform plays a scenario and returns all that was noted.
func (sc scenario) perform(t *testing.T, sm *scs.SessionManager, dir string, http2 bool,
	load, around middleware,
) []string {
	t.Helper()
	s := &stage{t: t, sm: sm, token: login(t, sm), dir: dir, step: make(chan struct{})}
	h := load(s.touch(sc.handler(s)))
	if sc.between != nil {
		h = sc.between(s, h)
	}
	h = around(h)
	if sc.outside != nil {
		h = sc.outside(h)
	}
	s.site = serve(t, h, func(srv *httptest.Server) { srv.EnableHTTP2 = http2 })
	if sc.talk == nil {
		s.play(s.request(http.MethodGet, "/", s.token, nil),
			s.request(http.MethodHead, "/", s.token, nil),
			s.request(http.MethodPost, "/", s.token, strings.NewReader("body")))
	} else {
		sc.talk(s)
	}
	s.end()
	for _, end := range s.ends {
		end()
	}
	if !http2 {
		log, _, _ := strings.Cut(s.log.String(), "\n")
		log, _, _ = strings.Cut(log, "127.0.0.1")
		log, _, _ = strings.Cut(log, " from ")
		s.saw("log: %s", log)
	}
	ctx, err := sm.Load(t.Context(), s.token)
	if err != nil {
		t.Fatal(err)
	}
	s.saw("the session has counted %d", sm.GetInt(ctx, "n"))
	return append(s.seen, s.notes...)
}

// difference shows what differs first.
func difference(got, want []string) string {
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Sprintf("\n%s\nwant\n%s", got[i], want[i])
		}
	}
	return fmt.Sprintf("%d notes, want %d:\n%q\nwant\n%q", len(got), len(want), got, want)
}
