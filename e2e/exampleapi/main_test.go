package exampleapi_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/e2e/exampleapi"
	"github.com/holdfast-io/holdfast/pkg/capture"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// id returns the nth UUID.
func id(n int) string { return fmt.Sprintf("01890000-0000-7000-8000-%012d", n) }

// start runs an API in this process until the test ends.
func start(t *testing.T, opts exampleapi.Options) *exampleapi.API {
	t.Helper()
	if opts.DB == "" {
		opts.DB = filepath.Join(t.TempDir(), "a b?c#d%41.db") // the path is taken as it is
	}
	opts.Addr = "127.0.0.1:0"
	api, err := exampleapi.New(opts)
	require.NoError(t, err)
	ran := make(chan error, 1)
	go func() { ran <- api.Run(context.Background()) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		require.NoError(t, api.Stop(ctx))
		require.NoError(t, <-ran)
	})
	return api
}

// answered is what a client got.
type answered struct {
	status int
	body   string
}

// client is one whose connections end with the test.
func client(t *testing.T) *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

// send makes one request. header is name, value, name, value.
func send(t *testing.T, c *http.Client, method, url string, body string, header ...string) (answered, error) {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader([]byte(body)))
	require.NoError(t, err)
	req.GetBody = nil // so that net/http never sends it again
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		return answered{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return answered{resp.StatusCode, string(data)}, err
}

func stats(t *testing.T, api *exampleapi.API) exampleapi.Stats {
	t.Helper()
	s, err := api.Stats(t.Context())
	require.NoError(t, err)
	return s
}

// acker takes completions as the real one does, by the real codec.
type acker struct {
	*httptest.Server
	mu     sync.Mutex
	events []capture.Event
}

func newAcker(t *testing.T) *acker {
	a := &acker{}
	a.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		events, err := capture.DecodeEvents(body, 1000)
		if err != nil || r.URL.Path != "/v1/completions" || r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		a.mu.Lock()
		a.events = append(a.events, events...)
		a.mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
	}))
	t.Cleanup(a.Close)
	return a
}

func (a *acker) held() []capture.Event {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]capture.Event(nil), a.events...)
}

// tokenFile holds the acker's token.
func tokenFile(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(path, []byte("secret\n"), 0o600))
	return path
}

// process is the command, running.
type process struct {
	*exec.Cmd
	url string
	out io.ReadCloser
	err *bytes.Buffer // read after Wait only
}

// build makes the command.
func build(t *testing.T) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "exampleapi")
	out, err := exec.Command("go", "build", "-o", bin, "../cmd/exampleapi").CombinedOutput()
	require.NoError(t, err, string(out))
	return bin
}

// launch starts the command and returns when it listens.
func launch(t *testing.T, bin string, env []string, args ...string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(bin, append([]string{"-addr", "127.0.0.1:0"}, args...)...), err: &bytes.Buffer{}}
	p.Env = append(os.Environ(), env...)
	p.Stderr = p.err
	out, err := p.StdoutPipe()
	require.NoError(t, err)
	p.out = out
	require.NoError(t, p.Start())
	t.Cleanup(func() {
		if p.ProcessState == nil {
			_ = p.Process.Kill()
			_ = p.Wait()
		}
	})
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		_ = p.Wait()
		t.Fatalf("it did not start: %s", p.err)
	}
	var said struct{ Addr, URL, DB, Arrivals string }
	require.NoError(t, json.Unmarshal(line, &said))
	require.Equal(t, "http://"+said.Addr, said.URL)
	require.Equal(t, exampleapi.ArrivalsFile(said.DB), said.Arrivals)
	p.url = said.URL
	return p
}

// run runs the command to its end, in a directory of its own.
func run(t *testing.T, bin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command(bin, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	return string(out), err
}
