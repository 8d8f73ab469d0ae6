package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"html/template"
	"log"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/seed210be38d/etcdstore"
)

//go:embed templates static
var files embed.FS

var page = template.Must(template.ParseFS(files, "templates/*.html"))

// A session holds one value for each product in the cart, "item:apple" → 2, and the name of who logged in. Requests
// that add different products change different keys, so both changes stay; with the whole cart in one value they would
// be in each other's way. Where requests change the same key, sumCounts decides.
const (
	itemKey = "item:"
	userKey = "user"
)

// sessionPrefix is where etcdstore.New keeps sessions in etcd.
const sessionPrefix = "scs:session:"

// app is one of the servers. Like servers on different machines, they have nothing in common but etcd: each has a
// client, a session manager and a store of its own.
type app struct {
	number   int
	origin   string
	demo     *demo
	client   *clientv3.Client
	store    *etcdstore.EtcdStore
	sessions *scs.SessionManager
	racers   []*racer
	protect  *http.CrossOriginProtection
}

func newApp(number int, endpoints []string, d *demo) (*app, error) {
	client, err := newClient(endpoints)
	if err != nil {
		return nil, err
	}
	a := &app{number: number, origin: d.origins[number-1], demo: d, client: client}
	a.store = etcdstore.New(client, etcdstore.WithResolver(sumCounts))
	a.sessions = newSessions("cart", a.store)
	a.sessions.Codec, a.sessions.ErrorFunc = a.store.Codec(), etcdstore.ErrorFunc
	a.racers = newRacers(a)
	a.protect = http.NewCrossOriginProtection()
	for _, origin := range d.origins {
		if err := a.protect.AddTrustedOrigin(origin); err != nil {
			return nil, errors.Join(err, a.Close())
		}
	}
	return a, nil
}

func newClient(endpoints []string) (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints: endpoints,
		Logger:    zap.NewNop(),
		// A connection that was cut without a word is noticed after these.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second,
	})
}

func newSessions(cookie string, store scs.Store) *scs.SessionManager {
	sm := scs.New()
	sm.Store = store
	sm.Lifetime = 12 * time.Hour

	// The cookie is the key to the session. What guards it:
	//   - HttpOnly: no script can read it, so none that got into the page can carry it away.
	//   - SameSite=Lax: other sites' forms and frames do not send it. Ports do not matter here, so all three servers
	//     on localhost get it.
	//   - Secure is off for one reason: this is http://localhost. An application that others reach speaks HTTPS only,
	//     sets Secure, and calls the cookie "__Host-cart": browsers then take it from nobody but this very host.
	sm.Cookie.Name = cookie
	sm.Cookie.HttpOnly = true
	sm.Cookie.SameSite = http.SameSiteLaxMode
	sm.Cookie.Secure = false
	return sm
}

// sumCounts resolves what two requests did to the count of one product: both happened, so both are added up. Nothing
// else in the session is a count, and for the rest the request that came first wins.
func sumCounts(c etcdstore.Conflict) (any, error) {
	if !strings.HasPrefix(c.Key, itemKey) {
		return nil, &etcdstore.ConflictError{Keys: []string{c.Key}}
	}
	base, _ := c.Base.(int)
	ours, _ := c.Ours.(int)
	theirs, _ := c.Theirs.(int)
	if n := ours + theirs - base; n > 0 {
		return n, nil
	}
	return nil, nil
}

// Close gives back what the stores hold in etcd, and closes the connection.
func (a *app) Close() error {
	err := a.store.Close()
	for _, rc := range a.racers {
		err = errors.Join(err, rc.close())
	}
	return errors.Join(err, a.client.Close())
}

func (a *app) handler() http.Handler {
	shop := http.NewServeMux()
	shop.HandleFunc("GET /{$}", a.show)
	shop.HandleFunc("POST /cart/add", a.add)
	shop.HandleFunc("POST /cart/remove", a.remove)
	shop.HandleFunc("POST /cart/empty", a.empty)
	shop.HandleFunc("POST /login", a.login)
	shop.HandleFunc("POST /logout", a.logout)

	mux := http.NewServeMux()
	mux.Handle("/", a.sessions.LoadAndSave(shop))
	mux.Handle("GET /static/", http.FileServerFS(files))
	for _, rc := range a.racers {
		mux.Handle("/race/"+rc.name+"/", rc.handler())
	}
	a.demo.routes(mux)
	return a.guard(mux)
}

// guard stands in front of everything: it says what the page may do, who may call, and by which name.
func (a *app) guard(next http.Handler) http.Handler {
	next = a.protect.Handler(next) // no forms from other sites, see net/http.CrossOriginProtection
	host := strings.TrimPrefix(a.origin, "http://")
	policy := "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; form-action 'self'; " +
		"base-uri 'none'; frame-ancestors 'none'; connect-src 'self' " + strings.Join(a.demo.origins, " ")
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin") // what allowOrigin allows is asked for with CORS
		h.Set("Cache-Control", "no-cache")
		a.allowOrigin(h, r.Header.Get("Origin"))
		if r.Host != host {
			a.misdirected(w, r)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, 4<<10)
		next.ServeHTTP(w, r)
	})
}

// allowOrigin lets the pages of the three servers call each other with cookies, and nobody else.
func (a *app) allowOrigin(h http.Header, origin string) {
	h.Add("Vary", "Origin")
	if slices.Contains(a.demo.origins, origin) {
		h.Set("Access-Control-Allow-Origin", origin)
		h.Set("Access-Control-Allow-Credentials", "true")
		h.Set("Access-Control-Expose-Headers", sessionHeader)
	}
}

// misdirected answers who calls the server by another name, 127.0.0.1 for example: the cookies and the list of origins
// hold for one name. It also keeps out pages of other hosts that made their name point here (DNS rebinding).
func (a *app) misdirected(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		http.Redirect(w, r, a.origin+r.URL.RequestURI(), http.StatusTemporaryRedirect)
		return
	}
	http.Error(w, http.StatusText(http.StatusMisdirectedRequest), http.StatusMisdirectedRequest)
}

func (a *app) show(w http.ResponseWriter, r *http.Request) {
	var b bytes.Buffer
	if err := page.ExecuteTemplate(&b, "page.html", a.view(r.Context())); err != nil {
		log.Print(err)
		http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	_, _ = w.Write(b.Bytes()) // fails when the browser has gone
}

func (a *app) add(w http.ResponseWriter, r *http.Request) {
	a.change(w, r, +1)
}

func (a *app) remove(w http.ResponseWriter, r *http.Request) {
	a.change(w, r, -1)
}

// change adds to the count of one product. It reads and writes as if the request were alone with the session.
func (a *app) change(w http.ResponseWriter, r *http.Request, by int) {
	id := r.PostFormValue("item")
	if !slices.ContainsFunc(catalogue, func(p product) bool { return p.ID == id }) {
		http.Error(w, "The shop does not sell that.", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	if n := a.sessions.GetInt(ctx, itemKey+id) + by; n > 0 {
		a.sessions.Put(ctx, itemKey+id, n)
	} else {
		a.sessions.Remove(ctx, itemKey+id)
	}
	backToCart(w, r)
}

func (a *app) empty(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	for _, p := range catalogue {
		a.sessions.Remove(ctx, itemKey+p.ID)
	}
	backToCart(w, r)
}

// login asks for a name and nothing more: it is the session that matters here. The token is renewed, so that one which
// somebody else may have seen before the login is worth nothing after it.
func (a *app) login(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimSpace(r.PostFormValue("name"))
	if name == "" || len(name) > 40 {
		http.Error(w, "A name has 1 to 40 characters.", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	if err := a.sessions.RenewToken(ctx); err != nil {
		etcdstore.ErrorFunc(w, r, err)
		return
	}
	a.sessions.Put(ctx, userKey, name)
	backToCart(w, r)
}

func (a *app) logout(w http.ResponseWriter, r *http.Request) {
	if err := a.sessions.Destroy(r.Context()); err != nil {
		etcdstore.ErrorFunc(w, r, err)
		return
	}
	backToCart(w, r)
}

// backToCart makes the browser fetch the page anew, so that reloading it sends no form again.
func backToCart(w http.ResponseWriter, r *http.Request) {
	http.Redirect(w, r, "/#cart", http.StatusSeeOther)
}

// view is what the page shows.
type view struct {
	Server  int
	Servers []serverLink
	User    string
	Lines   []line
	Count   int
	Total   price
	Session session
	Race    raceView
}

type serverLink struct {
	Number  int
	URL     string
	Host    string
	Current bool
}

// line is a product and how many of it are in the cart.
type line struct {
	product
	Count int
}

type product struct {
	ID, Name string
	Price    price
}

// price is in cents.
type price int

func (p price) String() string {
	return fmt.Sprintf("€%d.%02d", p/100, p%100)
}

// session is what the page tells of the session. Its token is nobody's business.
type session struct {
	Stored   bool // there is one in etcd
	Revision int64
	Expires  time.Time
}

var catalogue = []product{
	{"apple", "Apples", 240},
	{"bread", "Bread", 380},
	{"cheese", "Cheese", 650},
	{"coffee", "Coffee", 890},
	{"honey", "Honey", 720},
	{"lemon", "Lemons", 190},
}

func (a *app) view(ctx context.Context) view {
	v := view{
		Server:  a.number,
		User:    a.sessions.GetString(ctx, userKey),
		Session: a.session(ctx),
		Race:    a.demo.view(),
	}
	for i, origin := range a.demo.origins {
		u, _ := url.Parse(origin)
		v.Servers = append(v.Servers, serverLink{Number: i + 1, URL: origin, Host: u.Host, Current: i+1 == a.number})
	}
	for _, p := range catalogue {
		n := a.sessions.GetInt(ctx, itemKey+p.ID)
		v.Lines = append(v.Lines, line{p, n})
		v.Count += n
		v.Total += price(n) * p.Price
	}
	return v
}

// session looks the session up in etcd. Only a page that explains the store does that; an application has no reason to.
func (a *app) session(ctx context.Context) session {
	token := a.sessions.Token(ctx)
	if token == "" {
		return session{}
	}
	get, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	resp, err := a.client.Get(get, sessionPrefix+token, clientv3.WithKeysOnly())
	if err != nil || len(resp.Kvs) == 0 {
		return session{}
	}
	return session{Stored: true, Revision: resp.Kvs[0].ModRevision, Expires: a.sessions.Deadline(ctx).UTC()}
}
