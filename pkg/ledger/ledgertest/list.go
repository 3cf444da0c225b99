package ledgertest

import (
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

var listTests = map[string]func(*bench){
	"by every field of the filter": func(b *bench) {
		start := b.clock.Now()
		add := func(change ...func(*capture.Request)) uuid.UUID {
			b.clock.add(time.Second)
			return b.captured(1, change...)[0]
		}
		route := func(name string) func(*capture.Request) { return func(r *capture.Request) { r.Route = name } }
		a := add(target("POST", "/v1/a"))
		c := add(target("PUT", "/v1/a/b?x=/v2"), route("other"))
		d := add(target("POST", "/v2//c"), route("third"))
		b.complete(b.outcome(a, capture.Failed, 503), b.outcome(c, capture.Rejected, 401))
		at := func(n int) time.Time { return start.Add(time.Duration(n) * time.Second) }
		for what, f := range map[string]struct {
			filter ledger.Filter
			want   []uuid.UUID
		}{
			"everything":       {ledger.Filter{}, []uuid.UUID{a, c, d}},
			"one state":        {ledger.Filter{States: []capture.State{capture.StateRejected}}, []uuid.UUID{c}},
			"states":           {ledger.Filter{States: []capture.State{capture.StateReceived, capture.StateFailed, capture.StateFailed}}, []uuid.UUID{a, d}},
			"with processed":   {ledger.Filter{States: []capture.State{capture.StateProcessed, capture.StateRejected}}, []uuid.UUID{c}},
			"no such state":    {ledger.Filter{States: []capture.State{"odd"}}, nil},
			"replayable":       {ledger.Filter{Replayable: true}, []uuid.UUID{a}},
			"never replayable": {ledger.Filter{Replayable: true, States: []capture.State{capture.StateRejected}}, nil},
			"routes":           {ledger.Filter{Routes: []string{"calls", "third"}}, []uuid.UUID{a, d}},
			"unknown route":    {ledger.Filter{Routes: []string{"none"}}, nil},
			"methods":          {ledger.Filter{Methods: []string{"PUT", "DELETE"}}, []uuid.UUID{c}},
			"status":           {ledger.Filter{Statuses: "401"}, []uuid.UUID{c}},
			"status class":     {ledger.Filter{Statuses: "4xx,503"}, []uuid.UUID{a, c}},
			"since":            {ledger.Filter{Since: at(2)}, []uuid.UUID{c, d}},
			"until":            {ledger.Filter{Until: at(2)}, []uuid.UUID{a}},
			"since and until":  {ledger.Filter{Since: at(2), Until: at(3)}, []uuid.UUID{c}},
			"ids":              {ledger.Filter{IDs: []uuid.UUID{d, newID(), a, d}}, []uuid.UUID{a, d}},
			"ids and state":    {ledger.Filter{IDs: []uuid.UUID{d, a}, States: []capture.State{capture.StateFailed}}, []uuid.UUID{a}},
			"path":             {ledger.Filter{Path: "/v1/a"}, []uuid.UUID{a}},
			"path star":        {ledger.Filter{Path: "/v1/*"}, []uuid.UUID{a}},
			"path stars":       {ledger.Filter{Path: "/v1/**"}, []uuid.UUID{a, c}},
			"path question":    {ledger.Filter{Path: "/v?/?"}, []uuid.UUID{a}},
			"path slash":       {ledger.Filter{Path: "/v2/?c"}, nil},
			"path empty part":  {ledger.Filter{Path: "/v2/*/c"}, []uuid.UUID{d}},
			"all together":     {ledger.Filter{States: []capture.State{capture.StateFailed}, Replayable: true, Routes: []string{"calls"}, Methods: []string{"POST"}, Statuses: "5xx", Since: at(0), Until: at(9), Path: "**"}, []uuid.UUID{a}},
		} {
			for _, limit := range []int{1, 2, 100} {
				got := idsOf(b.list(f.filter, limit))
				b.True(slices.Equal(f.want, got), "%s, %d a page: %v", what, limit, got)
			}
		}
	},
	"the status of the last attempt that has one": func(b *bench) {
		id := b.captured(1)[0]
		second := b.outcome(id, capture.Failed, 0)
		second.Outcome.Attempt.Number, second.Outcome.Attempt.Run = 2, "r"
		b.complete(b.outcome(id, capture.Rejected, 401), second)
		d := b.get(id)
		b.Zero(d.Status)
		b.NotEmpty(d.Error)
		b.Equal(2, d.Attempts)
		b.Equal([]uuid.UUID{id}, b.listed(ledger.Filter{Statuses: "401"}))
		b.Empty(b.listed(ledger.Filter{Statuses: "5xx"}))
	},
	"paging while rows change": func(b *bench) {
		ids := b.failed(20)
		for round := range 3 {
			seen := make(map[uuid.UUID]int)
			f := ledger.Filter{Replayable: true}
			var cursor string
			for pages := 0; ; pages++ {
				page, err := b.s.List(b.ctx, f, cursor, 3)
				b.NoError(err)
				for _, r := range page.Requests {
					seen[r.ID]++
				}
				// Some go that were seen, some that were not; new ones come.
				b.complete(b.outcomeOf(ids[0], 2+round), b.outcomeOf(ids[len(ids)-1], 2+round))
				ids = ids[1 : len(ids)-1]
				b.failed(1)
				if cursor = page.Next; cursor == "" || len(ids) < 4 {
					break
				}
			}
			for _, id := range ids {
				if cursor == "" {
					b.Equal(1, seen[id])
				}
			}
			for _, n := range seen {
				b.Equal(1, n)
			}
			ids = b.listed(f)
		}
		b.recount()
	},
	"cursors that are none": func(b *bench) {
		for _, c := range []string{"x", "!!", "00000000-0000-0000-0000-000000000000", "c1"} {
			_, err := b.s.List(b.ctx, ledger.Filter{}, c, 10)
			b.ErrorIs(err, ledger.ErrInvalidCursor)
			_, _, err = b.s.Runs(b.ctx, c, 10)
			b.ErrorIs(err, ledger.ErrInvalidCursor)
		}
	},
	"unknown ids": func(b *bench) {
		id := newID()
		b.complete(b.outcome(id, capture.Processed, 200))
		b.unknown(id)
		_, err := b.s.Run(b.ctx, newID().String())
		b.ErrorIs(err, ledger.ErrNotFound)
		b.ErrorIs(b.s.CancelRun(b.ctx, newID().String()), ledger.ErrNotFound)
		b.ErrorIs(b.s.Quarantine(b.ctx, id, "killer", ""), ledger.ErrNotFound)
		b.ErrorIs(b.s.ReleaseQuarantine(b.ctx, id), ledger.ErrNotFound)
	},
	"the oldest replayable": func(b *bench) {
		b.True(b.stats().OldestReplayable.IsZero())
		p := capture.DefaultPolicy()
		first := b.clock.Now()
		waiting := b.captured(1)[0]
		b.True(b.stats().OldestReplayable.IsZero(), "it is in its grace")
		b.clock.add(time.Second)
		second := b.clock.Now()
		failed := b.failed(1)[0]
		b.Equal(second, b.stats().OldestReplayable)
		b.clock.add(p.Timeout + p.Grace)
		b.Equal(first, b.stats().OldestReplayable)
		b.complete(b.outcome(waiting, capture.Processed, 200))
		b.Equal(second, b.stats().OldestReplayable)
		b.complete(event(failed, capture.Processed, 1))
		b.True(b.stats().OldestReplayable.IsZero())
	},
	"closed, opened, still there": func(b *bench) {
		ids := b.failed(3)
		before := b.list(ledger.Filter{}, 10)
		b.reopen()
		b.Equal(before, b.list(ledger.Filter{}, 10))
		b.NoError(b.s.Close())
		b.NoError(b.s.Close())
		b.ErrorIs(b.s.Ping(b.ctx), ledger.ErrUnavailable)
		_, err := b.s.Record(b.ctx, []ledger.Item{b.inline(newID())})
		b.ErrorIs(err, ledger.ErrUnavailable)
		_, err = b.s.Get(b.ctx, ids[0])
		b.ErrorIs(err, ledger.ErrUnavailable)
		b.s = b.open(b.t, b.o)
	},
	"the clock and the room": func(b *bench) {
		now, err := b.s.Now(b.ctx)
		b.NoError(err)
		b.Equal(b.clock.Now(), now.UTC())
		b.NotZero(b.stats().FreeBytes)
	},
}

// outcomeOf is a replay's success as a fact of its own, with the given number.
func (b *bench) outcomeOf(id uuid.UUID, number int) ledger.Fact {
	f := b.outcome(id, capture.Processed, 200)
	f.Outcome.Attempt.Number, f.Outcome.Attempt.Run = number, "r"
	return f
}
