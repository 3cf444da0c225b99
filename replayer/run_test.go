package replayer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

func TestSendsWhatFailedOnceAndInTheOrderOfIDs(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(30)...)
	b.capture(t, request{status: 200}, request{status: 404})
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Concurrency = 1
	report := mustRun(t, o)

	require.Equal(t, replayer.EndFinished, report.End)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, int64(30), report.Selected)
	require.Equal(t, ledger.RunCounts{Sent: 30, Processed: 30}, report.RunCounts)
	require.Equal(t, report.RunCounts, report.Total)
	var order []string
	for _, one := range a.seen() {
		order = append(order, one.id)
		require.Equal(t, "2", one.attempt)
		require.Equal(t, report.Run, one.run)
	}
	require.Equal(t, texts(ids), order)
	require.Equal(t, map[capture.State]int64{capture.StateProcessed: 31, capture.StateRejected: 1}, b.states(t))

	run, err := b.Run(t.Context(), report.Run)
	require.NoError(t, err)
	require.Equal(t, ledger.RunFinished, run.State)
	var kept replayer.Report
	require.NoError(t, json.Unmarshal(run.Report, &kept))
	require.Equal(t, report, kept)
}

func texts(ids []uuid.UUID) []string {
	var s []string
	for _, id := range ids {
		s = append(s, id.String())
	}
	return s
}

// TestSendsTheSameBytes reads from a raw socket what net/http would tidy up.
func TestSendsTheSameBytes(t *testing.T) {
	b := newBooks(t)
	large := bytes.Repeat([]byte("0123456789abcdef"), 80<<10) // 1.25 MiB: five chunks
	ids := b.capture(t,
		request{
			method: "PROPFIND", target: "//a/%2F/../b?x=\x01\xff&", body: []byte("\x00body\r\n"),
			headers: "x-odd-Case: 1\r\nCookie: b=2; a=1; b=2\r\nCookie: \r\nX-Twice: one\r\nX-Obs: \xe9\r\nX-Twice: two\r\nX_Request_UUID: forged\r\nConnection: close\r\n",
		},
		request{method: "PUT", target: "/large", body: large, chunked: true},
	)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var mu sync.Mutex
	var heads []string
	var bodies [][]byte
	serveRaw(t, listener, func(c net.Conn) {
		head, body, err := readRaw(c)
		if err != nil {
			return
		}
		mu.Lock()
		heads, bodies = append(heads, head), append(bodies, body)
		mu.Unlock()
		_, _ = io.WriteString(c, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
	})
	o := options(t, b, "http://"+listener.Addr().String())
	o.Concurrency = 1
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, "%+v", report)

	mu.Lock()
	defer mu.Unlock()
	received, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, "PROPFIND //a/%2F/../b?x=\x01\xff& HTTP/1.1\r\nHost: api.example\r\n"+
		"x-odd-Case: 1\r\nCookie: b=2; a=1; b=2\r\nCookie: \r\nX-Twice: one\r\nX-Obs: \xe9\r\nX-Twice: two\r\n"+
		"Content-Length: 7\r\nX-Request-UUID: "+ids[0].String()+"\r\nX-Request-Replay: "+report.Run+
		"\r\nX-Request-Attempt: 2\r\nX-Request-Received-At: "+received.ReceivedAt.Format(time.RFC3339Nano)+"\r\n\r\n", heads[0])
	require.Equal(t, "\x00body\r\n", string(bodies[0]))
	require.True(t, bytes.Equal(large, bodies[1]))
}

// serveRaw calls serve for each connection and closes it afterwards.
func serveRaw(t *testing.T, l net.Listener, serve func(net.Conn)) {
	t.Helper()
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer func() { _ = c.Close() }()
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
}

// readRaw reads one request as bytes. A connection that only probes gives an
// error.
func readRaw(c net.Conn) (head string, body []byte, err error) {
	_ = c.SetDeadline(time.Now().Add(bound))
	var read []byte
	one := make([]byte, 1)
	for !bytes.HasSuffix(read, []byte("\r\n\r\n")) {
		if _, err := io.ReadFull(c, one); err != nil {
			return "", nil, err
		}
		read = append(read, one...)
	}
	head = string(read)
	_, after, _ := strings.Cut(head, "Content-Length: ")
	length := 0
	if _, err := fmt.Sscan(after, &length); err != nil {
		return "", nil, err
	}
	body = make([]byte, length)
	_, err = io.ReadFull(c, body)
	return head, body, err
}

// TestNothingIsRepeatedBelow kills the connection at each stage, new and kept
// alive: what arrives is what the ledger knows as attempts.
func TestNothingIsRepeatedBelow(t *testing.T) {
	for _, method := range []string{"GET", "PUT", "POST"} {
		for stage, die := range map[string]string{
			"after the request":   "",
			"in the status line":  "HTTP/1.1 20",
			"in the head":         "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n",
			"in the body":         "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok",
			"in a chunk":          "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok",
			"before the last one": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
		} {
			if method != "PUT" && stage != "after the request" {
				continue // the method counts where libraries repeat at all
			}
			t.Run(method+" "+stage, func(t *testing.T) {
				b := newBooks(t)
				ids := b.capture(t, request{method: method, status: 502}, request{method: method, status: 502})
				listener, err := net.Listen("tcp", "127.0.0.1:0")
				require.NoError(t, err)
				var mu sync.Mutex
				arrived := make(map[string]int)
				serveRaw(t, listener, func(c net.Conn) {
					for n := 0; ; n++ {
						head, _, err := readRaw(c)
						if err != nil {
							return
						}
						_, id, _ := strings.Cut(head, "X-Request-UUID: ")
						id, _, _ = strings.Cut(id, "\r\n")
						mu.Lock()
						arrived[id]++
						mu.Unlock()
						// The first request is answered, so that the second meets a
						// connection that was kept alive and dies.
						if id == ids[0].String() {
							_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
							continue
						}
						_, _ = io.WriteString(c, die)
						return
					}
				})
				o := options(t, b, "http://"+listener.Addr().String())
				o.Concurrency, o.MaxAttempts = 1, 2
				report := mustRun(t, o)
				mu.Lock()
				defer mu.Unlock()
				require.Equal(t, map[string]int{ids[0].String(): 1, ids[1].String(): 2}, arrived)
				require.Equal(t, ledger.RunCounts{Sent: 3, Processed: 1, Failed: 2}, report.RunCounts)
				require.Equal(t, replayer.ExitReplayable, report.ExitCode)
				require.Len(t, report.Failures, 1)
				require.NotEmpty(t, report.Failures[0].Error)
			})
		}
	}
}

func TestVerdictsAttemptsAndExitCodes(t *testing.T) {
	event := newPolicy()
	event.By, event.Grace = capture.ByEvent, time.Hour
	for name, c := range map[string]struct {
		policy   capture.Policy
		status   int
		arrivals int
		counts   ledger.RunCounts
		left     replayer.LeftCounts
		code     int
	}{
		"2xx is processed":              {newPolicy(), 201, 1, ledger.RunCounts{Sent: 1, Processed: 1}, replayer.LeftCounts{}, 0},
		"a redirect is not followed":    {newPolicy(), 302, 1, ledger.RunCounts{Sent: 1, Processed: 1}, replayer.LeftCounts{}, 0},
		"5xx up to the attempts":        {newPolicy(), 500, 3, ledger.RunCounts{Sent: 3, Failed: 3}, replayer.LeftCounts{Replayable: 1}, 3},
		"a stale token is not the last": {newPolicy(), 401, 3, ledger.RunCounts{Sent: 3, Failed: 3}, replayer.LeftCounts{Replayable: 1}, 3},
		"4xx is rejected":               {newPolicy(), 422, 1, ledger.RunCounts{Sent: 1, Rejected: 1}, replayer.LeftCounts{Rejected: 1}, 4},
		"an event is awaited":           {event, 200, 1, ledger.RunCounts{Sent: 1, Unknown: 1}, replayer.LeftCounts{Waiting: 1}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			b.capture(t, request{policy: c.policy, status: 503})
			a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
				w.Header().Set("Location", "/elsewhere")
				w.WriteHeader(c.status)
			})
			report := mustRun(t, options(t, b, a.URL))
			require.Len(t, a.seen(), c.arrivals)
			require.Equal(t, c.counts, report.RunCounts)
			require.Equal(t, c.left, report.Left)
			require.Equal(t, c.code, report.ExitCode)
		})
	}
}

func TestFailedOnesBackOffAndTheOthersGoOn(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(4)...)
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[0].String() && nth < 3 {
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	o := options(t, b, a.URL)
	o.Concurrency = 1
	c := o.Clock.(*clock)
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	var order []string
	for _, one := range a.seen() {
		order = append(order, one.id+" "+one.attempt)
	}
	require.Equal(t, []string{
		ids[0].String() + " 2", ids[1].String() + " 2", ids[2].String() + " 2", ids[3].String() + " 2",
		ids[0].String() + " 3", ids[0].String() + " 4",
	}, order)
	require.Equal(t, []time.Duration{time.Second, 2 * time.Second}, c.slept())
	require.Empty(t, report.Failures, "it was processed in the end")
}

func TestRetryAfterPausesTheWholeRun(t *testing.T) {
	for _, status := range []int{429, 503} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			b := newBooks(t)
			b.capture(t, many(3)...)
			c := newClock()
			var mu sync.Mutex
			var times []time.Duration
			began := c.Now()
			a := newAPI(t, func(w http.ResponseWriter, r *http.Request, nth int) {
				mu.Lock()
				defer mu.Unlock()
				times = append(times, c.Now().Sub(began))
				if len(times) == 1 {
					w.Header().Set("Retry-After", "40")
					w.WriteHeader(status)
				}
			})
			o := options(t, b, a.URL)
			o.Clock, o.Concurrency = c, 1
			report := mustRun(t, o)
			require.Equal(t, replayer.ExitOK, report.ExitCode)
			require.Equal(t, time.Duration(0), times[0])
			for _, at := range times[1:] {
				require.GreaterOrEqual(t, at, 40*time.Second)
			}
			require.Len(t, times, 4)
		})
	}
}

func TestARetryAfterBeyondThePauseLimitEndsTheRun(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.Header().Set("Retry-After", "3600")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	o := options(t, b, a.URL)
	o.Concurrency = 1
	report := mustRun(t, o)
	require.Equal(t, replayer.EndPaused, report.End)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Contains(t, report.Reason, "--pause-limit is 5m0s")
	require.Len(t, a.seen(), 1)
	// The next process goes on with it.
	o.Clock = newClock()
	again := mustRun(t, o)
	require.Equal(t, report.Run, again.Run)
	require.True(t, again.PickedUp)
}

// TestWaitsForAnAPIThatIsDown has the API come up while the run probes.
func TestWaitsForAnAPIThatIsDown(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(5)...)
	p := newPort(t)

	o := options(t, b, "http://"+p.addr)
	c := o.Clock.(*clock)
	a := &api{}
	server := &http.Server{Handler: a.handler(nil)}
	t.Cleanup(func() { _ = server.Close() })
	var serving sync.WaitGroup
	probes := 0
	c.each = func(time.Duration) {
		if probes++; probes == 4 {
			l, err := p.listen()
			must(err)
			serving.Go(func() { _ = server.Serve(l) })
		}
	}
	report := mustRun(t, o)
	require.NoError(t, server.Close())
	serving.Wait()
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, []time.Duration{250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2 * time.Second}, c.slept())
	for _, id := range ids {
		require.Equal(t, 1, a.times()[id.String()])
		d, err := b.Get(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, 2, d.Attempts, "no attempt was burnt while the API was away")
	}
}

func TestGivesUpOnAnAPIThatStaysDown(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(2)...)
	o := options(t, b, "http://"+newPort(t).addr)
	o.PauseLimit = time.Minute
	report := mustRun(t, o)
	require.Equal(t, replayer.EndPaused, report.End)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Contains(t, report.Reason, "connection refused")
	total := time.Duration(0)
	for _, d := range o.Clock.(*clock).slept() {
		total += d
	}
	require.Equal(t, time.Minute, total)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, 1, d.Attempts)
}

// TestAnAPIThatDiesInTheMiddle: few attempts are burnt before the run pauses.
func TestAnAPIThatDiesInTheMiddle(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(50)...)
	p := newPort(t)
	l, err := p.listen()
	require.NoError(t, err)
	a := &api{}
	var server *http.Server
	var serving sync.WaitGroup
	server = &http.Server{Handler: a.handler(func(_ http.ResponseWriter, _ *http.Request, _ int) {
		if len(a.seen()) == 10 {
			_ = l.Close()
			panic(http.ErrAbortHandler)
		}
	})}
	server.SetKeepAlivesEnabled(false)
	serving.Go(func() { _ = server.Serve(l) })
	second := &http.Server{Handler: a.handler(nil)}
	o := options(t, b, "http://"+p.addr)
	o.Concurrency = 2
	c := o.Clock.(*clock)
	var up sync.Once
	c.each = func(d time.Duration) {
		if d == 500*time.Millisecond { // the second probe
			up.Do(func() {
				again, err := p.listen()
				must(err)
				serving.Go(func() { _ = second.Serve(again) })
			})
		}
	}
	report := mustRun(t, o)
	_, _ = server.Close(), second.Close()
	serving.Wait()
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, int64(50), report.Processed)
	require.LessOrEqual(t, report.Failed, int64(4))
	require.GreaterOrEqual(t, report.Failed, int64(1))
}

func TestPacesItself(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(11)...)
	c := newClock()
	began := c.Now()
	var mu sync.Mutex
	var at []time.Duration
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		mu.Lock()
		defer mu.Unlock()
		at = append(at, c.Now().Sub(began).Round(time.Millisecond))
	})
	o := options(t, b, a.URL)
	o.Clock, o.Rate, o.Concurrency = c, 5, 1
	report := mustRun(t, o)
	require.Equal(t, int64(11), report.Processed)
	for i, d := range at {
		require.GreaterOrEqual(t, d, time.Duration(i)*200*time.Millisecond-time.Millisecond)
	}
	require.Equal(t, 2*time.Second, c.Now().Sub(began).Round(10*time.Millisecond))
	require.InDelta(t, 5.5, report.Rate, 0.1)
}

// TestAPageThatGrowsTooOldIsCut: a slow run selects anew, behind a new fence,
// and leaves nothing out.
func TestAPageThatGrowsTooOldIsCut(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(60)...)
	leaveUnresolved(t, b, ids[3], ids[30], ids[59])
	c := newClock()
	fences := 0
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Clock, o.Rate, o.Concurrency = c, 5, 2
	o.Fence = passer(func(context.Context) error { fences++; return nil })
	report := mustRun(t, o)
	require.Equal(t, int64(60), report.Processed)
	require.Len(t, a.times(), 60)
	require.Len(t, a.seen(), 60)
	require.GreaterOrEqual(t, fences, 5, "12 s of sending, 2 s a page")
	require.Equal(t, ids[59].String(), a.seen()[59].id, "an unresolved one goes with its own page")
	require.NotContains(t, c.slept(), time.Second, "one pass was enough")
}

func TestLimitIsOfRequestsAndLeftIsOfThem(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(10)...)
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[1].String() && nth == 1 {
			w.WriteHeader(http.StatusBadGateway)
		}
	})
	o := options(t, b, a.URL)
	o.Limit = 3
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Equal(t, ledger.RunCounts{Sent: 4, Processed: 3, Failed: 1}, report.RunCounts)
	require.Equal(t, map[string]int{ids[0].String(): 1, ids[1].String(): 2, ids[2].String(): 1}, a.times())
	o.Limit = 0
	report = mustRun(t, o)
	require.Equal(t, int64(7), report.Processed)
}

func TestTwoRunsAtOnceSendNothingTwice(t *testing.T) {
	b := newBooks(t)
	other := openBooks(t, b.path) // with connections of its own, like another process
	ids := b.capture(t, many(300)...)
	a := newAPI(t, nil)
	var both sync.WaitGroup
	reports := make([]replayer.Report, 2)
	for i, store := range []*books{b, other} {
		o := options(t, store, a.URL)
		o.Owner = fmt.Sprint("process ", i)
		// Another selection of the same, so that neither waits for the other.
		o.Selection.Filter.Methods = [][]string{{"POST"}, nil}[i]
		both.Go(func() { reports[i] = mustRun(t, o) })
	}
	both.Wait()
	require.NotEqual(t, reports[0].Run, reports[1].Run)
	require.Equal(t, int64(300), reports[0].Processed+reports[1].Processed)
	for _, id := range ids {
		require.Equal(t, 1, a.times()[id.String()])
	}
	require.Len(t, a.seen(), 300)
}

// TestALostLeaseEndsTheRun: somebody picks the run up because its lease is over;
// the first holder sends nothing more.
func TestALostLeaseEndsTheRun(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(20)...)
	var o replayer.Options
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {})
	o = options(t, b, a.URL)
	o.Concurrency = 1
	fences := 0
	o.Fence = passer(func(context.Context) error {
		if fences++; fences == 2 { // the first page's; the run is there
			b.later(time.Hour)
			run, _, picked, err := b.OpenRun(context.Background(), o.Selection.Filter, "", "a thief", time.Minute)
			if err != nil || !picked || run.Owner != "a thief" {
				return fmt.Errorf("not taken: %v %v", picked, err)
			}
		}
		return nil
	})
	report := mustRun(t, o)
	require.Empty(t, a.seen())
	require.Equal(t, replayer.EndFailed, report.End)
	require.Equal(t, replayer.ExitFailed, report.ExitCode)
	require.Contains(t, report.Reason, replayer.ErrLost.Error())
}

type passer func(context.Context) error

func (p passer) Pass(ctx context.Context) error { return p(ctx) }

// TestNothingIsSentUnderALeaseThatIsTooShort takes the ledger's time away
// between begin and send.
func TestNothingIsSentUnderALeaseThatIsTooShort(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(1)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.MaxAttempts = 1
	o.Ledger = shortLeases{b}
	report := mustRun(t, o)
	require.Empty(t, a.seen())
	require.Equal(t, int64(0), report.Sent)
	require.Equal(t, int64(1), report.Failed)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Contains(t, d.Error, "not sent")
	require.Equal(t, capture.StateFailed, d.State)
}

// shortLeases is a ledger whose transactions take as long as the lease's margin.
type shortLeases struct{ *books }

func (s shortLeases) Begin(ctx context.Context, l ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) ([]ledger.Begun, error) {
	begun, err := s.books.Begin(ctx, l, ids, o)
	for i := range begun {
		begun[i].Expires = time.Now().Add(newPolicy().Timeout)
	}
	return begun, err
}

// TestNothingIsSentWhenThePayloadTookTheLeasesTime: the ledger is slow to give
// the payload, and the lease would end while the API works.
func TestNothingIsSentWhenThePayloadTookTheLeasesTime(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(1)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.MaxAttempts = 1
	o.Ledger = &slowPayloads{books: b}
	report := mustRun(t, o)
	require.Empty(t, a.seen())
	require.Equal(t, int64(0), report.Sent)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Contains(t, d.Error, "not sent")
}

// slowPayloads is a ledger that gives payloads when the lease has just as long
// as the timeout.
type slowPayloads struct {
	*books
	expires time.Time
}

func (s *slowPayloads) Begin(ctx context.Context, l ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) ([]ledger.Begun, error) {
	begun, err := s.books.Begin(ctx, l, ids, o)
	s.expires = time.Now().Add(newPolicy().Timeout + time.Second)
	for i := range begun {
		begun[i].Expires = s.expires
	}
	return begun, err
}

func (s *slowPayloads) Payload(ctx context.Context, id uuid.UUID) ([]byte, io.ReadCloser, error) {
	<-time.After(time.Until(s.expires) - newPolicy().Timeout)
	return s.books.Payload(ctx, id)
}

func TestACancelledRunSendsNothingMore(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(20)...)
	a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
		_ = b.CancelRun(context.Background(), r.Header.Get(capture.HTTPHeaderReplay))
	})
	o := options(t, b, a.URL)
	o.Concurrency = 1
	report := mustRun(t, o)
	require.Len(t, a.seen(), 1)
	require.Equal(t, replayer.EndCancelled, report.End)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	run, err := b.Run(t.Context(), report.Run)
	require.NoError(t, err)
	require.Equal(t, ledger.RunCancelled, run.State)
}

func TestStopFinishesWhatIsInFlight(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(20)...)
	stop := make(chan struct{})
	var once sync.Once
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) { once.Do(func() { close(stop) }) })
	o := options(t, b, a.URL)
	o.Concurrency, o.Stop = 1, stop
	report := mustRun(t, o)
	require.Equal(t, replayer.EndInterrupted, report.End)
	require.NotEmpty(t, a.seen())
	require.Equal(t, int64(len(a.seen())), report.Processed)
	require.Equal(t, int64(20)-report.Processed, b.states(t)[capture.StateFailed])
	// At once, without waiting for a lease.
	o.Stop, o.Clock = nil, newClock()
	again := mustRun(t, o)
	require.True(t, again.PickedUp)
	require.Equal(t, report.Run, again.Run)
	require.Len(t, a.seen(), 20)
	require.Empty(t, o.Clock.(*clock).slept())
}

// TestACutRunDoesNotWaitForTheAPI: what the second signal does.
func TestACutRunDoesNotWaitForTheAPI(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(1)...)
	arrived, release := make(chan struct{}), make(chan struct{})
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		close(arrived)
		<-release
	})
	defer close(release)
	o := options(t, b, a.URL)
	ctx, cut := context.WithCancel(t.Context())
	go func() {
		<-arrived
		cut()
	}()
	report, err := replayer.Run(ctx, o)
	require.NoError(t, err)
	require.Equal(t, replayer.EndInterrupted, report.End)
	d, err := b.Get(t.Context(), ids[0])
	require.NoError(t, err)
	require.Equal(t, capture.StateFailed, d.State)
	require.Contains(t, d.Error, "interrupted")
}

// TestAnUnresolvedOneIsSentAlone: whoever sent it died. It goes when nothing
// else is in flight, after the others of its page.
func TestAnUnresolvedOneIsSentAlone(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(9)...)
	leaveUnresolved(t, b, ids[0])
	var before map[capture.State]int64
	a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, _ int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[0].String() {
			before = b.states(t)
		}
	})
	report := mustRun(t, options(t, b, a.URL))
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	seen := a.seen()
	require.Len(t, seen, 9)
	require.Equal(t, ids[0].String(), seen[8].id)
	require.Equal(t, "3", seen[8].attempt)
	require.Equal(t, int64(8), before[capture.StateProcessed], "the others had ended, and their results were written")
}

// leaveUnresolved does what a process does that dies with requests in flight.
func leaveUnresolved(t *testing.T, b *books, ids ...uuid.UUID) {
	t.Helper()
	run, lease, _, err := b.OpenRun(t.Context(), ledger.Filter{IDs: ids}, "", "the dead", time.Second)
	require.NoError(t, err)
	begun, err := b.Begin(t.Context(), lease, ids, ledger.BeginOptions{Lease: time.Second, MaxAttempts: 3})
	require.NoError(t, err)
	for _, one := range begun {
		require.Empty(t, one.Skip)
	}
	require.NoError(t, b.CancelRun(t.Context(), run.ID))
	b.later(time.Hour)
}

func TestWaitsForWhatIsInItsGrace(t *testing.T) {
	b := newBooks(t)
	graceful := newPolicy()
	graceful.Grace, graceful.Timeout = 10*time.Second, time.Second
	b.capture(t, request{policy: graceful, status: -1}, request{})
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Equal(t, replayer.LeftCounts{Waiting: 1}, report.Left)

	c := newClock()
	c.each = func(d time.Duration) { b.later(d) }
	o.Clock, o.Wait = c, time.Minute
	report = mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Len(t, a.seen(), 2)
}

func TestWaitsForACompletionEventAndNotForEver(t *testing.T) {
	event := newPolicy()
	event.By, event.Grace = capture.ByEvent, time.Hour
	b := newBooks(t)
	ids := b.capture(t, request{policy: event, status: 500})
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	c := newClock()
	o.Clock, o.Wait = c, 10*time.Second
	n := 0
	c.each = func(time.Duration) {
		if n++; n == 3 {
			_, err := b.Complete(context.Background(), []ledger.Fact{{Event: &capture.Event{ID: ids[0], Outcome: capture.Processed, Attempt: 2}}})
			if err != nil {
				panic(err)
			}
		}
	}
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Len(t, a.seen(), 1)
	require.Len(t, c.slept(), 3)

	b.capture(t, request{policy: event, status: 500})
	o.Clock = newClock()
	report = mustRun(t, o)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Equal(t, int64(1), report.Left.Waiting)
	require.Len(t, o.Clock.(*clock).slept(), 10)
}

// TestAnotherTargetChangesNoState sends elsewhere what stays as it is.
func TestAnotherTargetChangesNoState(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(5)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Target = a.URL
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode, "it answers otherwise")
	require.EqualValues(t, 5, report.Compared.StatusDiffers)
	require.Len(t, a.seen(), 5)
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 5}, b.states(t))
}

func TestManyPagesAndAsMuchAtATime(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(450)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Concurrency = 32
	fences := 0
	o.Fence = passer(func(context.Context) error { fences++; return nil })
	report := mustRun(t, o)
	require.Equal(t, ledger.RunCounts{Sent: 450, Processed: 450}, report.RunCounts)
	require.GreaterOrEqual(t, fences, 3, "each page has its own")
	require.False(t, report.Newer)
}

func TestTheSelectionIsFrozenAndWhatCameLaterIsSaid(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	late := make(chan struct{}, 1)
	late <- struct{}{}
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		select {
		case <-late:
			b.capture(t, many(2)...)
		default:
		}
	})
	o := options(t, b, a.URL)
	o.Concurrency = 1
	report := mustRun(t, o)
	require.Len(t, a.seen(), 3)
	require.True(t, report.Newer)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Contains(t, strings.Join(report.Next, "\n"), "more requests that match have come")
}

// TestTheSelectionIsFrozenBehindTheFence: what was captured before the command
// and reaches the ledger while the fence is waited for is part of the selection.
func TestTheSelectionIsFrozenBehindTheFence(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	var once sync.Once
	o.Fence = passer(func(context.Context) error {
		once.Do(func() { b.capture(t, many(2)...) })
		return nil
	})
	report := mustRun(t, o)
	require.Equal(t, int64(5), report.Processed)
	require.Len(t, a.seen(), 5)
	require.False(t, report.Newer)
}

// TestNoRunIsMadeBeforeTheFence: it would be picked up later, with a selection
// that knows nothing of what the fence was waiting for.
func TestNoRunIsMadeBeforeTheFence(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Fence = passer(func(context.Context) error {
		return &replayer.FenceError{Waits: []string{"the acker is 3 messages behind"}}
	})
	report := mustRun(t, o)
	require.Equal(t, replayer.EndFailed, report.End)
	require.Equal(t, replayer.ExitFailed, report.ExitCode)
	require.Contains(t, report.Reason, "the acker is 3 messages behind")
	require.Empty(t, report.Run)
	runs, _, err := b.Runs(t.Context(), "", 10)
	require.NoError(t, err)
	require.Empty(t, runs)

	o.Fence = passing{}
	require.Equal(t, int64(3), mustRun(t, o).Processed)
}

// TestPicksUpARunWithARelativeTime: started again later, --since 2h is the same
// selection, and its window stays.
func TestPicksUpARunWithARelativeTime(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	o.Selection.SinceAgo = 2 * time.Hour
	fences := 0
	o.Fence = passer(func(context.Context) error {
		if fences++; fences > 1 { // the run is there
			return fmt.Errorf("the acker is away")
		}
		return nil
	})
	first := mustRun(t, o)
	require.Equal(t, replayer.ExitFailed, first.ExitCode)
	b.later(90 * time.Minute)
	o.Fence = passing{}
	other := o
	other.Selection.SinceAgo = 3 * time.Hour
	require.False(t, other.Selection.Same(runOf(t, b, first.Run)))
	report := mustRun(t, o)
	require.Equal(t, first.Run, report.Run)
	require.True(t, report.PickedUp)
	require.Equal(t, first.Filter.Since, report.Filter.Since)
	require.Len(t, a.seen(), 3)
}

func runOf(t *testing.T, b *books, id string) ledger.Run {
	t.Helper()
	r, err := b.Run(t.Context(), id)
	require.NoError(t, err)
	return r
}

// TestTellsADeadHolderFromALivingOne: a run under lease is picked up when the
// lease runs out, and left alone when it is renewed.
func TestTellsADeadHolderFromALivingOne(t *testing.T) {
	for _, alive := range []bool{false, true} {
		t.Run(fmt.Sprintf("alive %v", alive), func(t *testing.T) {
			b := newBooks(t)
			b.capture(t, many(3)...)
			a := newAPI(t, nil)
			o := options(t, b, a.URL)
			run, lease, _, err := b.OpenRun(t.Context(), o.Selection.Filter, "", "somebody", 10*time.Second)
			require.NoError(t, err)
			c := newClock()
			c.each = func(d time.Duration) {
				b.later(d)
				if alive {
					_, _ = b.KeepRun(context.Background(), lease, 10*time.Second)
				}
			}
			o.Clock = c
			report := mustRun(t, o)
			require.Equal(t, !alive, report.PickedUp)
			require.Equal(t, alive, report.Run != run.ID)
			require.Equal(t, replayer.ExitOK, report.ExitCode)
			require.Len(t, a.seen(), 3)
		})
	}
}

// TestALedgerThatIsBusyIsTriedAgain, and one that stays away ends the run.
func TestALedgerThatIsBusyIsTriedAgain(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(3)...)
	a := newAPI(t, nil)
	o := options(t, b, a.URL)
	busy := &busyLedger{books: b, times: 3}
	o.Ledger = busy
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Len(t, a.seen(), 3)

	b.capture(t, many(3)...)
	busy.times = 1 << 30
	o.Clock = newClock()
	report = mustRun(t, o)
	require.Equal(t, replayer.EndFailed, report.End)
	require.Equal(t, replayer.ExitFailed, report.ExitCode)
	require.Contains(t, report.Reason, ledger.ErrUnavailable.Error())
	require.Len(t, a.seen(), 3)
}

// busyLedger cannot begin anything for a while.
type busyLedger struct {
	*books
	times int
}

func (l *busyLedger) Begin(ctx context.Context, lease ledger.RunLease, ids []uuid.UUID, o ledger.BeginOptions) ([]ledger.Begun, error) {
	if l.times > 0 {
		l.times--
		return nil, fmt.Errorf("begin: %w", ledger.ErrUnavailable)
	}
	return l.books.Begin(ctx, lease, ids, o)
}
