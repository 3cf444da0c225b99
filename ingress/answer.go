package ingress

import (
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"strconv"
	"time"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/upstream"
)

// passAnswer takes the API's answer to the client, and decides the outcome at
// its end, before the last byte goes out.
func (t *transaction) passAnswer(x *upstream.Exchange, resp *http.Response) {
	verdict := t.rt.policy.Verdict(resp.StatusCode, true, false)
	if t.mustReset(verdict, nil) {
		t.outcome(resp.StatusCode, verdict, "")
		t.reset()
	}
	first, err := t.readFirst(x, resp)
	switch {
	case err == io.EOF:
		// The whole answer is here, and nothing has gone out yet.
		t.outcome(resp.StatusCode, verdict, "")
		if t.rt.accept && verdict == capture.Failed && t.state == storedSynced {
			t.accepted()
			return
		}
		t.writeTrailer(resp) // first: an answer with trailers must not get a length
		t.writeHead(resp)
		_, _ = t.w.Write(first) // a client that has gone changes nothing
	case err != nil:
		t.noAnswer(err)
	case t.rt.accept && verdict == capture.Failed && t.state == storedSynced:
		t.outcome(resp.StatusCode, verdict, "")
		t.accepted()
	default:
		t.stream(x, resp, first, verdict)
	}
}

// readFirst reads the first part of the answer's body. The error is io.EOF
// when that was all.
func (t *transaction) readFirst(x *upstream.Exchange, resp *http.Response) ([]byte, error) {
	buf := t.b.answer
	n, err := 0, error(nil)
	for err == nil && n < len(buf) {
		var m int
		m, err = x.Read(buf[n:])
		n += m
		// An answer of unknown length may be a stream of events: what has come
		// goes out at once. So does what cannot be here whole.
		if resp.ContentLength < 0 && m > 0 || resp.ContentLength > int64(len(buf)) {
			break
		}
	}
	return buf[:n], err
}

// stream passes a long answer as it comes. The last byte is held back until
// the outcome is written: with a known length by count, else the end of the
// chunked coding, which net/http writes when the handler returns.
func (t *transaction) stream(x *upstream.Exchange, resp *http.Response, first []byte, verdict capture.Verdict) {
	t.writeHead(resp)
	control := http.NewResponseController(t.w)
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }()
	deadline := t.begun.Add(t.rt.policy.Timeout)
	// A client may take its time, but the outcome must be known before the grace
	// is over: a request without one would be sent again while this one is answered.
	patience := deadline.Add(t.rt.policy.Grace / 2)
	latest := patience.Add(t.rt.policy.Grace / 4)
	decided, gone := false, false
	write := func(b []byte) {
		if gone || len(b) == 0 {
			return
		}
		begun := time.Now()
		limit := begun.Add(t.h.times.stalled)
		if t.captured && !decided && patience.Before(limit) {
			limit = patience
		}
		_ = control.SetWriteDeadline(limit)
		_, err := t.w.Write(b)
		if err == nil && resp.ContentLength < 0 {
			err = control.Flush()
		}
		if err != nil {
			gone = true // the API's answer is still read, to know how it ended
		}
		// The time limit is for the API: one whose client reads slowly has not
		// failed.
		if took := time.Since(begun); took > time.Millisecond {
			deadline = deadline.Add(took)
			if t.captured && latest.Before(deadline) {
				deadline = latest
			}
			_ = x.Extend(deadline) // a failure shows in the next read
		}
	}
	pending := first
	next := make([]byte, 32<<10)
	spare := t.b.answer
	for {
		n, err := x.Read(next)
		if n == 0 && err == nil {
			continue
		}
		if err != nil && !errors.Is(err, io.EOF) {
			t.errText = err.Error()
			t.outcome(resp.StatusCode, capture.Failed, clip(err.Error()))
			write(pending)
			write(next[:n])
			t.reset()
		}
		if errors.Is(err, io.EOF) {
			t.outcome(resp.StatusCode, verdict, "")
			decided = true
			write(pending)
			write(next[:n])
			t.writeTrailer(resp)
			return
		}
		write(pending)
		if resp.ContentLength < 0 {
			// Nothing tells which byte is the last one: the end of the coding is.
			write(next[:n])
			pending = nil
			continue
		}
		pending = next[:n]
		next, spare = spare[:cap(spare)], next
	}
}

// writeHead writes the API's status and headers, without those that end here.
func (t *transaction) writeHead(resp *http.Response) {
	t.code = resp.StatusCode
	h := t.w.Header()
	tokens := connectionTokens(resp.Header)
	for name, values := range resp.Header {
		if _, ok := hopByHop[name]; ok {
			continue
		}
		if _, ok := tokens[name]; ok {
			continue
		}
		if name[0] == 'X' && capture.IsOwnHTTPHeader(name) {
			continue
		}
		h[name] = values
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // the server must not guess one
	}
	switch {
	case resp.StatusCode == http.StatusNoContent:
	case resp.StatusCode == http.StatusNotModified, t.r.Method == http.MethodHead:
		// It tells the length that the answer to a GET would have.
		if length, ok := resp.Header["Content-Length"]; ok {
			h["Content-Length"] = length
		}
	case resp.ContentLength >= 0:
		h["Content-Length"] = []string{strconv.FormatInt(resp.ContentLength, 10)}
	}
	h["Via"] = append(h["Via"], "1.1 holdfast")
	t.setOwn(h)
	t.w.WriteHeader(t.code)
}

func (t *transaction) writeTrailer(resp *http.Response) {
	for name, values := range resp.Trailer {
		if _, hop := hopByHop[name]; !hop && !capture.IsOwnHTTPHeader(name) {
			t.w.Header()[http.TrailerPrefix+name] = values
		}
	}
}

// proxyUncaptured passes a request that the route does not capture.
func (t *transaction) proxyUncaptured() {
	if !t.hold(min(max(t.r.ContentLength, 0), chunkBytes)) {
		return
	}
	size := t.r.ContentLength
	declared := size
	if size == 0 && t.r.Header["Content-Length"] == nil {
		declared = -1
	}
	t.b.head = t.h.head.append(t.b.head[:0], t.r, t.rt, declared)
	head := t.headForAPI()
	if size < 0 {
		head[0] = append(head[0], "Transfer-Encoding: chunked\r\n"...)
	}
	t.begun = time.Now()
	x, err := t.rt.pool.Begin(t.begun.Add(t.rt.policy.Timeout), t.r.Method, size, nil, head...)
	if err == nil && size != 0 {
		if err = t.copyBody(x, size); err != nil {
			var uerr *upstream.Error
			if !errors.As(err, &uerr) {
				x.Close()
				t.clientBroke(err)
				return
			}
			err = x.EarlyAnswer(err)
		}
	}
	t.finish(x, err)
}

// copyBody sends the client's body on as it comes.
func (t *transaction) copyBody(x *upstream.Exchange, size int64) error {
	src := t.clientBody()
	defer src.done()
	var dst io.Writer = patient{x, t.rt.policy.Timeout}
	var coding io.WriteCloser
	if size < 0 {
		coding = httputil.NewChunkedWriter(dst)
		dst = coding
		src.body = http.MaxBytesReader(t.w, t.r.Body, t.rt.maxBody)
	}
	_, err := io.Copy(dst, src)
	if err == nil && coding != nil {
		if err = coding.Close(); err == nil {
			_, err = io.WriteString(x, "\r\n")
		}
		x.Sent()
	}
	return err
}

// patient gives the API its whole time again with each part of a body: the time
// limit is not for a client that uploads slowly.
type patient struct {
	x       *upstream.Exchange
	timeout time.Duration
}

func (p patient) Write(b []byte) (int, error) {
	if err := p.x.Extend(time.Now().Add(p.timeout)); err != nil {
		return 0, err
	}
	return p.x.Write(b)
}
