package upstream_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/holdfast-io/holdfast/pkg/upstream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

// api is a server made of raw connections. It counts those, and lets a test
// close them.
type api struct {
	t     *testing.T
	addr  string
	l     net.Listener
	all   sync.WaitGroup
	mu    sync.Mutex
	conns []net.Conn

	accepted atomic.Int32
	arrived  atomic.Int32 // requests whose head came whole
}

func newAPI(t *testing.T, addr string, serve func(*api, net.Conn, *bufio.Reader)) *api {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	require.NoError(t, err)
	a := &api{t: t, l: l, addr: l.Addr().String()}
	a.all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.accepted.Add(1)
			a.mu.Lock()
			a.conns = append(a.conns, c)
			a.mu.Unlock()
			a.all.Go(func() {
				defer c.Close()
				serve(a, c, bufio.NewReader(c))
			})
		}
	})
	t.Cleanup(a.stop)
	return a
}

// closeAll closes the connections, as a server does that stops.
func (a *api) closeAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.Close()
	}
}

func (a *api) stop() {
	a.l.Close()
	a.closeAll()
	a.all.Wait()
}

// take reads one request, head and body.
func (a *api) take(br *bufio.Reader) (*http.Request, bool) {
	req, err := http.ReadRequest(br)
	if err != nil {
		return nil, false
	}
	a.arrived.Add(1)
	_, err = io.Copy(io.Discard, req.Body)
	return req, err == nil
}

// always gives the same answer to each request.
func always(text string) func(*api, net.Conn, *bufio.Reader) {
	return func(a *api, c net.Conn, br *bufio.Reader) {
		for {
			if _, ok := a.take(br); !ok {
				return
			}
			if _, err := io.WriteString(c, text); err != nil {
				return
			}
		}
	}
}

const fine = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func pool(t *testing.T, addr string, change ...func(*upstream.Options)) *upstream.Pool {
	t.Helper()
	o := upstream.Options{URL: &url.URL{Scheme: "http", Host: addr}}
	for _, c := range change {
		c(&o)
	}
	p, err := upstream.New(o)
	require.NoError(t, err)
	t.Cleanup(p.Close)
	return p
}

func head(lines ...string) []byte { return []byte(strings.Join(lines, "\r\n") + "\r\n\r\n") }

var get = head("GET / HTTP/1.1", "Host: x")

// send goes through a whole exchange without body.
func send(p *upstream.Pool, deadline time.Duration) (string, error) {
	x, err := p.Begin(time.Now().Add(deadline), "GET", 0, nil, get)
	if err != nil {
		return "", err
	}
	defer x.Close()
	if _, err = x.Answer(nil); err != nil {
		return "", err
	}
	b, err := io.ReadAll(x)
	return string(b), err
}

func mustSend(t *testing.T, p *upstream.Pool) {
	t.Helper()
	body, err := send(p, patience)
	require.NoError(t, err)
	require.Equal(t, "ok", body)
}

func TestReusesAConnection(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always(fine))
	p := pool(t, a.addr)
	for range 5 {
		mustSend(t, p)
	}
	require.EqualValues(t, 1, a.accepted.Load())
	require.EqualValues(t, 1, p.Conns())
	p.Close()
	p.Close()
	require.Zero(t, p.Conns())
	_, err := send(p, patience)
	var failed *upstream.Error
	require.ErrorAs(t, err, &failed)
	require.False(t, failed.Sent)
}

// TestReuseAfterTheDeadline: the deadline of one request is nothing to the next.
func TestReuseAfterTheDeadline(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always(fine))
	p := pool(t, a.addr)
	deadline := time.Now().Add(50 * time.Millisecond)
	x, err := p.Begin(deadline, "GET", 0, nil, get)
	require.NoError(t, err)
	_, err = x.Answer(nil)
	require.NoError(t, err)
	_, err = io.ReadAll(x)
	require.NoError(t, err)
	x.Close()
	<-time.After(time.Until(deadline))
	mustSend(t, p)
	require.EqualValues(t, 1, a.accepted.Load())
}

// TestConnectionDies: a kept-alive connection dies at each stage of its second
// request. Nothing is ever sent twice.
func TestConnectionDies(t *testing.T) {
	parts := map[string]string{
		"after the request":      "",
		"in the head":            "HTTP/1.1 200 OK\r\nContent-Le",
		"in the body":            "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123",
		"in a chunk":             "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123",
		"between chunks":         "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n",
		"before the last CRLF":   "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n0\r\n",
		"in a trailer":           "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n0\r\nA: b\r\n",
		"after an interim one":   "HTTP/1.1 102 Processing\r\n\r\n",
		"with a wrong chunk":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
		"with another protocol":  "HTTP/1.1 101 Switching Protocols\r\nUpgrade: a\r\n\r\n",
		"with no status":         "HTTP/1.1 099 Huh\r\n\r\n",
		"with contradicting CLs": "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
	}
	for name, part := range parts {
		for _, body := range []int{0, 100, 1 << 20} {
			t.Run(name, func(t *testing.T) {
				a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) {
					for {
						if _, ok := a.take(br); !ok {
							return
						}
						if a.arrived.Load() == 2 {
							_, _ = io.WriteString(c, part)
							return
						}
						_, _ = io.WriteString(c, fine)
					}
				})
				p := pool(t, a.addr)
				mustSend(t, p)
				h := head("PUT / HTTP/1.1", "Host: x", "Idempotency-Key: a", "Content-Length: "+strconv.Itoa(body))
				x, err := p.Begin(time.Now().Add(patience), "PUT", 0, make([]byte, body), h)
				if err == nil {
					defer x.Close()
					if _, err = x.Answer(nil); err == nil {
						_, err = io.ReadAll(x)
					}
				}
				var failed *upstream.Error
				require.ErrorAs(t, err, &failed)
				require.True(t, failed.Sent)
				require.False(t, failed.Timeout())
				require.EqualValues(t, 2, a.arrived.Load())
				require.EqualValues(t, 1, a.accepted.Load())
				if x != nil {
					x.Close()
				}
				mustSend(t, p)
				require.EqualValues(t, 2, a.accepted.Load())
			})
		}
	}
}

// TestDiesBeforeTheRequest: connections that died while they were idle cost no
// request at all, however many there are.
func TestDiesBeforeTheRequest(t *testing.T) {
	const n = 8
	var together sync.WaitGroup
	together.Add(n)
	first := true
	serve := func(a *api, c net.Conn, br *bufio.Reader) {
		for {
			if _, ok := a.take(br); !ok {
				return
			}
			if first {
				together.Done()
				together.Wait()
			}
			_, _ = io.WriteString(c, fine)
		}
	}
	a := newAPI(t, "127.0.0.1:0", serve)
	p := pool(t, a.addr)
	var all sync.WaitGroup
	for range n {
		all.Go(func() {
			body, err := send(p, patience)
			if err != nil || body != "ok" {
				t.Errorf("%q %v", body, err)
			}
		})
	}
	all.Wait()
	require.EqualValues(t, n, p.Conns())
	a.stop()
	first = false
	b := newAPI(t, a.addr, serve)
	for range 3 {
		mustSend(t, p)
	}
	require.EqualValues(t, 3, b.arrived.Load())
	require.EqualValues(t, 1, p.Conns(), "the dead went together")
}

// TestUnaskedAnswer: what an API says on an idle connection answers nothing.
func TestUnaskedAnswer(t *testing.T) {
	said := make(chan struct{}, 1)
	a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) {
		if _, ok := a.take(br); ok {
			_, _ = io.WriteString(c, fine)
			if a.accepted.Load() == 1 {
				_, _ = io.WriteString(c, "HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
				said <- struct{}{}
			}
		}
		_, _ = br.ReadByte()
	})
	p := pool(t, a.addr)
	mustSend(t, p)
	<-said
	mustSend(t, p)
	require.EqualValues(t, 2, a.accepted.Load())
}

func TestEarlyAnswer(t *testing.T) {
	const size = 16 << 20
	early := "HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
	release := make(chan struct{})
	var read atomic.Int64
	cases := map[string]func(c net.Conn, br *bufio.Reader){
		"and closes":         func(net.Conn, *bufio.Reader) {},
		"and reads on":       func(_ net.Conn, br *bufio.Reader) { n, _ := io.CopyN(io.Discard, br, size); read.Store(n) },
		"and stops reading":  func(net.Conn, *bufio.Reader) { <-release },
		"and half closes it": func(c net.Conn, _ *bufio.Reader) { _ = c.(*net.TCPConn).CloseWrite(); <-release },
	}
	for name, then := range cases {
		for _, way := range []string{"at once", "in parts"} {
			t.Run(name+" "+way, func(t *testing.T) {
				a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) {
					for {
						line, err := br.ReadString('\n')
						if err != nil {
							return
						}
						if line == "\r\n" {
							break
						}
					}
					a.arrived.Add(1)
					_, _ = io.WriteString(c, early)
					then(c, br)
				})
				p := pool(t, a.addr)
				h := head("POST / HTTP/1.1", "Host: x", "Content-Length: "+strconv.Itoa(size))
				var x *upstream.Exchange
				var err error
				if way == "at once" {
					x, err = p.Begin(time.Now().Add(patience), "POST", 0, make([]byte, size), h)
				} else {
					x, err = p.Begin(time.Now().Add(patience), "POST", size, nil, h)
					for n := 0; n < size && err == nil; n += 1 << 20 {
						_, err = x.Write(make([]byte, 1<<20))
					}
					if err != nil {
						err = x.EarlyAnswer(err)
					}
				}
				require.NoError(t, err)
				resp, err := x.Answer(nil)
				require.NoError(t, err)
				require.Equal(t, 413, resp.Status)
				b, err := io.ReadAll(x)
				require.NoError(t, err)
				require.Equal(t, "big", string(b))
				x.Close()
				if name == "and reads on" {
					require.EqualValues(t, 1, p.Conns(), "the connection is good")
					require.Eventually(t, func() bool { return read.Load() == size }, patience, time.Millisecond)
				} else {
					require.Zero(t, p.Conns(), "half a request went through this connection")
				}
				require.EqualValues(t, 1, a.arrived.Load())
				if strings.HasPrefix(name, "and stops") || strings.HasPrefix(name, "and half") {
					release <- struct{}{}
				}
			})
		}
	}
}

// TestSlowReader: an API that reads slowly and has not answered gets everything.
func TestSlowReader(t *testing.T) {
	const size = 8 << 20
	goOn := make(chan struct{})
	a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) {
		<-goOn
		if _, ok := a.take(br); ok {
			_, _ = io.WriteString(c, fine)
		}
	})
	p := pool(t, a.addr)
	time.AfterFunc(1200*time.Millisecond, func() { close(goOn) }) // longer than a write may stand still unasked
	x, err := p.Begin(time.Now().Add(patience), "POST", 0, make([]byte, size), head("POST / HTTP/1.1", "Host: x", "Content-Length: "+strconv.Itoa(size)))
	require.NoError(t, err)
	defer x.Close()
	_, err = x.Answer(nil)
	require.NoError(t, err)
}

func TestFraming(t *testing.T) {
	cases := map[string]struct {
		method, answer, body string
		keep                 bool
	}{
		"length":          {"GET", fine, "ok", true},
		"empty":           {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "", true},
		"chunked":         {"GET", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n2\r\nok\r\n0\r\nA: b\r\n\r\n", "ok", true},
		"HEAD":            {"HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", "", true},
		"204":             {"GET", "HTTP/1.1 204 No Content\r\n\r\n", "", true},
		"304":             {"GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "", true},
		"close":           {"GET", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", "ok", false},
		"HTTP/1.0":        {"GET", "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", "ok", false},
		"more than asked": {"GET", fine + "HTTP/1.1 200 OK\r\n", "ok", false},
		"interim": {"GET", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" +
			fine, "ok", true},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			a := newAPI(t, "127.0.0.1:0", always(c.answer))
			p := pool(t, a.addr)
			x, err := p.Begin(time.Now().Add(patience), c.method, 0, nil, head(c.method+" / HTTP/1.1", "Host: x"))
			require.NoError(t, err)
			var interim []int
			_, err = x.Answer(func(r *wire.Response) { interim = append(interim, r.Status) })
			require.NoError(t, err)
			b, err := io.ReadAll(x)
			require.NoError(t, err)
			require.Equal(t, c.body, string(b))
			if name == "chunked" {
				require.Equal(t, "b", x.Trailer().Get("A"))
			}
			if name == "interim" {
				require.Equal(t, []int{100, 103}, interim)
			}
			x.Close()
			x.Close()
			want := int64(0)
			if c.keep {
				want = 1
			}
			require.Equal(t, want, p.Conns())
		})
	}
	t.Run("until close", func(t *testing.T) {
		a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) {
			a.take(br)
			_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nok")
		})
		p := pool(t, a.addr)
		mustSend(t, p)
		require.Zero(t, p.Conns())
	})
	t.Run("closed before it was read", func(t *testing.T) {
		a := newAPI(t, "127.0.0.1:0", always(fine))
		p := pool(t, a.addr)
		x, err := p.Begin(time.Now().Add(patience), "GET", 0, nil, get)
		require.NoError(t, err)
		_, err = x.Answer(nil)
		require.NoError(t, err)
		x.Close()
		require.Zero(t, p.Conns())
	})
}

func TestHeadLimit(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nA: "+strings.Repeat("a", 100<<10)+"\r\n\r\nok"))
	_, err := send(pool(t, a.addr, func(o *upstream.Options) { o.MaxHeaderBytes = 64 << 10 }), patience)
	var failed *upstream.Error
	require.ErrorAs(t, err, &failed)
	require.ErrorContains(t, err, "too large")
	mustSend(t, pool(t, a.addr))
}

func TestDeadlines(t *testing.T) {
	block := make(chan struct{})
	a := newAPI(t, "127.0.0.1:0", func(a *api, c net.Conn, br *bufio.Reader) { <-block })
	defer close(block)
	p := pool(t, a.addr)
	timeout := func(err error, sent bool) {
		t.Helper()
		var failed *upstream.Error
		require.ErrorAs(t, err, &failed)
		require.True(t, failed.Timeout(), "%v", err)
		require.Equal(t, sent, failed.Sent)
	}
	// Long enough to connect and send on a machine that is busy.
	const sent = time.Second
	_, err := send(p, sent)
	timeout(err, true)
	_, err = p.Begin(time.Now().Add(sent), "POST", 0, make([]byte, 32<<20), get)
	timeout(err, true)
	_, err = p.Begin(time.Now().Add(-time.Second), "GET", 0, nil, get)
	timeout(err, false)
	require.Zero(t, p.Conns())

	// A TLS handshake that nobody answers is a connect that takes too long.
	s := pool(t, a.addr, func(o *upstream.Options) {
		o.URL.Scheme, o.DialTimeout = "https", 20*time.Millisecond
	})
	_, err = send(s, patience)
	timeout(err, false)
}

func TestMaxConns(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always(fine))
	p := pool(t, a.addr, func(o *upstream.Options) { o.MaxConns = 1 })
	x, err := p.Begin(time.Now().Add(patience), "GET", 0, nil, get)
	require.NoError(t, err)
	_, err = send(p, 20*time.Millisecond)
	var failed *upstream.Error
	require.ErrorAs(t, err, &failed)
	require.True(t, failed.Timeout())
	require.False(t, failed.Sent)

	// One that waits gets the connection as soon as it is free.
	got := make(chan error, 1)
	go func() {
		_, err := send(p, patience)
		got <- err
	}()
	_, err = x.Answer(nil)
	require.NoError(t, err)
	_, err = io.ReadAll(x)
	require.NoError(t, err)
	x.Close()
	require.NoError(t, <-got)
	require.EqualValues(t, 1, a.accepted.Load())
}

func TestManyAtOnce(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always(fine))
	p := pool(t, a.addr, func(o *upstream.Options) { o.MaxConns = 4 })
	var all sync.WaitGroup
	var failures atomic.Int32
	for range 16 {
		all.Go(func() {
			for range 50 {
				if body, err := send(p, patience); err != nil || body != "ok" {
					failures.Add(1)
				}
			}
		})
	}
	all.Wait()
	require.Zero(t, failures.Load())
	require.EqualValues(t, 800, a.arrived.Load())
	require.LessOrEqual(t, p.Conns(), int64(4))
	require.LessOrEqual(t, a.accepted.Load(), int32(4))
}

func TestRefused(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l.Close()
	_, err = send(pool(t, l.Addr().String()), patience)
	var failed *upstream.Error
	require.ErrorAs(t, err, &failed)
	require.Equal(t, "connect", failed.Op)
	require.False(t, failed.Sent)
	require.False(t, failed.Timeout())
}

// TestExactBytes: what is sent is what was given, byte by byte.
func TestExactBytes(t *testing.T) {
	got := make(chan []byte, 1)
	for _, size := range []int{0, 5, 16 << 10, 16<<10 + 1} {
		body := bytes.Repeat([]byte("b"), size)
		for _, target := range []string{"/", "//a/%2F?", "/?", "*", "/\xff\xfe?a=\xe4#x"} {
			h := head("GET "+target+" HTTP/1.1", "Host: x", "content-LENGTH: "+strconv.Itoa(size), "X-Odd: \xff\xe4 ", "x-odd:")
			a := newAPI(t, "127.0.0.1:0", func(_ *api, c net.Conn, br *bufio.Reader) {
				b := make([]byte, len(h)+size)
				_, _ = io.ReadFull(br, b)
				got <- b
				_, _ = io.WriteString(c, fine)
			})
			x, err := pool(t, a.addr).Begin(time.Now().Add(patience), "GET", 0, body, h[:7], h[7:])
			require.NoError(t, err)
			_, err = x.Answer(nil)
			require.NoError(t, err)
			x.Close()
			require.Equal(t, append(h, body...), <-got)
			a.stop()
		}
	}
}

func TestTLS(t *testing.T) {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "ok")
	}))
	s.Config.ErrorLog = nil
	defer s.Close()
	https := func(o *upstream.Options) { o.URL.Scheme = "https" }
	_, err := send(pool(t, s.Listener.Addr().String(), https), patience)
	var failed *upstream.Error
	require.ErrorAs(t, err, &failed)
	require.False(t, failed.Sent)
	var cert *tls.CertificateVerificationError
	require.True(t, errors.As(err, &cert), "%v", err)

	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	p := pool(t, s.Listener.Addr().String(), https, func(o *upstream.Options) { o.TLS = &tls.Config{RootCAs: roots} })
	for range 3 {
		mustSend(t, p)
	}
	require.EqualValues(t, 1, p.Conns())
	s.CloseClientConnections()
	mustSend(t, p)
	const size = 1 << 20
	x, err := p.Begin(time.Now().Add(patience), "POST", 0, make([]byte, size), head("POST / HTTP/1.1", "Host: x", "Content-Length: "+strconv.Itoa(size)))
	require.NoError(t, err)
	defer x.Close()
	_, err = x.Answer(nil)
	require.NoError(t, err)
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	a := newAPI(t, "127.0.0.1:0", always(fine))
	p := pool(t, a.addr, func(o *upstream.Options) { o.IdleTimeout = 5 * time.Millisecond })
	mustSend(t, p)
	require.Eventually(t, func() bool { return p.Conns() == 0 }, patience, time.Millisecond)
	mustSend(t, p)
}

func TestNewRefuses(t *testing.T) {
	for _, u := range []*url.URL{nil, {}, {Scheme: "http"}, {Scheme: "ftp", Host: "x"}} {
		_, err := upstream.New(upstream.Options{URL: u})
		require.Error(t, err)
	}
}
