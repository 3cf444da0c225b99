package ingress

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// TestOutcomeBeforeTheLastByte: when the client has read the last byte of any
// kind of answer, the outcome is in the spool.
func TestOutcomeBeforeTheLastByte(t *testing.T) {
	sizes := []int{1, answerBuffer - 1, answerBuffer, answerBuffer + 1, 32 << 10, 48 << 10, 1 << 20}
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		var n int
		switch {
		case scan(r.URL.Path, "/length/%d", &n):
			w.Header().Set("Content-Length", fmt.Sprint(n))
			_, _ = w.Write(pattern(n))
		case scan(r.URL.Path, "/chunked/%d", &n):
			for i := range 4 {
				_, _ = w.Write(pattern(n)[i*n/4 : (i+1)*n/4])
				w.(http.Flusher).Flush()
			}
		case scan(r.URL.Path, "/status/%d", &n):
			w.WriteHeader(n)
		case r.URL.Path == "/dies":
			panic(http.ErrAbortHandler)
		}
	}, set(func(s *Settings) { s.CaptureMethods = []string{"*"} }))
	type kind struct{ method, path string }
	kinds := []kind{
		{"POST", "/status/204"}, {"GET", "/status/304"}, {"POST", "/status/302"}, {"POST", "/status/404"},
		{"HEAD", "/length/100"}, {"HEAD", "/length/100000"}, {"POST", "/dies"}, {"POST", "/chunked/0"},
	}
	for _, n := range sizes {
		kinds = append(kinds, kind{"POST", fmt.Sprintf("/length/%d", n)}, kind{"GET", fmt.Sprintf("/chunked/%d", n)})
	}
	for _, proto := range []string{"1.1", "1.0"} {
		for _, k := range kinds {
			_, br := g.raw(head(k.method+" "+k.path+" HTTP/"+proto, "Host: x", "Content-Length: 0"))
			resp, err := http.ReadResponse(br, &http.Request{Method: k.method})
			require.NoError(t, err, k)
			_, err = io.Copy(io.Discard, resp.Body)
			// This is the moment: no wait of any kind.
			got := outcomes(g.spooled())
			require.NoError(t, err, k)
			a := answer{Response: resp}
			require.Contains(t, got, a.id(t), k)
			require.Equal(t, "synced", resp.Header.Get(capture.HTTPHeaderStored))
			if k.path != "/dies" {
				require.Equal(t, resp.StatusCode, got[a.id(t)].Status)
			}
			var n int
			if k.method == "POST" && scan(k.path, "/length/%d", &n) {
				require.EqualValues(t, n, resp.ContentLength)
			}
		}
	}
}

func scan(s, format string, n *int) bool {
	_, err := fmt.Sscanf(s, format, n)
	return err == nil
}

// TestAnswerIsHeldUntilFsync: not a byte goes out before, of whatever answer.
func TestAnswerIsHeldUntilFsync(t *testing.T) {
	for _, size := range []int{0, 10, 600 << 10} {
		for _, path := range []string{"/", "/large", "/dies"} {
			fs := &faultFS{}
			answered := make(chan struct{}, 1)
			g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				defer func() { answered <- struct{}{} }()
				switch r.URL.Path {
				case "/dies":
					panic(http.ErrAbortHandler)
				case "/large":
					_, _ = w.Write(pattern(1 << 20))
				}
			}, func(o *Options) { o.fs = fs; accept(o) })
			let, began := make(chan struct{}), make(chan struct{}, 10)
			fs.set(func(op string) error {
				if op == "datasync" {
					began <- struct{}{}
					<-let
				}
				return nil
			})
			c, br := g.raw(head("POST "+path+" HTTP/1.1", "Host: x", fmt.Sprintf("Content-Length: %d", size)) + string(pattern(size)))
			<-began
			if path != "/large" {
				<-answered
			}
			require.NoError(t, c.SetReadDeadline(time.Now().Add(30*time.Millisecond)))
			_, err := br.Peek(1)
			require.ErrorContains(t, err, "i/o timeout", "a byte went out before the fsync")
			close(let)
			require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
			resp, err := http.ReadResponse(br, nil)
			require.NoError(t, err)
			require.Equal(t, "synced", resp.Header.Get(capture.HTTPHeaderStored))
			_, err = io.Copy(io.Discard, resp.Body)
			require.NoError(t, err)
			g.stop()
		}
	}
}

// TestOutcomeIsWrittenWhileAnFsyncRuns: before the answer's last byte the outcome
// is written, not queued behind an fsync. A kill of the process would lose what
// is queued.
func TestOutcomeIsWrittenWhileAnFsyncRuns(t *testing.T) {
	fs := &faultFS{}
	arrived, goOn := make(chan string, 2), make(chan struct{})
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		arrived <- r.URL.Path
		if r.URL.Path == "/first" {
			<-goOn
		}
	}, func(o *Options) { o.fs = fs })
	first, second := make(chan answer, 1), make(chan error, 1)
	go func() {
		a, _ := g.do("POST", "/first", nil)
		first <- a
	}()
	require.Equal(t, "/first", <-arrived)
	require.Eventually(t, func() bool { return g.spool.Stats().SyncedIndex >= 1 }, patience, time.Millisecond)
	let, began := make(chan struct{}), make(chan struct{}, 10)
	fs.set(func(op string) error {
		if op == "datasync" {
			began <- struct{}{}
			<-let
		}
		return nil
	})
	go func() {
		_, err := g.do("POST", "/second", nil)
		second <- err
	}()
	<-began // from here on nothing is committed
	close(goOn)
	a := <-first
	require.NotNil(t, a.Response)
	require.Contains(t, outcomes(g.spooled()), uuid.MustParse(a.Header.Get(capture.HTTPHeaderID)))
	close(let)
	require.NoError(t, <-second)
}

// TestClientLeavesEarly: the API still gets everything, and the outcome is
// right.
func TestClientLeavesEarly(t *testing.T) {
	for _, size := range []int{10, 600 << 10} {
		for _, answerSize := range []int{10, 4 << 20} {
			got, goOn := make(chan int, 1), make(chan struct{})
			g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
				n, _ := io.Copy(io.Discard, r.Body)
				got <- int(n)
				<-goOn
				_, _ = w.Write(pattern(answerSize))
			})
			c, _ := g.raw(head("POST / HTTP/1.1", "Host: x", fmt.Sprintf("Content-Length: %d", size)) + string(pattern(size)))
			require.Equal(t, size, <-got)
			require.NoError(t, c.(*net.TCPConn).SetLinger(0)) // a reset, which is the ruder way
			require.NoError(t, c.Close())
			close(goOn)
			list := b.eventually(capture.CompletionsStream, 1)
			require.Equal(t, capture.Processed, list[0].outcome.Attempt.Verdict)
			g.stop()
		}
	}
}

// TestSlowClient: an answer that the client takes slowly has not failed.
func TestSlowClient(t *testing.T) {
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(32<<20))
		_, _ = w.Write(make([]byte, 32<<20))
	}, set(func(s *Settings) { s.UpstreamTimeout = 300 * time.Millisecond }))
	_, br := g.raw(head("POST / HTTP/1.1", "Host: x", "Content-Length: 0"))
	resp, err := http.ReadResponse(br, nil)
	require.NoError(t, err)
	<-time.After(600 * time.Millisecond) // this is the slowness
	n, err := io.Copy(io.Discard, resp.Body)
	require.NoError(t, err)
	require.EqualValues(t, 32<<20, n)
	require.Equal(t, capture.Processed, b.eventually(capture.CompletionsStream, 1)[0].outcome.Attempt.Verdict)
}

// TestClientThatIsTooSlow: a client that would take its answer for longer than
// the request's grace is cut off, and the outcome is known before the grace is
// over. Otherwise a replay would send a request that is being answered.
func TestClientThatIsTooSlow(t *testing.T) {
	const timeout, grace = 300 * time.Millisecond, 2 * time.Second
	whole := make(chan error, 1)
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(32<<20))
		_, err := w.Write(make([]byte, 32<<20))
		whole <- err
	}, set(func(s *Settings) { s.UpstreamTimeout, s.Grace = timeout, grace }))
	_, br := g.raw(head("POST / HTTP/1.1", "Host: x", "Content-Length: 0"))
	resp, err := http.ReadResponse(br, nil)
	require.NoError(t, err)
	// It reads nothing more, and the outcome comes all the same.
	a := b.eventually(capture.CompletionsStream, 1)[0].outcome.Attempt
	require.NoError(t, <-whole)
	require.Equal(t, capture.Processed, a.Verdict)
	require.Less(t, a.EndedAt.Sub(a.StartedAt), timeout+grace)
	_, err = io.Copy(io.Discard, resp.Body)
	require.ErrorIs(t, err, syscall.ECONNRESET)
}

// TestSilentClient: one that stops in its body is let go.
func TestSilentClient(t *testing.T) {
	g, _ := run(t, ok, set(func(s *Settings) { s.ReadBodyTimeout = 20 * time.Millisecond }))
	for _, coding := range []string{"Content-Length: 10", "Content-Length: 600000", "Transfer-Encoding: chunked"} {
		for _, method := range []string{"POST", "GET"} {
			_, br := g.raw(head(method+" / HTTP/1.1", "Host: x", coding) + "5\r\n")
			resp, err := http.ReadResponse(br, nil)
			require.NoError(t, err, coding)
			require.Equal(t, 408, resp.StatusCode)
		}
	}
	g.settled()
}

func TestInflightLimit(t *testing.T) {
	hold := make(chan struct{})
	arrived := make(chan struct{}, 4)
	g, _ := run(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		arrived <- struct{}{}
		<-hold
	}, set(func(s *Settings) { s.MaxInflightBytes, s.InlineBytes = 1<<20, 768<<10 }))
	ended := make(chan int, 1)
	go func() {
		a, err := g.do("POST", "/", bytes.NewReader(pattern(700<<10)))
		if err != nil {
			ended <- 0
			return
		}
		ended <- a.StatusCode
	}()
	<-arrived
	for _, body := range []io.Reader{bytes.NewReader(pattern(400 << 10)), unsized(pattern(400 << 10)), bytes.NewReader(pattern(2 << 20))} {
		a := g.must("POST", "/", body, "Expect", "100-continue")
		require.Equal(t, 503, a.StatusCode)
		require.Equal(t, "5", a.Header.Get("Retry-After"))
	}
	close(hold)
	require.Equal(t, 200, <-ended)
	require.Equal(t, 200, g.must("POST", "/", bytes.NewReader(pattern(400<<10))).StatusCode)
	// One that is larger than the limit passes alone.
	require.Equal(t, 200, g.must("POST", "/", unsized(pattern(3<<20))).StatusCode)
	require.Eventually(t, func() bool { return g.h.inflight.used.Load() == 0 }, patience, time.Millisecond)
}

func TestEarlyAnswerOfTheAPI(t *testing.T) {
	g, b := run(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		w.WriteHeader(422)
	})
	const size = 4 << 20
	a := g.must("POST", "/", bytes.NewReader(pattern(size)))
	require.Equal(t, 422, a.StatusCode)
	require.Equal(t, capture.Rejected, outcomes(b.eventually(capture.CompletionsStream, 1))[a.id(t)].Verdict)
	list := b.eventually(capture.RequestsStream, 17)
	require.NotNil(t, list[16].request, "the capture is whole all the same")
	require.EqualValues(t, size, list[16].request.Size)
	require.Equal(t, 422, g.must("GET", "/", strings.NewReader(strings.Repeat("x", size))).StatusCode, "uncaptured")
}
