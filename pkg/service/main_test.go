package service

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// childVar makes the test binary run as a service of its own, so that signals
// and exit codes are real. Its value says how the service behaves.
const childVar = "SERVICE_TEST_CHILD"

func TestMain(m *testing.M) {
	if kind := os.Getenv(childVar); kind != "" {
		os.Exit(Main(childApp(kind)))
	}
	goleak.VerifyTestMain(m)
}

type childSettings struct {
	Common
	Acker
	API
}

func (s *childSettings) Validate() []SettingError {
	return RequireAuth("ACKER_ADDR", s.AckerAddr, s.API)
}

// childApp writes what happens to it on standard output, a line each.
func childApp(kind string) App {
	app := App{
		Name: "child", Summary: "A service for tests.", Settings: &childSettings{}, Local: true,
		Build: func(ctx context.Context, p *Process) error {
			fmt.Println("ops", p.OpsAddr)
			p.OnStop("files", func(context.Context) error { fmt.Println("cleaned"); return nil })
			switch kind {
			case "build-fails":
				return errors.New("no such database")
			case "build-waits":
				fmt.Println("building")
				<-ctx.Done()
				return fmt.Errorf("wait for the broker: %w", ctx.Err())
			}
			p.Add("worker", &childWorker{kind: kind, quit: make(chan struct{})})
			return nil
		},
		Commands: []Command{{
			Name: "provision", Summary: "Makes things.",
			Run: func(_ context.Context, p *Process) error {
				p.OnStop("connection", func(context.Context) error { fmt.Fprintln(p.Out, "closed"); return nil })
				fmt.Fprintln(p.Out, "provisioned")
				if kind == "command-fails" {
					return errors.New("no broker")
				}
				return nil
			},
		}},
	}
	return app
}

type childWorker struct {
	kind string
	quit chan struct{}
}

func (w *childWorker) Run(ctx context.Context) error {
	if w.kind == "component-fails" {
		return errors.New("the wheel came off")
	}
	fmt.Println("running")
	select {
	case <-w.quit:
	case <-ctx.Done():
	}
	return nil
}

func (w *childWorker) Stop(context.Context) error {
	fmt.Println("stopping")
	if w.kind == "stuck" {
		select {} // heeds nothing: only a second signal ends it
	}
	close(w.quit)
	return nil
}

// child is a process that runs childApp.
type child struct {
	t    *testing.T
	cmd  *exec.Cmd
	out  *bufio.Scanner
	logs *bytes.Buffer
	ops  string
}

func startChild(t *testing.T, kind string, args ...string) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command(os.Args[0], args...), logs: &bytes.Buffer{}}
	c.cmd.Env = []string{childVar + "=" + kind, "HOLDFAST_OPS_ADDR=127.0.0.1:0", "HOLDFAST_LOG_LEVEL=debug"}
	c.cmd.Stderr = c.logs
	stdout, err := c.cmd.StdoutPipe()
	require.NoError(t, err)
	c.out = bufio.NewScanner(stdout)
	require.NoError(t, c.cmd.Start())
	t.Cleanup(func() { _ = c.cmd.Process.Kill() })
	return c
}

// until reads standard output up to the line, which must come.
func (c *child) until(line string) {
	c.t.Helper()
	for c.out.Scan() {
		if addr, ok := strings.CutPrefix(c.out.Text(), "ops "); ok {
			c.ops = "http://" + addr
		}
		if c.out.Text() == line {
			return
		}
	}
	_ = c.cmd.Wait()
	c.t.Fatalf("the line %q never came; the log:\n%s", line, c.logs)
}

// exit reads the rest of standard output and gives it with the exit code.
func (c *child) exit() (int, []string) {
	c.t.Helper()
	var rest []string
	for c.out.Scan() {
		rest = append(rest, c.out.Text())
	}
	err := c.cmd.Wait()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(c.t, err)
	}
	return c.cmd.ProcessState.ExitCode(), rest
}

// entries are the log lines of a process that has ended.
func (c *child) entries() []map[string]any {
	c.t.Helper()
	var all []map[string]any
	for line := range strings.Lines(c.logs.String()) {
		var entry map[string]any
		require.NoError(c.t, json.Unmarshal([]byte(line), &entry), line)
		all = append(all, entry)
	}
	return all
}

func (c *child) entry(message string) map[string]any {
	c.t.Helper()
	for _, e := range c.entries() {
		if e["msg"] == message {
			return e
		}
	}
	c.t.Fatalf("no line %q in the log:\n%s", message, c.logs)
	return nil
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get(url)
	require.NoError(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	return r.StatusCode, string(body)
}

func TestFirstSignalStopsInOrder(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		c := startChild(t, "well")
		c.until("running")
		code, _ := get(t, c.ops+"/livez")
		require.Equal(t, http.StatusOK, code)
		require.NoError(t, c.cmd.Process.Signal(sig))
		code, rest := c.exit()
		require.Zero(t, code, c.logs)
		require.Equal(t, []string{"stopping", "cleaned"}, rest)
		require.Equal(t, sig.String(), c.entry("stopping")["signal"])
		require.Equal(t, "child", c.entry("stopped")["service"])
	}
}

func TestSecondSignalExitsAtOnce(t *testing.T) {
	t.Parallel()
	for sig, want := range map[syscall.Signal]int{syscall.SIGTERM: 143, syscall.SIGINT: 130} {
		c := startChild(t, "stuck")
		c.until("running")
		require.NoError(t, c.cmd.Process.Signal(syscall.SIGTERM))
		c.until("stopping")
		// The ops listener outlives the service, and says that it is stopping.
		code, body := get(t, c.ops+"/readyz")
		require.Equal(t, http.StatusServiceUnavailable, code)
		require.JSONEq(t, `{"ready":false,"failing":[{"name":"stop","reason":"stopping"}]}`, body)
		require.NoError(t, c.cmd.Process.Signal(sig))
		got, rest := c.exit()
		require.Equal(t, want, got, c.logs)
		require.Empty(t, rest)
	}
}

func TestSignalDuringTheStart(t *testing.T) {
	t.Parallel()
	c := startChild(t, "build-waits")
	c.until("building")
	code, body := get(t, c.ops+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.JSONEq(t, `{"ready":false,"failing":[{"name":"start","reason":"starting"}]}`, body)
	require.NoError(t, c.cmd.Process.Signal(syscall.SIGTERM))
	code, rest := c.exit()
	require.Zero(t, code, c.logs)
	require.Equal(t, []string{"cleaned"}, rest)
}

func TestFailedComponentTakesTheProcessDown(t *testing.T) {
	t.Parallel()
	c := startChild(t, "component-fails")
	code, rest := c.exit()
	require.Equal(t, 1, code)
	require.Equal(t, []string{"stopping", "cleaned"}, rest[len(rest)-2:])
	line := c.entry("a component failed")
	require.Equal(t, "worker", line["component"])
	require.Equal(t, "the wheel came off", line["err"])
	require.Equal(t, "ERROR", line["level"])
}

func TestFailedStartCleansUp(t *testing.T) {
	t.Parallel()
	c := startChild(t, "build-fails")
	code, rest := c.exit()
	require.Equal(t, 1, code)
	require.Equal(t, "cleaned", rest[len(rest)-1])
	require.Equal(t, "start: no such database", c.entry("a component failed")["err"])
}

func TestOpsAddressInUse(t *testing.T) {
	t.Parallel()
	c := startChild(t, "well")
	c.until("running")
	other := exec.Command(os.Args[0])
	other.Env = []string{childVar + "=well", "HOLDFAST_OPS_ADDR=" + strings.TrimPrefix(c.ops, "http://")}
	out, err := other.CombinedOutput()
	require.Error(t, err)
	require.Equal(t, 1, other.ProcessState.ExitCode())
	require.Contains(t, string(out), "listen for ops")
	require.NoError(t, c.cmd.Process.Signal(syscall.SIGTERM))
	code, _ := c.exit()
	require.Zero(t, code)
}

func TestCommand(t *testing.T) {
	t.Parallel()
	c := startChild(t, "well", "provision")
	code, out := c.exit()
	require.Zero(t, code, c.logs)
	require.Equal(t, []string{"provisioned", "closed"}, out)

	c = startChild(t, "command-fails", "provision")
	code, out = c.exit()
	require.Equal(t, 1, code)
	require.Equal(t, []string{"provisioned", "closed"}, out)
	require.Equal(t, "provision", c.entry("the command failed")["command"])
}

func TestWrongSettingsExit2(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(os.Args[0], "--check-config")
	cmd.Env = []string{childVar + "=well", "HOLDFAST_LOG_LEVEL=loud", "HOLDFAST_ACKER_ADDR=:8081", "HOLDFAST_DATA_DIRR=/x", "HOLDFAST_CHILD_PORT=tcp://10.0.0.1:80"}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.Error(t, cmd.Run())
	require.Equal(t, 2, cmd.ProcessState.ExitCode())
	require.Empty(t, stdout.String())
	require.Equal(t, `child: wrong settings:
  HOLDFAST_LOG_LEVEL: "loud" is not allowed; allowed are debug, info, warn and error
  HOLDFAST_ACKER_ADDR: ":8081" is not a loopback address; set HOLDFAST_API_TOKEN_FILE, or HOLDFAST_API_AUTH=none to have no token on purpose
  HOLDFAST_DATA_DIRR: is not the name of a setting; did you mean HOLDFAST_DATA_DIR?
child --help shows every setting.
`, stderr.String())
}

func TestArguments(t *testing.T) {
	for _, c := range []struct {
		args       []string
		code       int
		out, wrong string
	}{
		{[]string{"--check-config"}, 0, "configuration is valid\n", ""},
		{[]string{"provision", "--check-config"}, 0, "configuration is valid\n", ""},
		{[]string{"--version"}, 0, "child " + Version() + " go1.", ""},
		{[]string{"--help"}, 0, "  child provision [flags]\n        Makes things.", ""},
		{[]string{"-h"}, 0, "HOLDFAST_ACKER_ADDR  (default: 127.0.0.1:8081)", ""},
		{[]string{"provision", "--help"}, 0, "  child provision [flags]", ""},
		{[]string{"--colour"}, 2, "", "flag provided but not defined: -colour"},
		{[]string{"provision", "--colour"}, 2, "", "flag provided but not defined: -colour"},
		{[]string{"serve"}, 2, "", `unexpected argument "serve"`},
		{[]string{"provision", "now"}, 2, "", `unexpected argument "now"`},
		{[]string{"--check-config", "provision", "provision"}, 2, "", `unexpected argument "provision"`},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			require.Equal(t, c.code, childApp("well").main(c.args, &stdout, &stderr), stderr.String())
			if c.code == 0 {
				require.Contains(t, stdout.String(), c.out)
				require.Empty(t, stderr.String())
				return
			}
			require.Contains(t, stderr.String(), c.wrong)
			require.Contains(t, stderr.String(), "Usage:\n  child [flags]")
			require.Empty(t, stdout.String())
		})
	}
}
