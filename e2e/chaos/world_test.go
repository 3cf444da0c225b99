package chaos_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/history"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

const (
	// patience bounds waits for what takes seconds on a busy machine.
	patience = time.Minute
	// A request without verdict is not sent again before timeout and grace are
	// over: so much longer than an answer takes here that whoever was answered
	// 2xx by the first attempt must never be replayed.
	apiTimeout = "3s"
	grace      = "5s"
	// inFlight is how long after its beginning in the ledger an attempt may
	// arrive at the API on a busy machine.
	inFlight = 3 * time.Second
)

// The API and the replayer are victims beside the harness's roles.
const (
	api      = "api"
	replayer = "replayer"
)

// setup says what is run.
type setup struct {
	topology harness.Topology
	// events has the API report completion by events through the acker.
	events bool
}

func (s setup) String() string {
	if s.events {
		return string(s.topology) + "/event"
	}
	return string(s.topology) + "/response"
}

var setups = []setup{
	{harness.Standalone, false}, {harness.Distributed, true},
	{harness.Distributed, false}, {harness.Standalone, true},
}

// world is a deployment with the example API behind it.
type world struct {
	*harness.System
	t    *testing.T
	s    setup
	dir  string
	addr string // of the API
	api  *proc.Process
	mesg *witness // nil without events
	args []string // more of them for the API
}

func newWorld(t *testing.T, s setup) *world {
	t.Helper()
	w := &world{t: t, s: s, dir: t.TempDir()}
	var err error
	w.addr, err = proc.FreeAddr()
	require.NoError(t, err)
	w.System, err = harness.New(harness.Options{
		Topology: s.topology, Bin: bin, NATSServer: natsServer, Dir: w.dir, Upstream: "http://" + w.addr,
		Settings: map[string]string{"UPSTREAM_TIMEOUT": apiTimeout, "GRACE": grace, "ACCESS_LOG": "off"},
	})
	require.NoError(t, err)
	if s.events {
		w.Set("COMPLETION", "event")
		w.mesg = newWitness(t, w.AckerURL())
	}
	t.Cleanup(func() {
		w.Close()
		if w.api != nil {
			w.api.Kill()
		}
		if t.Failed() {
			w.show()
		}
	})
	return w
}

// show prints the ends of all logs, and keeps the data where that is asked for.
func (w *world) show() {
	logs, _ := filepath.Glob(filepath.Join(w.dir, "*.log"))
	for _, path := range logs {
		text, _ := os.ReadFile(path)
		w.t.Logf("the end of %s:\n%s", filepath.Base(path), text[max(0, len(text)-3<<10):])
	}
	if *keep != "" {
		to := filepath.Join(*keep, filepath.Base(filepath.Dir(w.dir)))
		w.t.Logf("kept in %s: %v", to, os.CopyFS(to, os.DirFS(w.dir)))
	}
}

func (w *world) db() string { return filepath.Join(w.dir, "api.db") }

// launchAPI starts the API without waiting for it.
func (w *world) launchAPI() {
	w.t.Helper()
	args := append([]string{"-addr", w.addr, "-db", w.db()}, w.args...)
	if w.mesg != nil {
		args = append(args, "-report", w.mesg.url)
	}
	p, err := proc.Start(proc.Spec{Name: "exampleapi", Path: filepath.Join(bin, "exampleapi"), Dir: w.dir, Args: args})
	require.NoError(w.t, err)
	w.api = p
}

// start starts everything and waits until it is ready.
func (w *world) start() {
	w.t.Helper()
	w.heal()
}

// heal starts whatever does not run, and waits until all is ready.
func (w *world) heal() {
	w.t.Helper()
	if w.api == nil || !w.api.Running() {
		w.launchAPI()
	}
	require.NoError(w.t, proc.AwaitHTTP(w.t.Context(), w.api, "http://"+w.addr+"/stats"))
	require.NoError(w.t, w.Start(w.t.Context()))
	for _, role := range w.Processes() {
		if role != harness.NATS {
			require.NoError(w.t, proc.AwaitHTTP(w.t.Context(), w.Process(role), w.OpsURL(role)+"/readyz"))
		}
	}
}

// victims are what can be killed, but for replayers.
func (w *world) victims() []string { return append(w.Processes(), api) }

func (w *world) kill(victim string) {
	if victim == api {
		w.api.Kill()
		return
	}
	w.Kill(victim)
}

// revive starts a victim again. Only nats-server is waited for.
func (w *world) revive(victim string) {
	w.t.Helper()
	switch victim {
	case api:
		w.launchAPI()
	case harness.NATS:
		require.NoError(w.t, w.Start(w.t.Context(), harness.NATS))
	default:
		_, err := w.Launch(victim)
		require.NoError(w.t, err)
	}
}

// launchReplayer starts one.
func (w *world) launchReplayer(name string, args ...string) *proc.Process {
	w.t.Helper()
	p, err := proc.Start(proc.Spec{
		Name: name, Path: filepath.Join(bin, "replayer"), Dir: w.dir, Env: w.Env("replayer"),
		Args: append([]string{"run", "--output", "json"}, args...),
	})
	require.NoError(w.t, err)
	return p
}

// settle waits until all that the ingress has taken is in the ledger.
func (w *world) settle() {
	w.t.Helper()
	var last float64
	var err error
	drained := assert.Eventually(w.t, func() bool {
		last, err = w.Metric(w.t.Context(), harness.Ingress, "holdfast_spool_unreleased")
		return err == nil && last == 0
	}, patience, 20*time.Millisecond)
	require.True(w.t, drained, "the spool is not drained, there are %v records (%v)", last, err)
}

// replayAll replays until nothing is left. A run that was picked up goes through
// the selection that it was made with, and says when there is more.
func (w *world) replayAll() {
	w.t.Helper()
	code, out := -1, ""
	for range 8 {
		var err error
		code, out, err = w.Replay(w.t.Context(), "run", "--wait", "60s", "--concurrency", "16", "--output", "json")
		require.NoError(w.t, err)
		var report struct {
			Newer bool `json:"newer"`
		}
		require.NoError(w.t, json.Unmarshal([]byte(out), &report), "exit code %d: %s", code, out)
		if code == 0 && !report.Newer {
			return
		}
	}
	require.Fail(w.t, "there is always something left to replay", "exit code %d: %s", code, out)
}

// detail is what the read API says of one request.
type detail struct {
	ID       string `json:"id"`
	State    string `json:"state"`
	Attempts []struct {
		Number    int       `json:"number"`
		Run       string    `json:"run"`
		StartedAt time.Time `json:"started_at"`
		EndedAt   time.Time `json:"ended_at"`
		Status    int       `json:"status"`
		Verdict   string    `json:"verdict"`
	} `json:"attempts"`
}

// judge compares what clients, API and ledger know when all is healed and
// replayed.
func (w *world) judge(sent []history.Sent) history.Verdict {
	w.t.Helper()
	t := w.t
	v, err := history.Check(t.Context(), sent, w.db())
	require.NoError(t, err)
	require.NoError(t, v.Err())
	if !w.s.events {
		require.Empty(t, v.Again, "replayed although the client had the whole 2xx answer")
	}

	// Conservation: everything that is known to anybody is processed in the
	// ledger, by its id.
	listed, err := w.Requests(t.Context(), "")
	require.NoError(t, err)
	known := make(map[string]bool, len(listed))
	for _, r := range listed {
		require.False(t, known[r.ID], "the read API lists %s twice", r.ID)
		known[r.ID] = true
		require.Equal(t, "processed", r.State, "%+v", r)
	}
	unknown := make(map[string]bool) // bodies whose client knows nothing
	for _, s := range sent {
		unknown[s.Body] = s.Status == 0
		if s.Answered() {
			require.True(t, known[s.ID], "the ledger does not know %+v", s)
		}
	}
	arrivals := w.arrivals()
	rows := map[string]bool{}
	for after := int64(0); ; {
		page, err := exampleapi.ReadRows(t.Context(), w.db(), after, 1000, false)
		require.NoError(t, err)
		if len(page) == 0 {
			break
		}
		for _, row := range page {
			after = row.Seq
			rows[row.ID] = true
			// Only a request that died with its ingress before it was durable may
			// be unknown here.
			require.True(t, known[row.ID] || unknown[row.SHA256], "the ledger does not know %+v", row)
		}
	}
	for id := range known {
		require.True(t, rows[id], "%s is processed, says the ledger, and the API has no row", id)
	}

	for _, r := range listed {
		if r.Attempts > 1 {
			w.judgeAttempts(r.ID)
		}
	}
	if w.mesg != nil {
		w.mesg.judge(t, arrivals)
	}

	var stats struct {
		Aside map[string]int64 `json:"aside"`
		Early int64            `json:"early"`
	}
	require.NoError(t, harness.GetJSON(t.Context(), w.RecorderURL()+"/v1/stats", &stats))
	for kind, n := range stats.Aside {
		require.Zero(t, n, "messages of kind %s were set aside", kind)
	}
	if !w.s.events {
		require.Zero(t, stats.Early, "outcomes of requests that are not there")
	}
	return v
}

// judgeAttempts checks that nothing was sent after an attempt whose result had
// made the request processed.
func (w *world) judgeAttempts(id string) {
	w.t.Helper()
	var d detail
	require.NoError(w.t, harness.GetJSON(w.t.Context(), w.RecorderURL()+"/v1/requests/"+id, &d))
	processed := 0
	for _, a := range d.Attempts {
		require.Zero(w.t, processed, "attempt %d was begun after attempt %d had processed %s: %+v", a.Number, processed, id, d)
		if a.Verdict == "processed" {
			processed = a.Number
		}
	}
}

func (w *world) arrivals() []exampleapi.Arrival {
	w.t.Helper()
	all, err := exampleapi.ReadArrivals(exampleapi.ArrivalsFile(w.db()), 0, 1<<30)
	require.NoError(w.t, err)
	return all
}

// witness stands between the API and the acker, and writes down what the acker
// has accepted, and when: from then on those are durably processed.
type witness struct {
	url string

	mu       sync.Mutex
	accepted map[string]time.Time
}

func newWitness(t *testing.T, acker string) *witness {
	t.Helper()
	target, err := url.Parse(acker)
	require.NoError(t, err)
	w := &witness{accepted: map[string]time.Time{}}
	transport := &http.Transport{}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ErrorHandler: func(rw http.ResponseWriter, _ *http.Request, _ error) {
			rw.WriteHeader(http.StatusBadGateway) // the API tries again
		},
		ModifyResponse: func(r *http.Response) error {
			if r.StatusCode == http.StatusAccepted {
				w.note(r.Request.Context().Value(eventsKey{}).([]string))
			}
			return nil
		},
	}
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			rw.WriteHeader(http.StatusBadRequest)
			return
		}
		proxy.ServeHTTP(rw, withEvents(r, body))
	}))
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
	})
	w.url = server.URL
	return w
}

func (w *witness) note(ids []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range ids {
		if _, ok := w.accepted[id]; !ok {
			w.accepted[id] = time.Now()
		}
	}
}

// judge checks that nothing arrived at the API that the acker had accepted as
// processed before its attempt can have begun.
func (w *witness) judge(t *testing.T, arrivals []exampleapi.Arrival) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	require.NotEmpty(t, w.accepted)
	for _, a := range arrivals {
		at, ok := w.accepted[a.ID]
		if ok && a.At.After(at.Add(inFlight)) {
			require.Fail(t, "sent again", "the acker answered 202 at %s, and again came %+v", at, a)
		}
	}
}

// seeds calls f with one seed after the other, for as long as is asked for.
func seeds(t *testing.T, f func(t *testing.T, seed uint64)) {
	t.Helper()
	until := time.Now().Add(*duration)
	for seed := firstSeed; ; seed++ {
		t.Logf("CHAOS_SEED=%d", seed)
		f(t, seed)
		if !time.Now().Before(until) {
			return
		}
	}
}

// eventsKey is where a report's ids travel in its context.
type eventsKey struct{}

// withEvents gives the request its body back, and notes which ids it reports as
// processed.
func withEvents(r *http.Request, body []byte) *http.Request {
	var events []struct {
		ID      string `json:"id"`
		Outcome string `json:"outcome"`
	}
	ids := []string{}
	if json.Unmarshal(body, &events) == nil {
		for _, e := range events {
			if e.Outcome == "processed" {
				ids = append(ids, e.ID)
			}
		}
	}
	r = r.WithContext(context.WithValue(r.Context(), eventsKey{}, ids))
	r.Body = io.NopCloser(bytes.NewReader(body))
	return r
}

// awaitArrivals waits until the API has seen so many requests.
func (w *world) awaitArrivals(n int) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		var stats exampleapi.Stats
		err := harness.GetJSON(w.t.Context(), "http://"+w.addr+"/stats", &stats)
		return err == nil && stats.Arrivals >= int64(n)
	}, patience, 5*time.Millisecond, "%d requests arrive", n)
}

// patienceOver gives a channel that is ready when patience is over.
func patienceOver(t *testing.T) <-chan time.Time {
	timer := time.NewTimer(patience)
	t.Cleanup(func() { timer.Stop() })
	return timer.C
}
