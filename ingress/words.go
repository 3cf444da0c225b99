package ingress

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
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
	heard   func() // called after each word that named this start or an earlier one
}

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
	for i, r := range word.Released {
		ranges[i] = spool.Range{First: r[0], Last: r[1]}
	}
	if w.spool.Release(start, ranges...) > 0 {
		w.heard()
	}
}

// beat sends a heartbeat. One that is lost is followed by the next.
func (w *words) beat(stopped bool) {
	stats := w.spool.Stats()
	beat := capture.Heartbeat{
		Ingress: w.ingress, Start: w.spool.Start().String(), Now: time.Now(),
		Unreleased: stats.Unreleased, OldestUnreleased: stats.OldestUnreleased,
		Stopped: stopped && stats.Unreleased == 0,
	}
	data, err := beat.Encode()
	if err == nil {
		err = w.nc.Publish(capture.HeartbeatSubject(w.ingress), data)
	}
	if err != nil {
		w.log.Debug("a heartbeat was not sent", "err", err)
	}
}
