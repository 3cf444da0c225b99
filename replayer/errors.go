package replayer

import (
	"errors"
	"strings"
)

// Errors that end a run before it went through its selection. What was not sent
// stays replayable in all cases.
var (
	// ErrInterrupted: Options.Stop was closed.
	ErrInterrupted = errors.New("interrupted")
	// ErrCancelled: an operator cancelled the run.
	ErrCancelled = errors.New("cancelled by an operator")
	// ErrPaused: the API could not be reached, or asked to wait, for longer than
	// Options.PauseLimit.
	ErrPaused = errors.New("paused for too long")
	// ErrLost: the run's lease was lost, so another process may work on it.
	ErrLost = errors.New("another process has taken the run over")
	// ErrProduction: a test replay would reach an API that requests were captured
	// for.
	ErrProduction = errors.New("a test replay must not reach it")
	// ErrNoUpstream: a request's route has no upstream.
	ErrNoUpstream = errors.New("route has no upstream")
)

// FenceError says what a fence was still waiting for when its time was up.
type FenceError struct {
	Waits []string // each a sentence for people
}

// Error lists everything that is waited for.
func (e *FenceError) Error() string {
	return "no replay goes out before everything said so far has reached the ledger: " + strings.Join(e.Waits, "; ")
}

// usageError is everything that is wrong with flags and settings.
type usageError struct {
	problems []string
}

func (e *usageError) Error() string { return strings.Join(e.problems, "; ") }
