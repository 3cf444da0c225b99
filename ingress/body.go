package ingress

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"time"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// chunkBytes is the size of a chunk: asynchronous publishes of so much cost the
// least CPU per byte, well below the broker's default max_payload of 1 MiB.
const chunkBytes = 256 << 10

// clientBody reads the client's body, and gives up when nothing comes for too
// long: a client that falls silent must not hold what it has been given.
type clientBody struct {
	body    io.Reader
	control *http.ResponseController
	stalled time.Duration
}

func (t *transaction) clientBody() clientBody {
	return clientBody{t.r.Body, http.NewResponseController(t.w), t.h.times.stalled}
}

func (c clientBody) Read(b []byte) (int, error) {
	if err := c.control.SetReadDeadline(time.Now().Add(c.stalled)); err != nil {
		return 0, err
	}
	return c.body.Read(b)
}

// done takes the time limit away: the server goes on reading, to notice a client
// that leaves.
func (c clientBody) done() { _ = c.control.SetReadDeadline(time.Time{}) }

// growBody is the first size of a buffer for a body of unknown length.
const growBody = 4 << 10

// readInline reads the body into memory. size is its length, or -1 when it is
// unknown: then no more than the inline limit and one byte are read, and whole
// says whether that was all.
func (t *transaction) readInline(size int64) (n int, whole, ok bool) {
	if size == 0 {
		t.b.body = t.b.body[:0]
		return 0, true, true
	}
	if size > 0 {
		if int64(cap(t.b.body)) < size {
			t.b.body = make([]byte, size)
		}
		t.b.body = t.b.body[:size]
		// The server's own time limit for head and body is enough for so little.
		if _, err := io.ReadFull(t.r.Body, t.b.body); err != nil {
			t.clientBroke(err)
			return 0, false, false
		}
		return int(size), true, true
	}
	src := t.clientBody()
	defer src.done()
	limit := int(t.h.inline) + 1
	body := t.b.body[:0]
	defer func() { t.b.body = body }()
	for {
		if len(body) == cap(body) {
			body = slices.Grow(body, growBody)
		}
		m, err := src.Read(body[len(body):min(cap(body), limit)])
		body = body[:len(body)+m]
		switch {
		case int64(len(body)) > t.rt.maxBody:
			t.refuse(t.tooLarge())
			return 0, false, false
		case !t.hold(int64(m)):
			return 0, false, false
		case len(body) == limit:
			return len(body), false, true
		case errors.Is(err, io.EOF):
			return len(body), true, true
		case err != nil:
			t.clientBroke(err)
			return 0, false, false
		}
	}
}

// readToFile writes what was read so far and the rest of a body of unknown
// length to a temporary file, and gives it back at its start.
func (t *transaction) readToFile(n int) (f *os.File, size int64, ok bool) {
	f, err := os.CreateTemp(t.h.bodyDir, "body-")
	if err == nil {
		// The name is not needed: what is left goes with the process.
		err = os.Remove(f.Name())
	}
	if err == nil {
		_, err = f.Write(t.b.body[:n])
	}
	size = int64(n)
	buf := make([]byte, 64<<10)
	src := t.clientBody()
	defer src.done()
	for err == nil {
		var m int
		var rerr error
		m, rerr = src.Read(buf)
		if size += int64(m); size > t.rt.maxBody {
			f.Close()
			t.refuse(t.tooLarge())
			return nil, 0, false
		}
		if !t.hold(int64(m)) {
			f.Close()
			return nil, 0, false
		}
		if _, err = f.Write(buf[:m]); err != nil {
			break
		}
		if errors.Is(rerr, io.EOF) {
			if _, err = f.Seek(0, io.SeekStart); err == nil {
				t.b.body = nil
				return f, size, true
			}
		} else if rerr != nil {
			f.Close()
			t.clientBroke(rerr)
			return nil, 0, false
		}
	}
	if f != nil {
		f.Close()
	}
	t.h.log.Error("writing a body to disk failed", "request_id", t.id.String(), "err", err)
	t.refuse(refusal{status: http.StatusServiceUnavailable, err: errProxyInternal, retry: t.h.retryAfter,
		detail: "there is no room to take the body, and the request was not forwarded"})
	return nil, 0, false
}

// clientBroke ends a request whose body did not come whole. It was neither
// captured nor forwarded as whole.
func (t *transaction) clientBroke(err error) {
	t.errText = "the body did not come whole: " + err.Error()
	var tooLarge *http.MaxBytesError
	if errors.As(err, &tooLarge) {
		t.refuse(t.tooLarge())
		return
	}
	// The connection is most likely gone; where only the framing was wrong, or
	// the client has fallen silent, it learns of it.
	status := http.StatusBadRequest
	if errors.Is(err, os.ErrDeadlineExceeded) {
		status = http.StatusRequestTimeout
	}
	t.w.Header().Set("Connection", "close")
	t.refuse(refusal{status: status, err: errRequestError, detail: "the body did not come whole"})
}

// serveChunked captures a body above the inline limit while it is forwarded.
// An API that fails meanwhile does not stop the capture.
func (t *transaction) serveChunked(body io.Reader, size int64) {
	if !t.hold(2 * chunkBytes) {
		return
	}
	chunks := int((size + chunkBytes - 1) / chunkBytes)
	if !t.reserve(size, chunks) {
		return
	}
	t.describe(size)
	t.appended, t.begun = time.Now(), time.Now()
	x, sendErr := t.rt.pool.Begin(t.begun.Add(t.rt.policy.Timeout), t.r.Method, size, nil, t.headForAPI()...)
	whole := false
	defer func() {
		if x != nil && !whole {
			x.Close()
		}
	}()

	if t.r.Body != nil && body == io.Reader(t.r.Body) {
		src := t.clientBody()
		defer src.done()
		body = src
	}
	buf := make([]byte, chunkBytes)
	hash := sha256.New()
	left := size
	for n := 0; left > 0; n++ {
		part := buf[:min(left, chunkBytes)]
		if _, err := io.ReadFull(body, part); err != nil {
			t.abandon()
			t.clientBroke(err)
			return
		}
		left -= int64(len(part))
		hash.Write(part)
		t.appendChunk(n, part)
		if sendErr == nil {
			// The time limit is for the API, not for a client that uploads slowly.
			sendErr = x.Extend(time.Now().Add(t.rt.policy.Timeout))
		}
		if sendErr == nil {
			_, sendErr = x.Write(part)
		}
	}
	whole = true
	t.request.Chunks = chunks
	t.request.SHA256 = hex.EncodeToString(hash.Sum(nil))
	t.capture(nil)
	if x != nil && sendErr != nil {
		sendErr = x.EarlyAnswer(sendErr)
	}
	t.finish(x, sendErr)
}

func (t *transaction) appendChunk(n int, data []byte) {
	if !t.captured {
		return
	}
	c := capture.Chunk{ID: t.id, Route: t.rt.name, Ingress: t.h.ingress, Number: n}
	t.b.record = c.Message(t.r.Method).AppendEnvelope(t.b.record[:0])
	place, err := t.res.Append(t.b.record, data)
	if err != nil {
		t.abandon()
		t.storeFailed(err)
		return
	}
	t.b.places = append(t.b.places, place)
}

// abandon says that no head will come for the chunks in the spool.
func (t *transaction) abandon() {
	if !t.captured || len(t.b.places) == 0 {
		return
	}
	a := capture.Abandon{ID: t.id, Route: t.rt.name, Ingress: t.h.ingress}
	t.b.record = a.Message(t.r.Method).AppendEnvelope(t.b.record[:0])
	if _, err := t.res.AppendWritten(t.b.record); err != nil {
		// The next start finds chunks without a head, and abandons them.
		t.h.log.Warn("abandoning chunks failed", "request_id", t.id.String(), "err", err)
	}
}

// waitSynced waits until all records of the capture are durable. Each is asked
// for: they may lie in segments of which an earlier one failed.
func (t *transaction) waitSynced() error {
	// Mostly the fsync is over when the API has answered, and a wait would cost
	// its timer for nothing.
	if len(t.b.places) == 1 {
		if done, err := t.h.spool.Synced(t.b.places[0]); done {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), t.h.times.store)
	defer cancel()
	for _, place := range t.b.places {
		if err := t.h.spool.WaitSynced(ctx, place); err != nil {
			return fmt.Errorf("wait for the capture to be durable: %w", err)
		}
	}
	return nil
}
