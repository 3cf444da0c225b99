package recorder_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/recorder"
)

// listed is a request as lists show it.
type listed struct {
	ID         string
	State      string
	Replayable bool
	Route      string
	Method     string
	Target     string
	ReceivedAt time.Time `json:"received_at"`
	Status     *int
	Attempts   int
}

type page struct {
	Requests []listed
	Next     string `json:"next_cursor"`
}

// record puts requests into the ledger without the stream.
func (w *world) record(requests ...*capture.Request) {
	w.t.Helper()
	items := make([]ledger.Item, len(requests))
	for i, r := range requests {
		items[i].Captured.Request = r
	}
	results, err := w.store.Record(w.t.Context(), items)
	require.NoError(w.t, err)
	for _, r := range results {
		require.NoError(w.t, r.Err)
	}
}

// outcome tells the ledger how the first try ended.
func (w *world) outcome(r *capture.Request, status int, verdict capture.Verdict) {
	w.t.Helper()
	errs, err := w.store.Complete(w.t.Context(), []ledger.Fact{{Outcome: &capture.Outcome{ID: r.ID, Ingress: "gw1", Attempt: capture.Attempt{
		Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: status, Verdict: verdict,
	}}}})
	require.NoError(w.t, errors.Join(append(errs, err)...))
}

func withToken(t testing.TB, token string) func(*recorder.Options) {
	file := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(file, []byte(token+"\n"), 0o600))
	return func(o *recorder.Options) { o.Settings.APITokenFile = file }
}

func TestListFiltersAndPages(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	var all []*capture.Request
	for i := range 25 {
		one := newRequest([]string{"POST", "PUT", "PURGE"}[i%3], fmt.Sprintf("/v1/calls/%d?x=y", i), "x")
		if i%5 == 0 {
			one.Route = "calls"
		}
		all = append(all, one)
	}
	w.record(all...)
	for i, one := range all {
		switch i % 4 {
		case 0:
			w.outcome(one, 200, capture.Processed)
		case 1:
			w.outcome(one, 503, capture.Failed)
		case 2:
			w.outcome(one, 404, capture.Rejected)
		}
	}
	count := func(keep func(i int) bool) (n int) {
		for i := range all {
			if keep(i) {
				n++
			}
		}
		return n
	}
	now := time.Now()
	for query, keep := range map[string]func(i int) bool{
		"":                                    func(int) bool { return true },
		"state=&route=&cursor=&limit=":        func(int) bool { return true },
		"state=processed":                     func(i int) bool { return i%4 == 0 },
		"state=replayable":                    func(i int) bool { return i%4 == 1 },
		"state=failed,rejected":               func(i int) bool { return i%4 == 1 || i%4 == 2 },
		"state=quarantined":                   func(int) bool { return false },
		"route=calls":                         func(i int) bool { return i%5 == 0 },
		"method=PUT,PURGE":                    func(i int) bool { return i%3 != 0 },
		"status=5xx":                          func(i int) bool { return i%4 == 1 },
		"status=200,404":                      func(i int) bool { return i%4 == 0 || i%4 == 2 },
		"path=/v1/calls/1*":                   func(i int) bool { return i == 1 || i/10 == 1 },
		"path=/**/2%3F":                       func(i int) bool { return i/10 == 2 },
		"since=1h":                            func(int) bool { return true },
		"until=1h":                            func(int) bool { return false },
		"since=" + stamp(now.Add(time.Hour)):  func(int) bool { return false },
		"until=" + stamp(now.Add(time.Hour)):  func(int) bool { return true },
		"since=2006-01-02T15:04:05+07:00":     func(int) bool { return true }, // a plus that nobody escaped
		"state=failed&method=PUT&route=calls": func(i int) bool { return i%4 == 1 && i%3 == 1 && i%5 == 0 },
	} {
		var p page
		r.get("/v1/requests?"+query, &p)
		require.Len(t, p.Requests, count(keep), query)
		require.NotNil(t, p.Requests, query)
		require.Empty(t, p.Next, query)
	}
	for _, limit := range []int{1, 7, 25, 1000} {
		seen, cursor, pages := []string{}, "", 0
		for {
			var p page
			r.get(fmt.Sprintf("/v1/requests?limit=%d&cursor=%s", limit, url.QueryEscape(cursor)), &p)
			require.LessOrEqual(t, len(p.Requests), limit)
			for _, one := range p.Requests {
				seen = append(seen, one.ID)
			}
			pages++
			if cursor = p.Next; cursor == "" {
				break
			}
		}
		require.Len(t, seen, 25)
		for i := range seen {
			require.Equal(t, all[i].ID.String(), seen[i], "in the order of their ids, each once")
		}
		require.Equal(t, (25+limit-1)/limit, pages)
	}
	var p page
	r.get("/v1/requests?state=failed&limit=1", &p)
	require.Equal(t, 503, *p.Requests[0].Status)
	require.Equal(t, 1, p.Requests[0].Attempts)
	require.True(t, p.Requests[0].Replayable)
	require.Equal(t, "/v1/calls/1?x=y", p.Requests[0].Target)
	r.get("/v1/requests?state=received&limit=1", &p)
	require.Nil(t, p.Requests[0].Status)
	require.Zero(t, p.Requests[0].Attempts)
}

func stamp(t time.Time) string { return url.QueryEscape(t.Format(time.RFC3339)) }

func TestLargestPage(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	var all []*capture.Request
	for range 1001 {
		all = append(all, newRequest("POST", "/", ""))
	}
	w.record(all...)
	var p page
	r.get("/v1/requests", &p)
	require.Len(t, p.Requests, 100, "when nothing is said")
	r.get("/v1/requests?limit=1000", &p)
	require.Len(t, p.Requests, 1000)
	r.get("/v1/requests?limit=1000&cursor="+p.Next, &p)
	require.Len(t, p.Requests, 1)
}

func TestEveryWrongParameterIsNamed(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	id := newID().String()
	for path, parameter := range map[string]string{
		"/v1/requests?state=open":                         "state",
		"/v1/requests?state=replayable,failed":            "state",
		"/v1/requests?state=failed,":                      "state",
		"/v1/requests?state=Failed":                       "state",
		"/v1/requests?route=No":                           "route",
		"/v1/requests?route=_":                            "route",
		"/v1/requests?route=" + many("a", 101):            "route",
		"/v1/requests?method=PO%20ST":                     "method",
		"/v1/requests?method=" + strings.Repeat("A", 65):  "method",
		"/v1/requests?path=v1":                            "path",
		"/v1/requests?path=/" + strings.Repeat("a", 4096): "path",
		"/v1/requests?status=600":                         "status",
		"/v1/requests?status=5x":                          "status",
		"/v1/requests?status=abc":                         "status",
		"/v1/requests?status=" + many("200", 101):         "status",
		"/v1/requests?since=yesterday":                    "since",
		"/v1/requests?since=-1h":                          "since",
		"/v1/requests?since=0001-01-01T00:00:00Z":         "since",
		"/v1/requests?until=12":                           "until",
		"/v1/requests?since=1h&until=2h":                  "until",
		"/v1/requests?limit=0":                            "limit",
		"/v1/requests?limit=-1":                           "limit",
		"/v1/requests?limit=1001":                         "limit",
		"/v1/requests?limit=ten":                          "limit",
		"/v1/requests?limit=1.5":                          "limit",
		"/v1/requests?limit=99999999999999999999":         "limit",
		"/v1/requests?cursor=nonsense":                    "cursor",
		"/v1/requests?cursor=%00":                         "cursor",
		"/v1/requests?limit=1&limit=2":                    "limit",
		"/v1/requests?states=failed":                      "states",
		"/v1/requests?%zz=1":                              "query",
		"/v1/requests?a;b":                                "query",
		"/v1/requests/" + id + "?verbose=1":               "verbose",
		"/v1/requests/" + id + "/http?raw=1":              "raw",
		"/v1/requests/nonsense":                           "id",
		"/v1/requests/nonsense/http":                      "id",
		"/v1/requests/%7B" + id + "%7D":                   "id",
		"/v1/runs?limit=1001":                             "limit",
		"/v1/runs?cursor=nonsense":                        "cursor",
		"/v1/runs?state=active":                           "state",
		"/v1/runs/nonsense":                               "id",
		"/v1/runs/" + id + "?x=y":                         "x",
		"/v1/stats?x=y":                                   "x",
		"/v1/aside?limit=101":                             "limit",
		"/v1/aside?cursor=nonsense":                       "cursor",
		"/v1/aside?kind=capture":                          "kind",
	} {
		resp, body := r.do(http.MethodGet, path)
		require.Equal(t, http.StatusBadRequest, resp.StatusCode, "%s: %s", path, body)
		require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"), path)
		var p struct{ Parameter, Detail string }
		require.NoError(t, json.Unmarshal(body, &p), path)
		require.Equal(t, parameter, p.Parameter, path)
		require.NotEmpty(t, p.Detail, path)
		require.Less(t, len(body), 1000, "%s: an error must not fill the page", path)
	}
}

func many(s string, n int) string { return strings.TrimSuffix(strings.Repeat(s+",", n), ",") }

func TestUnknownIsNotFound(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	id := newID().String()
	for path, status := range map[string]int{
		"/v1/requests/" + id:           http.StatusNotFound,
		"/v1/requests/" + id + "/http": http.StatusNotFound,
		"/v1/runs/" + id:               http.StatusNotFound,
		"/":                            http.StatusNotFound,
		"/v1/requests/":                http.StatusNotFound,
	} {
		resp, body := r.do(http.MethodGet, path)
		require.Equal(t, status, resp.StatusCode, "%s: %s", path, body)
		require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"), path)
	}
	resp, _ := r.do(http.MethodDelete, "/v1/requests/"+id)
	require.Equal(t, http.StatusMethodNotAllowed, resp.StatusCode)
	require.Equal(t, "GET, HEAD", resp.Header.Get("Allow"))
	resp, body := r.do(http.MethodHead, "/v1/stats")
	require.Equal(t, http.StatusOK, resp.StatusCode)
	require.Empty(t, body)
}

// single is what one request shows.
type single struct {
	ID, State, Target string
	Status            *int
	Attempts          []struct {
		Number  int
		Run     string
		Status  *int
		Verdict string
		EndedAt time.Time `json:"ended_at"`
	}
	Events []struct {
		Outcome, Detail string
		Attempt         int
		KnownAt         time.Time `json:"known_at"`
	}
	Quarantines []struct{ Reason, Detail string }
	Discarded   *struct{ Reason string }
	Policy      struct{ Completion, Processed, Failed, Timeout, Grace string }
	Headers     []struct{ Name, Value string }
}

func TestSingleRequestWithEverythingKnown(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	one := newRequest("POST", "/v1/calls", "x", "X-Client-Id: 7", "X-Client-Id: 8")
	w.record(one)
	w.outcome(one, 503, capture.Failed)
	errs, err := w.store.Complete(t.Context(), []ledger.Fact{{Event: &capture.Event{ID: one.ID, Outcome: capture.Failed, Attempt: 1, Detail: "no room"}}})
	require.NoError(t, errors.Join(append(errs, err)...))
	require.NoError(t, w.store.Quarantine(t.Context(), one.ID, capture.QuarantineKiller, "died twice"))
	var s single
	r.get("/v1/requests/"+one.ID.String(), &s)
	require.Equal(t, "quarantined", s.State)
	require.Len(t, s.Attempts, 1)
	require.Equal(t, 503, *s.Attempts[0].Status)
	require.Equal(t, "failed", s.Attempts[0].Verdict)
	require.False(t, s.Attempts[0].EndedAt.IsZero())
	require.Len(t, s.Events, 1)
	require.Equal(t, "no room", s.Events[0].Detail)
	require.False(t, s.Events[0].KnownAt.IsZero())
	require.Equal(t, "killer", s.Quarantines[0].Reason)
	require.Nil(t, s.Discarded)
	require.Equal(t, "response", s.Policy.Completion)
	require.Equal(t, "30s", s.Policy.Timeout)
	require.Equal(t, []struct{ Name, Value string }{
		{"Host", "api.example.com"}, {"X-Client-Id", "7"}, {"X-Client-Id", "8"}, {"Content-Length", "1"},
	}, s.Headers)

	n, err := w.store.Discard(t.Context(), ledger.Filter{IDs: []uuid.UUID{one.ID}}, "of no use", 1)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	r.get("/v1/requests/"+one.ID.String(), &s)
	require.Equal(t, "discarded", s.State)
	require.Equal(t, "of no use", s.Discarded.Reason)

	fresh := newRequest("POST", "/", "")
	w.record(fresh)
	_, body := r.do(http.MethodGet, "/v1/requests/"+fresh.ID.String())
	for _, empty := range []string{`"attempts":[]`, `"events":[]`, `"quarantines":[]`, `"status":null`} {
		require.Contains(t, string(body), empty, "what is empty is there")
	}
}

func TestCredentialsOnlyForTheToken(t *testing.T) {
	w := newWorld(t)
	const secret = "s3cr3t"
	one := newRequest("POST", "/v1/calls", "the body", "authorization: Bearer "+secret, "COOKIE:a="+secret, "Proxy_Authorization: "+secret, "X-Other: seen")
	w.record(one)
	// A poison with credentials in it.
	bad := "POST / HTTP/1.1\r\nAuthorization: " + secret + "\r\n more " + secret + "\r\nX-Other: seen\r\n"
	require.NoError(t, w.store.SetAside(t.Context(), []ledger.Aside{{Kind: "capture", Reason: "broken", Subject: "s", Data: []byte(bad)}}))
	path := "/v1/requests/" + one.ID.String()

	open := w.start(nil)
	for _, p := range []string{"/v1/requests", path, path + "/http", "/v1/aside", "/v1/stats"} {
		resp, body := open.do(http.MethodGet, p)
		require.Equal(t, http.StatusOK, resp.StatusCode)
		require.NotContains(t, string(body), secret, p)
		require.NotContains(t, string(body), base64.StdEncoding.EncodeToString([]byte(bad))[:40], p)
	}
	_, body := open.do(http.MethodGet, path+"/http")
	require.Equal(t, "POST /v1/calls HTTP/1.1\r\nHost: api.example.com\r\nauthorization: [redacted]\r\nCOOKIE: [redacted]\r\n"+
		"Proxy_Authorization: [redacted]\r\nX-Other: seen\r\nContent-Length: 8\r\n\r\nthe body", string(body))

	closed := w.start(nil, withToken(t, "t0ken"))
	for _, p := range []string{"/v1/requests", path, path + "/http", "/v1/aside", "/v1/stats", "/v1/runs", "/nowhere"} {
		resp, body := closed.do(http.MethodGet, p)
		require.Equal(t, http.StatusUnauthorized, resp.StatusCode, p)
		require.Equal(t, "application/problem+json", resp.Header.Get("Content-Type"))
		require.NotContains(t, string(body), secret)
	}
	closed.token = "t0ken"
	resp, body := closed.do(http.MethodGet, path+"/http")
	require.Equal(t, string(one.Head)+"the body", string(body))
	require.Equal(t, "application/http;msgtype=request", resp.Header.Get("Content-Type"))
	_, body = closed.do(http.MethodGet, path)
	require.Contains(t, string(body), "Bearer "+secret)
	_, body = closed.do(http.MethodGet, "/v1/requests")
	require.NotContains(t, string(body), secret, "lists never show them")
	var asides struct{ Aside []struct{ Data []byte } }
	closed.get("/v1/aside", &asides)
	require.Equal(t, "POST / HTTP/1.1\r\nAuthorization: [redacted]\r\nX-Other: seen\r\n", string(asides.Aside[0].Data))
	require.Zero(t, open.log.contains(secret)+closed.log.contains(secret))
}

// TestKeptAnswersOnlyForTheToken: they are payload.
func TestKeptAnswersOnlyForTheToken(t *testing.T) {
	w := newWorld(t)
	one := newRequest("POST", "/v1/calls", "the body")
	w.record(one)
	errs, err := w.store.Complete(t.Context(), []ledger.Fact{{Outcome: &capture.Outcome{
		ID: one.ID, Attempt: capture.Attempt{Number: 1, StartedAt: time.Now(), EndedAt: time.Now(), Status: 200, Verdict: capture.Processed},
		Answer: &capture.Answer{Type: "text/x", Encoding: "br", Cut: true, Body: []byte("s3cr3t\xff")},
	}}})
	require.NoError(t, err)
	require.NoError(t, errs[0])
	path := "/v1/requests/" + one.ID.String()
	_, body := w.start(nil).do(http.MethodGet, path)
	require.NotContains(t, string(body), "answers")
	require.NotContains(t, string(body), base64.StdEncoding.EncodeToString([]byte("s3cr3t\xff")))

	closed := w.start(nil, withToken(t, "t0ken"))
	closed.token = "t0ken"
	_, body = closed.do(http.MethodGet, path)
	require.Contains(t, string(body), `"answers":[{"attempt":1,"content_type":"text/x","content_encoding":"br","cut":true,"body":"czNjcjN0/w=="}]`)
	_, body = closed.do(http.MethodGet, "/v1/requests")
	require.NotContains(t, string(body), "answers")
}

func TestAnyBytesOfATarget(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	one := newRequest("POST", "/a\xff\xc3\xa9/%2F?q=\x80", "", "X-Name: caf\xe9")
	w.record(one)
	var s single
	r.get("/v1/requests/"+one.ID.String(), &s)
	require.Equal(t, "/a%FFé/%2F?q=%80", s.Target)
	require.Equal(t, "caf%E9", s.Headers[1].Value)
	_, body := r.do(http.MethodGet, "/v1/requests/"+one.ID.String()+"/http")
	require.Equal(t, string(one.Head), string(body), "the exact bytes")
	resp, body := r.do(http.MethodHead, "/v1/requests/"+one.ID.String()+"/http")
	require.Empty(t, body)
	require.EqualValues(t, len(one.Head), resp.ContentLength)
}

func TestRunsAndStats(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil)
	var runs struct {
		Runs []struct {
			ID, State, Owner string
			Filter           struct{ Routes []string }
			Report           json.RawMessage
		}
		Next string `json:"next_cursor"`
	}
	r.get("/v1/runs", &runs)
	require.NotNil(t, runs.Runs)
	require.Empty(t, runs.Runs)
	one := newRequest("POST", "/", "")
	w.record(one)
	w.outcome(one, 503, capture.Failed)
	for i := range 3 {
		_, lease, _, err := w.store.OpenRun(t.Context(), ledger.Filter{Routes: []string{fmt.Sprint("r", i)}}, "", "me", time.Minute)
		require.NoError(t, err)
		require.NoError(t, w.store.EndRun(t.Context(), lease, []byte(`{"sent":0}`)))
	}
	r.get("/v1/runs?limit=2", &runs)
	require.Len(t, runs.Runs, 2)
	require.Empty(t, runs.Runs[0].Report, "lists go without")
	first := runs.Runs[0].ID
	r.get("/v1/runs?limit=2&cursor="+runs.Next, &runs)
	require.Len(t, runs.Runs, 1)
	var run struct {
		ID, State string
		Report    struct{ Sent *int }
		Counts    map[string]int64
	}
	r.get("/v1/runs/"+first, &run)
	require.Equal(t, "finished", run.State)
	require.NotNil(t, run.Report.Sent)
	require.Contains(t, run.Counts, "processed")

	require.NoError(t, w.store.SaveHeartbeats(t.Context(), []capture.Heartbeat{{Ingress: "gw1", Start: "00ff", Now: time.Now()}}))
	var stats struct {
		Requests  map[string]int64
		Aside     map[string]int64
		Replays   map[string]int64
		Oldest    time.Time `json:"oldest_replayable"`
		Free      *int64    `json:"free_bytes"`
		Ingresses []struct{ ID string }
	}
	r.get("/v1/stats", &stats)
	require.EqualValues(t, 1, stats.Requests["failed"])
	require.Len(t, stats.Requests, len(capture.States()), "states without requests are 0")
	require.WithinDuration(t, one.ReceivedAt, stats.Oldest, time.Second)
	require.NotNil(t, stats.Free)
	require.Equal(t, "gw1", stats.Ingresses[0].ID)
}

func TestAsidePages(t *testing.T) {
	w := newWorld(t)
	r := w.start(nil, withToken(t, "t0ken"))
	r.token = "t0ken"
	for i := range 5 {
		data := make([]byte, 100<<10)
		data[0] = byte(i)
		require.NoError(t, w.store.SetAside(t.Context(), []ledger.Aside{{Kind: "capture", Reason: "broken\xff", Subject: "s", RequestID: newID(), Data: data}}))
	}
	cursor, n := "", 0
	for {
		var answer struct {
			Aside []struct {
				Seq    int64
				Reason string
				Data   []byte
				ID     string `json:"request_id"`
			}
			Next string `json:"next_cursor"`
		}
		r.get("/v1/aside?limit=2&cursor="+cursor, &answer)
		for _, a := range answer.Aside {
			require.Len(t, a.Data, 64<<10)
			require.Equal(t, byte(n), a.Data[0])
			require.NotEmpty(t, a.ID)
			n++
		}
		if cursor = answer.Next; cursor == "" {
			break
		}
	}
	require.Equal(t, 5, n)
}

// busy is the real store, asked questions that take as long as the test likes.
type busy struct {
	recorder.Store
	asked chan struct{}
	open  chan struct{}
}

func (b *busy) Ingresses(ctx context.Context) ([]ledger.Ingress, error) {
	b.asked <- struct{}{}
	<-b.open
	return b.Store.Ingresses(ctx)
}

func TestTooManyReadersAreTurnedAway(t *testing.T) {
	w := newWorld(t)
	b := &busy{w.store, make(chan struct{}), make(chan struct{})}
	r := w.start(b)
	statuses := make(chan int)
	for range 32 {
		go func() {
			resp, err := http.Get(r.url + "/v1/stats")
			if err != nil {
				statuses <- 0
				return
			}
			_ = resp.Body.Close()
			statuses <- resp.StatusCode
		}()
	}
	for range 32 {
		<-b.asked
	}
	resp, _ := r.do(http.MethodGet, "/v1/requests")
	require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
	require.NotEmpty(t, resp.Header.Get("Retry-After"))
	close(b.open)
	for range 32 {
		require.Equal(t, http.StatusOK, <-statuses)
	}
	http.DefaultClient.CloseIdleConnections()
	resp, _ = r.do(http.MethodGet, "/v1/requests")
	require.Equal(t, http.StatusOK, resp.StatusCode)
}

func TestLedgerGoneIsAnswered503(t *testing.T) {
	w := newWorld(t)
	store := w.open()
	r := w.start(store)
	require.NoError(t, store.Close())
	for _, path := range []string{"/v1/requests", "/v1/stats", "/v1/runs", "/v1/aside", "/v1/requests/" + newID().String()} {
		resp, body := r.do(http.MethodGet, path)
		require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode, "%s: %s", path, body)
		require.NotEmpty(t, resp.Header.Get("Retry-After"))
	}
	require.Eventually(t, func() bool {
		for _, c := range r.ready.Failing() {
			if c.Name == "recorder ledger" {
				return true
			}
		}
		return false
	}, patience, milli)
}

var _ service.Component = (*recorder.Service)(nil)
