package stream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// TrimOptions say what a trimmer trims.
type TrimOptions struct {
	// JS, Stream and Durable say where. Required.
	JS              jetstream.JetStream
	Stream, Durable string
	// Keep is how long committed messages are kept to look at. 0 means 24 h.
	Keep time.Duration
	// Every is how often it looks. 0 means 2 s: so often that a stream which
	// fills at 100 MB/s and is to hold 1 GiB is trimmed before it is full.
	Every time.Duration
	// Metrics and Logger are required.
	Metrics *Metrics
	Logger  *slog.Logger
}

// trimSteps bounds one look: each step purges half of what is estimated to be
// too much, and looks again, so that eight leave less than one part in 250.
const trimSteps = 8

// leastTrim is the part of a stream that is worth a purge: else a window that
// slides would be trimmed by a few messages at every look.
const leastTrim = 1.0 / 64

// Trimmer purges what the durable has acknowledged from the front of the
// stream, except for a window to look at and to rebuild from: what is younger
// than Keep, as long as the whole stream takes no more than half of its
// max_bytes. So while the consumer keeps up, half of the stream is free for what
// is not committed yet, and when it does not, nothing that is committed takes
// room.
//
// It never purges past the ack floor. Of JetStream's API it uses STREAM.INFO,
// CONSUMER.INFO and STREAM.PURGE.
type Trimmer struct{ o TrimOptions }

// NewTrimmer checks the options.
func NewTrimmer(o TrimOptions) (*Trimmer, error) {
	if o.JS == nil || o.Stream == "" || o.Durable == "" || o.Metrics == nil || o.Logger == nil {
		return nil, errors.New("trimmer: JS, Stream, Durable, Metrics and Logger are required")
	}
	if o.Keep == 0 {
		o.Keep = 24 * time.Hour
	}
	if o.Every == 0 {
		o.Every = 2 * time.Second
	}
	return &Trimmer{o: o}, nil
}

// Run trims until ctx is done, and returns nil. What fails is tried again at the
// next look, and logged once as long as it is the same.
func (t *Trimmer) Run(ctx context.Context) error {
	var last string
	for ctx.Err() == nil {
		switch err := t.Trim(ctx); {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			last = ""
		case err.Error() != last:
			last = err.Error()
			t.o.Logger.Warn("the stream is not trimmed", "stream", t.o.Stream, "err", err)
		}
		wait(ctx, t.o.Every)
	}
	return nil
}

// Trim takes one look and purges what may go.
func (t *Trimmer) Trim(ctx context.Context) error {
	for range trimSteps {
		// One bound for a look and a purge of some 100,000 messages.
		step, cancel := context.WithTimeout(ctx, apiTimeout)
		more, err := t.step(step)
		cancel()
		if err != nil || !more {
			return err
		}
	}
	return nil
}

// step purges half of what is too much, and says whether there is more.
func (t *Trimmer) step(ctx context.Context) (more bool, err error) {
	// The consumer first: acknowledgements that come between the two only make
	// the floor older than it is.
	consumer, err := t.o.JS.Consumer(ctx, t.o.Stream, t.o.Durable)
	if err != nil {
		return false, fmt.Errorf("look at consumer: %w", err)
	}
	stream, err := t.o.JS.Stream(ctx, t.o.Stream)
	if err != nil {
		return false, fmt.Errorf("look at stream: %w", err)
	}
	c, s := consumer.CachedInfo(), stream.CachedInfo()
	t.o.Metrics.pending.WithLabelValues(t.o.Stream).Set(float64(c.NumPending) + float64(c.NumAckPending))
	keep := firstToKeep(s.State, s.Config.MaxBytes, c.AckFloor.Stream, s.TimeStamp.Add(-t.o.Keep))
	if keep == 0 {
		return false, nil
	}
	if err := stream.Purge(ctx, jetstream.WithPurgeSequence(keep)); err != nil {
		return false, fmt.Errorf("purge: %w", err)
	}
	t.o.Metrics.trimmed.WithLabelValues(t.o.Stream).Add(float64(keep - s.State.FirstSeq))
	return true, nil
}

// firstToKeep is the sequence up to which, itself not included, may be purged
// in this step; 0 when nothing may go. It is above FirstSeq, at most floor+1,
// and at most LastSeq, so that no purge ever empties a stream or reaches past
// its end.
//
// Sequences of the window's edges are not known, only sums: they are
// interpolated, as if all messages were of one size and came at one pace, and
// half of the way is gone in one step, so that an estimate which is wrong is
// corrected by the next. One that goes too far costs a look at old messages.
func firstToKeep(s jetstream.StreamState, maxBytes int64, floor uint64, since time.Time) uint64 {
	// An ack floor beyond the end belongs to messages that a rollback took: it
	// says nothing about those that have their sequences now.
	if s.Msgs == 0 || floor > s.LastSeq || floor < s.FirstSeq {
		return 0
	}
	span := float64(s.LastSeq - s.FirstSeq + 1)
	var over float64 // part of the span that is too much
	if half := float64(maxBytes) / 2; maxBytes > 0 && float64(s.Bytes) > half {
		over = (float64(s.Bytes) - half) / float64(s.Bytes)
	}
	if s.FirstTime.Before(since) {
		part := 1.0
		if age := s.LastTime.Sub(s.FirstTime); s.LastTime.After(since) {
			part = float64(since.Sub(s.FirstTime)) / float64(age)
		}
		over = max(over, part)
	}
	if over < leastTrim {
		return 0
	}
	// At least one message, so that steps end.
	keep := s.FirstSeq + max(uint64(span*over/2), 1)
	keep = min(keep, floor+1, s.LastSeq)
	if keep <= s.FirstSeq {
		return 0
	}
	return keep
}
