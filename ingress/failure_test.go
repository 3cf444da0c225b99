package ingress

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

// This file has a test for each line of the table in the package's
// documentation.

func accept(o *Options) { o.Settings.OnFailure = "accept" }

var errDisk = errors.New("the disk refuses")

// failing fails one operation.
func failing(op string, err error) func(string) error {
	return func(is string) error {
		if is == op {
			return err
		}
		return nil
	}
}

func ok(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	_, _ = io.WriteString(w, "done")
}

// verdict is the outcome that the spool or the stream has for an answer's id.
func (g *gateway) verdict(b *broker, a answer) capture.Attempt {
	g.t.Helper()
	id := a.id(g.t)
	list := b.eventually(capture.CompletionsStream, 1)
	require.Contains(g.t, outcomes(list), id)
	return outcomes(list)[id]
}

func TestNoRoomInTheLimit(t *testing.T) {
	var arrived atomic.Int32
	fill := func(t *testing.T, mode string) (*gateway, answer) {
		g, _ := run(t, func(w http.ResponseWriter, r *http.Request) { arrived.Add(1); ok(w, r) }, set(func(s *Settings) {
			s.SpoolMaxBytes, s.MaxBodyBytes, s.Capture = 16<<20, 1<<20, mode
		}))
		for i := range 100 {
			before := arrived.Load()
			a := g.must("POST", "/", bytes.NewReader(pattern(200<<10)))
			if a.StatusCode != 200 || a.Header.Get(capture.HTTPHeaderStored) == "no" {
				require.Greater(t, i, 10)
				if mode == "required" {
					require.Equal(t, before, arrived.Load(), "the API must not see a byte")
				}
				return g, a
			}
		}
		t.Fatal("the spool does not fill")
		return nil, answer{}
	}
	t.Run("required", func(t *testing.T) {
		g, a := fill(t, "required")
		require.Equal(t, 503, a.StatusCode)
		require.Equal(t, "5", a.Header.Get("Retry-After"))
		require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
		require.Contains(t, a.Header.Get("Proxy-Status"), "holdfast; error=")
		require.Eventually(t, func() bool { return len(g.ready.Failing()) == 1 }, patience, time.Millisecond)
		require.Equal(t, "spool", g.ready.Failing()[0].Name)

		// The rooms comes back with releases, without a restart.
		stats := g.spool.Stats()
		require.Positive(t, stats.Unreleased)
		require.Eventually(t, func() bool { return g.h.ready() != nil || g.releaseAll() }, patience, time.Millisecond)
		require.Eventually(t, func() bool {
			g.releaseAll()
			return g.must("POST", "/", strings.NewReader("x")).StatusCode == 200
		}, patience, time.Millisecond)
		require.Eventually(t, func() bool { return len(g.ready.Failing()) == 0 }, patience, time.Millisecond)
	})
	t.Run("best effort", func(t *testing.T) {
		_, a := fill(t, "best_effort")
		require.Equal(t, 200, a.StatusCode)
		require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
		require.Equal(t, "done", string(a.body))
	})
}

// releaseAll gives all there is in the spool back, as words would.
func (g *gateway) releaseAll() bool {
	g.spool.Release(g.spool.Start(), everything)
	return true
}

func TestNoRoomOnTheDisk(t *testing.T) {
	fs := &faultFS{}
	var arrived atomic.Int32
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) { arrived.Add(1); ok(w, r) }, func(o *Options) {
		o.fs = fs
		o.Settings.SpoolMaxBytes = 64 << 20
	})
	fs.set(failing("allocate", syscall.ENOSPC))
	var a answer
	require.Eventually(t, func() bool {
		a = g.must("POST", "/", bytes.NewReader(pattern(250<<10)))
		return a.StatusCode != 200
	}, patience, time.Microsecond)
	require.Equal(t, 503, a.StatusCode)
	require.NotEmpty(t, a.Header.Get("Retry-After"))
	seen := arrived.Load()
	require.Equal(t, 503, g.must("POST", "/", bytes.NewReader(pattern(250<<10))).StatusCode)
	require.Equal(t, seen, arrived.Load())
	fs.set(nil)
	require.Eventually(t, func() bool {
		return g.must("POST", "/", bytes.NewReader(pattern(250<<10))).StatusCode == 200
	}, patience, time.Millisecond)
}

func TestBodyTooLarge(t *testing.T) {
	const most = 1 << 20
	for _, inline := range []int{64 << 10, 768 << 10} {
		for _, limit := range []int{most, 1000} {
			var arrived atomic.Int32
			g, _ := run(t, func(w http.ResponseWriter, r *http.Request) { arrived.Add(1); ok(w, r) },
				set(func(s *Settings) { s.MaxBodyBytes = sizeOf(limit); s.InlineBytes = sizeOf(inline) }))
			for name, body := range map[string]io.Reader{"known": bytes.NewReader(pattern(limit + 1)), "unknown": unsized(pattern(limit + 1))} {
				a := g.must("POST", "/", body, "Expect", "100-continue")
				require.Equal(t, 413, a.StatusCode, name)
				a.id(t)
			}
			require.Zero(t, arrived.Load(), "the API must not see a byte")
			require.Empty(t, g.spooled())
			require.Equal(t, 200, g.must("POST", "/", unsized(pattern(limit))).StatusCode)
			require.Equal(t, 200, g.must("POST", "/", bytes.NewReader(pattern(limit))).StatusCode)
			require.Equal(t, 200, g.must("GET", "/", unsized(pattern(limit+1))).StatusCode, "what is not captured may be endless")
			g.stop()
		}
	}
}

func TestClientBreaksOffInTheBody(t *testing.T) {
	var whole, broken atomic.Int32
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			broken.Add(1)
			return
		}
		whole.Add(1)
	})
	const inline = 256 << 10
	sizes := []int{0, 1, inline - 1, inline, inline + 1, 2 * chunkBytes, 3*chunkBytes + 1, 4<<20 - 1}
	for _, n := range sizes {
		for _, coding := range []string{fmt.Sprintf("Content-Length: %d", n+1), "Transfer-Encoding: chunked"} {
			c, br := g.raw(head("POST / HTTP/1.1", "Host: x", coding))
			if strings.HasPrefix(coding, "T") {
				if n > 0 {
					_, err := fmt.Fprintf(c, "%x\r\n%s\r\n", n, pattern(n))
					require.NoError(t, err)
				}
			} else {
				_, err := c.Write(pattern(n))
				require.NoError(t, err)
			}
			require.NoError(t, c.(*net.TCPConn).CloseWrite())
			resp, err := http.ReadResponse(br, nil)
			require.NoError(t, err, "%d %s", n, coding)
			require.Equal(t, 400, resp.StatusCode)
			require.True(t, resp.Close)
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
		}
	}
	require.Zero(t, whole.Load(), "nothing is forwarded as whole")
	g.settled()
	// Those of known length that sent a whole chunk: one, one, two, three, fifteen.
	chunks, abandoned := map[string]bool{}, map[string]bool{}
	for _, m := range b.eventually(capture.RequestsStream, 22+5) {
		require.Nil(t, m.request, "never captured")
		if m.abandon != nil {
			abandoned[m.abandon.ID.String()] = true
		} else {
			chunks[m.chunk.ID.String()] = true
		}
	}
	require.Len(t, abandoned, 5)
	require.Equal(t, chunks, abandoned)
	require.Empty(t, b.read(capture.CompletionsStream))
}

// refusing is an address at which nobody listens.
func refusing(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, l.Close())
	return "http://" + l.Addr().String()
}

func TestAPIRefusesTheConnection(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, refusing(t), b.connect()))
	for _, n := range []int{10, 600 << 10} {
		a := g.must("POST", "/", bytes.NewReader(pattern(n)))
		require.Equal(t, 502, a.StatusCode)
		require.Equal(t, "holdfast; error=connection_refused", a.Header.Get("Proxy-Status"))
		require.Equal(t, "synced", a.Header.Get(capture.HTTPHeaderStored))
		require.Equal(t, "application/problem+json", a.Header.Get("Content-Type"))
		at := outcomes(g.spooled())[a.id(t)]
		require.Equal(t, capture.Failed, at.Verdict)
		require.Zero(t, at.Status)
	}
	g.stop()
	g = startGateway(t, newOptions(t, refusing(t), b.connect(), accept))
	a := g.must("POST", "/", strings.NewReader("x"))
	require.Equal(t, 202, a.StatusCode)
	require.Equal(t, "synced", a.Header.Get(capture.HTTPHeaderStored))
	require.JSONEq(t, `{"id":"`+a.id(t).String()+`","status":"accepted"}`, string(a.body))
	require.Equal(t, capture.Failed, outcomes(g.spooled())[a.id(t)].Verdict)
	require.Equal(t, 502, g.must("GET", "/", nil).StatusCode, "uncaptured")
}

func TestAPIResetsOrCutsItsAnswer(t *testing.T) {
	big := pattern(100 << 10)
	cases := map[string]struct {
		answer  string
		started bool // the answer has begun when it is cut
	}{
		"before a byte":        {"", false},
		"in the head":          {"HTTP/1.1 200 OK\r\nContent-Le", false},
		"not HTTP":             {"SSH-2.0-x\r\n\r\n", false},
		"in a short body":      {"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345", false},
		"in a long body":       {"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + string(big), true},
		"in chunks":            {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n", true},
		"before the last one":  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n12345\r\n0\r\n", true},
		"switches protocols":   {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", false},
		"no status":            {"HTTP/1.1 000 None\r\n\r\n", false},
		"before the first one": {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", false},
	}
	for _, mode := range []string{"passthrough", "accept"} {
		for name, c := range cases {
			t.Run(mode+" "+name, func(t *testing.T) {
				var arrived atomic.Int32
				api := rawAPI(t, func(conn net.Conn, br *bufio.Reader) {
					if _, err := readRequest(br); err == nil {
						arrived.Add(1)
						_, _ = io.WriteString(conn, c.answer)
					}
				})
				b := newBroker(t, stream.Streams{})
				g := startGateway(t, newOptions(t, api, b.connect(), set(func(s *Settings) { s.OnFailure = mode })))
				a, err := g.do("PUT", "/", strings.NewReader("x"), "Idempotency-Key", "k")
				switch {
				case c.started:
					require.True(t, err != nil || a.err != nil, "the client must see the cut")
				case mode == "accept":
					require.NoError(t, errors.Join(err, a.err))
					require.Equal(t, 202, a.StatusCode)
				default:
					require.NoError(t, errors.Join(err, a.err))
					require.Equal(t, 502, a.StatusCode)
					require.Contains(t, a.Header.Get("Proxy-Status"), "error=")
				}
				require.EqualValues(t, 1, arrived.Load(), "nothing is sent twice")
				require.Eventually(t, func() bool { return len(g.spooled()) == 2 }, patience, time.Millisecond)
				require.Equal(t, capture.Failed, g.spooled()[1].outcome.Attempt.Verdict)
				require.NotEmpty(t, g.spooled()[1].outcome.Attempt.Error)
			})
		}
	}
}

func TestAPIFailsByStatus(t *testing.T) {
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(503)
		_, _ = w.Write(bytes.Repeat([]byte("x"), len(r.URL.Path)*10000))
	}, accept)
	for _, path := range []string{"/", "/long"} {
		a := g.must("POST", path, nil)
		require.Equal(t, 202, a.StatusCode)
		at := outcomes(g.spooled())[a.id(t)]
		require.Equal(t, 503, at.Status)
		require.Equal(t, capture.Failed, at.Verdict)
	}
	require.Equal(t, 503, g.must("GET", "/", nil).StatusCode, "uncaptured")
}

func TestAPIIsTooSlow(t *testing.T) {
	for _, mode := range []string{"passthrough", "accept"} {
		block := make(chan struct{})
		g, _ := run(t, func(http.ResponseWriter, *http.Request) { <-block },
			set(func(s *Settings) { s.UpstreamTimeout, s.OnFailure = 50*time.Millisecond, mode }))
		t.Cleanup(func() { close(block) })
		a := g.must("POST", "/", strings.NewReader("x"))
		if mode == "accept" {
			require.Equal(t, 202, a.StatusCode)
		} else {
			require.Equal(t, 504, a.StatusCode)
			require.Equal(t, "holdfast; error=connection_read_timeout", a.Header.Get("Proxy-Status"))
		}
		require.Equal(t, capture.Failed, outcomes(g.spooled())[a.id(t)].Verdict)
	}
}

func TestFsyncFails(t *testing.T) {
	for _, by := range []string{"response", "event"} {
		for _, status := range []int{200, 302, 404, 408, 500, 0} {
			for _, size := range []int{1, 600 << 10} {
				fs := &faultFS{}
				var arrived atomic.Int32
				g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
					arrived.Add(1)
					_, _ = io.Copy(io.Discard, r.Body)
					if status == 0 {
						panic(http.ErrAbortHandler)
					}
					w.WriteHeader(status)
				}, func(o *Options) { o.fs, o.Settings.Completion, o.Settings.OnFailure = fs, by, "accept" })
				fs.set(failing("datasync", errDisk))
				a, err := g.do("POST", "/", bytes.NewReader(pattern(size)))
				require.EqualValues(t, 1, arrived.Load())
				if by == "response" && status >= 200 && status < 405 {
					require.NoError(t, errors.Join(err, a.err))
					require.Equal(t, status, a.StatusCode)
					require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
				} else {
					require.Error(t, err, "%s %d: a reset connection", by, status)
				}
				fs.set(nil) // closing the spool is no part of this
				g.stop()
			}
		}
	}
}

func TestFsyncFailsAndTheAPIWasNotReached(t *testing.T) {
	fs := &faultFS{}
	b := newBroker(t, stream.Streams{})
	g := startGateway(t, newOptions(t, refusing(t), b.connect(), accept, func(o *Options) { o.fs = fs }))
	fs.set(failing("datasync", errDisk))
	defer fs.set(nil)
	a := g.must("POST", "/", nil)
	require.Equal(t, 502, a.StatusCode, "an honest error, for the API has not seen a byte")
	require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
}

func TestFsyncFailsWithBestEffort(t *testing.T) {
	fs := &faultFS{}
	g, _ := run(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) },
		func(o *Options) { o.fs, o.Settings.Capture = fs, "best_effort" })
	fs.set(failing("datasync", errDisk))
	defer fs.set(nil)
	a := g.must("POST", "/", nil)
	require.Equal(t, 500, a.StatusCode)
	require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
}

// TestFsyncTakesTooLong also shows that the outcome is written all the same, so
// that what the API has processed is not sent again if the capture survives.
func TestFsyncTakesTooLong(t *testing.T) {
	fs := &faultFS{}
	g, b := run(t, ok, func(o *Options) { o.fs = fs; o.times.store = 20 * time.Millisecond })
	let := make(chan struct{})
	fs.set(func(op string) error {
		if op == "datasync" {
			<-let
		}
		return nil
	})
	a := g.must("POST", "/", strings.NewReader("x"))
	require.Equal(t, 200, a.StatusCode)
	require.Equal(t, "no", a.Header.Get(capture.HTTPHeaderStored))
	close(let)
	require.Equal(t, capture.Processed, g.verdict(b, a).Verdict)
}

func TestWritingTheOutcomeFails(t *testing.T) {
	fs := &faultFS{}
	hold := make(chan struct{})
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		<-hold
		ok(w, r)
	}, func(o *Options) { o.fs = fs })
	got := make(chan answer, 1)
	go func() {
		a, _ := g.do("POST", "/", strings.NewReader("x"))
		got <- a
	}()
	// The capture is durable before the API answers; then the disk refuses.
	require.Eventually(t, func() bool { return g.spool.Stats().SyncedIndex == 1 }, patience, time.Millisecond)
	fs.set(failing("write", errDisk))
	defer fs.set(nil)
	close(hold)
	a := <-got
	require.Equal(t, 200, a.StatusCode)
	require.Equal(t, "synced", a.Header.Get(capture.HTTPHeaderStored))
	list := b.eventually(capture.RequestsStream, 1)
	require.Equal(t, a.id(t), list[0].request.ID)
	require.Empty(t, b.read(capture.CompletionsStream), "no verdict: it stays replayable")
}

func TestNATSAway(t *testing.T) {
	nc, err := nats.Connect("nats://127.0.0.1:1", nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	g := startGateway(t, newOptions(t, serveAPI(t, ok), nc))
	require.Eventually(t, func() bool { return len(g.ready.Failing()) == 0 }, patience, time.Millisecond)
	for range 10 {
		a := g.must("POST", "/", strings.NewReader("x"))
		require.Equal(t, 200, a.StatusCode)
		require.Equal(t, "synced", a.Header.Get(capture.HTTPHeaderStored))
	}
	require.Len(t, g.spooled(), 20)
	g.stop() // bounded, though nobody releases anything
}

// TestKilledAtAnyPoint copies the spool's directory while the ingress runs,
// which is what kill -9 leaves, and starts another on the copy.
func TestKilledAtAnyPoint(t *testing.T) {
	b := newBroker(t, stream.Streams{})
	away, err := nats.Connect("nats://127.0.0.1:1", nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectBufSize(-1))
	require.NoError(t, err)
	t.Cleanup(away.Close)
	hold := make(chan struct{})
	begun := make(chan struct{}, 2)
	api := serveAPI(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			_, _ = io.ReadFull(r.Body, make([]byte, chunkBytes))
			begun <- struct{}{}
			<-hold
		}
		ok(w, r)
	})
	defer close(hold)
	first := startGateway(t, newOptions(t, api, away))
	answered := first.must("POST", "/", strings.NewReader("x"))
	big := first.must("POST", "/", bytes.NewReader(pattern(600<<10)))
	first.raw(head("POST /hold HTTP/1.1", "Host: x", "Content-Length: 1") + "y")
	c, _ := first.raw(head("PUT /hold HTTP/1.1", "Host: x", "Content-Length: 600000"))
	_, err = c.Write(pattern(chunkBytes))
	require.NoError(t, err)
	<-begun
	<-begun
	require.Eventually(t, func() bool { return len(first.spooled()) == 9 }, patience, time.Millisecond)

	o := newOptions(t, api, b.connect())
	copyDir(t, first.o.Settings.SpoolDir, o.Settings.SpoolDir)
	startGateway(t, o)
	list := b.eventually(capture.RequestsStream, 8)
	var requests, abandons int
	for _, m := range list {
		require.NotEqual(t, "", m.ref.Start)
		if m.request != nil {
			requests++
		}
		if m.abandon != nil {
			abandons++
			require.Equal(t, "holdfast.requests.default.PUT", m.subject)
		}
	}
	require.Equal(t, 3, requests)
	require.Equal(t, 1, abandons, "chunks without head are abandoned at the start")
	got := outcomes(b.eventually(capture.CompletionsStream, 2))
	require.Contains(t, got, answered.id(t))
	require.Contains(t, got, big.id(t))
}
