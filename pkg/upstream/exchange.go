package upstream

import (
	"bytes"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Exchange is one request and its answer, for one goroutine. It must be
// closed.
type Exchange struct {
	p        *Pool
	c        *conn
	method   string
	resp     wire.Response
	answered bool
	body     wire.Body
	deadline time.Time
	unsent   int64 // bytes of the body that are still to be written
	upgrade  bool  // the request asks for another protocol
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

// Interrupt makes the call that waits for the API fail at the given time, and
// those after it until Extend. It may be called by another goroutine, until Close.
func (x *Exchange) Interrupt(at time.Time) { _ = x.c.SetDeadline(at) }

// Answer reads the head of the final answer. Interim ones (1xx) are handed to
// interim, if it is not nil, as they come. 101 is final where the request asked
// for another protocol, see [Exchange.Upgrade], and an error where it did not. The
// body is read by Read. What Answer gives is valid until Close. After an error
// the exchange is closed.
func (x *Exchange) Answer(interim func(*wire.Response)) (*wire.Response, error) {
	if x.answered {
		return &x.resp, nil
	}
	x.resp.Fields = x.c.fields
	for {
		// Each interim answer has the whole limit: a slow API may send many.
		err := wire.ReadResponse(x.c.br, &x.resp, x.method, x.p.o.MaxHeaderBytes, maxFields)
		if err == nil && x.resp.Status == http.StatusSwitchingProtocols && !x.upgrade {
			err = errSwitched
		}
		if err != nil {
			x.fail(err)
			return nil, &Error{Op: "read", Sent: true, Err: err}
		}
		if x.resp.Status >= 200 || x.resp.Status == http.StatusSwitchingProtocols {
			break
		}
		if interim != nil {
			interim(&x.resp)
		}
	}
	x.c.fields = x.resp.Fields
	x.answered = true
	x.body.Reset(x.c.br, x.resp.Length, x.p.o.MaxHeaderBytes, maxFields, true)
	return &x.resp, nil
}

// maxFields bounds the fields of an answer's head, and of its trailer section.
const maxFields = 1000

// AllowUpgrade says that the request asks for another protocol.
func (x *Exchange) AllowUpgrade() { x.upgrade = true }

// Upgrade takes the connection out of the exchange, after an answer 101, with
// what the API has said on it already. The caller closes it; no deadline is set
// on it any more. It counts as a connection of the pool until then.
func (x *Exchange) Upgrade() (net.Conn, []byte, error) {
	if err := x.c.SetDeadline(time.Time{}); err != nil {
		return nil, nil, &Error{Op: "read", Sent: true, Err: err}
	}
	x.closed = true
	return &upgraded{Conn: x.c.Conn, p: x.p}, bytes.Clone(x.c.br.Buffered()), nil
}

// upgraded gives its slot back when it is closed.
type upgraded struct {
	net.Conn
	p    *Pool
	once sync.Once
}

// CloseWrite ends the sending side, where the connection can.
func (u *upgraded) CloseWrite() error {
	if half, ok := u.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return u.Conn.Close()
}

func (u *upgraded) Close() error {
	err := u.Conn.Close()
	u.once.Do(func() {
		u.p.open.Add(-1)
		<-u.p.slots
	})
	return err
}

// Read reads the answer's body. It gives [io.EOF] only when the answer has
// come whole: an answer that was cut short gives an *Error.
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

// Waiting reports whether nothing of the body has come yet that could be read
// without a wait.
func (x *Exchange) Waiting() bool { return !x.body.Done() && len(x.c.br.Buffered()) == 0 }

// Trailer gives the fields after the body, once Read has given io.EOF.
func (x *Exchange) Trailer() wire.Fields { return x.body.Trailer }

// Close ends the exchange. The connection is used again if request and answer
// went through whole and neither side wants it closed.
func (x *Exchange) Close() {
	if x.closed {
		return
	}
	x.closed = true
	if !x.reusable || x.unsent != 0 || x.resp.Close || len(x.c.br.Buffered()) != 0 {
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
