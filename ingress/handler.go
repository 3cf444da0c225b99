package ingress

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/ingress/internal/edge"
	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/route"
	"github.com/holdfast-io/holdfast/pkg/spool"
	"github.com/holdfast-io/holdfast/pkg/upstream"
	"github.com/holdfast-io/holdfast/pkg/wire"
)

// stored is the value of X-Request-Stored; empty on requests that are not
// captured.
type stored string

const (
	storedSynced stored = "synced"
	storedNo     stored = "no"
)

// handler serves clients.
type handler struct {
	routes     *destinations
	head       headWriter
	spool      *spool.Spool
	ingress    string
	inline     int64
	maxHead    int64
	bodyDir    string // for bodies of unknown length above the inline limit
	inflight   *limiter
	times      timings
	retryAfter time.Duration
	accessLog  string
	log        *slog.Logger
	m          *metrics
	stored     atomic.Int64 // captures that were durable when their answers were let go
	buffers    sync.Pool    // *buffers
}

// buffers is what one request needs while it is in flight.
type buffers struct {
	head   []byte           // captured head
	tail   []byte           // what only the API is told
	record []byte           // envelope, outcome
	body   []byte           // inline body
	answer []byte           // first part of the answer
	kept   []byte           // of the answer, where the route keeps it
	places []spool.Position // of the capture and its chunks
}

// transaction is one request on its way through the gateway.
type transaction struct {
	h   *handler
	x   *edge.Exchange
	rt  *destination
	b   *buffers
	id  uuid.UUID
	now time.Time // of receipt

	res      spool.Reservation
	captured bool      // room is reserved, and the capture is in the spool once it is appended
	appended time.Time // when it was
	request  capture.Request
	state    stored
	begun    time.Time // when forwarding began
	held     int64     // bytes of h.inflight
	answered bool      // the head of the API's answer has come
	kept     *keptAnswer
	code     int    // what the client got, 0: a reset connection
	errText  string // for the access log
}

// answerBuffer is how much of an answer is read before its first byte goes out:
// an answer that ends within it is known to be whole, and costs one write.
const answerBuffer = 16 << 10

// Serve takes one request through the steps of the package's contract.
func (h *handler) Serve(x *edge.Exchange) {
	now := time.Now()
	rt := h.routes.match(&x.Request)
	if rt == nil {
		h.refuse(x, refusal{status: http.StatusNotFound, err: errDestinationNotFound, detail: "no route matches this request"})
		return
	}
	id, err := uuid.NewV7()
	if err != nil {
		h.refuse(x, refusal{status: http.StatusInternalServerError, err: errProxyInternal, detail: "no UUID could be made"})
		return
	}
	b, _ := h.buffers.Get().(*buffers)
	if b == nil {
		b = &buffers{answer: make([]byte, answerBuffer)}
	}
	t := &transaction{h: h, x: x, rt: rt, b: b, id: id, now: now}
	defer t.end()
	t.serve()
}

// Refuse answers what is not valid HTTP, or comes too slowly.
func (h *handler) Refuse(x *edge.Exchange, err *wire.SyntaxError) {
	h.refuse(x, refusal{status: err.Status, err: errRequestError, detail: err.Reason})
}

// refuse answers a request that belongs to no route.
func (h *handler) refuse(x *edge.Exchange, rf refusal) {
	h.m.count(capture.UnknownRoute, x.Request.Method, rf.status, "")
	if h.accessLog == "all" {
		h.log.Info("request refused", "remote", x.Remote.String(), "code", rf.status, "err", rf.detail)
	}
	rf.write(x, uuid.Nil, "")
}

// end gives back what the transaction holds, whatever became of it.
func (t *transaction) end() {
	t.res.Release()
	t.h.inflight.release(t.held)
	t.h.m.count(t.rt.Name, t.x.Request.Method, t.code, t.state)
	t.log()
	// Over HTTP/2 a write that a reset stream ended may still be reading its buffer.
	if t.x.Request.Major == 1 && cap(t.b.body) <= int(t.h.inline)+chunkBytes && cap(t.b.head) <= 64<<10 {
		if cap(t.b.kept) > keptPooled {
			t.b.kept, t.b.record = nil, nil
		}
		t.h.buffers.Put(t.b)
	}
}

func (t *transaction) log() {
	if t.h.accessLog == "off" || t.h.accessLog == "errors" && t.code != 0 && t.code < 500 && t.state != storedNo {
		return
	}
	t.h.log.Info("request", "request_id", t.id.String(), "route", t.rt.Name, "method", t.x.Request.Method, "code", t.code,
		"stored", string(t.state), "duration_ms", time.Since(t.now).Milliseconds(), "err", t.errText)
}

func (t *transaction) refuse(rf refusal) {
	t.code, t.errText = rf.status, rf.detail
	rf.write(t.x, t.id, t.state)
}

// serve chooses how the request travels.
func (t *transaction) serve() {
	req := &t.x.Request
	upgrade := t.upgrade()
	switch {
	case upgrade != "":
		t.tunnel(upgrade)
	case !t.rt.Captures(req.Method) && t.isGRPC():
		t.proxyGRPC()
	case !t.rt.Captures(req.Method):
		t.proxyUncaptured()
	case t.isGRPC():
		t.refuse(refusal{status: http.StatusUnsupportedMediaType, err: errRequestError,
			detail: "gRPC cannot be captured: its calls need a route that captures none"})
	case req.Length > t.rt.MaxBody:
		t.refuse(t.tooLarge())
	default:
		t.serveCaptured()
	}
}

// serveCaptured takes the body of a request that is captured. One of unknown
// length is read in full before anything is decided about it; a known one above
// the inline limit is captured while it passes.
func (t *transaction) serveCaptured() {
	size := t.x.Request.Length
	if size > t.h.inline {
		// Not before the first part is here does it cost more than a connection.
		if _, ok := t.readBody(min(size, chunkBytes)); ok {
			t.serveChunked(io.MultiReader(bytes.NewReader(t.b.body), t.x), size, size)
		}
		return
	}
	most := size
	if size < 0 {
		most = t.h.inline + 1
	}
	whole, ok := t.readBody(most)
	if !ok {
		return
	}
	if whole || size >= 0 {
		if trailer := t.trailer(); len(trailer) > 0 {
			var coded []byte
			if len(t.b.body) > 0 { // an empty chunk would be the end
				coded = wire.AppendChunk(coded, t.b.body)
			}
			t.b.body = wire.AppendLastChunk(coded, trailer)
			t.serveInline(wire.Chunked)
			return
		}
		if size < 0 {
			size = int64(len(t.b.body))
		}
		t.serveInline(t.framing(size))
		return
	}
	file, size, ok := t.readToFile()
	if !ok {
		return
	}
	defer file.Close()
	if trailer := t.trailer(); len(trailer) > 0 {
		// One chunk holds it all: its size is known by now.
		before := wire.AppendChunkSize(nil, size)
		after := wire.AppendLastChunk([]byte("\r\n"), trailer)
		body := io.MultiReader(bytes.NewReader(before), file, bytes.NewReader(after))
		t.serveChunked(body, int64(len(before)+len(after))+size, wire.Chunked)
		return
	}
	t.serveChunked(file, size, size)
}

// trailer gives what is passed on of the trailer section of a body that was read.
// A request that has one is captured in the chunked coding, which alone has a
// place for it: what is stored is what is sent.
func (t *transaction) trailer() wire.Fields {
	if fields := t.x.Trailer(); len(fields) > 0 {
		return trailerFields(fields)
	}
	return nil
}

// framing is how a body of this length is announced: as the client did, where it
// sent none.
func (t *transaction) framing(length int64) int64 {
	if length == 0 && !t.x.Request.Fields.Has("Content-Length") && t.x.Request.Length == 0 {
		return noFraming
	}
	return length
}

func (t *transaction) tooLarge() refusal {
	return refusal{status: http.StatusRequestEntityTooLarge, err: errRequestError,
		detail: "the body has more than the " + strconv.FormatInt(t.rt.MaxBody, 10) + " bytes that are allowed"}
}

// hold takes n more bytes of the in-flight limit, or answers 503.
func (t *transaction) hold(n int64) bool {
	if !t.h.inflight.acquire(t.held, n) {
		t.refuse(refusal{status: http.StatusServiceUnavailable, err: errProxyInternal, retry: t.h.retryAfter,
			detail: "too many bytes are in flight"})
		return false
	}
	t.held += n
	return true
}

// reserve sets room aside in the spool for a body of size bytes in so many
// records, its head, which announces framing, and the outcome. Without room a required capture is refused;
// proceed is then false. With best_effort the request goes on uncaptured.
func (t *transaction) reserve(size int64, chunks int, framing int64) (proceed bool) {
	head := t.h.head.append(t.b.head[:0], t.x, t.rt, framing)
	t.b.head = head
	// An abandon record may take the outcome's place.
	res, err := t.h.spool.Reserve(chunks+2, int64(len(head))+size+maxOutcome+t.rt.answerRoom+maxEnvelope*int64(chunks+2))
	if err == nil {
		t.res = res
		t.captured = true
		return true
	}
	t.state = storedNo
	if t.rt.Mode == route.BestEffort {
		return true
	}
	t.h.log.Debug("no room in the spool", "request_id", t.id.String(), "err", err)
	rf := t.notStored()
	if errors.Is(err, spool.ErrFull) {
		rf.detail = "there is no room to store the request, and it was not forwarded"
	}
	t.refuse(rf)
	return false
}

// notStored is the answer when storing fails before the API has seen a byte.
func (t *transaction) notStored() refusal {
	return refusal{status: http.StatusServiceUnavailable, err: errProxyInternal, retry: t.h.retryAfter,
		detail: "the request cannot be stored, and was not forwarded"}
}

// Bounds of what a record holds beside head and body, for the reservation. A
// test holds the codec to them.
const (
	maxEnvelope = 2048
	maxOutcome  = 4096
)

// capture appends the request itself; its chunks are in the spool already.
func (t *transaction) capture(body []byte) {
	if !t.captured {
		return
	}
	// It is received when its body is: the API's time begins now at the earliest,
	// and the grace must not end before it, however slow the client was.
	t.appended = time.Now()
	t.request.ReceivedAt = t.appended
	msg := t.request.Message()
	t.b.record = msg.AppendEnvelope(t.b.record[:0])
	place, err := t.res.Append(t.b.record, t.b.head, body)
	if err != nil {
		t.storeFailed(err)
		return
	}
	t.b.places = append(t.b.places, place)
}

// storeFailed is the failure of a store that had promised room.
func (t *transaction) storeFailed(err error) {
	t.captured = false
	t.state = storedNo
	t.logStore(err)
}

func (t *transaction) logStore(err error) {
	t.h.log.Error("storing a request failed", "request_id", t.id.String(), "err", err)
}

func (t *transaction) describe(size int64) {
	t.request = capture.Request{
		ID: t.id, Route: t.rt.Name, Ingress: t.h.ingress, Policy: t.rt.Policy,
		OrderKey: t.rt.orderKey(t.x.Request.Fields), Head: t.b.head, Size: size,
	}
	t.b.places = t.b.places[:0]
}

// serveInline is the hot path: the body is in memory, and travels in one
// message.
func (t *transaction) serveInline(framing int64) {
	body := t.b.body
	if !t.reserve(int64(len(body)), 0, framing) {
		return
	}
	t.describe(int64(len(body)))
	t.capture(body)
	if t.state == storedNo && t.rt.Mode == route.Required {
		t.refuse(t.notStored())
		return
	}
	t.begun = time.Now()
	api, err := t.rt.pool.Begin(t.begun.Add(t.rt.Policy.Timeout), t.x.Request.Method, 0, body, t.headForAPI()...)
	t.finish(api, err)
}

// headForAPI is the captured head, with what only the API is told before its
// empty line.
func (t *transaction) headForAPI() [][]byte {
	t.b.tail = appendEnd(t.b.tail[:0], t.id, t.x, "")
	return [][]byte{t.b.head[:len(t.b.head)-2], t.b.tail}
}

// finish takes the API's answer, or its absence, to the client.
func (t *transaction) finish(api *upstream.Exchange, err error) {
	var resp *wire.Response
	if err == nil {
		defer api.Close()
		resp, err = api.Answer(t.passInterim)
		t.answered = err == nil
	}
	t.h.m.upstreamDuration.Observe(since(t.begun))
	t.awaitStored()
	if err != nil {
		t.noAnswer(err)
		return
	}
	t.passAnswer(api, resp)
}

// awaitStored holds the answer until the capture is durable.
func (t *transaction) awaitStored() {
	if !t.captured {
		return
	}
	err := t.waitSynced()
	t.h.m.captureDuration.Observe(since(t.appended))
	if err != nil {
		// What was written may still be read and published: the outcome is worth
		// an attempt, lest a processed request be sent again.
		t.state = storedNo
		t.logStore(err)
		return
	}
	t.state = storedSynced
	t.h.stored.Add(1)
}

// outcome writes the gateway's word about this attempt. It is called before
// the answer's last byte goes to the client.
func (t *transaction) outcome(status int, verdict capture.Verdict, failure string) {
	if !t.captured {
		return
	}
	o := capture.Outcome{ID: t.id, Ingress: t.h.ingress, Attempt: capture.Attempt{
		Number: capture.FirstAttempt, StartedAt: t.begun, EndedAt: time.Now(), Status: status, Error: failure, Verdict: verdict,
	}}
	if t.kept != nil {
		o.Answer = t.kept.end(status)
	}
	msg := capture.Message{Subject: capture.OutcomeSubject(t.rt.Name)}
	t.b.record = o.AppendJSON(msg.AppendEnvelope(t.b.record[:0]))
	if _, err := t.res.AppendWritten(t.b.record); err != nil {
		t.h.m.lostOutcomes.Inc()
		t.h.log.Error("writing an outcome failed", "request_id", t.id.String(), "err", err)
	}
}

// noAnswer answers for an API that did not.
func (t *transaction) noAnswer(err error) {
	rf := describeFailure(err)
	if t.answered && rf.err == errConnectionLost {
		rf.err = errIncomplete
	}
	t.errText = err.Error()
	t.outcome(0, capture.Failed, clip(err.Error()))
	if t.rt.Accept && t.state == storedSynced {
		t.accepted()
		return
	}
	if t.mustReset(capture.Failed, err) {
		t.reset()
		return
	}
	t.refuse(rf)
	t.errText = err.Error()
}

// mustReset reports whether a failed store forbids an answer: none that
// invites a retry may go out when the API may have worked on a request that
// nobody has stored, unless the API's own status settles the matter.
func (t *transaction) mustReset(v capture.Verdict, err error) bool {
	if t.state != storedNo || t.rt.Mode == route.BestEffort {
		return false
	}
	var uerr *upstream.Error
	if errors.As(err, &uerr) && !uerr.Sent {
		return false // the API has not seen a byte: an honest error does no harm
	}
	return t.rt.Policy.By == capture.ByEvent || v != capture.Processed && v != capture.Rejected
}

// reset breaks the client's connection, or stream, when the caller has returned.
func (t *transaction) reset() {
	t.code = 0
	t.x.Abort()
}

// accepted tells the client that its request is stored and will be processed.
func (t *transaction) accepted() {
	t.code = http.StatusAccepted
	id := t.id.String()
	body := []byte(`{"id":"` + id + `","status":"accepted"}` + "\n")
	fields := appendOwn(t.x.Answer[:0], id, t.state).Add("Content-Type", "application/json")
	t.x.Head(t.code, "Accepted", fields, int64(len(body)))
	_ = t.x.Write(body) // a client that has gone needs no answer
	_ = t.x.End(nil)
}

// describeFailure is the answer for an exchange that failed.
func describeFailure(err error) refusal {
	var uerr *upstream.Error
	var dns *net.DNSError
	var cert *tls.CertificateVerificationError
	switch {
	case errors.As(err, &uerr) && uerr.Timeout() && uerr.Sent:
		return refusal{status: http.StatusGatewayTimeout, err: errReadTimeout, detail: "the API did not answer in time"}
	case errors.As(err, &uerr) && uerr.Timeout():
		return refusal{status: http.StatusGatewayTimeout, err: errConnectionTimeout, detail: "the API could not be reached in time"}
	case errors.As(err, &dns):
		return refusal{status: http.StatusBadGateway, err: errDNS, detail: "the API's name could not be resolved"}
	case errors.As(err, &cert):
		return refusal{status: http.StatusBadGateway, err: errCertificate, detail: "the API's certificate is not trusted"}
	case errors.As(err, &uerr) && !uerr.Sent:
		return refusal{status: http.StatusBadGateway, err: errConnectionRefused, detail: "the API cannot be reached"}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return refusal{status: http.StatusBadGateway, err: errConnectionLost, detail: "the API closed the connection without a whole answer"}
	default:
		return refusal{status: http.StatusBadGateway, err: errProtocol, detail: "the API's answer is not valid HTTP"}
	}
}

// clip bounds an error's text in an outcome.
func clip(s string) string { return s[:min(len(s), 512)] }
