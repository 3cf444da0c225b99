// Package fuzz_test throws bytes at the ingress, over a socket.
package fuzz_test

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
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/ingress"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	// ends bounds how long a connection may live after its client has said all.
	ends = 10 * time.Second
	// patience bounds starting and stopping.
	patience = 20 * time.Second
	// maxInput keeps an execution quick; the limits are below it.
	maxInput = 256 << 10
)

// errorLog keeps what is logged as an error: a panic is.
type errorLog struct {
	slog.Handler
	mu   *sync.Mutex
	text *bytes.Buffer
}

func newErrorLog() errorLog {
	var text bytes.Buffer
	return errorLog{slog.NewTextHandler(&text, &slog.HandlerOptions{Level: slog.LevelError}), &sync.Mutex{}, &text}
}

func (l errorLog) Handle(ctx context.Context, r slog.Record) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Handler.Handle(ctx, r)
}

func (l errorLog) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l errorLog) WithGroup(string) slog.Handler      { return l }

func (l errorLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// start starts an ingress of this process in front of the API, and its broker,
// whose other end releases everything at once, as the services behind do.
func start(f *testing.F, api *edge.API, log slog.Handler) (addr string) {
	ctx, cancel := context.WithTimeout(f.Context(), patience)
	defer cancel()
	streams := stream.Streams{Replicas: 1, MaxBytes: 64 << 20}
	broker, err := embednats.Start(embednats.Options{
		StoreDir: f.TempDir(), Addr: "127.0.0.1:0", MaxStoreBytes: 256 << 20, Logger: slog.New(slog.DiscardHandler),
	})
	require.NoError(f, err)
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(f, broker.Shutdown(ctx))
	})
	connect := func() *nats.Conn {
		nc, err := nats.Connect("", broker.InProcess())
		require.NoError(f, err)
		f.Cleanup(nc.Close)
		return nc
	}
	behind := connect()
	js, err := jetstream.New(behind)
	require.NoError(f, err)
	require.NoError(f, stream.Provision(ctx, js, streams))
	words, count := stream.NewWords(behind), 0
	_, err = behind.Subscribe("holdfast.*.>", func(m *nats.Msg) {
		refs := capture.ParseSpoolRefs(capture.Header(m.Header))
		if len(refs) == 0 {
			return
		}
		words.Add(refs...)
		words.Publish()
		if count++; count%1000 == 0 {
			for _, name := range []string{capture.RequestsStream, capture.CompletionsStream} {
				if s, err := js.Stream(context.Background(), name); err == nil {
					_ = s.Purge(context.Background()) // the next time does it
				}
			}
		}
	})
	require.NoError(f, err)

	var all struct {
		service.Common
		ingress.Settings
	}
	require.NoError(f, service.Defaults(&all, true))
	s := &all.Settings
	u, err := url.Parse(api.URL())
	require.NoError(f, err)
	s.UpstreamURL.URL = *u
	s.IngressAddr, s.IngressID, s.SpoolDir, s.SpoolMaxBytes, s.AccessLog = "127.0.0.1:0", "fuzz", f.TempDir(), 256<<20, "off"
	s.MaxBodyBytes, s.MaxInflightBytes = 1<<20, 64<<20
	in, err := ingress.New(ingress.Options{
		Settings: s, DataDir: f.TempDir(), Conn: connect(), Logger: slog.New(log), Registry: prometheus.NewRegistry(), Ready: service.NewReadiness(),
	})
	require.NoError(f, err)
	ended := make(chan error, 1)
	go func() { ended <- in.Run(context.Background()) }()
	f.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		require.NoError(f, in.Stop(ctx))
		require.NoError(f, <-ended)
	})
	return in.Addr().String()
}

// FuzzEdge sends bytes over a connection, and holds the ingress to this,
// whatever they are: the connection ends soon after the client has said all; its
// answers are well-formed; each request that reaches the API is, has one UUID of
// the ingress's making, and is the one that is answered, in its turn; nothing
// else arrives; nothing is logged as an error, as a panic would be; and the next
// client is served.
func FuzzEdge(f *testing.F) {
	for _, c := range edge.Cases() {
		if send := c.Send + strings.Join(c.Then, ""); len(send) <= 16<<10 {
			f.Add([]byte(send))
		}
	}
	api, err := edge.Listen()
	require.NoError(f, err)
	f.Cleanup(api.Close)
	log := newErrorLog()
	addr := start(f, api, log)

	var before, beforeSaid []byte // what came too late to be counted there
	f.Fuzz(func(t *testing.T, input []byte) {
		last, lastSaid := before, beforeSaid
		defer func() {
			if t.Failed() {
				t.Logf("the input before it: %q, answered %q", last, lastSaid)
			}
		}()
		if len(input) > maxInput || bytes.Contains(input, []byte(edge.Sentinel)) {
			t.Skip("longer than the longest limit is not odder; and of sentinels the API does not tell")
		}
		said := say(t, addr, input)
		next := say(t, addr, []byte("GET "+edge.Sentinel+" HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n"))
		require.True(t, bytes.HasPrefix(next, []byte("HTTP/1.1 200 OK\r\n")) && bytes.HasSuffix(next, []byte("sentinel\n")), "the next client: %q", next)

		defer func() { before, beforeSaid = input, said }()
		arrivals, _ := api.Take()
		answered := 0
		for br := bufio.NewReader(bytes.NewReader(said)); ; {
			if _, err := br.Peek(1); err != nil {
				break
			}
			req := &http.Request{Method: "GET"}
			if answered < len(arrivals) {
				req.Method = arrivals[answered].Method
			}
			resp, err := http.ReadResponse(br, req)
			require.NoError(t, err, "%q", said)
			ours := strings.HasPrefix(resp.Header.Get("Proxy-Status"), "holdfast")
			n, err := io.Copy(io.Discard, resp.Body)
			if ours && n == 0 && bytes.Contains(input, []byte("HEAD")) {
				break // the answer to a HEAD that was refused has no body
			}
			require.NoError(t, err, "%q", said)
			switch {
			case resp.StatusCode == http.StatusContinue:
			case ours:
				require.GreaterOrEqual(t, resp.StatusCode, 400)
				require.Less(t, resp.StatusCode, 600)
			default:
				require.Equal(t, http.StatusOK, resp.StatusCode)
				require.Less(t, answered, len(arrivals), "an answer to no request: %q", said)
				require.Equal(t, resp.Header.Values("X-Request-UUID"), arrivals[answered].Fields.Values("X-Request-UUID"), "%v", raw(arrivals))
				answered++
			}
		}
		require.Equal(t, answered, len(arrivals), "more arrived than was answered: %q, %v", said, raw(arrivals))
		for _, a := range arrivals {
			require.Empty(t, a.Anomalies, "%q", a.Raw)
			ids := a.Fields.Values("X-Request-UUID")
			require.Len(t, ids, 1)
			require.True(t, edge.IsUUIDv7(ids[0]), ids)
		}
		require.Empty(t, log.String())
	})
}

// say sends input over a connection of its own, says that this is all, and gives
// what comes back until the other side ends it.
func say(t *testing.T, addr string, input []byte) []byte {
	c, err := net.Dial("tcp", addr)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(ends)))
	var writer sync.WaitGroup
	defer writer.Wait()
	writer.Go(func() {
		_, _ = c.Write(input) // who refuses need not read
		_ = c.(*net.TCPConn).CloseWrite()
	})
	said, err := io.ReadAll(c)
	if err != nil {
		var timeout net.Error
		require.False(t, errors.As(err, &timeout) && timeout.Timeout(), "the connection does not end: %q, then %v", said, err)
	}
	return said
}

// raw gives what arrived, for a failure.
func raw(arrivals []edge.Arrival) []string {
	var all []string
	for _, a := range arrivals {
		all = append(all, fmt.Sprintf("%q", a.Raw))
	}
	return all
}
