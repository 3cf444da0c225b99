// Package integration_test keeps docs/integration.md true.
package integration_test

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite"

	"github.com/holdfast-io/holdfast/acker"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/ledger/sqlite"
	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

const (
	docs      = "../../docs"
	recipes   = docs + "/integration"
	requestID = "01890000-0000-7000-8000-000000000001"
)

// TestIntegrationPage keeps the page true: each of its blocks is run by name
// in one of the tests below, or stands in a file that is.
func TestIntegrationPage(t *testing.T) {
	run := map[string]bool{
		"sql schema": true, "sql work": true, "sh report.py": true, "sh curl": true, "sh curl-put": true,
		"sh curl-delete": true, "sh nats-pub": true,
	}
	for _, b := range blocks(t) {
		if run[b.name] {
			delete(run, b.name)
			continue
		}
		_, file, ok := strings.Cut(b.name, " ")
		require.True(t, ok, "block %q is not run", b.name)
		source, err := os.ReadFile(filepath.Join(recipes, file))
		require.NoError(t, err)
		require.Contains(t, flat(string(source)), flat(b.text), "block of %s", file)
	}
	require.Empty(t, run, "blocks that are not on the page")
}

type block struct{ name, text string }

// blocks returns the page's fenced blocks. What follows the fence is the name.
func blocks(t *testing.T) []block {
	t.Helper()
	page, err := os.ReadFile(filepath.Join(docs, "integration.md"))
	require.NoError(t, err)
	var all []block
	for _, m := range regexp.MustCompile("(?ms)^```([^\n]+)\n(.*?)^```$").FindAllStringSubmatch(string(page), -1) {
		all = append(all, block{m[1], m[2]})
	}
	require.NotEmpty(t, all)
	return all
}

func blockOf(t *testing.T, name string) string {
	t.Helper()
	for _, b := range blocks(t) {
		if b.name == name {
			return b.text
		}
	}
	t.Fatalf("no block %q", name)
	return ""
}

// flat is the text without indentation: quotes stand further left than the
// source.
func flat(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

func TestIntegrationSQL(t *testing.T) {
	db, err := sql.Open("sqlite", filepath.Join(t.TempDir(), "x.db"))
	require.NoError(t, err)
	defer db.Close()
	db.SetMaxOpenConns(1) // BEGIN and COMMIT are statements here
	_, err = db.Exec(blockOf(t, "sql schema"))
	require.NoError(t, err)
	begin, rest, ok := strings.Cut(blockOf(t, "sql work"), "BEGIN;")
	require.True(t, ok)
	require.Empty(t, begin)
	insert, commit, ok := strings.Cut(rest, "--")
	require.True(t, ok)
	for _, want := range []int64{1, 0} {
		_, err = db.Exec("BEGIN")
		require.NoError(t, err)
		result, err := db.Exec(insert)
		require.NoError(t, err)
		rows, err := result.RowsAffected()
		require.NoError(t, err)
		require.Equal(t, want, rows)
		_, err = db.Exec("--" + commit)
		require.NoError(t, err)
	}
	var at time.Time
	require.NoError(t, db.QueryRow("SELECT processed_at FROM processed_requests").Scan(&at))
	require.WithinDuration(t, time.Now(), at, time.Minute)
}

// Each command on the page makes the event that the text beside it promises.
// The commands that try again get over a refusal.
func TestIntegrationCommands(t *testing.T) {
	for name, test := range map[string]struct {
		refusals int64
		event    string
		state    capture.State
	}{
		"sh report.py":   {0, "processed 2", capture.StateProcessed},
		"sh curl":        {1, "failed 1 no stock", capture.StateFailed},
		"sh curl-put":    {1, "processed 1", capture.StateProcessed},
		"sh curl-delete": {1, "processed 1", capture.StateProcessed},
		"sh nats-pub":    {0, "processed 1", capture.StateProcessed},
	} {
		t.Run(name, func(t *testing.T) {
			s := startServices(t, test.refusals, false)
			out, err := sh(t, s, blockOf(t, name), s.tokenFile)
			require.NoError(t, err, out)
			s.capture(t, requestID) // a completion may come first
			require.Equal(t, test.state, s.events(t, requestID, test.event))
			if name == "sh nats-pub" {
				return // without a token here
			}
			wrong := filepath.Join(t.TempDir(), "token")
			require.NoError(t, os.WriteFile(wrong, []byte("wrong"), 0o600))
			out, err = sh(t, s, blockOf(t, name), wrong)
			require.Error(t, err)
			require.Contains(t, out, "401")
		})
	}
}

// sh runs a script as a reader of the page would.
func sh(t *testing.T, s *services, script, tokenFile string) (out string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-eu", "-c", script)
	cmd.Dir = recipes
	tools, err := filepath.Abs("../../.tools") // `make tools` puts nats there
	require.NoError(t, err)
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1", "HOME="+t.TempDir(),
		"ACKER_URL="+s.ackerURL, "NATS_URL="+s.natsURL, "TOKEN_FILE="+tokenFile, "REQUEST_UUID="+requestID)
	data, err := cmd.CombinedOutput()
	return string(data), err
}

// TestIntegrationAPIs runs the whole programs: the same request twice makes
// one row and two reports, a refusal of the acker's is got over, and what is
// queued is delivered at the end.
func TestIntegrationAPIs(t *testing.T) {
	for name, command := range map[string]func(t *testing.T) *exec.Cmd{
		"api.go": goProgram,
		"api.py": func(*testing.T) *exec.Cmd { return exec.Command("python3", filepath.Join(recipes, "api.py")) },
	} {
		t.Run(name, func(t *testing.T) {
			s := startServices(t, 2, false)
			other := "01890000-0000-7000-8000-000000000002"
			s.capture(t, requestID, other)
			db := filepath.Join(t.TempDir(), "calls.db")
			cmd := command(t)
			cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1", "PORT=0", "DB="+db, "ACKER_URL="+s.ackerURL, "TOKEN_FILE="+s.tokenFile)
			var stderr bytes.Buffer // read after Wait
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			defer func() {
				if cmd.ProcessState == nil {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
			}()
			address, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil {
				_ = cmd.Wait()
				t.Fatalf("it did not start: %s", stderr.String())
			}
			address = strings.TrimSpace(address) + "/calls"

			first := post(t, address, requestID, "")
			again := post(t, address, requestID, "2")
			require.Equal(t, http.StatusCreated, first.status, first.body)
			require.Equal(t, first, again)
			require.Equal(t, http.StatusBadRequest, post(t, address, "", "").status)

			// A table that is in the way makes it fail, and be reported as failed.
			calls, err := sql.Open("sqlite", db)
			require.NoError(t, err)
			defer calls.Close()
			var rows int
			require.NoError(t, calls.QueryRow("SELECT count(*) FROM calls").Scan(&rows))
			require.Equal(t, 1, rows)
			_, err = calls.Exec("ALTER TABLE calls RENAME TO away")
			require.NoError(t, err)
			require.Equal(t, http.StatusInternalServerError, post(t, address, other, "").status)

			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			require.NoError(t, cmd.Wait(), stderr.String())
			detail := map[string]string{"api.go": " answered 500", "api.py": " not stored"}[name]
			require.Equal(t, capture.StateProcessed, s.events(t, requestID, "processed 1", "processed 2"), stderr.String())
			require.Equal(t, capture.StateFailed, s.events(t, other, "failed 1"+detail), stderr.String())
		})
	}
}

type reply struct {
	status int
	body   string
}

func post(t *testing.T, url, id, attempt string) reply {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, url, strings.NewReader("a call"))
	require.NoError(t, err)
	req.Close = true
	if id != "" {
		req.Header.Set(capture.HTTPHeaderID, id)
	}
	if attempt != "" {
		req.Header.Set(capture.HTTPHeaderAttempt, attempt)
	}
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return reply{resp.StatusCode, string(body)}
}

// goProgram builds api.go as somebody does who has this repository beside their
// own module.
func goProgram(t *testing.T) *exec.Cmd {
	t.Helper()
	dir := t.TempDir()
	source, err := os.ReadFile(filepath.Join(recipes, "api.go"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "main.go"), source, 0o600))
	sums, err := os.ReadFile("../go.sum")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.sum"), sums, 0o600))
	// e2e's go.mod has what the program needs, by paths that start at e2e.
	mod, err := os.ReadFile("../go.mod")
	require.NoError(t, err)
	root, err := filepath.Abs("../..")
	require.NoError(t, err)
	text := strings.ReplaceAll(string(mod), "=> ../", "=> "+root+"/")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.mod"), []byte(text), 0o600))
	bin := filepath.Join(dir, "api")
	for _, args := range [][]string{{"vet", "."}, {"build", "-o", bin, "."}} {
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "GOWORK=off")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
	return exec.Command(bin)
}

// The reporter in Python sets a malformed event aside and delivers the others,
// and raises when its queue is full instead of blocking.
func TestIntegrationPythonReporter(t *testing.T) {
	const script = `
import queue, sys
from report import Reporter
reporter = Reporter(sys.argv[1], sys.argv[2], max_queue=10, flush_every=0.2)
for n in range(1, 11):
    reporter.report("bad" if n in (3, 10) else "01890000-0000-7000-8000-%012d" % n, "processed", n)
try:
    for n in range(30):
        reporter.report("bad", "processed")
    print("not full")
except queue.Full:
    print("full")
reporter.close(timeout=20)
try:
    reporter.report("bad", "processed")
except RuntimeError:
    print("closed")
`
	for name, nameless := range map[string]bool{"named": false, "not named": true} {
		t.Run(name, func(t *testing.T) {
			s := startServices(t, 1, nameless)
			cmd := exec.Command("python3", "-c", script, s.ackerURL, s.tokenFile)
			cmd.Dir = recipes
			cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			require.NoError(t, err, stderr.String())
			require.Equal(t, "full\nclosed\n", string(out))
			for n := 1; n <= 10; n++ {
				id := fmt.Sprintf("01890000-0000-7000-8000-%012d", n)
				s.capture(t, id)
				if n == 3 || n == 10 {
					s.events(t, id)
				} else {
					s.events(t, id, fmt.Sprintf("processed %d", n))
				}
			}
		})
	}
}

// services is what the recipes talk to: nats-server with Holdfast's streams, a
// ledger, and the acker.
type services struct {
	ackerURL, natsURL, tokenFile string
	store                        *sqlite.Store
}

// startServices runs the services. The way to the acker leads over a proxy that
// refuses so many requests first, as an acker does that is busy; where nameless
// is set it also takes out of a 400 which event is at fault.
func startServices(t *testing.T, refusals int64, nameless bool) *services {
	t.Helper()
	dir := t.TempDir()
	s := &services{tokenFile: filepath.Join(dir, "token")}
	require.NoError(t, os.WriteFile(s.tokenFile, []byte("a-token-of-some-length\n"), 0o600))
	logger := slog.New(slog.NewTextHandler(t.Output(), nil))

	streams := stream.Streams{Replicas: 1, MaxBytes: 16 << 20}
	ns, err := embednats.Start(embednats.Options{
		Addr: "127.0.0.1:0", StoreDir: filepath.Join(dir, "nats"), MaxStoreBytes: streams.StoreBytes(), Logger: logger,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, ns.Stop(context.Background())) })
	nc, err := stream.Connect(stream.ConnectOptions{InProcess: ns.InProcess(), Name: "recipes", Logger: logger})
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	s.natsURL = ns.ClientURL()
	js, err := jetstream.New(nc)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), js, streams))

	s.store, err = sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, "ledger.db")})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.store.Close()) })
	a, err := acker.New(acker.Options{
		Store: s.store, Conn: nc, Streams: streams, Addr: "127.0.0.1:0", API: service.API{APITokenFile: s.tokenFile},
		Registry: prometheus.NewRegistry(), Ready: service.NewReadiness(), Logger: logger,
	})
	require.NoError(t, err)
	ran := make(chan error, 1)
	go func() { ran <- a.Run(context.Background()) }()
	t.Cleanup(func() {
		require.NoError(t, a.Stop(context.Background()))
		require.NoError(t, <-ran)
	})

	target, err := url.Parse(a.URL())
	require.NoError(t, err)
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	pass := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: transport,
		ModifyResponse: func(r *http.Response) error {
			if nameless && r.StatusCode == http.StatusBadRequest {
				r.Body.Close()
				r.Body, r.ContentLength = http.NoBody, 0
				r.Header.Set("Content-Length", "0")
			}
			return nil
		},
	}
	var came atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if came.Add(1) <= refusals {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		pass.ServeHTTP(w, r)
	}))
	t.Cleanup(proxy.Close)
	s.ackerURL = proxy.URL
	return s
}

// capture puts a request into the ledger as a recorder does: the events of an
// id show only when its request is known.
func (s *services) capture(t *testing.T, ids ...string) {
	t.Helper()
	items := make([]ledger.Item, len(ids))
	for i, id := range ids {
		items[i].Captured = capture.Captured{Request: &capture.Request{
			ID: uuid.MustParse(id), Route: "default", Ingress: "host", ReceivedAt: time.Now(), Policy: capture.DefaultPolicy(),
			Head: []byte("POST /calls HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"),
		}}
	}
	results, err := s.store.Record(t.Context(), items)
	require.NoError(t, err)
	for _, r := range results {
		require.NoError(t, r.Err)
	}
}

// events waits until the ledger holds want of the id, as event by event, and
// nothing else.
func (s *services) events(t *testing.T, id string, want ...string) capture.State {
	t.Helper()
	var state capture.State
	require.EventuallyWithT(t, func(c *assert.CollectT) {
		d, err := s.store.Get(t.Context(), uuid.MustParse(id))
		require.NoError(c, err)
		got := []string{}
		for _, e := range d.Facts.Events {
			got = append(got, strings.TrimSpace(fmt.Sprintf("%s %d %s", e.Outcome, e.Attempt, e.Detail)))
		}
		require.ElementsMatch(c, want, got)
		state = d.State
	}, 20*time.Second, 5*time.Millisecond)
	return state
}
