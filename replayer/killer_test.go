package replayer_test

import (
	"bufio"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/replayer"
)

const poison = "poison"

// reserved is an address that only those take who listen on it by name: connects
// are refused while nobody does.
func reserved(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Close(fd)) })
	require.NoError(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	name, err := unix.Getsockname(fd)
	require.NoError(t, err)
	return fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
}

// crashing is an API in a process of its own that dies of a certain body, and is
// started again whenever it has died.
type crashing struct {
	addr   string
	deaths atomic.Int64
}

func startCrashing(t *testing.T) *crashing {
	t.Helper()
	a := &crashing{addr: reserved(t)}
	db := filepath.Join(t.TempDir(), "api.db")
	var mu sync.Mutex
	var stopped bool
	var running *exec.Cmd
	start := func() (*exec.Cmd, error) {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return nil, errors.New("stopped")
		}
		cmd := exec.Command(exampleAPI, "-addr", a.addr, "-db", db, "-crash-body", poison)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		out, err := cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		if err := cmd.Start(); err != nil {
			return nil, err
		}
		running = cmd
		_, err = bufio.NewReader(out).ReadString('\n') // it listens
		return cmd, err
	}
	first, err := start()
	require.NoError(t, err)
	var keeper sync.WaitGroup
	keeper.Go(func() {
		for cmd := first; ; {
			_ = cmd.Wait() // it was killed, or killed itself
			a.deaths.Add(1)
			next, err := start()
			if next == nil || err != nil {
				return
			}
			cmd = next
		}
	})
	t.Cleanup(func() {
		mu.Lock()
		stopped = true
		_ = running.Process.Kill()
		mu.Unlock()
		keeper.Wait()
	})
	return a
}

// startBalancer starts Debian's nginx before the addresses, as it is by default:
// what one of them refuses goes to the next, what one of them dies of is a 502.
func startBalancer(t *testing.T, addrs ...string) string {
	t.Helper()
	addr := startBalancerBefore(t, addrs...)
	require.Equal(t, http.StatusOK, getStatus("http://"+addr+"/"))
	return addr
}

// getStatus gives the status of an answer, 0 without one.
func getStatus(url string) int {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return 0
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

// startBalancerBefore does so whether anybody listens there or not.
func startBalancerBefore(t *testing.T, addrs ...string) string {
	t.Helper()
	nginx, err := exec.LookPath("nginx")
	if err != nil {
		nginx = "/usr/sbin/nginx" // not in the path of ordinary users
	}
	dir, addr := t.TempDir(), reserved(t)
	var servers strings.Builder
	for _, a := range addrs {
		fmt.Fprintf(&servers, "server %s max_fails=0; ", a)
	}
	conf := fmt.Sprintf(`worker_processes 1; daemon off; pid %[1]s/pid; error_log %[1]s/error.log;
events { worker_connections 256; }
http {
  access_log off; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy;
  fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  upstream api { %[3]s }
  server { listen %[2]s; location / { proxy_pass http://api; } }
}`, dir, addr, servers.String())
	path := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(path, []byte(conf), 0o600))
	cmd := exec.Command(nginx, "-c", path, "-p", dir, "-e", filepath.Join(dir, "error.log"))
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM)) // its worker is not our child
		require.NoError(t, cmd.Wait())
	})
	require.Eventually(t, func() bool { return getStatus("http://"+addr+"/") != 0 }, bound, bound/1000, "nginx does not answer")
	return addr
}

// withKillers gives n requests, of which those at the given places kill.
func withKillers(n int, places ...int) []request {
	requests := many(n)
	for i := range requests {
		requests[i].body = []byte("harmless")
	}
	for _, i := range places {
		requests[i].body = []byte("some " + poison)
	}
	return requests
}

// mustBeIsolated expects that exactly the killers are quarantined, after as many
// attempts as a run has by default, and that all others are processed.
func mustBeIsolated(t *testing.T, b *books, ids []uuid.UUID, requests []request, r replayer.Report) {
	t.Helper()
	killers := int64(0)
	for i, id := range ids {
		d, err := b.Get(t.Context(), id)
		require.NoError(t, err)
		if !strings.Contains(string(requests[i].body), poison) {
			require.Equal(t, capture.StateProcessed, d.State, "request %d: %+v", i, d)
			require.Empty(t, d.Facts.Quarantines)
			continue
		}
		killers++
		require.Equal(t, capture.StateQuarantined, d.State, "killer %d: %+v", i, d.Facts.Attempts)
		require.Len(t, d.Facts.Quarantines, 1)
		require.Equal(t, capture.QuarantineKiller, d.Facts.Quarantines[0].Reason)
		detail := d.Facts.Quarantines[0].Detail
		t.Log(detail)
		require.Equal(t, 2, strings.Count(detail, "sent alone, ended at "), detail)
		require.Equal(t, 2, strings.Count(detail, "; then "), detail)
		arrived := 0
		for _, a := range d.Facts.Attempts {
			// One that met an API that was still down costs nothing.
			if !strings.Contains(a.Error, "upstream: connect: ") && !strings.Contains(a.Error, "upstream: write: ") {
				arrived++
			}
		}
		require.LessOrEqual(t, arrived, 4, "the first try, in company, alone, and alone again: %+v", d.Facts.Attempts)
	}
	require.Equal(t, killers, r.Quarantined)
	require.Len(t, r.Killers, int(killers))
	require.Equal(t, replayer.ExitHeld, r.ExitCode, "%+v", r)
	require.Equal(t, replayer.LeftCounts{Quarantined: killers}, r.Left)
}

func TestKillersAreIsolated(t *testing.T) {
	b := newBooks(t)
	requests := withKillers(120, 9, 10, 70)
	ids := b.capture(t, requests...)
	a := startCrashing(t)
	o := options(t, b, "http://"+a.addr)
	o.Clock, o.Concurrency = replayer.SystemClock{}, 8
	report := mustRun(t, o)
	mustBeIsolated(t, b, ids, requests, report)
	require.GreaterOrEqual(t, a.deaths.Load(), int64(2*3), "each has killed it twice, alone")
}

// TestKillersBehindABalancer: the balancer accepts every connect, and a crash is
// one 502 while the other APIs go on.
func TestKillersBehindABalancer(t *testing.T) {
	for name, c := range map[string]struct {
		requests []request
		health   string
	}{
		"others show that it is well": {withKillers(150, 0, 1, 40, 41), ""},
		"its health shows it":         {withKillers(3, 0, 1, 2), "/"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBooks(t)
			ids := b.capture(t, c.requests...)
			var addrs []string
			var apis []*crashing
			for range 3 {
				apis = append(apis, startCrashing(t))
				addrs = append(addrs, apis[len(apis)-1].addr)
			}
			addr := startBalancer(t, addrs...)
			o := options(t, b, "http://"+addr)
			o.Upstreams = upstreamWithHealth(t, "http://"+addr, c.health)
			o.Clock, o.Concurrency = replayer.SystemClock{}, 8
			report := mustRun(t, o)
			mustBeIsolated(t, b, ids, c.requests, report)
			deaths := int64(0)
			for _, a := range apis {
				deaths += a.deaths.Load()
			}
			require.GreaterOrEqual(t, deaths, 2*report.Quarantined)
		})
	}
}

// TestABalancerWithoutAPIs accuses nobody.
func TestABalancerWithoutAPIs(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(60)...)
	o := options(t, b, "http://"+startBalancerBefore(t, reserved(t), reserved(t)))
	o.Concurrency = 8
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitReplayable, report.ExitCode)
	require.Equal(t, map[capture.State]int64{capture.StateFailed: 60}, b.states(t))
	require.Zero(t, report.Quarantined)
}

// TestSuspectsAreSentAloneAndCleared: who dies in company of a killer is not
// guilty, and has the API for itself when it is sent again.
func TestSuspectsAreSentAloneAndCleared(t *testing.T) {
	b := newBooks(t)
	b.capture(t, many(40)...)
	var mu sync.Mutex
	now, aloneWith := 0, make(map[string]int)
	whole := make(chan struct{})
	a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, nth int) {
		mu.Lock()
		now++
		if now == 4 && nth == 1 {
			select {
			case <-whole:
			default:
				close(whole)
			}
		}
		in := now
		mu.Unlock()
		defer func() {
			mu.Lock()
			now--
			if nth > 1 {
				aloneWith[r.Header.Get(capture.HTTPHeaderID)] = max(in, now+1)
			}
			mu.Unlock()
		}()
		if nth == 1 && in > 0 && r.RequestURI >= "/things/2" && r.RequestURI < "/things/3" {
			<-whole
			panic(http.ErrAbortHandler) // as if the process had died
		}
	})
	o := options(t, b, a.URL)
	o.Concurrency = 4
	report := mustRun(t, o)
	require.Equal(t, int64(40), report.Processed)
	require.Zero(t, report.Quarantined)
	require.NotEmpty(t, aloneWith)
	for id, n := range aloneWith {
		require.Equal(t, 1, n, id)
	}
}

// TestAnAttemptWithoutResultIsNoEvidence: whoever sent it died. One lonely death
// after it is one, not two.
func TestAnAttemptWithoutResultIsNoEvidence(t *testing.T) {
	b := newBooks(t)
	ids := b.capture(t, many(5)...)
	leaveUnresolved(t, b, ids[0])
	a := newAPI(t, func(_ http.ResponseWriter, r *http.Request, nth int) {
		if r.Header.Get(capture.HTTPHeaderID) == ids[0].String() && nth == 1 {
			panic(http.ErrAbortHandler)
		}
	})
	report := mustRun(t, options(t, b, a.URL))
	require.Equal(t, int64(5), report.Processed)
	require.Zero(t, report.Quarantined)
}

// TestAKillerKeepsItsKeyClosed, and nothing else.
func TestAKillerKeepsItsKeyClosed(t *testing.T) {
	b := newBooks(t)
	requests := withKillers(60, 10)
	for i := range requests {
		requests[i].key = []string{"a", "b", ""}[i%3]
	}
	ids := b.capture(t, requests...)
	api := startCrashing(t)
	o := options(t, b, "http://"+api.addr)
	o.Clock = replayer.SystemClock{}
	report := mustRun(t, o)
	d, err := b.Get(t.Context(), ids[10])
	require.NoError(t, err)
	require.Equal(t, int64(1), report.Quarantined, "%+v", d.Facts.Attempts)
	require.Equal(t, int64(16), report.Blocked.Requests)
	require.Equal(t, ids[10], report.Blocked.Heads[0].Head)
	require.Equal(t, capture.StateQuarantined, report.Blocked.Heads[0].State)
	require.Equal(t, map[capture.State]int64{
		capture.StateProcessed: 43, capture.StateQuarantined: 1, capture.StateFailed: 16,
	}, b.states(t))
	// The operator gives it up.
	_, err = b.Discard(t.Context(), ledger.Filter{IDs: ids[10:11]}, "kills", 1)
	require.NoError(t, err)
	report = mustRun(t, o)
	require.Equal(t, int64(16), report.Processed)
	require.Nil(t, report.Blocked)
}
