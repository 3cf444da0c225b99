package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// ConsumerOptions say what a loop consumes and how.
type ConsumerOptions struct {
	// Conn, Stream and Durable say where from. Required.
	Conn            *nats.Conn
	Stream, Durable string
	// Service labels the metrics. Required.
	Service string
	// MaxBatch is the most messages in a batch. 0 means 1000: what a commit costs
	// by itself is then spread thin, and a repeated batch is still short.
	MaxBatch int
	// MaxBatchBytes is the size at which a batch is full; the message that
	// crosses it is still in it. 0 means 4 MiB. The loop holds at most three times
	// as much: a batch that is committed, one that waits, and what the open
	// request may bring.
	MaxBatchBytes int
	// FlushAfter is how long a batch waits for more after its first message,
	// unless it is full. 0 means 50 ms: nobody waits for a record, and some twenty
	// commits a second cost little and leave the disk to the spool.
	FlushAfter time.Duration
	// Metrics and Logger are required.
	Metrics *Metrics
	Logger  *slog.Logger
}

const (
	// Retries of a failed commit and of a pull that cannot be opened. The first
	// comes soon, because a write lock is mostly held for milliseconds; the last
	// often enough that a store which is back is noticed at once.
	retryFirst, retryLast = 20 * time.Millisecond, 2 * time.Second
	// drain bounds what Run does after its context has ended: one commit that is
	// under way and two more batches. It leaves time for the rest of an ordered
	// stop of 25 s.
	drain = 10 * time.Second
)

// Msg is one message of a batch.
type Msg struct {
	Subject string
	Header  nats.Header
	Data    []byte

	reply  string
	reason string
}

// Terminate has the message terminated with the reason instead of acknowledged,
// after the handler has returned without error; an error takes it back. The
// handler has set it aside first. Both ends are final.
func (m *Msg) Terminate(reason string) {
	// The reason becomes part of a protocol line that people read.
	m.reason = strings.ToValidUTF8(reason[:min(len(reason), 256)], "\uFFFD")
	if m.reason == "" {
		m.reason = "set aside"
	}
}

// Handler commits a batch. When it returns nil, every message in it is durable
// elsewhere, or set aside and marked by Terminate. When it returns an error,
// nothing is acknowledged and the same batch is handed over again, after a wait
// that grows from 20 ms to 2 s: the error says that the store cannot be used,
// never that a message is bad. It may be called with messages that it has
// committed before. The batch is its own until it returns.
type Handler func(ctx context.Context, batch []Msg) error

// Consumer is the loop that hands messages to a handler, in batches, and
// acknowledges them after their commit. One batch is committed while the next is
// gathered. Several processes may share a durable.
//
// It survives everything that a server does: restarts, leader changes, streams
// and consumers that are deleted and made again, rollbacks.
type Consumer struct {
	o ConsumerOptions

	mu       sync.Mutex
	inFlight map[*batch]struct{} // gathered and not acknowledged

	notReady atomic.Pointer[error]
}

// NewConsumer checks the options.
func NewConsumer(o ConsumerOptions) (*Consumer, error) {
	if o.Conn == nil || o.Stream == "" || o.Durable == "" || o.Service == "" || o.Metrics == nil || o.Logger == nil {
		return nil, errors.New("consumer: Conn, Stream, Durable, Service, Metrics and Logger are required")
	}
	if o.MaxBatch == 0 {
		o.MaxBatch = 1000
	}
	if o.MaxBatchBytes == 0 {
		o.MaxBatchBytes = 4 << 20
	}
	if o.FlushAfter == 0 {
		o.FlushAfter = 50 * time.Millisecond
	}
	c := &Consumer{o: o, inFlight: make(map[*batch]struct{})}
	c.setReady(ErrNotConsuming)
	return c, nil
}

// Ready gives nil while messages are asked for, else an error that wraps
// [ErrNotConsuming], [ErrMissing], [ErrDiffers] or [ErrDisconnected]. It is a
// condition of readiness.
func (c *Consumer) Ready() error {
	if err := Connected(c.o.Conn); err != nil {
		return err
	}
	if err := c.notReady.Load(); err != nil {
		return *err
	}
	return nil
}

func (c *Consumer) setReady(err error) {
	if err == nil {
		c.notReady.Store(nil)
		return
	}
	c.notReady.Store(&err)
}

// Run consumes until ctx is done. It then asks for no more, and commits and
// acknowledges what has come, for at most 10 s; what the handler cannot commit
// then is given back to the server. It returns nil. It is called once.
func (c *Consumer) Run(ctx context.Context, handle Handler) error {
	// Commits outlive ctx: what was taken is committed.
	commitCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	drained := make(chan struct{})
	batches := make(chan *batch)

	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(batches)
		c.fetch(ctx, batches)
	})
	wg.Go(func() { c.keep(drained) })
	wg.Go(func() {
		select {
		case <-drained:
			return
		case <-ctx.Done():
		}
		bound := time.NewTimer(drain)
		defer bound.Stop()
		select {
		case <-drained:
		case <-bound.C:
			cancel()
		}
	})
	for b := range batches {
		c.commit(ctx, commitCtx, b, handle)
	}
	close(drained)
	wg.Wait()
	c.setReady(ErrNotConsuming)
	return nil
}

// fetch gathers batches until ctx is done.
func (c *Consumer) fetch(ctx context.Context, batches chan<- *batch) {
	backoff := retryFirst
	var last string // the trouble that was logged
	for ctx.Err() == nil {
		p, err := openPull(ctx, c.o)
		if err == nil {
			c.setReady(nil)
			if last != "" {
				c.o.Logger.Info("messages are consumed again", "stream", c.o.Stream)
				last = ""
			}
			var took bool
			took, err = c.drainPull(ctx, p, batches)
			if took {
				backoff = retryFirst
			}
		}
		if ctx.Err() != nil {
			return
		}
		c.setReady(fmt.Errorf("%w: %w", ErrNotConsuming, err))
		if err.Error() != last {
			last = err.Error()
			c.o.Logger.Warn("messages are not consumed", "stream", c.o.Stream, "err", err)
		}
		wait(ctx, backoff)
		backoff = min(2*backoff, retryLast)
	}
}

// drainPull hands over what the pull brings until it or ctx ends, and says
// whether it brought anything.
func (c *Consumer) drainPull(ctx context.Context, p *pull, batches chan<- *batch) (took bool, err error) {
	for err == nil {
		b := newBatch(p.ackWait)
		err = p.gather(ctx, b, c.o)
		if err != nil {
			p.close(b, ctx.Err() != nil)
		}
		if len(b.messages) == 0 {
			continue
		}
		took = true
		c.track(b)
		// Without a way out: the loop that commits takes batches until this
		// channel is closed, and bounds itself.
		batches <- b
	}
	return took, err
}

// commit hands the batch to the handler until it is committed, and acknowledges
// it. Once ctx is done it is tried once more and then given back.
func (c *Consumer) commit(ctx, commitCtx context.Context, b *batch, handle Handler) {
	defer c.untrack(b)
	backoff := retryFirst
	var last string
	for {
		err := handle(commitCtx, b.messages)
		if err == nil {
			break
		}
		c.o.Metrics.commitErrors.WithLabelValues(c.o.Service).Inc()
		if ctx.Err() != nil {
			c.o.Logger.Warn("a batch is given back uncommitted", "stream", c.o.Stream, "messages", len(b.messages), "err", err)
			c.answer(b, func(*Msg) []byte { return nak })
			return
		}
		if err.Error() != last {
			last = err.Error()
			c.o.Logger.Error("a batch is not committed and is tried again", "stream", c.o.Stream, "messages", len(b.messages), "err", err)
		}
		for i := range b.messages {
			b.messages[i].reason = "" // a try that failed has decided nothing
		}
		wait(ctx, backoff)
		backoff = min(2*backoff, retryLast)
	}
	if last != "" {
		c.o.Logger.Info("batches are committed again", "stream", c.o.Stream)
	}
	m := c.o.Metrics
	m.lastCommit.WithLabelValues(c.o.Service).SetToCurrentTime()
	m.batchSize.WithLabelValues(c.o.Service).Observe(float64(len(b.messages)))
	if b.redelivered > 0 {
		m.redelivered.WithLabelValues(c.o.Stream).Add(float64(b.redelivered))
	}
	c.answer(b, func(msg *Msg) []byte {
		if msg.reason == "" {
			return nil // an empty one is +ACK
		}
		m.terminated.WithLabelValues(c.o.Stream).Inc()
		return append([]byte("+TERM "), msg.reason...)
	})
}

var (
	nak        = []byte("-NAK")
	inProgress = []byte("+WPI")
)

// answer publishes one answer for each message of the batch, if the connection
// is still the one that brought it: after a server's restart the same sequence
// may name another message. Answers that are not sent, or lost, are made up for
// by a redelivery.
func (c *Consumer) answer(b *batch, body func(*Msg) []byte) {
	if c.o.Conn.Stats().Reconnects != b.reconnects {
		return
	}
	for i := range b.messages {
		if c.o.Conn.Publish(b.messages[i].reply, body(&b.messages[i])) != nil {
			return // disconnected
		}
	}
}

func (c *Consumer) track(b *batch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inFlight[b] = struct{}{}
}

func (c *Consumer) untrack(b *batch) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.inFlight, b)
}

// keep tells the server, well before AckWait is over, that the batches in hand
// are being worked on.
func (c *Consumer) keep(done <-chan struct{}) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-done:
			return
		case now := <-ticker.C:
			c.mu.Lock()
			var due []*batch
			for b := range c.inFlight {
				if now.Sub(b.kept) > b.ackWait/3 {
					b.kept = now
					due = append(due, b)
				}
			}
			c.mu.Unlock()
			for _, b := range due {
				c.answer(b, func(*Msg) []byte { return inProgress })
			}
		}
	}
}

// batch is what was gathered.
type batch struct {
	messages    []Msg
	bytes       int
	redelivered int
	reconnects  uint64 // of the connection that brought it
	ackWait     time.Duration
	kept        time.Time // when the server last heard of it; guarded by Consumer.mu once it is tracked
}

func newBatch(ackWait time.Duration) *batch {
	return &batch{ackWait: ackWait, kept: time.Now()}
}

func (b *batch) add(m *nats.Msg) {
	b.messages = append(b.messages, Msg{Subject: m.Subject, Header: m.Header, Data: m.Data, reply: m.Reply})
	b.bytes += m.Size()
	if redelivered(m.Reply) {
		b.redelivered++
	}
}

// redelivered reads the count of deliveries in the reply of a message:
// $JS.ACK.<stream>.<consumer>.<deliveries>.…, or with a domain and an account
// after ACK where the server has them.
func redelivered(reply string) bool {
	skip := 4
	if strings.Count(reply, ".") > 8 {
		skip = 6
	}
	rest := reply
	for range skip {
		_, rest, _ = strings.Cut(rest, ".")
	}
	count, _, _ := strings.Cut(rest, ".")
	return count != "" && count != "1"
}

// wait returns after d or when ctx is done.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
