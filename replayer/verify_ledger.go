package replayer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// checkStarts compares what each start of an ingress has captured with what came
// of it.
func (v *verifier) checkStarts(ctx context.Context, before []ledger.Start) error {
	now, err := v.Ledger.Starts(ctx)
	if err != nil {
		return err
	}
	recorded := make(map[startID]ledger.Start, len(now))
	for _, s := range now {
		recorded[startID{s.Ingress, s.ID}] = s
	}
	for _, s := range before {
		id := startID{s.Ingress, s.ID}
		have, known := recorded[id]
		switch {
		case !known: // forgotten, which it is when nothing is missing
			continue
		case !v.fence.passed(s.Ingress):
			text := fmt.Sprintf("whether all that ingress %s has captured is recorded: what it holds has not arrived", s.Ingress)
			if !slices.Contains(v.out.NotSeen, text) {
				v.out.NotSeen = append(v.out.NotSeen, text)
			}
			continue
		}
		// A head that waits for its chunks names no start.
		aside := v.asides.captures[id] + v.lost[id] + int64(len(v.asides.incomplete))
		if n := s.Captured - have.Recorded - aside; n > 0 {
			v.gap(Gap{Kind: GapCaptured, Detail: fmt.Sprintf(
				"ingress %s, start %s, says that %d captures were durable when it let their answers go; the ledger has recorded %d, and at most %d are set aside: %d are missing",
				s.Ingress, s.ID, s.Captured, have.Recorded, aside, n)})
		}
	}
	return nil
}

// checkIncomplete names the heads whose chunks nobody has: their ingress holds
// the records of a request together until it is complete.
func (v *verifier) checkIncomplete() {
	if !v.fence.allPassed() || !v.fence.requests {
		return
	}
	for _, a := range v.asides.incomplete {
		if v.selected(a.id) && a.at.Before(v.fence.at) {
			v.gap(Gap{Kind: GapIncomplete, ID: &a.id, Detail: a.reason})
		}
	}
}

// checkLedger walks the ledger: every payload must be whole, and there must be as
// many requests as it says.
func (v *verifier) checkLedger(ctx context.Context) error {
	const rounds = 3 // a count that moves is looked at again
	for round := range rounds {
		before, err := v.Ledger.Stats(ctx)
		if err != nil {
			return err
		}
		counted, err := v.walk(ctx, round == 0)
		if err != nil {
			return err
		}
		asides, err := readAsides(ctx, v.Ledger)
		if err != nil {
			return err
		}
		after, err := v.Ledger.Stats(ctx)
		if err != nil {
			return err
		}
		v.out.Ledger = LedgerCounts{Requests: after.Requests, SetAside: after.Aside, Expired: after.Expired}
		wrong, moving := compareCounts(before, after, counted, asides.kinds)
		if len(wrong)+len(moving) > 0 && round < rounds-1 {
			continue
		}
		for _, text := range wrong {
			v.gap(Gap{Kind: GapCount, Detail: text})
		}
		if len(moving) > 0 {
			v.out.NotSeen = append(v.out.NotSeen, "whether these counts are exact, as they changed while they were counted: "+strings.Join(moving, ", "))
		}
		return nil
	}
	return nil
}

// compareCounts gives the counts that are not what was counted between two
// readings of them, and those that moved. While any state moves, a count that
// was the same twice may have been another one in between, and only their sum is
// bounded.
func compareCounts(before, after ledger.Stats, counted map[capture.State]int64, asides map[string]int64) (wrong, moving []string) {
	var least, most, all int64
	expired := after.Expired - before.Expired
	for _, state := range capture.States() {
		least, most, all = least+before.Requests[state], most+after.Requests[state], all+counted[state]
		if before.Requests[state] != after.Requests[state] {
			moving = append(moving, string(state))
		}
	}
	for _, state := range capture.States() {
		if a, n := before.Requests[state], counted[state]; len(moving) == 0 && expired == 0 && a != n {
			wrong = append(wrong, fmt.Sprintf("the ledger says that %d requests are %s, and %d are", a, state, n))
		}
	}
	if len(wrong) == 0 && (all < least-expired || all > most+expired) {
		wrong = append(wrong, fmt.Sprintf("the ledger says that there were %d requests, then %d, of which %d expired meanwhile, and there are %d", least, most, expired, all))
	}
	kinds := maps.Clone(asides)
	for _, from := range []map[string]int64{before.Aside, after.Aside} {
		for kind := range from {
			kinds[kind] += 0
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		a, b := before.Aside[kind], after.Aside[kind]
		switch {
		case a != b:
			moving = append(moving, "set aside as "+kind)
		case a != kinds[kind]:
			wrong = append(wrong, fmt.Sprintf("the ledger says that %d messages are set aside as %s, and %d are", a, kind, kinds[kind]))
		}
	}
	return wrong, moving
}

// walk counts all requests by their states, and reads payloads if it is asked to.
func (v *verifier) walk(ctx context.Context, payloads bool) (map[capture.State]int64, error) {
	counted := make(map[capture.State]int64)
	for cursor := ""; ; {
		page, err := v.Ledger.List(ctx, ledger.Filter{}, cursor, 1000)
		if err != nil {
			return nil, err
		}
		for i := range page.Requests {
			counted[page.Requests[i].State]++
		}
		if payloads {
			if err := v.checkPayloads(ctx, page.Requests); err != nil {
				return nil, err
			}
		}
		if cursor = page.Next; cursor == "" {
			return counted, nil
		}
	}
}

func (v *verifier) checkPayloads(ctx context.Context, list []ledger.Request) error {
	list = slices.DeleteFunc(list, func(r ledger.Request) bool { return !v.selected(r.ID) })
	reasons := make([]string, len(list))
	err := parallel(len(list), func(i int) (err error) {
		reasons[i], err = v.checkPayload(ctx, &list[i])
		return err
	})
	if err != nil {
		return err
	}
	for i := range list {
		if !list[i].PayloadExpired {
			v.out.Payloads++
		}
		if reasons[i] != "" {
			id := list[i].ID // the page goes
			v.gap(Gap{Kind: GapPayload, ID: &id, Detail: reasons[i]})
		}
	}
	return nil
}

// checkPayload says what is wrong with the payload, empty for nothing.
func (v *verifier) checkPayload(ctx context.Context, r *ledger.Request) (string, error) {
	if r.PayloadExpired {
		if r.State != capture.StateProcessed {
			return fmt.Sprintf("head and body of a request that is %s are gone", r.State), nil
		}
		return "", nil
	}
	head, body, err := v.Ledger.Payload(ctx, r.ID)
	var size int64
	if err == nil {
		size, err = io.Copy(io.Discard, body)
		err = errors.Join(err, body.Close())
	}
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		// Expired since it was listed?
		found, again := v.find(ctx, []uuid.UUID{r.ID})
		if again != nil {
			return "", again
		}
		if now := found[r.ID]; now == nil || now.PayloadExpired {
			return "", nil
		}
		return err.Error(), nil
	case err != nil:
		return "", err
	case size != r.Size:
		return fmt.Sprintf("the body has %d of %d bytes", size, r.Size), nil
	case !strings.HasPrefix(string(head), r.Method+" "+r.Target+" "):
		return "the head does not begin with the method and target of the request", nil
	}
	return "", nil
}

// asides are the messages that the ledger has set aside.
type asides struct {
	ids        map[uuid.UUID]bool
	prints     map[[32]byte]bool
	kinds      map[string]int64
	captures   map[startID]int64 // by the start whose record it was
	incomplete []incomplete
}

type incomplete struct {
	id     uuid.UUID
	at     time.Time
	reason string
}

func (a *asides) has(id uuid.UUID) bool { return a != nil && a.ids[id] }

// readAsides reads them all, a few at once: each may have 64 KiB.
func readAsides(ctx context.Context, l ledger.Reader) (*asides, error) {
	a := &asides{
		ids: make(map[uuid.UUID]bool), prints: make(map[[32]byte]bool), kinds: make(map[string]int64), captures: make(map[startID]int64),
	}
	for cursor := ""; ; {
		list, next, err := l.AsideList(ctx, cursor, 100)
		if err != nil {
			return nil, err
		}
		for i := range list {
			one := &list[i]
			a.kinds[one.Kind]++
			a.prints[one.Fingerprint] = true
			if one.RequestID != uuid.Nil {
				a.ids[one.RequestID] = true
			}
			switch one.Kind {
			case "incomplete":
				a.incomplete = append(a.incomplete, incomplete{id: one.RequestID, at: one.At, reason: one.Reason})
			case "capture":
				for line := range strings.Lines(string(one.Header)) {
					if value, ok := strings.CutPrefix(line, capture.HeaderSpool+": "); ok {
						h := capture.Header{capture.HeaderSpool: {strings.TrimSpace(value)}}
						if ref, ok := capture.ParseSpoolRef(h); ok {
							a.captures[startID{ref.Ingress, ref.Start}]++
						}
					}
				}
			}
		}
		if cursor = next; cursor == "" {
			return a, nil
		}
	}
}
