package edge

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	// patience is what something may take that must happen.
	patience = 10 * time.Second
	// soon is a limit that a test waits for.
	soon = 50 * time.Millisecond
)

// funcs is a Handler.
type funcs struct {
	serve  func(x *Exchange)
	refuse func(x *Exchange, err *wire.SyntaxError)
}

func (f *funcs) Serve(x *Exchange) { f.serve(x) }

func (f *funcs) Refuse(x *Exchange, err *wire.SyntaxError) {
	if f.refuse != nil {
		f.refuse(x, err)
		return
	}
	reply(x, err.Status, err.Reason)
}

// reply answers with a body.
func reply(x *Exchange, status int, body string) {
	x.Head(status, http.StatusText(status), x.Answer, int64(len(body)))
	_ = x.Write([]byte(body))
	_ = x.End(nil)
}

// echo answers with the target and the body, or with what is wrong with that.
func echo(x *Exchange) {
	body, err := io.ReadAll(x)
	switch {
	case errors.Is(err, net.ErrClosed), errors.Is(err, io.ErrUnexpectedEOF):
		x.Abort()
	case err != nil:
		reply(x, 408, err.Error())
	default:
		reply(x, 200, x.Request.Target+" "+string(body))
	}
}

// server is a Server that runs.
type server struct {
	*Server
	t    *testing.T
	logs *logs
	reg  *prometheus.Registry
	ran  chan error
}

// logs keeps what is logged.
type logs struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logs) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// prepare makes a server that does not run yet.
func prepare(t *testing.T, serve func(x *Exchange), change ...func(o *Options)) *server {
	t.Helper()
	s := &server{t: t, logs: &logs{}, reg: prometheus.NewRegistry(), ran: make(chan error, 1)}
	o := Options{
		Addr: "127.0.0.1:0", Handler: &funcs{serve: serve},
		HeadTimeout: patience, BodyTimeout: patience, WriteTimeout: patience, IdleTimeout: patience,
		HeadBytes: 8 << 10, HeadFields: 32, Conns: 1000,
		Logger: slog.New(slog.NewTextHandler(s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})), Registry: s.reg,
	}
	for _, f := range change {
		f(&o)
	}
	var err error
	s.Server, err = New(o)
	require.NoError(t, err)
	s.times.lastCall, s.times.linger, s.times.lingerPause = soon, patience, patience
	return s
}

// run runs the server until the test ends.
func (s *server) run() *server {
	go func() { s.ran <- s.Run(context.Background()) }()
	s.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			s.t.Error(err)
		}
		select {
		case err := <-s.ran:
			if err != nil {
				s.t.Error(err)
			}
		case <-ctx.Done():
			s.t.Error("Run goes on after Stop")
		}
		if n := s.open(); n != 0 {
			s.t.Errorf("%d connections are left", n)
		}
	})
	return s
}

func start(t *testing.T, serve func(x *Exchange), change ...func(o *Options)) *server {
	t.Helper()
	return prepare(t, serve, change...).run()
}

// metric gives the sum of a metric over its labels.
func (s *server) metric(name string) (sum float64) {
	families, err := s.reg.Gather()
	require.NoError(s.t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
		return sum
	}
	s.t.Fatalf("there is no metric %s", name)
	return 0
}

// client is a connection to the server.
type client struct {
	net.Conn
	t *testing.T
	r *bufio.Reader
}

func (s *server) dial() *client {
	s.t.Helper()
	c, err := net.Dial("tcp", s.Addr().String())
	require.NoError(s.t, err)
	return s.client(c)
}

func (s *server) dialTLS(pair *pair, protocols ...string) *client {
	s.t.Helper()
	c, err := tls.Dial("tcp", s.Addr().String(), &tls.Config{RootCAs: pair.pool, ServerName: "localhost", NextProtos: protocols})
	require.NoError(s.t, err)
	return s.client(c)
}

func (s *server) client(c net.Conn) *client {
	s.t.Cleanup(func() { c.Close() })
	require.NoError(s.t, c.SetDeadline(time.Now().Add(patience)))
	return &client{Conn: c, t: s.t, r: bufio.NewReader(c)}
}

func (c *client) send(text string) {
	c.t.Helper()
	_, err := io.WriteString(c.Conn, text)
	require.NoError(c.t, err)
}

// answer is an answer that was read.
type answer struct {
	*http.Response
	text string
}

func (c *client) receive() answer { return c.receiveTo("GET") }

func (c *client) receiveTo(method string) answer {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	require.NoError(c.t, err)
	body, err := io.ReadAll(resp.Body)
	require.NoError(c.t, err)
	return answer{resp, string(body)}
}

// ends demands that the server closes the connection, and nothing else comes.
func (c *client) ends() {
	c.t.Helper()
	rest, err := io.ReadAll(c.r)
	require.NoError(c.t, err)
	require.Empty(c.t, string(rest))
}

// breaks demands that the connection is reset, and gives what came before it.
func (c *client) breaks() string {
	c.t.Helper()
	rest, err := io.ReadAll(c.r)
	require.Error(c.t, err)
	require.NotErrorIs(c.t, err, context.DeadlineExceeded)
	var timeout net.Error
	require.False(c.t, errors.As(err, &timeout) && timeout.Timeout(), "nothing came, not even an end")
	return string(rest)
}

// silent reports whether the server keeps the connection and says nothing for a
// moment.
func (c *client) silent(moment time.Duration) bool {
	c.t.Helper()
	require.NoError(c.t, c.SetReadDeadline(time.Now().Add(moment)))
	_, err := c.r.Peek(1)
	require.NoError(c.t, c.SetReadDeadline(time.Now().Add(patience)))
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// get is a plain request.
func get(target string, fields ...string) string {
	return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: a\r\n%s\r\n", target, strings.Join(append(fields, ""), "\r\n"))
}

// post is a request with a body that tells its length.
func post(target, body string, fields ...string) string {
	fields = append(fields, fmt.Sprintf("Content-Length: %d", len(body)), "")
	return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: a\r\n%s\r\n%s", target, strings.Join(fields, "\r\n"), body)
}
