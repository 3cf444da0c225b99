package recorder

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

// savedBeats is what a store was given.
type savedBeats struct {
	err   error
	calls [][]capture.Heartbeat
}

func (s *savedBeats) SaveHeartbeats(_ context.Context, beats []capture.Heartbeat) error {
	if s.err != nil {
		return s.err
	}
	s.calls = append(s.calls, beats)
	return nil
}

// beatClock is the recorder's clock; the ingress's is an hour ahead.
type beatClock struct{ now time.Time }

func newBeatTest(t *testing.T) (*heartbeats, *savedBeats, *beatClock, func(start string, age time.Duration, stopped bool)) {
	store, clock := &savedBeats{}, &beatClock{time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	h := newHeartbeats(nil, store, slog.New(slog.DiscardHandler))
	h.now = func() time.Time { return clock.now }
	return h, store, clock, func(start string, age time.Duration, stopped bool) {
		sent := clock.now.Add(time.Hour - age)
		b := capture.Heartbeat{Ingress: "gw1", Start: start, Now: sent, Unreleased: 1, OldestUnreleased: sent.Add(-time.Second), Stopped: stopped}
		data, err := b.Encode()
		require.NoError(t, err)
		h.take(capture.HeartbeatSubject("gw1"), data)
	}
}

func TestHeartbeatCarriesItsAge(t *testing.T) {
	h, store, clock, hear := newBeatTest(t)
	hear("a", 0, false)
	clock.now = clock.now.Add(300 * time.Millisecond) // it waits to be saved
	require.NoError(t, h.save(t.Context()))
	require.Len(t, store.calls, 1)
	beat := store.calls[0][0]
	require.Equal(t, 300*time.Millisecond, beat.Age)
	require.Equal(t, time.Second, beat.UnreleasedFor(), "by the ingress's clock, when it was sent")
	require.NoError(t, h.save(t.Context()))
	require.Len(t, store.calls, 1, "saved once")
}

func TestStaleHeartbeatIsNotNews(t *testing.T) {
	h, store, clock, hear := newBeatTest(t)
	hear("a", 0, false)
	require.NoError(t, h.save(t.Context()))
	last := func() time.Duration {
		require.NoError(t, h.save(t.Context()))
		return store.calls[len(store.calls)-1][0].Age
	}
	// The process stood still: what it reads now was sent long ago.
	clock.now = clock.now.Add(10 * time.Second)
	hear("a", 9*time.Second, false)
	require.Equal(t, 9*time.Second, last())
	hear("a", 0, false)
	require.Zero(t, last())
	// An ingress whose clock was set back is believed again after a while.
	hear("a", time.Minute, false)
	require.Equal(t, time.Minute, last())
	clock.now = clock.now.Add(lagWindow + time.Second)
	hear("a", time.Minute, false)
	require.Zero(t, last())
	// Another start has another clock, maybe.
	hear("b", 2*time.Minute, false)
	require.Zero(t, last())
}

func TestHeartbeatThatIsNotSavedIsSuperseded(t *testing.T) {
	h, store, clock, hear := newBeatTest(t)
	store.err = errors.New("locked")
	hear("a", 0, false)
	require.ErrorIs(t, h.save(t.Context()), store.err)
	store.err = nil
	require.NoError(t, h.save(t.Context()))
	require.Empty(t, store.calls)
	clock.now = clock.now.Add(time.Second)
	hear("a", 0, false)
	hear("a", 0, false)
	require.NoError(t, h.save(t.Context()))
	require.Len(t, store.calls, 1)
	require.Len(t, store.calls[0], 1, "the last one of an ingress")
}

func TestGoodbyeIsKeptUntilItIsSaved(t *testing.T) {
	h, store, clock, hear := newBeatTest(t)
	hear("a", 0, false)
	hear("a", 0, true)
	<-h.news
	store.err = errors.New("locked")
	require.ErrorIs(t, h.save(t.Context()), store.err)
	<-h.news // it is not forgotten
	clock.now = clock.now.Add(time.Hour)
	store.err = nil
	require.NoError(t, h.save(t.Context()))
	require.Len(t, store.calls, 1)
	require.True(t, store.calls[0][0].Stopped)
}

func TestSendersOfHeartbeatsAreBounded(t *testing.T) {
	h, _, clock, _ := newBeatTest(t)
	for i := range 3 * maxIngresses {
		name := "gw" + time.Duration(i).String()
		name = capture.IngressFromHost(name)
		b := capture.Heartbeat{Ingress: name, Start: "a", Now: clock.now}
		data, err := b.Encode()
		require.NoError(t, err)
		h.take(capture.HeartbeatSubject(name), data)
	}
	require.LessOrEqual(t, len(h.lags), maxIngresses)
	require.LessOrEqual(t, len(h.beats), maxIngresses)
}
