package capture

import (
	"time"

	"github.com/google/uuid"
)

// State is what the facts about a request say of it.
type State string

const (
	// Received: captured, and no verdict yet.
	StateReceived State = "received"
	// StateFailed: the last attempt did not succeed.
	StateFailed State = "failed"
	// StateRejected: the API refused it (4xx). Not replayed unless asked for.
	StateRejected State = "rejected"
	// StateQuarantined: held back until an operator decides.
	StateQuarantined State = "quarantined"
	// StateDiscarded: given up by an operator.
	StateDiscarded State = "discarded"
	// StateProcessed: the API has processed it.
	StateProcessed State = "processed"
)

// States lists all states.
func States() []State {
	return []State{StateReceived, StateFailed, StateRejected, StateQuarantined, StateDiscarded, StateProcessed}
}

// Open reports whether somebody still has to do something about the request.
// What is open never expires.
func (s State) Open() bool {
	return s == StateReceived || s == StateFailed || s == StateQuarantined
}

// Verdict is what one attempt, or one completion event, says.
type Verdict string

const (
	NoVerdict Verdict = ""
	Processed Verdict = "processed"
	Failed    Verdict = "failed"
	Rejected  Verdict = "rejected"
)

// Valid reports whether v is one of the four verdicts.
func (v Verdict) Valid() bool {
	return v == NoVerdict || v == Processed || v == Failed || v == Rejected
}

// FirstAttempt is the number of the ingress's own try. Replays count on.
const FirstAttempt = 1

// Attempt is one try to have the API process a request. It is known when it
// starts (a replay) or when it has ended (the first try); an attempt whose end
// is not known has a zero EndedAt and no verdict.
type Attempt struct {
	Number    int
	Run       string // id of the replay run, empty for the first try
	StartedAt time.Time
	EndedAt   time.Time // zero while it is not known to have ended
	Status    int       // of the API's answer, 0 without one
	Error     string    // why there is no whole answer, in a few words
	Verdict   Verdict
}

// Outcome is the gateway's word about an attempt that has ended, as it travels
// on [OutcomeSubject].
type Outcome struct {
	ID      uuid.UUID
	Ingress string // who says so, empty if not an ingress
	Attempt Attempt
	// Answer is what was kept of the API's answer, nil where the route keeps none
	// or none came. It is data to compare with, and says nothing about the state.
	Answer *Answer
}

// Event is the API's word about a request, as it travels on [EventSubject].
// Its outcome is [Processed] or [Failed], nothing else.
type Event struct {
	ID      uuid.UUID
	Outcome Verdict
	Attempt int // the X-Request-Attempt that the API received, 1 when absent
	Detail  string
}

// Quarantine holds a request back. Number tells the quarantines of one request
// apart, counting from 1.
type Quarantine struct {
	Number     int
	Reason     string // "killer" or "late", for programs
	Detail     string // the evidence, for people
	At         time.Time
	ReleasedAt time.Time // zero while it holds
	// ReleasedAfter is the number of the last attempt when it was released: the
	// request counts as failed until a later one.
	ReleasedAfter int
}

// Reasons of a quarantine.
const (
	QuarantineKiller = "killer"
	QuarantineLate   = "late"
)

// Facts is what is known of one captured request. The order of the slices and
// repeated elements make no difference to [Facts.State].
type Facts struct {
	Attempts    []Attempt
	Events      []Event
	Quarantines []Quarantine
	Discarded   bool
}

// State computes the state of a captured request. Discarded goes before
// processed (any attempt's, any event's), before quarantined, before what the
// attempt with the highest number says: failed, rejected, or received while it
// has no verdict. The first try counts as an attempt without verdict until it
// is known.
//
// A failed event is the verdict of the one attempt it names and outranks that
// attempt's own failed or rejected; while no such attempt is known it says
// nothing, so that a wrong number cannot hide what later attempts say. Of
// several results of one attempt the best wins: processed, then failed, then
// rejected.
func (f Facts) State() State {
	if f.Discarded {
		return StateDiscarded
	}
	for _, e := range f.Events {
		if e.Outcome == Processed {
			return StateProcessed
		}
	}
	last, verdict := FirstAttempt, NoVerdict
	for _, a := range f.Attempts {
		if a.Verdict == Processed {
			return StateProcessed
		}
		switch {
		case a.Number > last:
			last, verdict = a.Number, a.Verdict
		case a.Number == last && (verdict == NoVerdict || a.Verdict == Failed):
			verdict = a.Verdict
		}
	}
	for _, q := range f.Quarantines {
		if q.ReleasedAt.IsZero() {
			if !f.released(q.Number) {
				return StateQuarantined
			}
		} else if q.ReleasedAfter >= last {
			verdict = Failed
		}
	}
	for _, e := range f.Events {
		if e.Outcome == Failed && e.Attempt == last {
			verdict = Failed
		}
	}
	switch verdict {
	case Failed:
		return StateFailed
	case Rejected:
		return StateRejected
	default:
		return StateReceived
	}
}

func (f Facts) released(number int) bool {
	for _, q := range f.Quarantines {
		if q.Number == number && !q.ReleasedAt.IsZero() {
			return true
		}
	}
	return false
}
