package replayer_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/replayer"
)

// report publishes that the API has processed a request.
func (b *broker) report(id uuid.UUID) error {
	body, err := json.Marshal(map[string]string{"id": id.String(), "outcome": "processed"})
	if err != nil {
		return err
	}
	_, err = b.js.Publish(context.Background(), capture.EventSubject(capture.DefaultRoute), body)
	return err
}

// acknowledge does once what the acker does: commit, then ack.
func (b *broker) acknowledge(store *books) error {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	consumer, err := b.js.Consumer(ctx, capture.CompletionsStream, capture.AckerDurable)
	if err != nil {
		return err
	}
	batch, err := consumer.FetchNoWait(1000)
	if err != nil {
		return err
	}
	var messages []jetstream.Msg
	var facts []ledger.Fact
	for m := range batch.Messages() {
		events, err := capture.DecodeEvents(m.Data(), 1)
		if err != nil {
			return err
		}
		messages, facts = append(messages, m), append(facts, ledger.Fact{Event: &events[0]})
	}
	if _, err := store.Complete(ctx, facts); err != nil {
		return err
	}
	for _, m := range messages {
		if err := m.DoubleAck(ctx); err != nil {
			return err
		}
	}
	return nil
}

// must turns an error of a callback into the end of the test's process, because
// the callback runs on a goroutine that is not the test's.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

func TestTheFenceWaitsForTheAcker(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	f := n.fence(b)
	require.NoError(t, f.Pass(t.Context()), "nothing was ever said")

	for range 3 {
		require.NoError(t, n.report(uuid.Must(uuid.NewV7())))
	}
	c := newClock()
	f.Clock = c
	var late *replayer.FenceError
	require.ErrorAs(t, f.Pass(t.Context()), &late)
	require.Equal(t, []string{"the acker is 3 messages behind"}, late.Waits)

	looks := 0
	c.each = func(time.Duration) {
		if looks++; looks == 2 {
			must(n.acknowledge(b))
			// What comes after the page began is not waited for.
			must(n.report(uuid.Must(uuid.NewV7())))
		}
	}
	require.NoError(t, f.Pass(t.Context()))
	require.Equal(t, 2, looks)
}

func TestTheFenceWaitsForEveryIngress(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	f := n.fence(b)
	c := newClock()
	f.Clock = c
	beat := func(id string, unreleased time.Duration, stopped bool) {
		now := time.Now()
		h := capture.Heartbeat{Ingress: id, Start: "1", Now: now, Stopped: stopped}
		if unreleased > 0 {
			h.Unreleased, h.OldestUnreleased = 7, now.Add(-unreleased)
		}
		must(b.SaveHeartbeats(context.Background(), []capture.Heartbeat{h}))
	}
	beat("alive", 0, false)
	beat("dead", 0, false)
	beat("gone", 0, false)
	beat("gone", 0, true)
	c.each = func(time.Duration) { beat("alive", 5*time.Second, false) }
	var late *replayer.FenceError
	require.ErrorAs(t, f.Pass(t.Context()), &late)
	require.Len(t, late.Waits, 2)
	require.Contains(t, late.Waits[0], "ingress alive has 7 records unreleased, the oldest since ")
	require.Contains(t, late.Waits[1], "ingress dead was not heard from since ")
	require.Contains(t, late.Waits[1], "--ignore-ingress dead")

	f.Ignore = []string{"dead"}
	looks := 0
	c.each = func(time.Duration) {
		switch looks++; looks {
		case 1:
			beat("alive", time.Hour, false) // heard from, and it still sits on old ones
		case 2:
			beat("alive", time.Nanosecond, false) // on one that is newer than the page
		}
	}
	require.NoError(t, f.Pass(t.Context()))
	require.Equal(t, 2, looks)
}

func TestTheFenceNamesABrokerThatIsAway(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	conn, err := stream.Connect(stream.ConnectOptions{URL: n.server.ClientURL(), Name: "test", Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(conn.Close)
	require.Eventually(t, conn.IsConnected, bound, time.Millisecond)
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	f := n.fence(b)
	f.Completions = replayer.JetStream{JS: js}
	f.Clock = newClock()
	require.NoError(t, f.Pass(t.Context()))

	require.NoError(t, n.server.Shutdown(t.Context()))
	require.Eventually(t, func() bool { return !conn.IsConnected() }, bound, time.Millisecond)
	f.Timeout = 0
	var late *replayer.FenceError
	require.ErrorAs(t, f.Pass(t.Context()), &late)
	require.Contains(t, late.Error(), "the acker cannot be asked for")
}

// sequences are those of a stream and a consumer that no server can be made to
// have at will.
type sequences struct{ last, floor uint64 }

func (s *sequences) Last(context.Context) (uint64, error)  { return s.last, nil }
func (s *sequences) Floor(context.Context) (uint64, error) { return s.floor, nil }

func TestTheFenceAfterARollback(t *testing.T) {
	b := newBooks(t)
	c := newClock()
	s := &sequences{last: 10, floor: 25}
	f := &replayer.Fence{Ledger: b, Completions: s, Timeout: time.Minute, Clock: c}
	var late *replayer.FenceError
	require.ErrorAs(t, f.Pass(t.Context()), &late)
	require.Contains(t, late.Error(), "rolled back")

	// In the middle of a passage: the old target is never reached, and not
	// waited for.
	*s = sequences{last: 100, floor: 40}
	c.each = func(time.Duration) { *s = sequences{last: 50, floor: 50} }
	require.NoError(t, f.Pass(t.Context()))
}

// TestNothingCompletedBeforeThePageIsSent: what had been said when a page began
// keeps it from being sent, though it had not reached the ledger.
func TestNothingCompletedBeforeThePageIsSent(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, many(600)...)
	require.NoError(t, n.report(ids[0]))
	var first sync.Once
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		first.Do(func() { must(n.report(ids[599])) }) // of the third page, while the first is sent
	})
	o := options(t, b, a.URL)
	o.Concurrency = 8
	c := newClock()
	c.each = func(time.Duration) { must(n.acknowledge(b)) }
	f := n.fence(b)
	f.Clock = c
	o.Fence = f
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.Equal(t, int64(598), report.Sent)
	require.Zero(t, a.times()[ids[0].String()])
	require.Zero(t, a.times()[ids[599].String()])
}

// TestWhatIsCompletedDuringAPauseIsNotSent: a page that was selected before the
// API asked to wait is selected anew, behind a new fence.
func TestWhatIsCompletedDuringAPauseIsNotSent(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, many(3)...)
	var first sync.Once
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		first.Do(func() {
			w.Header().Set("Retry-After", "40")
			w.WriteHeader(http.StatusServiceUnavailable)
		})
	})
	o := options(t, b, a.URL)
	o.Concurrency = 1
	o.Clock.(*clock).each = func(d time.Duration) {
		if d > 30*time.Second {
			must(n.report(ids[1]))
		}
	}
	c := newClock()
	c.each = func(time.Duration) { must(n.acknowledge(b)) }
	f := n.fence(b)
	f.Clock = c
	o.Fence = f
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, report.Reason)
	require.Equal(t, map[string]int{ids[0].String(): 2, ids[2].String(): 1}, a.times())
}

func TestAFenceThatDoesNotPassEndsTheRun(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	b.capture(t, many(3)...)
	require.NoError(t, n.report(uuid.Must(uuid.NewV7())))
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	f := n.fence(b)
	f.Clock = newClock()
	o.Fence = f
	report := mustRun(t, o)
	require.Empty(t, a.seen())
	require.Equal(t, replayer.ExitFailed, report.ExitCode)
	require.Contains(t, report.Reason, "the acker is 1 messages behind")
	f.Clock.(*clock).each = func(time.Duration) { must(n.acknowledge(b)) }
	mustRun(t, o)
	require.Len(t, a.seen(), 3)
}
