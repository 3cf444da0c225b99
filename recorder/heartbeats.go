package recorder

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// beatStore is what keeps heartbeats.
type beatStore interface {
	SaveHeartbeats(ctx context.Context, beats []capture.Heartbeat) error
}

const (
	// beatPause is the least time between two saves, so that many ingresses cost
	// no more than ten small commits a second. A heartbeat waits no longer than
	// that, because a replay waits for it before each page.
	beatPause = 100 * time.Millisecond
	// saveTimeout bounds one try to save: what fails is superseded by the next
	// heartbeat, 250 ms later; a goodbye is tried again.
	saveTimeout = 5 * time.Second
	// maxIngresses bounds the memory that senders of heartbeats can take. Those
	// beyond it are not heard until others have been saved.
	maxIngresses = 4096
	// lagWindow is how long the least lag of an ingress counts. A clock that was
	// set back makes all later heartbeats look old for so long.
	lagWindow = 30 * time.Second
)

// heartbeats keeps the ledger's knowledge of the ingresses fresh. Of each
// ingress the last heartbeat counts, but for a goodbye, which is kept until it
// is saved.
type heartbeats struct {
	conn  *nats.Conn
	store beatStore
	log   *slog.Logger
	now   func() time.Time
	news  chan struct{} // holds one element when there is something to save

	mu    sync.Mutex
	beats map[string]heard // by ingress
	byes  []capture.Heartbeat
	lags  map[string]lag // by ingress
}

// heard is a heartbeat and when it was sent, by this process's clock, as far as
// that can be known.
type heard struct {
	beat capture.Heartbeat
	sent time.Time
}

// lag is the least distance between an ingress's clock and ours that its
// heartbeats have shown in the last while. What one shows beyond it is time that
// it spent on the way: in the socket of a process that stood still, above all.
type lag struct {
	start string
	least time.Duration
	since time.Time
}

func newHeartbeats(conn *nats.Conn, store beatStore, logger *slog.Logger) *heartbeats {
	return &heartbeats{
		conn: conn, store: store, log: logger, now: time.Now, news: make(chan struct{}, 1),
		beats: make(map[string]heard), lags: make(map[string]lag),
	}
}

func (h *heartbeats) run(ctx context.Context) error {
	// In a group, so that each is saved by one of several recorders.
	sub, err := h.conn.QueueSubscribe(capture.HeartbeatSubjects, capture.RecorderDurable, func(m *nats.Msg) { h.take(m.Subject, m.Data) })
	if err != nil {
		return fmt.Errorf("subscribe to heartbeats: %w", err)
	}
	defer func() { _ = sub.Unsubscribe() }() // the connection may be closed
	failing := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-h.news:
		}
		err := h.save(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !failing:
			h.log.Warn("heartbeats are not saved", "err", err)
		case err == nil && failing:
			h.log.Info("heartbeats are saved again")
		}
		failing = err != nil
		wait(ctx, beatPause)
	}
}

// take remembers a heartbeat. What is malformed, or speaks for an ingress on
// another's subject, is not one.
func (h *heartbeats) take(subject string, data []byte) {
	received := h.now()
	beat, err := capture.DecodeHeartbeat(data)
	if err == nil && subject != capture.HeartbeatSubject(beat.Ingress) {
		err = fmt.Errorf("%w: it names ingress %q", capture.ErrMalformed, beat.Ingress)
	}
	// A store may refuse a time that is no clock's, and all heartbeats of the
	// commit with it.
	if year := beat.Now.UTC().Year(); err == nil && (year < 1970 || year > 2200) {
		err = fmt.Errorf("%w: its clock shows the year %d", capture.ErrMalformed, year)
	}
	if err != nil {
		h.log.Warn("a heartbeat could not be read", "subject", subject, "err", err)
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case beat.Stopped:
		if len(h.byes) < maxIngresses {
			h.byes = append(h.byes, beat)
		}
		delete(h.beats, beat.Ingress)
		delete(h.lags, beat.Ingress)
	default:
		if _, known := h.beats[beat.Ingress]; !known && len(h.beats) >= maxIngresses {
			return // until the next save, which is soon
		}
		h.beats[beat.Ingress] = heard{beat, h.sent(&beat, received)}
	}
	select {
	case h.news <- struct{}{}:
	default:
	}
}

// sent estimates when the heartbeat was sent. The caller holds mu.
func (h *heartbeats) sent(b *capture.Heartbeat, received time.Time) time.Time {
	l, shown := h.lags[b.Ingress], received.Sub(b.Now)
	if l.start != b.Start || shown < l.least || received.Sub(l.since) > lagWindow {
		l = lag{start: b.Start, least: shown, since: received}
		if len(h.lags) >= maxIngresses {
			clear(h.lags) // names that are heard no more
		}
		h.lags[b.Ingress] = l
	}
	return received.Add(l.least - shown)
}

// save writes what was heard. Heartbeats that cannot be saved are superseded by
// the next; goodbyes are tried again.
func (h *heartbeats) save(ctx context.Context) error {
	h.mu.Lock()
	byes := h.byes
	h.byes = nil
	pending := h.beats
	h.beats = make(map[string]heard)
	h.mu.Unlock()

	if len(byes) > 0 {
		bounded, cancel := context.WithTimeout(ctx, saveTimeout)
		defer cancel()
		if err := h.store.SaveHeartbeats(bounded, byes); err != nil {
			h.mu.Lock()
			h.byes = append(byes, h.byes...)
			h.mu.Unlock()
			select {
			case h.news <- struct{}{}:
			default:
			}
			return err
		}
	}
	if len(pending) == 0 {
		return nil
	}
	now := h.now()
	beats := make([]capture.Heartbeat, 0, len(pending))
	for _, one := range pending {
		one.beat.Age = now.Sub(one.sent)
		beats = append(beats, one.beat)
	}
	bounded, cancel := context.WithTimeout(ctx, saveTimeout)
	defer cancel()
	return h.store.SaveHeartbeats(bounded, beats)
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
