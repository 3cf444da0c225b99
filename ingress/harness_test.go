package ingress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gofrs/flock"
	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds waits for what takes milliseconds.
const patience = 20 * time.Second

// quick are timings under which a test sees within milliseconds what takes
// seconds or minutes otherwise.
func quick() *timings {
	t := defaultTimings()
	t.look, t.drain = 10*time.Millisecond, time.Millisecond
	return &t
}

// broker is a real nats-server with the streams.
type broker struct {
	t       *testing.T
	server  *embednats.Server
	conn    *nats.Conn
	streams stream.Streams
}

func newBroker(t *testing.T, streams stream.Streams) *broker {
	t.Helper()
	if streams.Replicas == 0 {
		streams = stream.Streams{Replicas: 1, MaxBytes: 64 << 20}
	}
	server, err := embednats.Start(embednats.Options{
		StoreDir: t.TempDir(), Addr: "127.0.0.1:0", MaxStoreBytes: 256 << 20, Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Shutdown(bounded(t))) })
	b := &broker{t: t, server: server, streams: streams}
	b.conn = b.connect()
	js, err := jetstream.New(b.conn)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), js, streams))
	return b
}

func (b *broker) connect() *nats.Conn {
	b.t.Helper()
	nc, err := nats.Connect("", b.server.InProcess(), nats.MaxReconnects(-1), nats.RetryOnFailedConnect(true),
		nats.ReconnectBufSize(-1), nats.ReconnectWait(5*time.Millisecond), nats.ReconnectJitter(0, 0))
	require.NoError(b.t, err)
	b.t.Cleanup(nc.Close)
	return nc
}

// message is one of a stream, as a consumer gets it.
type message struct {
	subject string
	seq     uint64
	header  nats.Header
	data    []byte
	ref     capture.SpoolRef
	request *capture.Request
	chunk   *capture.Chunk
	abandon *capture.Abandon
	outcome *capture.Outcome
}

// read gives everything that a stream holds now.
func (b *broker) read(name string) []message {
	b.t.Helper()
	list, err := b.tryRead(bounded(b.t), name)
	require.NoError(b.t, err)
	return list
}

// tryRead is read while the broker may be away.
func (b *broker) tryRead(ctx context.Context, name string) ([]message, error) {
	b.t.Helper()
	js, err := jetstream.New(b.conn)
	require.NoError(b.t, err)
	s, err := js.Stream(ctx, name)
	if err != nil {
		return nil, err
	}
	state := s.CachedInfo().State
	var decoder capture.Decoder
	var list []message
	for seq := max(state.FirstSeq, 1); seq <= state.LastSeq; seq++ {
		m, err := s.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for name := range m.Header {
			if strings.HasPrefix(name, "Nats-") { // said by the server, of a direct get
				delete(m.Header, name)
			}
		}
		got := message{subject: m.Subject, header: m.Header, data: m.Data, seq: m.Sequence}
		refs := capture.ParseSpoolRefs(capture.Header(m.Header))
		require.NotEmpty(b.t, refs, "message without spool reference")
		if name == capture.CompletionsStream {
			// Outcomes share messages: each counts as one here.
			all, err := capture.DecodeOutcomes(m.Data)
			require.NoError(b.t, err)
			require.Len(b.t, refs, len(all))
			for i := range all {
				got.ref, got.outcome = refs[i], &all[i]
				list = append(list, got)
			}
			continue
		}
		require.Len(b.t, refs, 1)
		got.ref = refs[0]
		if c, err := decoder.Decode(m.Subject, capture.Header(m.Header), m.Data); err == nil {
			got.request, got.chunk, got.abandon = c.Request, c.Chunk, c.Abandon
		}
		list = append(list, got)
	}
	return list, nil
}

// eventually gives what a stream holds as soon as that is n messages.
func (b *broker) eventually(name string, n int) []message {
	b.t.Helper()
	var list []message
	require.Eventually(b.t, func() bool {
		// A broker that restarts may leave one question without an answer.
		ctx, cancel := context.WithTimeout(b.t.Context(), time.Second)
		defer cancel()
		var err error
		list, err = b.tryRead(ctx, name)
		return err == nil && len(list) >= n
	}, patience, 2*time.Millisecond)
	return list
}

// release gives the words for messages, as recorder and acker do after their
// commit.
func (b *broker) release(list []message) {
	w := stream.NewWords(b.conn)
	for _, m := range list {
		w.Add(m.ref)
	}
	w.Publish()
}

// gateway is a running ingress.
type gateway struct {
	*Service
	t     *testing.T
	url   string
	spool *spool.Spool
	ready *service.Readiness
	o     Options
	h     *handler
	stop  func()
}

type change func(*Options)

func set(f func(*Settings)) change { return func(o *Options) { f(o.Settings) } }

func newOptions(t *testing.T, api string, nc *nats.Conn, changes ...change) Options {
	t.Helper()
	u, err := url.Parse(api)
	require.NoError(t, err)
	s := &Settings{}
	s.UpstreamURL.URL = *u
	s.UpstreamTimeout, s.Completion, s.OnFailure, s.Capture = 10*time.Second, "response", "passthrough", "required"
	s.CaptureMethods = service.Methods{"POST", "PUT", "PATCH", "DELETE"}
	s.Grace, s.PreserveHost = time.Minute, true
	s.IngressAddr, s.MaxBodyBytes, s.MaxInflightBytes, s.InlineBytes = "127.0.0.1:0", 4<<20, 64<<20, 256<<10
	s.RetryAfter, s.IngressID, s.Store = 5*time.Second, "test", "synced"
	s.SpoolDir, s.SpoolMaxBytes, s.AccessLog = t.TempDir(), 64<<20, "off"
	s.MaxHeaderBytes, s.MaxHeaderFields, s.MaxConnections = 64<<10, 128, 1000
	s.ReadHeaderTimeout, s.ReadBodyTimeout, s.WriteTimeout, s.IdleTimeout = patience, patience, patience, patience
	o := Options{
		Settings: s, DataDir: t.TempDir(), Conn: nc, Logger: slog.New(slog.DiscardHandler),
		Registry: prometheus.NewRegistry(), Ready: service.NewReadiness(), times: quick(),
	}
	for _, c := range changes {
		c(&o)
	}
	return o
}

func startGateway(t *testing.T, o Options) *gateway {
	t.Helper()
	svc, err := New(o)
	require.NoError(t, err)
	g := &gateway{Service: svc, t: t, o: o, ready: o.Ready, url: "http://" + svc.Addr().String(), spool: svc.handler.spool, h: svc.handler}
	ended := make(chan error, 1)
	go func() { ended <- svc.Run(context.Background()) }()
	g.stop = sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(t, svc.Stop(ctx))
		require.NoError(t, <-ended)
	})
	t.Cleanup(g.stop)
	return g
}

// run starts a broker, an API and an ingress in between.
func run(t *testing.T, api http.HandlerFunc, changes ...change) (*gateway, *broker) {
	t.Helper()
	b := newBroker(t, stream.Streams{})
	return startGateway(t, newOptions(t, serveAPI(t, api), b.connect(), changes...)), b
}

func serveAPI(t *testing.T, api http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(api)
	t.Cleanup(s.Close)
	return s.URL
}

// rawAPI answers each connection by a function; it counts what arrived.
func rawAPI(t *testing.T, serve func(net.Conn, *bufio.Reader)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var all sync.WaitGroup
	var mu sync.Mutex
	conns := map[net.Conn]bool{}
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			all.Go(func() {
				defer c.Close()
				serve(c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for c := range conns {
			c.Close()
		}
		mu.Unlock()
		all.Wait()
	})
	return "http://" + l.Addr().String()
}

// readRequest reads one request whole and gives its bytes.
func readRequest(br *bufio.Reader) ([]byte, error) {
	var raw bytes.Buffer
	req, err := http.ReadRequest(bufio.NewReader(io.TeeReader(br, &raw)))
	if err != nil {
		return nil, err
	}
	_, err = io.Copy(io.Discard, req.Body)
	return raw.Bytes(), err
}

// client is one that neither reuses connections nor follows anything.
func client(t *testing.T) *http.Client {
	t.Helper()
	tr := &http.Transport{DisableKeepAlives: true, DisableCompression: true, ExpectContinueTimeout: patience}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// settled waits until the requests under way have given back what they held.
// Their clients may have their answers a moment before.
func (g *gateway) settled() {
	g.t.Helper()
	require.Eventually(g.t, func() bool {
		return g.h.inflight.used.Load() == 0 && g.spool.Stats().ReservedBytes == 0
	}, patience, time.Millisecond)
}

type answer struct {
	*http.Response
	body []byte
	err  error // of reading the body
}

func (g *gateway) do(method, path string, body io.Reader, header ...string) (answer, error) {
	req, err := http.NewRequest(method, g.url+path, body)
	require.NoError(g.t, err)
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	resp, err := client(g.t).Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return answer{resp, data, err}, nil
}

func (g *gateway) must(method, path string, body io.Reader, header ...string) answer {
	g.t.Helper()
	a, err := g.do(method, path, body, header...)
	require.NoError(g.t, err)
	require.NoError(g.t, a.err)
	return a
}

func (a answer) id(t *testing.T) uuid.UUID {
	t.Helper()
	require.Len(t, a.Header.Values(capture.HTTPHeaderID), 1)
	id, err := uuid.Parse(a.Header.Get(capture.HTTPHeaderID))
	require.NoError(t, err)
	require.EqualValues(t, 7, id.Version())
	return id
}

// raw opens a connection to the ingress and sends text.
func (g *gateway) raw(text string) (net.Conn, *bufio.Reader) {
	g.t.Helper()
	c, err := net.Dial("tcp", g.Addr().String())
	require.NoError(g.t, err)
	g.t.Cleanup(func() { c.Close() })
	require.NoError(g.t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, text)
	require.NoError(g.t, err)
	return c, bufio.NewReader(c)
}

// spooled reads what is in the spool now and not released.
func (g *gateway) spooled() []message {
	var list []message
	r := g.spool.UnreleasedBefore(time.Now().Add(time.Hour))
	var decoder capture.Decoder
	for {
		rec, err := r.Next(context.Background())
		if errors.Is(err, io.EOF) {
			return list
		}
		require.NoError(g.t, err)
		m, err := capture.ParseRecord(bytes.Clone(rec.Data))
		require.NoError(g.t, err)
		got := message{subject: m.Subject, data: m.Data}
		if isCompletion(m) {
			o, err := capture.DecodeOutcome(m.Data)
			require.NoError(g.t, err)
			got.outcome = &o
		} else {
			c, err := decoder.Decode(m.Subject, capture.Header{capture.HeaderID: {m.ID}, capture.HeaderCapture: {m.Capture}}, m.Data)
			require.NoError(g.t, err)
			got.request, got.chunk, got.abandon = c.Request, c.Chunk, c.Abandon
		}
		list = append(list, got)
	}
}

// outcomes are the outcomes among messages, by id.
func outcomes(list []message) map[uuid.UUID]capture.Attempt {
	m := map[uuid.UUID]capture.Attempt{}
	for _, one := range list {
		if one.outcome != nil {
			m[one.outcome.ID] = one.outcome.Attempt
		}
	}
	return m
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// faultFS is the operating system's files with faults.
type faultFS struct {
	mu    sync.Mutex
	fault func(op string) error // "write", "datasync", "allocate"; may block
}

func (f *faultFS) set(fault func(op string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fault = fault
}

func (f *faultFS) check(op string) error {
	f.mu.Lock()
	fault := f.fault
	f.mu.Unlock()
	if fault == nil {
		return nil
	}
	return fault(op)
}

func (*faultFS) MkdirAll(dir string) error            { return os.MkdirAll(dir, 0o700) }
func (*faultFS) Rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }
func (*faultFS) Remove(path string) error             { return os.Remove(path) }
func (*faultFS) SyncDir(string) error                 { return nil }

func (*faultFS) Lock(path string) (io.Closer, error) {
	l := flock.New(path)
	if ok, err := l.TryLock(); !ok {
		return nil, errors.Join(spool.ErrLocked, err)
	}
	return l, nil
}

func (*faultFS) ReadDir(dir string) (names []string, err error) {
	list, err := os.ReadDir(dir)
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names, err
}

func (f *faultFS) Create(path string) (spool.File, error) {
	return f.open(path, os.O_RDWR|os.O_CREATE|os.O_EXCL)
}
func (f *faultFS) Open(path string) (spool.File, error) { return f.open(path, os.O_RDWR) }

func (f *faultFS) open(path string, flag int) (spool.File, error) {
	file, err := os.OpenFile(path, flag, 0o600)
	if err != nil {
		return nil, err
	}
	return faultFile{file, f}, nil
}

type faultFile struct {
	*os.File
	fs *faultFS
}

func (f faultFile) WriteAt(b []byte, off int64) (int, error) {
	if err := f.fs.check("write"); err != nil {
		return 0, err
	}
	return f.File.WriteAt(b, off)
}

func (f faultFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f faultFile) Allocate(size int64) error {
	if err := f.fs.check("allocate"); err != nil {
		return err
	}
	return f.Truncate(size)
}
func (f faultFile) Datasync() error { return f.fs.check("datasync") }
func (f faultFile) Sync() error     { return nil }

// pattern is n bytes that tell their place.
func pattern(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%07d\n", i)
	}
	return b.Bytes()[:n]
}

// unsized hides a reader's length, so that it is sent in chunked coding.
func unsized(b []byte) io.Reader { return struct{ io.Reader }{bytes.NewReader(b)} }

// head is a message's head.
func head(lines ...string) string { return strings.Join(lines, "\r\n") + "\r\n\r\n" }

// everything names all records of a start.
var everything = spool.Range{First: 1, Last: 1 << 62}

func sizeOf(n int) service.ByteSize { return service.ByteSize(n) }

// copyDir copies a directory's files as they are at this moment.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	require.NoError(t, os.RemoveAll(to))
	require.NoError(t, os.CopyFS(to, os.DirFS(from)))
}

func (g *gateway) registry() *prometheus.Registry {
	return g.o.Registry.(*prometheus.Registry)
}
