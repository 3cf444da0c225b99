package replayer_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

func TestSendsOverTLSToCertificatesOfAFile(t *testing.T) {
	a := &api{}
	a.Server = httptest.NewUnstartedServer(a.handler(nil))
	a.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that are meant to fail
	a.StartTLS()
	t.Cleanup(a.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.Certificate().Raw}), 0o600))
	u, err := url.Parse(a.URL)
	require.NoError(t, err)

	b := newBooks(t)
	ids := b.capture(t, many(5)...)
	o := options(t, b, a.URL) // checks against the system's certificates
	report := mustRun(t, o)
	require.Equal(t, replayer.EndPaused, report.End)
	require.Contains(t, report.Reason, "x509")
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, 1, d.Attempts, "no attempt was burnt")

	up, err := replayer.NewUpstream(replayer.UpstreamOptions{URL: u, CAFile: file, MaxConns: 4, Host: "other.example"})
	require.NoError(t, err)
	defer up.Close()
	o.Upstreams, o.Clock = up, newClock()
	report = mustRun(t, o)
	require.Equal(t, int64(5), report.Processed)

	_, err = replayer.NewUpstream(replayer.UpstreamOptions{URL: u, CAFile: filepath.Join(t.TempDir(), "none")})
	require.ErrorContains(t, err, "read certificates")
	require.NoError(t, os.WriteFile(file, []byte("none"), 0o600))
	_, err = replayer.NewUpstream(replayer.UpstreamOptions{URL: u, CAFile: file})
	require.ErrorContains(t, err, "holds none")
}

func TestTheHostIsKeptOrReplaced(t *testing.T) {
	for host, want := range map[string]string{"": "api.example", "other.example:81": "other.example:81"} {
		b := newBooks(t)
		b.capture(t, request{})
		var got string
		a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, _ int) { got = r.Host })
		o := options(t, b, a.URL)
		u, err := url.Parse(a.URL)
		require.NoError(t, err)
		up, err := replayer.NewUpstream(replayer.UpstreamOptions{URL: u, MaxConns: 4, Host: host})
		require.NoError(t, err)
		defer up.Close()
		o.Upstreams = up
		mustRun(t, o)
		require.Equal(t, want, got)
	}
}

// TestAnAnswerThatComesBeforeTheWholeRequest: an API that refuses a large body
// does not read it to its end.
func TestAnAnswerThatComesBeforeTheWholeRequest(t *testing.T) {
	for name, after := range map[string]func(c net.Conn, ended <-chan struct{}){
		// As servers do: no more is written, and what comes is read for a while,
		// so that the answer is not lost to a reset.
		"and what follows is read": func(c net.Conn, _ <-chan struct{}) {
			_ = c.(*net.TCPConn).CloseWrite()
			_, _ = io.Copy(io.Discard, c)
		},
		"and nothing is read any more": func(_ net.Conn, ended <-chan struct{}) { <-ended },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			hasty := newPolicy()
			hasty.Timeout = 500 * time.Millisecond
			b.capture(t, request{policy: hasty, body: bytes.Repeat([]byte("x"), 16<<20), chunked: true})
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			ended := make(chan struct{})
			serveRaw(t, listener, func(c net.Conn) {
				_ = c.SetDeadline(time.Now().Add(bound))
				if _, err := io.ReadFull(c, make([]byte, 64<<10)); err != nil {
					return // a probe
				}
				_, _ = io.WriteString(c, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
				after(c, ended)
			})
			report := mustRun(t, options(t, b, "http://"+listener.Addr().String()))
			close(ended)
			require.Equal(t, ledger.RunCounts{Sent: 1, Rejected: 1}, report.RunCounts)
			require.Equal(t, 413, report.Failures[0].Status)
		})
	}
}

// TestAnAPIThatIsTooSlow: the policy's timeout ends the attempt.
func TestAnAPIThatIsTooSlow(t *testing.T) {
	b := newBooks(t)
	hasty := newPolicy()
	hasty.Timeout = 50 * time.Millisecond
	ids := b.capture(t, request{policy: hasty})
	release := make(chan struct{})
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) { <-release })
	o := options(t, b, a.URL)
	o.MaxAttempts = 1
	report := mustRun(t, o)
	close(release)
	require.Equal(t, ledger.RunCounts{Sent: 1, Failed: 1}, report.RunCounts)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, "no whole answer within the timeout", d.Error)
	require.Equal(t, capture.StateFailed, d.State)
}

func TestRetryAfterAsADate(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(2)...)
	c := newClock()
	var once sync.Once
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		once.Do(func() {
			w.Header().Set("Retry-After", c.Now().Add(90*time.Second).UTC().Format(http.TimeFormat))
			w.WriteHeader(http.StatusTooManyRequests)
		})
	})
	o := options(t, b, a.URL)
	o.Clock, o.Concurrency = c, 1
	require.Equal(t, replayer.ExitOK, mustRun(t, o).ExitCode)
	require.InDelta(t, 90*time.Second, c.slept()[0], float64(time.Second))
}

// TestStopEndsEveryWait: for the API, for a turn, between passes, for a lease,
// for a grace.
func TestStopEndsEveryWait(t *testing.T) {
	graceful := newPolicy()
	graceful.Grace = time.Hour
	for name, set := range map[string]func(t *testing.T, b *books, o *replayer.Options){
		"for the api": func(t *testing.T, b *books, o *replayer.Options) {
			b.capture(t, request{})
			up := upstreamTo(t, "http://"+newPort(t).addr)
			o.Upstreams = up
		},
		"for a turn": func(t *testing.T, b *books, o *replayer.Options) {
			b.capture(t, many(5)...)
			o.Rate, o.Concurrency = 0.1, 1
		},
		"between passes": func(t *testing.T, b *books, o *replayer.Options) {
			b.capture(t, request{})
			a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(500) })
			up := upstreamTo(t, a.URL)
			o.Upstreams = up
		},
		"for a grace": func(t *testing.T, b *books, o *replayer.Options) {
			b.capture(t, request{policy: graceful, status: -1})
			o.Wait = time.Hour
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			o := options(t, b, newAPI(t, nil).URL)
			stop := make(chan struct{})
			o.Stop = stop
			set(t, b, &o)
			o.Clock = &stopping{clock: newClock(), stop: stop}
			report := mustRun(t, o)
			require.Equal(t, replayer.EndInterrupted, report.End)
			require.Equal(t, ledger.RunActive, runOf(t, b, report.Run).State)
		})
	}
	t.Run("for a lease", func(t *testing.T) {
		b := newBooks(t)
		o := options(t, b, newAPI(t, nil).URL)
		_, _, _, err := b.OpenRun(t.Context(), o.Selection.Filter, "", "somebody", time.Hour)
		require.NoError(t, err)
		stop := make(chan struct{})
		o.Stop, o.Clock = stop, &stopping{clock: newClock(), stop: stop}
		_, err = replayer.Run(t.Context(), o)
		require.ErrorIs(t, err, replayer.ErrInterrupted)
	})
}

// stopping closes stop at the first wait, which lasts until it is ended.
type stopping struct {
	*clock
	stop chan struct{}
	once sync.Once
}

func (s *stopping) Sleep(ctx context.Context, _ time.Duration) error {
	s.once.Do(func() { close(s.stop) })
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(bound):
		return fmt.Errorf("the wait was not ended")
	}
}

func TestOtherUnfinishedRunsAreListed(t *testing.T) {
	b := newBooks(t)
	b.capture(t, request{})
	other, lease, _, err := b.OpenRun(t.Context(), ledger.Filter{Replayable: true, Methods: []string{"PUT"}}, "", "somebody", time.Hour)
	require.NoError(t, err)
	require.NoError(t, b.LeaveRun(t.Context(), lease))
	report := mustRun(t, options(t, b, newAPI(t, nil).URL))
	require.False(t, report.PickedUp)
	require.Equal(t, []string{other.ID}, report.Unfinished)
	var text bytes.Buffer
	require.NoError(t, report.WriteText(&text))
	require.Contains(t, text.String(), "other unfinished runs\n  "+other.ID)
}

// TestALimitCountsWhatIsBegun, not what another run has.
func TestALimitCountsWhatIsBegun(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(6)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Limit, o.Concurrency = 2, 1
	o.Ledger = &meanwhile{books: b, do: func() {
		_, err := b.Complete(context.Background(), []ledger.Fact{{Event: &capture.Event{ID: ids[0], Outcome: capture.Processed, Attempt: 1}}})
		must(err)
	}}
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, map[string]int{ids[1].String(): 1, ids[2].String(): 1}, a.times())
	require.Equal(t, int64(1), report.Skipped)
}

// meanwhile has something happen between a selection and what is begun of it.
type meanwhile struct {
	*books
	once sync.Once
	do   func()
}

func (m *meanwhile) Begin(ctx context.Context, l ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) ([]ledger.Begun, error) {
	m.once.Do(m.do)
	return m.books.Begin(ctx, l, ids, o)
}
