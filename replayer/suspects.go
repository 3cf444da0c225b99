package replayer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// death is the end of an attempt that was made alone, when the API was well, and
// that the API did not survive, as it seems.
type death struct {
	attempt int
	at      time.Time
	how     string
	// then says what showed that the request was to blame: the API was gone
	// afterwards, or it was well with others. Empty while neither is known.
	then string
}

// suspicion is what is known against a request.
type suspicion struct {
	deaths []death
}

// guilt is how many lonely deaths mean that a request kills the API. One may be
// chance: a deployment, a machine that went away.
const guilt = 2

// add keeps a lonely death. An earlier one of which nothing showed who was to
// blame is forgotten: the API may have been ill throughout.
func (s *suspicion) add(d death) {
	s.deaths = slices.DeleteFunc(s.deaths, func(old death) bool { return old.then == "" })
	s.deaths = append(s.deaths, d)
}

// open reports whether the last death has not been explained.
func (s *suspicion) open() bool {
	return len(s.deaths) > 0 && s.deaths[len(s.deaths)-1].then == ""
}

func (s *suspicion) guilty() bool { return len(s.deaths) >= guilt && !s.open() }

// evidence tells the deaths, for people.
func (s *suspicion) evidence() string {
	parts := make([]string, len(s.deaths))
	for i, d := range s.deaths {
		parts[i] = fmt.Sprintf("attempt %d, sent alone, ended at %s with %s; %s", d.attempt, d.at.UTC().Format(time.RFC3339Nano), d.how, d.then)
	}
	return strings.Join(parts, ". ")
}

// Killer is a request that was put into quarantine because it kills the API.
type Killer struct {
	ID       uuid.UUID `json:"id"`
	Evidence string    `json:"evidence"`
}

// suspect notes that a request may have killed the API.
func (r *runner) suspect(id uuid.UUID) *suspicion {
	s := r.suspects[id]
	if s == nil {
		s = &suspicion{}
		r.suspects[id] = s
		r.spare = max(r.spare, r.unsent[id])
	}
	return s
}

// allowed is how many attempts a request may have, to be sent alone: those that
// found no connection, while the API was down, show nothing and are not counted.
func (r *runner) allowed(id uuid.UUID) int { return r.MaxAttempts + r.unsent[id] }

// autopsy keeps what was seen of the API when a request had died alone.
func (r *runner) autopsy(it *item) {
	d := death{attempt: it.begun.Attempt, at: it.ended, how: it.got.death()}
	switch {
	case it.exam != nil:
		d.then = fmt.Sprintf("then the probe failed: %v", it.exam)
	case it.up.health != "":
		d.then = fmt.Sprintf("then %s answered that the API is well", it.up.health)
	}
	s := r.suspect(it.c.ID)
	s.add(d)
	if d.then == "" {
		r.unexplained[it.c.ID] = s
	} else {
		delete(r.unexplained, it.c.ID)
	}
	r.Logger.Warn("the api did not survive a request that was sent alone, it seems", "request_id", it.c.ID,
		"attempt", d.attempt, "death", d.how, "probe", d.then)
}

// vindicated notes that the API is well with another request: whoever died
// before, alone, is to blame for it. It gives those who are guilty by now.
func (r *runner) vindicated(it *item) (guilty []uuid.UUID) {
	for id, s := range r.unexplained {
		if id == it.c.ID || !s.open() {
			continue
		}
		s.deaths[len(s.deaths)-1].then = fmt.Sprintf("then the API answered request %s with %d", it.c.ID, it.got.status)
		delete(r.unexplained, id)
		if s.guilty() {
			guilty = append(guilty, id)
		}
	}
	return guilty
}

// clear forgets what was held against a request.
func (r *runner) clear(id uuid.UUID) {
	delete(r.suspects, id)
	delete(r.unexplained, id)
}

// convict puts a request into quarantine. A run to another target changes no
// state: it only says what it has found.
func (r *runner) convict(ctx context.Context, id uuid.UUID) error {
	evidence := r.suspects[id].evidence()
	r.clear(id)
	r.Logger.Warn("request kills the api, it is put into quarantine", "request_id", id, "evidence", evidence)
	if r.Target == "" {
		err := retry(ctx, r.Clock, func() error {
			return r.Ledger.Quarantine(ctx, id, capture.QuarantineKiller, evidence)
		})
		switch {
		case errors.Is(err, ledger.ErrConflict):
			return nil // it was closed meanwhile
		case err != nil:
			return r.explain(ctx, fmt.Errorf("quarantine: %w", err))
		}
	} else {
		r.guilty[id] = struct{}{}
	}
	r.convicted++
	if len(r.killers) < MaxFailures {
		r.killers = append(r.killers, Killer{ID: id, Evidence: evidence})
	}
	return nil
}
