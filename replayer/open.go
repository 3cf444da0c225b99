package replayer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/holdfast-io/holdfast/pkg/ledger"
)

// opened is a run to work on.
type opened struct {
	run    ledger.Run
	lease  ledger.RunLease
	picked bool     // it had been begun before
	others []string // ids of runs that are unfinished too
}

// openRun picks up the unfinished run of this selection, or makes one.
func openRun(ctx context.Context, o Options) (found opened, err error) {
	var now time.Time
	err = retry(ctx, o.Clock, func() (err error) {
		now, err = o.Ledger.Now(ctx)
		return err
	})
	if err != nil {
		return opened{}, err
	}
	filter := o.Selection.Resolve(now)
	unfinished, err := activeRuns(ctx, o.Ledger)
	if err != nil {
		return opened{}, err
	}
	free := false
	for _, r := range unfinished {
		if free {
			found.others = append(found.others, r.ID)
			continue
		}
		if r.Target != o.Target || !o.Selection.Same(r) {
			o.Logger.Info("another run is unfinished", "run", r.ID, "created_at", stamp(r.CreatedAt),
				"filter", describe(r.Filter), "target", r.Target, "owner", r.Owner)
			found.others = append(found.others, r.ID)
			continue
		}
		if free, err = abandoned(ctx, o, r); err != nil {
			return opened{}, err
		}
		if free && o.Again {
			free = false
			if err := o.Ledger.CancelRun(ctx, r.ID); err != nil && !errors.Is(err, ledger.ErrConflict) {
				return opened{}, fmt.Errorf("cancel the run before: %w", err)
			}
			o.Logger.Info("a run that was left unfinished is cancelled, a new one sends all again", "run", r.ID)
			continue
		}
		if free {
			filter = r.Filter
			continue
		}
		found.others = append(found.others, r.ID)
		o.Logger.Info("another process works on a run with the same filter", "run", r.ID, "owner", r.Owner)
	}
	if !free {
		// A new selection is frozen once all that was durable anywhere when the
		// command began is in the ledger: else it would leave out what a recorder
		// that was away has yet to take, and call the rest everything.
		if err := o.Fence.Pass(ctx); err != nil {
			return opened{}, err
		}
	}
	err = retry(ctx, o.Clock, func() (err error) {
		found.run, found.lease, found.picked, err = o.Ledger.OpenRun(ctx, filter, o.Target, o.Owner, runLease)
		return err
	})
	if err != nil {
		return opened{}, err
	}
	return found, nil
}

// activeRuns gives the unfinished runs, the oldest first.
func activeRuns(ctx context.Context, l Ledger) ([]ledger.Run, error) {
	var active []ledger.Run
	cursor := ""
	for {
		runs, next, err := l.Runs(ctx, cursor, 1000)
		if err != nil {
			return nil, fmt.Errorf("list runs: %w", err)
		}
		for _, r := range runs {
			if r.State == ledger.RunActive {
				active = append(active, r)
			}
		}
		if next == "" {
			slices.SortFunc(active, func(a, b ledger.Run) int { return bytes.Compare([]byte(a.ID), []byte(b.ID)) })
			return active, nil
		}
		cursor = next
	}
}

// abandoned reports whether nobody works on the run any more. A process that was
// killed leaves a lease behind: its run is watched until the lease is renewed,
// which only the living do, or over.
func abandoned(ctx context.Context, o Options, r ledger.Run) (bool, error) {
	until := r.LeaseUntil
	said := false
	for {
		now, err := o.Ledger.Now(ctx)
		if err != nil {
			return false, err
		}
		if !until.After(now) {
			return true, nil
		}
		if !said {
			o.Logger.Info("waiting to see whether an unfinished run is still worked on", "run", r.ID, "owner", r.Owner, "until", stamp(until))
			said = true
		}
		if err := o.Clock.Sleep(ctx, min(until.Sub(now), runLease/10)); err != nil {
			return false, err
		}
		seen, err := o.Ledger.Run(ctx, r.ID)
		switch {
		case err != nil:
			return false, err
		case seen.State != ledger.RunActive || seen.LeaseUntil.After(until):
			return false, nil
		}
		until = seen.LeaseUntil // a holder that leaves makes it earlier
	}
}

// keep extends the run's lease at each tick until ctx ends or the lease is lost.
func (r *runner) keep(ctx context.Context, tick <-chan time.Time) {
	held := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick:
		}
		asked := time.Now()
		run, err := r.Ledger.KeepRun(ctx, r.lease, runLease)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && run.State == ledger.RunCancelled:
			r.halt(ErrCancelled)
			return
		case err == nil:
			held = asked
		case errors.Is(err, ledger.ErrFenced):
			r.halt(r.fenced(ctx))
			return
		case time.Since(held) >= runLease:
			r.halt(fmt.Errorf("keep run: %w", err))
			return
		default:
			r.Logger.Warn("lease of the run could not be extended", "err", err)
		}
	}
}
