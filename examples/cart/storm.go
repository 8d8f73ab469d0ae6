package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore"
)

const (
	stormSize = 50 // requests in a storm, each adding an item of its own
	lateSize  = 12 // requests that a logout overtakes; browsers have at most 6 in flight to one server

	holdAtMost  = 10 * time.Second
	killAtMost  = 30 * time.Second
	racesAtMost = 32 // races that are remembered
)

// sessionHeader tells the page that the store refused a commit since the session was gone. The answer to such a request
// is otherwise like any: the user has logged out, there is nothing to save.
const sessionHeader = "X-Session"

// demo is what the three servers know of the races that the page runs: in this process it is the referee, and no
// request of an application would need it.
type demo struct {
	origins  []string
	stopping <-chan struct{}
	cluster  *cluster // nil with -endpoints

	mu    sync.Mutex
	races []*race
}

// race is one race of one store.
type race struct {
	id           string
	leasesBefore []clientv3.LeaseID
	arrived      chan struct{} // gets one for each held request
	released     chan struct{} // closed when held requests may go on
	release      func()
}

// newRace remembers the leases that are in etcd before it, and forgets the oldest race when there are many.
func (d *demo) newRace(leases []clientv3.LeaseID) *race {
	released := make(chan struct{})
	r := &race{
		id:           rand.Text(),
		leasesBefore: leases,
		arrived:      make(chan struct{}, lateSize),
		released:     released,
		release:      sync.OnceFunc(func() { close(released) }),
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.races = append(d.races, r)
	if len(d.races) > racesAtMost {
		d.races[0].release()
		d.races = slices.Delete(d.races, 0, 1)
	}
	return r
}

// race finds the one that the request names, or answers it.
func (d *demo) race(w http.ResponseWriter, r *http.Request) *race {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.races, func(race *race) bool { return race.id == r.FormValue("race") })
	if i < 0 {
		http.Error(w, "That race is over.", http.StatusNotFound)
		return nil
	}
	return d.races[i]
}

func (d *demo) routes(mux *http.ServeMux) {
	mux.HandleFunc("GET /race/held", d.held)
	mux.HandleFunc("POST /race/release", d.release)
	mux.HandleFunc("POST /race/leader/kill", d.leader((*cluster).killLeader))
	mux.HandleFunc("POST /race/leader/restart", d.leader((*cluster).restartLeader))
}

// held answers when all late requests of a race are held, that is when each has read the session.
func (d *demo) held(w http.ResponseWriter, r *http.Request) {
	race := d.race(w, r)
	if race == nil {
		return
	}
	for range lateSize {
		if !d.wait(r.Context(), race.arrived) {
			http.Error(w, "Not all requests arrived.", http.StatusGatewayTimeout)
			return
		}
	}
}

func (d *demo) release(w http.ResponseWriter, r *http.Request) {
	if race := d.race(w, r); race != nil {
		race.release()
	}
}

// wait reports whether c came before the time was up, the client left, or the server stops.
func (d *demo) wait(ctx context.Context, c <-chan struct{}) bool {
	ctx, cancel := context.WithTimeout(ctx, holdAtMost)
	defer cancel()
	select {
	case <-c:
		return true
	case <-ctx.Done():
	case <-d.stopping:
	}
	return false
}

// leader does something to the leader of the embedded cluster.
func (d *demo) leader(do func(*cluster, context.Context) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if v := d.view(); !v.CanKill {
			http.Error(w, v.WhyNot, http.StatusConflict)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), killAtMost)
		defer cancel()
		if err := do(d.cluster, ctx); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
}

// raceView is what the page has to know to run the races.
type raceView struct {
	Requests, Late int
	Origins        string
	CanKill        bool
	WhyNot         string
}

func (d *demo) view() raceView {
	v := raceView{Requests: stormSize, Late: lateSize, Origins: strings.Join(d.origins, " ")}
	switch {
	case d.cluster == nil:
		v.WhyNot = "This etcd runs elsewhere (-endpoints), and is not ours to stop."
	case len(d.cluster.members) < 3:
		v.WhyNot = "One member has nobody to take over. Start with three (-members 3)."
	default:
		v.CanKill = true
	}
	return v
}

// racer runs the races on one of the two stores. The stores get the same requests from the same page, handled by the
// same code; what differs is the store, the cookie, and the prefix of the keys.
type racer struct {
	name     string
	app      *app
	sessions *scs.SessionManager
	close    func() error
}

func newRacers(a *app) []*racer {
	plain := newSessions("race-plain", &plainStore{client: a.client, prefix: "race:plain:"})
	plain.ErrorFunc = func(w http.ResponseWriter, _ *http.Request, _ error) {
		http.Error(w, "The session was not saved.", http.StatusServiceUnavailable)
	}
	store := etcdstore.NewWithPrefix(a.client, "race:ours:")
	ours := newSessions("race-ours", store)
	ours.ErrorFunc = func(w http.ResponseWriter, r *http.Request, err error) {
		if errors.Is(err, etcdstore.ErrSessionGone) {
			w.Header().Set(sessionHeader, "gone")
		}
		etcdstore.ErrorFunc(w, r, err)
	}
	return []*racer{
		{name: "plain", app: a, sessions: plain, close: func() error { return nil }},
		{name: "ours", app: a, sessions: ours, close: store.Close},
	}
}

func (rc *racer) handler() http.Handler {
	mux := http.NewServeMux()
	path := "/race/" + rc.name
	mux.HandleFunc("POST "+path+"/start", rc.start)
	mux.HandleFunc("POST "+path+"/add", rc.add)
	mux.HandleFunc("POST "+path+"/late", rc.late)
	mux.HandleFunc("POST "+path+"/logout", rc.logout)
	mux.HandleFunc("GET "+path+"/user", rc.user)
	mux.HandleFunc("GET "+path+"/result", rc.result)
	return rc.sessions.LoadAndSave(mux)
}

// start begins a race: with a new session, in which somebody is logged in.
func (rc *racer) start(w http.ResponseWriter, r *http.Request) {
	ctx := r.Context()
	leases, err := rc.leases(ctx)
	if err != nil {
		http.Error(w, "etcd does not list its leases.", http.StatusServiceUnavailable)
		return
	}
	if err := rc.sessions.Destroy(ctx); err != nil {
		rc.sessions.ErrorFunc(w, r, err)
		return
	}
	rc.sessions.Put(ctx, userKey, "Ada")
	writeJSON(w, map[string]string{"race": rc.app.demo.newRace(leases).id})
}

// add is the whole of what a request in the storm does. It answers with nothing, so that scs commits at its end and the
// answer's status tells what became of the commit.
func (rc *racer) add(w http.ResponseWriter, r *http.Request) {
	if n, ok := itemNumber(w, r); ok {
		rc.sessions.Put(r.Context(), itemKey+n, 1)
	}
}

// late does the same, but takes its time between reading and writing, as if it had to wait for somebody else's service:
// until it is released.
func (rc *racer) late(w http.ResponseWriter, r *http.Request) {
	race := rc.app.demo.race(w, r)
	if race == nil {
		return
	}
	n, ok := itemNumber(w, r)
	if !ok {
		return
	}
	rc.sessions.Put(r.Context(), itemKey+n, 1)
	select {
	case race.arrived <- struct{}{}:
		rc.app.demo.wait(r.Context(), race.released)
	default:
		http.Error(w, "That race has all its late requests.", http.StatusConflict)
	}
}

func itemNumber(w http.ResponseWriter, r *http.Request) (string, bool) {
	n, err := strconv.Atoi(r.FormValue("item"))
	if err != nil || n < 1 || n > stormSize {
		http.Error(w, "Items are numbered from 1 to "+strconv.Itoa(stormSize)+".", http.StatusBadRequest)
		return "", false
	}
	return strconv.Itoa(n), true
}

func (rc *racer) logout(w http.ResponseWriter, r *http.Request) {
	if err := rc.sessions.Destroy(r.Context()); err != nil {
		rc.sessions.ErrorFunc(w, r, err)
	}
}

// user tells who is logged in, nobody being "".
func (rc *racer) user(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, map[string]string{"user": rc.sessions.GetString(r.Context(), userKey)})
}

// result tells which items are in the session, and how many leases came into etcd during the race and are still there.
func (rc *racer) result(w http.ResponseWriter, r *http.Request) {
	race := rc.app.demo.race(w, r)
	if race == nil {
		return
	}
	now, err := rc.leases(r.Context())
	if err != nil {
		http.Error(w, "etcd does not list its leases.", http.StatusServiceUnavailable)
		return
	}
	now = slices.DeleteFunc(now, func(id clientv3.LeaseID) bool { return slices.Contains(race.leasesBefore, id) })
	writeJSON(w, result{Kept: rc.kept(r.Context()), Leases: len(now)})
}

type result struct {
	Kept   []int `json:"kept"`
	Leases int   `json:"leases"`
}

func (rc *racer) kept(ctx context.Context) []int {
	kept := []int{}
	for _, key := range rc.sessions.Keys(ctx) {
		if n, err := strconv.Atoi(strings.TrimPrefix(key, itemKey)); err == nil {
			kept = append(kept, n)
		}
	}
	slices.Sort(kept)
	return kept
}

// leases lists all leases of the cluster. A member that does not run is passed over.
func (rc *racer) leases(ctx context.Context) ([]clientv3.LeaseID, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var failed error
	for _, endpoint := range rc.app.client.Endpoints() {
		ids, err := memberLeases(ctx, rc.app.client, endpoint)
		if err == nil {
			return ids, nil
		}
		failed = errors.Join(failed, err)
	}
	return nil, failed
}

// memberLeases asks one member. It lists the leases that it knows of without asking the others, so it is made to catch
// up before, by a read: that is answered only when the member has applied what the cluster has.
func memberLeases(ctx context.Context, client *clientv3.Client, endpoint string) ([]clientv3.LeaseID, error) {
	conn, err := client.Dial(endpoint)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_, err = etcdserverpb.NewKVClient(conn).Range(ctx, &etcdserverpb.RangeRequest{Key: []byte("caught up?"), CountOnly: true})
	if err != nil {
		return nil, err
	}
	resp, err := etcdserverpb.NewLeaseClient(conn).LeaseLeases(ctx, &etcdserverpb.LeaseLeasesRequest{})
	if err != nil {
		return nil, err
	}
	ids := make([]clientv3.LeaseID, len(resp.Leases))
	for i, l := range resp.Leases {
		ids[i] = clientv3.LeaseID(l.ID)
	}
	return ids, nil
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // fails when the browser has gone
}
