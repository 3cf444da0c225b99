package replayer_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/stream"
	"github.com/holdfast-io/holdfast/replayer"
)

// binary is the command, and exampleAPI an API that can crash, both built once
// for the tests that need processes.
var binary, exampleAPI string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "replayer")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary = filepath.Join(dir, "replayer")
	if out, err := exec.Command("go", "build", "-o", binary, "./cmd/replayer").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the command: %v\n%s", err, out)
		return 1
	}
	exampleAPI = filepath.Join(dir, "exampleapi")
	build := exec.Command("go", "build", "-o", exampleAPI, "./cmd/exampleapi")
	build.Dir = "../e2e"
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the example API: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

// bound is how long a test waits for something that happens at once.
const bound = 20 * time.Second

// broker is a real nats-server with both streams.
type broker struct {
	server *embednats.Server
	conn   *nats.Conn
	js     jetstream.JetStream
}

func newBroker(t *testing.T) *broker {
	t.Helper()
	streams := stream.Streams{Replicas: 1, MaxBytes: 64 << 20}
	server, err := embednats.Start(embednats.Options{
		StoreDir: t.TempDir(), Addr: "127.0.0.1:0", MaxStoreBytes: streams.StoreBytes(), Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bound)
		defer cancel()
		require.NoError(t, server.Shutdown(ctx))
	})
	conn, err := nats.Connect(server.ClientURL())
	require.NoError(t, err)
	t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	return &broker{server: server, conn: conn, js: js}
}

// fence is the real fence behind the real broker.
func (b *broker) fence(store replayer.FenceLedger) *replayer.Fence {
	return &replayer.Fence{Ledger: store, Completions: replayer.JetStream{JS: b.js}, Timeout: bound, Clock: replayer.SystemClock{}}
}

// passing is a fence for tests that are about something else.
type passing struct{}

func (passing) Pass(context.Context) error { return nil }

// clock passes when somebody sleeps, and at no other time.
type clock struct {
	mu     sync.Mutex
	now    time.Time
	sleeps []time.Duration
	// each is called for every sleep, outside the lock.
	each func(d time.Duration)
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Sleep(ctx context.Context, d time.Duration) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	c.mu.Lock()
	c.now = c.now.Add(d)
	c.sleeps = append(c.sleeps, d)
	each := c.each
	c.mu.Unlock()
	if each != nil {
		each(d)
	}
	return nil
}

// pass lets time pass without anybody sleeping.
func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func (c *clock) slept() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]time.Duration(nil), c.sleeps...)
}

// books is a real ledger, whose clock a test can move.
type books struct {
	*sqlite.Store
	path  string
	ahead atomic.Int64 // of the real time
}

func newBooks(t testing.TB) *books {
	t.Helper()
	return openBooks(t, filepath.Join(t.TempDir(), "ledger.db"))
}

func openBooks(t testing.TB, path string) *books {
	t.Helper()
	b := &books{path: path}
	store, err := sqlite.Open(t.Context(), sqlite.Options{
		Path: path,
		Now:  func() time.Time { return time.Now().Add(time.Duration(b.ahead.Load())) },
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	b.Store = store
	return b
}

// later moves the ledger's clock.
func (b *books) later(d time.Duration) { b.ahead.Add(int64(d)) }

// request is what a test captures. The zero value is a POST that failed with
// 502 at its first try.
type request struct {
	method, target string
	body           []byte
	headers        string // lines ending in CRLF
	policy         capture.Policy
	status         int // of the first try; -1: there is no outcome
	chunked        bool
	route          string
	received       time.Time       // now by default
	answer         *capture.Answer // to the first try
	key            string
}

func newPolicy() capture.Policy {
	p := capture.DefaultPolicy()
	p.Timeout = 10 * time.Second
	p.Grace = 0
	return p
}

// capture records requests, in the order of their ids.
func (b *books) capture(t testing.TB, requests ...request) []uuid.UUID {
	t.Helper()
	ids := make([]uuid.UUID, len(requests))
	var items []ledger.Item
	var facts []ledger.Fact
	now, err := b.Now(t.Context())
	require.NoError(t, err)
	for i, q := range requests {
		if q.method == "" {
			q.method = "POST"
		}
		if q.target == "" {
			q.target = fmt.Sprintf("/things/%d", i)
		}
		if q.policy == (capture.Policy{}) {
			q.policy = newPolicy()
		}
		if q.route == "" {
			q.route = capture.DefaultRoute
		}
		if q.received.IsZero() {
			q.received = now
		}
		id, err := uuid.NewV7()
		require.NoError(t, err)
		ids[i] = id
		head := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: api.example\r\n%sContent-Length: %d\r\n\r\n", q.method, q.target, q.headers, len(q.body))
		r := &capture.Request{
			ID: id, Route: q.route, Ingress: "gw", ReceivedAt: q.received, Policy: q.policy, OrderKey: q.key,
			Head: []byte(head), Body: q.body, Size: int64(len(q.body)),
		}
		if q.chunked {
			sum := sha256.Sum256(q.body)
			r.SHA256, r.Body = hex.EncodeToString(sum[:]), nil
			for part := range slices.Chunk(q.body, 256<<10) {
				items = append(items, ledger.Item{Captured: capture.Captured{Chunk: &capture.Chunk{
					ID: id, Route: q.route, Ingress: "gw", Number: r.Chunks, Data: part,
				}}})
				r.Chunks++
			}
		}
		items = append(items, ledger.Item{Captured: capture.Captured{Request: r}})
		if q.status < 0 {
			continue
		}
		if q.status == 0 {
			q.status = http.StatusBadGateway
		}
		facts = append(facts, ledger.Fact{Outcome: &capture.Outcome{ID: id, Ingress: "gw", Answer: q.answer, Attempt: capture.Attempt{
			Number: capture.FirstAttempt, StartedAt: now, EndedAt: now, Status: q.status,
			Verdict: q.policy.Verdict(q.status, true, false),
		}}})
	}
	results, err := b.Record(t.Context(), items)
	require.NoError(t, err)
	for _, r := range results {
		require.NoError(t, r.Err)
	}
	errs, err := b.Complete(t.Context(), facts)
	require.NoError(t, err)
	for _, err := range errs {
		require.NoError(t, err)
	}
	return ids
}

// many gives n equal requests.
func many(n int) []request { return make([]request, n) }

// states counts the requests by their state.
func (b *books) states(t testing.TB) map[capture.State]int64 {
	t.Helper()
	stats, err := b.Stats(t.Context())
	require.NoError(t, err)
	counted := make(map[capture.State]int64)
	for state, n := range stats.Requests {
		if n != 0 {
			counted[state] = n
		}
	}
	return counted
}

// api is a real HTTP server that keeps what arrived.
type api struct {
	*httptest.Server
	mu       sync.Mutex
	arrivals []arrival
}

type arrival struct {
	id      string
	method  string
	target  string
	attempt string
	run     string
	header  http.Header
	body    []byte
}

// newAPI answers with what answer says; nil is 200.
func newAPI(t *testing.T, answer func(w http.ResponseWriter, r *http.Request, nth int)) *api {
	t.Helper()
	a := &api{}
	a.Server = httptest.NewServer(a.handler(answer))
	t.Cleanup(a.Close)
	return a
}

func (a *api) handler(answer func(w http.ResponseWriter, r *http.Request, nth int)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		a.mu.Lock()
		nth := 1
		for _, before := range a.arrivals {
			if before.id == r.Header.Get(capture.HTTPHeaderID) {
				nth++
			}
		}
		a.arrivals = append(a.arrivals, arrival{
			id: r.Header.Get(capture.HTTPHeaderID), method: r.Method, target: r.RequestURI, header: r.Header, body: body,
			attempt: r.Header.Get(capture.HTTPHeaderAttempt), run: r.Header.Get(capture.HTTPHeaderReplay),
		})
		a.mu.Unlock()
		if answer != nil {
			answer(w, r, nth)
		}
	})
}

func (a *api) seen() []arrival {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]arrival(nil), a.arrivals...)
}

// times counts arrivals by id.
func (a *api) times() map[string]int {
	n := make(map[string]int)
	for _, one := range a.seen() {
		n[one.id]++
	}
	return n
}

// port is an address that no other process takes while nobody listens on it.
type port struct{ addr string }

func reusePort(_, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	})
	return errors.Join(err, failed)
}

// newPort binds a socket and does not listen on it: connects are refused.
func newPort(t *testing.T) port {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1))
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	name, err := unix.Getsockname(fd)
	require.NoError(t, err)
	return port{addr: fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)}
}

func (p port) listen() (net.Listener, error) {
	config := net.ListenConfig{Control: reusePort}
	return config.Listen(context.Background(), "tcp", p.addr)
}

func upstreamTo(t testing.TB, rawURL string) *replayer.Upstream {
	t.Helper()
	return upstreamWithHealth(t, rawURL, "")
}

func upstreamWithHealth(t testing.TB, rawURL, health string) *replayer.Upstream {
	t.Helper()
	u, err := url.Parse(rawURL)
	require.NoError(t, err)
	up, err := replayer.NewUpstream(replayer.UpstreamOptions{URL: u, MaxConns: 64, Health: health})
	require.NoError(t, err)
	t.Cleanup(up.Close)
	return up
}

// options are those of a run that is about nothing in particular.
func options(t testing.TB, b *books, apiURL string) replayer.Options {
	t.Helper()
	up := upstreamTo(t, apiURL)
	return replayer.Options{
		Ledger: b, Fence: passing{}, Upstreams: up, Owner: t.Name(), Clock: newClock(),
		Selection: replayer.Selection{Filter: ledger.Filter{Replayable: true}},
	}
}

func mustRun(t *testing.T, o replayer.Options) replayer.Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	report, err := replayer.Run(ctx, o)
	require.NoError(t, err)
	return report
}

// process is one run of the command.
type process struct {
	*exec.Cmd
	stdout, stderr bytes.Buffer
}

// command prepares the command with its settings.
func command(t *testing.T, b *books, natsURL, apiURL string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(binary, args...)}
	p.Env = []string{
		"HOLDFAST_LEDGER_URL=sqlite://" + b.path, "HOLDFAST_NATS_URL=" + natsURL, "HOLDFAST_UPSTREAM_URL=" + apiURL,
		"HOLDFAST_LOG_LEVEL=debug",
	}
	p.Stdout, p.Stderr = &p.stdout, &p.stderr
	return p
}

// code runs the command to its end and gives its exit code.
func (p *process) code(t *testing.T) int {
	t.Helper()
	require.NoError(t, p.Start())
	return p.wait(t)
}

func (p *process) wait(t *testing.T) int {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- p.Wait() }()
	select {
	case <-done:
	case <-time.After(bound):
		_ = p.Process.Kill()
		<-done
		require.Failf(t, "the command did not end", "%s\n%s", p.stdout.String(), p.stderr.String())
	}
	return p.ProcessState.ExitCode()
}

func (p *process) report(t *testing.T) replayer.Report {
	t.Helper()
	var r replayer.Report
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &r), "%s\n%s", p.stdout.String(), p.stderr.String())
	return r
}
