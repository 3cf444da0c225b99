package completion

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
)

// Names of the headers that Holdfast sets on the requests it passes to the API.
const (
	// HeaderID carries the UUID of the request.
	HeaderID = "X-Request-UUID"
	// HeaderAttempt carries the number of the attempt; it is absent on the first.
	HeaderAttempt = "X-Request-Attempt"
	// HeaderReplay carries the id of the replay run that sent the request; it is
	// absent on the first attempt.
	HeaderReplay = "X-Request-Replay"
)

// Request is what the middleware knows of the request being handled.
type Request struct {
	ID      string // the X-Request-UUID
	Attempt int    // the X-Request-Attempt, 1 when it is absent
	Replay  string // the X-Request-Replay, empty when it is absent
}

// Event returns the event that reports the outcome of this attempt.
func (r Request) Event(outcome Outcome, detail string) Event {
	return Event{ID: r.ID, Outcome: outcome, Attempt: r.Attempt, Detail: detail}
}

// FromContext returns the request that [Middleware] put into the context of a
// handler. It reports false where there is none: the middleware is not there,
// or the request did not come through Holdfast.
func FromContext(ctx context.Context) (Request, bool) {
	s, ok := ctx.Value(contextKey{}).(*state)
	if !ok {
		return Request{}, false
	}
	return s.request, true
}

// Hold takes the report of the request over from [Middleware], which then
// reports nothing: for a handler that answers before its work is done, or that
// knows better than its status. The caller calls [Client.Report] with the
// request's [Request.Event] when the outcome is known. Hold works until the
// handler returns, from any goroutine, and may be called again. It reports
// false like [FromContext].
func Hold(ctx context.Context) (Request, bool) {
	s, ok := ctx.Value(contextKey{}).(*state)
	if !ok {
		return Request{}, false
	}
	s.held.Store(true)
	return s.request, true
}

type contextKey struct{}

type state struct {
	request Request
	held    atomic.Bool
}

// Middleware reports the outcome of every request with an X-Request-UUID when
// its handler has returned, and makes the UUID known to the handler through
// [FromContext]. Requests without a valid one pass untouched.
//
//   - 2xx and 3xx: processed. So the handler must have committed its work by the
//     time it returns; if it has not, it calls [Hold].
//   - 5xx and a panic: failed. The panic goes on as it was.
//   - 4xx: nothing. The route's rule for statuses decides.
//   - a hijacked connection, and a request that was held: nothing.
//
// An event that [Client.Report] does not take is given to [Options.OnDrop];
// the answer is not affected.
//
// The answer's writer keeps [http.Flusher], [http.Hijacker] and
// [io.ReaderFrom], and the rest by way of [http.ResponseController].
//
// X-Request-UUID is believed as it comes: an API that can be reached past
// Holdfast must keep clients from setting it.
func Middleware(c *Client) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id := r.Header.Get(HeaderID)
			if !isUUID(id) {
				next.ServeHTTP(w, r)
				return
			}
			s := &state{request: Request{ID: id, Attempt: parseAttempt(r.Header.Get(HeaderAttempt)), Replay: r.Header.Get(HeaderReplay)}}
			rw := &responseWriter{ResponseWriter: w}

			// Not recovered, so that the panic keeps its stack; Goexit ends here too.
			returned := false
			defer func() {
				if !returned && !s.held.Load() {
					c.take(s.request.Event(Failed, "the handler panicked"))
				}
			}()
			next.ServeHTTP(rw, r.WithContext(context.WithValue(r.Context(), contextKey{}, s)))
			returned = true

			if s.held.Load() || rw.hijacked {
				return
			}
			switch status := rw.statusOrOK(); {
			case status >= 500:
				c.take(s.request.Event(Failed, fmt.Sprintf("answered %d", status)))
			case status >= 200 && status < 400:
				c.take(s.request.Event(Processed, ""))
			}
		})
	}
}

// take reports for the middleware, which has nobody to return an error to.
func (c *Client) take(e Event) {
	if err := c.Report(e); err != nil {
		c.announce(e, err)
	}
}

// parseAttempt returns 1 for anything that is not a number of an attempt: the
// gateway sends none with the first.
func parseAttempt(value string) int {
	n, err := strconv.Atoi(value)
	if err != nil || n < 1 || n > maxAttempt {
		return 1
	}
	return n
}

// responseWriter remembers the status. Like every http.ResponseWriter it is
// used by one goroutine at a time.
type responseWriter struct {
	http.ResponseWriter
	status   int // 0 until the final header is written
	hijacked bool
}

func (w *responseWriter) statusOrOK() int {
	if w.status == 0 {
		return http.StatusOK
	}
	return w.status
}

// WriteHeader remembers the first final status. 101 is final: it ends HTTP.
func (w *responseWriter) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	w.status = w.statusOrOK()
	return w.ResponseWriter.Write(p)
}

// ReadFrom lets io.Copy use the server's sendfile.
func (w *responseWriter) ReadFrom(r io.Reader) (int64, error) {
	w.status = w.statusOrOK()
	return io.Copy(w.ResponseWriter, r)
}

// Flush does nothing where the server cannot flush.
func (w *responseWriter) Flush() { _ = w.FlushError() }

func (w *responseWriter) FlushError() error {
	err := http.NewResponseController(w.ResponseWriter).Flush()
	if err == nil {
		w.status = w.statusOrOK()
	}
	return err
}

// Hijack gives the connection away; what becomes of it is not seen here.
func (w *responseWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buf, err := http.NewResponseController(w.ResponseWriter).Hijack()
	w.hijacked = w.hijacked || err == nil
	return conn, buf, err
}

// Unwrap is for [http.ResponseController].
func (w *responseWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
