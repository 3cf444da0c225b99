package edge

import (
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/holdfast-io/holdfast/pkg/wire"
)

// Handler answers requests. It is called concurrently, once for each exchange,
// which it must not use after it has returned.
type Handler interface {
	// Serve answers a request: Head, Write and End, or Abort.
	Serve(x *Exchange)
	// Refuse answers what is not valid HTTP in the same way. Of the request only
	// what was read before the error is there. The connection is closed after it.
	Refuse(x *Exchange, err *wire.SyntaxError)
}

// Exchange is one request and its answer, for one goroutine.
type Exchange struct {
	// Request is the head that was received. Over HTTP/2 the fields are sorted by
	// name, framing is not among them, and Major is 2.
	Request wire.Request
	// Remote is the client's address, zero where it has none.
	Remote netip.AddrPort
	// TLS is true for a client that speaks TLS.
	TLS bool
	// Answer is an empty slice with some room, for the fields of the answer.
	Answer wire.Fields

	peer    peer
	ended   bool // End was called
	aborted bool
	headed  bool // Head was called
}

// peer is the client's side of one version of HTTP.
type peer interface {
	read(p []byte) (int, error)
	trailer() wire.Fields
	interim(status int, reason string, fields wire.Fields) error
	head(status int, reason string, fields wire.Fields, length int64)
	write(b []byte) error
	flush() error
	end(trailer wire.Fields) error
	limit(deadline time.Time)
	watch(left func()) (stop func())
}

// Read reads the body. It gives io.EOF only when the body has come whole, and
// an error that is os.ErrDeadlineExceeded for a client that is too slow. The
// first call tells a client that waits for it to go on.
func (x *Exchange) Read(p []byte) (int, error) { return x.peer.read(p) }

// Trailer gives the fields after the body, once Read has given io.EOF.
func (x *Exchange) Trailer() wire.Fields { return x.peer.trailer() }

// Interim passes an interim answer (1xx) on, at once. HTTP/1.0 knows none, and
// gets none.
func (x *Exchange) Interim(status int, reason string, fields wire.Fields) error {
	if x.headed {
		return nil
	}
	return x.peer.interim(status, reason, fields)
}

// Head begins the answer. The fields must not hold framing and hop-by-hop
// fields, which Head adds as the connection needs them. length is that of the
// body, [wire.Chunked] when nobody knows it yet, or [NoBody].
// Answers to HEAD, 204 and 304 have no body: what is written of one is dropped,
// and its length is only announced. Nothing is sent before Flush, End, or more
// bytes than a buffer holds.
func (x *Exchange) Head(status int, reason string, fields wire.Fields, length int64) {
	x.headed = true
	x.peer.head(status, reason, fields, length)
}

// NoBody is the length of an answer that neither has a body nor tells of one.
const NoBody int64 = -3

// Write writes a part of the body. A client that does not take it in time, or
// has gone, is an error.
func (x *Exchange) Write(b []byte) error { return x.peer.write(b) }

// Flush sends what was written.
func (x *Exchange) Flush() error { return x.peer.flush() }

// WriteLimit sets a time after which writing fails, beside the limit that each
// write has; zero takes it away.
func (x *Exchange) WriteLimit(deadline time.Time) { x.peer.limit(deadline) }

// End ends the answer and sends what is left of it. The trailer is dropped where
// there is no place for one.
func (x *Exchange) End(trailer wire.Fields) error {
	if x.ended || x.aborted {
		return nil // a second end would stand before the next answer
	}
	x.ended = true
	return x.peer.end(trailer)
}

// Watch calls left, at most once and from another goroutine, when the client
// closes its side of the connection or resets its stream before stop is called. stop waits
// for a call that is under way. The body must have been read; without that, or
// when the client has sent its next request already, nothing is watched.
func (x *Exchange) Watch(left func()) (stop func()) { return x.peer.watch(left) }

// Abort resets the connection, or the stream, after the handler has returned.
// The client sees that it has no answer, or no whole one.
func (x *Exchange) Abort() { x.aborted = true }

// Headed reports whether an answer has begun.
func (x *Exchange) Headed() bool { return x.headed }

// HTTP gives net/http's view of an exchange over HTTP/2, nil otherwise. Whoever
// answers by it answers nothing by the exchange.
func (x *Exchange) HTTP() (http.ResponseWriter, *http.Request) {
	s, ok := x.peer.(*stream)
	if !ok {
		return nil, nil
	}
	x.headed, x.ended = true, true
	return s.w, s.r
}

// Tunnel answers 101 with the fields, and then carries bytes between the client
// and conn, which it closes, until one of them ends, nothing has passed for idle,
// or the server stops. first is what the other side has said already. It reports
// false over HTTP/2, which has no such upgrade (RFC 9113 section 8.6).
func (x *Exchange) Tunnel(reason string, fields wire.Fields, other net.Conn, first []byte, idle time.Duration) bool {
	c, ok := x.peer.(*session)
	if !ok {
		return false
	}
	x.headed, x.ended = true, true
	c.tunnel(reason, fields, other, first, idle)
	return true
}
