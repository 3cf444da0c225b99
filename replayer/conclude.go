package replayer

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/holdfast-io/holdfast/pkg/capture"
	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// conclude fills the report and tells the ledger how the run ended.
func (r *runner) conclude(ctx context.Context, report *Report, err error) {
	report.RunCounts, report.Failures = r.tally.read()
	report.Unrouted = r.unrouted
	report.Quarantined, report.Killers = r.convicted, r.killers
	report.Pace = r.gates.pace(r.Concurrency)
	report.EndedAt = r.Clock.Now().UTC()
	report.Seconds = report.EndedAt.Sub(report.StartedAt).Seconds()
	if report.Seconds > 0 {
		report.Rate = float64(report.Sent) / report.Seconds
	}
	report.End = EndFinished
	switch {
	case err == nil:
	case errors.Is(err, ErrInterrupted) || errors.Is(err, context.Canceled):
		report.End = EndInterrupted
	case errors.Is(err, ErrCancelled):
		report.End = EndCancelled
	case errors.Is(err, ErrPaused):
		report.End, report.Reason = EndPaused, strings.ReplaceAll(err.Error(), "\n", "; ")
	default:
		report.End, report.Reason = EndFailed, err.Error()
	}
	if run, rerr := r.Ledger.Run(ctx, r.run.ID); rerr == nil {
		report.Total = run.Counts
	}
	left, lerr := r.left(ctx)
	if lerr == nil && r.Target != "" {
		if report.Compared, lerr = compare(ctx, r.Ledger, r.run.ID, r.Ignore, r.touched != nil); lerr == nil {
			left = r.untested(left, report.Compared)
		}
	}
	report.Left = left
	if lerr == nil {
		report.Blocked, lerr = describeBlocks(ctx, r.Ledger, r.blocks)
	}
	if lerr == nil && report.End == EndFinished {
		report.Newer, lerr = r.newer(ctx)
	}
	if lerr != nil && report.End == EndFinished {
		report.End, report.Reason = EndFailed, "count what is left: "+lerr.Error()
	}
	report.ExitCode = report.exitCode()
	if errors.Is(err, ErrProduction) {
		report.ExitCode = ExitUsage
	}
	report.Next = report.next()

	// A run that did not go through its selection is left for the next process.
	var cerr error
	switch report.End {
	case EndFinished, EndCancelled: // which stays cancelled
		var body []byte
		kept := *report
		kept.Compared = report.Compared.withoutValues()
		if body, cerr = json.Marshal(&kept); cerr == nil {
			cerr = retry(ctx, r.Clock, func() error { return r.Ledger.EndRun(ctx, r.lease, body) })
		}
	default:
		cerr = r.Ledger.LeaveRun(ctx, r.lease)
	}
	if cerr != nil && !errors.Is(cerr, ledger.ErrFenced) {
		r.Logger.Warn("run could not be ended in the ledger", "run", r.run.ID, "err", cerr)
	}
}

// exitCode gives the command's exit code but for signals, whose number the
// command knows.
func (r *Report) exitCode() int {
	switch {
	case r.End == EndFailed:
		return ExitFailed
	case r.End != EndFinished:
		return ExitReplayable
	case r.Compared != nil && (r.Compared.Differ() > 0 || r.Quarantined > 0):
		return ExitReplayable
	case r.Left.Replayable > 0 || r.Left.Waiting > 0 || len(r.Unrouted) > 0:
		return ExitReplayable
	case r.Left.Rejected > 0 || r.Left.Quarantined > 0:
		return ExitHeld
	}
	return ExitOK
}

// left counts what is left: of the run's selection, or with a limit of what this
// process has begun.
func (r *runner) left(ctx context.Context) (LeftCounts, error) {
	if r.touched == nil {
		left, err := r.Ledger.Left(ctx, r.lease)
		return LeftCounts{
			Replayable: left.Replayable, Waiting: left.Waiting, Quarantined: left.Quarantined, Rejected: left.Rejected,
		}, err
	}
	ids := make([]uuid.UUID, 0, len(r.touched))
	for id := range r.touched {
		ids = append(ids, id)
	}
	var left LeftCounts
	for part := range slices.Chunk(ids, 500) {
		err := each(ctx, r.Ledger, ledger.Filter{IDs: part}, func(q ledger.Request) {
			switch {
			case q.State == capture.StateQuarantined:
				left.Quarantined++
			case q.State == capture.StateRejected:
				left.Rejected++
			case q.Replayable:
				left.Replayable++
			case q.State.Open():
				left.Waiting++
			}
		})
		if err != nil {
			return left, err
		}
	}
	return left, nil
}

// untested is what is left of a test replay: what it has sent is done, whatever
// came of it, and what is quarantined is none of its business.
func (r *runner) untested(left LeftCounts, c *Comparison) LeftCounts {
	if r.touched == nil {
		open := max(left.Replayable+left.Rejected+left.Waiting-c.failed, 0)
		waiting := min(left.Waiting, open)
		return LeftCounts{Replayable: open - waiting, Waiting: waiting}
	}
	left = LeftCounts{}
	for id := range r.touched {
		if _, done := c.tested[id]; !done {
			left.Replayable++
		}
	}
	return left
}

// sends reports whether the run's filter lets a request be sent to its target.
func (r *runner) sends(f *ledger.Filter, q *ledger.Request) bool {
	if r.Target != "" {
		return f.Testable(q, q.Status)
	}
	return f.Sendable(q, q.Status)
}

// newer reports whether requests match that came after the selection was frozen.
func (r *runner) newer(ctx context.Context) (bool, error) {
	now, err := r.Ledger.Now(ctx)
	if err != nil {
		return false, err
	}
	filter := r.Selection.Resolve(now)
	cursor := ""
	for {
		page, err := r.Ledger.List(ctx, filter, cursor, 1000)
		if err != nil {
			return false, err
		}
		for _, q := range page.Requests {
			if q.Seq > r.run.MaxSeq && r.sends(&filter, &q) {
				return true, nil
			}
		}
		if cursor = page.Next; cursor == "" {
			return false, nil
		}
	}
}
