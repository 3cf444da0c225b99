package e2e_test

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// What Holdfast refuses to start on, and leaves as it is.

// ended waits until a process has ended by itself, and gives its exit code and
// the end of its log.
func ended(t *testing.T, p *proc.Process) (code int, log string) {
	t.Helper()
	select {
	case <-p.Ended():
	case <-bound(t):
		p.Kill()
		require.FailNow(t, "it did not end", p.Tail(4<<10))
	}
	return p.ExitCode(), p.Tail(16 << 10)
}

func TestASecondInstanceIsRefused(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		before := w.sends(2, http.StatusCreated)
		// The same data directory, and addresses of its own.
		second := prepare(t, w.Topology(), t.TempDir(), settings{
			"DATA_DIR": w.DataDir(), "SPOOL_DIR": w.SpoolDir(), "LEDGER_URL": "sqlite://" + w.Ledger(), "NATS_URL": w.NATSURL(),
		})
		p, err := second.Launch(harness.Ingress)
		require.NoError(t, err)
		code, log := ended(t, p)
		require.Equal(t, 1, code, log)
		require.Contains(t, log, "in use")
		if w.Topology() == harness.Standalone {
			require.Contains(t, log, "stream directory "+w.NATSDir())
			require.Contains(t, log, "HOLDFAST_DATA_DIR")
		} else {
			require.Contains(t, log, w.SpoolDir())
		}
		// The first one goes on.
		w.replayed(append(before, w.sends(2, http.StatusCreated)...), 1)
		w.awaitSpool()
	})
}

// exits runs a binary with nothing in its environment but these settings.
func exits(t *testing.T, s settings, binary string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(bin, binary), args...)
	cmd.Dir = t.TempDir()
	cmd.Env = []string{}
	for name, value := range s {
		cmd.Env = append(cmd.Env, "HOLDFAST_"+name+"="+value)
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	require.NotNil(t, cmd.ProcessState, "%v", err)
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// Wrong settings: all at once, by name, exit 2.
func TestWrongSettingsAreNamedAllAtOnce(t *testing.T) {
	t.Parallel()
	wrong := settings{
		"LOG_LEVEL": "loud", "SHUTDOWN_TIMEOUT": "soon", "UPSTREAM_URL": "ftp://x", "SPOOL_MAX_BYTES": "many",
		"ACKER_ADDR": "nowhere", "RECORDER_ADDR": "0.0.0.0:8082", "NATS_URL": "http://x", "LEDGER_URL": "mysql://x",
		"STREAM_REPLICAS": "9", "NO_SUCH_SETTING": "x",
	}
	for binary, names := range map[string][]string{
		"ingress":    {"UPSTREAM_URL", "SPOOL_MAX_BYTES", "NATS_URL"},
		"acker":      {"ACKER_ADDR", "NATS_URL", "LEDGER_URL", "STREAM_REPLICAS"},
		"recorder":   {"RECORDER_ADDR", "NATS_URL", "LEDGER_URL", "STREAM_REPLICAS"},
		"standalone": {"UPSTREAM_URL", "SPOOL_MAX_BYTES", "ACKER_ADDR", "RECORDER_ADDR", "LEDGER_URL", "STREAM_REPLICAS"},
		"replayer":   {"UPSTREAM_URL", "NATS_URL", "LEDGER_URL"},
	} {
		t.Run(binary, func(t *testing.T) {
			var args []string
			if binary == "replayer" {
				args = []string{"run", "--rate", "fast"}
			}
			code, stdout, stderr := exits(t, wrong, binary, args...)
			require.Equal(t, 2, code, stderr)
			require.Empty(t, stdout)
			for _, name := range append(names, "LOG_LEVEL", "NO_SUCH_SETTING") {
				require.Contains(t, stderr, "HOLDFAST_"+name)
			}
			if binary == "replayer" {
				require.Contains(t, stderr, "--rate")
			} else {
				require.Contains(t, stderr, "HOLDFAST_SHUTDOWN_TIMEOUT")
			}
		})
	}
}

// A ledger, spool or stream directory of a newer version, or broken: refused
// with what to do, and left as it is.
func TestNewerAndBrokenFilesAreRefused(t *testing.T) {
	t.Parallel()
	for name, harm := range map[string]struct {
		harm func(t *testing.T, w *world)
		part string   // what must stay as it is, below the data directory
		says []string // in the log
	}{
		"newer ledger": {func(t *testing.T, w *world) {
			db, err := sql.Open("sqlite", "file:"+w.Ledger())
			require.NoError(t, err)
			defer db.Close()
			_, err = db.Exec("PRAGMA user_version = 99")
			require.NoError(t, err)
		}, "ledger.db", []string{"newer"}},
		"broken ledger": {func(t *testing.T, w *world) {
			overwrite(t, w.Ledger(), 0, bytes.Repeat([]byte("?"), 200))
		}, "ledger.db", []string{"restore it from a copy"}},
		"newer spool": {func(t *testing.T, w *world) {
			for _, path := range segments(t, w) {
				info, err := os.Stat(path)
				require.NoError(t, err)
				for _, header := range []int64{0, info.Size() - 4096} { // both copies
					overwrite(t, path, header+8, binary.LittleEndian.AppendUint32(nil, 99))
				}
			}
		}, "spool", []string{"newer version"}},
		"broken spool": {func(t *testing.T, w *world) {
			// The first record, which later ones say to be durable.
			overwrite(t, segments(t, w)[0], 4096+60, []byte("????"))
		}, "spool", []string{"damaged", "HOLDFAST_SPOOL_SALVAGE"}},
		"newer stream directory": {func(t *testing.T, w *world) {
			require.NoError(t, os.WriteFile(filepath.Join(w.NATSDir(), "VERSION"), []byte("99\n"), 0o600))
		}, "nats", []string{"stream directory", "newer"}},
		"broken stream directory": {func(t *testing.T, w *world) {
			overwrite(t, filepath.Join(w.NATSDir(), "jetstream", "$G", "streams", "HOLDFAST_REQUESTS", "meta.inf"), 0, []byte("????"))
		}, "nats/jetstream/$G/streams/HOLDFAST_REQUESTS/msgs", []string{"move"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, harness.Standalone, nil)
			before := w.sends(3, http.StatusCreated)
			w.await("processed", ids(before)...)
			// The spool has something that nobody else has.
			unlock := w.lockLedger()
			all := w.sends(3, http.StatusCreated)
			w.Kill(harness.Ingress)
			unlock()

			whole := filepath.Join(t.TempDir(), "whole")
			require.NoError(t, os.CopyFS(whole, os.DirFS(w.DataDir())))
			harm.harm(t, w)
			part := filepath.Join(w.DataDir(), harm.part)
			harmed := contents(t, part)
			for range 2 { // a second try does not get further
				p, err := w.Launch(harness.Ingress)
				require.NoError(t, err)
				code, log := ended(t, p)
				require.Equal(t, 1, code, log)
				for _, text := range harm.says {
					require.Contains(t, log, text)
				}
				require.Contains(t, log, w.DataDir())
				require.Equal(t, harmed, contents(t, part), "%s was altered", harm.part)
			}

			// What to do: restore it from a copy.
			require.NoError(t, os.RemoveAll(w.DataDir()))
			require.NoError(t, os.CopyFS(w.DataDir(), os.DirFS(whole)))
			require.NoError(t, w.Start(t.Context()))
			w.replayed(append(before, all...), 1)
		})
	}
}

// segments are the files of the spool that hold records, the oldest first.
func segments(t *testing.T, w *world) []string {
	t.Helper()
	var found []string
	paths, err := filepath.Glob(filepath.Join(w.SpoolDir(), "*"))
	require.NoError(t, err)
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err == nil && bytes.HasPrefix(b, []byte("HFSPOOL\n")) {
			found = append(found, path)
		}
	}
	require.NotEmpty(t, found)
	return found
}

func overwrite(t *testing.T, path string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt(b, at)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

// contents reads a file, or all files below a directory but locks.
func contents(t *testing.T, path string) map[string]string {
	t.Helper()
	all := map[string]string{}
	require.NoError(t, filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.EqualFold(d.Name(), "lock") || strings.HasSuffix(name, ".lock") {
			return err
		}
		b, err := os.ReadFile(name)
		all[name] = string(b)
		return err
	}))
	require.NotEmpty(t, all)
	return all
}

// The example API is killed between its commit and its answer: the replay makes
// no second row, and the API reports the request as processed again.
func TestTheAPIIsKilledBetweenCommitAndAnswer(t *testing.T) {
	t.Parallel()
	for _, topology := range []harness.Topology{harness.Standalone, harness.Distributed} {
		for _, completion := range []string{"response", "event"} {
			t.Run(string(topology)+" "+completion, func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				addr, err := proc.FreeAddr()
				require.NoError(t, err)
				w := prepare(t, topology, dir, settings{"UPSTREAM_URL": "http://" + addr, "COMPLETION": completion})
				args := []string{"-addr", addr, "-db", filepath.Join(dir, "api.db"), "-crash-after-commit", filepath.Join(dir, "crashed")}
				if completion == "event" {
					args = append(args, "-report", w.AckerURL())
				}
				api := func() *proc.Process {
					p, err := proc.Start(proc.Spec{Name: "exampleapi", Path: filepath.Join(bin, "exampleapi"), Args: args, Dir: dir})
					require.NoError(t, err)
					t.Cleanup(p.Kill)
					require.NoError(t, proc.AwaitHTTP(t.Context(), p, "http://"+addr+"/stats"))
					return p
				}
				first := api()
				require.NoError(t, w.Start(t.Context()))

				s := w.send()
				require.Equal(t, http.StatusBadGateway, s.status)
				_, _ = ended(t, first)
				w.await("failed", s.id)
				api()
				w.replay(0, "--wait", "30s")
				w.await("processed", s.id)

				var stats struct{ Rows, Arrivals, Repeats int }
				require.NoError(t, harness.GetJSON(t.Context(), "http://"+addr+"/stats", &stats))
				require.Equal(t, struct{ Rows, Arrivals, Repeats int }{1, 2, 1}, stats)
				if completion == "event" {
					r, ok := w.look(s.id)
					require.True(t, ok)
					require.Len(t, r.Events, 1)
					require.Equal(t, 2, r.Events[0].Attempt)
				}
				w.nothingLeft()
			})
		}
	}
}

// /livez checks no dependency; /readyz of the ingress depends on start-up, spool
// and shutdown only.
func TestHealth(t *testing.T) {
	distributed(t, nil, func(t *testing.T, w *world) {
		status := func(role, path string) int {
			code, _ := w.ask("GET", w.OpsURL(role)+path, "")
			return code
		}
		w.Kill(harness.NATS)
		unlock := w.lockLedger()
		for _, role := range []string{harness.Acker, harness.Recorder} {
			require.Eventually(t, func() bool { return status(role, "/readyz") == http.StatusServiceUnavailable },
				patience, 10*time.Millisecond, "%s is not ready without NATS", role)
			require.Equal(t, http.StatusOK, status(role, "/livez"))
		}
		require.Equal(t, http.StatusOK, status(harness.Ingress, "/livez"))
		require.Equal(t, http.StatusOK, status(harness.Ingress, "/readyz"))
		w.sends(2, http.StatusCreated)
		unlock()
		require.NoError(t, w.Start(t.Context(), harness.NATS))
		for _, role := range []string{harness.Acker, harness.Recorder} {
			require.Eventually(t, func() bool { return status(role, "/readyz") == http.StatusOK },
				patience, 10*time.Millisecond, "%s is ready again", role)
		}
		// It stops though nobody has taken what it holds, and in order.
		require.NoError(t, w.Stop())
	})
}

func TestHealthOfAStandalone(t *testing.T) {
	t.Parallel()
	w := start(t, harness.Standalone, nil)
	w.lockLedger()
	w.sends(2, http.StatusCreated)
	status, text := w.ask("GET", w.OpsURL(harness.Ingress)+"/livez", "")
	require.Equal(t, http.StatusOK, status, text)
	require.NoError(t, os.Rename(w.NATSDir(), w.NATSDir()+".away"))
	require.NoError(t, os.Rename(w.SpoolDir(), w.SpoolDir()+".away"))
	status, text = w.ask("GET", w.OpsURL(harness.Ingress)+"/livez", "")
	require.Equal(t, http.StatusOK, status, text)
}

func TestHelpAndConfiguration(t *testing.T) {
	t.Parallel()
	for binary, names := range map[string][]string{
		"ingress":    {"UPSTREAM_URL", "INGRESS_ADDR", "SPOOL_DIR", "NATS_URL", "MAX_BODY_BYTES"},
		"acker":      {"ACKER_ADDR", "LEDGER_URL", "NATS_URL", "API_TOKEN_FILE"},
		"recorder":   {"RECORDER_ADDR", "RETENTION", "KEEP_PROCESSED_BYTES", "STREAM_MAX_BYTES"},
		"replayer":   {"LEDGER_URL", "NATS_URL", "UPSTREAM_URL"},
		"standalone": {"UPSTREAM_URL", "INGRESS_ADDR", "ACKER_ADDR", "RECORDER_ADDR", "NATS_ADDR", "STREAM_MAX_BYTES", "DATA_DIR"},
	} {
		t.Run(binary, func(t *testing.T) {
			code, stdout, stderr := exits(t, nil, binary, "--help")
			require.Zero(t, code, stderr)
			for _, name := range append(names, "LOG_LEVEL") {
				require.Contains(t, stdout, "HOLDFAST_"+name)
			}
			code, stdout, _ = exits(t, nil, binary, "--version")
			require.Zero(t, code)
			require.Contains(t, stdout, binary)
			code, stdout, stderr = exits(t, settings{"UPSTREAM_URL": "http://127.0.0.1:1", "API_AUTH": "none"}, binary, "--check-config")
			require.Zero(t, code, stderr)
			require.Contains(t, stdout, "valid")
			code, _, stderr = exits(t, settings{"UPSTREAM_URL": "http://127.0.0.1:1", "API_AUTH": "none", "LOG_LEVEL": "x"}, binary, "--check-config")
			require.Equal(t, 2, code)
			require.Contains(t, stderr, "HOLDFAST_LOG_LEVEL")
		})
	}
}

// The stock nats command shows a readable request.
func TestARequestIsReadableInTheStream(t *testing.T) {
	both(t, nil, func(t *testing.T, w *world) {
		s := w.sendBody(`{"call":"from 12 to 34"}`, "X-Client-Id", "seven")
		w.answered(s, http.StatusCreated)
		w.awaitStream(w.jetStream(), 1)
		for name, shown := range map[string]string{
			"view": w.onTerminal(natsCLI, "--server", w.NATSURL(), "stream", "view", "HOLDFAST_REQUESTS"),
			"get":  w.cli("stream", "get", "HOLDFAST_REQUESTS", "1"),
		} {
			for _, text := range []string{
				"holdfast.requests.default.POST", s.id,
				"POST /calls?x=%2F HTTP/1.1", "X-Client-Id: seven", "Content-Length: 24", `{"call":"from 12 to 34"}`,
			} {
				require.Contains(t, shown, text, name)
			}
		}
	})
}

// The commands of docs/integration.md report to a standalone what has become of
// requests that it has captured.
func TestRecipesOnAStandalone(t *testing.T) {
	t.Parallel()
	w := start(t, harness.Standalone, settings{"COMPLETION": "event", "GRACE": "1h"})
	page, err := os.ReadFile("../docs/integration.md")
	require.NoError(t, err)
	token := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(token, []byte("not asked for\n"), 0o600))
	for name, state := range map[string]string{
		"sh report.py": "processed", "sh curl": "failed", "sh curl-put": "processed", "sh curl-delete": "processed", "sh nats-pub": "processed",
	} {
		_, rest, ok := strings.Cut(string(page), "```"+name+"\n")
		require.True(t, ok, name)
		block, _, ok := strings.Cut(rest, "```")
		require.True(t, ok, name)
		s := w.send()
		w.answered(s, http.StatusCreated)
		w.await("received", s.id)
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		cmd := exec.CommandContext(ctx, "sh", "-eu", "-c", block)
		cmd.Dir = "../docs/integration"
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(natsCLI)+":"+os.Getenv("PATH"), "PYTHONDONTWRITEBYTECODE=1", "HOME="+t.TempDir(),
			"ACKER_URL="+w.AckerURL(), "NATS_URL="+w.NATSURL(), "TOKEN_FILE="+token, "REQUEST_UUID="+s.id)
		out, err := cmd.CombinedOutput()
		cancel()
		require.NoError(t, err, "%s: %s", name, out)
		w.await(state, s.id)
	}
}
