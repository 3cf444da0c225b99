package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/embednats"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

const (
	docs      = "../docs"
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
func TestIntegrationCommands(t *testing.T) {
	event := capture.Event{ID: uuid.MustParse(requestID), Outcome: capture.Processed, Attempt: 1}
	second, failed := event, event
	second.Attempt = 2
	failed.Outcome, failed.Detail = capture.Failed, "no stock"
	for name, want := range map[string]capture.Event{
		"sh report.py": second, "sh curl": failed, "sh curl-put": event, "sh curl-delete": event, "sh nats-pub": event,
	} {
		t.Run(name, func(t *testing.T) {
			refusals := 1
			if name == "sh report.py" { // the command tries once
				refusals = 0
			}
			s := startServices(t, refusals)
			_, out, err := sh(t, s, blockOf(t, name), s.tokenFile)
			require.NoError(t, err, out)
			require.Equal(t, []capture.Event{want}, s.events(t))
		})
	}
	for _, name := range []string{"sh report.py", "sh curl", "sh curl-put", "sh curl-delete"} {
		t.Run(name+" with a wrong token", func(t *testing.T) {
			s := startServices(t, 0)
			wrong := filepath.Join(t.TempDir(), "token")
			require.NoError(t, os.WriteFile(wrong, []byte("wrong"), 0o600))
			code, out, err := sh(t, s, blockOf(t, name), wrong)
			require.Error(t, err)
			require.NotZero(t, code)
			require.Contains(t, out, "401")
			require.Empty(t, s.events(t))
		})
	}
}

// sh runs a script as a reader of the page would.
func sh(t *testing.T, s *services, script, tokenFile string) (code int, out string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-eu", "-c", script)
	cmd.Dir = recipes
	tools, err := filepath.Abs("../.tools") // `make tools` puts nats there
	require.NoError(t, err)
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1", "HOME="+t.TempDir(),
		"ACKER_URL="+s.ackerURL, "NATS_URL="+s.natsURL, "TOKEN_FILE="+tokenFile, "REQUEST_UUID="+requestID)
	data, err := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(data), err
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
			s := startServices(t, 2)
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
			url, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil {
				_ = cmd.Wait()
				t.Fatalf("it did not start: %s", stderr.String())
			}
			url = strings.TrimSpace(url) + "/calls"

			first := post(t, url, requestID, "")
			again := post(t, url, requestID, "2")
			require.Equal(t, http.StatusCreated, first.status, first.body)
			require.Equal(t, first, again)
			require.Equal(t, http.StatusBadRequest, post(t, url, "", "").status)

			// A table that is in the way makes it fail, and be reported as failed.
			calls, err := sql.Open("sqlite", db)
			require.NoError(t, err)
			defer calls.Close()
			var rows int
			require.NoError(t, calls.QueryRow("SELECT count(*) FROM calls").Scan(&rows))
			require.Equal(t, 1, rows)
			_, err = calls.Exec("ALTER TABLE calls RENAME TO away")
			require.NoError(t, err)
			other := "01890000-0000-7000-8000-000000000002"
			require.Equal(t, http.StatusInternalServerError, post(t, url, other, "3").status)

			require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
			require.NoError(t, cmd.Wait(), stderr.String())
			var got []string
			for _, e := range s.events(t) {
				got = append(got, fmt.Sprintf("%s %s %d", e.ID, e.Outcome, e.Attempt))
			}
			require.Equal(t, []string{requestID + " processed 1", requestID + " processed 2", other + " failed 3"}, got, stderr.String())
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
	sums, err := os.ReadFile("go.sum")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "go.sum"), sums, 0o600))
	// e2e's go.mod has what the program needs, by paths that start at e2e.
	mod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	root, err := filepath.Abs("..")
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
			s := startServices(t, 1)
			s.mu.Lock()
			s.nameless = nameless
			s.mu.Unlock()
			cmd := exec.Command("python3", "-c", script, s.ackerURL, s.tokenFile)
			cmd.Dir = recipes
			cmd.Env = append(os.Environ(), "PYTHONDONTWRITEBYTECODE=1")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			require.NoError(t, err, stderr.String())
			require.Equal(t, "full\nclosed\n", string(out))
			var attempts []int
			for _, e := range s.events(t) {
				attempts = append(attempts, e.Attempt)
			}
			require.Equal(t, []int{1, 2, 4, 5, 6, 7, 8, 9}, attempts, stderr.String())
		})
	}
}

// services is what the recipes talk to.
type services struct {
	ackerURL, natsURL, tokenFile string

	js       jetstream.JetStream
	mu       sync.Mutex
	refusals int             // HTTP requests to be answered 503 first
	nameless bool            // 400 does not say which event
	taken    []capture.Event // over HTTP
}

// startServices runs a nats-server with Holdfast's streams, and an HTTP server
// that answers as the acker's interface says, by the gateway's own codec, after
// it has refused so many requests.
func startServices(t *testing.T, refusals int) *services {
	t.Helper()
	s := &services{tokenFile: filepath.Join(t.TempDir(), "token"), refusals: refusals}
	require.NoError(t, os.WriteFile(s.tokenFile, []byte("secret\n"), 0o600))

	logger := slog.New(slog.NewTextHandler(t.Output(), nil))
	streams := stream.Streams{Replicas: 1, MaxBytes: 16 << 20}
	ns, err := embednats.Start(embednats.Options{
		Addr: "127.0.0.1:0", StoreDir: t.TempDir(), MaxStoreBytes: streams.StoreBytes(), Logger: logger,
	})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, ns.Stop(context.Background())) })
	nc, err := stream.Connect(stream.ConnectOptions{InProcess: ns.InProcess(), Name: "recipes", Logger: logger})
	require.NoError(t, err)
	t.Cleanup(nc.Close)
	s.natsURL = ns.ClientURL()
	s.js, err = jetstream.New(nc)
	require.NoError(t, err)
	require.NoError(t, stream.Provision(t.Context(), s.js, streams))

	acker := httptest.NewServer(s)
	t.Cleanup(acker.Close)
	s.ackerURL = acker.URL
	return s
}

func (s *services) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	problem := func(status int, detail string, more ...any) {
		fields := map[string]any{"status": status, "detail": detail}
		for i := 0; i < len(more); i += 2 {
			fields[more[i].(string)] = more[i+1]
		}
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(fields)
	}
	if r.Header.Get("Authorization") != "Bearer secret" {
		problem(http.StatusUnauthorized, "wrong token")
		return
	}
	if s.refusals > 0 {
		s.refusals--
		w.Header().Set("Retry-After", "1")
		problem(http.StatusServiceUnavailable, "not now")
		return
	}
	var events []capture.Event
	mux := http.NewServeMux()
	one := func(_ http.ResponseWriter, r *http.Request) {
		var id uuid.UUID
		if id, err = uuid.Parse(r.PathValue("id")); err == nil && len(body) > 0 {
			err = errors.New("a body is not in use here")
		}
		events = []capture.Event{{ID: id, Outcome: capture.Processed, Attempt: capture.FirstAttempt}}
	}
	mux.HandleFunc("PUT /v1/completions/{id}", one)
	mux.HandleFunc("DELETE /v1/requests/{id}", one)
	mux.HandleFunc("POST /v1/completions", func(http.ResponseWriter, *http.Request) {
		events, err = capture.DecodeEvents(body, 1000)
	})
	mux.ServeHTTP(httptest.NewRecorder(), r)
	if at := (*capture.EventError)(nil); errors.As(err, &at) && !s.nameless {
		problem(http.StatusBadRequest, at.Error(), "index", at.Index, "parameter", at.Parameter)
		return
	}
	if err != nil || len(events) == 0 {
		problem(http.StatusBadRequest, fmt.Sprint(err))
		return
	}
	s.taken = append(s.taken, events...)
	w.WriteHeader(http.StatusAccepted)
}

// events returns the API's events that arrived, by HTTP or in the stream.
func (s *services) events(t *testing.T) []capture.Event {
	t.Helper()
	s.mu.Lock()
	all := append([]capture.Event{}, s.taken...)
	s.mu.Unlock()
	str, err := s.js.Stream(t.Context(), capture.CompletionsStream)
	require.NoError(t, err)
	for seq := uint64(1); seq <= str.CachedInfo().State.LastSeq; seq++ {
		msg, err := str.GetMsg(t.Context(), seq)
		require.NoError(t, err)
		require.True(t, capture.IsEventSubject(msg.Subject), msg.Subject)
		events, err := capture.DecodeEvents(msg.Data, 1)
		require.NoError(t, err)
		all = append(all, events...)
	}
	return all
}
