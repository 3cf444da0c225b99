package edge_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/e2e/edge"
	"github.com/holdfast-io/holdfast/e2e/harness"
	"github.com/holdfast-io/holdfast/e2e/proc"
)

// buildServices builds what standalone is made of, once, and gives the path of
// nats-server.
var buildServices = sync.OnceValues(func() (natsServer string, err error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	natsServer = filepath.Join(root, ".tools", "nats-server")
	if _, err := os.Stat(natsServer); err != nil {
		if err := command(ctx, root, "make", "tools"); err != nil {
			return "", err
		}
	}
	return natsServer, command(ctx, root, "go", "build", "-o", bin+"/", "./ingress/cmd/ingress", "./recorder/cmd/recorder", "./acker/cmd/acker")
})

// startServices starts each service in a process of its own, and so many further
// ingresses with spools of their own. Whoever is still running at the end must
// stop with exit code 0.
func startServices(t *testing.T, apiURL string, further int, settings map[string]string) []*harness.System {
	t.Helper()
	natsServer, err := buildServices()
	require.NoError(t, err)
	var all []*harness.System
	for i := range 1 + further {
		o := harness.Options{
			Topology: harness.Distributed, Bin: bin, NATSServer: natsServer, Dir: t.TempDir(), Upstream: apiURL,
			Settings: map[string]string{"ACCESS_LOG": "off", "INGRESS_ID": fmt.Sprintf("ingress-%d", i+1)},
		}
		for name, value := range settings {
			o.Settings[name] = value
		}
		var roles []string
		if i > 0 {
			o.Settings["NATS_URL"] = all[0].NATSURL()
			roles = []string{harness.Ingress}
		}
		s, err := harness.New(o)
		require.NoError(t, err)
		t.Cleanup(s.Close)
		require.NoError(t, s.Start(t.Context(), roles...))
		t.Cleanup(func() { require.NoError(t, s.Stop()) })
		all = append(all, s)
	}
	return all
}

// startBalancer starts Debian's haproxy as a TCP balancer in front of the
// ingresses, which it asks for their readiness. Its second address answers 200
// while all of them are ready.
func startBalancer(t *testing.T, ingresses []*harness.System) (addr string, allReady func()) {
	t.Helper()
	require.NoError(t, command(t.Context(), "../..", "tools/need.sh", "haproxy=haproxy"))
	path, err := exec.LookPath("haproxy")
	if err != nil {
		path = "/usr/sbin/haproxy" // not in the path of ordinary users
	}
	addr, err = proc.FreeAddr()
	require.NoError(t, err)
	monitor, err := proc.FreeAddr()
	require.NoError(t, err)
	var conf strings.Builder
	fmt.Fprintf(&conf, `defaults
  timeout connect 5s
  timeout client 1m
  timeout server 1m
  retries 0
frontend clients
  mode tcp
  bind %s
  default_backend ingresses
frontend monitor
  mode http
  bind %s
  monitor-uri /
  monitor fail if { nbsrv(ingresses) lt %d }
backend ingresses
  mode tcp
  balance roundrobin
  option httpchk GET /readyz
  http-check expect status 200
  default-server check inter 400ms fall 1 rise 1
`, addr, monitor, len(ingresses))
	for i, s := range ingresses {
		_, port, err := net.SplitHostPort(strings.TrimPrefix(s.OpsURL(harness.Ingress), "http://"))
		require.NoError(t, err)
		fmt.Fprintf(&conf, "  server ingress-%d %s port %s\n", i+1, ingressAddr(s), port)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "haproxy.cfg")
	require.NoError(t, os.WriteFile(file, []byte(conf.String()), 0o600))
	p, err := proc.Start(proc.Spec{Name: "haproxy", Path: path, Args: []string{"-db", "-f", file}, Dir: dir})
	require.NoError(t, err)
	t.Cleanup(p.Kill)
	allReady = func() {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		require.NoError(t, proc.AwaitHTTP(ctx, p, "http://"+monitor+"/"))
	}
	allReady()
	return addr, allReady
}

// keptAlive is a client that keeps its connection, and opens another only where
// every client may: after "Connection: close", and when the connection was
// closed before anything was sent on it.
type keptAlive struct {
	addr  string
	nc    net.Conn
	br    *bufio.Reader
	dials int
}

// keeping is a client of a connection that there is already.
func keeping(addr string, nc net.Conn) *keptAlive {
	return &keptAlive{addr: addr, nc: nc, br: bufio.NewReader(nc), dials: 1}
}

// post sends a request and reads the whole answer.
func (c *keptAlive) post(ctx context.Context, target, body string) (a edge.Answer, err error) {
	if c.nc != nil && hasEnded(c.nc) {
		c.close()
	}
	if c.nc == nil {
		if c.nc, err = (&net.Dialer{}).DialContext(ctx, "tcp", c.addr); err != nil {
			return a, fmt.Errorf("connect: %w", err)
		}
		c.br = bufio.NewReader(c.nc)
		c.dials++
	}
	if err := c.nc.SetDeadline(time.Now().Add(patience)); err != nil {
		return a, fmt.Errorf("set a deadline: %w", err)
	}
	if _, err := fmt.Fprintf(c.nc, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", target, c.addr, len(body), body); err != nil {
		return a, fmt.Errorf("send: %w", err)
	}
	if a, err = edge.ReadAnswer(c.br, "POST"); err != nil {
		return a, fmt.Errorf("no answer on a connection to %s: %w", c.nc.LocalAddr(), err)
	}
	if a.Fields.Has("Connection", "close") {
		c.close()
	}
	return a, nil
}

func (c *keptAlive) close() {
	if c.nc != nil {
		_ = c.nc.Close()
		c.nc = nil
	}
}

// hasEnded reports whether the other side has closed the connection.
func hasEnded(nc net.Conn) bool {
	raw, err := nc.(*net.TCPConn).SyscallConn()
	if err != nil {
		return true
	}
	ended := false
	err = raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, rerr := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		ended = !errors.Is(rerr, syscall.EAGAIN)
		return true
	})
	return err != nil || ended
}

// id is the only X-Request-UUID of an answer.
func id(t *testing.T, a edge.Answer) string {
	t.Helper()
	ids := a.Fields.Values("X-Request-UUID")
	require.Len(t, ids, 1, "%q", a.Raw)
	return ids[0]
}

// TestRollingRestart restarts each of two ingresses twice, one at a time, behind a
// TCP balancer, while clients send on connections that they keep. Every request is
// answered, by the API's one answer, and captured.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	const clients, restarts = 8, 4
	api, err := edge.Listen()
	require.NoError(t, err)
	t.Cleanup(api.Close)
	ingresses := startServices(t, api.URL(), 1, map[string]string{"DRAIN_DELAY": "1s"})
	addr, allReady := startBalancer(t, ingresses)

	ctx, cancel := context.WithCancel(t.Context())
	var sending sync.WaitGroup
	t.Cleanup(sending.Wait)
	t.Cleanup(cancel)
	var answered atomic.Int64
	type result struct {
		ids   []string
		dials int
		err   error
	}
	results := make([]result, clients)
	for i := range clients {
		sending.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			c := &keptAlive{addr: addr}
			defer c.close()
			r := &results[i]
			for n := 0; ctx.Err() == nil; n++ {
				// The context is for the pause alone: what was sent must be answered.
				a, err := c.post(context.WithoutCancel(ctx), "/", fmt.Sprintf("client %d, request %d", i, n))
				if ids := a.Fields.Values("X-Request-UUID"); err == nil && (a.Status != 200 || len(ids) != 1) {
					err = fmt.Errorf("answered %s %s", a.Start, a.Body)
				} else if err == nil {
					r.ids = append(r.ids, ids[0])
				}
				if err != nil {
					r.err = fmt.Errorf("client %d, request %d: %w", i, n, err)
					return
				}
				answered.Add(1)
				if rng.IntN(20) == 0 {
					c.close() // so that clients spread over all ingresses again
				}
				think := time.NewTimer(time.Duration(rng.IntN(20)) * time.Millisecond)
				select {
				case <-think.C:
				case <-ctx.Done():
				}
				think.Stop()
				r.dials = c.dials
			}
		})
	}
	for n := range restarts {
		s := ingresses[n%len(ingresses)]
		before, at := answered.Load(), n
		require.Eventually(t, func() bool { return answered.Load() > before+10*clients }, patience, 10*time.Millisecond, "restart %d: clients go on", at)
		published, err := s.Metric(t.Context(), harness.Ingress, "holdfast_published_total")
		require.NoError(t, err)
		require.Positive(t, published, "restart %d: the balancer gives work to this ingress", n)
		require.NoError(t, s.Stop(harness.Ingress)) // it has ended with exit code 0
		require.NoError(t, s.Start(t.Context(), harness.Ingress))
		allReady()
	}
	cancel()
	sending.Wait()

	ids := map[string]bool{}
	dials := 0
	for _, r := range results {
		require.NoError(t, r.err)
		dials += r.dials
		for _, id := range r.ids {
			require.False(t, ids[id], "%s twice", id)
			ids[id] = true
		}
	}
	require.Less(t, dials, len(ids)/5, "connections are kept")
	whole, broken := api.Take()
	require.Empty(t, broken)
	for _, a := range whole {
		uuids := a.Fields.Values("X-Request-UUID")
		require.Len(t, uuids, 1)
		require.True(t, ids[uuids[0]], "%s reached the API, and nobody was told", uuids[0])
	}
	require.Len(t, whole, len(ids), "each reached the API once")
	require.Eventually(t, func() bool {
		all, err := ingresses[0].Requests(t.Context(), "state=processed")
		return err == nil && len(all) >= len(ids)
	}, patience, 50*time.Millisecond)
	all, err := ingresses[0].Requests(t.Context(), "")
	require.NoError(t, err)
	require.Len(t, all, len(ids))
	for _, r := range all {
		require.True(t, ids[r.ID])
		require.Equal(t, "processed", r.State)
		require.Equal(t, 1, r.Attempts)
	}
	t.Logf("%d requests over %d connections", len(ids), dials)
}

// gate is an API that holds back its answers to /held until it is opened.
type gate struct {
	arrived chan string
	open    chan struct{}
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	if r.URL.Path == "/held" {
		g.arrived <- string(body)
		<-g.open
	}
	_, _ = w.Write(body)
}

// TestDrain looks at one stop from all sides. While the ingress drains it is not
// ready, takes connections, and closes them after their answers. What is under way
// then is answered, however long it takes, and what was captured is recorded
// before the process ends.
func TestDrain(t *testing.T) {
	t.Parallel()
	api := &gate{arrived: make(chan string, 10), open: make(chan struct{})}
	opened := sync.OnceFunc(func() { close(api.open) })
	url := startAPI(t, api)
	t.Cleanup(opened)
	s := startServices(t, url, 0, map[string]string{"DRAIN_DELAY": "2s"})[0]
	addr := ingressAddr(s)
	ids := map[string]bool{}
	connect := func() *keptAlive {
		c := &keptAlive{addr: addr}
		t.Cleanup(c.close)
		a, err := c.post(t.Context(), "/", "first")
		require.NoError(t, err)
		require.Equal(t, 200, a.Status)
		require.Empty(t, a.Fields.Values("Connection"))
		ids[id(t, a)] = true
		return c
	}
	idle, busy, uploading, beginning := connect(), connect(), connect(), connect()
	const size = 40
	send := func(c *keptAlive, text string) {
		require.NoError(t, c.nc.SetDeadline(time.Now().Add(patience)))
		_, err := io.WriteString(c.nc, text)
		require.NoError(t, err)
	}
	body := strings.Repeat("b", size)
	head := fmt.Sprintf("POST /held HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n", addr, size)
	held := connect()
	send(held, head+body)
	require.Equal(t, body, receive(t, api.arrived))
	send(uploading, head+body[:size/2])
	send(beginning, head[:20])

	p := s.Process(harness.Ingress)
	require.NoError(t, p.Signal(syscall.SIGTERM))
	require.Eventually(t, func() bool {
		resp, err := http.Get(s.OpsURL(harness.Ingress) + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusServiceUnavailable
	}, patience, 5*time.Millisecond)
	for name, c := range map[string]*keptAlive{"kept": busy, "new": {addr: addr}} {
		a, err := c.post(t.Context(), "/", "while it drains")
		require.NoError(t, err, name)
		require.Equal(t, 200, a.Status, name)
		require.Equal(t, []string{"close"}, a.Fields.Values("Connection"), name)
		require.Equal(t, "while it drains", string(a.Body), name)
		ids[id(t, a)] = true
	}
	require.True(t, p.Running())

	// The idle connection is ended in the orderly way, and the listener is gone.
	require.NoError(t, idle.nc.SetDeadline(time.Now().Add(patience)))
	n, err := idle.nc.Read(make([]byte, 1))
	require.Zero(t, n)
	require.ErrorIs(t, err, io.EOF)
	require.Eventually(t, func() bool {
		nc, err := net.Dial("tcp", addr)
		if err == nil {
			_ = nc.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}, patience, 5*time.Millisecond)

	// What had begun before goes on to its end.
	send(uploading, body[size/2:])
	require.Equal(t, body, receive(t, api.arrived))
	send(beginning, head[20:]+body)
	require.Equal(t, body, receive(t, api.arrived))
	require.True(t, p.Running(), "it waits for what is under way")
	opened()
	for name, c := range map[string]*keptAlive{"held": held, "uploading": uploading, "beginning": beginning} {
		a, err := edge.ReadAnswer(c.br, "POST")
		require.NoError(t, err, name)
		require.Equal(t, 200, a.Status, name)
		require.Equal(t, body, string(a.Body), name)
		require.Equal(t, []string{"synced"}, a.Fields.Values("X-Request-Stored"), name)
		require.Equal(t, []string{"close"}, a.Fields.Values("Connection"), name)
		ids[id(t, a)] = true
		_, err = c.br.ReadByte()
		require.ErrorIs(t, err, io.EOF, name)
	}
	receive(t, p.Ended())
	require.Zero(t, p.ExitCode(), p.Tail(2<<10))

	// The spool is empty: all of it can be recorded, with nobody to say it again.
	require.Eventually(t, func() bool {
		all, err := s.Requests(t.Context(), "state=processed")
		if err != nil || len(all) != len(ids) {
			return false
		}
		for _, r := range all {
			if !ids[r.ID] {
				return false
			}
		}
		return true
	}, patience, 10*time.Millisecond)
}

// TestDrainHTTP2 stops while a request over HTTP/2 is under way. It is answered.
func TestDrainHTTP2(t *testing.T) {
	t.Parallel()
	api := &gate{arrived: make(chan string, 1), open: make(chan struct{})}
	opened := sync.OnceFunc(func() { close(api.open) })
	url := startAPI(t, api)
	t.Cleanup(opened)
	p := newPKI(t)
	s := startTLS(t, p, url, "DRAIN_DELAY=100ms")
	_, http2 := p.ways(ingressAddr(s))
	type answered struct {
		status int
		body   string
		err    error
	}
	answers := make(chan answered, 1)
	request := http2.request(t.Context(), t, "POST", "/held", strings.NewReader("body"))
	go func() {
		resp, err := http2.client.Do(request)
		if err != nil {
			answers <- answered{err: err}
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		answers <- answered{resp.StatusCode, string(body), err}
	}()
	require.Equal(t, "body", receive(t, api.arrived))
	process := s.Process(harness.Ingress)
	require.NoError(t, process.Signal(syscall.SIGTERM))
	require.Eventually(t, func() bool {
		nc, err := net.Dial("tcp", ingressAddr(s))
		if err == nil {
			_ = nc.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}, patience, 5*time.Millisecond)
	require.True(t, process.Running(), "it waits for what is under way")
	opened()
	require.Equal(t, answered{200, "body", nil}, receive(t, answers))
	receive(t, process.Ended())
	require.Zero(t, process.ExitCode(), process.Tail(2<<10))
}
