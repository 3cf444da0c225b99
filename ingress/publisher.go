package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
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
	windowBytes   = 8 << 20
	// idleWait is how long the publisher waits for a record before it looks at
	// its other duties.
	idleWait = 200 * time.Millisecond
	// retryMin and retryMax bound the pause after a refusal that may pass.
	retryMin = 100 * time.Millisecond
	retryMax = 5 * time.Second
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
	times   timings
	window  window

	// message is used over and over: publishing copies it.
	message nats.Msg
	values  [3][1]string

	retry    time.Duration // the last pause
	looked   time.Time     // when unreleased records were last looked after
	overdue  [2]overdue    // by kind: captures, completions
	orphaned []orphan      // still to be abandoned
}

// timings are the waits of publisher and handler.
type timings struct {
	// ackWait is how long an acknowledgement may take before everything from
	// that record on is published again. The server answers within milliseconds
	// unless it, or the connection, has gone.
	ackWait time.Duration
	// look is how often unreleased records are looked after.
	look time.Duration
	// wordLost is how long after a later record of its stream a record may stay
	// unreleased before it is published again: its word, or the message, was lost.
	// Consumers that share a stream may be so far apart.
	wordLost time.Duration
	// republishMin and republishMax bound the intervals, doubled each time, at
	// which unreleased records are published again while no word comes at all:
	// most likely the recorder is away and the stream has them, so patience costs
	// nothing, and repeats would fill the stream.
	republishMin, republishMax time.Duration
	// store bounds how long an answer is held for the capture's fsync. A disk
	// that takes longer is broken for our purpose, and the client must learn.
	store time.Duration
	// stalled bounds how long a client may neither send nor take a byte: lost
	// packets are sent again many times meanwhile.
	stalled time.Duration
	// drain bounds how long a stop waits for the spool to be released, within the
	// time that the stop has: words come within milliseconds where recorder and
	// acker are there, and where they are not the spool keeps everything.
	drain time.Duration
}

func defaultTimings() timings {
	return timings{
		ackWait: 5 * time.Second, look: time.Second, wordLost: 10 * time.Second,
		republishMin: time.Minute, republishMax: time.Hour,
		store: 10 * time.Second, stalled: time.Minute, drain: 5 * time.Second,
	}
}

// overdue says when records of one stream are published again.
type overdue struct {
	wait   time.Duration // the next interval after a pass by evidence
	after  time.Time     // no such pass before
	silent time.Duration // the next interval without words
	since  time.Time     // of which silence is measured
	// doubt says that the connection has been away since the last such interval:
	// words went past us, and the broker may have lost what it had acknowledged.
	doubt bool
}

func newPublisher(nc *nats.Conn, sp *spool.Spool, ingress string, log *slog.Logger, t timings) *publisher {
	p := &publisher{nc: nc, spool: sp, ingress: ingress, log: log, times: t}
	p.message.Header = nats.Header{}
	p.window.changed = make(chan struct{}, 1)
	p.window.done = make(map[spool.Position]struct{})
	p.window.ackWait = t.ackWait
	return p
}

// run publishes until ctx is done or the spool is closed.
func (p *publisher) run(ctx context.Context) error {
	inbox := p.nc.NewInbox()
	p.window.inbox, p.window.m = inbox, p.m
	p.calm(time.Now())
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
	back := p.nc.StatusChanged(nats.CONNECTED)
	defer p.nc.RemoveStatusListener(back)
	if err := p.findOrphans(ctx); err != nil {
		return p.ended(ctx, err)
	}
	reader := p.spool.NewReader()
	for {
		select {
		case <-lost:
			p.window.failAll()
		case <-back:
			p.doubt(time.Now())
		default:
		}
		if p.window.mustGoBack() {
			// Acknowledgements that come during the pause still count.
			if err := p.pause(ctx); err != nil {
				return p.ended(ctx, err)
			}
			p.m.republished.Inc()
			reader.Rewind(p.window.restart())
			continue
		}
		if err := p.lookAfter(ctx); err != nil {
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
			_, err = p.publish(ctx, rec)
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
// pass end in the window, whose owner goes back to where they began; ok is false
// when that must come before anything else is published.
func (p *publisher) publish(ctx context.Context, rec spool.Record) (ok bool, err error) {
	n, added, err := p.window.add(ctx, rec.Position, len(rec.Data))
	if err != nil || added == failed {
		return false, err
	}
	if added == known {
		return true, nil
	}
	msg, err := capture.ParseRecord(rec.Data)
	if err != nil {
		p.aside(n.number, rec.Position, err.Error())
		return true, nil
	}
	p.message.Subject, p.message.Data = msg.Subject, msg.Data
	p.message.Reply = n.reply
	p.header(0, capture.HeaderID, msg.ID)
	p.header(1, capture.HeaderCapture, msg.Capture)
	p.header(2, capture.HeaderSpool, capture.SpoolRef{Ingress: p.ingress, Start: rec.Position.Start.String(), Index: rec.Position.Index}.String())
	err = p.nc.PublishMsg(&p.message)
	switch {
	case err == nil:
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrBadSubject), errors.Is(err, nats.ErrBadHeaderMsg):
		p.aside(n.number, rec.Position, err.Error())
	default:
		p.window.fail(n.number)
	}
	return true, nil
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
func (p *publisher) aside(number uint64, at spool.Position, reason string) {
	p.m.publishError.WithLabelValues("aside").Inc()
	p.log.Error("a spool record was set aside", "start", at.Start.String(), "index", at.Index, "err", reason)
	if err := p.spool.SetAside(at, reason); err != nil && !errors.Is(err, spool.ErrUnknown) {
		// It stays in the spool, unreleased and visible, and is tried again later.
		p.log.Error("setting a spool record aside failed", "start", at.Start.String(), "index", at.Index, "err", err)
	}
	p.window.settle(number)
}

// calm begins all waiting for words anew: nothing is unreleased.
func (p *publisher) calm(now time.Time) {
	for k := range p.overdue {
		p.overdue[k] = overdue{wait: p.times.wordLost, silent: p.times.republishMin, since: now}
	}
}

// doubt begins all waiting for words anew after a time without connection. Who
// was faster to connect has given its words already, and a broker that was
// restarted may have forgotten the end of its streams: what no word comes for in
// the time that a lost one may take is published again, once. A replay waits for
// it.
func (p *publisher) doubt(now time.Time) {
	p.calm(now)
	for k := range p.overdue {
		p.overdue[k].silent, p.overdue[k].doubt = p.times.wordLost, true
	}
}

// lookAfter sets aside what was refused, and publishes again what stays
// unreleased for too long. There are three reasons to think that a record, or its
// word, was lost: a later one of its stream was released long ago, or no word
// has come for its stream for longer still, or since the connection came back. A
// consumer that is merely behind gives neither of the first two, and repeats
// would put it further behind.
func (p *publisher) lookAfter(ctx context.Context) error {
	for _, r := range p.window.takeRefused() {
		p.aside(r.number, r.position, r.reason)
	}
	now := time.Now()
	if now.Sub(p.looked) < p.times.look {
		return nil
	}
	p.looked = now
	p.abandonOrphans()
	oldest, at, ok := p.spool.Oldest()
	if !ok {
		p.calm(now)
		return nil
	}
	for k := range p.overdue {
		o := &p.overdue[k]
		mark, heard := p.window.evidence(k)
		if heard.After(o.since) {
			o.since = heard
			if !o.doubt {
				o.silent = p.times.republishMin
			}
		}
		reader := p.spool.UnreleasedBefore(now.Add(-p.times.wordLost))
		switch {
		case mark.at.IsZero() || now.Sub(mark.at) < p.times.wordLost:
			if now.Sub(o.since) < o.silent || now.Sub(at) < o.silent {
				continue
			}
			o.since, o.silent = now, min(max(2*o.silent, p.times.republishMin), p.times.republishMax)
			o.doubt = false
		case oldest.Start == mark.position.Start && oldest.Index > mark.position.Index:
			o.wait = p.times.wordLost
			p.window.forget(k)
			continue
		case now.Before(o.after):
			continue
		default:
			// Each pass reads all that is unreleased before the mark, though it may
			// be of the other stream.
			o.after, o.wait = now.Add(o.wait), min(2*o.wait, p.times.republishMax)
			p.window.forget(k)
			reader.Until(mark.position)
		}
		n, err := p.pass(ctx, reader, func(rec spool.Record) (bool, error) {
			if msg, err := capture.ParseRecord(rec.Data); err == nil && kind(isCompletion(msg)) != k {
				return true, nil
			}
			return p.publish(ctx, rec)
		})
		if err != nil {
			return err
		}
		if n > 0 {
			p.m.republished.Inc()
			p.log.Warn("published unreleased records again", "records", n, "oldest", at)
		}
	}
	return nil
}

// kind is the place of a stream's records in arrays.
func kind(completion bool) int {
	if completion {
		return 1
	}
	return 0
}

// pass hands records to f until there are no more, or f says so, and counts.
func (p *publisher) pass(ctx context.Context, reader *spool.Reader, f func(spool.Record) (bool, error)) (n int, err error) {
	for {
		rec, err := reader.Next(ctx)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		ok, err := f(rec)
		if err != nil || !ok {
			return n, err
		}
		n++
	}
}

// orphan is a body without head.
type orphan struct {
	capture.Abandon
	method string
}

// findOrphans looks for bodies of an earlier start that have chunks and no head
// in the spool: the process was killed before it had read them whole. Where a
// head did reach the ledger, abandoning changes nothing there.
func (p *publisher) findOrphans(ctx context.Context) error {
	found := make(map[uuid.UUID]orphan)
	var decoder capture.Decoder
	own := p.spool.Start()
	_, err := p.pass(ctx, p.spool.UnreleasedBefore(time.Now()), func(rec spool.Record) (bool, error) {
		if rec.Position.Start == own {
			return true, nil
		}
		msg, err := capture.ParseRecord(rec.Data)
		if err != nil || msg.Capture == "" {
			return true, nil // whoever publishes it deals with it
		}
		c, err := decoder.Decode(msg.Subject, capture.Header{capture.HeaderID: {msg.ID}, capture.HeaderCapture: {msg.Capture}}, msg.Data)
		switch {
		case err != nil:
		case c.Chunk != nil:
			method := msg.Subject[strings.LastIndexByte(msg.Subject, '.')+1:]
			found[c.Chunk.ID] = orphan{capture.Abandon{ID: c.Chunk.ID, Route: c.Chunk.Route, Ingress: c.Chunk.Ingress}, method}
		default:
			delete(found, c.ID())
		}
		return true, nil
	})
	p.orphaned = slices.Collect(maps.Values(found))
	return err
}

// abandonOrphans writes an abandon record for each orphan. In a full spool they
// wait: it is publishing that makes room.
func (p *publisher) abandonOrphans() {
	for len(p.orphaned) > 0 {
		o := p.orphaned[0]
		record := o.Message(o.method).AppendEnvelope(nil)
		res, err := p.spool.Reserve(1, int64(len(record)))
		if err == nil {
			_, err = res.AppendWritten(record)
			res.Release()
		}
		if err != nil {
			p.log.Debug("chunks without head are not abandoned yet", "request_id", o.ID.String(), "err", err)
			return
		}
		p.log.Info("chunks of an unfinished body were abandoned", "request_id", o.ID.String())
		p.orphaned = p.orphaned[1:]
	}
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
	ackWait time.Duration
	m       *metrics

	mu      sync.Mutex
	entries [windowRecords]entry // by number modulo its length
	first   uint64
	next    uint64
	bytes   int
	failed  bool
	back    spool.Position // where to go back to, once failed
	refused []refused
	moved   bool // the oldest was acknowledged since the last failure

	// done holds what was acknowledged behind the record that made the publisher
	// go back: a stream that has room must not get it again while another is full.
	done map[spool.Position]struct{}

	marks [2]mark      // by kind
	words [2]time.Time // when the last word came
}

// mark is a record that was released, and when that became known. All that
// were published before it should be released soon.
type mark struct {
	position spool.Position
	at       time.Time
}

// added is what became of a record that was to enter the window.
type added int

const (
	entered added = iota
	known         // it is acknowledged already, and not to be published
	failed        // the publisher must go back first, and read it again
)

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

// add waits for room and takes the next number.
func (w *window) add(ctx context.Context, at spool.Position, bytes int) (inflight, added, error) {
	for {
		w.mu.Lock()
		switch {
		case w.failed:
			w.mu.Unlock()
			return inflight{}, failed, nil
		case w.next-w.first < windowRecords && (w.bytes+bytes <= windowBytes || w.next == w.first):
			n := w.next
			w.next++
			if _, ok := w.done[at]; ok {
				delete(w.done, at)
				w.entries[n%windowRecords] = entry{position: at, at: time.Now(), settled: true}
				w.shrink()
				w.mu.Unlock()
				return inflight{}, known, nil
			}
			w.entries[n%windowRecords] = entry{position: at, bytes: bytes, at: time.Now()}
			w.bytes += bytes
			w.mu.Unlock()
			return inflight{number: n, reply: w.inbox + "." + strconv.FormatUint(n, 36)}, entered, nil
		}
		late := w.ackWait - time.Since(w.entries[w.first%windowRecords].at)
		if late <= 0 {
			w.goBack()
			w.mu.Unlock()
			return inflight{}, failed, nil
		}
		w.mu.Unlock()
		timer := time.NewTimer(late)
		select {
		case <-w.changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return inflight{}, failed, ctx.Err()
		}
		timer.Stop()
	}
}

// goBack notes where the publisher must go back to. mu is held, and the window
// is not empty. The place is kept even if all of it is acknowledged meanwhile:
// what was read behind it may not have been published.
func (w *window) goBack() {
	if !w.failed {
		w.failed, w.back = true, w.entries[w.first%windowRecords].position
	}
	w.signal()
}

// acknowledge takes the server's word about one record.
func (w *window) acknowledge(m *nats.Msg) {
	n, err := strconv.ParseUint(m.Subject[len(w.inbox)+1:], 36, 64)
	if err != nil {
		return
	}
	if m.Header == nil && !bytes.Contains(m.Data, []byte(`"error"`)) {
		w.m.published.Inc()
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
		w.m.publishError.WithLabelValues("retry").Inc()
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
	if n < w.first || n >= w.next {
		return
	}
	w.entries[n%windowRecords].settled = true
	w.moved = w.moved || n == w.first
	w.shrink()
	w.signal()
}

// shrink moves the window behind what is settled at its begin. mu is held.
func (w *window) shrink() {
	for w.first < w.next && w.entries[w.first%windowRecords].settled {
		w.bytes -= w.entries[w.first%windowRecords].bytes
		w.first++
	}
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
		w.goBack()
	}
}

// failAll is fail for whatever is in the window.
func (w *window) failAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next > w.first {
		w.goBack()
	}
}

// takeProgress reports whether the oldest record was acknowledged since the
// last call.
func (w *window) takeProgress() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	moved := w.moved
	w.moved = false
	return moved
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

// mustGoBack reports whether something failed, which a late acknowledgement of
// the oldest record is too.
func (w *window) mustGoBack() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.next > w.first && time.Since(w.entries[w.first%windowRecords].at) > w.ackWait {
		w.goBack()
	}
	return w.failed
}

// restart empties the window after a failure, and gives the record to go on
// with.
func (w *window) restart() spool.Position {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.done) > windowRecords {
		clear(w.done) // of released records, which nobody reads again
	}
	for n := w.first; n < w.next; n++ {
		if e := w.entries[n%windowRecords]; e.settled {
			w.done[e.position] = struct{}{}
		}
	}
	w.first, w.bytes, w.failed, w.refused = w.next, 0, false, nil
	return w.back
}

// pending is how many records wait for an acknowledgement.
func (w *window) pending() float64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return float64(w.next - w.first)
}

// heard notes that a word has released a record of this start.
func (w *window) heard(at spool.Position, completion bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, now := kind(completion), time.Now()
	w.words[k] = now
	if w.marks[k].at.IsZero() {
		w.marks[k] = mark{at, now}
	}
}

// evidence gives the mark of a kind, zero where there is none, and when the last
// word came for it.
func (w *window) evidence(kind int) (mark, time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.marks[kind], w.words[kind]
}

// forget lets the next word make the mark.
func (w *window) forget(kind int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.marks[kind] = mark{}
}
