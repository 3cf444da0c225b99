package verify_test

import (
	"bytes"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite" // the ledger is damaged with SQL

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

// patience bounds waits for what takes milliseconds, or seconds after a crash.
const patience = 60 * time.Second

// world is a deployment, and an API that answers with the status in the path.
type world struct {
	*harness.System
	t      *testing.T
	dir    string
	client *http.Client
}

func start(t *testing.T, topology harness.Topology) *world {
	t.Helper()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		status := http.StatusOK
		_, _ = fmt.Sscanf(r.URL.Path, "/%d", &status)
		w.WriteHeader(status)
	}))
	t.Cleanup(api.Close)
	w := &world{t: t, dir: t.TempDir(), client: &http.Client{Transport: &http.Transport{}, Timeout: patience}}
	var err error
	w.System, err = harness.New(harness.Options{
		Topology: topology, Bin: bin, NATSServer: natsServer, Dir: w.dir, Upstream: api.URL,
		Settings: map[string]string{"UPSTREAM_TIMEOUT": "5s", "GRACE": "0s", "ACCESS_LOG": "all"},
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

// accessLog is where the ingress writes its own.
func (w *world) accessLog() string {
	if w.Topology() == harness.Standalone {
		return filepath.Join(w.dir, "standalone.log")
	}
	return filepath.Join(w.dir, "ingress.log")
}

// send sends a request that the API answers with the status, and gives its id.
func (w *world) send(status, size int) string {
	w.t.Helper()
	id, err := w.try(status, size)
	require.NoError(w.t, err)
	return id
}

func (w *world) try(status, size int) (string, error) {
	resp, err := w.client.Post(fmt.Sprintf("%s/%d", w.IngressURL(), status), "text/plain", strings.NewReader(strings.Repeat("x", size)))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return "", err
	}
	if stored := resp.Header.Get(capture.HTTPHeaderStored); stored != "synced" || resp.StatusCode != status {
		return "", fmt.Errorf("status %d, stored %q", resp.StatusCode, stored)
	}
	return resp.Header.Get(capture.HTTPHeaderID), nil
}

// report is what verify prints.
type report struct {
	Holds, Settled bool
	Waits          []string
	Rows           []struct {
		Source    string
		Seen      int64
		States    map[string]int64
		InFlight  int64 `json:"in_flight"`
		SetAside  int64 `json:"set_aside"`
		Missing   int64
		Undecided int64
	}
	Gaps []struct {
		Kind, ID, Detail string
		SeenIn           []string `json:"seen_in"`
	}
	NotSeen []string `json:"not_seen"`
}

// verify runs the command.
func (w *world) verify(args ...string) (int, report) {
	w.t.Helper()
	code, out, err := w.Replay(w.t.Context(), append([]string{"verify", "--output", "json"}, args...)...)
	require.NoError(w.t, err)
	var r report
	if code == 0 || code == 3 || out != "" {
		require.NoError(w.t, json.Unmarshal([]byte(out), &r), "exit code %d: %s", code, out)
	}
	return code, r
}

// holds runs verify, which must find nothing.
func (w *world) holds(args ...string) report {
	w.t.Helper()
	code, r := w.verify(args...)
	require.Zero(w.t, code, "%+v", r)
	require.True(w.t, r.Holds)
	require.Empty(w.t, r.Gaps)
	return r
}

// gaps runs verify, which must find exactly these, as "<kind> <id>"; the ids of
// counts are empty.
func (w *world) gaps(want []string, args ...string) report {
	w.t.Helper()
	code, r := w.verify(args...)
	require.Equal(w.t, 3, code, "%+v", r)
	require.False(w.t, r.Holds)
	got := []string{}
	for _, g := range r.Gaps {
		got = append(got, strings.TrimSpace(g.Kind+" "+g.ID))
	}
	require.ElementsMatch(w.t, want, got, "%+v", r.Gaps)
	return r
}

// sql changes the ledger behind everybody's back. Each statement must change
// something.
func (w *world) sql(statements ...string) {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.Ledger()+"?_pragma=busy_timeout(20000)")
	require.NoError(w.t, err)
	for _, s := range statements {
		res, err := db.ExecContext(w.t.Context(), s)
		require.NoError(w.t, err, s)
		n, err := res.RowsAffected()
		require.NoError(w.t, err)
		require.Positive(w.t, n, s)
	}
	require.NoError(w.t, db.Close())
}

// blob is an id as SQL.
func blob(id string) string {
	u := uuid.MustParse(id)
	return fmt.Sprintf("x'%x'", u[:])
}

// pollEvery is how often a condition without a signal is looked at.
const pollEvery = 20 * time.Millisecond

// awaitCaptured waits until the ledger has heard of so many captures of the
// ingress.
func (w *world) awaitCaptured(n int) {
	w.t.Helper()
	db, err := sql.Open("sqlite", "file:"+w.Ledger()+"?_pragma=busy_timeout(20000)")
	require.NoError(w.t, err)
	defer db.Close()
	require.Eventually(w.t, func() bool {
		var heard int
		err := db.QueryRowContext(w.t.Context(), "SELECT coalesce(max(n), 0) FROM counters WHERE name LIKE 'captured:%'").Scan(&heard)
		return err == nil && heard == n
	}, patience, pollEvery, "the heartbeats say that %d were captured", n)
}

// streams gives JetStream of the world's broker.
func (w *world) streams() jetstream.JetStream {
	w.t.Helper()
	conn, err := nats.Connect(w.NATSURL())
	require.NoError(w.t, err)
	w.t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	require.NoError(w.t, err)
	return js
}

// file writes an access log that names the ids.
func (w *world) file(ids ...string) string {
	w.t.Helper()
	var b bytes.Buffer
	b.WriteString("not of the access log\n")
	for _, id := range ids {
		fmt.Fprintf(&b, `{"level":"INFO","msg":"request","request_id":%q,"code":200,"stored":"synced"}`+"\n", id)
	}
	path := filepath.Join(w.t.TempDir(), "access.log")
	require.NoError(w.t, os.WriteFile(path, b.Bytes(), 0o600))
	return path
}

// missing makes the gaps of lost ids.
func missing(ids ...string) []string {
	var list []string
	for _, id := range ids {
		list = append(list, "missing "+id)
	}
	return slices.Clip(list)
}
