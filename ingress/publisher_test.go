package ingress

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

func TestPublishesInOrder(t *testing.T) {
	g, b := run(t, ok)
	const n = 50
	for range n {
		require.Equal(t, 200, g.must("POST", "/", strings.NewReader("x")).StatusCode)
	}
	var last uint64
	for _, m := range b.eventually(capture.RequestsStream, n) {
		require.Equal(t, "holdfast.requests.default.POST", m.subject)
		require.Equal(t, m.header.Get(capture.HeaderID), m.request.ID.String())
		require.Equal(t, "test", m.ref.Ingress)
		require.Equal(t, g.spool.Start().String(), m.ref.Start)
		require.Greater(t, m.ref.Index, last)
		last = m.ref.Index
	}
	for _, m := range b.eventually(capture.CompletionsStream, n) {
		require.Equal(t, "holdfast.completions.default.outcome", m.subject)
		require.Len(t, m.header, 1, "an outcome carries its spool reference alone")
	}
	// Words release, and of each record once.
	b.release(b.read(capture.RequestsStream))
	b.release(b.read(capture.RequestsStream))
	b.release(b.read(capture.CompletionsStream))
	require.Eventually(t, func() bool { return g.spool.Stats().Unreleased == 0 }, patience, time.Millisecond)
	require.Len(t, b.read(capture.RequestsStream), n, "nothing is published twice without a reason")
}

func TestForeignWordReleasesNothing(t *testing.T) {
	g, b := run(t, ok)
	g.must("POST", "/", nil)
	list := b.eventually(capture.RequestsStream, 1)
	for _, start := range []string{"", "00", strings.Repeat("0", 32), "zz", strings.Repeat("f", 64)} {
		require.NoError(t, b.conn.Publish(capture.CommittedSubject("test"), capture.Word{Start: start, Released: [][2]uint64{{1, 100}}}.Encode()))
	}
	require.NoError(t, b.conn.Publish(capture.CommittedSubject("test"), []byte("{")))
	require.NoError(t, b.conn.Publish(capture.CommittedSubject("other"), capture.Word{Start: g.spool.Start().String(), Released: [][2]uint64{{1, 100}}}.Encode()))
	b.release(list) // words are taken in order, so this one comes last
	require.Eventually(t, func() bool { return g.spool.Stats().Unreleased == 1 }, patience, time.Millisecond)
}

// TestServerRestarts: nothing that was answered is missing in the stream.
func TestServerRestarts(t *testing.T) {
	g, b := run(t, ok)
	ids := make(chan uuid.UUID, 1000)
	stop := make(chan struct{})
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				a, err := g.do("POST", "/", strings.NewReader("x"))
				if err != nil || a.StatusCode != 200 {
					t.Error("a client saw the restart", err)
					return
				}
				ids <- uuid.MustParse(a.Header.Get(capture.HTTPHeaderID))
			}
		})
	}
	seen := func(n int) {
		require.Eventually(t, func() bool { return len(ids) >= n }, patience, time.Millisecond)
	}
	seen(50)
	for i := range 2 {
		require.NoError(t, b.server.Restart(bounded(t)))
		seen(100 + 50*i)
	}
	close(stop)
	all.Wait()
	close(ids)
	missing := map[uuid.UUID]bool{}
	for id := range ids {
		missing[id] = true
	}
	want := len(missing)
	require.Eventually(t, func() bool {
		js, err := jetstream.New(b.conn)
		require.NoError(t, err)
		s, err := js.Stream(t.Context(), capture.RequestsStream)
		return err == nil && s.CachedInfo().State.Msgs >= uint64(want) && g.h.spool.Stats().Unreleased == 2*want
	}, patience, time.Millisecond)
	require.Eventually(t, func() bool {
		for _, m := range b.read(capture.RequestsStream) {
			delete(missing, m.request.ID)
		}
		return len(missing) == 0
	}, patience, 10*time.Millisecond)
}

// TestStreamFull: what a full stream refuses comes when there is room again, and
// the other stream does not get its own messages again and again meanwhile.
func TestStreamFull(t *testing.T) {
	b := newBroker(t, stream.Streams{Replicas: 1, MaxBytes: 1 << 20})
	g := startGateway(t, newOptions(t, serveAPI(t, ok), b.connect()))
	const n = 20
	for range n {
		require.Equal(t, 200, g.must("POST", "/", bytes.NewReader(pattern(100<<10))).StatusCode)
	}
	js, err := jetstream.New(b.conn)
	require.NoError(t, err)
	s, err := js.Stream(bounded(t), capture.RequestsStream)
	require.NoError(t, err)
	// Several rounds of refusals.
	require.Eventually(t, func() bool { return counter(g, "holdfast_republish_total") >= 4 }, patience, time.Millisecond)
	require.Less(t, s.CachedInfo().State.Msgs, uint64(n))
	seen := map[uuid.UUID]int{}
	require.Eventually(t, func() bool {
		for _, m := range b.read(capture.RequestsStream) {
			seen[m.request.ID]++
			require.NoError(t, s.Purge(t.Context(), jetstream.WithPurgeSequence(m.seq+1)))
		}
		return len(seen) == n
	}, patience, 20*time.Millisecond)
	require.Equal(t, n, len(b.eventually(capture.CompletionsStream, n)), "no repeats in the stream that had room")
}

// counter is the sum of a metric.
func counter(g *gateway, name string) (sum float64) {
	families, err := g.registry().Gather()
	require.NoError(g.t, err)
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// TestSetsAside: what no broker takes and what is no message goes aside, and
// blocks nothing.
func TestSetsAside(t *testing.T) {
	g, b := run(t, ok)
	put := func(parts ...[]byte) {
		res, err := g.spool.Reserve(1, 2<<20)
		require.NoError(t, err)
		defer res.Release()
		_, err = res.AppendWritten(parts...)
		require.NoError(t, err)
	}
	large := capture.Chunk{ID: uuid.New(), Route: "default", Ingress: "test"}
	put([]byte{0xff, 1, 2})
	put([]byte{1, 200})
	put(large.Message("POST").AppendEnvelope(nil), make([]byte, 1<<20))
	put(capture.Message{Subject: "holdfast bad subject"}.AppendEnvelope(nil))
	put(capture.Message{Subject: "holdfast.requests.a.POST", Capture: strings.Repeat("x", 70<<10)}.AppendEnvelope(nil))
	a := g.must("POST", "/", nil)
	require.Equal(t, a.id(t), b.eventually(capture.RequestsStream, 1)[0].request.ID)
	require.Eventually(t, func() bool { return g.spool.Stats().Aside == 5 }, patience, time.Millisecond)
	require.EqualValues(t, 5, counter(g, "holdfast_publish_errors_total"))
	list, err := g.spool.Aside()
	require.NoError(t, err)
	for _, one := range list {
		require.NotEmpty(t, one.Reason)
	}
}

// TestLostWords: a record that stays unreleased though later ones of its stream
// were released is published again, and only that.
func TestLostWords(t *testing.T) {
	g, b := run(t, ok, func(o *Options) { o.times.wordLost = 30 * time.Millisecond })
	const n = 10
	for range n {
		g.must("POST", "/", nil)
	}
	list := b.eventually(capture.RequestsStream, n)
	require.Len(t, list, n)
	lost := list[3]
	// The acker is away, and its records are no evidence of anything.
	b.release(append(list[:3:3], list[4:]...))
	again := b.eventually(capture.RequestsStream, n+1)
	require.Equal(t, lost.ref, again[n].ref)
	require.Equal(t, lost.data, again[n].data)
	b.release(again[n:])
	require.Eventually(t, func() bool { return g.spool.Stats().Unreleased == n }, patience, time.Millisecond)
	require.Len(t, b.read(capture.CompletionsStream), n, "a consumer that is away is no evidence")
	for _, m := range b.read(capture.RequestsStream)[n:] {
		require.Equal(t, lost.ref, m.ref)
	}
}

// TestNoWordsAtAll: in the end everything is published again, at growing
// intervals.
func TestNoWordsAtAll(t *testing.T) {
	g, b := run(t, ok, func(o *Options) {
		o.times.wordLost, o.times.republishMin, o.times.republishMax = time.Millisecond, 50*time.Millisecond, time.Hour
	})
	g.must("POST", "/", nil)
	require.Equal(t, 1, len(uniqueRefs(b.eventually(capture.RequestsStream, 3))))
	require.Equal(t, 1, len(uniqueRefs(b.eventually(capture.CompletionsStream, 3))))
}

// TestWordsLostWithTheConnection: a broker that was away may have lost what it
// had acknowledged, and words have gone past. What stays unreleased is published
// again after the time for a lost word, not after the patience for a consumer
// that is away; once.
func TestWordsLostWithTheConnection(t *testing.T) {
	g, b := run(t, ok, func(o *Options) {
		o.times.wordLost, o.times.republishMin, o.times.republishMax = 200*time.Millisecond, time.Hour, time.Hour
	})
	const n = 4
	for range n {
		g.must("POST", "/", nil)
	}
	list := b.eventually(capture.RequestsStream, n)
	b.eventually(capture.CompletionsStream, n)
	require.NoError(t, b.server.Restart(bounded(t)))
	for round := range 2 {
		// The first word is of a record that all others follow.
		if round == 1 {
			b.release(list[:1])
			require.NoError(t, b.server.Restart(bounded(t)))
		}
		want := 2*n + round*(n-1)
		list = b.eventually(capture.RequestsStream, want)
		require.Len(t, uniqueRefs(list), n)
		b.eventually(capture.CompletionsStream, 2*n+round*n)
	}
}

func uniqueRefs(list []message) map[capture.SpoolRef]bool {
	m := map[capture.SpoolRef]bool{}
	for _, one := range list {
		m[one.ref] = true
	}
	return m
}

func TestHeartbeats(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	beats := make(chan *nats.Msg, 1000)
	sub, err := b.conn.ChanSubscribe(capture.HeartbeatSubjects, beats)
	require.NoError(t, err)
	defer func() { require.NoError(t, sub.Unsubscribe()) }()
	require.NoError(t, b.conn.Flush())
	g := startGateway(t, newOptions(t, serveAPI(t, ok), b.connect(), func(o *Options) { o.times.drain = patience }))
	until := func(want func(capture.Heartbeat) bool) capture.Heartbeat {
		t.Helper()
		bound := time.After(patience)
		for {
			select {
			case m := <-beats:
				require.Equal(t, "holdfast.ingress.test", m.Subject)
				h, err := capture.DecodeHeartbeat(m.Data)
				require.NoError(t, err)
				require.Equal(t, g.spool.Start().String(), h.Start)
				if want(h) {
					return h
				}
			case <-bound:
				require.FailNow(t, "no such heartbeat")
			}
		}
	}
	empty := until(func(h capture.Heartbeat) bool { return h.Unreleased == 0 })
	require.True(t, empty.OldestUnreleased.IsZero())
	require.False(t, empty.Stopped)
	require.Zero(t, empty.Captured)
	before := time.Now()
	g.must("POST", "/", nil)
	full := until(func(h capture.Heartbeat) bool { return h.Unreleased == 2 })
	require.WithinRange(t, full.OldestUnreleased, before, time.Now())
	until(func(h capture.Heartbeat) bool { return h.Captured == 1 })
	list := append(b.eventually(capture.RequestsStream, 1), b.eventually(capture.CompletionsStream, 1)...)
	b.release(list)
	g.stop()
	last := capture.Heartbeat{}
	require.NoError(t, b.conn.Flush())
	for len(beats) > 0 {
		h, err := capture.DecodeHeartbeat((<-beats).Data)
		require.NoError(t, err)
		last = h
	}
	require.True(t, last.Stopped, "the goodbye is the last heartbeat")
}

func TestStopWithRecordsSaysNoGoodbye(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	beats := make(chan *nats.Msg, 1000)
	_, err := b.conn.ChanSubscribe(capture.HeartbeatSubjects, beats)
	require.NoError(t, err)
	g := startGateway(t, newOptions(t, serveAPI(t, ok), b.connect()))
	require.Eventually(t, func() bool { return len(g.ready.Failing()) == 0 }, patience, time.Millisecond)
	g.must("POST", "/", nil)
	b.eventually(capture.RequestsStream, 1)
	g.stop()
	require.Len(t, g.ready.Failing(), 1)
	require.Equal(t, "stopping", g.ready.Failing()[0].Reason)
	require.NoError(t, b.conn.Flush())
	require.NotEmpty(t, beats)
	for len(beats) > 0 {
		h, err := capture.DecodeHeartbeat((<-beats).Data)
		require.NoError(t, err)
		require.False(t, h.Stopped)
	}
}

// TestWindow: failures, late acknowledgements and repeats in any order neither
// skip a record nor send one again that is known to be stored.
func TestWindow(t *testing.T) {
	at := func(i uint64) spool.Position { return spool.Position{Index: i} }
	fresh := func() *window {
		return &window{changed: make(chan struct{}, 1), done: map[spool.Position]struct{}{}, ackWait: time.Hour}
	}
	add := func(w *window, i uint64) (inflight, added) {
		n, a, err := w.add(t.Context(), at(i), 10, spool.StartID{}, i)
		require.NoError(t, err)
		return n, a
	}
	t.Run("a late window that is settled after all", func(t *testing.T) {
		w := fresh()
		n, _ := add(w, 1)
		w.failAll()
		_, a := add(w, 2)
		require.Equal(t, failed, a, "the record was read and not published")
		w.settle(n.number)
		require.True(t, w.mustGoBack())
		require.Equal(t, at(1), w.restart())
	})
	t.Run("settled behind a refused one", func(t *testing.T) {
		w := fresh()
		first, _ := add(w, 1)
		second, _ := add(w, 2)
		w.settle(second.number)
		for range 3 {
			w.fail(first.number)
			require.Equal(t, at(1), w.restart())
			require.False(t, w.takeProgress())
			first, _ = add(w, 1)
			_, a := add(w, 2)
			require.Equal(t, known, a)
		}
		w.settle(first.number)
		require.True(t, w.takeProgress())
		require.Zero(t, w.pending())
		require.Zero(t, w.bytes)
		require.Empty(t, w.done)
	})
	t.Run("acknowledgements of an earlier round", func(t *testing.T) {
		w := fresh()
		old, _ := add(w, 1)
		w.failAll()
		w.restart()
		add(w, 1)
		w.settle(old.number)
		w.fail(old.number)
		require.EqualValues(t, 1, w.pending())
		require.False(t, w.mustGoBack())
	})
	t.Run("full", func(t *testing.T) {
		w := fresh()
		var first inflight
		for i := range uint64(windowRecords) {
			n, _ := add(w, i+1)
			if i == 0 {
				first = n
			}
		}
		got := make(chan added, 1)
		go func() {
			_, a, _ := w.add(t.Context(), at(windowRecords+1), 1, spool.StartID{}, windowRecords+1)
			got <- a
		}()
		w.settle(first.number)
		require.Equal(t, entered, <-got)
		w.ackWait = 0
		_, a := add(w, windowRecords+2)
		require.Equal(t, failed, a)
	})
}

// TestCodecBounds holds the codec to what the reservations assume.
func TestCodecBounds(t *testing.T) {
	policy := capture.Policy{
		By: capture.ByResponse, Timeout: 1<<63 - 1, Grace: 1<<63 - 1,
		Processed: capture.StatusSet(strings.Repeat("200,", 50) + "2xx"), Failed: capture.StatusSet(strings.Repeat("500,", 50) + "5xx"),
	}
	long := strings.Repeat("a", 64)
	r := capture.Request{
		ID: uuid.New(), Route: long[:32], Ingress: long, ReceivedAt: time.Now(), Policy: policy, Size: 1<<63 - 1, Chunks: 1 << 31, SHA256: long,
		OrderKey: strings.Repeat("\xff", maxOrderKey), Head: []byte(strings.Repeat("A", 32) + " / HTTP/1.1\r\n\r\n"),
	}
	require.LessOrEqual(t, len(r.Message().AppendEnvelope(nil)), maxEnvelope)
	c := capture.Chunk{ID: uuid.New(), Route: long[:32], Ingress: long, Number: 1 << 31}
	require.LessOrEqual(t, len(c.Message(strings.Repeat("A", 32)).AppendEnvelope(nil)), maxEnvelope)
	o := capture.Outcome{ID: uuid.New(), Ingress: long, Attempt: capture.Attempt{
		Number: 1 << 31, StartedAt: time.Now(), EndedAt: time.Now(), Status: 999, Error: clip(strings.Repeat("\x01", 10000)), Verdict: capture.Processed,
	}}
	require.LessOrEqual(t, len(o.AppendJSON(nil)), maxOutcome)

	rt := &destination{Route: &route.Route{OrderBy: "K"}}
	key := rt.orderKey(wire.Fields{}.Add("K", strings.Repeat("k", 60<<10)))
	require.Len(t, key, len("sha256:")+64)
	require.NotEqual(t, key, rt.orderKey(wire.Fields{}.Add("K", strings.Repeat("k", 60<<10)+"x")))
}

// TestLargestMessage: the largest head and the largest inline body make one
// message that the broker takes.
func TestLargestMessage(t *testing.T) {
	g, b := run(t, ok, set(func(s *Settings) { s.InlineBytes, s.MaxHeaderBytes = 768<<10, 128<<10 }))
	lines := []string{"POST / HTTP/1.1", "Content-Length: " + fmt.Sprint(768<<10), "Host: " + strings.Repeat("h", 256)}
	lines = append(lines, "A: "+strings.Repeat("a", 128<<10-len(strings.Join(lines, "  "))-9))
	require.Len(t, head(lines...), 128<<10)
	a := g.exchange(head(lines...) + string(pattern(768<<10)))
	require.Equal(t, 200, a.StatusCode)
	require.Len(t, b.eventually(capture.RequestsStream, 1), 1)
	require.Zero(t, g.spool.Stats().Aside)
}
