package completion_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-io/holdfast/pkg/completion"
)

// drops collects what a client gives up.
type drops struct {
	mu   sync.Mutex
	errs map[string]error
}

func (d *drops) add(e completion.Event, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.errs == nil {
		d.errs = map[string]error{}
	}
	d.errs[e.ID] = err
}

func (d *drops) of(n int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.errs[id(n)]
}

func (d *drops) len() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.errs)
}

// newClient returns a client of the acker that logs into the test.
func newClient(t testing.TB, a *acker, change func(*completion.Options)) (*completion.Client, *drops) {
	t.Helper()
	d := &drops{}
	opts := completion.Options{
		URL: a.URL, Token: token, OnDrop: d.add, FlushEvery: time.Millisecond,
		Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(&opts)
	}
	c, err := completion.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_ = c.Close(ctx)
	})
	return c, d
}

func report(t testing.TB, c *completion.Client, from, to int) {
	t.Helper()
	for n := from; n <= to; n++ {
		if err := c.Report(processed(n)); err != nil {
			t.Fatal(err)
		}
	}
}

func closeNow(t testing.TB, c *completion.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := c.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

func events(from, to int) []completion.Event {
	var all []completion.Event
	for n := from; n <= to; n++ {
		all = append(all, processed(n))
	}
	return all
}

func equal(t testing.TB, got, want []completion.Event) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got %d events %v, want %d events %v", len(got), got, len(want), want)
	}
}

func TestReportsAreDeliveredInOrderAndInBatches(t *testing.T) {
	a := newAcker(t)
	// One flush is far away: only full batches and Close deliver.
	c, _ := newClient(t, a, func(o *completion.Options) { o.MaxBatch, o.FlushEvery = 100, time.Hour })
	report(t, c, 1, 250)
	a.wait(t, "two full batches", func() bool { return len(a.durable) == 200 })
	closeNow(t, c)
	equal(t, a.held(), events(1, 250))
	if sizes := []int{len(a.posts[0]), len(a.posts[1]), len(a.posts[2])}; !slices.Equal(sizes, []int{100, 100, 50}) {
		t.Fatalf("batches of %v", sizes)
	}
	want := completion.Stats{Reported: 250, Confirmed: 250}
	if got := c.Stats(); got != want {
		t.Fatalf("got %+v, want %+v", got, want)
	}
}

func TestAnEventAloneIsDeliveredAfterFlushEvery(t *testing.T) {
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	report(t, c, 1, 1)
	a.wait(t, "the event", func() bool { return len(a.durable) == 1 })
	closeNow(t, c)
}

func TestEventsAreSentAsTheContractSays(t *testing.T) {
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	for _, e := range []completion.Event{
		{ID: id(1), Outcome: completion.Processed},
		{ID: id(2), Outcome: completion.Failed, Attempt: 3, Detail: "no \"stock\"\n\xff" + strings.Repeat("ä", 8<<10)},
		{ID: id(3), Outcome: completion.Failed, Detail: strings.Repeat("\xff", 8<<10)},
	} {
		if err := c.Report(e); err != nil {
			t.Fatal(err)
		}
	}
	closeNow(t, c)
	got := a.held()
	if len(got) != 3 || got[0] != processed(1) {
		t.Fatalf("got %v", got)
	}
	if e := got[1]; e.Attempt != 3 || !strings.HasPrefix(e.Detail, "no \"stock\"\n\uFFFDää") || !strings.HasSuffix(e.Detail, "ä") {
		t.Fatalf("got %+v", e)
	}
}

func TestMalformedEventsAreNotTaken(t *testing.T) {
	a := newAcker(t)
	c, _ := newClient(t, a, nil)
	for name, e := range map[string]completion.Event{
		"no id":         {Outcome: completion.Processed},
		"not a UUID":    {ID: "order-17", Outcome: completion.Processed},
		"wrong dashes":  {ID: strings.ReplaceAll(id(1), "-", "0"), Outcome: completion.Processed},
		"not hex":       {ID: "g" + id(1)[1:], Outcome: completion.Processed},
		"nil UUID":      {ID: "00000000-0000-0000-0000-000000000000", Outcome: completion.Processed},
		"no outcome":    {ID: id(1)},
		"other outcome": {ID: id(1), Outcome: "done"},
		"attempt":       {ID: id(1), Outcome: completion.Processed, Attempt: -1},
		"late attempt":  {ID: id(1), Outcome: completion.Processed, Attempt: 1<<30 + 1},
	} {
		if err := c.Report(e); !errors.Is(err, completion.ErrEvent) {
			t.Errorf("%s: Report returned %v", name, err)
		}
		if err := c.ReportNow(t.Context(), e); !errors.Is(err, completion.ErrEvent) {
			t.Errorf("%s: ReportNow returned %v", name, err)
		}
	}
	closeNow(t, c)
	equal(t, a.held(), nil)
}

func TestDeliveryIsRepeatedAfterARefusal(t *testing.T) {
	for name, status := range map[string]int{
		"unavailable":    http.StatusServiceUnavailable,
		"wrong token":    http.StatusUnauthorized,
		"not an acker":   http.StatusOK,
		"redirect":       http.StatusTemporaryRedirect,
		"internal error": http.StatusInternalServerError,
	} {
		t.Run(name, func(t *testing.T) {
			a := newAcker(t)
			a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
				if n <= 2 {
					w.Header().Set("Location", a.URL+"/elsewhere")
					w.WriteHeader(status)
				}
				return n <= 2
			}
			c, d := newClient(t, a, nil)
			report(t, c, 1, 1)
			a.wait(t, "the event", func() bool { return len(a.durable) == 1 })
			closeNow(t, c)
			if s := c.Stats(); s.Retries != 2 || s.Confirmed != 1 || d.len() != 0 {
				t.Fatalf("got %+v and %d drops", s, d.len())
			}
		})
	}
}

// The first answer is lost on the way: the acker has the events, the client
// does not know, and sends them again.
func TestDeliveryIsRepeatedAfterAReset(t *testing.T) {
	a := newAcker(t)
	a.answer = func(n int, w http.ResponseWriter, events []completion.Event) bool {
		if n > 1 {
			return false
		}
		a.durable = append(a.durable, events...)
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return true
		}
		conn.Close()
		return true
	}
	c, _ := newClient(t, a, nil)
	report(t, c, 1, 1)
	a.wait(t, "the repeat", func() bool { return len(a.posts) == 2 })
	closeNow(t, c)
	equal(t, a.held(), []completion.Event{processed(1), processed(1)})
}

func TestAnAckerThatComesUpLate(t *testing.T) {
	a := newAcker(t)
	addr := a.Listener.Addr().String()
	a.Close() // nothing listens there now
	refused := make(signal, 1)
	c, _ := newClient(t, a, func(o *completion.Options) { o.Logger = slog.New(slog.NewTextHandler(refused, nil)) })
	report(t, c, 1, 3)
	<-refused
	late := &http.Server{Addr: addr, Handler: a}
	go func() { _ = late.ListenAndServe() }()
	t.Cleanup(func() { late.Close() })
	a.wait(t, "the events", func() bool { return len(a.durable) == 3 })
	closeNow(t, c)
}

// signal is a log that tells when something is written to it.
type signal chan struct{}

func (s signal) Write(p []byte) (int, error) {
	select {
	case s <- struct{}{}:
	default:
	}
	return len(p), nil
}

func TestRetryAfterIsHonoured(t *testing.T) {
	a := newAcker(t)
	a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
		if n == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n == 1
	}
	c, _ := newClient(t, a, nil)
	report(t, c, 1, 1)
	a.wait(t, "the event", func() bool { return len(a.durable) == 1 })
	closeNow(t, c)
	if waited := a.times[1].Sub(a.times[0]); waited < 990*time.Millisecond {
		t.Fatalf("came back after %v", waited)
	}
}

func TestEventsAtFaultAreDroppedAndTheOthersGoOn(t *testing.T) {
	for name, nameless := range map[string]bool{"named": false, "not named": true} {
		t.Run(name, func(t *testing.T) {
			a := newAcker(t)
			a.nameless = nameless
			a.poison = map[string]bool{id(3): true, id(10): true}
			c, d := newClient(t, a, func(o *completion.Options) { o.MaxBatch, o.FlushEvery = 10, time.Hour })
			report(t, c, 1, 10)
			closeNow(t, c)
			equal(t, a.held(), slices.Concat(events(1, 2), events(4, 9)))
			if !errors.Is(d.of(3), completion.ErrRefused) || !errors.Is(d.of(10), completion.ErrRefused) || d.len() != 2 {
				t.Fatalf("dropped %v", d.errs)
			}
			want := completion.Stats{Reported: 10, Confirmed: 8, Dropped: 2}
			if got := c.Stats(); got != want {
				t.Fatalf("got %+v, want %+v", got, want)
			}
			if !nameless && len(a.posts) != 3 {
				t.Fatalf("needed %d deliveries", len(a.posts))
			}
		})
	}
}

func TestTooLargeADeliveryIsHalved(t *testing.T) {
	a := newAcker(t)
	a.maxBytes = 400 // about four events
	c, d := newClient(t, a, func(o *completion.Options) { o.MaxBatch, o.FlushEvery = 30, time.Hour })
	report(t, c, 1, 29)
	if err := c.Report(completion.Event{ID: id(30), Outcome: completion.Failed, Detail: strings.Repeat("x", 400)}); err != nil {
		t.Fatal(err)
	}
	closeNow(t, c)
	equal(t, a.held(), events(1, 29))
	if !errors.Is(d.of(30), completion.ErrRefused) || d.len() != 1 {
		t.Fatalf("dropped %v", d.errs)
	}
}

// hang makes the acker hold every delivery until the test ends.
func hang(t testing.TB, a *acker) {
	hold := make(chan struct{})
	a.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.posts = append(a.posts, nil)
		close(a.changed)
		a.changed = make(chan struct{})
		a.mu.Unlock()
		<-hold
	})
	t.Cleanup(func() { close(hold) })
}

func TestReportNeverBlocks(t *testing.T) {
	a := newAcker(t)
	hang(t, a)
	c, d := newClient(t, a, func(o *completion.Options) { o.MaxQueue, o.MaxBatch = 5, 2 })
	report(t, c, 1, 2)
	a.wait(t, "a delivery that hangs", func() bool { return len(a.posts) == 1 })
	n, err := 3, error(nil)
	for ; err == nil && n < 20; n++ {
		err = c.Report(processed(n))
	}
	if !errors.Is(err, completion.ErrQueueFull) || n > 9 {
		t.Fatalf("after %d events: %v", n-1, err)
	}
	taken := c.Stats().Queued
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Close(ctx); !errors.Is(err, completion.ErrClosed) {
		t.Fatalf("Close returned %v", err)
	}
	s := c.Stats()
	if s.Dropped != taken || s.Queued != 0 || s.Refused != 1 || uint64(d.len()) != taken || !errors.Is(d.of(1), completion.ErrClosed) {
		t.Fatalf("taken %d, then %+v, dropped %v", taken, s, d.errs)
	}
	if err := c.Close(context.Background()); !errors.Is(err, completion.ErrClosed) {
		t.Fatalf("the second Close returned %v", err)
	}
	if err := c.Report(processed(1)); !errors.Is(err, completion.ErrClosed) {
		t.Fatalf("Report after Close returned %v", err)
	}
	if err := c.ReportNow(context.Background(), processed(1)); !errors.Is(err, completion.ErrClosed) {
		t.Fatalf("ReportNow after Close returned %v", err)
	}
}

// Close does not wait for the end of a long Retry-After before it tries again.
func TestCloseTriesAtOnce(t *testing.T) {
	a := newAcker(t)
	a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
		if n == 1 {
			w.Header().Set("Retry-After", "100")
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n == 1
	}
	c, _ := newClient(t, a, nil)
	report(t, c, 1, 1)
	a.wait(t, "the refusal", func() bool { return len(a.posts) == 1 })
	closeNow(t, c)
	equal(t, a.held(), events(1, 1))
}

func TestCloseFlushesAnAckerThatRecovers(t *testing.T) {
	a := newAcker(t)
	a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
		if n <= 3 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n <= 3
	}
	c, _ := newClient(t, a, func(o *completion.Options) { o.FlushEvery = time.Hour })
	report(t, c, 1, 5)
	closeNow(t, c)
	equal(t, a.held(), events(1, 5))
}

func TestTokenFileIsReadForEveryDelivery(t *testing.T) {
	a := newAcker(t)
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.token = "new"
	c, _ := newClient(t, a, func(o *completion.Options) { o.Token, o.TokenFile = "", file })
	err := c.ReportNow(t.Context(), processed(1))
	if !errors.Is(err, completion.ErrRefused) || !strings.Contains(err.Error(), "wrong token") {
		t.Fatalf("with the old token: %v", err)
	}
	if err := os.WriteFile(file, []byte("new\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.ReportNow(t.Context(), processed(1)); err != nil {
		t.Fatal(err)
	}
	closeNow(t, c)
}

func TestReportNow(t *testing.T) {
	t.Run("repeats until it is durable", func(t *testing.T) {
		a := newAcker(t)
		a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
			if n <= 2 {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return n <= 2
		}
		c, _ := newClient(t, a, nil)
		if err := c.ReportNow(t.Context(), processed(1)); err != nil {
			t.Fatal(err)
		}
		equal(t, a.held(), events(1, 1))
		closeNow(t, c)
	})
	t.Run("ends with its context", func(t *testing.T) {
		a := newAcker(t)
		hang(t, a)
		c, _ := newClient(t, a, nil)
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- c.ReportNow(ctx, processed(1)) }()
		a.wait(t, "a delivery that hangs", func() bool { return len(a.posts) == 1 })
		cancel()
		if err := <-result; !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		closeNow(t, c)
	})
	t.Run("ends with its timeout", func(t *testing.T) {
		a := newAcker(t)
		hang(t, a)
		c, _ := newClient(t, a, func(o *completion.Options) { o.Timeout = time.Millisecond })
		if err := c.ReportNow(t.Context(), processed(1)); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, completion.ErrRefused) {
			t.Fatalf("got %v", err)
		}
		closeNow(t, c)
	})
	t.Run("is refused", func(t *testing.T) {
		a := newAcker(t)
		a.poison = map[string]bool{id(1): true}
		c, _ := newClient(t, a, nil)
		if err := c.ReportNow(t.Context(), processed(1)); !errors.Is(err, completion.ErrRefused) {
			t.Fatalf("got %v", err)
		}
		closeNow(t, c)
	})
}

// Many reporters against an acker that refuses every other delivery, and a
// Close in the middle: each event that was taken is confirmed, in the order of
// its reporter.
func TestReportersAndCloseAtTheSameTime(t *testing.T) {
	a := newAcker(t)
	a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
		if n%2 == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n%2 == 0
	}
	c, d := newClient(t, a, func(o *completion.Options) { o.MaxBatch = 2000 })
	const reporters, each = 8, 2000
	var taken [reporters][]completion.Event
	var all, half sync.WaitGroup
	half.Add(reporters)
	for r := range reporters {
		all.Go(func() {
			for n := range each {
				if n == each/2 {
					half.Done()
				}
				e := processed(r*each + n)
				switch err := c.Report(e); {
				case err == nil:
					taken[r] = append(taken[r], e)
				case !errors.Is(err, completion.ErrQueueFull) && !errors.Is(err, completion.ErrClosed):
					t.Error(err)
				}
			}
		})
	}
	half.Wait()
	closeNow(t, c)
	all.Wait()
	var held [reporters][]completion.Event
	for _, e := range a.held() {
		for r := range reporters {
			if id(r*each) <= e.ID && e.ID < id((r+1)*each) {
				held[r] = append(held[r], e)
			}
		}
	}
	for r := range reporters {
		if !slices.Equal(held[r], taken[r]) {
			t.Errorf("reporter %d: %d taken, %d held", r, len(taken[r]), len(held[r]))
		}
	}
	if s := c.Stats(); s.Queued != 0 || s.Dropped != 0 || s.Reported != s.Confirmed || s.Reported+s.Refused != reporters*each || d.len() != 0 {
		t.Fatalf("got %+v", s)
	}
}

// A redirect is not followed: events and token go to the acker alone.
func TestRedirectsAreNotFollowed(t *testing.T) {
	elsewhere := newAcker(t)
	a := newAcker(t)
	a.answer = func(_ int, w http.ResponseWriter, _ []completion.Event) bool {
		w.Header().Set("Location", elsewhere.URL+"/v1/completions")
		w.WriteHeader(http.StatusPermanentRedirect)
		return true
	}
	c, _ := newClient(t, a, nil)
	if err := c.ReportNow(t.Context(), processed(1)); !errors.Is(err, completion.ErrRefused) {
		t.Fatalf("got %v", err)
	}
	closeNow(t, c)
	equal(t, elsewhere.held(), nil)
}

func TestCloseEndsTheConnections(t *testing.T) {
	a := &acker{changed: make(chan struct{}), maxBytes: 1 << 20, token: token}
	a.Server = httptest.NewUnstartedServer(a)
	ended := make(chan struct{})
	a.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			close(ended)
		}
	}
	a.Start()
	t.Cleanup(a.Close)
	c, _ := newClient(t, a, nil)
	report(t, c, 1, 1)
	closeNow(t, c)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the connection is still there")
	}
}

func TestNewNamesAllProblems(t *testing.T) {
	_, err := completion.New(completion.Options{
		URL: "localhost:8081", Token: "x", TokenFile: filepath.Join(t.TempDir(), "none"),
		MaxBatch: -1, MaxQueue: -1, FlushEvery: -1, Timeout: -1,
	})
	if err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"URL", "both Token and TokenFile", "none", "MaxBatch", "MaxQueue", "FlushEvery", "Timeout"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not in %q", name, err)
		}
	}
	if _, err := completion.New(completion.Options{URL: "http://user:secret@host"}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
}

func TestDropsAndRetriesAreLoggedByDefault(t *testing.T) {
	a := newAcker(t)
	a.poison = map[string]bool{id(1): true}
	a.answer = func(n int, w http.ResponseWriter, _ []completion.Event) bool {
		if n == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n == 1
	}
	var out bytes.Buffer // written by the client only, read after Close
	c, _ := newClient(t, a, func(o *completion.Options) {
		o.OnDrop, o.Logger = nil, slog.New(slog.NewTextHandler(&out, nil))
	})
	report(t, c, 1, 1)
	closeNow(t, c)
	for _, want := range []string{"completions not delivered", "acker answered 503", "completion dropped", "request_id=" + id(1), "acker answered 400"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not in %s", want, out.String())
		}
	}
	if strings.Contains(out.String(), token) {
		t.Error("the token is in the log")
	}
}

// BenchmarkReport measures what a report costs the handler, delivery included.
func BenchmarkReport(b *testing.B) {
	a := newAcker(b)
	c, _ := newClient(b, a, func(o *completion.Options) { o.MaxQueue = b.N + 1 })
	e := processed(1)
	b.ReportAllocs()
	for b.Loop() {
		if err := c.Report(e); err != nil && !errors.Is(err, completion.ErrQueueFull) {
			b.Fatal(err)
		}
	}
}
