package replayer

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// Comparison says how a test system's answers compare with those that the ledger
// has: for each request that the run has sent, by whichever process, the last
// answer there with the last one of the request's own API.
type Comparison struct {
	// Same: status and body.
	Same int64 `json:"same"`
	// SameStatus: the status is the same, and no body is kept to compare with.
	SameStatus int64 `json:"same_status"`
	// Cut: the status is the same, and so are the bodies, as far as can be told:
	// one of them is not kept whole.
	Cut int64 `json:"cut"`
	// NoStoredAnswer: the request's own API never answered it.
	NoStoredAnswer int64 `json:"no_stored_answer"`
	StatusDiffers  int64 `json:"status_differs"` // no answer at all is a status, too
	BodyDiffers    int64 `json:"body_differs"`
	// Examples are the first that differ, at most [MaxExamples].
	Examples []Example `json:"examples,omitempty"`

	tested map[uuid.UUID]struct{} // those of a run with a limit
	failed int64                  // of those that were sent, failed there
}

// MaxExamples bounds [Comparison.Examples].
const MaxExamples = 20

// Example is one request whose answers differ.
type Example struct {
	ID     uuid.UUID `json:"id"`
	Method string    `json:"method"`
	Target string    `json:"target"` // what is not printable ASCII is percent-encoded
	Status int       `json:"status"`
	// TestStatus is 0 without an answer; TestError says why there is no whole one.
	TestStatus int    `json:"test_status"`
	TestError  string `json:"test_error,omitempty"`
	// Differences are the first places where the bodies differ.
	Differences []Difference `json:"differences,omitempty"`
}

// Differ counts what differs.
func (c *Comparison) Differ() int64 { return c.StatusDiffers + c.BodyDiffers }

// withoutValues is the comparison as the ledger keeps it with its run, whose
// report is shown to whoever may see runs: bodies are not.
func (c *Comparison) withoutValues() *Comparison {
	if c == nil {
		return nil
	}
	bare := *c
	bare.Examples = slices.Clone(c.Examples)
	for i := range bare.Examples {
		differences := slices.Clone(bare.Examples[i].Differences)
		for j := range differences {
			differences[j].Stored, differences[j].Test = "", ""
		}
		bare.Examples[i].Differences = differences
	}
	return &bare
}

// comparer is what a comparison reads.
type comparer interface {
	Tested(ctx context.Context, run string, after uuid.UUID, limit int) ([]ledger.TestResult, error)
	Get(ctx context.Context, id uuid.UUID) (ledger.Detail, error)
	Answers(ctx context.Context, id uuid.UUID) ([]ledger.Answer, error)
}

// comparePage is how many results are read at a time.
const comparePage = 500

// compare compares all that the run has sent. limited keeps which those are.
func compare(ctx context.Context, l comparer, run string, ignore []JSONPath, limited bool) (*Comparison, error) {
	c := &Comparison{}
	if limited {
		c.tested = make(map[uuid.UUID]struct{})
	}
	after := uuid.Nil
	for {
		page, err := l.Tested(ctx, run, after, comparePage)
		if err != nil {
			return nil, fmt.Errorf("compare: %w", err)
		}
		for i := range page {
			if err := c.add(ctx, l, &page[i], ignore); err != nil {
				return nil, fmt.Errorf("compare: %w", err)
			}
		}
		if len(page) < comparePage {
			return c, nil
		}
		after = page[len(page)-1].ID
	}
}

// add compares the answers to one request.
func (c *Comparison) add(ctx context.Context, l comparer, t *ledger.TestResult, ignore []JSONPath) error {
	detail, err := l.Get(ctx, t.ID)
	if err != nil {
		return err
	}
	answers, err := l.Answers(ctx, t.ID)
	if err != nil {
		return err
	}
	if c.tested != nil {
		c.tested[t.ID] = struct{}{}
	}
	if t.Attempt.Verdict == capture.Failed {
		c.failed++
	}
	own := lastAnswered(detail.Facts.Attempts)
	stored, test := answerOf(answers, &own, false), answerOf(answers, &t.Attempt, true)
	example := Example{
		ID: t.ID, Method: t.Method, Target: printable(t.Target),
		Status: own.Status, TestStatus: t.Attempt.Status, TestError: printable(t.Attempt.Error),
	}
	switch {
	case own.Status == 0:
		c.NoStoredAnswer++
		return nil
	case own.Status != t.Attempt.Status:
		c.StatusDiffers++
	case own.Error == "" && t.Attempt.Error != "":
		c.BodyDiffers++ // it did not come whole
	case stored == nil:
		c.SameStatus++
		return nil
	case test == nil:
		c.Cut++ // it was not kept: the disk has no room
		return nil
	case stored.Cut || test.Cut:
		if !partDiffers(stored, test) {
			c.Cut++
			return nil
		}
		c.BodyDiffers++
	default:
		if example.Differences = differences(stored, test, ignore); len(example.Differences) == 0 {
			c.Same++
			return nil
		}
		c.BodyDiffers++
	}
	if len(c.Examples) < MaxExamples {
		c.Examples = append(c.Examples, example)
	}
	return nil
}

// lastAnswered gives the last attempt with a status, the zero one without any.
// Attempts are in the order of their numbers.
func lastAnswered(attempts []capture.Attempt) (last capture.Attempt) {
	for _, a := range attempts {
		if a.Status != 0 {
			last = a
		}
	}
	return last
}

func answerOf(answers []ledger.Answer, a *capture.Attempt, elsewhere bool) *capture.Answer {
	for i := range answers {
		if one := &answers[i]; one.Attempt == a.Number && one.Run == a.Run && one.Elsewhere == elsewhere {
			return &one.Answer
		}
	}
	return nil
}

// partDiffers reports whether two bodies differ of which not all is there. Of
// JSON and of what is coded a part says nothing.
func partDiffers(stored, test *capture.Answer) bool {
	if isJSON(stored.Type) && isJSON(test.Type) || stored.Encoding != "" || test.Encoding != "" {
		return false
	}
	n := min(len(stored.Body), len(test.Body))
	return !bytes.Equal(stored.Body[:n], test.Body[:n]) ||
		!stored.Cut && len(test.Body) > n || !test.Cut && len(stored.Body) > n
}

// writeText writes the comparison for people.
func (c *Comparison) writeText(b *strings.Builder) {
	fmt.Fprintf(b, "compared   same %d, same status %d (no body is kept), cut %d, no stored answer %d\n", c.Same, c.SameStatus, c.Cut, c.NoStoredAnswer)
	fmt.Fprintf(b, "           status differs %d, body differs %d\n", c.StatusDiffers, c.BodyDiffers)
	if len(c.Examples) > 0 {
		b.WriteString("differences\n")
	}
	for _, e := range c.Examples {
		fmt.Fprintf(b, "  %s  %s %s  status %d, test %s\n", e.ID, printable(e.Method), e.Target, e.Status, reason(e.TestStatus, e.TestError))
		for _, d := range e.Differences {
			fmt.Fprintf(b, "    %s: %s, test %s\n", printable(d.Path), orNone(d.Stored), orNone(d.Test))
		}
	}
}

func orNone(value string) string {
	if value == "" {
		return "none"
	}
	return printable(value)
}
