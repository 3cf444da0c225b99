package ledgertest

import (
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

var operatorTests = map[string]func(*bench){
	"discard": func(b *bench) {
		ids := b.captured(5)
		b.complete(b.outcome(ids[0], capture.Processed, 200), b.outcome(ids[1], capture.Failed, 500), b.outcome(ids[2], capture.Rejected, 400))
		b.NoError(b.s.Quarantine(b.ctx, ids[3], capture.QuarantineKiller, ""))
		_, err := b.s.Discard(b.ctx, ledger.Filter{}, "", 10)
		b.Error(err, "no reason")
		n, err := b.s.Discard(b.ctx, ledger.Filter{States: []capture.State{capture.StateProcessed}}, "x", 10)
		b.NoError(err)
		b.Zero(n)
		n, err = b.s.Discard(b.ctx, ledger.Filter{}, "out of date", 2)
		b.NoError(err)
		b.Equal(2, n)
		b.Equal(ids[1:3], b.listed(ledger.Filter{States: []capture.State{capture.StateDiscarded}}), "in the order of ids")
		b.clock.add(time.Second)
		n, err = b.s.Discard(b.ctx, ledger.Filter{}, "again", 10)
		b.NoError(err)
		b.Equal(2, n, "what is discarded already is not counted")
		d := b.get(ids[1])
		b.Equal("out of date", d.DiscardReason)
		b.Equal(b.clock.Now().Add(-time.Second), d.DiscardedAt)
		b.Len(d.Facts.Attempts, 1)
		b.Equal(500, d.Status)
		b.Equal(capture.StateProcessed, b.state(ids[0]))
		// Nothing undoes it.
		b.complete(event(ids[1], capture.Processed, 1))
		b.Equal(capture.StateDiscarded, b.state(ids[1]))
		b.ErrorIs(b.s.Quarantine(b.ctx, ids[1], capture.QuarantineKiller, ""), ledger.ErrConflict)
		b.recount()
	},
	"discard what a filter selects": func(b *bench) {
		ids := b.failed(2, target("POST", "/a"))
		other := b.failed(1, target("POST", "/b"))[0]
		waiting := b.captured(1, target("POST", "/a"))[0]
		n, err := b.s.Discard(b.ctx, ledger.Filter{Path: "/a", Replayable: true}, "x", 10)
		b.NoError(err)
		b.Equal(2, n)
		b.Equal(capture.StateDiscarded, b.state(ids[1]))
		b.Equal(capture.StateFailed, b.state(other))
		b.Equal(capture.StateReceived, b.state(waiting))
	},
	"quarantine and release": func(b *bench) {
		id := b.failed(1)[0]
		b.ErrorIs(b.s.ReleaseQuarantine(b.ctx, id), ledger.ErrConflict)
		b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, "two lonely deaths"))
		b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, "two lonely deaths"))
		b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, "a third"))
		held := b.clock.Now()
		b.Equal(capture.StateQuarantined, b.state(id))
		b.Empty(b.listed(ledger.Filter{Replayable: true}))
		b.complete(event(id, capture.Failed, 1), b.outcome(id, capture.Rejected, 400))
		b.Equal(capture.StateQuarantined, b.state(id))
		b.clock.add(time.Hour)
		b.NoError(b.s.ReleaseQuarantine(b.ctx, id))
		b.ErrorIs(b.s.ReleaseQuarantine(b.ctx, id), ledger.ErrConflict)
		d := b.get(id)
		b.Equal(capture.StateFailed, d.State)
		b.Equal([]capture.Quarantine{
			{Number: 1, Reason: capture.QuarantineKiller, Detail: "two lonely deaths", At: held, ReleasedAt: b.clock.Now(), ReleasedAfter: 1},
			{Number: 2, Reason: capture.QuarantineKiller, Detail: "a third", At: held, ReleasedAt: b.clock.Now(), ReleasedAfter: 1},
		}, d.Facts.Quarantines)
		// The next attempt decides.
		_, l := b.openRun(ledger.Filter{}, "")
		b.NoError(b.end(l, b.result(l, b.begun(l, id), capture.Rejected, 400))[0])
		b.Equal(capture.StateRejected, b.state(id))
		b.ErrorIs(b.s.Quarantine(b.ctx, id, "again", ""), ledger.ErrConflict)
		b.recount()
	},
	"a release makes a request failed whatever its first try said": func(b *bench) {
		ids := b.captured(2)
		for _, id := range ids {
			b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, ""))
			b.NoError(b.s.ReleaseQuarantine(b.ctx, id))
			b.Equal(capture.StateFailed, b.state(id))
		}
		b.complete(b.outcome(ids[0], capture.Rejected, 400), b.outcome(ids[1], capture.Processed, 200))
		b.Equal(capture.StateFailed, b.state(ids[0]))
		b.Equal(capture.StateProcessed, b.state(ids[1]))
	},
	"processed goes before quarantined": func(b *bench) {
		id := b.failed(1)[0]
		b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, ""))
		b.complete(event(id, capture.Processed, 1))
		b.Equal(capture.StateProcessed, b.state(id))
		b.recount()
	},
}

func (b *bench) expire(r ledger.Retention, limit int) (deleted int, more bool) {
	deleted, more, err := b.s.Expire(b.ctx, r, limit)
	b.NoError(err)
	b.LessOrEqual(deleted, limit)
	return deleted, more
}

const day = 24 * time.Hour

var expireTests = map[string]func(*bench){
	"payloads of processed ones by age": func(b *bench) {
		keep := ledger.Retention{KeepProcessed: day, Retention: 30 * day}
		ids := b.captured(3)
		chunked := newID()
		b.record(chunk(chunked, 0, []byte("abc")), b.head(chunked, []byte("abc")))
		b.complete(b.outcome(ids[0], capture.Processed, 200), b.outcome(ids[1], capture.Rejected, 400), b.outcome(chunked, capture.Processed, 200))
		b.clock.add(day)
		b.complete(b.outcome(ids[2], capture.Processed, 200))
		b.clock.add(time.Second)
		n, more := b.expire(keep, 10)
		b.Equal(2, n)
		b.False(more)
		for _, id := range []uuid.UUID{ids[0], chunked} {
			_, _, err := b.s.Payload(b.ctx, id)
			b.ErrorIs(err, ledger.ErrNotFound)
			d := b.get(id)
			b.True(d.PayloadExpired)
			b.Equal(200, d.Status)
		}
		b.payload(ids[1])
		b.payload(ids[2])
		b.recount()
		// Its chunks came again: they are of a known request.
		b.Len(b.record(from(1, chunk(chunked, 0, []byte("abc"))))[0].Released, 1)
	},
	"payloads of processed ones by bytes, the oldest first": func(b *bench) {
		ids := b.captured(4)
		for _, id := range ids {
			b.complete(b.outcome(id, capture.Processed, 200))
			b.clock.add(time.Second)
		}
		one := b.stats().PayloadBytes / 4
		n, more := b.expire(ledger.Retention{KeepProcessed: day, KeepProcessedBytes: 2 * one, Retention: 30 * day}, 10)
		b.Equal(2, n)
		b.False(more)
		b.Equal(2*one, b.stats().PayloadBytes)
		b.True(b.get(ids[1]).PayloadExpired)
		b.False(b.get(ids[2]).PayloadExpired)
		b.recount()
	},
	"retention drops what is closed and never what is open": func(b *bench) {
		ids := b.captured(7)
		b.complete(b.outcome(ids[1], capture.Failed, 500), b.outcome(ids[2], capture.Rejected, 400), b.outcome(ids[3], capture.Processed, 200),
			b.outcome(ids[4], capture.Failed, 500), event(ids[4], capture.Processed, 1))
		b.NoError(b.s.Quarantine(b.ctx, ids[5], capture.QuarantineKiller, ""))
		_, err := b.s.Discard(b.ctx, ledger.Filter{IDs: ids[6:]}, "x", 1)
		b.NoError(err)
		open := []uuid.UUID{ids[0], ids[1], ids[5]}
		r := ledger.Retention{KeepProcessed: day, Retention: 30 * day}
		b.clock.add(30 * day)
		b.expire(r, 100)
		b.Len(b.listed(ledger.Filter{}), 7)
		b.clock.add(time.Second)
		b.expire(r, 100)
		b.Equal(open, b.listed(ledger.Filter{}))
		b.EqualValues(4, b.stats().Expired)
		b.unknown(ids[4])
		b.clock.add(10000 * day)
		b.expire(r, 100)
		b.Equal(open, b.listed(ledger.Filter{}))
		for _, id := range open {
			b.payload(id)
		}
		// What is closed late is kept from then on.
		b.complete(event(ids[0], capture.Processed, 1))
		b.expire(r, 100)
		b.Equal(open, b.listed(ledger.Filter{}))
		b.recount()
	},
	"the facts of a deleted request go with it": func(b *bench) {
		id := b.captured(1)[0]
		b.complete(b.outcome(id, capture.Failed, 500), event(id, capture.Failed, 1), event(id, capture.Processed, 1))
		b.clock.add(31 * day)
		b.expire(ledger.Retention{Retention: 30 * day}, 10)
		b.unknown(id)
		b.record(b.inline(id))
		b.Equal(capture.Facts{}, b.get(id).Facts)
		b.recount()
	},
	"early facts": func(b *bench) {
		old, young := newID(), newID()
		b.complete(event(old, capture.Processed, 1), b.outcome(old, capture.Processed, 200))
		b.clock.add(30 * day)
		b.complete(event(young, capture.Processed, 1))
		b.clock.add(time.Second)
		b.expire(ledger.Retention{Retention: 30 * day}, 10)
		b.EqualValues(1, b.stats().Early)
		b.record(b.inline(old), b.inline(young))
		b.Equal(capture.StateReceived, b.state(old))
		b.Equal(capture.StateProcessed, b.state(young))
	},
	"chunks without a head": func(b *bench) {
		orphan, waiting := newID(), newID()
		b.record(chunk(orphan, 0, []byte("x")), chunk(waiting, 0, []byte("x")), b.head(waiting, []byte("x"), []byte("y")))
		b.clock.add(31 * day)
		n, more := b.expire(ledger.Retention{Retention: 30 * day}, 10)
		b.Equal(1, n)
		b.False(more)
		b.record(b.head(orphan, []byte("x")))
		b.unknown(orphan)
		b.True(b.record(chunk(waiting, 1, []byte("y")))[0].New, "a head that is known keeps its chunks")
	},
	"bounded in one call": func(b *bench) {
		for _, id := range b.captured(10) {
			b.complete(b.outcome(id, capture.Processed, 200))
		}
		b.complete(event(newID(), capture.Processed, 1))
		b.clock.add(31 * day)
		r := ledger.Retention{KeepProcessed: day, Retention: 30 * day}
		calls := 0
		for {
			n, more := b.expire(r, 4)
			calls++
			if !more {
				break
			}
			b.Equal(4, n)
			b.Less(calls, 20)
		}
		b.Empty(b.listed(ledger.Filter{}))
		b.Zero(b.stats().Early)
		b.EqualValues(10, b.stats().Expired)
		b.recount()
	},
	"nothing to do": func(b *bench) {
		b.captured(1)
		n, more := b.expire(ledger.Retention{}, 10)
		b.Zero(n)
		b.False(more)
	},
}
