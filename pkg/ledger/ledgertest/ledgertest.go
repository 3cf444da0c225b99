// Package ledgertest holds the conformance suite that every ledger store
// passes. It is written against the contract in package ledger alone.
package ledgertest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"

	"io"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Options are what the suite asks of a store.
type Options struct {
	// Dir is a directory that belongs to one ledger: a store opened with the
	// same Dir after another one was closed is the same ledger.
	Dir string
	// Now is the ledger's clock. Two calls may give the same time.
	Now func() time.Time
	// Retention and MaxEarly are as in the contract, 0 for the store's default.
	Retention time.Duration
	MaxEarly  int
}

// Open opens a store for the suite, or fails the test. The suite closes it.
type Open func(t testing.TB, o Options) ledger.Store

// Run runs the suite. Every test has a ledger of its own.
func Run(t *testing.T, open Open) {
	for _, group := range []map[string]func(*bench){
		recordTests, chunkTests, completeTests, listTests, replayTests, orderTests, operatorTests, expireTests, answerTests,
	} {
		for name, test := range group {
			t.Run(name, func(t *testing.T) {
				test(newBench(t, open, Options{}))
			})
		}
	}
	t.Run("any order and repetition of facts", func(t *testing.T) { anyOrder(t, open) })
	t.Run("order over two runs", func(t *testing.T) { orderOverRuns(t, open) })
	t.Run("chunks in any order", func(t *testing.T) { chunksInAnyOrder(t, open) })
}

// clock is set by hand. Its times have no more digits than every store keeps.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// bench is one ledger under test.
type bench struct {
	*require.Assertions
	t     testing.TB
	ctx   context.Context
	open  Open
	o     Options
	clock *clock
	s     ledger.Store
}

func newBench(t testing.TB, open Open, o Options) *bench {
	b := &bench{
		Assertions: require.New(t), t: t, ctx: context.Background(), open: open, o: o,
		clock: &clock{now: time.Now().UTC().Truncate(time.Microsecond)},
	}
	b.o.Dir, b.o.Now = t.TempDir(), b.clock.Now
	b.s = open(t, b.o)
	t.Cleanup(func() { _ = b.s.Close() })
	return b
}

// with opens the ledger again, with other options.
func (b *bench) with(change func(*Options)) *bench {
	change(&b.o)
	b.reopen()
	return b
}

func (b *bench) reopen() {
	b.NoError(b.s.Close())
	b.s = b.open(b.t, b.o)
}

func newID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

func newIDs(n int) []uuid.UUID {
	ids := make([]uuid.UUID, n)
	for i := range ids {
		ids[i] = newID()
	}
	return ids
}

func ref(index uint64) capture.SpoolRef {
	return capture.SpoolRef{Ingress: "edge-1", Start: "5eed", Index: index}
}

func eventPolicy() capture.Policy {
	p := capture.DefaultPolicy()
	p.By = capture.ByEvent
	return p
}

// inline is a captured request with a small body.
func (b *bench) inline(id uuid.UUID, change ...func(*capture.Request)) ledger.Item {
	r := &capture.Request{
		ID: id, Route: "calls", Ingress: "edge-1", ReceivedAt: b.clock.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte("POST /v1/calls HTTP/1.1\r\nHost: api.example.com\r\nContent-Length: 5\r\n\r\n"),
		Body: []byte("hello"), Size: 5,
	}
	for _, f := range change {
		f(r)
	}
	return ledger.Item{Captured: capture.Captured{Request: r}}
}

func target(method, target string) func(*capture.Request) {
	return func(r *capture.Request) { r.Head = []byte(method + " " + target + " HTTP/1.1\r\nHost: a\r\n\r\n") }
}

func policy(p capture.Policy) func(*capture.Request) {
	return func(r *capture.Request) { r.Policy = p }
}

// head is the head of a body in chunks.
func (b *bench) head(id uuid.UUID, chunks ...[]byte) ledger.Item {
	sum := sha256.New()
	size := 0
	for _, c := range chunks {
		sum.Write(c)
		size += len(c)
	}
	return b.inline(id, func(r *capture.Request) {
		r.Body, r.Size, r.Chunks, r.SHA256 = nil, int64(size), len(chunks), hex.EncodeToString(sum.Sum(nil))
	})
}

func chunk(id uuid.UUID, n int, data []byte) ledger.Item {
	return ledger.Item{Captured: capture.Captured{Chunk: &capture.Chunk{ID: id, Route: "calls", Ingress: "edge-1", Number: n, Data: data}}}
}

func abandon(id uuid.UUID) ledger.Item {
	return ledger.Item{Captured: capture.Captured{Abandon: &capture.Abandon{ID: id, Route: "calls", Ingress: "edge-1"}}}
}

func from(index uint64, item ledger.Item) ledger.Item {
	item.Ref = ref(index)
	return item
}

// record commits items and expects that none is refused.
func (b *bench) record(items ...ledger.Item) []ledger.Result {
	results, err := b.s.Record(b.ctx, items)
	b.NoError(err)
	b.Len(results, len(items))
	for i, r := range results {
		b.NoError(r.Err, "item %d", i)
	}
	return results
}

// captured records new requests and gives their ids, in order.
func (b *bench) captured(n int, change ...func(*capture.Request)) []uuid.UUID {
	ids := newIDs(n)
	items := make([]ledger.Item, n)
	for i := range items {
		items[i] = b.inline(ids[i], change...)
	}
	for _, r := range b.record(items...) {
		b.True(r.New)
	}
	return ids
}

func (b *bench) outcome(id uuid.UUID, verdict capture.Verdict, status int) ledger.Fact {
	now := b.clock.Now()
	o := &capture.Outcome{ID: id, Ingress: "edge-1", Attempt: capture.Attempt{
		Number: capture.FirstAttempt, StartedAt: now, EndedAt: now, Status: status, Verdict: verdict,
	}}
	if status == 0 {
		o.Attempt.Error = "connection refused"
	}
	return ledger.Fact{Outcome: o}
}

func event(id uuid.UUID, outcome capture.Verdict, attempt int) ledger.Fact {
	return ledger.Fact{Event: &capture.Event{ID: id, Outcome: outcome, Attempt: attempt}}
}

// complete commits facts and expects that none is refused.
func (b *bench) complete(facts ...ledger.Fact) {
	errs, err := b.s.Complete(b.ctx, facts)
	b.NoError(err)
	for i, err := range errs {
		b.NoError(err, "fact %d", i)
	}
}

// failed records requests whose first try failed.
func (b *bench) failed(n int, change ...func(*capture.Request)) []uuid.UUID {
	ids := b.captured(n, change...)
	for _, id := range ids {
		b.complete(b.outcome(id, capture.Failed, 503))
	}
	return ids
}

func (b *bench) get(id uuid.UUID) ledger.Detail {
	d, err := b.s.Get(b.ctx, id)
	b.NoError(err)
	b.Equal(id, d.ID)
	return d
}

func (b *bench) state(id uuid.UUID) capture.State { return b.get(id).State }

func (b *bench) unknown(id uuid.UUID) {
	_, err := b.s.Get(b.ctx, id)
	b.ErrorIs(err, ledger.ErrNotFound)
	_, _, err = b.s.Payload(b.ctx, id)
	b.ErrorIs(err, ledger.ErrNotFound)
}

func (b *bench) stats() ledger.Stats {
	st, err := b.s.Stats(b.ctx)
	b.NoError(err)
	return st
}

// list reads all pages of limit requests.
func (b *bench) list(f ledger.Filter, limit int) []ledger.Request {
	var all []ledger.Request
	for cursor := ""; ; {
		page, err := b.s.List(b.ctx, f, cursor, limit)
		b.NoError(err)
		b.LessOrEqual(len(page.Requests), limit)
		all = append(all, page.Requests...)
		if cursor = page.Next; cursor == "" {
			return all
		}
		b.Len(page.Requests, limit, "only the last page may be short")
	}
}

func idsOf(requests []ledger.Request) []uuid.UUID {
	ids := make([]uuid.UUID, 0, len(requests))
	for _, r := range requests {
		ids = append(ids, r.ID)
	}
	return ids
}

func (b *bench) listed(f ledger.Filter) []uuid.UUID { return idsOf(b.list(f, 100)) }

// payload reads the whole payload.
func (b *bench) payload(id uuid.UUID) (head, body []byte) {
	head, r, err := b.s.Payload(b.ctx, id)
	b.NoError(err)
	body, err = io.ReadAll(r)
	b.NoError(err)
	b.NoError(r.Close())
	return head, body
}

// recount checks the maintained counts against a full count.
func (b *bench) recount() {
	want := make(map[capture.State]int64)
	for _, s := range capture.States() {
		want[s] = 0
	}
	var kept int64
	for _, r := range b.list(ledger.Filter{}, 100) {
		want[r.State]++
		if r.State == capture.StateProcessed && !r.PayloadExpired {
			head, body := b.payload(r.ID)
			kept += int64(len(head) + len(body))
			for _, a := range b.answers(r.ID) {
				kept += int64(len(a.Body))
			}
		}
		// What is listed by its state is in that state.
		b.Contains(b.listed(ledger.Filter{States: []capture.State{r.State}, IDs: []uuid.UUID{r.ID}}), r.ID)
	}
	for s, n := range want {
		b.Len(b.list(ledger.Filter{States: []capture.State{s}}, 100), int(n), "listed as %s", s)
	}
	st := b.stats()
	b.Equal(want, st.Requests)
	b.Equal(kept, st.PayloadBytes, "payload bytes of processed requests")
	aside, cursor := make(map[string]int64), ""
	for {
		list, next, err := b.s.AsideList(b.ctx, cursor, 2)
		b.NoError(err)
		for _, a := range list {
			aside[a.Kind]++
		}
		if cursor = next; cursor == "" {
			break
		}
	}
	for kind, n := range st.Aside {
		b.Equal(aside[kind], n, "aside %s", kind)
	}
	for kind, n := range aside {
		b.Equal(st.Aside[kind], n, "aside %s", kind)
	}
}

func (b *bench) asides() []ledger.Aside {
	list, next, err := b.s.AsideList(b.ctx, "", 100)
	b.NoError(err)
	b.Empty(next)
	return list
}

func cancelled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// body is n bytes that differ from place to place.
func body(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8*13 + i>>16)
	}
	return b
}

func cut(data []byte, size int) [][]byte {
	var parts [][]byte
	for len(data) > 0 {
		n := min(size, len(data))
		parts = append(parts, data[:n])
		data = data[n:]
	}
	return parts
}

// within is the bench with assertions that fail another test, such as one run
// of a property.
func (b *bench) within(t require.TestingT) *bench {
	c := *b
	c.Assertions = require.New(t)
	return &c
}
