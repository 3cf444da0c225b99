// Package upstream sends HTTP/1.1 requests to the API, each exactly once.
//
// General HTTP clients repeat a request on their own when a kept-alive
// connection dies under it (RFC 9110 section 9.2.2 allows that for idempotent
// methods). A gateway that promises to know every attempt must not: here nothing
// is ever sent twice, and an error says whether a byte may have reached the API.
//
// A request is sent as the bytes that were captured, so that what is stored,
// what is forwarded and what is replayed are one and the same. Answers are
// read by [wire]. A connection carries one request at a time.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Options configure a Pool. Zero values take the documented defaults.
type Options struct {
	// URL of the API: http or https, host and optional port. Path and query are
	// not used: a request's target is sent as it came.
	URL *url.URL
	// TLS is used for https; nil means the system's roots.
	TLS *tls.Config
	// MaxConns bounds connections in use and idle together. Default 1024. A
	// request above it waits for one until its deadline, and then fails with a
	// timeout.
	MaxConns int
	// IdleTimeout closes connections that were not used for so long. Default
	// 30 s: below the keep-alive of common servers (60 to 75 s), so that it is
	// mostly we who close.
	IdleTimeout time.Duration
	// Dial connects, below TLS; nil means [net.Dialer.DialContext]. An error of it
	// is the cause in the *Error.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// DialTimeout bounds connecting, TLS handshake included. Default 5 s.
	DialTimeout time.Duration
	// MaxHeaderBytes bounds the head of an answer. Default 256 KiB.
	MaxHeaderBytes int
}

// Pool keeps connections to one API. It is safe for concurrent use.
type Pool struct {
	o     Options
	addr  string
	slots chan struct{} // one element for each connection in use or being made

	mu     sync.Mutex
	idle   []*conn // last used last
	closed bool
	gen    uint64 // bumped when idle connections turned out to be dead

	open   atomic.Int64
	reaper *time.Timer
}

// Error is a failed exchange.
type Error struct {
	Op string // "connect", "write" or "read"
	// Sent is true when a byte may have reached the API: then nobody knows what
	// it did with the request. False is a promise that none has.
	Sent bool
	Err  error
}

// Error names the step that failed.
func (e *Error) Error() string { return "upstream: " + e.Op + ": " + e.Err.Error() }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Timeout reports whether the deadline was what ended the exchange.
func (e *Error) Timeout() bool {
	var t interface{ Timeout() bool }
	return errors.Is(e.Err, os.ErrDeadlineExceeded) || errors.Is(e.Err, context.DeadlineExceeded) ||
		errors.As(e.Err, &t) && t.Timeout()
}

var (
	errNoConn   = fmt.Errorf("no connection became free in time: %w", os.ErrDeadlineExceeded)
	errClosed   = errors.New("pool is closed")
	errSwitched = errors.New("the API changed the protocol unasked")
)

// New validates the options. It does not connect.
func New(o Options) (*Pool, error) {
	if o.URL == nil || o.URL.Host == "" || o.URL.Scheme != "http" && o.URL.Scheme != "https" {
		return nil, fmt.Errorf("upstream %v: an http or https URL with a host is needed", o.URL)
	}
	if o.Dial == nil {
		o.Dial = new(net.Dialer).DialContext
	}
	o.MaxConns = cmpOr(o.MaxConns, 1024)
	o.IdleTimeout = cmpOr(o.IdleTimeout, 30*time.Second)
	o.DialTimeout = cmpOr(o.DialTimeout, 5*time.Second)
	o.MaxHeaderBytes = cmpOr(o.MaxHeaderBytes, 256<<10)
	p := &Pool{o: o, addr: o.URL.Host, slots: make(chan struct{}, o.MaxConns)}
	if o.URL.Port() == "" {
		port := "80"
		if o.URL.Scheme == "https" {
			port = "443"
		}
		p.addr = net.JoinHostPort(o.URL.Hostname(), port)
	}
	if o.URL.Scheme == "https" {
		cfg := &tls.Config{}
		if o.TLS != nil {
			cfg = o.TLS.Clone()
		}
		if cfg.ServerName == "" {
			cfg.ServerName = o.URL.Hostname()
		}
		p.o.TLS = cfg
	} else {
		p.o.TLS = nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaper = time.AfterFunc(p.o.IdleTimeout, p.reap)
	return p, nil
}

func cmpOr[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// Conns is how many connections are open, in use and idle.
func (p *Pool) Conns() int64 { return p.open.Load() }

// Close closes idle connections; those in use are closed when their exchange
// ends. It is idempotent.
func (p *Pool) Close() {
	p.mu.Lock()
	idle := p.idle
	p.idle, p.closed = nil, true
	p.mu.Unlock()
	p.reaper.Stop()
	p.drop(idle)
}

// conn is one connection. Only its holder touches it.
type conn struct {
	net.Conn
	raw     syscall.RawConn // of the TCP connection, below TLS where there is one
	br      *wire.Reader
	fields  wire.Fields // of the last answer, to be used again
	scratch []byte
	idleAt  time.Time
	gen     uint64
	reused  bool
}

// acquire gives an idle connection that is still alive, or a new one. Because
// one is made only when none is idle, those in use and those that are idle are
// never more than there are slots.
func (p *Pool) acquire(deadline time.Time) (*conn, error) {
	select {
	case p.slots <- struct{}{}:
	default:
		wait := time.NewTimer(time.Until(deadline))
		defer wait.Stop()
		select {
		case p.slots <- struct{}{}:
		case <-wait.C:
			return nil, errNoConn
		}
	}
	c, err := p.idleOrNew(deadline)
	if err != nil {
		<-p.slots
		return nil, err
	}
	return c, nil
}

func (p *Pool) idleOrNew(deadline time.Time) (*conn, error) {
	for {
		if !time.Now().Before(deadline) {
			return nil, os.ErrDeadlineExceeded
		}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			return nil, errClosed
		}
		n := len(p.idle)
		if n == 0 {
			p.mu.Unlock()
			c, err := p.dial(deadline)
			if err != nil {
				return nil, err
			}
			if err := c.SetDeadline(deadline); err != nil {
				p.drop([]*conn{c})
				return nil, err
			}
			return c, nil
		}
		c := p.idle[n-1]
		p.idle[n-1] = nil
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		// Before the look: the deadline of the last request may have passed.
		if err := c.SetDeadline(deadline); err == nil && c.alive() {
			c.reused = true
			return c, nil
		}
		p.dead(c)
		p.drop([]*conn{c})
	}
}

func (p *Pool) dial(deadline time.Time) (*conn, error) {
	timeout := min(p.o.DialTimeout, time.Until(deadline))
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	nc, err := p.o.Dial(ctx, "tcp", p.addr)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: nc}
	if p.o.TLS != nil {
		tc := tls.Client(nc, p.o.TLS)
		if err := tc.HandshakeContext(ctx); err != nil {
			_ = nc.Close()
			return nil, err
		}
		c.Conn = tc
	}
	if sc, ok := nc.(syscall.Conn); ok {
		c.raw, _ = sc.SyscallConn()
	}
	c.br = wire.NewReader(c.Conn)
	p.mu.Lock()
	c.gen = p.gen
	p.mu.Unlock()
	p.open.Add(1)
	return c, nil
}

// alive reports whether the peer has neither closed the connection nor said
// anything unasked. It costs a system call, which is little beside the request
// that a dead connection costs.
func (c *conn) alive() bool {
	if c.raw == nil {
		return true
	}
	alive := false
	err := c.raw.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, rerr := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		alive = errors.Is(rerr, syscall.EAGAIN)
		return true
	})
	return err == nil && alive
}

// release takes a connection back for the next request.
func (p *Pool) release(c *conn) {
	c.idleAt = time.Now()
	p.mu.Lock()
	keep := !p.closed && c.gen == p.gen
	if keep {
		p.idle = append(p.idle, c)
	}
	p.mu.Unlock()
	if !keep {
		p.drop([]*conn{c})
	}
	<-p.slots
}

// discard closes a connection that was in use.
func (p *Pool) discard(c *conn) {
	p.drop([]*conn{c})
	<-p.slots
}

// drop closes connections that are neither idle nor hold a slot.
func (p *Pool) drop(conns []*conn) {
	for _, c := range conns {
		_ = c.Close()
		p.open.Add(-1)
	}
}

// dead notes that the peer had closed a connection, and closes all idle ones of
// its age: an API that restarts closes them all, and each would cost a request.
func (p *Pool) dead(c *conn) {
	p.mu.Lock()
	var idle []*conn
	if c.gen == p.gen {
		p.gen++
		idle, p.idle = p.idle, nil
	}
	p.mu.Unlock()
	p.drop(idle)
}

func (p *Pool) reap() {
	limit := time.Now().Add(-p.o.IdleTimeout)
	p.mu.Lock()
	n := 0
	for n < len(p.idle) && p.idle[n].idleAt.Before(limit) {
		n++
	}
	old := slices.Clone(p.idle[:n])
	p.idle = slices.Delete(p.idle, 0, n)
	if !p.closed {
		p.reaper.Reset(p.o.IdleTimeout / 2)
	}
	p.mu.Unlock()
	p.drop(old)
}
