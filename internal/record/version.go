package record

import (
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Value is what a record stands for, for whoever writes it without knowing what it is. It is
// immutable and shared.
type Value interface {
	// Expiry returns when the value ends; 0: it is not known.
	Expiry() Millis
	// Encode returns the payload of the value's record.
	Encode() ([]byte, error)
}

// Entry is another key, with its value, that stands as long as a record's value does: it is written
// and deleted with it, in one transaction, and hangs on its lease.
type Entry struct{ Key, Value string }

// Version is what etcd holds under a key at some revision.
type Version struct {
	Rev   int64 // mod revision; 0: no key
	AsOf  int64 // the store's revision when this was true
	Value Value
	Also  []Entry // what stands with the value
	Lease clientv3.LeaseID
	Until Millis // the lease lasts until then at least; 0: not known
	ID    WriteID

	// Where this version stands in the key's history: the revision that created the key, and how
	// many versions it has had since then, this one included.
	Created, Count int64

	Err     error // why what is there cannot be taken for a value
	Foreign bool  // the key belongs to another store: it is neither written nor deleted
}

// Live returns the value that v holds at the time now, nil where there is none.
func (v *Version) Live(now Millis) Value {
	if v.Rev == 0 || v.Err != nil || v.Value.Expiry() != 0 && v.Value.Expiry() <= now {
		return nil
	}
	return v.Value
}

// Expired reports whether v holds a value that has ended by the time now.
func (v *Version) Expired(now Millis) bool {
	return v.Rev != 0 && v.Err == nil && v.Live(now) == nil
}

// Unreadable returns why what v holds cannot be read: nil where it can, or where it is another
// store's.
func (v *Version) Unreadable() error {
	if v.Foreign {
		return nil
	}
	return v.Err
}
