package upstream

import (
	"errors"
	"io"
	"net/http"
	"os"
	"time"
)

// Exchange is one request and its answer, for one goroutine. It must be
// closed.
type Exchange struct {
	p        *Pool
	c        *conn
	method   string
	resp     *http.Response
	body     io.Reader
	deadline time.Time
	unsent   int64 // bytes of the body that are still to be written
	reusable bool
	closed   bool
}

// Begin connects and sends the head, given in parts that follow each other,
// and body, of which more may come: rest is how many bytes [Exchange.Write]
// will send, negative when only [Exchange.Sent] will tell. The parts are not
// kept. deadline bounds the whole exchange.
func (p *Pool) Begin(deadline time.Time, method string, rest int64, body []byte, head ...[]byte) (*Exchange, error) {
	c, err := p.acquire(deadline)
	if err != nil {
		return nil, &Error{Op: "connect", Err: err}
	}
	x := &Exchange{p: p, c: c, method: method, deadline: deadline, unsent: rest}
	// One system call for what is small; what is large is not copied.
	c.scratch = c.scratch[:0]
	for _, part := range head {
		c.scratch = append(c.scratch, part...)
	}
	large := len(body) > 16<<10
	if !large {
		c.scratch = append(c.scratch, body...)
	}
	n, err := c.Conn.Write(c.scratch)
	if err == nil && large {
		_, err = x.write(body)
	}
	if cap(c.scratch) > 64<<10 {
		c.scratch = nil
	}
	if err != nil && n > 0 {
		// The API may have answered before it read everything.
		if err = x.earlyAnswer(err); err == nil {
			return x, nil
		}
		return nil, err
	}
	if err != nil {
		x.fail(err)
		// Below TLS a failed write may have sent a part of what it took.
		return nil, &Error{Op: "write", Sent: n > 0 || p.o.TLS != nil, Err: err}
	}
	return x, nil
}

// errEarly ends the sending of a body that the API does not read any more,
// because it has answered already.
var errEarly = errors.New("the API answered before it had read the request")

const (
	// stall is how long a write may stand still before it is asked whether the
	// API has answered meanwhile: longer than an API pauses that answers while
	// it reads on.
	stall = 500 * time.Millisecond
	// earlyWait is how long the answer of an API is waited for that broke off in
	// the middle of the request: it is here already, or it will not come.
	earlyWait = time.Second
)

// write sends what may be larger than the socket's buffers. An API that reads
// slowly gets all the time that the deadline leaves, even if it has begun to
// answer; one that has answered and does not read is not written to any more.
func (x *Exchange) write(b []byte) (int, error) {
	c := x.c
	if x.p.o.TLS != nil || len(b) <= 16<<10 {
		return c.Conn.Write(b) // a TLS connection is broken by a write's deadline
	}
	sent := 0
	for {
		until := time.Now().Add(stall)
		last := !until.Before(x.deadline)
		if last {
			until = x.deadline
		}
		if err := c.SetWriteDeadline(until); err != nil {
			return sent, err
		}
		n, err := c.Conn.Write(b[sent:])
		sent += n
		switch {
		case err == nil:
			return sent, c.SetWriteDeadline(x.deadline)
		case !errors.Is(err, os.ErrDeadlineExceeded), last:
			return sent, err
		case n == 0 && !c.alive():
			return sent, errEarly // or it has gone, which reading tells
		}
	}
}

// Write sends a part of the body.
func (x *Exchange) Write(b []byte) (int, error) {
	n, err := x.write(b)
	x.unsent -= int64(n)
	if err != nil {
		return n, &Error{Op: "write", Sent: true, Err: err}
	}
	return n, nil
}

// EarlyAnswer looks for the answer of an API that did not want the whole
// request, after a Write that failed with cause. After nil Answer gives it, and
// the connection will not be used again; else the exchange is closed, and the
// error says why.
func (x *Exchange) EarlyAnswer(cause error) error {
	var known *Error
	if errors.As(cause, &known) {
		cause = known.Err
	}
	return x.earlyAnswer(cause)
}

func (x *Exchange) earlyAnswer(cause error) error {
	x.unsent = max(x.unsent, 1)
	err := x.Extend(time.Now().Add(earlyWait))
	if err == nil {
		_, err = x.Answer(nil)
	}
	if err == nil {
		return nil
	}
	x.fail(cause)
	if errors.Is(cause, errEarly) {
		return err // what came was no answer, and that is the cause
	}
	return &Error{Op: "write", Sent: true, Err: cause}
}

// Sent says that the request went out whole, where Begin was not told its
// length.
func (x *Exchange) Sent() { x.unsent = 0 }

// Extend sets a new deadline.
func (x *Exchange) Extend(deadline time.Time) error {
	x.deadline = deadline
	if err := x.c.SetDeadline(deadline); err != nil {
		return &Error{Op: "write", Sent: true, Err: err}
	}
	return nil
}

// Answer reads the head of the final answer. Interim ones (1xx) are handed to
// interim, if it is not nil, as they come; 101 is an error, because nobody asked
// for another protocol. The body is read by Read, not from the result's Body.
// After an error the exchange is closed.
func (x *Exchange) Answer(interim func(*http.Response)) (*http.Response, error) {
	if x.resp != nil {
		return x.resp, nil
	}
	// net/http needs the method alone: an answer to HEAD has no body.
	req := &http.Request{Method: x.method}
	x.c.limit = x.p.o.MaxHeaderBytes
	for {
		resp, err := http.ReadResponse(x.c.br, req)
		switch {
		case err != nil:
		case resp.StatusCode == http.StatusSwitchingProtocols:
			err = errSwitched
		case resp.StatusCode < 100:
			err = errStatus
		}
		if err != nil {
			x.fail(err)
			return nil, &Error{Op: "read", Sent: true, Err: err}
		}
		if resp.StatusCode >= 200 {
			x.c.limit = -1
			x.resp, x.body = resp, resp.Body
			return resp, nil
		}
		// Each interim answer has the whole limit: a slow API may send many.
		x.c.limit = x.p.o.MaxHeaderBytes
		if interim != nil {
			interim(resp)
		}
	}
}

// Read reads the answer's body. It gives [io.EOF] only when the answer has
// come whole: an answer that was cut short gives an *Error. Trailers of the
// answer are then in its Trailer.
func (x *Exchange) Read(b []byte) (int, error) {
	n, err := x.body.Read(b)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, io.EOF):
		x.reusable = true
		return n, io.EOF
	default:
		return n, &Error{Op: "read", Sent: true, Err: err}
	}
}

// Close ends the exchange. The connection is used again if request and answer
// went through whole and neither side wants it closed.
func (x *Exchange) Close() {
	if x.closed {
		return
	}
	x.closed = true
	if !x.reusable || x.unsent != 0 || x.resp.Close || x.c.br.Buffered() != 0 {
		x.p.discard(x.c)
		return
	}
	x.p.release(x.c)
}

func (x *Exchange) abort() {
	if !x.closed {
		x.closed = true
		x.p.discard(x.c)
	}
}

// fail ends the exchange after an error; a death of a used connection says
// that others of its age are dead too.
func (x *Exchange) fail(err error) {
	if !x.closed && x.c.reused && !errors.Is(err, os.ErrDeadlineExceeded) {
		x.p.dead(x.c)
	}
	x.abort()
}
