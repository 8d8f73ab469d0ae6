package commit

import "github.com/seed210be38d/etcdstore/internal/etcd"

// step is what an attempt does next.
type step int

const (
	toSend  step = iota
	toSeat       // wait for a lease
	toFence      // make sure that no send of a create can be applied any more
	toRead       // read the key, to find out why the compare failed
	toTrace      // look for the write in the key's history
	ended
)

// kind is what an attempt does to its key.
type kind int

const (
	validate kind = iota // nothing but validate that it is as it was
	put
	remove
)

// facts are what decide knows of an attempt.
type facts struct {
	step       step
	kind       kind
	create     bool // the base is an absent key
	clears     bool // it deletes a value that has ended, and its changes are folded again
	idempotent bool // all its calls are told the same where the key is not there
	seated     bool // it names a new lease
	lone       bool // it was sent by itself
	noSpace    bool // a send was refused for want of space
	doubt      bool // an earlier send may have been applied, or may be yet
}

// answerKind is what etcd has answered to a step.
type answerKind int

const (
	applied   answerKind = iota
	unasked              // the compare failed, and the request did not ask why
	seen                 // the key was read, because the compare failed
	traced               // the history was read
	advanced             // the step is done, without more to know: there is a seat, the fence has moved
	refused              // an error
	continued            // the step has come nearer to its end
)

// relation is what a key holds when it was read, seen from an attempt.
type relation int

const (
	atBase     relation = iota // what the attempt was folded over
	ours                       // what the attempt puts
	kept                       // a later version, and the key was never deleted in between
	absent                     // nothing
	unpreceded                 // a version that the attempt's cannot have come before
	later                      // another
)

// fence is what became of the fence that an attempt compares.
type fence int

const (
	fenceHolds fence = iota // or there is none
	fenceMoved
	fenceLost // with its lease
)

// answer is what decide knows of an answer.
type answer struct {
	kind     answerKind
	class    etcd.Class // refused
	relation relation   // seen
	fence    fence      // seen
	breached bool       // seen: a precondition does not hold
	found    bool       // traced
}

// verdict is what an answer means for the calls of an attempt.
type verdict int

const (
	carryOn     verdict = iota // nothing yet
	happened                   // the attempt was applied, or what it does was done
	overwritten                // it was applied, and others have written since
	foldAgain                  // it was not applied, and will not be: the changes run again
	fails                      // it was not applied, and will not be: etcd refuses it
	breach                     // it was not applied, and will not be: a precondition does not hold
	gaveUp                     // it cannot be found out
)

// decision is where an attempt goes from a step.
type decision struct {
	step    step
	verdict verdict
	doubt   bool // from here on
	lone    bool // it goes by itself from here on
	noSpace bool // the step finds out about a send that was refused for want of space
}

func end(v verdict) decision { return decision{step: ended, verdict: v} }

// decide says where an attempt goes. It is pure; decide_test.go has a row for each way.
func decide(f facts, ans answer) decision {
	stay := decision{step: f.step, doubt: f.doubt, lone: f.lone, noSpace: f.noSpace}
	switch ans.kind {
	case continued:
		return stay
	case advanced:
		if f.step == toFence {
			stay.step = toRead
		} else {
			stay.step = toSend
		}
		return stay
	case applied:
		if f.clears {
			return end(foldAgain)
		}
		return end(happened)
	case unasked:
		stay.step = toRead
		return stay
	case seen:
		return decideSeen(f, ans)
	case traced:
		return decideTraced(f, ans)
	}
	if f.step == toSend {
		return decideRefused(f, ans.class)
	}
	switch {
	case ans.class == etcd.Unknown, ans.class == etcd.Transient:
		return stay
	case f.step == toSeat && !f.doubt:
		return end(fails)
	}
	return end(gaveUp)
}

// decideRefused is decide for a send that was answered by an error.
func decideRefused(f facts, class etcd.Class) decision {
	again := decision{step: toSend, doubt: f.doubt, lone: f.lone}
	switch {
	case class == etcd.Unknown && f.kind == put && f.create:
		return decision{step: toFence, doubt: true}
	case class == etcd.Unknown:
		again.doubt = true
	case class == etcd.Transient:
	case class == etcd.NoSpace && !f.doubt: // that is also answered to the write that crossed the quota
		return decision{step: toRead, lone: f.lone, noSpace: true}
	case !f.lone: // one attempt can fail them all; alone, each is settled by its own answer
		again.lone = true
	case class == etcd.LeaseLost && f.seated:
		return decision{step: toSeat, doubt: f.doubt}
	case f.doubt: // this send was refused, an earlier one may yet be applied
	default:
		return end(fails)
	}
	return again
}

// decideSeen is decide for a key that was read after the compare had failed, or after a send was
// refused for want of space, or after the fence was moved: no earlier send can be applied any more.
func decideSeen(f facts, ans answer) decision {
	trace := decision{step: toTrace, doubt: f.doubt, lone: f.lone, noSpace: f.noSpace}
	switch {
	case ans.relation == atBase && f.create && f.kind == put && (f.doubt || f.noSpace): // created, and deleted since?
		return trace
	case ans.relation == atBase && f.noSpace:
		return refusedForSpace(f)
	case ans.relation == atBase && ans.fence == fenceMoved:
		return decision{step: toSend}
	case ans.relation == atBase && ans.fence == fenceLost:
		// The attempt keeps its write id, since an earlier send of it may have been applied before
		// that.
		return decision{step: toSeat}
	case ans.relation == atBase && ans.breached:
		return end(breach)
	case ans.relation == atBase, f.kind == validate, f.clears:
		return end(foldAgain)
	case f.kind == remove && !f.doubt && !f.noSpace && ans.breached && ans.relation != kept:
		return end(breach) // whoever has deleted it, this was not the attempt's to do any more
	case f.kind == remove && ans.relation == kept, f.kind == put && ans.relation == unpreceded:
		return end(foldAgain)
	case f.kind == remove && ans.relation == absent && f.idempotent:
		return end(happened) // whoever did that
	case f.kind == put && ans.relation == ours:
		return end(overwritten)
	}
	return trace
}

// decideTraced is decide for a history that was read.
func decideTraced(f facts, ans answer) decision {
	switch {
	case ans.found:
		return end(overwritten)
	case f.noSpace && ans.relation == atBase:
		return refusedForSpace(f)
	}
	return end(foldAgain)
}

// refusedForSpace is where an attempt goes that was refused for want of space, and was not applied
// all the same.
func refusedForSpace(f facts) decision {
	if f.lone {
		return end(fails)
	}
	return decision{step: toSend, lone: true} // a batch is refused for what one of it needs
}
