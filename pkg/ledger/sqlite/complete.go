package sqlite

import (
	"context"
	"fmt"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Complete implements [ledger.Completer].
func (s *Store) Complete(ctx context.Context, facts []ledger.Fact) ([]error, error) {
	if len(facts) == 0 {
		return nil, nil
	}
	var size int64
	for i := range facts {
		if o := facts[i].Outcome; o != nil {
			size += costOf(o.Answer)
		}
	}
	answers, err := s.roomForAnswers(size)
	if err != nil {
		return nil, fmt.Errorf("complete: %w", err)
	}
	return s.batch(ctx, "complete", len(facts),
		func(t *tx, items func() error) error {
			// The quick path does not know the sizes of the payloads that it
			// makes processed: they are what the index has more of afterwards.
			// What the careful path adds is counted there, and taken off here.
			before, err := t.keptNow()
			if err != nil {
				return err
			}
			counted := t.deltas[counterPayloadBytes]
			if err := items(); err != nil {
				return err
			}
			after, err := t.keptNow()
			if err != nil {
				return err
			}
			counted = t.deltas[counterPayloadBytes] - counted
			t.add(counterPayloadBytes, after-before-counted+t.answered.before)
			return t.capEarly()
		},
		func(t *tx, i int) error {
			if o := facts[i].Outcome; answers && o != nil && o.Answer != nil && o.ID != uuid.Nil {
				if err := t.keepAnswer(o.ID, o.Attempt.Run, o.Attempt.Number, o.Answer, false); err != nil {
					return err
				}
			}
			return t.completeOne(&facts[i])
		})
}

// keptNow is how many bytes of payload became processed at this transaction's
// time.
func (t *tx) keptNow() (int64, error) {
	var n int64
	_, err := t.get([]any{&n}, "SELECT coalesce(sum(payload), 0) FROM requests WHERE kept = 1 AND changed = ? AND state >= 3", t.now)
	return n, err
}

func (t *tx) completeOne(f *ledger.Fact) error {
	switch {
	case f.Outcome != nil && f.Event != nil, f.Outcome == nil && f.Event == nil:
		return refuse("a fact that is not one of outcome and event")
	case f.ID() == uuid.Nil:
		return refuse("no id")
	case f.Event != nil:
		e, err := newEvent(f.Event, t.now)
		if err != nil {
			return err
		}
		return t.slow(f.Event.ID, nil, &e)
	}
	a, err := newAttempt(f.Outcome.Attempt, t.now)
	if err != nil {
		return err
	}
	if a.inline() {
		if done, err := t.quick(f.Outcome.ID, &a); done || err != nil {
			return err
		}
	}
	return t.slow(f.Outcome.ID, &a, nil)
}

// quick takes the first and only fact about a captured request, which is nearly
// all there is to do: one statement, which changes nothing in any other case.
func (t *tx) quick(id uuid.UUID, a *attempt) (done bool, err error) {
	state := codeReceived
	kept := false
	switch verdicts[a.verdict] {
	case capture.Processed:
		state, kept = codeProcessed, true
	case capture.Failed:
		state = codeFailed
	case capture.Rejected:
		state = codeRejected
	}
	const set = "UPDATE requests SET state = ?, kept = ?, facts = 1, changed = ?, attempts = 1, started = ?, ended = ?, status = ?, error = ?, verdict = ?, "
	var n int64
	if state == codeReceived {
		// See capture.Policy.GraceEnd: the attempt has ended.
		n, err = t.exec(set+"due = ? + (SELECT grace FROM origins o WHERE o.id = requests.origin) WHERE id = ? AND facts = 0",
			state, kept, t.now, orNull(a.started), a.ended, a.status, orEmpty(a.error), a.verdict, t.now, id[:])
	} else {
		n, err = t.exec(set+"due = 0 WHERE id = ? AND facts = 0",
			state, kept, t.now, orNull(a.started), a.ended, a.status, orEmpty(a.error), a.verdict, id[:])
	}
	if n == 1 {
		t.moved(codeReceived, state)
	}
	return n == 1, err
}

// slow takes any fact.
func (t *tx) slow(id uuid.UUID, a *attempt, e *event) error {
	u, found, err := t.load(id)
	if err != nil {
		return err
	}
	if !found {
		return t.keepEarly(id, a, e)
	}
	var news bool
	if a != nil {
		news, err = u.addAttempt(*a)
	} else {
		news, err = u.addEvent(*e)
	}
	if err != nil || !news {
		return err
	}
	return u.save()
}

// keepEarly keeps a fact about an unknown id, once.
func (t *tx) keepEarly(id uuid.UUID, a *attempt, e *event) error {
	attempts, events, err := t.readEarly(id)
	if err != nil {
		return err
	}
	if e != nil {
		if !newEventAmong(*e, events) {
			return nil
		}
		_, err = t.exec("INSERT INTO early (id, event, attempt, run, status, text, verdict, known) VALUES (?, 1, ?, '', 0, ?, ?, ?)",
			id[:], e.attempt, e.detail, e.verdict, e.known)
		t.add(counterEarlyEvents, 1)
	} else {
		known := facts{attempts: attempts}
		if _, news := known.merge(*a); !news {
			return nil
		}
		_, err = t.exec("INSERT INTO early (id, event, attempt, run, started, ended, status, text, verdict, known) VALUES (?, 0, ?, ?, ?, ?, ?, ?, ?, ?)",
			id[:], a.number, a.run, orNull(a.started), orNull(a.ended), a.status, a.error, a.verdict, a.known)
	}
	t.add(counterEarly, 1)
	return err
}

// capEarly drops the oldest early events above the cap.
func (t *tx) capEarly() error {
	if t.deltas[counterEarly] <= 0 {
		return nil
	}
	early, err := t.counter(counterEarly)
	if err != nil {
		return err
	}
	over := early - int64(t.s.o.MaxEarly)
	if over <= 0 {
		return nil
	}
	n, err := t.exec("DELETE FROM early WHERE seq IN (SELECT seq FROM early WHERE event = 1 ORDER BY seq LIMIT ?)", over)
	t.add(counterEarly, -n)
	t.add(counterEarlyEvents, -n)
	t.add(counterEarlyDropped, n)
	return err
}
