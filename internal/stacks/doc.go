// Package stacks holds tests of etcdstore from outside, on the servers, adapters and middlewares
// that scs runs on: a session manager with the store's codec keeps the store's promises on all of
// them. It is a module of its own, so that what they need is no requirement of etcdstore.
package stacks
