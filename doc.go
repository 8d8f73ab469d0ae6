// Package etcdstore is a session store for [scs] on [etcd], for applications that run on many
// machines and whose browsers send several requests of one session at the same time.
//
// # Use
//
// Give the session manager a store. Nothing else in the application changes:
//
//	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{"localhost:2379"}})
//	...
//	sessionManager := scs.New()
//	store := etcdstore.New(cli)
//	sessionManager.Store = store
//	sessionManager.Codec = store.Codec()
//	sessionManager.ErrorFunc = etcdstore.ErrorFunc
//	http.ListenAndServe(":4000", sessionManager.LoadAndSave(mux))
//
// # What it promises
//
// A request is a transaction: it reads a session, computes, and writes it.
//
//   - No lost update. A commit that succeeded stays until another commit changes the same key on
//     purpose. Requests that change different keys of a session all succeed. Of requests that
//     change the same key the first wins, and the others get [ErrConflict], or a [Resolver]
//     decides, or [EtcdStore.Retry] runs their handlers again.
//   - No resurrection. A commit based on a session that was deleted since writes nothing and fails
//     with [ErrSessionGone]. Delete always wins.
//   - Exactly once. A call says what happened. Where an answer is lost the store finds out; only
//     where it cannot, in the time that the call has, it returns [ErrOutcomeUnknown].
//   - Exact expiry, to the millisecond, on the wall clock of the machine that asks. etcd's leases
//     collect garbage; they do not decide.
//   - Shared leases. A commit leaves no lease behind, and a hundred sessions share one.
//   - Isolation of prefixes. Stores with different prefixes do not see each other's sessions.
//   - No token and no session value in an error or a log line.
//
// # Transactions and isolation
//
// With [EtcdStore.Codec] each copy of a session that is loaded is a transaction of its own: it
// carries the version that it was read at, and its own commits move that. Contexts do not matter.
// Without the codec, or where a wrapper copies the bytes that scs is given, the context tells: a
// request of net/http's server is a transaction by itself, under the context that it came with and
// those that scs derives from it, and for everything else [Begin] makes one. Outside of any a
// commit overwrites, as scs's contract has it.
//
// In a transaction a commit is an etcd transaction that compares the mod revision that was read:
// optimistic concurrency control, with a three-way merge by session key where the compare fails,
// and within keys that hold maps.
//
// The default isolation is [Snapshot]. It permits write skew: of two requests that each read the
// key that the other changes, both succeed. [WithIsolation] with [Serializable] makes that a
// conflict.
//
// # Conflicts
//
// What to do about requests that change the same key depends on what they mean:
//
//   - [WithResolver], where the two changes have a meaning together: a counter adds up, a set
//     unites. No request runs twice.
//   - [EtcdStore.Retry], where the handler must see the other's change, and its only effect is the
//     session.
//   - [EtcdStore.Exclusive], where the handler has effects elsewhere. One request of the session
//     runs at a time.
//   - [EtcdStore.Update], for jobs that are no request.
//
// Without any of them the second request is answered with 409, by [ErrorFunc]. Outside of scs's
// middleware the error is a [*ConflictError] where the keys are known.
//
// # Operation
//
// Values are the codec's bytes, followed by 51 bytes of the store's. Keys are the prefix and the
// token; what the store keeps besides (leases, locks) is under the prefix and "~". So one etcd role
// with permission on the prefix is enough. A call ends with its context, or after five seconds
// ([WithTimeout]), whichever comes first. With an idle timeout scs commits on every request, and
// [WithTouchInterval] skips what moves the expiry by little. The README says what becomes of a call
// under each fault of etcd, and has the commands to run it.
//
// # Caveats
//
// RenewToken of scs deletes a session at once and commits another at the end of the request. With
// [EtcdStore.Codec] that is a renewal: what others have committed to the old session before its
// deletion is carried over, and it does not heed the end of the request's context. Destroy followed
// by new data carries nothing over. What is committed to the old session after its deletion fails
// with [ErrSessionGone].
//
// scs lets a handler's body follow the page that its ErrorFunc wrote. [EtcdStore.Retry] does not.
//
// Machines' clocks must agree within a second or so. A clock that steps back by up to a minute is
// held, so what was called expired stays expired; a larger step is followed. A clock that jumps
// ahead hides sessions while it is wrong, and deletes nothing.
//
// A stored session that is damaged, or of a newer version of this package, counts as not found, and
// is logged once a minute at most. Listings skip it, commits to it fail, and it can be deleted.
//
// Sessions of scs's own etcdstore are read, and stored in this package's form by the next commit.
// They do not say which prefix is theirs: where one prefix begins with another and no separator
// stands in between ("scs:session:" beside "scs:session:a"), one of the longer prefix is taken for
// a session of the shorter, under a longer token.
//
// Values that differ from themselves (a floating-point NaN) look changed on every merge, and so
// conflict.
//
// # Concurrency
//
// All methods may be called from several goroutines at a time. Concurrent commits travel together
// in one etcd transaction, and commits to one session are folded into one write, so a store gets
// faster under load, per call. It has no goroutine when it has nothing to do.
//
// [scs]: https://pkg.go.dev/github.com/alexedwards/scs/v2
// [etcd]: https://etcd.io
package etcdstore
