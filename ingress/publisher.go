package ingress

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

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
	// maxOutcomes bounds the outcomes that share one message: what a message
	// costs is spread thin by then, and a repeated one is still short.
	maxOutcomes = 64
	// maxTogether bounds their bytes: a message must fit the broker's max_payload.
	maxTogether = 256 << 10
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
	refs    []byte

	// again is true while records are published once more although the stream
	// may have them.
	again bool

	// outcomes were read and wait for others to share a message with. They go
	// out before the publisher waits for anything.
	outcomes struct {
		subject string
		start   spool.StartID
		indexes []uint64
		data    []byte
	}

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
	// drain bounds how long a stop waits for the spool to be released, within the
	// time that the stop has: words come within milliseconds where recorder and
	// acker are there, and where they are not the spool keeps everything.
	drain time.Duration
}

func defaultTimings() timings {
	return timings{
		ackWait: 5 * time.Second, look: time.Second, wordLost: 10 * time.Second,
		republishMin: time.Minute, republishMax: time.Hour,
		store: 10 * time.Second, drain: 5 * time.Second,
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
			p.dropOutcomes() // they are read again
			reader.Rewind(p.window.restart())
			continue
		}
		if err := p.lookAfter(ctx); err != nil {
			return p.ended(ctx, err)
		}
		waiting, cancel := ctx, context.CancelFunc(func() {})
		rec, ok, err := reader.TryNext()
		if err == nil && !ok {
			if sent, err := p.flushOutcomes(ctx); err != nil {
				return p.ended(ctx, err)
			} else if !sent {
				continue // the window has failed
			}
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
	msg, err := capture.ParseRecord(rec.Data)
	if err != nil {
		return p.send(ctx, capture.Message{}, err.Error(), rec.Position.Start, rec.Position.Index)
	}
	if capture.IsOutcomeSubject(msg.Subject) {
		return p.gather(ctx, msg, rec.Position)
	}
	return p.send(ctx, msg, "", rec.Position.Start, rec.Position.Index)
}

// gather keeps an outcome until there are enough for a message.
func (p *publisher) gather(ctx context.Context, msg capture.Message, at spool.Position) (ok bool, err error) {
	if !p.again && p.window.wasStored(at) {
		return true, nil
	}
	o := &p.outcomes
	// Outcomes are small, but for those with an answer.
	large := len(o.data)+len(msg.Data) > maxTogether
	if len(o.indexes) > 0 && (o.subject != msg.Subject || o.start != at.Start || large) {
		if ok, err := p.flushOutcomes(ctx); err != nil || !ok {
			return ok, err
		}
	}
	o.subject, o.start = msg.Subject, at.Start
	o.indexes = append(o.indexes, at.Index)
	if len(o.data) > 0 {
		o.data = append(o.data, '\n')
	}
	o.data = append(o.data, msg.Data...)
	if len(o.indexes) < maxOutcomes {
		return true, nil
	}
	return p.flushOutcomes(ctx)
}

// flushOutcomes sends the outcomes that were gathered.
func (p *publisher) flushOutcomes(ctx context.Context) (ok bool, err error) {
	o := &p.outcomes
	if len(o.indexes) == 0 {
		return true, nil
	}
	ok, err = p.send(ctx, capture.Message{Subject: o.subject, Data: o.data}, "", o.start, o.indexes...)
	p.dropOutcomes()
	return ok, err
}

func (p *publisher) dropOutcomes() {
	p.outcomes.indexes, p.outcomes.data = p.outcomes.indexes[:0], p.outcomes.data[:0]
}

// send publishes a message that holds records of one start, or sets them aside
// when bad says why they cannot be.
func (p *publisher) send(ctx context.Context, msg capture.Message, bad string, start spool.StartID, indexes ...uint64) (ok bool, err error) {
	resume := spool.Position{Start: start, Index: indexes[0]}
	if len(p.outcomes.indexes) > 0 {
		resume = spool.Position{Start: p.outcomes.start, Index: p.outcomes.indexes[0]}
	}
	n, added, err := p.window.add(ctx, resume, len(msg.Data)+len(msg.Capture), start, indexes...)
	if err != nil || added == failed {
		return false, err
	}
	if added == known {
		return true, nil
	}
	if bad != "" {
		p.aside(n.number, bad, spool.Position{Start: start, Index: indexes[0]})
		return true, nil
	}
	p.message.Subject, p.message.Data = msg.Subject, msg.Data
	p.message.Reply = n.reply
	p.header(0, capture.HeaderID, msg.ID)
	p.header(1, capture.HeaderCapture, msg.Capture)
	p.refs = capture.AppendSpoolRefs(p.refs[:0], p.ingress, start.String(), indexes...)
	p.header(2, capture.HeaderSpool, string(p.refs))
	err = p.nc.PublishMsg(&p.message)
	switch {
	case err == nil:
	case errors.Is(err, nats.ErrMaxPayload), errors.Is(err, nats.ErrBadSubject), errors.Is(err, nats.ErrBadHeaderMsg):
		positions := make([]spool.Position, len(indexes))
		for i, index := range indexes {
			positions[i] = spool.Position{Start: start, Index: index}
		}
		p.aside(n.number, err.Error(), positions...)
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

// aside keeps records that no broker will ever take, so that they block
// nothing behind them.
func (p *publisher) aside(number uint64, reason string, positions ...spool.Position) {
	for _, at := range positions {
		p.m.publishError.WithLabelValues("aside").Inc()
		p.log.Error("a spool record was set aside", "start", at.Start.String(), "index", at.Index, "err", reason)
		if err := p.spool.SetAside(at, reason); err != nil && !errors.Is(err, spool.ErrUnknown) {
			// It stays in the spool, unreleased and visible, and is tried again later.
			p.log.Error("setting a spool record aside failed", "start", at.Start.String(), "index", at.Index, "err", err)
		}
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
		p.aside(r.number, r.reason, r.positions...)
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
		// Records are dated by the spool's clock, which is never set back.
		even := p.spool.Now()
		reader := p.spool.UnreleasedBefore(even.Add(-p.times.wordLost))
		switch {
		case mark.at.IsZero() || now.Sub(mark.at) < p.times.wordLost:
			if now.Sub(o.since) < o.silent || even.Sub(at) < o.silent {
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
		// What the other reader has gathered must not mix with what is read here: each
		// goes back to its own place.
		if ok, err := p.flushOutcomes(ctx); err != nil || !ok {
			return err
		}
		p.again = true
		n, err := p.pass(ctx, reader, func(rec spool.Record) (bool, error) {
			if msg, err := capture.ParseRecord(rec.Data); err == nil && kind(isCompletion(msg)) != k {
				return true, nil
			}
			return p.publish(ctx, rec)
		})
		if err == nil {
			// What fails here is in the window, whose owner goes back.
			_, err = p.flushOutcomes(ctx)
		}
		p.again = false
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
