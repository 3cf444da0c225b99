package ledgertest

import (
	"bytes"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

func key(k string) func(*capture.Request) { return func(r *capture.Request) { r.OrderKey = k } }

func onRoute(name string) func(*capture.Request) { return func(r *capture.Request) { r.Route = name } }

// blocked expects that none of ids can be begun because of head.
func (b *bench) blocked(l ledger.RunLease, o ledger.BeginOptions, head uuid.UUID, ids ...uuid.UUID) {
	for _, g := range b.beginBy(l, o, ids...) {
		b.Equal(ledger.SkipBlocked, g.Skip)
		b.Equal(head, g.Head)
	}
}

func (b *bench) ends(l ledger.RunLease, g ledger.Begun, v capture.Verdict, status int) {
	b.Empty(g.Skip)
	b.NoError(b.end(l, b.result(l, g, v, status))[0])
}

var orderTests = map[string]func(*bench){
	"within a key one at a time, by ids": func(b *bench) {
		ids := b.failed(3, key("k"))
		_, l := b.openRun(ledger.Filter{}, "")
		g := b.begin(l, ids[0], ids[1], ids[2])
		b.Empty(g[0].Skip)
		for _, other := range g[1:] {
			b.Equal(ledger.SkipBlocked, other.Skip)
			b.Equal(ids[0], other.Head)
		}
		b.ends(l, g[0], capture.Failed, 500)
		b.blocked(l, ledger.BeginOptions{}, ids[0], ids[1], ids[2])
		b.ends(l, b.begun(l, ids[0]), capture.Processed, 200)
		b.blocked(l, ledger.BeginOptions{}, ids[1], ids[2])
		b.ends(l, b.begun(l, ids[1]), capture.Rejected, 422)
		b.ends(l, b.begun(l, ids[2]), capture.Processed, 200)
		b.EqualValues(0, b.run(l.RunID).Counts.Skipped, "to be blocked is no skip")
	},
	"what is open keeps its key closed": func(b *bench) {
		for name, open := range map[string]func(id uuid.UUID){
			"in its grace": func(uuid.UUID) {},
			"failed":       func(id uuid.UUID) { b.complete(b.outcome(id, capture.Failed, 500)) },
			"quarantined":  func(id uuid.UUID) { b.NoError(b.s.Quarantine(b.ctx, id, capture.QuarantineKiller, "x")) },
		} {
			for closing, closes := range map[string]func(id uuid.UUID){
				"processed": func(id uuid.UUID) { b.complete(event(id, capture.Processed, 1)) },
				"discarded": func(id uuid.UUID) {
					n, err := b.s.Discard(b.ctx, ledger.Filter{IDs: []uuid.UUID{id}}, "because", 1)
					b.NoError(err)
					b.Equal(1, n)
				},
			} {
				k := key(name + closing)
				head := b.captured(1, k)[0]
				open(head)
				second := b.failed(1, k)[0]
				// The run is not about the head; it is in the way all the same.
				_, l := b.openRun(ledger.Filter{IDs: []uuid.UUID{second}}, "")
				b.blocked(l, ledger.BeginOptions{}, head, second)
				closes(head)
				b.begun(l, second)
			}
		}
	},
	"what is rejected does not keep its key closed": func(b *bench) {
		head := b.captured(1, key("k"))[0]
		b.complete(b.outcome(head, capture.Rejected, 422))
		second := b.failed(1, key("k"))[0]
		_, l := b.openRun(ledger.Filter{}, "")
		b.begun(l, second)
	},
	"an attempt without verdict keeps its key closed": func(b *bench) {
		ids := b.failed(2, key("k"), policy(eventPolicy()))
		_, l := b.openRun(ledger.Filter{}, "")
		b.ends(l, b.begun(l, ids[0]), capture.NoVerdict, 200)
		b.blocked(l, ledger.BeginOptions{}, ids[0], ids[1])
		b.complete(event(ids[0], capture.Processed, 2))
		b.begun(l, ids[1])
	},
	"an attempt whose sender died keeps its key closed": func(b *bench) {
		ids := b.failed(2, key("k"))
		_, l := b.openRun(ledger.Filter{}, "")
		b.begun(l, ids[0])
		b.clock.add(time.Hour)
		b.blocked(l, ledger.BeginOptions{}, ids[0], ids[1])
		b.ends(l, b.begun(l, ids[0]), capture.Processed, 200)
		b.begun(l, ids[1])
	},
	"past blocked ones, still one at a time": func(b *bench) {
		ids := b.failed(3, key("k"))
		past := ledger.BeginOptions{PastBlocked: true}
		_, l := b.openRun(ledger.Filter{}, "")
		g := b.beginBy(l, past, ids[1])[0]
		b.blocked(l, past, ids[1], ids[0], ids[2])
		_, other := b.openRun(ledger.Filter{Replayable: true}, "")
		b.blocked(other, past, ids[1], ids[0], ids[2])
		b.ends(l, g, capture.Failed, 500)
		b.Empty(b.beginBy(other, past, ids[2])[0].Skip)
		b.clock.add(time.Hour) // a lease that is over is in nobody's way
		b.Empty(b.beginBy(l, past, ids[0])[0].Skip)
	},
	"keys, routes and requests without key are independent": func(b *bench) {
		_ = b.failed(1, key("k"))
		others := []uuid.UUID{
			b.failed(1, key("K"))[0], b.failed(1, key("k\x00"))[0], b.failed(1, key("k"), onRoute("others"))[0],
			b.failed(1)[0], b.failed(1)[0],
		}
		_, l := b.openRun(ledger.Filter{}, "")
		for i, g := range b.begin(l, others...) {
			b.Empty(g.Skip, "%d", i)
		}
	},
	"a key that came by several ingresses and policies is one": func(b *bench) {
		first := b.failed(1, key("k"), func(r *capture.Request) { r.Ingress = "edge-9" })[0]
		second := b.failed(1, key("k"), policy(eventPolicy()))[0]
		third := b.failed(1, key("k"))[0]
		_, l := b.openRun(ledger.Filter{}, "")
		b.blocked(l, ledger.BeginOptions{}, first, second, third)
		b.complete(event(first, capture.Processed, 1))
		b.blocked(l, ledger.BeginOptions{}, second, third)
	},
	"an earlier one that comes late goes first": func(b *bench) {
		ids := newIDs(2)
		b.record(b.inline(ids[1], key("k")))
		b.complete(b.outcome(ids[1], capture.Failed, 500))
		_, l := b.openRun(ledger.Filter{}, "")
		b.record(b.inline(ids[0], key("k")))
		b.blocked(l, ledger.BeginOptions{}, ids[0], ids[1])
	},
	"another target is in nobody's way": func(b *bench) {
		ids := b.failed(3, key("k"))
		_, shadow := b.openRun(ledger.Filter{}, "https://shadow.example")
		// Attempts there close nothing: the order is the caller's business.
		g := b.begin(shadow, ids[1])[0]
		b.Empty(g.Skip)
		b.blocked(shadow, ledger.BeginOptions{}, ids[1], ids[0], ids[2])
		_, l := b.openRun(ledger.Filter{}, "")
		b.begun(l, ids[0])
		b.ends(shadow, g, capture.Processed, 200)
		b.Empty(b.begin(shadow, ids[2])[0].Skip)
	},
	"no order": func(b *bench) {
		ids := b.failed(3, key("k"))
		_, l := b.openRun(ledger.Filter{}, "")
		for _, g := range b.beginBy(l, ledger.BeginOptions{Order: ledger.OrderNone}, ids[1], ids[2]) {
			b.Empty(g.Skip)
		}
		// Those who keep one see what is in flight.
		b.blocked(l, ledger.BeginOptions{PastBlocked: true}, ids[1], ids[0])
	},
	"keys that are given": func(b *bench) {
		ids := b.failed(6, key("k"))
		_, l := b.openRun(ledger.Filter{}, "")
		_, other := b.openRun(ledger.Filter{Replayable: true}, "")
		given := func(keys ...string) ledger.BeginOptions {
			return ledger.BeginOptions{Order: ledger.OrderGiven, Keys: keys}
		}
		g := b.beginBy(l, given("a", "b", "", ""), ids[1], ids[2], ids[3], ids[4])
		for _, one := range g {
			b.Empty(one.Skip)
		}
		b.blocked(other, given("a", "a"), ids[1], ids[0], ids[5])
		b.blocked(l, given("b"), ids[2], ids[0])
		b.ends(l, g[0], capture.Failed, 500)
		b.Empty(b.beginBy(other, given("a"), ids[5])[0].Skip, "what goes first is the caller's business")
		b.blocked(l, given("a"), ids[5], ids[1])
	},
}

// orderOverRuns: whatever two runs begin and end, and whenever they die, a key
// has at most one request under lease, and none is begun while an earlier one of
// its key is open.
func orderOverRuns(t *testing.T, open Open) {
	rapid.Check(t, func(rt *rapid.T) {
		b := newBench(t, open, Options{}).within(rt)
		defer func() { b.NoError(b.s.Close()) }()
		keyOf := make(map[uuid.UUID]string)
		var ids []uuid.UUID
		for range rapid.IntRange(2, 8).Draw(rt, "requests") {
			k := rapid.SampledFrom([]string{"", "a", "b"}).Draw(rt, "key")
			id := b.failed(1, key(k))[0]
			keyOf[id] = k
			ids = append(ids, id)
		}
		_, one := b.openRun(ledger.Filter{}, "")
		_, two := b.openRun(ledger.Filter{Replayable: true}, "")
		leases := []ledger.RunLease{one, two}
		type flight struct {
			lease ledger.RunLease
			begun ledger.Begun
		}
		flying := make(map[uuid.UUID]flight)
		anID, aRun := rapid.SampledFrom(ids), rapid.SampledFrom(leases)
		rt.Repeat(map[string]func(*rapid.T){
			"begin": func(rt *rapid.T) {
				l := aRun.Draw(rt, "run")
				past := rapid.IntRange(0, 3).Draw(rt, "past") == 0
				before := make(map[uuid.UUID]capture.State)
				for _, id := range ids {
					before[id] = b.state(id)
				}
				list, err := b.s.Begin(b.ctx, l, rapid.SliceOfNDistinct(anID, 1, 3, rapid.ID).Draw(rt, "ids"),
					ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 99, PastBlocked: past})
				b.NoError(err)
				for _, g := range list {
					if g.Skip != "" {
						if g.Skip == ledger.SkipBlocked {
							b.Equal(keyOf[g.ID], keyOf[g.Head])
							b.NotEmpty(keyOf[g.ID])
						}
						continue
					}
					for other := range flying {
						b.NotEqual(g.ID, other)
						b.False(keyOf[g.ID] != "" && keyOf[other] == keyOf[g.ID], "two of a key in flight")
					}
					for _, other := range ids {
						earlier := bytes.Compare(other[:], g.ID[:]) < 0
						b.False(!past && keyOf[g.ID] != "" && earlier && keyOf[other] == keyOf[g.ID] && before[other].Open(), "past an open one")
					}
					flying[g.ID] = flight{lease: l, begun: g}
				}
			},
			"end": func(rt *rapid.T) {
				id := anID.Draw(rt, "id")
				f, ok := flying[id]
				if !ok {
					return
				}
				v := rapid.SampledFrom([]capture.Verdict{capture.Processed, capture.Failed, capture.Rejected}).Draw(rt, "verdict")
				b.ends(f.lease, f.begun, v, 200)
				delete(flying, id)
			},
			"all senders die": func(*rapid.T) {
				b.clock.add(time.Hour)
				clear(flying)
			},
			"discard": func(rt *rapid.T) {
				_, err := b.s.Discard(b.ctx, ledger.Filter{IDs: []uuid.UUID{anID.Draw(rt, "id")}}, "x", 1)
				b.NoError(err)
			},
		})
	})
}
