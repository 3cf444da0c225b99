package replayer

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Exit codes of the command.
const (
	ExitOK         = 0 // nothing selected is left
	ExitFailed     = 1 // could not run
	ExitUsage      = 2 // bad usage or settings
	ExitReplayable = 3 // some are still replayable, or will be
	ExitHeld       = 4 // only quarantined or rejected ones are left
)

// How a run ended, as its report says it.
const (
	EndFinished    = "finished"    // it went through its selection
	EndInterrupted = "interrupted" // by a signal; the next run with the same filter goes on
	EndCancelled   = "cancelled"   // by an operator
	EndPaused      = "paused"      // the API could not be reached, or asked to wait, for too long
	EndFailed      = "failed"      // see Reason
)

// Report says what a run did. As JSON it is the output of run --output json and
// what the ledger keeps of the run.
type Report struct {
	Run      string        `json:"run"`       // empty when the fence let none be made
	PickedUp bool          `json:"picked_up"` // it had been begun by an earlier process
	Target   string        `json:"target,omitempty"`
	Filter   ledger.Filter `json:"filter"`
	Limit    int           `json:"limit,omitempty"`
	// Selected is how many were replayable when this process began.
	Selected int64 `json:"selected"`
	// The counts are of attempts by this process; those of all processes that
	// worked on the run stand in Total.
	ledger.RunCounts
	Total ledger.RunCounts `json:"total"`
	Left  LeftCounts       `json:"left"`
	// Unrouted counts, by route, requests that this process came across and left
	// alone because their route is gone. They stay replayable.
	Unrouted map[string]int64 `json:"unrouted,omitempty"`
	// Blocked are requests that wait for an earlier one of their key, as this
	// process left them.
	Blocked *Blocked `json:"blocked,omitempty"`
	// Quarantined counts requests that this process found to kill the API; Killers
	// are the first of them, at most [MaxFailures].
	Quarantined int64    `json:"quarantined,omitempty"`
	Killers     []Killer `json:"killers,omitempty"`
	Pace        Pace     `json:"pace"`
	// Newer is true when requests that came after the selection was frozen match
	// the filter too.
	Newer bool `json:"newer"`
	// Unfinished are the ids of other runs that were not gone through when this
	// process began: of other filters, or held by other processes.
	Unfinished []string  `json:"unfinished,omitempty"`
	StartedAt  time.Time `json:"started_at"`
	EndedAt    time.Time `json:"ended_at"`
	Seconds    float64   `json:"duration_seconds"`
	Rate       float64   `json:"rate_per_second"`
	// Failures are the first requests whose last attempt by this process did not
	// succeed, at most [MaxFailures].
	Failures []Failure `json:"failures,omitempty"`
	// Compared is there for a run to another target. The report that the ledger
	// keeps has no values of bodies in it.
	Compared *Comparison `json:"compared,omitempty"`
	End      string      `json:"end"`
	Reason   string      `json:"reason,omitempty"`
	ExitCode int         `json:"exit_code"`
	Next     []string    `json:"next,omitempty"`
}

// Pace is how much was in flight to the API, or to the one of several that took
// the most.
type Pace struct {
	Concurrency int `json:"concurrency"` // allowed
	Reached     int `json:"reached"`
	// Cuts is how often it was halved, over all APIs: by 429, 503, 504, or for want
	// of an answer.
	Cuts int `json:"cuts"`
}

// LeftCounts is what is left of a selection.
type LeftCounts struct {
	Replayable  int64 `json:"replayable"`
	Waiting     int64 `json:"waiting"` // in their grace, leased, or awaiting an event
	Quarantined int64 `json:"quarantined"`
	Rejected    int64 `json:"rejected"`
}

// Failure is an attempt that did not succeed.
type Failure struct {
	ID      uuid.UUID       `json:"id"`
	Attempt int             `json:"attempt"`
	Verdict capture.Verdict `json:"verdict"`
	Status  int             `json:"status,omitempty"`
	Error   string          `json:"error,omitempty"`
}

// MaxFailures bounds [Report.Failures].
const MaxFailures = 20

// tally counts what a run does. It is safe for concurrent use.
type tally struct {
	mu       sync.Mutex
	counts   ledger.RunCounts
	failures []Failure
}

func (t *tally) sent() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Sent++
}

func (t *tally) skipped() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts.Skipped++
}

func (t *tally) ended(e ledger.Ended) {
	t.mu.Lock()
	defer t.mu.Unlock()
	a := e.Attempt
	t.failures = slices.DeleteFunc(t.failures, func(f Failure) bool { return f.ID == e.ID })
	switch a.Verdict {
	case capture.Processed:
		t.counts.Processed++
		return
	case capture.NoVerdict:
		t.counts.Unknown++
		return
	case capture.Rejected:
		t.counts.Rejected++
	default:
		t.counts.Failed++
	}
	if len(t.failures) < MaxFailures {
		t.failures = append(t.failures, Failure{ID: e.ID, Attempt: a.Number, Verdict: a.Verdict, Status: a.Status, Error: a.Error})
	}
}

func (t *tally) read() (ledger.RunCounts, []Failure) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts, slices.Clone(t.failures)
}

// gone counts the requests whose route is gone.
func (r *Report) gone() int64 {
	n := int64(0)
	for _, one := range r.Unrouted {
		n += one
	}
	return n
}

// next says what to do about what is left.
func (r *Report) next() []string {
	var steps []string
	switch r.End {
	case EndInterrupted:
		steps = append(steps, "run it again with the same filter: it goes on where it was")
	case EndPaused:
		steps = append(steps, "mend the API, then run it again with the same filter: it goes on where it was")
	case EndFailed:
		steps = append(steps, "see the reason above, then run it again with the same filter: it goes on where it was")
	}
	if len(r.Unrouted) > 0 {
		steps = append(steps, "put the routes that are gone back into HOLDFAST_ROUTES_FILE and run it again, or give their requests up with discard --route")
	}
	if r.Blocked != nil {
		steps = append(steps, "look at the heads of the blocked keys: what they name has to be mended; or give the heads up with discard --id, or go on without them with run --past-blocked")
	}
	if r.End == EndFinished && r.Left.Replayable > r.gone() {
		steps = append(steps, "mend what the failures name, then run it again: each run has its own attempts")
	}
	if r.Left.Waiting > 0 {
		steps = append(steps, "run it again later, or with --wait: some are in their grace, leased, or wait for a completion event")
	}
	if r.Left.Rejected > 0 {
		steps = append(steps, "look at the rejected ones: replayer plan --state rejected; send them with run --state rejected, or give them up with discard")
	}
	if r.Left.Quarantined > 0 {
		steps = append(steps, "decide about the quarantined ones: replayer quarantine list")
	}
	if r.Newer {
		steps = append(steps, "run it again: more requests that match have come since this selection was frozen")
	}
	return steps
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	picked := ""
	if r.PickedUp {
		picked = ", picked up"
	}
	fmt.Fprintf(&b, "run        %s (%s%s)\n", cmp.Or(r.Run, "none"), r.End, picked)
	if r.Reason != "" {
		fmt.Fprintf(&b, "reason     %s\n", r.Reason)
	}
	if r.Target != "" {
		fmt.Fprintf(&b, "target     %s (attempts change no state)\n", r.Target)
	}
	fmt.Fprintf(&b, "selection  %s: %d\n", describe(r.Filter), r.Selected)
	if r.Limit > 0 {
		fmt.Fprintf(&b, "limit      %d\n", r.Limit)
	}
	fmt.Fprintf(&b, "sent       %d in %s (%.1f/s)\n", r.Sent, (time.Duration(r.Seconds * float64(time.Second))).Round(time.Millisecond), r.Rate)
	fmt.Fprintf(&b, "           processed %d, failed %d, rejected %d, no verdict yet %d, skipped %d\n",
		r.Processed, r.Failed, r.Rejected, r.Unknown, r.Skipped)
	fmt.Fprintf(&b, "left       replayable %d, waiting %d, quarantined %d, rejected %d\n",
		r.Left.Replayable, r.Left.Waiting, r.Left.Quarantined, r.Left.Rejected)
	fmt.Fprintf(&b, "pace       %d of %d in flight, cut %d times\n", r.Pace.Reached, r.Pace.Concurrency, r.Pace.Cuts)
	b.WriteString(r.Blocked.lines())
	if r.Quarantined > 0 {
		fmt.Fprintf(&b, "killers    %d put into quarantine\n", r.Quarantined)
		for _, k := range r.Killers {
			fmt.Fprintf(&b, "  %s  %s\n", k.ID, printable(k.Evidence))
		}
	}
	if len(r.Unrouted) > 0 {
		fmt.Fprintf(&b, "no route   %s (left alone)\n", printable(counts(r.Unrouted)))
	}
	if r.Compared != nil {
		r.Compared.writeText(&b)
	}
	if len(r.Failures) > 0 {
		b.WriteString("failures\n")
		for _, f := range r.Failures {
			fmt.Fprintf(&b, "  %s  attempt %d  %s  %s\n", f.ID, f.Attempt, f.Verdict, reason(f.Status, f.Error))
		}
	}
	if len(r.Unfinished) > 0 {
		b.WriteString("other unfinished runs\n")
		for _, id := range r.Unfinished {
			fmt.Fprintf(&b, "  %s\n", id)
		}
	}
	if len(r.Next) > 0 {
		b.WriteString("next\n")
		for _, s := range r.Next {
			fmt.Fprintf(&b, "  %s\n", s)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func reason(status int, text string) string {
	switch {
	case status == 0:
		return printable(text)
	case text == "":
		return fmt.Sprintf("status %d", status)
	default:
		return fmt.Sprintf("status %d, %s", status, printable(text))
	}
}

// printable makes bytes of a client's harmless for terminals and valid for
// JSON: what is not printable ASCII is percent-encoded, as in a URL.
func printable(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= ' ' && c < 0x7f {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
