package ingress

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/spool"
)

// heartbeatEvery is how often the ingress says what its spool holds. A replay
// waits for a heartbeat before each page, so this is the least such a wait takes.
const heartbeatEvery = 250 * time.Millisecond

// words listens for the words that release spool records, and tells the
// recorder by heartbeats what is not released yet.
type words struct {
	nc      *nats.Conn
	spool   *spool.Spool
	ingress string
	log     *slog.Logger
	// heard is told of the last record of this start that a word released, and
	// whether that was a completion.
	heard func(at spool.Position, completion bool)
	// captured counts the captures of this start that were durable when their
	// answers were let go.
	captured *atomic.Int64

	reader  *spool.Reader
	sampled time.Time
}

// sampleEvery bounds how often a word's record is looked up: a look reads from
// the disk's cache, and the evidence that it gives is needed every few seconds.
const sampleEvery = 20 * time.Millisecond

func (w *words) run(ctx context.Context) error {
	sub, err := w.nc.Subscribe(capture.CommittedSubject(w.ingress), w.take)
	if err != nil {
		return fmt.Errorf("subscribe to words: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	tick := time.NewTicker(heartbeatEvery)
	defer tick.Stop()
	for {
		w.beat(false)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// take releases what a word names. A malformed one is nobody's loss: what it
// named is published again.
func (w *words) take(m *nats.Msg) {
	word, err := capture.DecodeWord(m.Data)
	var start spool.StartID
	if err == nil && hex.DecodedLen(len(word.Start)) == len(start) {
		_, err = hex.Decode(start[:], []byte(word.Start))
	}
	if err != nil {
		w.log.Warn("a word could not be read", "err", err)
		return
	}
	ranges := make([]spool.Range, len(word.Released))
	var last uint64
	for i, r := range word.Released {
		ranges[i] = spool.Range{First: r[0], Last: r[1]}
		last = max(last, r[1])
	}
	at := spool.Position{Start: start, Index: last}
	completion, known := w.look(at)
	if w.spool.Release(start, ranges...) > 0 && known {
		w.heard(at, completion)
	}
}

// look tells whether a record of this start, not released yet, is a completion.
func (w *words) look(at spool.Position) (completion, known bool) {
	if at.Start != w.spool.Start() || time.Since(w.sampled) < sampleEvery {
		return false, false
	}
	w.sampled = time.Now()
	if w.reader == nil {
		w.reader = w.spool.NewReader()
	}
	w.reader.Rewind(at)
	rec, ok, err := w.reader.TryNext()
	if !ok || err != nil || rec.Position != at {
		return false, false
	}
	msg, err := capture.ParseRecord(rec.Data)
	return isCompletion(msg), err == nil
}

func isCompletion(m capture.Message) bool { return capture.IsOutcomeSubject(m.Subject) }

// beat sends a heartbeat. One that is lost is followed by the next.
func (w *words) beat(stopped bool) {
	// The count, then the time: it vouches for what was appended before it.
	captured := w.captured.Load()
	now := w.spool.Now()
	stats := w.spool.Stats()
	beat := capture.Heartbeat{
		Ingress: w.ingress, Start: w.spool.Start().String(), Now: now,
		Unreleased: stats.Unreleased, OldestUnreleased: stats.OldestUnreleased,
		Captured: captured,
		Stopped:  stopped && stats.Unreleased == 0,
	}
	data, err := beat.Encode()
	if err == nil {
		err = w.nc.Publish(capture.HeartbeatSubject(w.ingress), data)
	}
	if err != nil {
		w.log.Debug("a heartbeat was not sent", "err", err)
	}
}
