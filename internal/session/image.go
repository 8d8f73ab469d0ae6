// Package session is what a session holds: its images, how two of them are merged, and the changes
// that calls make of it.
package session

import (
	"sync"

	"github.com/alexedwards/scs/v2"

	"github.com/seed210be38d/etcdstore/internal/record"
)

// Image is one content of a session: as it was read, as a request wants it, or as a merge made it.
// It is immutable and shared; the form that it was not made from, payload or contents, is derived
// once and on demand, because decoding costs more than all else that a commit does on this side of
// the network.
type Image struct {
	codec  scs.Codec
	expiry record.Millis // 0: not known (a session of scs's own etcdstore, whose lease knows)

	decode    sync.Once
	contents  *Contents
	decodeErr error
	encode    sync.Once
	payload   []byte
	encodeErr error
}

var _ record.Value = (*Image)(nil)

// NewImage returns the image of a payload.
func NewImage(codec scs.Codec, payload []byte, expiry record.Millis) *Image {
	i := &Image{codec: codec, expiry: expiry, payload: payload}
	i.encode.Do(func() {})
	return i
}

// ImageOf returns the image that is a key's value, nil for none.
func ImageOf(v record.Value) *Image {
	i, _ := v.(*Image)
	return i
}

// valueOf returns i as a key's value.
func valueOf(i *Image) record.Value {
	if i == nil {
		return nil
	}
	return i
}

// imageWith returns the image of contents. They are encoded when the image is stored, if it is,
// except where the application's code made some of the values: then at once, so that the image
// holds what a reader of it would find, and shares nothing with that code.
func imageWith(codec scs.Codec, c *Contents, expiry record.Millis) (*Image, error) {
	i := &Image{codec: codec, expiry: expiry, contents: c}
	if !c.raw {
		i.decode.Do(func() {})
		return i, nil
	}
	payload, err := i.Encode()
	if err != nil {
		return nil, err
	}
	return NewImage(codec, payload, expiry), nil
}

// Expiry returns when the session ends; 0: it is not known.
func (i *Image) Expiry() record.Millis { return i.expiry }

// Contents returns the image's values and deadline.
func (i *Image) Contents() (*Contents, error) {
	i.decode.Do(func() {
		i.decodeErr = errCodec
		defer func() { _ = recover() }() // what it says may hold a value of the session
		deadline, values, err := i.codec.Decode(i.payload)
		i.contents, i.decodeErr = &Contents{deadline: deadline, values: values}, err
	})
	return i.contents, i.decodeErr
}

// Encode returns the image's payload.
func (i *Image) Encode() ([]byte, error) {
	i.encode.Do(func() {
		i.encodeErr = errCodec
		defer func() { _ = recover() }()
		i.payload, i.encodeErr = i.codec.Encode(i.contents.deadline, i.contents.values)
	})
	return i.payload, i.encodeErr
}

// until returns the same content with another expiry.
func (i *Image) until(expiry record.Millis) (*Image, error) {
	payload, err := i.Encode()
	if err != nil {
		return nil, err
	}
	return NewImage(i.codec, payload, expiry), nil
}

// sameContents reports whether i and o hold the same values and deadline, as far as they decode.
func (i *Image) sameContents(o *Image) bool {
	a, errA := i.Contents()
	b, errB := o.Contents()
	return errA == nil && errB == nil && a.same(b)
}
