package compare_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite" // the ledger is read with SQL

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// patience bounds waits for what takes milliseconds, or seconds after a crash.
const patience = 60 * time.Second

type world struct {
	*harness.System
	t      *testing.T
	dir    string
	client *http.Client
}

func start(t *testing.T, topology harness.Topology, upstream string, keep string) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), client: &http.Client{Transport: &http.Transport{}, Timeout: patience}}
	var err error
	w.System, err = harness.New(harness.Options{
		Topology: topology, Bin: bin, NATSServer: natsServer, Dir: w.dir, Upstream: upstream,
		Settings: map[string]string{"UPSTREAM_TIMEOUT": "5s", "GRACE": "0s", "KEEP_ANSWERS": keep},
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		w.client.CloseIdleConnections()
		w.Close()
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(w.dir, "*.log"))
			for _, path := range logs {
				text, _ := os.ReadFile(path)
				t.Logf("the end of %s:\n%s", filepath.Base(path), text[max(0, len(text)-3<<10):])
			}
		}
	})
	require.NoError(t, w.Start(t.Context()))
	return w
}

func (w *world) post(path string) (id string, body []byte) {
	w.t.Helper()
	resp, err := w.client.Post(w.IngressURL()+path, "text/plain", strings.NewReader("x"))
	require.NoError(w.t, err)
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	require.NoError(w.t, err)
	require.Equal(w.t, "synced", resp.Header.Get(capture.HTTPHeaderStored))
	return resp.Header.Get(capture.HTTPHeaderID), body
}

// processed waits until so many are processed in the ledger.
func (w *world) processed(n int) {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		list, err := w.Requests(w.t.Context(), "state=processed")
		return err == nil && len(list) == n
	}, patience, 20*time.Millisecond)
}

// rows reads the ledger with SQL.
func (w *world) rows(query string) []string {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.Ledger()+"?mode=ro")
	require.NoError(w.t, err)
	defer func() { require.NoError(w.t, db.Close()) }()
	rows, err := db.Query(query)
	require.NoError(w.t, err)
	defer rows.Close()
	columns, err := rows.Columns()
	require.NoError(w.t, err)
	var all []string
	for rows.Next() {
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(any)
		}
		require.NoError(w.t, rows.Scan(values...))
		var line strings.Builder
		for _, v := range values {
			fmt.Fprintf(&line, "%v|", *v.(*any))
		}
		all = append(all, line.String())
	}
	require.NoError(w.t, rows.Err())
	return all
}

// states are what the ledger says of requests and their own attempts.
func (w *world) states() []string {
	return append(w.rows("SELECT id, seq, state, kept, due, facts, changed, attempts, unresolved, started, ended, status, error, verdict, match_status FROM requests ORDER BY id"),
		append(w.rows("SELECT * FROM attempts ORDER BY id"), w.rows("SELECT * FROM answers WHERE run = '' ORDER BY id")...)...)
}

// TestAnswersReachTheLedger, cut and binary ones, through kill -9 of whoever has
// them.
func TestAnswersReachTheLedger(t *testing.T) {
	binary := make([]byte, 70<<10)
	for i := range binary {
		binary[i] = byte(i * 31 / 7)
	}
	for _, topology := range []harness.Topology{harness.Standalone, harness.Distributed} {
		t.Run(string(topology), func(t *testing.T) {
			api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/octet-stream")
				_, _ = w.Write(binary[:map[string]int{"/all": 40 << 10, "/exact": 64 << 10, "/cut": 70 << 10}[r.URL.Path]])
			}))
			defer api.Close()
			w := start(t, topology, api.URL, "64KiB")
			want := make(map[string][]byte)
			send := func() {
				for _, path := range []string{"/all", "/exact", "/cut", "/none"} {
					id, body := w.post(path)
					want[id] = body
				}
			}
			send()
			w.Kill(harness.Ingress)
			w.Kill(harness.Acker)
			require.NoError(t, w.Start(t.Context()))
			send()
			w.processed(len(want))
			for id, body := range want {
				got := w.rows(fmt.Sprintf("SELECT run, number, type, cut, hex(body) FROM answers WHERE id = x'%s'", strings.ReplaceAll(id, "-", "")))
				cut := 0
				if len(body) > 64<<10 {
					cut, body = 1, body[:64<<10]
				}
				require.Equal(t, []string{fmt.Sprintf("|1|application/octet-stream|%d|%X|", cut, body)}, got)
			}
			require.Empty(t, w.rows("SELECT 1 FROM asides"))
		})
	}
}

// exampleAPI starts one.
func exampleAPI(t *testing.T, name string, args ...string) string {
	t.Helper()
	dir := t.TempDir()
	addr, err := proc.FreeAddr()
	require.NoError(t, err)
	p, err := proc.Start(proc.Spec{
		Name: name, Path: filepath.Join(bin, "exampleapi"), Dir: dir, Args: append([]string{"-addr", addr, "-db", filepath.Join(dir, "api.db")}, args...),
	})
	require.NoError(t, err)
	t.Cleanup(p.Kill)
	url := "http://" + addr
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	require.NoError(t, proc.AwaitHTTP(ctx, p, url+"/"))
	return url
}

func arrivals(t *testing.T, api string) int64 {
	t.Helper()
	var stats struct{ Arrivals int64 }
	require.NoError(t, harness.GetJSON(t.Context(), api+"/stats", &stats))
	return stats.Arrivals
}

type report struct {
	Run      string
	PickedUp bool `json:"picked_up"`
	Sent     int64
	Compared struct {
		Same, Cut      int64
		SameStatus     int64 `json:"same_status"`
		StatusDiffers  int64 `json:"status_differs"`
		BodyDiffers    int64 `json:"body_differs"`
		NoStoredAnswer int64 `json:"no_stored_answer"`
		Examples       []struct {
			Status      int
			TestStatus  int `json:"test_status"`
			Differences []struct{ Path, Stored, Test string }
		}
	}
}

func (w *world) replay(code int, args ...string) (r report) {
	w.t.Helper()
	got, out, err := w.Replay(w.t.Context(), append([]string{"run", "--state", "processed", "--concurrency", "1", "--output", "json"}, args...)...)
	require.NoError(w.t, err)
	require.Equal(w.t, code, got, "%s", out)
	if code != 2 {
		require.NoError(w.t, json.Unmarshal([]byte(out), &r), out)
	}
	return r
}

// TestATestSystemIsComparedWithProduction: two example APIs, the second of which
// is changed, in real processes.
func TestATestSystemIsComparedWithProduction(t *testing.T) {
	const n = 20
	failing := filepath.Join(t.TempDir(), "failing")
	production, test := exampleAPI(t, "production"), exampleAPI(t, "test", "-fail-file", failing, "-delay", "20ms")
	w := start(t, harness.Standalone, production, "4KiB")
	for i := range n {
		_, body := w.post(fmt.Sprintf("/calls/%d", i))
		require.Contains(t, string(body), fmt.Sprintf(`"seq":%d`, i+1))
	}
	w.processed(n)
	before := w.states()

	same := w.replay(0, "--upstream", test)
	require.EqualValues(t, n, same.Compared.Same)
	require.EqualValues(t, n, arrivals(t, test))

	require.EqualValues(t, n, w.replay(0, "--upstream", test, "--again").Compared.Same)
	require.EqualValues(t, 2*n, arrivals(t, test), "all of it again")

	// One whose numbers begin later differs in them alone.
	other := exampleAPI(t, "other")
	resp, err := w.client.Post(other+"/before", "text/plain", strings.NewReader("x"))
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	changed := w.replay(3, "--upstream", other)
	require.EqualValues(t, n, changed.Compared.BodyDiffers)
	require.Equal(t, "$.seq", changed.Compared.Examples[0].Differences[0].Path)
	require.Equal(t, "1", changed.Compared.Examples[0].Differences[0].Stored)
	require.EqualValues(t, n, w.replay(0, "--upstream", other, "--ignore", "$.seq").Compared.Same)

	require.NoError(t, os.WriteFile(failing, nil, 0o600))
	broken := w.replay(3, "--upstream", test, "--max-attempts", "1")
	require.EqualValues(t, n, broken.Compared.StatusDiffers)
	require.Equal(t, 500, broken.Compared.Examples[0].TestStatus)
	require.NoError(t, os.Remove(failing))

	// The report of a replay that was killed tells of all of it.
	at := arrivals(t, test)
	p, err := proc.Start(proc.Spec{
		Name: "killed", Path: filepath.Join(bin, "replayer"), Dir: w.dir, Env: w.Env("replayer"),
		Args: []string{"run", "--state", "processed", "--concurrency", "1", "--upstream", test, "--ignore", "$.seq"},
	})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return arrivals(t, test) >= at+3 }, patience, time.Millisecond)
	p.Kill()
	resumed := w.replay(0, "--upstream", test, "--ignore", "$.seq", "--wait", "1m") // for the lease of the one in flight
	require.True(t, resumed.PickedUp)
	require.Less(t, resumed.Sent, int64(n))
	require.EqualValues(t, n, resumed.Compared.Same)

	// Production saw none of it, nor could it.
	for _, url := range []string{production, strings.Replace(production, "127.0.0.1", "localhost", 1), strings.Replace(production, "127.0.0.1", "[::1]", 1)} {
		w.replay(2, "--upstream", url)
	}
	require.EqualValues(t, n, arrivals(t, production))
	require.Equal(t, before, w.states())
	log, err := os.ReadFile(filepath.Join(w.dir, "replayer.log"))
	require.NoError(t, err)
	require.Equal(t, 3, bytes.Count(log, []byte("a test replay must not reach it")))
}
