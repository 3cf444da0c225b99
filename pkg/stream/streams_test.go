package stream_test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func TestProvisionMakesWhatCheckAsksFor(t *testing.T) {
	b := startBroker(t)
	_, js := b.connect(t)
	err := stream.Check(t.Context(), js, streams)
	require.ErrorIs(t, err, stream.ErrMissing)
	require.ErrorContains(t, err, "stream HOLDFAST_REQUESTS, stream HOLDFAST_COMPLETIONS")
	require.ErrorContains(t, err, "recorder provision")

	require.NoError(t, stream.Provision(t.Context(), js, streams))
	require.NoError(t, stream.Check(t.Context(), js, streams))
	require.NoError(t, stream.Provision(t.Context(), js, streams), "twice")

	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.NoError(t, st.DeleteConsumer(t.Context(), capture.RecorderDurable))
	require.NoError(t, stream.CheckStreams(t.Context(), js, streams))
	err = stream.Check(t.Context(), js, streams)
	require.ErrorIs(t, err, stream.ErrMissing)
	require.ErrorContains(t, err, "consumer recorder of HOLDFAST_REQUESTS")
	require.NoError(t, stream.Check(t.Context(), js, streams, capture.CompletionsStream))
}

func TestCheckNamesAllDifferencesAtOnceAndProvisionMendsThem(t *testing.T) {
	b := startBroker(t)
	_, js := b.connect(t)
	for _, name := range []string{"requests", "completions"} {
		st, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
			Name:     map[string]string{"requests": capture.RequestsStream, "completions": capture.CompletionsStream}[name],
			Subjects: []string{"holdfast." + name + ".*"}, Discard: jetstream.DiscardOld, MaxAge: time.Hour, MaxMsgs: 7,
			MaxBytes: 1 << 20, Metadata: map[string]string{"owner": "somebody"},
		})
		require.NoError(t, err)
		_, err = st.CreateConsumer(t.Context(), jetstream.ConsumerConfig{
			Durable:   map[string]string{"requests": capture.RecorderDurable, "completions": capture.AckerDurable}[name],
			AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 3, AckWait: time.Second, FilterSubject: "holdfast." + name + ".x",
		})
		require.NoError(t, err)
	}
	err := stream.Check(t.Context(), js, streams)
	require.ErrorIs(t, err, stream.ErrDiffers)
	for _, want := range []string{
		"stream HOLDFAST_REQUESTS has subjects holdfast.requests.* instead of holdfast.requests.>",
		"stream HOLDFAST_REQUESTS has discard DiscardOld instead of DiscardNew",
		"stream HOLDFAST_REQUESTS has max_bytes 1048576 instead of 67108864",
		"stream HOLDFAST_REQUESTS has max_msgs 7 instead of -1",
		"stream HOLDFAST_REQUESTS has max_age 1h0m0s instead of 0s",
		"stream HOLDFAST_REQUESTS has deny_delete false instead of true",
		"stream HOLDFAST_REQUESTS has allow_direct false instead of true",
		"stream HOLDFAST_COMPLETIONS has max_bytes 1048576 instead of 16777216",
		"consumer recorder of HOLDFAST_REQUESTS has max_deliver 3 instead of -1",
		"consumer recorder of HOLDFAST_REQUESTS has ack_wait 1s instead of 10s",
		"consumer recorder of HOLDFAST_REQUESTS has max_ack_pending 1000 instead of 20000",
		"consumer acker of HOLDFAST_COMPLETIONS has filter_subject holdfast.completions.x instead of ",
		"recorder provision",
	} {
		require.ErrorContains(t, err, want)
	}
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	require.NoError(t, stream.Check(t.Context(), js, streams))
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.Equal(t, "somebody", st.CachedInfo().Config.Metadata["owner"], "what Holdfast has no opinion about stays")
}

func TestProvisionKeepsWhatAStreamHolds(t *testing.T) {
	_, _, js := provisioned(t)
	publish(t, js, 0, 100)
	larger := streams
	larger.MaxBytes *= 2
	require.ErrorIs(t, stream.Check(t.Context(), js, larger), stream.ErrDiffers)
	require.NoError(t, stream.Provision(t.Context(), js, larger))
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.Equal(t, uint64(100), st.CachedInfo().State.Msgs)
}

func TestMetricsAreSharedByTheServicesOfAProcess(t *testing.T) {
	registry := prometheus.NewRegistry()
	_, err := stream.NewMetrics(registry)
	require.NoError(t, err)
	_, err = stream.NewMetrics(registry)
	require.NoError(t, err)
}

func TestWordsGoToTheirIngressesInRanges(t *testing.T) {
	_, nc, _ := provisioned(t)
	sub, err := nc.SubscribeSync("holdfast.committed.*")
	require.NoError(t, err)
	w := stream.NewWords(nc)
	w.Publish() // nothing
	for _, i := range []uint64{3, 1, 2, 9} {
		w.Add(capture.SpoolRef{Ingress: "a", Start: "s1", Index: i})
	}
	w.Add(capture.SpoolRef{Ingress: "a", Start: "s2", Index: 1}, capture.SpoolRef{Ingress: "b", Start: "s1", Index: 1}, capture.SpoolRef{})
	w.Publish()
	w.Publish() // it is forgotten
	for i := range uint64(2500) {
		w.Add(capture.SpoolRef{Ingress: "c", Start: "s3", Index: 2 * i})
	}
	w.Publish()
	require.NoError(t, nc.Flush())

	type word struct {
		subject, start string
		ranges         int
	}
	var got []word
	for range 6 {
		m, err := sub.NextMsg(patience)
		require.NoError(t, err)
		w, err := capture.DecodeWord(m.Data)
		require.NoError(t, err)
		got = append(got, word{m.Subject, w.Start, len(w.Released)})
	}
	require.ElementsMatch(t, []word{
		{"holdfast.committed.a", "s1", 2}, {"holdfast.committed.a", "s2", 1}, {"holdfast.committed.b", "s1", 1},
		{"holdfast.committed.c", "s3", 1000}, {"holdfast.committed.c", "s3", 1000}, {"holdfast.committed.c", "s3", 500},
	}, got)
	pending, _, err := sub.Pending()
	require.NoError(t, err)
	require.Zero(t, pending)
}

func newTrimmer(t *testing.T, js jetstream.JetStream) *stream.Trimmer {
	t.Helper()
	trimmer, err := stream.NewTrimmer(stream.TrimOptions{
		JS: js, Stream: capture.RequestsStream, Durable: capture.RecorderDurable, Every: time.Millisecond,
		Metrics: metrics(t), Logger: silent,
	})
	require.NoError(t, err)
	return trimmer
}

// A stream far smaller than what goes through it never refuses for good, because
// what is committed makes room, and loses nothing.
func TestTrimsBehindTheCommitsSoThatTheStreamNeverFills(t *testing.T) {
	b := startBroker(t)
	nc, js := b.connect(t)
	require.NoError(t, stream.Provision(t.Context(), js, stream.Streams{Replicas: 1, MaxBytes: 1 << 20}))
	s := newStore()
	stop := run(t, newConsumer(t, nc), func(ctx context.Context, batch []stream.Msg) error {
		for i := range batch {
			batch[i].Data = batch[i].Data[:8]
		}
		return s.commit(ctx, batch)
	})
	ctx, cancel := context.WithCancel(t.Context())
	trimmed := make(chan error, 1)
	go func() { trimmed <- newTrimmer(t, js).Run(ctx) }()

	body := bytes.Repeat([]byte("x"), 10<<10)
	for i := range 1000 { // ten times the stream
		copy(body, strconv.Itoa(10000000+i))
		require.Eventually(t, func() bool {
			_, err := js.Publish(t.Context(), capture.RequestSubject("default", "POST"), body)
			return err == nil
		}, patience, time.Millisecond)
	}
	s.await(t, 1000)
	awaitAcked(t, js)
	require.Eventually(t, func() bool {
		st, err := js.Stream(t.Context(), capture.RequestsStream)
		return err == nil && st.CachedInfo().State.Bytes <= 540<<10
	}, patience, time.Millisecond)
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.Greater(t, st.CachedInfo().State.Bytes, uint64(200<<10), "a window to look at is kept")
	cancel()
	require.NoError(t, <-trimmed)
	stop()
}

func TestTrimsNothingThatIsNotAcknowledged(t *testing.T) {
	b := startBroker(t)
	_, js := b.connect(t)
	require.NoError(t, stream.Provision(t.Context(), js, stream.Streams{Replicas: 1, MaxBytes: 1 << 20}))
	body := bytes.Repeat([]byte("x"), 10<<10)
	for range 90 {
		_, err := js.Publish(t.Context(), capture.RequestSubject("default", "POST"), body)
		require.NoError(t, err)
	}
	c, err := js.Consumer(t.Context(), capture.RequestsStream, capture.RecorderDurable)
	require.NoError(t, err)
	messages, err := c.Fetch(90)
	require.NoError(t, err)
	n := 0
	for m := range messages.Messages() {
		if n++; n != 11 { // the eleventh stays open
			require.NoError(t, m.DoubleAck(t.Context()))
		}
	}
	require.NoError(t, newTrimmer(t, js).Trim(t.Context()))
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.Equal(t, uint64(11), st.CachedInfo().State.FirstSeq)
}

// Power cuts can take the last messages of a stream whose consumer has
// acknowledged them: their sequences come again, with other messages.
func TestAStreamThatWasCutBackGoesOn(t *testing.T) {
	b, nc, js := provisioned(t)
	s := newStore()
	stop := run(t, newConsumer(t, nc), s.commit)
	publish(t, js, 0, 100)
	s.await(t, 100)
	awaitAcked(t, js)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	options := embednats.Options{
		StoreDir: b.dir, Addr: b.ClientURL()[len("nats://"):], MaxStoreBytes: 4 * streams.StoreBytes(), Logger: silent,
	}
	before := nc.Stats().Reconnects
	require.NoError(t, b.Shutdown(ctx))
	messages := filepath.Join(b.dir, "jetstream", "$G", "streams", capture.RequestsStream, "msgs")
	early := filepath.Join(t.TempDir(), "msgs")
	require.NoError(t, os.CopyFS(early, os.DirFS(messages)))

	// A second life: fifty more, committed and acknowledged.
	again, err := embednats.Start(options)
	require.NoError(t, err)
	connectedAgain := func(times uint64) {
		require.Eventually(t, func() bool { return nc.Stats().Reconnects >= before+times && nc.IsConnected() }, patience, time.Millisecond)
	}
	connectedAgain(1)
	publish(t, js, 100, 150)
	s.await(t, 150)
	awaitAcked(t, js)
	require.NoError(t, again.Shutdown(ctx))

	// The fifty are gone, the consumer's state is not.
	require.NoError(t, os.RemoveAll(messages))
	require.NoError(t, os.CopyFS(messages, os.DirFS(early)))
	last, err := embednats.Start(options)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, last.Shutdown(context.Background())) })
	connectedAgain(2)
	st, err := js.Stream(t.Context(), capture.RequestsStream)
	require.NoError(t, err)
	require.Equal(t, uint64(100), st.CachedInfo().State.LastSeq)

	trimmer := newTrimmer(t, js)
	require.NoError(t, trimmer.Trim(t.Context()))
	publish(t, js, 1000, 1060) // sequences 101 to 160
	s.await(t, 210)
	require.NoError(t, trimmer.Trim(t.Context()))
	stop()
}
