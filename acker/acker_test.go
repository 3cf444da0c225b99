package acker_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/acker"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for things that take milliseconds.
const patience = 20 * time.Second

var (
	silent  = slog.New(slog.DiscardHandler)
	streams = stream.Streams{Replicas: 1, MaxBytes: 64 << 20}
)

// world is a broker, a ledger and an acker, all real.
type world struct {
	t      testing.TB
	broker *embednats.Server
	conn   *nats.Conn
	js     jetstream.JetStream
	store  *sqlite.Store
	path   string
	gate   *gate
	url    string
	ready  *service.Readiness
	stop   func()
}

// gate is the store with a door: while it is shut, commits fail as those of a
// locked ledger do. It counts them.
type gate struct {
	*sqlite.Store
	mu      sync.Mutex
	shut    error
	commits int
	tried   chan struct{}
}

func (g *gate) Complete(ctx context.Context, facts []ledger.Fact) ([]error, error) {
	g.mu.Lock()
	err := g.shut
	g.commits++
	g.mu.Unlock()
	select {
	case g.tried <- struct{}{}:
	default:
	}
	if err != nil {
		return nil, err
	}
	return g.Store.Complete(ctx, facts)
}

func (g *gate) set(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.shut = err
}

func newWorld(t testing.TB, change ...func(*acker.Options)) *world {
	t.Helper()
	w := &world{t: t, ready: service.NewReadiness()}
	var err error
	w.broker, err = embednats.Start(embednats.Options{
		StoreDir: t.TempDir(), Addr: "127.0.0.1:0", MaxStoreBytes: 2 * streams.StoreBytes(), Logger: silent,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.broker.Shutdown(context.Background())) })
	w.conn, err = stream.Connect(stream.ConnectOptions{InProcess: w.broker.InProcess(), Name: "test", Logger: silent})
	require.NoError(t, err)
	t.Cleanup(w.conn.Close)
	w.js, err = jetstream.New(w.conn)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), w.js, streams))
	w.path = filepath.Join(t.TempDir(), "ledger.db")
	w.store, err = sqlite.Open(t.Context(), sqlite.Options{Path: w.path, BusyTimeout: 50 * time.Millisecond})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.store.Close()) })
	w.gate = &gate{Store: w.store, tried: make(chan struct{}, 1)}
	w.start(change...)
	return w
}

// start runs an acker on what is there.
func (w *world) start(change ...func(*acker.Options)) {
	w.t.Helper()
	o := acker.Options{
		Store: w.gate, Conn: w.conn, Streams: streams, Addr: "127.0.0.1:0",
		Registry: prometheus.NewRegistry(), Ready: w.ready, Logger: silent,
	}
	for _, f := range change {
		f(&o)
	}
	a, err := acker.New(o)
	require.NoError(w.t, err)
	w.url = a.URL()
	done := make(chan error, 1)
	go func() { done <- a.Run(context.Background()) }()
	var once sync.Once
	w.stop = func() {
		once.Do(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			require.NoError(w.t, a.Stop(ctx))
			require.NoError(w.t, <-done)
		})
	}
	w.t.Cleanup(w.stop)
}

// capture records a request, as the recorder does, and gives its id.
func (w *world) capture() uuid.UUID {
	w.t.Helper()
	id := uuid.Must(uuid.NewV7())
	r := &capture.Request{
		ID: id, Route: "default", Ingress: "host", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"),
	}
	_, err := w.store.Record(w.t.Context(), []ledger.Item{{Captured: capture.Captured{Request: r}}})
	require.NoError(w.t, err)
	return id
}

func (w *world) state(id uuid.UUID) capture.State {
	w.t.Helper()
	d, err := w.store.Get(w.t.Context(), id)
	require.NoError(w.t, err)
	return d.State
}

func (w *world) await(id uuid.UUID, want capture.State) {
	w.t.Helper()
	require.Eventually(w.t, func() bool { return w.state(id) == want }, patience, 2*time.Millisecond, "state %s", want)
}

func (w *world) publish(subject string, data []byte, ref string) {
	w.t.Helper()
	m := &nats.Msg{Subject: subject, Data: data, Header: nats.Header{}}
	if ref != "" {
		m.Header.Set(capture.HeaderSpool, ref)
	}
	_, err := w.js.PublishMsg(w.t.Context(), m)
	require.NoError(w.t, err)
}

func outcome(id uuid.UUID, status int, verdict capture.Verdict) []byte {
	o := capture.Outcome{ID: id, Ingress: "host", Attempt: capture.Attempt{
		Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: status, Verdict: verdict,
	}}
	return o.AppendJSON(nil)
}

// answer is what an HTTP request got.
type answer struct {
	status  int
	header  http.Header
	problem service.Problem
}

func (w *world) do(method, path, body string, header ...string) answer {
	w.t.Helper()
	r, err := http.NewRequestWithContext(w.t.Context(), method, w.url+path, strings.NewReader(body))
	require.NoError(w.t, err)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(r)
	require.NoError(w.t, err)
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	require.NoError(w.t, err)
	a := answer{status: resp.StatusCode, header: resp.Header}
	if resp.StatusCode >= 400 {
		require.Equal(w.t, "application/problem+json", resp.Header.Get("Content-Type"))
		require.NoError(w.t, json.Unmarshal(data, &a.problem))
	}
	return a
}

func event(id uuid.UUID, outcome string) string {
	return fmt.Sprintf(`{"id":%q,"outcome":%q}`, id, outcome)
}

func (w *world) asides() []ledger.Aside {
	w.t.Helper()
	list, _, err := w.store.AsideList(w.t.Context(), "", 100)
	require.NoError(w.t, err)
	return list
}

func TestOutcomesAndEventsOfTheStreamAreCommitted(t *testing.T) {
	w := newWorld(t)
	one, two, three, four := w.capture(), w.capture(), w.capture(), w.capture()
	w.publish(capture.OutcomeSubject("default"), outcome(one, 200, capture.Processed), "")
	w.publish(capture.OutcomeSubject("default"), outcome(two, 503, capture.Failed), "")
	w.publish(capture.EventSubject("_"), []byte("["+event(three, "processed")+","+event(two, "processed")+"]"), "")
	w.publish(capture.EventSubject("default"), []byte(event(four, "processed")+"\n"+event(one, "failed")), "")
	for _, id := range []uuid.UUID{one, two, three, four} {
		w.await(id, capture.StateProcessed)
	}
	require.Empty(t, w.asides())
}

func TestACompletionMayComeBeforeItsRequest(t *testing.T) {
	w := newWorld(t)
	id := uuid.Must(uuid.NewV7())
	require.Equal(t, http.StatusAccepted, w.do("PUT", "/v1/completions/"+id.String(), "").status)
	r := &capture.Request{
		ID: id, Route: "default", Ingress: "host", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte("POST /x HTTP/1.1\r\nContent-Length: 0\r\n\r\n"),
	}
	_, err := w.store.Record(t.Context(), []ledger.Item{{Captured: capture.Captured{Request: r}}})
	require.NoError(t, err)
	require.Equal(t, capture.StateProcessed, w.state(id))
}

// A word says that the ledger holds an outcome, so it must not come while the
// ledger cannot be written, and must come afterwards, for repeats too.
func TestWordsComeAfterTheCommit(t *testing.T) {
	w := newWorld(t)
	words, err := w.conn.SubscribeSync("holdfast.committed.*")
	require.NoError(t, err)
	w.gate.set(ledger.ErrUnavailable)
	id := w.capture()
	w.publish(capture.OutcomeSubject("default"), outcome(id, 200, capture.Processed), "host/abc/7")
	for range 3 { // the same batch, again and again
		<-w.gate.tried
	}
	require.NoError(t, w.conn.Flush())
	pending, _, err := words.Pending()
	require.NoError(t, err)
	require.Zero(t, pending, "a word was given before the commit")
	require.Equal(t, capture.StateReceived, w.state(id))

	w.gate.set(nil)
	next := func() capture.Word {
		m, err := words.NextMsg(patience)
		require.NoError(t, err)
		require.Equal(t, "holdfast.committed.host", m.Subject)
		word, err := capture.DecodeWord(m.Data)
		require.NoError(t, err)
		return word
	}
	require.Equal(t, capture.Word{Start: "abc", Released: [][2]uint64{{7, 7}}}, next())
	require.Equal(t, capture.StateProcessed, w.state(id), "the word was given before the commit")
	w.publish(capture.OutcomeSubject("default"), outcome(id, 200, capture.Processed), "host/abc/7")
	require.Equal(t, capture.Word{Start: "abc", Released: [][2]uint64{{7, 7}}}, next(), "a repeat earns its word too")
}

// The ledger's write lock is held by another connection, for real.
func TestALockedLedgerHoldsUpNothingForGood(t *testing.T) {
	w := newWorld(t)
	id := w.capture()
	unlock := lock(t, w)
	w.publish(capture.OutcomeSubject("default"), outcome(id, 200, capture.Processed), "")
	a := w.do("POST", "/v1/completions", event(id, "processed"))
	require.Equal(t, http.StatusServiceUnavailable, a.status)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, capture.StateReceived, w.state(id))
	unlock()
	w.await(id, capture.StateProcessed)
}

func TestPoisonIsSetAsideAndBlocksNothing(t *testing.T) {
	w := newWorld(t)
	words, err := w.conn.SubscribeSync("holdfast.committed.*")
	require.NoError(t, err)
	first, last := w.capture(), w.capture()
	w.publish(capture.OutcomeSubject("default"), outcome(first, 200, capture.Processed), "")
	w.publish(capture.OutcomeSubject("default"), []byte("\x00\xff not JSON"), "host/abc/1")
	w.publish(capture.EventSubject("default"), []byte(`{"id":"x"}`), "")
	w.publish(capture.EventSubject("default"), nil, "")
	w.publish("holdfast.completions.default.other", []byte("{}"), "")
	w.publish(capture.OutcomeSubject("default"), []byte(`{"v":9,"id":"0198c5e4-0000-7000-8000-000000000000","attempt":1}`), "")
	w.publish(capture.OutcomeSubject("default"), outcome(last, 200, capture.Processed), "")
	w.await(first, capture.StateProcessed)
	w.await(last, capture.StateProcessed)
	require.Eventually(t, func() bool { return len(w.asides()) == 5 }, patience, 2*time.Millisecond)
	for _, a := range w.asides() {
		require.Equal(t, "completion", a.Kind)
		require.NotEmpty(t, a.Reason)
		require.NotEmpty(t, a.Subject)
	}
	// What was set aside is held too.
	m, err := words.NextMsg(patience)
	require.NoError(t, err)
	word, err := capture.DecodeWord(m.Data)
	require.NoError(t, err)
	require.Equal(t, [][2]uint64{{1, 1}}, word.Released)
	require.Eventually(t, func() bool {
		c, err := w.js.Consumer(t.Context(), capture.CompletionsStream, capture.AckerDurable)
		return err == nil && c.CachedInfo().AckFloor.Stream == 7
	}, patience, 2*time.Millisecond)
}

// An API that may publish events must not be able to speak for the gateway.
func TestAnEventSubjectCarriesNoOutcomesAndReleasesNothing(t *testing.T) {
	w := newWorld(t)
	words, err := w.conn.SubscribeSync("holdfast.committed.*")
	require.NoError(t, err)
	rejected, plain := w.capture(), w.capture()
	// An outcome: as an event it has no outcome field.
	w.publish(capture.EventSubject("default"), outcome(rejected, 400, capture.Rejected), "host/abc/1")
	w.publish(capture.EventSubject("default"), []byte(event(plain, "processed")), "host/abc/2")
	w.await(plain, capture.StateProcessed)
	require.Eventually(t, func() bool { return len(w.asides()) == 1 }, patience, 2*time.Millisecond)
	require.Equal(t, capture.StateReceived, w.state(rejected))
	require.NoError(t, w.conn.Flush())
	pending, _, err := words.Pending()
	require.NoError(t, err)
	require.Zero(t, pending, "an API released a spool record")
}

func TestCompletionsOverHTTP(t *testing.T) {
	w := newWorld(t)
	for name, send := range map[string]func(id uuid.UUID) answer{
		"one event": func(id uuid.UUID) answer { return w.do("POST", "/v1/completions", event(id, "processed")) },
		"an array":  func(id uuid.UUID) answer { return w.do("POST", "/v1/completions", "["+event(id, "processed")+"]") },
		"lines": func(id uuid.UUID) answer {
			return w.do("POST", "/v1/completions", event(id, "failed")+"\n"+event(id, "processed")+"\n")
		},
		"a form's type": func(id uuid.UUID) answer {
			return w.do("POST", "/v1/completions", event(id, "processed"), "Content-Type", "application/x-www-form-urlencoded")
		},
		"bare put": func(id uuid.UUID) answer { return w.do("PUT", "/v1/completions/"+id.String(), "") },
		"put of fields": func(id uuid.UUID) answer {
			return w.do("PUT", "/v1/completions/"+id.String(), `{"attempt":2,"detail":"row 7"}`)
		},
		"put of an event": func(id uuid.UUID) answer { return w.do("PUT", "/v1/completions/"+id.String(), event(id, "processed")) },
		"delete":          func(id uuid.UUID) answer { return w.do("DELETE", "/v1/requests/"+id.String(), "") },
	} {
		t.Run(name, func(t *testing.T) {
			id := w.capture()
			require.Equal(t, http.StatusAccepted, send(id).status)
			// Committed by the time of the answer.
			require.Equal(t, capture.StateProcessed, w.state(id))
			require.Equal(t, http.StatusAccepted, send(id).status, "once more")
		})
	}
	id := w.capture()
	require.Equal(t, http.StatusAccepted, w.do("PUT", "/v1/completions/"+id.String(), `{"outcome":"failed","detail":"no"}`).status)
	d, err := w.store.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, capture.Failed, d.Facts.Events[0].Outcome)
	require.Equal(t, "no", d.Facts.Events[0].Detail)
}

func TestMalformedCompletionsAreRefusedByName(t *testing.T) {
	w := newWorld(t)
	id := w.capture()
	ok, path := event(id, "processed"), "/v1/completions/"+id.String()
	for name, c := range map[string]struct {
		method, path, body string
		item               int // -1: none
		parameter          string
	}{
		"nothing":                  {"POST", "/v1/completions", "", -1, ""},
		"no JSON":                  {"POST", "/v1/completions", "processed", 0, ""},
		"second has no id":         {"POST", "/v1/completions", "[" + ok + `,{"outcome":"processed"}]`, 1, "id"},
		"third line's outcome":     {"POST", "/v1/completions", ok + "\n" + ok + "\n" + event(id, "done"), 2, "outcome"},
		"an attempt that is text":  {"POST", "/v1/completions", `{"id":"` + id.String() + `","outcome":"processed","attempt":"1"}`, 0, "attempt"},
		"an array that breaks off": {"POST", "/v1/completions", "[" + ok, -1, ""},
		"a query":                  {"POST", "/v1/completions?sync=1", ok, -1, "sync"},
		"a put's id differs":       {"PUT", path, event(uuid.Must(uuid.NewV7()), "processed"), 0, "id"},
		"a put's ID differs":       {"PUT", path, `{"ID":"` + uuid.NewString() + `"}`, 0, "id"},
		"a put's outcome":          {"PUT", path, `{"outcome":"rejected"}`, 0, "outcome"},
		"a put of an array":        {"PUT", path, "[]", 0, ""},
		"a put of null":            {"PUT", path, "null", 0, ""},
		"a put's query":            {"PUT", path + "?outcome=failed", "", -1, "outcome"},
		"a path without UUID":      {"PUT", "/v1/completions/7", "", -1, "id"},
		"a delete's id":            {"DELETE", "/v1/requests/" + uuid.Nil.String(), "", -1, "id"},
		"a delete's query":         {"DELETE", "/v1/requests/" + id.String() + "?x", "", -1, "x"},
	} {
		t.Run(name, func(t *testing.T) {
			a := w.do(c.method, c.path, c.body)
			require.Equal(t, http.StatusBadRequest, a.status)
			require.Equal(t, c.parameter, a.problem.Parameter)
			require.NotEmpty(t, a.problem.Detail)
			if c.item < 0 {
				require.Nil(t, a.problem.Item)
			} else {
				require.NotNil(t, a.problem.Item)
				require.Equal(t, c.item, *a.problem.Item)
			}
		})
	}
	require.Equal(t, capture.StateReceived, w.state(id), "all or nothing")
	require.Equal(t, http.StatusNotFound, w.do("GET", "/nothing", "").status)
	require.Equal(t, http.StatusMethodNotAllowed, w.do("GET", "/v1/completions", "").status)
	require.Equal(t, http.StatusUnsupportedMediaType, w.do("POST", "/v1/completions", ok, "Content-Encoding", "gzip").status)
}

func TestOversizedCompletionsAreRefused(t *testing.T) {
	w := newWorld(t)
	id := w.capture()
	line := event(id, "processed") + "\n"
	require.Equal(t, http.StatusRequestEntityTooLarge, w.do("POST", "/v1/completions", strings.Repeat(line, 5_001)).status)
	require.Equal(t, http.StatusRequestEntityTooLarge, w.do("POST", "/v1/completions", strings.Repeat(" ", 1<<20)+line).status)
	require.Equal(t, http.StatusRequestEntityTooLarge, w.do("PUT", "/v1/completions/"+id.String(), `{"x":"`+strings.Repeat("y", 64<<10)+`"}`).status)
	require.Equal(t, capture.StateReceived, w.state(id))
	require.Equal(t, http.StatusAccepted, w.do("POST", "/v1/completions", strings.Repeat(line, 5_000)).status, "the largest allowed")
	require.Equal(t, capture.StateProcessed, w.state(id))
}

// Without a length the size shows only while reading.
func TestABodyOfUnknownLengthIsBounded(t *testing.T) {
	w := newWorld(t)
	r, err := http.NewRequestWithContext(t.Context(), "POST", w.url+"/v1/completions", io.LimitReader(spaces{}, 2<<20))
	require.NoError(t, err)
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(r)
	require.NoError(t, err)
	require.Equal(t, http.StatusRequestEntityTooLarge, resp.StatusCode)
	require.NoError(t, resp.Body.Close())
}

type spaces struct{}

func (spaces) Read(p []byte) (int, error) {
	copy(p, bytes.Repeat([]byte(" "), len(p)))
	return len(p), nil
}

// lock takes the ledger's write lock on a connection of its own, as another
// process may.
func lock(t *testing.T, w *world) (unlock func()) {
	t.Helper()
	db, err := sql.Open("sqlite", w.path)
	require.NoError(t, err)
	conn, err := db.Conn(t.Context())
	require.NoError(t, err)
	// The acker's own ping may hold the lock for a moment.
	_, err = conn.ExecContext(t.Context(), "PRAGMA busy_timeout = 10000")
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "BEGIN IMMEDIATE")
	require.NoError(t, err)
	return func() {
		_, err := conn.ExecContext(t.Context(), "ROLLBACK")
		require.NoError(t, err)
		require.NoError(t, conn.Close())
		require.NoError(t, db.Close())
	}
}

func TestATokenIsAskedFor(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte("secret\n"), 0o600))
	w := newWorld(t, func(o *acker.Options) { o.API = service.API{APITokenFile: file} })
	id := w.capture()
	path := "/v1/completions/" + id.String()
	require.Equal(t, http.StatusUnauthorized, w.do("PUT", path, "").status)
	require.Equal(t, http.StatusUnauthorized, w.do("PUT", path, "", "Authorization", "Bearer wrong").status)
	require.Equal(t, capture.StateReceived, w.state(id))
	require.Equal(t, http.StatusAccepted, w.do("PUT", path, "", "Authorization", "Bearer secret").status)
	require.Equal(t, capture.StateProcessed, w.state(id))
}

func TestRefusesToBeOpenOffLoopback(t *testing.T) {
	w := newWorld(t)
	o := acker.Options{
		Store: w.gate, Conn: w.conn, Streams: streams, Addr: ":0",
		Registry: prometheus.NewRegistry(), Ready: service.NewReadiness(), Logger: silent,
	}
	_, err := acker.New(o)
	require.ErrorContains(t, err, "HOLDFAST_ACKER_ADDR")
	o.API.APIAuth = "none"
	a, err := acker.New(o)
	require.NoError(t, err)
	require.NoError(t, a.Stop(t.Context())) // before Run, and twice
	require.NoError(t, a.Stop(t.Context()))
}

func TestReadyWhenItConsumesAndTheLedgerAnswers(t *testing.T) {
	w := newWorld(t)
	require.Eventually(t, func() bool { return len(w.ready.Failing()) == 0 }, patience, time.Millisecond)
	require.NoError(t, w.js.DeleteStream(t.Context(), capture.CompletionsStream))
	require.Eventually(t, func() bool {
		failing := w.ready.Failing()
		return len(failing) == 1 && failing[0].Name == "acker stream"
	}, patience, time.Millisecond)
}

func TestWhatWasNotCommittedIsCommittedAfterARestart(t *testing.T) {
	w := newWorld(t)
	w.gate.set(errors.New("the disk is gone"))
	var ids []uuid.UUID
	for range 100 {
		id := w.capture()
		ids = append(ids, id)
		w.publish(capture.OutcomeSubject("default"), outcome(id, 200, capture.Processed), "")
	}
	<-w.gate.tried
	w.stop()
	w.gate.set(nil)
	w.ready = service.NewReadiness()
	w.start()
	for _, id := range ids {
		w.await(id, capture.StateProcessed)
	}
}

func TestSurvivesARestartOfTheServer(t *testing.T) {
	w := newWorld(t)
	before := w.conn.Stats().Reconnects
	require.NoError(t, w.broker.Restart(t.Context()))
	require.Eventually(t, func() bool { return w.conn.Stats().Reconnects > before && w.conn.IsConnected() }, patience, time.Millisecond)
	id := w.capture()
	w.publish(capture.OutcomeSubject("default"), outcome(id, 200, capture.Processed), "")
	w.await(id, capture.StateProcessed)
	// HTTP needs no broker at all.
	require.NoError(t, w.broker.Shutdown(t.Context()))
	id = w.capture()
	require.Equal(t, http.StatusAccepted, w.do("PUT", "/v1/completions/"+id.String(), "").status)
}

// A message may hold more events than one transaction should.
func TestManyEventsInOneMessage(t *testing.T) {
	w := newWorld(t)
	var lines strings.Builder
	var ids []uuid.UUID
	for range 10 {
		ids = append(ids, w.capture())
	}
	for i := range 4500 {
		lines.WriteString(event(ids[i%10], "failed") + "\n")
	}
	for _, id := range ids {
		lines.WriteString(event(id, "processed") + "\n")
	}
	w.publish(capture.EventSubject("default"), []byte(lines.String()), "")
	for _, id := range ids {
		w.await(id, capture.StateProcessed)
	}
}

// Whatever is sent, the endpoint answers with one of a few statuses, and what it
// accepts is held.
func FuzzCompletions(f *testing.F) {
	w := newWorld(f)
	known := "0198c5e4-0000-7000-8000-000000000001"
	for _, seed := range []string{
		"", "{}", "[]", "null", "[", `{"id":"` + known + `","outcome":"processed"}`,
		`[{"id":"` + known + `","outcome":"failed","attempt":2,"detail":"x"}]`,
		`{"id":"` + known + `","outcome":"processed"}` + "\n" + `{"id":"` + known + `","outcome":"failed"}`,
		`{"v":1,"id":"` + known + `","outcome":"processed","more":[1,{}]}`, "\x00\xff", `{"id":1}`,
		`{"id":"` + known + `","outcome":"processed","attempt":1e400}`, strings.Repeat("[", 10_000),
	} {
		f.Add("POST", seed)
		f.Add("PUT", seed)
	}
	f.Fuzz(func(t *testing.T, method, body string) {
		path := "/v1/completions"
		if method != "POST" {
			method, path = "PUT", path+"/"+known
		}
		r, err := http.NewRequestWithContext(t.Context(), method, w.url+path, strings.NewReader(body))
		require.NoError(t, err)
		resp, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		defer http.DefaultClient.CloseIdleConnections()
		data, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		switch resp.StatusCode {
		case http.StatusAccepted:
			var accepted struct{ Accepted int }
			require.NoError(t, json.Unmarshal(data, &accepted))
			if method == "PUT" {
				require.Equal(t, 1, accepted.Accepted)
				return
			}
			events, err := capture.DecodeEvents([]byte(body), len(body))
			require.NoError(t, err)
			require.Len(t, events, accepted.Accepted)
		case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
			var p service.Problem
			require.NoError(t, json.Unmarshal(data, &p))
			require.Equal(t, resp.StatusCode, p.Status)
			require.NotEmpty(t, p.Detail)
		default:
			t.Fatalf("%s: %s", resp.Status, data)
		}
	})
}
