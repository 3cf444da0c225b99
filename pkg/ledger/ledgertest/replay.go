package ledgertest

import (
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// openRun opens a run that nobody has left behind.
func (b *bench) openRun(f ledger.Filter, target string) (ledger.Run, ledger.RunLease) {
	r, l, picked, err := b.s.OpenRun(b.ctx, f, target, "me", time.Minute)
	b.NoError(err)
	b.False(picked)
	b.Equal(r.ID, l.RunID)
	return r, l
}

func (b *bench) selected(l ledger.RunLease, maxAttempts int) []uuid.UUID {
	list, err := b.s.Select(b.ctx, l, maxAttempts, uuid.Nil, 100)
	b.NoError(err)
	ids := make([]uuid.UUID, 0, len(list))
	for _, c := range list {
		ids = append(ids, c.ID)
	}
	return ids
}

func (b *bench) begin(l ledger.RunLease, ids ...uuid.UUID) []ledger.Begun {
	return b.beginBy(l, ledger.BeginOptions{}, ids...)
}

// beginBy begins in a certain order.
func (b *bench) beginBy(l ledger.RunLease, o ledger.BeginOptions, ids ...uuid.UUID) []ledger.Begun {
	o.Lease, o.MaxAttempts = time.Minute, 3
	list, err := b.s.Begin(b.ctx, l, ids, o)
	b.NoError(err)
	b.Len(list, len(ids))
	for i := range list {
		b.Equal(ids[i], list[i].ID)
	}
	return list
}

func (b *bench) begun(l ledger.RunLease, id uuid.UUID) ledger.Begun {
	g := b.begin(l, id)[0]
	b.Empty(g.Skip)
	return g
}

func (b *bench) result(l ledger.RunLease, g ledger.Begun, verdict capture.Verdict, status int) ledger.Ended {
	now := b.clock.Now()
	return ledger.Ended{ID: g.ID, Token: g.Token, Attempt: capture.Attempt{
		Number: g.Attempt, Run: l.RunID, StartedAt: now, EndedAt: now, Status: status, Verdict: verdict,
	}}
}

func (b *bench) end(l ledger.RunLease, results ...ledger.Ended) []error {
	errs, err := b.s.End(b.ctx, l, results)
	b.NoError(err)
	b.Len(errs, len(results))
	return errs
}

func (b *bench) left(l ledger.RunLease) ledger.Left {
	left, err := b.s.Left(b.ctx, l)
	b.NoError(err)
	return left
}

func (b *bench) run(id string) ledger.Run {
	r, err := b.s.Run(b.ctx, id)
	b.NoError(err)
	return r
}

var replayTests = map[string]func(*bench){
	"an attempt from beginning to end": func(b *bench) {
		id := b.failed(1)[0]
		run, l := b.openRun(ledger.Filter{Replayable: true}, "")
		b.Equal(ledger.RunActive, run.State)
		b.Equal([]uuid.UUID{id}, b.selected(l, 1))
		started := time.Now()
		g := b.begun(l, id)
		b.Equal(2, g.Attempt)
		b.Equal(b.clock.Now().Add(time.Minute), g.Until)
		b.False(g.Expires.Before(started.Add(time.Minute)))
		b.False(g.Expires.After(time.Now().Add(time.Minute)))
		d := b.get(id)
		b.Equal(capture.StateReceived, d.State)
		b.Equal(b.clock.Now().Add(d.Policy.Timeout+d.Policy.Grace), d.GraceEnd)
		b.Equal(2, d.Attempts)
		b.Equal(503, d.Status, "of the last attempt that has ended")
		b.Empty(b.selected(l, 9))
		b.Equal(ledger.Left{Waiting: 1}, b.left(l))
		b.NoError(b.end(l, b.result(l, g, capture.Processed, 200))[0])
		d = b.get(id)
		b.Equal(capture.StateProcessed, d.State)
		b.Equal(200, d.Status)
		b.Equal(run.ID, d.Facts.Attempts[1].Run)
		b.Equal(ledger.Left{}, b.left(l))
		b.Equal(ledger.RunCounts{Sent: 1, Processed: 1}, b.run(run.ID).Counts)
		b.NoError(b.s.EndRun(b.ctx, l, []byte(`{"ok":true}`)))
		b.NoError(b.s.EndRun(b.ctx, l, []byte(`{"ok":true}`)))
		got := b.run(run.ID)
		b.Equal(ledger.RunFinished, got.State)
		b.Equal(b.clock.Now(), got.EndedAt)
		b.Equal([]byte(`{"ok":true}`), got.Report)
		b.ErrorIs(b.s.CancelRun(b.ctx, run.ID), ledger.ErrConflict)
		b.Equal(map[string]int64{"processed": 1}, b.stats().Replays)
		b.recount()
	},
	"every result is counted": func(b *bench) {
		ids := b.failed(4, policy(eventPolicy()))
		run, l := b.openRun(ledger.Filter{}, "")
		for i, v := range []capture.Verdict{capture.Processed, capture.Failed, capture.Rejected, capture.NoVerdict} {
			e := b.result(l, b.begun(l, ids[i]), v, 200)
			b.NoError(b.end(l, e, e)[0])
			b.NoError(b.end(l, e)[0], "a repeated equal result is no error")
		}
		b.Equal(ledger.RunCounts{Sent: 4, Processed: 1, Failed: 1, Rejected: 1, Unknown: 1}, b.run(run.ID).Counts)
		b.Equal(map[string]int64{"processed": 1, "failed": 1, "rejected": 1, "unknown": 1}, b.stats().Replays)
		b.Equal(ledger.Left{Replayable: 1, Waiting: 1, Rejected: 1}, b.left(l))
		b.recount()
	},
	"the selection is frozen": func(b *bench) {
		ids := b.failed(2)
		run, l := b.openRun(ledger.Filter{}, "")
		b.Equal(b.get(ids[1]).Seq, run.MaxSeq)
		later := b.failed(1)[0]
		b.Equal(ids, b.selected(l, 1))
		b.Equal(ledger.SkipState, b.begin(l, later)[0].Skip)
		b.Equal(ledger.Left{Replayable: 2}, b.left(l))
		b.EqualValues(1, b.run(run.ID).Counts.Skipped)
	},
	"a run over an empty ledger selects nothing, ever": func(b *bench) {
		_, l := b.openRun(ledger.Filter{}, "")
		id := b.failed(1)[0]
		b.Empty(b.selected(l, 1))
		b.Equal(ledger.SkipState, b.begin(l, id)[0].Skip)
		b.Equal(ledger.Left{}, b.left(l))
	},
	"what is processed is sent to another target alone": func(b *bench) {
		id := b.captured(1)[0]
		b.complete(b.outcome(id, capture.Processed, 200))
		processed := ledger.Filter{States: []capture.State{capture.StateProcessed}}
		_, own := b.openRun(processed, "")
		b.Empty(b.selected(own, 1))
		b.Equal(ledger.SkipState, b.begin(own, id)[0].Skip)
		b.Equal(ledger.Left{}, b.left(own))
		before := b.get(id)
		_, test := b.openRun(processed, "http://test.example")
		b.Equal([]uuid.UUID{id}, b.selected(test, 1))
		b.Equal(ledger.Left{Replayable: 1}, b.left(test))
		b.NoError(b.end(test, b.result(test, b.begun(test, id), capture.Failed, 500))[0])
		b.Equal(before, b.get(id))
		b.Equal(ledger.Left{Replayable: 1}, b.left(test), "it failed there")
		b.NoError(b.end(test, b.result(test, b.begun(test, id), capture.Processed, 200))[0])
		b.Empty(b.selected(test, 9))
		b.Equal(ledger.Left{}, b.left(test))
		b.recount()
	},
	"only what may be sent is selected and begun": func(b *bench) {
		ids := b.captured(6)
		received, failed, rejected, quarantined, discarded, processed := ids[0], ids[1], ids[2], ids[3], ids[4], ids[5]
		b.complete(b.outcome(failed, capture.Failed, 500), b.outcome(rejected, capture.Rejected, 401),
			b.outcome(processed, capture.Processed, 200), b.outcome(quarantined, capture.Failed, 500))
		b.NoError(b.s.Quarantine(b.ctx, quarantined, capture.QuarantineKiller, "x"))
		_, err := b.s.Discard(b.ctx, ledger.Filter{IDs: []uuid.UUID{discarded}}, "because", 1)
		b.NoError(err)
		for what, c := range map[string]struct {
			filter ledger.Filter
			want   []uuid.UUID
		}{
			"nothing said": {ledger.Filter{}, []uuid.UUID{failed}},
			"replayable":   {ledger.Filter{Replayable: true, Statuses: "4xx,5xx"}, []uuid.UUID{failed}},
			"statuses":     {ledger.Filter{Statuses: "2xx,4xx"}, []uuid.UUID{rejected}},
			"states":       {ledger.Filter{States: capture.States()}, []uuid.UUID{failed, rejected, quarantined, processed}},
			"ids":          {ledger.Filter{IDs: ids}, []uuid.UUID{failed, rejected}},
			"rejected":     {ledger.Filter{States: []capture.State{capture.StateRejected}}, []uuid.UUID{rejected}},
		} {
			_, l := b.openRun(c.filter, "https://shadow.example/"+what)
			b.Equal(c.want, b.selected(l, 1), what)
			var begun []uuid.UUID
			for _, g := range b.begin(l, ids...) {
				if g.Skip == "" {
					begun = append(begun, g.ID)
					b.NoError(b.end(l, b.result(l, g, capture.Processed, 200))[0])
				} else {
					b.Equal(ledger.SkipState, g.Skip)
				}
			}
			b.Equal(c.want, begun, what)
			b.Empty(b.selected(l, 9), "%s: the target has them", what)
		}
		b.clock.add(time.Hour)
		_, l := b.openRun(ledger.Filter{}, "")
		b.Equal([]uuid.UUID{received, failed}, b.selected(l, 1))
		b.Equal(ledger.SkipState, b.begin(l, newID())[0].Skip, "unknown")
	},
	"pages of a selection": func(b *bench) {
		ids := b.failed(7)
		_, l := b.openRun(ledger.Filter{}, "")
		var got []uuid.UUID
		after := uuid.Nil
		for {
			list, err := b.s.Select(b.ctx, l, 1, after, 3)
			b.NoError(err)
			if len(list) == 0 {
				break
			}
			for _, c := range list {
				after = c.ID
				got = append(got, c.ID)
			}
		}
		b.Equal(ids, got)
	},
	"attempts of one run": func(b *bench) {
		id := b.failed(1)[0]
		_, l := b.openRun(ledger.Filter{}, "")
		for n := 2; n <= 4; n++ {
			g := b.begun(l, id)
			b.Equal(n, g.Attempt)
			b.NoError(b.end(l, b.result(l, g, capture.Failed, 500))[0])
		}
		b.Equal(ledger.SkipAttempts, b.begin(l, id)[0].Skip)
		b.Empty(b.selected(l, 3))
		b.Equal(ledger.Left{Replayable: 1}, b.left(l))
		b.NoError(b.s.EndRun(b.ctx, l, nil))
		_, l = b.openRun(ledger.Filter{}, "")
		b.Equal(5, b.begun(l, id).Attempt)
	},
	"the first try counts as attempt 1 while it is unknown": func(b *bench) {
		id := b.captured(1)[0]
		b.clock.add(time.Hour)
		_, l := b.openRun(ledger.Filter{}, "")
		b.Equal(2, b.begun(l, id).Attempt)
		b.Equal(1, b.get(id).Attempts)
	},
	"two runs at once never both begin one id": func(b *bench) {
		ids := b.failed(20)
		_, one := b.openRun(ledger.Filter{}, "")
		_, two := b.openRun(ledger.Filter{Replayable: true}, "")
		var wg sync.WaitGroup
		var got [2][]ledger.Begun
		var errs [2]error
		for i, l := range []ledger.RunLease{one, two} {
			wg.Go(func() {
				for _, id := range ids {
					list, err := b.s.Begin(b.ctx, l, []uuid.UUID{id}, ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 3})
					if err != nil {
						errs[i] = err
						return
					}
					got[i] = append(got[i], list...)
				}
			})
		}
		wg.Wait()
		b.NoError(errs[0])
		b.NoError(errs[1])
		for i := range ids {
			b.NotEqual(got[0][i].Skip == "", got[1][i].Skip == "", "exactly one of them begins it")
		}
		for _, g := range b.begin(one, ids...) {
			b.Equal(ledger.SkipLeased, g.Skip)
		}
	},
	"an attempt whose sender died": func(b *bench) {
		id := b.failed(1)[0]
		_, l := b.openRun(ledger.Filter{}, "")
		old := b.begun(l, id)
		b.clock.add(time.Minute - time.Microsecond)
		b.Equal(ledger.SkipLeased, b.begin(l, id)[0].Skip)
		b.clock.add(time.Microsecond)
		// The lease is over, the grace is not: the API may still be at it.
		b.Equal(ledger.SkipState, b.begin(l, id)[0].Skip)
		b.Equal(ledger.Left{Waiting: 1}, b.left(l))
		b.clock.add(time.Hour)
		list, err := b.s.Select(b.ctx, l, 3, uuid.Nil, 10)
		b.NoError(err)
		b.Len(list, 1)
		b.True(list[0].Unresolved)
		g := b.begun(l, id)
		b.Equal(3, g.Attempt)
		b.Greater(g.Token, old.Token)
		b.ErrorIs(b.end(l, b.result(l, old, capture.Processed, 200))[0], ledger.ErrFenced)
		b.Equal(capture.StateReceived, b.state(id))
		b.NoError(b.end(l, b.result(l, g, capture.Failed, 500))[0])
		b.ErrorIs(b.end(l, b.result(l, old, capture.Processed, 200))[0], ledger.ErrFenced)
		b.Equal(capture.StateFailed, b.state(id))
		list, err = b.s.Select(b.ctx, l, 3, uuid.Nil, 10)
		b.NoError(err)
		b.Len(list, 1)
		b.False(list[0].Unresolved)
		b.recount()
	},
	"a result after the end of a lease that nobody took": func(b *bench) {
		id := b.failed(1)[0]
		_, l := b.openRun(ledger.Filter{}, "")
		g := b.begun(l, id)
		b.clock.add(time.Hour)
		b.NoError(b.end(l, b.result(l, g, capture.Processed, 200))[0])
		b.Equal(capture.StateProcessed, b.state(id))
	},
	"results of attempts that never began": func(b *bench) {
		ids := b.failed(2)
		_, l := b.openRun(ledger.Filter{}, "")
		g := b.begun(l, ids[0])
		wrong := []ledger.Begun{{ID: ids[1], Attempt: 2, Token: g.Token}, {ID: ids[0], Attempt: 9, Token: g.Token}, {ID: ids[0], Attempt: 2, Token: g.Token + 1}, {ID: newID(), Attempt: 2}}
		var results []ledger.Ended
		for _, w := range wrong {
			results = append(results, b.result(l, w, capture.Processed, 200))
		}
		for _, err := range b.end(l, append(results, b.result(l, g, capture.Failed, 500))...)[:4] {
			b.ErrorIs(err, ledger.ErrFenced)
		}
		b.Equal(capture.StateFailed, b.state(ids[0]))
		b.Equal(capture.StateFailed, b.state(ids[1]))
		b.Equal(500, b.get(ids[0]).Status)
	},
	"a completion between beginning and end": func(b *bench) {
		id := b.failed(1)[0]
		_, l := b.openRun(ledger.Filter{}, "")
		g := b.begun(l, id)
		b.complete(event(id, capture.Processed, 1))
		b.NoError(b.end(l, b.result(l, g, capture.Failed, 500))[0])
		b.Equal(capture.StateProcessed, b.state(id))
		b.Equal(ledger.SkipState, b.begin(l, id)[0].Skip)
		b.recount()
	},
	"OpenRun picks up only what is over": func(b *bench) {
		f := ledger.Filter{States: []capture.State{capture.StateFailed, capture.StateReceived}, Routes: []string{"b", "a"}}
		same := ledger.Filter{States: []capture.State{capture.StateReceived, capture.StateFailed}, Routes: []string{"a", "b"}}
		open := func(f ledger.Filter, target string) (ledger.Run, ledger.RunLease, bool) {
			r, l, picked, err := b.s.OpenRun(b.ctx, f, target, "me", time.Minute)
			b.NoError(err)
			return r, l, picked
		}
		first, l1, picked := open(f, "")
		b.False(picked)
		second, _, picked := open(same, "")
		b.False(picked, "somebody works on the first")
		b.clock.add(time.Minute - time.Microsecond)
		_, l5, picked := open(f, "")
		b.False(picked, "both leases hold to their end")
		b.NoError(b.s.EndRun(b.ctx, l5, nil))
		_, err := b.s.KeepRun(b.ctx, l1, time.Minute)
		b.NoError(err)
		b.clock.add(time.Microsecond)
		again, l2, picked := open(same, "")
		b.True(picked)
		b.Equal(second.ID, again.ID, "the first one's lease was extended")
		b.Equal(second.MaxSeq, again.MaxSeq)
		b.clock.add(time.Hour)
		again, l3, picked := open(same, "")
		b.True(picked)
		b.Equal(first.ID, again.ID, "the oldest first")
		b.Greater(l3.Token, l1.Token)
		for _, err := range []error{b.s.EndRun(b.ctx, l1, nil), b.s.LeaveRun(b.ctx, l1)} {
			b.ErrorIs(err, ledger.ErrFenced)
		}
		_, err = b.s.KeepRun(b.ctx, l1, time.Minute)
		b.ErrorIs(err, ledger.ErrFenced)
		_, err = b.s.Begin(b.ctx, l1, []uuid.UUID{newID()}, ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 1})
		b.ErrorIs(err, ledger.ErrFenced)
		_, _, picked = open(same, "https://elsewhere.example")
		b.False(picked, "another target")
		_, _, picked = open(ledger.Filter{Routes: []string{"a"}}, "")
		b.False(picked, "another filter")
		b.NoError(b.s.LeaveRun(b.ctx, l3))
		again, l4, picked := open(f, "")
		b.True(picked, "given up")
		b.Equal(first.ID, again.ID)
		b.NoError(b.s.EndRun(b.ctx, l4, nil))
		b.NoError(b.s.EndRun(b.ctx, l2, nil))
		_, _, picked = open(f, "")
		b.False(picked, "both have ended")
	},
	"a cancelled run": func(b *bench) {
		ids := b.failed(1)
		run, l := b.openRun(ledger.Filter{}, "")
		g := b.begun(l, ids[0])
		b.NoError(b.s.CancelRun(b.ctx, run.ID))
		b.ErrorIs(b.s.CancelRun(b.ctx, run.ID), ledger.ErrConflict)
		r, err := b.s.KeepRun(b.ctx, l, time.Minute)
		b.NoError(err)
		b.Equal(ledger.RunCancelled, r.State)
		_, err = b.s.Begin(b.ctx, l, ids, ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 9})
		b.ErrorIs(err, ledger.ErrFenced)
		b.NoError(b.end(l, b.result(l, g, capture.Processed, 200))[0], "what was sent is still known")
		b.NoError(b.s.EndRun(b.ctx, l, []byte("{}")))
		b.Equal(ledger.RunCancelled, b.run(run.ID).State)
		_, _, picked, err := b.s.OpenRun(b.ctx, ledger.Filter{}, "", "me", time.Minute)
		b.NoError(err)
		b.False(picked)
	},
	"runs are listed, the newest first": func(b *bench) {
		var ids []string
		for range 5 {
			r, _ := b.openRun(ledger.Filter{Since: b.clock.Now()}, "")
			ids = append([]string{r.ID}, ids...)
			b.Equal(r, b.run(r.ID))
			b.clock.add(time.Second)
		}
		var got []string
		for cursor := ""; ; {
			list, next, err := b.s.Runs(b.ctx, cursor, 2)
			b.NoError(err)
			for _, r := range list {
				got = append(got, r.ID)
			}
			if cursor = next; cursor == "" {
				break
			}
		}
		b.Equal(ids, got)
	},
	"a run to another target changes no state": func(b *bench) {
		id := b.failed(1)[0]
		run, l := b.openRun(ledger.Filter{}, "https://elsewhere.example")
		before := b.get(id)
		g := b.begun(l, id)
		b.Equal(2, g.Attempt)
		b.Equal(ledger.SkipLeased, b.begin(l, id)[0].Skip)
		b.Equal(before, b.get(id))
		b.NoError(b.end(l, b.result(l, g, capture.Failed, 500))[0])
		b.NoError(b.end(l, b.result(l, g, capture.Failed, 500))[0])
		b.Equal([]uuid.UUID{id}, b.selected(l, 2), "a failure is tried again")
		b.Empty(b.selected(l, 1))
		g = b.begun(l, id)
		b.Equal(3, g.Attempt)
		b.clock.add(2 * time.Minute)
		list, err := b.s.Select(b.ctx, l, 9, uuid.Nil, 9)
		b.NoError(err)
		b.Len(list, 1)
		b.True(list[0].Unresolved)
		b.Equal(ledger.Left{Replayable: 1}, b.left(l))
		b.NoError(b.end(l, b.result(l, g, capture.Processed, 200))[0])
		b.Empty(b.selected(l, 9))
		b.Equal(ledger.Left{}, b.left(l))
		b.Equal(before, b.get(id))
		b.Equal(ledger.RunCounts{Sent: 2, Processed: 1, Failed: 1, Skipped: 1}, b.run(run.ID).Counts)
		b.recount()
	},
	"what is left": func(b *bench) {
		ids := b.failed(5)
		b.captured(1) // in its grace
		live := b.captured(1)[0]
		b.complete(b.outcome(live, capture.Rejected, 422))
		_, l := b.openRun(ledger.Filter{}, "")
		rejected := b.begun(l, ids[0])
		b.NoError(b.end(l, b.result(l, rejected, capture.Rejected, 422))[0])
		b.NoError(b.s.Quarantine(b.ctx, ids[1], capture.QuarantineKiller, ""))
		b.begun(l, ids[2])
		b.complete(event(ids[3], capture.Processed, 1))
		b.Equal(ledger.Left{Replayable: 1, Waiting: 2, Rejected: 1, Quarantined: 1}, b.left(l))
	},
}
