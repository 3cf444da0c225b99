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
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// chunkBytes is the size of a chunk: asynchronous publishes of so much cost the
// least CPU per byte, well below the broker's default max_payload of 1 MiB.
const chunkBytes = 256 << 10

// growBody is the first size of a buffer for a body that is not here yet.
const growBody = 4 << 10

// readBody reads the body into memory, most bytes of it at most, and says whether
// that was all. Room is taken as bytes come, not as they are announced: a client
// that announces much and sends little must not keep others out.
func (t *transaction) readBody(most int64) (whole, ok bool) {
	body := t.b.body[:0]
	defer func() { t.b.body = body }()
	for int64(len(body)) < most {
		if len(body) == cap(body) {
			body = slices.Grow(body, int(min(int64(max(len(body), growBody)), most-int64(len(body)))))
		}
		m, err := t.x.Read(body[len(body):min(int64(cap(body)), most)])
		body = body[:len(body)+m]
		switch {
		case int64(len(body)) > t.rt.MaxBody:
			t.refuse(t.tooLarge())
			return false, false
		case !t.hold(int64(m)):
			return false, false
		case errors.Is(err, io.EOF):
			return true, true
		case err != nil:
			t.clientBroke(err)
			return false, false
		}
	}
	return most == 0, true
}

// readToFile writes what was read so far and the rest of a body of unknown
// length to a temporary file, and gives it back at its start.
func (t *transaction) readToFile() (f *os.File, size int64, ok bool) {
	f, err := os.CreateTemp(t.h.bodyDir, "body-")
	if err == nil {
		// The name is not needed: what is left goes with the process.
		err = os.Remove(f.Name())
	}
	if err == nil {
		_, err = f.Write(t.b.body)
	}
	size = int64(len(t.b.body))
	buf := t.b.answer
	for err == nil {
		var m int
		var rerr error
		m, rerr = t.x.Read(buf)
		if size += int64(m); size > t.rt.MaxBody {
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
	rf := refusal{status: http.StatusBadRequest, err: errRequestError, detail: "the body did not come whole"}
	var syntax *wire.SyntaxError
	switch {
	case errors.As(err, &syntax):
		rf.status, rf.detail = syntax.Status, syntax.Reason
	case errors.Is(err, os.ErrDeadlineExceeded):
		rf.status, rf.detail = http.StatusRequestTimeout, "the body did not come in time"
	}
	// The connection is most likely gone; where only the framing was wrong, or
	// the client has fallen silent, it learns of it.
	t.refuse(rf)
	t.errText = "the body did not come whole: " + err.Error()
}

// serveChunked captures a body of size bytes, above the inline limit, while it is
// forwarded, announced as framing says. An API that fails meanwhile does not stop
// the capture.
func (t *transaction) serveChunked(body io.Reader, size, framing int64) {
	if !t.hold(max(2*chunkBytes-t.held, 0)) {
		return
	}
	chunks := int((size + chunkBytes - 1) / chunkBytes)
	if !t.reserve(size, chunks, framing) {
		return
	}
	t.describe(size)
	t.appended, t.begun = time.Now(), time.Now()
	api, sendErr := t.rt.pool.Begin(t.begun.Add(t.rt.Policy.Timeout), t.x.Request.Method, size, nil, t.headForAPI()...)
	whole := false
	defer func() {
		if api != nil && !whole {
			api.Close()
		}
	}()

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
			sendErr = api.Extend(time.Now().Add(t.rt.Policy.Timeout))
		}
		if sendErr == nil {
			_, sendErr = api.Write(part)
		}
	}
	whole = true
	t.request.Chunks = chunks
	t.request.SHA256 = hex.EncodeToString(hash.Sum(nil))
	t.capture(nil)
	if api != nil && sendErr != nil {
		sendErr = api.EarlyAnswer(sendErr)
	}
	t.finish(api, sendErr)
}

func (t *transaction) appendChunk(n int, data []byte) {
	if !t.captured {
		return
	}
	c := capture.Chunk{ID: t.id, Route: t.rt.Name, Ingress: t.h.ingress, Number: n}
	t.b.record = c.Message(t.x.Request.Method).AppendEnvelope(t.b.record[:0])
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
	a := capture.Abandon{ID: t.id, Route: t.rt.Name, Ingress: t.h.ingress}
	t.b.record = a.Message(t.x.Request.Method).AppendEnvelope(t.b.record[:0])
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
