package replayer

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// attempt sends one begun request, hands its result to the writer, and tells
// the pass.
func (r *runner) attempt(begin, flight context.Context, it *item) {
	defer r.flying.Done()
	b := it.begun
	a := capture.Attempt{Number: b.Attempt, Run: r.run.ID, StartedAt: r.Clock.Now().UTC()}
	got, sent := r.send(begin, flight, it.up, it.c, b, a)
	a.EndedAt = r.Clock.Now().UTC()
	a.Status = got.status
	if got.err != nil {
		a.Error = got.err.Error()
	}
	a.Verdict = it.c.Policy.Verdict(got.status, got.whole, true)
	if errors.Is(got.err, ErrProduction) {
		r.halt(got.err)
	}
	if sent {
		r.tally.sent()
	}
	// Before anything else: what died may be back in a moment.
	var exam error
	if it.alone && sent && it.well && got.death() != "" {
		if exam = it.up.Examine(begin); begin.Err() != nil {
			exam = nil // that is why, and no evidence
		}
	}
	// Its place is free once the writer has room: results do not pile up.
	r.writer.add(ledger.Ended{ID: b.ID, Token: b.Token, Attempt: a, Answer: got.kept})
	r.post(event{id: b.ID, landed: true, sent: sent, got: got, exam: exam, verdict: a.Verdict, began: a.StartedAt, ended: a.EndedAt})
}

// event is what became of an attempt: it has landed, and its result was written.
// Both come in any order.
type event struct {
	id           uuid.UUID
	landed       bool // else written
	sent         bool
	got          answer
	exam         error // of the API, after a death alone
	verdict      capture.Verdict
	began, ended time.Time
	lost         bool // not written: the lease was somebody else's
}

// post hands an event to the pass. It never waits.
func (r *runner) post(e event) {
	r.eventsMu.Lock()
	r.events = append(r.events, e)
	r.eventsMu.Unlock()
	select {
	case r.signal <- struct{}{}:
	default:
	}
}

// take gives the events that have come.
func (r *runner) take() []event {
	r.eventsMu.Lock()
	defer r.eventsMu.Unlock()
	events := r.events
	r.events = nil
	return events
}

// send sends unless that is no longer allowed.
func (r *runner) send(begin, flight context.Context, up *Upstream, c ledger.Candidate, b ledger.Begun, a capture.Attempt) (got answer, sent bool) {
	if begin.Err() != nil {
		return answer{err: fmt.Errorf("not sent: %w", context.Cause(begin))}, false
	}
	// On its own goroutine, so that a cut run need not wait for the API. The
	// goroutine ends by the timeout.
	done := make(chan answer, 1)
	go func() { done <- up.send(flight, r.Ledger, c, a, b.Expires, r.keeps(flight, up, c)) }()
	select {
	case got = <-done:
		return got, !got.unsent
	case <-flight.Done():
		return answer{err: errors.New("interrupted before the answer came")}, true
	}
}

// keeps is how many bytes of the answer are kept: as the route says, and from a
// test system as much as there may be to compare with.
func (r *runner) keeps(ctx context.Context, up *Upstream, c ledger.Candidate) int {
	if r.Target == "" {
		return up.keep
	}
	answers, err := r.Ledger.Answers(ctx, c.ID)
	if err != nil {
		r.Logger.Warn("answers could not be read, bodies are not compared", "request_id", c.ID, "err", err)
	}
	for i := range answers {
		if !answers[i].Elsewhere {
			return capture.MaxAnswer
		}
	}
	return 0
}

// shape lets an answer shape the pace at which its API is sent to.
func (r *runner) shape(it *item, took time.Duration) {
	gate, got := it.lane.gate, &it.got
	wait, asked := waitOf(got.retryAfter, r.Clock.Now())
	asked = asked && (got.status == http.StatusTooManyRequests || got.status == http.StatusServiceUnavailable)
	switch {
	case got.overload():
		gate.window.overloaded(it.number)
	case got.whole && got.death() == "":
		gate.window.answered(took)
	}
	switch {
	case got.unconnected:
		gate.refused()
	case asked:
		gate.askedToWait(wait)
	case got.death() != "":
		gate.died(got.broke)
	case got.whole:
		gate.answered()
	}
}

// wrote counts a result that is in the ledger, or that somebody else's lease
// kept out of it.
func (r *runner) wrote(e ledger.Ended, lost bool) {
	r.post(event{id: e.ID, lost: lost})
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
