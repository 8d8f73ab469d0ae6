package session

import (
	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/seed210be38d/etcdstore/internal/record"
)

// Decoder reads the sessions of a store.
type Decoder struct {
	Codec  scs.Codec
	Prefix string // of the store's keys
}

// Version reads what a Get of a key answered at revision asOf: no pair, or one. Where the pair is
// no session of the store, the version says why.
func (d Decoder) Version(kvs []*mvccpb.KeyValue, asOf int64) *record.Version {
	if len(kvs) == 0 {
		return &record.Version{AsOf: asOf}
	}
	kv := kvs[0]
	rec, kind := record.Decode(kv.Value)
	v := &record.Version{
		Rev: kv.ModRevision, AsOf: asOf, Created: kv.CreateRevision, Count: kv.Version,
		Value: NewImage(d.Codec, rec.Payload, rec.Expiry),
		Lease: clientv3.LeaseID(kv.Lease), Until: rec.LeaseEnd, ID: rec.ID,
	}
	switch {
	case kind == record.KindRecord && rec.PrefixLen != len(d.Prefix), kind != record.KindRecord && !bareToken(kv.Key[len(d.Prefix):]):
		v.Err, v.Foreign = ErrForeignKey, true
	case kind == record.KindNewer:
		v.Err = ErrFormat
	case kind == record.KindCorrupt:
		v.Err = ErrCorrupt
	}
	return v
}

// WithExpiry returns v with the expiry that only the lease of a session of scs's own etcdstore
// knows.
func (d Decoder) WithExpiry(v *record.Version, expiry record.Millis) (*record.Version, error) {
	payload, err := v.Value.Encode()
	if err != nil {
		return nil, err
	}
	completed := *v
	completed.Value = NewImage(d.Codec, payload, max(expiry, 1))
	return &completed, nil
}

// bareToken reports whether a value under this token that does not say what its prefix is (it has
// no trailer, or one that cannot be read) is a session of this store. The token decides: scs's
// tokens are base64url, and a token with another character is rather the end of a longer prefix, as
// in 'scs:session:' beside 'scs:session:1:'.
func bareToken(token []byte) bool {
	for _, c := range token {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '-', c == '_', c == '.', c == '=':
		default:
			return false
		}
	}
	return true
}
