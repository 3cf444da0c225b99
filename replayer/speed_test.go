package replayer_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/holdfast-io/holdfast/replayer"
)

// sentAt runs at a speed and gives when each request arrived, by the run's clock.
func sentAt(t *testing.T, factor float64, maxGap time.Duration, slow map[int]time.Duration, gaps ...time.Duration) []time.Duration {
	t.Helper()
	b := newBooks(t)
	requests := many(len(gaps) + 1)
	at := time.Now().Add(-time.Hour)
	for i := range requests {
		requests[i].received = at
		if i < len(gaps) {
			at = at.Add(gaps[i])
		}
	}
	b.capture(t, requests...)
	c := newClock()
	began := c.Now()
	var arrived []time.Duration
	a := newAPI(t, func(http.ResponseWriter, *http.Request, int) {
		c.pass(slow[len(arrived)])
		arrived = append(arrived, c.Now().Sub(began)-slow[len(arrived)])
	})
	o := options(t, b, a.URL)
	o.Clock, o.Speed, o.MaxGap, o.Concurrency = c, factor, maxGap, 1
	report := mustRun(t, o)
	require.Equal(t, replayer.ExitOK, report.ExitCode)
	require.Len(t, arrived, len(requests))
	return arrived
}

func TestSpeedSendsAtTheOriginalPaceTimesAFactor(t *testing.T) {
	s := time.Second
	gaps := []time.Duration{2 * s, 0, 30 * s, 10 * time.Minute, -5 * s, 4 * s}
	require.Equal(t, []time.Duration{0, 2 * s, 2 * s, 32 * s, 92 * s, 92 * s, 92 * s}, sentAt(t, 1, 0, nil, gaps...))
	require.Equal(t, []time.Duration{0, s / 5, s / 5, 16 * s / 5, 46 * s / 5, 46 * s / 5, 46 * s / 5}, sentAt(t, 10, 0, nil, gaps...))
	require.Equal(t, []time.Duration{0, 4 * s, 4 * s, 14 * s, 24 * s, 24 * s, 24 * s}, sentAt(t, 0.5, 5*s, nil, gaps...))
}

// TestARunThatLagsAtASpeed catches up with what is little, and goes on from where
// it is where it is much.
func TestARunThatLagsAtASpeed(t *testing.T) {
	s := time.Second
	require.Equal(t, []time.Duration{0, 2 * s, 4 * s, 6 * s}, sentAt(t, 1, 0, map[int]time.Duration{1: 900 * time.Millisecond}, 2*s, 2*s, 2*s))
	require.Equal(t, []time.Duration{0, s, 11 * s, 12 * s}, sentAt(t, 1, 0, map[int]time.Duration{1: 10 * s}, s, s, s))
}
