package acker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
	"github.com/holdfast-io/holdfast/pkg/stream"
)

const (
	// asideKind is the kind of what the acker sets aside.
	asideKind = "completion"
	// maxFacts bounds one transaction: a message may hold thousands of events,
	// and whoever writes to the ledger waits for the longest transaction.
	maxFacts = 2000
	// maxEvents bounds one message. The broker's max_payload, 1 MiB, holds less.
	maxEvents = 100_000
)

var errSubject = errors.New("the subject is neither that of an outcome nor that of an event")

// commit is the handler of the completions stream.
func (s *Service) commit(ctx context.Context, batch []stream.Msg) error {
	facts := make([]ledger.Fact, 0, len(batch))
	source := make([]int, 0, len(batch)) // of facts[i]: the message
	refused := make(map[int]error)       // by message
	for i := range batch {
		decoded, err := decode(&batch[i])
		if err != nil {
			refused[i] = err
		}
		for _, f := range decoded {
			facts, source = append(facts, f), append(source, i)
		}
	}
	s.giveWay(ctx)
	at := 0
	for part := range slices.Chunk(facts, maxFacts) {
		errs, err := s.o.Store.Complete(ctx, part)
		if err != nil {
			return fmt.Errorf("commit completions: %w", err)
		}
		for i, err := range errs {
			if m := source[at+i]; err != nil && refused[m] == nil {
				refused[m] = err
			}
		}
		at += len(part)
	}
	if err := s.setAside(ctx, batch, refused); err != nil {
		return err
	}
	for i := range batch {
		// Only the gateway's own subject releases spool records: an API must not
		// be able to have one dropped.
		if capture.IsOutcomeSubject(batch[i].Subject) {
			s.words.Add(capture.ParseSpoolRefs(batch[i].Header)...)
		}
	}
	s.words.Publish()
	return nil
}

// lead is how long a batch waits before its commit. A request's capture and its
// outcome are published together; an outcome that is committed first is kept
// apart and joined later, at three times the cost. Nobody waits for the outcome
// but a replay's fence.
const lead = 50 * time.Millisecond

// giveWay lets the recorder go first.
func (s *Service) giveWay(ctx context.Context) {
	timer := time.NewTimer(lead)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func (s *Service) setAside(ctx context.Context, batch []stream.Msg, refused map[int]error) error {
	if len(refused) == 0 {
		return nil
	}
	asides := make([]ledger.Aside, 0, len(refused))
	for i := range batch { // in the order of the stream
		if reason := refused[i]; reason != nil {
			asides = append(asides, batch[i].Aside(asideKind, reason))
		}
	}
	if err := s.o.Store.SetAside(ctx, asides); err != nil {
		return fmt.Errorf("set completions aside: %w", err)
	}
	for i, reason := range refused {
		batch[i].Terminate(reason.Error())
		s.o.Logger.Warn("a completion was set aside", "subject", batch[i].Subject, "err", reason)
	}
	return nil
}

// decode reads the facts of one message. What it is depends on its subject
// alone, never on its form. Of outcomes, those that can be read count although
// others cannot.
func decode(m *stream.Msg) ([]ledger.Fact, error) {
	switch {
	case capture.IsOutcomeSubject(m.Subject):
		outcomes, err := capture.DecodeOutcomes(m.Data)
		facts := make([]ledger.Fact, len(outcomes))
		for i := range outcomes {
			facts[i].Outcome = &outcomes[i]
		}
		return facts, err
	case capture.IsEventSubject(m.Subject):
		events, err := capture.DecodeEvents(m.Data, maxEvents)
		if err != nil {
			return nil, err
		}
		return eventFacts(events), nil
	default:
		return nil, errSubject
	}
}

func eventFacts(events []capture.Event) []ledger.Fact {
	facts := make([]ledger.Fact, len(events))
	for i := range events {
		facts[i].Event = &events[i]
	}
	return facts
}
