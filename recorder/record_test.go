package recorder_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/recorder"
)

func TestRecordsAndGivesItsWord(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	var refs []capture.SpoolRef
	var sent []*capture.Request
	for range 50 {
		one := newRequest("POST", "/v1/calls?x=%2F", "hello")
		sent = append(sent, one)
		refs = append(refs, w.capture(one))
	}
	heard.await(refs...)
	for _, one := range sent {
		d, err := w.store.Get(t.Context(), one.ID)
		require.NoError(t, err)
		require.Equal(t, capture.StateReceived, d.State)
		require.Equal(t, "/v1/calls?x=%2F", d.Target)
	}
	w.awaitAcked()
	require.Eventually(t, func() bool { return len(r.ready.Failing()) == 0 }, patience, milli)
	r.stop()
	require.NotEmpty(t, r.ready.Failing(), "a recorder that has stopped consumes nothing")
}

// gated is the real store behind a gate.
type gated struct {
	*sqlite.Store
	entered chan struct{}
	open    chan struct{}
}

func (g *gated) Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error) {
	select {
	case g.entered <- struct{}{}:
	default:
	}
	select {
	case <-g.open:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return g.Store.Record(ctx, items)
}

func TestNoWordAndNoAckBeforeTheCommit(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	g := &gated{w.store, make(chan struct{}, 1), make(chan struct{})}
	r := w.start(g)
	// One that is fine and one that is set aside: neither may earn a word yet.
	refs := []capture.SpoolRef{w.capture(newRequest("POST", "/", "a")), w.publish(capture.Message{Subject: "holdfast.requests.default.POST"}, nil)}
	select {
	case <-g.entered:
	case <-time.After(patience):
		require.FailNow(t, "nothing is recorded")
	}
	// Whatever was published before the commit has arrived after these.
	require.NoError(t, r.conn.Flush())
	require.NoError(t, w.nc.Flush())
	pending, _, err := heard.sub.Pending()
	require.NoError(t, err)
	require.Zero(t, pending, "a word was given before the commit")
	c, err := w.js.Consumer(t.Context(), capture.RequestsStream, capture.RecorderDurable)
	require.NoError(t, err)
	require.Zero(t, c.CachedInfo().AckFloor.Stream, "acknowledged before the commit")
	close(g.open)
	heard.await(refs...)
	w.awaitAcked()
}

func TestRepeatsEarnTheirWord(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	w.start(nil)
	one := newRequest("PUT", "/v1/calls/7", "x")
	bad := capture.Message{Subject: "holdfast.requests.default.POST", ID: "nonsense"}
	heard.await(w.capture(one), w.publish(bad, []byte("?")))
	// The same record comes again, as after a lost word, and once more from
	// another record.
	heard.got = map[uint64]bool{}
	w.index -= 2
	heard.await(w.capture(one), w.publish(bad, []byte("?")), w.capture(one))
	st, err := w.store.Stats(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 1, st.Requests[capture.StateReceived])
	require.Len(t, w.asides(), 1, "a repeat is not set aside twice")
}

func TestPoisonIsSetAsideAndHoldsUpNothing(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	subject := capture.RequestSubject("default", "POST")
	good := newRequest("POST", "/good", "x")
	message, data := good.Message(), append(append([]byte{}, good.Head...), good.Body...)
	change := func(f func(m *capture.Message)) capture.Message {
		m := message
		m.ID = newID().String()
		f(&m)
		return m
	}
	var refs []capture.SpoolRef
	poison := func(m capture.Message, data []byte) { refs = append(refs, w.publish(m, data)) }
	fine := func() *capture.Request {
		r := newRequest("POST", "/good", "x")
		refs = append(refs, w.capture(r))
		return r
	}
	first := fine()
	poison(change(func(m *capture.Message) { m.ID = "" }), data)
	poison(change(func(m *capture.Message) { m.ID = "not a uuid" }), data)
	poison(change(func(m *capture.Message) { m.ID = uuid.NewString() }), data) // version 4: the ledger refuses it
	poison(change(func(m *capture.Message) { m.Capture = "" }), data)
	poison(change(func(m *capture.Message) { m.Capture = "v=2" + m.Capture[3:] }), data)
	poison(change(func(m *capture.Message) { m.Capture += "x" }), data)
	poison(change(func(m *capture.Message) { m.Subject = "holdfast.requests.NO-ROUTE.POST" }), data[:0])
	poison(message, data[:10])
	poison(message, append(data, 'y'))
	middle := fine()
	// A plain "nats pub", without header and data: nobody waits for its word.
	require.NoError(t, w.nc.Publish(subject, nil))
	huge := bytes.Repeat([]byte{0}, 900<<10)
	poison(capture.Message{Subject: subject, ID: newID().String(), Capture: "v=1; kind=unheard-of; ingress=gw1"}, huge)
	last := fine()

	r := w.start(nil)
	heard.await(refs...)
	w.awaitAcked()
	for _, one := range []*capture.Request{first, middle, last} {
		_, err := w.store.Get(t.Context(), one.ID)
		require.NoError(t, err)
	}
	asides := w.asides()
	require.Len(t, asides, len(refs)-3+1)
	for _, a := range asides {
		require.Equal(t, "capture", a.Kind)
		require.NotEmpty(t, a.Reason)
	}
	// One line a batch, not one a message.
	require.LessOrEqual(t, r.log.count("messages were set aside"), 3)
	var answer struct {
		Aside []struct{ Reason, Subject, Data string } `json:"aside"`
	}
	r.get("/v1/aside?limit=100", &answer)
	require.Len(t, answer.Aside, len(asides))
	for _, a := range answer.Aside {
		require.Empty(t, a.Data, "data is for those with a token")
	}
}

func TestLedgerLockedAndUnlocked(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	heard.await(w.capture(newRequest("POST", "/", "before")))

	// Another process's transaction.
	other, err := sql.Open("sqlite", w.path)
	require.NoError(t, err)
	defer other.Close()
	conn, err := other.Conn(t.Context())
	require.NoError(t, err)
	defer conn.Close()
	_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	require.NoError(t, err)
	var refs []capture.SpoolRef
	for range 20 {
		refs = append(refs, w.capture(newRequest("POST", "/", "during")))
	}
	require.Eventually(t, func() bool { return value(t, r.reg, "holdfast_ledger_unavailable") == 1 }, patience, milli)
	require.Eventually(t, func() bool { return len(r.ready.Failing()) > 0 }, patience, milli)
	require.Eventually(t, func() bool { return value(t, r.reg, "holdfast_commit_errors_total") >= 3 }, patience, milli)
	require.Equal(t, 1, r.log.count("a batch is not committed and is tried again"), "logged once, not at each try")
	var page struct{ Requests []struct{} }
	r.get("/v1/requests", &page)
	require.Len(t, page.Requests, 1, "reading goes on")

	_, err = conn.ExecContext(t.Context(), "ROLLBACK")
	require.NoError(t, err)
	heard.await(refs...)
	require.Eventually(t, func() bool { return len(r.ready.Failing()) == 0 }, patience, milli)
	require.Zero(t, value(t, r.reg, "holdfast_ledger_unavailable"))
}

// onDisk is a real store on a disk with room or without.
type onDisk struct {
	*sqlite.Store
	full     *sqlite.Store // the same file, all of the disk held back
	withRoom atomic.Bool
}

func (d *onDisk) Record(ctx context.Context, items []ledger.Item) ([]ledger.Result, error) {
	if d.withRoom.Load() {
		return d.Store.Record(ctx, items)
	}
	return d.full.Record(ctx, items)
}

func TestFullLedgerKeepsTheBatch(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	full, err := sqlite.Open(t.Context(), sqlite.Options{Path: w.path, ReserveBytes: 1 << 60})
	require.NoError(t, err)
	defer full.Close()
	d := &onDisk{Store: w.store, full: full}
	r := w.start(d)
	ref := w.capture(newRequest("POST", "/", "x"))
	require.Eventually(t, func() bool { return value(t, r.reg, "holdfast_ledger_full") == 1 }, patience, milli)
	require.Eventually(t, func() bool { return value(t, r.reg, "holdfast_commit_errors_total") >= 3 }, patience, milli)
	require.Equal(t, 1, r.log.count("a batch is not committed and is tried again"))
	require.Empty(t, w.asides())
	d.withRoom.Store(true)
	heard.await(ref)
	require.Zero(t, value(t, r.reg, "holdfast_ledger_full"))
}

func TestLargeBodyInChunksAnyOrder(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	const part, parts = 256 << 10, 128 // 32 MiB
	body := make([]byte, part*parts)
	_, err := rand.NewChaCha8([32]byte{1}).Read(body)
	require.NoError(t, err)
	sum := sha256.Sum256(body)
	one := newRequest("POST", "/upload", "", "Authorization: Bearer abc")
	one.Body, one.Size, one.Chunks, one.SHA256 = nil, int64(len(body)), parts, hex.EncodeToString(sum[:])

	var refs []capture.SpoolRef
	order := rand.New(rand.NewPCG(1, 2)).Perm(parts)
	for i, n := range order {
		if i == parts/2 {
			refs = append(refs, w.publish(one.Message(), one.Head))
		}
		c := capture.Chunk{ID: one.ID, Route: "default", Ingress: "gw1", Number: n, Data: body[n*part : (n+1)*part]}
		refs = append(refs, w.publish(c.Message("POST"), c.Data))
	}
	heard.await(refs...)

	resp, got := r.do(http.MethodGet, "/v1/requests/"+one.ID.String()+"/http")
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.EqualValues(t, len(got), resp.ContentLength)
	_, rest, err := capture.SplitHead(got)
	require.NoError(t, err)
	require.True(t, bytes.Equal(body, rest), "the body is not the one that was sent")
	require.Empty(t, w.asides())
}

func TestTwoRecordersShareTheWork(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	w.start(nil)
	w.start(w.open())
	var refs []capture.SpoolRef
	for range 300 {
		refs = append(refs, w.capture(newRequest("POST", "/", "x")))
	}
	heard.await(refs...)
	st, err := w.store.Stats(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 300, st.Requests[capture.StateReceived])
}

// What a child process of the tests finds in its environment.
const childURL, childLedger = "RECORDER_TEST_NATS", "RECORDER_TEST_LEDGER"

// child is a recorder in a process of its own.
func child() {
	logger := slog.New(slog.DiscardHandler)
	nc, err := stream.Connect(stream.ConnectOptions{URL: os.Getenv(childURL), Name: "child", Logger: logger})
	check(err)
	store, err := sqlite.Open(context.Background(), sqlite.Options{Path: os.Getenv(childLedger)})
	check(err)
	s, err := defaults()
	check(err)
	rec, err := recorder.New(recorder.Options{
		Settings: s, Store: store, Conn: nc, Logger: logger, Registry: prometheus.NewRegistry(), Ready: service.NewReadiness(),
	})
	check(err)
	check(rec.Run(context.Background()))
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func TestKilledAtRandomAndFollowed(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	spawn := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0], "-test.run=^$")
		cmd.Env = append(os.Environ(), childURL+"="+w.broker.ClientURL(), childLedger+"="+w.path)
		cmd.Stderr = os.Stderr
		require.NoError(t, cmd.Start())
		return cmd
	}
	var refs []capture.SpoolRef
	ids := make(map[uuid.UUID]bool)
	for range 5 {
		cmd := spawn()
		// Killed once it has come so far: in the middle of whatever it does then.
		before, err := w.store.Stats(t.Context())
		require.NoError(t, err)
		least := before.Requests[capture.StateReceived] + int64(random.IntN(400))
		for range 800 {
			one := newRequest("POST", "/", "x")
			ids[one.ID] = true
			refs = append(refs, w.capture(one))
		}
		require.Eventually(t, func() bool {
			st, err := w.store.Stats(t.Context())
			return err == nil && st.Requests[capture.StateReceived] >= least
		}, patience, time.Millisecond)
		require.NoError(t, cmd.Process.Kill())
		_ = cmd.Wait() // it was killed
	}
	// What the killed had in hand comes again after AckWait, a minute; a purge of
	// the consumer's state brings it at once.
	require.NoError(t, w.js.DeleteConsumer(t.Context(), capture.RequestsStream, capture.RecorderDurable))
	require.NoError(t, stream.Provision(t.Context(), w.js, streams))
	r := w.start(nil)
	heard.await(refs...)
	st, err := w.store.Stats(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, len(ids), st.Requests[capture.StateReceived])
	for id := range ids {
		_, err := w.store.Get(t.Context(), id)
		require.NoError(t, err)
	}
	require.Empty(t, w.asides())
	r.stop()
}

func TestBrokerRestarted(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	heard.await(w.capture(newRequest("POST", "/", "before")))
	require.NoError(t, w.broker.Restart(t.Context()))
	require.Eventually(t, func() bool { return w.nc.IsConnected() && w.nc.Flush() == nil }, patience, milli)
	heard.await(w.capture(newRequest("POST", "/", "after")))
	require.Eventually(t, func() bool { return len(r.ready.Failing()) == 0 }, patience, milli)
}

func TestHeartbeatsReachTheLedger(t *testing.T) {
	w := newWorld(t)
	w.start(nil)
	send := func(ingress string, b capture.Heartbeat) {
		data, err := b.Encode()
		require.NoError(t, err)
		require.NoError(t, w.nc.Publish(capture.HeartbeatSubject(ingress), data))
	}
	beat := func(id string) capture.Heartbeat {
		// A clock that is two hours behind.
		now := time.Now().Add(-2 * time.Hour)
		return capture.Heartbeat{Ingress: id, Start: "00ff", Now: now, Unreleased: 3, OldestUnreleased: now.Add(-time.Minute)}
	}
	known := func() map[string]ledger.Ingress {
		list, err := w.store.Ingresses(t.Context())
		require.NoError(t, err)
		m := make(map[string]ledger.Ingress)
		for _, i := range list {
			m[i.ID] = i
		}
		return m
	}
	// Subscribing is part of starting: the first ones may find nobody.
	require.Eventually(t, func() bool {
		send("gw1", beat("gw1"))
		send("gw2", beat("gw2"))
		send("gw2", beat("gw3")) // on another's subject
		require.NoError(t, w.nc.Publish(capture.HeartbeatSubject("gw4"), []byte("?")))
		lost := beat("gw5") // its clock is
		lost.Now = time.Date(9000, 1, 1, 0, 0, 0, 0, time.UTC)
		send("gw5", lost)
		return len(known()) == 2
	}, patience, 20*time.Millisecond)
	one := known()["gw1"]
	require.Equal(t, 3, one.Unreleased)
	require.WithinDuration(t, time.Now(), one.SeenAt, patience)
	require.WithinDuration(t, one.SeenAt.Add(-time.Minute), one.OldestUnreleased, 2*time.Second)

	bye := beat("gw2")
	bye.Now, bye.Stopped = bye.Now.Add(time.Second), true
	send("gw2", bye)
	require.Eventually(t, func() bool { return len(known()) == 1 }, patience, milli)
	require.Contains(t, known(), "gw1")
}

func TestStreamIsTrimmedBehindTheLedger(t *testing.T) {
	w := newWorld(t)
	small := stream.Streams{Replicas: 1, MaxBytes: 4 << 20}
	require.NoError(t, stream.Provision(t.Context(), w.js, small))
	heard := w.listen()
	w.start(nil)
	body := string(bytes.Repeat([]byte("x"), 100<<10))
	for range 3 { // one and a half times as much as the stream holds
		var refs []capture.SpoolRef
		for range 20 {
			refs = append(refs, w.capture(newRequest("POST", "/", body)))
		}
		heard.await(refs...)
		require.Eventually(t, func() bool {
			s, err := w.js.Stream(t.Context(), capture.RequestsStream)
			return err == nil && s.CachedInfo().State.Bytes <= uint64(small.MaxBytes)*6/10
		}, patience, milli)
	}
}

func TestExpiry(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	gone, kept := newRequest("POST", "/gone", "x"), newRequest("POST", "/kept", "x")
	done := capture.Outcome{ID: gone.ID, Ingress: "gw1", Attempt: capture.Attempt{
		Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: 200, Verdict: capture.Processed,
	}}
	errs, err := w.store.Complete(t.Context(), []ledger.Fact{{Outcome: &done}})
	require.NoError(t, errors.Join(append(errs, err)...))
	refs := []capture.SpoolRef{w.capture(gone), w.capture(kept)}
	first := w.start(nil)
	heard.await(refs...)
	first.stop()
	// The payload of what is processed goes at the first look of one that keeps
	// none; what is open stays.
	r := w.start(nil, func(o *recorder.Options) { o.Settings.KeepProcessed = 0; o.Settings.KeepProcessedBytes = 0 })
	require.Eventually(t, func() bool {
		d, err := w.store.Get(t.Context(), gone.ID)
		return err == nil && d.PayloadExpired
	}, patience, milli)
	resp, body := r.do(http.MethodGet, "/v1/requests/"+gone.ID.String()+"/http")
	require.Equal(t, http.StatusGone, resp.StatusCode, string(body))
	var single struct {
		State   string
		Expired bool `json:"payload_expired"`
		Headers []any
	}
	r.get("/v1/requests/"+gone.ID.String(), &single)
	require.True(t, single.Expired)
	require.Empty(t, single.Headers)
	resp, _ = r.do(http.MethodGet, "/v1/requests/"+kept.ID.String()+"/http")
	require.Equal(t, http.StatusOK, resp.StatusCode)
}

func TestMetricsByTheirNames(t *testing.T) {
	w := newWorld(t)
	heard := w.listen()
	r := w.start(nil)
	one := newRequest("POST", "/", "x")
	failed := capture.Outcome{ID: one.ID, Ingress: "gw1", Attempt: capture.Attempt{
		Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: 503, Verdict: capture.Failed,
	}}
	errs, err := w.store.Complete(t.Context(), []ledger.Fact{{Outcome: &failed}})
	require.NoError(t, errors.Join(append(errs, err)...))
	heard.await(w.capture(one), w.publish(capture.Message{Subject: "holdfast.requests.default.POST"}, nil))
	require.Eventually(t, func() bool { return value(t, r.reg, "holdfast_aside") == 1 }, patience, milli)
	families, err := r.reg.Gather()
	require.NoError(t, err)
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
	}
	require.Subset(t, names, []string{
		"holdfast_consumer_pending", "holdfast_batch_size", "holdfast_ledger_requests",
		"holdfast_oldest_replayable_timestamp_seconds", "holdfast_aside", "holdfast_ledger_free_bytes",
		"holdfast_ledger_early", "holdfast_ledger_early_dropped_total",
	})
	require.InDelta(t, float64(one.ReceivedAt.Unix()), value(t, r.reg, "holdfast_oldest_replayable_timestamp_seconds"), 1)
}

// value is the sum of a metric over its labels, -1 when it is not there.
func value(t testing.TB, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		var sum float64
		for _, m := range f.GetMetric() {
			sum += m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
		return sum
	}
	return -1
}

func TestProvision(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{capture.RequestsStream, capture.CompletionsStream} {
		require.NoError(t, w.js.DeleteStream(t.Context(), name))
	}
	for range 2 { // it may be repeated
		require.NoError(t, recorder.Provision(t.Context(), w.connect(), streams))
		require.NoError(t, stream.Check(t.Context(), w.js, streams))
	}
	// Nobody listens: it says so within its bound.
	nc, err := stream.Connect(stream.ConnectOptions{URL: "nats://127.0.0.1:1", Name: "test", Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer nc.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, recorder.Provision(ctx, nc, streams), stream.ErrDisconnected)
}

func TestStreamMissingAndMadeLater(t *testing.T) {
	w := newWorld(t)
	require.NoError(t, w.js.DeleteStream(t.Context(), capture.RequestsStream))
	heard := w.listen()
	r := w.start(nil)
	require.Eventually(t, func() bool { return r.log.count("streams are not made as they must be") == 1 }, patience, milli)
	require.NotEmpty(t, r.ready.Failing())
	require.NoError(t, stream.Provision(t.Context(), w.js, streams))
	heard.await(w.capture(newRequest("POST", "/", "x")))
	require.Eventually(t, func() bool { return len(r.ready.Failing()) == 0 }, patience, milli)
}

func TestNewRefusesWhatIsMissing(t *testing.T) {
	w := newWorld(t)
	_, err := recorder.New(recorder.Options{})
	require.ErrorContains(t, err, "required")
	s, err := defaults()
	require.NoError(t, err)
	o := recorder.Options{
		Settings: s, Store: w.store, Conn: w.nc, Logger: slog.New(slog.DiscardHandler), Ready: service.NewReadiness(),
	}
	for name, f := range map[string]func(){
		"HOLDFAST_RECORDER_ADDR": func() { s.RecorderAddr = "0.0.0.0:0" },
		"token":                  func() { s.APITokenFile = "/does/not/exist" },
	} {
		*s, o.Registry = recorder.Settings{Recorder: service.Recorder{RecorderAddr: "127.0.0.1:0"}}, prometheus.NewRegistry()
		f()
		_, err := recorder.New(o)
		require.ErrorContains(t, err, name)
	}
	// Stopped without having run, twice.
	*s, o.Registry = recorder.Settings{Recorder: service.Recorder{RecorderAddr: "127.0.0.1:0"}}, prometheus.NewRegistry()
	rec, err := recorder.New(o)
	require.NoError(t, err)
	require.NoError(t, rec.Stop(t.Context()))
	require.NoError(t, rec.Stop(t.Context()))
	require.NoError(t, rec.Run(t.Context()))
}
