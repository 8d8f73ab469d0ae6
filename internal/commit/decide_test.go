package commit

import (
	"fmt"
	"testing"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/seed210be38d/etcdstore/internal/etcd"
)

// Every way from every step: what is known of an attempt, what was answered, and where it goes.
func TestDecide(t *testing.T) {
	refusal := func(c etcd.Class) answer { return answer{kind: refused, class: c} }
	read := func(r relation) answer { return answer{kind: seen, relation: r} }
	create := facts{kind: put, create: true, seated: true}
	update := facts{kind: put}
	moved := facts{kind: put, seated: true}
	deletion := facts{kind: remove}
	at := func(s step, f facts) facts { f.step = s; return f }
	with := func(f facts, set func(*facts)) facts { set(&f); return f }
	lone := func(f *facts) { f.lone = true }
	doubt := func(f *facts) { f.doubt = true }
	noSpace := func(f *facts) { f.noSpace = true }
	clears := func(f *facts) { f.clears = true }
	idempotent := func(f *facts) { f.idempotent = true }
	to := func(s step) decision { return decision{step: s} }

	for _, c := range []struct {
		name string
		f    facts
		ans  answer
		want decision
	}{
		// toSeat
		{"a seat is found", at(toSeat, create), answer{kind: advanced}, to(toSend)},
		{"no grant for the moment", at(toSeat, create), refusal(etcd.Transient), to(toSeat)},
		{"a grant without an answer", at(toSeat, create), refusal(etcd.Unknown), to(toSeat)},
		{"grants are denied", at(toSeat, create), refusal(etcd.Rejected), end(fails)},
		{"grants are denied, and an earlier send is in doubt", at(toSeat, with(moved, doubt)), refusal(etcd.Rejected), end(gaveUp)},
		{"a seat for what is in doubt", at(toSeat, with(moved, doubt)), answer{kind: advanced}, decision{step: toSend, doubt: true}},

		// toSend
		{"applied", update, answer{kind: applied}, end(happened)},
		{"applied, in doubt before", with(update, doubt), answer{kind: applied}, end(happened)},
		{"an expired value is cleared", with(deletion, clears), answer{kind: applied}, end(foldAgain)},
		{"refuted, unasked", update, answer{kind: unasked}, to(toRead)},
		{"refuted, unasked, in doubt", with(update, doubt), answer{kind: unasked}, decision{step: toRead, doubt: true}},
		{"no answer to a create", create, refusal(etcd.Unknown), decision{step: toFence, doubt: true}},
		{"no answer to an update", update, refusal(etcd.Unknown), decision{step: toSend, doubt: true}},
		{"no answer to a delete", deletion, refusal(etcd.Unknown), decision{step: toSend, doubt: true}},
		{"no answer to a validation of absence", facts{kind: validate, create: true}, refusal(etcd.Unknown), decision{step: toSend, doubt: true}},
		{"no leader", update, refusal(etcd.Transient), to(toSend)},
		{"no leader, in doubt", with(update, doubt), refusal(etcd.Transient), decision{step: toSend, doubt: true}},
		{"a batch is refused", update, refusal(etcd.Rejected), decision{step: toSend, lone: true}},
		{"a batch is too large", update, refusal(etcd.TooLarge), decision{step: toSend, lone: true}},
		{"a batch names a lost lease", create, refusal(etcd.LeaseLost), decision{step: toSend, lone: true}},
		{"a batch is refused, in doubt", with(update, doubt), refusal(etcd.Rejected), decision{step: toSend, lone: true, doubt: true}},
		{"refused alone", with(update, lone), refusal(etcd.Rejected), end(fails)},
		{"too large alone", with(update, lone), refusal(etcd.TooLarge), end(fails)},
		{"refused alone, in doubt", with(with(update, lone), doubt), refusal(etcd.Rejected), decision{step: toSend, lone: true, doubt: true}},
		{"its lease is lost", with(create, lone), refusal(etcd.LeaseLost), to(toSeat)},
		{"its lease is lost, in doubt", with(with(moved, lone), doubt), refusal(etcd.LeaseLost), decision{step: toSeat, doubt: true}},
		{"a lease that it does not name", with(update, lone), refusal(etcd.LeaseLost), end(fails)},
		{"no space for a batch", update, refusal(etcd.NoSpace), decision{step: toRead, noSpace: true}},
		{"no space alone", with(update, lone), refusal(etcd.NoSpace), decision{step: toRead, lone: true, noSpace: true}},
		{"no space for a batch, in doubt", with(update, doubt), refusal(etcd.NoSpace), decision{step: toSend, lone: true, doubt: true}},
		{"no space alone, in doubt", with(with(update, lone), doubt), refusal(etcd.NoSpace), decision{step: toSend, lone: true, doubt: true}},

		// toFence
		{"the fence has moved", at(toFence, with(create, doubt)), answer{kind: advanced}, decision{step: toRead, doubt: true}},
		{"the fence may have moved", at(toFence, with(create, doubt)), refusal(etcd.Unknown), decision{step: toFence, doubt: true}},
		{"the fence cannot be moved yet", at(toFence, with(create, doubt)), refusal(etcd.Transient), decision{step: toFence, doubt: true}},
		{"the fence cannot be moved", at(toFence, with(create, doubt)), refusal(etcd.Rejected), end(gaveUp)},

		// toRead, and the Else of a send
		{"not read yet", at(toRead, update), refusal(etcd.Unknown), to(toRead)},
		{"cannot be read", at(toRead, update), refusal(etcd.Rejected), end(gaveUp)},
		{"an update's base is there: nothing that it compares has failed", at(toRead, update), read(atBase), end(foldAgain)},
		{"a create's fence was moved by another", create, answer{kind: seen, fence: fenceMoved}, to(toSend)},
		{"an update's fence was moved by another", with(moved, doubt), answer{kind: seen, fence: fenceMoved}, to(toSend)},
		{"a create's lease is lost", create, answer{kind: seen, fence: fenceLost}, to(toSeat)},
		{"a precondition does not hold", update, answer{kind: seen, breached: true}, end(breach)},
		{"a precondition does not hold, in doubt", with(update, doubt), answer{kind: seen, breached: true}, end(breach)},
		{"a precondition and the fence", moved, answer{kind: seen, fence: fenceMoved, breached: true}, to(toSend)},
		{"a precondition, and overtaken", update, answer{kind: seen, relation: unpreceded, breached: true}, end(foldAgain)},
		{"a create in doubt, and nothing there", at(toRead, with(create, doubt)), answer{kind: seen, fence: fenceMoved}, decision{step: toTrace, doubt: true}},
		{"a create without space, and nothing there", at(toRead, with(create, noSpace)), read(atBase), decision{step: toTrace, noSpace: true}},
		{"an update of a batch without space, not applied", at(toRead, with(update, noSpace)), read(atBase), decision{step: toSend, lone: true}},
		{"an update alone without space, not applied", at(toRead, with(with(update, noSpace), lone)), read(atBase), end(fails)},
		{"a validation was overtaken", facts{}, read(later), end(foldAgain)},
		{"a clearing was overtaken", with(deletion, clears), read(absent), end(foldAgain)},
		{"a delete was overtaken, never deleted", deletion, read(kept), end(foldAgain)},
		{"deletes alone, and it is gone", with(deletion, idempotent), read(absent), end(happened)},
		{"a delete that an update was folded with, and it is gone", deletion, read(absent), to(toTrace)},
		{"deletes alone in doubt, and it is gone", with(with(deletion, idempotent), doubt), read(absent), end(happened)},
		{"a delete in doubt that an update was folded with, and it is gone", with(deletion, doubt), read(absent), decision{step: toTrace, doubt: true}},
		{"a delete without space, which may have been applied, and it is gone", at(toRead, with(with(deletion, idempotent), noSpace)), read(absent), end(happened)},
		{"a delete whose precondition is lost, and it is gone", with(deletion, idempotent), answer{kind: seen, relation: absent, breached: true}, end(breach)},
		{"a delete whose precondition is lost, and another was created", with(deletion, idempotent), answer{kind: seen, relation: later, breached: true}, end(breach)},
		{"a delete whose precondition is lost, and it was never deleted", with(deletion, idempotent), answer{kind: seen, relation: kept, breached: true}, end(foldAgain)},
		{"a delete, and another was created since", with(deletion, idempotent), read(later), to(toTrace)},
		{"a put is what is there", update, read(ours), end(overwritten)},
		{"a put was overtaken before it", update, read(unpreceded), end(foldAgain)},
		{"a put may have been overwritten", with(update, doubt), read(later), decision{step: toTrace, doubt: true}},
		{"a put may have been deleted", update, read(absent), to(toTrace)},
		{"what had no space may have been overwritten", at(toRead, with(with(update, noSpace), lone)), read(later), decision{step: toTrace, lone: true, noSpace: true}},

		// toTrace
		{"more history", at(toTrace, update), answer{kind: continued}, to(toTrace)},
		{"history without an answer", at(toTrace, update), refusal(etcd.Unknown), to(toTrace)},
		{"history is compacted", at(toTrace, update), refusal(etcd.Compacted), end(gaveUp)},
		{"in the history", at(toTrace, update), answer{kind: traced, found: true, relation: later}, end(overwritten)},
		{"not in the history", at(toTrace, update), answer{kind: traced, relation: later}, end(foldAgain)},
		{"a create without space was deleted", at(toTrace, with(create, noSpace)), answer{kind: traced, found: true}, end(overwritten)},
		{"a create of a batch without space, not applied", at(toTrace, with(create, noSpace)), answer{kind: traced}, decision{step: toSend, lone: true}},
		{"a create alone without space, not applied", at(toTrace, with(with(create, noSpace), lone)), answer{kind: traced}, end(fails)},
		{"a create in doubt, not applied", at(toTrace, with(create, doubt)), answer{kind: traced}, end(foldAgain)},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := decide(c.f, c.ans); got != c.want {
				t.Errorf("decide = %+v, want %+v", got, c.want)
			}
		})
	}
}

// What holds of every decision, for all facts and answers there can be.
func TestDecide_Invariants(t *testing.T) {
	bools := []bool{false, true}
	for s := toSend; s < ended; s++ {
		for k := validate; k <= remove; k++ {
			for bits := range 128 {
				bit := func(i int) bool { return bits>>i&1 == 1 }
				f := facts{step: s, kind: k, create: bit(0), clears: bit(1) && k == remove, idempotent: bit(2), seated: bit(3) && k == put, lone: bit(4), noSpace: bit(5) && s != toSend, doubt: bit(6)}
				for class := etcd.Unknown; class <= etcd.NoSpace; class++ {
					checkDecision(t, f, answer{kind: refused, class: class})
				}
				for r := atBase; r <= later; r++ {
					for fc := fenceHolds; fc <= fenceLost; fc++ {
						for _, b := range bools {
							checkDecision(t, f, answer{kind: seen, relation: r, fence: fc, breached: b})
							checkDecision(t, f, answer{kind: traced, relation: r, found: b})
						}
					}
				}
			}
		}
	}
}

func checkDecision(t *testing.T, f facts, ans answer) {
	t.Helper()
	d := decide(f, ans)
	what := fmt.Sprintf("%+v, %+v: %+v", f, ans, d)
	if (d.step == ended) != (d.verdict != carryOn) {
		t.Error("ended without a verdict, or not ended with one:", what)
	}
	if d.verdict == fails && f.doubt && ans.kind == refused {
		t.Error("refused for good while an earlier send may be applied:", what)
	}
	if d.verdict == foldAgain && f.step == toSend && ans.kind == refused {
		t.Error("folded again after an error, which proves nothing:", what)
	}
	if d.step == toSend && d.verdict == carryOn && f.kind == put && f.create && ans.kind == refused && ans.class == etcd.Unknown && f.step == toSend {
		t.Error("a create whose outcome is unknown is sent again:", what)
	}
	if d.step == toFence && (f.kind != put || !f.create) && f.step != toFence {
		t.Error("what is no create moves a fence:", what)
	}
	if ans.kind == refused && ans.class == etcd.Unknown && f.step == toSend && !d.doubt {
		t.Error("an unknown outcome leaves no doubt:", what)
	}
}

// Errors that nobody foresaw are unknown outcomes, never answers.
func TestRefusedBy(t *testing.T) {
	for err, want := range map[error]etcd.Class{
		rpctypes.ErrLeaseNotFound: etcd.LeaseLost,
		rpctypes.ErrTimeout:       etcd.Unknown,
		errAbandoned:              etcd.Unknown,
	} {
		if got := refusedBy(err); got.kind != refused || got.class != want {
			t.Errorf("%v: %+v", err, got)
		}
	}
}
