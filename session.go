package etcdstore

import (
	"sync"

	"github.com/alexedwards/scs/v2"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/seed210be38d/etcdstore/internal/record"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// image is one content of a session: as it was read, as a request wants it, or as a merge made it. It is
// immutable and shared; the form that it was not made from, payload or contents, is derived once and on demand,
// because decoding costs more than all else that a commit does on this side of the network.
type image struct {
	codec  scs.Codec
	expiry record.Millis // 0: not known (a session of scs's own etcdstore, whose lease knows)

	decode    sync.Once
	contents  *contents
	decodeErr error
	encode    sync.Once
	payload   []byte
	encodeErr error
}

// imageOf returns the image of a payload.
func imageOf(codec scs.Codec, payload []byte, expiry record.Millis) *image {
	i := &image{codec: codec, expiry: expiry, payload: payload}
	i.encode.Do(func() {})
	return i
}

// imageWith returns the image of contents. They are encoded when the image is stored, if it is, except where the
// application's code made some of the values: then at once, so that the image holds what a reader of it would find, and
// shares nothing with that code.
func imageWith(codec scs.Codec, c *contents, expiry record.Millis) (*image, error) {
	i := &image{codec: codec, expiry: expiry, contents: c}
	if !c.raw {
		i.decode.Do(func() {})
		return i, nil
	}
	payload, err := i.encoded()
	if err != nil {
		return nil, err
	}
	return imageOf(codec, payload, expiry), nil
}

// decoded returns the image's values and deadline.
func (i *image) decoded() (*contents, error) {
	i.decode.Do(func() {
		defer recovered(&i.decodeErr)
		deadline, values, err := i.codec.Decode(i.payload)
		i.contents, i.decodeErr = &contents{deadline: deadline, values: values}, err
	})
	return i.contents, i.decodeErr
}

// encoded returns the image's payload.
func (i *image) encoded() ([]byte, error) {
	i.encode.Do(func() {
		defer recovered(&i.encodeErr)
		i.payload, i.encodeErr = i.codec.Encode(i.contents.deadline, i.contents.values)
	})
	return i.payload, i.encodeErr
}

// recovered, deferred, makes a panic of the codec an error. A fold decodes and encodes beside others' sessions, in a
// goroutine of the store, which must not end for what one session holds.
func recovered(err *error) {
	if recover() != nil { // what it says may hold a value of the session
		*err = errCodec
	}
}

// sameContents reports whether i and o hold the same values and deadline, as far as they decode.
func (i *image) sameContents(o *image) bool {
	a, errA := i.decoded()
	b, errB := o.decoded()
	return errA == nil && errB == nil && a.same(b)
}

// version is what etcd holds under a session's key at some revision.
type version struct {
	rev   int64 // mod revision; 0: no key
	asOf  int64 // the store's revision when this was true
	image *image
	lease clientv3.LeaseID
	until record.Millis // the lease lasts until then at least; 0: not known
	id    record.WriteID

	// Where this version stands in the key's history: the revision that created the key, and its number since then.
	created, nth int64

	err error // why the store cannot take what is there for a session of its own: errForeignKey, errFormat, errCorrupt
}

// live returns the session that v holds at the time now, nil where there is none.
func (v *version) live(now record.Millis) *image {
	if v.rev == 0 || v.err != nil || v.image.expiry != 0 && v.image.expiry <= now {
		return nil
	}
	return v.image
}

// unreadable returns why what v holds cannot be read: nil where it can, or where it is no session of this store's.
func (v *version) unreadable() error {
	if v.err == errForeignKey { //nolint:errorlint // never wrapped here
		return nil
	}
	return v.err
}

// decodeVersion reads what a Get of key answered at revision asOf: no pair, or one.
func (e *EtcdStore) decodeVersion(kvs []*mvccpb.KeyValue, asOf int64) *version {
	if len(kvs) == 0 {
		return &version{asOf: asOf}
	}
	kv := kvs[0]
	v := &version{rev: kv.ModRevision, asOf: asOf, lease: clientv3.LeaseID(kv.Lease), created: kv.CreateRevision, nth: kv.Version}
	rec, kind := record.Decode(kv.Value)
	switch {
	case kind == record.KindRecord && rec.PrefixLen != len(e.prefix), kind != record.KindRecord && !bareToken(kv.Key[len(e.prefix):]):
		v.err = errForeignKey
	case kind == record.KindNewer:
		v.err = errFormat
	case kind == record.KindCorrupt:
		v.err = errCorrupt
	}
	v.image = imageOf(e.codec, rec.Payload, rec.Expiry)
	v.until, v.id = rec.LeaseEnd, rec.ID
	return v
}

// bareToken reports whether a value under this token that does not say what its prefix is (it has no trailer, or one
// that cannot be read) is a session of this store. The token decides: scs's tokens are base64url, and a token with
// another character is rather the end of a longer prefix, as in 'scs:session:' beside 'scs:session:1:'.
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
