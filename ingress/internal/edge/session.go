package edge

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// session is what a connection needs while a request is under way on it.
// Connections that are idle have none.
type session struct {
	c *conn
	x Exchange
	r *wire.Reader
	b wire.Body
	w []byte // what is to be sent

	grown     int       // bytes of the buffer above its first size
	inBody    bool      // a body is being read, rather than a head
	expecting bool      // the client waits for "100 Continue"
	begun     time.Time // when reading the body began
	received  int64     // bytes of the body
	until     time.Time // WriteLimit

	coding   coding
	unsent   int64 // bytes of a counted body that are to come
	close    bool  // after the answer
	lingers  bool  // the close waits until the client has read the answer
	noBody   bool  // the answer has none, whatever is written
	writeErr error
}

// coding is how the body of an answer is framed.
type coding uint8

const (
	counted coding = iota
	chunked
	untilClose
)

// Bounds of what is read of a body that nobody wants.
const (
	// restBytes are read to keep a connection: less than a new one costs.
	restBytes = 256 << 10
	// minRate is the fewest bytes a second of a body, beside its time limit.
	minRate = 1 << 10
	// maxHeadBytes bounds what large heads take beside the first buffers, in all
	// connections.
	maxHeadBytes = 64 << 20
	// flushBytes is how much is collected before it is sent.
	flushBytes = 16 << 10
)

// start makes the session ready for the next request.
func (s *session) start() {
	s.inBody, s.expecting, s.begun, s.received, s.until = false, false, time.Time{}, 0, time.Time{}
	s.coding, s.unsent, s.close, s.lingers, s.noBody, s.writeErr = counted, 0, false, false, false, nil
	s.w = s.w[:0]
	s.x.Request.Reset()
	s.x.ended, s.x.aborted, s.x.headed = false, false, false
	s.x.Answer = s.x.Answer[:0]
}

// grow takes room for a head that does not fit into the first buffer: a client may
// send the most of it and then nothing, and there may be many of them.
func (s *session) grow(n int) error {
	if s.c.s.headBytes.Add(int64(n)) > maxHeadBytes {
		s.c.s.headBytes.Add(-int64(n))
		return &wire.SyntaxError{Status: 503, Reason: "too many large heads are under way"}
	}
	s.grown += n
	return nil
}

// shrink gives that room back, with the buffer.
func (s *session) shrink() {
	s.c.s.headBytes.Add(-int64(s.grown))
	s.grown = 0
}

// accept takes a head that was read.
func (s *session) accept() {
	req := &s.x.Request
	s.b.Reset(s.r, req.Length, s.c.s.o.HeadBytes, s.c.s.o.HeadFields, false)
	s.expecting = req.Expect && req.Length != 0
	s.close = req.Close
}

func (s *session) read(p []byte) (int, error) {
	s.inBody = true
	n, err := s.b.Read(p)
	s.inBody = false
	s.received += int64(n)
	return n, err
}

// source is the connection as the reader of a session sees it.
type source struct{ s *session }

// Read reads from the connection. For a body it sets the time limit, and tells a
// client that waits to go on.
func (src source) Read(p []byte) (int, error) {
	s := src.s
	if s.inBody {
		if err := s.beforeRead(); err != nil {
			return 0, err
		}
	}
	return s.c.nc.Read(p)
}

func (s *session) beforeRead() error {
	now := time.Now()
	if s.begun.IsZero() {
		s.begun = now
	}
	// Whoever sends without waiting needs no word.
	if s.expecting && s.received == 0 && !s.x.headed {
		if err := s.send([]byte("HTTP/1.1 100 Continue\r\n\r\n")); err != nil {
			return err
		}
	}
	s.expecting = false
	return s.c.readDeadline(bodyDeadline(now, s.begun, s.received, s.c.s.o.BodyTimeout))
}

// bodyDeadline bounds a read of a body, as a pause, and as the whole by its least
// rate: whoever sends a byte now and then holds on to what the gateway has set
// aside for it.
func bodyDeadline(now, begun time.Time, received int64, timeout time.Duration) time.Time {
	deadline := now.Add(timeout)
	if least := begun.Add(timeout + time.Duration(received/minRate)*time.Second); least.Before(deadline) {
		deadline = least
	}
	return deadline
}

func (s *session) trailer() wire.Fields { return s.b.Trailer }

func (s *session) interim(status int, reason string, fields wire.Fields) error {
	if s.x.Request.Minor == 0 {
		return nil
	}
	s.w = appendHead(s.w, status, reason, fields)
	s.w = append(s.w, "\r\n"...)
	return s.flush()
}

func (s *session) head(status int, reason string, fields wire.Fields, length int64) {
	req := &s.x.Request
	s.w = appendHead(s.w, status, reason, fields)
	if !fields.Has("Date") {
		s.w = s.c.s.clock.appendDate(s.w)
	}
	s.noBody = length == NoBody || req.Method == "HEAD" || status == 204 || status == 304
	switch {
	case length >= 0 && status != 204:
		s.w = append(s.w, "Content-Length: "...)
		s.w = strconv.AppendInt(s.w, length, 10)
		s.w = append(s.w, "\r\n"...)
		s.unsent = length
	case s.noBody:
	case req.Minor == 0:
		s.coding, s.close = untilClose, true
	default:
		s.coding = chunked
		s.w = append(s.w, "Transfer-Encoding: chunked\r\n"...)
	}
	if !s.restIsCheap() || s.c.s.draining.Load() {
		s.close = true
	}
	switch {
	case s.close:
		s.w = append(s.w, "Connection: close\r\n"...)
	case req.Minor == 0:
		s.w = append(s.w, "Connection: keep-alive\r\n"...)
	}
	s.w = append(s.w, "\r\n"...)
}

// appendHead appends status line and fields, without the empty line.
func appendHead(dst []byte, status int, reason string, fields wire.Fields) []byte {
	dst = append(dst, "HTTP/1.1 "...)
	dst = strconv.AppendInt(dst, int64(status), 10)
	dst = append(dst, ' ')
	dst = append(dst, reason...)
	dst = append(dst, "\r\n"...)
	for i := range fields {
		dst = wire.AppendField(dst, fields[i].Name, fields[i].Value)
	}
	return dst
}

// restIsCheap reports whether what is left of the request's body may be read to
// keep the connection. A client that still waits may send it or not: nobody
// knows where the next request would begin.
func (s *session) restIsCheap() bool {
	left := s.b.Left()
	return left == 0 || s.b.Err() == nil && left > 0 && left <= restBytes && !s.expecting
}

func (s *session) write(b []byte) error {
	if s.writeErr != nil || len(b) == 0 || s.noBody {
		return s.writeErr
	}
	switch s.coding {
	case counted:
		if int64(len(b)) > s.unsent {
			return errTooMuch
		}
		s.unsent -= int64(len(b))
	case chunked:
		s.w = wire.AppendChunkSize(s.w, int64(len(b)))
	case untilClose:
	}
	if len(s.w)+len(b) <= flushBytes {
		s.w = append(s.w, b...)
	} else if err := s.sendWith(b); err != nil {
		return err
	}
	if s.coding == chunked {
		s.w = append(s.w, "\r\n"...)
	}
	return nil
}

var errTooMuch = errors.New("more was written than the length that was announced")

func (s *session) flush() error { return s.sendWith(nil) }

// sendWith sends what is collected, and b.
func (s *session) sendWith(b []byte) error {
	if s.writeErr != nil {
		return s.writeErr
	}
	if len(s.w) == 0 && len(b) == 0 {
		return nil
	}
	s.setWriteDeadline()
	var err error
	switch {
	case len(b) == 0:
		_, err = s.c.nc.Write(s.w)
	case s.c.raw != nil && len(s.w) > 0: // one system call
		parts := net.Buffers{s.w, b}
		_, err = parts.WriteTo(s.c.tcp)
	default:
		if len(s.w) > 0 {
			_, err = s.c.nc.Write(s.w)
		}
		if err == nil {
			_, err = s.c.nc.Write(b)
		}
	}
	s.w = s.w[:0]
	s.writeErr = err
	return err
}

// send sends b before what is collected.
func (s *session) send(b []byte) error {
	if s.writeErr == nil {
		s.setWriteDeadline()
		_, s.writeErr = s.c.nc.Write(b)
	}
	return s.writeErr
}

func (s *session) setWriteDeadline() {
	deadline := time.Now().Add(s.c.s.o.WriteTimeout)
	if !s.until.IsZero() && s.until.Before(deadline) {
		deadline = s.until
	}
	_ = s.c.nc.SetWriteDeadline(deadline) // a closed connection fails in the write
}

// watch waits for the end of the connection by reading from it. A byte that comes
// instead is the next request's, and is kept for it.
func (s *session) watch(left func()) (stop func()) {
	if !s.b.Done() || len(s.r.Buffered()) > 0 || s.c.readDeadline(time.Time{}) != nil {
		return func() {}
	}
	var next [1]byte
	n := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		if n, err = s.c.nc.Read(next[:]); n == 0 && !errors.Is(err, os.ErrDeadlineExceeded) {
			left()
		}
	}()
	return func() {
		_ = s.c.readDeadline(time.Unix(1, 0)) // ends the read; a closed connection has ended it
		<-done
		if n == 0 {
			return
		}
		buf := s.r.Take()
		if len(buf) == 0 {
			buf = make([]byte, wire.BufferBytes)
		}
		buf[0] = next[0]
		s.r.Fill(buf, n)
	}
}

func (s *session) limit(deadline time.Time) { s.until = deadline }

func (s *session) end(trailer wire.Fields) error {
	if s.coding == chunked {
		s.w = wire.AppendLastChunk(s.w, trailer)
	}
	if s.coding == counted && s.unsent > 0 && !s.noBody {
		s.x.aborted = true
	}
	return s.flush()
}

// finish ends the exchange on the connection. It reports whether another
// request may come on it.
func (s *session) finish() bool {
	switch {
	case s.writeErr != nil:
		s.c.reset() // what the kernel still holds would be kept for minutes
		return false
	case s.x.aborted || !s.x.ended || !s.x.headed:
		// A plain close lets the client read what it was sent, where the framing
		// tells it that something is missing.
		if !s.x.headed || s.coding == untilClose {
			s.c.reset()
		}
		return false
	case s.close:
		if s.lingers || !s.b.Done() || len(s.r.Buffered()) > 0 {
			s.c.linger()
		}
		return false
	case s.b.Done():
		return true
	}
	// The promise to keep the connection was given with the head.
	rest := int64(0)
	buf := make([]byte, 32<<10)
	for !s.b.Done() {
		n, err := s.read(buf)
		if rest += int64(n); err != nil && err != io.EOF || rest > restBytes {
			return false
		}
	}
	return true
}

// tunnel carries bytes both ways after an answer 101.
func (s *session) tunnel(reason string, fields wire.Fields, other net.Conn, first []byte, idle time.Duration) {
	defer other.Close()
	s.close = true
	s.w = appendHead(s.w, 101, reason, fields)
	s.w = append(s.w, "\r\n"...)
	if s.sendWith(first) != nil {
		return
	}
	client := s.c.nc
	if s.c.readDeadline(time.Time{}) != nil || client.SetWriteDeadline(time.Time{}) != nil {
		return
	}
	// What the client has sent already comes first.
	early := append([]byte(nil), s.r.Buffered()...)
	s.r.Fill(nil, 0)
	if !s.c.enter(tunnelling) {
		return
	}
	var last atomic.Int64
	last.Store(time.Now().UnixNano())
	done := make(chan struct{}, 2)
	go func() { carry(other, client, early, &last); done <- struct{}{} }()
	go func() { carry(client, other, nil, &last); done <- struct{}{} }()
	check := time.NewTimer(idle)
	defer check.Stop()
	ended := 0
	for ended < 2 {
		select {
		case <-done:
			if ended++; idle > s.c.s.times.halfOpen {
				idle = s.c.s.times.halfOpen
				check.Reset(idle)
			}
		case <-check.C:
			quiet := time.Since(time.Unix(0, last.Load()))
			if quiet < idle {
				check.Reset(idle - quiet)
				continue
			}
			// Both directions end by their connections.
			_ = client.Close()
			_ = other.Close()
		}
	}
}

// carry copies what is here already and what comes until src ends, and then ends
// the sending side of dst, if it has one; after an error both are closed.
func carry(dst, src net.Conn, early []byte, last *atomic.Int64) {
	buf := make([]byte, 16<<10)
	var err error
	if len(early) > 0 {
		_, err = dst.Write(early)
	}
	for {
		n := 0
		if err == nil {
			n, err = src.Read(buf)
		}
		if n > 0 {
			last.Store(time.Now().UnixNano())
			if _, werr := dst.Write(buf[:n]); werr != nil {
				err = werr
			}
		}
		if err == nil {
			continue
		}
		if half, ok := dst.(interface{ CloseWrite() error }); ok && errors.Is(err, io.EOF) {
			_ = half.CloseWrite()
			return
		}
		_ = dst.Close()
		_ = src.Close()
		return
	}
}
