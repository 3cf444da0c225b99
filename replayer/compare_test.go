package replayer_test

import (
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

// answered is a request that its API has processed, with what is kept of the
// answer.
func answered(status int, contentType, body string, cut bool) request {
	q := request{status: status}
	if contentType != "-" {
		q.answer = &capture.Answer{Type: contentType, Body: []byte(body), Cut: cut}
	}
	return q
}

// dump is everything that the ledger has of requests, row by row.
func (b *books) dump(t *testing.T) []string {
	t.Helper()
	db, err := sql.Open("sqlite", b.path)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	var all []string
	for _, query := range []string{
		// But payload: answers of test systems count among its bytes.
		"SELECT id, seq, state, kept, due, facts, changed, attempts, unresolved, started, ended, status, error, verdict, match_status FROM requests ORDER BY id",
		"SELECT * FROM payloads ORDER BY seq", "SELECT * FROM attempts ORDER BY id, number", "SELECT * FROM events", "SELECT * FROM quarantines", "SELECT * FROM discards",
		"SELECT * FROM answers WHERE run = '' ORDER BY id", "SELECT name, n FROM counters WHERE name LIKE 'requests:%' ORDER BY name",
	} {
		rows, err := db.Query(query)
		require.NoError(t, err)
		columns, err := rows.Columns()
		require.NoError(t, err)
		for rows.Next() {
			values := make([]any, len(columns))
			for i := range values {
				values[i] = new(any)
			}
			require.NoError(t, rows.Scan(values...))
			var line strings.Builder
			for _, v := range values {
				fmt.Fprintf(&line, "%v|", *v.(*any))
			}
			all = append(all, line.String())
		}
		require.NoError(t, rows.Err())
		require.NoError(t, rows.Close())
	}
	require.NotEmpty(t, all)
	return all
}

// testSystem answers by the path.
func testSystem(t *testing.T) *api {
	return newAPI(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/things/3", "/things/6":
			w.WriteHeader(http.StatusCreated)
		case "/things/5":
			w.Header().Set("Content-Type", "text/plain")
		}
		body := map[string]string{
			"/things/0": `{"at": 2, "id": 7.0}`, "/things/1": `{"id":8,"at":2}`, "/things/2": `whatever`, "/things/5": "abcX", "/things/7": `{"id":1}`,
		}[r.URL.Path]
		_, _ = w.Write([]byte(body))
	})
}

var compared = []request{
	answered(200, "application/json", `{"id":7,"at":1}`, false), // the same but for what is ignored
	answered(200, "application/json", `{"id":7,"at":1}`, false), // another body
	answered(200, "-", "", false),                               // no body is kept
	answered(200, "application/json", `{}`, false),              // another status
	answered(-1, "-", "", false),                                // received, never answered
	answered(200, "text/plain", "abc", true),                    // cut
	answered(500, "-", "", false),                               // another status, from a failure
	answered(422, "application/json", `{"id":1}`, false),        // another status, rejected
}

var everything = replayer.Selection{Filter: ledger.Filter{States: []capture.State{
	capture.StateProcessed, capture.StateFailed, capture.StateRejected, capture.StateReceived,
}}}

func TestATestReplayComparesAnswers(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, compared...)
	b.later(time.Minute) // past the grace
	before := b.dump(t)
	a := testSystem(t)
	o := options(t, b, a.URL)
	o.Target, o.Selection = a.URL, everything
	path, err := replayer.ParseJSONPath("$.at")
	require.NoError(t, err)
	o.Ignore = []replayer.JSONPath{path}
	report := mustRun(t, o)
	require.Len(t, a.seen(), len(ids))
	require.Equal(t, before, b.dump(t), "states are untouched")
	c := report.Compared
	require.Equal(t, []int64{1, 1, 1, 1, 3, 1}, []int64{c.Same, c.SameStatus, c.Cut, c.NoStoredAnswer, c.StatusDiffers, c.BodyDiffers})
	require.EqualValues(t, 4, c.Differ())
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Equal(t, []replayer.Example{
		{ID: ids[1], Method: "POST", Target: "/things/1", Status: 200, TestStatus: 200, Differences: []replayer.Difference{{Path: "$.id", Stored: "7", Test: "8"}}},
		{ID: ids[3], Method: "POST", Target: "/things/3", Status: 200, TestStatus: 201},
		{ID: ids[6], Method: "POST", Target: "/things/6", Status: 500, TestStatus: 201},
		{ID: ids[7], Method: "POST", Target: "/things/7", Status: 422, TestStatus: 200},
	}, c.Examples)
	var text strings.Builder
	require.NoError(t, report.WriteText(&text))
	for _, want := range []string{
		"compared   same 1, same status 1 (no body is kept), cut 1, no stored answer 1", "status differs 3, body differs 1",
		ids[1].String() + "  POST /things/1  status 200, test status 200", "$.id: 7, test 8",
	} {
		require.Contains(t, text.String(), want)
	}

	// Whoever may see runs sees no bodies.
	run, err := b.Run(t.Context(), report.Run)
	require.NoError(t, err)
	var kept replayer.Report
	require.NoError(t, json.Unmarshal(run.Report, &kept))
	require.Equal(t, []replayer.Difference{{Path: "$.id"}}, kept.Compared.Examples[0].Differences)
	require.Equal(t, c.StatusDiffers, kept.Compared.StatusDiffers)
}

func TestATestReplayOfWhatIsTheSame(t *testing.T) {
	b := newBooks(t)
	b.capture(t, answered(200, "application/json", `{"id":7,"at":2}`, false), answered(500, "text/plain", "oops", false), answered(200, "-", "", false))
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		switch r.URL.Path {
		case "/things/0":
			w.Header().Set("Content-Type", "application/vnd.x+json")
			_, _ = w.Write([]byte(`{"at":2,"id":7}`))
		case "/things/1":
			w.Header().Set("Content-Type", "text/plain")
			w.WriteHeader(http.StatusInternalServerError)
			_, _ = w.Write([]byte("oops"))
		}
	})
	o := options(t, b, a.URL)
	o.Target, o.Selection = a.URL, everything
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode, "%+v", report)
	require.Equal(t, []int64{2, 1}, []int64{report.Compared.Same, report.Compared.SameStatus})
	require.Zero(t, report.Left)

	// With a limit the same.
	o.Clock, o.Limit = newClock(), 2
	limited := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, limited.ExitCode)
	require.EqualValues(t, 2, limited.Compared.Same)
	require.Zero(t, limited.Left)
}

func TestAnAnswerThatDoesNotComeWholeDiffers(t *testing.T) {
	b := newBooks(t)
	b.capture(t, answered(200, "text/plain", "abcdef", false), answered(200, "-", "", false))
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.Header().Set("Content-Length", "6")
		_, _ = w.Write([]byte("abc"))
		panic(http.ErrAbortHandler)
	})
	o := options(t, b, a.URL)
	o.Target, o.Selection, o.MaxAttempts = a.URL, everything, 1
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.EqualValues(t, 2, report.Compared.Differ(), "%+v", report.Compared)
	require.NotEmpty(t, report.Compared.Examples[0].TestError)
}

// TestTheReportIsOfAllProcessesOfARun: the first is cut in the middle.
func TestTheReportIsOfAllProcessesOfARun(t *testing.T) {
	b := newBooks(t)
	requests := make([]request, 30)
	for i := range requests {
		requests[i] = answered(200, "text/plain", "ok", false)
	}
	b.capture(t, requests...)
	stop := make(chan struct{})
	var once sync.Once
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, _ int) {
		if r.URL.Path == "/things/9" {
			once.Do(func() { close(stop) })
		}
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write([]byte("ok"))
	})
	o := options(t, b, a.URL)
	o.Target, o.Selection, o.Concurrency, o.Stop = a.URL, everything, 1, stop
	first := mustRun(t, o)
	require.Equal(t, replayer.EndInterrupted, first.End)
	require.Equal(t, first.Sent, first.Compared.Same)
	require.Less(t, first.Sent, int64(30))
	o.Stop, o.Clock = nil, newClock()
	second := mustRun(t, o)
	require.True(t, second.PickedUp)
	require.EqualValues(t, 30, second.Compared.Same)
	require.Len(t, a.seen(), 30)

	// The next one is new, and sends all again; so does one with Again that finds
	// another left unfinished, which it cancels.
	o.Clock = newClock()
	require.EqualValues(t, 30, mustRun(t, o).Sent)
	stopped := make(chan struct{})
	close(stopped)
	o.Stop, o.Clock = stopped, newClock()
	unfinished := openAndLeave(t, b, o)
	o.Stop, o.Clock, o.Again = nil, newClock(), true
	again := mustRun(t, o)
	require.False(t, again.PickedUp)
	require.NotEqual(t, unfinished, again.Run)
	require.EqualValues(t, 30, again.Sent)
	require.EqualValues(t, 30, again.Compared.Same)
	run, err := b.Run(t.Context(), unfinished)
	require.NoError(t, err)
	require.Equal(t, ledger.RunCancelled, run.State)
}

// openAndLeave leaves a run behind that nobody works on.
func openAndLeave(t *testing.T, b *books, o replayer.Options) string {
	t.Helper()
	run, lease, _, err := b.OpenRun(t.Context(), o.Selection.Filter, o.Target, "another", 1)
	require.NoError(t, err)
	require.NoError(t, b.LeaveRun(t.Context(), lease))
	return run.ID
}

// TestReplaysKeepAnswersAsTheirRouteSays, and no others.
func TestReplaysKeepAnswersAsTheirRouteSays(t *testing.T) {
	b, n := newBooks(t), newBroker(t)
	ids := b.capture(t, request{route: "kept"}, request{route: "other"})
	a := newAPI(t, func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.Header().Set("Content-Type", "text/plain")
		_, _ = w.Write([]byte("hello"))
	})
	p := command(t, b, n.server.ClientURL(), "", "run", "--output", "json")
	p.Env = append(p.Env, writeRoutes(t, fmt.Sprintf("routes:\n- {name: kept, match: {path: {prefix: /a}}, upstream: {url: %q}, capture: {keep_answers: 4}}\n- {name: other, upstream: {url: %q}}\n", a.URL, a.URL)))
	require.Equal(t, 0, p.code(t), p.stderr.String())
	for i, want := range [][]ledger.Answer{
		{{Attempt: 2, Run: p.report(t).Run, Answer: capture.Answer{Type: "text/plain", Body: []byte("hell"), Cut: true}}}, nil,
	} {
		answers, err := b.Answers(t.Context(), ids[i])
		require.NoError(t, err)
		require.Equal(t, want, answers)
	}

	c := command(t, b, n.server.ClientURL(), a.URL, "run", "--state", "failed", "--output", "json")
	c.Env = append(c.Env, "HOLDFAST_KEEP_ANSWERS=1KiB")
	more := b.capture(t, request{})
	require.Equal(t, 0, c.code(t), c.stderr.String())
	answers, err := b.Answers(t.Context(), more[0])
	require.NoError(t, err)
	require.Equal(t, []byte("hello"), answers[0].Body)
}

// TestPlanOfATestReplay counts what is processed, too.
func TestPlanOfATestReplay(t *testing.T) {
	b := newBooks(t)
	b.capture(t, compared...)
	p := command(t, b, nowhere, "", "plan", "--upstream", "http://test.example", "--state", "processed", "--output", "json")
	require.Equal(t, 0, p.code(t), p.stderr.String())
	var plan replayer.Plan
	require.NoError(t, json.Unmarshal(p.stdout.Bytes(), &plan))
	require.EqualValues(t, 5, plan.Requests)
}
