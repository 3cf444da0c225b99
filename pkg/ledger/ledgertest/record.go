package ledgertest

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

var recordTests = map[string]func(*bench){
	"a capture comes back as it went in": func(b *bench) {
		id := newID()
		item := b.inline(id, func(r *capture.Request) {
			r.Route, r.Ingress, r.OrderKey = "eu_calls", "Edge-2", "client \xff\x00 7"
			r.ReceivedAt = b.clock.Now().Add(-time.Second)
			r.Policy = eventPolicy()
			r.Head = []byte("PUT /a%2F/b//c?x=&y HTTP/1.1\r\nX: \x80\xff\r\n\r\n")
			r.Body, r.Size = []byte("\x00\x01\r\n\xff"), 5
		})
		res := b.record(from(7, item))
		b.Equal(ledger.Result{New: true, Released: []capture.SpoolRef{ref(7)}}, res[0])
		d := b.get(id)
		want := item.Captured.Request
		b.Equal(ledger.Request{
			ID: id, Seq: d.Seq, State: capture.StateReceived, Route: "eu_calls", Ingress: "Edge-2", Method: "PUT", Target: "/a%2F/b//c?x=&y",
			OrderKey: want.OrderKey, Policy: want.Policy, Size: 5, ReceivedAt: want.ReceivedAt, RecordedAt: b.clock.Now(),
			GraceEnd: b.clock.Now().Add(29 * time.Second).Add(time.Minute),
		}, d.Request)
		b.Positive(d.Seq)
		b.Equal(capture.Facts{}, d.Facts)
		head, got := b.payload(id)
		b.Equal(want.Head, head)
		b.Equal(want.Body, got)
	},
	"NUL and obs-text in target and head": func(b *bench) {
		odd := "/\x00\x01\x7f\x80\xc3\x28\xff'\"%"
		id := newID()
		item := b.inline(id, target("POST", odd))
		b.record(item)
		b.Equal(odd, b.get(id).Target)
		b.Equal(odd, b.list(ledger.Filter{Path: "/?*"}, 10)[0].Target)
		head, _ := b.payload(id)
		b.Equal(item.Captured.Request.Head, head)
	},
	"an empty body": func(b *bench) {
		id := newID()
		b.record(b.inline(id, func(r *capture.Request) { r.Body, r.Size = nil, 0 }))
		_, got := b.payload(id)
		b.Empty(got)
		b.False(b.get(id).PayloadExpired)
	},
	"the largest inline body": func(b *bench) {
		id := newID()
		data := body(256 << 10)
		b.record(b.inline(id, func(r *capture.Request) { r.Body, r.Size = data, int64(len(data)) }))
		_, got := b.payload(id)
		b.True(bytes.Equal(data, got))
	},
	"duplicates in a batch": func(b *bench) {
		id, other := newID(), newID()
		res := b.record(from(1, b.inline(id)), from(2, b.inline(id)), from(3, b.inline(other)), from(1, b.inline(id)))
		for i, want := range []bool{true, false, true, false} {
			b.Equal(want, res[i].New, "item %d", i)
			b.Len(res[i].Released, 1)
		}
		b.Equal([]uuid.UUID{id, other}, b.listed(ledger.Filter{}))
		b.recount()
	},
	"duplicates over batches": func(b *bench) {
		ids := b.captured(3)
		b.complete(b.outcome(ids[0], capture.Processed, 200))
		before := b.get(ids[0])
		b.clock.add(time.Hour)
		res := b.record(from(4, b.inline(ids[2])), from(5, b.inline(ids[0])), from(6, b.inline(newID())))
		b.Equal([]bool{false, false, true}, []bool{res[0].New, res[1].New, res[2].New})
		b.Equal([]capture.SpoolRef{ref(5)}, res[1].Released)
		b.Equal(before, b.get(ids[0]))
		b.recount()
	},
	"ids that are older than what is known": func(b *bench) {
		old := newIDs(2)
		b.captured(2)
		res := b.record(b.inline(old[1]), b.inline(old[0]), b.inline(old[1]))
		b.Equal([]bool{true, true, false}, []bool{res[0].New, res[1].New, res[2].New})
		all := b.list(ledger.Filter{}, 10)
		b.Equal(old, idsOf(all)[:2])
		b.Greater(all[0].Seq, all[3].Seq, "the insertion sequence follows insertion, the list the ids")
	},
	"a batch with one bad row in every position": func(b *bench) {
		bad := map[string]func(ledger.Item) ledger.Item{
			"id":     func(i ledger.Item) ledger.Item { i.Captured.Request.ID = uuid.New(); return i },
			"size":   func(i ledger.Item) ledger.Item { i.Captured.Request.Size++; return i },
			"head":   func(i ledger.Item) ledger.Item { i.Captured.Request.Head = nil; return i },
			"method": func(i ledger.Item) ledger.Item { target(strings.Repeat("M", 65), "/")(i.Captured.Request); return i },
			"policy": func(i ledger.Item) ledger.Item { i.Captured.Request.Policy = capture.Policy{}; return i },
			"time":   func(i ledger.Item) ledger.Item { i.Captured.Request.ReceivedAt = time.Time{}; return i },
			"far": func(i ledger.Item) ledger.Item {
				i.Captured.Request.ReceivedAt = time.Date(300000, 1, 1, 0, 0, 0, 0, time.UTC)
				return i
			},
			"nothing": func(ledger.Item) ledger.Item { return ledger.Item{} },
			"chunk":   func(i ledger.Item) ledger.Item { return chunk(i.Captured.Request.ID, -1, []byte("x")) },
			"hash": func(i ledger.Item) ledger.Item {
				i = b.head(i.Captured.Request.ID, []byte("x"))
				i.Captured.Request.SHA256 = "0"
				return i
			},
		}
		n := 0
		for what, spoil := range bad {
			for at := range 4 {
				items := make([]ledger.Item, 4)
				for i := range items {
					items[i] = from(uint64(i), b.inline(newID()))
				}
				items[at] = spoil(items[at])
				res, err := b.s.Record(b.ctx, items)
				b.NoError(err)
				for i := range items {
					if i == at {
						b.Error(res[i].Err, "%s at %d", what, at)
						b.False(res[i].New)
						b.Empty(res[i].Released)
						if id := items[i].Captured.ID(); id != uuid.Nil {
							b.unknown(id)
						}
						continue
					}
					b.NoError(res[i].Err, "%s at %d, item %d", what, at, i)
					b.True(res[i].New)
					b.Len(res[i].Released, 1)
					b.Equal(capture.StateReceived, b.state(items[i].Captured.ID()))
					n++
				}
			}
		}
		b.EqualValues(n, b.stats().Requests[capture.StateReceived])
		b.Empty(b.asides())
		b.recount()
	},
	"a batch of bad rows only": func(b *bench) {
		items := make([]ledger.Item, 50)
		for i := range items {
			items[i] = b.inline(uuid.New())
		}
		res, err := b.s.Record(b.ctx, items)
		b.NoError(err)
		for _, r := range res {
			b.Error(r.Err)
		}
		b.Empty(b.listed(ledger.Filter{}))
	},
	"empty batches": func(b *bench) {
		_, err := b.s.Record(b.ctx, nil)
		b.NoError(err)
		_, err = b.s.Complete(b.ctx, nil)
		b.NoError(err)
		b.NoError(b.s.SetAside(b.ctx, nil))
		b.NoError(b.s.SaveHeartbeats(b.ctx, nil))
	},
	"cancelled contexts write nothing": func(b *bench) {
		known := b.failed(1)[0]
		_, l, _, err := b.s.OpenRun(b.ctx, ledger.Filter{}, "", "me", time.Minute)
		b.NoError(err)
		id := newID()
		ctx := cancelled()
		_, err = b.s.Record(ctx, []ledger.Item{b.inline(id)})
		b.Error(err)
		_, err = b.s.Complete(ctx, []ledger.Fact{b.outcome(id, capture.Failed, 500), event(known, capture.Processed, 1)})
		b.Error(err)
		b.Error(b.s.SetAside(ctx, []ledger.Aside{{Kind: "capture", Reason: "x"}}))
		_, err = b.s.Begin(ctx, l, []uuid.UUID{known}, ledger.BeginOptions{Lease: time.Minute, MaxAttempts: 1})
		b.Error(err)
		_, err = b.s.Discard(ctx, ledger.Filter{}, "x", 10)
		b.Error(err)
		_, err = b.s.List(ctx, ledger.Filter{}, "", 10)
		b.Error(err)
		b.unknown(id)
		b.Equal(capture.StateFailed, b.state(known))
		b.Zero(b.stats().Early)
		b.Empty(b.asides())
		b.NoError(b.s.Ping(b.ctx))
		b.recount()
	},
	"late captures are quarantined": func(b *bench) {
		b.with(func(o *Options) { o.Retention = 30 * 24 * time.Hour })
		ago := func(d time.Duration) uuid.UUID {
			id := newID()
			b.record(b.inline(id, func(r *capture.Request) { r.ReceivedAt = b.clock.Now().Add(-d) }))
			return id
		}
		late, soon := ago(29*24*time.Hour+time.Second), ago(29*24*time.Hour-time.Second)
		b.Equal(capture.StateReceived, b.state(soon))
		d := b.get(late)
		b.Equal(capture.StateQuarantined, d.State)
		b.Len(d.Facts.Quarantines, 1)
		b.Equal(capture.QuarantineLate, d.Facts.Quarantines[0].Reason)
		// What is known to have been processed is processed, however late.
		id := newID()
		b.complete(event(id, capture.Processed, 1))
		b.record(b.inline(id, func(r *capture.Request) { r.ReceivedAt = b.clock.Now().Add(-40 * 24 * time.Hour) }))
		b.Equal(capture.StateProcessed, b.state(id))
		b.recount()
	},
	"set aside once, with the reason": func(b *bench) {
		id := newID()
		a := ledger.Aside{
			Kind: "capture", Reason: "head has no end", Subject: "holdfast.requests.calls.POST", RequestID: id,
			Header: []byte("A: b"), Data: []byte("\x00junk"), At: b.clock.Now(), Fingerprint: [32]byte{1},
		}
		big := ledger.Aside{Kind: "completion", Reason: "too big", Data: body(100 << 10), At: b.clock.Now(), Fingerprint: [32]byte{2}}
		b.NoError(b.s.SetAside(b.ctx, []ledger.Aside{a, big, a}))
		b.NoError(b.s.SetAside(b.ctx, []ledger.Aside{a}))
		list := b.asides()
		b.Len(list, 2)
		b.Positive(list[0].Seq)
		a.Seq = list[0].Seq
		b.Equal(a, list[0])
		b.Equal(uuid.Nil, list[1].RequestID)
		b.Len(list[1].Data, 64<<10)
		b.Equal(map[string]int64{"capture": 1, "completion": 1}, b.stats().Aside)
		_, _, err := b.s.AsideList(b.ctx, "no cursor", 1)
		b.ErrorIs(err, ledger.ErrInvalidCursor)
		b.recount()
	},
	"an ingress is known by its first capture": func(b *bench) {
		// It may die before a heartbeat of it is saved, with outcomes in its spool.
		item := b.inline(newID())
		item.Ref = ref(1)
		b.record(item, b.inline(newID()))
		want := []ledger.Ingress{{ID: "edge-1", Start: "5eed", SeenAt: time.Unix(0, 0).UTC()}}
		list, err := b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal(want, list)
		// Any heartbeat says more.
		own := b.clock.Now()
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{{Ingress: "edge-1", Start: "5eed", Now: own}}))
		next := b.inline(newID())
		next.Ref = ref(2)
		b.record(next)
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal([]ledger.Ingress{{ID: "edge-1", Start: "5eed", SeenAt: own}}, list)
		// A repeat does not bring back one that has stopped.
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{{Ingress: "edge-1", Start: "5eed", Now: own.Add(time.Second), Stopped: true}}))
		b.record(item, next)
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Empty(list)
		// A body in chunks makes its ingress known when it is whole.
		large := newID()
		items := []ledger.Item{chunk(large, 0, []byte("abc")), chunk(large, 1, []byte("def")), b.head(large, []byte("abc"), []byte("def"))}
		for i := range items {
			items[i].Ref = ref(uint64(10 + i))
		}
		b.record(items...)
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal(want, list)
	},
	"what starts have captured and what came of it": func(b *bench) {
		beat := func(ingress, start string, captured int64, stopped bool) {
			b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{{
				Ingress: ingress, Start: start, Now: b.clock.Now(), Captured: captured, Stopped: stopped,
			}}))
		}
		starts := func(want ...ledger.Start) {
			b.t.Helper()
			b.reopen()
			got, err := b.s.Starts(b.ctx)
			b.NoError(err)
			b.ElementsMatch(want, got)
		}
		starts()
		again := from(1, b.inline(newID()))
		b.record(again)
		b.record(again, from(2, b.inline(newID())))
		b.record(b.inline(newID())) // of no spool record
		beat("edge-1", "5eed", 0, false)
		starts(ledger.Start{Ingress: "edge-1", ID: "5eed", Recorded: 2})
		beat("edge-1", "5eed", 3, false)
		beat("edge-1", "5eed", 1, false) // late
		beat("edge-10", "5eed", 7, false)
		starts(ledger.Start{Ingress: "edge-1", ID: "5eed", Captured: 3, Recorded: 2}, ledger.Start{Ingress: "edge-10", ID: "5eed", Captured: 7})
		// Another start does not make a loss forgotten.
		beat("edge-1", "a", 1, false)
		starts(ledger.Start{Ingress: "edge-1", ID: "5eed", Captured: 3, Recorded: 2}, ledger.Start{Ingress: "edge-1", ID: "a", Captured: 1},
			ledger.Start{Ingress: "edge-10", ID: "5eed", Captured: 7})
		// It does once everything is recorded. A goodbye that comes late brings
		// nothing back.
		part := chunk(newID(), 0, []byte("part"))
		b.record(from(3, part)) // is no request yet
		b.record(from(4, b.inline(newID())))
		beat("edge-1", "b", 5, false)
		beat("edge-1", "5eed", 3, true)
		starts(ledger.Start{Ingress: "edge-1", ID: "a", Captured: 1}, ledger.Start{Ingress: "edge-1", ID: "b", Captured: 5},
			ledger.Start{Ingress: "edge-10", ID: "5eed", Captured: 7})
	},
	"heartbeats by the ledger's clock": func(b *bench) {
		own := b.clock.Now().Add(-5 * time.Hour) // the ingress's clock is wrong
		beat := func(start string, at time.Duration, stopped bool) capture.Heartbeat {
			h := capture.Heartbeat{Ingress: "edge-1", Start: start, Now: own.Add(at), Stopped: stopped}
			if !stopped {
				h.Unreleased, h.OldestUnreleased = 3, own.Add(at-time.Minute)
			}
			return h
		}
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{beat("a", 0, false), {Ingress: "edge-2", Start: "x", Now: own}}))
		list, err := b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal([]ledger.Ingress{
			{ID: "edge-1", Start: "a", SeenAt: b.clock.Now(), Unreleased: 3, OldestUnreleased: b.clock.Now().Add(-time.Minute)},
			{ID: "edge-2", Start: "x", SeenAt: b.clock.Now()},
		}, list)
		// One that was long on its way was sent before the call, not by it.
		old := beat("a", 100*time.Millisecond, false)
		old.Age = 5 * time.Second
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{old}))
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal(b.clock.Now().Add(-5*time.Second), list[0].SeenAt)
		b.Equal(b.clock.Now().Add(-5*time.Second-time.Minute), list[0].OldestUnreleased)
		// A beat that overtook another one counts, the overtaken one does not.
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{{Ingress: "edge-1", Start: "a", Now: own.Add(2 * time.Second)}, beat("a", time.Second, false)}))
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Zero(list[0].Unreleased)
		// The next process has begun: the last word of the one before is not its.
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{beat("b", -time.Hour, false), beat("a", 3*time.Second, true)}))
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Equal("b", list[0].Start)
		b.NoError(b.s.SaveHeartbeats(b.ctx, []capture.Heartbeat{beat("b", 0, true)}))
		list, err = b.s.Ingresses(b.ctx)
		b.NoError(err)
		b.Len(list, 1)
	},
}

var chunkTests = map[string]func(*bench){
	"a waiting head is set aside until its chunks come": func(b *bench) {
		id := newID()
		parts := cut(body(10), 4)
		b.Empty(b.record(from(9, b.head(id, parts...)))[0].Released)
		b.unknown(id)
		list := b.asides()
		b.Len(list, 1)
		b.Equal("incomplete", list[0].Kind)
		b.Equal(id, list[0].RequestID)
		b.complete(b.outcome(id, capture.Failed, 500))
		b.Empty(b.record(from(1, chunk(id, 1, parts[1])))[0].Released)
		b.Empty(b.record(from(2, chunk(id, 2, parts[2])))[0].Released)
		b.Empty(b.listed(ledger.Filter{}))
		b.reopen()
		b.clock.add(time.Hour)
		res := b.record(from(0, chunk(id, 0, parts[0])))
		b.True(res[0].New)
		b.ElementsMatch([]capture.SpoolRef{ref(9), ref(1), ref(2), ref(0)}, res[0].Released)
		b.Empty(b.asides())
		d := b.get(id)
		b.Equal(capture.StateFailed, d.State)
		b.Equal(b.clock.Now(), d.RecordedAt)
		b.EqualValues(10, d.Size)
		head, got := b.payload(id)
		b.Equal(body(10), got)
		b.Contains(string(head), "POST /v1/calls")
		b.recount()
	},
	"what comes again of a complete request is released at once": func(b *bench) {
		id := newID()
		parts := cut(body(8), 4)
		b.record(chunk(id, 0, parts[0]), chunk(id, 1, parts[1]), b.head(id, parts...))
		res := b.record(from(1, chunk(id, 0, parts[0])), from(2, b.head(id, parts...)), from(3, abandon(id)))
		for i, r := range res {
			b.Equal([]capture.SpoolRef{ref(uint64(i + 1))}, r.Released)
			b.False(r.New)
		}
		_, got := b.payload(id)
		b.Equal(body(8), got)
	},
	"what is repeated while it waits is released with the rest": func(b *bench) {
		id := newID()
		parts := cut(body(8), 4)
		b.record(from(1, chunk(id, 0, parts[0])), from(1, chunk(id, 0, parts[0])), from(11, chunk(id, 0, parts[0])), from(2, b.head(id, parts...)), from(2, b.head(id, parts...)))
		b.Len(b.asides(), 1)
		res := b.record(from(3, chunk(id, 1, parts[1])))
		b.ElementsMatch([]capture.SpoolRef{ref(1), ref(11), ref(2), ref(3)}, res[0].Released)
	},
	"records without a place in a spool": func(b *bench) {
		id := newID()
		res := b.record(chunk(id, 0, []byte("x")), b.head(id, []byte("x")))
		b.True(res[1].New)
		b.Empty(res[1].Released)
	},
	"a wrong hash": func(b *bench) {
		id := newID()
		b.record(from(1, b.head(id, []byte("right"))))
		res, err := b.s.Record(b.ctx, []ledger.Item{from(2, chunk(id, 0, []byte("wrong"))), b.inline(newID())})
		b.NoError(err)
		b.Error(res[0].Err)
		b.False(res[0].New)
		b.ElementsMatch([]capture.SpoolRef{ref(1), ref(2)}, res[0].Released)
		b.True(res[1].New)
		b.unknown(id)
		list := b.asides()
		b.Len(list, 1)
		b.Equal("incomplete", list[0].Kind)
		b.Contains(list[0].Reason, "sha256")
		// Nothing of it waits any more.
		for i, r := range b.record(from(1, b.head(id, []byte("right"))), from(2, chunk(id, 0, []byte("wrong"))), from(3, chunk(id, 0, []byte("right")))) {
			b.Equal([]capture.SpoolRef{ref(uint64(i + 1))}, r.Released)
		}
		b.unknown(id)
		b.Len(b.asides(), 1)
		b.recount()
	},
	"a wrong hash found by the head": func(b *bench) {
		id := newID()
		b.record(from(2, chunk(id, 0, []byte("wrong"))))
		res, err := b.s.Record(b.ctx, []ledger.Item{from(1, b.head(id, []byte("right")))})
		b.NoError(err)
		b.Error(res[0].Err)
		b.ElementsMatch([]capture.SpoolRef{ref(1), ref(2)}, res[0].Released)
		b.Len(b.asides(), 1)
	},
	"abandoned before, between and after its chunks": func(b *bench) {
		before, after := newID(), newID()
		b.Equal([]capture.SpoolRef{ref(1)}, b.record(from(1, abandon(before)))[0].Released)
		b.Equal([]capture.SpoolRef{ref(2)}, b.record(from(2, chunk(before, 0, []byte("x"))))[0].Released)
		b.record(from(3, chunk(after, 0, []byte("x"))), from(4, chunk(after, 1, []byte("y"))))
		res := b.record(from(5, abandon(after)), from(6, chunk(after, 2, []byte("z"))), from(5, abandon(after)))
		b.ElementsMatch([]capture.SpoolRef{ref(3), ref(4), ref(5)}, res[0].Released)
		b.Equal([]capture.SpoolRef{ref(6)}, res[1].Released)
		b.Equal([]capture.SpoolRef{ref(5)}, res[2].Released)
		b.Empty(b.asides())
		b.Empty(b.listed(ledger.Filter{}))
	},
	"an abandon record does nothing to a known head": func(b *bench) {
		id, whole := newID(), b.captured(1)[0]
		parts := cut(body(8), 4)
		b.record(from(1, b.head(id, parts...)), from(2, chunk(id, 0, parts[0])))
		res := b.record(from(3, abandon(id)), from(4, abandon(whole)))
		b.Equal([]capture.SpoolRef{ref(3)}, res[0].Released)
		b.Equal([]capture.SpoolRef{ref(4)}, res[1].Released)
		res = b.record(from(5, chunk(id, 1, parts[1])))
		b.True(res[0].New)
		b.ElementsMatch([]capture.SpoolRef{ref(1), ref(2), ref(5)}, res[0].Released)
		b.payload(whole)
	},
	"a head after all undoes the abandon record": func(b *bench) {
		id := newID()
		b.record(abandon(id), chunk(id, 0, []byte("lost")), b.head(id, []byte("lost")))
		b.Len(b.asides(), 1)
		b.True(b.record(chunk(id, 0, []byte("lost")))[0].New)
	},
	"the largest body, in chunks": func(b *bench) {
		id := newID()
		data := body(32 << 20)
		parts := cut(data, 256<<10)
		items := []ledger.Item{b.head(id, parts...)}
		for n, p := range parts {
			items = append(items, chunk(id, n, p))
		}
		for len(items) > 0 {
			n := min(16, len(items))
			b.record(items[:n]...)
			items = items[n:]
		}
		_, got := b.payload(id)
		b.True(bytes.Equal(data, got), "body differs")
	},
	"a payload that is closed early": func(b *bench) {
		id := newID()
		b.record(chunk(id, 0, []byte("abc")), b.head(id, []byte("abc")))
		_, r, err := b.s.Payload(b.ctx, id)
		b.NoError(err)
		var one [1]byte
		_, err = r.Read(one[:])
		b.NoError(err)
		b.NoError(r.Close())
		_, err = r.Read(one[:])
		b.Error(err)
	},
}

// chunksInAnyOrder: whatever the order, repetition and cuts, the request is
// known exactly when head and chunks are all there, and every ref is released
// then or later, and none before.
func chunksInAnyOrder(t *testing.T, open Open) {
	shared := newBench(t, open, Options{})
	rapid.Check(t, func(rt *rapid.T) {
		b := shared.within(rt)
		id := newID()
		parts := cut(body(rapid.IntRange(1, 40).Draw(rt, "size")), rapid.IntRange(1, 16).Draw(rt, "chunk"))
		var items []ledger.Item
		for n, p := range parts {
			items = append(items, from(uint64(n), chunk(id, n, p)))
		}
		items = append(items, from(1000, b.head(id, parts...)))
		for range rapid.IntRange(0, 4).Draw(rt, "repeats") {
			items = append(items, rapid.SampledFrom(items).Draw(rt, "again"))
		}
		items = rapid.Permutation(items).Draw(rt, "order")
		seen, waiting := make(map[uint64]bool), make(map[uint64]bool)
		known := false
		for len(items) > 0 {
			n := rapid.IntRange(1, len(items)).Draw(rt, "batch")
			res := b.record(items[:n]...)
			for i, r := range res {
				index := items[i].Ref.Index
				seen[index], waiting[index] = true, true
				if !known && len(seen) < len(parts)+1 {
					b.Empty(r.Released, "released before all was there")
					b.False(r.New)
					continue
				}
				b.Equal(!known, r.New)
				known = true
				for _, ref := range r.Released {
					b.True(waiting[ref.Index])
					delete(waiting, ref.Index)
				}
				b.Empty(waiting, "still waits for a word")
			}
			items = items[n:]
		}
		b.True(known)
		_, got := b.payload(id)
		var whole []byte
		for _, p := range parts {
			whole = append(whole, p...)
		}
		b.Equal(whole, got)
		b.Empty(b.asides())
	})
}
