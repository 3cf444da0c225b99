package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// stopping calls Stop, and gives its end.
func (s *server) stopping(ctx context.Context) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- s.Stop(ctx) }()
	return ended
}

// within takes what must come.
func within[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

// slow answers when it is told to; "/fast" at once.
func slow() (serve func(x *Exchange), begun, proceed chan struct{}) {
	begun, proceed = make(chan struct{}, 10), make(chan struct{})
	return func(x *Exchange) {
		if x.Request.Target != "/fast" {
			begun <- struct{}{}
			<-proceed
		}
		reply(x, 200, x.Request.Target)
	}, begun, proceed
}

func TestStopClosesIdleConnectionsAndWaitsForRequests(t *testing.T) {
	serve, begun, proceed := slow()
	s := start(t, serve)
	fresh, kept, busy := s.dial(), s.dial(), s.dial()
	kept.send(get("/fast"))
	kept.receive()
	busy.send(get("/busy"))
	<-begun
	require.Eventually(t, func() bool { return s.open() == 3 }, patience, time.Millisecond)

	stopped := s.stopping(context.Background())
	fresh.ends()
	kept.ends()
	require.Empty(t, stopped)
	proceed <- struct{}{}
	a := busy.receive()
	require.Equal(t, "/busy", a.text)
	require.True(t, a.Close)
	busy.ends()
	require.NoError(t, within(t, stopped))
	_, err := net.Dial("tcp", s.Addr().String())
	require.Error(t, err)
	require.NoError(t, s.Stop(context.Background()), "a second time")
}

func TestStopServesOnForDrainDelay(t *testing.T) {
	serve, begun, proceed := slow()
	s := start(t, serve, func(o *Options) { o.DrainDelay = patience })
	kept, busy := s.dial(), s.dial()
	kept.send(get("/fast"))
	kept.receive()
	busy.send(get("/busy"))
	<-begun
	ctx, cancel := context.WithCancel(context.Background())
	stopped := s.stopping(ctx)
	require.Eventually(t, s.draining.Load, patience, time.Millisecond)

	for _, c := range []*client{kept, s.dial()} { // those that are here, and those that come
		c.send(get("/fast"))
		a := c.receive()
		require.Equal(t, "/fast", a.text)
		require.True(t, a.Close)
		c.ends()
	}
	proceed <- struct{}{}
	require.True(t, busy.receive().Close)
	cancel() // the delay is over
	<-stopped
}

// Who has sent its request before the connections are closed is answered.
func TestStopAnswersWhatHasComeAlready(t *testing.T) {
	serve, begun, proceed := slow()
	s := start(t, serve)
	c := s.dial()
	c.send(get("/first"))
	<-begun
	// The answer's head promises that the connection is kept, and the next
	// request is here.
	c.send(get("/fast"))
	s.closing.Store(true)
	proceed <- struct{}{}
	require.Equal(t, "/first", c.receive().text)
	require.Equal(t, "/fast", c.receive().text)
}

func TestStopCutsWhatIsLeftWhenItsTimeIsOver(t *testing.T) {
	begun := make(chan struct{}, 2)
	s := start(t, func(x *Exchange) {
		begun <- struct{}{}
		if _, err := io.ReadAll(x); err == nil {
			t.Error("it was not whole")
		}
		x.Abort()
	})
	c := s.dial()
	c.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
	<-begun
	ctx, cancel := context.WithCancel(context.Background())
	stopped := s.stopping(ctx)
	cancel()
	require.ErrorIs(t, within(t, stopped), context.Canceled)
	rest, _ := io.ReadAll(c.r)
	require.Empty(t, rest)
}

func TestRunClosesEverythingWhenItsContextEnds(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	for name, change := range map[string]func(o *Options){"plain": func(*Options) {}, "TLS": withTLS(t, p)} {
		t.Run(name, func(t *testing.T) {
			s := prepare(t, echo, change)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			ran := make(chan error, 1)
			go func() { ran <- s.Run(ctx) }()
			c := s.dial()
			if name == "TLS" {
				c = s.dialTLS(p, "http/1.1")
			}
			c.send(get("/"))
			require.Equal(t, 200, c.receive().StatusCode)
			cancel()
			require.NoError(t, within(t, ran))
			require.Zero(t, s.open())
			_, _ = io.ReadAll(c.r)
			require.NoError(t, s.Stop(context.Background()))
		})
	}
}

func TestStopBeforeRun(t *testing.T) {
	s := prepare(t, echo, func(o *Options) { o.DrainDelay = time.Hour })
	require.NoError(t, within(t, s.stopping(context.Background())), "there is nobody to wait for")
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	require.NoError(t, within(t, ran))
	_, err := net.Dial("tcp", s.Addr().String())
	require.Error(t, err)
}

// Stop and Run at once, with a client between them: whatever comes first, both end.
func TestStopAtAnyTime(t *testing.T) {
	for range 50 {
		s := prepare(t, echo)
		s.times.lastCall = 0
		ran := make(chan error, 1)
		c := s.dial()
		c.send(get("/"))
		go func() { ran <- s.Run(context.Background()) }()
		stopped := s.stopping(context.Background())
		require.NoError(t, within(t, stopped))
		require.NoError(t, within(t, ran))
		require.Zero(t, s.open())
		_ = c.Close()
	}
}

func TestStopOverHTTP2(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	serve, begun, proceed := slow()
	s := start(t, serve, withTLS(t, p))
	client := http2Client(t, p)
	base := "https://" + s.Addr().String()
	idle := http2Client(t, p)
	resp, err := idle.Get(base + "/fast")
	require.NoError(t, err)
	resp.Body.Close()
	got := make(chan error, 1)
	go func() {
		resp, err := client.Get(base + "/busy")
		if err == nil {
			resp.Body.Close()
			if resp.ProtoMajor != 2 {
				err = errors.New(resp.Proto)
			}
		}
		got <- err
	}()
	<-begun
	stopped := s.stopping(context.Background())
	require.Eventually(t, s.closing.Load, patience, time.Millisecond)
	require.Empty(t, stopped)
	proceed <- struct{}{}
	require.NoError(t, within(t, got))
	require.NoError(t, within(t, stopped))
}

// net/http does not wait for its handlers, but whoever stops the server closes
// what they use.
func TestStopWaitsForHandlersOfHTTP2(t *testing.T) {
	p := newPair(t, t.TempDir(), 1)
	begun, proceed := make(chan struct{}), make(chan struct{})
	s := start(t, func(x *Exchange) { close(begun); <-proceed; reply(x, 200, "") }, withTLS(t, p))
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+s.Addr().String(), nil)
	require.NoError(t, err)
	client := http2Client(t, p)
	got := make(chan error, 1)
	go func() { _, err := client.Do(req); got <- err }()
	<-begun
	over, end := context.WithCancel(context.Background())
	stopped := s.stopping(over)
	end()
	cancel()
	require.Error(t, within(t, got))
	client.CloseIdleConnections()
	select {
	case <-stopped:
		t.Error("a handler is at work")
	case <-time.After(soon):
	}
	close(proceed)
	require.ErrorIs(t, within(t, stopped), context.Canceled)
}

// pipe gives both ends of a connection on which half can be closed.
func (s *server) pipe() (server net.Conn, peer *client) {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(s.t, err)
	defer l.Close()
	server, err = net.Dial("tcp", l.Addr().String())
	require.NoError(s.t, err)
	c, err := l.Accept()
	require.NoError(s.t, err)
	return server, s.client(c)
}

// tunnels begins a server whose requests become tunnels to the peer, and one of
// them, over TLS with a pair.
func tunnels(t *testing.T, p *pair, idle, halfOpen time.Duration) (s *server, c, peer *client, ended chan struct{}) {
	t.Helper()
	ended = make(chan struct{})
	var other net.Conn
	change := func(*Options) {}
	if p != nil {
		change = withTLS(t, p)
	}
	s = prepare(t, func(x *Exchange) {
		defer close(ended)
		fields := wire.Fields{}.Add("Connection", "Upgrade").Add("Upgrade", "x")
		if !x.Tunnel("Switching Protocols", fields, other, []byte("first "), idle) {
			t.Error("HTTP/1.1 has tunnels")
		}
	}, change)
	other, peer = s.pipe()
	s.times.halfOpen = halfOpen
	s.run()
	if p != nil {
		c = s.dialTLS(p, "http/1.1")
	} else {
		c = s.dial()
	}
	c.send(get("/", "Connection: Upgrade", "Upgrade: x") + "early ")
	a, err := http.ReadResponse(c.r, nil)
	require.NoError(t, err)
	require.Equal(t, 101, a.StatusCode)
	require.Equal(t, "first ", c.take(6))
	require.Equal(t, "early ", peer.take(6))
	return s, c, peer, ended
}

// take reads n bytes.
func (c *client) take(n int) string {
	c.t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c.r, b)
	require.NoError(c.t, err)
	return string(b)
}

func TestTunnel(t *testing.T) {
	for name, p := range map[string]*pair{"plain": nil, "TLS": newPair(t, t.TempDir(), 1)} {
		t.Run(name, func(t *testing.T) {
			_, c, peer, ended := tunnels(t, p, patience, patience)
			large := strings.Repeat("x", 1<<20)
			for range 2 {
				sent := make(chan error, 2)
				go func() { _, err := io.WriteString(c, large); sent <- err }()
				go func() { _, err := io.WriteString(peer, large); sent <- err }()
				require.Equal(t, large, peer.take(len(large)))
				require.Equal(t, large, c.take(len(large)))
				require.NoError(t, <-sent)
				require.NoError(t, <-sent)
			}
			// One side ends, and the other still speaks.
			require.NoError(t, c.Conn.(interface{ CloseWrite() error }).CloseWrite())
			peer.ends()
			peer.send("last word")
			require.Equal(t, "last word", c.take(9))
			require.NoError(t, peer.Close())
			c.ends()
			within(t, ended)
		})
	}
}

func TestTunnelEndsWithEitherSide(t *testing.T) {
	t.Run("reset by the peer", func(t *testing.T) {
		_, c, peer, ended := tunnels(t, nil, patience, patience)
		require.NoError(t, peer.Conn.(*net.TCPConn).SetLinger(0))
		require.NoError(t, peer.Close())
		_, _ = io.ReadAll(c.r)
		within(t, ended)
	})
	t.Run("reset by the client", func(t *testing.T) {
		_, c, peer, ended := tunnels(t, nil, patience, patience)
		require.NoError(t, c.Conn.(*net.TCPConn).SetLinger(0))
		require.NoError(t, c.Close())
		_, _ = io.ReadAll(peer.r)
		within(t, ended)
	})
	t.Run("silence", func(t *testing.T) {
		_, c, peer, ended := tunnels(t, nil, soon, patience)
		c.ends()
		peer.ends()
		within(t, ended)
	})
	t.Run("a half that is silent", func(t *testing.T) {
		_, c, peer, ended := tunnels(t, nil, time.Hour, soon)
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		peer.ends()
		c.ends()
		within(t, ended)
	})
}

func TestStopEndsTunnels(t *testing.T) {
	for name, p := range map[string]*pair{"plain": nil, "TLS": newPair(t, t.TempDir(), 1)} {
		t.Run(name, func(t *testing.T) {
			s, c, peer, ended := tunnels(t, p, patience, patience)
			if tc, ok := c.Conn.(*tls.Conn); ok {
				require.True(t, tc.ConnectionState().HandshakeComplete)
			}
			require.NoError(t, within(t, s.stopping(context.Background())))
			_, _ = io.ReadAll(c.r)
			_, _ = io.ReadAll(peer.r)
			within(t, ended)
		})
	}
}
