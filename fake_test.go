package etcdstore

import "github.com/seed210be38d/etcdstore/internal/etcdfake"

// fakeEtcd is an etcd in memory, with what tests of the store ask of it.
type fakeEtcd struct{ *etcdfake.Etcd }

func newFakeEtcd() *fakeEtcd { return &fakeEtcd{etcdfake.New()} }
