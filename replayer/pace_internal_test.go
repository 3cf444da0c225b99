package replayer

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// round has everything that may be in flight answered, each after took.
func round(w *window, took time.Duration) (n int) {
	var numbers []int64
	for w.room() > 0 {
		numbers = append(numbers, w.begin())
	}
	for range numbers {
		w.end()
		w.answered(took)
	}
	return len(numbers)
}

func TestAWindowStartsSlowlyAndDoubles(t *testing.T) {
	w := newWindow(20)
	var rounds []int
	for range 7 {
		rounds = append(rounds, round(&w, time.Millisecond))
	}
	require.Equal(t, []int{1, 2, 4, 8, 16, 20, 20}, rounds)
	require.Equal(t, 20, w.reached)
	require.Zero(t, w.cuts)
}

func TestAWindowIsHalvedOnceForWhatWasInFlightTogether(t *testing.T) {
	w := newWindow(16)
	for range 5 {
		round(&w, time.Millisecond)
	}
	var numbers []int64
	for w.room() > 0 {
		numbers = append(numbers, w.begin())
	}
	require.Len(t, numbers, 16)
	for _, n := range numbers {
		w.end()
		w.overloaded(n)
	}
	require.Equal(t, 1, w.cuts)
	require.Equal(t, 8, w.room())
	// From then on it grows by one a round.
	var rounds []int
	for range 4 {
		rounds = append(rounds, round(&w, time.Millisecond))
	}
	require.Equal(t, []int{8, 8, 9, 10}, rounds)
	for range 20 {
		n := w.begin()
		w.end()
		w.overloaded(n)
	}
	require.Equal(t, 1, w.room(), "not below one")
	require.Equal(t, 21, w.cuts)
}

func TestAWindowIsHeldWhileAnswersAreSlow(t *testing.T) {
	w := newWindow(1000)
	for range 5 {
		round(&w, 10*time.Millisecond)
	}
	held := w.room()
	require.Equal(t, 32, held)
	for range 3 {
		round(&w, 100*time.Millisecond)
	}
	require.Less(t, w.room(), held+held/2, "it stops within a round")
	held = w.room()
	round(&w, 100*time.Millisecond)
	require.Equal(t, held, w.room())
	require.Zero(t, w.cuts, "to be slow is no refusal")
	for range 3 {
		round(&w, 10*time.Millisecond)
	}
	require.Greater(t, w.room(), held)
}

// What an API's requests cost may change for good.
func TestAWindowForgetsTheBestTime(t *testing.T) {
	w := newWindow(1000)
	for range 5 {
		round(&w, 10*time.Millisecond)
	}
	rounds := 0
	for held := w.room(); w.room() <= 2*held; rounds++ {
		require.Less(t, rounds, 100)
		round(&w, 40*time.Millisecond)
	}
}

func TestAWindowDoesNotMindNoise(t *testing.T) {
	w := newWindow(64)
	for range 4 {
		round(&w, 100*time.Microsecond)
	}
	for range 3 {
		round(&w, time.Millisecond)
	}
	require.Equal(t, 64, w.room())
}
