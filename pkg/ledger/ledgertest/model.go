package ledgertest

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// model is the life of one request on plain sets: a reading of the design of its
// own, which neither knows [capture.Facts.State] nor any store.
type model struct {
	captured    bool
	attempts    map[capture.Attempt]bool
	events      map[capture.Event]bool
	quarantines []capture.Quarantine
	discarded   bool
}

func newModel() *model {
	return &model{attempts: make(map[capture.Attempt]bool), events: make(map[capture.Event]bool)}
}

// results are the attempts, without beginnings whose end is known.
func (m *model) results() []capture.Attempt {
	var list []capture.Attempt
	for a := range m.attempts {
		ended := false
		for other := range m.attempts {
			ended = ended || other.Number == a.Number && other.Run == a.Run && !other.EndedAt.IsZero()
		}
		if !a.EndedAt.IsZero() || !ended {
			list = append(list, a)
		}
	}
	slices.SortFunc(list, func(a, b capture.Attempt) int {
		rank := func(x capture.Attempt) int {
			if x.EndedAt.IsZero() {
				return -1
			}
			return slices.Index([]capture.Verdict{"", "rejected", "failed", "processed"}, x.Verdict)
		}
		return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(rank(a), rank(b)), a.EndedAt.Compare(b.EndedAt),
			a.StartedAt.Compare(b.StartedAt), cmp.Compare(a.Status, b.Status), cmp.Compare(a.Error, b.Error), cmp.Compare(a.Run, b.Run))
	})
	return list
}

func (m *model) last() int {
	last := 1
	for a := range m.attempts {
		last = max(last, a.Number)
	}
	return last
}

func (m *model) state() capture.State {
	says := func(number int, v capture.Verdict) bool {
		for a := range m.attempts {
			if (number == 0 || a.Number == number) && a.Verdict == v {
				return true
			}
		}
		for e := range m.events {
			if (number == 0 || e.Attempt == number) && e.Outcome == v {
				return true
			}
		}
		return false
	}
	last := m.last()
	holds, released := false, false
	for _, q := range m.quarantines {
		holds = holds || q.ReleasedAt.IsZero()
		released = released || !q.ReleasedAt.IsZero() && q.ReleasedAfter >= last
	}
	switch {
	case m.discarded:
		return "discarded"
	case says(0, "processed"):
		return "processed"
	case holds:
		return "quarantined"
	case released, says(last, "failed"):
		return "failed"
	case says(last, "rejected"):
		return "rejected"
	}
	return "received"
}

// check compares what the ledger says with the model.
func (m *model) check(b *bench, id uuid.UUID) {
	if !m.captured {
		b.unknown(id)
		return
	}
	d := b.get(id)
	b.Equal(m.state(), d.State)
	results := m.results()
	b.Equal(results, d.Facts.Attempts)
	var status, n int
	var text string
	for i, a := range results {
		if i == 0 || results[i-1].Number != a.Number {
			n++
		}
		if !a.EndedAt.IsZero() {
			status, text = a.Status, a.Error
		}
	}
	b.Equal([]any{n, status, text}, []any{d.Attempts, d.Status, d.Error})
	events := make([]capture.Event, 0, len(m.events))
	for e := range m.events {
		events = append(events, e)
	}
	b.ElementsMatch(events, d.Facts.Events)
	b.Len(d.EventTimes, len(events))
	b.Equal(m.quarantines, d.Facts.Quarantines)
	b.Equal(m.discarded, d.Facts.Discarded)
}

// anyOrder: the ledger says what the model says after every batch, and the
// model knows no order.
func anyOrder(t *testing.T, open Open) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBench(t, open, Options{}).within(rt)
		defer func() { b.NoError(b.s.Close()) }()
		at := b.clock.Now()
		ids := newIDs(4)
		models, touched := make(map[uuid.UUID]*model), make(map[uuid.UUID]bool)
		for _, id := range ids {
			models[id] = newModel()
		}
		anID := rapid.SampledFrom(ids)
		attempts := rapid.Custom(func(rt *rapid.T) capture.Attempt {
			a := capture.Attempt{Number: rapid.IntRange(1, 3).Draw(rt, "number"), StartedAt: at}
			if a.Number > 1 || rapid.IntRange(0, 4).Draw(rt, "odd") == 0 {
				a.Run = rapid.SampledFrom([]string{"r1", "r2"}).Draw(rt, "run")
			}
			if rapid.IntRange(0, 4).Draw(rt, "begun") == 0 {
				return a
			}
			a.EndedAt = at.Add(time.Duration(rapid.IntRange(1, 2).Draw(rt, "took")) * time.Second)
			a.Verdict = rapid.SampledFrom([]capture.Verdict{"", "rejected", "failed", "failed", "processed"}).Draw(rt, "verdict")
			a.Status = rapid.SampledFrom([]int{0, 200, 404, 503}).Draw(rt, "status")
			if a.Status == 0 {
				a.Error = "reset"
			}
			return a
		})
		outcomes := rapid.SliceOfN(rapid.Custom(func(rt *rapid.T) ledger.Fact {
			if rapid.IntRange(0, 2).Draw(rt, "event") == 0 {
				return ledger.Fact{Event: &capture.Event{
					ID: anID.Draw(rt, "id"), Outcome: rapid.SampledFrom([]capture.Verdict{"failed", "failed", "processed"}).Draw(rt, "outcome"),
					Attempt: rapid.IntRange(1, 4).Draw(rt, "attempt"), Detail: rapid.SampledFrom([]string{"", "d"}).Draw(rt, "detail"),
				}}
			}
			return ledger.Fact{Outcome: &capture.Outcome{ID: anID.Draw(rt, "id"), Attempt: attempts.Draw(rt, "attempt")}}
		}), 1, 6)
		rt.Repeat(map[string]func(*rapid.T){
			"": func(*rapid.T) {
				for id := range touched {
					models[id].check(b, id)
				}
				clear(touched)
			},
			"record": func(rt *rapid.T) {
				var items []ledger.Item
				for _, id := range rapid.SliceOfN(anID, 1, 3).Draw(rt, "ids") {
					items = append(items, b.inline(id))
					models[id].captured, touched[id] = true, true
				}
				b.record(items...)
			},
			"complete": func(rt *rapid.T) {
				facts := outcomes.Draw(rt, "facts")
				b.complete(facts...)
				for _, f := range facts {
					touched[f.ID()] = true
					if f.Event != nil {
						models[f.ID()].events[*f.Event] = true
					} else {
						models[f.ID()].attempts[f.Outcome.Attempt] = true
					}
				}
			},
			"discard": func(rt *rapid.T) {
				id := anID.Draw(rt, "id")
				touched[id] = true
				n, err := b.s.Discard(b.ctx, ledger.Filter{IDs: []uuid.UUID{id}}, "because", 9)
				b.NoError(err)
				m := models[id]
				takes := m.captured && m.state() != "processed" && m.state() != "discarded"
				b.Equal(takes, n == 1)
				m.discarded = m.discarded || takes
			},
			"quarantine": func(rt *rapid.T) {
				id := anID.Draw(rt, "id")
				touched[id] = true
				err := b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, "")
				m := models[id]
				switch {
				case !m.captured:
					b.ErrorIs(err, ledger.ErrNotFound)
				case !m.state().Open():
					b.ErrorIs(err, ledger.ErrConflict)
				default:
					b.NoError(err)
					if m.state() != "quarantined" {
						m.quarantines = append(m.quarantines, capture.Quarantine{Number: len(m.quarantines) + 1, Reason: capture.QuarantineKiller, At: b.clock.Now()})
					}
				}
			},
			"release": func(rt *rapid.T) {
				id := anID.Draw(rt, "id")
				touched[id] = true
				err := b.s.ReleaseQuarantine(b.ctx, id)
				m := models[id]
				n := 0
				for i := range m.quarantines {
					if q := &m.quarantines[i]; m.captured && q.ReleasedAt.IsZero() {
						q.ReleasedAt, q.ReleasedAfter = b.clock.Now(), m.last()
						n++
					}
				}
				switch {
				case !m.captured:
					b.ErrorIs(err, ledger.ErrNotFound)
				case n == 0:
					b.ErrorIs(err, ledger.ErrConflict)
				default:
					b.NoError(err)
				}
			},
			"reopen": func(*rapid.T) {
				b.reopen()
				for _, id := range ids {
					touched[id] = true
				}
			},
			"wait": func(*rapid.T) { b.clock.add(time.Minute) },
		})
		var early int64
		for id, m := range models {
			m.check(b, id)
			if !m.captured {
				early += int64(len(m.events) + len(m.attempts))
			}
		}
		// A beginning that comes after its end is not kept, one before it is.
		b.LessOrEqual(b.stats().Early, early)
		b.recount()
	})
}
