package stream_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for things that take milliseconds.
const patience = 20 * time.Second

var (
	silent  = slog.New(slog.DiscardHandler)
	streams = stream.Streams{Replicas: 1, MaxBytes: 64 << 20}
)

// broker is a real nats-server on a directory of its own.
type broker struct {
	*embednats.Server
	dir string
}

func startBroker(t testing.TB) *broker {
	t.Helper()
	dir := t.TempDir()
	s, err := embednats.Start(embednats.Options{
		StoreDir: dir, Addr: "127.0.0.1:0", MaxStoreBytes: 4 * streams.StoreBytes(), Logger: silent,
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(t, s.Shutdown(ctx))
	})
	return &broker{s, dir}
}

func (b *broker) connect(t testing.TB) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc, err := stream.Connect(stream.ConnectOptions{URL: b.ClientURL(), Name: "test", Logger: silent})
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	return nc, js
}

func provisioned(t testing.TB) (*broker, *nats.Conn, jetstream.JetStream) {
	t.Helper()
	b := startBroker(t)
	nc, js := b.connect(t)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	return b, nc, js
}

func publish(t testing.TB, js jetstream.JetStream, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		_, err := js.PublishAsync(capture.RequestSubject("default", "POST"), []byte(strconv.Itoa(i)))
		require.NoError(t, err)
		if (i-from)%500 == 499 { // more in flight than that stall a busy server
			published(t, js)
		}
	}
	published(t, js)
}

func published(t testing.TB, js jetstream.JetStream) {
	t.Helper()
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(patience):
		t.Fatal("publishes are not acknowledged")
	}
}

func metrics(t testing.TB) *stream.Metrics {
	m, err := stream.NewMetrics(prometheus.NewRegistry())
	require.NoError(t, err)
	return m
}

func newConsumer(t testing.TB, nc *nats.Conn, change ...func(*stream.ConsumerOptions)) *stream.Consumer {
	t.Helper()
	o := stream.ConsumerOptions{
		Conn: nc, Stream: capture.RequestsStream, Durable: capture.RecorderDurable,
		Service: "test", Metrics: metrics(t), Logger: silent,
	}
	for _, f := range change {
		f(&o)
	}
	c, err := stream.NewConsumer(o)
	require.NoError(t, err)
	return c
}

// run runs the loop; stop ends it and waits.
func run(t testing.TB, c *stream.Consumer, handle stream.Handler) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx, handle) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			require.NoError(t, <-done)
		})
	}
	t.Cleanup(stop)
	return stop
}

// store is what a handler commits to.
type store struct {
	mu      sync.Mutex
	seen    map[string]int
	batches []int
	changed chan struct{}
}

func newStore() *store { return &store{seen: map[string]int{}, changed: make(chan struct{}, 1)} }

func (s *store) commit(_ context.Context, batch []stream.Msg) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range batch {
		s.seen[string(m.Data)]++
	}
	s.batches = append(s.batches, len(batch))
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return nil
}

func (s *store) distinct() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seen)
}

// await waits until n different messages are committed.
func (s *store) await(t testing.TB, n int) {
	t.Helper()
	bound := time.NewTimer(patience)
	defer bound.Stop()
	for s.distinct() < n {
		select {
		case <-s.changed:
		case <-bound.C:
			require.FailNow(t, "not all messages came", "%d of %d", s.distinct(), n)
		}
	}
}

// awaitAcked waits until the server holds everything up to the last message for
// acknowledged.
func awaitAcked(t testing.TB, js jetstream.JetStream) {
	t.Helper()
	require.Eventually(t, func() bool {
		c, err := js.Consumer(t.Context(), capture.RequestsStream, capture.RecorderDurable)
		return err == nil && c.CachedInfo().NumAckPending == 0 && c.CachedInfo().NumPending == 0
	}, patience, 5*time.Millisecond)
}

func TestConsumesInBatchesAndAcknowledges(t *testing.T) {
	_, nc, js := provisioned(t)
	publish(t, js, 0, 2500)
	s := newStore()
	// No batch but a full one goes before the stop.
	c := newConsumer(t, nc, func(o *stream.ConsumerOptions) { o.FlushAfter, o.MaxBatch = time.Hour, 500 })
	require.ErrorIs(t, c.Ready(), stream.ErrNotConsuming)
	stop := run(t, c, s.commit)
	s.await(t, 2500)
	awaitAcked(t, js)
	require.NoError(t, c.Ready())
	require.Equal(t, []int{500, 500, 500, 500, 500}, s.batches)
	publish(t, js, 2500, 2600)
	require.Eventually(t, func() bool { // they have been delivered
		c, err := js.Consumer(t.Context(), capture.RequestsStream, capture.RecorderDurable)
		return err == nil && c.CachedInfo().NumPending == 0
	}, patience, 5*time.Millisecond)
	stop()
	require.ErrorIs(t, c.Ready(), stream.ErrNotConsuming)
	require.Equal(t, 2600, s.distinct(), "a stop flushes")
	for data, n := range s.seen {
		require.Equal(t, 1, n, data)
	}
	awaitAcked(t, js)
}

func TestBatchesAreBoundedByBytes(t *testing.T) {
	_, nc, js := provisioned(t)
	body := make([]byte, 200<<10)
	for i := range 40 {
		copy(body, fmt.Sprintf("%08d", i))
		_, err := js.Publish(t.Context(), capture.RequestSubject("default", "POST"), body)
		require.NoError(t, err)
	}
	var sizes []int
	s := newStore()
	c := newConsumer(t, nc, func(o *stream.ConsumerOptions) { o.MaxBatchBytes = 500 << 10 })
	stop := run(t, c, func(ctx context.Context, batch []stream.Msg) error {
		sizes = append(sizes, len(batch))
		return s.commit(ctx, batch)
	})
	s.await(t, 40)
	stop()
	// The message that crosses the bound is still in.
	require.LessOrEqual(t, slices.Max(sizes), 3)
}

// Commit before acknowledgement, always: what the server was sent is seen by a
// subscriber of acknowledgements, before the commit that they would follow.
func TestNothingIsAcknowledgedBeforeItsCommit(t *testing.T) {
	b, nc, js := provisioned(t)
	observer, _ := b.connect(t)
	acks, err := observer.SubscribeSync("$JS.ACK.>")
	require.NoError(t, err)
	require.NoError(t, observer.Flush())
	publish(t, js, 0, 1200)
	s := newStore()
	committed := 0
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		// What the loop has sent has passed the server, and then reached the observer.
		if err := errors.Join(nc.FlushTimeout(patience), observer.FlushTimeout(patience)); err != nil {
			return err
		}
		if n, _, err := acks.Pending(); err != nil || n > committed {
			t.Errorf("%d are acknowledged, %d committed: %v", n, committed, err)
		}
		committed += len(batch)
		return s.commit(ctx, batch)
	})
	s.await(t, 1200)
	awaitAcked(t, js)
	stop()
}

func TestAFailedCommitIsTriedAgainAndNotAcknowledged(t *testing.T) {
	_, nc, js := provisioned(t)
	publish(t, js, 0, 700)
	s := newStore()
	failures := 0
	var first []string
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		if failures < 4 {
			failures++
			var data []string
			for _, m := range batch {
				data = append(data, string(m.Data))
			}
			if first == nil {
				first = data
			} else if !slices.Equal(first, data) {
				t.Error("another batch is handed over before the first is committed")
			}
			c, err := js.Consumer(ctx, capture.RequestsStream, capture.RecorderDurable)
			if err != nil || c.CachedInfo().AckFloor.Stream != 0 {
				t.Errorf("acknowledged without a commit: %v", err)
			}
			return errors.New("locked")
		}
		return s.commit(ctx, batch)
	})
	s.await(t, 700)
	awaitAcked(t, js)
	stop()
	require.Equal(t, 4, failures)
}

// reconnects runs what breaks the connection, and waits until there is a new one:
// for a while a client takes the broken one for sound.
func reconnects(t testing.TB, nc *nats.Conn, broken func()) {
	t.Helper()
	before := nc.Stats().Reconnects
	broken()
	require.Eventually(t, func() bool { return nc.Stats().Reconnects > before && nc.IsConnected() }, patience, time.Millisecond)
}

// setAckWait gives the recorder's consumer another AckWait.
func setAckWait(t testing.TB, js jetstream.JetStream, d time.Duration) jetstream.Consumer {
	t.Helper()
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	c, err := st.Consumer(t.Context(), capture.RecorderDurable)
	require.NoError(t, err)
	config := c.CachedInfo().Config
	config.AckWait = d
	c, err = st.UpdateConsumer(t.Context(), config)
	require.NoError(t, err)
	return c
}

// A commit that takes longer than AckWait is said to be in progress, so that the
// server does not send its messages again.
func TestALongCommitIsNotRepeated(t *testing.T) {
	_, nc, js := provisioned(t)
	// The least that makes sense: the loop's own clock ticks once a second.
	c := setAckWait(t, js, 2*time.Second)
	publish(t, js, 0, 10)

	s := newStore()
	asked, entered := make(chan struct{}), make(chan struct{}, 1)
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		entered <- struct{}{}
		<-asked
		return s.commit(ctx, batch)
	})
	<-entered
	// The server hears of it at least twice: more than AckWait has passed then.
	sub, err := nc.SubscribeSync("$JS.ACK.>")
	require.NoError(t, err)
	for range 30 {
		m, err := sub.NextMsg(patience)
		require.NoError(t, err)
		require.Equal(t, "+WPI", string(m.Data))
	}
	close(asked)
	s.await(t, 10)
	awaitAcked(t, js)
	info, err := c.Info(t.Context())
	require.NoError(t, err)
	require.Equal(t, uint64(10), info.Delivered.Consumer, "messages were delivered again")
	stop()
}

func TestTerminatedMessagesDoNotBlock(t *testing.T) {
	_, nc, js := provisioned(t)
	publish(t, js, 0, 10)
	advisories, err := nc.SubscribeSync("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>")
	require.NoError(t, err)
	s := newStore()
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		for i := range batch {
			if string(batch[i].Data) == "3" {
				batch[i].Terminate("three is not liked")
			}
		}
		return s.commit(ctx, batch)
	})
	s.await(t, 10)
	awaitAcked(t, js)
	m, err := advisories.NextMsg(patience)
	require.NoError(t, err)
	require.Contains(t, string(m.Data), "three is not liked")
	stop()
}

// A try that failed has decided nothing: what it refused may be taken by the next.
func TestAFailedTryTerminatesNothing(t *testing.T) {
	b, nc, js := provisioned(t)
	observer, _ := b.connect(t)
	acks, err := observer.SubscribeSync("$JS.ACK.>")
	require.NoError(t, err)
	require.NoError(t, observer.Flush())
	publish(t, js, 0, 1)
	s := newStore()
	tries := 0
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		if tries++; tries == 1 {
			batch[0].Terminate("not liked")
			return errors.New("locked")
		}
		return s.commit(ctx, batch)
	})
	s.await(t, 1)
	m, err := acks.NextMsg(patience)
	require.NoError(t, err)
	require.Empty(t, m.Data, "it was terminated instead of acknowledged")
	stop()
}

func TestTwoShareADurable(t *testing.T) {
	b, nc, js := provisioned(t)
	other, _ := b.connect(t)
	one, two := newStore(), newStore()
	stopOne := run(t, newConsumer(t, nc), one.commit)
	stopTwo := run(t, newConsumer(t, other), two.commit)
	publish(t, js, 0, 20000)
	awaitAcked(t, js)
	stopOne()
	stopTwo()
	require.NotZero(t, one.distinct())
	require.NotZero(t, two.distinct())
	require.Equal(t, 20000, one.distinct()+two.distinct(), "each message goes to one of them")
}

// What is under way at the stop is committed and acknowledged, so that nothing
// has to come again.
func TestStopCommitsWhatHasCome(t *testing.T) {
	_, nc, js := provisioned(t)
	setAckWait(t, js, time.Hour) // nothing comes again meanwhile
	publish(t, js, 0, 3000)
	s := newStore()
	started, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	c := newConsumer(t, nc)
	go func() {
		done <- c.Run(ctx, func(ctx context.Context, batch []stream.Msg) error {
			once.Do(func() { close(started) })
			<-goOn
			return s.commit(ctx, batch)
		})
	}()
	<-started
	cancel()
	close(goOn)
	require.NoError(t, <-done)
	require.NotZero(t, s.distinct())
	// The server works acknowledgements off in its own time.
	require.Eventually(t, func() bool {
		consumer, err := js.Consumer(t.Context(), capture.RequestsStream, capture.RecorderDurable)
		return err == nil && consumer.CachedInfo().NumAckPending == 0 &&
			consumer.CachedInfo().AckFloor.Stream == uint64(s.distinct())
	}, patience, 5*time.Millisecond)
}

// A store that stays away does not hold up the stop, and the batch goes to the
// next process at once.
func TestStopGivesBackWhatCannotBeCommitted(t *testing.T) {
	_, nc, js := provisioned(t)
	setAckWait(t, js, time.Hour) // it comes because it was given back, or not at all
	publish(t, js, 0, 100)
	failing := make(chan struct{}, 100)
	stop := run(t, newConsumer(t, nc), func(context.Context, []stream.Msg) error {
		failing <- struct{}{}
		return errors.New("locked")
	})
	<-failing
	stop()
	s := newStore()
	stop = run(t, newConsumer(t, nc), s.commit)
	s.await(t, 100)
	stop()
	awaitAcked(t, js)
}

func TestSurvivesARestartOfTheServer(t *testing.T) {
	b, nc, js := provisioned(t)
	s := newStore()
	stop := run(t, newConsumer(t, nc), s.commit)
	publish(t, js, 0, 1000)
	s.await(t, 1000)
	reconnects(t, nc, func() { require.NoError(t, b.Restart(t.Context())) })
	publish(t, js, 1000, 2000)
	s.await(t, 2000)
	stop()
}

// An acknowledgement of before a restart could hit another message that has the
// sequence now.
func TestAcknowledgesOnlyOnTheConnectionThatBroughtTheMessage(t *testing.T) {
	b, nc, js := provisioned(t)
	publish(t, js, 0, 10)
	entered, goOn := make(chan struct{}, 10), make(chan struct{})
	s := newStore()
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		entered <- struct{}{}
		<-goOn
		return s.commit(ctx, batch)
	})
	<-entered
	reconnects(t, nc, func() { require.NoError(t, b.Restart(t.Context())) })
	acks, err := nc.SubscribeSync("$JS.ACK.>")
	require.NoError(t, err)
	close(goOn)
	s.await(t, 10)
	stop()
	require.NoError(t, nc.Flush())
	pending, _, err := acks.Pending()
	require.NoError(t, err)
	require.Zero(t, pending)
}

func TestSurvivesDeletionOfConsumerAndStream(t *testing.T) {
	_, nc, js := provisioned(t)
	s := newStore()
	c := newConsumer(t, nc)
	stop := run(t, c, s.commit)
	publish(t, js, 0, 100)
	s.await(t, 100)

	require.NoError(t, js.DeleteConsumer(t.Context(), capture.RequestsStream, capture.RecorderDurable))
	require.Eventually(t, func() bool { return errors.Is(c.Ready(), stream.ErrMissing) }, patience, time.Millisecond)
	publish(t, js, 100, 200)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	s.await(t, 200)

	require.NoError(t, js.DeleteStream(t.Context(), capture.RequestsStream))
	require.Eventually(t, func() bool { return errors.Is(c.Ready(), stream.ErrMissing) }, patience, time.Millisecond)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	publish(t, js, 200, 300)
	s.await(t, 300)
	require.NoError(t, c.Ready())
	stop()
}

func TestStartsBeforeTheServer(t *testing.T) {
	b := startBroker(t)
	url := b.ClientURL()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, b.Shutdown(ctx))

	nc, err := stream.Connect(stream.ConnectOptions{URL: url, Name: "test", Logger: silent})
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	require.ErrorIs(t, stream.Connected(nc), stream.ErrDisconnected)
	s := newStore()
	c := newConsumer(t, nc)
	stop := run(t, c, s.commit)
	require.ErrorIs(t, c.Ready(), stream.ErrDisconnected)

	server, err := embednats.Start(embednats.Options{
		StoreDir: b.dir, Addr: url[len("nats://"):], MaxStoreBytes: streams.StoreBytes(), Logger: silent,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Shutdown(context.Background())) })
	require.Eventually(t, nc.IsConnected, patience, time.Millisecond)
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	publish(t, js, 0, 10)
	s.await(t, 10)
	stop()
}

func TestRefusesAConsumerOfAnotherKind(t *testing.T) {
	_, nc, js := provisioned(t)
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.NoError(t, st.DeleteConsumer(t.Context(), capture.RecorderDurable))
	_, err = st.CreateConsumer(t.Context(), jetstream.ConsumerConfig{Durable: capture.RecorderDurable, AckPolicy: jetstream.AckAllPolicy})
	require.NoError(t, err)
	publish(t, js, 0, 10)
	c := newConsumer(t, nc)
	stop := run(t, c, func(context.Context, []stream.Msg) error {
		t.Error("consumes")
		return nil
	})
	require.Eventually(t, func() bool { return errors.Is(c.Ready(), stream.ErrDiffers) }, patience, time.Millisecond)
	stop()
}
