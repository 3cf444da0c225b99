package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

const (
	// windowRecords and windowBytes bound what is published and not yet
	// acknowledged: enough to hide a round trip at full speed, little enough to
	// stay below the server's queue for one stream and to bound memory.
	windowRecords = 2048
	windowBytes   = 16 << 20
	// ackWait is how long an acknowledgement may take before everything from
	// that record on is published again. The server answers within milliseconds
	// unless it, or the connection, has gone.
	ackWait = 5 * time.Second
	// idleWait is how long the publisher waits for a record before it looks at
	// its other duties.
	idleWait = 200 * time.Millisecond
	// retryMin and retryMax bound the pause after a refusal that may pass.
	retryMin = 100 * time.Millisecond
	retryMax = 5 * time.Second
	// wordLost is how old a record must be that stays unreleased, while words
	// for others come, before it is published again: its word, or the message,
	// was lost.
	wordLost = 10 * time.Second
	// republishMin and republishMax bound the intervals, doubled each time, at
	// which unreleased records are published again while no word comes at all:
	// most likely the recorder is away and the stream has them, so patience costs
	// nothing, and repeats would fill the stream.
	republishMin = time.Minute
	republishMax = time.Hour
)

// publisher takes what is in the spool to the streams, in order, and again
// until it is released. It alone publishes; a record is only ever released by
// the word of whoever made it durable.
type publisher struct {
	nc      *nats.Conn
	spool   *spool.Spool
	ingress string
	log     *slog.Logger
	m       *metrics
	window  window

	// message is used over and over: publishing copies it.
	message nats.Msg
	values  [3][1]string

	retry     time.Duration // the last pause
	republish time.Duration // the next interval without words
	lastPass  time.Time     // when unreleased records were last published again
}

func newPublisher(nc *nats.Conn, sp *spool.Spool, ingress string, log *slog.Logger) *publisher {
	p := &publisher{nc: nc, spool: sp, ingress: ingress, log: log, republish: republishMin}
	p.message.Header = nats.Header{}
	p.window.changed = make(chan struct{}, 1)
	return p
}

// run publishes until ctx is done or the spool is closed.
func (p *publisher) run(ctx context.Context) error {
	inbox := p.nc.NewInbox()
	p.window.inbox = inbox
	sub, err := p.nc.Subscribe(inbox+".>", p.window.acknowledge)
	if err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", err)
	}
	// One acknowledgement is small; the window bounds how many there can be.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe to acknowledgements: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	// What was under way when the connection broke gets no acknowledgement.
	lost := p.nc.StatusChanged(nats.RECONNECTING, nats.DISCONNECTED)
	defer p.nc.RemoveStatusListener(lost)
	if err := p.abandonOrphans(ctx); err != nil {
		return p.ended(ctx, err)
	}
	reader := p.spool.NewReader()
	for {
		select {
		case <-lost:
			p.window.failAll()
		default:
		}
		if again, from := p.window.failure(); again {
			if err := p.pause(ctx); err != nil {
				return p.ended(ctx, err)
			}
			p.m.republished.Inc()
			if from != (spool.Position{}) {
				reader.Rewind(from)
			}
			continue
		}
		if err := p.publishStale(ctx); err != nil {
			return p.ended(ctx, err)
		}
		waiting, cancel := ctx, context.CancelFunc(func() {})
		rec, ok, err := reader.TryNext()
		if err == nil && !ok {
			waiting, cancel = context.WithTimeout(ctx, idleWait)
			rec, err = reader.Next(waiting)
		}
		cancel()
		switch {
		case err == nil:
			err = p.publish(ctx, rec)
		case errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil:
			continue
		}
		if err != nil {
			return p.ended(ctx, err)
		}
	}
}

// ended tells an asked-for end from a failure.
func (p *publisher) ended(ctx context.Context, err error) error {
	if ctx.Err() != nil || errors.Is(err, spool.ErrClosed) {
		return nil
	}
	return err
}

// pause waits after a failure, longer each time, and then for the connection.
func (p *publisher) pause(ctx context.Context) error {
	if p.window.takeProgress() {
		p.retry = 0
	}
	p.retry = min(max(2*p.retry, retryMin), retryMax)
	for {
		timer := time.NewTimer(p.retry)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		if p.nc.IsConnected() {
			return nil
		}
	}
}

// publish sends one record when the window has room for it. Failures that may
// pass end in the window, whose owner goes back to where they began.
func (p *publisher) publish(ctx context.Context, rec spool.Record) error {
	n, ok, err := p.window.add(ctx, rec.Position, len(rec.Data))
	if err != nil || !ok {
		return err
	}
	msg, err := capture.ParseRecord(rec.Data)
	if err != nil {
		return p.aside(n, rec.Position, err.Error())
	}
	p.message.Subject, p.message.Data = msg.Subject, msg.Data
	p.message.Reply = n.reply
	p.header(0, capture.HeaderID, msg.ID)
	p.header(1, capture.HeaderCapture, msg.Capture)
	p.header(2, capture.HeaderSpool, capture.SpoolRef{Ingress: p.ingress, Start: rec.Position.Start.String(), Index: rec.Position.Index}.String())
	err = p.nc.PublishMsg(&p.message)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrBadSubject), errors.Is(err, nats.ErrBadHeaderMsg):
		return p.aside(n, rec.Position, err.Error())
	default:
		p.window.fail(n.number)
		return nil
	}
}

func (p *publisher) header(i int, name, value string) {
	if value == "" {
		delete(p.message.Header, name)
		return
	}
	p.values[i][0] = value
	p.message.Header[name] = p.values[i][:]
}

// aside keeps a record that no broker will ever take, so that it blocks
// nothing behind it.
func (p *publisher) aside(n inflight, at spool.Position, reason string) error {
	p.m.publishError.WithLabelValues("aside").Inc()
	p.log.Error("a spool record was set aside", "start", at.Start.String(), "index", at.Index, "err", reason)
	if err := p.spool.SetAside(at, reason); err != nil && !errors.Is(err, spool.ErrUnknown) {
		// It stays in the spool, unreleased and visible, and is tried again later.
		p.log.Error("setting a spool record aside failed", "start", at.Start.String(), "index", at.Index, "err", err)
	}
	p.window.settle(n.number)
	return nil
}

// publishStale publishes again what stays unreleased for too long.
func (p *publisher) publishStale(ctx context.Context) error {
	for _, refused := range p.window.takeRefused() {
		if err := p.aside(inflight{number: refused.number}, refused.position, refused.reason); err != nil {
			return err
		}
	}
	if time.Since(p.lastPass) < time.Second {
		return nil
	}
	stats := p.spool.Stats()
	now := time.Now()
	if stats.OldestUnreleased.IsZero() {
		p.republish, p.lastPass = republishMin, now
		return nil
	}
	age := now.Sub(stats.OldestUnreleased)
	wordAge := now.Sub(p.window.lastWord())
	switch {
	case age < wordLost, now.Sub(p.lastPass) < wordLost:
		return nil
	case wordAge < wordLost:
		p.republish = republishMin
	case age < p.republish || now.Sub(p.lastPass) < p.republish:
		return nil
	default:
		p.republish = min(2*p.republish, republishMax)
	}
	p.lastPass = now
	p.m.republished.Inc()
	p.log.Warn("publishing unreleased records again", "unreleased", stats.Unreleased, "oldest", stats.OldestUnreleased)
	return p.pass(ctx, now.Add(-wordLost), p.publish)
}

// pass hands every unreleased record appended before t to f.
func (p *publisher) pass(ctx context.Context, t time.Time, f func(context.Context, spool.Record) error) error {
	reader := p.spool.UnreleasedBefore(t)
	for {
		rec, err := reader.Next(ctx)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = f(ctx, rec)
		}
		if err != nil {
			return err
		}
	}
}

// abandonOrphans writes an abandon record for every body of an earlier start
// that has chunks and no head in the spool: the process was killed before it
// had read it all. Where a head did reach the ledger, the record changes
// nothing there.
func (p *publisher) abandonOrphans(ctx context.Context) error {
	type chunk struct {
		route, ingress, method string
	}
	orphans := make(map[uuid.UUID]chunk)
	var decoder capture.Decoder
	own := p.spool.Start()
	err := p.pass(ctx, time.Now(), func(_ context.Context, rec spool.Record) error {
		if rec.Position.Start == own {
			return nil
		}
		msg, err := capture.ParseRecord(rec.Data)
		if err != nil || msg.Capture == "" {
			return nil // whoever publishes it deals with it
		}
		c, err := decoder.Decode(msg.Subject, capture.Header{capture.HeaderID: {msg.ID}, capture.HeaderCapture: {msg.Capture}}, msg.Data)
		switch {
		case err != nil:
		case c.Chunk != nil:
			orphans[c.Chunk.ID] = chunk{c.Chunk.Route, c.Chunk.Ingress, msg.Subject[strings.LastIndexByte(msg.Subject, '.')+1:]}
		default:
			delete(orphans, c.ID())
		}
		return nil
	})
	if err != nil {
		return err
	}
	for id, c := range orphans {
		a := capture.Abandon{ID: id, Route: c.route, Ingress: c.ingress}
		record := a.Message(c.method).AppendEnvelope(nil)
		res, err := p.spool.Reserve(1, int64(len(record)))
		if err == nil {
			_, err = res.AppendWritten(record)
			res.Release()
		}
		if err != nil {
			return fmt.Errorf("abandon chunks without head: %w", err)
		}
		p.log.Info("chunks of an unfinished body were abandoned", "request_id", id.String())
	}
	return nil
}

// inflight names one published record: its number, and the subject on which
// its acknowledgement comes.
type inflight struct {
	number uint64
	reply  string
}

// window is what was published and not yet acknowledged, in order. Numbers
// count on for ever; those from first to next-1 are in the window.
type window struct {
	inbox   string
	changed chan struct{} // something was settled or failed; room for one

	mu      sync.Mutex
	entries [windowRecords]entry // by number modulo its length
	first   uint64
	next    uint64
	bytes   int
	failed  bool
	refused []refused
	word    time.Time
	settled uint64 // how many were acknowledged since takeProgress
}

type entry struct {
	position spool.Position
	bytes    int
	at       time.Time
	settled  bool // acknowledged, or set aside
}

type refused struct {
	number   uint64
	position spool.Position
	reason   string
}

// add waits for room and takes the next number. ok is false when something
// failed meanwhile: the record must be read again.
func (w *window) add(ctx context.Context, at spool.Position, bytes int) (n inflight, ok bool, err error) {
	for {
		w.mu.Lock()
		switch {
		case w.failed:
			w.mu.Unlock()
			return inflight{}, false, nil
		case w.next-w.first < windowRecords && (w.bytes+bytes <= windowBytes || w.next == w.first):
			n := w.next
			w.entries[n%windowRecords] = entry{position: at, bytes: bytes, at: time.Now()}
			w.next++
			w.bytes += bytes
			w.mu.Unlock()
			return inflight{number: n, reply: w.inbox + "." + strconv.FormatUint(n, 36)}, true, nil
		}
		late := ackWait - time.Since(w.entries[w.first%windowRecords].at)
		if late <= 0 {
			// The record that waits is lost to this reader unless it goes back to it.
			w.failed = true
			w.mu.Unlock()
			return inflight{}, false, nil
		}
		w.mu.Unlock()
		timer := time.NewTimer(late)
		select {
		case <-w.changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return inflight{}, false, ctx.Err()
		}
		timer.Stop()
	}
}

// acknowledge takes the server's word about one record.
func (w *window) acknowledge(m *nats.Msg) {
	n, err := strconv.ParseUint(m.Subject[len(w.inbox)+1:], 36, 64)
	if err != nil {
		return
	}
	if m.Header == nil && !bytes.Contains(m.Data, []byte(`"error"`)) {
		w.settle(n)
		return
	}
	var answer struct {
		Error *struct {
			Code        int    `json:"code"`
			ErrCode     int    `json:"err_code"`
			Description string `json:"description"`
		} `json:"error"`
	}
	if json.Unmarshal(m.Data, &answer) != nil || answer.Error == nil || !refusedForGood(answer.Error.ErrCode) {
		w.fail(n) // no responders, no room, too many at once: it may pass
		return
	}
	w.refuse(n, answer.Error.Description)
}

// refusedForGood lists the errors that no repetition mends (nats-server,
// server/errors.json).
func refusedForGood(code int) bool {
	switch code {
	case 10054, // message size exceeds maximum allowed
		10097: // header size exceeds maximum allowed of 64k
		return true
	}
	return false
}

func (w *window) settle(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.settleLocked(n)
}

func (w *window) settleLocked(n uint64) {
	if n < w.first || n >= w.next {
		return
	}
	w.entries[n%windowRecords].settled = true
	w.settled++
	for w.first < w.next && w.entries[w.first%windowRecords].settled {
		w.bytes -= w.entries[w.first%windowRecords].bytes
		w.first++
	}
	w.signal()
}

func (w *window) signal() {
	select {
	case w.changed <- struct{}{}:
	default:
	}
}

// fail makes the publisher go back to the oldest record of the window.
func (w *window) fail(n uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n >= w.first && n < w.next {
		w.failed = true
		w.signal()
	}
}

// failAll is fail for whatever is in the window.
func (w *window) failAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failed = w.next > w.first
}

// takeProgress reports whether anything was acknowledged since the last call.
func (w *window) takeProgress() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	progress := w.settled > 0
	w.settled = 0
	return progress
}

func (w *window) refuse(n uint64, reason string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n >= w.first && n < w.next {
		w.refused = append(w.refused, refused{n, w.entries[n%windowRecords].position, reason})
		w.signal()
	}
}

func (w *window) takeRefused() []refused {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := w.refused
	w.refused = nil
	return taken
}

// failure reports whether the publisher must go back, and to which record; the
// window is empty then. It does so too when the oldest acknowledgement is late.
func (w *window) failure() (again bool, from spool.Position) {
	w.mu.Lock()
	defer w.mu.Unlock()
	oldest := w.entries[w.first%windowRecords]
	if w.next > w.first && time.Since(oldest.at) > ackWait {
		w.failed = true
	}
	if !w.failed {
		return false, spool.Position{}
	}
	if w.next > w.first {
		from = oldest.position
	}
	w.first, w.bytes, w.failed, w.refused = w.next, 0, false, nil
	return true, from
}

// pending is how many records wait for an acknowledgement.
func (w *window) pending() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return float64(w.next - w.first)
}

// heard notes that a word has come.
func (w *window) heard() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.word = time.Now()
}

func (w *window) lastWord() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.word
}
