// Package frameworks has no code but its tests: the store under real routers and middleware. It is
// a module of its own so that none of them is a dependency of the store's.
package frameworks
