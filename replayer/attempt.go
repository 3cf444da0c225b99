package replayer

import (
	"context"
	"errors"
	"fmt"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// attempt sends one begun request and hands its result to the writer.
func (r *runner) attempt(begin, flight context.Context, c ledger.Candidate, b ledger.Begun) {
	defer func() { <-r.places }()
	a := capture.Attempt{Number: b.Attempt, Run: r.run.ID, StartedAt: r.Clock.Now().UTC()}
	up, err := r.Upstreams.For(c.Route)
	got, sent := answer{err: err}, false
	if err == nil {
		got, sent = r.send(begin, flight, up, c, b, a)
	}
	a.EndedAt = r.Clock.Now().UTC()
	a.Status = got.status
	if got.err != nil {
		a.Error = got.err.Error()
	}
	a.Verdict = c.Policy.Verdict(got.status, got.whole, true)
	if sent {
		r.tally.sent()
		r.shape(r.gates.before(up), got)
	}
	r.writer.add(ledger.Ended{ID: b.ID, Token: b.Token, Attempt: a})
}

// send sends unless that is no longer allowed.
func (r *runner) send(begin, flight context.Context, up *Upstream, c ledger.Candidate, b ledger.Begun, a capture.Attempt) (got answer, sent bool) {
	if begin.Err() != nil {
		return answer{err: fmt.Errorf("not sent: %w", context.Cause(begin))}, false
	}
	// On its own goroutine, so that a cut run need not wait for the API. The
	// goroutine ends by the timeout.
	done := make(chan answer, 1)
	go func() { done <- up.send(flight, r.Ledger, c, a, b.Expires) }()
	select {
	case got = <-done:
		return got, !got.unsent
	case <-flight.Done():
		return answer{err: errors.New("interrupted before the answer came")}, true
	}
}

// shape lets an answer shape the pace at which its API is sent to.
func (r *runner) shape(gate *gate, got answer) {
	switch wait, ok := waitOf(got.retryAfter, r.Clock.Now()); {
	case got.unconnected:
		gate.refused()
	case ok && (got.status == 429 || got.status == 503):
		gate.askedToWait(wait)
	case got.whole:
		gate.answered()
	}
}

// wrote counts a result that is in the ledger, or that somebody else's lease
// kept out of it.
func (r *runner) wrote(e ledger.Ended, lost bool) {
	if lost {
		r.Logger.Warn("result came after the lease was lost", "request_id", e.ID, "attempt", e.Attempt.Number)
		return
	}
	r.tally.ended(e)
	counts, _ := r.tally.read()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Progress.Update(Status{Total: r.total, RunCounts: counts})
}
