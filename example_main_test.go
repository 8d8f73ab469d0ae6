package etcdstore_test

import (
	"context"
	"io"
	"log"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"time"

	"github.com/alexedwards/scs/v2"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/seed210be38d/etcdstore"
)

// startEtcd starts an etcd of one member, and returns a client of it and what stops both.
func startEtcd() (client *clientv3.Client, stop func()) {
	dir, err := os.MkdirTemp("", "etcdstore-example-")
	if err != nil {
		log.Fatal(err)
	}
	anyPort := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = anyPort, anyPort
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = anyPort, anyPort
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.EnableGRPCGateway = false
	cfg.UnsafeNoFsync = true
	cfg.TickMs, cfg.ElectionMs = 10, 100
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	server, err := embed.StartEtcd(cfg)
	if err != nil {
		log.Fatal(err)
	}
	select {
	case <-server.Server.ReadyNotify():
	case err := <-server.Err():
		log.Fatal(err)
	}
	client, err = clientv3.New(clientv3.Config{
		Endpoints: []string{server.Clients[0].Addr().String()},
		Logger:    zap.NewNop(),
	})
	if err != nil {
		log.Fatal(err)
	}
	return client, func() {
		_ = client.Close()
		server.Close()
		_ = os.RemoveAll(dir)
	}
}

// serve serves handler, and returns a function that gets a path of it as a browser does, with cookies, and returns
// the response's body.
func serve(handler http.Handler) (get func(path string) string, stop func()) {
	server := httptest.NewServer(handler)
	jar, err := cookiejar.New(nil)
	if err != nil {
		log.Fatal(err)
	}
	browser := server.Client()
	browser.Jar = jar
	browser.Timeout = time.Minute
	return func(path string) string {
		resp, err := browser.Get(server.URL + path)
		if err != nil {
			log.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			log.Fatal(err)
		}
		return string(body)
	}, server.Close
}

// newManager returns a session manager on store.
func newManager(store *etcdstore.EtcdStore) *scs.SessionManager {
	sessionManager := scs.New()
	sessionManager.Store = store
	sessionManager.Codec = store.Codec()
	sessionManager.ErrorFunc = etcdstore.ErrorFunc
	return sessionManager
}

// bothChange has two requests read a session before either of them writes it, and returns what the session holds of a key
// then.
func bothChange(sessionManager *scs.SessionManager, token, key string, first, second any) any {
	var copies []context.Context
	for _, value := range []any{first, second} {
		ctx, err := sessionManager.Load(context.Background(), token)
		if err != nil {
			log.Fatal(err)
		}
		sessionManager.Put(ctx, key, value)
		copies = append(copies, ctx)
	}
	for _, ctx := range copies {
		if _, _, err := sessionManager.Commit(ctx); err != nil {
			return err
		}
	}
	ctx, err := sessionManager.Load(context.Background(), token)
	if err != nil {
		log.Fatal(err)
	}
	return sessionManager.Get(ctx, key)
}

// newSession makes a session that holds one value, and returns its token.
func newSession(sessionManager *scs.SessionManager, key string, value any) string {
	ctx, err := sessionManager.Load(context.Background(), "")
	if err != nil {
		log.Fatal(err)
	}
	sessionManager.Put(ctx, key, value)
	token, _, err := sessionManager.Commit(ctx)
	if err != nil {
		log.Fatal(err)
	}
	return token
}
