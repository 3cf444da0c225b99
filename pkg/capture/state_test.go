package capture_test

import (
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/holdfast-io/holdfast/pkg/capture"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

// model reads the design's rules in its own way: it asks what is said anywhere,
// and never walks the facts in an order.
func model(f capture.Facts) capture.State {
	last := 1
	for _, a := range f.Attempts {
		last = max(last, a.Number)
	}
	anywhere := func(v capture.Verdict) bool {
		return slices.ContainsFunc(f.Attempts, func(a capture.Attempt) bool { return a.Verdict == v }) ||
			slices.ContainsFunc(f.Events, func(e capture.Event) bool { return e.Outcome == v })
	}
	ofLast := func(v capture.Verdict) bool {
		return slices.ContainsFunc(f.Attempts, func(a capture.Attempt) bool { return a.Number == last && a.Verdict == v }) ||
			slices.ContainsFunc(f.Events, func(e capture.Event) bool { return e.Attempt == last && e.Outcome == v })
	}
	held, lifted := make(map[int]bool), make(map[int]bool)
	releasedAfterLast := false
	for _, q := range f.Quarantines {
		held[q.Number] = true
		if !q.ReleasedAt.IsZero() {
			lifted[q.Number] = true
			releasedAfterLast = releasedAfterLast || q.ReleasedAfter >= last
		}
	}
	switch {
	case f.Discarded:
		return "discarded"
	case anywhere("processed"):
		return "processed"
	case len(held) > len(lifted):
		return "quarantined"
	case releasedAfterLast, ofLast("failed"):
		return "failed"
	case ofLast("rejected"):
		return "rejected"
	}
	return "received"
}

func drawFacts(t *rapid.T) capture.Facts {
	attempt := rapid.Custom(func(t *rapid.T) capture.Attempt {
		a := capture.Attempt{Number: rapid.IntRange(1, 4).Draw(t, "number"), StartedAt: at}
		if rapid.Bool().Draw(t, "ended") {
			a.EndedAt = at.Add(time.Second)
			a.Verdict = rapid.SampledFrom([]capture.Verdict{"", "rejected", "rejected", "failed", "failed", "processed"}).Draw(t, "verdict")
		}
		return a
	})
	event := rapid.Custom(func(t *rapid.T) capture.Event {
		return capture.Event{
			Outcome: rapid.SampledFrom([]capture.Verdict{"failed", "failed", "failed", "processed"}).Draw(t, "outcome"),
			Attempt: rapid.IntRange(1, 5).Draw(t, "attempt"),
		}
	})
	quarantine := rapid.Custom(func(t *rapid.T) capture.Quarantine {
		q := capture.Quarantine{Number: rapid.IntRange(1, 3).Draw(t, "number"), Reason: capture.QuarantineKiller, At: at}
		if rapid.Bool().Draw(t, "released") {
			q.ReleasedAt, q.ReleasedAfter = at, rapid.IntRange(1, 4).Draw(t, "after")
		}
		return q
	})
	return capture.Facts{
		Attempts:    rapid.SliceOfN(attempt, 0, 5).Draw(t, "attempts"),
		Events:      rapid.SliceOfN(event, 0, 3).Draw(t, "events"),
		Quarantines: rapid.SliceOfN(quarantine, 0, 3).Draw(t, "quarantines"),
		Discarded:   rapid.IntRange(0, 9).Draw(t, "discarded") == 0,
	}
}

// again gives the same facts in another order, some of them repeated.
func again[T any](t *rapid.T, s []T) []T {
	s = slices.Clone(s)
	if len(s) > 0 {
		s = append(s, rapid.SliceOfN(rapid.SampledFrom(s), 0, 3).Draw(t, "repeated")...)
	}
	if len(s) < 2 {
		return s
	}
	return rapid.Permutation(s).Draw(t, "order")
}

func TestStateIsAFunctionOfTheSetOfFacts(t *testing.T) {
	seen := make(map[capture.State]int)
	rapid.Check(t, func(t *rapid.T) {
		f := drawFacts(t)
		want := model(f)
		seen[want]++
		require.Equal(t, want, f.State(), "against the model")
		for range 3 {
			g := capture.Facts{Attempts: again(t, f.Attempts), Events: again(t, f.Events), Quarantines: again(t, f.Quarantines), Discarded: f.Discarded}
			require.Equal(t, want, g.State(), "another order")
		}
	})
	for _, s := range capture.States() {
		require.Positive(t, seen[s], "no facts gave %s: the property proves nothing about it", s)
	}
}

func TestState(t *testing.T) {
	att := func(n int, v capture.Verdict) capture.Attempt {
		return capture.Attempt{Number: n, Verdict: v, EndedAt: at}
	}
	quarantined := capture.Quarantine{Number: 1, At: at}
	released := capture.Quarantine{Number: 1, At: at, ReleasedAt: at, ReleasedAfter: 1}
	for name, c := range map[string]struct {
		facts capture.Facts
		want  capture.State
	}{
		"nothing known":                      {capture.Facts{}, capture.StateReceived},
		"first try failed":                   {capture.Facts{Attempts: []capture.Attempt{att(1, "failed")}}, capture.StateFailed},
		"the last attempt decides":           {capture.Facts{Attempts: []capture.Attempt{att(2, "rejected"), att(1, "failed")}}, capture.StateRejected},
		"unless one was processed":           {capture.Facts{Attempts: []capture.Attempt{att(2, "rejected"), att(1, "processed")}}, capture.StateProcessed},
		"an attempt under way":               {capture.Facts{Attempts: []capture.Attempt{att(1, "failed"), {Number: 2}}}, capture.StateReceived},
		"failed event outranks rejected":     {capture.Facts{Attempts: []capture.Attempt{att(1, "rejected")}, Events: []capture.Event{{Outcome: "failed", Attempt: 1}}}, capture.StateFailed},
		"event of an attempt yet unknown":    {capture.Facts{Attempts: []capture.Attempt{att(1, "rejected")}, Events: []capture.Event{{Outcome: "failed", Attempt: 2}}}, capture.StateRejected},
		"event of an earlier attempt":        {capture.Facts{Attempts: []capture.Attempt{att(2, "")}, Events: []capture.Event{{Outcome: "failed", Attempt: 1}}}, capture.StateReceived},
		"event before any attempt is known":  {capture.Facts{Events: []capture.Event{{Outcome: "failed", Attempt: 1}}}, capture.StateFailed},
		"quarantined":                        {capture.Facts{Attempts: []capture.Attempt{att(1, "failed")}, Quarantines: []capture.Quarantine{quarantined}}, capture.StateQuarantined},
		"processed goes before quarantined":  {capture.Facts{Attempts: []capture.Attempt{att(1, "processed")}, Quarantines: []capture.Quarantine{quarantined}}, capture.StateProcessed},
		"discarded goes before processed":    {capture.Facts{Attempts: []capture.Attempt{att(1, "processed")}, Discarded: true}, capture.StateDiscarded},
		"released counts as failed":          {capture.Facts{Attempts: []capture.Attempt{att(1, "rejected")}, Quarantines: []capture.Quarantine{quarantined, released}}, capture.StateFailed},
		"until a later attempt":              {capture.Facts{Attempts: []capture.Attempt{att(1, "failed"), att(2, "rejected")}, Quarantines: []capture.Quarantine{released}}, capture.StateRejected},
		"one of two quarantines is released": {capture.Facts{Quarantines: []capture.Quarantine{released, {Number: 2}}}, capture.StateQuarantined},
	} {
		require.Equal(t, c.want, c.facts.State(), name)
	}
}

func TestOpenStates(t *testing.T) {
	var open []capture.State
	for _, s := range capture.States() {
		if s.Open() {
			open = append(open, s)
		}
	}
	require.Equal(t, []capture.State{capture.StateReceived, capture.StateFailed, capture.StateQuarantined}, open)
}
