package etcd

import (
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
)

// What was heard from etcd becomes old, and a process that has heard nothing knows nothing.
func TestClient_Stale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := NewClient(nil)
		want := func(stale bool) {
			t.Helper()
			if c.Stale() != stale {
				t.Errorf("stale: %t", !stale)
			}
		}
		want(true)
		c.Saw(&etcdserverpb.ResponseHeader{Revision: 1})
		want(false)
		time.Sleep(time.Second)
		want(false)
		time.Sleep(time.Millisecond)
		want(true)
	})
}
