package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/holdfast-io/holdfast/pkg/service"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// maxStreams bounds the requests at a time on one connection.
const maxStreams = 128

// newHTTP2 makes the server of connections that have negotiated HTTP/2.
func (s *Server) newHTTP2() (*http.Server, *h2Listener) {
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	server := &http.Server{
		Handler:           http.HandlerFunc(s.serveHTTP2),
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: maxStreams, SendPingTimeout: s.o.IdleTimeout / 2, PingTimeout: s.o.WriteTimeout, WriteByteTimeout: s.o.WriteTimeout},
		ReadHeaderTimeout: s.o.HeadTimeout,
		IdleTimeout:       s.o.IdleTimeout,
		MaxHeaderBytes:    s.o.HeadBytes,
		ConnContext: func(ctx context.Context, nc net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, nc.(*tls.Conn).NetConn().(*watched).c)
		},
		// OPTIONS * is the API's, like every other target.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     service.ErrorLog(s.o.Logger, "http/2"),
	}
	if s.o.TLS != nil {
		server.TLSConfig = s.o.TLS.Clone() // net/http looks there for the protocols that were offered
	}
	return server, &h2Listener{addr: s.listener.Addr(), conns: make(chan net.Conn), done: make(chan struct{})}
}

// h2Listener is the listener of connections that were accepted elsewhere.
type h2Listener struct {
	addr  net.Addr
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *h2Listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *h2Listener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *h2Listener) Addr() net.Addr { return l.addr }

// handOver gives a connection to net/http, which closes it.
func (s *Server) handOver(c *tls.Conn) {
	_ = c.SetDeadline(time.Time{})
	select {
	case s.h2conns.conns <- c:
	case <-s.h2conns.done:
		_ = c.Close()
	}
}

// connKey is the key of the *conn in a request's context.
type connKey struct{}

// watched tells of the end of a connection that net/http closes.
type watched struct {
	*net.TCPConn
	c *conn
}

func (w *watched) Close() error {
	err := w.TCPConn.Close()
	if w.c.handed {
		w.c.s.leave(w.c)
	}
	return err
}

// stream is one exchange over HTTP/2.
type stream struct {
	s        *Server
	x        Exchange
	w        http.ResponseWriter
	r        *http.Request
	control  *http.ResponseController
	until    time.Time
	begun    time.Time
	got      int64
	err      error // what ended the body
	noBody   bool
	unsent   int64 // bytes of a counted answer that are to come, negative when nobody counts
	trailers wire.Fields
}

func (s *Server) serveHTTP2(w http.ResponseWriter, r *http.Request) {
	c := r.Context().Value(connKey{}).(*conn)
	if !s.enterStream(c) {
		panic(http.ErrAbortHandler) // the client has gone
	}
	defer s.leaveStream(c)
	st := &stream{s: s, w: w, r: r, control: http.NewResponseController(w), noBody: r.Method == http.MethodHead}
	st.x.peer, st.x.TLS = st, true
	st.x.Remote = c.remote
	refused := st.request()
	defer func() {
		cause := recover()
		if cause != nil && cause != http.ErrAbortHandler {
			s.panicked(cause, debug.Stack())
		}
		if cause != nil || st.x.aborted || !st.x.ended || !st.x.headed {
			panic(http.ErrAbortHandler) // net/http's way to reset a stream
		}
	}()
	if refused != nil {
		s.o.Handler.Refuse(&st.x, refused)
		return
	}
	s.o.Handler.Serve(&st.x)
}

// request fills in the head. It refuses what net/http lets pass, and what would be
// something else in the request line and the Host field of HTTP/1.1.
func (st *stream) request() *wire.SyntaxError {
	r, req := st.r, &st.x.Request
	req.Method, req.Target, req.Major, req.Host = r.Method, r.RequestURI, 2, r.Host
	req.Length = r.ContentLength
	if r.ContentLength < 0 || len(r.Trailer) > 0 {
		req.Length = wire.Chunked // with trailers too: so they have their place in HTTP/1.1
	}
	names := make([]string, 0, len(r.Header))
	count := 0
	for name, values := range r.Header {
		names = append(names, name)
		count += len(values)
	}
	slices.Sort(names)
	req.Fields = make(wire.Fields, 0, count+1)
	for _, name := range names {
		for _, v := range r.Header[name] {
			req.Fields = req.Fields.Add(name, v)
		}
	}
	switch {
	case count > st.s.o.HeadFields:
		return &wire.SyntaxError{Status: 431, Reason: "the head has more fields than are allowed"}
	case !wire.IsToken(r.Method):
		return &wire.SyntaxError{Status: 400, Reason: "the method is no token"}
	case r.Host != "" && !wire.ValidHost(r.Host):
		return &wire.SyntaxError{Status: 400, Reason: "the :authority is not a host with an optional port"}
	case len(r.Header["Expect"]) > 0 && !wire.Equal(r.Header.Get("Expect"), "100-continue"):
		return &wire.SyntaxError{Status: 417, Reason: "no expectation but 100-continue can be met"}
	case len(r.Header["Host"]) > 1 || len(r.Header["Host"]) == 1 && !wire.Equal(r.Header.Get("Host"), r.Host):
		return &wire.SyntaxError{Status: 400, Reason: "the Host field names another host than :authority"}
	case !sameLength(r.Header["Content-Length"], r.ContentLength):
		return &wire.SyntaxError{Status: 400, Reason: "the Content-Length is not one number, or not that of the body"}
	case r.Method == http.MethodConnect:
		return &wire.SyntaxError{Status: 400, Reason: "this is no tunnel: CONNECT is not taken"}
	}
	if err := wire.CheckTarget(req.Method, req.Target); err != nil {
		var syntax *wire.SyntaxError
		errors.As(err, &syntax)
		return syntax
	}
	return nil
}

// sameLength reports whether the field says what net/http has understood.
func sameLength(field []string, length int64) bool {
	return len(field) == 0 || len(field) == 1 && field[0] == strconv.FormatInt(length, 10)
}

func (st *stream) read(p []byte) (int, error) {
	if st.err != nil {
		return 0, st.err
	}
	now := time.Now()
	if st.begun.IsZero() {
		st.begun = now
	}
	if err := st.control.SetReadDeadline(bodyDeadline(now, st.begun, st.got, st.s.o.BodyTimeout)); err != nil {
		return 0, err
	}
	n, err := st.r.Body.Read(p)
	st.got += int64(n)
	st.err = err
	if errors.Is(err, io.EOF) {
		_ = st.control.SetReadDeadline(time.Time{})
	}
	return n, err
}

func (st *stream) trailer() wire.Fields {
	if st.trailers == nil {
		for name, values := range st.r.Trailer {
			for _, v := range values {
				st.trailers = st.trailers.Add(name, v)
			}
		}
	}
	return st.trailers
}

func (st *stream) interim(status int, _ string, fields wire.Fields) error {
	h := st.w.Header()
	for _, f := range fields {
		h.Add(f.Name, f.Value)
	}
	st.w.WriteHeader(status)
	clear(h)
	return nil
}

func (st *stream) head(status int, _ string, fields wire.Fields, length int64) {
	h := st.w.Header()
	for _, f := range fields {
		h.Add(f.Name, f.Value)
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // net/http must not guess one
	}
	st.noBody = st.noBody || status == 204 || status == 304
	if st.unsent = length; length >= 0 && status != 204 {
		h["Content-Length"] = []string{strconv.FormatInt(length, 10)}
	}
	if st.s.draining.Load() {
		h["Connection"] = []string{"close"} // net/http sends GOAWAY for it
	}
	st.w.WriteHeader(status)
}

func (st *stream) write(b []byte) error {
	if len(b) == 0 || st.noBody {
		return nil
	}
	if st.unsent >= 0 {
		if int64(len(b)) > st.unsent {
			return errTooMuch
		}
		st.unsent -= int64(len(b))
	}
	st.deadline()
	_, err := st.w.Write(b)
	return err
}

func (st *stream) flush() error {
	st.deadline()
	return st.control.Flush()
}

func (st *stream) deadline() {
	deadline := time.Now().Add(st.s.o.WriteTimeout)
	if !st.until.IsZero() && st.until.Before(deadline) {
		deadline = st.until
	}
	_ = st.control.SetWriteDeadline(deadline) // what fails, fails in the write
}

func (st *stream) watch(left func()) (stop func()) {
	done := make(chan struct{})
	off := context.AfterFunc(st.r.Context(), func() { defer close(done); left() })
	return func() {
		if !off() {
			<-done
		}
	}
}

func (st *stream) limit(deadline time.Time) { st.until = deadline }

// end leaves the last frame to net/http, which sends it when the handler has
// returned.
func (st *stream) end(trailer wire.Fields) error {
	if st.unsent > 0 && !st.noBody {
		st.x.aborted = true
	}
	for _, f := range trailer {
		st.w.Header().Add(http.TrailerPrefix+f.Name, f.Value)
	}
	st.deadline()
	return nil
}
