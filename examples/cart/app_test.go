package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/seed210be38d/etcdstore"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if err := noLeaks(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// noLeaks waits longer than goleak would by itself: etcd's members read from each other with a deadline of 5 seconds,
// which a stopped member may have to wait for.
func noLeaks() error {
	// scs.New starts this with the memory store that every session manager has at first, and never ends it.
	memstore := goleak.IgnoreAnyFunction("github.com/alexedwards/scs/v2/memstore.(*MemStore).startCleanup")
	for deadline := time.Now().Add(10 * time.Second); ; {
		err := goleak.Find(memstore)
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// shop is the application, running.
type shop struct {
	urls []string
	stop func() // stops it and checks that it ends well
}

// open runs the application until the test ends, on free ports unless cfg names one.
func open(t *testing.T, cfg config) *shop {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	started, ended := make(chan []string, 1), make(chan error, 1)
	if cfg.addr == "" {
		cfg.addr = "localhost:0"
	}
	cfg.started = func(urls []string) { started <- urls }
	go func() { ended <- run(ctx, cfg, io.Discard) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("run ended with %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("run does not end")
		}
	})
	t.Cleanup(stop)
	select {
	case urls := <-started:
		return &shop{urls: urls, stop: stop}
	case err := <-ended:
		t.Fatalf("run ended before it began: %v", err)
	case <-time.After(time.Minute):
		t.Fatal("the application does not start")
	}
	return nil
}

// visitor is a browser without JavaScript.
type visitor struct {
	t      *testing.T
	client *http.Client
}

func newVisitor(t *testing.T) *visitor {
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = stormSize
	t.Cleanup(transport.CloseIdleConnections)
	return &visitor{t: t, client: &http.Client{Jar: jar, Transport: transport, Timeout: 30 * time.Second}}
}

// do sends one request and returns the answer's status and body. It may be called from any goroutine.
func (v *visitor) do(method, target string, form url.Values) (*http.Response, string, error) {
	var body io.Reader
	if method == http.MethodPost {
		body = strings.NewReader(form.Encode())
	}
	req, err := http.NewRequest(method, target, body)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := v.client.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

func (v *visitor) must(method, target string, form url.Values) string {
	v.t.Helper()
	resp, body, err := v.do(method, target, form)
	if err != nil {
		v.t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		v.t.Fatalf("%s %s: %s\n%s", method, resp.Request.URL.Path, resp.Status, body)
	}
	return body
}

func (v *visitor) get(target string) string {
	v.t.Helper()
	return v.must(http.MethodGet, target, nil)
}

func (v *visitor) post(target string, fields ...string) string {
	v.t.Helper()
	form := url.Values{}
	for i := 0; i < len(fields); i += 2 {
		form.Set(fields[i], fields[i+1])
	}
	return v.must(http.MethodPost, target, form)
}

func (v *visitor) cookie(target, name string) string {
	u, err := url.Parse(target)
	if err != nil {
		v.t.Fatal(err)
	}
	for _, c := range v.client.Jar.Cookies(u) {
		if c.Name == name {
			return c.Value
		}
	}
	return ""
}

// field returns what the page shows under that name, "" if nothing.
func field(page, name string) string {
	m := regexp.MustCompile(`data-(?:field|count)="` + name + `"[^>]*>([^<]*)<`).FindStringSubmatch(page)
	if m == nil {
		return ""
	}
	return m[1]
}

func wantField(t *testing.T, page, name, want string) {
	t.Helper()
	if got := field(page, name); got != want {
		t.Errorf("the page shows %s = %q, want %q", name, got, want)
	}
}

func TestCart(t *testing.T) {
	s := open(t, config{members: 1})
	v := newVisitor(t)
	one, two, three := s.urls[0], s.urls[1], s.urls[2]

	page := v.get(one)
	wantField(t, page, "count", "0 items")
	wantField(t, page, "revision", "none yet")

	wantField(t, v.post(one+"/cart/add", "item", "apple"), "count", "1 item")
	v.post(two+"/cart/add", "item", "apple")
	page = v.post(three+"/cart/add", "item", "lemon")
	wantField(t, page, "server", "Server 3")
	wantField(t, page, "count", "3 items")
	wantField(t, page, "apple", "2")
	wantField(t, page, "lemon", "1")
	before, err := strconv.ParseInt(field(page, "revision"), 10, 64)
	if err != nil || before <= 0 {
		t.Errorf("the page shows revision %q", field(page, "revision"))
	}
	if field(page, "expires") == "" {
		t.Error("the page does not show when the session expires")
	}

	page = v.post(two+"/cart/remove", "item", "apple")
	wantField(t, page, "apple", "1")
	if after, err := strconv.ParseInt(field(page, "revision"), 10, 64); err != nil || after <= before {
		t.Errorf("revision %d became %q", before, field(page, "revision"))
	}
	v.post(one+"/cart/remove", "item", "apple")
	page = v.post(one+"/cart/remove", "item", "apple") // there is none left
	wantField(t, page, "apple", "0")
	wantField(t, v.post(three+"/cart/empty"), "count", "0 items")
}

func TestLogin(t *testing.T) {
	s := open(t, config{members: 1})
	v := newVisitor(t)
	one, two := s.urls[0], s.urls[1]

	v.post(one+"/cart/add", "item", "bread")
	anonymous := v.cookie(one, "cart")
	page := v.post(one+"/login", "name", " Grace ")
	wantField(t, page, "user", "Grace")
	wantField(t, page, "bread", "1")
	known := v.cookie(one, "cart")
	if known == "" || known == anonymous {
		t.Error("the login did not renew the token")
	}
	if strings.Contains(page, known) {
		t.Error("the page contains the token")
	}
	wantEmpty(t, two, anonymous)

	page = v.post(two + "/logout")
	wantField(t, page, "user", "")
	wantField(t, page, "count", "0 items")
	if c := v.cookie(one, "cart"); c != "" {
		t.Error("the cookie is still there after the logout")
	}
	wantEmpty(t, one, known)
}

// wantEmpty checks that nothing is behind a token any more.
func wantEmpty(t *testing.T, server, token string) {
	t.Helper()
	thief := newVisitor(t)
	u, _ := url.Parse(server)
	thief.client.Jar.SetCookies(u, []*http.Cookie{{Name: "cart", Value: token}})
	page := thief.get(server)
	wantField(t, page, "count", "0 items")
	wantField(t, page, "user", "")
}

func TestStop(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	s := open(t, config{members: 1})
	newVisitor(t).post(s.urls[0]+"/cart/add", "item", "apple")
	s.stop()
	if left, _ := filepath.Glob(os.TempDir() + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, _, err := newVisitor(t).do(http.MethodGet, s.urls[0], nil); err == nil {
		t.Error("the server still answers")
	}
}

func TestDataIsKept(t *testing.T) {
	cfg := config{members: 1, data: t.TempDir()}
	v := newVisitor(t)
	s := open(t, cfg)
	v.post(s.urls[0]+"/cart/add", "item", "honey")
	token := v.cookie(s.urls[0], "cart")
	s.stop()

	s = open(t, cfg)
	u, _ := url.Parse(s.urls[0])
	v.client.Jar.SetCookies(u, []*http.Cookie{{Name: "cart", Value: token}})
	wantField(t, v.get(s.urls[0]), "honey", "1")
	s.stop()

	cfg.members = 3
	if err := run(t.Context(), cfg, io.Discard); err == nil {
		t.Error("a cluster of one was opened as one of three")
	}
}

func TestEndpoints(t *testing.T) {
	c, err := startCluster(t.Context(), "", 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s := open(t, config{endpoints: c.Endpoints()})
	v := newVisitor(t)
	wantField(t, v.post(s.urls[1]+"/cart/add", "item", "coffee"), "coffee", "1")
	if page := v.get(s.urls[0]); !strings.Contains(page, "data-never") {
		t.Error("the page offers to kill somebody else's leader")
	}
	resp, _, err := v.do(http.MethodPost, s.urls[0]+"/race/leader/kill", nil)
	if err != nil || resp.StatusCode != http.StatusConflict {
		t.Errorf("killing somebody else's leader: %v, %v", resp, err)
	}
}

func TestBadForms(t *testing.T) {
	s := open(t, config{members: 1})
	v := newVisitor(t)
	for _, c := range []struct {
		path, key, value string
		want             int
	}{
		{"/cart/add", "item", "", http.StatusBadRequest},
		{"/cart/add", "item", "user", http.StatusBadRequest},
		{"/login", "name", " ", http.StatusBadRequest},
		{"/login", "name", strings.Repeat("x", 41), http.StatusBadRequest},
		{"/login", "name", strings.Repeat("x", 1<<20), http.StatusBadRequest},
		{"/race/ours/add", "item", "51", http.StatusBadRequest},
		{"/race/ours/late", "race", "none", http.StatusNotFound},
		{"/race/release", "race", "none", http.StatusNotFound},
		{"/race/leader/kill", "", "", http.StatusConflict},
		{"/nothing", "", "", http.StatusNotFound},
	} {
		resp, _, err := v.do(http.MethodPost, s.urls[0]+c.path, url.Values{c.key: {c.value}})
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != c.want {
			t.Errorf("%s %s=%.10q: %s, want %d", c.path, c.key, c.value, resp.Status, c.want)
		}
	}
	page := v.post(s.urls[0]+"/login", "name", "<script>alert(1)</script>")
	if strings.Contains(page, "<script>alert") {
		t.Error("a name is not escaped")
	}
}

// TestWhoMayCall checks what keeps other sites out.
func TestWhoMayCall(t *testing.T) {
	s := open(t, config{members: 1})
	v := newVisitor(t)
	v.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	ask := func(method, host, origin, site string) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, s.urls[0]+"/cart/empty", nil)
		if method == http.MethodGet {
			req, err = http.NewRequest(method, s.urls[0]+"/?a=b", nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		if host != "" {
			req.Host = host
		}
		if origin != "" {
			req.Header.Set("Origin", origin)
			req.Header.Set("Sec-Fetch-Site", site)
		}
		resp, err := v.client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}

	for _, c := range []struct {
		origin, site string
		want         int
		mayRead      bool
	}{
		{s.urls[0], "same-origin", http.StatusSeeOther, true},
		{s.urls[2], "same-site", http.StatusSeeOther, true},
		{"http://localhost:1", "same-site", http.StatusForbidden, false},
		{"https://example.org", "cross-site", http.StatusForbidden, false},
		{"null", "cross-site", http.StatusForbidden, false},
	} {
		resp := ask(http.MethodPost, "", c.origin, c.site)
		if resp.StatusCode != c.want {
			t.Errorf("POST from %s: %s, want %d", c.origin, resp.Status, c.want)
		}
		allowed := resp.Header.Get("Access-Control-Allow-Origin")
		if c.mayRead != (allowed == c.origin) || !c.mayRead && allowed != "" {
			t.Errorf("POST from %s: Access-Control-Allow-Origin: %q", c.origin, allowed)
		}
	}

	if resp := ask(http.MethodPost, "evil.example", "", ""); resp.StatusCode != http.StatusMisdirectedRequest {
		t.Errorf("POST to another host name: %s", resp.Status)
	}
	resp := ask(http.MethodGet, "127.0.0.1", "", "")
	if got, want := resp.Header.Get("Location"), s.urls[0]+"/?a=b"; got != want {
		t.Errorf("GET by another host name leads to %q, want %q", got, want)
	}

	h := ask(http.MethodGet, "", "", "").Header
	for name, want := range map[string]string{
		"Content-Security-Policy": "frame-ancestors 'none'",
		"X-Content-Type-Options":  "nosniff",
		"Referrer-Policy":         "same-origin",
	} {
		if got := h.Get(name); !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q in it", name, got, want)
		}
	}
	if csp := h.Get("Content-Security-Policy"); strings.Contains(csp, "unsafe") || strings.Contains(csp, "*") {
		t.Errorf("Content-Security-Policy: %s", csp)
	}
}

// storm adds the items from first to last at once, without a browser's limit on connections, and returns how many
// requests failed.
func (v *visitor) storm(s *shop, store string, first, last int) (failed int) {
	errs := make([]error, last+1)
	var wg sync.WaitGroup
	for item := first; item <= last; item++ {
		wg.Go(func() {
			resp, body, err := v.do(http.MethodPost, s.urls[item%servers]+"/race/"+store+"/add",
				url.Values{"item": {strconv.Itoa(item)}})
			if err == nil && resp.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s: %s", resp.Status, body)
			}
			errs[item] = err
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			failed++
			v.t.Logf("%s: %v", store, err)
		}
	}
	return failed
}

// race begins one and returns its name.
func (v *visitor) race(server, store string) string {
	v.t.Helper()
	var answer struct{ Race string }
	if err := json.Unmarshal([]byte(v.post(server+"/race/"+store+"/start")), &answer); err != nil {
		v.t.Fatal(err)
	}
	return answer.Race
}

func (v *visitor) result(server, store, race string) (res result) {
	v.t.Helper()
	body := v.get(server + "/race/" + store + "/result?race=" + race)
	if err := json.Unmarshal([]byte(body), &res); err != nil {
		v.t.Fatal(err)
	}
	return res
}

func TestStorm(t *testing.T) {
	s := open(t, config{members: 3})
	v := newVisitor(t)
	for range 3 {
		race := v.race(s.urls[0], "ours")
		failed := v.storm(s, "ours", 1, stormSize)
		res := v.result(s.urls[1], "ours", race)
		if failed != 0 || len(res.Kept) != stormSize {
			t.Errorf("etcdstore: %d failed, %d of %d kept", failed, len(res.Kept), stormSize)
		}
		if res.Leases > servers {
			t.Errorf("etcdstore: %d leases for one session", res.Leases)
		}
	}

	race := v.race(s.urls[0], "plain")
	failed := v.storm(s, "plain", 1, stormSize)
	res := v.result(s.urls[1], "plain", race)
	t.Logf("plain store: %d failed, %d kept, %d leases", failed, len(res.Kept), res.Leases)
	if len(res.Kept) == stormSize {
		t.Error("the plain store kept everything: the storm is none")
	}
	if res.Leases <= servers {
		t.Errorf("the plain store made %d leases", res.Leases)
	}
}

// TestStormWithoutLeader kills the leader when half of the storm is under way; the other half finds none.
func TestStormWithoutLeader(t *testing.T) {
	s := open(t, config{members: 3})
	v := newVisitor(t)
	race := v.race(s.urls[0], "ours")
	var under, after int
	var wg sync.WaitGroup
	wg.Go(func() { under = v.storm(s, "ours", 1, stormSize/2) })
	v.post(s.urls[0] + "/race/leader/kill")
	after = v.storm(s, "ours", stormSize/2+1, stormSize)
	wg.Wait()
	v.post(s.urls[1] + "/race/leader/restart")
	res := v.result(s.urls[2], "ours", race)
	if under+after != 0 || len(res.Kept) != stormSize {
		t.Errorf("%d and %d failed, %d of %d kept", under, after, len(res.Kept), stormSize)
	}
}

// TestSameItem adds the same product from everywhere at once: the resolver adds up.
func TestSameItem(t *testing.T) {
	s := open(t, config{members: 3})
	v := newVisitor(t)
	v.post(s.urls[0]+"/cart/add", "item", "apple")
	var wg sync.WaitGroup
	for i := range stormSize {
		wg.Go(func() {
			resp, body, err := v.do(http.MethodPost, s.urls[i%servers]+"/cart/add", url.Values{"item": {"apple"}})
			if err != nil || resp.StatusCode != http.StatusOK {
				t.Errorf("add: %v %s", err, body)
			}
		})
	}
	wg.Wait()
	wantField(t, v.get(s.urls[1]), "apple", strconv.Itoa(stormSize+1))
}

func TestLogoutRace(t *testing.T) {
	s := open(t, config{members: 1})
	for store, want := range map[string]string{"plain": "Ada", "ours": ""} {
		v := newVisitor(t)
		race := v.race(s.urls[0], store)
		token := v.cookie(s.urls[0], "race-"+store)

		answers := v.late(s, store, race)
		v.post(s.urls[1] + "/race/" + store + "/logout")
		v.post(s.urls[2]+"/race/release", "race", race)
		for range lateSize {
			if a := <-answers; a.err != nil {
				t.Error(a.err)
			}
		}

		// Whether the browser's cookie came back is one question, whether the old one opens the session another.
		if got := v.user(s.urls[0], store); got != want {
			t.Errorf("%s: after the logout the browser belongs to %q, want %q", store, got, want)
		}
		thief := newVisitor(t)
		u, _ := url.Parse(s.urls[0])
		thief.client.Jar.SetCookies(u, []*http.Cookie{{Name: "race-" + store, Value: token}})
		if got := thief.user(s.urls[0], store); got != want {
			t.Errorf("%s: after the logout the old cookie belongs to %q, want %q", store, got, want)
		}
	}
}

// answer is the status of an answer, or why there is none.
type answer struct {
	status int
	err    error
}

// late makes all late requests of a race, and returns when the servers hold them.
func (v *visitor) late(s *shop, store, race string) <-chan answer {
	v.t.Helper()
	answers := make(chan answer, lateSize)
	for i := range lateSize {
		go func() {
			form := url.Values{"race": {race}, "item": {strconv.Itoa(i + 1)}}
			resp, _, err := v.do(http.MethodPost, s.urls[i%servers]+"/race/"+store+"/late", form)
			if err != nil {
				answers <- answer{err: err}
				return
			}
			answers <- answer{status: resp.StatusCode}
		}()
	}
	v.get(s.urls[1] + "/race/held?race=" + race)
	return answers
}

func (v *visitor) user(server, store string) string {
	v.t.Helper()
	var answer struct{ User string }
	if err := json.Unmarshal([]byte(v.get(server+"/race/"+store+"/user")), &answer); err != nil {
		v.t.Fatal(err)
	}
	return answer.User
}

// TestStopWhileHeld stops the servers while requests wait to be released: they go on, or are cut off where they do not
// end soon.
func TestStopWhileHeld(t *testing.T) {
	s := open(t, config{members: 1})
	v := newVisitor(t)
	answers := v.late(s, "ours", v.race(s.urls[0], "ours"))
	s.stop()
	for range lateSize {
		switch a := <-answers; {
		case a.err != nil:
			t.Logf("a held request was cut off: %v", a.err)
		case a.status != http.StatusOK:
			t.Errorf("a held request was answered with %d", a.status)
		}
	}
}

func TestKillLeader(t *testing.T) {
	c, err := startCluster(t.Context(), "", 3)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	client, err := newClient(c.Endpoints())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })

	var killed []string
	for range 2 { // the second kill finds the first member down, and brings it back
		if err := c.killLeader(t.Context()); err != nil {
			t.Fatal(err)
		}
		killed = append(killed, c.down.Name)
		if _, err := c.leader(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Get(t.Context(), "x"); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(c.restartLeader(t.Context()), c.restartLeader(t.Context())); err != nil {
		t.Fatal(err)
	}
	if killed[0] == killed[1] {
		t.Errorf("%s was killed twice: it can not lead right after it came back", killed[0])
	}
	for _, m := range c.members {
		one, err := newClient([]string{m.Client})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := one.Get(t.Context(), "x", clientv3.WithCountOnly()); err != nil {
			t.Errorf("%s does not answer: %v", m.Name, err)
		}
		one.Close()
	}
}

func TestSumCounts(t *testing.T) {
	for _, c := range []struct{ base, ours, theirs, want any }{
		{nil, 1, 1, 2},
		{2, 3, 3, 4},
		{2, 1, 3, 2},
		{3, 1, nil, nil},
		{1, nil, nil, nil},
		{2, nil, 4, 2},
	} {
		got, err := sumCounts(etcdstore.Conflict{Key: "item:apple", Base: c.base, Ours: c.ours, Theirs: c.theirs})
		if err != nil || got != c.want {
			t.Errorf("base %v, ours %v, theirs %v: %v, %v, want %v", c.base, c.ours, c.theirs, got, err, c.want)
		}
	}
	_, err := sumCounts(etcdstore.Conflict{Key: userKey, Ours: "Ada", Theirs: "Grace"})
	if !errors.Is(err, etcdstore.ErrConflict) {
		t.Errorf("two names: %v", err)
	}
}

func TestFlags(t *testing.T) {
	for _, args := range [][]string{
		{"-members", "2"}, {"-data", "x", "-endpoints", "y"}, {"stray"}, {"-nothing"},
	} {
		if _, err := parseFlags(args, io.Discard); err == nil {
			t.Errorf("%v is accepted", args)
		}
	}
	cfg, err := parseFlags([]string{"-endpoints", "a:1,b:2", "-addr", ":80"}, io.Discard)
	if err != nil || !slices.Equal(cfg.endpoints, []string{"a:1", "b:2"}) || cfg.addr != ":80" || cfg.members != 3 {
		t.Errorf("%+v, %v", cfg, err)
	}
	for _, addr := range []string{"localhost", "localhost:http", "localhost:70000", "localhost:65535"} {
		if err := run(t.Context(), config{addr: addr, members: 1}, io.Discard); err == nil {
			t.Errorf("-addr %s is accepted", addr)
		}
	}
	for host, want := range map[string]string{
		"localhost": "http://localhost:80", "": "http://localhost:80", "0.0.0.0": "http://localhost:80",
		"::": "http://localhost:80", "192.0.2.1": "http://192.0.2.1:80", "::1": "http://[::1]:80",
	} {
		if got := origin(host, 80); got != want {
			t.Errorf("origin(%q): %s, want %s", host, got, want)
		}
	}
}
