package replayer

import (
	"bytes"
	"fmt"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Selection is a filter as an operator gives it: its times may be distances
// back from now, which every start of the same Job gives anew.
type Selection struct {
	Filter ledger.Filter
	// SinceAgo and UntilAgo take the place of the filter's times where they are
	// not zero.
	SinceAgo, UntilAgo time.Duration
}

// Resolve gives the filter with absolute times.
func (s Selection) Resolve(now time.Time) ledger.Filter {
	f := s.Filter
	if s.SinceAgo != 0 {
		f.Since = now.Add(-s.SinceAgo).UTC().Round(0)
	}
	if s.UntilAgo != 0 {
		f.Until = now.Add(-s.UntilAgo).UTC().Round(0)
	}
	return f
}

// relativeSlack is how far a run's times may lie from what a distance back from
// its creation gives: between the two lies the making of the run, for which a
// busy ledger takes seconds. A distance of a few seconds has less.
const relativeSlack = 10 * time.Second

// Same reports whether the run was made for this selection. A relative time is
// compared by its distance from the run's creation: so a Job with --since 2h that
// is started again finds the run it left unfinished, whose window stays what it
// was.
func (s Selection) Same(r ledger.Run) bool {
	mine, theirs := s.Resolve(r.CreatedAt), r.Filter
	if s.SinceAgo != 0 && near(mine.Since, theirs.Since, s.SinceAgo) {
		mine.Since = theirs.Since
	}
	if s.UntilAgo != 0 && near(mine.Until, theirs.Until, s.UntilAgo) {
		mine.Until = theirs.Until
	}
	a, errA := mine.Canonical()
	b, errB := theirs.Canonical()
	return errA == nil && errB == nil && a == b
}

func near(a, b time.Time, ago time.Duration) bool {
	return !b.IsZero() && a.Sub(b).Abs() <= min(relativeSlack, ago/4)
}

// describe says in one line what a filter selects.
func describe(f ledger.Filter) string {
	var parts []string
	add := func(format string, args ...any) { parts = append(parts, fmt.Sprintf(format, args...)) }
	if f.Replayable {
		add("replayable")
	}
	if len(f.States) > 0 {
		add("state %s", join(f.States))
	}
	if f.Statuses != "" {
		add("status %s", f.Statuses)
	}
	if len(f.Routes) > 0 {
		add("route %s", join(f.Routes))
	}
	if len(f.Methods) > 0 {
		add("method %s", join(f.Methods))
	}
	if f.Path != "" {
		add("path %s", f.Path)
	}
	if !f.Since.IsZero() {
		add("since %s", stamp(f.Since))
	}
	if !f.Until.IsZero() {
		add("until %s", stamp(f.Until))
	}
	switch n := len(f.IDs); {
	case n > 3:
		add("%d ids", n)
	case n > 0:
		add("ids %s", join(f.IDs))
	}
	if len(parts) == 0 {
		return "everything"
	}
	return join(parts)
}

func join[T any](list []T) string {
	var b bytes.Buffer
	for i, v := range list {
		if i > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, v)
	}
	return b.String()
}
