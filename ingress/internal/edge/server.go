package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Options configure a Server. All are required but TLS, ConnsPerClient, Exempt
// and DrainDelay.
type Options struct {
	Addr    string
	TLS     *tls.Config // for HTTPS, with HTTP/2 where it is negotiated
	Handler Handler

	HeadTimeout  time.Duration // from the first byte of a head to its last one
	BodyTimeout  time.Duration // of a pause in a body; and 1 KiB/s are asked of it beyond that time
	WriteTimeout time.Duration // of each part of an answer
	IdleTimeout  time.Duration // between two requests
	HeadBytes    int           // 431 above
	HeadFields   int           // 431 above

	Conns          int                   // 503 above
	ConnsPerClient int                   // 503 above; 0: no limit
	Exempt         func(netip.Addr) bool // clients that ConnsPerClient does not hold for; nil: none

	DrainDelay time.Duration // how long a stop goes on to take connections

	Logger   *slog.Logger
	Registry prometheus.Registerer
}

// Server serves clients. Run may be called once, Stop often, also before Run.
type Server struct {
	o        Options
	times    times
	listener *net.TCPListener
	h2       *http.Server
	h2conns  *h2Listener
	clock    clock
	m        *metrics
	sessions sync.Pool // *session
	buffers  sync.Pool // *buffer

	draining  atomic.Bool // answers close their connections
	closing   atomic.Bool // connections that are idle are closed
	stop      chan struct{}
	once      sync.Once
	headBytes atomic.Int64  // of large heads, at most maxHeadBytes
	refusing  chan struct{} // a token for each refusal under way

	mu      sync.Mutex
	conns   map[*conn]struct{}
	clients map[netip.Addr]int
	running bool // Run was called before Stop
	stopped bool // Stop was called
	cut     bool // closeAll was called: who comes now is not taken

	// all counts the connections, the refusals, and Run while it accepts, so that
	// nothing is added to it once it has come down to nothing.
	all sync.WaitGroup
}

// times are bounds that no setting changes.
type times struct {
	// A lingering close takes so long in all, and waits so long for a byte.
	linger, lingerPause time.Duration
	// lastCall is how long requests may take to arrive that were on their way when
	// their connections were about to be closed.
	lastCall time.Duration
	// halfOpen is how long a tunnel may be silent of which one side has ended.
	halfOpen time.Duration
}

func defaultTimes() times {
	return times{linger: 5 * time.Second, lingerPause: time.Second, lastCall: 250 * time.Millisecond, halfOpen: time.Minute}
}

// New binds the address. Connections wait in the kernel until Run.
func New(o Options) (*Server, error) {
	l, err := net.Listen("tcp", o.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	s := &Server{
		o: o, times: defaultTimes(), listener: l.(*net.TCPListener), stop: make(chan struct{}), refusing: make(chan struct{}, maxRefusing),
		conns: make(map[*conn]struct{}), clients: make(map[netip.Addr]int),
	}
	s.m = newMetrics(o.Registry, s)
	s.h2, s.h2conns = s.newHTTP2()
	return s, nil
}

// Addr is the bound address.
func (s *Server) Addr() net.Addr { return s.listener.Addr() }

// Run serves until Stop, or closes everything at once when ctx is done.
func (s *Server) Run(ctx context.Context) error {
	if !s.begin() {
		return nil
	}
	defer context.AfterFunc(ctx, s.closeAll)()
	var h2 sync.WaitGroup
	h2.Go(func() { _ = s.h2.Serve(s.h2conns) }) // it ends by Stop, or by closeAll
	defer h2.Wait()
	defer s.all.Wait()
	defer s.all.Done()
	s.o.Logger.Info("listening", "listener", "ingress", "addr", s.Addr().String())
	wait := time.Millisecond
	for {
		nc, err := s.listener.AcceptTCP()
		switch {
		case err == nil:
			wait = time.Millisecond
			s.take(nc)
		case s.closing.Load() || ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		default:
			// No file descriptors, most likely: those in use come back.
			s.o.Logger.Error("accepting a connection failed", "err", err)
			wait = min(2*wait, time.Second)
			select {
			case <-time.After(wait):
			case <-s.stop:
			}
		}
	}
}

// begin counts Run in, unless Stop came before it.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return false
	}
	s.running = true
	s.all.Add(1)
	return true
}

// take serves a new connection, unless there are too many.
func (s *Server) take(nc *net.TCPConn) {
	remote, _ := netip.ParseAddrPort(nc.RemoteAddr().String())
	remote = netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port())
	c := &conn{s: s, nc: nc, tcp: nc, remote: remote}
	switch reason := s.enroll(c); reason {
	case "":
	case cutOff:
		_ = nc.Close()
		return
	default:
		s.m.refused.WithLabelValues(reason).Inc()
		s.refuse(nc)
		return
	}
	if s.o.TLS != nil {
		c.nc = tls.Server(&watched{TCPConn: nc, c: c}, s.o.TLS)
	} else {
		c.raw, _ = nc.SyscallConn()
	}
	go func() {
		c.serve()
		if !c.handed {
			s.leave(c)
		}
	}()
}

// cutOff is why nothing is taken any more. It is no limit, and not counted.
const cutOff = "cut off"

// enroll counts a connection, or says which limit it exceeds.
func (s *Server) enroll(c *conn) (reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	addr := c.remote.Addr()
	switch {
	case s.cut:
		return cutOff
	case len(s.conns) >= s.o.Conns:
		return "connections"
	case s.o.ConnsPerClient > 0 && s.clients[addr] >= s.o.ConnsPerClient && (s.o.Exempt == nil || !s.o.Exempt(addr)):
		return "connections_per_client"
	}
	s.conns[c] = struct{}{}
	s.clients[addr]++
	s.all.Add(1)
	return ""
}

// leave is the end of a connection. It may be called twice.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.over = true
	s.forget(c)
}

// enterStream counts a request of HTTP/2 in, for which net/http does not wait. It
// reports false when its connection is over.
func (s *Server) enterStream(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.over {
		return false
	}
	c.streams++
	return true
}

func (s *Server) leaveStream(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.streams--
	s.forget(c)
}

// forget drops a connection that is over and of which no request is under way.
func (s *Server) forget(c *conn) {
	if _, ok := s.conns[c]; !ok || !c.over || c.streams > 0 {
		return
	}
	delete(s.conns, c)
	addr := c.remote.Addr()
	if s.clients[addr]--; s.clients[addr] == 0 {
		delete(s.clients, addr)
	}
	s.all.Done()
}

// maxRefusing bounds the refusals under way: beyond it connections are closed
// without a word.
const maxRefusing = 64

// tooMany is the answer to a connection that exceeds a limit.
const tooMany = "HTTP/1.1 503 Service Unavailable\r\n" +
	"Content-Type: application/problem+json\r\n" +
	"Proxy-Status: holdfast; error=connection_limit_reached\r\n" +
	"Retry-After: 5\r\n" +
	"Content-Length: 87\r\n" +
	"Connection: close\r\n\r\n" +
	`{"title":"Service Unavailable","status":503,"detail":"there are too many connections"}` + "\n"

func (s *Server) refuse(nc *net.TCPConn) {
	select {
	case s.refusing <- struct{}{}:
	default:
		_ = nc.Close()
		return
	}
	s.all.Add(1)
	go func() {
		defer s.all.Done()
		defer func() { <-s.refusing }()
		defer nc.Close()
		if s.o.TLS != nil {
			return // a handshake costs what the limit is there to save
		}
		if nc.SetDeadline(time.Now().Add(s.times.lingerPause)) != nil {
			return
		}
		if _, err := nc.Write([]byte(tooMany)); err != nil || nc.CloseWrite() != nil {
			return
		}
		// Until the client has read it: a close with unread bytes is a reset.
		var rest [512]byte
		for {
			if _, err := nc.Read(rest[:]); err != nil {
				return
			}
		}
	}()
}

// Stop goes on to serve for DrainDelay, with answers that close their
// connections, then takes no more connections, closes those that are idle and
// the tunnels, and waits for the requests under way. When ctx is done it closes
// what is left.
func (s *Server) Stop(ctx context.Context) error {
	var err error
	s.once.Do(func() { err = s.drain(ctx) })
	return err
}

func (s *Server) drain(ctx context.Context) error {
	s.draining.Store(true)
	s.mu.Lock()
	s.stopped = true
	running := s.running
	s.mu.Unlock()
	if running {
		pause(ctx, s.o.DrainDelay)
	}
	if s.open() > 0 {
		pause(ctx, s.times.lastCall)
	}
	close(s.stop)
	_ = s.listener.Close()
	s.closing.Store(true)
	var h2 sync.WaitGroup
	defer h2.Wait()
	h2ctx, cancel := context.WithCancel(ctx)
	defer cancel() // it looks only now and then whether all connections have gone
	h2.Go(func() { _ = s.h2.Shutdown(h2ctx) })
	gone := make(chan struct{})
	go func() { s.all.Wait(); close(gone) }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		s.closeIdle()
		select {
		case <-gone:
			_ = s.h2.Close()
			_ = s.h2conns.Close()
			return nil
		case <-tick.C:
		case <-ctx.Done():
			s.closeAll()
			<-gone
			return fmt.Errorf("requests were cut off: %w", ctx.Err())
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// open is how many connections there are.
func (s *Server) open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// closeIdle closes connections on which nothing has come, and tunnels.
func (s *Server) closeIdle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		// Below TLS, whose last word would wait for a client that does not read.
		switch c.state.Load() {
		case tunnelling:
			_ = c.tcp.Close()
		case idle:
			if c.quiet() && c.state.CompareAndSwap(idle, closed) {
				_ = c.tcp.Close()
			}
		}
	}
}

// closeAll closes everything at once.
func (s *Server) closeAll() {
	s.draining.Store(true)
	s.closing.Store(true)
	_ = s.listener.Close()
	_ = s.h2.Close()
	_ = s.h2conns.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cut = true
	for c := range s.conns {
		c.state.Store(closed)
		_ = c.tcp.Close()
	}
}
