package recorder_test

import (
	"context"
	"encoding/json"
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

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/recorder"
)

func TestMain(m *testing.M) {
	if os.Getenv(childURL) != "" {
		child()
		return
	}
	goleak.VerifyTestMain(m)
}

// patience bounds waits for things that take milliseconds.
const patience = 20 * time.Second

// milli is how often a condition without a signal is looked at.
const milli = 5 * time.Millisecond

var streams = stream.Streams{Replicas: 1, MaxBytes: 256 << 20}

// world is a real broker and a real ledger.
type world struct {
	t      testing.TB
	broker *embednats.Server
	dir    string
	path   string // of the ledger
	store  *sqlite.Store
	nc     *nats.Conn // the test's own
	js     jetstream.JetStream
	index  uint64 // of the last spool record
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if t, ok := t.(*testing.T); ok {
		t.Parallel() // they mostly wait
	}
	w := &world{t: t, dir: t.TempDir()}
	w.path = filepath.Join(w.dir, "ledger.db")
	var err error
	w.broker, err = embednats.Start(embednats.Options{
		StoreDir: filepath.Join(w.dir, "nats"), Addr: "127.0.0.1:0", MaxStoreBytes: 2 * streams.StoreBytes(), Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(t, w.broker.Shutdown(ctx))
	})
	w.nc = w.connect()
	w.js, err = jetstream.New(w.nc)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), w.js, streams))
	w.store = w.open()
	return w
}

// open opens the ledger once more, as another process would.
func (w *world) open() *sqlite.Store {
	w.t.Helper()
	store, err := sqlite.Open(w.t.Context(), sqlite.Options{Path: w.path, BusyTimeout: 50 * time.Millisecond})
	require.NoError(w.t, err)
	w.t.Cleanup(func() { require.NoError(w.t, store.Close()) })
	return store
}

func (w *world) connect() *nats.Conn {
	w.t.Helper()
	nc, err := stream.Connect(stream.ConnectOptions{URL: w.broker.ClientURL(), Name: "test", Logger: slog.New(slog.DiscardHandler)})
	require.NoError(w.t, err)
	w.t.Cleanup(nc.Close)
	return nc
}

// defaults are the settings of a recorder on this machine, on any free port.
func defaults() (*recorder.Settings, error) {
	full := &struct {
		service.Common
		recorder.Settings
	}{}
	if err := service.Defaults(full, true); err != nil {
		return nil, err
	}
	full.RecorderAddr = "127.0.0.1:0"
	return &full.Settings, nil
}

// running is a recorder.
type running struct {
	*recorder.Service
	t     testing.TB
	url   string
	token string
	conn  *nats.Conn
	ready *service.Readiness
	reg   *prometheus.Registry
	log   *logLines
	stop  func()
}

// start runs a recorder on the store, or on the world's own when it is nil.
func (w *world) start(store recorder.Store, change ...func(*recorder.Options)) *running {
	w.t.Helper()
	if store == nil {
		store = w.store
	}
	s, err := defaults()
	require.NoError(w.t, err)
	r := &running{t: w.t, ready: service.NewReadiness(), reg: prometheus.NewRegistry(), log: &logLines{}}
	o := recorder.Options{
		Settings: s, Store: store, Conn: w.connect(), Registry: r.reg, Ready: r.ready,
		Logger: slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})), Streams: streams,
	}
	for _, f := range change {
		f(&o)
	}
	r.Service, err = recorder.New(o)
	require.NoError(w.t, err)
	r.url, r.conn = "http://"+r.Addr().String(), o.Conn
	done := make(chan error, 1)
	go func() { done <- r.Run(context.Background()) }()
	var once sync.Once
	r.stop = func() {
		once.Do(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			require.NoError(w.t, r.Stop(ctx))
			require.NoError(w.t, <-done)
			o.Conn.Close()
		})
	}
	w.t.Cleanup(r.stop)
	return r
}

// logLines collects log lines.
type logLines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *logLines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logLines) count(message string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), `"msg":"`+message+`"`)
}

// contains counts the text.
func (l *logLines) contains(text string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), text)
}

// do asks the API and reads the whole answer.
func (r *running) do(method, path string) (*http.Response, []byte) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, r.url+path, nil)
	require.NoError(r.t, err)
	if r.token != "" {
		req.Header.Set("Authorization", "Bearer "+r.token)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	require.NoError(r.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(r.t, err)
	return resp, body
}

// get reads a JSON answer.
func (r *running) get(path string, into any) {
	r.t.Helper()
	resp, body := r.do(http.MethodGet, path)
	require.Equal(r.t, http.StatusOK, resp.StatusCode, "%s: %s", path, body)
	require.Equal(r.t, "application/json", resp.Header.Get("Content-Type"))
	require.NoError(r.t, json.Unmarshal(body, into))
}

func newID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

// newRequest is a request of some client.
func newRequest(method, target, body string, headers ...string) *capture.Request {
	head := method + " " + target + " HTTP/1.1\r\nHost: api.example.com\r\n"
	for _, h := range headers {
		head += h + "\r\n"
	}
	head += fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body))
	return &capture.Request{
		ID: newID(), Route: "default", Ingress: "gw1", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
		Head: []byte(head), Body: []byte(body), Size: int64(len(body)),
	}
}

// publish sends a message as the ingress does, and gives its spool record.
func (w *world) publish(m capture.Message, data []byte) capture.SpoolRef {
	w.t.Helper()
	w.index++
	ref := capture.SpoolRef{Ingress: "gw1", Start: "00ff", Index: w.index}
	msg := nats.NewMsg(m.Subject)
	msg.Data = data
	msg.Header.Set(capture.HeaderSpool, ref.String())
	if m.ID != "" {
		msg.Header[capture.HeaderID] = []string{m.ID}
	}
	if m.Capture != "" {
		msg.Header[capture.HeaderCapture] = []string{m.Capture}
	}
	_, err := w.js.PublishMsg(w.t.Context(), msg)
	require.NoError(w.t, err)
	return ref
}

func (w *world) capture(r *capture.Request) capture.SpoolRef {
	w.t.Helper()
	return w.publish(r.Message(), append(append([]byte{}, r.Head...), r.Body...))
}

// words is what the ingress has heard.
type words struct {
	t   testing.TB
	sub *nats.Subscription
	got map[uint64]bool
}

func (w *world) listen() *words {
	w.t.Helper()
	sub, err := w.nc.SubscribeSync(capture.CommittedSubject("gw1"))
	require.NoError(w.t, err)
	require.NoError(w.t, w.nc.Flush())
	return &words{w.t, sub, make(map[uint64]bool)}
}

// await waits until all of the records are released.
func (o *words) await(refs ...capture.SpoolRef) {
	o.t.Helper()
	deadline := time.Now().Add(patience)
	for _, ref := range refs {
		for !o.got[ref.Index] {
			m, err := o.sub.NextMsg(time.Until(deadline))
			require.NoError(o.t, err, "no word for %s", ref)
			word, err := capture.DecodeWord(m.Data)
			require.NoError(o.t, err)
			require.Equal(o.t, ref.Start, word.Start)
			for _, r := range word.Released {
				for i := r[0]; i <= r[1]; i++ {
					o.got[i] = true
				}
			}
		}
	}
}

// awaitAcked waits until the server holds everything for acknowledged.
func (w *world) awaitAcked() {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		c, err := w.js.Consumer(w.t.Context(), capture.RequestsStream, capture.RecorderDurable)
		return err == nil && c.CachedInfo().NumAckPending == 0 && c.CachedInfo().NumPending == 0
	}, patience, 5*time.Millisecond)
}

// asides gives all that is set aside.
func (w *world) asides() []ledger.Aside {
	w.t.Helper()
	list, next, err := w.store.AsideList(w.t.Context(), "", 1000)
	require.NoError(w.t, err)
	require.Empty(w.t, next)
	return list
}
