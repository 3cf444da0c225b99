package ingress

import (
	"errors"
	"io"
	"sync/atomic"
	"time"

	"github.com/holdfast-io/holdfast/ingress/internal/edge"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/upstream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// passInterim passes an interim answer of the API on. "100 Continue" is between
// the gateway and the API: the client has had its own.
func (t *transaction) passInterim(resp *wire.Response) {
	if resp.Status == 100 || t.x.Headed() {
		return
	}
	_ = t.x.Interim(resp.Status, resp.Reason, t.endToEnd(resp)) // a client that has gone is found later
}

// passAnswer takes the API's answer to the client, and decides the outcome at
// its end, before the last byte goes out.
func (t *transaction) passAnswer(api *upstream.Exchange, resp *wire.Response) {
	verdict := t.rt.Policy.Verdict(resp.Status, true, false)
	if t.mustReset(verdict, nil) {
		t.outcome(resp.Status, verdict, "")
		t.reset()
		return
	}
	first, err := t.readFirst(api, resp)
	if t.rt.KeepAnswers > 0 && t.captured {
		t.beginKeeping(resp)
		t.kept.add(t, first, err == io.EOF)
	}
	switch {
	case err == io.EOF:
		// The whole answer is here, and nothing has gone out yet.
		t.outcome(resp.Status, verdict, "")
		if t.rt.Accept && verdict == capture.Failed && t.state == storedSynced {
			t.accepted()
			return
		}
		trailer := trailerFields(api.Trailer())
		length := t.announced(resp)
		if length == wire.Chunked && len(trailer) == 0 {
			length = int64(len(first))
		}
		t.writeHead(resp, length)
		_ = t.x.Write(first) // a client that has gone changes nothing
		_ = t.x.End(trailer)
	case err != nil:
		t.noAnswer(err)
	case t.rt.Accept && verdict == capture.Failed && t.state == storedSynced:
		t.outcome(resp.Status, verdict, "")
		t.accepted()
	default:
		t.stream(api, resp, first, verdict)
	}
}

// announced is the length of the answer's body as the client is told it.
func (t *transaction) announced(resp *wire.Response) int64 {
	switch {
	case resp.Status == 204:
		return edge.NoBody
	case resp.Status == 304 || t.x.Request.Method == "HEAD":
		// It tells the length that the answer to a GET would have, if any.
		if resp.Announced < 0 {
			return edge.NoBody
		}
		return resp.Announced
	case resp.Length < 0:
		return wire.Chunked
	}
	return resp.Length
}

// readFirst reads the first part of the answer's body. The error is io.EOF
// when that was all. What is not captured has no outcome to wait for: its head
// goes out alone when nothing follows it at once, so that a client sees a stream
// open. A captured one holds it back, and may still answer for an API that fails
// after its head.
func (t *transaction) readFirst(api *upstream.Exchange, resp *wire.Response) ([]byte, error) {
	if !t.captured && api.Waiting() {
		return nil, nil
	}
	buf := t.b.answer
	n, err := 0, error(nil)
	for err == nil && n < len(buf) {
		var m int
		m, err = api.Read(buf[n:])
		n += m
		// What cannot be here whole, or may be a stream, goes out as it comes.
		if m > 0 && (resp.Length < 0 || resp.Length > int64(len(buf)) || !t.captured) {
			break
		}
	}
	return buf[:n], err
}

// stream passes a long answer on as it comes. Its end is held back until the
// outcome is written: the last byte of a known length, else the end of the coding.
func (t *transaction) stream(api *upstream.Exchange, resp *wire.Response, part []byte, verdict capture.Verdict) {
	t.writeHead(resp, t.announced(resp))
	now := time.Now()
	deadline := t.begun.Add(t.rt.Policy.Timeout)
	// A client may take its time, but the outcome must be known before the grace
	// is over: a request without one would be sent again while this one is answered.
	patience := deadline.Add(t.rt.Policy.Grace / 2)
	latest := patience.Add(t.rt.Policy.Grace / 4)
	var left atomic.Bool // the client did, or has said all that it has to say
	if t.captured {
		t.x.WriteLimit(patience)
	} else {
		defer t.x.Watch(func() { left.Store(true); api.Interrupt(time.Now().Add(leftPause)) })()
	}
	gone := false
	for {
		if !gone {
			begun := now
			if t.x.Write(part) != nil || t.x.Flush() != nil {
				gone = true // the API's answer is still read, to know how it ended
			}
			now = time.Now()
			// The time limit is for the API: one whose client reads slowly has not
			// failed.
			deadline = deadline.Add(now.Sub(begun))
		}
		switch {
		case !t.captured:
			// Nobody waits for a verdict: a stream may go on for as long as it moves.
			deadline = now.Add(t.rt.Policy.Timeout)
		case latest.Before(deadline):
			deadline = latest
		}
		if !t.captured && gone {
			t.errText = "the client left"
			t.x.Abort()
			return
		}
		_ = api.Extend(deadline) // a failure shows in the next read
		if left.Load() {
			_ = api.Extend(earlier(deadline, now.Add(leftPause)))
		}
		n, err := api.Read(t.b.answer)
		now = time.Now()
		part = t.b.answer[:n]
		if t.kept != nil {
			t.kept.add(t, part, errors.Is(err, io.EOF))
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			t.outcome(resp.Status, verdict, "")
			t.x.WriteLimit(time.Time{})
			_ = t.x.Write(part)
			_ = t.x.End(trailerFields(api.Trailer()))
			return
		default:
			if t.errText = err.Error(); left.Load() {
				t.errText = "the client left"
			}
			t.outcome(resp.Status, capture.Failed, clip(err.Error()))
			_ = t.x.Write(part)
			_ = t.x.Flush()
			t.reset()
			return
		}
	}
}

// leftPause bounds the pauses of a stream whose client has closed its side. It
// may be there to the end of the answer, which a part that is written to it
// tells; when nothing is written, nobody would ever know.
const leftPause = 2 * time.Second

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// writeHead begins the answer with the API's status and fields.
func (t *transaction) writeHead(resp *wire.Response, length int64) {
	t.code = resp.Status
	fields := t.endToEnd(resp)
	fields = append(fields, wire.Field{Name: "Via", Value: "1.1 holdfast"})
	t.x.Head(t.code, resp.Reason, appendOwn(fields, t.id.String(), t.state), length)
}

// endToEnd gives the fields of an answer of the API that are the client's.
func (t *transaction) endToEnd(resp *wire.Response) wire.Fields {
	fields := t.x.Answer[:0]
	for i := range resp.Fields {
		f := &resp.Fields[i]
		if f.Kind.HopByHop() || f.Kind == wire.ContentLength || capture.IsOwnHTTPHeader(f.Name) || nominated(resp.Nominated, f.Name) {
			continue
		}
		fields = append(fields, *f)
	}
	return fields
}

// proxyUncaptured passes a request on that the route does not capture. Its body
// and its answer may go on for as long as they move.
func (t *transaction) proxyUncaptured() {
	req := &t.x.Request
	size := req.Length
	if !t.hold(min(max(size, 0), chunkBytes)) {
		return
	}
	t.b.head = t.h.head.append(t.b.head[:0], t.x, t.rt, t.framing(size))
	t.begun = time.Now()
	api, err := t.rt.pool.Begin(t.begun.Add(t.rt.Policy.Timeout), req.Method, size, nil, t.headForAPI()...)
	if err == nil && size != 0 {
		if err = t.copyBody(api, size); err != nil {
			var uerr *upstream.Error
			if !errors.As(err, &uerr) {
				api.Close()
				t.clientBroke(err)
				return
			}
			err = api.EarlyAnswer(err)
		}
	}
	t.finish(api, err)
}

// copyBody sends the client's body on as it comes. The API has its whole time
// again with each part: the time limit is not for a client that uploads slowly.
func (t *transaction) copyBody(api *upstream.Exchange, size int64) error {
	buf := t.b.answer
	var coded []byte
	send := func(b []byte) error {
		if err := api.Extend(time.Now().Add(t.rt.Policy.Timeout)); err != nil {
			return err
		}
		_, err := api.Write(b)
		return err
	}
	for {
		n, rerr := t.x.Read(buf)
		part := buf[:n]
		if size < 0 && n > 0 {
			coded = wire.AppendChunk(coded[:0], part)
			part = coded
		}
		if len(part) > 0 {
			if err := send(part); err != nil {
				return err
			}
		}
		switch {
		case rerr == nil:
		case !errors.Is(rerr, io.EOF):
			return rerr
		case size >= 0:
			return nil
		default:
			err := send(wire.AppendLastChunk(coded[:0], trailerFields(t.x.Trailer())))
			api.Sent()
			return err
		}
	}
}
