package edge

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// state is what a connection is doing. It goes from idle to one of the others
// and back, and to closed from anywhere, for good.
type state = int32

const (
	idle       state = iota // nothing of a request has come
	active                  // a request is under way
	tunnelling              // it carries another protocol
	handedOver              // net/http has it
	closed                  // by the server
)

// conn is one connection of a client. It stays small: idle ones are many.
type conn struct {
	s      *Server
	nc     net.Conn        // TLS where there is TLS
	tcp    *net.TCPConn    // below, or nil
	raw    syscall.RawConn // of tcp where there is no TLS, to wait without a buffer
	remote netip.AddrPort
	state  atomic.Int32

	handed  bool // to net/http, which closes it; set before that has it
	over    bool // closed by net/http, or served to its end; under Server.mu
	streams int  // requests of HTTP/2 under way; under Server.mu

	readUntil time.Time // the deadline that is set
	ss        *session  // nil while idle
}

// enter changes the state, unless the server has closed the connection.
func (c *conn) enter(to state) bool {
	for {
		now := c.state.Load()
		if now == closed {
			return false
		}
		if c.state.CompareAndSwap(now, to) {
			return true
		}
	}
}

// serve handles the requests of a connection until its end, or gives it to
// net/http.
func (c *conn) serve() {
	if tc, ok := c.nc.(*tls.Conn); ok {
		if !c.handshake(tc) {
			c.release()
			return
		}
		if tc.ConnectionState().NegotiatedProtocol == "h2" {
			if !c.enter(handedOver) {
				c.release()
				return
			}
			c.handed = true
			c.s.handOver(tc)
			return
		}
	}
	defer c.release()
	for c.await() {
		if !c.request() {
			return
		}
	}
}

// release closes the connection and gives back what it has.
func (c *conn) release() {
	c.putSession()
	_ = c.nc.Close()
}

func (c *conn) handshake(tc *tls.Conn) bool {
	if c.readDeadline(time.Now().Add(c.s.o.HeadTimeout)) != nil || tc.SetWriteDeadline(time.Now().Add(c.s.o.HeadTimeout)) != nil {
		return false
	}
	if err := tc.Handshake(); err != nil {
		c.s.m.handshakes.Inc()
		c.s.o.Logger.Debug("TLS handshake failed", "remote", c.remote.String(), "err", err)
		return false
	}
	_ = tc.SetWriteDeadline(time.Time{})
	return true
}

// await waits for the first byte of the next request.
func (c *conn) await() bool {
	if c.ss != nil && len(c.ss.r.Buffered()) > 0 {
		return c.enter(active)
	}
	if !c.enter(idle) {
		return false
	}
	if c.s.closing.Load() && c.quiet() {
		return false // a request that is here already is still answered
	}
	// Setting a deadline costs more than it is worth to have it exact.
	now := time.Now()
	if least := now.Add(c.s.o.IdleTimeout * 3 / 4); c.readUntil.Before(least) || c.readUntil.After(now.Add(c.s.o.IdleTimeout)) {
		if c.readDeadline(now.Add(c.s.o.IdleTimeout)) != nil {
			return false
		}
	}
	var buf *buffer
	if c.ss != nil {
		if b := c.ss.r.Take(); len(b) == wire.BufferBytes {
			buf = (*buffer)(b)
		}
		c.ss.shrink()
	}
	buf, n := c.firstBytes(buf)
	if n == 0 {
		if buf != nil {
			c.s.buffers.Put(buf)
		}
		return false
	}
	if !c.enter(active) {
		c.s.buffers.Put(buf)
		return false
	}
	c.getSession()
	c.ss.r.Fill(buf[:], n)
	return true
}

// buffer is the first buffer of a session.
type buffer = [wire.BufferBytes]byte

// firstBytes reads what comes first into a buffer. Without TLS it holds none
// while it waits.
func (c *conn) firstBytes(buf *buffer) (_ *buffer, n int) {
	if c.raw == nil {
		if buf == nil {
			buf = c.getBuffer()
		}
		n, _ = c.nc.Read(buf[:]) // without a byte the connection is over, whatever the reason
		return buf, n
	}
	_ = c.raw.Read(func(fd uintptr) bool {
		if buf == nil {
			buf = c.getBuffer()
		}
		for {
			var err error
			n, err = syscall.Read(int(fd), buf[:])
			switch {
			case errors.Is(err, syscall.EINTR):
				continue
			case errors.Is(err, syscall.EAGAIN):
				c.s.buffers.Put(buf)
				buf, n = nil, 0
				c.putSession()
				return false
			case err != nil:
				n = 0
			}
			return true
		}
	})
	return buf, max(n, 0)
}

func (c *conn) getBuffer() *buffer {
	if buf, ok := c.s.buffers.Get().(*buffer); ok {
		return buf
	}
	return new(buffer)
}

func (c *conn) getSession() {
	if c.ss != nil {
		return
	}
	ss, ok := c.s.sessions.Get().(*session)
	if !ok {
		ss = &session{w: make([]byte, 0, 2<<10)}
		ss.r = wire.NewReader(source{ss})
		ss.r.Grow = ss.grow
		ss.x.peer = ss
		ss.x.Answer = make(wire.Fields, 0, 16)
	}
	ss.c = c
	ss.x.Remote, ss.x.TLS = c.remote, c.raw == nil && c.s.o.TLS != nil
	c.ss = ss
}

// putSession gives the session back, and the buffer with it.
func (c *conn) putSession() {
	ss := c.ss
	if ss == nil {
		return
	}
	c.ss = nil
	if buf := ss.r.Take(); len(buf) == wire.BufferBytes {
		c.s.buffers.Put((*buffer)(buf))
	}
	ss.shrink()
	if cap(ss.w) > 4*flushBytes || len(ss.r.Buffered()) > 0 {
		return
	}
	ss.c, ss.b = nil, wire.Body{}
	ss.x.Request.Reset()
	c.s.sessions.Put(ss)
}

// request reads one request and has it answered. It reports whether another may
// come.
func (c *conn) request() bool {
	ss := c.ss
	ss.start()
	err := c.plausible(ss.r.Buffered()[0])
	if err == nil {
		err = c.readHead()
	}
	if err != nil {
		return c.refuse(err)
	}
	ss.accept()
	if !c.guard(func() { c.s.o.Handler.Serve(&ss.x) }) {
		return false
	}
	return ss.finish()
}

// plausible refuses a first byte with which no request begins. What is no HTTP
// at all, a TLS handshake on the plain port for instance, has no line whose end
// could be waited for.
func (c *conn) plausible(first byte) error {
	if first > ' ' && first < 0x7f || first == '\r' || first == '\n' {
		return nil
	}
	return &wire.SyntaxError{Status: 400, Reason: "this is not HTTP"}
}

// readHead reads the head. Mostly it is here already; one that is not must come
// in time.
func (c *conn) readHead() error {
	ss := c.ss
	if !ss.r.HasHead() {
		if err := c.readDeadline(time.Now().Add(c.s.o.HeadTimeout)); err != nil {
			return err
		}
	}
	return wire.ReadRequest(ss.r, &ss.x.Request, c.s.o.HeadBytes, c.s.o.HeadFields)
}

// refuse answers what is not taken, and ends the connection.
func (c *conn) refuse(err error) bool {
	var syntax *wire.SyntaxError
	switch {
	case errors.As(err, &syntax):
	case errors.Is(err, os.ErrDeadlineExceeded):
		syntax = &wire.SyntaxError{Status: 408, Reason: "the head of the request did not come in time"}
	default:
		return false // the client has gone
	}
	ss := c.ss
	ss.b.Reset(ss.r, 0, 0, 0, false)
	req := &ss.x.Request
	req.Minor = 1
	if req.Method == "" {
		req.Method = "GET" // any that has a body in its answer
	}
	ss.close, ss.lingers = true, true
	if !c.guard(func() { c.s.o.Handler.Refuse(&ss.x, syntax) }) {
		return false
	}
	return ss.finish()
}

// guard calls f, and survives its panic. It reports whether there is an answer,
// its own included.
func (c *conn) guard(f func()) (ok bool) {
	defer func() {
		cause := recover()
		if cause == nil {
			return
		}
		ok = false
		c.s.panicked(cause, debug.Stack())
		if c.ss.x.headed {
			c.reset()
			return
		}
		ss := c.ss
		ss.close = true
		ss.head(500, "Internal Server Error", nil, 0)
		_ = ss.end(nil)
		ss.x.headed, ss.x.ended, ss.x.aborted = true, true, false
		ok = true
	}()
	f()
	return true
}

// lingerBytes bounds a lingering close beside its time.
const lingerBytes = 64 << 20

// linger reads what a client still sends, for a bounded time, before the close:
// it would lose the answer with the reset that an early close means (RFC 9112
// section 9.6).
func (c *conn) linger() {
	half, ok := c.nc.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	if c.ss != nil {
		c.putSession()
	}
	if !c.enter(idle) { // whoever stops the server need not wait for this
		return
	}
	buf := c.getBuffer()
	defer c.s.buffers.Put(buf)
	last := time.Now().Add(c.s.times.linger)
	for n := 0; n < lingerBytes; {
		until := time.Now().Add(c.s.times.lingerPause)
		if until.After(last) {
			until = last
		}
		if c.readDeadline(until) != nil {
			return
		}
		m, err := c.nc.Read(buf[:])
		if n += m; err != nil {
			return
		}
	}
}

// reset closes the connection so that the client sees an error rather than an
// end.
func (c *conn) reset() {
	if c.tcp != nil {
		_ = c.tcp.SetLinger(0)
		_ = c.tcp.Close()
	}
}

func (c *conn) readDeadline(t time.Time) error {
	c.readUntil = t
	return c.nc.SetReadDeadline(t)
}

// quiet reports whether nothing has come that was not read.
func (c *conn) quiet() bool {
	if c.tcp == nil {
		return true
	}
	raw, err := c.tcp.SyscallConn()
	if err != nil {
		return true
	}
	waiting := false
	err = raw.Control(func(fd uintptr) {
		var b [1]byte
		n, _, rerr := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		waiting = rerr == nil && n > 0
	})
	return err != nil || !waiting
}

var _ io.Reader = (*Exchange)(nil)

// panicked logs and counts a panic.
func (s *Server) panicked(cause any, stack []byte) {
	s.m.panics.Inc()
	s.o.Logger.Error("a request's handler panicked", "err", fmt.Sprint(cause), "stack", string(stack))
}
