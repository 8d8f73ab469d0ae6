package read

import (
	"context"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/etcd"
	"github.com/seed210be38d/etcdstore/internal/record"
)

// pageKeys is how many keys a listing reads at a time.
const pageKeys = 500

// List reads the keys from from to end (exclusive), as they were at one revision, and passes each
// to yield. Where that revision is compacted before all of them are read, the error is etcd's.
func (r *Reader) List(ctx context.Context, from, end string, yield func(key string, v *record.Version)) error {
	if from == "" {
		from = "\x00" // the first key; etcd takes no empty one
	}
	for rev := int64(0); ; {
		page, err := r.page(ctx, from, end, rev)
		if err != nil {
			return err
		}
		if rev == 0 {
			rev = page.Header.Revision
		}
		for i, kv := range page.Kvs {
			yield(string(kv.Key), r.decode(page.Kvs[i:i+1:i+1], rev))
		}
		if !page.More || len(page.Kvs) == 0 {
			return nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
}

// page reads one page of a listing, as of revision rev; 0: the latest.
func (r *Reader) page(ctx context.Context, from, end string, rev int64) (page *clientv3.GetResponse, err error) {
	op := clientv3.OpGet(from, clientv3.WithRange(end), clientv3.WithLimit(pageKeys), clientv3.WithRev(rev))
	err = etcd.Retry(ctx, func(ctx context.Context) error {
		resp, err := r.client.Send(ctx, op)
		page = resp.Get()
		return err
	})
	return page, err
}
