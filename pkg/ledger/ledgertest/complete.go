package ledgertest

import (
	"math"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

var completeTests = map[string]func(*bench){
	"events that differ in their detail alone are bounded": func(b *bench) {
		// Before the capture and after it, and without an end.
		early, id := newID(), b.failed(1)[0]
		say := func(id uuid.UUID, outcome capture.Verdict, attempt, n int) ledger.Fact {
			return ledger.Fact{Event: &capture.Event{ID: id, Outcome: outcome, Attempt: attempt, Detail: strconv.Itoa(n)}}
		}
		for n := range 2 * ledger.MaxDetails {
			b.complete(say(early, capture.Failed, 1, n), say(id, capture.Failed, 1, n))
		}
		b.Equal(int64(ledger.MaxDetails), b.stats().Early)
		b.record(b.inline(early))
		for _, one := range []uuid.UUID{early, id} {
			d := b.get(one)
			b.Len(d.Facts.Events, ledger.MaxDetails)
			b.Equal("0", d.Facts.Events[0].Detail)
			b.Equal(capture.StateFailed, d.State)
			// Whatever says something else is taken.
			b.complete(say(one, capture.Failed, 2, 0), say(one, capture.Processed, 1, 0))
			b.Len(b.get(one).Facts.Events, ledger.MaxDetails+2)
			b.Equal(capture.StateProcessed, b.state(one))
		}
		b.recount()
	},
	"an outcome comes back as it went in": func(b *bench) {
		ids := b.captured(4)
		for i, v := range []capture.Verdict{capture.Processed, capture.Failed, capture.Rejected, capture.NoVerdict} {
			f := b.outcome(ids[i], v, 200+100*i)
			f.Outcome.Attempt.StartedAt = b.clock.Now().Add(-time.Second)
			f.Outcome.Attempt.Error = "cut short \x00"
			b.complete(f)
			d := b.get(ids[i])
			b.Equal([]capture.State{capture.StateProcessed, capture.StateFailed, capture.StateRejected, capture.StateReceived}[i], d.State)
			b.Equal([]capture.Attempt{f.Outcome.Attempt}, d.Facts.Attempts)
			b.Equal(200+100*i, d.Status)
			b.Equal("cut short \x00", d.Error)
			b.Equal(1, d.Attempts)
		}
		b.recount()
	},
	"equal facts count once": func(b *bench) {
		id, early := b.captured(1)[0], newID()
		for range 2 {
			b.complete(b.outcome(id, capture.Failed, 500), b.outcome(id, capture.Failed, 500), event(id, capture.Failed, 1), event(id, capture.Failed, 1),
				b.outcome(early, capture.Failed, 500), b.outcome(early, capture.Failed, 500), event(early, capture.Failed, 1), event(early, capture.Failed, 1))
		}
		b.EqualValues(2, b.stats().Early)
		b.record(b.inline(early))
		b.Zero(b.stats().Early)
		for _, id := range []uuid.UUID{id, early} {
			d := b.get(id)
			b.Len(d.Facts.Attempts, 1)
			b.Len(d.Facts.Events, 1)
			b.Len(d.EventTimes, 1)
			b.Equal(1, d.Attempts)
		}
		b.recount()
	},
	"completion before capture": func(b *bench) {
		byOutcome, byEvent, byBoth, contradicted := newID(), newID(), newID(), newID()
		b.complete(
			b.outcome(byOutcome, capture.Processed, 200), event(byEvent, capture.Processed, 1),
			b.outcome(byBoth, capture.NoVerdict, 202), event(byBoth, capture.Processed, 1),
			event(contradicted, capture.Failed, 1), b.outcome(contradicted, capture.Rejected, 422),
		)
		b.EqualValues(6, b.stats().Early)
		b.unknown(byOutcome)
		b.reopen()
		known := b.clock.Now()
		b.clock.add(time.Minute)
		b.record(b.inline(byOutcome), b.inline(byEvent), b.inline(byBoth), b.inline(contradicted))
		b.Equal(capture.StateProcessed, b.state(byOutcome))
		b.Equal(capture.StateProcessed, b.state(byEvent))
		b.Equal(capture.StateProcessed, b.state(byBoth))
		b.Equal(capture.StateFailed, b.state(contradicted))
		b.Equal([]time.Time{known}, b.get(byEvent).EventTimes)
		b.Equal(b.clock.Now(), b.get(byEvent).RecordedAt)
		b.Zero(b.stats().Early)
		b.recount()
	},
	"capture and completion over and over": func(b *bench) {
		id := newID()
		for range 3 {
			b.complete(b.outcome(id, capture.Processed, 200))
			b.record(b.inline(id))
		}
		b.Len(b.get(id).Facts.Attempts, 1)
		b.Zero(b.stats().Early)
		b.recount()
	},
	"contradicting completions": func(b *bench) {
		ids := b.captured(3)
		b.complete(b.outcome(ids[0], capture.Failed, 500), event(ids[0], capture.Processed, 1))
		b.complete(event(ids[1], capture.Failed, 1), b.outcome(ids[1], capture.Processed, 200))
		b.complete(b.outcome(ids[2], capture.Rejected, 400), b.outcome(ids[2], capture.Failed, 500), b.outcome(ids[2], capture.Rejected, 404))
		b.Equal(capture.StateProcessed, b.state(ids[0]))
		b.Equal(capture.StateProcessed, b.state(ids[1]))
		d := b.get(ids[2])
		b.Equal(capture.StateFailed, d.State)
		b.Len(d.Facts.Attempts, 3)
		b.Equal(1, d.Attempts)
		b.Equal(500, d.Status)
		b.recount()
	},
	"a failed event that names an attempt to come": func(b *bench) {
		id := b.captured(1)[0]
		b.complete(event(id, capture.Failed, 2), b.outcome(id, capture.Rejected, 422))
		b.Equal(capture.StateRejected, b.state(id))
		second := b.outcome(id, capture.NoVerdict, 202)
		second.Outcome.Attempt.Number, second.Outcome.Attempt.Run = 2, "r"
		b.complete(second)
		b.Equal(capture.StateFailed, b.state(id))
	},
	"the beginning of an attempt gives way to its end": func(b *bench) {
		id := b.captured(1)[0]
		begun, ended := b.outcome(id, capture.NoVerdict, 0), b.outcome(id, capture.Failed, 500)
		for _, f := range []ledger.Fact{begun, ended} {
			f.Outcome.Attempt.Number, f.Outcome.Attempt.Run = 2, "r"
		}
		begun.Outcome.Attempt.EndedAt, begun.Outcome.Attempt.Error = time.Time{}, ""
		b.complete(begun)
		b.Equal(capture.StateReceived, b.state(id))
		b.complete(ended, begun)
		b.Equal([]capture.Attempt{ended.Outcome.Attempt}, b.get(id).Facts.Attempts)
	},
	"a batch with one bad fact in every position": func(b *bench) {
		bad := map[string]func(id uuid.UUID) ledger.Fact{
			"number": func(id uuid.UUID) ledger.Fact {
				f := b.outcome(id, capture.Failed, 500)
				f.Outcome.Attempt.Number = 0
				return f
			},
			"verdict": func(id uuid.UUID) ledger.Fact { f := b.outcome(id, "perhaps", 500); return f },
			"status":  func(id uuid.UUID) ledger.Fact { return b.outcome(id, capture.Failed, -1) },
			"outcome": func(id uuid.UUID) ledger.Fact { return event(id, capture.Rejected, 1) },
			"attempt": func(id uuid.UUID) ledger.Fact { return event(id, capture.Failed, -1) },
			"huge":    func(id uuid.UUID) ledger.Fact { return event(id, capture.Failed, math.MaxInt64) },
			"id":      func(uuid.UUID) ledger.Fact { return event(uuid.Nil, capture.Failed, 1) },
			"nothing": func(uuid.UUID) ledger.Fact { return ledger.Fact{Outcome: &capture.Outcome{}} },
		}
		var early int64
		for what, spoil := range bad {
			for at := range 4 {
				// Both of known and of unknown requests.
				ids := append(b.captured(2), newIDs(2)...)
				facts := make([]ledger.Fact, 4)
				for i, id := range ids {
					facts[i] = b.outcome(id, capture.Failed, 500)
				}
				facts[at] = spoil(ids[at])
				errs, err := b.s.Complete(b.ctx, facts)
				b.NoError(err)
				for i, id := range ids {
					switch {
					case i == at:
						b.Error(errs[i], "%s at %d", what, at)
						if i < 2 {
							b.Equal(capture.StateReceived, b.state(id))
						}
					case i < 2:
						b.NoError(errs[i], "%s at %d, fact %d", what, at, i)
						b.Equal(capture.StateFailed, b.state(id))
					default:
						b.NoError(errs[i])
						early++
					}
				}
			}
		}
		b.Equal(early, b.stats().Early)
		b.recount()
	},
	"the cap on early facts drops the oldest event": func(b *bench) {
		b.with(func(o *Options) { o.MaxEarly = 4 })
		events, outcomes := newIDs(4), newIDs(2)
		b.complete(b.outcome(outcomes[0], capture.Processed, 200))
		for _, id := range events[:3] {
			b.complete(event(id, capture.Processed, 1))
		}
		b.Zero(b.stats().EarlyDropped)
		b.complete(event(events[3], capture.Processed, 1), b.outcome(outcomes[1], capture.Processed, 200))
		st := b.stats()
		b.EqualValues(4, st.Early)
		b.EqualValues(2, st.EarlyDropped)
		for _, id := range append(events, outcomes...) {
			b.record(b.inline(id))
		}
		for _, id := range events[:2] {
			b.Equal(capture.StateReceived, b.state(id), "the oldest have gone")
		}
		for _, id := range append(events[2:], outcomes...) {
			b.Equal(capture.StateProcessed, b.state(id))
		}
		// Outcomes never go, not even above the cap.
		more := newIDs(9)
		for _, id := range more {
			b.complete(b.outcome(id, capture.Processed, 200))
		}
		b.EqualValues(9, b.stats().Early)
		b.complete(event(newID(), capture.Processed, 1))
		b.EqualValues(9, b.stats().Early)
		b.EqualValues(3, b.stats().EarlyDropped)
	},
	"grace is by the ledger's clock": func(b *bench) {
		p := capture.DefaultPolicy()
		p.Timeout, p.Grace = 10*time.Second, time.Minute
		// No outcome at all: the ingress's clock is an hour behind, then an hour ahead.
		behind, ahead := newID(), newID()
		b.record(b.inline(behind, policy(p), func(r *capture.Request) { r.ReceivedAt = b.clock.Now().Add(-time.Hour) }),
			b.inline(ahead, policy(p), func(r *capture.Request) { r.ReceivedAt = b.clock.Now().Add(time.Hour) }))
		b.Equal(b.clock.Now().Add(time.Minute), b.get(behind).GraceEnd)
		b.Equal(b.clock.Now().Add(time.Hour+10*time.Second+time.Minute), b.get(ahead).GraceEnd)
		replayable := ledger.Filter{Replayable: true}
		b.clock.add(time.Minute - time.Microsecond)
		b.Empty(b.listed(replayable))
		b.False(b.get(behind).Replayable)
		b.clock.add(time.Microsecond)
		b.Equal([]uuid.UUID{behind}, b.listed(replayable))
		b.True(b.get(behind).Replayable)
		b.Equal(capture.StateReceived, b.state(behind))
	},
	"grace of a slow request starts with its end": func(b *bench) {
		p := eventPolicy()
		p.Timeout, p.Grace = 10*time.Minute, time.Minute
		id := b.captured(1, policy(p))[0]
		b.clock.add(9 * time.Minute)
		f := b.outcome(id, capture.NoVerdict, 200)
		f.Outcome.Attempt.EndedAt = f.Outcome.Attempt.EndedAt.Add(time.Hour) // by another clock
		b.complete(f)
		b.Equal(b.clock.Now().Add(time.Minute), b.get(id).GraceEnd)
		b.clock.add(time.Minute)
		b.Equal([]uuid.UUID{id}, b.listed(ledger.Filter{Replayable: true}))
		// The event ends the waiting.
		b.complete(event(id, capture.Processed, 1))
		b.Empty(b.listed(ledger.Filter{Replayable: true}))
		b.True(b.get(id).GraceEnd.IsZero())
	},
	"an outcome that came early starts the grace with the capture": func(b *bench) {
		p := eventPolicy()
		id := newID()
		b.complete(b.outcome(id, capture.NoVerdict, 200))
		b.clock.add(time.Hour)
		b.record(b.inline(id, policy(p)))
		b.Equal(b.clock.Now().Add(p.Grace), b.get(id).GraceEnd)
	},
}
