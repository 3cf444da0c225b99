package replayer_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

func mustPlan(t *testing.T, b *books, o replayer.PlanOptions) replayer.Plan {
	t.Helper()
	plan, err := replayer.MakePlan(t.Context(), b, ledger.Filter{Replayable: true}, o)
	require.NoError(t, err)
	return plan
}

func textOf(t *testing.T, p replayer.Plan) string {
	t.Helper()
	var text strings.Builder
	require.NoError(t, p.WriteText(&text, 4))
	return text.String()
}

// A plan knows keys, what is behind those that are stopped, what waits, and the
// beyond of a limit.
func TestPlanKnowsKeysAndWhatIsHeld(t *testing.T) {
	b := newBooks(t)
	graceful := newPolicy()
	graceful.Grace = time.Hour
	requests := keyedBy(30, "a", "b", "")
	requests[0].body = []byte("12345")
	requests = append(requests, request{policy: graceful, status: -1, key: "c"})
	ids := b.capture(t, requests...)
	require.NoError(t, b.Quarantine(t.Context(), ids[4], capture.QuarantineKiller, "it is one")) // the second of b

	p := mustPlan(t, b, replayer.PlanOptions{Rate: 2})
	require.Equal(t, int64(29), p.Requests)
	require.Equal(t, int64(5), p.Bytes)
	require.Equal(t, int64(2), p.Keys)
	require.Equal(t, int64(19), p.Keyed)
	require.Equal(t, int64(8), p.Blocked.Requests)
	require.Equal(t, ids[4], p.Blocked.Heads[0].Head)
	require.Equal(t, int64(1), p.Waiting)
	require.WithinDuration(t, p.At.Add(time.Hour), p.WaitingUntil, time.Minute) // and a timeout
	require.Equal(t, int64(1), p.Quarantined)
	require.Equal(t, replayer.ByRate, p.EstimateBy)
	require.Equal(t, 10.5, p.Seconds, "what is blocked takes no time")
	require.Len(t, p.Sample, 10)
	require.Equal(t, "a", p.Sample[0].Key)
	require.Equal(t, int64(5), p.Sample[0].Bytes)
	require.Equal(t, capture.DefaultRoute, p.Sample[0].Route)
	text := textOf(t, p)
	for _, want := range []string{
		"to send    29 requests, 5 B of bodies\n", "keys       2, of 19 requests, which keep their order\n", "takes      11s at the given rate",
		"not sent   waiting 1, quarantined 1, payload gone 0\n", "in their grace until ", "blocked    8 requests behind 1 keys\n",
		"suspects   29 whose last attempt may have killed the API",
	} {
		require.Contains(t, text, want)
	}

	p = mustPlan(t, b, replayer.PlanOptions{Limit: 7, OrderBy: replayer.OrderNone})
	require.Equal(t, int64(7), p.Requests)
	require.Equal(t, int64(22), p.Beyond)
	require.Zero(t, p.Keys)
	require.Nil(t, p.Blocked)
	require.Empty(t, p.EstimateBy)
	text = textOf(t, p)
	require.Contains(t, text, "limit      7, beyond which 22 more match\n")
	require.Contains(t, text, "keys       none: no order is kept\n")
	require.Contains(t, text, "takes      as long as the API needs, 4 at a time")
}

// Suspects are those whose last attempt looks like a death, the most often tried
// first.
func TestPlanNamesSuspects(t *testing.T) {
	b := newBooks(t)
	requests := many(18)
	for i := range requests {
		requests[i].status = []int{500, 502, 429}[i%3]
	}
	ids := b.capture(t, requests...)
	// A run in which one request breaks the connection each time, another once.
	a := newAPI(t, func(w http.ResponseWriter, r *http.Request, nth int) {
		switch r.Header.Get(capture.HTTPHeaderID) {
		case ids[4].String():
			panic(http.ErrAbortHandler)
		case ids[0].String():
			if nth == 1 {
				panic(http.ErrAbortHandler)
			}
			w.WriteHeader(http.StatusInternalServerError)
		default:
			w.WriteHeader(http.StatusInternalServerError)
		}
	})
	o := options(t, b, a.URL)
	o.Selection.Filter.IDs = []uuid.UUID{ids[0], ids[4], ids[7]}
	mustRun(t, o)

	p := mustPlan(t, b, replayer.PlanOptions{})
	require.Equal(t, int64(18), p.Requests)
	// Of the six that had 502, one has had another answer since.
	require.Equal(t, int64(5), p.Suspects.Requests)
	require.Len(t, p.Suspects.First, 5)
	worst := p.Suspects.First[0]
	require.Equal(t, ids[4], worst.ID)
	require.Greater(t, worst.Attempts, 1)
	require.Equal(t, worst.Attempts, worst.Deaths)
	require.Contains(t, worst.Error, "EOF")
	require.Equal(t, replayer.Suspect{ID: ids[1], Attempts: 1, Deaths: 1, Status: 502}, p.Suspects.First[1])
	require.Contains(t, textOf(t, p), fmt.Sprintf("  %s  %d of %d attempts  ", ids[4], worst.Deaths, worst.Attempts))

	// All of it is in the JSON.
	data, err := json.Marshal(p)
	require.NoError(t, err)
	var again replayer.Plan
	require.NoError(t, json.Unmarshal(data, &again))
	require.Equal(t, p.Suspects, again.Suspects)
	require.Equal(t, p.Sample, again.Sample)
	require.True(t, p.At.Equal(again.At))
}

// What was not seen by the API is not suspected.
func TestPlanSuspectsNobodyOfARefusedConnection(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, request{status: 500})
	b.fails(t, ids[0], "upstream: connect: dial tcp 127.0.0.1:1: connect: connection reset by peer")
	require.Nil(t, mustPlan(t, b, replayer.PlanOptions{}).Suspects)
	b.fails(t, ids[0], "upstream: read: read tcp 127.0.0.1:2->127.0.0.1:1: read: connection reset by peer")
	require.Equal(t, int64(1), mustPlan(t, b, replayer.PlanOptions{}).Suspects.Requests)
}

// fails has a later attempt of the ingress end without an answer.
func (b *books) fails(t *testing.T, id uuid.UUID, failure string) {
	t.Helper()
	d, err := b.Get(t.Context(), id)
	require.NoError(t, err)
	now, err := b.Now(t.Context())
	require.NoError(t, err)
	errs, err := b.Complete(t.Context(), []ledger.Fact{{Outcome: &capture.Outcome{ID: id, Ingress: "gw", Attempt: capture.Attempt{
		Number: d.Attempts + 1, StartedAt: now, EndedAt: now, Error: failure, Verdict: capture.Failed,
	}}}})
	require.NoError(t, err)
	require.NoError(t, errs[0])
}

// Without a rate the estimate goes by how fast the last runs went.
func TestPlanGoesByThePaceOfTheLastRuns(t *testing.T) {
	b := newBooks(t)
	a := newAPI(t, nil)
	var runs []string
	rates := make(map[string]float64)
	for _, n := range []int{60, 60, 60, 60, 10} { // the last one is a canary
		b.capture(t, many(n)...)
		o := options(t, b, a.URL)
		o.Clock = replayer.SystemClock{}
		r := mustRun(t, o)
		require.Equal(t, int64(n), r.Processed)
		runs = append([]string{r.Run}, runs...)
		rates[r.Run] = r.Rate
	}
	b.capture(t, many(100)...)
	p := mustPlan(t, b, replayer.PlanOptions{})
	require.Equal(t, replayer.ByPace, p.EstimateBy)
	require.Equal(t, runs[1:4], p.PastPace.Runs)
	slowest, fastest := rates[runs[1]], rates[runs[1]]
	for _, id := range runs[1:4] {
		slowest, fastest = min(slowest, rates[id]), max(fastest, rates[id])
	}
	require.GreaterOrEqual(t, p.PastPace.PerSecond, slowest*0.999)
	require.LessOrEqual(t, p.PastPace.PerSecond, fastest*1.001)
	require.InDelta(t, 100/p.PastPace.PerSecond, p.Seconds, 1e-9)
	require.Contains(t, textOf(t, p), "the pace of the last runs ("+runs[1]+", ")

	p = mustPlan(t, b, replayer.PlanOptions{Rate: 10})
	require.Equal(t, replayer.ByRate, p.EstimateBy)
	require.Equal(t, 10.0, p.Seconds)
	require.Contains(t, textOf(t, p), "takes      10s at the given rate, if the API can; compare ")

	// Of other targets nothing is known yet.
	p = mustPlan(t, b, replayer.PlanOptions{OtherTarget: true})
	require.Nil(t, p.PastPace)
	require.Empty(t, p.EstimateBy)
}
