//go:build race

package etcdstore

// raceEnabled says that the race detector is on, under which runs that are as long as one likes are shorter.
const raceEnabled = true
